"""Landsat Collection 2 products, Level 1 and 2, of TM, ETM+ and OLI."""

from __future__ import annotations

import re
from collections import defaultdict

from common.errors import RasterError
from extraction.stack_bands import QA_PIXEL, Band, MaskLayer, Product
from extraction.stack_files import ProductFiles

METADATA = r"(?P<folder>(?:[^/]+/)?)[^/]+_MTL\.txt"
# the reflective bands of each sensor, without the panchromatic and the cirrus band
REFLECTIVE = {
    "TM": (1, 2, 3, 4, 5, 7),
    "ETM": (1, 2, 3, 4, 5, 7),
    "OLI": (1, 2, 3, 4, 5, 6, 7),
}


def parse_mtl(text: str) -> dict[str, dict[str, str]]:
    """The values of an MTL file, by the innermost group and the name."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    opened = [""]
    for line in text.splitlines():
        key, equals, value = (part.strip() for part in line.partition("="))
        if key == "GROUP":
            opened.append(value)
        elif key == "END_GROUP":
            opened = opened[:-1] or [""]
        elif equals:
            groups[opened[-1]].setdefault(key, value.strip('"'))
    return groups


def read_landsat(files: ProductFiles, metadata: re.Match) -> Product:
    """The product of an MTL file.

    Raises:
        RasterError: It is of another collection or sensor, or incomplete.
    """
    groups = parse_mtl(files.read(metadata[0]).decode("utf-8", "replace"))
    contents, image = groups["PRODUCT_CONTENTS"], groups["IMAGE_ATTRIBUTES"]
    if contents.get("COLLECTION_NUMBER") != "02":
        raise RasterError(
            f"{files.path} is no Landsat product of Collection 2, or its {metadata[0]} is "
            "incomplete; download it again from Collection 2"
        )
    product = contents["LANDSAT_PRODUCT_ID"]
    sensor = image.get("SENSOR_ID", "")
    reflective = REFLECTIVE.get(sensor.split("_")[0])
    if reflective is None:
        raise RasterError(
            f"{product} is of the sensor {sensor}; expected TM, ETM or OLI: give its .TIF files"
        )
    folder, there = metadata["folder"], set(files.names)
    stated = {
        name.removeprefix(f"{product}_").rpartition(".")[0]: folder + name
        for key, name in contents.items()
        if key.startswith("FILE_NAME_BAND_")
    }
    bands = {
        name: Band(name, files.gdal_path(file), 1, 0, 0)
        for name, file in stated.items()
        if file in there
    }
    prefix = "SR_B" if any(name.startswith("SR_") for name in stated) else "B"
    return Product(
        name=product,
        kind=f"Landsat {contents.get('PROCESSING_LEVEL', '')}".strip(),
        bands=bands,
        default=tuple(f"{prefix}{number}" for number in reflective),
        expected=tuple(stated),
        sensor=f"{image.get('SPACECRAFT_ID', '').replace('_', ' ').title()} {sensor}".strip(),
        acquired=image.get("DATE_ACQUIRED"),
        tile=f"{image.get('WRS_PATH', '')}{image.get('WRS_ROW', '')}" or None,
        mask=quality_layer(
            files, folder + contents.get("FILE_NAME_QUALITY_L1_PIXEL", "")
        ),
        no_mask="lacks its file QA_PIXEL: the download is incomplete",
    )


def quality_layer(files: ProductFiles, name: str) -> MaskLayer | None:
    if name not in files.names:
        return None
    return MaskLayer(files.gdal_path(name), QA_PIXEL)
