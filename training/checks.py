"""What must be right about the options of ``main.py`` together, before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.architectures import (
    ARCHITECTURES,
    AUGMENTATIONS,
    ModelConfig,
    check_model_name,
    parse_loss,
)
from common.errors import require
from common.label_values import parse_names
from common.options import check_limits, number_or_auto, require_colour_count

if TYPE_CHECKING:
    from training.settings import TrainingConfig


def check_settings(config: TrainingConfig) -> None:
    """Raise OptionError where an option, or two of them together, cannot be right."""
    check_model_name(config.model)
    check_limits(config)
    both = config.overwrite and config.resume
    require(not both, "--overwrite", "and --resume", "one of the two")
    check_data(config)
    check_folds(config)
    check_training(config)
    check_model(config)


def check_data(config: TrainingConfig) -> None:
    kind = config.data_augmentation
    expected = ", ".join(AUGMENTATIONS)
    require(kind in AUGMENTATIONS, "--data_augmentation", kind, expected)
    require(
        config.mode != "binary" or config.classes in (None, 2),
        "--classes",
        config.classes,
        "2 with --mode binary; --mode multiclass takes more",
    )
    number = 2 if config.mode == "binary" else config.classes
    named = parse_names(config.class_names, "--class_names")
    fine = not (named and number) or len(named) == number
    require(fine, "--class_names", config.class_names, f"{number} names")
    if number:
        require_colour_count(config.class_colors, number)
    fine = not number or not 0 <= config.ignore_index < number
    expected = f"a value outside the classes 0..{(number or 0) - 1}"
    require(fine, "--ignore_index", config.ignore_index, expected)
    fine = number_or_auto(config.num_workers, 0, 1024)
    require(fine, "--num_workers", config.num_workers, "0 to 1024, or auto")


def check_folds(config: TrainingConfig) -> None:
    size, column = config.block_size, config.fold_column
    spatial = config.fold_by in ("block", "column", "both")
    only, folds = config.only_fold, config.val_strategy == "kfold"
    require(only is None or folds, "--only_fold", only, "--val_strategy kfold with it")
    fine = only is None or config.fold_by != "both"
    require(fine, "--only_fold with --fold_by", config.fold_by, "another")
    fine = only is None or only <= config.n_splits
    require(fine, "--only_fold", only, f"1 to {config.n_splits}, as --n_splits says")
    fine = config.fold_by == "random" or folds
    require(fine, "--fold_by", config.fold_by, "--val_strategy kfold with it")
    fine = column is None or folds
    require(fine, "--fold_column", column, "--val_strategy kfold with it")
    fine = folds or not config.label_audit
    require(fine, "--label_audit with --val_strategy", "split", "kfold")
    fine = column is None or config.fold_by == "random"
    require(fine, "--fold_column with --fold_by", config.fold_by, "one of the two")
    needed = "--val_strategy kfold and --fold_by block, column or both with it"
    require(size is None or spatial, "--block_size", size, needed)
    fine = not config.buffer or spatial or config.fold_values is not None
    needed = needed.replace("both", "both, scene, or --fold_column")
    require(fine, "--buffer", config.buffer, needed)


def check_training(config: TrainingConfig) -> None:
    size = config.batch_size
    fine = size == "auto" or isinstance(size, int)
    require(fine, "--batch_size", size, "a whole number, or auto")
    for name in ("warmup_epochs", "freeze_encoder_epochs"):
        value = getattr(config, name)
        fewer = f"fewer than --epochs {config.epochs}"
        require(value < config.epochs, f"--{name}", value, fewer)
    require(
        not config.warmup_epochs or config.scheduler != "onecycle",
        "--warmup_epochs",
        config.warmup_epochs,
        "another --scheduler: onecycle has a warm-up of its own",
    )
    require(
        "ce" in parse_loss(config.loss) or not config.use_class_weights,
        "--use_class_weights with --loss",
        config.loss,
        "a loss with a ce term, which the weights act on",
    )


def check_model(config: TrainingConfig) -> None:
    entry, rate = ARCHITECTURES[config.model], config.dropout_rate
    require(
        not config.freeze_encoder_epochs or entry.has_encoder,
        "--freeze_encoder_epochs",
        config.freeze_encoder_epochs,
        f"a model with an encoder, which {config.model} does not have",
    )
    require(0 <= rate < 1, "--dropout_rate", rate, "0 or more and less than 1")
    require(
        entry.has_dropout or rate == ModelConfig.dropout_rate,
        "--dropout_rate",
        rate,
        f"unet-dropout or pixel with it, since {config.model} does not use it",
    )
    require(
        not config.weights or entry.has_encoder,
        "--pretrained with --model",
        config.model,
        "another model: this one has no pretrained weights",
    )
    require(
        bool(config.weights) or not config.rgb_bands,
        "--rgb_bands",
        config.rgb_bands,
        "--pretrained or --encoder_weights with it",
    )
    known = (ModelConfig.encoder_name, entry.fixed_encoder)
    fine = entry.takes_encoder or config.encoder_name in known
    expected = f"another --model: {config.model} has no exchangeable encoder"
    require(fine, "--encoder_name", config.encoder_name, expected)
