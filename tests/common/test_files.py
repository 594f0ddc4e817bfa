"""Files that appear complete or not at all, and locks on folders."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import rasterio
from filelock import FileLock
from helpers import ROOT, write_geotiff

from common.errors import SegmentationError
from common.files import (
    atomic_write,
    compare_runs,
    describe_file,
    describe_files,
    exclusive_lock,
    file_behind,
    fingerprint,
    umask,
    write_json,
)
from common.options import setting
from common.rasters import (
    Source,
    open_raster,
)

# --- files that appear whole -----------------------------------------------------------------


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "folder" / "result.txt"
    with atomic_write(target) as part:
        part.write_text("half")
        assert part.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "half"
    assert os.listdir(target.parent) == ["result.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_file(tmp_path, error):
    with pytest.raises(error), atomic_write(tmp_path / "result.txt") as part:
        part.write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_error_keeps_the_former_file(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("former")
    with pytest.raises(KeyError), atomic_write(target) as part:
        part.write_text("half")
        raise KeyError
    assert target.read_text() == "former"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_a_former_file_is_replaced(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("former")
    with atomic_write(str(target)) as part:
        part.write_text("new")
    assert target.read_text() == "new"


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path):
    target = tmp_path / ("x" * 251 + ".txt")
    with atomic_write(target) as part:
        part.write_text("long")
    assert target.read_text() == "long"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0, 0o666)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    former = os.umask(mask)
    try:
        with atomic_write(tmp_path / "result.txt") as part:
            part.write_text("text")
        assert umask() == mask
    finally:
        os.umask(former)
    assert (tmp_path / "result.txt").stat().st_mode & 0o777 == mode


def test_a_new_raster_is_not_shown_by_the_overviews_of_the_former_one(tmp_path):
    target = write_geotiff(tmp_path / "map.tif", np.full((64, 64), 1, "uint8"))
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(target, "r+") as file:
        file.build_overviews([4])
    with atomic_write(target) as part:
        write_geotiff(part, np.full((64, 64), 2, "uint8"))
    with open_raster(target) as file:
        picture, _ = Source(file, [1]).overview(16)
    assert np.unique(picture).tolist() == [2]


def test_json_is_written_as_any_reader_accepts_it(tmp_path):
    content = {"scores": [0.5, None], "name": "forêt"}
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_bytes()) == content


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_takes_no_nan_and_no_infinity(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"score": value})
    assert os.listdir(tmp_path) == []


# --- locks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runs", ".partial"])
def test_a_locked_folder_is_refused_and_nothing_is_left_of_the_lock(tmp_path, name):
    folder = tmp_path / "deep" / name
    with exclusive_lock("--output", "out", folder):
        (folder / "file").touch()
        with (
            pytest.raises(SegmentationError, match="Another run into out .* --output"),
            exclusive_lock("--output", "out", folder),
        ):
            pass
    with exclusive_lock("--output", "out", folder):
        pass
    assert [path.name for path in folder.parent.rglob("*")] == [name, "file"]


def test_a_folder_that_was_made_and_stays_empty_goes_with_its_lock(tmp_path):
    with exclusive_lock("--output", "out", tmp_path / "a" / ".b"):
        assert (tmp_path / "a" / ".b").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_hidden_folder_can_be_moved_under_its_lock(tmp_path):
    hidden = tmp_path / ".partial"
    with exclusive_lock("--output", "out", hidden):
        (hidden / "file").touch()
        hidden.rename(tmp_path / "done")
    assert [path.name for path in tmp_path.rglob("*")] == ["done", "file"]


def test_a_lock_that_a_killed_process_has_left_is_free(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from common.files import exclusive_lock\n"
        "with exclusive_lock('--output', 'out', Path(sys.argv[1])): os._exit(1)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    subprocess.run(command, cwd=ROOT, check=False)
    assert (tmp_path / "runs" / ".lock").exists()
    with exclusive_lock("--output", "out", tmp_path / "runs"):
        pass
    assert not (tmp_path / "runs" / ".lock").exists()


@pytest.mark.parametrize("error", [OSError, NotImplementedError])
def test_a_disk_without_locks_keeps_nobody_out(tmp_path, monkeypatch, error):
    def acquire(*_, **__):
        raise error("no locks here")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with exclusive_lock("--output", "out", tmp_path / "runs"):
        (tmp_path / "runs" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "file"]


# --- what a resumed run must share ------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    size: int = setting(8)
    ratios: tuple = setting((0.5, 0.5))
    workers: int = setting(1, may_change=True)


def test_a_fingerprint_is_plain_json_of_what_may_not_change():
    assert fingerprint(Options(workers=3)) == {"size": 8, "ratios": [0.5, 0.5]}


def test_a_run_with_other_settings_is_refused_by_the_first_difference():
    former, present = fingerprint(Options()), fingerprint(Options(size=16))
    compare_runs(former, dict(former), "out", "start again")
    with pytest.raises(
        SegmentationError, match=r"out .*another size \(8, now 16\).*agai"
    ):
        compare_runs(former, present, "out", "start again")
    with pytest.raises(SegmentationError, match=r"another more \(1, now None\)"):
        compare_runs(former | {"more": 1}, former, "out", "start again")


@pytest.mark.parametrize(
    "text, name",
    [
        ("/vsizip/{0}/a.zip/in/b.tif", "a.zip"),
        ("/vsizip/{{{0}/a.zip}}/in/b.tif", "a.zip"),
        ("/vsizip/{0}/a.zip", "a.zip"),
        ("zip://{0}/a.zip!in/b.tif", "a.zip"),
        ("/vsitar/{0}/c.tar/in/b.tif", "c.tar"),
        ("/vsizip//vsitar/{0}/c.tar/a.zip/b.tif", "c.tar"),
        ("/vsigzip/{0}/d!.gz", "d!.gz"),
        ("{0}/a.zip", "a.zip"),
    ],
)
def test_a_path_into_an_archive_is_known_by_the_archive(tmp_path, text, name):
    for file in ("a.zip", "c.tar", "d!.gz"):
        (tmp_path / file).write_text(file)
    path, archive = text.format(tmp_path), str(tmp_path / name)
    assert file_behind(path) == archive
    assert describe_file(path) == describe_file(archive) | {"name": path}
    assert list(describe_files([path, path])) == [archive]


@pytest.mark.parametrize(
    "path", ["/vsizip/none.zip/b.tif", "/vsicurl/http://x/a.zip", "http://x/a", "b.tif"]
)
def test_a_path_without_a_file_here_has_nothing_to_know_it_by(path):
    assert file_behind(path) == path
    assert describe_file(path) == {"name": path} and describe_files([path]) == {}
