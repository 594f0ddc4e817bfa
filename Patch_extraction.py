"""Cut a scene and its label into patches along the cells of a grid.

    python Patch_extraction.py extract --image scene.tif --label label.tif --grid grid.shp \\
        --output data --patch_size 224
    python Patch_extraction.py batch --data_dir scenes --grid grid.shp --output data
    python Patch_extraction.py visualize --output data --split train --sample_index 0
    python Patch_extraction.py info --output data
    python Patch_extraction.py stack --input S2B_MSIL2A_...SAFE --cloud_mask --output scene.vrt

``extract`` and ``batch`` leave ``data/Patch/{train,validation,test}/{images,labels}``, which main.py
trains on, and ``data/Patch/cells.gpkg``, which shows the splits in QGIS.
A patch covers its cell's bounding box in the image's pixels; label pixels outside the cell itself
(a rotated or many-sided one) are unlabelled, so that neighbouring cells share no label.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.console import add_common, add_settings, make_parser, run_command
from extraction.settings import BatchConfig, ExtractionConfig, InfoConfig, SampleConfig
from extraction.stack_settings import StackConfig


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("Patch_extraction.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (config_class, run, text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )  # fmt: skip
        add_settings(command, config_class)
        add_common(command.add_argument_group("about"))
        command.set_defaults(run=run, parser=command)
    return parser


def run_extract(config: ExtractionConfig | BatchConfig) -> int:
    import rasterio

    from common.rasters import gdal_options
    from extraction.dataset import extract
    from extraction.report import extraction_text, has_errors, warn_of_skipped

    with rasterio.Env(**gdal_options()):
        report = extract(config)
    warn_of_skipped(report, config)
    print(extraction_text(report, config))
    return has_errors(report)


def run_visualize(config: SampleConfig) -> int:
    from extraction.report import draw_sample, open_window

    picture = draw_sample(config)
    print(picture)
    if config.show:
        open_window(picture)
    return 0


def run_info(config: InfoConfig) -> int:
    from common.files import write_json
    from extraction.places import draw_splits
    from extraction.report import dataset_info, info_text

    report, places = dataset_info(config)
    folder = Path(config.output)
    write_json(folder / "dataset_info.json", report)
    print(info_text(report))
    if report["overlaps"] is not None:
        draw_splits(places, folder / "dataset_splits.png")
        print(f"Picture: {folder / 'dataset_splits.png'}")
    print(f"Report: {folder / 'dataset_info.json'}")
    return 0


def run_stack(config: StackConfig) -> int:
    import rasterio

    from common.rasters import gdal_options
    from extraction.stack import stack

    with rasterio.Env(**gdal_options()):
        print("\n".join(stack(config)))
    return 0


COMMANDS = {
    "stack": (StackConfig, run_stack, "make a scene of a product, or of single files"),
    "extract": (ExtractionConfig, run_extract, "cut a scene into patches"),
    "batch": (BatchConfig, run_extract, "cut all scenes of a folder into patches"),
    "visualize": (SampleConfig, run_visualize, "draw a patch as a PNG"),
    "info": (InfoConfig, run_info, "report what a dataset holds"),
}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    return run_command(
        arguments.parser,
        arguments,
        arguments.config_class,
        arguments.run,
        scarce="--patch_size or --workers",
        interrupted=lambda: "interrupted",
    )


if __name__ == "__main__":
    sys.exit(main())
