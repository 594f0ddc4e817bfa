"""A scene with its label and grid, extracted in the process of the test.

Cells are given in the scene's pixels (x, y), and written in its CRS or another one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import rasterio
import shapely
from helpers import ROOT, write_geotiff
from rasterio.transform import from_origin
from shapely import Polygon, box
from shapely.affinity import affine_transform

import Patch_extraction
from common.errors import WORK_IS_KEPT
from common.labels import class_names_of
from extraction.dataset import STAGING

CRS = "EPSG:32631"
TRANSFORM = from_origin(431_240, 4_912_560, 10, 10)
SIZE, PATCH = 48, 16
DTYPES = ("uint8", "int16", "uint16", "int32", "float32", "float64")
CHOICES = ("auto", "nearest", "bilinear", "cubic", "area")
LEFT, RIGHT = box(2, 2, 26.2, 44), box(20.3, 6, 46, 40)  # they overlap in the middle


def scene(
    bands: int = 3, height: int = SIZE, width: int = SIZE, dtype="uint16"
) -> np.ndarray:
    """Noise (bands, height, width) of 1..250, so that 0 can be nodata."""
    rng = np.random.default_rng(5)
    return rng.integers(1, 251, (bands, height, width)).astype(dtype)


def classes(
    count: int = 3, height: int = SIZE, width: int = SIZE, dtype="uint8"
) -> np.ndarray:
    """Noise (height, width) of 0..count - 1, each of them in every patch."""
    rng = np.random.default_rng(6)
    return rng.integers(0, count, (height, width)).astype(dtype)


def tiles(columns: int = 3, rows: int = 3, side: float = PATCH, left=0.0, top=0.0):
    """Square cells side by side, row by row."""
    return [
        box(x, y, x + side, y + side)
        for y in top + side * np.arange(rows)
        for x in left + side * np.arange(columns)
    ]


def write_cells(
    path: Path, cells, crs=CRS, transform=TRANSFORM, drawn_in=CRS, **columns
) -> Path:
    """Write cells, given in pixels of ``transform`` and ``drawn_in``, as a vector file in ``crs``."""
    a, b, c, d, e, f = transform[:6]
    ground = [
        g if g is None else affine_transform(g, [a, b, d, e, c, f]) for g in cells
    ]
    table = geopandas.GeoDataFrame(columns, geometry=ground, crs=drawn_in)
    (table if crs is None else table.to_crs(crs)).to_file(path)
    return path


def pixels(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


class Site:
    """A scene, its label and a grid in one folder, and what extraction makes of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.out = folder / "out"
        self.image = self.label = self.grid = folder / "missing"
        self.draw_image(scene())
        self.draw_label(classes())
        self.draw_grid(tiles())

    def draw_image(self, image, **more) -> None:
        self.image = write_geotiff(self.folder / "image.tif", image, **more)

    def draw_label(self, label, **more) -> None:
        self.label = write_geotiff(self.folder / "label.tif", label, **more)

    def draw_label_shapes(self, shapes, **more) -> None:
        self.label = self._vector("label.geojson", shapes, **more)

    def draw_grid(self, cells, file="grid.geojson", **more) -> None:
        self.grid = self._vector(file, cells, **more)

    def _vector(self, file: str, shapes, **more) -> Path:
        (self.folder / file).unlink(missing_ok=True)
        return write_cells(self.folder / file, shapes, **more)

    def words(self, *more, size: int = PATCH) -> list[str]:
        """The command line."""
        files = ["--image", self.image, "--label", self.label, "--grid", self.grid]
        rest = ["--output", self.out, "--patch_size", size, *more]
        return [str(word) for word in ["extract", *files, *rest]]

    def extract(self, *more, size: int = PATCH) -> dict[str, Patch]:
        """Run it; the patches by name."""
        assert run(*self.words(*more, size=size)) == 0
        return self.patches()

    def patches(self) -> dict[str, Patch]:
        images = sorted(self.out.glob("Patch/*/images/*"), key=lambda path: path.name)
        return {path.stem: Patch(path) for path in images}

    def only(self, *more, size: int = PATCH) -> Patch:
        """Run it on a grid of which one cell gives a patch."""
        (patch,) = self.extract(*more, size=size).values()
        return patch

    def metadata(self) -> dict:
        return json.loads((self.out / "Patch" / "metadata.json").read_text())

    def leftovers(self) -> list[str]:
        """What lies in the output folder, hidden files too."""
        return sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*"))


class Patch:
    """A patch as it was written."""

    def __init__(self, image: Path):
        self.split = image.parent.parent.name
        self.image_path = image
        self.label_path = image.parent.parent / "labels" / image.name
        with rasterio.open(image) as file:
            self.profile, self.descriptions = file.profile, file.descriptions
            self.colours, self.transform = file.colorinterp, file.transform
            self.image, self.valid = file.read(), file.dataset_mask() > 0
            self.flags = [flag.name for flag in file.mask_flag_enums[0]]
        with rasterio.open(self.label_path) as file:
            assert file.count == 1
            assert (file.crs, file.transform) == (self.profile["crs"], self.transform)
            self.label, self.unlabelled = file.read(1), file.nodata
            self.class_names = class_names_of(file)

    @property
    def labelled(self) -> np.ndarray:
        return self.label != self.unlabelled

    def place(self) -> tuple[slice, slice]:
        """The scene's rows and columns that a patch shows which was not resized."""
        column, row = (round(v) for v in ~TRANSFORM * (self.transform * (0, 0)))
        height, width = self.label.shape
        return slice(row, row + height), slice(column, column + width)


def run(*words) -> int:
    """The script in this process: its exit status."""
    try:
        return Patch_extraction.main([str(word) for word in words])
    except SystemExit as exit:
        return exit.code


def refusal(capsys, site: Site, *words, **more) -> str:
    """The one line on stderr of a run that could not be done and left nothing but what it says."""
    capsys.readouterr()
    assert run(*site.words(*words, **more)) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("error: ")
    require_left_as_said(site.out, line)
    return line


def require_left_as_said(out: Path, line: str) -> None:
    """Finished patches alone may be left of a run that fails, where its error says so."""
    left = [path.name for path in out.iterdir()] if out.exists() else []
    assert left == [STAGING] * (WORK_IS_KEPT in line)


def complaint(capsys, *words) -> str:
    """The last line on stderr of a wrong command line."""
    capsys.readouterr()
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()[-1]


def centres_inside(shape, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """(H, W) bool: the pixels whose centre lies in a shape, by shapely."""
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return shapely.contains_xy(shape, columns, rows)


def labelled_by(patches, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """(H, W): by how many patches each pixel of the scene is labelled."""
    count = np.zeros((height, width), int)
    for patch in patches:
        count[patch.place()] += patch.labelled
    return count


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code in a process of its own, where the modules can be imported."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def hole(dtype=bool) -> np.ndarray:
    """(H, W): False in a few pixels of the first and of the fifth cell."""
    valid = np.ones((SIZE, SIZE), dtype)
    valid[2:5, 3:9] = valid[20, 20] = 0
    return valid


def diamond(x: float, y: float) -> Polygon:
    """A square on its tip in a window of 16 px; its edges run through no pixel's centre."""
    corners = [(x, y - 8), (x + 8, y), (x, y + 8), (x - 8, y)]
    return Polygon([(x + 0.2, y + 0.1) for x, y in corners])
