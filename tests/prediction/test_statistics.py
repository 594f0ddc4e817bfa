"""What a map adds up to, by counting parts and in the report of a run."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from prediction_helpers import mapped_area, noise, read_json, read_map, run, write_scene
from rasterio.transform import from_origin

from prediction.statistics import Statistics, confidence_counts, report_text

# --- statistics -------------------------------------------------------------------------


def random_map(rows=90, columns=41, classes=4):
    """Classes with some nodata, and confidences with -1 there."""
    rng = np.random.default_rng(5)
    found = rng.integers(0, classes, (rows, columns)).astype(np.uint8)
    confidence = rng.random((rows, columns)).astype(np.float32)
    empty = rng.random((rows, columns)) < 0.2
    found[empty], confidence[empty] = 255, -1
    return found, confidence


def count_map(statistics: Statistics, classes, confidence) -> None:
    """Count the next rows of a map with nodata."""
    valid = classes < len(statistics.names)
    arrays = np.where(valid, classes, 0), np.where(valid, confidence, np.nan)
    tensors = (torch.from_numpy(array) for array in arrays)
    statistics.counts += confidence_counts(*tensors, valid, len(statistics.names))
    statistics.add(classes)


@pytest.mark.parametrize("step", [1, 7, 90])
def test_statistics_agree_with_numpy_however_the_rows_come(step):
    classes, confidence = random_map()
    areas = np.linspace(80, 120, 90)
    statistics = Statistics(["a", "b", "c", "d", "never"], areas, classes.size)
    for top in range(0, 90, step):
        rows = slice(top, top + step)
        count_map(statistics, classes[rows], confidence[rows])
    report = statistics.report()
    known = classes != 255
    assert report["pixels"] == classes.size
    assert report["mapped_pixels"] == known.sum()
    assert report["nodata_pixels"] == (~known).sum()
    counts = np.bincount(classes[known], minlength=5)
    assert [entry["pixels"] for entry in report["classes"]] == counts.tolist()
    for number, entry in enumerate(report["classes"][:4]):
        here = classes == number
        assert entry["class"] == number
        assert entry["share"] == pytest.approx(here.sum() / known.sum())
        assert entry["area_ha"] == pytest.approx((here.sum(axis=1) * areas).sum() / 1e4)
        assert entry["mean_confidence"] == pytest.approx(
            confidence[here].mean(), rel=1e-5
        )
    assert report["classes"][4]["share"] == 0
    assert report["classes"][4]["mean_confidence"] is None
    summary, values = report["confidence"], confidence[known]
    assert summary["mean"] == pytest.approx(values.mean(), rel=1e-5)
    for key, percent in (("p10", 10), ("median", 50), ("p90", 90)):
        assert summary[key] == pytest.approx(np.percentile(values, percent), abs=2e-3)
    assert summary["share_below_0.5"] == pytest.approx((values < 0.5).mean())


def test_the_parts_of_a_map_add_up_to_the_same_in_any_order():
    classes, confidence = random_map()
    arrays = np.where(classes == 255, 0, classes), confidence

    def counted(rows: slice, columns: slice = slice(None)) -> np.ndarray:
        both = (torch.from_numpy(array[rows, columns].copy()) for array in arrays)
        return confidence_counts(*both, classes[rows, columns] != 255, 4)

    whole = counted(slice(None))
    assert whole.dtype == np.int64 and whole.shape == (1000 + 4,)
    assert whole[:1000].sum() == (classes != 255).sum()
    cuts = slice(0, 40), slice(40, 41), slice(41, 90)
    for order in itertools.permutations(cuts):
        np.testing.assert_array_equal(sum(map(counted, order)), whole)
    columns = slice(0, 13), slice(13, 41)
    halves = [counted(slice(None), some) for some in columns]
    np.testing.assert_array_equal(sum(halves), whole)


def test_confidences_of_a_half_and_of_one_are_not_below_a_half():
    statistics = Statistics(["a", "b"], None, 4)
    values = np.array([[0.5, 1.0, 0.5, 0.4999]], np.float32)
    count_map(statistics, np.array([[0, 1, 1, 0]], np.uint8), values)
    assert statistics.report()["confidence"]["share_below_0.5"] == 0.25


def test_statistics_of_nothing_are_null_and_still_json():
    statistics = Statistics(["a", "b"], None, 12)
    count_map(statistics, np.full((3, 4), 255, np.uint8), np.ones((3, 4), np.float32))
    report = json.loads(json.dumps(statistics.report(), allow_nan=False))
    assert (report["pixels"], report["nodata_pixels"]) == (12, 12)
    assert report["confidence"] is None
    assert {entry["share"] for entry in report["classes"]} == {None}
    assert {entry["area_ha"] for entry in report["classes"]} == {None}
    text = report_text(report | {"output": "map.tif"})
    assert "nodata 12 pixels (100.00%)" in text and "confidence:" not in text


def test_the_report_says_pixels_shares_areas_and_confidence():
    names, areas = ["water", "a class with a long name"], np.full(10, 1e4)
    statistics = Statistics(names, areas, 2000)
    classes = np.zeros((10, 200), np.uint8)
    classes[:, 150:] = 1
    classes[0] = 255
    confidence = np.where(classes == 1, 0.4, 0.9).astype(np.float32)
    count_map(statistics, classes, confidence)
    text = report_text(statistics.report() | {"output": "out/map.tif"})
    first, head, water, other, nodata, summary = text.splitlines()
    assert first == "out/map.tif"
    assert head.split() == [
        "class", "name", "pixels", "share", "area", "(ha)", "confidence",
    ]  # fmt: skip
    assert water.split() == ["0", "water", "1,350", "75.00%", "1,350.00", "0.900"]
    assert "a class with a long name" in other
    assert other.split()[-4:] == ["450", "25.00%", "450.00", "0.400"]
    assert len(head) == len(water) == len(other)
    assert nodata == "nodata 200 pixels (10.00%)"
    assert "mean 0.775" in summary and "25.00% of the pixels below 0.5" in summary


# --- statistics of a run ----------------------------------------------------------------


def test_the_json_equals_a_recount_of_the_written_map(land, scene, tmp_path):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    report = read_json(tmp_path / "map_statistics.json")
    classes = read_map(output)
    confidence = read_map(tmp_path / "map_confidence.tif").astype(np.float64)
    known = classes != 255
    assert report["scene"] == str(scene) and report["output"] == str(output)
    assert report["model"] == [str(land.path)]
    assert report["run"]["precision"] == "fp32"
    assert report["pixels"] == classes.size
    assert report["nodata_pixels"] == 20 * 25 == (~known).sum()
    for number, entry in enumerate(report["classes"]):
        here = classes == number
        assert entry["pixels"] == here.sum() > 0
        assert entry["share"] == pytest.approx(here.sum() / known.sum())
        assert entry["area_ha"] == pytest.approx(here.sum() * 100 / 1e4, rel=1e-3)
        assert entry["mean_confidence"] == pytest.approx(confidence[here].mean())
    names = [entry["name"] for entry in report["classes"]]
    assert names == ["water", "forêt", "bare soil", "town"]
    summary = report["confidence"]
    assert summary["mean"] == pytest.approx(confidence[known].mean())
    median = np.median(confidence[known])
    assert summary["median"] == pytest.approx(median, abs=2e-3)
    assert summary["share_below_0.5"] == pytest.approx((confidence[known] < 0.5).mean())


def test_areas_in_metres_and_in_feet(land, tmp_path):
    place = {"transform": from_origin(431_240, 4_912_560, 10, 20)}
    assert mapped_area(land, tmp_path, **place) == pytest.approx(2000 * 200, rel=1e-3)
    place = {"crs": "EPSG:2263", "transform": from_origin(981_000, 200_000, 30, 30)}
    foot = 1200 / 3937  # US survey
    expected = 2000 * (30 * foot) ** 2
    assert mapped_area(land, tmp_path, **place) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("north", [0.1, 52.0, -60.0])
def test_areas_in_degrees_are_those_of_an_equal_area_projection(land, tmp_path, north):
    from pyproj import Transformer

    step = 0.05
    place = {"crs": "EPSG:4326", "transform": from_origin(7.3, north, step, step)}
    area = mapped_area(land, tmp_path, **place)
    to_plane = Transformer.from_crs("EPSG:4326", "EPSG:6933", always_xy=True)
    left, top = to_plane.transform(7.3, north)
    right, bottom = to_plane.transform(7.3 + 50 * step, north - 40 * step)
    assert area == pytest.approx((right - left) * (top - bottom), rel=1e-4)


def test_a_global_grid_whose_cell_centres_lie_on_the_poles_is_mapped(land, tmp_path):
    grid = from_origin(-181.25, 91.25, 2.5, 2.5)
    scene = write_scene(
        tmp_path / "scene.tif", noise(73, 144), crs="EPSG:4326", transform=grid
    )
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    report = read_json(tmp_path / "map_statistics.json")
    area = sum(entry["area_ha"] for entry in report["classes"]) * 1e4
    assert area == pytest.approx(5.1e14, rel=0.02)


def test_the_report_is_on_stdout_and_nothing_else(land, scene, tmp_path, capsys):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output, "--bands", "3,2,1") == 0
    captured = capsys.readouterr()
    report = read_json(tmp_path / "map_statistics.json")
    assert captured.out == report_text(report) + "\n"
    assert captured.out.startswith(str(output))
    assert "warning" in captured.err and "bare soil" not in captured.err
