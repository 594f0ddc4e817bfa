"""Maps that were interrupted and are resumed, and maps in pieces of columns."""

from __future__ import annotations

import os
import shutil

import pytest
import rasterio
from helpers import interrupt
from prediction_helpers import (
    EVERYTHING,
    configure,
    noise,
    outcome,
    read_json,
    run,
    write_scene,
)

from common.files import fingerprint
from common.mask_options import COMPANIONS
from common.rasters import open_raster
from prediction.ensemble import load_models
from prediction.jobs import count_pieces, prepare_scene
from prediction.rowstore import read_journal
from prediction.tasks import Task

# --- resuming ---------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["1", "0.000001"], ids=["whole rows", "columns"])
@pytest.mark.parametrize(
    "name",
    [
        "prediction.layers.compute_layers",
        "prediction.rowstore.RowStore.write",
        "prediction.mapfiles.MapWriter.advance",
        "prediction.predictor.Predictor.__call__",
    ],
)
def test_a_resumed_run_gives_the_same_bytes_and_predicts_no_finished_row_again(
    spatial, tall_scene, tmp_path, monkeypatch, capsys, batches, memory, name
):
    folder = tmp_path / "out"
    options = (*EVERYTHING, "--max_memory", memory, "--batch_size", "1")
    assert run(spatial, tall_scene, folder / "map.tif", *options) == 0
    expected, report = outcome(folder), capsys.readouterr().out
    whole, steps = len(batches), (6 if memory == "1" else 12)
    for call in (2, steps):
        shutil.rmtree(folder)
        with monkeypatch.context() as patch:
            interrupt(patch, name, call)
            assert run(spatial, tall_scene, folder / "map.tif", *options) == 130
        journal = folder / ".map.tif-partial" / "done-0.txt"
        parts = read_journal(journal) if folder.exists() else []
        assert not parts or os.listdir(folder) == [".map.tif-partial"]
        capsys.readouterr()
        batches.clear()
        again = (*options, "--resume")
        assert run(spatial, tall_scene, folder / "map.tif", *again) == 0
        assert outcome(folder) == expected
        assert capsys.readouterr().out == report
        if memory == "1":
            # rows end at the next window's start: only the one window row before is needed again
            left = 6 - len(parts)
            assert len(batches) <= 2 * (left + 1)
        assert len(batches) <= whole


def test_a_run_that_was_interrupted_several_times_ends_with_the_same_map(
    spatial, tall_scene, tmp_path, monkeypatch
):
    assert run(spatial, tall_scene, tmp_path / "a" / "map.tif", *EVERYTHING) == 0
    output = tmp_path / "b" / "map.tif"
    for _ in range(4):
        with monkeypatch.context() as patch:
            interrupt(patch, "prediction.layers.compute_layers", 2)
            run(spatial, tall_scene, output, *EVERYTHING, "--resume")
    assert run(spatial, tall_scene, output, *EVERYTHING, "--resume") == 0
    found, expected = outcome(output.parent), outcome(tmp_path / "a")
    for name in expected.keys() - {"map_statistics.json"}:
        assert found[name] == expected[name]


def left_unfinished(model, scene, output, monkeypatch, *options) -> dict[str, bytes]:
    """Interrupt a run; what lies in the hidden folder then."""
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 3)
        assert run(model, scene, output, *options) == 130
    return outcome(output.with_name(f".{output.name}-partial"))


def test_with_overwrite_an_unfinished_map_is_dropped_and_that_is_reported(
    spatial, tall_scene, tmp_path, monkeypatch, capsys, batches
):
    output = tmp_path / "map.tif"
    left_unfinished(spatial, tall_scene, output, monkeypatch)
    batches.clear()
    capsys.readouterr()
    assert run(spatial, tall_scene, output, "--overwrite") == 0
    assert len(batches) == 12
    assert ".map.tif-partial is dropped" in capsys.readouterr().err


def test_what_a_replaced_map_had_beside_it_goes_with_it(
    spatial, tall_scene, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "out"
    output, foreign = folder / "map.tif", folder / "areas.gpkg"
    options = (*EVERYTHING, "--quicklook", "--suggest", "1", "--cell_size", "32")
    areas = ("--polygons", str(folder / "map.gpkg"))
    assert run(spatial, tall_scene, output, *options, *areas) == 0
    assert run(spatial, tall_scene, output, "--resume", *options, "--polygons", str(foreign)) == 0  # fmt: skip
    mine = [folder / name for name in ("map_notes.tif", "map_evaluation.json")]
    for path in mine:
        path.write_bytes(b"mine")
    before = outcome(folder)
    # it all stays until the new map is there, also where that is resumed
    keeping = ("--save_uncertainty", "--overwrite")
    left_unfinished(spatial, tall_scene, output, monkeypatch, *keeping)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert run(spatial, tall_scene, output, "--save_uncertainty", "--resume") == 0
    plain = {"map.tif", "map.tif.aux.xml", "map.qml", "map_statistics.json"}
    more = {"map_uncertainty.tif", "map_uncertainty.qml", foreign.name}
    assert outcome(folder).keys() == plain | more | {path.name for path in mine}
    line = f"warning: {foreign} is of the former {output}, not of the new one"
    assert line in capsys.readouterr().err


OTHER_OPTIONS = {
    "bands": ("1,2,3",),
    "nodata": ("7",),
    "patch_size": ("32",),
    "overlap": ("20",),
    "blend": ("none",),
    "tta": ("flip",),
    "threshold": ("0.6",),
    "precision": ("bf16",),
    "batch_size": ("3",),
    "compile": (),
    "format": ("cog",),
    "sieve": ("900",),
    "write_codes": (),
    "save_confidence": (),
    "save_uncertainty": (),
    "save_probabilities": (),
}


def test_every_option_that_changes_the_result_is_compared():
    # test_area.py, test_dates.py, test_masked_scenes.py
    of_their_own = {"area", "combine", *("mask", "mask_buffer", *COMPANIONS)}
    assert fingerprint(configure()).keys() == OTHER_OPTIONS.keys() | of_their_own


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_resuming_with_another_option_is_refused_and_keeps_the_unfinished_map(
    water, tall_scene, tmp_path, monkeypatch, capsys, option
):
    output = tmp_path / "map.tif"
    kept = left_unfinished(water.path, tall_scene, output, monkeypatch)
    capsys.readouterr()
    changed = (f"--{option}", *OTHER_OPTIONS[option])
    assert run(water.path, tall_scene, output, *changed, "--resume") == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: --resume:")
    assert f"--{option} " in error and "start again with --overwrite" in error
    assert outcome(tmp_path / ".map.tif-partial") == kept
    assert run(water.path, tall_scene, output, "--resume") == 0


def test_resuming_with_another_scene_or_model_is_refused(
    spatial, tall_scene, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "map.tif"
    kept = left_unfinished(spatial, tall_scene, output, monkeypatch)
    other_scene = shutil.copy(tall_scene, tmp_path / "other.tif")
    other_model = shutil.copy(spatial, tmp_path / "other.pth")
    for model, image, named in (
        (spatial, other_scene, "scene"),
        (other_model, tall_scene, "model"),
        ([spatial, other_model], tall_scene, "model"),
    ):
        capsys.readouterr()
        assert run(model, image, output, "--resume") == 1
        assert f"belongs to a run with another {named}" in capsys.readouterr().err
        assert outcome(tmp_path / ".map.tif-partial") == kept
    os.utime(tall_scene, (1, 1))  # the same name, but other contents
    assert run(spatial, tall_scene, output, "--resume") == 1
    assert "belongs to a run with another scene" in capsys.readouterr().err
    assert outcome(tmp_path / ".map.tif-partial") == kept


def test_resuming_a_finished_map_predicts_nothing_and_reports_the_same(
    spatial, tall_scene, tmp_path, capsys, batches
):
    output = tmp_path / "out" / "map.tif"
    assert run(spatial, tall_scene, output, *EVERYTHING) == 0
    report, before = capsys.readouterr().out, outcome(output.parent)
    batches.clear()
    assert run(spatial, tall_scene, output, *EVERYTHING, "--resume") == 0
    captured = capsys.readouterr()
    assert captured.out == report and "is there already" in captured.err
    assert batches == [] and outcome(output.parent) == before
    assert run(spatial, tall_scene, output, "--resume", "--overlap", "17") == 1
    assert outcome(output.parent) == before


def test_resuming_where_nothing_is_there_is_an_ordinary_run(
    spatial, tall_scene, tmp_path, batches
):
    assert run(spatial, tall_scene, tmp_path / "a" / "map.tif") == 0
    assert run(spatial, tall_scene, tmp_path / "b" / "map.tif", "--resume") == 0
    assert len(batches) == 2 * 12
    names = ("map.tif", "map.tif.aux.xml", "map.qml")
    for name in names:
        one, other = (tmp_path / folder / name for folder in "ab")
        assert one.read_bytes() == other.read_bytes()


def test_resuming_several_scenes_goes_on_with_the_one_that_was_interrupted(
    spatial, tmp_path, monkeypatch, batches, capsys
):
    scenes = [
        write_scene(tmp_path / f"{name}.tif", noise(150, 60, seed=seed))
        for seed, name in enumerate("abc")
    ]
    assert run(spatial, scenes, tmp_path / "expected") == 0
    report = capsys.readouterr().out.replace("/expected/", "/maps/")
    maps = tmp_path / "maps"
    with monkeypatch.context() as patch:
        interrupt(patch, "prediction.layers.compute_layers", 5)  # 3 window rows a scene
        assert run(spatial, scenes, maps) == 130
    capsys.readouterr()
    batches.clear()
    assert run(spatial, scenes, maps, "--resume") == 0
    assert capsys.readouterr().out == report
    assert len(batches) <= 3 + 3
    for path in maps.glob("*.tif"):
        assert path.read_bytes() == (tmp_path / "expected" / path.name).read_bytes()
    assert len(list(maps.glob("*.tif"))) == 3 and not list(maps.glob(".*"))


def test_an_interruption_before_the_first_row_leaves_nothing_to_resume(
    land, scene, tmp_path, monkeypatch
):
    output = tmp_path / "map.tif"
    with monkeypatch.context() as patch:
        interrupt(patch, "common.files.write_json", 1)
        assert run(land.path, scene, output) == 130
    assert not list(tmp_path.glob(".*"))
    assert run(land.path, scene, output, "--resume") == 0


def test_resume_makes_a_map_that_was_deleted(land, scene, tmp_path):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    output.unlink()
    assert run(land.path, scene, output, "--resume") == 0
    assert output.exists()


def test_a_further_layer_of_a_finished_map_needs_overwrite(land, scene, tmp_path):
    output, more = tmp_path / "map.tif", "--save_confidence"
    assert run(land.path, scene, output) == 0
    assert run(land.path, scene, output, "--resume", more) == 1
    assert not (tmp_path / "map_confidence.tif").exists()
    assert run(land.path, scene, output, "--overwrite", more) == 0
    assert (tmp_path / "map_confidence.tif").exists()
    (tmp_path / "map_confidence.tif").unlink()
    assert run(land.path, scene, output, "--resume", more) == 1


def test_resume_draws_a_quicklook_of_a_finished_map(land, scene, tmp_path):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    assert run(land.path, scene, output, "--resume", "--quicklook") == 0
    assert (tmp_path / "map_quicklook.png").exists()


def test_resume_with_another_format_is_refused_or_obeyed(land, scene, tmp_path):
    output = tmp_path / "map.tif"
    assert run(land.path, scene, output) == 0
    status = run(land.path, scene, output, "--resume", "--format", "cog")
    with rasterio.open(output) as file:
        layout = file.tags(ns="IMAGE_STRUCTURE").get("LAYOUT")
    assert status == 1 or layout == "COG"


# --- memory -----------------------------------------------------------------------------


def test_little_memory_gives_the_same_bytes(spatial, tmp_path):
    pixels = noise(100, 150)
    pixels[:, 20:90, :70] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    found = {}
    for memory in ("100", "0.000001"):
        folder = tmp_path / memory
        options = (*EVERYTHING, "--max_memory", memory, "--batch_size", "1")
        assert run(spatial, scene, folder / "map.tif", *options) == 0
        report = read_json(folder / "map_statistics.json")
        columns = report.pop("run")["columns"]
        files = {path.name: path.read_bytes() for path in folder.glob("*.tif")}
        found[memory] = columns, files, report["classes"], report["confidence"]
    assert [len(columns) for columns, *_ in found.values()] == [1, 3]
    first, other = (rest for _, *rest in found.values())
    assert other == first


def test_pieces_of_columns_are_as_many_as_the_memory_needs(land, tmp_path):
    path = write_scene(tmp_path / "scene.tif", noise(10, 4000))
    counts = []
    for megabytes in (100, 3, 1, 0.1):
        memory = {"max_memory": megabytes / 1000}
        config = configure(model=[str(land.path)], patch_size=512, **memory)
        models = load_models(config)
        with open_raster(path) as scene:
            task = Task(str(path), tmp_path / "map.tif")
            job = prepare_scene(task, config, models, [scene])
            counts.append(count_pieces(job))
    assert counts[0] == 1 and counts == sorted(counts) and len(set(counts)) == 4
    assert counts[3] == pytest.approx(10 * counts[2], abs=10)
