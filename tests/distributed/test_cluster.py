"""A cluster on one machine: what is built, counted, refused; as root, that it is there and gone."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import cluster as cluster_module
import pytest
import slots
from cluster import Cluster, UnavailableError, main
from counters import Counters, own_counters, parse, table, to_json
from layout import HOSTS_FILES, Layout, bits_per_s, prefix, shape

SCRIPT = cluster_module.__file__


@pytest.mark.parametrize(
    ("rate", "expected"),
    [("100mbit", 1e8), ("1gbit", 1e9), ("2.5gbit", 2.5e9), ("800bit", 800.0), ("9kbit", 9e3)],
)
def test_rates(rate, expected):
    assert bits_per_s(rate) == expected


@pytest.mark.parametrize("rate", ["", "1", "1g", "100Mbit", "-1gbit", "0gbit", "1mbps", "1e3bit"])
def test_rates_that_make_no_sense(rate):
    with pytest.raises(ValueError, match="expected bits per second with a unit"):
        Cluster(2, rate)


@pytest.mark.parametrize("num_hosts", [0, -1, 251])
def test_numbers_of_hosts_that_make_no_sense(num_hosts):
    with pytest.raises(ValueError, match=f"{num_hosts} hosts: expected 1 to 250"):
        Cluster(num_hosts)


@pytest.mark.parametrize("latency_s", [-0.1, 10.0])
def test_latencies_that_make_no_sense(latency_s):
    with pytest.raises(ValueError, match=f"latency of {latency_s} s: expected seconds from 0"):
        Cluster(2, latency_s=latency_s)


def test_hosts_that_are_not_there():
    for layout_of in Layout(0, 2).address, Layout(0, 2).namespace:
        with pytest.raises(ValueError, match="host 2: expected 0 to 1"):
            layout_of(2)


def test_a_burst_is_that_of_a_millisecond_and_two_packets_at_least():
    assert " ".join(shape("1gbit")) == "tbf rate 1000000000bit burst 125000b latency 50000us"
    assert " ".join(shape("1mbit")) == "tbf rate 1000000bit burst 18028b latency 50000us"


def lines(commands: list[list[str]]) -> list[str]:
    return [" ".join(command) for command in commands]


def test_what_is_built():
    built = lines(Layout(7, 2).building())
    assert [line for line in built if "netns add" in line] == [
        "ip netns add pdjax-7-switch",
        "ip netns add pdjax-7-host0",
        "ip netns add pdjax-7-host1",
    ]
    assert "ip -n pdjax-7-host1 address add 10.77.0.2/24 dev eth0" in built
    assert (
        "ip -n pdjax-7-switch link add port1 type veth peer name eth0 netns pdjax-7-host1" in built
    )
    # Nothing is done in the namespace of the machine but naming namespaces.
    elsewhere = "ip netns add ", "ip netns exec pdjax-7-", "ip -n pdjax-7-", "tc -n pdjax-7-"
    assert all(line.startswith(elsewhere) for line in built)
    assert not any("netem" in line for line in built)


def test_both_ends_of_a_cable_are_shaped():
    layout, bucket = Layout(7, 2), " ".join(shape("1gbit"))
    assert lines(layout.shaping(1, "1gbit", shaped=False)) == [
        f"tc -n pdjax-7-host1 qdisc replace dev eth0 root handle 1: {bucket}",
        f"tc -n pdjax-7-switch qdisc replace dev port1 root handle 1: {bucket}",
    ]
    assert lines(layout.shaping(1, None, shaped=True)) == [
        "tc -n pdjax-7-host1 qdisc delete dev eth0 root handle 1:",
        "tc -n pdjax-7-switch qdisc delete dev port1 root handle 1:",
    ]
    assert layout.shaping(1, None, shaped=False) == []


def test_packets_are_delayed_before_they_queue():
    layout, bucket = Layout(0, 1, latency_s=0.002), " ".join(shape("1gbit"))
    assert lines(layout.building())[-1] == (
        "tc -n pdjax-0-host0 qdisc add dev eth0 root handle 1: netem delay 2000us limit 100000"
    )
    assert lines(layout.shaping(0, "1gbit", shaped=False)) == [
        f"tc -n pdjax-0-host0 qdisc replace dev eth0 parent 1:1 handle 10: {bucket}",
        f"tc -n pdjax-0-switch qdisc replace dev port0 root handle 1: {bucket}",
    ]


def test_no_name_of_a_host_means_the_loopback():
    assert Layout(0, 2).hosts_file() == ("127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n")


def test_the_command_becomes_the_process_that_is_started():
    command = Layout(0, 2).running(1, ["python", "a b.py"])
    assert command[:4] == ["ip", "netns", "exec", "pdjax-0-host1"]
    assert command[-3:] == ["host1", "python", "a b.py"]
    assert 'exec "$@"' in command[-4]


def test_counters_are_read_and_written():
    stats = {"rx": {"bytes": 5, "packets": 1}, "tx": {"bytes": 2_500_000, "packets": 3}}
    counted = parse(json.dumps([{"ifname": "eth0", "stats64": stats}]))
    assert counted == Counters(2_500_000, 5, 3, 1)
    assert counted - Counters(500_000, 1, 1, 0) == Counters(2_000_000, 4, 2, 1)
    assert table({"host0": counted}).splitlines()[-1] == "| host0 | 2.500 | 0.000 |"
    assert json.loads(to_json({"host0": counted}))["host0"] == {
        "sent_bytes": 2_500_000,
        "received_bytes": 5,
        "sent_packets": 3,
        "received_packets": 1,
    }


def test_a_process_reads_the_counters_of_its_own_host(tmp_path, monkeypatch):
    for value, name in enumerate(["tx_bytes", "rx_bytes", "tx_packets", "rx_packets"]):
        (tmp_path / name).write_text(f"{value}\n")
    assert own_counters(tmp_path) == Counters(0, 1, 2, 3)
    monkeypatch.delenv("PDJAX_INTERFACE", raising=False)
    with pytest.raises(RuntimeError, match="expected to be run by"):
        own_counters()


@pytest.mark.parametrize(
    ("of", "attribute", "value", "message"),
    [
        (cluster_module.sys, "platform", "darwin", "this is darwin"),
        (cluster_module.os, "geteuid", lambda: 1000, "needs root. Run it as: sudo"),
        (cluster_module.shutil, "which", lambda name: None, "apt install iproute2"),
    ],
)
def test_a_machine_that_cannot_is_refused_kindly(
    monkeypatch, capsys, of, attribute, value, message
):
    monkeypatch.setattr(cluster_module.sys, "platform", "linux")
    monkeypatch.setattr(cluster_module.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(of, attribute, value)
    assert main(["--num-hosts", "2", "--", "true"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("echo 'mount --make-shared: Operation not permitted' >&2; exit 1", "--privileged"),
        ("echo 'Error: Specified qdisc kind is unknown.' >&2; exit 2", "modprobe sch_netem"),
    ],
)
def test_what_only_trying_shows_is_explained(code, said):
    with pytest.raises(UnavailableError, match=said):
        cluster_module._execute(["sh", "-c", code])
    with pytest.raises(RuntimeError, match="surprise") as caught:
        cluster_module._execute(["sh", "-c", "echo surprise >&2; exit 1"])
    assert caught.type is RuntimeError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-hosts", "2"], "there is no command"),
        (["--num-hosts", "0", "--", "true"], "0 hosts"),
        (["--num-hosts", "2", "--rate", "fast", "--", "true"], "rate 'fast'"),
        (["--num-hosts", "2", "--counters", "/no/such/file", "--", "true"], "no folder /no/such"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def root():
    """Skips where there cannot be a cluster."""
    try:
        with Cluster(1):
            pass
    except UnavailableError as error:
        pytest.skip(str(error))


SEND = """
import os, socket, sys, time
sys.path.insert(0, os.path.dirname({script!r}))
from counters import own_counters
name = socket.gethostname()
print(name, socket.gethostbyname(name), os.environ["PDJAX_PROCESS_ID"], *os.sched_getaffinity(0))
host, port = os.environ["PDJAX_COORDINATOR"].split(":")
if name == "host0":
    with socket.create_server((host, int(port))) as server, server.accept()[0] as peer:
        while peer.recv(1 << 20):
            pass
else:
    for _ in range(1000):
        try:
            peer = socket.create_connection(("host0", int(port)))
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    with peer:
        before, start = own_counters(), time.monotonic()
        peer.sendall(bytes(1_000_000))
        peer.shutdown(socket.SHUT_WR)
        peer.recv(1)
        sent = (own_counters() - before).sent_bytes
        print("sent", sent, "in", time.monotonic() - start)
"""


def test_hosts_talk_and_are_counted(root, tmp_path, capfd):
    """A megabyte at 80 Mbit/s takes a tenth of a second or more."""
    path = tmp_path / "counters.json"
    options = ["--num-hosts", "2", "--rate", "80mbit", "--counters", str(path)]
    assert main([*options, "--", sys.executable, "-c", SEND.format(script=SCRIPT)]) == 0
    written = capfd.readouterr().out.splitlines()
    cores = sorted(os.sched_getaffinity(0))
    assert f"[host0] host0 10.77.0.1 0 {cores[0]}" in written
    assert f"[host1] host1 10.77.0.2 1 {cores[1 % len(cores)]}" in written
    (sent,) = [line.split() for line in written if " sent " in line]
    counted = json.loads(path.read_text())
    for num_bytes in int(sent[2]), counted["host1"]["sent_bytes"]:
        assert 1_000_000 < num_bytes < 1_100_000
    assert counted["host0"]["received_bytes"] == counted["host1"]["sent_bytes"]
    assert float(sent[4]) > 0.09


REACH = """
import socket, sys
if socket.gethostname() == "host1":
    try:
        socket.create_connection(("host0", 1), timeout=1)
    except ConnectionRefusedError:
        sys.exit(5)
"""


def test_a_cable_is_cut_and_mended(root):
    with Cluster(2, "1gbit") as cluster:
        command = [sys.executable, "-c", REACH]
        cluster.cut(0)
        assert cluster.run(command) == 1
        cluster.mend(0)
        assert cluster.run(command) == 5
        cluster.set_rate("10mbit", host=0)
        cluster.set_rate(None)
        cluster.set_rate("20mbit")
        assert cluster.run(command) == 5
        with pytest.raises(ValueError, match="no-such-program"):
            cluster.run(["no-such-program"])


def left_of(slot: int) -> list[pathlib.Path]:
    folders = HOSTS_FILES, pathlib.Path("/run/netns")
    return [path for folder in folders for path in folder.glob(f"{prefix(slot)}*")]


def test_nothing_is_left_after_an_exception_and_clusters_do_not_meet(root):
    with Cluster(1) as other:
        with pytest.raises(ZeroDivisionError), Cluster(2) as cluster:  # noqa: PT012
            assert len(left_of(cluster.layout.slot)) == 5
            assert other.layout.slot != cluster.layout.slot
            with cluster.running(["sleep", "60"]) as processes:
                assert processes.codes == [None, None]
                raise ZeroDivisionError
        assert_gone(cluster.layout.slot)
        assert processes.codes == [-signal.SIGTERM] * 2
        assert other.run(["true"]) == 0


def assert_gone(slot: int) -> None:
    """Unless another took the slot meanwhile, who found it empty or emptied it."""
    with slots._held(slots.LOCKS / f"{slot}.lock") as held:
        assert not held or left_of(slot) == []


DAEMON = """
import subprocess, sys, time
print("daemon", subprocess.Popen(["sleep", "60"], start_new_session=True).pid, flush=True)
time.sleep(60)
"""
OWNER = """
import subprocess, sys, time
sys.path.insert(0, {folder!r})
from cluster import Cluster
with Cluster(1) as cluster:
    inside = cluster.layout.running(0, [sys.executable, "-c", {daemon!r}])
    subprocess.Popen(inside, start_new_session=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("runs", "number"),
    [
        (True, signal.SIGTERM),
        (False, signal.SIGTERM),
        (False, signal.SIGINT),
        (False, signal.SIGKILL),
    ],
)
def test_nothing_is_left_after_a_signal(root, runs, number):
    """What a killed one left, the next one finds."""
    folder = str(pathlib.Path(SCRIPT).parent)
    command = [sys.executable, "-c", OWNER.format(folder=folder, daemon=DAEMON)]
    if runs:
        command = [sys.executable, SCRIPT, "--num-hosts", "1", "--grace-s", "0.1"]
        command += ["--", sys.executable, "-c", DAEMON]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        daemon = int(process.stdout.readline().split()[-1])
        namespace = subprocess.run(
            ["ip", "netns", "identify", str(daemon)], capture_output=True, text=True, check=True
        ).stdout.strip()
        slot = int(namespace.split("-")[1])
        process.send_signal(number)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    if number == signal.SIGKILL:
        with Cluster(1):
            pass
    assert_gone(slot)
    _wait_until_dead(daemon)


def _wait_until_dead(pid: int) -> None:
    for _ in range(500):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} lives on")
