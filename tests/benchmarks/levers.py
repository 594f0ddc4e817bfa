"""What could make the map better than the defaults do, tried on many grounds with paired seeds.

    python tests/benchmarks/levers.py --threads 1 --seeds 3
    python tests/benchmarks/levers.py --threads 1 --seeds 8 --grounds "zion, thinned" "nc, thinned" made

Grounds are the datasets of ``quality.py`` in short trainings, and three that chose no default:
``zion, thinned`` and ``nc, thinned``, whose training and validation labels are left in small polygons
(4 % of the pixels, as many of each class as there are) while all labels of the test patches count;
and ``made``, a scene of ``examples/demo.py`` per seed, thinned too. ``nc, errors`` has wrong labels in
three tenths of its training patches, in 30 % of their pixels (see ``label_errors.py``).

Levers:

- pretrained: ImageNet's EfficientNet-lite0 (see ``pretraining.py``), less the same encoder from
  scratch, which is less the default (resnet18);
- mean teacher: the mean of the weights (Tarvainen and Valpola 2017) teaches the network on all
  pixels, labelled or not, of patches pasted into each other (CutMix: French et al. 2020), and is what
  is evaluated and kept;
- forgiving loss: the generalized cross-entropy (Zhang and Sabuncu 2018) in place of the cross-entropy;
- resnet34: a larger encoder; three levels: resnet18's first three, of five;
- best by validation: whichever of the three encoders the validation split prefers.

Epochs are more or fewer than the defaults' where a lever's cost less or more, so that the time is about
equal; with ``--full_length`` each trains for the epochs of ``main.py``, or until its patience ends. All
are ``main.py`` in this process. Results are kept in ``--folder`` as ``quality.py`` keeps them.
"""

from __future__ import annotations

import contextlib
import copy
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

for folder in (Path(__file__).parent, Path(__file__).parents[2] / "examples"):
    sys.path.insert(0, str(folder.resolve()))

import numpy as np
import rasterio
import torch
from demo import synthesize_scene
from label_errors import plant
from pretraining import with_interval, write_weights
from quality import (
    SOURCES,
    Source,
    Trial,
    begin,
    cell,
    make_trial,
    shared_parser,
    toolkit,
    train_here,
)

import model_training
from common import UNLABELLED
from common.patches import list_pairs
from common.sieve import label_strip
from training import epochs as epochs_module
from training.settings import TrainingConfig

EPOCHS = {"nc": 60, "zion": 20, "amazon": 4, "made": 20}
THINNED = 0.04
RADIUS = 5  # pixels, of a polygon
GROUNDS = (
    "zion", "nc", "amazon", "zion, thinned", "nc, thinned", "made", "nc, errors"
)  # fmt: skip
SOURCES["made"] = Source(
    "{seed}",
    "extract --image {0}/scene.tif --label {0}/scene_label.tif --grid {0}/scene_grid.shp "
    "--patch_size 64 --block_size 1280",
    6,
    100,
)
TEACHER_COST = 2.4  # of a batch: two passes with gradients, one without
TEACHER_DECAY, RAMP, SURE = 0.99, 0.2, 0.8


# --- grounds --------------------------------------------------------------------------------


def make_ground(
    ground: str, seed: int, data: Path, folder: Path, threads: int
) -> Trial:
    """A ground cut with a seed, unless that was done before."""
    name, _, change = ground.partition(", ")
    if name == "made":
        data, change = folder / "scenes", "thinned"
        SOURCES["made"] = SOURCES["made"]._replace(folder=str(seed))
        if not (data / str(seed) / "scene.tif").exists():
            synthesize_scene(data / str(seed), size=640, seed=seed, patch_size=64)
    trial = make_trial(name, seed, data, folder, threads)
    if not change:
        return trial
    target = folder / change / trial.patches.name
    if not target.is_dir():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            changed, rng = Path(part) / "data", np.random.default_rng(seed)
            shutil.copytree(trial.patches, changed)
            if change == "errors":
                pairs = list_pairs(changed, "train")
                plant(pairs, trial.source.classes, rng, share=0.3)
            else:
                for split in ("train", "validation"):
                    thin(list_pairs(changed, split), trial.source.classes, rng)
            changed.rename(target)
    return Trial(name, seed, target, folder, threads)


def thin(pairs, classes: int, rng: np.random.Generator) -> None:
    """Leave labels in small polygons: parts of areas within ``RADIUS`` of points drawn by class."""
    labels = []
    for pair in pairs:
        with rasterio.open(pair.label) as file:
            labels.append(file.read(1))
    labels = np.stack(labels)
    kept = np.zeros(labels.shape, bool)
    known = [np.argwhere(labels == number) for number in range(classes)]
    known = [rng.permutation(places) for places in known if len(places)]
    rows, columns = np.ogrid[: labels.shape[1], : labels.shape[2]]
    turn = 0
    while kept.sum() < THINNED * (labels < classes).sum():
        places = known[turn % len(known)]
        patch_number, row, column = places[turn // len(known) % len(places)]
        turn += 1
        near = np.hypot(rows - row, columns - column) <= RADIUS
        label = labels[patch_number]
        ids, _ = label_strip(label.astype(np.int32), 0, np.zeros(len(label)))
        kept[patch_number] |= near & (ids == ids[row, column])
    for pair, label, keep in zip(pairs, labels, kept):
        with rasterio.open(pair.label, "r+") as file:
            file.write(np.where(keep, label, UNLABELLED).astype(label.dtype), 1)


# --- levers ---------------------------------------------------------------------------------


class MeanTeacher:
    """Takes the place of an epoch's training and of its validation."""

    def __init__(self, seed: int):
        self.train, self.validate = (
            epochs_module.train_one_epoch,
            epochs_module.validate,
        )
        self.teacher, self.steps = None, 0
        self.epoch, self.epochs = 0, 1
        self.rng = np.random.default_rng(seed)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with (
            patch("training.epochs.train_one_epoch", self.train_one_epoch),
            patch("training.epochs.validate", self.validate_teacher),
        ):
            yield

    def train_one_epoch(self, model, loader, loss, stepper, device, *more, **options):
        if self.teacher is None:
            self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        weight, seen = min(1.0, self.epoch / max(1, RAMP * self.epochs)), []
        take_step = stepper.step

        def loss_of_both(logits, masks):
            return loss(logits, masks) + weight * self.disagreement(model, seen[-1])

        def step(labelled=True):
            take_step(labelled)
            self.follow(model)

        def watched():
            for images, masks in loader:
                seen[:] = [images]
                yield images, masks

        class Batches:
            __len__ = loader.__len__
            __iter__ = staticmethod(watched)

        stepper.step = step
        try:
            return self.train(
                model, Batches(), loss_of_both, stepper, device, *more, **options
            )
        finally:
            del stepper.step

    def disagreement(self, model, images) -> torch.Tensor:
        """Cross-entropy with the teacher, of pixels that it is sure of, on pasted patches."""
        with torch.no_grad():
            said = model_training.class_probabilities(self.teacher(images).float())
        height, width = images.shape[-2:]
        share = np.sqrt(self.rng.uniform(0.25, 0.5))
        tall, wide = int(height * share), int(width * share)
        top, left = (
            self.rng.integers(0, height - tall + 1),
            self.rng.integers(0, width - wide + 1),
        )
        window = ..., slice(top, top + tall), slice(left, left + wide)
        mixed, truth = images.clone(), said.clone()
        mixed[window] = images.roll(1, 0)[window]
        truth[window] = said.roll(1, 0)[window]
        sure, classes = truth.max(1)
        logits = model(mixed).float()
        each = model_training.log_losses(logits, classes)
        return (each * (sure >= SURE)).mean()

    def follow(self, model) -> None:
        self.steps += 1
        decay = min(TEACHER_DECAY, 1 - 1 / (self.steps + 1))
        own = model.state_dict()
        for name, value in self.teacher.state_dict().items():
            if value.is_floating_point():
                value.lerp_(own[name], 1 - decay)

    def validate_teacher(self, run, validation, row):
        self.epoch, self.epochs = row["epoch"], run.epochs
        student = copy.deepcopy(run.model.state_dict())
        run.model.load_state_dict(self.teacher.state_dict())
        try:
            return self.validate(run, validation, row)
        finally:
            run.model.load_state_dict(student)


class Lever(NamedTuple):
    """What is changed: options of ``main.py``, or a context in which it runs."""

    less: str
    options: str = ""
    context: Callable = lambda seed: contextlib.nullcontext()
    cost: float = 1.0  # of an epoch, in epochs of the defaults


LITE = "--encoder_name tu-tf_efficientnet_lite0"
LEVERS = {
    "defaults": Lever(""),
    "lite0": Lever("defaults", LITE),
    "lite0, pretrained": Lever("lite0", f"{LITE} --encoder_weights {{weights}}"),
    "mean teacher": Lever("defaults", "", lambda seed: MeanTeacher(seed)(), TEACHER_COST),
    "forgiving loss": Lever("defaults", "--loss dice+gce"),
    "resnet34": Lever("defaults", "--encoder_name resnet34", cost=1.35),
    "three levels": Lever("defaults", "--encoder_depth 3", cost=0.5),
}  # fmt: skip
CHOSEN = "best by validation"
ENCODERS = "defaults", "resnet34", "three levels"


def result_of(
    trial: Trial, ground: str, name: str, weights: Path, full_length: bool = False
) -> dict:
    lever = LEVERS[name]
    words = f"--amp off --no_baseline {lever.options}"
    options = words.format(weights=shlex.quote(str(weights)))
    epochs = TrainingConfig.epochs
    if not full_length:
        options += " --patience 0"
        epochs = max(1, round(EPOCHS[trial.name] / lever.cost))
    run = partial(train_here, lever.context(trial.seed))
    conditions = (
        {"lever": name} if lever.context is not LEVERS["defaults"].context else {}
    )
    return toolkit(trial, options, epochs, run, ground=ground, **conditions)


def print_table(found: dict[str, dict[str, list[float]]]) -> None:
    """Print a Markdown table of ``found[ground][lever]``, a value per seed."""
    print(
        f"\n| mean IoU | {' | '.join(found)} | all |\n|---|{'---|' * (len(found) + 1)}"
    )
    first = next(iter(found.values()))
    shown = "defaults" if "defaults" in first else next(iter(first))
    print(f"| {shown} | {' | '.join(cell(of[shown]) for of in found.values())} | |")
    lesses = {name: lever.less for name, lever in LEVERS.items()} | {CHOSEN: "defaults"}
    for name, less in lesses.items():
        if name not in first or less not in first:
            continue
        gains = [np.subtract(of[name], of[less]) for of in found.values()]
        cells = [with_interval(g.tolist()) for g in [*gains, np.hstack(gains)]]
        print(f"| {name}, less {less} | {' | '.join(cells)} |")


def main() -> int:
    parser = shared_parser(__doc__)
    add = parser.add_argument
    add("--grounds", nargs="+", choices=GROUNDS, default=GROUNDS)
    add("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    text = "train for the epochs of main.py, with its patience, whatever the time"
    add("--full_length", action="store_true", help=text)
    arguments = parser.parse_args()
    begin(arguments)
    weights = arguments.folder / "efficientnet_lite0.pth"
    if "lite0, pretrained" in arguments.levers:
        write_weights(weights)
    names = [*arguments.levers]
    if set(ENCODERS) <= set(names):
        names.append(CHOSEN)
    found = {ground: {name: [] for name in names} for ground in arguments.grounds}
    for seed in range(arguments.seeds):
        for ground in arguments.grounds:
            where = arguments.data, arguments.folder, arguments.threads
            trial = make_ground(ground, seed, *where)
            results = {
                name: result_of(trial, ground, name, weights, arguments.full_length)
                for name in arguments.levers
            }
            if CHOSEN in names:
                encoders = [results[name] for name in ENCODERS]
                results[CHOSEN] = max(encoders, key=validation_score)
            for name, result in results.items():
                found[ground][name].append(result["mean_iou"])
    print_table(found)
    return 0


def validation_score(result: dict) -> float:
    return max(row["val_combined"] for row in result["history"])


if __name__ == "__main__":
    sys.exit(main())
