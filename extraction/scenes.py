"""Scenes with their labels and grids, found and checked before the work begins."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from common.errors import DatasetError, OptionError, RasterError, SegmentationError
from common.files import describe_files
from common.interruption import until_stopped
from common.labels import open_label
from common.nodata import mask_shares, nodata_advice
from common.rasters import (
    SCENE_SUFFIXES,
    Source,
    files_of_raster,
    open_raster,
    require_georeference,
    select_bands,
)
from common.sources import require_whole
from common.text import first_reason, number_dates
from common.vectors import VECTOR_SUFFIXES, file_of, files_of_vector, is_vector
from extraction.cells import Cell, Grid, cells_of, id_text
from extraction.journal import Skipped
from extraction.settings import (
    BatchConfig,
    ExtractionConfig,
    ExtractionOptions,
    SceneFiles,
)

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger("semanticseg4eo")


def list_scenes(config: ExtractionConfig | BatchConfig) -> list[SceneFiles]:
    """The scenes that a command names; see ``pair_scenes``."""
    if isinstance(config, BatchConfig):
        return pair_scenes(config)
    mask = config.mask_of(Path(config.image).stem)
    return [SceneFiles(config.image, config.label, config.grid, "patch", mask)]


def pair_scenes(config: BatchConfig) -> list[SceneFiles]:
    """The scenes of a folder with their labels and grids, by the ids in their names.

    Raises:
        DatasetError: No scene, an id twice, or a file without its partner (unless they are to be
            skipped).
    """
    folder = Path(config.data_dir)
    if not folder.is_dir():
        raise DatasetError(f"No folder {folder}; give that of the scenes as --data_dir")
    paths = list_files(folder, config)

    def ids_of(paths: Iterable[Path], pattern: str) -> dict[str, Path]:
        return find_ids(paths, pattern, folder, config.recursive)

    any_kind = config.image_pattern.partition("|")[0].endswith(".*")
    scenes = [p for p in paths if not any_kind or p.suffix.lower() in SCENE_SUFFIXES]
    if config.label is not None:  # it may lie among the scenes, but is none
        alone = Path(file_of(config.label)).resolve()
        scenes = [path for path in scenes if path.resolve() != alone]
    images = ids_of(scenes, config.image_pattern)
    labels = dict.fromkeys(images, config.label)
    if config.label is None:
        labels = ids_of(paths, config.label_pattern)
    kinds = [images, labels]
    if config.use_per_image_grid:
        vectors = [path for path in paths if path.suffix.lower() in VECTOR_SUFFIXES]
        kinds.append(grids := ids_of(vectors, config.grid_pattern))
    if each_masked := "<id>" in (config.mask or ""):
        kinds.append(masks := find_masks(config.mask))
    if not images:
        deeper = "" if config.recursive else "; --recursive looks into its folders too"
        raise DatasetError(
            f"No file in {folder} matches --image_pattern {config.image_pattern}{deeper}"
        )
    complete = set.intersection(*map(set, kinds))
    unmatched = sorted(
        {str(kind[key]) for kind in kinds for key in kind.keys() - complete}
    )
    if unmatched:
        named = ", ".join(str(path) for path in unmatched[:5])
        more = f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else ""
        if not config.skip_unmatched:
            raise DatasetError(
                f"Files without a partner: {named}{more}; add the missing ones, or give "
                "--skip_unmatched"
            )
        log.warning("left out, without a partner: %s%s", named, more)
    scenes = []
    for key, image in images.items():
        if key in complete:
            grid = str(grids[key]) if config.use_per_image_grid else config.grid
            files = str(image), str(labels[key]), grid
            mask = config.mask_of("")
            if each_masked:
                mask = replace(mask, path=str(masks[key]))
            scenes.append(SceneFiles(*files, id_text(key), mask))
    if not scenes:
        raise DatasetError(f"No scene in {folder} has a file for each of the patterns")
    return scenes


def list_files(folder: Path, config: BatchConfig) -> list[Path]:
    """The files of a folder that the patterns may name, without those that ``--exclude`` names.

    Raises:
        DatasetError: A pattern of ``--exclude`` that names none.
    """
    if config.recursive:
        found = list(folder.rglob("*"))
    else:  # as deep as the patterns
        patterns = config.image_pattern, config.label_pattern, config.grid_pattern
        depths = {
            Path(text.partition("|")[0]).as_posix().count("/") for text in patterns
        }
        found = [p for depth in depths for p in folder.glob("*/" * depth + "*")]
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in found
        if path.is_file() and not in_parts(path, folder)
    }
    for pattern in config.exclude or ():
        named = re.compile(fnmatch.translate(pattern), re.IGNORECASE)
        hits = [text for text in paths if named.match(text)]
        if not hits:
            raise DatasetError(
                f"--exclude {pattern} names none of the {len(paths)} files in {folder}; it has to "
                "match the whole path below that folder, as 'old/*'"
            )
        paths = {text: path for text, path in paths.items() if text not in hits}
    return sorted(paths.values())


def find_masks(pattern: str) -> dict[str, Path]:
    """The masks of the scenes by their ids; ``pattern`` is ``--mask`` with an ``<id>``."""
    folder = Path(pattern).parent
    if not folder.is_dir():
        raise DatasetError(f"--mask: no folder {folder}")
    return find_ids(sorted(folder.iterdir()), Path(pattern).name, folder)


def in_parts(path: Path, folder: Path) -> bool:
    """Whether a file is a helper file of a VRT that ``stack`` wrote."""
    inner = path.relative_to(folder).parts[:-1]
    return any(name.lower().endswith(".parts") for name in inner)


def find_ids(
    paths: Iterable[Path], pattern: str, folder: Path, recursive: bool = False
) -> dict[str, Path]:
    """Files whose path matches a pattern, in any case, by the text in the place of ``<id>``.

    Each with what the pattern says of layers (``Grid_<id>.gpkg|layername=x``).

    Args:
        paths: The files.
        pattern: Of their paths below ``folder``; neither ``<id>`` nor * stands for a /.
        folder: Where they lie.
        recursive: It may match in folders of that folder too.

    Raises:
        DatasetError: Two files of one id.
    """
    pattern, bar, layer = pattern.partition("|")
    regex = re.escape(Path(pattern).as_posix()).replace(r"\*", "[^/]*")
    regex = "(.*/)?" * recursive + regex.replace("<id>", "(?P<id>[^/]+)")
    found: dict[str, Path] = {}
    for path in paths:
        text = path.relative_to(folder).as_posix()
        match = re.fullmatch(regex, text, re.IGNORECASE)
        if not match:
            continue
        key = match["id"].lower()
        if key in found:
            raise DatasetError(f"{found[key]} and {path} have the same id")
        found[key] = Path(f"{path}{bar}{layer}")
    return found


@dataclass(frozen=True)
class ScenePlan:
    """A scene and its cells, checked before the work."""

    scene: SceneFiles
    crs: object
    bands: list[dict]
    cells: list[Cell]
    label_values: list[int] | None
    class_names: list[str] | None
    unlabelled: int
    label_nodata: int | None = None  # declared, though it looks like a class
    advice: tuple[str | None, ...] = ()  # what the user should know of label and scene
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
    for lines in zip_longest(*(plan.advice for plan in plans)):
        if advised := [line for line in lines if line]:
            others = f" (and {len(advised) - 1} others likewise)"
            log.warning("%s%s", advised[0], others * (len(advised) > 1))
    names = Counter(cell.name for plan in plans for cell in plan.cells)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise DatasetError(
            f"Two cells would have the name {name}; rename scenes or ids"
        )
    return plans


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
        require_georeference(image)
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
        with open_label(scene.label, image, *label_options(config)) as label:
            if label.warped:
                text = "%s is warped onto the image's pixels (nearest)"
                log.info(text, label.source)
            source = Source(image, bands, nodata=config.nodata, mask=scene.mask)
            of_scene = *nodata_advice(source), mask_shares(source)
            advice = (*label.advice(), *of_scene)
            return ScenePlan(
                scene, image.crs, described, cells, label.values, label.names, label.unlabelled,
                label.nodata, advice, columns=columns,
            ), skipped  # fmt: skip


def describe_sources(plans: Sequence[ScenePlan]) -> dict[str, str]:
    """What distinguishes all files that are read, by their names."""
    files: list[str] = []
    for scene in (plan.scene for plan in plans):
        of_label = files_of_vector if is_vector(scene.label) else files_of_raster
        files += files_of_raster(scene.image) + of_label(scene.label)
        files += files_of_vector(scene.grid) if scene.grid else []
        files += files_of_raster(scene.mask.path) if scene.mask else []
    return describe_files(files)


def label_options(config: ExtractionOptions) -> tuple:
    """The options of the label, for ``open_label``."""
    return config.label_column, config.label_values, config.class_names


def _require_alike(first: ScenePlan, other: ScenePlan) -> None:
    """Raise DatasetError unless two scenes can be in one dataset."""
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
