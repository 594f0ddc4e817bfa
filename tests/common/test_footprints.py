"""The places that checkpoints list, and their footprint in WGS 84."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import shapely
from pyproj import Geod
from rasterio.transform import Affine, from_origin

from common.places import Place, footprint_of, list_places, place_of

LOCAL = 'LOCAL_CS["site",UNIT["metre",1]]'
LAEA = "+proj=laea +lat_0=52 +lon_0=10.25 +ellps=GRS80 +units=m"
SIDE = 2240.0


def listed(crs, *bounds, split: str = "train") -> list[dict]:
    return list_places((split, Place(crs, one)) for one in bounds)


def square_kilometres(ground) -> float:
    """The area on the ellipsoid."""
    return abs(Geod(ellps="WGS84").geometry_area_perimeter(ground)[0]) / 1e6


def place_of_file(path, crs, transform) -> Place | None:
    """The place of a patch of 8 x 4 pixels."""
    size = {"width": 8, "height": 4, "count": 1, "dtype": "uint8"}
    with rasterio.open(
        path, "w", driver="GTiff", crs=crs, transform=transform, **size
    ) as file:
        file.write(np.ones((1, 4, 8), np.uint8))
    with rasterio.open(path) as file:
        return place_of(file)


# --- places of patches ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform, bounds",
    [
        (from_origin(500, 900, 10, 10), (500, 860, 580, 900)),
        (Affine(10, 0, 500, 0, 10, 900), (500, 900, 580, 940)),  # south up
        (Affine(0, 10, 500, 10, 0, 900), (500, 900, 540, 980)),  # turned
    ],
)
def test_bounds_go_from_left_below_to_right_above(tmp_path, transform, bounds):
    assert place_of_file(tmp_path / "a.tif", "EPSG:32632", transform) == Place(
        "EPSG:32632", bounds
    )


def test_a_crs_without_a_code_is_written_out(tmp_path):
    found = place_of_file(tmp_path / "a.tif", LAEA, from_origin(0, 0, 10, 10))
    with rasterio.open(tmp_path / "a.tif") as file:
        assert rasterio.CRS.from_user_input(found.crs) == file.crs
    assert "EPSG:" not in found.crs[:5]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(
    "transform", [Affine.identity(), Affine(0.5, 0, 64, 0, 0.5, 32)]
)
def test_a_patch_of_a_picture_has_no_place(tmp_path, transform):
    assert place_of_file(tmp_path / "a.tif", None, transform) is None


def test_a_patch_without_a_crs_keeps_its_coordinates(tmp_path):
    found = place_of_file(tmp_path / "a.tif", None, from_origin(500, 900, 10, 10))
    assert found == Place(None, (500, 860, 580, 900))


def test_places_are_listed_by_crs_and_split():
    one, other = Place("EPSG:32631", (0, 0, 1, 1)), Place("EPSG:32632", (0, 0, 2, 2))
    patches = [("train", one), ("train", other), ("train", one), ("test", one)]
    assert list_places([*patches, ("test", None)]) == [
        {"crs": "EPSG:32631", "split": "train", "bounds": [[0, 0, 1, 1]] * 2},
        {"crs": "EPSG:32632", "split": "train", "bounds": [[0, 0, 2, 2]]},
        {"crs": "EPSG:32631", "split": "test", "bounds": [[0, 0, 1, 1]]},
    ]
    assert list_places([("train", None)]) is None and list_places([]) is None


# --- footprints -----------------------------------------------------------------------------


def test_neighbours_become_one_polygon_of_the_right_size():
    """Patches of 100 pixels stored with 224, whose corners differ by rounding."""
    pixel, found = 0.00026949458523585647, []
    scene, cut = from_origin(11.1, 44.3, pixel, pixel), Affine.scale(100 / 224)
    for column in range(6):
        for row in range(6):
            corner = scene * Affine.translation(100 * column, 100 * row) * cut
            right, below = corner * (224, 224)
            found.append((corner.c, below, right, corner.f))
    assert len({one[0] for one in found} | {one[2] for one in found}) > 7
    ground = footprint_of(listed("EPSG:4326", *found), ["train"])
    assert ground.geom_type == "Polygon" and not ground.interiors
    corners = 11.1, 44.3 - 600 * pixel, 11.1 + 600 * pixel, 44.3
    assert ground.bounds == pytest.approx(corners, abs=pixel / 1000)


def test_a_footprint_is_that_of_the_splits_that_are_asked_for():
    west, east = ((x, 4_900_000, x + SIDE, 4_900_000 + SIDE) for x in (5e5, 6e5))
    places = listed("EPSG:32632", west) + listed("EPSG:32632", east, split="test")
    train, test = (footprint_of(places, [split]) for split in ("train", "test"))
    assert train.bounds[2] < test.bounds[0]
    both = footprint_of(places, ["train", "validation", "test"])
    assert both.geom_type == "MultiPolygon"
    assert both.area == pytest.approx(train.area + test.area)


def test_places_of_two_crs_are_joined():
    utm = (5e5, 4_900_000, 5e5 + 1e4, 4_910_000)
    degrees = (3.0, 44.0, 3.5, 44.5)
    places = listed("EPSG:32632", utm) + listed("EPSG:4326", degrees)
    ground = footprint_of(places, ["train"])
    west, east = sorted(ground.geoms, key=lambda part: part.bounds)
    assert west.bounds == pytest.approx(degrees)
    assert square_kilometres(east) == pytest.approx(100, rel=2e-3)


@pytest.mark.parametrize(
    "crs, bounds",
    [
        ("EPSG:4326", (179.5, 10, 180.5, 11)),
        ("EPSG:4326", (-180.5, 10, -179.5, 11)),
        ("EPSG:32660", (700_000, 5_000_000, 800_000, 5_100_000)),
        ("EPSG:32701", (100_000, 8_000_000, 200_000, 8_100_000)),
    ],
)
def test_a_footprint_is_cut_at_the_antimeridian(crs, bounds):
    ground = footprint_of(listed(crs, bounds), ["train"])
    assert ground.is_valid and ground.geom_type == "MultiPolygon"
    west, east = sorted(ground.geoms, key=lambda part: part.bounds)
    assert west.bounds[0] == -180 and west.bounds[2] < -178
    assert east.bounds[2] == 180 and east.bounds[0] > 178


def test_a_footprint_around_a_pole_reaches_it():
    ground = footprint_of(listed("EPSG:3413", (-1e5, -1e5, 1e5, 1e5)), ["train"])
    assert ground.bounds == pytest.approx((-180, 88.69, 180, 90), abs=0.01)


@pytest.mark.parametrize(
    "crs, bounds",
    [
        (None, (0, 0, 1, 1)),
        (LOCAL, (0, 0, 1, 1)),
        ("EPSG:32632", (1e9, 1e9, 1.1e9, 1.1e9)),
        ("EPSG:4326", (0, 100, 10, 110)),
        ("EPSG:32632", (np.inf, 0, np.inf, 1)),
    ],
)
def test_an_unknown_place_makes_no_footprint(crs, bounds):
    known = listed("EPSG:32632", (5e5, 4e6, 5e5 + SIDE, 4e6 + SIDE), split="test")
    places = listed(crs, bounds) + known
    assert footprint_of(places, ["train", "test"]) is None
    assert isinstance(footprint_of(places, ["test"]), shapely.Polygon)


def test_a_checkpoint_without_places_has_no_footprint():
    assert footprint_of(None, ["train"]) is None
    places = listed("EPSG:32632", (5e5, 4e6, 5e5 + SIDE, 4e6 + SIDE))
    assert footprint_of(places, ["test"]) is None
