"""The costs of the layers of a model, estimated from a device's rates: nothing is run.

The roofline model (Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance
Model for Multicore Architectures", CACM 2009): a pass is bound by its operations or by its memory
traffic, whichever takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdjax.profile.finest_cut import PassCosts, assemble, finest_cut
from pdjax.profile.profile import Profile, check_batch_size
from pdjax.profile.rates import Rates
from pdjax.split.differentiate import differentiate_alone
from pdjax.trace import dataflow, jaxprs
from pdjax.trace.flops import equation_flops
from pdjax.trace.jaxprs import Equation, Var
from pdjax.trace.layers import LayerGraph
from pdjax.trace.program import Program

_LOOKUPS = frozenset({"gather", "dynamic_slice"})


def estimate(graph: LayerGraph, rates: Rates, *, batch_size: int) -> Profile:
    """The costs of the layers of a model on a device of given rates; nothing is run.

    Each pass takes as long as its operations, or as reading its inputs and writing its outputs,
    whichever is longer: ``max(flops / flops_per_s, bytes / bytes_per_s)``. Both passes are counted
    equation by equation, so a backward pass comes to about twice its forward pass where it makes
    gradients of weights and activations, and to less where it makes one of them.

    Args:
        graph: the model, traced for one microbatch; its parameters may be shapes.
        rates: the operations and bytes of the device in a second.
        batch_size: examples in that microbatch.

    Raises:
        ValueError: if `batch_size` makes no sense.
    """
    check_batch_size(batch_size)
    cut = finest_cut(graph)
    costs = []
    for unit in cut.distinct:
        programs = differentiate_alone(cut.split, cut.split.stages[unit])
        costs.append(
            PassCosts(
                forward_s=_roofline_s(programs.forward, rates),
                backward_s=_roofline_s(programs.backward, rates),
                stash_bytes=programs.saved_bytes,
                flops=sum(map(equation_flops, programs.forward.equations)),
            )
        )
    return assemble(graph, cut, costs, batch_size=batch_size, device=rates.name, source="analytic")


def _roofline_s(program: Program, rates: Rates) -> float:
    flops = sum(map(equation_flops, program.equations))
    return max(flops / rates.flops_per_s, _moved_bytes(program) / rates.bytes_per_s)


def _moved_bytes(program: Program) -> float:
    """Bytes that a pass must read and write if all between its inputs and outputs is fused."""
    results = jaxprs.variables(atom for group in program.outputs.values() for atom in group)
    readers = dataflow.readers(program.equations)
    reads = {var: [program.equations[at] for at in readers.get(var, ())] for var in program.reads}
    return sum(map(jaxprs.num_bytes, results)) + sum(
        _read_bytes(var, equations) for var, equations in reads.items()
    )


def _read_bytes(var: Var, readers: Sequence[Equation]) -> int:
    """Bytes that are read of an input: of a table from which rows are looked up, these rows."""
    if not readers or any(
        equation.primitive.name not in _LOOKUPS or equation.invars[0] is not var
        for equation in readers
    ):
        return jaxprs.num_bytes(var)
    rows = sum(jaxprs.num_bytes(equation.outvars[0]) for equation in readers)
    return min(rows, jaxprs.num_bytes(var))
