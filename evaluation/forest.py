"""A random forest on single pixels and their surroundings: what a network is measured against.

A patch is an image (C, H, W), its valid pixels (H, W) and its labels (H, W); ``read`` gives one by
its number. Labels outside 0..K-1 are unlabelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.interruption import until_stopped
from common.machine import bounded_map
from model_training import confusion_matrix

if TYPE_CHECKING:
    from sklearn.ensemble import RandomForestClassifier

SIDE = 5  # pixels, of the surroundings
LEAF = 3  # pixels at least: smaller leaves need twice the memory and find nothing more
BLOCK = 2**24  # values of the pixels that are predicted at once
BAR = {"leave": False, "disable": None, "delay": 2}


def pixel_features(
    image: np.ndarray, valid: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """Bands of some pixels, and means of the bands over the valid pixels around them.

    Args:
        image: (C, H, W).
        valid: (H, W) bool.
        places: (M,) which pixels, as numbers in (H * W).

    Returns:
        (M, 2 C) float32; the means are over ``SIDE`` x ``SIDE`` pixels, of those inside the patch.
    """
    from scipy.ndimage import uniform_filter

    bands, most = len(image), np.finfo(np.float32).max / 2  # means are rounded
    share = uniform_filter(valid.astype(np.float32), SIDE, mode="constant")
    share = np.maximum(share.ravel()[places], 0.5 / SIDE**2)  # 0 at an invalid pixel
    values = np.empty((len(places), 2 * bands), np.float32)
    for band, plane in enumerate(image):
        plane = np.where(valid, plane, 0)
        if plane.dtype.kind == "f":
            plane = plane.clip(-most, most)
        plane = plane.astype(np.float32)
        values[:, band] = plane.ravel()[places]
        mean = uniform_filter(plane, SIDE, mode="constant").ravel()[places]
        values[:, bands + band] = mean / share
    return values


def balanced_draw(counts: np.ndarray, most: int) -> np.ndarray:
    """How many pixels to draw of each patch and class, at most so many in all.

    Classes have equal numbers; what one is too rare to give goes to the others. Each patch gives
    its share.

    Args:
        counts: (P, K) labelled pixels.
        most: Sum of what is drawn.

    Returns:
        (P, K), nowhere more than ``counts``.
    """
    totals = counts.sum(axis=0)
    drawn, left = np.zeros_like(totals), most
    for place, number in enumerate(np.argsort(totals, kind="stable")):
        drawn[number] = min(totals[number], left // (len(totals) - place))
        left -= drawn[number]
    ends = counts.cumsum(axis=0) * drawn // np.maximum(totals, 1)
    return np.diff(ends, axis=0, prepend=0)


class Pixels(NamedTuple):
    """Pixels to learn from."""

    values: np.ndarray  # (M, 2 C) float32, see ``pixel_features``
    labels: np.ndarray  # (M,) class ids
    weights: np.ndarray  # (M,) labelled pixels that one stands for


def draw_pixels(read: Callable, counts: np.ndarray, most: int, seed: int) -> Pixels:
    """Labelled pixels, drawn as ``balanced_draw`` says.

    Their weights make classes as frequent again as they are: without, the map has too much of the
    rare ones, and overall accuracy was 3 to 19 points lower.
    """
    rng, values, labels = np.random.default_rng(seed), [], []
    drawn = balanced_draw(counts, most)
    numbers = np.flatnonzero(drawn.any(axis=1))
    bar = tqdm(numbers, desc="pixels for the forest", unit="patch", **BAR)
    for number in until_stopped(bar):
        image, valid, mask = read(number)
        flat = mask.ravel()
        places = [
            rng.choice(np.flatnonzero(flat == label), count, replace=False)
            for label, count in enumerate(drawn[number])
        ]
        values.append(pixel_features(image, valid, np.concatenate(places)))
        labels.append(np.repeat(np.arange(counts.shape[1]), drawn[number]))
    chosen = np.concatenate(labels)
    weights = counts.sum(axis=0) / np.maximum(drawn.sum(axis=0), 1)
    return Pixels(np.concatenate(values), chosen, weights[chosen])


def fit_forest(
    pixels: Pixels, trees: int, seed: int, cores: int
) -> RandomForestClassifier:
    """A forest on pixels; the same for any number of cores."""
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(
        min_samples_leaf=LEAF, random_state=seed, n_jobs=cores, warm_start=True
    )
    with tqdm(total=trees, desc="forest", unit="tree", **BAR) as bar:
        for grown in until_stopped(range(0, trees, cores)):
            forest.n_estimators = min(grown + cores, trees)
            forest.fit(*pixels)
            bar.update(forest.n_estimators - grown)
    return forest


def predict_pixels(forest: RandomForestClassifier, features: np.ndarray) -> np.ndarray:
    """The classes of pixels (M, F), as ``forest.predict`` finds them, by this thread alone.

    That calls for threads of its own, which in threads that run side by side damage Python's warning
    filters for the whole process.
    """
    features = np.ascontiguousarray(features, np.float32)
    trees = forest.estimators_
    votes = sum(tree.predict_proba(features, check_input=False) for tree in trees)
    return forest.classes_[votes.argmax(axis=1)]


def count_patches(
    forest: RandomForestClassifier,
    read: Callable,
    patches: int,
    classes: int,
    cores: int,
) -> np.ndarray:
    """The confusion matrix of each patch, (P, K, K), from its labelled pixels."""

    def count(number: int) -> np.ndarray:
        image, valid, mask = read(number)
        flat = mask.ravel()
        known = np.flatnonzero((flat >= 0) & (flat < classes))
        total = np.zeros((classes, classes), np.int64)
        parts = math.ceil(len(known) * 2 * len(image) / BLOCK)
        for places in np.array_split(known, parts) if parts else ():
            guess = predict_pixels(forest, pixel_features(image, valid, places))
            both = torch.from_numpy(guess), torch.from_numpy(flat[places].astype(int))
            total += confusion_matrix(*both, classes).numpy()
        return total

    found = bounded_map(count, range(patches), cores, ahead=cores)
    with closing(found):
        bar = tqdm(found, desc="forest on patches", unit="patch", total=patches, **BAR)
        return np.stack(list(bar))
