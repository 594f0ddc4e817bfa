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
    whenever a tensor goes), it comes again a moment later.
    """

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    def dropped(unraisable) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.01, _thread.interrupt_main, [signal.SIGTERM])
            again.start()
        else:
            former_hook(unraisable)

    former, former_hook = signal.signal(signal.SIGTERM, interrupt), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = former_hook
        signal.signal(signal.SIGTERM, former)
