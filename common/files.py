"""Files that appear complete or not at all, locks on folders, what identifies files and runs."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import DISK_FULL, CheckpointError, SegmentationError

FINAL_MODEL = "model_final_model.pth"


def require_folder(option: str, folder: str | Path) -> None:
    """Raise SegmentationError unless a folder is there, or can be made, and written to."""
    path = Path(folder).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise SegmentationError(
            f"{option} {folder}: {existing} cannot be written to; choose another folder"
        )


def require_new_files(files: Sequence[Path], overwrite: bool) -> None:
    """Raise SegmentationError where a file is there that nobody allowed to replace."""
    there = [file for file in files if file.exists()]
    if there and not overwrite:
        raise SegmentationError(
            f"{there[0]} is there already; give --overwrite to replace it, or another --output"
        )


@contextmanager
def exclusive_lock(option: str, name: str | Path, folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made, while this one writes to it.

    The lock ends with the process, however that ends. Where the disk knows no locks (some network
    disks), nobody is kept out. A folder that was made and stays empty is removed.

    Args:
        option: The option that named the output, and ``name``, what it said.
        name: See ``option``.
        folder: To be locked. The lock file lies in it; beside it where it is hidden, since such
            a folder of unfinished work is moved or removed under the lock.

    Raises:
        SegmentationError: Another run has locked it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    hidden = folder.name.startswith(".")
    path = folder.with_name(f"{folder.name}.lock") if hidden else folder / ".lock"
    lock = FileLock(path)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise SegmentationError(
                f"Another run into {name} is under way; wait for it, or choose another {option}"
            ) from None
        except (OSError, NotImplementedError):
            pass  # a disk that knows no locks
        yield
    finally:
        if lock.is_locked:
            # Windows lets nobody remove it before it is released, and then removes it
            with suppress(OSError):
                path.unlink()
            lock.release()
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def naming(target: str | Path, part: str | Path = "") -> Iterator[None]:
    """Name a file in the error of a full disk, which the system raises without a name.

    Args:
        target: The file that is written.
        part: The temporary name that it is written under; errors name the target in its place.
    """
    try:
        yield
    except OSError as error:
        nameless = error.errno in DISK_FULL and error.filename is None
        if nameless or (part and str(error.filename) == str(part)):
            error.filename = str(target)
        raise
    except SegmentationError as error:
        if part:
            error.args = (str(error).replace(str(part), str(target)),)
        raise


def flush(path: Path) -> None:
    """Have the system write a file to its disk now."""
    with naming(path), open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_write(target: str | Path, aside: Path | None = None) -> Iterator[Path]:
    """Write a file under a temporary name; it gets its own only when the block succeeds.

    Args:
        target: The file to be (its folder is made).
        aside: A folder on the same disk for the temporary file; by default the target's.

    Yields:
        A temporary path. It is flushed to disk and renamed at the end, and removed when the block
        raises. What GDAL keeps in an ``.aux.xml`` beside a raster goes with it.
    """
    target = Path(target)
    if target.is_dir():
        raise SegmentationError(f"{target} is a folder; give the name of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = aside or target.parent
    with naming(target):
        handle, name = tempfile.mkstemp(".part", part_prefix(target), folder)
    os.close(handle)
    part, beside = Path(name), Path(f"{name}.aux.xml")
    try:
        with naming(target, part):
            yield part
            flush(part)
        part.chmod(0o666 & ~umask())
        part.replace(target)
        for ending in (".ovr", ".msk", ".aux.xml"):  # GDAL's, of the former file
            if os.path.exists(f"{target}{ending}"):
                os.unlink(f"{target}{ending}")
        if beside.exists():
            beside.replace(f"{target}.aux.xml")
    finally:
        part.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)


def part_prefix(target: Path) -> str:
    """How the temporary names of a file begin; no other file's do."""
    return f".{target.stem[:40]}-{zlib.crc32(os.fsencode(target.name)):08x}-"


def remove_partial_files(targets: Iterable[Path]) -> None:
    """Remove what a killed run has left of files that ``atomic_write`` writes.

    For the run that now writes them alone (see ``exclusive_lock``).
    """
    for target in targets:
        for path in target.parent.glob(
            f"{glob.escape(part_prefix(target))}????????.part*"
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(target: str | Path, content: dict | list) -> None:
    """Write JSON that any reader accepts: NaN and infinity are defects, not values."""
    with atomic_write(target) as part:
        part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


# how GDAL and rasterio begin paths into archives, one within another too
INTO_ARCHIVE = re.compile(
    r"/vsi(?:zip|tar|gzip|7z|rar)/|(?:zip|tar|gzip)(?:\+file)?://"
)


def file_behind(path: str) -> str:
    """The archive that a path leads into; any other path, or one into no archive here, itself."""
    inner = path
    while match := INTO_ARCHIVE.match(inner):
        inner = inner[match.end() :]
    if inner == path or os.path.isfile(path):
        return path
    inner = re.sub("[{}]", "", inner)  # /vsizip/{a.zip}/b.tif
    if "://" in path:  # zip://a.zip!b.tif
        inner = inner.replace("!", "/")
    there = (one for one in (Path(inner), *Path(inner).parents) if one.is_file())
    return str(next(there, path))


def describe_file(path: str) -> dict:
    """What distinguishes a file from another of its name, a path into an archive by the archive.

    A path that only GDAL reads has nothing.
    """
    file = file_behind(path)
    if not os.path.isfile(file):
        return {"name": path}
    status = os.stat(file)
    return {"name": path, "bytes": status.st_size, "modified": status.st_mtime}


def describe_files(sources: Iterable[str]) -> dict[str, str]:
    """What distinguishes files from others of their names, each as text; see ``describe_file``."""
    described = {}
    for source in dict.fromkeys(map(file_behind, sources)):
        known = describe_file(source)
        if len(known) > 1:
            moment = datetime.fromtimestamp(known["modified"]).isoformat(" ")
            described[source] = f"{known['bytes']} bytes of {moment}"
    return described


def fingerprint(config) -> dict:
    """The settings that a resumed run must share with the one that it continues, as for JSON."""
    fixed = (item for item in fields(config) if not item.metadata.get("may_change"))
    return json.loads(
        json.dumps({item.name: getattr(config, item.name) for item in fixed})
    )


def compare_runs(former: dict, present: dict, place: str | Path, way_out: str) -> None:
    """Raise SegmentationError, which names the first difference, unless two runs are the same.

    Args:
        former: What the result of the unfinished run depends on, by name: its ``fingerprint`` and
            more.
        present: Likewise, of this run.
        place: Where the unfinished run lies.
        way_out: What to do instead, as "start again with --overwrite".
    """
    for name in dict.fromkeys([*present, *former]):
        before, now = former.get(name), present.get(name)
        if before != now:
            raise SegmentationError(
                f"{place} belongs to a run with another {name} ({before}, now {now}); give the "
                f"same, or {way_out}"
            )


def list_models(given: Sequence[str]) -> list[str]:
    """The checkpoints that ``--model`` names.

    The folder of a run stands for the final models of its folds (those by block after
    ``--fold_by both``), else for its own final model.

    Raises:
        CheckpointError: A folder with neither.
    """
    files: list[str] = []
    for text in given:
        folder = Path(text)
        if not folder.is_dir():
            files.append(text)
            continue
        found = (
            sorted(folder.glob(f"fold_*/{FINAL_MODEL}"), key=_fold_number)
            or sorted(folder.glob(f"block/fold_*/{FINAL_MODEL}"), key=_fold_number)
            or sorted(folder.glob(FINAL_MODEL))
        )
        if not found:
            raise CheckpointError(
                f"No {FINAL_MODEL} in {folder}, nor in folders fold_N of it; give a finished run, or "
                "name the checkpoint"
            )
        files += map(str, found)
    return files


def models_text(given: Sequence[str], files: Sequence[str]) -> str | None:
    """The line that names the checkpoints that folders stand for; None where no folder is given."""
    folders = [text for text in given if Path(text).is_dir()]
    if not folders:
        return None
    taken = [f for f in files if f not in given]
    more = f", ... {taken[-1]}" if len(taken) > 3 else ""
    first = ", ".join(taken[: 2 if more else 3])
    number = f"{len(taken)} models, averaged" if len(taken) > 1 else "the final model"
    return f"{', '.join(folders)}: {number} ({first}{more})"


def _fold_number(path: Path) -> tuple[int, str]:
    number = path.parent.name.removeprefix("fold_")
    return (int(number) if number.isdecimal() else 0), number
