"""Made data of five kinds, as people have them, for the walks of docs/walks.md.

Each function fills a folder; grounds, materials and days are those of the demo. Bands are
arrays (H, W) of 10 m pixels, where nothing else is said.
"""

from __future__ import annotations

import sys
from itertools import combinations, product
from pathlib import Path

import cv2
import geopandas
import numpy as np
import rasterio
from rasterio.features import shapes
from rasterio.transform import from_origin
from shapely.geometry import box, shape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.demo import (
    BANDS,
    CLASS_COLORS,
    CROP,
    CRS,
    MATERIAL,
    PIXEL,
    Ground,
    fractal_noise,
    grain,
    make_ground,
    observe,
    parcels,
)

CORNER = (431_220.0, 4_912_560.0)
NAMES = [name.replace("_", " ") for name in CLASS_COLORS]
CODES = (80, 10, 30, 40, 60, 50)  # of ESA WorldCover, in the order of NAMES
CROPS = """alfalfa; apples; barley, spring; barley, winter; beans, dry; beans, green; buckwheat
carrots; cherries; clover; fallow; fennel; flax; grapes, table; grapes, wine; hemp; hops; lentils
lupins; maize, grain; maize, silage; mustard; oats; onions; peas; potatoes; rapeseed; rye; sorghum
soybeans; spelt; sugar beet; sunflowers; tobacco; wheat, durum; wheat, soft"""
PRODUCT = "S2A_MSIL2A_20210619T101031_N0500_R022_T31TDL_20230102T030405.SAFE"
DATES = ("20210412", "20210522", "20210611", "20210706", "20210815", "20210915")
BOX, CELL = 128, 64  # pixels


def write_raster(path: Path, bands, metres=PIXEL, **more) -> None:
    """Bands (H, W) of one type as a raster with its place on the ground."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = np.stack(bands)
    kind = {"driver": "GTiff", "compress": "deflate", "tiled": True}
    if path.suffix == ".jp2":
        kind = {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES"}
    place = {"crs": CRS, "transform": from_origin(*CORNER, metres, metres)}
    count, height, width = bands.shape
    size = {"count": count, "height": height, "width": width, "dtype": bands.dtype}
    names = more.pop("names", ())
    with rasterio.open(path, "w", **kind, **place, **size, **more) as target:
        target.write(bands)
        if names:
            target.descriptions = tuple(names)


def areas_of(classes, names) -> geopandas.GeoDataFrame:
    """The connected areas of a raster of classes, with the name of each as ``class``."""
    transform = from_origin(*CORNER, PIXEL, PIXEL)
    found = list(shapes(classes.astype(np.int32), transform=transform))
    texts = [names[int(value)] for _, value in found]
    outlines = [shape(outline) for outline, _ in found]
    return geopandas.GeoDataFrame({"class": texts}, geometry=outlines, crs=CRS)


def cells_over(corner, count: int, side: int) -> list:
    """``count`` x ``count`` squares of ``side`` pixels from a pixel (row, column) on."""
    places = product(range(count), repeat=2)
    corners = [(corner[0] + side * row, corner[1] + side * col) for row, col in places]
    left, top = CORNER
    return [
        box(*(left + PIXEL * col, top - PIXEL * (row + side)),
            *(left + PIXEL * (col + side), top - PIXEL * row))
        for row, col in corners
    ]  # fmt: skip


# --- a Sentinel-2 product with polygons -----------------------------------------------------


def make_polygons(folder: Path, size=540, seed=11) -> None:
    """An L2A product with a few clouds; polygons with texts to learn from, others to check."""
    rng = np.random.default_rng(seed)
    ground = make_ground(size, seed)
    cloud = fractal_noise(rng, size, 160, 4) > 1.9
    shadow = np.roll(cloud, (12, 9), (0, 1)) & ~cloud
    bands = {}
    for name, pixels in zip(BANDS, observe(ground, seed, 0)):
        seen = np.where(shadow, pixels * 0.5, pixels)
        bands[name.split()[0]] = np.where(cloud, 7000 + 0.1 * pixels, seen)
    bands |= {
        "B01": bands["B02"],
        "B09": bands["B8A"],
    }  # for the product to be complete
    write_product(folder / PRODUCT, bands, np.where(cloud, 9, np.where(shadow, 3, 4)))

    areas = areas_of(ground.label, NAMES)
    areas["geometry"] = areas.buffer(-2 * PIXEL)  # nobody draws along pixels
    areas = areas.explode(ignore_index=True)
    areas = areas[areas.area > 5_000].rename(columns={"class": "cover"})
    areas = areas.to_crs("EPSG:4326")
    check = areas.groupby("cover").sample(frac=1 / 3, random_state=seed)
    areas.drop(check.index).to_file(folder / "survey.gpkg")
    check.to_file(folder / "check.gpkg")


def write_product(folder: Path, bands: dict, classes) -> None:
    """The files of a Sentinel-2 L2A product that count, whose pixels hold the offset of 1000."""
    tile, start = PRODUCT.split("_")[5], PRODUCT.split("_")[2]
    inside = folder / "GRANULE" / f"L2A_{tile}_A031291_{start}" / "IMG_DATA"
    resolutions = {name.split()[0]: metres for name, metres in BANDS.items()}
    for name, pixels in bands.items():
        metres = resolutions.get(name, 60)
        side = round(len(pixels) * PIXEL / metres)
        coarse = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
        path = inside / f"R{metres}m" / f"{tile}_{start}_{name}_{metres}m.jp2"
        write_raster(path, [np.rint(coarse + 1000).astype(np.uint16)], metres)
    path = inside / "R20m" / f"{tile}_{start}_SCL_20m.jp2"
    write_raster(path, [classes[::2, ::2].astype(np.uint8)], 20)
    offsets = "".join(
        f'<BOA_ADD_OFFSET band_id="{number}">-1000</BOA_ADD_OFFSET>'
        for number in range(13)
    )
    (folder / "MTD_MSIL2A.xml").write_text(
        f"<Product><PRODUCT_URI>{PRODUCT}</PRODUCT_URI>"
        "<PRODUCT_START_TIME>2021-06-19T10:10:31.024Z</PRODUCT_START_TIME>"
        f"<SPACECRAFT_NAME>Sentinel-2A</SPACECRAFT_NAME>{offsets}</Product>"
    )


# --- six dates of one place -----------------------------------------------------------------


def make_dates(folder: Path, size=384, seed=5) -> None:
    """A scene of each date, with clouds as nodata, and one label for all."""
    ground = make_ground(size, seed)
    for day, date in enumerate(DATES):
        rng = np.random.default_rng([seed, day])
        clear = fractal_noise(rng, size, 150, 4) < 1.5
        gains = rng.uniform(0.85, 1.15, len(BANDS))  # of the season
        bands = [
            np.where(clear, np.maximum(pixels * gain, 1), 0).astype(np.uint16)
            for pixels, gain in zip(observe(ground, seed, day), gains)
        ]
        path = folder / "scenes" / f"{date}.tif"
        write_raster(path, bands, nodata=0, names=BANDS)
    write_raster(folder / "label.tif", [ground.label], nodata=255)


# --- buildings in pictures of a drone, in two countries -------------------------------------


def make_drone(folder: Path, count=18, size=192) -> None:
    """Pictures without a location and their masks (255 is building) of two countries."""
    tiles, metal = [(150, 70, 55), (120, 60, 50), (105, 100, 98)], [(190, 195, 205)]
    for country, (pictures, roofs) in {
        "home": (count, tiles),
        "abroad": (count // 3, tiles[1:] + metal),
    }.items():
        for number in range(pictures):
            rng = np.random.default_rng([pictures, number])
            image, mask = draw_village(rng, size, np.array(roofs, np.float32))
            for name, pixels in (("images/{}.jpg", image), ("masks/{}.png", mask)):
                path = folder / country / name.format(f"site_{number + 1:02}")
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), pixels)


def draw_village(rng, size: int, roofs):
    """Roofs with shadows on grass and soil: BGR (H, W, 3) and mask (H, W), both uint8."""
    soil = np.clip(0.5 + 0.5 * fractal_noise(rng, size, 60), 0, 1)[..., None]
    image = soil * (150, 130, 105) + (1 - soil) * (70, 105, 60)
    mask = np.zeros((size, size), np.uint8)
    turn = rng.uniform(0, 90)
    for place in product(range(24, size, 48), repeat=2):
        if rng.uniform() < 0.3:
            continue
        centre = np.array(place) + rng.uniform(-8, 8, 2)
        sides, roof = rng.uniform(16, 36, 2), roofs[rng.integers(len(roofs))]
        corners = cv2.boxPoints((centre.tolist(), sides.tolist(), turn))
        cv2.fillPoly(image, [np.int32(corners + 4)], (45, 50, 45))  # the shadow
        tone = roof * rng.uniform(0.85, 1.15)
        cv2.fillPoly(image, [np.int32(corners)], tone.tolist())
        half = np.array([*corners[:2], *(corners[[1, 0]] + corners[[2, 3]]) / 2])
        cv2.fillPoly(image, [np.int32(half)], (tone * 0.85).tolist())
        cv2.fillPoly(mask, [np.int32(corners)], 255)
    image = image + 7 * grain(rng, size, 0.7)[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)[..., ::-1], mask


# --- fields with 36 names of crops ----------------------------------------------------------


def make_crops(folder: Path, size=768, seed=3) -> None:
    """Fields with the text of their crop, a list of those that count, a QGIS style of them."""
    names = [name.strip() for name in CROPS.replace("\n", ";").split(";")]
    rng = np.random.default_rng(seed)
    field, _, margin = parcels(rng, size)
    crop = rng.integers(len(names), size=65536)
    materials = [MATERIAL[name] for name in (
        "wheat", "rapeseed", "maize", "clover", "lush grass", "dry grass", "pale soil", "dark soil",
        "broadleaf",
    )]  # fmt: skip
    pairs = np.array(list(combinations(materials, 2)), np.uint8)  # 36 of them
    cover, under = pairs[crop[field]].transpose(2, 0, 1)
    share = np.clip(0.6 + 0.04 * fractal_noise(rng, size, 40), 0, 1)
    shade = rng.uniform(0.92, 1.08, 65536).astype(np.float32)[field]
    ground = Ground.blank(size)
    ground.paint(np.full_like(margin, True), CROP, cover, under, share, shade)
    bands = list(observe(ground, seed, 0))
    write_raster(folder / "scene.tif", bands, nodata=0, names=BANDS)

    fields = areas_of(field, np.array(names)[crop])
    fields["geometry"] = fields.buffer(-PIXEL)
    fields = fields[fields.area > 10_000].rename(columns={"class": "crop"})
    fields.to_file(folder / "fields.gpkg")
    chosen = names[:-4]  # the last ones become "other crop"
    (folder / "crops.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    write_style(folder / "crops.qml", chosen)


def write_style(path: Path, names: list[str]) -> None:
    """A colour for each text, as QGIS stores the style of a layer."""
    hues = np.linspace(0, 179, len(names), endpoint=False)
    hsv = [(hue, 200 - 80 * (n % 2), 230 - 45 * (n % 3)) for n, hue in enumerate(hues)]
    colours = cv2.cvtColor(np.array([hsv], np.uint8), cv2.COLOR_HSV2RGB)[0]
    categories, symbols = [], []
    for number, (name, (r, g, b)) in enumerate(zip(names, colours)):
        categories.append(
            f'<category symbol="{number}" value="{name}" label="{name}"/>'
        )
        fill = f'<Option name="color" type="QString" value="{r},{g},{b},255"/>'
        layer = f'<layer class="SimpleFill"><Option type="Map">{fill}</Option></layer>'
        symbols.append(f'<symbol name="{number}" type="fill">{layer}</symbol>')
    path.write_text(
        '<qgis><renderer-v2 type="categorizedSymbol" attr="crop">'
        f"<categories>{''.join(categories)}</categories>"
        f"<symbols>{''.join(symbols)}</symbols></renderer-v2></qgis>",
        encoding="utf-8",
    )


# --- labels in eleven boxes -----------------------------------------------------------------


def make_boxes(folder: Path, size=768, seed=8) -> None:
    """A scene with codes in eleven boxes, cells with their role, and the truth elsewhere."""
    ground = make_ground(size, seed)
    bands = list(observe(ground, seed, 0))
    write_raster(folder / "scene.tif", bands, nodata=0, names=BANDS)
    codes = np.array(CODES, np.uint8)[ground.label]
    write_raster(folder / "truth.tif", [codes], nodata=0)

    rng = np.random.default_rng(seed)
    step = size // 4
    grid = list(product(range(0, size, step), range(0, size - step, step + step // 3)))
    corners = [np.add(place, rng.integers(step - BOX, size=2)) for place in grid[:11]]
    roles = rng.permutation(["training"] * 7 + ["val"] * 2 + ["Test"] * 2)
    label, rows = np.zeros_like(codes), []
    for number, (corner, role) in enumerate(zip(corners, roles), start=1):
        row, column = corner
        window = slice(row, row + BOX), slice(column, column + BOX)
        label[window] = codes[window]
        cells = cells_over(corner, BOX // CELL, CELL)
        rows += [{"box": number, "role": role, "geometry": cell} for cell in cells]
    write_raster(folder / "label.tif", [label], nodata=0)
    geopandas.GeoDataFrame(rows, crs=CRS).to_file(folder / "cells.gpkg")


def fill_in_boxes(folder: Path) -> None:
    """The sample with the truth as ``reference``, as somebody would fill it in in QGIS."""
    points = geopandas.read_file(folder / "sample.gpkg", layer="sample")
    with rasterio.open(folder / "truth.tif") as truth:
        places = zip(points.geometry.x, points.geometry.y)
        codes = [int(value) for (value,) in truth.sample(places)]
    names = dict(zip(CODES, NAMES))
    points["reference"] = [names[code] for code in codes]
    points.loc[points["id"] % 40 == 0, "reference"] = None  # which nobody could tell
    points.to_file(folder / "referenced.gpkg")


MAKERS = {
    "polygons": make_polygons,
    "dates": make_dates,
    "drone": make_drone,
    "crops": make_crops,
    "boxes": make_boxes,
}
