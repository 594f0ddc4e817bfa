"""Which epoch's weights to keep: each rule examined on the test blocks of the same runs.

    python tests/benchmarks/final_epoch.py --threads 1 --seeds 3 --grounds zion nc amazon
    python tests/benchmarks/final_epoch.py --threads 1 --seeds 8 --grounds "zion, thinned" "nc, thinned" made

Each run trains to its last epoch (``--patience 0``) on a ground of ``levers.py`` and is examined on
the test split after every epoch. Rules: the best epoch by the validation split of
all; of those that ``--patience 20`` would have run; of the last third of the schedule; the last
epoch; and the mean of the weights of the last third's epochs. The tables show mean IoU less that of
the first rule, paired by run. The last row is what nobody can choose, the best epoch on the test.

Results are kept in ``--folder`` as ``quality.py`` keeps its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from levers import EPOCHS, GROUNDS, make_ground
from pretraining import with_interval
from quality import (
    MODEL,
    Trial,
    begin,
    cell,
    remembered,
    shared_parser,
)

import main as training
import training.epochs as epochs_module
from common.distributed import ProcessGroup
from model_training import combined_score, scores
from training.dataset import index_split
from training.loop import evaluate
from training.run import TrainingRun

PATIENCE = 20
RULES = ("best of all", "with patience", "best of the last third", "last", "mean of the last third")  # fmt: skip


class Examiner:
    """Examines a run on the test split after each epoch, in place of ``training.epochs.validate``."""

    def __init__(self):
        self.validate = epochs_module.validate
        self.tested, self.chosen_by = [], []
        self.sums, self.summed = {}, 0
        self.run = self.test = None

    def __call__(self, run: TrainingRun, validation, row: dict) -> list[str]:
        better = self.validate(run, validation, row)
        if self.test is None:
            self.run, self.test = run, index_split(run.config, "test", run.train)
        self.tested.append(self.examine())
        self.chosen_by.append(row["val_combined"])
        if row["epoch"] > run.epochs - run.epochs // 3:
            self.summed += 1
            for name, value in run.model.state_dict().items():
                if value.is_floating_point():
                    self.sums[name] = self.sums.get(name, 0) + value.double()
        return better

    def examine(self, validation=False) -> float:
        run = self.run
        index = run.validation if validation else self.test
        _, matrix = evaluate(
            run.model,
            run.loader(index, group=ProcessGroup()),
            run.loss,
            run.device,
            run.model_config.label_classes,
        )
        result = scores(matrix, run.names, run.config.mode == "binary")
        return combined_score(result) if validation else result["mean_iou"]

    def mean_weights(self) -> float:
        """Mean IoU of the mean of the last third's weights, running statistics included."""
        state = self.run.model.state_dict()
        means = {k: (v / self.summed).to(state[k]) for k, v in self.sums.items()}
        self.run.model.load_state_dict(state | means)
        return self.examine()


def train(trial: Trial, epochs: int) -> dict:
    mode = f"--mode multiclass --classes {trial.source.classes}"
    words = [
        *("--mode binary" if trial.binary else mode).split(),
        *f"{MODEL} --epochs {epochs} --seed {trial.seed} --patience 0 --no_baseline".split(),
        *("--dataset_root", str(trial.patches)),
    ]
    clock, examiner = time.perf_counter(), Examiner()
    with (
        tempfile.TemporaryDirectory(dir=trial.folder) as place,
        patch("training.epochs.validate", examiner),
    ):
        if training.main([*words, "--save_dir", place]):
            sys.exit(f"{trial.name} {trial.seed} failed")
    tested, chosen = np.array(examiner.tested), np.array(examiner.chosen_by)
    third = len(tested) // 3
    found = dict(
        zip(
            RULES,
            (
                tested[chosen.argmax()],
                tested[with_patience(chosen)],
                tested[len(tested) - third + chosen[-third:].argmax()],
                tested[-1],
                examiner.mean_weights(),
            ),
        )
    )
    return {
        "rules": {rule: float(value) for rule, value in found.items()},
        "best on the test": float(tested.max()),
        "best_epoch": int(chosen.argmax()) + 1,
        "mean_iou": float(found[RULES[0]]),
        "tested": tested.tolist(),
        "chosen_by": chosen.tolist(),
        "seconds": time.perf_counter() - clock,
    }


def with_patience(chosen: np.ndarray) -> int:
    """The best epoch (from 0) of those that are run until none is better for ``PATIENCE``."""
    best = 0
    for epoch, value in enumerate(chosen):
        if epoch - best >= PATIENCE:
            break
        best = epoch if value > chosen[best] else best
    return best


def print_table(results: dict[str, list[dict]]) -> None:
    names = list(results)
    print(f"| rule | {' | '.join(names)} | all |\n|---|{'---|' * (len(names) + 1)}")
    rows = {
        rule: [[r["rules"][rule] for r in results[n]] for n in names] for rule in RULES
    }
    rows["best on the test"] = [
        [r["best on the test"] for r in results[n]] for n in names
    ]
    first = rows[RULES[0]]
    print(f"| {RULES[0]}: mean IoU | {' | '.join(cell(v) for v in first)} | |")
    for rule, columns in list(rows.items())[1:]:
        gains = [np.subtract(values, best) for values, best in zip(columns, first)]
        cells = [with_interval(g.tolist()) for g in [*gains, np.hstack(gains)]]
        print(f"| {rule} | {' | '.join(cells)} |")


def main() -> int:
    parser = shared_parser(__doc__, threads=None)
    add = parser.add_argument
    add("--grounds", nargs="+", choices=GROUNDS, default=GROUNDS[:3])
    arguments = parser.parse_args()
    begin(arguments)
    results: dict[str, list[dict]] = {name: [] for name in arguments.grounds}
    for seed in range(arguments.seeds):
        for ground in arguments.grounds:
            where = arguments.data, arguments.folder, arguments.threads
            trial = make_ground(ground, seed, *where)
            epochs = EPOCHS[trial.name]
            key = {"epochs": epochs, "ground": ground}
            found = remembered(trial, "final epoch", key, train, epochs)
            results[ground].append(found)
            print(json.dumps({ground: found["rules"]}), file=sys.stderr)
    print_table(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
