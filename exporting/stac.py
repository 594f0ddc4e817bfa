"""The STAC item that describes an exported ONNX file, by the Machine Learning Model extension.

https://github.com/stac-extensions/mlm. It describes the file as it is run: one input of a scene's own
values, which the graph normalizes itself, so no scaling is named that a reader could apply again.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import shapely

from common import VERSION
from exporting import facts
from exporting.footprint import bounding_box
from exporting.onnx_file import INPUT, OUTPUT
from model_training import Checkpoint

if TYPE_CHECKING:
    from exporting.subject import ExportSubject

EXTENSIONS = [
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in ("mlm/v1.5.2", "eo/v1.1.0", "classification/v2.0.0", "file/v2.1.0")
]
# the eo extension's names of bands, by those of ``common.sensors``; a thermal band has several there
COMMON_NAMES = {
    "coastal": "coastal", "blue": "blue", "green": "green", "red": "red", "rededge1": "rededge",
    "rededge2": "rededge", "rededge3": "rededge", "nir": "nir", "nir_narrow": "nir08",
    "water_vapour": "nir09", "cirrus": "cirrus", "swir1": "swir16", "swir2": "swir22",
    "pan": "pan",
}  # fmt: skip
TASKS = ["semantic-segmentation"]


def stac_item(subject: ExportSubject, written: Path | None = None) -> dict:
    """The item, with references from the folder of the ONNX file.

    Args:
        subject: What is exported.
        written: Where the ONNX file lies as long as it has no name.
    """
    ground = facts.training_ground(subject)
    name = model_name(subject.onnx.stem)
    place = {"geometry": None}
    if ground is not None:
        place = {
            "geometry": shapely.geometry.mapping(ground),
            "bbox": bounding_box(ground),
        }
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": EXTENSIONS,
        "id": name,
        **place,
        "properties": _properties(subject, name),
        "links": [
            {
                "rel": "about",
                "href": f"./{subject.onnx.stem}.md",
                "type": "text/markdown",
                "title": "Model card",
            }
        ],
        "assets": _assets(subject, written or subject.onnx),
    }


def model_name(stem: str) -> str:
    """A name that the extension allows: letters first, no plus; at least three signs."""
    name = facts.plain_label(stem.replace("+", "plus"), "model").strip("-_")
    return name if re.match("[A-Za-z]", name) and len(name) > 2 else f"model_{name}"


def _properties(subject: ExportSubject, name: str) -> dict:
    sensors = facts.sensors(subject)
    models = [checkpoint.model for checkpoint in subject.checkpoints]
    return {
        "title": subject.onnx.stem,
        "description": _description(subject),
        **_times(subject),
        **({"platform": sensors[0]} if len(sensors) == 1 else {}),
        "gsd": float(f"{subject.resolution:.6g}"),
        "mlm:name": name,
        "mlm:architecture": facts.architectures(subject),
        "mlm:tasks": TASKS,
        "mlm:framework": "ONNX",
        "mlm:total_parameters": sum(
            weights.numel() for model in models for weights in model.parameters()
        ),
        **_origin(subject),
        "mlm:accelerator": None,
        "mlm:input": [_input(subject)],
        "mlm:output": [_output(subject)],
        "mlm:hyperparameters": _hyperparameters(subject),
    }


def _description(subject: ExportSubject) -> str:
    count = len(subject.checkpoints)
    members = f" It averages {count} models." if count > 1 else ""
    sensors = " and ".join(facts.sensors(subject))
    taken = f" Its training images were taken by {sensors}." if sensors else ""
    times = (
        ""
        if facts.acquired(subject)
        else " The time is that of the checkpoint's file, since the "
        "acquisition of the images is not known."
    )
    return (
        f"Semantic segmentation into {len(subject.first.class_names)} classes, exported by "
        f"SemanticSeg4EO {VERSION}.{members}{taken}{times}"
    )


def _times(subject: ExportSubject) -> dict:
    """The days of the training images; the time of the training where nobody knows them."""
    days = facts.acquired(subject)
    if not days:
        return {"datetime": f"{facts.trained_at(subject):%Y-%m-%dT%H:%M:%SZ}"}
    start = f"{days[0].isoformat()}T00:00:00Z"
    return {
        "datetime": start if len(days) == 1 else None,
        "start_datetime": start,
        "end_datetime": f"{days[-1].isoformat()}T23:59:59Z",
    }


def _origin(subject: ExportSubject) -> dict:
    origins = list(map(facts.origin, subject.checkpoints))
    if None in origins:
        return {}
    sources = ", ".join(filter(None, dict.fromkeys(origins)))
    return {"mlm:pretrained": bool(sources), "mlm:pretrained_source": sources or None}


def _input(subject: ExportSubject) -> dict:
    size, names = subject.config.patch_size, facts.band_names(subject)
    return {
        "name": INPUT,
        "description": "The values of the scene as its file holds them: the graph finds pixels that "
        "are NaN, infinite or nodata, and normalizes.",
        "bands": names,
        "input": {
            "shape": [-1, len(names), size, size],
            "dim_order": ["batch", "bands", "height", "width"],
            "data_type": "float32",
        },
    }


def _output(subject: ExportSubject) -> dict:
    size, config = subject.config.patch_size, subject.first.config
    binary = config.mode == "binary"
    meaning = (
        "The probability of class 1; a pixel is of class 1 where it is at least "
        f"{subject.config.threshold}."
        if binary
        else "The probability of each class; a pixel is of the most probable one."
    )
    return {
        "name": OUTPUT,
        "description": meaning,
        "tasks": TASKS,
        "result": {
            "shape": [-1, config.num_classes, size, size],
            "dim_order": ["batch", "class", "height", "width"],
            "data_type": "float32",
        },
        "classification:classes": [
            {
                "value": entry.value,
                "name": entry.label,
                "title": entry.name,
                "description": entry.name
                if entry.code == entry.value
                else f"{entry.name} ({entry.code} in the labels)",
                "color_hint": entry.colour.removeprefix("#"),
            }
            for entry in facts.class_entries(subject)
        ],
    }


def _hyperparameters(subject: ExportSubject) -> dict:
    """What the graph computes with and how it was trained; of several models, a list of both."""
    members = [_member(checkpoint) for checkpoint in subject.checkpoints]
    found = members[0] if len(members) == 1 else {"members": members}
    if subject.first.config.mode == "binary":
        found = {"threshold": subject.config.threshold} | found
    return found


def _member(checkpoint: Checkpoint) -> dict:
    low, high = facts.limits(checkpoint)
    found = {
        "normalization": checkpoint.normalization.rule,
        "normalization_low": low,
        "normalization_high": high,
        "temperature": checkpoint.temperature,
    }
    nodata = checkpoint.metadata.get("nodata") or []
    if any(value is not None for value in nodata):
        found["nodata"] = [_nodata(value) for value in nodata]
    return found | facts.training_options(checkpoint)


def _nodata(value: float | None) -> float | str | None:
    """As STAC writes it: NaN and infinity are texts."""
    return value if value is None or math.isfinite(value) else str(float(value))


def _assets(subject: ExportSubject, written: Path) -> dict:
    pairs = zip(facts.band_names(subject), facts.band_words(subject))
    bands = [
        {"name": name}
        | ({"common_name": COMMON_NAMES[word]} if word in COMMON_NAMES else {})
        for name, word in pairs
    ]
    model = {
        **_file(subject.onnx, subject.onnx.parent, written),
        "type": "application/octet-stream; framework=ONNX",
        "title": "The model, with normalization and nodata rule inside",
        "roles": ["mlm:model", "mlm:compiled"],
        "mlm:artifact_type": "torch.onnx.export",
        "eo:bands": bands,
    }
    return {"model": model, **_checkpoints(subject.files, subject.onnx.parent)}


def _checkpoints(files: Sequence[str], folder: Path) -> dict:
    numbers = [""] if len(files) == 1 else [f"_{n}" for n in range(1, len(files) + 1)]
    return {
        f"checkpoint{number}": {
            **_file(Path(file), folder, Path(file)),
            "type": "application/octet-stream; framework=PyTorch",
            "title": "What the model was made from, for SemanticSeg4EO",
            "roles": ["mlm:checkpoint", "mlm:weights", "checkpoint", "weights"],
        }
        for number, file in zip(numbers, files)
    }


def _file(path: Path, folder: Path, written: Path) -> dict:
    """Where a file lies, from a folder, with the size and multihash of what is written."""
    with open(written, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "href": _reference(path.resolve(), folder.resolve()),
        "file:size": written.stat().st_size,
        "file:checksum": f"1220{digest}",  # the multihash of SHA-256
    }


def _reference(path: Path, folder: Path) -> str:
    """The way to a file from a folder; its whole address on another drive of Windows."""
    if path.drive != folder.drive:
        return path.as_uri()
    way = Path(os.path.relpath(path, folder)).as_posix()
    return way if way.startswith("../") else f"./{way}"
