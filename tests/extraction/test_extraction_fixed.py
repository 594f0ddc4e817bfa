"""Faults of the extraction that must not come back, by the numbers of ``pytest -m fault``."""

from __future__ import annotations

import geopandas
import pytest
from site_helpers import refusal, run, tiles

fault = pytest.mark.fault


def write_layers(site, tables=()) -> str:
    """A GeoPackage of two grids and a table without geometries; its path."""
    path = str(site.folder / "grids.gpkg")
    styles = geopandas.GeoDataFrame({"style": ["red"]}, geometry=[None], crs=None)
    for name, cells in tables:
        site.draw_grid(cells)
        geopandas.read_file(site.grid).to_file(path, layer=name, engine="pyogrio")
    import pyogrio

    options = {"layer": "layer_styles", "append": False, "driver": "GPKG"}
    pyogrio.write_dataframe(styles.drop(columns="geometry"), path, **options)
    return path


@fault(42)
def test_of_several_layers_one_must_be_named(site, capsys):
    path = write_layers(site, [("north", tiles(3, 1)), ("south", tiles(3, 2))])
    site.grid = path
    line = refusal(capsys, site)
    assert "has 2 layers with geometries (north, south)" in line
    assert f'"{path}|layername=north"' in line
    site.grid = f"{path}|layername=south"
    assert len(site.extract()) == 6


@fault(42)
def test_layers_without_geometries_do_not_count(site):
    site.grid = write_layers(site, [("cells", tiles(3, 1))])
    assert len(site.extract()) == 3


@fault(42)
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("layername=nort", "did you mean 'north'?"),
        ("layername=north|subset=id=1", "|layername=NAME and no more"),
        ("layerid=0", "|layername=NAME and no more"),
    ],
)
def test_a_layer_that_cannot_be_read_alone_is_refused(site, capsys, layer, expected):
    path = write_layers(site, [("north", tiles(3, 1)), ("south", tiles(3, 2))])
    site.grid = f"{path}|{layer}"
    assert run(*site.words()) == 1 or run(*site.words()) == 2
    assert expected in capsys.readouterr().err


@fault(42)
def test_a_label_and_the_patterns_of_a_batch_may_name_a_layer(site):
    path = write_layers(site, [("water", tiles(1, 3)), ("south", tiles(3, 2))])
    site.label = f"{path}|layername=water"
    site.draw_grid(tiles())
    patches = site.extract()
    assert [int(p.label.mean()) for p in patches.values()] == [1, 0, 0] * 3
    (site.folder / "Label_a.gpkg").write_bytes(
        (site.folder / "grids.gpkg").read_bytes()
    )
    site.image.rename(site.folder / "Image_a.tif")
    words = ["batch", "--data_dir", site.folder, "--output", site.folder / "batch"]
    words += ["--patch_size", 16, "--label_pattern", "Label_<id>.gpkg|layername=water"]
    assert run(*words) == 0
    assert len(list((site.folder / "batch").glob("Patch/*/images/*.tif"))) == 9
