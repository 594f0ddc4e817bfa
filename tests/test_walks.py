"""examples/walks.py: the made data are of their kind, and the commands are those of the page."""

from __future__ import annotations

import subprocess

import geopandas
import numpy as np
import pytest
import rasterio
from helpers import ROOT

import Patch_extraction
from examples import walk_data, walks

SCRIPTS = {path.name for path in ROOT.glob("*.py")}


def pixels(path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


# --- the commands ---------------------------------------------------------------------------


def test_every_kind_of_data_can_be_made():
    assert tuple(walk_data.MAKERS) == walks.KINDS


@pytest.mark.parametrize("kind", walks.KINDS)
def test_a_walk_goes_from_its_data_to_a_judged_map(kind):
    first, *others = walks.commands_of(kind)
    assert first == ["examples/walks.py", kind, "--data_only"]
    scripts = [words[0] for words in others if words[0] in SCRIPTS]
    # a walk ends at a judged map
    assert set(scripts) == SCRIPTS - {"model_training.py", "Export_model.py"}
    assert scripts[-1] == "Evaluate_map.py"
    own = f"walks_output/{kind}/"
    paths = [w for words in others for w in words if "walks_output/" in w]
    assert all(path.removeprefix("@").startswith(own) for path in paths)


def test_the_commands_of_a_walk_are_run_in_the_order_of_the_page(tmp_path, monkeypatch):
    run = []
    monkeypatch.setattr(walks, "OUTPUT", tmp_path)
    monkeypatch.setattr(walks, "run_script", lambda *words: run.append(list(words)))
    assert walks.main(["boxes"]) == 0
    assert run == walks.commands_of("boxes")
    assert ["examples/walks.py", "boxes", "--fill_in"] in run


def test_a_walk_that_was_taken_is_not_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(walks, "ROOT", tmp_path)
    monkeypatch.setattr(walks, "OUTPUT", tmp_path / "walks_output")
    (tmp_path / "walks_output" / "dates").mkdir(parents=True)
    for more in ([], ["--data_only"]):
        assert walks.main(["dates", *more]) == 1
        error = capsys.readouterr().err
        assert "dates exists; delete it to walk again" in error
        assert error.count("\n") == 1


def test_a_script_that_fails_ends_the_walk_with_its_name(tmp_path, monkeypatch, capsys):
    def fail(*words):
        raise subprocess.CalledProcessError(2, ["python", *words])

    monkeypatch.setattr(walks, "OUTPUT", tmp_path)
    monkeypatch.setattr(walks, "run_script", fail)
    assert walks.main(["drone"]) == 1
    expected = "error: examples/walks.py ended with status 2\n"
    assert capsys.readouterr().err == expected


def test_only_the_sample_of_the_boxes_is_filled_in():
    with pytest.raises(SystemExit) as stop:
        walks.main(["crops", "--fill_in"])
    assert stop.value.code == 2


# --- the data -------------------------------------------------------------------------------


def test_polygons_come_with_a_product_that_stack_reads(tmp_path):
    walk_data.make_polygons(tmp_path, size=264)
    product, scene = tmp_path / walk_data.PRODUCT, tmp_path / "scene.vrt"
    words = ["stack", "--input", str(product), "--cloud_mask", "--output", str(scene)]
    assert Patch_extraction.main(words) == 0
    with rasterio.open(scene) as file:
        assert file.descriptions == tuple(name.split()[0] for name in walk_data.BANDS)
        assert (file.crs, file.res, file.shape) == (walk_data.CRS, (10, 10), (264, 264))
        assert 0 < (file.dataset_mask() == 0).mean() < 0.2  # the clouds
        assert 300 < np.median(file.read(2)) < 1500  # the offset is undone
    survey, check = (
        geopandas.read_file(tmp_path / name) for name in ("survey.gpkg", "check.gpkg")
    )
    assert survey.crs == check.crs == "EPSG:4326"
    assert set(survey["cover"]) <= set(walk_data.NAMES)
    assert len(survey) > len(check) > 0
    assert not survey.union_all().intersects(check.union_all())


def test_dates_are_six_scenes_of_one_place_and_one_label(tmp_path):
    walk_data.make_dates(tmp_path, size=256)
    scenes = sorted((tmp_path / "scenes").iterdir())
    assert [path.stem for path in scenes] == list(walk_data.DATES)
    label = pixels(tmp_path / "label.tif")
    clear = [pixels(path)[0] > 0 for path in scenes]
    assert all(mask.shape == label.shape[1:] for mask in clear)
    assert all(0.5 < mask.mean() < 1 for mask in clear)
    assert np.any(clear, axis=0).all()  # what a cloud hides is seen on another date
    medians = [np.median(pixels(path)[6]) for path in scenes]
    assert max(medians) > 1.1 * min(medians)


@pytest.mark.parametrize(("country", "count"), [("home", 6), ("abroad", 2)])
def test_drone_pictures_have_no_location_and_masks_of_0_and_255(
    tmp_path, country, count
):
    walk_data.make_drone(tmp_path, count=6, size=96)
    images = sorted((tmp_path / country / "images").iterdir())
    masks = sorted((tmp_path / country / "masks").iterdir())
    assert [p.stem for p in images] == [p.stem for p in masks]
    assert len(images) == count
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        image, mask = pixels(images[0]), pixels(masks[0])
    assert (image.shape, mask.shape) == ((3, 96, 96), (1, 96, 96))
    assert set(np.unique(mask)) == {0, 255}


def test_crops_have_36_names_some_with_commas_and_colours_for_32(tmp_path):
    walk_data.make_crops(tmp_path, size=512)
    fields = geopandas.read_file(tmp_path / "fields.gpkg")
    names = set(fields["crop"])
    listed = (tmp_path / "crops.txt").read_text().splitlines()
    assert len(names) == 36
    assert sum("," in name for name in names) >= 9
    assert len(set(listed)) == 32
    assert set(listed) < names
    assert (tmp_path / "crops.qml").read_text().count("<category ") == 32


def test_labels_lie_in_eleven_boxes_whose_cells_say_what_they_are_for(tmp_path):
    walk_data.make_boxes(tmp_path, size=576)
    label, truth = pixels(tmp_path / "label.tif"), pixels(tmp_path / "truth.tif")
    cells = geopandas.read_file(tmp_path / "cells.gpkg")
    assert (label > 0).sum() == 11 * walk_data.BOX**2
    np.testing.assert_array_equal(label[label > 0], truth[label > 0])
    assert set(np.unique(truth)) == set(walk_data.CODES)
    roles = cells.groupby("box")["role"].unique()
    assert len(roles) == 11
    assert roles.map(len).eq(1).all()
    assert cells.union_all().area == cells.area.sum() == (label > 0).sum() * 100


def test_a_sample_is_filled_in_with_the_truth_but_for_some_points(tmp_path):
    truth = np.repeat(np.array([[10, 80]], np.uint8), 20, axis=1)
    walk_data.write_raster(tmp_path / "truth.tif", [truth], nodata=0)
    left, top = walk_data.CORNER
    rows = {"id": range(1, 41), "stratum": "forest", "weight": 1.0, "reference": None}
    places = geopandas.points_from_xy(left + 5 + 10 * np.arange(40), [top - 5] * 40)
    sample = geopandas.GeoDataFrame(rows, geometry=places, crs=walk_data.CRS)
    sample.to_file(tmp_path / "sample.gpkg", layer="sample")
    walk_data.fill_in_boxes(tmp_path)
    filled = geopandas.read_file(tmp_path / "referenced.gpkg")
    assert filled["reference"].tolist()[:-1] == ["forest"] * 20 + ["water"] * 19
    assert filled["reference"].isna().sum() == 1
    assert filled["weight"].tolist() == [1.0] * 40
