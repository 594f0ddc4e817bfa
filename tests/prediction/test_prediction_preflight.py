"""Predict_large_image.py --check."""

from __future__ import annotations

import shutil
from dataclasses import replace

import geopandas
import pytest
import shapely
from prediction_helpers import (
    DESCRIPTIONS,
    configure,
    cut_off,
    files_in,
    noise,
    run,
    write_scene,
)

from common.distributed import ProcessGroup
from common.files import atomic_write
from common.polygons import POLYGON_BYTES, VERTEX_BYTES
from prediction.ensemble import load_models
from prediction.preflight import check_scenes
from prediction.scene import map_scene
from prediction.tasks import list_tasks


def test_a_check_reports_what_a_run_will_take_and_leaves_nothing(
    land, scene, tmp_path, capsys
):
    before = files_in(tmp_path)
    assert run(land.path, scene, tmp_path / "new" / "map.tif", "--check") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "No problems found."
    assert "scenes   1, 0.0 megapixels\nwindows  4 of 64 x 64" in out
    assert "error" not in err
    assert files_in(tmp_path) == before


def test_what_a_check_says_is_what_a_run_takes(land, scene, tmp_path, batches):
    more = write_scene(tmp_path / "more.tif", noise(64, 200), DESCRIPTIONS)
    config = configure(
        model=[str(land.path)], input=[str(scene), str(more)], output=str(tmp_path),
        patch_size=64, overlap=16, precision="fp32", save_confidence=True,
    )  # fmt: skip
    problems, outlook = check_scenes(config)
    assert not problems
    assert outlook["scenes"] == 2 and outlook["pixels"] == 100 * 90 + 64 * 200
    assert outlook["precision"] == "fp32"
    assert outlook["window_seconds"] > 0 and outlook["memory"] > 1e8
    tasks = list_tasks(config)
    models = load_models(config)
    batches.clear()
    for task in tasks:
        map_scene(task, config, models, ProcessGroup())
    assert outlook["windows"] == sum(shape[0] for shape in batches)
    # classes of a byte and confidences of four
    assert outlook["unfinished"] == max(100 * 90, 64 * 200) * 5
    assert outlook["maps"] == (100 * 90 + 64 * 200) * 5


def test_a_check_estimates_the_memory_of_polygons_that_are_simplified(
    land, tmp_path, capsys
):
    scene = write_scene(tmp_path / "scene.tif", noise(100, 90), DESCRIPTIONS)
    areas, output = tmp_path / "areas.gpkg", tmp_path / "map.tif"
    needed = []
    for options in ((), ("--min_area", "900")):
        more = ("--polygons", str(areas), *options, "--overwrite")
        assert run(land.path, scene, output, *more) == 0
        found = geopandas.read_file(areas, layer=areas.stem).geometry
        vertices = shapely.get_num_coordinates(found).sum()
        needed.append(POLYGON_BYTES * len(found) + VERTEX_BYTES * vertices)
        config = configure(
            model=[str(land.path)], input=[str(scene)], output=str(output), simplify=15.0,
            patch_size=64, overlap=16, precision="fp32", polygons=str(areas), overwrite=True,
            **{name.removeprefix("--"): 900.0 for name in options[:1]},
        )  # fmt: skip
        problems, outlook = check_scenes(config)
        assert not problems and outlook["largest"] == 100 * 90
        estimated = outlook["polygon_bytes"] * outlook["largest"]
        assert estimated == pytest.approx(needed[-1], rel=0.25)
    assert needed[0] > 2 * needed[1]
    sieved = replace(config, min_area=0.0, sieve=900.0)
    assert check_scenes(sieved)[1]["polygon_bytes"] == outlook["polygon_bytes"]
    line = "GB of memory while those of a map are simplified"
    for simplify in ((), ("--simplify", "15")):
        capsys.readouterr()
        assert run(land.path, scene, output, *more, *simplify, "--check") == 0
        assert (line in capsys.readouterr().out) == bool(simplify)


def test_a_check_reports_all_problems_at_once(land, scene, tmp_path, capsys):
    broken = cut_off(write_scene(tmp_path / "broken.tif", noise(80, 80)))
    fewer = write_scene(tmp_path / "fewer.tif", noise(80, 80, bands=2))
    missing, maps = tmp_path / "missing.tif", tmp_path / "maps"
    scenes = [scene, broken, missing, fewer]
    before = files_in(tmp_path)
    assert run(land.path, scenes, maps, "--check") == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 3 and all("error: " in line for line in lines)
    for words in ("broken.tif is cut off", "missing.tif", "fewer.tif gives 2 bands"):
        assert any(words in line for line in lines), words
    assert files_in(tmp_path) == before


def test_a_check_looks_at_scenes_and_outputs_without_a_model(scene, tmp_path, capsys):
    broken = cut_off(write_scene(tmp_path / "broken.tif", noise(80, 80)))
    notes = tmp_path / "notes.txt"
    notes.write_text("no model")
    file = tmp_path / "file"
    file.write_text("")
    models = [tmp_path / "none.pth", notes]
    assert run(models, [scene, broken], file / "maps", "--check") == 1
    lines = capsys.readouterr().err.splitlines()
    for words in ("none.pth", "notes.txt", "broken.tif is cut off", "--output"):
        assert any(words in line for line in lines), words
    assert len(lines) == 4


def test_a_check_sees_a_run_that_cannot_be_resumed_and_a_disk_without_room(
    land, scene, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    options = "--resume", "--check", "--overlap", "32"
    assert run(land.path, scene, output, *options) == 1
    assert "another --overlap (16, now 32)" in capsys.readouterr().err
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: room)
    assert run(land.path, scene, output, "--overwrite", "--check") == 1
    assert "GB free" in capsys.readouterr().err


def test_a_check_gives_a_warning_once(land, tmp_path, capsys):
    scene = write_scene(tmp_path / "scene.tif", noise(64, 64), DESCRIPTIONS, crs=None)
    assert run(land.path, scene, tmp_path / "map.tif", "--check") == 0
    assert capsys.readouterr().err.count("has no CRS") == 1


def test_a_check_leaves_out_what_is_finished(land, scene, tmp_path, capsys):
    more = write_scene(tmp_path / "more.tif", noise(64, 64), DESCRIPTIONS)
    maps = tmp_path / "maps"
    maps.mkdir()
    assert run(land.path, scene, maps) == 0
    capsys.readouterr()
    assert run(land.path, [scene, more], maps, "--resume", "--check") == 0
    assert "scenes   1, 0.0 megapixels" in capsys.readouterr().out


def test_a_finished_scene_needs_no_room(land, scene, tmp_path, monkeypatch):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: room)
    assert run(land.path, scene, output, "--resume") == 0
    assert run(land.path, scene, output, "--overwrite") == 1


def test_what_a_kill_left_of_a_finished_map_is_removed(land, scene, tmp_path):
    output, partial = tmp_path / "map.tif", tmp_path / ".map.tif-partial"
    assert run(land.path, scene, output) == 0
    partial.mkdir()
    (partial / "classes.raw").write_bytes(bytes(100))
    assert run(land.path, scene, output, "--resume") == 0
    assert not partial.exists()


def test_a_run_touches_nothing_that_another_scene_leaves_aside(land, tmp_path):
    """Their names are long, and alike but for the end."""
    start = "S2A_MSIL2A_20230101T101031_N0509_R022_T3"
    scene = write_scene(tmp_path / f"{start}2TQM.tif", noise(64, 64), DESCRIPTIONS)
    maps = tmp_path / "maps"
    maps.mkdir()
    with atomic_write(maps / f"{start}3UUP_prediction_statistics.json") as part:
        part.write_text("half")
        assert run(land.path, scene, maps) == 0
        assert part.read_text() == "half"


def test_a_check_of_a_scene_of_nodata_alone_measures_nothing(land, tmp_path, capsys):
    empty = write_scene(tmp_path / "empty.tif", noise(70, 70) * 0, nodata=0)
    assert run(land.path, empty, tmp_path / "map.tif", "--check") == 0
    out = capsys.readouterr().out
    assert "windows" in out and "time" not in out
