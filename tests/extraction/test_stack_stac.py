"""``stack`` of STAC items: names of assets, stated offsets, files on a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from stack_helpers import (
    DATE,
    band_pixels,
    refused,
    scene_classes,
    stacked,
    undone,
    write_band,
    write_item,
)

from extraction.stack_sentinel2 import DEFAULT, RESOLUTIONS
from extraction.stack_stac import read_items

# keys of Earth Search
KEYS = {
    "B01": "coastal", "B02": "blue", "B03": "green", "B04": "red", "B05": "rededge1",
    "B06": "rededge2", "B07": "rededge3", "B08": "nir", "B8A": "nir08", "B09": "nir09",
    "B11": "swir16", "B12": "swir22",
}  # fmt: skip
COG = "image/tiff; application=geotiff; profile=cloud-optimized"
TILE = {"platform": "sentinel-2a", "grid:code": "MGRS-32TQR"}


def raster_bands(offset: float | None = -0.1) -> list[dict]:
    facts = {"nodata": 0, "data_type": "uint16", "scale": 0.0001}
    return [facts | ({} if offset is None else {"offset": offset})]


def earth_search(
    folder: Path, low: int = 900, offset: float | None = -0.1, base="./"
) -> Path:
    """An item with the keys and fields of Earth Search, and its files."""
    assets = {}
    for name, key in KEYS.items():
        metres = RESOLUTIONS[name]
        write_band(
            folder / f"{name}.tif", band_pixels(name, metres, low=low), metres, nodata=0
        )
        common = key.rstrip("123") if key.startswith("rededge") else key
        assets[key] = {
            "href": f"{base}{name}.tif", "type": COG, "roles": ["data", "reflectance"],
            "eo:bands": [{"name": key, "common_name": common}],
            "raster:bands": raster_bands(offset), "gsd": metres,
        }  # fmt: skip
        jp2 = {"href": f"s3://bucket/{name}.jp2", "type": "image/jp2"}
        assets[f"{key}-jp2"] = assets[key] | jp2
    write_band(folder / "SCL.tif", scene_classes(), 20)
    assets["scl"] = {"href": f"{base}SCL.tif", "type": COG, "roles": ["data"]}
    visual = {"href": f"{base}TCI.tif", "type": COG, "roles": ["visual"]}
    visual["eo:bands"] = [{"name": name} for name in ("red", "green", "blue")]
    assets["visual"] = visual
    assets["thumbnail"] = {"href": "https://example.org/a.jpg", "type": "image/jpeg"}
    assets["granule_metadata"] = {"href": "metadata.xml", "type": "application/xml"}
    return write_item(folder / "S2A_T32TQR.json", assets, **TILE)


def test_assets_of_sentinel_2_are_called_as_in_its_products(tmp_path):
    item = earth_search(tmp_path)
    said = stacked("--input", item, "--cloud_mask", "--output", tmp_path / "scene.vrt")
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        assert scene.descriptions == DEFAULT
        assert (scene.read(1) == undone(band_pixels("B02", 10))).all()
        valid = ~np.isin(scene_classes(), [0, 1, 3, 8, 9, 10])
        mask = scene.dataset_mask() > 0
        assert (mask == np.kron(valid, np.ones((2, 2), bool))).all()
        tags = scene.tags()
    assert tags["sensor"] == "sentinel-2a" and tags["acquired"] == DATE
    assert tags["tile"] == "T32TQR" and tags["product"] == "S2A_T32TQR"
    assert "warning" not in said


def test_bands_have_three_names(tmp_path):
    item = earth_search(tmp_path)
    target = tmp_path / "scene.vrt"
    stacked("--input", item, "--bands", "red,B8A,rededge2,coastal", "--output", target)
    with rasterio.open(target) as scene:
        assert scene.descriptions == ("B04", "B8A", "B06", "B01")


@pytest.mark.parametrize("style", ["planetary computer", "copernicus"])
def test_items_of_other_catalogues_are_understood(tmp_path, style):
    assets = {}
    for name in DEFAULT:
        for metres in (10, 20, 60):
            if metres < RESOLUTIONS[name]:
                continue
            path = tmp_path / f"{name}_{metres}m.tif"
            write_band(path, band_pixels(name, metres), metres)
            if (
                style == "copernicus"
            ):  # STAC 1.1, an asset of each resolution, the coarsest first
                asset = {"bands": [{"name": name, "eo:common_name": "x"}], "type": COG}
                asset |= {"raster:scale": 0.0001, "raster:offset": -0.1, "nodata": 0}
                assets = {f"{name}_{metres}m": asset | {"href": path.name}} | assets
            elif metres == RESOLUTIONS[name]:  # no scale, no offset
                asset = {"eo:bands": [{"name": name}], "type": COG, "roles": ["data"]}
                assets[name] = asset | {"href": path.name}
    item = write_item(tmp_path / "item.json", assets, **TILE)
    target = tmp_path / "scene.vrt"
    said = stacked("--input", item, "--output", target)
    with rasterio.open(target) as scene:
        assert scene.descriptions == DEFAULT and scene.res == (10, 10)
        own = band_pixels("B02", 10)
        assert (scene.read(1) == (undone(own) if style == "copernicus" else own)).all()
    # nothing is stated, but the pixels begin at 900
    assert ("--offset -1000" in said) == (style == "planetary computer")


def test_a_stated_offset_that_the_pixels_contradict_is_followed_with_a_line(tmp_path):
    item = earth_search(tmp_path, low=100)
    target = tmp_path / "scene.vrt"
    said = stacked("--input", item, "--output", target)
    assert "states an offset of -1000" in said and "--offset 0" in said
    with rasterio.open(target) as scene:
        assert (scene.read(1) == undone(band_pixels("B02", 10, low=100))).all()
    said = stacked("--input", item, "--offset", "0", "--overwrite", "--output", target)
    assert "warning" not in said
    with rasterio.open(target) as scene:
        assert (scene.read(1) == band_pixels("B02", 10, low=100)).all()


@pytest.mark.parametrize("applied", [True, False])
def test_an_offset_that_was_applied_is_not_undone_again(tmp_path, applied):
    item = earth_search(tmp_path, low=100 if applied else 900)
    content = json.loads(item.read_text())
    content["properties"]["earthsearch:boa_offset_applied"] = applied
    item.write_text(json.dumps(content))
    said = stacked("--input", item, "--output", tmp_path / "scene.vrt")
    assert "warning" not in said
    expected = band_pixels("B02", 10, low=100 if applied else 900)
    with rasterio.open(tmp_path / "scene.vrt") as scene:
        found = scene.read(1)
    assert (found == (expected if applied else undone(expected))).all()


def test_other_items_keep_keys_integers_and_pass_the_scale_on(tmp_path):
    assets = {}
    words = {"blue": "blue", "red": "red", "lwir11": "lwir11", "pan": "pan"}
    for key, word in words.items():
        write_band(tmp_path / f"{key}.TIF", np.full((16, 16), 9000, np.uint16), 30)
        assets[key] = {
            "href": f"{key}.TIF", "type": COG, "roles": ["data"],
            "eo:bands": [{"name": f"OLI_{key}", "common_name": word}],
            "raster:bands": [{"scale": 2.75e-05, "offset": -0.2, "nodata": 0}],
        }  # fmt: skip
    quality = np.full((16, 16), 64, np.uint16)
    quality[3, 3] = 8
    write_band(tmp_path / "qa.TIF", quality, 30)
    assets["qa_pixel"] = {"href": "qa.TIF", "type": COG, "roles": ["cloud"]}
    facts = {
        "platform": "landsat-8",
        "landsat:wrs_path": "198",
        "landsat:wrs_row": "030",
    }
    item = write_item(tmp_path / "item.json", assets, **facts)
    stacked("--input", item, "--cloud_mask", "--output", tmp_path / "scenes")
    with rasterio.open(tmp_path / "scenes" / "Image_198030_20210619.vrt") as scene:
        assert scene.descriptions == ("blue", "red")
        assert (scene.read() == 9000).all()
        assert scene.scales == (2.75e-05,) * 2 and scene.offsets == (-0.2,) * 2
        assert np.argwhere(scene.dataset_mask() == 0).tolist() == [[3, 3]]
    target = tmp_path / "thermal.vrt"
    stacked("--input", item, "--bands", "lwir11,OLI_red", "--output", target)
    with rasterio.open(target) as scene:
        assert scene.descriptions == ("lwir11", "red")


def test_a_list_of_items_gives_a_scene_of_each(tmp_path):
    item = json.loads(earth_search(tmp_path).read_text())
    later = json.loads(json.dumps(item))
    later["properties"]["datetime"] = "2021-07-04T10:10:31Z"
    found = {"type": "FeatureCollection", "features": [item, later]}
    (tmp_path / "found.json").write_text(json.dumps(found))
    stacked(
        "--input",
        tmp_path / "found.json",
        "--bands",
        "B02",
        "--output",
        tmp_path / "out",
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["Image_T32TQR_20210619.vrt", "Image_T32TQR_20210704.vrt"]


# a process of its own: GDAL may hold Python's lock while it waits for an answer
SERVER = """
import http.server, re, sys
from pathlib import Path

class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\\d+)-(\\d*)", self.headers.get("Range", ""))
        if not path.is_file() or not asked:
            return super().do_GET()
        content = path.read_bytes()
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    """The address of a server of a folder, and the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, text=True
    ) as process:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/", folder
        process.kill()


def test_files_on_a_server_are_read_from_there(server, tmp_path):
    address, folder = server
    item = earth_search(folder, base=address)
    target = tmp_path / "scene.vrt"
    here = item.rename(tmp_path / item.name)
    stacked("--input", here, "--bands", "B02,B05", "--cloud_mask", "--output", target)
    assert f"/vsicurl/{address}B02.tif" in target.read_text()
    with rasterio.open(target) as scene:
        assert (scene.read(1) == undone(band_pixels("B02", 10))).all()
    stacked("--input", here, "--bands", "B02", "--output", tmp_path / "copy.tif")
    with rasterio.open(tmp_path / "copy.tif") as scene:
        assert (scene.read(1) == undone(band_pixels("B02", 10))).all()


def test_places_of_assets_are_those_that_gdal_opens(tmp_path):
    hrefs = {
        "a": "https://host/a.tif?sig=1", "b": "s3://bucket/key/b.tif", "c": "sub/c.tif",
        "d": "/abs/d.tif", "e": "gs://bucket/e.tif", "f": "file:///abs/f.tif",
    }  # fmt: skip
    item = write_item(
        tmp_path / "item.json", {k: {"href": h} for k, h in hrefs.items()}
    )
    (product,) = read_items(str(item))
    assert {name: band.path for name, band in product.bands.items()} == {
        "a": "/vsicurl/https://host/a.tif?sig=1", "b": "/vsis3/bucket/key/b.tif",
        "c": str(tmp_path / "sub" / "c.tif"), "d": "/abs/d.tif", "e": "/vsigs/bucket/e.tif",
        "f": "/abs/f.tif",
    }  # fmt: skip


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is no JSON"),
        ("[]", "no STAC item"),
        ('{"type": "Collection", "links": []}', "no STAC item"),
        ('{"assets": {"a": {"href": "a.xml", "type": "application/xml"}}}', "raster"),
    ],
)
def test_a_file_that_is_no_item_is_refused(tmp_path, content, words):
    (tmp_path / "item.json").write_text(content)
    said = refused(
        "--input", tmp_path / "item.json", "--output", tmp_path / "scene.vrt"
    )
    assert words in said and "item.json" in said


def test_an_asset_that_is_not_there_is_refused(tmp_path):
    item = earth_search(tmp_path)
    (tmp_path / "B08.tif").unlink()
    said = refused("--input", item, "--output", tmp_path / "scene.vrt")
    assert "B08.tif" in said
