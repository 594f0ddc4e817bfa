"""Whether pixels are right as often as the model is confident, and the temperature that corrects it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from evaluation.reliability import Reliability
from model_training import class_probabilities, predict_classes

TEMPERATURES = (0.05, 20.0)  # where the fit looks


class Calibration(Reliability):
    """Whether pixels are right as often as the model is confident.

    Confidence is the probability of the chosen class; a binary model chooses the foreground from
    0.5 on.
    """

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
        self.count(confidence[labelled].cpu().numpy(), hits[labelled].cpu().numpy())


class LogitSample:
    """Labelled pixels drawn at random from batches, each with the same chance.

    The draw depends on the seed and the order of the pixels, not on the batch size.

    Args:
        labelled: How many labelled pixels all batches have.
        size: How many of them to draw, on average; all where there are no more.
        seed: Of the draw.
    """

    def __init__(self, labelled: int, size: int = 200_000, seed: int = 0):
        self.share = size / max(labelled, 1)
        self.rng = np.random.default_rng(seed)
        self.drawn: list[tuple[np.ndarray, np.ndarray]] = []  # of each batch

    def add(self, logits: Tensor, mask: Tensor) -> None:
        """Draw from a batch: logits (N, K, H, W), mask (N, H, W), on any device."""
        classes = max(2, logits.shape[1])
        places = ((mask >= 0) & (mask < classes)).nonzero()
        kept = self.rng.random(len(places)) < self.share
        n, y, x = places[torch.from_numpy(kept).to(places.device)].T
        chosen = logits.detach()[n, :, y, x].float(), mask[n, y, x]
        self.drawn.append(tuple(part.cpu().numpy() for part in chosen))

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """What was drawn: logits (M, K) float32 and target (M,) int64."""
        logits, target = zip(*self.drawn)
        return np.concatenate(logits), np.concatenate(target)


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
    model was overconfident. The chosen class of a pixel stays; for a binary model as long as its
    threshold is 0.5.

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
