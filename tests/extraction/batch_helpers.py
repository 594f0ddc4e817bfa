"""A folder of tiny scenes of 10 m pixels; cells have 8 pixels (80 m) unless a test says otherwise."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import geopandas
import numpy as np
import rasterio
from helpers import CRS, ORIGIN, write_geotiff
from rasterio.transform import Affine
from shapely import box
from site_helpers import require_left_as_said, run, write_cells

from common import SPLITS

SIDE = 8
RATIOS = (0.75, 0.15, 0.10)
TRANSFORM = Affine(10, 0, ORIGIN[0], 0, -10, ORIGIN[1])


def write(path: Path, pixels, transform=TRANSFORM, crs=CRS, **profile) -> Path:
    """Write (C, H, W) or (H, W) pixels as a GeoTIFF."""
    return write_geotiff(path, pixels, transform=transform, crs=crs, **profile)


def write_grid(path: Path, cells, transform=TRANSFORM, crs=CRS, **columns) -> Path:
    """Write cells, given in pixels, as a vector file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_cells(path, cells, crs, transform, crs, **columns)


def noise(size: int | tuple[int, int] = 48, bands: int = 2, seed: int = 0):
    """An image (bands, H, W) uint16 without zeros, and its label (H, W) of classes 0 to 2."""
    shape = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    image = rng.integers(1, 999, (bands, *shape)).astype("uint16")
    return image, rng.integers(0, 3, shape).astype("uint8")


def clumps(size: int, classes: int = 3, clump: int = 12, seed: int = 3) -> np.ndarray:
    """A label (H, W) of square clumps."""
    coarse = np.random.default_rng(seed).integers(0, classes, (size // clump + 1,) * 2)
    return np.kron(coarse, np.ones((clump, clump), int))[:size, :size].astype("uint8")


def at(column: float, row: float, transform=TRANSFORM) -> Affine:
    """A transform whose upper left corner is a pixel of another one."""
    return transform * Affine.translation(column, row)


def tiles(columns: int, rows: int, side: float = SIDE, left=0.0, top=0.0):
    """Square cells side by side in pixels, row by row."""
    return [
        box(left + x, top + y, left + x + side, top + y + side)
        for y in side * np.arange(rows)
        for x in side * np.arange(columns)
    ]


class Batch:
    """A folder of scenes and what extraction makes of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data, self.out = folder / "in", folder / "out"
        self.data.mkdir()

    def draw(self, name: str, size=48, bands=2, label=None, seed=0, **more) -> None:
        """A scene ``Image_NAME.tif`` and its label."""
        image, noisy = noise(size, bands, seed)
        write(self.data / f"Image_{name}.tif", image, **more)
        write(
            self.data / f"Label_{name}.tif", noisy if label is None else label, **more
        )

    def words(self, *more, size: int = SIDE) -> list[str]:
        """The command line."""
        files = ["--data_dir", self.data, "--output", self.out]
        rest = ["--patch_size", size, "--save_metadata", *more]
        return [str(word) for word in ["batch", *files, *rest]]

    def cut(self, *more, size: int = SIDE) -> Dataset:
        """Run it; the dataset that results."""
        assert run(*self.words(*more, size=size)) == 0
        return Dataset(self.out)

    def refusal(self, capsys, *words, size: int = SIDE) -> str:
        """The one line on stderr of a run that could not be done and left nothing but what it says."""
        capsys.readouterr()
        assert run(*self.words(*words, size=size)) == 1
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert (out, line[:7]) == ("", "error: ")
        require_left_as_said(self.out, line)
        return line


class Dataset:
    """A dataset as it was written."""

    def __init__(self, root: Path):
        self.root = root / "Patch"
        self.metadata = json.loads((self.root / "metadata.json").read_text())
        self.records = {record["name"]: record for record in self.metadata["patches"]}
        self.skipped = self.metadata["skipped"]
        images = sorted(self.root.glob("*/images/*.tif"), key=lambda path: path.name)
        self.splits = {path.stem: path.parent.parent.name for path in images}
        self.ground, self.crs = {}, {}
        for path in images:
            assert (path.parent.parent / "labels" / path.name).is_file()
            with rasterio.open(path) as file:
                assert file.shape == (file.width, file.width)
                self.ground[path.stem] = box(*file.bounds)
                self.crs[path.stem] = file.crs

    def files(self) -> dict[str, bytes]:
        """All patches, byte by byte, by their place in the dataset."""
        found = self.root.rglob("*.tif")
        return {str(p.relative_to(self.root)): p.read_bytes() for p in found}

    def cells(self) -> geopandas.GeoDataFrame:
        return geopandas.read_file(self.root / "cells.gpkg", layer="cells")

    def pixels_by_split(self, pixel: float = 10) -> dict[str, set]:
        """The ground of each split as a set of pixels (column, row)."""
        found: dict[str, set] = {split: set() for split in SPLITS}
        for name, shape in self.ground.items():
            left, low, right, high = (round(v / pixel) for v in shape.bounds)
            square = itertools.product(range(left, right), range(low, high))
            found[self.splits[name]].update(square)
        return found

    def class_shares(self) -> dict[str, np.ndarray]:
        """For each split, the share of each class's pixels that lie in it."""
        counts = {}
        for split in SPLITS:
            labels = [
                rasterio.open(path).read()
                for path in sorted((self.root / split / "labels").iterdir())
            ]
            labels = np.concatenate(labels).ravel() if labels else np.array([], int)
            counts[split] = np.bincount(labels[labels < 255], minlength=3)
        total = sum(counts.values())
        return {split: count / total for split, count in counts.items()}


def messages(capsys, *words, status: int = 0) -> list[str]:
    """The lines on stderr of a run."""
    capsys.readouterr()
    assert run(*words) == status
    return capsys.readouterr().err.splitlines()


def metric(shapes, crs=CRS) -> geopandas.GeoSeries:
    return geopandas.GeoSeries(shapes, crs=crs)


def spoil(path: Path, block: int) -> None:
    """Make a compressed block of a TIFF unreadable."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        place = tiff.pages.first.dataoffsets[block]
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 20)


def draw_spoilt(batch: Batch, what: str) -> None:
    """A scene of 3 rows of cells of which the middle one cannot be read."""
    image, label = noise(24)
    compressed = {"compress": "deflate", "blockysize": 8}
    write(batch.data / "Image_a.tif", image, **compressed)
    if what == "values":
        label = label.astype("int16")
        label[8:16, ::8] = 300
    write(batch.data / "Label_a.tif", label, **compressed)
    if what != "values":
        spoil(batch.data / f"{what}_a.tif", 1)
