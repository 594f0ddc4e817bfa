"""The README says what the code does: its tables, commands and example are run against it.

    python tests/test_readme.py

writes the option tables anew, from the parsers.
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main
import model_training
import Patch_extraction
import Predict_large_image

README = ROOT / "README.md"
SCRIPTS = {
    "main.py": main,
    "Patch_extraction.py": Patch_extraction,
    "Predict_large_image.py": Predict_large_image,
}


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every parser by the name of its table."""
    extraction = Patch_extraction.build_parser()
    (commands,) = (a.choices for a in extraction._actions if a.dest == "command")
    return {
        **commands,
        "main": main.build_parser(),
        "predict": Predict_large_image.build_parser(),
    }


def option_table(parser: argparse.ArgumentParser, known=()) -> str:
    """The options of a parser as a Markdown table, without those of other parsers."""
    seen = {(a.dest, a.help) for other in known for a in other._actions}
    rows = ["| option | what it is | default |", "|---|---|---|"]
    for action in parser._actions:
        if action.dest == "help" or (action.dest, action.help) in seen:
            continue
        text, _, shown = (action.help % vars(action)).rpartition(" (default: ")
        text, default = (text, shown.removesuffix(")")) if text else (shown, "off")
        if action.required:
            default = "required"
        if action.choices:
            text += f": {', '.join(f'`{choice}`' for choice in action.choices)}"
        flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
        row = f"| {flags} | {text} | {default} |"
        rows.append(row.replace("<", "&lt;").replace(">", "&gt;"))
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """A README with all option tables up to date."""
    for name, parser in parsers().items():
        start = f"<!-- options: {name} -->"
        assert start in text, f"the README has no place for the options of {name}"
        before, _, rest = text.partition(start)
        after = rest[rest.index("<!-- end -->") :]
        known = [parsers()["extract"]] if name == "batch" else []
        text = f"{before}{start}\n{option_table(parser, known)}\n{after}"
    return text


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    """The calls of the three scripts in the README, as words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines]
    return [w for w in words if w[:1] == ["python"] and w[1:2][0] in SCRIPTS]


def table_cells(heading: str) -> list[str]:
    """What stands in backquotes in the table that begins with a heading."""
    text = README.read_text()
    table = text[text.index(heading) :].split("\n\n")[0]
    return re.findall(r"`([^`]+)`", table.split("|---|", 1)[1])


def test_option_tables_equal_the_parsers():
    text = README.read_text()
    assert text == with_tables(text), "run: python tests/test_readme.py"


def test_every_command_of_the_readme_is_understood():
    assert len(commands()) >= 5
    for _, script, *words in commands():
        parser = SCRIPTS[script].build_parser()
        parser.parse_args(words)


def test_every_model_stands_in_the_readme():
    listed = table_cells("| model | from | encoders |")
    assert set(model_training.get_available_models()) <= set(listed)


def test_every_encoder_of_the_readme_is_known():
    timm = pytest.importorskip("timm")
    known = set(model_training.get_available_encoders())
    known |= {f"tu-{name}" for name in timm.list_models()}
    listed = table_cells("| family | `--encoder_name` |")
    assert len(listed) >= 24
    assert set(listed) <= known


def test_the_library_example_runs(tmp_path, monkeypatch, capsys):
    from examples.demo import synthesize_scene

    synthesize_scene(tmp_path, size=512, seed=3)
    config = model_training.ModelConfig("linknet", 10, 6, "resnet18")
    model_training.save_checkpoint(
        tmp_path / "trained_models" / "model_final_model.pth",
        model_training.build_model(config),
        config,
        model_training.Normalization("dataset", (0.0,) * 10, (5000.0,) * 10),
        {"class_names": ["water", "forest", "grass", "crops", "soil", "town"]},
    )
    monkeypatch.chdir(tmp_path)
    (example,) = [text for text in blocks("python") if "load_checkpoint" in text]
    (tmp_path / "example.py").write_text(example)
    runpy.run_path(str(tmp_path / "example.py"))
    shares = ast.literal_eval(capsys.readouterr().out)
    assert next(iter(shares)) == "water"
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


def test_the_model_list_command_of_the_documentation_works(tmp_path, capsys):
    (code,) = set(re.findall(r'python -c "([^"]+)"', README.read_text()))
    (tmp_path / "command.py").write_text(code)
    runpy.run_path(str(tmp_path / "command.py"))
    assert "unet++" in capsys.readouterr().out


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [text for text in blocks("bash") if "pytest" in text and "uv" in text][
        :1
    ]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert command.count("\n") == 1, "the command is one line to paste"


def test_every_required_package_is_imported_by_the_toolkit():
    named = {
        line.split(">=")[0].strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    modules = {
        "segmentation-models-pytorch": "segmentation_models_pytorch",
        "scikit-learn": "sklearn",
        "opencv-python": "cv2",
    }
    assert len(named) == 12
    source = "\n".join(path.read_text() for path in ROOT.glob("*.py"))
    for name in named:
        module = modules.get(name, name)
        assert re.search(rf"^\s*(import|from) {module}\b", source, re.MULTILINE), name


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
