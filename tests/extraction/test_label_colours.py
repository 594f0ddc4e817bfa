"""The colours of classes, from an option or the label's colour table to the patches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rasterio
from batch_helpers import Batch
from rasterio.transform import from_origin
from site_helpers import LEFT, TRANSFORM, Site, classes, complaint, refusal, run, tiles

from common.colours import RED, complete_colours
from common.labels import class_codes_of, class_colours_of
from extraction.dataset import STAGING

BLUE, GREEN, SAND = (0, 0, 250), (0, 120, 10), (200, 180, 140)


def stored(site: Site) -> list | None:
    """The colours that all label patches hold."""
    found = []
    for patch in site.patches().values():
        with rasterio.open(patch.label_path) as file:
            found.append(class_colours_of(file))
    assert found and all(colours == found[0] for colours in found)
    return found[0]


def paint(label, table: dict) -> None:
    """Give a label raster a colour table."""
    with rasterio.open(label, "r+") as file:
        file.write_colormap(1, {k: (*colour, 255) for k, colour in table.items()})


# --- the option -------------------------------------------------------------------------------


def test_colours_of_the_option_are_stored_in_every_label(site):
    paint(site.label, {0: GREEN, 1: SAND, 2: BLUE})  # the option wins
    site.extract("--class_colors", "navy,#00780a,c8b48c", "--save_metadata")
    assert stored(site) == [(0, 0, 128), GREEN, SAND]
    assert site.metadata()["class_colors"] == ["#000080", "#00780a", "#c8b48c"]


def test_a_legend_counts_by_the_values_of_the_label_and_reports_what_it_lacks(
    site, capsys
):
    legend = site.folder / "codes.clr"
    legend.write_text("10 0 0 250\n20 0 120 10\n30 200 180 140\n")
    site.draw_label((classes() + 1) * 10)
    site.extract("--label_values", "30,10,20", "--class_colors", legend)
    assert stored(site) == [SAND, BLUE, GREEN]
    (patch, *_) = site.patches().values()
    with rasterio.open(patch.label_path) as file:
        assert class_codes_of(file) == [30, 10, 20]
    legend.write_text("10 0 0 250\n30 200 180 140\n")
    capsys.readouterr()
    site.extract("--label_values", "30,10,20", "--class_colors", legend, "--overwrite")
    assert stored(site) == [SAND, BLUE, None]
    line = f"{legend} has no colour for 20: taken from the palette"
    assert line in capsys.readouterr().err


def test_texts_of_polygons_have_colours_of_a_vector_style(site):
    style = site.folder / "kinds.qml"
    style.write_text(
        '<qgis><renderer-v2 type="categorizedSymbol"><categories>'
        '<category symbol="0" value="wood"/></categories><symbols><symbol name="0"><layer>'
        '<Option><Option name="color" value="0,120,10,255"/></Option></layer></symbol></symbols>'
        "</renderer-v2></qgis>"
    )
    site.draw_label_shapes([LEFT, *tiles()[-1:]], kind=["wood", "lake"])
    site.extract("--label_column", "kind", "--class_colors", style)
    assert stored(site) == [None, GREEN]  # lake, wood


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--label_values", "0,1", "--class_colors", "red"], "2 colours, one for each"),
        (["--class_names", "a,b,c", "--class_colors", "red,lime"], "3 colours"),
        (["--class_colors", "red,blurple,lime"], "Unknown colour"),
        (["--class_colors", "red,lime,ff0000"], "red and ff0000 are the same colour"),
        (["--class_colors", "none.qml"], "there is no such file"),
    ],
)
def test_wrong_colours_are_a_wrong_command_line(site, capsys, words, reason):
    assert reason in complaint(capsys, *site.words(*words))
    assert not site.out.exists()


def test_polygons_are_two_classes_with_two_colours(site, capsys):
    site.draw_label_shapes([LEFT])
    words = site.words("--class_colors", "red,lime,blue")
    assert "expected 2 colours" in complaint(capsys, *words)


def test_fewer_colours_than_classes_that_occur_are_refused(site, capsys):
    line = refusal(capsys, site, "--class_colors", "red,lime")
    assert "--class_colors colours 2 classes, but" in line and "holds class 2" in line


def test_a_resumed_extraction_keeps_its_colours(site, capsys, monkeypatch):
    words = site.words("--class_colors", "red,lime,blue")
    with monkeypatch.context() as patch:
        patch.setattr("extraction.dataset.assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*words)
    stopped = json.loads((site.out / STAGING / "settings.json").read_text())
    assert stopped["class_colors"] == "red,lime,blue"
    words[-1] = "red,lime,navy"
    assert run(*words, "--resume") == 1
    assert "another class_colors" in capsys.readouterr().err
    words[-1] = "red,lime,blue"
    assert run(*words, "--resume") == 0
    assert stored(site) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


# --- the label's colour table -----------------------------------------------------------------


def test_the_colour_table_of_the_label_goes_with_the_patches(site):
    paint(site.label, {0: BLUE, 1: SAND, 2: GREEN})
    site.extract()
    assert stored(site) == [BLUE, SAND, GREEN]
    site.extract("--label_values", "2,0", "--overwrite")
    assert stored(site) == [GREEN, BLUE]


def test_a_label_on_other_pixels_keeps_its_colours_and_nodata_that_is_a_class_its_own(
    site,
):
    other = from_origin(TRANSFORM.c - 35, TRANSFORM.f + 35, 15, 15)
    label = classes(height=40, width=40)
    site.draw_label(label, transform=other, nodata=0)
    paint(site.label, {0: BLUE, 1: SAND, 2: GREEN})
    site.extract("--label_values", "2,0,1")
    assert stored(site) == [GREEN, BLUE, SAND]


@pytest.mark.parametrize(
    "table",
    [
        {},
        {number: (0, 0, 0) for number in range(256)},
        {number: (number, number, number) for number in range(256)},
        {0: (0, 0, 0), 1: (255, 255, 255), 7: GREEN},  # 7 is no class
    ],
)
def test_no_table_a_black_one_and_a_grey_ramp_say_nothing(site, table, capsys):
    site.draw_label(classes(2))
    if table:
        paint(site.label, table)
    site.extract("--class_names", "no,yes", "--save_metadata")
    assert stored(site) is None and site.metadata()["class_colors"] is None
    assert "colour table" not in capsys.readouterr().err


def test_a_table_with_one_colour_for_two_classes_is_not_used_and_that_is_reported(
    site, capsys
):
    paint(site.label, {0: BLUE, 1: SAND, 2: SAND})
    site.extract("--class_names", "a,b,c")
    assert stored(site) is None
    assert (
        "label.tif has one colour for several classes: not used"
        in capsys.readouterr().err
    )


def test_of_labels_with_different_tables_the_first_counts_and_that_is_reported(
    tmp_path, capsys
):
    batch = Batch(tmp_path)
    for name, table in (
        ("1", {}),
        ("2", {0: BLUE, 1: SAND, 2: GREEN}),
        ("3", {0: RED}),
    ):
        batch.draw(name)
        if table:
            paint(batch.data / f"Label_{name}.tif", table)
    dataset = batch.cut()
    assert dataset.metadata["class_colors"] == ["#0000fa", "#c8b48c", "#00780a"]
    for file in dataset.root.glob("*/labels/*.tif"):
        with rasterio.open(file) as label:
            assert class_colours_of(label) == [BLUE, SAND, GREEN]
    err = capsys.readouterr().err
    (line,) = [text for text in err.splitlines() if "colour table" in text]
    assert "Label_3.tif differs from that of" in line and "Label_2.tif, which" in line


# --- pictures ---------------------------------------------------------------------------------


def test_a_picture_of_a_patch_shows_its_colours_and_the_palette_for_the_rest(
    site, monkeypatch
):
    drawn = []
    legend = site.folder / "two.clr"
    legend.write_text("0 0 0 250\n2 200 180 140\n")
    site.extract("--class_colors", legend)

    def spy(panels, legend, title):
        drawn.append((panels[1]["picture"], legend))

    monkeypatch.setattr("extraction.report.draw_panels", spy)
    monkeypatch.setattr("extraction.report.save_figure", lambda *_: None)
    assert run("visualize", "--output", site.out) == 0
    ((picture, legend),) = drawn
    names = [f"class {number}" for number in range(3)]
    expected = complete_colours([BLUE, None, SAND], names)
    assert legend == list(zip(names, expected))
    assert {tuple(c) for c in np.unique(picture.reshape(-1, 3), axis=0)} == {*expected}
