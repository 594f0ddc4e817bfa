"""Finished rows on disk: stored in any order, by several processes, torn by a kill."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from helpers import patch_everywhere
from prediction_helpers import LAYERS, piece, random_layers, random_parts, run

from prediction.rowstore import RowStore, StoredPart, _write_all
from prediction.tiling import Extent


def finished(arrays, parts) -> list[StoredPart]:
    """What journals list."""
    return [StoredPart(part, tuple(piece(arrays, part)[1].tolist())) for part in parts]


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_what_is_stored_in_any_order_is_read_back(partial, columns):
    arrays = random_layers(90, 41)
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        for part in random_parts(90, 41, columns, seed=columns):
            rows.write(part, *piece(arrays, part))
        assert (rows.covered == 41).all()
        for top, bottom in ((0, 90), (0, 1), (13, 64), (89, 90)):
            for name, array in arrays.items():
                found = rows.read(name, top, bottom)
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array[:, top:bottom])


def test_two_processes_store_into_the_same_map(partial):
    arrays = random_layers(90, 41)
    parts = random_parts(90, 41, 3, seed=9)
    for number in range(2):
        rows = RowStore(partial, LAYERS, (90, 41), number)
        with rows.opened:
            for part in parts[number::2]:
                rows.write(part, *piece(arrays, part))
    found = RowStore.finished_parts(partial)
    assert sorted(found) == sorted(finished(arrays, parts))
    assert [path.name for path in partial.glob("done-*")] == ["done-0.txt"]
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        for name, array in arrays.items():
            np.testing.assert_array_equal(rows.read(name, 0, 90), array)


@pytest.mark.parametrize("torn", ["1", "64 9", "64 90 0 41", "64 90 0 41 1066 64 0"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_torn_line_of_a_journal_is_ignored_and_spoils_no_later_one(
    partial, torn, number
):
    arrays = random_layers(90, 41)
    first, second = Extent(0, 64, 0, 41), Extent(64, 90, 0, 41)
    rows = RowStore(partial, LAYERS, (90, 41), number)
    with rows.opened:
        rows.write(first, *piece(arrays, first))
    with open(partial / f"done-{number}.txt", "a") as journal:
        journal.write(torn)
    found = RowStore.finished_parts(partial)
    assert found == finished(arrays, [first])
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        rows.write(second, *piece(arrays, second))
    found = RowStore.finished_parts(partial)
    assert found == finished(arrays, [first, second])
    assert [path.name for path in partial.glob("done-*")] == ["done-0.txt"]


def test_a_part_that_two_journals_tell_of_counts_once(partial):
    # twice 30 columns are more than 41
    left = StoredPart(Extent(0, 90, 0, 30), (7, 8))
    for number in (0, 1):  # as a process leaves them that is killed while it joins them
        (partial / f"done-{number}.txt").write_text("0 90 0 30 7 8\n")
    assert RowStore.finished_parts(partial) == [left]
    assert RowStore.finished_parts(partial) == [left]


@pytest.mark.parametrize("bytes_a_call", [1000, 7])
def test_files_that_take_and_give_less_at_a_time_hold_the_map_all_the_same(
    partial, bytes_a_call
):
    class Slow:  # as Linux is past 2 GiB
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:bytes_a_call])

        def read(self, size):
            return self.file.read(min(size, bytes_a_call))

        def readinto(self, data):
            return self.file.readinto(memoryview(data).cast("B")[:bytes_a_call])

        def __getattr__(self, name):
            return getattr(self.file, name)

    arrays, part = random_layers(90, 41), Extent(0, 90, 0, 41)
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        rows.files = {name: Slow(file) for name, file in rows.files.items()}
        rows.sources = {name: Slow(file) for name, file in rows.sources.items()}
        rows.write(part, *piece(arrays, part))
        for name, array in arrays.items():
            np.testing.assert_array_equal(rows.read(name, 0, 90), array)


def test_a_part_is_in_the_journal_only_after_it_is_in_the_files(partial, monkeypatch):
    arrays, part = random_layers(90, 41), Extent(0, 90, 0, 41)
    write_all, fsync, calls = _write_all, os.fsync, []

    def failing(file, data):
        calls.append(file.name)
        if len(calls) == 4:  # the last layer
            raise OSError("disk full")
        write_all(file, data)

    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(number), fsync(number))
    )
    rows = RowStore(partial, LAYERS, (90, 41))
    with rows.opened:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch_everywhere(patch, "prediction.rowstore._write_all", failing)
            rows.write(part, *piece(arrays, part))
        assert (partial / "done-0.txt").read_text() == ""
        assert not rows.covered.any()
        synced.clear()
        rows.write(part, *piece(arrays, part))
        files = [file.fileno() for file in rows.files.values()]
        assert synced == [*files, rows.journal.fileno()]


def test_a_disk_that_does_not_hold_the_map_is_an_error_before_the_work(
    land, scene, tmp_path, capsys, monkeypatch, batches
):
    # classes and confidence of 100 x 90 pixels: 45,000 bytes, as rows and as maps
    more = "--save_confidence"
    folder = tmp_path / "out"
    for free, status in ((89_999, 1), (90_000, 0)):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        assert run(land.path, scene, folder / "map.tif", more) == status
        if status:
            error = capsys.readouterr().err
            assert str(folder) in error and "GB free" in error
            assert not folder.exists() and batches == []
