"""The dataset folder: ``ROOT/Patch/{train,validation,test}/{images,labels}/NAME.tif``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import rasterio
from tqdm import tqdm

from common import SPLITS, UNLABELLED
from common.alpha import MOST_TRANSLUCENT, flagged_bands, translucent_share
from common.balance import ABSENT
from common.errors import DatasetError
from common.ground import (
    footprint,
    in_one_plane,
    on_earth,
    pixel_sides,
    pixel_size,
    to_metric_crs,
)
from common.interruption import until_stopped
from common.labels import read_label, require_one_band
from common.machine import fits_in_memory
from common.nodata import partly_nodata, partly_text
from common.places import Place, centre_distances, list_places, place_of
from common.provenance import Facts, facts_of_tags, joint_facts
from common.rasters import Source, open_raster, same_pixel_grid
from common.tiffs import list_tiffs

if TYPE_CHECKING:
    from geopandas import GeoSeries


@dataclass(frozen=True)
class PatchPair:
    """An image patch and the label patch of the same stem."""

    image: Path
    label: Path

    @property
    def name(self) -> str:
        return self.image.stem


def patch_root(dataset_root: str | Path) -> Path:
    """The folder that holds the splits: ``ROOT/Patch`` when it is there, else ``ROOT``."""
    root = Path(dataset_root)
    if not root.is_dir():
        raise DatasetError(f"No folder {root}; give the --output of the extraction")
    return root / "Patch" if (root / "Patch").is_dir() else root


def present_splits(dataset_root: str | Path) -> list[str]:
    """The splits that have image patches."""
    root = patch_root(dataset_root)
    return [split for split in SPLITS if list_tiffs(root / split / "images")]


def list_pairs(dataset_root: str | Path, split: str, required: bool = True):
    """The patch pairs of a split, by name.

    Returns:
        A list of ``PatchPair``; empty when the split is not ``required`` and has no images.

    Raises:
        DatasetError: No images, or an image or label without its partner.
    """
    folder = patch_root(dataset_root) / split
    images, labels = list_tiffs(folder / "images"), list_tiffs(folder / "labels")
    if not images and (required or labels):
        others = " and ".join(present_splits(dataset_root))
        absent = f": there is no {ABSENT[split][0]} split, only {others}"
        raise DatasetError(
            f"No images found in {folder / 'images'} (looked for .tif, .tiff)"
            f"{absent if others else ''}"
        )
    for missing, there, kind in (
        (images.keys() - labels.keys(), images, "label"),
        (labels.keys() - images.keys(), labels, "image"),
    ):
        if missing:
            example = there[min(missing)]
            raise DatasetError(
                f"{example} has no {kind} of the same name ({len(missing)} such files); "
                f"add {'them' if len(missing) > 1 else 'it'} or remove the patch"
            )
    return [PatchPair(images[stem], labels[stem]) for stem in images]


def _alphas_of(images: Sequence[Path]) -> list[int]:
    """The bands of patches that are transparency, by all of them: one may hold but water."""
    shares: dict[int, list[float]] = {}
    for image in images:
        with open_raster(image) as file:
            for band in flagged_bands(file):
                shares.setdefault(band, []).append(translucent_share(file, band))
    return [b for b, known in shares.items() if np.mean(known) <= MOST_TRANSLUCENT]


@lru_cache(8)
def _alphas_of_dataset(root: Path) -> list[int]:
    folders = sorted(root.glob("*/images"))
    images = [path for folder in folders for path in list_tiffs(folder).values()]
    return _alphas_of(images[:: len(images) // 100 + 1])


def alphas_of_patch(file: rasterio.DatasetReader) -> list[int]:
    """The bands of an image patch that are transparency, the same in all of its dataset."""
    flagged = flagged_bands(file)
    if not flagged:
        return []
    image = Path(file.name)
    if image.parent.name != "images":
        return _alphas_of([image])
    alphas = _alphas_of_dataset(image.parent.parent.parent)
    return [band for band in flagged if band in alphas]


def patch_bands(file: rasterio.DatasetReader) -> list[int]:
    """The bands of an image patch that are data."""
    alphas = alphas_of_patch(file)
    return [band for band in file.indexes if band not in alphas]


class PatchHeader(NamedTuple):
    """What an image patch says of itself, beside its pixels."""

    split: str  # the folder that it lies in
    descriptions: tuple[str | None, ...]  # of the bands that are data
    nodata: tuple[float | None, ...]  # declared for each of them
    data_type: str  # that holds all of them
    facts: Facts
    place: Place | None


def read_header(image: Path) -> PatchHeader:
    """Read what an image patch says of itself."""
    with open_raster(image) as file:
        chosen = [band - 1 for band in patch_bands(file)]
        # rasterio asks GDAL about all bands each time
        texts, nodata, types = file.descriptions, file.nodatavals, file.dtypes
        return PatchHeader(
            image.parent.parent.name,
            tuple(texts[b] for b in chosen),
            tuple(None if nodata[b] is None else float(nodata[b]) for b in chosen),
            np.result_type(*(types[b] for b in chosen)).name,
            facts_of_tags(file.tags()),
            place_of(file),
        )


def joint_headers(headers: Sequence[PatchHeader]) -> dict:
    """What the patches of a dataset say together, in plain values; None where nobody says it.

    Returns:
        "sensor" and "acquired" of all of them; "nodata" (per band) and "data_type", None where they
        differ; "places", see ``list_places``.
    """
    facts = joint_facts(header.facts for header in headers)
    # as texts, since NaN equals NaN
    nodata = {repr(header.nodata): header.nodata for header in headers}
    types = {header.data_type for header in headers}
    return {
        "sensor": facts.sensor,
        "acquired": list(facts.acquired) or None,
        "nodata": list(nodata.popitem()[1]) if len(nodata) == 1 else None,
        "data_type": types.pop() if len(types) == 1 else None,
        "places": list_places((header.split, header.place) for header in headers),
    }


def distance_between(
    patches: Sequence[tuple[Sequence[PatchPair], Sequence[PatchPair]]],
) -> float | None:
    """The median distance from examined patches to the nearest one that was trained on.

    Args:
        patches: Those that are examined and those that were trained on; several where each part has
            a training of its own.

    Returns:
        Metres between centres; None where one patch does not say where it lies on the Earth.
    """
    places: dict[Path, Place | None] = {}
    for pair in {pair for both in patches for some in both for pair in some}:
        with open_raster(pair.image) as file:
            places[pair.image] = place_of(file)
    if None in places.values():
        return None
    found = []
    for both in patches:
        listed = ([("", places[pair.image]) for pair in some] for some in both)
        distances = centre_distances(*(list_places(some) or [] for some in listed))
        if distances is None:
            return None
        found.append(distances)
    return float(np.median(np.concatenate(found)))


def read_patch(pair: PatchPair, ignore_index: int = UNLABELLED):
    """Read a pair as the network needs it.

    Returns:
        image (C, H, W) in the file's dtype, valid (H, W) bool, mask (H, W) int64 with
        ``ignore_index`` where the label is nodata or the image is invalid.

    Raises:
        DatasetError: The two do not fit each other.
    """
    with open_raster(pair.image) as image_file, open_raster(pair.label) as label_file:
        require_one_band(label_file)
        if image_file.shape != label_file.shape:
            raise DatasetError(
                f"{pair.image} is {image_file.height} x {image_file.width} pixels but its label "
                f"is {label_file.height} x {label_file.width}"
            )
        if (
            image_file.crs
            and label_file.crs
            and not same_pixel_grid(image_file, label_file, 0.5)
        ):
            raise DatasetError(
                f"{pair.image} and its label do not cover the same ground; extract them again"
            )
        pixel = 4 * image_file.count + 9  # beside float32, a mask of int64 and validity
        if not fits_in_memory(pixel * image_file.height * image_file.width):
            raise DatasetError(
                f"{pair.image} is {image_file.height} x {image_file.width} pixels, more than "
                "fits into memory; cut it into patches"
            )
        bands, alphas = patch_bands(image_file), alphas_of_patch(image_file)
        image, valid = Source(image_file, bands, alphas).read()
        mask = read_label(Source(label_file), ignore_index)
    return image, valid, np.where(valid, mask, ignore_index)


def partly_nodata_advice(pairs: Sequence[PatchPair]) -> str | None:
    """The line on pixels that hold nodata in some bands, by some of the patches."""
    held = pixels = 0
    for pair in pairs[:: len(pairs) // 16 + 1]:
        with open_raster(pair.image) as file:
            source = Source(file, patch_bands(file), alphas_of_patch(file))
            image, valid = source.read()
        held += partly_nodata(image, valid, source.nodata)
        pixels += valid.size
    return partly_text(str(pairs[0].image.parent), source.nodata, held, pixels)


def patch_pixel_size(pairs: Sequence[PatchPair]) -> float | None:
    """The median size in metres of the pixels of some patches, spread over all; None if unknown."""
    known = _of_some(pairs, pixel_size)
    return float(np.median(known)) if known else None


def patch_pixel_sides(pairs: Sequence[PatchPair]) -> tuple[float, float] | None:
    """Likewise their width and height."""
    known = _of_some(pairs, pixel_sides)
    return tuple(np.median(known, axis=0).tolist()) if known else None


def _of_some(pairs: Sequence[PatchPair], measure: Callable) -> list:
    """What is measured of some patches, spread over all, where it is known."""
    found = []
    for pair in pairs[:: math.ceil(len(pairs) / 16)]:
        with open_raster(pair.image) as file:
            found.append(measure(file))
    return [one for one in found if one]


def patch_footprints(pairs: Sequence[PatchPair]) -> GeoSeries:
    """Where patches lie: their outlines in one CRS of metres, from the headers of the images.

    Raises:
        DatasetError: A patch without a CRS, or without a place on the Earth.
    """
    from pyproj.exceptions import ProjError

    shapes, systems = [], []
    bar = {"leave": False, "disable": None, "delay": 2}
    for pair in until_stopped(tqdm(pairs, desc="reading places", unit="patch", **bar)):
        with open_raster(pair.image) as file:
            crs = file.crs
            if crs is None or not (on_earth(crs) or in_one_plane([crs, *systems[:1]])):
                raise DatasetError(
                    f"{pair.image} has no CRS, and --fold_by block and column need to know where "
                    "patches lie; give --fold_by random, or extract from a georeferenced scene"
                )
            shapes.append(footprint(file.transform, file.height, file.width))
            systems.append(crs)
    try:
        return to_metric_crs(shapes, systems)
    except ProjError as error:
        raise DatasetError(
            f"Patches like {pairs[0].image} cannot be brought to one CRS ({error}); give --fold_by "
            "random"
        ) from error
