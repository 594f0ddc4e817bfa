"""Losses: known answers, independent references and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    IGNORE,
    MODES,
    draw_batch,
)
from sklearn import metrics as reference
from sklearn.utils.class_weight import compute_class_weight

from common.architectures import (
    LOSS_NAMES,
    parse_loss,
)
from common.errors import OptionError
from model_training import (
    balanced_weights,
    build_loss,
    predict_classes,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


LOSSES = (*LOSS_NAMES, "dice+ce", "0.5*dice+ce", "2*focal+0.3*tversky+lovasz")


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


@pytest.mark.parametrize("mode", MODES)
def test_the_generalized_cross_entropy_agrees_with_its_formula(mode):
    logits, mask = draw_batch(mode)
    probabilities, truth = flat_reference(mode, logits, mask)
    right = probabilities[np.arange(len(truth)), truth]
    value = build_loss("gce", mode, IGNORE)(logits, mask).item()
    assert value == pytest.approx(((1 - right**0.7) / 0.7).mean(), rel=1e-5)


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
