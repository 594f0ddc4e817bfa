"""A dataset appears complete: second runs, interruptions, the journal, threads."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import rasterio
from batch_helpers import (
    Batch,
    Dataset,
    at,
    draw_spoilt,
    messages,
    noise,
    tiles,
    write,
    write_grid,
)
from helpers import patch_everywhere
from site_helpers import run

from common import SPLITS
from common.rasters import Source
from extraction import cutting
from extraction.cells import reading_order, regular_cells
from extraction.cutting import PatchWriter
from extraction.journal import Journal, Skipped

# --- a second run ----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--resume"]])
def test_a_second_run_refuses_and_leaves_the_first_one_as_it_is(batch, capsys, words):
    batch.draw("a", 16)
    before = batch.cut().files()
    (line,) = messages(capsys, *batch.words(*words), status=1)
    assert "already holds patches" in line and "--overwrite" in line
    assert Dataset(batch.out).files() == before
    assert [path.name for path in batch.out.iterdir()] == ["Patch"]


def test_overwrite_leaves_no_patch_of_the_run_before(batch):
    batch.draw("a", 32)
    batch.cut()
    batch.draw("a", 16)
    assert len(batch.cut("--overwrite").splits) == 4
    assert [path.name for path in batch.out.iterdir()] == ["Patch"]


def test_resume_with_nothing_to_resume_is_an_ordinary_run(batch):
    batch.draw("a", 16)
    assert len(batch.cut("--resume").splits) == 4


def test_overwrite_works_after_an_interruption_while_the_former_run_is_removed(
    batch, monkeypatch
):
    batch.draw("a", 16)
    batch.cut()
    remove = shutil.rmtree

    def interrupted(path, **more):
        if str(path).endswith("-former"):
            raise KeyboardInterrupt
        remove(path, **more)

    with monkeypatch.context() as patching:
        patching.setattr(shutil, "rmtree", interrupted)
        assert run(*batch.words("--overwrite")) == 130
    assert run(*batch.words("--overwrite")) == 0


# --- interruption ----------------------------------------------------------------------------


def same_result(one: Dataset, other: Dataset) -> bool:
    """Whether two runs wrote the same patches, splits, metadata and cells."""
    pandas.testing.assert_frame_equal(one.cells(), other.cells())
    assert one.files() == other.files()
    hidden = [p.name for p in one.root.rglob("*") if p.name.startswith(".")]
    listed = {path.name for path in one.root.iterdir()}
    assert (hidden, listed) == ([], {*SPLITS, "cells.gpkg", "metadata.json"})
    kept = ("patches", "skipped", "scenes", "bands", "class_names", "crs")
    return all(one.metadata[key] == other.metadata[key] for key in kept)


def interrupt_writing(monkeypatch, after: int) -> None:
    """Raise KeyboardInterrupt at the patch after so many."""
    write_patch, calls = PatchWriter.write, itertools.count()

    def failing(self, patch, image_path, label_path):
        if next(calls) >= after:
            raise KeyboardInterrupt
        write_patch(self, patch, image_path, label_path)

    monkeypatch.setattr(PatchWriter, "write", failing)


def interrupt_renaming(monkeypatch, after: int) -> None:
    """Raise KeyboardInterrupt while finished patches are moved to their splits."""
    rename, calls = Path.rename, itertools.count()

    def failing(self, target):
        if next(calls) >= after:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)


def interrupt_at(name: str):
    """Raise KeyboardInterrupt when a function of the module is called."""

    def begin(monkeypatch, _):
        def failing(*_):
            raise KeyboardInterrupt

        patch_everywhere(monkeypatch, name, failing)

    return begin


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Batch, Dataset]:
    """Two scenes with cells that are skipped, and what a run makes of them."""
    batch = Batch(tmp_path_factory.mktemp("uninterrupted"))
    label = noise(48)[1]
    label[:8, :16] = 255
    batch.draw("a", 48, label=label)
    batch.draw("b", (40, 42), transform=at(24, 24), seed=1)
    return batch, batch.cut("--split_by", "block")


@pytest.fixture
def whole(uninterrupted, tmp_path) -> tuple[Batch, Dataset]:
    """The scenes with another output, and what is to result."""
    batch, dataset = uninterrupted
    batch.out = tmp_path / "resumed"
    return batch, dataset


@pytest.mark.parametrize(
    ("interrupt", "after"),
    [
        *((interrupt_writing, n) for n in (20, 33, 58)),
        *((interrupt_renaming, n) for n in (0, 1, 30)),
        (interrupt_at("extraction.splits.assign_splits"), 0),
        (interrupt_at("extraction.dataset.write_cells"), 0),
        (interrupt_at("extraction.dataset.publish"), 0),
    ],
)
def test_a_run_that_was_interrupted_is_resumed_to_the_identical_result(
    whole, monkeypatch, capsys, interrupt, after
):
    batch, expected = whole
    words = batch.words("--split_by", "block")
    with monkeypatch.context() as patching:
        interrupt(patching, after)
        lines = messages(capsys, *words, status=130)
    assert any("--resume" in line for line in lines)
    assert not (batch.out / "Patch").exists()
    assert "--resume" in messages(capsys, *words, status=1)[-1]
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)
    assert [path.name for path in batch.out.iterdir()] == ["Patch"]


def test_a_run_may_be_interrupted_again_and_again(whole, monkeypatch):
    batch, expected = whole
    for number in range(4):
        with monkeypatch.context() as patching:
            interrupt_writing(patching, 12)
            more = ["--resume"] if number else []
            assert run(*batch.words("--split_by", "block", *more)) == 130
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


def test_a_resumed_run_cuts_only_what_is_missing(whole, monkeypatch):
    batch, _ = whole
    words = ["--split_by", "block", "--workers", 1]
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 40)
        assert run(*batch.words(*words)) == 130
    cut, write_cell = [], cutting.write_cell

    def noted(read, *more):
        cut.append(read.cell.name)
        return write_cell(read, *more)

    patch_everywhere(monkeypatch, "extraction.cutting.write_cell", noted)
    dataset = batch.cut(*words, "--resume")
    assert 0 < len(cut) <= len(dataset.records) + len(dataset.skipped) - 30


def test_patches_that_are_cut_off_or_missing_are_cut_again(whole, monkeypatch):
    batch, expected = whole
    with monkeypatch.context() as patching:
        interrupt_at("extraction.splits.assign_splits")(patching, 0)
        assert run(*batch.words("--split_by", "block")) == 130
    staging = batch.out / ".Patch-partial"
    images, labels = (
        sorted((staging / kind).iterdir()) for kind in ("images", "labels")
    )
    images[3].write_bytes(images[3].read_bytes()[:-40])
    labels[7].write_bytes(b"")
    images[9].unlink()
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


def test_overwrite_begins_anew_after_an_interruption(whole, monkeypatch):
    batch, expected = whole
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 20)
        assert run(*batch.words("--seed", 5)) == 130
    assert same_result(batch.cut("--split_by", "block", "--overwrite"), expected)


def test_an_interrupted_overwrite_keeps_the_former_patches_until_it_is_resumed(
    whole, monkeypatch
):
    batch, expected = whole
    before = batch.cut("--seed", 5).files()
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 20)
        assert run(*batch.words("--split_by", "block", "--overwrite")) == 130
    assert Dataset(batch.out).files() == before
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


def test_an_overwrite_that_was_interrupted_in_its_last_moment_can_be_resumed(
    whole, monkeypatch
):
    batch, expected = whole
    batch.cut("--seed", 5)
    with monkeypatch.context() as patching:
        interrupt_at("extraction.dataset.publish")(patching, 0)
        assert run(*batch.words("--split_by", "block", "--overwrite")) == 130
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--patch_size", 16], "another patch_size (8, now 16)"),
        (["--stride", 4], "another stride (None, now 4)"),
        (["--min_valid", 0.1], "another min_valid (0.5, now 0.1)"),
        (["--label_values", "0,1"], "another label_values (None, now 0,1)"),
    ],
)
def test_other_settings_are_refused_by_name_and_nothing_is_lost(
    batch, monkeypatch, capsys, words, option
):
    batch.draw("a", 32)
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 5)
        assert run(*batch.words("--workers", 1)) == 130
    before = sorted(batch.out.rglob("*"))
    (line,) = messages(capsys, *batch.words("--resume", *words), status=1)
    assert option in line and "--overwrite" in line
    assert sorted(batch.out.rglob("*")) == before
    assert len(batch.cut("--resume", "--workers", 2).splits) == 16


@pytest.mark.parametrize("kept", [8, 100, 200])
def test_half_a_patch_that_is_not_in_the_journal_yet_is_replaced(
    whole, monkeypatch, kept
):
    batch, expected = whole
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 20)
        assert run(*batch.words("--split_by", "block", "--workers", 1)) == 130
    content = next((expected.root / "train" / "images").iterdir()).read_bytes()
    staged = batch.out / ".Patch-partial" / "images"
    missing = sorted(set(expected.records) - {path.stem for path in staged.iterdir()})
    (staged / f"{missing[-1]}.tif").write_bytes(content[:kept])
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


def test_a_resumed_run_without_skip_errors_lets_no_error_pass(
    batch, monkeypatch, capsys
):
    draw_spoilt(batch, "Label")
    label = batch.data / "Label_a.tif"
    before = label.stat()
    with monkeypatch.context() as patching:
        interrupt_at("extraction.splits.assign_splits")(patching, 0)
        assert run(*batch.words("--skip_errors")) == 130
    write(
        label, noise(24)[1], compress="deflate", blockysize=8
    )  # the disk is well again
    assert label.stat().st_size == before.st_size
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(batch.cut("--resume").splits) == 9


def test_another_command_is_refused(batch, monkeypatch):
    batch.draw("a", 32)
    files = [
        "--image",
        batch.data / "Image_a.tif",
        "--label",
        batch.data / "Label_a.tif",
    ]
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 5)
        words = ["--output", batch.out, "--patch_size", 8, "--workers", 1]
        assert run("extract", *files, *words) == 130
    assert run(*batch.words("--resume")) == 1


def test_the_journal_holds_records_and_reasons_and_reads_them_again(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.note("a", {"name": "a", "class_pixels": [1, 2]})
    journal.note("b", Skipped("no valid pixel"))
    journal.note("d", Skipped("cut off", is_error=True))
    journal.note("c", {"name": "c", "class_pixels": [3]})
    again = Journal(journal.path)
    assert (
        again.records
        == journal.records
        == {
            "a": {"name": "a", "class_pixels": [1, 2]},
            "c": {"name": "c", "class_pixels": [3]},
        }
    )
    assert again.skipped == {"b": Skipped("no valid pixel")}  # errors are tried again
    assert journal.skipped == again.skipped | {"d": Skipped("cut off", is_error=True)}
    assert '{"name": "d", "skipped": "error: cut off"}' in journal.path.read_text()


def test_a_last_line_that_is_cut_off_is_left_out_of_the_journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.note("a", Skipped("empty"))
    journal.note("b", {"name": "b", "class_pixels": [1]})
    text = journal.path.read_text()
    journal.path.write_text(text[:-9])
    again = Journal(journal.path)
    assert (again.skipped, again.records) == ({"a": Skipped("empty")}, {})


def test_a_journal_goes_on_after_a_line_that_is_cut_off(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.note("a", Skipped("empty"))
    journal.path.write_text(journal.path.read_text()[:-9])
    Journal(journal.path).note("b", Skipped("dark"))
    assert Journal(journal.path).skipped == {"b": Skipped("dark")}


def test_the_journal_forgets_patches_that_are_not_there_whole(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    image, label = noise(8)
    for name in ("whole", "half", "gone"):
        journal.note(name, {"name": name})
        write(tmp_path / "images" / f"{name}.tif", image)
        write(tmp_path / "labels" / f"{name}.tif", label)
    half = tmp_path / "labels" / "half.tif"
    half.write_bytes(half.read_bytes()[:-10])
    (tmp_path / "images" / "gone.tif").unlink()
    journal.forget_missing(tmp_path)
    assert list(journal.records) == ["whole"]


# --- order and threads -----------------------------------------------------------------------


def test_one_thread_and_four_give_identical_files(batch):
    label = noise((60, 52))[1]
    label[:30, :11] = 255
    batch.draw("a", (60, 52), label=label)
    grid = write_grid(batch.folder / "grid.geojson", tiles(5, 6, side=10))
    results = []
    for workers in (1, 4):
        batch.out = batch.folder / f"by{workers}"
        results.append(batch.cut("--grid", grid, "--workers", workers))
    one, four = results
    assert len(one.splits) > 20 and one.skipped
    assert same_result(one, four)


@pytest.mark.parametrize("grid", [False, True])
def test_cells_are_read_in_the_order_of_the_rows(batch, monkeypatch, grid):
    batch.draw("a", 48)
    words = []
    if grid:  # column by column
        cells = sorted(tiles(6, 6), key=lambda cell: cell.bounds)
        words = ["--grid", write_grid(batch.folder / "grid.geojson", cells)]
    windows, read = [], Source.read

    def noted(source, window):
        if len(source.bands) == 2 and window.height == 8:  # the label has one band
            windows.append((window.row_off, window.col_off))
        return read(source, window)

    monkeypatch.setattr(Source, "read", noted)
    dataset = batch.cut(*words, "--workers", 4)
    assert len(windows) == len(dataset.splits) == 36
    assert windows == list(itertools.product(range(0, 48, 8), repeat=2))


def test_a_scene_too_wide_for_the_cache_is_read_in_columns(batch, monkeypatch):
    batch.draw("a", 48)
    with rasterio.open(batch.data / "Image_a.tif") as image:
        block = image.block_shapes[0][0]
        rows = block + max(block, 8)
        cache = 2 * 2 * np.dtype(image.dtypes[0]).itemsize * rows * 20  # of 20 columns
        patch_everywhere(monkeypatch, "common.rasters.GDAL_CACHE", cache)
        cells = regular_cells(48, 48, 8, 8, "a")
        order = reading_order(cells[::-1], Source(image, [1, 2]))
    places = [(cell.window.col_off // 20, cell.window.row_off) for cell in order]
    assert places == sorted(places) and len({place[0] for place in places}) == 3
    assert sorted(cell.name for cell in order) == sorted(cell.name for cell in cells)
