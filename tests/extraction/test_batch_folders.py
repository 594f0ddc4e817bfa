"""``batch`` on folders as people have them: subfolders, files to leave out, one label for all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from batch_helpers import (
    SIDE,
    Batch,
    Dataset,
    messages,
    noise,
    tiles,
    write,
    write_grid,
)
from shapely import box
from site_helpers import complaint, run

import Patch_extraction
from extraction.settings import BatchConfig


def draw_folders(batch: Batch, *names: str, image="images", label="labels") -> None:
    """Scenes of four cells whose image and label have one name, in two folders."""
    for number, name in enumerate(names):
        pixels, classes = noise(16, seed=number)
        for folder, array in ((image, pixels), (label, classes)):
            place = batch.data / folder.replace("<id>", name)
            place.mkdir(parents=True, exist_ok=True)
            write(place / f"{name}.tif", array)


def scenes(dataset: Dataset) -> set[str]:
    return {name.partition("_r0")[0] for name in dataset.splits}


TWO = ["--image_pattern", "images/<id>.tif", "--label_pattern", "labels/<id>.tif"]


# --- folders in patterns ---------------------------------------------------------------------


def test_patterns_may_hold_folders(batch):
    draw_folders(batch, "a", "b", "c")
    draw_folders(batch, "d", image="old/images", label="old/labels")
    assert scenes(batch.cut(*TWO)) == {"a", "b", "c"}


def test_with_recursive_patterns_match_in_any_folder(batch):
    draw_folders(batch, "a")
    draw_folders(batch, "d", image="old/images", label="old/labels")
    assert scenes(batch.cut(*TWO, "--recursive")) == {"a", "d"}


def test_the_id_may_be_the_name_of_a_folder_but_holds_no_slash(batch):
    for name in ("a", "b"):
        for kind, array in zip(("Scene", "truth"), noise(16)):
            place = batch.data / "sites" / name / f"{kind}.tif"
            place.parent.mkdir(parents=True, exist_ok=True)
            write(place, array)
    patterns = ["--image_pattern", "sites/<id>/scene.tif", "--label_pattern"]
    assert scenes(batch.cut(*patterns, "./sites/<id>/truth.tif")) == {"a", "b"}
    batch.out = batch.folder / "none"
    assert run(*batch.words("--image_pattern", "<id>/scene.tif")) == 1  # sites/a


def test_a_star_in_a_pattern_stands_for_one_folder(batch):
    draw_folders(batch, "a", image="2020/images", label="2020/labels")
    draw_folders(batch, "b", image="2021/images", label="2021/labels")
    words = [
        "--image_pattern",
        "*/images/<id>.*",
        "--label_pattern",
        "*/labels/<id>.tif",
    ]
    assert scenes(batch.cut(*words)) == {"a", "b"}


def test_folders_that_are_links_are_searched(batch):
    (batch.folder / "x").mkdir()
    elsewhere = Batch(batch.folder / "x")
    draw_folders(elsewhere, "a")
    for kind in ("images", "labels"):
        (batch.data / kind).symlink_to(elsewhere.data / kind)
    assert scenes(batch.cut(*TWO)) == {"a"}


@pytest.mark.parametrize("pattern", ["../labels/<id>.tif", "/data/<id>.tif"])
def test_a_pattern_outside_of_the_folder_is_refused(batch, capsys, pattern):
    line = complaint(capsys, *batch.words("--label_pattern", pattern))
    assert f"--label_pattern {pattern}: expected a path below --data_dir" in line


def test_a_folder_without_a_match_says_how_to_look_deeper(batch, capsys):
    draw_folders(batch, "a")
    line = batch.refusal(capsys, "--image_pattern", "<id>.tif")
    assert "matches --image_pattern <id>.tif; --recursive looks into its" in line


# --- files to leave out ----------------------------------------------------------------------


def test_excluded_files_are_neither_scenes_nor_labels(batch):
    draw_folders(batch, "a", "b", "bad_1", "bad_2")
    draw_folders(batch, "c", image="old/images", label="old/labels")
    words = [*TWO, "--recursive", "--exclude", "*/BAD_?.tif", "--exclude", "old/*"]
    assert scenes(batch.cut(*words)) == {"a", "b"}
    words = [*TWO, "--exclude", "images/[ab].tif", "labels/[ab].tif"]
    assert scenes(batch.cut(*words, "--overwrite")) == {"bad_1", "bad_2"}


def test_a_pattern_that_leaves_out_no_file_is_an_error(batch, capsys):
    draw_folders(batch, "a")
    line = batch.refusal(capsys, *TWO, "--exclude", "bad_*.tif")
    assert "--exclude bad_*.tif names none of the 2 files" in line
    assert "whole path below that folder" in line


def test_patterns_of_files_to_leave_out_are_repeated_by_settings_and_replaced(tmp_path):
    parser = Patch_extraction.build_parser()
    stored = tmp_path / "metadata.json"
    words = [
        "batch",
        "--data_dir",
        "d",
        "--output",
        "o",
        "--exclude",
        "x",
        "--exclude",
        "y",
    ]
    first = parser.parse_args(words)
    assert first.exclude == ["x", "y"]
    options = {"data_dir": "d", "output": "o", "exclude": first.exclude}
    stored.write_text(json.dumps({"settings": options}))
    again = ["batch", "--settings", str(stored)]
    assert parser.parse_args(again).exclude == ["x", "y"]
    assert parser.parse_args([*again, "--exclude", "z"]).exclude == ["z"]
    assert parser.parse_args(words[:5]).exclude is None


# --- one label for all scenes ----------------------------------------------------------------


def draw_dates(batch: Batch, dates: int = 3) -> np.ndarray:
    """Scenes of one place, without labels; classes of the place."""
    for date in range(dates):
        write(batch.data / f"{date}.tif", noise(16, seed=date)[0])
    return noise(16, seed=9)[1]


def label_of(dataset: Dataset, name: str) -> np.ndarray:
    file = dataset.root / dataset.splits[name] / "labels" / f"{name}.tif"
    with rasterio.open(file) as opened:
        return opened.read(1)


def test_one_label_serves_the_scenes_of_all_dates(batch):
    classes = draw_dates(batch)
    label = write(batch.data / "truth.tif", classes)  # among the scenes, but none
    dataset = batch.cut("--image_pattern", "<id>.tif", "--label", label)
    assert scenes(dataset) == {"0", "1", "2"}
    assert len(dataset.splits) == 12
    for date in range(3):
        found = label_of(dataset, f"{date}_r001_c000")
        assert np.array_equal(found, classes[SIDE:, :SIDE])


def test_polygons_are_one_label_for_all_dates_too(batch):
    draw_dates(batch)
    halves = [box(0, 0, 4, 16), box(4, 0, 16, 16)]
    label = write_grid(batch.folder / "l.gpkg", halves, kind=["wood", "field"])
    words = ["--image_pattern", "<id>.tif", "--label", f"{label}|layername=l"]
    dataset = batch.cut(*words, "--label_column", "kind")
    assert dataset.metadata["class_names"] == ["field", "wood"]
    for date in range(3):
        found = label_of(dataset, f"{date}_r000_c000")
        assert (found[:, :4] == 1).all() and (found[:, 4:] == 0).all()


def test_one_label_and_a_pattern_of_labels_are_refused_together(capsys, batch):
    words = ["--label", "l.tif", "--label_pattern", "L_<id>.tif"]
    line = complaint(capsys, *batch.words(*words))
    assert "--label with --label_pattern L_<id>.tif: expected one of them" in line
    assert BatchConfig(data_dir="d", output="o", label="l.tif").label == "l.tif"


def test_a_label_that_is_missing_is_an_error(batch, capsys):
    draw_dates(batch)
    words = ["--image_pattern", "<id>.tif", "--label", batch.folder / "no.tif"]
    lines = messages(capsys, *batch.words(*words), status=1)
    assert len(lines) == 1 and "no.tif" in lines[0]
    assert not Path(batch.out / "Patch").exists()


def test_a_text_may_be_missing_in_a_scene_but_not_in_all(batch, capsys):
    for name, kinds in (("a", ["rye", "oat"]), ("b", ["oat", "oat"])):
        batch.draw(name)
        (batch.data / f"Label_{name}.tif").unlink()
        cells = tiles(1, 2, side=24)
        write_grid(batch.data / f"Label_{name}.gpkg", cells, kind=kinds)
    words = ["--label_pattern", "Label_<id>.gpkg", "--label_column", "kind"]
    dataset = batch.cut(*words, "--label_values", "oat,rye")
    found = {name: set(np.unique(label_of(dataset, name))) for name in dataset.splits}
    assert found["a_r000_c000"] == {1} and found["a_r005_c000"] == {0}
    assert found["b_r000_c000"] == {0}
    words += ["--label_values", "oat,rye,maize", "--overwrite"]
    assert run(*batch.words(*words)) == 2
    assert "Unknown --label_values 'maize'" in capsys.readouterr().err.splitlines()[-1]
