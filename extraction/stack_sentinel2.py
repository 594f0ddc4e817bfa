"""Sentinel-2 L1C and L2A products, old and compact ones: bands, offsets, cloud layers."""

from __future__ import annotations

import re
from collections import defaultdict
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from common.errors import RasterError
from common.mask_options import MaskRule
from extraction.stack_bands import SCL, Band, MaskLayer, Product
from extraction.stack_files import ProductFiles

# metres of a pixel of each band, in the order of the band numbers of the metadata
RESOLUTIONS = {
    "B01": 60, "B02": 10, "B03": 10, "B04": 10, "B05": 20, "B06": 20, "B07": 20, "B08": 10,
    "B8A": 20, "B09": 60, "B10": 60, "B11": 20, "B12": 20,
}  # fmt: skip
DEFAULT = tuple(name for name, metres in RESOLUTIONS.items() if metres < 60)
METADATA = r"(?P<folder>(?:[^/]+/)?)(?:MTD_MSI|S2\w_(?:OPER|USER)_MTD_SAF)L(?P<level>1C|2A)\w*\.xml"
OFFSET_TAGS = {"1C": "RADIO_ADD_OFFSET", "2A": "BOA_ADD_OFFSET"}
PIXELS = r"GRANULE/(?P<granule>[^/]+)/IMG_DATA/.*?(?P<band>B(?:\d\d|8A))(?:_(?P<metres>\d\d)m)?\.jp2"
L1C_CLOUDS = MaskRule(keep=(0,))


def read_sentinel2(files: ProductFiles, metadata: re.Match) -> list[Product]:
    """The products of a metadata file: one, or one for each granule of an old product.

    Args:
        files: Of the product.
        metadata: The name that ``METADATA`` matched.

    Raises:
        RasterError: The metadata or all images are missing.
    """
    name, folder, level = metadata[0], metadata["folder"], metadata["level"]
    try:
        root = ElementTree.fromstring(files.read(name))
    except ElementTree.ParseError as error:
        raise RasterError(
            f"{name} of {files.path} is incomplete ({error}); download it again"
        ) from error
    granules: dict[str, dict[str, str]] = defaultdict(dict)
    for found in files.find(re.escape(folder) + PIXELS):
        band, metres = found["band"], found["metres"]
        if metres is None or int(metres) == RESOLUTIONS[band]:
            granules[found["granule"]][band] = files.gdal_path(found[0])
    if not granules:
        raise RasterError(
            f"{files.path} holds the metadata of a Sentinel-2 product, but no images; download it "
            "again"
        )
    offsets = stated_offsets(root, OFFSET_TAGS[level])
    uri = text_of(root, "PRODUCT_URI", "PRODUCT_URI_2A", "PRODUCT_URI_1C")
    product = (uri or folder.strip("/") or files.path.name).removesuffix(".SAFE")
    expected = tuple(b for b in RESOLUTIONS if level == "1C" or b != "B10")
    return [
        Product(
            name=product,
            kind=f"Sentinel-2 L{level}",
            bands={
                band: Band(band, paths[band], 1, offsets.get(band, 0), 0, sentinel2=True)
                for band in RESOLUTIONS
                if band in paths
            },
            default=DEFAULT,
            expected=expected,
            sensor=text_of(root, "SPACECRAFT_NAME") or "Sentinel-2",
            acquired=(text_of(root, "PRODUCT_START_TIME") or "")[:10] or None,
            tile=tile_of(granule),
            mask=cloud_layer(files, f"{folder}GRANULE/{granule}/", level),
            no_mask="has no cloud layer as a raster (L1C products have one from baseline 04.00 "
            "on); give one with --mask",
        )
        for granule, paths in sorted(granules.items())
    ]  # fmt: skip


def text_of(root: Element, *tags: str) -> str | None:
    """The text of the first element with one of some names."""
    for tag in tags:
        for element in root.iter(tag):
            if element.text and element.text.strip():
                return element.text.strip()
    return None


def tile_of(granule: str) -> str | None:
    """As T32TQR, from the name of a granule."""
    found = re.search(r"_(T\d{2}[A-Z]{3})(?:_|$)", granule)
    return found and found[1]


def stated_offsets(root: Element, tag: str) -> dict[str, int]:
    """What the metadata say is to be added to each band; nothing before baseline 04.00."""
    names = dict(enumerate(RESOLUTIONS))
    for element in root.iter("Spectral_Information"):
        physical = element.get("physicalBand", "")
        if found := re.fullmatch(r"B(\d+)(A?)", physical):
            name = f"B{found[1]}A" if found[2] else f"B{int(found[1]):02}"
            names[int(element.get("bandId"))] = name
    return {
        names[int(element.get("band_id"))]: round(float(element.text))
        for element in root.iter(tag)
    }


def cloud_layer(files: ProductFiles, granule: str, level: str) -> MaskLayer | None:
    """The scene classification of L2A, or the clouds of L1C."""
    inside = re.escape(granule)
    if level == "2A":
        found = files.find(rf"{inside}.*_SCL_(?:.*_)?20m\.jp2")
        return MaskLayer(files.gdal_path(found[0][0]), SCL) if found else None
    found = files.find(rf"{inside}QI_DATA/.*MSK_CLASSI_B00\.jp2")
    if not found:
        return None
    remark = "clouds and cirrus of MSK_CLASSI; cloud shadows are not in it"
    # opaque clouds, cirrus; the third band is snow
    return MaskLayer(files.gdal_path(found[0][0]), L1C_CLOUDS, (1, 2), remark)
