"""What a map adds up to: pixels, areas and confidence of each class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import SegmentationError
from common.text import aligned_table
from prediction.layers import few_rows

COUNTED_ROWS = 64  # rows whose statistics are counted at once
BINS = 1000  # of the confidence between 0 and 1
# of one, in which confidences are added up: whole numbers have the same sum in any order
PARTS = 2**20


def confidence_counts(
    classes: Tensor, confidence: Tensor, valid: np.ndarray, count: int
) -> np.ndarray:
    """Count the confidence of a part of a map.

    Args:
        classes: (n, w) below ``count``.
        confidence: (n, w), 0 to 1.
        valid: (n, w) bool; other pixels do not count.
        count: Classes of the map.

    Returns:
        (BINS + count,) int64: the pixels in each bin, and the sum over each class in ``PARTS``;
        those of several parts can be added.

    Raises:
        SegmentationError: A probability that is not a number.
    """
    total = torch.zeros(BINS + count, dtype=torch.int64)
    every = valid.all()
    for rows in few_rows(classes, COUNTED_ROWS):
        chosen, values = classes[rows].flatten(), confidence[rows].flatten()
        if not every:  # the others come into the first bin, and out of it again
            invalid = torch.from_numpy(~valid[rows]).to(values.device).flatten()
            values = values.masked_fill(invalid, 0)
            total[0] -= int(invalid.sum())
        if not torch.isfinite(values.sum()):
            raise SegmentationError(
                "The model gives probabilities that are not numbers; are the scene's values "
                "absurd, did the training diverge, or is --precision fp16 too coarse for it?"
            )
        bins = (values * BINS).to(torch.int32).clamp_(max=BINS - 1)
        total[:BINS] += torch.bincount(bins, minlength=BINS).cpu()
        parts = (values * PARTS).round_().to(torch.float64)
        total[BINS:] += torch.bincount(chosen, parts, minlength=count).long().cpu()
    return total.numpy()


class Statistics:
    """What a map adds up to."""

    def __init__(
        self,
        names: Sequence[str],
        areas: np.ndarray | None,
        total: int,
        codes: Sequence[int | str] | None = None,
    ):
        """Make ready.

        Args:
            names: Of the classes.
            areas: (H,) square metres of a pixel in each row of the map, None if unknown.
            total: Pixels that were to be mapped.
            codes: Of the classes, by default their numbers.
        """
        self.names = list(names)
        self.codes = list(codes or range(len(self.names)))
        self.areas = areas
        self.alike = areas is None or areas.min() == areas.max()
        self.row = 0
        self.total = total
        self.pixels = np.zeros(len(self.names), np.int64)
        self.gained = np.zeros(len(self.names), np.int64)  # by a sieve
        self.area = np.zeros(len(self.names))
        self.counts = np.zeros(BINS + len(self.names), np.int64)  # of all parts

    def add(self, classes: np.ndarray, before: np.ndarray | None = None) -> None:
        """Count the next rows of a map, (n, W); ``before`` are their classes before a sieve."""
        count = len(self.names)
        if before is not None:
            changed = classes != before
            for sign, some in ((1, classes), (-1, before)):
                self.gained += sign * np.bincount(some[changed], minlength=count)
        for some in [classes] if self.alike else classes:
            pixels = np.bincount(some.ravel(), minlength=count)[:count]
            self.pixels += pixels
            if self.areas is not None:
                self.area += pixels * self.areas[self.row]
            self.row += 1 if some.ndim == 1 else len(some)

    def report(self) -> dict:
        """Pixels, shares, areas and confidence, as plain numbers for JSON."""
        mapped = int(self.pixels.sum())
        histogram, sums = self.counts[:BINS], self.counts[BINS:] / PARTS
        classes = []
        for number, name in enumerate(self.names):
            pixels = int(self.pixels[number])
            entry = {"class": number, "code": self.codes[number], "name": name}
            entry["pixels"] = pixels
            entry["share"] = pixels / mapped if mapped else None
            known = self.areas is not None
            entry["area_ha"] = float(self.area[number]) / 1e4 if known else None
            predicted = pixels - int(self.gained[number])
            mean = float(sums[number]) / predicted if predicted else None
            classes.append(entry | {"mean_confidence": mean})
        summary = None
        if mapped:
            reached = np.cumsum(histogram) / mapped
            summary = {"mean": float(sums.sum()) / mapped}
            for key, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9)):
                number = int(np.searchsorted(reached, share))
                summary[key] = (number + 0.5) / BINS
            summary["share_below_0.5"] = float(histogram[: BINS // 2].sum()) / mapped
        return {
            "pixels": self.total,
            "mapped_pixels": mapped,
            "nodata_pixels": self.total - mapped,
            "classes": classes,
            "confidence": summary,
        }


def report_text(report: dict) -> str:
    """The statistics as aligned text, a line per class."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    coded = any(entry["code"] != entry["class"] for entry in report["classes"])
    head = ["class", *["code"] * coded, "name"]
    rows = [(*head, "pixels", "share", "area (ha)", "confidence")]
    for entry in report["classes"]:
        share = number(entry["share"], ".2%")
        area = number(entry["area_ha"], ",.2f")
        confidence = number(entry["mean_confidence"], ".3f")
        pixels = f"{entry['pixels']:,}"
        head = [f"{entry['class']:5}", *[str(entry["code"])] * coded, entry["name"]]
        rows.append((*head, pixels, share, area, confidence))
    lines = [report["output"], aligned_table(rows, left=2 + coded)]
    nodata = report["nodata_pixels"] / report["pixels"]
    lines.append(f"nodata {report['nodata_pixels']:,} pixels ({nodata:.2%})")
    summary = report["confidence"]
    if summary:
        lines.append(
            f"confidence: mean {summary['mean']:.3f}, median {summary['median']:.3f}, 80 % between "
            f"{summary['p10']:.3f} and {summary['p90']:.3f}, "
            f"{summary['share_below_0.5']:.2%} of the pixels below 0.5"
        )
    return "\n".join(lines)
