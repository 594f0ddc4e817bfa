"""Faults of the training of version 1.1 that must not come back, by their numbers."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import IGNORE, patch_everywhere, write_raster
from training_helpers import origin_of

from common.patches import list_pairs
from evaluation.calibration import LogitSample
from training.assessment import HeldOutCollector
from training.samples import SampleIndex, index_samples

fault = pytest.mark.fault


def index_of(root, split: str) -> SampleIndex:
    return index_samples(list_pairs(root, split), 2, IGNORE)


# --- percentiles ----------------------------------------------------------------------------


@fault(7)
def test_pixels_of_pooled_splits_weigh_alike(make_dataset, monkeypatch):
    root = make_dataset(8, 2, 0, bands=1)
    for file in root.rglob("images/*.tif"):
        value = 20 if "validation" in file.parts else 10
        pixels = np.full((1, 32, 32), value, np.uint16)
        write_raster(file, pixels, origin=origin_of(file))
    patch_everywhere(monkeypatch, "training.samples.SAMPLE_VALUES", 1024)
    train, validation = index_of(root, "train"), index_of(root, "validation")
    for pooled in (train + validation, validation + train):
        pixels = np.concatenate(pooled.samples)
        assert (pixels == 20).mean() == pytest.approx(0.2, abs=0.04)
        assert pooled.share == 1 / 8
        assert len(pixels) == pytest.approx(10 * 1024 / 8, rel=0.15)


@fault(7)
def test_logits_of_folds_of_unequal_size_weigh_alike(make_dataset, monkeypatch):
    index = index_of(make_dataset(6), "train")
    labelled = int(index.counts.sum())
    parts = [index.subset(range(1)), index.subset(range(1, 6))]
    shares = {HeldOutCollector(part, labelled, 0).sample.share for part in parts}
    assert shares == {LogitSample(labelled).share}
