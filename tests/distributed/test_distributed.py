"""Processes that talk, end, and are lost: here they are threads, without JAX."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gatherings import (
    GOODBYE,
    NOTHING,
    VERSIONS,
    WAIT_S,
    Process,
    come_all,
    everywhere,
    raised,
    run_of,
    tcp_pair,
    wait_until,
)

from pdjax.distributed.exit import EndOfProgram
from pdjax.distributed.failure_detector import FailureDetector
from pdjax.distributed.frames import Link, encode
from pdjax.distributed.members import Address, introduce
from pdjax.distributed.peers import Peers
from pdjax.errors import ClusterError

# --- talking


def test_values_come_in_order_of_process():
    with run_of(4) as (everyone, _):
        for turn in range(20):
            found = everywhere(
                everyone, lambda p, turn=turn: p.exchange(f"turn {turn}", (p.process_id, turn))
            )
            assert found == [[[number, turn] for number in range(4)]] * 4


def test_an_exchange_is_a_barrier():
    with run_of(2) as (everyone, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(everyone[0].exchange, "plan", 1)
        time.sleep(0.1)
        assert not waiting.done()
        assert everyone[1].exchange("plan", 2) == [1, 2]
        assert waiting.result(WAIT_S) == [1, 2]


def test_processes_at_different_places():
    with run_of(3) as (everyone, losses):
        found = everywhere(everyone, lambda p: p.exchange("plan" if p.process_id else "seed", 1))
        for error in found:
            assert isinstance(error, ClusterError)
            assert "'seed' in process 0; 'plan' in process 1, 2" in str(error)
        assert all(heard.empty() for heard in losses)


def test_a_value_that_json_has_no_form_for():
    with run_of(2) as (everyone, _):
        for value in (object(), {1: 2, (1, 2): 3}, b"bytes"):
            with pytest.raises(ValueError, match="cannot exchange 'plan': expected what JSON has"):
                everyone[0].exchange("plan", value)
        assert everywhere(everyone, lambda p: p.exchange("plan", None)) == [[None, None]] * 2


def test_a_large_value():
    text = "0123456789" * 500_000
    with run_of(3) as (everyone, _):
        found = everywhere(everyone, lambda p: p.exchange("text", text + str(p.process_id)))
        assert found == [[text + str(number) for number in range(3)]] * 3


def test_a_value_that_is_too_large_leaves_the_turn_as_it_was(monkeypatch):
    monkeypatch.setattr("pdjax.distributed.frames._MAX_BYTES", 1000)
    with run_of(2) as (everyone, _):
        with pytest.raises(ValueError, match="expected at most 1,000"):
            everyone[0].exchange("text", "x" * 1000)
        assert everywhere(everyone, lambda p: p.exchange("text", 1)) == [[1, 1]] * 2


def test_several_threads_exchange():
    def many(peers: Peers) -> list:
        with ThreadPoolExecutor(4) as pool:
            values = [f"{peers.process_id}.{n}" for n in range(40)]
            return sorted(map(tuple, pool.map(lambda value: peers.exchange("it", value), values)))

    with run_of(2) as (everyone, _):
        found = everywhere(everyone, many)
        assert found[0] == found[1]
        assert len({first for first, _ in found[0]}) == 40


# --- ending well


def test_ending_at_different_times_is_no_loss():
    with run_of(3) as (everyone, losses), ThreadPoolExecutor(3) as pool:
        everyone[2].completed(5)
        first = pool.submit(everyone[2].close)
        wait_until(lambda: everyone[0].ended() == {2: 5})
        assert not first.done()
        rest = [pool.submit(peers.close) for peers in everyone[:2]]
        for future in (first, *rest):
            future.result(WAIT_S)
        assert all(heard.empty() for heard in losses)


def test_ending_at_the_same_time_is_no_loss():
    for _ in range(30):
        with run_of(3) as (everyone, losses):
            start = time.monotonic()
            assert everywhere(everyone, Peers.close) == [None] * 3
            assert time.monotonic() - start < 5
            assert all(heard.empty() for heard in losses)


def test_an_end_of_connection_after_a_goodbye_is_no_loss():
    with run_of(3, raw=[2]) as (everyone, losses):
        gone = everyone.pop()
        gone.say(**GOODBYE)
        gone.crash()
        wait_until(lambda: all(2 not in peers._connections._links for peers in everyone))
        time.sleep(0.1)
        assert all(heard.empty() for heard in losses)
        everywhere(everyone, Peers.close)


def test_the_goodbye_is_not_lost_though_the_others_still_talk():
    """A connection that is closed while something comes is reset, and the last words with it."""
    with run_of(2, raw=[1]) as (everyone, _), ThreadPoolExecutor(1) as pool:
        everyone[1].say(**GOODBYE)
        closing = pool.submit(everyone[0].close)
        link = everyone[1].links[0]
        heard = []
        wait_until(lambda: heard.extend(link.read(0.0)) or link.ended)
        assert GOODBYE in heard
        for _ in range(10):  # it is still listened to
            assert link._socket.send(encode({"kind": "alive", "num_minibatches": 1}))
            time.sleep(0.01)
        everyone[1].crash()
        closing.result(WAIT_S)


def test_what_is_to_be_finished_is_finished_before_the_goodbye():
    with run_of(2) as (everyone, losses), ThreadPoolExecutor(2) as pool:
        is_done, calls = threading.Event(), []

        def finish():
            calls.append(is_done.wait(WAIT_S))

        everyone[0].finish_first(finish)
        everyone[0].finish_first(finish)
        closing = [pool.submit(peers.close) for peers in everyone]
        time.sleep(0.1)
        assert everyone[1].ended() == {}
        is_done.set()
        for future in closing:
            future.result(WAIT_S)
        everyone[0].close()
        assert calls == [True]
        assert all(heard.empty() for heard in losses)


def test_no_exchange_with_one_that_has_ended():
    with run_of(2, raw=[1]) as (everyone, losses), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(everyone[0].exchange, "plan", 1)
        everyone[1].say(**GOODBYE)
        for error in (waiting.exception(WAIT_S), raised(everyone[0].exchange, "seed", 1)):
            assert isinstance(error, ClusterError)
            assert "process 1" in str(error)
            assert "has ended already" in str(error)
        assert losses[0].empty()


def test_who_makes_more_calls_than_one_that_has_ended():
    """Neither ends otherwise: each would wait for the other."""
    with ThreadPoolExecutor(1) as pool, run_of(3) as (everyone, losses):
        for peers in everyone:
            make(peers, "evaluate", "step", "step")
        closing = pool.submit(everyone[1].close)
        wait_until(lambda: all(1 in everyone[number].ended() for number in (0, 2)))
        for call, counted in (("step", "2 calls"), ("evaluate", "1 call"), ("params", "no calls")):
            error = raised(make, everyone[0], call)
            assert isinstance(error, ClusterError)
            assert str(error).startswith(f"process 1 ({socket.gethostname()}, pid ")
            assert f"has ended after {counted} of Pipeline.{call}, while process 0" in str(error)
        everywhere([everyone[0], everyone[2]], Peers.close)
        closing.result(WAIT_S)
        assert all(heard.empty() for heard in losses)


@pytest.mark.parametrize("has_closed", [False, True])
def test_one_ends_while_another_is_ahead(has_closed):
    """The other may be blocked in that call, or wait at its end already."""
    with ThreadPoolExecutor(2) as pool, run_of(3) as (everyone, losses):
        everyone[2].describe("stage 2: head")
        for peers in everyone:
            make(peers, "step")
        make(everyone[0], "step")
        if has_closed:
            pool.submit(everyone[0].close)
            wait_until(lambda: 0 in everyone[2].ended())
        pool.submit(everyone[2].close)
        text = losses[0].get(timeout=WAIT_S)
        assert text.startswith("error: process 2 (")
        assert ", stage 2: head, has ended after 1 call of Pipeline.step, while process 0" in text
        assert "is at call 2; all must make the same calls, so give every process" in text
        assert "process 2" in losses[1].get(timeout=WAIT_S)


def test_a_call_that_failed_does_not_count():
    with run_of(2) as (everyone, losses):
        with pytest.raises(KeyError), everyone[0].taking_part("step"):
            raise KeyError
        assert everywhere(everyone, Peers.close) == [None] * 2
        assert all(heard.empty() for heard in losses)


def make(peers: Peers, *calls: str) -> None:
    for call in calls:
        with peers.taking_part(call):
            pass


def test_no_exchange_after_the_end():
    with run_of(1) as (everyone, _):
        everyone[0].close()
        everyone[0].close()
        everyone[0].fail("too late")
        assert not everyone[0].has_failed
        with pytest.raises(ClusterError, match="this process has left the run"):
            everyone[0].exchange("plan", 1)


# --- losses


def test_a_crash_is_noticed_at_once():
    with run_of(3, raw=[1]) as (everyone, losses):
        everyone[1].say(kind="stages", stages="stage 1: block_2 … head")
        everyone[1].say(kind="alive", num_minibatches=41)
        everyone[0].describe("stage 0: embed … block_1")
        everyone[0].completed(43)
        everyone[1].crash()
        text = losses[0].get(timeout=WAIT_S)
        host = socket.gethostname()
        assert text.startswith(f"error: process 1 ({host}, pid ")
        assert "), stage 1: block_2 … head, was killed or crashed: its connection ended" in text
        assert "It had completed 41 minibatches; this process 0" in text
        assert "), stage 0: embed … block_1, had completed 43 minibatches." in text
        assert "process 1" in losses[2].get(timeout=WAIT_S)
        assert losses[0].empty()


def test_who_waits_for_a_value_hears_of_the_loss():
    with run_of(2, raw=[1]) as (everyone, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(everyone[0].exchange, "plan", 1)
        everyone[1].crash()
        assert "was killed or crashed" in str(waiting.exception(WAIT_S))


def test_silence_is_noticed_in_time():
    """Process 1 keeps its connections, but says nothing."""
    with run_of(3, raw=[1], lost_s=1.5) as (everyone, losses):
        start = time.monotonic()
        texts = [losses[number].get(timeout=WAIT_S) for number in (0, 2)]
        assert 1.0 < time.monotonic() - start < 1.5
        for text in texts:
            assert "process 1" in text
            assert "it hangs or is stopped, or its host or the network is down" in text
        assert isinstance(everyone[1], Process)


def test_who_hears_nobody_may_be_cut_off_itself():
    with run_of(3, raw=[0, 2], lost_s=1.0) as (everyone, losses):
        text = losses[1].get(timeout=WAIT_S)
        assert "was not heard for" in text
        assert f"nor was any other by process 1, so its own host {socket.gethostname()}" in text
        assert isinstance(everyone[0], Process)


def test_a_process_that_runs_no_python_at_all_is_lost_in_the_end():
    own = introduce(0, 2, Address("", 1), VERSIONS, 10.0)
    near, far = tcp_pair()
    link, heartbeat = Link(near), Link(far)
    silence = FailureDetector(own)
    heartbeat.heard_at = 100.0
    assert silence.find_lost({1: link}, {1: heartbeat}, 101.0) is None
    heartbeat.heard_at = 121.0
    lost = silence.find_lost({1: link}, {1: heartbeat}, 121.0)
    assert lost is not None
    assert lost.reason == "hangs: it has run no Python for 121 s"
    link.close()
    heartbeat.close()


def test_no_false_alarm():
    with run_of(3, lost_s=1.0) as (everyone, losses):
        time.sleep(2.5)
        assert all(heard.empty() for heard in losses)
        assert everywhere(everyone, lambda p: p.exchange("still here", 1)) == [[1, 1, 1]] * 3


def test_the_impatient_is_beaten_for_by_the_patient():
    given = [{"process_id": 0, "lost_s": 1.0}, {"process_id": 1, "lost_s": 600.0}]
    processes = [future.result() for future in come_all(*given)]
    everyone = [process.watch() for process in processes]
    time.sleep(1.5)
    assert all(process.losses.empty() for process in processes)
    everywhere(everyone, Peers.close)


def test_all_name_the_first_cause():
    """Process 2 sees nothing of the crash itself, and then process 0 ends, too."""
    with run_of(3, raw=[1]) as (everyone, losses):
        still_open = everyone[1].links.pop(2)
        everyone[1].say(kind="stages", stages="stage 1: head")
        everyone[1].say(kind="alive", num_minibatches=41)
        everyone[1].crash()
        for number in (0, 2):
            text = losses[number].get(timeout=WAIT_S)
            assert text.startswith("error: process 1 ")
            assert ", stage 1: head, was killed" in text
            assert "It had completed 41 minibatches" in text
        assert "(noticed by process 0)" in text
        assert losses[2].empty()
        still_open.close()


def test_a_failure_is_told():
    with run_of(3) as (everyone, losses):
        everyone[1].completed(1)
        everyone[1].fail("ValueError: the batch is empty")
        for number in (0, 2):
            text = losses[number].get(timeout=WAIT_S)
            assert "process 1" in text
            assert "failed: ValueError: the batch is empty" in text
            assert "It had completed 1 minibatch; this process" in text
        assert everyone[1].has_failed
        assert losses[1].empty()


@pytest.mark.parametrize(("hook_s", "expected"), [(0, "said, given"), (1.5, "given, said, given")])
def test_a_traceback_comes_before_the_others_hear_of_it_unless_it_takes_long(hook_s, expected):
    """As soon as they have ended, a launcher ends this process, too."""
    done: list[str] = []

    class Others:
        def loss_follows(self) -> bool:
            return False

        def leave(self, reason: str) -> None:
            assert reason == "failed: ValueError: bad"
            done.append("given")

    others: Any = Others()
    end = EndOfProgram(others, catch_sigterm=False)
    end._hook = lambda *_: (time.sleep(hook_s), done.append("said"))
    end._on_exception(ValueError, ValueError("bad"), None)
    assert ", ".join(done) == expected


def test_a_failure_that_follows_from_a_loss_is_not_told():
    with run_of(3, raw=[1]) as (everyone, losses):
        everyone[1].crash()
        everyone[0].fail("JaxRuntimeError: Connection closed")
        assert not everyone[0].has_failed
        for number in (0, 2):
            assert "process 1" in losses[number].get(timeout=WAIT_S)


def test_who_was_given_up_ends_too():
    """Process 0 was stopped, say, and goes on."""
    with run_of(2, raw=[1]) as (everyone, losses):
        everyone[1].say(kind="lost", process_id=0, reason="was silent", **NOTHING)
        everyone[1].crash()
        text = losses[0].get(timeout=WAIT_S)
        assert text.startswith("error: this process 0")
        assert "was given up by process 1: it was silent" in text


def test_what_is_no_message_is_a_loss():
    with run_of(2, raw=[1]) as (everyone, losses):
        everyone[1].links[0].send(b"GET / HTTP/1.1\r\n\r\n")
        assert "sent what is no message of pdjax" in losses[0].get(timeout=WAIT_S)


def test_an_error_in_the_watch_is_not_silent():
    with run_of(2, raw=[1]) as (everyone, losses):
        everyone[1].say(kind="lost")
        assert "the watch over the other processes failed" in losses[0].get(timeout=WAIT_S)


def test_a_loss_while_waiting_at_the_end():
    with run_of(2, raw=[1]) as (everyone, losses), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(everyone[0].close)
        everyone[1].crash()
        assert "was killed or crashed" in losses[0].get(timeout=WAIT_S)
        waiting.result(WAIT_S)


def test_one_that_reads_nothing_does_not_block_the_others():
    """A stopped process takes nothing in; the others still talk, and notice."""
    with run_of(3, raw=[2], lost_s=2.0) as (everyone, losses):
        everyone[0].describe("x" * 20_000_000)
        wait_until(lambda: everyone[1]._connections.standings[0].stages)
        assert "process 2" in losses[0].get(timeout=WAIT_S)
