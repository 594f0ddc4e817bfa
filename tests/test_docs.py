"""The documentation says what the code does: its tables, commands, links and examples are checked.

    python tests/test_docs.py

writes the tables anew: the options from the parsers, the minimum versions from requirements.txt, the
public names from ``model_training.__all__``, the published weights from their table, the distances of
the palette.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from colour_distance import DEUTERANOPIA, smallest

import Evaluate_map
import Export_model
import main
import model_training
import Patch_extraction
import Predict_large_image
from common import VERSION
from common.colours import PALETTE
from common.console import settings_from
from evaluation.settings import EvaluationConfig
from exporting.settings import ExportConfig
from prediction.settings import PredictionConfig
from training.published import PUBLISHED
from training.settings import TrainingConfig

README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [
    "options",
    "install",
    "models",
    "troubleshooting",
    "development",
    "training",
    "data",
    "measurements",
]
OPTIONS, INSTALL, MODELS, TROUBLES, DEVELOPMENT, TRAINING, DATA, MEASUREMENTS = (
    ROOT / "docs" / f"{name}.md" for name in NAMES
)
SCRIPTS = {
    "main.py": main,
    "Patch_extraction.py": Patch_extraction,
    "Predict_large_image.py": Predict_large_image,
    "Evaluate_map.py": Evaluate_map,
    "Export_model.py": Export_model,
}
SETTINGS = {
    "main.py": TrainingConfig,
    "Predict_large_image.py": PredictionConfig,
    "Evaluate_map.py": EvaluationConfig,
    "Export_model.py": ExportConfig,
}
PACKAGES = (
    "common", "extraction", "training", "evaluation", "prediction", "exporting",
)  # fmt: skip
END = "<!-- end -->"
# of other programs
FOREIGN_FLAGS = {"--torch-backend", "--help", "--shm-size", "--array", "--no-NAME"}
TOOLS = {"pip", "uv", "ruff", "source", "activate", "py", "python3", "cd"}


# --- tables ---------------------------------------------------------------------------------


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every parser by the name of its table."""
    extraction = Patch_extraction.build_parser()
    (commands,) = (a.choices for a in extraction._actions if a.dest == "command")
    return {
        **commands,
        "main": main.build_parser(),
        "predict": Predict_large_image.build_parser(),
        "evaluate": Evaluate_map.build_parser(),
        "export": Export_model.build_parser(),
    }


def option_table(parser: argparse.ArgumentParser, known=()) -> str:
    """The options of a parser as a Markdown table, without those of other parsers."""
    seen = {(a.dest, a.help) for other in known for a in other._actions}
    rows = ["| option | what it is | default |", "|---|---|---|"]
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
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


def requirements() -> list[tuple[str, str, str]]:
    """Name, lower bound and reason of each line of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [re.match(r"([\w-]+)>=([\w.]+)\S*\s+#\s*(.+)", line) for line in lines]
    return [match.groups() for match in found if match]


def requirements_table() -> str:
    rows = [
        f"| {name} | {least} | {reason} |" for name, least, reason in requirements()
    ]
    return "\n".join(["| package | at least | why |", "|---|---|---|", *rows])


def described_names() -> dict[str, str]:
    """The public names in the table of models.md, with what is said of each."""
    rows = re.findall(
        r"^\| `(\w+)` \| (.+) \|$", between(MODELS, "<!-- names -->"), re.MULTILINE
    )
    return dict(rows)


def names_table() -> str:
    """The table of public names; new ones get the first line of their docstring."""
    described = described_names()
    rows = []
    for name in getattr(model_training, "__all__", described):
        lines = (getattr(model_training, name).__doc__ or "").strip().splitlines()
        rows.append(
            f"| `{name}` | {described.get(name) or (lines or ['?'])[0].rstrip('.')} |"
        )
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def published_table() -> str:
    """The published files of encoder weights, as the code knows them."""
    rows = [
        "| file | encoder | bands | scaling | trained on | MB | licence |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in PUBLISHED.items():
        encoder = f"tu-{row.encoder}" if row.encoder.startswith("vit") else row.encoder
        bands = f"{row.sensor}: {' '.join(row.bands)}"
        cells = (
            f"[{name}]({row.address})", f"`{encoder}`", bands, row.scaling, row.training,
            row.megabytes, row.licence,
        )  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def options_of(name: str) -> str:
    """The table of a parser by its name."""
    known = [parsers()["extract"]] if name == "batch" else []
    return option_table(parsers()[name], known)


def palette_table() -> str:
    """How far apart the nearest two of the first colours are."""
    rows = [
        f"| {count} | {smallest(PALETTE[:count]):.1f} "
        f"| {smallest(PALETTE[:count], DEUTERANOPIA):.1f} |"
        for count in (2, 4, 6, 8, 10, 12, 16, 19, 24, len(PALETTE))
    ]
    head = "| classes | nearest two | with deuteranopia |"
    return "\n".join([head, "|---|---|---|", *rows])


# every table that the code gives: page, the mark above it, what makes it
GENERATED = [
    *(
        (OPTIONS, f"<!-- options: {name} -->", functools.partial(options_of, name))
        for name in (
            "stack",
            "extract",
            "batch",
            "visualize",
            "info",
            "main",
            "predict",
            "evaluate",
            "export",
        )
    ),
    (INSTALL, "<!-- requirements -->", requirements_table),
    (MODELS, "<!-- names -->", names_table),
    (MODELS, "<!-- published -->", published_table),
    (MEASUREMENTS, "<!-- palette -->", palette_table),
]


def between(page: Path, mark: str) -> str:
    """What stands between a mark and the end that follows it."""
    text = page.read_text()
    assert text.count(mark) == 1, f"{page.name} has no place for {mark}"
    found = text.split(mark, 1)[1].split(END, 1)[0].strip()
    # a merge of two tables may lose an end, and what follows would be replaced
    assert "<!--" not in found and "\n#" not in found, f"{page.name}: {mark} has no end"
    return found


def write_tables() -> None:
    for page, mark, make in GENERATED:
        table, former = make(), between(page, mark)
        before, _, rest = page.read_text().partition(mark)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{mark}\n{table}\n{END}{after}")
        if table != former:
            print(f"{page.relative_to(ROOT)}: {mark}")


def table_cells(page: Path, heading: str) -> list[str]:
    """What stands in backquotes in the table that begins with a heading."""
    text = page.read_text()
    table = text[text.index(heading) :].split("\n\n")[0]
    return re.findall(r"`([^`]+)`", table.split("|---|", 1)[1])


def first_cells(page: Path, heading: str) -> list[str]:
    """What stands in backquotes in the first column of such a table."""
    text = page.read_text()
    table = text[text.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [name for row in table for name in re.findall("`([^`]+)`", cells(row)[0])]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split(" | ")]


@pytest.mark.parametrize("page, mark, make", GENERATED, ids=[g[1] for g in GENERATED])
def test_tables_are_those_of_the_code(page, mark, make):
    assert between(page, mark) == make(), "run: python tests/test_docs.py"


def test_every_parser_has_its_table():
    marks = re.findall("<!-- options: (.+) -->", OPTIONS.read_text())
    assert sorted(marks) == sorted(parsers())


def test_every_option_is_explained():
    for parser in parsers().values():
        for action in parser._actions:
            assert action.help, action.option_strings


def test_every_requirement_has_a_reason():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    named = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(requirements()) == len(named)


def test_every_model_stands_in_the_documentation():
    listed = first_cells(MODELS, "| model | from | encoders |")
    assert sorted(listed) == sorted(model_training.get_available_models())


def test_every_encoder_of_the_documentation_is_known():
    timm = pytest.importorskip("timm")
    known = set(model_training.get_available_encoders())
    known |= {f"tu-{name}" for name in timm.list_models()}
    listed = table_cells(MODELS, "| family | `--encoder_name` |")
    assert len(listed) >= 24
    assert set(listed) <= known


def test_every_loss_of_the_documentation_is_known_and_none_is_missing():
    listed = first_cells(TRAINING, "| name | loss |")
    for name in listed:
        assert model_training.parse_loss(name) == {name: 1.0}
    (text,) = (
        a.help for a in main.build_parser()._actions if "--loss" in a.option_strings
    )
    assert all(name in text for name in listed)
    with pytest.raises(model_training.OptionError) as error:
        model_training.parse_loss("unknown")
    known = re.search(r"\((.+)\)", str(error.value)).group(1).split(", ")
    assert sorted(known) == sorted(listed)


@pytest.mark.parametrize("option", ["split_by", "fold_by", "data_augmentation",
                                    "normalization"])  # fmt: skip
def test_every_choice_that_a_table_explains_is_one(option):
    every = [action for parser in parsers().values() for action in parser._actions]
    (choices,) = {tuple(a.choices) for a in every if a.dest == option and a.choices}
    page = DATA if option == "split_by" else TRAINING
    rows = page.read_text().split(f"| `--{option}` |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)`", rows, re.MULTILINE)
    assert sorted(listed) == sorted(choices)


def test_public_names_work():
    described = described_names()
    assert len(described) >= 10
    for name, text in described.items():
        assert getattr(model_training, name) is not None
        assert text != "?", f"say in models.md what {name} is"


# --- commands -------------------------------------------------------------------------------


def blocks(language: str, *pages: Path) -> list[str]:
    text = "\n".join(page.read_text() for page in pages or PAGES)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def inline() -> list[str]:
    """What stands in backquotes outside of blocks, in all pages; a line may end within."""
    codes = [re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", prose(page)) for page in PAGES]
    return [" ".join(code.split()) for page in codes for code in page]


def commands() -> list[list[str]]:
    """Every command of the documentation as words; joined ones apart."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    lines += [
        line.replace("\\", "/") for line in "\n".join(blocks("powershell")).splitlines()
    ]
    lines += [code for code in inline() if re.match(r"\S*python |torchrun ", code)]
    short = rf"({'|'.join(Patch_extraction.COMMANDS)}) --"  # the script is named before
    lines += [
        f"python Patch_extraction.py {code}"
        for code in inline()
        if re.match(short, code)
    ]
    parts = [part for line in lines for part in line.split(" && ")]
    return [words for words in map(shlex.split, parts) if words]


def program(words: list[str]) -> str:
    """The name of what a command starts."""
    return Path(words[0]).name


def python_calls() -> list[list[str]]:
    """The calls of Python files, as the file and its arguments."""
    calls = []
    for words in commands():
        if program(words) == "torchrun":
            assert words[1] == "--nproc-per-node" and words[2].isdecimal()
            calls.append(words[3:])
        elif program(words) == "python" and words[1].endswith(".py"):
            calls.append(words[1:])
    return calls


def test_every_program_of_a_command_is_known():
    for words in commands():
        known = TOOLS | {"python", "torchrun"}
        assert program(words) in known, words


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_understood_by_its_script(script, capsys, monkeypatch):
    stored = {
        "main.py": {"dataset_root": "d", "model": "unet"},
        "Predict_large_image.py": {"model": ["m"], "input": ["a"], "output": "b"},
        "Patch_extraction.py": {"image": "a", "label": "b", "output": "c"},
    }
    read = "common.console.read_settings"
    monkeypatch.setattr(read, lambda path, config_class: stored[script])
    monkeypatch.setattr("common.label_values._lines_of", lambda file: ["a", "b"])
    calls = [words for file, *words in python_calls() if file == script]
    assert len(calls) >= 4
    for words in calls:
        words = [word.replace("$SLURM_ARRAY_TASK_ID", "3") for word in words]
        try:
            arguments = SCRIPTS[script].build_parser().parse_args(words)
        except SystemExit as end:  # lists end the parsing
            assert end.code == 0, words
            continue
        settings = SETTINGS.get(script) or arguments.config_class
        settings_from(settings, arguments)  # no options that exclude each other


def test_the_commands_of_stacking_and_masks_are_among_them():
    calls = [words for file, *words in python_calls() if file == "Patch_extraction.py"]
    page = "".join(page.read_text() for page in PAGES)
    assert sum(words[0] == "stack" for words in calls) == len(
        re.findall(r"(?:^python Patch_extraction\.py |`)stack\s--", page, re.MULTILINE)
    )


def test_options_that_the_text_gives_together_fit_one_script():
    for code in inline():
        if not re.match(r"--\w+ .*--\w", code):
            continue
        fitting = []
        for name, parser in parsers().items():
            for action in parser._actions:
                action.required = False
            flags = {flag for a in parser._actions for flag in a.option_strings}
            words = shlex.split(code)
            if flags >= {word for word in words if word.startswith("--")}:
                parser.parse_args(words)
                fitting.append(name)
        assert fitting, code


class Parsed(Exception):
    """The command line was read without an error."""


def test_every_other_python_command_is_understood(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments):
        parse(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    own = {Path(__file__).name}
    calls = [call for call in python_calls() if call[0] not in SCRIPTS]
    assert {Path(file).name for file, *_ in calls} > own
    for file, *words in calls:
        assert (ROOT / file).is_file(), file
        if Path(file).name in own:
            continue
        monkeypatch.setattr(sys, "argv", [str(ROOT / file), *words])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / file), run_name="__main__")


def test_every_pytest_command_names_what_exists(pytestconfig):
    registered = {re.split(r"[:(]", m)[0] for m in pytestconfig.getini("markers")}
    calls = [words[2:] for words in commands() if words[1:3] == ["-m", "pytest"]]
    assert len(calls) >= 4
    for words in calls:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for flags in (["-q"], ["--cov"]):
            parser.add_argument(*flags, action="store_true")
        for flag in ("-n", "--dist", "-m", "--cov-report"):
            parser.add_argument(flag)
        parser.add_argument("paths", nargs="+")
        given = parser.parse_args(words[1:])
        assert all((ROOT / path).exists() for path in given.paths)
        assert given.m is None or given.m in registered


def test_every_installed_file_exists():
    for words in commands():
        for flag, value in pairwise(words):
            if flag == "-r":
                assert (ROOT / value).is_file(), words


@pytest.mark.skipif(not shutil.which("uv"), reason="uv is not installed")
def test_uv_knows_its_options():
    for words in commands():
        if program(words) == "uv":
            depth = 3 if words[1] == "pip" else 2
            asked = ["uv", *words[1:depth], "--help"]
            told = subprocess.run(asked, capture_output=True, text=True, check=True)
            for flag in (w.split("=")[0] for w in words if w.startswith("--")):
                assert flag in told.stdout, words


def test_every_flag_of_the_text_exists():
    known = {
        flag
        for parser in parsers().values()
        for action in parser._actions
        for flag in action.option_strings
    }
    benchmarks = "".join(p.read_text() for p in ROOT.glob("tests/benchmarks/*.py"))
    known |= {f"--{name}" for name in re.findall(r'add(?:_argument)?\(\s*"--(\w+)"', benchmarks)}  # fmt: skip
    for code in inline():
        if re.match(r"\S*python |torchrun |uv ", code):
            continue  # a whole command
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
            assert flag in known | FOREIGN_FLAGS, code


def test_the_one_line_commands_of_python_work(tmp_path, capsys):
    code = set(re.findall(r'python -c "([^"]+)"', "\n".join(blocks("bash"))))
    assert code
    for number, line in enumerate(sorted(code)):
        file = tmp_path / f"command_{number}.py"
        file.write_text(line)
        runpy.run_path(str(file))
    assert "unet++" in capsys.readouterr().out


def test_ci_runs_the_one_test_command_of_the_readme():
    lines = README.read_text().splitlines()
    (command,) = [t for t in lines if re.match("python3 -m venv .* pytest", t)]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert command in "\n".join(blocks("bash", README)).splitlines()
    assert "-r tests/requirements.txt" in command
    assert "python -m pytest" in command
    assert not command.endswith("\\"), "the command is one line to paste"


# --- Python ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with the files that the demo makes, but smaller."""
    from examples.demo import synthesize_scene

    folder = tmp_path_factory.mktemp("docs")
    synthesize_scene(folder / "demo_output", size=512, seed=3)
    return folder


def save_untrained(path: Path) -> None:
    """A checkpoint of ten bands and six classes."""
    config = model_training.ModelConfig("linknet", 10, 6, "resnet18")
    model_training.save_checkpoint(
        path,
        model_training.build_model(config),
        config,
        model_training.Normalization("dataset", (0.0,) * 10, (5000.0,) * 10),
        {"class_names": ["water", "forest", "grass", "crops", "soil", "town"]},
    )


def run_text(code: str, folder: Path) -> dict:
    (folder / "example.py").write_text(code)
    return runpy.run_path(str(folder / "example.py"))


def test_the_library_examples_run(scene, tmp_path, monkeypatch, capsys):
    save_untrained(tmp_path / "trained_models" / "model_final_model.pth")
    (tmp_path / "scene.tif").symlink_to(scene / "demo_output" / "scene.tif")
    monkeypatch.chdir(tmp_path)
    examples = [text for text in blocks("python", MODELS) if "import" in text]
    mapping, building = sorted(examples, key=lambda text: "load_checkpoint" not in text)
    run_text(mapping, tmp_path)
    shares = ast.literal_eval(capsys.readouterr().out)
    assert next(iter(shares)) == "water"
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    network = run_text(building, tmp_path)["network"]
    assert sum(p.numel() for p in network.parameters()) > 1e6


def documented_keys() -> set[str]:
    return set(first_cells(MODELS, "| key | content |"))


def test_keys_of_a_checkpoint_are_documented(tmp_path):
    import torch

    save_untrained(tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert content.keys() | content["metadata"].keys() <= documented_keys()


@pytest.mark.slow
def test_the_three_steps_of_the_readme_run_as_written(scene, monkeypatch, capsys):
    import torch

    monkeypatch.chdir(scene)
    lines = "\n".join(blocks("bash", README)).replace("\\\n", " ").splitlines()
    steps = [shlex.split(line) for line in lines if line.startswith("python ")]
    steps = [words[1:] for words in steps if words[1] in SCRIPTS]
    assert [script for script, *_ in steps] == [
        "Patch_extraction.py", "main.py", "Predict_large_image.py",
    ]  # fmt: skip
    for script, *words in steps:
        assert SCRIPTS[script].main(words) == 0, words
    for name in ("map.tif", "map_confidence.tif", "map_quicklook.png"):
        assert (scene / name).is_file()
    keys = set()
    for name in ("last", "final_model"):
        content = torch.load(scene / f"trained_models/model_{name}.pth", weights_only=True)  # fmt: skip
        keys |= content.keys() | content["metadata"].keys()
    assert keys == documented_keys()
    listed = re.findall(r"(model_\w+\.\w+)", "\n".join(blocks("text", TRAINING)))
    assert sorted(listed) == sorted(p.name for p in scene.glob("trained_models/*"))


# --- text -----------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = found[plain] = found.get(plain, -1) + 1
        result.add(f"{plain}-{number}" if number else plain)
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall('src="([^"]+)"', text)
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_every_page_and_every_picture_is_shown_somewhere():
    text = "\n".join(page.read_text() for page in PAGES)
    for page in PAGES[1:]:
        assert str(page.relative_to(ROOT)) in README.read_text(), page
    for picture in (ROOT / "examples").glob("*.png"):
        assert f"examples/{picture.name}" in text


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    known = dict(re.findall(r"^([\w-]+): (.+)$", text, re.MULTILINE))
    assert (known["cff-version"], known["version"]) == ("1.2.0", VERSION)
    assert known["license"] == "MIT"
    assert "[CITATION.cff](CITATION.cff)" in README.read_text()


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    assert lines.index("```bash") <= 30, "one screen to the first command"


def test_the_glossary_is_short():
    section = DEVELOPMENT.read_text().split("\n## Glossary\n")[1].split("\n## ")[0]
    assert 10 < len([line for line in section.splitlines() if line.strip()]) <= 40


def test_tree_and_walks_have_their_places():
    assert README.read_text().count("<!-- tree -->") == 1
    assert "<!-- tree -->\n```text\n" in README.read_text()
    assert "```\n<!-- /tree -->" in README.read_text()


@functools.cache
def sources() -> list[Path]:
    """The code of the toolkit, tests and examples apart."""
    files = sorted(ROOT.glob("*.py"))
    return files + [p for name in PACKAGES for p in sorted((ROOT / name).glob("*.py"))]


def test_messages_of_the_troubleshooting_are_those_of_the_code():
    told = {
        node.value
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    quoted = first_cells(TROUBLES, "| message | reason and fix |")
    assert len(quoted) >= 15
    for fragment in quoted:
        assert any(fragment in text for text in told), fragment


def test_files_that_the_development_page_names_exist():
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|md|txt))`", prose(DEVELOPMENT))
    assert len(named) >= 10
    for path in named:
        assert (ROOT / path).is_file(), path


def test_every_required_package_is_imported_by_the_toolkit():
    modules = {
        "segmentation-models-pytorch": "segmentation_models_pytorch",
        "scikit-learn": "sklearn",
        "opencv-python": "cv2",
    }
    named = [name for name, _, _ in requirements()]
    assert len(named) >= 12
    source = "\n".join(path.read_text() for path in sources())
    for name in named:
        module = modules.get(name, name)
        assert re.search(rf"^\s*(import|from) {module}\b", source, re.MULTILINE), name


if __name__ == "__main__":
    write_tables()
