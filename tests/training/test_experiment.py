"""A training run: its files and its results."""

from __future__ import annotations

import re
from dataclasses import MISSING, asdict, fields

import numpy as np
import pytest
import torch
from helpers import (
    ENCODER,
    SENTINEL,
    same_weights,
    train,
)
from training_helpers import (
    CHECKPOINTS,
    OF_THE_LABELS,
    OF_THE_TEST,
    count_pixels,
    pooled_pixels,
)

import main
from common.patches import list_pairs
from evaluation.reports import plot_training
from model_training import (
    load_checkpoint,
)
from training.settings import TrainingConfig

REPORTS = ("model_metrics.json", "model_training_log.csv", "model_training_plot.png")


@pytest.fixture(
    params=["binary_run", "multiclass_run", "binary_kfold", "multiclass_kfold"]
)
def any_run(request):
    return request.getfixturevalue(request.param)


# --- files ----------------------------------------------------------------------------------


def test_a_split_run_leaves_the_documented_files(split_run):
    expected = {f"model_{name}.pth" for name in (*CHECKPOINTS, "last")}
    expected |= {*REPORTS, *OF_THE_TEST, *OF_THE_LABELS}
    assert {path.name for path in split_run.save_dir.iterdir()} == expected


def test_a_kfold_run_leaves_the_same_files_per_fold_and_a_final_model(kfold_run):
    expected = {f"model_{name}.pth" for name in (*CHECKPOINTS, "last")} | {*REPORTS}
    for number in (1, 2, 3):
        folder = kfold_run.save_dir / f"fold_{number}"
        assert {path.name for path in folder.iterdir()} == expected
    top = {path.name for path in kfold_run.save_dir.iterdir()}
    files = {"model_final_model.pth", "model_last.pth", *REPORTS}
    files |= {*OF_THE_TEST, *OF_THE_LABELS}
    assert top == {"fold_1", "fold_2", "fold_3", *files}


@pytest.mark.usefixtures("real_pictures")
def test_the_plot_is_a_picture_with_something_on_it(any_run, tmp_path):
    from matplotlib.image import imread

    file = any_run.save_dir / "model_training_plot.png"
    if "folds" in any_run.report:  # drawn anew, since a run of folds draws one for each
        plot_training(file := tmp_path / file.name, any_run.report)
    picture = imread(file)
    assert picture.shape[0] > 600 and picture.shape[1] > 800
    thinned = picture[::5, ::5].reshape(-1, picture.shape[2])
    assert len(np.unique(thinned, axis=0)) > 50


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_holds_the_documented_dictionary(split_run, name):
    content = split_run.checkpoint(name)
    assert set(content) == {"model_state_dict", "metadata"}
    metadata = content["metadata"]
    report = split_run.report
    binary = report["settings"]["mode"] == "binary"
    assert metadata["model_name"] == "linknet"
    assert metadata["mode"] == ("binary" if binary else "multiclass")
    assert metadata["in_channels"] == 10
    assert metadata["num_classes"] == (1 if binary else 4)
    assert metadata["input_size"] == [32, 32]
    assert metadata["normalization"] == "percentile_99"
    assert metadata["encoder_name"] == ENCODER
    assert metadata["pretrained"] is False
    params = metadata["training_params"]
    assert params["epochs"] == report["settings"]["epochs"]
    assert params["batch_size"] == 4
    assert params["learning_rate"] == report["settings"]["learning_rate"]
    assert isinstance(metadata["performance_metrics"], dict)
    assert metadata["performance_metrics"]
    if name == "final_model":
        assert params["best_val_loss"] == report["best"]["loss"]
        assert params["best_val_iou"] == report["best"]["iou"]


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(plain(inner) for inner in value)
    return value is None or type(value) in (bool, int, float, str)


def test_every_checkpoint_loads_safely_with_plain_numbers_and_predicts(any_run):
    files = sorted(any_run.save_dir.rglob("*.pth"))
    assert files
    for file in files:
        content = torch.load(file, weights_only=True)
        assert plain(content["metadata"])
        loaded = load_checkpoint(file)
        with torch.inference_mode():
            logits = loaded.model(torch.rand(1, 10, 45, 50))
        assert logits.shape == (1, loaded.config.num_classes, 45, 50)


def test_settings_parser_and_checkpoint_agree_field_by_field(any_run):
    parser = main.build_parser()
    actions = {action.dest: action for action in parser._actions}
    stored = any_run.metadata()["training_params"]
    for item in fields(TrainingConfig):
        action = actions.pop(item.name)
        assert f"--{item.name}" in action.option_strings
        assert action.required is (item.default is MISSING)
        if item.default is not MISSING:
            assert action.default == item.default
        assert item.name in stored
        assert stored[item.name] == any_run.report["settings"][item.name]
    others = {"help", "list_models", "list_encoders", "check", "settings", "debug"}
    assert set(actions) == others


def test_the_report_stores_the_settings_of_the_command_line(binary_run, binary_data):
    expected = TrainingConfig(
        dataset_root=str(binary_data),
        model="linknet",
        mode="binary",
        classes=2,
        encoder_name=ENCODER,
        encoder_depth=5,
        epochs=4,
        learning_rate=0.01,
        seed=3,
        num_workers="0",
        device="cpu",
        save_dir=str(binary_run.save_dir),
    )
    assert binary_run.report["settings"] == asdict(expected)


# --- results --------------------------------------------------------------------------------


def test_the_log_has_a_line_per_epoch_that_agrees_with_the_report(any_run):
    history = any_run.report["history"]
    assert len(any_run.log) == len(history) >= 1
    for line, row in zip(any_run.log, history):
        assert set(line) == set(row)
        assert int(line["epoch"]) == row["epoch"]
        assert float(line["train_loss"]) == row["train_loss"]


def test_the_best_epochs_are_those_of_the_history(split_run):
    history, report = split_run.report["history"], split_run.report
    loss = [row["val_loss"] for row in history]
    combined = [row["val_combined"] for row in history]
    iou = [row["val_iou"] for row in history]
    assert report["best"] == {
        "loss": min(loss),
        "iou": max(iou),
        "combined": max(combined),
    }
    assert report["best_epoch"] == {
        "loss": loss.index(min(loss)) + 1,
        "iou": iou.index(max(iou)) + 1,
        "combined": combined.index(max(combined)) + 1,
    }
    for name in ("loss", "iou", "combined"):
        stored = split_run.metadata(f"best_{name}")["performance_metrics"]
        assert stored["epoch"] == report["best_epoch"][name]


def test_the_final_model_holds_the_best_weights(split_run):
    best, final = split_run.checkpoint("best_combined"), split_run.checkpoint()
    assert same_weights(best, final)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_reported_scores_are_those_of_the_final_model(mode, split, request):
    run = request.getfixturevalue(f"{mode}_run")
    root = request.getfixturevalue(f"{mode}_data")
    matrix = count_pixels(
        run.save_dir / "model_final_model.pth", list_pairs(root, split)
    )
    assert run.report[split]["confusion_matrix"] == matrix.tolist()
    assert run.metadata()["performance_metrics"][split] == run.report[split]


def test_the_network_learns(tmp_path, binary_data):
    done = train(
        binary_data, tmp_path, "--epochs", 15, "--learning_rate", 0.01, "--patience", 0
    )
    losses = [row["train_loss"] for row in done.report["history"]]
    assert losses[-1] < losses[0] / 2
    assert done.report["test"]["iou"] > 0.8


def test_a_class_that_is_nowhere_has_no_score_and_is_out_of_the_means(multiclass_run):
    truth = np.array(multiclass_run.report["test"]["confusion_matrix"])
    entries = multiclass_run.report["test"]["per_class"]
    assert entries[3]["pixels"] == 0
    assert (entries[3]["iou"] is None) == (truth[:, 3].sum() == 0)
    known = [entry["iou"] for entry in entries if entry["iou"] is not None]
    assert multiclass_run.report["test"]["mean_iou"] == pytest.approx(np.mean(known))


def test_unlabelled_and_invalid_pixels_are_in_no_score(multiclass_run):
    assert np.sum(multiclass_run.report["test"]["confusion_matrix"]) == 3 * 25 * 32


def test_class_names_come_from_the_labels(multiclass_run):
    names = ["water", "forest", "town", "ice"]
    assert multiclass_run.metadata()["class_names"] == names
    assert [e["name"] for e in multiclass_run.report["test"]["per_class"]] == names
    assert "forest" in multiclass_run.out


def test_statistics_are_the_percentiles_of_the_training_split(
    multiclass_run, multiclass_data
):
    stored = multiclass_run.metadata()["normalization_statistics"]
    pixels = pooled_pixels(multiclass_data, "train")
    assert stored["rule"] == "dataset"
    assert stored["low"] == pytest.approx(np.percentile(pixels, 1, axis=0))
    assert stored["high"] == pytest.approx(np.percentile(pixels, 99, axis=0))


def test_band_descriptions_are_stored(binary_run):
    assert binary_run.metadata()["band_descriptions"] == list(SENTINEL)


def test_results_go_to_stdout_and_progress_to_stderr(split_run):
    assert "Test" in split_run.out and "overall accuracy" in split_run.out
    assert str(split_run.save_dir / "model_final_model.pth") in split_run.out
    epochs = re.findall(r"^epoch +\d+/\d+  loss ", split_run.err, re.MULTILINE)
    assert len(epochs) == len(split_run.report["history"])
    assert "epoch " not in split_run.out
