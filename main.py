"""Train a segmentation model on the patches that Patch_extraction.py wrote.

    python main.py --mode multiclass --classes 6 --dataset_root data --model unet++ \\
        --data_augmentation --epochs 50

leaves ``trained_models/model_final_model.pth``, which Predict_large_image.py maps scenes with,
beside the best checkpoints, the scores (JSON, CSV) and a plot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import model_training
import rasters
from rasters import OptionError, SegmentationError


class ListAction(argparse.Action):
    """Prints a list of names and ends, as --help does."""

    def __call__(self, parser, namespace, values, option_string=None):
        listing = getattr(
            model_training, f"get_available_{self.dest.removeprefix('list_')}"
        )
        print("\n".join(listing()))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="main.py", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    rasters.add_settings(parser, model_training.TrainingConfig)
    about = parser.add_argument_group("about")
    for name in ("models", "encoders"):
        about.add_argument(
            f"--list_{name}",
            action=ListAction,
            nargs=0,
            help=f"print the known {name} and end",
        )
    about.add_argument(
        "--check",
        action="store_true",
        help="look at all files and options, measure a batch, tell what stands against the run and "
        "what it will take, and end",
    )
    about.add_argument(
        "--debug", action="store_true", help="show the traceback of any error"
    )
    return parser


def calibration_line(calibration: dict) -> str:
    """How far confidence is from accuracy, before and after the temperature."""
    before, after = calibration["ece_before"], calibration["ece_after"]
    if before is None:
        return "expected calibration error -"
    line = f"expected calibration error {before:.3f}"
    if calibration["temperature"] == 1:
        return line
    return f"{line}, {after:.3f} with temperature {calibration['temperature']:.2f}"


def print_report(report: dict, save_dir: str) -> None:
    """The scores that a user wants to see, on stdout."""
    for key, title in (
        ("pooled", "All folds pooled"),
        ("validation", "Validation"),
        ("test", "Test"),
    ):
        if key in report:
            print(f"\n{title}\n{model_training.score_table(report[key])}")
    if "calibration" in report:
        print(calibration_line(report["calibration"]))
    if "areas" in report:
        print("\nAreas, corrected for the errors of the map, with 95 % intervals")
        print(model_training.area_table(report["areas"]))
    for key, values in report.get("summary", {}).items():
        line = f"{key:17} {values['mean']:.3f}"
        if values["interval_95"]:  # not when a single fold has the score
            low, high = values["interval_95"]
            line += f" +- {values['std']:.3f}  [{low:.3f}, {high:.3f}]"
        if interval := report.get("intervals", {}).get(key):
            low, high = interval
            line += f"  pooled {report['pooled'][key]:.3f}  [{low:.3f}, {high:.3f}]"
        print(line)
    if "optimism" in report:
        gap = {key: entry["interval_95"] for key, entry in report["optimism"].items()}
        print(f"\n{model_training.side_by_side(report['random'], report, gap)}")
    print(f"\nFinal model: {Path(save_dir) / 'model_final_model.pth'}")


def check(config: model_training.TrainingConfig) -> int:
    """Tell what stands against a run, or what it will take; the exit status."""
    faults, outlook = model_training.check_experiment(config)
    if faults.tell() or not rasters.leads():
        return 1 if faults else 0
    patches = ", ".join(f"{n} {split}" for split, n in outlook["patches"].items())
    print(f"patches       {patches}")
    print(f"parameters    {outlook['parameters'] / 1e6:.1f} million")
    print(f"an epoch      {model_training.duration(outlook['epoch_seconds'])}")
    total = model_training.duration(outlook["total_seconds"])
    print(f"all epochs    {total} at most, less if training stops early")
    if outlook["memory"]:
        print(f"memory        {outlook['memory'] / 1e9:.1f} GB")
    print("Nothing stands against this run.")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    rasters.show_messages()
    try:
        config = rasters.settings_from(model_training.TrainingConfig, arguments)
        if arguments.check:
            return check(config)
        with rasters.ending_as_ctrl_c():
            report = model_training.run_experiment(config)
        if rasters.leads():
            print_report(report, config.save_dir)
    except OptionError as error:
        if arguments.debug:
            raise
        parser.error(str(error))
    except (SegmentationError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        print(f"error: {rasters.explain(error, '--batch_size')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        best = Path(arguments.save_dir) / "model_best_combined.pth"
        so_far = f"the best model so far is {best}; " if best.exists() else ""
        if rasters.leads():
            print(f"interrupted; {so_far}--resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
