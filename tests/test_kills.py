"""Scripts that are stopped at random moments: nothing looks finished, and ``--resume`` continues.

Twenty kills of a script would wait for twenty loads of its libraries. So a process loads them
once, computes nothing itself, and splits off another one for every run.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import geopandas
import numpy as np
import pytest
import torch
from helpers import (
    ENCODER,
    ROOT,
    cell,
    grid,
    make_patch,
    write_dataset,
    write_model,
    write_raster,
)
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux"),
]

SERVER = """
import json, os, sys

sys.path.insert(0, {root!r})
import importlib

module = importlib.import_module({script!r})
{preload}
for line in sys.stdin:
    words, log = json.loads(line)
    child = os.fork()
    if not child:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1), os.dup2(target, 2)
        try:
            status = module.main(words)
        except SystemExit as ended:
            status = ended.code
        sys.stdout.flush()
        os._exit(status)
    print(child, flush=True)
    ended = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(ended), flush=True)
"""


class Script:
    """One of the scripts, loaded, with a command line whose ``{out}`` is still to be filled."""

    def __init__(self, name: str, options: str, folder: Path, preload: str):
        code = SERVER.format(root=str(ROOT), script=name, preload=preload)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.options, self.log = options, folder / "log.txt"

    def run(self, out: Path, *more: str, kill=signal.SIGKILL, after: float = 1e9):
        """The exit status of a run, which is sent a signal after some seconds."""
        words = [*self.options.format(out=out).split(), *more]
        print(json.dumps([words, str(self.log)]), file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        end = time.monotonic() + after
        ended = os.pidfd_open(child)
        try:
            if not select.select([ended], [], [], min(after, 600))[0]:
                assert time.monotonic() >= end, "it hangs"
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    signal.pidfd_send_signal(ended, kill)
        finally:
            os.close(ended)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# --- what a run leaves ----------------------------------------------------------------------


def bytes_of(out: Path) -> dict[str, bytes]:
    """All files under their final names, without the times and names in a report."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not any(
            part.startswith(".") for part in Path(name).parts
        ):
            found[name] = path.read_bytes()
            if name.endswith("_statistics.json"):
                report = json.loads(found[name])
                named = ("output", "run", "settings", "command")
                report = {k: report[k] for k in report if k not in named}
                found[name] = json.dumps(report).encode()
            elif name.endswith(".gpkg"):  # holds the time at which it was written
                found[name] = geopandas.read_file(path).to_json().encode()
    return found


def without_times(content):
    """A report or a checkpoint without seconds, dates, folders and the command."""
    if isinstance(content, dict):
        names = ("seconds", "save_dir", "resume", "clock", "command")
        return {k: without_times(v) for k, v in content.items() if k not in names}
    if isinstance(content, list | tuple):
        return [without_times(one) for one in content]
    return content.numpy().tobytes() if isinstance(content, torch.Tensor) else content


def whole_training(out: Path) -> dict:
    """The files of a training, each of which must be whole."""
    found = {}
    for path in sorted(out.glob("model_*")):
        if path.suffix == ".pth":
            found[path.name] = without_times(torch.load(path, weights_only=True))
        elif path.suffix == ".json":
            found[path.name] = without_times(json.loads(path.read_text()))
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(path.open()))
            assert rows and all(None not in row.values() for row in rows)
            found[path.name] = without_times(rows)
        elif path.suffix == ".gpkg":
            table = geopandas.read_file(path, layer=path.stem)
            found[path.name] = table.to_wkt().to_csv()
        else:
            Image.open(path).load()
            found[path.name] = None
    return found


def assert_part_of(found: dict, expected: dict) -> None:
    for name, content in found.items():
        assert content == expected[name], name


# --- the scripts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    image, mask = make_patch(np.random.default_rng(1), 3, 2, (640, 640))
    write_raster(folder / "scene.tif", image)
    write_raster(folder / "label.tif", mask)
    cells = [cell(x, y) for y in range(0, 640, 32) for x in range(0, 640, 32)]
    grid(cells).to_file(folder / "grid.gpkg")
    write_dataset(folder / "data", 24, 6, 4, bands=3)
    write_model(folder / "model.pth")
    return folder


EXTRACT = (
    "extract --image {place}/scene.tif --label {place}/label.tif --grid {place}/grid.gpkg "
    "--output {{out}} --patch_size 32 --workers 2"
)
TRAIN = (
    f"--dataset_root {{place}}/data --save_dir {{{{out}}}} --mode binary --model pspnet "
    f"--encoder_name {ENCODER} --epochs 5 --num_workers 0 --device cpu --batch_size 4"
)
PREDICT = (
    "--model {place}/model.pth --input {place}/scene.tif --output {{out}}/map.tif --device cpu "
    "--patch_size 64 --overlap 32 --precision fp32 --save_confidence --quicklook "
    "--polygons {{out}}/areas.gpkg"
)
SCRIPTS: dict[str, tuple[str, str, Callable]] = {
    "extract": ("Patch_extraction", EXTRACT, bytes_of),
    "train": ("main", TRAIN, whole_training),
    "predict": ("Predict_large_image", PREDICT, bytes_of),
}
# what the scripts load only when the work begins
MODELS = "import segmentation_models_pytorch, timm, torch._dynamo, matplotlib.pyplot"
PRELOAD = {
    "extract": "import extraction.dataset, extraction.report",
    "train": f"{MODELS}, sklearn.model_selection, training.experiment",
    "predict": f"{MODELS}, prediction.scene, pyogrio, scipy.ndimage",
}


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request, place) -> Iterator[tuple[str, Script, Callable, dict, float]]:
    """A script, what reads its results, those of an undisturbed run, and its seconds."""
    name, options, read = SCRIPTS[request.param]
    preload = PRELOAD[request.param]
    runs = Script(name, options.format(place=place), place, preload)
    out = place / f"{request.param}-whole"
    assert runs.run(out) == 0, runs.log.read_text()
    shutil.rmtree(out)
    started = time.monotonic()  # the first has loaded what the others find in memory
    assert runs.run(out) == 0, runs.log.read_text()
    seconds = time.monotonic() - started
    yield request.param, runs, read, read(out), seconds
    runs.close()


def journal_lines(out: Path) -> int:
    """Finished parts of a run that is not."""
    journals = [*out.glob(".*-partial/*.jsonl"), *out.glob(".*-partial/done-*.txt")]
    return sum(path.read_bytes().count(b"\n") for path in journals)


def finished_before(kind: str, message: str) -> bool:
    """Whether an extraction was stopped after its last step: nothing is left to resume."""
    return kind == "extract" and "already holds patches" in message


@pytest.mark.parametrize("moments", [10])
def test_a_script_that_is_killed_leaves_nothing_that_looks_finished(
    script, place, moments
):
    """Each kill hits the run that resumes the one before; a finished one starts anew."""
    kind, runs, read, expected, seconds = script
    rng, out, kills, finished = random.Random(0), place / f"{kind}-killed", 0, 0
    while kills < moments:
        status = runs.run(out, "--resume", after=rng.uniform(0, 0.9 * seconds))
        left = read(out)
        message = runs.log.read_text()
        if status == 0 or finished_before(kind, message):
            assert left == expected
            shutil.rmtree(out)
            finished = 0
            continue
        assert status == -signal.SIGKILL, message
        kills += 1
        if kind == "train":  # the files of the epochs so far
            assert left.keys() <= expected.keys()
            if "model_metrics.json" in left:
                assert left == expected
        else:
            assert_part_of(left, expected)
            if not left:
                assert journal_lines(out) >= finished  # what was finished is kept
                finished = journal_lines(out)
    status = runs.run(out, "--resume")
    message = runs.log.read_text()
    assert status == 0 or finished_before(kind, message), message
    assert read(out) == expected
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name
)
def test_a_script_that_is_interrupted_says_so_and_can_be_resumed(script, place, number):
    kind, runs, read, expected, seconds = script
    rng, out, stops = random.Random(1), place / f"{kind}-{number.name}", 0
    while stops < 4:
        # not before the script has begun
        after = rng.uniform(0.3, max(0.4, 0.9 * seconds))
        status = runs.run(out, "--resume", kill=number, after=after)
        message = runs.log.read_text()
        assert "Traceback" not in message
        if status == 0 or finished_before(kind, message):
            assert read(out) == expected
            shutil.rmtree(out)
            continue
        assert status == 128 + number, message
        assert "interrupted" in message.splitlines()[-1]
        stops += 1
        if kind != "train":
            assert_part_of(read(out), expected)
    status = runs.run(out, "--resume")
    message = runs.log.read_text()
    assert status == 0 or finished_before(kind, message), message
    assert read(out) == expected
