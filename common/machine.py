"""The machine: memory, cores, processes of torchrun, bounded work in threads."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common.interruption import until_stopped


def is_main_process() -> bool:
    """Whether this process logs and writes for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process can still take.

    The least of what the system has available and of what the limits of the process's own control
    groups leave. 4 GiB outside Linux, where neither is known.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(li.split()[1]) << 10 for li in lines if "MemAvailable" in li)
    except (OSError, StopIteration):
        return 4 << 30
    return min([free, *_left_by_control_groups(root)])


# of a control group: where it lies, limit, use, and what of it is the cache of files
CONTROL_GROUPS = {
    1: ("memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
    2: ("", "max", "current", "inactive_file"),
}


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """Bytes that the groups of this process, and the groups that those are in, leave it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        part, most, used, cached = CONTROL_GROUPS[1 if controllers else 2]
        top = root / "sys/fs/cgroup" / part
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                limit = int((folder / f"memory.{most}").read_text())
                in_use = int((folder / f"memory.{used}").read_text())
                counts = (folder / "memory.stat").read_text().split()
            except (OSError, ValueError):  # no such file, or "max"
                continue
            # the cache of files is freed when memory is needed
            in_use -= int(dict(zip(counts[::2], counts[1::2])).get(cached, 0))
            yield max(limit - in_use, 0)


def fits_in_memory(size: int) -> bool:
    """Whether bytes that a file asks for are half of the free memory at most.

    Outside Linux the free memory is not known, and nothing is refused.
    """
    known = os.path.exists("/proc/meminfo")
    return size < 2**28 or not known or size <= free_memory() / 2


def peak_memory() -> int | None:
    """The most bytes of main memory that this process has held; None on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def available_cores() -> int:
    """CPU cores of this process, by affinity and CPU quota; processes of torchrun share them."""
    import joblib

    return max(1, joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def tune_malloc() -> None:
    """Have the C library keep freed memory for the next batch, in one pool for all threads.

    By default glibc gives large blocks back to the system at once, and the system zeroes them
    again for the next batch. This saves 14 % of the CPU time of a map by a U-Net with resnet18 and
    7 % by PSPNet with a small MobileNet. Elsewhere nothing is done.
    """
    import ctypes

    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX of malloc.h
        for option, value in ((-1, 2**31 - 1), (-4, 0), (-8, 1)):
            ctypes.CDLL(None).mallopt(option, value)


class SerialWorker:
    """A thread that calls functions one after the other; at most ``most`` calls wait."""

    def __init__(self, most: int):
        self.most = most
        self.pool = ThreadPoolExecutor(1)
        self.waiting: deque = deque()

    def do(self, function: Callable, *arguments) -> None:
        """Queue a call; wait while too many are queued. Raises what an earlier call has raised."""
        while len(self.waiting) >= self.most:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(function, *arguments))

    def finish(self) -> None:
        """Wait for all calls; raises what one of them has raised."""
        while self.waiting:
            self.waiting.popleft().result()


def bounded_map(
    function: Callable,
    items: Iterable,
    workers: int,
    ahead: int,
    size: Callable[[object], int] = lambda item: 0,
    most: int = 0,
) -> Iterator:
    """Apply a function in threads; the results come in the order of the items.

    Args:
        function: Of one item. What it raises comes out in the place of its result.
        items: Taken by the calling thread, only as they are needed.
        workers: Threads.
        ahead: At most ``workers + ahead`` items are in flight: taken, but their result not.
        size: The bytes of an item.
        most: Another item is taken only while those in flight have no more bytes than that.

    A requested stop is heeded between items.

    Closing the iterator (``contextlib.closing``) drops what has not begun and waits for the rest.
    """
    pool, waiting, held = ThreadPoolExecutor(workers), deque(), 0
    try:
        for item in until_stopped(items):
            waiting.append((pool.submit(function, item), size(item)))
            held += waiting[-1][1]
            del item  # while the next one is fetched
            while len(waiting) >= workers + ahead or held > most:
                done, freed = waiting.popleft()
                yield done.result()
                held -= freed
        for done, _ in until_stopped(waiting):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def prefetch(items: Iterable) -> Iterator[Iterator]:
    """Have a thread fetch the next item while the present one is worked on.

    A requested stop is left to the caller, and after an error nothing more is fetched.
    """
    end, source = object(), iter(items)
    with ThreadPoolExecutor(1) as pool:

        def fetched() -> Iterator:
            following = pool.submit(next, source, end)
            while (item := following.result()) is not end:
                following = pool.submit(next, source, end)
                yield item

        yield fetched()
