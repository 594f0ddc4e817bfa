"""Which scenes are written, and of what: found and checked before the work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import RasterError, require
from common.ground import covered_share
from common.masks import buffer_in_pixels
from common.provenance import ACQUIRED, SENSOR, joint_facts
from common.rasters import open_raster
from common.tiffs import TIFF_SUFFIXES
from extraction.stack_bands import OWN_MASK, MaskLayer, Product
from extraction.stack_grid import (
    Grid,
    Layer,
    common_type,
    finest_grid,
    grid_of,
    open_layer,
)
from extraction.stack_inputs import choose_bands
from extraction.stack_settings import StackConfig
from extraction.stack_vrt import masks_vrt

log = logging.getLogger("semanticseg4eo")

BEGIN = 800, 1300  # where the darkest band begins with an offset of 1000 still in it


@dataclass(frozen=True)
class ScenePlan:
    """A scene, checked before anything is written."""

    target: Path
    layers: list[Layer]
    grid: Grid
    stored: tuple[str, float | None]  # type and nodata value of all bands
    masks: list[MaskLayer]
    tags: dict[str, str]

    @property
    def parts(self) -> Path:
        """The folder of the helper files of a VRT."""
        return self.target.with_suffix(".parts")

    @property
    def is_copy(self) -> bool:
        return self.target.suffix.lower() in TIFF_SUFFIXES


def list_scenes(
    products: Sequence[Product], files: Product | None, config: StackConfig
) -> list[tuple[Path, list[Product]]]:
    """The scenes to write, each with its products.

    Raises:
        OptionError: An output that does not fit the number of products.
        RasterError: Two products of the same place and date.
    """
    output = Path(config.output)
    if output.suffix.lower() in (".vrt", *TIFF_SUFFIXES):
        fine = len(products) < 2 or config.join
        wanted = (
            f"a folder for {len(products)} products, or --join for dates of one place"
        )
        require(fine, "--output", output, wanted)
        if config.join:
            require_dates(products, [product.date for product in products])
        return [(output, list(products))]
    fine = products and not output.is_file() and not output.suffix
    wanted = "a name that ends in .vrt or .tif" + ", or a folder" * bool(products)
    require(fine, "--output", output, wanted)
    names = [
        f"Image_{product.tile or product.name}"
        + f"_{product.date}" * bool(product.date)
        for product in products
    ]
    require_dates(products, names)
    return [(output / f"{n}.vrt", [product]) for n, product in zip(names, products)]


def require_dates(products: Sequence[Product], keys: Sequence[str | None]) -> None:
    """Raise RasterError where products lack a date, or two share a key."""
    known: dict[str, Product] = {}
    for product, key in zip(products, keys):
        if key is None:
            raise RasterError(f"{product.name} has no date; --join needs one of each")
        if other := known.get(key):
            raise RasterError(
                f"{other.name} and {product.name} are of one place and date "
                f"({product.tile}, {product.acquired}); leave one out, or stack each into a file "
                "of its own"
            )
        known[key] = product


def plan_scene(
    target: Path, products: list[Product], files: Product | None, config: StackConfig
) -> ScenePlan:
    """Look into all files of a scene.

    Raises:
        SegmentationError: The scene cannot be made.
    """
    chosen = choose_bands(products, files, config)
    layers = [open_layer(one.name, one.band) for one in chosen]
    own = [layer for layer, one in zip(layers, chosen) if one.product is not files]
    if config.like is not None:
        with open_raster(config.like) as like:
            grid = grid_of(like)
    else:
        grid = finest_grid(own or layers, config.resolution)
    for layer in layers:
        if not covered_share(grid, layer.grid):
            raise RasterError(
                f"{layer.band.path} lies elsewhere than the scene; leave it out, or choose another "
                "--like"
            )
    for product in [*products, *([files] if files else [])]:
        of_product = [la for la, one in zip(layers, chosen) if one.product is product]
        if product.doubtful and config.offset is None:
            doubt_offset(product, [la for la in of_product if la.band.sentinel2])
    masks = []
    if config.mask is not None:
        masks = [MaskLayer(config.mask, config.mask_rule)]
    elif config.cloud_mask:
        for product in products or [files]:
            if product.mask is None:
                raise RasterError(f"{product.name} {product.no_mask}")
            masks.append(product.mask)
    masks += masks_of_files(layers)
    buffer_in_pixels(config.mask_buffer, grid)  # an error before the work
    stored = common_type(layers, grid)
    tags = tags_of(products, layers, stored, masks, config)
    return ScenePlan(target, layers, grid, stored, masks, tags)


def masks_of_files(layers: Sequence[Layer]) -> list[MaskLayer]:
    """The masks and alpha bands that files have of their own, one for each file."""
    masked = {layer.band.path: layer for layer in layers if layer.masks}
    return [
        MaskLayer(
            masks_vrt(layer), OWN_MASK, tuple(range(1, len(layer.masks) + 1)),
            "the file's own mask", of=path,
        )
        for path, layer in masked.items()
    ]  # fmt: skip


def tags_of(
    products: Sequence[Product],
    layers: Sequence[Layer],
    stored: tuple[str, float | None],
    masks: Sequence[MaskLayer],
    config: StackConfig,
) -> dict[str, str]:
    """The metadata of a scene: what it shows, and what was done to its pixels."""
    facts = joint_facts(la.band.facts for la in layers if la.band.facts)
    texts = {
        "product": [product.name for product in products],
        SENSOR: [*(product.sensor for product in products), *facts.sensors],
        ACQUIRED: [*(product.acquired for product in products), *facts.acquired],
        "tile": [product.tile for product in products],
    }
    tags = {
        key: ",".join(dict.fromkeys(filter(None, values)))
        for key, values in texts.items()
        if any(values)
    }
    by_offset: dict[tuple[int, str], list[str]] = {}
    for layer in layers:
        least = " (at least 1)" if layer.dtype.startswith("uint") else ""
        by_offset.setdefault((layer.band.offset, least), []).append(layer.name)
    done = [
        f"{offset:+d} added to {', '.join(names)}{least}"
        for (offset, least), names in by_offset.items()
        if offset
    ]
    tags["values"] = "; ".join(done) or "as in the files"
    if masks:
        grown = (
            f", clouds grown by {config.mask_buffer:g} m" if config.mask_buffer else ""
        )
        rules = [
            f"{mask.name}: {mask.remark or f'{mask.rule} invalid'}" for mask in masks
        ]
        tags["mask"] = "; ".join(rules) + grown
    return tags


def doubt_offset(product: Product, layers: Sequence[Layer]) -> None:
    """Warn where pixels contradict the offset that is stated for them, or that none is."""
    lows = {layer.name: darkest(layer) for layer in layers}
    lows = {name: low for name, low in lows.items() if low is not None}
    if not lows:
        return
    name = min(lows, key=lows.get)
    low, stated = lows[name], next(la.band.offset for la in layers if la.name == name)
    if not stated and BEGIN[0] <= low <= BEGIN[1]:
        log.warning(
            "warning: the darkest band of %s (%s) begins at %d, so an offset of 1000 may still be "
            "in its pixels; --offset -1000 removes it",
            product.name, name, low,
        )  # fmt: skip
    elif stated and low + stated < BEGIN[0] - 1000:
        log.warning(
            "warning: %s states an offset of %d, but its darkest band (%s) begins at %d, so the "
            "offset may be undone already; --offset 0 leaves the pixels as they are",
            product.name, stated, name, low,
        )  # fmt: skip


def darkest(layer: Layer) -> float | None:
    """The value that 1 % of a layer's pixels do not reach, by a sample; None without pixels."""
    with open_raster(layer.band.path) as file:
        shape = tuple(min(side, 256) for side in file.shape)
        pixels = file.read(layer.band.number, out_shape=shape)
    pixels = pixels[pixels > 0]
    return float(np.percentile(pixels, 1)) if pixels.size else None
