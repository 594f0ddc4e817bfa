"""--settings: a run again, from what an earlier one stored."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass

import pytest
from faults import COMMANDS
from helpers import QUICK, run_main

import main
import Patch_extraction
import Predict_large_image
from common.console import add_common, add_settings, make_parser, settings_from
from common.options import setting
from common.repeat import command_line, option_words
from extraction.settings import BatchConfig, ExtractionConfig
from prediction.settings import PredictionConfig
from training.settings import TrainingConfig


@dataclass(frozen=True)
class Settings:
    root: str = setting(help="folder")
    epochs: int = setting(2, "how many")
    files: tuple[str, ...] = setting((), "some", nargs="+")
    nodata: float | None = setting(None, "value")
    pretrained: bool = setting(False, "weights")
    resume: bool = setting(False, "go on")
    overwrite: bool = setting(False, "replace")


def parse(*words) -> Settings:
    parser = make_parser("prog", "Text.")
    add_settings(parser, Settings)
    add_common(parser)
    return settings_from(Settings, parser.parse_args([str(word) for word in words]))


def stored(tmp_path, content) -> str:
    file = tmp_path / "stored.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


FULL = {
    "root": "my data", "epochs": 7, "files": ["a b", "c"], "nodata": -9999.0,
    "pretrained": True, "resume": True, "overwrite": True,
}  # fmt: skip


def test_options_come_from_the_file_but_for_those_of_one_run(tmp_path):
    for content in (FULL, {"settings": FULL, "scores": 1}):
        found = parse("--settings", stored(tmp_path, content))
        assert found == Settings("my data", 7, ["a b", "c"], -9999.0, True)


def test_the_command_line_wins(tmp_path):
    file = stored(tmp_path, FULL)
    given = "--epochs", 3, "--files", "d", "--no-pretrained", "--overwrite"
    for words in (("--settings", file, *given), (*given, "--settings", file)):
        expected = Settings("my data", 3, ["d"], -9999.0, False, overwrite=True)
        assert parse(*words) == expected


def test_a_boolean_is_switched_off_without_a_file_too():
    assert parse("--root", "d", "--pretrained", "--no-pretrained") == Settings("d")


def test_any_option_of_the_file_is_left_out(tmp_path):
    left_out = "--no-nodata", "--no-epochs", "--no-files", "--no-pretrained"
    assert parse("--settings", stored(tmp_path, FULL), *left_out) == Settings("my data")


def test_a_file_that_windows_marks_as_utf_8_is_read(tmp_path):
    file = stored(tmp_path, "\ufeff" + json.dumps(FULL))
    assert parse("--settings", file).epochs == 7


def test_a_contradiction_to_the_file_says_how_to_leave_an_option_out(tmp_path, capsys):
    content = {"image": "i", "label": "l", "output": "o", "grid": "my grid.gpkg"}
    words = ["extract", "--settings", stored(tmp_path, content), "--stride", "5"]
    with pytest.raises(SystemExit):
        Patch_extraction.main(words)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--stride with --grid" in line and "--no-NAME leaves one out" in line
    assert Patch_extraction.main([*words, "--no-grid"]) == 1  # no such scene


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"root": "d", "epoch": 1}, "holds epoch, which is no option here"),
        ({"root": "d", "epochs": "many"}, "argument --epochs: invalid int value"),
        ({"root": "d", "epochs": {"a": 1}}, "--epochs of --settings: {'a': 1} is no"),
        ({"epochs": 3}, "the following arguments are required: --root"),
        ([1], "it holds no options by name"),
        ("{", "this is no JSON"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, content, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--settings", stored(tmp_path, content))
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--settings", tmp_path / "none.json")
    error = capsys.readouterr().err
    assert f"--settings {tmp_path / 'none.json'}: No such file" in error


def test_a_command_line_gives_the_settings_that_it_was_made_from():
    config = Settings("my data", 7, ["a b", "-c"], -1.5, True, overwrite=True)
    line = command_line("prog", config)
    assert line.startswith("python prog --root='my data'") or "'--root=my data'" in line
    assert "overwrite" not in line
    assert option_words({"pretrained": False}, Settings) == []


SCRIPTS = [
    (main, "main.py", TrainingConfig,
     {"dataset_root": "my data", "model": "unet", "data_augmentation": "full", "seed": 1}),
    (Predict_large_image, "Predict_large_image.py", PredictionConfig,
     {"model": ["a.pth", "b.pth"], "input": ["x y.tif"], "output": "m.tif", "nodata": -1.0,
      "save_confidence": True}),
    (Patch_extraction, "Patch_extraction.py extract", ExtractionConfig,
     {"image": "a", "label": "b", "output": "c", "bands": "3,2", "train_ratio": 0.5,
      "val_ratio": 0.5, "test_ratio": 0.0}),
    (Patch_extraction, "Patch_extraction.py batch", BatchConfig,
     {"data_dir": "a", "output": "c", "mask": "<id>_mask.tif", "mask_values": "1"}),
]  # fmt: skip


@pytest.mark.parametrize(("script", "name", "config_class", "given"), SCRIPTS)
def test_the_stored_command_and_file_give_the_same_settings(
    tmp_path, script, name, config_class, given
):
    config = config_class(**given)
    command = name.split()[1:]
    for words in (
        shlex.split(command_line(name, config))[2:],
        [*command, "--settings", stored(tmp_path, {"settings": asdict(config)})],
    ):
        arguments = script.build_parser().parse_args(words)
        assert settings_from(config_class, arguments) == config, words


def test_a_training_is_repeated_from_its_metrics(make_dataset, tmp_path):
    root = make_dataset(2, 1, 0, bands=2)
    one, two = tmp_path / "one", tmp_path / "two"
    given = "--dataset_root", root, "--save_dir", one, "--epochs", 1
    assert run_main(*QUICK, *given)[0] == 0
    metrics = one / "model_metrics.json"
    assert run_main("--settings", metrics, "--save_dir", two)[0] == 0
    first, second = (
        json.loads((folder / "model_metrics.json").read_text()) for folder in (one, two)
    )
    assert first["history"][0]["train_loss"] == second["history"][0]["train_loss"]
    assert f"--save_dir={two}" in second["command"]


def test_an_extraction_and_a_map_are_repeated_from_what_they_left(place):
    extract, predict = (COMMANDS[name][1].split() for name in ("extract", "predict"))
    assert Patch_extraction.main([*extract, "--save_metadata"]) == 0
    file = "out/Patch/metadata.json"
    again = ["extract", "--settings", file, "--output", "again"]
    assert Patch_extraction.main(again) == 0
    first, second = (
        json.loads((place / folder / "Patch" / "metadata.json").read_text())
        for folder in ("out", "again")
    )
    assert first["patches"] == second["patches"]
    assert first["command"].startswith("python Patch_extraction.py extract --")
    assert Predict_large_image.main(predict) == 0
    file = "map_statistics.json"
    (place / "again").mkdir(exist_ok=True)
    again = ["--settings", file, "--output", "again/map.tif"]
    assert Predict_large_image.main(again) == 0
    first, second = (
        json.loads((place / folder / file).read_text()) for folder in (".", "again")
    )
    assert first["classes"] == second["classes"]
    assert first["settings"] | {"output": "again/map.tif"} == second["settings"]
    assert "--output=again/map.tif" in second["command"]
