"""The smallest stash from which a backward pass can be computed.

Between a forward and its backward pass a stage keeps some values. Any set will do from which the
residuals can be computed again by repeatable equations. The set with the fewest bytes is a minimum
cut of a flow network: every value is a pipe as wide as its number of bytes, flow enters at the
values that cannot be computed again, and leaves at the residuals.

    u = x w      f32[2,4], a product: not repeated       enters (32 bytes)
    y = tanh u   f32[2,4], repeatable                    u → y
    z = y y      f32[2,4], repeatable                    y → z
    residuals y and z                                    both leave

Here the cut severs u or y alone (32 bytes), never y and z (64 bytes).

The idea of choosing recomputation by a minimum cut is that of the min-cut partitioner of PyTorch's
AOTAutograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from pdjax.trace import dataflow, jaxprs
from pdjax.trace.jaxprs import Equation, Var

Repeatable = Callable[[Equation], bool]
"""Whether the backward pass may run an equation of the forward pass again."""

_UNLIMITED = 2**30  # capacities are 32-bit integers
_PER_VALUE_BYTES = 64  # the price of one more array, however small


def smallest_stash(
    equations: Sequence[Equation],
    at_hand: Sequence[Var],
    received: Sequence[Var],
    residuals: Sequence[Var],
    repeatable: Repeatable,
) -> tuple[Var, ...]:
    """Chooses the values to store.

    Args:
        equations: the forward pass.
        at_hand: inputs that the backward pass is given anyway.
        received: inputs that it is given only if they are stored.
        residuals: the values that the backward pass must have.
        repeatable: the equations that it may run again.

    Returns:
        The values to store, in program order. All `residuals` can be computed from them and
        `at_hand` by repeatable equations.
    """
    given = set(at_hand)
    network = _Network()
    # 1. Flow enters at the results of equations that are not repeated, and goes on from the inputs
    #    of a repeatable equation to its results. Values at hand carry none.
    for equation in (equations[i] for i in dataflow.needed(equations, residuals, given)):
        again = repeatable(equation)
        inputs = [var for var in jaxprs.variables(equation.invars) if var not in given]
        for var in equation.outvars:
            if not again:
                network.enter(var)
            for source in inputs if again else ():
                network.connect(source, var)
    # 2. It enters at the received values too, and leaves at the residuals.
    for var in received:
        network.enter(var)
    for var in residuals:
        if var not in given:
            network.leave(var)
    # 3. The values that the minimum cut severs are stored.
    chosen = network.minimum_cut()
    order = [*received, *(var for equation in equations for var in equation.outvars)]
    return tuple(var for var in order if var in chosen)


class _Network:
    """A flow network with two nodes, in and out, for every value."""

    def __init__(self) -> None:
        self.values: dict[Var, int] = {}
        self.edges: list[tuple[int, int, int]] = []  # from, to, capacity in bytes; 0 = unlimited

    def _node(self, var: Var) -> int:
        """The number of the value's in node; its out node is the next."""
        if var not in self.values:
            node = self.values[var] = 2 + 2 * len(self.values)
            self.edges.append((node, node + 1, jaxprs.num_bytes(var) + _PER_VALUE_BYTES))
        return self.values[var]

    def enter(self, var: Var) -> None:
        self.edges.append((0, self._node(var), 0))

    def leave(self, var: Var) -> None:
        self.edges.append((self._node(var) + 1, 1, 0))

    def connect(self, source: Var, var: Var) -> None:
        self.edges.append((self._node(source) + 1, self._node(var), 0))

    def minimum_cut(self) -> set[Var]:
        """The values whose own pipe (from in to out) the minimum cut severs."""
        if not self.values:
            return set()
        capacity = self._matrix()
        flow = maximum_flow(capacity, 0, 1).flow
        left = csr_array(capacity - flow)
        left.eliminate_zeros()
        reached = set(breadth_first_order(left, 0, return_predecessors=False).tolist())
        return {
            var for var, node in self.values.items() if node in reached and node + 1 not in reached
        }

    def _matrix(self) -> csr_array:
        edges = dict.fromkeys(self.edges)
        sources, targets, sizes = (np.array(column) for column in zip(*edges, strict=True))
        unit = max(1, int(sizes.sum()) // (_UNLIMITED // 4))
        scaled = np.where(sizes == 0, _UNLIMITED, -(-sizes // unit))
        count = 2 + 2 * len(self.values)
        shape = (count, count)
        return csr_array((scaled.astype(np.int32), (sources, targets)), shape=shape)
