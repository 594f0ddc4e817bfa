"""The files of ``--save_dir``."""

from __future__ import annotations

from pathlib import Path

from common.errors import SegmentationError, require
from common.files import require_folder
from training.settings import TrainingConfig

# what a run writes; what an earlier one left is removed, since its folds would look like new ones
RUN_FILES = (
    "model_best_loss.pth", "model_best_iou.pth", "model_best_combined.pth",
    "model_final_model.pth", "model_last.pth", "model_metrics.json", "model_training_log.csv",
    "model_training_plot.png", "model_reliability.png", "model_test_examples.png",
)  # fmt: skip


def run_files(save_dir: Path) -> list[Path]:
    """The files that a run writes to a folder and to those of its folds that are there."""
    folders = [save_dir]
    for kind in ("", "random/", "block/"):
        folders += save_dir.glob(f"{kind}fold_*")
    return [folder / name for folder in folders for name in RUN_FILES]


def former_files(save_dir: Path) -> list[Path]:
    """The files of an earlier run."""
    return [file for file in run_files(save_dir) if file.is_file()]


def require_new(config: TrainingConfig) -> None:
    """Raise SegmentationError where another run would be lost."""
    found = former_files(Path(config.save_dir))
    if not found or config.resume or config.overwrite:
        return
    if (Path(config.save_dir) / "model_metrics.json") in found:
        raise SegmentationError(
            f"{config.save_dir} holds a finished run; give --overwrite to replace it, or another "
            "--save_dir"
        )
    raise SegmentationError(
        f"{config.save_dir} holds an unfinished run ({found[0].name}); continue it with --resume, "
        "or start again with --overwrite"
    )


def clear_former_run(config: TrainingConfig) -> None:
    """Remove the files of an earlier run, and the folders of its folds where nothing else lies.

    With ``--resume`` they stay: the run continues with them.
    """
    save_dir = Path(config.save_dir)
    if config.resume:
        return
    for file in former_files(save_dir):
        file.unlink()
    for kind in ("random/", "block/", ""):
        for folder in [*save_dir.glob(f"{kind}fold_*"), save_dir / kind]:
            if folder != save_dir and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def require_output(config: TrainingConfig) -> None:
    """Raise SegmentationError where ``--save_dir`` cannot be written to, or should not."""
    require_folder("--save_dir", config.save_dir)
    former = [file.resolve() for file in former_files(Path(config.save_dir))]
    require(
        not config.weights or Path(config.weights).resolve() not in former,
        "--encoder_weights",
        config.weights,
        "another --save_dir: this run would replace the file",
    )
    require_new(config)
