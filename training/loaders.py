"""Batches of patches: in order or shuffled, by processes that prepare them, onto a device."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.devices import to_device
from common.distributed import ProcessGroup
from common.errors import DatasetError, require
from common.machine import available_cores, free_memory, prefetch
from model_training import Normalization, normalize
from training.augmentation import (
    Radiometry,
    Symmetry,
    Variation,
    jitter_radiometry,
    radiometry_table,
    turn_patches,
)
from training.samples import DecodedPatch, PatchDataset, Sample
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")

MOST_AHEAD = 4  # batches that each process prepares


class EpochBatchSampler:
    """Batches of ``Sample`` in an order that depends on seed and epoch alone.

    Each process gets its part of every batch. What is left at the end is left out where a process
    would get a single patch of it, since normalization layers after global pooling cannot train on
    that, and so is what cannot be shared evenly among the processes.
    """

    def __init__(self, count: int, batch_size: int, seed: int, group: ProcessGroup):
        self.count, self.seed, self.group = count, seed, group
        self.joint = batch_size * group.size  # a batch of all processes
        rest = count % self.joint
        left_out = rest % group.size
        if rest // group.size == 1 and batch_size > 1 and count > self.joint:
            left_out = rest
        self.used = count - left_out
        self.epoch = 1

    def __len__(self) -> int:
        return math.ceil(self.used / self.joint)

    def joint_batches(self) -> Iterator[list[Sample]]:
        """The batches of an epoch, each of all processes together."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        first = self.epoch * self.count
        samples = [Sample(int(i), first + place) for place, i in enumerate(order)]
        for start in range(0, self.used, self.joint):
            yield samples[start : min(start + self.joint, self.used)]

    def __iter__(self) -> Iterator[list[Sample]]:
        for batch in self.joint_batches():
            yield batch[self.group.rank :: self.group.size]

    def sums(self, values: np.ndarray) -> list:
        """What a value per patch adds up to in each joint batch of the epoch."""
        return [
            values[[s.index for s in batch]].sum().item()
            for batch in self.joint_batches()
        ]


class RawBatch(NamedTuple):
    """Patches as they are stored, and how they are to be varied."""

    images: Tensor  # (N, C, H, W) of the files' type
    valid: Tensor  # (N, H, W) bool
    masks: Tensor  # (N, H, W) of the smallest type that holds them
    symmetries: list[Symmetry]  # empty: none is turned
    drawn: list[Radiometry]  # empty: the values stay as they are
    table: Tensor | None  # (N, 2 + C), see ``radiometry_table``


def collate(
    items: Sequence[tuple[DecodedPatch, Variation | None]], pinned: bool = False
) -> RawBatch:
    """Stack items of a ``PatchDataset``, in memory that a GPU reads without waiting if ``pinned``."""
    patches, variations = zip(*items)
    symmetries = [one.symmetry for one in variations if one]  # of all or of none
    drawn = [one.radiometry for one in variations if one and one.radiometry]  # likewise
    bands = len(patches[0].image)
    table = stack(radiometry_table(drawn, bands), pinned) if drawn else None
    parts = (stack(arrays, pinned) for arrays in zip(*patches))
    return RawBatch(*parts, symmetries, drawn, table)


def stack(arrays: Sequence[np.ndarray], pinned: bool) -> Tensor:
    """One tensor of arrays of equal shape, of the type that holds them all."""
    shape = len(arrays), *arrays[0].shape
    dtype = torch.from_numpy(np.empty(0, np.result_type(*arrays))).dtype
    tensor = torch.empty(shape, dtype=dtype, pin_memory=pinned)
    np.stack(arrays, out=tensor.numpy())
    return tensor


def to_input(
    batch: RawBatch, normalization: Normalization, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A batch on a device as a network takes it; the batch itself is used up.

    Returns:
        Images (N, C, H, W) float32 in [0, 1], channels-last; masks (N, H, W) int64.
    """
    images, valid, masks = (to_device(part, device) for part in batch[:3])
    images = normalize(images, valid, normalization)
    images = images.contiguous(memory_format=torch.channels_last)
    masks = masks.long()
    if batch.symmetries:
        for part in images, valid, masks:
            turn_patches(part, batch.symmetries)
    if batch.drawn:
        table = to_device(batch.table, device)
        images = jitter_radiometry(images, valid, batch.drawn, table)
    return images, masks


class PatchLoader:
    """The batches of a ``DataLoader`` on a device: what ``to_input`` gives for each.

    Beside a GPU a thread makes the next batch.
    """

    def __init__(
        self, loader: DataLoader, normalization: Normalization, device: torch.device
    ):
        self.loader, self.normalization, self.device = loader, normalization, device
        self.batch_sampler = loader.batch_sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        ahead = prefetch if self.device.type == "cuda" else contextlib.nullcontext
        with ahead(self.loader) as batches:
            for batch in batches:
                yield to_input(batch, self.normalization, self.device)


def make_loader(
    dataset: PatchDataset,
    normalization: Normalization,
    config: TrainingConfig,
    group: ProcessGroup,
    device: torch.device,
    training: bool = False,
) -> PatchLoader:
    """Batches on a device: shuffled to train on, or in order.

    Several processes share each batch of ``training``; of batches in order each process takes its
    turn.
    """
    count, size, gpu = len(dataset), config.batch_size, device.type == "cuda"
    if training:
        batches = EpochBatchSampler(count, size, config.seed, group)
        if not len(batches):
            raise DatasetError(
                f"{count} training patches are too few for {group.size} processes"
            )
    else:
        batches = [range(i, min(i + size, count)) for i in range(0, count, size)]
        batches = batches[group.rank :: group.size]
    asked = config.num_workers
    workers = count_workers(asked, dataset, len(batches), gpu)
    workers, prepared = bound_workers(asked, workers, size * dataset.item_bytes)
    ahead = {}
    if workers:
        ahead["prefetch_factor"] = prepared
        if gpu or torch.distributed.is_initialized():
            # forks of a process that has threads of a GPU or of collectives can hang; processes
            # that are not forked would each get a copy of the patches in memory, and read the
            # files instead
            dataset = dataset.without_cache()
            methods = multiprocessing.get_all_start_methods()
            context = "forkserver" if "forkserver" in methods else "spawn"
            ahead["multiprocessing_context"] = context
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=gpu and workers > 0,
        # without workers batches are stacked in pinned memory at once
        collate_fn=partial(collate, pinned=gpu and not workers),
        worker_init_fn=end_with_parent if workers else None,
        # else each iterator draws from the generator that dropout draws from
        generator=torch.Generator().manual_seed(config.seed),
        **ahead,
    )
    return PatchLoader(loader, normalization, device)


def end_with_parent(_) -> None:
    """Have this process, which prepares batches, end when the one that trains does, not before it.

    Ctrl-C in a terminal reaches all processes; this one leaves it to the one that trains.

    PyTorch's looks whether the process that started it is another one by now. That is a process in
    between where it was not forked, which lives as long as those that it has started.
    """

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end, daemon=True).start()


def count_workers(asked: str, dataset: PatchDataset, batches: int, gpu: bool) -> int:
    """How many processes prepare batches."""
    if asked != "auto":
        return min(int(asked), batches)
    if dataset.in_memory:
        return 0
    if not gpu:
        return min(1, batches)
    return min(8, max(1, available_cores() - 1), batches)


def bound_workers(asked: str, workers: int, batch_bytes: int) -> tuple[int, int]:
    """How many processes prepare batches, and how many batches each, within the shared memory.

    All of a loader take at most a quarter of it, since training and validation have one each.

    Args:
        asked: ``--num_workers``.
        workers: How many there would be without a limit.
        batch_bytes: Of a batch.

    Raises:
        OptionError: Not one batch fits, and a number of processes was asked for.
    """
    if not workers:
        return 0, 0
    loaders = 4 * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = free_shared_memory()
    fitting = int(free // (loaders * batch_bytes))
    if not fitting:
        why = (
            f"a batch of {batch_bytes / 1e6:.0f} MB is too large for the {free / 1e6:.0f} MB that "
            "are free in /dev/shm (docker run --shm-size 2g gives more)"
        )
        require(asked == "auto", "--num_workers", asked, f"0: {why}")
        log.warning("no other process prepares batches: %s", why)
        return 0, 0
    workers = min(workers, fitting)
    return workers, min(MOST_AHEAD, fitting // workers)


def free_shared_memory(folder: str = "/dev/shm") -> int:
    """Bytes in which processes can hand over batches: of memory, and of ``folder`` if it exists."""
    room = free_memory()
    return min(room, shutil.disk_usage(folder).free) if Path(folder).is_dir() else room
