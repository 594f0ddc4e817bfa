"""The pictures of good and bad patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import SENTINEL, patch_everywhere

from common.colours import GREY, PALETTE, RED, class_colours, error_colours
from common.patches import PatchPair, list_pairs, read_patch
from common.pictures import draw_panels
from evaluation.examples import (
    Examples,
    draw_examples,
    patch_accuracy,
    worth_showing,
)
from evaluation.figures import error_map

pytestmark = pytest.mark.usefixtures("real_pictures")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_accuracy_of_a_patch_counts_labelled_pixels_alone():
    prediction, mask = np.array([[0, 1], [1, 1]]), np.array([[0, 0], [1, 255]])
    assert patch_accuracy(prediction, mask, 2) == pytest.approx(2 / 3)
    assert patch_accuracy(prediction, np.full((2, 2), 255), 2) is None


def test_patches_with_few_labels_are_no_examples():
    counts = np.array([[100, 0], [40, 50], [3, 0], [0, 0], [0, 60]])
    assert worth_showing(counts).tolist() == [True, True, False, False, True]
    assert not worth_showing(np.zeros((2, 2))).any()


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 40])
def test_examples_are_the_worst_and_the_best_each_once(count):
    values = np.random.default_rng(count).permutation(count) / 100
    examples = Examples(3)
    for value in values:
        examples.add(float(value), PatchPair(value, value), np.zeros((2, 2)))
    examples.add(None, None, None)
    ranked = sorted(values)
    expected = ranked if count <= 6 else ranked[:3] + ranked[-3:]
    assert [entry[0] for entry in examples.entries] == expected
    assert examples.seen == count


def test_examples_keep_copies_of_predictions():
    batch = np.zeros((4, 8, 8))
    examples = Examples()
    examples.add(0.5, None, batch[1])
    assert examples.entries[0][2].base is None


def pictures(target, make_dataset, monkeypatch, patches, classes):
    """The panels that ``draw_examples`` draws of as many patches, the first all right."""
    root = make_dataset(
        0, 0, patches, classes=classes, unlabelled_rows=4, descriptions=SENTINEL
    )
    examples, drawn = Examples(3), []
    for number, pair in enumerate(list_pairs(root, "test")):
        _, _, mask = read_patch(pair)
        prediction = np.where(mask == 255, 0, mask)
        prediction[:number] = (prediction[:number] + 1) % classes
        score = patch_accuracy(prediction, mask, classes)
        examples.add(score, pair, prediction)
    real = draw_panels

    def spy(panels, legend, title, columns):
        drawn.append((panels, legend, title, columns))
        return real(panels, legend, title, columns)

    patch_everywhere(monkeypatch, "common.pictures.draw_panels", spy)
    names = [f"class {k}" for k in range(classes)]
    draw_examples(target, examples, names, class_colours(names))
    return drawn


@pytest.mark.parametrize("classes", [2, 4])
def test_drawn_examples_show_right_wrong_and_unlabelled(
    tmp_path, make_dataset, monkeypatch, classes
):
    target = tmp_path / "examples.png"
    ((panels, legend, title, columns),) = pictures(
        target, make_dataset, monkeypatch, 8, classes
    )
    assert target.stat().st_size > 10_000
    assert columns == 4 and len(panels) == 24
    assert "3 worst" in title and "8 patches" in title
    kinds = ["right", "wrong"]
    if classes == 2:
        kinds[1:] = ["missed: class 1", "false alarm: class 1"]
    names = [f"class {k}" for k in range(classes)]
    assert [name for name, _ in legend] == names + kinds
    colours = dict(legend)
    assert len(set(colours.values())) == len(legend)
    titles = [panel["title"] for panel in panels]
    numbers = [7, 6, 5, 2, 1, 0]  # patches by their wrong rows
    assert titles[::4] == [f"patch_{number:03}" for number in numbers]
    assert titles[3::4] == [f"{n / 28:.1%} wrong" for n in numbers]
    worst = panels[3]["picture"]
    wrong = [colours[kind] for kind in kinds[1:]]
    assert set(map(tuple, worst[:7].reshape(-1, 3))) == set(wrong)
    assert (worst[7:28] == colours["right"]).all()
    assert (worst[28:] == 255).all()  # unlabelled
    truth = panels[1]["picture"]
    assert (truth[28:] == 255).all() and (truth[:28] != 255).any(axis=-1).all()


@pytest.mark.parametrize(
    ("names", "sought"),
    [
        (["background", "building"], 1),
        (["forest", "other"], 0),
        (["forest", "water"], 1),
    ],
)
def test_misses_and_false_alarms_of_two_classes_are_told_apart(names, sought):
    mask = np.array([[sought, sought, 1 - sought, 1 - sought, 255]])
    prediction = np.array([[sought, 1 - sought, sought, 1 - sought, sought]])
    picture, legend = error_map(prediction, mask, names, class_colours(names))
    right, missed, false_alarm = (colour for _, colour in legend)
    shown = [tuple(pixel) for pixel in picture[0].tolist()]
    assert shown == [right, missed, false_alarm, right, (255, 255, 255)]
    name = names[sought]
    assert [text for text, _ in legend[1:]] == [
        f"missed: {name}",
        f"false alarm: {name}",
    ]


@pytest.mark.parametrize(
    "classes",
    [
        [GREY, RED],
        [(150, 150, 150), (230, 0, 230)],  # what errors are usually drawn in
        [(255, 150, 0), (0, 150, 255)],
        PALETTE,
        class_colours([f"crop {number}" for number in range(254)]),
        error_colours([]),
    ],
)
def test_no_class_has_the_colour_of_an_error(classes):
    found = error_colours(classes)
    assert len({*classes, *found, (255, 255, 255)}) == len(classes) + 4
    assert len(set(found[0])) == 1  # what is right is grey
    if len(classes) < 4:  # clearly unlike each other, and unlike the classes
        known = [*map(np.array, [*classes, *found])]
        apart = [np.abs(a - b).max() for a in known[len(classes) :] for b in known]
        assert sorted(apart)[3] >= 60


def test_few_patches_are_drawn_once_each(tmp_path, make_dataset, monkeypatch):
    target = tmp_path / "examples.png"
    ((panels, _, title, _),) = pictures(target, make_dataset, monkeypatch, 2, 3)
    assert [panel["title"] for panel in panels[::4]] == ["patch_001", "patch_000"]
    assert "all patches" in title


def test_no_example_draws_nothing(tmp_path):
    draw_examples(tmp_path / "examples.png", Examples(), ["a", "b"], [GREY, RED])
    assert not list(tmp_path.iterdir())
