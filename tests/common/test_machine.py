"""Bounded work in threads, and the cores of the machine."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import joblib
import pytest

from common import machine
from common.machine import SerialWorker, available_cores, bounded_map, prefetch


def test_results_come_in_the_order_of_the_items():
    def slow_at_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return -item

    assert list(bounded_map(slow_at_first, range(9), 3, 2)) == [-n for n in range(9)]
    assert list(bounded_map(abs, [], 3, 2)) == []


@pytest.mark.parametrize(("workers", "ahead"), [(1, 0), (1, 1), (2, 3)])
def test_no_more_items_are_in_flight_than_workers_and_those_ahead(workers, ahead):
    taken, seen = [], []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    for number in bounded_map(lambda item: item, items(), workers, ahead):
        assert len(taken) - len(seen) <= workers + ahead
        seen.append(number)
    assert seen == list(range(20))


def test_an_exception_comes_out_in_the_place_of_its_result():
    seen = []
    with pytest.raises(ZeroDivisionError):
        for value in bounded_map(lambda item: 6 / item, [3, 2, 0, 1], 2, 2):
            seen.append(value)  # noqa: PERF402
    assert seen == [2, 3]


def test_closing_drops_what_has_not_begun_and_waits_for_the_rest():
    go, second, begun, ended = threading.Event(), threading.Event(), [], []

    def work(item: int) -> int:
        begun.append(item)
        if item:
            second.set()
            go.wait(5)
        ended.append(item)
        return item

    with closing(bounded_map(work, range(9), 1, 4)) as results:
        assert next(results) == 0
        assert second.wait(60)  # on a busy machine the thread is late
        threading.Timer(0.05, go.set).start()
    assert begun == ended == [0, 1]


def test_prefetch_works_on_the_next_item_while_the_present_one_is_used():
    fetched = threading.Semaphore(0)

    def items():
        for number in range(4):
            fetched.release()
            yield number

    with prefetch(items()) as ahead:
        assert next(ahead) == 0
        assert fetched.acquire(timeout=5) and fetched.acquire(timeout=5)
        assert list(ahead) == [1, 2, 3]


def test_prefetch_raises_what_the_source_raises():
    def items():
        yield 1
        raise KeyError("source")

    with pytest.raises(KeyError, match="source"), prefetch(items()) as ahead:
        assert next(ahead) == 1
        next(ahead)


def test_prefetch_fetches_nothing_after_an_error():
    class Source:
        asked = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.asked += 1
            raise KeyError("source")

    source = Source()
    with pytest.raises(KeyError), prefetch(source) as ahead:
        next(ahead)
    assert source.asked == 1


def test_a_stop_is_left_to_those_who_take_what_is_prefetched(monkeypatch):
    monkeypatch.setattr(machine, "until_stopped", lambda items: iter(()))
    with prefetch(range(3)) as ahead:
        assert list(ahead) == [0, 1, 2]


def test_a_serial_worker_keeps_the_order_lets_few_wait_and_raises_what_a_call_raised():
    thread, done, go = SerialWorker(2), [], threading.Event()

    def work(number: int) -> None:
        go.wait(30)
        if number == 3:
            raise OSError("no space left")
        done.append(number)

    with thread.pool:
        thread.do(work, 0)
        thread.do(work, 1)  # as many as may wait
        blocked = threading.Thread(target=thread.do, args=(work, 2))
        blocked.start()
        blocked.join(0.2)
        assert blocked.is_alive() and done == []
        go.set()
        blocked.join(30)
        thread.do(work, 3)
        with pytest.raises(OSError, match="no space left"):
            thread.finish()
    assert done == [0, 1, 2]


@pytest.mark.parametrize(("local", "expected"), [("1", 6), ("4", 1), ("9", 1)])
def test_processes_of_torchrun_share_the_cores(monkeypatch, local, expected):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert available_cores() == expected
