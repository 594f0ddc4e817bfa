"""Map a scene of any size with a trained model.

    python Predict_large_image.py --model trained_models/model_final_model.pth \\
        --input scene.tif --output map.tif --save_confidence --quicklook

leaves ``map.tif`` with a class per pixel on the scene's own pixel grid, beside it the confidence,
the statistics as JSON and a picture. A window slides over the scene; where windows overlap, their
probabilities are blended with weights that sum to one. Only the rows that later windows still add
to are in memory.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import rasterio
from rasterio.windows import Window

import model_training
import rasters
from rasters import (
    OptionError,
    RasterError,
    SegmentationError,
    require,
    setting,
)

log = logging.getLogger("semanticseg4eo")

CONFIDENCE_NODATA = -1.0
BLOCK = 256  # side of the outputs' tiles in pixels
SIDE_MULTIPLE = 32  # a scene smaller than a patch is padded to a multiple of this


# --- settings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictionConfig:
    """Every setting of a prediction; the options are made from these fields."""

    model: str = setting(help="checkpoint (.pth) that main.py wrote", group="files")
    input: Sequence[str] = setting(
        help="scenes, anything that GDAL reads, or folders of them",
        group="files",
        nargs="+",
    )
    output: str = setting(
        help="class map to write (.tif); a folder when there are several scenes",
        group="files",
    )
    save_confidence: bool = setting(
        False, "write OUTPUT_confidence.tif: probability of the class", "files"
    )
    quicklook: bool = setting(
        False, "write OUTPUT_quicklook.png: scene, map and legend", "files"
    )
    bands: str | None = setting(
        None,
        "bands to feed, in the order of training: numbers from 1 or band descriptions",
        "scene",
        shown="all but alpha",
    )
    in_channels: int | None = setting(
        None, "bands that the model must take", "scene", shown="not checked"
    )
    num_classes: int | None = setting(
        None, "classes that the model must have", "scene", shown="not checked"
    )
    patch_size: int = setting(512, "side of the sliding window in pixels", "window")
    overlap: int = setting(
        128, "pixels that neighbouring windows share; 25-50 %% of the window", "window"
    )
    batch_size: int = setting(4, "windows per step", "window")
    threshold: float = setting(
        0.5, "least foreground probability of a binary map, 0 to 1", "window"
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:1...", "window", shown="cuda where there is one, else cpu"
    )  # fmt: skip

    def __post_init__(self):
        size, overlap = self.patch_size, self.overlap
        require(size >= SIDE_MULTIPLE, "--patch_size", size, f"{SIDE_MULTIPLE} or more")
        require(
            0 <= overlap < size,
            "--overlap",
            overlap,
            f"0 to {size - 1}, less than --patch_size {size}",
        )
        require(self.batch_size >= 1, "--batch_size", self.batch_size, "at least 1")
        require(0 <= self.threshold <= 1, "--threshold", self.threshold, "0 to 1")


@dataclass(frozen=True)
class Task:
    """One scene and the files that come of it."""

    scene: str
    output: Path

    def beside(self, ending: str) -> Path:
        """The path of a further file, named after the map."""
        return self.output.with_name(self.output.stem + ending)


def list_tasks(config: PredictionConfig) -> list[Task]:
    """The scenes to map and the names of their maps.

    Raises:
        OptionError: An output that is no .tif, a folder that is a file, an output that is an input.
        RasterError: A folder without scenes, or two scenes of one name.
    """
    scenes, folders = [], False
    for text in config.input:
        if not Path(text).is_dir():
            scenes.append(text)
            continue
        folders = True
        found = sorted(
            str(path)
            for path in Path(text).iterdir()
            if path.suffix.lower() in rasters.SCENE_SUFFIXES
            and path.is_file()
            and not path.name.startswith(".")
        )
        if not found:
            raise RasterError(
                f"No scenes in {text} (looked for {', '.join(rasters.SCENE_SUFFIXES)})"
            )
        scenes += found
    output = Path(config.output)
    if len(scenes) > 1 or folders or output.is_dir():
        tiff = output.suffix.lower() in rasters.TIFF_SUFFIXES
        fine = output.is_dir() or not (output.exists() or tiff)
        require(fine, "--output", output, "a folder for several scenes")
        tasks = [Task(s, output / f"{Path(s).stem}_prediction.tif") for s in scenes]
    else:
        fine = output.suffix.lower() in rasters.TIFF_SUFFIXES
        require(fine, "--output", output, "a name that ends in .tif")
        tasks = [Task(scenes[0], output)]
    written: dict[Path, str] = {}
    for task in tasks:
        other = written.setdefault(task.output, task.scene)
        if other is not task.scene:
            raise RasterError(
                f"{other} and {task.scene} would both be mapped to {task.output}"
            )
    inputs = {Path(scene).resolve() for scene in scenes}
    for task in tasks:
        for path in (task.output, task.beside("_confidence.tif")):
            require(path.resolve() not in inputs, "--output", path, "not an input")
    return tasks


# --- sliding window -------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """The windows along one side of a scene, and how they are blended."""

    length: int  # pixels of the scene
    size: int  # pixels of a window
    starts: list[int]
    weights: np.ndarray  # (windows, size) float32; over the scene they sum to one


def make_axis(length: int, patch_size: int, overlap: int) -> Axis:
    """Lay windows along a side of a scene.

    The weight of a window is a Hann ramp, sampled at pixel centres and so positive everywhere,
    divided by the sum of all windows there. A side shorter than a patch gets one window.

    Args:
        length: Pixels of the scene along this side.
        patch_size: Largest side of a window in pixels.
        overlap: Pixels shared by neighbours; the last window, which ends at the edge, shares more.
    """
    rounded = -(-length // SIDE_MULTIPLE) * SIDE_MULTIPLE
    size = min(patch_size, rounded)
    starts = rasters.window_starts(length, size, patch_size - overlap)
    ramp = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    total = np.zeros(max(length, size))
    for start in starts:
        total[start : start + size] += ramp
    weights = np.stack([ramp / total[start : start + size] for start in starts])
    return Axis(length, size, starts, weights.astype(np.float32))


Read = Callable[[Window], tuple[np.ndarray, np.ndarray]]
Predict = Callable[[np.ndarray], np.ndarray]


class OpenRows:
    """Sums of weighted probabilities over the rows that windows still add to."""

    def __init__(self, channels: int, rows: int, width: int):
        self.sums = np.zeros((channels, rows, width), np.float32)
        self.valid = np.zeros((rows, width), bool)

    def add(self, column: int, weights, probabilities, valid) -> None:
        """Add a window whose first row is the first open one.

        Args:
            column: Its left edge.
            weights: (h, w); parts of the window beyond the scene are left out.
            probabilities: (K, h, w).
            valid: (h, w) bool.
        """
        height, width = weights.shape
        right = min(column + width, self.valid.shape[1])
        inside = slice(0, right - column)
        sums = self.sums[:, :height, column:right]
        sums += (probabilities * weights)[..., inside]
        self.valid[:height, column:right] |= valid[:, inside]

    def finish(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Take the first rows out: probabilities (K, count, W) and valid (count, W)."""
        finished = self.sums[:, :count].copy(), self.valid[:count].copy()
        for layer, axis in ((self.sums, 1), (self.valid, 0)):
            rest = layer.shape[axis] - count
            rows = np.moveaxis(layer, axis, 0)
            rows[:rest] = rows[count:].copy()
            rows[rest:] = 0
        return finished


def blended_rows(
    read: Read, predict: Predict, axes: tuple[Axis, Axis], channels: int, batch_size=4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slide a window over a scene and yield its rows from top to bottom, each once.

    Args:
        read: A window to image (C, h, w) float32 and valid (h, w) bool, of the window's size
            also where it reaches beyond the scene.
        predict: Images (N, C, h, w) to probabilities (N, K, h, w).
        axes: Rows and columns.
        channels: K.
        batch_size: Windows that are predicted together.

    Yields:
        Probabilities (K, n, W) and valid (n, W). A window without a valid pixel is not predicted;
        its pixels come out as zeros, not valid.
    """
    rows, columns = axes
    open_rows = OpenRows(channels, rows.size, columns.length)
    ends = [*rows.starts[1:], rows.length]
    for top, row_weights, end in zip(rows.starts, rows.weights, ends):
        windows = (
            (column, np.outer(row_weights, weights), *read(window))
            for column, weights in zip(columns.starts, columns.weights)
            for window in [Window(column, top, columns.size, rows.size)]
        )
        seen = (window for window in windows if window[-1].any())
        while batch := list(islice(seen, batch_size)):
            results = predict(np.stack([image for *_, image, _ in batch]))
            for (column, weights, _, valid), result in zip(batch, results):
                open_rows.add(column, weights, result, valid)
        yield open_rows.finish(end - top)


def reflect_beyond(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Extend an array (..., h, w) downwards and to the right by reflection at its edges."""
    missing = height - array.shape[-2], width - array.shape[-1]
    pads = [(0, 0)] * (array.ndim - 2) + [(0, count) for count in missing]
    return np.pad(array, pads, mode="reflect") if any(missing) else array


def window_reader(
    scene: rasterio.DatasetReader,
    bands: Sequence[int],
    normalization: model_training.Normalization,
) -> Read:
    """What ``blended_rows`` reads a scene with: normalized, reflected beyond its edges."""

    def read(window: Window) -> tuple[np.ndarray, np.ndarray]:
        inside = rasters.window_within(window, scene.width, scene.height)
        image, valid = rasters.read_image(scene, inside, bands)
        if valid.any():
            image = model_training.normalize(image, valid, normalization)
        size = int(window.height), int(window.width)
        return reflect_beyond(image, *size), reflect_beyond(valid, *size)

    return read


def model_predictor(checkpoint: model_training.Checkpoint, device) -> Predict:
    """What ``blended_rows`` predicts with: a model on its device.

    Raises:
        SegmentationError: The GPU's memory does not suffice.
    """
    import torch

    layout = torch.channels_last
    model = checkpoint.model.to(memory_format=layout)

    def predict(images: np.ndarray) -> np.ndarray:
        try:
            with torch.inference_mode():
                batch = torch.from_numpy(images).to(device, memory_format=layout)
                logits = model(batch)
                return model_training.class_probabilities(logits).float().cpu().numpy()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            # on the CPU lack of memory is a RuntimeError
            if type(error) is RuntimeError and "allocate memory" not in str(error):
                raise
            raise SegmentationError(
                f"The memory of {device} does not hold {len(images)} windows of "
                f"{images.shape[-2]} x {images.shape[-1]} pixels; lower --batch_size or "
                "--patch_size"
            ) from error

    return predict


# --- classes and statistics -----------------------------------------------------------------


def decide(probabilities: np.ndarray, valid: np.ndarray, threshold: float, nodata: int):
    """From probabilities to the map.

    Args:
        probabilities: (K, H, W) float32; K = 1 is the foreground alone.
        valid: (H, W) bool.
        threshold: Least probability of the foreground (K = 1).
        nodata: Class id of invalid pixels.

    Returns:
        classes (H, W) uint8 or uint16, confidence (H, W) float32: the probability of the class.

    Raises:
        SegmentationError: A probability that is not a number.
    """
    if len(probabilities) == 1:
        foreground = probabilities[0]
        # blended weights sum to one but for the last bit
        classes = (foreground >= threshold - 1e-6).astype(np.int64)
        confidence = np.where(classes, foreground, 1 - foreground)
    else:
        classes = probabilities.argmax(axis=0)
        confidence = probabilities.max(axis=0)
    classes = np.where(valid, classes, nodata)
    confidence = np.where(valid, np.minimum(confidence, 1), CONFIDENCE_NODATA)
    if not np.isfinite(confidence).all():
        raise SegmentationError(
            "The model gives probabilities that are not numbers; are the scene's values absurd, or "
            "did the training diverge?"
        )
    return classes.astype(map_dtype(nodata)), confidence.astype(np.float32)


def map_nodata(label_classes: int) -> int:
    """The value of invalid pixels in a map: 255, or 65535 past 255 classes."""
    return 255 if label_classes <= 255 else 65535


def map_dtype(nodata: int) -> type:
    return np.uint8 if nodata == 255 else np.uint16


class Statistics:
    """What a map adds up to, row by row."""

    BINS = 1000  # of the confidence between 0 and 1

    def __init__(self, names: Sequence[str], areas: np.ndarray | None):
        """``areas`` (H,): square metres of a pixel in each row, None if unknown."""
        self.names = list(names)
        self.areas = areas
        self.row = 0
        self.total = 0
        self.pixels = np.zeros(len(self.names), np.int64)
        self.area = np.zeros(len(self.names))
        self.confidence = np.zeros(len(self.names))
        self.histogram = np.zeros(self.BINS, np.int64)

    def add(self, classes: np.ndarray, confidence: np.ndarray) -> None:
        """Count the next rows of a map, (n, W) each."""
        count = len(self.names)
        for row in classes:
            found = np.bincount(row[row < count], minlength=count)
            self.pixels += found
            if self.areas is not None:
                self.area += found * self.areas[self.row]
            self.row += 1
        self.total += classes.size
        known = classes < count
        values = confidence[known].astype(np.float64)
        self.confidence += np.bincount(classes[known], values, minlength=count)
        self.histogram += np.histogram(values, self.BINS, range=(0, 1))[0]

    def report(self) -> dict:
        """Pixels, shares, areas and confidence, as plain numbers for JSON."""
        mapped = int(self.pixels.sum())
        classes = []
        for number, name in enumerate(self.names):
            pixels = int(self.pixels[number])
            entry = {"class": number, "name": name, "pixels": pixels}
            entry["share"] = pixels / mapped if mapped else None
            known = self.areas is not None
            entry["area_ha"] = float(self.area[number]) / 1e4 if known else None
            mean = float(self.confidence[number]) / pixels if pixels else None
            classes.append(entry | {"mean_confidence": mean})
        summary = None
        if mapped:
            reached = np.cumsum(self.histogram) / mapped
            summary = {"mean": float(self.confidence.sum()) / mapped}
            for key, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9)):
                place = int(np.searchsorted(reached, share))
                summary[key] = (place + 0.5) / self.BINS
            below = self.histogram[: self.BINS // 2].sum()
            summary["share_below_0.5"] = float(below) / mapped
        return {
            "pixels": self.total,
            "mapped_pixels": mapped,
            "nodata_pixels": self.total - mapped,
            "classes": classes,
            "confidence": summary,
        }


def report_text(report: dict) -> str:
    """The statistics as aligned text, a line per class."""
    width = max(12, *(len(entry["name"]) + 2 for entry in report["classes"]))
    head = f"{'class':>5}  {'name':{width}}{'pixels':>14}{'share':>9}{'area (ha)':>15}"
    lines = [f"{report['output']}", head + f"{'confidence':>12}"]

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for entry in report["classes"]:
        lines.append(
            f"{entry['class']:>5}  {entry['name']:{width}}{entry['pixels']:>14,}"
            f"{number(entry['share'], '.2%'):>9}{number(entry['area_ha'], ',.2f'):>15}"
            f"{number(entry['mean_confidence'], '.3f'):>12}"
        )
    nodata = report["nodata_pixels"] / report["pixels"]
    lines.append(f"nodata {report['nodata_pixels']:,} pixels ({nodata:.2%})")
    summary = report["confidence"]
    if summary:
        lines.append(
            f"confidence: mean {summary['mean']:.3f}, median {summary['median']:.3f}, 80 % between "
            f"{summary['p10']:.3f} and {summary['p90']:.3f}, "
            f"{summary['share_below_0.5']:.2%} of the pixels below 0.5"
        )
    return "\n".join(lines)


# --- maps -----------------------------------------------------------------------------------


class RowWriter:
    """Writes rows of any number into a raster as whole rows of blocks."""

    def __init__(self, raster: rasterio.io.DatasetWriter):
        self.raster = raster
        self.waiting: list[np.ndarray] = []
        self.row = 0

    def write(self, rows: np.ndarray) -> None:
        """Take the next rows (n, W); what does not fill a row of blocks waits."""
        self.waiting.append(rows)
        count = sum(map(len, self.waiting))
        last = self.row + count == self.raster.height
        ready = count if last else count // BLOCK * BLOCK
        if not ready:
            return
        rows = np.concatenate(self.waiting)
        self.waiting = [rows[ready:]]
        window = Window(0, self.row, self.raster.width, ready)
        self.raster.write(rows[:ready], 1, window=window)
        self.row += ready


def map_profile(scene: rasterio.DatasetReader) -> dict:
    """What all outputs of a scene have in common."""
    profile = {
        "width": scene.width,
        "height": scene.height,
        "count": 1,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "bigtiff": "if_safer",
    }
    points, points_crs = scene.gcps
    if points and points_crs and scene.crs is None:
        return profile | {"gcps": points, "crs": points_crs}
    return profile | {"crs": scene.crs, "transform": scene.transform}


@contextmanager
def open_outputs(task: Task, scene, names: Sequence[str], tags: dict, confidence: bool):
    """Writers of the class map and, when asked for, the confidence.

    Both appear under their names when both are complete. GeoTIFF has no place for the names of
    categories that other programs look into, so they lie also in GDAL's ``.aux.xml``.
    """
    nodata = map_nodata(len(names))
    outputs = {task.output: {"dtype": map_dtype(nodata), "nodata": nodata}}
    if confidence:
        options = {"dtype": "float32", "nodata": CONFIDENCE_NODATA, "predictor": 3}
        outputs[task.beside("_confidence.tif")] = options
    with ExitStack() as finished:
        parts = [finished.enter_context(rasters.whole_file(path)) for path in outputs]
        with ExitStack() as unfinished:
            files = []
            for part, options in zip(parts, outputs.values()):
                file = rasters.create_tiff(part, **map_profile(scene), **options)
                files.append(unfinished.enter_context(file))
                files[-1].update_tags(**tags)
            colours = enumerate(rasters.class_colours(len(names)))
            files[0].write_colormap(1, {number: (*rgb, 255) for number, rgb in colours})
            files[0].update_tags(**rasters.class_name_tags(names))
            if confidence:
                files[1].set_band_description(1, "probability of the class")
            yield [RowWriter(file) for file in files]
        add_categories(Path(f"{parts[0]}.aux.xml"), names)


def add_categories(path: Path, names: Sequence[str]) -> None:
    """Put the category names of band 1 into GDAL's auxiliary metadata, there or not yet."""
    root = ElementTree.Element("PAMDataset")
    if path.exists():  # GDAL has put there what a GeoTIFF cannot hold
        root = ElementTree.parse(path).getroot()
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    categories = ElementTree.SubElement(band, "CategoryNames")
    for name in names:
        ElementTree.SubElement(categories, "Category").text = name
    ElementTree.ElementTree(root).write(path, encoding="utf-8")


# --- prediction -----------------------------------------------------------------------------


def check_options(
    checkpoint: model_training.Checkpoint, config: PredictionConfig
) -> None:
    """Raise CheckpointError where an option contradicts the checkpoint."""
    model = checkpoint.config
    if config.in_channels not in (None, model.in_channels):
        raise model_training.CheckpointError(
            f"--in_channels {config.in_channels}, but {config.model} takes {model.in_channels} "
            "bands"
        )
    if config.num_classes not in (None, model.num_classes, model.label_classes):
        raise model_training.CheckpointError(
            f"--num_classes {config.num_classes}, but {config.model} has {model.label_classes} "
            "classes"
        )
    default = PredictionConfig.threshold
    if model.mode == "multiclass" and config.threshold != default:
        raise OptionError(
            f"--threshold {config.threshold}: {config.model} has {model.num_classes} classes, and "
            "a threshold is for binary models"
        )


def match_bands(
    scene: rasterio.DatasetReader, config: PredictionConfig, checkpoint
) -> list[int]:
    """The bands of a scene that the model gets.

    Raises:
        RasterError: Not as many as the model takes.
    """
    bands = rasters.select_bands(scene, config.bands)
    expected = checkpoint.config.in_channels
    trained = checkpoint.metadata.get("band_descriptions") or []
    if len(bands) != expected:
        known = f" ({', '.join(trained)})" if trained and all(trained) else ""
        raise RasterError(
            f"{scene.name} gives {len(bands)} bands, but {config.model} takes {expected}{known}; "
            "select them with --bands"
        )
    ours = [scene.descriptions[band - 1] for band in bands]
    if all(ours) and trained and all(trained) and ours != list(trained):
        log.warning(
            "warning: the bands of %s are %s, but the model was trained on %s; --bands orders them",
            scene.name,
            ", ".join(ours),
            ", ".join(trained),
        )
    return bands


def map_scene(
    task: Task, config: PredictionConfig, checkpoint, predict: Predict
) -> dict:
    """Map one scene and write all that was asked for.

    Returns:
        The statistics.

    Raises:
        SegmentationError: The scene does not fit the model, or cannot be read.
    """
    from tqdm import tqdm

    names = checkpoint.class_names
    nodata = map_nodata(len(names))
    tags = {
        "SOFTWARE": f"SemanticSeg4EO {rasters.VERSION}",
        "MODEL": checkpoint.config.model_name,
        "NORMALIZATION": checkpoint.normalization.rule,
    }
    with ExitStack() as stack:
        scene = stack.enter_context(rasters.open_raster(task.scene))
        bands = match_bands(scene, config, checkpoint)
        outputs = {task.output.resolve(), task.beside("_confidence.tif").resolve()}
        if overwritten := outputs & {Path(file).resolve() for file in scene.files}:
            raise RasterError(
                f"{overwritten.pop()} is a part of {task.scene}; name another"
            )
        if scene.crs is None and not scene.gcps[1]:
            log.warning("warning: %s has no CRS, so its map has none", scene.name)
        outputs = open_outputs(task, scene, names, tags, config.save_confidence)
        writers = stack.enter_context(outputs)
        axes = tuple(
            make_axis(side, config.patch_size, config.overlap) for side in scene.shape
        )
        statistics = Statistics(names, rasters.pixel_areas(scene))
        rows = blended_rows(
            window_reader(scene, bands, checkpoint.normalization),
            predict,
            axes,
            checkpoint.config.num_classes,
            config.batch_size,
        )
        bar = tqdm(
            total=scene.height, desc=Path(task.scene).name, unit="row", disable=None
        )
        with bar:
            for probabilities, valid in rows:
                results = decide(probabilities, valid, config.threshold, nodata)
                statistics.add(*results)
                for writer, result in zip(writers, results):
                    writer.write(result)
                bar.update(len(valid))
    report = {"scene": task.scene, "output": str(task.output), "model": config.model}
    report |= statistics.report()
    rasters.write_json(task.beside("_statistics.json"), report)
    if config.quicklook:
        draw_quicklook(task, names, config.save_confidence)
    return report


def draw_quicklook(task: Task, names: Sequence[str], confidence: bool) -> Path:
    """Draw scene, map with legend and, when there is one, confidence; the PNG."""
    with rasters.open_raster(task.scene) as scene:
        shown = rasters.rgb_bands(scene.descriptions, scene.colorinterp)
        picture = rasters.stretch(*rasters.overview(scene, shown))
    with rasters.open_raster(task.output) as raster:
        classes, _ = rasters.overview(raster, [1])
    panels = [
        {"title": f"scene (bands {', '.join(map(str, shown))})", "picture": picture},
        {"title": "map", "picture": rasters.colour_map(classes[0], len(names))},
    ]
    if confidence:
        with rasters.open_raster(task.beside("_confidence.tif")) as raster:
            values, valid = rasters.overview(raster, [1])
        values = np.where(valid, values[0], np.nan)
        panels.append({"title": "confidence", "picture": values, "limits": (0, 1)})
    target = task.beside("_quicklook.png")
    colours = rasters.class_colours(len(names))
    figure = rasters.draw_panels(panels, list(zip(names, colours)), task.output.name)
    rasters.save_figure(figure, target)
    return target


# --- command line ---------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="Predict_large_image.py",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    rasters.add_settings(parser, PredictionConfig)
    parser.add_argument_group("about").add_argument(
        "--debug", action="store_true", help="show the traceback of any error"
    )
    return parser


def predict_scenes(config: PredictionConfig) -> int:
    """Map all scenes; those that cannot be mapped are told and left out.

    Returns:
        How many scenes failed.
    """
    tasks = list_tasks(config)
    if len(tasks) == 1:
        rasters.open_raster(tasks[0].scene).close()  # before the model is loaded
    device = model_training.pick_device(config.device)
    checkpoint = model_training.load_checkpoint(config.model, device)
    check_options(checkpoint, config)
    predict = model_predictor(checkpoint, device)
    failed = 0
    for task in tasks:
        try:
            print(report_text(map_scene(task, config, checkpoint, predict)), flush=True)
        except (SegmentationError, OSError) as error:
            if len(tasks) == 1:
                raise
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    if failed:
        print(f"error: {failed} of {len(tasks)} scenes not mapped", file=sys.stderr)
    return failed


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not be done, 2 wrong command line, 130 interrupted."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    rasters.show_messages()
    try:
        config = rasters.settings_from(PredictionConfig, arguments)
        with rasterio.Env(**rasters.GDAL_OPTIONS):
            return 1 if predict_scenes(config) else 0
    except OptionError as error:
        if arguments.debug:
            raise
        parser.error(str(error))
    except (SegmentationError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
