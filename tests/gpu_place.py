"""The place in which ``gpu.py`` works: patches, scenes, trained models and maps, each made once."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import LifoQueue

import numpy as np
import rasterio
from gpu_processes import CallServer, Outcome
from helpers import make_patch, torchrun, write_dataset, write_raster

BANDS, CLASSES, SIDE = 10, 4, 64
LIMIT = 600  # seconds of a call
TRAIN = ("--mode", "multiclass", "--classes", CLASSES, "--batch_size", 4)
SMALL = ("--encoder_name", "resnet18")
# with the epochs after which each knows the classes; the slowest first
MODELS = {
    "deeplabv3_resnet50": ("--epochs", 14, "--batch_size", 2),
    "deeplabv3+": (*SMALL, "--epochs", 6),
    "unet": (*SMALL, "--epochs", 4),
    "unet-dropout": ("--epochs", 4),
}
# of 64 pixels as the patches, so that a scene of a moment has many windows
MAP = ("--patch_size", 128, "--overlap", 32, "--save_confidence")


class Skip(Exception):
    """Why a check cannot be made here."""


class Failure(Exception):
    """What a check has found."""


def require(fine: bool, what: str) -> None:
    if not fine:
        raise Failure(what)


def succeeded(outcome: Outcome, what: str) -> Outcome:
    require(outcome.status == 0, f"{what}: {outcome.last_line}")
    return outcome


class Place:
    """A folder and processes to work in; ``figures`` is what was measured."""

    def __init__(self, folder: Path, device: str, gpus: int, lanes: int, threads: int):
        self.folder, self.device, self.gpus = folder, device, gpus
        self.on_gpu = device == "cuda"
        self.figures: dict[str, object] = {}
        self.made: dict[object, Future] = {}
        self.lock, self.numbers = threading.Lock(), itertools.count(1)
        self.servers: LifoQueue[CallServer] = LifoQueue()
        for _ in range(lanes):
            self.servers.put(CallServer(threads))

    def close(self) -> None:
        while not self.servers.empty():
            self.servers.get().close()

    def once(self, key, make: Callable):
        """What ``make`` gives, or raises; for each key it is called once."""
        with self.lock:
            known = key in self.made
            future = self.made.setdefault(key, Future())
        if not known:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()

    def new_folder(self) -> Path:
        folder = self.folder / f"{next(self.numbers):03}"
        folder.mkdir()
        return folder

    # --- calls --------------------------------------------------------------------------------

    def call(self, function: str, *arguments, prepare=()) -> Outcome:
        """Call a function of this project in a process of its own."""
        folder, server = self.new_folder(), self.servers.get()
        try:
            return server.call(function, arguments, prepare, folder, LIMIT)
        finally:
            self.servers.put(server)

    def words(self, save_dir: Path, *words, model="unet", device=None) -> list[str]:
        """The command line of a training."""
        line = ("--dataset_root", self.dataset(), "--save_dir", save_dir, *TRAIN)
        line = (*line, "--model", model, *MODELS[model])
        line = (*line, "--device", device or self.device, *words)
        return [str(word) for word in line]

    def train(
        self, save_dir: Path, *words, model="unet", device=None, prepare=()
    ) -> Outcome:
        """Train by main.py."""
        line = self.words(save_dir, *words, model=model, device=device)
        return self.call("main.main", line, prepare=prepare)

    def predict(
        self, model, scene: Path, output: Path, *words, device=None, prepare=()
    ) -> Outcome:
        """Map a scene by Predict_large_image.py."""
        line = ("--model", model, "--input", scene, "--output", output)
        line = (*line, "--device", device or self.device, *words)
        line = [str(word) for word in line]
        return self.call("Predict_large_image.main", line, prepare=prepare)

    def torchrun(self, processes: int, save_dir: Path, *words, prepare=()):
        """Train by main.py under torchrun; the process that has started."""
        from gpu_processes import __file__ as script
        from gpu_processes import describe_call

        call = describe_call("main.main", [self.words(save_dir, *words)], prepare)
        return torchrun(processes, [script, json.dumps(call)])

    # --- what is made once --------------------------------------------------------------------

    def dataset(self) -> Path:
        """72 + 8 + 8 patches of 64 pixels, which a network learns in a few epochs."""

        def make() -> Path:
            options = {"bands": BANDS, "classes": CLASSES, "size": SIDE}
            return write_dataset(self.folder / "data", 72, 8, 8, **options)

        return self.once("dataset", make)

    def scene(self, rows: int = 9, columns: int = 10) -> Path:
        """A scene of patches as those of the dataset, none of which training has seen."""

        def make() -> Path:
            rng = np.random.default_rng(1)
            image = np.concatenate(
                [
                    np.concatenate(
                        [
                            make_patch(rng, BANDS, CLASSES, (SIDE, SIDE))[0]
                            for _ in range(columns)
                        ],
                        axis=2,
                    )
                    for _ in range(rows)
                ],
                axis=1,
            )
            return write_raster(self.folder / f"scene_{rows}_{columns}.tif", image)

        return self.once(("scene", rows, columns), make)

    def trained(self, model: str, amp: str, *words, device=None) -> Path:
        """The folder of a finished training."""
        device = device or self.device

        def make() -> Path:
            save_dir = self.new_folder()
            line = ("--amp", amp, *words)
            run = self.train(save_dir, *line, model=model, device=device)
            succeeded(run, f"{model}, --amp {amp} on {device}")
            return save_dir

        return self.once(("trained", model, amp, words, device), make)

    def model(self) -> Path:
        """A checkpoint to map with."""
        return self.trained("unet", "auto") / "model_final_model.pth"

    def map_of(self, models, *words, device=None, scene: Path | None = None) -> Path:
        """The map of a scene."""
        device, scene = device or self.device, scene or self.scene()

        def make() -> Path:
            output = self.new_folder() / "map.tif"
            run = self.predict(models, scene, output, *MAP, *words, device=device)
            succeeded(run, f"the map by {' '.join(map(str, words))} on {device}")
            return output

        return self.once(("map", str(models), words, device, scene), make)


def report_of(save_dir: Path) -> dict:
    return json.loads((save_dir / "model_metrics.json").read_text())


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def same_classes(one: Path, other: Path) -> float:
    """The share of the pixels of two maps that have the same class."""
    return float((read(one) == read(other)).mean())


def beside(output: Path, layer: str) -> Path:
    return output.with_name(f"{output.stem}_{layer}.tif")
