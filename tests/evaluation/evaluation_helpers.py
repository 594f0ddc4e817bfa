"""What several files of these tests need."""

from __future__ import annotations

import numpy as np


def logits_and_truth(rng, count=20_000, classes=4, temperature=1.0):
    """Logits of a model that is too sure of itself by a known factor, and the truth."""
    honest = rng.normal(0, 2, (count, classes))
    if classes == 1:
        truth = rng.random(count) < 1 / (1 + np.exp(-honest[:, 0]))
    else:
        truth = (honest + rng.gumbel(size=honest.shape)).argmax(1)
    return (honest * temperature).astype(np.float32), truth.astype(np.int64)
