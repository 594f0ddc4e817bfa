"""The card of an exported model: a page for people, with the front matter that Hugging Face reads.

Tables come from the checkpoints. What only a person knows is marked as to be filled in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from common import SPLITS, VERSION
from common.text import listed
from exporting import facts
from exporting.footprint import bounding_box, outline_of
from model_training import Checkpoint

if TYPE_CHECKING:
    from exporting.subject import ExportSubject

NAMED_CLASSES = 20  # the most that the introduction names; the table names all
FILL_IN = "*(to be filled in)*"
# the scores that checkpoints hold, from the most to the least trustworthy, and what each is of
EXAMINATIONS = {
    "test": "test split, which neither training nor the choice of the epoch has seen",
    "held_out": "patches that the fold holds out, which neither its training nor its choice of the "
    "epoch has seen",
    "pooled": "cross-validation: each patch by the model of the fold that holds it out, not by this "
    "model",
    "validation": "validation patches, which chose the epoch and fitted the temperature: somewhat too "
    "good",
}
HEADS = ("IoU", "F1", "overall accuracy", "kappa")
SCORES = ("iou", "f1", "overall_accuracy", "kappa")
CLASS_SCORES = ("iou", "f1", "precision", "recall")


def card_text(subject: ExportSubject) -> str:
    """The card as Markdown."""
    sections = (
        _front_matter, _introduction, _use, _limits, _input, _output, _how_to, _scores, _training,
        _ground, _files,
    )  # fmt: skip
    return "\n\n".join(section(subject) for section in sections) + "\n"


def cell(value) -> str:
    """A value as the text of a cell of a table."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    # signs that Markdown would read, but for _ within a word
    text = re.sub(r"([\\|<*`\[]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return " ".join(text.split())


def table(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Rows as a table of Markdown; None is an empty cell."""
    lines = [list(heads), ["---"] * len(heads)]
    lines += [["" if value is None else cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quoted(value) -> str:
    """As JSON, which in one line is YAML and Python too."""
    return json.dumps(value, ensure_ascii=False)


def plural(count: int, name: str) -> str:
    return f"{count} {name}" + "s" * (count != 1)


def between(values: Sequence[float]) -> float | str:
    """One value, or the range of several."""
    low, high = min(values), max(values)
    return low if low == high else f"{low:.6g} to {high:.6g}"


def joined(values: Sequence) -> str | None:
    """What several models hold, each value once; None where none holds any."""
    known = [value for value in values if value is not None]
    texts = (f"{v:.9g}" if isinstance(v, float) else str(v) for v in known)
    return ", ".join(dict.fromkeys(texts)) or None


# --- sections -------------------------------------------------------------------------------


def _front_matter(subject: ExportSubject) -> str:
    entries = {
        "license": "other",
        "license_name": "to-be-filled-in",
        "license_link": "to-be-filled-in",
        "library_name": "onnx",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", "earth-observation", "remote-sensing"],
        "bands": facts.band_names(subject),
        "classes": subject.first.class_names,
        "sensor": " and ".join(facts.sensors(subject)) or None,
        "pixel_size_metres": float(f"{subject.resolution:.6g}"),
    }
    known = {key: value for key, value in entries.items() if value is not None}
    lines = [f"{key}: {quoted(value)}" for key, value in known.items()]
    return "\n".join(["---", *lines, "---"])


def _introduction(subject: ExportSubject) -> str:
    first = subject.first
    count = len(subject.checkpoints)
    members = f", the mean of {count} models" if count > 1 else ""
    few = len(first.class_names) <= NAMED_CLASSES
    names = f" ({cell(listed(first.class_names))})" if few else ""
    sensor = (
        " and ".join(facts.sensors(subject)) or "a sensor that the images do not name"
    )
    return (
        f"# {cell(subject.onnx.stem)}\n\n"
        f"A model for semantic segmentation ({facts.architectures(subject)}{members}): it gives each "
        f"pixel one of {len(first.class_names)} classes{names}, from "
        f"{first.config.in_channels} bands of {cell(sensor)} at {subject.resolution:.4g} m. "
        f"SemanticSeg4EO {VERSION} exported it and wrote this card; a STAC item with the same facts "
        f"for machines is in `{subject.onnx.stem}.json`.\n\n"
        f"- Made by: {FILL_IN}\n"
        f"- Licence: {FILL_IN}, here and in the first lines of this file. It depends on the licences "
        "of the images, of the labels and of the weights that the training began with."
    )


def _use(subject: ExportSubject) -> str:
    return (
        "## Intended use\n\n"
        "Maps of these classes from images of the same sensor, bands, processing and pixel size as "
        "those of the training, of land and seasons like theirs.\n\n"
        f"- What for: {FILL_IN}\n"
        f"- Where the labels come from, and how exact they are: {FILL_IN}\n"
        f"- What it must not be used for: {FILL_IN}"
    )


def _limits(subject: ExportSubject) -> str:
    members = (
        [
            "The scores below are those of the single models; that of their mean was not measured."
        ]
        if len(subject.checkpoints) > 1
        else []
    )
    lines = [
        "Every pixel gets one of the classes, also where the land is of none of them.",
        (
            "Elsewhere, in another season, after other processing (reflectance at the top or the bottom "
            "of the atmosphere, another scale or offset) or at another pixel size, the scores below "
            "say little: check a map against labels of the place before it is used."
        ),
        (
            "A probability is the model's own estimate. It can be near 1 where the map is wrong, above "
            "all on land that is unlike that of the training."
        ),
        (
            "Areas that are counted in a map carry the errors of the map; areas for a report need a "
            "sample of reference labels."
        ),
        *members,
    ]
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _input(subject: ExportSubject) -> str:
    names, size = facts.band_names(subject), subject.config.patch_size
    limits = [facts.limits(checkpoint) for checkpoint in subject.checkpoints]
    lows, highs = zip(*limits)
    metadata = [checkpoint.metadata for checkpoint in subject.checkpoints]
    nodata = zip(*(one.get("nodata") or [None] * len(names) for one in metadata))
    rows = [
        (number, name, between(low), between(high), joined(declared))
        for number, name, low, high, declared in zip(
            range(1, len(names) + 1), names, zip(*lows), zip(*highs), nodata
        )
    ]
    stored = joined([one.get("data_type") for one in metadata])
    kind = f" ({stored} in the training)" if stored else ""
    heads = ("band", "name", "becomes 0", "becomes 1", "nodata")
    return (
        "## Input\n\n"
        f"float32 (N, {len(names)}, {size}, {size}): the values of the files as they are, without "
        f"scale and offset{kind}. The model normalizes them itself, from the values below to 0 and 1 "
        "(the 1st and 99th percentile of the training pixels, unless the training took others), and "
        "finds pixels that are NaN, infinite or nodata.\n\n" + table(heads, rows)
    )


def _output(subject: ExportSubject) -> str:
    config, size = subject.first.config, subject.config.patch_size
    meaning = (
        f"the probability of class 1, which a pixel is where it is at least "
        f"{subject.config.threshold}"
        if config.mode == "binary"
        else "the probability of each class; a pixel is of the most probable one"
    )
    rows = [(e.value, e.name, e.code, e.colour) for e in facts.class_entries(subject)]
    return (
        f"## Output\n\nfloat32 (N, {config.num_classes}, {size}, {size}): {meaning}. Pixels without "
        "data get values too, which mean nothing.\n\n"
        + table(("class", "name", "value in the labels", "colour"), rows)
    )


def _how_to(subject: ExportSubject) -> str:
    size, config = subject.config.patch_size, subject.first.config
    classes = (
        f"(probabilities[0, 0] >= {subject.config.threshold}).astype(np.uint8)"
        if config.mode == "binary"
        else "probabilities[0].argmax(axis=0)"
    )
    return f"""## How to use it

Here on one window, with `onnxruntime` and `rasterio`. Pixels that a mask or an alpha band makes
invalid become NaN first. Overlapping windows, of which the middle is kept, leave no seams.

```python
import numpy as np
import onnxruntime
import rasterio
from rasterio.windows import Window

session = onnxruntime.InferenceSession({quoted(subject.onnx.name)})
with rasterio.open("scene.tif") as scene:
    bands = list(range(1, {config.in_channels + 1}))  # in the order of the table
    values = scene.read(bands, window=Window(0, 0, {size}, {size})).astype(np.float32)
(probabilities,) = session.run(None, {{session.get_inputs()[0].name: values[None]}})
classes = {classes}
```

In QGIS the plugin Deepness opens the file."""


def _scores(subject: ExportSubject) -> str:
    found = list(_examinations(subject))
    if not found:
        return "## Scores\n\nThe checkpoints hold no scores."
    several = len(subject.checkpoints) > 1
    rows = [
        [
            *([name] if several else []),
            kind.replace("_", " "),
            *(_rounded(result.get(k)) for k in SCORES),
        ]
        for name, kind, result in found
    ]
    heads = (*(["model"] if several else []), "measured on", *HEADS)
    kinds = dict.fromkeys(kind for _, kind, _ in found)
    notes = [f"- {kind.replace('_', ' ')}: {EXAMINATIONS[kind]}" for kind in kinds]
    if any(one.metadata.get("started_from") for one in subject.checkpoints):
        notes.append(
            "- The training began with another model; where that one has seen the places of these "
            "patches, the scores are too good."
        )
    listing = "\n".join(notes)
    binary = subject.first.config.mode == "binary"
    what = "those of class 1" if binary else "means over the classes that are present"
    return (
        f"## Scores\n\nIoU and F1 are {what}.\n\n{table(heads, rows)}\n\n{listing}\n\n"
        + _class_scores(subject, found)
    )


def _examinations(subject: ExportSubject) -> Iterator[tuple[str, str, dict]]:
    """Model, kind and scores of each examination that a checkpoint holds, best kinds first."""
    for name, checkpoint in zip(facts.member_names(subject), subject.checkpoints):
        metrics = checkpoint.metadata.get("performance_metrics") or {}
        for kind in EXAMINATIONS:
            if isinstance(metrics.get(kind), dict) and metrics[kind].get("per_class"):
                yield name, kind, metrics[kind]


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 3)


def _class_scores(subject: ExportSubject, found: Sequence) -> str:
    """A row per class, of the most trustworthy kind; of several models the range."""
    kind = next(kind for kind in EXAMINATIONS if kind in {k for _, k, _ in found})
    results = [result["per_class"] for _, k, result in found if k == kind]
    rows = []
    for number, name in enumerate(subject.first.class_names):
        entries = [result[number] for result in results]
        row = [name, between([entry.get("pixels", 0) for entry in entries])]
        for key in CLASS_SCORES:
            known = [entry[key] for entry in entries if entry.get(key) is not None]
            row.append(between([*map(_rounded, known)]) if known else None)
        rows.append(row)
    heads = ("class", "labelled pixels", "IoU", "F1", "precision", "recall")
    return f"By class ({kind.replace('_', ' ')}):\n\n{table(heads, rows)}"


def _training(subject: ExportSubject) -> str:
    models = subject.checkpoints
    origins = ("random" if o == "" else o for o in map(facts.origin, models))
    rows = [
        ("model", facts.architectures(subject)),
        ("first weights", joined(list(origins))),
        ("patch (pixels)", joined(list(map(_patch_size, models)))),
        ("temperature", between([c.temperature for c in models])),
        *_shared_options(subject).items(),
    ]
    known = [row for row in rows if row[1] is not None]
    texts = list(map(_split_text, models))
    text = texts[0]
    if len(set(texts)) > 1:
        names = facts.member_names(subject)
        text = "\n".join(f"- {cell(n)}: {t}" for n, t in zip(names, texts))
    return f"## Training\n\n{text}\n\n{table(('setting', 'value'), known)}"


def _shared_options(subject: ExportSubject) -> dict:
    """The settings of the training; of several models the range of numbers, or all values."""
    known = [facts.training_options(checkpoint) for checkpoint in subject.checkpoints]
    found = {}
    for name in dict.fromkeys(name for options in known for name in options):
        values = list(dict.fromkeys(options.get(name) for options in known))
        numbers = all(type(value) in (int, float) for value in values)
        found[name] = between(values) if numbers else ", ".join(map(str, values))
    return found


def _patch_size(checkpoint: Checkpoint) -> str | None:
    size = checkpoint.metadata.get("input_size")
    return f"{size[0]} x {size[1]}" if size else None


def _split_text(checkpoint: Checkpoint) -> str:
    options = facts.training_options(checkpoint)
    if options.get("val_strategy") != "kfold":
        return (
            "The best epoch was chosen by the validation split. How the patches were shared among "
            "the splits (at random, by blocks of ground, by scenes), the checkpoint does not say: "
            f"{FILL_IN}. Scores on patches that lie among those of the training are better than those on new "
            "ground."
        )
    blocks = "by square blocks of ground"
    kind = {
        "random": "at random: neighbours of a patch are in other folds, so the scores are better than "
        "those on new ground",
        "block": blocks,
        "both": blocks,  # whose scores count, and whose epochs the final model has
        "column": "by upright strips of the area",
        "scene": "by whole scenes",
    }.get(options.get("fold_by"), f"by {options.get('fold_by')}")
    if "fold_column" in options:
        kind = f"by equal values of {cell(options['fold_column'])}"
    return (
        f"{options.get('n_splits')} folds, drawn {kind}. Each chose its epoch by validation patches "
        "of its own."
    )


def _ground(subject: ExportSubject) -> str:
    days, places = facts.acquired(subject), facts.places(subject)
    taken = "The checkpoint does not say when the images were taken."
    if days:
        ends = dict.fromkeys(day.isoformat() for day in (days[0], days[-1]))
        taken = f"Images of {plural(len(days), 'day')}: {' to '.join(ends)}."
    rows = [row for split in SPLITS if (row := _split_row(places, split))]
    if not rows:
        where = "It does not say where the patches lie."
    else:
        heads = ("split", "patches", "west", "south", "east", "north")
        where = f"In degrees (WGS 84):\n\n{table(heads, rows)}"
    return f"## Place and time\n\n{taken} {where}"


def _split_row(places: Sequence[dict], split: str) -> tuple | None:
    """How many patches a split has, and where; None without any."""
    count = sum(len(place["bounds"]) for place in places if place["split"] == split)
    if not count:
        return None
    ground = outline_of(places, {split})
    return (split, count, *(bounding_box(ground) if ground is not None else [None] * 4))


def _files(subject: ExportSubject) -> str:
    rows = [
        (name, checkpoint.metadata.get("weights_sha256"))
        for name, checkpoint in zip(facts.member_names(subject), subject.checkpoints)
    ]
    return "## Made from\n\n" + table(("checkpoint", "SHA-256 of its weights"), rows)
