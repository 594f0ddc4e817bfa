"""Files of encoder weights for many bands: kernels by band, scaling, published files."""

from __future__ import annotations

import hashlib
import re
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from helpers import ENCODER, SENTINEL, TINY, run_main, settings, train, write_dataset
from test_weights import encoder_of, first_kernels

from common.errors import DatasetError, OptionError, SegmentationError
from common.patches import PatchHeader
from common.provenance import Facts
from common.sensors import SENSORS, plain_name
from training import published
from training.file_bands import file_bands, rgb_channels
from training.published import PUBLISHED, PublishedWeights
from training.samples import SampleIndex
from training.scaling import choose_normalization, require_units
from training.weights import build_initial_model, find_weights, initial_model

S2 = tuple(SENSORS["sentinel2"])
ADDRESS = "https://example.org/weights/"


def index_of(*descriptions, values=(100, 5000), sensor: str | None = None):
    """A split whose bands have names, and values between two."""
    pixels = np.random.default_rng(0).uniform(*values, (500, len(descriptions)))
    facts = Facts(sensor, ())
    header = PatchHeader("train", descriptions, (), "uint16", facts, None)
    shape = (len(descriptions), 32, 32)
    return SampleIndex(
        [], np.empty(0), [pixels], shape, descriptions, None, [], headers=(header,)
    )


def encoder_file(folder: Path, bands: int, encoder: str = "test_resnet") -> Path:
    """The file that timm would distribute for so many bands."""
    torch.manual_seed(99)
    file = folder / f"{encoder}_{bands}.pth"
    torch.save(timm.create_model(encoder, in_chans=bands).state_dict(), file)
    return file


@pytest.fixture
def publish(monkeypatch):
    """Enter a file into the table, under its name with the beginning of its digest."""

    def enter(file: Path, bands=S2, low=0.0, high=10_000.0, sensor="sentinel2") -> Path:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        there = file.rename(file.with_name(f"{file.stem}-{digest}.pth"))
        count = len(bands)
        row = PublishedWeights(
            "test_resnet", sensor, tuple(bands), (low,) * count, (high,) * count,
            "divided by 10,000", "made up", ADDRESS + there.name, 1, "CC0-1.0",
        )  # fmt: skip
        monkeypatch.setitem(published.PUBLISHED, there.name, row)
        return there

    return enter


def asked(file: Path | str, **more):
    return settings(
        model="linknet", encoder_name=ENCODER, encoder_weights=str(file), **more
    )


def kernels_of(file: Path) -> torch.Tensor:
    state = torch.load(file, weights_only=True)
    return next(value for value in state.values() if value.ndim == 4)


# --- kernels --------------------------------------------------------------------------------


def test_each_band_gets_the_kernels_of_its_name(tmp_path):
    file = encoder_file(tmp_path, 4)
    config = asked(file, weights_bands="B02,B03,B04,B08")
    network = initial_model(config, index_of("B08", "red", "elevation", "B02", "B03"))
    own, kernels = kernels_of(file), first_kernels(network) * 5 / 4
    for band, match in enumerate([3, 2, None, 0, 1]):
        expected = own.mean(dim=1) if match is None else own[:, match]
        torch.testing.assert_close(kernels[:, band], expected)


def test_the_same_bands_in_another_order_give_the_same_logits(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 13))
    order = np.random.default_rng(3).permutation(13).tolist()
    image, logits = torch.rand(1, 13, 32, 32), []
    for places in (range(13), order):
        torch.manual_seed(1)
        names = [S2[place] for place in places]
        network = initial_model(asked(file), index_of(*names)).eval()
        with torch.inference_mode():
            logits.append(network(image[:, list(places)]))
    torch.testing.assert_close(*logits)


def test_parallel_first_layers_all_get_the_kernels_of_their_bands(tmp_path):
    options = {"model": "linknet", "encoder_name": "mobileone_s0"}
    torch.manual_seed(3)
    one = initial_model(settings(**options), index_of("red", "nir")).eval()
    prefix = "encoder."
    state = one.network.state_dict()
    encoder = {k.removeprefix(prefix): v for k, v in state.items() if prefix in k}
    torch.save(encoder, tmp_path / "own.pth")
    config = settings(
        **options, encoder_weights=str(tmp_path / "own.pth"), weights_bands="red,nir"
    )
    other = initial_model(config, index_of("nir", "red")).eval()
    image = torch.rand(1, 2, 32, 32)
    with torch.inference_mode():
        expected = one.network.encoder(image)[1]
        found = other.network.encoder(image[:, [1, 0]])[1]
    torch.testing.assert_close(found, expected)


def test_each_date_gets_the_kernels_of_its_bands(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 13))
    names = [
        f"{band}_{day}" for day in ("20210619", "20210724") for band in ("B04", "B8A")
    ]
    found = file_bands(asked(file), index_of(*names, "slope"))
    assert found.matches == [3, 8, 3, 8, None]
    assert str(found) == "kernels of B4, B8A, the mean of all for 1 of the data's bands"


def test_colours_of_each_date_get_their_kernels_and_scaling(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 3), ("B4", "B3", "B2"))
    days = ("20210619", "20210724")
    names = [f"{band}_{day}" for day in days for band in ("B02", "B03", "B04", "B8A")]
    index = index_of(*names)
    known = [True, True, True, False] * 2
    high = choose_normalization(asked(file), index).high
    assert [value == 10_000 for value in high] == known
    model = initial_model(asked(file), index)
    kernels = first_kernels(model)
    expected = kernels_of(file) * 3 / len(names)
    for place, band in ((0, 2), (1, 1), (2, 0), (4, 2), (5, 1), (6, 0)):
        torch.testing.assert_close(kernels[:, place], expected[:, band])
    picked = asked(file, rgb_bands="3,2,1")
    assert file_bands(picked, index) is None


def test_a_resnet_and_its_classifier_go_into_the_encoder_of_that_name(tmp_path):
    file = encoder_file(tmp_path, 10, "resnet18")
    config = settings(
        encoder_name="resnet18",
        encoder_weights=str(file),
        weights_bands=",".join(SENTINEL),
    )
    network = initial_model(config, index_of(*SENTINEL[::-1]))
    stored = torch.load(file, weights_only=True)
    loaded = encoder_of(network).state_dict()
    assert stored.keys() - loaded.keys() == {"fc.weight", "fc.bias"}
    torch.testing.assert_close(loaded["conv1.weight"], stored["conv1.weight"].flip(1))
    torch.testing.assert_close(
        loaded["layer4.1.bn2.weight"], stored["layer4.1.bn2.weight"]
    )


@pytest.mark.parametrize("image_size", [160, 64])
def test_a_vision_transformer_goes_into_dpt(tmp_path, image_size):
    source = timm.create_model("test_vit", in_chans=4, img_size=image_size)
    # as published: without a classifier
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("head.")}
    torch.save(state, tmp_path / "vit.pth")
    config = settings(
        model="dpt",
        encoder_name="tu-test_vit",
        encoder_weights=str(tmp_path / "vit.pth"),
        weights_bands="blue,green,red,nir",
    )
    network = initial_model(config, index_of("nir", "red", "green", "blue"))
    loaded = encoder_of(network).state_dict()
    kernels = loaded["model.patch_embed.proj.weight"]
    torch.testing.assert_close(kernels, state["patch_embed.proj.weight"].flip(1))
    positions = loaded["model.pos_embed"]
    assert positions.shape[1] == 101
    prefix = state["pos_embed"][:, :1]
    torch.testing.assert_close(positions[:, :1], prefix)
    if image_size == 160:
        torch.testing.assert_close(positions, state["pos_embed"])


def test_a_deeper_transformer_is_refused(tmp_path):
    state = timm.create_model("test_vit", in_chans=4).state_dict()
    more = {k.replace("blocks.0", "blocks.6"): v for k, v in state.items()}
    torch.save(state | more, tmp_path / "vit.pth")
    config = settings(
        model="dpt",
        encoder_name="tu-test_vit",
        encoder_weights=str(tmp_path / "vit.pth"),
        weights_bands="blue,green,red,nir",
    )
    with pytest.raises(SegmentationError, match="does not hold the weights of"):
        initial_model(config, index_of("nir", "red", "green", "blue"))


def test_red_green_and_blue_are_found_by_the_sensor():
    landsat = index_of("B1", "B2", "B3", "B4", sensor="Landsat 7 ETM")
    assert rgb_channels(settings(pretrained=True), landsat) == [2, 1, 0]
    unknown = index_of("B1", "B2", "B3", "B4", sensor=None)
    given = settings(pretrained=True, sensor="landsat-tm")
    assert rgb_channels(given, unknown) == [2, 1, 0]


# --- what does not fit ----------------------------------------------------------------------


def test_bands_that_nobody_names_meet_by_position_or_not_at_all(tmp_path, caplog):
    config = asked(encoder_file(tmp_path, 10))
    with pytest.raises(SegmentationError, match="for 10 bands.* 4;.*--weights_bands"):
        initial_model(config, index_of("B02", "B03", "B04", "B08"))
    initial_model(config, index_of(*SENTINEL))
    assert "in their order; --weights_bands names them" in caplog.text


def test_patches_without_names_meet_a_named_file_by_position(tmp_path, publish, caplog):
    config = asked(publish(encoder_file(tmp_path, 13)))
    assert list(file_bands(config, index_of(*[None] * 13)).matches) == list(range(13))
    assert "have no names: taken as B1, B2" in caplog.text
    with pytest.raises(DatasetError, match="no names, and there are 10, not the 13 of"):
        file_bands(config, index_of(*[None] * 10))


def test_as_many_names_as_bands_are_needed(tmp_path):
    config = asked(encoder_file(tmp_path, 4), weights_bands="B2,B3,B4")
    with pytest.raises(SegmentationError, match="for 4 bands, and 3 are named"):
        initial_model(config, index_of("B02", "B03"))


def test_no_band_in_common_is_refused(tmp_path, publish):
    config = asked(publish(encoder_file(tmp_path, 13)))
    with pytest.raises(DatasetError, match="none of them \\(VV, elevation\\)"):
        file_bands(config, index_of("VV", "elevation"))


def test_names_of_an_unknown_sensor_are_never_guessed(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 13))
    ambiguous = index_of("B2", "B3", "B4")
    with pytest.raises(DatasetError, match="not the same on every sensor.*--sensor"):
        file_bands(asked(file), ambiguous)
    assert file_bands(asked(file, sensor="landsat-etm"), ambiguous).matches == [2, 3, 7]
    said = index_of("B2", "B3", "B4", sensor="Sentinel-2A")
    assert file_bands(asked(file), said).matches == [1, 2, 3]


def test_a_swin_transformer_is_refused_by_name(tmp_path):
    name = "sentinel2_swinb_si_ms-fe22a12c.pth"
    with pytest.raises(OptionError, match=f"{name}: this is a Swin transformer"):
        asked(name)
    file = tmp_path / "renamed.pth"
    torch.save({"features.1.0.attn.logit_scale": torch.ones(4)}, file)
    with pytest.raises(SegmentationError, match="renamed.pth holds a Swin transformer"):
        initial_model(asked(file), index_of(*SENTINEL))


def test_the_checkpoint_of_another_training_is_refused_by_what_it_holds(tmp_path):
    state = {"module.encoder_q.conv1.weight": torch.ones(4)}
    torch.save(
        {"epoch": 99, "arch": "resnet50", "state_dict": state}, tmp_path / "a.pth"
    )
    with pytest.raises(
        SegmentationError, match="tensors \\(epoch, arch, state_dict\\)"
    ):
        initial_model(asked(tmp_path / "a.pth"), index_of(*SENTINEL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights_bands": "B2"}, "--weights_bands B2: expected a file"),
        ({"weights_bands": "B2", "pretrained": True}, "expected a file"),
        ({"encoder_weights": "a.pth", "weights_bands": "B2,,B3"}, "names with commas"),
        ({"encoder_weights": "B13_rn50_softcon.pth", "weights_bands": "B2", "encoder_name": "resnet50"}, "known"),
        ({"encoder_weights": "B13_rn50_softcon.pth"}, "--encoder_name resnet50, whose weights"),
        ({"encoder_weights": "vits16_landsat_oli_sr_moco-c9b8898d.pth"}, "--model dpt"),
        ({"encoder_weights": "a.pth", "weights_bands": "B2,B8", "rgb_bands": "3,2,1"}, "--rgb_bands 3,2,1"),
        ({"sensor": "sentinel2"}, "--sensor sentinel2: expected --pretrained, "),
        ({"normalization_from": "data"}, "--normalization_from data: expected"),
        ({"encoder_weights": "a.pth", "normalization_from": "model"}, "have no percentiles"),
        ({"encoder_weights": "a.pth", "normalization_from": "data", "normalization": "image"}, "percentiles"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_right_are_refused(options, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        settings(**options)


# --- scaling --------------------------------------------------------------------------------


def test_published_weights_bring_their_scaling(tmp_path, publish):
    config = asked(publish(encoder_file(tmp_path, 13)))
    found = index_of("B04", "elevation", "B8A")
    normalization = choose_normalization(config, found)
    low, high = np.percentile(found.samples[0][:, 1], [1, 99])
    assert normalization.low == pytest.approx((0, low, 0))
    assert normalization.high == pytest.approx((10_000, high, 10_000))


def test_red_green_and_blue_have_a_scaling_too(tmp_path, publish):
    config = asked(publish(encoder_file(tmp_path, 3), ("B4", "B3", "B2")))
    normalization = choose_normalization(config, index_of("B02", "B03", "B04"))
    assert normalization.high == (10_000,) * 3
    # B4 of Landsat 7 is near infrared
    landsat = index_of("B1", "B2", "B3", "B4")
    for index in (landsat, index_of("VV", "VH", "dem")):
        with pytest.raises(DatasetError, match="--sensor .*--rgb_bands"):
            require_units(config, index)
    known = asked(config.encoder_weights, sensor="landsat-etm")
    assert choose_normalization(known, landsat).high[:3] == (10_000,) * 3
    unnamed = choose_normalization(config, index_of(*[None] * 5))
    assert max(unnamed.high) < 5001
    picked = asked(config.encoder_weights, rgb_bands="5,2,1")
    high = choose_normalization(picked, index_of(*[None] * 5)).high
    assert [value == 10_000 for value in high] == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1), "reach 0.0% of what the weights were trained with"),
        ((0, 255), "reach 2.5% of what"),
        ((9000, 40_000), "Most values of a band lie outside .*B04 \\(9\\d%\\)"),
        ((-25, -5), "Most values of a band lie outside"),
    ],
)
def test_values_in_other_units_are_refused(tmp_path, publish, values, message):
    file = publish(encoder_file(tmp_path, 13))
    found = index_of("B04", "B8A", values=values)
    with pytest.raises(DatasetError, match=f"{message}.*--normalization_from data"):
        require_units(asked(file), found)
    config = asked(file, normalization_from="data")
    require_units(config, found)
    assert choose_normalization(config, found).high[0] <= values[1]


def test_values_that_are_clipped_are_reported(tmp_path, publish, caplog):
    config = asked(publish(encoder_file(tmp_path, 13)))
    require_units(config, index_of("B04", values=(0, 13_000)))
    assert "are clipped in B04 (2" in caplog.text


def test_a_run_records_the_scaling_and_the_names(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 13))
    root = write_dataset(tmp_path / "data", 4, 2, 0, descriptions=SENTINEL)
    done = train(root, tmp_path / "a", "--encoder_weights", file)
    assert f"normalization: that of {file.name} (divided by 10,000)" in done.err
    assert f"{file.name}: kernels of B2, B3, B4, B5, B6, B7, B8, B8A, B11" in done.err
    stored = done.metadata()
    numbers = {"rule": "dataset", "low": [0.0] * 10, "high": [10_000.0] * 10}
    assert stored["normalization_statistics"] == numbers
    assert stored["training_params"]["normalization_from"] == "auto"
    own = ("--encoder_weights", encoder_file(tmp_path, 10))
    names = ",".join(SENTINEL)
    more = ("--weights_bands", names, "--normalization_from", "data")
    again = train(root, tmp_path / "b", *own, *more)
    assert "normalization: percentiles of the training patches" in again.err
    assert again.metadata()["training_params"]["weights_bands"] == names
    assert max(again.metadata()["normalization_statistics"]["high"]) < 10_000


def test_check_and_training_refuse_other_units_before_any_work(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 13))
    root = write_dataset(tmp_path / "data", descriptions=SENTINEL, dtype="float32")
    options = ("--dataset_root", root, "--encoder_weights", file, *TINY)
    place = ("--save_dir", tmp_path / "models", "--device", "cpu")
    for kind in ((), ("--check",), ("--val_strategy", "kfold", "--n_splits", 3)):
        status, _, err = run_main(*options, *place, *kind)
        assert status == 1 and "give --normalization_from data" in err
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_a_resumed_run_needs_the_weights_no_more(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 13))
    root = write_dataset(tmp_path / "data", 6, 0, 0, descriptions=SENTINEL)
    options = ("--encoder_weights", file, "--val_strategy", "kfold", "--n_splits", 2)
    first = train(root, tmp_path / "a", *options)
    file.unlink()
    again = train(root, tmp_path / "a", *options, "--resume")
    one, other = (run.metadata()["weights_sha256"] for run in (first, again))
    assert one == other


# --- published files ------------------------------------------------------------------------


def test_every_row_of_the_table_is_whole():
    assert len(PUBLISHED) > 30
    for name, row in PUBLISHED.items():
        assert len(row.bands) == len(row.low) == len(row.high), name
        assert all(low < high for low, high in zip(row.low, row.high)), name
        assert {plain_name(band) for band in row.bands} <= SENSORS[row.sensor].keys()
        assert len(set(row.bands)) == len(row.bands), name
        assert row.address.startswith("https://") and row.address.endswith(f"/{name}")
        assert row.encoder in timm.list_models(), name
        assert row.licence and row.scaling and row.training and row.megabytes


def test_a_file_that_was_cut_off_is_refused(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 13))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SegmentationError) as caught:
        initial_model(asked(file), index_of(*S2))
    expected = f"{file} is not the file that was published: its SHA-256 begins with"
    assert str(caught.value).startswith(expected)
    assert "cut off?" in str(caught.value) and ADDRESS in str(caught.value)


def test_a_file_that_is_not_whole_is_found_before_any_patch_is_read(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 13))
    file.write_bytes(file.read_bytes()[:-100])
    root = write_dataset(tmp_path / "data", 2, 1, 0, descriptions=SENTINEL)
    options = ("--dataset_root", root, "--save_dir", tmp_path / "a", *TINY)
    status, _, err = run_main(*options, "--device", "cpu", "--encoder_weights", file)
    assert status == 1 and len(err.splitlines()) == 1
    assert f"{file} is not the file that was published" in err


def test_digests_count_where_a_name_has_one(tmp_path):
    source = encoder_file(tmp_path, 4)
    for name, fine in (("r-12345678.pth", True), ("r-1234567a.pth", False)):
        source = source.rename(tmp_path / name)
        if fine:  # a date
            assert find_weights(str(source)) == source
        else:
            with pytest.raises(SegmentationError, match="not 1234567a") as caught:
                find_weights(str(source))
            told = "if it is a file of your own, give it another name"
            assert str(caught.value).endswith(told)


def test_a_published_name_is_downloaded_once(tmp_path, publish, monkeypatch):
    source = publish(encoder_file(tmp_path, 13))
    asked_for = []

    def download(address, target, *_, **__):
        asked_for.append(address)
        Path(target).write_bytes(source.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path / "..")
    for _ in range(2):
        network = initial_model(asked(source.name), index_of(*S2))
    assert asked_for == [ADDRESS + source.name]
    torch.testing.assert_close(first_kernels(network), kernels_of(source))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (URLError("no route to host"), "could not be downloaded (no network?); get it"),
        (IncompleteRead(b""), "could not be downloaded (no network?); get it"),
        (RuntimeError("invalid hash value"), "was not downloaded whole (invalid hash"),
    ],
)
def test_without_a_network_the_error_gives_the_address(
    tmp_path, publish, monkeypatch, error, message
):
    name = publish(encoder_file(tmp_path, 13)).name

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises(SegmentationError) as caught:
        initial_model(asked(name), index_of(*S2))
    assert str(caught.value).startswith(f"{name} {message}")
    assert f"with a browser from {ADDRESS}{name}" in str(caught.value)


def test_a_path_that_is_not_there_is_not_downloaded(tmp_path, publish):
    file = publish(encoder_file(tmp_path, 13))
    missing = tmp_path / "elsewhere" / file.name
    with pytest.raises(SegmentationError, match=f"No weights file .*{ADDRESS}"):
        build_initial_model(asked(missing).model_config(13), str(missing))
