"""SIGINT and SIGTERM: how a run is interrupted."""

from __future__ import annotations

import _thread
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
