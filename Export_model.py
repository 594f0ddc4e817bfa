"""Write a trained model, or several, as one ONNX file for other tools.

    python Export_model.py --model trained_models/model_final_model.pth --output model.onnx

The file takes the scene's own values and gives probabilities: it finds invalid pixels, normalizes,
runs the networks and averages them. It holds what QGIS's plugin Deepness needs to know. Beside it lie
a STAC item for catalogues (``.json``) and a card for people (``.md``).
"""

from __future__ import annotations

import argparse
import sys

from common.console import add_common, add_settings, make_parser, run_command
from exporting.settings import SCARCE, ExportConfig


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("Export_model.py", __doc__)
    add_settings(parser, ExportConfig)
    add_common(parser.add_argument_group("about"))
    return parser


def export(config: ExportConfig) -> int:
    from exporting.export import export_model

    for file in export_model(config):
        print(file)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    return run_command(
        parser, arguments, ExportConfig, export, SCARCE, interrupted=lambda: None
    )


if __name__ == "__main__":
    sys.exit(main())
