"""The files of a map: layers, GeoTIFF, cloud-optimized GeoTIFF, metadata, quicklook."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from helpers import patch_everywhere
from prediction_helpers import (
    CRS,
    EVERYTHING,
    LAYERS,
    TRANSFORM,
    entropy_share,
    everywhere,
    make_pixel_model,
    noise,
    piece,
    random_layers,
    random_parts,
    run,
    write_scene,
)
from rasterio.enums import ColorInterp

from common import VERSION
from common.colours import class_colours
from common.tiffs import create_tiff
from prediction.mapfiles import MapWriter
from prediction.rowstore import RowStore
from prediction.statistics import Statistics

# --- unfinished maps --------------------------------------------------------------------


class Recorder:
    """A raster file that remembers what is written to it."""

    name = "map.tif"

    def __init__(self, shape):
        self.pixels = np.zeros(shape)
        self.windows = []

    def write(self, rows, window):
        assert rows.shape[1:] == (window.height, window.width)
        assert window.col_off == 0 and window.width == self.pixels.shape[2]
        self.windows.append((window.row_off, window.row_off + window.height))
        self.pixels[:, slice(*self.windows[-1])] = rows


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_maps_get_whole_rows_of_blocks_in_order_whatever_comes_first(
    tmp_path, columns, seed
):
    shape, arrays = (600, 23), random_layers(600, 23)
    RowStore.begin(tmp_path / "partial", {}, LAYERS, shape)
    files = {name: Recorder(array.shape) for name, array in arrays.items()}
    statistics = Statistics(["a", "b", "c", "d"], np.ones(600), 600 * 23)
    rows = RowStore(tmp_path / "partial", LAYERS, shape)
    maps = MapWriter(rows, files, statistics)
    with rows.opened:
        missing = everywhere(shape)
        for part in random_parts(*shape, columns, seed):
            rows.write(part, *piece(arrays, part))
            maps.advance()
            missing[part.top : part.bottom, part.left : part.right] = False
            whole = int(np.argmax(missing.any(axis=1))) if missing.any() else 600
            assert maps.row == (whole if whole == 600 else whole // 256 * 256)
    expected = Statistics(["a", "b", "c", "d"], np.ones(600), 600 * 23)
    for top, bottom in ((0, 256), (256, 512), (512, 600)):
        expected.add(arrays["classes"][0, top:bottom])
    assert statistics.report() == expected.report()
    for name, file in files.items():
        assert file.windows == [(0, 256), (256, 512), (512, 600)]
        np.testing.assert_array_equal(file.pixels, arrays[name])


# --- further layers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["land", "water"])
def test_uncertainty_of_one_model_is_the_entropy_of_its_probabilities(
    kind, scene, tmp_path, request
):
    model = request.getfixturevalue(kind)
    assert run(model.path, scene, tmp_path / "map.tif", "--save_uncertainty") == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    with rasterio.open(tmp_path / "map_uncertainty.tif") as file:
        assert (file.count, file.dtypes, file.nodata) == (1, ("float32",), -1)
        assert (file.crs, file.transform) == (CRS, TRANSFORM)
        assert "entropy" in file.descriptions[0]
        found = file.read(1)
    expected = entropy_share(model.probabilities(image))
    np.testing.assert_allclose(found[valid], expected[valid], atol=1e-5)
    assert (found[~valid] == -1).all() and not valid.all()


@pytest.mark.parametrize("kind", ["land", "water"])
def test_disagreement_of_several_models_is_their_mutual_information(
    kind, models, scene, tmp_path, request
):
    one = request.getfixturevalue(kind)
    rng = np.random.default_rng(0)
    shape, names = one.weights.shape, {}
    if kind == "land":
        names = {"class_names": ["water", "forêt", "bare soil", "town"]}
    members = [one] + [
        make_pixel_model(
            models / f"{kind}_{number}.pth",
            rng.normal(0, 4, shape),
            rng.normal(0, 1, shape[0]),
            **names,
        )
        for number in (1, 2)
    ]
    window = ("--patch_size", "128", "--overlap", "0", "--save_uncertainty")
    files = [member.path for member in members]
    assert run(files, scene, tmp_path / "map.tif", *window) == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    with rasterio.open(tmp_path / "map_uncertainty.tif") as file:
        assert (file.count, file.nodata) == (2, -1)
        assert "mutual information" in file.descriptions[1]
        total, disagreement = file.read()
    each = [member.probabilities(image) for member in members]
    expected = entropy_share(np.mean(each, axis=0))
    mutual = expected - np.mean([entropy_share(p) for p in each], axis=0)
    np.testing.assert_allclose(total[valid], expected[valid], atol=1e-5)
    np.testing.assert_allclose(disagreement[valid], mutual[valid], atol=1e-5)
    assert mutual[valid].max() > 0.1 and (disagreement[~valid] == -1).all()


def test_models_that_agree_have_no_disagreement(land, scene, tmp_path):
    output, options = tmp_path / "map.tif", ("--save_uncertainty",)
    assert run([land.path, land.path], scene, output, *options) == 0
    with rasterio.open(tmp_path / "map_uncertainty.tif") as file:
        total, disagreement = file.read()
    assert disagreement[disagreement >= 0].max() < 1e-5 < total.max()


@pytest.mark.parametrize("kind", ["land", "water"])
def test_probabilities_are_a_band_per_class_within_half_a_step(
    kind, scene, tmp_path, request
):
    model = request.getfixturevalue(kind)
    assert run(model.path, scene, tmp_path / "map.tif", "--save_probabilities") == 0
    with rasterio.open(scene) as file:
        image, valid = file.read(), file.read_masks(1) > 0
    expected = model.probabilities(image)
    names = ["water", "forêt", "bare soil", "town"]
    if kind == "water":
        expected = np.concatenate([1 - expected, expected])
        names = ["background", "foreground"]
    with rasterio.open(tmp_path / "map_probabilities.tif") as file:
        assert file.count == len(names) and set(file.dtypes) == {"uint8"}
        assert file.nodata == 255 and file.scales == (1 / 254,) * file.count
        assert file.descriptions == tuple(f"probability of {name}" for name in names)
        stored = file.read()
    assert (stored[:, ~valid] == 255).all() and stored[:, valid].max() <= 254
    np.testing.assert_allclose(
        (stored / 254)[:, valid], expected[:, valid], atol=0.5 / 254 + 1e-5
    )


# --- cloud-optimized maps ---------------------------------------------------------------


def tall_blobs(height: int, width: int) -> np.ndarray:
    """A scene of blocks of 3 x 5 pixels, so that an average of class numbers would be seen."""
    small = noise(height // 3 + 1, width // 5 + 1)
    return small.repeat(3, axis=1).repeat(5, axis=2)[:, :height, :width]


def test_a_cog_holds_the_pixels_of_the_geotiff_and_overviews(land, tmp_path):
    pixels = tall_blobs(530, 700)
    pixels[:, :90, :120] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    options = ("--patch_size", "512", *EVERYTHING)
    for form in ("gtiff", "cog"):
        output = tmp_path / form / "map.tif"
        assert run(land.path, scene, output, "--format", form, *options) == 0
    assert {path.name for path in (tmp_path / "cog").iterdir()} == {
        path.name for path in (tmp_path / "gtiff").iterdir()
    }
    for name in ("map", "map_confidence", "map_uncertainty", "map_probabilities"):
        with (
            rasterio.open(tmp_path / "gtiff" / f"{name}.tif") as plain,
            rasterio.open(tmp_path / "cog" / f"{name}.tif") as cog,
        ):
            assert cog.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert "LAYOUT" not in plain.tags(ns="IMAGE_STRUCTURE")
            np.testing.assert_array_equal(cog.read(), plain.read())
            for what in ("crs", "transform", "nodata", "dtypes", "scales"):
                assert getattr(cog, what) == getattr(plain, what)
            assert cog.descriptions == plain.descriptions
            ours = {"SOFTWARE", "MODEL", "CLASS_NAMES", "PRECISION", "NORMALIZATION"}
            assert ours <= cog.tags().keys()
            assert {tag: cog.tags()[tag] for tag in ours} == {
                tag: plain.tags()[tag] for tag in ours
            }
            assert cog.overviews(1) and not plain.overviews(1)
    beside = ElementTree.parse(tmp_path / "cog" / "map.tif.aux.xml").getroot()
    assert [node.text for node in beside.iter("Category")][:1] == ["water"]


def test_overviews_of_classes_are_classes_and_those_of_confidence_are_means(
    models, tmp_path
):
    model = make_pixel_model(
        models / "bands.pth", 60 * np.eye(5), np.zeros(5), class_names=list("abcde")
    )
    stripes = np.full((5, 600, 600), 300, np.uint16)  # classes 1 and 4, three to one
    stripes[1], stripes[4, :, ::4] = 5000, 9000
    scene = write_scene(tmp_path / "scene.tif", stripes)
    options = ("--patch_size", "512", "--format", "cog", "--save_confidence")
    assert run(model.path, scene, tmp_path / "map.tif", *options) == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.colorinterp == (ColorInterp.palette,)
        assert file.colormap(1)[4] == (*class_colours(list("abcde"))[4], 255)
        assert file.overviews(1) == [2]
        assert set(np.unique(file.read())) == {1, 4}
    for name in ("map.tif", "map_confidence.tif"):
        with rasterio.open(tmp_path / name) as file:
            full = file.read(1)
        with rasterio.open(tmp_path / name, overview_level=0) as file:
            small = file.read(1)
        squares = full.reshape(300, 2, 300, 2)
        if name == "map.tif":
            assert set(np.unique(small)) <= {1, 4}  # an average would be 2 or 3
            same = (squares == squares[:, :1, :, :1]).all(axis=(1, 3))
            np.testing.assert_array_equal(small[same], squares[:, 0, :, 0][same])
        else:
            np.testing.assert_allclose(small, squares.mean(axis=(1, 3)), rtol=1e-5)


def test_a_small_cog_has_no_overviews_and_is_one_all_the_same(land, scene, tmp_path):
    assert run(land.path, scene, tmp_path / "map.tif", "--format", "cog") == 0
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.overviews(1) == [] and file.nodata == 255
        assert file.colorinterp == (ColorInterp.palette,)
        assert file.compression.name == "deflate"


# --- creation options and metadata ------------------------------------------------------


def test_outputs_become_bigtiff_when_they_may_need_it(
    land, scene, tmp_path, monkeypatch
):
    plain, profiles = create_tiff, []
    copy, copied = rasterio.shutil.copy, []

    def create(path, **profile):
        profiles.append(profile)
        return plain(path, **profile)

    def copying(source, target, **options):
        copied.append(options)
        return copy(source, target, **options)

    patch_everywhere(monkeypatch, "common.tiffs.create_tiff", create)
    monkeypatch.setattr(rasterio.shutil, "copy", copying)
    options = (*EVERYTHING, "--format", "cog")
    assert run(land.path, scene, tmp_path / "map.tif", *options) == 0
    assert len(profiles) == len(copied) == 4
    assert {profile["bigtiff"].upper() for profile in profiles} == {"IF_SAFER"}
    assert {options["BIGTIFF"] for options in copied} == {"IF_SAFER"}


def test_every_output_says_what_made_it(land, scene, tmp_path):
    assert run(land.path, scene, tmp_path / "map.tif", *EVERYTHING) == 0
    for name in ("map", "map_confidence", "map_uncertainty", "map_probabilities"):
        with rasterio.open(tmp_path / f"{name}.tif") as file:
            tags = file.tags()
        assert tags["SOFTWARE"] == f"SemanticSeg4EO {VERSION}"
        assert (tags["MODEL"], tags["MODEL_FILES"]) == ("unet-dropout", "land.pth")
        assert (tags["NORMALIZATION"], tags["PRECISION"]) == ("dataset", "fp32")
        names = ["water", "forêt", "bare soil", "town"]
        assert json.loads(tags["CLASS_NAMES"]) == names


# --- options ----------------------------------------------------------------------------


def test_confidence_and_quicklook_are_written_only_when_asked_for(
    land, scene, tmp_path
):
    folder = tmp_path / "out"
    assert run(land.path, scene, folder / "map.tif") == 0
    plain = {"map.tif", "map.tif.aux.xml", "map.qml", "map_statistics.json"}
    assert {path.name for path in folder.iterdir()} == plain
    options = ("--save_confidence", "--quicklook", "--overwrite")
    assert run(land.path, scene, folder / "map.tif", *options) == 0
    more = {"map_confidence.tif", "map_confidence.qml", "map_quicklook.png"}
    assert {path.name for path in folder.iterdir()} == plain | more


@pytest.mark.usefixtures("real_pictures")
@pytest.mark.parametrize("options", [(), ("--save_confidence",)])
def test_a_quicklook_shows_the_map_in_its_colours(land, scene, tmp_path, options):
    from matplotlib.image import imread

    assert run(land.path, scene, tmp_path / "map.tif", "--quicklook", *options) == 0
    picture = (imread(tmp_path / "map_quicklook.png")[..., :3] * 255).round()
    assert picture.shape[0] > 300
    assert picture.shape[1] / picture.shape[0] > (2.2 if options else 1.5)
    for colour in class_colours(["water", "forêt", "bare soil", "town"]):
        assert (picture == colour).all(axis=-1).sum() > 500
