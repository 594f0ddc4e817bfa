"""Faults that users meet in a prediction: each row of a table is one of them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from faults import (
    LEGAL,
    Malicious,
    all_nodata,
    bad_block,
    check,
    cut_off,
    empty,
    file_in_the_way,
    full_disk,
    no_bands_alike,
    nothing,
    nowhere,
    one_block_rows,
    output_rows,
    patches_without_memory,
    read,
    row,
    run,
    simulated,
    table,
    text,
    unreadable_rows,
    valid_pixels,
    without_gpu,
)
from helpers import (
    ENCODER,
    write_model,
)

from common.architectures import ModelConfig
from model_training import Normalization, build_model, load_checkpoint, save_checkpoint
from prediction.predictor import Predictor


@table(
    *unreadable_rows("predict", "scene.tif"),
)
def test_faults_of_rasters_that_cannot_be_read(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


def huge_vrt(path: str) -> None:
    """A text of some lines that claims 2 x 10^9 pixels a side."""
    bands = "".join(f'<VRTRasterBand dataType="Byte" band="{b}"/>' for b in (1, 2, 3))
    sizes = 'rasterXSize="2000000000" rasterYSize="2000000000"'
    Path(path).write_text(f"<VRTDataset {sizes}>{bands}</VRTDataset>")


@table(
    *one_block_rows("predict", "scene.tif"),
    row("predict", "a scene larger than the disk", lambda: huge_vrt("huge.vrt"),
        r"\. has .* GB free, but the map takes up to 8000000000.0 GB",
        "--input huge.vrt"),
)  # fmt: skip
def test_faults_of_headers_that_claim_more_than_there_can_be(
    place, capfd, monkeypatch, fault
):
    check(capfd, monkeypatch, fault)


@table(
    row("predict", "wrong band count", partial(no_bands_alike, "scene.tif"),
        r"scene.tif gives 4 bands, but model.pth takes 3; select them with --bands"),
    row("predict", "unreadable block", partial(bad_block, "scene.tif"),
        r"Cannot read scene.tif: .*; copy or write it again", late=True),
)  # fmt: skip
def test_faults_of_rasters_that_do_not_fit(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@table(
    *output_rows("predict", "--output", ".", "/map.tif"),
    row("predict", "output is the input", nothing,
        r"--output scene.tif: expected not an input", "--output scene.tif", 2),
    row("predict", "output is the input by another way", nothing,
        r"--output data/../scene.tif: expected not an input", "--output data/../scene.tif", 2),
    row("predict", "output is a link to the input", lambda: os.symlink("scene.tif", "map.tif"),
        r"--output map.tif: expected not an input", "", 2),
    row("predict", "confidence is the input", lambda: os.rename("scene.tif", "a_confidence.tif"),
        r"--output a_confidence.tif: expected not an input",
        "--input a_confidence.tif --output a.tif --save_confidence", 2),
    row("predict", "output is the model", lambda: os.rename("model.pth", "model.tif"),
        r"--output model.tif: expected not an input", "--model model.tif --output model.tif", 2),
    row("predict", "output of another suffix", nothing,
        r"--output map.png: expected a name that ends in .tif", "--output map.png", 2),
    row("predict", "one output for two scenes", nothing,
        r"--output map.tif: expected a folder for several scenes",
        "--input scene.tif label.tif", 2),
    row("predict", "two scenes of one name", lambda: (Path("more").mkdir(),
        shutil.copy("scene.tif", "more")), r"scene.tif and more/scene.tif would both be mapped",
        "--input scene.tif more/scene.tif --output maps"),
    row("predict", "folder without scenes", lambda: Path("none").mkdir(),
        r"No scenes in none \(looked for .tif", "--input none --output maps"),
    row("predict", "polygons under a file", file_in_the_way("blocked"),
        r"--polygons blocked: .*blocked cannot be written to",
        "--polygons blocked/a.gpkg"),
    row("predict", "polygons of another suffix", nothing,
        r"--polygons a.shp: expected a name that ends in .gpkg", "--polygons a.shp", 2),
)  # fmt: skip
def test_faults_of_outputs(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@pytest.mark.parametrize("kind", LEGAL)
def test_no_faults_of_legal_scenes_in_prediction(place, kind):
    LEGAL[kind]("scene.tif")
    pixels, profile = read("scene.tif")
    write_model(Path("model.pth"), len(pixels))
    assert run("predict", "--patch_size 64 --overlap 0 --precision fp32") == 0
    valid = valid_pixels(pixels, profile["nodata"])
    checkpoint = load_checkpoint("model.pth")
    image = torch.from_numpy(np.where(valid, pixels, 0).astype("float32") / 1e4)
    with torch.inference_mode():
        logits = checkpoint.model(image.clamp(0, 1)[None])
    classes, written = read("map.tif")
    assert written["transform"] == profile["transform"]
    expected = np.where(valid, (logits[0, 0] >= 0).numpy(), 255)
    differ = (classes[0] != expected) & (np.abs(logits[0, 0].numpy()) > 1e-3)
    assert not differ.any()
    assert set(np.unique(classes)) <= {0, 1, 255}


def test_no_faults_of_a_scene_without_a_place(place, capfd):
    """A map needs no CRS; it says that it has none."""
    nowhere("scene.tif")
    assert run("predict") == 0
    assert "warning: scene.tif has no CRS" in capfd.readouterr().err
    with rasterio.open("map.tif") as file:
        assert file.crs is None


def test_no_faults_of_a_scene_of_nodata(place, capfd):
    """Its map is nodata, and a message says so."""
    all_nodata("scene.tif")
    assert run("predict") == 0
    assert "warning: scene.tif has no valid pixel" in capfd.readouterr().err
    assert (read("map.tif")[0] == 255).all()


def change_checkpoint(change: Callable) -> Callable:
    """Write the checkpoint again after ``change`` of its content."""

    def damage() -> None:
        content = torch.load("model.pth", weights_only=True)
        torch.save(change(content) or content, "model.pth")

    return damage


def described(**metadata) -> Callable:
    """Let the checkpoint say other things of itself; None takes a key out."""

    def change(content: dict) -> None:
        content["metadata"].update(metadata)
        for key in [key for key, value in metadata.items() if value is None]:
            del content["metadata"][key]

    return change_checkpoint(change)


def malicious(where: str, zipped: bool = True) -> Callable:
    def damage() -> None:
        content = torch.load("model.pth", weights_only=True)
        if where == "alone":
            content = Malicious()
        else:
            content[where]["extra"] = Malicious()
        torch.save(content, "model.pth", _use_new_zipfile_serialization=zipped)

    return damage


def not_numbers(content: dict) -> None:
    next(iter(content["model_state_dict"].values())).view(-1)[0] = math.nan


def of_another_library(content: dict) -> dict:
    """As TorchVision or timm write them: weights alone."""
    return {f"layer{n}.weight": torch.zeros(2, 2) for n in range(3)}


@table(
    row("predict", "missing", lambda: os.unlink("model.pth"), r"No checkpoint model.pth"),
    row("predict", "a folder without any", lambda: Path("models").mkdir(),
        r"No model_final_model.pth in models", "--model models"),
    row("predict", "empty file", lambda: empty("model.pth"),
        r"model.pth cannot be opened safely as a checkpoint: .*; .*main.py"),
    row("predict", "cut off", lambda: cut_off("model.pth"),
        r"model.pth cannot be opened safely as a checkpoint: .*; .*main.py"),
    row("predict", "text", lambda: text("model.pth"),
        r"model.pth cannot be opened safely as a checkpoint: .*; .*main.py"),
    row("predict", "a raster", nothing,
        r"scene.tif cannot be opened safely as a checkpoint: .*; .*main.py",
        "--model scene.tif --input label.tif"),
    row("predict", "of another library", change_checkpoint(of_another_library),
        r"model.pth holds weights without a description; give --model_name, --encoder_name"),
    row("predict", "no tensors", change_checkpoint(lambda content: {"epoch": 3}),
        r"model.pth has no model_state_dict with metadata; expected a file written by main"),
    *(
        row("predict", f"malicious {where} {'zip' * zipped or 'pickle'}",
            malicious(where, zipped),
            r"model.pth cannot be opened safely as a checkpoint: .*; .*main.py")
        for where in ("alone", "metadata", "model_state_dict") for zipped in (True, False)
    ),
    row("predict", "weights that are no numbers", change_checkpoint(not_numbers),
        r"model.pth holds weights that are not numbers; train it again"),
    row("predict", "classes contradict the weights",
        described(num_classes=6, mode="multiclass"),
        r"The weights in model.pth are not those of pspnet with .*; the file's description"),
    row("predict", "bands contradict the weights", described(in_channels=5,
        normalization_statistics=None),
        r"The weights in model.pth are not those of pspnet with .*; the file's description"),
    row("predict", "bands contradict the statistics", described(in_channels=5),
        r"model.pth has statistics of 3 bands for a model of 5; .*again"),
    row("predict", "bands contradict the option", nothing,
        r"--in_channels 4, but model.pth takes 3 bands; leave it out", "--in_channels 4"),
    row("predict", "classes contradict the option", nothing,
        r"--num_classes 5, but model.pth has 2 classes; leave it out", "--num_classes 5"),
    row("predict", "model contradicts the option", nothing,
        r"--model_name unet, but model.pth is a pspnet; leave it out", "--model_name unet"),
    row("predict", "unknown architecture", described(model_name="psqnet"),
        r"model.pth: Unknown model 'psqnet'; did you mean 'pspnet'"),
    row("predict", "unknown encoder", described(encoder_name="resnet34x"),
        r"model.pth: Unknown encoder 'resnet34x'; did you mean 'resnet34'"),
    row("predict", "another encoder", described(encoder_name="resnet18"),
        r"The weights in model.pth are not those of pspnet with resnet18: "),
    row("predict", "of a newer version", described(version="7.0.0"),
        r"model.pth is of version 7.0.0, this is \S+; update"),
    row("predict", "bad temperature", described(temperature=-1.0),
        r"model.pth has the temperature -1.0; expected a number more than 0"),
    row("predict", "bad statistics", described(normalization_statistics={
        "rule": "dataset", "low": [0.0, math.nan, 0.0], "high": [1.0] * 3}),
        r"model.pth has statistics that are not numbers; .*again"),
    row("predict", "unknown normalization",
        described(normalization_statistics={"rule": "zscore"}),
        r"model.pth normalizes by 'zscore': not known; .*update"),
    row("predict", "too many names", described(class_names=["a", "b", "c"]),
        r"model.pth names 3 classes for a model of 2; .*again"),
    row("predict", "of negative classes", described(num_classes=-3, mode="multiclass"),
        r"model.pth has a wrong description: 3 bands and -3 classes"),
    row("predict", "models of other bands", lambda: write_model(Path("other.pth"), 4),
        r"other.pth has bands 4, but model.pth has 3; they cannot be averaged",
        "--model model.pth other.pth"),
    row("predict", "threshold for many classes", lambda: (write_multiclass(Path("many.pth"))),
        r"--threshold 0.3: many.pth has 3 classes, and a threshold is for binary",
        "--model many.pth --threshold 0.3", 2),
)  # fmt: skip
def test_faults_of_checkpoints(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)
    assert not Path("executed").exists()


def write_multiclass(path: Path) -> None:
    config = ModelConfig("pspnet", 3, 3, ENCODER)
    numbers = Normalization("dataset", (0.0,) * 3, (1e4,) * 3)
    model = build_model(config)
    save_checkpoint(path, model, config, numbers, {})


def test_faults_of_the_malicious_checkpoint_are_real(place):
    """A careless reader would have run its code."""
    malicious("metadata")()
    torch.load("model.pth", weights_only=False)
    assert Path("executed").is_dir()


@table(
    row("predict", "overlap as large as the window", nothing,
        r"--overlap 32: expected 0 to 31, less than --patch_size 32", "--overlap 32", 2),
    row("predict", "overlap larger than the window", nothing,
        r"--overlap 128: expected 0 to 31, less than --patch_size 32", "--overlap 128", 2),
    row("predict", "smallest area without polygons", nothing,
        r"--min_area 5.0: expected --polygons beside it", "--min_area 5", 2),
    row("predict", "unknown blend", nothing, r"--blend: invalid choice: 'han' .*hann",
        "--blend han", 2),
    row("predict", "unknown device", nothing, r"--device gpu: expected cpu, cuda, cuda:N or mps",
        "--device gpu", 2),
    row("predict", "half precision on the CPU", nothing,
        r"--precision fp16: not on cpu; take auto or fp32", "--precision fp16", 2),
    row("predict", "unknown model name", nothing, r"Unknown model 'uunet'; did you mean 'unet'",
        "--model_name uunet", 2),
    row("predict", "a batch that is no number", nothing,
        r"--batch_size many: expected at least 1, or auto", "--batch_size many", 2),
    row("predict", "bands between commas", nothing,
        r"--bands '1,,2': expected names or numbers", "--bands 1,,2"),
)  # fmt: skip
def test_faults_of_options(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


@simulated
def predictor_without_memory(monkeypatch) -> None:
    def exhausted(self, images, valid):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Predictor, "_predict", exhausted)


@table(
    row("predict", "no GPU", without_gpu,
        r"--device cuda: this machine has 0 GPUs; use --device cpu", "--device cuda"),
    row("predict", "memory of the machine", patches_without_memory,
        r"The memory .*Unable to allocate 7.45 GiB.*; lower --batch_size, --patch_size or --max_memory",
        late=True),
    row("predict", "memory for a single window", predictor_without_memory,
        r"The memory of cpu does not hold a window of 32 x 32 pixels; lower --patch_size",
        "--batch_size 4", late=True),
    row("predict", "disk full", full_disk,
        r"No space left on device.*; free some, or write elsewhere", late=True),
)  # fmt: skip
def test_faults_of_surroundings(place, capfd, monkeypatch, fault):
    check(capfd, monkeypatch, fault)


def test_faults_of_memory_halve_the_batch(place, capfd, monkeypatch):
    """As long as fewer windows fit, the map is that of all memory."""
    options = "--overlap 0 --batch_size 2"
    assert run("predict", f"{options} --output whole.tif") == 0
    predict = Predictor._predict

    def short(self, images, valid):
        if len(images) > 1:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB."
            )
        return predict(self, images, valid)

    monkeypatch.setattr(Predictor, "_predict", short)
    capfd.readouterr()
    assert run("predict", options) == 0
    assert "memory ran out: batches of 1 from here on" in capfd.readouterr().err
    np.testing.assert_array_equal(read("map.tif")[0], read("whole.tif")[0])
