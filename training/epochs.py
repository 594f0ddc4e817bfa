"""The epochs of a run: training, validation, best checkpoints, early stopping."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from common.distributed import distribute
from common.files import atomic_copy
from common.text import duration
from evaluation.reports import plot_training, write_log
from model_training import HEADLINES, combined_score, scores
from training.loop import evaluate, freeze_encoder, seed_epoch, train_one_epoch, warm_up
from training.resume import ResumeState
from training.run import History, TrainingRun, make_stepper

log = logging.getLogger("semanticseg4eo")


def fit(run: TrainingRun) -> History:
    """Train a prepared run: epochs, best checkpoints, early stopping, log and plot.

    Without validation patches all epochs are run and no best checkpoint is written.
    """
    config, model, group, history = run.config, run.model, run.group, run.history
    training = run.loader(run.train, training=True)
    validation = run.loader(run.validation) if run.validation else None
    progress = ResumeState(run, *make_stepper(run, len(training)))
    stepper = progress.stepper
    if config.resume:
        progress.restore()
    wrapped, was_frozen, told = None, None, time.perf_counter()
    first = len(history.rows) + 1
    for epoch in range(first, run.epochs + 1):
        waited = len(history.rows) - history.best_epoch.get("combined", 0)
        if validation and config.patience and waited >= config.patience:
            log.info("no better combined score for %d epochs: stopping", waited)
            break
        training.batch_sampler.epoch = epoch
        seed_epoch(config.seed, epoch, group)
        warm_up(stepper.optimizer, config, epoch)
        frozen = freeze_encoder(model, config, epoch)
        if wrapped is None or frozen is not was_frozen:
            wrapped = distribute(model, run.device, group, run.model_config.in_channels)
            was_frozen = frozen
        bar = tqdm(
            training,
            desc=f"epoch {epoch}",
            unit="batch",
            leave=False,
            disable=None if group.is_main_process else True,
        )
        rate = stepper.optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch, "learning_rate": rate}
        row["train_loss"] = train_one_epoch(
            wrapped, bar, run.loss, stepper, run.device, run.precision, group, frozen
        )
        history.rows.append(row)
        marks = []
        group.broadcast_buffers(model)
        if validation:
            row["val_loss"], matrix = evaluate(
                model,
                validation,
                run.loss,
                run.device,
                run.model_config.label_classes,
                precision=run.precision,
                group=group,
            )
            result = scores(matrix, run.names, config.mode == "binary")
            row |= {f"val_{key}": result[key] for key in HEADLINES}
            row["val_combined"] = combined_score(result)
            marks = save_best(run, row, result)
        # from line to line, so that what the last epoch wrote is counted too
        row["seconds"], told = time.perf_counter() - told, time.perf_counter()
        progress.advance()
        log.info(epoch_line(history.rows[first - 1 :], run.epochs, marks))
        if group.is_main_process:
            progress.save()
            write_log(run.save_dir / "model_training_log.csv", history.rows)
            picture = run.save_dir / "model_training_plot.png"
            plot_training(picture, {"history": history.rows})
        group.barrier()  # nobody goes on without what is needed to resume
    return history


def save_best(run: TrainingRun, row: dict, result: dict) -> list[str]:
    """Write the best checkpoints that this epoch improves; their criteria."""
    history = run.history
    values = {
        "loss": row["val_loss"],
        "iou": row["val_iou"] or 0.0,  # None where there is no foreground at all
        "combined": row["val_combined"],
    }
    better = [
        name
        for name, value in values.items()
        if history.improve(name, value, higher=name != "loss")
    ]
    if better and run.group.is_main_process:
        metrics = {"epoch": row["epoch"], "validation": result}
        written = run.save(f"best_{better[0]}", metrics)
        for name in better[1:]:  # the same in all
            atomic_copy(written, run.save_dir / f"model_best_{name}.pth")
    return better


def epoch_line(rows: Sequence[dict], epochs: int, marks: Sequence[str]) -> str:
    """One aligned line that tells an epoch, the last of those run since the start."""
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
    return "  ".join(parts) + (f"  * best {', '.join(marks)}" if marks else "")
