"""The style in ``cells.gpkg``, and vector files with a table of styles as grids and labels."""

from __future__ import annotations

from xml.etree import ElementTree

import geopandas
import shapely
from helpers import interrupt
from site_helpers import run, tiles

from common import SPLITS
from common.vectors import add_style
from extraction.places import SPLIT_COLOURS


def test_cells_are_drawn_in_the_colours_of_their_splits(site):
    site.extract()
    cells = site.out / "Patch" / "cells.gpkg"
    styles = geopandas.read_file(cells, layer="layer_styles")
    assert list(styles["f_table_name"]) == ["cells"]
    root = ElementTree.fromstring(styles["styleQML"][0])
    assert root.find("renderer-v2").get("attr") == "split"
    assert [node.get("value") for node in root.iter("category")] == list(SPLITS)
    fills = [node.get("v") for node in root.iter("prop") if node.get("k") == "color"]
    assert fills == ["{},{},{},255".format(*SPLIT_COLOURS[one]) for one in SPLITS]


def test_cells_of_a_dataset_are_a_grid_and_styled_polygons_a_label(site):
    former = site.extract()
    site.grid = (site.out / "Patch" / "cells.gpkg").rename(site.folder / "grid.gpkg")
    half = shapely.union_all(tiles(1, 3))
    site.label = site._vector("label.gpkg", [half])
    add_style(site.label, "label", "<qgis/>")
    patches = site.extract("--overwrite")
    assert len(patches) == len(former) == 9
    labels = sorted(int(patch.label.mean()) for patch in patches.values())
    assert labels == [0] * 6 + [1] * 3


def test_a_style_is_stored_once_where_a_run_ended_before_its_cells_were_published(
    site, monkeypatch
):
    with monkeypatch.context() as patching:
        interrupt(patching, "extraction.dataset.publish", 1)
        assert run(*site.words()) == 130
    site.extract("--resume")
    cells = site.out / "Patch" / "cells.gpkg"
    assert len(geopandas.read_file(cells, layer="layer_styles")) == 1
    assert len(geopandas.read_file(cells, layer="cells")) == 9
