"""Bands of products and files: where their pixels are and what these mean, whatever the kind.

A reader (``stack_sentinel2``, ``stack_landsat``, ``stack_stac``, ``stack_loose``) makes a ``Product``
of what the user has; nothing after it asks for the kind again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from common.errors import RasterError
from common.mask_options import MaskRule
from common.provenance import Facts

SCL = MaskRule(values=(3, 8, 9, 10), fill_values=(0, 1))
QA_PIXEL = MaskRule(bits=(1, 2, 3, 4), fill_bits=(0,))
OWN_MASK = MaskRule(fill_values=(0,))  # a mask or an alpha band


@dataclass(frozen=True)
class Band:
    """One band of a file."""

    name: str
    path: str  # what GDAL opens
    number: int = 1  # in the file, from 1
    offset: int = 0  # to be added to the pixels
    nodata: float | None = None  # None: as the file declares
    scaling: tuple[float, float] | None = (
        None  # scale and offset that are only passed on
    )
    sentinel2: bool = (
        False  # pixels with the scale, and perhaps the offset, of its products
    )
    facts: Facts | None = None  # of a file without a product


@dataclass(frozen=True)
class MaskLayer:
    """A raster of which a rule says what is invalid, in any of some of its bands."""

    path: str
    rule: MaskRule
    numbers: tuple[int, ...] = (1,)
    remark: str = ""
    of: str = ""  # the file whose own mask it is, where the path is a VRT as XML

    @property
    def name(self) -> str:
        return Path(self.of or self.path).name


@dataclass(frozen=True)
class Product:
    """What a reader has found: bands by their names, a mask, where and when."""

    name: str
    kind: str
    bands: dict[str, Band]
    default: tuple[str, ...]  # bands that are taken unless others are named
    expected: tuple[str, ...] = ()  # bands that a complete product has
    aliases: dict[str, str] = field(default_factory=dict)  # other words for bands
    sensor: str | None = None
    acquired: str | None = None  # as 2021-06-19
    tile: str | None = None
    mask: MaskLayer | None = None
    no_mask: str = "has no mask of its own; give one with --mask"
    doubtful: bool = False  # whether the stated offset may be wrong

    @property
    def date(self) -> str | None:
        """As 20210619."""
        return self.acquired and self.acquired.replace("-", "")

    def find(self, name: str) -> Band | None:
        """A band by name or another word for it, whatever the case."""
        lower = {known.lower(): known for known in self.bands}
        others = {word.lower(): known for word, known in self.aliases.items()}
        known = lower.get(name.lower()) or others.get(name.lower())
        return self.bands.get(known)

    def require(self, name: str) -> Band:
        """A band by name.

        Raises:
            RasterError: There is none, or its file is missing.
        """
        if band := self.find(name):
            return band
        if name.upper() in self.expected:
            raise RasterError(
                f"{self.name} lacks the file of {name.upper()}: the download is incomplete; "
                "download it again, or name other --bands"
            )
        known = ", ".join(self.bands) or "none"
        raise RasterError(
            f"{self.name} ({self.kind}) has no band {name}; it has {known}"
        )
