"""Every kind of file that is written to a full disk: the error names the file."""

from __future__ import annotations

import errno
from contextlib import closing
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from helpers import small_files, write_raster
from matplotlib.figure import Figure
from torch import nn

from common.architectures import ModelConfig
from common.errors import SegmentationError, error_message
from common.files import atomic_write, write_json
from common.pictures import save_figure
from common.vectors import write_layer
from extraction.journal import Journal
from model_training import Normalization, save_checkpoint
from prediction.layers import Layer
from prediction.mapfiles import make_cog
from prediction.rowstore import RowStore
from prediction.tiling import Extent


def write_text_of(path: Path) -> None:
    write_json(path, ["much"] * 9_999)


def write_picture(path: Path) -> None:
    figure = Figure()
    figure.subplots().imshow(np.random.default_rng(0).random((99, 99)))
    save_figure(figure, path)


def write_weights(path: Path) -> None:
    model = nn.Module()
    model.network = nn.Linear(99, 99)
    config = ModelConfig("unet", 3, 2, "resnet18")
    save_checkpoint(path, model, config, Normalization(), {})


def write_table(path: Path) -> None:
    places = [shapely.Point(x, 0).buffer(1) for x in range(300)]
    frame = geopandas.GeoDataFrame({"x": range(300)}, geometry=places, crs=32631)
    write_layer(frame, path, driver="GPKG")


def write_cog(path: Path) -> None:
    plain = path.with_name("plain.tif")
    with atomic_write(path) as part:
        make_cog(plain, part, Layer("classes", ["class"], "uint8", 255))


def write_rows(path: Path) -> None:
    layers = {path.stem: Layer(path.stem, ["class"], "uint8", 255)}
    RowStore.begin(path.parent, {}, layers, (300, 300))
    rows = RowStore(path.parent, layers, (300, 300))
    with rows.opened:
        array = np.zeros((1, 300, 300), np.uint8)
        rows.write(Extent(0, 300, 0, 300), {path.stem: array}, np.zeros(1))


def write_journal(path: Path) -> None:
    journal = Journal(path)
    with closing(journal):
        for number in range(999):
            journal.note(f"cell_{number}", {"name": f"cell_{number}"})


@pytest.mark.fault(36)
@pytest.mark.usefixtures("real_pictures")
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("report.json", write_text_of),
        ("plot.png", write_picture),
        ("model.pth", write_weights),
        ("cells.gpkg", write_table),
        ("map.tif", write_cog),
        ("classes.raw", write_rows),
        ("journal.jsonl", write_journal),
    ],
)
def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path, name, write):
    folder = tmp_path / "out"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 9, (1, 512, 512)).astype(np.uint8)
    write_raster(folder / "plain.tif", noise)
    with small_files(4_000), pytest.raises((SegmentationError, OSError)) as caught:
        write(folder / name)
    text = error_message(caught.value, "")
    assert str(folder / name) in text and ".part" not in text
    assert text.endswith("free some, or write elsewhere")


@pytest.mark.fault(36)
def test_other_errors_keep_their_own_names(tmp_path):
    with pytest.raises(OSError, match="elsewhere"), atomic_write(tmp_path / "a") as _:
        raise OSError(errno.ENOSPC, "full", "elsewhere")
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a") as _:
        raise OSError(errno.EIO, "broken")
    assert caught.value.filename is None
