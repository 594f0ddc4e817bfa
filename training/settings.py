"""The options of ``main.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common import UNLABELLED
from common.architectures import (
    ARCHITECTURES,
    AUGMENTATIONS,
    ModelConfig,
    check_model_name,
    parse_loss,
)
from common.errors import OptionError, require
from common.options import number_or_auto, setting


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a training run; ``main.py`` makes its options from these fields."""

    dataset_root: str = setting(help="folder that extraction wrote", group="data")
    model: str = setting(help="architecture (see --list_models)", group="model")
    mode: str = setting(
        "binary",
        "one foreground class against background, or several classes",
        "data",
        choices=("binary", "multiclass"),
    )
    classes: int = setting(
        2, "number of classes, for multiclass", "data", alias="--num_classes"
    )
    class_names: str | None = setting(
        None,
        "names in class order, separated by commas",
        "data",
        shown="those stored by the extraction, else class 0, class 1...",
    )
    ignore_index: int = setting(UNLABELLED, "label value that means unlabelled", "data")
    in_channels: int | None = setting(
        None, "bands that the patches must have", "data", shown="the bands of the data"
    )
    normalization: str = setting(
        "dataset",
        "scale by the training split's percentiles per band, or each patch by its own joint one",
        "data",
        choices=("dataset", "image"),
    )
    data_augmentation: str = setting(
        "symmetries",
        "turn and mirror the training patches, or none, or full (the option alone): vary their "
        "brightness and contrast, noise and bands too",
        "data",
        choices=AUGMENTATIONS,
        nargs="?",
        const="full",
    )
    num_workers: str = setting(
        "auto",
        "processes that prepare batches ahead; auto is none where patches are in memory and the "
        "CPU trains",
        "data",
    )
    cache: str = setting(
        "auto",
        "keep decoded patches in memory: as many as fit in a quarter of what is free, all, or none",
        "data",
        choices=("auto", "ram", "off"),
    )
    encoder_name: str = setting(
        ModelConfig.encoder_name, "encoder (see --list_encoders)", "model"
    )
    pretrained: bool = setting(False, "start from the library's weights", "model")
    encoder_weights: str | None = setting(
        None,
        "which pretrained weights: a name (imagenet, ssl...) or a file of encoder weights",
        "model",
        shown="none; imagenet with --pretrained",
    )
    rgb_bands: str | None = setting(
        None,
        "bands that get the red, green and blue kernels of pretrained weights, as 4,3,2",
        "model",
        shown="found from the band descriptions",
    )
    dropout_rate: float = setting(
        ModelConfig.dropout_rate, "dropout of unet-dropout, 0 to 1", "model"
    )
    epochs: int = setting(100, "passes over the training patches", "training")
    batch_size: int = setting(4, "patches per batch, and process", "training")
    accumulate: int = setting(1, "batches per step of the weights", "training")
    amp: str = setting(
        "auto",
        "autocast while training; auto is what the hardware computes natively",
        "training",
        choices=("auto", "off", "bf16", "fp16"),
    )
    learning_rate: float = setting(1e-3, "initial step size of AdamW", "training")
    weight_decay: float = setting(1e-4, "weight decay of AdamW", "training")
    scheduler: str = setting(
        "cosine",
        "how the learning rate falls",
        "training",
        choices=("cosine", "plateau", "onecycle", "none"),
    )
    warmup_epochs: int = setting(
        0, "first epochs in which the learning rate rises to its value", "training"
    )
    freeze_encoder_epochs: int = setting(
        0, "first epochs in which the encoder stays as it is", "training"
    )
    clip_grad: float = setting(
        0.0, "largest norm of the gradients of a step; 0 is no limit", "training"
    )
    patience: int = setting(
        20,
        "epochs without a better combined score before stopping; 0 never",
        "training",
    )
    loss: str = setting(
        "dice+ce",
        "ce, dice, focal, tversky, jaccard, lovasz, or a weighted sum such as 0.5*dice+ce "
        "(ce is binary cross-entropy in binary mode)",
        "training",
    )
    use_class_weights: bool = setting(
        False, "weigh the cross-entropy by inverse class frequency", "training"
    )
    val_strategy: str = setting(
        "split",
        "validate on validation/, or cross-validate over train/ and validation/",
        "training",
        choices=("split", "kfold"),
    )
    n_splits: int = setting(5, "folds of kfold", "training")
    fold_by: str = setting(
        "random",
        "draw the folds of kfold patch by patch, in square blocks, or as one upright strip of the "
        "area each; both trains random and block, and tells how much too good random is",
        "training",
        choices=("random", "block", "column", "both"),
    )
    block_size: float | None = setting(
        None, "side of a block in metres", "training", shown="four patches"
    )
    buffer: float = setting(
        0.0,
        "metres; patches nearer than that to a fold of blocks or strips do not train for it",
        "training",
    )
    seed: int = setting(42, "seed of every random choice", "training")
    device: str | None = setting(
        None,
        "cpu, cuda, cuda:1...",
        "training",
        shown="cuda where there is one, else cpu",
    )
    no_calibration: bool = setting(
        False,
        "fit no temperature on the validation split: probabilities stay as the network gives them",
        "output",
    )
    area_estimation: bool = setting(
        False,
        "estimate the area of each class from the map of all patches and the errors in the test "
        "split, with 95 %% intervals",
        "output",
    )
    save_dir: str = setting("trained_models", "folder for models and reports", "output")
    resume: bool = setting(
        False,
        "go on with the run in --save_dir, from its last whole epoch to the same models",
        "output",
    )

    def __post_init__(self):
        check_model_name(self.model)
        self._require_data()
        self._require_folds()
        self._require_training()
        self._require_model()

    def _require_data(self) -> None:
        kind = self.data_augmentation
        expected = ", ".join(AUGMENTATIONS)
        require(kind in AUGMENTATIONS, "--data_augmentation", kind, expected)
        require(2 <= self.classes <= 65535, "--classes", self.classes, "2 to 65535")
        require(
            self.mode == "multiclass" or self.classes == 2,
            "--classes",
            self.classes,
            "2 with --mode binary; --mode multiclass takes more",
        )
        if self.class_names:
            names = len(self.class_names.split(","))
            expected = f"{self.label_classes} names"
            require(
                names == self.label_classes, "--class_names", self.class_names, expected
            )
        require(
            not 0 <= self.ignore_index < self.label_classes,
            "--ignore_index",
            self.ignore_index,
            f"a value outside the classes 0..{self.label_classes - 1}",
        )
        bands = self.in_channels
        fine = bands is None or 1 <= bands <= 65535
        require(fine, "--in_channels", bands, "1 to 65535")
        fine = number_or_auto(self.num_workers, 0, 1024)
        require(fine, "--num_workers", self.num_workers, "0 to 1024, or auto")

    def _require_folds(self) -> None:
        require(self.n_splits >= 2, "--n_splits", self.n_splits, "at least 2")
        fine = self.fold_by == "random" or self.val_strategy == "kfold"
        require(fine, "--fold_by", self.fold_by, "--val_strategy kfold with it")
        size, spatial = self.block_size, self.fold_by != "random"
        fine = size is None or 1e-3 <= size < math.inf
        require(fine, "--block_size", size, "more than 0 metres, at least 0.001")
        fine = 0 <= self.buffer < math.inf
        require(fine, "--buffer", self.buffer, "0 metres or more")
        wanted = "--val_strategy kfold and --fold_by block, column or both with it"
        require(size is None or spatial, "--block_size", size, wanted)
        require(not self.buffer or spatial, "--buffer", self.buffer, wanted)

    def _require_training(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            require(value >= 1, f"--{name}", value, "at least 1")
        for name in ("patience", "warmup_epochs", "freeze_encoder_epochs", "clip_grad"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--{name}", value, "0 or more")
        for name in ("warmup_epochs", "freeze_encoder_epochs"):
            value = getattr(self, name)
            fewer = f"fewer than --epochs {self.epochs}"
            require(value < self.epochs, f"--{name}", value, fewer)
        require(
            not self.warmup_epochs or self.scheduler != "onecycle",
            "--warmup_epochs",
            self.warmup_epochs,
            "another --scheduler: onecycle has a rise of its own",
        )
        require(0 <= self.seed < 2**32, "--seed", self.seed, "0 to 2^32 - 1")
        rate, decay = self.learning_rate, self.weight_decay
        require(0 < rate < math.inf, "--learning_rate", rate, "more than 0")
        require(0 <= decay < math.inf, "--weight_decay", decay, "0 or more")
        terms = parse_loss(self.loss)
        require(
            not self.use_class_weights or "ce" in terms,
            "--use_class_weights with --loss",
            self.loss,
            "a loss with a ce term, which is what the weights act on",
        )

    def _require_model(self) -> None:
        entry = ARCHITECTURES[self.model]
        require(
            not self.freeze_encoder_epochs or entry.has_encoder or entry.fixed_encoder,
            "--freeze_encoder_epochs",
            self.freeze_encoder_epochs,
            f"a model with an encoder, which {self.model} has not",
        )
        require(
            0 <= self.dropout_rate < 1, "--dropout_rate", self.dropout_rate, "0 to 1"
        )
        require(
            not entry.has_encoder or self.dropout_rate == ModelConfig.dropout_rate,
            "--dropout_rate",
            self.dropout_rate,
            f"unet-dropout with it, since {self.model} does not use it",
        )
        require(
            not self.weights or entry.has_weights,
            "--pretrained with --model",
            self.model,
            "another model: this one has no pretrained weights",
        )
        require(
            bool(self.weights) or not self.rgb_bands,
            "--rgb_bands",
            self.rgb_bands,
            "--pretrained or --encoder_weights with it",
        )

    @property
    def label_classes(self) -> int:
        return self.classes if self.mode == "multiclass" else 2

    @property
    def weights(self) -> str | None:
        """The pretrained weights to start from, or None."""
        return self.encoder_weights or ("imagenet" if self.pretrained else None)

    def model_config(self, in_channels: int) -> ModelConfig:
        outputs = self.classes if self.mode == "multiclass" else 1
        encoder = ARCHITECTURES[self.model].fixed_encoder
        if ARCHITECTURES[self.model].has_encoder:
            encoder = self.encoder_name
        elif self.encoder_name not in (ModelConfig.encoder_name, encoder):
            raise OptionError(
                f"--encoder_name {self.encoder_name}: {self.model} has no exchangeable encoder"
            )
        return ModelConfig(self.model, in_channels, outputs, encoder, self.dropout_rate)
