"""A map against labels: raster, polygons, points; classes, calibration, blocks, what is refused."""

from __future__ import annotations

import json
import shlex

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from helpers import CRS, ORIGIN, PIXEL, cell, patch_everywhere, write_raster
from map_helpers import NAMES, centre, evaluate, random_pair, run, write_map
from rasterio.control import GroundControlPoint
from sklearn import metrics

from common.labels import class_name_tags
from common.map_classes import colours_of_map, map_class_tags
from common.styles import add_class_table
from evaluation.classes import Classes, stored_classes


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The figures that a test would store, by name: drawing their pixels takes a second each."""
    figures = {}

    def keep(figure, target) -> None:
        target.touch()
        figures[target.name] = figure

    patch_everywhere(monkeypatch, "common.pictures.save_figure", keep)
    return figures


def test_scores_are_those_of_scikit_learn_whatever_the_strips(tmp_path, monkeypatch):
    patch_everywhere(monkeypatch, "evaluation.reading.STRIP_PIXELS", 300)
    guess, truth = random_pair()
    guess[:3], truth[:, :5] = 255, 255
    made = write_map(tmp_path / "map.tif", guess)
    label = write_raster(tmp_path / "label.tif", truth, 255)
    report = evaluate(tmp_path, "--map", made, "--label", label)
    known = (guess < 255) & (truth < 255)
    expected = metrics.confusion_matrix(truth[known], guess[known])
    assert report["confusion_matrix"] == expected.tolist()
    accuracy = metrics.accuracy_score(truth[known], guess[known])
    assert report["overall_accuracy"] == pytest.approx(accuracy)
    assert report["labelled_without_map"] == 3 * 55
    assert [entry["name"] for entry in report["per_class"]] == NAMES
    low, high = report["intervals"]["overall_accuracy"]
    assert low < accuracy < high
    assert report["block_size_metres"] == pytest.approx(6 * PIXEL, rel=0.01)
    assert "calibration" not in report
    for name in ("confusion_matrix.png", "errors.png"):
        assert (tmp_path / "evaluation" / name).is_file()
    assert not (tmp_path / "evaluation" / "reliability.png").exists()


def test_a_boundary_counts_the_same_in_strips_and_in_one(tmp_path, monkeypatch):
    guess, truth = random_pair(seed=3)
    words = ("--map", write_map(tmp_path / "map.tif", guess), "--label",
             write_raster(tmp_path / "label.tif", truth, 255))  # fmt: skip
    whole = evaluate(tmp_path, *words)["boundary"]
    patch_everywhere(monkeypatch, "evaluation.reading.STRIP_PIXELS", 60)
    assert evaluate(tmp_path, *words)["boundary"] == whole
    assert whole["tolerance_pixels"] == 2
    assert whole["tolerance_metres"] == pytest.approx(20, rel=0.01)
    in_metres = evaluate(tmp_path, *words, "--boundary_tolerance", "20m")["boundary"]
    assert in_metres["mean_f1"] == whole["mean_f1"]


@pytest.mark.parametrize("shape", [(40, 60), (2000, 60)])  # in parts, too
def test_a_tolerance_in_metres_is_one_in_every_direction_in_degrees(
    tmp_path, monkeypatch, shape
):
    patch_everywhere(monkeypatch, "evaluation.reading.STRIP_PIXELS", 60_000)
    place = {"crs": "EPSG:4326", "origin": (25, 60), "pixel": 1e-4}  # 5.6 x 11.1 m
    truth = np.zeros(shape, np.uint8)
    truth[20:, 30:] = 1
    label = write_raster(tmp_path / "label.tif", truth, 255, **place)
    expected = {(0, 2): ("12m", "10m"), (1, 0): ("12m", "10m"), (0, 12): ("69m", "60m")}
    for shift, (enough, too_little) in expected.items():
        moved = np.roll(truth, shift, axis=(0, 1))
        moved[: shift[0]] = moved[:, : shift[1]] = 0
        made = write_map(tmp_path / "map.tif", moved, NAMES[:2], **place)
        words = "--map", made, "--label", label, "--label_values", "0=water,1=forest"
        found = []
        for text in (enough, too_little):
            report = evaluate(tmp_path, *words, "--boundary_tolerance", text)
            found.append(report["boundary"]["mean_f1"])
            metres = float(text.removesuffix("m"))
            assert report["boundary"]["tolerance_metres"] == pytest.approx(metres)
        assert found[0] == 1 and found[1] < 1


def test_classes_meet_by_name_in_any_order_and_case(tmp_path):
    guess, truth = random_pair()
    order = np.array([2, 0, 1], np.uint8)  # water is 2, forest 0, town 1
    tags = class_name_tags(["Forest", "TOWN", "water"])
    label = write_raster(tmp_path / "label.tif", order[truth], 255, tags=tags)
    report = evaluate(tmp_path, "--map", write_map(tmp_path / "map.tif", guess), "--label", label)  # fmt: skip
    assert report["classes_met_by"] == "name"
    assert report["overall_accuracy"] == (guess == truth).mean()


def test_classes_meet_by_number_where_one_side_has_no_names(tmp_path):
    guess, truth = random_pair()
    label = write_raster(tmp_path / "label.tif", truth + 11, 255)
    made = write_map(tmp_path / "map.tif", guess)
    values = ("--label_values", "11,12,13")  # as in the extraction
    report = evaluate(tmp_path, "--map", made, "--label", label, *values)
    assert report["classes_met_by"] == "number"
    assert report["overall_accuracy"] == (guess == truth).mean()
    assert report["only_in_labels"] == report["only_in_map"] == []


@pytest.mark.parametrize("codes", [[1, 2, 5], [2, 0, 1], [11, 12, 13]])
def test_a_map_of_numbers_and_labels_without_names_meet_by_place(tmp_path, codes):
    _, truth = random_pair()
    made = write_map(tmp_path / "map.tif", truth, names=None)
    values = ("--label_values", ",".join(map(str, codes)))
    label = write_raster(tmp_path / "label.tif", np.array(codes, np.uint8)[truth])
    report = evaluate(tmp_path, "--map", made, "--label", label, *values)
    assert report["classes_met_by"] == "number" and report["overall_accuracy"] == 1
    of_codes = write_map(tmp_path / "codes.tif", np.array(codes)[truth], names=None)
    words = ("--map", of_codes, "--label", label)
    for more in (values, ()) if codes != [2, 0, 1] else ((),):
        assert evaluate(tmp_path, *words, *more)["overall_accuracy"] == 1


def test_labels_without_names_meet_classes_that_are_called_by_their_codes(tmp_path):
    _, truth = random_pair()
    made = write_map(tmp_path / "map.tif", truth, names=["1", "2", "5"])
    label = write_raster(tmp_path / "label.tif", np.array([1, 2, 5], np.uint8)[truth])
    for more in ((), ("--label_values", "1,2,5")):
        report = evaluate(tmp_path, "--map", made, "--label", label, *more)
        assert report["overall_accuracy"] == 1


def test_what_only_one_side_has_counts_as_missed_or_false(tmp_path):
    guess, truth = random_pair()
    tags = class_name_tags(["water", "forest", "rock"])
    label = write_raster(tmp_path / "label.tif", truth, 255, tags=tags)
    report = evaluate(tmp_path, "--map", write_map(tmp_path / "map.tif", guess), "--label", label)  # fmt: skip
    assert (report["only_in_labels"], report["only_in_map"]) == (["rock"], ["town"])
    entries = {entry["name"]: entry for entry in report["per_class"]}
    assert entries["rock"]["pixels"] == (truth == 2).sum()
    assert entries["rock"]["recall"] == entries["town"]["precision"] == 0
    right = (guess == truth) & (truth < 2)
    assert report["overall_accuracy"] == right.mean()


def test_labels_that_share_no_value_with_the_map_are_refused(tmp_path):
    guess, truth = random_pair()
    made = write_map(tmp_path / "map.tif", guess)
    label = write_raster(tmp_path / "label.tif", truth + 11, 255)
    status, _, err = run("--map", made, "--label", label)
    assert status == 1
    assert "(11, 12, 13) have none in common; give --label_values" in err
    label = write_raster(tmp_path / "label.tif", truth + 1, 255)
    _, out, err = run("--map", made, "--label", label)
    assert "meet by number: 1 = forest, 2 = town" in err
    assert (
        "where the extraction had --label_values, the labels need the same here" in err
    )
    assert "95 % intervals: overall accuracy [" in out


@pytest.mark.parametrize("suffix", [".gpkg", ".csv", ".tif"])
def test_a_map_without_a_place_on_the_ground_is_refused_in_a_line(tmp_path, suffix):
    guess, truth = random_pair()
    label = tmp_path / f"label{suffix}"
    if suffix == ".gpkg":
        box = shapely.box(*centre(20, 5), *centre(5, 20))
        table = geopandas.GeoDataFrame({"kind": ["water"]}, geometry=[box], crs=CRS)
        table.to_file(label)
    elif suffix == ".csv":
        label.write_text("lon,lat,kind\n9,50,water\n")
    else:
        write_raster(label, truth, 255)
    column = () if suffix == ".tif" else ("--label_column", "kind")
    made = tmp_path / "map.tif"
    write_map(made, guess, crs=None)
    words = "--map", made, "--label", label, *column, "--output", tmp_path / "o"
    status, _, err = run(*words)
    assert status == 1 and f"{made} has no CRS; assign one" in err
    assert "Traceback" not in err
    corners = [(0, 0), (0, 60), (40, 0), (40, 60)]
    points = [GroundControlPoint(r, c, 9 + c / 1e3, 50 - r / 1e3) for r, c in corners]
    with rasterio.open(made) as file:
        pixels, profile = file.read(), file.profile
    profile |= {"gcps": points, "crs": "EPSG:4326", "transform": None}
    with rasterio.open(made, "w", **profile) as file:
        file.write(pixels)
    status, _, err = run(*words)
    assert status == 1 and "put it on the ground first (gdalwarp" in err


def test_a_scene_in_the_place_of_a_map_is_refused_as_no_map(tmp_path):
    guess, truth = random_pair()
    scene = write_raster(tmp_path / "s.tif", np.stack([guess] * 4))
    label = write_raster(tmp_path / "label.tif", truth, 255)
    status, _, err = run("--map", scene, "--label", label, "--output", tmp_path / "o")
    assert status == 1
    assert "s.tif has 4 bands; a label or a class map has one" in err


def test_more_classes_than_can_be_compared_are_refused_by_whose_they_are(tmp_path):
    pixels = np.arange(2400).reshape(40, 60) % 300
    many = write_raster(tmp_path / "many.tif", pixels.astype(np.uint16), 65535)
    guess, _ = random_pair()
    few = write_map(tmp_path / "few.tif", guess)
    words = "--output", tmp_path / "o"
    _, _, err = run("--map", many, "--label", few, *words)
    assert f"{many} holds more than 255 values; is it a map of classes?" in err
    _, _, err = run("--map", few, "--label", many, *words)
    assert f"{many} holds more than 255 values" in err and "--label_values" in err
    with rasterio.open(many, "r+") as file:
        file.update_tags(**class_name_tags([f"kind {n}" for n in range(300)]))
    status, _, err = run("--map", many, "--label", few, *words)
    assert status == 1 and "The map has 300 classes; one of more than 255" in err
    words = "--sample", 50, "--min_per_class", 0, "--output", tmp_path / "s.gpkg"
    assert run("--map", many, *words)[0] == 0


def test_names_that_have_nothing_in_common_are_refused(tmp_path):
    guess, truth = random_pair()
    tags = class_name_tags(["Wasser", "Wald", "Stadt"])
    label = write_raster(tmp_path / "label.tif", truth, 255, tags=tags)
    made = write_map(tmp_path / "map.tif", guess)
    status, _, err = run("--map", made, "--label", label, "--output", tmp_path / "o")
    assert status == 1
    assert "have no name in common" in err
    assert not (tmp_path / "o").exists()


def write_codes(path, codes, table: dict[int, str]):
    """A map of codes with GDAL's attribute table beside it."""
    write_raster(path, codes.astype(np.uint16), 0)
    rows = "".join(
        f'<Row index="{i}"><F>{value}</F><F>{name}</F></Row>'
        for i, (value, name) in enumerate(table.items())
    )
    fields = "".join(
        f'<FieldDefn index="{i}"><Name>{name}</Name><Type>{kind}</Type>'
        f"<Usage>{usage}</Usage></FieldDefn>"
        for i, (name, kind, usage) in enumerate([("Value", 0, 5), ("Class", 2, 2)])
    )
    path.with_name(f"{path.name}.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><GDALRasterAttributeTable>'
        f"{fields}{rows}</GDALRasterAttributeTable></PAMRasterBand></PAMDataset>"
    )
    return path


@pytest.mark.parametrize("by", ["name", "number"])
def test_a_map_of_codes_is_known_by_its_attribute_table(tmp_path, by):
    guess, truth = random_pair()
    codes = np.array([511, 311, 111])
    made = write_codes(tmp_path / "map.tif", codes[guess], dict(zip(codes, NAMES)))
    if by == "name":
        label = write_raster(tmp_path / "label.tif", truth, 255, tags=class_name_tags(NAMES))  # fmt: skip
    else:
        label = write_raster(tmp_path / "label.tif", codes[truth].astype(np.uint16), 0)
    report = evaluate(tmp_path, "--map", made, "--label", label)
    assert report["classes_met_by"] == by
    assert [entry["name"] for entry in report["per_class"]] == NAMES
    assert report["overall_accuracy"] == (guess == truth).mean()


@pytest.mark.parametrize("tagged", [True, False])
def test_a_map_that_write_codes_made_has_values_names_and_colours(tmp_path, tagged):
    codes, colours = [-511, 311, 111], [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    tags = map_class_tags(NAMES, codes, codes) if tagged else {}
    path = write_raster(tmp_path / "map.tif", np.zeros((4, 4), np.int16), 9, tags=tags)
    add_class_table(tmp_path / "map.tif.aux.xml", NAMES, colours, codes, codes)
    with rasterio.open(path) as file:
        assert stored_classes(file) == Classes(codes, NAMES, True, tuple(codes))
        assert colours_of_map(file) == dict(zip(codes, colours))


def test_a_value_that_no_table_lists_is_an_error(tmp_path):
    guess, truth = random_pair()
    guess[5, 5] = 9
    made = write_map(tmp_path / "map.tif", guess)
    label = write_raster(tmp_path / "label.tif", truth, 255)
    status, _, err = run("--map", made, "--label", label)
    assert status == 1
    assert f"{made} holds 9, which" in err


def test_polygons_in_degrees_are_compared_on_the_pixels_of_the_map(tmp_path):
    guess = np.full((64, 64), 1, np.uint8)
    guess[:, 32:] = 2
    made = write_map(tmp_path / "map.tif", guess)
    table = geopandas.GeoDataFrame(
        {"kind": ["forest", "town", "water"]},
        geometry=[cell(4, 4, 16), cell(40, 4, 16), cell(24, 40, 16)],
        crs=CRS,
    )
    table.to_crs("EPSG:4326").to_file(tmp_path / "label.gpkg")
    report = evaluate(tmp_path, "--map", made, "--label", tmp_path / "label.gpkg",
                      "--label_column", "kind")  # fmt: skip
    assert report["labelled_pixels"] == pytest.approx(3 * 256, abs=8)
    assert report["overall_accuracy"] == pytest.approx(2 / 3, abs=0.01)
    entries = {entry["name"]: entry for entry in report["per_class"]}
    assert entries["forest"]["recall"] == 1
    assert entries["forest"]["precision"] == pytest.approx(2 / 3, abs=0.02)


def test_points_count_the_pixel_that_they_lie_in(tmp_path):
    guess, truth = random_pair()
    rows, columns = [3, 17, 30, 39], [0, 22, 41, 59]
    points = geopandas.GeoDataFrame(
        {"kind": [NAMES[k] for k in truth[rows, columns]]},
        geometry=[shapely.Point(centre(*at)) for at in zip(rows, columns)],
        crs=CRS,
    )
    points.to_file(tmp_path / "points.geojson")
    made = write_map(tmp_path / "map.tif", guess)
    report = evaluate(tmp_path, "--map", made, "--label", tmp_path / "points.geojson",
                      "--label_column", "kind")  # fmt: skip
    assert report["labelled_pixels"] == 4
    right = (guess == truth)[rows, columns].mean()
    assert report["overall_accuracy"] == right


def test_points_of_a_csv_with_ground_around_them(tmp_path):
    guess = np.full((40, 40), 1, np.uint8)
    guess[:, 20:] = 2
    made = write_map(tmp_path / "map.tif", guess)
    lines = [f"{x},{y},{kind}" for (x, y), kind in
             ((centre(10, 8), "forest"), (centre(30, 32), "water"))]  # fmt: skip
    (tmp_path / "points.csv").write_text("\n".join(["x,y,kind", *lines]) + "\n")
    report = evaluate(tmp_path, "--map", made, "--label", tmp_path / "points.csv",
                      "--label_column", "kind", "--label_crs", CRS, "--label_buffer", 15)  # fmt: skip
    assert report["labelled_pixels"] == 18  # nine around each
    assert report["overall_accuracy"] == 0.5


def test_label_values_are_merged_and_named_as_in_the_extraction(tmp_path):
    guess, truth = random_pair()
    detailed = np.array([11, 25, 31], np.uint8)[truth]
    detailed[::2][truth[::2] == 0] = 12
    label = write_raster(tmp_path / "label.tif", detailed, 255)
    made = write_map(tmp_path / "map.tif", guess)
    report = evaluate(tmp_path, "--map", made, "--label", label,
                      "--label_values", "31=town,11+12=water", "--other", "forest")  # fmt: skip
    assert report["classes_met_by"] == "name"
    assert report["overall_accuracy"] == (guess == truth).mean()


def test_classes_that_are_called_by_their_codes_meet_by_these(tmp_path):
    guess, truth = random_pair()
    label = write_raster(
        tmp_path / "label.tif", np.array([9, 5, 1], np.uint8)[truth], 255
    )
    made = write_map(tmp_path / "map.tif", guess, ["9", "5", "1"])
    for more in ((), ("--label_values", "5,9,1")):
        report = evaluate(tmp_path, "--map", made, "--label", label, *more)
        assert report["overall_accuracy"] == (guess == truth).mean()


def test_pictures_have_the_colours_of_the_map_or_those_asked_for(tmp_path, drawn):
    guess, truth = random_pair()
    made = write_map(tmp_path / "map.tif", guess)
    with rasterio.open(made, "r+") as file:
        file.write_colormap(
            1, {0: (0, 0, 99, 255), 1: (0, 99, 0, 255), 2: (99, 0, 0, 255)}
        )
    label = write_raster(tmp_path / "label.tif", truth, 255)
    for more, colour in (
        ((), (0, 0, 99)),
        (("--class_colors", "010203,00ff00,ff0000"), (1, 2, 3)),
    ):
        evaluate(tmp_path, "--map", made, "--label", label, *more)
        picture = drawn["errors.png"].axes[0].images[0].get_array()
        assert set(map(tuple, picture[guess == 0])) == {colour}


def test_the_report_holds_the_command_that_makes_it_again(tmp_path):
    guess, truth = random_pair()
    made = write_map(tmp_path / "map.tif", guess)
    label = write_raster(tmp_path / "label.tif", truth, 255)
    first = evaluate(tmp_path, "--map", made, "--label", label, "--block_size", 80)
    script, *words = shlex.split(first["command"])[1:]
    assert script == "Evaluate_map.py"
    assert run(*words, "--overwrite")[0] == 0
    again = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert again == first


def test_labels_on_another_grid_are_put_on_the_pixels_of_the_map(tmp_path):
    guess, truth = random_pair()
    fine = truth.repeat(2, 0).repeat(2, 1)
    label = write_raster(tmp_path / "label.tif", fine, 255, pixel=PIXEL / 2)
    made = write_map(tmp_path / "map.tif", guess)
    report = evaluate(tmp_path, "--map", made, "--label", label)
    assert report["overall_accuracy"] == (guess == truth).mean()


def test_confidence_beside_the_map_is_compared_with_accuracy(tmp_path):
    guess, truth = random_pair()
    made = write_map(tmp_path / "map.tif", guess)
    label = write_raster(tmp_path / "label.tif", truth, 255)
    confidence = np.full(guess.shape, 0.9, np.float32)
    confidence[:4] = -1
    write_raster(tmp_path / "map_confidence.tif", confidence, -1)
    report = evaluate(tmp_path, "--map", made, "--label", label)
    accuracy = (guess == truth)[4:].mean()
    assert report["calibration"]["expected_calibration_error"] == pytest.approx(
        abs(accuracy - 0.9), abs=1e-6
    )
    assert sum(report["calibration"]["pixels"]) == guess[4:].size
    assert (tmp_path / "evaluation" / "reliability.png").is_file()

    statistics = tmp_path / "map_statistics.json"
    statistics.write_text(json.dumps({"settings": {"sieve": 5000}}))
    words = "--map", made, "--label", label, "--output", tmp_path / "sieved"
    status, _, err = run(*words)
    assert status == 0 and "is of the classes before --sieve" in err
    sieved = json.loads((tmp_path / "sieved" / "evaluation.json").read_text())
    assert "calibration" not in sieved

    # nor is that of an earlier map, beside one that has none
    statistics.write_text(json.dumps({"settings": {"save_confidence": False}}))
    words = "--map", made, "--label", label, "--output", tmp_path / "earlier"
    status, _, err = run(*words)
    assert status == 0 and "map_confidence.tif is of an earlier map" in err
    earlier = json.loads((tmp_path / "earlier" / "evaluation.json").read_text())
    assert "calibration" not in earlier

    statistics.write_text(json.dumps({"settings": {"sieve": None}}))
    write_raster(tmp_path / "map_confidence.tif", confidence[1:], -1)
    status, _, err = run(
        "--map", made, "--label", label, "--output", tmp_path / "other"
    )
    assert status == 1
    assert "is not on the pixels of" in err


def test_no_file_is_replaced_without_overwrite(tmp_path):
    guess, truth = random_pair()
    words = ("--map", write_map(tmp_path / "map.tif", guess), "--label",
             write_raster(tmp_path / "label.tif", truth, 255))  # fmt: skip
    assert run(*words)[0] == 0
    report = tmp_path / "map_evaluation" / "evaluation.json"
    former = report.read_bytes()
    report.write_bytes(former + b"\n")
    status, _, err = run(*words)
    assert status == 1
    assert "give --overwrite" in err
    assert report.read_bytes() == former + b"\n"
    assert run(*words, "--overwrite")[0] == 0
    assert report.read_bytes() == former
    assert not (tmp_path / "map_evaluation" / ".lock").exists()


def test_misses_and_false_alarms_of_a_binary_map_have_colours_of_their_own(
    tmp_path, drawn
):
    guess = np.array([[0, 0, 1, 1]] * 8, np.uint8)
    truth = np.array([[0, 1, 0, 1]] * 8, np.uint8)
    made = write_map(tmp_path / "map.tif", guess, ["background", "water"])
    label = write_raster(tmp_path / "label.tif", truth, 255)
    report = evaluate(tmp_path, "--map", made, "--label", label)
    assert report["iou"] == pytest.approx(1 / 3)  # of water alone
    picture = drawn["errors.png"].axes[-1].images[0].get_array()
    right, missed, false, again = picture[0].tolist()
    assert right == again != missed != false != right


@pytest.mark.parametrize(
    "words, message",
    [
        (("--boundary_tolerance", "wide"), "expected pixels, or metres as 20m"),
        (("--block_size", "0"), "expected more than 0"),
    ],
)
def test_a_wrong_option_is_refused(words, message, tmp_path):
    status, _, err = run("--map", "a.tif", "--label", "b.tif", *words)
    assert status == 2
    assert message in err


def test_labels_elsewhere_are_refused(tmp_path):
    guess, truth = random_pair()
    made = write_map(tmp_path / "map.tif", guess)
    far = write_raster(tmp_path / "far.tif", truth, 255, origin=(ORIGIN[0] + 1e5, ORIGIN[1]))  # fmt: skip
    status, _, err = run("--map", made, "--label", far)
    assert status == 1
    assert "does not overlap" in err


def write_nowhere(path, pixels, **more):
    """A raster without CRS and transform."""
    height, width = pixels.shape
    size = {"width": width, "height": height, "count": 1, "dtype": "uint8"}
    kind = {"driver": "PNG" if path.suffix == ".png" else "GTiff"}
    with rasterio.open(path, "w", **kind, **size, **more) as file:
        file.write(pixels, 1)
        if "nodata" in more:  # a map
            file.update_tags(**class_name_tags(["other", "building"]))
    return path


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_the_map_of_a_picture_is_compared_with_its_mask_pixel_by_pixel(tmp_path):
    guess, truth = (np.minimum(classes, 1) for classes in random_pair())
    made = write_nowhere(tmp_path / "map.tif", guess, nodata=255)
    mask = write_nowhere(tmp_path / "mask.png", truth * 255)
    classes = "--label_values", "0=other,255=building"
    report = evaluate(tmp_path, "--map", made, "--label", mask, *classes)
    expected = metrics.confusion_matrix(truth.ravel(), guess.ravel())
    assert report["confusion_matrix"] == expected.tolist()
    assert report["block_size_metres"] is None
    mask = write_nowhere(tmp_path / "small.png", truth[:-1] * 255)
    status, _, err = run("--map", made, "--label", mask, *classes)
    assert status == 1
    assert "without a location; give a picture of that size" in err


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_map_without_a_crs_is_refused_with_labels_that_have_one(tmp_path):
    guess, truth = random_pair()
    made = write_nowhere(tmp_path / "map.tif", guess, nodata=255)
    label = write_raster(tmp_path / "label.tif", truth, 255)
    status, _, err = run("--map", made, "--label", label)
    assert status == 1
    assert err.startswith("error: ") and "CRS" in err
