"""What a cluster consists of, and the commands that build it; nothing here runs any.

Every host is a network namespace with one interface, `eth0`. The other end of each is a port of a
bridge in a namespace of its own, so that the machine's own interfaces, routes and packet filters
have no part in it, and clusters beside each other may use the same addresses:

    pdjax-0-host0        pdjax-0-switch        pdjax-0-host1
    eth0 10.77.0.1 ---- port0   br0   port1 ---- eth0 10.77.0.2
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

Command = list[str]

INTERFACE = "eth0"
PREFIX = "pdjax"
HOSTS_FILES = Path("/etc/netns")
"""`ip netns exec NAME` puts the files below NAME here in the place of those in /etc."""
MAX_HOSTS = 250

_NETWORK = "10.77.0"
_PACKET_BYTES = 9000  # as in the networks of data centres: few headers, little work for the kernel
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BURST_S = 1e-3
_MIN_BURST_BYTES = 2 * (_PACKET_BYTES + 14)
_QUEUE_S = 50e-3
_MAX_LATENCY_S = 10
_NUM_DELAYED_PACKETS = 100_000
_SILENCE = "file=/proc/sys/net/ipv6/conf/default/disable_ipv6; test ! -e $file || echo 1 > $file"
_NAME_AND_RUN = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'


def bits_per_s(rate: str) -> float:
    """Reads a rate as tc writes it.

    >>> bits_per_s("1gbit"), bits_per_s("2.5mbit")
    (1000000000.0, 2500000.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)bit", rate)
    if not found or not float(found[1]):
        raise ValueError(
            f"rate {rate!r}: expected bits per second with a unit, such as 100mbit or 1gbit."
        )
    return float(found[1]) * _UNITS[found[2]]


def shape(rate: str) -> Command:
    """A token bucket: its rate, a burst of a millisecond, and how much may queue before it."""
    bits = bits_per_s(rate)
    burst_bytes = max(round(bits / 8 * _BURST_S), _MIN_BURST_BYTES)
    queue = f"{_QUEUE_S * 1e6:.0f}us"
    return ["tbf", "rate", f"{bits:.0f}bit", "burst", f"{burst_bytes}b", "latency", queue]


def delay(latency_s: float) -> Command:
    """A delay line."""
    limit = str(_NUM_DELAYED_PACKETS)
    return ["netem", "delay", f"{latency_s * 1e6:.0f}us", "limit", limit]


@dataclass(frozen=True)
class Layout:
    """Names and addresses of a cluster.

    Attributes:
        slot: tells it from other clusters of this machine.
        num_hosts: how many hosts it has.
        latency_s: seconds that a packet takes more than it would, from one host to another.
    """

    slot: int
    num_hosts: int
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_hosts <= MAX_HOSTS:
            raise ValueError(f"{self.num_hosts} hosts: expected 1 to {MAX_HOSTS}.")
        if not 0 <= self.latency_s < _MAX_LATENCY_S:
            raise ValueError(
                f"latency of {self.latency_s} s: expected seconds from 0 to {_MAX_LATENCY_S}."
            )

    @property
    def switch(self) -> str:
        """The namespace of the bridge."""
        return f"{prefix(self.slot)}switch"

    def namespace(self, host: int) -> str:
        """The namespace of a host."""
        return prefix(self.slot) + self.host_name(host)

    def host_name(self, host: int) -> str:
        """What the host is called by itself and by the others."""
        self._check(host)
        return f"host{host}"

    def address(self, host: int) -> str:
        """Its address."""
        self._check(host)
        return f"{_NETWORK}.{host + 1}"

    def hosts_file(self) -> str:
        """The names that are known on every host: no name of a host means the loopback address."""
        hosts = range(self.num_hosts)
        lines = [f"{self.address(host)} {self.host_name(host)}" for host in hosts]
        return "\n".join(["127.0.0.1 localhost", *lines, ""])

    def building(self) -> list[Command]:
        """Makes the bridge and the hosts, up and joined, not yet shaped."""
        switch, bridge = self.switch, ["name", "br0", "type", "bridge"]
        commands = [
            ["ip", "netns", "add", switch],
            self._silencing(switch),
            ["ip", "-n", switch, "link", "add", *bridge, "stp_state", "0", "mcast_snooping", "0"],
            ["ip", "-n", switch, "link", "set", "br0", "up"],
        ]
        for host in range(self.num_hosts):
            commands += self._joining(host)
        return commands

    def _joining(self, host: int) -> list[Command]:
        """Makes a host and its cable."""
        name, port = self.namespace(host), f"port{host}"
        on_host, on_switch = ["ip", "-n", name], ["ip", "-n", self.switch]
        mtu = ["mtu", str(_PACKET_BYTES)]
        pair = [port, "type", "veth", "peer", "name", INTERFACE, "netns", name]
        commands = [
            ["ip", "netns", "add", name],
            self._silencing(name),
            [*on_switch, "link", "add", *pair],
            [*on_switch, "link", "set", port, *mtu, "master", "br0", "up"],
            [*on_host, "link", "set", "lo", "up"],
            [*on_host, "link", "set", INTERFACE, *mtu, "up"],
            [*on_host, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE],
        ]
        if self.latency_s:
            root = ["dev", INTERFACE, "root", "handle", "1:"]
            commands.append(["tc", "-n", name, "qdisc", "add", *root, *delay(self.latency_s)])
        return commands

    def _silencing(self, namespace: str) -> Command:
        """Interfaces made from now on do not announce themselves, which would be counted."""
        return ["ip", "netns", "exec", namespace, "sh", "-c", _SILENCE]

    def shaping(self, host: int, rate: str | None, shaped: bool) -> list[Command]:
        """Shapes both ends of a host's cable: bytes from it, and bytes to it.

        Args:
            host: which.
            rate: bits per second from now on; None: not shaped.
            shaped: whether it is already.
        """
        behind_delay = ["parent", "1:1", "handle", "10:"]
        sending = behind_delay if self.latency_s else ["root", "handle", "1:"]
        ends = [
            ["tc", "-n", self.namespace(host), "qdisc", INTERFACE, *sending],
            ["tc", "-n", self.switch, "qdisc", f"port{host}", "root", "handle", "1:"],
        ]
        if rate is None and not shaped:
            return []
        verb, bucket = ("delete", []) if rate is None else ("replace", shape(rate))
        return [[*end[:4], verb, "dev", *end[4:], *bucket] for end in ends]

    def switching(self, host: int, up: bool) -> Command:
        """Pulls the cable of a host out of the switch, or puts it back."""
        self._check(host)
        state = "up" if up else "down"
        return ["ip", "-n", self.switch, "link", "set", f"port{host}", state]

    def counting(self, host: int) -> Command:
        """Prints the counters of a host's interface, which `counters.parse` reads."""
        return ["ip", "-n", self.namespace(host), "-j", "-s", "link", "show", INTERFACE]

    def running(self, host: int, command: Command) -> Command:
        """Runs a command on a host, under its name, as the process that is started."""
        inside = ["ip", "netns", "exec", self.namespace(host)]
        return [
            *inside,
            "unshare",
            "--uts",
            "sh",
            "-c",
            _NAME_AND_RUN,
            self.host_name(host),
            *command,
        ]

    def _check(self, host: int) -> None:
        if not 0 <= host < self.num_hosts:
            raise ValueError(f"host {host}: expected 0 to {self.num_hosts - 1}.")


def prefix(slot: int) -> str:
    """What the names of a cluster's namespaces begin with."""
    return f"{PREFIX}-{slot}-"
