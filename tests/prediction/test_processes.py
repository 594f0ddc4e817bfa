"""Prediction by several processes, and by processes that are killed.

These run the script as a user does, since a signal and torchrun need processes of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import geopandas
import numpy as np
import pytest
from helpers import ROOT, torchrun, write_raster

from common.architectures import ModelConfig
from model_training import Normalization, build_model, save_checkpoint

pytestmark = pytest.mark.slow
SCRIPT = str(ROOT / "Predict_large_image.py")
OPTIONS = [
    *("--patch_size", "64", "--overlap", "16", "--precision", "fp32", "--device", "cpu"),
    *("--save_confidence", "--save_uncertainty", "--save_probabilities", "--sieve", "900"),
    *("--suggest", "4", "--cell_size", "32"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A scene of 600 x 220 pixels with a hole, and a network that looks at neighbours."""
    import torch

    folder = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 10_000, (3, 600, 220)).astype(np.uint16)
    pixels[:, 40:120, 100:190] = 0
    write_raster(folder / "scene.tif", pixels, nodata=0)
    torch.manual_seed(0)
    config = ModelConfig("unet", 3, 4, "resnet18")
    model = build_model(config)
    normalization = Normalization("dataset", (1.0,) * 3, (1e4,) * 3)
    save_checkpoint(folder / "model.pth", model, config, normalization, {})
    return folder


def command(folder: Path, output: Path, *more: str) -> list[str]:
    files = ["--model", folder / "model.pth", "--input", folder / "scene.tif"]
    return [SCRIPT, *map(str, files), "--output", str(output), *OPTIONS, *more]


def contents(output: Path) -> dict[str, bytes]:
    """All that was written for a map, by ending; of a GeoPackage, which is dated, the table."""
    stem, found = output.stem, {}
    for path in sorted(output.parent.glob(f"{stem}*")):
        if path.suffix == ".gpkg":
            table = geopandas.read_file(path, layer=path.stem)
            found[path.name.removeprefix(stem)] = table.to_json().encode()
        elif path.suffix != ".json":
            found[path.name.removeprefix(stem)] = path.read_bytes()
    return found


NAMED = ("output", "run", "settings", "command")


def report(output: Path) -> dict:
    """The statistics without the files' names and what may differ between runs."""
    found = json.loads((output.parent / f"{output.stem}_statistics.json").read_text())
    return {key: found[key] for key in found if key not in NAMED}


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """The map that a single, undisturbed process makes."""
    output = folder / "whole" / "map.tif"
    subprocess.run(
        [sys.executable, *command(folder, output)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return output


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_file_that_one_writes(folder, whole, processes):
    output = folder / f"by_{processes}" / "map.tif"
    run = torchrun(processes, command(folder, output))
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert contents(output) == contents(whole)
    assert report(output) == report(whole)
    assert out.count("nodata") == 1  # the first process alone reports
    assert not (output.parent / ".map.tif-partial").exists()


def test_pieces_of_columns_shared_by_processes_change_nothing(folder, whole):
    output = folder / "pieces" / "map.tif"
    run = torchrun(2, command(folder, output, "--max_memory", "0.0005"))
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert contents(output) == contents(whole)
    made = json.loads((output.parent / "map_statistics.json").read_text())["run"]
    assert len(made["columns"]) > 1


def test_as_many_scenes_as_processes_are_mapped_one_by_one(folder, whole):
    scenes = folder / "scenes"
    scenes.mkdir()
    for name in ("map", "other", "third"):
        (scenes / f"{name}.tif").write_bytes((folder / "scene.tif").read_bytes())
    (scenes / "bad.tif").write_text("no raster")
    files = ["--model", str(folder / "model.pth"), "--input", str(scenes)]
    run = torchrun(2, [SCRIPT, *files, "--output", str(folder / "maps"), *OPTIONS])
    out, err = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "bad.tif" in err
    line = "mosaic.vrt: not yet, 1 of 4 maps are missing"
    assert err.count(line) == 1  # the first process looks, when all have finished
    for name in ("map", "other", "third"):
        output = folder / "maps" / f"{name}_prediction.tif"
        assert contents(output) == contents(whole)
        assert str(output) in out


SLOW = """
import sys, time
from pathlib import Path

sys.path.insert(0, {root!r})
import Predict_large_image
from prediction.rowstore import RowStore

begin, write = RowStore.__init__, RowStore.write


def marked(self, *arguments):
    Path({marker!r}).touch()
    begin(self, *arguments)


def slowly(self, *arguments):
    time.sleep(0.5)
    write(self, *arguments)


RowStore.__init__, RowStore.write = marked, slowly
sys.exit(Predict_large_image.main())
"""


@pytest.fixture
def slow(tmp_path_factory) -> Path:
    """A script that predicts, but waits before every window row that it stores.

    A file ``begun`` appears beside it when the first is about to come.
    """
    script = tmp_path_factory.mktemp("slow") / "slow.py"
    marker = str(script.with_name("begun"))
    script.write_text(SLOW.format(root=str(ROOT), marker=marker))
    return script


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_process_that_dies_leaves_no_map_and_says_so(folder, whole, slow, tmp_path):
    """The last of three, and the first of two that go on; what was finished is not lost."""
    output = tmp_path / "map.tif"
    partial, finished = tmp_path / ".map.tif-partial", 0

    def stored() -> int:
        lines = set()  # while journals become one, some parts are in two
        for journal in partial.glob("done-*.txt"):
            with contextlib.suppress(FileNotFoundError):
                lines.update(journal.read_text().splitlines())
        return len(lines)

    for processes, victim in ((3, 2), (2, 0)):
        run = torchrun(processes, [str(slow), *command(folder, output, "--resume")[1:]])
        wait_for(lambda done=finished: stored() > done)
        os.kill(sorted(children(run.pid))[victim], signal.SIGKILL)
        _, err = run.communicate(timeout=120)
        assert run.returncode
        assert "interrupted" in err or "has ended" in err
        assert not list(tmp_path.glob("map*"))
        assert stored() > finished
        finished = stored()
    subprocess.run([sys.executable, *command(folder, output, "--resume")], check=True)
    assert contents(output) == contents(whole)


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_process_says_how_to_go_on(folder, whole, slow, tmp_path, name):
    output = tmp_path / "map.tif"
    arguments = command(folder, output)[1:]
    run = subprocess.Popen(
        [sys.executable, str(slow), *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = tmp_path / ".map.tif-partial" / "done-0.txt"
    wait_for(lambda: journal.exists() and journal.stat().st_size)
    run.send_signal(getattr(signal, name))
    _, err = run.communicate(timeout=60)
    assert run.returncode == 128 + getattr(signal, name)
    assert "--resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == [".map.tif-partial"]
    subprocess.run([sys.executable, *command(folder, output, "--resume")], check=True)
    assert contents(output) == contents(whole)
