"""One epoch: steps of the weights, evaluation, schedules of the learning rate."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler

from common.devices import autocast, native_precision
from common.distributed import ProcessGroup
from common.errors import SegmentationError, require
from common.interruption import stop_requested
from model_training import confusion_matrix, predict_classes
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")

PLATEAU = 5  # epochs without a lower loss, after which the learning rate is halved
LOOK_EVERY = 50  # batches, between two looks at whether the loss is a number: each waits for a GPU


def training_precision(amp: str, device: torch.device) -> str:
    """What ``--amp`` means on a device: "fp32", "bf16" or "fp16".

    Raises:
        OptionError: The device does not compute in it.
    """
    if amp == "auto":
        return native_precision(device)
    kinds = {"fp16": ("cuda",), "bf16": ("cpu", "cuda")}
    fine = device.type in kinds.get(amp, (device.type,))
    where = {"cpu": "auto, bf16 or off on the CPU", "mps": "auto or off on mps"}
    require(fine, "--amp", amp, where.get(device.type, "auto"))
    return "fp32" if amp == "off" else amp


@dataclass
class Stepper:
    """Turns gradients into steps of the weights."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clip_grad: float = 0.0  # largest norm of all gradients; 0 is no limit
    scheduler: object = None  # stepped with each step
    accumulate: int = 1  # batches per step

    def step(self, labelled: bool = True) -> None:
        """One step; the gradients are gone after it.

        Without ``labelled`` pixels the weights stay, which momentum and weight decay would change;
        the schedule continues.
        """
        if labelled:
            if self.clip_grad:
                self.scaler.unscale_(self.optimizer)
                groups = self.optimizer.param_groups
                weights = [p for g in groups for p in g["params"]]
                clip_grad_norm_(weights, self.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler:
            with warnings.catch_warnings():
                # that it comes before the first step of the optimizer, which was left out
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.scheduler.step()


class MeanLoss:
    """The mean of the losses of batches, each weighted by its labelled pixels.

    In fp16 a forward pass can overflow; such batches are left out and counted. Anything else that is
    not a number is an error, also that all batches of a stretch overflow.
    """

    def __init__(self, kind: str, device: torch.device, precision: str):
        self.kind, self.fp16 = kind, precision == "fp16"
        # GPUs of Apple have no float64
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        # loss, labelled pixels, batches, those that are no number; of this stretch
        self.sums = torch.zeros(4, dtype=self.dtype, device=device)
        self.known = np.zeros(4)  # of the stretches before, of all processes

    def add(self, value: Tensor, labelled: Tensor) -> None:
        """Count a batch; no .item() here, which would wait for the device."""
        value, finite = value.detach().to(self.dtype), value.isfinite()
        weight = labelled * finite
        counted = [value.where(finite, 0) * weight, weight, torch.ones_like(value)]
        self.sums += torch.stack([*counted, (~finite).to(self.dtype)])

    def look(self, group: ProcessGroup) -> None:
        """End a stretch of batches, in all processes together.

        Raises:
            SegmentationError: The loss is no longer a number.
        """
        group.all_reduce(self.sums)
        stretch = np.array(self.sums.tolist())
        self.sums.zero_()
        self.known += stretch
        _, _, batches, lost = stretch
        # an epoch may end in a stretch of few batches
        enough = batches >= LOOK_EVERY or batches == self.known[2]
        if lost and (not self.fp16 or lost == batches and enough):
            raise SegmentationError(
                f"The {self.kind} loss is no longer a number; lower --learning_rate"
            )

    def result(self, group: ProcessGroup) -> float:
        """The mean over the batches of all processes; 0 without a labelled pixel.

        Raises:
            SegmentationError: See ``look``.
        """
        self.look(group)
        total, labelled, batches, lost = self.known.tolist()
        if lost:
            text = "%d of %d batches overflowed in fp16: they are not in the %s loss"
            log.warning(text, lost, batches, self.kind)
        return total / max(labelled, 1)


def train_one_epoch(
    model,
    loader,
    loss,
    stepper: Stepper,
    device,
    precision: str = "fp32",
    group: ProcessGroup | None = None,
    frozen=None,
    labelled: Sequence[int] | None = None,
) -> float:
    """One pass over the training patches; the mean loss, weighted by labelled pixels.

    Each process computes the loss of its part of a batch, and gradients are averaged over the
    processes: as one process with the joint batch, but for the loss being a mean over processes.

    Args:
        model: As ``build_model`` makes it, or wrapped by ``distribute``.
        loader: Batches of images and masks on the device, with a length.
        loss: See ``build_loss``.
        stepper: What takes the steps.
        device: Of the model.
        precision: "fp32", "bf16" or "fp16".
        group: The processes that train; the loss that is returned is that of all of them.
        frozen: A part of the model that is not trained, its normalization neither.
        labelled: Labelled pixels of each batch, of all processes together: a step without any
            is left out. None where every batch has some.

    Raises:
        SegmentationError: The loss is no longer a number, or the batch is too small.
    """
    group = group or ProcessGroup()
    model.train()
    if frozen:
        frozen.eval()
    mean = MeanLoss("training", device, precision)
    batches, per_step = len(loader), stepper.accumulate
    for number, (images, masks) in enumerate(loader):
        group.heed_stop()
        steps_now = (number + 1) % per_step == 0 or number + 1 == batches
        first = number // per_step * per_step
        in_step = min(per_step, batches - first)
        # gradients are exchanged once per step
        apart = group.store is not None and not steps_now
        with model.no_sync() if apart else contextlib.nullcontext():
            with autocast(device, precision), batch_norm_errors():
                logits = model(images)
            value = loss(logits.float(), masks)
            stepper.scaler.scale(value / in_step).backward()
        if steps_now:
            # known from the index of patches, so that no process waits for another or a GPU
            stepper.step(labelled is None or any(labelled[first : number + 1]))
        mean.add(value, count_labelled(masks, logits))
        if (number + 1) % LOOK_EVERY == 0:
            mean.look(group)
    return mean.result(group)


class SinglePatchError(SegmentationError):
    """A model that cannot train on a batch of one patch."""


@contextlib.contextmanager
def batch_norm_errors() -> Iterator[None]:
    """Raise as SinglePatchError that a batch is too small for a model."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise SinglePatchError(
            "This model normalizes over the batch and cannot train on a single patch; "
            "use --batch_size 2 or more, and at least 2 training patches"
        ) from error


def count_labelled(masks: Tensor, logits: Tensor) -> Tensor:
    """How many pixels of a batch have a class, on its device."""
    return ((masks >= 0) & (masks < max(2, logits.shape[1]))).sum()


def evaluate(
    model,
    loader,
    loss,
    device,
    num_classes: int,
    watch: Callable | None = None,
    precision: str = "fp32",
    group: ProcessGroup | None = None,
) -> tuple[float, np.ndarray]:
    """Mean loss and confusion matrix (K, K) of a model over a loader.

    The losses of the batches are weighted by their labelled pixels. ``watch`` is called with the
    logits and masks of each batch. A ``group`` adds up what its processes find in loaders of their own.
    """
    model.eval()
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    mean = MeanLoss("validation", device, precision)
    group = group or ProcessGroup()
    with torch.inference_mode():
        for images, masks in loader:
            if stop_requested():
                break  # each process has other batches: they end it together below
            with autocast(device, precision):
                logits = model(images)
            logits = logits.float()
            mean.add(loss(logits, masks), count_labelled(masks, logits))
            matrix += confusion_matrix(predict_classes(logits), masks, num_classes)
            if watch:
                watch(logits, masks)
    group.heed_stop()
    group.all_reduce(matrix)
    return mean.result(group), matrix.cpu().numpy()


def make_scheduler(
    optimizer, config: TrainingConfig, epochs: int, steps: int = 1, times: float = 1.0
):
    """The learning-rate schedule after the warm-up; None for ``none``.

    It is stepped once per epoch, ``onecycle`` (Smith and Topin 2018) after each of the ``steps`` of
    an epoch. ``plateau`` waits for ``PLATEAU`` epochs, or ``times`` as many where epochs are shorter.
    """
    rate, epochs = config.learning_rate, epochs - config.warmup_epochs
    if config.scheduler == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=0)
    if config.scheduler == "plateau":
        return lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=math.ceil(times * PLATEAU)
        )
    if config.scheduler == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    return None


def warm_up(optimizer, config: TrainingConfig, epoch: int) -> None:
    """Set the learning rate of the first epochs: even steps up to its value after them."""
    last = config.warmup_epochs + 1
    if config.warmup_epochs and epoch <= last:
        set_rate(optimizer, config.learning_rate * epoch / last)


def set_rate(optimizer, rate: float) -> None:
    """Set the learning rate of all weights."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def freeze_encoder(model: nn.Module, config: TrainingConfig, epoch: int):
    """Take the encoder out of the training of an epoch, or into it; the encoder if it is out."""
    if not config.freeze_encoder_epochs:
        return None
    encoder = getattr(model.network, "encoder", None) or model.network.backbone
    frozen = epoch <= config.freeze_encoder_epochs
    encoder.requires_grad_(not frozen)
    return encoder if frozen else None


def seed_epoch(seed: int, epoch: int, group: ProcessGroup) -> None:
    """Start the generators of an epoch, so that it does not matter where a run began."""
    numbers = np.random.SeedSequence([seed, epoch, group.rank]).generate_state(1)
    torch.manual_seed(int(numbers[0]))
