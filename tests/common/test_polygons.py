"""The polygons of class maps: no seams, whatever the strips, and a sieve of a plain reference."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import geopandas
import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from area_helpers import NODATA, connected, noise, picture, sieved
from helpers import CRS, ORIGIN, PIXEL, patch_everywhere
from pandas.testing import assert_frame_equal
from rasterio import features
from rasterio.transform import Affine, from_origin

from common.errors import RasterError, SegmentationError
from common.ground import pixel_areas
from common.polygons import write_polygons
from common.vectors import append_features

NAMES = ["water", "forêt", "crop", "bare"]
GRID = from_origin(*ORIGIN, PIXEL, PIXEL)
HEIGHTS = [1, 3, 7, 100]


# --- helpers --------------------------------------------------------------------------------


def write_map(path: Path, classes: np.ndarray, transform=GRID, crs=CRS, nodata=NODATA):
    """Write classes (H, W) as a class map; its path."""
    dtype = np.uint8 if nodata == 255 else np.uint16
    height, width = classes.shape
    profile = {"driver": "GTiff", "dtype": dtype, "nodata": nodata, "count": 1}
    shape = {"height": height, "width": width, "crs": crs, "transform": transform}
    with rasterio.open(path, "w", **profile, **shape) as file:
        file.write(classes.astype(dtype), 1)
    return path


@pytest.fixture
def polygons_of(tmp_path):
    """The table that classes (H, W) become: ``polygons_of(classes, min_area, rows=3)``."""

    def make(classes, min_area=0.0, rows=100, names=NAMES, simplify=None, **profile):
        source, target = tmp_path / "map.tif", tmp_path / "polygons.gpkg"
        write_map(source, classes, **profile)
        count = write_polygons(source, target, names, min_area, rows, simplify)
        table = geopandas.read_file(target)
        assert count == len(table)
        assert table.geometry.is_valid.all()
        assert (table.geometry.geom_type == "Polygon").all()
        return table

    return make


def canonical(classes, outlines) -> list[tuple]:
    """Polygons with their classes in one order, each written in one way."""
    texts = shapely.to_wkt(shapely.normalize(outlines), rounding_precision=-1)
    return sorted(zip(map(int, classes), texts))


def whole(classes: np.ndarray, transform=GRID) -> list[tuple]:
    """What rasterio makes of the whole map at once."""
    valid = classes != NODATA
    found = features.shapes(
        classes.astype(np.int32), valid, connectivity=4, transform=transform
    )
    pairs = [(value, shapely.geometry.shape(outline)) for outline, value in found]
    return canonical([v for v, _ in pairs], [p for _, p in pairs])


SPIRAL = picture("""
    0000000000 0111111110 0100000010 0101111010 0101001010 0101101010
    0100001010 0111111010 0000000010 1111111110
""")
COMB = picture("0101010 0101010 0101010 0000000 0101010 0101010 1111111")
RINGS = picture("0000000 0111110 0122210 0120210 0122210 0111110 0000000")
CORNERS = picture("00000 01010 00100 01010 00000")


# --- seams ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize("grain", [1, 2, 5])
def test_polygons_are_those_of_the_whole_map(polygons_of, rows, grain):
    for seed in range(4):
        classes = noise(seed=seed, grain=grain)
        table = polygons_of(classes, rows=rows)
        assert canonical(table["class"], table.geometry) == whole(classes)


@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize("classes", [SPIRAL, COMB, COMB[::-1], RINGS, CORNERS, RINGS.T])
def test_areas_that_close_and_reopen_have_no_seams(polygons_of, classes, rows):
    table = polygons_of(classes, rows=rows)
    assert canonical(table["class"], table.geometry) == whole(classes)


@pytest.mark.parametrize("rows", HEIGHTS)
def test_a_hole_across_a_seam_is_a_hole(polygons_of, rows):
    table = polygons_of(RINGS, rows=rows)
    holes = [len(outline.interiors) for outline in table.geometry]
    assert sorted(zip(table["class"], holes)) == [(0, 0), (0, 1), (1, 1), (2, 1)]
    assert sorted(table.geometry.area / PIXEL**2) == [1, 8, 16, 24]


def test_features_have_one_order_for_all_strips(polygons_of):
    classes = noise(40, 20, grain=2)
    tables = [polygons_of(classes, 300, rows) for rows in HEIGHTS]
    for table in tables[1:]:
        columns = [t.drop(columns="geometry") for t in (table, tables[0])]
        assert_frame_equal(*columns)
        assert (table.geometry.to_wkb() == tables[0].geometry.to_wkb()).all()


def test_a_straight_seam_leaves_no_vertex(polygons_of):
    (outline,) = polygons_of(np.zeros((9, 4), int), rows=2).geometry
    assert len(outline.exterior.coords) == 5


# --- columns --------------------------------------------------------------------------------


def test_the_layer_opens_with_its_columns(polygons_of, tmp_path):
    classes = noise()
    table = polygons_of(classes, rows=7)
    assert list(table.columns) == [
        "class",
        "class_code",
        "class_name",
        "area_ha",
        "geometry",
    ]
    assert table.crs == CRS
    assert list(table.class_name) == [NAMES[number] for number in table["class"]]
    info = pyogrio.read_info(tmp_path / "polygons.gpkg")
    assert (info["layer_name"], info["features"]) == ("polygons", len(table))
    assert (info["driver"], info["geometry_type"]) == ("GPKG", "Polygon")
    assert info["ogr_types"] == ["OFTInteger", "OFTInteger64", "OFTString", "OFTReal"]


@pytest.mark.parametrize("crs, pixel", [(CRS, 0.3), ("EPSG:4326", 0.25), (CRS, 10)])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_areas_add_up_to_those_of_the_pixels(polygons_of, tmp_path, crs, pixel, rows):
    classes = noise(60, 20, grain=4)
    grid = from_origin(3, 52, pixel, pixel)
    table = polygons_of(classes, rows=rows, crs=crs, transform=grid)
    with rasterio.open(tmp_path / "map.tif") as file:
        pixels = np.repeat(pixel_areas(file)[:, None], 20, axis=1)
    expected = [pixels[classes == number].sum() / 1e4 for number in range(3)]
    assert table.groupby("class").area_ha.sum().tolist() == pytest.approx(
        expected, rel=1e-12
    )
    each = sorted(pixels[mask].sum() / 1e4 for mask in connected(classes))
    assert sorted(table.area_ha) == pytest.approx(each, rel=1e-12)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("rows", [3, 100])
def test_a_rotated_grid_gives_rotated_polygons(polygons_of, rows):
    classes = noise(grain=2)
    grid = GRID * Affine.rotation(30) * Affine.scale(1, 2)
    table = polygons_of(classes, rows=rows, transform=grid)
    found = polygons_of(classes, rows=rows, transform=Affine.identity())
    back = shapely.transform(
        table.geometry.values, lambda xy: np.array([~grid * tuple(p) for p in xy])
    )
    assert shapely.equals_exact(back, found.geometry.values, 1e-6).all()
    areas = pytest.approx(table.geometry.area, rel=1e-3)
    assert table.area_ha.to_numpy() * 1e4 == areas


def test_sixteen_bit_maps_have_classes_beyond_255(polygons_of):
    classes = np.full((6, 5), 300)
    classes[0], classes[3, 2] = 65535, 255
    names = [f"class {number}" for number in range(301)]
    table = polygons_of(classes, rows=2, names=names, nodata=65535)
    assert sorted(table.class_name) == ["class 255", "class 300"]
    assert table.area_ha.sum() * 100 == pytest.approx(25, rel=1e-3)


@pytest.mark.parametrize("min_area", [0, 500])
def test_a_map_of_nodata_gives_an_empty_layer(polygons_of, tmp_path, min_area):
    table = polygons_of(np.full((9, 8), NODATA), min_area, rows=2)
    assert len(table) == 0
    assert table.crs == CRS
    info = pyogrio.read_info(tmp_path / "polygons.gpkg")
    assert info["geometry_type"] == "Polygon"
    assert list(info["fields"]) == ["class", "class_code", "class_name", "area_ha"]
    assert info["ogr_types"] == ["OFTInteger", "OFTInteger64", "OFTString", "OFTReal"]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_map_without_a_crs_has_polygons_without_areas(polygons_of, tmp_path):
    table = polygons_of(noise(), crs=None, transform=None)
    assert table.crs is None
    assert table.area_ha.isna().all()
    assert table.area_ha.dtype == float
    assert table.total_bounds.tolist() == [0, 0, 20, 24]


# --- smallest area --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize("grain, fewest", [(1, 2), (1, 6), (1, 60), (2, 9), (3, 30)])
def test_the_sieve_follows_its_rule(polygons_of, rows, grain, fewest):
    for seed in range(2):
        classes = noise(18, 15, 4, seed, grain, nodata=0.25)
        table = polygons_of(classes, fewest * PIXEL**2, rows)
        expected = whole(sieved(classes, fewest))
        assert canonical(table["class"], table.geometry) == expected


@pytest.mark.parametrize("rows", HEIGHTS)
def test_ties_go_to_the_lower_class_then_to_the_earlier_area(polygons_of, rows):
    classes = picture("2220111 2223111 2220111")  # 3 has 2 and 1 beside it, 0 above
    table = polygons_of(classes, 200, rows)
    # both 0 and then 3 take class 1, as it is as large as 2 and lower
    areas = (table.area_ha * 100).round(1)
    assert sorted(zip(table["class"], areas)) == [(1, 12), (2, 9)]


def test_an_area_of_just_the_smallest_size_stays(polygons_of):
    classes = picture("00000 01110 00000")
    for pixel in (0.1, 0.3, 0.7, 10):
        grid = from_origin(*ORIGIN, pixel, pixel)
        assert len(polygons_of(classes, 3 * pixel**2, transform=grid)) == 2
        assert len(polygons_of(classes, 3.01 * pixel**2, transform=grid)) == 1


def test_a_small_island_in_nodata_stays(polygons_of):
    table = polygons_of(picture("0..11 ..211 33..."), 250)
    found = sorted(zip(table["class"], (table.area_ha * 100).round(1)))
    assert found == [(0, 1), (1, 5), (3, 2)]


def test_a_sieve_larger_than_the_map_leaves_one_polygon(polygons_of):
    assert len(polygons_of(noise(nodata=0, classes=4), 1e9, rows=5)) == 1


def test_a_smallest_area_becomes_pixels_by_the_one_at_the_centre_of_the_map(
    polygons_of,
):
    classes = np.zeros((41, 5), int)
    classes[[1, -2], 2] = 1  # pixels at 60 and at 21 degrees north
    grid = from_origin(3, 61, 1, 1)
    centre = 111_000 * 111_400 * np.cos(np.radians(40.5))  # square metres, nearly
    for share, left in ((0.95, 3), (1.05, 1)):
        table = polygons_of(classes, share * centre, 7, crs="EPSG:4326", transform=grid)
        assert len(table) == left


# --- smooth polygons ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metres, grain, nodata", [(15, 1, 0.1), (7.2, 2, 0.3), (60, 5, 0.1), (1e300, 7, 0)]
)
def test_simplified_neighbours_share_their_borders(polygons_of, metres, grain, nodata):
    classes = noise(40, 30, 3, grain, grain, nodata)
    plain = polygons_of(classes, rows=7)
    table = polygons_of(classes, rows=7, simplify=metres)
    assert shapely.coverage_is_valid(table.geometry.values)
    # neither gaps nor overlaps, and the ground of the map
    ground = plain.union_all().normalize()
    assert table.union_all().normalize().equals(ground)
    assert table.geometry.area.sum() == pytest.approx(ground.area, rel=1e-12)
    columns = ["class", "class_code", "class_name", "area_ha"]
    assert_frame_equal(table[columns], plain[columns])


def test_a_smooth_border_runs_from_area_to_area(polygons_of):
    classes = np.tril(np.ones((12, 12), int))  # a diagonal in steps of a pixel
    (plain, _), (smooth, _) = (
        shapely.get_num_coordinates(polygons_of(classes, simplify=metres).geometry)
        for metres in (7.0, 7.1)  # a step is a triangle of 50 square metres
    )
    assert plain > 20 and smooth < 9


@pytest.mark.parametrize("crs, pixel", [("EPSG:4326", 1e-4), ("EPSG:2263", 30)])
def test_metres_are_metres_also_in_degrees_and_feet(polygons_of, tmp_path, crs, pixel):
    classes = np.tril(np.ones((12, 12), int))
    x, y = (-73.9, 40.7) if crs == "EPSG:4326" else (980_000, 190_000)
    place = {"crs": crs, "transform": from_origin(x, y, pixel, pixel)}
    polygons_of(classes, **place)
    with rasterio.open(tmp_path / "map.tif") as file:
        step = np.sqrt(pixel_areas(file)[6] / 2)
    counts = [
        shapely.get_num_coordinates(
            polygons_of(classes, simplify=step * share, **place).geometry
        ).max()
        for share in (0.99, 1.01)
    ]
    assert counts[0] > 20 and counts[1] < 9


def test_an_area_of_a_pixel_does_not_vanish(polygons_of):
    classes = np.zeros((9, 9), int)
    classes[4, 4], classes[0, 0], classes[6, 1:7] = 1, 2, 3
    table = polygons_of(classes, simplify=1e6)
    assert sorted(table["class"]) == [0, 1, 2, 3]
    assert (table.geometry.area > 0).all()
    areas = (table.area_ha * 100).round().astype(int)
    assert areas.tolist() == [1, 1, 6, 73]  # of its pixels, as without --simplify


def test_a_map_of_nodata_has_nothing_to_simplify(polygons_of):
    assert len(polygons_of(np.full((9, 8), NODATA), simplify=10)) == 0


# --- memory, errors -------------------------------------------------------------------------


def peak(tmp_path: Path, height: int) -> int:
    """Bytes that the polygons of a map of small areas take at most."""
    source = write_map(tmp_path / "map.tif", noise(height, 512, grain=16))
    tracemalloc.start()
    write_polygons(source, tmp_path / "polygons.gpkg", NAMES, 50_000, strip=64)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_memory_is_that_of_a_strip_and_some_numbers_per_area(tmp_path):
    peak(tmp_path, 64)  # imports
    low, high = peak(tmp_path, 512), peak(tmp_path, 2048)
    more = (2048 - 512) // 16 * 512 // 16  # areas, at most
    assert high - low < 150 * more
    assert high < 1.3 * low


def test_a_class_without_a_name_is_told(polygons_of, tmp_path):
    with pytest.raises(
        RasterError, match="holds class 3, but there are names for 2 classes"
    ):
        polygons_of(picture("012 003"), names=NAMES[:2], rows=2)
    assert [path.name for path in tmp_path.iterdir()] == ["map.tif"]


def test_smallest_areas_and_smooth_borders_need_a_crs(polygons_of):
    for option in ("min_area", "simplify"):
        with pytest.raises(RasterError, match=f"no CRS .* --{option} .* assign one"):
            polygons_of(noise(), crs=None, **{option: 400})


def test_nothing_is_left_behind_when_it_fails_midway(
    polygons_of, tmp_path, monkeypatch
):
    original, calls = append_features, []

    def failing(*arguments):
        original(*arguments)
        calls.append(arguments)
        if len(calls) == 4:
            raise OSError("the disk is full")

    (tmp_path / "polygons.gpkg").write_text("the former file")
    patch_everywhere(monkeypatch, "common.vectors.append_features", failing)
    with pytest.raises(OSError, match="the disk is full"):
        polygons_of(noise(), rows=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif", "polygons.gpkg"]
    assert (tmp_path / "polygons.gpkg").read_text() == "the former file"


def test_a_layer_that_cannot_be_written_is_told_in_one_line(tmp_path):
    file = tmp_path / "map.gpkg"
    file.write_text("no GeoPackage")
    table = {"class": [1], "geometry": [shapely.box(0, 0, 1, 1)]}
    with pytest.raises(
        SegmentationError, match=r"map.gpkg was not written completely \(.*full"
    ):
        append_features(file, "map", table, None)


def test_a_former_file_is_replaced_and_nothing_lies_beside_it(polygons_of, tmp_path):
    polygons_of(noise(), rows=3)
    assert len(polygons_of(SPIRAL, rows=3)) == len(whole(SPIRAL))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif", "polygons.gpkg"]
