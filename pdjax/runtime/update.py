"""The optimizer of one stage as jitted functions, placed on its devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from pdjax.split.optimizer import UpdateSplit
from pdjax.trace import jaxprs
from pdjax.trace.jaxprs import Atom
from pdjax.trace.jit import Values, jit_on, total

_PACKED = 64  # elements up to which values travel together in one array

Pack = tuple[Values, Values]
"""Values on their way: one flat array for each dtype of the small ones, then the large ones."""


class UpdateRunner:
    """The compiled phases of one stage's update. Calling one only dispatches it.

    Attributes:
        sources: for each phase but the first the stages whose packs it needs.
        phases: ``phases[k](weights, state, gradients, packs, divisor)``; all but the last
            return a `Pack`, the last returns ``(weights, state)``. `packs` holds for each earlier
            phase a pack of each source. The gradients are divided by the scalar
            `divisor`. The last phase reuses the memory of its state, and that of its weights if
            `donate_weights`, else of its gradients.

    Args:
        split: the update of all stages.
        stage: the stage.
        placement: where it is.
        donate_weights: whether the old weights are needed no more.
        divisor: the shape of the divisor.
        num_minibatches: how many minibatches an update is for, out of the divisor.
    """

    def __init__(
        self,
        split: UpdateSplit,
        stage: int,
        placement: Sharding,
        *,
        donate_weights: bool,
        divisor: jax.ShapeDtypeStruct,
        num_minibatches: Callable[[Any], Any] = lambda _: 1,
    ) -> None:
        self._split = split
        self._num_minibatches = num_minibatches
        self._stage = stage
        self._update = split.stages[stage]
        self.num_phases = len(self._update.phases)
        self.sources = tuple(
            tuple(sorted({source for _, source in group})) for group in self._update.receives
        )
        self.donates_weights = donate_weights
        self._divisor = divisor
        donated = (0, 1) if donate_weights else (1, 2)  # the new weights take the place of one
        self.phases = tuple(
            jit_on(self._phase(k), placement, donate=donated if k == self.num_phases - 1 else ())
            for k in range(self.num_phases)
        )

    def whole(self, weights: Values, state: Values, gradients: Values) -> tuple[Values, Values]:
        """The new weights and state, for use inside another program; only if there is one phase."""
        assert self.num_phases == 1
        return self._phase(0)(weights, state, gradients, (), 1.0)

    def lowerings(self) -> Iterator[Callable[[], Any]]:
        """Functions that lower each phase."""
        weights = _shapes(self._split.params, self._update.params)
        state = self.state_shapes
        packs: list[dict[int, Any]] = []
        for phase, run in enumerate(self.phases):
            if phase == self.num_phases - 1 or self.sends(phase):
                yield partial(run.lower, weights, state, weights, tuple(packs), self._divisor)
            packs.append({s: self._pack_shape(s, phase) for s in self._sources_after(phase)})

    @cached_property
    def pack_shapes(self) -> tuple[Any, ...]:
        """For each phase but the last the shapes of what the stage sends after it."""
        return tuple(self._pack_shape(self._stage, phase) for phase in range(self.num_phases - 1))

    @property
    def state_shapes(self) -> Values:
        """The shapes of the stage's part of the optimizer state."""
        return _shapes(self._split.state, self._update.state)

    def _sources_after(self, phase: int) -> tuple[int, ...]:
        return self.sources[phase + 1] if phase + 1 < self.num_phases else ()

    def _pack_shape(self, source: int, phase: int) -> Any:
        sends = self._split.stages[source].phases[phase].outputs["sends"]
        return jax.eval_shape(pack, _shapes(sends, range(len(sends))))

    def sends(self, phase: int) -> bool:
        """Whether this stage has something for the others after `phase`."""
        return phase < self.num_phases - 1 and bool(self._update.phases[phase].outputs["sends"])

    def _phase(self, phase: int) -> Any:
        update, split = self._update, self._split
        program = update.phases[phase]

        def run(
            weights: Values,
            state: Values,
            gradients: Values,
            packs: Sequence[dict[int, Pack]],
            divisor: Any,
        ) -> Any:
            values: dict[Atom, Any] = {**split.consts}
            if split.num_minibatches is not None:
                count = jnp.asarray(self._num_minibatches(divisor), jnp.int32)
                values[split.num_minibatches] = count
            values |= zip((split.params[i] for i in update.params), weights, strict=True)
            values |= zip((split.state[i] for i in update.state), state, strict=True)
            values |= self._gradients(gradients, divisor)
            values = self._receive(values, packs)
            made = program.run(values)
            if phase < self.num_phases - 1:
                return pack(made["sends"])
            return made["params"], made["state"]

        return run

    def _gradients(self, gradients: Values, divisor: Any) -> dict[Atom, Any]:
        grads = (self._split.grads[i] for i in self._update.params)
        return {
            var: _divided(gradient, divisor) for var, gradient in zip(grads, gradients, strict=True)
        }

    def _receive(
        self, values: dict[Atom, Any], packs: Sequence[dict[int, Pack]]
    ) -> dict[Atom, Any]:
        """Adds what other stages sent; gradients of tied parameters are summed in stage order."""
        parts: dict[Atom, dict[int, Any]] = {}
        for phase, received in enumerate(packs):
            for source, message in received.items():
                sent = self._split.stages[source].phases[phase].outputs["sends"]
                for var, value in zip(sent, unpack(message, sent), strict=True):
                    if (var, source) in self._update.receives[phase + 1]:
                        parts.setdefault(var, {})[source] = value
        for var, received in parts.items():
            if var in values:
                received = {**received, self._stage: values[var]}
            values[var] = total([received[source] for source in sorted(received)])
        return values


def _divided(gradient: Any, divisor: Any) -> Any:
    """The quotient in the gradient's dtype; a weight may be too large for that one itself."""
    wide = jnp.promote_types(gradient.dtype, jnp.result_type(divisor))
    return (gradient.astype(wide) / divisor).astype(gradient.dtype)


def pack(values: Sequence[Any]) -> Pack:
    """Gathers small values into one flat array for each dtype."""
    small: dict[Any, list[Any]] = {}
    large = []
    for value in values:
        if value.size <= _PACKED:
            small.setdefault(value.dtype, []).append(jnp.ravel(value))
        else:
            large.append(value)
    return tuple(jnp.concatenate(group) for group in small.values()), tuple(large)


def unpack(message: Pack, variables: Sequence[Atom]) -> Values:
    """Undoes `pack` for values of the shapes of `variables`."""
    flat = {array.dtype: array for array in message[0]}
    offset = dict.fromkeys(flat, 0)
    large = iter(message[1])
    values = []
    for var in variables:
        size, dtype = jaxprs.num_elements(var), jaxprs.aval(var).dtype
        if size > _PACKED:
            values.append(next(large))
        else:
            start = offset[dtype]
            offset[dtype] = start + size
            values.append(flat[dtype][start : start + size].reshape(jaxprs.aval(var).shape))
    return tuple(values)


def _shapes(variables: Sequence[Any], indices: Iterable[int]) -> Values:
    return tuple(jaxprs.shape_of(variables[i]) for i in indices)
