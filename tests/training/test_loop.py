"""Epochs, steps, schedules and precision of a training."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    IGNORE,
    encoder_for,
    settings,
    train,
)

from common.architectures import (
    ModelConfig,
)
from common.devices import native_precision
from common.errors import OptionError, SegmentationError
from model_training import (
    build_loss,
    build_model,
)
from training.loop import (
    Stepper,
    make_scheduler,
    train_one_epoch,
    training_precision,
)
from training.run import History

# --- training -------------------------------------------------------------------------------


def test_history_keeps_the_best_and_its_epoch():
    history = History()
    for epoch, (loss, iou) in enumerate([(3, 0.1), (1, 0.1), (2, 0.3)], start=1):
        history.rows.append({"epoch": epoch, "val_loss": loss})
        history.improve("loss", loss, higher=False)
        history.improve("iou", iou, higher=True)
    assert history.best == {"loss": 1, "iou": 0.3}
    assert history.best_epoch == {"loss": 2, "iou": 3}


def test_of_equal_scores_the_one_of_the_lower_loss_is_the_best():
    """As in all epochs where the validation labels hold no foreground."""
    history = History()
    for loss in (3, 1, 2, 1):
        history.rows.append({"val_loss": loss})
        history.improve("combined", 0.0, higher=True)
    assert history.best_epoch == {"combined": 2}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_the_best(value):
    history = History([{}])
    assert not history.improve("loss", value, higher=False)
    assert not history.best


def rates(name: str, epochs: int, losses) -> list[float]:
    """The learning rate of each epoch."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = make_scheduler(optimizer, settings(scheduler=name), epochs)
    found = []
    for loss in losses:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if name == "plateau":
            scheduler.step(loss)
        elif scheduler:
            scheduler.step()
    return found


def test_cosine_falls_along_half_a_wave_from_the_initial_rate():
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)]
    assert rates("cosine", 8, range(8)) == pytest.approx(expected)


def test_plateau_halves_the_rate_after_six_epochs_without_a_better_loss():
    found = rates("plateau", 9, [1.0] * 9)
    assert found == pytest.approx([0.1] * 7 + [0.05] * 2)
    assert rates("plateau", 9, range(9, 0, -1)) == pytest.approx([0.1] * 9)


def test_without_a_scheduler_the_rate_stays():
    assert rates("none", 5, range(5)) == [0.1] * 5


def stepper(optimizer, **options) -> Stepper:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Stepper(optimizer, scaler, **options)


@pytest.mark.parametrize("model", ["pan", "deeplabv3", "deeplabv3_resnet50"])
def test_a_batch_of_one_that_cannot_be_normalized_says_what_to_do(model):
    network = build_model(ModelConfig(model, 2, 1, encoder_for(model)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    batch = [(torch.rand(1, 2, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int64))]
    loss = build_loss("ce", "binary", IGNORE)
    with pytest.raises(SegmentationError, match="--batch_size 2"):
        train_one_epoch(network, batch, loss, stepper(optimizer), torch.device("cpu"))


def test_a_loss_that_is_no_number_stops_training():
    network = torch.nn.Conv2d(1, 1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    images = torch.full((2, 1, 4, 4), math.nan)
    batch = [(images, torch.zeros(2, 4, 4, dtype=torch.int64))]
    loss = build_loss("ce", "binary", IGNORE)
    with pytest.raises(SegmentationError, match="--learning_rate"):
        train_one_epoch(network, batch, loss, stepper(optimizer), torch.device("cpu"))


def test_an_unlabelled_batch_moves_no_weight():
    network = torch.nn.Conv2d(1, 1, 1)
    before = network.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    batch = [(torch.rand(2, 1, 4, 4), torch.full((2, 4, 4), IGNORE))]
    loss = build_loss("dice+ce", "binary", IGNORE)
    train_one_epoch(network, batch, loss, stepper(optimizer), torch.device("cpu"))
    assert torch.equal(network.weight, before)


CPU = torch.device("cpu")


# --- precision and steps --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amp", "expected"), [("off", torch.float32), ("bf16", torch.bfloat16)]
)
def test_amp_is_the_precision_of_the_passes(data, tmp_path, monkeypatch, amp, expected):
    kinds, plain = set(), torch.nn.functional.conv2d

    def conv2d(images, weight, *arguments, **more):
        result = plain(images, weight, *arguments, **more)
        if torch.is_grad_enabled():
            kinds.add(result.dtype)
            assert weight.dtype == torch.float32
        return result

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    train(data, tmp_path, "--amp", amp)
    assert expected in kinds
    assert amp == "bf16" or kinds == {torch.float32}


def test_auto_is_the_native_precision():
    assert training_precision("auto", CPU) == native_precision(CPU)
    assert training_precision("off", CPU) == "fp32"
    with pytest.raises(OptionError, match="--amp fp16"):
        training_precision("fp16", CPU)


def test_batches_add_up_to_a_step_as_one_large_batch_does():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(10, 2, 8, 8, generator=generator)
    masks = torch.randint(0, 3, (10, 8, 8), generator=generator)
    loss = build_loss("ce", "multiclass", 255)
    weights = []
    for size, accumulate in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(2, 3, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        stepper = Stepper(optimizer, scaler, accumulate=accumulate)
        batches = list(zip(images.split(size), masks.split(size)))
        train_one_epoch(network, batches, loss, stepper, CPU)
        weights.append(network.weight.detach())
    torch.testing.assert_close(*weights)


def test_a_schedule_counts_steps_not_batches(data, tmp_path, monkeypatch):
    totals, plain = [], torch.optim.lr_scheduler.OneCycleLR.__init__

    def begin(self, *arguments, **more):
        totals.append(more["total_steps"])
        plain(self, *arguments, **more)

    monkeypatch.setattr(torch.optim.lr_scheduler.OneCycleLR, "__init__", begin)
    options = ("--scheduler", "onecycle", "--epochs", 2, "--batch_size", 2)
    train(data, tmp_path, *options, "--accumulate", 3)  # 4 batches: 2 steps
    assert totals == [4]
