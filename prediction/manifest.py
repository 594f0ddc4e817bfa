"""What a map is made from, stored beside it, and what ``--resume`` finds of an earlier run."""

from __future__ import annotations

import json

from common.files import compare_runs
from prediction.ensemble import batch_size_of, warn_of_strange_values
from prediction.jobs import SceneJob, count_pieces
from prediction.precision import choose_precision
from prediction.rowstore import require_room
from prediction.tiling import split_columns


def make_manifest(job: SceneJob) -> tuple[dict, bool]:
    """Decide how a scene is mapped, or find it in the run that ``--resume`` continues.

    Returns:
        The run: all that its result depends on, as JSON; and whether it is finished already.

    Raises:
        SegmentationError: The disk does not hold it, or ``--resume`` finds another run.
    """
    former = load_manifest(job) if job.config.resume else None
    if not (former and former[1]):
        require_room(job.task.partial, job.layers, job.scene.shape)
    if former:
        return former
    warn_of_strange_values(job.scene, job.bands, job.models)
    auto = job.config.precision == "auto"
    batch_size = batch_size_of(job.config, job.models.device)
    run = job.requested | {
        "precision": choose_precision(job) if auto else job.config.precision,
        "batch_size": batch_size,
        "columns": split_columns(job.layouts[1], batch_size, count_pieces(job)),
    }
    return run, False


def load_manifest(job: SceneJob) -> tuple[dict, bool] | None:
    """The run that ``--resume`` continues, and whether it is finished; None without one.

    Raises:
        SegmentationError: Its files or options were others.
    """
    task, finished = job.task, False
    file = task.partial / "run.json"
    if file.exists():
        run = json.loads(file.read_text())
    else:
        file = task.beside("_statistics.json")
        expected = [file, *job.rasters]
        if task.polygons:
            expected.append(task.polygons)
        if job.config.quicklook:
            expected.append(task.beside("_quicklook.png"))
        if not all(path.exists() for path in expected):
            return None
        run, finished = json.loads(file.read_text()).get("run") or {}, True
    way_out = "leave --resume out to start again"
    compare_runs(_fixed(run), _fixed(job.requested), f"--resume: {file}", way_out)
    return run, finished


def _fixed(run: dict) -> dict:
    """What of a run must be the same in the one that continues it, by name."""
    names = ("version", "device", "scene", "models")
    options = {f"--{name}": value for name, value in run.get("options", {}).items()}
    return {name: run.get(name) for name in names} | options
