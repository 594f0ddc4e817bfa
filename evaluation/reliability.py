"""Whether pixels are right as often as their confidence says."""

from __future__ import annotations

import numpy as np


class Reliability:
    """Pixels, hits and confidence per bin of confidence, so that memory does not grow with pixels."""

    BINS = 15  # of equal width between 0 and 1

    def __init__(self):
        self.pixels = np.zeros(self.BINS, np.int64)
        self.hits = np.zeros(self.BINS, np.int64)
        self.confidence = np.zeros(self.BINS)  # summed

    def count(self, confidence: np.ndarray, hits: np.ndarray) -> None:
        """Count more pixels: confidence (N,) from 0 to 1, and whether each is right (N,) bool."""
        confidence = confidence.astype(np.float64)
        bins = np.minimum((confidence * self.BINS).astype(np.int64), self.BINS - 1)
        self.pixels += np.bincount(bins, minlength=self.BINS)
        self.hits += np.bincount(bins[hits], minlength=self.BINS)
        self.confidence += np.bincount(bins, confidence, minlength=self.BINS)

    def report(self) -> dict:
        """Pixels, mean confidence and accuracy per bin, as plain numbers for JSON."""
        filled = self.pixels > 0
        pixels = np.where(filled, self.pixels, 1)

        def means(sums: np.ndarray) -> list[float | None]:
            return [
                float(m) if full else None for m, full in zip(sums / pixels, filled)
            ]

        return {
            "expected_calibration_error": expected_calibration_error(self),
            "pixels": self.pixels.tolist(),
            "confidence": means(self.confidence),
            "accuracy": means(self.hits),
        }


def expected_calibration_error(reliability: Reliability) -> float | None:
    """Mean distance of confidence and accuracy over the bins, weighted by their pixels.

    Naeini et al. 2015, Guo et al. 2017. None without a pixel.
    """
    total = int(reliability.pixels.sum())
    gaps = np.abs(reliability.hits - reliability.confidence)
    return float(gaps.sum()) / total if total else None
