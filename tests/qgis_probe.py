"""qgis_probe.py FILE...: what QGIS shows to somebody who opens a file, as a line of JSON for each.

It runs in a Python that has QGIS, never in that of the tests; ``test_qgis.py`` starts it.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

from osgeo import gdal
from qgis.core import (
    QgsApplication,
    QgsMapRendererSequentialJob,
    QgsMapSettings,
    QgsProviderRegistry,
    QgsRasterLayer,
    QgsVectorLayer,
)
from qgis.PyQt.QtCore import QSize, Qt

SIDE = 96  # of a picture in pixels

gdal.UseExceptions()


def raster_view(layer, path):
    renderer = layer.renderer()
    view = {"renderer": renderer.type(), "style": Path(layer.styleURI()).is_file()}
    if renderer.type() == "paletted":
        view["classes"] = [
            [one.value, one.label, one.color.name()] for one in renderer.classes()
        ]
    if renderer.type() == "singlebandpseudocolor":
        items = renderer.shader().rasterShaderFunction().colorRampItemList()
        view["ramp"] = [[one.value, one.color.name()] for one in items]
        view["range"] = [renderer.classificationMin(), renderer.classificationMax()]
    dataset = gdal.Open(path)  # its bands end with it
    if table := dataset.GetRasterBand(1).GetDefaultRAT():
        columns = range(table.GetColumnCount())
        view["columns"] = [table.GetNameOfCol(column) for column in columns]
        view["rows"] = [
            [table.GetValueAsString(row, column) for column in columns]
            for row in range(table.GetRowCount())
        ]
    return view


def vector_view(layer, path):
    message, loaded = layer.loadDefaultStyle()
    renderer = layer.renderer()
    view = {"renderer": renderer.type(), "style": bool(loaded), "message": message}
    parts = QgsProviderRegistry.instance().querySublayers(path)
    view["layers"] = [part.name() for part in parts]
    if renderer.type() == "categorizedSymbol":
        view["column"] = renderer.classAttribute()
        view["classes"] = [
            [one.value(), one.label(), one.symbol().color().name()]
            for one in renderer.categories()
        ]
    return view


def draw(layer):
    """The colours of a picture of the layer, most frequent first, and the share without any."""
    settings = QgsMapSettings()
    settings.setLayers([layer])
    settings.setExtent(layer.extent())
    settings.setDestinationCrs(layer.crs())
    settings.setOutputSize(QSize(SIDE, SIDE))
    settings.setBackgroundColor(Qt.transparent)
    job = QgsMapRendererSequentialJob(settings)
    job.start()
    job.waitForFinished()
    picture = job.renderedImage()
    places = [(column, row) for row in range(SIDE) for column in range(SIDE)]
    colours = [picture.pixelColor(*place) for place in places]
    seen = Counter(colour.name() for colour in colours if colour.alpha() == 255)
    none = sum(colour.alpha() == 0 for colour in colours)
    return {
        "colours": [name for name, _ in seen.most_common(8)],
        "transparent": none / len(colours),
    }


def view_of(path):
    vector = path.endswith(".gpkg")
    kind = (QgsVectorLayer, "ogr") if vector else (QgsRasterLayer, "gdal")
    layer = kind[0](path, Path(path).stem, kind[1])
    if not layer.isValid():
        return {"valid": False}
    view = (vector_view if vector else raster_view)(layer, path)
    return {"valid": True} | draw(layer) | view


QgsApplication.setPrefixPath(os.environ["QGIS_ROOT"], True)
application = QgsApplication([], False)
application.initQgis()
for file in sys.argv[1:]:
    print(json.dumps({"file": Path(file).name} | view_of(file)), flush=True)
os._exit(0)  # QGIS may crash as it ends
