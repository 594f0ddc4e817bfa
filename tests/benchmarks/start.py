"""What ``--help`` of each script costs beside a bare interpreter with argparse.

    python tests/benchmarks/start.py

starts them in turn, and prints the medians of the CPU seconds and their ratios. The design allows
five times the bare interpreter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST = 5.0
BARE = "import argparse; argparse.ArgumentParser().parse_args()"
COMMANDS = {
    "bare interpreter": ["-c", BARE, "--help"],
    "main.py": ["main.py", "--help"],
    "Patch_extraction.py": ["Patch_extraction.py", "--help"],
    "Patch_extraction.py extract": ["Patch_extraction.py", "extract", "--help"],
    "Predict_large_image.py": ["Predict_large_image.py", "--help"],
    "Evaluate_map.py": ["Evaluate_map.py", "--help"],
}


def cpu_seconds(words: list[str]) -> float:
    """User and system time of a Python process."""
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words} ended with status {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=9, help="of each command, in turn")
    runs = parser.parse_args().runs
    for words in COMMANDS.values():  # the first writes the bytecode
        cpu_seconds(words)
    found = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, words in COMMANDS.items():
            found[name].append(cpu_seconds(words))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    bare = medians["bare interpreter"]
    print("| command | CPU ms | times the bare interpreter |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1000 * seconds:.0f} | {seconds / bare:.1f} |")
    return int(max(medians.values()) > MOST * bare)


if __name__ == "__main__":
    sys.exit(main())
