"""Interruptions are not lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import weakref

import pytest
from helpers import ROOT

from common.interruption import interruptible

# --- interruptions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name
)
def test_an_interruption_that_python_drops_comes_again(number):
    class Thing:
        pass

    def wait() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            time.sleep(0.01)

    thing, former = Thing(), sys.unraisablehook
    # an exception in what is called when a thing goes reaches nobody
    watched = weakref.ref(thing, lambda _: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt), interruptible():
        del thing
        assert watched() is None
        wait()
    assert sys.unraisablehook is former


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name
)
def test_an_interruption_that_a_library_turns_into_another_error_stays_one(number):
    former = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        try:
            signal.raise_signal(number)
        finally:
            raise AttributeError("while cleaning up")
    assert isinstance(caught.value.__cause__, AttributeError)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == former


def test_an_error_without_an_interruption_stays_what_it_is():
    with pytest.raises(AttributeError, match="a defect"), interruptible():
        raise AttributeError("a defect")


def test_ctrl_c_that_is_to_be_ignored_stays_ignored():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_other_exceptions_that_python_drops_are_told_as_ever(monkeypatch):
    class Thing:
        def __del__(self):
            raise ValueError("told")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    with interruptible():
        Thing()
    assert [one.exc_type for one in told] == [ValueError]


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
