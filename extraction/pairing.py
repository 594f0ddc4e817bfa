"""The files that belong together: scenes, labels, grids and masks, paired by their names."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from common.errors import DatasetError
from common.rasters import PICTURES, SCENE_SUFFIXES
from common.text import some_of
from common.vectors import VECTOR_SUFFIXES, file_of
from extraction.cells import id_text
from extraction.settings import BatchConfig, ExtractionConfig, SceneFiles

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

    images = images_of(paths, config, ids_of)
    labels = dict.fromkeys(images, config.label)
    if config.label is None:
        labels = ids_of(paths, config.label_pattern)
    kinds = [images, labels]
    if config.use_per_image_grid:
        vectors = [path for path in paths if path.suffix.lower() in VECTOR_SUFFIXES]
        kinds.append(grids := ids_of(vectors, config.grid_pattern))
    if config.own_masks:
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
        named = some_of([str(path) for path in unmatched], 5)
        if not config.skip_unmatched:
            raise DatasetError(
                f"Files without a partner: {named}; add the missing ones, or give "
                "--skip_unmatched"
            )
        log.warning("left out, without a partner: %s", named)
    scenes = []
    for key, image in images.items():
        if key in complete:
            grid = str(grids[key]) if config.use_per_image_grid else config.grid
            files = str(image), str(labels[key]), grid
            mask = config.mask_of("")
            if config.own_masks:
                mask = replace(mask, path=str(masks[key]))
            scenes.append(SceneFiles(*files, id_text(key), mask))
    if not scenes:
        raise DatasetError(f"No scene in {folder} has a file for each of the patterns")
    return scenes


def images_of(
    paths: Sequence[Path], config: BatchConfig, ids_of: Callable
) -> dict[str, Path]:
    """The scenes among files, by their ids; pictures only where there are no others."""
    if config.label is not None:  # it may lie among the scenes, but is none
        alone = Path(file_of(config.label)).resolve()
        paths = [path for path in paths if path.resolve() != alone]
    if not config.image_pattern.partition("|")[0].endswith(".*"):
        return ids_of(paths, config.image_pattern)
    for kind in (SCENE_SUFFIXES, tuple(PICTURES)):
        scenes = [path for path in paths if path.suffix.lower() in kind]
        if images := ids_of(scenes, config.image_pattern):
            return images
    return {}


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
