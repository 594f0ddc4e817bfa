"""One model in training: from its settings and patches to its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from common.architectures import ModelConfig
from common.colours import Colour, hex_of_colour
from common.devices import allow_tf32, require_deterministic_cublas
from common.distributed import ProcessGroup, synchronize_batch_norm
from common.patches import joint_headers
from model_training import (
    Normalization,
    balanced_weights,
    build_loss,
    save_checkpoint,
)
from training.dataset import codes_for, colours_for
from training.loaders import make_loader
from training.loop import Stepper, make_scheduler, training_precision
from training.samples import PatchDataset, SampleIndex, band_quartiles
from training.scaling import choose_normalization
from training.settings import TrainingConfig
from training.start import Start, find_start
from training.weights import initial_model


@dataclass
class History:
    """The epochs of one run, a row each, and the best of them."""

    rows: list[dict] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)  # criterion -> value
    best_epoch: dict[str, int] = field(default_factory=dict)

    def improve(self, criterion: str, value: float, higher: bool) -> bool:
        """Record a value; whether it is the best so far. Of equal ones the lower loss is better.

        Scores are equal in all epochs where the validation labels hold one class, or all is right.
        """
        known = self.best.get(criterion)
        better = known is None or (value > known if higher else value < known)
        if higher and value == known:
            former = self.rows[self.best_epoch[criterion] - 1]
            better = self.rows[-1]["val_loss"] < former["val_loss"]
        if better and math.isfinite(value):
            self.best[criterion] = value
            self.best_epoch[criterion] = len(self.rows)
        return better and math.isfinite(value)

    def epochs_since_rise(self) -> int:
        """How many epochs the combined score has not risen for; all where there is none."""
        if "combined" not in self.best:
            return len(self.rows)
        scores = [row.get("val_combined") for row in self.rows]
        best = self.best["combined"]
        first = (
            scores.index(best) + 1 if best in scores else self.best_epoch["combined"]
        )
        return len(self.rows) - first


@dataclass
class TrainingRun:
    """One model in training: all that its epochs and its files need."""

    config: TrainingConfig
    train: SampleIndex
    validation: SampleIndex | None
    save_dir: Path
    names: list[str]
    epochs: int  # at most those of the settings, which the schedule is made for
    device: torch.device
    group: ProcessGroup = field(default_factory=ProcessGroup)
    model: nn.Module = None
    precision: str = "fp32"
    model_config: ModelConfig = None
    normalization: Normalization = None
    colours: list[Colour] = field(default_factory=list)  # of the classes
    quartiles: list[list[float]] | None = None  # of each band's training pixels
    start: Start | None = None
    origin: dict = field(default_factory=dict)  # of the dataset, see ``joint_headers``
    loss: Callable = None
    history: History = field(default_factory=History)
    temperature: float | None = None  # None: not calibrated
    rates: Sequence[float] = ()  # learning rate of each epoch, in place of a schedule
    times: float = 1.0  # as many epochs as the run that it is a part of

    @property
    def last_file(self) -> Path:
        """What the run continues from with ``--resume``."""
        return self.save_dir / "model_last.pth"

    def loader(
        self,
        index: SampleIndex,
        training: bool = False,
        group: ProcessGroup | None = None,
    ):
        config = self.config
        dataset = PatchDataset(
            index, config.ignore_index, config.data_augmentation, config.seed
        )
        return make_loader(
            dataset,
            self.normalization,
            config,
            group or self.group,
            self.device,
            training,
        )

    def save(
        self, name: str, metrics: dict, training_state: dict | None = None
    ) -> Path:
        """Write ``model_<name>.pth`` with what is known so far."""
        path = self.save_dir / f"model_{name}.pth"
        best = self.history.best
        scales, offsets = self.train.scaling or (None, None)
        metadata = {
            "input_size": list(self.train.shape[1:]),
            "pretrained": bool(self.config.weights),
            "class_names": self.names,
            "class_codes": codes_for(self.config, self.train),
            "class_colors": [hex_of_colour(colour) for colour in self.colours],
            "band_descriptions": list(self.train.descriptions),
            "pixel_size": self.train.pixel_size,
            "band_scales": scales,
            "band_offsets": offsets,
            "band_quartiles": self.quartiles,
            **self.origin,
            "started_from": self.start and self.start.record,
            "ignore_index": self.config.ignore_index,
            "training_params": asdict(self.config)
            | {
                "best_val_loss": best.get("loss"),
                "best_val_iou": best.get("iou"),
                "epochs_run": len(self.history.rows),
            },
            "performance_metrics": metrics,
        }
        if name == "final_model" and self.temperature is not None:
            metadata["temperature"] = self.temperature
        save_checkpoint(
            path,
            self.model,
            self.model_config,
            self.normalization,
            metadata,
            training_state,
        )
        return path


def build(run: TrainingRun) -> None:
    """Build a run's model, normalization and loss from its settings and training patches.

    The colours of its classes are found too.
    """
    config, index = run.config, run.train
    run.colours = colours_for(config, index)
    run.start = find_start(config, index)
    run.quartiles = band_quartiles(index.samples)
    run.origin = joint_headers(index.headers)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.deterministic = True
    require_deterministic_cublas()
    if run.device.type == "cuda":
        allow_tf32("fp32")  # float32 is not rounded, as in the prediction
    run.model_config = config.model_config(index.shape[0])
    resumed = config.resume and run.last_file.exists()
    run.model = initial_model(config, index, resumed, run.start)
    run.normalization = choose_normalization(config, index, run.start)
    synchronize_batch_norm(run.model, run.device, run.group)
    run.model.to(run.device, memory_format=torch.channels_last)
    run.precision = training_precision(config.amp, run.device)
    class_weights = None
    if config.use_class_weights:
        weights = balanced_weights(index.counts.sum(axis=0))
        # there once, since a GPU stops for each upload
        class_weights = torch.from_numpy(weights).float().to(run.device)
    run.loss = build_loss(config.loss, config.mode, config.ignore_index, class_weights)


def make_stepper(run: TrainingRun, batches: int) -> tuple[Stepper, object]:
    """What takes the steps of a run, and its schedule (of epochs, if the stepper has none)."""
    config = run.config
    optimizer = torch.optim.AdamW(
        run.model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    steps = math.ceil(batches / config.accumulate)
    # of all epochs, also where a run ends before, as the final model of k-fold does
    scheduler = make_scheduler(optimizer, config, config.epochs, steps, run.times)
    stepper = Stepper(
        optimizer,
        make_scaler(run),
        config.clip_grad,
        scheduler if config.scheduler == "onecycle" else None,
        config.accumulate,
    )
    return stepper, scheduler


def make_scaler(run: TrainingRun) -> torch.amp.GradScaler:
    """What keeps small gradients from vanishing; it does nothing but in fp16."""
    return torch.amp.GradScaler(run.device.type, enabled=run.precision == "fp16")
