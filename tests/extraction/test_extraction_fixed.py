"""Faults of the extraction that must not come back, by the numbers of ``pytest -m fault``."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
import tifffile
from batch_helpers import at, write, write_grid
from helpers import (
    CRS,
    interrupt,
    settings,
    signal_during,
    write_dataset,
    write_geotiff,
)
from pyproj import Transformer
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from shapely import box
from site_helpers import (
    PATCH,
    SIZE,
    TRANSFORM,
    classes,
    hole,
    refusal,
    run,
    scene,
    tiles,
)

import extraction.cells
import extraction.cutting
from common import VERSION
from common.errors import DatasetError
from common.patches import PatchPair, list_pairs, read_patch
from common.rasters import open_raster, select_bands
from extraction.cells import Grid
from extraction.dataset import STAGING
from training.dataset import require_patches

fault = pytest.mark.fault


def write_layers(site, tables=()) -> str:
    """A GeoPackage of two grids and a table without geometries; its path."""
    path = str(site.folder / "grids.gpkg")
    styles = geopandas.GeoDataFrame({"style": ["red"]}, geometry=[None], crs=None)
    for name, cells in tables:
        site.draw_grid(cells)
        geopandas.read_file(site.grid).to_file(path, layer=name, engine="pyogrio")
    import pyogrio

    options = {"layer": "layer_styles", "append": False, "driver": "GPKG"}
    pyogrio.write_dataframe(styles.drop(columns="geometry"), path, **options)
    return path


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_at(monkeypatch, site, dotted: str, call: int, *options) -> None:
    """Run an extraction on a disk that is full at the n-th call of a function."""
    with monkeypatch.context() as patching:
        interrupt(patching, dotted, call, disk_full())
        assert run(*site.words("--workers", 1, *options)) == 1


@fault(1)
@pytest.mark.parametrize(
    ("place", "call", "cut"),
    [
        ("extraction.cutting.write_cell", 8, 2),
        ("extraction.dataset.assign_splits", 1, 0),
        ("extraction.dataset.write_cells", 1, 0),
        ("extraction.dataset.publish", 1, 0),
    ],
)
def test_an_error_keeps_finished_patches_and_the_next_run_says_what_can_be_done(
    site, monkeypatch, capsys, place, call, cut
):
    fail_at(monkeypatch, site, place, call)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "or write elsewhere. What is finished is kept: --resume" in line
    assert [path.name for path in site.out.iterdir()] == [".Patch-partial"]
    kept = site.leftovers()
    assert run(*site.words()) == 1
    line = capsys.readouterr().err
    assert "unfinished: --resume completes it, --overwrite starts" in line
    assert site.leftovers() == kept
    calls = interrupt(monkeypatch, "extraction.cutting.write_cell", 0)
    resumed = site.extract("--resume")
    assert len(calls) == cut
    former = {name: (p.split, p.image.tobytes()) for name, p in resumed.items()}
    whole = site.extract("--overwrite")
    assert {n: (p.split, p.image.tobytes()) for n, p in whole.items()} == former


@fault(1)
@pytest.mark.parametrize("error", [disk_full(), KeyboardInterrupt()])
def test_a_run_that_finished_no_patch_leaves_nothing(site, monkeypatch, capsys, error):
    site.draw_image(np.where(hole(), scene(), 0), nodata=0)
    interrupt(monkeypatch, "extraction.cutting.write_cell", 1, error)
    # the first cell is skipped, which is no patch
    assert run(*site.words("--min_valid", 0.95)) != 0
    assert "is kept" not in capsys.readouterr().err
    assert not site.out.exists()


@fault(1)
def test_the_rename_that_fails_last_loses_nothing(site, monkeypatch, capsys):
    before = len(site.extract())
    plain = Path.rename

    def failing(self, target):
        if Path(target).name == "Patch":
            raise PermissionError(13, "Permission denied")
        return plain(self, target)

    with monkeypatch.context() as patching:
        patching.setattr(Path, "rename", failing)
        assert run(*site.words("--overwrite")) == 1
    assert "is kept: --resume" in capsys.readouterr().err
    calls = interrupt(monkeypatch, "extraction.cutting.write_cell", 0)
    assert len(site.extract("--resume")) == before and not calls
    assert [path.name for path in site.out.iterdir()] == ["Patch"]


@fault(1)
def test_a_split_that_cannot_be_drawn_is_drawn_otherwise_without_cutting_again(
    site, monkeypatch, capsys
):
    assert run(*site.words("--buffer", 1e5)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "lower --buffer. What is finished is kept: --resume" in line
    calls = interrupt(monkeypatch, "extraction.cutting.write_cell", 0)
    words = ["--split_by", "block", "--block_size", 160, "--seed", 3]
    resumed = {
        name: patch.split for name, patch in site.extract(*words, "--resume").items()
    }
    assert not calls
    whole = site.extract(*words, "--overwrite")
    assert {name: patch.split for name, patch in whole.items()} == resumed


@fault(42)
def test_of_several_layers_one_must_be_named(site, capsys):
    path = write_layers(site, [("north", tiles(3, 1)), ("south", tiles(3, 2))])
    site.grid = path
    line = refusal(capsys, site)
    assert "has 2 layers with geometries (north, south)" in line
    assert f'"{path}|layername=north"' in line
    site.grid = f"{path}|layername=south"
    assert len(site.extract()) == 6


@fault(42)
def test_layers_without_geometries_do_not_count(site):
    site.grid = write_layers(site, [("cells", tiles(3, 1))])
    assert len(site.extract()) == 3


@fault(42)
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("layername=nort", "did you mean 'north'?"),
        ("layername=north|subset=id=1", "|layername=NAME and no more"),
        ("layerid=0", "|layername=NAME and no more"),
    ],
)
def test_a_layer_that_cannot_be_read_alone_is_refused(site, capsys, layer, expected):
    path = write_layers(site, [("north", tiles(3, 1)), ("south", tiles(3, 2))])
    site.grid = f"{path}|{layer}"
    assert run(*site.words()) == 1 or run(*site.words()) == 2
    assert expected in capsys.readouterr().err


@fault(42)
def test_a_label_and_the_patterns_of_a_batch_may_name_a_layer(site):
    path = write_layers(site, [("water", tiles(1, 3)), ("south", tiles(3, 2))])
    site.label = f"{path}|layername=water"
    site.draw_grid(tiles())
    patches = site.extract()
    assert [int(p.label.mean()) for p in patches.values()] == [1, 0, 0] * 3
    (site.folder / "Label_a.gpkg").write_bytes(
        (site.folder / "grids.gpkg").read_bytes()
    )
    site.image.rename(site.folder / "Image_a.tif")
    words = ["batch", "--data_dir", site.folder, "--output", site.folder / "batch"]
    words += ["--patch_size", 16, "--label_pattern", "Label_<id>.gpkg|layername=water"]
    assert run(*words) == 0
    assert len(list((site.folder / "batch").glob("Patch/*/images/*.tif"))) == 9


def near_infrared() -> np.ndarray:
    """Four bands of bytes, the last of which is 0 in water: in the left cells."""
    image = scene(4, dtype="uint8")
    image[3, :, :PATCH] = 0
    return image


@fault(39)
def test_a_near_infrared_that_gdal_flags_as_alpha_is_data(site, capsys):
    site.draw_image(near_infrared())
    with rasterio.open(site.image) as file:
        assert file.colorinterp[3] == ColorInterp.alpha
    patches = site.extract()
    assert "band 4 is flagged as transparency but holds data" in capsys.readouterr().err
    assert len(patches) == 9
    for patch in patches.values():
        np.testing.assert_array_equal(patch.image, near_infrared()[:, *patch.place()])
        pair = PatchPair(patch.image_path, patch.label_path)
        image, valid, _ = read_patch(pair)
        assert image.shape[0] == 4 and valid.all()


@fault(39)
def test_a_band_whose_description_is_spectral_is_data(site):
    image = scene(4, dtype="uint8")
    image[3] = 255
    for number, name in enumerate(["NIR", "B08", "near infrared", "842 nm", "B8A"]):
        path = write_geotiff(
            site.folder / f"{number}.tif", image, descriptions=["R", "G", "B", name]
        )
        with open_raster(path) as file:
            assert select_bands(file, None) == [1, 2, 3, 4], name


@fault(39)
def test_a_line_says_how_to_keep_an_alpha_band(site, capsys):
    image = np.concatenate([scene(dtype="uint8"), 255 * hole("uint8")[None]])
    site.draw_image(image)
    assert {len(patch.image) for patch in site.extract().values()} == {3}
    expected = "band 4 is left out, since it holds transparency; --bands 1-4 keeps it"
    assert expected in capsys.readouterr().err


@fault(39)
def test_foreign_patches_of_four_bands_keep_them_all(tmp_path):
    root = write_dataset(tmp_path, 4, 2, 0, bands=4, dtype="uint8")
    water = root / "Patch" / "train" / "images" / "patch_000.tif"
    with rasterio.open(water, "r+") as file:
        assert file.colorinterp[3] == ColorInterp.alpha
        file.write(np.zeros((32, 32), np.uint8), 4)
    for pair in list_pairs(root, "train"):
        image, valid, _ = read_patch(pair)
        assert len(image) == 4 and valid.all()


@fault(40)
def test_a_background_declared_as_nodata_is_reported_with_the_ways_out(site, capsys):
    label = np.zeros((SIZE, SIZE), np.uint8)
    label[::3, ::2] = 1
    site.draw_label(label, nodata=0)
    site.extract()
    line, *_, last = capsys.readouterr().err.splitlines()
    assert f"{site.label} declares 0 as nodata, which makes about 83.3% of it" in line
    assert "--label_values (as 0,1)" in line and "-unsetnodata" in line
    assert "--label_values 0,1" in last and "255" not in last


@fault(40)
@pytest.mark.parametrize("shift", [0, 5])  # pixels: on its own grid it is warped
def test_a_nodata_value_that_is_named_is_a_class(site, capsys, shift):
    label = classes(2)
    moved = TRANSFORM * Affine.translation(-shift, -shift)
    site.draw_label(label, nodata=0, transform=moved)
    patches = site.extract("--label_values", "0,1", "--save_metadata")
    assert "declares" not in capsys.readouterr().err
    for patch in patches.values():
        rows, columns = patch.place()
        there = label[
            rows.start + shift : rows.stop + shift,
            columns.start + shift : columns.stop + shift,
        ]
        height, width = there.shape  # of what the label covers
        np.testing.assert_array_equal(patch.label[:height, :width], there)
        assert (patch.label[height:] == 255).all()


@fault(40)
@pytest.mark.parametrize(
    ("label", "options", "reason"),
    [
        (np.where(classes(2), 255, 0), [], "--label_values 0,255"),
        (classes(1), [], "the cells hold no other value of"),
        (classes(1) + 5, ["--label_values", "5,6"], "no other class that --label_val"),
    ],
)
def test_advice_on_one_class_names_its_cause(site, capsys, label, options, reason):
    site.draw_label(label.astype(np.uint8))
    site.extract(*options)
    assert reason in capsys.readouterr().err.splitlines()[-1]


def stop_after(monkeypatch, site, cells: int, *options) -> None:
    """Interrupt an extraction after some cells."""
    with monkeypatch.context() as patching:
        interrupt(patching, "extraction.cutting.read_cell", cells + 1)
        assert run(*site.words(*options)) == 130


@fault(6)
@pytest.mark.parametrize("changed", ["label.tif", "grid.dbf", "inner.tif"])
def test_a_file_that_has_changed_since_refuses_the_resume(
    site, monkeypatch, capsys, changed
):
    site.draw_grid(tiles(), file="grid.shp", id=list(range(1, 10)))
    inner = site.image.rename(site.folder / "inner.tif")
    for source, name in ((inner, "middle.vrt"), ("middle.vrt", "outer.vrt")):
        site.image = site.folder / name
        shutil.copy(write_scene_vrt(site.folder, Path(source).name), site.image)
    stop_after(monkeypatch, site, 4)
    moment = (site.folder / changed).stat().st_mtime
    os.utime(site.folder / changed, (1, moment + 1))
    assert run(*site.words("--resume")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"another file {site.folder / changed} (" in line and "--overwrite" in line
    os.utime(site.folder / changed, (1, moment))
    assert len(site.extract("--resume")) == 9


@fault(6)
@pytest.mark.parametrize("version", ["1.1", None])
def test_patches_of_another_version_refuse_the_resume(
    site, monkeypatch, capsys, version
):
    stop_after(monkeypatch, site, 4)
    stored = site.out / STAGING / "settings.json"
    content = json.loads(stored.read_text())
    assert content.pop("version") == VERSION
    # before 2.0 no version was stored
    earlier = content | ({"version": version} if version else {})
    stored.write_text(json.dumps(earlier))
    assert run(*site.words("--resume")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"another version ({version}, now {VERSION})" in line
    assert "--overwrite" in line
    stored.write_text(json.dumps({"version": VERSION} | content))
    assert len(site.extract("--resume")) == 9


def write_scene_vrt(folder: Path, source: str) -> Path:
    """A VRT of the three bands of a scene in the same folder."""
    bands = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{band}"><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{source}</SourceFilename>'
        f"<SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band in (1, 2, 3)
    )
    place = ", ".join(map(str, TRANSFORM.to_gdal()))
    path = folder / "written.vrt"
    path.write_text(
        f'<VRTDataset rasterXSize="{SIZE}" rasterYSize="{SIZE}"><SRS>{CRS}</SRS>'
        f"<GeoTransform>{place}</GeoTransform>{bands}</VRTDataset>"
    )
    return path


@fault(23)
def test_a_common_grid_is_read_once_and_only_cells_of_a_scene_count(batch, monkeypatch):
    for number in range(3):
        batch.draw(f"s{number}", 16, transform=at(16 * number, 0))
    cells = [*tiles(6, 2, 8), *tiles(100, 100, 8, top=1000)]  # the others are elsewhere
    repaired, read = [], []
    plain, polygons = extraction.cells.read_vector, extraction.cells.polygonal

    def count_read(path):
        return read.append(path) or plain(path)

    def count_repaired(outline):
        return repaired.append(outline) or polygons(outline)

    monkeypatch.setattr("extraction.cells.read_vector", count_read)
    monkeypatch.setattr("extraction.cells.polygonal", count_repaired)
    grid = write_grid(batch.folder / "grid.gpkg", cells)
    dataset = batch.cut("--grid", grid)
    assert len(dataset.records) == 12 and dataset.skipped == {}
    assert len(read) == 1 and len(repaired) < 40
    assert sorted(dataset.records)[:4] == [f"s0_{number:05}" for number in (1, 2, 7, 8)]


@fault(23)
@pytest.mark.parametrize(
    ("crs", "left", "bottom"),
    [
        ("EPSG:32601", 176_000, 7_000_000),  # across the antimeridian
        ("EPSG:3031", -40_000, -40_000),  # around the South Pole
        ("EPSG:32631", 500_000, 4_600_000),
    ],
)
def test_all_cells_that_touch_a_scene_are_found(
    tmp_path, monkeypatch, crs, left, bottom
):
    pixels, far = np.ones((1, 80, 80), np.uint8), 1000
    transform = from_origin(left, bottom + 80 * far, far, far)
    path = write_geotiff(tmp_path / "a.tif", pixels, crs=crs, transform=transform)
    lon, lat = np.meshgrid(np.arange(-180, 180), np.arange(-90, 90))
    squares = shapely.box(lon, lat, lon + 1, lat + 1).ravel()
    table = geopandas.GeoDataFrame(geometry=squares, crs="EPSG:4326")
    monkeypatch.setattr("extraction.cells.read_vector", lambda path: table)
    with open_raster(path) as image:
        near = Grid("world", None).rows_near(image)
    ground = transform * np.meshgrid(np.arange(80) + 0.5, np.arange(80) + 0.5)
    to_degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    lon, lat = np.floor(to_degrees.transform(*ground)).astype(int)
    assert set(np.unique((lat + 90) * 360 + lon + 180)) <= set(near)


@fault(25)
@pytest.mark.parametrize("most", [0, 1, 2.5])
def test_cells_in_flight_are_bounded_in_bytes(site, monkeypatch, most):
    cells = 4 * PATCH  # pixels of a side, four times the patches
    site.draw_image(scene(height=2 * cells, width=3 * cells))
    site.draw_label(classes(height=2 * cells, width=3 * cells))
    site.draw_grid(tiles(3, 2, side=cells))
    held, highest = [], []
    plain, write = extraction.cutting.read_cell, extraction.cutting.write_cell

    def read(*arguments):
        patch = plain(*arguments)
        held.append(patch.bytes)
        highest.append(sum(held) / patch.bytes)
        return patch

    def wait_and_write(*arguments):
        time.sleep(0.1)
        record = write(*arguments)
        held.pop()
        return record

    patch_bytes = (3 * 2 + 1 + 1 + 16) * cells**2
    monkeypatch.setattr(extraction.cutting, "read_cell", read)
    monkeypatch.setattr(extraction.cutting, "write_cell", wait_and_write)
    monkeypatch.setattr(
        extraction.cutting, "free_memory", lambda: int(4 * most * patch_bytes)
    )
    assert len(site.extract("--workers", 8)) == 6
    assert max(highest) <= most + 1


@fault(25)
def test_a_cell_that_memory_cannot_hold_is_refused(site, monkeypatch, capsys):
    monkeypatch.setattr(extraction.cutting, "fits_in_memory", lambda size: size < 9000)
    site.draw_grid([*tiles(2, 1), box(0, 0, 48, 48)])
    line = refusal(capsys, site)
    assert "patch_003 covers 48 x 48 pixels" in line and "finer grid" in line


def recompress(path: Path, codec: int) -> None:
    """Have a TIFF say that it is compressed by another codec."""
    with tifffile.TiffFile(path) as tiff:
        place = tiff.pages.first.tags["Compression"].valueoffset
    content = bytearray(path.read_bytes())
    content[place : place + 2] = codec.to_bytes(2, "little")
    path.write_bytes(content)


@fault(46)
@pytest.mark.parametrize(("codec", "name"), [(50002, "JXL"), (50003, "50003")])
@pytest.mark.parametrize("which", ["scene", "source of a VRT"])
def test_a_codec_that_gdal_lacks_is_named_with_the_remedy(
    site, capsys, which, codec, name
):
    recompress(site.image, codec)
    if which != "scene":
        site.image = write_scene_vrt(site.folder, "image.tif")
    line = refusal(capsys, site)
    assert f"is compressed by {name}, a codec that this GDAL lacks" in line
    assert "gdal_translate" in line and "incomplete" not in line


@fault(46)
def test_a_format_that_gdal_lacks_is_said_to_be_unknown(site, capsys):
    site.image = site.folder / "image.jxl"
    site.image.write_bytes(b"\xff\x0a" + bytes(100))
    line = refusal(capsys, site)
    assert "does not know its format" in line and "gdal_translate" in line


@fault(48)
def test_a_label_patch_of_background_without_a_block_is_whole(tmp_path):
    root = write_dataset(tmp_path, 2, 2, 0, bands=3)
    label = root / "Patch" / "train" / "labels" / "patch_000.tif"
    with rasterio.open(label) as file:
        profile = file.profile | {"SPARSE_OK": True}
    label.unlink()
    with rasterio.open(label, "w", **profile):
        pass
    require_patches(settings(dataset_root=str(root)))
    image = label.parent.parent / "images" / label.name
    mask = read_patch(PatchPair(image, label))[2]
    assert mask.shape == (32, 32) and not mask.any()
    content = label.read_bytes()
    label.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError):
        require_patches(settings(dataset_root=str(root)))


@fault(48)
def test_an_image_patch_without_a_block_was_not_written(tmp_path):
    root = write_dataset(tmp_path, 2, 2, 0, bands=3)
    image = root / "Patch" / "train" / "images" / "patch_000.tif"
    with rasterio.open(image) as file:
        profile = file.profile | {"SPARSE_OK": True}
    image.unlink()
    with rasterio.open(image, "w", **profile):
        pass
    with pytest.raises(DatasetError, match="is cut off"):
        require_patches(settings(dataset_root=str(root)))


@fault(60)
@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"id": [1, 2], "kind": ["oak", "ash"], "note": [None, "old"]}, "(kind)"),
        ({"kind": ["oak", "oak"], "area": [1.5, 2]}, None),
    ],
)
def test_polygons_with_texts_that_become_binary_are_reported(
    site, capsys, columns, named
):
    site.draw_label_shapes([box(2, 2, 20, 20), box(24, 24, 40, 40)], **columns)
    site.extract()
    lines = [li for li in capsys.readouterr().err.splitlines() if "are class 1," in li]
    assert len(lines) == (named is not None)
    if named:
        assert lines[0].endswith(f"name it with --label_column {named}")
        shutil.rmtree(site.out)
        site.extract("--label_column", "kind")
        assert "are class 1," not in capsys.readouterr().err


@fault(40)
def test_labels_of_a_batch_with_the_same_nodata_are_one_line(batch, capsys):
    for number, name in enumerate("abc"):
        place = at(100 * number, 0)
        batch.draw(name, 16, transform=place)
        write(
            batch.data / f"Label_{name}.tif",
            np.eye(16, dtype=np.uint8),
            place,
            nodata=0,
        )
    batch.cut()
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "makes about" in line]
    assert "Label_a.tif" in line and line.endswith("(and 2 others likewise)")


@fault(54)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_extraction_stops_between_cells(site, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        ended = signal_during(patch, "extraction.cutting.write_cell", 2, number)
        assert run(*site.words("--workers", "1")) == 128 + number
    assert 2 <= len(ended) < 9
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted")
    assert run(*site.words("--resume")) == 0
    assert len(site.patches()) == 9


@fault(43)
@pytest.mark.parametrize(
    ("empty", "said"),
    [
        ([1, 2, 4], "no pixel of band 2-3,5 is valid (--bands 1,4 leaves it out)"),
        ([0, 1, 2, 3, 4], None),
    ],
)
def test_bands_without_a_valid_pixel_are_named(site, capsys, empty, said):
    image = scene(bands=5, dtype="float32")
    image[empty] = -9999
    site.draw_image(image, nodata=-9999)
    line = refusal(capsys, site)
    assert "no valid pixel" in line
    assert (said in line) if said else ("leaves it out" not in line)
    if said:
        site.extract("--bands", "1,4")
