"""What ``--input``, ``--model``, ``--output`` and ``--polygons`` name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import RasterError, require
from common.files import require_folder
from common.rasters import PICTURES, SCENE_SUFFIXES, open_raster
from common.sources import require_whole
from common.tiffs import TIFF_SUFFIXES
from prediction.settings import PredictionConfig, split_part

MOST_DATES = 255  # which a byte counts
LONGEST_NAME = 255  # bytes of a file's name that file systems allow
FURTHER_LAYERS = ("confidence", "uncertainty", "probabilities", "dates")


@dataclass(frozen=True)
class Task:
    """One scene and the files that are written for it."""

    scene: str
    output: Path
    polygons: Path | None = None
    further: tuple[str, ...] = ()  # dates that are combined with the scene

    @property
    def scenes(self) -> list[str]:
        return [self.scene, *self.further]

    def beside(self, ending: str) -> Path:
        """The path of a further file, named after the map."""
        stem = self.output.stem
        return self.output if ending == ".tif" else self.output.with_name(stem + ending)

    @property
    def partial(self) -> Path:
        """The hidden folder of the unfinished map."""
        return self.output.with_name(f".{self.output.name}-partial")


def recorded_run(task: Task, finished: bool = False) -> dict | None:
    """The ``run`` that a map was made by, or is being made by unless it must be ``finished``."""
    files = [] if finished else [task.partial / "run.json"]
    for path in (*files, task.beside("_statistics.json")):
        with suppress(FileNotFoundError, ValueError):  # of another program
            stored = json.loads(path.read_text())
            return stored.get("run", stored)
    return None


def list_scenes(given: Sequence[str]) -> list[str]:
    """The scenes that ``--input`` names; a folder stands for the scenes in it.

    Raises:
        RasterError: A folder without scenes.
    """
    scenes = []
    for text in given:
        if not Path(text).is_dir():
            scenes.append(text)
            continue
        files = sorted(
            path
            for path in Path(text).iterdir()
            if path.is_file() and not path.name.startswith(".")
        )
        kinds = (
            SCENE_SUFFIXES,
            tuple(PICTURES),
        )  # a picture beside scenes is one of them
        found = ([str(f) for f in files if f.suffix.lower() in kind] for kind in kinds)
        scenes_there = next(filter(None, found), None)
        if scenes_there is None:
            looked_for = ", ".join((*SCENE_SUFFIXES, *PICTURES))
            raise RasterError(f"No scenes in {text} (looked for {looked_for})")
        scenes += scenes_there
    return scenes


def list_tasks(config: PredictionConfig) -> list[Task]:
    """The scenes to map and the names of their maps.

    Raises:
        OptionError: An output that is not a .tif, a file where a folder is needed, an output that
            is an input.
        RasterError: A folder without scenes, or two scenes of one name.
    """
    scenes, output = list_scenes(config.input), Path(config.output)
    polygons = Path(config.polygons) if config.polygons else None
    given_folder = any(Path(text).is_dir() for text in config.input)
    several = len(scenes) > 1 or given_folder or output.is_dir()
    if config.combine:
        fine = 1 < len(scenes) <= MOST_DATES
        expected = f"2 to {MOST_DATES} scenes in --input"
        require(fine, "--combine", f"{config.combine} of {len(scenes)}", expected)
        several = False
    fine = output.suffix.lower() in TIFF_SUFFIXES
    if several:
        fine = output.is_dir() or not (output.exists() or fine)
    expected = "a folder for several scenes" if several else "a name that ends in .tif"
    require(fine, "--output", output, expected)
    fine = not polygons or (polygons.suffix == ".gpkg") != several
    require(fine, "--polygons", polygons, expected.replace(".tif", ".gpkg"))
    if config.combine:
        tasks = [Task(scenes[0], output, polygons, tuple(scenes[1:]))]
        require_names(tasks, config)
        return tasks
    tasks = []
    for scene in scenes:
        task = Task(scene, output, polygons)
        if several:
            stem = f"{Path(scene).stem}_prediction"
            vectors = polygons and polygons / f"{stem}.gpkg"
            task = Task(scene, output / f"{stem}.tif", vectors)
        tasks.append(task)
    folders = {Path(text).resolve() for text in config.input if Path(text).is_dir()}
    fine = not (several and output.resolve() in folders)
    wanted = "another folder than --input: its maps would be taken for scenes"
    require(fine, "--output", output, wanted)
    require_names(tasks, config)
    return tasks


def tasks_of_part(tasks: Sequence[Task], part: str | None) -> list[Task]:
    """The scenes that a job with ``--part`` maps: the same ones whichever job begins first."""
    if part is None:
        return list(tasks)
    number, of = split_part(part)
    first, last = ((len(tasks) * n) // of for n in (number - 1, number))
    return list(tasks[first:last])


def require_readable(scene: str) -> None:
    """Raise RasterError unless a scene can be opened and all of it is there."""
    open_raster(scene).close()
    require_whole(scene)


def require_names(tasks: Sequence[Task], config: PredictionConfig) -> None:
    """Raise what ``list_tasks`` raises for names of maps that cannot be written."""
    written: dict[Path, str] = {}
    scenes = [scene for task in tasks for scene in task.scenes]
    inputs = {Path(file).resolve() for file in (*scenes, *config.model)}
    for task in tasks:
        other = written.setdefault(task.output, task.scene)
        if other is not task.scene:
            raise RasterError(
                f"{other} and {task.scene} would both be mapped to {task.output}"
            )
        longest = os.fsencode(task.beside("_probabilities.tif").name)
        fine = len(longest) <= LONGEST_NAME
        require(fine, "--output", task.output.name, "a shorter name")
        fine = not task.polygons or task.polygons.resolve() not in inputs
        require(fine, "--polygons", task.polygons, "not an input")
        for ending in (".tif", *(f"_{name}.tif" for name in FURTHER_LAYERS)):
            path = task.beside(ending)
            require(path.resolve() not in inputs, "--output", path, "not an input")


def require_folders(tasks: Sequence[Task]) -> None:
    """Raise SegmentationError where maps cannot be written."""
    for task in tasks:
        require_folder("--output", task.output.parent)
        if task.polygons:
            require_folder("--polygons", task.polygons.parent)
