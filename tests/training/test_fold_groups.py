"""Folds of whole scenes, or of whole values of a column."""

from __future__ import annotations

import logging
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from helpers import ORIGIN, make_patch, write_raster
from training_helpers import SIDE

from common.errors import DatasetError, OptionError
from common.patches import list_pairs
from training.folds import plan_all_folds
from training.samples import index_samples
from training.settings import TrainingConfig


def write_dates(root: Path, dates: int, places: int = 4, apart: float = 0) -> Path:
    """A dataset of scenes of one place, ``apart`` metres from each other, with its cells.gpkg."""
    rng = np.random.default_rng(0)
    rows = []
    for date in range(dates):
        for place in range(places):
            name = f"d{date}_{place}"
            image, label = make_patch(rng, 1, 2, (32, 32), "uint8")
            split = "train" if place else "validation"
            x, y = ORIGIN[0] + place * SIDE, ORIGIN[1] + date * apart
            for kind, pixels in (("images", image), ("labels", label)):
                file = root / split / kind / f"{name}.tif"
                write_raster(file, pixels, origin=(x, y))
            region = "west" if place < places / 2 else "east"
            shape = shapely.box(x, y - SIDE, x + SIDE, y)
            row = {"name": name, "scene": f"a/{date}.tif", "Region": region}
            rows.append(row | {"number": place, "geometry": shape})
    cells = geopandas.GeoDataFrame(rows, crs="EPSG:32631")
    cells.to_file(root / "cells.gpkg", layer="cells", driver="GPKG")
    return root


def planned(root: Path, **options):
    """The folds of a dataset as names (train, validation, held out), and the groups."""
    pairs = [p for split in ("train", "validation") for p in list_pairs(root, split)]
    config = TrainingConfig(
        dataset_root=str(root),
        model="unet",
        val_strategy="kfold",
        mode="binary",
        **options,
    )
    plans, groups = plan_all_folds(config, index_samples(pairs, 2, 255))
    ((_, folds),) = plans.items()
    parts = [(fold.train, fold.validation, fold.held_out) for fold in folds]
    return [[{pairs[i].name for i in part} for part in fold] for fold in parts], groups


def scenes(names: set[str]) -> set[str]:
    return {name[:2] for name in names}


def test_whole_scenes_are_held_out_and_validated_on_though_they_show_one_place(
    tmp_path, caplog
):
    root = write_dates(tmp_path, 6)
    with caplog.at_level(logging.WARNING, "semanticseg4eo"):
        folds, groups = planned(root, fold_by="scene", n_splits=3)
    for parts in folds:
        assert [len(scenes(part)) for part in parts] == [3, 1, 2]
        assert len(set.union(*map(scenes, parts))) == 6  # none is in two parts
        assert sum(map(len, parts)) == 24  # none is dropped
    assert len(set(groups)) == 6
    (line,) = caplog.messages
    assert line == (
        "24 of 24 patches share ground with a patch of another scene: the scores hold for another "
        "scene of these places, not for new places"
    )


def test_patches_of_equal_value_stay_in_one_fold(tmp_path):
    root = write_dates(tmp_path, 2, 8)
    folds, groups = planned(root, fold_column="NUMBER", n_splits=4)
    assert len(set(groups)) == 8
    for parts in folds:
        numbers = [{name[-1] for name in part} for part in parts]
        assert not numbers[0] & numbers[2] and not numbers[1] & numbers[2]
        assert len(numbers[2]) == 2


def test_two_values_make_two_folds_that_validate_on_their_own_value(tmp_path, caplog):
    root = write_dates(tmp_path, 2, 8)
    with caplog.at_level(logging.INFO, "semanticseg4eo"):
        folds, _ = planned(root, fold_column="Region", n_splits=2)
    for train, validation, held_out in folds:
        assert {name[-1] for name in held_out} in (set("0123"), set("4567"))
        assert train and validation
        assert not {n[-1] for n in train} & {n[-1] for n in validation}  # whole places
    assert "fold 1 trains and validates on one Region" in caplog.messages


def test_a_buffer_keeps_near_patches_of_other_values_from_training(tmp_path):
    root = write_dates(tmp_path, 10, 2, apart=3 * SIDE)
    options = {"fold_by": "scene", "n_splits": 5}
    assert all(sum(map(len, fold)) == 20 for fold in planned(root, **options)[0])
    folds, _ = planned(root, **options, buffer=2.5 * SIDE)
    for train, validation, held_out in folds:
        out = {int(name[1]) for name in held_out}
        kept = {int(name[1]) for name in train | validation}
        assert min(abs(one - other) for one in kept for other in out) > 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fold_by": "scene"}, "--fold_by scene: .* 3 different values, fewer than --n"),
        ({"fold_column": "Region", "n_splits": 3}, "have 2 different values, .*n_splits 3"),
    ],
)  # fmt: skip
def test_fewer_values_than_folds_are_an_error_with_both_numbers(
    tmp_path, options, expected
):
    root = write_dates(tmp_path, 3)
    with pytest.raises(DatasetError, match=expected):
        planned(root, **options)


def test_an_unknown_fold_column_is_an_error_that_lists_those_there(tmp_path):
    root = write_dates(tmp_path, 3)
    with pytest.raises(OptionError, match=r"name, scene, Region, number"):
        planned(root, fold_column="county")


def test_without_cells_or_with_patches_that_they_do_not_hold_nothing_is_guessed(
    tmp_path,
):
    root = write_dates(tmp_path, 3)
    cells = geopandas.read_file(root / "cells.gpkg")
    (root / "cells.gpkg").unlink()
    with pytest.raises(DatasetError, match=r"no .*cells.gpkg, which the extraction"):
        planned(root, fold_by="scene", n_splits=3)
    cells.loc[cells["name"] == "d1_2", "scene"] = None
    cells.to_file(root / "cells.gpkg", layer="cells", driver="GPKG")
    with pytest.raises(DatasetError, match=r"no scene of 1 of 12 patches, as d1_2"):
        planned(root, fold_by="scene", n_splits=3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fold_by": "scene"}, "kfold with it"),
        ({"fold_column": "a"}, "kfold with it"),
        ({"fold_column": "a", "fold_by": "block"}, "--fold_column with --fold_by block"),
        ({"fold_by": "scene", "block_size": 9.0}, "--block_size 9.0: expected"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_folds_of_values_are_refused(options, expected):
    kfold = {} if "kfold" in expected else {"val_strategy": "kfold"}
    with pytest.raises(OptionError, match=expected):
        TrainingConfig(dataset_root="d", model="unet", **kfold, **options)
