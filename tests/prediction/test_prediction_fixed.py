"""Faults of version 1.1 in prediction, by the numbers they have in ``pytest -m fault``."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from helpers import (
    PIXEL,
    QUICK,
    interrupt,
    patch_everywhere,
    run_main,
    signal_during,
)
from prediction_helpers import (
    EVERYTHING,
    check_map,
    configure,
    corner_points,
    make_model,
    noise,
    outcome,
    run,
    write_scene,
)
from rasterio.rpc import RPC
from rasterio.transform import from_origin

import Patch_extraction
from common.distributed import ProcessGroup
from common.patches import list_pairs
from common.rasters import open_raster
from model_training import load_checkpoint
from prediction.ensemble import Models, batch_size_of, load_models
from prediction.jobs import count_pieces, open_rows, prepare_scene
from prediction.reader import SceneReader
from prediction.tasks import Task
from training.samples import common_tags

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


# --- polygons and quicklook ----------------------------------------------------------------


@fault(2)
@pytest.mark.parametrize("name", ["write_polygons", "draw_quicklook"])
def test_a_failed_product_leaves_the_map_and_resume_makes_it_alone(
    land, scene, tmp_path, monkeypatch, capsys, batches, name
):
    output = tmp_path / "out" / "map.tif"
    areas, picture = (output.with_name(n) for n in ("areas.gpkg", "map_quicklook.png"))
    options = ("--quicklook", "--polygons", str(areas))
    with monkeypatch.context() as patch:
        interrupt(patch, f"prediction.products.{name}", 1, disk_full())
        assert run(land.path, scene, output, *options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    missing, made = (areas, picture) if name == "write_polygons" else (picture, areas)
    assert f"map.tif is complete: --resume makes only {missing}" in error
    assert made.exists() and not missing.exists()
    assert not list(output.parent.glob(".*"))
    names = {"map.tif", "map.tif.aux.xml", "map.qml", "map_statistics.json", made.name}
    before = outcome(output.parent)
    assert before.keys() == names
    batches.clear()
    assert run(land.path, scene, output, *options, "--resume") == 0
    after = outcome(output.parent)
    assert after.keys() == names | {missing.name} and not batches
    for kept in names - {"map_statistics.json"}:
        assert after[kept] == before[kept]
    assert run(land.path, scene, output, *options, "--resume") == 0
    assert outcome(output.parent) == after


@fault(5)
def test_polygons_of_another_smallest_area_are_made_anew_and_alone(
    land, scene, tmp_path, batches
):
    output, areas = tmp_path / "map.tif", tmp_path / "areas.gpkg"
    assert run(land.path, scene, output, "--quicklook") == 0
    others = [output, tmp_path / "map_quicklook.png"]
    times = [path.stat().st_mtime_ns for path in others]
    batches.clear()
    options = ("--quicklook", "--resume", "--polygons", str(areas))
    counts = []
    for square_metres in ("0", "1000", "0"):
        more = (*options, "--min_area", square_metres)
        assert run(land.path, scene, output, *more) == 0
        counts.append(len(geopandas.read_file(areas)))
        written = areas.stat().st_mtime_ns
        assert run(land.path, scene, output, *more) == 0
        assert areas.stat().st_mtime_ns == written
    assert counts[0] == counts[2] > counts[1] and not batches
    assert [path.stat().st_mtime_ns for path in others] == times


@fault(2)
def test_resume_does_not_replace_polygons_of_which_no_run_is_known(
    land, scene, tmp_path, monkeypatch, capsys
):
    output, areas = tmp_path / "map.tif", tmp_path / "areas.gpkg"
    areas.write_bytes(b"mine")
    options = ("--polygons", str(areas))
    for _ in range(2):  # without a map, and with one
        assert run(land.path, scene, output, *options, "--resume") == 1
        assert "areas.gpkg is there already" in capsys.readouterr().err
        assert areas.read_bytes() == b"mine"
        assert run(land.path, scene, output, "--resume") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 2, disk_full())
        assert run(land.path, scene, output, *options, "--overwrite") == 1
    assert run(land.path, scene, output, *options, "--resume") == 0
    assert areas.read_bytes() != b"mine"


# --- disk ----------------------------------------------------------------------------------


@fault(4)
@pytest.mark.parametrize(("form", "parts"), [("gtiff", 2), ("cog", 3)])
@pytest.mark.parametrize("check", [(), ("--check",)])
def test_the_disk_must_hold_rows_maps_and_the_plain_copy_of_a_cog(
    land, scene, tmp_path, monkeypatch, capsys, form, parts, check
):
    needed = parts * 100 * 90 * 5  # a byte of the class, four of the confidence
    options = ("--format", form, "--save_confidence", *check)
    for free, status in ((needed - 1, 1), (needed, 0)):
        room = shutil.disk_usage(tmp_path)._replace(free=free)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda place, room=room: room)
            assert run(land.path, scene, tmp_path / "map.tif", *options) == status
        assert ("GB free, but the map takes" in capsys.readouterr().err) == bool(status)


# --- files ---------------------------------------------------------------------------------


def write_vrt(path: Path, source: str, height: int, width: int) -> Path:
    bands = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{band}"><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{source}</SourceFilename>'
        f"<SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band in (1, 2, 3)
    )
    path.write_text(
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><SRS>EPSG:32631</SRS>'
        f"<GeoTransform>431240, 10, 0, 4912560, 0, -10</GeoTransform>{bands}</VRTDataset>"
    )
    return path


@fault(6)
@pytest.mark.parametrize("nested", [False, True])
def test_resuming_after_a_source_of_a_vrt_has_changed_is_refused(
    land, tmp_path, monkeypatch, capsys, nested
):
    pixels = noise(150, 60)
    source = write_scene(tmp_path / "source.tif", pixels)
    vrt = write_vrt(tmp_path / "inner.vrt", "source.tif", 150, 60)
    if nested:
        vrt = write_vrt(tmp_path / "outer.vrt", "inner.vrt", 150, 60)
    output = tmp_path / "map.tif"
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 3, disk_full())
        assert run(land.path, vrt, output) == 1
    write_scene(source, pixels // 2)
    for _ in range(2):  # of an unfinished map, and of a finished one
        os.utime(source, (1, 1))
        assert run(land.path, vrt, output, "--resume") == 1
        assert "belongs to a run with another scene" in capsys.readouterr().err
        os.utime(source, (2, 2))
        assert run(land.path, vrt, output, "--overwrite") == 0
        assert run(land.path, vrt, output, "--resume") == 0


# --- reading -------------------------------------------------------------------------------


@fault(30)
@pytest.mark.parametrize("enough", [True, False])
def test_a_high_strip_is_decoded_once_or_tiles_are_advised(
    land, tmp_path, monkeypatch, capsys, enough
):
    height = 2 * 3000
    pixels = noise(height, 40)
    scene = write_scene(tmp_path / "scene.tif", pixels, blockysize=3000)
    if not enough:
        monkeypatch.setattr("prediction.reader.free_memory", lambda: 3000 * 40 * 23)
    parts, plain = [], SceneReader.read

    def recorded(reader, part, **options):
        parts.append(part)
        return plain(reader, part, **options)

    monkeypatch.setattr(SceneReader, "read", recorded)
    assert run(land.path, scene, tmp_path / "map.tif", "--precision", "fp32") == 0
    strips = [part.top // 3000 for part in parts]
    warned = "gdal_translate -co TILED=YES" in capsys.readouterr().err
    if enough:
        assert sorted(strips) == [0, 1] and not warned
    else:
        assert len(strips) > 4 and warned
    check_map(land, tmp_path / "map.tif", pixels, np.ones((height, 40), bool))


@fault(30)
def test_high_strips_are_not_read_again_for_pieces_of_columns(
    land, tmp_path, monkeypatch
):
    monkeypatch.setattr("prediction.jobs.OPEN_ROWS", 1e6)
    config = configure(model=[str(land.path)], patch_size=512)
    models = load_models(config)
    pieces = []
    for height in (1000, 3000):
        path = tmp_path / f"{height}.tif"
        write_scene(path, noise(3100, 40), blockysize=height)
        with open_raster(path) as scene:
            task = Task(str(path), tmp_path / "map.tif")
            pieces.append(count_pieces(prepare_scene(task, config, models, [scene])))
    assert pieces[0] > 1 and pieces[1] == 1


# --- resolution ----------------------------------------------------------------------------


@fault(50)
@pytest.mark.parametrize(
    ("side", "warned"), [(10, False), (12, False), (8.2, False), (13, True), (5, True)]
)
@pytest.mark.parametrize("check", [(), ("--check",)])
def test_another_ground_resolution_than_that_of_the_training_is_reported(
    tmp_path, capsys, side, warned, check
):
    options = np.eye(3), [0, 0, 0], [0] * 3, [10_000] * 3
    model = make_model(tmp_path / "model.pth", *options, pixel_size=10.0)
    place = {"transform": from_origin(431_240, 4_912_560, side, side)}
    scene = write_scene(tmp_path / "scene.tif", noise(64, 64), **place)
    assert run(model.path, scene, tmp_path / "map.tif", *check) == 0
    error = capsys.readouterr().err
    words = f"measure {side:.3g} m, but {model.path} was trained on 10 m"
    assert (words in error) == ("warning" in error) == warned


# --- shifted values ------------------------------------------------------------------------

QUARTILES = [[1000.0, 1400.0, 1900.0]] * 3


@fault(41)
@pytest.mark.parametrize(("shift", "warned"), [(0, False), (500, False), (1000, True)])
@pytest.mark.parametrize("check", [(), ("--check",)])
def test_a_median_that_moved_by_more_than_the_quartiles_is_reported(
    tmp_path, capsys, shift, warned, check
):
    # clouds in the training reach far beyond the values of land
    options = np.eye(3), [0, 0, 0], [0] * 3, [9_000] * 3
    model = make_model(tmp_path / "model.pth", *options, band_quartiles=QUARTILES)
    pixels = 400 + noise(64, 64) // 5 + np.array([0, shift, 0])[:, None, None]
    scene = write_scene(tmp_path / "scene.tif", pixels.astype(np.uint16))
    assert run(model.path, scene, tmp_path / "map.tif", *check) == 0
    error = capsys.readouterr().err
    assert ("has other values than" in error) == ("warning" in error) == warned
    assert ("in band 2 (median 2" in error and "in training 1400)" in error) == warned


@fault(60)
def test_what_is_strange_of_a_band_is_said_in_numbers_that_show_it(tmp_path, capsys):
    options = np.eye(3), [0, 0, 0], [0] * 3, [200] * 3
    model = make_model(tmp_path / "model.pth", *options)
    pixels = np.full((3, 64, 64), 100, np.uint16)
    pixels[0, :, ::2], pixels[1, :, ::2], pixels[2, :, ::3] = 20, 180, 900
    pixels[1] = 100
    scene = write_scene(tmp_path / "scene.tif", pixels)
    assert run(model.path, scene, tmp_path / "map.tif") == 0
    error = capsys.readouterr().err
    assert "3 (34% of the pixels outside, trained on 0 to 200)" in error
    assert "2 (nearly constant, 100, trained on 0 to 200)" in error
    assert " 1 (" not in error


@fault(41)
@pytest.mark.parametrize(
    ("tags", "stored", "said"),
    [
        ((1e-4, -0.1), (1e-4, 0.0), "the offset -0.1, but"),
        ((1e-4, 0.0), (1e-3, 0.0), "the scale 0.0001, but"),
        ((1e-4, -0.1), (1e-4, -0.1), None),
        (None, (1e-4, -0.1), None),
        ((1e-4, -0.1), None, None),
    ],
)
def test_other_scales_and_offsets_than_those_of_the_training_are_reported(
    tmp_path, capsys, tags, stored, said
):
    scales, offsets = ([value] * 3 for value in stored) if stored else (None, None)
    model = make_model(
        tmp_path / "model.pth", np.eye(3), [0, 0, 0], [0] * 3, [10_000] * 3,
        band_scales=scales, band_offsets=offsets,
    )  # fmt: skip
    scene = write_scene(tmp_path / "scene.tif", noise(64, 64))
    if tags:
        with rasterio.open(scene, "r+") as file:
            file.scales, file.offsets = ([value] * 3 for value in tags)
    assert run(model.path, scene, tmp_path / "map.tif", "--check") == 0
    error = capsys.readouterr().err
    assert ("warning" in error) == bool(said)
    assert not said or said in error


def cut_scene(folder: Path, tags: tuple[float, float] | None) -> Path:
    """A dataset of patches of a scene with tags of scale and offset."""
    rng = np.random.default_rng(0)
    scene = write_scene(folder / "scene.tif", noise(128, 128))
    if tags:
        with rasterio.open(scene, "r+") as file:
            file.scales, file.offsets = ([value] * 3 for value in tags)
    classes = rng.integers(0, 2, (1, 128, 128)).astype(np.uint8)
    label = write_scene(folder / "label.tif", classes)
    words = ["extract", "--image", scene, "--label", label, "--patch_size", 32]
    words += ["--output", folder / "data"]
    assert Patch_extraction.main(list(map(str, words))) == 0
    return folder / "data"


@fault(41)
@pytest.mark.parametrize("tags", [None, (1e-4, -0.1), (0.5, 0.0)])
def test_tags_travel_from_the_scene_to_the_training(tmp_path, tags):
    found = common_tags(list_pairs(cut_scene(tmp_path, tags), "train"))
    assert found["scaling"] == (tags and tuple([value] * 3 for value in tags))


@fault(41)
@fault(50)
def test_quartiles_tags_and_pixel_size_travel_from_the_scene_to_the_checkpoint(
    tmp_path,
):
    data = cut_scene(tmp_path, (1e-4, -0.1))
    status, _, err = run_main("--dataset_root", data, "--save_dir", tmp_path, *QUICK)
    assert status == 0, err
    metadata = load_checkpoint(tmp_path / "model_final_model.pth").metadata
    quartiles = np.array(metadata["band_quartiles"])
    assert quartiles.shape == (3, 3)
    assert np.abs(quartiles - [2500, 5000, 7500]).max() < 300
    assert metadata["band_scales"] == [1e-4] * 3
    assert metadata["band_offsets"] == [-0.1] * 3
    assert metadata["pixel_size"] == pytest.approx(PIXEL, rel=1e-3)


# --- sensor geometry -----------------------------------------------------------------------


def rational_model() -> RPC:
    line, constant = [0.0, 0, 1, *[0.0] * 17], [1.0, *[0.0] * 19]
    sample = [0.0, 1, 0, *[0.0] * 17]
    return RPC(
        0, 500, 44, 0.1, constant, line, 32, 32, 3, 0.1, constant, sample, 32, 32
    )


def sensor_scene(folder: Path, how: str) -> Path:
    place = {"transform": None, "crs": None}
    if how == "RPCs":
        place["rpcs"] = rational_model()
    if how == "ground control points":
        place |= {"crs": "EPSG:4326", "gcps": corner_points(64, 64)}
    return write_scene(folder / "scene.tif", noise(64, 64), **place)


@fault(44)
@pytest.mark.parametrize("form", ["gtiff", "cog"])
def test_a_map_keeps_the_rpcs_of_its_scene(land, tmp_path, capsys, form):
    scene = sensor_scene(tmp_path, "RPCs")
    words = "--save_confidence", "--format", form
    assert run(land.path, scene, tmp_path / "map.tif", *words) == 0
    assert "no CRS" not in capsys.readouterr().err
    with rasterio.open(scene) as file:
        expected = file.rpcs
    for name in ("map.tif", "map_confidence.tif"):
        with rasterio.open(tmp_path / name) as file:
            assert file.rpcs == expected and file.crs is None


@fault(44)
@pytest.mark.parametrize(
    ("how", "advice"),
    [
        ("RPCs", "gdalwarp -rpc"),
        ("ground control points", "gdalwarp -tps"),
        ("nothing", "gdal_edit.py -a_srs"),
    ],
)
@pytest.mark.parametrize("check", [(), ("--check",)])
def test_polygons_need_a_crs(land, tmp_path, capsys, how, advice, check):
    scene = sensor_scene(tmp_path, how)
    words = "--polygons", str(tmp_path / "areas.gpkg"), *check
    assert run(land.path, scene, tmp_path / "map.tif", *words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(scene) in error and advice in error
    assert sorted(os.listdir(tmp_path)) == ["scene.tif"]


@fault(44)
@pytest.mark.parametrize("how", ["RPCs", "ground control points"])
def test_extraction_does_not_put_sensor_geometry_on_the_ground(tmp_path, capsys, how):
    scene = sensor_scene(tmp_path, how)
    words = ["extract", "--image", scene, "--label", scene, "--patch_size", 32]
    words += ["--output", tmp_path / "data"]
    assert Patch_extraction.main(list(map(str, words))) == 1
    error = capsys.readouterr().err
    assert f"is located by {how} only" in error and "gdalwarp -" in error
    assert "a_srs" not in error


@fault(54)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_prediction_stops_between_rows(
    spatial, tall_scene, tmp_path, monkeypatch, capsys, number
):
    output = tmp_path / "map.tif"
    with monkeypatch.context() as patch:
        ended = signal_during(patch, "prediction.layers.compute_layers", 2, number)
        assert run(spatial, tall_scene, output) == 128 + number
    assert 2 <= len(ended) <= 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted")
    assert not output.exists() and (tmp_path / ".map.tif-partial").is_dir()
    assert run(spatial, tall_scene, output, "--resume") == 0


@fault(17)
def test_each_process_tells_of_its_own_scenes(land, tmp_path, monkeypatch, capsys):
    group = contextlib.nullcontext(ProcessGroup(1, 2))
    patch_everywhere(
        monkeypatch, "common.distributed.init_distributed", lambda *_: group
    )
    monkeypatch.setenv("RANK", "1")
    for name in "ab":
        pixels = noise(70, 70) // 5000
        write_scene(tmp_path / "in" / f"{name}.tif", pixels, crs=None)
    assert run(land.path, tmp_path / "in", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert "b.tif has other values than" in error and "b.tif has no CRS" in error
    assert "a.tif" not in error


@fault(26)
@pytest.mark.parametrize(
    ("classes", "free", "windows"),
    [(6, 80e9, 32), (100, 80e9, 31), (100, 8e9, 3), (500, 8e9, 1), (5000, 1e9, 1)],
)
def test_the_automatic_batch_holds_fewer_windows_of_many_classes(
    monkeypatch, classes, free, windows
):
    monkeypatch.setattr("prediction.ensemble.free_memory", lambda device: int(free))
    checkpoint = SimpleNamespace(config=SimpleNamespace(num_classes=classes))
    config = configure(patch_size=512)
    for kind, expected in (("cuda", windows), ("cpu", 1)):
        models = Models(["m.pth"], [checkpoint], torch.device(kind), None)
        assert batch_size_of(config, models) == expected
        assert batch_size_of(replace(config, batch_size="9"), models) == 9


@fault(26)
@pytest.mark.parametrize(
    "more", [{"save_probabilities": True}, {"save_uncertainty": True}]
)
def test_further_layers_are_in_the_estimate_of_the_memory(land, tmp_path, more):
    scene = write_scene(tmp_path / "scene.tif", noise(200, 300))
    rows = []
    for options in ({}, more):
        config = configure(patch_size=64, model=[str(land.path)], **options)
        models = load_models(config)
        task = Task(str(scene), tmp_path / "map.tif", None)
        with open_raster(scene) as file:
            rows.append(open_rows(prepare_scene(task, config, models, [file])))
    assert rows[1] > rows[0]


@fault(43)
def test_bands_that_make_all_of_a_scene_invalid_are_named(land, tmp_path, capsys):
    pixels = noise(70, 50).astype(np.float32)
    pixels[1] = -9999
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=-9999)
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    error = capsys.readouterr().err
    assert "no pixel of band 2 is valid (--bands 1,3 leaves it out)" in error
