"""``--start_from``: a training that begins with the weights of a model."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import (
    QUICK,
    SENTINEL,
    interrupt,
    run_main,
    same_weights,
    train,
    write_dataset,
    write_model,
)
from torch.nn.functional import conv2d

from common.architectures import ARCHITECTURES, ModelConfig, default_class_names
from common.errors import CheckpointError, DatasetError, OptionError
from common.patches import list_pairs
from common.repeat import command_line
from model_training import Normalization, build_model, load_checkpoint, save_checkpoint
from training.kernels import last_conv
from training.samples import index_samples
from training.scaling import choose_normalization, require_start_units
from training.settings import TrainingConfig
from training.start import (
    find_start,
    kept_names,
    match_rows,
    read_start,
    settle_model,
    start_model,
)

BANDS = ("B02", "B03", "B04", "B08", "B8A")
STATISTICS = Normalization("dataset", (0.0, 1.0, 2.0, 3.0, 4.0), (10.0, 20.0, 30.0, 40.0, 50.0))  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def write_start(path, bands=BANDS, names=("water", "forest", "town"), **metadata):
    """A model of five bands and three classes, or of two as a binary one."""
    outputs = 1 if len(names) == 2 else len(names)
    count = metadata.pop("count", len(bands or BANDS))
    config = ModelConfig("linknet", count, outputs, "tu-test_resnet")
    model = build_model(config).eval()
    rule = metadata.pop("normalization", STATISTICS)
    more = {"class_names": list(names), "input_size": [32, 32]} | metadata
    if bands:
        more["band_descriptions"] = list(bands)
    save_checkpoint(path, model, config, rule, more)
    return path


def index_of(tmp_path, descriptions=BANDS, count: int | None = None):
    bands = count or len(descriptions)
    root = write_dataset(
        tmp_path / "patches", 2, 1, 0, bands=bands, descriptions=descriptions
    )
    return index_samples(list_pairs(root, "train"), 3, 255)


def settings(file, **more) -> TrainingConfig:
    given = {"dataset_root": "patches", "mode": "multiclass", "classes": 3}
    return settle_model(TrainingConfig(start_from=str(file), **given | more))


def begin(config, index, names=("water", "forest", "town")):
    start = find_start(config, index)
    return start_model(config.model_config(index.shape[0]), start, names).eval()


# --- names -------------------------------------------------------------------------------------


def test_model_and_encoder_come_from_the_file(tmp_path):
    config = settings(write_start(tmp_path / "a.pth"))
    assert (config.model, config.encoder_name) == ("linknet", "tu-test_resnet")
    same = settings(config.start_from, model="linknet", encoder_name="tu-test_resnet")
    assert same == config


@pytest.mark.parametrize(
    ("option", "value", "has"),
    [
        ("model", "unet", "linknet"),
        ("encoder_name", "resnet18", "tu-test_resnet"),
        ("encoder_depth", 3, 5),
    ],
)
def test_another_model_than_that_of_the_file_is_refused(tmp_path, option, value, has):
    file = write_start(tmp_path / "a.pth")
    with pytest.raises(OptionError, match=f"--{option} {value}, but .*a.pth has {has}"):
        settings(file, **{option: value})


def test_models_without_an_encoder_are_a_start_too(tmp_path):
    config = ModelConfig("pixel", 3, 1, None)
    model = build_model(config)
    save_checkpoint(tmp_path / "a.pth", model, config, Normalization(), {})
    found = settings(tmp_path / "a.pth")
    assert found.model == "pixel"
    # the settings that the report stores make the run again
    assert settle_model(found) == found and "--encoder" not in command_line("", found)


@pytest.mark.parametrize(
    ("model", "own"), [("unet-dropout", None), ("deeplabv3_resnet50", "resnet50")]
)
def test_a_name_of_an_encoder_that_a_model_does_not_have_is_no_obstacle(
    tmp_path, model, own
):
    config = ModelConfig(model, 3, 1, own)
    said = {"encoder_name": "resnet101"}  # as earlier versions stored the option
    save_checkpoint(
        tmp_path / "a.pth", build_model(config), config, Normalization(), said
    )
    found = settings(tmp_path / "a.pth")
    assert (found.model, found.encoder_name) == (model, own)
    assert settle_model(found) == found


def test_options_that_contradict_a_start_are_refused(tmp_path):
    with pytest.raises(OptionError, match="--model is required, unless --start_from"):
        TrainingConfig("patches")
    for more in ({"pretrained": True}, {"encoder_weights": "imagenet"}):
        with pytest.raises(OptionError, match="--start_from a.pth: expected neither"):
            TrainingConfig("patches", start_from="a.pth", **more)
    for more in ({"sensor": "sentinel2"}, {"normalization_from": "model"}):
        with pytest.raises(OptionError, match="or --start_from with it"):
            TrainingConfig("patches", model="unet", **more)


def test_weights_alone_are_no_start(tmp_path):
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match="holds weights alone; --start_from takes"
    ):
        settings(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"No checkpoint .*none\.pth"):
        settings(tmp_path / "none.pth")


# --- bands -------------------------------------------------------------------------------------


def test_the_same_bands_in_another_order_give_the_same_logits(tmp_path):
    file = write_start(tmp_path / "a.pth")
    order = [3, 0, 4, 2, 1]
    index = index_of(tmp_path, tuple(BANDS[i] for i in order))
    model = begin(settings(file), index)
    images = torch.rand(1, 5, 32, 32)
    with torch.inference_mode():
        expected = load_checkpoint(file).model(images)
        torch.testing.assert_close(model(images[:, order]), expected)


def test_the_same_bands_need_no_first_layer_that_reads_them(tmp_path, monkeypatch):
    def none(*_):
        raise OptionError("The encoder rearranges the image")

    monkeypatch.setattr("training.start.band_layers", none)
    file, index = write_start(tmp_path / "a.pth"), index_of(tmp_path)
    model = begin(settings(file), index)
    state = load_checkpoint(file).model.state_dict()
    assert all(
        torch.equal(value, state[key]) for key, value in model.state_dict().items()
    )
    with pytest.raises(OptionError, match="rearranges"):
        begin(settings(file), index_of(tmp_path / "b", BANDS[::-1]))


def test_new_bands_get_the_mean_and_old_ones_go(tmp_path):
    file = write_start(tmp_path / "a.pth")
    index = index_of(tmp_path, ("elevation", "B04", "nir"))
    state = begin(settings(file), index).network.state_dict()
    old = load_checkpoint(file).model.network.state_dict()
    first = "encoder.model.conv1.0.weight"
    expected = [old[first].mean(dim=1), old[first][:, 2], old[first][:, 3]]
    torch.testing.assert_close(state[first], torch.stack(expected, 1) * 5 / 3)
    assert all(torch.equal(state[k], old[k]) for k in old if k != first)
    # what is the same in all bands leaves the layer as strong as before
    torch.testing.assert_close(
        conv2d(torch.ones(1, 5, 8, 8), old[first]).abs().mean(),
        conv2d(
            torch.ones(1, 5, 8, 8), begin(settings(file), index_of(tmp_path / "same"))
            .network.state_dict()[first],
        ).abs().mean(),
    )  # fmt: skip


def test_names_of_another_sensor_meet_by_their_meaning(tmp_path):
    file = write_start(tmp_path / "a.pth", sensor="Sentinel-2A")
    index = index_of(tmp_path, ("B2", "B3", "B4", "B5"))
    start = find_start(settings(file, sensor="landsat-oli"), index)
    assert list(start.matches) == [0, 1, 2, 3] and start.by_name
    # equal spelling is enough where one of the sensors is not known
    start = find_start(settings(file), index_of(tmp_path / "b", ("B2", "B3", "B4")))
    assert list(start.matches) == [0, 1, 2]


def test_the_sensor_that_was_said_of_a_model_is_known_of_it(tmp_path):
    params = {"sensor": "landsat-oli"}
    bands = ("B2", "B3", "B4", "B5", "dem")
    file = write_start(tmp_path / "a.pth", bands=bands, training_params=params)
    index = index_of(tmp_path, ("B5", "B8", "dem"))
    start = find_start(settings(file, sensor="sentinel2"), index)
    assert start.matches == [None, 3, 4]


def test_bands_without_names_meet_by_position_where_there_are_as_many(tmp_path):
    file = write_start(tmp_path / "a.pth", bands=None, count=5)
    start = find_start(settings(file), index_of(tmp_path))
    assert list(start.matches) == [0, 1, 2, 3, 4] and not start.by_name
    with pytest.raises(DatasetError, match="a.pth has no names of bands.*5 bands.* 4;"):
        find_start(settings(file), index_of(tmp_path / "b", BANDS[:4]))
    file = write_start(tmp_path / "b.pth")
    with pytest.raises(DatasetError, match="patches has no names of bands"):
        find_start(settings(file), index_of(tmp_path / "c", (), count=4))


def test_no_band_in_common_is_refused(tmp_path):
    file = write_start(tmp_path / "a.pth")
    index = index_of(tmp_path, ("VV", "VH"))
    with pytest.raises(DatasetError, match=r"have none of them \(VV, VH\)$"):
        find_start(settings(file), index)


def test_dates_on_one_side_alone_are_the_reason_that_is_given(tmp_path):
    file = write_start(tmp_path / "a.pth")
    index = index_of(tmp_path, [f"{name}_20210619" for name in BANDS])
    with pytest.raises(DatasetError, match=r"; bands with dates are matched with"):
        find_start(settings(file), index)


# --- classes -----------------------------------------------------------------------------------


def test_rows_of_equal_names_are_kept_at_their_new_place(tmp_path):
    file = write_start(tmp_path / "a.pth")
    config = settings(file, classes=4)
    names = ("town", "ice", "water", "sand")
    state = begin(config, index_of(tmp_path), names).network.state_dict()
    old = load_checkpoint(file).model.network.state_dict()
    head = "segmentation_head.0.weight"
    assert torch.equal(state[head][0], old[head][2])
    assert torch.equal(state[head][2], old[head][0])
    new = state[head][[1, 3]].flatten(1)
    assert not any(
        torch.equal(row, known) for row in new for known in old[head].flatten(1)
    )


def test_a_binary_row_is_the_difference_of_two_classes():
    old = torch.tensor([[4.0], [1.0], [7.0]])
    names, fresh = ("water", "forest", "town"), torch.zeros(1, 1)
    assert match_rows(fresh, old, ("water", "town"), names).item() == 3.0
    # against all others where the background is no class of the model
    assert match_rows(fresh, old, ("rest", "town"), names).item() == 7 - 2.5
    assert match_rows(fresh, old, ("rest", "ice"), names) is fresh
    back = match_rows(
        torch.zeros(3, 1), torch.tensor([[6.0]]), names, ("water", "town")
    )
    assert back.flatten().tolist() == [-3.0, 0.0, 3.0]
    same = match_rows(
        fresh, torch.tensor([[6.0]]), ("water", "town"), ("water", "town")
    )
    assert same.item() == 6.0


def test_a_binary_model_keeps_nothing_of_one_that_lacks_its_foreground():
    names = ("background", "road")
    assert kept_names(names, ("background", "building"), binary=True) == []
    assert kept_names(names, ("background", "building"), binary=False) == ["background"]
    assert kept_names(names, ("a", "road", "b"), binary=True) == ["road"]


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_only_the_last_convolution_depends_on_the_number_of_classes(model):
    encoder = {"dpt": "tu-test_vit", "deeplabv3_resnet50": None}.get(model, "resnet18")
    encoder = encoder if ARCHITECTURES[model].takes_encoder else None
    with torch.device("meta"):
        one, other = (
            build_model(ModelConfig(model, 3, k, encoder)).network for k in (3, 5)
        )
    shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (one, other)]
    differ = {key for key in shapes[0] if shapes[0][key] != shapes[1][key]}
    assert differ == {f"{last_conv(one)}.{part}" for part in ("weight", "bias")}


# --- normalization -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("descriptions", "asked", "kept"),
    [
        (("B04", "B02"), "auto", [2, 0]),
        (("B04", "B02"), "data", [None, None]),
        (("B04", "elevation"), "auto", [None, None]),
        (("B04", "elevation"), "model", [2, None]),
        ((), "auto", [None] * 5),
        ((), "model", [0, 1, 2, 3, 4]),
    ],
)
def test_whose_percentiles_are_taken(tmp_path, descriptions, asked, kept):
    file = write_start(tmp_path / "a.pth")
    index = index_of(tmp_path, descriptions, count=len(descriptions) or 5)
    config = settings(file, normalization_from=asked)
    found = choose_normalization(config, index, find_start(config, index))
    own = np.percentile(np.concatenate(index.samples), [1, 99], axis=0)
    for band, old in enumerate(kept):
        low = own[0][band] if old is None else STATISTICS.low[old]
        high = own[1][band] if old is None else STATISTICS.high[old]
        assert (found.low[band], found.high[band]) == pytest.approx((low, high))


def test_values_in_other_units_than_the_models_are_refused(tmp_path, caplog):
    file = write_start(tmp_path / "a.pth")  # up to 50
    index = index_of(tmp_path, ("B04", "B02"))  # up to 10,000
    start = find_start(settings(file), index)
    with pytest.raises(DatasetError, match="lie mostly outside of .*data, or model"):
        require_start_units(settings(file), index, start)
    for asked in ("data", "model"):
        config = settings(file, normalization_from=asked)
        require_start_units(config, index, start)
    assert "percentiles of a.pth are clipped in B04 (100%), B02 (100%)" in caplog.text
    for high, message in ((1e6, "reach 0.* of"), (1e4, None)):
        wide = Normalization("dataset", (0.0,) * 5, (high,) * 5)
        start = find_start(settings(write_start(file, normalization=wide)), index)
        with pytest.raises(DatasetError, match=message) if message else nullcontext():
            require_start_units(settings(file), index, start)


def test_a_model_of_the_image_rule_has_no_percentiles_to_keep(tmp_path):
    file = write_start(tmp_path / "a.pth", normalization=Normalization("image"))
    index = index_of(tmp_path)
    config = settings(file)
    found = choose_normalization(config, index, find_start(config, index))
    assert found.rule == "dataset"
    config = settings(file, normalization_from="model")
    with pytest.raises(DatasetError, match="none to keep; give auto or data"):
        choose_normalization(config, index, find_start(config, index))


# --- runs --------------------------------------------------------------------------------------

FROM = ("--model", "linknet", "--encoder_name", "tu-test_resnet")


@pytest.fixture
def trained(tmp_path):
    """A dataset, and a model of its first bands."""
    root = write_dataset(tmp_path / "data", 4, 2, 0, descriptions=SENTINEL)
    file = write_start(tmp_path / "first.pth", bands=SENTINEL[:5], names=("no", "yes"))
    return root, file


def test_a_run_says_and_records_what_it_starts_from(trained, tmp_path):
    root, file = trained
    run = train(root, tmp_path / "run", "--start_from", file, "--learning_rate", 1e-9)
    assert "first.pth: 5 of 10 bands matched by name, 0 of 2 classes kept" in run.err
    assert "normalization: percentiles of the training patches" in run.err
    digest = torch.load(file, weights_only=True)["metadata"]["weights_sha256"]
    for name in ("final_model", "last", "best_loss"):
        expected = {"file": "first.pth", "sha256": digest}
        assert run.metadata(name)["started_from"] == expected
    # with hardly a step taken, the decoder is still the first model's
    old = load_checkpoint(file).model.network.state_dict()
    new = run.checkpoint()["model_state_dict"]
    key = "decoder.blocks.0.block.0.0.weight"
    torch.testing.assert_close(new[key], old[key], atol=1e-6, rtol=0)
    assert run.report["settings"]["model"] == "linknet"
    assert run.report["settings"]["start_from"] == str(file)


def test_a_run_without_a_start_records_none(small_data, tmp_path):
    assert train(small_data, tmp_path).metadata()["started_from"] is None


@pytest.mark.slow
def test_folds_start_from_the_model_and_need_it_no_more(trained, tmp_path, monkeypatch):
    root, file = trained
    options = ("--start_from", file, "--val_strategy", "kfold", "--n_splits", 2)
    options += ("--epochs", 2)
    whole = train(root, tmp_path / "whole", *options)

    with monkeypatch.context() as patched:
        interrupt(patched, "training.epochs.train_epoch", 4)  # in the second fold
        words = (
            "--dataset_root",
            root,
            "--save_dir",
            tmp_path / "cut",
            *QUICK,
            *options,
        )
        assert run_main(*words)[0] == 130
    file.unlink()
    resumed = train(root, tmp_path / "cut", *options, "--resume")
    for name in ("fold_1/model_final_model.pth", "fold_2/model_final_model.pth", "model_final_model.pth"):  # fmt: skip
        files = (run.save_dir / name for run in (whole, resumed))
        one, other = (torch.load(f, weights_only=True) for f in files)
        assert same_weights(one, other)
        assert one["metadata"]["started_from"] == other["metadata"]["started_from"]


@pytest.mark.slow
def test_folds_trained_alone_are_gathered_without_the_first_model(trained, tmp_path):
    root, file = trained
    options = ("--start_from", file, "--val_strategy", "kfold", "--n_splits", 2)
    train(root, tmp_path / "run", *options, "--only_fold", 1)
    copy = tmp_path / "run" / "fold_1" / "model_start.pth"
    file.unlink()
    whole = train(root, tmp_path / "run", *options)
    assert f"{file} is not there: its copy {copy} is taken" in whole.err
    assert whole.metadata()["started_from"]["file"] == file.name
    # nothing of a whole run, so that the same command continues an interrupted gathering
    assert not (whole.save_dir / "model_start.pth").exists()


def test_folds_of_another_first_model_are_not_gathered(trained, tmp_path, monkeypatch):
    root, file = trained
    options = ("--val_strategy", "kfold", "--n_splits", 2)
    train(root, tmp_path / "run", *options, "--start_from", file, "--only_fold", 2)
    words = ("--dataset_root", root, "--save_dir", tmp_path / "run", *QUICK, *options)
    other = write_start(tmp_path / "b.pth", bands=SENTINEL[:5], names=("no", "yes"))
    calls = interrupt(monkeypatch, "training.cross_validation.fit", 99)
    for more in ((), ("--start_from", other), ("--start_from", other, "--check")):
        status, out, err = run_main(*words, *more)  # the missing fold would be first
        assert status == 1 and not calls
        assert "fold_2 belongs to a run with another start_from" in out + err


@pytest.mark.slow
def test_another_first_model_is_another_run(trained, tmp_path):
    root, file = trained
    train(root, tmp_path / "run", "--start_from", file)
    shutil.copy(file, tmp_path / "moved.pth")
    options = ("--resume", "--start_from")
    moved = train(root, tmp_path / "run", *options, tmp_path / "moved.pth")
    assert moved.status == 0
    write_start(tmp_path / "moved.pth", bands=SENTINEL[:5], names=("no", "yes"))

    words = ("--dataset_root", root, "--save_dir", tmp_path / "run", *QUICK)
    status, _, err = run_main(*words, *options, tmp_path / "moved.pth")
    assert status == 1 and "belongs to a run with another start_from" in err


@pytest.mark.parametrize("done", [True, False], ids=["an epoch", "none yet"])
def test_a_first_model_that_was_trained_anew_since_is_taken_as_it_was(
    trained, tmp_path, monkeypatch, done
):
    root, file = trained
    options = ("--start_from", file, "--scheduler", "none", "--epochs")
    if done:
        train(root, tmp_path / "run", *options, 1)
    else:
        place = ("--dataset_root", root, "--save_dir", tmp_path / "run")
        with monkeypatch.context() as patched:
            interrupt(patched, "training.epochs.train_epoch", 1)
            assert run_main(*place, *QUICK, *options, 1)[0] == 130
    copy = tmp_path / "run" / "model_start.pth"
    digest = torch.load(copy, weights_only=True)["metadata"]["weights_sha256"]
    write_start(file, bands=SENTINEL[:5], names=("no", "yes"))
    resumed = train(root, tmp_path / "run", *options, 2, "--resume")
    assert f"{file} has changed since: its copy {copy} is taken" in resumed.err
    assert resumed.metadata()["started_from"]["sha256"] == digest
    assert ("resuming after epoch 1" in resumed.err) == done


def test_a_run_does_not_remove_the_model_that_it_starts_from(trained, tmp_path):

    root, _ = trained
    run = train(root, tmp_path / "run")
    first = run.save_dir / "model_final_model.pth"
    words = ("--dataset_root", root, "--save_dir", run.save_dir, *QUICK, "--overwrite")
    status, _, err = run_main(*words, "--start_from", first)
    assert status == 2 and "expected another --save_dir" in err and first.is_file()


def test_a_check_finds_what_does_not_fit(trained, tmp_path):

    root, _ = trained
    words = ("--dataset_root", root, "--save_dir", tmp_path / "run", "--check")
    status, out, err = run_main(*words, "--start_from", tmp_path / "none.pth")
    assert status == 1 and "No checkpoint" in out + err
    file = write_start(tmp_path / "radar.pth", bands=("VV", "VH"), names=("no", "yes"),
                       normalization=Normalization("image"))  # fmt: skip
    status, out, err = run_main(*words, "--start_from", file)
    assert status == 1 and "have none of them" in out + err
    whole = write_start(tmp_path / "all.pth", bands=SENTINEL[:5], names=("no", "yes"))
    status, out, err = run_main(*words, "--start_from", whole)
    assert status == 0 and "all.pth: 5 of 10 bands matched by name" in err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_the_earlier_toolkit_is_a_start(tmp_path):
    root = write_dataset(tmp_path / "data", 4, 2, 0, bands=3)
    file = tmp_path / "earlier.pth"
    write_model(file, bands=3)
    content = torch.load(file, weights_only=True)
    kept = ("model_name", "encoder_name", "in_channels", "num_classes", "mode")
    metadata = {key: content["metadata"][key] for key in kept}
    content = {"model_state_dict": content["model_state_dict"], "config": metadata}
    torch.save(content, file)
    config = settle_model(TrainingConfig(str(root), start_from=str(file)))
    assert config.model == metadata["model_name"]
    checkpoint = read_start(config)
    assert checkpoint.class_names == default_class_names(metadata["num_classes"])
    index = index_samples(list_pairs(root, "train"), 2, 255)
    assert find_start(config, index).by_name is False
    assert json.dumps(find_start(config, index).record)
