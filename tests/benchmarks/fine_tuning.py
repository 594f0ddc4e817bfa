"""What ``--start_from`` earns: a model of another scene, sensor and legend, with few patches.

    python tests/benchmarks/fine_tuning.py --seeds 3

A model of zion (Landsat 8, four bands, eight classes) is trained once. On nc (Landsat 7, six bands, of
which four are zion's, seven other classes) the same network is trained from nothing and from that
model, on 10, 20 and all training patches of the splits of ``quality.py``, for the same epochs. The
tables show mean IoU on the test blocks; differences are paired by seed, which draws splits, patches
and all that is random in training. Results are kept in ``--folder`` as those of ``quality.py``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from quality import (
    MODEL,
    Trial,
    begin,
    cell,
    make_trial,
    measure,
    remembered,
    run_script,
    shared_parser,
)

from common import SPLITS
from common.patches import list_pairs

SIZES = (10, 20, None)  # training patches; None: all
EPOCHS = {"zion": 40, "nc": 60}
NAMES = "developed,agriculture,herbaceous,shrubland,forest,water,sediment"
METHODS = ("from nothing", "from zion")


def first_model(trial: Trial) -> Path:
    """The model of zion, trained unless it is there."""
    place = trial.folder / f"zion-{EPOCHS['zion']}-epochs"
    model = place / "model_final_model.pth"
    if not model.is_file():
        words = f"{MODEL} --mode multiclass --classes 8 --epochs {EPOCHS['zion']} --overwrite"
        where = ("--dataset_root", trial.patches, "--save_dir", place)
        run_script("main.py", *words.split(), *where)
    return model


def link_patches(trial: Trial, size: int | None, target: Path) -> None:
    """The splits with so many training patches, drawn by the seed; those of a size hold the smaller."""
    for split in SPLITS:
        pairs = list_pairs(trial.patches, split)
        if split == "train" and size:
            order = np.random.default_rng(trial.seed).permutation(len(pairs))
            pairs = [pairs[number] for number in order[:size]]
        for kind in ("image", "label"):
            folder = target / "Patch" / split / f"{kind}s"
            folder.mkdir(parents=True)
            for pair in pairs:
                file = getattr(pair, kind)
                (folder / file.name).symlink_to(file.resolve())


def train(trial: Trial, size: int | None, method: str, first: Path) -> dict:
    clock = time.perf_counter()
    words = f"{MODEL} --mode multiclass --classes 7 --class_names {NAMES} --seed {trial.seed}"
    words += f" --epochs {EPOCHS['nc']} --no_baseline"
    if method != METHODS[0]:
        words += f" --start_from {first}"
    with tempfile.TemporaryDirectory(dir=trial.folder) as place:
        link_patches(trial, size, Path(place) / "data")
        where = ("--dataset_root", f"{place}/data", "--save_dir", f"{place}/run")
        run_script("main.py", *words.split(), *where)
        report = json.loads((Path(place) / "run" / "model_metrics.json").read_text())
    matrix = np.array(report["test"]["confusion_matrix"])
    more = {"patches": size, "best_epoch": report["best_epoch"]}
    return measure(trial, matrix, time.perf_counter() - clock, **more)


def main() -> int:
    parser = shared_parser(__doc__)
    arguments = parser.parse_args()
    begin(arguments)
    where = arguments.data, arguments.folder, arguments.threads
    first = first_model(make_trial("zion", 0, *where)).resolve()
    results: dict = {(size, method): [] for size in SIZES for method in METHODS}
    for seed in range(arguments.seeds):
        trial = make_trial("nc", seed, *where)
        for (size, method), found in results.items():
            key = {"epochs": EPOCHS, "patches": size, "is": method}
            words = train, size, method, first
            result = remembered(trial, "fine tuning", key, *words)
            found.append(result["mean_iou"])
    print(
        f"| training patches | {METHODS[0]} | {METHODS[1]} | difference |\n|---|---|---|---|"
    )
    for size in SIZES:
        one, other = (results[size, method] for method in METHODS)
        gains = [b - a for a, b in zip(one, other)]
        print(
            f"| {size or 'all'} | {cell(one)} | {cell(other)} | {cell(gains, '+.3f')} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
