"""The map of a scene: predicted, stored and written part by part."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.devices import beside_passes, shared_threads
from common.distributed import ProcessGroup, init_distributed, torch_errors
from common.errors import (
    WORK_IS_KEPT,
    RasterError,
    SegmentationError,
    error_message,
)
from common.files import exclusive_lock, remove_partial_files, write_json
from common.machine import SerialWorker, is_main_process, tune_malloc
from common.nodata import empty_bands
from common.rasters import open_raster
from common.repeat import command_line, stored_settings
from common.styles import write_style
from prediction.area import find_area, missed_text
from prediction.blending import blended_rows
from prediction.dates import mean_of_dates
from prediction.ensemble import Models, cell_side, load_models
from prediction.jobs import (
    STORED_AHEAD,
    SceneJob,
    count_workers,
    open_scenes,
    prepare_scene,
    report_coverage,
)
from prediction.layers import compute_layers, mask_layers
from prediction.manifest import make_manifest, require_new
from prediction.mapfiles import MapWriter, missing_styles, open_outputs
from prediction.mosaic import join_maps
from prediction.products import (
    known_products,
    make_products,
    missing_products,
    remove_former,
)
from prediction.reader import READ_AT_A_TIME, SceneReader, read_row_blocks
from prediction.rowstore import RowStore, StoredPart, read_journal
from prediction.settings import SCARCE, PredictionConfig
from prediction.statistics import Statistics, confidence_counts, report_text
from prediction.tasks import (
    Task,
    list_tasks,
    require_folders,
    require_readable,
    tasks_of_part,
)
from prediction.tiling import Extent, extent_to_read, remaining, split_rows
from prediction.window import choose_windows

log = logging.getLogger("semanticseg4eo")


def predict_scenes(config: PredictionConfig, show: Callable[[str], None]) -> int:
    """Map all scenes; those that cannot be mapped are reported and left out.

    Several processes share each scene by rows; when there are as many scenes as processes, or
    more, each process maps some of the scenes by itself.

    Args:
        config: What to map, and how.
        show: Takes the statistics of each scene as text.

    Returns:
        How many scenes failed.
    """
    every = touching_area(list_tasks(config), config)
    tasks = tasks_of_part(every, config.part)
    if not tasks:
        log.info("--part %s: none of the %d scenes", config.part, len(every))
        return 0
    require_folders(tasks)
    require_new(tasks, config)
    report_coverage(every, config)
    if len(tasks) == 1:
        require_readable(tasks[0].scene)  # before the model is loaded
    tune_malloc()
    failed = 0
    with init_distributed() as group:
        models = load_models(config)
        if config.suggest:
            cell_side(config, models)  # raises before any work
        options = tasks, config, models, every
        settings = group.broadcast(choose_windows, *options)
        work = list(zip(tasks, settings))
        if 1 < group.size <= len(tasks):
            work, group = work[group.rank :: group.size], ProcessGroup()
            log.setLevel(logging.INFO)  # of its scenes each process tells itself
        for task, windowed in work:
            try:
                report = map_scene(task, windowed, models, group)
            except (SegmentationError, OSError) as error:
                if len(tasks) == 1 or group.size > 1:
                    raise
                failed += 1
                log.error("error: %s", error_message(error, SCARCE))
            else:
                if group.is_main_process:
                    show(report_text(report))
    if is_main_process():  # when all are done
        join_maps(every, models.first.class_names)
    if failed:
        log.error("error: %d of %d scenes not mapped", failed, len(work))
    return failed


def touching_area(tasks: list[Task], config: PredictionConfig) -> list[Task]:
    """The scenes of which ``--area`` holds the centre of a pixel.

    Raises:
        RasterError: It holds none.
    """
    if not (config.area and tasks):
        return tasks
    touched, found = [], []
    for task in tasks:
        with open_raster(task.scene) as scene:
            found.append(find_area(config.area, scene))
        if found[-1] and found[-1].pixels:
            touched.append(task)
        elif len(tasks) > 1:
            log.info("%s lies outside of %s: skipped", task.scene, config.area)
    if not touched:
        scenes = "any of the scenes" if len(tasks) > 1 else tasks[0].scene
        raise RasterError(missed_text(config.area, scenes, any(found)))
    return touched


def map_scene(
    task: Task, config: PredictionConfig, models: Models, group: ProcessGroup
) -> dict:
    """Map one scene and write all that was asked for.

    Returns:
        The statistics; those of the first process count.

    Raises:
        SegmentationError: The scene does not fit the model, or into memory, or cannot be read.
    """
    with open_scenes(task) as scenes:
        job = prepare_scene(task, config, models, scenes)
        with torch_errors(models.device, SCARCE):  # it tries precisions
            run, finished = group.broadcast(lambda: make_manifest(job))
        job = replace(job, run=run)
        if finished:
            log.info("%s is there already", task.output)
            return complete_map(job, group)
        with unfinished_map(task, group), torch_errors(models.device, SCARCE):
            statistics = predict_scene(job, group)
            return write_report(job, statistics) if group.is_main_process else {}


def complete_map(job: SceneJob, group: ProcessGroup) -> dict:
    """Make what is missing beside a finished map; its statistics."""
    task = job.task
    report = json.loads(task.beside("_statistics.json").read_text())
    known = known_products(task, report["run"])
    missing = missing_products(job, known) or missing_styles(job)
    # the folder is left of a run that was killed while it removed it
    if group.is_main_process and (missing or task.partial.exists()):
        with unfinished_map(task, group):
            RowStore.remove(task.partial)
            styles = missing_styles(job)
            remove_partial_files(styles)
            for path, style in styles.items():
                write_style(path, style)
            return make_products(job, report)
    return report


@contextmanager
def unfinished_map(task: Task, group: ProcessGroup) -> Iterator[None]:
    """Keep other runs out of the outputs of a scene, and finished rows for ``--resume``.

    A run that ends before a part is finished leaves nothing, unless other processes may still
    write to it.
    """
    with ExitStack() as stack:
        if group.is_main_process:
            lock = exclusive_lock("--output", task.output, task.partial)
            stack.enter_context(lock)
            beside = "_statistics.json", "_quicklook.png", "_suggestions.gpkg"
            files = [task.beside(ending) for ending in beside]
            remove_partial_files(files + [task.polygons] * bool(task.polygons))
        try:
            yield
        except BaseException as error:
            # the error that ends the run is the one to report
            with suppress(OSError):
                if RowStore.has_parts(task.partial):
                    error.add_note(WORK_IS_KEPT)
                elif group.size == 1:
                    RowStore.remove(task.partial)
            raise


def write_report(job: SceneJob, statistics: Statistics) -> dict:
    """Write the statistics of finished maps, then what is made from these; the statistics."""
    task = job.task
    remove_former(job)
    if not statistics.pixels.any():
        log.warning(
            "warning: %s has no valid pixel, so its map is nodata alone; is its nodata value right?%s",
            task.scene,
            empty_bands(job.sources[0]),
        )
    report = {"scene": task.scene, "output": str(task.output)}
    report |= {"dates": task.scenes} if task.further else {}
    report |= {"area": job.config.area} if job.config.area else {}
    report |= {"model": job.models.files, "training_distance_m": job.training_distance}
    report |= statistics.report() | {"run": job.run}
    report |= repetition(job)
    write_json(task.beside("_statistics.json"), report)
    RowStore.remove(task.partial)
    return make_products(job, report)


def repetition(job: SceneJob) -> dict:
    """The options and the command that make the map of this scene again, whatever made it."""
    task, polygons = job.task, job.task.polygons
    alone = replace(
        job.config,
        input=task.scenes,
        output=str(task.output),
        polygons=str(polygons) if polygons else None,
        part=None,
    )
    command = command_line("Predict_large_image.py", alone)
    return {"settings": stored_settings(alone), "command": command}


def predict_scene(job: SceneJob, group: ProcessGroup) -> Statistics:
    """Predict what is still missing of a scene, and write its maps (the first process does)."""
    folder, shape = job.task.partial, job.shape
    stored = group.broadcast(lambda: open_store(job))
    if not (folder / "run.json").exists():
        raise SegmentationError(
            f"{folder} is not there for process {group.rank}; --output must lie in a folder that "
            "all processes share"
        )
    statistics = Statistics(job.names, job.pixel_areas, job.area.pixels, job.codes)
    with ExitStack() as stack:
        rows = RowStore(folder, job.layers, shape, group.rank)
        stack.enter_context(rows.opened)
        maps = None
        if group.is_main_process:
            outputs = stack.enter_context(open_outputs(job, folder))
            maps = MapWriter(rows, outputs, statistics, job.fewest_pixels("sieve"))
            maps.mark(stored)
        parts = [on_scene(job, finished.part) for finished in stored]
        predict_parts(job, share_parts(job, parts, group), rows, maps)
        group.barrier()
        if maps:
            for number in range(1, group.size):
                maps.mark(read_journal(folder / f"done-{number}.txt"))
            maps.finish()
    return statistics


def open_store(job: SceneJob) -> list[StoredPart]:
    """The parts of an unfinished map that a resumed run continues; else begin a new one."""
    folder = job.task.partial
    if job.config.resume and (folder / "run.json").exists():
        remove_partial_files(folder / path.name for path in job.rasters)
        return RowStore.finished_parts(folder)
    RowStore.begin(folder, job.run, job.layers, job.shape)
    return []


def on_scene(job: SceneJob, part: Extent) -> Extent:
    """A part of the map in pixels of the scene."""
    return part.moved(job.area.extent.top, job.area.extent.left)


def share_parts(
    job: SceneJob, finished: Sequence[Extent], group: ProcessGroup
) -> list[Extent]:
    """The parts of a scene that this process predicts, in order."""
    parts = []
    top, bottom, *_ = job.area.extent
    for left, right in job.run["columns"]:
        column = Extent(top, bottom, left, right)
        for part in remaining(finished, column):
            rows = split_rows(
                job.layouts[0], part.top, part.bottom, group.rank, group.size
            )
            if rows:
                parts.append(Extent(*rows, left, right))
    return parts


def predict_parts(
    job: SceneJob, parts: Sequence[Extent], rows: RowStore, maps: MapWriter | None
) -> None:
    """Predict parts of a scene and store them; threads read ahead, store, and write the maps."""
    predictor = job.models.make_predictor(job.run["precision"], job.run["batch_size"])
    batch_size, device = job.run["batch_size"], job.models.device
    workers = count_workers(job)
    bar = tqdm(
        total=sum(part.bottom - part.top for part in parts),
        desc=Path(job.task.scene).name,
        unit="row",
        disable=None if maps else True,
    )
    readers = [
        SceneReader(source, READ_AT_A_TIME[device.type], job.area)
        for source in job.sources
    ]
    with ExitStack() as stack:
        for context in (bar, shared_threads(workers), *(one.opened for one in readers)):
            stack.enter_context(context)
        put = stack.enter_context(storage(job, rows, maps))
        for part in parts:
            needed = extent_to_read(job.layouts, part, batch_size)
            with ExitStack() as open_part:
                dates = []
                for reader in readers:
                    blocks = read_row_blocks(reader, device, needed)
                    blended = blended_rows(
                        open_part.enter_context(closing(blocks)), predictor, job.layouts, part,
                        predictor.channels, batch_size, device, workers,
                    )  # fmt: skip
                    dates.append(open_part.enter_context(closing(blended)))
                for finished, probabilities, valid, counts in mean_of_dates(dates):
                    layers = compute_layers(
                        probabilities, job.layers, predictor.classes, job.config.threshold
                    )  # fmt: skip
                    if "dates" in job.layers:
                        layers["dates"] = torch.from_numpy(counts)[None].to(device)
                    if device.type == "mps":  # which has no float64 to count in
                        layers = {name: layer.cpu() for name, layer in layers.items()}
                    put(finished, layers, valid)
                    bar.update(finished.bottom - finished.top)


@contextmanager
def storage(
    job: SceneJob, rows: RowStore, maps: MapWriter | None
) -> Iterator[Callable[[Extent, dict[str, Tensor], np.ndarray], None]]:
    """A function that stores finished parts, in a thread; another one writes the maps.

    It takes the part, its layers by name and its validity (n, w). At the end of the block all is
    stored and written.
    """
    device = job.models.device
    storing, writing = SerialWorker(STORED_AHEAD[device.type]), SerialWorker(1)

    def store(part: Extent, layers, valid, computed: torch.cuda.Event | None) -> None:
        with beside_passes(device, computed):
            both = layers["classes"][0], layers["confidence"][0]
            counts = confidence_counts(*both, valid, len(job.names))
            arrays = mask_layers(layers, valid, job.layers)
        top, _, left, _ = job.area.extent
        rows.write(part.moved(-top, -left), arrays, counts)
        if maps:
            maps.statistics.counts += counts
            writing.do(maps.advance)

    def put(part: Extent, layers: dict[str, Tensor], valid: np.ndarray) -> None:
        computed = None
        if device.type == "cuda":  # pragma: no cover - GPU
            computed = torch.cuda.current_stream(device).record_event()
        storing.do(store, part, layers, valid, computed)

    with writing.pool, storing.pool:  # storing ends first: it has more to write
        if maps:
            writing.do(maps.advance)
        yield put
        storing.finish()
        writing.finish()
