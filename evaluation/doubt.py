"""How far a model contradicts the labels of patches, and where."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.ground import pixel_areas
from common.patches import PatchPair
from common.polygons import outlines, straighten
from common.rasters import open_raster
from common.sieve import label_strip
from model_training import class_probabilities, confusion_matrix, predict_classes

CONFIDENT = 0.8  # calibrated probability of another class: the label is contradicted
SHOWN = 6  # patches of the picture


class PatchRecord(NamedTuple):
    """What a model finds in a labelled patch."""

    matrix: np.ndarray  # (K, K) int64, rows are the labels
    loss: (
        float | None
    )  # mean of -log of the label's calibrated probability; None unlabelled
    contradicted: float | None  # share of the labelled pixels


class Contradiction(NamedTuple):
    """A connected area whose label a model confidently contradicts."""

    pair: PatchPair
    outline: object  # shapely polygon in the patch's CRS
    given: int
    predicted: int
    confidence: float  # mean probability of the predicted class
    square_metres: float | None


@dataclass
class DoubtCollector:
    """Collects what a model finds in patches while it is evaluated on them, in their order.

    Args:
        pairs: The patches.
        classes: How many classes labels can hold.
        temperature: What logits are divided by.
        areas: Whether to collect the outlines of contradicted areas too.
    """

    pairs: Sequence[PatchPair]
    classes: int
    temperature: float = 1.0
    areas: bool = False
    records: list[PatchRecord] = field(default_factory=list)
    found: list[Contradiction] = field(default_factory=list)
    # (-doubt, place in pairs, prediction) of the most doubtful patches, the first of them first
    worst: list[tuple[float, int, np.ndarray]] = field(default_factory=list)

    def __call__(self, logits: Tensor, masks: Tensor) -> None:
        """Add a batch: logits (N, K, H, W), masks (N, H, W), on any device."""
        likely = class_probabilities(logits.float() / self.temperature)
        if likely.shape[1] == 1:
            likely = torch.cat([1 - likely, likely], dim=1)
        labelled = (masks >= 0) & (masks < self.classes)
        given = masks.where(labelled, 0)[:, None]
        own = likely.gather(1, given)
        best, other = likely.scatter(1, given, -1.0).max(dim=1)
        against = labelled & (best >= CONFIDENT)
        losses = -own[:, 0].clamp_min(1e-12).log()
        guesses = predict_classes(logits)
        for n, guess in enumerate(guesses):
            number = len(self.records)
            matrix = confusion_matrix(guess, masks[n], self.classes).cpu().numpy()
            pixels = int(labelled[n].sum())
            loss = float(losses[n][labelled[n]].mean()) if pixels else None
            share = float(against[n].sum()) / pixels if pixels else None
            self.records.append(PatchRecord(matrix, loss, share))
            if pixels:
                self._keep(doubt_of(self.records[-1]), number, guess)
            if self.areas and share:
                parts = (masks[n], other[n], best[n], against[n])
                arrays = [part.cpu().numpy() for part in parts]
                self.found += contradictions(self.pairs[number], self.classes, *arrays)

    def _keep(self, doubt: float, number: int, guess: Tensor) -> None:
        place = bisect.bisect([entry[0] for entry in self.worst], -doubt)
        if place < SHOWN:
            entry = -doubt, number, guess.cpu().numpy().astype(np.int32)
            self.worst.insert(place, entry)
            del self.worst[SHOWN:]


def doubt_of(record: PatchRecord) -> float | None:
    """How doubtful the labels of a patch are, by a model that did not train on it.

    None without labels.
    """
    return record.loss


def contradictions(
    pair: PatchPair,
    classes: int,
    mask: np.ndarray,
    other: np.ndarray,
    confidence: np.ndarray,
    against: np.ndarray,
) -> list[Contradiction]:
    """The connected areas of one given and one predicted class that a model contradicts.

    Args:
        pair: The patch.
        classes: How many there are.
        mask: (H, W) given classes.
        other: (H, W) the most likely other class.
        confidence: (H, W) its probability.
        against: (H, W) bool, where the label is contradicted.
    """
    import shapely
    from scipy.ndimage import mean

    kinds = np.where(against, mask * classes + other, -1).astype(np.int32)
    with open_raster(pair.image) as file:
        rows, transform = pixel_areas(file), file.transform
    unknown = np.full(len(mask), np.nan)
    ids, areas = label_strip(kinds, 0, unknown if rows is None else rows)
    chosen = np.flatnonzero(areas.classes >= 0)
    sure = mean(confidence, ids, chosen)
    shapes = dict(outlines(ids, against, 0))
    a, b, c, d, e, f = transform[:6]
    matrix, origin = np.array([[a, d], [b, e]]), (c, f)
    polygons = straighten([shapes[number] for number in chosen])
    polygons = shapely.transform(polygons, lambda xy: xy @ matrix + origin)
    return [
        Contradiction(
            pair,
            polygon,
            *(int(part) for part in divmod(areas.classes[number], classes)),
            float(value),
            None if rows is None else float(areas.extent[number]),
        )
        for number, polygon, value in zip(chosen, polygons, sure)
    ]
