"""Faults of version 1.1 in prediction, by the numbers they have in ``pytest -m fault``."""

from __future__ import annotations

import errno
import os

import pytest
from helpers import interrupt
from prediction_helpers import EVERYTHING, noise, outcome, run, write_scene

fault = pytest.mark.fault


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- work that is kept ------------------------------------------------------------------


@fault(1)
def test_an_error_keeps_finished_rows_and_the_next_run_says_what_can_be_done(
    spatial, tall_scene, tmp_path, monkeypatch, capsys, batches
):
    folder = tmp_path / "out"
    assert run(spatial, tall_scene, tmp_path / "whole" / "map.tif", *EVERYTHING) == 0
    whole = len(batches)
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 5, disk_full())
        assert run(spatial, tall_scene, folder / "map.tif", *EVERYTHING) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "or write elsewhere. What is finished is kept: --resume" in error
    assert os.listdir(folder) == [".map.tif-partial"]
    kept = outcome(folder / ".map.tif-partial")
    assert run(spatial, tall_scene, folder / "map.tif", *EVERYTHING) == 1
    error = capsys.readouterr().err
    assert "map.tif is unfinished" in error
    assert "--resume" in error and "--overwrite" in error
    assert outcome(folder / ".map.tif-partial") == kept
    batches.clear()
    again = (*EVERYTHING, "--resume")
    assert run(spatial, tall_scene, folder / "map.tif", *again) == 0
    assert len(batches) < whole
    assert outcome(folder) == outcome(tmp_path / "whole") | {
        "map_statistics.json": (folder / "map_statistics.json").read_bytes()
    }


@fault(1)
@pytest.mark.parametrize("error", [disk_full(), KeyboardInterrupt()])
def test_a_run_that_finished_no_part_leaves_nothing(
    land, scene, tmp_path, monkeypatch, capsys, error
):
    interrupt(monkeypatch, "prediction.layers.compute_layers", 1, error)
    assert run(land.path, scene, tmp_path / "out" / "map.tif") != 0
    assert "is kept" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@fault(1)
def test_an_error_of_one_of_several_scenes_keeps_its_rows(
    spatial, tmp_path, monkeypatch, capsys
):
    scenes = [
        write_scene(tmp_path / f"{name}.tif", noise(150, 60, seed=seed))
        for seed, name in enumerate("ab")
    ]
    maps = tmp_path / "maps"
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 3, disk_full())
        assert run(spatial, scenes, maps) == 1
    assert "is kept: --resume" in capsys.readouterr().err
    assert (maps / ".a_prediction.tif-partial").exists()
    assert (maps / "b_prediction.tif").exists()
    assert run(spatial, scenes, maps) == 1
    assert run(spatial, scenes, maps, "--resume") == 0
    assert not list(maps.glob(".*"))


@fault(1)
@pytest.mark.parametrize("name", ["map.tif", "map_statistics.json", "areas.gpkg"])
def test_what_exists_is_replaced_only_with_overwrite(
    land, scene, tmp_path, capsys, batches, name
):
    output = tmp_path / "out" / "map.tif"
    options = ("--polygons", str(output.with_name("areas.gpkg")))
    output.parent.mkdir()
    (output.parent / name).write_bytes(b"mine")
    for more in (options, (*options, "--check")):
        assert run(land.path, scene, output, *more) == 1
        error = capsys.readouterr().err
        assert f"{name} is there already" in error and "--overwrite" in error
        assert outcome(output.parent) == {name: b"mine"}
        assert not batches or "--check" in more
    assert run(land.path, scene, output, *options, "--overwrite") == 0
    assert outcome(output.parent)[name] != b"mine"


@fault(1)
def test_resume_does_not_replace_a_map_of_which_no_run_is_known(
    land, scene, tmp_path, capsys
):
    output = tmp_path / "out" / "map.tif"
    output.parent.mkdir()
    output.write_bytes(b"mine")
    assert run(land.path, scene, output, "--resume") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert outcome(output.parent) == {"map.tif": b"mine"}


@fault(1)
def test_overwrite_starts_an_unfinished_map_again(
    spatial, tall_scene, tmp_path, monkeypatch, batches
):
    output = tmp_path / "out" / "map.tif"
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 5, disk_full())
        assert run(spatial, tall_scene, output) == 1
    batches.clear()
    assert run(spatial, tall_scene, output, "--overwrite") == 0
    assert len(batches) == 12 and not list(output.parent.glob(".*"))
