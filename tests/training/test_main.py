"""main.py as a user runs it: whole trainings on tiny datasets, their files, and their errors."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    QUICK,
    ROOT,
    SENTINEL,
    TINY,
    Outcome,
    drawn_pixels,
    make_patch,
    patch_everywhere,
    run_main,
    same_weights,
    train,
    write_dataset,
    write_raster,
)
from sklearn import metrics as reference

import main
from common import UNLABELLED
from common.architectures import BINARY_NAMES, ModelConfig, get_available_models
from common.errors import DatasetError
from common.patches import list_pairs, read_patch
from common.rasters import open_raster
from evaluation.areas import estimate_areas
from evaluation.calibration import (
    Calibration,
    expected_calibration_error,
    fit_temperature,
)
from evaluation.matrices import fold_summary
from evaluation.tables import report_text
from model_training import (
    build_model,
    confusion_matrix,
    get_available_encoders,
    load_checkpoint,
    normalize,
)
from training.epochs import validate
from training.folds import plan_folds
from training.loop import train_one_epoch
from training.run import TrainingRun, build
from training.samples import index_samples
from training.settings import TrainingConfig

CHECKPOINTS = ("best_loss", "best_iou", "best_combined", "final_model")
REPORTS = ("model_metrics.json", "model_training_log.csv", "model_training_plot.png")
OF_THE_TEST = ("model_reliability.png", "model_test_examples.png")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def binary_data(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("binary"), 6, 3, 2, descriptions=SENTINEL
    )


@pytest.fixture(scope="module")
def multiclass_data(tmp_path_factory):
    """Three classes that are labelled, and a fourth that occurs nowhere."""
    return write_dataset(
        tmp_path_factory.mktemp("multiclass"),
        6,
        3,
        3,
        classes=3,
        nodata=0,
        invalid_rows=3,
        unlabelled_rows=4,
        tags={"CLASS_NAMES": json.dumps(["water", "forest", "town", "ice"])},
    )


@pytest.fixture(scope="module")
def binary_run(binary_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("binary_models") / "deep" / "folder"
    return train(
        binary_data, save_dir, "--epochs", 4, "--learning_rate", 0.01, "--seed", 3
    )


@pytest.fixture(scope="module")
def multiclass_run(multiclass_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("multiclass_models")
    options = ("--mode", "multiclass", "--classes", 4, "--use_class_weights")
    return train(
        multiclass_data, save_dir, *options, "--data_augmentation", "--epochs", 3
    )


KFOLD = ("--val_strategy", "kfold", "--n_splits", 3)


@pytest.fixture(scope="module")
def binary_kfold(binary_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("binary_folds")
    return train(binary_data, save_dir, *KFOLD, "--epochs", 2)


@pytest.fixture(scope="module")
def multiclass_kfold(multiclass_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("multiclass_folds")
    options = ("--mode", "multiclass", "--classes", 4, "--epochs", 3)
    return train(multiclass_data, save_dir, *KFOLD, *options)


@pytest.fixture(
    params=["binary_run", "multiclass_run", "binary_kfold", "multiclass_kfold"]
)
def any_run(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["binary_run", "multiclass_run"])
def split_run(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["binary_kfold", "multiclass_kfold"])
def kfold_run(request):
    return request.getfixturevalue(request.param)


def count_pixels(checkpoint: Path, pairs) -> np.ndarray:
    """The confusion matrix of a model on patches, counted by scikit-learn."""
    loaded = load_checkpoint(checkpoint)
    classes = loaded.config.label_classes
    matrix = np.zeros((classes, classes), int)
    for pair in pairs:
        image, valid, mask = read_patch(pair)
        image = normalize(image, valid, loaded.normalization)
        with torch.inference_mode():
            logits = loaded.model(image[None])[0]
        guess = logits[0] > 0 if classes == 2 else logits.argmax(dim=0)
        known = mask != UNLABELLED
        matrix += reference.confusion_matrix(
            mask[known], guess.numpy()[known].astype(int), labels=range(classes)
        )
    return matrix


# --- files ----------------------------------------------------------------------------------


def test_a_split_run_leaves_the_documented_files(split_run):
    expected = {f"model_{name}.pth" for name in (*CHECKPOINTS, "last")}
    expected |= {*REPORTS, *OF_THE_TEST}
    assert {path.name for path in split_run.save_dir.iterdir()} == expected


def test_a_kfold_run_leaves_the_same_files_per_fold_and_a_final_model(kfold_run):
    expected = {f"model_{name}.pth" for name in (*CHECKPOINTS, "last")} | {*REPORTS}
    for number in (1, 2, 3):
        folder = kfold_run.save_dir / f"fold_{number}"
        assert {path.name for path in folder.iterdir()} == expected
    top = {path.name for path in kfold_run.save_dir.iterdir()}
    files = {"model_final_model.pth", "model_last.pth", *REPORTS, *OF_THE_TEST}
    assert top == {"fold_1", "fold_2", "fold_3", *files}


def test_the_plot_is_a_picture_with_something_on_it(any_run):
    from matplotlib.image import imread

    picture = imread(any_run.save_dir / "model_training_plot.png")
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
    assert metadata["encoder_name"] == "tu-mobilenetv3_small_050"
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
    assert set(actions) == {"help", "list_models", "list_encoders", "check", "debug"}


def test_the_report_stores_the_settings_of_the_command_line(binary_run, binary_data):
    expected = TrainingConfig(
        dataset_root=str(binary_data),
        model="linknet",
        encoder_name="tu-mobilenetv3_small_050",
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


def pooled_pixels(root: Path, *splits: str) -> np.ndarray:
    """The valid pixels (M, C) of splits."""
    found = []
    for pair in (pair for split in splits for pair in list_pairs(root, split)):
        image, valid, _ = read_patch(pair)
        found.append(image[:, valid].T)
    return np.concatenate(found)


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


# --- assessment -----------------------------------------------------------------------------


def logits_of(checkpoint: Path, pairs) -> list:
    """Logits and masks of patches, without a temperature: (1, K, H, W) and (1, H, W)."""
    loaded = load_checkpoint(checkpoint)
    batches = []
    for pair in pairs:
        image, valid, mask = read_patch(pair)
        image = normalize(image, valid, loaded.normalization)
        with torch.inference_mode():
            batches.append((loaded.model(image[None]), torch.from_numpy(mask)[None]))
    return batches


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_the_final_model_alone_holds_the_temperature_of_the_validation(mode, request):
    run = request.getfixturevalue(f"{mode}_run")
    root = request.getfixturevalue(f"{mode}_data")
    holders = [name for name in CHECKPOINTS if "temperature" in run.metadata(name)]
    assert holders == ["final_model"]
    file = run.save_dir / "model_final_model.pth"
    batches = logits_of(file, list_pairs(root, "validation"))
    expected = fit_temperature(*drawn_pixels(batches))
    found = load_checkpoint(file).temperature
    assert found == pytest.approx(expected, rel=1e-3) and found != 1
    assert run.metadata()["temperature"] == found
    assert run.report["calibration"]["temperature"] == found


def test_the_temperature_of_kfold_is_that_of_the_pooled_folds(
    binary_kfold, binary_data
):
    pairs, folds = drawn_folds(binary_kfold, binary_data)
    batches = []
    for number, fold in enumerate(folds, start=1):
        file = binary_kfold.save_dir / f"fold_{number}" / "model_final_model.pth"
        batches += logits_of(file, [pairs[i] for i in fold.held_out])
    expected = fit_temperature(*drawn_pixels(batches))
    found = binary_kfold.metadata()["temperature"]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_reported_calibration_is_that_of_the_test_patches(mode, request):
    run = request.getfixturevalue(f"{mode}_run")
    root = request.getfixturevalue(f"{mode}_data")
    file = run.save_dir / "model_final_model.pth"
    temperature = load_checkpoint(file).temperature
    found = run.report["calibration"]
    for name, divisor in (("before", 1), ("after", temperature)):
        calibration = Calibration()
        for logits, mask in logits_of(file, list_pairs(root, "test")):
            calibration.add(logits, mask, divisor)
        error = expected_calibration_error(calibration)
        assert found[f"ece_{name}"] == pytest.approx(error, abs=1e-3)
        pixels = sum(entry["pixels"] for entry in run.report["test"]["per_class"])
        assert sum(found[name]["pixels"]) == pixels
    before, after = found["ece_before"], found["ece_after"]
    line = f"error {before:.3f}, {after:.3f} with temperature {temperature:.2f}"
    assert line in run.out


def test_the_examples_are_drawn_in_rows_of_four(split_run):
    from matplotlib.image import imread

    rows = len(list_pairs(split_run.report["settings"]["dataset_root"], "test"))
    height, width, _ = imread(split_run.save_dir / "model_test_examples.png").shape
    assert abs(height / width - rows / 4) < 0.1


def test_pictures_of_a_former_run_do_not_outlive_it(small_data, tmp_path):
    for name in OF_THE_TEST:
        (tmp_path / name).touch()
    done = train(small_data, tmp_path)  # it has no test split
    assert "calibration" not in done.report
    assert 0 < done.metadata()["temperature"] < math.inf
    assert not [name for name in OF_THE_TEST if (tmp_path / name).exists()]


def test_folds_of_a_former_run_do_not_outlive_it(small_data, tmp_path):
    stale = [tmp_path / f"{kind}fold_9" for kind in ("", "random/", "block/")]
    for folder in stale:
        folder.mkdir(parents=True)
        (folder / "model_final_model.pth").touch()
    note = stale[0] / "note.txt"
    note.touch()
    train(small_data, tmp_path)
    assert list(tmp_path.rglob("*fold_*")) == [stale[0]]
    assert list(stale[0].iterdir()) == [note]


def test_a_run_does_not_replace_the_weights_that_it_starts_from(small_data, tmp_path):
    file = tmp_path / "model_final_model.pth"
    file.write_bytes(b"weights")
    options = ("--save_dir", tmp_path, "--encoder_weights", file)
    status, _, err = run_main("--dataset_root", small_data, *QUICK, *options)
    assert status == 2 and "another --save_dir: this run would replace" in err
    assert file.read_bytes() == b"weights"


@pytest.fixture(scope="module")
def area_run(multiclass_data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("areas")
    options = ("--mode", "multiclass", "--classes", 4, "--epochs", 3)
    more = ("--no_calibration", "--area_estimation")
    return train(multiclass_data, save_dir, *options, *more)


def test_no_calibration_stores_no_temperature(area_run):
    assert "temperature" not in area_run.metadata()
    file = area_run.save_dir / "model_final_model.pth"
    assert load_checkpoint(file).temperature == 1
    found = area_run.report["calibration"]
    assert found["temperature"] == 1 and found["before"] == found["after"]
    assert f"calibration error {found['ece_before']:.3f}\n" in area_run.out


def test_areas_are_estimated_from_the_map_of_all_patches(area_run, multiclass_data):
    areas = area_run.report["areas"]
    entries = areas["per_class"]
    assert [entry["name"] for entry in entries] == ["water", "forest", "town", "ice"]
    file = area_run.save_dir / "model_final_model.pth"
    mapped = np.zeros(4)
    for split in ("train", "validation", "test"):
        pairs = list_pairs(multiclass_data, split)
        for (logits, _), pair in zip(logits_of(file, pairs), pairs):
            valid = read_patch(pair)[1]
            guess = logits[0].argmax(dim=0).numpy()[valid]
            mapped += np.bincount(guess, minlength=4)
    assert mapped.sum() == 12 * 29 * 32  # three rows of each patch are nodata
    hectares = [entry["mapped_ha"] for entry in entries]
    assert hectares == pytest.approx(mapped * 100 / 1e4)  # pixels of 10 m
    pairs = list_pairs(multiclass_data, "test")
    matrices = [
        confusion_matrix(logits.argmax(dim=1), mask, 4).numpy()
        for logits, mask in logits_of(file, pairs)
    ]
    expected = estimate_areas(np.stack(matrices), mapped, 100)
    for entry, other in zip(entries, expected["per_class"]):
        assert entry["area_ha"]["value"] == pytest.approx(other["area_ha"]["value"])
        users = entry["users_accuracy"]
        assert users["interval_95"] == pytest.approx(
            other["users_accuracy"]["interval_95"]
        )
    assert areas["overall_accuracy"]["value"] == pytest.approx(
        expected["overall_accuracy"]["value"]
    )


def test_areas_are_printed_with_their_intervals(area_run):
    table = area_run.out[area_run.out.index("Areas") :].splitlines()[1:]
    lengths = {len(line) for line in table[:5]}
    assert len(lengths) == 1
    for line, entry in zip(table[1:5], area_run.report["areas"]["per_class"]):
        assert line.startswith(entry["name"])
        area = entry["area_ha"]
        if area["value"] is not None:
            low, high = area["interval_95"]
            assert f"{area['value']:,.1f} [{low:,.1f}, {high:,.1f}]" in line


def test_areas_without_a_crs_are_shares(tmp_path):
    root = write_dataset(tmp_path / "data", 3, 1, 2, bands=3)
    for file in root.rglob("images/*.tif"):
        with open_raster(file) as patch:
            pixels = patch.read()
        write_raster(file, pixels, crs=None, origin=origin_of(file))
    done = train(root, tmp_path / "out", "--area_estimation")
    first = done.report["areas"]["per_class"][0]
    assert "share" in first and "area_ha" not in first and "mapped_ha" not in first
    assert "mapped share" in done.out


def test_areas_after_kfold_count_every_patch_once(binary_data, tmp_path):
    options = ("--val_strategy", "kfold", "--n_splits", 2, "--area_estimation")
    done = train(binary_data, tmp_path, *options)
    entries = done.report["areas"]["per_class"]
    hectares = sum(entry["mapped_ha"] for entry in entries)
    assert hectares == pytest.approx(11 * 32 * 32 / 100)


@pytest.mark.parametrize("strategy", ["split", "kfold"])
def test_areas_without_a_test_split_are_an_error_before_training(
    small_data, tmp_path, strategy
):
    status, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path / "out", *QUICK),
        *("--area_estimation", "--val_strategy", strategy),
    )
    assert status == 1
    assert "--area_estimation" in err and "no test split" in err
    assert not (tmp_path / "out").exists()


# --- cross-validation -----------------------------------------------------------------------


def fold_reports(run: Outcome) -> list[dict]:
    return [
        json.loads((run.save_dir / f"fold_{n}" / "model_metrics.json").read_text())
        for n in (1, 2, 3)
    ]


def drawn_folds(run: Outcome, root: Path) -> tuple[list, list]:
    """All patches of a dataset, and the folds at random that a run drew of them."""
    pairs = list_pairs(root, "train") + list_pairs(root, "validation")
    config = TrainingConfig(**run.report["settings"])
    survey = index_samples(pairs, config.label_classes, config.ignore_index)
    return pairs, plan_folds(config, "random", survey, None, None)


def test_pooled_scores_count_every_pixel_once(kfold_run):
    report = kfold_run.report
    matrices = [fold["held_out"]["confusion_matrix"] for fold in report["folds"]]
    assert report["pooled"]["confusion_matrix"] == np.sum(matrices, axis=0).tolist()
    rows = 32 if report["settings"]["mode"] == "binary" else 25
    assert np.sum(matrices) == 9 * rows * 32


def test_each_fold_reports_as_its_own_file_does(kfold_run):
    assert kfold_run.report["folds"] == fold_reports(kfold_run)


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_a_fold_is_reported_for_what_it_never_saw(mode, request):
    run = request.getfixturevalue(f"{mode}_kfold")
    root = request.getfixturevalue(f"{mode}_data")
    pairs, folds = drawn_folds(run, root)
    seen = []
    for number, (fold, report) in enumerate(zip(folds, fold_reports(run)), start=1):
        parts = (fold.train, fold.validation, fold.held_out)
        assert np.array_equal(np.sort(np.concatenate(parts)), range(9))
        file = run.save_dir / f"fold_{number}" / "model_final_model.pth"
        for key, part in (("held_out", fold.held_out), ("validation", fold.validation)):
            matrix = count_pixels(file, [pairs[i] for i in part])
            assert report[key]["confusion_matrix"] == matrix.tolist()
        seen += fold.held_out.tolist()
    assert sorted(seen) == list(range(9))


def test_the_summary_is_that_of_the_folds(kfold_run):
    from scipy import stats

    report = kfold_run.report
    for key, found in report["summary"].items():
        values = [fold["held_out"][key] for fold in report["folds"]]
        assert found["values"] == values
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["std"] == pytest.approx(np.std(values, ddof=1))
        half = stats.t.ppf(0.975, 2) * stats.sem(values)
        low, high = found["interval_95"]
        assert (low, high) == pytest.approx(
            (np.mean(values) - half, np.mean(values) + half)
        )
        assert re.search(rf"^{key} +{found['mean']:.3f} ", kfold_run.out, re.MULTILINE)


def test_the_final_model_is_trained_for_the_epochs_that_the_folds_found_best(kfold_run):
    report = kfold_run.report
    best = [fold["best_epoch"]["combined"] for fold in report["folds"]]
    assert report["final_epochs"] == sorted(best)[1]
    assert len(report["history"]) == report["final_epochs"]


def test_folds_are_normalized_by_their_own_training_patches(binary_kfold, binary_data):
    pairs, folds = drawn_folds(binary_kfold, binary_data)
    patches = [pooled_pixels_of(pair) for pair in pairs]
    for number, fold in enumerate(folds, start=1):
        file = binary_kfold.save_dir / f"fold_{number}" / "model_best_loss.pth"
        pixels = np.concatenate([patches[i] for i in fold.train])
        expected = np.percentile(pixels, 1, axis=0)
        assert load_checkpoint(file).normalization.low == pytest.approx(expected)


def pooled_pixels_of(pair) -> np.ndarray:
    image, valid, _ = read_patch(pair)
    return image[:, valid].T


def test_the_final_model_of_kfold_sees_train_and_validation_but_never_test(
    binary_kfold, binary_data
):
    stored = binary_kfold.metadata()["normalization_statistics"]
    pixels = pooled_pixels(binary_data, "train", "validation")
    assert stored["high"] == pytest.approx(np.percentile(pixels, 99, axis=0))


@pytest.mark.parametrize("mode", ["binary", "multiclass"])
def test_test_scores_of_kfold_are_those_of_the_final_model(mode, request):
    run = request.getfixturevalue(f"{mode}_kfold")
    root = request.getfixturevalue(f"{mode}_data")
    matrix = count_pixels(
        run.save_dir / "model_final_model.pth", list_pairs(root, "test")
    )
    assert run.report["test"]["confusion_matrix"] == matrix.tolist()


def test_kfold_needs_train_alone(tmp_path):
    root = write_dataset(tmp_path / "data", 6, 0, 0)
    done = train(root, tmp_path / "out", "--val_strategy", "kfold", "--n_splits", 2)
    assert len(done.report["folds"]) == 2 and "test" not in done.report


def test_a_fold_without_a_label_has_no_score_and_breaks_nothing(tmp_path):
    root = write_dataset(tmp_path / "data", 4, 0, 0, bands=3)
    file = min(root.rglob("labels/*.tif"))
    write_raster(file, np.full((32, 32), 255, np.uint8), origin=origin_of(file))
    folds = ("--val_strategy", "kfold", "--n_splits", 4)
    done = train(root, tmp_path / "out", *folds)
    scores = [fold["held_out"]["mean_iou"] for fold in done.report["folds"]]
    assert scores.count(None) == 1
    known = [value for value in scores if value is not None]
    assert done.report["summary"]["mean_iou"]["values"] == known
    assert np.sum(done.report["pooled"]["confusion_matrix"]) == 3 * 32 * 32


def test_more_folds_than_patches_is_an_error(tmp_path):
    root = write_dataset(tmp_path / "data", 2, 1, 0)
    status, _, err = run_main("--dataset_root", root, *QUICK, "--val_strategy", "kfold")
    assert status == 1
    assert "3 patches cannot make 5 folds" in err


def test_a_score_that_only_one_fold_has_is_printed(capsys):
    keys = ("iou", "f1", "mean_iou", "mean_f1", "overall_accuracy", "kappa")
    folds = [dict.fromkeys(keys, 0.25), dict.fromkeys(keys, None)]
    print(report_text({"summary": fold_summary(folds)}))
    assert "0.250" in capsys.readouterr().out


# --- options --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("small"), 4, 2, 0, bands=4, unlabelled_rows=10
    )


@pytest.fixture(scope="module")
def baseline(small_data, tmp_path_factory):
    return train(small_data, tmp_path_factory.mktemp("baseline"))


def test_the_same_seed_gives_the_same_weights_and_scores(
    small_data, baseline, tmp_path
):
    again = train(small_data, tmp_path)
    assert same_weights(again.checkpoint(), baseline.checkpoint())
    assert again.report["validation"] == baseline.report["validation"]


def test_reading_ahead_changes_no_number(small_data, tmp_path):
    runs = [
        train(small_data, tmp_path / str(n), "--data_augmentation", "--num_workers", n)
        for n in (0, 2)
    ]
    assert same_weights(runs[0].checkpoint(), runs[1].checkpoint())


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", 1),
        ("--batch_size", 2),
        ("--learning_rate", 1e-2),
        ("--weight_decay", 0.9),
        ("--loss", "focal"),
        ("--use_class_weights",),
        ("--data_augmentation",),
        ("--data_augmentation", "none"),
        ("--normalization", "image"),
        ("--ignore_index", 7),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_an_option_of_training_changes_the_weights(
    small_data, baseline, tmp_path, options
):
    if (
        "--ignore_index" in options
    ):  # declared nodata becomes 7: nothing else may change
        root = write_dataset(
            tmp_path / "data",
            *(4, 2, 0),
            bands=4,
            label_nodata=255,
            unlabelled_rows=10,
        )
        other = train(root, tmp_path / "out", *options)
        assert same_weights(other.checkpoint(), baseline.checkpoint())
        assert other.metadata()["ignore_index"] == 7
        return
    other = train(small_data, tmp_path, *options)
    assert not same_weights(other.checkpoint(), baseline.checkpoint())


def test_the_model_options_choose_the_model(small_data, tmp_path):
    options = ("--model", "unet-dropout", "--encoder_name", "resnet34")
    done = train(small_data, tmp_path, *options, "--dropout_rate", 0.125)
    loaded = load_checkpoint(tmp_path / "model_final_model.pth")
    rates = {
        layer.p
        for layer in loaded.model.modules()
        if isinstance(layer, torch.nn.Dropout2d)
    }
    assert rates == {0.125}
    assert done.metadata()["model_name"] == "unet-dropout"
    assert done.metadata()["encoder_name"] is None


def test_image_normalization_is_recorded_and_followed(small_data, tmp_path):
    done = train(small_data, tmp_path, "--normalization", "image")
    assert done.metadata()["normalization_statistics"]["rule"] == "image"
    matrix = count_pixels(
        tmp_path / "model_final_model.pth", list_pairs(small_data, "validation")
    )
    assert done.report["validation"]["confusion_matrix"] == matrix.tolist()


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [("cosine", [0.01, 0.0075, 0.0025]), ("plateau", [0.01] * 3), ("none", [0.01] * 3)],
)
def test_the_log_tells_the_learning_rates(small_data, tmp_path, scheduler, expected):
    options = ("--scheduler", scheduler, "--epochs", 3, "--learning_rate", 0.01)
    done = train(small_data, tmp_path, *options)
    rates = [float(row["learning_rate"]) for row in done.log]
    assert rates == pytest.approx(expected)


def test_the_learning_rate_rises_in_the_first_epochs(small_data, tmp_path):
    options = ("--epochs", 5, "--learning_rate", 0.03, "--warmup_epochs", 2)
    rates = [
        [float(row["learning_rate"]) for row in done.log]
        for name in ("cosine", "none")
        for done in [train(small_data, tmp_path / name, *options, "--scheduler", name)]
    ]
    assert rates[0] == pytest.approx([0.01, 0.02, 0.03, 0.0225, 0.0075])
    assert rates[1] == pytest.approx([0.01, 0.02, 0.03, 0.03, 0.03])


def test_onecycle_rises_to_the_rate_and_falls_in_every_step(
    small_data, tmp_path, monkeypatch
):
    rates, plain = [], torch.optim.AdamW.step

    def step(self, *arguments, **options):
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    options = ("--scheduler", "onecycle", "--epochs", 5, "--learning_rate", 0.01)
    options = (*options, "--batch_size", 2)
    done = train(small_data, tmp_path, *options)
    expected = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        expected, 0.01, total_steps=len(rates)
    )
    assert len(rates) % 5 == 0 and len(rates) > 5
    for rate in rates:
        assert rate == pytest.approx(expected.param_groups[0]["lr"])
        expected.step()
        schedule.step() if rate is not rates[-1] else None
    assert 0.009 < max(rates) <= 0.01
    first = [float(row["learning_rate"]) for row in done.log]
    assert first == pytest.approx(rates[:: len(rates) // 5])


def test_a_frozen_encoder_keeps_weights_and_normalization_then_learns(
    small_data, tmp_path, monkeypatch
):
    seen, plain = [], train_one_epoch

    def epoch(model, *arguments, **options):
        before = {k: v.clone() for k, v in model.network.state_dict().items()}
        result = plain(model, *arguments, **options)
        after = model.network.state_dict()
        seen.append({k for k in before if not torch.equal(before[k], after[k])})
        return result

    patch_everywhere(monkeypatch, "training.loop.train_one_epoch", epoch)
    options = ("--model", "unet", "--encoder_name", "resnet18", "--epochs", 3)
    train(small_data, tmp_path, *options, "--freeze_encoder_epochs", 2)
    for changed in seen[:2]:
        assert changed and not any(key.startswith("encoder.") for key in changed)
    assert any(key.startswith("encoder.") and "running" in key for key in seen[2])
    assert any(key.startswith("encoder.") and "conv1.weight" in key for key in seen[2])


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(
    small_data, tmp_path, monkeypatch
):
    norms, plain = [], torch.optim.AdamW.step

    def step(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(small_data, tmp_path / "free", "--epochs", 1)
    free = max(norms)
    norms.clear()
    train(small_data, tmp_path / "clipped", "--epochs", 1, "--clip_grad", free / 10)
    assert max(norms) == pytest.approx(free / 10, rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--warmup_epochs", "2"),
        ("--warmup_epochs", "-1"),
        ("--warmup_epochs", "1", "--scheduler", "onecycle"),
        ("--freeze_encoder_epochs", "1", "--model", "unet-dropout"),  # it has none
        ("--clip_grad", "nan"),
    ],
)
def test_schedules_that_cannot_be_are_wrong_command_lines(small_data, tmp_path, wrong):
    options = ("--dataset_root", small_data, "--save_dir", tmp_path, *QUICK)
    status, _, err = run_main(*options, "--epochs", 2, *wrong)
    assert status == 2 and wrong[0] in err.splitlines()[-1]


@pytest.fixture(scope="module")
def saturating_data(tmp_path_factory):
    """Hardly a second class: once everything is predicted right, no epoch can be better."""
    root = write_dataset(tmp_path_factory.mktemp("one_class"), 4, 2, 0, bands=3)
    for file in root.rglob("labels/*.tif"):
        label = np.zeros((32, 32), np.uint8)
        label[0, 0] = "train" in file.parts
        write_raster(file, label, origin=origin_of(file))
    return root


def origin_of(file: Path) -> tuple[float, float]:
    with open_raster(file) as opened:
        return opened.transform.c, opened.transform.f


def test_training_stops_when_patience_runs_out(saturating_data, tmp_path):
    options = ("--mode", "multiclass", "--loss", "ce", "--learning_rate", 0.01)
    done = train(saturating_data, tmp_path, *options, "--epochs", 60, "--patience", 2)
    best = done.report["best_epoch"]["combined"]
    assert done.report["best"]["combined"] == 1
    assert len(done.report["history"]) == best + 2 < 60
    assert done.metadata()["training_params"]["epochs_run"] == best + 2


def test_patience_0_never_stops(saturating_data, tmp_path):
    options = ("--mode", "multiclass", "--loss", "ce", "--learning_rate", 0.01)
    done = train(saturating_data, tmp_path, *options, "--epochs", 12, "--patience", 0)
    assert len(done.report["history"]) == 12


def test_all_checkpoints_appear_even_without_foreground(
    small_data, tmp_path, monkeypatch
):
    config = TrainingConfig(
        dataset_root=str(small_data), model="linknet", encoder_name=TINY[3]
    )
    index = index_samples(list_pairs(small_data, "train"), 2, UNLABELLED)
    run = TrainingRun(
        config, index, index, tmp_path, BINARY_NAMES, 1, torch.device("cpu")
    )
    build(run)
    found = 0.1, np.array([[9, 0], [0, 0]])
    patch_everywhere(monkeypatch, "training.loop.evaluate", lambda *_, **__: found)
    row = {"epoch": 1}
    assert validate(run, [], row) == ["loss", "iou", "combined"]
    assert row["val_iou"] is None
    assert (tmp_path / "model_best_loss.pth").exists()
    assert (tmp_path / "model_best_iou.pth").exists()


def test_pretrained_without_a_network_is_one_line_that_says_what_to_do(
    small_data, tmp_path
):
    status, out, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path),
        *("--model", "unet", "--encoder_name", "resnet18", "--pretrained"),
    )
    assert status == 1 and out == ""
    assert err.splitlines()[-1].startswith("error: The imagenet weights of resnet18")
    assert "--encoder_weights" in err and "Traceback" not in err


def test_encoder_weights_and_rgb_bands_shape_the_first_layer(small_data, tmp_path):
    source = build_model(ModelConfig("unet", 3, 1, TINY[3]))
    weights = tmp_path / "encoder.pth"
    torch.save(source.network.encoder.state_dict(), weights)
    first = next(
        layer for layer in source.modules() if isinstance(layer, torch.nn.Conv2d)
    )
    options = ("--encoder_weights", weights, "--rgb_bands", "3,2,1")
    still = ("--learning_rate", 1e-30, "--weight_decay", 0)
    done = train(small_data, tmp_path / "out", *options, *still)
    state = done.checkpoint()["model_state_dict"]
    kernels = next(value for value in state.values() if value.ndim == 4) * 4 / 3
    for colour, channel in enumerate((2, 1, 0)):
        torch.testing.assert_close(
            kernels[:, channel], first.weight[:, colour].detach()
        )
    assert done.metadata()["pretrained"] is True


def test_class_names_of_the_option_are_stored(small_data, tmp_path):
    options = ("--mode", "multiclass", "--class_names", "dry, wet")
    done = train(small_data, tmp_path, *options)
    assert done.metadata()["class_names"] == ["dry", "wet"]
    assert "wet" in done.out


def test_class_names_of_the_option_are_stored_in_binary_mode_too(small_data, tmp_path):
    done = train(small_data, tmp_path, "--class_names", "dry,wet")
    assert done.metadata()["class_names"] == ["dry", "wet"]


def test_num_classes_is_another_name_of_classes(multiclass_data, tmp_path):
    done = train(multiclass_data, tmp_path, "--mode", "multiclass", "--num_classes", 3)
    assert done.metadata()["num_classes"] == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [("--dropout_rate", 0.9), ("--rgb_bands", "3,2,1")],
)
def test_an_option_without_an_effect_is_refused(small_data, tmp_path, option, value):
    status, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path, *QUICK, option, value)
    )
    assert status == 2 and option in err


def test_the_device_is_the_cpu_with_one_line_that_says_so_without_a_gpu(
    small_data, tmp_path
):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path, *TINY),
        *("--epochs", 1, "--num_workers", 0),
    )
    assert status == 0
    assert len([line for line in err.splitlines() if "CPU" in line]) == 1


# --- data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["Patch", ""])
@pytest.mark.parametrize("suffix", [".tif", ".TIFF"])
def test_the_root_may_hold_patch_or_the_splits_and_any_tiff_suffix(
    tmp_path, folder, suffix
):
    root = write_dataset(
        tmp_path / "data", 2, 1, 0, bands=3, folder=folder, suffix=suffix
    )
    done = train(root, tmp_path / "out")
    assert done.metadata()["in_channels"] == 3
    assert "test" not in done.report and "Test" not in done.out


@pytest.mark.parametrize(
    ("bands", "dtype", "size"),
    [(1, "uint8", 32), (13, "float32", (48, 40)), (3, "int16", 64)],
)
def test_any_bands_dtype_and_size_train(tmp_path, bands, dtype, size):
    root = write_dataset(
        tmp_path / "data", 2, 1, 1, bands=bands, dtype=dtype, size=size
    )
    done = train(root, tmp_path / "out", "--data_augmentation")
    shape = size if isinstance(size, tuple) else (size, size)
    assert done.metadata()["in_channels"] == bands
    assert done.metadata()["input_size"] == list(shape)


def test_sparse_labels_with_batches_of_one_and_unlabelled_patches_train(tmp_path):
    root = write_dataset(tmp_path / "data", 4, 2, 1, bands=3, size=64)
    files = sorted(root.rglob("train/labels/*.tif"))
    for index, file in enumerate(files):
        with open_raster(file) as opened:
            label = opened.read(1)
        sparse = np.full_like(label, 255)
        if index:
            sparse[::16, ::16] = label[::16, ::16]
        write_raster(file, sparse, origin=origin_of(file))
    options = ("--batch_size", 1, "--use_class_weights", "--epochs", 2)
    done = train(root, tmp_path / "out", *options)
    assert all(math.isfinite(row["train_loss"]) for row in done.report["history"])


def test_a_class_that_only_validation_has_is_trained_without_a_crash(tmp_path):
    root = write_dataset(tmp_path / "data", 4, 2, 0, bands=3)
    for file in root.rglob("validation/labels/*.tif"):
        write_raster(file, np.full((32, 32), 2, np.uint8), origin=origin_of(file))
    options = ("--mode", "multiclass", "--classes", 3, "--use_class_weights")
    done = train(root, tmp_path / "out", *options)
    assert (done.save_dir / "model_metrics.json").exists()


def test_a_nan_in_a_valid_looking_image_is_an_invalid_pixel(tmp_path):
    root = write_dataset(tmp_path / "data", 2, 1, 0, bands=3, dtype="float32")
    for file in root.rglob("images/*.tif"):
        with open_raster(file) as opened:
            image = opened.read()
        image[1, :5, :5] = np.nan
        image[2, 9, 9] = np.inf
        write_raster(file, image, origin=origin_of(file))
    done = train(root, tmp_path / "out")
    counted = np.sum(done.report["validation"]["confusion_matrix"])
    assert counted == 32 * 32 - 26
    assert all(
        math.isfinite(value)
        for value in done.metadata()["normalization_statistics"]["high"]
    )


# --- errors ---------------------------------------------------------------------------------


def last_line(err: str) -> str:
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--dataset_root"),
        (("--dataset_root", "data"), "--model"),
        (("--dataset_root", "data", "--model", "unett"), "did you mean 'unet'"),
        (("--dataset_root", "data", "--model", "fpn", "--epochs", "x"), "--epochs"),
        (("--dataset_root", "data", "--model", "fpn", "--epochs", 0), "--epochs 0"),
        (("--dataset_root", "data", "--model", "fpn", "--mode", "three"), "--mode"),
        (("--dataset_root", "data", "--model", "fpn", "--loss", "dise"), "'dice'"),
        (("--dataset_root", "data", "--model", "fpn", "--epoch", 1), "--epoch"),
        (("--dataset_root", "data", "--model", "fpn", "--scheduler", "x"), "cosine"),
        (
            (
                "--dataset_root",
                "d",
                "--model",
                "unet-dropout",
                "--encoder_name",
                "vgg11",
            ),
            "no exchangeable encoder",
        ),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_names_the_option(arguments, words):
    status, out, err = run_main(*arguments)
    assert status == 2 and out == ""
    assert last_line(err).startswith("main.py: error: ")
    assert words in last_line(err)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--encoder_name", "resnet3"), "did you mean 'resnet34'"),
        (("--rgb_bands", "1,2,99"), "--rgb_bands 1,2,99"),
        (("--encoder_name", "densenet121", "--model", "pan"), "DenseNet"),
    ],
)
def test_what_only_the_libraries_or_the_data_can_tell_ends_with_2_as_well(
    small_data, tmp_path, options, words
):
    status, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path, *QUICK, *options)
    )
    assert status == 2
    assert words in last_line(err) and "Traceback" not in err


def break_nothing(root: Path):
    pass


def remove_label(root: Path):
    min(root.rglob("train/labels/*.tif")).unlink()


def remove_image(root: Path):
    min(root.rglob("validation/images/*.tif")).unlink()


def empty_validation(root: Path):
    for file in root.rglob("validation/*/*.tif"):
        file.unlink()


def cut_image(root: Path):
    file = sorted(root.rglob("train/images/*.tif"))[1]
    file.write_bytes(file.read_bytes()[:-700])


def text_as_image(root: Path):
    sorted(root.rglob("train/images/*.tif"))[1].write_text("no image")


def strange_value(root: Path):
    file = min(root.rglob("validation/labels/*.tif"))
    write_raster(file, np.full((32, 32), 9, np.uint8), origin=origin_of(file))


def other_bands(root: Path):
    file = min(root.rglob("validation/images/*.tif"))
    image, _ = make_patch(np.random.default_rng(0), bands=7)
    write_raster(file, image, origin=origin_of(file))


def other_size(root: Path):
    for kind, array in (
        ("images", np.ones((4, 16, 16), np.uint16)),
        ("labels", np.zeros((16, 16), np.uint8)),
    ):
        file = sorted(root.rglob(f"train/{kind}/*.tif"))[1]
        write_raster(file, array, origin=origin_of(file))


def shifted_label(root: Path):
    file = min(root.rglob("train/labels/*.tif"))
    write_raster(file, np.zeros((32, 32), np.uint8), origin=(1000.0, 2000.0))


def no_labels(root: Path):
    for file in root.rglob("train/labels/*.tif"):
        write_raster(file, np.full((32, 32), 255, np.uint8), origin=origin_of(file))


def no_valid_pixel(root: Path):
    for file in root.rglob("train/images/*.tif"):
        image = np.zeros((4, 32, 32), np.uint16)
        write_raster(file, image, nodata=0, origin=origin_of(file))


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (remove_label, (), "patch_000.tif has no label"),
        (remove_image, (), "has no image"),
        (empty_validation, (), "No images found in"),
        pytest.param(
            *(cut_image, (), "patch_001.tif"),
        ),
        (text_as_image, (), "patch_001.tif"),
        (strange_value, (), "holds 9"),
        (other_bands, (), "(7, 32, 32)"),
        (other_size, (), "(4, 16, 16)"),
        (shifted_label, (), "the same ground"),
        (no_labels, (), "No patch of the train split has a labelled pixel"),
        (no_valid_pixel, (), "labelled pixel"),
        (break_nothing, ("--in_channels", 7), "--in_channels 7"),
        (break_nothing, ("--dataset_root", "nowhere"), "nowhere"),
        (break_nothing, ("--encoder_weights", "none.pth"), "none.pth"),
        pytest.param(
            break_nothing,
            ("--device", "cuda"),
            "--device cuda",
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="this machine has a GPU"
            ),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_done_ends_with_1_and_one_line_that_names_it(
    tmp_path, damage, options, words
):
    root = write_dataset(tmp_path / "data", 3, 2, 0, bands=4)
    damage(root)
    save_dir = tmp_path / "out"
    status, out, err = run_main(
        *("--dataset_root", root, "--save_dir", save_dir, *QUICK, *options)
    )
    assert status == 1 and out == ""
    assert last_line(err).startswith("error: ") and words in last_line(err)
    surveyed = re.compile(r"(train|validation|test) +\d+ patches")
    assert len([line for line in err.splitlines() if not surveyed.match(line)]) == 1
    assert not list(save_dir.glob("*.pth"))


def test_an_interrupted_run_ends_with_130(monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    patch_everywhere(monkeypatch, "training.experiment.run_experiment", interrupt)
    status, out, err = run_main("--dataset_root", "data", *QUICK)
    assert (status, out, err) == (130, "", "interrupted; --resume continues the run\n")


def test_debug_shows_the_traceback():
    with pytest.raises(DatasetError):
        run_main("--dataset_root", "nowhere", *QUICK, "--debug")


def test_in_channels_that_agrees_is_fine(small_data, tmp_path):
    done = train(small_data, tmp_path, "--in_channels", 4)
    assert done.metadata()["training_params"]["in_channels"] == 4


def test_a_save_dir_that_is_a_file_is_an_error_without_traceback(small_data, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path / "file", *QUICK)
    )
    assert status == 1 and "file" in last_line(err) and "Traceback" not in err


def test_a_save_dir_that_is_a_file_is_found_before_training(small_data, tmp_path):
    (tmp_path / "file").write_text("")
    _, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path / "file", *QUICK)
    )
    assert "epoch" not in err and "train " not in err


def test_a_seed_that_not_every_library_takes_is_refused(small_data, tmp_path):
    options = ("--dataset_root", small_data, "--save_dir", tmp_path, *QUICK)
    status, _, err = run_main(*options, "--seed", 2**32)
    assert status == 2 and "argument --seed: expected a smaller" in err


def test_names_of_two_classes_go_with_a_binary_model(small_data, tmp_path):
    done = train(small_data, tmp_path, "--class_names", "dry,wet")
    assert done.metadata()["class_names"] == ["dry", "wet"]
    found = done.report["validation"]
    assert found["iou"] == found["per_class"][1]["iou"]  # wet is the foreground
    assert found["per_class"][1]["name"] == "wet"


def test_labels_of_one_class_are_refused_before_training(tmp_path):
    root = write_dataset(tmp_path / "data", 2, 1, 0, bands=3)
    for file in root.rglob("labels/*.tif"):
        write_raster(file, np.zeros((32, 32), np.uint8), origin=origin_of(file))
    status, _, err = run_main(
        *("--dataset_root", root, "--save_dir", tmp_path / "out", *QUICK)
    )
    assert status == 1
    assert "class 0" in err and "--label_values 0,255" in err
    assert not (tmp_path / "out").exists()


def test_a_second_run_leaves_no_file_of_the_first(small_data, tmp_path):
    train(small_data, tmp_path)
    folds = ("--val_strategy", "kfold", "--n_splits", 2)
    train(small_data, tmp_path, *folds)
    assert not list(tmp_path.glob("model_best_*.pth"))


# --- help and lists -------------------------------------------------------------------------


def test_help_names_every_setting_and_its_default():
    status, out, _ = run_main("--help")
    assert status == 0
    for item in fields(TrainingConfig):
        assert f"--{item.name}" in out
    flat = " ".join(out.split())
    for default in ("0.001", "resnet34", "trained_models", "dice+ce", "100", "42"):
        assert f"(default: {default})" in flat


def test_help_and_wrong_command_lines_import_no_heavy_library():
    code = """
import sys, main
for arguments in (["--help"], ["--model", "unet"], ["--list_models"],
                  ["--dataset_root", "x", "--model", "unett"],
                  ["--dataset_root", "x", "--model", "unet", "--epochs", "0"]):
    try:
        main.main(arguments)
    except SystemExit:
        pass
heavy = ("torch", "torchvision", "segmentation_models_pytorch", "timm", "sklearn",
         "scipy", "geopandas", "matplotlib", "cv2")
loaded = [name for name in heavy if name in sys.modules]
sys.exit(f"imported: {loaded}" if loaded else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-300:]


def test_main_runs_as_a_script():
    command = [sys.executable, str(ROOT / "main.py"), "--list_models"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.split() == get_available_models()


def test_the_lists_print_what_the_options_take():
    status, out, _ = run_main("--list_encoders")
    assert status == 0
    assert out.split() == get_available_encoders()
