"""Names and settings in checkpoints of earlier versions, as dictionaries (no torch)."""

from __future__ import annotations

from common import VERSION
from common.architectures import ARCHITECTURES, get_available_models
from common.errors import CheckpointError, unknown_name


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


def is_newer(version: str) -> bool:
    def major(text: str) -> int:
        return int(text.split(".")[0]) if text.split(".")[0].isdecimal() else 0

    return major(str(version)) > major(VERSION)


DESCRIPTION = ("model_name", "encoder_name", "in_channels", "num_classes")


def complete_description(path, stored: dict, given: dict) -> dict:
    """What the file says, and what the options say where the file says nothing.

    Raises:
        CheckpointError: Together they do not describe the model.
    """
    unsaid = {key: given[key] for key in given if stored.get(key) is None}
    metadata = stored | unsaid
    needed = list(DESCRIPTION)
    if metadata.get("model_name") is not None:
        metadata["model_name"] = registered_name(str(metadata["model_name"]))
        entry = ARCHITECTURES[metadata["model_name"]]
        if not entry.has_encoder:
            needed.remove("encoder_name")
            metadata["encoder_name"] = stored.get("encoder_name") or entry.fixed_encoder
    if missing := [f"--{key}" for key in needed if metadata.get(key) is None]:
        part = "full " if stored.keys() & DESCRIPTION else ""
        binary = " (1 for binary)" if "--num_classes" in missing else ""
        raise CheckpointError(
            f"{path} holds weights without a {part}description; give "
            f"{', '.join(missing)}{binary}"
        )
    return metadata
