"""The pictures of good and bad patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import SENTINEL, patch_everywhere

from common.colours import GREY, RED, class_colours
from common.patches import PatchPair, list_pairs, read_patch
from common.pictures import draw_panels
from evaluation.examples import Examples, draw_examples, patch_accuracy, worth_showing

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
    assert [name for name, _ in legend] == [f"class {k}" for k in range(classes)]
    titles = [panel["title"] for panel in panels]
    numbers = [7, 6, 5, 2, 1, 0]  # patches by their wrong rows
    assert titles[::4] == [f"patch_{number:03}" for number in numbers]
    assert titles[3::4] == [f"{n / 28:.1%} wrong (red)" for n in numbers]
    worst = panels[3]["picture"]
    assert (worst[:7] == RED).all() and (worst[7:28] == GREY).all()
    assert (worst[28:] == 255).all()  # unlabelled
    truth = panels[1]["picture"]
    assert (truth[28:] == 255).all() and (truth[:28] != 255).any(axis=-1).all()


def test_few_patches_are_drawn_once_each(tmp_path, make_dataset, monkeypatch):
    target = tmp_path / "examples.png"
    ((panels, _, title, _),) = pictures(target, make_dataset, monkeypatch, 2, 3)
    assert [panel["title"] for panel in panels[::4]] == ["patch_001", "patch_000"]
    assert "all patches" in title


def test_no_example_draws_nothing(tmp_path):
    draw_examples(tmp_path / "examples.png", Examples(), ["a", "b"], [GREY, RED])
    assert not list(tmp_path.iterdir())
