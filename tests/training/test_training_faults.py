"""Faults that users meet in a training: each row of a table is one of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import (
    IN_ONE_BLOCK,
    LEGAL,
    Malicious,
    all_nodata,
    assert_fault,
    assert_one_line,
    bad_block,
    cast,
    check,
    elsewhere,
    huge,
    label_of,
    little_memory,
    no_bands_alike,
    no_crs,
    nothing,
    output_rows,
    patch_path,
    patches,
    patches_without_memory,
    read,
    rewrite,
    row,
    run,
    simulated,
    sparse,
    split,
    table,
    text,
    unexpected_work,
    unreadable_rows,
    without_gpu,
)
from helpers import (
    ENCODER,
    patch_everywhere,
    write_dataset,
)

from common import patches as patches_module
from training import epochs
from training.outputs import RUN_FILES


@table(
    *unreadable_rows(
        "train", patch_path("train", number=2), patch_path("validation", "labels", 5)
    ),
)
def test_faults_of_rasters_that_cannot_be_read(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@table(
    row("train", "a patch of one block",
        little_memory(lambda: [huge(patch_path("train", k)) for k in ("images", "labels")]),
        IN_ONE_BLOCK.format(path=r"\S+patch_000.tif")),
    row("train", "a patch of small blocks",
        little_memory(lambda: [huge(patch_path("train", k), 256) for k in ("images", "labels")]),
        r"patch_000.tif .*20000"),
)  # fmt: skip
def test_faults_of_headers_that_claim_more_than_there_can_be(
    place, capfd, monkeypatch, fault
):
    check(capfd, monkeypatch, fault)


@table(
    row("train", "patches of other bands",
        partial(no_bands_alike, "data/Patch/train/images/patch_002.tif"),
        r"patch_002.tif has \(bands, height, width\) \(4, 32, 32\).*; all patches need"),
    row("train", "label elsewhere",
        partial(elsewhere, "data/Patch/train/labels/patch_002.tif"),
        r"patch_002.tif and its label do not cover the same ground; "),
    row("train", "patch all nodata",
        lambda: [all_nodata(f"data/Patch/train/images/patch_00{n}.tif") for n in range(4)],
        r"No patch of the train split has a labelled pixel.*valid"),
    row("train", "unreadable block",
        partial(bad_block, "data/Patch/train/images/patch_002.tif"),
        r"Cannot read .*patch_002.tif: .*; copy or write it again"),
)  # fmt: skip
def test_faults_of_rasters_that_do_not_fit(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@table(
    *output_rows("train", "--save_dir", "models"),
    row("train", "no such folder", nothing, r"No folder nowhere; give the --output",
        "--dataset_root nowhere"),
)  # fmt: skip
def test_faults_of_outputs(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@pytest.mark.parametrize("kind", ["64-bit", "sparse", "holes"])
def test_no_faults_of_legal_patches_in_training(place, kind, capfd):
    for path in Path("data").rglob("images/*.tif"):
        {"holes": holes_of_patches}.get(kind, LEGAL.get(kind, sparse))(str(path))
    assert run("train") == 0
    assert "error" not in capfd.readouterr().err
    metadata = torch.load("models/model_final_model.pth", weights_only=True)["metadata"]
    statistics = metadata["normalization_statistics"]
    stacked = [read(str(p))[0] for p in Path("data/Patch/train/images").iterdir()]
    pixels = np.concatenate([p[:, np.isfinite(p).all(axis=0)].T for p in stacked])
    np.testing.assert_allclose(statistics["low"], np.percentile(pixels, 1, axis=0))


def holes_of_patches(path: str) -> None:
    def change(pixels):
        pixels = pixels.astype("float32")
        pixels[0, :5, :7], pixels[1, 9, 9] = np.nan, np.inf
        return pixels

    rewrite(path, change)


def of_all(damage: Callable, pattern: str) -> Callable:
    """The same damage to all files of a pattern."""
    return lambda: [damage(str(path)) for path in Path().glob(pattern)]


LABELS = "data/Patch/*/labels/*.tif"
FIRST_LABEL = "data/Patch/train/labels/patch_000.tif"


@table(
    row("train", "several bands", lambda: rewrite(FIRST_LABEL, lambda p: p.repeat(3, 0)),
        r"patch_000.tif has 3 bands; a label or a class map has one"),
    row("train", "fractions", lambda: label_of([0, 1.5], "float32")(FIRST_LABEL),
        r"patch_000.tif holds 1.5, which is not a class; labels are whole numbers"),
    row("train", "negative", lambda: label_of([0, -3], "int16")(FIRST_LABEL),
        r"patch_000.tif holds -3: labels are 0..1, or 255"),
    row("train", "outside the classes", lambda: label_of([0, 2])(FIRST_LABEL),
        r"patch_000.tif holds 2: labels are 0..1, or 255.*see --classes"),
    row("train", "outside many classes", lambda: label_of([0, 6])(FIRST_LABEL),
        r"patch_000.tif holds 6: labels are 0..5, or 255.*see --classes",
        "--mode multiclass --classes 6"),
    row("train", "one class", of_all(label_of(1), LABELS),
        r"All labelled training pixels are class 1: .*--label_values"),
    row("train", "all unlabelled", of_all(label_of(255), LABELS),
        r"No patch of the train split has a labelled pixel.*; check the nodata"),
    row("train", "validation unlabelled",
        of_all(label_of(255), LABELS.replace("*", "validation", 1)),
        r"No patch of the validation split has a labelled pixel.*; check the nodata"),
    row("train", "one class in all folds", of_all(label_of(1), LABELS),
        r"All labelled training pixels are class 1: ", "--val_strategy kfold --n_splits 2"),
)  # fmt: skip
def test_faults_of_labels(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


def drop(*names: str) -> Callable:
    return lambda: [shutil.rmtree(split(name)) for name in names]


def both_kinds(change: Callable, name="train", number="002") -> Callable:
    """Change the image and the label of a patch."""
    return lambda: [
        rewrite(str(split(name) / kind / f"patch_{number}.tif"), change)
        for kind in ("images", "labels")
    ]


def fewer_patches(train: int, validation: int = 1, test: int = 0) -> Callable:
    def damage() -> None:
        shutil.rmtree("data")
        write_dataset(Path("data"), train, validation, test, bands=3)

    return damage


@table(
    row("train", "no training", drop("train"),
        r"No images found in data/Patch/train/images \(looked for .tif"),
    row("train", "no validation", drop("validation"),
        r"No images found in data/Patch/validation/images"),
    row("train", "empty folder", lambda: (shutil.rmtree("data"), Path("data").mkdir()),
        r"No images found in data/train/images"),
    row("train", "labels alone", lambda: shutil.rmtree(split("test") / "images"),
        r"No images found in data/Patch/test/images"),
    row("train", "unmatched", lambda: os.unlink(patch_path("validation", "labels", 4)),
        r"validation/images/patch_004.tif has no label of the same name.*; add it or remove"),
    row("train", "unmatched label", lambda: os.unlink(patch_path("validation", number=5)),
        r"validation/labels/patch_005.tif has no image of the same name.*; add it or remove"),
    row("train", "duplicate stems", lambda: shutil.copy(patch_path("train"),
        patch_path("train").replace(".tif", ".tiff")),
        r"patch_000.tiff and patch_000.tif have the same stem; remove one"),
    row("train", "sizes of the label", lambda: rewrite(patch_path("train", "labels", 2),
        lambda p: p[:, :16, :16]), r"patch_002.tif is 32 x 32 pixels but its label is 16 x 16"),
    row("train", "mixed sizes", both_kinds(lambda p: p[:, :16, :16]),
        r"patch_002.tif has .*\(3, 16, 16\).*(3, 32, 32).*; all patches need one size"),
    row("train", "mixed sizes of splits",
        both_kinds(lambda p: p[:, :16, :16], "validation", "005"),
        r"patch_005.tif has .*\(3, 16, 16\).*; all patches need one size"),
    row("train", "one unreadable test patch", lambda: text(patch_path("test", number=6)),
        r"test/images/patch_006.tif is not a readable TIFF; write it again"),
    row("train", "bands that are expected", nothing,
        r"--in_channels 4, but the patches in data have 3 bands", "--in_channels 4"),
    row("train", "one patch in all", fewer_patches(1, 0),
        r"No images found in data/Patch/validation/images"),
    row("train", "one patch in all, in folds", fewer_patches(1, 0),
        r"1 patches cannot make 5 folds; lower --n_splits", "--val_strategy kfold"),
    row("train", "fewer patches than folds", nothing,
        r"6 patches cannot make 7 folds; lower --n_splits",
        "--val_strategy kfold --n_splits 7"),
    row("train", "a batch of one with batch normalization", nothing,
        r"cannot train on a single patch; use --batch_size 2 or more",
        "--model deeplabv3 --batch_size 1", late=True),
    row("train", "one training patch with batch normalization", fewer_patches(1, 1),
        r"cannot train on a single patch; .*at least 2 training patches",
        "--model deeplabv3", late=True),
    row("train", "no test split to estimate areas by", drop("test"),
        r"--area_estimation: data has no test split.*; leave it out", "--area_estimation"),
    row("train", "too few patches for a learning curve", fewer_patches(2, 1),
        r"--learning_curve: 50 % of the 2 training patches are 1, too few .*; leave it out",
        "--learning_curve"),
    row("train", "folds by place without places",
        of_all(no_crs, "data/Patch/*/*/*.tif"),
        r"patch_000.tif has no CRS, and --fold_by .*; give --fold_by random",
        "--val_strategy kfold --fold_by block"),
)  # fmt: skip
def test_faults_of_datasets(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda: text(patch_path("test", number=6)), "patch_006.tif is not a readable"),
        (lambda: os.unlink(patch_path("test", "labels", 6)), "has no label"),
        (drop("validation"), "No images found in data/Patch/validation"),
    ],
    ids=["unreadable", "unmatched", "missing split"],
)
def test_faults_of_later_splits_are_seen_before_any_patch_is_read(
    place, capfd, monkeypatch, damage, error
):
    damage()
    patch_everywhere(monkeypatch, "common.patches.read_patch", unexpected_work)
    assert_fault(capfd, monkeypatch, "train", "", error)


def test_faults_of_mixed_dtypes_are_none(place):
    """Each patch is scaled by its values, whatever the dtype that holds them."""
    for path in patches("data")[::2]:
        cast("float32")(str(path))
    assert run("train") == 0


@table(
    row("train", "encoder weights missing", nothing, r"No weights file none.pth",
        "--encoder_weights none.pth"),
    row("train", "encoder weights that are text", lambda: text("encoder.pth"),
        r"encoder.pth is no file of weights: ", "--encoder_weights encoder.pth"),
    row("train", "encoder weights of another encoder",
        lambda: torch.save({"conv.weight": torch.zeros(3, 3, 3, 3)}, "encoder.pth"),
        rf"encoder.pth does not hold the weights of {ENCODER}",
        "--encoder_weights encoder.pth"),
    row("train", "malicious encoder weights",
        lambda: torch.save(Malicious(), "encoder.pth"),
        r"encoder.pth is no file of weights: ", "--encoder_weights encoder.pth"),
)  # fmt: skip
def test_faults_of_checkpoints(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)
    assert not Path("executed").exists()


@pytest.mark.parametrize("kind", ["pretrained", "encoder file", "bands"])
@pytest.mark.parametrize("strategy", ["split", "kfold"])
def test_faults_of_a_second_training_leave_the_first(
    place, capfd, monkeypatch, kind, strategy
):
    """What cannot be built is an error before the model of a former run is removed."""
    Path("models").mkdir()
    for name in RUN_FILES:
        Path("models", name).write_bytes(b"weeks of work")
    text("e.pth")
    options, status = {
        "pretrained": ("--encoder_name resnet18 --pretrained", 1),
        "encoder file": ("--encoder_weights none.pth", 1),
        "bands": ("--encoder_weights e.pth --rgb_bands 1,2,9", 2),
    }[kind]
    error = (
        r"--encoder_weights|No weights file none.pth|--rgb_bands 1,2,9: expected three"
    )
    options += f" --val_strategy {strategy} --overwrite"
    options += " --n_splits 2" if strategy == "kfold" else ""
    assert_fault(capfd, monkeypatch, "train", options, error, status)


@table(
    row("train", "unknown model", nothing, r"Unknown model 'pspnett'; did you mean 'pspnet'",
        "--model pspnett", 2),
    row("train", "unknown encoder", nothing,
        r"Unknown encoder 'resnet3'; did you mean 'resnet34'", "--encoder_name resnet3", 2),
    row("train", "unknown encoder of timm", nothing,
        r"Unknown encoder 'tu-resnet18x'; did you mean 'tu-resnet18",
        "--encoder_name tu-resnet18x", 2),
    row("train", "unknown weights", nothing, r"imagenat.*Available options are: .*imagenet",
        "--encoder_name resnet18 --encoder_weights imagenat", 2),
    row("train", "unknown loss", nothing, r"Unknown loss 'dise'; did you mean 'dice'",
        "--loss dise+ce", 2),
    row("train", "weight of a loss", nothing, r"--loss -1\*ce: expected weights more than 0",
        "--loss=-1*ce", 2),
    row("train", "unknown mode", nothing, r"--mode: invalid choice: 'multi' .*multiclass",
        "--mode multi", 2),
    row("train", "classes of a binary model", nothing, r"--classes 6: .*--mode multiclass",
        "--classes 6", 2),
    row("train", "ignored class", nothing, r"--ignore_index 1: expected a value outside",
        "--ignore_index 1", 2),
    row("train", "names of other numbers", nothing, r"--class_names a,b,c: expected 2 names",
        "--class_names a,b,c", 2),
    row("train", "class weights without a loss for them", nothing,
        r"--use_class_weights with --loss dice: expected", "--use_class_weights --loss dice", 2),
    row("train", "batches of no number", nothing,
        r"--batch_size: invalid int value: 'all'; expected one, or auto", "--batch_size all", 2),
    row("train", "folds without folds", nothing, r"--fold_by block: .*--val_strategy kfold",
        "--fold_by block", 2),
    row("train", "buffer of random folds", nothing, r"--buffer 9.0: .*--fold_by block",
        "--buffer 9 --val_strategy kfold", 2),
    row("train", "warm-up as long as the training", nothing,
        r"--warmup_epochs 1: expected fewer than --epochs 1", "--warmup_epochs 1", 2),
    row("train", "pretrained without weights", nothing, r"--pretrained with --model",
        "--model unet-dropout --encoder_name resnet34 --pretrained", 2),
    row("train", "bands of colours without weights", nothing,
        r"--rgb_bands 1,2,3: expected --pretrained", "--rgb_bands 1,2,3", 2),
    row("train", "an encoder for a model of its own", nothing,
        r"--encoder_name vgg11: .*no exchangeable encoder",
        "--model unet-dropout --encoder_name vgg11", 2),
)  # fmt: skip
def test_faults_of_options(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@simulated
def training_without_memory(monkeypatch) -> None:
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    patch_everywhere(monkeypatch, "training.loop.train_one_epoch", exhausted)


@simulated
def trial_without_memory(monkeypatch) -> None:
    """On a CPU on which batches are tried as on a GPU."""
    training_without_memory(monkeypatch)
    patch_everywhere(monkeypatch, "training.batch_size.TRIED", ("cpu",))


@simulated
def cpu_without_memory(monkeypatch) -> None:
    def exhausted(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
        )

    patch_everywhere(monkeypatch, "training.loop.train_one_epoch", exhausted)


@table(
    row("train", "no GPU", without_gpu,
        r"--device cuda: this machine has 0 GPUs; use --device cpu", "--device cuda"),
    row("train", "no such GPU", without_gpu,
        r"--device cuda:7: this machine has 0 GPUs; use --device cpu", "--device cuda:7"),
    row("train", "memory of the GPU", training_without_memory,
        r"The memory of cpu is too small; lower --batch_size", late=True),
    row("train", "memory of the machine", cpu_without_memory,
        r"The memory of cpu is too small; lower --batch_size", late=True),
    row("train", "memory of any batch", trial_without_memory,
        r"The memory of cpu is too small for any batch; cut smaller patches",
        "--batch_size auto"),
    row("train", "memory to read patches", patches_without_memory,
        r"The memory .*Unable to allocate 7.45 GiB.*; lower --batch_size", late=True),
    row("train", "no network", nothing,
        r"The imagenet weights of resnet18 could not be downloaded \(no network\?\); give",
        "--encoder_name resnet18 --pretrained"),
)  # fmt: skip
def test_faults_of_surroundings(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


def test_faults_of_a_reading_process_that_is_killed(place, capfd, monkeypatch):
    """The system kills the largest process when memory is scarce."""
    import signal as signals

    read_patch, main_process = patches_module.read_patch, os.getpid()

    def killed(pair, ignore_index):
        if os.getpid() != main_process:
            os.kill(os.getpid(), signals.SIGKILL)
        return read_patch(pair, ignore_index)

    patch_everywhere(monkeypatch, "common.patches.read_patch", killed)
    error = r"A process that reads patches was killed.*; .*--num_workers"
    options = "--num_workers 1 --cache off"
    assert_fault(capfd, monkeypatch, "train", options, error, late=True)


def test_faults_of_a_patch_that_is_lost_during_training(place, capfd, monkeypatch):
    """A reading process hands its error on with a traceback; one line of it is shown."""
    fit = epochs.fit

    def lose(run):
        text(patch_path("train"))
        return fit(run)

    patch_everywhere(monkeypatch, "training.epochs.fit", lose)
    former = Path(patch_path("train")).read_bytes()
    assert run("train", "--num_workers 1 --cache off") == 1
    err = capfd.readouterr().err
    assert_one_line(err, r"error: Cannot read .*patch_000.tif.*; .*write it again", 1)
    Path(patch_path("train")).write_bytes(former)
    assert not Path("models").exists()
