"""How near the reported scores are to those on ground that was used for nothing.

    python tests/benchmarks/reported.py --threads 1 --seeds 3

On the datasets and splits of ``quality.py``, in short trainings, the test split is kept apart. Two
scores are reported without it: that of the validation split in its best epoch, by which the model was
chosen, and that of a 5-fold cross-validation by block on all the other patches, over what the folds
hold out (``pooled``). Both are compared with the final models' scores on the test split. Results are
kept in ``--folder`` as those of ``quality.py``.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from levers import EPOCHS, result_of
from quality import (
    MODEL,
    Trial,
    begin,
    cell,
    make_trial,
    remembered,
    shared_parser,
    train_here,
)

DATASETS = "zion", "nc", "amazon"
KINDS = "validation", "folds"
FOLDS = "--val_strategy kfold --fold_by block --n_splits 5 --block_size {block}"


def by_validation(trial: Trial) -> dict:
    """The score on the validation split in the best epoch, beside that on the test split."""
    result = result_of(trial, trial.name, "defaults", Path())
    best = max(result["history"], key=lambda row: row["val_combined"])
    return result | {"reported": best["val_mean_iou"]}


def by_folds(trial: Trial) -> dict:
    """The score over what folds hold out, beside that of the final model on the test split."""
    clock, classes = time.perf_counter(), trial.source.classes
    mode = "binary" if trial.binary else f"multiclass --classes {classes}"
    block = re.search(r"--block_size (\d+)", trial.source.cut)[1]
    words = f"--mode {mode} {MODEL} --epochs {EPOCHS[trial.name]} --seed {trial.seed} "
    words += f"--patience 0 --amp off --no_baseline {FOLDS.format(block=block)}"
    with tempfile.TemporaryDirectory(dir=trial.folder) as place:
        where = "--dataset_root", trial.patches, "--save_dir", place
        train_here(contextlib.nullcontext(), "main.py", *words.split(), *where)
        report = json.loads((Path(place) / "model_metrics.json").read_text())
    return {
        "reported": report["pooled"]["mean_iou"],
        "mean_iou": report["test"]["mean_iou"],
        "seconds": time.perf_counter() - clock,
    }


def main() -> int:
    parser = shared_parser(__doc__)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    add("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args()
    begin(arguments)
    where = arguments.data, arguments.folder, arguments.threads
    print("| | reported | test | reported less test |\n|---|---|---|---|")
    for name in arguments.datasets:
        trials = [make_trial(name, seed, *where) for seed in range(arguments.seeds)]
        for kind in arguments.kinds:
            if kind == "validation":
                results = list(map(by_validation, trials))
            else:
                key = {"folds": FOLDS, "epochs": EPOCHS[name]}
                results = [remembered(t, "folds", key, by_folds) for t in trials]
            reported, tested = (
                [result[score] for result in results]
                for score in ("reported", "mean_iou")
            )
            gaps = [one - other for one, other in zip(reported, tested)]
            cells = cell(reported), cell(tested), cell(gaps, "+.3f")
            print(f"| {name}, {kind} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
