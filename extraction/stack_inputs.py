"""What ``--input`` names: which reader it needs, which bands are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common.errors import RasterError
from common.options import split_list
from extraction import stack_landsat, stack_sentinel2
from extraction.stack_bands import Band, Product
from extraction.stack_files import ARCHIVES, ProductFiles
from extraction.stack_landsat import read_landsat
from extraction.stack_loose import read_files
from extraction.stack_sentinel2 import read_sentinel2
from extraction.stack_settings import StackConfig
from extraction.stack_stac import read_items


class Chosen(NamedTuple):
    """A band, what the scene calls it, and the product that it comes from."""

    name: str
    band: Band
    product: Product


def read_inputs(config: StackConfig) -> tuple[list[Product], Product | None]:
    """The products of ``--input``, and its raster files as one more.

    Raises:
        RasterError: One cannot be used.
    """
    products: list[Product] = []
    files: list[str] = []
    for path in config.input:
        suffix = Path(path).suffix.lower()
        if Path(path).is_dir() or (suffix in ARCHIVES and Path(path).exists()):
            products += products_in(ProductFiles(path))
        elif suffix in (".json", ".geojson"):
            products += read_items(path)
        else:
            files.append(path)
    offset = None if products else config.offset
    return products, read_files(files, offset) if files else None


def products_in(files: ProductFiles) -> list[Product]:
    """The products of a folder or archive.

    Raises:
        RasterError: There is none, or it is incomplete.
    """
    found: list[Product] = []
    for metadata in files.find(stack_sentinel2.METADATA):
        found += read_sentinel2(files, metadata)
    found += [read_landsat(files, m) for m in files.find(stack_landsat.METADATA)]
    if found:
        return found
    if files.find(r".*B(?:\d\d|8A)(?:_\d\dm)?\.jp2"):
        raise RasterError(
            f"{files.path} lacks the metadata of its product (MTD_MSIL1C.xml or MTD_MSIL2A.xml); "
            "download it again, or give its .jp2 files with --offset"
        )
    raise RasterError(
        f"{files.path} is neither a Sentinel-2 L1C or L2A nor a Landsat Collection 2 product (no "
        "MTD_MSIL1C.xml, MTD_MSIL2A.xml or *_MTL.txt in it); give its raster files"
    )


def choose_bands(
    products: Sequence[Product], files: Product | None, config: StackConfig
) -> list[Chosen]:
    """The bands of a scene in their order: those of products, then those of files.

    Raises:
        RasterError: A band is missing, or two would have the same name.
    """
    wanted = split_list(config.bands)
    chosen: list[Chosen] = []
    for product in products:
        for name in wanted or product.default:
            if wanted and files and files.find(name) and not product.find(name):
                added = Chosen(files.find(name).name, files.find(name), files)
                if added in chosen:  # with the product before
                    continue
            else:
                band = product.require(name)
                if config.offset is not None:
                    band = replace(band, offset=config.offset)
                label = f"{band.name}_{product.date}" if config.join else band.name
                added = Chosen(label, band, product)
            chosen.append(added)
    if files and not (products and wanted):
        named = [files.require(name) for name in wanted] or files.bands.values()
        chosen += [Chosen(band.name, band, files) for band in named]
    for number, one in enumerate(chosen):
        if other := next((c for c in chosen[:number] if c.name == one.name), None):
            raise RasterError(
                f"Two bands would be called {one.name}, of {other.band.path} and "
                f"{one.band.path}; name each band once in --bands, or rename the file"
            )
    return chosen
