"""Patch_extraction.py: patches against the scenes that they were cut from, and what is refused.

Cells are given in the scene's pixels (x, y), and written in its CRS or another one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from helpers import ROOT, SENTINEL, patch_everywhere
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform as project
from shapely import GeometryCollection, LineString, MultiPolygon, Point, Polygon, box
from shapely.affinity import affine_transform, rotate

import Patch_extraction
from common import SPLITS, VERSION, pictures
from common.console import settings_from
from common.errors import DatasetError, OptionError, RasterError
from common.labels import class_name_tags, class_names_of
from common.pictures import class_colours, stretch
from common.rasters import image_bands
from extraction.cells import cell_mask, cell_names, cells_of
from extraction.cutting import PatchWriter, resize_image, resize_label
from extraction.report import SplitSummary
from extraction.settings import ExtractionConfig
from extraction.splits import random_splits, split_counts

CRS = "EPSG:32631"
TRANSFORM = from_origin(431_240, 4_912_560, 10, 10)
SIZE, PATCH = 48, 16
DTYPES = ("uint8", "int16", "uint16", "int32", "float32", "float64")
CHOICES = ("auto", "nearest", "bilinear", "cubic", "area")


# --- helpers --------------------------------------------------------------------------------


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


def write_raster(
    path: Path, pixels, descriptions=None, colours=None, mask=None, **profile
) -> Path:
    """Write (C, H, W) or (H, W) pixels as a GeoTIFF with a CRS and an off-origin transform."""
    pixels = np.asarray(pixels)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    count, height, width = pixels.shape
    profile = {"dtype": pixels.dtype, "crs": CRS, "transform": TRANSFORM} | profile
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
        self.image = write_raster(self.folder / "image.tif", image, **more)

    def draw_label(self, label, **more) -> None:
        self.label = write_raster(self.folder / "label.tif", label, **more)

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


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing the disks of the whole machine at each extraction would take most of the time."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture(autouse=True)
def own_logging():
    """The handler that the script adds goes when its stream goes."""
    yield
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)


def run(*words) -> int:
    """The script in this process: its exit status."""
    try:
        return Patch_extraction.main([str(word) for word in words])
    except SystemExit as exit:
        return exit.code


def refusal(capsys, site: Site, *words, **more) -> str:
    """The one line on stderr of a run that could not be done and left no patch."""
    capsys.readouterr()
    assert run(*site.words(*words, **more)) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("error: ")
    assert not site.out.exists() or site.leftovers() == []
    return line


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


# --- splits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "ratios", "expected"),
    [
        (10, (0.7, 0.2, 0.1), [7, 2, 1]),
        (100, (0.7, 0.15, 0.15), [70, 15, 15]),
        (20, (0.75, 0.15, 0.10), [15, 3, 2]),
        (9, (0.75, 0.15, 0.10), [7, 1, 1]),  # 6.75, 1.35, 0.9
        (3, (0.75, 0.15, 0.10), [2, 1, 0]),  # 2.25, 0.45, 0.3
        (7, (0.5, 0.25, 0.25), [3, 2, 2]),  # 3.5, 1.75, 1.75
        (5, (0.5, 0.5, 0.0), [3, 2, 0]),  # a tie goes to the earlier split
        (1, (0.4, 0.3, 0.3), [1, 0, 0]),
        (0, (0.75, 0.15, 0.10), [0, 0, 0]),
    ],
)
def test_splits_have_the_sizes_of_the_largest_remainder(count, ratios, expected):
    assert split_counts(count, ratios) == expected


def test_every_split_is_less_than_a_patch_away_from_its_ratio():
    for ratios in ((0.75, 0.15, 0.10), (0.6, 0.2, 0.2), (1 / 3, 1 / 3, 1 / 3)):
        for count in range(200):
            counts = split_counts(count, ratios)
            assert sum(counts) == count
            assert all(abs(n - count * r) < 1 for n, r in zip(counts, ratios))


def test_splits_are_drawn_again_alike_by_the_same_seed_and_not_by_another():
    ratios = (0.5, 0.3, 0.2)
    first, again, other = (random_splits(40, ratios, seed) for seed in (7, 7, 8))
    assert first == again != other
    assert Counter(first) == Counter(other) == dict(zip(SPLITS, (20, 12, 8)))
    assert first != sorted(first, key=SPLITS.index)  # in no order of the grid


def test_every_cell_is_in_one_split_and_the_ratios_are_met(site):
    site.draw_grid(tiles(10, 1, side=4))
    ratios = ["--train_ratio", 0.6, "--val_ratio", 0.3, "--test_ratio", 0.1]
    patches = site.extract(*ratios, size=8)
    assert Counter(patch.split for patch in patches.values()) == {
        "train": 6,
        "validation": 3,
        "test": 1,
    }
    assert len(list(site.out.rglob("*.tif"))) == 2 * 10


@pytest.mark.parametrize("flag", ["--seed", "--random_seed"])
def test_the_seed_decides_the_splits_and_nothing_else(site, flag):
    site.draw_grid(tiles(12, 3, side=4))
    outcomes = []
    for number, seed in enumerate((1, 1, 2)):
        site.out = site.folder / f"out{number}"
        outcomes.append(site.extract(flag, seed, size=8))
    first, again, other = ({n: p.split for n, p in o.items()} for o in outcomes)
    assert first == again != other
    for name, patch in outcomes[0].items():
        assert np.array_equal(patch.image, outcomes[2][name].image)


def test_an_empty_split_keeps_its_folders(site):
    site.extract("--train_ratio", 0.8, "--val_ratio", 0.2, "--test_ratio", 0)
    assert [path.name for path in site.out.glob("Patch/test/*")] != []
    assert list(site.out.glob("Patch/test/*/*")) == []


# --- resizing -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "size", "expected"),
    [
        ([[1, 2], [3, 4]], 4, [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 1, [[5]]),
        ([[1, 2, 3]], 3, [[1, 2, 3]] * 3),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_labels_are_resized_to_the_nearest_pixel(source, size, expected, dtype):
    resized = resize_label(np.array(source, dtype), size)
    assert resized.dtype == dtype
    assert resized.tolist() == expected


@pytest.mark.parametrize("shape", [(5, 7), (16, 16), (33, 20), (64, 9)])
@pytest.mark.parametrize("size", [8, 15, 32])
def test_the_nearest_pixel_is_the_one_that_holds_the_centre(shape, size):
    numbers = np.arange(shape[0] * shape[1]).reshape(shape).astype("uint16")
    rows, columns = np.divmod(resize_label(numbers, size), shape[1])
    for chosen, side in ((rows[:, :1], shape[0]), (columns[:1].T, shape[1])):
        centre = (np.arange(size)[:, None] + 0.5) * side / size
        # a centre on the edge of two pixels is as near to the one as to the other
        assert np.all((chosen <= centre) & (centre <= chosen + 1))
    assert np.all(rows == rows[:, :1])
    assert np.all(columns == columns[:1])


def resized(image, size: int, interpolation: str, valid=None):
    """An image (H, W) or (C, H, W) resized; all valid unless told."""
    image = image if np.ndim(image) == 3 else np.asarray(image)[None]
    valid = np.ones(image.shape[1:], bool) if valid is None else np.asarray(valid)
    return resize_image(image, valid, size, interpolation)


@pytest.mark.parametrize("interpolation", ["area", "auto"])
def test_shrinking_averages(interpolation):
    image = np.array([[1, 2, 10, 10], [3, 4, 10, 10], [0, 0, 7, 7], [0, 1, 7, 8]])
    shrunk, valid = resized(image.astype("float32"), 2, interpolation)
    assert shrunk[0].tolist() == [[2.5, 10], [0.25, 7.25]]
    assert valid.all()
    spot = np.zeros((3, 3), "float32")
    spot[1, 1] = 9  # all that a bilinear pixel would see
    assert resized(spot, 1, interpolation)[0][0] == pytest.approx(1)


@pytest.mark.parametrize("interpolation", ["bilinear", "auto"])
def test_enlarging_is_bilinear_about_pixel_centres(interpolation):
    enlarged, _ = resized(np.array([[0, 8], [0, 8]], "float32"), 4, interpolation)
    assert enlarged[0].tolist() == [[0, 2, 6, 8]] * 4


def test_whole_numbers_are_rounded_and_not_cut_off():
    shrunk, _ = resized(np.array([[1, 2], [2, 2]], "uint8"), 1, "area")
    assert shrunk[0].tolist() == [[2]]


def test_cubic_overshoots_stop_at_the_limits_of_the_dtype():
    step = np.repeat(np.array([[0, 0, 255, 255]], "uint8"), 4, axis=0)
    enlarged, _ = resized(step, 16, "cubic")
    assert np.all(np.diff(enlarged[0, 0].astype(int)) >= 0)
    assert (enlarged[0, 0, 0], enlarged[0, 0, -1]) == (0, 255)
    assert len(np.unique(enlarged)) > 2


def test_the_nearest_image_pixel_is_the_nearest_label_pixel():
    label = np.random.default_rng(0).integers(0, 200, (33, 20)).astype("uint16")
    image, _ = resized(label, 16, "nearest")
    assert np.array_equal(image[0], resize_label(label, 16))


@pytest.mark.parametrize("size", [5, 8, 20])
@pytest.mark.parametrize("interpolation", CHOICES)
@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "uint32"])
def test_invalid_pixels_do_not_bleed_into_valid_ones(dtype, interpolation, size):
    high = 1e6 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    image = np.full((2, 12, 10), high, dtype)
    valid = np.ones((12, 10), bool)
    valid[3:8, 4:7] = valid[0] = False
    image[:, valid] = np.array([[3], [100]])
    result, kept = resized(image, size, interpolation, valid)
    assert result.dtype == dtype
    assert 0 < kept.sum() < kept.size
    for channel, value in zip(result, (3, 100)):
        # floats may differ in their last digit
        assert np.allclose(channel[kept], value, rtol=1e-6, atol=0)


def test_a_resized_pixel_is_valid_when_half_of_it_is():
    valid = np.array([[1, 1, 1, 0], [0, 0, 0, 0]] * 2, bool)
    image = np.where(valid, [[4, 8, 5, 90]], 90).astype("float32")
    result, kept = resized(image, 2, "area", valid)
    assert kept.tolist() == [[True, False], [True, False]]
    assert result[0].tolist() == [[6, 0], [6, 0]]


def test_large_values_of_32_bits_keep_their_last_digit():
    image = np.full((4, 4), 2**31 - 3, "int32")
    for interpolation in CHOICES:
        assert np.all(resized(image, 8, interpolation)[0] == 2**31 - 3)


@pytest.mark.parametrize("interpolation", CHOICES)
def test_each_interpolation_can_be_chosen(site, interpolation):
    site.draw_grid([box(8, 8, 40, 40)])
    patch = site.only("--interpolation", interpolation)
    expected, _ = resized(scene()[:, 8:40, 8:40], PATCH, interpolation)
    assert np.array_equal(patch.image, expected)
    nearest = resize_label(classes()[8:40, 8:40], PATCH)
    assert np.array_equal(patch.label, nearest)


def test_shrinking_by_auto_is_the_mean_of_blocks(site):
    site.draw_image(scene(dtype="float32"))
    site.draw_grid([box(0, 0, 48, 48)])
    blocks = scene().reshape(3, PATCH, 3, PATCH, 3)
    assert np.allclose(site.only().image, blocks.mean(axis=(2, 4)), rtol=1e-6)


# --- names of the patches -------------------------------------------------------------------


def names(column: str | None = None, rows: int = 3, **columns) -> list[str]:
    geometry = [Point(i, i).buffer(1) for i in range(rows)]
    grid = geopandas.GeoDataFrame(columns, geometry=geometry, crs=CRS)
    return cell_names(grid, column)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, ["patch_001", "patch_002", "patch_003"]),
        ({"id": [7, 80, 9]}, ["patch_007", "patch_080", "patch_009"]),
        ({"Id": [7.0, 80.0, 9.0]}, ["patch_007", "patch_080", "patch_009"]),
        ({"cell_id": [5, 12345, 6]}, ["patch_00005", "patch_12345", "patch_00006"]),
        ({"name": ["north", "x1", "07"]}, ["patch_north", "patch_x1", "patch_007"]),
        ({"id": [4, 5, 6], "name": list("abc")}, [f"patch_00{i}" for i in (4, 5, 6)]),
        ({"id": [4, 4, 6], "name": list("abc")}, [f"patch_{i}" for i in "abc"]),
        ({"id": [1.0, None, 2.0]}, ["patch_001", "patch_002", "patch_003"]),
        ({"id": ["a", None, "b"]}, ["patch_001", "patch_002", "patch_003"]),
        ({"id": ["a/b", "a_b", "c"]}, ["patch_001", "patch_002", "patch_003"]),
        ({"other": [9, 8, 7]}, ["patch_001", "patch_002", "patch_003"]),
    ],
)
def test_patches_are_named_by_an_id_column_that_tells_all_cells_apart(
    columns, expected
):
    assert names(**columns) == expected


def test_row_numbers_are_as_wide_as_the_last_one():
    assert names(rows=1000)[::999] == ["patch_0001", "patch_1000"]


def test_an_id_column_can_be_named_in_any_case():
    assert names("plot", PLOT=["a", "b", "c"], id=[1, 2, 3]) == [
        "patch_a",
        "patch_b",
        "patch_c",
    ]


@pytest.mark.parametrize("ids", [["a", "b", "b"], ["a", None, "b"], ["a", "..", "b"]])
def test_a_named_id_column_that_does_not_tell_cells_apart_is_an_error(ids):
    with pytest.raises(DatasetError, match="--id_column plot: 1 ids are not unique"):
        names("plot", plot=ids)


def test_an_unknown_id_column_is_an_error_with_the_known_ones():
    with pytest.raises(OptionError, match=r"'plot_no'; did you mean 'plot_nr'\?"):
        names("plot_no", plot_nr=[1, 2, 3])


def test_ids_that_differ_by_leading_zeros_give_different_names():
    assert len(set(names(id=["1", "01", "2"]))) == 3


@pytest.mark.parametrize(
    "ids", [["a/b", "../x", "/etc/y"], ["..\\z", ".hidden", "a b"]]
)
def test_odd_ids_never_leave_the_folder(site, ids):
    site.draw_grid(tiles(3, 1), plot=ids)
    patches = site.extract("--id_column", "plot")
    assert len(patches) == 3
    assert all(name.replace("_", "").isalnum() for name in patches)
    written = [path for path in site.folder.rglob("*.tif") if "out" not in path.parts]
    assert sorted(path.name for path in written) == ["image.tif", "label.tif"]
    assert {path.name for path in site.out.iterdir()} == {"Patch"}


def test_ids_name_the_files_and_the_records(site):
    site.draw_grid(tiles(3, 1), plot=["b", "a", "c"])
    patches = site.extract("--id_column", "plot", "--save_metadata")
    assert list(patches) == ["patch_a", "patch_b", "patch_c"]
    assert patches["patch_a"].place()[1] == slice(16, 32)
    recorded = [record["name"] for record in site.metadata()["patches"]]
    assert recorded == ["patch_b", "patch_a", "patch_c"]


# --- pixels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cell_of_the_patch_size_is_the_scene_bit_by_bit(site, dtype):
    image = scene(dtype=dtype)
    image[1, 20, 20] = 0
    described = ("B04 red", "B03 green", "B02 blue")
    site.draw_image(image, descriptions=described, nodata=0)
    patches = site.extract()
    assert list(patches) == [f"patch_00{number}" for number in range(1, 10)]
    for number, patch in enumerate(patches.values()):
        row, column = divmod(number, 3)
        rows, columns = patch.place()
        assert (rows.start, columns.start) == (PATCH * row, PATCH * column)
        window = image[:, rows, columns]
        valid = (window != 0).all(axis=0)
        assert np.array_equal(patch.image, np.where(valid, window, 0))
        assert patch.image.dtype == dtype
        assert np.array_equal(
            patch.label, np.where(valid, classes()[rows, columns], 255)
        )
        assert np.array_equal(patch.valid, valid)
        shift = Affine.translation(columns.start, rows.start)
        assert patch.transform == TRANSFORM * shift
        assert patch.profile["crs"] == CRS
        assert patch.profile["nodata"] == 0
        assert patch.descriptions == described
        assert (patch.label.dtype, patch.unlabelled) == ("uint8", 255)
    assert sum(patch.valid.size - patch.valid.sum() for patch in patches.values()) == 1


def test_patches_are_plain_geotiffs_without_files_beside_them(site):
    site.draw_image(scene(), mask=scene()[0] > 60)
    patches = site.extract("--class_names", "a,b,c")
    for patch in patches.values():
        assert patch.profile["driver"] == "GTiff"
        assert patch.profile["compress"] == "deflate"
    for folder in site.out.glob("Patch/*/*"):
        assert {path.suffix for path in folder.iterdir()} <= {".tif"}
    assert {path.name for path in (site.out / "Patch").iterdir()} == {
        *SPLITS,
        "cells.gpkg",
    }


@pytest.mark.parametrize("size", [8, 24, 31])
def test_the_corners_of_a_resized_patch_are_the_corners_of_its_cell(site, size):
    site.draw_grid([box(3, 5, 37, 25)])
    patch = site.only(size=size)
    assert patch.image.shape == (3, size, size)
    for corner, place in {(0, 0): (3, 5), (size, size): (37, 25)}.items():
        found = ~TRANSFORM * (patch.transform * corner)
        assert np.allclose(found, place, atol=1e-6)


def test_cells_between_pixels_take_the_pixels_whose_centre_they_hold(site):
    site.draw_grid([box(4.4, 7.6, 20.4, 23.6)])
    assert site.only().place() == (slice(8, 24), slice(4, 20))


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("side", [8.0, 10.5, 11.3])
def test_adjacent_cells_share_no_pixel_and_leave_no_gap(site, side, shift):
    site.draw_grid(tiles(3, 3, side, left=shift, top=1 + shift))
    site.extract("--save_metadata", size=8)
    count = np.zeros((SIZE, SIZE), int)
    for record in site.metadata()["patches"]:
        left, top, width, height = record["window"]
        count[top : top + height, left : left + width] += 1
    rows, columns = np.flatnonzero(count.any(axis=1)), np.flatnonzero(count.any(axis=0))
    covered = count[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert np.all(covered == 1)
    assert abs(len(rows) - 3 * side) <= 1


def test_the_grid_may_be_in_degrees(site):
    expected = site.extract()
    site.draw_grid(tiles(), crs="EPSG:4326")
    site.out = site.folder / "degrees"
    found = site.extract()
    assert list(found) == list(expected)
    for name, patch in found.items():
        assert patch.transform == expected[name].transform
        assert np.array_equal(patch.image, expected[name].image)
        assert np.array_equal(patch.label, expected[name].label)


@pytest.mark.parametrize(
    "name", ["grid.shp", "grid.gpkg", "grid.geojson", "GRID.GeoJSON", "grid.fgb"]
)
def test_the_grid_may_be_in_any_vector_format(site, name):
    site.draw_grid(tiles(3, 1), name)
    places = [patch.place()[1].start for patch in site.extract().values()]
    # FlatGeobuf stores its features in an order of its own
    assert sorted(places) == [0, 16, 32]
    assert name.endswith(".fgb") or places == [0, 16, 32]


def test_the_scene_may_be_rotated(site):
    turned = TRANSFORM * Affine.rotation(25)
    site.draw_image(scene(), transform=turned)
    site.draw_label(classes(), transform=turned)
    site.draw_grid(tiles(), transform=turned)
    patches = site.extract()
    assert np.array_equal(patches["patch_005"].image, scene()[:, 16:32, 16:32])
    found = ~turned * (patches["patch_005"].transform * (0, 0))
    assert np.allclose(found, (16, 16), atol=1e-6)


def test_the_first_row_of_the_scene_may_lie_in_the_south(site):
    upward = Affine(10, 0, 431_240, 0, 10, 4_912_080)
    site.draw_image(scene(), transform=upward)
    site.draw_label(classes(), transform=upward)
    site.draw_grid(tiles(), transform=upward)
    patches = site.extract()
    assert np.array_equal(patches["patch_002"].image, scene()[:, :16, 16:32])
    assert patches["patch_002"].transform == upward * Affine.translation(16, 0)


def test_pixels_need_not_be_square(site):
    flat = Affine(30, 0, 431_240, 0, -10, 4_912_560)
    site.draw_image(scene(), transform=flat)
    site.draw_label(classes(), transform=flat)
    site.draw_grid([box(0, 0, 16, 48)], transform=flat)
    patch = site.only()
    assert patch.transform == flat * Affine.scale(1, 3)
    assert np.array_equal(patch.label, classes()[1::3, :16])


# --- cells that are no upright rectangle -----------------------------------------------------


def diamond(x: float, y: float) -> Polygon:
    """A square on its tip in a window of 16 px; its edges run through no pixel's centre."""
    corners = [(x, y - 8), (x + 8, y), (x, y + 8), (x - 8, y)]
    return Polygon([(x + 0.2, y + 0.1) for x, y in corners])


@pytest.mark.parametrize("angle", [7.0, 30.0, 44.0, 63.0])
def test_labels_outside_a_rotated_cell_are_unlabelled(site, angle):
    cells = [rotate(cell, angle, origin=(24, 24)) for cell in tiles(2, 1, 15, 9, 14)]
    for cell in cells:
        site.draw_grid([cell])
        site.extract("--save_metadata", "--overwrite", size=8)
        (record,) = site.metadata()["patches"]
        left, top, width, height = record["window"]
        expected = centres_inside(cell)[top : top + height, left : left + width]
        assert expected.sum() == centres_inside(cell).sum()  # the window holds it all
        shrunk = resize_label(expected.astype("uint8"), 8)
        assert np.array_equal(site.patches()["patch_001"].labelled, shrunk == 1)
    assert not (centres_inside(cells[0]) & centres_inside(cells[1])).any()


def test_a_rotated_cell_is_labelled_inside_and_shown_whole(site):
    site.draw_grid([diamond(24, 24)])
    patch = site.only()
    inside = centres_inside(diamond(24, 24))[patch.place()]
    assert np.array_equal(patch.image, scene()[:, 16:32, 16:32])
    assert patch.valid.all()
    assert np.array_equal(patch.label[inside], classes()[patch.place()][inside])
    assert 100 < inside.sum() < 200
    assert np.all(patch.label[~inside] == 255)


def test_neighbouring_rotated_cells_share_no_label_and_leave_no_gap(site):
    centres = [(12 + 8 * i, 12 + 8 * j) for i in range(4) for j in range(i % 2, 4, 2)]
    site.draw_grid([diamond(x, y) for x, y in centres])
    patches = site.extract()
    assert len(patches) == 8
    count = labelled_by(patches.values())
    assert count.max() == 1
    assert np.all(count[15:25, 15:25] == 1)


def test_neighbouring_cells_that_are_slightly_rotated_share_no_label(site):
    site.draw_image(scene(height=64, width=96))
    cells = tiles(2, 1, side=40, left=8.4, top=8.4)
    site.draw_grid([rotate(cell, -0.15, origin=(8.4, 8.4)) for cell in cells])
    files = {"image": str(site.image), "label": str(site.label), "grid": str(site.grid)}
    config = ExtractionConfig(**files, output=str(site.out))
    count = np.zeros((64, 96), int)
    with rasterio.open(site.image) as image:
        for cell in cells_of(config.scenes()[0], config, image)[0]:
            rows, columns = cell.window.toslices()
            count[rows, columns] += cell_mask(cell)
    assert count.max() == 1


def test_a_cell_of_several_parts_is_labelled_in_all_of_them(site):
    parts = [box(16, 16, 22, 32), box(26, 16, 32, 28)]
    site.draw_grid([MultiPolygon(parts)])
    patch = site.only()
    expected = sum(centres_inside(part) for part in parts)[patch.place()]
    assert patch.place() == (slice(16, 32), slice(16, 32))
    assert np.array_equal(patch.labelled, expected == 1)


def test_a_hole_in_a_cell_is_unlabelled(site):
    ring = box(16, 16, 32, 32) - box(20, 20, 28, 28)
    site.draw_grid([ring])
    patch = site.only()
    assert np.array_equal(patch.labelled, centres_inside(ring)[patch.place()])
    assert patch.labelled.sum() == 256 - 64


def test_an_invalid_cell_is_mended(site):
    bow = Polygon([(16, 16), (32, 31.8), (32, 20.3), (16, 32)])
    assert not bow.is_valid
    site.draw_grid([bow])
    patch = site.only()
    expected = centres_inside(shapely.make_valid(bow))[patch.place()]
    assert np.array_equal(patch.labelled, expected)


@pytest.mark.parametrize(
    "cell",
    [
        Polygon([(16, 16), (32, 32), (32, 16), (16, 32)]),  # the halves cancel out
        MultiPolygon([Polygon([(16, 16), (32, 16), (16, 32)])] * 2),  # counted twice
    ],
)
def test_an_invalid_cell_is_mended_before_it_is_measured(site, cell):
    site.draw_grid([cell, box(0, 0, 16, 16)])
    patch = site.extract()["patch_001"]
    expected = centres_inside(shapely.make_valid(cell))[patch.place()]
    # a pixel whose centre lies on the diagonal may fall to either side
    assert np.sum(patch.labelled != expected) <= 2 * PATCH


def test_a_line_among_the_parts_of_a_cell_labels_nothing(site):
    parts = [box(16, 16, 24, 32), LineString([(24, 20.5), (32, 20.5)])]
    site.draw_grid([GeometryCollection(parts)])
    patch = site.only()
    assert patch.labelled.all()
    assert patch.transform == TRANSFORM * Affine.translation(16, 16) * Affine.scale(
        0.5, 1
    )


# --- cells that give no patch ----------------------------------------------------------------


def test_a_cell_partly_outside_is_padded_with_invalid_pixels(site):
    site.draw_grid([box(-4, 40, 12, 56)])
    patch = site.only("--min_valid", 0.3)
    assert patch.transform == TRANSFORM * Affine.translation(-4, 40)
    inside = np.zeros((PATCH, PATCH), bool)
    inside[:8, 4:] = True
    assert np.array_equal(patch.valid, inside)
    assert np.array_equal(patch.labelled, inside)
    assert np.array_equal(patch.image[:, :8, 4:], scene()[:, 40:, :12])
    assert np.array_equal(patch.label[:8, 4:], classes()[40:, :12])


def test_cells_without_a_patch_are_counted_and_listed_with_their_reasons(site, capsys):
    image = scene()
    image[:, 16:32, :16] = 0
    site.draw_image(image, nodata=0)
    label = classes()
    label[32:, :16] = 255
    site.draw_label(label)
    cells = {
        "good": box(0, 0, 16, 16),
        "beyond": box(1000, 0, 1016, 16),
        "edge": box(44, 0, 60, 16),
        "dark": box(0, 16, 16, 32),
        "blank": box(0, 32, 16, 48),
        "tiny": box(20.1, 20.1, 20.3, 20.3),
        "none": None,
        "empty": Polygon(),
        "line": LineString([(0, 0), (20, 20)]),
    }
    site.draw_grid(list(cells.values()), name=list(cells))
    assert list(site.extract("--save_metadata")) == ["patch_good"]
    skipped = {
        "patch_beyond": "outside the image",
        "patch_edge": "less than 50% valid",
        "patch_dark": "no valid pixel",
        "patch_blank": "no labelled pixel",
        "patch_tiny": "smaller than a pixel",
        "patch_none": "no polygon",
        "patch_empty": "no polygon",
        "patch_line": "no polygon",
    }
    assert site.metadata()["skipped"] == skipped
    lines = capsys.readouterr().err.splitlines()
    assert "skipped 8 of 9 cells:" in lines
    for name, reason in skipped.items():
        assert any(reason in line and name in line for line in lines)


def test_a_grid_without_any_cell_on_the_scene_is_refused_with_both_crs(site, capsys):
    site.draw_grid([box(1000, 0, 1016, 16)], crs="EPSG:4326")
    line = refusal(capsys, site)
    assert "patch_001: outside the image" in line
    assert "EPSG:4326 and EPSG:32631" in line


def test_an_absurdly_large_cell_is_refused(site, capsys):
    site.draw_grid([box(0, 0, 16, 16), box(-100, -100, 200, 29)])
    line = refusal(capsys, site)
    assert "patch_002" in line
    assert "300 x 129 pixels" in line
    assert "16 times --patch_size 16" in line


@pytest.mark.parametrize(
    ("valid_columns", "least", "kept"),
    [(8, 0.5, 1), (7, 0.5, 0), (1, 0, 1), (16, 1, 1), (15, 1, 0), (0, 0, 0)],
)
def test_the_least_valid_share_of_a_cell_can_be_set(site, valid_columns, least, kept):
    image = scene()
    image[:, 16:32, 16 + valid_columns : 32] = 0
    site.draw_image(image, nodata=0)
    site.draw_grid([box(0, 0, 16, 16), box(16, 16, 32, 32)])
    assert len(site.extract("--min_valid", least)) == 1 + kept


def test_the_valid_share_is_that_of_the_cell_and_not_of_its_bounding_box(site):
    image = scene()
    image[:, 16:32, 16:32] = np.where(np.tri(16, dtype=bool), image[:, 16:32, 16:32], 0)
    site.draw_image(image, nodata=0)
    site.draw_grid([Polygon([(16, 16), (16, 32), (32, 32)])])
    assert site.only("--min_valid", 0.9).labelled.any()


# --- valid pixels ---------------------------------------------------------------------------


def hole(dtype=bool) -> np.ndarray:
    """(H, W): False in a few pixels of the first and of the fifth cell."""
    valid = np.ones((SIZE, SIZE), dtype)
    valid[2:5, 3:9] = valid[20, 20] = 0
    return valid


def check_validity(patches, valid) -> None:
    for patch in patches.values():
        expected = valid[patch.place()]
        assert np.array_equal(patch.valid, expected)
        assert np.array_equal(patch.labelled, expected)
        assert np.array_equal(
            patch.image[:, expected],
            scene()[(slice(None), *patch.place())][:, expected],
        )


def test_declared_nodata_stays_declared(site):
    site.draw_image(np.where(hole(), scene(), 9999), nodata=9999, dtype="uint16")
    patches = site.extract()
    check_validity(patches, hole())
    assert {patch.profile["nodata"] for patch in patches.values()} == {9999}
    assert np.all(patches["patch_001"].image[:, 2:5, 3:9] == 9999)


def test_nodata_of_one_band_is_written_to_all_bands(site):
    image = scene()
    image[1] = np.where(hole(), image[1], 0)
    site.draw_image(image, nodata=0)
    patches = site.extract()
    check_validity(patches, hole())
    assert np.all(patches["patch_001"].image[:, 2:5, 3:9] == 0)


def test_a_mask_band_becomes_a_mask_in_the_patch(site):
    site.draw_image(scene(), mask=hole())
    patches = site.extract()
    check_validity(patches, hole())
    assert patches["patch_001"].flags == ["per_dataset"]
    assert patches["patch_002"].flags == ["all_valid"]
    assert {patch.profile["nodata"] for patch in patches.values()} == {None}


def test_an_alpha_band_becomes_a_mask_and_no_channel(site):
    rgba = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    alpha = 255 * hole("uint8")[None]
    site.draw_image(np.concatenate([scene(dtype="uint8"), alpha]), colours=rgba)
    patches = site.extract("--image_channels", 3)
    check_validity(patches, hole())
    assert {patch.colours for patch in patches.values()} == {tuple(rgba[:3])}


def test_nan_and_infinity_become_the_declared_nodata(site):
    image = scene(dtype="float32")
    image[0, 2:5, 3:9], image[2, 20, 20] = np.nan, -np.inf
    site.draw_image(image, nodata=-9999)
    patches = site.extract()
    check_validity(patches, hole())
    assert np.all(patches["patch_001"].image[:, 2:5, 3:9] == -9999)


def test_nan_without_declared_nodata_is_marked_by_a_mask(site):
    image = scene(dtype="float32")
    image[:, ~hole()] = np.nan
    site.draw_image(image)
    patches = site.extract()
    check_validity(patches, hole())
    assert patches["patch_001"].flags == ["per_dataset"]


@pytest.mark.parametrize(
    "bands",
    [1, pytest.param(3)],
)
def test_nan_as_declared_nodata_stays_declared(site, bands):
    image = scene(bands, dtype="float32")
    image[:, ~hole()] = np.nan
    site.draw_image(image, nodata=np.nan)
    patch = site.extract()["patch_001"]
    assert np.array_equal(patch.valid, hole()[:PATCH, :PATCH])
    assert np.isnan(patch.profile["nodata"] or 0)


def test_a_nodata_that_bands_do_not_share_becomes_a_mask(site):
    image = scene()
    image[0] = np.where(hole(), image[0], 7777)
    site.draw_image(image)
    text = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{band}">{nodata}<SimpleSource>'
        f"<SourceFilename>{site.image}</SourceFilename><SourceBand>{band}</SourceBand>"
        "</SimpleSource></VRTRasterBand>"
        for band, nodata in ((1, "<NoDataValue>7777</NoDataValue>"), (2, ""), (3, ""))
    )
    transform = ", ".join(map(str, TRANSFORM.to_gdal()))
    site.image = site.folder / "image.vrt"
    site.image.write_text(
        f'<VRTDataset rasterXSize="{SIZE}" rasterYSize="{SIZE}"><SRS>{CRS}</SRS>'
        f"<GeoTransform>{transform}</GeoTransform>{text}</VRTDataset>"
    )
    patches = site.extract()
    check_validity(patches, hole())
    assert patches["patch_001"].profile["nodata"] is None


def test_a_valid_scene_without_nodata_gets_no_mask(site):
    patches = site.extract()
    assert {tuple(patch.flags) for patch in patches.values()} == {("all_valid",)}


@pytest.mark.parametrize("nodata", [0, None])
def test_invalid_pixels_stay_invalid_in_a_resized_patch(site, nodata):
    valid = np.ones((SIZE, SIZE), bool)
    valid[:, :24] = False
    image = np.where(valid, scene(), 0 if nodata == 0 else 60_000).astype("uint16")
    site.draw_image(image, nodata=nodata, mask=None if nodata == 0 else valid)
    site.draw_grid([box(8, 8, 40, 40)])
    patch = site.only()
    assert np.array_equal(patch.valid, np.tile(np.arange(PATCH) >= 8, (PATCH, 1)))
    assert np.array_equal(patch.labelled, patch.valid)
    assert patch.image[:, patch.valid].max() <= 250


@pytest.mark.parametrize(
    ("low", "high", "dtype", "interpolation", "size"),
    [(-1, 1, "int16", "area", 8), (10, 250, "uint8", "cubic", 32)],
)
def test_valid_pixels_stay_valid_in_a_resized_patch(
    site, low, high, dtype, interpolation, size
):
    image = np.where(np.arange(SIZE) % 8 < 4, low, high).astype(dtype)
    if interpolation == "area":
        image = np.where(np.arange(SIZE) % 2, low, high).astype(dtype)
    site.draw_image(np.tile(image, (1, SIZE, 1)), nodata=0)
    site.draw_grid([box(16, 16, 32, 32)])
    assert site.only("--interpolation", interpolation, size=size).valid.all()


def test_four_bands_of_bytes_do_not_turn_into_colour_and_alpha(site):
    image = scene(4, dtype="uint8")
    image[3, :8] = 0
    site.draw_image(image, photometric="MINISBLACK", alpha="NO")
    patches = site.extract()
    assert all(patch.valid.all() for patch in patches.values())
    assert ColorInterp.alpha not in patches["patch_001"].colours
    assert np.array_equal(patches["patch_001"].image, image[:, :16, :16])


# --- bands ----------------------------------------------------------------------------------


def test_bands_are_chosen_and_ordered_by_number_or_description(site):
    described = ("B02 blue", "B03 green", "B04 red")
    for number, text in enumerate(("3,1", "B04, b02 blue", "b04,1")):
        site.draw_image(scene(), descriptions=described)
        site.out = site.folder / f"out{number}"
        patch = site.extract("--bands", text, "--save_metadata")["patch_001"]
        assert np.array_equal(patch.image, scene()[[2, 0], :16, :16])
        assert patch.descriptions == ("B04 red", "B02 blue")
        assert site.metadata()["bands"] == [
            {"band": 3, "description": "B04 red"},
            {"band": 1, "description": "B02 blue"},
        ]


def test_an_unknown_band_is_refused(site, capsys):
    assert "--bands 4:" in refusal(capsys, site, "--bands", "1,4")
    assert "'B99'" in refusal(capsys, site, "--bands", "B99")


def test_the_number_of_bands_is_checked(site, capsys):
    site.extract("--image_channels", 3)
    site.out = site.folder / "other"
    line = refusal(capsys, site, "--image_channels", 10)
    assert "--image_channels 10" in line
    assert "gives 3 bands" in line
    assert len(site.extract("--image_channels", 2, "--bands", "1,3")) == 9


def test_an_alpha_band_that_is_chosen_by_number_is_a_channel_of_the_patch(site):
    roles = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha]
    site.draw_image(scene(dtype="uint8"), colours=roles)
    patch = site.extract("--bands", "1,2,3")["patch_001"]
    with rasterio.open(patch.image_path) as file:
        assert image_bands(file) == [1, 2, 3]


# --- raster labels --------------------------------------------------------------------------


def nearest_label(label, transform, crs) -> tuple[np.ndarray, np.ndarray]:
    """A label at the centres of the scene's pixels, by PROJ and numpy.

    Returns:
        The values (H, W), 255 outside; how far the centre is from the edge of the label's
        pixel, in its pixels.
    """
    columns, rows = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5)
    xs, ys = TRANSFORM * (columns.ravel(), rows.ravel())
    xs, ys = project(CRS, crs, xs, ys)
    columns, rows = ~transform * (np.array(xs), np.array(ys))
    to_edge = np.minimum(*(np.abs(v - np.rint(v)) for v in (columns, rows)))
    i, j = np.floor(rows).astype(int), np.floor(columns).astype(int)
    inside = (i >= 0) & (i < label.shape[0]) & (j >= 0) & (j < label.shape[1])
    values = np.full(i.shape, 255)
    values[inside] = label[i[inside], j[inside]]
    return values.reshape(SIZE, SIZE), to_edge.reshape(SIZE, SIZE)


@pytest.mark.parametrize("nodata", [None, 4, 255])
@pytest.mark.parametrize(
    ("crs", "pixel"),
    [
        (CRS, 20.0),
        (CRS, 3.3),
        (CRS, 10.0),
        ("EPSG:32630", 7.0),
        ("EPSG:4326", 2e-4),
        ("EPSG:3035", 25.0),
    ],
)
def test_a_label_on_another_pixel_grid_is_warped_to_the_nearest(
    site, crs, pixel, nodata
):
    corners = [TRANSFORM * c for c in ((0, 0), (SIZE, 0), (0, SIZE), (SIZE, SIZE))]
    xs, ys = project(CRS, crs, *zip(*corners))
    # a strip of the scene on the left and at the top has no label
    left, top = min(xs) + 4.3 * pixel, max(ys) - 2.6 * pixel
    width, height = (
        int((max(xs) - left) / pixel) + 3,
        int((top - min(ys)) / pixel) + 3,
    )
    label, transform = classes(5, height, width), from_origin(left, top, pixel, pixel)
    site.draw_label(label, crs=crs, transform=transform, nodata=nodata)
    site.draw_grid([box(0, 0, SIZE, SIZE)])
    found = site.only(size=SIZE).label
    values = np.where(label == nodata, 255, label)
    expected, to_edge = nearest_label(values, transform, crs)
    clear = to_edge > 0.01
    assert clear.mean() > 0.9
    assert 0.02 < np.mean(expected == 255) < 0.6
    assert np.array_equal(found[clear], expected[clear])


def test_a_label_shifted_by_whole_pixels_is_read_pixel_by_pixel(site):
    label = classes(height=60, width=70)
    site.draw_label(label, transform=TRANSFORM * Affine.translation(-7, -5))
    patches = site.extract()
    for patch in patches.values():
        rows, columns = patch.place()
        moved = label[
            rows.start + 5 : rows.stop + 5, columns.start + 7 : columns.stop + 7
        ]
        assert np.array_equal(patch.label, moved)


def test_a_warped_label_needs_no_module_that_is_there_by_chance(site):
    """In a process of its own: other tests import what the script forgot."""
    site.draw_label(classes(height=24, width=24), transform=TRANSFORM * Affine.scale(2))
    code = f"import Patch_extraction; sys.exit(Patch_extraction.main({site.words()}))"
    done = python(code, site.folder)
    assert done.returncode == 0, done.stderr
    assert len(site.patches()) == 9


def test_a_label_that_does_not_overlap_is_refused(site, capsys):
    site.draw_label(classes(), transform=TRANSFORM * Affine.translation(SIZE, 0))
    line = refusal(capsys, site)
    assert f"{site.label} does not overlap {site.image}" in line


def test_a_label_is_warped_onto_a_scene_whose_first_row_lies_in_the_south(site):
    upward = Affine(10, 0, 431_240, 0, 10, 4_912_080)
    site.draw_image(scene(), transform=upward)
    assert np.array_equal(
        site.extract()["patch_001"].label, np.flipud(classes())[32:, :16]
    )


def test_a_label_may_have_an_alpha_band(site):
    roles = [ColorInterp.gray, ColorInterp.alpha]
    alpha = 255 * hole("uint8")
    site.draw_label(np.stack([classes(), alpha]), colours=roles)
    for patch in site.extract().values():
        assert np.array_equal(patch.labelled, hole()[patch.place()])


def test_a_label_with_an_alpha_band_may_lie_on_another_pixel_grid(site):
    roles = [ColorInterp.gray, ColorInterp.alpha]
    alpha = 255 * hole("uint8")
    moved = TRANSFORM * Affine.translation(-16, 0)
    site.draw_label(np.stack([classes(), alpha]), colours=roles, transform=moved)
    patch = site.extract()["patch_001"]
    assert np.array_equal(patch.labelled, hole()[:16, 16:32])


def test_nodata_and_255_of_a_label_are_unlabelled(site):
    label = classes(5)
    label[10, 10] = 255
    site.draw_label(label, nodata=4)
    for patch in site.extract().values():
        source = label[patch.place()]
        assert np.array_equal(patch.label, np.where(source == 4, 255, source))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "float32", "float64"])
def test_a_label_may_have_any_dtype_that_holds_whole_numbers(site, dtype):
    label = np.where(hole(), classes().astype(dtype), -1).astype(dtype)
    site.draw_label(label, nodata=-1)
    for patch in site.extract().values():
        expected = np.where(hole(), classes(), 255)[patch.place()]
        assert patch.label.dtype == "uint8"
        assert np.array_equal(patch.label, expected)


def test_label_values_are_classes_in_their_order_and_all_others_are_unlabelled(site):
    label = np.array([0, 3, 7, 9, 255], "uint8")[classes(5)]
    site.draw_label(label)
    patches = site.extract("--label_values", "7,255,0", "--save_metadata")
    mapping = {7: 0, 255: 1, 0: 2}
    for patch in patches.values():
        source = label[patch.place()]
        expected = np.vectorize(lambda value: mapping.get(value, 255))(source)
        assert np.array_equal(patch.label, expected)
    assert site.metadata()["label_values"] == [7, 255, 0]


def test_label_values_may_be_negative(site):
    site.draw_label(classes().astype("int16") - 1)
    patch = site.extract("--label_values=-1,0,1")["patch_001"]
    assert np.array_equal(patch.label, classes()[:16, :16])


def test_declared_nodata_is_unlabelled_even_among_the_label_values(site):
    site.draw_label(classes(), nodata=0)
    patch = site.extract("--label_values", "0,1,2")["patch_001"]
    source = classes()[:16, :16]
    assert np.array_equal(patch.label, np.where(source == 0, 255, source))


@pytest.mark.parametrize(
    ("count", "dtype", "unlabelled"), [(255, "uint8", 255), (256, "uint16", 65535)]
)
def test_labels_have_16_bits_only_when_there_are_more_than_255_classes(
    site, count, dtype, unlabelled
):
    label = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % (count + 3)).astype("uint16")
    site.draw_label(2 * label)
    values = ",".join(str(2 * number) for number in range(count))
    patches = site.extract("--label_values", values, "--save_metadata")
    for patch in patches.values():
        source = label[patch.place()]
        assert (patch.label.dtype, patch.unlabelled) == (dtype, unlabelled)
        assert np.array_equal(patch.label, np.where(source < count, source, unlabelled))
    assert site.metadata()["unlabelled"] == unlabelled


@pytest.mark.parametrize(
    ("value", "dtype", "shown"),
    [(300, "uint16", "300"), (-3, "int16", "-3"), (1e6, "float32", "1000000")],
)
def test_a_value_that_is_no_class_is_refused_with_the_file_and_the_value(
    site, capsys, value, dtype, shown
):
    label = classes().astype(dtype)
    label[20, 20] = value
    site.draw_label(label)
    line = refusal(capsys, site)
    assert f"{site.label} holds {shown}:" in line
    assert "--label_values" in line


def test_a_fraction_among_the_labels_is_refused(site, capsys):
    label = classes().astype("float32")
    label[20, 20] = 1.5
    site.draw_label(label)
    assert f"{site.label} holds 1.5" in refusal(capsys, site)


def test_a_label_of_a_single_class_is_extracted_with_a_warning(site, capsys):
    site.draw_label(np.where(classes() == 0, 1, 255).astype("uint8"))
    site.extract()
    err = capsys.readouterr().err
    assert "all labelled pixels are class 1" in err
    assert "--label_values 0,255" in err


# --- vector labels --------------------------------------------------------------------------

LEFT, RIGHT = box(2, 2, 26.2, 44), box(20.3, 6, 46, 40)  # they overlap in the middle


def burnt(*shapes_and_classes, outside: int) -> np.ndarray:
    """(H, W): the class of the last shape that holds a pixel's centre, by shapely."""
    label = np.full((SIZE, SIZE), outside)
    for shape, number in shapes_and_classes:
        label[centres_inside(shape)] = number
    return label


def check_labels(patches, expected) -> None:
    for patch in patches.values():
        assert np.array_equal(patch.label, expected[patch.place()])


def test_polygons_without_a_column_are_class_1_and_everything_else_is_class_0(site):
    site.draw_label_shapes([LEFT, RIGHT], kind=[5, 6])
    patches = site.extract()
    assert len(patches) == 9
    check_labels(patches, burnt((LEFT, 1), (RIGHT, 1), outside=0))
    assert patches["patch_001"].class_names is None


@pytest.mark.parametrize("order", [1, -1])
def test_where_polygons_overlap_the_last_one_wins(site, order):
    shapes, numbers = [LEFT, RIGHT][::order], [2, 0]
    site.draw_label_shapes(shapes, kind=numbers)
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt(*zip(shapes, numbers), outside=255))


def test_a_numeric_column_may_have_gaps_which_are_unlabelled(site):
    site.draw_label_shapes([LEFT, RIGHT], kind=[1.0, None])
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt((LEFT, 1), (RIGHT, 255), outside=255))


def test_label_values_number_the_values_of_a_numeric_column(site):
    far = box(0, 45, 48, 48)
    site.draw_label_shapes([LEFT, RIGHT, far], kind=[311, 112, 7])
    words = ["--label_column", "kind", "--label_values", "112,311"]
    patches = site.extract(*words, "--class_names", "town,forest")
    check_labels(patches, burnt((LEFT, 1), (RIGHT, 0), (far, 255), outside=255))
    assert patches["patch_001"].class_names == ["town", "forest"]


def test_the_texts_of_a_column_are_classes_in_alphabetical_order(site):
    site.draw_label_shapes(
        [LEFT, RIGHT, box(0, 45, 9, 48)], kind=["wood", "lake", None]
    )
    patches = site.extract("--label_column", "kind", "--save_metadata")
    check_labels(
        patches,
        burnt((LEFT, 1), (RIGHT, 0), (box(0, 45, 9, 48), 255), outside=255),
    )
    assert {tuple(p.class_names) for p in patches.values()} == {("lake", "wood")}
    assert site.metadata()["class_names"] == ["lake", "wood"]


def test_label_values_order_the_texts_of_a_column_and_leave_others_out(site):
    far = box(0, 45, 48, 48)
    site.draw_label_shapes([LEFT, RIGHT, far], kind=["wood", "lake", "road"])
    words = ["--label_column", "kind", "--label_values", "wood, lake"]
    patches = site.extract(*words)
    check_labels(patches, burnt((LEFT, 0), (RIGHT, 1), (far, 255), outside=255))
    assert patches["patch_001"].class_names == ["wood", "lake"]


def test_class_names_replace_the_texts_of_a_column(site):
    site.draw_label_shapes([LEFT, RIGHT], kind=["w", "l"])
    words = ["--label_column", "kind", "--class_names", "Lac,Forêt"]
    patch = site.extract(*words)["patch_001"]
    assert patch.class_names == ["Lac", "Forêt"]


@pytest.mark.parametrize("name", ["label.shp", "label.geojson", "label.gpkg"])
def test_a_vector_label_may_be_in_any_format_and_crs(site, name):
    shapes = [LEFT, RIGHT]
    crs = "EPSG:4326"
    site.label = write_cells(site.folder / name, shapes, crs=crs, kind=[0, 1])
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt((LEFT, 0), (RIGHT, 1), outside=255))


def test_features_without_geometry_label_nothing(site):
    shapes = [LEFT, None, Polygon()]
    site.draw_label_shapes(shapes, kind=[0, 1, 2])
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt((LEFT, 0), outside=255))


def test_a_vector_label_is_valid_only_where_the_image_is(site):
    site.draw_image(np.where(hole(), scene(), 0), nodata=0, dtype="uint16")
    site.draw_label_shapes([LEFT])
    expected = np.where(hole(), burnt((LEFT, 1), outside=0), 255)
    check_labels(site.extract(), expected)


def test_a_column_with_fractions_is_refused(site, capsys):
    site.draw_label_shapes([LEFT, RIGHT], kind=[1.0, 2.5])
    assert "fractions or infinities in kind" in refusal(
        capsys, site, "--label_column", "kind"
    )


def test_a_class_of_a_column_that_is_no_class_is_refused(site, capsys):
    site.draw_label_shapes([LEFT, RIGHT], kind=[1, 311])
    line = refusal(capsys, site, "--label_column", "kind")
    assert f"{site.label} holds 311:" in line


def test_a_large_number_in_a_column_is_not_mistaken_for_another(site):
    site.draw_label_shapes([LEFT, RIGHT], kind=[10**10, 2])
    words = ["--label_column", "kind", "--label_values", f"{10**10},2"]
    check_labels(site.extract(*words), burnt((LEFT, 0), (RIGHT, 1), outside=255))


def test_256_texts_are_256_classes(site):
    shapes = tiles(16, 16, side=3)
    site.draw_label_shapes(shapes, kind=[f"t{number:03}" for number in range(256)])
    patches = site.extract("--label_column", "kind")
    check_labels(patches, burnt(*zip(shapes, range(256)), outside=65535))
    assert all(patch.labelled.all() for patch in patches.values())


# --- class names ----------------------------------------------------------------------------


def test_class_names_are_stored_in_every_label(site):
    patches = site.extract("--class_names", "water, trees,bâti", "--save_metadata")
    stored = {tuple(patch.class_names) for patch in patches.values()}
    assert stored == {("water", "trees", "bâti")}
    assert site.metadata()["class_names"] == ["water", "trees", "bâti"]


def test_class_names_that_do_not_suffice_for_the_classes_are_refused(site, capsys):
    refusal(capsys, site, "--class_names", "water,trees")


# --- metadata -------------------------------------------------------------------------------


def test_metadata_is_true_of_every_patch(site):
    image = scene()
    image[:, ~hole()] = 0
    site.draw_image(image, nodata=0)
    cells = [*tiles(3, 1), diamond(24, 24), box(20, 30, 40, 44), box(200, 0, 216, 16)]
    site.draw_grid(cells, name=list("abcdef"))
    patches = site.extract("--save_metadata", "--seed", 3)
    report = site.metadata()
    records = {record["name"]: record for record in report["patches"]}
    assert records.keys() == patches.keys()
    for (name, patch), cell in zip(patches.items(), cells):
        record = records[name]
        left, top, width, height = record["window"]
        assert record["split"] == patch.split
        assert record["transform"] == list(patch.transform[:6])
        assert patch.transform == (
            TRANSFORM
            * Affine.translation(left, top)
            * Affine.scale(width / PATCH, height / PATCH)
        )
        inside = centres_inside(cell)
        assert record["valid_share"] == round(hole()[inside].mean(), 4)
        counts = np.bincount(patch.label[patch.labelled])
        assert record["class_pixels"] == counts.tolist()
        if (width, height) == (PATCH, PATCH):
            valid = hole()[top : top + PATCH, left : left + PATCH]
            source = image[:, top : top + PATCH, left : left + PATCH]
            assert np.array_equal(patch.image, np.where(valid, source, 0))
    assert [records[n]["window"][2:] for n in ("patch_d", "patch_e")] == [
        [16, 16],
        [20, 14],
    ]
    assert report["version"] == VERSION
    assert report["crs"] == CRS
    assert report["unlabelled"] == 255
    assert report["skipped"] == {"patch_f": "outside the image"}
    settings = report["settings"]
    assert settings["image"] == str(site.image)
    assert (settings["seed"], settings["patch_size"]) == (3, PATCH)


def test_metadata_is_written_only_when_it_is_asked_for(site):
    site.extract()
    assert not (site.out / "Patch" / "metadata.json").exists()


def test_the_table_on_stdout_counts_the_splits(site, capsys):
    site.draw_label(np.repeat([[0], [1], [255]], 16, 0).repeat(SIZE, 1).astype("uint8"))
    site.draw_grid([box(0, 8, 16, 24), box(16, 8, 32, 24), box(32, 24, 48, 40)])
    site.extract("--train_ratio", 1, "--val_ratio", 0, "--test_ratio", 0)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[:5] == [
        ["train", "validation", "test"],
        ["patches", "3", "0", "0"],
        ["class", "0", "40.0%", "0.0%", "0.0%"],
        ["class", "1", "60.0%", "0.0%", "0.0%"],
        ["unlabelled", "16.7%", "0.0%", "0.0%"],
    ]
    assert rows[-1] == ["Patches:", str(site.out / "Patch")]


def test_summaries_of_splits_add_up():
    total = SplitSummary(1, 10, (2, 3)) + SplitSummary(2, 20, (1, 0, 4))
    assert total == SplitSummary(3, 30, (3, 3, 4))
    assert total.unlabelled_share == pytest.approx(20 / 30)
    assert total.class_share(2) == 0.4
    assert total.class_share(3) == SplitSummary().class_share(0) == 0
    assert SplitSummary().unlabelled_share == 0


# --- runs that fail, and runs upon runs -------------------------------------------------------


def test_a_second_run_refuses_and_leaves_the_first_one_as_it_is(site, capsys):
    first = site.extract()
    before = site.leftovers()
    capsys.readouterr()
    assert run(*site.words("--seed", 1)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{site.out / 'Patch'} already holds patches" in line
    assert "--overwrite" in line
    assert site.leftovers() == before
    assert {n: p.split for n, p in site.patches().items()} == {
        n: p.split for n, p in first.items()
    }


def test_overwrite_replaces_the_patches_of_the_first_run(site):
    site.extract("--save_metadata")
    (site.out / "sample.png").write_bytes(b"mine")
    site.draw_grid(tiles(2, 1), plot=["a", "b"])
    patches = site.extract("--overwrite", "--id_column", "plot")
    assert list(patches) == ["patch_a", "patch_b"]
    assert {path.name for path in site.out.iterdir()} == {"Patch", "sample.png"}
    assert not (site.out / "Patch" / "metadata.json").exists()


def test_an_empty_folder_of_that_name_is_no_obstacle(site):
    (site.out / "Patch").mkdir(parents=True)
    assert len(site.extract()) == 9


def failing_write(error: BaseException):
    """A ``PatchWriter.write`` that fails at the fifth patch."""
    write, calls = PatchWriter.write, []

    def failing(self, patch, image_path, label_path):
        write(self, patch, image_path, label_path)
        calls.append(image_path)
        if len(calls) == 5:
            raise error

    return failing


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(errno.ENOSPC, "No space left on device"), 1), (KeyboardInterrupt(), 130)],
)
def test_a_run_that_ends_early_leaves_the_former_patches_untouched(
    site, capsys, monkeypatch, error, status
):
    site.extract()
    before = {path: pixels(path) for path in site.out.rglob("*.tif")}
    monkeypatch.setattr(PatchWriter, "write", failing_write(error))
    capsys.readouterr()
    assert run(*site.words("--overwrite")) == status
    lines = capsys.readouterr().err.splitlines()
    kept = {"Patch"}
    if status == 1:
        assert len(lines) == 1 and "No space left" in lines[0]
    else:
        assert "--resume" in lines[0]
        kept.add(".Patch-partial")
    assert {path.name for path in site.out.iterdir()} == kept
    after = {path: pixels(path) for path in (site.out / "Patch").rglob("*.tif")}
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[path], before[path]) for path in before)


def test_a_defect_shows_its_traceback_and_leaves_no_file(site, monkeypatch):
    failing = failing_write(ZeroDivisionError())
    monkeypatch.setattr(PatchWriter, "write", failing)
    with pytest.raises(ZeroDivisionError):
        run(*site.words())
    assert site.leftovers() == []


def test_a_failing_run_leaves_no_empty_folder(site, capsys):
    site.draw_label(classes(dtype="uint16") + 300)
    site.out = site.folder / "deep" / "out"
    refusal(capsys, site)
    assert not (site.folder / "deep").exists()


def test_a_file_in_the_place_of_the_patches_is_left_alone(site):
    site.out.mkdir()
    (site.out / "Patch").write_text("mine")
    assert run(*site.words()) == 1
    assert site.leftovers() == ["Patch"]
    assert (site.out / "Patch").read_text() == "mine"


def test_overwrite_leaves_nothing_behind_where_the_patches_are_a_link(site):
    elsewhere = site.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("old")
    site.out.mkdir()
    (site.out / "Patch").symlink_to(elsewhere)
    assert len(site.extract("--overwrite")) == 9
    assert [path.name for path in site.out.iterdir()] == ["Patch"]


def test_patches_are_flushed_to_disk_before_they_get_their_name(site, monkeypatch):
    seen = []
    monkeypatch.setattr(
        os,
        "sync",
        lambda: seen.append([path.name for path in site.out.glob("Patch")]),
    )
    site.extract()
    assert seen == [[]]


def draw_table(site: Site) -> None:
    site.grid = site.folder / "grid.csv"
    site.grid.write_text("id,name\n1,a\n")


def draw_grid_without_crs(site: Site) -> None:
    site.draw_grid(tiles(), "grid.shp")
    site.grid.with_suffix(".prj").unlink()


def rename(what: str, name: str):
    return lambda site: setattr(site, what, site.folder / name)


def copy_as(what: str, source: str, name: str):
    """Instead of one file a copy of another, under the name of another format."""

    def change(site: Site) -> None:
        (site.folder / name).write_bytes(getattr(site, source).read_bytes())
        setattr(site, what, site.folder / name)

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.draw_image(scene(), crs=None), "image.tif has no CRS"),
        (rename("label", "no.shp"), "no.shp cannot be read as a vector file"),
        (lambda s: s.draw_label(scene()), "label.tif has 3 bands; a label has one"),
        (lambda s: s.draw_label(classes(), crs=None), "label.tif has no CRS"),
        (rename("grid", "no.gpkg"), "no.gpkg cannot be read as a vector file"),
        (rename("grid", "image.tif"), "image.tif"),
        (draw_table, "grid.csv has no geometries"),
        (draw_grid_without_crs, "grid.shp has no CRS; add it"),
        (lambda s: s.draw_grid([]), "has no geometries"),
        (lambda s: s.draw_grid([None, None]), "has no geometries"),
        (lambda s: s.draw_label(np.full((SIZE, SIZE), 255, "uint8")), "no labelled"),
        (lambda s: s.draw_image(0 * scene(), nodata=0), "no valid pixel"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(
    site, capsys, change, expected
):
    change(site)
    assert expected in refusal(capsys, site)


def cut_off(what: str):
    def change(site: Site) -> None:
        path = getattr(site, what)
        path.write_bytes(path.read_bytes()[:-3000])

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rename("image", "no.tif"), "no.tif"),
        (rename("image", "grid.geojson"), "grid.geojson"),
        (copy_as("image", "grid", "scene.tif"), "scene.tif"),
        (rename("label", "no.tif"), "no.tif"),
        (cut_off("image"), "image.tif"),
        (cut_off("label"), "label.tif"),
    ],
)
def test_rasters_that_cannot_be_read_are_refused_in_one_line(
    site, capsys, change, expected
):
    site.draw_label(classes(dtype="uint16"))
    change(site)
    error, file = refusal(capsys, site), site.folder / expected
    assert f"Cannot read {file}" in error or f"{file} is cut off" in error


@pytest.mark.parametrize("what", ["grid", "label"])
def test_a_crs_of_which_nothing_is_known_is_refused(site, capsys, what):
    local = 'LOCAL_CS["drawing board",UNIT["metre",1]]'
    if what == "label":
        site.draw_label(classes(), crs=local)
    else:
        site.draw_grid(tiles(), "grid.gpkg", drawn_in=local, crs=None)
    assert str(getattr(site, what)) in refusal(capsys, site)


def test_debug_shows_the_traceback_of_a_refusal(site):
    site.image = site.folder / "no.tif"
    with pytest.raises(RasterError, match=r"no\.tif"):
        run(*site.words("--debug"))


# --- command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--patch_size", 7], "--patch_size 7: expected at least 8"),
        (["--patch_size", "big"], "invalid int value: 'big'"),
        (["--min_valid", 1.1], "--min_valid 1.1: expected 0 to 1"),
        (["--min_valid", "nan"], "--min_valid nan: expected 0 to 1"),
        (["--seed", -1], "--seed -1: expected 0 to 2^32 - 1"),
        (["--train_ratio", 0.8], "--test_ratio sum to 1.05: expected a sum of 1"),
        (["--train_ratio", 1.2], "--train_ratio 1.2: expected 0 to 1"),
        (["--val_ratio", -0.1], "--val_ratio -0.1: expected 0 to 1"),
        (["--train_ratio", 0, "--val_ratio", 0.9], "--train_ratio 0.0: expected more"),
        (["--interpolation", "lanczos"], "invalid choice: 'lanczos'"),
        (["--label_values", "3"], "at least two different values"),
        (["--label_values", "3,3"], "at least two different values"),
        (["--label_values", "1,two"], "expected whole numbers for this label"),
        (["--label_values", "1,,2"], "expected whole numbers for this label"),
        (["--label_values", "1,2", "--class_names", "a"], "2 names, as many as"),
        (["--id_column", "plot"], "Unknown --id_column 'plot'"),
        (["--patch", 16], "unrecognized arguments: --patch 16"),
    ],
)
def test_a_wrong_option_exits_with_status_2_and_writes_nothing(
    site, capsys, words, expected
):
    assert expected in complaint(capsys, *site.words(*words))
    assert not site.out.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--label_values", "1,2"], "expected --label_column with it"),
        (["--label_column", "sort"], "Unknown --label_column 'sort'"),
        (["--label_column", "kind", "--label_values", "a,x"], "Unknown --label_values"),
    ],
)
def test_a_wrong_option_for_a_vector_label_exits_with_status_2(
    site, capsys, words, expected
):
    site.draw_label_shapes([LEFT, RIGHT], kind=["a", "b"])
    assert expected in complaint(capsys, *site.words(*words))
    assert not site.out.exists()


@pytest.mark.parametrize("command", ["extract", "visualize", "info"])
def test_a_missing_option_is_named(capsys, command):
    assert "--output" in complaint(capsys, command)


def test_a_missing_or_unknown_command_exits_with_status_2(capsys):
    assert "COMMAND" in complaint(capsys)
    assert "'cut'" in complaint(capsys, "cut")


def test_the_documented_options_have_the_documented_defaults():
    words = ["--image", "i", "--label", "l", "--grid", "g", "--output", "o"]
    parsed = Patch_extraction.build_parser().parse_args(["extract", *words])
    config = settings_from(ExtractionConfig, parsed)
    assert config == ExtractionConfig(image="i", label="l", grid="g", output="o")
    assert config.ratios == (0.75, 0.15, 0.10)
    assert (config.patch_size, config.seed, config.min_valid) == (224, 42, 0.5)
    assert not config.save_metadata


def test_extraction_imports_neither_torch_nor_scikit_learn_and_help_nothing_slow(site):
    slow = "'geopandas', 'pandas', 'matplotlib', 'cv2', 'scipy', 'tifffile'"
    code = f"""
import Patch_extraction
heavy = {{'torch', 'torchvision', 'segmentation_models_pytorch', 'sklearn'}}
for command in ([], ['extract'], ['visualize'], ['info']):
    try:
        Patch_extraction.main([*command, '--help'])
    except SystemExit as exit:
        assert exit.code == 0
assert not ({{{slow}}} | heavy) & set(sys.modules), 'help'
status = Patch_extraction.main({site.words(size=8)})
assert not heavy & set(sys.modules), 'extract'
sys.exit(status)
"""
    done = python(code, site.folder)
    assert done.returncode == 0, done.stderr
    assert "--patch_size" in done.stdout
    assert len(site.patches()) == 9


# --- other readers --------------------------------------------------------------------------


def test_tifffile_reads_the_patches_with_the_listed_packages_alone(tmp_path):
    expected = {}
    for dtype in ("uint8", "int16", "uint16", "float32"):
        site = Site(tmp_path)
        site.out = tmp_path / dtype
        image = scene(dtype=dtype)
        image[:, :4] = 0
        site.draw_image(image, nodata=0)
        if dtype == "uint16":
            site.draw_image(image, mask=image[0] > 0)
            site.draw_label(classes(300, dtype="uint16"))
            values = ",".join(map(str, range(300)))
            site.extract("--label_values", values)
        else:
            site.extract()
        for path in site.out.rglob("*.tif"):
            expected[str(path)] = pixels(path)
    code = f"""
sys.modules['imagecodecs'] = None
import numpy, tifffile
paths = {list(expected)}
numpy.savez('read.npz', **{{str(i): tifffile.imread(p) for i, p in enumerate(paths)}})
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    read = np.load(tmp_path / "read.npz")
    assert len(expected) == 4 * 2 * 9
    for number, array in enumerate(expected.values()):
        found = read[str(number)]
        assert found.dtype == array.dtype
        assert np.array_equal(found.reshape(array.shape), array)


def test_memory_does_not_grow_with_the_scene(site):
    peaks = []
    for rows in (2, 2, 64):  # the first run pays for the imports
        height = 64 * rows
        site.draw_image(scene(4, height, 64, "float32"))
        site.draw_label(classes(3, height, 64))
        site.draw_grid(tiles(1, rows, side=64))
        tracemalloc.start()
        assert run(*site.words("--overwrite", size=32)) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    growth = 4 * 64 * 64 * 62 * 4  # bytes of the pixels that the last scene has more
    assert peaks[2] - peaks[1] < growth / 4


# --- info -----------------------------------------------------------------------------------


def counts_by_hand(root: Path, split: str, unlabelled=255) -> tuple[int, int, list]:
    """Patches, pixels and pixels per class of a split."""
    labels = [pixels(path) for path in sorted((root / split / "labels").iterdir())]
    every = np.concatenate([label.ravel() for label in labels])
    return len(labels), every.size, np.bincount(every[every != unlabelled]).tolist()


def test_the_report_equals_an_independent_count(site, capsys):
    label = classes(4)
    label[:9] = 255
    site.draw_label(label)
    site.draw_image(scene(), nodata=0)
    site.draw_grid(tiles(6, 6, side=8))
    site.extract("--class_names", "a,b,c,d", size=8)
    capsys.readouterr()
    assert run("info", "--output", site.out) == 0
    out, err = capsys.readouterr()
    report = json.loads((site.out / "dataset_info.json").read_text())
    assert report["class_names"] == ["a", "b", "c", "d"]
    assert list(report["splits"]) == list(SPLITS)
    kinds, table = out.split("\n\n")[:2]
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    for column, (split, entry) in enumerate(report["splits"].items()):
        patches, size, counts = counts_by_hand(site.out / "Patch", split)
        assert entry["patches"] == patches > 0
        assert entry["pixels"] == size
        assert entry["class_pixels"] == counts
        assert entry["unlabelled_share"] == pytest.approx(1 - sum(counts) / size)
        kind = {"bands": 3, "height": 8, "width": 8, "dtype": "uint16"}
        assert entry["kinds"] == [kind | {"patches": patches}]
        for name, count in zip("abcd", counts):
            assert rows[name][column] == f"{count / sum(counts):.1%}"
        assert f"{patches} patches of 8 x 8 pixels, 3 bands, uint16" in kinds
    assert sum(e["patches"] for e in report["splits"].values()) == 30  # 6 without label
    assert err == ""


def test_the_report_works_on_splits_that_lie_directly_in_the_root(make_dataset):
    root = make_dataset(4, 2, 0, bands=2, classes=3, folder="", unlabelled_rows=5)
    assert run("info", "--output", root) == 0
    report = json.loads((root / "dataset_info.json").read_text())
    for split in ("train", "validation"):
        entry = report["splits"][split]
        found = entry["patches"], entry["pixels"], entry["class_pixels"]
        assert found == tuple(counts_by_hand(root, split))
        assert entry["unlabelled_share"] == pytest.approx(5 / 32)
    assert report["splits"]["test"]["patches"] == 0
    assert report["class_names"] is None


def test_declared_nodata_of_a_label_counts_as_unlabelled_in_the_report(make_dataset):
    root = make_dataset(2, 1, 1, label_nodata=9, unlabelled_rows=8)
    assert run("info", "--output", root) == 0
    entry = json.loads((root / "dataset_info.json").read_text())["splits"]["train"]
    assert entry["unlabelled_share"] == pytest.approx(8 / 32)
    assert len(entry["class_pixels"]) == 2


def test_patches_of_several_kinds_are_told_apart_in_the_report(make_dataset, capsys):
    root = make_dataset(3, 1, 0, bands=2, size=32)
    more = make_dataset(2, 0, 0, bands=2, size=(16, 24), dtype="float32")
    for path in more.rglob("*.tif"):
        kind = path.parent.name
        path.rename(root / "Patch" / "train" / kind / f"other_{path.name}")
    assert run("info", "--output", root) == 0
    kinds = json.loads((root / "dataset_info.json").read_text())["splits"]["train"]
    assert [(k["patches"], k["height"], k["width"]) for k in kinds["kinds"]] == [
        (3, 32, 32),
        (2, 16, 24),
    ]
    assert "2 patches of 16 x 24 pixels, 2 bands, float32" in capsys.readouterr().out


def test_a_dataset_without_any_label_is_reported(make_dataset, capsys):
    root = make_dataset(2, 1, 0, unlabelled_rows=32)
    assert run("info", "--output", root) == 0
    assert "100.0%" in capsys.readouterr().out


def test_class_255_of_many_is_counted_in_the_report(site):
    label = np.arange(SIZE * SIZE).reshape(SIZE, SIZE) % 300
    site.draw_label(label.astype("uint16"))
    site.extract("--label_values", ",".join(map(str, range(300))))
    assert run("info", "--output", site.out) == 0
    report = json.loads((site.out / "dataset_info.json").read_text())
    counts = counts_by_hand(site.out / "Patch", "train", 65535)[2]
    assert counts[255] > 0
    assert report["splits"]["train"]["class_pixels"] == counts


def test_a_cell_whose_labels_vanish_in_resizing_gives_no_patch(site):
    label = np.full((SIZE, SIZE), 255, "uint8")
    label[0, 0] = 1  # among 4 pixels, the nearest to the centre is another
    label[16:] = classes()[16:]
    site.draw_label(label)
    site.draw_grid([box(0, 0, 16, 16), box(16, 16, 32, 32)])
    assert list(site.extract(size=8)) == ["patch_002"]


def test_a_folder_that_holds_no_dataset_is_refused(tmp_path, capsys):
    for folder, expected in (
        (tmp_path, "No images found in"),
        (tmp_path / "no", f"No folder {tmp_path / 'no'}"),
    ):
        for command in ("info", "visualize"):
            assert run(command, "--output", folder) == 1
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_an_image_without_its_label_is_refused_by_name(make_dataset, capsys):
    root = make_dataset(2, 1, 0)
    (root / "Patch/train/labels/patch_001.tif").unlink()
    assert run("info", "--output", root) == 1
    assert "patch_001.tif has no label" in capsys.readouterr().err
    assert not (root / "dataset_info.json").exists()


def test_a_patch_that_is_cut_off_is_refused_by_name(make_dataset, capsys):
    root = make_dataset(2, 1, 0)
    path = root / "Patch/train/images/patch_001.tif"
    path.write_bytes(path.read_bytes()[:600])
    assert run("info", "--output", root) == 1
    assert str(path) in capsys.readouterr().err.splitlines()[-1]
    assert not (root / "dataset_info.json").exists()


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_patch_that_is_cut_off_is_refused_in_one_line(make_dataset, capsys, kind):
    root = make_dataset(2, 1, 0)
    path = root / "Patch/train" / kind / "patch_001.tif"
    path.write_bytes(path.read_bytes()[:600])
    assert run("info", "--output", root) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


# --- visualize ------------------------------------------------------------------------------


def drawn(root: Path, *words, capsys) -> Path:
    """The PNG whose path is printed."""
    capsys.readouterr()
    assert run("visualize", "--output", root, *words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (path,) = out.splitlines()
    return Path(path)


@pytest.mark.parametrize("bands", [1, 3, 10])
def test_a_patch_of_any_number_of_bands_is_drawn(make_dataset, capsys, bands):
    root = make_dataset(3, 1, 0, bands=bands, classes=3, unlabelled_rows=4)
    path = drawn(root, capsys=capsys)
    assert path == root / "sample_train_patch_000.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[1] > 2 * picture.shape[0]  # three panels side by side
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


def test_split_and_index_choose_the_patch(make_dataset, capsys):
    root = make_dataset(3, 2, 1, folder="")
    for words, name in (
        (["--split", "validation", "--sample_index", 1], "validation_patch_004"),
        (["--split", "test"], "test_patch_005"),
        (["--sample_index", 2], "train_patch_002"),
    ):
        path = drawn(root, *words, capsys=capsys)
        assert path == root / f"sample_{name}.png"
        assert path.stat().st_size > 1000


@pytest.mark.parametrize("index", [-1, 3])
def test_a_sample_index_beyond_the_split_exits_with_status_2(
    make_dataset, capsys, index
):
    root = make_dataset(3, 1, 0)
    line = complaint(capsys, "visualize", "--output", root, "--sample_index", index)
    assert f"--sample_index {index}: expected 0 to 2" in line
    assert list(root.glob("*.png")) == []


def test_an_empty_split_is_refused(make_dataset, capsys):
    root = make_dataset(2, 1, 0)
    assert run("visualize", "--output", root, "--split", "test") == 1
    assert "No images found in" in capsys.readouterr().err


@pytest.fixture
def shown(monkeypatch) -> dict:
    """What would be drawn."""
    kept = {}

    draw = pictures.draw_panels

    def draw_panels(panels, legend, title):
        kept.update({panel["title"]: panel["picture"] for panel in panels})
        kept.update(legend=list(legend), title=title)
        return draw(panels, legend, title)

    patch_everywhere(monkeypatch, "common.pictures.draw_panels", draw_panels)
    return kept


def test_the_picture_shows_true_colour_the_classes_and_both(make_dataset, shown):
    root = make_dataset(
        1,
        1,
        0,
        classes=3,
        nodata=0,
        invalid_rows=3,
        unlabelled_rows=4,
        descriptions=SENTINEL,
        tags=class_name_tags(["water", "trees", "town"]),
    )
    assert run("visualize", "--output", root) == 0
    image, label = (
        pixels(root / "Patch/train" / kind / "patch_000.tif")
        for kind in ("images", "labels")
    )
    label = np.where(image[0] == 0, 255, label[0])
    picture = stretch(image[[2, 1, 0]], image[0] != 0)
    assert np.array_equal(shown["image (bands 3, 2, 1)"], picture)
    colours = np.array([*class_colours(3), (255, 255, 255)])
    expected = colours[np.where(label == 255, 3, label)]
    assert np.array_equal(shown["label"], expected)
    unlabelled = label == 255
    assert np.array_equal(shown["overlay"][unlabelled], picture[unlabelled])
    mixed = 0.55 * picture + 0.45 * expected
    assert np.abs(shown["overlay"] - mixed)[~unlabelled].max() <= 1
    assert shown["legend"] == list(zip(["water", "trees", "town"], class_colours(3)))
    assert shown["title"] == "train 0: patch_000"


def test_the_legend_lists_the_classes_that_are_there(site, shown):
    site.draw_label(np.where(classes(2) == 0, 1, 4).astype("uint8"))
    site.extract()
    assert run("visualize", "--output", site.out) == 0
    colours = class_colours(5)
    assert shown["legend"] == [("class 1", colours[1]), ("class 4", colours[4])]


def test_show_without_a_display_is_refused_after_the_picture_is_stored(
    make_dataset, capsys, monkeypatch
):
    import matplotlib.pyplot

    monkeypatch.setattr(matplotlib.pyplot, "get_backend", lambda: "agg")
    root = make_dataset(1, 1, 0)
    assert run("visualize", "--output", root, "--show") == 1
    out, err = capsys.readouterr()
    assert Path(out.strip()).is_file()
    assert "No display for --show" in err


def test_show_opens_a_window_where_there_is_a_display(make_dataset, monkeypatch):
    import matplotlib.pyplot

    opened = []
    monkeypatch.setattr(matplotlib.pyplot, "get_backend", lambda: "TkAgg")
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: opened.append(True))
    assert run("visualize", "--output", make_dataset(1, 1, 0), "--show") == 0
    assert opened == [True]
    matplotlib.pyplot.close("all")


def test_a_patch_with_an_alpha_band_is_drawn(make_dataset):
    root = make_dataset(1, 1, 0, bands=3, dtype="uint8")
    path = root / "Patch/train/images/patch_000.tif"
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha]
    assert run("visualize", "--output", root) == 0
