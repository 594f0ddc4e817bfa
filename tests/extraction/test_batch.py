"""Patch_extraction.py on many scenes: pairing, cells, splits on the ground, errors, resuming.

Scenes are tiny, of 10 m pixels; cells have 8 pixels (80 m) unless a test says otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import geopandas
import numpy as np
import pandas
import pytest
import rasterio
import shapely
from helpers import CRS, ORIGIN, patch_everywhere
from rasterio.transform import Affine
from rasterio.warp import transform as project
from rasterio.windows import Window
from shapely import box
from shapely.affinity import affine_transform

import Patch_extraction
from common import SPLITS
from common.console import settings_from
from common.errors import DatasetError
from common.ground import footprint, pairs_within, to_metric_crs
from common.rasters import GDAL_OPTIONS, Source
from extraction import cutting
from extraction.cells import reading_order, regular_cells
from extraction.cutting import PatchWriter
from extraction.journal import Journal
from extraction.report import PatchLocation, split_overlaps
from extraction.scenes import find_ids, pair_scenes
from extraction.settings import BatchConfig
from extraction.splits import balance_blocks, link_repeat_coverage

SIDE = 8
RATIOS = (0.75, 0.15, 0.10)
TRANSFORM = Affine(10, 0, ORIGIN[0], 0, -10, ORIGIN[1])


# --- helpers --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing the disks of the whole machine at each extraction would take most of the time."""
    monkeypatch.setattr(os, "sync", lambda: None)


def run(*words) -> int:
    """The script in this process: its exit status."""
    try:
        return Patch_extraction.main([str(word) for word in words])
    except SystemExit as exit:
        return exit.code


def write(path: Path, pixels, transform=TRANSFORM, crs=CRS, **profile) -> Path:
    """Write (C, H, W) or (H, W) pixels as a GeoTIFF."""
    pixels = np.asarray(pixels)
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    count, height, width = pixels.shape
    shape = {"count": count, "height": height, "width": width, "dtype": pixels.dtype}
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": crs, "transform": transform}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place, **profile) as file:
        file.write(pixels)
    return path


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


def write_grid(path: Path, cells, transform=TRANSFORM, crs=CRS, **columns) -> Path:
    """Write cells, given in pixels, as a vector file."""
    a, b, c, d, e, f = transform[:6]
    ground = [affine_transform(cell, [a, b, d, e, c, f]) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    geopandas.GeoDataFrame(columns, geometry=ground, crs=crs).to_file(path)
    return path


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
        """The one line on stderr of a run that could not be done and left nothing."""
        capsys.readouterr()
        assert run(*self.words(*words, size=size)) == 1
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert (out, line[:7]) == ("", "error: ")
        assert not self.out.exists()
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


@pytest.fixture
def batch(tmp_path) -> Batch:
    return Batch(tmp_path)


def messages(capsys, *words, status: int = 0) -> list[str]:
    """The lines on stderr of a run."""
    capsys.readouterr()
    assert run(*words) == status
    return capsys.readouterr().err.splitlines()


def complaint(capsys, *words) -> str:
    """The last line on stderr of a wrong command line."""
    capsys.readouterr()
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def metric(shapes, crs=CRS) -> geopandas.GeoSeries:
    return geopandas.GeoSeries(shapes, crs=crs)


# --- pairing --------------------------------------------------------------------------------


def test_an_id_is_what_stands_for_it_in_the_pattern_in_any_case():
    names = [
        "Image_A.tif",
        "IMAGE_b_2.TIF",
        "Image_.tif",
        "xImage_c.tif",
        "Image_d.tiff",
    ]
    found = find_ids([Path(n) for n in names], "Image_<id>.tif")
    assert found == {"a": Path("Image_A.tif"), "b_2": Path("IMAGE_b_2.TIF")}


def test_a_star_stands_for_anything_and_signs_for_themselves():
    names = ["S2_x_(1).tif", "S2_y_(1).jp2", "S2_z_1.tif"]
    found = find_ids([Path(n) for n in names], "S2_<id>_(1).*")
    assert list(found) == ["x", "y"]
    starred = find_ids([Path(n) for n in names], "*_<id>_*")
    assert list(starred) == ["x", "y", "z"]


def test_two_files_of_one_id_are_refused_by_name():
    paths = [Path("a/Image_7.tif"), Path("b/image_7.TIF")]
    with pytest.raises(DatasetError, match=r"a/Image_7\.tif and b/image_7\.TIF"):
        find_ids(paths, "Image_<id>.tif")


def test_scenes_are_paired_by_id_and_sorted(tmp_path):
    for name in ("LABEL_b.tif", "Image_B.tif", "image_a.TIF", "Label_A.tif", "x.txt"):
        (tmp_path / name).touch()
    config = BatchConfig(data_dir=str(tmp_path), output="o", grid="g.shp")
    scenes = pair_scenes(config)
    assert [
        (Path(s.image).name, Path(s.label).name, s.grid, s.name) for s in scenes
    ] == [
        ("Image_B.tif", "LABEL_b.tif", "g.shp", "b"),
        ("image_a.TIF", "Label_A.tif", "g.shp", "a"),
    ]


def test_each_scene_gets_the_grid_of_its_id_whatever_its_format(tmp_path):
    for name in (
        "Image_a.tif", "Label_a.tif", "Grid_A.shp", "Grid_A.dbf", "Grid_A.prj", "Grid_a.shx",
        "Image_b.tif", "Label_b.tif", "grid_b.GeoJSON",
    ):  # fmt: skip
        (tmp_path / name).touch()
    config = BatchConfig(data_dir=str(tmp_path), output="o", use_per_image_grid=True)
    scenes = pair_scenes(config)
    assert [Path(s.grid).name for s in scenes] == ["Grid_A.shp", "grid_b.GeoJSON"]


def test_patches_are_named_by_their_scene(batch):
    batch.draw("North", 16)
    batch.draw("south", 16, transform=at(0, 100))
    dataset = batch.cut()
    names = [
        f"{s}_r00{r}_c00{c}" for s in ("north", "south") for r in "01" for c in "01"
    ]
    assert list(dataset.splits) == names
    assert [dataset.records[n]["scene"] for n in (names[0], names[-1])] == [
        str(batch.data / "Image_North.tif"),
        str(batch.data / "Image_south.tif"),
    ]


def test_patterns_name_images_labels_and_grids(batch):
    image, label = noise(16)
    write(batch.data / "S2A_p1_2024.tiff", image)
    write(batch.data / "p1-truth.tif", label)
    write_grid(batch.data / "p1.gpkg", tiles(2, 1))
    patterns = [
        "--image_pattern",
        "S2A_<id>_*.tiff",
        "--label_pattern",
        "<id>-truth.tif",
    ]
    grids = ["--use_per_image_grid", "--grid_pattern", "<id>.gpkg"]
    assert list(batch.cut(*patterns, *grids).splits) == ["p1_001", "p1_002"]


def test_folders_within_are_looked_into_only_when_asked_to(batch, capsys):
    image, label = noise(16)
    write(batch.data / "deep/er/Image_a.tif", image)
    write(batch.data / "deep/Label_a.tif", label)
    assert "No file in" in batch.refusal(capsys)
    assert len(batch.cut("--recursive").splits) == 4


def test_an_id_that_is_there_twice_is_refused(batch, capsys):
    batch.draw("a", 16)
    write(batch.data / "later/Image_A.tif", noise(16)[0])
    line = batch.refusal(capsys, "--recursive")
    assert "Image_a.tif" in line and "Image_A.tif" in line and "same id" in line


def test_files_without_a_partner_are_refused_by_name(batch, capsys):
    batch.draw("a", 16)
    write(batch.data / "Image_b.tif", noise(16)[0])
    write(batch.data / "Label_c.tif", noise(16)[1])
    line = batch.refusal(capsys)
    assert (
        "Image_b.tif" in line and "Label_c.tif" in line and "--skip_unmatched" in line
    )
    assert "_a.tif" not in line


def test_files_without_a_partner_are_left_out_with_a_warning_when_allowed(
    batch, capsys
):
    batch.draw("a", 16)
    write(batch.data / "Image_b.tif", noise(16)[0])
    line = messages(capsys, *batch.words("--skip_unmatched"))[0]
    assert "Image_b.tif" in line and "_a.tif" not in line
    assert {name[:1] for name in Dataset(batch.out).splits} == {"a"}


def test_a_scene_without_a_grid_of_its_own_is_refused_by_name(batch, capsys):
    for name in "ab":
        batch.draw(name, 16)
    write_grid(batch.data / "Grid_a.geojson", tiles(2, 2))
    line = batch.refusal(capsys, "--use_per_image_grid")
    assert "Image_b.tif" in line and "Image_a.tif" not in line


def test_a_folder_without_scenes_or_no_folder_is_refused(batch, capsys):
    assert "is called Image_<id>.tif" in batch.refusal(capsys)
    batch.data = batch.folder / "nowhere"
    assert f"No folder {batch.data}" in batch.refusal(capsys)


def test_a_folder_in_which_nothing_has_a_partner_is_refused(batch, capsys):
    write(batch.data / "Image_b.tif", noise(16)[0])
    assert run(*batch.words("--skip_unmatched")) == 1


def test_a_grid_without_a_scene_is_refused_by_name(batch):
    batch.draw("a", 16)
    write_grid(batch.data / "Grid_a.geojson", tiles(2, 2))
    write_grid(batch.data / "Grid_b.geojson", tiles(2, 2))
    assert run(*batch.words("--use_per_image_grid")) == 1


def test_files_without_a_partner_are_counted_once(tmp_path):
    for name in "abc":
        (tmp_path / f"Image_{name}.tif").touch()
    config = BatchConfig(data_dir=str(tmp_path), output="o", use_per_image_grid=True)
    with pytest.raises(DatasetError) as error:
        pair_scenes(config)
    assert "more" not in str(error.value)


# --- several dates --------------------------------------------------------------------------


def draw_dates(batch: Batch, dates: int, shift: int = 0) -> None:
    """Scenes of four neighbouring places on several dates, each with its grid."""
    for date, place in itertools.product(range(dates), range(4)):
        name = f"p{place}d{date}"
        corner = at(32 * place, 0)
        batch.draw(name, 32, seed=10 * date + place, transform=corner)
        cells = tiles(4, 4, left=shift * date % 3, top=-(shift * date % 3))
        write_grid(batch.data / f"Grid_{name}.geojson", cells, corner)


@pytest.mark.parametrize(
    ("split_by", "shift"), [("random", 0), ("random", 1), ("block", 1)]
)
def test_a_place_lands_in_one_split_on_all_dates(batch, split_by, shift):
    draw_dates(batch, 6, shift)
    assert len(list(batch.data.glob("Image_*"))) == 24
    dataset = batch.cut("--use_per_image_grid", "--split_by", split_by)
    assert set(dataset.splits.values()) == set(SPLITS)
    by_place: dict[tuple, set] = {}
    for name, split in dataset.splits.items():
        by_place.setdefault((name[:2], name[-3:]), set()).add(split)
    assert len(by_place) == 64
    assert all(len(splits) == 1 for splits in by_place.values())
    names, shapes = list(dataset.ground), list(dataset.ground.values())
    shared = shapely.area(shapely.intersection(np.array(shapes)[:, None], shapes))
    for one, other in np.argwhere(shared > 0.5 * 80**2):
        assert dataset.splits[names[one]] == dataset.splits[names[other]]


def test_dates_of_one_scene_do_not_change_the_ratios(batch):
    for date in range(4):
        batch.draw(f"d{date}", (40, 32), seed=date)
    dataset = batch.cut()
    counts = {"train": 15 * 4, "validation": 3 * 4, "test": 2 * 4}
    assert Counter(dataset.splits.values()) == counts


def test_places_are_patches_of_several_scenes_that_share_most_of_their_ground():
    shapes = [box(0, 0, 9, 9), box(9, 0, 18, 9), box(4, 0, 13, 9), box(5, 0, 14, 9)]
    one, two, three, four = link_repeat_coverage(metric(shapes), [0, 0, 1, 2])
    assert one == three == four == two  # the last shares 5 of 9 with the second
    pairs = [box(0, 0, 9, 9), box(1, 0, 10, 9), box(5, 0, 14, 9)]
    assert len(set(link_repeat_coverage(metric(pairs), [0, 0, 0]))) == 3
    one, two, three = link_repeat_coverage(metric(pairs), [0, 1, 0])
    assert one == two != three  # the second shares most with the first
    one, two, three = link_repeat_coverage(metric(pairs), [0, 0, 1])
    assert two == three != one


def test_a_small_patch_within_a_large_one_is_the_same_place():
    shapes = metric([box(0, 0, 100, 100), box(10, 10, 18, 18), box(200, 0, 208, 8)])
    one, two, three = link_repeat_coverage(shapes, [0, 1, 1])
    assert one == two != three


def draw_two_zones(batch: Batch) -> Path:
    """One place in two UTM zones, and the grid of both."""
    corner = Affine(10, 0, 745_000, 0, -10, 4_650_000)
    batch.draw("a", 64, transform=corner)
    (x,), (y,) = project("EPSG:32631", "EPSG:32632", [745_000], [4_650_000])
    other = Affine(10, 0, round(x, -1) - 100, 0, -10, round(y, -1) + 100)
    batch.draw("b", 90, transform=other, crs="EPSG:32632", seed=1)
    return write_grid(batch.folder / "grid.geojson", tiles(8, 8), corner)


@pytest.mark.parametrize("split_by", ["random", "block"])
def test_a_place_lands_in_one_split_in_two_utm_zones(batch, split_by):
    dataset = batch.cut("--grid", draw_two_zones(batch), "--split_by", split_by)
    both = [
        n[2:] for n in dataset.splits if n[0] == "a" and f"b{n[1:]}" in dataset.splits
    ]
    assert len(both) > 30
    assert {str(crs) for crs in dataset.crs.values()} == {"EPSG:32631", "EPSG:32632"}
    for place in both:
        assert dataset.splits[f"a_{place}"] == dataset.splits[f"b_{place}"]
    cells = dataset.cells().set_index("name").geometry
    for place in both:
        one, other = cells[f"a_{place}"], cells[f"b_{place}"]
        assert one.intersection(other).area > 0.8 * one.area


def test_footprints_of_several_crs_come_together_in_one_of_metres():
    here, there = [745_000, 745_080], [4_650_000, 4_650_080]
    x, y = project("EPSG:32631", "EPSG:32632", here, there)
    systems = [rasterio.CRS.from_epsg(code) for code in (32631, 32632)]
    shapes = [box(here[0], there[0], here[1], there[1]), box(x[0], y[0], x[1], y[1])]
    ground = to_metric_crs(shapes, systems)
    assert ground.crs.axis_info[0].unit_name == "metre"
    assert ground[0].area == pytest.approx(80 * 80, rel=2e-3)
    assert ground[1].centroid.distance(ground[0].centroid) < 1


@pytest.mark.parametrize(
    ("code", "shape"),
    [
        (4326, box(3, 42, 3.001, 42.001)),
        (2263, box(984_000, 200_000, 984_328.084, 200_328.084)),  # 100 m, in feet
    ],
)
def test_footprints_in_degrees_or_feet_become_metres(code, shape):
    ground = to_metric_crs([shape], [rasterio.CRS.from_epsg(code)])
    assert ground.crs.axis_info[0].unit_name == "metre"
    expected = 100**2 if code == 2263 else 82.6 * 111.1
    assert ground.area[0] == pytest.approx(expected, rel=0.003)


def test_a_footprint_is_the_ground_of_all_pixels():
    turned = Affine(0, 2, 100, -3, 0, 50)  # columns run south, rows east
    assert footprint(turned, 4, 5).equals(box(100, 35, 108, 50))
    assert footprint(TRANSFORM, 8, 8).bounds == (
        *(ORIGIN[0], ORIGIN[1] - 80),
        *(ORIGIN[0] + 80, ORIGIN[1]),
    )


def test_overlapping_cells_of_two_dates_can_be_split_by_block(batch):
    for date in range(2):
        batch.draw(f"d{date}", 48, seed=date)
    words = ["--stride", 3, "--split_by", "block", "--block_size", 160]
    dataset = batch.cut(*words)
    assert set(dataset.splits.values()) == set(SPLITS)


def test_footprints_of_far_continents_keep_their_size():
    zones = [rasterio.CRS.from_epsg(code) for code in (32631, 32756)]
    shapes = [box(5e5, 5e6, 5.001e5, 5.0001e6), box(5e5, 6.3e6, 5.001e5, 6.3001e6)]
    areas = to_metric_crs(shapes, zones).area.tolist()
    assert areas == pytest.approx([100**2] * 2, rel=0.02)


# --- what scenes must have in common --------------------------------------------------------


def test_another_number_of_bands_is_refused_with_both_files(batch, capsys):
    batch.draw("a", 16, bands=2)
    batch.draw("b", 16, bands=3, transform=at(100, 0))
    line = batch.refusal(capsys)
    assert "Image_a.tif 2" in line and "Image_b.tif gives 3 bands" in line
    assert len(batch.cut("--bands", "2,1").splits) == 8


def test_other_classes_are_refused_with_both_files(batch, capsys):
    for number, (name, kinds) in enumerate({"a": "xy", "b": "xz"}.items()):
        corner = at(100 * number, 0)
        write(batch.data / f"Image_{name}.tif", noise(16)[0], corner)
        halves = [box(0, 0, 8, 16), box(8, 0, 16, 16)]
        label = batch.data / f"Label_{name}.geojson"
        write_grid(label, halves, corner, kind=list(kinds))
    words = ["--label_pattern", "Label_<id>.geojson", "--label_column", "kind"]
    line = batch.refusal(capsys, *words)
    assert "Label_a.geojson x, y" in line
    assert "Label_b.geojson has the classes x, z" in line


def test_two_cells_of_one_name_are_refused(batch, capsys):
    batch.draw("a b", 16)
    batch.draw("a_b", 16, transform=at(100, 0))
    assert "a_b_r000_c000" in batch.refusal(capsys)


# --- cells without a grid -------------------------------------------------------------------


def test_regular_cells_begin_at_every_stride_inside_the_scene():
    cells = regular_cells(20, 9, 8, 6, "s")
    assert [(cell.name, cell.window) for cell in cells] == [
        ("s_r000_c000", Window(0, 0, 8, 8)),
        ("s_r000_c001", Window(6, 0, 8, 8)),
        ("s_r000_c002", Window(12, 0, 8, 8)),
        ("s_r000_c003", Window(18, 0, 8, 8)),
        ("s_r001_c000", Window(0, 6, 8, 8)),
        ("s_r001_c001", Window(6, 6, 8, 8)),
        ("s_r001_c002", Window(12, 6, 8, 8)),
        ("s_r001_c003", Window(18, 6, 8, 8)),
    ]
    assert all(cell.outline is None for cell in cells)


@pytest.mark.parametrize("stride", [None, 5, 11])
def test_patches_without_a_grid_are_the_scene_pixel_by_pixel(batch, stride):
    height, width = 21, 27
    image, label = noise((height, width))
    batch.draw("a", (height, width))
    words = ["--min_valid", "0", *(["--stride", stride] if stride else [])]
    dataset = batch.cut(*words)
    step = stride or SIDE
    places = itertools.product(range(0, height, step), range(0, width, step))
    windows = [(left, top, SIDE, SIDE) for top, left in places]
    assert [tuple(r["window"]) for r in dataset.records.values()] == windows
    for name, split in dataset.splits.items():
        left, top = dataset.records[name]["window"][:2]
        part = (slice(top, top + SIDE), slice(left, left + SIDE))
        seen = label[part].shape
        with rasterio.open(dataset.root / split / "images" / f"{name}.tif") as file:
            assert file.transform.almost_equals(at(left, top))
            assert np.array_equal(
                file.read()[:, : seen[0], : seen[1]], image[(slice(None), *part)]
            )
            valid = np.zeros((SIDE, SIDE), bool)
            valid[: seen[0], : seen[1]] = True
            assert np.array_equal(file.dataset_mask() > 0, valid)
        with rasterio.open(dataset.root / split / "labels" / f"{name}.tif") as file:
            found = file.read(1)
            assert np.array_equal(found[: seen[0], : seen[1]], label[part])
            assert (found[~valid] == 255).all()


def test_edges_are_cut_only_where_enough_of_the_cell_lies_in_the_scene(batch):
    batch.draw("a", (16, 20))  # the third column has 4 of 8 pixels
    assert len(batch.cut("--min_valid", "0.5").splits) == 6
    dataset = batch.cut("--min_valid", "0.51", "--overwrite")
    assert len(dataset.splits) == 4
    assert dataset.skipped == dict.fromkeys(
        ["a_r000_c002", "a_r001_c002"], "less than 51% valid"
    )


def test_extract_needs_no_grid_either(batch):
    batch.draw("a", 16)
    files = [
        "--image",
        batch.data / "Image_a.tif",
        "--label",
        batch.data / "Label_a.tif",
    ]
    rest = ["--output", batch.out, "--patch_size", 8, "--save_metadata"]
    assert run("extract", *files, *rest) == 0
    assert list(Dataset(batch.out).splits) == [
        f"patch_r00{r}_c00{c}" for r in "01" for c in "01"
    ]


# --- cells.gpkg -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, "water,trees,town"])
def test_the_vector_file_says_what_the_metadata_says(batch, names):
    batch.draw("a", (20, 24))
    batch.draw("b", 16, transform=at(100, 0))
    dataset = batch.cut(*(["--class_names", names] if names else []))
    cells = dataset.cells()
    assert cells.crs.to_epsg() == 32631
    classes = ["0 water", "1 trees", "2 town"] if names else ["0", "1", "2"]
    shares = [f"share {name}" for name in classes]
    columns = ["name", "scene", "split", "valid_share", *shares, "geometry"]
    assert list(cells.columns) == columns
    assert list(cells["name"]) == list(dataset.records)
    for row in cells.to_dict("records"):
        record = dataset.records[row["name"]]
        assert row["split"] == record["split"] == dataset.splits[row["name"]]
        assert row["scene"] == record["scene"]
        assert row["valid_share"] == record["valid_share"]
        counts = np.array(record["class_pixels"])
        assert [row[s] for s in shares] == pytest.approx(list(counts / counts.sum()))
        assert row["geometry"].equals(dataset.ground[row["name"]])


def test_the_vector_file_holds_no_cell_that_was_dropped(batch):
    batch.draw("a", 96)
    dataset = batch.cut("--split_by", "block", "--buffer", 100)
    assert dataset.skipped
    assert set(dataset.cells()["name"]) == set(dataset.splits)


def test_the_cells_of_a_scene_in_degrees_are_shown_in_degrees(batch):
    batch.draw("a", 32, transform=Affine(1e-4, 0, 3, 0, -1e-4, 42), crs="EPSG:4326")
    dataset = batch.cut()
    cells = dataset.cells()
    assert cells.crs.to_epsg() == 4326
    back = cells.set_index("name").geometry
    for name, shape in dataset.ground.items():
        assert back[name].symmetric_difference(shape).area < 1e-3 * shape.area


def test_class_names_may_differ_by_their_case(batch):
    batch.draw("a", 16)
    assert run(*batch.words("--class_names", "Forest,forest,x")) == 0


# --- splits by block ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [[], ["--stride", 5], ["--stride", 3], ["--block_size", 250]]
)
def test_no_pixel_of_the_ground_is_shared_by_two_splits(batch, words):
    batch.draw("a", 64)
    words = [*words, "--block_size", 250] if "--stride" in words else words
    dataset = batch.cut("--split_by", "block", *words)
    pixels = dataset.pixels_by_split()
    assert all(pixels.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not pixels[one] & pixels[other]
    if "--stride" in words:
        reasons = Counter(dataset.skipped.values())
        assert reasons["shares ground with another split"] > 0
    else:
        assert len(dataset.splits) == 8 * 8


def test_no_pixel_is_shared_on_scenes_that_overlap_by_half_a_cell(batch):
    batch.draw("a", 96)
    batch.draw("b", 96, transform=at(44, 44), seed=1)
    pixels = batch.cut("--split_by", "block").pixels_by_split()
    assert all(pixels.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not pixels[one] & pixels[other]


def test_blocks_are_four_cells_wide_unless_said_otherwise(batch):
    batch.draw("a", 128)
    dataset = batch.cut("--split_by", "block")
    blocks: dict[tuple, list] = {}
    for name, split in dataset.splits.items():
        row, column = int(name[3:6]), int(name[8:11])
        blocks.setdefault((row // 4, column // 4), []).append(split)
    assert {len(cells) for cells in blocks.values()} == {16}
    assert all(len(set(cells)) == 1 for cells in blocks.values())
    assert {cells[0] for cells in blocks.values()} == set(SPLITS)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        (CRS, TRANSFORM),
        ("EPSG:4326", Affine(10 / 82_640, 0, 3, 0, -10 / 111_060, 42)),
        ("EPSG:2263", Affine(32.8084, 0, 984_000, 0, -32.8084, 200_000)),
    ],
    ids=["metres", "degrees", "feet"],
)
def test_the_side_of_a_block_is_in_metres(batch, crs, transform):
    batch.draw("a", 64, crs=crs, transform=transform)
    dataset = batch.cut("--split_by", "block", "--block_size", 161)  # two cells
    blocks: dict[tuple, set] = {}
    wider: dict[tuple, set] = {}
    for name, split in dataset.splits.items():
        row, column = 7 - int(name[3:6]), int(name[8:11])  # blocks begin in the south
        blocks.setdefault((row // 2, column // 2), set()).add(split)
        wider.setdefault((row // 4, column // 4), set()).add(split)
    if crs == "EPSG:2263":  # 0.6 degrees off UTM's north: only most blocks are whole
        assert np.mean([len(splits) == 1 for splits in blocks.values()]) >= 0.8
    else:
        assert all(len(splits) == 1 for splits in blocks.values())
    assert any(len(splits) > 1 for splits in wider.values())


def test_class_shares_of_block_splits_are_near_the_ratios(batch):
    batch.draw("a", 112, label=clumps(112))
    dataset = batch.cut("--split_by", "block", "--block_size", 160)
    for split, ratio in zip(SPLITS, RATIOS):
        assert dataset.class_shares()[split] == pytest.approx([ratio] * 3, abs=0.03)
    counts = Counter(dataset.splits.values())
    for split, ratio in zip(SPLITS, RATIOS):
        assert counts[split] / 14**2 == pytest.approx(ratio, abs=0.03)


def test_a_rare_class_that_three_blocks_hold_is_in_every_split(batch):
    label = clumps(96, classes=2)
    for row, column in ((3, 5), (60, 10), (80, 90)):
        label[row : row + 2, column : column + 2] = 2
    batch.draw("a", 96, label=label)
    dataset = batch.cut("--split_by", "block")
    for split in SPLITS:
        assert (dataset.class_shares()[split] > 0).all()


def test_every_class_that_can_be_in_every_split_is_in_every_split():
    rng = np.random.default_rng(0)
    for _ in range(15):
        blocks, classes = int(rng.integers(3, 7)), int(rng.integers(1, 6))
        held = rng.random((blocks, classes)) < 0.6
        pixels = held * rng.integers(1, 1000, (blocks, classes))
        content = np.hstack([rng.integers(1, 17, (blocks, 1)), pixels])
        often = (content > 0).sum(axis=0) >= 3

        def missing(splits, content=content, often=often) -> int:
            splits = np.array(splits)
            sums = [content[splits == split].sum(axis=0)[often] for split in SPLITS]
            return int((np.array(sums) == 0).sum())

        least = min(map(missing, itertools.product(SPLITS, repeat=blocks)))
        assert missing(balance_blocks(content, RATIOS, 42)) == least


def test_blocks_are_shared_as_the_ratios_say_where_that_is_possible():
    content = np.array([[10, 30, 0], [10, 0, 30], [5, 15, 0], [5, 0, 15]] * 4)
    splits = np.array(balance_blocks(content, (0.5, 0.25, 0.25), 1))
    for split, ratio in zip(SPLITS, (0.5, 0.25, 0.25)):
        shares = content[splits == split].sum(axis=0) / content.sum(axis=0)
        assert shares == pytest.approx([ratio] * 3, abs=0.05)


def test_a_split_without_a_share_gets_no_block():
    splits = balance_blocks(np.full((20, 2), 5), (0.8, 0.2, 0.0), 3)
    assert Counter(splits) == {"train": 16, "validation": 4}


def test_the_seed_decides_which_blocks_go_together(batch):
    batch.draw("a", 80, label=clumps(80))
    words = ["--split_by", "block", "--block_size", 160]
    first, again, other = (
        batch.cut(*words, "--seed", seed, "--overwrite").splits for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.keys() == other.keys()


def test_too_few_blocks_are_refused(batch, capsys):
    batch.draw("a", 48)
    line = batch.refusal(capsys, "--split_by", "block", "--block_size", 500)
    assert "1 blocks of 500 m" in line and "smaller --block_size" in line


def test_ratios_that_are_rounded_thirds_can_be_drawn_by_block():
    config = BatchConfig(
        data_dir="d",
        output="o",
        train_ratio=0.3333333,
        val_ratio=0.3333333,
        test_ratio=0.3333333,
    )
    assert len(balance_blocks(np.full((9, 2), 5), config.ratios, 1)) == 9


def test_a_scene_in_degrees_may_lie_near_a_pole(batch):
    batch.draw("a", 32, transform=Affine(1e-3, 0, 10, 0, -1e-4, -85), crs="EPSG:4326")
    assert run(*batch.words()) == 0


# --- buffers and neighbours -----------------------------------------------------------------


def nearer(dataset: Dataset, distance: float) -> set[str]:
    """The patches that lie nearer than a distance to one of a later split, by shapely."""
    rank = {name: SPLITS.index(split) for name, split in dataset.splits.items()}
    return {
        one
        for one, other in itertools.permutations(dataset.ground, 2)
        if rank[one] < rank[other]
        and dataset.ground[one].distance(dataset.ground[other]) < distance
    }


@pytest.mark.parametrize(
    ("split_by", "distance"),
    [("block", 1), ("block", 80), ("block", 90), ("block", 170), ("random", 79)],
)
def test_exactly_the_cells_within_the_buffer_are_dropped(batch, split_by, distance):
    batch.draw("a", 96 if split_by == "block" else 64)
    words = ["--split_by", split_by]
    whole = batch.cut(*words)
    kept = batch.cut(*words, "--buffer", distance, "--overwrite")
    expected = nearer(whole, distance)
    assert set(kept.skipped) == expected
    assert set(kept.skipped.values()) == {f"nearer than {distance} m to another split"}
    assert kept.splits == {n: s for n, s in whole.splits.items() if n not in expected}
    assert nearer(kept, distance) == set()


def test_pairs_that_share_ground_are_found_and_those_that_touch_are_not():
    shapes = [box(0, 0, 80, 80), box(80, 0, 160, 80), box(150, 70, 230, 150)]
    pairs = pairs_within(metric(shapes), [2, 0, 1], 0)
    assert pairs.tolist() == [[1, 2]]
    assert pairs_within(metric(shapes), [0] * 3, 0).tolist() == []


def test_pairs_within_a_distance_come_with_the_earlier_split_first():
    shapes = [box(0, 0, 80, 80), box(100, 0, 180, 80), box(500, 0, 580, 80)]
    splits = [2, 0, 1]  # test, training, validation
    assert pairs_within(metric(shapes), splits, 19).tolist() == []
    assert pairs_within(metric(shapes), splits, 21).tolist() == [[1, 0]]
    found = pairs_within(metric(shapes), splits, 330).tolist()
    assert sorted(found) == [[1, 0], [1, 2]]


def test_large_cells_within_the_buffer_are_found():
    shapes = metric([box(0, 0, 3000, 3000), box(3995, 0, 6995, 3000)])
    assert len(pairs_within(shapes, [0, 2], 1000)) == 1


def test_a_small_buffer_drops_large_neighbours():
    shapes = metric([box(0, 0, 2240, 2240), box(2240, 0, 4480, 2240)])
    assert len(pairs_within(shapes, [0, 2], 5)) == 1


def test_one_pixel_that_large_cells_share_is_found():
    shapes = metric([box(0, 0, 600, 600), box(599, 0, 1199, 600)])
    assert len(pairs_within(shapes, [0, 2], 0)) == 1


def test_a_buffer_is_in_metres_on_the_ground_also_in_mercator(batch):
    corner = Affine(20, 0, 1_100_000, 0, -20, 8_400_000)  # 60 degrees north: 10 m
    batch.draw("a", 96, transform=corner, crs="EPSG:3857")
    whole = batch.cut("--split_by", "block", "--block_size", 320)
    kept = batch.cut(
        "--split_by", "block", "--block_size", 320, "--buffer", 90, "--overwrite"
    )
    zone = geopandas.GeoSeries(whole.ground, crs="EPSG:3857").to_crs("EPSG:32632")
    whole.ground = dict(zone.items())
    assert set(kept.skipped) == nearer(whole, 90)


def touching(dataset: Dataset) -> int:
    """How many patches share ground, an edge or a corner with one of another split."""
    found = set()
    for one, other in itertools.combinations(dataset.ground, 2):
        shapes = dataset.ground[one], dataset.ground[other]
        if dataset.splits[one] != dataset.splits[other] and shapes[0].intersects(
            shapes[1]
        ):
            found |= {one, other}
    return len(found)


@pytest.mark.parametrize("corner", [ORIGIN, (431_240.0, 4_912_560.0)])
def test_neighbours_in_other_splits_are_counted_in_a_warning(batch, capsys, corner):
    batch.draw("a", 48, transform=Affine(10, 0, corner[0], 0, -10, corner[1]))
    lines = messages(capsys, *batch.words())
    count = touching(Dataset(batch.out))
    assert count > 10
    (line,) = [line for line in lines if "--split_by block" in line]
    assert line.startswith(f"{count} of 36 patches")


def test_overlapping_cells_in_other_splits_are_counted_in_one_warning(batch, capsys):
    batch.draw("a", 48)
    lines = messages(capsys, *batch.words("--stride", 5))
    dataset = Dataset(batch.out)
    (line,) = [line for line in lines if "--split_by block" in line]
    assert line.startswith(f"{touching(dataset)} of {len(dataset.splits)} patches")


@pytest.mark.parametrize(
    "words", [["--stride", 12], ["--split_by", "block"], ["--buffer", "50"]]
)
def test_there_is_no_warning_where_splits_lie_apart_or_were_asked_to(
    batch, capsys, words
):
    batch.draw("a", 96)
    lines = messages(capsys, *batch.words(*words))
    assert not [line for line in lines if "--split_by block" in line]


# --- the leak check -------------------------------------------------------------------------


def leaks(batch: Batch, capsys) -> tuple[list[dict] | None, str]:
    """What ``info`` stores and prints about overlaps."""
    capsys.readouterr()
    assert run("info", "--output", batch.out) == 0
    stored = json.loads((batch.out / "dataset_info.json").read_text())
    return stored["overlaps"], capsys.readouterr().out


def plant(dataset: Dataset, split: str, target: str, name="planted") -> str:
    """Copy the first patch of a split into another; its name."""
    source = min((dataset.root / split / "images").iterdir())
    for kind in ("images", "labels"):
        content = (dataset.root / split / kind / source.name).read_bytes()
        (dataset.root / target / kind / f"{name}.tif").write_bytes(content)
    return source.stem


def test_splits_that_only_touch_share_no_ground(batch, capsys):
    batch.draw("a", 96)
    batch.cut()
    found, out = leaks(batch, capsys)
    assert found == []
    assert "no ground is shared between splits" in out and "LEAK" not in out


@pytest.mark.parametrize(
    ("source", "target"), [("train", "test"), ("test", "validation"), ("test", "train")]
)
def test_a_leak_planted_by_hand_is_found(batch, capsys, source, target):
    batch.draw("a", 96)
    dataset = batch.cut("--split_by", "block")
    copied = plant(dataset, source, target)
    first, second = sorted((source, target), key=SPLITS.index)
    one, other = (copied, "planted") if source == first else ("planted", copied)
    found, out = leaks(batch, capsys)
    examples = [f"{other} and {one}"]
    assert found == [{"splits": [first, second], "patches": 1, "examples": examples}]
    assert f"LEAK: 1 patches of {second} share ground with {first}" in out
    assert "no ground" not in out


def test_a_patch_that_shares_a_corner_pixel_is_a_leak(batch, capsys):
    batch.draw("a", 64)
    dataset = batch.cut("--stride", 40)  # 4 cells, far apart
    name = plant(dataset, "train", "test")
    left, _, _, top = dataset.ground[name].bounds
    for kind in ("images", "labels"):
        with rasterio.open(dataset.root / f"test/{kind}/planted.tif", "r+") as file:
            file.transform = Affine(10, 0, left + 70, 0, -10, top - 70)
    found, _ = leaks(batch, capsys)
    assert [entry["splits"] for entry in found] == [["train", "test"]]
    assert found[0]["examples"] == [f"planted and {name}"]


def test_overlapping_cells_that_were_drawn_at_random_are_leaks(batch, capsys):
    batch.draw("a", 48)
    dataset = batch.cut("--stride", 4)
    found, _ = leaks(batch, capsys)
    for entry in found:
        first, second = entry["splits"]
        shared = {
            other
            for one, other in itertools.permutations(dataset.ground, 2)
            if (dataset.splits[one], dataset.splits[other]) == (first, second)
            and dataset.ground[one].intersection(dataset.ground[other]).area > 0
        }
        assert entry["patches"] == len(shared) > 0
    assert sorted(tuple(entry["splits"]) for entry in found) == [
        ("train", "test"),
        ("train", "validation"),
        ("validation", "test"),
    ]


def test_overlaps_are_counted_by_pairs_of_splits_and_unknown_without_a_crs():
    crs = rasterio.CRS.from_epsg(32631)
    places = [
        PatchLocation("train", "a", box(0, 0, 80, 80), crs),
        PatchLocation("train", "b", box(40, 0, 120, 80), crs),
        PatchLocation("test", "c", box(60, 0, 140, 80), crs),
        PatchLocation("validation", "d", box(900, 0, 980, 80), crs),
    ]
    (entry,) = split_overlaps(places)
    assert (entry["splits"], entry["patches"]) == (["train", "test"], 1)
    assert sorted(entry["examples"]) == ["c and a", "c and b"]
    places.append(PatchLocation("test", "e", box(0, 0, 1, 1), None))
    assert split_overlaps(places) is None


def test_info_draws_the_splits_in_their_colours(batch, capsys):
    import matplotlib.image

    batch.draw("a", 48)
    batch.cut()
    assert run("info", "--output", batch.out) == 0
    picture = batch.out / "dataset_splits.png"
    assert str(picture) in capsys.readouterr().out
    pixels = matplotlib.image.imread(picture)[..., :3]
    for colour in ("9db8d2", "f0a030", "c8283c"):
        rgb = np.frombuffer(bytes.fromhex(colour), np.uint8) / 255
        assert np.isclose(pixels, rgb, atol=0.01).all(axis=-1).sum() > 100


def test_a_leak_between_two_utm_zones_is_found(batch, capsys):
    dataset = batch.cut("--grid", draw_two_zones(batch), "--split_by", "block")
    for name, split in dataset.splits.items():
        if name.startswith("b") and split == "train":
            for kind in ("images", "labels"):
                path = dataset.root / "train" / kind / f"{name}.tif"
                path.rename(dataset.root / "test" / kind / f"{name}.tif")
    found, _ = leaks(batch, capsys)
    (entry,) = [e for e in found if e["splits"] == ["train", "test"]]
    assert entry["patches"] > 10


def test_overlap_is_unknown_where_a_patch_has_no_crs(batch, capsys):
    image, label = noise(8)
    for split in ("train", "validation"):
        crs = CRS if split == "train" else None
        for kind, pixels in (("images", image), ("labels", label)):
            write(batch.out / "Patch" / split / kind / "x.tif", pixels, crs=crs)
    found, out = leaks(batch, capsys)
    assert found is None
    assert "overlap between splits: unknown" in out


# --- cells and scenes that cannot be cut ----------------------------------------------------


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


@pytest.mark.parametrize("what", ["Image", "Label", "values"])
def test_a_cell_that_cannot_be_cut_stops_the_run_and_leaves_nothing(
    batch, capsys, what
):
    draw_spoilt(batch, what)
    name = "Image_a.tif" if what == "Image" else "Label_a.tif"
    assert name in batch.refusal(capsys)


@pytest.mark.parametrize("what", ["Image", "Label", "values"])
def test_cells_that_cannot_be_cut_are_listed_and_the_status_is_1(batch, capsys, what):
    draw_spoilt(batch, what)
    name = "Image_a.tif" if what == "Image" else "Label_a.tif"
    err = "\n".join(messages(capsys, *batch.words("--skip_errors"), status=1))
    dataset = Dataset(batch.out)
    lost = [f"a_r001_c00{column}" for column in range(3)]
    assert list(dataset.skipped) == lost
    assert len(dataset.splits) == 6
    assert all(name in reason for reason in dataset.skipped.values())
    assert ", ".join(lost) in err and name in err
    assert "skipped 3 of 9 cells" in err
    if what == "values":
        assert "300" in err


def test_a_scene_that_cannot_be_opened_is_listed_and_the_others_are_cut(batch, capsys):
    batch.draw("a", 16)
    batch.draw("b", 16, transform=at(100, 0))
    (batch.data / "Image_b.tif").write_bytes(b"no raster")
    assert "Image_b.tif" in batch.refusal(capsys)
    err = "\n".join(messages(capsys, *batch.words("--skip_errors"), status=1))
    dataset = Dataset(batch.out)
    assert len(dataset.splits) == 4
    (entry,) = dataset.skipped.items()
    assert entry[0] == str(batch.data / "Image_b.tif")
    assert "Cannot read" in entry[1] and "Cannot read" in err


def test_a_scene_with_other_bands_is_listed_and_the_others_are_cut(batch):
    for name, bands in (("a", 2), ("b", 3), ("c", 2)):
        batch.draw(name, 16, bands, transform=at(100 * bands, 0))
    assert run(*batch.words("--skip_errors")) == 1
    dataset = Dataset(batch.out)
    assert {name[0] for name in dataset.splits} == {"a", "c"}
    assert [Path(name).name for name in dataset.skipped] == ["Image_b.tif"]


def test_skipping_errors_is_no_error_where_there_is_none(batch):
    batch.draw("a", (16, 18))  # the last column is empty enough to be skipped
    dataset = batch.cut("--skip_errors")
    assert len(dataset.skipped) == 2


def test_a_wrong_option_is_no_error_of_a_scene(batch, capsys):
    for name in "ab":
        batch.draw(name, 16, transform=at(100 * ord(name), 0))
    grid = write_grid(batch.folder / "grid.geojson", tiles(2, 2))
    words = batch.words("--skip_errors", "--grid", grid, "--id_column", "nothing")
    assert "--id_column" in complaint(capsys, *words)


def test_errors_in_every_cell_are_an_error_of_the_run(batch, capsys):
    batch.draw("a", 16, label=np.full((16, 16), 300, "uint16"))
    assert "None of the 4 cells gives a patch" in batch.refusal(capsys, "--skip_errors")


def test_an_unreadable_block_of_a_warped_label_is_named(batch, capsys):
    image, label = noise(24)
    write(batch.data / "Image_a.tif", image)
    path = batch.data / "Label_a.tif"
    write(path, label, at(0.3, 0.3), compress="deflate", blockysize=8)
    spoil(path, 1)
    assert run(*batch.words()) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Cannot read") and "Label_a.tif" in line
    assert not batch.out.exists()


# --- a second run ---------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--resume"]])
def test_a_second_run_refuses_and_leaves_the_first_one_as_it_is(batch, capsys, words):
    batch.draw("a", 16)
    before = batch.cut().files()
    (line,) = messages(capsys, *batch.words(*words), status=1)
    assert "already holds patches" in line and "--overwrite" in line
    assert Dataset(batch.out).files() == before
    assert [path.name for path in batch.out.iterdir()] == ["Patch"]


def test_overwrite_leaves_no_patch_of_the_run_before(batch):
    batch.draw("a", 32)
    batch.cut()
    batch.draw("a", 16)
    assert len(batch.cut("--overwrite").splits) == 4
    assert [path.name for path in batch.out.iterdir()] == ["Patch"]


def test_resume_with_nothing_to_resume_is_an_ordinary_run(batch):
    batch.draw("a", 16)
    assert len(batch.cut("--resume").splits) == 4


def test_overwrite_works_after_an_interruption_while_the_former_run_is_removed(
    batch, monkeypatch
):
    batch.draw("a", 16)
    batch.cut()
    remove = shutil.rmtree

    def interrupted(path, **more):
        if str(path).endswith("-former"):
            raise KeyboardInterrupt
        remove(path, **more)

    with monkeypatch.context() as patching:
        patching.setattr(shutil, "rmtree", interrupted)
        assert run(*batch.words("--overwrite")) == 130
    assert run(*batch.words("--overwrite")) == 0


# --- interruption ---------------------------------------------------------------------------


def same_result(one: Dataset, other: Dataset) -> bool:
    """Whether two runs wrote the same patches, splits, metadata and cells."""
    pandas.testing.assert_frame_equal(one.cells(), other.cells())
    assert one.files() == other.files()
    hidden = [p.name for p in one.root.rglob("*") if p.name.startswith(".")]
    listed = {path.name for path in one.root.iterdir()}
    assert (hidden, listed) == ([], {*SPLITS, "cells.gpkg", "metadata.json"})
    kept = ("patches", "skipped", "scenes", "bands", "class_names", "crs")
    return all(one.metadata[key] == other.metadata[key] for key in kept)


def interrupt_writing(monkeypatch, after: int) -> None:
    """Raise KeyboardInterrupt at the patch after so many."""
    write_patch, calls = PatchWriter.write, itertools.count()

    def failing(self, patch, image_path, label_path):
        if next(calls) >= after:
            raise KeyboardInterrupt
        write_patch(self, patch, image_path, label_path)

    monkeypatch.setattr(PatchWriter, "write", failing)


def interrupt_renaming(monkeypatch, after: int) -> None:
    """Raise KeyboardInterrupt while finished patches are moved to their splits."""
    rename, calls = Path.rename, itertools.count()

    def failing(self, target):
        if next(calls) >= after:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)


def interrupt_at(name: str):
    """Raise KeyboardInterrupt when a function of the module is called."""

    def begin(monkeypatch, _):
        def failing(*_):
            raise KeyboardInterrupt

        patch_everywhere(monkeypatch, name, failing)

    return begin


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Batch, Dataset]:
    """Two scenes with cells that are skipped, and what a run makes of them."""
    batch = Batch(tmp_path_factory.mktemp("uninterrupted"))
    label = noise(48)[1]
    label[:8, :16] = 255
    batch.draw("a", 48, label=label)
    batch.draw("b", (40, 42), transform=at(24, 24), seed=1)
    return batch, batch.cut("--split_by", "block")


@pytest.fixture
def whole(uninterrupted, tmp_path) -> tuple[Batch, Dataset]:
    """The scenes with another output, and what is to result."""
    batch, dataset = uninterrupted
    batch.out = tmp_path / "resumed"
    return batch, dataset


@pytest.mark.parametrize(
    ("interrupt", "after"),
    [
        *((interrupt_writing, n) for n in (0, 1, 20, 33, 58)),
        *((interrupt_renaming, n) for n in (0, 1, 30)),
        (interrupt_at("extraction.splits.assign_splits"), 0),
        (interrupt_at("extraction.dataset.write_cells"), 0),
        (interrupt_at("extraction.dataset.publish"), 0),
    ],
)
def test_a_run_that_was_interrupted_is_resumed_to_the_identical_result(
    whole, monkeypatch, capsys, interrupt, after
):
    batch, expected = whole
    words = batch.words("--split_by", "block")
    with monkeypatch.context() as patching:
        interrupt(patching, after)
        lines = messages(capsys, *words, status=130)
    assert any("--resume" in line for line in lines)
    assert not (batch.out / "Patch").exists()
    assert "--resume" in messages(capsys, *words, status=1)[-1]
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)
    assert [path.name for path in batch.out.iterdir()] == ["Patch"]


def test_a_run_may_be_interrupted_again_and_again(whole, monkeypatch):
    batch, expected = whole
    for number in range(4):
        with monkeypatch.context() as patching:
            interrupt_writing(patching, 12)
            more = ["--resume"] if number else []
            assert run(*batch.words("--split_by", "block", *more)) == 130
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


def test_a_resumed_run_cuts_only_what_is_missing(whole, monkeypatch):
    batch, _ = whole
    words = ["--split_by", "block", "--workers", 1]
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 40)
        assert run(*batch.words(*words)) == 130
    cut, write_cell = [], cutting.write_cell

    def noted(read, *more):
        cut.append(read.cell.name)
        return write_cell(read, *more)

    patch_everywhere(monkeypatch, "extraction.cutting.write_cell", noted)
    dataset = batch.cut(*words, "--resume")
    assert 0 < len(cut) <= len(dataset.records) + len(dataset.skipped) - 30


def test_patches_that_are_cut_off_or_missing_are_cut_again(whole, monkeypatch):
    batch, expected = whole
    with monkeypatch.context() as patching:
        interrupt_at("extraction.splits.assign_splits")(patching, 0)
        assert run(*batch.words("--split_by", "block")) == 130
    staging = batch.out / ".Patch-partial"
    images, labels = (
        sorted((staging / kind).iterdir()) for kind in ("images", "labels")
    )
    images[3].write_bytes(images[3].read_bytes()[:-40])
    labels[7].write_bytes(b"")
    images[9].unlink()
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


def test_overwrite_begins_anew_after_an_interruption(whole, monkeypatch):
    batch, expected = whole
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 20)
        assert run(*batch.words("--seed", 5)) == 130
    assert same_result(batch.cut("--split_by", "block", "--overwrite"), expected)


def test_an_interrupted_overwrite_keeps_the_former_patches_until_it_is_resumed(
    whole, monkeypatch
):
    batch, expected = whole
    before = batch.cut("--seed", 5).files()
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 20)
        assert run(*batch.words("--split_by", "block", "--overwrite")) == 130
    assert Dataset(batch.out).files() == before
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


def test_an_overwrite_that_was_interrupted_in_its_last_moment_can_be_resumed(
    whole, monkeypatch
):
    batch, expected = whole
    batch.cut("--seed", 5)
    with monkeypatch.context() as patching:
        interrupt_at("extraction.dataset.publish")(patching, 0)
        assert run(*batch.words("--split_by", "block", "--overwrite")) == 130
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--seed", 5], "--seed 42, not 5"),
        (["--split_by", "block"], "--split_by random, not block"),
        (["--stride", 4], "--stride None, not 4"),
        (["--min_valid", 0.1], "--min_valid 0.5, not 0.1"),
        (["--label_values", "0,1"], "--label_values None, not 0,1"),
    ],
)
def test_other_settings_are_refused_by_name_and_nothing_is_lost(
    batch, monkeypatch, capsys, words, option
):
    batch.draw("a", 32)
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 5)
        assert run(*batch.words()) == 130
    before = sorted(batch.out.rglob("*"))
    (line,) = messages(capsys, *batch.words("--resume", *words), status=1)
    assert option in line and "--overwrite" in line
    assert sorted(batch.out.rglob("*")) == before
    assert len(batch.cut("--resume", "--workers", 2).splits) == 16


@pytest.mark.parametrize("kept", [8, 100, 200])
def test_half_a_patch_that_is_not_in_the_journal_yet_is_replaced(
    whole, monkeypatch, kept
):
    batch, expected = whole
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 20)
        assert run(*batch.words("--split_by", "block", "--workers", 1)) == 130
    content = next((expected.root / "train" / "images").iterdir()).read_bytes()
    staged = batch.out / ".Patch-partial" / "images"
    missing = sorted(set(expected.records) - {path.stem for path in staged.iterdir()})
    (staged / f"{missing[-1]}.tif").write_bytes(content[:kept])
    assert same_result(batch.cut("--split_by", "block", "--resume"), expected)


def test_a_resumed_run_without_skip_errors_lets_no_error_pass(
    batch, monkeypatch, capsys
):
    draw_spoilt(batch, "Label")
    with monkeypatch.context() as patching:
        interrupt_at("extraction.splits.assign_splits")(patching, 0)
        assert run(*batch.words("--skip_errors")) == 130
    write(batch.data / "Label_a.tif", noise(24)[1])  # mended
    assert len(batch.cut("--resume").splits) == 9


def test_another_command_is_refused(batch, monkeypatch):
    batch.draw("a", 32)
    files = [
        "--image",
        batch.data / "Image_a.tif",
        "--label",
        batch.data / "Label_a.tif",
    ]
    with monkeypatch.context() as patching:
        interrupt_writing(patching, 5)
        words = ["--output", batch.out, "--patch_size", 8]
        assert run("extract", *files, *words) == 130
    assert run(*batch.words("--resume")) == 1


def test_the_journal_holds_records_and_reasons_and_reads_them_again(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.note("a", {"name": "a", "class_pixels": [1, 2]})
    journal.note("b", "no valid pixel")
    journal.note("c", {"name": "c", "class_pixels": [3]})
    again = Journal(journal.path)
    assert (
        again.records
        == journal.records
        == {
            "a": {"name": "a", "class_pixels": [1, 2]},
            "c": {"name": "c", "class_pixels": [3]},
        }
    )
    assert again.skipped == journal.skipped == {"b": "no valid pixel"}


def test_a_last_line_that_is_cut_off_is_left_out_of_the_journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.note("a", "empty")
    journal.note("b", {"name": "b", "class_pixels": [1]})
    text = journal.path.read_text()
    journal.path.write_text(text[:-9])
    again = Journal(journal.path)
    assert (again.skipped, again.records) == ({"a": "empty"}, {})


def test_a_journal_goes_on_after_a_line_that_is_cut_off(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.note("a", "empty")
    journal.path.write_text(journal.path.read_text()[:-9])
    Journal(journal.path).note("b", "dark")
    assert Journal(journal.path).skipped == {"b": "dark"}


def test_the_journal_forgets_patches_that_are_not_there_whole(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    image, label = noise(8)
    for name in ("whole", "half", "gone"):
        journal.note(name, {"name": name})
        write(tmp_path / "images" / f"{name}.tif", image)
        write(tmp_path / "labels" / f"{name}.tif", label)
    half = tmp_path / "labels" / "half.tif"
    half.write_bytes(half.read_bytes()[:-10])
    (tmp_path / "images" / "gone.tif").unlink()
    journal.forget_missing(tmp_path)
    assert list(journal.records) == ["whole"]


# --- order and threads ----------------------------------------------------------------------


def test_one_thread_and_four_give_identical_files(batch):
    label = noise((60, 52))[1]
    label[:30, :11] = 255
    batch.draw("a", (60, 52), label=label)
    grid = write_grid(batch.folder / "grid.geojson", tiles(5, 6, side=10))
    results = []
    for workers in (1, 4):
        batch.out = batch.folder / f"by{workers}"
        results.append(batch.cut("--grid", grid, "--workers", workers))
    one, four = results
    assert len(one.splits) > 20 and one.skipped
    assert same_result(one, four)


@pytest.mark.parametrize("grid", [False, True])
def test_cells_are_read_in_the_order_of_the_rows(batch, monkeypatch, grid):
    batch.draw("a", 48)
    words = []
    if grid:  # column by column
        cells = sorted(tiles(6, 6), key=lambda cell: cell.bounds)
        words = ["--grid", write_grid(batch.folder / "grid.geojson", cells)]
    windows, read = [], Source.read

    def noted(source, window):
        if len(source.bands) == 2:  # the label has one
            windows.append((window.row_off, window.col_off))
        return read(source, window)

    monkeypatch.setattr(Source, "read", noted)
    dataset = batch.cut(*words, "--workers", 4)
    assert len(windows) == len(dataset.splits) == 36
    assert windows == list(itertools.product(range(0, 48, 8), repeat=2))


def test_a_scene_too_wide_for_the_cache_is_read_in_columns(batch, monkeypatch):
    batch.draw("a", 48)
    with rasterio.open(batch.data / "Image_a.tif") as image:
        block = image.block_shapes[0][0]
        rows = block + max(block, 8)
        cache = 2 * 2 * np.dtype(image.dtypes[0]).itemsize * rows * 20  # of 20 columns
        monkeypatch.setitem(GDAL_OPTIONS, "GDAL_CACHEMAX", cache)
        cells = regular_cells(48, 48, 8, 8, "a")
        order = reading_order(cells[::-1], image, [1, 2])
    places = [(cell.window.col_off // 20, cell.window.row_off) for cell in order]
    assert places == sorted(places) and len({place[0] for place in places}) == 3
    assert sorted(cell.name for cell in order) == sorted(cell.name for cell in cells)


# --- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stride", "0"], "--stride 0: expected at least 1"),
        (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--stride", "4", "--grid", "g.shp"], "--stride with --grid g.shp"),
        (["--block_size", "100"], "expected --split_by block with it"),
        (["--split_by", "block", "--block_size", "0"], "more than 0 metres"),
        (["--split_by", "block", "--block_size", "inf"], "more than 0 metres"),
        (["--split_by", "block", "--block_size", "nan"], "more than 0 metres"),
        (["--split_by", "rows"], "invalid choice: 'rows'"),
        (["--buffer", "-1"], "0 metres or more"),
        (["--buffer", "nan"], "0 metres or more"),
        (["--overwrite", "--resume"], "--overwrite and --resume: expected one"),
        (["--use_per_image_grid", "--grid", "g.shp"], "--use_per_image_grid"),
        (["--use_per_image_grid", "--stride", "4"], "--use_per_image_grid"),
        (
            ["--image_pattern", "Image.tif"],
            "--image_pattern Image.tif: expected one <id>",
        ),
        (
            ["--label_pattern", "<id><id>"],
            "--label_pattern <id><id>: expected one <id>",
        ),
        (["--grid_pattern", "*"], "--grid_pattern *: expected one <id>"),
    ],
)
def test_a_wrong_option_exits_with_status_2_and_writes_nothing(
    batch, capsys, words, expected
):
    batch.draw("a", 16)
    assert expected in complaint(capsys, *batch.words(*words))
    assert not batch.out.exists()


@pytest.mark.parametrize("missing", ["--data_dir", "--output"])
def test_a_missing_option_is_named(batch, capsys, missing):
    words = batch.words()
    place = words.index(missing)
    assert missing in complaint(capsys, *words[:place], *words[place + 2 :])


def test_batch_and_extract_have_their_settings_in_common():
    for words in (
        ["batch", "--data_dir", "d"],
        ["extract", "--image", "i", "--label", "l"],
    ):
        parsed = Patch_extraction.build_parser().parse_args([*words, "--output", "o"])
        config = settings_from(parsed.config_class, parsed)
        assert (config.grid, config.stride, config.block_size) == (None, None, None)
        assert (config.split_by, config.buffer) == ("random", 0)
        assert not (config.resume or config.overwrite or config.skip_errors)
    config = BatchConfig(data_dir="d", output="o")
    patterns = config.image_pattern, config.label_pattern, config.grid_pattern
    assert patterns == ("Image_<id>.tif", "Label_<id>.tif", "Grid_<id>.*")
