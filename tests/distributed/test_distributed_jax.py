"""What `pdjax.distributed` takes from JAX that is private there."""

from __future__ import annotations

import jax
import pytest
from jax._src import clusters

from pdjax.distributed import current, jax_client
from pdjax.errors import PdjaxWarning

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3,5]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "JAX_COORDINATOR_PORT": "1234",
}


def test_without_other_processes():
    jax.devices()
    assert jax_client.has_started_backends()
    assert not jax_client.is_initialized()
    assert not jax_client.handles_sigterm()
    assert jax_client.num_processes_in_cluster() == 1
    assert jax_client.detect(1.0) is None
    assert current() is None


def test_a_cluster_that_jax_knows(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert jax_client.num_processes_in_cluster() == 2
    assert jax_client.detect(1.0) == (jax_client.Joined("node3:1234", 2, 1), (0,))


class _Cluster:
    opt_in_only_method = False
    error: Exception = KeyError("job-name")

    @classmethod
    def is_env_present(cls) -> bool:
        return True

    @classmethod
    def get_process_count(cls) -> int:
        raise cls.error


def test_a_cluster_in_which_this_is_no_job(monkeypatch):
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [_Cluster])
    assert jax_client.num_processes_in_cluster() == 1


def test_a_cluster_that_does_not_say(monkeypatch):
    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [_Cluster])
    monkeypatch.setattr(_Cluster, "error", RuntimeError("403"))
    with pytest.warns(PdjaxWarning, match="does not say how many processes there are: 403"):
        assert jax_client.num_processes_in_cluster() == 1
