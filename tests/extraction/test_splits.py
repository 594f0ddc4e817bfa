"""Splits: at random, by blocks, on several dates; buffers, leaks, and the cells in QGIS."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from batch_helpers import (
    RATIOS,
    TRANSFORM,
    Batch,
    Dataset,
    at,
    clumps,
    messages,
    metric,
    noise,
    tiles,
    write,
    write_grid,
)
from helpers import CRS, ORIGIN
from rasterio.transform import Affine
from rasterio.warp import transform as project
from shapely import box
from site_helpers import run

from common import SPLITS
from common.ground import footprint, pairs_within, to_metric_crs
from extraction.places import PatchLocation
from extraction.report import split_overlaps
from extraction.settings import BatchConfig
from extraction.splits import (
    balance_blocks,
    leave_out,
    link_repeat_coverage,
    random_splits,
    split_counts,
)

# --- splits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "ratios", "expected"),
    [
        (10, (0.7, 0.2, 0.1), [7, 2, 1]),
        (100, (0.7, 0.15, 0.15), [70, 15, 15]),
        (20, (0.75, 0.15, 0.10), [15, 3, 2]),
        (9, (0.75, 0.15, 0.10), [7, 1, 1]),  # 6.75, 1.35, 0.9
        (3, (0.75, 0.15, 0.10), [2, 1, 0]),  # 2.25, 0.45, 0.3
        (7, (0.5, 0.25, 0.25), [3, 2, 2]),  # 3.5, 1.75, 1.75
        (5, (0.5, 0.5, 0.0), [3, 2, 0]),  # a tie goes to the earlier split
        (1, (0.4, 0.3, 0.3), [1, 0, 0]),
        (0, (0.75, 0.15, 0.10), [0, 0, 0]),
    ],
)
def test_splits_have_the_sizes_of_the_largest_remainder(count, ratios, expected):
    assert split_counts(count, ratios) == expected


def test_every_split_is_less_than_a_patch_away_from_its_ratio():
    for ratios in ((0.75, 0.15, 0.10), (0.6, 0.2, 0.2), (1 / 3, 1 / 3, 1 / 3)):
        for count in range(200):
            counts = split_counts(count, ratios)
            assert sum(counts) == count
            assert all(abs(n - count * r) < 1 for n, r in zip(counts, ratios))


def test_splits_are_drawn_again_alike_by_the_same_seed_and_not_by_another():
    ratios = (0.5, 0.3, 0.2)
    first, again, other = (random_splits(40, ratios, seed) for seed in (7, 7, 8))
    assert first == again != other
    assert Counter(first) == Counter(other) == dict(zip(SPLITS, (20, 12, 8)))
    assert first != sorted(first, key=SPLITS.index)  # in no order of the grid


def test_every_cell_is_in_one_split_and_the_ratios_are_met(site):
    site.draw_grid(tiles(10, 1, side=4))
    ratios = ["--train_ratio", 0.6, "--val_ratio", 0.3, "--test_ratio", 0.1]
    patches = site.extract(*ratios, size=8)
    assert Counter(patch.split for patch in patches.values()) == {
        "train": 6,
        "validation": 3,
        "test": 1,
    }
    assert len(list(site.out.rglob("*.tif"))) == 2 * 10


@pytest.mark.parametrize("flag", ["--seed", "--random_seed"])
def test_the_seed_decides_the_splits_and_nothing_else(site, flag):
    site.draw_grid(tiles(12, 3, side=4))
    outcomes = []
    for number, seed in enumerate((1, 1, 2)):
        site.out = site.folder / f"out{number}"
        outcomes.append(site.extract(flag, seed, size=8))
    first, again, other = ({n: p.split for n, p in o.items()} for o in outcomes)
    assert first == again != other
    for name, patch in outcomes[0].items():
        assert np.array_equal(patch.image, outcomes[2][name].image)


def test_an_empty_split_keeps_its_folders(site):
    site.extract("--train_ratio", 0.8, "--val_ratio", 0.2, "--test_ratio", 0)
    assert [path.name for path in site.out.glob("Patch/test/*")] != []
    assert list(site.out.glob("Patch/test/*/*")) == []


# --- several dates ---------------------------------------------------------------------------


def draw_dates(batch: Batch, dates: int, shift: int = 0) -> None:
    """Scenes of four neighbouring places on several dates, each with its grid."""
    for date, place in itertools.product(range(dates), range(4)):
        name = f"p{place}d{date}"
        corner = at(32 * place, 0)
        batch.draw(name, 32, seed=10 * date + place, transform=corner)
        cells = tiles(4, 4, left=shift * date % 3, top=-(shift * date % 3))
        write_grid(batch.data / f"Grid_{name}.geojson", cells, corner)


@pytest.mark.parametrize(
    ("split_by", "shift"), [("random", 0), ("random", 1), ("block", 1)]
)
def test_a_place_lands_in_one_split_on_all_dates(batch, split_by, shift):
    draw_dates(batch, 3, shift)  # three shifts
    assert len(list(batch.data.glob("Image_*"))) == 12
    dataset = batch.cut("--use_per_image_grid", "--split_by", split_by)
    assert set(dataset.splits.values()) == set(SPLITS)
    by_place: dict[tuple, set] = {}
    for name, split in dataset.splits.items():
        by_place.setdefault((name[:2], name[-3:]), set()).add(split)
    assert len(by_place) == 64
    assert all(len(splits) == 1 for splits in by_place.values())
    names, shapes = list(dataset.ground), list(dataset.ground.values())
    shared = shapely.area(shapely.intersection(np.array(shapes)[:, None], shapes))
    for one, other in np.argwhere(shared > 0.5 * 80**2):
        assert dataset.splits[names[one]] == dataset.splits[names[other]]


def test_dates_of_one_scene_do_not_change_the_ratios(batch):
    for date in range(4):
        batch.draw(f"d{date}", (40, 32), seed=date)
    dataset = batch.cut()
    counts = {"train": 15 * 4, "validation": 3 * 4, "test": 2 * 4}
    assert Counter(dataset.splits.values()) == counts


def test_places_are_patches_of_several_scenes_that_share_most_of_their_ground():
    shapes = [box(0, 0, 9, 9), box(9, 0, 18, 9), box(4, 0, 13, 9), box(5, 0, 14, 9)]
    one, two, three, four = link_repeat_coverage(metric(shapes), [0, 0, 1, 2])
    assert one == three == four == two  # the last shares 5 of 9 with the second
    pairs = [box(0, 0, 9, 9), box(1, 0, 10, 9), box(5, 0, 14, 9)]
    assert len(set(link_repeat_coverage(metric(pairs), [0, 0, 0]))) == 3
    one, two, three = link_repeat_coverage(metric(pairs), [0, 1, 0])
    assert one == two != three  # the second shares most with the first
    one, two, three = link_repeat_coverage(metric(pairs), [0, 0, 1])
    assert two == three != one


def test_a_small_patch_within_a_large_one_is_the_same_place():
    shapes = metric([box(0, 0, 100, 100), box(10, 10, 18, 18), box(200, 0, 208, 8)])
    one, two, three = link_repeat_coverage(shapes, [0, 1, 1])
    assert one == two != three


def draw_two_zones(batch: Batch) -> Path:
    """One place in two UTM zones, and the grid of both."""
    corner = Affine(10, 0, 745_000, 0, -10, 4_650_000)
    batch.draw("a", 64, transform=corner)
    (x,), (y,) = project("EPSG:32631", "EPSG:32632", [745_000], [4_650_000])
    other = Affine(10, 0, round(x, -1) - 100, 0, -10, round(y, -1) + 100)
    batch.draw("b", 90, transform=other, crs="EPSG:32632", seed=1)
    return write_grid(batch.folder / "grid.geojson", tiles(8, 8), corner)


@pytest.mark.parametrize("split_by", ["random", "block"])
def test_a_place_lands_in_one_split_in_two_utm_zones(batch, split_by):
    dataset = batch.cut("--grid", draw_two_zones(batch), "--split_by", split_by)
    both = [
        n[2:] for n in dataset.splits if n[0] == "a" and f"b{n[1:]}" in dataset.splits
    ]
    assert len(both) > 30
    assert {str(crs) for crs in dataset.crs.values()} == {"EPSG:32631", "EPSG:32632"}
    for place in both:
        assert dataset.splits[f"a_{place}"] == dataset.splits[f"b_{place}"]
    cells = dataset.cells().set_index("name").geometry
    for place in both:
        one, other = cells[f"a_{place}"], cells[f"b_{place}"]
        assert one.intersection(other).area > 0.8 * one.area


def test_footprints_of_several_crs_come_together_in_one_of_metres():
    here, there = [745_000, 745_080], [4_650_000, 4_650_080]
    x, y = project("EPSG:32631", "EPSG:32632", here, there)
    systems = [rasterio.CRS.from_epsg(code) for code in (32631, 32632)]
    shapes = [box(here[0], there[0], here[1], there[1]), box(x[0], y[0], x[1], y[1])]
    ground = to_metric_crs(shapes, systems)
    assert ground.crs.axis_info[0].unit_name == "metre"
    assert ground[0].area == pytest.approx(80 * 80, rel=2e-3)
    assert ground[1].centroid.distance(ground[0].centroid) < 1


@pytest.mark.parametrize(
    ("code", "shape"),
    [
        (4326, box(3, 42, 3.001, 42.001)),
        (2263, box(984_000, 200_000, 984_328.084, 200_328.084)),  # 100 m, in feet
    ],
)
def test_footprints_in_degrees_or_feet_become_metres(code, shape):
    ground = to_metric_crs([shape], [rasterio.CRS.from_epsg(code)])
    assert ground.crs.axis_info[0].unit_name == "metre"
    expected = 100**2 if code == 2263 else 82.6 * 111.1
    assert ground.area[0] == pytest.approx(expected, rel=0.003)


def test_a_footprint_is_the_ground_of_all_pixels():
    turned = Affine(0, 2, 100, -3, 0, 50)  # columns run south, rows east
    assert footprint(turned, 4, 5).equals(box(100, 35, 108, 50))
    assert footprint(TRANSFORM, 8, 8).bounds == (
        *(ORIGIN[0], ORIGIN[1] - 80),
        *(ORIGIN[0] + 80, ORIGIN[1]),
    )


def test_overlapping_cells_of_two_dates_can_be_split_by_block(batch):
    for date in range(2):
        batch.draw(f"d{date}", 48, seed=date)
    words = ["--stride", 3, "--split_by", "block", "--block_size", 160]
    dataset = batch.cut(*words)
    assert set(dataset.splits.values()) == set(SPLITS)


def test_footprints_of_far_continents_keep_their_size():
    zones = [rasterio.CRS.from_epsg(code) for code in (32631, 32756)]
    shapes = [box(5e5, 5e6, 5.001e5, 5.0001e6), box(5e5, 6.3e6, 5.001e5, 6.3001e6)]
    areas = to_metric_crs(shapes, zones).area.tolist()
    assert areas == pytest.approx([100**2] * 2, rel=0.02)


# --- splits by block -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--stride", 5],
        pytest.param(["--stride", 3], marks=pytest.mark.slow),
        ["--block_size", 250],
    ],
)
def test_no_pixel_of_the_ground_is_shared_by_two_splits(batch, words):
    batch.draw("a", 64)
    words = [*words, "--block_size", 250] if "--stride" in words else words
    dataset = batch.cut("--split_by", "block", *words)
    pixels = dataset.pixels_by_split()
    assert all(pixels.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not pixels[one] & pixels[other]
    if "--stride" in words:
        reasons = Counter(dataset.skipped.values())
        assert reasons["shares ground with another split"] > 0
    else:
        assert len(dataset.splits) == 8 * 8


def test_no_pixel_is_shared_on_scenes_that_overlap_by_half_a_cell(batch):
    batch.draw("a", 96)
    batch.draw("b", 96, transform=at(44, 44), seed=1)
    pixels = batch.cut("--split_by", "block").pixels_by_split()
    assert all(pixels.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not pixels[one] & pixels[other]


def test_blocks_are_four_cells_wide_unless_said_otherwise(batch):
    batch.draw("a", 128)
    dataset = batch.cut("--split_by", "block")
    blocks: dict[tuple, list] = {}
    for name, split in dataset.splits.items():
        row, column = int(name[3:6]), int(name[8:11])
        blocks.setdefault((row // 4, column // 4), []).append(split)
    assert {len(cells) for cells in blocks.values()} == {16}
    assert all(len(set(cells)) == 1 for cells in blocks.values())
    assert {cells[0] for cells in blocks.values()} == set(SPLITS)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        (CRS, TRANSFORM),
        ("EPSG:4326", Affine(10 / 82_640, 0, 3, 0, -10 / 111_060, 42)),
        ("EPSG:2263", Affine(32.8084, 0, 984_000, 0, -32.8084, 200_000)),
    ],
    ids=["metres", "degrees", "feet"],
)
def test_the_side_of_a_block_is_in_metres(batch, crs, transform):
    batch.draw("a", 64, crs=crs, transform=transform)
    dataset = batch.cut("--split_by", "block", "--block_size", 161)  # two cells
    blocks: dict[tuple, set] = {}
    wider: dict[tuple, set] = {}
    for name, split in dataset.splits.items():
        row, column = 7 - int(name[3:6]), int(name[8:11])  # blocks begin in the south
        blocks.setdefault((row // 2, column // 2), set()).add(split)
        wider.setdefault((row // 4, column // 4), set()).add(split)
    if crs == "EPSG:2263":  # 0.6 degrees off UTM's north: only most blocks are whole
        assert np.mean([len(splits) == 1 for splits in blocks.values()]) >= 0.8
    else:
        assert all(len(splits) == 1 for splits in blocks.values())
    assert any(len(splits) > 1 for splits in wider.values())


@pytest.mark.slow
def test_class_shares_of_block_splits_are_near_the_ratios(batch):
    batch.draw("a", 112, label=clumps(112))
    dataset = batch.cut("--split_by", "block", "--block_size", 160)
    for split, ratio in zip(SPLITS, RATIOS):
        assert dataset.class_shares()[split] == pytest.approx([ratio] * 3, abs=0.03)
    counts = Counter(dataset.splits.values())
    for split, ratio in zip(SPLITS, RATIOS):
        assert counts[split] / 14**2 == pytest.approx(ratio, abs=0.03)


def test_a_rare_class_that_three_blocks_hold_is_in_every_split(batch):
    label = clumps(96, classes=2)
    for row, column in ((3, 5), (60, 10), (80, 90)):
        label[row : row + 2, column : column + 2] = 2
    batch.draw("a", 96, label=label)
    dataset = batch.cut("--split_by", "block")
    for split in SPLITS:
        assert (dataset.class_shares()[split] > 0).all()


def test_every_class_that_can_be_in_every_split_is_in_every_split():
    rng = np.random.default_rng(0)
    for _ in range(15):
        blocks, classes = int(rng.integers(3, 7)), int(rng.integers(1, 6))
        held = rng.random((blocks, classes)) < 0.6
        pixels = held * rng.integers(1, 1000, (blocks, classes))
        content = np.hstack([rng.integers(1, 17, (blocks, 1)), pixels])
        often = (content > 0).sum(axis=0) >= 3

        def missing(splits, content=content, often=often) -> int:
            splits = np.array(splits)
            sums = [content[splits == split].sum(axis=0)[often] for split in SPLITS]
            return int((np.array(sums) == 0).sum())

        least = min(map(missing, itertools.product(SPLITS, repeat=blocks)))
        assert missing(balance_blocks(content, RATIOS, 42)) == least


def test_blocks_are_shared_as_the_ratios_say_where_that_is_possible():
    content = np.array([[10, 30, 0], [10, 0, 30], [5, 15, 0], [5, 0, 15]] * 4)
    splits = np.array(balance_blocks(content, (0.5, 0.25, 0.25), 1))
    for split, ratio in zip(SPLITS, (0.5, 0.25, 0.25)):
        shares = content[splits == split].sum(axis=0) / content.sum(axis=0)
        assert shares == pytest.approx([ratio] * 3, abs=0.05)


def test_a_split_without_a_share_gets_no_block():
    splits = balance_blocks(np.full((20, 2), 5), (0.8, 0.2, 0.0), 3)
    assert Counter(splits) == {"train": 16, "validation": 4}


@pytest.mark.slow
def test_the_seed_decides_which_blocks_go_together(batch):
    batch.draw("a", 80, label=clumps(80))
    words = ["--split_by", "block", "--block_size", 160]
    first, again, other = (
        batch.cut(*words, "--seed", seed, "--overwrite").splits for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.keys() == other.keys()


def test_too_few_blocks_are_refused(batch, capsys):
    batch.draw("a", 48)
    line = batch.refusal(capsys, "--split_by", "block", "--block_size", 500)
    assert "1 blocks of 500 m" in line and "smaller --block_size" in line


def test_ratios_that_are_rounded_thirds_can_be_drawn_by_block():
    config = BatchConfig(
        data_dir="d",
        output="o",
        train_ratio=0.3333333,
        val_ratio=0.3333333,
        test_ratio=0.3333333,
    )
    assert len(balance_blocks(np.full((9, 2), 5), config.ratios, 1)) == 9


def test_a_scene_in_degrees_may_lie_near_a_pole(batch):
    batch.draw("a", 32, transform=Affine(1e-3, 0, 10, 0, -1e-4, -85), crs="EPSG:4326")
    assert run(*batch.words()) == 0


# --- buffers and neighbours ------------------------------------------------------------------


def nearer(whole: Dataset, distance: float, kept: Dataset) -> set[str]:
    """The patches of a split that lie nearer than a distance to one kept in another, by shapely."""
    return {
        one
        for one, other in itertools.product(whole.ground, kept.ground)
        if whole.splits[one] != whole.splits[other]
        and whole.ground[one].distance(whole.ground[other]) < distance
    }


@pytest.mark.parametrize(
    ("split_by", "distance"),
    [("block", 1), ("block", 80), ("block", 90), ("block", 170), ("random", 79)],
)
def test_exactly_the_cells_within_the_buffer_are_dropped(batch, split_by, distance):
    batch.draw("a", 96 if split_by == "block" else 64)
    words = ["--split_by", split_by]
    whole = batch.cut(*words)
    kept = batch.cut(*words, "--buffer", distance, "--overwrite")
    expected = nearer(whole, distance, kept)
    assert set(kept.skipped) == expected != set()
    assert set(kept.skipped.values()) == {f"nearer than {distance} m to another split"}
    assert kept.splits == {n: s for n, s in whole.splits.items() if n not in expected}


def test_pairs_that_share_ground_are_found_and_those_that_touch_are_not():
    shapes = [box(0, 0, 80, 80), box(80, 0, 160, 80), box(150, 70, 230, 150)]
    pairs = pairs_within(metric(shapes), [2, 0, 1], 0)
    assert pairs.tolist() == [[1, 2]]
    assert pairs_within(metric(shapes), [0] * 3, 0).tolist() == []


def test_pairs_within_a_distance_come_with_the_earlier_split_first():
    shapes = [box(0, 0, 80, 80), box(100, 0, 180, 80), box(500, 0, 580, 80)]
    splits = [2, 0, 1]  # test, training, validation
    assert pairs_within(metric(shapes), splits, 19).tolist() == []
    assert pairs_within(metric(shapes), splits, 21).tolist() == [[1, 0]]
    found = pairs_within(metric(shapes), splits, 330).tolist()
    assert sorted(found) == [[1, 0], [1, 2]]


def test_large_cells_within_the_buffer_are_found():
    shapes = metric([box(0, 0, 3000, 3000), box(3995, 0, 6995, 3000)])
    assert len(pairs_within(shapes, [0, 2], 1000)) == 1


def test_a_small_buffer_drops_large_neighbours():
    shapes = metric([box(0, 0, 2240, 2240), box(2240, 0, 4480, 2240)])
    assert len(pairs_within(shapes, [0, 2], 5)) == 1


def test_one_pixel_that_large_cells_share_is_found():
    shapes = metric([box(0, 0, 600, 600), box(599, 0, 1199, 600)])
    assert len(pairs_within(shapes, [0, 2], 0)) == 1


def test_a_buffer_is_in_metres_on_the_ground_also_in_mercator(batch):
    corner = Affine(20, 0, 1_100_000, 0, -20, 8_400_000)  # 60 degrees north: 10 m
    batch.draw("a", 96, transform=corner, crs="EPSG:3857")
    whole = batch.cut("--split_by", "block", "--block_size", 320)
    kept = batch.cut(
        "--split_by", "block", "--block_size", 320, "--buffer", 90, "--overwrite"
    )
    zone = geopandas.GeoSeries(whole.ground, crs="EPSG:3857").to_crs("EPSG:32632")
    whole.ground = dict(zone.items())
    assert set(kept.skipped) == nearer(whole, 90, kept)


def touching(dataset: Dataset) -> int:
    """How many patches share ground, an edge or a corner with one of another split."""
    found = set()
    for one, other in itertools.combinations(dataset.ground, 2):
        shapes = dataset.ground[one], dataset.ground[other]
        if dataset.splits[one] != dataset.splits[other] and shapes[0].intersects(
            shapes[1]
        ):
            found |= {one, other}
    return len(found)


@pytest.mark.parametrize("corner", [ORIGIN, (431_240.0, 4_912_560.0)])
def test_neighbours_in_other_splits_are_counted_in_a_warning(batch, capsys, corner):
    batch.draw("a", 48, transform=Affine(10, 0, corner[0], 0, -10, corner[1]))
    lines = messages(capsys, *batch.words())
    count = touching(Dataset(batch.out))
    assert count > 10
    (line,) = [line for line in lines if "--split_by block" in line]
    assert line.startswith(f"{count} of 36 patches")


def test_overlapping_cells_in_other_splits_are_counted_in_one_warning(batch, capsys):
    batch.draw("a", 48)
    lines = messages(capsys, *batch.words("--stride", 5))
    dataset = Dataset(batch.out)
    (line,) = [line for line in lines if "--split_by block" in line]
    assert line.startswith(f"{touching(dataset)} of {len(dataset.splits)} patches")


@pytest.mark.parametrize(
    "words", [["--stride", 12], ["--split_by", "block"], ["--buffer", "50"]]
)
def test_there_is_no_warning_where_splits_lie_apart_or_were_asked_to(
    batch, capsys, words
):
    batch.draw("a", 96)
    lines = messages(capsys, *batch.words(*words))
    assert not [line for line in lines if "--split_by block" in line]


# --- what is dropped keeps the shares --------------------------------------------------------

EVEN = ("--train_ratio", 0.6, "--val_ratio", 0.2, "--test_ratio", 0.2)


@pytest.mark.fault(58)
@pytest.mark.parametrize(
    "words",
    [
        ("--stride", 4, "--split_by", "block", "--block_size", 160),
        ("--split_by", "block", "--block_size", 160, "--buffer", 80),
        ("--buffer", 20),
    ],
)
def test_what_is_dropped_leaves_the_shares_that_were_asked_for(batch, capsys, words):
    batch.draw("a", 64)
    lines = messages(capsys, *batch.words(*EVEN, *words))
    dataset = Dataset(batch.out)
    assert dataset.skipped
    counts = Counter(dataset.splits.values())
    for split, share in zip(SPLITS, (0.6, 0.2, 0.2)):
        assert counts[split] / len(dataset.splits) == pytest.approx(share, abs=0.1)
    assert not [line for line in lines if "splits of" in line]


@pytest.mark.fault(58)
def test_no_pair_stays_and_nothing_is_dropped_without_need():
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = rng.integers(0, 60, (80, 2))
        ground = metric([box(x, y, x + 8, y + 8) for x, y in corners.tolist()])
        parts = rng.choice(3, 80, p=(0.6, 0.2, 0.2))
        pairs = pairs_within(ground, parts, 0)
        lost = leave_out(parts, pairs, (0.6, 0.2, 0.2))
        stays = np.isin(np.arange(80), list(lost), invert=True)
        assert not stays[pairs].all(axis=1).any()
        partners = np.concatenate([pairs, pairs[:, ::-1]])
        assert set(partners[stays[partners[:, 1]], 0].tolist()) == lost


@pytest.mark.fault(58)
def test_shares_that_are_missed_are_reported(batch, capsys):
    # 3 blocks of 9, 1 and 1 cells: those of one split each
    batch.draw("a", (24, 24))
    for number in range(2):
        batch.draw(f"b{number}", 8, transform=at(500 * (number + 1), 0))
    lines = messages(
        capsys, *batch.words(*EVEN, "--split_by", "block", "--block_size", 1000)
    )
    (line,) = [line for line in lines if "splits of" in line]
    assert line == "splits of 9, 1, 1 patches, not of 7, 2, 2: lower --block_size"


# --- the leak check --------------------------------------------------------------------------


def leaks(batch: Batch, capsys) -> tuple[list[dict] | None, str]:
    """What ``info`` stores and prints about overlaps."""
    capsys.readouterr()
    assert run("info", "--output", batch.out) == 0
    stored = json.loads((batch.out / "dataset_info.json").read_text())
    return stored["overlaps"], capsys.readouterr().out


def plant(dataset: Dataset, split: str, target: str, name="planted") -> str:
    """Copy the first patch of a split into another; its name."""
    source = min((dataset.root / split / "images").iterdir())
    for kind in ("images", "labels"):
        content = (dataset.root / split / kind / source.name).read_bytes()
        (dataset.root / target / kind / f"{name}.tif").write_bytes(content)
    return source.stem


def test_splits_that_only_touch_share_no_ground(batch, capsys):
    batch.draw("a", 96)
    batch.cut()
    found, out = leaks(batch, capsys)
    assert found == []
    assert "no ground is shared between splits" in out and "LEAK" not in out


@pytest.mark.parametrize(
    ("source", "target"), [("train", "test"), ("test", "validation"), ("test", "train")]
)
def test_a_leak_planted_by_hand_is_found(batch, capsys, source, target):
    batch.draw("a", 96)
    dataset = batch.cut("--split_by", "block")
    copied = plant(dataset, source, target)
    first, second = sorted((source, target), key=SPLITS.index)
    one, other = (copied, "planted") if source == first else ("planted", copied)
    found, out = leaks(batch, capsys)
    examples = [f"{other} and {one}"]
    assert found == [{"splits": [first, second], "patches": 1, "examples": examples}]
    assert f"LEAK: 1 patches of {second} share ground with {first}" in out
    assert "no ground" not in out


def test_a_patch_that_shares_a_corner_pixel_is_a_leak(batch, capsys):
    batch.draw("a", 64)
    dataset = batch.cut("--stride", 40)  # 4 cells, far apart
    name = plant(dataset, "train", "test")
    left, _, _, top = dataset.ground[name].bounds
    for kind in ("images", "labels"):
        with rasterio.open(dataset.root / f"test/{kind}/planted.tif", "r+") as file:
            file.transform = Affine(10, 0, left + 70, 0, -10, top - 70)
    found, _ = leaks(batch, capsys)
    assert [entry["splits"] for entry in found] == [["train", "test"]]
    assert found[0]["examples"] == [f"planted and {name}"]


def test_overlapping_cells_that_were_drawn_at_random_are_leaks(batch, capsys):
    batch.draw("a", 48)
    dataset = batch.cut("--stride", 4)
    found, _ = leaks(batch, capsys)
    for entry in found:
        first, second = entry["splits"]
        shared = {
            other
            for one, other in itertools.permutations(dataset.ground, 2)
            if (dataset.splits[one], dataset.splits[other]) == (first, second)
            and dataset.ground[one].intersection(dataset.ground[other]).area > 0
        }
        assert entry["patches"] == len(shared) > 0
    assert sorted(tuple(entry["splits"]) for entry in found) == [
        ("train", "test"),
        ("train", "validation"),
        ("validation", "test"),
    ]


def test_overlaps_are_counted_by_pairs_of_splits_and_unknown_without_a_crs():
    crs = rasterio.CRS.from_epsg(32631)
    places = [
        PatchLocation("train", "a", box(0, 0, 80, 80), crs),
        PatchLocation("train", "b", box(40, 0, 120, 80), crs),
        PatchLocation("test", "c", box(60, 0, 140, 80), crs),
        PatchLocation("validation", "d", box(900, 0, 980, 80), crs),
    ]
    (entry,) = split_overlaps(places)
    assert (entry["splits"], entry["patches"]) == (["train", "test"], 1)
    assert sorted(entry["examples"]) == ["c and a", "c and b"]
    places.append(PatchLocation("test", "e", box(0, 0, 1, 1), None))
    assert split_overlaps(places) is None


def test_info_draws_the_splits_in_their_colours(batch, capsys, real_pictures):
    import matplotlib.image

    batch.draw("a", 48)
    batch.cut()
    assert run("info", "--output", batch.out) == 0
    picture = batch.out / "dataset_splits.png"
    assert str(picture) in capsys.readouterr().out
    pixels = matplotlib.image.imread(picture)[..., :3]
    for colour in ("9db8d2", "f0a030", "c8283c"):
        rgb = np.frombuffer(bytes.fromhex(colour), np.uint8) / 255
        assert np.isclose(pixels, rgb, atol=0.01).all(axis=-1).sum() > 100


def test_a_leak_between_two_utm_zones_is_found(batch, capsys):
    dataset = batch.cut("--grid", draw_two_zones(batch), "--split_by", "block")
    for name, split in dataset.splits.items():
        if name.startswith("b") and split == "train":
            for kind in ("images", "labels"):
                path = dataset.root / "train" / kind / f"{name}.tif"
                path.rename(dataset.root / "test" / kind / f"{name}.tif")
    found, _ = leaks(batch, capsys)
    (entry,) = [e for e in found if e["splits"] == ["train", "test"]]
    assert entry["patches"] > 10


def test_overlap_is_unknown_where_a_patch_has_no_crs(batch, capsys):
    image, label = noise(8)
    for split in ("train", "validation"):
        crs = CRS if split == "train" else None
        for kind, pixels in (("images", image), ("labels", label)):
            write(batch.out / "Patch" / split / kind / "x.tif", pixels, crs=crs)
    found, out = leaks(batch, capsys)
    assert found is None
    assert "overlap between splits: unknown" in out


# --- cells.gpkg ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, "water,trees,town"])
def test_the_vector_file_says_what_the_metadata_says(batch, names):
    batch.draw("a", (20, 24))
    batch.draw("b", 16, transform=at(100, 0))
    dataset = batch.cut(*(["--class_names", names] if names else []))
    cells = dataset.cells()
    assert cells.crs.to_epsg() == 32631
    classes = ["0 water", "1 trees", "2 town"] if names else ["0", "1", "2"]
    shares = [f"share {name}" for name in classes]
    columns = ["name", "scene", "split", "valid_share", *shares, "geometry"]
    assert list(cells.columns) == columns
    assert list(cells["name"]) == list(dataset.records)
    for row in cells.to_dict("records"):
        record = dataset.records[row["name"]]
        assert row["split"] == record["split"] == dataset.splits[row["name"]]
        assert row["scene"] == record["scene"]
        assert row["valid_share"] == record["valid_share"]
        counts = np.array(record["class_pixels"])
        assert [row[s] for s in shares] == pytest.approx(list(counts / counts.sum()))
        assert row["geometry"].equals(dataset.ground[row["name"]])


def test_the_vector_file_holds_no_cell_that_was_dropped(batch):
    batch.draw("a", 96)
    dataset = batch.cut("--split_by", "block", "--buffer", 100)
    assert dataset.skipped
    assert set(dataset.cells()["name"]) == set(dataset.splits)


def test_the_cells_of_a_scene_in_degrees_are_shown_in_degrees(batch):
    batch.draw("a", 32, transform=Affine(1e-4, 0, 3, 0, -1e-4, 42), crs="EPSG:4326")
    dataset = batch.cut()
    cells = dataset.cells()
    assert cells.crs.to_epsg() == 4326
    back = cells.set_index("name").geometry
    for name, shape in dataset.ground.items():
        assert back[name].symmetric_difference(shape).area < 1e-3 * shape.area


def test_class_names_may_differ_by_their_case(batch):
    batch.draw("a", 16)
    assert run(*batch.words("--class_names", "Forest,forest,x")) == 0
