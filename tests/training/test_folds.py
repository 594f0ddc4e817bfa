"""Spatial folds: where patches lie, groups and folds of them, buffers."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import geopandas
import numpy as np
import pytest
import shapely
from helpers import ORIGIN, settings, write_dataset, write_raster
from pyproj import Geod
from training_helpers import SIDE

from common.errors import DatasetError
from common.ground import typical_patch_side
from common.patches import PatchPair, list_pairs, patch_footprints
from training.folds import (
    Fold,
    drop_near,
    inner_split,
    make_folds,
    report_absent,
    spatial_groups,
)

# --- helpers --------------------------------------------------------------------------------


def ground(columns: int = 12, rows: int = 10, step: float = SIDE):
    """Footprints of a grid of square patches, row by row."""
    x, y = (v.ravel() * step for v in np.meshgrid(range(columns), range(rows)))
    x, y = x + ORIGIN[0], ORIGIN[1] - y
    return geopandas.GeoSeries(shapely.box(x, y - SIDE, x + SIDE, y), crs="EPSG:32631")


def clustered_counts(columns: int = 12, rows: int = 10, classes: int = 5, seed=0):
    """Labelled pixels (patches, classes): classes lie in patches of land, the last are rare."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, (columns, rows), (4 * classes, 2))
    x, y = (v.ravel() for v in np.meshgrid(range(columns), range(rows)))
    distances = np.hypot(x[:, None] - centres[:, 0], y[:, None] - centres[:, 1])
    weight = np.exp(-distances).reshape(len(x), classes, 4).sum(axis=2)
    weight = weight**2 / (1 + np.arange(classes)) ** 2
    shares = weight / weight.sum(axis=1, keepdims=True)
    return np.stack([rng.multinomial(1024, share) for share in shares])


def write_patches(folder, places, **options) -> list[PatchPair]:
    """One-band patches of 32 x 32 pixels whose upper left corners are given."""
    options = {"crs": "EPSG:32631"} | options
    pairs = []
    for number, place in enumerate(places):
        path = folder / f"patch_{number}.tif"
        pixels = np.ones((1, 32, 32), np.uint8)
        write_raster(path, pixels, origin=place, **options)
        pairs.append(PatchPair(path, path))
    return pairs


# --- where patches lie ----------------------------------------------------------------------


def test_footprints_are_those_of_the_files(tmp_path):
    pairs = list_pairs(write_dataset(tmp_path, 3, 0, 0), "train")
    found = patch_footprints(pairs)
    left = ORIGIN[0] + SIDE * np.arange(3)
    top = np.full(3, ORIGIN[1])
    expected = np.stack([left, top - SIDE, left + SIDE, top], axis=1)
    assert np.allclose(found.bounds, expected)
    assert found.crs == "EPSG:32631"
    assert typical_patch_side(found) == SIDE


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:4258"])
def test_footprints_in_degrees_become_metres(tmp_path, crs):
    places = [(10.0, 60.0), (10.01, 60.0), (10.0, 59.9)]
    pairs = write_patches(tmp_path, places, crs=crs, pixel=0.0001)
    found = patch_footprints(pairs).centroid
    geod = Geod(ellps="GRS80")
    for first, second in itertools.combinations(range(3), 2):
        # the centres lie 16 pixels inside the corners
        ends = [(x + 0.0016, y - 0.0016) for x, y in (places[first], places[second])]
        expected = geod.inv(*ends[0], *ends[1])[2]
        assert found[first].distance(found[second]) == pytest.approx(expected, rel=1e-4)


def test_mercator_metres_are_put_right(tmp_path):
    pairs = write_patches(tmp_path, [(1e6, 8.4e6), (1e6 + 320, 8.4e6)], crs="EPSG:3857")
    side = typical_patch_side(patch_footprints(pairs))
    assert side == pytest.approx(320 * np.cos(np.radians(60.0)), rel=0.01)


def test_patches_of_two_zones_share_one_ground(tmp_path):
    # one place on the border of the zones 31 and 32
    west = write_patches(tmp_path / "w", [(729_999.0, 5_544_004.0)], crs="EPSG:32631")
    east = write_patches(tmp_path / "e", [(300_000.0, 5_544_004.0)], crs="EPSG:32632")
    apart = Geod(ellps="WGS84")
    to_degrees = [
        geopandas.GeoSeries([shapely.Point(x + 160, 5_544_004 - 160)], crs=crs)
        .to_crs("EPSG:4326")
        .iloc[0]
        for x, crs in ((729_999, "EPSG:32631"), (300_000, "EPSG:32632"))
    ]
    expected = apart.inv(*to_degrees[0].coords[0], *to_degrees[1].coords[0])[2]
    found = patch_footprints(west + east).centroid
    assert found[0].distance(found[1]) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    "crs", [None, 'LOCAL_CS["nowhere",UNIT["metre",1]]'], ids=["no CRS", "a local one"]
)
def test_a_patch_without_crs_is_named(tmp_path, crs):
    good = write_patches(tmp_path / "good", [ORIGIN])
    bad = write_patches(tmp_path / "bad", [ORIGIN], crs=crs)
    with pytest.raises(DatasetError, match=r"bad.patch_0\.tif has no CRS.*random"):
        patch_footprints(good + bad)


@pytest.mark.parametrize("latitude", [95.0, 500.0])
def test_a_patch_beyond_the_poles_is_an_error(tmp_path, latitude):
    places = [(10.0, 50.0), (10.0, latitude)]
    pairs = write_patches(tmp_path, places, crs="EPSG:4326")
    with pytest.raises(DatasetError, match="do not all lie on the Earth"):
        patch_footprints(pairs)


# --- groups ---------------------------------------------------------------------------------


def test_blocks_are_four_patches_wide_unless_told():
    groups = spatial_groups(ground(8, 8), "block", None, 5).reshape(8, 8)
    assert len(np.unique(groups)) == 4
    for part in (groups[:4, :4], groups[:4, 4:], groups[4:, :4], groups[4:, 4:]):
        assert np.ptp(part) == 0


def test_blocks_have_the_size_that_is_given():
    groups = spatial_groups(ground(8, 8), "block", 2 * SIDE, 5)
    assert np.array_equal(np.bincount(groups), np.full(16, 4))


def test_strips_run_from_north_to_south_and_hold_about_as_many_patches():
    strips = spatial_groups(ground(12, 10), "column", None, 5).reshape(10, 12)
    assert np.array_equal(strips, np.tile(strips[0], (10, 1)))
    assert np.array_equal(np.unique(strips[0]), range(5))
    assert (np.diff(strips[0]) >= 0).all()
    assert set(np.bincount(strips[0])) <= {2, 3}


def test_too_few_columns_for_the_strips_are_an_error():
    with pytest.raises(DatasetError, match="too few columns for 5 strips.*--n_splits"):
        spatial_groups(ground(4, 10), "column", None, 5)


# --- folds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_splits", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_folds_part_the_patches_by_whole_groups(n_splits, seed):
    rng = np.random.default_rng(seed)
    groups = rng.choice([3, 7, 8, 20, 21, 40, 41], 60)  # any numbers, of any size
    counts = clustered_counts(10, 6, seed=seed)
    made = make_folds(groups, counts, n_splits, seed)
    assert np.array_equal(np.sort(np.concatenate([o for _, o in made])), range(60))
    for inner, outer in made:
        assert len(outer)
        assert np.array_equal(np.sort(np.concatenate([inner, outer])), range(60))
        assert not set(groups[inner]) & set(groups[outer])


def test_no_fold_is_empty_however_uneven_the_groups_are():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        groups = np.r_[range(4), rng.choice(6, 30, p=rng.dirichlet(np.full(6, 0.2)))]
        counts = rng.lognormal(0, 3, (34, 3)) * (rng.random((34, 3)) < 0.2)
        made = make_folds(groups, counts.astype(int), 4, seed)
        assert all(len(outer) for _, outer in made)


def test_folds_depend_on_the_seed_alone():
    groups = spatial_groups(ground(), "block", None, 3)
    counts = clustered_counts()

    def drawn(seed: int) -> list:
        return [outer.tolist() for _, outer in make_folds(groups, counts, 3, seed)]

    assert drawn(1) == drawn(1)
    assert len({str(sorted(drawn(seed))) for seed in range(6)}) > 1


def test_folds_are_alike_in_classes_where_groups_alone_are_not():
    from sklearn.model_selection import GroupKFold

    def deviation(made) -> float:
        shares = np.stack([counts[outer].sum(axis=0) for _, outer in made])
        shares = shares / shares.sum(axis=1, keepdims=True)
        return np.abs(shares - counts.sum(axis=0) / counts.sum()).max()

    ours, plain = [], []
    for seed in range(4):
        counts = clustered_counts(16, 12, seed=seed)
        groups = spatial_groups(ground(16, 12), "block", 3 * SIDE, 4)
        ours.append(deviation(make_folds(groups, counts, 4, 0)))
        plain.append(deviation(list(GroupKFold(4).split(counts, groups=groups))))
    assert np.mean(ours) < 0.5 * np.mean(plain)


def test_a_rare_class_is_in_every_fold_when_enough_groups_hold_it():
    counts = np.full((40, 3), 300)
    counts[:, 2] = 0
    counts[[3, 9, 22], 2] = 2  # six pixels in three of twenty groups
    for seed in range(5):
        made = make_folds(np.arange(40) // 2, counts, 3, seed)
        assert all(counts[outer, 2].any() for _, outer in made)


def test_patches_without_labels_get_a_fold_too():
    made = make_folds(np.arange(6), np.zeros((6, 3), int), 3, 0)
    assert [len(outer) for _, outer in made] == [2, 2, 2]


def test_fewer_groups_than_folds_are_an_error():
    with pytest.raises(
        DatasetError, match=r"^2 groups .* 5 folds; .*--block_size.*--n_s"
    ):
        make_folds(np.repeat([4, 9], 10), np.ones((20, 2), int), 5, 0)


# --- buffer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [SIDE, 200.0, 500.0])
@pytest.mark.parametrize("buffer", [0.0, 1.0, 180.0, 400.0])
def test_training_keeps_its_distance(step, buffer):
    shapes = ground(8, 7, step)
    groups = spatial_groups(shapes, "block", 3 * step, 4)
    inner, outer = np.flatnonzero(groups != 0), np.flatnonzero(groups == 0)

    def near(patch: int) -> bool:
        others = [shapes.iloc[other] for other in outer]
        if buffer:
            return any(shapes.iloc[patch].distance(o) < buffer - 1e-3 for o in others)
        return any(shapes.iloc[patch].intersection(o).area > 1 for o in others)

    kept = drop_near(inner, outer, shapes, buffer)
    assert 0 < len(kept) <= len(inner)
    assert kept.tolist() == [patch for patch in inner if not near(patch)]


def test_neighbours_that_only_touch_stay_without_a_buffer():
    kept = drop_near(np.array([0, 2, 3]), np.array([1]), ground(4, 1), 0)
    assert kept.tolist() == [0, 2, 3]


def test_a_buffer_that_leaves_nothing_is_an_error():
    with pytest.raises(DatasetError, match=r"All 2 .*--buffer 5000 m.*lower --buffer"):
        drop_near(np.array([0, 1]), np.array([2, 3]), ground(4, 1), 5000)


# --- the split inside a fold ----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_validation_inside_a_fold_is_whole_groups_of_about_the_share(seed):
    groups = spatial_groups(ground(16, 12), "block", 2 * SIDE, 5)
    counts = clustered_counts(16, 12, seed=seed)
    for inner, outer in make_folds(groups, counts, 5, seed)[:2]:
        train, validation = inner_split(inner, groups, counts, seed)
        assert np.array_equal(np.sort(np.r_[train, validation]), inner)
        assert not set(groups[train]) & set(groups[validation])
        assert not set(validation) & set(outer)
        assert 0.1 < len(validation) / len(inner) < 0.2
        assert np.array_equal(validation, inner_split(inner, groups, counts, seed)[1])


def test_two_groups_are_enough_for_both_parts():
    inner, groups = np.array([1, 4, 5]), np.array([0, 1, 0, 0, 2, 2])
    train, validation = inner_split(inner, groups, np.ones((6, 2), int), 0)
    assert len(train) + len(validation) == 3
    assert min(len(train), len(validation)) == 1


def test_one_group_cannot_be_parted():
    with pytest.raises(DatasetError, match="one place.*for validation.*--block_size"):
        inner_split(np.arange(4), np.zeros(4, int), np.ones((4, 2), int), 0)


def test_labels_in_one_group_cannot_be_parted():
    counts = np.zeros((9, 2), int)
    counts[0] = 5
    with pytest.raises(DatasetError, match="one place"):
        inner_split(np.arange(9), np.arange(9), counts, 0)


def test_the_training_part_keeps_a_class_that_one_group_holds():
    counts = np.full((14, 2), 10)
    counts[:, 1] = 0
    counts[5, 1] = 10
    for seed in range(5):
        train, _ = inner_split(np.arange(14), np.arange(14) // 2, counts, seed)
        assert 5 in train


def test_the_validation_part_holds_a_class_that_two_groups_hold():
    """Without it all epochs look alike where it is the foreground."""
    counts = np.full((14, 2), 10)
    counts[:, 1] = 0
    counts[[5, 8], 1] = 10
    for seed in range(5):
        parts = inner_split(np.arange(14), np.arange(14) // 2, counts, seed)
        assert all(counts[part, 1].any() for part in parts)


def test_folds_that_choose_an_epoch_without_a_class_are_named(caplog):
    counts = np.array([[5, 0, 0], [5, 3, 0], [5, 0, 0], [5, 2, 0]])  # no third class
    folds = [Fold(np.arange(2), np.array([v]), np.array([3])) for v in (0, 1, 2)]
    index = SimpleNamespace(counts=counts, class_names=["a", "b", "c"])
    config = settings(mode="multiclass", classes=3)
    with caplog.at_level("WARNING"):
        report_absent(config, index, folds)
    (line,) = caplog.messages
    assert line.startswith("fold 1, 3: 1 of 3 classes without a validation pixel (b)")
