"""Splits that the user has: a column of the grid names them."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from batch_helpers import Batch, Dataset, at, messages, metric, tiles, write_grid
from helpers import patch_everywhere
from shapely import LineString, box
from site_helpers import CRS, Site, complaint, refusal, run, write_cells

from common import SPLITS
from common.errors import OptionError
from common.ground import pairs_within
from extraction.given_splits import SPLIT_WORDS
from extraction.settings import ExtractionConfig

SIDE = 4


def splits(site: Site, *words) -> dict[str, str]:
    """The split of each cell of 4 pixels, by the end of its name."""
    patches = site.extract(*words, size=8)
    return {name[-3:]: patch.split for name, patch in patches.items()}


def draw_roles(site: Site, roles: list, columns: int = 10, **more) -> None:
    """A grid of a row per ``columns`` cells whose column ``Role`` holds words."""
    cells = tiles(columns, -(-len(roles) // columns), side=SIDE)[: len(roles)]
    site.draw_grid(cells, Role=roles, **more)


# --- a column of the grid --------------------------------------------------------------------


def test_a_column_names_the_splits_by_words_in_any_case(site):
    words = [word for known in SPLIT_WORDS.values() for word in known]
    draw_roles(site, [*words, "TRAIN", " Val ", "Te"])
    found = splits(site, "--split_column", "role")
    expected = [split for split, known in SPLIT_WORDS.items() for _ in known]
    assert list(found.values()) == [*expected, "train", "validation", "test"]


def test_an_unknown_word_is_an_error_that_names_the_cell_and_the_known_words(
    site, capsys
):
    draw_roles(site, ["train", "vlad", "test"])
    line = refusal(capsys, site, "--split_column", "Role", size=8)
    assert "cell patch_002 has 'vlad' in Role, expected train, training, tr" in line
    assert str(site.grid) in line


def test_cells_without_a_word_are_drawn_among_themselves(site, capsys):
    draw_roles(site, ["test"] * 8 + [None, "", " "] * 4)
    lines = messages(capsys, *site.words("--split_column", "Role", "--seed", 3, size=8))
    assert "--split_column Role names the split of 8 of 20 cells" in lines
    found = {name[-3:]: patch.split for name, patch in site.patches().items()}
    named = [split for name, split in found.items() if int(name) <= 8]
    drawn = Counter(split for name, split in found.items() if int(name) > 8)
    assert set(named) == {"test"}
    assert drawn == {"train": 9, "validation": 2, "test": 1}  # of 12, as the ratios say


def test_no_cell_is_drawn_into_a_split_whose_ratio_is_0(site):
    draw_roles(site, ["test"] * 4 + [""] * 16)
    ratios = ["--train_ratio", 0.75, "--val_ratio", 0.25, "--test_ratio", 0]
    for split_by in ("random", "block"):
        site.out = site.folder / split_by
        words = ["--split_column", "Role", "--split_by", split_by]
        if split_by == "block":
            words += ["--block_size", 10 * SIDE]
        found = splits(site, *words, *ratios)
        tests = [name for name, split in found.items() if split == "test"]
        assert tests == ["001", "002", "003", "004"]
        assert set(found.values()) == set(SPLIT_WORDS)


def test_of_a_drawn_and_a_named_cell_too_near_to_each_other_the_named_one_stays(site):
    draw_roles(site, ["test", "", "", "", "train", "", "", "", "val"], 9)
    words = ["--split_column", "Role", "--buffer", 5]
    found = splits(site, *words)
    assert (found["001"], found["005"], found["009"]) == ("test", "train", "validation")
    assert len(found) < 9  # no neighbour of another split is there


def test_named_cells_too_near_to_each_other_lose_one_of_the_two(site):
    draw_roles(site, ["train", "train", "train", "test", "test", "val"], 6)
    found = splits(site, "--split_column", "Role", "--buffer", 5)
    assert set(found.values()) == set(SPLIT_WORDS)
    assert len(found) == 4


def test_cells_of_a_place_follow_the_split_of_another_date(batch):
    cells = tiles(4, 2)
    for number, roles in enumerate((["test"] * 3 + ["val"] * 3 + [None] * 2, [""] * 8)):
        batch.draw(f"d{number}", (16, 32), seed=number)
        write_grid(batch.data / f"Grid_d{number}.geojson", cells, role=roles)
    dataset = batch.cut("--use_per_image_grid", "--split_column", "role")
    names = [f"{row:03}" for row in range(1, 9)]
    assert [dataset.splits[f"d1_{n}"] for n in names[:6]] == ["test"] * 3 + [
        "validation"
    ] * 3
    for name in names:
        assert dataset.splits[f"d0_{name}"] == dataset.splits[f"d1_{name}"]


def test_a_common_grid_names_the_splits_of_all_scenes(batch):
    for number in range(2):
        batch.draw(f"s{number}", 16, seed=number, transform=at(24 * number, 0))
    cells = [box(x, 0, x + 8, 8) for x in (0, 8, 24, 32)]
    grid = write_grid(batch.folder / "g.geojson", cells, role=["tr", "val", "te", "tr"])
    dataset = batch.cut("--grid", grid, "--split_column", "role")
    expected = ["train", "validation", "test", "train"]
    assert list(dataset.splits.values()) == expected


def test_an_unknown_split_column_is_an_error_that_lists_those_there(site, capsys):
    draw_roles(site, ["train"] * 3)
    line = complaint(capsys, *site.words("--split_column", "rolle"))
    assert "'rolle'; did you mean 'Role'?" in line
    assert not site.out.exists()


def test_a_split_column_needs_a_grid(batch: Batch, capsys):
    batch.draw("a", 16)
    line = complaint(capsys, *batch.words("--split_column", "role"))
    assert "expected --grid with it" in line


def test_a_resumed_run_may_name_the_splits(site, monkeypatch):
    draw_roles(site, ["test", "train", "val", "train"])
    with monkeypatch.context() as patching:

        def fail(*_):
            raise KeyboardInterrupt

        patch_everywhere(patching, "extraction.splits.assign_splits", fail)
        assert run(*site.words(size=8)) == 130
    found = splits(site, "--split_column", "Role", "--resume")
    assert list(found.values()) == ["test", "train", "validation", "train"]


# --- whole scenes ----------------------------------------------------------------------------


def draw_dates(batch: Batch, dates: int) -> None:
    """Scenes of 3 x 3 cells of one place."""
    for date in range(dates):
        batch.draw(f"d{date}", 24, seed=date)


def test_whole_scenes_are_drawn_and_one_line_says_that_places_are_shared(batch, capsys):
    draw_dates(batch, 6)
    lines = messages(capsys, *batch.words("--split_by", "scene"))
    text = "54 of 54 patches touch or overlap a patch of another split, so scores hold for new "
    assert [line for line in lines if "touch" in line] == [
        f"{text}scenes of these places, not for new places"
    ]
    dataset = Dataset(batch.out)
    assert len(dataset.splits) == 54
    of_scene: dict[str, set] = {}
    for name, split in dataset.splits.items():
        of_scene.setdefault(name[:2], set()).add(split)
    assert all(len(found) == 1 for found in of_scene.values())
    counts = Counter(split for (split,) in of_scene.values())
    assert counts == {"train": 4, "validation": 1, "test": 1}


def test_dates_of_one_place_in_several_splits_are_no_leak(batch, capsys):
    draw_dates(batch, 3)
    dataset = batch.cut("--split_by", "scene")
    capsys.readouterr()
    assert run("info", "--output", batch.out) == 0
    out = capsys.readouterr().out
    assert "9 patches of test share ground with train" in out
    assert "scores hold for new scenes of these places" in out
    assert "LEAK" not in out
    folder = dataset.root / "test"
    for kind in ("images", "labels"):  # a date in two splits is one
        moved = min((dataset.root / "train" / kind).iterdir())
        moved.rename(folder / kind / moved.name)
    assert run("info", "--output", batch.out) == 0
    out = capsys.readouterr().out
    assert "LEAK" in out
    assert "scores hold" not in out


def test_too_few_scenes_for_the_splits_are_an_error(batch, capsys):
    draw_dates(batch, 2)
    line = batch.refusal(capsys, "--split_by", "scene")
    assert "2 scenes are too few for 3 splits" in line
    ratios = ["--train_ratio", 0.5, "--val_ratio", 0.5, "--test_ratio", 0]
    dataset = batch.cut("--split_by", "scene", *ratios, "--overwrite")
    assert Counter(dataset.splits.values()) == {"train": 9, "validation": 9}


def test_named_cells_keep_their_split_where_whole_scenes_are_drawn(batch):
    draw_dates(batch, 3)
    roles = ["test"] * 2 + [""] * 7
    grid = write_grid(batch.folder / "g.geojson", tiles(3, 3), role=roles)
    words = ["--split_column", "role", "--split_by", "scene", "--train_ratio", 0.6]
    words += ["--val_ratio", 0.4, "--test_ratio", 0]
    dataset = batch.cut("--grid", grid, *words)
    for date in range(3):
        found = [dataset.splits[f"d{date}_{n:03}"] for n in range(1, 10)]
        assert found[:2] == ["test", "test"]
        assert len(set(found[2:])) == 1
        assert found[2] != "test"


def test_a_buffer_parts_the_places_of_whole_scenes_too(batch):
    for number in range(4):
        batch.draw(f"s{number}", 24, seed=number, transform=at(24 * number, 0))
    dataset = batch.cut("--split_by", "scene", "--buffer", 10, "--train_ratio", 0.75)
    parts = [SPLITS.index(split) for split in dataset.splits.values()]
    ground = metric([dataset.ground[name] for name in dataset.splits])
    assert set(parts) == {0, 1, 2}
    assert not len(pairs_within(ground, parts, 10))


# --- ratios ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.75, 0.15, 0.1)),
        ({"train_ratio": 0.5}, (0.5, 0.3, 0.2)),
        ({"test_ratio": 0.2}, (2 / 3, 0.8 / 6, 0.2)),
        ({"test_ratio": 0}, (0.75 / 0.9, 0.15 / 0.9, 0)),
        ({"train_ratio": 0.7, "val_ratio": 0.3}, (0.7, 0.3, 0)),
        ({"train_ratio": 0.6, "val_ratio": 0.2}, (0.6, 0.2, 0.2)),
        ({"train_ratio": 0, "test_ratio": 1}, (0, 0, 1)),
        ({"test_ratio": 1}, (0, 0, 1)),
    ],
)
def test_ratios_that_are_not_given_share_what_the_given_ones_leave(given, expected):
    config = ExtractionConfig(image="a", label="b", output="c", **given)
    assert config.ratios == pytest.approx(expected, abs=1e-12)
    assert [ratio == 0 for ratio in config.ratios] == [share == 0 for share in expected]


@pytest.mark.parametrize("given", [(0.5, 0.2, 0.2), (0.7, 0.2, 0.2), (0.9, 0.2, None)])
def test_ratios_that_cannot_be_met_are_refused(given):
    names = ("train_ratio", "val_ratio", "test_ratio")
    with pytest.raises(OptionError, match="sum to"):
        ExtractionConfig(image="a", label="b", output="c", **dict(zip(names, given)))


@pytest.mark.parametrize("split_by", ["random", "block", "scene"])
def test_a_dataset_of_one_split_can_be_looked_at(site, capsys, split_by):
    ratios = ["--train_ratio", 0, "--test_ratio", 1]
    patches = site.extract(*ratios, "--split_by", split_by, "--buffer", 20)
    assert {patch.split for patch in patches.values()} == {"test"}
    assert len(patches) == 9
    capsys.readouterr()
    for command in ("info", "visualize"):
        assert run(command, "--output", site.out) == 0
    out, err = capsys.readouterr()
    assert "no ground is shared between splits" in out
    assert "sample_test_patch_001.png" in out
    assert err == ""
    report = json.loads((site.out / "dataset_info.json").read_text())
    assert [s["patches"] for s in report["splits"].values()] == [0, 0, 9]
    assert (site.out / "dataset_splits.png").is_file()


# --- a test area -----------------------------------------------------------------------------


def draw_area(site: Site, *shapes, file="area.geojson", **more) -> str:
    """Polygons, given in pixels of the scene, as a vector file."""
    return str(write_cells(site.folder / file, shapes, **more))


@pytest.mark.parametrize("crs", [CRS, "EPSG:4326", "EPSG:3035"])
def test_cells_with_their_centre_in_the_area_are_the_test_split(site, crs):
    site.draw_grid(tiles(10, 2, side=SIDE))  # columns begin at 0, 4, 8...
    area = draw_area(site, box(-1, -1, 9, 9), box(29, -1, 33, 3), crs=crs)
    words = ["--test_area", area, "--save_metadata"]
    found = splits(site, *words)
    # of the first polygon columns 1 and 2 of both rows, with column 3 touched; the second holds
    # the centre of column 8 in the first row, and touches 9 there
    tests = [name for name, split in found.items() if split == "test"]
    assert tests == ["001", "002", "008", "011", "012"]
    skipped = site.metadata()["skipped"]
    assert skipped == dict.fromkeys(
        ("patch_003", "patch_009", "patch_013"), "touches --test_area"
    )
    others = Counter(split for split in found.values() if split != "test")
    assert others == {"train": 10, "validation": 2}  # as 0.75 to 0.15


def test_cells_along_the_border_of_the_area_touch_it(site):
    site.draw_grid(tiles(10, 1, side=SIDE))
    area = draw_area(site, box(0, 0, 8, 4))
    found = splits(site, "--test_area", area, "--val_ratio", 0.4)
    assert [found["001"], found["002"]] == ["test", "test"]
    assert "003" not in found and "004" in found


@pytest.mark.parametrize("split_by", ["random", "block"])
def test_the_buffer_counts_from_the_cells_of_the_area(site, split_by):
    site.draw_grid(tiles(11, 1, side=SIDE))
    area = draw_area(site, box(0.5, 0.5, 7.5, 3.5))
    words = ["--test_area", area, "--split_by", split_by, "--val_ratio", 0]
    if split_by == "block":
        words += ["--block_size", 10 * SIDE]
    found = splits(site, *words, "--buffer", 81)  # two cells and a bit
    assert list(found) == ["001", "002", *(f"{n:03}" for n in range(6, 12))]
    assert set(found.values()) == {"test", "train"}


def test_the_cells_of_the_area_are_no_missed_share_of_the_others(site, capsys):
    site.draw_grid(tiles(11, 1, side=SIDE))
    area = draw_area(site, box(0.5, 0.5, 19.5, 3.5))
    words = ["--test_area", area, "--val_ratio", 0, "--buffer", 200]
    lines = messages(capsys, *site.words(*words, size=8))
    found = Counter(patch.split for patch in site.patches().values())
    assert found == {"test": 5, "train": 1}
    assert not [line for line in lines if line.startswith("splits of")]


def test_a_cell_that_overlaps_a_test_cell_is_left_out_where_it_misses_the_area(site):
    site.draw_grid([box(x, 0, x + 8, 8) for x in range(0, 40, 6)])
    area = draw_area(site, box(3, 3, 5, 5))
    words = ["--test_area", area, "--save_metadata", "--val_ratio", 0]
    found = splits(site, *words)
    assert found == {"001": "test"} | {f"{n:03}": "train" for n in range(3, 8)}
    reasons = site.metadata()["skipped"]
    assert reasons == {"patch_002": "shares ground with another split"}


def test_all_dates_of_an_area_are_test_and_the_rest_is_drawn(batch):
    draw_dates(batch, 3)
    area = write_grid(batch.folder / "area.geojson", [box(0, 0, 7, 24)])
    words = ["--test_area", area, "--val_ratio", 0.3]
    dataset = batch.cut(*words, "--split_by", "scene", "--train_ratio", 0.7)
    tests = [name[3:] for name, split in dataset.splits.items() if split == "test"]
    assert Counter(tests) == {f"r00{row}_c000": 3 for row in range(3)}


@pytest.mark.parametrize(
    ("shape", "words", "expected"),
    [
        (box(200, 0, 210, 9), [], "No cell has its centre in --test_area"),
        (box(0, 0, 48, 48), [], "All 9 cells lie in --test_area"),
        (LineString([(0, 0), (9, 9)]), [], "has no polygons"),
    ],
)
def test_an_area_that_holds_no_cell_or_all_is_refused(
    site, capsys, shape, words, expected
):
    line = refusal(capsys, site, "--test_area", draw_area(site, shape), *words)
    assert expected in line
    assert "area.geojson" in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--test_ratio", 0.2], "--test_area with --test_ratio 0.2: expected one"),
        (["--split_column", "role"], "--test_area with --split_column role"),
        (["--train_ratio", 0.7, "--val_ratio", 0.2], "sum to 0.9: expected a sum of 1"),
    ],
)
def test_options_that_contradict_a_test_area_are_refused(site, capsys, words, expected):
    line = complaint(capsys, *site.words("--test_area", "a.gpkg", *words))
    assert expected in line
