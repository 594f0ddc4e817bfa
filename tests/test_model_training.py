"""Known answers, independent references and properties of the parts of model_training."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import (
    ROOT,
    SENTINEL,
    make_patch,
    patch_everywhere,
    write_dataset,
    write_raster,
)
from sklearn import metrics as reference
from sklearn.utils.class_weight import compute_class_weight
from timm.models import adapt_input_conv

from common import VERSION
from common.architectures import (
    ARCHITECTURES,
    BINARY_NAMES,
    LOSS_NAMES,
    ModelConfig,
    default_class_names,
    get_available_models,
    parse_loss,
)
from common.devices import local_device, pick_device
from common.distributed import ProcessGroup
from common.errors import CheckpointError, DatasetError, OptionError, SegmentationError
from common.patches import PatchPair, list_pairs, read_patch
from evaluation.matrices import fold_summary
from model_training import (
    Normalization,
    balanced_weights,
    build_loss,
    build_model,
    check_architecture,
    combined_score,
    confusion_matrix,
    dataset_normalization,
    get_available_encoders,
    load_checkpoint,
    normalize,
    predict_classes,
    save_checkpoint,
    scores,
)
from training.augmentation import jitter_radiometry, random_d4
from training.loop import Stepper, evaluate, make_scheduler, train_one_epoch
from training.run import History
from training.samples import (
    EpochBatchSampler,
    PatchCache,
    PatchDataset,
    Sample,
    SampleIndex,
    count_workers,
    index_samples,
    make_cache,
    make_loader,
)
from training.settings import TrainingConfig
from training.weights import build_initial_model, rgb_channels

IGNORE = 255
TINY_ENCODER = "tu-mobilenetv3_small_050"

# The encoder families of the documentation, and the --encoder_name of each member.
DOCUMENTED_ENCODERS = {
    **{f"ResNet-{n}": f"resnet{n}" for n in (18, 34, 50, 101, 152)},
    **{f"EfficientNet-b{n}": f"efficientnet-b{n}" for n in range(8)},
    "MobileNet-V2": "mobilenet_v2",
    "MobileNet-V3 (small)": "tu-mobilenetv3_small_100",
    "MobileNet-V3 (large)": "tu-mobilenetv3_large_100",
    **{f"DenseNet-{n}": f"densenet{n}" for n in (121, 169, 201)},
    "DenseNet-264": "tu-densenet264d",
    **{f"VGG-{n}": f"vgg{n}" for n in (11, 13, 16, 19)},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def settings(**changes) -> TrainingConfig:
    return TrainingConfig(**{"dataset_root": "data", "model": "unet"} | changes)


def tiny_model(
    in_channels: int = 4, num_classes: int = 1, model: str = "linknet"
) -> ModelConfig:
    return ModelConfig(model, in_channels, num_classes, TINY_ENCODER)


def statistics(bands: int) -> Normalization:
    return Normalization("dataset", (0.0,) * bands, (1.0,) * bands)


def one_patch(
    folder: Path, image: np.ndarray, label: np.ndarray, name: str = "a", **options
) -> PatchPair:
    """Write a pair and return it."""
    return PatchPair(
        write_raster(folder / "images" / f"{name}.tif", image, **options),
        write_raster(folder / "labels" / f"{name}.tif", label),
    )


# --- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("mode", "binary"),
        ("classes", 2),
        ("val_strategy", "split"),
        ("epochs", 100),
        ("batch_size", 4),
        ("learning_rate", 1e-3),
        ("encoder_name", "resnet34"),
        ("pretrained", False),
        ("data_augmentation", "symmetries"),
        ("use_class_weights", False),
        ("no_calibration", False),
        ("area_estimation", False),
        ("n_splits", 5),
        ("ignore_index", 255),
        ("in_channels", None),
        ("device", None),
        ("save_dir", "trained_models"),
        ("seed", 42),
        ("loss", "dice+ce"),
        ("normalization", "dataset"),
    ],
)
def test_defaults_are_the_documented_ones(name, default):
    assert getattr(settings(), name) == default


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model": "unet+"}, "did you mean 'unet++'"),
        ({"model": "DeepLab"}, "did you mean 'deeplabv3'"),
        ({"mode": "multiclass", "classes": 1}, "--classes 1"),
        ({"classes": 6}, "--mode multiclass"),
        ({"epochs": 0}, "--epochs 0"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"num_workers": "-1"}, "--num_workers -1"),
        ({"patience": -1}, "--patience -1"),
        ({"seed": -1}, "--seed -1"),
        ({"n_splits": 1}, "--n_splits 1"),
        ({"learning_rate": 0.0}, "--learning_rate 0"),
        ({"learning_rate": math.nan}, "--learning_rate nan"),
        ({"weight_decay": -0.1}, "--weight_decay -0.1"),
        ({"weight_decay": math.inf}, "--weight_decay inf"),
        ({"dropout_rate": 1.0}, "--dropout_rate 1"),
        ({"dropout_rate": -0.1}, "--dropout_rate -0.1"),
        ({"ignore_index": 1}, "--ignore_index 1"),
        ({"mode": "multiclass", "classes": 6, "ignore_index": 5}, "--ignore_index 5"),
        ({"loss": "dice+cross"}, "Unknown loss 'cross'"),
        ({"loss": "dice", "use_class_weights": True}, "--use_class_weights"),
        ({"mode": "multiclass", "classes": 3, "class_names": "a,b"}, "3 names"),
    ],
)
def test_a_setting_that_cannot_be_right_is_refused(wrong, words):
    with pytest.raises(OptionError) as caught:
        settings(**wrong)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_models_have_one_output_and_two_label_classes():
    config = settings().model_config(7)
    assert (config.in_channels, config.num_classes, config.label_classes) == (7, 1, 2)
    assert config.mode == "binary"


def test_multiclass_models_have_an_output_per_class():
    config = settings(mode="multiclass", classes=6).model_config(3)
    assert (config.num_classes, config.label_classes) == (6, 6)
    assert config.mode == "multiclass"


@pytest.mark.parametrize("model", ["unet-dropout", "deeplabv3_resnet50"])
def test_an_encoder_for_a_model_without_one_is_refused(model):
    with pytest.raises(OptionError, match="resnet18.*no exchangeable encoder"):
        settings(model=model, encoder_name="resnet18").model_config(3)


# --- normalization --------------------------------------------------------------------------


def draw_image(kind: str, shape=(3, 20, 24)) -> np.ndarray:
    rng = np.random.default_rng(3)
    image = rng.normal(0, 1, shape)
    return {
        "reflectance": (image * 900 + 3000).astype(np.uint16),
        "decibel": (image * 4 - 14).astype(np.float32),
        "signed": (image * 50 - 20).astype(np.int16),
        "bytes": np.clip(image * 40 + 120, 0, 255).astype(np.uint8),
    }[kind]


KINDS = ("reflectance", "decibel", "signed", "bytes")


@pytest.mark.parametrize("kind", KINDS)
def test_dataset_rule_scales_each_band_between_its_percentiles(kind):
    image = draw_image(kind)
    valid = np.ones(image.shape[1:], bool)
    pixels = image.reshape(3, -1)
    result = normalize(image, valid, dataset_normalization([pixels.T]))
    for band, values in enumerate(pixels.astype(float)):
        low, high = np.percentile(values, 1), np.percentile(values, 99)
        expected = np.clip((values - low) / (high - low), 0, 1)
        np.testing.assert_allclose(result[band].ravel(), expected, atol=2e-5)
    assert result.dtype == torch.float32
    assert result.min() == 0 and result.max() == 1


@pytest.mark.parametrize("kind", ["reflectance", "bytes"])
def test_image_rule_divides_by_the_joint_99th_percentile(kind):
    image = draw_image(kind)
    valid = np.ones(image.shape[1:], bool)
    expected = np.clip(image / np.percentile(image, 99), 0, 1)
    result = normalize(image, valid, Normalization("image"))
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["dataset", "image"])
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 65535.0])
def test_invalid_pixels_become_zero_and_change_no_other(rule, junk):
    image = draw_image("decibel") + 30
    valid = np.ones(image.shape[1:], bool)
    valid[:5, 3:9] = False
    stats = dataset_normalization([image[:, valid].T])
    chosen = stats if rule == "dataset" else Normalization("image")
    clean = normalize(image, valid, chosen)
    dirty = image.copy()
    dirty[1:, ~valid] = junk
    result = normalize(dirty, valid, chosen)
    assert (result[:, ~valid] == 0).all()
    np.testing.assert_array_equal(result, clean)


def test_dataset_rule_does_not_depend_on_the_window():
    image = draw_image("reflectance")
    valid = np.ones(image.shape[1:], bool)
    stats = dataset_normalization([image.reshape(3, -1).T])
    whole = normalize(image, valid, stats)
    window = normalize(image[:, 4:9, 10:17], valid[4:9, 10:17], stats)
    np.testing.assert_array_equal(window, whole[:, 4:9, 10:17])


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", "float64"])
def test_the_dtype_of_a_file_does_not_change_the_input(dtype):
    image = draw_image("reflectance")
    valid = np.ones(image.shape[1:], bool)
    stats = dataset_normalization([image.reshape(3, -1).T])
    np.testing.assert_array_equal(
        normalize(image.astype(dtype), valid, stats),
        normalize(image, valid, stats),
    )


@pytest.mark.parametrize("rule", ["dataset", "image"])
@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_image_gives_finite_input(rule, value):
    image = np.full((2, 6, 6), value, np.uint16)
    valid = np.ones((6, 6), bool)
    stats = dataset_normalization([image.reshape(2, -1).T])
    result = normalize(image, valid, replace(stats, rule=rule)).numpy()
    assert np.isfinite(result).all() and (0 <= result).all() and (result <= 1).all()


@pytest.mark.parametrize("rule", ["dataset", "image"])
def test_a_patch_without_a_valid_pixel_becomes_zero(rule):
    stats = Normalization(rule, (0.0, 0.0), (1.0, 1.0))
    image = np.full((2, 4, 4), np.nan, np.float32)
    assert not normalize(image, np.zeros((4, 4), bool), stats).any()


def test_normalize_leaves_its_argument_alone():
    image = draw_image("decibel")
    before = image.copy()
    normalize(image, np.ones(image.shape[1:], bool), statistics(3))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("rule", ["dataset", "image"])
def test_windows_are_normalized_together_as_one_by_one(rule):
    stack = np.stack([draw_image("reflectance"), draw_image("reflectance") // 3])
    valid = np.random.default_rng(0).random(stack[:, 0].shape) > 0.3
    valid[1, :4] = False
    stats = replace(dataset_normalization([stack[0].reshape(3, -1).T]), rule=rule)
    for masks in (valid, None):
        alone = [
            normalize(image, None if masks is None else masks[number], stats)
            for number, image in enumerate(stack)
        ]
        together = normalize(stack, masks, stats)
        np.testing.assert_array_equal(together, torch.stack(alone))
        nested = normalize(
            stack[:, None], None if masks is None else valid[:, None], stats
        )
        np.testing.assert_array_equal(nested[:, 0], together)


def test_percentiles_are_over_all_samples_together():
    samples = [np.arange(100.0)[:, None], np.arange(100.0, 200)[:, None]]
    stats = dataset_normalization(samples)
    assert stats.low == (np.percentile(np.arange(200.0), 1),)
    assert stats.high == (np.percentile(np.arange(200.0), 99),)
    assert all(type(value) is float for value in stats.low + stats.high)


def test_no_valid_pixel_in_the_training_patches_is_an_error():
    with pytest.raises(DatasetError, match="no valid pixel"):
        dataset_normalization([np.empty((0, 3))])


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [("float32", np.finfo("f4").min), ("float64", np.finfo("f8").min)],
)
def test_the_lowest_float_as_nodata_raises_no_warning(dtype, nodata):
    image = np.full((2, 4, 4), nodata, dtype)
    image[:, :2] = 0.1
    valid = image[0] > -1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = Normalization("dataset", (0.0, 0.0), (0.5, 0.5))
        assert normalize(image, valid, stats)[0, 0, 0] == pytest.approx(0.2)


# --- patches --------------------------------------------------------------------------------


def survey(root: Path, split: str = "train", classes: int = 2, **more) -> SampleIndex:
    return index_samples(list_pairs(root, split), classes, IGNORE, **more)


def test_survey_counts_the_labelled_pixels_of_each_patch(make_dataset):
    found = survey(make_dataset(3, classes=3, unlabelled_rows=8), classes=3)
    assert found.counts.shape == (3, 3)
    for pair, counts in zip(found.pairs, found.counts):
        _, _, mask = read_patch(pair)
        expected = [(mask == value).sum() for value in range(3)]
        assert counts.tolist() == expected
    assert found.counts.sum() == 3 * 24 * 32


def test_survey_samples_every_valid_pixel_of_a_small_dataset(make_dataset):
    root = make_dataset(2, bands=3, nodata=0, invalid_rows=5)
    found = survey(root)
    for pair, sample in zip(found.pairs, found.samples):
        image, valid, _ = read_patch(pair)
        np.testing.assert_array_equal(sample, image[:, valid].T)
    assert found.samples[0].shape == (27 * 32, 3)


def test_survey_tells_shape_descriptions_and_class_names(make_dataset):
    names = ["water", "land"]
    root = make_dataset(
        size=(40, 32), descriptions=SENTINEL, tags={"CLASS_NAMES": json.dumps(names)}
    )
    found = survey(root)
    assert found.shape == (10, 40, 32)
    assert found.descriptions == SENTINEL
    assert found.class_names == names


def test_survey_of_a_subset_is_that_of_its_patches(make_dataset):
    pairs = list_pairs(make_dataset(5), "train")
    part = index_samples(pairs, 2, IGNORE).subset([3, 0])
    own = index_samples([pairs[3], pairs[0]], 2, IGNORE)
    assert part.pairs == own.pairs
    np.testing.assert_array_equal(part.counts, own.counts)
    np.testing.assert_array_equal(
        np.concatenate(part.samples), np.concatenate(own.samples)
    )


def test_surveys_add_up(make_dataset):
    root = make_dataset(3, 2)
    both = survey(root) + survey(root, "validation")
    assert len(both.pairs) == len(both.samples) == len(both.counts) == 5
    assert both.counts.sum() == 5 * 32 * 32


def test_labels_outside_the_classes_are_named_with_their_file(tmp_path):
    image, label = make_patch(np.random.default_rng(0), bands=2)
    label[0, :2] = (7, 9)
    pair = one_patch(tmp_path, image, label, "odd")
    with pytest.raises(DatasetError) as caught:
        index_samples([pair], 2, IGNORE)
    assert "odd.tif" in str(caught.value) and "7, 9" in str(caught.value)


def test_negative_labels_are_refused_not_clipped(tmp_path):
    image, label = make_patch(np.random.default_rng(0), bands=2)
    label = label.astype(np.int16)
    label[3, 3] = -2
    with pytest.raises(DatasetError, match="-2"):
        index_samples([one_patch(tmp_path, image, label)], 2, IGNORE)


def test_whole_float_labels_count_as_classes(tmp_path):
    image, label = make_patch(np.random.default_rng(0), bands=2)
    pair = one_patch(tmp_path, image, label.astype(np.float32))
    found = index_samples([pair], 2, IGNORE)
    assert found.counts.tolist() == [[(label == 0).sum(), (label == 1).sum()]]


def test_fractional_labels_are_refused(tmp_path):
    image, label = make_patch(np.random.default_rng(0), bands=2)
    pair = one_patch(tmp_path, image, label.astype(np.float32) + 0.5)
    with pytest.raises(DatasetError, match="0.5"):
        index_samples([pair], 2, IGNORE)


@pytest.mark.parametrize(
    "other", [{"size": (32, 40)}, {"bands": 4}], ids=["size", "bands"]
)
def test_patches_that_differ_are_named_with_both_shapes(tmp_path, other):
    rng = np.random.default_rng(0)
    first = one_patch(tmp_path, *make_patch(rng, bands=3), "a")
    second = one_patch(tmp_path, *make_patch(rng, **{"bands": 3} | other), "b")
    with pytest.raises(DatasetError) as caught:
        index_samples([first, second], 2, IGNORE)
    assert "b.tif" in str(caught.value) and "(3, 32, 32)" in str(caught.value)


def test_patches_with_another_band_order_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    orders = [("B02", "B03", "B04"), ("B04", "B03", "B02")]
    pairs = [
        one_patch(
            tmp_path, *make_patch(rng, bands=3), f"p{index}", descriptions=descriptions
        )
        for index, descriptions in enumerate(orders)
    ]
    with pytest.raises(DatasetError, match="p1.tif"):
        index_samples(pairs, 2, IGNORE)


def test_patches_of_mixed_dtype_are_surveyed_in_their_own_values(tmp_path):
    image, label = make_patch(np.random.default_rng(0), bands=2)
    pairs = [
        one_patch(tmp_path, image.astype(dtype), label, dtype)
        for dtype in ("uint16", "int32", "float32")
    ]
    stats = dataset_normalization(index_samples(pairs, 2, IGNORE).samples)
    low, high = np.percentile(np.tile(image.reshape(2, -1), 3), [1, 99], axis=1)
    np.testing.assert_allclose(stats.low, low)
    np.testing.assert_allclose(stats.high, high)


def test_samples_of_a_large_dataset_are_thinned_to_the_limit(make_dataset, monkeypatch):
    patch_everywhere(monkeypatch, "training.samples.SAMPLE_VALUES", 3 * 10 * 100)
    found = survey(make_dataset(3))
    kept = sum(sample.size for sample in found.samples)  # each value by chance
    assert kept == pytest.approx(3 * 10 * 100, rel=0.2)


def test_thinned_samples_see_every_column(tmp_path, monkeypatch):
    ramp = np.tile(np.arange(64, dtype=np.uint16), (64, 1))[None]
    pair = one_patch(tmp_path, ramp, np.zeros((64, 64), np.uint8))
    patch_everywhere(monkeypatch, "training.samples.SAMPLE_VALUES", 64)
    stats = dataset_normalization(index_samples([pair], 2, IGNORE).samples)
    assert stats.low[0] < 6 and stats.high[0] > 57


def test_thinned_samples_weigh_valid_pixels_alike(tmp_path, monkeypatch):
    full, sliver = np.full((1, 64, 64), 10, np.uint16), np.zeros((1, 64, 64), np.uint16)
    sliver[:, :2] = 20  # 2 of 66 rows: 3 % of the valid pixels
    label = np.zeros((64, 64), np.uint8)
    pairs = [
        one_patch(tmp_path, image, label, str(index), nodata=0)
        for index, image in enumerate((full, sliver))
    ]
    patch_everywhere(monkeypatch, "training.samples.SAMPLE_VALUES", 2 * 128)
    samples = index_samples(pairs, 2, IGNORE).samples
    assert (np.concatenate(samples) == 20).mean() < 0.1


def test_an_item_is_the_normalized_patch(make_dataset):
    pairs = list_pairs(make_dataset(2, nodata=0, invalid_rows=4), "train")
    found = index_samples(pairs, 2, IGNORE)
    stats = dataset_normalization(found.samples)
    dataset = PatchDataset(found, stats, IGNORE)
    image, mask = dataset[1]
    raw, valid, label = read_patch(pairs[1])
    assert len(dataset) == 2
    assert (image.dtype, image.shape) == (np.float32, (10, 32, 32))
    assert (mask.dtype, mask.shape) == (np.int64, (32, 32))
    np.testing.assert_array_equal(image, normalize(raw, valid, stats))
    assert (mask[:4] == IGNORE).all() and (mask[4:] == label[4:]).all()
    assert not image[:, :4].any()


@pytest.mark.parametrize("ignore", [255, -1, 99])
def test_declared_label_nodata_becomes_the_ignore_index(make_dataset, ignore):
    root = make_dataset(1, label_nodata=200, unlabelled_rows=6)
    found = index_samples(list_pairs(root, "train"), 2, ignore)
    _, mask = PatchDataset(found, statistics(10), ignore)[0]
    assert (mask[-6:] == ignore).all()
    assert set(np.unique(mask[:-6])) == {0, 1}


def augmented(root: Path, seed: int = 5, cache: float = 0) -> PatchDataset:
    pairs = list_pairs(root, "train")
    found = index_samples(pairs, 2, IGNORE, cache=PatchCache(cache))
    return PatchDataset(found, Normalization("image"), IGNORE, "full", seed)


def test_augmentation_depends_on_seed_and_draw_alone(make_dataset):
    root = make_dataset(6)
    one, other = augmented(root), augmented(root)
    draws = [Sample(index, 10 + index) for index in range(6)]
    forwards = [one[draw] for draw in draws]
    backwards = [other[draw] for draw in reversed(draws)][::-1]
    for a, b in zip(forwards, backwards):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize(("seed", "turn"), [(6, 10), (5, 11)])
def test_another_seed_or_draw_varies_the_patches_otherwise(make_dataset, seed, turn):
    root = make_dataset(6)
    one, other = augmented(root), augmented(root, seed)
    same = [
        np.array_equal(one[Sample(i, 10 * i)][0], other[Sample(i, turn * i)][0])
        for i in range(1, 6)
    ]
    assert not all(same)


def test_an_index_alone_is_never_varied(make_dataset):
    dataset = augmented(make_dataset(1))
    plain = read_patch(dataset.pairs[0])
    np.testing.assert_array_equal(dataset[0][1], plain[2])


@pytest.mark.parametrize("augment", ["none", "symmetries", "full"])
def test_patches_vary_as_asked(make_dataset, augment):
    root = make_dataset(1)
    pairs = list_pairs(root, "train")
    found = index_samples(pairs, 2, IGNORE)
    dataset = PatchDataset(found, Normalization("image"), IGNORE, augment)
    image, mask = dataset[0]
    turned, values = set(), 0
    for turn in range(40):
        varied, labels = dataset[Sample(0, turn)]
        assert varied.flags.c_contiguous and labels.flags.c_contiguous
        assert labels.dtype == np.int64 and varied.dtype == np.float32
        turned.add(labels.tobytes())
        values += not np.array_equal(np.sort(varied, None), np.sort(image, None))
    assert len(turned) == (1 if augment == "none" else 4)  # of stripes
    assert bool(values) == (augment == "full")
    assert mask.tobytes() in turned


@pytest.mark.parametrize("cache", [0, math.inf])
def test_worker_processes_do_not_change_the_batches(make_dataset, cache):
    dataset = augmented(make_dataset(5), cache=cache)
    batches = []
    for workers in ("0", "2"):
        config = settings(batch_size=2, num_workers=workers)
        loader = make_loader(dataset, config, ProcessGroup(), training=True)
        loader.batch_sampler.epoch = 1
        first = list(loader)
        loader.batch_sampler.epoch = 2  # workers that stay must follow
        batches.append((first, list(loader)))
    for epoch in range(2):
        one, other = batches[0][epoch], batches[1][epoch]
        assert len(one) == len(other) == 2  # the lone last patch is left out
        for (images, masks), (others, labels) in zip(one, other):
            assert torch.equal(images, others) and torch.equal(masks, labels)
    assert not torch.equal(batches[0][0][0][0], batches[0][1][0][0])


@pytest.mark.parametrize(
    ("patches", "batch_size", "sizes"),
    [(5, 4, [4]), (5, 2, [2, 2]), (6, 4, [4, 2]), (1, 4, [1]), (3, 1, [1, 1, 1])],
)
def test_only_a_lone_last_training_patch_is_left_out(
    make_dataset, patches, batch_size, sizes
):
    dataset = augmented(make_dataset(patches))
    config = settings(batch_size=batch_size, num_workers="0")
    loader = make_loader(dataset, config, ProcessGroup(), training=True)
    assert [len(images) for images, _ in loader] == sizes
    assert len(loader) == len(sizes)
    whole = make_loader(dataset, config, ProcessGroup())
    assert sum(len(images) for images, _ in whole) == patches


@pytest.mark.parametrize("count", [2, 7, 8, 9, 30])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_batches_of_one(count, size):
    """Together they draw what a single process with the whole batch draws, in that order."""
    if count < size:
        return
    parts = [
        list(EpochBatchSampler(count, 2, 7, ProcessGroup(rank, size)))
        for rank in range(size)
    ]
    single = list(EpochBatchSampler(count, 2 * size, 7, ProcessGroup()))
    assert {len(part) for part in parts} == {
        len(EpochBatchSampler(count, 2, 7, ProcessGroup(0, size)))
    }
    seen = []
    for batch, *shares in zip(single, *parts):
        assert len({len(share) for share in shares}) == 1  # none waits for another
        joined = {draw for share in shares for draw in share}
        assert joined <= set(batch)
        seen += [draw.index for draw in joined]
    assert len(seen) == len(set(seen)) == count - count % size


def test_every_epoch_has_an_order_of_its_own():
    order = EpochBatchSampler(20, 4, 3, ProcessGroup())
    orders = []
    for epoch in (1, 2, 1):
        order.epoch = epoch
        orders.append(list(order))
    assert orders[0] == orders[2] != orders[1]
    turns = [draw.turn for epoch in orders[:2] for batch in epoch for draw in batch]
    assert len(set(turns)) == 40


@pytest.mark.parametrize("size", [2, 3])
def test_validation_batches_are_parted_without_duplicates(make_dataset, size):
    dataset = augmented(make_dataset(7))
    config = settings(batch_size=2, num_workers="0")
    loaders = [make_loader(dataset, config, ProcessGroup(r, size)) for r in range(size)]
    found = sum(len(images) for loader in loaders for images, _ in loader)
    assert found == 7


def test_the_cache_holds_the_first_patches_that_fit(make_dataset):
    pairs = list_pairs(make_dataset(4), "train")
    one = index_samples(pairs, 2, IGNORE, cache=PatchCache(math.inf)).decoded[0]
    found = index_samples(pairs, 2, IGNORE, cache=PatchCache(2.5 * one.nbytes))
    assert [patch is not None for patch in found.decoded] == [True, True, False, False]
    assert one.mask.dtype == np.uint8
    dataset = PatchDataset(found, statistics(10), IGNORE)
    plain = PatchDataset(index_samples(pairs, 2, IGNORE), statistics(10), IGNORE)
    assert not dataset.in_memory and plain.decoded == [None] * 4
    for index in range(4):
        for a, b in zip(dataset[index], plain[index]):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize("ignore", [-1, 255, 999, -9999])
def test_cached_masks_keep_every_value(make_dataset, ignore):
    root = make_dataset(1, label_nodata=200, unlabelled_rows=6)
    pairs = list_pairs(root, "train")
    found = index_samples(pairs, 2, ignore, cache=PatchCache(math.inf))
    _, mask = PatchDataset(found, statistics(10), ignore)[0]
    np.testing.assert_array_equal(mask, read_patch(pairs[0], ignore)[2])


def test_a_cached_patch_needs_no_file(make_dataset):
    dataset = augmented(make_dataset(2), cache=math.inf)
    for pair in dataset.pairs:
        pair.image.unlink()
    assert dataset.in_memory and len(list(map(dataset.__getitem__, range(2)))) == 2


def test_patches_that_must_all_fit_but_do_not_are_an_error(make_dataset):
    pairs = list_pairs(make_dataset(3), "train")
    with pytest.raises(DatasetError, match="--cache ram"):
        index_samples(pairs, 2, IGNORE, cache=PatchCache(30_000, whole=True))


@pytest.mark.parametrize(
    ("cache", "share", "whole"), [("auto", 0.25, False), ("ram", 0.8, True)]
)
def test_the_cache_takes_a_share_of_the_free_memory(monkeypatch, cache, share, whole):
    patch_everywhere(monkeypatch, "common.machine.free_memory", lambda: 1000)
    found = make_cache(settings(cache=cache))
    assert (found.left, found.whole) == (1000 * share, whole)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert make_cache(settings(cache=cache)).left == 500 * share
    assert make_cache(settings(cache="off")).left == 0


def test_workers_are_as_many_as_it_takes(make_dataset, monkeypatch):
    root = make_dataset(2)
    read, kept = augmented(root), augmented(root, cache=math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    assert count_workers("auto", kept, 50, gpu=False) == 0
    assert count_workers("auto", read, 50, gpu=False) == 1
    assert count_workers("auto", kept, 50, gpu=True) == 5
    assert count_workers("auto", kept, 3, gpu=True) == 3
    assert count_workers("4", kept, 50, gpu=False) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert count_workers("auto", kept, 50, gpu=True) == 1


@pytest.mark.parametrize("rule", ["dataset", "image"])
@pytest.mark.parametrize("holes", [False, True])
def test_the_order_of_an_image_in_memory_changes_no_bit(rule, holes):
    rng = np.random.default_rng(4)
    image = torch.from_numpy(rng.integers(0, 9000, (2, 5, 20, 30)).astype(np.float32))
    low, high = (0.0, 10.0, 50.0, 7.0, 7.0), (1000.0, 8000.0, 50.0, 9000.0, 99.0)
    numbers = Normalization(rule, low, high) if rule == "dataset" else Normalization()
    valid = torch.from_numpy(rng.random((2, 20, 30)) < 0.8) if holes else None
    if holes:
        image[:, :, ~valid[0]] = math.nan
        valid[1] = valid[0]
    turned = image.contiguous(memory_format=torch.channels_last)
    plain, other = (normalize(one, valid, numbers) for one in (image, turned))
    assert torch.equal(plain, other) and plain.isfinite().all()
    assert other.shape == image.shape


# --- augmentation ---------------------------------------------------------------------------


def symmetries(array: np.ndarray) -> list[bytes]:
    """The eight symmetries of a square, by transposition and reversal (no rot90)."""
    found = []
    for base in (array, array.T):
        for rows in (1, -1):
            for columns in (1, -1):
                found.append(np.ascontiguousarray(base[::rows, ::columns]).tobytes())
    return found


def vary(image, valid, mask, draws: int = 300):
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        turned = random_d4(image, valid, mask, rng)
        yield jitter_radiometry(*turned[:2], rng), *turned[1:]


@pytest.mark.parametrize(("shape", "count"), [((5, 5), 8), ((4, 6), 4)])
def test_every_symmetry_that_keeps_the_shape_is_reached(shape, count):
    mask = np.arange(np.prod(shape)).reshape(shape)
    image = np.full((2, *shape), 0.5, np.float32)
    reached = set()
    for varied, _, turned in vary(image, np.ones(shape, bool), mask):
        assert turned.shape == shape and varied.shape == image.shape
        reached.add(turned.tobytes())
    assert len(reached) == count
    assert reached <= set(symmetries(mask))


@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_image_mask_and_validity_move_together(shape):
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 2, shape)
    valid = rng.random(shape) < 0.8
    mask[~valid] = IGNORE
    image = np.where(mask == 1, 0.8, 0.2).astype(np.float32)
    image = np.stack([image] * 3) * valid
    for varied, known, turned in vary(image, valid, mask, 100):
        np.testing.assert_array_equal(known, turned != IGNORE)
        brightest = varied.max(axis=0)  # a band may have dropped out
        np.testing.assert_array_equal(brightest > 0.5, turned == 1)
        assert not varied[:, ~known].any()


def test_augmented_images_stay_float32_between_0_and_1():
    image = np.random.default_rng(2).random((3, 8, 8)).astype(np.float32)
    for varied, _, _ in vary(image, np.ones((8, 8), bool), np.zeros((8, 8), int), 100):
        assert varied.dtype == np.float32
        assert varied.min() >= 0 and varied.max() <= 1


def test_brightness_noise_and_band_dropout_all_happen_and_sometimes_none_does():
    image = np.full((3, 8, 8), 0.4, np.float32)
    kinds = set()
    for varied, _, _ in vary(image, np.ones((8, 8), bool), np.zeros((8, 8), int)):
        lost = ~varied.any(axis=(1, 2))
        assert lost.sum() <= 1
        kept = varied[~lost]
        flat = np.ptp(kept) < 1e-6  # alike in all bands and pixels
        kinds |= {"dropout"} if lost.any() else set()
        kinds.add(("same" if np.allclose(kept, 0.4) else "light") if flat else "noise")
    assert kinds == {"dropout", "light", "noise", "same"}


def test_the_only_band_is_never_dropped():
    image = np.full((1, 4, 4), 0.5, np.float32)
    for varied, _, _ in vary(image, np.ones((4, 4), bool), np.zeros((4, 4), int)):
        assert varied.any()


# --- models ---------------------------------------------------------------------------------


def encoder_for(model: str) -> str | None:
    return {
        "dpt": "tu-vit_tiny_patch16_224",
        "unet-dropout": None,
        "deeplabv3_resnet50": "resnet50",
    }.get(model, TINY_ENCODER)


def test_every_documented_model_is_available():
    documented = (
        "unet-dropout unet unet++ manet linknet pan fpn pspnet deeplabv3 deeplabv3+ "
        "segformer upernet dpt deeplabv3_resnet50"
    )
    assert set(get_available_models()) == set(documented.split())


def test_the_documented_one_liner_prints_the_models_without_torch():
    code = (
        "from model_training import get_available_models; print(get_available_models())"
        "; import sys; assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(list(ARCHITECTURES))


@pytest.mark.parametrize("bands", [1, 3, 10, 13])
@pytest.mark.parametrize("model", get_available_models())
def test_every_model_trains_on_any_bands_and_an_odd_size(model, bands):
    outputs = 1 if bands == 3 else 4
    network = build_model(ModelConfig(model, bands, outputs, encoder_for(model)))
    network.train()
    images = torch.rand(2, bands, 50, 70, requires_grad=True)
    logits = network(images)
    assert logits.shape == (2, outputs, 50, 70)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert images.grad.isfinite().all()
    assert all(images.grad[:, band].any() for band in range(bands))
    heads = [p for p in network.parameters() if p.grad is not None and p.grad.any()]
    assert len(heads) > 10


@pytest.mark.parametrize("model", get_available_models())
def test_every_model_predicts_a_single_small_patch(model):
    config = ModelConfig(model, 3, 2, encoder_for(model))
    network = build_model(config).eval()
    with torch.inference_mode():
        assert network(torch.rand(1, 3, 33, 31)).shape == (1, 2, 33, 31)


@pytest.mark.parametrize("model", ["unet-dropout", "unet++", "deeplabv3+", "pan"])
def test_padding_repeats_the_edge_and_is_cropped_away(model):
    network = build_model(ModelConfig(model, 2, 3, encoder_for(model))).eval()
    image = torch.rand(1, 2, 130, 200)
    # 160 and 224 are multiples of 32, and of 16 for unet-dropout 144 and 208
    rows, columns = (144, 208) if model == "unet-dropout" else (160, 224)
    padded = np.pad(
        image.numpy(), ((0, 0), (0, 0), (0, rows - 130), (0, columns - 200)), "edge"
    )
    with torch.inference_mode():
        expected = network.network(torch.from_numpy(padded))[..., :130, :200]
        torch.testing.assert_close(network(image), expected)


def test_dropout_rate_sets_every_dropout_of_unet_dropout():
    config = ModelConfig("unet-dropout", 2, 1, None, dropout_rate=0.45)
    rates = [
        layer.p
        for layer in build_model(config).modules()
        if isinstance(layer, torch.nn.Dropout2d)
    ]
    assert len(rates) == 9 and set(rates) == {0.45}


@pytest.mark.parametrize(("rate", "same"), [(0.0, True), (0.5, False)])
def test_dropout_varies_training_passes_only(rate, same):
    network = build_model(ModelConfig("unet-dropout", 2, 1, None, rate))
    image = torch.rand(2, 2, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(image), network(image)) is same
        network.eval()
        assert torch.equal(network(image), network(image))


@pytest.mark.parametrize("name", DOCUMENTED_ENCODERS.values())
def test_every_documented_encoder_is_known(name):
    check_architecture(ModelConfig("unet", 3, 1, name))
    known = get_available_encoders()
    assert name in known or name.removeprefix("tu-") in timm.list_models()


@pytest.mark.parametrize(
    "name",
    [
        "resnet34",
        "resnet50",
        "efficientnet-b0",
        "mobilenet_v2",
        "tu-mobilenetv3_small_100",
        "densenet121",
        "tu-densenet264d",
        "vgg11",
    ],
)
def test_an_encoder_of_every_documented_family_runs(name):
    assert name in DOCUMENTED_ENCODERS.values()
    network = build_model(ModelConfig("unet", 10, 2, name)).eval()
    with torch.inference_mode():
        assert network(torch.rand(1, 10, 40, 64)).shape == (1, 2, 40, 64)


@pytest.mark.parametrize(
    ("model", "encoder", "words"),
    [
        ("unet", "resnet1O1", "did you mean 'resnet101'"),
        ("unet", "tu-resnet1", "did you mean 'tu-resnet"),
        ("unet", "timm-bogus", "timm-bogus"),
        ("unet", None, "needs an encoder"),
        ("dpt", "resnet34", "tu-"),
        ("deeplabv3", "densenet121", "DenseNet"),
        ("pan", "vgg11", "VGG"),
        ("unet++", "mit_b0", "mit_b0"),
        ("unet", "tu-vit_tiny_patch16_224", "cannot be built"),
        pytest.param(
            "unet",
            "tu-resnet18.no_such_tag",
            "no_such_tag",
        ),
    ],
)
def test_an_encoder_that_cannot_be_had_is_an_error_that_says_why(model, encoder, words):
    with pytest.raises(OptionError, match=words):
        build_model(ModelConfig(model, 3, 1, encoder))


@pytest.mark.parametrize(
    ("model", "encoder"),
    [
        ("unet", "tu-swin_tiny_patch4_window7_224"),
        ("dpt", "tu-vit_small_patch14_dinov2"),
    ],
)
def test_a_transformer_encoder_takes_any_size_or_is_refused_at_once(model, encoder):
    try:
        network = build_model(ModelConfig(model, 3, 1, encoder)).eval()
    except OptionError:
        return
    with torch.inference_mode():
        assert network(torch.rand(1, 3, 64, 64)).shape == (1, 1, 64, 64)


# --- pretrained weights ---------------------------------------------------------------------


def encoder_of(network) -> torch.nn.Module:
    return network.network.encoder


def first_kernels(network) -> torch.Tensor:
    layers = network.network.modules()
    return next(m for m in layers if isinstance(m, torch.nn.Conv2d)).weight.detach()


def encoder_file(folder: Path, name: str = "resnet18", bands: int = 3) -> Path:
    """A file with the weights of a freshly built encoder."""
    torch.manual_seed(99)
    path = folder / f"{name}_{bands}.pth"
    source = build_model(ModelConfig("unet", bands, 1, name))
    torch.save(encoder_of(source).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("model", "encoder"),
    [
        ("unet", "resnet18"),
        ("unet", "tu-resnet18"),
        ("deeplabv3_resnet50", "resnet50"),
    ],
)
def test_without_a_network_pretrained_says_what_to_do(model, encoder):
    with pytest.raises(SegmentationError) as caught:
        build_initial_model(ModelConfig(model, 3, 1, encoder), "imagenet")
    message = str(caught.value)
    assert encoder in message and "--encoder_weights" in message
    assert "\n" not in message


def test_an_unknown_name_of_weights_is_refused():
    with pytest.raises(OptionError, match="no_such_weights"):
        build_initial_model(ModelConfig("unet", 3, 1, "resnet18"), "no_such_weights")


@pytest.mark.parametrize(
    ("model", "encoder"),
    [("unet", "tu-resnet18"), ("deeplabv3_resnet50", "resnet50")],
)
def test_an_unknown_name_of_weights_is_refused_by_every_library(model, encoder):
    with pytest.raises(OptionError, match="no_such_weights.*imagenet"):
        build_initial_model(ModelConfig(model, 3, 1, encoder), "no_such_weights")


def test_unet_dropout_has_no_pretrained_weights():
    with pytest.raises(OptionError, match="unet-dropout has no pretrained"):
        build_initial_model(ModelConfig("unet-dropout", 3, 1, None), "imagenet")


FAMILY_ENCODERS = [
    "resnet18",
    "efficientnet-b0",
    "mobilenet_v2",
    "vgg11",
    "tu-mobilenetv3_small_050",
    pytest.param(
        "densenet121",
    ),
]


@pytest.mark.parametrize("encoder", FAMILY_ENCODERS)
def test_encoder_weights_of_a_file_are_loaded_whole(tmp_path, encoder):
    file = encoder_file(tmp_path, encoder)
    torch.manual_seed(1)
    network = build_initial_model(ModelConfig("unet", 3, 1, encoder), str(file))
    stored = torch.load(file, weights_only=True)
    loaded = encoder_of(network).state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[key], loaded[key]) for key in stored)


@pytest.mark.parametrize("bands", [2, 4, 10])
def test_rgb_kernels_are_spread_over_other_band_counts(tmp_path, bands):
    file = encoder_file(tmp_path)
    rgb = torch.load(file, weights_only=True)["conv1.weight"]
    network = build_initial_model(ModelConfig("unet", bands, 1, "resnet18"), str(file))
    kernels = first_kernels(network)
    for band in range(bands):
        torch.testing.assert_close(kernels[:, band], rgb[:, band % 3] * 3 / bands)


def test_spread_kernels_of_equal_colours_keep_the_size_of_the_output():
    kernels = torch.rand(4, 1, 3, 3).expand(4, 3, 3, 3)
    for bands in (1, 2, 5, 12):
        spread = adapt_input_conv(bands, kernels)
        torch.testing.assert_close(spread.sum(dim=1), kernels.sum(dim=1))


@pytest.mark.parametrize("encoder", ["resnet18", TINY_ENCODER])
def test_each_colour_gets_its_own_kernel_and_the_rest_their_mean(tmp_path, encoder):
    file = encoder_file(tmp_path, encoder)
    rgb = first_kernels(
        build_initial_model(ModelConfig("unet", 3, 1, encoder), str(file))
    )
    network = build_initial_model(
        ModelConfig("unet", 10, 1, encoder), str(file), [2, 1, 0]
    )
    kernels = first_kernels(network) * 10 / 3
    for colour, channel in enumerate([2, 1, 0]):
        torch.testing.assert_close(kernels[:, channel], rgb[:, colour])
    for channel in range(3, 10):
        torch.testing.assert_close(kernels[:, channel], rgb.mean(dim=1))


def test_three_bands_in_another_order_get_their_kernels(tmp_path):
    file = encoder_file(tmp_path)
    rgb = torch.load(file, weights_only=True)["conv1.weight"]
    config = ModelConfig("unet", 3, 1, "resnet18")
    kernels = first_kernels(build_initial_model(config, str(file), [2, 1, 0]))
    torch.testing.assert_close(kernels, rgb.flip(1))


def test_weights_made_for_the_same_bands_are_left_as_they_are(tmp_path):
    file = encoder_file(tmp_path, bands=10)
    stored = torch.load(file, weights_only=True)["conv1.weight"]
    config = ModelConfig("unet", 10, 1, "resnet18")
    network = build_initial_model(config, str(file), [2, 1, 0])
    torch.testing.assert_close(first_kernels(network), stored)


@pytest.mark.parametrize(
    ("descriptions", "option", "expected"),
    [
        (SENTINEL, None, [2, 1, 0]),
        (SENTINEL, "7, 3,2", [6, 2, 1]),
        (("nir", "red", "green", "blue"), None, [1, 2, 3]),
        ((None, None, None, None), None, None),
        ((None, None, None, None), "4,3,2", [3, 2, 1]),
        (("VV", "VH"), None, None),
    ],
)
def test_colours_are_found_by_option_or_description(descriptions, option, expected):
    found = SampleIndex(
        [], np.empty(0), [], (len(descriptions), 8, 8), descriptions, None, []
    )
    assert rgb_channels(settings(rgb_bands=option, pretrained=True), found) == expected


@pytest.mark.parametrize(
    "option", ["1,2", "0,1,2", "1,2,11", "red,green,blue", "1,2,3,4"]
)
def test_rgb_bands_must_be_three_bands_of_the_data(option):
    found = SampleIndex([], np.empty(0), [], (10, 8, 8), SENTINEL, None, [])
    with pytest.raises(OptionError, match="--rgb_bands"):
        rgb_channels(settings(rgb_bands=option, pretrained=True), found)


def test_a_classifier_head_in_the_file_is_left_out(tmp_path):
    file = encoder_file(tmp_path)
    state = torch.load(file, weights_only=True)
    head = {"fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)}
    torch.save(state | head, file)
    network = build_initial_model(ModelConfig("unet", 3, 1, "resnet18"), str(file))
    torch.testing.assert_close(first_kernels(network), state["conv1.weight"])


def test_safetensors_files_are_read(tmp_path):
    from safetensors.torch import save_file

    state = torch.load(encoder_file(tmp_path), weights_only=True)
    save_file(state, tmp_path / "w.safetensors")
    config = ModelConfig("unet", 3, 1, "resnet18")
    network = build_initial_model(config, str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(first_kernels(network), state["conv1.weight"])


def test_torchvision_weights_go_into_the_backbone(tmp_path):
    from torchvision.models import resnet50

    source = resnet50()
    torch.save(source.state_dict(), tmp_path / "r50.pth")
    config = ModelConfig("deeplabv3_resnet50", 3, 1, "resnet50")
    network = build_initial_model(config, str(tmp_path / "r50.pth"))
    torch.testing.assert_close(
        network.network.backbone.conv1.weight, source.conv1.weight
    )


@pytest.mark.parametrize(
    "encoder",
    [
        "resnet18",
        *(
            pytest.param(
                name,
            )
            for name in ("mobilenetv3_small_050", "efficientnet_b0", "densenet121")
        ),
    ],
)
def test_the_file_that_timm_distributes_is_read(tmp_path, encoder):
    source = timm.create_model(encoder)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    config = ModelConfig("unet", 3, 1, f"tu-{encoder}")
    network = build_initial_model(config, str(tmp_path / "model.pth"))
    kernels = next(m for m in source.modules() if isinstance(m, torch.nn.Conv2d)).weight
    torch.testing.assert_close(first_kernels(network), kernels)


def write_garbage(path: Path):
    path.write_bytes(b"not weights at all")


def write_list(path: Path):
    torch.save([1, 2, 3], path)


def write_other_encoder(path: Path):
    state = build_model(ModelConfig("unet", 3, 1, "mobilenet_v2"))
    torch.save(encoder_of(state).state_dict(), path)


def write_half(path: Path):
    state = build_model(ModelConfig("unet", 3, 1, "resnet18"))
    items = list(encoder_of(state).state_dict().items())
    torch.save(dict(items[:20]), path)


def write_other_bands(path: Path):
    state = build_model(ModelConfig("unet", 7, 1, "resnet18"))
    torch.save(encoder_of(state).state_dict(), path)


def write_words(path: Path):
    state = build_model(ModelConfig("unet", 3, 1, "resnet18"))
    words = dict.fromkeys(encoder_of(state).state_dict(), "words")
    torch.save(words, path)


@pytest.mark.parametrize(
    "write",
    [
        write_garbage,
        write_list,
        write_other_encoder,
        write_half,
        write_other_bands,
        pytest.param(
            write_words,
        ),
        None,
    ],
)
def test_a_file_of_other_weights_is_refused_by_name(tmp_path, write):
    file = tmp_path / "weights.pth"
    if write:
        write(file)
    with pytest.raises(SegmentationError, match="weights.pth"):
        build_initial_model(ModelConfig("unet", 4, 1, "resnet18"), str(file))


def test_a_broken_safetensors_file_is_refused_by_name(tmp_path):
    file = tmp_path / "weights.safetensors"
    write_garbage(file)
    with pytest.raises(SegmentationError, match="weights.safetensors"):
        build_initial_model(ModelConfig("unet", 3, 1, "resnet18"), str(file))


# --- losses ---------------------------------------------------------------------------------

LOSSES = (*LOSS_NAMES, "dice+ce", "0.5*dice+ce", "2*focal+0.3*tversky+lovasz")
MODES = ("binary", "multiclass")
CLASSES = 4


def draw_batch(mode: str, seed: int = 0, unlabelled: float = 0.3):
    rng = torch.Generator().manual_seed(seed)
    outputs, classes = (1, 2) if mode == "binary" else (CLASSES, CLASSES)
    logits = torch.randn(2, outputs, 9, 7, generator=rng)
    mask = torch.randint(0, classes, (2, 9, 7), generator=rng)
    mask[torch.rand(2, 9, 7, generator=rng) < unlabelled] = IGNORE
    return logits, mask


def value_and_gradient(loss, logits, mask):
    logits = logits.clone().requires_grad_()
    value = loss(logits, mask)
    value.backward()
    return value.item(), logits.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", LOSSES)
@pytest.mark.parametrize("other", [50.0, -1e4, math.inf, math.nan])
def test_logits_at_unlabelled_pixels_change_nothing(text, mode, other):
    loss = build_loss(text, mode, IGNORE)
    logits, mask = draw_batch(mode)
    value, gradient = value_and_gradient(loss, logits, mask)
    hidden = (mask == IGNORE)[:, None].expand_as(logits)
    changed, moved = value_and_gradient(loss, logits.masked_fill(hidden, other), mask)
    assert changed == value and value > 0
    assert torch.equal(moved, gradient)
    assert not gradient[hidden].any() and gradient[~hidden].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", LOSSES)
def test_a_batch_without_a_labelled_pixel_gives_nothing(text, mode):
    logits, mask = draw_batch(mode, unlabelled=2.0)
    value, gradient = value_and_gradient(build_loss(text, mode, IGNORE), logits, mask)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", LOSSES)
@pytest.mark.parametrize("only", ["one class", "one pixel"])
def test_losses_are_finite_with_one_class_or_one_labelled_pixel(text, mode, only):
    logits, mask = draw_batch(mode, unlabelled=0)
    if only == "one class":
        mask.fill_(0)
    else:
        mask.fill_(IGNORE)
        mask[1, 3, 3] = 1
    value, gradient = value_and_gradient(build_loss(text, mode, IGNORE), logits, mask)
    assert math.isfinite(value) and gradient.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", LOSSES)
def test_following_the_gradient_finds_the_truth(text, mode):
    logits, mask = draw_batch(mode)
    logits.requires_grad_()
    loss = build_loss(text, mode, IGNORE)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(logits, mask).backward()
        optimizer.step()
    labelled = mask != IGNORE
    assert (predict_classes(logits)[labelled] == mask[labelled]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", LOSSES)
def test_the_truth_costs_nothing(text, mode):
    _, mask = draw_batch(mode)
    known = mask.where(mask != IGNORE, 0)
    if mode == "binary":
        logits = (known[:, None] * 2.0 - 1) * 40
    else:
        logits = torch.nn.functional.one_hot(known, CLASSES).movedim(-1, 1) * 80.0 - 40
    assert build_loss(text, mode, IGNORE)(logits, mask).item() < 1e-3


def flat_reference(mode: str, logits, mask):
    """Labelled pixels as numpy: probabilities (M, classes) and truth (M,)."""
    labelled = mask != IGNORE
    logits = logits.double().movedim(1, -1)[labelled].numpy()
    if mode == "binary":
        foreground = 1 / (1 + np.exp(-logits[:, 0]))
        probabilities = np.stack([1 - foreground, foreground], axis=1)
    else:
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
    return probabilities, mask[labelled].numpy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_agrees_with_scikit_learn(mode, weighted):
    logits, mask = draw_batch(mode)
    probabilities, truth = flat_reference(mode, logits, mask)
    classes = probabilities.shape[1]
    weights = np.linspace(0.5, 3, classes) if weighted else None
    expected = reference.log_loss(
        truth,
        probabilities,
        labels=range(classes),
        sample_weight=weights[truth] if weighted else None,
    )
    given = torch.from_numpy(weights) if weighted else None
    loss = build_loss("ce", mode, IGNORE, given)
    assert loss(logits, mask).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("text", "false_positive", "false_negative"),
    [("dice", 0.5, 0.5), ("jaccard", 1, 1), ("tversky", 0.3, 0.7)],
)
def test_overlap_losses_agree_with_their_formula(
    mode, text, false_positive, false_negative
):
    logits, mask = draw_batch(mode)
    probabilities, truth = flat_reference(mode, logits, mask)
    costs = []
    for value in range(1 if mode == "binary" else 0, probabilities.shape[1]):
        p, t = probabilities[:, value], truth == value
        both = (p * t).sum()
        wrong = false_positive * (p * ~t).sum() + false_negative * ((1 - p) * t).sum()
        costs.append(1 - both / (both + wrong))
    value = build_loss(text, mode, IGNORE)(logits, mask).item()
    assert value == pytest.approx(np.mean(costs), rel=1e-4)


def test_binary_focal_loss_agrees_with_its_formula():
    logits, mask = draw_batch("binary")
    probabilities, truth = flat_reference("binary", logits, mask)
    right = probabilities[np.arange(len(truth)), truth]
    expected = (-((1 - right) ** 2) * np.log(right)).mean()
    value = build_loss("focal", "binary", IGNORE)(logits, mask).item()
    assert value == pytest.approx(expected, rel=1e-5)


def test_lovasz_of_a_hard_prediction_is_one_minus_mean_iou():
    logits, mask = draw_batch("multiclass")
    labelled = mask != IGNORE
    chosen = logits.argmax(dim=1)
    hard = torch.nn.functional.one_hot(chosen, CLASSES).movedim(-1, 1) * 200.0
    expected = reference.jaccard_score(
        mask[labelled], chosen[labelled], average="macro"
    )
    value = build_loss("lovasz", "multiclass", IGNORE)(hard, mask).item()
    assert value == pytest.approx(1 - expected, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_weighted_sum_is_the_sum_of_its_weighted_terms(mode):
    logits, mask = draw_batch(mode)

    def cost(text: str) -> float:
        return build_loss(text, mode, IGNORE)(logits, mask).item()

    expected = 0.5 * cost("dice") + cost("ce") + 3 * cost("lovasz")
    assert cost("0.5*dice+ce+3*lovasz") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_class_weights_act_on_the_cross_entropy_alone(mode):
    logits, mask = draw_batch(mode)
    weights = torch.linspace(0.2, 4, 2 if mode == "binary" else CLASSES)

    def cost(text: str, weights=None) -> float:
        return build_loss(text, mode, IGNORE, weights)(logits, mask).item()

    assert cost("dice", weights) == cost("dice")
    assert cost("dice+ce", weights) == pytest.approx(
        cost("dice") + cost("ce", weights), rel=1e-6
    )


@pytest.mark.parametrize(
    "mode",
    [
        "binary",
        pytest.param(
            "multiclass",
        ),
    ],
)
def test_a_batch_of_a_class_that_training_lacks_gives_a_number(mode):
    logits, mask = draw_batch(mode, unlabelled=0)
    mask.fill_(1)
    weights = torch.ones(2 if mode == "binary" else CLASSES)
    weights[1] = 0
    loss = build_loss("ce", mode, IGNORE, weights)
    assert math.isfinite(loss(logits, mask).item())


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("dice+ce", {"dice": 1, "ce": 1}),
        ("0.5*dice+ce", {"dice": 0.5, "ce": 1}),
        (" 2 * Focal + BCE", {"focal": 2, "ce": 1}),
        ("ce+ce", {"ce": 2}),
        ("1e-1*lovasz", {"lovasz": 0.1}),
    ],
)
def test_a_loss_text_is_a_weighted_sum(text, terms):
    assert parse_loss(text) == terms


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Unknown loss ''"),
        ("dise", "did you mean 'dice'"),
        ("dice+", "Unknown loss ''"),
        ("0*dice", "more than 0"),
        ("-1*dice", "more than 0"),
        ("nan*dice", "more than 0"),
        ("x*dice", "more than 0"),
        ("dice*2", "Unknown loss '2'"),
    ],
)
def test_a_loss_text_that_is_none_is_refused(text, words):
    with pytest.raises(OptionError, match=words.replace("*", r"\*")):
        parse_loss(text)


@pytest.mark.parametrize("classes", [2, 5])
def test_class_weights_agree_with_scikit_learn(classes):
    labels = np.random.default_rng(0).geometric(0.4, 500).clip(1, classes) - 1
    expected = compute_class_weight("balanced", classes=np.arange(classes), y=labels)
    weights = balanced_weights(np.bincount(labels, minlength=classes))
    np.testing.assert_allclose(weights, expected)


def test_absent_classes_get_no_weight_and_do_not_change_the_others():
    weights = balanced_weights(np.array([30, 0, 10]))
    expected = compute_class_weight(
        "balanced", classes=np.array([0, 2]), y=np.repeat([0, 2], [30, 10])
    )
    np.testing.assert_allclose(weights[[0, 2]], expected)
    assert weights[1] == 0


# --- metrics --------------------------------------------------------------------------------


def draw_classes(classes: int, missing: tuple[int, ...] = (), seed: int = 0):
    rng = np.random.default_rng(seed)
    values = [value for value in range(classes) if value not in missing]
    truth = rng.choice(values, (2, 12, 10))
    guess = np.where(
        rng.random(truth.shape) < 0.6, truth, rng.choice(values, truth.shape)
    )
    return truth, guess


def score(truth, guess, names) -> dict:
    matrix = confusion_matrix(
        torch.as_tensor(guess), torch.as_tensor(truth), len(names)
    )
    return scores(matrix.numpy(), names, names == BINARY_NAMES)


def test_confusion_matrix_of_four_pixels():
    truth = torch.tensor([[[0, 1], [1, IGNORE]]])
    guess = torch.tensor([[[0, 0], [1, 1]]])
    assert confusion_matrix(guess, truth, 2).tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("ignore", [IGNORE, -1])
def test_confusion_matrix_agrees_with_scikit_learn(ignore):
    truth, guess = draw_classes(5)
    truth[:, :3] = ignore
    known = truth != ignore
    expected = reference.confusion_matrix(truth[known], guess[known], labels=range(5))
    matrix = confusion_matrix(torch.as_tensor(guess), torch.as_tensor(truth), 5)
    assert matrix.tolist() == expected.tolist()


def test_matrices_of_batches_add_up():
    truth, guess = map(torch.as_tensor, draw_classes(4))
    parts = [confusion_matrix(g, t, 4) for g, t in zip(guess, truth)]
    assert torch.equal(sum(parts), confusion_matrix(guess, truth, 4))


@pytest.mark.parametrize("missing", [(), (2,), (0, 4)])
def test_scores_agree_with_scikit_learn(missing):
    truth, guess = draw_classes(5, missing)
    result = score(truth, guess, list("abcde"))
    truth, guess = truth.ravel(), guess.ravel()
    present = [value for value in range(5) if value not in missing]
    for key, function in (
        ("iou", reference.jaccard_score),
        ("f1", reference.f1_score),
        ("precision", reference.precision_score),
        ("recall", reference.recall_score),
    ):
        per_class = function(truth, guess, labels=present, average=None)
        found = [entry[key] for entry in result["per_class"]]
        assert [found[value] for value in present] == pytest.approx(per_class.tolist())
        assert all(found[value] is None for value in missing)
        assert result[f"mean_{key}"] == pytest.approx(per_class.mean())
    accuracy = reference.accuracy_score(truth, guess)
    assert result["overall_accuracy"] == pytest.approx(accuracy)
    assert result["kappa"] == pytest.approx(reference.cohen_kappa_score(truth, guess))
    pixels = [entry["pixels"] for entry in result["per_class"]]
    assert pixels == np.bincount(truth, minlength=5).tolist()


def test_an_absent_class_has_no_score_and_is_null_in_json():
    result = score(np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int), ["a", "b"])
    absent = json.loads(json.dumps(result, allow_nan=False))["per_class"][1]
    assert absent == {
        "name": "b",
        "pixels": 0,
        "iou": None,
        "f1": None,
        "precision": None,
        "recall": None,
    }
    assert result["mean_iou"] == 1 and result["kappa"] is None


def test_a_class_that_is_only_predicted_scores_zero():
    truth, guess = np.array([[[0, 0, 0, 0]]]), np.array([[[0, 0, 0, 1]]])
    result = score(truth, guess, ["a", "b"])
    measures = [result["per_class"][1][k] for k in ("iou", "f1", "precision", "recall")]
    assert measures == [0, 0, 0, 0]
    assert result["mean_iou"] == pytest.approx((0.75 + 0) / 2)


def test_no_pixel_at_all_gives_no_score():
    result = scores(np.zeros((2, 2)), BINARY_NAMES, binary=True)
    for key in ("iou", "f1", "mean_iou", "overall_accuracy", "kappa"):
        assert result[key] is None
    assert combined_score(result) == 0


def test_binary_scores_are_those_of_the_foreground():
    truth, guess = draw_classes(2)
    result = score(truth, guess, BINARY_NAMES)
    assert result["iou"] == pytest.approx(
        reference.jaccard_score(truth.ravel(), guess.ravel())
    )
    assert result["f1"] == pytest.approx(
        reference.f1_score(truth.ravel(), guess.ravel())
    )
    assert result["iou"] != pytest.approx(result["mean_iou"])


def test_two_classes_of_other_names_score_by_their_mean():
    truth, guess = draw_classes(2)
    result = score(truth, guess, ["class 0", "class 1"])
    assert result["iou"] == result["mean_iou"]


def test_the_combined_score_is_the_mean_of_iou_f1_and_kappa():
    assert combined_score({"iou": 0.2, "f1": 0.4, "kappa": 0.6}) == pytest.approx(0.4)
    assert combined_score({"iou": 0.2, "f1": None, "kappa": None}) == 0.2


def test_scores_are_plain_numbers():
    def plain(value) -> bool:
        if isinstance(value, dict):
            return all(plain(inner) for inner in value.values())
        if isinstance(value, list):
            return all(plain(inner) for inner in value)
        return value is None or type(value) in (int, float, str)

    assert plain(score(*draw_classes(3, (1,)), ["a", "b", "c"]))


def test_classes_are_the_argmax_or_the_threshold_inclusive():
    several = torch.tensor([1.0, 3.0, 2.0]).reshape(1, 3, 1, 1)
    assert predict_classes(several).tolist() == [[[1]]]
    one = torch.tensor([[[[-0.1, 0.0, 0.1]]]])
    assert predict_classes(one).tolist() == [[[0, 1, 1]]]
    assert predict_classes(one, threshold=0.51).tolist() == [[[0, 0, 1]]]


@pytest.mark.parametrize("mode", MODES)
def test_evaluate_agrees_with_a_loop_by_hand(mode):
    outputs, classes = (1, 2) if mode == "binary" else (CLASSES, CLASSES)
    batches = [draw_batch(mode, seed) for seed in range(3)]
    network = torch.nn.Identity()  # the images are the logits
    loss = build_loss("dice+ce", mode, IGNORE)
    value, matrix = evaluate(network, batches, loss, torch.device("cpu"), classes)
    assert value == pytest.approx(np.mean([loss(*b).item() for b in batches]))
    truth = torch.cat([mask for _, mask in batches])
    logits = torch.cat([logits for logits, _ in batches])
    guess = logits[:, 0] > 0 if outputs == 1 else logits.argmax(dim=1)
    known = truth != IGNORE
    expected = reference.confusion_matrix(truth[known], guess[known].long())
    assert matrix.tolist() == expected.tolist()


# --- checkpoints ----------------------------------------------------------------------------


def write_checkpoint(path: Path, config: ModelConfig | None = None, **metadata):
    """A checkpoint of a freshly built model; the model."""
    config = config or tiny_model()
    model = build_model(config).eval()
    save_checkpoint(path, model, config, statistics(config.in_channels), metadata)
    return model


def change(path: Path, **changes) -> Path:
    """Rewrite a checkpoint with other metadata; a value of None takes the key out."""
    content = torch.load(path, weights_only=True)
    content["metadata"] |= changes
    for key, value in changes.items():
        if value is None:
            del content["metadata"][key]
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "config",
    [
        tiny_model(),
        tiny_model(10, 6, "unet++"),
        ModelConfig("unet-dropout", 3, 2, None, dropout_rate=0.1),
    ],
    ids=lambda config: config.model_name,
)
def test_a_saved_model_gives_equal_logits_when_loaded(tmp_path, config):
    names = [f"cover {number}" for number in range(config.label_classes)]
    model = write_checkpoint(tmp_path / "m.pth", config, class_names=names)
    loaded = load_checkpoint(tmp_path / "m.pth")
    images = torch.rand(2, config.in_channels, 40, 33)
    with torch.inference_mode():
        assert torch.equal(loaded.model(images), model(images))
    assert loaded.config == config
    assert loaded.normalization == statistics(config.in_channels)
    assert loaded.class_names == names
    assert not loaded.model.training


def test_a_checkpoint_loads_with_weights_only(tmp_path):
    write_checkpoint(tmp_path / "m.pth", input_size=[32, 32])
    content = torch.load(tmp_path / "m.pth", weights_only=True)
    assert set(content) == {"model_state_dict", "metadata"}
    metadata = content["metadata"]
    assert metadata["model_name"] == "linknet"
    assert metadata["mode"] == "binary"
    assert metadata["in_channels"] == 4
    assert metadata["num_classes"] == 1
    assert metadata["encoder_name"] == TINY_ENCODER
    assert metadata["normalization"] == "percentile_99"
    assert metadata["input_size"] == [32, 32]


def test_class_names_have_defaults():
    assert default_class_names(1) == ["background", "foreground"]
    assert default_class_names(3) == ["class 0", "class 1", "class 2"]


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["state", "metadata", "bare"])
def test_code_in_a_checkpoint_never_runs(tmp_path, zipped, where):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    write_checkpoint(path)
    content = torch.load(path, weights_only=True)
    if where == "bare":
        content = Malicious(trace)
    elif where == "state":
        content["model_state_dict"]["extra"] = Malicious(trace)
    else:
        content["metadata"]["training_params"] = Malicious(trace)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="evil.pth"):
        load_checkpoint(path)
    assert not trace.exists()


def test_the_malicious_checkpoint_of_this_test_is_a_real_one(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_checkpoint_that_is_cut_off_is_refused(tmp_path, share):
    path = tmp_path / "m.pth"
    write_checkpoint(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="m.pth"):
        load_checkpoint(path)


def test_a_missing_checkpoint_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.zeros(3)},
        {"state_dict": {}, "epoch": 3},
        {"model_state_dict": {}},
        {"metadata": {"model_name": "unet"}},
        {"model_state_dict": {}, "metadata": {}},
        {"model_state_dict": {}, "metadata": {"mode": "binary"}},
        [1, 2],
        torch.zeros(2),
        *(
            pytest.param(
                content,
            )
            for content in (
                {"model_state_dict": {}, "metadata": "text"},
                {
                    "model_state_dict": [1],
                    "metadata": {
                        "model_name": "linknet",
                        "mode": "binary",
                        "in_channels": 3,
                        "num_classes": 1,
                        "encoder_name": TINY_ENCODER,
                    },
                },
            )
        ),
    ],
)
def test_another_dictionary_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth"):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("key", ["model_name", "in_channels", "num_classes"])
def test_a_checkpoint_without_a_documented_key_is_refused(tmp_path, key):
    write_checkpoint(tmp_path / "m.pth", tiny_model(4, 3))
    change(tmp_path / "m.pth", **{key: None})
    with pytest.raises(CheckpointError, match=key):
        load_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name": "segnet"},
        {"model_name": "fpn"},
        {"encoder_name": "resnet18"},
        {"encoder_name": "no_such"},
        {"in_channels": 5},
        {"num_classes": 4},
        {"mode": "multiclass", "num_classes": 1000},
        {"version": "2.0.0"},
        {"normalization_statistics": {"rule": "dataset", "low": [0.0], "high": [1.0]}},
        {"normalization_statistics": {"low": [0.0] * 4, "high": [1.0] * 4}},
        pytest.param(
            {
                "normalization_statistics": {
                    "rule": "dataset",
                    "low": [0.0] * 4,
                    "high": [1.0],
                }
            }
        ),
        pytest.param(
            {
                "normalization_statistics": {
                    "rule": "dataset",
                    "low": [0.0] * 4,
                    "high": [math.nan] * 4,
                }
            }
        ),
        pytest.param(
            {"normalization_statistics": {"rule": "zscore", "low": [], "high": []}}
        ),
        pytest.param({"normalization_statistics": [1, 2]}),
        pytest.param({"in_channels": "four"}),
        {"in_channels": 0},
        pytest.param({"model_name": 3}),
        pytest.param({"mode": "regression"}),
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        pytest.param({"temperature": "2"}),
        pytest.param({"temperature": True}),
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, changes):
    write_checkpoint(tmp_path / "m.pth", tiny_model(4, 3))
    change(tmp_path / "m.pth", **changes)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "m.pth")
    assert "m.pth" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    path = tmp_path / "m.pth"
    write_checkpoint(path)
    content = torch.load(path, weights_only=True)
    key = next(k for k, v in content["model_state_dict"].items() if v.ndim == 4)
    content["model_state_dict"][key][0, 0, 0, 0] = value
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="not numbers"):
        load_checkpoint(path)


@pytest.mark.parametrize("edit", ["missing", "extra", "shape"])
def test_weights_of_another_model_are_refused(tmp_path, edit):
    path = tmp_path / "m.pth"
    write_checkpoint(path)
    content = torch.load(path, weights_only=True)
    state = content["model_state_dict"]
    key = next(k for k, v in state.items() if v.ndim == 4)
    if edit == "missing":
        del state[key]
    elif edit == "extra":
        state["surplus"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(1, 1, 1, 1)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="m.pth"):
        load_checkpoint(path)


def documented_metadata(config: ModelConfig) -> dict:
    """The keys of the documentation, without statistics."""
    return {
        "model_name": config.model_name,
        "mode": config.mode,
        "in_channels": config.in_channels,
        "num_classes": config.num_classes,
        "input_size": [32, 32],
        "normalization": "percentile_99",
        "encoder_name": config.encoder_name,
        "pretrained": False,
        "training_params": {"epochs": 2, "best_val_iou": 0.5},
        "performance_metrics": {},
    }


@pytest.mark.parametrize("key", ["metadata", "config"])
@pytest.mark.parametrize("scalars", [False, True])
@pytest.mark.parametrize("outputs", [1, 3])
def test_earlier_checkpoints_open_and_use_the_image_rule(
    tmp_path, key, scalars, outputs
):
    config = tiny_model(4, outputs)
    model = build_model(config).eval()
    metadata = documented_metadata(config)
    if scalars:
        metadata["training_params"]["best_val_iou"] = np.float64(0.5)
        metadata["training_params"]["best_val_loss"] = np.float32(0.25)
        metadata["num_classes"] = np.int64(outputs)
        metadata["pretrained"] = np.bool_(False)
    state = model.network.state_dict()
    torch.save({"model_state_dict": state, key: metadata}, tmp_path / "old.pth")
    loaded = load_checkpoint(tmp_path / "old.pth")
    assert loaded.normalization == Normalization("image")
    assert loaded.config == config
    assert type(loaded.metadata["num_classes"]) is int
    image = torch.rand(1, 4, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded.model(image), model(image))


def test_numpy_scalars_named_as_numpy_1_did_are_admitted(tmp_path):
    path = tmp_path / "old.pth"
    config = tiny_model()
    content = {
        "model_state_dict": build_model(config).network.state_dict(),
        "config": documented_metadata(config) | {"best": np.float64(0.5)},
    }
    torch.save(content, path, _use_new_zipfile_serialization=False)
    current, earlier = b"numpy._core.multiarray", b"numpy.core.multiarray"
    raw = path.read_bytes()
    assert raw.count(b"c" + current) == 1
    path.write_bytes(raw.replace(b"c" + current, b"c" + earlier))
    loaded = load_checkpoint(path)
    assert loaded.metadata["best"] == 0.5 and type(loaded.metadata["best"]) is float


def test_the_nearest_minor_versions_are_readable(tmp_path):
    write_checkpoint(tmp_path / "m.pth")
    change(tmp_path / "m.pth", version=VERSION.rsplit(".", 1)[0] + ".99")
    load_checkpoint(tmp_path / "m.pth")


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "m.pth"
    write_checkpoint(path)
    before = path.read_bytes()
    model = build_model(tiny_model())
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        save_checkpoint(
            path, model, tiny_model(), statistics(4), {"hook": lambda: None}
        )
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.pth"]


# --- training -------------------------------------------------------------------------------


def test_history_keeps_the_best_and_its_epoch():
    history = History()
    for epoch, (loss, iou) in enumerate([(3, 0.1), (1, 0.1), (2, 0.3)], start=1):
        history.rows.append({"epoch": epoch})
        history.improve("loss", loss, higher=False)
        history.improve("iou", iou, higher=True)
    assert history.best == {"loss": 1, "iou": 0.3}
    assert history.best_epoch == {"loss": 2, "iou": 3}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_the_best(value):
    history = History([{}])
    assert not history.improve("loss", value, higher=False)
    assert not history.best


def rates(name: str, epochs: int, losses) -> list[float]:
    """The learning rate of each epoch."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = make_scheduler(optimizer, settings(scheduler=name), epochs)
    found = []
    for loss in losses:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if name == "plateau":
            scheduler.step(loss)
        elif scheduler:
            scheduler.step()
    return found


def test_cosine_falls_along_half_a_wave_from_the_initial_rate():
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)]
    assert rates("cosine", 8, range(8)) == pytest.approx(expected)


def test_plateau_halves_the_rate_after_six_epochs_without_a_better_loss():
    found = rates("plateau", 9, [1.0] * 9)
    assert found == pytest.approx([0.1] * 7 + [0.05] * 2)
    assert rates("plateau", 9, range(9, 0, -1)) == pytest.approx([0.1] * 9)


def test_without_a_scheduler_the_rate_stays():
    assert rates("none", 5, range(5)) == [0.1] * 5


def stepper(optimizer, **options) -> Stepper:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Stepper(optimizer, scaler, **options)


@pytest.mark.parametrize("model", ["pan", "deeplabv3", "deeplabv3_resnet50"])
def test_a_batch_of_one_that_cannot_be_normalized_says_what_to_do(model):
    network = build_model(ModelConfig(model, 2, 1, encoder_for(model)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    batch = [(torch.rand(1, 2, 32, 32), torch.zeros(1, 32, 32, dtype=torch.int64))]
    loss = build_loss("ce", "binary", IGNORE)
    with pytest.raises(SegmentationError, match="--batch_size 2"):
        train_one_epoch(network, batch, loss, stepper(optimizer), torch.device("cpu"))


def test_a_loss_that_is_no_number_stops_training():
    network = torch.nn.Conv2d(1, 1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    images = torch.full((2, 1, 4, 4), math.nan)
    batch = [(images, torch.zeros(2, 4, 4, dtype=torch.int64))]
    loss = build_loss("ce", "binary", IGNORE)
    with pytest.raises(SegmentationError, match="--learning_rate"):
        train_one_epoch(network, batch, loss, stepper(optimizer), torch.device("cpu"))


def test_an_unlabelled_batch_moves_no_weight():
    network = torch.nn.Conv2d(1, 1, 1)
    before = network.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    batch = [(torch.rand(2, 1, 4, 4), torch.full((2, 4, 4), IGNORE))]
    loss = build_loss("dice+ce", "binary", IGNORE)
    train_one_epoch(network, batch, loss, stepper(optimizer), torch.device("cpu"))
    assert torch.equal(network.weight, before)


def test_fold_summary_gives_mean_deviation_and_t_interval():
    from scipy import stats

    values = [0.5, 0.7, 0.9, 0.6]
    keys = ("iou", "f1", "mean_iou", "mean_f1", "overall_accuracy", "kappa")
    summary = fold_summary([dict.fromkeys(keys, value) for value in values])
    assert set(summary) == set(keys)
    found = summary["kappa"]
    assert found["values"] == values
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found["interval_95"] == pytest.approx(expected)


def test_folds_without_a_score_are_left_out_of_the_summary():
    keys = ("iou", "f1", "mean_iou", "mean_f1", "overall_accuracy", "kappa")
    summary = fold_summary(
        [dict.fromkeys(keys, 0.5), dict.fromkeys(keys, None) | {"f1": 0.7}]
    )
    assert summary["iou"]["values"] == [0.5]
    assert summary["iou"]["std"] is None and summary["iou"]["interval_95"] is None
    assert summary["f1"]["values"] == [0.5, 0.7]


def test_the_device_defaults_to_the_gpu_where_there_is_one():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device(None).type == expected
    assert pick_device("cpu").type == "cpu"


def test_an_image_that_prediction_has_scaled_can_be_differentiated_later():
    rule = Normalization("dataset", (-1.25,), (2.5,))
    with torch.inference_mode():
        normalize(torch.zeros(1, 2, 2), None, rule)
    image = torch.zeros(1, 2, 2, requires_grad=True)
    (image * normalize(image, None, rule)).sum().backward()
    assert image.grad is not None


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [
        (None, None, 0),
        ("cuda", None, 0),
        ("cuda:2", None, 2),
        (None, 3, 3),
        ("cuda", 3, 3),
    ],
)
def test_a_process_takes_its_own_gpu_and_makes_it_the_present_one(
    monkeypatch, name, rank, expected
):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    if rank is not None:
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert local_device(name) == torch.device("cuda", expected)
    assert taken == [expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(SegmentationError, match="--device cuda.*--device cpu"):
        pick_device("cuda")


def test_a_device_that_does_not_exist_is_a_wrong_option():
    with pytest.raises(OptionError, match="--device gpu"):
        pick_device("gpu")


def test_a_device_that_computes_nothing_is_a_wrong_option():
    with pytest.raises(SegmentationError, match="--device meta"):
        pick_device("meta")


def test_settings_can_be_imported_without_torch():
    code = "import model_training, sys; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_setting_has_a_help_text():
    assert all(item.metadata["help"] for item in fields(TrainingConfig))


def test_the_helper_dataset_can_be_read_by_tifffile_and_rasterio(tmp_path):
    import tifffile

    root = write_dataset(tmp_path, 1, 0, 0, bands=4)
    (pair,) = list_pairs(root, "train")
    image, valid, mask = read_patch(pair)
    assert valid.all() and set(np.unique(mask)) == {0, 1}
    assert tifffile.imread(pair.image).size == image.size
