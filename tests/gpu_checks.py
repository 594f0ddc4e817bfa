"""What ``gpu.py`` proves, a function each: it returns what it has found as text.

It raises ``Failure`` where something is wrong, and ``Skip`` where it cannot be found here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gpu_place import (
    BANDS,
    MODELS,
    Failure,
    Place,
    Skip,
    beside,
    read,
    report_of,
    require,
    same_classes,
    succeeded,
)
from helpers import statistics as unit_statistics

from common.architectures import ModelConfig
from model_training import build_model, save_checkpoint

KEPT = 0.999  # share of the pixels whose class is the CPU's
NEAR = 0.05  # of a mean IoU
CARD = 7.5e9  # bytes that a card of 8 GB leaves to PyTorch
EXACT = ("--precision", "fp32")
LOST = 60  # seconds after which a run ends at the latest when one of its processes is killed


@dataclass(frozen=True)
class Check:
    """A named check; ``alone``: nothing else runs beside it."""

    name: str
    run: Callable[[Place], str]
    alone: bool = False
    gpu_only: bool = False


CHECKS: dict[str, Check] = {}


def check(name: str, **kind) -> Callable:
    """Add a function to ``CHECKS``."""

    def add(function: Callable[[Place], str]) -> Callable:
        CHECKS[name] = Check(name, function, **kind)
        return function

    return add


# --- training ---------------------------------------------------------------------------------


def score_of(save_dir: Path) -> float:
    return report_of(save_dir)["test"]["mean_iou"]


def train_and_compare(place: Place, model: str, amp: str) -> str:
    """Train in a precision; the score, and what the model maps, as those of the CPU."""
    if not place.on_gpu and amp != "auto":
        raise Skip("needs a GPU")
    save_dir = place.trained(model, amp)
    expected = score_of(place.trained(model, "off", device="cpu"))
    found = score_of(save_dir)
    text = f"mean IoU {found:.3f} (CPU {expected:.3f})"
    require(abs(found - expected) <= NEAR, text)
    here, there = (
        place.map_of(save_dir / "model_final_model.pth", *EXACT, device=device)
        for device in (None, "cpu")
    )
    kept = same_classes(here, there)
    text += f", {kept:.3%} of the classes as mapped by the CPU"
    require(kept >= KEPT, text)
    return text


for model in MODELS:
    for amp in ("auto", "fp16", "off"):
        check(f"train-{model}-{amp}")(partial(train_and_compare, model=model, amp=amp))


FOLDS = ("--val_strategy", "kfold", "--n_splits", 2)


@check("train-folds")
def train_folds(place: Place) -> str:
    scores = [
        score_of(place.trained("unet", amp, *FOLDS, device=device))
        for amp, device in (("auto", None), ("off", "cpu"))
    ]
    near = abs(scores[0] - scores[1]) <= NEAR
    text = f"mean IoU {scores[0]:.3f} (CPU {scores[1]:.3f})"
    require(near, text)
    return text


# --- the same again ---------------------------------------------------------------------------

SIX = ("--epochs", 6)


def six_epochs(place: Place, number: int) -> tuple[Path, str]:
    """A training of six epochs, and its messages."""

    def make() -> tuple[Path, str]:
        save_dir = place.new_folder()
        run = succeeded(place.train(save_dir, *SIX), "six epochs")
        return save_dir, run.err

    return place.once(("six epochs", number), make)


def compare_weights(one: Path, other: Path, messages: str) -> str:
    """Equal to the bit, unless the run said that PyTorch has no deterministic kernels."""
    states = [
        torch.load(folder / "model_last.pth", weights_only=True)["model_state_dict"]
        for folder in (one, other)
    ]
    furthest = max(
        float((value.double() - states[1][name].double()).abs().max())
        for name, value in states[0].items()
    )
    if furthest == 0:
        return "equal to the bit"
    scores = [report_of(folder)["validation"]["mean_iou"] for folder in (one, other)]
    text = (
        f"weights differ by {furthest:.1e}, mean IoU {scores[0]:.3f}, {scores[1]:.3f}"
    )
    known = "is not deterministic" in messages
    require(known and abs(scores[0] - scores[1]) <= NEAR, text)
    return f"{text}: PyTorch lacks deterministic kernels, as the run says"


@check("seed")
def same_seed(place: Place) -> str:
    (one, messages), (other, _) = six_epochs(place, 1), six_epochs(place, 2)
    return compare_weights(one, other, messages)


@check("resume")
def resume(place: Place) -> str:
    whole, messages = six_epochs(place, 1)
    save_dir = place.new_folder()
    stopped = place.train(save_dir, *SIX, prepare=[("stop_after", 3)])
    require(stopped.status == 130, f"stopped: {stopped.last_line}")
    run = succeeded(place.train(save_dir, *SIX, "--resume"), "--resume")
    require("resuming after epoch 3 of 6" in run.err, run.last_line)
    return compare_weights(whole, save_dir, messages)


# --- several processes ------------------------------------------------------------------------

WORKERS = ("--num_workers", 2, "--cache", "off")


def run_under_torchrun(place: Place, processes: int) -> str:
    save_dir = place.new_folder()
    words = (*WORKERS, "--epochs", 2)
    run = place.torchrun(processes, save_dir, *words, prepare=[("forbid_fork",)])
    _, err = run.communicate(timeout=240)
    lines = [line for line in err.splitlines() if line.strip()]
    require(run.returncode == 0, next((li for li in lines if "rror" in li), "failed"))
    require((save_dir / "model_final_model.pth").exists(), "no final model")
    stray = [line for line in lines if "arning" in line]
    place.figures[f"torchrun {processes}: warnings"] = stray
    return f"finished; {len(stray)} lines of warnings"


@check("torchrun-one")
def torchrun_one(place: Place) -> str:
    return run_under_torchrun(place, 1)


def require_two(place: Place) -> None:
    if place.on_gpu and place.gpus < 2:
        raise Skip(f"{place.gpus} GPU; two processes need two")


@check("torchrun-two")
def torchrun_two(place: Place) -> str:
    require_two(place)
    return run_under_torchrun(place, 2)


def children(parent: int) -> dict[int, str]:
    """The processes that a process has started, with their command lines."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat, words = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent:
            found[int(entry.name)] = words.replace(b"\0", b" ").decode()
    return found


def trainings_of(launcher: int) -> list[int]:
    """The processes of torchrun that train, by their rank."""

    def rank(process: int) -> str:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        return next(text for text in variables if text.startswith(b"RANK=")).decode()

    return sorted(
        (one for one, words in children(launcher).items() if "main.main" in words),
        key=rank,
    )


def readers_of(training: int) -> list[int]:
    """The processes that prepare batches for a training; a process in between has started them."""
    return [
        reader
        for between, words in children(training).items()
        if "forkserver" in words
        for reader in children(between)
    ]


def kill_one(place: Place, processes: int, find: Callable[[int], int]) -> tuple:
    """Kill a process of a training; seconds until the run has ended, its status and messages."""
    if not Path("/proc").is_dir():
        raise Skip("looks for processes in /proc")
    save_dir = place.new_folder()
    words = (*WORKERS, "--epochs", 1000, "--patience", 0, "--scheduler", "none")
    run = place.torchrun(processes, save_dir, *words)
    try:
        until = time.monotonic() + 200
        while not (save_dir / "model_last.pth").exists():
            require(run.poll() is None, "the run ended by itself")
            require(time.monotonic() < until, "no epoch within 200 s")
            time.sleep(0.1)
        os.kill(find(run.pid), signal.SIGKILL)
        killed = time.monotonic()
        _, err = run.communicate(timeout=2 * LOST)
        return time.monotonic() - killed, run.returncode, err
    except subprocess.TimeoutExpired:
        raise Failure(f"the run has not ended after {2 * LOST} s") from None
    finally:
        run.terminate()  # torchrun ends those that it has started


def judge_end(seconds: float, status: int, err: str) -> str:
    """A run that has lost a process: one line of its own, within a minute."""
    ours = [line for line in err.splitlines() if line.startswith(("error:", "interru"))]
    require(status != 0, "the run ended as if nothing had happened")
    require(seconds <= LOST, f"the run ended after {seconds:.0f} s")
    require(len(ours) <= 1, " | ".join(ours))
    require("model_training.py" not in err, "a traceback of the toolkit's")
    return f"ended after {seconds:.0f} s: {ours[0] if ours else 'torchrun says so'}"


@check("killed-process")
def killed_process(place: Place) -> str:
    """The last of two; of one, where there is one GPU."""
    processes = 1 if place.on_gpu and place.gpus < 2 else 2
    return judge_end(*kill_one(place, processes, lambda run: trainings_of(run)[-1]))


@check("killed-reader")
def killed_reader(place: Place) -> str:
    def find(launcher: int) -> int:
        readers = readers_of(trainings_of(launcher)[0])
        require(bool(readers), "no process that reads patches, started without a fork")
        return readers[0]

    text = judge_end(*kill_one(place, 1, find))
    require("A process that reads patches was killed" in text, text)
    return text


# --- memory -----------------------------------------------------------------------------------


@check("memory-training", alone=True, gpu_only=True)
def memory_training(place: Place) -> str:
    """Memory that runs out in the training: 128 patches of 224 pixels at once."""
    words = ("--dataset_root", large_patches(place), "--classes", 6)
    words = (*words, "--batch_size", 128, "--epochs", 1)
    prepare = [("leave_memory", 2e9)]
    run = place.train(place.new_folder(), *words, prepare=prepare)
    require(run.status == 1, f"status {run.status}: {run.last_line}")
    named = run.last_line.startswith("error:") and "--batch_size" in run.last_line
    require(named and "Traceback" not in run.err, run.last_line)
    return run.last_line


@check("memory-training-8gb", alone=True, gpu_only=True)
def memory_training_8gb(place: Place) -> str:
    """The defaults, with patches of the usual size, on a card of 8 GB."""
    data = large_patches(place)
    words = ("--dataset_root", data, "--save_dir", place.new_folder(), "--epochs", 1)
    words = (*words, "--mode", "multiclass", "--classes", 6, "--model", "unet")
    line = [str(word) for word in words]
    run = place.call("main.main", line, prepare=[("imitate_card", CARD)])
    succeeded(run, "the defaults on 8 GB")
    return "the defaults fit"


def wide_scene(place: Place) -> Path:
    """16 windows of the default size in a row."""
    return place.scene(9, 98)


@check("memory-prediction", alone=True, gpu_only=True)
def memory_prediction(place: Place) -> str:
    """Memory that runs out in the prediction: batches are halved, and the map is the same."""
    model, scene = place.model(), wide_scene(place)
    outputs = [place.new_folder() / "map.tif" for _ in range(2)]
    # in one piece, of which the free memory would have made several
    words = (*EXACT, "--max_memory", 4)
    # a batch of its own choice would fit into what is left
    words = (*words, "--patch_size", 512, "--batch_size", 16)
    succeeded(place.predict(model, scene, outputs[0], *words), "with all memory")
    prepare = [("leave_memory", 1e9)]
    run = place.predict(model, scene, outputs[1], *words, prepare=prepare)
    succeeded(run, "with 1 GB")
    halved = [line for line in run.err.splitlines() if "memory ran out" in line]
    require(bool(halved), "the memory did not run out")
    kept = same_classes(*outputs)
    require(kept >= KEPT, f"{kept:.3%} of the classes stay")
    return f"{halved[-1]}; {kept:.3%} of the classes stay"


@check("memory-prediction-8gb", alone=True, gpu_only=True)
def memory_prediction_8gb(place: Place) -> str:
    """The defaults on a card of 8 GB, in float32, which takes the most."""
    output = place.new_folder() / "map.tif"
    prepare = [("imitate_card", CARD)]
    words = (place.model(), wide_scene(place), output, *EXACT)
    run = succeeded(place.predict(*words, prepare=prepare), "the defaults on 8 GB")
    require("memory ran out" not in run.err, "batches had to be halved")
    return "the defaults fit"


AUTO = ("--batch_size", "auto")


def line_of_trial(messages: str) -> str:
    """What a training says of the size of its batches."""
    found = [
        one for one in messages.splitlines() if one.startswith("--batch_size auto")
    ]
    require(len(found) == 1, f"{len(found)} lines about --batch_size auto")
    return found[0]


@check("batch-size-auto", alone=True)
def batch_size_auto(place: Place) -> str:
    """Small patches, of which the GPU holds the most that is tried; and the run resumed."""
    save_dir, expected = place.new_folder(), 64 if place.on_gpu else 4
    prepare = [("stop_after", 1)]
    run = place.train(save_dir, *AUTO, "--epochs", 2, prepare=prepare)
    require(run.status == 130, f"status {run.status}: {run.last_line}")
    line = line_of_trial(run.err)
    again = place.train(save_dir, *AUTO, "--epochs", 2, "--resume")
    succeeded(again, "--batch_size auto --resume")
    require("as before" in line_of_trial(again.err), line_of_trial(again.err))
    found = report_of(save_dir)["settings"]["batch_size"]
    require(found == expected, f"{found} in the report; {line}")
    return line


@check("batch-size-auto-2gb", alone=True, gpu_only=True)
def batch_size_auto_2gb(place: Place) -> str:
    """Patches of the usual size on a card of 2 GB: what is found trains, four times as much does not."""
    words = ("--dataset_root", large_patches(place), "--classes", 6, "--epochs", 1)
    words = (*words, "--encoder_name", "resnet34")
    prepare, save_dir = [("imitate_card", 2e9)], place.new_folder()
    run = place.train(save_dir, *words, *AUTO, prepare=prepare)
    line = line_of_trial(succeeded(run, "--batch_size auto on 2 GB").err)
    found = report_of(save_dir)["settings"]["batch_size"]
    require(found < 64, line)
    larger = (*words, "--batch_size", 4 * found)
    run = place.train(place.new_folder(), *larger, prepare=prepare)
    require(run.status == 1, f"batches of {4 * found} fit too; {line}")
    return line


# --- prediction -------------------------------------------------------------------------------


def compare_with_cpu(place: Place, models, *words, reference=()) -> str:
    """The map here and the CPU's in float32."""
    here = place.map_of(models, *words)
    there = place.map_of(
        models, *(reference or (*words, "--precision", "fp32")), device="cpu"
    )
    kept = same_classes(here, there)
    layers = {}
    for name in ("confidence", "uncertainty", "probabilities"):
        paths = [beside(path, name) for path in (here, there)]
        if paths[0].exists() and paths[1].exists():
            one, other = (read(path).astype(np.float64) for path in paths)
            layers[name] = float(np.abs(one - other).mean())
    require(kept >= KEPT, f"{kept:.3%} of the classes are those of the CPU")
    require(layers["confidence"] < 0.01, f"the layers differ by {layers}")
    more = ", ".join(f"{name} {value:.1e}" for name, value in layers.items())
    return f"{kept:.3%} of the classes; mean difference {more}"


@check("predict-fp32")
def predict_fp32(place: Place) -> str:
    return compare_with_cpu(place, place.model(), *EXACT)


@check("predict-fp16", gpu_only=True)
def predict_fp16(place: Place) -> str:
    words = ("--precision", "fp16")
    return compare_with_cpu(place, place.model(), *words, reference=EXACT)


@check("predict-bf16")
def predict_bf16(place: Place) -> str:
    words = ("--precision", "bf16")
    return compare_with_cpu(place, place.model(), *words, reference=EXACT)


@check("predict-tf32", gpu_only=True)
def predict_tf32(place: Place) -> str:
    words = ("--precision", "tf32")
    return compare_with_cpu(place, place.model(), *words, reference=EXACT)


@check("predict-auto")
def predict_auto(place: Place) -> str:
    words = ("--precision", "auto")
    return compare_with_cpu(place, place.model(), *words, reference=EXACT)


@check("predict-compile")
def predict_compile(place: Place) -> str:
    words = ("--compile", *EXACT)
    return compare_with_cpu(place, place.model(), *words, reference=EXACT)


@check("predict-tta")
def predict_tta(place: Place) -> str:
    return compare_with_cpu(place, place.model(), "--tta", "d4", *EXACT)


@check("predict-three-models")
def predict_three_models(place: Place) -> str:
    """As one ensemble, with all layers."""
    folder = place.once("ensemble", place.new_folder)
    for model in ("unet", "deeplabv3+", "unet-dropout"):
        link = folder / f"{model}.pth"
        if not link.exists():
            link.symlink_to(place.trained(model, "auto") / "model_final_model.pth")
    words = ("--save_uncertainty", "--save_probabilities", *EXACT)
    return compare_with_cpu(place, folder, *words)


@check("predict-layers")
def predict_layers(place: Place) -> str:
    words = ("--save_uncertainty", "--save_probabilities", *EXACT)
    return compare_with_cpu(place, place.model(), *words)


@check("predict-100-classes")
def predict_100_classes(place: Place) -> str:
    def make() -> Path:
        torch.manual_seed(0)
        config = ModelConfig("unet", BANDS, 100, "resnet18")
        path = place.new_folder() / "classes.pth"
        numbers = unit_statistics(BANDS)
        save_checkpoint(path, build_model(config), config, numbers, {})
        return path

    return compare_with_cpu(place, place.once("100 classes", make), *EXACT)


@check("predict-device", gpu_only=True)
def predict_device(place: Place) -> str:
    """``cuda:0`` is what ``cuda`` is."""
    named, plain = (
        place.map_of(place.model(), *EXACT, device=device)
        for device in ("cuda:0", "cuda")
    )
    require(named.read_bytes() == plain.read_bytes(), "another map")
    return "the same file"


# --- figures ----------------------------------------------------------------------------------


def large_patches(place: Place) -> Path:
    """1,024 patches of 224 pixels and 10 bands; a few small ones for the CPU."""

    def make() -> Path:
        folder = place.folder / "large"
        numbers = (224, 64, 1024, 32) if place.on_gpu else (64, 16, 16, 4)
        call = place.call("gpu_figures.make_patches", str(folder), *numbers)
        succeeded(call, "writing patches")
        return folder

    return place.once("large patches", make)


def figure_model(place: Place) -> tuple[Path, dict]:
    """What the training's figures leave: the folder of the run, and the figures."""

    def make() -> tuple[Path, dict]:
        data, save_dir = large_patches(place), place.new_folder()
        patches, batch = (1024, 32) if place.on_gpu else (16, 4)
        words = ("--dataset_root", data, "--save_dir", save_dir, "--model", "unet")
        words = (*words, "--mode", "multiclass", "--classes", 6, "--epochs", 5)
        words = (*words, "--batch_size", batch, "--device", place.device)
        words = [str(word) for word in (*words, "--amp", "bf16")]
        call = place.call("gpu_figures.toolkit_training", words, patches, batch)
        return save_dir, succeeded(call, "the training").result

    return place.once("figure model", make)


@check("figures-training", alone=True)
def figures_training(place: Place) -> str:
    """Patches of 224 pixels, 10 bands, U-Net with resnet34, batch 32, bf16."""
    _, found = figure_model(place)
    side, batch, steps = (224, 32, 60) if place.on_gpu else (64, 4, 4)
    words = (place.device, "bf16", side, batch, steps)
    call = place.call("gpu_figures.bare_training", *words)
    found = found | succeeded(call, "the bare loop").result
    place.figures["training"] = found
    return say(found)


@check("figures-prediction", alone=True)
def figures_prediction(place: Place) -> str:
    """A tile of 10,980 x 10,980 pixels and 10 bands in DEFLATE and ZSTD, U-Net with resnet34."""
    side = 10_980 if place.on_gpu else 1024
    model = figure_model(place)[0] / "model_final_model.pth"
    found = {}
    for compress in ("deflate", "zstd"):
        folder = place.new_folder()
        scene, output = str(folder / "tile.tif"), str(folder / "map.tif")
        call = place.call("gpu_figures.make_tile", scene, side, compress)
        succeeded(call, "writing the tile")
        words = [str(model), scene, output, place.device]
        # in TF32 the plain loop multiplies, as PyTorch does by itself
        for precision in ("bf16", "tf32") if place.on_gpu else ("bf16", "fp32"):
            options = ["--precision", precision, "--overwrite"]
            call = place.call("gpu_figures.toolkit_map", *words, options)
            row = succeeded(call, f"the map in {precision}").result
            megapixels = side**2 / 1e6 / row["wall"]
            found[f"{compress} {precision} megapixels/s"] = megapixels
            found[f"{compress} {precision} CPU s"] = row["cpu"]
            found[f"{compress} {precision} GPU busy"] = row.get("gpu busy")
        if compress == "deflate":
            call = place.call("gpu_figures.plain_map", *words)
            row = succeeded(call, "the plain loop").result
            found["deflate plain loop megapixels/s"] = side**2 / 1e6 / row["wall"]
        Path(scene).unlink()
    place.figures["prediction"] = found
    return say(found)


def say(found: dict) -> str:
    return ", ".join(
        f"{name} {value:.3g}" for name, value in found.items() if value is not None
    )
