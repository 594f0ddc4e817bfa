"""What must be right about the options of ``main.py`` together, before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.architectures import (
    ARCHITECTURES,
    AUGMENTATIONS,
    ModelConfig,
    check_model_name,
    is_weights_file,
    parse_loss,
)
from common.errors import OptionError, require
from common.label_values import parse_names
from common.options import (
    check_limits,
    number_or_auto,
    require_colour_count,
    require_geopandas,
    split_list,
)
from training.published import SATLAS_SWIN, published_weights

if TYPE_CHECKING:
    from training.settings import TrainingConfig


def check_settings(config: TrainingConfig) -> None:
    """Raise OptionError where an option, or two of them together, cannot be right."""
    check_limits(config)
    both = config.overwrite and config.resume
    require(not both, "--overwrite", "and --resume", "one of the two")
    check_data(config)
    check_folds(config)
    check_training(config)
    check_start(config)
    if config.model is not None:  # else it is checked again when it is known
        check_model(config)
    check_weights(config)


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
    fine = not (folds and config.learning_curve)
    require(fine, "--learning_curve with --val_strategy", "kfold", "split")
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
    require_geopandas(config, "label_audit")
    fine = column is None or config.fold_by == "random"
    require(fine, "--fold_column with --fold_by", config.fold_by, "one of the two")
    needed = "--val_strategy kfold and --fold_by block, column or both with it"
    require(size is None or spatial, "--block_size", size, needed)
    fine = not config.buffer or spatial or config.fold_values is not None
    needed = needed.replace("both", "both, scene, or --fold_column")
    require(fine, "--buffer", config.buffer, needed)
    fine = folds or config.n_splits == type(config).n_splits
    require(fine, "--n_splits", config.n_splits, "--val_strategy kfold with it")


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


def check_start(config: TrainingConfig) -> None:
    first = config.start_from
    if config.model is None and first is None:
        raise OptionError("--model is required, unless --start_from gives it")
    fine = first is None or not config.weights
    needed = "neither --pretrained nor --encoder_weights with it"
    require(fine, "--start_from", first, needed)


def check_model(config: TrainingConfig) -> None:
    check_model_name(config.model)
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
        entry.takes_depth or config.depth == ModelConfig.encoder_depth,
        "--encoder_depth",
        config.encoder_depth,
        f"unet, unet++, manet or linknet with it, since {config.model} does not take it",
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
    known = {None, entry.fixed_encoder}
    if entry.may_name_default:
        known.add(ModelConfig.encoder_name)
    fine = entry.takes_encoder or config.encoder_name in known
    expected = f"another --model: {config.model} has no exchangeable encoder"
    require(fine, "--encoder_name", config.encoder_name, expected)


def check_weights(config: TrainingConfig) -> None:
    """Check what is asked of pretrained weights, as far as their name tells."""
    file = config.weights if is_weights_file(config.weights) else None
    known, names = published_weights(file), config.weights_bands
    if file and SATLAS_SWIN.fullmatch(Path(file).name):
        raise OptionError(
            f"--encoder_weights {file}: this is a Swin transformer of TorchVision, which no model here "
            "takes; give a ResNet or a vision transformer of docs/models.md"
        )
    needed = "a file with --encoder_weights"
    require(names is None or bool(file), "--weights_bands", names, f"{needed} with it")
    fine = names is None or all(split_list(names))
    require(fine, "--weights_bands", names, "names with commas between them")
    fine = names is None or not known
    needed = "no such option: the bands of this file are known"
    require(fine, f"--weights_bands for {file}", names, needed)
    many = names is not None or (known and len(known.bands) != 3)
    needed = "weights of red, green and blue with it"
    require(not (config.rgb_bands and many), "--rgb_bands", config.rgb_bands, needed)
    needed = "--pretrained, --encoder_weights or --start_from with it"
    begun = bool(config.weights or config.start_from)
    require(config.sensor is None or begun, "--sensor", config.sensor, needed)
    whose = config.normalization_from
    require(whose == "auto" or begun, "--normalization_from", whose, needed)
    fine = whose != "model" or not config.weights
    needed = "auto or data: encoder weights have no percentiles"
    require(fine, "--normalization_from", whose, needed)
    fine = whose == "auto" or config.normalization == "dataset"
    needed = "--normalization dataset, which has percentiles"
    require(
        fine, "--normalization_from with --normalization", config.normalization, needed
    )
    encoder = (known and config.model_config(1).encoder_name) or ""
    fine = not known or encoder.removeprefix("tu-").split(".")[0] == known.encoder
    vit = known and known.encoder.startswith("vit")
    other = f"--encoder_name {'tu-' if vit else ''}{known.encoder if known else ''}"
    needed = f"{other}, whose weights {file} holds" + (
        ", and --model dpt" if vit else ""
    )
    require(fine, "--encoder_name", encoder, needed)
