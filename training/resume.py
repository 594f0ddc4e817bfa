"""How far a run has come, stored so that the same command goes on from there."""

from __future__ import annotations

import functools
import hashlib
import logging
from dataclasses import asdict, dataclass

from common.errors import CheckpointError
from model_training import load_safely
from training.loop import Stepper
from training.run import TrainingRun

log = logging.getLogger("semanticseg4eo")

# settings that a resumed run may change, since weights do not depend on them
FREE_SETTINGS = (
    "dataset_root", "save_dir", "num_workers", "cache", "device", "patience", "resume",
    "no_calibration", "area_estimation",
)  # fmt: skip


@dataclass
class ResumeState:
    """How far a run has come: with its weights and history, all that it needs to go on.

    The generators are not part of it: order, variation and dropout of an epoch depend on the seed
    and the epoch alone (``EpochBatchSampler``, ``PatchDataset``, ``seed_epoch``).
    """

    run: TrainingRun
    stepper: Stepper
    scheduler: object

    def advance(self) -> None:
        """Step the schedule of epochs after one, unless it warms up or is one of steps."""
        row, config = self.run.history.rows[-1], self.run.config
        if row["epoch"] <= config.warmup_epochs or self.stepper.scheduler:
            return
        if config.scheduler == "plateau":
            self.scheduler.step(row.get("val_loss", row["train_loss"]))
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
            "belongs_to": self.origin,
        })  # fmt: skip

    @functools.cached_property
    def origin(self) -> dict:
        """What must be the same when a run goes on: settings, patches, processes, precision."""
        run = self.run
        settings = asdict(run.config)
        fixed = {k: v for k, v in settings.items() if k not in FREE_SETTINGS}
        if run.config.scheduler in ("plateau", "none"):
            del fixed["epochs"]  # no learning rate depends on them
        else:
            fixed["epochs"] = run.epochs
        surveys = [survey for survey in (run.train, run.validation) if survey]
        digest = hashlib.sha256()
        for survey in surveys:
            digest.update("\n".join(pair.name for pair in survey.pairs).encode())
            digest.update(survey.counts.tobytes())
        return fixed | {
            "patches": digest.hexdigest(),
            "processes": run.group.size,
            "precision": run.precision,
        }

    def restore(self) -> None:
        """Go on from ``model_last.pth``, where there is one.

        Raises:
            CheckpointError: It cannot be read, or is of another run.
        """
        run, path = self.run, self.run.save_dir / "model_last.pth"
        if not path.exists():
            log.info("no run to resume in %s: starting", run.save_dir)
            return
        stored = load_safely(path)
        state = stored.get("training_state") if isinstance(stored, dict) else None
        if not state:
            raise CheckpointError(
                f"{path} does not hold the state of a run; leave --resume out to start anew"
            )
        now, before = self.origin, state["belongs_to"]
        for name in sorted(now.keys() | before.keys()):
            if now.get(name) != before.get(name):
                raise CheckpointError(
                    f"{path} is of a run with another {name} ({before.get(name)}, now "
                    f"{now.get(name)}); give the same, or leave --resume out to start anew"
                )
        run.model.network.load_state_dict(stored["model_state_dict"])
        self.stepper.optimizer.load_state_dict(state["optimizer"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        history = run.history
        history.rows = state["rows"]
        history.best, history.best_epoch = state["best"], state["best_epoch"]
        log.info("going on after epoch %d of %d", len(history.rows), run.epochs)
