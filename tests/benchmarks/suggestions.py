"""Whether the cells of ``--suggest`` teach a model more than cells drawn at random.

    python tests/benchmarks/suggestions.py --seeds 3

A scene is cut into cells, which each seed draws into a test split, a small validation split and the
ground that is not labelled yet. A model learns from 8 of its cells. In each of three rounds 5 more
get their labels: those that ``Predict_large_image.py --suggest`` names on a map of the scene by the
model of the round before (entropy), or 5 at random. Both methods begin with the same 8 cells, both
are trained anew in each round with the same seed, and all models of a seed are examined on the same
test cells. Cells of zion have 64 pixels, of nc 32; blocks of the splits are 2 x 2 cells.

With ``--members 3`` that model and two of other seeds map the scene, and their disagreement counts.

Networks are small and trained shortly: what is compared is where labels lie. Pictures are not drawn.
Each result is kept in ``--folder``: an interrupted run is continued. After a change of the toolkit's
code give another folder. Runs side by side can share one when their datasets differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import geopandas
import numpy as np
import torch

for folder in (Path(__file__).parent, *Path(__file__).parents[1:3]):
    sys.path.insert(0, str(folder.resolve()))
from helpers import pictures
from quality import ROOT, cell, digest, run_script

import main as training
import Predict_large_image as prediction
from common import SPLITS
from common.files import write_json
from common.patches import list_pairs

FIRST, MORE, ROUNDS = 8, 5, 3
SPARE = 2  # times as many cells are suggested: some have no labels


class Scene(NamedTuple):
    """A scene with labels, and its cells."""

    folder: str
    classes: int
    side: int  # of a cell in pixels
    block: int  # metres


SCENES = {
    "zion": Scene("zion-landsat8", 8, 64, 3840),
    "nc": Scene("nc-landsat7", 7, 32, 1824),
}
SPLIT = "--split_by block --train_ratio 0.65 --val_ratio 0.05 --test_ratio 0.3"


class Trial(NamedTuple):
    """A scene cut with a seed."""

    name: str
    seed: int
    folder: Path  # for results
    image: Path
    cells: Path  # the dataset of all cells
    options: str  # of the training
    members: int  # models that make the suggestions

    @property
    def scene(self) -> Scene:
        return SCENES[self.name]


def make_trial(
    name: str, seed: int, data: Path, folder: Path, options: str, members: int
) -> Trial:
    """Cut a scene with a seed, unless that was done before."""
    scene, place = SCENES[name], data / SCENES[name].folder
    values = ",".join(map(str, range(1, scene.classes + 1)))
    words = f"--patch_size {scene.side} --label_values {values} --block_size {scene.block} {SPLIT}"
    target = folder / "cells" / f"{name}-{seed}-{digest(words)}"
    image = place / "image.tif"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        files = "--image", image, "--label", place / "label.tif"
        with tempfile.TemporaryDirectory(dir=folder) as part:
            output = Path(part) / "dataset"
            run_script(
                "Patch_extraction.py", "extract", *files, *words.split(),
                "--seed", seed, "--output", output,
            )  # fmt: skip
            output.rename(target)
    return Trial(name, seed, folder, image, target, options, members)


def link_dataset(trial: Trial, chosen: list[str], target: Path) -> None:
    """A dataset whose training split has the chosen cells alone."""
    for split in SPLITS:
        folders = [target / "Patch" / split / kind for kind in ("images", "labels")]
        for folder in folders:
            folder.mkdir(parents=True)
        for pair in list_pairs(trial.cells, split):
            if split != "train" or pair.name in chosen:
                for folder, file in zip(folders, (pair.image, pair.label)):
                    (folder / file.name).symlink_to(file.resolve())


def call(script, *words) -> None:
    """Run a script in this process, as its libraries take long to load."""
    with redirect_stdout(sys.stderr):  # the tables alone are for stdout
        failed = script.main(list(map(str, words)))
    if failed:
        sys.exit(f"{script.__name__} {' '.join(map(str, words))} has failed")


def one_round(trial: Trial, chosen: list[str], suggest: bool) -> dict:
    """Train on the chosen cells: the scores on the test cells and, on demand, the cells suggested."""
    file, members = f"{trial.name}-{trial.seed}", trial.members
    suggested = "suggested" if members == 1 else f"suggested by {members}"
    key = digest([sorted(chosen), trial.options, SPLIT, trial.scene])
    result = trial.folder / "results" / f"{file}-{len(chosen)}-{key}.json"
    known = json.loads(result.read_text()) if result.exists() else {}
    if not known or (suggest and suggested not in known):
        with tempfile.TemporaryDirectory(dir=trial.folder) as place:
            place = Path(place)
            link_dataset(trial, chosen, place / "data")
            test = train(trial, place, 0)
            known |= {"cells": chosen, "mean_iou": test["mean_iou"]}
            known |= {"accuracy": test["overall_accuracy"], "options": trial.options}
            if suggest:
                for member in range(1, members):
                    train(trial, place, member)
                known[suggested] = suggest_cells(trial, place)
        result.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, known)
        print(f"{result.name}: mean IoU {known['mean_iou']:.3f}", file=sys.stderr)
    return known | {"left": known.get(suggested)}


def train(trial: Trial, place: Path, member: int) -> dict:
    """Train a member on the cells in ``place``: its scores on the test cells."""
    seed, run = trial.seed + 100 * member, place / f"run_{member}"
    words = (
        f"--mode multiclass --classes {trial.scene.classes} --seed {seed} --device cpu"
    )
    where = "--dataset_root", place / "data", "--save_dir", run
    call(training, *words.split(), *trial.options.split(), *where)
    return json.loads((run / "model_metrics.json").read_text())["test"]


def suggest_cells(trial: Trial, place: Path) -> list[str]:
    """The patches of the cells that the trained members suggest, the best first."""
    models = sorted(place.glob("run_*/model_final_model.pth"))
    files = "--model", *models, "--input", trial.image, "--output", place / "map.tif"
    words = "--suggest", SPARE * MORE, "--patch_size", 256, "--device", "cpu"
    call(prediction, *files, *words)
    table = geopandas.read_file(place / "map_suggestions.gpkg", layer="map_suggestions")
    return [f"patch_{name}" for name in table["name"]]


def run_trial(trial: Trial) -> dict[str, list[dict]]:
    """The results of each round by method, of which the first is the same."""
    pool = sorted(pair.name for pair in list_pairs(trial.cells, "train"))
    rng = np.random.default_rng(trial.seed)
    order = rng.permutation(pool).tolist()
    found = {}
    for method in ("suggested", "random"):
        chosen, results = order[:FIRST], []
        for number in range(ROUNDS + 1):
            last = number == ROUNDS
            suggest = method == "suggested" and not last
            results.append(one_round(trial, chosen, suggest))
            left = results[-1]["left"] if suggest else order
            left = [name for name in left if name in pool and name not in chosen]
            chosen = chosen + left[:MORE]
        found[method] = results
    return found


def print_table(trials: list[dict]) -> None:
    """Mean IoU by the number of labelled cells, and the differences, paired by seed."""
    print("| cells | at random | suggested | difference |\n|---|---|---|---|")
    for number in range(ROUNDS + 1):
        one, other = (
            [trial[method][number]["mean_iou"] for trial in trials]
            for method in ("random", "suggested")
        )
        gained = [b - a for a, b in zip(one, other)]
        count = len(trials[0]["random"][number]["cells"])
        cells = cell(one), cell(other), cell(gained, "+.3f")
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    shared = ROOT.parent / "shared" / "data"
    add("--data", type=Path, default=shared, help="folder of the datasets")
    add("--folder", type=Path, default=Path("benchmark_data/suggestions"))
    add("--datasets", nargs="+", choices=SCENES, default=list(SCENES))
    add("--seeds", type=int, default=3, help="how many, from 0")
    model = "--model unet --encoder_name tu-test_resnet --epochs 30 --batch_size 4"
    add("--options", default=model, help="of main.py")
    add("--members", type=int, default=1, help="models that make the suggestions")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.datasets:
        given = arguments.data, arguments.folder, arguments.options, arguments.members
        trials = [make_trial(name, seed, *given) for seed in range(arguments.seeds)]
        print(f"\n## {name}\n")
        with pictures(drawn=False):
            print_table([run_trial(trial) for trial in trials])
    return 0


if __name__ == "__main__":
    sys.exit(main())
