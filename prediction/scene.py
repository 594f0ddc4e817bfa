"""The map of a scene: predicted, stored and written part by part."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from common import files
from common.devices import beside_passes, shared_threads
from common.distributed import ProcessGroup, init_distributed
from common.errors import SegmentationError
from common.files import remove_partial_files, write_json
from common.ground import pixel_areas
from common.machine import SerialWorker, prefetch, tune_malloc
from common.polygons import write_polygons
from common.rasters import open_raster
from prediction.blending import blended_rows
from prediction.ensemble import Models, load_models
from prediction.jobs import (
    STORED_AHEAD,
    SceneJob,
    count_workers,
    output_rasters,
    prepare_scene,
)
from prediction.layers import compute_layers, mask_layers
from prediction.manifest import make_manifest
from prediction.mapfiles import MapWriter, draw_quicklook, open_outputs
from prediction.reader import ParallelReader, count_readers, read_row_blocks
from prediction.rowstore import RowStore, StoredPart, read_journal
from prediction.settings import PredictionConfig
from prediction.statistics import Statistics, confidence_counts, report_text
from prediction.tasks import Task, list_tasks, require_folders, require_readable
from prediction.tiling import Extent, extent_to_read, remaining, split_rows

log = logging.getLogger("semanticseg4eo")


def predict_scenes(config: PredictionConfig, tell: Callable[[str], None]) -> int:
    """Map all scenes; those that cannot be mapped are told and left out.

    Several processes share each scene out by rows; when there are as many scenes as processes,
    or more, each maps some of the scenes by itself.

    Args:
        config: What to map, and how.
        tell: Takes the statistics of each scene as text.

    Returns:
        How many scenes failed.
    """
    tasks = list_tasks(config)
    require_folders(tasks)
    if len(tasks) == 1:
        require_readable(tasks[0].scene)  # before the model is loaded
    tune_malloc()
    with init_distributed() as group:
        models = load_models(config)
        if 1 < group.size <= len(tasks):
            tasks, helpers = tasks[group.rank :: group.size], ProcessGroup()
        else:
            helpers = group
        failed = 0
        for task in tasks:
            try:
                report = map_scene(task, config, models, helpers)
            except (SegmentationError, OSError) as error:
                if len(tasks) == 1 or helpers.size > 1:
                    raise
                failed += 1
                log.error("error: %s", error)
            else:
                if helpers.is_main_process:
                    tell(report_text(report))
    if failed:
        log.error("error: %d of %d scenes not mapped", failed, len(tasks))
    return failed


def map_scene(
    task: Task, config: PredictionConfig, models: Models, group: ProcessGroup
) -> dict:
    """Map one scene and write all that was asked for.

    Returns:
        The statistics; those of the first process count.

    Raises:
        SegmentationError: The scene does not fit the model, or into memory, or cannot be read.
    """
    with open_raster(task.scene) as scene:
        job = prepare_scene(task, config, models, scene)
        run, finished = group.broadcast(lambda: make_manifest(job))
        job = replace(job, run=run)
        if finished:
            log.info("%s is there already", task.output)
            if (
                group.is_main_process and task.partial.exists()
            ):  # killed while it was dropped
                with files.exclusive_lock("--output", task.output, task.partial):
                    RowStore.drop(task.partial)
                task.partial.rmdir()
            return json.loads(task.beside("_statistics.json").read_text())
        with ExitStack() as stack:
            if group.is_main_process:
                sole_run = files.exclusive_lock("--output", task.output, task.partial)
                stack.enter_context(sole_run)
                endings = ("_statistics.json", "_quicklook.png")
                further = [task.polygons] if task.polygons else []
                remove_partial_files([*map(task.beside, endings), *further])
            try:
                statistics = predict_scene(job, group)
                return write_products(job, statistics) if group.is_main_process else {}
            except Exception as error:
                if group.size == 1:
                    with suppress(OSError):  # the error that ends the run is told
                        RowStore.drop(task.partial)
                        task.partial.rmdir()
                if isinstance(error, torch.OutOfMemoryError):
                    raise SegmentationError(
                        f"The memory of {models.device} does not hold the open rows of "
                        f"{task.scene}; lower --batch_size or --max_memory"
                    ) from error
                raise


def write_products(job: SceneJob, statistics: Statistics) -> dict:
    """Write what is made of the finished maps, the statistics last; these."""
    task, config = job.task, job.config
    report = {"scene": task.scene, "output": str(task.output)}
    if not statistics.pixels.any():
        log.warning(
            "warning: %s has no valid pixel, so its map is nodata alone; is its nodata value right?",
            task.scene,
        )
    report |= {"model": job.models.files} | statistics.report() | {"run": job.run}
    if task.polygons:
        write_polygons(task.output, task.polygons, job.names, config.min_area)
    if config.quicklook:
        draw_quicklook(task, job.names, config.save_confidence)
    write_json(task.beside("_statistics.json"), report)
    RowStore.drop(task.partial)
    task.partial.rmdir()
    return report


def predict_scene(job: SceneJob, group: ProcessGroup) -> Statistics:
    """Predict what is not there yet of a scene, and write its maps (the first process does)."""
    folder, shape = job.task.partial, job.scene.shape

    def begin() -> list[StoredPart]:
        if job.config.resume and (folder / "run.json").exists():
            remove_partial_files(folder / path.name for path in output_rasters(job))
            return RowStore.finished_parts(folder)
        RowStore.begin(folder, job.run, job.layers, shape)
        return []

    former = group.broadcast(begin)
    parts = [finished.part for finished in former]
    if not (folder / "run.json").exists():
        raise SegmentationError(
            f"{folder} is not there for process {group.rank}; --output must lie in a folder that "
            "all processes share"
        )
    statistics = Statistics(job.names, pixel_areas(job.scene))
    with ExitStack() as stack:
        rows = RowStore(folder, job.layers, shape, group.rank)
        stack.enter_context(rows.opened)
        maps = None
        if group.is_main_process:
            for part, counted in former:
                rows.mark(part)
                statistics.tally += counted
            outputs = open_outputs(job, folder)
            maps = MapWriter(rows, stack.enter_context(outputs), statistics)
        mine = []
        for left, right in job.run["columns"]:
            for open_part in remaining(parts, Extent(0, shape[0], left, right)):
                share = split_rows(
                    job.axes[0], open_part.top, open_part.bottom, group.rank, group.size
                )
                if share:
                    mine.append(Extent(*share, left, right))
        predict_parts(job, mine, rows, maps)
        group.barrier()
        if maps:
            for number in range(1, group.size):
                for part, counted in read_journal(folder / f"done-{number}.txt"):
                    rows.mark(part)
                    statistics.tally += counted
            maps.advance()
    return statistics


def predict_parts(
    job: SceneJob, parts: Sequence[Extent], rows: RowStore, maps: MapWriter | None
) -> None:
    """Predict parts of a scene and store them; threads read ahead, store, and write the maps."""
    predictor = job.models.make_predictor(job.run["precision"])
    batch_size, device = job.run["batch_size"], job.models.device
    on_gpu = device.type == "cuda"
    bar = tqdm(
        total=sum(part.bottom - part.top for part in parts),
        desc=Path(job.task.scene).name,
        unit="row",
        disable=None if maps else True,
    )
    workers = count_workers(job)
    with ExitStack() as stack:
        stack.enter_context(bar)
        stack.enter_context(shared_threads(workers))
        readers = ParallelReader(job.scene, job.bands, count_readers(device))
        stack.enter_context(readers.opened)
        storing, writing = SerialWorker(STORED_AHEAD[device.type]), SerialWorker(1)
        for thread in (writing, storing):  # storing ends first: it has more to write
            stack.enter_context(thread.pool)

        def store(part: Extent, tensors, valid, derived) -> None:
            with beside_passes(device, derived):
                both = tensors["classes"][0], tensors["confidence"][0]
                counted = confidence_counts(*both, valid, len(job.names))
                arrays = mask_layers(tensors, valid, job.layers)
            rows.write(part, arrays, counted)
            if maps:
                maps.statistics.tally += counted
                writing.do(maps.advance)

        if maps:
            writing.do(maps.advance)
        for part in parts:
            needed = extent_to_read(job.axes, part, batch_size)
            with (
                prefetch(read_row_blocks(readers, device, needed)) as chunks,
                closing(
                    blended_rows(
                        chunks, predictor, job.axes, part, predictor.channels,
                        batch_size, device, workers,
                    )
                ) as blended,
            ):  # fmt: skip
                for done, probabilities, valid in blended:
                    tensors = compute_layers(
                        probabilities,
                        job.layers,
                        predictor.classes,
                        job.config.threshold,
                    )
                    derived = None
                    if on_gpu:
                        derived = torch.cuda.current_stream(device).record_event()
                    storing.do(store, done, tensors, valid, derived)
                    bar.update(done.bottom - done.top)
        storing.finish()
        writing.finish()
