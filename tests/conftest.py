"""The surroundings that every test needs.

Weights are never downloaded: the hubs are set offline and get an empty cache.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

# what a shell starts in the background ignores Ctrl-C, and so would the scripts that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
pytest.register_assert_rewrite("helpers", "faults")

# where Python may write no bytecode, each process that a test starts would compile PyTorch anew;
# the workers of xdist inherit the folder
_BYTECODE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = _BYTECODE.name

# tiny networks: a second thread only waits, and badly so where the cores are busy; torch reads it
# when it is loaded
os.environ.setdefault("OMP_NUM_THREADS", "1")

from helpers import pictures, write_dataset

_EMPTY_CACHE = tempfile.TemporaryDirectory()
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _EMPTY_CACHE.name,
    "TORCH_HOME": _EMPTY_CACHE.name,
    "https_proxy": "http://127.0.0.1:9",  # nobody listens there: refused at once
}


@pytest.fixture(scope="session", autouse=True)
def _no_pictures():
    """Figures are a pixel each unless a test looks at them: see ``real_pictures``."""
    with pictures(drawn=False):
        yield


@pytest.fixture
def real_pictures():
    """Figures are drawn."""
    with pictures(drawn=True):
        yield


@pytest.fixture
def make_dataset(tmp_path):
    """``write_dataset`` into a fresh folder: ``make_dataset(classes=3, ...) -> Path``."""

    def make(*counts: int, **options) -> Path:
        made = sum(1 for _ in tmp_path.glob("dataset_*"))
        return write_dataset(tmp_path / f"dataset_{made}", *counts, **options)

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A folder in which all scripts succeed; ``place`` is a copy of it."""
    from faults import make_place

    return make_place(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def place(whole, tmp_path, monkeypatch) -> Path:
    """A folder in which all scripts succeed, as the working directory."""
    folder = tmp_path / "place"
    shutil.copytree(whole, folder)
    monkeypatch.chdir(folder)
    # slow on a busy disk
    monkeypatch.setattr("extraction.dataset.flush", lambda path: None)
    return folder
