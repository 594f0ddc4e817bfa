"""``--batch_size auto``: how many patches a GPU has memory for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from common.devices import (
    deterministic,
    free_memory,
    memory_ran_out,
    release_memory,
)
from common.distributed import ProcessGroup
from common.errors import SegmentationError
from common.files import fingerprint
from training.loop import SinglePatchError, evaluate, train_one_epoch
from training.outputs import folds_trained_alone, run_files
from training.resume import read_state
from training.run import TrainingRun, build, make_stepper
from training.samples import SampleIndex
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")

MOST = 64  # patches
# main memory that runs out ends other programs, or has the system swap, and tells no size
TRIED = ("cuda",)
UNTRIED = 4  # patches, on other devices
# of the free memory: for what a run has beside the batches of the trial, as a last one of another
# size, and for other programs
SPARE = 0.05
TINY_RATE = 1e-9  # the trial is about memory; weights that stay keep the loss a number


def settle_batch_size(
    config: TrainingConfig,
    train: SampleIndex,
    fewest: int,
    device: torch.device,
    group: ProcessGroup,
) -> TrainingConfig:
    """The settings with a number of patches per batch, the same in all processes.

    A run that is resumed, and folds that are trained alone, keep the number that was found before.

    Args:
        config: Those of a run, with any ``batch_size``.
        train: Patches to try with.
        fewest: Patches that a model of the run trains on at least.
        device: Of this process.
        group: The processes that train.

    Raises:
        SegmentationError: The memory is too small for any batch.
    """
    if config.batch_size != "auto":
        return config
    size, why = group.broadcast(former_batch_size, config), "as before"
    if size is None and device.type not in TRIED:
        size, why = UNTRIED, f"larger batches are tried on {TRIED[0]} alone"
    elif size is None:
        most = max(1, min(MOST, fewest // group.size))
        size = group.least(try_batches(config, train, most, device, group))
        release_memory(device)
        why = "the most that it takes"
        if 2 * size <= most:
            why = f"the memory does not hold {2 * size}"
        elif most < MOST:
            why = f"for {fewest} to train on"
    if not size:
        raise SegmentationError(
            f"The memory of {device} is too small for any batch; cut smaller patches, or take a "
            "smaller --model or --encoder_name"
        )
    log.info("--batch_size auto: %d patches, %s", size, why)
    return replace(config, batch_size=size)


def former_batch_size(config: TrainingConfig) -> int | None:
    """The size of the batches of a run that is continued, or of other folds that are trained alone.

    None where there is none.
    """
    if config.resume or folds_trained_alone(config):
        for file in last_epochs(config.run_dir):
            return read_state(file)[1]["batch_size"]
    if config.only_fold is None:
        return None
    present = fingerprint(config)
    del present["batch_size"]
    for file in last_epochs(config.save_dir):
        if file.parent != Path(config.run_dir):
            former = read_state(file)[1]
            if all(former.get(name) == value for name, value in present.items()):
                return former["batch_size"]
    return None


def last_epochs(folder: str) -> list[Path]:
    """The files of a run that ``--resume`` continues from, those of its folds too."""
    files = [file for file in run_files(folder) if file.name == "model_last.pth"]
    return sorted(file for file in files if file.is_file())


def try_batches(
    config: TrainingConfig,
    train: SampleIndex,
    most: int,
    device: torch.device,
    group: ProcessGroup,
) -> int:
    """The largest batch that a device has memory for; 0 for none.

    Nothing of the trial stays: it has a model of its own, and random numbers continue as before.
    """
    trial = replace(
        config,
        batch_size=most,
        learning_rate=TINY_RATE,
        scheduler="none",
        num_workers="0",
    )
    run = TrainingRun(trial, train, None, Path(config.save_dir), [], 1, device)
    with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
        if not memory_suffices(device, build, run):
            return 0
        spare = math.ceil(SPARE * free_memory(device))
        if group.store is not None:  # the gradients that processes exchange
            spare += sum(p.numel() * p.element_size() for p in run.model.parameters())

        def fits(size: int) -> bool:
            return memory_suffices(device, train_and_evaluate, run, size, spare)

        return largest_batch(fits, most)


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 2, 4, 8... up to ``most`` that fits; 1 where 2 does not, 0 where 1 neither.

    A single patch comes last, since several models cannot train on it.
    """
    size = min(2, most)
    if not fits(size):
        try:
            return int(size == 2 and fits(1))
        except SinglePatchError:
            return 0
    while 2 * size <= most and fits(2 * size):
        size *= 2
    return size


def memory_suffices(device: torch.device, action: Callable, *arguments) -> bool:
    """Whether an action ends without the memory running out; what it took is given back then."""
    try:
        action(*arguments)
        return True
    except Exception as error:  # of several classes, see memory_ran_out
        if not memory_ran_out(error):
            raise
    release_memory(device)  # here the error no longer holds what it has seen
    return False


def train_and_evaluate(run: TrainingRun, size: int, spare: int) -> None:
    """Train a run's model for steps on a batch of its first patches, and evaluate it on them.

    From the second step on there are gradients, state of the optimizer and the logits of the step
    before, and ``spare`` bytes stay free all the time. The scores of a final model are computed in
    float32.
    """
    device, model = run.device, run.model
    model.zero_grad(set_to_none=True)  # of a batch that was too large
    kept_free = torch.empty(spare, dtype=torch.uint8, device=device)
    (batch,) = run.loader(run.train.subset(range(size)), training=True)
    batches = [batch] * 2
    stepper, _ = make_stepper(run, len(batches))
    with deterministic(device):
        for _ in range(2):
            train_one_epoch(model, batches, run.loss, stepper, device, run.precision)
    evaluate(model, [batch], run.loss, device, run.model_config.label_classes)
    del kept_free
