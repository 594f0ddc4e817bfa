"""How good the maps are that the toolkit's defaults give, beside simpler ways to make them.

    python tests/benchmarks/quality.py --seeds 3
    python tests/benchmarks/quality.py --ablate --datasets nc --seeds 5

Each dataset is cut with each seed into splits by block, three methods learn from the same training
patches and are examined on the same test patches:

- toolkit: ``main.py`` with its defaults (a U-Net with resnet18) and what ``--options`` adds;
- plain loop: the same network as people train it by hand, for as long as the toolkit took: bands
  less their mean and over their deviation, cross-entropy, Adam, random flips, and the epoch that
  is best on the validation split. Its patches lie in memory, and its libraries are loaded before
  the clock starts, while the toolkit's time is that of the whole process;
- random forest: that which a training of an hour puts beside its network (``evaluation/forest.py``).

Blocks are squares of 2 x 2 cells in the scenes: 7.7 km in zion (cells of 128 pixels), 3.6 km in nc
(64 pixels). The chips of amazon are 5 km wide and 30 km or more apart: each is cut into four patches
of 256 pixels, blocks are 100 km, and the buffer drops patches of a chip that lies on the border of
two splits, so that all patches of a chip are in one. Training and test share no ground anywhere.

``--ablate`` changes one default at a time instead. Differences are paired by seed, which draws the
splits and all that is random in training. Where blocks are few, several seeds find the same best
splits, and less than the whole chance is in the deviation: the tables show which patches are tested
again.

Each result is kept in ``--folder``, by dataset, seed, settings and threads, and not computed again:
an interrupted run is continued. After a change of the toolkit's code give another folder. Runs
side by side can share one when their datasets differ. ``--threads`` is for the arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import main as training
from common import SPLITS, UNLABELLED
from common.architectures import default_class_names
from common.console import settings_from
from common.devices import pick_device
from common.files import write_json
from common.patches import list_pairs, read_patch
from evaluation.forest import count_patches, draw_pixels, fit_forest
from evaluation.matrices import fold_statistics
from model_training import confusion_matrix, scores
from training.baseline import SIZES
from training.settings import TrainingConfig


class Source(NamedTuple):
    """A dataset: where it lies, how it is cut and how long it is trained."""

    folder: str
    cut: str  # command of Patch_extraction.py
    classes: int  # 2 is trained as binary
    epochs: int


SCENE = "extract --image {0}/image.tif --label {0}/label.tif"
SOURCES = {
    "zion": Source(
        "zion-landsat8",
        f"{SCENE} --grid {{0}}/grid_wgs84.gpkg --patch_size 128 "
        "--label_values 1,2,3,4,5,6,7,8 --block_size 7680",
        8,
        100,
    ),
    "nc": Source(
        "nc-landsat7",
        f"{SCENE} --grid {{0}}/grid.shp --patch_size 64 "
        "--label_values 1,2,3,4,5,6,7 --block_size 3648",
        7,
        100,
    ),
    "amazon": Source(
        "amazon-forest-s2rgb",
        "batch --data_dir {0} --patch_size 256 --block_size 100000 --buffer 1000",
        2,
        12,
    ),
}
SHARES = "--split_by block --train_ratio 0.6 --val_ratio 0.2 --test_ratio 0.2"
MODEL = "--model unet --encoder_name resnet18"
VARIANTS = {  # each changes one default
    "defaults": "",
    "normalization image": "--normalization image",
    "loss ce": "--loss ce",
    "loss dice": "--loss dice",
    "loss dice+focal": "--loss dice+focal",
    "loss tversky+ce": "--loss tversky+ce",
    "class weights": "--use_class_weights",
    "augmentation none": "--data_augmentation none",
    "augmentation full": "--data_augmentation full",
    "patience 0": "--patience 0",
    "scheduler none": "--scheduler none",
    "scheduler plateau": "--scheduler plateau",
    "scheduler onecycle": "--scheduler onecycle",
    "learning rate 3e-4": "--learning_rate 3e-4",
    "weight decay 1e-2": "--weight_decay 1e-2",
    "batch size 8": "--batch_size 8",
    "encoder resnet34": "--encoder_name resnet34",
}
FOREST = SIZES[0]


@dataclass(frozen=True)
class Trial:
    """A dataset cut with a seed: what every method needs to know."""

    name: str
    seed: int
    patches: Path
    folder: Path  # for results
    threads: int

    @property
    def source(self) -> Source:
        return SOURCES[self.name]

    @property
    def binary(self) -> bool:
        return self.source.classes == 2


# --- data -----------------------------------------------------------------------------------


class Pixels(NamedTuple):
    """The patches of a split in memory."""

    images: np.ndarray  # (N, C, H, W)
    valid: np.ndarray  # (N, H, W) bool
    masks: np.ndarray  # (N, H, W) int64


def read_split(patches: Path, split: str) -> Pixels:
    pairs = list_pairs(patches, split)
    return Pixels(*map(np.stack, zip(*map(read_patch, pairs))))


def count_classes(masks: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(masks[masks < classes], minlength=classes)


def run_script(script: str, *words) -> None:
    """Run a script of the toolkit as a user does; its own words when it fails."""
    command = [sys.executable, ROOT / script, *words]
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))}\n{done.stderr}")


def train_here(context, script: str, *words) -> None:
    """Run ``main.py`` in this process, in a context; what it says is shown where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), context:
        status = training.main(list(map(str, words)))
    if status:
        sys.exit(f"{script} {shlex.join(map(str, words))}\n{said.getvalue()}")


def link_chips(chips: Path, target: Path) -> Path:
    """A folder in which chips and labels have the names that ``batch`` pairs them by."""
    target.mkdir()
    for kind, prefix in (("images", "Image"), ("labels", "Label")):
        for chip in (chips / kind).iterdir():
            (target / f"{prefix}_{chip.name}").symlink_to(chip.resolve())
    return target


def make_trial(name: str, seed: int, data: Path, folder: Path, threads: int) -> Trial:
    """Cut a dataset with a seed, unless that was done before."""
    source, place = SOURCES[name], data / SOURCES[name].folder
    command = f"{source.cut} {SHARES} --seed {seed}"
    target = folder / "patches" / f"{name}-{seed}-{digest(command)}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            if (place / "chips").is_dir():
                place = link_chips(place / "chips", Path(part) / "chips")
            words = [word.format(place) for word in command.split()]
            output = Path(part) / "dataset"
            run_script("Patch_extraction.py", *words, "--output", output)
            output.rename(target)
    return Trial(name, seed, target, folder, threads)


def print_splits(trials: list[Trial]) -> None:
    """Patches and class shares of each seed's splits, as a Markdown table."""
    classes = trials[0].source.classes
    heads = " | ".join(f"class {number}" for number in range(classes))
    print(f"\n| seed | split | patches | {heads} |\n|---|---|{'---|' * (1 + classes)}")
    tested, again = set(), []
    for trial in trials:
        for split in SPLITS:
            masks = read_split(trial.patches, split).masks
            counts = count_classes(masks, classes)
            shares = [f"{n / counts.sum():.2%}" if n else "-" for n in counts]
            cells = [trial.seed, split, len(masks), *shares]
            print(f"| {' | '.join(map(str, cells))} |")
        names = {pair.name for pair in list_pairs(trial.patches, "test")}
        again.append(f"{len(names & tested)} of {len(names)}")
        tested |= names
    print(f"\nTest patches that an earlier seed tests too: {', '.join(again)}\n")


# --- results --------------------------------------------------------------------------------


def digest(key) -> str:
    """A short name for what a result depends on."""
    return hashlib.sha1(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]


def remembered(trial: Trial, method: str, key: dict, compute: Callable, *words) -> dict:
    """``compute(trial, *words)``, once: its result is a file named after all that it depends on."""
    cut = f"{trial.source.cut} {SHARES}"
    key = {"method": method, "threads": trial.threads, "cut": cut} | key
    name = f"{trial.name}-{trial.seed}-{method.replace(' ', '_')}-{digest(key)}.json"
    file = trial.folder / "results" / name
    if file.exists():
        return json.loads(file.read_text())
    result = {"dataset": trial.name, "seed": trial.seed, "key": key}
    result |= compute(trial, *words)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    score, seconds = f"mean IoU {result['mean_iou']:.3f}", f"{result['seconds']:.0f} s"
    print(f"{name}: {score} in {seconds}", file=sys.stderr)
    return result


def measure(trial: Trial, matrix: np.ndarray, seconds: float, **more) -> dict:
    """Scores of a confusion matrix of the test split, once its pixels are found to be all there."""
    masks = read_split(trial.patches, "test").masks
    truth, counted = count_classes(masks, trial.source.classes), matrix.sum(axis=1)
    if not np.array_equal(truth, counted):
        sys.exit(
            f"{trial.patches}: {truth} test pixels by class, but {counted} counted"
        )
    names = default_class_names(1 if trial.binary else trial.source.classes)
    result = scores(matrix, names, trial.binary)
    return {
        "seconds": seconds,
        "shares": (truth / truth.sum()).tolist(),
        **more,
    } | result


def count(prediction, masks, classes: int) -> np.ndarray:
    pair = torch.as_tensor(prediction), torch.as_tensor(masks)
    return confusion_matrix(*pair, classes).numpy()


# --- methods --------------------------------------------------------------------------------


def toolkit(
    trial: Trial,
    options: str,
    epochs: int | None,
    start: Callable = run_script,
    **conditions,
) -> dict:
    """``main.py`` with options; ``epochs`` instead of the dataset's.

    ``conditions`` are what else the result depends on, where ``start`` changes more than options.
    """
    mode = f"--mode multiclass --classes {trial.source.classes}"
    words = [
        *("--mode binary" if trial.binary else mode).split(),
        *f"{MODEL} --epochs {epochs or trial.source.epochs} --seed {trial.seed}".split(),
        *shlex.split(options),
    ]
    parsed = training.build_parser().parse_args([*words, "--dataset_root", ""])
    config = settings_from(TrainingConfig, parsed)
    key = {"settings": asdict(replace(config, save_dir="")), **conditions}
    return remembered(trial, "toolkit", key, run_toolkit, words, start)


def run_toolkit(trial: Trial, words: list[str], start: Callable) -> dict:
    """Train as ``start`` does it, and read the report; the time is that of all but the reading."""
    with tempfile.TemporaryDirectory(dir=trial.folder) as place:
        clock = time.perf_counter()
        where = ("--dataset_root", trial.patches, "--save_dir", place)
        start("main.py", *words, *where)
        seconds = time.perf_counter() - clock
        report = json.loads((Path(place) / "model_metrics.json").read_text())
    test = report["test"]
    kept = {key: report[key] for key in ("best_epoch", "history")}
    result = measure(trial, np.array(test["confusion_matrix"]), seconds, **kept)
    for key in ("mean_iou", "overall_accuracy", "kappa"):
        if result[key] != test[key]:
            sys.exit(f"main.py reports {key} {test[key]}, but it is {result[key]}")
    return result


def random_forest(trial: Trial) -> dict:
    """The forest that a training puts beside its network, at its largest."""
    clock, classes = time.perf_counter(), trial.source.classes
    train, test = (read_split(trial.patches, split) for split in ("train", "test"))
    counts = np.stack([count_classes(mask, classes) for mask in train.masks])
    pixels = draw_pixels(
        list(zip(*train)).__getitem__, counts, FOREST.pixels, trial.seed
    )
    forest = fit_forest(pixels, FOREST.trees, trial.seed, trial.threads)
    read, patches = list(zip(*test)).__getitem__, len(test.masks)
    matrices = count_patches(forest, read, patches, classes, trial.threads)
    return measure(trial, matrices.sum(axis=0), time.perf_counter() - clock)


def plain_loop(trial: Trial, seconds: float) -> dict:
    """A training loop as it is often written, of whole epochs that take about ``seconds``."""
    import segmentation_models_pytorch as smp

    clock, classes, size = time.perf_counter(), trial.source.classes, 4
    torch.manual_seed(trial.seed)
    device = pick_device(None)
    splits = [read_split(trial.patches, split) for split in SPLITS]
    seen = splits[0].images.swapaxes(0, 1)[:, splits[0].valid]  # (C, pixels)
    mean, std = (f(seen, axis=1)[:, None, None] for f in (np.mean, np.std))

    def spent() -> float:
        return time.perf_counter() - clock

    def tensors(split: Pixels):
        scaled = np.where(split.valid[:, None], (split.images - mean) / std, 0)
        return torch.tensor(scaled, dtype=torch.float32), torch.tensor(split.masks)

    def flip(image, mask):
        sides = [side for side in (-2, -1) if torch.rand(()) < 0.5]
        return image.flip(sides), mask.flip(sides)

    def examine(images, masks) -> np.ndarray:
        model.eval()
        with torch.inference_mode():
            parts = [model(part.to(device)).argmax(1) for part in images.split(size)]
        return count(torch.cat(parts).cpu(), masks, classes)

    (images, masks), validation, test = map(tensors, splits)
    shape = {"in_channels": images.shape[1], "classes": classes}
    model = smp.Unet("resnet18", encoder_weights=None, **shape).to(device)
    loss = torch.nn.CrossEntropyLoss(ignore_index=UNLABELLED)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    names, best, weights, epochs, best_epoch = [""] * classes, -1.0, None, 0, 0
    # another epoch where its middle is within the time
    while not epochs or spent() * (epochs + 0.5) / epochs < seconds:
        model.train()
        for rows in torch.randperm(len(images)).split(size):
            flipped = [flip(images[row], masks[row]) for row in rows]
            batch, target = map(torch.stack, zip(*flipped))
            optimizer.zero_grad()
            loss(model(batch.to(device)), target.to(device)).backward()
            optimizer.step()
        epochs += 1
        score = scores(examine(*validation), names, False)["mean_iou"]
        if score > best:
            best, best_epoch = score, epochs
            weights = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    matrix, taken = examine(*test), spent()
    return measure(trial, matrix, taken, epochs=epochs, best_epoch=best_epoch)


# --- tables ---------------------------------------------------------------------------------


def compare(trial: Trial, options: str, epochs: int | None) -> dict[str, dict]:
    """The three methods on one trial."""
    ours = toolkit(trial, options, epochs)
    key = {"settings": ours["key"]["settings"]}  # they set the time
    seconds = ours["seconds"]
    return {
        "toolkit": ours,
        "plain loop": remembered(trial, "plain loop", key, plain_loop, seconds),
        "random forest": remembered(
            trial, "random forest", FOREST._asdict(), random_forest
        ),
    }


def cell(values: list[float], form: str = ".3f") -> str:
    """Mean and standard deviation over the seeds."""
    found = fold_statistics(values)
    deviation = "" if found["std"] is None else f" ± {found['std']:{form.lstrip('+')}}"
    return f"{found['mean']:{form}}{deviation}"


def print_table(results: list[dict[str, dict]]) -> dict:
    """Print a Markdown table, a row per method; what it shows, as numbers.

    Args:
        results: Of each seed, by method. Differences are from the first, seed by seed.
    """
    print("| | mean IoU | difference | accuracy | seconds |\n|---|---|---|---|---|")
    base, table = [next(iter(result.values())) for result in results], {}
    forms = {
        "mean_iou": ".3f", "difference": "+.3f", "overall_accuracy": ".3f",
        "seconds": ".0f",
    }  # fmt: skip
    for method in results[0]:
        rows = [
            result[method]
            | {"difference": result[method]["mean_iou"] - first["mean_iou"]}
            for result, first in zip(results, base)
        ]
        columns = {key: [row[key] for row in rows] for key in (*forms, "kappa")}
        cells = [cell(columns[key], form) for key, form in forms.items()]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
        table[method] = {k: fold_statistics(v) for k, v in columns.items()}
    return table


def shared_parser(
    doc: str, seeds: int | None = 3, threads: int | None = 1
) -> argparse.ArgumentParser:
    """The options that these benchmarks have in common; without ``seeds`` where there is one."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    add, data = parser.add_argument, ROOT.parent / "shared" / "data"
    add("--data", type=Path, default=data, help="folder of the datasets")
    add("--folder", type=Path, default=Path("benchmark_data/quality"))
    if seeds:
        add("--seeds", type=int, default=seeds, help="how many, from 0")
    add("--threads", type=int, default=threads or os.cpu_count())
    return parser


def begin(arguments) -> None:
    """Settle the threads, of scripts that are started too, and make the folder of results."""
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)


def build_parser() -> argparse.ArgumentParser:
    parser = shared_parser(__doc__, threads=None)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=SOURCES, default=list(SOURCES))
    add("--epochs", type=int, help="of the toolkit (default: a number per dataset)")
    add("--options", default="", help='more of main.py, as --options="--loss ce"')
    add("--ablate", action="store_true", help="variants of the toolkit alone")
    text = "of --ablate; the others are compared with the first"
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help=text)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    begin(arguments)
    options, epochs = arguments.options, arguments.epochs
    kind = "ablation" if arguments.ablate else "quality"
    for name in arguments.datasets:
        where = arguments.data, arguments.folder, arguments.threads
        trials = [make_trial(name, seed, *where) for seed in range(arguments.seeds)]
        print(f"\n## {name}")
        print_splits(trials)
        results = []
        for trial in trials:
            if arguments.ablate:
                results.append(
                    {
                        variant: toolkit(
                            trial, f"{options} {VARIANTS[variant]}", epochs
                        )
                        for variant in arguments.variants
                    }
                )
            else:
                results.append(compare(trial, options, epochs))
        table = {"options": options, "epochs": epochs, "table": print_table(results)}
        write_json(arguments.folder / f"{kind}-{name}.json", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
