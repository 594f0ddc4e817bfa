"""What a map is made from, stored beside it, and what ``--resume`` finds of an earlier run."""

from __future__ import annotations

import json

from common.errors import SegmentationError
from prediction.ensemble import batch_size_of, warn_of_strange_values
from prediction.jobs import SceneJob, count_pieces, output_rasters
from prediction.precision import choose_precision
from prediction.rowstore import require_room
from prediction.tiling import split_columns


def make_manifest(job: SceneJob) -> tuple[dict, bool]:
    """Decide how a scene is mapped: all that its result depends on, as JSON.

    Returns:
        The run, and whether it has been finished already (``--resume``).

    Raises:
        SegmentationError: The disk does not hold it, or ``--resume`` finds another run.
    """
    config, models, scene, asked = job.config, job.models, job.scene, job.asked
    former = load_manifest(job) if config.resume else None
    if not (former and former[1]):
        require_room(job.task.partial, job.layers, scene.shape)
    if former:
        return former
    warn_of_strange_values(scene, job.bands, models)
    batch_size = batch_size_of(config, models.device)
    run = asked | {
        "precision": config.precision,
        "batch_size": batch_size,
        "columns": split_columns(job.axes[1], batch_size, count_pieces(job)),
    }
    if config.precision == "auto":
        run["precision"] = choose_precision(job)
    return run, False


def load_manifest(job: SceneJob) -> tuple[dict, bool] | None:
    """The run that ``--resume`` goes on with, and whether it is finished; None without one.

    Raises:
        SegmentationError: It was another one.
    """
    task, asked, finished = job.task, job.asked, False
    place = task.partial / "run.json"
    if place.exists():
        run = json.loads(place.read_text())
    else:
        place = task.beside("_statistics.json")
        expected = [
            place,
            *(task.polygons,) * bool(task.polygons),
            *output_rasters(job),
        ]
        if job.config.quicklook:
            expected.append(task.beside("_quicklook.png"))
        if not all(path.exists() for path in expected):
            return None
        run, finished = json.loads(place.read_text()).get("run") or {}, True
    for name, value in asked["options"].items():
        if (former := run.get("options", {}).get(name)) != value:
            raise SegmentationError(
                f"--resume: {place} is of a run with --{name} {former}, not {value}; give the "
                "same options, or leave --resume out to start anew"
            )
    for name in ("scene", "models", "device", "version"):
        if run.get(name) != asked[name]:
            raise SegmentationError(
                f"--resume: {place} is of a run with another {name.removesuffix('s')} "
                f"({run.get(name)}); leave --resume out to start anew"
            )
    return run, finished
