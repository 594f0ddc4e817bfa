"""The files of ``--save_dir``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common.errors import SegmentationError, require
from common.files import (
    compare_runs,
    exclusive_lock,
    fingerprint,
    remove_partial_files,
    require_folder,
)
from training.settings import TrainingConfig

START_ANEW = "start again with --overwrite"

START_COPY = "model_start.pth"  # of the model of --start_from

# what a run writes; what an earlier one left is removed, since its folds would look like new ones
RUN_FILES = (
    "model_best_loss.pth", "model_best_iou.pth", "model_best_combined.pth",
    "model_final_model.pth", "model_last.pth", "model_metrics.json", "model_training_log.csv",
    START_COPY, "model_training_plot.png", "model_reliability.png", "model_test_examples.png",
    "model_learning_curve.png", "model_patches.gpkg", "model_patches.png",
    "model_label_audit.gpkg",
)  # fmt: skip


def run_files(run_dir: str | Path) -> list[Path]:
    """The files that a run writes to a folder and to those of its folds that are there."""
    folders = [Path(run_dir)]
    for kind in ("", "random/", "block/"):
        folders += Path(run_dir).glob(f"{kind}fold_*")
    folders += Path(run_dir).glob("curve_*")
    return [folder / name for folder in folders for name in RUN_FILES]


def former_files(run_dir: str | Path) -> list[Path]:
    """The files of an earlier run."""
    return [file for file in run_files(run_dir) if file.is_file()]


def folds_trained_alone(config: TrainingConfig) -> list[Path]:
    """The reports of folds that ``--only_fold`` trained and no run has gathered; none for others."""
    save_dir = Path(config.save_dir)
    whole = any((save_dir / name).is_file() for name in RUN_FILES)
    fits = config.val_strategy == "kfold" and config.fold_by != "both"
    if whole or not fits or config.only_fold is not None or config.overwrite:
        return []
    reports = sorted(save_dir.glob("fold_*/model_metrics.json"))
    return [file for file in reports if "settings" in json.loads(file.read_text())]


def require_new(config: TrainingConfig) -> None:
    """Raise SegmentationError where another run would be lost, or gathered with other settings."""
    run_dir = Path(config.run_dir)
    if config.only_fold is not None:
        save_dir = Path(config.save_dir)
        found = [save_dir / name for name in RUN_FILES if (save_dir / name).is_file()]
        if found:
            raise SegmentationError(
                f"{config.save_dir} holds a run of all folds ({found[0]}); --only_fold needs "
                "another --save_dir"
            )
    gathered, present = folds_trained_alone(config), fingerprint(config)
    for report in gathered:
        settings = json.loads(report.read_text())["settings"]
        former = {name: settings.get(name) for name in present}
        if present["batch_size"] == "auto":  # one size for all folds
            present["batch_size"] = former["batch_size"]
        compare_runs(former, present, report.parent, START_ANEW)
    found = former_files(run_dir)
    if not found or config.resume or config.overwrite or gathered:
        return
    if (run_dir / "model_metrics.json") in found:
        raise SegmentationError(
            f"{run_dir} holds a finished run; give --overwrite to replace it, or another "
            "--save_dir"
        )
    raise SegmentationError(
        f"{run_dir} holds an unfinished run ({found[0].name}); continue it with --resume, "
        "or start again with --overwrite"
    )


def clear_former_run(config: TrainingConfig) -> None:
    """Remove the files of an earlier run, and the folders of its folds where nothing else lies.

    With ``--resume`` they stay: the run continues with them.
    """
    run_dir = Path(config.run_dir)
    if config.resume:
        return
    kept = folders_of_jobs(config)
    for kind in ("random/", "block/", ""):
        for folder in run_dir.glob(f"{kind}fold_*"):
            if folder not in kept:
                with exclusive_lock("--save_dir", folder, folder):
                    pass  # none that a job with --only_fold trains now
    for file in former_files(run_dir):
        file.unlink()
    for kind in ("random/", "block/", ""):
        for folder in [*run_dir.glob(f"{kind}fold_*"), run_dir / kind]:
            if folder != run_dir:
                remove_empty(folder)
    for folder in run_dir.glob("curve_*"):
        remove_empty(folder)


def folders_of_jobs(config: TrainingConfig) -> list[Path]:
    """Where jobs with ``--only_fold`` would train the folds of a run of all; none for others."""
    if config.val_strategy != "kfold" or config.only_fold is not None:
        return []
    numbers = range(1, config.n_splits + 1)
    return [Path(config.save_dir, f"fold_{number}") for number in numbers]


def remove_empty(folder: Path) -> None:
    """Remove a folder in which nothing lies, if it is there."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@contextmanager
def writing_alone(config: TrainingConfig) -> Iterator[None]:
    """Lock the folders of a run, and remove what a killed one has left of its files.

    A run of all folds locks those of all its folds from the beginning, so that no job with
    ``--only_fold`` replaces one; jobs of different folds lock nothing in common.

    Raises:
        SegmentationError: Another run has locked one.
    """
    run_dir, folds = Path(config.run_dir), folders_of_jobs(config)
    with ExitStack() as stack:
        for folder in folds:
            stack.callback(remove_empty, folder)
        for folder in (run_dir, *folds):
            stack.enter_context(exclusive_lock("--save_dir", folder, folder))
        remove_partial_files(run_files(run_dir))
        yield


def require_output(config: TrainingConfig) -> None:
    """Raise SegmentationError where ``--save_dir`` cannot be written to, or should not."""
    require_folder("--save_dir", config.save_dir)
    former = [file.resolve() for file in former_files(config.run_dir)]
    require(
        not config.weights or Path(config.weights).resolve() not in former,
        "--encoder_weights",
        config.weights,
        "another --save_dir: this run would replace the file",
    )
    require_new(config)
