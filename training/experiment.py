"""A whole training run, from the settings to the report."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict, replace
from pathlib import Path

from common.architectures import is_weights_file
from common.devices import local_device
from common.distributed import ProcessGroup, init_distributed, torch_errors
from common.errors import DatasetError
from common.files import write_json
from common.legends import read_colours
from common.machine import tune_malloc
from common.patches import list_pairs
from common.repeat import command_line
from model_training import check_architecture
from training.assessment import export
from training.batch_size import settle_batch_size
from training.classes import settle_classes
from training.cross_validation import cross_validate
from training.curve import learning_curve, plan_curve
from training.dataset import (
    index_split,
    log_weak_spots,
    names_for,
    require_patches,
    require_several_classes,
)
from training.epochs import fit
from training.loop import training_precision
from training.outputs import (
    clear_former_run,
    folds_trained_alone,
    require_output,
    writing_alone,
)
from training.run import TrainingRun, build
from training.samples import make_cache
from training.scaling import require_start_units, require_units
from training.settings import TrainingConfig
from training.start import (
    keep_copy,
    report_start,
    require_another_place,
    settle_model,
)
from training.weights import find_weights

log = logging.getLogger("semanticseg4eo")

SCARCE = "--batch_size or --num_workers"  # what takes memory


def run_experiment(config: TrainingConfig) -> dict:
    """Train as the settings say, write all files of ``--save_dir``; the report.

    Raises:
        SegmentationError: Anything in the data or the settings that cannot be right, found before
            training begins; memory that is too small, or a process that was lost.
    """
    device = local_device(config.device)
    training_precision(config.amp, device)
    config = settle_classes(settle_model(config))
    for check in PREFLIGHT_CHECKS:
        check(config)
    require_patches(config)
    run_kind = train_split if config.val_strategy == "split" else cross_validate
    run_dir, asked_to_resume = Path(config.run_dir), config.resume
    if found := folds_trained_alone(config):
        names = ", ".join(file.parent.name for file in found)
        log.info("gathering what --only_fold has trained: %s", names)
        config = replace(config, resume=True)
    if device.type == "cpu":
        tune_malloc()
    gpu = device if device.type == "cuda" else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_errors(device, SCARCE))
        group = stack.enter_context(init_distributed(gpu))
        if group.is_main_process:
            stack.enter_context(writing_alone(config))
        config, result = run_kind(config, device, group)
        config = replace(config, resume=asked_to_resume)
        report = {
            "val_strategy": config.val_strategy,
            "settings": asdict(config),
            "command": command_line("main.py", config),
            **result,
        }
        if group.is_main_process:
            write_json(run_dir / "model_metrics.json", report)
    return report


def require_model(config: TrainingConfig) -> None:
    """Raise SegmentationError where the model cannot be built at all, or its weights are not there."""
    check_architecture(config.model_config(config.in_channels or 1), config.weights)
    if is_weights_file(config.weights) and not config.resume:
        find_weights(config.weights)


def require_test(config: TrainingConfig) -> None:
    """Raise DatasetError where areas are to be estimated without a test split."""
    if config.area_estimation and not list_pairs(
        config.dataset_root, "test", required=False
    ):
        raise DatasetError(
            f"--area_estimation: {config.dataset_root} has no test split to estimate the map's "
            "errors from; leave it out, or extract with a --test_ratio"
        )


def require_colours(config: TrainingConfig) -> None:
    """Raise OptionError where colours of classes cannot be read."""
    if config.class_colors:
        read_colours(config.class_colors)


# what can be checked before any patch is read
PREFLIGHT_CHECKS = (
    require_model, require_output, require_test, require_colours, require_another_place,
)  # fmt: skip


def train_split(
    config: TrainingConfig, device, group: ProcessGroup
) -> tuple[TrainingConfig, dict]:
    """Train on train/, choose on validation/, evaluate the final model on test/.

    Returns:
        The settings with the batch size that was found, and the report.
    """
    cache = make_cache(config)
    train = index_split(config, "train", None, cache)
    validation = index_split(config, "validation", train, cache)
    test = index_split(config, "test", train, required=False)
    require_several_classes(train)
    train = train.beside(validation, test)
    require_units(config, train)
    config = settle_batch_size(config, train, len(train.pairs), device, group)
    parts = plan_curve(config, train, group) if config.learning_curve else {}
    run = TrainingRun(
        config, train, validation, Path(config.save_dir), names_for(config, train), config.epochs,
        device, group,
    )  # fmt: skip
    build(run)
    require_start_units(config, train, run.start)
    group.broadcast(clear_former_run, config)
    group.broadcast(keep_copy, config)
    if group.is_main_process:
        report_start(run.start, run.names, config.mode == "binary")
        log_weak_spots(config, train, validation, test, group)
    fit(run)
    report = group.broadcast(export, run, test)
    if parts:
        report["learning_curve"] = learning_curve(run, test, parts)
    return config, report
