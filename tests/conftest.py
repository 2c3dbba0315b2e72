"""Markers, five virtual CPU devices, and one compilation cache for all tests.

Every test file gets the marker ``jax`` or not, and ``processes`` or not, by the lists below. With
``-m "not jax and not processes"`` files that need JAX are not even imported.
"""

import itertools
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

WITHOUT_JAX = (
    *("schedules", "timeline", "simulate", "test_imports.py"),
    *("plan/test_plan.py", "plan/test_planner.py", "plan/test_search.py"),
    *("profile/test_profile.py", "distributed/test_connections.py"),
    *("distributed/test_distributed.py", "distributed/test_rendezvous.py"),
)
"""Folders and files of tests that run without JAX."""

PROCESSES = ("distributed", "pipeline/test_processes.py")
"""Folders and files of tests with several processes, or with threads in their place."""

# A shell starts background programs deaf to SIGINT, and so would be the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def is_in(path, places) -> bool:
    """Whether a file of tests is one of some files, or in one of some folders."""
    return any((TESTS / place) in (path, *path.parents) for place in places)


def leaves_out_jax(config) -> bool:
    return "not jax" in config.getoption("markexpr")


def needs_jax(path) -> bool:
    """Of files with tests; the examples in docstrings of `pdjax` count as such."""
    return not is_in(path, WITHOUT_JAX)


def pytest_configure(config):
    if leaves_out_jax(config):
        return
    import jax

    jax.config.update("jax_num_cpu_devices", 5)
    # The same small programs occur in many tests; compiled once, they are found again on disk, by
    # the other test processes too. The folder is new for every run of the tests.
    folder = os.environ.setdefault("PDJAX_TEST_CACHE", tempfile.mkdtemp(prefix="pdjax-tests-"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_ignore_collect(collection_path, config):
    if not leaves_out_jax(config):
        return None
    examples = collection_path == TESTS.parent / "pdjax"
    return True if examples or (collection_path.is_file() and needs_jax(collection_path)) else None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if needs_jax(item.path):
            item.add_marker(pytest.mark.jax)
        if is_in(item.path, PROCESSES):
            item.add_marker(pytest.mark.processes)
    if "grid" not in config.getoption("markexpr"):
        left_out = set(grids_left_out(items))
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


def grids_left_out(items):
    """The tests of full grids that are not needed to cover them.

    A test with the marker ``grid(strength)`` runs for a sample of its parameters in which every
    combination of values of so many arguments occurs: with 1 every value, with 2 every pair.
    """
    grids = {}
    for item in items:
        if item.get_closest_marker("grid"):
            grids.setdefault((item.path, item.originalname), []).append(item)
    for members in grids.values():
        strength = members[0].get_closest_marker("grid").args[0]
        yield from set(members) - set(covering(members, strength))


def covering(members, strength):
    """A sample that covers all combinations of `strength` arguments, chosen greedily."""

    def combinations(member):
        values = sorted((name, repr(value)) for name, value in member.callspec.params.items())
        return set(itertools.combinations(values, strength))

    open_ = {member: combinations(member) for member in members}
    while any(open_.values()):
        best = max(members, key=lambda member: len(open_[member]))
        covered = set(open_[best])
        for left in open_.values():
            left -= covered
        yield best


def pytest_sessionfinish(session):
    if leaves_out_jax(session.config) and "jax" in sys.modules:
        raise pytest.UsageError("a test without the marker jax imports JAX")


@pytest.fixture(autouse=True)
def planned_without_a_clock(request, monkeypatch):
    """Where no plan is given stages are cut by estimated work: no test may depend on timing.

    Tests of what users get by default say ``plan="auto"``.
    """
    if request.node.get_closest_marker("jax"):
        from pdjax.pipeline import arguments

        monkeypatch.setattr(arguments, "DEFAULT_PLAN", "balanced")


@pytest.fixture
def compiled_quickly():
    """For tests of large models."""
    import zoo

    with zoo.compiled_quickly():
        yield


@pytest.fixture
def compilations():
    """Counts the programs that XLA is asked to compile."""
    import jax

    counted: list[str] = []
    active = [True]

    def listen(event: str, **_: object) -> None:
        if active[0] and event.endswith("compile_requests_use_cache"):
            counted.append(event)

    jax.monitoring.register_event_listener(listen)
    yield counted
    active[0] = False


@pytest.fixture
def cache_directory(tmp_path):
    """A new folder for JAX's compilation cache, and so for measurements."""
    import jax

    before = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
