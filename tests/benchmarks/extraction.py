"""How near extraction comes to what the raster library can read and write.

    python tests/benchmarks/extraction.py

makes a scene of 10 bands by repeating the demo's, and cuts 224 px cells from it in three ways, one
after the other on the same machine: a bare rasterio loop with as many threads (the bound), the
toolkit, and ``rasterio.mask.mask`` cell by cell as it is often written (on a part of the cells,
scaled up). What counts are the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.windows import Window

ROOT = Path(__file__).resolve().parents[2]
CELL = 224
LAYOUTS = {
    "tiled": {
        "driver": "GTiff", "tiled": True, "blockxsize": 256, "blockysize": 256,
        "compress": "deflate", "zlevel": 1, "predictor": 2, "interleave": "pixel",
    },
    "striped": {
        "driver": "GTiff", "tiled": False, "blockysize": 1,
        "compress": "deflate", "zlevel": 1, "predictor": 2, "interleave": "pixel",
    },
    "jp2": {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES"},
}  # fmt: skip
PATCH = {
    "driver": "GTiff", "width": CELL, "height": CELL, "compress": "deflate", "zlevel": 1,
    "predictor": 2, "interleave": "band", "blockysize": CELL,
}  # fmt: skip


def scene_files(folder: Path, size: int, layout: str) -> tuple[Path, Path, Path]:
    """Image, label and grid."""
    suffix = ".jp2" if layout == "jp2" else ".tif"
    names = f"{layout}_{size}{suffix}", f"label_{size}.tif", f"grid_{size}.shp"
    return tuple(folder / name for name in names)


def make_scene(folder: Path, size: int, layout: str) -> None:
    """Make what is not there yet."""
    sys.path.insert(0, str(ROOT))
    from examples.demo import synthesize_scene, write_grid

    image, label, grid = scene_files(folder, size, layout)
    if image.exists() and label.exists() and grid.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    small = synthesize_scene(folder / "small", size=1400, seed=1)
    for source, target, options in (
        (small.image, image, LAYOUTS[layout]),
        (small.label, label, LAYOUTS["tiled"] | {"interleave": "band"}),
    ):
        with rasterio.open(source) as file:
            pixels = file.read()
            profile = {
                "count": file.count, "dtype": file.dtypes[0], "nodata": file.nodata,
                "crs": file.crs, "transform": file.transform, "width": size, "height": size,
            }  # fmt: skip
        copies = -(-size // 1400)
        tiled = target.with_suffix(".part.tif")
        kind = options if options["driver"] == "GTiff" else LAYOUTS["tiled"]
        with rasterio.open(
            tiled, "w", **profile, **kind, bigtiff="yes", num_threads="all_cpus"
        ) as file:
            for row in range(0, size, 1400):
                rows = np.tile(pixels, (1, 1, copies))[:, : size - row, :size]
                file.write(rows, window=Window(0, row, size, rows.shape[1]))
        if kind is options:
            tiled.rename(target)
        else:
            rasterio.shutil.copy(tiled, target, **options)
            tiled.unlink()
    with rasterio.open(label) as file:
        write_grid(grid, size, CELL, file.transform)


def bare_loop(image: Path, label: Path, output: Path, workers: int) -> None:
    """The same windows read and the same patches written, with nothing else."""
    for kind in ("images", "labels"):
        (output / kind).mkdir(parents=True)
    local = threading.local()
    with rasterio.open(image) as file:
        side, transform = file.width, file.transform
        shared = {"crs": file.crs, "nodata": file.nodata}

    def cut(place: tuple[int, int]) -> None:
        if not hasattr(local, "files"):
            local.files = [rasterio.open(path) for path in (image, label)]
        row, column = place
        window = Window(column, row, CELL, CELL)
        patch = rasterio.windows.transform(window, transform)
        for kind, file in zip(("images", "labels"), local.files):
            pixels = file.read(window=window)
            path = output / kind / f"{row}_{column}.tif"
            with rasterio.open(
                path, "w", **PATCH, **shared | {"nodata": file.nodata},
                count=len(pixels), dtype=pixels.dtype, transform=patch,
            ) as target:  # fmt: skip
                target.write(pixels)

    places = [(r, c) for r in range(0, side, CELL) for c in range(0, side, CELL)]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(cut, places))


def mask_loop(image: Path, label: Path, grid: Path, output: Path, count: int) -> None:
    """Cell by cell with ``rasterio.mask.mask``, one after the other."""
    import geopandas
    from rasterio.mask import mask

    output.mkdir(parents=True)
    cells = geopandas.read_file(grid).geometry
    step = max(1, len(cells) // count)
    with rasterio.open(image) as scene, rasterio.open(label) as classes:
        for index, cell in enumerate(cells[::step][:count]):
            for file in (scene, classes):
                pixels, transform = mask(file, [cell], crop=True)
                profile = file.profile | {
                    "driver": "GTiff", "height": pixels.shape[1], "width": pixels.shape[2],
                    "transform": transform, "tiled": False, "compress": "lzw",
                }  # fmt: skip
                for key in ("blockxsize", "blockysize"):
                    profile.pop(key, None)
                kind = "image" if file is scene else "label"
                with rasterio.open(output / f"{kind}_{index}.tif", "w", **profile) as t:
                    t.write(pixels)


def timed(command: list) -> tuple[float, float]:
    """Wall seconds and peak memory (MB) of a process of its own."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} ended with status {status}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def clean(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def compare(arguments, layout: str) -> dict:
    """Time the three ways, each the best of so many runs in turn."""
    folder, workers = arguments.folder, arguments.workers
    # made by another process: what this one once held would count in its children's peak
    timed([__file__, "--run", "make", folder, arguments.size, layout])
    image, label, grid = scene_files(folder, arguments.size, layout)
    cells = (-(-arguments.size // CELL)) ** 2
    part = min(cells, arguments.mask_cells)
    output = folder / "out"
    ways = {
        "bare loop": [__file__, "--run", "bare", image, label, output, workers],
        "toolkit": [
            "Patch_extraction.py", "extract", "--image", image, "--label", label, "--grid",
            grid, "--output", output, "--patch_size", CELL, "--min_valid", 0,
            "--workers", workers,
        ],
        "mask.mask": [__file__, "--run", "mask", image, label, grid, output, part],
    }  # fmt: skip
    with open(image, "rb") as file:  # into the page cache, alike for all
        while file.read(2**26):
            pass
    best: dict[str, tuple[float, float]] = {}
    for _ in range(arguments.repeat):
        for way, command in ways.items():
            clean(output)
            seconds, memory = timed(command)
            seconds *= cells / part if way == "mask.mask" else 1
            if way not in best or seconds < best[way][0]:
                best[way] = (seconds, memory)
    clean(output)
    bound = best["bare loop"][0]
    print(
        f"\n{layout}, {arguments.size} x {arguments.size} x 10, {cells} cells, {workers} threads"
    )
    print(f"{'':12}{'seconds':>9}{'cells/s':>9}{'x bound':>9}{'peak MB':>9}")
    for way, (seconds, memory) in best.items():
        rate = cells / seconds
        print(f"{way:12}{seconds:9.1f}{rate:9.1f}{seconds / bound:9.2f}{memory:9.0f}")
    return {way: {"seconds": s, "peak_mb": m} for way, (s, m) in best.items()}


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        way, *words = sys.argv[2:]
        if way == "make":
            make_scene(Path(words[0]), int(words[1]), words[2])
        elif way == "bare":
            bare_loop(*map(Path, words[:3]), int(words[3]))
        else:
            mask_loop(*map(Path, words[:4]), int(words[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=11200, help="side of the scene, px")
    parser.add_argument("--layout", nargs="+", default=["tiled"], choices=LAYOUTS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=2, help="runs; the best counts")
    parser.add_argument("--mask_cells", type=int, default=100)
    parser.add_argument(
        "--folder", type=Path, default=Path("benchmark_data"), help="for the scenes"
    )
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()  # the ways run in another folder
    results = {layout: compare(arguments, layout) for layout in arguments.layout}
    (arguments.folder / "extraction.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
