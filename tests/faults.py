"""What the tests of faults share: a folder where all scripts work, ways to damage it, one check.

A row of a table damages one thing in that folder (the fixture ``place``), runs a script there as a
user does, and asks what ``assert_fault`` asks of every error: the status, one line that says where
and what to do, no trace of the run, and nothing long before it.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import rasterio
import tifffile
import torch
from affine import Affine
from helpers import (
    ENCODER,
    PIXEL,
    ROOT,
    grid,
    make_patch,
    patch_everywhere,
    write_dataset,
    write_model,
    write_raster,
)

import main
import Patch_extraction
import Predict_large_image
from common.errors import WORK_IS_KEPT
from common.rasters import Source

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
    "visualize": ("Patch_extraction", "visualize --output data"),
    "info": ("Patch_extraction", "info --output data"),
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
    r"usage: | {4,}|(train|validation|test) +\d+ patches|no GPU found|no test split|"
    r"few steps of the weights|\S+: (about|less than) \S+ of the pixels hold|memory ran out|warning: |"
    r"\S+ is warped onto|without the files|left out|(random|block|column) fold|fold \d|"
    r"skipped \d+ of|--batch_size auto| {2}\S"
)


# --- the folder and its scripts ------------------------------------------------------------


def make_place(folder: Path) -> Path:
    """Fill a folder in which all commands succeed."""
    for name, label in (("scene", "label"), ("scenes/Image_1", "scenes/Label_1")):
        image, mask = make_patch(np.random.default_rng(1), 3, 2, (SIDE, SIDE))
        write_raster(folder / f"{name}.tif", image)
        write_raster(folder / f"{label}.tif", mask)
    for name in ("grid.gpkg", "grid.shp"):
        grid().to_file(folder / name)
    write_dataset(folder / "data", 4, 2, 1, bands=3)
    write_model(folder / "model.pth")
    return folder


def words(script: str, options: str) -> list[str]:
    """The command line; options of a row stand last and so count."""
    return shlex.split(f"{COMMANDS[script][1]} {options}")


def run(script: str, options: str = "") -> int:
    try:
        return MODULES[COMMANDS[script][0]].main(words(script, options))
    except SystemExit as ended:
        return ended.code


def start(
    script: str, options: str = "", prelude: str = "", **more
) -> subprocess.Popen:
    """A script in a process of its own; ``prelude`` is Python that runs before it."""
    module = COMMANDS[script][0]
    code = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{prelude}\nimport {module}\n"
    )
    code += f"sys.exit({module}.main({words(script, options)!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """All files of a folder, hidden ones too, with their bytes; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# --- what an error must be -----------------------------------------------------------------


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
    """Run a script that must fail, before its long work unless ``late``, and leave nothing but what it says."""
    if not late:
        patch_everywhere(monkeypatch, WORK[script], unexpected_work)
    before = snapshot(Path.cwd())
    capfd.readouterr()
    ended = run(script, options)
    out, err = capfd.readouterr()
    assert ended == status, err
    assert_one_line(err, error, status)
    assert out == ""
    for kept in list(Path.cwd().rglob(".*-partial")):
        if str(kept.relative_to(Path.cwd())) not in before:
            assert WORK_IS_KEPT in err
            shutil.rmtree(kept)
            kept.parent.rmdir()
    after = snapshot(Path.cwd())
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []


def unexpected_work(*_):
    raise AssertionError("the work began before the fault was seen")


# --- the tables ----------------------------------------------------------------------------


class Fault(NamedTuple):
    """What is damaged, which command line it is, and what must be said."""

    script: str
    damage: (
        Callable  # called in the folder; with ``monkeypatch`` where it is ``simulated``
    )
    options: str
    error: str
    status: int
    late: bool


def row(script, name, damage, error, options="", status=1, late=False):
    """A row of a table; ``late`` where only the work itself can show the fault."""
    fault = Fault(script, damage, options, error, status, late)
    return pytest.param(fault, id=f"{script}: {name}")


def table(*rows):
    return pytest.mark.parametrize("fault", rows)


def check(capfd, monkeypatch, fault: Fault) -> None:
    """What all tables ask of their rows."""
    simulated = getattr(fault.damage, "takes_monkeypatch", False)
    fault.damage(monkeypatch) if simulated else fault.damage()
    script, _, options, error, status, late = fault
    assert_fault(capfd, monkeypatch, script, options, error, status, late)


def simulated(damage: Callable) -> Callable:
    """Mark a damage that is done to the process, not to a file."""
    damage.takes_monkeypatch = True
    return damage


def nothing() -> None:
    """Damage nothing: the command line alone is at fault."""


# --- damaged rasters -----------------------------------------------------------------------


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


def complex_numbers(path: str) -> None:
    rewrite(path, lambda pixels: pixels.astype("complex64"))


def disguised(path: str) -> None:
    """A VRT under the name of a TIFF."""
    from rasterio.shutil import copy

    os.rename(path, f"{path}.real")
    copy(f"{path}.real", path, driver="VRT")


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


def no_bands_alike(path: str) -> None:
    rewrite(path, lambda pixels: np.concatenate([pixels, pixels])[:4])


def rotated(path: str) -> None:
    _, profile = read(path)
    rewrite(path, transform=profile["transform"] * Affine.rotation(30))


# --- rasters that cannot be read -----------------------------------------------------------
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


def unreadable_rows(script: str, *paths: str) -> Iterator:
    """Every way in which a raster cannot be read, for each of some rasters."""
    for path in paths:
        for name, damage, error in UNREADABLE:
            if damage is missing and script == "train":  # a patch without its partner
                error = r"patch_\d+.tif has no (label|image).*; add it or remove"
            if damage is missing and script == "batch":
                error = r"No file in scenes matches --image_pattern|Files without a partner: .*; add"
            where = f"{Path(path).parent.name}/{Path(path).stem}"
            expected = error.replace("{path}", re.escape(path))
            yield row(script, f"{where} {name}", partial(damage, path), expected)


# --- headers that claim more than there can be ---------------------------------------------


def little_memory(damage: Callable) -> Callable:
    """Half a gigabyte is free."""

    def both(monkeypatch) -> None:
        patch_everywhere(monkeypatch, "common.machine.free_memory", lambda: 2**29)
        damage()

    return simulated(both)


IN_ONE_BLOCK = (
    r"{path} is stored in blocks of 20000 x 20000 pixels, .*write it again in tiles"
)


def one_block_rows(script: str, *paths: str) -> Iterator:
    for path in paths:
        where = f"{Path(path).parent.name}/{Path(path).stem}"
        damage = little_memory(partial(huge, path))
        yield row(script, where, damage, IN_ONE_BLOCK.format(path=re.escape(path)))


# --- outputs that cannot be written --------------------------------------------------------


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


def output_rows(script: str, option: str, usual: str, ending: str = "") -> list:
    """Folders that cannot be written to; ``ending`` makes a file of one."""
    return [
        row(script, "read-only folder", read_only,
            rf"{option} {usual}: \S+ cannot be written to; .*another"),
        row(script, "folder under a file", file_in_the_way("blocked"),
            rf"{option} blocked/new: .*blocked cannot be written to; .*another",
            f"{option} blocked/new{ending}"),
    ]  # fmt: skip


# --- the machine ---------------------------------------------------------------------------


@simulated
def without_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@simulated
def patches_without_memory(monkeypatch) -> None:
    def exhausted(*_, **__):
        raise MemoryError(
            "Unable to allocate 7.45 GiB for an array with shape (10, 10000)"
        )

    monkeypatch.setattr(Source, "read", exhausted)


@simulated
def full_disk(monkeypatch) -> None:
    """Every write of a file of our own ends as on a full disk."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(rasterio.io.DatasetWriter, "write", full)


# --- what looks like a fault and is legal --------------------------------------------------


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
    """By other means than the toolkit's: finite, and a nodata value that may be measured not in
    all bands."""
    valid = np.isfinite(pixels.astype(float)).all(axis=0)
    return valid & (pixels != nodata).any(axis=0) if nodata is not None else valid


# --- labels, datasets, checkpoints ---------------------------------------------------------


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


def split(name: str) -> Path:
    return Path("data/Patch", name)


def patch_path(name: str, kind: str = "images", number: int = 0) -> str:
    return str(split(name) / kind / f"patch_{number:03}.tif")


def patches(folder="out") -> list[Path]:
    return sorted(Path(folder).rglob("images/*.tif"))


class Malicious:
    """Leaves a folder ``executed`` when it is unpickled carelessly."""

    def __reduce__(self):
        return os.mkdir, ("executed",)
