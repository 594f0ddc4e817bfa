"""Whether the toolkit works on a GPU, and how fast: everything that needs one, in one command.

    python tests/gpu.py

prints a line per check, and what was measured as JSON. It takes at most 5 minutes on a GPU with 16
cores, and ends with 0 where nothing has failed, or there is no GPU. It needs what training and
prediction need, and pytest; neither geopandas nor pyogrio. ``--only`` takes names, or how they
begin; ``--device cpu`` makes those checks that a CPU can make.

    python tests/gpu.py --only train predict --json figures.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]  # fmt: skip

from gpu_checks import CHECKS, Check
from gpu_place import Failure, Place, Skip

from common.machine import available_cores

CORES_PER_LANE = 3


@dataclass(frozen=True)
class Result:
    """What became of a check."""

    name: str
    outcome: str  # passed, failed or skipped
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.outcome:8}{self.name:26}{self.seconds:6.1f} s  {self.detail}"


def choose(names: Sequence[str]) -> list[Check]:
    """The checks of these names, or whose names begin so; all without names."""
    chosen = {} if names else CHECKS
    for asked in names:
        found = {n: check for n, check in CHECKS.items() if n.startswith(asked)}
        if not found:
            raise SystemExit(f"no check begins with {asked}; --list shows them")
        chosen |= {asked: found[asked]} if asked in found else found
    return list(chosen.values())


def perform(check: Check, place: Place) -> Result:
    """Make a check; what it raises is its result."""
    started = time.monotonic()
    try:
        if check.gpu_only and not place.on_gpu:
            raise Skip("needs a GPU")
        outcome, detail = "passed", check.run(place)
    except Skip as reason:
        outcome, detail = "skipped", str(reason)
    except Exception as error:  # noqa: BLE001  # the other checks go on
        plain = isinstance(error, Failure)
        outcome = "failed"
        detail = str(error) if plain else f"{type(error).__name__}: {error}"
    return Result(check.name, outcome, detail, time.monotonic() - started)


@contextmanager
def open_place(device: str) -> Iterator[tuple[Place, int]]:
    """A place to work in, and how many checks work in it at a time."""
    cores = available_cores()
    lanes = max(1, cores // CORES_PER_LANE)
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        place = Place(Path(name), device, gpus, lanes, max(1, cores // lanes))
        with closing(place):
            yield place, lanes


def perform_all(
    checks: Sequence[Check], place: Place, lanes: int, show: Callable[[Result], None]
) -> list[Result]:
    """Make checks, several at a time, then those that must be alone."""
    results = []

    def do(check: Check) -> None:
        results.append(perform(check, place))
        show(results[-1])

    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(do, (check for check in checks if not check.alone)))
    for check in checks:
        if check.alone:
            do(check)
    return results


def describe_machine(device: str) -> dict:
    found = {"torch": torch.__version__, "cores": available_cores(), "device": device}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name(0)
        found["memory GB"] = round(torch.cuda.mem_get_info()[1] / 1e9, 1)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="checks that begin so"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="file for results and figures")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    given = parser.parse_args(argv)
    checks = choose(given.only)
    if given.list:
        print("\n".join(check.name for check in checks))
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing to prove (--device cpu makes what a CPU can)")
        return 0
    started = time.monotonic()
    with open_place(given.device) as (place, lanes):
        results = perform_all(checks, place, lanes, lambda r: print(r, flush=True))
        report = describe_machine(given.device) | {
            "seconds": round(time.monotonic() - started, 1),
            "checks": [asdict(result) for result in results],
            "figures": place.figures,
        }
    text = json.dumps(report, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text)
    failed = [result for result in results if result.outcome == "failed"]
    count = f"{len(results) - len(failed)} of {len(results)} fine"
    print(f"{count}, {report['seconds']:.0f} s", file=sys.stderr)
    return 1 if failed else 0


# --- for pytest -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with open_place("cuda") as (place, _):
        yield place


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name, place):
    result = perform(CHECKS[name], place)
    if result.outcome == "skipped":
        pytest.skip(result.detail)
    assert result.outcome == "passed", result.detail


if __name__ == "__main__":
    sys.exit(main())
