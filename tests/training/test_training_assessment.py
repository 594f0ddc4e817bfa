"""What a run reports of its final model: calibration, examples, areas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    QUICK,
    drawn_pixels,
    patch_everywhere,
    run_main,
    train,
    write_dataset,
    write_raster,
)
from training_helpers import CHECKPOINTS, OF_THE_TEST, drawn_folds, origin_of

import Evaluate_map
from common.patches import PatchPair, distance_between, list_pairs, read_patch
from common.rasters import open_raster
from common.text import distance_text
from evaluation.areas import estimate_areas
from evaluation.boundaries import BoundaryScores
from evaluation.calibration import (
    Calibration,
    fit_temperature,
)
from evaluation.reliability import expected_calibration_error
from evaluation.tables import report_text
from model_training import (
    confusion_matrix,
    load_checkpoint,
    normalize,
    predict_classes,
)


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


def test_the_final_scores_have_boundaries_of_every_split(split_run):
    report = split_run.report
    root = report["settings"]["dataset_root"]
    file = split_run.save_dir / "model_final_model.pth"
    names = report["class_names"]
    for split in ("validation", "test"):
        counter = BoundaryScores(len(names), (2, 2))
        for logits, mask in logits_of(file, list_pairs(root, split)):
            counter.add(predict_classes(logits)[0].numpy(), mask[0].numpy())
        found, expected = report[split]["boundary"], counter.report(names, 10)
        assert found["mean_f1"] == pytest.approx(expected["mean_f1"], abs=0.01)
        assert found["tolerance_metres"] == pytest.approx(20, rel=0.01)
    assert "boundaries agree within 2 pixels (20 m)" in split_run.out


def test_another_examination_of_the_final_model_gives_the_same_report(
    split_run, tmp_path, monkeypatch
):
    patch_everywhere(monkeypatch, "common.pictures.save_figure", lambda *_: None)
    words = [
        "--model", split_run.save_dir / "model_final_model.pth", "--output", tmp_path,
        "--dataset_root", split_run.report["settings"]["dataset_root"], "--device", "cpu",
    ]  # fmt: skip
    assert Evaluate_map.main([str(word) for word in words]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    expected = split_run.report["test"]
    for key in expected.keys() - {"loss"}:
        assert found["test"][key] == expected[key], key
    calibration = split_run.report["calibration"]
    for key in ("temperature", "ece_before", "ece_after"):
        assert found["calibration"][key] == pytest.approx(calibration[key], abs=1e-4)


def test_the_examples_are_drawn_in_rows_of_four(split_run):
    from matplotlib.image import imread

    rows = len(list_pairs(split_run.report["settings"]["dataset_root"], "test"))
    height, width, _ = imread(split_run.save_dir / "model_test_examples.png").shape
    assert abs(height / width - rows / 4) < 0.1


def test_pictures_of_a_former_run_do_not_outlive_it(small_data, tmp_path):
    for name in OF_THE_TEST:
        (tmp_path / name).touch()
    done = train(small_data, tmp_path, "--overwrite")  # it has no test split
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
    train(small_data, tmp_path, "--overwrite")
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
    assert hectares == pytest.approx(mapped * 100 / 1e4, rel=1e-3)  # pixels of 10 m
    pairs = list_pairs(multiclass_data, "test")
    matrices = [
        confusion_matrix(logits.argmax(dim=1), mask, 4).numpy()
        for logits, mask in logits_of(file, pairs)
    ]
    expected = estimate_areas(np.stack(matrices), mapped, 100)
    for entry, other in zip(entries, expected["per_class"]):
        assert entry["area_ha"]["value"] == pytest.approx(
            other["area_ha"]["value"], rel=1e-3
        )
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


@pytest.mark.slow
def test_areas_after_kfold_count_every_patch_once(binary_data, tmp_path):
    options = ("--val_strategy", "kfold", "--n_splits", 2, "--area_estimation")
    done = train(binary_data, tmp_path, *options)
    entries = done.report["areas"]["per_class"]
    hectares = sum(entry["mapped_ha"] for entry in entries)
    # on the ellipsoid, in UTM
    assert hectares == pytest.approx(11 * 32 * 32 / 100, rel=2e-3)


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


def nearest_metres(examined, trained) -> list[float]:
    """Metres from the centres of patches to the nearest of others, in the plane of their CRS."""

    def centres(pairs) -> np.ndarray:
        found = []
        for pair in pairs:
            with open_raster(pair.image) as file:
                found.append(file.transform * (file.width / 2, file.height / 2))
        return np.array(found)

    apart = centres(examined)[:, None] - centres(trained)
    return np.hypot(*apart.transpose(2, 0, 1)).min(axis=1).tolist()


def test_beside_test_scores_stands_the_distance_to_the_training(
    multiclass_run, multiclass_data
):
    test, trained = (list_pairs(multiclass_data, split) for split in ("test", "train"))
    found = multiclass_run.report["test_distance_m"]
    assert found == pytest.approx(np.median(nearest_metres(test, trained)), rel=2e-3)
    lines = report_text(multiclass_run.report).split("\nTest\n")[1].splitlines()
    told = f"{distance_text(found)} from a patch to the nearest training patch"
    assert any(line.startswith(told) for line in lines)


def test_of_folds_each_patch_counts_against_the_training_of_its_own_fold(
    binary_kfold, binary_data
):
    pairs, folds = drawn_folds(binary_kfold, binary_data)
    metres = []
    for fold in folds:
        held_out, trained = (
            [pairs[n] for n in some] for some in (fold.held_out, fold.train)
        )
        metres += nearest_metres(held_out, trained)
    report = binary_kfold.report
    assert report["pooled_distance_m"] == pytest.approx(np.median(metres), rel=2e-3)
    test = nearest_metres(list_pairs(binary_data, "test"), pairs)
    assert report["test_distance_m"] == pytest.approx(np.median(test), rel=2e-3)
    assert report_text(report).count("to the nearest training patch (median") == 2


def test_without_a_place_of_every_patch_no_distance_is_told(binary_data, tmp_path):
    pairs = list_pairs(binary_data, "test")
    lost = PatchPair(tmp_path / "lost.tif", pairs[0].label)
    write_raster(lost.image, np.zeros((1, 8, 8), np.uint8), crs=None)
    trained = list_pairs(binary_data, "train")
    assert distance_between([(pairs, trained)]) is not None
    assert distance_between([(pairs, [*trained, lost])]) is None
