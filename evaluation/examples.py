"""The worst and the best patches of a test, as a picture."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import UNLABELLED
from common.colours import Colour
from common.patches import PatchPair
from common.pictures import (
    colour_map,
    draw_panels,
    read_patch_picture,
    save_figure,
)
from common.text import shorten
from evaluation.figures import error_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def patch_accuracy(
    prediction: np.ndarray, mask: np.ndarray, num_classes: int
) -> float | None:
    """The share of a patch's labelled pixels that are right; None without any.

    What examples are ranked by, since it is what their error maps show. A mean of IoU over the
    patch's classes would call those the worst where a class has a handful of pixels.
    """
    labelled = (mask >= 0) & (mask < num_classes)
    return float((prediction == mask)[labelled].mean()) if labelled.any() else None


def worth_showing(counts: np.ndarray) -> np.ndarray:
    """Patches with at least half the labelled pixels of the median patch, (patches,) bool.

    All others would be the best and the worst by the luck of a few pixels.

    Args:
        counts: (patches, classes) labelled pixels.
    """
    labelled = counts.sum(axis=1)
    usual = np.median(labelled[labelled > 0]) if labelled.any() else 0
    return (labelled > 0) & (labelled >= usual / 2)


class Examples:
    """The worst and the best of all patches seen, with their predictions."""

    def __init__(self, each: int = 3):
        self.each = each
        self.seen = 0
        self.entries = []  # (score, PatchPair, prediction), from worst to best

    def add(self, score: float | None, pair: PatchPair, prediction) -> None:
        """Keep a prediction (H, W) if it is among them; a score of None is left out."""
        if score is None:
            return
        self.seen += 1
        place = bisect.bisect([entry[0] for entry in self.entries], score)
        full = len(self.entries) == 2 * self.each
        if full and place == self.each:
            return  # in the middle
        # a copy, since a part of a batch would keep the whole of it
        self.entries.insert(place, (score, pair, np.array(prediction)))
        if full:
            del self.entries[self.each]


def draw_examples(
    target: Path,
    examples: Examples,
    names: Sequence[str],
    colours: Sequence[Colour],
    ignore_index: int = UNLABELLED,
    source: str = "test",
) -> None:
    """Draw image, truth, prediction and errors of the worst and the best patches, a row each.

    Nothing is drawn where there is no example.

    Args:
        target: The PNG to write.
        examples: What to draw, from worst to best.
        names: K class names.
        colours: Those of the classes.
        ignore_index: Label value of unlabelled pixels, which are white.
        source: Where the patches are from.
    """
    each, seen = examples.each, examples.seen
    title = f"{source}: the {each} worst (above) and the {each} best of {seen} patches"
    if seen <= 2 * each:
        title = f"{source}: all patches, from the worst to the best"
    rows = [(f"{1 - s:.1%} wrong", pair, guess) for s, pair, guess in examples.entries]
    figure = draw_rows(rows, "truth", names, colours, ignore_index, title)
    if figure is not None:
        save_figure(figure, target)


def draw_rows(
    rows: Sequence[tuple[str, PatchPair, np.ndarray]],
    label: str,
    names: Sequence[str],
    colours: Sequence[Colour],
    ignore_index: int,
    title: str,
) -> Figure | None:
    """Draw patches with their predictions (H, W), a row each; None without any.

    Args:
        rows: Title of the errors, patch, prediction.
        label: What the labels are called.
        names: K class names.
        colours: Those of the classes.
        ignore_index: Label value of unlabelled pixels, which are white.
        title: Above all.
    """
    panels, present, kinds = [], set(), []
    for errors_title, pair, guess in rows:
        picture, valid, mask, _ = read_patch_picture(pair, ignore_index)
        labelled = (mask >= 0) & (mask < len(names))
        prediction = np.where(valid, guess, -1)
        errors, kinds = error_map(prediction, mask, names, colours)
        present |= {*np.unique(mask[labelled]), *np.unique(prediction[valid])}
        panels += [
            {"title": shorten(pair.name), "picture": picture},
            {"title": label, "picture": colour_map(mask, colours)},
            {"title": "prediction", "picture": colour_map(prediction, colours)},
            {"title": errors_title, "picture": errors},
        ]
    if not panels:
        return None
    legend = [(names[k], colours[k]) for k in sorted(present)] + kinds
    return draw_panels(panels, legend, title, columns=4)
