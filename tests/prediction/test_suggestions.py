"""``--suggest``: cells that are worth labelling next."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from itertools import product
from xml.etree import ElementTree

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from geopandas.testing import assert_geodataframe_equal
from helpers import interrupt
from prediction_helpers import (
    CRS,
    DESCRIPTIONS,
    TRANSFORM,
    entropy_share,
    make_pixel_model,
    noise,
    read_json,
    read_map,
    run,
    write_scene,
)
from rasterio.warp import transform_bounds

import Patch_extraction
from common.styles import RAMP
from prediction.suggestions import choose_cells

SIDE = 16
WEIGHTS = [[6, -3, 0], [-2, 7, 1], [0, -4, 6], [1, 1, -5]]
NAMES = ["water", "forêt", "bare soil", "town"]


def make_model(path, places=None, shift=0.0, **metadata):
    weights, bias = np.array(WEIGHTS) + shift, [0.5, -1.5, 0, 1]
    known = {"input_size": [SIDE, SIDE], "class_names": NAMES, "places": places}
    return make_pixel_model(path, weights, bias, **known | metadata)


@pytest.fixture
def patchy(tmp_path):
    """100 x 90 pixels in squares of one value each, a corner of which is nodata."""
    coarse = noise(25, 23).repeat(4, axis=1).repeat(4, axis=2)[:, :100, :90]
    coarse[:, :20, :25] = 0
    return write_scene(tmp_path / "scene.tif", coarse, DESCRIPTIONS, nodata=0)


def suggested(output):
    path = output.with_name(f"{output.stem}_suggestions.gpkg")
    return geopandas.read_file(path, layer=path.stem)


def cells_of(table) -> list[tuple[int, int]]:
    """Row and column of cells by their geometries."""
    corners = [~TRANSFORM * (b[0], b[3]) for b in table.geometry.bounds.to_numpy()]
    return [(round(y / SIDE), round(x / SIDE)) for x, y in corners]


def bounds_of(row: int, column: int, side: int = SIDE) -> list[float]:
    """The ground of a cell: left, bottom, right, top."""
    left, top = TRANSFORM * (column * SIDE, row * SIDE)
    return [left, top - 10 * side, left + 10 * side, top]


def entropies(model, scene) -> np.ndarray:
    with rasterio.open(scene) as file:
        pixels = file.read().astype(np.float64)
        known = file.dataset_mask() > 0
    return np.where(known, entropy_share(model.probabilities(pixels)), np.nan)


def cell_window(row: int, column: int):
    return (
        slice(row * SIDE, (row + 1) * SIDE),
        slice(column * SIDE, (column + 1) * SIDE),
    )


def all_but(kept, crs=CRS) -> list[dict]:
    """Patches on all cells of ``patchy`` but some, in a CRS, in two splits."""
    bounds = [
        list(transform_bounds(CRS, crs, *bounds_of(row, column)))
        for row in range(7)
        for column in range(6)
        if (row, column) not in kept
    ]
    return [
        {"crs": crs, "split": "train", "bounds": bounds[::2]},
        {"crs": crs, "split": "test", "bounds": bounds[1::2]},
    ]


def test_cells_are_those_of_highest_entropy_and_none_touches_another(
    tmp_path, patchy, capsys
):
    model, output = make_model(tmp_path / "m.pth"), tmp_path / "map.tif"
    assert run(model.path, patchy, output, "--suggest", "6") == 0
    told = "m.pth does not say where all patches of its dataset lie, so suggested cells"
    assert capsys.readouterr().err.count(told) == 1
    table, expected = suggested(output), entropies(model, patchy)
    assert table["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    classes, cells = read_map(output), cells_of(table)
    for cell, found in zip(cells, table.itertuples()):
        known = classes[cell_window(*cell)]
        known = known[known < 255]
        mean = np.nanmean(expected[cell_window(*cell)])
        assert found.score == pytest.approx(mean, abs=1e-5)
        assert found.class_name == NAMES[np.bincount(known).argmax()]
        assert found.valid_share == known.size / SIDE**2
        assert found.name == "r{:03}_c{:03}".format(*cell)
    half = [
        cell
        for cell in product(range(7), range(6))
        if (classes[cell_window(*cell)] < 255).sum() >= SIDE**2 / 2
    ]
    best = max(half, key=lambda cell: np.nanmean(expected[cell_window(*cell)]))
    assert cells[0] == best and (0, 0) not in half and set(cells) <= set(half)
    apart = np.abs(np.array(cells)[:, None] - np.array(cells)).max(axis=-1)
    assert apart[~np.eye(6, dtype=bool)].min() > 1


def test_the_classes_take_turns():
    score = np.array([[9, 0, 8, 0, 7, 0, 6, 0, 5, 4]]).repeat(3, axis=0) / 10
    classes = np.array([[0, 0, 0, 0, 0, 0, 1, 1, 2, 1]]).repeat(3, axis=0)
    open_ = np.zeros(score.shape, bool)
    open_[0] = True
    assert choose_cells(score, classes, open_, 4) == [(0, 0), (0, 6), (0, 8), (0, 2)]
    assert len(choose_cells(score, classes, open_, 9)) == 5
    open_[2] = True
    chosen = choose_cells(score, classes, open_, 9)
    assert len(chosen) == 9 and set(chosen) > {(0, 0), (2, 0)}
    assert choose_cells(score, classes, np.zeros_like(open_), 9) == []


@pytest.mark.parametrize("crs", [CRS, "EPSG:4326"])
def test_cells_on_patches_of_any_split_are_left_out_and_too_few_are_told(
    tmp_path, patchy, capsys, crs
):
    free = {(1, 3), (4, 1), (4, 2)}
    model = make_model(tmp_path / "m.pth", all_but(free, crs))
    assert run(model.path, patchy, tmp_path / "map.tif", "--suggest", "5") == 0
    found = set(cells_of(suggested(tmp_path / "map.tif")))
    assert (1, 3) in found and len(found & {(4, 1), (4, 2)}) == 1 and len(found) == 2
    error = capsys.readouterr().err
    assert "--suggest 5:" in error and "has 2 such cells of 16 pixels" in error
    assert "does not say where" not in error


def test_without_free_ground_no_cell_is_suggested(tmp_path, patchy, capsys):
    model = make_model(tmp_path / "m.pth", all_but(()))
    assert run(model.path, patchy, tmp_path / "map.tif", "--suggest", "5") == 0
    error = capsys.readouterr().err
    assert "has patches of the dataset in all its 34 cells of 16 pixels on" in error
    assert "a smaller --cell_size gives more only where these patches leave" in error
    assert len(suggested(tmp_path / "map.tif")) == 0
    empty = write_scene(tmp_path / "b.tif", noise(32, 32) * 0, DESCRIPTIONS, nodata=0)
    assert run(model.path, empty, tmp_path / "none.tif", "--suggest", "5") == 0
    error = capsys.readouterr().err
    assert "has no valid pixel, so nothing to label" in error
    assert "--cell_size" not in error


def test_a_scene_without_half_a_valid_cell_gets_no_suggestion(tmp_path, patchy, capsys):
    model, output = make_model(tmp_path / "m.pth", all_but(())), tmp_path / "map.tif"
    assert run(model.path, patchy, output, "--suggest", "5", "--cell_size", "300") == 0
    assert "has 0 such cells of 300 pixels" in capsys.readouterr().err
    assert len(suggested(output)) == 0


def test_patches_whose_place_is_not_known_here_are_told(tmp_path, patchy, capsys):
    places = [{"crs": None, "split": "train", "bounds": [[0, 0, 160, 160]]}]
    model = make_model(tmp_path / "m.pth", places)
    assert run(model.path, patchy, tmp_path / "map.tif", "--suggest", "2") == 0
    assert "m.pth does not say where all patches" in capsys.readouterr().err
    assert len(suggested(tmp_path / "map.tif")) == 2


def test_cells_on_patches_of_a_known_place_are_left_out_beside_others(
    tmp_path, patchy, capsys
):
    places = [{"crs": None, "split": "train", "bounds": [[0, 0, 160, 160]]}]
    model = make_model(tmp_path / "m.pth", all_but({(1, 3), (4, 1)}) + places)
    assert run(model.path, patchy, tmp_path / "map.tif", "--suggest", "2") == 0
    assert "m.pth does not say where all patches" in capsys.readouterr().err
    assert {*cells_of(suggested(tmp_path / "map.tif"))} == {(1, 3), (4, 1)}


def test_several_models_suggest_by_their_disagreement(tmp_path, patchy):
    models = [make_model(tmp_path / f"{n}.pth", shift=3 * n).path for n in range(2)]
    output = tmp_path / "map.tif"
    assert run(models, patchy, output, "--suggest", "3") == 0
    with rasterio.open(tmp_path / "map_uncertainty.tif") as file:
        disagreement = file.read(2, masked=True)
    table = suggested(output)
    for cell, score in zip(cells_of(table), table.score):
        assert score == pytest.approx(disagreement[cell_window(*cell)].mean(), abs=1e-5)


def test_extraction_takes_the_suggested_cells_as_its_grid(tmp_path, patchy):
    model, output = make_model(tmp_path / "m.pth"), tmp_path / "map.tif"
    assert run(model.path, patchy, output, "--suggest", "4") == 0
    table = suggested(output)
    files = ["--image", patchy, "--label", output, "--output", tmp_path / "data"]
    grid = ["--grid", tmp_path / "map_suggestions.gpkg", "--patch_size", SIDE]
    shares = ["--train_ratio", 1, "--val_ratio", 0, "--test_ratio", 0]
    words = ["extract", *files, *grid, *shares]
    assert Patch_extraction.main(list(map(str, words))) == 0
    found = {}
    for path in (tmp_path / "data" / "Patch" / "train" / "images").glob("*.tif"):
        with rasterio.open(path) as file:
            assert file.shape == (SIDE, SIDE) and file.res == (10, 10)
            found[path.stem] = list(file.bounds)
    expected = zip(table["name"], cells_of(table))
    assert found == {f"patch_{name}": bounds_of(*cell) for name, cell in expected}


def test_a_finished_map_gets_other_suggestions_alone(tmp_path, patchy, batches, capsys):
    model, output = make_model(tmp_path / "m.pth"), tmp_path / "map.tif"
    path = tmp_path / "map_suggestions.gpkg"
    assert run(model.path, patchy, output, "--save_uncertainty") == 0
    batches.clear()
    for more in (("3",), ("5",), ("5", "--cell_size", "8")):
        assert run(model.path, patchy, output, "--resume", "--suggest", *more) == 0
        assert len(suggested(output)) == int(more[0])
        made = path.stat().st_mtime_ns
        assert run(model.path, patchy, output, "--resume", "--suggest", *more) == 0
        assert path.stat().st_mtime_ns == made
    side = suggested(output).geometry.bounds
    assert (side.maxx - side.minx == 80).all() and not batches
    assert run(model.path, patchy, tmp_path / "plain.tif") == 0
    capsys.readouterr()
    plain = tmp_path / "plain.tif"
    assert run(model.path, patchy, plain, "--resume", "--suggest", "3") == 1
    told = "another --save_uncertainty or --suggest"
    assert f"{told} (False, now True)" in capsys.readouterr().err
    assert run(model.path, patchy, plain, "--overwrite", "--suggest", "3") == 0
    assert run(model.path, patchy, plain, "--resume") == 1
    assert f"{told} (True, now False)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["prediction.layers.compute_layers", "prediction.suggestions.choose_cells"]
)
def test_a_run_that_was_interrupted_suggests_the_same_cells(
    spatial, tall_scene, tmp_path, monkeypatch, name
):
    output, options = tmp_path / "map.tif", ("--suggest", "4", "--cell_size", "24")
    whole = tmp_path / "whole.tif"
    assert run(spatial, tall_scene, whole, *options) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, name, 1 if "choose" in name else 3)
        assert run(spatial, tall_scene, output, *options) == 130
    assert run(spatial, tall_scene, output, *options, "--resume") == 0
    assert not list(tmp_path.glob(".*"))
    assert_geodataframe_equal(suggested(output), suggested(whole))


def test_suggestions_of_another_run_are_not_replaced_unasked(tmp_path, patchy, capsys):
    model, output = make_model(tmp_path / "m.pth"), tmp_path / "map.tif"
    (tmp_path / "map_suggestions.gpkg").write_text("mine")
    for more in ((), ("--resume",), ("--check",)):
        assert run(model.path, patchy, output, "--suggest", "3", *more) == 1
        assert "map_suggestions.gpkg is there already" in capsys.readouterr().err
    assert run(model.path, patchy, output, "--suggest", "3", "--overwrite") == 0
    assert len(suggested(output)) == 3


def test_each_scene_gets_cells_of_its_own_and_those_of_an_area_lie_in_it(
    tmp_path, patchy
):
    model, folder = make_model(tmp_path / "m.pth"), tmp_path / "maps"
    other = write_scene(tmp_path / "b.tif", noise(70, 60, seed=3), DESCRIPTIONS)
    assert run(model.path, [patchy, other], folder, "--suggest", "3") == 0
    for path in (patchy, other):
        assert len(suggested(folder / f"{path.stem}_prediction.tif")) == 3
    left, bottom, right, top = *bounds_of(4, 2)[:2], *bounds_of(2, 5)[2:]
    box = shapely.box(left + 35, bottom, right, top)
    geopandas.GeoSeries([box], crs=CRS).to_file(tmp_path / "area.gpkg")
    output, area = tmp_path / "part.tif", ("--area", str(tmp_path / "area.gpkg"))
    assert run(model.path, patchy, output, "--suggest", "9", *area) == 0
    table = suggested(output)
    assert len(table) == 4 and table.intersection(box).area.min() > 0
    for cell, name in zip(cells_of(table), table["name"]):
        assert name == "r{:03}_c{:03}".format(*cell)
        assert bounds_of(*cell) in table.geometry.bounds.to_numpy().tolist()


def test_polygons_quicklook_and_suggestions_are_made_together(tmp_path, patchy):
    model, areas = make_model(tmp_path / "m.pth"), tmp_path / "areas.gpkg"
    more = ("--polygons", str(areas), "--min_area", "900", "--quicklook")
    assert run(model.path, patchy, tmp_path / "map.tif", "--suggest", "3", *more) == 0
    assert len(suggested(tmp_path / "map.tif")) == 3
    assert len(geopandas.read_file(areas, layer="areas")) > 3
    known = read_json(tmp_path / "map_statistics.json")["run"]["products"]
    assert len(known) == 3 and None not in known.values()


def test_a_map_that_was_moved_is_resumed(tmp_path, patchy):
    model = make_model(tmp_path / "m.pth")
    given, first = ("--suggest", "4"), tmp_path / "k1" / "p.tif"
    assert run(model.path, patchy, first, *given) == 0
    second = first.parent.rename(tmp_path / "k2") / first.name
    before = second.with_name("p_suggestions.gpkg").read_bytes()
    assert run(model.path, patchy, second, *given, "--resume") == 0
    assert second.with_name("p_suggestions.gpkg").read_bytes() == before
    # as earlier runs named it: from the root
    statistics = second.with_name("p_statistics.json")
    report = read_json(statistics)
    products = report["run"]["products"]
    report["run"]["products"] = {str(second.parent / k): products[k] for k in products}
    statistics.write_text(json.dumps(report))
    assert run(model.path, patchy, second, *given, "--resume") == 0
    assert second.with_name("p_suggestions.gpkg").read_bytes() == before


def test_cells_of_combined_dates_and_of_a_map_of_codes_have_the_classes_of_the_map(
    tmp_path, patchy
):
    model = make_model(tmp_path / "m.pth", class_codes=[10, 20, 30, 400])
    later = write_scene(tmp_path / "b.tif", noise(100, 90, seed=3), DESCRIPTIONS)
    output, more = tmp_path / "map.tif", ("--combine", "mean", "--write_codes")
    assert run(model.path, [patchy, later], output, "--suggest", "4", *more) == 0
    table, classes = suggested(output), read_map(output)
    for cell, name in zip(cells_of(table), table.class_name):
        values, counts = np.unique(classes[cell_window(*cell)], return_counts=True)
        assert [10, 20, 30, 400].index(values[counts.argmax()]) == NAMES.index(name)


def test_the_style_shows_the_cells_by_rank(tmp_path, patchy):
    model, output = make_model(tmp_path / "m.pth"), tmp_path / "map.tif"
    assert run(model.path, patchy, output, "--suggest", "3") == 0
    with closing(sqlite3.connect(tmp_path / "map_suggestions.gpkg")) as base:
        (style,) = base.execute("SELECT styleQML FROM layer_styles").fetchone()
    renderer = ElementTree.fromstring(style.split(">", 1)[1]).find("renderer-v2")
    assert renderer.get("attr") == 'to_string("rank")'
    categories = renderer.findall("categories/category")
    assert [one.get("value") for one in categories] == ["1", "2", "3"]


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_cell_is_the_brightest_whatever_their_number(tmp_path, patchy, count):
    model, output = make_model(tmp_path / "m.pth"), tmp_path / "map.tif"
    assert run(model.path, patchy, output, "--suggest", str(count)) == 0
    with closing(sqlite3.connect(tmp_path / "map_suggestions.gpkg")) as base:
        (style,) = base.execute("SELECT styleQML FROM layer_styles").fetchone()
    root = ElementTree.fromstring(style.split(">", 1)[1])
    first = ElementTree.tostring(root.find(".//symbol[@name='0']"), "unicode")
    assert ",".join(map(str, RAMP[-1])) in first


def test_what_cannot_be_suggested_is_refused_before_any_work(
    land, water, tmp_path, patchy, batches, capsys
):
    output = tmp_path / "map.tif"
    told = "land.pth does not tell the size of its training patches; give --cell_size"
    with pytest.raises(SystemExit):
        run(land.path, patchy, output, "--suggest", "3")
    assert told in capsys.readouterr().err
    scene = write_scene(tmp_path / "x.tif", noise(64, 64), DESCRIPTIONS, crs=None)
    assert run(land.path, scene, output, "--suggest", "3", "--cell_size", "16") == 1
    assert "x.tif has no CRS; assign one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(land.path, patchy, output, "--cell_size", "16")
    assert "--suggest beside it" in capsys.readouterr().err
    assert not batches
    assert run(land.path, patchy, output, "--suggest", "3", "--check") == 1
    assert told in capsys.readouterr().err and not output.exists()
    assert run(water.path, patchy, output, "--suggest", "3", "--cell_size", "16") == 0
    assert set(suggested(output).class_name) == {"background", "foreground"}
