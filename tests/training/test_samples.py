"""Patches as training samples: reading, cache, order, batches, workers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from helpers import (
    IGNORE,
    SENTINEL,
    make_patch,
    patch_everywhere,
    settings,
    statistics,
    write_dataset,
    write_raster,
)

from common.distributed import ProcessGroup
from common.errors import DatasetError
from common.patches import PatchPair, list_pairs, read_patch
from model_training import (
    Normalization,
    dataset_normalization,
    normalize,
)
from training.loaders import (
    EpochBatchSampler,
    PatchLoader,
    collate,
    count_workers,
    make_loader,
    to_input,
)
from training.samples import (
    PatchCache,
    PatchDataset,
    Sample,
    SampleIndex,
    index_samples,
    make_cache,
)

CPU, RULE = torch.device("cpu"), Normalization("image")


def one_patch(
    folder: Path, image: np.ndarray, label: np.ndarray, name: str = "a", **options
) -> PatchPair:
    """Write a pair and return it."""
    return PatchPair(
        write_raster(folder / "images" / f"{name}.tif", image, **options),
        write_raster(folder / "labels" / f"{name}.tif", label),
    )


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


def test_patches_of_another_class_order_are_refused(make_dataset):
    """As of two extractions in one folder."""
    root = make_dataset(3, tags={"CLASS_NAMES": json.dumps(["water", "land"])})
    pairs = list_pairs(root, "train")
    with rasterio.open(pairs[2].label, "r+") as file:
        file.update_tags(CLASS_NAMES=json.dumps(["land", "water"]))
    expected = f"{pairs[2].label.name} holds the classes land, water, but other patches"
    with pytest.raises(DatasetError, match=expected):
        index_samples(pairs, 2, IGNORE)


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
    dataset = PatchDataset(found, IGNORE)
    [image], [mask] = network_input(dataset, 1, normalization=stats)
    raw, valid, label = read_patch(pairs[1])
    assert len(dataset) == 2
    assert (image.dtype, image.shape) == (torch.float32, (10, 32, 32))
    assert (mask.dtype, mask.shape) == (torch.int64, (32, 32))
    np.testing.assert_array_equal(image, normalize(raw, valid, stats))
    assert (mask[:4] == IGNORE).all() and (mask[4:].numpy() == label[4:]).all()
    assert not image[:, :4].any()


@pytest.mark.parametrize("ignore", [255, -1, 99])
def test_declared_label_nodata_becomes_the_ignore_index(make_dataset, ignore):
    root = make_dataset(1, label_nodata=200, unlabelled_rows=6)
    found = index_samples(list_pairs(root, "train"), 2, ignore)
    _, [mask] = network_input(PatchDataset(found, ignore), 0)
    assert (mask[-6:] == ignore).all()
    assert set(np.unique(mask[:-6])) == {0, 1}


def augmented(root: Path, seed: int = 5, cache: float = 0) -> PatchDataset:
    pairs = list_pairs(root, "train")
    found = index_samples(pairs, 2, IGNORE, cache=PatchCache(cache))
    return PatchDataset(found, IGNORE, "full", seed)


def network_input(dataset: PatchDataset, *items, normalization=RULE):
    """Images and masks of items of a dataset, as a network takes them."""
    batch = collate([dataset[item] for item in items])
    return to_input(batch, normalization, CPU)


def loader_of(dataset: PatchDataset, config, group=None, training=False) -> PatchLoader:
    return make_loader(dataset, RULE, config, group or ProcessGroup(), CPU, training)


def test_augmentation_depends_on_seed_and_draw_alone(make_dataset):
    root = make_dataset(6)
    one, other = augmented(root), augmented(root)
    draws = [Sample(index, 10 + index) for index in range(6)]
    forwards = network_input(one, *draws)
    backwards = network_input(other, *reversed(draws))
    for a, b in zip(forwards, backwards):
        assert torch.equal(a, b.flip(0))


@pytest.mark.parametrize(("seed", "turn"), [(6, 10), (5, 11)])
def test_another_seed_or_draw_varies_the_patches_otherwise(make_dataset, seed, turn):
    root = make_dataset(6)
    one, other = augmented(root), augmented(root, seed)
    images, _ = network_input(one, *(Sample(i, 10 * i) for i in range(1, 6)))
    others, _ = network_input(other, *(Sample(i, turn * i) for i in range(1, 6)))
    assert not torch.equal(images, others)


def test_an_index_alone_is_never_varied(make_dataset):
    dataset = augmented(make_dataset(1))
    plain = read_patch(dataset.pairs[0])
    patch, drawn = dataset[0]
    np.testing.assert_array_equal(patch.mask, plain[2])
    assert drawn is None


@pytest.mark.parametrize("augment", ["none", "symmetries", "full"])
def test_patches_vary_as_asked(make_dataset, augment):
    root = make_dataset(1)
    pairs = list_pairs(root, "train")
    found = index_samples(pairs, 2, IGNORE)
    dataset = PatchDataset(found, IGNORE, augment)
    image, mask = network_input(dataset, 0)
    turned, values = set(), 0
    for turn in range(40):
        varied, labels = network_input(dataset, Sample(0, turn))
        assert varied.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and varied.dtype == torch.float32
        turned.add(labels.numpy().tobytes())
        values += not torch.equal(varied.flatten().sort()[0], image.flatten().sort()[0])
    assert len(turned) == (1 if augment == "none" else 4)  # of stripes
    assert bool(values) == (augment == "full")
    assert mask.numpy().tobytes() in turned


def test_patches_of_other_types_share_a_batch(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, (32, 32)).astype(np.uint8)
    images = [rng.integers(1, 200, (3, 32, 32)).astype(t) for t in ("uint8", "uint16")]
    pairs = [one_patch(tmp_path, image, label, str(image.dtype)) for image in images]
    dataset = PatchDataset(index_samples(pairs, 2, IGNORE), IGNORE)
    rule = statistics(3)
    found, masks = network_input(dataset, 0, 1, normalization=rule)
    for image, one, mask in zip(images, found, masks):
        assert torch.equal(one, normalize(image, None, rule))
        np.testing.assert_array_equal(mask, label)


@pytest.mark.parametrize("cache", [0, math.inf])
def test_worker_processes_do_not_change_the_batches(make_dataset, cache):
    dataset = augmented(make_dataset(5), cache=cache)
    batches = []
    for workers in ("0", "2"):
        config = settings(batch_size=2, num_workers=workers)
        loader = loader_of(dataset, config, training=True)
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
    loader = loader_of(dataset, config, training=True)
    assert [len(images) for images, _ in loader] == sizes
    assert len(loader) == len(sizes)
    whole = loader_of(dataset, config)
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
    rest = count % (2 * size)
    lone = rest // size == 1 and count > 2 * size  # a patch for each
    left_out = rest if lone else count % size
    assert len(seen) == len(set(seen)) == count - left_out


def test_every_epoch_has_an_order_of_its_own():
    order = EpochBatchSampler(20, 4, 3, ProcessGroup())
    orders = []
    for epoch in (1, 2, 1):
        order.epoch = epoch
        orders.append(list(order))
    assert orders[0] == orders[2] != orders[1]
    turns = [draw.draw for epoch in orders[:2] for batch in epoch for draw in batch]
    assert len(set(turns)) == 40


@pytest.mark.parametrize("size", [2, 3])
def test_validation_batches_are_parted_without_duplicates(make_dataset, size):
    dataset = augmented(make_dataset(7))
    config = settings(batch_size=2, num_workers="0")
    loaders = [loader_of(dataset, config, ProcessGroup(r, size)) for r in range(size)]
    found = sum(len(images) for loader in loaders for images, _ in loader)
    assert found == 7


def test_the_cache_holds_the_first_patches_that_fit(make_dataset):
    pairs = list_pairs(make_dataset(4), "train")
    one = index_samples(pairs, 2, IGNORE, cache=PatchCache(math.inf)).decoded[0]
    found = index_samples(pairs, 2, IGNORE, cache=PatchCache(2.5 * one.nbytes))
    assert [patch is not None for patch in found.decoded] == [True, True, False, False]
    assert one.mask.dtype == np.uint8
    dataset = PatchDataset(found, IGNORE)
    plain = PatchDataset(index_samples(pairs, 2, IGNORE), IGNORE)
    assert not dataset.in_memory and plain.decoded == [None] * 4
    for index in range(4):
        for a, b in zip(dataset[index][0], plain[index][0]):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize("ignore", [-1, 255, 999, -9999])
def test_cached_masks_keep_every_value(make_dataset, ignore):
    root = make_dataset(1, label_nodata=200, unlabelled_rows=6)
    pairs = list_pairs(root, "train")
    found = index_samples(pairs, 2, ignore, cache=PatchCache(math.inf))
    _, [mask] = network_input(PatchDataset(found, ignore), 0)
    np.testing.assert_array_equal(mask, read_patch(pairs[0], ignore)[2])


def test_a_cached_patch_needs_no_file(make_dataset):
    dataset = augmented(make_dataset(2), cache=math.inf)
    for pair in dataset.pairs:
        pair.image.unlink()
    assert dataset.in_memory and len(list(map(dataset.__getitem__, range(2)))) == 2


def test_patches_that_must_all_fit_but_do_not_are_an_error(make_dataset):
    pairs = list_pairs(make_dataset(3), "train")
    with pytest.raises(DatasetError, match="--cache ram"):
        index_samples(pairs, 2, IGNORE, cache=PatchCache(30_000, must_fit=True))


@pytest.mark.parametrize(
    ("cache", "share", "whole"), [("auto", 0.25, False), ("ram", 0.8, True)]
)
def test_the_cache_takes_a_share_of_the_free_memory(monkeypatch, cache, share, whole):
    patch_everywhere(monkeypatch, "common.machine.free_memory", lambda: 1000)
    found = make_cache(settings(cache=cache))
    assert (found.left, found.must_fit) == (1000 * share, whole)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert make_cache(settings(cache=cache)).left == 500 * share
    assert make_cache(settings(cache="off")).left == 0


def test_workers_are_as_many_as_it_takes(make_dataset, monkeypatch):
    root = make_dataset(2)
    read, kept = augmented(root), augmented(root, cache=math.inf)
    patch_everywhere(monkeypatch, "common.machine.available_cores", lambda: 6)
    assert count_workers("auto", kept, 50, gpu=False) == 0
    assert count_workers("auto", read, 50, gpu=False) == 1
    # beside a GPU a thread prepares batches of patches that are in memory
    assert count_workers("auto", kept, 50, gpu=True) == 0
    assert count_workers("auto", read, 50, gpu=True) == 5
    assert count_workers("auto", read, 3, gpu=True) == 3
    assert count_workers("4", kept, 50, gpu=False) == 4
    patch_everywhere(monkeypatch, "common.machine.available_cores", lambda: 1)
    assert count_workers("auto", read, 50, gpu=True) == 1


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


def test_the_helper_dataset_can_be_read_by_tifffile_and_rasterio(tmp_path):
    import tifffile

    root = write_dataset(tmp_path, 1, 0, 0, bands=4)
    (pair,) = list_pairs(root, "train")
    image, valid, mask = read_patch(pair)
    assert valid.all() and set(np.unique(mask)) == {0, 1}
    assert tifffile.imread(pair.image).size == image.size
