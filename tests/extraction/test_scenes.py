"""Many scenes: pairing, what they have in common, cells without a grid, scenes that cannot be read."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import rasterio
from batch_helpers import (
    SIDE,
    Dataset,
    at,
    draw_spoilt,
    messages,
    noise,
    spoil,
    tiles,
    write,
    write_grid,
)
from rasterio.windows import Window
from shapely import box
from site_helpers import complaint, run

import Patch_extraction
from common.console import settings_from
from common.errors import DatasetError
from extraction.cells import regular_cells
from extraction.pairing import find_ids, pair_scenes
from extraction.settings import BatchConfig

# --- pairing ---------------------------------------------------------------------------------


def test_an_id_is_what_stands_for_it_in_the_pattern_in_any_case():
    names = [
        "Image_A.tif",
        "IMAGE_b_2.TIF",
        "Image_.tif",
        "xImage_c.tif",
        "Image_d.tiff",
    ]
    found = find_ids([Path(n) for n in names], "Image_<id>.tif", Path())
    assert found == {"a": Path("Image_A.tif"), "b_2": Path("IMAGE_b_2.TIF")}


def test_a_star_stands_for_anything_and_signs_for_themselves():
    names = ["S2_x_(1).tif", "S2_y_(1).jp2", "S2_z_1.tif"]
    found = find_ids([Path(n) for n in names], "S2_<id>_(1).*", Path())
    assert list(found) == ["x", "y"]
    starred = find_ids([Path(n) for n in names], "*_<id>_*", Path())
    assert list(starred) == ["x", "y", "z"]


def test_two_files_of_one_id_are_refused_by_name():
    paths = [Path("a/Image_7.tif"), Path("b/image_7.TIF")]
    with pytest.raises(DatasetError, match=r"a/Image_7\.tif and b/image_7\.TIF"):
        find_ids(paths, "Image_<id>.tif", Path(), recursive=True)


def test_scenes_are_paired_by_id_and_sorted(tmp_path):
    for name in ("LABEL_b.tif", "Image_B.tif", "image_a.TIF", "Label_A.tif", "x.txt"):
        (tmp_path / name).touch()
    config = BatchConfig(data_dir=str(tmp_path), output="o", grid="g.shp")
    scenes = pair_scenes(config)
    assert [
        (Path(s.image).name, Path(s.label).name, s.grid, s.name) for s in scenes
    ] == [
        ("Image_B.tif", "LABEL_b.tif", "g.shp", "b"),
        ("image_a.TIF", "Label_A.tif", "g.shp", "a"),
    ]


def test_each_scene_gets_the_grid_of_its_id_whatever_its_format(tmp_path):
    for name in (
        "Image_a.tif", "Label_a.tif", "Grid_A.shp", "Grid_A.dbf", "Grid_A.prj", "Grid_a.shx",
        "Image_b.tif", "Label_b.tif", "grid_b.GeoJSON",
    ):  # fmt: skip
        (tmp_path / name).touch()
    config = BatchConfig(data_dir=str(tmp_path), output="o", use_per_image_grid=True)
    scenes = pair_scenes(config)
    assert [Path(s.grid).name for s in scenes] == ["Grid_A.shp", "grid_b.GeoJSON"]


def test_scenes_whose_numbers_mean_other_values_are_named(batch, capsys):
    for number, (scale, offset) in enumerate([(1, 0), (1e-4, 0), (1e-4, -0.1)]):
        batch.draw(f"{number}", 16, transform=at(0, 100 * number))
        with rasterio.open(batch.data / f"Image_{number}.tif", "r+") as file:
            file.scales, file.offsets = (scale,) * 2, (offset,) * 2
    said = messages(capsys, *batch.words())
    (line,) = [line for line in said if "equal numbers" in line]
    assert "Image_0.tif holds uint16;" in line
    assert "Image_1.tif holds uint16 of scale and offset (0.0001, 0);" in line
    assert "Image_2.tif holds uint16 of scale and offset (0.0001, -0.1);" in line


def test_scenes_of_one_meaning_are_not(batch, capsys):
    for number in range(2):
        batch.draw(f"{number}", 16, transform=at(0, 100 * number))
    said = messages(capsys, *batch.words())
    assert not [line for line in said if "equal numbers" in line]


@pytest.mark.parametrize("more", [(), ("--split_by", "block")])
def test_a_scene_whose_coordinates_do_not_fit_its_crs_is_refused(batch, capsys, more):
    batch.draw("a", 16, crs="EPSG:4326")  # metres of UTM
    line = batch.refusal(capsys, *more)
    assert "Image_a.tif does not lie on the Earth: " in line and "-a_srs" in line


def test_patches_are_named_by_their_scene(batch):
    batch.draw("North", 16)
    batch.draw("south", 16, transform=at(0, 100))
    dataset = batch.cut()
    names = [
        f"{s}_r00{r}_c00{c}" for s in ("north", "south") for r in "01" for c in "01"
    ]
    assert list(dataset.splits) == names
    assert [dataset.records[n]["scene"] for n in (names[0], names[-1])] == [
        str(batch.data / "Image_North.tif"),
        str(batch.data / "Image_south.tif"),
    ]


def test_patterns_name_images_labels_and_grids(batch):
    image, label = noise(16)
    write(batch.data / "S2A_p1_2024.tiff", image)
    write(batch.data / "p1-truth.tif", label)
    write_grid(batch.data / "p1.gpkg", tiles(2, 1))
    patterns = [
        "--image_pattern",
        "S2A_<id>_*.tiff",
        "--label_pattern",
        "<id>-truth.tif",
    ]
    grids = ["--use_per_image_grid", "--grid_pattern", "<id>.gpkg"]
    assert list(batch.cut(*patterns, *grids).splits) == ["p1_001", "p1_002"]


def test_folders_within_are_looked_into_only_when_asked_to(batch, capsys):
    image, label = noise(16)
    write(batch.data / "deep/er/Image_a.tif", image)
    write(batch.data / "deep/Label_a.tif", label)
    assert "No file in" in batch.refusal(capsys)
    assert len(batch.cut("--recursive").splits) == 4


def test_an_id_that_is_there_twice_is_refused(batch, capsys):
    batch.draw("a", 16)
    write(batch.data / "later/Image_A.tif", noise(16)[0])
    line = batch.refusal(capsys, "--recursive")
    assert "Image_a.tif" in line and "Image_A.tif" in line and "same id" in line


def test_files_without_a_partner_are_refused_by_name(batch, capsys):
    batch.draw("a", 16)
    write(batch.data / "Image_b.tif", noise(16)[0])
    write(batch.data / "Label_c.tif", noise(16)[1])
    line = batch.refusal(capsys)
    assert (
        "Image_b.tif" in line and "Label_c.tif" in line and "--skip_unmatched" in line
    )
    assert "_a.tif" not in line


def test_files_without_a_partner_are_left_out_with_a_warning_when_allowed(
    batch, capsys
):
    batch.draw("a", 16)
    write(batch.data / "Image_b.tif", noise(16)[0])
    line = messages(capsys, *batch.words("--skip_unmatched"))[0]
    assert "Image_b.tif" in line and "_a.tif" not in line
    assert {name[:1] for name in Dataset(batch.out).splits} == {"a"}


def test_a_scene_without_a_grid_of_its_own_is_refused_by_name(batch, capsys):
    for name in "ab":
        batch.draw(name, 16)
    write_grid(batch.data / "Grid_a.geojson", tiles(2, 2))
    line = batch.refusal(capsys, "--use_per_image_grid")
    assert "Image_b.tif" in line and "Image_a.tif" not in line


def test_a_folder_without_scenes_or_no_folder_is_refused(batch, capsys):
    assert "matches --image_pattern Image_<id>.*" in batch.refusal(capsys)
    batch.data = batch.folder / "nowhere"
    assert f"No folder {batch.data}" in batch.refusal(capsys)


def test_a_folder_in_which_nothing_has_a_partner_is_refused(batch, capsys):
    write(batch.data / "Image_b.tif", noise(16)[0])
    assert run(*batch.words("--skip_unmatched")) == 1


def test_a_grid_without_a_scene_is_refused_by_name(batch):
    batch.draw("a", 16)
    write_grid(batch.data / "Grid_a.geojson", tiles(2, 2))
    write_grid(batch.data / "Grid_b.geojson", tiles(2, 2))
    assert run(*batch.words("--use_per_image_grid")) == 1


def test_files_without_a_partner_are_counted_once(tmp_path):
    for name in "abc":
        (tmp_path / f"Image_{name}.tif").touch()
    config = BatchConfig(data_dir=str(tmp_path), output="o", use_per_image_grid=True)
    with pytest.raises(DatasetError) as error:
        pair_scenes(config)
    assert "more" not in str(error.value)


# --- what scenes must have in common ---------------------------------------------------------


def test_another_number_of_bands_is_refused_with_both_files(batch, capsys):
    batch.draw("a", 16, bands=2)
    batch.draw("b", 16, bands=3, transform=at(100, 0))
    line = batch.refusal(capsys)
    assert "Image_a.tif 2" in line and "Image_b.tif has 3 bands" in line
    assert len(batch.cut("--bands", "2,1").splits) == 8


def test_other_classes_are_refused_with_both_files(batch, capsys):
    for number, (name, kinds) in enumerate({"a": "xy", "b": "xz"}.items()):
        corner = at(100 * number, 0)
        write(batch.data / f"Image_{name}.tif", noise(16)[0], corner)
        halves = [box(0, 0, 8, 16), box(8, 0, 16, 16)]
        label = batch.data / f"Label_{name}.geojson"
        write_grid(label, halves, corner, kind=list(kinds))
    words = ["--label_pattern", "Label_<id>.geojson", "--label_column", "kind"]
    line = batch.refusal(capsys, *words)
    assert "Label_a.geojson x, y" in line
    assert "Label_b.geojson has the classes x, z" in line


def test_two_cells_of_one_name_are_refused(batch, capsys):
    batch.draw("a b", 16)
    batch.draw("a_b", 16, transform=at(100, 0))
    assert "a_b_r000_c000" in batch.refusal(capsys)


# --- cells without a grid --------------------------------------------------------------------


def test_regular_cells_begin_at_every_stride_inside_the_scene():
    cells = regular_cells(20, 9, 8, 6, "s")
    assert [(cell.name, cell.window) for cell in cells] == [
        ("s_r000_c000", Window(0, 0, 8, 8)),
        ("s_r000_c001", Window(6, 0, 8, 8)),
        ("s_r000_c002", Window(12, 0, 8, 8)),
        ("s_r000_c003", Window(18, 0, 8, 8)),
        ("s_r001_c000", Window(0, 6, 8, 8)),
        ("s_r001_c001", Window(6, 6, 8, 8)),
        ("s_r001_c002", Window(12, 6, 8, 8)),
        ("s_r001_c003", Window(18, 6, 8, 8)),
    ]
    assert all(cell.outline is None for cell in cells)


@pytest.mark.parametrize("stride", [None, 5, 11])
def test_patches_without_a_grid_are_the_scene_pixel_by_pixel(batch, stride):
    height, width = 21, 27
    image, label = noise((height, width))
    batch.draw("a", (height, width))
    words = ["--min_valid", "0", *(["--stride", stride] if stride else [])]
    dataset = batch.cut(*words)
    step = stride or SIDE
    places = itertools.product(range(0, height, step), range(0, width, step))
    windows = [(left, top, SIDE, SIDE) for top, left in places]
    assert [tuple(r["window"]) for r in dataset.records.values()] == windows
    for name, split in dataset.splits.items():
        left, top = dataset.records[name]["window"][:2]
        part = (slice(top, top + SIDE), slice(left, left + SIDE))
        seen = label[part].shape
        with rasterio.open(dataset.root / split / "images" / f"{name}.tif") as file:
            assert file.transform.almost_equals(at(left, top))
            assert np.array_equal(
                file.read()[:, : seen[0], : seen[1]], image[(slice(None), *part)]
            )
            valid = np.zeros((SIDE, SIDE), bool)
            valid[: seen[0], : seen[1]] = True
            assert np.array_equal(file.dataset_mask() > 0, valid)
        with rasterio.open(dataset.root / split / "labels" / f"{name}.tif") as file:
            found = file.read(1)
            assert np.array_equal(found[: seen[0], : seen[1]], label[part])
            assert (found[~valid] == 255).all()


def test_edges_are_cut_only_where_enough_of_the_cell_lies_in_the_scene(batch):
    batch.draw("a", (16, 20))  # the third column has 4 of 8 pixels
    assert len(batch.cut("--min_valid", "0.5").splits) == 6
    dataset = batch.cut("--min_valid", "0.51", "--overwrite")
    assert len(dataset.splits) == 4
    assert dataset.skipped == dict.fromkeys(
        ["a_r000_c002", "a_r001_c002"], "less than 51% valid"
    )


def test_extract_needs_no_grid_either(batch):
    batch.draw("a", 16)
    files = [
        "--image",
        batch.data / "Image_a.tif",
        "--label",
        batch.data / "Label_a.tif",
    ]
    rest = ["--output", batch.out, "--patch_size", 8, "--save_metadata"]
    assert run("extract", *files, *rest) == 0
    assert list(Dataset(batch.out).splits) == [
        f"patch_r00{r}_c00{c}" for r in "01" for c in "01"
    ]


# --- cells and scenes that cannot be cut -----------------------------------------------------


@pytest.mark.parametrize("what", ["Image", "Label", "values"])
def test_a_cell_that_cannot_be_cut_stops_the_run_and_leaves_nothing(
    batch, capsys, what
):
    draw_spoilt(batch, what)
    name = "Image_a.tif" if what == "Image" else "Label_a.tif"
    assert name in batch.refusal(capsys)


@pytest.mark.parametrize("what", ["Image", "Label", "values"])
def test_cells_that_cannot_be_cut_are_listed_and_the_status_is_1(batch, capsys, what):
    draw_spoilt(batch, what)
    name = "Image_a.tif" if what == "Image" else "Label_a.tif"
    err = "\n".join(messages(capsys, *batch.words("--skip_errors"), status=1))
    dataset = Dataset(batch.out)
    lost = [f"a_r001_c00{column}" for column in range(3)]
    assert list(dataset.skipped) == lost
    assert len(dataset.splits) == 6
    assert all(name in reason for reason in dataset.skipped.values())
    assert ", ".join(lost) in err and name in err
    assert "skipped 3 of 9 cells" in err
    if what == "values":
        assert "300" in err


def test_a_scene_that_cannot_be_opened_is_listed_and_the_others_are_cut(batch, capsys):
    batch.draw("a", 16)
    batch.draw("b", 16, transform=at(100, 0))
    (batch.data / "Image_b.tif").write_bytes(b"no raster")
    assert "Image_b.tif" in batch.refusal(capsys)
    err = "\n".join(messages(capsys, *batch.words("--skip_errors"), status=1))
    dataset = Dataset(batch.out)
    assert len(dataset.splits) == 4
    (entry,) = dataset.skipped.items()
    assert entry[0] == str(batch.data / "Image_b.tif")
    assert "Cannot read" in entry[1] and "Cannot read" in err


def test_a_scene_with_other_bands_is_listed_and_the_others_are_cut(batch):
    for name, bands in (("a", 2), ("b", 3), ("c", 2)):
        batch.draw(name, 16, bands, transform=at(100 * bands, 0))
    assert run(*batch.words("--skip_errors")) == 1
    dataset = Dataset(batch.out)
    assert {name[0] for name in dataset.splits} == {"a", "c"}
    assert [Path(name).name for name in dataset.skipped] == ["Image_b.tif"]


def test_skipping_errors_is_no_error_where_there_is_none(batch):
    batch.draw("a", (16, 18))  # the last column is empty enough to be skipped
    dataset = batch.cut("--skip_errors")
    assert len(dataset.skipped) == 2


def test_a_wrong_option_is_no_error_of_a_scene(batch, capsys):
    for name in "ab":
        batch.draw(name, 16, transform=at(100 * ord(name), 0))
    grid = write_grid(batch.folder / "grid.geojson", tiles(2, 2))
    words = batch.words("--skip_errors", "--grid", grid, "--id_column", "nothing")
    assert "--id_column" in complaint(capsys, *words)


def test_errors_in_every_cell_are_an_error_of_the_run(batch, capsys):
    batch.draw("a", 16, label=np.full((16, 16), 300, "uint16"))
    assert "None of the 4 cells gives a patch" in batch.refusal(capsys, "--skip_errors")


def test_an_unreadable_block_of_a_warped_label_is_named(batch, capsys):
    image, label = noise(24)
    write(batch.data / "Image_a.tif", image)
    path = batch.data / "Label_a.tif"
    write(path, label, at(0.3, 0.3), compress="deflate", blockysize=8)
    spoil(path, 1)
    assert run(*batch.words()) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Cannot read") and "Label_a.tif" in line
    assert not batch.out.exists()


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stride", "0"], "--stride 0: expected 1 or more"),
        (["--workers", "0"], "--workers 0: expected 1 to 1024"),
        (["--stride", "4", "--grid", "g.shp"], "--stride with --grid g.shp"),
        (["--block_size", "100"], "expected --split_by block with it"),
        (["--split_by", "block", "--block_size", "0"], ": expected 0.001 or more"),
        (["--split_by", "block", "--block_size", "inf"], ": expected 0.001 or more"),
        (["--split_by", "block", "--block_size", "nan"], ": expected 0.001 or more"),
        (["--split_by", "rows"], "invalid choice: 'rows'"),
        (["--buffer", "-1"], ": expected 0 or more"),
        (["--buffer", "nan"], ": expected 0 or more"),
        (["--overwrite", "--resume"], "--overwrite and --resume: expected one"),
        (["--use_per_image_grid", "--grid", "g.shp"], "--use_per_image_grid"),
        (["--use_per_image_grid", "--stride", "4"], "--use_per_image_grid"),
        (
            ["--image_pattern", "Image.tif"],
            "--image_pattern Image.tif: expected one <id>",
        ),
        (
            ["--label_pattern", "<id><id>"],
            "--label_pattern <id><id>: expected one <id>",
        ),
        (["--grid_pattern", "*"], "--grid_pattern *: expected one <id>"),
    ],
)
def test_a_wrong_option_exits_with_status_2_and_writes_nothing(
    batch, capsys, words, expected
):
    batch.draw("a", 16)
    assert expected in complaint(capsys, *batch.words(*words))
    assert not batch.out.exists()


@pytest.mark.parametrize("missing", ["--data_dir", "--output"])
def test_a_missing_option_is_named(batch, capsys, missing):
    words = batch.words()
    place = words.index(missing)
    assert missing in complaint(capsys, *words[:place], *words[place + 2 :])


def test_batch_and_extract_have_their_settings_in_common():
    for words in (
        ["batch", "--data_dir", "d"],
        ["extract", "--image", "i", "--label", "l"],
    ):
        parsed = Patch_extraction.build_parser().parse_args([*words, "--output", "o"])
        config = settings_from(parsed.config_class, parsed)
        assert (config.grid, config.stride, config.block_size) == (None, None, None)
        assert (config.split_by, config.buffer) == ("random", 0)
        assert not (config.resume or config.overwrite or config.skip_errors)
    config = BatchConfig(data_dir="d", output="o")
    patterns = config.image_pattern, config.label_pattern, config.grid_pattern
    assert patterns == ("Image_<id>.*", "Label_<id>.tif", "Grid_<id>.*")
