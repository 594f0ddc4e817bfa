"""Known answers and properties of model_training: normalization, models, metrics, checkpoints."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import (
    CLASSES,
    IGNORE,
    MODES,
    ROOT,
    TINY_ENCODER,
    draw_batch,
    encoder_for,
    statistics,
)
from sklearn import metrics as reference

from common import VERSION
from common.architectures import (
    ARCHITECTURES,
    BINARY_NAMES,
    ModelConfig,
    default_class_names,
    get_available_models,
)
from common.errors import CheckpointError, DatasetError, OptionError
from model_training import (
    Normalization,
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
from training.loop import evaluate


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


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


def tiny_model(
    in_channels: int = 4, num_classes: int = 1, model: str = "linknet"
) -> ModelConfig:
    return ModelConfig(model, in_channels, num_classes, TINY_ENCODER)


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


# --- models ---------------------------------------------------------------------------------


def test_every_documented_model_is_available():
    documented = (
        "unet-dropout unet unet++ manet linknet pan fpn pspnet deeplabv3 deeplabv3+ "
        "segformer upernet dpt deeplabv3_resnet50 pixel"
    )
    assert set(get_available_models()) == set(documented.split())


def test_the_documented_one_liner_prints_the_models():
    code = (
        "from model_training import get_available_models; print(get_available_models())"
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


@pytest.mark.parametrize(
    "bands", [10, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 13))]
)
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
    assert len(heads) >= 8


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


@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet-b0", TINY_ENCODER])
@pytest.mark.parametrize("model", ["unet", "unet++", "manet", "linknet"])
def test_fewer_levels_leave_no_weight_without_a_use(model, encoder):
    whole, config = (
        ModelConfig(model, 4, 3, encoder, encoder_depth=depth) for depth in (5, 3)
    )
    network = build_model(config)
    network(torch.rand(2, 4, 50, 70)).square().mean().backward()
    assert all(weight.grad is not None for weight in network.parameters())
    count, of_all = (
        sum(weight.numel() for weight in net.parameters())
        for net in (network, build_model(whole))
    )
    assert count < of_all / 2


@pytest.mark.parametrize(
    ("encoder", "depth"),
    [
        ("tu-hrnet_w18_small", 3),
        pytest.param("tu-xception41", 4, marks=pytest.mark.slow),
    ],
)
def test_an_encoder_that_cannot_run_without_its_unused_layers_keeps_them(
    encoder, depth
):
    network = build_model(ModelConfig("unet", 4, 3, encoder, encoder_depth=depth))
    network(torch.rand(2, 4, 50, 70)).square().mean().backward()
    unused = [w for w in network.network.encoder.parameters() if w.grad is None]
    assert unused and network.training


@pytest.mark.parametrize("depth, equal", [(3, True), (5, False)])
def test_fewer_levels_see_less_around_a_pixel(depth, equal):
    config = ModelConfig("unet", 1, 2, "resnet18", encoder_depth=depth)
    network = build_model(config).eval()
    image = torch.rand(1, 1, 256, 256)
    other = image.clone()
    other[..., 150:, :] = 9  # 149 pixels and more from the first row
    with torch.inference_mode():
        first, second = network(image)[..., 0, :], network(other)[..., 0, :]
    assert torch.allclose(first, second, atol=1e-7) == equal


def test_a_checkpoint_keeps_the_levels_of_its_encoder(tmp_path):
    config = ModelConfig("unet", 3, 2, "resnet18", encoder_depth=4)
    network = build_model(config).eval()
    save_checkpoint(tmp_path / "m.pth", network, config, Normalization("image"), {})
    again = load_checkpoint(tmp_path / "m.pth")
    assert again.config == config
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again.model(image), network(image))


def test_a_pixel_model_sees_no_neighbour():
    config = ModelConfig("pixel", 4, 3, None, dropout_rate=0.45)
    network = build_model(config)
    rates = {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.45}
    image = torch.rand(2, 4, 9, 7)
    other = image.clone()
    other[:, :, 4, 3] += 1
    with torch.inference_mode():
        changed = (network.eval()(image) != network(other)).any(dim=1)
    expected = torch.zeros(9, 7, dtype=torch.bool)
    expected[4, 3] = True
    assert (changed == expected).all()


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
        "mobilenet_v2",
        "tu-mobilenetv3_small_100",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *("resnet50", "efficientnet-b0", "densenet121", "tu-densenet264d"),
                "vgg11",
            )
        ),
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


@pytest.mark.parametrize("depth", [3, 4, 5])
def test_an_encoder_of_one_size_is_refused_at_every_depth(depth):
    encoder = "tu-coat_lite_tiny"
    with pytest.raises(OptionError, match="any size: Input height"):
        build_model(ModelConfig("unet", 3, 1, encoder, encoder_depth=depth))


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
    labelled = [int((mask != IGNORE).sum()) for _, mask in batches]
    losses = [loss(*batch).item() for batch in batches]
    assert value == pytest.approx(np.average(losses, weights=labelled))
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
        {"version": "3.0.0"},
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


def test_an_image_that_prediction_has_scaled_can_be_differentiated_later():
    rule = Normalization("dataset", (-1.25,), (2.5,))
    with torch.inference_mode():
        normalize(torch.zeros(1, 2, 2), None, rule)
    image = torch.zeros(1, 2, 2, requires_grad=True)
    (image * normalize(image, None, rule)).sum().backward()
    assert image.grad is not None
