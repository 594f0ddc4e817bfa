"""Faults that users meet, in one place: each row of a table is one of them.

``pytest -k faults`` runs all. A row damages one thing in a folder where all scripts work, runs a
script there as a user does, and asks what ``assert_fault`` asks of every error: the status, one
line that says where and what to do, no trace of the run, and nothing long before it.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import geopandas
import numpy as np
import pytest
import rasterio
import tifffile
import torch
from affine import Affine
from helpers import (
    CRS,
    ENCODER,
    ORIGIN,
    PIXEL,
    ROOT,
    cell,
    grid,
    make_patch,
    patch_everywhere,
    write_dataset,
    write_model,
    write_raster,
)
from shapely import affinity
from shapely.geometry import LineString, Polygon, box

import main
import Patch_extraction
import Predict_large_image
from common import patches as patches_module
from common.architectures import ModelConfig
from common.rasters import Source
from extraction.settings import BatchConfig, ExtractionConfig, InfoConfig, SampleConfig
from model_training import Normalization, build_model, load_checkpoint, save_checkpoint
from prediction.predictor import Predictor
from prediction.settings import PredictionConfig
from training import epochs
from training.outputs import RUN_FILES
from training.settings import TrainingConfig

SIDE = 64
TRAIN = (
    "--dataset_root data --save_dir models --mode binary --model pspnet --batch_size 2 "
    "--epochs 1 --num_workers 0 --device cpu"
)
EXTRACT = "extract --image scene.tif --label label.tif --grid grid.gpkg --output out"
PREDICT = "--model model.pth --input scene.tif --output map.tif --device cpu"
COMMANDS = {
    "extract": ("Patch_extraction", f"{EXTRACT} --patch_size 32 --workers 1"),
    "batch": (
        "Patch_extraction",
        "batch --data_dir scenes --output out --patch_size 32 --workers 1",
    ),
    "train": ("main", f"{TRAIN} --encoder_name {ENCODER}"),
    "predict": ("Predict_large_image", f"{PREDICT} --patch_size 32 --overlap 8"),
}
MODULES = {
    "Patch_extraction": Patch_extraction,
    "main": main,
    "Predict_large_image": Predict_large_image,
}
# where the work of a script begins, which takes long with a user's data
WORK = {
    "extract": "extraction.cutting.cut_scene",
    "batch": "extraction.cutting.cut_scene",
    "train": "training.epochs.fit",
    "predict": "prediction.scene.predict_scene",
}
# what may stand on stderr beside the error
MESSAGES = re.compile(
    r"usage: | {4,}|(train|validation|test) +\d+ patches|no GPU found|memory ran out|warning: |"
    r"\S+ is warped onto|without the files|left out|(random|block|column) fold|fold \d|"
    r"skipped \d+ of| {2}\S"
)


# --- the folder and its scripts -------------------------------------------------------------


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A folder in which all commands succeed."""
    folder = tmp_path_factory.mktemp("whole")
    for name, label in (("scene", "label"), ("scenes/Image_1", "scenes/Label_1")):
        image, mask = make_patch(np.random.default_rng(1), 3, 2, (SIDE, SIDE))
        write_raster(folder / f"{name}.tif", image)
        write_raster(folder / f"{label}.tif", mask)
    for name in ("grid.gpkg", "grid.shp"):
        grid().to_file(folder / name)
    write_dataset(folder / "data", 4, 2, 1, bands=3)
    write_model(folder / "model.pth")
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, which is the working directory too."""
    folder = tmp_path / "place"
    shutil.copytree(whole, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        os, "sync", lambda: None
    )  # of all disks: slow on a busy machine
    return folder


def words(script: str, options: str) -> list[str]:
    """The command line; options of a row stand last and so count."""
    return shlex.split(f"{COMMANDS[script][1]} {options}")


def run(script: str, options: str = "") -> int:
    try:
        return MODULES[COMMANDS[script][0]].main(words(script, options))
    except SystemExit as ended:
        return ended.code


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All files of a folder, hidden ones too, with their bytes; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_one_line(err: str, error: str, status: int) -> None:
    """Exactly one line of stderr is an error, which fits; all others are the toolkit's own."""
    lines = err.splitlines()
    start = "error: " if status == 1 else r"[\w.]+( \w+)?: error: "
    errors = [line for line in lines if re.match(start, line)]
    assert len(errors) == 1 and errors == lines[-1:], err
    assert re.search(error, errors[0]), f"{error!r} is not in {errors[0]!r}"
    others = [line for line in lines[:-1] if line and not MESSAGES.match(line)]
    assert not others, err


def assert_fault(capfd, monkeypatch, script, options, error, status=1, late=False):
    """Run a script that must fail, before its long work unless ``late``, and leave no trace."""
    if not late:
        patch_everywhere(monkeypatch, WORK[script], unexpected_work)
    before = snapshot(Path.cwd())
    capfd.readouterr()
    ended = run(script, options)
    out, err = capfd.readouterr()
    assert ended == status, err
    assert_one_line(err, error, status)
    assert out == ""
    after = snapshot(Path.cwd())
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []


def unexpected_work(*_):
    raise AssertionError("the work began before the fault was seen")


def nothing() -> None:
    """Damage nothing: the command line alone is at fault."""


def row(script, name, damage, error, options="", status=1, late=False):
    """A row of a table; ``damage`` is called in the folder, maybe with ``monkeypatch``."""
    return pytest.param(
        script, damage, options, error, status, late, id=f"{script}: {name}"
    )


def check(capfd, monkeypatch, script, damage, options, error, status, late):
    """What all tables ask of their rows."""
    takes = getattr(damage, "takes_monkeypatch", False)
    damage(monkeypatch) if takes else damage()
    assert_fault(capfd, monkeypatch, script, options, error, status, late)


def table(*rows):
    names = ("script", "damage", "options", "error", "status", "late")
    return pytest.mark.parametrize(names, rows)


def simulated(damage: Callable) -> Callable:
    """Mark a damage that is done to the process, not to a file."""
    damage.takes_monkeypatch = True
    return damage


# --- rasters --------------------------------------------------------------------------------


def read(path: str) -> tuple[np.ndarray, dict]:
    with rasterio.open(path) as file:
        return file.read(), file.profile


def rewrite(path: str, change=None, **profile) -> None:
    """Write a raster again with other pixels or another profile."""
    pixels, former = read(path)
    pixels = change(pixels) if change else pixels
    shape = dict(zip(("count", "height", "width"), pixels.shape), dtype=pixels.dtype)
    os.unlink(path)
    with rasterio.open(path, "w", **former | shape | profile) as file:
        file.write(pixels)


def missing(path: str) -> None:
    os.unlink(path)


def empty(path: str) -> None:
    Path(path).write_bytes(b"")


def text(path: str) -> None:
    Path(path).write_text("Dear reader, this is no raster.\n")


def cut_off(path: str) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def cut_off_behind_the_header(path: str) -> None:
    from rasterio.shutil import copy

    os.rename(path, f"{path}.whole")
    copy(f"{path}.whole", path, driver="COG", blocksize=16)
    cut_off(path)


def bad_block(path: str) -> None:
    """Overwrite a compressed block in the middle of the file."""
    rewrite(path, compress="deflate", tiled=True, blockxsize=16, blockysize=16)
    content = bytearray(Path(path).read_bytes())
    with rasterio.open(path) as file:
        offset = int(file.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    content[offset : offset + 40] = bytes(40)
    Path(path).write_bytes(content)


def no_crs(path: str) -> None:
    rewrite(path, crs=None)


def nowhere(path: str) -> None:
    rewrite(path, crs=None, transform=Affine.identity())


def elsewhere(path: str) -> None:
    rewrite(path, transform=Affine(PIXEL, 0, 100_000, 0, -PIXEL, 200_000))


def all_nodata(path: str) -> None:
    rewrite(path, np.zeros_like, nodata=0)


def all_nan(path: str) -> None:
    rewrite(path, lambda pixels: np.full(pixels.shape, np.nan, "float32"))


def complex_numbers(path: str) -> None:
    rewrite(path, lambda pixels: pixels.astype("complex64"))


def disguised(path: str) -> None:
    """A VRT under the name of a TIFF."""
    from rasterio.shutil import copy

    os.rename(path, f"{path}.real")
    copy(f"{path}.real", path, driver="VRT")


UNREADABLE = [
    ("missing", missing, "{path}: .*No such file"),
    ("empty file", empty, "{path}.*(copy or write|; write) it again"),
    ("not a raster", text, "{path}.*(copy or write|; write) it again"),
    ("cut off", cut_off, "{path}.*(copy or write|; write) it again"),
    (
        "cut off behind its header",
        cut_off_behind_the_header,
        "{path} is cut off; (copy or download|write) it again",
    ),
    ("complex numbers", complex_numbers, "{path} holds complex .* convert it"),
    ("a VRT named .tif", disguised, "{path}.*(copy or write|; write) it again"),
]
PLACES = [
    ("extract", "scene.tif"),
    ("extract", "label.tif"),
    ("batch", "scenes/Image_1.tif"),
    ("batch", "scenes/Label_1.tif"),
    ("train", "data/Patch/train/images/patch_002.tif"),
    ("train", "data/Patch/validation/labels/patch_005.tif"),
    ("predict", "scene.tif"),
]


@table(
    *(
        row(
            script,
            f"{Path(path).parent.name}/{Path(path).stem} {name}",
            partial(damage, path),
            # a patch that is not there is an image or label without a partner
            r"patch_\d+.tif has no (label|image).*; add it or remove"
            if script == "train" and damage is missing
            else r"No file in scenes is called|without the files that belong to them: .*; add"
            if script == "batch" and damage is missing
            else error.format(path=re.escape(path)),
        )
        for script, path in PLACES
        for name, damage, error in UNREADABLE
    )
)
def test_faults_of_rasters_that_cannot_be_read(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)


def huge(path: str, block: int = 0, side: int = 20_000) -> None:
    """A small file whose header claims 20,000 pixels a side, in one block or in small ones.

    The places of the blocks are all in the file, as those of a picture that unfolds.
    """
    profile = {key: read(path)[1][key] for key in ("count", "crs", "transform")}
    parts = {"blockysize": side, "compress": "deflate"}  # without, GDAL reads lines
    if block:
        parts = {"tiled": True, "blockxsize": block, "blockysize": block}
    shape = {"width": side, "height": side, "dtype": "uint16", "interleave": "pixel"}
    with rasterio.open(path, "w", sparse_ok=True, **profile, **shape, **parts):
        pass
    kind = "Tile" if block else "Strip"
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = tiff.pages.first.tags
        sizes = tags[f"{kind}ByteCounts"]
        sizes.overwrite([100] * sizes.count)
        tags[f"{kind}Offsets"].overwrite([8] * sizes.count)


def huge_vrt(path: str) -> None:
    """A text of some lines that claims 2 x 10^9 pixels a side."""
    bands = "".join(f'<VRTRasterBand dataType="Byte" band="{b}"/>' for b in (1, 2, 3))
    sizes = 'rasterXSize="2000000000" rasterYSize="2000000000"'
    Path(path).write_text(f"<VRTDataset {sizes}>{bands}</VRTDataset>")


def little_memory(damage: Callable) -> Callable:
    """Half a gigabyte is free."""

    def both(monkeypatch) -> None:
        patch_everywhere(monkeypatch, "common.machine.free_memory", lambda: 2**29)
        damage()

    return simulated(both)


IN_ONE_BLOCK = (
    r"{path} is stored in blocks of 20000 x 20000 pixels, .*write it again in tiles"
)


@table(
    *(
        row(
            script,
            f"{Path(path).parent.name}/{Path(path).stem}",
            little_memory(partial(huge, path)),
            IN_ONE_BLOCK.format(path=re.escape(path)),
        )
        for script, path in PLACES
        if not path.startswith("data")
    ),
    row("train", "a patch of one block",
        little_memory(lambda: [huge(patch_path("train", k)) for k in ("images", "labels")]),
        IN_ONE_BLOCK.format(path=r"\S+patch_000.tif")),
    row("train", "a patch of small blocks",
        little_memory(lambda: [huge(patch_path("train", k), 256) for k in ("images", "labels")]),
        r"patch_000.tif .*20000"),
    row("predict", "a scene larger than the disk", lambda: huge_vrt("huge.vrt"),
        r"\. has .* GB free, but the unfinished map takes 4000000000.0 GB",
        "--input huge.vrt"),
)  # fmt: skip
def test_faults_of_headers_that_claim_more_than_there_can_be(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)


def no_bands_alike(path: str) -> None:
    rewrite(path, lambda pixels: np.concatenate([pixels, pixels])[:4])


def rotated(path: str) -> None:
    _, profile = read(path)
    rewrite(path, transform=profile["transform"] * Affine.rotation(30))


def other_crs(path: str) -> None:
    """The same numbers in a CRS of another continent."""
    rewrite(path, crs="EPSG:32733")


@table(
    row("extract", "scene without CRS", partial(no_crs, "scene.tif"),
        r"scene.tif has no CRS; assign one"),
    row("extract", "label without CRS", partial(no_crs, "label.tif"),
        r"label.tif has no CRS; assign one"),
    row("batch", "scene without CRS", partial(no_crs, "scenes/Image_1.tif"),
        r"Image_1.tif has no CRS; assign one"),
    row("extract", "scene without georeferencing", partial(nowhere, "scene.tif"),
        r"scene.tif has no CRS; assign one"),
    row("extract", "label elsewhere", partial(elsewhere, "label.tif"),
        r"label.tif does not overlap scene.tif; .*CRS"),
    row("extract", "scene elsewhere", partial(elsewhere, "scene.tif"),
        r"No cell of grid.gpkg lies on scene.tif .*; check the CRS"),
    row("extract", "scene in the CRS of another continent", partial(other_crs, "scene.tif"),
        r"No cell of grid.gpkg lies on scene.tif .*; check the CRS"),
    row("extract", "label in the CRS of another continent", partial(other_crs, "label.tif"),
        r"label.tif does not overlap scene.tif; .*CRS"),
    row("extract", "wrong band count", nothing,
        r"--image_channels 4, but scene.tif gives 3 bands; select them", "--image_channels 4"),
    row("extract", "band that is not there", nothing,
        r"--bands 4: scene.tif has bands 1 to 3", "--bands 1,4"),
    row("extract", "band of no such name", nothing,
        r"--bands 'B08': 0 bands of scene.tif have that description", "--bands B08"),
    row("batch", "scenes of other bands",
        lambda: (shutil.copy("scenes/Label_1.tif", "scenes/Label_2.tif"),
                 shutil.copy("scenes/Label_1.tif", "scenes/Image_2.tif")),
        r"Image_2.tif gives 1 bands, but scenes/Image_1.tif 3; select them with --bands"),
    row("extract", "scene all nodata", partial(all_nodata, "scene.tif"),
        r"None of the 4 cells .*no valid pixel.*; look at the nodata of scene.tif", late=True),
    row("extract", "scene all NaN", partial(all_nan, "scene.tif"),
        r"None of the 4 cells .*no valid pixel.*; look at the nodata of scene.tif", late=True),
    row("extract", "unreadable block", partial(bad_block, "scene.tif"),
        r"Cannot read scene.tif: .*; copy or write it again", late=True),
    row("extract", "unreadable block of the label", partial(bad_block, "label.tif"),
        r"Cannot read label.tif: .*; copy or write it again", late=True),
    row("predict", "wrong band count", partial(no_bands_alike, "scene.tif"),
        r"scene.tif gives 4 bands, but model.pth takes 3; select them with --bands"),
    row("predict", "unreadable block", partial(bad_block, "scene.tif"),
        r"Cannot read scene.tif: .*; copy or write it again", late=True),
    row("train", "patches of other bands",
        partial(no_bands_alike, "data/Patch/train/images/patch_002.tif"),
        r"patch_002.tif has \(bands, height, width\) \(4, 32, 32\).*; all patches need"),
    row("train", "label elsewhere",
        partial(elsewhere, "data/Patch/train/labels/patch_002.tif"),
        r"patch_002.tif and its label lie on different ground; "),
    row("train", "patch all nodata",
        lambda: [all_nodata(f"data/Patch/train/images/patch_00{n}.tif") for n in range(4)],
        r"No patch of the train split has a labelled pixel.*valid"),
    row("train", "unreadable block",
        partial(bad_block, "data/Patch/train/images/patch_002.tif"),
        r"Cannot read .*patch_002.tif: .*; copy or write it again"),
)  # fmt: skip
def test_faults_of_rasters_that_do_not_fit(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)


# --- outputs --------------------------------------------------------------------------------


@simulated
def read_only(monkeypatch) -> None:
    """Let nothing be made, as on a read-only disk (root may write anywhere else)."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    allowed = os.access
    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(
        os, "access", lambda path, mode: not mode & os.W_OK and allowed(path, mode)
    )


def file_in_the_way(name: str) -> Callable:
    return lambda: Path(name).write_text("something else")


@table(
    *(
        row(script, "read-only folder", read_only, error)
        for script, error in (
            ("extract", r"--output out: \S+ cannot be written to; .*another"),
            ("batch", r"--output out: \S+ cannot be written to; .*another"),
            ("train", r"--save_dir models: \S+ cannot be written to; .*another"),
            ("predict", r"--output .: \S+ cannot be written to; .*another"),
        )
    ),
    *(
        row(script, "folder under a file", file_in_the_way("blocked"),
            rf"{option} blocked/new: .*blocked cannot be written to; .*another",
            f"{option} blocked/new{ending}")
        for script, option, ending in (
            ("extract", "--output", ""), ("batch", "--output", ""),
            ("train", "--save_dir", ""), ("predict", "--output", "/map.tif"),
        )
    ),
    row("extract", "Patch is a file", lambda: (Path("out").mkdir(),
        Path("out/Patch").write_text("x")), r"out/Patch is a file; choose another --output"),
    row("extract", "patches are there", lambda: shutil.copytree("data", "out"),
        r"out/Patch already holds patches; choose another --output, or give --overwrite"),
    row("predict", "output is the input", nothing,
        r"--output scene.tif: expected not an input", "--output scene.tif", 2),
    row("predict", "output is the input by another way", nothing,
        r"--output data/../scene.tif: expected not an input", "--output data/../scene.tif", 2),
    row("predict", "output is a link to the input", lambda: os.symlink("scene.tif", "map.tif"),
        r"--output map.tif: expected not an input", "", 2),
    row("predict", "confidence is the input", lambda: os.rename("scene.tif", "a_confidence.tif"),
        r"--output a_confidence.tif: expected not an input",
        "--input a_confidence.tif --output a.tif --save_confidence", 2),
    row("predict", "output is the model", lambda: os.rename("model.pth", "model.tif"),
        r"--output model.tif: expected not an input", "--model model.tif --output model.tif", 2),
    row("predict", "output of another suffix", nothing,
        r"--output map.png: expected a name that ends in .tif", "--output map.png", 2),
    row("predict", "one output for two scenes", nothing,
        r"--output map.tif: expected a folder for several scenes",
        "--input scene.tif label.tif", 2),
    row("predict", "two scenes of one name", lambda: (Path("more").mkdir(),
        shutil.copy("scene.tif", "more")), r"scene.tif and more/scene.tif would both be mapped",
        "--input scene.tif more/scene.tif --output maps"),
    row("predict", "folder without scenes", lambda: Path("none").mkdir(),
        r"No scenes in none \(looked for .tif", "--input none --output maps"),
    row("predict", "polygons under a file", file_in_the_way("blocked"),
        r"--polygons blocked: .*blocked cannot be written to",
        "--polygons blocked/a.gpkg"),
    row("predict", "polygons of another suffix", nothing,
        r"--polygons a.shp: expected a name that ends in .gpkg", "--polygons a.shp", 2),
    row("batch", "no such folder", nothing, r"No folder nowhere; .*--data_dir",
        "--data_dir nowhere"),
    row("train", "no such folder", nothing, r"No folder nowhere; give the --output",
        "--dataset_root nowhere"),
)  # fmt: skip
def test_faults_of_outputs(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)


# --- what looks like a fault and is legal ---------------------------------------------------


def cast(dtype: str, scale: float = 1, **profile) -> Callable:
    return lambda path: rewrite(
        path, lambda p: (p * scale).astype(dtype), dtype=dtype, **profile
    )


def bits(path: str) -> None:
    """One bit a pixel."""
    rewrite(path, lambda p: (p > np.median(p)).astype("uint8"), nbits=1)


def sparse(path: str) -> None:
    """Blocks of zeros that are not in the file."""
    rewrite(
        path, lambda p: p * (np.arange(p.shape[-1]) < 16), sparse_ok=True, tiled=True,
        blockxsize=16, blockysize=16,
    )  # fmt: skip


def paletted(path: str) -> None:
    rewrite(path, lambda p: (p[:1] // 64).astype("uint8"))
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {n: (n, 255 - n, 0, 255) for n in range(256)})


def holes(path: str) -> None:
    def change(pixels):
        pixels = pixels.astype("float32")
        pixels[0, :5, :7], pixels[1, 9, 9], pixels[2, 40:, 60] = np.nan, np.inf, -np.inf
        return pixels

    rewrite(path, change)


LEGAL = {
    "64-bit": cast("int64"),
    "unsigned 64-bit": cast("uint64"),
    "unsigned 32-bit": cast("uint32"),
    "8-bit with sign": cast("int8", 1 / 100),
    "double": cast("float64"),
    "1-bit": bits,
    "sparse": sparse,
    "paletted": paletted,
    "NaN and infinite pixels": holes,
    "some nodata": lambda path: rewrite(path, nodata=read(path)[0][0, 0, 0]),
    "rotated": rotated,
}


def valid_pixels(pixels: np.ndarray, nodata) -> np.ndarray:
    """By other means than the toolkit's: finite, and nodata in no band."""
    valid = np.isfinite(pixels.astype(float)).all(axis=0)
    return valid & (pixels != nodata).all(axis=0) if nodata is not None else valid


@pytest.mark.parametrize("kind", LEGAL)
def test_no_faults_of_legal_scenes_in_extraction(place, kind):
    LEGAL[kind]("scene.tif")
    pixels, profile = read("scene.tif")
    if kind == "rotated":  # then label and cells lie on the same pixels
        transform = profile["transform"]
        rewrite("label.tif", transform=transform)
        a, b, c, d, e, f = transform[:6]
        corners = [box(x, y, x + 32, y + 32) for y in (0, 32) for x in (0, 32)]
        cells = [affinity.affine_transform(s, (a, b, d, e, c, f)) for s in corners]
        grid(cells).to_file("grid.gpkg")
    assert run("extract", "--min_valid 0") == 0
    valid = valid_pixels(pixels, profile["nodata"])
    patches = list(Path().glob("out/Patch/*/images/*.tif"))
    assert patches
    for patch in patches:
        with rasterio.open(patch) as file:
            place = ~profile["transform"] * file.transform
            column, row = round(place.c), round(place.f)
            assert (column, row) == pytest.approx((place.c, place.f), abs=1e-6)
            assert place.a == pytest.approx(1) and place.b == pytest.approx(0, abs=1e-9)
            padded = np.pad(pixels, [(0, 0), (SIDE, SIDE), (SIDE, SIDE)])
            inside = np.pad(valid, SIDE)
            window = (slice(row + SIDE, row + SIDE + 32),) + (
                slice(column + SIDE, column + SIDE + 32),
            )
            mask = file.dataset_mask() > 0
            seen = valid_pixels(file.read(), file.nodata) & mask
            np.testing.assert_array_equal(seen, inside[window])
            np.testing.assert_array_equal(
                file.read()[:, seen], padded[(slice(None), *window)][:, seen]
            )
            assert file.dtypes[0] == pixels.dtype.name


@pytest.mark.parametrize("kind", LEGAL)
def test_no_faults_of_legal_scenes_in_prediction(place, kind):
    LEGAL[kind]("scene.tif")
    pixels, profile = read("scene.tif")
    write_model(Path("model.pth"), len(pixels))
    assert run("predict", "--patch_size 64 --overlap 0") == 0
    valid = valid_pixels(pixels, profile["nodata"])
    checkpoint = load_checkpoint("model.pth")
    image = torch.from_numpy(np.where(valid, pixels, 0).astype("float32") / 1e4)
    with torch.inference_mode():
        logits = checkpoint.model(image.clamp(0, 1)[None])
    classes, written = read("map.tif")
    assert written["transform"] == profile["transform"]
    expected = np.where(valid, (logits[0, 0] >= 0).numpy(), 255)
    differ = (classes[0] != expected) & (np.abs(logits[0, 0].numpy()) > 1e-3)
    assert not differ.any()
    assert set(np.unique(classes)) <= {0, 1, 255}


@pytest.mark.parametrize("kind", ["64-bit", "sparse", "holes"])
def test_no_faults_of_legal_patches_in_training(place, kind, capfd):
    for path in Path("data").rglob("images/*.tif"):
        {"holes": holes_of_patches}.get(kind, LEGAL.get(kind, sparse))(str(path))
    assert run("train") == 0
    assert "error" not in capfd.readouterr().err
    metadata = torch.load("models/model_final_model.pth", weights_only=True)["metadata"]
    statistics = metadata["normalization_statistics"]
    stacked = [read(str(p))[0] for p in Path("data/Patch/train/images").iterdir()]
    pixels = np.concatenate([p[:, np.isfinite(p).all(axis=0)].T for p in stacked])
    np.testing.assert_allclose(statistics["low"], np.percentile(pixels, 1, axis=0))


def holes_of_patches(path: str) -> None:
    def change(pixels):
        pixels = pixels.astype("float32")
        pixels[0, :5, :7], pixels[1, 9, 9] = np.nan, np.inf
        return pixels

    rewrite(path, change)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("it's $HOME; #1 Überschwemmung 洪水", id="any letters"),
        pytest.param("x" * 246, id="250 characters"),
    ],
)
def test_no_faults_of_names_of_files(place, name, capfd):
    """Spaces, letters of any script, and 250 characters with the suffix."""
    for path in ("scene.tif", "label.tif", "grid.gpkg", "model.pth", "data"):
        os.makedirs(name, exist_ok=True)
        os.rename(path, Path(name, path))
    os.rename(Path(name, "scene.tif"), Path(name, f"{name}.tif"))
    folder = shlex.quote(name)
    scene = shlex.quote(f"{name}/{name}.tif")
    assert run(
        "extract",
        f"--image {scene} --label {folder}/label.tif --grid {folder}/grid.gpkg "
        f"--output {folder}/out",
    ) == 0  # fmt: skip
    assert len(list(Path(name, "out").rglob("images/*.tif"))) == 4
    assert run("train", f"--dataset_root {folder}/out --save_dir {folder}/models") == 0
    model = f"--model {folder}/models/model_final_model.pth --input {scene}"
    assert run("predict", f"{model} --output {folder}/map.tif --quicklook") == 0
    plain, _ = read(f"{name}/map.tif")
    capfd.readouterr()
    target = f"{name}/{name[:-1]}_.tif"
    ended = run("predict", f"{model} --output {shlex.quote(target)}")
    err = capfd.readouterr().err
    if ended:  # a name that leaves no room for those of the files beside it
        assert_one_line(err, r"--output x+_.tif: expected a shorter name", 2)
    else:
        np.testing.assert_array_equal(read(target)[0], plain)
    assert [p for p in Path(name).iterdir() if p.name.startswith(".")] == []


def test_no_faults_of_a_scene_without_a_place(place, capfd):
    """A map needs no CRS; it says that it has none."""
    nowhere("scene.tif")
    assert run("predict") == 0
    assert "warning: scene.tif has no CRS" in capfd.readouterr().err
    with rasterio.open("map.tif") as file:
        assert file.crs is None


def test_no_faults_of_a_scene_of_nodata(place, capfd):
    """Its map is nodata, and a message says so."""
    all_nodata("scene.tif")
    assert run("predict") == 0
    assert "warning: scene.tif has no valid pixel" in capfd.readouterr().err
    assert (read("map.tif")[0] == 255).all()


def test_no_faults_of_a_label_on_another_pixel_grid(place):
    """It is warped, nearest neighbour."""
    expected, profile = read("label.tif")
    finer = profile["transform"] * Affine.scale(0.5)
    rewrite(
        "label.tif", lambda p: p.repeat(2, axis=1).repeat(2, axis=2), transform=finer
    )
    assert run("extract") == 0
    for path in Path("out").rglob("labels/*.tif"):
        with rasterio.open(path) as file:
            place = ~profile["transform"] * file.transform
            rows, columns = (slice(round(v), round(v) + 32) for v in (place.f, place.c))
            np.testing.assert_array_equal(file.read(1), expected[0, rows, columns])


def test_no_faults_of_bands_of_several_dtypes(place):
    """A VRT may mix them; the patch holds all."""
    band = '<VRTRasterBand dataType="{}" band="{}"><SimpleSource><SourceFilename relativeToVRT="1">scene.tif</SourceFilename><SourceBand>{}</SourceBand></SimpleSource></VRTRasterBand>'
    with rasterio.open("scene.tif") as file:
        head = f"<SRS>{CRS}</SRS><GeoTransform>{str(file.transform.to_gdal())[1:-1]}</GeoTransform>"
    bands = "".join(
        band.format(t, n, n) for n, t in enumerate(("UInt16", "Float32", "Int16"), 1)
    )
    size = f'rasterXSize="{SIDE}" rasterYSize="{SIDE}"'
    Path("scene.vrt").write_text(f"<VRTDataset {size}>{head}{bands}</VRTDataset>")
    assert run("extract", "--image scene.vrt") == 0
    assert run("extract", "--image scene.tif --output plain") == 0
    for path in Path("plain").rglob("images/*.tif"):
        same = str(path).replace("plain", "out", 1)
        np.testing.assert_array_equal(read(same)[0], read(str(path))[0])
    assert run("predict", "--input scene.vrt") == 0
    assert run("predict", "--output plain.tif") == 0
    np.testing.assert_array_equal(read("map.tif")[0], read("plain.tif")[0])


# --- labels ---------------------------------------------------------------------------------


def label_of(value, dtype="uint8") -> Callable:
    """A label of one value; where ``value`` is two, the second stands in a corner."""

    def damage(path="label.tif") -> None:
        def change(pixels):
            first, *rest = np.atleast_1d(value)
            changed = np.full(pixels.shape, first, dtype)
            if rest:
                changed[:, :4, :4] = rest[0]
            return changed

        rewrite(path, change)

    return damage


def of_all(damage: Callable, pattern: str) -> Callable:
    """The same damage to all files of a pattern."""
    return lambda: [damage(str(path)) for path in Path().glob(pattern)]


LABELS = "data/Patch/*/labels/*.tif"
FIRST_LABEL = "data/Patch/train/labels/patch_000.tif"


@table(
    row("extract", "several bands", lambda: rewrite("label.tif", lambda p: p.repeat(3, 0)),
        r"label.tif has 3 bands; a label has one"),
    row("batch", "several bands",
        lambda: rewrite("scenes/Label_1.tif", lambda p: p.repeat(3, 0)),
        r"Label_1.tif has 3 bands; a label has one"),
    row("extract", "fractions", label_of([0, 1.5], "float32"),
        r"label.tif holds 1.5, which is no class; labels are whole numbers", late=True),
    row("extract", "negative", label_of([0, -3], "int16"),
        r"label.tif holds -3: classes are 0 to 254.*; name .* with --label_values", late=True),
    row("extract", "too large", label_of([0, 1000], "int16"),
        r"label.tif holds 1000: classes are 0 to 254.*--label_values", late=True),
    row("extract", "all unlabelled", label_of(255),
        r"None of the 4 cells .*no labelled pixel.*; look at the nodata", late=True),
    row("extract", "no such value", nothing, r"None of .* gives a patch .*no labelled pixel",
        "--label_values 7,8", late=True),
    row("extract", "more classes than names", label_of([0, 2]),
        r"--class_names names 2 classes, but label.tif holds class 2", "--class_names a,b",
        late=True),
    row("extract", "values of a label that are no numbers", nothing,
        r"--label_values a,b: expected whole numbers", "--label_values a,b", 2),
    row("extract", "a value twice", nothing,
        r"--label_values 1,1: expected at least two different", "--label_values 1,1", 2),
    row("extract", "column of a raster", nothing,
        r"--label_column class: expected a vector label .*label.tif is a raster",
        "--label_column class", 2),
    row("extract", "no such column of a vector label", lambda: grid().to_file("label.gpkg"),
        r"Unknown --label_column 'idd'; did you mean 'id'",
        "--label label.gpkg --label_column idd", 2),
    row("extract", "values without a column", nothing,
        r"--label_values 1,2: expected --label_column with it",
        "--label grid.gpkg --label_values 1,2", 2),
    row("extract", "vector label elsewhere",
        lambda: grid([cell(1000, 1000)]).to_file("label.gpkg"),
        r"label.gpkg does not overlap scene.tif; check the CRS", "--label label.gpkg"),
    row("train", "several bands", lambda: rewrite(FIRST_LABEL, lambda p: p.repeat(3, 0)),
        r"patch_000.tif has 3 bands; a label has one"),
    row("train", "fractions", lambda: label_of([0, 1.5], "float32")(FIRST_LABEL),
        r"patch_000.tif holds 1.5, which is no class; labels are whole numbers"),
    row("train", "negative", lambda: label_of([0, -3], "int16")(FIRST_LABEL),
        r"patch_000.tif holds -3: labels are 0..1, or 255"),
    row("train", "outside the classes", lambda: label_of([0, 2])(FIRST_LABEL),
        r"patch_000.tif holds 2: labels are 0..1, or 255.*see --classes"),
    row("train", "outside many classes", lambda: label_of([0, 6])(FIRST_LABEL),
        r"patch_000.tif holds 6: labels are 0..5, or 255.*see --classes",
        "--mode multiclass --classes 6"),
    row("train", "one class", of_all(label_of(1), LABELS),
        r"All labelled training pixels are class 1: .*--label_values"),
    row("train", "all unlabelled", of_all(label_of(255), LABELS),
        r"No patch of the train split has a labelled pixel.*; look at"),
    row("train", "validation unlabelled",
        of_all(label_of(255), LABELS.replace("*", "validation", 1)),
        r"No patch of the validation split has a labelled pixel.*; look at"),
    row("train", "one class in all folds", of_all(label_of(1), LABELS),
        r"All labelled training pixels are class 1: ", "--val_strategy kfold --n_splits 2"),
)  # fmt: skip
def test_faults_of_labels(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)


def test_faults_of_a_label_of_one_class_are_told(place, capfd):
    label_of(1)()
    assert run("extract") == 0
    assert "all labelled pixels are class 1" in capfd.readouterr().err


# --- grids ----------------------------------------------------------------------------------


def drawn(cells, path="grid.gpkg", crs=CRS, **columns) -> Callable:
    def damage() -> None:
        Path(path).unlink(missing_ok=True)
        grid(cells, crs, **columns).to_file(path)

    return damage


def no_cells() -> None:
    grid().iloc[:0].to_file("grid.gpkg")


def no_geometry() -> None:
    Path("grid.csv").write_text("id,name\n1,a\n")


def without(suffix: str) -> Callable:
    return lambda: Path(f"grid.{suffix}").unlink()


@table(
    row("extract", "missing", lambda: os.unlink("grid.gpkg"),
        r"grid.gpkg cannot be read as a vector file: .*No such file"),
    row("extract", "empty file", lambda: empty("grid.gpkg"),
        r"grid.gpkg cannot be read as a vector file: .*; give"),
    row("extract", "text", lambda: text("grid.gpkg"),
        r"grid.gpkg cannot be read as a vector file: .*; give"),
    row("extract", "cut off", lambda: cut_off("grid.gpkg"),
        r"grid.gpkg cannot be read as a vector file: .*; give"),
    row("extract", "a raster", nothing,
        r"scene.tif cannot be read as a vector file: .*; give", "--grid scene.tif"),
    row("extract", "no cells", no_cells, r"grid.gpkg has no geometries; draw"),
    row("extract", "no geometry", no_geometry, r"grid.csv has no geometries; draw",
        "--grid grid.csv"),
    row("extract", "lines", drawn([LineString([(ORIGIN[0], ORIGIN[1]), (5e5, 4.6e6)])]),
        r"No cell of grid.gpkg lies on .*no polygon"),
    row("extract", "outside the scene", drawn([cell(500, 500)]),
        r"No cell of grid.gpkg lies on scene.tif .*outside the image.*; check the CRS"),
    row("extract", "in degrees without saying so", drawn([box(3, 41, 4, 42)]),
        r"No cell of grid.gpkg lies on scene.tif .*; check the CRS"),
    row("extract", "no CRS", drawn(None, "nocrs.gpkg", crs=None),
        r"nocrs.gpkg has no CRS; add it", "--grid nocrs.gpkg"),
    row("extract", "absurdly large cell", drawn([cell(0, 0, 5000)]),
        r"patch_001 of grid.gpkg covers 5000 x 5000 pixels.*; use a finer grid"),
    row("extract", "cells smaller than a pixel", drawn([cell(3.6, 3.6, 0.3)]),
        r"No cell of grid.gpkg lies on .*smaller than a pixel"),
    row("extract", "no .shx", without("shx"),
        r"grid.shp cannot be read as a vector file: .*grid\.shx.*; give .*beside it",
        "--grid grid.shp"),
    row("extract", "no .prj", without("prj"), r"grid.shp has no CRS; add it .*\.prj",
        "--grid grid.shp"),
    row("extract", "no column of ids", nothing,
        r"Unknown --id_column 'idd'; did you mean 'id'", "--id_column idd", 2),
    row("extract", "duplicate ids", drawn(None, id=[1, 2, 2, 3]),
        r"--id_column id: 1 ids are not unique, .* as 'patch_002'; name another",
        "--id_column id"),
    row("extract", "empty id", drawn(None, id=["a", "b", "", None]),
        r"--id_column id: 2 ids are not unique, empty.*; name another", "--id_column id"),
    row("extract", "ids too long", drawn(None, id=["n" * 300 + c for c in "abcd"]),
        r"--id_column id: 4 ids .* too long.*; name another", "--id_column id"),
    row("batch", "no grid of a scene", nothing,
        r"without the files that belong to them: .*Image_1.tif.*; add them",
        "--use_per_image_grid"),
    row("batch", "grid missing", nothing, r"none.gpkg cannot be read as a vector file",
        "--grid none.gpkg"),
)  # fmt: skip
def test_faults_of_grids(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)


def patches(folder="out") -> list[Path]:
    return sorted(Path(folder).rglob("images/*.tif"))


def test_faults_of_ids_never_lead_out_of_the_output(place):
    before = snapshot(place)
    drawn(None, id=["../../../evil", "/tmp/evil", "a/b\\c", "..\x00.."[:2]])()
    assert run("extract") == 0
    (place / "grid.gpkg").write_bytes(before["grid.gpkg"])
    after = snapshot(place)
    assert all(name.startswith("out") for name in after.keys() - before.keys())
    assert all(after[name] == before[name] for name in before)
    assert len(patches()) == 4
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in patches())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without("dbf"), id="no .dbf"),
        pytest.param(
            drawn(None, "grid.shp", id=[7, 7, None, 1]), id="duplicate ids by default"
        ),
    ],
)
def test_no_faults_of_ids_that_can_be_done_without(place, damage):
    damage()
    assert run("extract", "--grid grid.shp") == 0
    assert [p.stem for p in sorted(patches(), key=lambda p: p.name)] == [
        f"patch_{number:03}" for number in (1, 2, 3, 4)
    ]


def test_no_faults_of_a_bow_tie_cell_whose_label_is_that_of_its_polygons(place):
    left, bottom, right, top = cell(0, 0).bounds
    bow_tie = Polygon([(left, top), (right, bottom), (right, top), (left, bottom)])
    drawn([bow_tie, cell(32, 32)])()
    assert run("extract") == 0
    (path,) = Path("out").rglob("labels/patch_001.tif")
    label = read(str(path))[0][0]
    assert 0.45 < (label == 255).mean() < 0.55


def test_no_faults_of_rotated_cells(place):
    turned = affinity.rotate(cell(16, 16), 45)
    drawn([turned, cell(0, 0)])()
    assert run("extract", "--patch_size 45 --min_valid 0") == 0
    (path,) = Path("out").rglob("labels/patch_001.tif")
    label = read(str(path))[0][0]
    assert 0.45 < (label == 255).mean() < 0.55


def test_no_faults_of_a_hundred_thousand_cells(place):
    """Cells outside are passed over quickly, and so are the names of all."""
    x, y = np.meshgrid(np.arange(400) * 32, np.arange(250) * 32)
    import shapely

    left, top = ORIGIN[0] + x.ravel() * PIXEL, ORIGIN[1] - y.ravel() * PIXEL
    cells = shapely.box(left, top - 320, left + 320, top)
    geopandas.GeoDataFrame(geometry=cells, crs=CRS).to_file("many.fgb")
    started = time.process_time()
    assert run("extract", "--grid many.fgb") == 0
    assert time.process_time() - started < 40
    assert len(patches()) == 4


# --- datasets -------------------------------------------------------------------------------


def split(name: str) -> Path:
    return Path("data/Patch", name)


def drop(*names: str) -> Callable:
    return lambda: [shutil.rmtree(split(name)) for name in names]


def both_kinds(change: Callable, name="train", number="002") -> Callable:
    """Change the image and the label of a patch."""
    return lambda: [
        rewrite(str(split(name) / kind / f"patch_{number}.tif"), change)
        for kind in ("images", "labels")
    ]


def fewer_patches(train: int, validation: int = 1, test: int = 0) -> Callable:
    def damage() -> None:
        shutil.rmtree("data")
        write_dataset(Path("data"), train, validation, test, bands=3)

    return damage


def patch_path(name: str, kind: str = "images", number: int = 0) -> str:
    return str(split(name) / kind / f"patch_{number:03}.tif")


@table(
    row("train", "no training", drop("train"),
        r"No images found in data/Patch/train/images \(looked for .tif"),
    row("train", "no validation", drop("validation"),
        r"No images found in data/Patch/validation/images"),
    row("train", "empty folder", lambda: (shutil.rmtree("data"), Path("data").mkdir()),
        r"No images found in data/train/images"),
    row("train", "labels alone", lambda: shutil.rmtree(split("test") / "images"),
        r"No images found in data/Patch/test/images"),
    row("train", "unmatched", lambda: os.unlink(patch_path("validation", "labels", 4)),
        r"validation/images/patch_004.tif has no label of the same name.*; add it or remove"),
    row("train", "unmatched label", lambda: os.unlink(patch_path("validation", number=5)),
        r"validation/labels/patch_005.tif has no image of the same name.*; add it or remove"),
    row("train", "duplicate stems", lambda: shutil.copy(patch_path("train"),
        patch_path("train").replace(".tif", ".tiff")),
        r"patch_000.tiff and patch_000.tif have the same stem; remove one"),
    row("train", "sizes of the label", lambda: rewrite(patch_path("train", "labels", 2),
        lambda p: p[:, :16, :16]), r"patch_002.tif is 32 x 32 pixels but its label is 16 x 16"),
    row("train", "mixed sizes", both_kinds(lambda p: p[:, :16, :16]),
        r"patch_002.tif has .*\(3, 16, 16\).*(3, 32, 32).*; all patches need one size"),
    row("train", "mixed sizes of splits",
        both_kinds(lambda p: p[:, :16, :16], "validation", "005"),
        r"patch_005.tif has .*\(3, 16, 16\).*; all patches need one size"),
    row("train", "one unreadable test patch", lambda: text(patch_path("test", number=6)),
        r"test/images/patch_006.tif is not a readable TIFF; write it again"),
    row("train", "bands that are expected", nothing,
        r"--in_channels 4, but the patches in data have 3 bands", "--in_channels 4"),
    row("train", "one patch in all", fewer_patches(1, 0),
        r"No images found in data/Patch/validation/images"),
    row("train", "one patch in all, in folds", fewer_patches(1, 0),
        r"1 patches cannot make 5 folds; lower --n_splits", "--val_strategy kfold"),
    row("train", "fewer patches than folds", nothing,
        r"6 patches cannot make 7 folds; lower --n_splits",
        "--val_strategy kfold --n_splits 7"),
    row("train", "a batch of one with batch normalization", nothing,
        r"cannot train on a single patch; use --batch_size 2 or more", "--batch_size 1",
        late=True),
    row("train", "one training patch with batch normalization", fewer_patches(1, 1),
        r"cannot train on a single patch; .*at least 2 training patches", late=True),
    row("train", "no test split to estimate areas by", drop("test"),
        r"--area_estimation: data has no test split.*; leave it out", "--area_estimation"),
    row("train", "folds by place without places",
        of_all(no_crs, "data/Patch/*/*/*.tif"),
        r"patch_000.tif has no CRS, and --fold_by .*; give --fold_by random",
        "--val_strategy kfold --fold_by block"),
)  # fmt: skip
def test_faults_of_datasets(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda: text(patch_path("test", number=6)), "patch_006.tif is not a readable"),
        (lambda: os.unlink(patch_path("test", "labels", 6)), "has no label"),
        (drop("validation"), "No images found in data/Patch/validation"),
    ],
    ids=["unreadable", "unmatched", "missing split"],
)
def test_faults_of_later_splits_are_seen_before_any_patch_is_read(
    place, capfd, monkeypatch, damage, error
):
    damage()
    patch_everywhere(monkeypatch, "common.patches.read_patch", unexpected_work)
    assert_fault(capfd, monkeypatch, "train", "", error)


def test_faults_of_mixed_dtypes_are_none(place):
    """Each patch is scaled by its values, whatever the dtype that holds them."""
    for path in patches("data")[::2]:
        cast("float32")(str(path))
    assert run("train") == 0


# --- checkpoints ----------------------------------------------------------------------------


class Malicious:
    """Leaves a folder ``executed`` when it is unpickled carelessly."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def change_checkpoint(change: Callable) -> Callable:
    """Write the checkpoint again after ``change`` of its content."""

    def damage() -> None:
        content = torch.load("model.pth", weights_only=True)
        torch.save(change(content) or content, "model.pth")

    return damage


def described(**metadata) -> Callable:
    """Let the checkpoint say other things of itself; None takes a key out."""

    def change(content: dict) -> None:
        content["metadata"].update(metadata)
        for key in [key for key, value in metadata.items() if value is None]:
            del content["metadata"][key]

    return change_checkpoint(change)


def malicious(where: str, zipped: bool = True) -> Callable:
    def damage() -> None:
        content = torch.load("model.pth", weights_only=True)
        if where == "alone":
            content = Malicious()
        else:
            content[where]["extra"] = Malicious()
        torch.save(content, "model.pth", _use_new_zipfile_serialization=zipped)

    return damage


def not_numbers(content: dict) -> None:
    next(iter(content["model_state_dict"].values())).view(-1)[0] = math.nan


def of_another_library(content: dict) -> dict:
    """As TorchVision or timm write them: weights alone."""
    return {f"layer{n}.weight": torch.zeros(2, 2) for n in range(3)}


@table(
    row("predict", "missing", lambda: os.unlink("model.pth"), r"No checkpoint model.pth"),
    row("predict", "a folder without any", lambda: Path("models").mkdir(),
        r"No checkpoints \(.pth\) in models", "--model models"),
    row("predict", "empty file", lambda: empty("model.pth"),
        r"model.pth cannot be opened safely as a checkpoint: .*; .*main.py"),
    row("predict", "cut off", lambda: cut_off("model.pth"),
        r"model.pth cannot be opened safely as a checkpoint: .*; .*main.py"),
    row("predict", "text", lambda: text("model.pth"),
        r"model.pth cannot be opened safely as a checkpoint: .*; .*main.py"),
    row("predict", "a raster", nothing,
        r"scene.tif cannot be opened safely as a checkpoint: .*; .*main.py",
        "--model scene.tif --input label.tif"),
    row("predict", "of another library", change_checkpoint(of_another_library),
        r"model.pth holds weights without a description; give --model_name, --encoder_name"),
    row("predict", "no tensors", change_checkpoint(lambda content: {"epoch": 3}),
        r"model.pth has no model_state_dict with metadata; expected a file written by main"),
    *(
        row("predict", f"malicious {where} {'zip' * zipped or 'pickle'}",
            malicious(where, zipped),
            r"model.pth cannot be opened safely as a checkpoint: .*; .*main.py")
        for where in ("alone", "metadata", "model_state_dict") for zipped in (True, False)
    ),
    row("predict", "weights that are no numbers", change_checkpoint(not_numbers),
        r"model.pth holds weights that are not numbers; train it again"),
    row("predict", "classes contradict the weights",
        described(num_classes=6, mode="multiclass"),
        r"The weights in model.pth are not those of pspnet with .*; the file's description"),
    row("predict", "bands contradict the weights", described(in_channels=5,
        normalization_statistics=None),
        r"The weights in model.pth are not those of pspnet with .*; the file's description"),
    row("predict", "bands contradict the statistics", described(in_channels=5),
        r"model.pth has statistics of 3 bands for a model of 5; .*again"),
    row("predict", "bands contradict the option", nothing,
        r"--in_channels 4, but model.pth takes 3 bands; leave it out", "--in_channels 4"),
    row("predict", "classes contradict the option", nothing,
        r"--num_classes 5, but model.pth has 2 classes; leave it out", "--num_classes 5"),
    row("predict", "model contradicts the option", nothing,
        r"--model_name unet, but model.pth is a pspnet; leave it out", "--model_name unet"),
    row("predict", "unknown architecture", described(model_name="psqnet"),
        r"model.pth: Unknown model 'psqnet'; did you mean 'pspnet'"),
    row("predict", "unknown encoder", described(encoder_name="resnet34x"),
        r"model.pth: Unknown encoder 'resnet34x'; did you mean 'resnet34'"),
    row("predict", "another encoder", described(encoder_name="resnet18"),
        r"The weights in model.pth are not those of pspnet with resnet18: "),
    row("predict", "of a newer version", described(version="7.0.0"),
        r"model.pth is of version 7.0.0, this is \S+; update"),
    row("predict", "bad temperature", described(temperature=-1.0),
        r"model.pth has the temperature -1.0; expected a number more than 0"),
    row("predict", "bad statistics", described(normalization_statistics={
        "rule": "dataset", "low": [0.0, math.nan, 0.0], "high": [1.0] * 3}),
        r"model.pth has statistics that are not numbers; .*again"),
    row("predict", "unknown normalization",
        described(normalization_statistics={"rule": "zscore"}),
        r"model.pth normalizes by 'zscore': not known; .*update"),
    row("predict", "too many names", described(class_names=["a", "b", "c"]),
        r"model.pth names 3 classes for a model of 2; .*again"),
    row("predict", "of negative classes", described(num_classes=-3, mode="multiclass"),
        r"model.pth describes itself wrongly: 3 bands and -3 classes"),
    row("predict", "models of other bands", lambda: write_model(Path("other.pth"), 4),
        r"other.pth has bands 4, but model.pth has 3; they cannot be averaged",
        "--model model.pth other.pth"),
    row("predict", "threshold for many classes", lambda: (write_multiclass(Path("many.pth"))),
        r"--threshold 0.3: many.pth has 3 classes, and a threshold is for binary",
        "--model many.pth --threshold 0.3", 2),
    row("train", "encoder weights missing", nothing, r"No weights file none.pth",
        "--encoder_weights none.pth"),
    row("train", "encoder weights that are text", lambda: text("encoder.pth"),
        r"encoder.pth is no file of weights: ", "--encoder_weights encoder.pth"),
    row("train", "encoder weights of another encoder",
        lambda: torch.save({"conv.weight": torch.zeros(3, 3, 3, 3)}, "encoder.pth"),
        rf"encoder.pth does not hold the weights of {ENCODER}",
        "--encoder_weights encoder.pth"),
    row("train", "malicious encoder weights",
        lambda: torch.save(Malicious(), "encoder.pth"),
        r"encoder.pth is no file of weights: ", "--encoder_weights encoder.pth"),
)  # fmt: skip
def test_faults_of_checkpoints(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)
    assert not Path("executed").exists()


def write_multiclass(path: Path) -> None:
    config = ModelConfig("pspnet", 3, 3, ENCODER)
    numbers = Normalization("dataset", (0.0,) * 3, (1e4,) * 3)
    model = build_model(config)
    save_checkpoint(path, model, config, numbers, {})


def test_faults_of_the_malicious_checkpoint_are_real(place):
    """A careless reader would have run its code."""
    malicious("metadata")()
    torch.load("model.pth", weights_only=False)
    assert Path("executed").is_dir()


@pytest.mark.parametrize("kind", ["pretrained", "encoder file", "bands"])
@pytest.mark.parametrize("strategy", ["split", "kfold"])
def test_faults_of_a_second_training_leave_the_first(
    place, capfd, monkeypatch, kind, strategy
):
    """What cannot be built is an error before the model of a former run is removed."""
    Path("models").mkdir()
    for name in RUN_FILES:
        Path("models", name).write_bytes(b"weeks of work")
    options, status = {
        "pretrained": ("--encoder_name resnet18 --pretrained", 1),
        "encoder file": ("--encoder_weights none.pth", 1),
        "bands": ("--encoder_weights e.pth --rgb_bands 1,2,9", 2),
    }[kind]
    error = (
        r"--encoder_weights|No weights file none.pth|--rgb_bands 1,2,9: expected three"
    )
    options += f" --val_strategy {strategy} --n_splits 2"
    assert_fault(capfd, monkeypatch, "train", options, error, status)


# --- options --------------------------------------------------------------------------------

CONFIGS = {
    "extract": ExtractionConfig,
    "batch": BatchConfig,
    "visualize": SampleConfig,
    "info": InfoConfig,
    "train": TrainingConfig,
    "predict": PredictionConfig,
}
COMMANDS |= {
    "visualize": ("Patch_extraction", "visualize --output data"),
    "info": ("Patch_extraction", "info --output data"),
}
HUGE = "1000000000"
EXTREMES = {
    int: ("0", "-1", "nan", "1.5", HUGE, "9" * 30),
    float: ("0", "-1", "nan", "inf", "-inf", "1e300", "1e-320", "much"),
}
# the extremes that mean something; all others must be refused
LEGAL_VALUES = {
    "accumulate": {HUGE},  # a step per epoch
    "batch_size": {HUGE},
    "block_size": {"1e300"},
    "buffer": {"0", "1e300", "1e-320"},
    "clip_grad": {"0", "1e300", "1e-320"},
    "dropout_rate": {"0", "1e-320"},
    "epochs": {HUGE},
    "freeze_encoder_epochs": {"0"},
    "ignore_index": {"-1", HUGE},
    "image_channels": {HUGE},  # the scene does not have as many
    "learning_rate": {"1e300", "1e-320"},  # the loss tells
    "max_memory": {"1e300"},
    "min_area": {"0", "1e300", "1e-320"},
    "min_valid": {"0", "1e-320"},
    "n_splits": {HUGE},  # the patches do not make as many
    "num_workers": {"0"},
    "overlap": {"0"},
    "patience": {"0", HUGE},
    "sample_index": {"0"},
    "seed": {"0", HUGE},
    "stride": {HUGE},
    "threshold": {"0", "1e-320"},
    "warmup_epochs": {"0"},
    "weight_decay": {"0", "1e300", "1e-320"},
    ("predict", "patch_size"): {HUGE},  # a window is at most the scene
}
# options that mean something beside others only
BESIDE = {
    ("train", "block_size"): "--val_strategy kfold --fold_by block",
    ("train", "buffer"): "--val_strategy kfold --fold_by block",
    ("train", "classes"): "--mode multiclass",
    ("train", "dropout_rate"): "--model unet-dropout --encoder_name resnet34",
    ("extract", "block_size"): "--split_by block",
    ("batch", "block_size"): "--split_by block",
    ("predict", "min_area"): "--polygons a.gpkg",
}


AUTOMATIC = (("predict", "batch_size"), ("train", "num_workers"))


def number_options():
    """Every option of every script that takes a number, with every extreme."""
    for script, config in CONFIGS.items():
        hints = get_type_hints(config)
        for field in fields(config):
            kinds = {hints[field.name], *get_args(hints[field.name])}
            kind = next((k for k in (float, int) if k in kinds), None)
            if (script, field.name) in AUTOMATIC:
                kind = int  # a number or "auto"
            for value in EXTREMES.get(kind, ()):
                name = "huge" if len(value) > 9 else value
                name = "larger" if len(value) == 30 else name
                yield pytest.param(
                    script, field.name, value, id=f"{script}: {field.name} {name}"
                )


@pytest.mark.parametrize(("script", "option", "value"), number_options())
def test_faults_of_numbers(place_of_options, capfd, monkeypatch, script, option, value):
    """An extreme number is a wrong command line, unless the table says what it means."""
    beside = BESIDE.get((script, option), "")
    if option == "stride":  # instead of a grid
        monkeypatch.setitem(
            COMMANDS,
            script,
            (COMMANDS[script][0], COMMANDS[script][1].replace("--grid grid.gpkg", "")),
        )
    ended = run_no_work(monkeypatch, script, f"{beside} --{option}={value}")
    err = capfd.readouterr().err
    legal = LEGAL_VALUES.get((script, option), LEGAL_VALUES.get(option, ()))
    if value in legal:
        assert ended == 0, err
        return
    assert_one_line(err, rf"--{option}\b", 2)
    assert ended == 2


@pytest.fixture(scope="module")
def place_of_options(whole, tmp_path_factory):
    """One folder for all rows, since none of them writes."""
    folder = tmp_path_factory.mktemp("options") / "place"
    shutil.copytree(whole, folder)
    former = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(former)


def run_no_work(monkeypatch, script: str, options: str) -> int:
    """A script up to the point where it would begin with files."""
    if script in Patch_extraction.COMMANDS and script != "visualize":
        config_class, _, text = Patch_extraction.COMMANDS[script]
        nothing_done = config_class, lambda config: 0, text
        monkeypatch.setitem(Patch_extraction.COMMANDS, script, nothing_done)
    elif script == "train":
        begin = "training.experiment.run_experiment"
        patch_everywhere(monkeypatch, begin, lambda config: {})
    elif script == "predict":
        begin = "prediction.scene.predict_scenes"
        patch_everywhere(monkeypatch, begin, lambda config, tell: 0)
    else:
        patch_everywhere(monkeypatch, "common.pictures.save_figure", lambda *_: None)
    return run(script, options)


@table(
    row("extract", "ratios that do not sum to one", nothing,
        r"--test_ratio sum to 1.1: expected a sum of 1", "--train_ratio 0.85", 2),
    row("extract", "ratio above one", nothing, r"--train_ratio 1.2: expected 0 to 1",
        "--train_ratio 1.2 --val_ratio 0 --test_ratio -0.2", 2),
    row("extract", "nothing to train on", nothing, r"--train_ratio 0.0: expected more than 0",
        "--train_ratio 0 --val_ratio 0.5 --test_ratio 0.5", 2),
    row("extract", "stride beside a grid", nothing, r"--stride with --grid .*one of the two",
        "--stride 8", 2),
    row("extract", "overwrite and resume", nothing, r"--overwrite and --resume",
        "--overwrite --resume", 2),
    row("extract", "blocks at random", nothing, r"--block_size 100.0: .*--split_by block",
        "--block_size 100", 2),
    row("extract", "names and values of other numbers", nothing,
        r"--class_names a,b,c: expected 2 names", "--label_values 1,2 --class_names a,b,c", 2),
    row("extract", "unknown interpolation", nothing,
        r"--interpolation: invalid choice: 'cubik' .*cubic", "--interpolation cubik", 2),
    row("extract", "unknown option", nothing, r"--patchsize", "--patchsize 8", 2),
    row("extract", "no value", nothing, r"--seed\S*: expected one argument", "--seed", 2),
    row("batch", "pattern without an id", nothing,
        r"--image_pattern \*.tif: expected one <id> in it", "--image_pattern '*.tif'", 2),
    row("batch", "two kinds of grids", nothing, r"--use_per_image_grid with --grid",
        "--use_per_image_grid --grid grid.gpkg", 2),
    row("batch", "patterns that nothing fits", nothing, r"No file in scenes is called S_<id>",
        "--image_pattern 'S_<id>.tif'"),
    row("predict", "overlap as large as the window", nothing,
        r"--overlap 32: expected 0 to 31, less than --patch_size 32", "--overlap 32", 2),
    row("predict", "overlap larger than the window", nothing,
        r"--overlap 128: expected 0 to 31, less than --patch_size 32", "--overlap 128", 2),
    row("predict", "smallest area without polygons", nothing,
        r"--min_area 5.0: expected --polygons beside it", "--min_area 5", 2),
    row("predict", "unknown blend", nothing, r"--blend: invalid choice: 'han' .*hann",
        "--blend han", 2),
    row("predict", "unknown device", nothing, r"--device gpu: expected cpu, cuda or cuda:N",
        "--device gpu", 2),
    row("predict", "half precision on the CPU", nothing,
        r"--precision fp16: for GPUs; take auto, bf16 or fp32", "--precision fp16", 2),
    row("predict", "unknown model name", nothing, r"Unknown model 'uunet'; did you mean 'unet'",
        "--model_name uunet", 2),
    row("predict", "a batch that is no number", nothing,
        r"--batch_size many: expected at least 1, or auto", "--batch_size many", 2),
    row("predict", "bands between commas", nothing,
        r"--bands '1,,2': expected names or numbers", "--bands 1,,2"),
    row("train", "unknown model", nothing, r"Unknown model 'pspnett'; did you mean 'pspnet'",
        "--model pspnett", 2),
    row("train", "unknown encoder", nothing,
        r"Unknown encoder 'resnet3'; did you mean 'resnet34'", "--encoder_name resnet3", 2),
    row("train", "unknown encoder of timm", nothing,
        r"Unknown encoder 'tu-resnet18x'; did you mean 'tu-resnet18",
        "--encoder_name tu-resnet18x", 2),
    row("train", "unknown weights", nothing, r"imagenat.*Available options are: .*imagenet",
        "--encoder_name resnet18 --encoder_weights imagenat", 2),
    row("train", "unknown loss", nothing, r"Unknown loss 'dise'; did you mean 'dice'",
        "--loss dise+ce", 2),
    row("train", "weight of a loss", nothing, r"--loss -1\*ce: expected weights more than 0",
        "--loss=-1*ce", 2),
    row("train", "unknown mode", nothing, r"--mode: invalid choice: 'multi' .*multiclass",
        "--mode multi", 2),
    row("train", "classes of a binary model", nothing, r"--classes 6: .*--mode multiclass",
        "--classes 6", 2),
    row("train", "ignored class", nothing, r"--ignore_index 1: expected a value outside",
        "--ignore_index 1", 2),
    row("train", "names of other numbers", nothing, r"--class_names a,b,c: expected 2 names",
        "--class_names a,b,c", 2),
    row("train", "class weights without a loss for them", nothing,
        r"--use_class_weights with --loss dice: expected", "--use_class_weights --loss dice", 2),
    row("train", "folds without folds", nothing, r"--fold_by block: .*--val_strategy kfold",
        "--fold_by block", 2),
    row("train", "buffer of random folds", nothing, r"--buffer 9.0: .*--fold_by block",
        "--buffer 9 --val_strategy kfold", 2),
    row("train", "warm-up as long as the training", nothing,
        r"--warmup_epochs 1: expected fewer than --epochs 1", "--warmup_epochs 1", 2),
    row("train", "pretrained without weights", nothing, r"--pretrained with --model",
        "--model unet-dropout --encoder_name resnet34 --pretrained", 2),
    row("train", "bands of colours without weights", nothing,
        r"--rgb_bands 1,2,3: expected --pretrained", "--rgb_bands 1,2,3", 2),
    row("train", "an encoder for a model of its own", nothing,
        r"--encoder_name vgg11: .*no exchangeable encoder",
        "--model unet-dropout --encoder_name vgg11", 2),
)  # fmt: skip
def test_faults_of_options(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)


# --- surroundings ---------------------------------------------------------------------------


@simulated
def without_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@simulated
def training_without_memory(monkeypatch) -> None:
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    patch_everywhere(monkeypatch, "training.loop.train_one_epoch", exhausted)


@simulated
def cpu_without_memory(monkeypatch) -> None:
    def exhausted(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
        )

    patch_everywhere(monkeypatch, "training.loop.train_one_epoch", exhausted)


@simulated
def patches_without_memory(monkeypatch) -> None:
    def exhausted(*_, **__):
        raise MemoryError(
            "Unable to allocate 7.45 GiB for an array with shape (10, 10000)"
        )

    monkeypatch.setattr(Source, "read", exhausted)


@simulated
def predictor_without_memory(monkeypatch) -> None:
    def exhausted(self, images, valid):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Predictor, "_predict", exhausted)


@simulated
def full_disk(monkeypatch) -> None:
    """Every write of a file of our own ends as on a full disk."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(rasterio.io.DatasetWriter, "write", full)


@table(
    row("train", "no GPU", without_gpu,
        r"--device cuda: this machine has 0 GPUs; use --device cpu", "--device cuda"),
    row("train", "no such GPU", without_gpu,
        r"--device cuda:7: this machine has 0 GPUs; use --device cpu", "--device cuda:7"),
    row("predict", "no GPU", without_gpu,
        r"--device cuda: this machine has 0 GPUs; use --device cpu", "--device cuda"),
    row("train", "memory of the GPU", training_without_memory,
        r"The memory of cpu does not hold 2 patches; lower --batch_size", late=True),
    row("train", "memory of the machine", cpu_without_memory,
        r"The memory of cpu does not hold 2 patches; lower --batch_size", late=True),
    row("extract", "memory of the machine", patches_without_memory,
        r"The memory .*Unable to allocate 7.45 GiB.*; lower --patch_size or --workers",
        late=True),
    row("predict", "memory of the machine", patches_without_memory,
        r"The memory .*Unable to allocate 7.45 GiB.*; lower --patch_size or --max_memory",
        late=True),
    row("train", "memory to read patches", patches_without_memory,
        r"The memory .*Unable to allocate 7.45 GiB.*; lower --batch_size", late=True),
    row("predict", "memory for a single window", predictor_without_memory,
        r"The memory of cpu does not hold a window of 32 x 32 pixels; lower --patch_size",
        "--batch_size 4", late=True),
    row("train", "no network", nothing,
        r"The imagenet weights of resnet18 could not be downloaded \(no network\?\); give",
        "--encoder_name resnet18 --pretrained"),
    row("extract", "disk full", full_disk,
        r"No space left on device; free some, or write elsewhere", late=True),
    row("batch", "disk full", full_disk,
        r"No space left on device; free some, or write elsewhere", late=True),
    row("predict", "disk full", full_disk,
        r"No space left on device; free some, or write elsewhere", late=True),
    row("extract", "cells nearer to each other than the buffer", nothing,
        r"No patch is left to train on .*; lower --buffer", "--buffer 100000", late=True),
    row("extract", "one block for three splits", nothing,
        r"The cells lie in 1 blocks of 1e\+06 m, too few.*; give a smaller --block_size",
        "--split_by block --block_size 1000000", late=True),
    row("extract", "a run under way",
        lambda: Path("out/.Patch-partial/images").mkdir(parents=True),
        r"A run into out is under way or was interrupted: --resume .*--overwrite"),
)  # fmt: skip
def test_faults_of_surroundings(
    place, capfd, monkeypatch, script, damage, options, error, status, late
):
    check(capfd, monkeypatch, script, damage, options, error, status, late)


def test_faults_of_memory_halve_the_batch(place, capfd, monkeypatch):
    """As long as fewer windows fit, the map is that of all memory."""
    options = "--overlap 0 --batch_size 2"
    assert run("predict", f"{options} --output whole.tif") == 0
    predict = Predictor._predict

    def short(self, images, valid):
        if len(images) > 1:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB."
            )
        return predict(self, images, valid)

    monkeypatch.setattr(Predictor, "_predict", short)
    capfd.readouterr()
    assert run("predict", options) == 0
    assert "memory ran out: batches of 1 from here on" in capfd.readouterr().err
    np.testing.assert_array_equal(read("map.tif")[0], read("whole.tif")[0])


def start(
    script: str, options: str = "", prelude: str = "", **more
) -> subprocess.Popen:
    """A script in a process of its own; ``prelude`` is Python that runs before it."""
    module = COMMANDS[script][0]
    code = (
        f"{prelude}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nimport {module}\n"
    )
    code += f"sys.exit({module}.main({words(script, options)!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


# a limit on the size of files ends every write as a full disk does, GDAL's and SQLite's too
SMALL_FILES = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


@pytest.mark.parametrize(
    ("script", "limit", "error"),
    [
        (
            "extract",
            2000,
            r"was not written whole; is the disk full|File too large; free",
        ),
        (
            "predict",
            2000,
            r"was not written whole; is the disk full|File too large; free",
        ),
        ("train", 300_000, r"disk full|too large; free some, or write elsewhere"),
    ],
    ids=["extract", "predict", "train"],
)
def test_faults_of_a_disk_without_room(place, script, limit, error):
    """In a process whose files cannot grow, as on a full disk."""
    before = snapshot(place)
    process = start(script, "", SMALL_FILES.format(limit))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    # libtiff tells of it by itself, past all handlers of GDAL
    own = re.compile(r"epoch |_tiff\w+Proc: ")
    lines = [line for line in err.splitlines() if not own.match(line)]
    assert_one_line("\n".join(lines), error, 1)
    after = snapshot(place)
    made = {name for name in after.keys() - before.keys() if after[name] is not None}
    assert made <= {"models/model_training_log.csv"}  # of the epoch that was trained
    assert all(after[name] == before[name] for name in before)


def test_faults_of_a_reading_process_that_is_killed(place, capfd, monkeypatch):
    """The system kills the largest process when memory is scarce."""
    import signal as signals

    read_patch, main_process = patches_module.read_patch, os.getpid()

    def killed(pair, ignore_index):
        if os.getpid() != main_process:
            os.kill(os.getpid(), signals.SIGKILL)
        return read_patch(pair, ignore_index)

    patch_everywhere(monkeypatch, "common.patches.read_patch", killed)
    error = r"A process that reads patches was killed.*; .*--num_workers"
    options = "--num_workers 1 --cache off"
    assert_fault(capfd, monkeypatch, "train", options, error, late=True)


@pytest.mark.parametrize("script", ["extract", "train", "predict"])
def test_faults_of_two_runs_into_one_output(place, capfd, script):
    """The second is refused, and the first ends well, as if it had been alone."""
    pause = """
import pathlib, time, sys
sys.path.insert(0, {0!r})
import {1} as module
work = module.{2}
def paused(*a, **k):
    pathlib.Path("{3}").mkdir(exist_ok=True)
    while not pathlib.Path("go").exists():
        time.sleep(0.05)
    return work(*a, **k)
module.{2} = paused
"""
    module, name = {
        "extract": ("Patch_extraction", "cut_scene"),
        "train": ("model_training", "train_one_epoch"),
        "predict": ("Predict_large_image", "predict_parts"),
    }[script]
    first = start(script, "", pause.format(str(ROOT), module, name, "begun"))
    deadline = time.monotonic() + 100
    while not Path("begun").exists():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    before = snapshot(place)
    ended = run(script)
    err = capfd.readouterr().err
    assert ended == 1, err
    assert_one_line(err, r"(A|Another) run into \S+ is under way", 1)
    assert snapshot(place) == before
    Path("go").mkdir()
    _, err = first.communicate(timeout=100)
    assert first.returncode == 0, err
    made = {
        "extract": "out/Patch",
        "train": "models/model_final_model.pth",
        "predict": "map.tif",
    }
    assert Path(made[script]).exists()


@pytest.mark.parametrize("script", ["extract", "train", "predict"])
def test_faults_seen_from_a_shell(place, script):
    """The scripts as files: status and streams are those of the function ``main``."""
    for path in ("scene.tif", patch_path("train")):
        text(path)
    command = [sys.executable, ROOT / f"{COMMANDS[script][0]}.py", *words(script, "")]
    before = snapshot(place)
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and done.stdout == ""
    assert_one_line(done.stderr, r"\.tif.*(copy or write|; write) it again", 1)
    assert snapshot(place) == before


def test_faults_of_a_patch_that_is_lost_during_training(place, capfd, monkeypatch):
    """A reading process hands its error on with a traceback; one line of it is told."""
    fit = epochs.fit

    def lose(run):
        text(patch_path("train"))
        return fit(run)

    patch_everywhere(monkeypatch, "training.epochs.fit", lose)
    former = Path(patch_path("train")).read_bytes()
    assert run("train", "--num_workers 1 --cache off") == 1
    err = capfd.readouterr().err
    assert_one_line(err, r"error: Cannot read .*patch_000.tif.*; .*write it again", 1)
    Path(patch_path("train")).write_bytes(former)
    assert not Path("models").exists()
