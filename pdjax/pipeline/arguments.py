"""Reads and checks what a person hands to a `Pipeline`, before anything is traced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from pdjax.plan import Plan
from pdjax.profile.files import load_profile
from pdjax.profile.profile import Profile
from pdjax.schedules import ALGORITHMS, Schedule, find_algorithm
from pdjax.schedules.building import num_workers_of
from pdjax.split.differentiate import Remat
from pdjax.topology.topology import Topology
from pdjax.units import format_bytes


def check_optimizer(optimizer: Any) -> None:
    """Raises ValueError if `optimizer` is no optax optimizer."""
    if not callable(getattr(optimizer, "init", None)):
        called = ", called with its settings" if callable(optimizer) else ""
        raise ValueError(
            f"optimizer={optimizer!r}; expected an optax optimizer{called}, such as "
            "optax.adam(1e-3)."
        )


def check_rng(rng: Any) -> None:
    """Raises ValueError if `rng` is no random key."""
    if not hasattr(rng, "dtype"):
        raise ValueError(f"rng={rng!r}; expected a random key, such as jax.random.key(0).")


AUTO = "auto"
"""What stands in the place of a schedule that is to be found."""

DEFAULT_PLAN: Literal["auto", "balanced"] = "auto"
"""What is done where no plan is given."""


def read_plan(
    plan: Plan | str | PathLike[str] | Sequence[str] | None,
) -> Plan | tuple[str, ...] | Literal["auto", "balanced"]:
    """What to plan, or the plan.

    Raises:
        ValueError: if it is none of what `Pipeline` takes, or cannot be run.
    """
    plan = DEFAULT_PLAN if plan is None else plan
    if isinstance(plan, str) and plan in ("auto", "balanced"):
        return plan  # type: ignore[return-value]  # one of the two
    if isinstance(plan, str) and not plan.endswith(".json"):
        raise ValueError(
            f"plan={plan!r}; expected 'auto', 'balanced', a Plan, the path of a .json file, or a "
            f"list of names: plan=[{plan!r}]."
        )
    if isinstance(plan, (str, PathLike)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        return _read_names(plan)
    return plan


def _read_names(plan: Any) -> tuple[str, ...]:
    """The names of the layers that begin stages; of none if there is one stage."""
    names = tuple(plan) if isinstance(plan, (list, tuple)) else (plan,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"plan={plan!r}; expected 'auto', 'balanced', a Plan, the path of a .json file, or a "
            "list of names."
        )
    return names


def read_topology(topology: Topology | str | None) -> Topology | None:
    """A topology from its text form, if it is not one already."""
    if topology is None or isinstance(topology, Topology):
        return topology
    if not isinstance(topology, str):
        raise ValueError(
            f"topology={topology!r}; expected a Topology or its text form, such as '4@10GB/s'."
        )
    return Topology.parse(topology)


def read_profile(profile: Profile | str | PathLike[str] | None) -> Profile | None:
    """A profile from a file, if it is not one already."""
    if profile is None or isinstance(profile, Profile):
        return profile
    if not isinstance(profile, (str, PathLike)):
        raise ValueError(f"profile={profile!r}; expected a Profile, or the path of one.")
    return load_profile(profile)


def check_machines(
    plan: Any, topology: Topology | None, profile: Profile | None, schedule: str | Schedule
) -> None:
    """Raises ValueError if what an automatic plan or schedule needs is given where neither is.

    A `Plan` may come with a topology: it must fit into that.
    """
    if plan == "auto" or schedule == AUTO:
        return
    if profile is not None or (topology is not None and not isinstance(plan, Plan)):
        raise ValueError(
            "topology and profile serve plan='auto' and schedule='auto', but another plan and "
            "schedule are given. Leave them out, or leave the plan out."
        )
    if topology is None:
        return
    for number, stage in enumerate(plan.stages):
        for worker in stage.workers:
            if worker >= topology.num_workers:
                raise ValueError(
                    f"stage {number} of the plan is on worker {worker}, but the topology "
                    f"{topology} has {topology.num_workers}. Plan for this topology."
                )
            limit = topology.memory_bytes[worker] if topology.memory_bytes else math.inf
            if stage.peak_bytes > limit:
                raise ValueError(
                    f"stage {number} of the plan needs {format_bytes(stage.peak_bytes)}, but "
                    f"worker {worker} of {topology} has {format_bytes(limit)}. Plan for this "
                    "topology."
                )


def read_schedule(schedule: str | Schedule | PathLike[str]) -> str | Schedule:
    """The name of an algorithm, or a schedule, read from a file if that is what is given.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(schedule, PathLike) or (isinstance(schedule, str) and schedule.endswith(".txt")):
        return Schedule.load(schedule)
    if isinstance(schedule, str):
        if schedule != AUTO:
            find_algorithm(schedule)
    elif not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule={schedule!r}; expected a name such as 'one_f_one_b', the path of a .txt "
            "file, or a Schedule such as pdjax.one_f_one_b(num_stages=4, num_microbatches=8)."
        )
    return schedule


def choose_num_chunks(schedule: str | Schedule, wish: int | None) -> int:
    """How many stages each worker runs under a schedule given by its name; 1 under any other.

    Raises:
        ValueError: if the schedule is not for so many.
    """
    if isinstance(schedule, Schedule):
        if wish is not None:
            raise ValueError(
                f"num_chunks={wish}, but the schedule says which stages a worker runs."
            )
        return 1
    if schedule == AUTO:
        if wish is not None:
            raise ValueError(
                f"num_chunks={wish} with schedule='auto', which decides it. Leave it out, or name "
                "the schedule."
            )
        return 1
    algorithm = find_algorithm(schedule)
    chunks = wish or algorithm.num_chunks
    if wish is not None and wish < 1:
        raise ValueError(f"num_chunks={wish}; expected at least 1.")
    algorithm.make(chunks, 1, wish)
    return chunks


def stage_wishes(
    schedule: str | Schedule, num_stages: int | None, plan: Plan | tuple[str, ...] | str, remat: Any
) -> int | None:
    """The number of stages that the arguments ask for, or None.

    Raises:
        ValueError: if they disagree.
    """
    wishes: dict[str, int | None] = {"num_stages": num_stages, "remat": _num_wishes(remat)}
    if isinstance(schedule, Schedule):
        wishes["the schedule"] = schedule.num_stages
    if not isinstance(plan, str):
        wishes["the plan"] = plan.num_stages if isinstance(plan, Plan) else len(plan) + 1
    given = {name: count for name, count in wishes.items() if count is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"these disagree about the number of stages: {given}.")
    return next(iter(given.values()), None)


def choose_placements(
    schedule: str | Schedule,
    num_stages: int | None,
    num_chunks: int,
    devices: Sequence[Any] | None,
    plan: Plan | tuple[str, ...] | str,
) -> tuple[tuple[Sharding, ...], int | None]:
    """Where workers may be placed, and how many stages there are; None if the planner is to say.

    If the number is known these are the first of the devices, but for a plan that names its
    workers.

    Raises:
        ValueError: if there are too few devices.
    """
    available = _available(devices)
    searched = plan == "auto" or (schedule == AUTO and isinstance(plan, str))
    if num_stages is None and searched and num_chunks == 1:
        return tuple(map(_placement, available)), None
    count = len(available) * num_chunks if num_stages is None else num_stages
    if isinstance(schedule, Schedule):
        workers = len(schedule.workers)
    else:
        workers = num_workers_of(schedule, count, num_chunks)
    if isinstance(plan, Plan) and max(plan.replicas) > 1:
        workers = sum(plan.replicas)
    if not 1 <= workers <= len(available):
        fewer = len(available) * num_chunks
        stages = f"{count} stages" + (f", {num_chunks} on each device," if num_chunks > 1 else "")
        many = "as many" if workers == count else str(workers)
        raise ValueError(
            f"{stages} need {many} devices, but there are {len(available)}: {available}. Use "
            f"num_stages={fewer} or fewer (--num-stages on the command line), or more devices. A "
            "CPU has as many as you like: set JAX_PLATFORMS=cpu, and call "
            f"jax.config.update('jax_num_cpu_devices', {workers}) before JAX is first used."
        )
    if not isinstance(plan, Plan) and plan != "auto":
        available = available[:workers]
    return tuple(map(_placement, available)), count


def _available(devices: Sequence[Any] | None) -> list[Any]:
    if devices is None:
        return list(jax.devices())
    try:
        available = list(devices)
    except TypeError:
        available = []
    if not available:
        raise ValueError(
            f"devices={devices!r}; expected a list with one device for each stage, such as "
            "jax.devices()."
        )
    return available


def _placement(device: Any) -> Sharding:
    if isinstance(device, jax.Device):
        return SingleDeviceSharding(device)
    if not isinstance(device, Sharding) or len(device.device_set) > 1:
        raise ValueError(
            f"devices holds {device!r}; expected jax.Device objects, or shardings of one device "
            "each: a stage cannot be spread over several devices yet."
        )
    return device


def choose_num_microbatches(schedule: str | Schedule, wish: int | None) -> int | None:
    """The number of microbatches, if it is known already."""
    if wish is not None and wish < 1:
        raise ValueError(f"num_microbatches={wish}; expected at least 1.")
    if isinstance(schedule, Schedule):
        if wish not in (None, schedule.num_microbatches):
            raise ValueError(
                f"num_microbatches={wish}, but the schedule is for {schedule.num_microbatches}."
            )
        return schedule.num_microbatches
    return wish


def check_option(name: str, value: int | None, schedule: str | Schedule) -> int | None:
    """An option of a schedule, `slack` or `update_lag`, if the schedule can have it.

    Raises:
        ValueError: if it cannot, or the option is no number of passes or rounds.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r}; expected a whole number from 0 on.")
    if schedule == AUTO or isinstance(schedule, Schedule):
        what = "schedule='auto' chooses it" if schedule == AUTO else "the schedule has its own"
        raise ValueError(f"{name}={value}, but {what}. Leave it out, or name the schedule.")
    algorithm = find_algorithm(schedule)
    if value and not algorithm.takes(name):
        able = ", ".join(each for each, row in ALGORITHMS.items() if row.takes(name))
        raise ValueError(
            f"{name}={value}, but {schedule!r} has no {name}. Leave it out, or use one of {able}."
        )
    return value


def check_remat(remat: Remat | Sequence[Remat] | None) -> None:
    """Raises ValueError if `remat` says what there is not."""
    if remat is not None:
        for_each_stage(remat, _num_wishes(remat) or 1)


def _num_wishes(remat: Remat | Sequence[Remat] | None) -> int | None:
    """For how many stages `remat` is given one by one; None if it is for all of them."""
    return len(remat) if isinstance(remat, (list, tuple)) else None


def for_each_stage(remat: Remat | Sequence[Remat], num_stages: int) -> tuple[Remat, ...]:
    """What each stage recomputes."""
    each: tuple[Any, ...] = (remat,) * num_stages
    if isinstance(remat, (list, tuple)):
        each = tuple(remat)
    if len(each) != num_stages:
        raise ValueError(f"remat has {len(each)} entries for {num_stages} stages.")
    for how in each:
        if not callable(how):
            one_of("remat", how, ("none", "full"))
    return each


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> Any:
    """`value`, if it is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, allowed))}.")
    return value
