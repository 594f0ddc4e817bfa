"""What Deepness, a plugin of QGIS, reads from the metadata of an ONNX file."""

from __future__ import annotations

import json

from exporting.subject import ExportSubject

OVERLAP = 25  # percent of a tile, as of our own maps


def deepness_metadata(subject: ExportSubject) -> dict[str, str]:
    """Its keys, each value as JSON text.

    Deepness divides all values by 255 before it standardizes them, which the standard deviation
    given here undoes. It sets probabilities below ``seg_thresh`` to 0 before it takes the largest, so
    that for several classes any threshold would move pixels to class 0.
    """
    first, config = subject.first, subject.config
    bands, binary = first.config.in_channels, first.config.mode == "binary"
    values = {
        "model_type": "Segmentor",
        "class_names": {str(n): name for n, name in enumerate(first.class_names)},
        "resolution": subject.resolution * 100,  # centimetres
        "tile_size": config.patch_size,
        "tiles_size": config.patch_size,
        "tiles_overlap": OVERLAP,
        "seg_thresh": config.threshold if binary else 0,
        "seg_small_segment": 0,
        "standardization_mean": [0.0] * bands,
        "standardization_std": [1 / 255] * bands,
    }
    return {key: json.dumps(value) for key, value in values.items()}
