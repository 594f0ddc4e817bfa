"""The options of ``main.py``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from common import UNLABELLED
from common.architectures import (
    ARCHITECTURES,
    AUGMENTATIONS,
    ModelConfig,
)
from common.options import class_colors_setting, setting
from common.sensors import SENSORS
from training.checks import check_settings


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a training run; ``main.py`` makes its options from these fields."""

    dataset_root: str = setting(
        help="folder that extraction wrote", group="data", may_change=True
    )
    model: str | None = setting(
        None,
        "architecture (see --list_models)",
        "model",
        shown="that of --start_from; required without it",
    )
    start_from: str | None = setting(
        None,
        "checkpoint of this toolkit whose network training starts from, for other bands and classes "
        "too",
        "model",
        shown="none",
        may_change=True,
    )
    mode: str | None = setting(
        None,
        "one foreground class against background, or several classes",
        "data",
        shown="by the class names that the extraction stored; binary without any",
        choices=("binary", "multiclass"),
    )
    classes: int | None = setting(
        None,
        "number of classes",
        "data",
        shown="those that the extraction stored; 2 without any",
        alias="--num_classes",
        least=2,
        most=65535,
    )
    class_names: str | None = setting(
        None,
        "names in class order, separated by commas",
        "data",
        shown="those stored by the extraction, else class 0, class 1...",
    )
    class_colors: str | None = class_colors_setting(
        "data",
        "those stored by the extraction, else of a palette",
        may_change=True,
    )
    ignore_index: int = setting(UNLABELLED, "label value that means unlabelled", "data")
    in_channels: int | None = setting(
        None,
        "bands that the patches must have",
        "data",
        shown="the bands of the data",
        least=1,
        most=65535,
    )
    normalization: str = setting(
        "dataset",
        "scale by the training split's percentiles per band, or each patch by its own joint one",
        "data",
        choices=("dataset", "image"),
    )
    normalization_from: str = setting(
        "auto",
        "whose scaling the dataset's normalization takes: that of the model or the published weights "
        "that training starts from, or the percentiles of the data; auto is what such a start has "
        "learnt to expect, where it says so, else the data",
        "data",
        choices=("auto", "model", "data"),
    )
    data_augmentation: str = setting(
        "symmetries",
        "rotate and mirror the training patches, or none, or full (the option alone): vary their "
        "brightness and contrast, noise and bands too",
        "data",
        choices=AUGMENTATIONS,
        nargs="?",
        const="full",
    )
    num_workers: str = setting(
        "auto",
        "processes that prepare batches ahead; auto is none where all patches are in memory",
        "data",
        may_change=True,
    )
    cache: str = setting(
        "auto",
        "keep decoded patches in memory: as many as fit in a quarter of the free memory, all, or "
        "none",
        "data",
        choices=("auto", "ram", "off"),
        may_change=True,
    )
    encoder_name: str | None = setting(
        None,
        "encoder (see --list_encoders); with --start_from that of the model",
        "model",
        shown=ModelConfig.encoder_name,
    )
    encoder_depth: int | None = setting(
        None,
        "levels of the encoder of unet, unet++, manet and linknet; fewer see less around a pixel; with "
        "--start_from those of the model",
        "model",
        choices=(3, 4, 5),
        shown=str(ModelConfig.encoder_depth),
    )
    pretrained: bool = setting(False, "start from the library's weights", "model")
    encoder_weights: str | None = setting(
        None,
        "which pretrained weights: a name (imagenet, ssl...), a file of encoder weights, or the name of "
        "a published file, which is downloaded (docs/models.md lists them)",
        "model",
        shown="none; imagenet with --pretrained",
    )
    rgb_bands: str | None = setting(
        None,
        "bands that get the red, green and blue kernels of pretrained weights, as 4,3,2",
        "model",
        shown="found from the band descriptions",
    )
    weights_bands: str | None = setting(
        None,
        "names of the bands that the file of --encoder_weights is for, in its order, as B2,B3,B4,B8",
        "model",
        shown="those of published files, else red,green,blue for a file of three bands",
    )
    sensor: str | None = setting(
        None,
        "what measured the bands; needed where their names mean other bands on other sensors",
        "model",
        shown="what the patches say, else what the names of their bands tell",
        choices=tuple(SENSORS),
    )
    dropout_rate: float = setting(
        ModelConfig.dropout_rate,
        "dropout of unet-dropout and pixel, 0 or more and less than 1",
        "model",
    )
    epochs: int = setting(100, "passes over the training patches", "training", least=1)
    batch_size: int | str = setting(
        4,
        "patches per batch, and process; auto tries at the start how many the GPU has memory for, "
        "64 at most",
        "training",
        least=1,
        or_auto=True,
    )
    accumulate: int = setting(1, "batches per step of the weights", "training", least=1)
    amp: str = setting(
        "auto",
        "precision of mixed-precision training; auto is what the hardware computes natively",
        "training",
        choices=("auto", "off", "bf16", "fp16"),
    )
    learning_rate: float = setting(
        1e-3, "initial step size of AdamW", "training", above=0
    )
    weight_decay: float = setting(1e-4, "weight decay of AdamW", "training", least=0)
    scheduler: str = setting(
        "cosine",
        "how the learning rate falls",
        "training",
        choices=("cosine", "plateau", "onecycle", "none"),
    )
    warmup_epochs: int = setting(
        0,
        "first epochs in which the learning rate rises to its value",
        "training",
        least=0,
    )
    freeze_encoder_epochs: int = setting(
        0, "first epochs in which the encoder is not trained", "training", least=0
    )
    clip_grad: float = setting(
        0.0,
        "largest norm of the gradients of a step; 0 is no limit",
        "training",
        least=0,
    )
    patience: int = setting(
        20,
        "epochs without a better combined score before training stops; 0 never stops it",
        "training",
        least=0,
        may_change=True,
    )
    loss: str = setting(
        "dice+ce",
        "ce, dice, focal, gce, tversky, jaccard, lovasz, or a weighted sum such as 0.5*dice+ce "
        "(ce is binary cross-entropy in binary mode)",
        "training",
    )
    use_class_weights: bool = setting(
        False, "weight the cross-entropy by inverse class frequency", "training"
    )
    val_strategy: str = setting(
        "split",
        "validate on validation/, or cross-validate over train/ and validation/",
        "training",
        choices=("split", "kfold"),
    )
    n_splits: int = setting(5, "folds of kfold", "training", least=2)
    fold_by: str = setting(
        "random",
        "draw the folds of kfold patch by patch, in square blocks, as one upright strip of the area "
        "each, or in whole scenes, as for maps of new dates; both trains random and block, and "
        "reports by how much random is too good",
        "training",
        choices=("random", "block", "column", "scene", "both"),
    )
    fold_column: str | None = setting(
        None,
        "column of Patch/cells.gpkg, as one of the grid: patches of equal value stay in one fold",
        "training",
        shown="none",
    )
    only_fold: int | None = setting(
        None,
        "train this fold of kfold alone, from 1 (job arrays); the same command without it gathers "
        "the folds that were trained so",
        "training",
        shown="all of them, and the final model",
        least=1,
        may_change=True,
    )
    block_size: float | None = setting(
        None,
        "side of a block in metres",
        "training",
        shown="four patches",
        least=0.001,
    )
    buffer: float = setting(
        0.0,
        "metres; patches nearer than that to a fold of whole groups do not train for it",
        "training",
        least=0,
    )
    seed: int = setting(
        42, "seed of every random choice", "training", least=0, most=2**32 - 1
    )
    device: str | None = setting(
        None,
        "cpu, cuda, cuda:1..., mps",
        "training",
        shown="cuda where there is one, else cpu",
        may_change=True,
    )
    no_calibration: bool = setting(
        False,
        "fit no temperature on the validation split: probabilities stay as the network gives them",
        "output",
        may_change=True,
    )
    label_audit: bool = setting(
        False,
        "with kfold, write polygons where models that did not train there confidently contradict "
        "the labels",
        "output",
        may_change=True,
    )
    no_baseline: bool = setting(
        False,
        "train no random forest beside the network to compare it with (after a minute of training or "
        "more, for a tenth of its time)",
        "output",
        may_change=True,
    )
    learning_curve: bool = setting(
        False,
        "train on 25 and 50 %% of the training patches as well, to see whether more labels would help: "
        "three times the time",
        "output",
        may_change=True,
    )
    area_estimation: bool = setting(
        False,
        "estimate the area of each class from the map of all patches and the errors in the test "
        "split, with 95 %% intervals: model-based, from labels chosen by hand; Evaluate_map.py --sample "
        "gives areas that can be published",
        "output",
        may_change=True,
    )
    save_dir: str = setting(
        "trained_models", "folder for models and reports", "output", may_change=True
    )
    overwrite: bool = setting(
        False, "replace the run in --save_dir", "output", may_change=True
    )
    resume: bool = setting(
        False,
        "resume the run in --save_dir after its last complete epoch; the models are the same as "
        "without the interruption",
        "output",
        may_change=True,
    )

    def __post_init__(self):
        check_settings(self)

    @property
    def label_classes(self) -> int:
        """Classes that labels hold; ``training.classes`` settles it where no option does."""
        return 2 if self.mode == "binary" else self.classes

    @property
    def fold_values(self) -> str | None:
        """The column of ``cells.gpkg`` whose equal values stay in one fold, where there is one."""
        return "scene" if self.fold_by == "scene" else self.fold_column

    @property
    def run_dir(self) -> str:
        """The folder of what this command trains: ``--save_dir``, or that of ``--only_fold``."""
        fold = () if self.only_fold is None else (f"fold_{self.only_fold}",)
        return os.path.join(self.save_dir, *fold)

    @property
    def encoder(self) -> str:
        """The encoder's name; ``training.start`` settles it where another model gives it."""
        return self.encoder_name or ModelConfig.encoder_name

    @property
    def depth(self) -> int:
        """The encoder's levels; ``training.start`` settles them where another model gives them."""
        return self.encoder_depth or ModelConfig.encoder_depth

    @property
    def weights(self) -> str | None:
        """The pretrained weights to start from, or None."""
        return self.encoder_weights or ("imagenet" if self.pretrained else None)

    def model_config(self, in_channels: int) -> ModelConfig:
        """What the network is built from, for so many bands."""
        outputs = self.classes if self.mode == "multiclass" else 1
        entry, encoder = ARCHITECTURES[self.model], self.encoder
        if not entry.takes_encoder:
            encoder = entry.fixed_encoder
        return ModelConfig(
            self.model, in_channels, outputs, encoder, self.dropout_rate, self.depth
        )
