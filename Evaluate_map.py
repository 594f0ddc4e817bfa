"""Judge a class map by labels or by a random sample, or a model by a dataset.

    python Evaluate_map.py --map map.tif --label scene_label.tif

writes the scores as JSON and pictures of them to ``map_evaluation``, and prints them.
"""

from __future__ import annotations

import argparse
import sys

from common.console import add_common, add_settings, make_parser, run_command
from evaluation.settings import SCARCE, EvaluationConfig


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("Evaluate_map.py", __doc__)
    add_settings(parser, EvaluationConfig)
    add_common(parser.add_argument_group("about"))
    return parser


def evaluate(config: EvaluationConfig) -> int:
    from evaluation.outputs import draw_map_sample, evaluate_map, evaluate_model

    kinds = {"map": evaluate_map, "model": evaluate_model, "sample": draw_map_sample}
    print(kinds[config.kind](config))
    what = "Points to label" if config.kind == "sample" else "Report and pictures"
    print(f"\n{what}: {config.output_path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    return run_command(
        parser, arguments, EvaluationConfig, evaluate, SCARCE, interrupted=lambda: None
    )


if __name__ == "__main__":
    sys.exit(main())
