"""``main.py --check``: the problems of a run, and what it will take."""

from __future__ import annotations

import time
from pathlib import Path

from common import SPLITS
from common.console import Problems
from common.devices import deterministic, local_device, peak_memory
from common.distributed import ProcessGroup, torch_errors
from common.patches import list_pairs
from common.text import duration
from training.dataset import (
    log_weak_spots,
    names_for,
    needed_splits,
    require_several_classes,
    require_usable,
)
from training.experiment import PREFLIGHT_CHECKS, SCARCE
from training.folds import plan_all_folds
from training.loop import evaluate, train_one_epoch, training_precision
from training.run import TrainingRun, build, make_stepper
from training.samples import SampleIndex, index_samples
from training.settings import TrainingConfig


def check_experiment(config: TrainingConfig) -> tuple[Problems, dict]:
    """Check all that a run would need, and do none of its work.

    Returns:
        The problems found, a line each; and, where there are none, what the run will take:
        "patches" per split, "parameters", "epoch_seconds" and "total_seconds" at most (measured on
        a batch), and "memory" in bytes (of the GPU, else of this process).
    """
    problems = Problems()
    device = problems.attempt(local_device, config.device)
    if device:
        problems.attempt(training_precision, config.amp, device)
    for check in PREFLIGHT_CHECKS:
        problems.attempt(check, config)
    splits: dict[str, SampleIndex] = {}
    like = None
    for split in SPLITS:
        needed = split in needed_splits(config)
        pairs = problems.attempt(list_pairs, config.dataset_root, split, needed) or []
        classes, ignored = config.label_classes, config.ignore_index
        index = index_samples(pairs, classes, ignored, like, problems=problems)
        if index:
            like, splits[split] = like or index, index
            problems.attempt(require_usable, config, split, index)
    train, validation = splits.get("train"), splits.get("validation")
    if train and config.val_strategy == "kfold":
        train, validation = train + validation if validation else train, None
        problems.attempt(plan_all_folds, config, train)
    if train:
        problems.attempt(require_several_classes, train)
    if problems:
        return problems, {}
    log_weak_spots(config, train, validation, splits.get("test"), ProcessGroup())
    names, place = names_for(config, train), Path(config.save_dir)
    run = TrainingRun(config, train, validation, place, names, config.epochs, device)
    outlook = problems.attempt(measure_run, run) or {}
    patches = {split: len(index.pairs) for split, index in splits.items()}
    return problems, outlook | {"patches": patches}


def measure_run(run: TrainingRun) -> dict:
    """Build a run's model, train and evaluate a batch; what the run will take by that.

    Returns:
        See ``check_experiment``.
    """
    with torch_errors(run.device, SCARCE):
        build(run)
        return measure_batches(run)


def measure_batches(run: TrainingRun) -> dict:
    """See ``measure_run``, for a run that is built."""
    config, device, seconds = run.config, run.device, []
    loader = run.loader(run.train, training=True)
    stepper, _ = make_stepper(run, len(loader))
    batch = next(iter(loader))
    options = stepper, device, run.precision
    for _ in range(2):  # libraries warm up in the first
        started = time.perf_counter()
        with deterministic(device):
            train_one_epoch(run.model, [batch], run.loss, *options)
        middle = time.perf_counter()
        classes = run.model_config.label_classes
        evaluate(run.model, [batch], run.loss, device, classes, None, run.precision)
        seconds = [middle - started, time.perf_counter() - middle]
    checked = len(run.validation.pairs) if run.validation else 0
    epoch = seconds[0] * len(loader) + seconds[1] * checked / config.batch_size
    runs = 1.0
    if config.val_strategy == "kfold":
        kinds = 2 if config.fold_by == "both" else 1
        # each fold trains on (n - 1) / n of all patches
        runs += kinds * (config.n_splits - 1)
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "epoch_seconds": epoch,
        "total_seconds": epoch * config.epochs * runs,
        "memory": peak_memory(device),
    }


def outlook_text(outlook: dict) -> str:
    """What a run will take, as text; see ``check_experiment``."""
    patches = ", ".join(f"{n} {split}" for split, n in outlook["patches"].items())
    lines = [
        f"patches       {patches}",
        f"parameters    {outlook['parameters'] / 1e6:.1f} million",
        f"an epoch      {duration(outlook['epoch_seconds'])}",
        f"all epochs    {duration(outlook['total_seconds'])} at most, less if training stops early",
    ]
    if outlook["memory"]:
        lines.append(f"memory        {outlook['memory'] / 1e9:.1f} GB")
    return "\n".join([*lines, "No problems found."])
