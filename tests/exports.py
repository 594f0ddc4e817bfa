"""Which networks can be exported: the table in docs/models.md.

    python tests/exports.py

exports every decoder, and with a U-Net a member of every family of encoders, compares onnxruntime with
PyTorch, and writes the table. It takes some minutes, so the tests export a few small networks only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.architectures import ARCHITECTURES, ModelConfig
from common.errors import SegmentationError
from exporting.export import trial_images
from exporting.graph import ProbabilityGraph
from exporting.onnx_file import write_onnx
from model_training import Checkpoint, Normalization, build_model

MODELS = ROOT / "docs" / "models.md"
MARK, END = "<!-- exports -->", "<!-- end -->"
HEAD = ["| decoder | encoder | exports | operator set |", "|---|---|---|---|"]
BANDS, CLASSES, SIDE = 4, 3, 128
TEMPERATURE = 0.1  # else the probabilities would be nearly equal
# of decoders; all others get resnet18
ENCODERS = {"dpt": "tu-vit_tiny_patch16_224"}
# a member of each family of models.md
FAMILIES = (
    "resnet18", "efficientnet-b0", "mobilenet_v2", "tu-mobilenetv3_small_100", "densenet121", "vgg11",
)  # fmt: skip


def networks() -> Iterator[tuple[str, str | None]]:
    """Decoder and encoder of each row."""
    for name, entry in ARCHITECTURES.items():
        taken = ENCODERS.get(name, "resnet18") if entry.takes_encoder else None
        yield name, taken or entry.fixed_encoder
    yield from (("unet", family) for family in FAMILIES if family != "resnet18")


def settled(model: nn.Module, bands: int, side: int, momentum: float) -> nn.Module:
    """A network whose batch normalizations have seen random images, ready to predict.

    With a momentum of 1 they hold the statistics of these images alone. In deep networks of random
    weights the rounding of float32 then grows from layer to layer, within PyTorch too.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = momentum
    with torch.no_grad():
        model.train()(torch.rand(4, bands, side, side))
    return model.eval()


def untrained(config: ModelConfig) -> Checkpoint:
    """A network of random weights whose batch normalizations have seen images."""
    torch.manual_seed(0)
    model = settled(build_model(config), config.in_channels, SIDE, momentum=0.1)
    numbers = (0.0,) * config.in_channels, (100.0,) * config.in_channels
    metadata = {"nodata": [0.0] * config.in_channels, "data_type": "uint16"}
    normalization = Normalization("dataset", *numbers)
    return Checkpoint(model, config, normalization, metadata, TEMPERATURE)


def row(name: str, encoder: str | None, folder: Path) -> str:
    """What becomes of a network, as a row of the table."""
    import onnx

    checkpoint = untrained(ModelConfig(name, BANDS, CLASSES, encoder))
    graph, file = ProbabilityGraph([checkpoint]), folder / "network.onnx"
    shown = f"`{encoder}`" if encoder else "-"
    try:
        images = trial_images(checkpoint, SIDE)
        write_onnx(file, graph, (BANDS, SIDE, SIDE), images, {})
    except SegmentationError as error:
        print(f"{name} {encoder}: {error}", file=sys.stderr, flush=True)
        return f"| `{name}` | {shown} | no | |"
    (opset,) = onnx.load(file).opset_import
    return f"| `{name}` | {shown} | yes | {opset.version} |"


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, encoder in networks():
            rows.append(row(name, encoder, Path(folder)))
            print(rows[-1], flush=True)
    before, _, rest = MODELS.read_text().partition(MARK)
    _, _, after = rest.partition(END)
    table = "\n".join([*HEAD, *rows])
    MODELS.write_text(f"{before}{MARK}\n{table}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
