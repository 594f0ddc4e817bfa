"""The picture of a dataset's splits: a panel for each place."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import rasterio
from shapely import box

from common import SPLITS
from common.ground import to_metric_crs
from extraction import places
from extraction.places import MOST_PANELS, PatchLocation, draw_splits, find_places

SIDE = 2560  # metres of a patch
UTM = 32631


def scene(name, x, y, columns, rows, side=SIDE, crs=UTM) -> list[PatchLocation]:
    """Patches side by side."""
    found = []
    for number in range(columns * rows):
        left, low = x + number % columns * side, y + number // columns * side
        shape = box(left, low, left + side, low + side)
        split = SPLITS[number % 3]
        system = rasterio.CRS.from_epsg(crs)
        found.append(PatchLocation(split, f"{name}_{number}", shape, system))
    return found


def groups_of(patches) -> list[list[int]]:
    ground = to_metric_crs([p.footprint for p in patches], [p.crs for p in patches])
    return sorted(place.tolist() for place in find_places(ground.bounds.to_numpy()))


@pytest.fixture
def drawn(monkeypatch):
    """Figures by the patches that they show, which are not stored."""

    def draw(patches):
        kept = []
        monkeypatch.setattr(
            places, "save_figure", lambda figure, _: kept.append(figure)
        )
        draw_splits(patches, None)
        return kept[0]

    return draw


def test_scenes_far_apart_are_places_of_their_own_and_neighbours_are_one():
    first = scene("a", 500_000, 4_000_000, 4, 4)
    far = scene("b", 580_000, 4_000_000, 3, 2)
    near = scene("c", 515_000, 4_000_000, 4, 4)
    assert groups_of(first) == [list(range(16))]
    assert groups_of(first + far) == [list(range(16)), list(range(16, 22))]
    assert groups_of(first + near) == [list(range(32))]


def test_a_row_of_scenes_is_as_many_places():
    row = [scene(str(k), 500_000 + 60_000 * k, 4_000_000, 3, 3) for k in range(7)]
    assert [len(group) for group in groups_of([*chain(*row)])] == [9] * 7


def test_small_places_beside_a_large_one_are_told_apart():
    large = scene("large", 400_000, 4_000_000, 40, 40)
    small = scene("b", 900_000, 4_000_000, 3, 3, 250)
    other = scene("c", 920_000, 4_000_000, 3, 3, 250)
    assert [len(group) for group in groups_of(large + small + other)] == [1600, 9, 9]


def test_patches_here_and_there_are_one_place():
    rng = np.random.default_rng(0)
    spots = rng.uniform(0, 150_000, (60, 2)) + (400_000, 4_000_000)
    assert len(groups_of([scene("a", x, y, 1, 1)[0] for x, y in spots])) == 1
    assert groups_of(scene("a", 500_000, 4_000_000, 1, 1)) == [[0]]


def test_each_place_has_a_panel_with_its_own_kilometres_or_metres(drawn):
    sites = scene("Lyon", 500_000, 5_000_000, 6, 3) + scene(
        "roofs_1", 300_000, 6_000_000, 4, 8, 50, 32719
    )
    figure = drawn(sites)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["Lyon: 18 patches", "roofs_1: 32 patches"]
    lyon, roofs = figure.axes
    assert (lyon.get_xlabel(), roofs.get_xlabel()) == ("km", "m")
    assert lyon.get_xlim() == pytest.approx((0, 6 * 2.56), rel=0.01)
    assert lyon.get_ylim() == pytest.approx((0, 3 * 2.56), rel=0.01)
    assert roofs.get_xlim() == pytest.approx((0, 200), rel=0.05)
    assert roofs.get_ylim() == pytest.approx((0, 400), rel=0.05)
    assert lyon.get_aspect() == roofs.get_aspect() == 1
    shapes = [sum(len(c.get_paths()) for c in a.collections) for a in figure.axes]
    assert shapes == [18, 32]
    keys = [text.get_text() for text in figure.legends[0].get_texts()]
    assert keys == ["train (17)", "validation (17)", "test (16)"]


def test_a_wide_dataset_has_a_wide_picture(drawn):
    wide = drawn(scene("a", 500_000, 4_000_000, 40, 4)).get_size_inches()
    tall = drawn(scene("a", 500_000, 4_000_000, 4, 40)).get_size_inches()
    assert wide[0] > 4 * wide[1] and tall[1] > 3 * tall[0]
    strip = drawn(scene("a", 500_000, 4_000_000, 25, 1))
    box = strip.axes[0].get_position()
    width, height = strip.get_size_inches()
    assert box.width * width == pytest.approx(25 * box.height * height)


def test_of_many_places_the_largest_are_drawn_and_a_line_names_the_rest(drawn):
    spots = [
        (500_000 + 60_000 * (k % 5), 4_000_000 + 60_000 * (k // 5)) for k in range(15)
    ]
    sites = [
        scene(f"Image_{k}", x, y, 3, 1 + (k > 2)) for k, (x, y) in enumerate(spots)
    ]
    figure = drawn([*chain(*sites)])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"Image_{k}: 6 patches" for k in range(3, 3 + MOST_PANELS)]
    line = "not drawn: 9 patches in 3 more places, of Image_0_0, Image_1_0, Image_2_0"
    assert figure.get_suptitle() == line


def test_splits_of_one_ground_on_several_dates_have_a_panel_each(drawn):
    dates = [scene(f"d{number}", 5e5, 5e6, 3, 2) for number in range(3)]
    patches = [
        patch._replace(split=split)
        for split, date in zip(SPLITS, dates)
        for patch in date
    ]
    beside = scene("e", 9e5, 5e6, 3, 2)
    figure = drawn([*patches, *beside])
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split(": ")[1] for title in titles] == [
        "6 train patches", "6 validation patches", "6 test patches", "6 patches",
    ]  # fmt: skip
    drawn_patches = [
        sum(len(one.get_paths()) for one in axes.collections) for axes in figure.axes
    ]
    assert drawn_patches == [6, 6, 6, 6]
