"""The files of a product: in a folder, in a .zip or in a .tar."""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from pathlib import Path

from common.errors import RasterError

ARCHIVES = {".zip": "/vsizip/", ".tar": "/vsitar/"}
# braces may stand around the archive; a path from the root, or of another /vsi, begins with /
RELATIVE_ARCHIVE = re.compile(r"(/vsi(?:zip|tar|gzip|7z|rar)/\{?)([^/].*)")


def full_path(path: str) -> str:
    """A path of a file, or of one in an archive, that does not depend on the working directory."""
    if os.path.exists(path):
        return os.path.abspath(path)
    if found := RELATIVE_ARCHIVE.fullmatch(path):
        inside = Path(found[2].replace("}", ""))
        if any(part.is_file() for part in (inside, *inside.parents)):
            return found[1] + Path(os.path.abspath(found[2])).as_posix()
    return path


class ProductFiles:
    """The files of a folder or archive by their names in it, with ``/`` between folders."""

    def __init__(self, path: str | Path):
        """List the files.

        Raises:
            RasterError: An archive that cannot be read, or is incomplete.
        """
        self.path = Path(os.path.abspath(path))
        self.suffix = "" if self.path.is_dir() else self.path.suffix.lower()
        try:
            self.names = sorted(self._list())
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise self._incomplete(error) from error

    def _list(self) -> list[str]:
        if self.suffix == ".zip":
            with zipfile.ZipFile(self.path) as archive:
                return [i.filename for i in archive.infolist() if not i.is_dir()]
        if self.suffix == ".tar":
            with tarfile.open(self.path) as archive:
                return [m.name for m in archive.getmembers() if m.isfile()]
        found = (path for path in self.path.rglob("*") if path.is_file())
        return [path.relative_to(self.path).as_posix() for path in found]

    def _incomplete(self, error: Exception) -> RasterError:
        return RasterError(
            f"{self.path} cannot be read ({error}): it is incomplete; download it again"
        )

    def find(self, pattern: str) -> list[re.Match]:
        """The names that a regular expression matches as a whole."""
        return [m for name in self.names if (m := re.fullmatch(pattern, name))]

    def read(self, name: str) -> bytes:
        """What a file holds."""
        try:
            if self.suffix == ".zip":
                with zipfile.ZipFile(self.path) as archive:
                    return archive.read(name)
            if self.suffix == ".tar":
                with tarfile.open(self.path) as archive:
                    return archive.extractfile(name).read()
            return (self.path / name).read_bytes()
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise self._incomplete(error) from error

    def gdal_path(self, name: str) -> str:
        """What GDAL opens a file by."""
        return f"{ARCHIVES.get(self.suffix, '')}{self.path.as_posix()}/{name}"
