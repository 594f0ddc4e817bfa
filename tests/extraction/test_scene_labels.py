"""Labels of a scene: rasters on any pixel grid, vector files, names of classes."""

from __future__ import annotations

import numpy as np
import pytest
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as project
from shapely import Polygon, box
from site_helpers import (
    CRS,
    LEFT,
    RIGHT,
    SIZE,
    TRANSFORM,
    centres_inside,
    classes,
    hole,
    python,
    refusal,
    scene,
    tiles,
    write_cells,
)

# --- raster labels ---------------------------------------------------------------------------


def nearest_label(label, transform, crs) -> tuple[np.ndarray, np.ndarray]:
    """A label at the centres of the scene's pixels, by PROJ and numpy.

    Returns:
        The values (H, W), 255 outside; how far the centre is from the edge of the label's
        pixel, in its pixels.
    """
    columns, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
    xs, ys = TRANSFORM * (columns.ravel(), rows.ravel())
    xs, ys = project(CRS, crs, xs, ys)
    columns, rows = ~transform * (np.array(xs), np.array(ys))
    to_edge = np.minimum(*(np.abs(v - np.rint(v)) for v in (columns, rows)))
    i, j = np.floor(rows).astype(int), np.floor(columns).astype(int)
    inside = (i >= 0) & (i < label.shape[0]) & (j >= 0) & (j < label.shape[1])
    values = np.full(i.shape, 255)
    values[inside] = label[i[inside], j[inside]]
    return values.reshape(SIZE, SIZE), to_edge.reshape(SIZE, SIZE)


@pytest.mark.parametrize("nodata", [None, 4, 255])
@pytest.mark.parametrize(
    ("crs", "pixel"),
    [
        (CRS, 20.0),
        (CRS, 3.3),
        (CRS, 10.0),
        ("EPSG:32630", 7.0),
        ("EPSG:4326", 2e-4),
        ("EPSG:3035", 25.0),
    ],
)
def test_a_label_on_another_pixel_grid_is_warped_to_the_nearest(
    site, crs, pixel, nodata
):
    corners = [TRANSFORM * c for c in ((0, 0), (SIZE, 0), (0, SIZE), (SIZE, SIZE))]
    xs, ys = project(CRS, crs, *zip(*corners))
    # a strip of the scene on the left and at the top has no label
    left, top = min(xs) + 4.3 * pixel, max(ys) - 2.6 * pixel
    width, height = (
        int((max(xs) - left) / pixel) + 3,
        int((top - min(ys)) / pixel) + 3,
    )
    label, transform = classes(5, height, width), from_origin(left, top, pixel, pixel)
    site.draw_label(label, crs=crs, transform=transform, nodata=nodata)
    site.draw_grid([box(0, 0, SIZE, SIZE)])
    found = site.only(size=SIZE).label
    values = np.where(label == nodata, 255, label)
    expected, to_edge = nearest_label(values, transform, crs)
    clear = to_edge > 0.01
    assert clear.mean() > 0.9
    assert 0.02 < np.mean(expected == 255) < 0.6
    assert np.array_equal(found[clear], expected[clear])


def test_a_label_shifted_by_whole_pixels_is_read_pixel_by_pixel(site):
    label = classes(height=60, width=70)
    site.draw_label(label, transform=TRANSFORM * Affine.translation(-7, -5))
    patches = site.extract()
    for patch in patches.values():
        rows, columns = patch.place()
        moved = label[
            rows.start + 5 : rows.stop + 5, columns.start + 7 : columns.stop + 7
        ]
        assert np.array_equal(patch.label, moved)


def test_a_warped_label_needs_no_module_that_is_there_by_chance(site):
    """In a process of its own: other tests import what the script forgot."""
    site.draw_label(classes(height=24, width=24), transform=TRANSFORM * Affine.scale(2))
    code = f"import Patch_extraction; sys.exit(Patch_extraction.main({site.words()}))"
    done = python(code, site.folder)
    assert done.returncode == 0, done.stderr
    assert len(site.patches()) == 9


def test_a_label_that_does_not_overlap_is_refused(site, capsys):
    site.draw_label(classes(), transform=TRANSFORM * Affine.translation(SIZE, 0))
    line = refusal(capsys, site)
    assert f"{site.label} does not overlap {site.image}" in line


def test_a_label_is_warped_onto_a_scene_whose_first_row_lies_in_the_south(site):
    upward = Affine(10, 0, 431_240, 0, 10, 4_912_080)
    site.draw_image(scene(), transform=upward)
    assert np.array_equal(
        site.extract()["patch_001"].label, np.flipud(classes())[32:, :16]
    )


def test_a_label_may_have_an_alpha_band(site):
    roles = [ColorInterp.gray, ColorInterp.alpha]
    alpha = 255 * hole("uint8")
    site.draw_label(np.stack([classes(), alpha]), colours=roles)
    for patch in site.extract().values():
        assert np.array_equal(patch.labelled, hole()[patch.place()])


def test_a_label_with_an_alpha_band_may_lie_on_another_pixel_grid(site):
    roles = [ColorInterp.gray, ColorInterp.alpha]
    alpha = 255 * hole("uint8")
    moved = TRANSFORM * Affine.translation(-16, 0)
    site.draw_label(np.stack([classes(), alpha]), colours=roles, transform=moved)
    patch = site.extract()["patch_001"]
    assert np.array_equal(patch.labelled, hole()[:16, 16:32])


def test_nodata_and_255_of_a_label_are_unlabelled(site):
    label = classes(5)
    label[10, 10] = 255
    site.draw_label(label, nodata=4)
    for patch in site.extract().values():
        source = label[patch.place()]
        assert np.array_equal(patch.label, np.where(source == 4, 255, source))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "float32", "float64"])
def test_a_label_may_have_any_dtype_that_holds_whole_numbers(site, dtype):
    label = np.where(hole(), classes().astype(dtype), -1).astype(dtype)
    site.draw_label(label, nodata=-1)
    for patch in site.extract().values():
        expected = np.where(hole(), classes(), 255)[patch.place()]
        assert patch.label.dtype == "uint8"
        assert np.array_equal(patch.label, expected)


def test_label_values_are_classes_in_their_order_and_all_others_are_unlabelled(site):
    label = np.array([0, 3, 7, 9, 255], "uint8")[classes(5)]
    site.draw_label(label)
    patches = site.extract("--label_values", "7,255,0", "--save_metadata")
    mapping = {7: 0, 255: 1, 0: 2}
    for patch in patches.values():
        source = label[patch.place()]
        expected = np.vectorize(lambda value: mapping.get(value, 255))(source)
        assert np.array_equal(patch.label, expected)
    assert site.metadata()["label_values"] == [7, 255, 0]


def test_label_values_may_be_negative(site):
    site.draw_label(classes().astype("int16") - 1)
    patch = site.extract("--label_values=-1,0,1")["patch_001"]
    assert np.array_equal(patch.label, classes()[:16, :16])


def test_declared_nodata_is_unlabelled_unless_it_is_among_the_label_values(site):
    site.draw_label(classes(), nodata=0)
    patch = site.extract("--label_values", "1,2")["patch_001"]
    source = classes()[:16, :16]
    assert np.array_equal(patch.label, np.where(source == 0, 255, source - 1))


@pytest.mark.parametrize(
    ("count", "dtype", "unlabelled"), [(255, "uint8", 255), (256, "uint16", 65535)]
)
def test_labels_have_16_bits_only_when_there_are_more_than_255_classes(
    site, count, dtype, unlabelled
):
    label = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % (count + 3)).astype("uint16")
    site.draw_label(2 * label)
    values = ",".join(str(2 * number) for number in range(count))
    patches = site.extract("--label_values", values, "--save_metadata")
    for patch in patches.values():
        source = label[patch.place()]
        assert (patch.label.dtype, patch.unlabelled) == (dtype, unlabelled)
        assert np.array_equal(patch.label, np.where(source < count, source, unlabelled))
    assert site.metadata()["unlabelled"] == unlabelled


@pytest.mark.parametrize(
    ("value", "dtype", "shown"),
    [(300, "uint16", "300"), (-3, "int16", "-3"), (1e6, "float32", "1000000")],
)
def test_a_value_that_is_no_class_is_refused_with_the_file_and_the_value(
    site, capsys, value, dtype, shown
):
    label = classes().astype(dtype)
    label[20, 20] = value
    site.draw_label(label)
    line = refusal(capsys, site)
    assert f"{site.label} holds {shown}:" in line
    assert "--label_values" in line


def test_a_fraction_among_the_labels_is_refused(site, capsys):
    label = classes().astype("float32")
    label[20, 20] = 1.5
    site.draw_label(label)
    assert f"{site.label} holds 1.5" in refusal(capsys, site)


def test_a_label_of_a_single_class_is_extracted_with_a_warning(site, capsys):
    site.draw_label(np.where(classes() == 0, 1, 255).astype("uint8"))
    site.extract()
    err = capsys.readouterr().err
    assert "all labelled pixels are class 1" in err
    assert "--label_values 1,255" in err


# --- vector labels ---------------------------------------------------------------------------


def burnt(*shapes_and_classes, outside: int) -> np.ndarray:
    """(H, W): the class of the last shape that holds a pixel's centre, by shapely."""
    label = np.full((SIZE, SIZE), outside)
    for shape, number in shapes_and_classes:
        label[centres_inside(shape)] = number
    return label


def check_labels(patches, expected) -> None:
    for patch in patches.values():
        assert np.array_equal(patch.label, expected[patch.place()])


def test_polygons_without_a_column_are_class_1_and_everything_else_is_class_0(site):
    site.draw_label_shapes([LEFT, RIGHT], kind=[5, 6])
    patches = site.extract()
    assert len(patches) == 9
    check_labels(patches, burnt((LEFT, 1), (RIGHT, 1), outside=0))
    assert patches["patch_001"].class_names is None


@pytest.mark.parametrize("order", [1, -1])
def test_where_polygons_overlap_the_last_one_wins(site, order):
    shapes, numbers = [LEFT, RIGHT][::order], [2, 0]
    site.draw_label_shapes(shapes, kind=numbers)
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt(*zip(shapes, numbers), outside=255))


def test_a_numeric_column_may_have_gaps_which_are_unlabelled(site):
    site.draw_label_shapes([LEFT, RIGHT], kind=[1.0, None])
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt((LEFT, 1), (RIGHT, 255), outside=255))


def test_label_values_number_the_values_of_a_numeric_column(site):
    far = box(0, 45, 48, 48)
    site.draw_label_shapes([LEFT, RIGHT, far], kind=[311, 112, 7])
    words = ["--label_column", "kind", "--label_values", "112,311"]
    patches = site.extract(*words, "--class_names", "town,forest")
    check_labels(patches, burnt((LEFT, 1), (RIGHT, 0), (far, 255), outside=255))
    assert patches["patch_001"].class_names == ["town", "forest"]


def test_the_texts_of_a_column_are_classes_in_alphabetical_order(site):
    site.draw_label_shapes(
        [LEFT, RIGHT, box(0, 45, 9, 48)], kind=["wood", "lake", None]
    )
    patches = site.extract("--label_column", "kind", "--save_metadata")
    check_labels(
        patches,
        burnt((LEFT, 1), (RIGHT, 0), (box(0, 45, 9, 48), 255), outside=255),
    )
    assert {tuple(p.class_names) for p in patches.values()} == {("lake", "wood")}
    assert site.metadata()["class_names"] == ["lake", "wood"]


def test_label_values_order_the_texts_of_a_column_and_leave_others_out(site):
    far = box(0, 45, 48, 48)
    site.draw_label_shapes([LEFT, RIGHT, far], kind=["wood", "lake", "road"])
    words = ["--label_column", "kind", "--label_values", "wood, lake"]
    patches = site.extract(*words)
    check_labels(patches, burnt((LEFT, 0), (RIGHT, 1), (far, 255), outside=255))
    assert patches["patch_001"].class_names == ["wood", "lake"]


def test_class_names_replace_the_texts_of_a_column(site):
    site.draw_label_shapes([LEFT, RIGHT], kind=["w", "l"])
    words = ["--label_column", "kind", "--class_names", "Lac,Forêt"]
    patch = site.extract(*words)["patch_001"]
    assert patch.class_names == ["Lac", "Forêt"]


@pytest.mark.parametrize("name", ["label.shp", "label.geojson", "label.gpkg"])
def test_a_vector_label_may_be_in_any_format_and_crs(site, name):
    shapes = [LEFT, RIGHT]
    crs = "EPSG:4326"
    site.label = write_cells(site.folder / name, shapes, crs=crs, kind=[0, 1])
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt((LEFT, 0), (RIGHT, 1), outside=255))


def test_features_without_geometry_label_nothing(site):
    shapes = [LEFT, None, Polygon()]
    site.draw_label_shapes(shapes, kind=[0, 1, 2])
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt((LEFT, 0), outside=255))


def test_a_vector_label_is_valid_only_where_the_image_is(site):
    site.draw_image(np.where(hole(), scene(), 0), nodata=0, dtype="uint16")
    site.draw_label_shapes([LEFT])
    expected = np.where(hole(), burnt((LEFT, 1), outside=0), 255)
    check_labels(site.extract(), expected)


def test_a_column_with_fractions_is_refused(site, capsys):
    site.draw_label_shapes([LEFT, RIGHT], kind=[1.0, 2.5])
    assert "fractions or infinities in kind" in refusal(
        capsys, site, "--label_column", "kind"
    )


def test_a_class_of_a_column_that_is_no_class_is_refused(site, capsys):
    site.draw_label_shapes([LEFT, RIGHT - LEFT], kind=[1, 311])
    line = refusal(capsys, site, "--label_column", "kind")
    assert f"{site.label} holds 311:" in line


def test_a_large_number_in_a_column_is_not_mistaken_for_another(site):
    site.draw_label_shapes([LEFT, RIGHT], kind=[10**10, 2])
    words = ["--label_column", "kind", "--label_values", f"{10**10},2"]
    check_labels(site.extract(*words), burnt((LEFT, 0), (RIGHT, 1), outside=255))


def test_256_texts_are_256_classes(site):
    shapes = tiles(16, 16, side=3)
    site.draw_label_shapes(shapes, kind=[f"t{number:03}" for number in range(256)])
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt(*zip(shapes, range(256)), outside=65535))
    assert all(patch.labelled.all() for patch in patches.values())


# --- class names -----------------------------------------------------------------------------


def test_class_names_are_stored_in_every_label(site):
    patches = site.extract("--class_names", "water, trees,bâti", "--save_metadata")
    stored = {tuple(patch.class_names) for patch in patches.values()}
    assert stored == {("water", "trees", "bâti")}
    assert site.metadata()["class_names"] == ["water", "trees", "bâti"]


def test_class_names_that_do_not_suffice_for_the_classes_are_refused(site, capsys):
    refusal(capsys, site, "--class_names", "water,trees")
