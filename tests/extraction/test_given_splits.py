"""Splits that the user has: a column of the grid names them."""

from __future__ import annotations

from collections import Counter

from batch_helpers import Batch, at, messages, tiles, write_grid
from helpers import patch_everywhere
from shapely import box
from site_helpers import Site, complaint, refusal, run

from extraction.given_splits import SPLIT_WORDS

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
