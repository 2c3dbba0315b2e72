"""An estimate of the work in an equation, from its shapes alone.

It serves to place the first cuts of a model that has not been measured. Matrix products and
convolutions count two operations for each multiply-add; every other equation counts one for each
element that it writes.
"""

from __future__ import annotations

import math

from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Equation


def equation_flops(equation: Equation) -> float:
    """Floating-point operations of one equation, the bodies of loops and branches included."""
    name = equation.primitive.name
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    inner = jaxprs.subprograms(equation)
    if not inner:
        return float(sum(jaxprs.num_elements(var) for var in equation.outvars))
    bodies = [sum(equation_flops(nested) for nested in body.eqns) for body in inner]
    if name == "cond":
        return max(bodies)
    if name.startswith("custom_"):
        return bodies[0]
    return sum(bodies) * equation.params.get("length", 1)


def _dot_flops(equation: Equation) -> float:
    left, _ = equation.invars
    (contracting, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(jaxprs.aval(left).shape[axis] for axis in contracting)
    return 2.0 * depth * jaxprs.num_elements(equation.outvars[0])


def _convolution_flops(equation: Equation) -> float:
    _, kernel = equation.invars
    numbers = equation.params["dimension_numbers"]
    num_filters = jaxprs.aval(kernel).shape[numbers.rhs_spec[0]]
    per_output = jaxprs.num_elements(kernel) / num_filters
    return 2.0 * per_output * jaxprs.num_elements(equation.outvars[0])
