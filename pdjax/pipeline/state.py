"""What `Pipeline.init` makes: the state of a training, and what all its states share."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from pdjax.errors import BrokenPipelineError, NonFiniteLossError
from pdjax.pipeline.prepared import Prepared
from pdjax.runtime.executor import Executor
from pdjax.runtime.state import Run


@dataclass(eq=False)
class Training:
    """What all states that descend from one `Pipeline.init` share.

    Attributes:
        owner: the `Pipeline` that made it.
        prepared: all that was traced and compiled.
        param_origins: where each parameter came from.
        model_state_origins: where each leaf of the mutable state came from.
        raises: whether a loss that is NaN or infinite is an error.
        losses: the losses that were not looked at yet, with their steps.
        broken: what went wrong, if something did.
    """

    owner: object
    prepared: Prepared
    param_origins: Any
    model_state_origins: Any
    raises: bool
    losses: deque[tuple[int, Any]] = field(default_factory=deque)
    broken: str | None = None

    def together(self, call: str) -> AbstractContextManager[None]:
        """Surrounds a call of `Pipeline` that all processes of the training must make.

        Raises:
            ClusterError: if one of them has ended without it.
        """
        peers = self.prepared.peers
        return nullcontext() if peers is None else peers.taking_part(call)

    @contextmanager
    def breaking_on(self, kinds: type[BaseException], step: int) -> Iterator[None]:
        """Marks the training as broken if what it holds may be half done or poisoned.

        An interrupt breaks what it interrupts while that is being dispatched, but not a mere wait.

        Args:
            kinds: the errors that do so.
            step: in which they happen.

        Raises:
            BrokenPipelineError: for such an error, unless it is an interrupt.
        """
        try:
            yield
        except kinds as error:
            self.broken = f"step {step} failed with {type(error).__name__}: {error}"
            if not isinstance(error, Exception):
                raise
            raise BrokenPipelineError(self.broken) from error

    def check_losses(self, *, at_most: int) -> None:
        """Looks at the losses that are there, and waits until `at_most` are outstanding.

        Several processes look at the same ones only, so that all stop at the same step.

        Raises:
            NonFiniteLossError: if one is NaN or infinite, and that is an error.
            BrokenPipelineError: if one cannot be had.
        """
        losses, peers = self.losses, self.prepared.peers
        while losses and (len(losses) > at_most or (peers is None and losses[0][1].is_ready())):
            step, loss = losses[0]
            with self.breaking_on(Exception, step):
                value = loss.item()
            losses.popleft()
            if self.raises and not math.isfinite(value):
                losses.clear()  # said once; what came after it is no news
                raise NonFiniteLossError(
                    f"the loss of step {step} (counted from 0) is {value}. Lower the learning "
                    "rate or clip the gradients; look for a log or a division that can meet "
                    "zero; or pass nonfinite='ignore' to go on regardless."
                )
            if peers is not None:
                peers.completed(step + 1)
        if peers is not None:
            for step in [step for step, loss in losses if loss.is_ready()][-1:]:
                peers.completed(step + 1)


class PipelineState:
    """Everything that training changes: weights, optimizer state, what is in flight.

    Made by `Pipeline.init`, passed on by `Pipeline.step` and `Pipeline.drain`. Each may be given
    to one of these once: a step reuses the memory of the state that it is given.

    Attributes:
        step: number of minibatches handed over so far.
        training: what it shares with the states before and after it.
    """

    def __init__(self, training: Training, run: Run, step: int) -> None:
        self.step = step
        self.training = training
        self._run: Run | None = run

    @property
    def run(self) -> Run:
        """What the executor holds.

        Raises:
            ValueError: if the state was used before.
        """
        if self._run is None:
            raise ValueError(
                f"this state (step {self.step}) was used before, and the step that used it "
                "reused its memory. Go on with the state that it returned: "
                "state, metrics = pipe.step(state, batch)."
            )
        return self._run

    def take(self) -> Run:
        """What the executor holds, after which the state is used."""
        run, self._run = self.run, None
        return run

    @property
    def executor(self) -> Executor:
        """What dispatches the steps; its `observer` is told of every program."""
        return self.training.prepared.executor

    def __repr__(self) -> str:
        used = "" if self._run else ", used"
        return f"PipelineState(step={self.step}{used})"
