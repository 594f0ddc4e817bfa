"""What a model finds in labels, by hand-made logits."""

from __future__ import annotations

from dataclasses import replace

import geopandas
import numpy as np
import pyogrio
import pytest
import shapely
import torch
from helpers import CRS, write_dataset, write_raster

from common.patches import PatchPair, list_pairs
from evaluation.audit import (
    LEVELS,
    TRAINED_ON,
    PatchRow,
    draw_doubtful,
    in_order,
    levels,
    write_contradictions,
    write_patches,
)
from evaluation.doubt import SHOWN, Contradiction, DoubtCollector, PatchRecord

COLOURS = [(0, 0, 255), (0, 255, 0), (255, 0, 0)]


def logits_of(probabilities) -> torch.Tensor:
    """Logits (1, K, H, W) of class probabilities (H, W, K)."""
    return torch.tensor(probabilities).float().log().movedim(-1, 0)[None]


@pytest.fixture
def pairs(tmp_path):
    root = write_dataset(tmp_path, 4, 1, 0, bands=3, size=2)
    return list_pairs(root, "train")


def test_loss_and_contradicted_share_are_of_the_labelled_pixels(pairs):
    likely = [
        [[0.9, 0.05, 0.05], [0.05, 0.85, 0.1]],
        [[0.1, 0.1, 0.8], [0.3, 0.3, 0.4]],
    ]
    masks = torch.tensor([[[0, 0], [1, 255]]])
    collector = DoubtCollector(pairs, 3)
    collector(logits_of(likely), masks)
    (record,) = collector.records
    assert record.loss == pytest.approx(-np.log([0.9, 0.05, 0.1]).mean(), rel=1e-5)
    assert record.contradicted == pytest.approx(2 / 3)
    assert record.matrix.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_confidence_is_that_of_calibrated_probabilities(pairs):
    logits = torch.full(
        (1, 1, 2, 2), 3.0
    )  # foreground 0.95, with a temperature of 3 0.73
    masks = torch.zeros(1, 2, 2, dtype=torch.int64)
    for temperature, share in ((1.0, 1.0), (3.0, 0.0)):
        collector = DoubtCollector(pairs, 2, temperature)
        collector(logits, masks)
        assert collector.records[0].contradicted == share
        expected = -np.log(1 - 1 / (1 + np.exp(-3 / temperature)))
        assert collector.records[0].loss == pytest.approx(expected, rel=1e-5)


def test_a_patch_without_labels_has_no_doubt(pairs):
    collector = DoubtCollector(pairs, 2)
    collector(torch.zeros(1, 1, 2, 2), torch.full((1, 2, 2), 255))
    assert collector.records[0].loss is None and collector.worst == []


def test_contradicted_areas_are_outlined_on_the_ground(pairs, tmp_path):
    likely = np.full((2, 2, 3), 0.05)
    given = torch.tensor([[[0, 0], [1, 1]]])
    likely[0, :, 2] = 0.9, 0.9  # both pixels of the first row are class 2
    likely[1, 0] = 0.95, 0.02, 0.03  # one of the second is class 0
    likely[1, 1] = 0.1, 0.2, 0.7  # not confident
    collector = DoubtCollector(pairs, 3, areas=True)
    collector(logits_of(likely), given)
    target = tmp_path / "audit.gpkg"
    write_contradictions(target, collector.found, ["a", "b", "c"], COLOURS)
    table = geopandas.read_file(target, layer="audit")
    found = table[["given", "predicted"]].values.tolist()
    assert found == [["a", "c"], ["b", "a"]]  # the largest first
    assert table.confidence.tolist() == pytest.approx([0.9, 0.95], abs=1e-6)
    assert table.square_metres.tolist() == pytest.approx(table.area.tolist(), rel=1e-2)
    assert table.area[0] == pytest.approx(2 * table.area[1])
    with pytest.raises(AssertionError):  # of another row
        assert table.geometry[0].intersects(table.geometry[1].centroid)


def test_no_contradiction_gives_an_empty_layer(tmp_path):
    write_contradictions(tmp_path / "audit.gpkg", [], ["a", "b"], COLOURS[:2])
    assert len(geopandas.read_file(tmp_path / "audit.gpkg", layer="audit")) == 0


def record(loss: float | None, right: int = 4) -> PatchRecord:
    return PatchRecord(np.array([[right, 4 - right], [0, 0]]), loss, 0.0)


def rows_of(pairs, *losses: float | None) -> list[PatchRow]:
    return [
        PatchRow(pair, "train", record(1.0, n), loss and record(loss))
        for n, (pair, loss) in enumerate(zip(pairs, losses))
    ]


def test_the_list_begins_with_the_most_doubtful(pairs):
    rows = in_order(rows_of(pairs, 0.5, None, 2.0, None))
    assert [row.doubt for row in rows] == [2.0, 0.5, None, None]
    # of those that are trained on, the worse one by the final model
    assert [row.wrong_share for row in rows[2:]] == [0.75, 0.25]
    names = [name for name, *_ in LEVELS]
    assert levels(rows) == [names[0], names[2], TRAINED_ON[0], TRAINED_ON[0]]


def test_a_patch_without_labels_is_not_called_trained_on(pairs):
    nothing = PatchRecord(np.zeros((2, 2), int), None, None)
    rows = [
        PatchRow(pair, "test", nothing, seen)
        for pair, seen in zip(pairs, [nothing, None])
    ]
    assert levels([*rows, *rows_of(pairs, None)]) == [
        "no label",
        "no label",
        TRAINED_ON[0],
    ]


def test_columns_of_unknown_numbers_are_columns_of_numbers(pairs, tmp_path):
    nothing = PatchRow(
        pairs[0], "test", PatchRecord(np.zeros((2, 2), int), None, None), None
    )
    write_patches(tmp_path / "a.gpkg", [nothing], ["no", "yes"], True)
    texts = geopandas.read_file(tmp_path / "a.gpkg", layer="a").select_dtypes(
        ["object", "str"]
    )
    assert sorted(texts) == ["level", "name", "split"]
    folds = [
        replace(row, fold=n) for row, n in zip(rows_of(pairs, 1.0, 0.5), (2, None))
    ]
    write_patches(tmp_path / "b.gpkg", folds, ["no", "yes"], True)
    kinds = pyogrio.read_info(tmp_path / "b.gpkg", layer="b")
    assert dict(zip(kinds["fields"], kinds["dtypes"]))["fold"] == "int32"
    area = Contradiction(pairs[0], shapely.box(0, 0, 1, 1), 0, 1, 0.9, None)
    write_contradictions(tmp_path / "c.gpkg", [area], ["no", "yes"], COLOURS[:2])
    texts = geopandas.read_file(tmp_path / "c.gpkg", layer="c").select_dtypes(
        ["object", "str"]
    )
    assert sorted(texts) == ["given", "patch", "predicted"]


def test_patches_are_a_layer_with_a_style(pairs, tmp_path):
    target = tmp_path / "model_patches.gpkg"
    write_patches(target, rows_of(pairs, 0.5, None, 2.0, 1.0), ["no", "yes"], True)
    table = geopandas.read_file(target, layer="model_patches")
    assert table.doubt.tolist()[:3] == [2.0, 1.0, 0.5] and np.isnan(table.doubt[3])
    assert table.labelled_share.tolist() == [1.0] * 4
    assert table["iou 0 no"].tolist()[0] == pytest.approx(0.5)
    assert table.crs is not None and (table.area > 0).all()
    style = pyogrio.read_dataframe(target, layer="layer_styles").styleQML[0]
    assert 'attr="level"' in style and "first 5 %" in style


def test_more_classes_than_a_table_has_columns_get_none(pairs, tmp_path):
    target, count = tmp_path / "model_patches.gpkg", 2000
    seen = PatchRecord(np.zeros((count, count), int), None, None)
    names = [f"class {number}" for number in range(count)]
    write_patches(target, [PatchRow(pairs[0], "test", seen, seen)], names, False)
    fields = list(pyogrio.read_info(target, layer="model_patches")["fields"])
    assert "doubt" in fields and not any(name.startswith("iou") for name in fields)


def test_patches_without_a_crs_stay_in_their_own_coordinates(tmp_path):
    made = []
    for name in "ab":
        for kind in ("images", "labels"):
            values = np.zeros((1, 2, 2), np.uint8)
            write_raster(tmp_path / kind / f"{name}.tif", values, crs=None)
        made.append(
            PatchPair(
                *(tmp_path / kind / f"{name}.tif" for kind in ("images", "labels"))
            )
        )
    target = tmp_path / "patches.gpkg"
    write_patches(target, rows_of(made, 0.5, 1.0), ["no", "yes"], True)
    table = geopandas.read_file(target, layer="patches")
    assert len(table) == 2 and (table.area > 0).all()


LOCAL = 'LOCAL_CS["site", UNIT["metre", 1]]'


@pytest.mark.parametrize(
    "other, loss", [(None, 9.0), (LOCAL, 9.0), (LOCAL, 0.1), ("EPSG:4326", 0.1)]
)
def test_a_patch_without_a_place_beside_others_gets_no_outline(pairs, other, loss):
    values = np.zeros((3, 2, 2), np.uint16)
    write_raster(pairs[0].image, values, crs=other)  # metres, which are no degrees
    target = pairs[0].image.with_name("patches.gpkg")
    write_patches(target, rows_of(pairs, loss, 0.5, 1.0, 2.0), ["no", "yes"], True)
    table = geopandas.read_file(target, layer="patches").set_index("name")
    assert table.crs == CRS and table.geometry[pairs[0].name] is None
    assert (table.geometry.drop(pairs[0].name).area > 0).all()


@pytest.mark.usefixtures("real_pictures")
def test_the_picture_shows_the_most_doubtful_of_all_models(tmp_path):
    root = write_dataset(tmp_path, 5, 5, 0, bands=3, size=8)
    collectors = []
    for split, scale in (("train", 1.0), ("validation", 3.0)):
        collector = DoubtCollector(list_pairs(root, split), 2)
        for number in range(5):
            collector(
                torch.full((1, 1, 8, 8), scale * number),
                torch.zeros(1, 8, 8, dtype=torch.int64),
            )
        collectors.append(collector)
    assert len(collectors[0].worst) == 5
    assert [entry[1] for entry in collectors[1].worst] == [4, 3, 2, 1, 0]
    target = tmp_path / "picture.png"
    draw_doubtful(target, collectors, ["no", "yes"], COLOURS[:2], 255)
    assert target.stat().st_size > 10_000
    assert SHOWN == 6
    draw_doubtful(tmp_path / "none.png", [], ["no", "yes"], COLOURS[:2], 255)
    assert not (tmp_path / "none.png").exists()
