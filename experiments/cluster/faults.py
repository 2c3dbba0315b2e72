"""Kills, stops or cuts off each host of a training run, and sees how the others end.

    sudo python experiments/cluster/faults.py [--num-hosts 3]

Prints a table: how long it took until all others had ended, their exit codes, and the message of
the first of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
import tempfile
import time
from pathlib import Path

from cluster import Cluster

from pdjax.launch import Processes

FAULTS = ("kill -9", "SIGSTOP", "cut")
TRAINING_S, MOST_S, SOME_STEPS = 120.0, 30.0, 20


def wait_for_training(metrics: Path, said: io.StringIO) -> None:
    """Waits until some steps are done."""
    end = time.monotonic() + TRAINING_S
    while not metrics.exists() or metrics.read_text().count("\n") < SOME_STEPS:
        if time.monotonic() > end:
            raise SystemExit(f"no training in {TRAINING_S} s:\n{said.getvalue()}")
        time.sleep(0.05)


def strike(cluster: Cluster, processes: Processes, fault: str, host: int) -> None:
    """Does the fault to a host."""
    if fault == "cut":
        cluster.cut(host)
    else:
        processes.send(host, signal.SIGKILL if fault == "kill -9" else signal.SIGSTOP)


def run(cluster: Cluster, fault: str, host: int, num_hosts: int, folder: Path) -> list[str]:
    """One run with one fault: a row of the table."""
    command = [sys.executable, "-m", "pdjax.train", "--model", "mlp", "--steps", "100000"]
    output = folder / f"{fault} {host}"
    command += ["--plan", "balanced", "--output", str(output)]
    others = [number for number in range(num_hosts) if number != host]
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        cluster.running(command, end_together=False) as processes,
    ):
        wait_for_training(output / "metrics.jsonl", said)
        strike(cluster, processes, fault, host)
        start = time.monotonic()
        while any(processes.codes[number] is None for number in others):
            if time.monotonic() > start + MOST_S:
                break
            time.sleep(0.02)
        seconds, codes = time.monotonic() - start, [processes.codes[n] for n in others]
        if fault == "cut":
            cluster.mend(host)
        processes.send(host, signal.SIGKILL)
    lines = [line for line in said.getvalue().splitlines() if "] error: " in line]
    word = lines[0] if lines else "nothing"
    return [fault, f"host{host}", f"{seconds:.2f}", " ".join(map(str, codes)), word]


def main() -> None:
    parser = argparse.ArgumentParser(description="How the others end when one is lost.")
    parser.add_argument("--num-hosts", type=int, default=3)
    num_hosts = parser.parse_args().num_hosts
    print("| fault | of | s until all others ended | exit codes | the first word |")
    print("|---|---|---:|---|---|")
    with tempfile.TemporaryDirectory() as folder, Cluster(num_hosts) as cluster:
        for fault in FAULTS:
            for host in range(num_hosts):
                row = run(cluster, fault, host, num_hosts, Path(folder))
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
