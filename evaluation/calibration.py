"""Whether pixels are right as often as the model is sure of them, and the temperature that mends it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from evaluation.areas import _plain
from model_training import class_probabilities, predict_classes

TEMPERATURES = (0.05, 20.0)  # where the fit looks


class Calibration:
    """Whether pixels are right as often as the model is sure of them.

    Counts per bin of confidence, so that memory does not grow with the pixels. Confidence is the
    probability of the chosen class; a binary model chooses the foreground from 0.5 on.
    """

    BINS = 15  # of equal width between 0 and 1

    def __init__(self):
        self.pixels = np.zeros(self.BINS, np.int64)
        self.hits = np.zeros(self.BINS, np.int64)
        self.confidence = np.zeros(self.BINS)  # summed

    def add(self, logits, target, temperature: float = 1.0) -> None:
        """Count more pixels.

        Args:
            logits: (N, K, ...) array or tensor.
            target: (N, ...) class ids; pixels of no class are not counted.
            temperature: What the logits are divided by; the chosen class stays.
        """
        logits, target = torch.as_tensor(logits), torch.as_tensor(target)
        probabilities = class_probabilities(logits.float() / temperature)
        if logits.shape[1] == 1:
            probabilities = torch.cat([1 - probabilities, probabilities], dim=1)
        confidence, hits = probabilities.amax(1), predict_classes(logits) == target
        labelled = (target >= 0) & (target < probabilities.shape[1])
        confidence = confidence[labelled].cpu().numpy().astype(np.float64)
        hits = hits[labelled].cpu().numpy()
        bins = np.minimum((confidence * self.BINS).astype(np.int64), self.BINS - 1)
        self.pixels += np.bincount(bins, minlength=self.BINS)
        self.hits += np.bincount(bins[hits], minlength=self.BINS)
        self.confidence += np.bincount(bins, confidence, minlength=self.BINS)

    def report(self) -> dict:
        """Pixels, mean confidence and accuracy per bin, as plain numbers for JSON."""
        with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
            confidence = self.confidence / self.pixels
            accuracy = self.hits / self.pixels
        return {
            "expected_calibration_error": expected_calibration_error(self),
            "pixels": self.pixels.tolist(),
            "confidence": [_plain(value) for value in confidence],
            "accuracy": [_plain(value) for value in accuracy],
        }


def expected_calibration_error(calibration: Calibration) -> float | None:
    """Mean distance of confidence and accuracy over the bins, weighted by their pixels.

    Naeini et al. 2015, Guo et al. 2017. None without a pixel.
    """
    total = int(calibration.pixels.sum())
    gaps = np.abs(calibration.hits - calibration.confidence)
    return float(gaps.sum()) / total if total else None


class LogitSample:
    """Labelled pixels drawn at random from batches, each with the same chance.

    Every labelled pixel gets a random number, and those with the smallest are kept; so the
    sample depends on the seed and the order of the pixels, not on the batch size.
    """

    def __init__(self, size: int = 200_000, seed: int = 0):
        self.size = size
        self.rng = np.random.default_rng(seed)
        self.keys = np.empty(0)
        self.logits = np.empty((0, 1), np.float32)  # (M, K)
        self.target = np.empty(0, np.int64)

    def add(self, logits: Tensor, mask: Tensor) -> None:
        """Draw from a batch: logits (N, K, H, W), mask (N, H, W)."""
        classes = max(2, logits.shape[1])
        places = ((mask >= 0) & (mask < classes)).nonzero()
        keys = self.rng.random(len(places))
        full = len(self.keys) == self.size
        kept = keys < (self.keys.max(initial=0) if full else np.inf)
        n, y, x = places[torch.from_numpy(kept).to(places.device)].T
        keys = np.concatenate([self.keys, keys[kept]])
        more = logits.detach()[n, :, y, x].float().cpu().numpy()  # (M, K)
        more = np.concatenate([self.logits.reshape(-1, more.shape[1]), more])
        target = np.concatenate([self.target, mask[n, y, x].cpu().numpy()])
        best = slice(None)
        if len(keys) > self.size:
            best = np.sort(np.argpartition(keys, self.size)[: self.size])
        self.keys, self.logits, self.target = keys[best], more[best], target[best]


def sample_logits(
    batches: Iterable[tuple[Tensor, Tensor]], size: int = 200_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """At most ``size`` labelled pixels of all batches, each with the same chance.

    Args:
        batches: Pairs of logits (N, K, H, W) and mask (N, H, W), on any device; pixels of no
            class (``ignore_index``) are not labelled.
        size: How many.
        seed: Of the draw.

    Returns:
        logits (M, K) float32 and target (M,) int64.
    """
    sample = LogitSample(size, seed)
    for logits, mask in batches:
        sample.add(logits, mask)
    return sample.logits, sample.target


def negative_log_likelihood(logits: np.ndarray, target: np.ndarray) -> float:
    """Mean over pixels of -log of the true class's probability.

    Args:
        logits: (M, K); K = 1 is the foreground alone.
        target: (M,) int64 in 0..K-1 (0..1 for K = 1).
    """
    if logits.shape[1] == 1:
        foreground = logits[:, 0]
        losses = np.logaddexp(0, foreground) - target * foreground
    else:
        shifted = logits - logits.max(axis=1, keepdims=True)
        truth = shifted[np.arange(len(target)), target]
        losses = np.log(np.exp(shifted).sum(axis=1)) - truth
    return float(losses.mean(dtype=np.float64))


def fit_temperature(logits: np.ndarray, target: np.ndarray) -> float:
    """The temperature that logits are divided by to give the likeliest probabilities.

    Temperature scaling (Guo et al. 2017, On calibration of modern neural networks): above 1 the
    model was too sure of itself. The chosen class of a pixel stays; for a binary model as long
    as its threshold is 0.5.

    Args:
        logits: (M, K) float32 of pixels that the model was not trained on; K = 1 is binary.
        target: (M,) int64, their classes.

    Returns:
        A temperature within ``TEMPERATURES``; 1 where none is better, or without pixels.
    """
    from scipy.optimize import minimize_scalar

    if len(target) == 0:
        return 1.0

    def loss(power: float) -> float:  # convex in 1 / T, so there is one minimum
        return negative_log_likelihood(logits / math.exp(power), target)

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded")
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0
