"""Time and memory of what is made of the areas of a map: --sieve, --polygons, --simplify.

    python tests/benchmarks/areas.py

makes a map as large as a Sentinel-2 tile, patches of 8 classes with speckle, and gives it to the
functions that a prediction calls when all rows are predicted, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CLASSES, PATCH, PIXEL, NODATA = 8, 30, 10, 255
NAMES = [f"class {number}" for number in range(CLASSES)]
CASES = {
    "--sieve 1000": {"sieve": 1000},
    "--polygons": {},
    "--polygons --min_area 1000": {"min_area": 1000},
    "--polygons --min_area 1000 --simplify 15": {"min_area": 1000, "simplify": 15},
    "--polygons --simplify 15": {"simplify": 15},
}


def make_map(path: Path, size: int, speckle: float) -> None:
    """Patches some 30 pixels wide, a share of speckle of random classes, a corner of nodata."""
    import cv2
    import rasterio
    from rasterio.transform import from_origin

    rng = np.random.default_rng(0)
    best = np.full((size, size), -np.inf, np.float32)
    classes = np.zeros((size, size), np.uint8)
    for number in range(CLASSES):
        coarse = rng.random((size // PATCH + 1,) * 2, np.float32)
        field = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
        classes[field > best] = number
        np.maximum(best, field, out=best)
    for row in classes:
        noisy = rng.random(size) < speckle
        row[noisy] = rng.integers(0, CLASSES, noisy.sum())
    classes[np.add.outer(range(size), range(size)) < size // 2] = NODATA
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 1, "nodata": NODATA}
    profile |= {"width": size, "height": size, "crs": "EPSG:32631", "tiled": True}
    profile |= {"compress": "deflate", "blockxsize": 256, "blockysize": 256}
    place = from_origin(500_000, 5_000_000, PIXEL, PIXEL)
    with rasterio.open(path, "w", transform=place, **profile) as file:
        file.write(classes, 1)


def sieve_stored(path: Path, folder: Path, square_metres: float) -> int:
    """Sieve a map from the stored rows of an unfinished one into a GeoTIFF."""
    import rasterio
    from rasterio.windows import Window

    from common.ground import pixel_areas
    from common.sieve import centre_pixel, fewest_pixels
    from common.tiffs import create_tiff
    from prediction.layers import Layer
    from prediction.mapfiles import MapWriter
    from prediction.rowstore import RowStore
    from prediction.statistics import Statistics

    layers = {"classes": Layer("classes", "uint8", NODATA, ["class"])}
    with rasterio.open(path) as file:
        areas, profile, shape = pixel_areas(file), file.profile, file.shape
        RowStore.begin(folder, {}, layers, shape)
        with open(folder / "classes.raw", "wb") as raw:
            for top in range(0, shape[0], 256):
                window = Window(0, top, shape[1], min(256, shape[0] - top))
                raw.write(file.read(1, window=window).tobytes())
    rows = RowStore(folder, layers, shape)
    rows.covered[:] = shape[1]
    statistics = Statistics(NAMES, areas, shape[0] * shape[1])
    fewest = fewest_pixels(square_metres, centre_pixel(path, areas, "--sieve"))
    del profile["driver"]
    with rows.opened, create_tiff(folder / "map.tif", **profile) as target:
        MapWriter(rows, {"classes": target}, statistics, fewest).finish()
    return int(statistics.pixels.sum())


def measure(path: Path, folder: Path, sieve: float = 0, **options) -> dict:
    """Do a case: its pixels or polygons, its seconds, and the most memory of the process in GB."""
    from common.polygons import write_polygons

    started = time.perf_counter()
    if sieve:
        found = sieve_stored(path, folder, sieve)
    else:
        found = write_polygons(path, folder / "areas.gpkg", NAMES, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"made": found, "seconds": time.perf_counter() - started, "peak": peak}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmark_data"))
    parser.add_argument("--size", type=int, default=10_980, help="pixels of a side")
    parser.add_argument("--speckle", type=float, default=0.03, help="share of pixels")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder = arguments.output
    path = folder / f"areas_{arguments.size}_{arguments.speckle}.tif"
    if arguments.case == "map":
        make_map(path, arguments.size, arguments.speckle)
        return 0
    if arguments.case:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            print(json.dumps(measure(path, Path(work), **CASES[arguments.case])))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]

    def run_case(case: str) -> str:
        """What a process prints; its peak memory includes that of this one before it."""
        done = subprocess.run(
            [*command, f"--case={case}"], check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    if not path.exists():
        run_case("map")
    for case in arguments.cases:
        row = json.loads(run_case(case).splitlines()[-1])
        print(
            f"{case:45}{row['made']:12,}{row['seconds']:8.0f} s{row['peak']:7.2f} GB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
