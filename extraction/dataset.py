"""A whole extraction: cells cut into a hidden folder, put into splits, published as ``Patch``."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from common import SPLITS, VERSION
from common.colours import hex_of_colour
from common.errors import WORK_IS_KEPT, DatasetError
from common.files import (
    compare_runs,
    exclusive_lock,
    fingerprint,
    flush,
    remove_partial_files,
    require_folder,
    write_json,
)
from common.ground import places_apart, to_metric_crs, to_one_crs
from common.nodata import empty_bands
from common.rasters import Source, open_raster
from common.repeat import command_line
from common.text import first_reason
from extraction.cells_file import write_cells
from extraction.cutting import cut_scene
from extraction.given_splits import column_splits, divide_by_area, read_area
from extraction.journal import Journal, Skipped, patch_footprint
from extraction.scenes import (
    ScenePlan,
    describe_sources,
    masks_text,
    plan_scenes,
)
from extraction.settings import BatchConfig, ExtractionConfig, ExtractionOptions
from extraction.splits import assign_splits

if TYPE_CHECKING:
    from geopandas import GeoSeries
    from shapely import Geometry

log = logging.getLogger("semanticseg4eo")

STAGING = ".Patch-partial"  # beside Patch, while a run is under way
JOURNAL = "journal.jsonl"


def extract(config: ExtractionConfig | BatchConfig) -> dict:
    """Cut the cells of all scenes and put them into splits.

    Patches are written to a hidden folder; ``Patch`` appears when all of them are there.

    Returns:
        What ``--save_metadata`` writes.

    Raises:
        SegmentationError: A problem in the data or the options.
    """
    target = Path(config.output) / "Patch"
    if target.exists() and not target.is_dir():
        raise DatasetError(
            f"{target} is a file, expected a folder; choose another --output"
        )
    former = former_settings(target) if config.resume else {}
    require_folder("--output", config.output)
    overwrite = config.overwrite or former.get("overwrite", False)
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise DatasetError(
            f"{target} already holds patches; choose another --output, or give --overwrite"
        )
    skipped: dict[str, Skipped] = {}
    plans = plan_scenes(config, skipped)
    given, area = column_splits(plans, config), read_area(config.test_area)
    files = describe_sources(plans, config)
    with staging_folder(target, config, files) as staging:
        with closing(Journal(staging / JOURNAL)) as journal:
            journal.forget_missing(staging)
            for plan in plans:
                cut_scene(plan, config, staging, journal)
        report = assemble(staging, plans, journal, skipped, config, given, area)
        publish(staging, target)
    return report


def assemble(
    staging: Path,
    plans: Sequence[ScenePlan],
    journal: Journal,
    skipped: dict[str, Skipped],
    config: ExtractionConfig | BatchConfig,
    given: Mapping[str, str],
    area: GeoSeries | None,
) -> dict:
    """Put the patches into splits, and describe them.

    Args:
        staging: The folder of the patches.
        plans: The scenes.
        journal: What became of each cell.
        skipped: Why cells give no patch; receives those that are left out here.
        config: The options.
        given: Splits by ``column_splits``.
        area: Polygons by ``read_area``.

    Returns:
        What ``--save_metadata`` writes.

    Raises:
        DatasetError: There is no patch, or there are too few blocks.
    """
    names = [cell.name for plan in plans for cell in plan.cells]
    skipped |= {n: journal.skipped[n] for n in names if n in journal.skipped}
    found = [(plan, journal.records.get(c.name)) for plan in plans for c in plan.cells]
    found = [(plan, record) for plan, record in found if record]
    if not found:
        raise no_patch(plans, len(names), skipped, config)
    if area is not None:
        found, given = divide_by_area(found, area, skipped, config)
    shapes = [patch_footprint(record, config) for _, record in found]
    records = [record for _, record in found]
    ground, cells = place_cells(shapes, [plan.crs for plan, _ in found], records)
    splits, dropped = assign_splits(records, ground, config, given)
    skipped |= {records[index]["name"]: dropped[index] for index in dropped}
    records = [
        record | {"split": split}
        for index, (record, split) in enumerate(zip(records, splits))
        if index not in dropped
    ]
    move_into_splits(staging, records)
    report = describe(config, plans, records, skipped)
    cells = cells.drop(list(dropped))
    write_cells(staging / "cells.gpkg", cells, report, plans)
    if config.save_metadata:
        write_json(staging / "metadata.json", report)
    for kind in ("images", "labels"):
        shutil.rmtree(staging / kind)
    return report


def place_cells(
    shapes: Sequence[Geometry], systems: Sequence, records: Sequence[dict]
) -> tuple[GeoSeries, GeoSeries]:
    """Cells in metres, and in the CRS of the first; in pixels where they have no location."""
    if systems[0] is None:
        apart = places_apart(shapes, [record["scene"] for record in records])
        return apart, apart
    return to_metric_crs(shapes, systems), to_one_crs(shapes, systems, systems[0])


def no_patch(
    plans: Sequence[ScenePlan],
    cells: int,
    skipped: dict[str, Skipped],
    config: ExtractionConfig | BatchConfig,
) -> DatasetError:
    """The error of an extraction whose cells give no patch."""
    value = plans[0].label_nodata
    declared = "" if value is None else f" (which declares {value} as nodata)"
    with open_raster(plans[0].scene.image) as image:
        bands = [entry["band"] for entry in plans[0].bands]
        more = empty_bands(Source(image, bands, nodata=config.nodata))
    if config.mask is not None:
        more += f"; {masks_text(plans, config)}"
        mask = plans[0].mask
        if mask.nodata is not None and not mask.named:
            more += (
                f", which declares {mask.nodata:g} as nodata (--keep_values keeps it)"
            )
    return DatasetError(
        f"None of the {cells} cells gives a patch ({first_reason(skipped)}); check the nodata of "
        f"{plans[0].scene.image} and of its label{declared}, or lower --min_valid{more}"
    )


def move_into_splits(staging: Path, records: Sequence[dict]) -> None:
    """Move patches to the folders of their splits."""
    for record in records:
        for kind in ("images", "labels"):
            name = f"{record['name']}.tif"
            (staging / kind / name).rename(staging / record["split"] / kind / name)


def describe(
    config, plans: Sequence[ScenePlan], records: list[dict], skipped: dict
) -> dict:
    """Where all patches come from, as plain values for JSON."""
    first = plans[0]
    command = "batch" if isinstance(config, BatchConfig) else "extract"
    return {
        "version": VERSION,
        "settings": asdict(config),
        "command": command_line(f"Patch_extraction.py {command}", config),
        "crs": first.crs and first.crs.to_string(),
        "bands": first.bands,
        "label_values": first.label_values,
        "class_names": first.class_names,
        "class_colors": [c and hex_of_colour(c) for c in first.colours] or None,
        "unlabelled": first.unlabelled,
        "label_nodata": first.label_nodata,
        "scenes": [
            asdict(plan.scene) | {"crs": plan.crs and plan.crs.to_string()}
            for plan in plans
        ],
        "patches": records,
        "skipped": {name: str(reason) for name, reason in skipped.items()},
    }


@contextmanager
def staging_folder(
    target: Path, config: ExtractionOptions, files: dict[str, str]
) -> Iterator[Path]:
    """A hidden folder beside ``target`` with the folders of a dataset.

    When the block ends early it stays for ``--resume``, unless no patch is finished.

    Args:
        target: The dataset to be.
        config: The options.
        files: What distinguishes the files that are read; see ``describe_sources``.

    Raises:
        SegmentationError: Another run writes to it, or it is what an unfinished one has left, and
            the options neither resume that nor overwrite it.
    """
    staging = target.with_name(STAGING)
    unfinished = staging.exists()
    with exclusive_lock("--output", target.parent, staging):
        if unfinished and config.overwrite:
            shutil.rmtree(staging)
        elif unfinished:
            _require_same_run(target, config, files)
        try:
            _make_folders(staging)
            remove_partial_files(
                staging / f"{name}.json" for name in ("settings", "metadata")
            )
            former = former_settings(target) or {"version": VERSION} | asdict(config)
            # with --skip_errors, files may be read now that could not be before
            known = former.get("files", {}) | files
            write_json(staging / "settings.json", former | {"files": known})
            yield staging
        except BaseException as error:
            # the error that ends the run is the one to report
            with suppress(OSError):
                if not Journal.has_patches(staging / JOURNAL):
                    shutil.rmtree(staging, ignore_errors=True)
                elif isinstance(error, Exception):
                    error.add_note(WORK_IS_KEPT)
                else:
                    log.warning(WORK_IS_KEPT)
            raise


def _make_folders(staging: Path) -> None:
    """Make the folders of a dataset; patches that an unfinished run put into splits come back."""
    for kind in ("images", "labels"):
        (staging / kind).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            folder = staging / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            for patch in list(folder.iterdir()):
                patch.rename(staging / kind / patch.name)


def former_settings(target: Path) -> dict:
    """The settings of an unfinished run; empty when there is none."""
    stored = target.with_name(STAGING) / "settings.json"
    return json.loads(stored.read_text()) if stored.exists() else {}


def _require_same_run(
    target: Path, config: ExtractionOptions, files: dict[str, str]
) -> None:
    if not config.resume:
        raise DatasetError(
            f"A run into {target.parent} is under way or unfinished: --resume completes it, "
            "--overwrite starts anew"
        )
    former = former_settings(target)
    if former:
        options = fingerprint(config)
        present = {"version": VERSION} | options
        read = former.pop("files", {})
        free = vars(config).keys() - options
        former = {name: former[name] for name in former if name not in free}
        former |= {f"file {name}": text for name, text in read.items()}
        present |= {f"file {name}": files.get(name) for name in read}
        way_out = "start anew with --overwrite"
        compare_runs(former, present, target.parent, way_out)


def publish(staging: Path, target: Path) -> None:
    """Flush a finished folder to disk and give it its name; the former folder is removed."""
    former = target.with_name(f"{staging.name}-former")

    def remove_former() -> None:
        if former.is_symlink():
            former.unlink()
        elif former.exists():
            shutil.rmtree(former)

    for path in staging.rglob("*.*"):
        if path.is_file():
            flush(path)
    if target.exists():
        remove_former()  # of an interrupted run
        target.rename(former)
    staging.rename(target)
    for name in (JOURNAL, "settings.json"):
        (target / name).unlink(missing_ok=True)
    remove_former()
