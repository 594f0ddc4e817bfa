"""How far the windows of a map lie from what its model was trained on."""

from __future__ import annotations

import numpy as np
import pytest
from prediction_helpers import (
    CRS,
    DESCRIPTIONS,
    TRANSFORM,
    make_pixel_model,
    noise,
    read_json,
    run,
    write_scene,
)
from rasterio.warp import transform_bounds

from common.places import centre_distances

WEIGHTS = [[6, -3, 0], [-2, 7, 1]]


def place(x: float, y: float, split: str = "train", crs: str = CRS) -> dict:
    """A patch of 640 m around a point of the scene's CRS, as a checkpoint holds it."""
    bounds = transform_bounds(CRS, crs, x - 320, y - 320, x + 320, y + 320)
    return {"crs": crs, "split": split, "bounds": [list(bounds)]}


def map_with(folder, capsys, *models, **metadata):
    """The distance in the statistics of a map, and what was logged."""
    for number, places in enumerate(models):
        path = folder / f"{number}.pth"
        make_pixel_model(path, WEIGHTS, [0, 0], places=places, **metadata)
    scene = write_scene(folder / "scene.tif", noise(112, 64), DESCRIPTIONS)
    files = [folder / f"{number}.pth" for number in range(len(models))]
    assert run(files, scene, folder / "map.tif", "--overwrite") == 0
    report = read_json(folder / "map_statistics.json")
    return report["training_distance_m"], capsys.readouterr().err


# the centres of the windows, of 64 pixels of 10 m: one at the top, one 48 pixels below
FIRST, SECOND = (TRANSFORM * (32, row) for row in (32, 80))


@pytest.mark.parametrize("crs", [CRS, "EPSG:4326"])
def test_the_median_distance_from_windows_to_the_nearest_training_patch_is_told(
    tmp_path, capsys, crs
):
    far = place(FIRST[0] + 9e5, FIRST[1], crs=crs)
    near = place(FIRST[0] + 3000, FIRST[1], crs=crs)
    metres, error = map_with(tmp_path, capsys, [far, near])
    expected = np.median([3000, np.hypot(3000, 480)])
    assert metres == pytest.approx(expected, rel=1e-3)
    assert "scene.tif lie 3.0 km from the nearest training patch (median" in error


def test_patches_of_other_splits_count_where_folds_were_trained_on_them(
    tmp_path, capsys
):
    places = [
        place(FIRST[0], FIRST[1] + 50_000),
        place(*FIRST, "validation"),
        place(*SECOND, "test"),
    ]
    metres, _ = map_with(tmp_path, capsys, places)
    assert metres == pytest.approx(50_240, rel=1e-3)
    folds = {"training_params": {"val_strategy": "kfold"}}
    metres, error = map_with(tmp_path, capsys, places, **folds)
    assert metres == pytest.approx(240, abs=1) and "lie 240 m from the" in error


def test_of_several_models_the_nearest_patch_counts_and_all_must_know_theirs(
    tmp_path, capsys
):
    places = [place(FIRST[0] + 9000, FIRST[1])], [place(FIRST[0] + 4000, FIRST[1])]
    metres, _ = map_with(tmp_path, capsys, *places)
    assert metres == pytest.approx(np.median([4000, np.hypot(4000, 480)]), rel=1e-3)
    unknown = {"crs": None, "split": "train", "bounds": [[0, 0, 64, 64]]}
    for other in (None, [unknown], [place(*FIRST, "test")]):
        metres, error = map_with(tmp_path, capsys, places[0], other)
        assert metres is None and "nearest training patch" not in error


def test_distances_are_those_on_the_ellipsoid_also_across_the_antimeridian():
    east, west = (
        {"crs": "EPSG:4326", "bounds": [[x, 0, x, 0]]} for x in (179.9, -179.9)
    )
    north = {"crs": "EPSG:32660", "bounds": [[500_000, 1e6, 500_000, 1e6]]}
    assert centre_distances([east], [west]) == pytest.approx([22_264], abs=1)
    found = centre_distances([east, west], [north, west])
    assert found == pytest.approx([22_264, 0], abs=1)
    assert centre_distances([east], []) is None
