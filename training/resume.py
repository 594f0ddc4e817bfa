"""How far a run has come, stored so that the same command resumes from there."""

from __future__ import annotations

import functools
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from common.devices import native_precisions
from common.errors import CheckpointError
from common.files import compare_runs, fingerprint
from model_training import load_safely
from training.loop import Stepper
from training.outputs import START_ANEW
from training.run import TrainingRun, make_scaler
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")

# what runs of earlier versions do not say of their patches
KNOWN_SINCE_2_0 = ("patch_shape", "band_descriptions", "pixel_values")


def fixed_settings(config: TrainingConfig) -> dict:
    """The settings that a resumed run must share, and folds with each other."""
    fixed = fingerprint(config)
    if config.scheduler in ("plateau", "none"):
        del fixed["epochs"]  # no learning rate depends on them
    return fixed


@dataclass
class ResumeState:
    """How far a run has come: with its weights and history, all that it needs to continue.

    The generators are not part of it: order, variation and dropout of an epoch depend on the seed
    and the epoch alone (``EpochBatchSampler``, ``PatchDataset``, ``seed_epoch``).
    """

    run: TrainingRun
    stepper: Stepper
    scheduler: object

    def advance(self) -> None:
        """Step the schedule of epochs after one, unless it warms up, is one of steps, or the rates
        are given.
        """
        row, config = self.run.history.rows[-1], self.run.config
        warming = row["epoch"] <= config.warmup_epochs
        if warming or self.stepper.scheduler or self.run.rates:
            return
        if config.scheduler == "plateau":
            self.scheduler.step(row["val_loss"])
        elif self.scheduler:
            self.scheduler.step()

    def save(self) -> None:
        """Write ``model_last.pth``."""
        history = self.run.history
        metrics = {"epoch": len(history.rows)}
        self.run.save("last", metrics, {
            "rows": history.rows,
            "best": history.best,
            "best_epoch": history.best_epoch,
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "run_fingerprint": self.run_fingerprint | {"precision": self.run.precision},
        })  # fmt: skip

    @functools.cached_property
    def run_fingerprint(self) -> dict:
        """What a resumed run must share: settings, patches, processes."""
        run = self.run
        fixed = fixed_settings(run.config)
        patches, values = hashlib.sha256(), hashlib.sha256()
        for index in (run.train, run.validation):
            if index:
                patches.update("\n".join(pair.name for pair in index.pairs).encode())
                patches.update(index.counts.tobytes())
                for sample in index.samples:
                    values.update(sample.tobytes())
        if run.start:
            fixed["start_from"] = run.start.record["sha256"]
        return fixed | {
            "patch_shape": list(run.train.shape),
            "band_descriptions": list(run.train.descriptions),
            "patches": patches.hexdigest(),
            "pixel_values": values.hexdigest(),
            "processes": run.group.size,
        }

    def load(self) -> None:
        """Continue from ``model_last.pth``, where there is one.

        Raises:
            SegmentationError: It cannot be read, or belongs to another run.
        """
        run, path = self.run, self.run.last_file
        if not path.exists():
            log.info("no run to resume in %s: starting", run.save_dir)
            return
        stored, former = read_state(path)
        state = stored["training_state"]
        if "epochs" in former:  # in which earlier versions stored those of the run
            former["epochs"] = stored["metadata"]["training_params"]["epochs"]
        precision = former.pop("precision", run.precision)
        unknown = [key for key in KNOWN_SINCE_2_0 if key not in former]
        present = {k: v for k, v in self.run_fingerprint.items() if k not in unknown}
        compare_runs(former, present, path, START_ANEW)
        if "belongs_to" in state and run.group.size > 1:
            raise CheckpointError(
                f"{path} was written by {run.group.size} processes of version 1.1, which computed "
                f"the loss of the joint batch; {START_ANEW}"
            )
        run.model.network.load_state_dict(stored["model_state_dict"])
        self.stepper.optimizer.load_state_dict(state["optimizer"])
        run.precision = resumed_precision(precision, run)
        self.stepper.scaler = make_scaler(run)
        if state["scaler"]:  # else it began in another precision than fp16
            self.stepper.scaler.load_state_dict(state["scaler"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        history = run.history
        history.rows = state["rows"]
        history.best, history.best_epoch = state["best"], state["best_epoch"]
        log.info("resuming after epoch %d of %d", len(history.rows), run.epochs)


def resumed_precision(former: str, run: TrainingRun) -> str:
    """What a run continues in: its former precision where its device computes in that itself, else
    the device's own, which a line says.
    """
    if former in ("fp32", run.precision, *native_precisions(run.device)):
        return former
    log.warning(
        "the run began in %s, in which %s does not compute by itself: it continues in %s",
        *(former, run.device, run.precision),
    )
    return run.precision


def drop_outdated(run: TrainingRun) -> None:
    """Remove the state of a final model of k-fold whose folds, which were continued since, now find
    fewer epochs best than it has, or had other learning rates; a line says so.
    """
    if not run.config.resume or not run.last_file.exists():
        return
    rows = read_state(run.last_file)[0]["training_state"]["rows"]
    before, now = [row["learning_rate"] for row in rows], list(run.rates)
    if len(rows) > run.epochs or now and now[: len(rows)] != before:
        text = (
            "the final model starts anew: its %d epochs are not those of the folds now"
        )
        log.info(text, len(rows))
        run.last_file.unlink()


def read_state(path: Path) -> tuple[dict, dict]:
    """What a ``model_last.pth`` holds, and the fingerprint of its run.

    Raises:
        CheckpointError: It cannot be read, or is no such file.
    """
    stored = load_safely(path)
    state = stored.get("training_state") if isinstance(stored, dict) else None
    if not state:
        raise CheckpointError(f"{path} does not hold the state of a run; {START_ANEW}")
    return stored, state.get("run_fingerprint") or state["belongs_to"]  # that of 1.1
