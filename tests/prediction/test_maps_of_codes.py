"""What the label held for the classes: in every output, and with ``--write_codes`` in the map."""

from __future__ import annotations

import json
from contextlib import suppress
from xml.etree import ElementTree

import geopandas
import numpy as np
import pytest
import rasterio
from geopandas.testing import assert_geodataframe_equal
from helpers import interrupt
from prediction_helpers import (
    TRANSFORM,
    make_pixel_model,
    noise,
    outcome,
    read_json,
    read_map,
    run,
    write_scene,
)
from shapely.geometry import box

from common.map_classes import classes_of_map
from common.styles import read_class_table

NAMES = ["water", "forêt", "bare soil", "town"]
CODES = [40, 255, 7, 0]
CODED = "--write_codes"


@pytest.fixture
def coded(land, tmp_path):
    """A function that writes ``land`` with codes of its classes."""

    def write(codes, name="coded.pth"):
        model = make_pixel_model(
            tmp_path / name,
            land.weights,
            land.bias,
            class_names=NAMES,
            class_codes=codes,
        )
        return model.path

    return write


def numbers_and_codes(land, coded, scene, folder, codes, *options):
    """A map of class numbers, the same one of codes, and the profile and tags of that."""
    model = coded(codes)
    assert run(model, scene, folder / "plain.tif", *options) == 0
    assert run(model, scene, folder / "map.tif", CODED, *options) == 0
    with rasterio.open(folder / "map.tif") as file:
        return read_map(folder / "plain.tif"), file.read(1), file.profile, file.tags()


@pytest.mark.parametrize(
    "codes, dtype, nodata",
    [
        (CODES, "uint8", 254),
        ([311, 211, 0, 65535], "uint16", 65534),
        ([-9999, 211, 5, 1], "int16", 32767),
        ([70000, 5, 1, -7], "int32", 2**31 - 1),
    ],
)
def test_a_map_of_codes_holds_them_where_the_map_has_the_numbers(
    land, coded, scene, tmp_path, codes, dtype, nodata
):
    plain, found, profile, tags = numbers_and_codes(land, coded, scene, tmp_path, codes)
    assert (profile["dtype"], profile["nodata"]) == (dtype, nodata)
    table = np.full(256, nodata)
    table[:4] = codes
    np.testing.assert_array_equal(found, table[plain])
    assert (found == nodata).any() and len(np.unique(found)) == 5
    assert json.loads(tags["CLASS_CODES"]) == json.loads(tags["CLASS_VALUES"]) == codes
    with rasterio.open(tmp_path / "map.tif") as file:
        assert classes_of_map(file) == {
            code: (number, code, NAMES[number]) for number, code in enumerate(codes)
        }


def test_names_and_colours_of_a_map_of_codes_stand_at_the_codes(
    land, coded, scene, tmp_path
):
    numbers_and_codes(land, coded, scene, tmp_path, CODES)
    with (
        rasterio.open(tmp_path / "plain.tif") as plain,
        rasterio.open(tmp_path / "map.tif") as file,
    ):
        before, after = plain.colormap(1), file.colormap(1)
    assert [after[code] for code in CODES] == [before[number] for number in range(4)]
    rows = read_class_table(tmp_path / "map.tif.aux.xml")
    assert [row[:4] for row in rows] == list(zip(CODES, range(4), CODES, NAMES))
    assert [(*row.colour, 255) for row in rows] == [after[code] for code in CODES]
    style = ElementTree.parse(tmp_path / "map.qml").iter("paletteEntry")
    assert [int(entry.get("value")) for entry in style] == CODES
    beside = ElementTree.parse(tmp_path / "map.tif.aux.xml").getroot()
    listed = [node.text for node in beside.iter("Category")]
    assert {k: text for k, text in enumerate(listed) if text} == dict(zip(CODES, NAMES))
    rows = read_class_table(tmp_path / "plain.tif.aux.xml")
    assert [row[:4] for row in rows] == list(zip(range(4), range(4), CODES, NAMES))


def test_codes_below_zero_have_a_style_and_a_table_but_no_colour_table(
    land, coded, scene, tmp_path
):
    codes = [-9999, 211, 5, 1]
    numbers_and_codes(land, coded, scene, tmp_path, codes)
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.colorinterp[0].name == "gray"
    style = ElementTree.parse(tmp_path / "map.qml").iter("paletteEntry")
    assert [int(entry.get("value")) for entry in style] == codes
    assert [
        row.value for row in read_class_table(tmp_path / "map.tif.aux.xml")
    ] == codes


@pytest.mark.parametrize("options", [[], ["--sieve", "900", "--min_area", "1500"]])
def test_what_is_made_from_a_map_of_codes_is_that_of_the_map_of_numbers(
    land, coded, scene, tmp_path, options
):
    model = coded(CODES)
    for name, more in (("a", []), ("b", [CODED])):
        folder = tmp_path / name
        areas = str(folder / "areas.gpkg")
        made = ["--quicklook", "--save_confidence", "--polygons", areas, *options]
        folder.mkdir()
        assert run(model, scene, folder / "map.tif", *made, *more) == 0
    first, second = (tmp_path / "a", tmp_path / "b")
    tables = [
        geopandas.read_file(one / "areas.gpkg", layer="areas")
        for one in (first, second)
    ]
    assert_geodataframe_equal(*tables)
    assert tables[0].class_code.tolist() == [CODES[k] for k in tables[0]["class"]]
    assert tables[0].class_name.tolist() == [NAMES[k] for k in tables[0]["class"]]
    before, after = (read_json(one / "map_statistics.json") for one in (first, second))
    assert before["classes"] == after["classes"]
    assert [one["code"] for one in after["classes"]] == CODES
    pictures = [(one / "map_quicklook.png").read_bytes() for one in (first, second)]
    assert pictures[0] == pictures[1]
    same = [(one / "map_confidence.tif").read_bytes() for one in (first, second)]
    assert same[0] == same[1]
    table = np.array([*CODES, *[254] * 252])
    held = read_map(second / "map.tif")
    np.testing.assert_array_equal(held, table[read_map(first / "map.tif")])


def test_a_cloud_optimized_map_of_codes_and_an_area_of_dates_hold_the_codes(
    land, coded, tmp_path
):
    model, codes = coded([-9999, 211, 5, 1]), {-9999, 211, 5, 1}
    scenes = [
        write_scene(tmp_path / f"{n}.tif", noise(600, 70, seed=n), nodata=0)
        for n in range(2)
    ]
    left, top = TRANSFORM * (0, 0)
    park = geopandas.GeoSeries(
        [box(left, top - 5900, left + 650, top)], crs="EPSG:32631"
    )
    park.to_file(tmp_path / "park.gpkg")
    output, area = tmp_path / "map.tif", str(tmp_path / "park.gpkg")
    options = ["--format", "cog", "--combine", "mean", "--area", area]
    assert run(model, scenes, output, CODED, *options) == 0
    with rasterio.open(output) as file:
        assert file.shape == (590, 65) and file.dtypes == ("int16",)
        assert file.overviews(1)
        small = file.read(1, out_shape=(295, 33))
        assert set(np.unique(small)) <= codes and list(classes_of_map(file)) == [
            -9999, 211, 5, 1,
        ]  # fmt: skip
    assert read_class_table(f"{output}.aux.xml")[0].value == -9999


def test_a_resumed_map_of_codes_is_that_of_one_run_and_the_option_may_not_change(
    coded, tall_scene, tmp_path, monkeypatch, capsys
):
    model, output = coded(CODES), tmp_path / "out" / "map.tif"
    expected = tmp_path / "expected"
    assert run(model, tall_scene, expected / "map.tif", CODED) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.rowstore.RowStore.write", 3)
        assert run(model, tall_scene, output, CODED) == 130
    assert run(model, tall_scene, output, "--resume") == 1
    assert "another --write_codes (True, now False)" in capsys.readouterr().err
    assert run(model, tall_scene, output, "--resume", CODED) == 0
    left, right = outcome(expected), outcome(output.parent)
    for name in ("map.tif", "map.tif.aux.xml", "map.qml"):
        assert left[name] == right[name]
    assert run(model, tall_scene, output, "--resume") == 1  # finished by now


@pytest.mark.parametrize("codes", [[40, 300, 7, 0], [-9999, 211, 5, 1]])
def test_a_mosaic_of_maps_of_codes_holds_them_with_names_and_style(
    coded, tmp_path, codes
):
    pixels, scenes = noise(64, 128), []
    for k in range(2):
        place = {"transform": TRANSFORM * TRANSFORM.translation(64 * k, 0)}
        tile = pixels[:, :, 64 * k : 64 * k + 64]
        scenes.append(write_scene(tmp_path / f"tile{k}.tif", tile, **place))
    output = tmp_path / "maps"
    assert run(coded(codes), scenes, output, CODED) == 0
    maps = [output / f"tile{k}_prediction.tif" for k in range(2)]
    with rasterio.open(output / "mosaic.vrt") as file, rasterio.open(maps[0]) as one:
        np.testing.assert_array_equal(
            file.read(1), np.hstack([read_map(path) for path in maps])
        )
        assert (file.dtypes, file.nodata) == (one.dtypes, one.nodata)
        assert classes_of_map(file) == classes_of_map(one)
        assert file.colorinterp == one.colorinterp
        if min(codes) >= 0:
            colours, expected = file.colormap(1), one.colormap(1)
            assert [colours[code] for code in codes] == [expected[c] for c in codes]
    style = ElementTree.parse(output / "mosaic.qml").iter("paletteEntry")
    assert [int(entry.get("value")) for entry in style] == codes


def test_maps_of_codes_and_maps_of_numbers_are_not_joined(coded, tmp_path, capsys):
    model, output = coded(CODES), tmp_path / "maps"
    scenes = [write_scene(tmp_path / f"{k}.tif", noise(40, 40)) for k in range(2)]
    assert run(model, scenes, output) == 0
    assert (output / "mosaic.vrt").exists()
    assert run(model, scenes, output, CODED, "--part", "1/2", "--overwrite") == 0
    assert "hold other values for the classes" in capsys.readouterr().err
    assert not list(output.glob("mosaic.*"))


def test_codes_that_are_texts_are_refused_before_any_work_and_stand_in_the_outputs(
    coded, scene, tmp_path, capsys
):
    codes = ["W", "F", "B", "T"]
    model, output = coded(codes), tmp_path / "map.tif"
    for more in ([], ["--check"]):
        with suppress(SystemExit):
            assert run(model, scene, output, CODED, *more) == 1
        assert (
            "codes of the model's classes are texts (W, F, B, T)"
            in capsys.readouterr().err
        )
        assert not output.exists()
    areas = tmp_path / "areas.gpkg"
    assert run(model, scene, output, "--polygons", str(areas)) == 0
    table = geopandas.read_file(areas, layer="areas")
    assert table.class_code.tolist() == [codes[k] for k in table["class"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["class", "code", "name"]
    assert [line.split()[1] for line in lines[2:6]] == codes
    with rasterio.open(output) as file:
        assert [one.code for one in classes_of_map(file).values()] == codes


def test_codes_that_are_the_numbers_are_no_column_of_the_printed_table(
    land, scene, tmp_path, capsys
):
    assert run(land.path, scene, tmp_path / "map.tif") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["class", "name"]
    with rasterio.open(tmp_path / "map.tif") as file:
        assert "CLASS_CODES" not in file.tags() and "CLASS_VALUES" not in file.tags()


def test_of_models_with_other_codes_the_first_ones_count_and_a_line_says_so(
    land, coded, scene, tmp_path, capsys
):
    models = [coded(CODES), coded([1, 2, 3, 4], "other.pth")]
    assert run(models, scene, tmp_path / "map.tif", CODED) == 0
    assert "have the codes 1, 2, 3, 4" in capsys.readouterr().err
    assert set(np.unique(read_map(tmp_path / "map.tif"))) <= {*CODES, 254}
