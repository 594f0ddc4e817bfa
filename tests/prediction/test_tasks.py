"""What --input, --model, --output and --polygons name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import rasterio
import rasterio.shutil
from prediction_helpers import configure, noise, run, write_scene

from common.files import list_models
from prediction.tasks import list_tasks

# --- names of polygons ------------------------------------------------------------------


def test_polygons_of_one_scene_go_into_the_file_that_is_named(scene):
    config = configure(input=[str(scene)], polygons="fields/a.gpkg")
    (task,) = list_tasks(config)
    assert task.polygons == Path("fields/a.gpkg")


def test_polygons_of_several_scenes_go_into_a_folder(scene, tmp_path):
    scenes = [str(scene), str(tmp_path / "b.tif")]
    config = configure(input=scenes, output=str(tmp_path / "maps"), polygons="fields")
    found = [task.polygons for task in list_tasks(config)]
    names = ("scene_prediction.gpkg", "b_prediction.gpkg")
    assert found == [Path("fields") / name for name in names]


@pytest.mark.parametrize("several", [False, True])
def test_a_name_of_polygons_that_does_not_fit_is_a_wrong_command_line(
    land, scene, tmp_path, capsys, several
):
    scenes = [scene, tmp_path / "b.tif"] if several else scene
    output = tmp_path / ("maps" if several else "map.tif")
    wrong = ["a.gpkg"] if several else ["a.shp", "fields", "a.geojson"]
    for name in wrong:
        with pytest.raises(SystemExit) as stop:
            run(land.path, scenes, output, "--polygons", name)
        assert stop.value.code == 2
        assert f"--polygons {name}" in capsys.readouterr().err
    assert not output.exists()


# --- scenes -----------------------------------------------------------------------------


def test_several_scenes_want_a_folder_and_not_a_file(land, scene, tmp_path, capsys):
    output = write_scene(tmp_path / "map.tif", noise(10, 10))
    before = output.read_bytes()
    other = shutil.copy(scene, tmp_path / "other.tif")
    with pytest.raises(SystemExit) as stop:
        run(land.path, [scene, other], output)
    assert stop.value.code == 2 and "folder" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_two_scenes_of_one_stem_are_refused(land, tmp_path, capsys):
    one = write_scene(tmp_path / "a" / "scene.tif", noise(40, 40))
    two = write_scene(tmp_path / "b" / "scene.tif", noise(40, 40))
    assert run(land.path, [one, two], tmp_path / "maps") == 1
    error = capsys.readouterr().err
    assert str(one) in error and str(two) in error
    assert not (tmp_path / "maps").exists()


def test_a_folder_without_scenes_is_an_error(land, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(land.path, tmp_path / "empty", tmp_path / "maps") == 1
    assert f"No scenes in {tmp_path / 'empty'}" in capsys.readouterr().err


@pytest.mark.parametrize("option", [(), ("--save_confidence",)])
def test_an_output_that_is_the_input_is_refused(land, scene, tmp_path, capsys, option):
    before = scene.read_bytes()
    (tmp_path / "link.tif").symlink_to(scene)
    (tmp_path / "sub").mkdir()
    for output in (scene, tmp_path / "sub" / ".." / scene.name, tmp_path / "link.tif"):
        with pytest.raises(SystemExit) as stop:
            run(land.path, scene, output, *option)
        assert stop.value.code == 2 and "--output" in capsys.readouterr().err
    confidence = scene.rename(tmp_path / "map_confidence.tif")
    with pytest.raises(SystemExit):
        run(land.path, confidence, tmp_path / "map.tif", *option)
    assert confidence.read_bytes() == before


def test_maps_do_not_lie_among_their_scenes(land, tmp_path):
    write_scene(tmp_path / "a.tif", noise(40, 40))
    for folder in (tmp_path, tmp_path / "." / ".." / tmp_path.name):
        with pytest.raises(SystemExit) as stop:
            run(land.path, tmp_path, folder)
        assert stop.value.code == 2
    assert [path.name for path in tmp_path.glob("*.tif")] == ["a.tif"]


@pytest.mark.parametrize("name", ["map", "map.png", "map.pth"])
def test_an_output_that_is_no_tif_is_a_wrong_command_line(
    land, scene, tmp_path, capsys, name
):
    with pytest.raises(SystemExit) as stop:
        run(land.path, scene, tmp_path / name)
    assert stop.value.code == 2
    assert ".tif" in capsys.readouterr().err and not (tmp_path / name).exists()


# --- known defects ----------------------------------------------------------------------


def test_the_source_of_a_vrt_is_not_written_over(land, tmp_path):
    source = write_scene(tmp_path / "scene.tif", noise(40, 40))
    before = source.read_bytes()
    rasterio.shutil.copy(source, tmp_path / "scene.vrt", driver="VRT")
    try:
        run(land.path, tmp_path / "scene.vrt", source)
    except SystemExit:
        pass  # refused as a wrong command line, which is as good as status 1
    assert source.read_bytes() == before


def test_hidden_files_and_folders_are_no_scenes(land, tmp_path):
    write_scene(tmp_path / "scenes" / "a.tif", noise(40, 40))
    (tmp_path / "scenes" / "._a.tif").write_bytes(b"what another system leaves")
    (tmp_path / "scenes" / "b.tif").mkdir()
    assert run(land.path, tmp_path / "scenes", tmp_path / "maps") == 0


# --- ensembles --------------------------------------------------------------------------


def touch(*paths: Path) -> list[str]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return [str(path) for path in paths]


def test_a_folder_of_folds_stands_for_their_final_models_in_order(tmp_path):
    final = "model_final_model.pth"
    numbers = [1, 2, 3, 10, 11]
    expected = touch(*(tmp_path / f"fold_{number}" / final for number in numbers))
    touch(tmp_path / "fold_2" / "model_best_IoU.pth", tmp_path / final)
    touch(tmp_path / "other" / final, tmp_path / "best.pth")
    assert list_models([str(tmp_path)]) == expected


def test_a_folder_without_folds_stands_for_its_final_model(tmp_path):
    (final,) = touch(tmp_path / "model_final_model.pth")
    touch(tmp_path / "model_best_IoU.pth", tmp_path / "fold_1" / "model_best_IoU.pth")
    assert list_models([str(tmp_path)]) == [final]


def test_a_run_of_folds_at_random_and_by_block_stands_for_those_by_block(tmp_path):
    final = "model_final_model.pth"
    expected = touch(*(tmp_path / "block" / f"fold_{n}" / final for n in (1, 2)))
    touch(tmp_path / "random" / "fold_1" / final, tmp_path / final)
    assert list_models([str(tmp_path), "c.pth"]) == [*expected, "c.pth"]


def test_a_folder_without_a_final_model_is_refused(scene, tmp_path, capsys):
    touch(
        tmp_path / "runs" / "best.pth", tmp_path / "runs" / "fold_1" / "model_last.pth"
    )
    for folder in (tmp_path / "runs", tmp_path / "empty"):
        folder.mkdir(exist_ok=True)
        assert run(folder, scene, tmp_path / "map.tif") == 1
        error = capsys.readouterr().err
        assert f"No model_final_model.pth in {folder}, nor in folders fold_N" in error


def test_a_line_names_what_a_folder_stands_for(land, scene, tmp_path, capsys):
    for number in range(1, 6):
        place = tmp_path / "runs" / f"fold_{number}"
        place.mkdir(parents=True)
        shutil.copy(land.path, place / "model_final_model.pth")
    assert run(tmp_path / "runs", scene, tmp_path / "map.tif") == 0
    line = next(x for x in capsys.readouterr().err.splitlines() if "averaged" in x)
    first, last = (tmp_path / "runs" / f"fold_{n}" for n in (1, 5))
    assert line.startswith(f"{tmp_path / 'runs'}: 5 models, averaged ({first}")
    assert line.endswith(f"... {last / 'model_final_model.pth'})")
    assert run(land.path, scene, tmp_path / "other.tif") == 0
    assert "final model (" not in capsys.readouterr().err
