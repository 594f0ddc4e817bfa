"""Whether the distance to what the training saw tells wrong pixels from right ones.

    python tests/benchmarks/applicability.py --threads 1

Each trial tests on one half of the ground (west, east, north or south of the median of the patches'
centres) and trains on the other; a quarter of the training half is its validation split. Datasets
and network are those of ``quality.py``, epochs are few. ``zion, shifted`` is the model of zion on the
same test patches, in every second of which vegetation is as in another season: near infrared lower
and red higher, in proportion to NDVI.

For each test pixel there are the model's confidence, and distances from its features to the nearest
of 1,000 centres of the training patches' features (k-means; all features where they are fewer):

- deepest: those of the encoder's last level, enlarged bilinearly;
- middle: those of its level of an eighth of the resolution;
- last: those that the network's last layer turns into classes;
- bands: those of the pixel and their 5 x 5 means, the area of applicability as Meyer and Pebesma
  (2021, Methods in Ecology and Evolution 12) define it, without a weight per predictor.

Features are divided by their deviation in training. A distance tells wrong from right as well as the
area under its ROC curve (AUROC) says, 0.5 for nothing; low confidence is measured in the same way,
and so is what a logistic regression of both, fitted on the validation split, makes of them. Beyond
the largest distance but for outliers of the validation split (upper quartile and 1.5 interquartile
ranges) ground counts as outside: its share, and the share of wrong pixels there and inside.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import rasterio
import torch
from quality import (
    MODEL,
    SOURCES,
    Trial,
    begin,
    cell,
    digest,
    make_trial,
    remembered,
    shared_parser,
)
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.nn import functional

import main as training
from common import SPLITS
from common.distributed import ProcessGroup
from common.patches import list_pairs
from model_training import class_probabilities
from training.dataset import index_split

HALVES = "west", "east", "north", "south"
EPOCHS = {"nc": 60, "zion": 20, "amazon": 4}
SHIFTED = "zion, shifted"
KINDS = "deepest", "middle", "last", "bands"
CENTRES, PIXELS, DRAWN = 1000, 200_000, 40_000
AXIS = {"west": (0, 1), "east": (0, -1), "south": (1, 1), "north": (1, -1)}


# --- data -----------------------------------------------------------------------------------


def cut_in_halves(trial: Trial, half: str) -> Path:
    """The trial's patches again, tested in one half of the ground."""
    target = trial.folder / "halves" / f"{trial.name}-{half}-{digest(trial.source.cut)}"
    if target.is_dir():
        return target
    pairs = [
        p for split in SPLITS for p in list_pairs(trial.patches, split)
    ]  # in the order of their names, so that the seed of the first cut does not matter
    pairs.sort(key=lambda pair: pair.name)
    axis, sign = AXIS[half]
    centres = sign * np.array([centre(pair.image)[axis] for pair in pairs])
    tested = centres <= np.median(centres)
    others = np.random.default_rng(0).permutation(np.flatnonzero(~tested))
    split_of = np.where(tested, "test", "train").astype(object)
    split_of[others[: len(others) // 4]] = "validation"
    with tempfile.TemporaryDirectory(dir=trial.folder) as part:
        for pair, split in zip(pairs, split_of):
            for kind, file in (("images", pair.image), ("labels", pair.label)):
                folder = Path(part) / "data" / "Patch" / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder)
        target.parent.mkdir(exist_ok=True)
        (Path(part) / "data").rename(target)
    return target


def centre(image: Path) -> tuple[float, float]:
    with rasterio.open(image) as file:
        return file.xy(file.height / 2, file.width / 2)


def shift_season(patches: Path, target: Path) -> None:
    """Copy the test split; every second image of Landsat 8 gets the vegetation of another season."""
    shutil.copytree(patches, target)
    for pair in list_pairs(target, "test")[::2]:
        with rasterio.open(pair.image, "r+") as file:
            image = file.read().astype(float)
            dark = 5000.0  # digital numbers of L1T without light
            red, infrared = image[2] - dark, image[3] - dark
            green = np.clip((infrared - red) / (infrared + red) / 0.6, 0, 1)
            image[2] += 0.5 * green * red
            image[3] -= 0.4 * green * infrared
            file.write(np.round(image).astype(file.dtypes[0]))


# --- features -------------------------------------------------------------------------------


class Features:
    """The network's features of a batch, by kind; a hook keeps those before the last layer."""

    def __init__(self, run):
        self.run, self.network = run, run.model.network
        self.before_last = None
        self.network.segmentation_head.register_forward_pre_hook(self.keep)

    def keep(self, module, inputs) -> None:
        self.before_last = inputs[0]

    def of(self, images) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = self.run.model(images)
        levels = self.network.encoder(images)
        means = functional.avg_pool2d(images, 5, 1, 2, count_include_pad=False)
        kinds = levels[-1], levels[3], self.before_last, torch.cat([images, means], 1)
        return logits, dict(zip(KINDS, kinds))

    def batches(self, index):
        with torch.inference_mode():
            for images, masks in self.run.loader(index, group=ProcessGroup()):
                yield *self.of(images), masks


def rows_of(features: torch.Tensor) -> np.ndarray:
    """(N, C, h, w) as (N * h * w, C)."""
    return features.movedim(1, -1).flatten(0, 2).numpy()


class Nearest:
    """Distance to the nearest of the training's centres, for one kind of features."""

    def __init__(self, rows: np.ndarray, seed: int):
        self.spread = np.maximum(rows.std(axis=0), 1e-6)
        rows = rows / self.spread
        if len(rows) > CENTRES:
            means = MiniBatchKMeans(CENTRES, random_state=seed, n_init=1, max_iter=30)
            rows = means.fit(rows).cluster_centers_
        self.centres = torch.tensor(rows, dtype=torch.float32)

    def __call__(self, features: torch.Tensor, size) -> torch.Tensor:
        """(N, C, h, w) to distances (N, H, W)."""
        batch, _, height, width = features.shape
        rows = torch.from_numpy((rows_of(features) / self.spread).astype(np.float32))
        parts = [torch.cdist(part, self.centres).amin(1) for part in rows.split(16384)]
        distances = torch.cat(parts).view(batch, 1, height, width)
        if (height, width) != tuple(size):
            distances = functional.interpolate(distances, size, mode="bilinear")
        return distances[:, 0]


def learn_centres(features: Features, index, seed: int) -> dict[str, Nearest]:
    rng, found = np.random.default_rng(seed), {kind: [] for kind in KINDS}
    for _, kinds, _ in features.batches(index):
        for kind, values in kinds.items():
            rows = rows_of(values)
            share = DRAWN // len(index.pairs) * len(values)
            kept = rng.permutation(len(rows))[:share]
            found[kind].append(rows[kept])
    return {kind: Nearest(np.concatenate(rows), seed) for kind, rows in found.items()}


def look(features: Features, nearest: dict[str, Nearest], index, seed: int) -> dict:
    """For pixels drawn of an index: whether wrong, low confidence, and the distances."""
    rng, found = np.random.default_rng(seed), []
    share = -(-PIXELS // len(index.pairs))
    for logits, kinds, masks in features.batches(index):
        probabilities = class_probabilities(logits.float())
        if probabilities.shape[1] == 1:  # binary
            probabilities = torch.cat([1 - probabilities, probabilities], dim=1)
        confidence, predicted = probabilities.max(dim=1)
        maps = [
            nearest[kind](values, masks.shape[1:]) for kind, values in kinds.items()
        ]
        columns = torch.stack([predicted != masks, 1 - confidence, *maps]).flatten(1)
        known = np.flatnonzero((masks < probabilities.shape[1]).flatten().numpy())
        kept = rng.permutation(known)[: share * len(masks)]
        found.append(columns.numpy()[:, kept])
    wrong, doubt, *distances = np.concatenate(found, axis=1)
    return {"wrong": wrong > 0, "confidence": doubt, **dict(zip(KINDS, distances))}


# --- measures -------------------------------------------------------------------------------


def measure(test: dict, validation: dict) -> dict:
    """AUROC of each measure, and the errors inside and outside of each distance's threshold."""
    wrong = test["wrong"]
    found = {"wrong": float(wrong.mean()), "auroc": {}, "outside": {}}
    found["auroc"]["confidence"] = float(roc_auc_score(wrong, test["confidence"]))
    for kind in KINDS:
        found["auroc"][kind] = float(roc_auc_score(wrong, test[kind]))
        both = [
            np.column_stack([logit(part["confidence"]), np.log(part[kind] + 1e-3)])
            for part in (validation, test)
        ]
        model = LogisticRegression().fit(both[0], validation["wrong"])
        chance = model.predict_proba(both[1])[:, 1]
        found["auroc"][f"confidence and {kind}"] = float(roc_auc_score(wrong, chance))
        low, high = np.quantile(validation[kind], (0.25, 0.75))
        outside = test[kind] > high + 1.5 * (high - low)
        found["outside"][kind] = [
            float(outside.mean()),
            float(wrong[outside].mean()) if outside.any() else None,
            float(wrong[~outside].mean()) if not outside.all() else None,
        ]
    return found


def logit(share: np.ndarray) -> np.ndarray:
    share = np.clip(share, 1e-6, 1 - 1e-6)
    return np.log(share / (1 - share))


def run_trial(trial: Trial, half: str) -> dict:
    clock, caught = time.perf_counter(), []
    patches = cut_in_halves(trial, half)
    binary = "--mode binary" if trial.binary else "--mode multiclass --classes"
    words = (
        f"{binary} {'' if trial.binary else trial.source.classes} {MODEL} --no_baseline"
    )
    words += f" --seed {trial.seed} --epochs {EPOCHS[trial.name]} --patience 0"
    with tempfile.TemporaryDirectory(dir=trial.folder) as place:

        def spy(run, test) -> None:
            features = Features(run)
            run.model.eval()
            nearest = learn_centres(features, run.train, trial.seed)
            validation = look(features, nearest, run.validation, trial.seed)
            tests = {trial.name: test}
            if trial.name == "zion":
                shift_season(patches, Path(place) / "shifted")
                config = replace(run.config, dataset_root=str(Path(place) / "shifted"))
                tests[SHIFTED] = index_split(config, "test", run.train)
            for name, index in tests.items():
                found = look(features, nearest, index, trial.seed)
                caught.append((name, measure(found, validation)))

        where = "--dataset_root", str(patches), "--save_dir", f"{place}/run"
        with patch("training.assessment.audit_split", spy):
            if training.main([*words.split(), *where]):
                sys.exit(f"{trial.name} {half} failed")
        report = json.loads((Path(place) / "run" / "model_metrics.json").read_text())
    return {
        "found": dict(caught),
        "mean_iou": report["test"]["mean_iou"],
        "seconds": time.perf_counter() - clock,
    }


def print_tables(results: dict[str, list[dict]]) -> None:
    names = list(results)
    lines = {"pixels wrong": [[r["wrong"] for r in results[n]] for n in names]}
    for key in results[names[0]][0]["auroc"]:
        lines[f"AUROC, {key}"] = [[r["auroc"][key] for r in results[n]] for n in names]
    print(f"\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for head, columns in lines.items():
        print(f"| {head} | {' | '.join(cell(values) for values in columns)} |")
    print("\n| distance | ground | outside | wrong outside | wrong inside |")
    print("|---|---|---|---|---|")
    for kind in KINDS:
        for name in names:
            triples = zip(*(r["outside"][kind] for r in results[name]))
            kept = [[v for v in values if v is not None] for values in triples]
            cells = [cell(values) if values else "-" for values in kept]
            print(f"| {kind} | {name} | {' | '.join(cells)} |")


def main(words: Sequence[str] | None = None) -> int:
    parser = shared_parser(__doc__, seeds=None)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=SOURCES, default=list(EPOCHS))
    add("--halves", nargs="+", choices=HALVES, default=HALVES)
    arguments = parser.parse_args(words)
    begin(arguments)
    results: dict[str, list[dict]] = {}
    for half in arguments.halves:
        for name in arguments.datasets:
            where = arguments.data, arguments.folder, arguments.threads
            trial = make_trial(name, 0, *where)
            key = {"half": half, "epochs": EPOCHS[name]}
            found = remembered(trial, "applicability", key, run_trial, half)
            for ground, one in found["found"].items():
                results.setdefault(ground, []).append(one)
                print(json.dumps({half: {ground: one["auroc"]}}), file=sys.stderr)
    print_tables(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
