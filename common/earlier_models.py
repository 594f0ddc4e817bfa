"""What checkpoint files say of themselves, also those of earlier versions, as dictionaries.

Without torch: weights are values of any kind here.
"""

from __future__ import annotations

import math

from common import VERSION
from common.architectures import (
    ARCHITECTURES,
    ModelConfig,
    default_class_names,
    get_available_models,
)
from common.colours import colour_of_hex
from common.errors import CheckpointError, UndescribedError, unknown_name

DESCRIPTION = ("model_name", "encoder_name", "in_channels", "num_classes")


def registered_name(text: str) -> str:
    """The name in ``ARCHITECTURES`` of a model in any spelling of earlier versions.

    Case, hyphens and underscores do not count, and ``plus`` or ``pp`` stand for ``+``:
    ``DeepLab-V3-Plus`` is ``deeplabv3+``.

    Raises:
        OptionError: No such model.
    """

    def spelling(name: str) -> str:
        plain = name.lower().replace("-", "").replace("_", "")
        return plain.replace("plus", "+").replace("pp", "++")

    for name in ARCHITECTURES:
        if spelling(name) == spelling(text):
            return name
    raise unknown_name("model", text, get_available_models())


def stored_weights(content: dict) -> dict:
    """The weights in a file's content: under one of two keys, or the content itself.

    Prefixes of wrappers on all keys are removed, in any order: of ``DataParallel``, of
    ``torch.compile``, of our ``PadToMultiple``.
    """
    state = content.get("model_state_dict", content.get("state_dict", content))
    while isinstance(state, dict) and state:
        first = str(next(iter(state))).split(".")[0]
        shared = all(str(key).startswith(f"{first}.") for key in state)
        if first not in ("module", "_orig_mod", "network") or not shared:
            break
        state = {key.removeprefix(f"{first}."): value for key, value in state.items()}
    return state


def stored_description(path, content: dict) -> dict:
    """What a file says of its model, in plain numbers; empty for weights alone.

    Raises:
        CheckpointError: A newer version has written it.
    """
    described = [content.get(key) for key in ("metadata", "config")]
    stored = next((d for d in described if isinstance(d, dict) and d), {})
    if isinstance(content.get("mode"), str):  # all that earlier best_* files say
        stored = {"mode": content["mode"]} | stored
    # NumPy scalars become plain numbers
    stored = {k: v.item() if hasattr(v, "item") else v for k, v in stored.items()}
    if main_version(stored.get("version", "0")) > main_version(VERSION):
        raise CheckpointError(
            f"{path} is of version {stored['version']}, this is {VERSION}; update"
        )
    return stored


def main_version(version) -> int:
    """The first number of a version; 0 for what is none."""
    first = str(version).split(".")[0]
    return int(first) if first.isdecimal() else 0


def complete_description(path, stored: dict, given: dict) -> dict:
    """What the file says, completed by options where it says nothing.

    Raises:
        CheckpointError: Together they do not describe the model.
    """
    metadata = stored | {key: given[key] for key in given if stored.get(key) is None}
    needed = list(DESCRIPTION)
    if metadata.get("model_name") is not None:
        metadata["model_name"] = registered_name(str(metadata["model_name"]))
        entry = ARCHITECTURES[metadata["model_name"]]
        if not entry.takes_encoder:
            needed.remove("encoder_name")
            metadata["encoder_name"] = stored.get("encoder_name") or entry.fixed_encoder
    if missing := [f"--{key}" for key in needed if metadata.get(key) is None]:
        part = "full " if stored.keys() & set(DESCRIPTION) else ""
        binary = " (1 for binary)" if "--num_classes" in missing else ""
        raise UndescribedError(
            f"{path} holds weights without a {part}description; give "
            f"{', '.join(missing)}{binary}"
        )
    return metadata


def check_options(path, config: ModelConfig, given: dict) -> None:
    """Raise CheckpointError where an option contradicts the file."""
    classes = (config.num_classes, config.label_classes)
    facts = {
        "model_name": ((config.model_name,), f"is a {config.model_name}"),
        "encoder_name": ((config.encoder_name,), f"has {config.encoder_name}"),
        "in_channels": ((config.in_channels,), f"takes {config.in_channels} bands"),
        "num_classes": (classes, f"has {config.label_classes} classes"),
    }
    for key, value in given.items():
        fitting, fact = facts[key]
        if value not in fitting:
            raise CheckpointError(f"--{key} {value}, but {path} {fact}; leave it out")


def stored_temperature(path, metadata: dict) -> float:
    """The temperature that a file holds; 1 where it holds none."""
    value = metadata.get("temperature", 1.0)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise CheckpointError(
            f"{path} has the temperature {value!r}; expected a number more than 0"
        )
    return float(value)


def stored_class_names(path, metadata: dict, config: ModelConfig) -> list[str]:
    """The class names that a file holds, else the default ones."""
    binary = metadata.get("mode") == "binary"
    default = default_class_names(1 if binary else config.num_classes)
    names = metadata.get("class_names") or default
    if len(names) != config.label_classes or not all(isinstance(n, str) for n in names):
        raise CheckpointError(
            f"{path} names {len(names)} classes for a model of {config.label_classes}; train it "
            "again"
        )
    return list(names)


def stored_class_codes(path, metadata: dict, config: ModelConfig) -> list[int | str]:
    """What the labels held for the classes by a file, else the numbers of the classes."""
    codes = metadata.get("class_codes")
    if codes is None:
        return list(range(config.label_classes))
    fine = isinstance(codes, list) and len(codes) == config.label_classes
    if not fine or not all(type(code) in (int, str) for code in codes):
        raise CheckpointError(
            f"{path} holds the class codes {codes!r:.80}; expected {config.label_classes} numbers "
            "or texts: train it again"
        )
    return codes


def check_class_colours(path, metadata: dict, config: ModelConfig) -> None:
    """Raise CheckpointError where a file gives colours of classes that are none, or too few."""
    colours = metadata.get("class_colors")
    if colours is None:
        return
    fine = isinstance(colours, list) and len(colours) == config.label_classes
    if not fine or not all(isinstance(c, str) and colour_of_hex(c) for c in colours):
        raise CheckpointError(
            f"{path} holds the class colours {colours!r:.80}; expected {config.label_classes} as "
            "#rrggbb: train it again"
        )
