"""Geometries in the pixels of an image, also where its CRS cannot show all of them."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
from helpers import write_geotiff
from pyproj import Transformer
from rasterio.transform import from_origin

from common.errors import DatasetError
from common.rasters import open_raster
from common.vectors import in_pixels

SIDE, PIXEL = 60, 1000


@pytest.fixture
def image(tmp_path, request):
    crs, left, top = request.param
    transform = from_origin(left, top, PIXEL, PIXEL)
    pixels = np.ones((1, SIDE, SIDE), np.uint8)
    path = write_geotiff(tmp_path / "a.tif", pixels, crs=crs, transform=transform)
    with open_raster(path) as image:
        yield image


def in_degrees(image) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude of the centres of pixels."""
    column, row = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)
    to_degrees = Transformer.from_crs(image.crs, "EPSG:4326", always_xy=True)
    return to_degrees.transform(*(image.transform * (column.ravel(), row.ravel())))


def land(*boxes) -> geopandas.GeoDataFrame:
    """Polygons in degrees, with a corner at each degree."""
    shapes = shapely.segmentize([shapely.box(*box) for box in boxes], 1)
    return geopandas.GeoDataFrame(geometry=shapes, crs="EPSG:4326")


@pytest.mark.parametrize(
    ("image", "table"),
    [
        (("EPSG:32632", 500_000, 5_000_000), land((-10, 1, 150, 44.9))),
        (("EPSG:32632", 500_000, 5_000_000), land((-180, -60, 180, 44.9), (100, 1, 130, 50))),
        (("EPSG:32601", 140_000, 7_000_000), land((-180, -60, 180, 62.9))),
    ],
    indirect=["image"],
)  # fmt: skip
def test_a_polygon_that_reaches_beyond_the_crs_covers_its_ground(image, table):
    outlines = in_pixels(table, image, "land.gpkg", cut=True)
    lon, lat = in_degrees(image)
    expected = shapely.contains_xy(shapely.union_all(table.geometry), lon, lat)
    column, row = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)
    whole = shapely.union_all(outlines[~outlines.is_empty])
    found = shapely.contains_xy(whole, column.ravel(), row.ravel())
    assert 0.1 < expected.mean() < 0.9
    assert (found == expected).mean() > 0.995  # along an edge that bends


def test_what_has_no_place_even_near_the_image_is_refused(tmp_path):
    """Ground from the pole to the equator lies around this picture of the pole."""
    transform = from_origin(-100_000, 100_000, 5000, 5000)
    pixels = np.ones((1, 40, 40), np.uint8)
    file = tmp_path / "a.tif"
    write_geotiff(file, pixels, crs="+proj=ortho +lat_0=90", transform=transform)
    with (
        open_raster(file) as image,
        pytest.raises(DatasetError, match="land.gpkg: 1 outlines reach beyond"),
    ):
        in_pixels(
            land((-90, -10, 90, 80)).to_crs("EPSG:3395"), image, "land.gpkg", cut=True
        )


@pytest.mark.parametrize(
    "image", [("EPSG:32632", 500_000, 5_000_000)], indirect=True
)  # fmt: skip
def test_what_lies_near_the_image_is_not_cut(image):
    near, far = (8.6, 44.5, 9.4, 45.4), (60, 10, 61, 11)
    table = land(near, far)
    found = in_pixels(table, image, "land.gpkg", cut=True)
    assert found[0].equals(in_pixels(table, image, "land.gpkg")[0])
    assert found[0].bounds[0] < 0 and found[1] is None
