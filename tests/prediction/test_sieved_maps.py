"""``--sieve``: maps without areas below a smallest one, and what is made from them."""

from __future__ import annotations

import json

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from helpers import interrupt
from pandas.testing import assert_frame_equal
from prediction_helpers import (
    DESCRIPTIONS,
    make_pixel_model,
    noise,
    outcome,
    read_json,
    read_map,
    run,
    write_scene,
)
from rasterio.transform import from_origin
from scipy import ndimage

SIEVE = ("--sieve", "900")  # nine pixels


@pytest.fixture
def speckled(tmp_path):
    """300 x 60 pixels of noise, half of which is nodata; parts of it are islands."""
    pixels = noise(300, 60)
    pixels[:, np.random.default_rng(1).random((300, 60)) < 0.5] = 0
    return write_scene(tmp_path / "speckled.tif", pixels, DESCRIPTIONS, nodata=0)


def small_areas(classes: np.ndarray, fewest: int, nodata: int) -> list[bool]:
    """Whether areas of fewer pixels have a neighbour."""
    found = []
    for value in np.unique(classes[classes != nodata]):
        labels, _ = ndimage.label(classes == value)
        sizes = np.bincount(labels.ravel())
        for number in 1 + np.flatnonzero(sizes[1:] < fewest):
            here = labels == number
            beside = ndimage.binary_dilation(here) & ~here
            found.append(bool((classes[beside] != nodata).any()))
    return found


def test_a_map_has_no_area_below_the_limit_that_has_a_neighbour(
    land, speckled, tmp_path
):
    plain, output = tmp_path / "plain.tif", tmp_path / "map.tif"
    assert run(land.path, speckled, plain) == 0
    assert run(land.path, speckled, output, *SIEVE) == 0
    before, after = read_map(plain), read_map(output)
    assert any(small_areas(before, 9, 255))
    left = small_areas(after, 9, 255)
    assert left and not any(left)
    np.testing.assert_array_equal(before == 255, after == 255)
    with rasterio.open(plain) as one, rasterio.open(output) as other:
        assert one.profile == other.profile and one.tags() == other.tags()
        assert one.colormap(1) == other.colormap(1)


def test_polygons_are_those_of_the_sieved_map_and_of_the_same_smallest_area(
    land, speckled, tmp_path
):
    tables = []
    for number, options in enumerate((SIEVE, ("--min_area", "900"))):
        areas = tmp_path / f"{number}.gpkg"
        more = (*options, "--polygons", str(areas))
        assert run(land.path, speckled, tmp_path / f"{number}.tif", *more) == 0
        tables.append(geopandas.read_file(areas, layer=areas.stem))
    sieved, merged = tables
    assert sieved.geometry.geom_equals_exact(merged.geometry, 0).all()
    assert_frame_equal(*(table.drop(columns="geometry") for table in tables))
    sizes = np.bincount(read_map(tmp_path / "0.tif").ravel(), minlength=256)[:4]
    areas = sieved.groupby("class").area_ha.sum()
    assert areas.to_numpy() * 100 == pytest.approx(sizes, rel=2e-3)


def test_polygons_of_another_simplification_are_made_anew_and_alone(
    land, speckled, tmp_path, batches
):
    output, areas = tmp_path / "map.tif", tmp_path / "areas.gpkg"
    options = (*SIEVE, "--polygons", str(areas))
    assert run(land.path, speckled, output, *options) == 0
    written, vertices = [output.stat().st_mtime_ns], []
    batches.clear()
    for more in ((), ("--simplify", "8"), ("--simplify", "40"), ()):
        more = (*options, "--resume", *more)
        assert run(land.path, speckled, output, *more) == 0
        table = geopandas.read_file(areas, layer=areas.stem)
        vertices.append(int(shapely.get_num_coordinates(table.geometry).sum()))
        made = areas.stat().st_mtime_ns
        assert run(land.path, speckled, output, *more) == 0
        assert areas.stat().st_mtime_ns == made
    assert vertices[0] == vertices[3] and vertices[2] < vertices[1]
    assert not batches and [output.stat().st_mtime_ns] == written


def test_statistics_count_the_sieved_map_and_confidences_the_classes_of_the_model(
    land, speckled, tmp_path
):
    more = ("--save_confidence",)
    reports, maps, confidences = [], [], []
    for name, options in (("plain", more), ("map", (*more, *SIEVE))):
        assert run(land.path, speckled, tmp_path / f"{name}.tif", *options) == 0
        reports.append(read_json(tmp_path / f"{name}_statistics.json"))
        maps.append(read_map(tmp_path / f"{name}.tif"))
        confidences.append(read_map(tmp_path / f"{name}_confidence.tif"))
    np.testing.assert_array_equal(*confidences)
    plain, sieved = reports
    counts = np.bincount(maps[1].ravel(), minlength=256)[:4]
    assert [entry["pixels"] for entry in sieved["classes"]] == counts.tolist()
    assert [entry["share"] for entry in sieved["classes"]] == pytest.approx(
        counts / counts.sum()
    )
    areas = [entry["area_ha"] * 100 for entry in sieved["classes"]]
    assert areas == pytest.approx(counts, rel=2e-3)
    assert plain["classes"] != sieved["classes"]
    assert plain["confidence"] == sieved["confidence"]
    for number in range(4):
        means = [report["classes"][number]["mean_confidence"] for report in reports]
        assert means[0] == means[1]
        here = confidences[0][maps[0] == number]
        assert means[0] == pytest.approx(here.mean(), abs=1e-5)


def test_a_cog_is_sieved_too(land, speckled, tmp_path):
    plain, cog = tmp_path / "plain.tif", tmp_path / "cog.tif"
    assert run(land.path, speckled, plain, *SIEVE) == 0
    assert run(land.path, speckled, cog, *SIEVE, "--format", "cog") == 0
    np.testing.assert_array_equal(read_map(plain), read_map(cog))
    with rasterio.open(cog) as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


@pytest.mark.parametrize(
    "form, name, call",
    [
        ("gtiff", "prediction.layers.compute_layers", 3),
        ("gtiff", "common.sieve.label_strip", 2),
        ("cog", "common.sieve.sieve", 1),
        ("cog", "prediction.mapfiles.MapWriter._count", 2),
    ],
)
def test_a_run_that_was_interrupted_in_the_sieve_ends_with_the_same_map(
    land, speckled, tmp_path, monkeypatch, name, call, form
):
    options = (*SIEVE, "--save_confidence", "--format", form)
    folders = tmp_path / "whole", tmp_path / "resumed"
    assert run(land.path, speckled, folders[0] / "map.tif", *options) == 0
    output = folders[1] / "map.tif"
    with monkeypatch.context() as patch:
        interrupt(patch, name, call)
        assert run(land.path, speckled, output, *options) == 130
    assert [path.name for path in folders[1].iterdir()] == [".map.tif-partial"]
    assert run(land.path, speckled, output, *options, "--resume") == 0
    one, other = map(outcome, folders)
    reports = [json.loads(files.pop("map_statistics.json")) for files in (one, other)]
    assert one == other
    for key in ("classes", "confidence", "pixels", "nodata_pixels"):
        assert reports[0][key] == reports[1][key]


def test_maps_of_many_classes_are_sieved(models, tmp_path):
    rng = np.random.default_rng(6)
    weights = rng.normal(0, 9, (300, 3))
    model = make_pixel_model(models / "many.pth", weights, -weights.sum(axis=1) / 2)
    pixels = noise(50, 40)
    pixels[:, :10] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    assert run(model.path, scene, tmp_path / "map.tif", *SIEVE) == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        assert (file.dtypes, file.nodata) == (("uint16",), 65535)
        classes = file.read(1)
    assert (classes[:10] == 65535).all() and (classes[10:] < 300).all()
    assert classes[10:].max() > 255 and not small_areas(classes, 9, 65535)


def test_a_part_of_a_scene_and_several_dates_are_sieved(land, tmp_path):
    scenes = [
        write_scene(tmp_path / f"{seed}.tif", noise(90, 80, seed=seed), DESCRIPTIONS)
        for seed in range(2)
    ]
    with rasterio.open(scenes[0]) as file:
        left, bottom, right, top = file.bounds
    area = geopandas.GeoSeries.from_wkt(
        [f"POLYGON (({left} {top}, {right} {top}, {right} {bottom + 200}, {left} {top}))"],
        crs=file.crs,
    )  # fmt: skip
    area.to_file(tmp_path / "area.gpkg")
    more = ("--combine", "mean", "--area", str(tmp_path / "area.gpkg"))
    for options in (more[:2], more):
        output = tmp_path / f"{len(options)}.tif"
        assert run(land.path, scenes, output, *options) == 0
        before = read_map(output)
        assert run(land.path, scenes, output, *options, *SIEVE, "--overwrite") == 0
        after = read_map(output)
        np.testing.assert_array_equal(before == 255, after == 255)
        assert any(small_areas(before, 9, 255))
        assert not any(small_areas(after, 9, 255))


def test_pixels_of_other_sizes_than_the_one_at_the_centre_are_told(
    land, tmp_path, capsys
):
    tall = {"crs": "EPSG:4326", "transform": from_origin(3, 61, 0.1, 0.5)}
    scene = write_scene(tmp_path / "tall.tif", noise(70, 40), DESCRIPTIONS, **tall)
    flat = write_scene(tmp_path / "flat.tif", noise(70, 40), DESCRIPTIONS)
    for file, options, told in (
        (scene, SIEVE, "--sieve"),
        (scene, (), None),
        (flat, SIEVE, None),
        (scene, ("--polygons", str(tmp_path / "a.gpkg"), "--min_area", "9"), "--min_area"),
    ):  # fmt: skip
        assert run(land.path, file, tmp_path / "map.tif", *options, "--overwrite") == 0
        error = capsys.readouterr().err
        assert ("of the area of the one at the centre" in error) == bool(told)
        if told:
            assert f"by which {told} counts" in error and "67 to 123 %" in error


def test_a_sieve_of_a_scene_without_a_crs_is_refused_at_once(
    land, tmp_path, capsys, batches
):
    scene = write_scene(tmp_path / "scene.tif", noise(64, 64), DESCRIPTIONS, crs=None)
    for more in ((), ("--check",)):
        assert run(land.path, scene, tmp_path / "map.tif", *SIEVE, *more) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "scene.tif has no CRS" in error
        assert "so --sieve cannot be applied; assign one" in error
    assert not (tmp_path / "map.tif").exists() and not batches


@pytest.mark.parametrize("name", ["sieve", "min_area"])
def test_a_limit_of_no_more_than_a_pixel_is_told(land, scene, tmp_path, capsys, name):
    more = ("--polygons", str(tmp_path / "areas.gpkg"), "--check")
    for metres, told in (("99", True), ("101", False)):
        limit = (f"--{name}", metres)
        assert run(land.path, scene, tmp_path / "map.tif", *limit, *more) == 0
        error = capsys.readouterr().err
        assert (f"--{name} {metres} changes nothing: a pixel of" in error) == told
