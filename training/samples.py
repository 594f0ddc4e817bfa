"""Patches as training samples: one reading of a split, the cache."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from common.colours import Colour
from common.errors import DatasetError, SegmentationError
from common.interruption import until_stopped
from common.labels import class_codes_of, class_colours_of, class_names_of
from common.machine import free_memory
from common.patches import (
    PatchHeader,
    PatchPair,
    patch_bands,
    patch_pixel_size,
    read_header,
    read_patch,
)
from common.rasters import band_scaling, open_raster
from common.text import listed, number_dates
from training.augmentation import Variation, random_radiometry, random_symmetry
from training.settings import TrainingConfig

if TYPE_CHECKING:
    from common.console import Problems

SAMPLE_VALUES = 2**24  # kept for the percentiles of the training split, of all bands


class DecodedPatch(NamedTuple):
    """A decoded pair of files."""

    image: np.ndarray  # (C, H, W) in the file's dtype
    valid: np.ndarray  # (H, W) bool
    mask: np.ndarray  # (H, W) of the smallest dtype that holds it

    @classmethod
    def compact(cls, image, valid, mask) -> DecodedPatch:
        """With the mask in the smallest type that holds it."""
        kinds = map(np.min_scalar_type, (mask.min(), mask.max()))
        return cls(image, valid, mask.astype(np.result_type(*kinds)))

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.valid.nbytes + self.mask.nbytes


class PatchCache:
    """Decides which decoded patches stay in memory: the first that fit in ``limit`` bytes."""

    def __init__(self, limit: float, must_fit: bool = False):
        self.left, self.must_fit = limit, must_fit

    def keep(self, image, valid, mask) -> DecodedPatch | None:
        """The patch as it is kept, or None.

        Raises:
            DatasetError: It does not fit, and all patches ``must_fit``.
        """
        patch = DecodedPatch.compact(image, valid, mask)
        if patch.nbytes <= self.left:
            self.left -= patch.nbytes
            return patch
        if self.must_fit:
            raise DatasetError(
                "The patches do not fit in memory; leave --cache ram out, or take --cache off"
            )
        self.left = 0
        return None


def make_cache(config: TrainingConfig) -> PatchCache:
    """The cache of a run, for the share of the memory that is this process's."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = free_memory() / processes
    share = {"auto": 0.25, "ram": 0.8, "off": 0}[config.cache]
    return PatchCache(share * free, must_fit=config.cache == "ram")


@dataclass(frozen=True)
class SampleIndex:
    """What reading a list of patches once gives; ``subset`` gives the same for some of them."""

    pairs: list[PatchPair]
    counts: np.ndarray  # (patches, classes) int64: labelled pixels
    samples: list[np.ndarray]  # per patch (M, C): valid pixels, thinned at random
    shape: tuple[int, int, int]  # (C, H, W)
    descriptions: tuple[str | None, ...]
    class_names: list[str] | None
    decoded: list[DecodedPatch | None]  # those that stay in memory
    share: float = 1.0  # of the valid pixels that the samples hold
    pixel_size: float | None = None  # metres, see ``common_tags``
    scaling: tuple[list[float], list[float]] | None = None  # likewise
    class_codes: list[int | str] | None = None  # what the classes' values were
    class_colours: list[Colour | None] | None = None
    headers: tuple[PatchHeader, ...] = ()  # of the whole dataset, also in a subset

    def subset(self, indices: Iterable[int]) -> SampleIndex:
        chosen = list(indices)
        return replace(
            self,
            pairs=[self.pairs[i] for i in chosen],
            counts=self.counts[chosen],
            samples=[self.samples[i] for i in chosen],
            decoded=[self.decoded[i] for i in chosen],
        )

    def __add__(self, other: SampleIndex) -> SampleIndex:
        share = min(self.share, other.share)
        return replace(
            self,
            pairs=self.pairs + other.pairs,
            counts=np.concatenate([self.counts, other.counts]),
            samples=self.thinned_samples(share) + other.thinned_samples(share),
            decoded=self.decoded + other.decoded,
            share=share,
            headers=self.headers + other.headers,
        )

    def beside(self, *others: SampleIndex | None) -> SampleIndex:
        """The same patches, with what those of other splits say of themselves."""
        headers = [self.headers, *(other.headers for other in others if other)]
        return replace(self, headers=tuple(chain(*headers)))

    def thinned_samples(self, share: float) -> list[np.ndarray]:
        """The samples with a smaller share of the valid pixels, so that those of both parts of a
        sum weigh alike.
        """
        if share >= self.share:
            return self.samples
        rng, kept = np.random.default_rng(1), share / self.share
        return [sample[rng.random(len(sample)) < kept] for sample in self.samples]


def index_samples(
    pairs: Sequence[PatchPair],
    num_classes: int,
    ignore_index: int,
    like: SampleIndex | None = None,
    cache: PatchCache | None = None,
    problems: Problems | None = None,
) -> SampleIndex | None:
    """Read every patch once: check it, count its classes, sample its pixels, keep it if it fits.

    Args:
        pairs: Patches of one split.
        num_classes: Classes that labels may hold, 0..num_classes-1.
        ignore_index: The other value that they may hold.
        like: An index whose size, bands and band order these patches must have too.
        cache: What decides which of them stay in memory; None for none.
        problems: Where to note patches that cannot be used, and continue without them; None to stop
            at the first.

    Returns:
        The index; None where no patch can be used.

    Raises:
        SegmentationError: See ``read_like``.
    """
    good, headers, counts, samples, decoded = [], [], [], [], []
    rng, cache = np.random.default_rng(0), cache or PatchCache(0)
    first, share = like, 1.0
    bar = {"unit": "patch", "leave": False, "disable": None}
    for pair in until_stopped(tqdm(pairs, "reading patches", **bar)):
        try:
            patch, header, first = read_like(first, pair, num_classes, ignore_index)
        except (SegmentationError, OSError) as error:
            if problems is None:
                raise
            problems.note(str(error), (pair.image, pair.label))
            continue
        good.append(pair)
        headers.append(header)
        image, valid, mask = patch
        known = (mask >= 0) & (mask < num_classes)
        counts.append(np.bincount(mask[known], minlength=num_classes))
        pixels = image[:, valid].T
        # one share for all patches, so that each pixel of the split weighs alike
        share = min(1.0, SAMPLE_VALUES / (len(pairs) * image.size))
        kept = rng.random(len(pixels)) < share if share < 1 else slice(None)
        samples.append(pixels[kept].copy())
        decoded.append(cache.keep(*patch))
    if not good:
        return None
    return replace(
        first,
        pairs=good,
        counts=np.stack(counts),
        samples=samples,
        decoded=decoded,
        share=share,
        headers=tuple(headers),
        **common_tags(good),
    )


def common_tags(pairs: Sequence[PatchPair]) -> dict:
    """What some of the patches, spread over all, say of themselves.

    Returns:
        "pixel_size": their median in metres, None where none is known; "scaling": the scales and
        offsets that they declare, None where they do not, or differ.
    """
    scalings = []
    for pair in pairs[:: math.ceil(len(pairs) / 16)]:
        with open_raster(pair.image) as file:
            scalings.append(band_scaling(file, patch_bands(file)))
    alike = all(scaling == scalings[0] for scaling in scalings)
    return {
        "pixel_size": patch_pixel_size(pairs),
        "scaling": scalings[0] if alike else None,
    }


def band_quartiles(samples: Sequence[np.ndarray]) -> list[list[float]] | None:
    """The quartiles, per band a list of three, of sampled pixels (M, C) each; None without any."""
    pixels = np.concatenate(samples)
    return (
        np.percentile(pixels, [25, 50, 75], axis=0).T.tolist() if len(pixels) else None
    )


def read_like(
    first: SampleIndex | None, pair: PatchPair, num_classes: int, ignore_index: int
) -> tuple[tuple, PatchHeader, SampleIndex]:
    """Read a patch that must be like the first of its index.

    Returns:
        Its image, valid pixels and mask; its header; what all of them share.

    Raises:
        DatasetError: It is unreadable, of another size or with other bands than the first, or its
            label holds a value that is no class.
    """
    patch = image, _, mask = read_patch(pair, ignore_index)
    header = read_header(pair.image)
    described = header.descriptions
    with open_raster(pair.label) as file:
        names, codes = class_names_of(file), class_codes_of(file)
        colours = class_colours_of(file)
    if first is None:
        first = SampleIndex(
            [], np.empty(0), [], image.shape, described, names, [],
            class_codes=codes, class_colours=colours,
        )  # fmt: skip
    if image.shape != first.shape:
        raise DatasetError(
            f"{pair.image} has (bands, height, width) {image.shape}, but other patches have "
            f"{first.shape}; all patches need one size and the same bands"
        )
    differ = number_dates(described) != number_dates(first.descriptions)
    if differ and all(described) and all(first.descriptions):
        raise DatasetError(
            f"The bands of {pair.image} are {', '.join(described)}, but other patches have "
            f"{', '.join(first.descriptions)}"
        )
    if names and first.class_names and names != first.class_names:
        raise DatasetError(
            f"{pair.label} holds the classes {listed(names[:6])}, but other patches "
            f"{listed(first.class_names[:6])}; extract all of them with the same --label_values"
        )
    known = (mask >= 0) & (mask < num_classes)
    strange = np.unique(mask[~known & (mask != ignore_index)])
    if strange.size:
        raise DatasetError(
            f"{pair.label} holds {', '.join(map(str, strange[:8]))}: labels are 0.."
            f"{num_classes - 1}, or {ignore_index} for unlabelled (see --classes, "
            "--ignore_index, and --label_values of the extraction)"
        )
    return patch, header, first


class Sample(NamedTuple):
    """A patch to train on, and the number of this draw in the whole run."""

    index: int
    draw: int


class PatchDataset:
    """Patches as they are stored: a map-style dataset for ``torch.utils.data.DataLoader``.

    An item is a ``DecodedPatch`` and its variation, None for as it is; batches are varied and become
    network input on the device (``training.loaders``). It is asked for by index, or by a ``Sample``,
    which is varied as ``augment`` says (see ``--data_augmentation``); the variation depends on the seed
    and the draw alone, so worker processes do not change it.
    """

    def __init__(
        self,
        index: SampleIndex,
        ignore_index: int,
        augment: str = "none",
        seed: int = 0,
    ):
        self.pairs, self.decoded = index.pairs, index.decoded
        self.shape, self.dtype = index.shape, index.samples[0].dtype
        self.ignore_index = ignore_index
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def item_bytes(self) -> int:
        """Of an image, its valid pixels and its mask, in types as wide as the first patch's."""
        bands, height, width = self.shape
        return (self.dtype.itemsize * bands + 2) * height * width

    @property
    def in_memory(self) -> bool:
        """Whether no item needs a file."""
        return None not in self.decoded

    def without_cache(self) -> PatchDataset:
        """The same patches, all read from their files."""
        other = copy(self)
        other.decoded = [None] * len(self)
        return other

    def __getitem__(self, item: int | Sample) -> tuple[DecodedPatch, Variation | None]:
        index, draw = item if isinstance(item, Sample) else (item, None)
        patch = self.decoded[index] or DecodedPatch.compact(
            *read_patch(self.pairs[index], self.ignore_index)
        )
        if self.augment == "none" or draw is None:
            return patch, None
        rng = np.random.default_rng([self.seed, draw])
        symmetry = random_symmetry(patch.mask.shape, rng)
        full = self.augment == "full"
        radiometry = random_radiometry(self.shape[0], rng) if full else None
        return patch, Variation(symmetry, radiometry)
