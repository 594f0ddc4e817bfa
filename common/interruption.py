"""SIGINT and SIGTERM as a request that loops look at: no exception falls into a library."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")

FIRST = b"\ninterrupted: ending what is in work; once more ends at once\n"

_received: list[int] = []  # the signals of this run, in order


def stop_requested() -> bool:
    """Whether a signal has asked this run to end."""
    return bool(_received)


def stop_if_requested() -> None:
    """Raise KeyboardInterrupt where ``stop_requested``; called where nothing is half done."""
    if _received:
        raise KeyboardInterrupt


def until_stopped(items: Iterable[Item]) -> Iterator[Item]:
    """The items of a loop; before each, and after the last, a requested stop ends the run."""
    for item in items:
        stop_if_requested()
        yield item
    stop_if_requested()


def exit_status() -> int:
    """The exit status of a run that was interrupted: 130 by Ctrl-C, 143 by SIGTERM."""
    return 128 + (_received[0] if _received else signal.SIGINT)


@contextmanager
def interruptible(loud: bool = True) -> Iterator[None]:
    """Have SIGINT and SIGTERM request a stop of what the block does, which looks at it.

    A second signal ends the process at once. ``loud``: a line says so.
    """

    def request(number: int, _) -> None:
        if _received:
            os._exit(128 + number)
        _received.append(number)
        if loud:
            os.write(2, FIRST)  # printing may have been interrupted itself

    former = {signal.SIGTERM: signal.signal(signal.SIGTERM, request)}
    # not where Ctrl-C is to be ignored, as in the background
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        former[signal.SIGINT] = signal.signal(signal.SIGINT, request)
    _received.clear()
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def end_when_stuck(last_words: str | None, after: float) -> Iterator[None]:
    """End this process, with a line, when it is still here some seconds ``after`` SIGTERM.

    Python acts on a signal when the call of a library that the main thread is in returns. One that
    waits for a GPU does not where another process of a collective is gone.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    former = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    left = threading.Event()

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGTERM and not left.wait(after):
                if last_words:
                    print(last_words, file=sys.stderr, flush=True)
                os._exit(1)
        os.close(read)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(former)
        os.close(write)
