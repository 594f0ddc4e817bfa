"""Runs of ``extract``: metadata, failures, the command line, other readers of the patches."""

from __future__ import annotations

import errno
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from rasterio.transform import Affine
from shapely import box
from site_helpers import (
    CRS,
    LEFT,
    PATCH,
    RIGHT,
    SIZE,
    TRANSFORM,
    Site,
    centres_inside,
    classes,
    complaint,
    diamond,
    hole,
    pixels,
    python,
    refusal,
    run,
    scene,
    tiles,
)

import Patch_extraction
from common import VERSION
from common.console import settings_from
from common.errors import WORK_IS_KEPT, RasterError
from extraction.cutting import PatchWriter
from extraction.report import SplitSummary
from extraction.settings import ExtractionConfig

# --- metadata --------------------------------------------------------------------------------


def test_metadata_is_true_of_every_patch(site):
    image = scene()
    image[:, ~hole()] = 0
    site.draw_image(image, nodata=0)
    cells = [*tiles(3, 1), diamond(24, 24), box(20, 30, 40, 44), box(200, 0, 216, 16)]
    site.draw_grid(cells, name=list("abcdef"))
    patches = site.extract("--save_metadata", "--seed", 3)
    report = site.metadata()
    records = {record["name"]: record for record in report["patches"]}
    assert records.keys() == patches.keys()
    for (name, patch), cell in zip(patches.items(), cells):
        record = records[name]
        left, top, width, height = record["window"]
        assert record["split"] == patch.split
        assert record["transform"] == list(patch.transform[:6])
        assert patch.transform == (
            TRANSFORM
            * Affine.translation(left, top)
            * Affine.scale(width / PATCH, height / PATCH)
        )
        inside = centres_inside(cell)
        assert record["valid_share"] == round(hole()[inside].mean(), 4)
        counts = np.bincount(patch.label[patch.labelled])
        assert record["class_pixels"] == counts.tolist()
        if (width, height) == (PATCH, PATCH):
            valid = hole()[top : top + PATCH, left : left + PATCH]
            source = image[:, top : top + PATCH, left : left + PATCH]
            assert np.array_equal(patch.image, np.where(valid, source, 0))
    assert [records[n]["window"][2:] for n in ("patch_d", "patch_e")] == [
        [16, 16],
        [20, 14],
    ]
    assert report["version"] == VERSION
    assert report["crs"] == CRS
    assert report["unlabelled"] == 255
    assert report["skipped"] == {"patch_f": "outside the image"}
    settings = report["settings"]
    assert settings["image"] == str(site.image)
    assert (settings["seed"], settings["patch_size"]) == (3, PATCH)


def test_metadata_is_written_only_when_it_is_asked_for(site):
    site.extract()
    assert not (site.out / "Patch" / "metadata.json").exists()


def test_the_table_on_stdout_counts_the_splits(site, capsys):
    site.draw_label(np.repeat([[0], [1], [255]], 16, 0).repeat(SIZE, 1).astype("uint8"))
    site.draw_grid([box(0, 8, 16, 24), box(16, 8, 32, 24), box(32, 24, 48, 40)])
    site.extract("--train_ratio", 1, "--val_ratio", 0, "--test_ratio", 0)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[:5] == [
        ["train", "validation", "test"],
        ["patches", "3", "0", "0"],
        ["class", "0", "40.0%", "-", "-"],
        ["class", "1", "60.0%", "-", "-"],
        ["unlabelled", "16.7%", "-", "-"],
    ]
    assert rows[-1] == ["Patches:", str(site.out / "Patch")]


def test_summaries_of_splits_add_up():
    total = SplitSummary(1, 10, (2, 3)) + SplitSummary(2, 20, (1, 0, 4))
    assert total == SplitSummary(3, 30, (3, 3, 4))
    assert total.unlabelled_share == pytest.approx(20 / 30)
    assert total.class_share(2) == 0.4
    assert total.class_share(3) == SplitSummary().class_share(0) == 0
    assert SplitSummary().unlabelled_share == 0


# --- runs that fail, and runs upon runs ------------------------------------------------------


def test_a_second_run_refuses_and_leaves_the_first_one_as_it_is(site, capsys):
    first = site.extract()
    before = site.leftovers()
    capsys.readouterr()
    assert run(*site.words("--seed", 1)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{site.out / 'Patch'} already holds patches" in line
    assert "--overwrite" in line
    assert site.leftovers() == before
    assert {n: p.split for n, p in site.patches().items()} == {
        n: p.split for n, p in first.items()
    }


def test_overwrite_replaces_the_patches_of_the_first_run(site):
    site.extract("--save_metadata")
    (site.out / "sample.png").write_bytes(b"mine")
    site.draw_grid(tiles(2, 1), plot=["a", "b"])
    patches = site.extract("--overwrite", "--id_column", "plot")
    assert list(patches) == ["patch_a", "patch_b"]
    assert {path.name for path in site.out.iterdir()} == {"Patch", "sample.png"}
    assert not (site.out / "Patch" / "metadata.json").exists()


def test_an_empty_folder_of_that_name_is_no_obstacle(site):
    (site.out / "Patch").mkdir(parents=True)
    assert len(site.extract()) == 9


def failing_write(error: BaseException):
    """A ``PatchWriter.write`` that fails at the fifth patch."""
    write, calls = PatchWriter.write, []

    def failing(self, patch, image_path, label_path):
        write(self, patch, image_path, label_path)
        calls.append(image_path)
        if len(calls) == 5:
            raise error

    return failing


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(errno.ENOSPC, "No space left on device"), 1), (KeyboardInterrupt(), 130)],
)
def test_a_run_that_ends_early_leaves_the_former_patches_untouched(
    site, capsys, monkeypatch, error, status
):
    site.extract()
    before = {path: pixels(path) for path in site.out.rglob("*.tif")}
    monkeypatch.setattr(PatchWriter, "write", failing_write(error))
    capsys.readouterr()
    assert run(*site.words("--overwrite", "--workers", 1)) == status
    lines = capsys.readouterr().err.splitlines()
    assert "is kept: --resume continues" in lines[0]
    assert status == 130 or (len(lines) == 1 and "No space left" in lines[0])
    assert {path.name for path in site.out.iterdir()} == {"Patch", ".Patch-partial"}
    after = {path: pixels(path) for path in (site.out / "Patch").rglob("*.tif")}
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[path], before[path]) for path in before)


def test_a_defect_shows_its_traceback_and_that_finished_patches_are_kept(
    site, monkeypatch
):
    failing = failing_write(ZeroDivisionError())
    monkeypatch.setattr(PatchWriter, "write", failing)
    with pytest.raises(ZeroDivisionError) as caught:
        run(*site.words("--workers", 1))
    assert caught.value.__notes__ == [WORK_IS_KEPT]
    assert [path.name for path in site.out.iterdir()] == [".Patch-partial"]


def test_a_failing_run_leaves_no_empty_folder(site, capsys):
    site.draw_label(classes(dtype="uint16") + 300)
    site.out = site.folder / "deep" / "out"
    refusal(capsys, site)
    assert not (site.folder / "deep").exists()


def test_a_file_in_the_place_of_the_patches_is_left_alone(site):
    site.out.mkdir()
    (site.out / "Patch").write_text("mine")
    assert run(*site.words()) == 1
    assert site.leftovers() == ["Patch"]
    assert (site.out / "Patch").read_text() == "mine"


def test_overwrite_leaves_nothing_behind_where_the_patches_are_a_link(site):
    elsewhere = site.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("old")
    site.out.mkdir()
    (site.out / "Patch").symlink_to(elsewhere)
    assert len(site.extract("--overwrite")) == 9
    assert [path.name for path in site.out.iterdir()] == ["Patch"]


def test_patches_are_flushed_to_disk_before_they_get_their_name(site, monkeypatch):
    seen = []

    def flush(path: Path) -> None:
        assert path.is_file() and not (site.out / "Patch").exists()
        seen.append(path.name)

    monkeypatch.setattr("extraction.dataset.flush", flush)
    patches = site.extract()
    assert len([name for name in seen if name.endswith(".tif")]) == 2 * len(patches)


def draw_table(site: Site) -> None:
    site.grid = site.folder / "grid.csv"
    site.grid.write_text("id,name\n1,a\n")


def draw_grid_without_crs(site: Site) -> None:
    site.draw_grid(tiles(), "grid.shp")
    site.grid.with_suffix(".prj").unlink()


def rename(what: str, name: str):
    return lambda site: setattr(site, what, site.folder / name)


def copy_as(what: str, source: str, name: str):
    """Instead of one file a copy of another, under the name of another format."""

    def change(site: Site) -> None:
        (site.folder / name).write_bytes(getattr(site, source).read_bytes())
        setattr(site, what, site.folder / name)

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.draw_image(scene(), crs=None), "image.tif has no CRS"),
        (rename("label", "no.shp"), "no.shp cannot be read as a vector file"),
        (
            lambda s: s.draw_label(scene()),
            "label.tif has 3 bands; a label or a class map has one",
        ),
        (lambda s: s.draw_label(classes(), crs=None), "label.tif has no CRS"),
        (rename("grid", "no.gpkg"), "no.gpkg cannot be read as a vector file"),
        (rename("grid", "image.tif"), "image.tif"),
        (draw_table, "grid.csv has no geometries"),
        (draw_grid_without_crs, "grid.shp has no CRS; add it"),
        (lambda s: s.draw_grid([]), "has no geometries"),
        (lambda s: s.draw_grid([None, None]), "has no geometries"),
        (lambda s: s.draw_label(np.full((SIZE, SIZE), 255, "uint8")), "no labelled"),
        (lambda s: s.draw_image(0 * scene(), nodata=0), "no valid pixel"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(
    site, capsys, change, expected
):
    change(site)
    assert expected in refusal(capsys, site)


def cut_off(what: str):
    def change(site: Site) -> None:
        path = getattr(site, what)
        path.write_bytes(path.read_bytes()[:-3000])

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rename("image", "no.tif"), "no.tif"),
        (rename("image", "grid.geojson"), "grid.geojson"),
        (copy_as("image", "grid", "scene.tif"), "scene.tif"),
        (rename("label", "no.tif"), "no.tif"),
        (cut_off("image"), "image.tif"),
        (cut_off("label"), "label.tif"),
    ],
)
def test_rasters_that_cannot_be_read_are_refused_in_one_line(
    site, capsys, change, expected
):
    site.draw_label(classes(dtype="uint16"))
    change(site)
    error, file = refusal(capsys, site), site.folder / expected
    assert f"Cannot read {file}" in error or f"{file} is cut off" in error


@pytest.mark.parametrize("what", ["grid", "label"])
def test_a_crs_of_which_nothing_is_known_is_refused(site, capsys, what):
    local = 'LOCAL_CS["drawing board",UNIT["metre",1]]'
    if what == "label":
        site.draw_label(classes(), crs=local)
    else:
        site.draw_grid(tiles(), "grid.gpkg", drawn_in=local, crs=None)
    assert str(getattr(site, what)) in refusal(capsys, site)


def test_debug_shows_the_traceback_of_a_refusal(site):
    site.image = site.folder / "no.tif"
    with pytest.raises(RasterError, match=r"no\.tif"):
        run(*site.words("--debug"))


# --- command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--patch_size", 7], "--patch_size 7: expected 8 to 16384"),
        (["--patch_size", "big"], "invalid int value: 'big'"),
        (["--min_valid", 1.1], "--min_valid 1.1: expected 0 to 1"),
        (["--min_valid", "nan"], "--min_valid nan: expected 0 to 1"),
        (["--seed", -1], "--seed -1: expected 0 to 4294967295"),
        (["--train_ratio", 1.2], "--train_ratio 1.2: expected 0 to 1"),
        (["--val_ratio", -0.1], "--val_ratio -0.1: expected 0 to 1"),
        (["--train_ratio", 0.8, "--val_ratio", 0.3], "sum to 1.1: expected 1 at most"),
        (["--interpolation", "lanczos"], "invalid choice: 'lanczos'"),
        (["--label_values", "3"], "at least two classes"),
        (["--label_values", "3,3"], "the value 3 is given twice"),
        (["--label_values", "1,two"], "expected whole numbers for this label"),
        (["--label_values", "1,,2"], "a value or name is missing"),
        (["--label_values", "1,2", "--class_names", "a"], "2 names, as many as"),
        (["--id_column", "plot"], "Unknown --id_column 'plot'"),
        (["--patch", 16], "unrecognized arguments: --patch 16"),
    ],
)
def test_a_wrong_option_exits_with_status_2_and_writes_nothing(
    site, capsys, words, expected
):
    assert expected in complaint(capsys, *site.words(*words))
    assert not site.out.exists()


def test_an_id_column_needs_a_grid_whose_column_it_is(site, capsys):
    words = list(map(str, site.words()))
    place = words.index("--grid")
    del words[place : place + 2]
    expected = "--id_column name: expected --grid with it"
    assert expected in complaint(capsys, *words, "--id_column", "name")
    assert not site.out.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--label_values", "1,2"], "expected --label_column with it"),
        (["--label_column", "sort"], "Unknown --label_column 'sort'"),
        (["--label_column", "kind", "--label_values", "a,x"], "Unknown --label_values"),
    ],
)
def test_a_wrong_option_for_a_vector_label_exits_with_status_2(
    site, capsys, words, expected
):
    site.draw_label_shapes([LEFT, RIGHT], kind=["a", "b"])
    assert expected in complaint(capsys, *site.words(*words))
    assert not site.out.exists()


@pytest.mark.parametrize("command", ["extract", "visualize", "info"])
def test_a_missing_option_is_named(capsys, command):
    assert "--output" in complaint(capsys, command)


def test_a_missing_or_unknown_command_exits_with_status_2(capsys):
    assert "COMMAND" in complaint(capsys)
    assert "'cut'" in complaint(capsys, "cut")


def test_the_documented_options_have_the_documented_defaults():
    words = ["--image", "i", "--label", "l", "--grid", "g", "--output", "o"]
    parsed = Patch_extraction.build_parser().parse_args(["extract", *words])
    config = settings_from(ExtractionConfig, parsed)
    assert config == ExtractionConfig(image="i", label="l", grid="g", output="o")
    assert config.ratios == (0.75, 0.15, 0.10)
    assert (config.patch_size, config.seed, config.min_valid) == (224, 42, 0.5)
    assert not config.save_metadata


def test_extraction_imports_neither_torch_nor_scikit_learn_and_help_nothing_slow(site):
    slow = "'geopandas', 'pandas', 'matplotlib', 'cv2', 'scipy', 'tifffile'"
    code = f"""
import Patch_extraction
heavy = {{'torch', 'torchvision', 'segmentation_models_pytorch', 'sklearn'}}
for command in ([], ['extract'], ['visualize'], ['info']):
    try:
        Patch_extraction.main([*command, '--help'])
    except SystemExit as exit:
        assert exit.code == 0
assert not ({{{slow}}} | heavy) & set(sys.modules), 'help'
status = Patch_extraction.main({site.words(size=8)})
assert not heavy & set(sys.modules), 'extract'
sys.exit(status)
"""
    done = python(code, site.folder)
    assert done.returncode == 0, done.stderr
    assert "--patch_size" in done.stdout
    assert len(site.patches()) == 9


# --- other readers ---------------------------------------------------------------------------


def test_tifffile_reads_the_patches_with_the_listed_packages_alone(tmp_path):
    expected = {}
    for dtype in ("uint8", "int16", "uint16", "float32"):
        site = Site(tmp_path)
        site.out = tmp_path / dtype
        image = scene(dtype=dtype)
        image[:, :4] = 0
        site.draw_image(image, nodata=0)
        if dtype == "uint16":
            site.draw_image(image, mask=image[0] > 0)
            site.draw_label(classes(300, dtype="uint16"))
            values = ",".join(map(str, range(300)))
            site.extract("--label_values", values)
        else:
            site.extract()
        for path in site.out.rglob("*.tif"):
            expected[str(path)] = pixels(path)
    code = f"""
sys.modules['imagecodecs'] = None
import numpy, tifffile
paths = {list(expected)}
numpy.savez('read.npz', **{{str(i): tifffile.imread(p) for i, p in enumerate(paths)}})
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    read = np.load(tmp_path / "read.npz")
    assert len(expected) == 4 * 2 * 9
    for number, array in enumerate(expected.values()):
        found = read[str(number)]
        assert found.dtype == array.dtype
        assert np.array_equal(found.reshape(array.shape), array)


def test_memory_does_not_grow_with_the_scene(site):
    peaks = []
    for rows in (2, 2, 64):  # the first run pays for the imports
        height = 64 * rows
        site.draw_image(scene(4, height, 64, "float32"))
        site.draw_label(classes(3, height, 64))
        site.draw_grid(tiles(1, rows, side=64))
        tracemalloc.start()
        assert run(*site.words("--overwrite", size=32)) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    growth = 4 * 64 * 64 * 62 * 4  # bytes of the pixels that the last scene has more
    assert peaks[2] - peaks[1] < growth / 4
