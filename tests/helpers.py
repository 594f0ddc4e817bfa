"""What several test files need: synthetic rasters and datasets, and patches of functions.

``write_raster`` and ``write_dataset`` make files with a real CRS and an off-origin transform.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave

import main
from common.architectures import ModelConfig
from model_training import Normalization, build_model, save_checkpoint
from training.settings import TrainingConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "common", "extraction", "training", "evaluation", "prediction", "exporting",
)  # fmt: skip
CRS = "EPSG:32631"
PIXEL = 10.0
CORNER = (431_240, 4_912_560)  # where write_geotiff begins
ORIGIN = (500_030.0, 4_649_970.0)
SENTINEL = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
IGNORE = 255  # unlabelled
MODES = ("binary", "multiclass")
CLASSES = 4  # of ``draw_batch``
ENCODER = "tu-test_resnet"  # the quickest to build, where it is not the subject
TINY_ENCODER = "tu-mobilenetv3_small_050"
TINY = ("--model", "linknet", "--encoder_name", ENCODER)
QUICK = (*TINY, "--epochs", 1, "--num_workers", 0, "--device", "cpu")


# --- functions replaced --------------------------------------------------------------------


def load_all_modules() -> None:
    """Import every module of the project, so that a patch reaches all that use a name.

    Those that need a library which is not installed (a GPU machine may lack some) are left out.
    """
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            name = f"{package}.{path.stem}".removesuffix(".__init__")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name.split(".")[0] in (*PACKAGES, "model_training"):
                    raise


def resolve(dotted: str):
    """The module or class that holds a dotted name, and the name's last part."""
    load_all_modules()
    path, _, name = dotted.rpartition(".")
    if path in sys.modules:
        return sys.modules[path], name
    module, _, class_name = path.rpartition(".")
    return getattr(sys.modules[module], class_name), name


def patch_everywhere(monkeypatch, dotted: str, value) -> None:
    """Replace a function or constant in its module and in all that have imported it by name.

    Args:
        monkeypatch: The fixture, which undoes it.
        dotted: As "common.machine.free_memory", or a method, as "prediction.mapfiles.MapWriter.advance".
        value: What takes its place.
    """
    owner, name = resolve(dotted)
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, value)
    for key, loaded in list(sys.modules.items()):
        ours = key.split(".")[0] in (*PACKAGES, "model_training")
        if ours and getattr(loaded, name, None) is original:
            monkeypatch.setattr(loaded, name, value)


def signal_during(monkeypatch, dotted: str, call: int, number: int) -> list:
    """Send this process a signal in a call of a function, which goes on; the calls that ended."""
    owner, name = resolve(dotted)
    function, ended = getattr(owner, name), []

    def signalled(*arguments, **options):
        if len(ended) + 1 == call:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # the handler runs in the main thread
        result = function(*arguments, **options)
        ended.append(arguments)
        return result

    patch_everywhere(monkeypatch, dotted, signalled)
    return ended


def interrupt(monkeypatch, dotted: str, call: int, error=KeyboardInterrupt) -> list:
    """Have the n-th call of a function raise; the list of the calls."""
    owner, name = resolve(dotted)
    plain, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise error
        return plain(*arguments, **options)

    patch_everywhere(monkeypatch, dotted, interrupted)
    return calls


# --- pictures ------------------------------------------------------------------------------

DRAW = Figure.savefig


def save_a_pixel(figure: Figure, target, **_) -> None:
    """A PNG of one pixel in place of a drawing, which takes a second of text and layout."""
    imsave(target, np.zeros((1, 1, 3)), format="png")


@contextlib.contextmanager
def pictures(drawn: bool):
    """Whether figures are drawn as they are saved, or a pixel is written in their place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", DRAW if drawn else save_a_pixel)
        yield


# --- rasters and grids ---------------------------------------------------------------------


@contextmanager
def small_files(size: int):
    """Every write beyond so many bytes of a file fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writes_none = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # it would be cut off, for all processes
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sys.dont_write_bytecode = writes_none


def write_raster(
    path: Path,
    array: np.ndarray,
    nodata: float | None = None,
    descriptions: tuple[str, ...] = (),
    tags: dict | None = None,
    origin: tuple[float, float] = ORIGIN,
    crs: str | None = CRS,
    pixel: float = PIXEL,
) -> Path:
    """Write (C, H, W) or (H, W) as a GeoTIFF whose upper left corner is ``origin``."""
    import rasterio

    bands = array if array.ndim == 3 else array[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(bands),
        height=bands.shape[1],
        width=bands.shape[2],
        dtype=bands.dtype,
        crs=crs,
        transform=rasterio.transform.from_origin(*origin, pixel, pixel),
        nodata=nodata,
    ) as file:
        file.write(bands)
        for index, text in enumerate(descriptions, start=1):
            file.set_band_description(index, text)
        file.update_tags(**(tags or {}))
    return path


def write_geotiff(
    path: Path, pixels, descriptions=None, colours=None, mask=None, **profile
) -> Path:
    """Write (C, H, W) or (H, W) pixels as a GeoTIFF with a CRS and an off-origin transform."""
    import rasterio
    from rasterio.transform import from_origin

    pixels = np.asarray(pixels)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    profile = {
        "dtype": pixels.dtype,
        "crs": CRS,
        "transform": from_origin(*CORNER, PIXEL, PIXEL),
    } | profile
    shape = {"count": count, "height": height, "width": width}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", **shape, **profile) as file,
    ):
        if descriptions:
            file.descriptions = descriptions
        if colours:
            file.colorinterp = colours
        file.write(pixels)
        if mask is not None:
            file.write_mask(mask)
    return path


def cell(column: float, row: float, side: float = 32):
    """A square in pixels of the scene, on the ground."""
    from shapely import box

    left, top = ORIGIN[0] + column * PIXEL, ORIGIN[1] - row * PIXEL
    return box(left, top - side * PIXEL, left + side * PIXEL, top)


def grid(cells=None, crs=CRS, **columns):
    """A grid of cells; by default four that tile the scene."""
    import geopandas

    cells = cells or [cell(x, y) for y in (0, 32) for x in (0, 32)]
    columns = columns or {"id": list(range(1, len(cells) + 1))}
    return geopandas.GeoDataFrame(columns, geometry=cells, crs=crs)


# --- datasets ------------------------------------------------------------------------------


def make_patch(
    rng: np.random.Generator,
    bands: int = 10,
    classes: int = 2,
    size: tuple[int, int] = (32, 32),
    dtype: str = "uint16",
) -> tuple[np.ndarray, np.ndarray]:
    """An image (C, H, W) whose spectra differ by class, and its label (H, W) uint8.

    Classes are upright stripes at a random place, of unequal widths, each with a spectrum of
    its own.
    """
    height, width = size
    stripes = (classes * (np.arange(width) / width) ** 1.5).astype(int)
    label = np.tile(np.roll(stripes, rng.integers(width)), (height, 1)).astype(np.uint8)
    spectra = np.random.default_rng(7).uniform(0.1, 0.9, (classes, bands))
    image = np.moveaxis(spectra[label], -1, 0) + rng.normal(
        0, 0.02, (bands, height, width)
    )
    scale = 10_000 if np.dtype(dtype).kind in "ui" else 1
    if np.dtype(dtype).itemsize == 1:
        scale = 250
    return (np.clip(image, 0, 1) * scale).astype(dtype), label


def write_dataset(
    root: Path,
    train: int = 6,
    validation: int = 3,
    test: int = 2,
    *,
    bands: int = 10,
    classes: int = 2,
    size: int | tuple[int, int] = 32,
    dtype: str = "uint16",
    nodata: float | None = None,
    label_nodata: float | None = None,
    invalid_rows: int = 0,
    unlabelled_rows: int = 0,
    descriptions: tuple[str, ...] = (),
    tags: dict | None = None,
    folder: str = "Patch",
    suffix: str = ".tif",
    seed: int = 0,
) -> Path:
    """Write a patch dataset that a network can learn; its root.

    Args:
        root: The folder to write to.
        train: Patches of a split; one of 0 gets no folder.
        validation: Likewise.
        test: Likewise.
        bands: Bands of the images.
        classes: Classes of the labels, each with its own spectrum.
        size: Height and width of a patch in pixels.
        dtype: Of the images.
        nodata: Declared nodata of the images, written to the first ``invalid_rows`` rows.
        label_nodata: Declared nodata of the labels.
        invalid_rows: See ``nodata``.
        unlabelled_rows: Last rows of every label that are ``label_nodata``, else 255.
        descriptions: Band descriptions of the images.
        tags: Tags of the labels.
        folder: Where the splits lie under the root; "" for the root itself.
        suffix: Of all files.
        seed: Of the noise and the places of the stripes.
    """
    rng = np.random.default_rng(seed)
    shape = size if isinstance(size, tuple) else (size, size)
    number = 0
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        for _ in range(count):
            image, label = make_patch(rng, bands, classes, shape, dtype)
            if invalid_rows:
                image[:, :invalid_rows] = nodata
            if unlabelled_rows:
                label[-unlabelled_rows:] = 255 if label_nodata is None else label_nodata
            origin = (ORIGIN[0] + number * shape[1] * PIXEL, ORIGIN[1])
            place = root / folder / split
            name = f"patch_{number:03}{suffix}"
            write_raster(
                place / "images" / name, image, nodata, descriptions, origin=origin
            )
            write_raster(
                place / "labels" / name, label, label_nodata, tags=tags, origin=origin
            )
            number += 1
    return root


def symmetries(array: np.ndarray) -> list[bytes]:
    """The eight symmetries of a square, by transposition and reversal (no rot90)."""
    found = []
    for base in (array, array.T):
        for rows in (1, -1):
            for columns in (1, -1):
                found.append(np.ascontiguousarray(base[::rows, ::columns]).tobytes())
    return found


# --- models --------------------------------------------------------------------------------


def encoder_for(model: str) -> str | None:
    """The smallest encoder that a model takes; None where it has its own."""
    return {
        "dpt": "tu-vit_tiny_patch16_224",
        "unet-dropout": None,
        "pixel": None,
        "deeplabv3_resnet50": "resnet50",
    }.get(model, TINY_ENCODER)


def statistics(bands: int) -> Normalization:
    """A normalization that changes nothing: values from 0 to 1 stay."""
    return Normalization("dataset", (0.0,) * bands, (1.0,) * bands)


def write_model(path: Path, bands: int = 3, change=lambda state: None, **metadata):
    """Write a checkpoint of random weights; ``change`` is called with them."""
    torch.manual_seed(0)
    config = ModelConfig("pspnet", bands, 1, ENCODER)
    model = build_model(config)
    with torch.no_grad():
        change(model.network.state_dict())
    numbers = Normalization("dataset", (0.0,) * bands, (1e4,) * bands)
    save_checkpoint(path, model, config, numbers, metadata)


def same_weights(one: dict, other: dict) -> bool:
    """Whether two checkpoints hold equal weights."""
    one, other = one["model_state_dict"], other["model_state_dict"]
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) for key in one
    )


# --- logits --------------------------------------------------------------------------------


def draw_batch(mode: str, seed: int = 0, unlabelled: float = 0.3):
    """Random logits (2, K, 9, 7) and a mask (2, 9, 7), a part of it unlabelled."""
    rng = torch.Generator().manual_seed(seed)
    outputs, classes = (1, 2) if mode == "binary" else (CLASSES, CLASSES)
    logits = torch.randn(2, outputs, 9, 7, generator=rng)
    mask = torch.randint(0, classes, (2, 9, 7), generator=rng)
    mask[torch.rand(2, 9, 7, generator=rng) < unlabelled] = IGNORE
    return logits, mask


def drawn_pixels(batches, size: int = 200_000, seed: int = 0):
    """The logits and targets that a ``LogitSample`` draws from pairs of logits and mask."""
    from evaluation.calibration import LogitSample

    sample = LogitSample(
        sum(int((mask != 255).sum()) for _, mask in batches), size, seed
    )
    for logits, mask in batches:
        sample.add(logits, mask)
    return sample.pixels()


# --- trainings -----------------------------------------------------------------------------


def settings(**changes) -> TrainingConfig:
    """Those of a training, with their defaults but for ``changes``."""
    given = {"dataset_root": "data", "model": "unet", "mode": "binary", "classes": 2}
    return TrainingConfig(**given | changes)


@dataclass(frozen=True)
class Outcome:
    """What a run left: exit status, folder and what it said."""

    status: int
    save_dir: Path
    out: str
    err: str

    def checkpoint(self, name: str = "final_model") -> dict:
        return torch.load(self.save_dir / f"model_{name}.pth", weights_only=True)

    def metadata(self, name: str = "final_model") -> dict:
        return self.checkpoint(name)["metadata"]

    @property
    def report(self) -> dict:
        return json.loads(
            (self.save_dir / "model_metrics.json").read_text(),
            parse_constant=lambda name: pytest.fail(f"{name} in the JSON"),
        )

    @property
    def log(self) -> list[dict]:
        with open(self.save_dir / "model_training_log.csv", newline="") as file:
            return list(csv.DictReader(file))


def run_main(*arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``main.main``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            logging.getLogger().handlers.clear()  # they hold the redirected stderr
    return status, out.getvalue(), err.getvalue()


def train(root: Path, save_dir: Path, *options) -> Outcome:
    """Train on a dataset; it must go well."""
    status, out, err = run_main(
        "--dataset_root", root, "--save_dir", save_dir, *QUICK, *options
    )
    assert status == 0, err
    return Outcome(status, save_dir, out, err)


def torchrun(processes: int, arguments: list[str], **options) -> subprocess.Popen:
    """A script under torchrun, with so many processes, on a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )
