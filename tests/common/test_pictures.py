"""Maps in colour, stretches, panels with a legend."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from raster_helpers import (
    ramp,
)

from common.colours import class_colours
from common.pictures import (
    colour_map,
    draw_panels,
    save_figure,
    stretch,
)

pytestmark = pytest.mark.usefixtures("real_pictures")

# --- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
@pytest.mark.parametrize("num_classes", [1, 2, 6, 300])
def test_a_colour_map_shows_classes_in_their_colours_and_the_rest_white(
    dtype, num_classes
):
    labels = np.array([[0, 1, 5], [100, 255 if dtype == "uint8" else 999, 0]], dtype)
    if dtype != "uint8":
        labels[1, 2] = -1
    colours = class_colours([f"class {number}" for number in range(num_classes)])
    picture = colour_map(labels, colours)
    assert picture.shape == (2, 3, 3)
    assert picture.dtype == np.uint8
    for shown, label in zip(picture.reshape(-1, 3).tolist(), labels.flat):
        known = 0 <= label < num_classes
        assert tuple(shown) == (colours[label] if known else (255, 255, 255))


def test_stretch_runs_from_the_2nd_to_the_98th_percentile_of_valid_pixels():
    image = np.arange(10_000, dtype=np.float64).reshape(1, 100, 100)
    image = np.concatenate([image, -image, image * 1e4 + 7]).round()
    valid = np.ones((100, 100), bool)
    valid[:10] = False
    picture = stretch(image, valid)
    assert picture.shape == (100, 100, 3)
    assert picture.dtype == np.uint8
    assert (picture[:10] == 255).all()
    shown = picture[valid].astype(int)
    assert np.count_nonzero(shown == 0, axis=0) == pytest.approx(180, abs=50)
    np.testing.assert_allclose(np.median(shown, axis=0), 127, atol=1)
    assert (np.diff(shown[:, 0]) >= 0).all()
    assert (np.diff(shown[:, 1]) <= 0).all()
    assert shown.min(axis=0).tolist() == [0, 0, 0]
    assert shown.max(axis=0).tolist() == [255, 255, 255]


def test_stretch_shows_a_single_band_in_grey():
    picture = stretch(ramp(), np.ones((8, 8), bool))
    assert (picture == picture[..., :1]).all()
    assert np.unique(picture).size > 32


def test_stretch_of_nothing_valid_is_white_and_of_a_constant_is_even():
    nothing = stretch(ramp(3), np.zeros((8, 8), bool))
    assert (nothing == 255).all()
    even = stretch(np.full((1, 8, 8), 7), np.ones((8, 8), bool))
    assert np.unique(even).size == 1


def test_stretch_does_not_depend_on_the_unit_of_the_image():
    valid = np.ones((8, 8), bool)
    image = ramp(dtype="float64")
    expected = stretch(image, valid).astype(int)
    shown = stretch(image * 1e-9, valid).astype(int)
    np.testing.assert_allclose(shown, expected, atol=1)


def panel(title: str = "scene", **more) -> dict:
    return {"title": title, "picture": np.zeros((8, 8, 3), np.uint8), **more}


def test_panels_are_stored_as_a_png(tmp_path):
    import matplotlib.image

    target = tmp_path / "new" / "picture.png"
    legend = [("water", (0, 0, 255)), ("forest", (0, 128, 0))]
    save_figure(draw_panels([panel()], legend, "Title"), target)
    assert target.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(target)[..., :3]
    for colour in ((0, 0, 0), (0, 0, 1), (0, 128 / 255, 0)):  # picture and both keys
        assert np.isclose(pixels, colour, atol=0.01).all(axis=-1).any()


def test_panels_lie_in_rows_with_titles_legend_and_colour_bar():
    confidence = {
        "picture": 0.3 + np.eye(8) / 2,
        "limits": (0, 1),
        "title": "confidence",
    }
    legend = [("water", (0, 0, 255))]
    panels = [panel("image"), panel("map"), confidence]
    figure = draw_panels(panels, legend, "Title", columns=2)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["image", "map", "confidence", ""]  # the last is the colour bar
    assert figure.axes[2].images[0].get_clim() == (0, 1)
    assert figure.get_suptitle() == "Title"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["water"]
    image, right, below, bar = (axes.get_position() for axes in figure.axes)
    assert below.x0 == pytest.approx(image.x0) and right.x0 > image.x1
    assert below.y1 < image.y0 == pytest.approx(right.y0)
    assert below.x1 < bar.x0 < bar.x1 < right.x0  # beside its picture alone


@pytest.mark.parametrize("where", ["panel", "legend", "title"])
def test_names_with_dollar_signs_are_drawn_as_they_are(tmp_path, where):
    name = r"scene_$\x_{$"
    figure = draw_panels(
        [panel(name if where == "panel" else "scene")],
        [(name if where == "legend" else "water", (0, 0, 255))],
        name if where == "title" else "Title",
    )
    save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("panels", "classes"),
    [
        (3, 8),
        (2, 8),
        (3, 254),
    ],
)
def test_the_legend_lies_in_the_figure_and_leaves_room_for_the_panels(panels, classes):
    legend = [(f"land cover {number}", (0, 0, 255)) for number in range(classes)]
    figure = draw_panels([panel()] * panels, legend)
    figure.draw_without_rendering()
    box, paper = figure.legends[0].get_window_extent(), figure.bbox
    assert paper.x0 <= box.x0 and box.x1 <= paper.x1
    assert paper.y0 <= box.y0 and box.y1 <= paper.y1
    assert figure.axes[0].get_window_extent().width > 100


SHAPES = [(64, 64), (40, 400), (400, 40), (60, 120), (2, 500), (500, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3])
def test_panels_of_any_shape_fill_the_picture(shape, count):
    pictures = [np.zeros((*shape, 3), np.uint8)] * count
    panels = [{"title": "map", "picture": picture} for picture in pictures]
    figure = draw_panels(panels, [("water", (0, 0, 255))], "map.tif")
    boxes = [axes.get_position() for axes in figure.axes]
    width, height = figure.get_size_inches()
    for box in boxes:  # no empty stripes beside a picture in its axes
        drawn = box.width * width / (box.height * height)
        assert drawn == pytest.approx(shape[1] / shape[0], rel=1e-6)
    upright = len({round(box.x0, 6) for box in boxes}) == 1
    assert upright == (shape[1] > 1.5 * shape[0])
    longest = max(width, height)
    covered = max(box.x1 for box in boxes) - min(box.x0 for box in boxes)
    up = max(box.y1 for box in boxes) - min(box.y0 for box in boxes)
    assert max(covered * width, up * height) > 0.7 * longest
    assert longest < 32


def test_a_wide_panel_is_wide_and_a_tall_one_tall():
    def size(*shape):
        panels = [{"title": "map", "picture": np.zeros(shape)}] * 2
        return draw_panels(panels).get_size_inches()

    wide, tall, square = size(40, 400), size(400, 40), size(64, 64)
    assert wide[0] > 3 * wide[1] and tall[1] > 3 * tall[0]
    assert square[0] == pytest.approx(2 * square[1], rel=0.15)


def crops(count: int) -> list[str]:
    return [
        f"Temporary grassland of many years, flowers, {k}" * 2 for k in range(count)
    ]


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("names", [["background", "building"], crops(36)])
def test_legends_cover_no_panel_and_panels_keep_their_size(shape, names):
    panels = [{"title": "map", "picture": np.zeros((*shape, 3), np.uint8)}] * 3
    legend = [(name, (0, 0, 255)) for name in names]
    figure, bare = draw_panels(panels, legend, "Title"), draw_panels(panels)
    figure.draw_without_rendering()
    keys, paper = figure.legends[0].get_window_extent(), figure.bbox
    assert paper.x0 <= keys.x0 and keys.x1 <= paper.x1
    assert paper.y0 <= keys.y0 and keys.y1 <= paper.y1
    for axes, alone in zip(figure.axes, bare.axes):
        box, size = axes.get_window_extent(), alone.get_window_extent()
        assert box.width == pytest.approx(size.width)
        assert keys.y1 < box.y0 or keys.x0 > box.x1
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.replace("\n", " ") for text in shown] == names


def test_long_titles_stay_over_their_panels():
    name = "S2A_MSIL2A_20230601T101031_N0509_R022_T32TMS"
    panels = [{"title": name, "picture": np.zeros((64, 64))}] * 4
    figure = draw_panels(panels, title=name * 8, columns=4)
    figure.draw_without_rendering()
    ends = [axes.title.get_window_extent() for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in pairwise(ends))
    above = figure._suptitle.get_window_extent()
    assert 0 <= above.x0 and above.x1 <= figure.bbox.x1
    assert above.y0 > max(end.y1 for end in ends) and above.y1 <= figure.bbox.y1
