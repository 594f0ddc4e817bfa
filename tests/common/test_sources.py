"""VRTs whose sources are not all there."""

from __future__ import annotations

import os
import shutil
import zipfile

import numpy as np
import pytest
from helpers import write_geotiff
from raster_helpers import write_vrt

from common.errors import RasterError
from common.files import describe_files
from common.rasters import Source, files_of_raster, open_raster
from common.sources import require_whole


@pytest.fixture
def nested(tmp_path):
    """A VRT of a VRT of a GeoTIFF, which was read."""
    write_geotiff(tmp_path / "a.tif", np.ones((2, 8, 8), np.uint8))
    write_vrt(tmp_path / "inner.vrt", [(tmp_path / "a.tif", None)])
    path = write_vrt(tmp_path / "outer.vrt", [(tmp_path / "inner.vrt", None)])
    with open_raster(path) as file:
        assert (Source(file).read()[0] == 1).all()
    return path


def test_a_vrt_with_all_of_its_sources_is_whole(nested):
    require_whole(nested)
    require_whole(nested.with_name("a.tif"))


@pytest.mark.parametrize("lost", ["a.tif", "inner.vrt"])
@pytest.mark.parametrize("how", ["removed", "cut off", "no raster"])
def test_a_vrt_that_lacks_a_source_is_an_error_every_time(nested, lost, how):
    path = nested.with_name(lost)
    content = path.read_bytes()
    path.unlink()
    if how == "cut off":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "no raster":
        path.write_bytes(b"no raster at all")
    for _ in range(3):
        with pytest.raises(RasterError, match=lost):
            require_whole(nested)


def test_a_vrt_that_was_moved_without_its_sources_is_an_error(nested, tmp_path):
    moved = tmp_path / "elsewhere" / "outer.vrt"
    moved.parent.mkdir()
    text = nested.read_text().replace(str(tmp_path) + "/", "")
    moved.write_text(text.replace("Filename>i", 'Filename relativeToVRT="1">i'))
    with pytest.raises(RasterError, match="elsewhere/inner.vrt"):
        require_whole(moved)
    shutil.copy(tmp_path / "inner.vrt", moved.parent)
    require_whole(moved)


def test_the_archive_that_an_inner_vrt_refers_to_is_one_of_its_files(tmp_path):
    file = write_geotiff(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8))
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(file, "in/a.tif")
    write_vrt(tmp_path / "inner.vrt", [(f"/vsizip/{archive}/in/a.tif", None)])
    path = write_vrt(tmp_path / "outer.vrt", [(tmp_path / "inner.vrt", None)])
    known = describe_files(files_of_raster(path))
    names = ("outer.vrt", "inner.vrt", "a.zip")
    assert list(known) == [str(tmp_path / name) for name in names]
    os.utime(archive, (1, 1))
    assert describe_files(files_of_raster(path)) != known
