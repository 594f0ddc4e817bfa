"""The options that name a mask, and the rule of which of its values are invalid."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import require
from common.options import setting, split_list

COMPANIONS = ("mask_values", "keep_values", "mask_bits")


@dataclass(frozen=True)
class MaskRule:
    """Which pixels of a mask are invalid; ``fill`` are those that a buffer does not grow."""

    values: tuple[int, ...] = ()  # invalid
    bits: tuple[int, ...] = ()  # invalid where one of them is set, counted from 0
    keep: tuple[int, ...] | None = None  # all other values are invalid
    fill_values: tuple[int, ...] = ()
    fill_bits: tuple[int, ...] = ()

    @property
    def named(self) -> tuple[int, ...]:
        """The values that count as the rule says, though the mask declares them as nodata."""
        return self.values if self.keep is None else self.keep

    def __str__(self) -> str:
        if self.keep is not None:
            return f"all values but {', '.join(map(str, self.keep))}"
        name = "bits" if self.bits else "values"
        fill, others = (self.fill_bits, self.bits) if self.bits else (
            self.fill_values, self.values)  # fmt: skip
        return f"{name} {', '.join(map(str, sorted({*fill, *others})))}"


@dataclass(frozen=True)
class Mask:
    """A raster on any pixel grid, and which of its pixels are invalid."""

    path: str
    rule: MaskRule
    buffer: float = 0.0  # metres by which clouds grow


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """A raster that says which pixels are invalid."""

    mask: str | None = setting(
        None, "raster on any pixel grid whose values say which pixels are invalid; of several "
        "scenes one that covers them, or <id> in its name for that of the scene",
        "mask", shown="none",
    )  # fmt: skip
    mask_values: str | None = setting(
        None, "values of --mask that are invalid, as 3,8,9,10", "mask", shown="none"
    )
    keep_values: str | None = setting(
        None, "values of --mask that are valid, as 1; all others are invalid", "mask",
        shown="none",
    )  # fmt: skip
    mask_bits: str | None = setting(
        None, "bits of --mask, from 0, that make a pixel invalid, as 3,4", "mask",
        shown="none",
    )  # fmt: skip

    mask_buffer: float = setting(
        0.0, "metres by which clouds and shadows of the mask grow", "mask", least=0
    )

    def __post_init__(self):
        if hasattr(super(), "__post_init__"):  # settings that these are a part of
            super().__post_init__()
        fine = self.masked or not self.mask_buffer
        wanted = f"{self.MASKING} with it"
        require(fine, "--mask_buffer", self.mask_buffer, wanted)
        given = [name for name in COMPANIONS if getattr(self, name) is not None]
        for name in given:
            fine = self.mask is not None
            require(fine, f"--{name}", getattr(self, name), "--mask with it")
        if self.mask is not None:
            wanted = "one of --mask_values, --keep_values and --mask_bits with it"
            require(len(given) == 1, "--mask", self.mask, wanted)
            numbers(f"--{given[0]}", getattr(self, given[0]))
            bits = self.mask_bits and numbers("--mask_bits", self.mask_bits)
            fine = not bits or all(0 <= bit < 63 for bit in bits)
            require(fine, "--mask_bits", self.mask_bits, "numbers from 0 to 62")

    MASKING = "--mask"  # the options of which one names a mask

    @property
    def masked(self) -> bool:
        """Whether an option names a mask."""
        return self.mask is not None

    def mask_of(self, scene_id: str) -> Mask | None:
        """The mask of a scene, by what takes the place of ``<id>``; None without ``--mask``."""
        if self.mask is None:
            return None
        path = self.mask.replace("<id>", scene_id)
        return Mask(path, self.mask_rule, self.mask_buffer)

    @property
    def own_masks(self) -> bool:
        """Whether each scene has a mask of its own."""
        return "<id>" in (self.mask or "")

    @property
    def mask_rule(self) -> MaskRule:
        """The rule that the options of ``--mask`` state."""
        if self.keep_values is not None:
            return MaskRule(keep=numbers("--keep_values", self.keep_values))
        if self.mask_bits is not None:
            return MaskRule(bits=numbers("--mask_bits", self.mask_bits))
        return MaskRule(values=numbers("--mask_values", self.mask_values))


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers of a comma-separated option."""
    items = split_list(text)
    try:
        found = tuple(int(item) for item in items)
    except ValueError:
        found = ()
    require(bool(found), option, repr(text), "whole numbers between commas")
    return found
