"""What options can name, without torch: models and what each has, losses, precisions, TTA.

``model_training`` builds the models; settings, help texts and checks need only these tables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import require, unknown_name


@dataclass(frozen=True)
class Architecture:
    """What a registered architecture has and what input it needs."""

    size_divisor: int = 32  # input sides are padded to a multiple of this
    min_size: int = 0  # and to at least this
    takes_encoder: bool = True  # any of --encoder_name
    fixed_encoder: str | None = None  # where it takes none
    may_name_default: bool = (
        False  # of --encoder_name, as settings of earlier versions do
    )
    has_dropout: bool = False  # of --dropout_rate
    takes_depth: bool = False  # of --encoder_depth

    @property
    def has_encoder(self) -> bool:
        """Whether it has an encoder, which can begin with pretrained weights and be frozen."""
        return self.takes_encoder or self.fixed_encoder is not None


ARCHITECTURES = {
    "unet-dropout": Architecture(
        16, takes_encoder=False, may_name_default=True, has_dropout=True
    ),
    "unet": Architecture(takes_depth=True),
    "unet++": Architecture(takes_depth=True),
    "manet": Architecture(takes_depth=True),
    "linknet": Architecture(takes_depth=True),
    "fpn": Architecture(),
    "pspnet": Architecture(),
    "pan": Architecture(min_size=128),  # it pools 16 x 8 times
    "deeplabv3": Architecture(),
    "deeplabv3+": Architecture(),
    "segformer": Architecture(),
    "upernet": Architecture(),
    "dpt": Architecture(),  # with vision transformers: tu-vit_base_patch16_224...
    "deeplabv3_resnet50": Architecture(
        1, takes_encoder=False, fixed_encoder="resnet50", may_name_default=True
    ),
    "pixel": Architecture(1, takes_encoder=False, has_dropout=True),
}


def get_available_models() -> list[str]:
    """The names that ``--model`` takes."""
    return list(ARCHITECTURES)


def check_model_name(name: str) -> None:
    """Raise OptionError, with the nearest known name, unless the model is registered."""
    if name not in ARCHITECTURES:
        raise unknown_name("model", name, get_available_models())


@dataclass(frozen=True)
class ModelConfig:
    """What rebuilds a network: all that prediction needs to know beside the weights."""

    model_name: str
    in_channels: int
    num_classes: int  # output channels: 1 when binary
    encoder_name: str | None = "resnet34"
    dropout_rate: float = 0.3  # unet-dropout and pixel only
    encoder_depth: int = 5  # levels, each of half the resolution of the one before

    @property
    def mode(self) -> str:
        return "binary" if self.num_classes == 1 else "multiclass"

    @property
    def label_classes(self) -> int:
        """Classes that a label or a map can hold: two when binary."""
        return max(2, self.num_classes)


AUGMENTATIONS = ("none", "symmetries", "full")
LOSS_NAMES = ("ce", "dice", "focal", "gce", "tversky", "jaccard", "lovasz")


def parse_loss(text: str) -> dict[str, float]:
    """The terms of ``--loss`` with their weights: "0.5*dice+ce" is {"dice": 0.5, "ce": 1}.

    Raises:
        OptionError: An unknown name, or a weight that is not a positive number.
    """
    terms: dict[str, float] = {}
    for term in text.lower().replace(" ", "").split("+"):
        weight, _, name = term.rpartition("*")
        name = "ce" if name == "bce" else name
        if name not in LOSS_NAMES:
            raise unknown_name("loss", name, LOSS_NAMES)
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        require(
            math.isfinite(value) and value > 0, "--loss", text, "weights more than 0"
        )
        terms[name] = terms.get(name, 0.0) + value
    return terms


PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
# test-time augmentation: the symmetries, as (quarter turns, mirrored), to average over
TTA_TRANSFORMS = {
    "none": [(0, False)],
    "flip": [(0, False), (0, True), (2, False), (2, True)],
    "d4": [(turns, mirrored) for turns in range(4) for mirrored in (False, True)],
}
BINARY_NAMES = ["background", "foreground"]
# of two classes the one that is no class of its own: code 0, or a name such as "no water"
_BACKGROUND = re.compile(
    r"(class )?0|(background|other|others|none|no|non|not|nothing|rest)\b.*",
    re.IGNORECASE,
)


def is_background(name: str) -> bool:
    """Whether a class of two is, by its name, what the other one is not."""
    return _BACKGROUND.fullmatch(name) is not None


def are_binary(names: Sequence[str]) -> bool:
    """Whether classes are a foreground and what is not; forest and water are two classes."""
    return len(names) == 2 and is_background(names[0])


def default_class_names(num_classes: int) -> list[str]:
    """Names for classes without names; ``num_classes`` 1 is binary."""
    if num_classes == 1:
        return list(BINARY_NAMES)
    return [f"class {index}" for index in range(num_classes)]


def is_weights_file(text: str | None) -> bool:
    """Whether ``--encoder_weights`` names a file, there or not, and no weights of a library."""
    suffixes = (".pth", ".pt", ".bin", ".safetensors")
    return bool(text) and (Path(text).is_file() or Path(text).suffix in suffixes)
