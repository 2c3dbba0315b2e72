"""A cluster on one machine: hosts that are network namespaces, joined by links of any rate.

    python experiments/cluster/cluster.py --num-hosts 4 --rate 1gbit -- python train.py

runs the command once on each host, prints their output, and last how many bytes went through the
interface of each. Needs Linux, root and iproute2. For experiments that do more:

    with Cluster(num_hosts=4, rate="1gbit") as cluster:
        before = cluster.counters()
        code = cluster.run([sys.executable, "train.py"])
        sent_bytes = (cluster.counters()[0] - before[0]).sent_bytes
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import slots
from counters import Counters, parse, table, to_json
from layout import HOSTS_FILES, INTERFACE, Command, Layout, bits_per_s

if TYPE_CHECKING:
    from pdjax.launch import Processes

_TOOLS = ("ip", "tc", "unshare")
_FIRST_PORT = 12321
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_HINTS = {
    "not permitted": "Root lacks this right here. A container has it if started with --privileged.",
    "Permission denied": "Root lacks this right here. A container has it if started with "
    "--privileged.",
    "kind is unknown": "The kernel lacks this way to shape a link: tbf gives a link its rate "
    "(modprobe sch_tbf), netem its latency (modprobe sch_netem; or do without --latency-s).",
    "Unknown device type": "The kernel lacks this kind of interface: modprobe veth bridge.",
}


class UnavailableError(RuntimeError):
    """This machine cannot make a cluster; the text names the missing program or right."""


class Cluster:
    """Hosts that are there inside a `with` block, and gone after it.

    The hosts are called host0, host1, …; each has one interface, and knows the others by name.

    Args:
        num_hosts: how many.
        rate: bits per second of each host's link, in each direction, such as `200mbit`; None: as
            fast as the machine is.
        latency_s: seconds that a packet takes more than it would, from one host to another.

    Raises:
        ValueError: if an argument makes no sense.
        UnavailableError: on entering, if this machine cannot do it.
    """

    def __init__(self, num_hosts: int, rate: str | None = None, latency_s: float = 0.0) -> None:
        if rate is not None:
            bits_per_s(rate)
        self._layout = Layout(0, num_hosts, latency_s)
        self._rate = rate
        self._shaped: set[int] = set()
        self._ports = itertools.count(_FIRST_PORT)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        check_machine()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_handled(_ENDING, _raise_exit))
            slot = stack.enter_context(slots.claimed())
            self._layout = dataclasses.replace(self._layout, slot=slot)
            stack.callback(self._remove)
            self._build()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def layout(self) -> Layout:
        """The names and addresses of the hosts."""
        return self._layout

    def run(
        self,
        command: Sequence[str],
        *,
        pin: bool = True,
        grace_s: float = 10.0,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Runs a command on every host until all have ended; returns the exit code.

        As `python -m pdjax.launch` does, and with the same variables in the environment: if one
        fails the others are ended, and its exit code is returned.

        Args:
            command: the program and its arguments.
            pin: whether each process gets a core of its own, in turns if there are fewer.
            grace_s: seconds that a process has to end before it is killed.
            environment: variables besides those of this process.
        """
        with self.running(command, pin=pin, grace_s=grace_s, environment=environment) as processes:
            return processes.wait()

    @contextlib.contextmanager
    def running(
        self,
        command: Sequence[str],
        *,
        pin: bool = True,
        grace_s: float = 10.0,
        environment: Mapping[str, str] | None = None,
        end_together: bool = True,
    ) -> Iterator[Processes]:
        """Runs a command on every host while the block runs, which may cut links meanwhile.

        Args:
            command: the program and its arguments.
            pin: whether each process gets a core of its own, in turns if there are fewer.
            grace_s: seconds that a process has to end before it is killed.
            environment: variables besides those of this process.
            end_together: whether the others are ended when one fails.

        Raises:
            ValueError: if there is no such program.
        """
        from pdjax.launch import Processes, variables  # takes seconds, which no refusal should

        if shutil.which(command[0]) is None:
            raise ValueError(f"{command[0]}: there is no such program.")
        coordinator = f"{self._layout.address(0)}:{next(self._ports)}"
        hosts = range(self._layout.num_hosts)
        try:
            with Processes(grace_s, end_together) as processes:
                for host in hosts:
                    told = variables(coordinator, len(hosts), host)
                    told |= {"PDJAX_INTERFACE": INTERFACE, **(environment or {})}
                    inside = self._layout.running(host, list(command))
                    name = self._layout.host_name(host)
                    processes.start(inside, name, told, host if pin else None)
                yield processes
        finally:
            for host in hosts:
                slots.kill(self._layout.namespace(host))
        if processes.interrupted_by == signal.SIGINT:
            raise KeyboardInterrupt
        if processes.interrupted_by:
            raise SystemExit(128 + processes.interrupted_by)

    def counters(self) -> list[Counters]:
        """What the interface of each host sent and received since the cluster was made."""
        hosts = range(self._layout.num_hosts)
        return [parse(_execute(self._layout.counting(host))) for host in hosts]

    def cut(self, host: int) -> None:
        """Pulls the cable of a host out of the switch: packets to it and from it are lost."""
        _execute(self._layout.switching(host, up=False))

    def mend(self, host: int) -> None:
        """Puts the cable back."""
        _execute(self._layout.switching(host, up=True))

    def set_rate(self, rate: str | None, host: int | None = None) -> None:
        """Changes the rate of all links, or of one.

        Args:
            rate: bits per second in each direction, such as `200mbit`; None: not shaped.
            host: whose link; None: all.
        """
        for one in range(self._layout.num_hosts) if host is None else [host]:
            for command in self._layout.shaping(one, rate, one in self._shaped):
                _execute(command)
            (self._shaped.discard if rate is None else self._shaped.add)(one)

    def _build(self) -> None:
        self._shaped.clear()
        for host in range(self._layout.num_hosts):
            files = HOSTS_FILES / self._layout.namespace(host)
            files.mkdir(parents=True)
            (files / "hosts").write_text(self._layout.hosts_file())
        for command in self._layout.building():
            _execute(command)
        self.set_rate(self._rate)

    def _remove(self) -> None:
        """Removes everything, and is not interrupted while it does."""
        with _handled((signal.SIGINT, *_ENDING), signal.SIG_IGN):
            slots.remove(self._layout.slot)


def check_machine() -> None:
    """Whether this machine can make a cluster, as far as can be seen without trying.

    Raises:
        UnavailableError: if it cannot; the text names the missing part and its package.
    """
    if sys.platform != "linux":
        raise UnavailableError(
            f"Hosts are network namespaces of Linux, and this is {sys.platform}."
        )
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise UnavailableError(
            f"There is no program {', '.join(missing)} here. Debian and Ubuntu have them in "
            "iproute2 and util-linux (apt install iproute2 util-linux), Fedora in iproute, "
            "iproute-tc and util-linux."
        )
    if os.geteuid() != 0:
        raise UnavailableError(
            'Making network namespaces needs root. Run it as: sudo env PATH="$PATH" python …, or '
            "in a container started with --privileged."
        )


def _execute(command: Command) -> str:
    """Runs a command that must succeed; returns its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    said = f"{' '.join(command)}: {done.stderr.strip()}"
    for part, hint in _HINTS.items():
        if part in done.stderr:
            raise UnavailableError(f"{said}\n{hint}")
    raise RuntimeError(said)


@contextlib.contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: signal._HANDLER) -> Iterator[None]:
    """Handles some signals differently for a while."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _raise_exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main(given: list[str]) -> int:
    """Runs the command line; returns the exit code: 2 if there cannot be a cluster."""
    at = given.index("--") if "--" in given else len(given)
    arguments, command = _parser().parse_args(given[:at]), given[at + 1 :]
    try:
        if not command:
            raise ValueError(
                "there is no command; expected it after '--', such as: -- python train.py"
            )
        return _run(arguments, command)
    except (UnavailableError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(arguments: argparse.Namespace, command: list[str]) -> int:
    path: Path | None = arguments.counters
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"--counters {path}: there is no folder {path.parent}.")
    with Cluster(arguments.num_hosts, arguments.rate, arguments.latency_s) as cluster:
        before = cluster.counters()
        code = cluster.run(command, pin=arguments.pin, grace_s=arguments.grace_s)
        counted = {
            cluster.layout.host_name(host): now - before[host]
            for host, now in enumerate(cluster.counters())
        }
    print(table(counted))
    if path is not None:
        path.write_text(to_json(counted) + "\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Runs a command, given after --, on several hosts that this machine plays."
    )
    parser.add_argument("--num-hosts", type=int, required=True, help="how many hosts")
    parser.add_argument(
        "--rate",
        help="bits per second of each host's link, both ways, such as 200mbit; else unshaped",
    )
    parser.add_argument(
        "--latency-s", type=float, default=0.0, help="seconds that a packet takes more (0.0)"
    )
    parser.add_argument(
        "--pin",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether each process gets a core of its own, in turns if there are fewer (yes)",
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=10.0,
        help="seconds that a process has to end before it is killed (10)",
    )
    parser.add_argument("--counters", type=Path, help="a file for the counted bytes, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
