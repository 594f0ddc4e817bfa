"""``info`` and ``visualize``: the report on a dataset, and pictures of patches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from helpers import SENTINEL, patch_everywhere
from rasterio.enums import ColorInterp
from shapely import box
from site_helpers import (
    SIZE,
    classes,
    complaint,
    pixels,
    run,
    scene,
    tiles,
)

from common import SPLITS, pictures
from common.colours import class_colours
from common.labels import class_name_tags
from common.pictures import stretch
from extraction.report import (
    SplitSummary,
    absent_lines,
    names_and_codes,
    share_cell,
)

# --- info ------------------------------------------------------------------------------------


def counts_by_hand(root: Path, split: str, unlabelled=255) -> tuple[int, int, list]:
    """Patches, pixels and pixels per class of a split."""
    labels = [pixels(path) for path in sorted((root / split / "labels").iterdir())]
    every = np.concatenate([label.ravel() for label in labels])
    return len(labels), every.size, np.bincount(every[every != unlabelled]).tolist()


def test_the_report_has_the_codes_of_classes_beside_names_that_are_others(site, capsys):
    site.draw_label(classes(3) * 10 + 5)
    site.draw_image(scene())
    site.draw_grid(tiles(2, 2))
    site.extract("--label_values", "5=sea,15,25=ice")
    capsys.readouterr()
    assert run("info", "--output", site.out) == 0
    table = capsys.readouterr().out.split("\n\n")[1]
    assert "sea (5) " in table and "ice (25) " in table and "15 (15)" not in table
    report = json.loads((site.out / "dataset_info.json").read_text())
    assert report["class_names"] == ["sea", "15", "ice"]
    assert report["class_codes"] == [5, 15, 25]
    assert names_and_codes(["a", "b"], [0, 1]) == ["a", "b"]
    assert names_and_codes(None, [4, 5]) is None


def test_the_report_equals_an_independent_count(site, capsys):
    label = classes(4)
    label[:9] = 255
    site.draw_label(label)
    site.draw_image(scene(), nodata=0)
    site.draw_grid(tiles(6, 6, side=8))
    site.extract("--class_names", "a,b,c,d", size=8)
    capsys.readouterr()
    assert run("info", "--output", site.out) == 0
    out, err = capsys.readouterr()
    report = json.loads((site.out / "dataset_info.json").read_text())
    assert report["class_names"] == ["a", "b", "c", "d"]
    assert list(report["splits"]) == list(SPLITS)
    kinds, table = out.split("\n\n")[:2]
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    for column, (split, entry) in enumerate(report["splits"].items()):
        patches, size, counts = counts_by_hand(site.out / "Patch", split)
        assert entry["patches"] == patches > 0
        assert entry["pixels"] == size
        assert entry["class_pixels"] == counts
        assert entry["unlabelled_share"] == pytest.approx(1 - sum(counts) / size)
        kind = {"bands": 3, "height": 8, "width": 8, "dtype": "uint16"}
        assert entry["kinds"] == [kind | {"patches": patches}]
        for name, count in zip("abcd", counts):
            assert rows[name][column] == f"{count / sum(counts):.1%}"
        assert f"{patches} patches of 8 x 8 pixels, 3 bands, uint16" in kinds
    assert sum(e["patches"] for e in report["splits"].values()) == 30  # 6 without label
    assert err == ""


def test_the_report_works_on_splits_that_lie_directly_in_the_root(make_dataset):
    root = make_dataset(4, 2, 0, bands=2, classes=3, folder="", unlabelled_rows=5)
    assert run("info", "--output", root) == 0
    report = json.loads((root / "dataset_info.json").read_text())
    for split in ("train", "validation"):
        entry = report["splits"][split]
        found = entry["patches"], entry["pixels"], entry["class_pixels"]
        assert found == tuple(counts_by_hand(root, split))
        assert entry["unlabelled_share"] == pytest.approx(5 / 32)
    assert report["splits"]["test"]["patches"] == 0
    assert report["class_names"] is None


def test_declared_nodata_of_a_label_counts_as_unlabelled_in_the_report(make_dataset):
    root = make_dataset(2, 1, 1, label_nodata=9, unlabelled_rows=8)
    assert run("info", "--output", root) == 0
    entry = json.loads((root / "dataset_info.json").read_text())["splits"]["train"]
    assert entry["unlabelled_share"] == pytest.approx(8 / 32)
    assert len(entry["class_pixels"]) == 2


def test_patches_of_several_kinds_are_told_apart_in_the_report(make_dataset, capsys):
    root = make_dataset(3, 1, 0, bands=2, size=32)
    more = make_dataset(2, 0, 0, bands=2, size=(16, 24), dtype="float32")
    for path in more.rglob("*.tif"):
        kind = path.parent.name
        path.rename(root / "Patch" / "train" / kind / f"other_{path.name}")
    assert run("info", "--output", root) == 0
    kinds = json.loads((root / "dataset_info.json").read_text())["splits"]["train"]
    assert [(k["patches"], k["height"], k["width"]) for k in kinds["kinds"]] == [
        (3, 32, 32),
        (2, 16, 24),
    ]
    assert "2 patches of 16 x 24 pixels, 2 bands, float32" in capsys.readouterr().out


def test_a_dataset_without_any_label_is_reported(make_dataset, capsys):
    root = make_dataset(2, 1, 0, unlabelled_rows=32)
    assert run("info", "--output", root) == 0
    assert "100.0%" in capsys.readouterr().out


@pytest.mark.fault(59)
def test_classes_that_a_split_lacks_are_said_at_extraction_and_by_info(site, capsys):
    label = np.full((SIZE, SIZE), 255, "uint8")
    label[:, 0] = 1
    label[1, 1:] = 0
    label[40] = 2  # in the last row of cells alone
    site.draw_label(label)
    site.draw_grid(tiles(1, 3))
    words = ("--train_ratio", 0.34, "--val_ratio", 0.33, "--test_ratio", 0.33)
    site.extract(*words, "--class_names", "a,b,c,d")
    err = capsys.readouterr().err.splitlines()
    assert run("info", "--output", site.out) == 0
    out = capsys.readouterr().out.splitlines()
    for split, what in (
        ("train", "training pixel ({}): the model cannot learn to map it"),
        ("validation", "validation pixel ({}): the best epoch is chosen without it"),
        (
            "test",
            "test pixel ({}): mapped there all the same, it counts as 0 in the means",
        ),
    ):
        counts = [*counts_by_hand(site.out / "Patch", split)[2], 0, 0, 0]
        absent = [name for name, count in zip("abcd", counts) if not count]
        assert "d" in absent
        line = f"{len(absent)} of 4 classes without a {what.format(', '.join(absent))}"
        assert [err.count(line), out.count(line)] == [1, 1]
    assert any(row.split() == ["d", "-", "-", "-"] for row in out)


@pytest.mark.fault(59)
def test_classes_without_names_count_where_they_occur_at_all():
    summaries = {
        "train": SplitSummary(1, 9, (0, 0, 9)),
        "validation": SplitSummary(),
        "test": SplitSummary(1, 9, (0, 3)),
    }
    assert absent_lines(summaries, None) == [
        "1 of 2 classes without a training pixel (class 1): the model cannot learn to map it",
        "1 of 2 classes without a test pixel (class 2): "
        + "mapped there all the same, it counts as 0 in the means",
    ]


@pytest.mark.fault(59)
def test_none_and_little_are_not_a_share_of_zero():
    texts = [share_cell(share) for share in (0, 1e-9, 0.0005, 0.25, 1)]
    assert texts == ["-", "<0.1%", "0.1%", "25.0%", "100.0%"]


def test_class_255_of_many_is_counted_in_the_report(site):
    label = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 300
    site.draw_label(label.astype("uint16"))
    site.extract("--label_values", ",".join(map(str, range(300))))
    assert run("info", "--output", site.out) == 0
    report = json.loads((site.out / "dataset_info.json").read_text())
    counts = counts_by_hand(site.out / "Patch", "train", 65535)[2]
    assert counts[255] > 0
    assert report["splits"]["train"]["class_pixels"] == counts


def test_a_cell_whose_labels_vanish_in_resizing_gives_no_patch(site):
    label = np.full((SIZE, SIZE), 255, "uint8")
    label[0, 0] = 1  # among 4 pixels, the nearest to the centre is another
    label[16:] = classes()[16:]
    site.draw_label(label)
    site.draw_grid([box(0, 0, 16, 16), box(16, 16, 32, 32)])
    assert list(site.extract(size=8)) == ["patch_002"]


def test_a_folder_that_holds_no_dataset_is_refused(tmp_path, capsys):
    for folder, expected in (
        (tmp_path, "No images found in"),
        (tmp_path / "no", f"No folder {tmp_path / 'no'}"),
    ):
        for command in ("info", "visualize"):
            assert run(command, "--output", folder) == 1
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_an_image_without_its_label_is_refused_by_name(make_dataset, capsys):
    root = make_dataset(2, 1, 0)
    (root / "Patch/train/labels/patch_001.tif").unlink()
    assert run("info", "--output", root) == 1
    assert "patch_001.tif has no label" in capsys.readouterr().err
    assert not (root / "dataset_info.json").exists()


def test_a_patch_that_is_cut_off_is_refused_by_name(make_dataset, capsys):
    root = make_dataset(2, 1, 0)
    path = root / "Patch/train/images/patch_001.tif"
    path.write_bytes(path.read_bytes()[:600])
    assert run("info", "--output", root) == 1
    assert str(path) in capsys.readouterr().err.splitlines()[-1]
    assert not (root / "dataset_info.json").exists()


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_patch_that_is_cut_off_is_refused_in_one_line(make_dataset, capsys, kind):
    root = make_dataset(2, 1, 0)
    path = root / "Patch/train" / kind / "patch_001.tif"
    path.write_bytes(path.read_bytes()[:600])
    assert run("info", "--output", root) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


# --- visualize -------------------------------------------------------------------------------


def drawn(root: Path, *words, capsys) -> Path:
    """The PNG whose path is printed."""
    capsys.readouterr()
    assert run("visualize", "--output", root, *words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (path,) = out.splitlines()
    return Path(path)


@pytest.mark.usefixtures("real_pictures")
@pytest.mark.parametrize("bands", [1, 3, 10])
def test_a_patch_of_any_number_of_bands_is_drawn(make_dataset, capsys, bands):
    root = make_dataset(3, 1, 0, bands=bands, classes=3, unlabelled_rows=4)
    path = drawn(root, capsys=capsys)
    assert path == root / "sample_train_patch_000.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[1] > 2 * picture.shape[0]  # three panels side by side
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


def test_split_and_index_choose_the_patch(make_dataset, capsys):
    root = make_dataset(3, 2, 1, folder="")
    for words, name in (
        (["--split", "validation", "--sample_index", 1], "validation_patch_004"),
        (["--split", "test"], "test_patch_005"),
        (["--sample_index", 2], "train_patch_002"),
    ):
        path = drawn(root, *words, capsys=capsys)
        assert path == root / f"sample_{name}.png"
        assert path.is_file()


@pytest.mark.parametrize("index", [-1, 3])
def test_a_sample_index_beyond_the_split_exits_with_status_2(
    make_dataset, capsys, index
):
    root = make_dataset(3, 1, 0)
    line = complaint(capsys, "visualize", "--output", root, "--sample_index", index)
    assert f"--sample_index {index}: expected 0 to 2" in line
    assert list(root.glob("*.png")) == []


def test_an_empty_split_is_refused(make_dataset, capsys):
    root = make_dataset(2, 1, 0)
    assert run("visualize", "--output", root, "--split", "test") == 1
    assert "No images found in" in capsys.readouterr().err


def test_a_label_of_codes_is_refused_by_its_largest(make_dataset, capsys):
    root = make_dataset(1, 1, 0)
    (label,) = root.rglob("train/labels/*.tif")
    with rasterio.open(label) as file:
        profile = file.profile | {"dtype": "int32", "nodata": None}
        codes = file.read().astype("int32") + 70_000
    with rasterio.open(label, "w", **profile) as file:
        file.write(codes)
    capsys.readouterr()
    assert run("visualize", "--output", root) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{label.name} holds 70" in line and "--label_values" in line


@pytest.fixture
def shown(monkeypatch) -> dict:
    """What would be drawn."""
    kept = {}

    draw = pictures.draw_panels

    def draw_panels(panels, legend, title):
        kept.update({panel["title"]: panel["picture"] for panel in panels})
        kept.update(legend=list(legend), title=title)
        return draw(panels, legend, title)

    patch_everywhere(monkeypatch, "common.pictures.draw_panels", draw_panels)
    return kept


def test_the_picture_shows_true_colour_the_classes_and_both(make_dataset, shown):
    root = make_dataset(
        1,
        1,
        0,
        classes=3,
        nodata=0,
        invalid_rows=3,
        unlabelled_rows=4,
        descriptions=SENTINEL,
        tags=class_name_tags(["water", "trees", "town"]),
    )
    assert run("visualize", "--output", root) == 0
    image, label = (
        pixels(root / "Patch/train" / kind / "patch_000.tif")
        for kind in ("images", "labels")
    )
    label = np.where(image[0] == 0, 255, label[0])
    picture = stretch(image[[2, 1, 0]], image[0] != 0)
    assert np.array_equal(shown["image (bands 3, 2, 1)"], picture)
    names = ["water", "trees", "town"]
    of_classes = class_colours(names)
    colours = np.array([*of_classes, (255, 255, 255)])
    expected = colours[np.where(label == 255, 3, label)]
    assert np.array_equal(shown["label"], expected)
    unlabelled = label == 255
    assert np.array_equal(shown["overlay"][unlabelled], picture[unlabelled])
    mixed = 0.55 * picture + 0.45 * expected
    assert np.abs(shown["overlay"] - mixed)[~unlabelled].max() <= 1
    assert shown["legend"] == list(zip(names, of_classes))
    assert shown["title"] == "train 0: patch_000"


def test_the_legend_lists_the_classes_that_are_there(site, shown):
    site.draw_label(np.where(classes(2) == 0, 1, 4).astype("uint8"))
    site.extract()
    assert run("visualize", "--output", site.out) == 0
    colours = class_colours([f"class {number}" for number in range(5)])
    assert shown["legend"] == [("class 1", colours[1]), ("class 4", colours[4])]


def test_show_without_a_display_is_refused_after_the_picture_is_stored(
    make_dataset, capsys, monkeypatch
):
    import matplotlib.pyplot

    monkeypatch.setattr(matplotlib.pyplot, "get_backend", lambda: "agg")
    root = make_dataset(1, 1, 0)
    assert run("visualize", "--output", root, "--show") == 1
    out, err = capsys.readouterr()
    assert Path(out.strip()).is_file()
    assert "No display for --show" in err


def test_show_opens_a_window_where_there_is_a_display(make_dataset, monkeypatch):
    import matplotlib.pyplot

    opened = []
    monkeypatch.setattr(matplotlib.pyplot, "get_backend", lambda: "TkAgg")
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: opened.append(True))
    assert run("visualize", "--output", make_dataset(1, 1, 0), "--show") == 0
    assert opened == [True]
    matplotlib.pyplot.close("all")


def test_a_patch_with_an_alpha_band_is_drawn(make_dataset, real_pictures):
    root = make_dataset(1, 1, 0, bands=3, dtype="uint8")
    path = root / "Patch/train/images/patch_000.tif"
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha]
    assert run("visualize", "--output", root) == 0
