"""Spatial folds: where patches lie, groups and folds of them, buffers, scores, and whole runs."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from helpers import ORIGIN, make_patch, patch_everywhere, write_dataset, write_raster
from pyproj import Geod

import main
from common.balance import uneven_shares, unit_shares
from common.errors import DatasetError
from common.ground import typical_patch_side
from common.patches import PatchPair, list_pairs, patch_footprints
from evaluation.matrices import block_bootstrap, fold_statistics, score_gap
from evaluation.tables import side_by_side
from model_training import HEADLINES, scores
from training import epochs
from training.folds import (
    drop_near,
    inner_split,
    make_folds,
    plan_folds,
    spatial_groups,
)
from training.samples import index_samples
from training.settings import TrainingConfig

SIDE = 320.0  # metres, of the patches of ``ground``


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


def measure(matrix: np.ndarray) -> dict:
    return scores(matrix, ["a", "b", "c"], binary=False)


def random_matrices(count: int = 12, classes: int = 3, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, (count, classes, classes))


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


def test_unevenness_is_zero_for_equal_folds():
    shares = unit_shares(np.tile([2, 10, 0, 5], (6, 1)))
    required = np.ones(3, bool)

    def unevenness(folds) -> float:
        sums = np.zeros((3, 3))
        np.add.at(sums, folds, shares)
        return uneven_shares(sums, [1 / 3] * 3, required)

    assert unevenness(np.arange(6) % 3) == pytest.approx(0)
    # two folds have 1/2 and 0 instead of 1/3: a third per column, and patches count twice;
    # and the empty fold lacks patches and both classes
    expected = (2 / 6 + 1 / 3) * (2 + 1 + 1) + 30
    assert unevenness([0, 0, 0, 1, 1, 1]) == pytest.approx(expected)


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
    with pytest.raises(DatasetError, match="one place.*early stopping.*--block_size"):
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


# --- statistics -----------------------------------------------------------------------------


def test_statistics_over_folds_agree_with_scipy():
    from scipy import stats

    values = [0.5, 0.7, 0.65, 0.8]
    found = fold_statistics(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["interval_95"] == pytest.approx([expected.low, expected.high])
    one = fold_statistics([0.5])
    assert (one["mean"], one["std"], one["interval_95"]) == (0.5, None, None)


def test_bootstrap_agrees_with_a_plain_loop():
    matrices, repeats = random_matrices(), 200
    found = block_bootstrap(matrices, measure, 3, repeats)
    rng = np.random.default_rng(3)
    results = []
    for times in rng.multinomial(12, np.full(12, 1 / 12), repeats):
        total = np.zeros((3, 3), int)
        for matrix, count in zip(matrices, times):
            for _ in range(count):
                total += matrix
        results.append(measure(total))
    for key in HEADLINES:
        expected = np.percentile([result[key] for result in results], [2.5, 97.5])
        assert found[key] == pytest.approx(expected.tolist())


def test_bootstrap_agrees_with_scipy():
    from scipy import stats

    matrices = random_matrices(30)

    def accuracy(chosen):
        chosen = matrices[chosen.astype(int)].sum(axis=0)
        return np.trace(chosen) / chosen.sum()

    expected = stats.bootstrap(
        (np.arange(30),),
        accuracy,
        n_resamples=2000,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = block_bootstrap(matrices, measure, 0, 2000)["overall_accuracy"]
    assert found == pytest.approx([expected.low, expected.high], abs=0.003)


def test_bootstrap_interval_holds_the_pooled_score_and_depends_on_the_seed_alone():
    matrices = random_matrices(40)
    found = block_bootstrap(matrices, measure, 1)
    assert found == block_bootstrap(matrices, measure, 1)
    assert found != block_bootstrap(matrices, measure, 2)
    low, high = found["kappa"]
    assert low < measure(matrices.sum(axis=0))["kappa"] < high


def test_equal_blocks_have_a_bootstrap_interval_of_no_width():
    matrix = random_matrices(1)[0]
    low, high = block_bootstrap(np.tile(matrix, (9, 1, 1)), measure, 0)["iou"]
    assert low == pytest.approx(high) == pytest.approx(measure(matrix)["iou"])


def test_one_block_has_no_interval():
    assert set(block_bootstrap(random_matrices(1), measure, 0).values()) == {None}


def test_a_score_that_no_draw_has_gets_no_interval():
    empty = np.zeros((4, 3, 3), int)
    assert set(block_bootstrap(empty, measure, 0).values()) == {None}


def test_bootstrap_of_a_difference_draws_the_same_blocks_for_both():
    first, second = random_matrices(20), random_matrices(20, seed=1)
    stacked = np.stack([first, second], axis=1)  # (G, 2, K, K)
    found = block_bootstrap(stacked, lambda pair: score_gap(*map(measure, pair)), 0)
    times = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), 1000)
    gaps = [
        measure(np.tensordot(t, first, 1))["f1"]
        - measure(np.tensordot(t, second, 1))["f1"]
        for t in times
    ]
    assert found["f1"] == pytest.approx(np.percentile(gaps, [2.5, 97.5]).tolist())


# --- the two side by side -------------------------------------------------------------------


def entry(value: float | None) -> dict:
    interval = None if value is None else [value - 0.02, value + 0.02]
    return {
        "pooled": dict.fromkeys(HEADLINES, value),
        "intervals": dict.fromkeys(HEADLINES, interval),
    }


def test_side_by_side_tells_the_optimism():
    gap = {key: [0.1, 0.2] for key in HEADLINES}
    text = side_by_side(entry(0.8), entry(0.65), gap)
    assert "kappa             0.800 [0.780, 0.820]    0.650 [0.630, 0.670]" in text
    last = text.splitlines()[-1]
    assert last.startswith("optimism of iou   0.150 [0.100, 0.200]: what random folds")


def test_side_by_side_claims_no_optimism_that_may_be_chance():
    text = side_by_side(entry(0.8), entry(0.7), {"iou": [-0.1, 0.3]})
    assert text.endswith("0.100 [-0.100, 0.300]: too few blocks to tell it from chance")


def test_side_by_side_claims_no_optimism_where_there_is_none():
    assert "not better here" in side_by_side(entry(0.5), entry(0.6))


def test_side_by_side_stands_missing_scores():
    text = side_by_side(entry(None), entry(0.6))
    assert "optimism" not in text
    assert "nan" not in text.lower()


# --- runs -----------------------------------------------------------------------------------


def write_map(root, columns: int = 6, rows: int = 4, step: float = SIDE, **options):
    """A dataset of one band whose patches lie in a grid, row by row; its root."""
    rng = np.random.default_rng(0)
    for number in range(columns * rows):
        image, label = make_patch(rng, 1, 2, (32, 32), "uint8")
        row, column = divmod(number, columns)
        origin = (ORIGIN[0] + column * step, ORIGIN[1] - row * step)
        split = "train" if number % 3 else "validation"
        for kind, pixels in (("images", image), ("labels", label)):
            path = root / split / kind / f"patch_{number:02}.tif"
            write_raster(path, pixels, origin=origin, **options)
    return root


def words(root, save_dir, *options) -> list[str]:
    """A command line that cross-validates quickly."""
    given = [
        *("--dataset_root", root, "--save_dir", save_dir, "--model", "unet-dropout"),
        *("--epochs", 1, "--num_workers", 0, "--device", "cpu", "--batch_size", 8),
        *("--val_strategy", "kfold", "--n_splits", 3, *options),
    ]
    return [str(word) for word in given]


@dataclass(frozen=True)
class Trained:
    """A run: its report, what it printed, and the places of the patches of each training."""

    save_dir: Path
    report: dict
    out: str
    fitted: list  # per training (folder, footprints to train on, footprints to stop by)


def cross_validate(root, save_dir, *options) -> Trained:
    """Run main.py; all must go well. What each training gets is noted on the way."""
    fitted, out, fit = [], io.StringIO(), epochs.fit

    def noting_fit(run):
        parts = (run.train, run.validation)
        places = [s and patch_footprints(s.pairs).to_numpy() for s in parts]
        fitted.append((run.save_dir.relative_to(save_dir).as_posix(), *places))
        return fit(run)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch_everywhere(patch, "training.epochs.fit", noting_fit)
        try:
            assert main.main(words(root, save_dir, *options)) == 0
        finally:
            logging.getLogger().handlers.clear()
    report = json.loads((save_dir / "model_metrics.json").read_text())
    return Trained(save_dir, report, out.getvalue(), fitted)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """48 patches that overlap by a quarter."""
    return write_map(tmp_path_factory.mktemp("scene"), 8, 6, 0.75 * SIDE)


@pytest.fixture(scope="module")
def runs(scene, tmp_path_factory):
    def cached(fold_by: str) -> Trained:
        save_dir = tmp_path_factory.mktemp(fold_by)
        options = () if fold_by == "random" else ("--block_size", 2 * SIDE)
        buffer = ("--buffer", 50) if fold_by == "block" else ()
        return cross_validate(scene, save_dir, "--fold_by", fold_by, *options, *buffer)

    return functools.cache(cached)


def places_of(scene, indices) -> np.ndarray:
    pairs = [p for split in ("train", "validation") for p in list_pairs(scene, split)]
    return patch_footprints([pairs[i] for i in indices]).to_numpy()


def held_out_of(scene, found: Trained, kind: str) -> list[np.ndarray]:
    """The places that each fold of a run holds out, planned anew from its settings."""
    config = TrainingConfig(**found.report["settings"])
    pairs = [p for split in ("train", "validation") for p in list_pairs(scene, split)]
    survey = index_samples(pairs, 2, 255)
    ground = patch_footprints(pairs)
    blocks = spatial_groups(ground, "block", config.block_size, config.n_splits)
    folds = plan_folds(config, kind, survey, ground, blocks)
    return [places_of(scene, fold.held_out) for fold in folds]


def distances(first, second) -> np.ndarray:
    return shapely.distance(first[:, None], second[None, :])


def common(first, second) -> float:
    return shapely.area(shapely.intersection(first[:, None], second[None, :])).max()


@pytest.mark.parametrize("fold_by", ["random", "block", "column"])
def test_no_held_out_patch_is_trained_on_or_stopped_by(scene, runs, fold_by):
    found = runs(fold_by)
    held_out = held_out_of(scene, found, fold_by)
    assert [folder for folder, *_ in found.fitted] == [
        "fold_1",
        "fold_2",
        "fold_3",
        ".",
    ]
    for outer, (_, train, validation) in zip(held_out, found.fitted):
        for part in (train, validation):
            corners = {shape.bounds for shape in part}
            assert corners and not corners & {shape.bounds for shape in outer}
        assert not {s.bounds for s in train} & {s.bounds for s in validation}
    assert sum(len(outer) for outer in held_out) == 48
    assert len(found.fitted[3][1]) == 48 and found.fitted[3][2] is None


@pytest.mark.parametrize("fold_by", ["block", "column"])
def test_spatial_folds_share_no_ground_and_keep_the_buffer(scene, runs, fold_by):
    found = runs(fold_by)
    held_out = held_out_of(scene, found, fold_by)
    for outer, (_, train, validation) in zip(held_out, found.fitted):
        for one, other in itertools.combinations((train, validation, outer), 2):
            assert common(one, other) < 1
            if fold_by == "block":
                assert distances(one, other).min() >= 50


def test_folds_at_random_do_share_ground(scene, runs):
    found = runs("random")
    held_out = held_out_of(scene, found, "random")
    assert common(found.fitted[0][1], held_out[0]) > 1000


def test_a_run_reports_folds_pooled_and_bootstrapped(runs):
    for fold_by in ("random", "block", "column"):
        report = runs(fold_by).report
        matrices = [fold["held_out"]["confusion_matrix"] for fold in report["folds"]]
        assert report["pooled"]["confusion_matrix"] == np.sum(matrices, axis=0).tolist()
        assert np.sum(matrices) == 48 * 32 * 32
        for key in HEADLINES:
            low, high = report["intervals"][key]
            assert low <= report["pooled"][key] <= high
            assert len(report["summary"][key]["values"]) == 3
            line = f"pooled {report['pooled'][key]:.3f}  [{low:.3f}, {high:.3f}]"
            assert line in runs(fold_by).out
    assert runs("random").report["blocks"] is None
    assert runs("block").report["blocks"] == 9


def test_both_trains_both_and_one_final_model(scene, runs):
    found = runs("both")
    folders = [f"{kind}/fold_{n}" for kind in ("random", "block") for n in (1, 2, 3)]
    assert [folder for folder, *_ in found.fitted] == [*folders, "."]
    for folder in folders:
        metrics = json.loads(
            (found.save_dir / folder / "model_metrics.json").read_text()
        )
        kind, _, number = folder.partition("/fold_")
        whole = found.report["random"] if kind == "random" else found.report
        assert whole["folds"][int(number) - 1] == metrics
        assert (found.save_dir / folder / "model_final_model.pth").exists()
    models = {path.name for path in found.save_dir.glob("*.pth")}
    assert models == {"model_final_model.pth", "model_last.pth"}
    for kind, done in (("random", found.fitted[:3]), ("block", found.fitted[3:6])):
        for outer, (_, train, _) in zip(held_out_of(scene, found, kind), done):
            assert (common(train, outer) < 1) == (kind == "block")


def test_both_tells_the_optimism(runs):
    found = runs("both")
    random, blocked = found.report["random"], found.report
    for key, entry in found.report["optimism"].items():
        gap = random["pooled"][key] - blocked["pooled"][key]
        assert entry["value"] == pytest.approx(gap)
        low, high = entry["interval_95"]
        assert low <= gap <= high
    assert "folds at random         folds by block" in found.out
    assert f"iou               {random['pooled']['iou']:.3f} [" in found.out
    assert "optimism of iou" in found.out


def test_random_folds_of_both_are_those_of_random_alone(runs):
    one, other = runs("random").report, runs("both").report["random"]
    for key in ("summary", "pooled"):
        assert one[key] == other[key]


def test_random_folds_need_no_crs(tmp_path):
    root = write_map(tmp_path / "data", 3, 3, crs=None)
    assert main.main(words(root, tmp_path / "out")) == 0


@pytest.mark.parametrize("fold_by", ["block", "column", "both"])
def test_spatial_folds_without_a_crs_are_an_error_before_training(
    tmp_path, capsys, fold_by
):
    root = write_map(tmp_path / "data", 3, 3, crs=None)
    assert main.main(words(root, tmp_path / "out", "--fold_by", fold_by)) == 1
    assert "has no CRS" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--fold_by", "block", "--n_splits", 5), "4 groups of patches cannot make 5"),
        (("--fold_by", "both", "--n_splits", 5), "4 groups of patches cannot make 5"),
        (
            ("--fold_by", "block", "--block_size", 320, "--buffer", 9000),
            "lower --buffer",
        ),
        (("--fold_by", "column", "--n_splits", 9), "too few columns"),
    ],
)
def test_folds_that_cannot_be_are_an_error_before_training(
    scene, tmp_path, capsys, options, expected
):
    assert main.main(words(scene, tmp_path / "out", *options)) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--block_size", 100), "--block_size 100.0"),
        (("--buffer", 5), "--buffer 5.0"),
        (("--fold_by", "block", "--block_size", 0), "--block_size 0.0"),
        (("--fold_by", "block", "--buffer", -1), "--buffer -1.0"),
        (("--fold_by", "both", "--buffer", "inf"), "--buffer inf"),
        (("--fold_by", "row"), "--fold_by"),
        (("--val_strategy", "split", "--fold_by", "both"), "--fold_by both"),
        (("--val_strategy", "split", "--block_size", 9), "--block_size 9.0"),
        (("--val_strategy", "split", "--buffer", 9), "--buffer 9.0"),
    ],
)
def test_an_option_of_folds_without_an_effect_is_refused(
    scene, tmp_path, capsys, options, named
):
    with pytest.raises(SystemExit) as ended:
        main.main(words(scene, tmp_path / "out", *options))
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
