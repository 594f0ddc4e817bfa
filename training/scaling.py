"""The normalization of a run: percentiles of its patches, or what its weights were trained with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.errors import DatasetError
from common.text import listed
from model_training import Normalization, dataset_normalization
from training.file_bands import file_bands, rgb_channels
from training.published import PublishedWeights, published_weights
from training.samples import SampleIndex
from training.settings import TrainingConfig
from training.start import Start, start_ranges

log = logging.getLogger("semanticseg4eo")

DARK = 0.03  # of a scaling's range; bytes reach less of 0 to 10,000
OUTSIDE, SOME_OUTSIDE = 0.5, 0.1  # shares of a band's values


def choose_normalization(
    config: TrainingConfig, index: SampleIndex, start: Start | None = None
) -> Normalization:
    """The normalization that the settings ask for; ``start`` is the model of ``--start_from``.

    Raises:
        DatasetError: Patches without a valid pixel; see ``file_bands`` too.
    """
    if config.normalization == "image":
        if start:
            log.info("normalization: each patch by its own percentile, as asked for")
        return Normalization("image")
    measured, origin = dataset_normalization(index.samples), ""
    if start:
        ranges, origin = start_ranges(config, start), Path(start.file).name
    else:
        scaling, matches = _published_scaling(config, index)
        ranges = {}
        if scaling:
            origin = f"{Path(config.weights).name} ({scaling.scaling})"
            ranges = {
                band: (scaling.low[match], scaling.high[match])
                for band, match in enumerate(matches)
                if match is not None
            }
    if not ranges:
        if start or config.weights:
            log.info("normalization: percentiles of the training patches")
        return measured
    low, high = list(measured.low), list(measured.high)
    for band, (least, most) in ranges.items():
        low[band], high[band] = least, most
    rest = len(low) - len(ranges)
    more = f"; percentiles of the patches for {rest} other bands" if rest else ""
    log.info("normalization: that of %s%s", origin, more)
    return replace(measured, low=tuple(low), high=tuple(high))


def _published_scaling(
    config: TrainingConfig, index: SampleIndex
) -> tuple[PublishedWeights | None, list[int | None]]:
    """The published weights whose scaling the data get, and per band of the data theirs.

    None where the settings say otherwise, or nobody says what the bands of the data are.
    """
    known = published_weights(config.weights)
    percentiles = config.normalization_from == "data"
    if not known or percentiles or config.normalization == "image":
        return None, []
    if found := file_bands(config, index):
        return known, list(found.matches)
    channels = rgb_channels(config, index)
    if channels is None and index.shape[0] == 3:
        channels = [0, 1, 2]
    matches: list[int | None] = [None] * index.shape[0]
    for band, channel in enumerate(channels or ()):
        matches[channel] = band
    return (known if channels else None), matches


def require_units(config: TrainingConfig, index: SampleIndex) -> None:
    """Warn of values outside of the scaling that the data get from published weights.

    Raises:
        DatasetError: The values cannot be in its units.
    """
    known, matches = _published_scaling(config, index)
    if not known:
        return
    ranges = {
        band: (known.low[match], known.high[match])
        for band, match in enumerate(matches)
        if match is not None
    }
    peak, outside = _compare_values(index, ranges)
    file = Path(config.weights).name
    way_out = (
        f"bring the patches into the units of {file} ({known.scaling}), or give "
        "--normalization_from data"
    )
    if max(outside.values()) > OUTSIDE:
        raise DatasetError(
            f"Most values of a band lie outside of what the weights were trained with: "
            f"{_shares(outside)}; {way_out}"
        )
    if peak < DARK:
        raise DatasetError(
            f"The values of the patches in {config.dataset_root} reach {peak:.1%} of what the "
            f"weights were trained with; {way_out}"
        )
    if text := _shares(outside):
        line = "values outside of the scaling of %s are clipped in %s; %s takes percentiles"
        log.warning(line, file, text, "--normalization_from data")


def require_start_units(
    config: TrainingConfig, index: SampleIndex, start: Start | None
) -> None:
    """Warn of values outside of the percentiles that are kept of the model of ``--start_from``.

    Raises:
        DatasetError: The values cannot be in its units, and nobody has asked to keep them.
    """
    ranges = start_ranges(config, start) if start else {}
    if config.normalization == "image" or not ranges:
        return
    peak, outside = _compare_values(index, ranges)
    asked, apart = config.normalization_from == "model", min(outside.values()) > OUTSIDE
    if not asked and (apart or peak < DARK):
        reach = "lie mostly outside of" if apart else f"reach {peak:.1%} of"
        raise DatasetError(
            f"The values of the patches in {config.dataset_root} {reach} the percentiles of "
            f"{start.file}, as if in other units; bring them into the same, give --normalization_from "
            "data, or model to keep the percentiles all the same"
        )
    if text := _shares({k: v for k, v in outside.items() if v > OUTSIDE}):
        line = "values outside of the percentiles of %s are clipped in %s; %s measures them anew"
        log.warning(line, Path(start.file).name, text, "--normalization_from data")


def _compare_values(
    index: SampleIndex, ranges: Mapping[int, tuple[float, float]]
) -> tuple[float, dict[str, float]]:
    """How far values go into the range, of low and high, that each band is scaled by.

    Returns:
        The largest share of its range that a band reaches; per band the share of values outside.
    """
    pixels, peaks, outside = np.concatenate(index.samples), [], {}
    for band, (low, high) in ranges.items():
        values = pixels[:, band]
        peaks.append((np.percentile(values, 99) - low) / ((high - low) or 1))
        name = index.descriptions[band] or f"band {band + 1}"
        outside[name] = float(np.mean((values < low) | (values > high)))
    return max(peaks), outside


def _shares(outside: Mapping[str, float]) -> str:
    """The bands of which many values lie outside, and how many."""
    many = {name: share for name, share in outside.items() if share > SOME_OUTSIDE}
    return listed(f"{name} ({share:.0%})" for name, share in many.items())
