"""Scores and areas as aligned text."""

from __future__ import annotations

from evaluation.matrices import score_gap
from model_training import HEADLINES


def score_table(result: dict) -> str:
    """The scores of one examination as aligned text, a line per class.

    User's accuracy is precision, producer's accuracy recall.
    """

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    columns = {
        "precision": "user's acc.",
        "recall": "producer's acc.",
        "f1": "F1",
        "iou": "IoU",
    }
    width = max(6, *(len(entry["name"]) + 2 for entry in result["per_class"]))
    sizes = {key: max(9, len(head) + 3) for key, head in columns.items()}
    heads = "".join(f"{head:>{sizes[key]}}" for key, head in columns.items())
    lines = [f"{'':{width}}{'pixels':>14}{heads}"]
    for entry in result["per_class"]:
        values = "".join(f"{number(entry[key]):>{sizes[key]}}" for key in columns)
        lines.append(f"{entry['name']:{width}}{entry['pixels']:>14,}{values}")
    pixels = sum(entry["pixels"] for entry in result["per_class"])
    means = "".join(f"{number(result[f'mean_{key}']):>{sizes[key]}}" for key in columns)
    lines.append(f"{'mean':{width}}{pixels:>14,}{means}")
    accuracy, kappa = number(result["overall_accuracy"]), number(result["kappa"])
    return "\n".join([*lines, f"overall accuracy {accuracy}, kappa {kappa}"])


def side_by_side(random: dict, blocked: dict, gap: dict | None = None) -> str:
    """The scores of folds at random and by block as aligned text, and what lies between them.

    Args:
        random: "pooled" scores and their "intervals" by ``block_bootstrap``.
        blocked: Likewise.
        gap: The interval of the difference by name, from the same blocks for both.
    """

    def cell(value: float | None, interval) -> str:
        if value is None:
            return "-"
        limits = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        return f"{value:.3f}{limits}"

    runs = (random, blocked)
    lines = [f"{'':18}{'folds at random':24}folds by block"]
    for key in HEADLINES:
        first, second = (
            cell(run["pooled"][key], run["intervals"][key]) for run in runs
        )
        lines.append(f"{key.replace('_', ' '):18}{first:24}{second}")
    difference = score_gap(random["pooled"], blocked["pooled"])["iou"]
    if difference is None:
        return "\n".join(lines)
    interval = (gap or {}).get("iou")
    verdict = "what random folds gain from neighbours, and a new place will not give"
    if difference <= 0:
        verdict = "random folds are not better here"
    elif interval and interval[0] <= 0:
        verdict = "too few blocks to tell it from chance"
    return "\n".join(
        [*lines, f"optimism of iou   {cell(difference, interval)}: {verdict}"]
    )


def area_table(areas: dict) -> str:
    """Estimated areas and accuracies with their 95 % intervals as aligned text."""

    def cell(estimate: dict, form: str) -> str:
        if estimate["value"] is None:
            return "-"
        interval = estimate["interval_95"]
        ends = [format(end, form) for end in interval] if interval else ["-", "-"]
        return f"{estimate['value']:{form}} [{', '.join(ends)}]"

    in_metres = "area_ha" in areas["per_class"][0]
    mapped, area = ("mapped_ha", "area_ha") if in_metres else ("mapped_share", "share")
    form = ",.1f" if in_metres else ".3f"
    heads = [mapped.replace("_", " "), area.replace("_", " ")]
    rows = [["", *heads, "user's acc.", "producer's acc."]]
    for entry in areas["per_class"]:
        known = entry[mapped]
        row = [entry["name"], "-" if known is None else format(known, form)]
        row.append(cell(entry[area], form))
        for key in ("users_accuracy", "producers_accuracy"):
            row.append(cell(entry[key], ".3f"))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]
    return "\n".join(
        [*lines, f"overall accuracy {cell(areas['overall_accuracy'], '.3f')}"]
    )


def calibration_line(calibration: dict) -> str:
    """How far confidence is from accuracy, before and after the temperature."""
    before, after = calibration["ece_before"], calibration["ece_after"]
    if before is None:
        return "expected calibration error -"
    line = f"expected calibration error {before:.3f}"
    if calibration["temperature"] == 1:
        return line
    return f"{line}, {after:.3f} with temperature {calibration['temperature']:.2f}"


def report_text(report: dict) -> str:
    """The scores of a training run as text."""
    lines = []
    for key, title in (
        ("pooled", "All folds pooled"),
        ("validation", "Validation"),
        ("test", "Test"),
    ):
        if key in report:
            lines += ["", title, score_table(report[key])]
    if "calibration" in report:
        lines.append(calibration_line(report["calibration"]))
    if "areas" in report:
        lines += ["", "Areas, corrected for the errors of the map, with 95 % intervals"]
        lines.append(area_table(report["areas"]))
    for key, values in report.get("summary", {}).items():
        line = f"{key:17} {values['mean']:.3f}"
        if values["interval_95"]:  # not when a single fold has the score
            low, high = values["interval_95"]
            line += f" +- {values['std']:.3f}  [{low:.3f}, {high:.3f}]"
        if interval := report.get("intervals", {}).get(key):
            low, high = interval
            line += f"  pooled {report['pooled'][key]:.3f}  [{low:.3f}, {high:.3f}]"
        lines.append(line)
    if "optimism" in report:
        gap = {key: entry["interval_95"] for key, entry in report["optimism"].items()}
        lines += ["", side_by_side(report["random"], report, gap)]
    return "\n".join(lines)
