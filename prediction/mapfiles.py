"""The files of a map: GeoTIFF, cloud-optimized GeoTIFF, quicklook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.windows import Window

from common.files import atomic_write, naming
from common.map_classes import class_numbers, map_class_tags
from common.pictures import (
    colour_map,
    draw_panels,
    rgb_bands,
    save_figure,
    stretch,
)
from common.rasters import Source, open_raster
from common.sieve import MapRows, sieved_strips
from common.styles import add_class_table, paletted_style, ramp_style
from common.tiffs import create_tiff, require_complete_tiff, write_errors
from prediction.jobs import SceneJob
from prediction.layers import Layer
from prediction.rowstore import RowStore, StoredPart
from prediction.statistics import COUNTED_ROWS, Statistics

BLOCK = 256  # side of the outputs' tiles in pixels
COLOURED = ("uint8", "uint16")  # types of which a GeoTIFF can have a colour table


class MapWriter:
    """Puts finished rows into the output files, in order and as whole rows of blocks.

    With ``fewest``, areas of fewer pixels are merged: the classes follow when all rows are there.
    """

    def __init__(
        self, rows: RowStore, files: dict, statistics: Statistics, fewest: int = 0
    ):
        self.rows = rows
        self.files = files
        self.statistics = statistics
        self.fewest = fewest
        self.row = 0

    def mark(self, parts: Sequence[StoredPart]) -> None:
        """Count parts that an earlier run or another process has stored."""
        for part, counts in parts:
            self.rows.mark(part)
            self.statistics.counts += counts

    def advance(self) -> None:
        """Write the rows of blocks that are complete by now."""
        rows, height = self.rows, self.rows.height
        open_rows = np.flatnonzero(rows.covered[self.row :] < rows.width)
        ready = self.row + int(open_rows[0]) if len(open_rows) else height
        while (bottom := min(self.row + BLOCK, height)) <= ready and self.row < height:
            for name in self.files:
                if name == "classes" and self.fewest > 1:
                    continue
                array = rows.read(name, self.row, bottom)
                self._write(name, array, self.row)
                if name == "classes":
                    self._count(array[0])
            self.row = bottom

    def finish(self) -> None:
        """Write what is left when all rows are stored."""
        self.advance()
        if self.fewest > 1:
            nodata = self.rows.layers["classes"].nodata
            stored = MapRows(self._stored_classes, self.rows.height)
            for top, classes in sieved_strips(stored, self.fewest, BLOCK):
                before = self.rows.read("classes", top, top + len(classes))
                classes = np.where(classes < 0, nodata, classes).astype(before.dtype)
                self._write("classes", classes[None], top)
                self._count(classes, before[0])

    def _stored_classes(self, top: int, bottom: int) -> np.ndarray:
        """See ``MapRows``."""
        classes = self.rows.read("classes", top, bottom)[0].astype(np.int32)
        classes[classes == self.rows.layers["classes"].nodata] = -1
        return classes

    def _write(self, name: str, array: np.ndarray, top: int) -> None:
        file, layer = self.files[name], self.rows.layers[name]
        if layer.values:
            array = layer.values.of_numbers(array, int(layer.nodata))
        window = Window(0, top, self.rows.width, array.shape[1])
        with write_errors(file.name):
            file.write(array, window=window)

    def _count(self, classes: np.ndarray, before: np.ndarray | None = None) -> None:
        for row in range(0, len(classes), COUNTED_ROWS):
            some = slice(row, row + COUNTED_ROWS)
            self.statistics.add(classes[some], None if before is None else before[some])


def map_profile(job: SceneJob, layer: Layer) -> dict:
    """What an output is created with."""
    scene, (height, width) = job.scene, job.shape
    dtype, nodata = layer.written
    profile = {
        "width": width,
        "height": height,
        "count": len(layer.bands),
        "dtype": dtype,
        "nodata": nodata,
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "compress": "deflate",
        "interleave": "band",
        "bigtiff": "if_safer",
    }
    if layer.dtype == "float32":
        profile["predictor"] = 3
    points, points_crs = scene.gcps
    if points and points_crs and scene.crs is None:
        return profile | {"gcps": points, "crs": points_crs}
    if scene.rpcs and scene.crs is None:
        return profile | {"rpcs": scene.rpcs}
    return profile | {"crs": scene.crs, "transform": job.transform}


@contextmanager
def open_outputs(job: SceneJob, folder: Path) -> Iterator[dict]:
    """The output files of a scene to write to, by layer; unfinished ones lie in ``folder``.

    All appear under their names when all are complete. GeoTIFF has no field for the names of
    classes that other programs read, so they are also in GDAL's ``.aux.xml``, with their colours.
    """
    task, layers, names = job.task, job.layers, job.names
    with ExitStack() as finished:
        for path, style in list_styles(job).items():
            part = finished.enter_context(atomic_write(path, folder))
            part.write_text(style, encoding="utf-8")
        parts = {
            name: finished.enter_context(
                atomic_write(task.beside(layer.ending), folder)
            )
            for name, layer in layers.items()
        }
        plain = parts
        if job.config.format == "cog":
            plain = {name: folder / f"{name}.tif" for name in layers}
        with ExitStack() as unfinished:
            files = {}
            for name, layer in layers.items():
                file = create_tiff(plain[name], **map_profile(job, layer))
                files[name] = file = unfinished.enter_context(file)
                held = job.values if name == "classes" else None
                file.update_tags(**job.tags, **map_class_tags(names, job.codes, held))
                file.descriptions = layer.bands
                file.scales = [layer.scale] * len(layer.bands)
            # for programs that know neither styles nor attribute tables
            if layers["classes"].written[0] in COLOURED:
                values = job.values or range(len(names))
                opaque = {k: (*c, 255) for k, c in zip(values, job.colours)}
                files["classes"].write_colormap(1, opaque)
            yield files
        if job.config.format == "cog":
            for name, layer in layers.items():
                make_cog(plain[name], parts[name], layer)
        beside = Path(f"{parts['classes']}.aux.xml")
        with naming(f"{task.output}.aux.xml", beside):
            add_class_table(beside, names, job.colours, job.codes, job.values)


def list_styles(job: SceneJob) -> dict[Path, str]:
    """The QGIS styles of a scene's rasters, by file: names and colours of classes, else a ramp."""
    ramps = {"dates": (1, len(job.dates))}
    styles = {}
    for name, layer in job.layers.items():
        if layer.style_ending is None:
            continue
        if name == "classes":
            style = paletted_style(job.names, job.colours, job.values)
        else:
            style = ramp_style(*ramps.get(name, (0, 1)))
        styles[job.task.beside(layer.style_ending)] = style
    return styles


def missing_styles(job: SceneJob) -> dict[Path, str]:
    """The styles of a finished map that are not there."""
    styles = list_styles(job)
    return {path: styles[path] for path in styles if not path.is_file()}


def make_cog(plain: Path, target: Path, layer: Layer) -> None:
    """Make a cloud-optimized GeoTIFF of a plain one, with overviews."""
    options = {
        "COMPRESS": "DEFLATE",
        "PREDICTOR": "FLOATING_POINT" if layer.dtype == "float32" else "NO",
        "OVERVIEW_RESAMPLING": "MODE" if layer.name == "classes" else "AVERAGE",
        "BIGTIFF": "IF_SAFER",
    }
    with write_errors(target):
        rasterio.shutil.copy(plain, target, driver="COG", **options)
    require_complete_tiff(target)


def draw_quicklook(job: SceneJob) -> Path:
    """Draw scene, map with legend and, when there is one, confidence; the PNG."""
    task, names, confidence = job.task, job.names, job.config.save_confidence
    top, bottom, left, right = job.area.extent
    with open_raster(task.scene) as scene:
        shown = rgb_bands(scene.descriptions, scene.colorinterp)
        part = Window(left, top, right - left, bottom - top)
        picture = stretch(
            *Source(scene, shown, **job.sources[0].given).overview(window=part)
        )
    with open_raster(task.output) as raster:
        classes, _ = Source(raster).overview()
    if job.values:
        classes = class_numbers(classes, job.values)
    what = f"the first of {len(task.scenes)} dates" if task.further else "scene"
    panels = [
        {"title": f"{what} (bands {', '.join(map(str, shown))})", "picture": picture},
        {"title": "map", "picture": colour_map(classes[0], job.colours)},
    ]
    if confidence:
        with open_raster(task.beside("_confidence.tif")) as raster:
            values, valid = Source(raster).overview()
        values = np.where(valid, values[0], np.nan)
        panels.append({"title": "confidence", "picture": values, "limits": (0, 1)})
    target = task.beside("_quicklook.png")
    figure = draw_panels(panels, list(zip(names, job.colours)), task.output.name)
    save_figure(figure, target)
    return target
