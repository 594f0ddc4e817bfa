"""The epochs of a run: training, validation, best checkpoints, early stopping."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from common.devices import deterministic
from common.distributed import distribute
from common.files import atomic_write
from common.scores import HEADLINES, scores_of_labelled
from common.text import duration
from evaluation.reports import plot_training, write_log
from model_training import combined_score, scores
from training.loop import (
    evaluate,
    freeze_encoder,
    seed_epoch,
    set_rate,
    train_one_epoch,
    warm_up,
)
from training.resume import ResumeState
from training.run import History, TrainingRun, make_stepper

log = logging.getLogger("semanticseg4eo")

BUSY = 2.5  # times what the computing of an epoch explains
BUSY_SECONDS = 5  # of an epoch; a shorter one says little
PLOT_SECONDS = 60  # at least, between two plots of a running training


def fit(run: TrainingRun) -> History:
    """Train a built run: epochs, best checkpoints, early stopping, log and plot.

    Without validation patches all epochs are run and no best checkpoint is written.
    """
    config, model, group, history = run.config, run.model, run.group, run.history
    training = run.loader(run.train, training=True)
    # None without validation patches; a process may have a loader without batches
    validation = run.loader(run.validation) if run.validation else None
    state = ResumeState(run, *make_stepper(run, len(training)))
    stepper = state.stepper
    if config.resume:
        state.load()
    wrapped, was_frozen = None, None
    reported = plotted = time.perf_counter()
    computed, told = time.process_time(), False
    first = len(history.rows) + 1
    for epoch in range(first, run.epochs + 1):
        waited = history.epochs_since_rise()
        if run.validation and config.patience and waited >= config.patience:
            log.info("no better combined score for %d epochs: stopping", waited)
            break
        training.batch_sampler.epoch = epoch
        seed_epoch(config.seed, epoch, group)
        warm_up(stepper.optimizer, config, epoch)
        if run.rates:
            set_rate(stepper.optimizer, run.rates[epoch - 1])
        frozen = freeze_encoder(model, config, epoch)
        if wrapped is None or frozen is not was_frozen:
            wrapped = distribute(model, run.device, group, run.model_config.in_channels)
            was_frozen = frozen
        rate = stepper.optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch, "learning_rate": rate}
        row["train_loss"] = train_epoch(run, wrapped, training, stepper, frozen)
        group.broadcast_buffers(model)
        history.rows.append(row)
        better = validate(run, validation, row) if run.validation else []
        # from report to report, so that what the last epoch wrote is counted too
        row["seconds"], reported = time.perf_counter() - reported, time.perf_counter()
        used, computed = time.process_time() - computed, time.process_time()
        told = told or warn_of_busy_machine(row["seconds"], used, run.device)
        state.advance()
        log.info(epoch_line(history.rows[first - 1 :], run.epochs, better))
        if group.is_main_process:
            state.save()
            write_log(run.save_dir / "model_training_log.csv", history.rows)
            if time.perf_counter() - plotted >= PLOT_SECONDS:
                picture = run.save_dir / "model_training_plot.png"
                plot_training(picture, {"history": history.rows})
                plotted = time.perf_counter()
        group.barrier()  # no process continues without what is needed to resume
    return history


def warn_of_busy_machine(seconds: float, computed: float, device) -> bool:
    """Whether, and a line where, an epoch took much longer than its computing explains.

    Args:
        seconds: Of the epoch.
        computed: Seconds of all cores that this process used.
        device: With threads of PyTorch's that wait for each other where it is the CPU.
    """
    threads = torch.get_num_threads()
    explained = computed / threads
    usual = seconds < max(BUSY_SECONDS, BUSY * explained)
    if usual or device.type != "cpu" or threads == 1:
        return False
    log.warning(
        "an epoch of %.0f s used %.0f s of %d cores: is the machine busy with other work? "
        "Then one thread, which waits for no other, is faster (OMP_NUM_THREADS=1)",
        seconds, computed, threads,
    )  # fmt: skip
    return True


def train_epoch(run: TrainingRun, model, training, stepper, frozen) -> float:
    """Train a run's model on its loader for an epoch; see ``train_one_epoch``."""
    sampler = training.batch_sampler
    bar = tqdm(
        training,
        desc=f"epoch {sampler.epoch}",
        unit="batch",
        leave=False,
        disable=None if run.group.is_main_process else True,
    )
    labelled = sampler.sums(run.train.counts.sum(axis=1))
    with deterministic(run.device):
        return train_one_epoch(
            model, bar, run.loss, stepper, run.device, run.precision, run.group, frozen, labelled
        )  # fmt: skip


def validate(run: TrainingRun, validation, row: dict) -> list[str]:
    """Evaluate an epoch, add its scores to its row, write the best checkpoints that it improves.

    Returns:
        The criteria by which it is the best so far.
    """
    row["val_loss"], matrix = evaluate(
        run.model,
        validation,
        run.loss,
        run.device,
        run.model_config.label_classes,
        precision=run.precision,
        group=run.group,
    )
    binary = run.config.mode == "binary"
    result = scores(matrix, run.names, binary)
    row |= {f"val_{key}": result[key] for key in HEADLINES}
    # chosen by the classes that the labels hold, the same in every epoch
    held = scores_of_labelled(matrix, run.names, binary)
    row["val_combined"] = combined_score(held)
    row["val_false_alarms"] = false_alarms(matrix)
    values = {
        "loss": row["val_loss"],
        "iou": held["iou"] or 0.0,  # None where there is no foreground at all
        "combined": row["val_combined"],
    }
    better = [
        name
        for name, value in values.items()
        if run.history.improve(name, value, higher=name != "loss")
    ]
    if better and run.group.is_main_process:
        metrics = {"epoch": row["epoch"], "validation": result}
        written = run.save(f"best_{better[0]}", metrics)
        for name in better[1:]:  # the same in all; a copy takes half as long as saving
            with atomic_write(run.save_dir / f"model_best_{name}.pth") as part:
                shutil.copyfile(written, part)
    return better


def false_alarms(matrix: np.ndarray) -> float:
    """The share of labelled pixels that are mapped as a class which no label holds."""
    absent = matrix.sum(axis=1) == 0
    return float(matrix[:, absent].sum() / max(matrix.sum(), 1))


def epoch_line(rows: Sequence[dict], epochs: int, better: Sequence[str]) -> str:
    """One aligned line that reports an epoch, the last of those run since the start."""
    row = rows[-1]

    def number(key: str) -> str:
        return "    -" if row.get(key) is None else f"{row[key]:.3f}"

    parts = [f"epoch {row['epoch']:>4}/{epochs}", f"loss {row['train_loss']:.4f}"]
    if "val_loss" in row:
        parts += [f"val {row['val_loss']:.4f}", f"IoU {number('val_iou')}"]
        parts += [f"F1 {number('val_f1')}", f"kappa {number('val_kappa')}"]
    parts += [f"lr {row['learning_rate']:.1e}", f"{row['seconds']:.1f} s"]
    # the first epoch of several takes longer than others
    usual = np.mean([row["seconds"] for row in (rows[1:] or rows)])
    parts.append(f"left {duration((epochs - row['epoch']) * usual)}")
    return "  ".join(parts) + (f"  * best {', '.join(better)}" if better else "")
