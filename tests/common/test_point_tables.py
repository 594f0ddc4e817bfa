"""Labels at points: CSV tables, and the ground around points and lines."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from helpers import write_raster

from common.errors import SegmentationError
from common.point_tables import buffer_points, has_areas, read_points


def table(tmp_path, text: str) -> str:
    file = tmp_path / "points.csv"
    file.write_text(text, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("head", "crs", "expected"),
    [
        ("Longitude,Latitude,kind", None, "EPSG:4326"),
        ("kind;lon;lat", None, "EPSG:4326"),
        ("x,y,kind", "EPSG:32633", "EPSG:32633"),
    ],
)
def test_points_lie_where_their_columns_say(tmp_path, head, crs, expected):
    rows = {
        "L": ["13.5,52.25,oat", '13.6,52.35,"rye, early"'],
        "k": ["oat;13,5;52,25", '"rye, early";13,6;52,35'],
        "x": ["4e5,58e5,oat", '5e5,57e5,"rye, early"'],
    }[head[0]]
    found = read_points(table(tmp_path, "\n".join([head, *rows])), crs)
    assert found.crs == expected
    x, y = found.geometry.x.tolist(), found.geometry.y.tolist()
    assert (x, y) == (
        ([4e5, 5e5], [58e5, 57e5]) if crs else ([13.5, 13.6], [52.25, 52.35])
    )
    assert found["kind"].tolist() == ["oat", "rye, early"]


@pytest.mark.parametrize(
    ("text", "crs", "words"),
    [
        ("a,b\n1,2", None, "has the columns a, b; points need"),
        ("x,y\n1,2", None, "--label_crs None: expected the CRS of x and y"),
        ("lon,lat\n1,2", "EPSG:4326", "expected x and y with it, not degrees"),
        ("x,y\n1,2", "EPSG:nothing", "expected a CRS, as EPSG:32633"),
        ("lon,lat\n1,2\n,3\n", None, "no place in row 3 (1 such rows)"),
        ("lon,lat\n400000,5800000\n", None, "no degrees; call projected"),
        ("lon,lat,kind\n1,2,wheat, soft", None, "more columns than its head; quote"),
        ("", None, "cannot be read as a CSV table"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, text, crs, words):
    file = table(tmp_path, text)
    with pytest.raises(SegmentationError) as caught:
        read_points(file, crs)
    assert (
        words in str(caught.value) and file in str(caught.value) + f"--label_crs {file}"
    )


def test_a_class_may_be_called_none_and_names_of_columns_have_no_blanks(tmp_path):
    file = table(tmp_path, "lon , lat , kind \n1,2,None\n1,2,\n1,2,NA\n")
    kinds = read_points(file, None)["kind"]
    assert kinds[0] == "None" and kinds[1:].isna().all()


def test_a_buffer_is_metres_on_the_ground(tmp_path):
    path = tmp_path / "scene.tif"
    write_raster(path, np.zeros((1, 40, 40), np.uint8))
    shapes = [shapely.Point(0, 0), shapely.LineString([(0, 0), (0.001, 0)]), None]
    with rasterio.open(path) as image:
        middle = geopandas.GeoSeries([shapely.Point(*image.xy(20, 20))], crs=image.crs)
        lonlat = middle.to_crs("EPSG:4326").iloc[0].coords[0]
        shapes = [
            shapely.affinity.translate(shape, *lonlat) if shape else None
            for shape in shapes
        ]
        square = shapely.box(*lonlat, lonlat[0] + 0.01, lonlat[1] + 0.01)
        points = geopandas.GeoDataFrame(geometry=[*shapes, square], crs="EPSG:4326")
        assert not has_areas(points)
        ground = buffer_points(points, 100, image)
        metric = ground.geometry.to_crs(image.crs)
    assert metric.area.iloc[0] == pytest.approx(np.pi * 1e4, rel=0.01)
    assert metric.area.iloc[1] > metric.area.iloc[0] + 100 * 100
    assert ground.geometry.iloc[2] is None
    assert ground.geometry.iloc[3].equals(square)
    assert has_areas(ground)
