"""Scenes with their labels and grids, checked before the work begins."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from tqdm import tqdm

from common.colours import Colour, has_equal, table_colours
from common.errors import DatasetError, OptionError, RasterError, SegmentationError
from common.files import describe_files
from common.ground import require_on_earth
from common.interruption import until_stopped
from common.label_values import file_of_values
from common.labels import open_label
from common.legends import asked_colours, missing_advice, read_colours
from common.masks import MaskSummary, coverage_lines, report_text
from common.nodata import nodata_advice
from common.options import is_legend
from common.rasters import (
    Source,
    band_scaling,
    files_of_raster,
    has_no_location,
    open_raster,
    require_georeference,
    select_bands,
)
from common.sources import require_whole
from common.text import first_reason, number_dates
from common.vector_labels import is_drawn, require_texts
from common.vectors import files_of_vector
from extraction.cells import Cell, Grid, cells_of
from extraction.journal import Skipped
from extraction.pairing import list_scenes
from extraction.settings import (
    BatchConfig,
    ExtractionConfig,
    ExtractionOptions,
    SceneFiles,
)

if TYPE_CHECKING:
    import rasterio
    from pandas import DataFrame

log = logging.getLogger("semanticseg4eo")


@dataclass(frozen=True)
class ScenePlan:
    """A scene and its cells, checked before the work."""

    scene: SceneFiles
    crs: object
    bands: list[dict]
    cells: list[Cell]
    label_values: list[int | list[int]] | None
    class_names: list[str] | None
    unlabelled: int
    label_nodata: int | None = None  # declared, though it looks like a class
    advice: tuple[str | None, ...] = ()  # what the user should know of label and scene
    mask: MaskSummary | None = None  # what ``--mask`` says of a sample of the pixels
    codes: Sequence[int | str] | None = None  # values or texts that became classes
    table: dict[int, Colour] = field(default_factory=dict)  # colours of the label
    colours: Sequence[Colour | None] = ()  # of classes, where somebody gave them
    values: str = (
        ""  # what is known of what its numbers mean: their type, scales and offsets
    )
    texts: list[str] | None = None  # that the column of a vector label holds
    columns: DataFrame | None = None  # what the grid holds of each cell, a row per cell


def plan_scenes(
    config: ExtractionConfig | BatchConfig, skipped: dict
) -> list[ScenePlan]:
    """Check all scenes before the work begins.

    Args:
        config: Their settings.
        skipped: Receives the cells, and with ``--skip_errors`` the scenes, that cannot be used.

    Raises:
        SegmentationError: A scene cannot be used, unless ``--skip_errors`` leaves it out.
    """
    plans: list[ScenePlan] = []
    if config.class_colors:
        read_colours(config.class_colors)  # a wrong one is an error before the work
    scenes = list_scenes(config)
    several = isinstance(config, BatchConfig) and config.grid is not None
    grid = Grid(config.grid, config.id_column) if several else None
    for scene in until_stopped(
        tqdm(scenes, "checking scenes", leave=False, disable=None)
    ):
        try:
            plan, reasons = plan_scene(scene, config, grid)
            if plans:
                _require_alike(plans[0], plan)
        except (SegmentationError, OSError) as error:
            alone, wrong_option = len(scenes) == 1, isinstance(error, OptionError)
            if not config.skip_errors or alone or wrong_option:
                raise
            skipped[scene.image] = Skipped(str(error), is_error=True)
            continue
        plans.append(plan)
        skipped |= reasons
    if not plans:
        raise DatasetError(f"No scene can be used ({first_reason(skipped)})")
    require_texts(config, [plan.texts for plan in plans])
    warn_of_values(plans)
    for lines in zip_longest(*(plan.advice for plan in plans)):
        if advised := [line for line in lines if line]:
            others = f" (and {len(advised) - 1} others likewise)"
            log.warning("%s%s", advised[0], others * (len(advised) > 1))
    if config.mask is not None:
        report_masks(plans, config)
    names = Counter(cell.name for plan in plans for cell in plan.cells)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise DatasetError(
            f"Two cells would have the name {name}; rename scenes or ids"
        )
    colours = known_colours(config.class_colors, plans)
    return [replace(plan, colours=colours) for plan in plans]


def describe_values(image: rasterio.DatasetReader, bands: Sequence[int]) -> str:
    """The types of bands and, where they have them, the tags of scale and offset, as text."""
    types = " and ".join(dict.fromkeys(image.dtypes[band - 1] for band in bands))
    scales, offsets = band_scaling(image, bands) or ((), ())
    pairs = dict.fromkeys(f"{a:g}, {b:g}" for a, b in zip(scales, offsets))
    tags = f" of scale and offset ({'; '.join(pairs)})" if pairs else ""
    return f"{types}{tags}"


def warn_of_values(plans: Sequence[ScenePlan]) -> None:
    """Log where equal numbers of several scenes need not mean equal values."""
    kinds = {plan.values: plan.scene.image for plan in reversed(plans)}
    if len(kinds) > 1:
        found = [f"{image} holds {kind}" for kind, image in reversed(kinds.items())]
        log.warning(
            "warning: equal numbers of these scenes need not mean equal values: %s; make datasets "
            "of their own, or bring them to one scale and offset (gdal_translate -unscale)",
            "; ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else ""),
        )


def known_colours(asked: str | None, plans: Sequence[ScenePlan]) -> list[Colour | None]:
    """The colours of the classes by ``--class_colors``, else by the first label that has any.

    Returns:
        In class order, None where nobody says; empty where nobody says any.

    Raises:
        OptionError: See ``asked_colours``.
    """
    first = plans[0]
    names, codes = first.class_names, first.codes
    if asked:
        found = asked_colours(asked, names, codes)
        if line := missing_advice(asked, found, names):
            log.warning(line)
        return found
    codes = codes or (range(len(names)) if names else None)
    tables = [(p.scene.label, table_colours(p.table, codes)) for p in plans]
    tables = [(label, colours) for label, colours in tables if colours]
    if not tables:
        return []
    label, found = tables[0]
    if codes and has_equal(found):
        text = "the colour table of %s has one colour for several classes: not used"
        log.warning(text, label)
        return []
    other = [name for name, colours in tables if colours != found]
    if other:
        text = "the colour table of %s differs from that of %s, which counts%s"
        more = f" (and {len(other) - 1} others likewise)" * (len(other) > 1)
        log.warning(text, other[0], label, more)
    return found


def report_masks(
    plans: Sequence[ScenePlan], config: ExtractionConfig | BatchConfig
) -> None:
    """Log how much ``--mask`` makes invalid, and the scenes that one mask does not cover.

    Raises:
        RasterError: It has no ground in common with any of the scenes.
    """
    covered = {plan.scene.image: plan.mask.covered for plan in plans}
    lines = coverage_lines(name_of_mask(plans, config), covered)
    name = plans[0].scene.image if len(plans) == 1 else f"{len(plans)} scenes"
    for line in (*lines, f"{name}: {masks_text(plans, config)}"):
        log.warning(line)


def name_of_mask(
    plans: Sequence[ScenePlan], config: ExtractionConfig | BatchConfig
) -> str:
    """The file of ``--mask``; its pattern where several scenes have a mask each."""
    return plans[0].scene.mask.path if len(plans) == 1 else config.mask


def masks_text(
    plans: Sequence[ScenePlan], config: ExtractionConfig | BatchConfig
) -> str:
    """How much of the scenes ``--mask`` makes invalid."""
    found = [plan.mask for plan in plans]
    return f"about {report_text(name_of_mask(plans, config), found)}"


def plan_scene(
    scene: SceneFiles, config: ExtractionOptions, grid: Grid | None = None
) -> tuple[ScenePlan, dict[str, Skipped]]:
    """Open a scene and its label, find its cells; {name: Skipped} of the others.

    ``grid`` is the one that it shares with other scenes.
    """
    with open_raster(scene.image) as image:
        require_whole(scene.image)
        if scene.mask:
            require_whole(scene.mask.path)
        if has_no_location(image):
            require_no_ground(scene, config)
        else:
            require_georeference(image)
            require_on_earth(image)
        bands = select_bands(image, config.bands)
        if config.image_channels not in (None, len(bands)):
            raise RasterError(
                f"--image_channels {config.image_channels}, but {image.name} has {len(bands)} "
                "bands; select them with --bands"
            )
        cells, skipped, columns = cells_of(scene, config, image, grid)
        described = [
            {"band": band, "description": image.descriptions[band - 1]}
            for band in bands
        ]
        with open_label(scene.label, image, config) as label:
            if label.warped:
                text = "%s is warped onto the image's pixels (nearest)"
                log.info(text, label.source)
            source = Source(image, bands, nodata=config.nodata, mask=scene.mask)
            advice = (*label.advice(), *nodata_advice(source))
            mask = source.mask
            if mask and config.own_masks:
                coverage_lines(mask.path, {scene.image: mask.covered})
            return ScenePlan(
                scene, image.crs, described, cells, label.stored_values, label.names, label.unlabelled,
                label.nodata, advice, mask and mask.summary(), label.codes, label.table,
                values=describe_values(image, bands), texts=label.texts, columns=columns,
            ), skipped  # fmt: skip


def require_no_ground(scene: SceneFiles, config: ExtractionOptions) -> None:
    """Raise DatasetError where an option needs the location that a picture does not have."""
    needs = {
        "a grid": scene.grid, "--mask": scene.mask, "--test_area": config.test_area,
        "--split_by block": config.split_by == "block", "--buffer": config.buffer,
        f"the label {scene.label}": is_drawn(scene.label),
    }  # fmt: skip
    wanting = [name for name, given in needs.items() if given]
    if wanting:
        raise DatasetError(
            f"{scene.image} has no location, which {wanting[0]} needs; leave that out, or give the "
            "picture a CRS (gdal_translate -a_srs)"
        )


def describe_sources(
    plans: Sequence[ScenePlan], config: ExtractionOptions
) -> dict[str, str]:
    """What distinguishes all files that are read, by their names."""
    files = [config.class_colors] if is_legend(config.class_colors or "") else []
    files += filter(None, [file_of_values(config.label_values)])
    for scene in (plan.scene for plan in plans):
        of_label = files_of_vector if is_drawn(scene.label) else files_of_raster
        files += files_of_raster(scene.image) + of_label(scene.label)
        files += files_of_vector(scene.grid) if scene.grid else []
        files += files_of_raster(scene.mask.path) if scene.mask else []
    return describe_files(files)


def _require_alike(first: ScenePlan, other: ScenePlan) -> None:
    """Raise DatasetError unless two scenes can be in one dataset."""
    if (first.crs is None) != (other.crs is None):
        with_one, without = (first, other) if first.crs else (other, first)
        raise DatasetError(
            f"{without.scene.image} has no location, but {with_one.scene.image} has; make a dataset "
            "of each"
        )
    if len(first.bands) != len(other.bands):
        raise DatasetError(
            f"{other.scene.image} has {len(other.bands)} bands, but {first.scene.image} "
            f"{len(first.bands)}; select them with --bands"
        )
    described = [[band["description"] for band in p.bands] for p in (first, other)]
    differ = number_dates(described[0]) != number_dates(described[1])
    if differ and all(described[0] + described[1]):
        raise DatasetError(
            f"The bands of {other.scene.image} are {', '.join(described[1])}, but those of "
            f"{first.scene.image} {', '.join(described[0])}; select them with --bands"
        )
    if first.class_names != other.class_names:
        raise DatasetError(
            f"{other.scene.label} has the classes {', '.join(other.class_names or ['0, 1...'])}, "
            f"but {first.scene.label} {', '.join(first.class_names or ['0, 1...'])}; name them in "
            "order with --label_values"
        )
