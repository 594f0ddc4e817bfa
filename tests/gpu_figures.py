"""The figures of ``gpu.py``: what is measured, each function in a process of its own."""

from __future__ import annotations

import contextlib
import csv
import io
import statistics
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from benchmarks.prediction import gpu_busy, toolkit, whole_scene
from helpers import CRS, make_patch, write_dataset
from rasterio.transform import from_origin
from rasterio.windows import Window

import main
from common.architectures import ModelConfig
from common.devices import autocast
from model_training import build_loss, build_model
from training import epochs as epochs_of_training

BANDS, CLASSES = 10, 6


def make_patches(folder: str, side: int, files: int, names: int, checked: int) -> int:
    """A dataset of ``names`` training patches, which are links to some files.

    Reading and decoding take as long as for patches that differ, and writing them does not.
    """
    root = write_dataset(
        Path(folder), files, checked, 0, bands=BANDS, classes=CLASSES, size=side
    )
    for kind in ("images", "labels"):
        place = root / "Patch" / "train" / kind
        written = sorted(place.iterdir())
        for number in range(files, names):
            (place / f"more_{number:05}.tif").hardlink_to(written[number % files])
    return 0


def toolkit_training(words: list[str], patches: int, batch_size: int) -> dict:
    """A run of main.py: patches a second in its passes, and with validation and all files."""
    plain, seconds, busy = epochs_of_training.train_epoch, [], []
    gpu = torch.cuda.is_available() and words[words.index("--device") + 1] == "cuda"

    def train_epoch(*arguments):
        found = []
        started = time.perf_counter()
        if gpu and len(seconds) == 1:  # neither the first, nor one that is timed
            batches = -(-patches // batch_size)
            share = gpu_busy(lambda: found.append(plain(*arguments)), max(batches, 11))
            busy.append(share)
        else:
            found.append(plain(*arguments))  # it ends by fetching the loss
        seconds.append(time.perf_counter() - started)
        return found[0]

    epochs_of_training.train_epoch = train_epoch
    with contextlib.redirect_stdout(io.StringIO()):
        status = main.main(words)
    if status:
        raise SystemExit(status)
    save_dir = Path(words[words.index("--save_dir") + 1])
    with open(save_dir / "model_training_log.csv", newline="") as file:
        whole = [float(row["seconds"]) for row in csv.DictReader(file)]
    return {
        "toolkit patches/s": patches / statistics.median(seconds[2:]),
        "toolkit patches/s with validation and files": patches
        / statistics.median(whole[2:]),
        "GPU busy": busy[0] if busy else None,
    }


def bare_training(
    device: str, precision: str, side: int, batch_size: int, steps: int
) -> dict:
    """The passes and steps alone, over a batch that lies on the device."""
    device = torch.device(device)
    config = ModelConfig("unet", BANDS, CLASSES, "resnet34")
    model = build_model(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    loss = build_loss("dice+ce", "multiclass", 255)
    shape = batch_size, BANDS, side, side
    images = torch.rand(shape, device=device).to(memory_format=torch.channels_last)
    masks = torch.randint(CLASSES, (batch_size, side, side), device=device)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            logits = model(images)
        value = loss(logits.float(), masks)
        value.backward()
        optimizer.step()
        return value.detach()

    for _ in range(3):
        step().item()
    started = time.perf_counter()
    for _ in range(steps):
        value = step()
    value.item()  # waits for a GPU
    seconds = time.perf_counter() - started
    return {"bare loop patches/s": steps * batch_size / seconds}


def make_tile(target: str, side: int, compress: str) -> int:
    """A square scene of 10 bands, one block of which is repeated."""
    rng = np.random.default_rng(2)
    block, _ = make_patch(rng, BANDS, CLASSES, (512, 512))
    rows = np.tile(block, (1, 1, -(-side // 512)))[..., :side]
    profile = {
        "driver": "GTiff", "count": BANDS, "height": side, "width": side, "dtype": "uint16",
        "tiled": True, "blockxsize": 512, "blockysize": 512, "interleave": "pixel",
        "compress": compress, "predictor": 2, "num_threads": "all_cpus",
        "bigtiff": "yes", "crs": CRS, "transform": from_origin(500_000, 4_600_000, 10, 10),
    }  # fmt: skip
    profile["zlevel" if compress == "deflate" else "zstd_level"] = 1
    with rasterio.open(target, "w", **profile) as file:
        for top in range(0, side, 512):
            window = Window(0, top, side, min(512, side - top))
            file.write(rows[:, : window.height], window=window)
    return 0


def toolkit_map(model: str, scene: str, output: str, device: str, words: list) -> dict:
    """A scene mapped by the toolkit, without the start of libraries and model."""
    with contextlib.redirect_stdout(io.StringIO()):
        return toolkit(Path(model), Path(scene), Path(output), device, words)


def plain_map(model: str, scene: str, output: str, device: str) -> dict:
    """A scene mapped as it is often written: all in memory, window by window, in float32."""
    return whole_scene(Path(model), Path(scene), Path(output), device)
