"""Where patches lie, in longitude and latitude."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from exporting.footprint import MOST_POLYGONS, bounding_box, outline_of

DEGREES = "EPSG:4326"


def place(*bounds, crs: str | None = DEGREES, split: str = "train") -> dict:
    return {"crs": crs, "split": split, "bounds": list(bounds)}


def test_patches_side_by_side_are_one_polygon():
    ground = outline_of([place((10, 50, 11, 51), (11, 50, 12, 51))], {"train"})
    assert ground.geom_type == "Polygon"
    assert ground.equals(shapely.box(10, 50, 12, 51))
    assert len(ground.exterior.coords) == 5
    assert ground.exterior.is_ccw, "as RFC 7946 asks"
    assert bounding_box(ground) == [10, 50, 12, 51]


@pytest.mark.parametrize("side", [3.2, 0.64, 0.02])  # metres: drones, a microscope
def test_small_patches_keep_their_form(side):
    x, y = 500_000, 4_600_000
    bounds = [(x + n * side, y, x + (n + 1) * side, y + side) for n in (0, 2)]
    ground = outline_of([place(*bounds, crs="EPSG:32631")], {"train"})
    assert shapely.get_num_coordinates(ground) == 10
    west, south, east, north = bounding_box(ground)
    metres = 111_320 * np.cos(np.radians(41.55))
    assert (east - west) * metres == pytest.approx(3 * side, rel=0.1)
    assert (north - south) * 111_320 == pytest.approx(side, rel=0.1)
    assert ground.area * metres * 111_320 == pytest.approx(2 * side**2, rel=0.1)


def test_patches_that_no_digit_shows_have_no_outline():
    small = place((10, 50, 10 + 1e-11, 50 + 1e-11))
    assert outline_of([small], {"train"}) is None


def test_ground_around_a_pole_has_all_longitudes():
    ground = outline_of([place((-1e5, -1e5, 1e5, 1e5), crs="EPSG:3413")], {"train"})
    assert bounding_box(ground)[::2] == [-180, 180]


def test_other_splits_do_not_count():
    places = [place((10, 50, 11, 51)), place((20, 50, 21, 51), split="test")]
    assert bounding_box(outline_of(places, {"train"})) == [10, 50, 11, 51]
    assert bounding_box(outline_of(places, {"train", "test"})) == [10, 50, 21, 51]
    assert outline_of(places, {"validation"}) is None


def test_projected_patches_lie_where_the_projection_says():
    bounds = (500_000, 4_600_000, 510_000, 4_610_000)
    ground = outline_of([place(bounds, crs="EPSG:32631")], {"train"})
    area = shapely.Polygon(ground).area * 111_320**2 * np.cos(np.radians(41.6))
    assert area == pytest.approx(1e8, rel=0.01)
    assert bounding_box(ground)[0] == 3


def test_where_no_file_says_the_place_there_is_none():
    assert outline_of(None, {"train"}) is None
    assert outline_of([place((0, 0, 1, 1), crs=None)], {"train"}) is None


def test_ground_on_both_sides_of_the_antimeridian_is_cut_there():
    bounds = (
        790_000,
        8_000_000,
        850_000,
        8_060_000,
    )  # of the zone that ends at 180 degrees
    ground = outline_of([place(bounds, crs="EPSG:32760")], {"train"})
    west, south, east, north = bounding_box(ground)
    assert ground.geom_type == "MultiPolygon"
    assert 179 < west < 180
    assert -180 < east < -179
    assert -19 < south < north < -17
    assert shapely.union_all(shapely.get_parts(ground)).area < 1


def test_patches_on_both_sides_of_the_antimeridian_need_not_touch_it():
    fiji = place((-177.9, -18, -177.8, -17), (177.8, -19, 177.9, -18))
    box = bounding_box(outline_of([fiji], {"train"}))
    assert box == [177.8, -19, -177.8, -17]
    wide = place((-100, 40, -99, 41), (70, 20, 71, 21))  # no half of the globe is free
    assert bounding_box(outline_of([wide], {"train"})) == [-100, 20, 71, 41]


def test_many_scattered_patches_become_few_parts_that_hold_them_all():
    count = 4 * MOST_POLYGONS
    corners = np.random.default_rng(0).uniform(0, 10, (count, 2))
    corners[::2, 0] += 100  # another continent
    bounds = np.concatenate([corners, corners + 0.001], axis=1).tolist()
    ground = outline_of([place(*bounds)], {"train"})
    assert shapely.get_num_geometries(ground) <= MOST_POLYGONS
    assert shapely.get_num_coordinates(ground) < 10 * count
    assert ground.buffer(1e-5).covers(
        shapely.union_all(shapely.box(*np.transpose(bounds)))
    )
    assert not ground.intersects(shapely.box(20, -90, 90, 90)), "the sea between"
