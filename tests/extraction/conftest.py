"""What all tests of the extraction need."""

from __future__ import annotations

import logging
import os

import pytest
from batch_helpers import Batch
from site_helpers import Site


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def batch(tmp_path) -> Batch:
    return Batch(tmp_path)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing the disks of the whole machine at each extraction would take most of the time."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(autouse=True)
def own_logging():
    """The handler that the script adds goes when its stream goes."""
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)
