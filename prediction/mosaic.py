"""``mosaic.vrt``: the maps of many scenes as one raster, without a copy of their pixels; its style."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np
import rasterio
from rasterio.enums import ColorInterp

from common.files import atomic_write
from common.map_classes import VALUES_TAG, classes_of_map, colours_of_map
from common.rasters import open_raster
from common.styles import (
    add_categories,
    paletted_style,
    write_style,
)
from prediction.tasks import Task, recorded_run
from prediction.tiling import Extent

log = logging.getLogger("semanticseg4eo")

NAME = "mosaic.vrt"
KINDS = {"uint8": "Byte", "uint16": "UInt16", "int16": "Int16", "int32": "Int32"}
OFF_GRID = 0.01  # pixels from which maps lie on different pixel grids


def join_maps(tasks: Sequence[Task], names: Sequence[str]) -> None:
    """Write ``mosaic.vrt`` beside the maps of several scenes, when all of them are there.

    Where maps overlap, the last one with a valid pixel counts. Maps on different pixel grids are
    not joined; a line says how. Those without a place on the ground are pictures of their own.

    Args:
        tasks: All scenes, whichever job maps them.
        names: Of the classes.
    """
    if len(tasks) < 2:
        return
    maps = [task.output for task in tasks]
    target = maps[0].with_name(NAME)
    if missing := sum(not path.is_file() for path in maps):
        log.info("%s: not yet, %d of %d maps are missing", target, missing, len(maps))
        return
    if target.exists() and "CLASS_NAMES" not in target.read_text(errors="replace"):
        log.warning("warning: %s is no mosaic of maps and stays as it is", target)
        return
    with open_raster(maps[0]) as first:
        if first.transform.is_identity:
            return
        extents = extents_on_grid(first, maps)
        if extents is None:
            remove_mosaic(target)
            epsg = first.crs.to_epsg() if first.crs else None
            log.info(
                "%s: not written, the maps lie on different pixel grids; one raster of them: "
                "gdalwarp -t_srs EPSG:%s %s %s", target, epsg or "...",
                target.with_name("*_prediction.tif"), target.with_suffix(".tif"),
            )  # fmt: skip
            return
        if not hold_the_same(maps):
            remove_mosaic(target)
            log.warning(
                "warning: %s: not written, since the maps hold other values for the classes than "
                "%s, as of --write_codes; make all of them anew alike, with --overwrite",
                target, maps[0],
            )  # fmt: skip
            return
        root = describe_mosaic(first, maps, extents, names)
    indent(root)
    present = tostring(root, encoding="utf-8")
    former = target.read_bytes() if target.exists() else None
    with atomic_write(target) as part:
        part.write_bytes(present)
    log.info("%s joins %d maps", target, len(maps))
    warn_of_other_runs(target, tasks)
    style = target.with_suffix(".qml")
    if not style.exists() or former not in (None, present):
        draw_mosaic(style, maps, names)
    elif former is None:
        log.warning("warning: %s is no style of %s and stays as it is", style, NAME)


def remove_mosaic(target: Path) -> None:
    """Remove a mosaic of maps that have been replaced, if there is one."""
    if target.exists():
        target.unlink()
        target.with_suffix(".qml").unlink(missing_ok=True)


def hold_the_same(maps: Sequence[Path]) -> bool:
    """Whether all maps hold numbers of classes, or the same codes."""
    found = set()
    for path in maps:
        with open_raster(path) as one:
            found.add(one.tags().get(VALUES_TAG))
    return len(found) == 1


def draw_mosaic(target: Path, maps: Sequence[Path], names: Sequence[str]) -> None:
    """Write the style of a mosaic, unless its maps have different classes or colours."""
    found = {legend_of(path) for path in maps}
    values, known, colours = next(iter(found))
    if len(found) == 1 and list(known) == list(names):
        write_style(target, paletted_style(names, colours, values))
        return
    target.unlink(missing_ok=True)
    log.warning(
        "warning: the maps of %s have different classes or colours, so it has no style; map all "
        "of them with one model",
        target.with_name(NAME),
    )


def legend_of(path: Path) -> tuple[tuple, tuple, tuple]:
    """The values, names and colours of the classes of a map; none of another raster."""
    with open_raster(path) as one:
        classes = classes_of_map(one) or {}
        table = colours_of_map(one)
    if not classes or not classes.keys() <= table.keys():
        return (), (), ()
    names = tuple(one.name for one in classes.values())
    return tuple(classes), names, tuple(table[value] for value in classes)


def warn_of_other_runs(target: Path, tasks: Sequence[Task]) -> None:
    """Warn, in one line, where joined maps were made with different windows or models."""
    runs = [(task.output.name, recorded_run(task, finished=True)) for task in tasks]
    made = [
        (name, run.get("options", {}).get("patch_size"), run.get("models", []))
        for name, run in runs
        if run
    ]
    unlike = []
    for name, size, models in made:
        first, usual_size, usual_models = made[0]
        what = [f"windows of {size} pixels, not {usual_size}"] * (size != usual_size)
        if identities(models) != identities(usual_models):
            files, usual = (
                ", ".join(model["name"] for model in one)
                for one in (models, usual_models)
            )
            what.append(
                f"model {files}, " + (f"not {usual}" if files != usual else "changed")
            )
        if what:
            unlike.append(f"{name}: {'; '.join(what)}")
    if unlike:
        log.warning(
            "warning: of the maps in %s %d were made otherwise than %s (%s); --overwrite makes all "
            "anew, with one --model and --patch_size",
            target, len(unlike), first, unlike[0],
        )  # fmt: skip


def identities(models: Sequence[dict]) -> list[dict]:
    """What distinguishes model files, wherever they lie."""
    return [{key: one[key] for key in one if key != "name"} for one in models]


def extents_on_grid(
    first: rasterio.DatasetReader, maps: Sequence[Path]
) -> list[Extent] | None:
    """Where maps lie, in pixels of the first; None where one is not on its pixel grid."""
    extents = []
    for path in maps:
        with open_raster(path) as one:
            corners = [(0, 0), (one.width, one.height)]
            places = [~first.transform * (one.transform * place) for place in corners]
            left, top = np.round(places[0]).astype(int).tolist()
            extent = Extent(top, top + one.height, left, left + one.width)
            fitting = [(left, top), (extent.right, extent.bottom)]
            off = np.abs(np.subtract(places, fitting)).max()
            if one.crs != first.crs or off > OFF_GRID:
                return None
        extents.append(extent)
    return extents


def describe_mosaic(
    first: rasterio.DatasetReader,
    maps: Sequence[Path],
    extents: Sequence[Extent],
    names: Sequence[str],
) -> Element:
    """The VRT of maps, all like the first, that lie at ``extents`` in pixels of the first."""
    tops, bottoms, lefts, rights = zip(*extents)
    top, left = min(tops), min(lefts)
    height, width = max(bottoms) - top, max(rights) - left
    root = Element("VRTDataset", rasterXSize=str(width), rasterYSize=str(height))
    if first.crs:
        SubElement(root, "SRS").text = first.crs.to_wkt()
    transform = first.transform * first.transform.translation(left, top)
    SubElement(root, "GeoTransform").text = ", ".join(map(repr, transform.to_gdal()))
    metadata = SubElement(root, "Metadata")
    for key, value in first.tags().items():
        SubElement(metadata, "MDI", key=key).text = value
    kind = KINDS[first.dtypes[0]]
    band = SubElement(root, "VRTRasterBand", dataType=kind, band="1")
    nodata = str(int(first.nodata))
    SubElement(band, "NoDataValue").text = nodata
    values = list(classes_of_map(first) or range(len(names)))
    coloured = first.colorinterp[0] == ColorInterp.palette
    SubElement(band, "ColorInterp").text = "Palette" if coloured else "Gray"
    if coloured:
        colours, table = SubElement(band, "ColorTable"), first.colormap(1)
        for number in range(max(values) + 1):
            colour = enumerate(table[number], start=1)
            SubElement(colours, "Entry", {f"c{i}": str(value) for i, value in colour})
    add_categories(band, names, values)
    for path, extent in zip(maps, extents):
        source = SubElement(band, "ComplexSource")
        SubElement(source, "SourceFilename", relativeToVRT="1").text = path.name
        SubElement(source, "SourceBand").text = "1"
        rows, columns = extent.shape
        for tag, x, y in (
            ("SrcRect", 0, 0),
            ("DstRect", extent.left - left, extent.top - top),
        ):
            numbers = {"xOff": x, "yOff": y, "xSize": columns, "ySize": rows}
            text = {name: str(number) for name, number in numbers.items()}
            SubElement(source, tag, text)
        SubElement(source, "NODATA").text = nodata
    return root
