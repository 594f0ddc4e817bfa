"""Small products with the structure of real ones: real JPEG 2000 and GeoTIFF, real metadata."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

import Patch_extraction
from extraction.stack_sentinel2 import RESOLUTIONS

CRS = "EPSG:32632"
CORNER = (699960.0, 4900020.0)
SIDE = 480  # metres of a tile: 48, 24 or 8 pixels
DATE = "2021-06-19"
L2A_NAME = "S2A_MSIL2A_20210619T101031_N0500_R022_T32TQR_20230102T030405.SAFE"
L1C_NAME = "S2A_MSIL1C_20210619T101031_N0500_R022_T32TQR_20230102T030405.SAFE"


def write_band(path: Path, pixels: np.ndarray, metres: float, **more) -> Path:
    """A lossless JPEG 2000, or by the name a GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    jp2 = {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES"}
    kind = jp2 if path.suffix == ".jp2" else {"driver": "GTiff"}
    pixels = np.atleast_3d(pixels.T).T  # (C, H, W)
    count, height, width = pixels.shape
    left, top = more.pop("corner", CORNER)
    profile = {
        "width": width, "height": height, "count": count, "dtype": pixels.dtype, "crs": CRS,
        "transform": from_origin(left, top, metres, metres),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile | kind | more) as file:
        file.write(pixels)
    return path


def band_pixels(name: str, metres: int, seed: int = 0, low: int = 900) -> np.ndarray:
    """Pixels of a band, with two that an offset of 1000 takes to 0 and below, and some nodata."""
    side = SIDE // metres
    rng = np.random.default_rng([seed, *name.encode()])
    pixels = rng.integers(low, 5000, (side, side)).astype(np.uint16)
    pixels[0, :2] = low, 1000
    pixels[:, side // 2 : side // 2 + 1] = 0  # a column of nodata
    pixels[-1, -1] = 0
    return pixels


def undone(pixels: np.ndarray, offset: int = -1000) -> np.ndarray:
    """What the scene shall hold."""
    moved = np.maximum(pixels.astype(np.int64) + offset, 1)
    return np.where(pixels == 0, 0, moved)


def scene_classes() -> np.ndarray:
    """An SCL of 24 x 24 pixels of 20 m: vegetation, a cloud, its shadow, snow, nodata."""
    classes = np.full((24, 24), 4, np.uint8)
    classes[4:6, 4:6], classes[8, 8], classes[10, 10], classes[20, 2] = 9, 3, 11, 10
    classes[:, 23], classes[0, 0], classes[2, 20] = 0, 1, 8
    return classes


def write_l2a(
    folder: Path, name: str = L2A_NAME, offset: int | None = -1000, seed: int = 0
) -> Path:
    """A compact L2A product; its .SAFE."""
    product = folder / name
    tile, start = name.split("_")[5], name.split("_")[2]
    granule = f"GRANULE/L2A_{tile}_A031291_{start}"
    stem = f"{tile}_{start}"
    files = []
    for band, native in RESOLUTIONS.items():
        if band == "B10":
            continue
        for metres in (10, 20, 60):  # also where it is not the band's own
            if metres < native or (band == "B08" and metres > 10):
                continue
            pixels = band_pixels(band, metres, seed if metres == native else seed + 99)
            inside = f"{granule}/IMG_DATA/R{metres}m/{stem}_{band}_{metres}m"
            write_band(product / f"{inside}.jp2", pixels, metres)
            files.append(inside)
    inside = f"{granule}/IMG_DATA/R20m/{stem}_SCL_20m"
    write_band(product / f"{inside}.jp2", scene_classes(), 20)
    files.append(inside)
    write_metadata(product, "2A", files, granule, offset)
    return product


def write_l1c(
    folder: Path, name: str = L1C_NAME, offset: int | None = -1000, clouds: bool = True
) -> Path:
    """A compact L1C product; with ``clouds`` as from baseline 04.00 on."""
    product = folder / name
    tile, start = name.split("_")[5], name.split("_")[2]
    granule = f"GRANULE/L1C_{tile}_A031291_{start}"
    files = []
    for band, metres in RESOLUTIONS.items():
        inside = f"{granule}/IMG_DATA/{tile}_{start}_{band}"
        write_band(product / f"{inside}.jp2", band_pixels(band, metres), metres)
        files.append(inside)
    if clouds:
        mask = np.zeros((3, 8, 8), np.uint8)
        mask[0, 1, 1] = mask[1, 2, 2] = mask[2, 3, 3] = 1  # opaque, cirrus, snow
        path = product / granule / "QI_DATA" / "MSK_CLASSI_B00.jp2"
        write_band(path, mask, 60)
    else:
        path = product / granule / "QI_DATA" / "MSK_CLOUDS_B00.gml"
        path.parent.mkdir(parents=True)
        path.write_text("<gml/>")
    write_metadata(product, "1C", files, granule, offset)
    return product


def write_metadata(
    product: Path, level: str, files: list[str], granule: str, offset: int | None
) -> None:
    """The metadata of product and granule, of which the SENTINEL2 driver of GDAL needs more."""
    start = product.name.split("_")[2]
    tile = product.name.split("_")[5]
    moment = f"{start[:4]}-{start[4:6]}-{start[6:8]}T10:10:31.024Z"
    listed = "".join(f"<IMAGE_FILE>{file}</IMAGE_FILE>" for file in files)
    outer, inner = {
        "1C": ("Radiometric_Offset_List", "RADIO_ADD_OFFSET"),
        "2A": ("BOA_ADD_OFFSET_VALUES_LIST", "BOA_ADD_OFFSET"),
    }[level]
    numbers = range(13 if offset is not None else 0)
    offsets = "".join(f'<{inner} band_id="{n}">{offset}</{inner}>' for n in numbers)
    quantification = {
        "1C": '<QUANTIFICATION_VALUE unit="none">10000</QUANTIFICATION_VALUE>',
        "2A": "<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE>10000"
        "</BOA_QUANTIFICATION_VALUE></QUANTIFICATION_VALUES_LIST>",
    }[level]
    spectral = "".join(
        f'<Spectral_Information bandId="{n}" physicalBand="{band.replace("B0", "B")}">'
        f"<RESOLUTION>{metres}</RESOLUTION></Spectral_Information>"
        for n, (band, metres) in enumerate(RESOLUTIONS.items())
    )
    space = f"https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_Level-{level}.xsd"
    (product / f"MTD_MSIL{level}.xml").write_text(
        f'<?xml version="1.0" encoding="UTF-8"?>\n<n1:Level-{level}_User_Product '
        f'xmlns:n1="{space}"><n1:General_Info><Product_Info>'
        f"<PRODUCT_START_TIME>{moment}</PRODUCT_START_TIME>"
        f"<PRODUCT_STOP_TIME>{moment}</PRODUCT_STOP_TIME>"
        f"<PRODUCT_URI>{product.name}</PRODUCT_URI>"
        f"<PROCESSING_LEVEL>Level-{level}</PROCESSING_LEVEL>"
        f"<PRODUCT_TYPE>S2MSI{level}</PRODUCT_TYPE>"
        '<Datatake datatakeIdentifier="GS2A"><SPACECRAFT_NAME>Sentinel-2A</SPACECRAFT_NAME>'
        "</Datatake><Query_Options><PRODUCT_FORMAT>SAFE_COMPACT</PRODUCT_FORMAT></Query_Options>"
        "<Product_Organisation><Granule_List>"
        f'<Granule granuleIdentifier="S2A_OPER_MSI_L{level}_TL_A031291_{tile}_N05.00" '
        f'imageFormat="JPEG2000">{listed}</Granule></Granule_List></Product_Organisation>'
        "</Product_Info><Product_Image_Characteristics><Special_Values>"
        "<SPECIAL_VALUE_TEXT>NODATA</SPECIAL_VALUE_TEXT>"
        "<SPECIAL_VALUE_INDEX>0</SPECIAL_VALUE_INDEX></Special_Values>"
        f"{quantification}<{outer}>{offsets}</{outer}>"
        f"<Spectral_Information_List>{spectral}</Spectral_Information_List>"
        f"</Product_Image_Characteristics></n1:General_Info></n1:Level-{level}_User_Product>"
    )
    sizes = "".join(
        f'<Size resolution="{m}"><NROWS>{SIDE // m}</NROWS><NCOLS>{SIDE // m}</NCOLS></Size>'
        f'<Geoposition resolution="{m}"><ULX>{CORNER[0]:.0f}</ULX><ULY>{CORNER[1]:.0f}</ULY>'
        f"<XDIM>{m}</XDIM><YDIM>-{m}</YDIM></Geoposition>"
        for m in (10, 20, 60)
    )
    (product / granule / "MTD_TL.xml").write_text(
        f'<?xml version="1.0" encoding="UTF-8"?>\n<n1:Level-{level}_Tile_ID '
        f'xmlns:n1="{space}"><n1:Geometric_Info><Tile_Geocoding>'
        "<HORIZONTAL_CS_NAME>WGS84 / UTM zone 32N</HORIZONTAL_CS_NAME>"
        f"<HORIZONTAL_CS_CODE>{CRS}</HORIZONTAL_CS_CODE>{sizes}</Tile_Geocoding>"
        f"</n1:Geometric_Info></n1:Level-{level}_Tile_ID>"
    )


def write_old_l1c(folder: Path, tiles=("T32TQR", "T32TQQ")) -> Path:
    """An L1C product as before December 2016: long names, several granules."""
    product = folder / "S2A_OPER_PRD_MSIL1C_PDMC_20160101T000000_R022_V20151231.SAFE"
    for tile in tiles:
        stem = f"S2A_OPER_MSI_L1C_TL_EPA__20160101T000000_A002734_{tile}"
        for band, metres in RESOLUTIONS.items():
            place = product / "GRANULE" / f"{stem}_N02.01" / "IMG_DATA"
            pixels = band_pixels(band, metres, low=100)
            write_band(place / f"{stem}_{band}.jp2", pixels, metres)
    (product / "S2A_OPER_MTD_SAFL1C_PDMC_20160101T000000_R022_V20151231.xml").write_text(
        '<?xml version="1.0"?><n1:Level-1C_User_Product xmlns:n1="http://pdgs.s2.esa.int/PSD">'
        "<n1:General_Info><Product_Info><PRODUCT_START_TIME>2015-12-31T10:12:11.000Z"
        "</PRODUCT_START_TIME><PRODUCT_URI>S2A_OPER_PRD_MSIL1C_PDMC_20160101T000000.SAFE"
        "</PRODUCT_URI><Datatake><SPACECRAFT_NAME>Sentinel-2A</SPACECRAFT_NAME></Datatake>"
        "</Product_Info></n1:General_Info></n1:Level-1C_User_Product>"
    )  # fmt: skip
    return product


def write_landsat(
    folder: Path,
    product: str = "LC08_L2SP_198030_20210619_20210629_02_T1",
    sensor: str = "OLI_TIRS",
    shift: int = 0,
) -> Path:
    """A Collection 2 product; its folder. ``shift`` moves it by so many pixels."""
    level = product.split("_")[1]
    place = folder / product
    numbers = (1, 2, 3, 4, 5, 6, 7) if sensor.startswith("OLI") else (1, 2, 3, 4, 5, 7)
    second = level.startswith("L2")
    files = {str(n): f"{'SR_' if second else ''}B{n}" for n in numbers}
    if sensor.startswith("OLI"):
        files |= (
            {"ST_B10": "ST_B10"} if second else {"9": "B9", "10": "B10", "11": "B11"}
        )
    else:
        files |= {"ST_B6": "ST_B6"} if second else {"6": "B6"}
    dtype = np.uint16 if second or sensor.startswith("OLI") else np.uint8
    corner = CORNER[0] + 30 * shift, CORNER[1]
    for name in files.values():
        pixels = np.random.default_rng([*name.encode()]).integers(1, 200, (16, 16))
        pixels[:, 0] = 0
        path = place / f"{product}_{name}.TIF"
        write_band(path, pixels.astype(dtype), 30, corner=corner)
    if not second and sensor.startswith(
        "OLI"
    ):  # the pixels of pan begin a quarter earlier
        pixels = np.random.default_rng(8).integers(1, 200, (32, 32)).astype(dtype)
        begin = corner[0] - 7.5, corner[1] + 7.5
        write_band(place / f"{product}_B8.TIF", pixels, 15, corner=begin)
        files["8"] = "B8"
    quality = np.full((16, 16), 1 << 6, np.uint16)  # clear
    quality[:, 0] = 1  # fill
    quality[2, 2], quality[4, 4], quality[6, 6] = (
        1 << 3,
        1 << 4,
        1 << 5,
    )  # cloud, shadow, snow
    quality[8, 8], quality[10, 10] = 1 << 1, 1 << 2  # dilated, cirrus
    write_band(place / f"{product}_QA_PIXEL.TIF", quality, 30, corner=corner)
    mission, _, place_code, date = product.split("_")[:4]
    listed = "".join(
        f'    FILE_NAME_BAND_{key} = "{product}_{name}.TIF"\n'
        for key, name in files.items()
    )
    (place / f"{product}_MTL.txt").write_text(
        "GROUP = LANDSAT_METADATA_FILE\n  GROUP = PRODUCT_CONTENTS\n"
        '    ORIGIN = "Image courtesy of the U.S. Geological Survey"\n'
        f'    LANDSAT_PRODUCT_ID = "{product}"\n    PROCESSING_LEVEL = "{level}"\n'
        f'    COLLECTION_NUMBER = 02\n{listed}'
        f'    FILE_NAME_QUALITY_L1_PIXEL = "{product}_QA_PIXEL.TIF"\n'
        "  END_GROUP = PRODUCT_CONTENTS\n  GROUP = IMAGE_ATTRIBUTES\n"
        f'    SPACECRAFT_ID = "LANDSAT_{int(mission[2:])}"\n    SENSOR_ID = "{sensor}"\n'
        f"    WRS_PATH = {place_code[:3]}\n    WRS_ROW = {place_code[3:]}\n"
        f"    DATE_ACQUIRED = {date[:4]}-{date[4:6]}-{date[6:]}\n"
        "  END_GROUP = IMAGE_ATTRIBUTES\nEND_GROUP = LANDSAT_METADATA_FILE\nEND\n"
    )  # fmt: skip
    return place


def write_item(path: Path, assets: dict, **properties) -> Path:
    """A STAC item."""
    facts = {"datetime": f"{DATE}T10:10:31Z"} | properties
    content = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": path.stem,
        "geometry": None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"properties": facts, "assets": assets}))
    return path


def stack(*arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``Patch_extraction.py stack``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = Patch_extraction.main(["stack", *map(str, arguments)])
        except SystemExit as ended:
            status = ended.code
    return status, out.getvalue(), err.getvalue()


def stacked(*arguments) -> str:
    """What a stack that must go well prints."""
    status, out, err = stack(*arguments)
    assert status == 0, err
    return out + err


def refused(*arguments, status: int = 1) -> str:
    """The one line of a stack that must not go well."""
    ended, out, err = stack(*arguments)
    assert ended == status, out + err
    assert not out
    lines = err.strip().splitlines()
    assert status == 2 or len(lines) == 1, err
    return lines[-1]
