"""The whole toolkit on a scene made here: patches, training, map and a picture.

    python examples/demo.py

writes a Sentinel-2-like scene with its label and grid to ``demo_output/``, runs the
three scripts on it as a user would, and draws ``demo_output/demo.png``: scene, truth,
map and confidence. It needs no download and no GPU.

``synthesize_scene`` is of use on its own, wherever a scene with exact truth is wanted:

    synthesize_scene("data", size=1024, seed=7)  # six land covers
    synthesize_scene("data", size=1024, seed=7, classes=2)  # 1 is water, 0 is not
    synthesize_scene("data", seed=7, date_seed=1, name="may")  # another day

The landscape is painted from the bottom up: parcels, woods, towns, water and roads.
Every pixel is a mixture of two materials times a brightness; the image sees it through
the optics (blur), the light, the air and the noise of a day. Lengths are in pixels of
10 m, points are (x, y) = (column, row).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIZE, PATCH_SIZE, EPOCHS, BATCH_SIZE, SEED = 1536, 128, 15, 8, 42

CRS, PIXEL = "EPSG:32631", 10.0
LABEL_NODATA = 255
BANDS = {
    "B02 blue": 10,  # native resolution in metres; the 20 m bands are blurred more
    "B03 green": 10,
    "B04 red": 10,
    "B05 red edge 1": 20,
    "B06 red edge 2": 20,
    "B07 red edge 3": 20,
    "B08 nir": 10,
    "B8A nir narrow": 20,
    "B11 swir 1": 20,
    "B12 swir 2": 20,
}
CLASS_COLORS = {
    "water": "#2b6cb0",
    "forest": "#1f6b3a",
    "grassland": "#9bcf6b",
    "cropland": "#e8c95a",
    "bare_soil": "#b07a4a",
    "built_up": "#c8413b",
}
WATER, FOREST, GRASS, CROP, SOIL, BUILT = range(len(CLASS_COLORS))

# Surface reflectance x 10,000 in the order of BANDS.
SPECTRA = {
    "clear water": (330, 400, 250, 210, 150, 140, 120, 110, 60, 45),
    "silty water": (560, 760, 560, 480, 300, 290, 260, 230, 110, 80),
    "broadleaf": (260, 500, 310, 760, 2250, 2800, 2950, 3150, 1400, 620),
    "conifer": (220, 370, 255, 500, 1350, 1650, 1750, 1850, 820, 390),
    "lush grass": (380, 760, 480, 1120, 2650, 3200, 3350, 3550, 2050, 1080),
    "dry grass": (620, 980, 1080, 1520, 2200, 2450, 2600, 2800, 2750, 1800),
    "wheat": (300, 600, 330, 930, 3100, 4000, 4200, 4350, 1750, 800),
    "rapeseed": (440, 1050, 930, 1600, 3000, 3550, 3750, 3850, 1950, 950),
    "maize": (420, 780, 520, 1150, 2900, 3600, 3800, 3950, 2000, 1000),
    "clover": (310, 700, 350, 1050, 3350, 4350, 4600, 4700, 1950, 880),
    "pale soil": (800, 1090, 1450, 1720, 1900, 2050, 2200, 2340, 3100, 2700),
    "dark soil": (560, 740, 960, 1180, 1340, 1470, 1590, 1720, 2400, 2050),
    "tile roof": (900, 1060, 1500, 1750, 1950, 2050, 2150, 2200, 2500, 2250),
    "pale roof": (1750, 1900, 2050, 2150, 2250, 2300, 2350, 2400, 2450, 2250),
    "asphalt": (700, 800, 890, 960, 1040, 1100, 1150, 1200, 1420, 1330),
}
MATERIAL = {name: row for row, name in enumerate(SPECTRA)}
CROPS = ("wheat", "rapeseed", "maize", "clover")


@dataclass(frozen=True)
class Scene:
    """Paths of the files that belong together."""

    image: Path
    label: Path
    grid: Path


# --------------------------------------------------------------------------- the ground


@dataclass
class Ground:
    """What lies where: a class and a mixture of two materials, all arrays (H, W)."""

    label: np.ndarray  # uint8, class
    cover: np.ndarray  # uint8, row of SPECTRA
    under: np.ndarray  # uint8, row of SPECTRA; shows where ``cover`` leaves room
    share: np.ndarray  # float32, of ``cover`` in the pixel
    shade: np.ndarray  # float32, relative brightness

    @classmethod
    def blank(cls, size: int) -> Ground:
        """Square and not painted yet."""
        import numpy as np

        kinds = (np.uint8, np.uint8, np.uint8, np.float32, np.float32)
        return cls(*(np.zeros((size, size), kind) for kind in kinds))

    def crop(self, window) -> Ground:
        """A view of a window (two slices): painting it paints this ground."""
        return Ground(*(layer[window] for layer in vars(self).values()))

    def paint(self, where, label: int, cover, under, share, shade) -> None:
        """Set the pixels of the boolean ``where``; values are scalars or (H, W)."""
        import numpy as np

        values = (label, cover, under, share, shade)
        for layer, value in zip(vars(self).values(), values):
            layer[where] = value[where] if np.ndim(value) else value


def axes(size: int):
    """Row and column coordinates (H, 1) and (1, W) float32."""
    import numpy as np

    row = np.arange(size, dtype=np.float32)
    return row[:, None], row[None, :]


def fractal_noise(rng, size: int, scale: float, octaves=3, roughness=0.5):
    """Noise (size, size) float32 of mean 0 and deviation 1.

    Args:
        rng: Source of randomness.
        size: Height and width in pixels.
        scale: Span of the largest features in pixels; each further octave halves it.
        octaves: Number of spans that are added up.
        roughness: Strength of an octave relative to the one before.
    """
    import cv2
    import numpy as np

    noise = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        knots = int(np.ceil(size * 2**octave / scale)) + 3
        coarse = rng.standard_normal((knots, knots), dtype=np.float32)
        fine = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
        noise += fine * roughness**octave
    return (noise - noise.mean()) / noise.std()


def grain(rng, size: int, sigma: float):
    """Fine texture: blurred white noise of deviation 1."""
    import cv2
    import numpy as np

    noise = rng.standard_normal((size, size), dtype=np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), sigma)
    return noise / noise.std()


def districts(rng, size: int, spacing: int = 130):
    """Irregular polygons (H, W) int32: neighbourhoods that share a direction."""
    import cv2
    import numpy as np

    seeds = np.full((size, size), 255, np.uint8)
    for row in range(0, size, spacing):
        for column in range(0, size, spacing):
            y, x = rng.uniform(0, spacing, 2).astype(int) + (row, column)
            seeds[min(y, size - 1), min(x, size - 1)] = 0
    _, nearest_seed = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    return nearest_seed


def parcels(rng, size: int):
    """Cut each district into rows of fields.

    Returns:
        Field ids (H, W) int32 in 0..65535, an index for tables of field properties;
        the coordinate across the rows of plants (H, W) float32; the mask of the
        margins and tracks between fields.
    """
    import numpy as np

    district = districts(rng, size)
    count = int(district.max()) + 1
    angle = rng.uniform(0, np.pi, count).astype(np.float32)
    depth = rng.uniform(26, 52, count).astype(np.float32)
    scale = rng.uniform(0.6, 1.7, count).astype(np.float32)
    width = rng.uniform(16, 50, 65536).astype(np.float32)

    y, x = (axis + 5 * fractal_noise(rng, size, 160, 2) for axis in axes(size))
    cos, sin = np.cos(angle)[district], np.sin(angle)[district]
    along, across = x * cos + y * sin, y * cos - x * sin
    row = np.floor(across / depth[district]).astype(np.int32)
    row_id = (district * 7919 + row * 104_729) & 0xFFFF
    column = np.floor(along / (width[row_id] * scale[district])).astype(np.int32)
    field = (row_id * 31 + column * 15_731) & 0xFFFF

    margin = np.zeros((size, size), bool)
    margin[:, 1:] |= field[:, 1:] != field[:, :-1]
    margin[1:] |= field[1:] != field[:-1]
    return field, across, margin


def paint_fields(ground: Ground, rng, meadow) -> None:
    """Farmland: crop, bare soil or, the more so where ``meadow`` is high, grass."""
    import numpy as np

    size = len(ground.label)
    field, across, margin = parcels(rng, size)
    use, tone, vigour = rng.uniform(size=(3, 65536)).astype(np.float32)
    crops = np.array([MATERIAL[name] for name in CROPS], np.uint8)
    soils = np.array([MATERIAL["pale soil"], MATERIAL["dark soil"]], np.uint8)
    crop = rng.choice(crops, 65536)[field]
    soil = rng.choice(soils, 65536)[field]
    period = rng.uniform(3.5, 8, 65536).astype(np.float32)[field]
    use, tone, vigour = use[field], tone[field], vigour[field]

    rows = np.sin(2 * np.pi * across / period)
    patchy, fine = fractal_noise(rng, size, 45), grain(rng, size, 0.8)
    shade = (0.88 + 0.24 * tone) * (1 + 0.03 * fine)
    leaves = np.clip(0.58 + 0.42 * vigour + 0.05 * rows + 0.07 * patchy, 0.4, 1)
    weeds = np.clip(0.10 * vigour + 0.03 * rows + 0.04 * patchy, 0, 0.25)
    lush = np.clip(0.35 + 0.5 * vigour + 0.16 * patchy + 0.10 * fine, 0, 1)
    grass, dry_grass = MATERIAL["lush grass"], MATERIAL["dry grass"]
    bare = use > 0.80
    green = use < 0.13 + 0.5 * np.clip(meadow, 0, 1)

    ground.paint(np.full_like(margin, True), CROP, crop, soil, leaves, shade)
    ground.paint(bare, SOIL, soil, grass, 1 - weeds, shade * (1 + 0.04 * rows))
    ground.paint(green, GRASS, grass, dry_grass, lush, shade * (1 + 0.03 * fine))
    # Margins are too narrow to be mapped: they only look different.
    ground.under[margin], ground.share[margin] = dry_grass, 0.6


def paint_woods(ground: Ground, rng, where) -> None:
    """Forest: stands of broadleaf and conifers, with crowns that cast shadows."""
    import numpy as np

    size = len(ground.label)
    conifers = np.clip(0.35 + 0.8 * fractal_noise(rng, size, 90, 4, 0.6), 0, 1)
    crowns = 1 + 0.13 * grain(rng, size, 0.8) + 0.10 * fractal_noise(rng, size, 40)
    crowns = np.clip(crowns, 0.55, 1.5)
    conifer, broadleaf = MATERIAL["conifer"], MATERIAL["broadleaf"]
    ground.paint(where, FOREST, conifer, broadleaf, conifers, crowns)


def paint_town(ground: Ground, rng, where, centre, radius: float) -> None:
    """Houses, gardens, streets, denser towards the centre; pale halls on one side."""
    import numpy as np

    size = len(ground.label)
    y, x = axes(size)
    y, x = y - centre[1], x - centre[0]
    density = np.clip(1.05 - 0.7 * np.hypot(x, y) / max(radius, 90), 0.35, 1)
    heading = rng.uniform(0, 2 * np.pi)
    outwards = x * np.cos(heading) + y * np.sin(heading)
    halls = (outwards > 0.42 * radius) & (radius > 60)  # none in villages

    quarter = districts(rng, size, 75)  # each with its own street grid
    turn = rng.uniform(0, np.pi / 2, int(quarter.max()) + 1).astype(np.float32)[quarter]
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    lane = (np.mod(u, 22) < 1.6) | (np.mod(v, 13) < 1.6)
    street = lane | (np.mod(u, 88) < 3) | (np.mod(v, 78) < 3)

    # One roof or garden per plot: about 2 px for houses, 6 px for halls.
    plot = np.where(halls, 6, 2.2)
    row, column = np.floor(v / plot).astype(int), np.floor(u / plot).astype(int)
    plot_id = (column * 7919 + row * 104_729) & 0xFFFF
    chance, tone = rng.uniform(size=(2, 65536)).astype(np.float32)
    chance, tone = chance[plot_id], tone[plot_id]
    roof = np.where(halls, MATERIAL["pale roof"], MATERIAL["tile roof"])
    roof = np.where(chance < 0.25, MATERIAL["asphalt"], roof)
    built = np.where(chance < density, 0.7, 0.25) + 0.25 * tone
    garden = MATERIAL["lush grass"]
    ground.paint(where, BUILT, roof, garden, built, 0.85 + 0.3 * tone)
    ground.paint(where & street, BUILT, MATERIAL["asphalt"], garden, 0.9, 0.85)


def river_course(rng, size: int):
    """Centre line (N, 2) of a river from left to right, in steps of 2 pixels.

    Its heading swings like a sine of the distance travelled, as meanders do (the
    sine-generated curve of Langbein and Leopold, 1966); here swing and length vary.
    """
    import numpy as np

    meander = min(430.0, 0.6 * size)  # length along the river
    start, end = size * rng.uniform(0.35, 0.75, 2)
    point, target = np.array([-60.0, start]), np.array([size + 400.0, end])
    phase, course = rng.uniform(0, 2 * np.pi), []
    while point[0] < size + 60 and len(course) < 8 * size:
        course.append(point.copy())
        ahead = target - point
        swing = 1.05 + 0.35 * np.sin(0.37 * phase)
        heading = np.arctan2(ahead[1], ahead[0]) + swing * np.sin(phase)
        point += 2 * np.array([np.cos(heading), np.sin(heading)])
        pace = (1 + 0.6 * np.sin(0.23 * phase)) * rng.uniform(0.6, 1.4)
        phase += 2 * np.pi * 2 / meander * pace
    return np.array(course)


def stroke(size: int, line, widths):
    """Mask (H, W) of a line (N, 2) drawn with a width per point."""
    import cv2
    import numpy as np

    canvas = np.zeros((size, size), np.uint8)
    points, widths = np.rint(line * 16).astype(int), np.broadcast_to(widths, len(line))
    for first, second, width in zip(points[:-1], points[1:], widths):
        thickness = max(1, round(float(width)))
        cv2.line(canvas, first.tolist(), second.tolist(), 1, thickness, shift=4)
    return canvas.astype(bool)


def road_between(rng, start, end):
    """A gently bent line (N, 2) between two points."""
    import numpy as np

    start, end = np.asarray(start, float), np.asarray(end, float)
    sideways = (end - start)[::-1] * (-1, 1)
    middle = (start + end) / 2 + sideways * rng.uniform(-0.18, 0.18)
    t = np.linspace(0, 1, 60)[:, None]
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end


def distance_to(where):
    """Distance of every pixel to the mask, in pixels."""
    import cv2
    import numpy as np

    return cv2.distanceTransform((~where).astype(np.uint8), cv2.DIST_L2, 5)


def settlements(rng, size: int, course):
    """Places as (centre, radius) and the roads (lines) between them.

    The first town lies beside the river, others anywhere in a larger scene; villages
    hang on the roads.
    """
    radius = min(190.0, 0.15 * size)
    beside = course[int(len(course) * rng.uniform(0.45, 0.65))] - (0, 0.7 * radius)
    more = max(0, round((size / 1536) ** 2) - 1)
    towns = [beside, *(rng.uniform(0.08, 0.92, (more, 2)) * size)]
    places = [(town, radius * rng.uniform(0.8, 1.1)) for town in towns]
    north, east, south = size * rng.uniform((0.3, 0.1, 0.1), (0.9, 0.9, 0.7))
    exits = (north, -20), (size + 20, east), (south, size + 20)
    links = [*pairwise(towns), *((towns[-1], end) for end in exits)]
    roads = [road_between(rng, start, end) for start, end in links]
    for road in roads:
        village = road[int(rng.uniform(25, 45))]
        places.append((village, radius * rng.uniform(0.14, 0.26)))
    return places, roads


def lakes(rng, size: int, dry, ragged):
    """Mask (H, W) of a few lakes with centres where ``dry`` is False."""
    import numpy as np

    y, x = axes(size)
    mask = np.zeros((size, size), bool)
    for column, row in rng.uniform(0.1, 0.9, (6, 2)) * size:
        stretch, radius = rng.uniform(0.6, 1.6), rng.uniform(20, 50)
        if not dry[int(row), int(column)]:
            distance = np.hypot((x - column) * stretch, (y - row) / stretch)
            mask |= distance < radius * ragged
    return mask


def make_ground(size: int, seed: int) -> Ground:
    """The landscape of a seed, from the fields up to the roads."""
    import numpy as np

    rng = np.random.default_rng([seed, 0])
    ground = Ground.blank(size)
    course = river_course(rng, size)
    swell = np.sin(np.linspace(0, 40, len(course)) + rng.uniform(0, 6))
    river = stroke(size, course, 21 + 5 * swell)
    bank, relief = distance_to(river), fractal_noise(rng, size, 300, 6, 0.55)
    ragged = 1 + 0.2 * fractal_noise(rng, size, 110, 5, 0.6)  # outlines
    park = fractal_noise(rng, size, 70) > 1.7

    paint_fields(ground, rng, 1.3 - bank / 80 + 0.5 * fractal_noise(rng, size, 260))
    riverside = bank < 5 + 5 * fractal_noise(rng, size, 70)
    paint_woods(ground, rng, (relief > 0.85) | (park & (relief > -0.4)) | riverside)

    places, roads = settlements(rng, size, course)
    for centre, radius in places:
        side = min(size, int(4 * radius))
        left, top = np.clip(np.int_(centre) - side // 2, 0, size - side)
        window = slice(top, top + side), slice(left, left + side)
        y, x = axes(side)
        middle = centre - (left, top)
        town = np.hypot(x - middle[0], y - middle[1]) < radius * ragged[window]
        town &= ~park[window]
        paint_town(ground.crop(window), rng, town, middle, radius)

    water = river | lakes(rng, size, (ground.label == BUILT) | (bank < 70), ragged)
    silt = 0.15 + 0.6 * river + 0.15 * fractal_noise(rng, size, 120)
    silty, clear = MATERIAL["silty water"], MATERIAL["clear water"]
    ground.paint(water, WATER, silty, clear, np.clip(silt, 0, 1), 1)
    asphalt, verge = MATERIAL["asphalt"], MATERIAL["dry grass"]
    for road in roads:  # above the water: bridges
        ground.paint(stroke(size, road, 3), BUILT, asphalt, verge, 0.85, 0.95)
    return ground


# ---------------------------------------------------------------------------- the image


def spectra_of_day(rng):
    """Reflectance (materials, bands) on a day: crops more or less leafy, grass dry."""
    import numpy as np

    table = np.array(list(SPECTRA.values()), np.float32)
    for name in CROPS:
        row, leafy = MATERIAL[name], rng.uniform(0.75, 1.0)
        table[row] = leafy * table[row] + (1 - leafy) * table[MATERIAL["dark soil"]]
    row, dry = MATERIAL["lush grass"], rng.uniform(0, 0.3)
    table[row] = (1 - dry) * table[row] + dry * table[MATERIAL["dry grass"]]
    return table


def swath(size: int):
    """Pixels (H, W) that the sensor saw: all but a slanted strip on the left."""
    y, x = axes(size)
    return x > 0.13 * size - 0.20 * y


def observe(ground: Ground, seed: int, date_seed: int):
    """Yield the bands (H, W) uint16 of the ground on one day; no pixel is 0."""
    import cv2
    import numpy as np

    rng = np.random.default_rng([seed, 1, date_seed])
    size = len(ground.label)
    table = spectra_of_day(rng)
    light = ground.shade * (1 + 0.04 * fractal_noise(rng, size, max(64, size / 2), 2))
    haze = np.clip(60 + 30 * fractal_noise(rng, size, max(64, size / 3), 2), 0, None)
    for band, metres in enumerate(BANDS.values()):
        cover, under = table[ground.cover, band], table[ground.under, band]
        reflectance = light * (under + ground.share * (cover - under))
        blur = 0.6 if metres == 10 else 1.0
        reflectance = cv2.GaussianBlur(reflectance, (0, 0), blur)
        reflectance += haze * 0.6**band  # the air scatters short waves most
        noise = rng.standard_normal((size, size), dtype=np.float32)
        reflectance += noise * (12 + 0.012 * reflectance)
        yield np.clip(np.rint(reflectance), 1, 65_534).astype(np.uint16)


def write_grid(path: Path, size: int, patch_size: int, transform) -> None:
    """Square cells of ``patch_size`` pixels over the whole scene, ``id`` from 1."""
    import geopandas
    from shapely.geometry import box

    cells = []
    for row in range(0, size, patch_size):
        for column in range(0, size, patch_size):
            left, top = transform * (column, row)
            right, bottom = transform * (column + patch_size, row + patch_size)
            cells.append(box(left, bottom, right, top))
    ids = {"id": range(1, len(cells) + 1)}
    grid = geopandas.GeoDataFrame(ids, geometry=cells, crs=CRS)
    grid.to_file(path, driver="ESRI Shapefile")


def synthesize_scene(
    folder: str | Path,
    size: int = SIZE,
    seed: int = SEED,
    *,
    date_seed: int = 0,
    classes: int = 6,
    patch_size: int = PATCH_SIZE,
    origin: tuple[float, float] = (431_240.0, 4_912_560.0),
    name: str = "scene",
) -> Scene:
    """Write a Sentinel-2-like scene, its label and a grid of patches.

    Args:
        folder: Made if missing.
        size: Height and width in pixels of 10 m, at least 256.
        seed: Of the ground: the same seed gives the same label.
        date_seed: Of the day: noise, light, haze and growth, on the same ground.
        classes: 6 land covers in the order of ``CLASS_COLORS``, or 2: water is 1 and
            everything else 0.
        patch_size: Side of the grid's square cells in pixels. The grid covers the
            scene, nodata included; its last cells may reach beyond the edge.
        origin: Easting and northing of the upper left corner in metres (``CRS``).
        name: Files are ``NAME.tif``, ``NAME_label.tif`` and ``NAME_grid.shp``.

    Returns:
        The paths. Image: uint16, reflectance x 10,000, nodata 0 in a slanted strip on
        the left and nowhere else. Label: uint8, nodata 255 in the same strip.

    Raises:
        ValueError: ``classes`` is neither 6 nor 2, or ``size`` is below 256.
    """
    import numpy as np
    import rasterio
    from rasterio.transform import from_origin

    if classes not in (2, len(CLASS_COLORS)):
        raise ValueError(f"classes is {classes}, expected 2 or {len(CLASS_COLORS)}")
    if size < 256:
        raise ValueError(f"size is {size} pixels, expected at least 256")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scene = Scene(
        folder / f"{name}.tif",
        folder / f"{name}_label.tif",
        folder / f"{name}_grid.shp",
    )
    profile = {
        "driver": "GTiff",
        "height": size,
        "width": size,
        "crs": CRS,
        "transform": from_origin(*origin, PIXEL, PIXEL),
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
        "zlevel": 1,
        "interleave": "band",
        "bigtiff": "if_safer",
    }
    ground, seen = make_ground(size, seed), swath(size)

    kind = {"count": len(BANDS), "dtype": "uint16", "nodata": 0, "predictor": 2}
    with rasterio.open(scene.image, "w", **profile, **kind) as image:
        image.descriptions = tuple(BANDS)
        for number, band in enumerate(observe(ground, seed, date_seed), start=1):
            image.write(np.where(seen, band, 0).astype(np.uint16), number)

    label = (ground.label == WATER).astype(np.uint8) if classes == 2 else ground.label
    kind = {"count": 1, "dtype": "uint8", "nodata": LABEL_NODATA}
    with rasterio.open(scene.label, "w", **profile, **kind) as target:
        target.write(np.where(seen, label, LABEL_NODATA).astype(np.uint8), 1)
    write_grid(scene.grid, size, patch_size, profile["transform"])
    return scene


# -------------------------------------------------------------------------- the scripts


def run_script(*words: str, **options) -> None:
    """Run a script of the repository as a user would, and show the command.

    Args:
        words: Script and subcommand.
        options: ``name=value`` becomes ``--name value``, and ``name=True`` ``--name``.

    Raises:
        subprocess.CalledProcessError: It did not succeed.
    """
    command = [*words]
    for name, value in options.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    print("\n$ " + shlex.join(["python", *command]), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def extract_train_predict(scene: Scene, output: Path, args: argparse.Namespace) -> None:
    """The three scripts in order; they leave dataset/, models/ and map.tif."""
    run_script(
        "Patch_extraction.py",
        "extract",
        image=scene.image,
        label=scene.label,
        grid=scene.grid,
        output=output / "dataset",
        patch_size=args.patch_size,
        image_channels=len(BANDS),
        train_ratio=0.7,
        val_ratio=0.15,
        test_ratio=0.15,
        seed=args.seed,
        class_names=",".join(CLASS_COLORS),
        class_colors=",".join(CLASS_COLORS.values()),
        save_metadata=True,
    )
    run_script(
        "main.py",
        mode="multiclass",
        classes=len(CLASS_COLORS),
        dataset_root=output / "dataset",
        model="unet",
        encoder_name="resnet18",
        data_augmentation=True,
        epochs=args.epochs,
        batch_size=BATCH_SIZE,
        seed=args.seed,
        save_dir=output / "models",
    )
    run_script(
        "Predict_large_image.py",
        model=output / "models" / "model_final_model.pth",
        input=scene.image,
        output=output / "map.tif",
        save_confidence=True,
    )


# -------------------------------------------------------------------------- the picture


def read_shrunk(path: Path, bands, longest: int = 1600):
    """Bands (bands, h, w), nodata masked, of at most ``longest`` pixels a side."""
    import rasterio

    with rasterio.open(path) as source:
        shrink = max(1, max(source.shape) / longest)
        height, width = (round(side / shrink) for side in source.shape)
        shape = (len(bands), height, width)
        return source.read(bands, out_shape=shape, masked=True)


def true_color(path: Path):
    """Red, green, blue (h, w, 3), each stretched from its 2nd to 98th percentile."""
    import numpy as np

    layers = []
    for band in read_shrunk(path, [3, 2, 1]):
        low, high = np.percentile(band.compressed(), (2, 98))
        layers.append(np.clip((band - low) / (high - low), 0, 1).filled(1))
    return np.stack(layers, axis=-1)


def class_colors(path: Path):
    """A label or map as colours (h, w, 3); nodata is white."""
    import numpy as np
    from matplotlib.colors import to_rgb

    table = np.ones((256, 3))
    table[: len(CLASS_COLORS)] = [to_rgb(color) for color in CLASS_COLORS.values()]
    return table[read_shrunk(path, [1])[0].filled(LABEL_NODATA)]


def score_line(scores: dict) -> str:
    """The test split's scores in one line."""
    measures = {
        "mIoU": "mean_iou",
        "F1": "mean_f1",
        "accuracy": "overall_accuracy",
        "kappa": "kappa",  # None when there is one class only
    }
    values = (
        f"{name} {'-' if scores[key] is None else format(scores[key], '.3f')}"
        for name, key in measures.items()
    )
    return f"test split: {'   '.join(values)}"


def draw_picture(path: Path, scene: Scene, map_path: Path, scores: dict) -> None:
    """Scene, truth, map and confidence; the legend gives the IoU of each class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    confidence = map_path.with_name(f"{map_path.stem}_confidence.tif")
    figure, grid = plt.subplots(2, 2, figsize=(11, 12.5), layout="constrained")
    title = "SemanticSeg4EO on a synthetic Sentinel-2 scene"
    figure.suptitle(f"{title}\n{score_line(scores)}", fontsize=15)
    panels = {
        "Scene (true colour)": true_color(scene.image),
        "Truth": class_colors(scene.label),
        "Map": class_colors(map_path),
        "Confidence (probability of the class)": read_shrunk(confidence, [1])[0],
    }
    for axis, (title, panel) in zip(grid.flat, panels.items()):
        shown = axis.imshow(panel, cmap="viridis", vmin=0, vmax=1)
        axis.set_title(title, fontsize=13)
        axis.set_axis_off()
    figure.colorbar(shown, ax=grid[1, 1], location="bottom", aspect=40, pad=0.01)

    ious = {row["name"]: row["iou"] for row in scores["per_class"]}
    handles = []
    for name, color in CLASS_COLORS.items():
        iou = "absent" if ious.get(name) is None else f"IoU {ious[name]:.2f}"
        text = f"{name.replace('_', ' ')} ({iou})"
        handles.append(Patch(color=color, label=text))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=12)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------- the command line


def build_parser() -> argparse.ArgumentParser:
    """The options of the demo."""
    parser = argparse.ArgumentParser(
        description="Make a scene, run the three scripts on it, draw the result.",
    )
    options = {
        "output": ("demo_output", "folder for everything that is written"),
        "size": (SIZE, "height and width of the scene in pixels"),
        "patch_size": (PATCH_SIZE, "side of the patches in pixels"),
        "epochs": (EPOCHS, "passes over the training patches"),
        "seed": (SEED, "of landscape, split and training"),
    }
    for name, (default, text) in options.items():
        text += " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument(
        "--scene_only",
        action="store_true",
        help="stop after writing image, label and grid",
    )
    return parser


def run_demo(args: argparse.Namespace) -> None:
    """Scene, patches, training, map, picture."""
    output = Path(args.output).resolve()
    if output.is_relative_to(ROOT):  # where the scripts run: shorter commands
        output = output.relative_to(ROOT)
    folder = ROOT / output
    scene = synthesize_scene(folder, args.size, args.seed, patch_size=args.patch_size)
    for path in vars(scene).values():
        print(path)
    if args.scene_only:
        return
    names = (path.name for path in vars(scene).values())
    extract_train_predict(Scene(*(output / name for name in names)), output, args)

    metrics = (folder / "models" / "model_metrics.json").read_text(encoding="utf-8")
    scores = json.loads(metrics)["test"]
    draw_picture(folder / "demo.png", scene, folder / "map.tif", scores)
    print(f"\n{score_line(scores)}")
    for row in scores["per_class"]:
        iou = "absent" if row["iou"] is None else f"{row['iou']:.3f}"
        print(f"  IoU {row['name']:10s} {iou}")
    print(folder / "demo.png")


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 done, 1 could not be done, 2 wrong command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.size < 256:
        parser.error(f"--size is {args.size} pixels, expected at least 256")
    if not 32 <= args.patch_size <= args.size // 4:  # or a split may stay empty
        span = f"32 to {args.size // 4}, a quarter of --size"
        parser.error(f"--patch_size is {args.patch_size} pixels, expected {span}")
    for name, least in (("epochs", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}, expected {least} or more")
    try:
        run_demo(args)
    except subprocess.CalledProcessError as error:
        script, status = error.cmd[1], error.returncode
        print(f"error: {script} ended with status {status}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
