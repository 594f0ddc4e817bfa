"""The five scripts as programs: what stands at their door loads no heavy library.

Each runs in one fresh process, through all that ends before the work begins.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers import ROOT

HEAVY = ("torch", "rasterio", "numpy")
SUBCOMMANDS = ("extract", "batch", "visualize", "info")
DOORS = {
    "main": [
        (["--help"], 0),
        (["--list_models"], 0),
        (["--epochs", "many"], 2),
        (["--dataset_root", "d", "--model", "unet", "--mode", "binary", "--classes", "6"], 2),
        (["--dataset_root", "d", "--model", "unet", "--epochs", "0"], 2),
    ],
    "Predict_large_image": [
        (["--help"], 0),
        (["--patch_size", "many"], 2),
        (["--model", "m", "--input", "a", "--output", "b.tif", "--overlap", "-1"], 2),
    ],
    "Evaluate_map": [
        (["--help"], 0),
        (["--map", "a.tif"], 2),
        (["--map", "a.tif", "--label", "b.tif", "--boundary_tolerance", "x"], 2),
    ],
    "Export_model": [
        (["--help"], 0),
        (["--model", "m.pth"], 2),
        (["--model", "m.pth", "--output", "m.pt"], 2),
        (["--model", "m.pth", "--output", "m.onnx", "--resolution", "0"], 2),
    ],
    "Patch_extraction": [
        (["--help"], 0),
        ([], 2),
        *(([command, "--help"], 0) for command in SUBCOMMANDS),
        *(([command, "--no_such_option"], 2) for command in SUBCOMMANDS),
        (["extract", "--image", "a", "--label", "b", "--output", "c", "--grid", "d",
          "--patch_size", "0"], 2),
    ],
}  # fmt: skip
RUNNER = """
import contextlib, importlib, io, json, sys

name, doors, heavy = json.loads(sys.argv[1])
script, found = importlib.import_module(name), []
for words in doors:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main(words)
        except SystemExit as ended:
            status = ended.code or 0
    loaded = [library for library in heavy if library in sys.modules]
    found.append([status, out.getvalue(), err.getvalue(), loaded])
print(json.dumps(found))
"""


@pytest.mark.parametrize("script", DOORS)
def test_help_and_a_wrong_command_line_load_no_heavy_library(script):
    doors = [words for words, _ in DOORS[script]]
    command = [sys.executable, "-c", RUNNER, json.dumps([script, doors, HEAVY])]
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=100
    )
    for (words, expected), (status, out, err, loaded) in zip(
        DOORS[script], json.loads(done.stdout), strict=True
    ):
        assert status == expected, (words, err)
        assert loaded == [], words
        used, silent = (err, out) if expected else (out, err)
        assert used and not silent, words
        if expected:
            assert "Traceback" not in err
            assert len([line for line in err.splitlines() if "error: " in line]) == 1
