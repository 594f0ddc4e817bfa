"""The forest beside the network: when it is trained, on what, and what its report says."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import QUICK, run_main, settings, write_dataset, write_raster
from training_helpers import KFOLD

from common.patches import list_pairs
from common.scores import HEADLINES, scores
from evaluation.tables import report_text
from training import baseline
from training.baseline import (
    SIZES,
    ForestSize,
    Network,
    Task,
    baseline_report,
    choose_size,
    compare,
    estimated_seconds,
    ground_blocks,
)
from training.cross_validation import FoldResults, fold_baseline
from training.folds import Fold
from training.samples import index_samples

NAMES = ["other", "water"]
HOUR = [[{"seconds": 3600.0}]]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Training and test patches whose classes differ in their spectra."""
    root = write_dataset(tmp_path_factory.mktemp("splits"), 4, 2, 5, bands=3)
    pairs = {split: list_pairs(root, split) for split in ("train", "test")}
    return {split: index_samples(some, 2, 255) for split, some in pairs.items()}


def tasks_of(splits) -> list[Task]:
    return [Task(splits["train"], {"test": splits["test"]})]


def networks_of(splits, right: float) -> dict[str, Network]:
    """A network that finds a share of the pixels of each class; a patch is a block."""
    found = splits["test"].counts
    hits = (found * right).astype(int)
    matrices = [[[h, n - h], [m - k, k]] for (h, k), (n, m) in zip(hits, found)]
    return {"test": Network(np.stack(matrices), np.arange(len(found)))}


def report_of(splits, history=HOUR, **changes) -> dict:
    given = NAMES, tasks_of(splits), networks_of(splits, 0.6)
    return baseline_report(settings(**changes), *given, history)


def forest_beside(splits, right: float) -> dict:
    given = tasks_of(splits), networks_of(splits, right), ForestSize(5, 2_000), 1
    return compare(settings(seed=1), NAMES, *given)


@pytest.fixture(scope="module")
def report(splits):
    """Of a network that is worse than the forest."""
    return forest_beside(splits, 0.6)


# --- the report -----------------------------------------------------------------------------


def test_the_forest_is_scored_on_the_pixels_of_the_network(splits, report):
    truth = [entry["pixels"] for entry in report["test"]["per_class"]]
    assert truth == splits["test"].counts.sum(axis=0).tolist()
    assert report["test"]["iou"] > 0.95  # the bands say it all
    assert report["kind"] == "random forest" and report["trees"] == 5
    assert report["pixels"] == 2_000
    json.dumps(report)


def test_a_difference_is_negative_where_the_forest_is_better(report):
    gaps = report["difference"]["test"]
    assert gaps["blocks"] == 5 and set(HEADLINES) < set(gaps)
    for key in HEADLINES:
        low, high = gaps[key]["interval_95"]
        assert low <= gaps[key]["value"] <= high < 0
    assert gaps["overall_accuracy"]["value"] == pytest.approx(
        0.6 - report["test"]["overall_accuracy"], abs=1e-3
    )


def test_a_difference_is_positive_where_the_network_is_better(splits, monkeypatch):
    plain = baseline.count_patches
    monkeypatch.setattr(  # a forest that takes each class for the other
        baseline, "count_patches", lambda *given: plain(*given)[:, :, ::-1]
    )
    gaps = forest_beside(splits, 0.9)["difference"]["test"]
    assert all(gaps[key]["interval_95"][0] > 0 for key in HEADLINES)


def test_a_pixel_of_a_class_without_labels_decides_no_comparison(splits, monkeypatch):
    def stray(*given):  # the forest is right, but for a pixel of the third class
        matrices = np.zeros((len(found), 3, 3), int)
        matrices[:, :2, :2] = found[:, :, None] * np.eye(2, dtype=int)
        matrices[0, 0, [0, 2]] += -1, 1
        return matrices

    found = splits["test"].counts
    monkeypatch.setattr(baseline, "count_patches", stray)
    right = networks_of(splits, 0.9)["test"]
    wide = np.pad(right.matrices, ((0, 0), (0, 1), (0, 1)))
    networks = {"test": Network(wide, right.blocks)}
    config = settings(seed=1, mode="multiclass", classes=3)
    names, size = [*NAMES, "reed"], ForestSize(5, 2_000)
    found_report = compare(config, names, tasks_of(splits), networks, size, 1)
    assert found_report["test"]["mean_iou"] < 0.7  # reed counts as 0 there
    gap = found_report["difference"]["test"]["mean_iou"]
    assert gap["scores"][1] > 0.99 and gap["value"] < 0 and gap["interval_95"][1] < 0
    network = scores(wide.sum(axis=0), names, binary=False)
    text = report_text({"baseline": found_report, "test": network})
    assert "the forest is better" in text


def test_the_forest_stands_beside_the_network_in_the_printed_report(splits, report):
    matrix = networks_of(splits, 0.6)["test"].matrices.sum(axis=0)
    network = scores(matrix, NAMES, binary=True)
    text = report_text({"baseline": report, "test": network})
    assert text.startswith(
        "Forest: a random forest of 5 trees on 2,000 training pixels, "
    )
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("foreground IoU"))
    assert row.split()[2] == f"{network['iou']:.3f}" and "-0." in row
    assert (
        "the forest is better (5 blocks of ground, too few to trust): docs/training.md "
        "says what to try"
    ) in lines


def test_patches_without_a_place_are_blocks_of_their_own(tmp_path):
    root = write_dataset(tmp_path, 3, 0, 0, bands=1)
    pairs = list_pairs(root, "train")
    assert len(set(ground_blocks(pairs))) == 1  # they neighbour each other
    for pair in pairs:
        write_raster(pair.image, np.ones((1, 32, 32), np.uint16), crs=None)
    assert ground_blocks(pairs).tolist() == [0, 1, 2]


# --- when, and how large --------------------------------------------------------------------


def test_a_training_of_less_than_a_minute_gets_no_forest(splits, caplog):
    caplog.set_level("INFO", "semanticseg4eo")
    assert report_of(splits, history=[[{"seconds": 29.0}] * 2]) == {}
    (line,) = caplog.messages
    assert line == (
        "no random forest beside the network: training took less than a minute"
    )


def test_no_baseline_leaves_the_forest_out(splits, caplog):
    caplog.set_level("INFO", "semanticseg4eo")
    assert report_of(splits, no_baseline=True) == {}
    assert not caplog.messages


def test_a_forest_that_cannot_be_quick_enough_is_left_out(splits, monkeypatch, caplog):
    caplog.set_level("INFO", "semanticseg4eo")
    monkeypatch.setattr(baseline, "PASSING", 1e9)
    assert report_of(splits) == {}
    assert "more than a tenth" in caplog.text


def test_forests_are_as_large_as_a_tenth_of_the_training_allows(splits):
    tasks = [Task(splits["train"], {"test": splits["test"]})]
    times = [estimated_seconds(size, tasks, 1) for size in SIZES]
    assert times == sorted(times, reverse=True)
    for size, seconds in zip(SIZES, times):
        # the first of those that take as long
        expected = SIZES[times.index(seconds)]
        assert choose_size(tasks, 10.01 * seconds, 1) == expected
        assert choose_size(tasks, 10.01 * seconds, 2) in SIZES[: SIZES.index(size) + 1]
    assert choose_size(tasks, 9.99 * times[-1], 1) is None


# --- in a run -------------------------------------------------------------------------------


@pytest.fixture
def forests(monkeypatch):
    """What has been read and grown, in order: names of patches, "draw" before those that a forest
    learns from, "fit" behind them.
    """
    events, plain = [], baseline.reader

    def reader(config, index):
        read = plain(config, index)
        return lambda n: events.append(index.pairs[n].name) or read(n)

    monkeypatch.setattr(baseline, "reader", reader)
    for name, word in (("draw_pixels", "draw"), ("fit_forest", "fit")):
        function = getattr(baseline, name)
        monkeypatch.setattr(
            baseline,
            name,
            lambda *given, f=function, word=word: events.append(word) or f(*given),
        )
    return events


def resumed(run, root, place, *more) -> tuple[dict, str]:
    """The report, and what is printed, when a copy of a finished run is resumed."""
    shutil.copytree(run.save_dir, place, dirs_exist_ok=True)
    given = ("--dataset_root", root, "--save_dir", place, *QUICK, "--resume")
    status, out, err = run_main(*given, *more)
    assert status == 0, err
    return json.loads((place / "model_metrics.json").read_text()), out


@pytest.mark.slow
def test_a_forest_of_a_fold_never_saw_what_the_fold_holds_out(
    binary_data, binary_kfold, tmp_path, small_forest, forests
):
    report, out = resumed(binary_kfold, binary_data, tmp_path, *KFOLD, "--epochs", 2)
    parts = " ".join(forests).split("draw")[1:]
    seen = [[part.split() for part in one.split("fit")] for one in parts]
    *folds, (learned, tested) = seen
    assert len(folds) == 3
    for (learned_of_fold, predicted), fold in zip(folds, report["folds"]):
        assert not {*learned_of_fold} & {*predicted}
        assert sorted(predicted) == sorted(fold["held_out_names"])
        assert len(learned_of_fold) == 5  # one of the six chose the network's epoch
    pooled = [
        pair.name
        for s in ("train", "validation")
        for pair in list_pairs(binary_data, s)
    ]
    assert sorted(learned) == sorted(pooled)
    assert sorted(tested) == [pair.name for pair in list_pairs(binary_data, "test")]
    found = report["baseline"]
    truth = [
        [entry["pixels"] for entry in one["pooled"]["per_class"]]
        for one in (found, report)
    ]
    assert truth[0] == truth[1]
    assert found["difference"]["pooled"]["blocks"] == 3  # of neighbours each
    assert {*found["difference"]} == {"pooled", "test"}
    gap = found["difference"]["pooled"]["iou"]["value"]
    assert gap == pytest.approx(report["pooled"]["iou"] - found["pooled"]["iou"])
    assert out.startswith("Forest: ") and out.count("difference") == 2


@pytest.mark.parametrize(
    "folds, count",
    [({}, 1), ({"fold_by": "block"}, 4), ({"fold_column": "site"}, 4)],
)
def test_a_difference_is_resampled_by_ground_or_by_the_blocks_of_the_folds(
    splits, monkeypatch, folds, count
):
    given = []
    monkeypatch.setattr(
        "training.cross_validation.baseline_report", lambda *args: given.extend(args)
    )
    config = settings(val_strategy="kfold", **folds)
    final = SimpleNamespace(train=splits["train"], config=config, names=NAMES)
    fold = Fold(np.arange(2), np.arange(2), np.arange(4))
    found = FoldResults([fold], np.zeros((4, 2, 2), int), np.arange(4), [])
    fold_baseline(final, {"folds": [], "history": []}, found, None, None)
    assert len(set(given[3]["pooled"].blocks)) == count


@pytest.mark.slow
def test_a_resumed_run_has_the_same_forest_and_may_leave_it_out(
    binary_data, binary_run, tmp_path, small_forest
):
    assert "baseline" not in binary_run.report  # a training of seconds
    assert "no random forest beside the network" in binary_run.err
    more = ("--epochs", 4, "--learning_rate", 0.01, "--seed", 3)
    first, second = (
        resumed(binary_run, binary_data, tmp_path / name, *more)[0]["baseline"]
        for name in ("one", "two")
    )
    assert {*first["difference"]} == {"validation", "test"}
    assert first | {"seconds": 0} == second | {"seconds": 0}
    place = tmp_path / "one"
    report, out = resumed(binary_run, binary_data, place, *more, "--no_baseline")
    assert "baseline" not in report and "Forest" not in out
