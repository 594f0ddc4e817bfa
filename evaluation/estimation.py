"""Accuracies and areas from a stratified random sample of a map, with design-based intervals.

Stehman 2014 (Estimating area and map accuracy for stratified random sampling when the strata are
different from the map classes, International Journal of Remote Sensing 35, 4923-4939): each measure
is a ratio of two totals over the map, of indicators of each point. Where the strata are the map's
classes, the estimates are those of Olofsson et al. 2014 (Remote Sensing of Environment 148, 42-57,
equations 1-11), whose variances leave out the finite population correction that is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.areas import Z_95, estimate_in, interval_estimate

LEAST = 2  # points of a stratum that say how it varies


@dataclass(frozen=True)
class StratifiedSample:
    """A sample whose points have a reference.

    Attributes:
        strata: (n,) the stratum of each point, 0..H-1.
        sizes: (H,) pixels of each stratum.
        mapped: (n,) the class of each point in the map, negative where it has none.
        reference: (n,) its true class.
        weights: (n,) what each point counts: 1, or the area of its pixel where pixels differ.
        classes: K.
        by_class: Whether the strata are the map's classes of the same number.
    """

    strata: np.ndarray
    sizes: np.ndarray
    mapped: np.ndarray
    reference: np.ndarray
    weights: np.ndarray
    classes: int
    by_class: bool

    @property
    def points(self) -> np.ndarray:
        """(H,) points of each stratum."""
        return np.bincount(self.strata, minlength=len(self.sizes))


def stratified_ratio(
    sample: StratifiedSample,
    above: np.ndarray,
    below: np.ndarray,
    only: Sequence[int] | None = None,
) -> tuple[float, float]:
    """A ratio of two totals over the map, and its variance.

    Stehman 2014, equations 27 and 28: the variance is that of the total of ``above - ratio * below``
    within strata, over the square of the total below.

    Args:
        sample: The points.
        above: (n,) value of each point in the numerator.
        below: (n,) in the denominator; ones for a share of the map.
        only: The strata that it depends on, where the values are known to be 0 in all others.

    Returns:
        NaN for both where a stratum has no point, or the total below is 0; NaN for the variance
        where a stratum has one point, unless that is all of it.
    """
    above, below = above * sample.weights, below * sample.weights
    count, sizes = sample.points, sample.sizes
    strata = range(len(sizes)) if only is None else only
    strata = [stratum for stratum in strata if sizes[stratum] > 0]
    if not strata or min(count[stratum] for stratum in strata) == 0:
        return np.nan, np.nan
    groups = [np.flatnonzero(sample.strata == stratum) for stratum in strata]
    size = sizes[strata].astype(float)

    def total(values: np.ndarray) -> float:
        return float(sum(n * values[group].mean() for n, group in zip(size, groups)))

    whole = total(below)
    if whole == 0:
        return np.nan, np.nan
    ratio = total(above) / whole
    residual, variance = above - ratio * below, 0.0
    for n, group in zip(size, groups):
        if len(group) >= n:  # all of it is known
            continue
        spread = residual[group].var(ddof=1) if len(group) >= LEAST else np.nan
        variance += n**2 * (1 - len(group) / n) * spread / len(group)
    return ratio, variance / whole**2


def estimate(sample: StratifiedSample, hectares: float | None) -> dict:
    """Accuracies and areas of a map with 95 % intervals, in the form of ``estimate_areas``.

    The user's accuracy of a class depends on its own stratum alone where the strata are the map's
    classes; all else depends on all strata.

    Args:
        sample: The points.
        hectares: The area that was sampled; None gives shares alone.
    """
    mapped, reference = sample.mapped, sample.reference
    ones, right = np.ones(len(mapped)), mapped == reference
    inside = mapped >= 0

    def known(above, below, only=None) -> dict:
        return interval_estimate(*stratified_ratio(sample, above, below, only), Z_95)

    per_class = []
    for number in range(sample.classes):
        here, true = mapped == number, reference == number
        own = [number] if sample.by_class and number < len(sample.sizes) else None
        entry = {
            "class": number,
            "points": int(true.sum()),
            "share": known(true, ones),
            "users_accuracy": known(right & here, here, own),
            "producers_accuracy": known(right & true, true & inside),
        }
        if hectares is not None:
            entry["area_ha"] = estimate_in(hectares, entry["share"])
        per_class.append(entry)
    return {"overall_accuracy": known(right, inside), "per_class": per_class}


def error_matrix(sample: StratifiedSample) -> dict:
    """The counts of points and the estimated shares of the map, (K, K), rows are the reference."""
    shape = sample.classes, sample.classes
    counts, shares = np.zeros(shape, np.int64), np.zeros(shape)
    inside = sample.mapped >= 0
    place = sample.reference[inside], sample.mapped[inside]
    np.add.at(counts, place, 1)
    each = sample.sizes / np.maximum(sample.points, 1)
    np.add.at(shares, place, (each[sample.strata] * sample.weights)[inside])
    total = shares.sum()
    return {"points": counts.tolist(), "shares": (shares / (total or 1)).tolist()}
