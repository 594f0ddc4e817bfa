"""Areas and lengths are those of the ellipsoid, whatever the projection."""

from __future__ import annotations

from types import SimpleNamespace

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from helpers import write_geotiff
from pyproj import Geod
from rasterio.crs import CRS
from rasterio.transform import from_origin

import Patch_extraction
from common.errors import DatasetError
from common.ground import (
    covered_share,
    footprint,
    pairs_within,
    pixel_areas,
    to_metric_crs,
)

fault = pytest.mark.fault

PLACES = [  # CRS, longitude and latitude of the middle
    ("EPSG:4087", 10, 60),  # equidistant: twice as wide as the ground
    ("EPSG:3413", -45, 40),  # polar stereographic, far from its pole
    ("EPSG:3857", 20, 60),
    ("EPSG:32631", 3, 45),
    ("EPSG:4326", 3, 80),
]


def scene_at(folder, crs: str, longitude, latitude, side: float, size: int):
    """A raster of ``size`` pixels of some degrees or 1e5 metres around a place."""
    middle = geopandas.GeoSeries([shapely.Point(longitude, latitude)], crs=4326)
    point = middle.to_crs(crs)[0]
    step = side if crs == "EPSG:4326" else side * 1e5
    half = step * size / 2
    grid = from_origin(point.x - half, point.y + half, step, step)
    pixels = np.ones((size, size), np.uint8)
    return write_geotiff(folder / "scene.tif", pixels, crs=crs, transform=grid)


def equal_area(shapes, crs: str) -> np.ndarray:
    """Areas on the ground, by an equal-area projection of outlines with many points."""
    series = geopandas.GeoSeries(shapes, crs=crs)
    dense = series.segmentize(np.sqrt(series.area.median()) / 50)
    return dense.to_crs("EPSG:6933").area.to_numpy()


@fault(12)
@pytest.mark.parametrize(("crs", "longitude", "latitude"), PLACES)
@pytest.mark.parametrize(("side", "size"), [(1e-4, 30), (0.2, 30), (0.01, 300)])
def test_areas_of_rows_are_exact_to_a_thousandth(
    tmp_path, crs, longitude, latitude, side, size
):
    path = scene_at(tmp_path, crs, longitude, latitude, side, size)
    with rasterio.open(path) as scene:
        areas, transform = pixel_areas(scene), scene.transform
    assert areas.shape == (size,)
    chosen = [0, 1, size // 3, size - 1]
    corner = rasterio.Affine.translation
    rows = [footprint(transform @ corner(0, row), 1, size) for row in chosen]
    expected = equal_area(rows, crs) / size
    np.testing.assert_allclose(areas[chosen], expected, rtol=1e-3)


@fault(12)
def test_rows_off_the_earth_have_no_area(tmp_path):
    geos = "+proj=geos +h=35785831 +lon_0=0 +ellps=WGS84"
    grid = from_origin(-6e6, 6e6, 1e5, 1e5)
    pixels = np.ones((120, 120), np.uint8)
    path = write_geotiff(tmp_path / "scene.tif", pixels, crs=geos, transform=grid)
    with rasterio.open(path) as scene:
        areas = pixel_areas(scene)
    assert np.isfinite(areas).all() and areas[0] == 0 and areas[60] > 1e10


@fault(12)
@pytest.mark.parametrize(("crs", "longitude", "latitude"), PLACES)
def test_footprints_are_measured_on_the_ground(tmp_path, crs, longitude, latitude):
    path = scene_at(tmp_path, crs, longitude, latitude, 1e-3, 64)
    with rasterio.open(path) as scene:
        corner = rasterio.Affine.translation
        shapes = [footprint(scene.transform @ corner(x, 0), 32, 32) for x in (0, 32)]
        ground = to_metric_crs(shapes, [scene.crs] * 2)
    np.testing.assert_allclose(ground.area, equal_area(shapes, crs), rtol=2e-3)
    assert (ground.crs == crs) == (crs == "EPSG:32631")


def patches_at(*places) -> tuple[list, list]:
    """Squares of 1000 m, each in the UTM zone of a longitude and latitude, and the zones' CRS."""
    shapes, systems = [], []
    for longitude, latitude in places:
        code = (32601 if latitude >= 0 else 32701) + int((longitude + 180) // 6)
        middle = geopandas.GeoSeries([shapely.Point(longitude, latitude)], crs=4326)
        x, y = (round(value) for value in middle.to_crs(code)[0].coords[0])
        shapes.append(shapely.box(x - 500, y - 500, x + 500, y + 500))
        systems.append(rasterio.CRS.from_epsg(code))
    return shapes, systems


@fault(13)
def test_patches_beside_the_antimeridian_are_measured_there():
    places = [(179.98, -17), (-179.98, -17), (179.9905, -17.0)]
    ground = to_metric_crs(*patches_at(*places))
    np.testing.assert_allclose(ground.area, 1e6, rtol=2e-3)
    apart = ground[0].centroid.distance(ground[1].centroid)
    metres = Geod(ellps="WGS84").inv(*places[0], *places[1])[2]
    assert apart == pytest.approx(metres, rel=2e-3)
    assert pairs_within(ground, [0, 1, 2], 0).tolist() == []
    assert pairs_within(ground, [0, 1, 2], 200).tolist() == [[0, 2]]


@fault(13)
def test_patches_of_several_continents_have_the_distances_of_their_own_ground():
    places = [(3, 45), (3.02, 45), (-60, -20), (-60, -19.98), (150, -30), (150.02, -30)]
    ground = to_metric_crs(*patches_at(*places))
    np.testing.assert_allclose(ground.area, 1e6, rtol=3e-3)
    for first in (0, 2, 4):
        metres = Geod(ellps="WGS84").inv(*places[first], *places[first + 1])[2]
        apart = ground[first].centroid.distance(ground[first + 1].centroid)
        assert apart == pytest.approx(metres, rel=3e-3)
    assert ground.index.tolist() == list(range(6))
    assert len(pairs_within(ground, range(6), 3_000)) == 3


def local(unit: str, metres: float) -> str:
    return f'LOCAL_CS["site",UNIT["{unit}",{metres}]]'


@fault(45)
@pytest.mark.parametrize(("unit", "metres"), [("metre", 1), ("foot", 0.3048)])
def test_a_local_crs_is_a_plane(tmp_path, unit, metres):
    crs, grid = rasterio.CRS.from_wkt(local(unit, metres)), from_origin(70, 90, 2, 2)
    pixels = np.ones((8, 8), np.uint8)
    path = write_geotiff(tmp_path / "scene.tif", pixels, crs=crs, transform=grid)
    with rasterio.open(path) as scene:
        assert pixel_areas(scene) == pytest.approx([4 * metres**2] * 8)
    shapes = [shapely.box(x, 0, x + 4, 4) for x in (0, 14)]
    ground = to_metric_crs(shapes, [crs] * 2)
    assert ground.area.tolist() == pytest.approx([16 * metres**2] * 2)
    assert ground[0].distance(ground[1]) == pytest.approx(10 * metres)


@fault(45)
def test_a_local_crs_beside_another_is_refused():
    systems = [rasterio.CRS.from_wkt(local("metre", 1)), rasterio.CRS.from_epsg(32631)]
    for order in (systems, systems[::-1]):
        with pytest.raises(DatasetError, match="no known place"):
            to_metric_crs([shapely.box(0, 0, 4, 4)] * 2, order)


@fault(45)
@pytest.mark.parametrize("split_by", ["random", "block"])
def test_a_scene_in_a_local_crs_is_cut_and_described(tmp_path, capsys, split_by):
    rng, grid = np.random.default_rng(0), from_origin(70, 90, 2, 2)
    for name, top in (("scene", 99), ("label", 2)):
        pixels = rng.integers(0, top, (128, 128)).astype(np.uint8)
        path = tmp_path / f"{name}.tif"
        write_geotiff(path, pixels, crs=local("foot", 0.3048), transform=grid)
    words = ["extract", "--image", tmp_path / "scene.tif", "--label"]
    words += [tmp_path / "label.tif", "--output", tmp_path / "out", "--patch_size", 16]
    words += ["--split_by", split_by]
    assert Patch_extraction.main(list(map(str, words))) == 0
    cells = geopandas.read_file(
        tmp_path / "out" / "Patch" / "cells.gpkg", layer="cells"
    )
    assert set(cells.area) == {32.0**2}
    assert Patch_extraction.main(["info", "--output", str(tmp_path / "out")]) == 0
    assert "Traceback" not in capsys.readouterr().err


def raster(crs: str, transform, width: int = 10, height: int = 10) -> SimpleNamespace:
    """What a raster says of its place."""
    crs = CRS.from_user_input(crs)
    return SimpleNamespace(crs=crs, transform=transform, width=width, height=height)


TILE = raster("EPSG:32632", from_origin(700_000, 4_900_000, 1000, 1000))


@pytest.mark.parametrize(
    "crs, transform, size, share",
    [
        ("EPSG:32632", TILE.transform, 10, 1),
        ("EPSG:32632", TILE.transform * Affine.translation(5, 0), 10, 0.5),
        ("EPSG:32632", TILE.transform * Affine.translation(10, 0), 10, 0),  # beside it
        ("EPSG:32632", TILE.transform * Affine.scale(1, -1), 10, 0),  # above, south up
        ("EPSG:32632", TILE.transform * Affine.rotation(30), 40, 0.72),
        ("EPSG:4326", from_origin(-180, 90, 1, 1), (360, 180), 1),
        ("EPSG:4326", from_origin(11.4, 44.3, 0.1, 0.1), 3, 1),
        ("EPSG:3857", from_origin(1_270_000, 5_600_000, 9e4, 9e4), 2, 1),
        # numbers of the projection said to be degrees
        ("EPSG:4326", TILE.transform, 10, 0),
        ("EPSG:32633", TILE.transform, 10, 0),
    ],
)
def test_the_share_of_a_raster_that_another_covers(crs, transform, size, share):
    size = size if isinstance(size, tuple) else (size, size)
    other = raster(crs, transform, *size)
    assert covered_share(TILE, other) == pytest.approx(share, abs=0.01)
    if share == 0:
        assert covered_share(TILE, other) == covered_share(other, TILE) == 0


def test_a_raster_of_the_world_has_ground_in_common_with_one_that_cannot_show_it():
    world = raster("EPSG:4326", from_origin(-180, 90, 1, 1), 360, 180)
    assert 0 < covered_share(world, TILE) < 1e-3
