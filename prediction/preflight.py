"""``Predict_large_image.py --check``: all that a run would check, and what it will take."""

from __future__ import annotations

import math
import operator
import time

import numpy as np
import torch

from common.console import Problems
from common.devices import peak_memory, shared_threads, to_device
from common.distributed import torch_errors
from common.files import exclusive_lock, list_models
from common.machine import bounded_map
from common.polygons import memory_to_simplify
from common.text import aligned_table, duration
from model_training import load_checkpoint
from prediction.ensemble import Models, batch_size_of, cell_side, load_models
from prediction.jobs import (
    SceneJob,
    count_workers,
    open_rows,
    open_scenes,
    prepare_scene,
    report_coverage,
    row_limit,
    warn_of_scenes,
)
from prediction.layers import bytes_of, classify
from prediction.manifest import load_manifest, require_new
from prediction.precision import choose_precision, probe_windows
from prediction.predictor import Predictor
from prediction.rowstore import require_room
from prediction.scene import touching_area
from prediction.settings import SCARCE, PredictionConfig
from prediction.tasks import (
    Task,
    list_scenes,
    list_tasks,
    require_folders,
    require_readable,
    tasks_of_part,
)
from prediction.window import choose_windows


def check_scenes(config: PredictionConfig) -> tuple[Problems, dict]:
    """Check all that a run would check, and do none of its work.

    Returns:
        The problems found, a line each; and, without any, what the run will take:
        "scenes" that are not finished, with their "pixels" and "windows" of
        "patch_size" pixels a side, "window_seconds"
        (measured on a batch), "memory" in bytes (of the GPU, else of this process), "unfinished"
        (bytes on disk of the largest map in work) and "maps" (of all, without compression), and
        the "precision"; with --simplify the "polygon_bytes" of memory per pixel, and the pixels of
        the "largest" map.
    """
    problems = Problems()
    models = problems.attempt(load_models, config)
    if not models:  # loading ends with the first problem
        for file in problems.attempt(list_models, config.model) or []:
            options = file, "cpu", config.described
            problems.attempt(load_checkpoint, *options)
    every = problems.attempt(list_tasks, config) or []
    every = problems.attempt(touching_area, every, config) or []
    tasks = tasks_of_part(every, config.part)
    problems.attempt(require_folders, tasks)
    problems.attempt(report_coverage, every, config)
    for task in tasks:
        problems.attempt(require_new, [task], config, files=[task.output])
    if not (models and every):
        for scene in problems.attempt(list_scenes, config.input) or []:
            problems.attempt(require_readable, scene, files=[scene])
        return problems, {}
    if config.suggest:
        problems.attempt(cell_side, config, models)
    outlook = dict.fromkeys(("scenes", "pixels", "windows", "unfinished", "maps"), 0)
    options = tasks, config, models, every
    settings = problems.attempt(choose_windows, *options) or []
    for task, windowed in zip(tasks, settings):
        measure = "memory" not in outlook
        options = task, windowed, models, measure
        found = problems.attempt(check_scene, *options, files=[task.scene]) or {}
        for key, number in found.items():
            most = key in ("unfinished", "patch_size", "largest")
            more = max if most else operator.add
            outlook[key] = more(outlook[key], number) if key in outlook else number
    return problems, outlook


def check_scene(
    task: Task, config: PredictionConfig, models: Models, measure: bool
) -> dict:
    """Raise what would be raised before the work on a scene.

    Returns:
        Its numbers for ``check_scenes``, with those of ``measure_windows`` on demand; none for a
        scene that ``--resume`` finds finished.
    """
    if task.partial.exists():  # another run may be writing to it
        with exclusive_lock("--output", task.output, task.partial):
            pass
    with open_scenes(task) as scenes, torch_errors(models.device, SCARCE):
        job = prepare_scene(task, config, models, scenes)
        if config.resume and (former := load_manifest(job)) and former[1]:
            return {}
        warn_of_scenes(job)
        unfinished = require_room(task.partial, job.layers, job.shape, config.format)
        pixels = math.prod(job.shape)
        return {
            "scenes": 1,
            "pixels": pixels,
            "largest": pixels,
            "patch_size": config.patch_size,
            "windows": len(job.windows) * len(job.dates),
            "unfinished": unfinished,
            "maps": bytes_of(job.layers, written=True) * pixels,
        } | (measure_windows(job) if measure else {})


def measure_windows(job: SceneJob) -> dict:
    """Predict a batch of a scene: the "window_seconds", "memory" and "precision" of a run."""
    config, models, device = job.config, job.models, job.models.device
    auto = config.precision == "auto"
    precision = choose_precision(job) if auto else config.precision
    probes = probe_windows(job)
    rows = min(open_rows(job), row_limit(job))
    if not probes:
        return {}  # nothing but nodata: the next scene may have more
    count, workers = batch_size_of(config, models), count_workers(job)
    images, masks = (
        to_device(torch.from_numpy(np.stack([array] * count)), device)
        for array in probes[0]
    )
    predictor = models.make_predictor(precision, count)

    def predict(_) -> float:
        return predictor(images, masks).sum().item()

    with shared_threads(workers):
        for _ in range(2):  # libraries warm up in the first
            started = time.perf_counter()
            list(bounded_map(predict, range(workers), workers, ahead=0))
            seconds = time.perf_counter() - started
    memory = peak_memory(device)
    measured = {
        "window_seconds": seconds / (workers * count),
        "memory": memory and memory + rows,
        "precision": precision,
    }
    if config.simplify:
        measured["polygon_bytes"] = polygon_bytes(job, predictor, probes)
    return measured


def polygon_bytes(job: SceneJob, predictor: Predictor, probes) -> float:
    """About the bytes per pixel that ``--simplify`` takes, by the classes of ``probe_windows``."""
    fewest = max(job.fewest_pixels(name) for name in ("sieve", "min_area"))
    total = pixels = 0
    for image, valid in probes:
        arrays = torch.from_numpy(image), torch.from_numpy(valid)
        batch = (to_device(array[None], job.models.device) for array in arrays)
        classes = classify(predictor(*batch)[0], job.config.threshold)[0]
        known = np.where(valid, classes.cpu().numpy(), -1).astype(np.int32)
        total += memory_to_simplify(known, fewest)
        pixels += int(valid.sum())
    return total / pixels


def outlook_text(outlook: dict) -> str:
    """What a run will take, as text; see ``check_scenes``."""
    windows = str(outlook["windows"])
    if "patch_size" in outlook:
        windows += " of {0} x {0}".format(outlook["patch_size"])
    rows = [
        ("scenes", f"{outlook['scenes']}, {outlook['pixels'] / 1e6:.1f} megapixels"),
        ("windows", windows),
    ]
    if "window_seconds" in outlook:
        seconds = duration(outlook["windows"] * outlook["window_seconds"])
        rows.append(("time", f"{seconds} at most, in {outlook['precision']}"))
    if outlook.get("memory"):
        rows.append(("memory", f"{outlook['memory'] / 1e9:.1f} GB"))
    if "polygon_bytes" in outlook:
        polygons = outlook["polygon_bytes"] * outlook["largest"]
        text = f"about {polygons / 1e9:.1f} GB of memory while those of a map are simplified"
        rows.append(("polygons", text))
    maps, unfinished = (f"{outlook[k] / 1e9:.2f}" for k in ("maps", "unfinished"))
    disk = f"{maps} GB at most, and {unfinished} GB while a scene is mapped"
    rows.append(("disk", disk))
    return aligned_table(rows, left=2) + "\nNo problems found."
