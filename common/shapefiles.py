"""How the texts of a shapefile are encoded, where no .cpg file beside it says so."""

from __future__ import annotations

import struct
import zipfile
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path

UTF8, ASSUMED = "UTF-8", "ISO-8859-1"  # what GDAL takes where nothing is said
UNKNOWN_CODE_PAGES = (0, 0x57)  # of a .dbf: none, and "ANSI", which is any


def decode_utf8(content: bytes) -> str:
    """UTF-8, of which the fixed width of a field may have cut the last letter.

    Raises:
        UnicodeDecodeError: It is something else.
    """
    return getincrementaldecoder("utf-8")().decode(content)


def guessed_encoding(file: str, layer: str | None) -> str | None:
    """The encoding of a shapefile, or of one in a .zip, that does not state it.

    Returns:
        ``UTF8`` where all texts are that; ``ASSUMED`` where they are not, which is a guess; None
        where nothing needs to be guessed.
    """
    dbf, stated = _read_part(file, layer, ".dbf"), _read_part(file, layer, ".cpg")
    if not dbf or stated or dbf[29] not in UNKNOWN_CODE_PAGES:
        return None
    texts = [text for text in _texts(dbf) if not text.isascii()]
    try:
        for text in texts:
            decode_utf8(text)
    except UnicodeDecodeError:
        return ASSUMED
    return UTF8 if texts else None


def _read_part(file: str, layer: str | None, ending: str) -> bytes | None:
    """A file of a shapefile, whatever the case of its ending."""
    path = Path(file)
    if path.suffix.lower() == ".shp" and path.is_file():
        for part in (path.with_suffix(ending), path.with_suffix(ending.upper())):
            if part.is_file():
                return part.read_bytes()
    elif path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if Path(name.lower()).name == f"{layer}{ending}".lower():
                    return archive.read(name)
    return None


def _texts(dbf: bytes) -> Iterator[bytes]:
    """The names of the fields of a .dbf, then the contents of those with texts."""
    count, header, length = struct.unpack("<IHH", dbf[4:12])
    fields = [dbf[at : at + 32] for at in range(32, header - 31, 32)]
    yield from (field[:11].partition(b"\0")[0] for field in fields)
    places, start = [], 1  # after the flag of deleted rows
    for field in fields:
        is_text = field[11:12] == b"C"
        width = field[16] + 256 * field[17] * is_text
        places += [slice(start, start + width)] * is_text
        start += width
    for at in range(header, header + count * length, length):
        row = dbf[at : at + length]
        if not row.isascii():
            yield from (row[place].rstrip(b" \0") for place in places)
