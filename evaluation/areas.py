"""Areas and accuracies of a map, corrected for its errors (Olofsson et al. 2014)."""

from __future__ import annotations

import numpy as np

Z_95 = 1.96  # half a 95 % interval in standard errors


def estimate_areas(
    matrix: np.ndarray, map_pixels: np.ndarray, pixel_area: float | None = None
) -> dict:
    """Areas and accuracies of a map, corrected for its errors, with 95 % intervals.

    The stratified estimator of Olofsson et al. 2014 (Remote Sensing of Environment 148, 42-57,
    equations 1-11): the classes of the map are the strata, and the matrix gives the true class
    of a sample of each. It needs a sample of ground that the model was not trained on.

    The intervals of the paper hold for pixels drawn one by one. Pixels of a patch are right or
    wrong together, so a matrix per patch gives the same values and the errors of a sample of
    patches, which are many times as large. A patch without a labelled pixel is no part of the
    sample.

    A class that the map lacks has the weight 0; its area is what other classes hide. A mapped
    class without a sample has no estimate, and its ground is left out of all others, which are
    of ``assessed_share`` of the map. A class that is nowhere the truth has no producer's
    accuracy. Errors that depend on a mapped class with a single sample (or in a single patch)
    are unknown. All these are None.

    Args:
        matrix: (K, K) counts of sampled pixels, rows are truth (in the paper they are the map);
            or (P, K, K), one for each patch.
        map_pixels: (K,) pixels of each class over the whole map.
        pixel_area: Square metres of a pixel; None gives shares alone. Where pixels differ in
            area, give square metres for ``map_pixels`` and 1 here.

    Returns:
        ``overall_accuracy``, ``assessed_share`` and ``per_class``. An estimate is a dict of
        ``value``, ``standard_error`` and ``interval_95``, which ends at what is possible.
    """
    patches = np.asarray(matrix, np.float64).swapaxes(-2, -1)  # rows are the map
    if patches.ndim == 3:
        patches = patches[patches.any(axis=(1, 2))]
    counts = patches if patches.ndim == 2 else patches.sum(axis=0)
    mapped = np.asarray(map_pixels, np.float64)
    unknown = (mapped > 0) & (counts.sum(axis=1) == 0)
    assessed = np.where(unknown, 0, mapped)
    with np.errstate(divide="ignore", invalid="ignore"):  # what is undefined is NaN
        weights, mapped_share = assessed / assessed.sum(), mapped / mapped.sum()
        values = _stratified(counts, weights)
        if patches.ndim == 2:
            variances, width = _pixel_variances(counts, weights, values), Z_95
        else:
            variances = _patch_variances(patches, weights, values)
            width = _student(len(patches))
    for name in ("share", "producers_accuracy"):
        values[name][unknown] = np.nan
    estimates = {
        name: [
            interval_estimate(*pair, width)
            for pair in zip(values[name], variances[name])
        ]
        for name in values
    }
    (overall,) = estimates.pop("overall_accuracy")
    per_class = []
    for k in range(len(counts)):
        entry = {"class": k, "mapped_share": plain(mapped_share[k])}
        entry |= {name: column[k] for name, column in estimates.items()}
        if pixel_area is not None:
            entry["mapped_ha"] = float(mapped[k] * pixel_area / 1e4)
            total = float(assessed.sum() * pixel_area / 1e4)
            entry["area_ha"] = estimate_in(total, entry["share"])
        per_class.append(entry)
    return {
        "overall_accuracy": overall,
        "assessed_share": plain(mapped_share[~unknown].sum()),
        "per_class": per_class,
    }


def _weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(..., K, K) rows times the weights of their classes; 0 where those are, even times NaN."""
    weights = weights[:, None]
    return np.where(weights == 0, 0, weights * values)


def _stratified(counts: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The measures of Olofsson et al. 2014, NaN where undefined.

    Args:
        counts: (K, K) of the sample, rows are the map.
        weights: (K,) shares of the map's classes.
    """
    rates = counts / counts.sum(axis=1, keepdims=True)
    shares = _weighted(weights, rates)  # eq. 4
    return {
        "overall_accuracy": np.trace(shares)[None],  # eq. 1
        "share": shares.sum(axis=0),  # eq. 9
        "users_accuracy": np.diag(rates).copy(),  # eq. 2
        "producers_accuracy": np.diag(shares) / shares.sum(axis=0),  # eq. 3
    }


def _pixel_variances(counts: np.ndarray, weights: np.ndarray, values: dict) -> dict:
    """Variances of the measures for pixels drawn at random within the map's classes."""
    sampled = counts.sum(axis=1, keepdims=True)
    rates, producer = counts / sampled, values["producers_accuracy"]
    variances = rates * (1 - rates) / (sampled - 1)
    spread = _weighted(weights**2, variances)
    own = np.eye(len(counts), dtype=bool)
    factor = np.where(own, (1 - producer) ** 2, producer**2)
    missed = (factor * spread).sum(axis=0)
    return {
        "overall_accuracy": np.trace(spread)[None],  # eq. 5
        "share": spread.sum(axis=0),  # eq. 10
        "users_accuracy": np.diag(variances),  # eq. 6
        "producers_accuracy": missed / values["share"] ** 2,  # eq. 7
    }


def _patch_variances(patches: np.ndarray, weights: np.ndarray, values: dict) -> dict:
    """Variances of the measures for patches drawn at random: ratios, linearized.

    Särndal, Swensson and Wretman 1992, Model assisted survey sampling, section 5.5: how far
    each patch moves a ratio stands for the patch.

    Args:
        patches: (P, K, K), rows are the map.
        weights: (K,) shares of the map's classes.
        values: The measures of all patches together.
    """
    counts = patches.sum(axis=0)
    sampled = counts.sum(axis=1, keepdims=True)
    expected = patches.sum(axis=2, keepdims=True) * counts / sampled
    moved = (patches - expected) / sampled  # (P, K, K)
    moved[:, (patches.sum(axis=2) > 0).sum(axis=0) < 2] = np.nan
    weighted = _weighted(weights, moved)
    right, share = np.diagonal(weighted, axis1=1, axis2=2), weighted.sum(axis=1)
    missed = right - values["producers_accuracy"] * share
    each = {
        "overall_accuracy": right.sum(axis=1, keepdims=True),
        "share": share,
        "users_accuracy": np.diagonal(moved, axis1=1, axis2=2),
        "producers_accuracy": missed / values["share"],
    }
    scale = len(patches) / max(len(patches) - 1, 1)
    return {name: scale * (part**2).sum(axis=0) for name, part in each.items()}


def _student(count: int) -> float:
    """Half a 95 % interval in standard errors that are known from so many patches."""
    from scipy import stats

    return float(stats.t.ppf(0.975, max(count - 1, 1)))


def plain(value: float) -> float | None:
    """A number for JSON: None for NaN."""
    return None if np.isnan(value) else float(value)


def interval_estimate(value: float, variance: float, width: float) -> dict:
    """An estimated share; NaN is what is undefined."""
    value = plain(value)
    error = None if value is None else plain(np.sqrt(variance))
    interval = None
    if error is not None:
        interval = [max(0.0, value - width * error), min(1.0, value + width * error)]
    return {"value": value, "standard_error": error, "interval_95": interval}


def estimate_in(total: float, share: dict) -> dict:
    """An estimated share in the unit of the total."""
    value, error, interval = share.values()
    return {
        "value": None if value is None else value * total,
        "standard_error": None if error is None else error * total,
        "interval_95": interval and [end * total for end in interval],
    }
