"""Scores and areas as aligned text."""

from __future__ import annotations

from common.scores import HEADLINES
from common.text import aligned_table, distance_text

AREA_SHARES = ("share", "users_accuracy", "producers_accuracy")
AREAS_TITLE = (
    "Areas, model-based, from labels chosen by hand: those of a random sample can be published "
    "(Evaluate_map.py --sample)"
)
INTERVALS = {
    "overall_accuracy": "overall accuracy",
    "kappa": "kappa",
    "mean_iou": "mean IoU",
    "mean_f1": "mean F1",
}
FEW_BLOCKS = 10  # that a bootstrap draws from: its intervals are then too narrow


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def with_interval(value: float | None, interval, form: str = ".3f") -> str:
    """As 0.8 [0.7, 0.9]; 0.8 without an interval; - for what is unknown."""
    if value is None:
        return "-"
    ends = ", ".join(format(end, form) for end in interval or ())
    return f"{value:{form}} [{ends}]" if interval else f"{value:{form}}"


def score_table(result: dict) -> str:
    """The scores of one evaluation as aligned text, a line per class.

    User's accuracy is precision, producer's accuracy recall.
    """
    keys = ("precision", "recall", "f1", "iou")
    entries = result["per_class"]
    rows = [["", "pixels", "user's acc.", "producer's acc.", "F1", "IoU"]]
    for entry in entries:
        values = [number(entry[key]) for key in keys]
        rows.append([entry["name"], f"{entry['pixels']:,}", *values])
    pixels = sum(entry["pixels"] for entry in entries)
    means = [number(result[f"mean_{key}"]) for key in keys]
    rows.append(["mean", f"{pixels:,}", *means])
    lines = []
    if boundary := result.get("boundary"):
        column = [entry["f1"] for entry in boundary["per_class"]]
        rows[0].append("boundary F1")
        for row, value in zip(rows[1:], [*column, boundary["mean_f1"]], strict=True):
            row.append(number(value))
        lines.append(boundary_line(boundary))
    accuracy, kappa = number(result["overall_accuracy"]), number(result["kappa"])
    lines.append(f"overall accuracy {accuracy}, kappa {kappa}")
    return "\n".join([aligned_table(rows), *lines])


def boundary_line(boundary: dict) -> str:
    """What the boundary F1 means, or why there is none."""
    if boundary["mean_f1"] is None:
        return "no boundary F1: nowhere do labels of two classes touch"
    pixels, metres = boundary["tolerance_pixels"], boundary["tolerance_metres"]
    known = "" if metres is None else f" ({metres:.3g} m)"
    return f"boundaries agree within {pixels:g} pixels{known}"


def map_text(report: dict) -> str:
    """The comparison of a map with labels as text."""
    lines = [score_table(report)]
    known = [
        f"{name} [{', '.join(format(end, '.3f') for end in report['intervals'][key])}]"
        for key, name in INTERVALS.items()
        if report["intervals"][key]
    ]
    if known:
        blocks = report["blocks"]
        few = ", too few to trust" if blocks < FEW_BLOCKS else ""
        lines.append(f"95 % intervals: {', '.join(known)}")
        lines.append(
            f"they come from {blocks} blocks{few}, and describe these labels, not the ground, of "
            "which only a random sample says more (--sample)"
        )
    if "calibration" in report:
        error = number(report["calibration"]["expected_calibration_error"])
        lines.append(f"expected calibration error {error}")
    lines.append(f"labelled pixels {report['labelled_pixels']:,}")
    if report["labelled_without_map"]:
        lines[-1] += (
            f"; {report['labelled_without_map']:,} more lie where the map has no class"
        )
    return "\n".join(lines)


def side_by_side(random: dict, blocked: dict, gap: dict) -> str:
    """The scores of folds at random and by block as aligned text, and their difference.

    Args:
        random: "pooled" scores and their "intervals" by ``block_bootstrap``.
        blocked: Likewise.
        gap: The "value" and "interval_95" of their difference by name, see ``paired_gap``.
    """
    rows = [["", "folds at random", "folds by block"]]
    for key in HEADLINES:
        cells = [
            with_interval(run["pooled"][key], run["intervals"][key])
            for run in (random, blocked)
        ]
        rows.append([key.replace("_", " "), *cells])
    table = aligned_table(rows, left=3)
    difference, interval = gap["iou"]["value"], gap["iou"]["interval_95"]
    if difference is None:
        return table
    verdict = "what random folds gain from neighbours, and a new place will not give"
    if difference <= 0:
        verdict = "random folds are not better here"
    elif interval and interval[0] <= 0:
        verdict = "too few blocks to distinguish it from chance"
    return f"{table}\noptimism of iou {with_interval(difference, interval)}: {verdict}"


def area_table(areas: dict, units: str = "test patches") -> str:
    """Estimated areas and accuracies with their 95 % intervals as aligned text.

    ``units`` are what says how an estimate varies.
    """

    def cell(estimate: dict, form: str = ".3f") -> str:
        return with_interval(estimate["value"], estimate["interval_95"], form)

    in_metres = "area_ha" in areas["per_class"][0]
    mapped, area = ("mapped_ha", "area_ha") if in_metres else ("mapped_share", "share")
    form = ",.1f" if in_metres else ".3f"
    heads = [mapped.replace("_", " "), area.replace("_", " ")]
    rows = [["", *heads, "user's acc.", "producer's acc."]]
    for entry in areas["per_class"]:
        known = entry[mapped]
        share = "-" if known is None else format(known, form)
        accuracies = [cell(entry[key]) for key in AREA_SHARES[1:]]
        rows.append([entry["name"], share, cell(entry[area], form), *accuracies])
    overall = areas["overall_accuracy"]
    shown = [entry[key] for entry in areas["per_class"] for key in AREA_SHARES]
    lines = [aligned_table(rows), f"overall accuracy {cell(overall)}"]
    if any(e["value"] is not None and not e["interval_95"] for e in [*shown, overall]):
        lines.append(f"without an interval: fewer than two {units} say how it varies")
    return "\n".join(lines)


def sample_text(report: dict) -> str:
    """What a random sample says of a map, as text."""
    lines = [area_table(report, "points of a stratum")]
    lines.append(
        f"from {report['points']:,} points drawn at random; strata: {report['strata']}"
    )
    shown = [entry[key] for entry in report["per_class"] for key in AREA_SHARES]
    if any(one["standard_error"] == 0 for one in [*shown, report["overall_accuracy"]]):
        lines.append(
            "an interval without width: no point disagrees, which says little where points are few"
        )
    if left := report["points_without_reference"]:
        lines.append(f"{left:,} points have no reference and are left out")
    if outside := report["points_outside_map"]:
        lines.append(f"{outside:,} points lie where the map has no class")
    if few := report["strata_with_few_points"]:
        lines.append(f"fewer than two points have a reference in {', '.join(few)}")
    return "\n".join(lines)


def calibration_line(calibration: dict) -> str:
    """How far confidence is from accuracy, before and after the temperature."""
    before, after = calibration["ece_before"], calibration["ece_after"]
    if before is None:
        return "expected calibration error -"
    line = f"expected calibration error {before:.3f}"
    if calibration["temperature"] == 1:
        return line
    return f"{line}, {after:.3f} with temperature {calibration['temperature']:.2f}"


def summary_table(report: dict) -> str:
    """Mean, deviation and interval of each score over folds, and of the pooled scores."""
    rows = []
    for key, values in report["summary"].items():
        row = [key, number(values["mean"]), "", ""]
        if values["interval_95"]:  # not when a single fold has the score
            low, high = values["interval_95"]
            row[2:] = [f"+- {values['std']:.3f}", f"[{low:.3f}, {high:.3f}]"]
        if interval := report.get("intervals", {}).get(key):
            row.append(f"pooled {with_interval(report['pooled'][key], interval)}")
        rows.append(row)
    width = max(map(len, rows))
    return aligned_table([row + [""] * (width - len(row)) for row in rows], left=width)


def baseline_table(network: dict, baseline: dict, key: str) -> str:
    """The forest's scores beside the network's, and their difference, as aligned text.

    Args:
        network: Its scores.
        baseline: Of a report.
        key: The name of the patches that both were scored on.
    """
    gaps = baseline["difference"][key]
    ours, means = gaps["iou"]["scores"], gaps["mean_iou"]["scores"]
    foreground = {"iou": "foreground IoU"} if ours != means else {}
    all_labelled = network["mean_iou"] == means[0]
    rows = [
        [
            "" if all_labelled else "classes with labels",
            "network",
            "forest",
            "difference",
        ]
    ]
    for score, name in (foreground | INTERVALS).items():
        gap = with_interval(gaps[score]["value"], gaps[score]["interval_95"], "+.3f")
        rows.append([name, *map(number, gaps[score]["scores"]), gap])
    return f"{aligned_table(rows)}\n{verdict(gaps)}"


def verdict(gaps: dict) -> str:
    """What the difference of the network and the forest says, by the score that models are chosen by."""
    interval, blocks = gaps["iou"]["interval_95"], gaps["blocks"]
    ground = f"{blocks} block{'s' * (blocks > 1)} of ground"
    few = ", too few to trust" if blocks < FEW_BLOCKS else ""
    if interval and interval[0] > 0:
        return f"the network is better ({ground}{few})"
    if interval and interval[1] < 0:
        return (
            f"the forest is better ({ground}{few}): docs/training.md says what to try"
        )
    return f"{ground} cannot tell which of the two is better"


def curve_text(curve: dict) -> str:
    """A learning curve as aligned text, and whether more labels would help."""
    kinds = [kind for kind in ("network", "forest") if kind in curve["points"][0]]
    rows = [["", "patches", *kinds]]
    for point in curve["points"]:
        cells = [number(point[kind]["iou"]) for kind in kinds]
        rows.append([f"{point['percent']} %", str(point["patches"]), *cells])
    gain = curve["gain"]["iou"]
    interval, blocks = gain["interval_95"], curve["gain"]["blocks"]
    verdict = "whether more labels would help cannot be told from these patches"
    if interval and blocks >= FEW_BLOCKS and interval[0] > 0:
        verdict = "more labels like these would probably help"
    elif interval and blocks >= FEW_BLOCKS and interval[1] < 0:
        verdict = "more labels like these would hardly help"
    change = with_interval(gain["value"], interval, "+.3f")
    last = f"IoU from half of the patches to all {change}, one training each: {verdict}"
    return f"{aligned_table(rows)}\n{last}"


def report_text(report: dict) -> str:
    """The scores of a training run as text."""
    lines, baseline = [], report.get("baseline", {})
    if baseline:
        trees, pixels = baseline["trees"], baseline["pixels"]
        size = f"of {trees} trees on {pixels:,} training pixels"
        lines.append(f"Forest: a random forest {size}, {baseline['seconds']:.0f} s")
    for key, title in (
        ("pooled", "All folds pooled"),
        ("validation", "Validation"),
        ("held_out", "Held out"),
        ("test", "Test"),
    ):
        if key in report:
            lines += ["", title, score_table(report[key])]
            metres = report.get(f"{key}_distance_m")
            if metres is not None:
                lines.append(
                    f"{distance_text(metres)} from a patch to the nearest training patch (median, "
                    "of the centres)"
                )
            if key in baseline:
                lines.append(baseline_table(report[key], baseline, key))
    if "calibration" in report:
        lines.append(calibration_line(report["calibration"]))
    if "areas" in report:
        lines += ["", AREAS_TITLE]
        lines.append(area_table(report["areas"]))
    if "learning_curve" in report:
        curve = report["learning_curve"]
        lines += ["", f"Learning curve, IoU on {curve['scored_on']}", curve_text(curve)]
    if report.get("summary"):
        lines.append(summary_table(report))
        blocks = report.get("blocks")
        if blocks is not None and blocks < FEW_BLOCKS:
            lines.append(
                f"the intervals of the pooled scores come from {blocks} blocks only, and are too "
                "narrow; give a smaller --block_size, or of whole scenes or values more"
            )
    if "optimism" in report:
        lines += ["", side_by_side(report["random"], report, report["optimism"])]
    return "\n".join(lines)
