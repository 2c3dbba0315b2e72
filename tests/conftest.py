"""Five virtual CPU devices for every test, and one compilation cache for all of them."""

import os
import signal
import tempfile

import jax
import pytest
import zoo

from pdjax.pipeline import arguments

jax.config.update("jax_num_cpu_devices", 5)

# A shell starts what runs in its background deaf to SIGINT, and so would be what tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same small programs occur in many tests; compiled once, they are found again on disk, by the
# other test processes too. The folder is new for every run of the tests.
_CACHE = os.environ.setdefault("PDJAX_TEST_CACHE", tempfile.mkdtemp(prefix="pdjax-tests-"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True)
def planned_without_a_clock(monkeypatch):
    """Where no plan is given stages are cut by estimated work: no test may depend on timing.

    Tests of what users get by default say ``plan="auto"``.
    """
    monkeypatch.setattr(arguments, "DEFAULT_PLAN", "balanced")


@pytest.fixture
def compiled_quickly():
    """For tests of large models."""
    with zoo.compiled_quickly():
        yield


@pytest.fixture
def compilations():
    """Counts the programs that XLA is asked to compile."""
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
    before = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
