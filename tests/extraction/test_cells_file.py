"""cells.gpkg holds what the grid says of each cell."""

from __future__ import annotations

import datetime

import geopandas
import pandas
from batch_helpers import at, noise, tiles, write_grid
from shapely import box

from extraction.cells_file import storable_columns


def test_the_columns_of_the_grid_go_with_the_cells(site):
    names = [f"plot {n}" for n in range(9)]
    when = pandas.to_datetime(["2021-05-03"] * 9)
    site.draw_grid(
        tiles(3, 3, side=16),
        Name=names,
        county=list("abcabcabc"),
        area_ha=1.5,
        flown=when,
    )
    site.extract()
    cells = geopandas.read_file(site.out / "Patch" / "cells.gpkg").set_index("name")
    assert len(cells) == 9
    assert cells.loc["patch_plot_4", "grid_Name"] == "plot 4"
    assert "".join(cells.sort_index()["county"]) == "abcabcabc"
    assert (cells["area_ha"] == 1.5).all()
    assert (cells["flown"] == pandas.Timestamp("2021-05-03")).all()


def test_cells_that_are_left_out_shift_no_column(batch):
    label = noise(16)[1]
    label[:8, 8:] = 255  # no label in the second cell of a
    batch.draw("a", 16, label=label)
    batch.draw("b", 16, transform=at(24, 0), seed=1)
    cells = [box(200, 0, 208, 8), *tiles(2, 2), *tiles(2, 2, left=24)]
    numbers = list(range(9))
    grid = write_grid(batch.folder / "g.geojson", cells, number=numbers, id=numbers)
    dataset = batch.cut("--grid", grid)
    found = dataset.cells().set_index("name")["number"]
    assert len(found) == len(dataset.splits) == 7
    assert all(int(name[-3:]) == number for name, number in found.items())


def test_grids_of_several_scenes_bring_the_columns_of_all(batch):
    for name, columns in (("a", {"soil": ["x"] * 4}), ("b", {"slope": [1, 2, 3, 4]})):
        batch.draw(name, 16)
        write_grid(batch.data / f"Grid_{name}.geojson", tiles(2, 2), **columns)
    cells = batch.cut("--use_per_image_grid").cells().set_index("name").sort_index()
    assert cells["soil"].tolist()[:4] == ["x"] * 4 and cells["soil"][4:].isna().all()
    assert cells["slope"].tolist()[4:] == [1, 2, 3, 4]


def test_columns_become_what_a_geopackage_holds():
    table = pandas.DataFrame(
        {
            "SCENE": [1, 2],
            "fid": [5, 6],
            "grid_fid": ["a", None],
            "day": [datetime.date(2020, 1, 1), None],
            "list": [[1, 2], None],
            "kind": pandas.Categorical(["x", "y"]),
            "mixed": [1, "b"],
        }
    )
    columns = pandas.DataFrame(storable_columns(table, ["name", "scene"]))
    found = columns.astype(object).where(columns.notna(), None).to_dict("list")
    assert found == {
        "grid_SCENE": [1, 2],
        "grid_fid": [5, 6],
        "grid_grid_fid": ["a", None],
        "day": ["2020-01-01", None],
        "list": ["[1, 2]", None],
        "kind": ["x", "y"],
        "mixed": ["1", "b"],
    }
