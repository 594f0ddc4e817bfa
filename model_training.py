"""Tensors: from patches to a trained model and back from its checkpoint.

Contents, in order: settings, normalization, patches, augmentation, models, losses, metrics,
assessment, checkpoints, inference, processes, training, folds, experiments (split, k-fold),
looking ahead, reports.

Conventions: images (C, H, W) as rasterio reads them, masks (H, W) int64 with ``ignore_index``
where unlabelled, models return logits (N, K, H, W). A binary model has K = 1 and a sigmoid, a
multiclass one K classes and a softmax; scores of a binary model count two classes, background
and foreground.

torch and the libraries on top of it take seconds to import, so each function imports what it
needs: the settings, the list of models and every check of files answer at once.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import functools
import hashlib
import logging
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import rasters
from rasters import DatasetError, OptionError, SegmentationError, require, setting

if TYPE_CHECKING:
    import torch
    from geopandas import GeoSeries
    from torch import Tensor, nn

log = logging.getLogger("semanticseg4eo")


class CheckpointError(SegmentationError, ValueError):
    """A checkpoint that cannot be read, or that contradicts the data or the options."""


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """What rebuilds a network: all that prediction needs to know beside the weights."""

    model_name: str
    in_channels: int
    num_classes: int  # output channels: 1 when binary
    encoder_name: str | None = "resnet34"
    dropout_rate: float = 0.3  # unet-dropout only

    @property
    def mode(self) -> str:
        return "binary" if self.num_classes == 1 else "multiclass"

    @property
    def label_classes(self) -> int:
        """Classes that a label or a map can hold: two when binary."""
        return max(2, self.num_classes)


AUGMENTATIONS = ("none", "symmetries", "full")


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a training run; ``main.py`` makes its options from these fields."""

    dataset_root: str = setting(help="folder that extraction wrote", group="data")
    model: str = setting(help="architecture (see --list_models)", group="model")
    mode: str = setting(
        "binary",
        "one foreground class against background, or several classes",
        "data",
        choices=("binary", "multiclass"),
    )
    classes: int = setting(
        2, "number of classes, for multiclass", "data", alias="--num_classes"
    )
    class_names: str | None = setting(
        None,
        "names in class order, separated by commas",
        "data",
        shown="those stored by the extraction, else class 0, class 1...",
    )
    ignore_index: int = setting(
        rasters.UNLABELLED, "label value that means unlabelled", "data"
    )
    in_channels: int | None = setting(
        None, "bands that the patches must have", "data", shown="the bands of the data"
    )
    normalization: str = setting(
        "dataset",
        "scale by the training split's percentiles per band, or each patch by its own joint one",
        "data",
        choices=("dataset", "image"),
    )
    data_augmentation: str = setting(
        "symmetries",
        "turn and mirror the training patches, or none, or full (the option alone): vary their "
        "brightness and contrast, noise and bands too",
        "data",
        choices=AUGMENTATIONS,
        nargs="?",
        const="full",
    )
    num_workers: str = setting(
        "auto",
        "processes that prepare batches ahead; auto is none where patches are in memory and the "
        "CPU trains",
        "data",
    )
    cache: str = setting(
        "auto",
        "keep decoded patches in memory: as many as fit in a quarter of what is free, all, or none",
        "data",
        choices=("auto", "ram", "off"),
    )
    encoder_name: str = setting(
        ModelConfig.encoder_name, "encoder (see --list_encoders)", "model"
    )
    pretrained: bool = setting(False, "start from the library's weights", "model")
    encoder_weights: str | None = setting(
        None,
        "which pretrained weights: a name (imagenet, ssl...) or a file of encoder weights",
        "model",
        shown="none; imagenet with --pretrained",
    )
    rgb_bands: str | None = setting(
        None,
        "bands that get the red, green and blue kernels of pretrained weights, as 4,3,2",
        "model",
        shown="found from the band descriptions",
    )
    dropout_rate: float = setting(
        ModelConfig.dropout_rate, "dropout of unet-dropout, 0 to 1", "model"
    )
    epochs: int = setting(100, "passes over the training patches", "training")
    batch_size: int = setting(4, "patches per batch, and process", "training")
    accumulate: int = setting(1, "batches per step of the weights", "training")
    amp: str = setting(
        "auto",
        "autocast while training; auto is what the hardware computes natively",
        "training",
        choices=("auto", "off", "bf16", "fp16"),
    )
    learning_rate: float = setting(1e-3, "initial step size of AdamW", "training")
    weight_decay: float = setting(1e-4, "weight decay of AdamW", "training")
    scheduler: str = setting(
        "cosine",
        "how the learning rate falls",
        "training",
        choices=("cosine", "plateau", "onecycle", "none"),
    )
    warmup_epochs: int = setting(
        0, "first epochs in which the learning rate rises to its value", "training"
    )
    freeze_encoder_epochs: int = setting(
        0, "first epochs in which the encoder stays as it is", "training"
    )
    clip_grad: float = setting(
        0.0, "largest norm of the gradients of a step; 0 is no limit", "training"
    )
    patience: int = setting(
        20,
        "epochs without a better combined score before stopping; 0 never",
        "training",
    )
    loss: str = setting(
        "dice+ce",
        "ce, dice, focal, tversky, jaccard, lovasz, or a weighted sum such as 0.5*dice+ce "
        "(ce is binary cross-entropy in binary mode)",
        "training",
    )
    use_class_weights: bool = setting(
        False, "weigh the cross-entropy by inverse class frequency", "training"
    )
    val_strategy: str = setting(
        "split",
        "validate on validation/, or cross-validate over train/ and validation/",
        "training",
        choices=("split", "kfold"),
    )
    n_splits: int = setting(5, "folds of kfold", "training")
    fold_by: str = setting(
        "random",
        "draw the folds of kfold patch by patch, in square blocks, or as one upright strip of the "
        "area each; both trains random and block, and tells how much too good random is",
        "training",
        choices=("random", "block", "column", "both"),
    )
    block_size: float | None = setting(
        None, "side of a block in metres", "training", shown="four patches"
    )
    buffer: float = setting(
        0.0,
        "metres; patches nearer than that to a fold of blocks or strips do not train for it",
        "training",
    )
    seed: int = setting(42, "seed of every random choice", "training")
    device: str | None = setting(
        None,
        "cpu, cuda, cuda:1...",
        "training",
        shown="cuda where there is one, else cpu",
    )
    no_calibration: bool = setting(
        False,
        "fit no temperature on the validation split: probabilities stay as the network gives them",
        "output",
    )
    area_estimation: bool = setting(
        False,
        "estimate the area of each class from the map of all patches and the errors in the test "
        "split, with 95 %% intervals",
        "output",
    )
    save_dir: str = setting("trained_models", "folder for models and reports", "output")
    resume: bool = setting(
        False,
        "go on with the run in --save_dir, from its last whole epoch to the same models",
        "output",
    )

    def __post_init__(self):
        check_model_name(self.model)
        self._require_data()
        self._require_folds()
        self._require_training()
        self._require_model()

    def _require_data(self) -> None:
        kind = self.data_augmentation
        expected = ", ".join(AUGMENTATIONS)
        require(kind in AUGMENTATIONS, "--data_augmentation", kind, expected)
        require(2 <= self.classes <= 65535, "--classes", self.classes, "2 to 65535")
        require(
            self.mode == "multiclass" or self.classes == 2,
            "--classes",
            self.classes,
            "2 with --mode binary; --mode multiclass takes more",
        )
        if self.class_names:
            names = len(self.class_names.split(","))
            expected = f"{self.label_classes} names"
            require(
                names == self.label_classes, "--class_names", self.class_names, expected
            )
        require(
            not 0 <= self.ignore_index < self.label_classes,
            "--ignore_index",
            self.ignore_index,
            f"a value outside the classes 0..{self.label_classes - 1}",
        )
        bands = self.in_channels
        fine = bands is None or 1 <= bands <= 65535
        require(fine, "--in_channels", bands, "1 to 65535")
        fine = rasters.number_or_auto(self.num_workers, 0, 1024)
        require(fine, "--num_workers", self.num_workers, "0 to 1024, or auto")

    def _require_folds(self) -> None:
        require(self.n_splits >= 2, "--n_splits", self.n_splits, "at least 2")
        fine = self.fold_by == "random" or self.val_strategy == "kfold"
        require(fine, "--fold_by", self.fold_by, "--val_strategy kfold with it")
        size, spatial = self.block_size, self.fold_by != "random"
        fine = size is None or 1e-3 <= size < math.inf
        require(fine, "--block_size", size, "more than 0 metres, at least 0.001")
        fine = 0 <= self.buffer < math.inf
        require(fine, "--buffer", self.buffer, "0 metres or more")
        wanted = "--val_strategy kfold and --fold_by block, column or both with it"
        require(size is None or spatial, "--block_size", size, wanted)
        require(not self.buffer or spatial, "--buffer", self.buffer, wanted)

    def _require_training(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            require(value >= 1, f"--{name}", value, "at least 1")
        for name in ("patience", "warmup_epochs", "freeze_encoder_epochs", "clip_grad"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--{name}", value, "0 or more")
        for name in ("warmup_epochs", "freeze_encoder_epochs"):
            value = getattr(self, name)
            fewer = f"fewer than --epochs {self.epochs}"
            require(value < self.epochs, f"--{name}", value, fewer)
        require(
            not self.warmup_epochs or self.scheduler != "onecycle",
            "--warmup_epochs",
            self.warmup_epochs,
            "another --scheduler: onecycle has a rise of its own",
        )
        require(0 <= self.seed < 2**32, "--seed", self.seed, "0 to 2^32 - 1")
        rate, decay = self.learning_rate, self.weight_decay
        require(0 < rate < math.inf, "--learning_rate", rate, "more than 0")
        require(0 <= decay < math.inf, "--weight_decay", decay, "0 or more")
        terms = parse_loss(self.loss)
        require(
            not self.use_class_weights or "ce" in terms,
            "--use_class_weights with --loss",
            self.loss,
            "a loss with a ce term, which is what the weights act on",
        )

    def _require_model(self) -> None:
        entry = MODELS[self.model]
        require(
            not self.freeze_encoder_epochs or entry.has_encoder or entry.fixed_encoder,
            "--freeze_encoder_epochs",
            self.freeze_encoder_epochs,
            f"a model with an encoder, which {self.model} has not",
        )
        require(
            0 <= self.dropout_rate < 1, "--dropout_rate", self.dropout_rate, "0 to 1"
        )
        require(
            not entry.has_encoder or self.dropout_rate == ModelConfig.dropout_rate,
            "--dropout_rate",
            self.dropout_rate,
            f"unet-dropout with it, since {self.model} does not use it",
        )
        require(
            not self.weights or self.model != "unet-dropout",
            "--pretrained with --model",
            self.model,
            "another model: this one has no pretrained weights",
        )
        require(
            bool(self.weights) or not self.rgb_bands,
            "--rgb_bands",
            self.rgb_bands,
            "--pretrained or --encoder_weights with it",
        )

    @property
    def label_classes(self) -> int:
        return self.classes if self.mode == "multiclass" else 2

    @property
    def weights(self) -> str | None:
        """The pretrained weights to start from, or None."""
        return self.encoder_weights or ("imagenet" if self.pretrained else None)

    def model_config(self, in_channels: int) -> ModelConfig:
        outputs = self.classes if self.mode == "multiclass" else 1
        encoder = MODELS[self.model].fixed_encoder
        if MODELS[self.model].has_encoder:
            encoder = self.encoder_name
        elif self.encoder_name not in (ModelConfig.encoder_name, encoder):
            raise OptionError(
                f"--encoder_name {self.encoder_name}: {self.model} has no exchangeable encoder"
            )
        return ModelConfig(self.model, in_channels, outputs, encoder, self.dropout_rate)


# --- normalization --------------------------------------------------------------------------

SAMPLE_VALUES = (
    2**24
)  # values kept for the percentiles of the training split, all bands


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
    import torch

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
    import torch

    with torch.inference_mode(False):  # they are used outside of it too
        low, high = (
            torch.tensor(values, dtype=torch.float32, device=device)
            for values in (low, high)
        )
        return low, torch.where(high > low, high - low, 1.0)


def joint_percentiles(image: Tensor, valid: Tensor | None) -> Tensor:
    """The 99th percentile of all bands of each image together, (..., 1, 1, 1); 1 if not positive."""
    import torch

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


# --- patches --------------------------------------------------------------------------------


class Patch(NamedTuple):
    """A decoded pair of files."""

    image: np.ndarray  # (C, H, W) in the file's dtype
    valid: np.ndarray  # (H, W) bool
    mask: np.ndarray  # (H, W) of the smallest dtype that holds it

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.valid.nbytes + self.mask.nbytes


class Cache:
    """Decides which decoded patches stay in memory: the first that fit in ``limit`` bytes."""

    def __init__(self, limit: float, whole: bool = False):
        self.left, self.whole = limit, whole

    def keep(self, image, valid, mask) -> Patch | None:
        """The patch as it is kept, or None.

        Raises:
            DatasetError: It does not fit, and the cache must be ``whole``.
        """
        kinds = map(np.min_scalar_type, (mask.min(), mask.max()))
        patch = Patch(image, valid, mask.astype(np.result_type(*kinds)))
        if patch.nbytes <= self.left:
            self.left -= patch.nbytes
            return patch
        if self.whole:
            raise DatasetError(
                "The patches do not fit in memory; leave --cache ram out, or take --cache off"
            )
        self.left = 0
        return None


def open_cache(config: TrainingConfig) -> Cache:
    """The cache of a run, for the share of the memory that is this process's."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = rasters.free_memory() / processes
    share = {"auto": 0.25, "ram": 0.8, "off": 0}[config.cache]
    return Cache(share * free, whole=config.cache == "ram")


@dataclass(frozen=True)
class Survey:
    """What one reading of a list of patches tells; ``subset`` gives the same for some of them."""

    pairs: list[rasters.PatchPair]
    counts: np.ndarray  # (patches, classes) int64: labelled pixels
    samples: list[np.ndarray]  # per patch (M, C): valid pixels, thinned at random
    shape: tuple[int, int, int]  # (C, H, W)
    descriptions: tuple[str | None, ...]
    class_names: list[str] | None
    decoded: list[Patch | None]  # those that stay in memory

    def subset(self, indices: Iterable[int]) -> Survey:
        chosen = list(indices)
        return replace(
            self,
            pairs=[self.pairs[i] for i in chosen],
            counts=self.counts[chosen],
            samples=[self.samples[i] for i in chosen],
            decoded=[self.decoded[i] for i in chosen],
        )

    def __add__(self, other: Survey) -> Survey:
        return replace(
            self,
            pairs=self.pairs + other.pairs,
            counts=np.concatenate([self.counts, other.counts]),
            samples=self.samples + other.samples,
            decoded=self.decoded + other.decoded,
        )


def survey_patches(
    pairs: Sequence[rasters.PatchPair],
    num_classes: int,
    ignore_index: int,
    like: Survey | None = None,
    cache: Cache | None = None,
    faults: list[str] | None = None,
) -> Survey | None:
    """Read every patch once: check it, count its classes, sample its pixels, keep it if it fits.

    Args:
        pairs: Patches of one split.
        num_classes: Classes that labels may hold, 0..num_classes-1.
        ignore_index: The other value that they may hold.
        like: A survey whose size, bands and band order these patches must have too.
        cache: What decides which of them stay in memory; None for none.
        faults: Where to note patches that cannot be used, and go on without them; None to stop at
            the first.

    Returns:
        The survey; None where no patch can be used.

    Raises:
        SegmentationError: See ``read_like``.
    """
    from tqdm import tqdm

    good, counts, samples, decoded = [], [], [], []
    rng, cache = np.random.default_rng(0), cache or Cache(0)
    first = like
    for pair in tqdm(
        pairs, desc="reading patches", unit="patch", leave=False, disable=None
    ):
        try:
            (image, valid, mask), first = read_like(
                first, pair, num_classes, ignore_index
            )
        except (SegmentationError, OSError) as error:
            if faults is None:
                raise
            faults.append(str(error))
            continue
        good.append(pair)
        known = (mask >= 0) & (mask < num_classes)
        counts.append(np.bincount(mask[known], minlength=num_classes))
        pixels = image[:, valid].T
        # one share for all patches, so that each pixel of the split weighs alike
        share = SAMPLE_VALUES / (len(pairs) * image.size)
        kept = rng.random(len(pixels)) < share if share < 1 else slice(None)
        samples.append(pixels[kept].copy())
        decoded.append(cache.keep(image, valid, mask))
    if not good:
        return None
    return replace(
        first, pairs=good, counts=np.stack(counts), samples=samples, decoded=decoded
    )


def read_like(
    first: Survey | None, pair: rasters.PatchPair, num_classes: int, ignore_index: int
) -> tuple[tuple, Survey]:
    """Read a patch that must be like the first of a survey; it, and the survey's beginning.

    Raises:
        DatasetError: It is unreadable, of another size or with other bands than the first, or its
            label holds a value that is no class.
    """
    patch = image, _, mask = rasters.read_patch(pair, ignore_index)
    described = band_descriptions(pair.image)
    if first is None:
        with rasters.open_raster(pair.label) as file:
            names = rasters.class_names_of(file)
        first = Survey([], np.empty(0), [], image.shape, described, names, [])
    if image.shape != first.shape:
        raise DatasetError(
            f"{pair.image} has (bands, height, width) {image.shape}, but other patches have "
            f"{first.shape}; all patches need one size and the same bands"
        )
    if all(described) and all(first.descriptions) and described != first.descriptions:
        raise DatasetError(
            f"The bands of {pair.image} are {', '.join(described)}, but other patches have "
            f"{', '.join(first.descriptions)}"
        )
    known = (mask >= 0) & (mask < num_classes)
    strange = np.unique(mask[~known & (mask != ignore_index)])
    if strange.size:
        raise DatasetError(
            f"{pair.label} holds {', '.join(map(str, strange[:8]))}: labels are 0.."
            f"{num_classes - 1}, or {ignore_index} for unlabelled (see --classes, "
            "--ignore_index, and --label_values of the extraction)"
        )
    return patch, first


def band_descriptions(image: Path) -> tuple[str | None, ...]:
    """The descriptions of a patch's bands, without alpha."""
    with rasters.open_raster(image) as file:
        return tuple(file.descriptions[b - 1] for b in rasters.image_bands(file))


class Draw(NamedTuple):
    """A patch to train on, and the how-many-eth draw of the whole run it is."""

    index: int
    turn: int


class PatchDataset:
    """Patches as network input: a map-style dataset for ``torch.utils.data.DataLoader``.

    An item is (image (C, H, W) float32 in [0, 1], mask (H, W) int64). It is asked for by index, or
    by a ``Draw``, which is varied as ``augment`` says (see ``--data_augmentation``); the variation
    depends on the seed and the draw alone, so worker processes do not change it.
    """

    def __init__(
        self,
        survey: Survey,
        normalization: Normalization,
        ignore_index: int,
        augment: str = "none",
        seed: int = 0,
    ):
        self.pairs, self.decoded = survey.pairs, survey.decoded
        self.normalization = normalization
        self.ignore_index = ignore_index
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def in_memory(self) -> bool:
        """Whether no item needs a file."""
        return None not in self.decoded

    def __getitem__(self, item: int | Draw) -> tuple[np.ndarray, np.ndarray]:
        index, turn = item if isinstance(item, Draw) else (item, None)
        image, valid, mask = self.decoded[index] or rasters.read_patch(
            self.pairs[index], self.ignore_index
        )
        image = normalize(image, valid, self.normalization).numpy()
        if self.augment != "none" and turn is not None:
            rng = np.random.default_rng([self.seed, turn])
            image, valid, mask = turn_patch(image, valid, mask, rng)
            if self.augment == "full":
                image = vary_radiometry(image, valid, rng)
            image, mask = map(np.ascontiguousarray, (image, mask))
        return image, mask.astype(np.int64, copy=False)


class Shuffle:
    """Batches of ``Draw`` in an order that depends on seed and epoch alone.

    Each process gets its part of every batch. A last patch that would be alone in its batch is left
    out, since normalization layers after global pooling cannot train on it, and so is what cannot be
    shared evenly among the processes.
    """

    def __init__(self, count: int, batch_size: int, seed: int, team: Team):
        self.count, self.seed, self.team = count, seed, team
        self.whole = batch_size * team.size  # a batch of all processes
        rest = count % self.whole
        left_out = rest % team.size
        if rest == 1 and count > self.whole > 1:
            left_out = 1
        self.used = count - left_out
        self.epoch = 1

    def __len__(self) -> int:
        return math.ceil(self.used / self.whole)

    def __iter__(self) -> Iterator[list[Draw]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        before = self.epoch * self.count
        draws = [Draw(int(i), before + turn) for turn, i in enumerate(order)]
        for start in range(0, self.used, self.whole):
            batch = draws[start : min(start + self.whole, self.used)]
            yield batch[self.team.rank :: self.team.size]


# --- augmentation ---------------------------------------------------------------------------


def turn_patch(image, valid, mask, rng: np.random.Generator):
    """A symmetry of the square, since a scene seen from above has no upright.

    Patches that are not square keep their shape (four symmetries).

    Args:
        image: (C, H, W).
        valid: (H, W).
        mask: (H, W).
        rng: The source of all choices.

    Returns:
        The three as views, turned by quarters and mirrored.
    """
    quarter = 1 if mask.shape[0] == mask.shape[1] else 2
    turns, flip = quarter * int(rng.integers(4)), bool(rng.integers(2))

    def turn(array):
        array = np.rot90(array, turns, axes=(-2, -1))
        return array[..., ::-1] if flip else array

    return turn(image), turn(valid), turn(mask)


def vary_radiometry(image, valid, rng: np.random.Generator) -> np.ndarray:
    """Vary the values of a normalized patch, (C, H, W) float32 in [0, 1], as another day would.

    Brightness and contrast change alike in all bands, as haze and sun do; noise and band dropout
    do not. Pixels where ``valid`` (H, W) is False stay 0.
    """
    if rng.random() < 0.5:
        contrast, brightness = rng.uniform(0.85, 1.15), rng.uniform(-0.05, 0.05)
        image = (image - 0.5) * contrast + 0.5 + brightness
    if rng.random() < 0.3:
        image = image + rng.normal(0, rng.uniform(0, 0.02), image.shape)
    if len(image) > 1 and rng.random() < 0.1:
        image = image.copy()
        image[rng.integers(len(image))] = 0
    return np.where(valid, np.clip(image, 0, 1), 0).astype(np.float32)


# --- models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelEntry:
    """A registered architecture: how it is built and what input it needs."""

    build: Callable[[ModelConfig, str | None], nn.Module]
    multiple: int = 32  # input sides are padded to a multiple of this
    least: int = 0  # and to at least this
    has_encoder: bool = True
    fixed_encoder: str | None = None


def _smp_builder(architecture: str, **options):
    def build(config: ModelConfig, weights: str | None) -> nn.Module:
        import segmentation_models_pytorch as smp

        return smp.create_model(
            architecture,
            encoder_name=config.encoder_name,
            encoder_weights=weights,
            in_channels=config.in_channels,
            classes=config.num_classes,
            **options,
        )

    return build


def _build_torchvision(config: ModelConfig, weights: str | None) -> nn.Module:
    from torch import nn
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
            conv.weight = nn.Parameter(
                spread_kernels(old.weight.detach(), config.in_channels)
            )
        network.backbone.conv1 = conv
    return network


def _build_unet_dropout(config: ModelConfig, weights: str | None) -> nn.Module:
    """A U-Net of five levels with dropout after each (Ronneberger et al. 2015; Srivastava 2014).

    Dropout drops whole feature maps, since neighbouring pixels of one map say the same.
    """
    import torch
    from torch import nn

    def block(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [
                nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers, nn.Dropout2d(config.dropout_rate))

    widths = (32, 64, 128, 256, 512)

    class UNetDropout(nn.Module):
        def __init__(self):
            super().__init__()
            inputs = (config.in_channels, *widths)
            self.down = nn.ModuleList(block(a, b) for a, b in zip(inputs, widths))
            self.pool = nn.MaxPool2d(2)
            steps = list(zip(widths[::-1], widths[-2::-1]))
            self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in steps)
            self.up = nn.ModuleList(block(2 * b, b) for _, b in steps)
            self.head = nn.Conv2d(widths[0], config.num_classes, 1)

        def forward(self, features: Tensor) -> Tensor:
            kept = []
            for level in self.down:
                features = level(features if not kept else self.pool(features))
                kept.append(features)
            for grow, up, skip in zip(self.grow, self.up, kept[-2::-1]):
                features = up(torch.cat([grow(features), skip], dim=1))
            return self.head(features)

    return UNetDropout()


MODELS = {
    "unet-dropout": ModelEntry(_build_unet_dropout, multiple=16, has_encoder=False),
    "unet": ModelEntry(_smp_builder("unet")),
    "unet++": ModelEntry(_smp_builder("unetplusplus")),
    "manet": ModelEntry(_smp_builder("manet")),
    "linknet": ModelEntry(_smp_builder("linknet")),
    "fpn": ModelEntry(_smp_builder("fpn")),
    "pspnet": ModelEntry(_smp_builder("pspnet")),
    "pan": ModelEntry(_smp_builder("pan"), least=128),  # it pools 16 x 8 times
    "deeplabv3": ModelEntry(_smp_builder("deeplabv3")),
    "deeplabv3+": ModelEntry(_smp_builder("deeplabv3plus")),
    "segformer": ModelEntry(_smp_builder("segformer")),
    "upernet": ModelEntry(_smp_builder("upernet")),
    # dpt takes vision transformers only: --encoder_name tu-vit_base_patch16_224...
    "dpt": ModelEntry(_smp_builder("dpt", dynamic_img_size=True)),
    "deeplabv3_resnet50": ModelEntry(
        _build_torchvision, multiple=1, has_encoder=False, fixed_encoder="resnet50"
    ),
}


def get_available_models() -> list[str]:
    """The names that ``--model`` takes."""
    return list(MODELS)


def get_available_encoders() -> list[str]:
    """The names that ``--encoder_name`` takes, beside timm's (``tu-`` and a name of timm's)."""
    from segmentation_models_pytorch.encoders import get_encoder_names

    return get_encoder_names()


def check_model_name(name: str) -> None:
    """Raise OptionError, with the nearest known name, unless the model is registered."""
    if name not in MODELS:
        raise rasters.unknown_name("model", name, get_available_models())


def build_model(
    config: ModelConfig,
    encoder_weights: str | None = None,
    rgb_channels: Sequence[int] | None = None,
) -> nn.Module:
    """Build a network for any input size.

    Args:
        config: What to build.
        encoder_weights: None (random), the name of weights that the library downloads, or a file.
        rgb_channels: Channels (from 0) of red, green and blue: they get the pretrained kernels
            of their colour, the others the mean of the three.

    Returns:
        A module from (N, C, H, W) float32 to logits (N, K, H, W). Its ``network`` is the library's
        own module, whose state dictionary is what checkpoints hold.

    Raises:
        OptionError: Unknown names, or an encoder that the decoder cannot use.
        SegmentationError: Weights that cannot be had.
    """
    from torch import nn
    from torch.nn import functional

    check_architecture(config, encoder_weights)
    entry = MODELS[config.model_name]
    file = None
    if _is_weights_file(encoder_weights):
        file, encoder_weights = Path(encoder_weights), None
    try:
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # where libraries tell of downloads
            network = entry.build(config, encoder_weights)
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
    spread = load_encoder(network, file, config) if file else bool(encoder_weights)
    if spread and rgb_channels:
        _align_first_kernels(network, config.in_channels, rgb_channels)

    class AnySize(nn.Module):
        """Pads the input to what the network takes, and crops its logits."""

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Tensor:
            height, width = images.shape[-2:]
            below, right = (
                max(entry.least, math.ceil(side / entry.multiple) * entry.multiple)
                - side
                for side in (height, width)
            )
            if below or right:
                images = functional.pad(images, (0, right, 0, below), mode="replicate")
            logits = self.network(images)
            if isinstance(logits, dict):  # TorchVision
                logits = logits["out"]
            return logits[..., :height, :width]

    model = AnySize()
    if (config.encoder_name or "").startswith("tu-"):
        _try_out(model, config)
    return model


def _try_out(model: nn.Module, config: ModelConfig) -> None:
    """Raise OptionError where an encoder of timm's takes images of one size only."""
    import torch

    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, config.in_channels, 64, 96))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise OptionError(
            f"{config.model_name} with {config.encoder_name} does not take images of any size: "
            f"{error}"
        ) from error
    model.train()


def _is_weights_file(text: str | None) -> bool:
    suffixes = (".pth", ".pt", ".bin", ".safetensors")
    return bool(text) and (Path(text).is_file() or Path(text).suffix in suffixes)


def check_architecture(config: ModelConfig, encoder_weights: str | None = None) -> None:
    """Raise OptionError unless model, encoder and weights are known and go together."""
    check_model_name(config.model_name)
    name = config.encoder_name
    if not MODELS[config.model_name].has_encoder:
        if encoder_weights and config.model_name == "unet-dropout":
            raise OptionError("unet-dropout has no pretrained weights")
        if not (
            encoder_weights in (None, "imagenet") or _is_weights_file(encoder_weights)
        ):
            raise rasters.unknown_name("weights", encoder_weights, ["imagenet"])
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
            raise rasters.unknown_name("encoder", name, known)
        if not (
            encoder_weights in (None, "imagenet") or _is_weights_file(encoder_weights)
        ):
            raise OptionError(
                f"--encoder_weights {encoder_weights}: {name} has its weights in its name, as "
                "tu-resnet18.a1_in1k; give imagenet, or a file"
            )
    elif name not in get_available_encoders() and not name.startswith("timm-"):
        raise rasters.unknown_name("encoder", name, get_available_encoders())


def spread_kernels(kernels: Tensor, in_channels: int) -> Tensor:
    """First-layer kernels (O, 3, h, w) of RGB weights for any number of channels.

    Repeats them by index and scales them so that the layer's output keeps its size; a single
    channel gets their sum.
    """
    if in_channels == 1:
        return kernels.sum(dim=1, keepdim=True)
    repeats = [channel % 3 for channel in range(in_channels)]
    return kernels[:, repeats] * (3 / in_channels)


def _first_conv(module: nn.Module) -> nn.Module:
    from torch import nn

    return next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))


def _align_first_kernels(
    network: nn.Module, in_channels: int, rgb_channels: Sequence[int]
):
    """Give each colour its own kernel; libraries assign kernels by index, red to channel 0."""
    if in_channels < 3:
        return
    encoder = getattr(network, "encoder", None) or network.backbone
    weight = _first_conv(encoder).weight.data  # (O, C, h, w), the RGB kernels repeated
    colours = weight[:, :3].clone()
    weight[:] = colours.mean(dim=1, keepdim=True)
    for colour, channel in enumerate(rgb_channels):
        weight[:, channel] = colours[:, colour]


# what classifiers have behind their encoder
HEADS = (
    "fc.", "classifier.", "head.", "last_linear.", "conv_head.", "bn2.", "norm_head.", "norm.",
    "features.norm5.", "_conv_head.", "_bn1.", "_fc.", "last_layer.",
)  # fmt: skip


def load_encoder(network: nn.Module, file: Path, config: ModelConfig) -> bool:
    """Load encoder weights from a local file (.pth, .pt, .bin or .safetensors), strictly.

    A classifier head in the file is left out; RGB weights are spread over other band counts.

    Returns:
        Whether the weights are for three bands.

    Raises:
        SegmentationError: Not such a file, or the weights of another encoder.
    """
    from torch import nn

    state = _read_state(file)
    encoder = getattr(network, "encoder", None) or network.backbone
    own = encoder.state_dict()
    # timm's encoders write "stages_0" within "model" for what their files call "stages.0"
    plain = {key.removeprefix("model.").replace(".", "_"): key for key in own}
    renamed = {
        plain.get(key.removeprefix("model.").replace(".", "_"), key): value
        for key, value in state.items()
    }
    state = {k: v for k, v in renamed.items() if k in own or not k.startswith(HEADS)}
    first = next(key for key, value in own.items() if value.ndim == 4)
    rgb = first in state and state[first].ndim == 4 and state[first].shape[1] == 3
    if rgb and config.in_channels != 3:
        state[first] = spread_kernels(state[first], config.in_channels)
    try:
        # the base class's, since encoders override it to be lenient
        nn.Module.load_state_dict(encoder, state, strict=True)
    except RuntimeError as error:
        raise SegmentationError(
            f"{file} does not hold the weights of {config.encoder_name}: "
            f"{str(error).splitlines()[1].strip()[:200]}"
        ) from error
    return rgb


def _read_state(file: Path) -> dict:
    import torch
    from safetensors import SafetensorError

    if not file.is_file():
        raise SegmentationError(f"No weights file {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = dict(_load_safely(file))
    except (SafetensorError, CheckpointError, ValueError, TypeError) as error:
        raise SegmentationError(f"{file} is no file of weights: {error}") from error
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise SegmentationError(
            f"{file} is no file of weights: not all of it is tensors"
        )
    return state


def pick_device(name: str | None) -> torch.device:
    """The device of a ``--device`` text; without one, the GPU where there is one.

    Raises:
        SegmentationError: A GPU is asked for and there is none.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            log.info("no GPU found: running on the CPU")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name}: expected cpu, cuda or cuda:N") from error
    gpus = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise SegmentationError(
            f"--device {name}: this machine has {gpus} GPUs; use --device cpu"
        )
    # with its number: PyTorch cannot make a GPU without one the present one
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most, of a GPU or else of main memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return rasters.peak_memory()


# --- losses ---------------------------------------------------------------------------------

LOSS_NAMES = ("ce", "dice", "focal", "tversky", "jaccard", "lovasz")


def parse_loss(text: str) -> dict[str, float]:
    """The terms of ``--loss`` with their weights: "0.5*dice+ce" is {"dice": 0.5, "ce": 1}.

    Raises:
        OptionError: An unknown name, or a weight that is not a positive number.
    """
    terms: dict[str, float] = {}
    for term in text.lower().replace(" ", "").split("+"):
        weight, _, name = term.rpartition("*")
        name = "ce" if name == "bce" else name
        if name not in LOSS_NAMES:
            raise rasters.unknown_name("loss", name, LOSS_NAMES)
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        require(
            math.isfinite(value) and value > 0, "--loss", text, "weights more than 0"
        )
        terms[name] = terms.get(name, 0.0) + value
    return terms


def build_loss(
    text: str, mode: str, ignore_index: int, class_weights: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from (logits (N, K, H, W), mask (N, H, W)) to a scalar.

    Unlabelled pixels are taken out before any term is computed, so every loss honours them; a
    batch without a labelled pixel gives 0 with a gradient of 0. Terms are those of
    segmentation-models-pytorch: Dice, Jaccard, Tversky (false positives 0.3, false negatives
    0.7: Salehi et al. 2017), Lovasz (Berman et al. 2018) and focal (gamma 2: Lin et al. 2017)
    over all labelled pixels of the batch.

    Args:
        text: As ``parse_loss`` reads it.
        mode: "binary" or "multiclass".
        ignore_index: Mask value of unlabelled pixels.
        class_weights: (classes,) float, for the cross-entropy term alone.
    """
    from segmentation_models_pytorch import losses
    from torch.nn import functional

    binary = mode == "binary"

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        weights = class_weights.to(logits) if class_weights is not None else None
        if binary:
            truth = target[:, None].to(logits.dtype)
            loss = functional.binary_cross_entropy_with_logits(
                logits, truth, reduction="none"
            )[:, 0]
        else:
            loss = functional.cross_entropy(logits, target, reduction="none")
        if weights is None:
            return loss.mean()
        weight = weights[target]  # may be 0 everywhere: classes that training lacks
        return (loss * weight).sum() / weight.sum().clamp_min(1e-12)

    terms = {
        "ce": cross_entropy,
        "dice": losses.DiceLoss(mode),
        "focal": losses.FocalLoss(mode),
        "tversky": losses.TverskyLoss(mode, alpha=0.3, beta=0.7),
        "jaccard": losses.JaccardLoss(mode),
        "lovasz": losses.LovaszLoss(mode),
    }
    chosen = [(weight, terms[name]) for name, weight in parse_loss(text).items()]

    def loss(logits: Tensor, mask: Tensor) -> Tensor:
        logits, target = logits.float(), mask
        places = (mask.flatten() != ignore_index).nonzero()[:, 0]
        if len(places) == 0:
            return logits.sum() * 0
        if len(places) < mask.numel():
            # (N, K, H, W) -> (1, K, M, 1): the labelled pixels as one tall picture
            pixels = logits.movedim(1, -1).flatten(0, 2).index_select(0, places)
            logits = pixels.T.contiguous()[None, ..., None]
            target = mask.flatten()[places][None, :, None]
        return sum(weight * term(logits, target) for weight, term in chosen)

    return loss


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """Class weights n / (classes * n_class), mean 1 over pixels; absent classes get 0.

    The "balanced" rule of scikit-learn (King and Zeng 2001), over labelled pixels (classes,).
    """
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


# --- metrics --------------------------------------------------------------------------------


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
    if target.device.type == "cpu":
        flat = target[known] * num_classes + prediction[known]
        return flat.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)
    # selecting and bincount would wait for the device: the others go to a last, unused place
    flat = (target * num_classes + prediction).where(known, num_classes**2).flatten()
    counts = flat.new_zeros(num_classes**2 + 1)
    counts.scatter_add_(0, flat, flat.new_ones(()).expand_as(flat))
    return counts[:-1].reshape(num_classes, num_classes)


def scores(matrix: np.ndarray, names: Sequence[str], binary: bool) -> dict:
    """Accuracy measures of a confusion matrix, as plain numbers for JSON.

    Recall is the producer's accuracy, precision the user's. A class that is absent from both
    truth and prediction has no score (None), and means are over the others; one that is present
    only in the prediction scores 0. ``iou`` and ``f1`` are what models are chosen by: those of
    the foreground when ``binary``, else the means.

    Args:
        matrix: (K, K) counts, rows are truth.
        names: K class names.
        binary: The second class is the foreground.
    """
    matrix = np.asarray(matrix, np.float64)
    hits, truth, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    total = matrix.sum()

    def ratio(part, whole):
        return np.divide(part, whole, out=np.full(len(hits), np.nan), where=whole > 0)

    present = truth + predicted > 0
    measures = {
        "iou": ratio(hits, truth + predicted - hits),
        "f1": ratio(2 * hits, truth + predicted),
        "precision": np.where(present, np.nan_to_num(ratio(hits, predicted)), np.nan),
        "recall": np.where(present, np.nan_to_num(ratio(hits, truth)), np.nan),
    }

    def plain(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    means = {
        f"mean_{key}": plain(values[present].mean() if present.any() else np.nan)
        for key, values in measures.items()
    }
    accuracy = hits.sum() / total if total else np.nan
    chance = (truth * predicted).sum() / total**2 if total else np.nan
    kappa = (accuracy - chance) / (1 - chance) if total and chance < 1 else np.nan
    return {
        "iou": plain(measures["iou"][1]) if binary else means["mean_iou"],
        "f1": plain(measures["f1"][1]) if binary else means["mean_f1"],
        **means,
        "overall_accuracy": plain(accuracy),
        "kappa": plain(kappa),
        "per_class": [
            {"name": name, "pixels": int(truth[i])}
            | {key: plain(values[i]) for key, values in measures.items()}
            for i, name in enumerate(names)
        ],
        "confusion_matrix": matrix.astype(int).tolist(),
    }


# the scores that are told of every epoch and, over folds, with an interval
HEADLINES = ("iou", "f1", "mean_iou", "mean_f1", "overall_accuracy", "kappa")


def combined_score(result: dict) -> float:
    """What the final model is chosen by: the mean of IoU, F1 and kappa (those that exist)."""
    values = [result[key] for key in ("iou", "f1", "kappa") if result[key] is not None]
    return float(np.mean(values)) if values else 0.0


# --- assessment -----------------------------------------------------------------------------

Z_95 = 1.96  # half a 95 % interval in standard errors
TEMPERATURES = (0.05, 20.0)  # where the fit looks


def estimate_areas(
    matrix: np.ndarray, map_pixels: np.ndarray, pixel_area: float | None = None
) -> dict:
    """Areas and accuracies of a map, corrected for its errors, with 95 % intervals.

    The stratified estimator of Olofsson et al. 2014 (Remote Sensing of Environment 148, 42-57,
    equations 1-11): the classes of the map are the strata, and the matrix tells what a sample of
    each really is. It needs a sample of ground that the model was not trained on.

    The intervals of the paper hold for pixels drawn one by one. Pixels of a patch are right or
    wrong together, so a matrix per patch gives the same values and the errors of a sample of
    patches, which are many times as large.

    A class that the map lacks has the weight 0; its area is what other classes hide. A mapped
    class without a sample has no estimate, and its ground is left out of all others, which are
    of ``assessed_share`` of the map. A class that is nowhere the truth has no producer's
    accuracy. Errors that depend on a mapped class with a single sample (or in a single patch)
    are unknown. All these are None.

    Args:
        matrix: (K, K) counts of sampled pixels, rows are truth (in the paper they are the map);
            or (P, K, K), one for each patch.
        map_pixels: (K,) pixels of each class over the whole map.
        pixel_area: Square metres of a pixel; None gives shares alone. Where pixels differ in
            area, give square metres for ``map_pixels`` and 1 here.

    Returns:
        ``overall_accuracy``, ``assessed_share`` and ``per_class``. An estimate is a dict of
        ``value``, ``standard_error`` and ``interval_95``, which ends at what is possible.
    """
    patches = np.asarray(matrix, np.float64).swapaxes(-2, -1)  # rows are the map
    counts = patches if patches.ndim == 2 else patches.sum(axis=0)
    mapped = np.asarray(map_pixels, np.float64)
    unknown = (mapped > 0) & (counts.sum(axis=1) == 0)
    assessed = np.where(unknown, 0, mapped)
    with np.errstate(divide="ignore", invalid="ignore"):  # what is undefined is NaN
        weights, mapped_share = assessed / assessed.sum(), mapped / mapped.sum()
        values = _stratified(counts, weights)
        if patches.ndim == 2:
            variances, width = _pixel_variances(counts, weights, values), Z_95
        else:
            variances = _patch_variances(patches, weights, values)
            width = _student(len(patches))
    for name in ("share", "producers_accuracy"):
        values[name][unknown] = np.nan
    estimates = {
        name: [_estimate(*pair, width) for pair in zip(values[name], variances[name])]
        for name in values
    }
    (overall,) = estimates.pop("overall_accuracy")
    per_class = []
    for k in range(len(counts)):
        entry = {"class": k, "mapped_share": _plain(mapped_share[k])}
        entry |= {name: column[k] for name, column in estimates.items()}
        if pixel_area is not None:
            entry["mapped_ha"] = float(mapped[k] * pixel_area / 1e4)
            total = float(assessed.sum() * pixel_area / 1e4)
            entry["area_ha"] = _estimate_in(total, entry["share"])
        per_class.append(entry)
    return {
        "overall_accuracy": overall,
        "assessed_share": _plain(mapped_share[~unknown].sum()),
        "per_class": per_class,
    }


def _weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(..., K, K) rows times the weights of their classes; 0 where those are, even times NaN."""
    weights = weights[:, None]
    return np.where(weights == 0, 0, weights * values)


def _stratified(counts: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The measures of Olofsson et al. 2014, NaN where undefined.

    Args:
        counts: (K, K) of the sample, rows are the map.
        weights: (K,) shares of the map's classes.
    """
    rates = counts / counts.sum(axis=1, keepdims=True)
    shares = _weighted(weights, rates)  # eq. 4
    return {
        "overall_accuracy": np.trace(shares)[None],  # eq. 1
        "share": shares.sum(axis=0),  # eq. 9
        "users_accuracy": np.diag(rates).copy(),  # eq. 2
        "producers_accuracy": np.diag(shares) / shares.sum(axis=0),  # eq. 3
    }


def _pixel_variances(counts: np.ndarray, weights: np.ndarray, values: dict) -> dict:
    """Variances of the measures for pixels drawn at random within the map's classes."""
    sampled = counts.sum(axis=1, keepdims=True)
    rates, producer = counts / sampled, values["producers_accuracy"]
    variances = rates * (1 - rates) / (sampled - 1)
    spread = _weighted(weights**2, variances)
    own = np.eye(len(counts), dtype=bool)
    factor = np.where(own, (1 - producer) ** 2, producer**2)
    missed = (factor * spread).sum(axis=0)
    return {
        "overall_accuracy": np.trace(spread)[None],  # eq. 5
        "share": spread.sum(axis=0),  # eq. 10
        "users_accuracy": np.diag(variances),  # eq. 6
        "producers_accuracy": missed / values["share"] ** 2,  # eq. 7
    }


def _patch_variances(patches: np.ndarray, weights: np.ndarray, values: dict) -> dict:
    """Variances of the measures for patches drawn at random: ratios, linearized.

    Särndal, Swensson and Wretman 1992, Model assisted survey sampling, section 5.5: how far
    each patch moves a ratio stands for the patch.

    Args:
        patches: (P, K, K), rows are the map.
        weights: (K,) shares of the map's classes.
        values: The measures of all patches together.
    """
    counts = patches.sum(axis=0)
    sampled = counts.sum(axis=1, keepdims=True)
    expected = patches.sum(axis=2, keepdims=True) * counts / sampled
    moved = (patches - expected) / sampled  # (P, K, K)
    moved[:, (patches.sum(axis=2) > 0).sum(axis=0) < 2] = np.nan
    weighted = _weighted(weights, moved)
    right, share = np.diagonal(weighted, axis1=1, axis2=2), weighted.sum(axis=1)
    missed = right - values["producers_accuracy"] * share
    each = {
        "overall_accuracy": right.sum(axis=1, keepdims=True),
        "share": share,
        "users_accuracy": np.diagonal(moved, axis1=1, axis2=2),
        "producers_accuracy": missed / values["share"],
    }
    scale = len(patches) / max(len(patches) - 1, 1)
    return {name: scale * (part**2).sum(axis=0) for name, part in each.items()}


def _student(count: int) -> float:
    """Half a 95 % interval in standard errors that are known from so many patches."""
    from scipy import stats

    return float(stats.t.ppf(0.975, max(count - 1, 1)))


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _estimate(value: float, variance: float, width: float) -> dict:
    """An estimated share; NaN is what is undefined."""
    value = _plain(value)
    error = None if value is None else _plain(np.sqrt(variance))
    interval = None
    if error is not None:
        interval = [max(0.0, value - width * error), min(1.0, value + width * error)]
    return {"value": value, "standard_error": error, "interval_95": interval}


def _estimate_in(total: float, share: dict) -> dict:
    """An estimated share in the unit of the total."""
    value, error, interval = share.values()
    return {
        "value": None if value is None else value * total,
        "standard_error": None if error is None else error * total,
        "interval_95": interval and [end * total for end in interval],
    }


class Calibration:
    """Whether pixels are right as often as the model is sure of them.

    Counts per bin of confidence, so that memory does not grow with the pixels. Confidence is the
    probability of the chosen class; a binary model chooses the foreground from 0.5 on.
    """

    BINS = 15  # of equal width between 0 and 1

    def __init__(self):
        self.pixels = np.zeros(self.BINS, np.int64)
        self.hits = np.zeros(self.BINS, np.int64)
        self.confidence = np.zeros(self.BINS)  # summed

    def add(self, logits, target, temperature: float = 1.0) -> None:
        """Count more pixels.

        Args:
            logits: (N, K, ...) array or tensor.
            target: (N, ...) class ids; pixels of no class are not counted.
            temperature: What the logits are divided by; the chosen class stays.
        """
        import torch

        logits, target = torch.as_tensor(logits), torch.as_tensor(target)
        probabilities = class_probabilities(logits.float() / temperature)
        if logits.shape[1] == 1:
            probabilities = torch.cat([1 - probabilities, probabilities], dim=1)
        confidence, hits = probabilities.amax(1), predict_classes(logits) == target
        labelled = (target >= 0) & (target < probabilities.shape[1])
        confidence = confidence[labelled].cpu().numpy().astype(np.float64)
        hits = hits[labelled].cpu().numpy()
        bins = np.minimum((confidence * self.BINS).astype(np.int64), self.BINS - 1)
        self.pixels += np.bincount(bins, minlength=self.BINS)
        self.hits += np.bincount(bins[hits], minlength=self.BINS)
        self.confidence += np.bincount(bins, confidence, minlength=self.BINS)

    def report(self) -> dict:
        """Pixels, mean confidence and accuracy per bin, as plain numbers for JSON."""
        with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
            confidence = self.confidence / self.pixels
            accuracy = self.hits / self.pixels
        return {
            "expected_calibration_error": expected_calibration_error(self),
            "pixels": self.pixels.tolist(),
            "confidence": [_plain(value) for value in confidence],
            "accuracy": [_plain(value) for value in accuracy],
        }


def expected_calibration_error(calibration: Calibration) -> float | None:
    """Mean distance of confidence and accuracy over the bins, weighted by their pixels.

    Naeini et al. 2015, Guo et al. 2017. None without a pixel.
    """
    total = int(calibration.pixels.sum())
    gaps = np.abs(calibration.hits - calibration.confidence)
    return float(gaps.sum()) / total if total else None


class LogitSample:
    """Labelled pixels drawn at random from batches, each with the same chance.

    Every labelled pixel gets a random number, and those with the smallest are kept; so the
    sample depends on the seed and the order of the pixels, not on the batch size.
    """

    def __init__(self, size: int = 200_000, seed: int = 0):
        self.size = size
        self.rng = np.random.default_rng(seed)
        self.keys = np.empty(0)
        self.logits = np.empty((0, 1), np.float32)  # (M, K)
        self.target = np.empty(0, np.int64)

    def add(self, logits: Tensor, mask: Tensor) -> None:
        """Draw from a batch: logits (N, K, H, W), mask (N, H, W)."""
        import torch

        classes = max(2, logits.shape[1])
        places = ((mask >= 0) & (mask < classes)).nonzero()
        keys = self.rng.random(len(places))
        full = len(self.keys) == self.size
        kept = keys < (self.keys.max(initial=0) if full else np.inf)
        n, y, x = places[torch.from_numpy(kept).to(places.device)].T
        keys = np.concatenate([self.keys, keys[kept]])
        more = logits.detach()[n, :, y, x].float().cpu().numpy()  # (M, K)
        more = np.concatenate([self.logits.reshape(-1, more.shape[1]), more])
        target = np.concatenate([self.target, mask[n, y, x].cpu().numpy()])
        best = slice(None)
        if len(keys) > self.size:
            best = np.sort(np.argpartition(keys, self.size)[: self.size])
        self.keys, self.logits, self.target = keys[best], more[best], target[best]


def sample_logits(
    batches: Iterable[tuple[Tensor, Tensor]], size: int = 200_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """At most ``size`` labelled pixels of all batches, each with the same chance.

    Args:
        batches: Pairs of logits (N, K, H, W) and mask (N, H, W), on any device; pixels of no
            class (``ignore_index``) are not labelled.
        size: How many.
        seed: Of the draw.

    Returns:
        logits (M, K) float32 and target (M,) int64.
    """
    sample = LogitSample(size, seed)
    for logits, mask in batches:
        sample.add(logits, mask)
    return sample.logits, sample.target


def negative_log_likelihood(logits: np.ndarray, target: np.ndarray) -> float:
    """Mean over pixels of -log of the true class's probability.

    Args:
        logits: (M, K); K = 1 is the foreground alone.
        target: (M,) int64 in 0..K-1 (0..1 for K = 1).
    """
    if logits.shape[1] == 1:
        foreground = logits[:, 0]
        losses = np.logaddexp(0, foreground) - target * foreground
    else:
        shifted = logits - logits.max(axis=1, keepdims=True)
        truth = shifted[np.arange(len(target)), target]
        losses = np.log(np.exp(shifted).sum(axis=1)) - truth
    return float(losses.mean(dtype=np.float64))


def fit_temperature(logits: np.ndarray, target: np.ndarray) -> float:
    """The temperature that logits are divided by to give the likeliest probabilities.

    Temperature scaling (Guo et al. 2017, On calibration of modern neural networks): above 1 the
    model was too sure of itself. The chosen class of a pixel stays; for a binary model as long
    as its threshold is 0.5.

    Args:
        logits: (M, K) float32 of pixels that the model was not trained on; K = 1 is binary.
        target: (M,) int64, their classes.

    Returns:
        A temperature within ``TEMPERATURES``; 1 where none is better, or without pixels.
    """
    from scipy.optimize import minimize_scalar

    if len(target) == 0:
        return 1.0

    def loss(power: float) -> float:  # convex in 1 / T, so there is one minimum
        return negative_log_likelihood(logits / math.exp(power), target)

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded")
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0


def patch_accuracy(
    prediction: np.ndarray, mask: np.ndarray, num_classes: int
) -> float | None:
    """The share of a patch's labelled pixels that are right; None without any.

    What examples are ranked by, since it is what their error maps show. A mean of IoU over the
    patch's classes would call those the worst where a class has a handful of pixels.
    """
    labelled = (mask >= 0) & (mask < num_classes)
    return float((prediction == mask)[labelled].mean()) if labelled.any() else None


def worth_showing(counts: np.ndarray) -> np.ndarray:
    """Patches with at least half the labelled pixels of the median patch, (patches,) bool.

    All others would be the best and the worst by the luck of a few pixels.

    Args:
        counts: (patches, classes) labelled pixels.
    """
    labelled = counts.sum(axis=1)
    usual = np.median(labelled[labelled > 0]) if labelled.any() else 0
    return (labelled > 0) & (labelled >= usual / 2)


class Examples:
    """The worst and the best of all patches seen, with their predictions."""

    def __init__(self, each: int = 3):
        self.each = each
        self.seen = 0
        self.entries = []  # (score, PatchPair, prediction), from worst to best

    def add(self, score: float | None, pair: rasters.PatchPair, prediction) -> None:
        """Keep a prediction (H, W) if it is among them; a score of None is left out."""
        if score is None:
            return
        self.seen += 1
        place = bisect.bisect([entry[0] for entry in self.entries], score)
        full = len(self.entries) == 2 * self.each
        if full and place == self.each:
            return  # in the middle
        # a copy, since a part of a batch would keep the whole of it
        self.entries.insert(place, (score, pair, np.array(prediction)))
        if full:
            del self.entries[self.each]


def draw_examples(
    target: Path,
    examples: Examples,
    names: Sequence[str],
    ignore_index: int = rasters.UNLABELLED,
    source: str = "test",
) -> None:
    """Draw image, truth, prediction and errors of the worst and the best patches, a row each.

    Nothing is drawn where there is no example.

    Args:
        target: The PNG to write.
        examples: What to draw, from worst to best.
        names: K class names.
        ignore_index: Label value of unlabelled pixels, which are white.
        source: Where the patches are from.
    """
    panels, present = [], set()
    for score, pair, prediction in examples.entries:
        picture, valid, mask = _read_example(pair, ignore_index)
        labelled = (mask >= 0) & (mask < len(names))
        prediction = np.where(valid, prediction, -1)
        wrong = np.where(labelled, prediction != mask, -1)  # two classes: grey and red
        present |= {*np.unique(mask[labelled]), *np.unique(prediction[valid])}
        panels += [
            {"title": _short(pair.name), "picture": picture},
            {"title": "truth", "picture": rasters.colour_map(mask, len(names))},
            {"title": "prediction", "picture": rasters.colour_map(prediction, len(names))},
            {"title": f"{1 - score:.1%} wrong (red)", "picture": rasters.colour_map(wrong, 2)},
        ]  # fmt: skip
    if not panels:
        return
    each, seen = examples.each, examples.seen
    title = f"{source}: the {each} worst (above) and the {each} best of {seen} patches"
    if seen <= 2 * each:
        title = f"{source}: all patches, from the worst to the best"
    colours = rasters.class_colours(len(names))
    legend = [(names[k], colours[k]) for k in sorted(present)]
    figure = rasters.draw_panels(panels, legend, title, columns=4)
    rasters.save_figure(figure, target)


def _read_example(pair: rasters.PatchPair, ignore_index: int):
    """Picture (H, W, 3), valid and mask of a patch."""
    image, valid, mask = rasters.read_patch(pair, ignore_index)
    with rasters.open_raster(pair.image) as file:
        bands = [band - 1 for band in rasters.image_bands(file)]
        shown = rasters.rgb_bands(
            [file.descriptions[band] for band in bands],
            [file.colorinterp[band] for band in bands],
        )
    return rasters.stretch(image[[band - 1 for band in shown]], valid), valid, mask


def _short(name: str, longest: int = 40) -> str:
    """A name that fits above a panel."""
    half = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"


# --- checkpoints ----------------------------------------------------------------------------

BINARY_NAMES = ["background", "foreground"]


@dataclass(frozen=True)
class Checkpoint:
    """A trained model, ready to predict, and what its file says of it."""

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


def default_class_names(num_classes: int) -> list[str]:
    """Names for classes that nobody named; ``num_classes`` 1 is binary."""
    if num_classes == 1:
        return list(BINARY_NAMES)
    return [f"class {index}" for index in range(num_classes)]


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
        training_state: What a run needs to go on from here.
    """
    import torch

    more = {"training_state": training_state} if training_state else {}
    content = {
        "model_state_dict": {
            key: value.detach().cpu().contiguous()
            for key, value in model.network.state_dict().items()
        },
        "metadata": {
            **asdict(config),
            "mode": config.mode,
            "normalization": "percentile_99",
            "normalization_statistics": {
                "rule": normalization.rule,
                "low": list(normalization.low),
                "high": list(normalization.high),
            },
            "version": rasters.VERSION,
            **metadata,
        },
        **more,
    }
    with rasters.whole_file(target) as part:
        # sums of a file that the next epoch replaces would take as long as writing it
        torch.serialization.set_crc32_options(training_state is None)
        try:
            torch.save(content, part)
        except RuntimeError as error:  # torch's writer has no kinds
            raise SegmentationError(
                f"{target} was not written whole; is the disk full? free some, or write elsewhere"
            ) from error
        finally:
            torch.serialization.set_crc32_options(True)


def _load_safely(path: Path):
    """``torch.load`` that runs no code; numpy scalars of earlier checkpoints are admitted."""
    import torch

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
        # torch goes on with how to run the code of the file
        if reason.startswith("Weights only load failed"):
            reason = "it holds more than tensors and plain values"
        raise CheckpointError(
            f"{path} cannot be opened safely as a checkpoint: {reason[:100]}; give a whole file "
            "that main.py wrote"
        ) from error


DESCRIPTION = ("model_name", "encoder_name", "in_channels", "num_classes")


def load_checkpoint(
    path: str | Path,
    device: torch.device | str = "cpu",
    described: dict[str, str | int | None] | None = None,
) -> Checkpoint:
    """Rebuild a trained model from its file alone; no code of the file runs.

    A file with the documented keys but no statistics (earlier SemanticSeg4EO, whose second version
    says ``config`` for ``metadata``) is normalized by the ``image`` rule, and so is a file of
    weights only, which opens when ``described`` says what the file does not.

    Args:
        path: The ``.pth``.
        device: Where the model goes.
        described: What the user says of the model, by the names in ``DESCRIPTION``; None is not
            said. It fills what the file leaves open, and must agree with the rest.

    Raises:
        CheckpointError: Missing, cut off, no checkpoint, of a newer version, not described, or
            weights or options that do not fit the description.
        OptionError: ``described`` names no known model.
    """
    import torch

    given = {
        key: value for key, value in (described or {}).items() if value is not None
    }
    if "model_name" in given:
        given["model_name"] = registered_name(given["model_name"])
    state, stored = _read_checkpoint(Path(path))
    try:
        metadata = _complete_description(path, stored, given)
        config = _read_config(path, metadata, state)
        _check_options(path, config, given)
        normalization = _read_normalization(path, metadata, config)
        temperature = _read_temperature(path, metadata)
        metadata["class_names"] = _read_class_names(path, metadata, config)
        model = build_model(config)
    except OptionError as error:  # of what the file says
        raise CheckpointError(f"{path}: {error}") from error
    _load_weights(path, model, config, state)
    model.to(torch.device(device)).eval()
    return Checkpoint(model, config, normalization, metadata, temperature)


def registered_name(text: str) -> str:
    """The name in ``MODELS`` of a model in any spelling of earlier versions.

    Case, hyphens and underscores do not count, and ``plus`` or ``pp`` stand for ``+``:
    ``DeepLab-V3-Plus`` is ``deeplabv3+``.

    Raises:
        OptionError: No such model.
    """

    def spelling(name: str) -> str:
        plain = name.lower().replace("-", "").replace("_", "")
        return plain.replace("plus", "+").replace("pp", "++")

    for name in MODELS:
        if spelling(name) == spelling(text):
            return name
    raise rasters.unknown_name("model", text, get_available_models())


def _read_checkpoint(path: Path) -> tuple[dict, dict]:
    """The weights in a file, and what it says of them; nothing where it holds weights only."""
    content = _load_safely(path)
    content = content if isinstance(content, dict) else {}
    state = content.get("model_state_dict", content.get("state_dict", content))
    if not _is_state(state):
        raise CheckpointError(
            f"{path} has no model_state_dict with metadata; expected a file written by main.py"
        )
    described = [content.get(key) for key in ("metadata", "config")]
    stored = next((d for d in described if isinstance(d, dict) and d), {})
    if isinstance(content.get("mode"), str):  # all that earlier best_* files say
        stored = {"mode": content["mode"]} | stored
    # NumPy scalars become plain numbers
    stored = {
        k: v.item() if isinstance(v, np.generic) else v for k, v in stored.items()
    }
    if _newer(stored.get("version", "0")):
        raise CheckpointError(
            f"{path} is of version {stored['version']}, this is {rasters.VERSION}; update"
        )
    return _without_prefix(state), stored


def _is_state(value) -> bool:
    """Whether a value is a state dictionary: tensors by name, and at least one."""
    import torch

    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and all(isinstance(weights, torch.Tensor) for weights in value.values())
    )


def _without_prefix(state: dict) -> dict:
    """Take off what a wrapper puts before every key: ``DataParallel``, then our ``AnySize``."""
    for prefix in ("module.", "network."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _complete_description(path, stored: dict, given: dict) -> dict:
    """What the file says, and what the options say where the file says nothing.

    Raises:
        CheckpointError: Together they do not describe the model.
    """
    unsaid = {key: given[key] for key in given if stored.get(key) is None}
    metadata = stored | unsaid
    needed = list(DESCRIPTION)
    if metadata.get("model_name") is not None:
        metadata["model_name"] = registered_name(str(metadata["model_name"]))
        entry = MODELS[metadata["model_name"]]
        if not entry.has_encoder:
            needed.remove("encoder_name")
            metadata["encoder_name"] = stored.get("encoder_name") or entry.fixed_encoder
    if missing := [f"--{key}" for key in needed if metadata.get(key) is None]:
        part = "full " if stored.keys() & DESCRIPTION else ""
        binary = " (1 for binary)" if "--num_classes" in missing else ""
        raise CheckpointError(
            f"{path} holds weights without a {part}description; give "
            f"{', '.join(missing)}{binary}"
        )
    return metadata


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
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes itself wrongly: {error}") from error


def _ends_in_two(state: dict, num_classes: int) -> bool:
    """Whether a binary model of two classes has a channel for each: then it ends in a softmax."""
    return num_classes == 2 and next(reversed(state.values())).shape[:1] == (2,)


def _check_options(path, config: ModelConfig, given: dict) -> None:
    """Raise CheckpointError where an option contradicts the file."""
    classes = (config.num_classes, config.label_classes)
    facts = {
        "model_name": ((config.model_name,), f"is a {config.model_name}"),
        "encoder_name": ((config.encoder_name,), f"has {config.encoder_name}"),
        "in_channels": ((config.in_channels,), f"takes {config.in_channels} bands"),
        "num_classes": (classes, f"has {config.label_classes} classes"),
    }
    for key, value in given.items():
        fitting, fact = facts[key]
        if value not in fitting:
            raise CheckpointError(f"--{key} {value}, but {path} {fact}; leave it out")


def _read_normalization(path, metadata: dict, config: ModelConfig) -> Normalization:
    stored = metadata.get("normalization_statistics") or {"rule": "image"}
    try:
        normalization = Normalization(
            stored["rule"], tuple(stored.get("low", ())), tuple(stored.get("high", ()))
        )
    except KeyError as error:
        raise CheckpointError(f"{path} does not say its {error}") from error
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} describes itself wrongly: {error}") from error
    _check_statistics(path, normalization, config)
    return normalization


def _read_temperature(path, metadata: dict) -> float:
    value = metadata.get("temperature", 1.0)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise CheckpointError(
            f"{path} has the temperature {value!r}; expected a number more than 0"
        )
    return float(value)


def _read_class_names(path, metadata: dict, config: ModelConfig) -> list[str]:
    binary = metadata.get("mode") == "binary"
    default = default_class_names(1 if binary else config.num_classes)
    names = metadata.get("class_names") or default
    if len(names) != config.label_classes or not all(isinstance(n, str) for n in names):
        raise CheckpointError(
            f"{path} names {len(names)} classes for a model of {config.label_classes}; train it "
            "again"
        )
    return list(names)


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


def _newer(version: str) -> bool:
    def major(text: str) -> int:
        return int(text.split(".")[0]) if text.split(".")[0].isdecimal() else 0

    return major(str(version)) > major(rasters.VERSION)


# --- inference ------------------------------------------------------------------------------

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# the symmetries of a square, as (quarter turns, mirrored), that a prediction is averaged over
VIEWS = {
    "none": [(0, False)],
    "flip": [(0, False), (0, True), (2, False), (2, True)],
    "d4": [(turns, mirrored) for turns in range(4) for mirrored in (False, True)],
}


def keep_memory() -> None:
    """Have the C library keep freed memory for the next batch, one pool for all threads.

    By default glibc gives large blocks back to the system at once, and the system zeroes them
    again for the next batch: a fifth to a third of a forward pass on the CPU. Elsewhere nothing
    is done.
    """
    import ctypes

    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX of malloc.h
        for option, value in ((-1, 2**31 - 1), (-4, 0), (-8, 1)):
            ctypes.CDLL(None).mallopt(option, value)


def native_precisions(device: torch.device) -> list[str]:
    """The precisions below float32 that the hardware computes in itself, the safest first.

    bf16 holds numbers as large as float32 does; fp16 is as fast and finer.
    """
    import torch

    if device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 and later
        names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
        return ["bf16"] if any(known.get(name) for name in names) else []
    known = {
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "fp16": torch.cuda.get_device_capability(device) >= (7, 0),
    }
    return [name for name, there in known.items() if there]


def native_precision(device: torch.device) -> str:
    """The safest of ``native_precisions``, or fp32."""
    return next(iter(native_precisions(device)), "fp32")


def fold_normalization(model: nn.Module, in_channels: int) -> nn.Module:
    """Put the batch normalization that follows a convolution into its weights, for prediction.

    What follows what is watched in a forward pass, and the outcome is checked against the model:
    one where this is not the same network comes back as it was.

    Returns:
        A copy in evaluation mode; its logits agree to the last bits of float32.
    """
    import copy

    import torch
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    folded = copy.deepcopy(model).eval()
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs = []

    def remember(convolution, _, output):
        outputs[id(output)] = convolution, output

    def look_up(norm, inputs):
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], norm))

    hooks = []
    for module in folded.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            hooks.append(module.register_forward_hook(remember))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(look_up))
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    example = torch.rand(1, in_channels, 128, 128, generator=generator).to(device)
    with torch.inference_mode():
        expected = folded(example)
    for hook in hooks:
        hook.remove()
    outputs.clear()
    names = {module: name for name, module in folded.named_modules()}
    for convolution, norm in pairs:
        transposed = isinstance(convolution, nn.ConvTranspose2d)
        fused = fuse_conv_bn_eval(convolution, norm, transpose=transposed)
        # timm's batch normalization holds the activation too
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        folded.set_submodule(names[convolution], fused)
        folded.set_submodule(names[norm], nn.Sequential(*rest))
    with torch.inference_mode():
        difference = (folded(example) - expected).abs().max()
    same = difference <= 1e-4 * (1 + expected.abs().max())
    return folded if same else model


def speed_up_pointwise(model: nn.Module) -> None:
    """Have PyTorch compute convolutions of 1 x 1 pixel by oneDNN on a single thread too, in place.

    There it takes kernels of its own for them, which are slower where the bands of a pixel lie
    together. It does not for a dilation, which means nothing to a kernel of one pixel.
    """
    from torch import nn

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            layer.dilation = (2, 2)


def entropy(probabilities: Tensor, dim: int = 0) -> Tensor:
    """Shannon entropy over the classes as a share of the largest possible, 0 to 1.

    Args:
        probabilities: K along ``dim``; K = 1 is the foreground alone.
    """
    import torch

    if probabilities.shape[dim] == 1:
        probabilities = torch.cat([probabilities, 1 - probabilities], dim)
    most = math.log(probabilities.shape[dim])
    return torch.special.entr(probabilities).sum(dim) / most


class Predictor:
    """Probabilities of windows: one or several models, averaged, on one device.

    Several models are averaged with equal weight, and so are the views of test-time augmentation.
    When memory runs out, the batch is halved, and stays so.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        device: torch.device,
        precision: str = "fp32",
        tta: str = "none",
        disagreement: bool = False,
        compile_batch: int = 0,
    ):
        """Make ready.

        Args:
            checkpoints: Models of the same bands and classes.
            device: Where they are.
            precision: fp32, bf16 or fp16 (autocast).
            tta: A key of ``VIEWS``.
            disagreement: Give one more channel, the mean of the models' own entropies.
            compile_batch: Compile the networks for batches of this size; 0 is not to.
        """
        import torch

        self.device = device
        self.precision = precision
        self.views = VIEWS[tta]
        self.disagreement = disagreement
        self.compile_batch = compile_batch
        self.largest = sys.maxsize  # windows that fit into memory at once
        self.members = []
        for checkpoint in checkpoints:
            network = checkpoint.model.to(memory_format=torch.channels_last)
            if compile_batch:
                options = {"freezing": True}
                network = torch.compile(network, dynamic=False, options=options)
            member = network, checkpoint.normalization, checkpoint.temperature
            self.members.append(member)
        if precision == "fp32" and device.type == "cuda":
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # not TF32
        self.classes = checkpoints[0].config.num_classes
        self.channels = self.classes + disagreement

    def __call__(self, images: Tensor, valid: Tensor | None) -> Tensor:
        """Predict windows.

        Args:
            images: (N, C, h, w) in the scene's values, on the device.
            valid: (N, h, w) bool; None: all are.

        Returns:
            (N, K, h, w) float32 probabilities, with one channel more for ``disagreement``.

        Raises:
            SegmentationError: The memory does not hold a single window, or no compiler.
        """
        import torch

        results = []
        while sum(map(len, results)) < len(images):
            start = sum(map(len, results))
            part = slice(start, start + self.largest)
            masks = None if valid is None else valid[part]
            try:
                results.append(self._predict(images[part], masks))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                self._explain(error)
                failed = len(images[part])
            else:
                continue
            # outside of the handler, which holds what the failed pass had allocated
            self._halve(failed, images)
        return results[0] if len(results) == 1 else torch.cat(results)

    def _explain(self, error: Exception) -> None:
        """Raise what is not a lack of memory."""
        import torch

        if type(error).__module__.startswith("torch._") and self.compile_batch:
            raise SegmentationError(
                f"--compile: the model could not be compiled ({str(error).splitlines()[0][:200]}); "
                "is there a C++ compiler? leave --compile out"
            ) from error
        scarce = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        # on the CPU lack of memory is a RuntimeError
        if not scarce and "allocate memory" not in str(error):
            raise error

    def _halve(self, failed: int, images: Tensor) -> None:
        import torch

        if failed == 1:
            raise SegmentationError(
                f"The memory of {self.device} does not hold a window of {images.shape[-2]} x "
                f"{images.shape[-1]} pixels; lower --patch_size"
            )
        self.largest = failed // 2
        self.compile_batch = min(self.compile_batch, self.largest)
        log.info("memory ran out: batches of %d from here on", self.largest)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _predict(self, images: Tensor, valid: Tensor | None) -> Tensor:
        import torch

        count = len(images)
        if count < self.compile_batch:  # compiled for one shape
            missing = self.compile_batch - count
            images = torch.cat([images, images[-1:].repeat(missing, 1, 1, 1)])
            if valid is not None:
                valid = torch.cat([valid, valid[-1:].repeat(missing, 1, 1)])
        with torch.inference_mode():
            mean = own_entropy = 0.0
            scaled, rule = None, None
            for network, normalization, temperature in self.members:
                if normalization != rule:
                    scaled, rule = (
                        normalize(images, valid, normalization),
                        normalization,
                    )
                    scaled = scaled.contiguous(memory_format=torch.channels_last)
                probabilities = self._average_views(network, scaled, temperature)
                if self.disagreement:
                    own_entropy = own_entropy + entropy(probabilities, 1)
                mean = mean + probabilities if len(self.members) > 1 else probabilities
            number = len(self.members)
            mean = mean / number if number > 1 else mean
            if self.disagreement:
                mean = torch.cat([mean, (own_entropy / number)[:, None]], dim=1)
        return mean[:count]

    def _average_views(self, network, scaled: Tensor, temperature: float) -> Tensor:
        import torch

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        total = None
        for turns, mirrored in self.views:
            view = scaled.flip(-1) if mirrored else scaled
            view = view.rot90(turns, (-2, -1)) if turns else view
            view = view.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits = network(view)
            logits = (
                logits.float() if temperature == 1 else logits.float() / temperature
            )
            probabilities = class_probabilities(logits)
            probabilities = (
                probabilities.rot90(-turns, (-2, -1)) if turns else probabilities
            )
            probabilities = probabilities.flip(-1) if mirrored else probabilities
            total = probabilities if total is None else total + probabilities
        return total / len(self.views) if len(self.views) > 1 else total


# --- processes ------------------------------------------------------------------------------


LOST_PROCESS = (
    "Another process of this run has ended; the same command with --resume goes on"
)


@dataclass(frozen=True)
class Team:
    """The processes that torchrun started, or this one alone."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and tells for all."""
        return self.rank == 0

    def share(self, make: Callable, *arguments):
        """What ``make`` gives in the first process, in all of them."""
        if self.size == 1:
            return make(*arguments)
        import torch.distributed as dist

        box = [make(*arguments) if self.leads else None]
        self._together(dist.broadcast_object_list, box)
        return box[0]

    def sum(self, *tensors: Tensor) -> None:
        """Add up tensors over all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                self._together(dist.all_reduce, tensor)

    def join(self, tensor: Tensor) -> Tensor:
        """The parts (N, ...) of all processes, one after the other; gradients find their way."""
        return tensor if self.size == 1 else _collectives().join(tensor, self)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            import torch.distributed as dist

            self._together(dist.barrier)

    def _together(self, action: Callable, *arguments) -> None:
        try:
            action(*arguments)
        except RuntimeError as error:
            raise SegmentationError(LOST_PROCESS) from error


@functools.cache
def _collectives() -> SimpleNamespace:
    """``sum`` over processes, and ``join`` of their parts, as functions with a gradient.

    The gradient is that of the sum of what all processes compute, as PyTorch's own synchronized
    layers have it; ``DistributedDataParallel`` makes it a mean.
    """
    import torch
    import torch.distributed as dist

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            total = tensor.clone()
            dist.all_reduce(total)
            return total

        @staticmethod
        def backward(ctx, gradient):
            total = gradient.clone()
            dist.all_reduce(total)
            return total

    class Join(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor, team):
            ctx.own = slice(team.rank * len(tensor), (team.rank + 1) * len(tensor))
            tensor = tensor.contiguous()
            parts = [torch.empty_like(tensor) for _ in range(team.size)]
            dist.all_gather(parts, tensor)
            return torch.cat(parts)

        @staticmethod
        def backward(ctx, gradient):
            total = gradient.contiguous()
            dist.all_reduce(total)
            return total[ctx.own], None

    return SimpleNamespace(sum=Sum.apply, join=Join.apply)


@contextlib.contextmanager
def join_team(backend: str = "gloo") -> Iterator[Team]:
    """Meet the other processes that torchrun started, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    import datetime

    import torch.distributed as dist

    # one process can work for hours while the others wait; one that dies is noticed at once
    dist.init_process_group(backend, timeout=datetime.timedelta(days=30))
    team = Team(dist.get_rank(), size)
    yield team
    # a thread of gloo that still holds a tensor of Python's while the interpreter ends aborts the
    # process; after a meeting, which has none, all have let go
    team.wait()
    dist.destroy_process_group()


def own_device(name: str | None) -> torch.device:
    """``pick_device`` for one of the processes of torchrun, each with a GPU of its own: its present
    one from here on.
    """
    import torch

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and (name == "cuda" or name is None and torch.cuda.is_available()):
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def distribute(model: nn.Module, device: torch.device, team: Team, in_channels: int):
    """A model whose gradients are averaged over the processes of a team; alone, the model itself.

    Parameters that no logit depends on (some decoders leave encoder layers unused) are taken out
    of the training first, since PyTorch would wait for their gradients.
    """
    if team.size == 1:
        return model
    import torch
    from torch.nn.parallel import DistributedDataParallel

    model.eval()
    logits = model(torch.zeros(1, in_channels, 64, 64, device=device))
    used, seen, found = set(), set(), [logits.grad_fn]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        used.add(id(getattr(node, "variable", None)))
        found += [before for before, _ in node.next_functions]
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)
    gpu = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=gpu)


def share_normalization(model: nn.Module, device: torch.device, team: Team) -> None:
    """Have batch normalization count the parts of all processes, in place.

    PyTorch's own layers do that on GPUs only; on the CPU ours take their place.
    """
    if team.size == 1:
        return
    if device.type != "cpu":
        from timm.layers import convert_sync_batchnorm

        model.network = convert_sync_batchnorm(model.network)
        return
    from torch import nn

    for module in list(model.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(module, name, _shared_batch_norm(layer, team))


def _shared_batch_norm(layer: nn.BatchNorm2d, team: Team) -> nn.Module:
    """A layer with the parameters and buffers of one of torch's or timm's."""
    import torch
    from torch import nn

    all_reduce = _collectives().sum

    class SharedBatchNorm(nn.BatchNorm2d):
        def forward(self, images: Tensor) -> Tensor:
            return self.after(
                super().forward(images)
                if not self.training
                else self.normalized(images)
            )

        def normalized(self, images: Tensor) -> Tensor:
            count = images.numel() // images.shape[1] * team.size
            mean = all_reduce(images.sum((0, 2, 3))) / count
            apart = images - mean[:, None, None]
            variance = all_reduce((apart * apart).sum((0, 2, 3))) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            scale = self.weight * torch.rsqrt(variance + self.eps)
            return apart * scale[:, None, None] + self.bias[:, None, None]

    shared = SharedBatchNorm(layer.num_features, layer.eps, layer.momentum)
    shared.load_state_dict(layer.state_dict())
    # timm's layers drop and activate too
    tail = [getattr(layer, name, None) for name in ("drop", "act")]
    shared.after = nn.Sequential(*[part for part in tail if part is not None])
    return shared


# --- training -------------------------------------------------------------------------------


@dataclass
class History:
    """The epochs of one run, a row each, and the best of them."""

    rows: list[dict] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)  # criterion -> value
    best_epoch: dict[str, int] = field(default_factory=dict)

    def improve(self, criterion: str, value: float, higher: bool) -> bool:
        """Note a value; whether it is the best so far."""
        known = self.best.get(criterion)
        better = known is None or (value > known if higher else value < known)
        if better and math.isfinite(value):
            self.best[criterion] = value
            self.best_epoch[criterion] = len(self.rows)
        return better and math.isfinite(value)


def make_loader(
    dataset: PatchDataset,
    config: TrainingConfig,
    team: Team,
    training: bool = False,
    gpu: bool = False,
):
    """A DataLoader of batches: shuffled to train on, or in order; for a GPU, or the CPU.

    Several processes share each batch of ``training``, and take every so-many-eth batch of the
    others.
    """
    from torch.utils.data import DataLoader

    count, size = len(dataset), config.batch_size
    if training:
        batches = Shuffle(count, size, config.seed, team)
        if not len(batches):
            raise DatasetError(
                f"{count} training patches are too few for {team.size} processes"
            )
    else:
        batches = [range(i, min(i + size, count)) for i in range(0, count, size)]
        batches = batches[team.rank :: team.size]
    workers = count_workers(config.num_workers, dataset, len(batches), gpu)
    ahead = {}
    if workers:
        # forked processes see the patches in memory without a copy
        forks = "fork" in multiprocessing.get_all_start_methods()
        context = "fork" if forks else None
        ahead = {"prefetch_factor": 4, "multiprocessing_context": context}
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=gpu,
        **ahead,
    )


def count_workers(asked: str, dataset: PatchDataset, batches: int, gpu: bool) -> int:
    """How many processes are to prepare batches."""
    if asked != "auto":
        return min(int(asked), batches)
    if not gpu:
        return 0 if dataset.in_memory else min(1, batches)
    return min(8, max(1, rasters.own_cores() - 1), batches)


def training_precision(amp: str, device: torch.device) -> str:
    """What ``--amp`` means on a device: "fp32", "bf16" or "fp16".

    Raises:
        OptionError: fp16 on the CPU.
    """
    if amp == "auto":
        return native_precision(device)
    require(
        amp != "fp16" or device.type != "cpu",
        "--amp",
        amp,
        "auto, bf16 or off on the CPU",
    )
    return "fp32" if amp == "off" else amp


def autocast(device: torch.device, precision: str):
    """A context in which a model computes in a precision."""
    import torch

    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def load_batches(loader: Iterable, device: torch.device):
    """The batches of a loader on a device, the images channels-last."""
    import torch

    for images, masks in loader:
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        yield images, masks.to(device, non_blocking=True)


@dataclass
class Stepper:
    """Turns gradients into steps of the weights."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clip_grad: float = 0.0  # largest norm of all gradients; 0 is no limit
    scheduler: object = None  # stepped with each step
    accumulate: int = 1  # batches per step

    def step(self) -> None:
        """One step; the gradients are gone after it."""
        from torch.nn.utils import clip_grad_norm_

        if self.clip_grad:
            self.scaler.unscale_(self.optimizer)
            groups = self.optimizer.param_groups
            clip_grad_norm_([p for g in groups for p in g["params"]], self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler:
            self.scheduler.step()


def train_one_epoch(
    model,
    loader,
    loss,
    stepper: Stepper,
    device,
    precision: str = "fp32",
    team: Team | None = None,
    frozen=None,
) -> float:
    """One pass over the training patches; the mean loss.

    The loss of a batch is that of the parts of all processes together, so that it does not matter
    how many they are.

    Args:
        model: As ``build_model`` makes it, or wrapped by ``distribute``.
        loader: Batches of images and masks, with a length.
        loss: See ``build_loss``.
        stepper: What takes the steps.
        device: Of the model.
        precision: "fp32", "bf16" or "fp16".
        team: The processes that train.
        frozen: A part of the model that is not trained, its normalization neither.

    Raises:
        SegmentationError: The loss is no longer a number, or the batch is too small.
    """
    import torch

    team = team or Team()
    model.train()
    if frozen:
        frozen.eval()
    total, count = torch.zeros((), device=device), 0
    batches, group = len(loader), stepper.accumulate
    for number, (images, masks) in enumerate(load_batches(loader, device)):
        last_of_group = (number + 1) % group == 0 or number + 1 == batches
        in_group = min(group, batches - number // group * group)
        # gradients are exchanged once per step
        apart = team.size > 1 and not last_of_group
        with model.no_sync() if apart else contextlib.nullcontext():
            try:
                with autocast(device, precision):
                    logits = model(images)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise SegmentationError(
                    "This model normalizes over the batch and cannot train on a single patch; "
                    "use --batch_size 2 or more, and at least 2 training patches"
                ) from error
            value = loss(team.join(logits.float()), team.join(masks))
            stepper.scaler.scale(value / in_group).backward()
        if last_of_group:
            stepper.step()
        patches = len(images) * team.size
        total += value.detach() * patches  # no .item(): it would wait for the device
        count += patches
    return finite_loss(total.item() / count, "training")


def finite_loss(value: float, kind: str) -> float:
    """The value, or SegmentationError when it is not a number."""
    if not math.isfinite(value):
        raise SegmentationError(
            f"The {kind} loss is no longer a number; lower --learning_rate"
        )
    return value


def evaluate(
    model,
    loader,
    loss,
    device,
    num_classes: int,
    watch: Callable | None = None,
    precision: str = "fp32",
    team: Team | None = None,
) -> tuple[float, np.ndarray]:
    """Mean loss and confusion matrix (K, K) of a model over a loader.

    ``watch`` is called with the logits and masks of each batch. A ``team`` adds up what its
    processes find in loaders of their own.
    """
    import torch

    model.eval()
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, patches
    with torch.inference_mode():
        for images, masks in load_batches(loader, device):
            with autocast(device, precision):
                logits = model(images)
            logits = logits.float()
            sums[0] += loss(logits, masks) * len(images)
            sums[1] += len(images)
            matrix += confusion_matrix(predict_classes(logits), masks, num_classes)
            if watch:
                watch(logits, masks)
    (team or Team()).sum(sums, matrix)
    total, count = sums.tolist()
    return finite_loss(total / count, "validation"), matrix.cpu().numpy()


def make_scheduler(optimizer, config: TrainingConfig, epochs: int, steps: int = 1):
    """The learning-rate schedule after the warm-up; None for ``none``.

    It is stepped once per epoch, ``onecycle`` (Smith and Topin 2018) after each of the ``steps`` of
    an epoch.
    """
    from torch.optim import lr_scheduler

    rate, epochs = config.learning_rate, epochs - config.warmup_epochs
    if config.scheduler == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=0)
    if config.scheduler == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    if config.scheduler == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    return None


def warm_up(optimizer, config: TrainingConfig, epoch: int) -> None:
    """Set the learning rate of the first epochs: even steps up to its value after them."""
    last = config.warmup_epochs + 1
    if config.warmup_epochs and epoch <= last:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * epoch / last


def freeze_encoder(model: nn.Module, config: TrainingConfig, epoch: int):
    """Take the encoder out of the training of an epoch, or into it; the encoder if it is out."""
    if not config.freeze_encoder_epochs:
        return None
    encoder = getattr(model.network, "encoder", None) or model.network.backbone
    frozen = epoch <= config.freeze_encoder_epochs
    encoder.requires_grad_(not frozen)
    return encoder if frozen else None


@dataclass
class Run:
    """One model in training: all that its epochs and its files need."""

    config: TrainingConfig
    train: Survey
    validation: Survey | None
    save_dir: Path
    names: list[str]
    epochs: int
    device: torch.device
    team: Team = field(default_factory=Team)
    model: nn.Module = None
    precision: str = "fp32"
    model_config: ModelConfig = None
    normalization: Normalization = None
    loss: Callable = None
    history: History = field(default_factory=History)
    sample: LogitSample = None  # of the validation patches
    temperature: float | None = None  # None: not calibrated

    def loader(self, survey: Survey, training: bool = False, team: Team | None = None):
        config = self.config
        dataset = PatchDataset(
            survey,
            self.normalization,
            config.ignore_index,
            augment=config.data_augmentation,
            seed=config.seed,
        )
        gpu = self.device.type == "cuda"
        return make_loader(dataset, config, team or self.team, training, gpu)

    def save(
        self, name: str, metrics: dict, training_state: dict | None = None
    ) -> Path:
        """Write ``model_<name>.pth`` with what is known so far."""
        path = self.save_dir / f"model_{name}.pth"
        best = self.history.best
        metadata = {
            "input_size": list(self.train.shape[1:]),
            "pretrained": bool(self.config.weights),
            "class_names": self.names,
            "band_descriptions": list(self.train.descriptions),
            "ignore_index": self.config.ignore_index,
            "training_params": asdict(self.config)
            | {
                "best_val_loss": best.get("loss"),
                "best_val_iou": best.get("iou"),
                "epochs_run": len(self.history.rows),
            },
            "performance_metrics": metrics,
        }
        if name == "final_model" and self.temperature is not None:
            metadata["temperature"] = self.temperature
        save_checkpoint(
            path,
            self.model,
            self.model_config,
            self.normalization,
            metadata,
            training_state,
        )
        return path


def prepare(run: Run) -> None:
    """Build a run's model, normalization and loss from its settings and training patches."""
    import torch

    config, survey = run.config, run.train
    if config.normalization == "dataset":
        run.normalization = dataset_normalization(survey.samples)
    else:
        run.normalization = Normalization("image")
    torch.manual_seed(config.seed)
    torch.backends.cudnn.deterministic = True
    run.model_config = config.model_config(survey.shape[0])
    colours = rgb_channels(config, survey)
    run.model = build_model(run.model_config, config.weights, colours)
    share_normalization(run.model, run.device, run.team)
    run.model.to(run.device, memory_format=torch.channels_last)
    run.precision = training_precision(config.amp, run.device)
    class_weights = None
    if config.use_class_weights:
        class_weights = torch.from_numpy(balanced_weights(survey.counts.sum(axis=0)))
    run.loss = build_loss(config.loss, config.mode, config.ignore_index, class_weights)


def rgb_channels(config: TrainingConfig, survey: Survey) -> list[int] | None:
    """Channels (from 0) of red, green, blue: ``--rgb_bands``, else by band descriptions."""
    bands = len(survey.descriptions)
    if config.rgb_bands:
        parts = config.rgb_bands.split(",")
        fine = len(parts) == 3 and all(p.strip().isdecimal() for p in parts)
        fine = fine and all(1 <= int(p) <= bands for p in parts)
        require(
            fine, "--rgb_bands", config.rgb_bands, f"three band numbers, 1 to {bands}"
        )
        return [int(part) - 1 for part in parts]
    if bands < 3 or not any(survey.descriptions):
        return None
    return [band - 1 for band in rasters.rgb_bands(survey.descriptions)]


def fit(run: Run) -> History:
    """Train a prepared run: epochs, best checkpoints, early stopping, log and plot.

    Without validation patches all epochs are run and no best checkpoint is written.
    """
    from tqdm import tqdm

    config, model, team, history = run.config, run.model, run.team, run.history
    training = run.loader(run.train, training=True)
    validation = run.loader(run.validation) if run.validation else None
    progress = Progress(run, *make_stepper(run, len(training)))
    stepper = progress.stepper
    if config.resume:
        progress.restore()
    wrapped, was_frozen, told = None, None, time.perf_counter()
    first = len(history.rows) + 1
    for epoch in range(first, run.epochs + 1):
        waited = len(history.rows) - history.best_epoch.get("combined", 0)
        if validation and config.patience and waited >= config.patience:
            log.info("no better combined score for %d epochs: stopping", waited)
            break
        training.batch_sampler.epoch = epoch
        seed_epoch(config.seed, epoch, team)
        warm_up(stepper.optimizer, config, epoch)
        frozen = freeze_encoder(model, config, epoch)
        if wrapped is None or frozen is not was_frozen:
            wrapped = distribute(model, run.device, team, run.model_config.in_channels)
            was_frozen = frozen
        bar = tqdm(
            training,
            desc=f"epoch {epoch}",
            unit="batch",
            leave=False,
            disable=None if team.leads else True,
        )
        rate = stepper.optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch, "learning_rate": rate}
        row["train_loss"] = train_one_epoch(
            wrapped, bar, run.loss, stepper, run.device, run.precision, team, frozen
        )
        history.rows.append(row)
        marks = []
        if validation:
            row["val_loss"], matrix = evaluate(
                model,
                validation,
                run.loss,
                run.device,
                run.model_config.label_classes,
                precision=run.precision,
                team=team,
            )
            result = scores(matrix, run.names, config.mode == "binary")
            row |= {f"val_{key}": result[key] for key in HEADLINES}
            row["val_combined"] = combined_score(result)
            marks = save_best(run, row, result)
        # from line to line, so that what the last epoch wrote is counted too
        row["seconds"], told = time.perf_counter() - told, time.perf_counter()
        progress.advance()
        log.info(epoch_line(history.rows[first - 1 :], run.epochs, marks))
        if team.leads:
            progress.save()
            write_log(run.save_dir / "model_training_log.csv", history.rows)
            picture = run.save_dir / "model_training_plot.png"
            plot_training(picture, {"history": history.rows})
        team.wait()  # nobody goes on without what is needed to resume
    return history


# settings that a resumed run may change, since weights do not depend on them
FREE_SETTINGS = (
    "dataset_root", "save_dir", "num_workers", "cache", "device", "patience", "resume",
    "no_calibration", "area_estimation",
)  # fmt: skip


@dataclass
class Progress:
    """How far a run has come: with its weights and history, all that it needs to go on.

    The generators are not part of it: order, variation and dropout of an epoch depend on the seed
    and the epoch alone (``Shuffle``, ``PatchDataset``, ``seed_epoch``).
    """

    run: Run
    stepper: Stepper
    scheduler: object

    def advance(self) -> None:
        """Step the schedule of epochs after one, unless it warms up or is one of steps."""
        row, config = self.run.history.rows[-1], self.run.config
        if row["epoch"] <= config.warmup_epochs or self.stepper.scheduler:
            return
        if config.scheduler == "plateau":
            self.scheduler.step(row.get("val_loss", row["train_loss"]))
        elif self.scheduler:
            self.scheduler.step()

    def save(self) -> None:
        """Write ``model_last.pth``."""
        history = self.run.history
        metrics = {"epoch": len(history.rows)}
        self.run.save("last", metrics, {
            "rows": history.rows,
            "best": history.best,
            "best_epoch": history.best_epoch,
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "belongs_to": self.origin,
        })  # fmt: skip

    @functools.cached_property
    def origin(self) -> dict:
        """What must be the same when a run goes on: settings, patches, processes, precision."""
        run = self.run
        settings = asdict(run.config)
        fixed = {k: v for k, v in settings.items() if k not in FREE_SETTINGS}
        if run.config.scheduler in ("plateau", "none"):
            del fixed["epochs"]  # no learning rate depends on them
        else:
            fixed["epochs"] = run.epochs
        surveys = [survey for survey in (run.train, run.validation) if survey]
        digest = hashlib.sha256()
        for survey in surveys:
            digest.update("\n".join(pair.name for pair in survey.pairs).encode())
            digest.update(survey.counts.tobytes())
        return fixed | {
            "patches": digest.hexdigest(),
            "processes": run.team.size,
            "precision": run.precision,
        }

    def restore(self) -> None:
        """Go on from ``model_last.pth``, where there is one.

        Raises:
            CheckpointError: It cannot be read, or is of another run.
        """
        run, path = self.run, self.run.save_dir / "model_last.pth"
        if not path.exists():
            log.info("no run to resume in %s: starting", run.save_dir)
            return
        stored = _load_safely(path)
        state = stored.get("training_state") if isinstance(stored, dict) else None
        if not state:
            raise CheckpointError(
                f"{path} does not hold the state of a run; leave --resume out to start anew"
            )
        now, before = self.origin, state["belongs_to"]
        for name in sorted(now.keys() | before.keys()):
            if now.get(name) != before.get(name):
                raise CheckpointError(
                    f"{path} is of a run with another {name} ({before.get(name)}, now "
                    f"{now.get(name)}); give the same, or leave --resume out to start anew"
                )
        run.model.network.load_state_dict(stored["model_state_dict"])
        self.stepper.optimizer.load_state_dict(state["optimizer"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        history = run.history
        history.rows = state["rows"]
        history.best, history.best_epoch = state["best"], state["best_epoch"]
        log.info("going on after epoch %d of %d", len(history.rows), run.epochs)


def make_stepper(run: Run, batches: int) -> tuple[Stepper, object]:
    """What takes the steps of a run, and its schedule (of epochs, if the stepper has none)."""
    import torch

    config = run.config
    optimizer = torch.optim.AdamW(
        run.model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    steps = math.ceil(batches / config.accumulate)
    scheduler = make_scheduler(optimizer, config, run.epochs, steps)
    fp16 = run.precision == "fp16"
    stepper = Stepper(
        optimizer,
        torch.amp.GradScaler(run.device.type, enabled=fp16),
        config.clip_grad,
        scheduler if config.scheduler == "onecycle" else None,
        config.accumulate,
    )
    return stepper, scheduler


def seed_epoch(seed: int, epoch: int, team: Team) -> None:
    """Start the generators of an epoch, so that it does not matter where a run began."""
    import torch

    numbers = np.random.SeedSequence([seed, epoch, team.rank]).generate_state(1)
    torch.manual_seed(int(numbers[0]))


def save_best(run: Run, row: dict, result: dict) -> list[str]:
    """Write the best checkpoints that this epoch improves; their criteria."""
    history = run.history
    values = {
        "loss": row["val_loss"],
        "iou": row["val_iou"] or 0.0,  # None where there is no foreground at all
        "combined": row["val_combined"],
    }
    better = [
        name
        for name, value in values.items()
        if history.improve(name, value, higher=name != "loss")
    ]
    if better and run.team.leads:
        metrics = {"epoch": row["epoch"], "validation": result}
        written = run.save(f"best_{better[0]}", metrics)
        for name in better[1:]:  # the same in all
            rasters.copy_whole(written, run.save_dir / f"model_best_{name}.pth")
    return better


def epoch_line(rows: Sequence[dict], epochs: int, marks: Sequence[str]) -> str:
    """One aligned line that tells an epoch, the last of those run since the start."""
    row = rows[-1]

    def number(key: str) -> str:
        return "    -" if row.get(key) is None else f"{row[key]:.3f}"

    parts = [f"epoch {row['epoch']:>4}/{epochs}", f"loss {row['train_loss']:.4f}"]
    if "val_loss" in row:
        parts += [f"val {row['val_loss']:.4f}", f"IoU {number('val_iou')}"]
        parts += [f"F1 {number('val_f1')}", f"kappa {number('val_kappa')}"]
    parts += [f"lr {row['learning_rate']:.1e}", f"{row['seconds']:.1f} s"]
    # the first epoch of several takes longer than others
    usual = np.mean([row["seconds"] for row in (rows[1:] or rows)])
    parts.append(f"left {duration((epochs - row['epoch']) * usual)}")
    return "  ".join(parts) + (f"  * best {', '.join(marks)}" if marks else "")


def duration(seconds: float) -> str:
    """As 0:45 or 2:03:10."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --- folds ---------------------------------------------------------------------------------


def fold_statistics(values: Sequence[float]) -> dict:
    """Mean, standard deviation (n - 1) and 95 % t-interval of one score over folds."""
    from scipy import stats

    mean, count = float(np.mean(values)), len(values)
    deviation = interval = None
    if count > 1:
        deviation = float(np.std(values, ddof=1))
        half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
        interval = [mean - half, mean + half]
    return {
        "mean": mean,
        "std": deviation,
        "interval_95": interval,
        "values": list(values),
    }


def fold_summary(results: Sequence[dict]) -> dict:
    """``fold_statistics`` of each score that at least one fold has."""
    known = {
        key: [result[key] for result in results if result[key] is not None]
        for key in HEADLINES
    }
    return {key: fold_statistics(values) for key, values in known.items() if values}


def block_bootstrap(
    matrices: np.ndarray, measure: Callable, seed: int, repeats: int = 1000
) -> dict:
    """95 % percentile interval of each score of summed matrices, by resampling blocks.

    Blocks are drawn with replacement, as many as there are; pixels and patches are not, since
    neighbours tell the same. A draw may lack a class that few blocks hold; its means are then over
    the others.

    Args:
        matrices: (G, ..., K, K) confusion matrices of G blocks.
        measure: Gives the scores of a sum of them by name, such as ``scores`` does.
        seed: Of the draws; the same blocks are drawn for the same G and seed.
        repeats: Number of draws.

    Returns:
        [low, high] for each of ``HEADLINES``; None where there is but one block or no draw has the
        score.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    matrices, count = np.asarray(matrices, np.float64), len(matrices)
    if count < 2:
        return dict.fromkeys(HEADLINES)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(count, np.full(count, 1 / count), repeats)  # (repeats, G)
    results = [
        measure(total) for total in np.tensordot(times.astype(float), matrices, 1)
    ]
    found = {
        key: [result[key] for result in results if result[key] is not None]
        for key in HEADLINES
    }
    return {
        key: np.percentile(values, [2.5, 97.5]).tolist() if values else None
        for key, values in found.items()
    }


def score_gap(random: dict, blocked: dict) -> dict:
    """By how much each score of the first is better; None where one of them is missing."""
    return {
        key: random[key] - blocked[key]
        if None not in (random[key], blocked[key])
        else None
        for key in HEADLINES
    }


# pixels of a class that stand for it where folds are drawn
DRAWN_PIXELS = 1000


def spatial_groups(
    footprints: GeoSeries, fold_by: str, block_size: float | None, n_splits: int
) -> np.ndarray:
    """The number, 0, 1..., of the group that each patch belongs to; a group is in one fold.

    Args:
        footprints: Of the patches, in metres.
        fold_by: "block" for square blocks, "column" for one upright strip of the area per fold,
            all of about as many patches.
        block_size: Side of the blocks in metres; None for four times that of a patch.
        n_splits: Number of strips.

    Raises:
        DatasetError: Fewer eastings than strips.
    """
    if fold_by == "column":
        return _strips(footprints.centroid.x.to_numpy(), n_splits)
    size = block_size or 4 * rasters.side_of(footprints)
    groups = rasters.block_numbers(footprints, size)
    origin = "" if block_size else ", four times the side of a patch (--block_size)"
    log.info("%d blocks of %.6g m%s", groups.max() + 1, size, origin)
    return groups


def _strips(eastings: np.ndarray, count: int) -> np.ndarray:
    """Contiguous strips, by the middle rank of each easting, so that equal ones stay together."""
    from scipy.stats import rankdata

    places = (rankdata(eastings) - 0.5) / len(eastings)
    found, strips = np.unique((places * count).astype(int), return_inverse=True)
    if len(found) < count:
        raise DatasetError(
            f"The patches lie in too few columns for {count} strips; lower --n_splits, or give "
            "--fold_by block"
        )
    return strips


def make_folds(
    groups: np.ndarray, class_counts: np.ndarray, n_splits: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds of whole groups, alike in number of patches and in shares of each class.

    StratifiedGroupKFold wants one class per sample, but a patch holds several: it is given pixels
    instead, some of each class drawn at random, so that rare classes count as much as others. Of
    several draws the most balanced folds are kept.

    Args:
        groups: (P,) the group of each patch.
        class_counts: (P, K) labelled pixels.
        n_splits: Number of folds.
        seed: Of the draws.

    Returns:
        Per fold the indices of the other patches, and of its own.

    Raises:
        DatasetError: Fewer groups than folds.
    """
    names, groups = np.unique(groups, return_inverse=True)
    if len(names) < n_splits:
        raise DatasetError(
            f"{len(names)} groups of patches cannot make {n_splits} folds; give a smaller "
            "--block_size, or lower --n_splits"
        )
    content = _content(groups, class_counts)
    rng = np.random.default_rng(seed)
    draws = min(20, max(1, 4_000 // len(content)))
    drawn = [_draw_folds(content, n_splits, rng) for _ in range(draws)]
    best = min(drawn, key=lambda folds: imbalance(content, folds, n_splits))[groups]
    return [
        (np.flatnonzero(best != fold), np.flatnonzero(best == fold))
        for fold in range(n_splits)
    ]


def _content(parts: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """What each part 0, 1... holds, (parts, 1 + K) int64: patches, then pixels of each class."""
    content = np.zeros((parts.max() + 1, 1 + class_counts.shape[1]), np.int64)
    np.add.at(content[:, 0], parts, 1)
    np.add.at(content[:, 1:], parts, class_counts)
    return content


def _draw_folds(content: np.ndarray, n_splits: int, rng) -> np.ndarray:
    """A fold per group of a ``_content``, balanced by pixels drawn of each class."""
    from sklearn.model_selection import StratifiedGroupKFold

    # in an order of ours: up to scikit-learn 1.7 its shuffle=True undoes the stratification
    order = rng.permutation(len(content))
    samples = content[order]
    for column in samples.T[1:]:
        total = column.sum()
        if total:
            column[:] = rng.multinomial(min(total, DRAWN_PIXELS), column / total)
    group, label = np.nonzero(samples)
    group, label = (np.repeat(ids, samples[group, label]) for ids in (group, label))
    folds = np.empty(len(content), int)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a class of fewer pixels than folds
        splits = StratifiedGroupKFold(n_splits).split(label, label, group)
        for number, (_, held_out) in enumerate(splits):
            folds[order[group[held_out]]] = number
    return folds


def imbalance(content: np.ndarray, folds: np.ndarray, n_splits: int) -> float:
    """How unlike folds are: 0 where all have equal shares of patches and of every class.

    Args:
        content: (G, 1 + K) of each group: patches, then pixels of each class.
        folds: (G,) the fold of each.
        n_splits: Number of folds.

    Returns:
        The sum of deviations from equal shares, patches weighing as much as all classes together;
        and 10 for each fold without a class that enough groups hold.
    """
    present = content.any(axis=0)
    content = content[:, present]
    shares = np.zeros((n_splits, content.shape[1]))
    np.add.at(shares, folds, content / content.sum(axis=0))
    weights = np.ones(content.shape[1])
    weights[0] = max(1, len(weights) - 1)
    missing = (shares == 0) & ((content > 0).sum(axis=0) >= n_splits)
    gaps = np.abs(shares - 1 / n_splits) * weights
    return float(gaps.sum() + 10 * missing.sum())


def drop_near(
    inner: np.ndarray, outer: np.ndarray, footprints: GeoSeries, buffer: float
) -> np.ndarray:
    """Those of the patches to train on that keep their distance from patches to be examined.

    Args:
        inner: Indices of the training patches.
        outer: Indices of the others.
        footprints: Of all patches, in metres.
        buffer: What is nearer, in metres, leaves; at 0 what shares ground.

    Raises:
        DatasetError: None is left.
    """
    both = np.concatenate([inner, outer])
    parts = np.repeat([0, 1], [len(inner), len(outer)])
    near = rasters.near_pairs(footprints.iloc[both], parts, buffer)[:, 0]
    kept = np.delete(inner, np.unique(near))
    if not len(kept):
        raise DatasetError(
            f"All {len(inner)} training patches of a fold share ground with a patch that it is "
            f"examined on, or lie nearer than --buffer {buffer:g} m to one; lower --buffer, or give "
            "a larger --block_size"
        )
    return kept


def inner_split(
    inner: np.ndarray,
    groups: np.ndarray,
    class_counts: np.ndarray,
    seed: int,
    share: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Part a fold's training patches into those to learn from, and whole groups to stop early by.

    The training is parted into folds of about ``share`` of its patches, and the one that is most
    like the whole is taken.

    Args:
        inner: Indices of the training patches.
        groups: (P,) the group of every patch, also of those outside.
        class_counts: (P, K) labelled pixels, likewise.
        seed: Of the draws.
        share: Of the patches that go to validation.

    Returns:
        Indices for training and for validation.

    Raises:
        DatasetError: One of the two would have no labelled pixel.
    """
    counts = class_counts[inner]
    parts = min(round(1 / share), len(np.unique(groups[inner])))
    halves = make_folds(groups[inner], counts, parts, seed) if parts > 1 else []
    halves = [pair for pair in halves if all(counts[part].any() for part in pair)]
    if not halves:
        raise DatasetError(
            f"The labelled pixels of a fold's {len(inner)} training patches all lie in one place, "
            "so none can be set aside for early stopping; lower --n_splits, --block_size or "
            "--buffer, or label more patches"
        )

    def cost(pair) -> float:
        sums = np.stack([np.r_[len(part), counts[part].sum(axis=0)] for part in pair])
        sums = sums[:, sums.any(axis=0)]
        gaps = np.abs(sums[1] / sums.sum(axis=0) - share)
        return gaps[0] * (len(gaps) - 1) + gaps[1:].sum() + 10 * (sums[0] == 0).sum()

    train, validation = min(halves, key=cost)
    return inner[train], inner[validation]


# --- experiments ----------------------------------------------------------------------------


def run_experiment(config: TrainingConfig) -> dict:
    """Train as the settings say, write all files of ``--save_dir``; the report.

    Raises:
        SegmentationError: Anything in the data or the settings that cannot be right; found before
            training begins.
    """
    device = own_device(config.device)
    training_precision(config.amp, device)
    for require_something in BEFOREHAND:
        require_something(config)
    require_patches(config)
    run_kind = train_split if config.val_strategy == "split" else cross_validate
    report = {"val_strategy": config.val_strategy, "settings": asdict(config)}
    save_dir = Path(config.save_dir)
    if device.type == "cpu":
        keep_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    with join_team(backend) as team, contextlib.ExitStack() as stack:
        if team.leads:
            sole_run = rasters.sole_run("--save_dir", save_dir, save_dir)
            stack.enter_context(sole_run)
            rasters.drop_unfinished(run_files(save_dir))
        try:
            report |= run_kind(config, device, team)
        except (RuntimeError, SegmentationError) as error:
            if known := known_fault(error, config, device):
                raise known from error
            raise
        if team.leads:
            rasters.write_json(save_dir / "model_metrics.json", report)
    return report


def known_fault(error: Exception, config: TrainingConfig, device):
    """What torch reports in its own way, as SegmentationError; None for what is not known."""
    text = str(error)
    if isinstance(error, SegmentationError):  # of a process that reads patches
        line = text.splitlines()[-1].partition(": ")[2]
        return SegmentationError(line) if "Original Traceback" in text else None
    if "memory" in text and ("out of" in text or "allocate" in text):
        return SegmentationError(
            f"The memory of {device} does not hold {config.batch_size} patches; lower --batch_size"
        )
    if "DataLoader worker" in text:
        return SegmentationError(
            "A process that reads patches was killed (no memory left?); lower --num_workers or "
            "--batch_size"
        )
    if "gloo" in text or "NCCL" in text:
        return SegmentationError(LOST_PROCESS)
    return None


def require_model(config: TrainingConfig) -> None:
    """Raise OptionError where the model cannot be built at all."""
    check_architecture(config.model_config(config.in_channels or 1), config.weights)


def require_output(config: TrainingConfig) -> None:
    """Raise SegmentationError where ``--save_dir`` cannot be written to, or should not."""
    rasters.require_folder("--save_dir", config.save_dir)
    former = [file.resolve() for file in former_files(Path(config.save_dir))]
    require(
        not config.weights or Path(config.weights).resolve() not in former,
        "--encoder_weights",
        config.weights,
        "another --save_dir: this run would replace the file",
    )


def require_test(config: TrainingConfig) -> None:
    """Raise DatasetError where areas are to be estimated without a test split."""
    if config.area_estimation and not rasters.list_pairs(
        config.dataset_root, "test", required=False
    ):
        raise DatasetError(
            f"--area_estimation: {config.dataset_root} has no test split to learn the map's "
            "errors from; leave it out, or extract with a --test_ratio"
        )


def needed_splits(config: TrainingConfig) -> tuple[str, ...]:
    """The splits that a run cannot do without."""
    return ("train", "validation") if config.val_strategy == "split" else ("train",)


def require_patches(config: TrainingConfig) -> None:
    """Look at all splits before any patch is read, which takes long.

    Raises:
        DatasetError: A split without patches, a patch without its partner, or one that is cut off.
    """
    for split in rasters.SPLITS:
        needed = split in needed_splits(config)
        for pair in rasters.list_pairs(config.dataset_root, split, needed):
            rasters.patch_header(pair.image)
            rasters.patch_header(pair.label)


# what the settings alone tell
BEFOREHAND = (require_model, require_output, require_test)


def survey_split(
    config: TrainingConfig,
    split: str,
    like: Survey | None,
    cache: Cache | None = None,
    required=True,
):
    """The survey of a split, or None when it is not required and has no patches."""
    pairs = rasters.list_pairs(config.dataset_root, split, required)
    if not pairs:
        return None
    survey = survey_patches(
        pairs, config.label_classes, config.ignore_index, like, cache
    )
    require_usable(config, split, survey)
    log.info("%-10s %5d patches of %d x %d pixels, %d bands", split, len(pairs), *survey.shape[1:],
             survey.shape[0])  # fmt: skip
    return survey


def require_usable(config: TrainingConfig, split: str, survey: Survey) -> None:
    """Raise DatasetError where a split has other bands than asked for, or no label."""
    bands = survey.shape[0]
    if config.in_channels not in (None, bands):
        raise DatasetError(
            f"--in_channels {config.in_channels}, but the patches in {config.dataset_root} have "
            f"{bands} bands"
        )
    if survey.counts.sum() == 0:
        raise DatasetError(
            f"No patch of the {split} split has a labelled pixel that is valid in the image; look "
            "at the nodata of both, and at --ignore_index"
        )


def require_several_classes(survey: Survey) -> None:
    """Raise DatasetError when all labelled pixels are of one class."""
    present = np.flatnonzero(survey.counts.sum(axis=0))
    if len(present) < 2:
        raise DatasetError(
            f"All labelled training pixels are class {present[0]}: there is nothing to tell apart "
            "(255 means unlabelled; if it is a class, extract with --label_values 0,255)"
        )


# what a run writes; that of an earlier one is removed, since its folds would be taken for new ones
RUN_FILES = (
    "model_best_loss.pth", "model_best_iou.pth", "model_best_combined.pth",
    "model_final_model.pth", "model_last.pth", "model_metrics.json", "model_training_log.csv",
    "model_training_plot.png", "model_reliability.png", "model_test_examples.png",
)  # fmt: skip


def run_files(save_dir: Path) -> list[Path]:
    """The files that a run writes to a folder and to those of its folds that are there."""
    folders = [save_dir]
    for kind in ("", "random/", "block/"):
        folders += save_dir.glob(f"{kind}fold_*")
    return [folder / name for folder in folders for name in RUN_FILES]


def former_files(save_dir: Path) -> list[Path]:
    """The files of an earlier run."""
    return [file for file in run_files(save_dir) if file.is_file()]


def clear_former_run(config: TrainingConfig) -> None:
    """Remove the files of an earlier run, and the folders of its folds where nothing else lies.

    With ``--resume`` they stay: the run goes on with them.
    """
    save_dir = Path(config.save_dir)
    if config.resume:
        return
    for file in former_files(save_dir):
        file.unlink()
    for kind in ("random/", "block/", ""):
        for folder in [*save_dir.glob(f"{kind}fold_*"), save_dir / kind]:
            if folder != save_dir and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def names_for(config: TrainingConfig, survey: Survey) -> list[str]:
    """Class names: given, else stored with the labels, else numbers."""
    if config.class_names:
        return [name.strip() for name in config.class_names.split(",")]
    stored = survey.class_names
    if stored and len(stored) == config.label_classes:
        return stored
    return default_class_names(1 if config.mode == "binary" else config.classes)


def train_split(config: TrainingConfig, device, team: Team) -> dict:
    """Train on train/, choose on validation/, examine the final model on test/."""
    cache = open_cache(config)
    train = survey_split(config, "train", None, cache)
    validation = survey_split(config, "validation", train, cache)
    test = survey_split(config, "test", train, required=False)
    require_several_classes(train)
    run = Run(
        config, train, validation, Path(config.save_dir), names_for(config, train), config.epochs,
        device, team,
    )  # fmt: skip
    prepare(run)
    team.share(clear_former_run, config)
    fit(run)
    return team.share(finish, run, test)


def finish(run: Run, test: Survey | None, held_out: HeldOut | None = None) -> dict:
    """Take the best weights, examine them, write the final model and the picture.

    Args:
        run: A run that was fitted.
        test: Patches to examine with all that there is to know.
        held_out: Those of a fold, which get scores alone.

    Returns:
        The report of the run: history, best epochs and the scores of the final model.
    """
    best = load_checkpoint(run.save_dir / "model_best_combined.pth", run.device)
    run.model.load_state_dict(best.model.state_dict())
    report = {
        "best_epoch": dict(run.history.best_epoch),
        "best": dict(run.history.best),
    }
    run.sample = LogitSample(seed=run.config.seed)
    report["validation"] = examine(run, run.validation, run.sample.add)
    calibrate(run, [run.sample])
    if held_out:
        report["held_out"] = examine(run, held_out.survey, held_out)
    report |= examine_test(run, test)
    kinds = ("validation", "held_out", "test")
    run.save("final_model", {key: report[key] for key in kinds if key in report})
    report["history"] = run.history.rows
    report["class_names"] = run.names
    if held_out:  # the report of a whole run gets more, and is written once it has
        rasters.write_json(run.save_dir / "model_metrics.json", report)
    plot_training(run.save_dir / "model_training_plot.png", report)
    return report


def examine(run: Run, survey: Survey, watch: Callable | None = None) -> dict:
    """Loss and scores of a run's model on surveyed patches, in float32, by this process alone.

    ``watch`` is that of ``evaluate``.
    """
    loss, matrix = evaluate(
        run.model,
        run.loader(survey, team=Team()),
        run.loss,
        run.device,
        run.model_config.label_classes,
        watch,
    )
    return {"loss": loss} | scores(matrix, run.names, run.config.mode == "binary")


def calibrate(run: Run, samples: Sequence[LogitSample]) -> None:
    """Fit a run's temperature on pixels that its model, or those of its folds, did not learn."""
    if run.config.no_calibration:
        return
    logits = np.concatenate([sample.logits for sample in samples])
    target = np.concatenate([sample.target for sample in samples])
    run.temperature = fit_temperature(logits, target)
    log.info(
        "temperature %.3f, from %d validation pixels", run.temperature, len(target)
    )


class Inspection:
    """Looks on while test patches are evaluated, one after the other."""

    def __init__(self, run: Run, test: Survey):
        self.pairs, self.worth = test.pairs, worth_showing(test.counts)
        self.classes = run.model_config.label_classes
        self.temperature = run.temperature or 1.0
        self.before, self.after = Calibration(), Calibration()
        self.examples = Examples()
        self.matrices = []  # (K, K) of each patch

    def __call__(self, logits: Tensor, masks: Tensor) -> None:
        self.before.add(logits, masks)
        self.after.add(logits, masks, self.temperature)
        for guess, mask in zip(predict_classes(logits), masks):
            number = len(self.matrices)
            matrix = confusion_matrix(guess, mask, self.classes)
            self.matrices.append(matrix.cpu().numpy())
            if self.worth[number]:
                guess, mask = guess.cpu().numpy(), mask.cpu().numpy()
                score = patch_accuracy(guess, mask, self.classes)
                self.examples.add(score, self.pairs[number], guess)

    def calibration(self) -> dict:
        """Temperature, errors of calibration and their bins, as plain numbers for JSON."""
        before, after = self.before.report(), self.after.report()
        return {
            "temperature": self.temperature,
            "ece_before": before["expected_calibration_error"],
            "ece_after": after["expected_calibration_error"],
            "before": before,
            "after": after,
        }


def examine_test(run: Run, test: Survey | None) -> dict:
    """Examine a run's model on test/: scores, calibration, areas if asked for, two pictures.

    Returns:
        The keys ``test``, ``calibration`` and ``areas`` of a report; nothing without patches.
    """
    if not test:
        return {}
    seen = Inspection(run, test)
    report = {"test": examine(run, test, seen), "calibration": seen.calibration()}
    if run.config.area_estimation:
        surveys = [survey for survey in (run.train, run.validation, test) if survey]
        ground, in_metres = map_patches(run, [p for s in surveys for p in s.pairs])
        area = 1.0 if in_metres else None
        areas = estimate_areas(np.stack(seen.matrices), ground, area)
        for entry in areas["per_class"]:
            entry["name"] = run.names[entry["class"]]
        report["areas"] = areas
    draw_calibration(run.save_dir / "model_reliability.png", report["calibration"])
    pictures = run.save_dir / "model_test_examples.png"
    draw_examples(pictures, seen.examples, run.names, run.config.ignore_index)
    return report


def map_patches(
    run: Run, pairs: Sequence[rasters.PatchPair]
) -> tuple[np.ndarray, bool]:
    """How much ground each class has in a run's map of patches, labelled or not.

    Returns:
        (K,) square metres and True; pixels and False where the CRS of a patch does not tell.
    """
    import torch

    classes = run.model_config.label_classes
    pixels, sizes = [], []
    run.model.eval()
    for pair in pairs:
        image, valid, _ = rasters.read_patch(pair, run.config.ignore_index)
        image = normalize(image, valid, run.normalization)[None].to(run.device)
        with torch.inference_mode():
            guess = predict_classes(run.model(image))[0].cpu().numpy()
        pixels.append(np.bincount(guess[valid], minlength=classes))
        with rasters.open_raster(pair.image) as file:
            areas = rasters.pixel_areas(file)
        sizes.append(None if areas is None else areas.mean())
    if None in sizes:
        return np.sum(pixels, axis=0), False
    return np.array(sizes) @ np.array(pixels), True


class HeldOut:
    """Looks on while the patches that a fold holds out are evaluated, one after the other."""

    def __init__(self, survey: Survey, classes: int, seed: int):
        self.survey, self.classes = survey, classes
        self.sample = LogitSample(seed=seed)
        self.matrices = []  # (K, K) of each patch

    def found(self) -> list[np.ndarray]:
        """The confusion matrix (K, K) of each patch."""
        return self.matrices

    def __call__(self, logits: Tensor, masks: Tensor) -> None:
        self.sample.add(logits, masks)
        for guess, mask in zip(predict_classes(logits), masks):
            matrix = confusion_matrix(guess, mask, self.classes)
            self.matrices.append(matrix.cpu().numpy())


@dataclass(frozen=True)
class Fold:
    """Indices of the patches that a fold learns from, stops early by, and is reported for."""

    train: np.ndarray
    validation: np.ndarray
    held_out: np.ndarray


def plan_folds(
    config: TrainingConfig,
    fold_by: str,
    pooled: Survey,
    footprints: GeoSeries | None,
    blocks: np.ndarray | None,
) -> list[Fold]:
    """Folds by "random", "block" or "column", each with validation patches of its own.

    Args:
        config: How many folds, the buffer and the seed.
        fold_by: By what.
        pooled: All patches.
        footprints: Where they lie, in metres; not needed at random.
        blocks: (P,) the block of each; likewise.

    Raises:
        DatasetError: Too few groups, or nothing left to train on.
    """
    counts, n_splits = pooled.counts, config.n_splits
    groups = units = np.arange(len(pooled.pairs))
    if fold_by != "random":
        groups = units = blocks
    if fold_by == "column":
        groups = spatial_groups(footprints, fold_by, None, n_splits)
    folds = []
    for inner, outer in make_folds(groups, counts, n_splits, config.seed):
        near = len(inner)
        if fold_by != "random":
            inner = drop_near(inner, outer, footprints, config.buffer)
        train, validation = inner_split(inner, units, counts, config.seed)
        if fold_by != "random":
            train = drop_near(train, validation, footprints, config.buffer)
        near -= len(train) + len(validation)
        if not counts[train].any():
            raise DatasetError(
                f"Fold {len(folds) + 1} has no labelled pixel to train on; lower --n_splits or "
                "--buffer"
            )
        folds.append(Fold(train, validation, outer))
        log.info(
            "%s fold %d: %d patches held out, %d to train on, %d to stop early by, %d too near",
            *(fold_by, len(folds), len(outer), len(train), len(validation), near),
        )
    return folds


def train_folds(
    config: TrainingConfig,
    pooled: Survey,
    folds: Sequence[Fold],
    save_dir: Path,
    names,
    device,
    team: Team,
) -> tuple[list[dict], np.ndarray, list[LogitSample]]:
    """Train a model per fold and examine it, once, on the patches that it is held out from.

    Returns:
        A report per fold, the confusion matrix of each patch (P, K, K) by the model that did not
        see it, and logits of such patches per fold.
    """
    classes = config.label_classes
    matrices = np.zeros((len(pooled.pairs), classes, classes), np.int64)
    reports, samples = [], []
    for number, fold in enumerate(folds, start=1):
        log.info("fold %d of %d", number, len(folds))
        train, validation = pooled.subset(fold.train), pooled.subset(fold.validation)
        place = save_dir / f"fold_{number}"
        run = Run(config, train, validation, place, names, config.epochs, device, team)
        prepare(run)
        fit(run)
        held_out = HeldOut(pooled.subset(fold.held_out), classes, config.seed)
        reports.append(team.share(finish, run, None, held_out))
        matrices[fold.held_out] = team.share(held_out.found)
        samples.append(held_out.sample)
    return reports, matrices, samples


def plan_all_folds(
    config: TrainingConfig, pooled: Survey
) -> tuple[dict[str, list[Fold]], np.ndarray]:
    """The folds of ``--fold_by`` by kind, two kinds for ``both``, and the block of each patch.

    Raises:
        DatasetError: See ``plan_folds``.
    """
    if len(pooled.pairs) < config.n_splits:
        raise DatasetError(
            f"{len(pooled.pairs)} patches cannot make {config.n_splits} folds; lower --n_splits"
        )
    footprints, blocks = None, np.arange(len(pooled.pairs))
    if config.fold_by != "random":
        footprints = rasters.patch_footprints(pooled.pairs)
        blocks = spatial_groups(footprints, "block", config.block_size, config.n_splits)
    kinds = ("random", "block") if config.fold_by == "both" else (config.fold_by,)
    plans = {
        kind: plan_folds(config, kind, pooled, footprints, blocks) for kind in kinds
    }
    return plans, blocks


def cross_validate(config: TrainingConfig, device, team: Team) -> dict:
    """K-fold cross-validation over train/ and validation/, then a final model on all of it.

    Each fold chooses its best epoch by validation patches of its own and is examined, once, on
    what it holds out. With ``--fold_by both`` the folds at random come first, for comparison. The
    final model is trained for the median of the epochs that the (other) folds found best; test/,
    when there, is the examination of that model alone.
    """
    cache = open_cache(config)
    pooled = survey_split(config, "train", None, cache)
    more = survey_split(config, "validation", pooled, cache, required=False)
    pooled = pooled + more if more else pooled
    test = survey_split(config, "test", pooled, required=False)
    require_several_classes(pooled)
    names, save_dir = names_for(config, pooled), Path(config.save_dir)
    plans, blocks = plan_all_folds(config, pooled)
    both = len(plans) == 2

    # what cannot be built is an error before the former run is gone
    colours = rgb_channels(config, pooled)
    build_model(config.model_config(pooled.shape[0]), config.weights, colours)
    team.share(clear_former_run, config)

    def measure(matrix: np.ndarray) -> dict:
        return scores(matrix, names, config.mode == "binary")

    results, per_block = {}, {}
    for kind, folds in plans.items():
        place = save_dir / kind if both else save_dir
        # the samples that stay are those of the last kind
        reports, matrices, samples = train_folds(
            config, pooled, folds, place, names, device, team
        )
        sums = np.zeros((blocks.max() + 1, *matrices.shape[1:]), np.int64)
        np.add.at(sums, blocks, matrices)
        per_block[kind] = sums
        results[kind] = {
            "folds": reports,
            "summary": fold_summary([r["held_out"] for r in reports]),
            "pooled": measure(matrices.sum(axis=0)),
            "intervals": block_bootstrap(sums, measure, config.seed),
        }
    epochs = round(float(np.median([r["best_epoch"]["combined"] for r in reports])))
    log.info("final model: all %d patches, %d epochs", len(pooled.pairs), epochs)
    final = Run(config, pooled, None, save_dir, names, epochs, device, team)
    prepare(final)
    fit(final)
    report = {
        "class_names": names,
        **results[kind],
        "blocks": None if config.fold_by == "random" else len(sums),
        "final_epochs": epochs,
        "history": final.history.rows,
    }
    if both:
        report["random"] = results["random"]
        report["optimism"] = optimism(results, per_block, measure, config.seed)
    return team.share(finish_folds, final, report, samples, test)


def finish_folds(
    final: Run, report: dict, samples: Sequence[LogitSample], test: Survey | None
) -> dict:
    """Calibrate the final model of k-fold, examine it, write it and the picture; its report."""
    for criterion in ("loss", "iou"):  # what the checkpoint tells of its validation
        best = [fold["best"][criterion] for fold in report["folds"]]
        final.history.best[criterion] = float(np.mean(best))
    calibrate(final, samples)
    report = report | examine_test(final, test)
    kept = {key: report[key] for key in ("summary", "pooled", "test") if key in report}
    final.save("final_model", kept)
    plot_training(final.save_dir / "model_training_plot.png", report)
    return report


def optimism(
    results: Mapping[str, dict],
    per_block: Mapping[str, np.ndarray],
    measure: Callable,
    seed: int,
) -> dict:
    """By how much the pooled scores of folds at random are better than those by block.

    Args:
        results: The "pooled" scores of "random" and "block".
        per_block: Their confusion matrices by block of the ground, (G, K, K).
        measure: See ``block_bootstrap``.
        seed: Likewise.

    Returns:
        "value" and "interval_95" of each score; the same blocks are drawn for both.
    """
    pairs = np.stack([per_block["random"], per_block["block"]], axis=1)
    gaps = score_gap(results["random"]["pooled"], results["block"]["pooled"])
    intervals = block_bootstrap(
        pairs, lambda pair: score_gap(*map(measure, pair)), seed
    )
    return {
        key: {"value": gaps[key], "interval_95": intervals[key]} for key in HEADLINES
    }


# --- looking ahead --------------------------------------------------------------------------


def check_experiment(config: TrainingConfig) -> tuple[rasters.Faults, dict]:
    """Look at all that a run would look at, and do none of its work.

    Returns:
        What stands against the run, a line each; and, when nothing does, what it will take:
        "patches" per split, "parameters", "epoch_seconds" and "total_seconds" at most (measured on
        a batch), and "memory" in bytes (of the GPU, else of this process).
    """
    faults = rasters.Faults()
    device = faults.attempt(own_device, config.device)
    if device:
        faults.attempt(training_precision, config.amp, device)
    for require_something in BEFOREHAND:
        faults.attempt(require_something, config)
    surveys: dict[str, Survey] = {}
    like = None
    for split in rasters.SPLITS:
        needed = split in needed_splits(config)
        pairs = (
            faults.attempt(rasters.list_pairs, config.dataset_root, split, needed) or []
        )
        classes, ignored = config.label_classes, config.ignore_index
        survey = survey_patches(pairs, classes, ignored, like, faults=faults)
        if survey:
            like, surveys[split] = like or survey, survey
            faults.attempt(require_usable, config, split, survey)
    train, validation = surveys.get("train"), surveys.get("validation")
    if train and config.val_strategy == "kfold":
        train, validation = train + validation if validation else train, None
        faults.attempt(plan_all_folds, config, train)
    if train:
        faults.attempt(require_several_classes, train)
    if faults:
        return faults, {}
    names = names_for(config, train)
    place = Path(config.save_dir)
    run = Run(config, train, validation, place, names, config.epochs, device)
    try:
        faults.attempt(prepare, run)
        took = faults.attempt(measure_batches, run) or {}
    except RuntimeError as error:
        took, fault = {}, known_fault(error, config, device)
        if not fault:
            raise
        faults.note(str(fault))
    patches = {split: len(survey.pairs) for split, survey in surveys.items()}
    return faults, took | {"patches": patches}


def measure_batches(run: Run) -> dict:
    """Train and evaluate a batch of a prepared run; what the run will take by that.

    Returns:
        See ``check_experiment``.
    """
    config, device, seconds = run.config, run.device, []
    loader = run.loader(run.train, training=True)
    stepper, _ = make_stepper(run, len(loader))
    batch = next(iter(loader))
    options = stepper, device, run.precision
    for _ in range(2):  # libraries warm up in the first
        started = time.perf_counter()
        train_one_epoch(run.model, [batch], run.loss, *options)
        middle = time.perf_counter()
        classes = run.model_config.label_classes
        evaluate(run.model, [batch], run.loss, device, classes, None, run.precision)
        seconds = [middle - started, time.perf_counter() - middle]
    checked = len(run.validation.pairs) if run.validation else 0
    epoch = seconds[0] * len(loader) + seconds[1] * checked / config.batch_size
    runs = 1.0
    if config.val_strategy == "kfold":
        kinds = 2 if config.fold_by == "both" else 1
        runs += kinds * (
            config.n_splits - 1
        )  # each fold sees that share of all patches
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "epoch_seconds": epoch,
        "total_seconds": epoch * config.epochs * runs,
        "memory": peak_memory(device),
    }


# --- reports --------------------------------------------------------------------------------


def write_log(target: Path, rows: Sequence[dict]) -> None:
    """The epochs as CSV, a column per measure."""
    with rasters.whole_file(target) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def score_table(result: dict) -> str:
    """The scores of one examination as aligned text, a line per class.

    User's accuracy is precision, producer's accuracy recall.
    """

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    columns = {
        "precision": "user's acc.",
        "recall": "producer's acc.",
        "f1": "F1",
        "iou": "IoU",
    }
    width = max(6, *(len(entry["name"]) + 2 for entry in result["per_class"]))
    sizes = {key: max(9, len(head) + 3) for key, head in columns.items()}
    heads = "".join(f"{head:>{sizes[key]}}" for key, head in columns.items())
    lines = [f"{'':{width}}{'pixels':>14}{heads}"]
    for entry in result["per_class"]:
        values = "".join(f"{number(entry[key]):>{sizes[key]}}" for key in columns)
        lines.append(f"{entry['name']:{width}}{entry['pixels']:>14,}{values}")
    pixels = sum(entry["pixels"] for entry in result["per_class"])
    means = "".join(f"{number(result[f'mean_{key}']):>{sizes[key]}}" for key in columns)
    lines.append(f"{'mean':{width}}{pixels:>14,}{means}")
    accuracy, kappa = number(result["overall_accuracy"]), number(result["kappa"])
    return "\n".join([*lines, f"overall accuracy {accuracy}, kappa {kappa}"])


def side_by_side(random: dict, blocked: dict, gap: dict | None = None) -> str:
    """The scores of folds at random and by block as aligned text, and what lies between them.

    Args:
        random: "pooled" scores and their "intervals" by ``block_bootstrap``.
        blocked: Likewise.
        gap: The interval of the difference by name, from the same blocks for both.
    """

    def cell(value: float | None, interval) -> str:
        if value is None:
            return "-"
        limits = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        return f"{value:.3f}{limits}"

    runs = (random, blocked)
    lines = [f"{'':18}{'folds at random':24}folds by block"]
    for key in HEADLINES:
        first, second = (
            cell(run["pooled"][key], run["intervals"][key]) for run in runs
        )
        lines.append(f"{key.replace('_', ' '):18}{first:24}{second}")
    difference = score_gap(random["pooled"], blocked["pooled"])["iou"]
    if difference is None:
        return "\n".join(lines)
    interval = (gap or {}).get("iou")
    verdict = "what random folds gain from neighbours, and a new place will not give"
    if difference <= 0:
        verdict = "random folds are not better here"
    elif interval and interval[0] <= 0:
        verdict = "too few blocks to tell it from chance"
    return "\n".join(
        [*lines, f"optimism of iou   {cell(difference, interval)}: {verdict}"]
    )


def area_table(areas: dict) -> str:
    """Estimated areas and accuracies with their 95 % intervals as aligned text."""

    def cell(estimate: dict, form: str) -> str:
        if estimate["value"] is None:
            return "-"
        interval = estimate["interval_95"]
        ends = [format(end, form) for end in interval] if interval else ["-", "-"]
        return f"{estimate['value']:{form}} [{', '.join(ends)}]"

    in_metres = "area_ha" in areas["per_class"][0]
    mapped, area = ("mapped_ha", "area_ha") if in_metres else ("mapped_share", "share")
    form = ",.1f" if in_metres else ".3f"
    heads = [mapped.replace("_", " "), area.replace("_", " ")]
    rows = [["", *heads, "user's acc.", "producer's acc."]]
    for entry in areas["per_class"]:
        known = entry[mapped]
        row = [entry["name"], "-" if known is None else format(known, form)]
        row.append(cell(entry[area], form))
        for key in ("users_accuracy", "producers_accuracy"):
            row.append(cell(entry[key], ".3f"))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]
    return "\n".join(
        [*lines, f"overall accuracy {cell(areas['overall_accuracy'], '.3f')}"]
    )


def plot_training(target: Path, report: dict) -> None:
    """Draw a report: loss and score curves, bars per class, confusion matrix.

    Bars and matrix are those of the test split, else pooled over the folds, else those that a fold
    holds out, else validation; a run that is not finished has only curves.
    """
    from matplotlib.figure import Figure

    sources = ("test", "pooled", "held_out", "validation")
    source = next((key for key in sources if key in report), None)
    runs = [r["history"] for r in report.get("folds", [])] or [report["history"]]
    rows = 2 if source else 1
    figure = Figure(figsize=(14, 5 * rows), layout="constrained")
    losses, curves, *below = figure.subplots(rows, 2).ravel()
    for index, rows in enumerate(runs):
        epochs = [row["epoch"] for row in rows]
        faint = 1.0 if len(runs) == 1 else 0.6
        first = index == 0
        for axes, key, name, colour in (
            (losses, "train_loss", "training", "C0"),
            (losses, "val_loss", "validation", "C1"),
            (curves, "val_iou", "IoU", "C2"),
            (curves, "val_f1", "F1", "C3"),
            (curves, "val_kappa", "kappa", "C4"),
        ):
            if key in rows[0]:
                values = [np.nan if row[key] is None else row[key] for row in rows]
                label = name if first else None
                axes.plot(
                    epochs, values, color=colour, alpha=faint, label=label, marker="."
                )
    best = report.get("best_epoch", {}).get("combined")
    if best:
        curves.axvline(
            best, color="grey", linestyle=":", label=f"final model: epoch {best}"
        )
    losses.set(title="Loss", xlabel="epoch", ylabel="loss")
    title = "Validation scores" + (f", {len(runs)} folds" if len(runs) > 1 else "")
    curves.set(title=title, xlabel="epoch", ylim=(0, 1.02))
    for axes in (losses, curves):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(frameon=False)
    if source:
        bars, table = below
        _draw_bars(bars, report[source], source)
        _draw_matrix(figure, table, report[source], source)
    rasters.save_figure(figure, target)


def plot_reliability(
    axes, curves: Mapping[str, dict], title: str = "Reliability"
) -> None:
    """Draw accuracy over confidence, and which share of the pixels has that confidence.

    Bins with less than a ten-thousandth of the pixels are noise and left out.

    Args:
        axes: Where.
        curves: Reports of ``Calibration`` by what they are called in the legend.
        title: Above.
    """
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="as sure as right")
    for number, (name, report) in enumerate(curves.items()):
        pixels = np.array(report["pixels"])
        filled = pixels > 1e-4 * pixels.sum()
        if not filled.any():
            continue
        confidence = np.array(report["confidence"], float)[filled]
        accuracy = np.array(report["accuracy"], float)[filled]
        error = report["expected_calibration_error"]
        label, colour = f"{name}: ECE {error:.3f}", f"C{number}"
        axes.plot(confidence, accuracy, color=colour, marker=".", label=label)
        edges = np.linspace(0, 1, len(pixels) + 1)
        axes.stairs(pixels / pixels.sum(), edges, color=colour, alpha=0.25, fill=True)
    axes.set(xlabel="confidence", ylabel="accuracy; share of pixels (filled)")
    axes.set(title=title, xlim=(0, 1.02), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_calibration(target: Path, calibration: dict) -> None:
    """Draw the reliability before and after the temperature, where there is one."""
    from matplotlib.figure import Figure

    curves = {"network": calibration["before"]}
    if calibration["temperature"] != 1:
        name = f"temperature {calibration['temperature']:.2f}"
        curves[name] = calibration["after"]
    figure = Figure(figsize=(6, 6), layout="constrained")
    plot_reliability(figure.subplots(), curves, "Reliability, test")
    rasters.save_figure(figure, target)


def _draw_bars(axes, result: dict, source: str) -> None:
    entries = result["per_class"]
    places = np.arange(len(entries))
    for shift, key in ((-0.2, "iou"), (0.2, "f1")):
        values = [entry[key] or 0 for entry in entries]
        drawn = axes.bar(
            places + shift, values, 0.38, label=key.upper().replace("IOU", "IoU")
        )
        labels = ["-" if e[key] is None else f"{e[key]:.2f}" for e in entries]
        axes.bar_label(drawn, labels, fontsize=8)
    names = [entry["name"] for entry in entries]
    axes.set_xticks(places, names, rotation=30, ha="right", parse_math=False)
    mean = result["mean_iou"]
    shown = "-" if mean is None else f"{mean:.3f}"
    axes.set(title=f"Per class, {source} (mean IoU {shown})", ylim=(0, 1.1))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def _draw_matrix(figure, axes, result: dict, source: str) -> None:
    counts = np.array(result["confusion_matrix"], float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [entry["name"] for entry in result["per_class"]]
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(
        title=f"Confusion, {source} (share of the true class)",
        xlabel="predicted",
        ylabel="true",
    )
    if len(names) <= 16:
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 0.5 else "black"
            text = f"{share:.2f}"
            axes.text(
                column, row, text, ha="center", va="center", color=colour, fontsize=8
            )
    figure.colorbar(drawn, ax=axes, shrink=0.8)
