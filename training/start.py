"""The model that a training starts from, brought to the bands and classes of the data."""

from __future__ import annotations

import filecmp
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from common.architectures import ARCHITECTURES, ModelConfig
from common.errors import (
    CheckpointError,
    DatasetError,
    OptionError,
    UndescribedError,
    require,
)
from common.files import atomic_write, compare_runs
from common.sensors import match_bands, sensor_of
from common.text import listed, split_dates
from model_training import (
    Checkpoint,
    build_model,
    load_checkpoint,
    load_safely,
    weights_digest,
)
from training.bands import sensor_of_data
from training.kernels import band_layers, last_conv, match_kernels
from training.outputs import START_ANEW, START_COPY, folds_trained_alone, former_files
from training.samples import SampleIndex
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")


@dataclass(frozen=True)
class Start:
    """A trained model, and which of its bands those of the data are."""

    file: str
    checkpoint: Checkpoint
    matches: Sequence[int | None]  # per band of the data the model's
    by_name: bool

    @cached_property
    def record(self) -> dict[str, str]:
        """What checkpoints say of it."""
        state = self.checkpoint.model.network.state_dict()
        return {"file": Path(self.file).name, "sha256": weights_digest(state)}


def settle_model(config: TrainingConfig) -> TrainingConfig:
    """The settings with model, encoder and its depth, those of ``--start_from`` where it is given.

    Raises:
        CheckpointError: It cannot be read.
        OptionError: ``--model``, ``--encoder_name`` or ``--encoder_depth`` is another one.
    """
    if config.start_from is None:
        entry = ARCHITECTURES[config.model]
        named = entry.takes_encoder or entry.may_name_default
        config = replace(config, encoder_name=config.encoder) if named else config
        depth = config.depth if entry.takes_depth else None
        return replace(config, encoder_depth=depth)
    found, file = read_start(config).config, start_file(config)
    if file != (given := Path(config.start_from)):
        why = "has changed since" if given.is_file() else "is not there"
        log.info("%s %s: its copy %s is taken", config.start_from, why, file)
    entry = ARCHITECTURES[found.model_name]
    # earlier versions store a name for models without an exchangeable encoder too
    encoder = found.encoder_name if entry.takes_encoder else entry.fixed_encoder
    depth = found.encoder_depth if entry.takes_depth else None
    for option, given, there in (
        ("--model", config.model, found.model_name),
        ("--encoder_name", config.encoder_name, encoder),
        ("--encoder_depth", config.encoder_depth, depth),
    ):
        if given is not None and given != there:
            raise OptionError(
                f"{option} {given}, but {config.start_from} has {there or 'none'}; leave {option} out"
            )
    return replace(
        config, model=found.model_name, encoder_name=encoder, encoder_depth=depth
    )


def start_file(config: TrainingConfig) -> Path:
    """The file of ``--start_from``, or its copy in the folder of a run that began with it.

    The copy is taken where the file is gone, or has changed since the run began.
    """
    file = Path(config.start_from)
    copies = [] if config.overwrite else copies_of_start(config.save_dir)
    if not copies or not file.is_file():
        return copies[0] if copies else file
    same = filecmp.cmp(file, copies[0], shallow=False)
    return file if same or is_another(config) else copies[0]


def is_another(config: TrainingConfig) -> bool:
    """Whether ``--start_from`` names another file than the run in ``--save_dir`` began with."""
    for file in former_files(config.save_dir):
        if file.name == "model_last.pth":
            params = load_safely(file)["metadata"]["training_params"]
            return params.get("start_from") != config.start_from
    return False


def copies_of_start(folder: str) -> list[Path]:
    """Those of the model that a run started from, beside its files and those of its folds."""
    return [file for file in former_files(folder) if file.name == START_COPY]


def read_start(config: TrainingConfig) -> Checkpoint:
    """Open the model of ``--start_from``, see ``start_file``.

    Raises:
        CheckpointError: It cannot be read, or does not say of which model it is.
    """
    file = start_file(config)
    try:
        return load_checkpoint(file)
    except UndescribedError as error:
        raise CheckpointError(
            f"{file} holds weights alone; --start_from takes a checkpoint that main.py wrote, and "
            "--encoder_weights those of an encoder"
        ) from error


def keep_copy(config: TrainingConfig) -> None:
    """Keep the model that a run starts from beside its files, for ``--resume`` and later folds.

    Folds that are gathered have theirs.
    """
    if config.start_from and not copies_of_start(config.run_dir):
        with atomic_write(Path(config.run_dir) / START_COPY) as part:
            shutil.copyfile(start_file(config), part)


def require_another_place(config: TrainingConfig) -> None:
    """Raise OptionError where the run would remove the model that it starts from."""
    first = config.start_from
    if first is None or config.resume:
        return
    removed = {file.resolve() for file in former_files(config.run_dir)}
    fine = Path(first).resolve() not in removed
    needed = "another --save_dir: it is a file of the run that --overwrite replaces"
    require(fine, "--start_from", first, needed)


def require_same_start(config: TrainingConfig, start: Start | None) -> None:
    """Raise SegmentationError where folds that are to be gathered start from another model."""
    present = {"start_from": start and start.record["sha256"]}
    for report in folds_trained_alone(config):
        record = json.loads(report.read_text()).get("started_from") or {}
        former = {"start_from": record.get("sha256")}
        compare_runs(former, present, report.parent, START_ANEW)


def report_start(start: Start | None, names: Sequence[str], binary: bool) -> None:
    """Log what a training takes over from a model, in one line."""
    if start is None:
        return
    bands = sum(match is not None for match in start.matches)
    kept = kept_names(names, start.checkpoint.class_names, binary)
    how = "by name" if start.by_name else "by position, since names are not known"
    log.info(
        "starting from %s: %d of %d bands matched %s, %d of %d classes kept%s",
        *(start.file, bands, len(start.matches), how, len(kept), len(names)),
        f" ({listed(kept)})" if kept else "",
    )


def find_start(config: TrainingConfig, index: SampleIndex) -> Start | None:
    """The model that a training on some patches starts from; None where it starts from none.

    Bands are matched by name; by position where the names of one side are not known and both have
    as many.

    Raises:
        CheckpointError: See ``read_start``.
        DatasetError: The model has none of the bands, or nobody says which they are.
    """
    if config.start_from is None:
        return None
    checkpoint = read_start(config)
    new, count = index.descriptions, checkpoint.config.in_channels
    old = checkpoint.metadata.get("band_descriptions") or []
    by_name = any(new) and any(old) and len(old) == count
    if by_name:
        metadata = checkpoint.metadata
        said = (metadata.get("training_params") or {}).get("sensor")
        stored = said or metadata.get("sensor")
        sensors = sensor_of_data(config, index), sensor_of(stored)
        matches = match_bands(new, old, *sensors)
        if all(match is None for match in matches):
            raise DatasetError(
                f"{config.start_from} has the bands {listed(filter(None, old))}, and the patches in "
                f"{config.dataset_root} have none of them ({listed(filter(None, new))})"
                + hint_of_dates(new, old)
            )
    elif len(new) == count:
        matches = list(range(count))
    else:
        unnamed = config.start_from if any(new) else config.dataset_root
        raise DatasetError(
            f"{unnamed} has no names of bands to match them by, and {config.start_from} has {count} "
            f"bands, the patches in {config.dataset_root} {len(new)}; describe the bands of the "
            "scenes before the extraction, or start from another model"
        )
    return Start(config.start_from, checkpoint, matches, by_name)


def hint_of_dates(new: Sequence[str | None], old: Sequence[str | None]) -> str:
    """What to add to a message where the bands of one side alone have dates."""
    dated = [any(order for _, order in split_dates(side)) for side in (new, old)]
    alike = dated[0] == dated[1]
    return "" if alike else "; bands with dates are matched with bands with dates alone"


def start_model(config: ModelConfig, start: Start, names: Sequence[str]) -> nn.Module:
    """Build a network with the weights of another model.

    Its first layer is for the bands of the data, and its last one has the model's rows for classes
    of equal names; all other weights are the model's.

    Args:
        config: What to build.
        start: Where its weights are from.
        names: Of the classes.

    Raises:
        CheckpointError: The model is of another architecture than it says.
    """
    model = build_model(config)
    network, given = model.network, start.checkpoint.model.network
    state, own = given.state_dict(), network.state_dict()
    same = list(start.matches) == list(range(start.checkpoint.config.in_channels))
    # those stay as they are, also where the encoder rearranges the image before them
    for layer in [] if same else band_layers(network, config.in_channels):
        key = f"{layer}.weight"
        state[key] = match_kernels(state[key], start.matches)
    head = last_conv(network)
    for key in (f"{head}.weight", f"{head}.bias"):
        if key in state:
            rows = own[key], state[key]
            state[key] = match_rows(*rows, names, start.checkpoint.class_names)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{start.file} cannot be the start of a {config.model_name}: "
            f"{str(error).splitlines()[1].strip()[:200]}"
        ) from error
    return model


def kept_names(
    names: Sequence[str], old_names: Sequence[str], binary: bool
) -> list[str]:
    """The classes that keep what a model knows of them; none where it lacks a binary foreground."""
    if binary and names[1] not in old_names:
        return []
    return [name for name in names if name in old_names]


def match_rows(
    new: Tensor, old: Tensor, names: Sequence[str], old_names: Sequence[str]
) -> Tensor:
    """The rows of a last layer for some classes, from those of other classes.

    The one row of a binary model is the logit of its second class against its first: it is the
    difference of their two rows in a model of several classes, where it is split evenly.

    Args:
        new: (K, ...) as it is initialized; K = 1 is binary. Rows of other classes stay so.
        old: (J, ...), likewise.
        names: Of the new classes, two where it is binary.
        old_names: Of the old ones.
    """
    rows = {name: row for name, row in zip(old_names, old)}
    if len(old) == 1:
        rest, sought = old_names
        rows = {rest: -old[0] / 2, sought: old[0] / 2}
    if len(new) > 1:
        return torch.stack([rows.get(name, row) for name, row in zip(names, new)])
    rest, sought = names
    if not kept_names(names, old_names, binary=True):
        return new
    others = [row for name, row in rows.items() if name != sought]
    against = rows[rest] if rest in rows else torch.stack(others).mean(dim=0)
    return (rows[sought] - against)[None]


def start_ranges(
    config: TrainingConfig, start: Start
) -> dict[int, tuple[float, float]]:
    """The percentiles, low and high, that bands of the data take over from the model.

    Raises:
        DatasetError: The model has no percentiles to keep, though they are asked for.
    """
    given, asked = start.checkpoint.normalization, config.normalization_from
    if given.rule == "image" and asked == "model":
        raise DatasetError(
            f"--normalization_from model: {start.file} scales each patch by its own percentile and has "
            "none to keep; give auto or data"
        )
    all_named = start.by_name and None not in start.matches
    if given.rule == "image" or asked == "data" or (asked == "auto" and not all_named):
        return {}
    return {
        band: (given.low[match], given.high[match])
        for band, match in enumerate(start.matches)
        if match is not None
    }
