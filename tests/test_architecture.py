"""How the code is laid out: which module may import which, how long they are, what the tree shows.

    python tests/test_architecture.py

prints who imports whom as Markdown tables. Everything is read from the syntax trees; only the test
of public names imports anything.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
README, MODELS = ROOT / "README.md", ROOT / "docs" / "models.md"

SHARED = {"common", "model_training", "evaluation"}
# what each part may import beside its own modules
ARROWS = {
    "common": set(),
    "model_training": {"common"},
    "evaluation": {"common", "model_training"},
    "training": SHARED,
    "prediction": SHARED,
    "exporting": SHARED,
    "extraction": {"common"},
    "main": SHARED | {"training"},
    "Predict_large_image": SHARED | {"prediction"},
    "Evaluate_map": SHARED,
    "Export_model": SHARED | {"exporting"},
    "Patch_extraction": {"common", "extraction"},
}
SCRIPTS = (
    "main", "Patch_extraction", "Predict_large_image", "Evaluate_map", "Export_model",
)  # fmt: skip
PACKAGES = [part for part in ARROWS if (ROOT / part).is_dir()]
TORCH = {"torch", "torchvision", "timm", "segmentation_models_pytorch"}
TORCH_IN_COMMON = {"common.devices", "common.distributed"}
HEAVY = TORCH | {"rasterio", "numpy"}

MOST_LINES = {"model_training": 800} | dict.fromkeys(SCRIPTS, 150)
# functions above 60 lines, each with its reason
LONG_FUNCTIONS = {
    "common.sieve.sieve": "a union-find over flat arrays, with its two helpers inside",
    "evaluation.areas.estimate_areas": "half of it is the docstring with source and limits",
    "prediction.blending.blended_rows": "half of it is the docstring with its eight arguments",
}


class Import(NamedTuple):
    """A module that a module imports; ``late`` where a function does it when it is called."""

    name: str
    late: bool


# --- the modules and what they import -------------------------------------------------------


@cache
def modules() -> dict[str, Path]:
    """The project's modules by their dotted names; a package is its ``__init__.py``."""
    paths = [f for part in PACKAGES for f in sorted((ROOT / part).rglob("*.py"))]
    found = {}
    for path in [*paths, *sorted(ROOT.glob("*.py"))]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def statements(node: ast.AST, late=False) -> Iterator[tuple[ast.stmt, bool]]:
    """Every import statement below a node, and whether it stands in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, late
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from statements(child, late or inside)


def names_of(statement: ast.stmt) -> list[str]:
    """The modules that a statement imports, as dotted names."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    assert not statement.level, f"relative import: {ast.unparse(statement)}"
    # of a package, a name may be a module or what its __init__.py holds
    names = [f"{statement.module}.{alias.name}" for alias in statement.names]
    return [name if name in modules() else statement.module for name in names]


@cache
def imports(module: str) -> frozenset[Import]:
    return frozenset(
        Import(name, late)
        for statement, late in statements(tree(module))
        for name in names_of(statement)
    )


def part_of(module: str) -> str:
    return module.partition(".")[0]


def project_imports(module: str, late=True) -> set[str]:
    """The project's own modules that a module imports, the packages that hold them included."""
    found = {one.name for one in imports(module) if late or not one.late}
    found |= {part_of(name) for name in found}
    return (found & modules().keys()) - {module, part_of(module)}


def reached(module: str, late: bool) -> set[str]:
    """A module and all of the project's that importing it imports."""
    found, todo = set(), [module]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo += project_imports(one, late)
    return found


def libraries(module: str, late: bool) -> set[str]:
    """The first names of all that a module imports."""
    return {part_of(one.name) for one in imports(module) if late or not one.late}


# --- arrows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ARROWS)
def test_a_part_imports_only_those_below_it(part):
    found = {
        (module, other)
        for module in modules()
        if part_of(module) == part
        for other in project_imports(module)
        if part_of(other) not in ARROWS[part] | {part}
    }
    assert not found


def test_every_module_belongs_to_a_part():
    assert {part_of(module) for module in modules()} == ARROWS.keys()


def test_nothing_imports_a_script():
    users = {m for m in modules() if libraries(m, late=True) & set(SCRIPTS)}
    assert not users


def test_imports_make_no_circle():
    open_modules, done = [], set()

    def visit(module: str) -> None:
        assert module not in open_modules, " -> ".join([*open_modules, module])
        if module not in done:
            open_modules.append(module)
            for other in sorted(project_imports(module)):
                visit(other)
            done.add(open_modules.pop())

    for module in modules():
        visit(module)


def test_extraction_and_common_work_without_torch():
    own = {m for m in modules() if part_of(m) in ("common", "extraction")}
    users = {m for m in own if libraries(m, late=True) & TORCH}
    assert users == TORCH_IN_COMMON
    for module in (m for m in own if part_of(m) == "extraction"):
        assert not reached(module, late=True) & TORCH_IN_COMMON, module


def test_a_map_is_evaluated_without_torch():
    def users(module: str, late: bool) -> set[str]:
        return {m for m in reached(module, late) if libraries(m, late=True) & TORCH}

    for module in ("evaluation.maps", "evaluation.figures", "evaluation.estimation"):
        assert not users(module, late=True)
    for module in ("evaluation.sampling", "evaluation.points", "evaluation.outputs"):
        assert not users(module, late=False)


# --- what an import costs -------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", [*SCRIPTS, *(m for m in modules() if m.endswith(".settings"))]
)
def test_scripts_and_settings_load_no_heavy_library(module):
    heavy = {one: libraries(one, False) & HEAVY for one in reached(module, late=False)}
    assert not any(heavy.values()), {k: v for k, v in heavy.items() if v}


def test_torch_is_imported_at_the_top_of_modules():
    users = {
        module
        for module in modules()
        if any(part_of(one.name) == "torch" and one.late for one in imports(module))
    }
    assert not users


# --- sizes ----------------------------------------------------------------------------------


def functions() -> Iterator[tuple[str, int]]:
    """Every function of every module by its dotted name, with its lines."""

    def within(node: ast.AST, name: str):
        for child in ast.iter_child_nodes(node):
            named = isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            )
            inner = f"{name}.{child.name}" if named else name
            if named and not isinstance(child, ast.ClassDef):
                yield inner, child.end_lineno - child.lineno + 1
            yield from within(child, inner)

    for module in modules():
        yield from within(tree(module), module)


def test_modules_are_short():
    lines = {m: len(p.read_text().splitlines()) for m, p in modules().items()}
    assert not {m: n for m, n in lines.items() if n > MOST_LINES.get(m, 400)}


def test_long_functions_are_known_with_their_reason():
    assert {name for name, lines in functions() if lines > 60} == LONG_FUNCTIONS.keys()


def test_most_functions_are_short():
    assert statistics.median(lines for _, lines in functions()) <= 15


# --- what the documents show ----------------------------------------------------------------


def test_the_public_names_are_those_of_the_documentation():
    import model_training

    table = MODELS.read_text().split("<!-- names -->")[1].split("<!-- end -->")[0]
    documented = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(documented) == sorted(model_training.__all__)
    assert len(set(documented)) == len(documented)
    assert [name for name in documented if not hasattr(model_training, name)] == []


def drawn_tree() -> set[str]:
    """Files and folders of the README's tree; a line may show several files of a folder."""
    text = README.read_text().split("<!-- tree -->")[1].split("<!-- /tree -->")[0]
    found, folder = set(), ""
    for line in text.strip().strip("`").removeprefix("text\n").splitlines():
        words = line.split()
        # names come first, then what they are
        names = list(takewhile(re.compile(r"[\w-]+(\.py|/)").fullmatch, words))
        assert names, f"no file or folder in the line {line!r}"
        if line[0] != " ":
            folder = names[0] if names[0].endswith("/") else ""
            found.add(names[0])
        else:
            found |= {folder + name for name in names}
    return found


def tracked_files() -> list[Path]:
    """The repository's files, relative to it; those on disk where there is no git."""
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others"]
    done = subprocess.run(
        [*command, "--exclude-standard"], check=False, capture_output=True, text=True
    )
    if done.returncode:
        return [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return [Path(n) for n in done.stdout.splitlines() if (ROOT / n).is_file()]


def test_the_tree_of_the_readme_is_that_of_the_disk():
    """All modules but the empty ``__init__.py`` of a package; other folders by name."""
    files = tracked_files()
    sources = [f for f in files if f.suffix == ".py" and f.name != "__init__.py"]
    shown = {f for f in sources if len(f.parts) == 1 or f.parts[0] in PACKAGES}
    folders = {f"{f.parts[0]}/" for f in files if len(f.parts) > 1}
    visible = {name for name in folders if not name.startswith(".")}
    expected = {f.as_posix() for f in shown} | visible
    assert drawn_tree() == expected


# --- the graph as tables --------------------------------------------------------------------


def graph_tables() -> str:
    """Who imports whom, by part and by module, as Markdown; ``(late)`` is within a function."""
    parts = {part: set() for part in ARROWS}
    for module in modules():
        parts[part_of(module)] |= {part_of(other) for other in project_imports(module)}
    lines = ["| part | imports |", "|---|---|"]
    for part, others in parts.items():
        known = [other for other in ARROWS if other in others - {part}]
        lines.append(f"| `{part}` | {', '.join(f'`{o}`' for o in known) or '-'} |")
    lines += ["", "| module | imports |", "|---|---|"]
    for module in sorted(modules()):
        at_once = project_imports(module, late=False)
        shown = [
            f"`{other}`" + ("" if other in at_once else " (late)")
            for other in sorted(project_imports(module))
            if other not in PACKAGES
        ]
        lines.append(f"| `{module}` | {', '.join(shown) or '-'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(graph_tables())
