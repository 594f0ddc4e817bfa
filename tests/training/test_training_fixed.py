"""Faults of the training of version 1.1 that must not come back, by their numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import IGNORE, patch_everywhere, train, write_raster
from training_helpers import origin_of

from common.distributed import ProcessGroup
from common.patches import list_pairs
from evaluation.calibration import LogitSample
from model_training import build_loss
from training.assessment import HeldOutCollector
from training.loop import Stepper, evaluate, train_one_epoch
from training.samples import EpochBatchSampler, SampleIndex, index_samples

fault = pytest.mark.fault
CPU = torch.device("cpu")


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


# --- labelled pixels ------------------------------------------------------------------------


def sparse_batches(*labelled: int) -> list:
    """Batches of 2 patches of 8 x 8 pixels, of which so many are labelled."""
    torch.manual_seed(0)
    batches = []
    for count in labelled:
        mask = torch.full((2 * 64,), IGNORE)
        mask[:count] = torch.arange(count) % 2
        batches.append((torch.rand(2, 1, 8, 8), mask.view(2, 8, 8)))
    return batches


def network_and_stepper(**options) -> tuple:
    torch.manual_seed(1)
    network = torch.nn.Conv2d(1, 1, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return network, Stepper(optimizer, scaler, **options)


@fault(15)
@pytest.mark.parametrize("training", [True, False])
def test_the_mean_loss_is_that_of_labelled_pixels(training):
    batches = sparse_batches(0, 3, 128, 40)
    loss = build_loss("ce", "binary", IGNORE)
    network, stepper = network_and_stepper()
    images, masks = map(torch.cat, zip(*batches))
    expected = loss(network(images), masks).item()
    if training:
        stepper.optimizer.param_groups[0]["lr"] = 0.0
        found = train_one_epoch(network, batches, loss, stepper, CPU)
    else:
        found, _ = evaluate(network, batches, loss, CPU, 2)
    assert found == pytest.approx(expected, rel=1e-5)


@fault(15)
def test_a_step_without_a_labelled_pixel_changes_nothing_but_the_schedule():
    loss = build_loss("dice+ce", "binary", IGNORE)
    network, stepper = network_and_stepper(accumulate=2)
    optimizer = stepper.optimizer
    stepper.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = network.weight.detach().clone()
    batches = sparse_batches(0, 0)
    train_one_epoch(network, batches, loss, stepper, CPU, labelled=[0, 0])
    assert torch.equal(network.weight, before) and not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.05
    train_one_epoch(network, sparse_batches(0, 5), loss, stepper, CPU, labelled=[0, 5])
    moved = network.weight.detach().clone()
    assert not torch.equal(moved, before)
    train_one_epoch(network, batches, loss, stepper, CPU, labelled=[0, 0])  # momentum
    assert torch.equal(network.weight, moved)


@fault(15)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_know_alike_which_batches_have_labels(size):
    values = np.zeros(20, np.int64)
    values[[3, 4]] = 7, 5
    found = []
    for rank in range(size):
        sampler = EpochBatchSampler(20, 2, 0, ProcessGroup(rank, size))
        sampler.epoch = 4
        found.append(sampler.sums(values))
        own = [int(values[[s.index for s in batch]].sum()) for batch in sampler]
        assert len(own) == len(found[-1])
        assert all(mine <= joint for mine, joint in zip(own, found[-1]))
    assert all(sums == found[0] for sums in found)
    assert size > 1 or found[0] == own


@fault(15)
def test_a_run_leaves_out_the_steps_without_labels(make_dataset, tmp_path, monkeypatch):
    root = make_dataset(6, 2, 0, bands=3)
    for file in sorted(root.rglob("train/labels/*.tif"))[1:]:
        write_raster(file, np.full((32, 32), IGNORE, np.uint8), origin=origin_of(file))
    steps, plain = [], Stepper.step

    def step(self, labelled=True):
        steps.append(labelled)
        plain(self, labelled)

    monkeypatch.setattr(Stepper, "step", step)
    train(root, tmp_path / "out", "--batch_size", 2, "--epochs", 2)
    assert sorted(steps) == [False] * 4 + [True] * 2
