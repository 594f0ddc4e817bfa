"""SIGINT and SIGTERM request a stop, which loops look at."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from helpers import ROOT

from common.interruption import (
    exit_status,
    interruptible,
    stop_if_requested,
    stop_requested,
    until_stopped,
)
from common.machine import bounded_map

SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name
)


@pytest.fixture(autouse=True)
def no_request():
    """None left by a test."""
    yield
    with interruptible():
        pass


@pytest.mark.fault(54)
@SIGNALS
def test_a_signal_interrupts_nothing_and_is_seen_by_the_next_loop(number, capfd):
    done = []
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            for item in until_stopped(range(9)):
                if item == 3:
                    signal.raise_signal(number)
                done.append(item)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            stop_if_requested()
    assert done == [0, 1, 2, 3]
    assert exit_status() == 128 + number
    assert capfd.readouterr().err.count("once more ends at once") == 1


@pytest.mark.fault(54)
def test_a_signal_during_the_last_item_is_seen_too():
    with interruptible(), pytest.raises(KeyboardInterrupt):
        for _ in until_stopped([1]):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.fault(54)
def test_work_in_threads_ends_what_is_in_flight(capfd):
    ended = []

    def work(item: int) -> int:
        if item == 5:
            signal.raise_signal(signal.SIGINT)
        ended.append(item)
        return item

    results = bounded_map(work, range(100), 2, ahead=2)
    with interruptible(loud=False), pytest.raises(KeyboardInterrupt):
        for _ in results:
            pass
    assert 5 in ended and len(ended) < 12
    assert not capfd.readouterr().err


def test_the_next_run_begins_without_a_request():
    with interruptible():
        signal.raise_signal(signal.SIGINT)
    with interruptible():
        assert not stop_requested()
        stop_if_requested()


def test_handlers_are_those_of_before_afterwards():
    former = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with interruptible():
        assert signal.getsignal(signal.SIGINT) not in former
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == former


def test_ctrl_c_that_is_to_be_ignored_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            assert not stop_requested()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


TWICE = """
import signal, sys

sys.path.insert(0, {root!r})
from common.interruption import interruptible

with interruptible():
    signal.raise_signal(signal.SIGINT)
    print("went on", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("not here")
"""


@pytest.mark.fault(54)
def test_a_second_signal_ends_at_once():
    command = [sys.executable, "-c", TWICE.format(root=str(ROOT))]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (143, "went on\n")


STUCK = """
import ctypes, os, signal, sys, threading

sys.path.insert(0, {root!r})
from common.interruption import end_when_stuck, interruptible

with interruptible(), end_when_stuck("error: lost", 0.5):
    if sys.argv[1:]:
        mutex = ctypes.create_string_buffer(64)
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        for _ in range(2):  # the second call never returns
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    print("went on")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a mutex of zeros")
def test_a_process_that_is_stuck_in_a_library_ends_with_its_line():
    command = [sys.executable, "-c", STUCK.format(root=str(ROOT))]
    runs = [
        subprocess.run([*command, *more], check=False, capture_output=True, text=True)
        for more in (["stuck"], [])
    ]
    assert [run.returncode for run in runs] == [1, 0]
    assert runs[0].stderr == "error: lost\n"
    assert [run.stdout for run in runs] == ["", "went on\n"]
