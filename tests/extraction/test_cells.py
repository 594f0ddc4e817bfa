"""Names of patches, cells that are no upright rectangles, and cells that give no patch."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from rasterio.transform import Affine
from shapely import GeometryCollection, LineString, MultiPolygon, Point, Polygon, box
from shapely.affinity import rotate
from site_helpers import (
    CRS,
    PATCH,
    TRANSFORM,
    centres_inside,
    classes,
    diamond,
    labelled_by,
    refusal,
    scene,
    tiles,
)

from common.errors import DatasetError, OptionError
from extraction.cells import cell_ids, cell_mask, cells_of
from extraction.cutting import resize_label
from extraction.pairing import list_scenes
from extraction.settings import ExtractionConfig

# --- names of the patches --------------------------------------------------------------------


def names(column: str | None = None, rows: int = 3, **columns) -> list[str]:
    geometry = [Point(i, i).buffer(1) for i in range(rows)]
    grid = geopandas.GeoDataFrame(columns, geometry=geometry, crs=CRS)
    return [f"patch_{text}" for text in cell_ids(grid, column, len("patch_"))]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, ["patch_001", "patch_002", "patch_003"]),
        ({"id": [7, 80, 9]}, ["patch_007", "patch_080", "patch_009"]),
        ({"Id": [7.0, 80.0, 9.0]}, ["patch_007", "patch_080", "patch_009"]),
        ({"cell_id": [5, 12345, 6]}, ["patch_00005", "patch_12345", "patch_00006"]),
        ({"name": ["north", "x1", "07"]}, ["patch_north", "patch_x1", "patch_007"]),
        ({"id": [4, 5, 6], "name": list("abc")}, [f"patch_00{i}" for i in (4, 5, 6)]),
        ({"id": [4, 4, 6], "name": list("abc")}, [f"patch_{i}" for i in "abc"]),
        ({"id": [1.0, None, 2.0]}, ["patch_001", "patch_002", "patch_003"]),
        ({"id": ["a", None, "b"]}, ["patch_001", "patch_002", "patch_003"]),
        ({"id": ["a/b", "a_b", "c"]}, ["patch_001", "patch_002", "patch_003"]),
        ({"other": [9, 8, 7]}, ["patch_001", "patch_002", "patch_003"]),
    ],
)
def test_patches_are_named_by_an_id_column_that_tells_all_cells_apart(
    columns, expected
):
    assert names(**columns) == expected


def test_row_numbers_are_as_wide_as_the_last_one():
    assert names(rows=1000)[::999] == ["patch_0001", "patch_1000"]


def test_an_id_column_can_be_named_in_any_case():
    assert names("plot", PLOT=["a", "b", "c"], id=[1, 2, 3]) == [
        "patch_a",
        "patch_b",
        "patch_c",
    ]


@pytest.mark.parametrize("ids", [["a", "b", "b"], ["a", None, "b"], ["a", "..", "b"]])
def test_a_named_id_column_that_does_not_tell_cells_apart_is_an_error(ids):
    with pytest.raises(DatasetError, match="--id_column plot: 1 ids are not unique"):
        names("plot", plot=ids)


def test_an_unknown_id_column_is_an_error_with_the_known_ones():
    with pytest.raises(OptionError, match=r"'plot_no'; did you mean 'plot_nr'\?"):
        names("plot_no", plot_nr=[1, 2, 3])


def test_ids_that_differ_by_leading_zeros_give_different_names():
    assert len(set(names(id=["1", "01", "2"]))) == 3


@pytest.mark.parametrize(
    "ids", [["a/b", "../x", "/etc/y"], ["..\\z", ".hidden", "a b"]]
)
def test_odd_ids_never_leave_the_folder(site, ids):
    site.draw_grid(tiles(3, 1), plot=ids)
    patches = site.extract("--id_column", "plot")
    assert len(patches) == 3
    assert all(name.replace("_", "").isalnum() for name in patches)
    written = [path for path in site.folder.rglob("*.tif") if "out" not in path.parts]
    assert sorted(path.name for path in written) == ["image.tif", "label.tif"]
    assert {path.name for path in site.out.iterdir()} == {"Patch"}


def test_ids_name_the_files_and_the_records(site):
    site.draw_grid(tiles(3, 1), plot=["b", "a", "c"])
    patches = site.extract("--id_column", "plot", "--save_metadata")
    assert list(patches) == ["patch_a", "patch_b", "patch_c"]
    assert patches["patch_a"].place()[1] == slice(16, 32)
    recorded = [record["name"] for record in site.metadata()["patches"]]
    assert recorded == ["patch_b", "patch_a", "patch_c"]


# --- cells that are no upright rectangle -----------------------------------------------------


@pytest.mark.parametrize("angle", [7.0, 30.0, 44.0, 63.0])
def test_labels_outside_a_rotated_cell_are_unlabelled(site, angle):
    cells = [rotate(cell, angle, origin=(24, 24)) for cell in tiles(2, 1, 15, 9, 14)]
    for cell in cells:
        site.draw_grid([cell])
        site.extract("--save_metadata", "--overwrite", size=8)
        (record,) = site.metadata()["patches"]
        left, top, width, height = record["window"]
        expected = centres_inside(cell)[top : top + height, left : left + width]
        assert expected.sum() == centres_inside(cell).sum()  # the window holds it all
        shrunk = resize_label(expected.astype("uint8"), 8)
        assert np.array_equal(site.patches()["patch_001"].labelled, shrunk == 1)
    assert not (centres_inside(cells[0]) & centres_inside(cells[1])).any()


def test_a_rotated_cell_is_labelled_inside_and_shown_whole(site):
    site.draw_grid([diamond(24, 24)])
    patch = site.only()
    inside = centres_inside(diamond(24, 24))[patch.place()]
    assert np.array_equal(patch.image, scene()[:, 16:32, 16:32])
    assert patch.valid.all()
    assert np.array_equal(patch.label[inside], classes()[patch.place()][inside])
    assert 100 < inside.sum() < 200
    assert np.all(patch.label[~inside] == 255)


def test_neighbouring_rotated_cells_share_no_label_and_leave_no_gap(site):
    centres = [(12 + 8 * i, 12 + 8 * j) for i in range(4) for j in range(i % 2, 4, 2)]
    site.draw_grid([diamond(x, y) for x, y in centres])
    patches = site.extract()
    assert len(patches) == 8
    count = labelled_by(patches.values())
    assert count.max() == 1
    assert np.all(count[15:25, 15:25] == 1)


def test_neighbouring_cells_that_are_slightly_rotated_share_no_label(site):
    site.draw_image(scene(height=64, width=96))
    cells = tiles(2, 1, side=40, left=8.4, top=8.4)
    site.draw_grid([rotate(cell, -0.15, origin=(8.4, 8.4)) for cell in cells])
    files = {"image": str(site.image), "label": str(site.label), "grid": str(site.grid)}
    config = ExtractionConfig(**files, output=str(site.out))
    count = np.zeros((64, 96), int)
    with rasterio.open(site.image) as image:
        for cell in cells_of(list_scenes(config)[0], config, image)[0]:
            rows, columns = cell.window.toslices()
            count[rows, columns] += cell_mask(cell)
    assert count.max() == 1


def test_a_cell_of_several_parts_is_labelled_in_all_of_them(site):
    parts = [box(16, 16, 22, 32), box(26, 16, 32, 28)]
    site.draw_grid([MultiPolygon(parts)])
    patch = site.only()
    expected = sum(centres_inside(part) for part in parts)[patch.place()]
    assert patch.place() == (slice(16, 32), slice(16, 32))
    assert np.array_equal(patch.labelled, expected == 1)


def test_a_hole_in_a_cell_is_unlabelled(site):
    ring = box(16, 16, 32, 32) - box(20, 20, 28, 28)
    site.draw_grid([ring])
    patch = site.only()
    assert np.array_equal(patch.labelled, centres_inside(ring)[patch.place()])
    assert patch.labelled.sum() == 256 - 64


def test_an_invalid_cell_is_repaired(site):
    bow = Polygon([(16, 16), (32, 31.8), (32, 20.3), (16, 32)])
    assert not bow.is_valid
    site.draw_grid([bow])
    patch = site.only()
    expected = centres_inside(shapely.make_valid(bow))[patch.place()]
    assert np.array_equal(patch.labelled, expected)


@pytest.mark.parametrize(
    "cell",
    [
        Polygon([(16, 16), (32, 32), (32, 16), (16, 32)]),  # the halves cancel out
        MultiPolygon([Polygon([(16, 16), (32, 16), (16, 32)])] * 2),  # counted twice
    ],
)
def test_an_invalid_cell_is_repaired_before_it_is_measured(site, cell):
    site.draw_grid([cell, box(0, 0, 16, 16)])
    patch = site.extract()["patch_001"]
    expected = centres_inside(shapely.make_valid(cell))[patch.place()]
    # a pixel whose centre lies on the diagonal may fall to either side
    assert np.sum(patch.labelled != expected) <= 2 * PATCH


def test_a_line_among_the_parts_of_a_cell_labels_nothing(site):
    parts = [box(16, 16, 24, 32), LineString([(24, 20.5), (32, 20.5)])]
    site.draw_grid([GeometryCollection(parts)])
    patch = site.only()
    assert patch.labelled.all()
    assert patch.transform == TRANSFORM * Affine.translation(16, 16) * Affine.scale(
        0.5, 1
    )


# --- cells that give no patch ----------------------------------------------------------------


def test_a_cell_partly_outside_is_padded_with_invalid_pixels(site):
    site.draw_grid([box(-4, 40, 12, 56)])
    patch = site.only("--min_valid", 0.3)
    assert patch.transform == TRANSFORM * Affine.translation(-4, 40)
    inside = np.zeros((PATCH, PATCH), bool)
    inside[:8, 4:] = True
    assert np.array_equal(patch.valid, inside)
    assert np.array_equal(patch.labelled, inside)
    assert np.array_equal(patch.image[:, :8, 4:], scene()[:, 40:, :12])
    assert np.array_equal(patch.label[:8, 4:], classes()[40:, :12])


def test_cells_without_a_patch_are_counted_and_listed_with_their_reasons(site, capsys):
    image = scene()
    image[:, 16:32, :16] = 0
    site.draw_image(image, nodata=0)
    label = classes()
    label[32:, :16] = 255
    site.draw_label(label)
    cells = {
        "good": box(0, 0, 16, 16),
        "beyond": box(1000, 0, 1016, 16),
        "edge": box(44, 0, 60, 16),
        "dark": box(0, 16, 16, 32),
        "blank": box(0, 32, 16, 48),
        "tiny": box(20.1, 20.1, 20.3, 20.3),
        "none": None,
        "empty": Polygon(),
        "line": LineString([(0, 0), (20, 20)]),
    }
    site.draw_grid(list(cells.values()), name=list(cells))
    assert list(site.extract("--save_metadata")) == ["patch_good"]
    skipped = {
        "patch_beyond": "outside the image",
        "patch_edge": "less than 50% valid",
        "patch_dark": "no valid pixel",
        "patch_blank": "no labelled pixel",
        "patch_tiny": "smaller than a pixel",
        "patch_none": "no polygon",
        "patch_empty": "no polygon",
        "patch_line": "no polygon",
    }
    assert site.metadata()["skipped"] == skipped
    lines = capsys.readouterr().err.splitlines()
    assert "skipped 8 of 9 cells:" in lines
    for name, reason in skipped.items():
        assert any(reason in line and name in line for line in lines)


def test_a_grid_without_any_cell_on_the_scene_is_refused_with_both_crs(site, capsys):
    site.draw_grid([box(1000, 0, 1016, 16)], crs="EPSG:4326")
    line = refusal(capsys, site)
    assert "patch_001: outside the image" in line
    assert "EPSG:4326 and EPSG:32631" in line


def test_an_absurdly_large_cell_is_refused(site, capsys):
    site.draw_grid([box(0, 0, 16, 16), box(-100, -100, 200, 29)])
    line = refusal(capsys, site)
    assert "patch_002" in line
    assert "300 x 129 pixels" in line
    assert "16 times --patch_size 16" in line


@pytest.mark.parametrize(
    ("valid_columns", "least", "kept"),
    [(8, 0.5, 1), (7, 0.5, 0), (1, 0, 1), (16, 1, 1), (15, 1, 0), (0, 0, 0)],
)
def test_the_least_valid_share_of_a_cell_can_be_set(site, valid_columns, least, kept):
    image = scene()
    image[:, 16:32, 16 + valid_columns : 32] = 0
    site.draw_image(image, nodata=0)
    site.draw_grid([box(0, 0, 16, 16), box(16, 16, 32, 32)])
    assert len(site.extract("--min_valid", least)) == 1 + kept


def test_the_valid_share_is_that_of_the_cell_and_not_of_its_bounding_box(site):
    image = scene()
    image[:, 16:32, 16:32] = np.where(np.tri(16, dtype=bool), image[:, 16:32, 16:32], 0)
    site.draw_image(image, nodata=0)
    site.draw_grid([Polygon([(16, 16), (16, 32), (32, 32)])])
    assert site.only("--min_valid", 0.9).labelled.any()
