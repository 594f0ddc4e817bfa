"""Faults of the training of version 1.1 that must not come back, by their numbers."""

from __future__ import annotations

import functools
import itertools
import math
import os
import signal
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from helpers import (
    IGNORE,
    ORIGIN,
    QUICK,
    make_patch,
    patch_everywhere,
    run_main,
    settings,
    signal_during,
    train,
    write_dataset,
    write_raster,
)
from training_helpers import origin_of

from common.devices import deterministic, report_not_deterministic
from common.distributed import ProcessGroup, translate_torch_error
from common.errors import OptionError, SegmentationError
from common.patches import list_pairs
from evaluation.calibration import LogitSample
from model_training import Normalization, build_loss
from training import epochs
from training.assessment import HeldOutCollector
from training.cross_validation import median_rates
from training.dataset import log_weak_spots, unlabelled_text
from training.folds import plan_all_folds
from training.loaders import (
    MOST_AHEAD,
    EpochBatchSampler,
    bound_workers,
    make_loader,
)
from training.loop import Stepper, evaluate, train_one_epoch
from training.run import TrainingRun, make_stepper
from training.samples import PatchDataset, SampleIndex, index_samples

fault = pytest.mark.fault
CPU = torch.device("cpu")


def index_of(root, split: str) -> SampleIndex:
    return index_samples(list_pairs(root, split), 2, IGNORE)


# --- percentiles ----------------------------------------------------------------------------


@fault(7)
def test_pixels_of_pooled_splits_weigh_alike(make_dataset, monkeypatch):
    root = make_dataset(8, 2, 0, bands=1)
    for file in root.rglob("images/*.tif"):
        value = 20 if "validation" in file.parts else 10
        pixels = np.full((1, 32, 32), value, np.uint16)
        write_raster(file, pixels, origin=origin_of(file))
    patch_everywhere(monkeypatch, "training.samples.SAMPLE_VALUES", 1024)
    train, validation = index_of(root, "train"), index_of(root, "validation")
    for pooled in (train + validation, validation + train):
        pixels = np.concatenate(pooled.samples)
        assert (pixels == 20).mean() == pytest.approx(0.2, abs=0.04)
        assert pooled.share == 1 / 8
        assert len(pixels) == pytest.approx(10 * 1024 / 8, rel=0.15)


@fault(7)
def test_logits_of_folds_of_unequal_size_weigh_alike(make_dataset, monkeypatch):
    index = index_of(make_dataset(6), "train")
    labelled = int(index.counts.sum())
    parts = [index.subset(range(1)), index.subset(range(1, 6))]
    shares = {HeldOutCollector(part, labelled, 0).sample.share for part in parts}
    assert shares == {LogitSample(labelled).share}


# --- labelled pixels ------------------------------------------------------------------------


def sparse_batches(*labelled: int) -> list:
    """Batches of 2 patches of 8 x 8 pixels, of which so many are labelled."""
    torch.manual_seed(0)
    batches = []
    for count in labelled:
        mask = torch.full((2 * 64,), IGNORE)
        mask[:count] = torch.arange(count) % 2
        batches.append((torch.rand(2, 1, 8, 8), mask.view(2, 8, 8)))
    return batches


def network_and_stepper(**options) -> tuple:
    torch.manual_seed(1)
    network = torch.nn.Conv2d(1, 1, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return network, Stepper(optimizer, scaler, **options)


@fault(15)
@pytest.mark.parametrize("training", [True, False])
def test_the_mean_loss_is_that_of_labelled_pixels(training):
    batches = sparse_batches(0, 3, 128, 40)
    loss = build_loss("ce", "binary", IGNORE)
    network, stepper = network_and_stepper()
    images, masks = map(torch.cat, zip(*batches))
    expected = loss(network(images), masks).item()
    if training:
        stepper.optimizer.param_groups[0]["lr"] = 0.0
        found = train_one_epoch(network, batches, loss, stepper, CPU)
    else:
        found, _ = evaluate(network, batches, loss, CPU, 2)
    assert found == pytest.approx(expected, rel=1e-5)


@fault(15)
def test_a_step_without_a_labelled_pixel_changes_nothing_but_the_schedule():
    loss = build_loss("dice+ce", "binary", IGNORE)
    network, stepper = network_and_stepper(accumulate=2)
    optimizer = stepper.optimizer
    stepper.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = network.weight.detach().clone()
    batches = sparse_batches(0, 0)
    train_one_epoch(network, batches, loss, stepper, CPU, labelled=[0, 0])
    assert torch.equal(network.weight, before) and not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.05
    train_one_epoch(network, sparse_batches(0, 5), loss, stepper, CPU, labelled=[0, 5])
    moved = network.weight.detach().clone()
    assert not torch.equal(moved, before)
    train_one_epoch(network, batches, loss, stepper, CPU, labelled=[0, 0])  # momentum
    assert torch.equal(network.weight, moved)


@fault(15)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_know_alike_which_batches_have_labels(size):
    values = np.zeros(20, np.int64)
    values[[3, 4]] = 7, 5
    found = []
    for rank in range(size):
        sampler = EpochBatchSampler(20, 2, 0, ProcessGroup(rank, size))
        sampler.epoch = 4
        found.append(sampler.sums(values))
        own = [int(values[[s.index for s in batch]].sum()) for batch in sampler]
        assert len(own) == len(found[-1])
        assert all(mine <= joint for mine, joint in zip(own, found[-1]))
    assert all(sums == found[0] for sums in found)
    assert size > 1 or found[0] == own


@fault(15)
def test_a_run_leaves_out_the_steps_without_labels(make_dataset, tmp_path, monkeypatch):
    root = make_dataset(6, 2, 0, bands=3)
    for file in sorted(root.rglob("train/labels/*.tif"))[1:]:
        write_raster(file, np.full((32, 32), IGNORE, np.uint8), origin=origin_of(file))
    steps, plain = [], Stepper.step

    def step(self, labelled=True):
        steps.append(labelled)
        plain(self, labelled)

    monkeypatch.setattr(Stepper, "step", step)
    train(root, tmp_path / "out", "--batch_size", 2, "--epochs", 2)
    assert sorted(steps) == [False] * 4 + [True] * 2


# --- folds ----------------------------------------------------------------------------------


def dates_of_places(root, places: int = 8, dates: int = 3, **options):
    """A dataset of one band: several patches of each place, some nearly on top of each other."""
    rng = np.random.default_rng(0)
    for number in range(places * dates):
        image, label = make_patch(rng, 1, 2, (32, 32), "uint8")
        place, date = number % places, number // places
        origin = (ORIGIN[0] + 320 * place + 10 * date, ORIGIN[1])
        split = "train" if number % 3 else "validation"
        for kind, pixels in (("images", image), ("labels", label)):
            path = root / split / kind / f"place{place}_{date}.tif"
            write_raster(path, pixels, origin=origin, **options)
    return root


def place_of(name: str) -> str:
    return name.partition("_")[0]


@fault(53)
@pytest.mark.parametrize("fold_by", ["random", "block", "column", "both"])
def test_dates_of_a_place_are_in_one_fold(tmp_path, fold_by):
    root = dates_of_places(tmp_path)
    size = {} if fold_by == "random" else {"block_size": 330.0}
    config = settings(val_strategy="kfold", n_splits=3, fold_by=fold_by, **size)
    pooled = index_of(root, "train") + index_of(root, "validation")
    plans, blocks = plan_all_folds(config, pooled)
    places = [place_of(pair.name) for pair in pooled.pairs]
    assert len(set(zip(places, blocks))) == len(set(places)) == 8
    for folds in plans.values():
        for fold in folds:
            parts = (fold.train, fold.validation, fold.held_out)
            kept = [{places[i] for i in part} for part in parts]
            assert all(a.isdisjoint(b) for a, b in itertools.combinations(kept, 2))


@fault(53)
def test_patches_without_a_known_place_are_drawn_one_by_one(tmp_path):
    root = dates_of_places(tmp_path, 4, 2, crs=None)
    config = settings(val_strategy="kfold", n_splits=8)
    pooled = index_of(root, "train") + index_of(root, "validation")
    plans, blocks = plan_all_folds(config, pooled)
    assert [len(fold.held_out) for fold in plans["random"]] == [1] * 8
    assert blocks.tolist() == list(range(8))


@fault(53)
def test_the_report_names_what_each_fold_held_out(tmp_path):
    root = dates_of_places(tmp_path / "data", 6, 2)
    run = train(
        root,
        tmp_path / "out",
        "--val_strategy",
        "kfold",
        "--n_splits",
        2,
        "--epochs",
        1,
    )
    names = [fold["held_out_names"] for fold in run.report["folds"]]
    images = sorted(file.stem for file in root.rglob("images/*.tif"))
    assert sorted(names[0] + names[1]) == images
    assert {place_of(n) for n in names[0]}.isdisjoint(map(place_of, names[1]))


@pytest.mark.slow
@fault(16)
@pytest.mark.parametrize("scheduler", ["cosine", "plateau"])
def test_the_final_model_of_kfold_has_the_learning_rates_of_the_folds(
    make_dataset, tmp_path, monkeypatch, scheduler
):
    best = iter([0.1, 0.2, 0.9, 0.3] + [0.1, 0.2, 0.9, 0.8])
    monkeypatch.setattr("training.epochs.combined_score", lambda _: next(best))
    losses, plain = iter([3.0, 3.0, 3.0, 3.0, 1.0, 3.0, 2.0, 1.0]), epochs.evaluate
    monkeypatch.setattr(
        "training.epochs.evaluate", lambda *a, **o: (next(losses), plain(*a, **o)[1])
    )
    impatient = functools.partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0
    )
    monkeypatch.setattr(
        "training.loop.lr_scheduler.ReduceLROnPlateau",
        lambda optimizer, **_: impatient(optimizer, factor=0.5),
    )
    root = make_dataset(6, 0, 0, bands=2)
    words = ["--val_strategy", "kfold", "--n_splits", 2, "--scheduler", scheduler]
    words += ["--epochs", 4, "--patience", 0, "--batch_size", 2, "--warmup_epochs", 1]
    report = train(root, tmp_path / "out", *words).report
    assert report["final_epochs"] == 3
    folds = [
        [row["learning_rate"] for row in fold["history"]] for fold in report["folds"]
    ]
    final = [row["learning_rate"] for row in report["history"]]
    assert final == pytest.approx(np.median(folds, axis=0)[:3].tolist())


@fault(16)
def test_the_steps_of_a_schedule_are_those_of_all_epochs():
    config = settings(scheduler="onecycle", epochs=8)
    run = TrainingRun(config, None, None, Path("out"), [], 3, CPU)
    run.model = torch.nn.Conv2d(1, 1, 1)
    _, scheduler = make_stepper(run, 5)
    assert scheduler.total_steps == 8 * 5


@fault(16)
def test_rates_of_plateau_are_the_median_of_the_folds_that_came_so_far():
    histories = [
        [{"learning_rate": rate} for rate in rates]
        for rates in ([4, 4, 2], [4, 1], [4, 3, 3, 1])
    ]
    assert median_rates(histories, 4) == [4, 3, 2.5, 1]


# --- losses that are no number --------------------------------------------------------------


def loss_of(values) -> Callable:
    """A loss that has these values in turn, with a gradient."""
    values = iter(values)
    return lambda logits, masks: logits.sum() * 0 + next(values)


@fault(32)
@pytest.mark.parametrize("training", [True, False])
def test_batches_that_overflow_in_fp16_are_left_out_of_the_mean_and_counted(
    caplog, monkeypatch, training
):
    monkeypatch.setattr("training.loop.autocast", lambda *_: nullcontext())
    loss = loss_of([1.0, math.inf, 4.0, math.nan])
    network, stepper = network_and_stepper()
    batches = sparse_batches(10, 20, 5, 7)
    # as a scaler does for gradients that are no number
    monkeypatch.setattr(Stepper, "step", lambda *_: None)
    if training:
        found = train_one_epoch(network, batches, loss, stepper, CPU, "fp16")
    else:
        found, _ = evaluate(network, batches, loss, CPU, 2, None, "fp16")
    assert found == pytest.approx((10 * 1.0 + 5 * 4.0) / 15)
    assert "2 of 4 batches overflowed in fp16" in caplog.text


@fault(32)
@pytest.mark.parametrize(
    ("precision", "first"), [("fp32", 1), ("bf16", 1), ("fp16", 50)]
)
def test_a_loss_that_is_no_number_is_seen_within_50_batches(
    monkeypatch, precision, first
):
    monkeypatch.setattr("training.loop.autocast", lambda *_: nullcontext())
    monkeypatch.setattr(Stepper, "step", lambda *_: steps.append(1))
    steps = []
    loss = loss_of([math.nan] * first + [1.0] * (200 - first))
    network, stepper = network_and_stepper()
    with pytest.raises(SegmentationError, match="no longer a number"):
        train_one_epoch(
            network, sparse_batches(*[4] * 200), loss, stepper, CPU, precision
        )
    assert len(steps) == 50


@fault(32)
def test_a_last_batch_that_overflows_alone_ends_no_run(monkeypatch):
    monkeypatch.setattr("training.loop.autocast", lambda *_: nullcontext())
    monkeypatch.setattr(Stepper, "step", lambda *_: None)
    network, stepper = network_and_stepper()
    loss, batches = loss_of([1.0] * 50 + [math.inf]), sparse_batches(*[4] * 51)
    assert train_one_epoch(network, batches, loss, stepper, CPU, "fp16") == 1


# --- shared memory --------------------------------------------------------------------------


@fault(33)
@pytest.mark.parametrize(
    ("free", "expected"),
    [(math.inf, (8, MOST_AHEAD)), (4 * 16 * 100, (8, 2)), (4 * 3 * 100, (3, 1))],
)
def test_batches_ahead_keep_to_the_shared_memory(monkeypatch, free, expected):
    monkeypatch.setattr("training.loaders.free_shared_memory", lambda: min(free, 2**60))
    assert bound_workers("auto", 8, 100) == expected
    workers, prepared = expected
    assert workers * prepared * 100 * 2 <= free / 2  # of two loaders


@fault(33)
def test_a_batch_larger_than_the_shared_memory_is_a_clear_error(
    make_dataset, monkeypatch, caplog
):
    index = index_of(make_dataset(4), "train")
    dataset, rule = PatchDataset(index, IGNORE), Normalization("image")
    monkeypatch.setattr("training.loaders.free_shared_memory", lambda: 30_000)
    with pytest.raises(OptionError, match="--num_workers 2: expected 0.*--shm-size"):
        make_loader(dataset, rule, settings(num_workers="2"), ProcessGroup(), CPU)
    loader = make_loader(dataset, rule, settings(), ProcessGroup(), CPU)
    assert loader.loader.num_workers == 0 and "--shm-size" in caplog.text


@fault(33)
@pytest.mark.parametrize(
    "text",
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory. Please try to raise your limit."
        ),
        "unable to write to file </torch_17_1>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_1>: Success (0)",
    ],
)
def test_full_shared_memory_is_named(text):
    message = translate_torch_error(RuntimeError(text), CPU, "--batch_size")
    assert message.startswith("The shared memory (/dev/shm) is too small")


# --- the same numbers again -----------------------------------------------------------------


@fault(19)
def test_a_gpu_trains_by_deterministic_algorithms_and_names_those_it_lacks(caplog):
    report_not_deterministic.cache_clear()
    gpu = torch.device("cuda:0")  # its settings alone are needed
    missing = "adaptive_avg_pool2d_backward_cuda does not have a deterministic "
    missing += "implementation, but you set 'torch.use_deterministic_algorithms(True)'"
    for _ in range(2):
        with warnings.catch_warnings(record=True) as passed, deterministic(gpu):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            warnings.warn(missing, stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        assert [str(warning.message) for warning in passed] == ["something else"]
        assert not torch.are_deterministic_algorithms_enabled()
    named = "the same seed can give other numbers: on a GPU adaptive_avg_pool2d_backward_cuda"
    assert caplog.text.count(named) == 1
    with deterministic(CPU):
        assert not torch.are_deterministic_algorithms_enabled()


@fault(19)
def test_a_run_trains_by_deterministic_algorithms(make_dataset, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    plain, found = deterministic, []

    def on_a_gpu(device):
        return plain(torch.device("cuda:0"))

    def step(self, labelled=True):
        found.append(torch.are_deterministic_algorithms_enabled())

    monkeypatch.setattr("training.epochs.deterministic", on_a_gpu)
    monkeypatch.setattr(Stepper, "step", step)
    train(make_dataset(2, 1, 0, bands=2), tmp_path / "out", "--epochs", 1)
    assert found and all(found)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


# --- hopeless data --------------------------------------------------------------------------


def weak_data(root):
    """Four classes, of which training has two, validation all but one, and the test one."""
    write_dataset(root, 3, 1, 1, bands=2, classes=3)
    for file in root.rglob("labels/*.tif"):
        label = np.full((32, 32), IGNORE, np.uint8)
        label[0, :10] = (
            np.arange(10) % {"train": 2, "validation": 3, "test": 1}[file.parts[-3]]
        )
        write_raster(file, label, origin=origin_of(file))
    return root


WEAK = ("--mode", "multiclass", "--classes", 4, "--class_names", "a,b,c,d")


@fault(59)
@pytest.mark.parametrize("check", [(), ("--check",)])
def test_data_that_cannot_be_learned_from_is_said_in_a_line_each(tmp_path, check):
    root = weak_data(tmp_path / "data")
    words = ("--dataset_root", root, "--save_dir", tmp_path / "out", *QUICK, *WEAK)
    status, _, err = run_main(*words, "--batch_size", 2, *check)
    assert status == 0
    assert err.count("2 of 4 classes without a training pixel (c, d): the model") == 1
    assert err.count("1 of 4 classes without a validation pixel (d): the best") == 1
    assert err.count("3 of 4 classes without a test pixel (b, c, d): mapped") == 1
    assert err.count("few steps of the weights per epoch (1): lower --batch_size") == 1
    assert err.count("the temperature is fitted on 10 pixels alone") == 1


@fault(59)
def test_kfold_says_it_of_all_its_patches(tmp_path):
    root = weak_data(tmp_path / "data")
    words = ("--dataset_root", root, "--save_dir", tmp_path / "out", *QUICK, *WEAK)
    folds = ("--val_strategy", "kfold", "--n_splits", 2, "--check")
    status, _, err = run_main(*words, *folds, "--no_calibration")
    assert status == 0
    assert "1 of 4 classes without a training pixel (d)" in err
    assert "fold 1, 2: 1 of 4 classes without a validation pixel (c)" in err
    assert "temperature" not in err


@fault(59)
def test_ordinary_data_is_not_warned_of(make_dataset, caplog):
    root = make_dataset(10, 4, 2, bands=1)
    parts = [index_of(root, split) for split in ("train", "validation", "test")]
    log_weak_spots(settings(batch_size=1), *parts, ProcessGroup())
    assert not caplog.records


@fault(59)
def test_no_unlabelled_pixel_is_not_a_share_of_zero(make_dataset):
    index = index_of(make_dataset(2), "train")
    assert unlabelled_text(index) == "no pixel unlabelled"
    index.counts[0, 0] -= 1
    assert unlabelled_text(index) == "less than 0.1 % of the pixels unlabelled"
    index.counts[0, 0] -= 204
    assert unlabelled_text(index) == "10.0 % of the pixels unlabelled"


# --- nodata ---------------------------------------------------------------------------------


@fault(10)
def test_pixels_that_hold_nodata_in_some_bands_are_trained_on_and_reported(
    make_dataset, tmp_path, caplog
):
    root = make_dataset(2, 1, 0, bands=2)
    for path in (root / "Patch" / "train" / "images").glob("*.tif"):
        with rasterio.open(path) as file:
            image, origin = file.read(), origin_of(path)
        image[0, :8] = 0
        image[:, 8:10] = 0
        write_raster(path, image, origin=origin, nodata=0)
    caplog.set_level("INFO")
    index = index_of(root, "train")
    assert index.counts.sum() == 2 * 30 * 32
    log_weak_spots(settings(batch_size=1), index, None, None, ProcessGroup())
    assert "about 25.0% of the pixels hold the nodata value 0 in some of" in caplog.text


# --- what exists ----------------------------------------------------------------------------


@fault(1)
@pytest.mark.parametrize("strategy", ["split", "kfold"])
def test_a_training_replaces_no_other_one_by_itself(make_dataset, tmp_path, strategy):
    root, save_dir = make_dataset(4, 2, 0), tmp_path / "models"
    options = ["--val_strategy", strategy]
    if strategy == "kfold":
        options += ["--n_splits", "2"]
    given = ["--dataset_root", root, "--save_dir", save_dir, *QUICK, *options]
    unfinished = save_dir / ("fold_1" if strategy == "kfold" else "") / "model_last.pth"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"hours of work")
    status, _, err = run_main(*given)
    assert status == 1 and unfinished.read_bytes() == b"hours of work"
    assert "holds an unfinished run (model_last.pth)" in err
    assert "--resume" in err and "--overwrite" in err
    status, _, _ = run_main(*given, "--overwrite")
    assert status == 0
    report = (save_dir / "model_metrics.json").read_bytes()
    status, _, err = run_main(*given)
    assert status == 1 and "holds a finished run; give --overwrite" in err
    assert (save_dir / "model_metrics.json").read_bytes() == report
    status, _, err = run_main(*given, "--overwrite", "--resume")
    assert status == 2 and "one of the two" in err


# --- interruptions --------------------------------------------------------------------------


@fault(54)
@pytest.mark.parametrize(("function", "calls"), [("train", 2), ("validate", 1)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_stops_between_batches(
    make_dataset, tmp_path, monkeypatch, function, calls, number
):
    root, save_dir = make_dataset(8, 4, 0), tmp_path / "models"
    given = ["--dataset_root", root, "--save_dir", save_dir, *QUICK, "--batch_size", 2]
    name = {"train": "count_labelled", "validate": "confusion_matrix"}[function]
    with monkeypatch.context() as patch:
        dotted = (
            f"{'training.loop' if function == 'train' else 'model_training'}.{name}"
        )
        ended = signal_during(patch, dotted, calls, number)
        status, _, err = run_main(*given)
    assert status == 128 + number and len(ended) == calls
    assert err.splitlines()[-1].startswith("interrupted;")
    if function == "validate":
        assert not (save_dir / "model_last.pth").exists()
    assert run_main(*given, "--resume")[0] == 0


# --- a busy machine -------------------------------------------------------------------------

CPU = torch.device("cpu")


@fault(55)
@pytest.mark.parametrize(
    ("seconds", "computed", "threads", "device", "said"),
    [
        (60, 30, 2, CPU, True),  # 15 s of work took 60
        (60, 100, 2, CPU, False),
        (4, 1, 2, CPU, False),  # too short to tell
        (60, 10, 1, CPU, False),  # one thread waits for no other
        (60, 10, 2, torch.device("cuda"), False),
    ],
)
def test_an_epoch_that_computing_does_not_explain_is_reported(
    monkeypatch, caplog, seconds, computed, threads, device, said
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    caplog.set_level("INFO")
    assert epochs.warn_of_busy_machine(seconds, computed, device) == said
    assert ("OMP_NUM_THREADS=1" in caplog.text) == said


@fault(55)
def test_a_busy_machine_is_reported_once(make_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(epochs, "BUSY_SECONDS", 0)
    monkeypatch.setattr(epochs.time, "process_time", lambda: 0.0)
    root = make_dataset(4, 2, 0)
    given = ("--dataset_root", root, "--save_dir", tmp_path / "out", *QUICK)
    status, _, err = run_main(*given, "--epochs", 3)
    assert status == 0 and err.count("is the machine busy with other work?") == 1


@fault(55)
@pytest.mark.parametrize(
    ("own", "count"),
    [
        ({}, "20000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_that_wait_spin_shortly_unless_the_user_says_how(
    tmp_path, monkeypatch, own, count
):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    given = ("--dataset_root", tmp_path, "--save_dir", tmp_path / "out", *QUICK)
    assert run_main(*given)[0] == 1
    assert os.environ.get("GOMP_SPINCOUNT") == count
