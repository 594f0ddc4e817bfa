"""A scene as a VRT: what each band is made of, as XML that GDAL follows.

A band on the scene's own pixels is read from its file directly: a look-up table adds the offset and
keeps measured pixels from becoming nodata. Any other band goes through two helper files: one that
does this on the band's own pixels, and one that resamples the result, so that neither nodata nor an
offset is ever mixed into a neighbour. GDAL's warper does that exactly; a source that VRTs resample themselves
would be read from the overviews of the file, where both are mixed already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import numpy as np

from extraction.stack_grid import Grid, Layer, resampling_to

TYPES = {
    "uint8": "Byte", "int8": "Int8", "uint16": "UInt16", "int16": "Int16", "uint32": "UInt32",
    "int32": "Int32", "uint64": "UInt64", "int64": "Int64", "float32": "Float32",
    "float64": "Float64",
}  # fmt: skip
BLOCKS = 128, 1024  # least and most rows of a block of the scene
WARPED_BLOCK = 512


def write_vrt(
    target: Path,
    parts: Path,
    shown_parts: str,
    layers: Sequence[Layer],
    grid: Grid,
    stored: tuple[str, float | None],
    tags: dict[str, str],
    mask: bool,
) -> None:
    """Write a scene and its helper files.

    Args:
        target: The VRT to write.
        parts: The folder of the helper files, as deep as the one that the VRT shall name.
        shown_parts: How the VRT names it, relative to itself.
        layers: The bands.
        grid: The scene's pixels.
        stored: Type and nodata value of all bands.
        tags: Metadata of the scene.
        mask: Whether ``parts`` holds ``mask.tif``.
    """
    root = dataset(grid, tags)
    # readers take whole blocks, so that each block of a file is decoded once
    rows = [layer.block[0] for layer in layers if grid.offset_in(layer.grid)]
    side = str(min(max(rows, default=WARPED_BLOCK), BLOCKS[1]))
    side = max(side, str(BLOCKS[0]), key=int)
    for number, layer in enumerate(layers, start=1):
        band = add_band(root, number, stored, blockXSize=side, blockYSize=side)
        describe(band, layer)
        if (offset := grid.offset_in(layer.grid)) is None:
            path = warped(parts, layer, grid, stored)
            source = add_source(band, f"{shown_parts}/{path}", True, 1)
            place(source, stored[0], grid, grid, (0, 0), (WARPED_BLOCK, WARPED_BLOCK))
        else:
            add_pixels(band, layer, grid, offset, stored[0], target.parent)
    if mask:
        source = mask_source(root, f"{shown_parts}/mask.tif", True, "1")
        place(source, "uint8", grid, grid, (0, 0), (WARPED_BLOCK, WARPED_BLOCK))
    save(root, target)


def masks_vrt(layer: Layer) -> str:
    """A VRT, as XML, of the masks that a layer's file has: 0 where it is invalid."""
    root = dataset(layer.grid)
    for number, name in enumerate(layer.masks, start=1):
        band = add_band(root, number, (layer.dtype, None))
        source = add_source(band, layer.band.path, False, name, "SimpleSource")
        place(source, layer.dtype, layer.grid, layer.grid, (0, 0), layer.block)
    return ElementTree.tostring(root, "unicode")


def dataset(
    grid: Grid, tags: dict[str, str] | None = None, **attributes: str
) -> Element:
    """The root of a VRT."""
    size = {"rasterXSize": str(grid.width), "rasterYSize": str(grid.height)}
    root = Element("VRTDataset", size | attributes)
    SubElement(root, "SRS").text = grid.crs.to_wkt()
    SubElement(root, "GeoTransform").text = numbers(grid.transform.to_gdal())
    if tags:
        metadata = SubElement(root, "Metadata")
        for key, value in tags.items():
            SubElement(metadata, "MDI", key=key).text = value
    return root


def add_band(
    root: Element, number: int, stored: tuple[str, float | None], **attributes: str
) -> Element:
    dtype, nodata = stored
    kind = {"dataType": TYPES[dtype], "band": str(number)}
    band = SubElement(root, "VRTRasterBand", kind | attributes)
    if nodata is not None:
        SubElement(band, "NoDataValue").text = number_text(nodata)
    return band


def describe(band: Element, layer: Layer) -> None:
    """Say what a band is and where it comes from."""
    metadata = SubElement(band, "Metadata")
    facts = {"source": os.path.basename(layer.band.path)}
    if layer.band.offset:
        facts["offset_added"] = str(layer.band.offset)
    for key, value in facts.items():
        SubElement(metadata, "MDI", key=key).text = value
    SubElement(band, "Description").text = layer.name
    if layer.band.scaling:
        scale, offset = layer.band.scaling
        offset -= scale * layer.band.offset  # the same values by other numbers
        SubElement(band, "Offset").text = number_text(offset)
        SubElement(band, "Scale").text = number_text(scale)


def add_pixels(
    band: Element,
    layer: Layer,
    grid: Grid,
    offset: tuple[int, int],
    dtype: str,
    folder: Path,
) -> None:
    """Fill a band of a VRT in a folder from a layer's file, which has the same pixels."""
    path, relative = relative_path(layer.band.path, folder)
    source = add_source(band, path, relative, layer.band.number)
    place(source, layer.dtype, layer.grid, grid, offset, layer.block)
    if layer.nodata is not None:
        SubElement(source, "NODATA").text = number_text(layer.nodata)
    if layer.band.offset:
        table = lookup_table(layer.band.offset, layer.dtype, layer.nodata)
        SubElement(source, "LUT").text = table


def add_source(
    band: Element, path: str, relative: bool, number: int | str, kind="ComplexSource"
) -> Element:
    source = SubElement(band, kind)
    name = SubElement(source, "SourceFilename", relativeToVRT=str(int(relative)))
    name.text = path
    SubElement(source, "SourceBand").text = str(number)
    return source


def mask_source(root: Element, path: str, relative: bool, name: str) -> Element:
    """What a VRT's mask is read from: a band of a file."""
    mask = SubElement(SubElement(root, "MaskBand"), "VRTRasterBand", dataType="Byte")
    return add_source(mask, path, relative, name, "SimpleSource")


def place(
    source: Element, dtype: str, of: Grid, grid: Grid, offset: tuple[int, int], block
) -> None:
    """Say which pixels of a source become which of a grid that begins at an offset in it."""
    SubElement(
        source, "SourceProperties", RasterXSize=str(of.width), RasterYSize=str(of.height),
        DataType=TYPES[dtype], BlockXSize=str(block[1]), BlockYSize=str(block[0]),
    )  # fmt: skip
    left, top = (max(0, value) for value in offset)
    right = min(of.width, offset[0] + grid.width)
    bottom = min(of.height, offset[1] + grid.height)
    size = {"xSize": str(right - left), "ySize": str(bottom - top)}
    SubElement(source, "SrcRect", {"xOff": str(left), "yOff": str(top)} | size)
    shift = {"xOff": str(left - offset[0]), "yOff": str(top - offset[1])}
    SubElement(source, "DstRect", shift | size)


def lookup_table(offset: int, dtype: str, nodata: float | None = None) -> str:
    """What adds an offset to whole numbers: unsigned ones from 1, signed ones from the least.

    Nothing falls below that or beyond the type, and no measured pixel becomes nodata: it gets the
    number beside it.
    """
    limits = np.iinfo(dtype)
    low, high = 1 if limits.min == 0 else int(limits.min), int(limits.max)

    def shifted(number: int) -> int:
        moved = min(max(number + offset, low), high)
        return moved + (1 if moved < high else -1) if moved == nodata else moved

    # straight lines between these; what becomes nodata has a neighbour on each side
    bends = [low, low - offset, high - offset, high]
    if nodata is not None and low <= nodata <= high:
        bends += [int(nodata) - offset + side for side in (-1, 0, 1)]
    inside = sorted({number for number in bends if low <= number <= high})
    return ",".join(f"{number}:{shifted(number)}" for number in inside)


def warped(
    parts: Path, layer: Layer, grid: Grid, stored: tuple[str, float | None]
) -> str:
    """Write the two helper files of a layer with other pixels; the name of the second."""
    parts.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]", "_", layer.name)
    own = f"{stem}_own.vrt"
    root = dataset(layer.grid)
    band = add_band(root, 1, stored)
    add_pixels(band, layer, layer.grid, (0, 0), stored[0], parts)
    if layer.masks:  # neither are masked pixels mixed in
        path, relative = relative_path(layer.band.path, parts)
        source = mask_source(root, path, relative, layer.masks[0])
        place(source, "uint8", layer.grid, layer.grid, (0, 0), layer.block)
    save(root, parts / own)

    root = dataset(grid, subClass="VRTWarpedDataset")
    add_band(root, 1, stored, subClass="VRTWarpedRasterBand")
    for name in ("BlockXSize", "BlockYSize"):
        SubElement(root, name).text = str(WARPED_BLOCK)
    options = SubElement(root, "GDALWarpOptions")
    SubElement(options, "WarpMemoryLimit").text = str(64 * 2**20)
    SubElement(options, "ResampleAlg").text = resampling_to(layer, grid).capitalize()
    SubElement(options, "WorkingDataType").text = TYPES[stored[0]]
    SubElement(options, "Option", name="INIT_DEST").text = (
        "NO_DATA" if stored[1] is not None else "0"
    )
    SubElement(options, "SourceDataset", relativeToVRT="1").text = own
    add_transformer(options, layer.grid, grid)
    mapping = SubElement(
        SubElement(options, "BandList"), "BandMapping", src="1", dst="1"
    )
    if stored[1] is not None:
        for side in ("Src", "Dst"):
            SubElement(mapping, f"{side}NoDataReal").text = number_text(stored[1])
            SubElement(mapping, f"{side}NoDataImag").text = "0"
    save(root, parts / f"{stem}.vrt")
    return f"{stem}.vrt"


def add_transformer(options: Element, source: Grid, grid: Grid) -> None:
    """From the pixels of one grid to those of another, for the warper."""
    place = SubElement(options, "Transformer")
    if source.crs != grid.crs:  # an eighth of a pixel, as gdalwarp does
        approximate = SubElement(place, "ApproxTransformer")
        SubElement(approximate, "MaxError").text = "0.125"
        place = SubElement(approximate, "BaseTransformer")
    general = SubElement(place, "GenImgProjTransformer")
    for side, transform in (("Src", source.transform), ("Dst", grid.transform)):
        SubElement(general, f"{side}GeoTransform").text = numbers(transform.to_gdal())
        inverse = numbers((~transform).to_gdal())
        SubElement(general, f"{side}InvGeoTransform").text = inverse
    if source.crs != grid.crs:
        outer = SubElement(general, "ReprojectTransformer")
        inner = SubElement(outer, "ReprojectionTransformer")
        SubElement(inner, "SourceSRS").text = source.crs.to_wkt()
        SubElement(inner, "TargetSRS").text = grid.crs.to_wkt()


def relative_path(path: str, folder: Path) -> tuple[str, bool]:
    """A path as a VRT in a folder names it, and whether that is relative.

    GDAL knows no relative path into an archive or to a server, nor from one drive to another.
    """
    if path.startswith("/vsi") or not os.path.exists(path):
        return path, False
    try:
        # the system resolves .. behind links
        path, folder = map(os.path.realpath, (path, folder))
        return Path(os.path.relpath(path, folder)).as_posix(), True
    except ValueError:
        return os.path.abspath(path), False


def numbers(values: Sequence[float]) -> str:
    return ", ".join(repr(float(value)) for value in values)


def number_text(value: float) -> str:
    """As 0, -9999 or nan."""
    return f"{value:.17g}"


def save(root: Element, path: Path) -> None:
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8")
