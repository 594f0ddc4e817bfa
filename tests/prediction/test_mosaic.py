"""Many scenes: ``--part`` of them, and ``mosaic.vrt`` of their maps."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from shutil import copy2

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from prediction_helpers import CRS, TRANSFORM, noise, read_map, run, write_scene

from prediction.tasks import Task, tasks_of_part


def tiles(folder, rows=0.0, **second):
    """Four tiles of one scene, the last overlapping, and the scene.

    The second has a profile of its own, and lies ``rows`` further down.
    """
    pixels = noise(100, 130)
    scenes = []
    for number, (top, left) in enumerate([(0, 0), (0, 64), (50, 0), (40, 60)]):
        tile = pixels[:, top : top + 50, left : left + 64]
        other = number == 1
        transform = TRANSFORM * TRANSFORM.translation(left, top + rows * other)
        path = folder / "scenes" / f"tile{number}.tif"
        profile = {"transform": transform} | (second if other else {})
        scenes.append(write_scene(path, tile, **profile))
    return scenes, pixels


@pytest.fixture
def output(tmp_path):
    return tmp_path / "maps"


# --- mosaic.vrt ------------------------------------------------------------------------------


def test_maps_on_one_grid_are_joined(land, tmp_path, output, capsys):
    scenes, pixels = tiles(tmp_path)
    assert (
        run(land.path, scenes[::-1], output) == 0
    )  # the grid does not begin in the first
    assert "mosaic.vrt joins 4 maps" in capsys.readouterr().err
    output.rename(tmp_path / "moved")  # paths are relative
    with (
        rasterio.open(tmp_path / "moved" / "mosaic.vrt") as file,
        rasterio.open(tmp_path / "moved" / "tile0_prediction.tif") as tile,
    ):
        assert file.transform == TRANSFORM and file.crs == tile.crs
        assert file.shape == (100, 128) and file.dtypes == tile.dtypes
        assert file.nodata == tile.nodata and file.tags() == tile.tags()
        colours, of_tile = file.colormap(1), tile.colormap(1)
        assert [colours[i] for i in range(4)] == [of_tile[i] for i in range(4)]
        found = file.read(1)
    text = (tmp_path / "moved" / "mosaic.vrt").read_text(encoding="utf-8")
    assert "<Category>forêt</Category>" in text
    expected = land.probabilities(pixels).argmax(axis=0)
    expected[90:, 64:] = expected[50:, 124:] = 255
    np.testing.assert_array_equal(found, expected[:, :128])


def test_a_valid_pixel_of_an_earlier_map_shows_through_nodata_of_a_later(
    land, tmp_path, output
):
    pixels = noise(64, 64)
    early = write_scene(tmp_path / "early.tif", pixels, nodata=0)
    late = noise(64, 64, seed=1)
    late[:, :30] = 0
    late_scene = write_scene(tmp_path / "late.tif", late, nodata=0)
    assert run(land.path, [early, late_scene], output) == 0
    both = [read_map(output / f"{one}_prediction.tif") for one in ("early", "late")]
    assert (both[1][:30] == 255).all()
    np.testing.assert_array_equal(
        read_map(output / "mosaic.vrt"), np.where(both[1] == 255, *both)
    )


@pytest.mark.parametrize(
    "other", [{"rows": 0.5}, {"crs": "EPSG:32632"}, {"transform": TRANSFORM * TRANSFORM.scale(2)}]
)  # fmt: skip
def test_maps_on_other_grids_are_not_joined_and_a_line_says_how(
    land, tmp_path, output, capsys, other
):
    scenes, _ = tiles(tmp_path)
    assert run(land.path, scenes, output) == 0
    scenes, _ = tiles(tmp_path, **other)
    assert run(land.path, scenes, output, "--overwrite") == 0
    files = output / "*_prediction.tif", output / "mosaic.tif"
    line = "gdalwarp -t_srs EPSG:32631 {} {}".format(*files)
    assert line in capsys.readouterr().err
    assert not (output / "mosaic.vrt").exists()  # that of the replaced maps neither


def test_pictures_without_a_place_on_the_ground_are_not_laid_on_each_other(
    land, tmp_path, output, capsys
):
    profile = {"crs": None, "transform": None}
    scenes = [
        write_scene(tmp_path / f"{n}.tif", noise(64, 64), **profile) for n in (1, 2)
    ]
    assert run(land.path, scenes, output) == 0
    assert not (output / "mosaic.vrt").exists()
    assert "mosaic" not in capsys.readouterr().err


def test_a_file_of_that_name_which_is_no_mosaic_of_maps_stays(
    land, tmp_path, output, capsys
):
    scenes, _ = tiles(tmp_path)
    output.mkdir()
    foreign = output / "mosaic.vrt"
    foreign.write_text("<VRTDataset/>")
    assert run(land.path, scenes, output) == 0
    assert foreign.read_text() == "<VRTDataset/>"
    assert "stays as it is" in capsys.readouterr().err


def test_a_scene_that_cannot_be_mapped_leaves_no_mosaic_with_a_hole(
    land, tmp_path, output, capsys
):
    scenes, _ = tiles(tmp_path)
    whole = scenes[2].read_bytes()
    scenes[2].write_text("no raster")
    assert run(land.path, scenes, output) == 1
    assert "mosaic.vrt: not yet, 1 of 4 maps are missing" in capsys.readouterr().err
    assert not (output / "mosaic.vrt").exists()
    scenes[2].write_bytes(whole)
    assert run(land.path, scenes, output, "--resume") == 0
    assert read_map(output / "mosaic.vrt").shape == (100, 128)


def test_a_single_scene_has_no_mosaic(land, tmp_path, output, capsys):
    write_scene(tmp_path / "scenes" / "one.tif", noise(64, 64))
    assert run(land.path, tmp_path / "scenes", output) == 0
    assert not (output / "mosaic.vrt").exists()
    assert "mosaic" not in capsys.readouterr().err


# --- mosaic.vrt of maps of several runs ------------------------------------------------------


def test_the_mosaic_of_a_map_that_is_made_anew_alone_is_made_anew_too(
    land, tmp_path, output, capsys
):
    scenes, _ = tiles(tmp_path)
    assert run(land.path, scenes, output) == 0
    before = read_map(output / "mosaic.vrt")
    corner = shapely.box(*TRANSFORM * (10, 30), *TRANSFORM * (40, 20))
    area = tmp_path / "area.gpkg"
    geopandas.GeoDataFrame(geometry=[corner], crs=CRS).to_file(area)
    options = ("--area", str(area), "--overwrite")
    assert run(land.path, scenes[0], output, *options) == 0
    assert "mosaic.vrt joins 4 maps" in capsys.readouterr().err
    expected = before.copy()
    expected[:50, :64] = 255
    expected[20:30, 10:40] = before[20:30, 10:40]
    expected[40:, 60:] = before[40:, 60:]  # of the last, which lies on top
    found = read_map(output / "mosaic.vrt")
    np.testing.assert_array_equal(found, expected)


def test_a_mosaic_whose_maps_no_longer_fit_is_removed_with_a_line(
    land, tmp_path, output, capsys
):
    scenes, _ = tiles(tmp_path)
    assert run(land.path, scenes, output) == 0
    scenes, _ = tiles(tmp_path, rows=0.5)
    assert run(land.path, scenes[1], output, "--overwrite") == 0
    assert "mosaic.vrt: removed, since the maps lie" in capsys.readouterr().err
    assert not list(output.glob("mosaic.*"))


def test_maps_of_an_earlier_run_stay_in_the_mosaic(land, tmp_path, output, capsys):
    scenes, _ = tiles(tmp_path)
    assert run(land.path, scenes, tmp_path / "at_once") == 0
    assert run(land.path, scenes[:2], output) == 0
    assert run(land.path, scenes[2:], output) == 0
    assert "mosaic.vrt joins 4 maps" in capsys.readouterr().err
    at_once, joined = (
        read_map(folder / "mosaic.vrt") for folder in (tmp_path / "at_once", output)
    )
    np.testing.assert_array_equal(joined, at_once)
    # one that is no longer there is left out
    (output / "tile0_prediction.tif").unlink()
    assert run(land.path, scenes[2:], output, "--resume") == 0
    assert "mosaic.vrt joins 3 maps" in capsys.readouterr().err


def test_a_mosaic_stays_where_the_maps_of_a_later_run_do_not_fit(
    land, tmp_path, output, capsys
):
    scenes, _ = tiles(tmp_path)
    assert run(land.path, scenes[:2], output) == 0
    before = (output / "mosaic.vrt").read_bytes()
    moved = TRANSFORM * TRANSFORM.translation(0.5, 200)
    others = [
        write_scene(tmp_path / f"{n}.tif", noise(40, 40), transform=moved) for n in "ab"
    ]
    assert run(land.path, others, output) == 0
    line = (
        "mosaic.vrt: stays as it is, without the maps of this run, since the maps lie"
    )
    assert line in capsys.readouterr().err
    assert (output / "mosaic.vrt").read_bytes() == before
    assert (output / "mosaic.qml").exists()


# --- --part ----------------------------------------------------------------------------------


def test_jobs_share_scenes_and_the_last_one_joins_the_maps(
    land, tmp_path, output, capsys
):
    scenes, _ = tiles(tmp_path)
    mosaic = output / "mosaic.vrt"
    for part, missing in (("3/3", 2), ("1/3", 1)):
        assert run(land.path, scenes, output, "--part", part) == 0
        assert f"not yet, {missing} of 4 maps are missing" in capsys.readouterr().err
        assert not mosaic.exists()
    assert sorted(path.stem[4] for path in output.glob("*.tif")) == ["0", "2", "3"]
    assert run(land.path, scenes, output, "--part", "2/3") == 0
    assert mosaic.exists()


def test_maps_of_other_windows_or_models_are_joined_with_a_warning(
    land, tmp_path, output, capsys
):
    scenes, _ = tiles(tmp_path)
    copy = Path(copy2(land.path, tmp_path / "copy.pth"))
    for number, model in enumerate([land.path, copy, land.path, land.path], start=1):
        assert run(model, scenes, output, "--part", f"{number}/4") == 0
    err = capsys.readouterr().err
    assert "joins 4 maps" in err and "otherwise" not in err
    copy.touch()
    options = ("--part", "4/4", "--overwrite", "--patch_size", "96")
    assert run(copy, scenes, output, *options) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "otherwise" in x]
    assert "mosaic.vrt 1 were made otherwise than tile0_prediction.tif" in line
    assert "tile3_prediction.tif: windows of 96 pixels, not 64; model " in line
    assert f"{copy}, not {land.path}" in line


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 501])
def test_parts_are_all_scenes_once_and_nearly_alike(count):
    tasks = [Task(str(number), None) for number in range(count)]
    parts = [tasks_of_part(tasks, f"{number}/10") for number in range(1, 11)]
    assert list(chain.from_iterable(parts)) == tasks
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_part_goes_on_with_resume_and_another_is_not_in_its_way(
    land, tmp_path, output, capsys
):
    scenes, _ = tiles(tmp_path)
    assert run(land.path, scenes, output, "--part", "1/2") == 0
    made = {path: path.stat().st_mtime_ns for path in output.glob("*.tif")}
    assert run(land.path, scenes, output, "--part", "1/2") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run(land.path, scenes, output, "--part", "2/2") == 0
    assert run(land.path, scenes, output, "--part", "1/1", "--resume") == 0
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_a_part_without_scenes_is_done_at_once(land, tmp_path, output, capsys):
    scenes, _ = tiles(tmp_path)
    assert run(land.path, scenes, output, "--part", "1/9") == 0
    assert "--part 1/9: none of the 4 scenes" in capsys.readouterr().err
    assert run(land.path, scenes, output, "--part", "1/9", "--check") == 0
    assert "scenes   0" in capsys.readouterr().out


def test_the_check_of_a_part_counts_its_scenes(land, tmp_path, output, capsys):
    scenes, _ = tiles(tmp_path)
    assert run(land.path, scenes, output, "--part", "2/4", "--check") == 0
    assert "scenes   1" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5"])
def test_other_parts_are_wrong_options(land, output, part, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(land.path, "a.tif", output, f"--part={part}")
    assert f"--part {part}: expected K/N" in capsys.readouterr().err


def test_a_part_of_one_map_is_refused(land, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(land.path, ["a.tif", "b.tif"], tmp_path / "map.tif", "--part=1/2", "--combine=mean")  # fmt: skip
    assert "--part 1/2: expected no --combine" in capsys.readouterr().err


def test_a_part_maps_what_the_whole_would(spatial, tmp_path):
    scenes, _ = tiles(tmp_path)
    assert run(spatial, scenes, tmp_path / "whole") == 0
    assert run(spatial, scenes, tmp_path / "part", "--part", "2/2") == 0
    for number in (2, 3):
        one, other = (
            read_map(tmp_path / folder / f"tile{number}_prediction.tif")
            for folder in ("whole", "part")
        )
        np.testing.assert_array_equal(one, other)
