"""``--area``: only what the polygons cover is mapped, as it is in the map of the whole scene."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
from prediction_helpers import (
    CRS,
    TRANSFORM,
    noise,
    read_json,
    read_map,
    run,
    write_scene,
)
from rasterio.features import geometry_mask
from shapely.geometry import LineString, Polygon, box

from prediction.predictor import Predictor


def ground(left: float, top: float, right: float, bottom: float):
    """A box of pixels in the coordinates of the test scenes."""
    (x, y), (u, v) = TRANSFORM * (left, top), TRANSFORM * (right, bottom)
    return box(x, v, u, y)


def write_area(path: Path, *shapes, crs=CRS, to=None) -> Path:
    table = geopandas.GeoDataFrame(geometry=list(shapes), crs=crs)
    (table.to_crs(to) if to else table).to_file(path)
    return path


TRIANGLE = Polygon([TRANSFORM * place for place in ((70, 40), (160, 70), (90, 130))])


@pytest.mark.parametrize("options", [(), ("--format", "cog"), ("--max_memory", "1e-4")])
@pytest.mark.parametrize("crs", [None, "EPSG:4326"])
def test_the_map_of_an_area_is_that_of_the_scene_cut_out(
    spatial, tmp_path, crs, options
):
    scene = write_scene(tmp_path / "scene.tif", noise(200, 230), nodata=0)
    area = write_area(
        tmp_path / "area.gpkg", TRIANGLE, ground(120, 20, 128, 24), to=crs
    )
    more = ("--save_confidence", "--save_uncertainty", *options)
    assert run(spatial, scene, tmp_path / "whole.tif", *more) == 0
    assert run(spatial, scene, tmp_path / "part.tif", "--area", str(area), *more) == 0
    inside = ~geometry_mask([TRIANGLE, ground(120, 20, 128, 24)], (200, 230), TRANSFORM)
    rows, columns = slice(20, 130), slice(70, 160)
    for ending, nodata in (
        (".tif", 255),
        ("_confidence.tif", -1),
        ("_uncertainty.tif", -1),
    ):
        with rasterio.open(tmp_path / f"part{ending}") as file:
            found, transform = file.read(1), file.transform
        whole = read_map(tmp_path / f"whole{ending}")
        expected = np.where(inside, whole, nodata)[rows, columns]
        np.testing.assert_array_equal(found, expected)
        assert transform == TRANSFORM * TRANSFORM.translation(70, 20)
    report = read_json(tmp_path / "part_statistics.json")
    assert report["pixels"] == report["mapped_pixels"] == inside.sum()
    assert report["nodata_pixels"] == 0 and report["area"] == str(area)
    total = sum(entry["area_ha"] for entry in report["classes"])
    assert total == pytest.approx(inside.sum() / 100, rel=0.01)


def test_windows_that_hold_nothing_of_the_area_are_not_predicted(
    spatial, tmp_path, monkeypatch
):
    predicted, plain = [], Predictor.__call__

    def counted(self, images, valid):
        predicted.append(len(images))
        return plain(self, images, valid)

    monkeypatch.setattr(Predictor, "__call__", counted)
    scene = write_scene(tmp_path / "scene.tif", noise(500, 500))
    corners = ground(2, 2, 20, 20), ground(470, 470, 490, 490)
    area = write_area(tmp_path / "area.gpkg", *corners)
    assert run(spatial, scene, tmp_path / "map.tif", "--area", str(area)) == 0
    assert sum(predicted) == 1 + 4  # the last two of each row and column overlap
    mapped = read_map(tmp_path / "map.tif") != 255
    assert mapped.shape == (488, 488) and mapped.sum() == 18 * 18 + 20 * 20


def test_a_scene_that_misses_the_area_is_skipped_and_none_at_all_is_an_error(
    land, tmp_path, capsys
):
    near = write_scene(tmp_path / "near.tif", noise(64, 64))
    far = write_scene(
        tmp_path / "far.tif", noise(64, 64), transform=TRANSFORM.translation(1e5, 0)
    )
    area = write_area(tmp_path / "area.gpkg", ground(10, 10, 30, 30))
    output = tmp_path / "maps"
    assert run(land.path, [near, far], output, "--area", str(area)) == 0
    assert f"{far} lies outside of {area}: skipped" in capsys.readouterr().err
    assert [path.name for path in output.glob("*.tif")] == ["near_prediction.tif"]
    assert run(land.path, far, tmp_path / "far_map.tif", "--area", str(area)) == 1
    assert f"--area: {area} does not touch {far}" in capsys.readouterr().err
    both = [
        far,
        write_scene(
            tmp_path / "farther.tif",
            noise(9, 9),
            transform=TRANSFORM.translation(1e5, 0),
        ),
    ]
    assert run(land.path, both, tmp_path / "none", "--area", str(area)) == 1
    assert "does not touch any of the scenes" in capsys.readouterr().err


def test_an_area_needs_polygons_and_a_place(land, tmp_path, capsys):
    scene = write_scene(tmp_path / "scene.tif", noise(64, 64))
    line = write_area(
        tmp_path / "line.gpkg", LineString([TRANSFORM * (1, 1), TRANSFORM * (9, 9)])
    )
    assert run(land.path, scene, tmp_path / "a.tif", "--area", str(line)) == 1
    assert f"--area: {line} has no polygons" in capsys.readouterr().err
    placeless = write_scene(tmp_path / "placeless.tif", noise(64, 64), crs=None)
    area = write_area(tmp_path / "area.gpkg", ground(10, 10, 30, 30))
    assert run(land.path, placeless, tmp_path / "a.tif", "--area", str(area)) == 1
    assert "placeless.tif has no CRS" in capsys.readouterr().err


def test_an_area_between_the_centres_of_pixels_is_not_said_to_lie_elsewhere(
    land, tmp_path, capsys
):
    scene = write_scene(tmp_path / "scene.tif", noise(64, 64))
    small = write_area(tmp_path / "small.gpkg", ground(9.6, 9.6, 10.4, 10.4))
    assert run(land.path, scene, tmp_path / "a.tif", "--area", str(small)) == 1
    expected = f"--area: no pixel of {scene} has its centre in {small}; draw larger"
    assert expected in capsys.readouterr().err


def test_an_unfinished_map_of_an_area_resumes_only_with_that_area(
    spatial, tmp_path, monkeypatch, capsys
):
    scene = write_scene(tmp_path / "scene.tif", noise(300, 200))
    area = write_area(tmp_path / "area.gpkg", ground(30, 50, 150, 290))
    options = ("--area", str(area))
    assert run(spatial, scene, tmp_path / "expected.tif", *options) == 0
    plain, calls = Predictor.__call__, []
    whole = 24  # windows of 64 with a stride of 48, 6 x 4

    def breaking(self, *arguments):
        calls.append(1)
        if len(calls) == 12:
            raise OSError("the disk is gone")
        return plain(self, *arguments)

    monkeypatch.setattr(Predictor, "__call__", breaking)
    assert run(spatial, scene, tmp_path / "map.tif", *options) == 1
    assert run(spatial, scene, tmp_path / "map.tif", "--resume") == 1
    assert "--area" in capsys.readouterr().err
    before = len(calls)
    assert run(spatial, scene, tmp_path / "map.tif", *options, "--resume") == 0
    assert len(calls) - before < whole
    for ending in (".tif", "_statistics.json"):
        one, other = (tmp_path / f"{stem}{ending}" for stem in ("map", "expected"))
        if ending == ".tif":
            np.testing.assert_array_equal(read_map(one), read_map(other))
        else:
            one, other = (read_json(path)["classes"] for path in (one, other))
            assert json.dumps(one) == json.dumps(other)


def test_check_estimates_the_area_alone(spatial, tmp_path, capsys):
    scene = write_scene(tmp_path / "scene.tif", noise(500, 500))
    area = write_area(tmp_path / "area.gpkg", ground(2, 2, 20, 20))
    options = ("--area", str(area), "--check")
    assert run(spatial, scene, tmp_path / "map.tif", *options) == 0
    assert "1 of 64 x 64" in capsys.readouterr().out


def test_the_check_of_an_area_in_a_folder_without_scenes_is_one_line(
    land, tmp_path, capsys
):
    area = write_area(tmp_path / "area.gpkg", TRIANGLE)
    (tmp_path / "empty").mkdir()
    options = "--area", str(area), "--check"
    assert run(land.path, tmp_path / "empty", tmp_path / "maps", *options) == 1
    assert "No scenes in" in capsys.readouterr().err
