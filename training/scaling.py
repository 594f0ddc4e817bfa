"""The normalization of a run: percentiles of its patches, or what its weights were trained with."""

from __future__ import annotations

import logging
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
from training.start import Start, start_normalization

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
    if start:
        return start_normalization(config, index, start)
    measured = dataset_normalization(index.samples)
    scaling, matches = _published_scaling(config, index)
    if not scaling:
        if config.weights:
            log.info("normalization: percentiles of the training patches")
        return measured
    low, high = list(measured.low), list(measured.high)
    for band, match in enumerate(matches):
        if match is not None:
            low[band], high[band] = scaling.low[match], scaling.high[match]
    rest = sum(match is None for match in matches)
    more = f"; percentiles of the patches for {rest} other bands" if rest else ""
    text = "normalization: that of %s (%s)%s"
    log.info(text, Path(config.weights).name, scaling.scaling, more)
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
    pixels = np.concatenate(index.samples)
    peaks, outside = [], {}
    for band, match in enumerate(matches):
        if match is None:
            continue
        low, high = known.low[match], known.high[match]
        values = pixels[:, band]
        peaks.append((np.percentile(values, 99) - low) / (high - low))
        share = np.mean((values < low) | (values > high))
        if share > SOME_OUTSIDE:
            name = index.descriptions[band] or f"band {band + 1}"
            outside[f"{name} ({share:.0%})"] = share
    file = Path(config.weights).name
    way_out = (
        f"bring the patches into the units of {file} ({known.scaling}), or give "
        "--normalization_from data"
    )
    if max(outside.values(), default=0) > OUTSIDE:
        raise DatasetError(
            f"Most values of a band lie outside of what the weights were trained with: "
            f"{listed(outside)}; {way_out}"
        )
    if max(peaks) < DARK:
        raise DatasetError(
            f"The values of the patches in {config.dataset_root} reach {max(peaks):.1%} of what the "
            f"weights were trained with; {way_out}"
        )
    if outside:
        text = "values outside of the scaling of %s are clipped in %s; %s takes percentiles"
        log.warning(text, file, listed(outside), "--normalization_from data")
