"""The styles beside maps and layers, which live and end with them; that of a mosaic."""

from __future__ import annotations

from xml.etree import ElementTree

import geopandas
import numpy as np
import pytest
import rasterio
from prediction_helpers import (
    CRS,
    EVERYTHING,
    TRANSFORM,
    make_pixel_model,
    noise,
    outcome,
    read_map,
    run,
    write_scene,
)
from shapely.geometry import box

from common.styles import paletted_style, ramp_style
from common.vectors import add_style

NAMES = ["water", "forêt", "bare soil", "town"]


def colours_of(raster) -> list[tuple]:
    """The colour table of a map of four classes."""
    with rasterio.open(raster) as file:
        table = file.colormap(1)
    return [table[number][:3] for number in range(4)]


def style_of(raster) -> str:
    return paletted_style(NAMES, colours_of(raster))


def read(path) -> str:
    return path.read_text(encoding="utf-8")


def test_all_rasters_but_probabilities_have_a_style(land, scene, tmp_path):
    assert run(land.path, scene, tmp_path / "map.tif", *EVERYTHING) == 0
    styles = {path.name: read(path) for path in tmp_path.glob("*.qml")}
    share = ramp_style(0, 1)
    assert styles == {
        "map.qml": style_of(tmp_path / "map.tif"),
        "map_confidence.qml": share,
        "map_uncertainty.qml": share,
    }


def test_dates_are_a_ramp_from_one_to_their_number(land, scene, tmp_path):
    scenes, output = [scene] * 3, tmp_path / "map.tif"
    assert run(land.path, scenes, output, "--combine", "mean") == 0
    assert read(tmp_path / "map_dates.qml") == ramp_style(1, 3)


def test_a_deleted_style_comes_back_and_an_edited_one_stays(
    land, scene, tmp_path, batches
):
    output = tmp_path / "out" / "map.tif"
    assert run(land.path, scene, output, "--save_confidence") == 0
    before = outcome(output.parent)
    output.with_suffix(".qml").unlink()
    confidence = output.with_name("map_confidence.qml")
    confidence.write_text("edited in QGIS")
    batches.clear()
    assert run(land.path, scene, output, "--save_confidence", "--resume") == 0
    edited = {"map_confidence.qml": b"edited in QGIS"}
    assert outcome(output.parent) == before | edited and not batches
    assert run(land.path, scene, output, "--save_confidence", "--overwrite") == 0
    assert read(confidence) == ramp_style(0, 1)


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_style_that_no_run_has_made_is_replaced_with_overwrite_alone(
    land, scene, tmp_path, capsys, resume
):
    style = tmp_path / "map.qml"
    style.write_text("of somebody")
    assert run(land.path, scene, tmp_path / "map.tif", *resume) == 1
    error = capsys.readouterr().err
    assert f"{style} is there already" in error and "--overwrite" in error
    assert read(style) == "of somebody" and not (tmp_path / "map.tif").exists()
    assert run(land.path, scene, tmp_path / "map.tif", "--overwrite") == 0
    assert read(style) == style_of(tmp_path / "map.tif")


def test_an_area_with_a_table_of_styles_is_one_layer(land, tmp_path):
    scene = write_scene(tmp_path / "scene.tif", noise(60, 50))
    (left, top), (right, bottom) = TRANSFORM * (10, 10), TRANSFORM * (30, 20)
    area, part = tmp_path / "area.gpkg", box(left, bottom, right, top)
    geopandas.GeoDataFrame(geometry=[part], crs=CRS).to_file(area)
    add_style(area, "area", "<qgis/>")
    assert run(land.path, scene, tmp_path / "map.tif", "--area", str(area)) == 0
    assert read_map(tmp_path / "map.tif").shape == (10, 20)


def test_polygons_have_the_colours_of_the_map(land, scene, tmp_path):
    target = tmp_path / "map.gpkg"
    assert run(land.path, scene, tmp_path / "map.tif", "--polygons", str(target)) == 0
    styles = geopandas.read_file(target, layer="layer_styles")
    assert list(styles["f_table_name"]) == ["map"]
    root = ElementTree.fromstring(styles["styleQML"][0])
    fills = [node.get("v") for node in root.iter("prop") if node.get("k") == "color"]
    colours = colours_of(tmp_path / "map.tif")
    assert fills == ["{},{},{},255".format(*colour) for colour in colours]
    # the one beside it is that of the map
    assert read(tmp_path / "map.qml") == style_of(tmp_path / "map.tif")


# --- mosaic.qml ------------------------------------------------------------------------------


def pair_of_tiles(folder, shift: float = 0):
    """Two scenes side by side; the second ``shift`` pixels further."""
    scenes = []
    for number in range(2):
        place = TRANSFORM * TRANSFORM.translation(number * 40 + number * shift, 0)
        path = folder / "scenes" / f"tile{number}.tif"
        scenes.append(write_scene(path, noise(40, 40, seed=number), transform=place))
    return scenes


def test_a_mosaic_has_the_style_of_its_maps_and_an_edited_one_stays(land, tmp_path):
    scenes, maps = pair_of_tiles(tmp_path), tmp_path / "maps"
    style = maps / "mosaic.qml"
    assert run(land.path, scenes, maps) == 0
    expected = style_of(maps / "tile1_prediction.tif")
    assert read(style) == expected
    style.write_text("edited in QGIS")
    assert run(land.path, scenes, maps, "--resume") == 0
    assert read(style) == "edited in QGIS"
    # with other maps it is another mosaic, and of different grids none
    scenes = pair_of_tiles(tmp_path, 3)
    assert run(land.path, scenes, maps, "--overwrite") == 0
    assert read(style) == expected
    assert run(land.path, pair_of_tiles(tmp_path, 0.5), maps, "--overwrite") == 0
    assert not (maps / "mosaic.vrt").exists() and not style.exists()


def test_a_style_of_another_mosaic_stays(land, tmp_path, capsys):
    scenes, maps = pair_of_tiles(tmp_path), tmp_path / "maps"
    maps.mkdir()
    (maps / "mosaic.qml").write_text("of mosaic.tif")
    assert run(land.path, scenes, maps) == 0
    assert read(maps / "mosaic.qml") == "of mosaic.tif"
    assert "mosaic.qml is no style of mosaic.vrt and stays" in capsys.readouterr().err


def test_maps_of_different_classes_give_a_mosaic_without_a_style(
    land, models, tmp_path, capsys
):
    scenes, maps = pair_of_tiles(tmp_path), tmp_path / "maps"
    other = make_pixel_model(
        models / "other.pth", np.eye(3), np.zeros(3), class_names=list("abc")
    )
    assert run(other.path, scenes, maps, "--part", "1/2") == 0
    assert run(land.path, scenes, maps, "--part", "2/2") == 0
    assert "mosaic.vrt have different classes or colours" in capsys.readouterr().err
    assert not (maps / "mosaic.qml").exists()
