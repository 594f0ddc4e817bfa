"""``main.py --check``: the problems of a run, and what it will take."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from common import SPLITS
from common.architectures import ModelConfig
from common.console import Problems
from common.devices import deterministic, local_device, peak_memory
from common.distributed import ProcessGroup, torch_errors
from common.text import duration
from training.batch_size import settle_batch_size
from training.classes import settle_classes, settle_without_dataset
from training.curve import part_run, plan_curve, require_batches
from training.dataset import (
    index_split,
    log_weak_spots,
    names_for,
    needed_splits,
    require_several_classes,
)
from training.experiment import PREFLIGHT_CHECKS, SCARCE
from training.folds import fewest_patches, plan_all_folds
from training.loop import evaluate, train_one_epoch, training_precision
from training.resume import ResumeState
from training.run import TrainingRun, build, make_stepper
from training.samples import SampleIndex, make_cache
from training.scaling import require_start_units, require_units
from training.settings import TrainingConfig
from training.start import (
    find_start,
    report_start,
    require_same_start,
    settle_model,
)


def check_experiment(config: TrainingConfig) -> tuple[Problems, dict]:
    """Check all that a run would need, and do none of its work.

    Returns:
        The problems found, a line each; and, where there are none, what the run will take:
        "patches" per split, "batch_size", "parameters", "epoch_seconds" and "total_seconds" at most
        (measured on a batch), "memory" in bytes (of the GPU, else of this process), and "advice" or
        None.
    """
    problems = Problems()
    device = problems.attempt(local_device, config.device)
    if device:
        problems.attempt(training_precision, config.amp, device)
    config = problems.attempt(settle_model, config) or without_start(config)
    settled = problems.attempt(settle_classes, config)
    config = settled or settle_without_dataset(config)
    for check in PREFLIGHT_CHECKS:
        problems.attempt(check, config)
    splits: dict[str, SampleIndex] = {}
    like, cache, started = None, make_cache(config), time.perf_counter()
    for split in SPLITS:
        needed, kept = split in needed_splits(config), split != "test" and cache or None
        options = config, split, like, kept, needed, problems
        if index := problems.attempt(index_split, *options):
            like, splits[split] = like or index, index
    reading = time.perf_counter() - started
    train, validation = splits.get("train"), splits.get("validation")
    fewest = len(train.pairs) if train else 0
    if train and config.val_strategy == "kfold":
        train, validation = train + validation if validation else train, None
        if planned := problems.attempt(plan_all_folds, config, train):
            fewest = fewest_patches(planned[0])
    if train:
        problems.attempt(require_several_classes, train)
        problems.attempt(require_units, config, train)
        start = problems.attempt(find_start, config, train)
        if start or not config.start_from:
            problems.attempt(require_same_start, config, start)
            problems.attempt(require_start_units, config, train, start)
    group, parts = ProcessGroup(), {}
    if train and config.learning_curve:
        parts = problems.attempt(plan_curve, config, train, group)
    if problems:
        return problems, {}
    options = config, train, fewest, device, group
    config = problems.attempt(settle_batch_size, *options)
    if not config:
        return problems, {}
    log_weak_spots(config, train, validation, splits.get("test"), group)
    names, place = names_for(config, train), Path(config.save_dir)
    report_start(start, names, config.mode == "binary")
    run = TrainingRun(config, train, validation, place, names, config.epochs, device)
    outlook = problems.attempt(measure_run, run, parts) or {}
    if outlook:
        outlook["total_seconds"] += reading
    patches = {split: len(index.pairs) for split, index in splits.items()}
    sizes = {"patches": patches, "batch_size": config.batch_size}
    return problems, outlook | sizes | {"advice": weights_advice(config)}


def without_start(config: TrainingConfig) -> TrainingConfig:
    """The settings with which the rest is checked where ``--start_from`` cannot be read."""
    names = {"start_from": None, "sensor": None, "normalization_from": "auto"}
    return replace(config, model=config.model or "unet", **names)


def measure_run(run: TrainingRun, parts: Mapping[int, np.ndarray]) -> dict:
    """Build a run's model, train and evaluate a batch; what the run will take by that.

    Args:
        run: Not yet built.
        parts: See ``plan_curve``; none without a learning curve.

    Returns:
        See ``check_experiment``.

    Raises:
        DatasetError: A part is too small for the batches.
    """
    for share, chosen in parts.items():  # with the batch size that was found
        patches = len(chosen), len(run.train.pairs)
        require_batches(run.config, share, *patches, run.group)
    further = [part_run(run, *part) for part in parts.items()]
    with torch_errors(run.device, SCARCE):
        build(run)
        return measure_batches(run, further)


def measure_batches(run: TrainingRun, parts: Sequence[TrainingRun]) -> dict:
    """See ``measure_run``, for a run that is built, and those of its parts."""
    config, device = run.config, run.device
    stepper, scheduler = make_stepper(run, len(run.loader(run.train, training=True)))
    stepper.scheduler = None  # that of a run may have fewer steps than are measured
    # read by this process alone: as if nothing were prepared ahead
    alone = replace(run, config=replace(config, num_workers="0"))
    loader = alone.loader(run.train, training=True)
    moments, batch = [time.perf_counter()], None
    for batch in islice(loader, 2):
        moments.append(time.perf_counter())
    reading = np.diff(moments).max()
    options = stepper, device, run.precision
    for _ in range(2):  # libraries warm up in the first
        started = time.perf_counter()
        with deterministic(device):  # as a training does
            train_one_epoch(run.model, [batch], run.loss, *options)
        trained = time.perf_counter()
        classes = run.model_config.label_classes
        evaluate(run.model, [batch], run.loss, device, classes, None, run.precision)
        training, validating = trained - started, time.perf_counter() - trained
    checked = len(run.validation.pairs) if run.validation else 0
    learning = (reading + training) * len(loader)
    others = (reading + validating) * math.ceil(checked / config.batch_size)
    others += writing_seconds(run, stepper, scheduler)
    total = (learning + others) * config.epochs * trainings(config)
    for part in parts:  # of more epochs, each with all of the validation
        share = len(part.train.pairs) / len(run.train.pairs)
        total += (learning * share + others) * part.epochs
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "epoch_seconds": learning + others,
        "total_seconds": total,
        "memory": peak_memory(device),
    }


def trainings(config: TrainingConfig) -> float:
    """How many times all patches are trained on: by one model, or by those of folds too."""
    if config.val_strategy != "kfold":
        return 1.0
    of_fold = (config.n_splits - 1) / config.n_splits
    if config.only_fold is not None:
        return of_fold
    kinds = 2 if config.fold_by == "both" else 1
    return 1 + kinds * config.n_splits * of_fold


def weights_advice(config: TrainingConfig) -> str | None:
    """A line on pretrained weights, where they were measured to help and the library has some."""
    from segmentation_models_pytorch.encoders import encoders
    from timm.models import is_model_pretrained

    name = config.model_config(1).encoder_name
    whole = config.depth == ModelConfig.encoder_depth  # as measured
    if config.model != "unet" or not whole or config.weights or config.start_from:
        return None
    if name.startswith("tu-"):
        known = is_model_pretrained(name.removeprefix("tu-"))
    else:
        known = "imagenet" in encoders.get(name, {}).get("pretrained_settings", {})
    text = "try --pretrained, better in 14 of 15 trainings (docs/measurements.md)"
    return text if known else None


def writing_seconds(run: TrainingRun, stepper, scheduler) -> float:
    """How long the files of an epoch take to be written, by those of a folder that goes again."""
    place = run.save_dir.resolve()
    there = next(path for path in (place, *place.parents) if path.is_dir())
    with tempfile.TemporaryDirectory(dir=there) as folder:
        aside = replace(run, save_dir=Path(folder))
        started = time.perf_counter()
        ResumeState(aside, stepper, scheduler).save()
        last = time.perf_counter()
        aside.save("best_loss", {})
        best = time.perf_counter() - last
    # an epoch may be the best by all three criteria
    return last - started + 3 * best


def outlook_text(outlook: dict) -> str:
    """What a run will take, as text; see ``check_experiment``."""
    patches = ", ".join(f"{n} {split}" for split, n in outlook["patches"].items())
    lines = [
        f"patches       {patches}",
        f"a batch       {outlook['batch_size']} patches",
        f"parameters    {outlook['parameters'] / 1e6:.1f} million",
        f"an epoch      {duration(outlook['epoch_seconds'])}",
        f"all epochs    {duration(outlook['total_seconds'])} at most, less if training stops early",
    ]
    if outlook["memory"]:
        lines.append(f"memory        {outlook['memory'] / 1e9:.1f} GB")
    if outlook["advice"]:
        lines.append(f"advice        {outlook['advice']}")
    return "\n".join([*lines, "No problems found."])
