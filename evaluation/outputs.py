"""The files of an evaluation: a folder of JSON, tables and pictures, or a sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import SegmentationError
from common.files import (
    exclusive_lock,
    remove_partial_files,
    require_folder,
    require_new_files,
    write_json,
)
from common.rasters import gdal_options
from common.repeat import command_line, stored_settings
from evaluation.settings import EvaluationConfig

REPORT, EXAMPLES = "evaluation.json", "examples.png"
ESTIMATES, TABLE, AREAS = "estimates.json", "estimates.csv", "estimated_areas.png"
PICTURES = CONFUSION, RELIABILITY, ERRORS = (
    "confusion_matrix.png",
    "reliability.png",
    "errors.png",
)


@contextmanager
def output_folder(config: EvaluationConfig, names: tuple[str, ...]) -> Iterator[Path]:
    """The folder to write files to, locked and without those of an earlier evaluation.

    Raises:
        SegmentationError: They are there and may not be replaced, or it cannot be written to.
    """
    folder = Path(config.output_path)
    if folder.exists() and not folder.is_dir():
        raise SegmentationError(f"--output {folder} is a file; name a folder")
    files = [folder / name for name in names]
    require_folder("--output", folder)
    require_new_files(files, config.overwrite)
    with exclusive_lock("--output", folder, folder):
        remove_partial_files(files)
        yield folder


def write_report(
    config: EvaluationConfig, folder: Path, names: tuple[str, ...], report: dict, draw
) -> None:
    """Write the report, the first of the names, and what ``draw`` makes, in place of earlier ones."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    draw(folder)
    again = {
        "settings": stored_settings(config),
        "command": command_line("Evaluate_map.py", config),
    }
    write_json(folder / names[0], report | again)


def draw_map_sample(config: EvaluationConfig) -> str:
    """Draw a sample of a map to be labelled; what was drawn as text."""
    import rasterio

    from evaluation.sampling import make_sample

    target = Path(config.output_path)
    require_folder("--output", target.parent)
    require_new_files([target], config.overwrite)
    with rasterio.Env(**gdal_options()):
        return make_sample(config)


def estimate_from_sample(config: EvaluationConfig) -> str:
    """Estimate accuracies and areas of a map from a labelled sample; they as text."""
    import rasterio

    from evaluation.figures import draw_areas
    from evaluation.points import estimate_map, write_table
    from evaluation.tables import sample_text

    names = (ESTIMATES, TABLE, AREAS)
    with rasterio.Env(**gdal_options()), output_folder(config, names) as folder:
        report = estimate_map(config)

        def draw(folder: Path) -> None:
            draw_areas(folder / AREAS, report)
            write_table(folder / TABLE, report)

        write_report(config, folder, names, report, draw)
    return sample_text(report)


def evaluate_map(config: EvaluationConfig) -> str:
    """Compare a map with labels and write what comes of it; the scores as text."""
    import rasterio

    from evaluation.figures import draw_confusion, draw_errors, draw_reliability
    from evaluation.maps import compare
    from evaluation.points import is_sample
    from evaluation.tables import map_text

    if is_sample(config.label):
        return estimate_from_sample(config)
    names = (REPORT, *PICTURES)
    with rasterio.Env(**gdal_options()), output_folder(config, names) as folder:
        report, found = compare(config)

        def draw(folder: Path) -> None:
            draw_confusion(folder / CONFUSION, report, "map")
            if "calibration" in report:
                curves = {"map": report["calibration"]}
                draw_reliability(folder / RELIABILITY, curves, "Reliability of the map")
            small = found.thumbnails
            kinds = found.names, found.colours
            draw_errors(folder / ERRORS, small["map"], small["label"], *kinds)

        write_report(config, folder, names, report, draw)
    return map_text(report)


def evaluate_model(config: EvaluationConfig) -> str:
    """Examine a model on a split of a dataset and write what comes of it; the scores as text."""
    import rasterio

    from evaluation.examples import draw_examples
    from evaluation.figures import draw_calibration, draw_confusion
    from evaluation.models import examine
    from evaluation.tables import calibration_line, score_table

    names = (REPORT, CONFUSION, RELIABILITY, EXAMPLES)
    with rasterio.Env(**gdal_options()), output_folder(config, names) as folder:
        report, collector, patches = examine(config)
        result, split = report[config.split], config.split

        def draw(folder: Path) -> None:
            draw_confusion(folder / CONFUSION, result, split)
            draw_calibration(folder / RELIABILITY, report["calibration"], split)
            kinds = patches.names, patches.checkpoint.class_colours
            more = patches.ignore_index, split
            draw_examples(folder / EXAMPLES, collector.examples, *kinds, *more)

        write_report(config, folder, names, report, draw)
    return f"{score_table(result)}\n{calibration_line(report['calibration'])}"
