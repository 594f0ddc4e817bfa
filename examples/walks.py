"""Five kinds of data from their files to a judged map, each by one command.

    python examples/walks.py dates

makes data of that kind in ``walks_output/dates`` and runs the commands that docs/walks.md gives
for it, in order, as a user would. It needs no download, no GPU and less than two minutes.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.demo import run_script

PAGE, OUTPUT = ROOT / "docs" / "walks.md", ROOT / "walks_output"
KINDS = ("polygons", "dates", "drone", "crops", "boxes")


def commands_of(kind: str) -> list[list[str]]:
    """The commands that the page gives for a kind of data, as words after ``python``."""
    page = PAGE.read_text(encoding="utf-8")
    (section,) = re.findall(
        rf"^## {kind}: .*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE
    )
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip()]


def build_parser() -> argparse.ArgumentParser:
    """The kind of data, and its steps that no script of the toolkit does."""
    parser = argparse.ArgumentParser(
        description="Walk from made data of a kind to a judged map (docs/walks.md)."
    )
    parser.add_argument("kind", choices=KINDS, help="which kind of data")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--data_only", action="store_true", help="only make the data")
    steps.add_argument(
        "--fill_in",
        action="store_true",
        help="only fill in the sample of boxes, from the truth of the made data",
    )
    return parser


def walk(args: argparse.Namespace) -> None:
    """Make the data, fill in a sample, or run all commands of the page."""
    folder = OUTPUT / args.kind
    if args.fill_in or args.data_only:
        from examples import walk_data

        if args.fill_in:
            walk_data.fill_in_boxes(folder)
        else:
            folder.mkdir(parents=True)
            walk_data.MAKERS[args.kind](folder)
        return
    for words in commands_of(args.kind):
        run_script(*words)


def main(argv: list[str] | None = None) -> int:
    """Walk; 0 done, 1 could not be done, 2 wrong command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.fill_in and args.kind != "boxes":
        parser.error("--fill_in is for boxes: no other kind has a sample")
    if not args.fill_in and (OUTPUT / args.kind).exists():
        place = (OUTPUT / args.kind).relative_to(ROOT)
        print(f"error: {place} exists; delete it to walk again", file=sys.stderr)
        return 1
    try:
        walk(args)
    except subprocess.CalledProcessError as error:
        script, status = error.cmd[1], error.returncode
        print(f"error: {script} ended with status {status}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
