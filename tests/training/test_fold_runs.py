"""Cross-validation by folds of blocks, strips and single patches: whole runs."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import shapely
from helpers import (
    ORIGIN,
    QUICK,
    make_patch,
    patch_everywhere,
    write_raster,
)
from training_helpers import SIDE

import main
from common.patches import list_pairs, patch_footprints
from common.scores import HEADLINES
from training import epochs
from training.folds import (
    plan_folds,
    spatial_groups,
)
from training.samples import index_samples
from training.settings import TrainingConfig


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
        *("--dataset_root", root, "--save_dir", save_dir, *QUICK, "--batch_size", 8),
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


@pytest.mark.parametrize(
    "fold_by",
    [
        "block",
        pytest.param("random", marks=pytest.mark.slow),
        pytest.param("column", marks=pytest.mark.slow),
    ],
)
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
            line = f"pooled {report['pooled'][key]:.3f} [{low:.3f}, {high:.3f}]"
            assert line in runs(fold_by).out
    assert runs("random").report["blocks"] is None
    assert runs("block").report["blocks"] == 9


@pytest.mark.slow
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


@pytest.mark.slow
def test_both_tells_the_optimism(runs):
    found = runs("both")
    random, blocked = found.report["random"], found.report
    for key, entry in found.report["optimism"].items():
        gap = random["pooled"][key] - blocked["pooled"][key]
        assert entry["value"] == pytest.approx(gap)
        low, high = entry["interval_95"]
        assert low <= gap <= high
    printed = " ".join(found.out.split())  # a minus makes a column wider
    assert "folds at random folds by block" in printed
    assert f" iou {random['pooled']['iou']:.3f} [" in printed
    assert "optimism of iou" in printed


def test_random_folds_of_both_are_those_of_random_alone(runs):
    one, other = runs("random").report, runs("both").report["random"]
    for key in ("summary", "pooled"):
        assert one[key] == other[key]


@pytest.mark.slow
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
        (("--val_strategy", "split", "--n_splits", 3), "--n_splits 3"),
    ],
)
def test_an_option_of_folds_without_an_effect_is_refused(
    scene, tmp_path, capsys, options, named
):
    with pytest.raises(SystemExit) as ended:
        main.main(words(scene, tmp_path / "out", *options))
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
