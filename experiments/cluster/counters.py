"""How many bytes went through the interface of a host.

A training script that runs on a host of a cluster counts the bytes of just its measured steps with

    before = own_counters()
    ...
    sent_bytes = (own_counters() - before).sent_bytes
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Counters:
    """What an interface sent and received, headers of packets included.

    Attributes:
        sent_bytes: bytes sent; packets that the link's queue dropped are not counted.
        received_bytes: bytes received.
        sent_packets: pieces sent. The kernel hands over up to 64 KiB in one piece, and counts the
            headers of a piece once.
        received_packets: pieces received.
    """

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    received_packets: int

    def __sub__(self, before: Counters) -> Counters:
        """What was added since."""
        return Counters(
            self.sent_bytes - before.sent_bytes,
            self.received_bytes - before.received_bytes,
            self.sent_packets - before.sent_packets,
            self.received_packets - before.received_packets,
        )


_FILES = ("tx_bytes", "rx_bytes", "tx_packets", "rx_packets")


def own_counters(folder: Path | None = None) -> Counters:
    """Those of the host on which this process runs; costs about a tenth of a millisecond.

    Args:
        folder: where the kernel shows them; found by itself on a host of a cluster.

    Raises:
        RuntimeError: if this process does not run on such a host.
    """
    if folder is None:
        if "PDJAX_INTERFACE" not in os.environ:
            raise RuntimeError(
                "PDJAX_INTERFACE is not set, which names the interface to count at; expected to be "
                "run by experiments/cluster/cluster.py."
            )
        folder = Path("/sys/class/net", os.environ["PDJAX_INTERFACE"], "statistics")
    return Counters(*(int((folder / name).read_text()) for name in _FILES))


def parse(shown: str) -> Counters:
    """Reads the output of `ip -json -statistics link show` for one interface."""
    statistics = json.loads(shown)[0]["stats64"]
    sent, received = statistics["tx"], statistics["rx"]
    return Counters(sent["bytes"], received["bytes"], sent["packets"], received["packets"])


def table(counted: Mapping[str, Counters]) -> str:
    """The counters of some hosts, by name, as Markdown."""
    rows = [
        f"| {name} | {_mb(c.sent_bytes)} | {_mb(c.received_bytes)} |" for name, c in counted.items()
    ]
    return "\n".join(["| host | sent, MB | received, MB |", "|---|---|---|", *rows])


def to_json(counted: Mapping[str, Counters]) -> str:
    """The counters of some hosts, by name."""
    return json.dumps({name: asdict(counters) for name, counters in counted.items()}, indent=2)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.3f}"
