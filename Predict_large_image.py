"""Map a scene of any size with a trained model, or with several.

    python Predict_large_image.py --model trained_models/model_final_model.pth \\
        --input scene.tif --output map.tif --save_confidence --quicklook

leaves ``map.tif`` with a class per pixel on the scene's own pixel grid, beside it the confidence,
the statistics as JSON and a picture. A window slides over the scene; where windows overlap, their
probabilities are blended with weights that sum to one. Only the rows to which later windows still
add are in memory: threads read ahead of them, others store what is finished and write the maps.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from common.console import add_common, add_settings, make_parser, run_command
from common.machine import is_main_process
from prediction.settings import SCARCE, PredictionConfig


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("Predict_large_image.py", __doc__)
    add_settings(parser, PredictionConfig)
    about = parser.add_argument_group("about")
    about.add_argument(
        "--check",
        action="store_true",
        help="check all files and options, predict a batch, report the problems found and what "
        "the run will take, and end",
    )
    add_common(about)
    return parser


def predict(config: PredictionConfig) -> int:
    import rasterio

    from common.rasters import gdal_options
    from prediction.reader import GDAL_CACHE
    from prediction.scene import predict_scenes

    with rasterio.Env(**gdal_options(GDAL_CACHE)):
        return 1 if predict_scenes(config, show=partial(print, flush=True)) else 0


def check(config: PredictionConfig) -> int:
    import rasterio

    from common.rasters import gdal_options
    from prediction.preflight import check_scenes, outlook_text
    from prediction.reader import GDAL_CACHE

    with rasterio.Env(**gdal_options(GDAL_CACHE)):
        problems, outlook = check_scenes(config)
    if not problems.report() and is_main_process():
        print(outlook_text(outlook))
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    return run_command(
        parser,
        arguments,
        PredictionConfig,
        check if arguments.check else predict,
        scarce=SCARCE,
        interrupted=lambda: "interrupted; --resume continues an unfinished map",
    )


if __name__ == "__main__":
    sys.exit(main())
