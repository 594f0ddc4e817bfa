"""SIGINT and SIGTERM: how a run is interrupted."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM end a program as Ctrl-C does, so that what is open can be closed.

    Neither is lost: where it falls into a call whose exceptions Python drops (PyTorch has one
    whenever a tensor goes), it comes again a moment later. Where it falls into a library that
    raises another error while it cleans up (Matplotlib has some), it is the interruption that ends
    the block.
    """
    arrived = False

    def interrupt(*_) -> None:
        nonlocal arrived
        arrived = True
        raise KeyboardInterrupt

    def dropped(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.01, _thread.interrupt_main, [signal.SIGTERM])
            again.start()
        else:
            former_hook(unraisable)

    former = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    # not where Ctrl-C is to be ignored, as in the background
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        former[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    former_hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield
    except Exception as error:
        if arrived:
            raise KeyboardInterrupt from error
        raise
    finally:
        sys.unraisablehook = former_hook
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
