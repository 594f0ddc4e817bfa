"""The processes that prepare batches: how they start beside others, and that they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, settings, write_dataset

from common.distributed import ProcessGroup
from common.patches import list_pairs
from model_training import Normalization
from training.loaders import make_loader
from training.samples import PatchDataset, index_samples

READER = """
import sys
from pathlib import Path

import torch
from helpers import settings
from training.loaders import make_loader
from common.distributed import ProcessGroup
from common.patches import list_pairs
from model_training import Normalization
from training.samples import PatchDataset, index_samples

if __name__ == "__main__":
    index = index_samples(list_pairs(Path(sys.argv[1]), "train"), 2, 255)
    dataset, gpu = PatchDataset(index, 255), torch.device("cuda:0")
    config = settings(num_workers="1", batch_size=1)
    options = Normalization("image"), config, ProcessGroup(), gpu
    batches = iter(make_loader(dataset, *options).loader)  # in main memory
    next(batches)
    print("reads", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def dataset(tmp_path) -> PatchDataset:
    pairs = list_pairs(write_dataset(tmp_path / "data", 4, 0, 0, bands=2), "train")
    return PatchDataset(index_samples(pairs, 2, 255), 255)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_reading_draws_nothing_from_the_generator_of_the_network(dataset, workers):
    """Dropout would depend on the number of processes, and on where a run was resumed."""
    config = settings(num_workers=workers, batch_size=2)
    options = Normalization("image"), config, ProcessGroup(), torch.device("cpu")
    loader = make_loader(dataset, *options)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in range(2):
        list(loader)
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked")
def test_workers_beside_collectives_are_not_forked_whoever_reads(dataset, monkeypatch):
    """The main process evaluates by itself while the process group is there."""
    config, alone = settings(num_workers="1"), ProcessGroup()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    options = Normalization("image"), config, alone, torch.device("cpu")
    loader = make_loader(dataset, *options).loader
    assert loader.multiprocessing_context.get_start_method() == "forkserver"
    assert not loader.dataset.in_memory


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_workers_end_when_the_process_that_trains_is_killed(tmp_path):
    """They hold its output open as long as they are there."""
    write_dataset(tmp_path / "data", 4, 0, 0, bands=2)
    script = tmp_path / "reader.py"
    script.write_text(READER)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "data"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": paths},
        text=True,
    )
    lines = iter(process.stdout.readline, "reads\n")
    assert not [line for line in lines if "Error" in line or not line]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
