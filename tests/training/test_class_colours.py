"""The colours of classes, from option and patches to the checkpoint and its pictures."""

from __future__ import annotations

import pytest
from helpers import QUICK, patch_everywhere, run_main, train, write_dataset

from common.colours import BLUE, GREEN, GREY, PALETTE, RED, hex_of_colour
from common.labels import class_tags
from model_training import load_checkpoint
from training.classes import settle_classes
from training.dataset import codes_for, colour_advice, colours_for, index_split
from training.settings import TrainingConfig

NAMES = ["water", "forest", "town"]
PINK, BLACK = (220, 20, 150), (0, 0, 0)


@pytest.fixture
def colours(tmp_path):
    """A function that gives the colours, and the line on them, of a training on tagged patches."""

    def find(tags: dict, **options) -> tuple[list, str | None]:
        root = write_dataset(tmp_path / "data", 1, 0, 0, classes=3, size=8, tags=tags)
        options = {"mode": "multiclass", "classes": 3} | options
        config = TrainingConfig(
            dataset_root=str(root), model="unet", save_dir="out", **options
        )
        index = index_split(config, "train", None)
        return colours_for(config, index), colour_advice(config, index)

    return find


def test_colours_of_the_labels_are_taken_and_completed(colours):
    assert colours(class_tags(NAMES, None, None)) == ([BLUE, GREEN, RED], None)
    known = [PINK, BLACK, None]
    assert colours(class_tags(NAMES, None, known)) == ([PINK, BLACK, RED], None)
    # a table of a label of which the extraction did not know the classes
    more = [PINK, BLACK, RED, RED]
    assert colours(class_tags(None, None, more)) == ([PINK, BLACK, RED], None)


def test_patches_of_earlier_versions_and_tags_of_other_programs_give_the_palette(
    colours,
):
    assert colours({})[0] == PALETTE[:3]
    assert colours({"CLASS_COLORS": "red, blue"})[0] == PALETTE[:3]
    assert (
        colours({"CLASS_COLORS": '["red", 7]', "CLASS_CODES": "{}"})[0] == PALETTE[:3]
    )


def test_a_table_with_one_colour_for_two_classes_is_not_used_and_that_is_reported(
    colours,
):
    found, line = colours(class_tags(NAMES, None, [PINK, BLACK, PINK]))
    assert found == [BLUE, GREEN, RED]
    assert line.startswith("the colour table of the labels has one colour for several")


def test_the_option_wins_over_the_labels(colours):
    tags = class_tags(NAMES, None, [PINK, BLACK, RED])
    found, line = colours(tags, class_colors="000,ff3c1e, #DC1496")
    assert (found, line) == ([BLACK, RED, PINK], None)


@pytest.mark.parametrize("codes", [[30, 10, 20], ["land", "sea", "ice"], None])
def test_a_legend_counts_by_the_values_that_the_labels_had(colours, tmp_path, codes):
    legend = tmp_path / "legend.clr"
    values = codes or range(3)
    legend.write_text(f"{values[2]} 220 20 150\n{values[0]} 0 0 0\n")
    found, line = colours(class_tags(NAMES, codes, None), class_colors=str(legend))
    assert found == [BLACK, GREEN, PINK]
    assert line == f"{legend} has no colour for forest: taken from the palette"


def test_colours_are_stored_in_every_checkpoint_and_shown_in_the_pictures(
    tmp_path, monkeypatch
):
    tags = class_tags(["no roof", "roof"], None, [None, PINK])
    root = write_dataset(tmp_path / "data", 4, 2, 2, tags=tags)
    drawn = []
    patch_everywhere(
        monkeypatch,
        "evaluation.examples.draw_examples",
        lambda target, examples, names, colours, ignored: drawn.append(colours),
    )
    done = train(root, tmp_path / "models")
    assert drawn == [[GREY, PINK]]
    for name in ("best_loss", "final_model"):
        stored = done.metadata(name)["class_colors"]
        assert stored == [hex_of_colour(GREY), "#dc1496"]
    loaded = load_checkpoint(tmp_path / "models" / "model_final_model.pth")
    assert loaded.class_colours == [GREY, PINK]


@pytest.mark.parametrize("codes", [[40, 9], ["no", "yes"], [1, 2, 3], None])
def test_codes_of_the_labels_are_stored_where_there_is_one_for_each_class(
    tmp_path, codes
):
    tags = class_tags(None, codes, None)
    root = write_dataset(tmp_path / "data", 1, 0, 0, classes=2, size=8, tags=tags)
    config = TrainingConfig(
        dataset_root=str(root), model="unet", save_dir="o", mode="binary", classes=2
    )
    expected = codes if codes and len(codes) == 2 else None
    assert codes_for(config, index_split(config, "train", None)) == expected


WRONG = [("red,rad", "'rad'"), ("red,#f00", "same colour"), ("no.clr", "no such file")]


@pytest.mark.parametrize(("asked", "reason"), WRONG)
def test_wrong_colours_are_found_before_a_patch_is_read(
    small_data, tmp_path, monkeypatch, asked, reason
):
    words = ("--dataset_root", small_data, "--save_dir", tmp_path / "out", *QUICK)
    words += ("--class_colors", asked)
    status, _, err = run_main(*words, "--check")
    assert status == 1 and reason in err
    patch_everywhere(monkeypatch, "training.samples.index_samples", lambda *_: 1 / 0)
    status, _, err = run_main(*words)
    assert status == 2 and reason in err


def test_another_number_of_colours_than_classes_is_refused(tmp_path):
    options = {"model": "unet", "class_colors": "red,lime"}
    with pytest.raises(ValueError, match="expected 2 colours, one for each class"):
        TrainingConfig(
            dataset_root="a", mode="binary", model="unet", class_colors="red"
        )
    tags = class_tags(NAMES, None, None)
    root = write_dataset(tmp_path, 1, 0, 0, classes=3, size=8, tags=tags)
    config = TrainingConfig(dataset_root=str(root), **options)
    with pytest.raises(ValueError, match="expected 3 colours"):
        settle_classes(config)  # which the dataset has
