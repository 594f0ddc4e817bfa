"""Classes by the texts of a column: their encoding, their spelling, ground of several of them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import geopandas
import numpy as np
import pytest
from shapely import Polygon, box
from site_helpers import LEFT, RIGHT, SIZE, Site, centres_inside, run, write_cells

from common.shapefiles import guessed_encoding
from common.vector_labels import hidden_areas
from common.vectors import read_vector

fault = pytest.mark.fault
NAMES = ["Forêt", "Gewässer"]


def lines_of(site: Site, capsys, *words) -> list[str]:
    """What a run by the texts of the column ``kind`` says on stderr."""
    capsys.readouterr()
    assert run(*site.words("--label_column", "kind", "--overwrite", *words)) == 0
    return capsys.readouterr().err.splitlines()


# --- encoding --------------------------------------------------------------------------------


def write_shapefile(
    folder: Path, names=NAMES, encoding="UTF-8", page=0, **more
) -> Path:
    """A shapefile that does not say how its texts are encoded."""
    path = folder / "label.shp"
    columns = {"kind": names, **more}
    cells = [LEFT, RIGHT][: len(names)]
    plain = write_cells(folder / "plain.gpkg", cells, **columns)
    geopandas.read_file(plain).to_file(path, encoding=encoding)
    path.with_suffix(".cpg").unlink()
    dbf = bytearray(path.with_suffix(".dbf").read_bytes())
    dbf[29] = page
    path.with_suffix(".dbf").write_bytes(dbf)
    return path


@fault(49)
@pytest.mark.parametrize("page", [0, 0x57])
@pytest.mark.parametrize("encoding", ["UTF-8", "CP1252"])
def test_names_in_a_shapefile_without_a_cpg_are_read_as_they_were_written(
    site, capsys, encoding, page
):
    site.label = write_shapefile(site.folder, encoding=encoding, page=page)
    lines = lines_of(site, capsys)
    assert site.patches()["patch_001"].class_names == NAMES
    doubts = [
        line for line in lines if "does not say how its texts are encoded" in line
    ]
    assert len(doubts) == (encoding != "UTF-8")
    for line in doubts:
        assert "ISO-8859-1" in line and "'Forêt'" in line and ".cpg" in line


@fault(49)
def test_a_doubtful_encoding_is_settled_by_a_cpg(site, capsys):
    names = ["Δάσος", "λίμνη"]
    site.label = write_shapefile(site.folder, names, encoding="CP1253")
    assert any("'ÄÜóïò'" in line for line in lines_of(site, capsys))
    site.label.with_suffix(".cpg").write_text("1253")
    assert not any("encoded" in line for line in lines_of(site, capsys))
    assert site.patches()["patch_001"].class_names == names


@fault(49)
def test_a_zipped_shapefile_is_read_likewise(site, tmp_path):
    path = write_shapefile(tmp_path)
    with zipfile.ZipFile(tmp_path / "label.zip", "w") as archive:
        for ending in (".shp", ".shx", ".dbf", ".prj"):
            archive.write(path.with_suffix(ending), f"label{ending}")
    assert read_vector(str(tmp_path / "label.zip")).kind.tolist() == NAMES


@fault(49)
@pytest.mark.parametrize("stated", [True, False])
def test_a_letter_that_the_width_of_a_field_has_cut_is_left_out(tmp_path, stated):
    path = write_shapefile(tmp_path, Bodenwerte=[1, 2])
    dbf = path.with_suffix(".dbf").read_bytes()
    dbf = dbf.replace(b"Bodenwerte", b"Bodenwert\xc3")
    path.with_suffix(".dbf").write_bytes(dbf.replace("ê".encode() + b"t", b"t \xc3"))
    if stated:
        path.with_suffix(".cpg").write_text("UTF-8")
    table = read_vector(str(path))
    assert {"kind", "Bodenwert"} < set(table.columns)
    assert table.kind.tolist() == ["Fort ", NAMES[1]]


@fault(49)
def test_a_cpg_that_is_wrong_is_said_to_be(site, capsys):
    site.label = write_shapefile(site.folder, encoding="CP1252")
    site.label.with_suffix(".cpg").write_text("UTF-8")
    assert run(*site.words("--label_column", "kind")) == 1
    assert "texts in another encoding than UTF-8" in capsys.readouterr().err


def test_an_encoding_that_is_stated_or_does_not_matter_is_not_guessed(tmp_path):
    path = write_shapefile(tmp_path, ["wood", "lake"])
    assert guessed_encoding(str(path), "label") is None
    path = write_shapefile(tmp_path, encoding="CP1252", page=0x03)
    assert guessed_encoding(str(path), "label") is None
    assert guessed_encoding(str(tmp_path / "plain.gpkg"), "plain") is None


# --- spelling --------------------------------------------------------------------------------


@fault(49)
def test_names_that_differ_by_case_or_blanks_are_reported_with_numbers(site, capsys):
    squares = [box(x, 0, x + 9, 48) for x in (0, 10, 20, 30)]
    site.draw_label_shapes(squares, kind=["Wald", "wald ", "Wald", "Wiese"])
    lines = lines_of(site, capsys)
    (line,) = (line for line in lines if "differ by case or blanks alone" in line)
    assert "'Wald' (2 polygons) and 'wald ' (1 polygons)" in line
    assert "Wiese" not in line and str(site.label) in line
    site.draw_label_shapes(squares, kind=["Wald", "Wald", "Wald", "Wiese"])
    assert not any("differ by" in line for line in lines_of(site, capsys))


# --- ground of several classes ---------------------------------------------------------------


def overlap_lines(site: Site, capsys, *words) -> list[str]:
    lines = lines_of(site, capsys, *words)
    return [line for line in lines if "polygons of different classes overlap" in line]


@fault(49)
@pytest.mark.parametrize("kinds", [["wood", "lake"], [1, 0]])
def test_ground_of_two_classes_is_reported_with_numbers(site, capsys, kinds):
    site.draw_label_shapes([LEFT, RIGHT], kind=kinds)
    (line,) = overlap_lines(site, capsys)
    shared = LEFT.intersection(RIGHT).area
    assert f"about {shared:,.0f} pixels" in line
    assert f"{kinds[0]} {shared / LEFT.area:.1%}" in line and f"{kinds[1]} " not in line
    site.draw_label_shapes([LEFT, RIGHT], kind=[kinds[0]] * 2)
    assert overlap_lines(site, capsys) == []


@fault(49)
def test_a_class_that_vanishes_is_named(site, capsys):
    site.draw_label_shapes([box(5, 5, 9, 9), box(0, 0, 48, 48)], kind=["pond", "field"])
    (line,) = overlap_lines(site, capsys)
    assert "about 16 pixels" in line and "pond 100.0%" in line


@fault(49)
def test_a_polygon_without_a_class_hides_the_one_below_it(site, capsys):
    words = ["--label_values", "wood,lake"]
    site.draw_label_shapes(
        [LEFT, RIGHT, box(0, 46, 9, 48)], kind=["wood", "road", "lake"]
    )
    (line,) = overlap_lines(site, capsys, *words)
    assert "wood " in line and "road" not in line
    site.draw_label_shapes(
        [RIGHT, LEFT, box(0, 46, 9, 48)], kind=["road", "wood", "lake"]
    )
    assert overlap_lines(site, capsys, *words) == []


@fault(49)
def test_neighbours_that_share_a_border_do_not_overlap(site, capsys):
    squares = [
        box(x, y, x + 7, y + 7) for x in range(0, 42, 7) for y in range(0, 42, 7)
    ]
    site.draw_label_shapes(squares, kind=[f"k{n % 5}" for n in range(len(squares))])
    assert overlap_lines(site, capsys) == []


def test_hidden_areas_are_those_of_the_pixels():
    rng = np.random.default_rng(0)
    corners = rng.uniform(-8, SIZE, (40, 2))
    shapes = [
        box(x, y, x + w, y + h)
        for (x, y), (w, h) in zip(corners, rng.uniform(3, 20, (40, 2)))
    ]
    kinds = rng.integers(0, 4, 40)
    near, outlines = np.arange(40), geopandas.GeoSeries(shapes)
    fine = 8  # parts of a pixel, to compare areas
    scaled = outlines.affine_transform([fine, 0, 0, fine, 0, 0])
    hidden, areas = hidden_areas(outlines, kinds, near, (SIZE, SIZE))
    inside = [centres_inside(s, fine * SIZE, fine * SIZE) for s in scaled]
    for number, mine in enumerate(inside):
        later = [inside[n] for n in range(number + 1, 40) if kinds[n] != kinds[number]]
        covered = np.any(later, axis=0) & mine if later else np.zeros_like(mine)
        assert abs(areas[number] - mine.sum() / fine**2) < 3
        assert abs(hidden[number] - covered.sum() / fine**2) < 3


def test_a_polygon_that_crosses_itself_is_measured(site, capsys):
    bow = [(0, 0), (40, 40), (40, 0), (0, 40)]
    site.draw_label_shapes([Polygon(bow), box(0, 0, 10, 48)], kind=["bow", "strip"])
    (line,) = overlap_lines(site, capsys)
    assert "bow " in line
