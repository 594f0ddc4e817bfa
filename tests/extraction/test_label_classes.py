"""Which values of a label are which class: merged ones, names, all others, pictures, points."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import rasterio
from shapely import LineString, Point, box
from site_helpers import CRS, LEFT, RIGHT, SIZE, TRANSFORM, classes, refusal, run

from common.labels import class_codes_of, class_colours_of

CODES = np.array([0, 3, 7, 9, 255], "uint8")


def check(patches, expected: np.ndarray) -> None:
    assert patches
    for patch in patches.values():
        assert np.array_equal(patch.label, expected[patch.place()])


def codes_of(patch) -> list:
    with rasterio.open(patch.label_path) as file:
        return class_codes_of(file)


def numbered(label: np.ndarray, mapping: dict, rest: int) -> np.ndarray:
    return np.vectorize(lambda value: mapping.get(value, rest))(label)


# --- the grammar on rasters -----------------------------------------------------------------------


def test_values_are_merged_and_named(site):
    label = CODES[classes(5)]
    site.draw_label(label)
    values = ["--label_values", "7=wood,3+9", "--save_metadata"]
    patches = site.extract(*values)
    check(patches, numbered(label, {7: 0, 3: 1, 9: 1}, 255))
    assert patches["patch_001"].class_names == ["wood", "3+9"]
    assert codes_of(patches["patch_001"]) == [7, 3]
    assert site.metadata()["label_values"] == [7, [3, 9]]


def test_all_other_values_are_the_last_class_but_for_nodata_and_255(site):
    label = CODES[classes(5)]
    site.draw_label(label, nodata=9)
    patches = site.extract("--label_values", "7=wood,3", "--other", "rest")
    check(patches, numbered(label, {7: 0, 3: 1, 9: 255, 255: 255}, 2))
    assert patches["patch_001"].class_names == ["wood", "3", "rest"]
    assert codes_of(patches["patch_001"]) == [7, 3, 0]


def test_names_may_hold_commas_in_quotes(site):
    site.draw_label(classes(2))
    patch = site.extract("--class_names", '"wheat, soft",b')["patch_001"]
    assert patch.class_names == ["wheat, soft", "b"]


def test_classes_come_from_the_lines_of_a_file(site, tmp_path):
    site.draw_label(CODES[classes(5)])
    file = tmp_path / "classes.txt"
    file.write_text("7=wood, old\n3+9=field\n", encoding="utf-8")
    patch = site.extract("--label_values", f"@{file}")["patch_001"]
    assert patch.class_names == ["wood, old", "field"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--other", "rest"], "--label_values with it"),
        (
            ["--label_values", "1=a,2", "--class_names", "x,y"],
            "no names in --label_val",
        ),
        (["--label_values", "1,2", "--other", "2"], "a name that no other class has"),
        (["--label_values", "1,2", "--class_names", "a,b", "--other", "b"], "no other"),
        (["--class_names", "a,a"], "--class_names a,a: a is given twice"),
        (["--label_values", "1"], "at least two classes"),
        (["--label_buffer", "5"], "a vector label with it"),
        (["--label_crs", "EPSG:4326"], "a vector label with it"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(site, capsys, words, expected):
    site.draw_label(classes(2))
    assert run(*site.words(*words)) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_one_class_against_all_others_is_two_classes(site):
    label = CODES[classes(5)]
    site.draw_label(label)
    patches = site.extract("--label_values", "7=wood", "--other", "no wood")
    check(patches, numbered(label, {7: 0, 255: 255}, 1))


@pytest.mark.parametrize(("values", "dtype"), [("255,7", "uint8"), ("7", "uint16")])
def test_255_is_a_class_where_it_is_named_or_one_value_of_many(site, values, dtype):
    label = CODES[classes(5)].astype(dtype)
    site.draw_label(label)
    patches = site.extract("--label_values", values, "--other", "rest")
    order = {int(value): n for n, value in enumerate(values.split(","))}
    check(patches, numbered(label, order, len(order)))


# --- pictures ------------------------------------------------------------------------------------


def painted(numbers: np.ndarray) -> np.ndarray:
    """A picture (3, H, W) of class numbers: red, green, blue, black."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], "uint8")
    return colours[numbers].transpose(2, 0, 1)


def test_colours_of_a_picture_are_classes(site):
    numbers = classes(4).astype(int)
    site.draw_label(painted(numbers))
    values = "#00FF00=wood,ff0000+000000=town"
    patches = site.extract("--label_values", values, "--other", "rest")
    check(patches, numbered(numbers, {1: 0, 0: 1, 3: 1}, 2))
    patch = patches["patch_001"]
    assert patch.class_names == ["wood", "town", "rest"]
    assert codes_of(patch) == ["00ff00", "ff0000", "rest"]
    with rasterio.open(patch.label_path) as file:
        assert class_colours_of(file)[:2] == [(0, 255, 0), (255, 0, 0)]


def test_without_values_the_colours_of_a_picture_are_listed(site, capsys):
    site.draw_label(painted(classes(3).astype(int)))
    line = refusal(capsys, site)
    assert "is a picture, whose classes are colours" in line
    assert all(text in line for text in ("ff0000", "00ff00", "0000ff"))
    assert run(*site.words("--label_values", "1,2")) == 2
    assert "--label_values 1,2: " in capsys.readouterr().err.splitlines()[-1]


def test_names_and_the_class_of_all_others_go_together(site):
    label = CODES[classes(5)]
    site.draw_label(label)
    named = "--class_names", "wood,field", "--other", "rest"
    patches = site.extract("--label_values", "7,3", *named)
    check(patches, numbered(label, {7: 0, 3: 1, 255: 255}, 2))
    assert patches["patch_001"].class_names == ["wood", "field", "rest"]


# --- points, lines, texts ------------------------------------------------------------------------


def ground(column: float, row: float) -> tuple[float, float]:
    return TRANSFORM * (column, row)


def write_csv(site, head: str, rows) -> None:
    site.label = site.folder / "points.csv"
    lines = [",".join(map(str, row)) for row in rows]
    site.label.write_text("\n".join([head, *lines]), encoding="utf-8")


def test_points_of_a_csv_table_label_their_pixels(site):
    places = [ground(3.5, 4.5), ground(20.5, 7.5)]
    write_csv(site, "kind,x,y", [("oat", *places[0]), ("rye", *places[1])])
    expected = np.full((SIZE, SIZE), 255)
    expected[4, 3], expected[7, 20] = 0, 1
    options = "--label_column", "kind"
    patches = site.extract(*options, "--label_crs", CRS, "--min_valid", 0)
    check(patches, expected)
    assert next(iter(patches.values())).class_names == ["oat", "rye"]
    degrees = geopandas.GeoSeries([Point(p) for p in places], crs=CRS)
    degrees = degrees.to_crs("EPSG:4326")
    rows = zip(("oat", "rye"), degrees.x, degrees.y)
    write_csv(site, "kind,Lon,Lat", rows)
    check(site.extract(*options, "--overwrite"), expected)


def test_a_buffer_labels_the_ground_around_points_and_lines(site):
    shapes = [Point(8, 8), LineString([(20, 30), (40, 30)]), box(0, 40, 10, 48)]
    site.draw_label_shapes(shapes, kind=[1, 2, 3])
    patches = site.extract("--label_column", "kind", "--label_buffer", 30)
    columns, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
    centres = geopandas.points_from_xy(columns.ravel(), rows.ravel())
    expected = np.full(SIZE * SIZE, 255)
    near = np.zeros(SIZE * SIZE, bool)
    for shape, number, reach in zip(shapes, (1, 2, 3), (3, 3, 0)):
        away = centres.distance(shape)
        expected[away <= reach] = number
        near |= np.abs(away - reach) < 0.05  # a buffer is a polygon, not a circle
    expected = expected.reshape(SIZE, SIZE)
    for patch in patches.values():
        sure = ~near.reshape(SIZE, SIZE)[patch.place()]
        assert np.array_equal(patch.label[sure], expected[patch.place()][sure])


def test_points_without_a_column_and_buffers_of_polygons_are_refused(site, capsys):
    site.draw_label_shapes([Point(8, 8)], kind=["a"])
    assert run(*site.words()) == 2
    assert "with --label_column (kind)" in capsys.readouterr().err.splitlines()[-1]
    site.draw_label_shapes([LEFT], kind=["a"])
    for option in ("--label_buffer", "5"), ("--label_crs", CRS):
        assert run(*site.words("--label_column", "kind", *option)) == 2
        assert option[0] in capsys.readouterr().err.splitlines()[-1]


def test_texts_are_merged_and_all_others_are_a_class(site):
    far, empty = box(0, 45, 48, 48), box(0, 0, 3, 3)
    texts = ["wood, old", "lake", "road", " "]
    site.draw_label_shapes([LEFT, RIGHT, far, empty], kind=texts)
    values = '"wood, old"+lake=green'
    options = "--label_column", "kind", "--label_values", values, "--other", "rest"
    patches = site.extract(*options)
    from test_scene_labels import burnt

    expected = burnt((LEFT, 0), (RIGHT, 0), (far, 1), (empty, 255), outside=255)
    check(patches, expected)
    assert patches["patch_001"].class_names == ["green", "rest"]
    assert codes_of(patches["patch_001"]) == ["wood, old", "rest"]


def test_merged_polygons_that_overlap_lose_no_ground(site, capsys):
    site.draw_label_shapes([LEFT, LEFT], kind=[5, 6])
    options = "--label_column", "kind", "--label_values", "5+6=a,7=b"
    site.extract(*options)
    assert "different classes overlap" not in capsys.readouterr().err
    site.extract("--label_column", "kind", "--label_values", "5=a,6=b", "--overwrite")
    err = capsys.readouterr().err
    assert "polygons of different classes overlap" in err and "a 100.0%" in err
