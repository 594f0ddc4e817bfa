"""Errors, settings as command-line options, and what importing them costs."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT

from common.console import add_settings, settings_from
from common.errors import (
    DatasetError,
    OptionError,
    RasterError,
    SegmentationError,
    require,
    unknown_name,
)
from common.options import setting
from prediction.settings import PredictionConfig

# --- the module ------------------------------------------------------------------------------


def test_importing_rasters_imports_nothing_slow():
    slow = "{'torch', 'cv2', 'scipy', 'geopandas', 'matplotlib', 'tifffile'}"
    code = f"import sys; from common import rasters; print({slow} & set(sys.modules) or 'none')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("none", "")


@pytest.mark.parametrize("kind", [RasterError, DatasetError, OptionError])
def test_every_error_is_one_that_the_user_can_mend_and_a_value_error(kind):
    assert issubclass(kind, SegmentationError)
    assert issubclass(kind, ValueError)


def test_an_unknown_name_is_answered_with_the_nearest_known_one():
    error = unknown_name("model", "Unett", ["unet", "fpn", "pan"])
    assert isinstance(error, OptionError)
    message = "Unknown model 'Unett'; did you mean 'unet'? (unet, fpn, pan)"
    assert str(error) == message


def test_an_unknown_name_like_no_other_gets_no_suggestion():
    assert "did you mean" not in str(unknown_name("model", "zzz", ["unet"]))


def test_a_long_list_of_known_names_is_counted_only():
    message = str(unknown_name("encoder", "x", [f"e{i}" for i in range(25)]))
    assert "25 names are known" in message
    assert "e24" not in message


def test_a_name_that_differs_in_case_only_is_suggested():
    error = unknown_name("--label_column", "Class", ["OTHER", "CLASS"])
    assert "did you mean 'CLASS'" in str(error)


# --- settings --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    root: str = setting(help="folder", group="data")
    classes: int = setting(2, "how many", "data", alias="--num_classes")
    rate: float = setting(1e-3, "step size")
    augment: bool = setting(False, "vary the patches")
    mode: str = setting("a", "which one", choices=("a", "b"))
    channels: int | None = setting(None, "bands", shown="those of the data")
    limits: tuple[float, ...] = setting((0.0, 1.0), "range", nargs=2)


def parser_of(config_class) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prog")
    add_settings(parser, config_class)
    return parser


def settings_of(*words: str) -> Settings:
    return settings_from(Settings, parser_of(Settings).parse_args(words))


def test_settings_that_are_not_given_have_the_defaults_of_the_dataclass():
    assert settings_of("--root", "data") == Settings("data")


def test_settings_that_are_given_get_the_type_of_their_field():
    data = ["--root", "d", "--classes", "6", "--rate", "0.5", "--augment"]
    more = ["--mode", "b", "--channels", "4", "--limits", "2", "3"]
    expected = Settings("d", 6, 0.5, True, "b", 4, [2.0, 3.0])
    assert settings_of(*data, *more) == expected


def test_an_alias_sets_the_field_that_it_belongs_to():
    assert settings_of("--root", "d", "--num_classes", "7").classes == 7


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "required: --root"),
        (["--root", "d", "--mode", "c"], "invalid choice: 'c'"),
        (["--root", "d", "--classes", "two"], "invalid int value: 'two'"),
        (["--root", "d", "--channels", "x"], "invalid int value: 'x'"),
        (["--root", "d", "--augment", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_a_wrong_command_line_exits_with_status_2(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        settings_of(*words)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help_lists_groups_defaults_and_words_for_a_default_found_later():
    text = parser_of(Settings).format_help()
    assert "\ndata:\n" in text
    assert "--num_classes CLASSES" in text and "--classes" in text
    assert "(default: 0.001)" in text
    assert "(default: those of the data)" in text
    assert "(default: False)" not in text
    assert "(default: None)" not in text


def test_require_passes_what_holds_and_names_option_value_and_expectation_otherwise():
    require(True, "--epochs", 3, "at least 1")
    with pytest.raises(OptionError, match=r"^--epochs 0: expected at least 1$"):
        require(False, "--epochs", 0, "at least 1")


@pytest.mark.parametrize(
    "option", [{"suggest": 8}, {"polygons": "a.gpkg"}, {"area": "b.gpkg"}, {}]
)
def test_options_that_need_geopandas_are_refused_at_once_without_it(
    option, monkeypatch
):
    given = {"model": ["a.pth"], "input": ["a.tif"], "output": "map.tif"} | option
    PredictionConfig(**given)
    monkeypatch.setitem(sys.modules, "geopandas", None)
    if not option:
        PredictionConfig(**given)
        return
    with pytest.raises(
        OptionError, match=f"--{next(iter(option))} .*pip install geopandas"
    ):
        PredictionConfig(**given)
