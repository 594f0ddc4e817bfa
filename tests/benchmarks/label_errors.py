"""How well the list of doubtful patches finds labels that are wrong.

    python tests/benchmarks/label_errors.py --seeds 3

The patches of nc and zion (see ``quality.py``) get errors: in a tenth of the patches, drawn at random,
connected areas of the label, drawn until they are 30 % of it, become another class of the dataset. A
5-fold cross-validation trains on these labels, and its list, the most doubtful patches
first, is compared with the patches that have errors: the share of the head of the list that has
errors (precision), and of those with errors that the head holds (recall), for both measures of doubt.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import rasterio
from quality import (
    MODEL,
    SOURCES,
    Trial,
    begin,
    cell,
    make_trial,
    remembered,
    shared_parser,
)

import main as training
from common import UNLABELLED
from common.patches import list_pairs
from common.sieve import label_strip
from evaluation.audit import PatchRow
from training import audit

HEADS = (0.05, 0.10, 0.20)
WRONG_PATCHES, WRONG_SHARE = 0.1, 0.3
MEASURES = ("mean loss", "contradicted share")


def plant(
    pairs, classes: int, rng: np.random.Generator, share: float = WRONG_PATCHES
) -> list[str]:
    """Write wrong labels into a share of the patches; their names."""
    chosen = rng.choice(len(pairs), max(1, round(share * len(pairs))), False)
    for number in chosen:
        with rasterio.open(pairs[number].label, "r+") as file:
            label = file.read(1)
            ids, areas = label_strip(label.astype(np.int32), 0, np.zeros(len(label)))
            known = np.flatnonzero(areas.classes < classes)
            wanted = WRONG_SHARE * areas.pixels[known].sum()
            for area in rng.permutation(known):
                others = np.delete(np.arange(classes), areas.classes[area])
                label[ids == area] = rng.choice(others)
                wanted -= areas.pixels[area]
                if wanted <= 0:
                    break
            file.write(label, 1)
    return sorted(pairs[number].name for number in chosen)


def find_errors(trial: Trial, epochs: int) -> dict:
    """Plant, train, and look where the errors are in the list."""
    clock, rows = time.perf_counter(), []

    def spy(run, found: list[PatchRow], unseen) -> None:
        rows.extend(row for row in found if row.fold is not None)

    original, audit.write_audit = audit.write_audit, spy
    try:
        with tempfile.TemporaryDirectory(dir=trial.folder) as place:
            data = Path(place) / "data"
            shutil.copytree(trial.patches, data)
            shutil.rmtree(next(data.rglob("test")))
            pairs = list_pairs(data, "train") + list_pairs(data, "validation")
            wrong = plant(
                pairs, trial.source.classes, np.random.default_rng(trial.seed)
            )
            words = f"--mode multiclass --classes {trial.source.classes} {MODEL}"
            words += f" --val_strategy kfold --seed {trial.seed}"
            words += f" --epochs {epochs} --dataset_root {data} --save_dir {place}/run"
            if training.main(words.split()):
                sys.exit("the training failed")
            report = json.loads(
                (Path(place) / "run" / "model_metrics.json").read_text()
            )
    finally:
        audit.write_audit = original
    is_wrong = np.array([row.pair.name in wrong for row in rows])
    values = {
        "mean loss": [row.unseen.loss for row in rows],
        "contradicted share": [row.unseen.contradicted for row in rows],
    }
    found = {}
    for measure in MEASURES:
        order = np.argsort(-np.array(values[measure], float), kind="stable")
        for head in HEADS:
            first = is_wrong[order[: max(1, round(head * len(rows)))]]
            share = first.sum() / is_wrong.sum()
            found[f"{measure} {head:.0%}"] = [float(first.mean()), float(share)]
    return {
        "patches": len(rows),
        "wrong": int(is_wrong.sum()),
        "found": found,
        "mean_iou": report["pooled"]["mean_iou"],
        "seconds": time.perf_counter() - clock,
    }


def main() -> int:
    parser = shared_parser(__doc__)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=SOURCES, default=["nc", "zion"])
    add("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    begin(arguments)
    results: dict[str, list[dict]] = {name: [] for name in arguments.datasets}
    for seed in range(arguments.seeds):
        for name in arguments.datasets:
            where = arguments.data, arguments.folder, arguments.threads
            trial = make_trial(name, seed, *where)
            key = {"epochs": arguments.epochs, "unlabelled": UNLABELLED}
            words = find_errors, arguments.epochs
            results[name].append(remembered(trial, "label errors", key, *words))
            print(json.dumps(results[name][-1]["found"]), file=sys.stderr)
    print("| dataset | measure | first | precision | recall |\n|---|---|---|---|---|")
    for name, found in results.items():
        for measure in MEASURES:
            for head in HEADS:
                pairs = [result["found"][f"{measure} {head:.0%}"] for result in found]
                parts = " | ".join(cell(list(values), ".2f") for values in zip(*pairs))
                print(f"| {name} | {measure} | {head:.0%} | {parts} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
