"""What scripts say on stderr beside their errors: plain lines, each once."""

from __future__ import annotations

import logging
import re
import warnings

import numpy as np
import pytest
import rasterio
from helpers import write_raster

import Patch_extraction
from common.console import show_messages

fault = pytest.mark.fault


@pytest.fixture(autouse=True)
def _loggers_as_before():
    root = logging.getLogger()
    handlers = root.handlers[:]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield
    root.handlers[:] = handlers


@fault(51)
def test_warnings_of_libraries_are_one_plain_line_each(capsys):
    show_messages()
    for _ in range(2):
        warnings.warn("the values\n  are strange", UserWarning, stacklevel=1)
        warnings.warn("an old name", FutureWarning, stacklevel=1)
        logging.getLogger("some.library").warning("%d layers are new", 3)
        logging.getLogger("pyogrio._io").warning("what our errors say too")
    assert capsys.readouterr().err.splitlines() == [
        "warning: the values are strange",
        "warning: 3 layers are new",
    ]


@fault(51)
def test_a_label_that_is_warped_is_named_once(tmp_path, capsys):
    rng = np.random.default_rng(0)
    image = rng.integers(1, 99, (1, 64, 64)).astype(np.uint8)
    write_raster(tmp_path / "scene.tif", image)
    label = tmp_path / "label.tif"
    write_raster(label, rng.integers(0, 2, (64, 64)).astype(np.uint8))
    with rasterio.open(label, "r+") as file:
        a, b, c, *others = file.transform[:6]
        file.transform = rasterio.Affine(a, b, c + a / 2, *others)
    words = ["extract", "--image", tmp_path / "scene.tif", "--label", label]
    words += ["--output", tmp_path / "out", "--patch_size", 32]
    assert Patch_extraction.main(list(map(str, words))) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum("is warped onto" in line for line in lines) == 1
    assert not [line for line in lines if re.search(r"\.py:\d+", line)]
