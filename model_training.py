"""What training and prediction share: models, normalization, losses, metrics, checkpoints.

Images are (C, H, W) as rasterio reads them, masks (H, W) int64 with ``ignore_index`` where
unlabelled, models return logits (N, K, H, W). A binary model has K = 1 and a sigmoid, a multiclass
one K classes and a softmax; scores of a binary model count two classes, background and foreground.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common import VERSION
from common.architectures import (
    ARCHITECTURES,
    ModelConfig,
    check_model_name,
    default_class_names,
    get_available_models,
    is_weights_file,
    parse_loss,
)
from common.colours import Colour, colour_of_hex, complete_colours
from common.earlier_models import (
    check_class_colours,
    check_options,
    complete_description,
    stored_class_codes,
    stored_class_names,
    stored_description,
    stored_temperature,
    stored_weights,
)
from common.errors import (
    CheckpointError,
    DatasetError,
    OptionError,
    SegmentationError,
    unknown_name,
)
from common.files import atomic_write
from common.scores import scores

# the public names; those of common.architectures, common.errors and common.scores are re-exported
__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ModelConfig",
    "Normalization",
    "balanced_weights",
    "build_loss",
    "build_model",
    "class_probabilities",
    "combined_score",
    "confusion_matrix",
    "dataset_normalization",
    "get_available_encoders",
    "get_available_models",
    "load_checkpoint",
    "normalize",
    "parse_loss",
    "predict_classes",
    "save_checkpoint",
    "scores",
]


DECODER_CHANNELS = (256, 128, 64, 32, 16)  # of the library, from the deepest level


def _build_smp(config: ModelConfig, weights: str | None) -> nn.Module:
    import segmentation_models_pytorch as smp

    # a vision transformer takes other sizes than its own only when told so
    options = {"dynamic_img_size": True} if config.model_name == "dpt" else {}
    depth = config.encoder_depth
    if ARCHITECTURES[config.model_name].takes_depth:
        options["encoder_depth"] = depth
        if config.model_name != "linknet":  # which has the encoder's own
            options["decoder_channels"] = DECODER_CHANNELS[-depth:]
    return smp.create_model(
        config.model_name.replace("+", "plus"),
        encoder_name=config.encoder_name,
        encoder_weights=weights,
        in_channels=config.in_channels,
        classes=config.num_classes,
        **options,
    )


def _build_torchvision(config: ModelConfig, weights: str | None) -> nn.Module:
    from timm.models import adapt_input_conv
    from torchvision.models import ResNet50_Weights
    from torchvision.models.segmentation import deeplabv3_resnet50

    network = deeplabv3_resnet50(
        weights=None,
        weights_backbone=ResNet50_Weights.IMAGENET1K_V1 if weights else None,
        num_classes=config.num_classes,
    )
    if config.in_channels != 3:
        old = network.backbone.conv1
        conv = nn.Conv2d(config.in_channels, 64, 7, stride=2, padding=3, bias=False)
        if weights:
            kernels = adapt_input_conv(config.in_channels, old.weight.detach())
            conv.weight = nn.Parameter(kernels)
        network.backbone.conv1 = conv
    return network


class UNetDropout(nn.Module):
    """A U-Net of five levels with dropout after each (Ronneberger et al. 2015; Srivastava 2014).

    Dropout drops whole feature maps, since neighbouring pixels of one map are alike.
    """

    WIDTHS = (32, 64, 128, 256, 512)

    def __init__(self, config: ModelConfig):
        super().__init__()
        widths, rate = self.WIDTHS, config.dropout_rate
        inputs = (config.in_channels, *widths)
        self.down = nn.ModuleList(
            _unet_block(a, b, rate) for a, b in zip(inputs, widths)
        )
        self.pool = nn.MaxPool2d(2)
        steps = list(zip(widths[::-1], widths[-2::-1]))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in steps)
        self.up = nn.ModuleList(_unet_block(2 * b, b, rate) for _, b in steps)
        self.head = nn.Conv2d(widths[0], config.num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        kept = []
        for level in self.down:
            features = level(features if not kept else self.pool(features))
            kept.append(features)
        for grow, up, skip in zip(self.grow, self.up, kept[-2::-1]):
            features = up(torch.cat([grow(features), skip], dim=1))
        return self.head(features)


def _unet_block(inputs: int, outputs: int, dropout_rate: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Dropout2d(dropout_rate))


def _build_unet_dropout(config: ModelConfig, weights: str | None) -> nn.Module:
    return UNetDropout(config)


class PixelNetwork(nn.Sequential):
    """Three layers of 1 x 1 convolutions: a pixel's class by its own bands alone.

    For bands that hold context already, as embeddings do, for very few labels, and as the yardstick
    of what context adds. Dropout is of single values, since a pixel has no neighbours here.
    """

    WIDTH = 256

    def __init__(self, config: ModelConfig):
        layers: list[nn.Module] = []
        for channels in (config.in_channels, self.WIDTH):
            layers += [
                nn.Conv2d(channels, self.WIDTH, 1, bias=False),
                nn.BatchNorm2d(self.WIDTH),
                nn.ReLU(inplace=True),
                nn.Dropout(config.dropout_rate),
            ]
        super().__init__(*layers, nn.Conv2d(self.WIDTH, config.num_classes, 1))


def _build_pixel(config: ModelConfig, weights: str | None) -> nn.Module:
    return PixelNetwork(config)


# how each is built; what is not listed here, segmentation-models-pytorch builds
BUILDERS = {
    "unet-dropout": _build_unet_dropout,
    "deeplabv3_resnet50": _build_torchvision,
    "pixel": _build_pixel,
}


def get_available_encoders() -> list[str]:
    """The names that ``--encoder_name`` takes, beside timm's (``tu-`` and a name of timm's)."""
    from segmentation_models_pytorch.encoders import get_encoder_names

    return get_encoder_names()


class PadToMultiple(nn.Module):
    """Pads the input of a network to the sizes that it takes, and crops its logits."""

    def __init__(self, network: nn.Module, size_divisor: int, min_size: int):
        super().__init__()
        self.network = network
        self.size_divisor = size_divisor
        self.min_size = min_size

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        below, right = (
            max(self.min_size, math.ceil(side / self.size_divisor) * self.size_divisor)
            - side
            for side in (height, width)
        )
        if below or right:
            images = functional.pad(images, (0, right, 0, below), mode="replicate")
        logits = self.network(images)
        if isinstance(logits, dict):  # TorchVision
            logits = logits["out"]
        return logits[..., :height, :width]


def build_model(config: ModelConfig, encoder_weights: str | None = None) -> nn.Module:
    """Build a network for any input size.

    Args:
        config: What to build.
        encoder_weights: None (random), or the name of weights that the library downloads.

    Returns:
        A module from (N, C, H, W) float32 to logits (N, K, H, W). Its ``network`` is the library's
        own module, whose state dictionary is what checkpoints hold.

    Raises:
        OptionError: Unknown names, or an encoder that the decoder cannot use.
        SegmentationError: Weights that cannot be downloaded.
    """
    check_architecture(config, encoder_weights)
    architecture = ARCHITECTURES[config.model_name]
    build = BUILDERS.get(config.model_name, _build_smp)
    try:
        # libraries print their downloads
        with contextlib.redirect_stdout(sys.stderr):
            network = build(config, encoder_weights)
    except OSError as error:
        raise SegmentationError(
            f"The {encoder_weights} weights of {config.encoder_name} could not be downloaded "
            "(no network?); give a file with --encoder_weights, or leave --pretrained out"
        ) from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        text = str(error.args[0]) if error.args else type(error).__name__
        raise OptionError(
            f"{config.model_name} cannot be built with {config.encoder_name}: {text}"
        ) from error
    model = PadToMultiple(network, architecture.size_divisor, architecture.min_size)
    if (config.encoder_name or "").startswith("tu-"):
        check_dynamic_size(model, config)
    if architecture.takes_depth and config.encoder_depth < ModelConfig.encoder_depth:
        _drop_unused(model, config.in_channels)
    return model


def _drop_unused(model: nn.Module, in_channels: int) -> None:
    """Take out of an encoder what no output depends on: the levels below its depth.

    All of it stays where the encoder cannot run without it.
    """
    encoder, image = model.network.encoder, torch.zeros(1, in_channels, 64, 96)
    weights = list(encoder.parameters())
    logits = model.eval()(image)
    slopes = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
    unused = {id(w) for w, slope in zip(weights, slopes) if slope is None}
    dropped = []
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            own = [id(weight) for weight in child.parameters()]
            if own and unused.issuperset(own):
                setattr(module, name, _LeftOut())
                dropped.append((module, name, child))
    try:
        with torch.inference_mode():
            model(image)
    except Exception:  # noqa: BLE001  # its code can use them in any way
        for module, name, child in dropped:
            setattr(module, name, child)
    model.train()


class _LeftOut(nn.Module):
    """In the place of layers that no output depends on; some encoders call them all the same."""

    def forward(self, features: Tensor, *more) -> Tensor:
        return features


def check_dynamic_size(model: nn.Module, config: ModelConfig) -> None:
    """Raise OptionError where an encoder of timm's takes images of one size only."""
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, config.in_channels, 64, 96))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise OptionError(
            f"{config.model_name} with {config.encoder_name} does not take images of any size: "
            f"{str(error) or type(error).__name__}"
        ) from error
    model.train()


def check_architecture(config: ModelConfig, encoder_weights: str | None = None) -> None:
    """Raise OptionError unless model, encoder and weights are known and go together."""
    check_model_name(config.model_name)
    name, entry = config.encoder_name, ARCHITECTURES[config.model_name]
    if encoder_weights and not entry.has_encoder:
        raise OptionError(f"{config.model_name} has no pretrained weights")
    file_or_imagenet = encoder_weights in (None, "imagenet") or is_weights_file(
        encoder_weights
    )
    if not entry.takes_encoder:
        if not file_or_imagenet:
            raise unknown_name("weights", encoder_weights, ["imagenet"])
        return
    if not name:
        raise OptionError(
            f"{config.model_name} needs an encoder; name one with --encoder_name"
        )
    if name.startswith("tu-"):
        import timm

        known = [f"tu-{model}" for model in timm.list_models()]
        # a pretrained tag may follow the name: tu-resnet18.a1_in1k
        if name.split(".")[0] not in known:
            raise unknown_name("encoder", name, known)
        if not file_or_imagenet:
            raise OptionError(
                f"--encoder_weights {encoder_weights}: {name} has its weights in its name, as "
                "tu-resnet18.a1_in1k; give imagenet, or a file"
            )
    elif name not in get_available_encoders() and not name.startswith("timm-"):
        raise unknown_name("encoder", name, get_available_encoders())


@dataclass(frozen=True)
class Normalization:
    """How pixel values become network input.

    ``dataset`` scales each band from ``low`` and ``high`` (1st and 99th percentile of the training
    split's valid pixels) to 0 and 1; ``image`` divides by the joint 99th percentile of all bands
    of the patch or window, the rule of earlier checkpoints. Both clip to [0, 1].
    """

    rule: str = "image"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def normalize(image, valid, normalization: Normalization) -> Tensor:
    """Scale images to [0, 1].

    Args:
        image: (..., C, H, W) array or tensor of any real dtype, in the file's values.
        valid: (..., H, W) bool; invalid pixels become 0 and enter no statistic. None: all are.
        normalization: The rule and its numbers.

    Returns:
        float32 of the same shape, on the image's device.
    """
    image = torch.as_tensor(image)
    valid = None if valid is None else torch.as_tensor(valid, device=image.device)
    if normalization.rule == "image":
        scaled = image.to(torch.float32) / joint_percentiles(image, valid)
    else:
        limits = tuple(normalization.low), tuple(normalization.high)
        low, span = _limits(*limits, image.device)
        if image.ndim == 4 and image.is_contiguous(memory_format=torch.channels_last):
            # whole rows at a time, since a pixel's bands are too few for the CPU's vectors
            shape, width = image.movedim(1, -1).shape, image.shape[-1]
            rows = image.movedim(1, -1).flatten(2).to(torch.float32) - low.repeat(width)
            scaled = (rows.div_(span.repeat(width))).view(shape).movedim(-1, 1)
        else:
            scaled = image.to(torch.float32) - low[:, None, None]
            scaled /= span[:, None, None]
    scaled.clamp_(0, 1)
    if valid is not None:  # last, since invalid pixels can be NaN
        scaled.masked_fill_(~valid[..., None, :, :], 0)
    return scaled


@functools.lru_cache(16)
def _limits(low: tuple, high: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Low end and span of each band, (C,) float32; kept, since a GPU stops for each upload."""
    with torch.inference_mode(False):  # they are used outside of inference mode too
        low, high = (
            torch.tensor(values, dtype=torch.float32, device=device)
            for values in (low, high)
        )
        return low, torch.where(high > low, high - low, 1.0)


def joint_percentiles(image: Tensor, valid: Tensor | None) -> Tensor:
    """The 99th percentile of all bands of each image together, (..., 1, 1, 1); 1 if not positive."""
    stack = image.flatten(0, -4) if image.ndim > 3 else image[None]
    masks = torch.ones_like(image[..., 0, :, :], dtype=torch.bool)
    masks = masks if valid is None else valid.expand_as(masks)
    tops = []
    for one, mask in zip(stack.cpu().numpy(), masks.reshape(-1, *masks.shape[-2:])):
        values = one[:, mask.cpu().numpy()]
        top = float(np.percentile(values, 99)) if values.size else 1.0
        tops.append(top if top > 0 else 1.0)
    tops = torch.tensor(tops, device=image.device)
    return tops.reshape(*image.shape[:-3], 1, 1, 1)


def dataset_normalization(samples: Sequence[np.ndarray]) -> Normalization:
    """Percentiles 1 and 99 per band of sampled valid pixels, each sample (M, C)."""
    pixels = np.concatenate(samples)
    if len(pixels) == 0:
        raise DatasetError("The training patches have no valid pixel")
    low, high = np.percentile(pixels, [1, 99], axis=0)
    return Normalization("dataset", tuple(low.tolist()), tuple(high.tolist()))


def build_loss(
    text: str, mode: str, ignore_index: int, class_weights: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from (logits (N, K, H, W), mask (N, H, W)) to a scalar.

    Terms are those of segmentation-models-pytorch over all labelled pixels of the batch: Dice,
    Jaccard, Tversky (false positives 0.3, false negatives 0.7: Salehi et al. 2017) and Lovasz
    (Berman et al. 2018), and PyTorch's cross-entropy, of which focal is the form with gamma 2 (Lin
    et al. 2017) and gce the generalized one with q 0.7 (Zhang and Sabuncu 2018). Unlabelled pixels
    change none of them; a batch without a labelled pixel gives 0 with a gradient of 0. Lovasz waits
    for a GPU once per batch and class, where segmentation-models-pytorch selects pixels.

    Args:
        text: As ``parse_loss`` reads it.
        mode: "binary" or "multiclass".
        ignore_index: Mask value of unlabelled pixels, none of the classes.
        class_weights: (classes,) float, for the cross-entropy term alone.
    """
    from segmentation_models_pytorch import losses

    def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
        weight = (mask != ignore_index).to(logits)
        target = mask.where(weight > 0, 0)
        if class_weights is not None:
            weight *= class_weights.to(logits)[target]
        # all weights may be 0: classes that training lacks
        each = log_losses(logits, target) * weight
        return each.sum() / weight.sum().clamp_min(1e-12)

    def of_log_losses(change: Callable[[Tensor], Tensor]) -> Callable:
        def mean(logits: Tensor, mask: Tensor) -> Tensor:
            labelled = mask != ignore_index
            each = change(log_losses(logits, mask.where(labelled, 0))) * labelled
            return each.sum() / labelled.sum().clamp_min(1)

        return mean

    ignore = {"ignore_index": ignore_index}
    terms = {
        "ce": cross_entropy,
        "dice": losses.DiceLoss(mode, **ignore),
        "focal": of_log_losses(lambda each: (1 - torch.exp(-each)) ** 2 * each),
        "gce": of_log_losses(lambda each: -torch.expm1(-0.7 * each) / 0.7),
        "tversky": losses.TverskyLoss(mode, alpha=0.3, beta=0.7, **ignore),
        "jaccard": losses.JaccardLoss(mode, **ignore),
        "lovasz": losses.LovaszLoss(mode, **ignore),
    }
    chosen = [(weight, terms[name]) for name, weight in parse_loss(text).items()]

    def loss(logits: Tensor, mask: Tensor) -> Tensor:
        labelled = mask != ignore_index
        # terms multiply what is unlabelled by 0, which infinity does not become
        logits = logits.float().masked_fill(~labelled[:, None], 0)
        # without labelled pixels Lovasz has no element
        total = sum(weight * term(logits, mask).sum() for weight, term in chosen)
        return total.where(labelled.any(), 0)

    return loss


def log_losses(logits: Tensor, target: Tensor) -> Tensor:
    """-log of the true class's probability, (N, H, W), of logits (N, K, H, W); K = 1 is binary."""
    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(
            logits[:, 0], target.to(logits), reduction="none"
        )
    return functional.cross_entropy(logits, target, reduction="none")


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """Class weights n / (classes * n_class), mean 1 over pixels; absent classes get 0.

    The "balanced" rule of scikit-learn (King and Zeng 2001), over labelled pixels (classes,).
    """
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


def class_probabilities(logits: Tensor) -> Tensor:
    """Probabilities (N, K, H, W) of logits: a sigmoid for K = 1, else a softmax over K."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def predict_classes(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Class ids (N, H, W) int64 of logits (N, K, H, W)."""
    if logits.shape[1] == 1:
        return (logits[:, 0].sigmoid() >= threshold).long()
    return logits.argmax(dim=1)


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (true class, predicted class).

    Args:
        prediction: (N, H, W) int64 class ids.
        target: Same shape; pixels outside 0..K-1 (``ignore_index``) are not counted.

    Returns:
        (K, K) int64; rows are truth. Sums over batches are valid.
    """
    known = (target >= 0) & (target < num_classes)
    if target.device.type != "cuda":
        flat = target[known] * num_classes + prediction[known]
        return flat.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)
    # selecting and bincount would wait for the device: the others go to a last, unused place
    flat = (target * num_classes + prediction).where(known, num_classes**2).flatten()
    counts = flat.new_zeros(num_classes**2 + 1)
    counts.scatter_add_(0, flat, flat.new_ones(()).expand_as(flat))
    return counts[:-1].reshape(num_classes, num_classes)


def combined_score(result: dict) -> float:
    """What the final model is chosen by: the mean of IoU, F1 and kappa (those that exist)."""
    values = [result[key] for key in ("iou", "f1", "kappa") if result[key] is not None]
    return float(np.mean(values)) if values else 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, ready to predict, and what its file says about it."""

    model: nn.Module
    config: ModelConfig
    normalization: Normalization
    metadata: dict
    temperature: float = 1.0  # logits are divided by it

    @property
    def class_names(self) -> list[str]:
        return self.metadata.get("class_names") or default_class_names(
            self.config.num_classes
        )

    @property
    def class_codes(self) -> list[int | str]:
        """What the labels held for the classes; their numbers where the file does not say."""
        return self.metadata.get("class_codes") or list(
            range(self.config.label_classes)
        )

    @property
    def class_colours(self) -> list[Colour]:
        stored = self.metadata.get("class_colors") or []
        return complete_colours(list(map(colour_of_hex, stored)), self.class_names)


def save_checkpoint(
    target: Path,
    model: nn.Module,
    config: ModelConfig,
    normalization: Normalization,
    metadata: dict,
    training_state: dict | None = None,
) -> None:
    """Write a checkpoint whole: weights and the documented ``metadata``, plain numbers only.

    Args:
        target: The ``.pth`` to write.
        model: As ``build_model`` made it.
        config: What rebuilds it.
        normalization: What its input needs.
        metadata: Further keys (input_size, class_names, training_params, performance_metrics...).
        training_state: What a run needs to resume from here.
    """
    more = {"training_state": training_state} if training_state else {}
    state = {
        key: value.detach().cpu().contiguous()
        for key, value in model.network.state_dict().items()
    }
    content = {
        "model_state_dict": state,
        "metadata": {
            **asdict(config),
            "mode": config.mode,
            "normalization": "percentile_99",
            "normalization_statistics": {
                "rule": normalization.rule,
                "low": list(normalization.low),
                "high": list(normalization.high),
            },
            "version": VERSION,
            "weights_sha256": weights_digest(state),
            **metadata,
        },
        **more,
    }
    with atomic_write(target) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:  # torch's writer raises nothing more specific
            raise SegmentationError(
                f"{target} could not be written completely; is the disk full? free some, or write elsewhere"
            ) from error


def load_safely(path: Path):
    """``torch.load`` that runs no code; numpy scalars of earlier checkpoints are admitted."""
    dtypes = [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "u8", "?")]
    scalars = [np._core.multiarray.scalar, np.dtype, *dtypes]
    # earlier files name the function by its place in NumPy 1
    scalars.append((np._core.multiarray.scalar, "numpy.core.multiarray.scalar"))
    try:
        with torch.serialization.safe_globals(scalars):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"No checkpoint {path}") from None
    except Exception as error:  # pickle, zip and torch raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # torch then explains how to run the code of the file
        if reason.startswith("Weights only load failed"):
            reason = "it holds more than tensors and plain values"
        raise CheckpointError(
            f"{path} cannot be opened safely as a checkpoint: {reason[:100]}; give a complete file "
            "that main.py wrote"
        ) from error


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of the names and bytes of weights, which are on the CPU and contiguous."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_checkpoint(
    path: str | Path,
    device: torch.device | str = "cpu",
    described: dict[str, str | int | None] | None = None,
) -> Checkpoint:
    """Rebuild a trained model from its file alone; no code of the file runs.

    A file with the documented keys but no statistics (earlier SemanticSeg4EO, whose second version
    has ``config`` for ``metadata``) is normalized by the ``image`` rule, and so is a file of
    weights only, which opens when ``described`` gives what the file does not.

    Args:
        path: The ``.pth``.
        device: Where the model goes.
        described: What the user says about the model, by the names in ``DESCRIPTION`` of
            ``common.earlier_models``; None is left out. It completes what the file says, and must
            agree with it.

    Raises:
        CheckpointError: Missing, cut off, no checkpoint, of a newer version, not described, or
            weights or options that do not fit the description.
        OptionError: ``described`` names no known model.
    """
    given = {
        key: value for key, value in (described or {}).items() if value is not None
    }
    if "model_name" in given:
        check_model_name(given["model_name"])
    state, stored = _read_checkpoint(Path(path))
    try:
        metadata = complete_description(path, stored, given)
        config = _read_config(path, metadata, state)
        check_options(path, config, given)
        normalization = _read_normalization(path, metadata, config)
        temperature = stored_temperature(path, metadata)
        metadata["class_names"] = stored_class_names(path, metadata, config)
        metadata["class_codes"] = stored_class_codes(path, metadata, config)
        check_class_colours(path, metadata, config)
        model = build_model(config)
    except OptionError as error:  # about what the file says
        raise CheckpointError(f"{path}: {error}") from error
    _load_weights(path, model, config, state)
    if stored.get("weights_sha256") not in (None, weights_digest(state)):
        raise CheckpointError(
            f"{path} is damaged: its weights are not those that were written; copy or train it again"
        )
    model.to(torch.device(device)).eval()
    return Checkpoint(model, config, normalization, metadata, temperature)


def _read_checkpoint(path: Path) -> tuple[dict, dict]:
    """The weights in a file, and what it says of them; nothing where it holds weights only."""
    content = load_safely(path)
    content = content if isinstance(content, dict) else {}
    state = stored_weights(content)
    whole = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor)
        for key, value in state.items()
    )
    if not state or not whole:
        raise CheckpointError(
            f"{path} has no model_state_dict with metadata; expected a file written by main.py"
        )
    return state, stored_description(path, content)


def _read_config(path, metadata: dict, state: dict) -> ModelConfig:
    mode = metadata.get("mode")
    if mode not in (None, "binary", "multiclass"):
        raise CheckpointError(f"{path} is of mode {mode!r}: not known")
    try:
        num_classes = int(metadata["num_classes"])
        if mode == "binary" and not _ends_in_two(state, num_classes):
            num_classes = 1
        in_channels = int(metadata["in_channels"])
        if min(num_classes, in_channels) < 1:
            raise ValueError(f"{in_channels} bands and {num_classes} classes")
        return ModelConfig(
            model_name=metadata["model_name"],
            in_channels=in_channels,
            num_classes=num_classes,
            encoder_name=metadata.get("encoder_name"),
            dropout_rate=float(metadata.get("dropout_rate", ModelConfig.dropout_rate)),
            encoder_depth=int(metadata.get("encoder_depth", ModelConfig.encoder_depth)),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a wrong description: {error}") from error


def _ends_in_two(state: dict, num_classes: int) -> bool:
    """Whether a binary model of two classes has a channel for each: then it ends in a softmax."""
    return num_classes == 2 and next(reversed(state.values())).shape[:1] == (2,)


def _read_normalization(path, metadata: dict, config: ModelConfig) -> Normalization:
    stored = metadata.get("normalization_statistics") or {"rule": "image"}
    try:
        normalization = Normalization(
            stored["rule"], tuple(stored.get("low", ())), tuple(stored.get("high", ()))
        )
    except KeyError as error:
        raise CheckpointError(f"{path} does not say its {error}") from error
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a wrong description: {error}") from error
    _check_statistics(path, normalization, config)
    return normalization


def _check_statistics(path, normalization: Normalization, config: ModelConfig) -> None:
    if normalization.rule not in ("dataset", "image"):
        raise CheckpointError(
            f"{path} normalizes by {normalization.rule!r}: not known; update, or train it again"
        )
    if normalization.rule == "image":
        return
    for values in (normalization.low, normalization.high):
        if len(values) != config.in_channels:
            raise CheckpointError(
                f"{path} has statistics of {len(values)} bands for a model of "
                f"{config.in_channels}; train it again"
            )
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{path} has statistics that are not numbers; train it again"
            )


def _load_weights(path, model: nn.Module, config: ModelConfig, state: dict) -> None:
    try:
        model.network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip().rstrip(".")[:200]
        encoder = f" with {config.encoder_name}" if config.encoder_name else ""
        raise CheckpointError(
            f"The weights in {path} are not those of {config.model_name}{encoder}: {detail}; the "
            "file's description, or the options in its place, say something else"
        ) from error
    if not all(value.isfinite().all() for value in state.values()):
        raise CheckpointError(
            f"{path} holds weights that are not numbers; train it again"
        )
