"""Pictures of scores: bars per class, confusion matrix, reliability, errors on the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.architectures import is_background
from common.colours import Colour, error_colours
from common.pictures import colour_map, draw_panels, save_figure
from common.text import shorten


def plot_reliability(
    axes, curves: Mapping[str, dict], title: str = "Reliability"
) -> None:
    """Draw accuracy over confidence, and which share of the pixels has that confidence.

    Bins with less than a ten-thousandth of the pixels are noise and left out.

    Args:
        axes: Where.
        curves: Reports of ``Calibration`` by what they are called in the legend.
        title: Above.
    """
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfectly calibrated")
    for number, (name, report) in enumerate(curves.items()):
        pixels = np.array(report["pixels"])
        filled = pixels > 1e-4 * pixels.sum()
        if not filled.any():
            continue
        confidence = np.array(report["confidence"], float)[filled]
        accuracy = np.array(report["accuracy"], float)[filled]
        error = report["expected_calibration_error"]
        label, colour = f"{name}: ECE {error:.3f}", f"C{number}"
        axes.plot(confidence, accuracy, color=colour, marker=".", label=label)
        edges = np.linspace(0, 1, len(pixels) + 1)
        axes.stairs(pixels / pixels.sum(), edges, color=colour, alpha=0.25, fill=True)
    axes.set(xlabel="confidence", ylabel="accuracy; share of pixels (filled)")
    axes.set(title=title, xlim=(0, 1.02), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_reliability(target: Path, curves: Mapping[str, dict], title: str) -> None:
    """Draw the reliability alone; ``curves`` are those of ``plot_reliability``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    plot_reliability(figure.subplots(), curves, title)
    save_figure(figure, target)


def draw_calibration(target: Path, calibration: dict, split: str = "test") -> None:
    """Draw the reliability of a split before and after the temperature."""
    curves = {"network": calibration["before"]}
    if calibration["temperature"] != 1:
        name = f"temperature {calibration['temperature']:.2f}"
        curves[name] = calibration["after"]
    draw_reliability(target, curves, f"Reliability, {split}")


MANY = 12  # classes, from which on names stand upright and numbers do not fit


def score_size(result: dict) -> tuple[float, float]:
    """Inches of width and height in which the names of all classes can be read beside scores."""
    side = min(0.17 * len(result["per_class"]), 20)
    return max(7.0, side + 3.5), max(5.0, side + 2.5)


def _class_ticks(axes, result: dict, both: bool) -> None:
    """Names of classes below, and beside if both."""
    names = [shorten(entry["name"], 30) for entry in result["per_class"]]
    style = {"rotation": 30, "ha": "right"}
    if len(names) > MANY:
        style = {"rotation": 90, "ha": "center", "fontsize": 8}
    axes.set_xticks(range(len(names)), names, parse_math=False, **style)
    if both:
        size = style.get("fontsize")
        axes.set_yticks(range(len(names)), names, parse_math=False, fontsize=size)


def draw_bars(axes, result: dict, source: str) -> None:
    entries = result["per_class"]
    places = np.arange(len(entries))
    for shift, key, name in ((-0.2, "iou", "IoU"), (0.2, "f1", "F1")):
        values = [entry[key] or 0 for entry in entries]
        drawn = axes.bar(places + shift, values, 0.38, label=name)
        labels = ["-" if e[key] is None else f"{e[key]:.2f}" for e in entries]
        if len(entries) <= MANY:
            axes.bar_label(drawn, labels, fontsize=8)
    _class_ticks(axes, result, both=False)
    axes.margins(x=0.01)
    mean = result["mean_iou"]
    shown = "-" if mean is None else f"{mean:.3f}"
    axes.set(title=f"Per class, {source} (mean IoU {shown})", ylim=(0, 1.1))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def draw_matrix(figure, axes, result: dict, source: str) -> None:
    counts = np.array(result["confusion_matrix"], float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _class_ticks(axes, result, both=True)
    axes.set(
        title=f"Confusion, {source} (share of the true class)",
        xlabel="predicted",
        ylabel="true",
    )
    if len(shares) <= MANY:
        for (row, column), share in np.ndenumerate(shares):
            style = {"color": "white" if share > 0.5 else "black", "fontsize": 8}
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", **style)
    figure.colorbar(drawn, ax=axes, shrink=0.8)


def draw_confusion(target: Path, result: dict, source: str) -> None:
    """Draw scores per class and the confusion matrix."""
    from matplotlib.figure import Figure

    width, height = score_size(result)
    figure = Figure(figsize=(2 * width, height + 1), layout="constrained")
    bars, table = figure.subplots(1, 2)
    draw_bars(bars, result, source)
    draw_matrix(figure, table, result, source)
    save_figure(figure, target)


def error_map(
    prediction: np.ndarray,
    mask: np.ndarray,
    names: Sequence[str],
    colours: Sequence[Colour],
) -> tuple[np.ndarray, list[tuple[str, Colour]]]:
    """Where a prediction (H, W) is right and wrong, as RGB (H, W, 3) uint8, and its legend.

    Of two classes the errors are misses and false alarms of the one that is sought: not the rest,
    or the second where neither is. No class has their colours; what has no label or no prediction is white.
    """
    right, missed, false_alarm = error_colours(colours)
    kinds = np.where(prediction == mask, 0, 1)
    legend = [("right", right), ("wrong", missed)]
    if len(names) == 2:
        sought = 0 if is_background(names[1]) and not is_background(names[0]) else 1
        kinds[(kinds == 1) & (prediction == sought)] = 2
        legend[1:] = [
            (f"missed: {names[sought]}", missed),
            (f"false alarm: {names[sought]}", false_alarm),
        ]
    known = (prediction >= 0) & (mask >= 0) & (mask < len(names))
    shown = [colour for _, colour in legend]
    return colour_map(np.where(known, kinds, -1), shown), legend


def draw_errors(
    target: Path,
    guess: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    colours: Sequence[Colour],
) -> None:
    """Draw a map, its labels and the errors beside or below each other.

    Args:
        target: The PNG to write.
        guess: (h, w) classes of the map; negative is none, which is white.
        truth: Likewise, of the labels.
        names: K class names.
        colours: Those of the classes.
    """
    errors, kinds = error_map(guess, truth, names, colours)
    panels = [
        {"title": "map", "picture": colour_map(guess, colours)},
        {"title": "labels", "picture": colour_map(truth, colours)},
        {"title": "errors", "picture": errors},
    ]
    present = sorted({*np.unique(guess[guess >= 0]), *np.unique(truth[truth >= 0])})
    legend = [(names[number], colours[number]) for number in present] + kinds
    save_figure(draw_panels(panels, legend), target)


def draw_learning_curve(target: Path, curve: dict) -> None:
    """Draw the IoU of network and forest over the number of training patches."""
    from matplotlib.figure import Figure

    points = curve["points"]
    patches = [point["patches"] for point in points]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, kind in enumerate(("network", "forest")):
        if kind not in points[0]:
            continue
        values = [point[kind]["iou"] for point in points]
        shown = [np.nan if value is None else value for value in values]
        axes.plot(patches, shown, "o-", color=f"C{place}", label=kind)
    ticks = [f"{point['patches']}\n{point['percent']} %" for point in points]
    axes.set_xticks(patches, ticks)
    axes.set(title=f"Learning curve, {curve['scored_on']}", xlabel="training patches")
    axes.set(ylabel="IoU", xlim=(0, 1.05 * patches[-1]), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, target)


def draw_areas(target: Path, report: dict) -> None:
    """Draw the area of each class as it is mapped and as it is estimated, with its interval."""
    from matplotlib.figure import Figure

    entries = report["per_class"]
    in_hectares = all(entry.get("mapped_ha") is not None for entry in entries)
    mapped, area = (
        ("mapped_ha", "area_ha") if in_hectares else ("mapped_share", "share")
    )
    places = np.arange(len(entries))
    figure = Figure(figsize=(max(6, 1.1 * len(entries)), 5), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        places,
        [entry[mapped] for entry in entries],
        0.6,
        label="mapped",
        color="C0",
        alpha=0.5,
    )
    label = "estimated, with 95 % interval"
    for place, estimate in zip(places, (entry[area] for entry in entries)):
        if estimate["value"] is None:
            continue
        low, high = estimate["interval_95"] or (estimate["value"],) * 2
        axes.plot([place, place], [low, high], color="black")
        axes.plot(place, estimate["value"], "o", color="black", label=label)
        label = None
    names = [entry["name"] for entry in entries]
    axes.set_xticks(places, names, rotation=30, ha="right", parse_math=False)
    axes.set(title="Areas", ylabel="hectares" if in_hectares else "share of the map")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, target)
