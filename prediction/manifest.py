"""What a map is made from, stored beside it, and what ``--resume`` finds of an earlier run."""

from __future__ import annotations

import json
from collections.abc import Sequence

from common.errors import SegmentationError
from common.files import compare_runs, exclusive_lock
from common.machine import is_main_process
from prediction.ensemble import batch_size_of
from prediction.jobs import SceneJob, count_pieces, warn_of_scenes
from prediction.layers import list_layers, style_endings
from prediction.precision import choose_precision
from prediction.products import (
    former_files,
    known_products,
    product_key,
    product_paths,
    require_own,
)
from prediction.rowstore import RowStore, require_room
from prediction.settings import PredictionConfig
from prediction.tasks import Task
from prediction.tiling import split_columns


def require_new(tasks: Sequence[Task], config: PredictionConfig) -> None:
    """Look at what earlier runs have left, before any work.

    Raises:
        SegmentationError: Without ``--resume`` and ``--overwrite``: a map or another output is
            there already, finished rows of an unfinished map are, or another run writes to them.
    """
    if config.resume or config.overwrite:
        return
    for task in tasks:
        if task.partial.exists() and is_main_process():
            with exclusive_lock("--output", task.output, task.partial):
                pass
        if RowStore.has_parts(task.partial):
            raise SegmentationError(
                f"{task.output} is unfinished; continue it with --resume, or start again with "
                "--overwrite"
            )
        layers = list_layers(config, (), 1)
        endings = [layer.ending for layer in layers.values()]
        endings += ["_statistics.json", *style_endings(layers)]
        files = [task.beside(ending) for ending in endings]
        for path in files + product_paths(task, config):
            if path.is_file():
                raise SegmentationError(
                    f"{path} is there already; give --overwrite to replace it, or choose another "
                    "output"
                )


def make_manifest(job: SceneJob) -> tuple[dict, bool]:
    """Decide how a scene is mapped, or find it in the run that ``--resume`` continues.

    Returns:
        The run: all that its result depends on, as JSON; and whether it is finished already.

    Raises:
        SegmentationError: The disk does not hold it, or ``--resume`` finds another run or maps
            of none.
    """
    former = load_manifest(job) if job.config.resume else None
    if not (former and former[1]):
        form = job.config.format
        require_room(job.task.partial, job.layers, job.shape, form)
    if former:
        return former
    warn_of_scenes(job)
    auto = job.config.precision == "auto"
    batch_size = batch_size_of(job.config, job.models)
    there = [path for path in product_paths(job.task, job.config) if path.is_file()]
    run = job.requested | {
        "precision": choose_precision(job) if auto else job.config.precision,
        "batch_size": batch_size,
        "columns": split_columns(
            job.layouts[1], batch_size, count_pieces(job), *job.area.extent[2:]
        ),
        # those that are there may be replaced, also by the run that resumes this one
        "products": {product_key(job.task, path): None for path in there},
    }
    former = former_files(job) if job.config.overwrite else []
    return run | ({"former": former} if former else {}), False


def load_manifest(job: SceneJob) -> tuple[dict, bool] | None:
    """The run that ``--resume`` continues, and whether it is finished; None without one.

    Raises:
        SegmentationError: Its files or options were others, or a map is there of which no run is
            known.
    """
    task, finished = job.task, False
    file = task.partial / "run.json"
    if file.exists():
        run = json.loads(file.read_text())
    else:
        file = task.beside("_statistics.json")
        found = [path for path in job.rasters if path.is_file()]
        if not found:
            # without statistics no run of ours has made the styles that are there
            styles = [] if file.is_file() else style_endings(job.layers)
            require_own(task, [task.beside(ending) for ending in styles], {})
            require_own(task, product_paths(task, job.config), {})
            return None
        if not file.is_file():
            raise SegmentationError(
                f"{found[0]} is there already, but {file} is not, so --resume does not know how "
                "it was made; give --overwrite to replace it, or choose another --output"
            )
        run, finished = json.loads(file.read_text()).get("run") or {}, True
    way_out = "start again with --overwrite"
    compare_runs(_fixed(run), _fixed(job.requested), f"--resume: {file}", way_out)
    if finished and len(found) < len(job.rasters):
        raise SegmentationError(
            f"--resume: of the finished map {task.output} some files are missing; start again "
            "with --overwrite"
        )
    require_own(task, product_paths(task, job.config), known_products(task, run))
    return run, finished


def _fixed(run: dict) -> dict:
    """What of a run must be the same in the one that continues it, by name."""
    names = ("version", "device", "scene", "models")
    said = {  # the latter gives the former too
        "save_uncertainty": "save_uncertainty or --suggest"
    }
    options = {
        f"--{said.get(name, name)}": value
        for name, value in run.get("options", {}).items()
    }
    rest = {name: run.get(name) for name in ("dates", "area", "masks")}
    return {name: run.get(name) for name in names} | options | rest
