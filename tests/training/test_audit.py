"""``model_patches.gpkg`` and ``model_label_audit.gpkg`` of whole runs."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
from helpers import run_main, train, write_dataset

from common.patches import list_pairs


def table_of(run, name: str = "model_patches"):
    return geopandas.read_file(run.save_dir / f"{name}.gpkg", layer=name)


def test_a_split_doubts_only_what_it_did_not_train_on(binary_run, binary_data):
    table = table_of(binary_run)
    expected = {
        (pair.name, split)
        for split in ("train", "validation", "test")
        for pair in list_pairs(binary_data, split)
    }
    assert set(zip(table.name, table.split)) == expected
    assert (table.doubt.isna() == (table.split == "train")).all()
    assert table.doubt.dropna().is_monotonic_decreasing
    assert table.fold.isna().all()


def test_scores_of_patches_add_up_to_those_of_the_report(binary_run):
    table = table_of(binary_run)
    wrong = 1 - binary_run.report["test"]["overall_accuracy"]
    tested = table[table.split == "test"]
    assert np.average(tested.wrong_share, weights=tested.labelled_share) == (
        pytest.approx(wrong, abs=1e-6)
    )


def test_folds_doubt_what_they_hold_out(multiclass_kfold, multiclass_data):
    table = table_of(multiclass_kfold).set_index("name")
    report = multiclass_kfold.report
    for number, fold in enumerate(report["folds"], start=1):
        held_out = table.loc[fold["held_out_names"]]
        assert (held_out.fold == number).all()
    assert table.doubt.notna().all()
    assert (table.loc[table.fold.isna()].split == "test").all()
    splits = {
        pair.name: split
        for split in ("train", "validation", "test")
        for pair in list_pairs(multiclass_data, split)
    }
    assert table.split.to_dict() == splits


@pytest.mark.slow
def test_a_wrong_label_heads_the_list_and_is_outlined(tmp_path):
    import rasterio

    root = write_dataset(tmp_path / "data", 8, 4, 0, bands=4)
    wrong = list_pairs(root, "train")[3]
    with rasterio.open(wrong.label, "r+") as file:
        file.write(1 - file.read(1), 1)
    options = ("--val_strategy", "kfold", "--n_splits", 2, "--label_audit")
    more = ("--epochs", 12, "--learning_rate", 0.01, "--seed", 1)
    run = train(root, tmp_path / "run", *options, *more)
    assert table_of(run).name[0] == wrong.name
    areas = table_of(run, "model_label_audit")
    assert (areas.confidence >= 0.8).all()
    largest = areas.groupby("patch").square_metres.sum().idxmax()
    assert largest == wrong.name


def test_the_audit_of_areas_needs_folds(small_data, tmp_path):
    words = ("--dataset_root", small_data, "--save_dir", tmp_path, "--model", "unet")
    status, _, err = run_main(*words, "--label_audit")
    assert status == 2
    assert "--label_audit with --val_strategy split: expected kfold" in err
