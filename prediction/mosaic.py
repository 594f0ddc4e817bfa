"""``mosaic.vrt``: the maps of many scenes as one raster, without a copy of their pixels; its style."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import (
    Element,
    ParseError,
    SubElement,
    fromstring,
    indent,
    tostring,
)

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
    Maps of other runs stay in a mosaic that joins them already, and one that joins a map of this
    run is written anew: that map may have changed.

    Args:
        tasks: All scenes, whichever job maps them.
        names: Of the classes.
    """
    given = [task.output for task in tasks]
    target = given[0].with_name(NAME)
    former = maps_of_mosaic(target)
    maps = maps_to_join(target, given, former)
    if not maps:
        return
    if target.exists() and not former:
        log.warning("warning: %s is no mosaic of maps and stays as it is", target)
        return
    with open_raster(maps[0]) as first:
        if first.transform.is_identity and not former:
            return
        extents = extents_on_grid(first, maps)
        if extents is None or not hold_the_same(maps):
            others = any(path.is_file() for path in former)
            stays = others and not set(given) & set(former)
            leave_unjoined(target, first, stays, on_one_grid=extents is not None)
            return
        root = describe_mosaic(first, maps, extents, names)
    indent(root)
    present = tostring(root, encoding="utf-8")
    before = target.read_bytes() if target.exists() else None
    with atomic_write(target) as part:
        part.write_bytes(present)
    log.info("%s joins %d maps", target, len(maps))
    warn_of_other_runs(target, maps)
    style = target.with_suffix(".qml")
    if not style.exists() or before not in (None, present):
        draw_mosaic(style, maps, names)
    elif before is None:
        log.warning("warning: %s is no style of %s and stays as it is", style, NAME)


def maps_of_mosaic(target: Path) -> list[Path]:
    """The maps that a mosaic of ours joins, from the lowest to that on top; none of another."""
    try:
        text = target.read_text(encoding="utf-8", errors="replace")
        sources = fromstring(text).iter("SourceFilename")
    except (FileNotFoundError, ParseError):
        return []
    names = [source.text or "" for source in sources]
    return [target.parent / name for name in names if "CLASS_NAMES" in text]


def maps_to_join(
    target: Path, given: Sequence[Path], former: Sequence[Path]
) -> list[Path]:
    """The maps of a mosaic, from the lowest to that on top; none where none is due.

    Args:
        target: The mosaic.
        given: The maps of all scenes of a run.
        former: Those that are joined by the mosaic that is there.
    """
    listed = [path for path in former if path.is_file()]
    if missing := sum(not path.is_file() for path in given):
        log.info("%s: not yet, %d of %d maps are missing", target, missing, len(given))
    if missing or len(given) < 2:
        return listed if set(given) & set(former) else []
    if set(listed) <= set(given):
        return list(given)
    return list(dict.fromkeys([*listed, *given]))


def leave_unjoined(
    target: Path, first: rasterio.DatasetReader, stays: bool, on_one_grid: bool
) -> None:
    """Say why maps are not joined, and what becomes of the former mosaic.

    Args:
        target: The mosaic.
        first: The first map.
        stays: Whether the former mosaic is of other maps alone; else it is removed.
        on_one_grid: Whether the maps lie on one pixel grid, and so hold different values.
    """
    fate = "removed" if target.exists() else "not written"
    if stays:
        fate = "stays as it is, without the maps of this run"
    else:
        remove_mosaic(target)
    if on_one_grid:
        log.warning(
            "warning: %s: %s, since the maps hold other values for the classes than %s, as of "
            "--write_codes; make all of them anew alike, with --overwrite",
            target, fate, first.name,
        )  # fmt: skip
        return
    epsg = first.crs.to_epsg() if first.crs else None
    log.info(
        "%s: %s, since the maps lie on different pixel grids; one raster of them: "
        "gdalwarp -t_srs EPSG:%s %s %s", target, fate, epsg or "...",
        target.with_name("*_prediction.tif"), target.with_suffix(".tif"),
    )  # fmt: skip


def remove_mosaic(target: Path) -> None:
    """Remove a mosaic of maps that have been replaced, if there is one."""
    if target.exists():
        target.unlink()
        target.with_suffix(".qml").unlink(missing_ok=True)


def hold_the_same(maps: Sequence[Path]) -> bool:
    """Whether all maps hold numbers of classes, or the same codes, in values of one type."""
    found = set()
    for path in maps:
        with open_raster(path) as one:
            found.add((one.tags().get(VALUES_TAG), one.dtypes[0], one.nodata))
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


def warn_of_other_runs(target: Path, maps: Sequence[Path]) -> None:
    """Warn, in one line, where joined maps were made with different windows or models."""
    runs = [(one.name, recorded_run(Task("", one), finished=True)) for one in maps]
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
