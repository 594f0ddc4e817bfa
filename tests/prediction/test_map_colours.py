"""A map, its quicklook and its checkpoint have the same colours of classes."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from prediction_helpers import make_pixel_model, noise, run, write_scene

from common.colours import class_colours, hex_of_colour
from common.errors import CheckpointError
from model_training import load_checkpoint

NAMES = ["water", "forest", "roofs"]
CHOSEN = [(10, 20, 30), (240, 200, 10), (120, 0, 120)]


@pytest.fixture
def trained(tmp_path):
    """A function that writes a checkpoint with what it says of colours."""

    def write(name: str, **metadata):
        weights = 40 * np.eye(3)
        names = {"class_names": NAMES}
        return make_pixel_model(
            tmp_path / name, weights, np.zeros(3), **names, **metadata
        ).path

    return write


@pytest.mark.usefixtures("real_pictures")
def test_map_and_quicklook_have_the_colours_of_the_first_checkpoint(trained, tmp_path):
    from matplotlib.image import imread

    first = trained("a.pth", class_colors=[hex_of_colour(c) for c in CHOSEN])
    models = [first, trained("b.pth", class_colors=["#ff0000", "#00ff00", "#0000ff"])]
    scene = write_scene(tmp_path / "scene.tif", noise(48, 48))
    assert run(models, scene, tmp_path / "map.tif", "--quicklook") == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        table = file.colormap(1)
    assert [table[k] for k in range(3)] == [(*colour, 255) for colour in CHOSEN]
    picture = (imread(tmp_path / "map_quicklook.png")[..., :3] * 255).round()
    for colour in CHOSEN:
        assert (picture == colour).all(axis=-1).sum() > 500


def test_a_checkpoint_of_an_earlier_version_gives_the_palette(trained):
    loaded = load_checkpoint(trained("a.pth"))
    assert loaded.class_colours == class_colours(NAMES)


@pytest.mark.parametrize(
    "colours", [["#ff0000"], ["red", "blue", "lime"], "red", [1, 2, 3]]
)
def test_a_checkpoint_with_colours_that_are_none_is_refused(trained, colours):
    with pytest.raises(CheckpointError, match="a.pth holds the class colours"):
        load_checkpoint(trained("a.pth", class_colors=colours))
