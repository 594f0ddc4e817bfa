"""Train a segmentation model on the patches that Patch_extraction.py wrote.

    python main.py --mode multiclass --classes 6 --dataset_root data --model unet++ \\
        --data_augmentation --epochs 50

leaves ``trained_models/model_final_model.pth``, which Predict_large_image.py maps scenes with,
beside the best checkpoints, the scores (JSON, CSV) and a plot.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from common.architectures import get_available_models
from common.console import add_common, add_settings, make_parser, run_command
from common.machine import is_main_process
from training.settings import TrainingConfig


def get_available_encoders() -> list[str]:
    """See ``model_training``, which takes seconds to import."""
    import model_training

    return model_training.get_available_encoders()


class ListAction(argparse.Action):
    """Prints the names that ``const`` gives and ends, as --help does."""

    def __call__(self, parser, namespace, values, option_string=None):
        print("\n".join(self.const()))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("main.py", __doc__)
    add_settings(parser, TrainingConfig)
    about = parser.add_argument_group("about")
    for kind, names in (
        ("models", get_available_models),
        ("encoders", get_available_encoders),
    ):
        about.add_argument(
            f"--list_{kind}",
            action=ListAction,
            nargs=0,
            const=names,
            help=f"print the known {kind} and end",
        )
    about.add_argument(
        "--check",
        action="store_true",
        help="check all files and options, measure a batch, report the problems found or what the "
        "run will take, and end",
    )
    add_common(about)
    return parser


def train(config: TrainingConfig) -> int:
    from evaluation.tables import report_text
    from training.experiment import run_experiment

    report = run_experiment(config)
    if is_main_process():
        print(report_text(report))
        print(f"\nFinal model: {Path(config.run_dir) / 'model_final_model.pth'}")
        print(
            "Predict_large_image.py maps with windows of the size of the patches, or with larger ones "
            "where its trial on the scene finds the same classes."
        )
    return 0


def check(config: TrainingConfig) -> int:
    from training.preflight import check_experiment, outlook_text

    problems, outlook = check_experiment(config)
    if not problems.report() and is_main_process():
        print(outlook_text(outlook))
    return 1 if problems else 0


def interrupted(save_dir: str, since: float) -> str | None:
    """The line after an interruption; ``since`` is when the run began, 0 for a resumed one."""
    if not is_main_process():
        return None
    best = Path(save_dir) / "model_best_combined.pth"
    there = best.exists() and best.stat().st_mtime >= since
    so_far = f"the best model so far is {best}; " if there else ""
    return f"interrupted; {so_far}--resume continues the run"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    return run_command(
        parser,
        arguments,
        TrainingConfig,
        check if arguments.check else train,
        scarce="--batch_size",
        interrupted=partial(
            interrupted, arguments.save_dir, 0 if arguments.resume else time.time()
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
