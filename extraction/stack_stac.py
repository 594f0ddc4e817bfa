"""STAC items as catalogues hand them out: assets beside the item or on a server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from common.errors import RasterError
from extraction.stack_bands import QA_PIXEL, SCL, Band, MaskLayer, Product
from extraction.stack_sentinel2 import DEFAULT, RESOLUTIONS

# the bands of Sentinel-2 by the words of catalogues, old and new
SENTINEL2 = {
    "coastal": "B01", "blue": "B02", "green": "B03", "red": "B04", "rededge1": "B05",
    "rededge071": "B05", "rededge2": "B06", "rededge075": "B06", "rededge3": "B07",
    "rededge078": "B07", "nir": "B08", "nir08": "B8A", "nir09": "B09", "cirrus": "B10",
    "swir16": "B11", "swir22": "B12",
}  # fmt: skip
NOT_REFLECTIVE = re.compile(r"pan|cirrus|lwir\w*", re.IGNORECASE)
SERVERS = {"http": "/vsicurl/", "https": "/vsicurl/", "s3": "/vsis3/", "gs": "/vsigs/"}
RASTER_TYPE = re.compile(r"image/(tiff|jp2|vnd\.stac\.geotiff)", re.IGNORECASE)
RASTER_FILE = re.compile(r".*\.(tiff?|jp2|vrt)", re.IGNORECASE)
# behind a catalogue's prefix: the offset that an item states is undone in its pixels already
OFFSET_APPLIED = "boa_offset_applied"
QUANTIFICATION = 0.0001  # of a whole number of Sentinel-2 whose scale is not stated


class Asset(NamedTuple):
    """A band of an asset, with all that the item says of it."""

    key: str
    href: str
    number: int
    count: int  # bands of the asset
    facts: dict  # of asset and band together, without prefixes as eo: and raster:
    roles: tuple[str, ...]

    def fact(self, *names: str):
        return next(
            (self.facts[n] for n in names if self.facts.get(n) is not None), None
        )

    @property
    def resolution(self) -> float | None:
        """Metres of a pixel, where the item says it."""
        if found := re.search(r"_(\d+)m$", self.key):
            return float(found[1])
        transform = self.fact("transform")
        stated = self.fact("spatial_resolution", "gsd")
        return stated or (abs(transform[0]) if transform else None)


def read_items(path: str) -> list[Product]:
    """The items of a file: one, or those of a collection of features.

    Raises:
        RasterError: It is no STAC item.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise RasterError(
            f"{path} is no JSON ({error}); download the item again"
        ) from error
    content = content if isinstance(content, dict) else {}
    items = content.get("features", [content])
    if not items or not all(isinstance(i, dict) and i.get("assets") for i in items):
        raise RasterError(
            f"{path} is no STAC item: it has no assets; give an item's JSON"
        )
    return [read_item(item, path) for item in items]


def read_item(item: dict, path: str) -> Product:
    """The bands that an item's assets hold."""
    facts = item.get("properties", {})
    platform = str(facts.get("platform") or facts.get("constellation") or "")
    sentinel2 = platform.lower().startswith("sentinel-2")
    assets = list(list_assets(item, path))
    if sentinel2:
        bands, aliases = sentinel2_bands(assets)
        default, expected = DEFAULT, tuple(RESOLUTIONS)
    else:
        bands, aliases, default = other_bands(assets)
        expected = ()
    name = str(item.get("id") or Path(path).stem)
    if not bands:
        raise RasterError(f"{path}: no asset of {name} is a raster; give another item")
    return Product(
        name=name,
        kind="STAC item",
        bands=bands,
        default=default,
        expected=expected,
        aliases=aliases,
        sensor=platform or None,
        acquired=str(facts.get("datetime") or facts.get("start_datetime") or "")[:10]
        or None,
        tile=tile_of(facts) or name,
        mask=mask_of(assets),
        no_mask="has no asset scl or qa_pixel; give one with --mask",
        doubtful=sentinel2,
    )


def list_assets(item: dict, path: str) -> Iterator[Asset]:
    """Every band of every raster of an item."""
    shared = item.get("properties", {})
    for key, asset in item["assets"].items():
        href, kind = str(asset.get("href", "")), str(asset.get("type", ""))
        file = RASTER_FILE.fullmatch(urlsplit(href).path)
        if not href or not (RASTER_TYPE.match(kind) or (file and not kind)):
            continue
        lists = [asset.get(n) or [] for n in ("bands", "eo:bands", "raster:bands")]
        count = max(1, *map(len, lists))
        for index in range(count):
            applied = {k: v for k, v in shared.items() if k.endswith(OFFSET_APPLIED)}
            own = {"gsd": shared.get("gsd")} | applied | asset
            for described in lists:
                own |= described[index] if index < len(described) else {}
            facts = {name.rpartition(":")[2]: value for name, value in own.items()}
            roles = tuple(asset.get("roles") or ())
            yield Asset(key, resolve(href, path), index + 1, count, facts, roles)


def resolve(href: str, path: str) -> str:
    """What GDAL opens an asset by; relative hrefs are beside the item."""
    scheme, server, place, *_ = urlsplit(href)
    if scheme in ("http", "https"):
        return SERVERS[scheme] + href
    if scheme in SERVERS:
        return f"{SERVERS[scheme]}{server}{place}"
    if scheme == "file":
        return unquote(place)
    return href if href.startswith("/vsi") else str(Path(path).absolute().parent / href)


def sentinel2_bands(assets: list[Asset]) -> tuple[dict[str, Band], dict[str, str]]:
    """Bands as B04, each from the asset of its own resolution, and the other words for them."""
    found: dict[str, Asset] = {}
    aliases: dict[str, str] = {}
    for asset in assets:
        name = sentinel2_name(asset)
        if asset.count > 1 or name is None:
            continue
        aliases |= {word: name for word in words_of(asset) if word.lower() != "rededge"}
        native = asset.resolution == RESOLUTIONS[name]
        if name not in found or (
            native and found[name].resolution != RESOLUTIONS[name]
        ):
            found[name] = asset
    bands = {}
    for name in (name for name in RESOLUTIONS if name in found):
        asset = found[name]
        scale, offset = asset.fact("scale"), asset.fact("offset")
        added = round(float(offset or 0) / float(scale or QUANTIFICATION))
        if asset.fact(OFFSET_APPLIED):
            added = 0
        nodata = asset.fact("nodata")
        nodata = float(nodata) if isinstance(nodata, int | float) else 0
        bands[name] = Band(name, asset.href, 1, added, nodata, sentinel2=True)
    return bands, aliases


def sentinel2_name(asset: Asset) -> str | None:
    """What a Sentinel-2 product calls the band of an asset."""
    for word in (asset.key, str(asset.fact("name") or "")):
        if found := re.match(r"B0?(\d{1,2})(A?)(?![A-Z0-9])", word, re.IGNORECASE):
            name = f"B{found[1]}A" if found[2] else f"B{int(found[1]):02}"
            return name if name in RESOLUTIONS else None
    for word in words_of(asset):
        if word.lower() in SENTINEL2:
            return SENTINEL2[word.lower()]
    return None


def words_of(asset: Asset) -> list[str]:
    """What an item calls a band: the asset's key, the band's name and common name."""
    words = [asset.key, asset.fact("name"), asset.fact("common_name")]
    return [str(word) for word in words if word]


def other_bands(
    assets: list[Asset],
) -> tuple[dict[str, Band], dict[str, str], tuple[str, ...]]:
    """Bands by key, other words for them, and which are taken unless others are named."""
    bands, aliases, spectral = {}, {}, []
    for asset in assets:
        word = asset.fact("common_name")
        name = asset.key
        if asset.count > 1:
            name = str(asset.fact("name") or f"{asset.key}_{asset.number}")
        data = not asset.roles or {"data", "reflectance"} & set(asset.roles)
        if name in bands or not data:
            continue
        nodata = asset.fact("nodata")
        nodata = float(nodata) if isinstance(nodata, int | float) else None
        scale, offset = asset.fact("scale"), asset.fact("offset")
        scaling = None
        if scale is not None or offset is not None:
            scaling = float(1 if scale is None else scale), float(offset or 0)
        bands[name] = Band(name, asset.href, asset.number, 0, nodata, scaling)
        for other in words_of(asset):
            aliases.setdefault(other, name)
        if word and not NOT_REFLECTIVE.fullmatch(str(word)):
            spectral.append(name)
    return bands, aliases, tuple(spectral or bands)


def mask_of(assets: list[Asset]) -> MaskLayer | None:
    """The cloud mask of an item: ``scl``, the finest one, or ``qa_pixel``."""
    keys = {asset.key.lower(): asset for asset in reversed(assets)}
    for key in ("scl", "scl_20m", "scl_60m"):
        if key in keys:
            return MaskLayer(keys[key].href, SCL)
    if "qa_pixel" in keys:
        return MaskLayer(keys["qa_pixel"].href, QA_PIXEL)
    return None


def tile_of(facts: dict) -> str | None:
    """The tile or the path and row that an item's properties state."""
    if path := facts.get("landsat:wrs_path"):
        return f"{int(path):03}{int(facts.get('landsat:wrs_row') or 0):03}"
    code = str(facts.get("s2:mgrs_tile") or facts.get("grid:code") or "")
    code = code.removeprefix("MGRS-")
    if found := re.fullmatch(r"T?(\d{1,2})([A-Z]{3})", code):
        return f"T{int(found[1]):02}{found[2]}"
    return None
