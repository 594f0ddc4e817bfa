"""Whether boundaries of classes lie where they should, within a tolerance."""

from __future__ import annotations

import math

import cv2
import numpy as np

from common.masks import grown

DILATED = 5  # pixels up to which a dilation is faster than distances, at 2 a tenth of their time


def class_boundary(inside: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Pixels of a class beside a known pixel of another one, above, below, left or right.

    The edge of the array, and of what is known, is no boundary: nobody says what lies beyond.
    """
    other = (known & ~inside).view(np.uint8)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return inside & cv2.dilate(other, cross, borderValue=0).view(bool)


def within(boundary: np.ndarray, reach: tuple[float, float]) -> np.ndarray:
    """Pixels whose centre is at most so many pixels, across and down, from that of a boundary pixel."""
    across, down = reach
    if int(max(reach)) > DILATED:
        return grown(boundary, reach)
    wide, high = int(across), int(down)
    y, x = np.mgrid[-high : high + 1, -wide : wide + 1]
    near = (x * down) ** 2 + (y * across) ** 2 <= (across * down) ** 2  # an ellipse
    disk = near.astype(np.uint8)
    return cv2.dilate(boundary.view(np.uint8), disk, borderValue=0).view(bool)


class BoundaryScores:
    """Counts boundary pixels and those that have a counterpart nearby.

    Precision is the share of the map's boundary pixels of a class that lie within the tolerance of
    one of the truth, recall the reverse, and F1 their harmonic mean (Csurka et al. 2013, What is a
    good evaluation measure for semantic segmentation?; here of all pixels together, not a mean over
    images). Only pixels that both sides know count.
    """

    def __init__(self, classes: int, reach: tuple[float, float]):
        """``reach`` is the tolerance in pixels across and down, which need not be square."""
        self.reach, self.tolerance = reach, math.sqrt(reach[0] * reach[1])
        # rows around a part that its counts depend on
        self.halo = int(self.reach[1]) + 1
        # of each class: boundary pixels of the truth and of the map, and those that are matched
        self.counts = np.zeros((classes, 4), np.int64)

    def add(
        self, guess: np.ndarray, truth: np.ndarray, rows: slice = slice(None)
    ) -> None:
        """Count a part of a map.

        Args:
            guess: (H, W) classes of the map; negative is unknown.
            truth: Likewise, of the labels.
            rows: Those that are counted; others lie around them.
        """
        known = (guess >= 0) & (truth >= 0) & (truth < len(self.counts))
        present = np.union1d(guess[known], truth[known])
        if len(present) < 2:
            return
        for number in present:
            drawn = class_boundary((truth == number) & known, known)
            found = class_boundary((guess == number) & known, known)
            hits = [
                one & within(other, self.reach)
                for one, other in ((drawn, found), (found, drawn))
            ]
            parts = (drawn, found, *hits)
            self.counts[number] += [np.count_nonzero(part[rows]) for part in parts]

    def report(self, names, pixel_size: float | None) -> dict:
        """Precision, recall and F1 of each class, and the mean F1, as plain numbers for JSON.

        A class without a boundary on either side has none (None) and is not in the mean; one with
        a boundary on one side alone has the F1 0. Where the truth has no boundary at all, as of
        polygons that lie apart, it says of none where it should be: then no class has a score.
        """
        entries = []
        counts = self.counts if self.counts[:, 0].any() else np.zeros_like(self.counts)
        for name, (drawn, found, recalled, right) in zip(names, counts.tolist()):
            precision = right / found if found else None
            recall = recalled / drawn if drawn else None
            f1 = None
            if drawn or found:
                total = (precision or 0) + (recall or 0)
                f1 = 2 * (precision or 0) * (recall or 0) / total if total else 0.0
            scores = {"precision": precision, "recall": recall, "f1": f1}
            entries.append({"name": name} | scores)
        known = [entry["f1"] for entry in entries if entry["f1"] is not None]
        metres = None if pixel_size is None else self.tolerance * pixel_size
        return {
            "tolerance_pixels": self.tolerance,
            "tolerance_metres": metres,
            "mean_f1": float(np.mean(known)) if known else None,
            "per_class": entries,
        }
