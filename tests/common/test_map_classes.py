"""What the values of a map stand for: its type, its tags, its attribute table."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from helpers import write_raster

from common import MISSING
from common.errors import OptionError, RasterError
from common.map_classes import (
    class_numbers,
    classes_of_map,
    map_class_tags,
    values_of_codes,
)
from common.styles import add_class_table, read_class_table

NAMES, COLOURS = ["water", "<forêt>", "town"], [(0, 0, 255), (0, 128, 0), (9, 9, 9)]


@pytest.fixture
def raster(tmp_path):
    return write_raster(tmp_path / "map.tif", np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize(
    "codes, dtype, nodata",
    [
        ([0, 254], "uint8", 255),
        ([255, 254, 7], "uint8", 253),
        (list(range(255)), "uint8", 255),
        (list(range(256)), "uint16", 65535),
        ([111, 512], "uint16", 65535),
        ([65535, 0], "uint16", 65534),
        ([-1, 300], "int16", 32767),
        ([-1, 32767], "int16", 32766),
        ([65536, 1], "int32", 2**31 - 1),
        ([-40000, 2**31 - 1], "int32", 2**31 - 2),
    ],
)
def test_the_smallest_type_that_holds_all_codes_and_a_nodata_value_is_taken(
    codes, dtype, nodata
):
    found = values_of_codes(codes)
    assert (found.dtype, found.nodata) == (dtype, nodata)
    classes = np.append(np.arange(len(codes)), 65535).astype(np.uint16)
    written = found.of_numbers(classes, 65535)
    assert written.dtype == dtype and written.tolist() == [*codes, nodata]
    numbers = class_numbers(written, found.values)
    assert numbers.tolist() == [*range(len(codes)), MISSING]


@pytest.mark.parametrize(
    "codes, reason",
    [
        ([1, "wheat"], "are texts (wheat)"),
        ([4, 4], "have one code"),
        ([0, 2**31], "from 0 to 2147483648 do not fit into 32 bits"),
    ],
)
def test_codes_that_a_map_cannot_hold_are_refused(codes, reason):
    with pytest.raises(OptionError) as error:
        values_of_codes(codes)
    assert str(error.value).startswith("--write_codes: ") and reason in str(error.value)


@pytest.mark.parametrize("values", [None, [-4, 300, 9]])
@pytest.mark.parametrize("codes", [[0, 1, 2], [-4, 300, 9], [7, "a", "b"]])
def test_tags_and_attribute_table_each_say_what_values_stand_for(raster, codes, values):
    held = values or [0, 1, 2]
    expected = dict(zip(held, zip(range(3), codes, NAMES)))
    add_class_table(raster.with_name("map.tif.aux.xml"), NAMES, COLOURS, codes, values)
    as_texts = any(isinstance(code, str) for code in codes)
    with rasterio.open(raster, "r+") as file:
        in_table = classes_of_map(file)
        file.update_tags(**map_class_tags(NAMES, codes, values))
        assert classes_of_map(file) == expected and list(in_table) == held
    if as_texts:  # a column has one type
        expected = {v: (n, str(c), name) for v, (n, c, name) in expected.items()}
    assert in_table == expected


def test_a_raster_without_tags_and_table_has_no_classes(raster):
    with rasterio.open(raster) as file:
        assert classes_of_map(file) is None
    raster.with_name("map.tif.aux.xml").write_text("<PAMDataset/>")
    with rasterio.open(raster) as file:
        assert classes_of_map(file) is None


def test_values_of_a_table_of_another_program_are_numbers_and_codes(raster):
    columns = [("VALUE_", 1, 5), ("Count", 0, 1), ("Label", 2, 2)]
    defined = "".join(
        f"<FieldDefn index='{i}'><Name>{name}</Name><Type>{kind}</Type>"
        f"<Usage>{usage}</Usage></FieldDefn>"
        for i, (name, kind, usage) in enumerate(columns)
    )
    raster.with_name("map.tif.aux.xml").write_text(
        "<PAMDataset><PAMRasterBand band='1'><GDALRasterAttributeTable>"
        f"{defined}<Row index='0'><F>30.0</F><F>9</F><F>crop</F></Row>"
        "<Row index='1'><F>10</F><F>9</F><F>tree</F></Row>"
        "</GDALRasterAttributeTable></PAMRasterBand></PAMDataset>"
    )
    with rasterio.open(raster) as file:
        assert classes_of_map(file) == {10: (10, 10, "tree"), 30: (30, 30, "crop")}


def test_tags_and_tables_that_contradict_themselves_are_an_error(raster):
    path = raster.with_name("map.tif.aux.xml")
    add_class_table(path, NAMES, COLOURS, None, [5, 5, 6])
    with rasterio.open(raster) as file, pytest.raises(RasterError, match="contradict"):
        classes_of_map(file)
    path.write_text("<PAMDataset>")
    with pytest.raises(RasterError, match=r"map\.tif\.aux\.xml is no readable XML"):
        read_class_table(path)
    path.unlink()
    with rasterio.open(raster, "r+") as file:
        file.update_tags(**map_class_tags(NAMES, [1, 2], None))
        with pytest.raises(RasterError, match="contradict"):
            classes_of_map(file)


def test_category_names_stand_at_their_values_and_only_where_these_are_few(raster):
    path = raster.with_name("map.tif.aux.xml")
    add_class_table(path, NAMES, COLOURS, None, [4, 0, 2])
    text = path.read_text(encoding="utf-8")
    listed = ["&lt;forêt&gt;", None, "town", None, "water"]
    assert text.count("<Category") == 1 + 5
    assert (
        "".join(
            f"<Category>{one}</Category>" if one else "<Category />" for one in listed
        )
        in text
    )
    for values in ([-4, 0, 2], [4, 0, 256]):
        add_class_table(path, NAMES, COLOURS, None, values)
        assert "<Category" not in path.read_text(encoding="utf-8")
