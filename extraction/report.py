"""The content of a dataset: tables, overlaps between splits, pictures."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import SPLITS
from common.balance import absent_classes
from common.colours import complete_colours
from common.errors import DatasetError, SegmentationError, require
from common.ground import footprint, pairs_within, to_metric_crs
from common.interruption import until_stopped
from common.labels import (
    MISSING,
    class_codes_of,
    class_colours_of,
    class_names_of,
    read_classes,
    require_one_band,
)
from common.patches import list_pairs, patch_root, present_splits
from common.pictures import (
    colour_map,
    draw_panels,
    read_patch_picture,
    save_figure,
)
from common.rasters import open_raster
from common.text import aligned_table, share_text
from common.tiffs import tiff_header
from common.vector_labels import is_drawn
from common.vectors import read_vector
from extraction.journal import Skipped
from extraction.places import PatchLocation
from extraction.settings import ExtractionOptions, InfoConfig, SampleConfig

log = logging.getLogger("semanticseg4eo")

MOST_CLASSES = 65535  # of 16 bits, whose last value is unlabelled


@dataclass(frozen=True)
class SplitSummary:
    """One split of a dataset in numbers."""

    patches: int = 0
    pixels: int = 0  # of all labels
    class_pixels: tuple[int, ...] = ()  # labelled, by class

    def __add__(self, other: SplitSummary) -> SplitSummary:
        both = zip_longest(self.class_pixels, other.class_pixels, fillvalue=0)
        return SplitSummary(
            self.patches + other.patches,
            self.pixels + other.pixels,
            tuple(map(sum, both)),
        )

    @property
    def unlabelled_share(self) -> float:
        return 1 - sum(self.class_pixels) / self.pixels if self.pixels else 0.0

    def class_share(self, number: int) -> float:
        """The share of a class among labelled pixels."""
        counts = self.class_pixels
        return counts[number] / sum(counts) if number < len(counts) else 0.0


def share_cell(share: float) -> str:
    """A share as a cell of a table; "-" for none."""
    return share_text(share, "", "<") if share else "-"


def absent_lines(
    summaries: dict[str, SplitSummary], names: Sequence[str] | None
) -> list[str]:
    """A line for each split that has patches and lacks classes: those named, else those that occur."""
    occur = sum(summaries.values(), SplitSummary()).class_pixels
    known = [k for k in range(len(names or occur)) if names or occur[k]]
    words = [names[k] if names else f"class {k}" for k in known]
    lines = []
    for split, summary in summaries.items():
        pixels = [summary.class_share(number) for number in known]
        if summary.patches and (line := absent_classes(split, words, pixels)):
            lines.append(line)
    return lines


def split_table(summaries: dict[str, SplitSummary], names: Sequence[str] | None) -> str:
    """Splits as columns, class shares as rows."""
    classes = max(len(s.class_pixels) for s in summaries.values())
    names = names or [f"class {number}" for number in range(classes)]
    splits = summaries.values()
    rows = [
        ["", *(f"{split:>10}" for split in summaries)],
        ["patches", *(f"{split.patches:,}" for split in splits)],
        *(
            [name, *(share_cell(split.class_share(number)) for split in splits)]
            for number, name in enumerate(names)
        ),
        ["unlabelled", *(share_cell(split.unlabelled_share) for split in splits)],
    ]
    return aligned_table(rows)


def summarize(report: dict, config: ExtractionOptions) -> dict[str, SplitSummary]:
    """The splits of an extraction in numbers."""
    summaries = dict.fromkeys(SPLITS, SplitSummary())
    for record in report["patches"]:
        summaries[record["split"]] += SplitSummary(
            1, config.patch_size**2, tuple(record["class_pixels"])
        )
    return summaries


def warn_of_skipped(report: dict, config: ExtractionOptions) -> None:
    """Log what an extraction left out, splits without a patch or class, and labels of one class."""
    summaries, skipped = summarize(report, config), report["skipped"]
    if skipped:
        total = len(skipped) + len(report["patches"])
        log.warning("skipped %d of %d cells:", len(skipped), total)
        by_reason: dict[str, list[str]] = {}
        for name, reason in skipped.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = ", ... (--save_metadata stores all)" if len(names) > 12 else ""
            log.warning("  %s: %s%s", reason, ", ".join(names[:12]), more)
    for split, ratio in zip(SPLITS, config.ratios):
        if ratio and not summaries[split].patches:
            log.warning("the %s split got no patch: there are too few", split)
    labelled = sum(summaries.values(), SplitSummary())
    if np.count_nonzero(labelled.class_pixels) == 1:
        number = int(np.flatnonzero(labelled.class_pixels)[0])
        log.warning(
            "all labelled pixels are class %d, and nothing can be learnt from one class; %s",
            number,
            _reason_of_one_class(report, number, labelled),
        )
        return
    names, values = report["class_names"], report["label_values"]
    if values is not None:
        names = names or [f"class {number}" for number in range(len(values))]
    for line in absent_lines(summaries, names):
        log.warning(line)


def _reason_of_one_class(report: dict, number: int, labelled: SplitSummary) -> str:
    """Why an extraction found one class alone, and what to do."""
    label, nodata = report["scenes"][0]["label"], report["label_nodata"]
    if report["label_values"] is not None:
        return (
            "the cells hold no other class that --label_values or --label_column name"
        )
    if is_drawn(label):
        return f"the polygons of {label} cover all of the cells, or none"
    if nodata is not None:
        pair = ",".join(map(str, sorted({nodata, number})))
        return (
            f"{label} declares {nodata} as nodata, which means unlabelled: if it is a class, use "
            f"--label_values {pair}"
        )
    if labelled.unlabelled_share:
        return (
            "255 means unlabelled: if it is a class in your label, use --label_values "
            f"{number},255"
        )
    return f"the cells hold no other value of {label}"


def has_errors(report: dict) -> bool:
    """Whether an extraction left out what cannot be read (``--skip_errors``)."""
    return any(Skipped.parse(text).is_error for text in report["skipped"].values())


def extraction_text(report: dict, config: ExtractionOptions) -> str:
    """What an extraction wrote, as text."""
    table = split_table(summarize(report, config), report["class_names"])
    return f"{table}\n\nPatches: {Path(config.output) / 'Patch'}"


def dataset_info(config: InfoConfig) -> tuple[dict, list[PatchLocation]]:
    """Patches, sizes, bands, dtypes and class shares of a dataset, by split; and where they lie.

    Raises:
        DatasetError: Not a dataset, or a file that cannot be read.
    """
    report = {"dataset_root": config.output, "class_names": None, "class_codes": None}
    report["splits"] = {}
    places: list[PatchLocation] = []
    some = (present_splits(config.output) or SPLITS)[0]
    for split in SPLITS:
        pairs = list_pairs(config.output, split, required=split == some)
        summary, kinds = SplitSummary(), Counter()
        bar = tqdm(pairs, desc=split, unit="patch", leave=False, disable=None)
        for pair in until_stopped(bar):
            kinds[tiff_header(pair.image)] += 1
            with open_raster(pair.image) as file:
                shape = footprint(file.transform, file.height, file.width)
                places.append(PatchLocation(split, pair.name, shape, file.crs))
            with open_raster(pair.label) as file:
                require_one_band(file)
                label = read_classes(file)
                report["class_names"] = report["class_names"] or class_names_of(file)
                report["class_codes"] = report["class_codes"] or class_codes_of(file)
            known = label[label >= 0]
            summary += SplitSummary(1, label.size, tuple(np.bincount(known).tolist()))
        report["splits"][split] = {
            **asdict(summary),
            "unlabelled_share": summary.unlabelled_share,
            "kinds": [
                asdict(kind) | {"patches": count} for kind, count in kinds.most_common()
            ],
        }
    report["overlaps"] = split_overlaps(places)
    report["whole_scenes"] = has_whole_scenes(config.output, places)
    return report, places


def has_whole_scenes(folder: str, places: Sequence[PatchLocation]) -> bool:
    """Whether no scene lies in several splits, as the cells of a dataset say where they are known."""
    path = patch_root(folder) / "cells.gpkg"
    if not path.is_file():
        return False
    cells = read_vector(str(path))
    scenes = dict(zip(cells["name"], cells["scene"]))
    splits: dict[str | None, set[str]] = {}
    for place in places:
        splits.setdefault(scenes.get(place.name), set()).add(place.split)
    return None not in splits and all(len(known) == 1 for known in splits.values())


def split_overlaps(places: Sequence[PatchLocation]) -> list[dict] | None:
    """Patches of different splits that share ground, so that a test measures memory.

    Returns:
        An entry per pair of splits with "splits", "patches" (of the second that share ground with
        the first) and "examples"; None where a patch has no CRS.
    """
    if any(place.crs is None for place in places):
        return None
    splits, names, shapes, systems = zip(*places)
    parts = [SPLITS.index(split) for split in splits]
    ground = to_metric_crs(shapes, systems)
    pairs = pairs_within(ground, parts, 0)
    found: dict[tuple[str, str], list] = {}
    for first, second in pairs:
        found.setdefault((splits[first], splits[second]), []).append((first, second))
    return [
        {
            "splits": list(key),
            "patches": len({second for _, second in hits}),
            "examples": [f"{names[b]} and {names[a]}" for a, b in hits[:5]],
        }
        for key, hits in found.items()
    ]


def names_and_codes(
    names: Sequence[str] | None, codes: Sequence[int | str] | None
) -> list[str] | None:
    """Names of classes with their codes where these are neither the names nor the numbers."""
    if not names or not codes or len(names) != len(codes):
        return names
    if list(codes) == list(range(len(names))):
        return names
    return [n if n == str(c) else f"{n} ({c})" for n, c in zip(names, codes)]


def info_text(report: dict) -> str:
    """The dataset report as text."""
    summaries, lines = {}, []
    for split, entry in report["splits"].items():
        summaries[split] = SplitSummary(
            entry["patches"], entry["pixels"], tuple(entry["class_pixels"])
        )
        for kind in entry["kinds"]:
            lines.append(
                f"{split:12}{kind['patches']:>6} patches of {kind['height']} x {kind['width']} "
                f"pixels, {kind['bands']} bands, {kind['dtype']}"
            )
    names = report["class_names"]
    words = names_and_codes(names, report["class_codes"])
    lines += ["", split_table(summaries, words), "", *absent_lines(summaries, names)]
    if report["overlaps"] is None:
        lines.append(
            "overlap between splits: unknown, since not all patches have a CRS"
        )
    for entry in report["overlaps"] or []:
        first, second = entry["splits"]
        sign = "" if report["whole_scenes"] else "LEAK: "
        lines.append(
            f"{sign}{entry['patches']} patches of {second} share ground with {first}, as "
            f"{entry['examples'][0]}"
        )
    if report["overlaps"] and report["whole_scenes"]:
        lines.append(
            "each scene lies in one split: scores hold for new scenes of these places, not for new "
            "places"
        )
    if report["overlaps"] == []:
        lines.append("no ground is shared between splits")
    return "\n".join(lines)


def draw_sample(config: SampleConfig) -> Path:
    """Draw one patch: image, label with legend, and both together.

    Returns:
        The PNG that was written.

    Raises:
        OptionError: No such patch.
    """
    split = config.split or (present_splits(config.output) or SPLITS)[0]
    pairs, index = list_pairs(config.output, split), config.sample_index
    require(
        0 <= index < len(pairs),
        "--sample_index",
        index,
        f"0 to {len(pairs) - 1}, since {split} has {len(pairs)} patches",
    )
    pair = pairs[index]
    picture, valid, _, shown = read_patch_picture(pair, MISSING)
    with open_raster(pair.label) as file:
        names, known = class_names_of(file), class_colours_of(file)
        mask = np.where(valid, read_classes(file), MISSING)
    present = np.unique(mask[mask >= 0])
    if present.max(initial=0) >= MOST_CLASSES:
        raise DatasetError(
            f"{pair.label} holds {present[-1]}: classes are 0 to {MOST_CLASSES - 1}; extract it with "
            "--label_values, which numbers the values that are classes"
        )
    count = len(names) if names else max(2, int(present.max(initial=0)) + 1)
    names = names or [f"class {number}" for number in range(count)]
    colours = complete_colours(known, names)
    label = colour_map(mask, colours)
    overlay = np.where(
        (mask >= 0)[..., None],
        (0.55 * picture + 0.45 * label).astype(np.uint8),
        picture,
    )
    target = Path(config.output) / f"sample_{split}_{pair.name}.png"
    panels = [
        {"title": f"image (bands {', '.join(map(str, shown))})", "picture": picture},
        {"title": "label", "picture": label},
        {"title": "overlay", "picture": overlay},
    ]
    legend = [(names[number], colours[number]) for number in present if number < count]
    title = f"{split} {index}: {pair.name}"
    save_figure(draw_panels(panels, legend, title), target)
    return target


def open_window(picture: Path) -> None:
    """Show a PNG in a window and wait until it is closed.

    Raises:
        SegmentationError: There is no display.
    """
    import matplotlib.pyplot as plt
    from matplotlib.backends import BackendFilter, backend_registry

    interactive = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    if plt.get_backend().lower() not in [name.lower() for name in interactive]:
        raise SegmentationError(f"No display for --show; look at {picture} instead")
    pixels = plt.imread(picture)
    figure = plt.figure(figsize=(pixels.shape[1] / 100, pixels.shape[0] / 100))
    figure.figimage(pixels)
    plt.show()
