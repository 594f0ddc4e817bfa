"""``--combine``: one map of the scenes of several dates."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from helpers import patch_everywhere
from prediction_helpers import TRANSFORM, noise, read_json, read_map, run, write_scene

import common.pictures
import Patch_extraction


def dates(folder, count: int = 3, height: int = 150, width: int = 130):
    """Scenes with clouds (nodata) of their own, and a corner that none of them sees."""
    rng = np.random.default_rng(5)
    scenes, images = [], []
    for number in range(count):
        pixels = noise(height, width, seed=number)
        clouds = rng.random((height // 10, width // 10)) < 0.4
        pixels[:, np.kron(clouds, np.ones((10, 10))).astype(bool)] = 0
        pixels[:, :20, :30] = 0
        images.append(pixels)
        scenes.append(write_scene(folder / f"date{number}.tif", pixels, nodata=0))
    return scenes, np.stack(images)


@pytest.mark.parametrize("options", [(), ("--max_memory", "1e-4")])
def test_pixels_get_the_mean_of_the_dates_that_see_them(land, tmp_path, options):
    scenes, images = dates(tmp_path)
    output = tmp_path / "map.tif"
    more = ("--combine", "mean", "--save_confidence", *options)
    assert run(land.path, scenes, output, *more) == 0
    valid = (images > 0).all(axis=1)  # (dates, H, W)
    counts = valid.sum(axis=0)
    each = np.stack([land.probabilities(image) for image in images])
    mean = (each * valid[:, None]).sum(axis=0) / np.maximum(counts, 1)
    with rasterio.open(tmp_path / "map_dates.tif") as file:
        np.testing.assert_array_equal(file.read(1), counts)
        assert file.nodata == 0 and file.dtypes == ("uint8",)
    seen = counts > 0
    assert not seen[:20, :30].any() and (counts == 3).any() and (counts == 1).any()
    expected = np.where(seen, mean.argmax(axis=0), 255)
    classes = read_map(output)
    unclear = np.sort(mean, axis=0)[-1] - np.sort(mean, axis=0)[-2] < 1e-4
    np.testing.assert_array_equal(classes[~unclear], expected[~unclear])
    confidence = read_map(tmp_path / "map_confidence.tif")
    np.testing.assert_allclose(confidence[seen], mean.max(axis=0)[seen], atol=1e-4)
    assert (confidence[~seen] == -1).all()
    report = read_json(tmp_path / "map_statistics.json")
    assert report["dates"] == list(map(str, scenes))
    assert report["mapped_pixels"] == seen.sum()


def test_the_order_of_the_dates_does_not_matter_and_one_date_is_no_map(
    spatial, tmp_path, capsys
):
    scenes, _ = dates(tmp_path)
    for name, order in (("a", scenes), ("b", scenes[::-1])):
        output = tmp_path / f"{name}.tif"
        assert run(spatial, order, output, "--combine", "mean") == 0
    same = read_map(tmp_path / "a.tif") == read_map(tmp_path / "b.tif")
    assert same.mean() > 0.999  # sums of floats
    alone = ("--combine", "mean")
    with pytest.raises(SystemExit, match="2"):
        run(spatial, scenes[0], tmp_path / "c.tif", *alone)
    assert "--combine" in capsys.readouterr().err


def test_the_quicklook_says_that_it_shows_the_first_date(land, tmp_path, monkeypatch):
    scenes, _ = dates(tmp_path, 2)
    titles, draw = [], common.pictures.draw_panels

    def noted(panels, *more):
        titles.extend(panel["title"] for panel in panels)
        return draw(panels, *more)

    patch_everywhere(monkeypatch, "common.pictures.draw_panels", noted)
    more = "--combine", "mean", "--quicklook"
    assert run(land.path, scenes, tmp_path / "map.tif", *more) == 0
    assert titles[0].startswith("the first of 2 dates (bands ")


@pytest.mark.parametrize(
    "other",
    [
        {"transform": TRANSFORM.translation(0.5, 0)},
        {"transform": TRANSFORM.scale(2)},
        {"crs": "EPSG:32632"},
        {},
    ],
)
def test_dates_on_other_grids_are_refused(land, tmp_path, capsys, other):
    first = write_scene(tmp_path / "a.tif", noise(64, 64))
    if "transform" in other:
        other = {"transform": TRANSFORM * other["transform"]}
    shape = (64, 64) if other else (64, 60)
    second = write_scene(tmp_path / "b.tif", noise(*shape), **other)
    for check in ((), ("--check",)):
        options = ("--combine", "mean", *check)
        assert run(land.path, [first, second], tmp_path / "map.tif", *options) == 1
        error = capsys.readouterr().err
        assert f"{second} is not on the pixel grid of {first}" in error
        assert f"stack --input {second} --like {first} --output b_like.tif" in error


def test_the_advice_for_dates_on_other_grids_leads_to_their_map(
    land, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    moved = TRANSFORM * TRANSFORM.translation(3.5, 0)
    first = write_scene(tmp_path / "a.tif", noise(64, 64), nodata=0)
    second = write_scene(tmp_path / "b.tif", noise(64, 60), nodata=0, transform=moved)
    options = ("--combine", "mean")
    assert run(land.path, [first, second], tmp_path / "map.tif", *options) == 1
    advice = capsys.readouterr().err.split("Patch_extraction.py ")[1]
    assert Patch_extraction.main(advice.split()) == 0
    both = [first, tmp_path / "b_like.tif"]
    assert run(land.path, both, tmp_path / "map.tif", *options) == 0
    counts = read_map(tmp_path / "map_dates.tif")
    assert (counts[:, :3] == 1).all() and (counts[:, 5:60] == 2).all()


def test_a_map_of_dates_resumes_only_with_the_same_dates(land, tmp_path, capsys):
    scenes, _ = dates(tmp_path)
    output, more = tmp_path / "map.tif", ("--combine", "mean", "--resume")
    assert run(land.path, scenes, output, *more) == 0
    assert run(land.path, scenes, output, *more) == 0
    assert "there already" in capsys.readouterr().err
    assert run(land.path, scenes[:2], output, *more) == 1
    assert "--overwrite" in capsys.readouterr().err
