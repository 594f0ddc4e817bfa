"""What all tests of the extraction need."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from batch_helpers import Batch
from site_helpers import Site
from stack_helpers import write_l2a


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def batch(tmp_path) -> Batch:
    return Batch(tmp_path)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing thousands of small patches to a busy disk would take most of the time."""
    monkeypatch.setattr("extraction.dataset.flush", lambda path: None)


@pytest.fixture(autouse=True)
def own_logging():
    """The handler that the script adds goes when its stream goes."""
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def l2a(tmp_path_factory) -> Path:
    """An L2A product that no test changes."""
    return write_l2a(tmp_path_factory.mktemp("l2a"))
