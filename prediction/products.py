"""Polygons, suggested cells and quicklook: made from a finished map, each with a fingerprint of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.errors import SegmentationError
from common.files import describe_file, write_json
from common.polygons import write_polygons
from prediction.ensemble import cell_side
from prediction.jobs import SceneJob
from prediction.mapfiles import draw_quicklook
from prediction.settings import PredictionConfig
from prediction.suggestions import write_suggestions
from prediction.tasks import FURTHER_LAYERS, Task, recorded_run

log = logging.getLogger("semanticseg4eo")

# a layer's file, its style, and what GDAL keeps beside it
OF_A_LAYER = ".tif", ".qml", ".tif.aux.xml", ".tif.ovr", ".tif.msk"


@dataclass(frozen=True)
class Product:
    """A file that is made from the map of a scene."""

    path: Path
    key: str  # see ``product_key``
    made_from: dict  # its fingerprint, as JSON
    make: Callable[[], object]


def product_key(task: Task, path: str | Path) -> str:
    """How ``run["products"]`` names a file: from the folder of the map, which may be moved."""
    try:
        return os.path.relpath(path, task.output.parent)
    except ValueError:  # on another drive
        return os.path.abspath(path)


def known_products(task: Task, run: dict) -> dict:
    """``run["products"]``, which an earlier run may have named from the root."""
    known = run.get("products", {})
    return {
        product_key(task, key) if os.path.isabs(key) else key: made_from
        for key, made_from in known.items()
    }


def product_paths(task: Task, config: PredictionConfig) -> list[Path]:
    """The files beside the rasters and the statistics that the options ask for."""
    polygons = [task.polygons] if task.polygons else []
    suggested = [suggestions_path(task)] * bool(config.suggest)
    return polygons + suggested + [task.beside("_quicklook.png")] * config.quicklook


def former_files(job: SceneJob) -> list[str]:
    """What lies beside a map that is replaced and the new one does not have, by ``product_key``.

    The layers, picture and cells of its name, and polygons that its statistics list.
    """
    task, run = job.task, recorded_run(job.task, finished=True) or {}
    gone = [name for name in FURTHER_LAYERS if name not in job.layers]
    files = [task.beside(f"_{name}{more}") for name in gone for more in OF_A_LAYER]
    files += [task.beside("_quicklook.png"), suggestions_path(task)]
    made = [key for key, origin in known_products(task, run).items() if origin]
    found = dict.fromkeys([*(product_key(task, path) for path in files), *made])
    kept = {product_key(task, path) for path in product_paths(task, job.config)}
    return [key for key in found.keys() - kept if (task.output.parent / key).is_file()]


def remove_former(job: SceneJob) -> None:
    """Remove ``former_files`` when the new map is there, but for polygons of another name."""
    task, stem = job.task, job.task.output.stem
    for key in sorted(job.run.pop("former", ())):
        path = task.output.parent / key
        if path.stem == stem or path.name.startswith(f"{stem}_"):
            path.unlink(missing_ok=True)
        elif path.is_file():
            log.warning(
                "warning: %s is of the former %s, not of the new one; remove it",
                path, task.output,
            )  # fmt: skip


def suggestions_path(task: Task) -> Path:
    """The cells of ``--suggest``."""
    return task.beside("_suggestions.gpkg")


def require_own(task: Task, paths: Sequence[Path], known: dict) -> None:
    """Raise SegmentationError where a file is there that no run of this map has made.

    Args:
        task: Whose map it is.
        paths: Of the files beside the map that a run is to make.
        known: ``known_products``: those that were made, or may be replaced.
    """
    for path in paths:
        if path.is_file() and product_key(task, path) not in known:
            raise SegmentationError(
                f"--resume: {path} is there already, of another run; give --overwrite to replace "
                "it, or choose another output"
            )


def missing_products(job: SceneJob, known: dict) -> list[Product]:
    """What the options ask for and is not there, or was made with others or of another map."""
    task, config, names = job.task, job.config, job.names
    found = describe_file(str(task.output))
    made_from = {"map": {key: found.get(key) for key in ("bytes", "modified")}}
    products = []

    def add(path: Path, made_from: dict, make: Callable[[], object]) -> None:
        products.append(Product(path, product_key(task, path), made_from, make))

    if task.polygons:
        classes = {"colours": job.colours, "codes": job.codes, "values": job.values}
        options = {"min_area": config.min_area, "simplify": config.simplify}

        def polygons() -> None:
            files = task.output, task.polygons
            write_polygons(*files, names, **options, **classes)

        add(task.polygons, made_from | options, polygons)
    if config.suggest:
        path, side = suggestions_path(task), cell_side(config, job.models)
        asked = made_from | {"suggest": config.suggest, "cell_size": side}
        add(path, asked, partial(write_suggestions, job, path))
    if config.quicklook:

        def quicklook() -> None:
            draw_quicklook(job)

        add(task.beside("_quicklook.png"), made_from, quicklook)
    return [
        one
        for one in products
        if not one.path.is_file() or known.get(one.key) != one.made_from
    ]


def make_products(job: SceneJob, report: dict) -> dict:
    """Make what is missing of a finished map, and note it in the statistics; these.

    Raises:
        SegmentationError: One could not be made. The others and the map are there.
    """
    failed: list[Exception] = []
    statistics = job.task.beside("_statistics.json")
    report["run"]["products"] = known = known_products(job.task, report["run"])
    if missing := missing_products(job, known):
        # a run that is killed leaves none that the next one would not know
        known |= dict.fromkeys(one.key for one in missing)
        write_json(statistics, report)
    for product in missing:
        try:
            product.make()
        except (SegmentationError, OSError, MemoryError) as error:
            error.add_note(
                f"{job.task.output} is complete: --resume makes only {product.path}"
            )
            failed.append(error)
        else:
            known[product.key] = product.made_from
            write_json(statistics, report)
    if failed:
        raise failed[0]
    return report
