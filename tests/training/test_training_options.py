"""What the options of a training do, and data of every kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    QUICK,
    TINY,
    patch_everywhere,
    run_main,
    same_weights,
    settings,
    train,
    write_dataset,
    write_raster,
)
from training_helpers import count_pixels, origin_of

from common import UNLABELLED
from common.architectures import BINARY_NAMES, ModelConfig
from common.patches import list_pairs
from common.rasters import open_raster
from model_training import (
    build_model,
    load_checkpoint,
)
from training.epochs import validate
from training.loop import train_one_epoch
from training.run import TrainingRun, build
from training.samples import index_samples

# --- options --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baseline(small_data, tmp_path_factory):
    return train(small_data, tmp_path_factory.mktemp("baseline"))


def test_the_same_seed_gives_the_same_weights_and_scores(
    small_data, baseline, tmp_path
):
    again = train(small_data, tmp_path)
    assert same_weights(again.checkpoint(), baseline.checkpoint())
    assert again.report["validation"] == baseline.report["validation"]


@pytest.mark.slow
def test_reading_ahead_changes_no_number(small_data, tmp_path):
    runs = [
        train(small_data, tmp_path / str(n), "--data_augmentation", "--num_workers", n)
        for n in (0, 2)
    ]
    assert same_weights(runs[0].checkpoint(), runs[1].checkpoint())


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", 1),
        ("--batch_size", 2),
        ("--learning_rate", 1e-2),
        ("--weight_decay", 0.9),
        ("--loss", "focal"),
        ("--use_class_weights",),
        ("--data_augmentation",),
        ("--data_augmentation", "none"),
        ("--normalization", "image"),
        ("--ignore_index", 7),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_an_option_of_training_changes_the_weights(
    small_data, baseline, tmp_path, options
):
    if (
        "--ignore_index" in options
    ):  # declared nodata becomes 7: nothing else may change
        root = write_dataset(
            tmp_path / "data",
            *(4, 2, 0),
            bands=4,
            label_nodata=255,
            unlabelled_rows=10,
        )
        other = train(root, tmp_path / "out", *options)
        assert same_weights(other.checkpoint(), baseline.checkpoint())
        assert other.metadata()["ignore_index"] == 7
        return
    other = train(small_data, tmp_path, *options)
    assert not same_weights(other.checkpoint(), baseline.checkpoint())


def test_the_model_options_choose_the_model(small_data, tmp_path):
    options = ("--model", "unet-dropout", "--encoder_name", "resnet34")
    done = train(small_data, tmp_path, *options, "--dropout_rate", 0.125)
    loaded = load_checkpoint(tmp_path / "model_final_model.pth")
    rates = {
        layer.p
        for layer in loaded.model.modules()
        if isinstance(layer, torch.nn.Dropout2d)
    }
    assert rates == {0.125}
    assert done.metadata()["model_name"] == "unet-dropout"
    assert done.metadata()["encoder_name"] is None


def test_an_encoder_has_the_levels_that_are_asked_for(small_data, tmp_path):
    done = train(small_data, tmp_path, "--encoder_depth", 3)
    assert done.metadata()["encoder_depth"] == 3
    loaded = load_checkpoint(tmp_path / "model_final_model.pth")
    images = torch.rand(1, loaded.config.in_channels, 64, 64)
    assert len(loaded.model.network.encoder(images)) == 4  # and the image


def test_image_normalization_is_recorded_and_followed(small_data, tmp_path):
    done = train(small_data, tmp_path, "--normalization", "image")
    assert done.metadata()["normalization_statistics"]["rule"] == "image"
    matrix = count_pixels(
        tmp_path / "model_final_model.pth", list_pairs(small_data, "validation")
    )
    assert done.report["validation"]["confusion_matrix"] == matrix.tolist()


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [("cosine", [0.01, 0.0075, 0.0025]), ("plateau", [0.01] * 3), ("none", [0.01] * 3)],
)
def test_the_log_tells_the_learning_rates(small_data, tmp_path, scheduler, expected):
    options = ("--scheduler", scheduler, "--epochs", 3, "--learning_rate", 0.01)
    done = train(small_data, tmp_path, *options)
    rates = [float(row["learning_rate"]) for row in done.log]
    assert rates == pytest.approx(expected)


@pytest.mark.slow
def test_the_learning_rate_rises_in_the_first_epochs(small_data, tmp_path):
    options = ("--epochs", 5, "--learning_rate", 0.03, "--warmup_epochs", 2)
    rates = [
        [float(row["learning_rate"]) for row in done.log]
        for name in ("cosine", "none")
        for done in [train(small_data, tmp_path / name, *options, "--scheduler", name)]
    ]
    assert rates[0] == pytest.approx([0.01, 0.02, 0.03, 0.0225, 0.0075])
    assert rates[1] == pytest.approx([0.01, 0.02, 0.03, 0.03, 0.03])


def test_onecycle_rises_to_the_rate_and_falls_in_every_step(
    small_data, tmp_path, monkeypatch
):
    rates, plain = [], torch.optim.AdamW.step

    def step(self, *arguments, **options):
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    options = ("--scheduler", "onecycle", "--epochs", 5, "--learning_rate", 0.01)
    options = (*options, "--batch_size", 2)
    done = train(small_data, tmp_path, *options)
    expected = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        expected, 0.01, total_steps=len(rates)
    )
    assert len(rates) % 5 == 0 and len(rates) > 5
    for rate in rates:
        assert rate == pytest.approx(expected.param_groups[0]["lr"])
        expected.step()
        schedule.step() if rate is not rates[-1] else None
    assert 0.009 < max(rates) <= 0.01
    first = [float(row["learning_rate"]) for row in done.log]
    assert first == pytest.approx(rates[:: len(rates) // 5])


@pytest.mark.slow
def test_a_frozen_encoder_keeps_weights_and_normalization_then_learns(
    small_data, tmp_path, monkeypatch
):
    seen, plain = [], train_one_epoch

    def epoch(model, *arguments, **options):
        before = {k: v.clone() for k, v in model.network.state_dict().items()}
        result = plain(model, *arguments, **options)
        after = model.network.state_dict()
        seen.append({k for k in before if not torch.equal(before[k], after[k])})
        return result

    patch_everywhere(monkeypatch, "training.loop.train_one_epoch", epoch)
    options = ("--model", "unet", "--encoder_name", "resnet18", "--epochs", 3)
    train(small_data, tmp_path, *options, "--freeze_encoder_epochs", 2)
    for changed in seen[:2]:
        assert changed and not any(key.startswith("encoder.") for key in changed)
    assert any(key.startswith("encoder.") and "running" in key for key in seen[2])
    assert any(key.startswith("encoder.") and "conv1.weight" in key for key in seen[2])


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(
    small_data, tmp_path, monkeypatch
):
    norms, plain = [], torch.optim.AdamW.step

    def step(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(small_data, tmp_path / "free", "--epochs", 1)
    free = max(norms)
    norms.clear()
    train(small_data, tmp_path / "clipped", "--epochs", 1, "--clip_grad", free / 10)
    assert max(norms) == pytest.approx(free / 10, rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--warmup_epochs", "2"),
        ("--warmup_epochs", "-1"),
        ("--warmup_epochs", "1", "--scheduler", "onecycle"),
        ("--freeze_encoder_epochs", "1", "--model", "unet-dropout"),  # it has none
        ("--clip_grad", "nan"),
    ],
)
def test_schedules_that_cannot_be_are_wrong_command_lines(small_data, tmp_path, wrong):
    options = ("--dataset_root", small_data, "--save_dir", tmp_path, *QUICK)
    status, _, err = run_main(*options, "--epochs", 2, *wrong)
    assert status == 2 and wrong[0] in err.splitlines()[-1]


@pytest.fixture(scope="module")
def saturating_data(tmp_path_factory):
    """Hardly a second class: once everything is predicted right, no epoch can be better."""
    root = write_dataset(tmp_path_factory.mktemp("one_class"), 4, 2, 0, bands=3)
    for file in root.rglob("labels/*.tif"):
        label = np.zeros((32, 32), np.uint8)
        label[0, 0] = "train" in file.parts
        write_raster(file, label, origin=origin_of(file))
    return root


def test_training_stops_when_patience_runs_out(saturating_data, tmp_path):
    options = ("--mode", "multiclass", "--loss", "ce", "--learning_rate", 0.01)
    done = train(saturating_data, tmp_path, *options, "--epochs", 60, "--patience", 6)
    assert done.report["best"]["combined"] == 1
    history = done.report["history"]
    risen = next(row["epoch"] for row in history if row["val_combined"] == 1)
    assert len(history) == risen + 6 < 60  # a lower loss alone does not prolong it
    assert risen <= done.report["best_epoch"]["combined"] <= risen + 6
    assert done.metadata()["training_params"]["epochs_run"] == risen + 6


@pytest.mark.slow
def test_patience_0_never_stops(saturating_data, tmp_path):
    options = ("--mode", "multiclass", "--loss", "ce", "--learning_rate", 0.01)
    done = train(saturating_data, tmp_path, *options, "--epochs", 12, "--patience", 0)
    assert len(done.report["history"]) == 12


def test_all_checkpoints_appear_even_without_foreground(
    small_data, tmp_path, monkeypatch
):
    config = settings(model="linknet", encoder_name=TINY[3])
    index = index_samples(list_pairs(small_data, "train"), 2, UNLABELLED)
    run = TrainingRun(
        config, index, index, tmp_path, BINARY_NAMES, 1, torch.device("cpu")
    )
    build(run)
    found = 0.1, np.array([[9, 0], [0, 0]])
    patch_everywhere(monkeypatch, "training.loop.evaluate", lambda *_, **__: found)
    row = {"epoch": 1}
    assert validate(run, [], row) == ["loss", "iou", "combined"]
    assert row["val_iou"] is None
    assert (tmp_path / "model_best_loss.pth").exists()
    assert (tmp_path / "model_best_iou.pth").exists()


def test_pretrained_without_a_network_is_one_line_that_says_what_to_do(
    small_data, tmp_path
):
    status, out, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path),
        *("--model", "unet", "--encoder_name", "resnet18", "--pretrained"),
    )
    assert status == 1 and out == ""
    assert err.splitlines()[-1].startswith("error: The imagenet weights of resnet18")
    assert "--encoder_weights" in err and "Traceback" not in err


def test_encoder_weights_and_rgb_bands_shape_the_first_layer(small_data, tmp_path):
    source = build_model(ModelConfig("unet", 3, 1, TINY[3]))
    weights = tmp_path / "encoder.pth"
    torch.save(source.network.encoder.state_dict(), weights)
    first = next(
        layer for layer in source.modules() if isinstance(layer, torch.nn.Conv2d)
    )
    options = ("--encoder_weights", weights, "--rgb_bands", "3,2,1")
    still = ("--learning_rate", 1e-30, "--weight_decay", 0)
    done = train(small_data, tmp_path / "out", *options, *still)
    state = done.checkpoint()["model_state_dict"]
    kernels = next(value for value in state.values() if value.ndim == 4) * 4 / 3
    for colour, channel in enumerate((2, 1, 0)):
        torch.testing.assert_close(
            kernels[:, channel], first.weight[:, colour].detach()
        )
    assert done.metadata()["pretrained"] is True


def test_class_names_of_the_option_are_stored(small_data, tmp_path):
    options = ("--mode", "multiclass", "--class_names", "dry, wet")
    done = train(small_data, tmp_path, *options)
    assert done.metadata()["class_names"] == ["dry", "wet"]
    assert "wet" in done.out


def test_class_names_of_the_option_are_stored_in_binary_mode_too(small_data, tmp_path):
    done = train(small_data, tmp_path, "--class_names", "dry,wet")
    assert done.metadata()["class_names"] == ["dry", "wet"]


def test_num_classes_is_another_name_of_classes(multiclass_data, tmp_path):
    done = train(multiclass_data, tmp_path, "--mode", "multiclass", "--num_classes", 4)
    assert done.metadata()["num_classes"] == 4
    status, _, err = run_main(
        *("--dataset_root", multiclass_data, "--save_dir", tmp_path / "other"),
        *(*QUICK, "--num_classes", 3),
    )
    assert status == 1 and "--classes 3, but the labels in" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--dropout_rate", 0.9), ("--rgb_bands", "3,2,1")],
)
def test_an_option_without_an_effect_is_refused(small_data, tmp_path, option, value):
    status, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path, *QUICK, option, value)
    )
    assert status == 2 and option in err


def test_the_device_is_the_cpu_with_one_line_that_says_so_without_a_gpu(
    small_data, tmp_path
):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, _, err = run_main(
        *("--dataset_root", small_data, "--save_dir", tmp_path, *TINY),
        *("--epochs", 1, "--num_workers", 0),
    )
    assert status == 0
    assert len([line for line in err.splitlines() if "CPU" in line]) == 1


# --- data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["Patch", ""])
@pytest.mark.parametrize("suffix", [".tif", ".TIFF"])
def test_the_root_may_hold_patch_or_the_splits_and_any_tiff_suffix(
    tmp_path, folder, suffix
):
    root = write_dataset(
        tmp_path / "data", 2, 1, 0, bands=3, folder=folder, suffix=suffix
    )
    done = train(root, tmp_path / "out")
    assert done.metadata()["in_channels"] == 3
    assert "test" not in done.report and "Test" not in done.out


@pytest.mark.parametrize(
    ("bands", "dtype", "size"),
    [(1, "uint8", 32), (13, "float32", (48, 40)), (3, "int16", 64)],
)
def test_any_bands_dtype_and_size_train(tmp_path, bands, dtype, size):
    root = write_dataset(
        tmp_path / "data", 2, 1, 1, bands=bands, dtype=dtype, size=size
    )
    done = train(root, tmp_path / "out", "--data_augmentation")
    shape = size if isinstance(size, tuple) else (size, size)
    assert done.metadata()["in_channels"] == bands
    assert done.metadata()["input_size"] == list(shape)


def test_sparse_labels_with_batches_of_one_and_unlabelled_patches_train(tmp_path):
    root = write_dataset(tmp_path / "data", 4, 2, 1, bands=3, size=64)
    files = sorted(root.rglob("train/labels/*.tif"))
    for index, file in enumerate(files):
        with open_raster(file) as opened:
            label = opened.read(1)
        sparse = np.full_like(label, 255)
        if index:
            sparse[::16, ::16] = label[::16, ::16]
        write_raster(file, sparse, origin=origin_of(file))
    options = ("--batch_size", 1, "--use_class_weights", "--epochs", 2)
    done = train(root, tmp_path / "out", *options)
    assert all(math.isfinite(row["train_loss"]) for row in done.report["history"])


def test_a_class_that_only_validation_has_is_trained_without_a_crash(tmp_path):
    root = write_dataset(tmp_path / "data", 4, 2, 0, bands=3)
    for file in root.rglob("validation/labels/*.tif"):
        write_raster(file, np.full((32, 32), 2, np.uint8), origin=origin_of(file))
    options = ("--mode", "multiclass", "--classes", 3, "--use_class_weights")
    done = train(root, tmp_path / "out", *options)
    assert (done.save_dir / "model_metrics.json").exists()


def test_a_nan_in_a_valid_looking_image_is_an_invalid_pixel(tmp_path):
    root = write_dataset(tmp_path / "data", 2, 1, 0, bands=3, dtype="float32")
    for file in root.rglob("images/*.tif"):
        with open_raster(file) as opened:
            image = opened.read()
        image[1, :5, :5] = np.nan
        image[2, 9, 9] = np.inf
        write_raster(file, image, origin=origin_of(file))
    done = train(root, tmp_path / "out")
    counted = np.sum(done.report["validation"]["confusion_matrix"])
    assert counted == 32 * 32 - 26
    assert all(
        math.isfinite(value)
        for value in done.metadata()["normalization_statistics"]["high"]
    )
