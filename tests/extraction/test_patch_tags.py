"""Patches say which sensor saw them, and when."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from stack_helpers import stacked, write_band, write_landsat

import Patch_extraction
from common.patches import list_pairs, present_splits


@pytest.mark.parametrize("suffix", [".vrt", ".tif"])
def test_patches_of_a_stacked_product_have_its_sensor_and_date(tmp_path, suffix):
    product, scene = write_landsat(tmp_path), tmp_path / f"scene{suffix}"
    stacked("--input", product, "--output", scene)
    classes = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(np.uint8)
    label = write_band(tmp_path / "label.tif", classes, 30)
    words = ["extract", "--image", scene, "--label", label, "--patch_size", 8]
    words += ["--output", tmp_path / "data"]
    assert Patch_extraction.main(list(map(str, words))) == 0
    data, found = tmp_path / "data", set()
    for pair in (p for s in present_splits(data) for p in list_pairs(data, s)):
        with rasterio.open(pair.image) as image:
            found.add((image.tags()["sensor"], image.tags()["acquired"]))
    assert found == {("Landsat 8 OLI_TIRS", "2021-06-19")}
