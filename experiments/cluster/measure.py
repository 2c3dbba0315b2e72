"""Whether links are as slow as asked: plain TCP, all-reduces and transfers of JAX beside the rate.

    python experiments/cluster/measure.py

Needs root, as `cluster.py` does. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster import Cluster, UnavailableError
from layout import bits_per_s

TRAFFIC = Path(__file__).parent / "traffic.py"
HEADER = (
    "| hosts | link, Mbit/s | TCP, of the rate | both ways at once | round trip, ms "
    "| all-reduce, s | of the ring's bound | sent, of the ring's bytes | pulls, of the rate |"
)


def measure(cluster: Cluster, rate: str, num_bytes: int, seconds: float) -> dict[str, Any]:
    """What `traffic.py` finds at a rate."""
    cluster.set_rate(rate)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "found.json")
        command = [sys.executable, str(TRAFFIC), str(path), str(num_bytes), str(seconds)]
        code = cluster.run(command, environment={"PYTHONPATH": str(TRAFFIC.parent)})
        if code:
            raise RuntimeError(f"{TRAFFIC.name} ended with code {code}.")
        return json.loads(path.read_text())


def row(num_hosts: int, rate: str, num_bytes: int, found: dict[str, Any]) -> str:
    """A row of the table."""
    bits = bits_per_s(rate)
    ring_bytes = 2 * (num_hosts - 1) / num_hosts * num_bytes
    cells = [
        f"{num_hosts}",
        f"{bits / 1e6:g}",
        f"{found['one_way_bits_per_s'] / bits:.3f}",
        f"{found['both_ways_bits_per_s'] / bits:.3f}",
        f"{found['round_trip_s'] * 1e3:.3f}",
        f"{found['reduce_s']:.3f}",
        f"{ring_bytes * 8 / bits / found['reduce_s']:.3f}",
        f"{found['reduce_sent_bytes'] / ring_bytes:.4f}",
        f"{found['pull_bits_per_s'] / bits:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measures the links of a cluster.")
    parser.add_argument("--num-hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["50mbit", "200mbit", "1gbit"])
    parser.add_argument("--reduced-bytes", type=int, default=16_000_000)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each flow of TCP")
    given = parser.parse_args()
    print(f"{HEADER}\n|{'---|' * HEADER.count(' |')}")
    try:
        for num_hosts in given.num_hosts:
            with Cluster(num_hosts) as cluster:
                for rate in given.rates:
                    found = measure(cluster, rate, given.reduced_bytes, given.seconds)
                    print(row(num_hosts, rate, given.reduced_bytes, found), flush=True)
    except (UnavailableError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
