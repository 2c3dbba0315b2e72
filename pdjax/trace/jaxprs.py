"""Reading, cutting and re-running traced programs.

All code that knows the inside of a jaxpr is here, in `pdjax.trace.inline` and in
`pdjax.split.partial_eval`, and uses the public `jax.extend.core` only. Once a program is inlined,
the rest of pdjax works with lists of equations: it follows values through them
(`pdjax.trace.dataflow`), and turns a list back into a function (`as_function`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from pdjax.trees import is_key

Var = jex.Var
Atom = jex.Var | jex.Literal
Equation = jex.JaxprEqn

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Names of the equations that call a program of their own and do nothing else."""

_HEAVY = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "scan", "while"})
_CHEAP = frozenset(
    """
    abs add and broadcast_in_dim ceil clamp concatenate convert_element_type copy copy_p div eq
    expand_dims floor ge gt integer_pow iota is_finite le lt max min mul ne neg not
    one_minus_square or pad reduce_precision reshape rev round rsqrt select_n sign slice sqrt
    square squeeze stop_gradient sub transpose xor
    """.split()
)
_WITHOUT_DERIVATIVE = frozenset({"ceil", "floor", "nextafter", "round", "sign", "stop_gradient"})
_WRAPPERS = frozenset({"custom_jvp_call", "jit", "pjit", "cond"})
_SHARDED = frozenset({"sharding_constraint", "reshard", "mesh_cast", "shard_map", "xla_pmap"})


def as_function(
    invars: Sequence[Var], equations: Sequence[Equation], outvars: Sequence[Atom]
) -> Callable[..., list[Any]]:
    """The function that runs `equations` on values for `invars` and returns those of `outvars`."""
    return jex.jaxpr_as_fun(closed(invars, equations, outvars))


def closed(
    invars: Sequence[Var], equations: Sequence[Equation], outvars: Sequence[Atom]
) -> jex.ClosedJaxpr:
    """`equations` as a jaxpr that reads `invars` and returns `outvars`."""
    effects = frozenset().union(*(equation.effects for equation in equations))
    about = jex.DebugInfo("jit", "pdjax_stage", None, None)
    jaxpr = jex.Jaxpr((), list(invars), list(outvars), list(equations), effects, about)
    return jex.ClosedJaxpr(jaxpr, ())


def fresh(aval: Any) -> Var:
    """A new variable of the given abstract value."""
    return jex.Var(aval)


def read(atoms: Sequence[Atom], names: Mapping[Var, Atom]) -> list[Any]:
    """The names of `atoms`: those in `names`, or their own."""
    return [names.get(atom, atom) if isinstance(atom, jex.Var) else atom for atom in atoms]


def renamed(equation: Equation, names: Mapping[Var, Atom]) -> Equation:
    """`equation` with other variables in the place of those in `names`."""
    return equation.replace(
        invars=read(equation.invars, names), outvars=read(equation.outvars, names)
    )


def aval(atom: Atom) -> Any:
    """The abstract value of `atom`: its shape and dtype."""
    return atom.aval


def variables(atoms: Iterable[Atom]) -> list[Var]:
    """The distinct variables among `atoms`, in order of first appearance."""
    return list(dict.fromkeys(atom for atom in atoms if not isinstance(atom, jex.Literal)))


# ---------------------------------------------------------------- properties of equations


def scope_path(equation: Equation) -> str:
    """The named scopes of an equation, joined by slashes, without `vmap(...)` and the like."""
    text = str(equation.source_info.name_stack)
    while (bare := re.sub(r"\b\w+\(([^()]*)\)", r"\1", text)) != text:
        text = bare
    return "/".join(part for part in text.split("/") if part)


def is_inexact(atom: Atom) -> bool:
    """Whether a value can carry a gradient: real or complex, neither integer, boolean nor key."""
    return bool(jnp.issubdtype(aval(atom).dtype, jnp.inexact))


def num_elements(atom: Atom) -> int:
    """Number of elements of a value."""
    return math.prod(aval(atom).shape)


def num_bytes(atom: Atom) -> int:
    """Size of a value in bytes."""
    shape = shape_of(atom)
    if is_key(shape):
        shape = jax.eval_shape(jax.random.key_data, shape)
    return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize


def shape_of(atom: Atom) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a value."""
    return jax.ShapeDtypeStruct(aval(atom).shape, aval(atom).dtype)


def has_effects(equation: Equation) -> bool:
    """Whether running the equation twice could be seen: callbacks, prints, other effects."""
    return bool(equation.effects) or any(
        "callback" in primitive for primitive in _primitives(equation)
    )


def is_heavy(equation: Equation) -> bool:
    """Whether the equation holds a matrix product, a convolution or a loop."""
    return any(primitive in _HEAVY for primitive in _primitives(equation))


def is_cheap(equation: Equation) -> bool:
    """Whether repeating the equation costs next to nothing: arithmetic and changes of shape.

    Exponentials and their like are left out: they cost more than reading their result back.
    """
    if equation.primitive.name in _WRAPPERS:
        return all(is_cheap(nested) for inner in subprograms(equation) for nested in inner.eqns)
    return equation.primitive.name in _CHEAP


def blocks_gradient(equation: Equation) -> bool:
    """Whether no gradient ever passes: `stop_gradient`, and step functions such as `round`."""
    return equation.primitive.name in _WITHOUT_DERIVATIVE


def subprograms(equation: Equation) -> list[Any]:
    """The jaxprs that an equation carries (the body of a scan, the branches of a cond, …)."""
    return [getattr(inner, "jaxpr", inner) for inner in jex.jaxprs_in_params(equation.params)]


def scan_layout(equation: Equation) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan; the rest is scanned over.

    The names of a scan's parameters differ between versions of JAX; the shapes say the same:
    a value that is scanned over has one axis less inside the loop than outside.
    """
    (body,) = subprograms(equation)

    def same_rank(outer: Sequence[Atom], inner: Sequence[Atom]) -> int:
        return sum(aval(a).ndim == aval(b).ndim for a, b in zip(outer, inner, strict=True))

    num_carry = same_rank(equation.outvars, body.outvars)
    return same_rank(equation.invars, body.invars) - num_carry, num_carry


def unsupported(equation: Equation) -> str | None:
    """Says why pdjax cannot cut a program with this equation, or None if it can."""
    for effect in _effects(equation):
        name = type(effect).__name__
        if "Ordered" in name:
            return f"an ordered side effect ({name})"
        if "Ref" in name or "Read" in name or "Write" in name:
            return "a mutable array (jax.Ref)"
    for primitive in sorted(_primitives(equation)):
        if primitive in _SHARDED:
            return f"a sharding annotation ({primitive})"
    if equation.primitive.name in INLINED and has_shardings(equation):
        return "a nested jax.jit with explicit shardings"
    return None


def fingerprint(equations: Sequence[Equation]) -> str:
    """A digest that is equal for runs of equations alike in everything but variable names."""
    numbers: dict[Var, int] = {}

    def name(atom: Atom) -> str:
        if isinstance(atom, jex.Literal):
            return f"{atom.val}"
        return f"v{numbers.setdefault(atom, len(numbers))}:{aval(atom).str_short()}"

    digest = hashlib.sha256()
    for equation in equations:
        params = " ".join(f"{key}={_stable(equation.params[key])}" for key in equation.params)
        reads = " ".join(map(name, equation.invars))
        makes = " ".join(map(name, equation.outvars))
        digest.update(f"{makes} = {equation.primitive.name}[{params}] {reads}\n".encode())
    return digest.hexdigest()[:16]


def _stable(value: Any) -> str:
    """The text of a parameter without memory addresses."""
    return re.sub(r"0x[0-9a-f]+", "", str(value))


def has_shardings(equation: Equation) -> bool:
    """Whether a nested `jit` says where its inputs or outputs are."""
    given = [
        *equation.params.get("in_shardings", ()),
        *equation.params.get("out_shardings", ()),
    ]
    return any(type(sharding).__name__ != "UnspecifiedValue" for sharding in given)


def _primitives(equation: Equation) -> set[str]:
    names = {equation.primitive.name}
    for inner in subprograms(equation):
        for nested in inner.eqns:
            names |= _primitives(nested)
    return names


def _effects(equation: Equation) -> set[Any]:
    effects = set(equation.effects)
    for inner in subprograms(equation):
        for nested in inner.eqns:
            effects |= _effects(nested)
    return effects
