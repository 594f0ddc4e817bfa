"""The layers of a map, and how they are computed from blended probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.map_classes import MapValues, values_of_codes
from prediction import predictor
from prediction.settings import PredictionConfig

DECIDED_ROWS = 128  # rows that are classified at once


@dataclass(frozen=True)
class Layer:
    """One of the rasters that are written for a scene."""

    name: str
    dtype: str
    nodata: float
    bands: list[str]  # what they are
    scale: float = 1.0  # value = stored number x scale
    values: MapValues | None = None  # of a map of codes: what stands for the numbers

    @property
    def written(self) -> tuple[str, float]:
        """Type and nodata value of the file."""
        codes = self.values
        return (codes.dtype, codes.nodata) if codes else (self.dtype, self.nodata)

    @property
    def ending(self) -> str:
        """What its file name has after the stem of the map's."""
        return ".tif" if self.name == "classes" else f"_{self.name}.tif"

    @property
    def style_ending(self) -> str | None:
        """Likewise of its QGIS style; probabilities, a band per class, have none."""
        if self.name == "probabilities":
            return None
        return f"{self.ending.removesuffix('.tif')}.qml"


def style_endings(layers: dict[str, Layer]) -> list[str]:
    """What the file names of all styles have after the stem of the map's."""
    return [ending for one in layers.values() if (ending := one.style_ending)]


def list_layers(
    config: PredictionConfig,
    names: Sequence[str],
    models: int,
    codes: Sequence[int | str] = (),
) -> dict[str, Layer]:
    """The layers of a map that the options ask for, by name, the classes first.

    Args:
        config: The options.
        names: Of the classes.
        models: How many are averaged.
        codes: Of the classes, for ``--write_codes``.

    Raises:
        OptionError: A map cannot hold the codes.
    """
    nodata = map_nodata(len(names))
    dtype = "uint8" if nodata == 255 else "uint16"
    values = values_of_codes(codes) if config.write_codes and codes else None
    layers = [Layer("classes", dtype, nodata, ["class"], values=values)]
    if config.save_confidence:
        bands = ["probability of the class"]
        layers.append(Layer("confidence", "float32", -1, bands))
    if config.save_uncertainty:
        bands = ["entropy of the probabilities, 0 to 1"]
        if models > 1:
            bands.append("disagreement of the models (mutual information), 0 to 1")
        layers.append(Layer("uncertainty", "float32", -1, bands))
    if config.save_probabilities:
        bands = [f"probability of {name}" for name in names]
        layers.append(Layer("probabilities", "uint8", 255, bands, scale=1 / 254))
    if config.combine:
        layers.append(Layer("dates", "uint8", 0, ["dates that are valid"]))
    return {layer.name: layer for layer in layers}


def bytes_of(layers: dict[str, Layer], written: bool = False) -> int:
    """Bytes of a pixel in all layers, as they are stored, or ``written`` to the files."""
    return sum(
        np.dtype(one.written[0] if written else one.dtype).itemsize * len(one.bands)
        for one in layers.values()
    )


def map_nodata(label_classes: int) -> int:
    """The value of invalid pixels in a map: 255, or 65535 past 255 classes."""
    return 255 if label_classes <= 255 else 65535


def few_rows(tensor: Tensor, rows: int) -> Iterator[slice]:
    """All rows (n, w) of a tensor, on the CPU some at a time, which then stay in its cache."""
    step = rows if tensor.device.type == "cpu" else max(1, len(tensor))
    for first in range(0, len(tensor), step):
        yield slice(first, first + step)


def classify(probabilities: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """The class of each pixel, and its probability.

    Args:
        probabilities: (K, H, W) float32; K = 1 is the foreground alone.
        threshold: Least probability of the foreground (K = 1).

    Returns:
        classes (H, W) uint8 (int32 past 255 classes), the first where several are as likely, and
        confidence (H, W) float32.
    """
    if len(probabilities) == 1:
        foreground = probabilities[0]
        # blended weights sum to one but for the last bit
        classes = foreground >= threshold - 1e-6
        confidence = torch.where(classes, foreground, 1 - foreground)
        return classes.to(torch.uint8), confidence.clamp(max=1)
    small = len(probabilities) <= 255
    classes = torch.zeros_like(
        probabilities[0], dtype=torch.uint8 if small else torch.int32
    )
    confidence = probabilities[0].clone()
    # torch's argmax takes ten times as long on the CPU
    for rows in few_rows(classes, DECIDED_ROWS):
        chosen, most = classes[rows], confidence[rows]
        for number in range(1, len(probabilities)):
            other = probabilities[number, rows]
            better = other > most
            better = better.view(torch.uint8) if small else better.to(torch.int32)
            torch.maximum(chosen, better * number, out=chosen)  # numbers grow
            torch.maximum(most, other, out=most)
    return classes, confidence.clamp_(max=1)


def compute_layers(
    blended: Tensor, layers: dict[str, Layer], classes: int, threshold: float
) -> dict[str, Tensor]:
    """Classes, confidence and the other layers, (bands, H, W) each, of blended probabilities.

    Args:
        blended: (K, H, W) float32; after the classes the mean entropy of the models, if there are
            several and the uncertainty is asked for.
        layers: Those that are asked for.
        classes: K without that entropy.
        threshold: Of a binary map.
    """
    probabilities = blended[:classes]
    chosen, confidence = classify(probabilities, threshold)
    result = {"classes": chosen[None], "confidence": confidence[None]}
    if "uncertainty" in layers:
        entropy = predictor.entropy(probabilities.clamp(0, 1)).clamp_(0, 1)
        bands = [entropy]
        # Houlsby et al. 2011: entropy of the mean less mean of the entropies
        if len(blended) > classes:
            bands.append((entropy - blended[classes]).clamp_(0, 1))
        result["uncertainty"] = torch.stack(bands)
    if "probabilities" in layers:
        if classes == 1:
            probabilities = torch.cat([1 - probabilities, probabilities])
        scaled = (probabilities.clamp(0, 1) * 254).round_()
        result["probabilities"] = scaled.to(torch.uint8)
    return result


def mask_layers(
    tensors: dict[str, Tensor], valid: np.ndarray, layers: dict[str, Layer]
) -> dict[str, np.ndarray]:
    """Layers as they are written: in their dtype, nodata where not ``valid``; overwrites them."""
    if not valid.all():
        invalid = torch.from_numpy(~valid).to(tensors["classes"].device)
        for name, layer in layers.items():
            tensors[name].masked_fill_(invalid, layer.nodata)
    return {
        name: tensors[name].cpu().numpy().astype(layer.dtype, copy=False)
        for name, layer in layers.items()
    }
