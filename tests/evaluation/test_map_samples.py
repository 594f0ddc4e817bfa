"""Samples of a map: how they are drawn, what their file holds, and what comes of them."""

from __future__ import annotations

import csv
import json
import sqlite3

import geopandas
import numpy as np
import pyogrio
import pytest
import rasterio
import torch
from helpers import ENCODER, ORIGIN, PIXEL, patch_everywhere
from map_helpers import NAMES, run, write_map

from common.architectures import ModelConfig
from common.map_classes import map_class_tags
from evaluation.sampling import allocate, spread_of
from model_training import Normalization, build_model, save_checkpoint


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The figures that a test would store, by name."""
    figures = {}

    def keep(figure, target) -> None:
        target.touch()
        figures[target.name] = figure

    patch_everywhere(monkeypatch, "common.pictures.save_figure", keep)
    return figures


@pytest.fixture
def scene(tmp_path):
    """A map of water (10 %), forest (65 %) and town (25 %), a row of nodata, and its truth."""
    rng = np.random.default_rng(0)
    guess = rng.choice(3, (60, 50), p=[0.1, 0.65, 0.25]).astype(np.uint8)
    truth = np.where(
        rng.random(guess.shape) < 0.8, guess, rng.integers(0, 3, guess.shape)
    )
    guess[7] = 255
    return write_map(tmp_path / "map.tif", guess), guess, truth


def sample(scene, target, *words):
    status, out, err = run("--map", scene[0], "--output", target, *words)
    assert status == 0, err
    return geopandas.read_file(target, layer="sample"), out, err


def fill(scene, table, target, values=NAMES):
    """Fill in the reference of each point by the truth."""
    columns = ((table.geometry.x - ORIGIN[0]) / PIXEL).astype(int)
    rows = ((ORIGIN[1] - table.geometry.y) / PIXEL).astype(int)
    filled = table.copy()
    filled["reference"] = np.array(values)[scene[2][rows, columns]]
    filled.to_file(target, layer="sample", driver="GPKG")
    return filled


def estimates(scene, label, folder, *words) -> tuple[dict, str, str]:
    status, out, err = run("--map", scene[0], "--label", label, "--label_column",
                           "reference", "--output", folder, "--overwrite", *words)  # fmt: skip
    assert status == 0, err
    return json.loads((folder / "estimates.json").read_text()), out, err


# --- allocation -----------------------------------------------------------------------------


def test_points_are_shared_out_and_the_largest_strata_give_to_the_small_ones():
    sizes = np.array([9000, 900, 100])
    assert allocate(sizes, 300, 0).tolist() == [270, 27, 3]
    assert allocate(sizes, 300, 30).tolist() == [240, 30, 30]
    assert allocate(sizes, 50, 30).tolist() == [30, 30, 30]
    assert allocate(np.array([1000, 5]), 100, 30).tolist() == [95, 5]
    assert allocate(np.array([3, 4]), 100, 30).tolist() == [3, 4]
    assert allocate(np.array([3, 3, 3]), 7, 0).sum() == 7


def test_equal_and_neyman_allocation_by_hand():
    sizes = np.array([9000, 900, 100])
    equal = spread_of("equal", sizes, None)
    assert allocate(sizes, 300, 0, equal).tolist() == [100, 100, 100]
    neyman = spread_of("neyman", sizes, lambda: np.array([1.0, 0.5, 0.8]))
    assert neyman == pytest.approx([np.sqrt(0.95 * 0.05), 0.5, 0.4])  # at most 0.95
    shares = sizes * neyman
    expected = 300 * shares / shares.sum()
    assert allocate(sizes, 300, 0, neyman) == pytest.approx(expected, abs=1)


# --- the sample -----------------------------------------------------------------------------


def test_a_sample_holds_pixels_of_each_class_with_their_weights(scene, tmp_path):
    table, out, _ = sample(scene, tmp_path / "s.gpkg", "--sample", 200)
    assert list(table.columns) == ["id", "reference", "stratum", "weight", "geometry"]
    assert table["id"].tolist() == list(range(1, 201))
    assert table["reference"].isna().all()
    with rasterio.open(scene[0]) as file:
        assert table.crs == file.crs
        points = [(p.x, p.y) for p in table.geometry]
        values = [value for (value,) in file.sample(points)]
        offsets = [~file.transform * point for point in points]
    assert [NAMES[value] for value in values] == table["stratum"].tolist()
    assert np.array(offsets) % 1 == pytest.approx(0.5)
    assert len(set(points)) == 200
    counts = table["stratum"].value_counts()
    assert counts["water"] == 30  # at least, taken from the forest
    pixels = np.bincount(scene[1][scene[1] < 255])
    for name, size in zip(NAMES, pixels):
        weights = table["weight"][table["stratum"] == name]
        assert weights.to_numpy() == pytest.approx(size / counts[name])
        assert f"{size:,}" in out
    assert len(set(table["stratum"][:20])) > 1  # ids are shuffled


def test_a_sample_is_reproducible_whatever_the_strips(scene, tmp_path, monkeypatch):
    first, *_ = sample(scene, tmp_path / "a.gpkg", "--sample", 150)
    patch_everywhere(monkeypatch, "evaluation.reading.STRIP_PIXELS", 300)
    again, *_ = sample(scene, tmp_path / "b.gpkg", "--sample", 150)
    other, *_ = sample(scene, tmp_path / "c.gpkg", "--sample", 150, "--seed", 1)
    assert again.equals(first)
    assert not other.geometry.equals(first.geometry)


def test_every_pixel_of_a_class_is_drawn_as_often(tmp_path):
    made = write_map(tmp_path / "map.tif", np.repeat([0, 1], 8).reshape(4, 4))
    counts = np.zeros(16)
    from evaluation.classes import Classes
    from evaluation.sampling import draw_points

    with rasterio.open(made) as raster:
        for seed in range(400):
            drawn = draw_points(
                raster, Classes([0, 1, 2], NAMES, True), np.array([8, 8, 0]),
                np.array([2, 4, 0]), seed,
            )  # fmt: skip
            for point in drawn:
                counts[point.row * 4 + point.column] += 1
    assert counts[:8] == pytest.approx(100, abs=40)
    assert counts[8:] == pytest.approx(200, abs=45)


def test_the_style_hides_the_class_and_the_weight(scene, tmp_path):
    sample(scene, tmp_path / "s.gpkg", "--sample", 100)
    with sqlite3.connect(tmp_path / "s.gpkg") as base:
        ((table, style, default),) = base.execute(
            "SELECT f_table_name, styleQML, useAsDefault FROM layer_styles"
        ).fetchall()
    base.close()
    assert (table, default) == ("sample", 1)
    for name in ("stratum", "weight"):
        assert f'<field name="{name}"><editWidget type="Hidden">' in style
        assert f'<column type="field" name="{name}" hidden="1" />' in style
    assert '<column type="field" name="reference" hidden="0" />' in style
    assert 'type="singleSymbol"' in style
    assert not any(name in style for name in NAMES)


def test_neyman_takes_the_accuracies_of_the_model_that_made_the_map(scene, tmp_path):
    torch.manual_seed(0)
    config = ModelConfig("linknet", 3, 3, ENCODER)
    per_class = [{"name": "Water", "precision": 0.5}, {"name": "forest", "precision": 0.99},
                 {"name": "town", "precision": None}]  # fmt: skip
    metadata = {
        "class_names": NAMES,
        "performance_metrics": {"test": {"per_class": per_class}},
    }
    numbers = Normalization("dataset", (0.0,) * 3, (1.0,) * 3)
    model = tmp_path / "m.pth"
    save_checkpoint(model, build_model(config), config, numbers, metadata)
    (tmp_path / "map_statistics.json").write_text(json.dumps({"model": [str(model)]}))
    words = ("--sample", 300, "--allocate", "neyman", "--min_per_class", 0)
    table, _, err = sample(scene, tmp_path / "s.gpkg", *words)
    pixels = np.bincount(scene[1][scene[1] < 255])
    shares = pixels * np.sqrt([0.25, 0.95 * 0.05, 0.16])
    counts = table["stratum"].value_counts()[NAMES].to_numpy()
    assert counts == pytest.approx(300 * shares / shares.sum(), abs=1)
    assert "0.8 is taken: town" in err
    (tmp_path / "map_statistics.json").write_text(json.dumps({"model": ["gone.pth"]}))
    _, _, err = sample(scene, tmp_path / "u.gpkg", *words)
    assert "gone.pth, which" in err
    assert "0.8 is taken: water, forest, town" in err
    (tmp_path / "map_statistics.json").unlink()
    assert sample(scene, tmp_path / "t.gpkg", *words, "--model", model)[0][
        "stratum"
    ].equals(table["stratum"])


def test_a_sample_is_not_replaced_without_overwrite(scene, tmp_path):
    sample(scene, tmp_path / "s.gpkg", "--sample", 100)
    former = (tmp_path / "s.gpkg").read_bytes()
    status, _, err = run(
        "--map", scene[0], "--output", tmp_path / "s.gpkg", "--sample", 90
    )
    assert status == 1
    assert "give --overwrite" in err
    assert (tmp_path / "s.gpkg").read_bytes() == former
    assert (
        len(sample(scene, tmp_path / "s.gpkg", "--sample", 120, "--overwrite")[0])
        == 120
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (("--sample", 0), "expected 1 or more"),
        (("--sample", 9, "--output", "a.shp"), "expected a .gpkg with --sample"),
        (("--sample", 9, "--model", "m.pth"), "expected --allocate neyman with it"),
        (("--sample", 9, "--label", "l.tif"), "--label changes nothing"),
        (("--label", "l.tif", "--allocate", "equal"), "--allocate changes nothing"),
    ],
)
def test_a_wrong_option_of_a_sample_is_refused(words, message):
    status, _, err = run("--map", "m.tif", *words)
    assert status == 2
    assert message in err


# --- the estimates --------------------------------------------------------------------------


def test_a_filled_sample_gives_accuracies_and_areas(scene, tmp_path, drawn):
    table, *_ = sample(scene, tmp_path / "s.gpkg", "--sample", 900)
    fill(scene, table, tmp_path / "filled.gpkg")
    report, out, _ = estimates(scene, tmp_path / "filled.gpkg", tmp_path / "e")
    mapped = scene[1] < 255
    true = (scene[1] == scene[2])[mapped].mean()
    low, high = report["overall_accuracy"]["interval_95"]
    assert low < true < high
    assert high - low < 0.06
    assert report["strata"] == "classes of the map"
    for number, entry in enumerate(report["per_class"]):
        hectares = (scene[2] == number)[mapped].sum() * PIXEL**2 / 1e4
        assert entry["area_ha"]["value"] == pytest.approx(hectares, rel=0.15)
        assert entry["mapped_ha"] == pytest.approx(
            (scene[1] == number).sum() / 100, rel=0.01
        )
    assert np.sum(report["matrix"]["points"]) == 900
    assert np.sum(report["matrix"]["shares"]) == pytest.approx(1)
    assert "from 900 points drawn at random" in out
    assert "estimated_areas.png" in drawn
    with open(tmp_path / "e" / "estimates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [*NAMES, "all"]
    forest = report["per_class"][1]["users_accuracy"]
    assert float(rows[1]["users_accuracy"]) == forest["value"]
    assert float(rows[1]["users_accuracy_low"]) == forest["interval_95"][0]
    assert float(rows[3]["overall_accuracy"]) == report["overall_accuracy"]["value"]


@pytest.mark.parametrize(
    "values",
    [["WATER", " Forest", "town "], ["0", "1", "2"], [0, 1, 2], [0.0, 1.0, 2.0]],
    ids=["case", "numbers as text", "numbers", "fractions"],
)
def test_references_are_names_or_numbers_in_any_case(scene, tmp_path, values):
    table, *_ = sample(scene, tmp_path / "s.gpkg", "--sample", 100)
    fill(scene, table, tmp_path / "names.gpkg")
    fill(scene, table, tmp_path / "other.gpkg", values)
    expected, *_ = estimates(scene, tmp_path / "names.gpkg", tmp_path / "a")
    found, *_ = estimates(scene, tmp_path / "other.gpkg", tmp_path / "b")
    for report in (found, expected):
        del report["sample"], report["settings"], report["command"]
    assert found == expected


def coded_scene(scene, codes) -> tuple:
    """The scene with codes of its classes, which its map does not hold."""
    path, guess, truth = scene
    with rasterio.open(path, "r+") as file:
        file.update_tags(**map_class_tags(NAMES, codes, None))
    return path, guess, truth


def test_references_are_codes_where_they_are_no_numbers_of_other_classes(
    scene, tmp_path
):
    scene = coded_scene(scene, (0, 20, 30))
    table, *_ = sample(scene, tmp_path / "s.gpkg", "--sample", 100)
    accuracies = []
    for number, values in enumerate((NAMES, [0, 20, 30], ["0", "1", "30"])):
        fill(scene, table, tmp_path / f"{number}.gpkg", values)
        found, *_ = estimates(scene, tmp_path / f"{number}.gpkg", tmp_path / "a")
        accuracies.append(found["overall_accuracy"]["value"])
    assert accuracies[0] == accuracies[1] == accuracies[2] < 1


def test_a_code_of_one_class_that_is_the_number_of_another_is_refused(scene, tmp_path):
    scene = coded_scene(scene, (1, 2, 3))
    table, *_ = sample(scene, tmp_path / "s.gpkg", "--sample", 100)
    table["reference"] = 2
    table.to_file(tmp_path / "f.gpkg", layer="sample", driver="GPKG")
    status, _, err = run("--map", scene[0], "--label", tmp_path / "f.gpkg")
    assert status == 1 and err.endswith(
        "the reference 2 is the code of forest, but the map's number of town; write the names of "
        "the classes\n"
    )


def test_points_without_a_reference_are_counted_and_left_out(scene, tmp_path):
    table, *_ = sample(scene, tmp_path / "s.gpkg", "--sample", 200)
    filled = fill(scene, table, tmp_path / "filled.gpkg")
    water = np.flatnonzero(filled["stratum"] == "water")
    filled.loc[water[1:], "reference"] = None
    filled.loc[np.flatnonzero(filled["stratum"] == "forest")[:5], "reference"] = " "
    filled.to_file(tmp_path / "gaps.gpkg", layer="sample", driver="GPKG")
    report, out, _ = estimates(scene, tmp_path / "gaps.gpkg", tmp_path / "e")
    assert report["points_without_reference"] == len(water) - 1 + 5
    assert report["strata_with_few_points"] == ["water"]
    sizes = [entry["pixels"] for entry in report["per_stratum"]]
    assert sizes == np.bincount(scene[1][scene[1] < 255]).tolist()  # by all points
    assert report["overall_accuracy"]["interval_95"] is None
    water, forest, _ = report["per_class"]
    assert water["users_accuracy"]["interval_95"] is None
    assert forest["users_accuracy"]["interval_95"]
    assert "fewer than two points have a reference in water" in out


def test_a_class_that_the_map_lacks_counts_as_missed_and_a_typo_is_an_error(
    scene, tmp_path
):
    table, *_ = sample(scene, tmp_path / "s.gpkg", "--sample", 200)
    filled = fill(scene, table, tmp_path / "filled.gpkg")
    filled.loc[3, "reference"] = "Glacier"
    filled.to_file(tmp_path / "more.gpkg", layer="sample", driver="GPKG")
    report, _, err = estimates(scene, tmp_path / "more.gpkg", tmp_path / "e")
    assert "the map has no class Glacier (1 points)" in err
    assert report["per_class"][3]["name"] == "Glacier"
    assert report["per_class"][3]["producers_accuracy"]["value"] == 0
    for wrong in ("forrest", "17"):
        filled.loc[3, "reference"] = wrong
        filled.to_file(tmp_path / "typo.gpkg", layer="sample", driver="GPKG")
        status, _, err = run("--map", scene[0], "--label", tmp_path / "typo.gpkg")
        assert status == 2
        assert f"'{wrong}'" in err


def test_the_sample_of_one_map_judges_another(scene, tmp_path):
    table, *_ = sample(scene, tmp_path / "s.gpkg", "--sample", 900)
    filled = fill(scene, table, tmp_path / "filled.gpkg")
    noted = pyogrio.read_info(tmp_path / "s.gpkg", layer="sample")["layer_metadata"]
    options = {"layer": "sample", "driver": "GPKG", "layer_metadata": noted}
    filled.to_file(tmp_path / "s.gpkg", **options)  # as QGIS leaves it
    rng = np.random.default_rng(5)
    guess = np.where(rng.random(scene[1].shape) < 0.5, scene[2], scene[1]).astype(
        np.uint8
    )
    guess[7] = scene[2][7]
    other = write_map(tmp_path / "other.tif", guess), guess, scene[2]
    report, out, _ = estimates(other, tmp_path / "s.gpkg", tmp_path / "e")
    assert report["strata"] == "of another map"
    sampled = scene[1] < 255
    low, high = report["overall_accuracy"]["interval_95"]
    assert low < (guess == scene[2])[sampled].mean() < high
    area = report["per_class"][1]["area_ha"]["value"]
    expected = (scene[2] == 1)[sampled].sum() / 100
    assert area == pytest.approx(expected, rel=0.1)  # of the ground that was sampled
    assert "strata: of another map" in out
    # a copy does not say which area it is of
    report, _, err = estimates(other, tmp_path / "filled.gpkg", tmp_path / "e")
    assert "area_ha" not in report["per_class"][1]
    assert "areas are shares" in err


def test_a_class_that_got_no_point_leaves_unknown_what_depends_on_it(tmp_path):
    guess = np.random.default_rng(0).integers(0, 2, (60, 50)).astype(np.uint8)
    guess[0, :8] = 2  # the town
    scene = write_map(tmp_path / "map.tif", guess), guess, guess
    words = "--sample", 40, "--min_per_class", 0
    table, _, err = sample(scene, tmp_path / "s.gpkg", *words)
    assert "warning: no point lies in town" in err
    assert "town" not in set(table["stratum"])
    noted = pyogrio.read_info(tmp_path / "s.gpkg", layer="sample")["layer_metadata"]
    table["reference"] = table["stratum"]
    file = tmp_path / "filled.gpkg"
    table.to_file(file, layer="sample", driver="GPKG", layer_metadata=noted)
    report, _, err = estimates(scene, file, tmp_path / "out")
    assert "were points removed" not in err
    assert report["strata_with_few_points"] == ["town"]
    assert report["per_stratum"][2] == {"name": "town", "pixels": 8, "points": 0}
    assert report["overall_accuracy"]["value"] is None
    for entry in report["per_class"]:
        assert entry["area_ha"]["value"] is entry["share"]["value"] is None
        right = None if entry["name"] == "town" else 1
        assert entry["users_accuracy"]["value"] == right


def test_removed_points_are_reported(scene, tmp_path):
    table, *_ = sample(scene, tmp_path / "s.gpkg", "--sample", 200)
    filled = fill(scene, table, tmp_path / "filled.gpkg")
    filled[5:].to_file(tmp_path / "less.gpkg", layer="sample", driver="GPKG")
    err = estimates(scene, tmp_path / "less.gpkg", tmp_path / "e")[2]
    assert "were points removed?" in err


def test_areas_in_degrees_count_pixels_by_their_size(tmp_path):
    """Half of the pixels near the equator are water, and half of those at 60 degrees are."""
    guess = np.zeros((60, 40), np.uint8)
    truth = np.zeros_like(guess)
    truth[30:] = 1  # the south of a map from 60 degrees to the equator
    made = write_map(tmp_path / "map.tif", guess, ["land", "water"], origin=(10, 60), pixel=1, crs="EPSG:4326")  # fmt: skip
    run("--map", made, "--sample", 2000, "--output", tmp_path / "s.gpkg")
    table = geopandas.read_file(tmp_path / "s.gpkg", layer="sample")
    south = table.geometry.y < 30
    table["reference"] = np.where(south, "water", "land")
    table.to_file(tmp_path / "f.gpkg", layer="sample", driver="GPKG")
    report, *_ = estimates((made, guess, truth), tmp_path / "f.gpkg", tmp_path / "e")
    expected = np.sin(np.radians(30)) / np.sin(np.radians(60))  # of a sphere
    assert report["per_class"][1]["share"]["value"] == pytest.approx(expected, abs=0.01)
