"""The tasks of the simulator and the messages between them: actions and all-reduces.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from pdjax.schedules import Schedule
from pdjax.schedules.action import Action
from pdjax.schedules.columns import Columns
from pdjax.schedules.dependencies import find_needs
from pdjax.schedules.text import failure
from pdjax.simulate.all_reduces import all_reduces_of
from pdjax.simulate.events import Tasks, Times, run
from pdjax.simulate.messages import Messages, StageLinks, messages_between
from pdjax.simulate.network import check_workers, find_links
from pdjax.simulate.stage_cost import StageCost, check_costs
from pdjax.topology.topology import Topology


class TaskGraph:
    """The tasks of a schedule that is written out, on some workers.

    The first tasks are the actions, by their positions in the columns; each worker is a lane. The
    all-reduces of each stage follow, a lane for each stage that has replicas.

    Args:
        schedule: the schedule.
        columns: the same written out.
        costs: of each stage.
        topology: how the workers are joined; None if transfers take no time.
        workers: for each worker its number in the topology; None if it is the same.

    Attributes:
        columns: the actions.
        all_reduces: the all-reduces of each stage that has replicas.
        firsts: for each of these stages the first task that is one of its all-reduces.
        lane: for each task its lane.
        messages: the messages between tasks, by the task that sends.
        travels: which messages go to another worker and have any bytes.

    Raises:
        ValueError: if the costs or the workers are not for this schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        columns: Columns,
        costs: Sequence[StageCost],
        topology: Topology | None,
        workers: Sequence[int] | None,
    ) -> None:
        check_costs(costs, schedule.num_stages)
        self.costs, self.topology, self.columns = costs, topology, columns
        self.machines = check_workers(workers, columns.num_workers, topology)
        self.all_reduces = all_reduces_of(columns, costs, schedule.holders, self.machines, topology)
        rounds = list(map(len, self.all_reduces))
        self.firsts = list(accumulate(rounds, initial=len(columns)))[:-1]
        own = np.arange(len(rounds)) + columns.num_workers
        self.lane = np.concatenate([columns.worker, np.repeat(own, rounds)])
        links = StageLinks.of(costs)
        self._needs = find_needs(columns, links)
        between = messages_between(columns, self._needs, links)
        around = [
            each.messages(first) for each, first in zip(self.all_reduces, self.firsts, strict=True)
        ]
        self.messages = Messages.concatenate([between, *around]).sorted_by("source")
        source, target = self.lane[self.messages.source], self.lane[self.messages.target]
        self.travels = (self.messages.num_bytes > 0) & (source != target)

    def times(self) -> Times:
        """The times of all tasks and messages.

        Raises:
            ScheduleError: if an action never can start.
        """
        times = run(self._tasks())
        stuck = [task for task in times.stuck if task < len(self.columns)]
        if stuck:
            rows = [tuple(map(Action._make, row)) for row in self.columns.rows()]
            actions = [action for row in rows for action in row]
            first = actions[stuck[0]]
            raise failure(f"{first} waits for ever", rows, first)
        return times

    @property
    def busy_s(self) -> float:
        """How long all workers together compute, in seconds."""
        return float(self._seconds()[: len(self.columns)].sum())

    @property
    def sent_bytes(self) -> float:
        """The bytes that all workers together send."""
        rounds = (len(each) * len(each.workers) * each.num_bytes for each in self.all_reduces)
        return float(self.messages.num_bytes[self.travels].sum()) + sum(rounds)

    def _tasks(self) -> Tasks:
        link, travel_s, shared = self._links()
        return Tasks(
            self.lane,
            self._seconds(),
            np.bincount(self.messages.target, minlength=len(self.lane)) + self._unsatisfiable(),
            self.columns.num_workers + len(self.all_reduces),
            self.messages.source,
            self.messages.target,
            link,
            travel_s,
            shared,
        )

    def _seconds(self) -> np.ndarray:
        """How long each task takes."""
        each = np.array([cost.seconds for cost in self.costs], float)
        rounds = [np.full(len(each), each.seconds) for each in self.all_reduces]
        return np.concatenate([each[self.columns.stage, self.columns.kind], *rounds])

    def _links(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each message its link and how long it takes; whether links are shared."""
        link = np.full(len(self.travels), -1)
        travel_s = np.zeros(len(self.travels))
        if self.topology is None:
            return link, travel_s, np.zeros(0, bool)
        sent = self.messages.take(self.travels)
        source, target = self.lane[sent.source], self.lane[sent.target]
        links = find_links(self.topology, self.machines[source], self.machines[target])
        link[self.travels] = links.link
        travel_s[self.travels] = sent.num_bytes / links.bytes_per_s
        senders = np.unique(links.link * self.columns.num_workers + source)
        return link, travel_s, np.bincount(senders // self.columns.num_workers) > 1

    def _unsatisfiable(self) -> np.ndarray:
        """For each task 1 if it needs an action of its own stage that does not come before it.

        Such an action is later in the list of the same worker, or on another worker, which does
        not send its stash.
        """
        columns, needs = self.columns, self._needs
        needs = needs.take(needs.need >= 0)
        needs = needs.take(columns.stage[needs.need] == columns.stage[needs.action])
        same = columns.worker[needs.need] == columns.worker[needs.action]
        found = np.zeros(len(self.lane), np.int64)
        found[needs.action[~same | (needs.need > needs.action)]] = 1
        return found
