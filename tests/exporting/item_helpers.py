"""Models that are described, and the schemas of their descriptions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from helpers import ROOT

from exporting.settings import ExportConfig
from exporting.subject import ExportSubject
from model_training import (
    ModelConfig,
    Normalization,
    build_model,
    load_checkpoint,
    save_checkpoint,
)

SCHEMAS = ROOT / "tests" / "data" / "schemas"
SCORES = {
    "iou": 0.5,
    "f1": 0.625,
    "overall_accuracy": 0.75,
    "kappa": None,
    "per_class": [
        {"name": name, "pixels": 100, "iou": 0.5, "f1": 0.6, "precision": 0.7, "recall": None}
        for name in ("eau", "forêt", "建物")
    ],
}  # fmt: skip
# what a checkpoint of three bands and three classes knows
KNOWN = {
    "class_names": ["eau", "forêt", "建物"],
    "class_codes": [41, 42, "AB"],
    "class_colors": ["#002db4", "#006900", "#ff3c1e"],
    "band_descriptions": ["blue", "B8A", "B8A"],
    "pixel_size": 10.0036,
    "input_size": [32, 48],
    "sensor": "Sentinel-2A",
    "acquired": ["2021-06-19", "2021-08-02"],
    "nodata": [-9999.0, None, float("nan")],
    "data_type": "uint16",
    "places": [
        {
            "crs": "EPSG:32631",
            "split": "train",
            "bounds": [
                [500_000, 4_600_000, 501_000, 4_601_000],
                [501_000, 4_600_000, 502_000, 4_601_000],
            ],
        },
        {
            "crs": "EPSG:32631",
            "split": "test",
            "bounds": [[600_000, 4_700_000, 601_000, 4_701_000]],
        },
    ],
    "started_from": None,
    "pretrained": True,
    "training_params": {
        "dataset_root": "/home/somebody/data",
        "encoder_weights": "/home/somebody/weights-0abc.pth",
        "val_strategy": "split",
        "fold_by": "block",
        "epochs": 7,
        "loss": "dice+ce",
        "best_val_loss": 0.4,
    },
    "performance_metrics": {"validation": SCORES, "test": SCORES | {"iou": 0.4321}},
    "temperature": 1.25,
}


def make_subject(
    folder: Path,
    name: str = "model.onnx",
    members: int = 1,
    outputs: int = 3,
    low: float = 100.0,
    **metadata,
) -> ExportSubject:
    """Checkpoints of random weights for three bands, and an empty file in place of the ONNX."""
    config = ModelConfig("pixel", 3, outputs, None)
    files = []
    for number in range(1, members + 1):
        torch.manual_seed(number)
        file = folder / "run" / f"fold_{number}" / "model_final_model.pth"
        file.parent.mkdir(parents=True, exist_ok=True)
        limits = Normalization("dataset", (low * number,) * 3, (3000.0,) * 3)
        save_checkpoint(file, build_model(config), config, limits, metadata)
        files.append(str(file))
    onnx = folder / name
    onnx.write_bytes(b"")
    settings = ExportConfig(model=files, output=str(onnx), patch_size=64)
    checkpoints = [load_checkpoint(file) for file in files]
    return ExportSubject(files, checkpoints, settings, 10.0036, onnx)


@cache
def schemas() -> dict[str, dict]:
    """The schemas that items are checked by, by their addresses."""
    from pystac.validation.local_validator import get_local_schema_cache

    found = {k: v for k, v in get_local_schema_cache().items() if "geojson.org" in k}
    for file in SCHEMAS.glob("*.json"):
        kind, version, *part = file.stem.split("_")
        address = f"https://stac-extensions.github.io/{kind}/{version}/schema.json"
        if part:
            address = f"https://schemas.stacspec.org/{version}/item-spec/json-schema/{part[0]}.json"
        found[address] = json.loads(file.read_text())
    return found


def errors_of(item: dict) -> list[str]:
    """What the schemas of STAC and of the extensions that an item names say against it."""
    from jsonschema import Draft7Validator
    from referencing import Registry, Resource

    resources = [(k, Resource.from_contents(v)) for k, v in schemas().items()]
    registry = Registry().with_resources(resources)
    core = f"https://schemas.stacspec.org/v{item['stac_version']}/item-spec/json-schema/item.json"
    return [
        error.message
        for address in (core, *item["stac_extensions"])
        for error in Draft7Validator(schemas()[address], registry=registry).iter_errors(
            item
        )
    ]
