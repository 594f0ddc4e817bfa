"""examples/demo.py: the scene that it makes, and its command line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
from helpers import ROOT
from rasterio.transform import from_origin

from common.console import settings_from
from common.pictures import rgb_bands
from common.rasters import same_pixel_grid, select_bands

SIZE, PATCH_SIZE, SEED = 300, 64, 7


def load_demo():
    """The script as a module; it lies outside of any package."""
    path = ROOT / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demo = load_demo()


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a scene in a folder of its own; options beside the usual ones are passed on."""

    def scene(**options):
        folder = tmp_path_factory.mktemp("scene") / "new"
        usual = {"size": SIZE, "seed": SEED, "patch_size": PATCH_SIZE}
        return demo.synthesize_scene(folder, **(usual | options))

    return scene


@pytest.fixture(scope="module")
def scene(make):
    return make()


def pixels(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


# --- the scene ------------------------------------------------------------------------------


def test_image_and_label_lie_on_one_pixel_grid_with_the_promised_profile(scene):
    with rasterio.open(scene.image) as image, rasterio.open(scene.label) as label:
        assert image.shape == (SIZE, SIZE)
        assert image.crs == "EPSG:32631"
        assert image.transform == from_origin(431_240, 4_912_560, 10, 10)
        assert same_pixel_grid(image, label, 0)
        assert (image.count, image.dtypes[0], image.nodata) == (10, "uint16", 0)
        assert (label.count, label.dtypes[0], label.nodata) == (1, "uint8", 255)


def test_bands_are_described_so_that_true_colour_is_found(scene):
    with rasterio.open(scene.image) as image:
        assert image.descriptions == tuple(demo.BANDS)
        assert rgb_bands(image.descriptions, image.colorinterp) == [3, 2, 1]
        assert select_bands(image, "B8A,b02,B12 swir 2") == [8, 1, 10]


def test_origin_and_names_can_be_chosen(make):
    scene = make(size=256, origin=(500_000.0, 5_000_000.0), name="may")
    names = [scene.image.name, scene.label.name, scene.grid.name]
    assert names == ["may.tif", "may_label.tif", "may_grid.shp"]
    for path in (scene.image, scene.label):
        with rasterio.open(path) as file:
            assert file.transform == from_origin(500_000, 5_000_000, 10, 10)
    left, _, _, top = geopandas.read_file(scene.grid).total_bounds
    assert (left, top) == (500_000, 5_000_000)


def test_the_strip_without_data_is_the_same_in_image_and_label(scene):
    unseen = pixels(scene.label)[0] == 255
    np.testing.assert_array_equal(pixels(scene.image) == 0, np.stack([unseen] * 10))
    assert 0.01 < unseen.mean() < 0.2
    assert (np.diff(unseen.astype(int), axis=1) <= 0).all()  # on the left
    assert unseen.any(axis=1).mean() < 0.9  # slanted


@pytest.mark.parametrize("size", [256, 300, 384])
@pytest.mark.parametrize("seed", range(4))
def test_all_six_classes_and_no_others_are_present(size, seed):
    label = demo.make_ground(size, seed).label[demo.swath(size)]
    assert np.unique(label).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_land_covers_look_as_they_do_from_space(scene):
    image, label = pixels(scene.image).astype(float), pixels(scene.label)[0]
    green, red, nir, swir = image[[1, 2, 6, 8]]
    ndvi = (nir - red) / np.maximum(nir + red, 1)  # 0 without data
    ndwi = (green - nir) / np.maximum(green + nir, 1)
    ndbi = (swir - nir) / np.maximum(swir + nir, 1)

    def typical(index, name: str) -> float:
        return float(np.median(index[label == list(demo.CLASS_COLORS).index(name)]))

    assert typical(ndwi, "water") > 0.2
    assert typical(ndvi, "forest") > 0.6
    assert typical(ndvi, "cropland") > 0.5 > typical(ndvi, "bare_soil")
    assert typical(ndbi, "bare_soil") > 0 > typical(ndbi, "grassland")
    assert typical(red, "built_up") > 2 * typical(red, "forest")


def test_the_same_seeds_give_the_same_files(make, scene):
    again = make()
    assert scene.image != again.image
    for one, other in zip(vars(scene).values(), vars(again).values()):
        if one.suffix == ".tif":
            assert one.read_bytes() == other.read_bytes()
    tables = geopandas.read_file(scene.grid), geopandas.read_file(again.grid)
    assert tables[0].equals(tables[1])


def test_another_day_gives_the_same_label_but_another_image(make, scene):
    other = make(date_seed=1)
    assert scene.label.read_bytes() == other.label.read_bytes()
    one, two = pixels(scene.image), pixels(other.image)
    seen = one[0] > 0
    np.testing.assert_array_equal(two[0] > 0, seen)
    for band in range(10):
        assert np.mean(one[band][seen] != two[band][seen]) > 0.9
        shared = np.corrcoef(one[band][seen], two[band][seen])[0, 1]
        assert shared > 0.8  # it is still the same ground


def test_another_seed_gives_another_ground(make, scene):
    other = make(seed=SEED + 1)
    assert np.mean(pixels(scene.label) != pixels(other.label)) > 0.3


def test_two_classes_are_water_and_the_rest_on_the_same_image(make, scene):
    binary = make(classes=2)
    label, water = pixels(scene.label), pixels(binary.label)
    expected = np.where(label == 255, 255, (label == 0).astype(int))
    np.testing.assert_array_equal(water, expected)
    assert np.unique(water).tolist() == [0, 1, 255]
    np.testing.assert_array_equal(pixels(scene.image), pixels(binary.image))


@pytest.mark.parametrize(("size", "patch_size"), [(256, 64), (300, 64), (256, 300)])
def test_the_grid_covers_the_scene_with_square_cells_that_do_not_overlap(
    tmp_path, size, patch_size
):
    transform = from_origin(431_240, 4_912_560, 10, 10)
    demo.write_grid(tmp_path / "grid.shp", size, patch_size, transform)
    grid = geopandas.read_file(tmp_path / "grid.shp")
    rows = -(-size // patch_size)
    assert grid.crs == "EPSG:32631"
    assert grid["id"].tolist() == list(range(1, rows**2 + 1))
    assert (grid.area == (10 * patch_size) ** 2).all()
    assert grid.union_all().area == grid.area.sum()
    side = 10 * patch_size * rows
    assert side >= 10 * size
    bounds = (431_240, 4_912_560 - side, 431_240 + side, 4_912_560)
    assert tuple(grid.total_bounds) == bounds


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"classes": 3}, "classes is 3, expected 2 or 6"),
        ({"size": 255}, "size is 255 pixels, expected at least 256"),
    ],
)
def test_a_scene_that_cannot_be_made_is_an_error_and_leaves_no_file(
    tmp_path, options, complaint
):
    with pytest.raises(ValueError, match=complaint):
        demo.synthesize_scene(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# --- the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--size", "255"], "--size is 255 pixels, expected at least 256"),
        (["--size", "256", "--patch_size", "65"], "expected 32 to 64"),
        (["--patch_size", "31"], "--patch_size is 31 pixels"),
        (["--size", "large"], "invalid int value: 'large'"),
    ],
)
def test_a_wrong_command_line_exits_with_status_2_and_makes_nothing(
    tmp_path, words, complaint, capsys
):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--output", str(tmp_path / "new"), *words])
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--epochs", "0"]])
def test_a_value_that_fails_later_is_refused_at_once(monkeypatch, words):
    monkeypatch.setattr(demo, "run_demo", lambda args: None)
    with pytest.raises(SystemExit) as stop:
        demo.main(words)
    assert stop.value.code == 2


def scene_only(folder: Path) -> int:
    small = ["--size", "256", "--patch_size", "64", "--scene_only"]
    return demo.main(["--output", str(folder), *small])


def test_scene_only_writes_and_prints_the_three_files(tmp_path, capsys):
    assert scene_only(tmp_path / "new") == 0
    printed = capsys.readouterr().out.split()
    names = ["scene.tif", "scene_label.tif", "scene_grid.shp"]
    assert printed == [str(tmp_path / "new" / name) for name in names]
    assert all(Path(path).is_file() for path in printed)
    assert not (tmp_path / "new" / "dataset").exists()


def test_an_output_that_is_a_file_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert scene_only(tmp_path / "file") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_script_that_fails_ends_the_demo_with_its_name(tmp_path, capsys, monkeypatch):
    def fail(command, **options):
        raise subprocess.CalledProcessError(3, command)

    monkeypatch.setattr(demo.subprocess, "run", fail)
    small = ["--size", "256", "--patch_size", "64"]
    assert demo.main(["--output", str(tmp_path), *small]) == 1
    assert capsys.readouterr().err == "error: Patch_extraction.py ended with status 3\n"


def test_a_command_is_shown_as_a_user_would_type_it_and_run_in_the_repository(
    capsys, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        demo.subprocess, "run", lambda command, **more: calls.append((command, more))
    )
    demo.run_script("main.py", dataset_root="my data", epochs=2, pretrained=True)
    shown = "$ python main.py --dataset_root 'my data' --epochs 2 --pretrained"
    assert capsys.readouterr().out.strip() == shown
    words = ["--dataset_root", "my data", "--epochs", "2", "--pretrained"]
    expected = [sys.executable, "main.py", *words]
    root = ROOT
    assert calls == [(expected, {"cwd": root, "check": True})]


def test_the_scripts_understand_the_commands_of_the_demo(tmp_path, scene, monkeypatch):
    def parse(script, *words, **options):
        module = importlib.import_module(script.removesuffix(".py"))
        for name, value in options.items():
            words += (f"--{name}",) if value is True else (f"--{name}", str(value))
        parsed.append(module.build_parser().parse_args(words))

    parsed = []
    monkeypatch.setattr(demo, "run_script", parse)
    arguments = demo.build_parser().parse_args(["--seed", "5", "--epochs", "3"])
    demo.extract_train_predict(scene, tmp_path, arguments)
    extraction, training, prediction = parsed
    assert extraction.output == training.dataset_root
    assert (extraction.seed, training.seed, training.epochs) == (5, 5, 3)
    (model,) = prediction.model
    assert Path(model).parent == Path(training.save_dir)
    settings_from(extraction.config_class, extraction)


# --- the picture ----------------------------------------------------------------------------


def scores(**changes) -> dict:
    ious = dict.fromkeys(demo.CLASS_COLORS, 0.9) | {"bare_soil": None}
    rows = [{"name": name, "iou": iou} for name, iou in ious.items()]
    means = {"mean_iou": 0.9, "mean_f1": 0.95, "overall_accuracy": 0.96, "kappa": 0.94}
    return means | {"per_class": rows} | changes


def test_the_scores_are_reported_in_one_line():
    expected = "test split: mIoU 0.900   F1 0.950   accuracy 0.960   kappa 0.940"
    assert demo.score_line(scores()) == expected


def test_a_score_that_does_not_exist_is_reported_too():
    assert "kappa" in demo.score_line(scores(kappa=None))


def test_colours_of_a_label_are_those_of_the_classes_and_nodata_is_white(scene):
    from matplotlib.colors import to_rgb

    label, shown = pixels(scene.label)[0], demo.class_colors(scene.label)
    for number, colour in enumerate(demo.CLASS_COLORS.values()):
        assert (shown[label == number] == to_rgb(colour)).all()
    assert (shown[label == 255] == 1).all()


def test_true_colour_is_white_without_data_and_stretched_elsewhere(scene):
    shown, unseen = demo.true_color(scene.image), pixels(scene.label)[0] == 255
    assert shown.shape == (SIZE, SIZE, 3)
    assert (shown[unseen] == 1).all()
    assert np.percentile(shown[~unseen], [1, 99]).tolist() == [0, 1]


def test_a_large_file_is_read_shrunk(scene):
    shrunk = demo.read_shrunk(scene.label, [1], longest=100)
    assert shrunk.shape == (1, 100, 100)
    assert shrunk.mask.any()


def test_scene_truth_map_and_confidence_are_drawn(tmp_path, scene, real_pictures):
    with rasterio.open(scene.label) as file:
        profile, label = file.profile, file.read()
    with rasterio.open(tmp_path / "map.tif", "w", **profile) as file:
        file.write(label)
    profile |= {"dtype": "float32", "nodata": -1, "predictor": 1}
    with rasterio.open(tmp_path / "map_confidence.tif", "w", **profile) as file:
        file.write(np.where(label == 255, -1, 0.9).astype(np.float32))
    target = tmp_path / "demo.png"
    demo.draw_picture(target, scene, tmp_path / "map.tif", scores())
    assert target.read_bytes().startswith(b"\x89PNG")
