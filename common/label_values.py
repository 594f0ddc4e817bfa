"""``--label_values``: which values or texts of a label are which class, and what it is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import MISSING
from common.errors import OptionError

OPTION = "--label_values"
HIGHEST = 2**62  # where labels are read as it, whatever is above


@dataclass(frozen=True)
class ClassValues:
    """One class: the values or texts of a label that mean it, and its name where it has one."""

    values: tuple[str, ...]
    name: str | None = None

    @property
    def title(self) -> str:
        """The name, else the code: its values as they are written."""
        return self.name or "+".join(self.values)


def parse_label_values(text: str) -> list[ClassValues]:
    """The classes that ``--label_values`` lists, in order.

    ``1=water,5+6=forest,9``: commas separate classes, ``+`` merges values, ``=`` names. A text that
    holds one of these stands in double quotes, which are doubled within it, as in CSV. ``@FILE``
    reads a class from each line of a UTF-8 file, where commas are ordinary.

    Raises:
        OptionError: It cannot be read so, or has a value or a name twice.
    """
    if file := file_of_values(text):
        lines = _lines_of(file)
        found = [one for line in lines for one in _parse(line, "+=", f"{text}, {line}")]
    else:
        found = _parse(text, ",+=", text)
    for what, items in (
        ("value", [value for one in found for value in one.values]),
        ("name", [one.title for one in found]),
    ):
        twice = [item for item, count in Counter(items).items() if count > 1]
        if twice:
            raise OptionError(f"{OPTION} {text}: the {what} {twice[0]} is given twice")
    return found


def file_of_values(text: str | None) -> str | None:
    """The file that ``--label_values`` names; None where it lists the classes itself."""
    return text[1:] if text and text.startswith("@") else None


def parse_names(text: str | None, option: str) -> list[str]:
    """The items of a comma-separated option whose items may stand in double quotes.

    Raises:
        OptionError: A quote without its partner, an empty item, or one that is given twice.
    """
    if not text:
        return []
    items = [item for item, _ in _split(text, ",", f"{option} {text}")]
    if "" in items:
        raise OptionError(f"{option} {text}: an item is empty")
    twice = [item for item, count in Counter(items).items() if count > 1]
    if twice:
        raise OptionError(f"{option} {text}: {twice[0]} is given twice")
    return items


def whole_numbers(classes: Sequence[ClassValues]) -> list[tuple[int, ...]]:
    """The values of classes as whole numbers.

    Raises:
        OptionError: One is none or beyond what labels hold, or two are the same number.
    """
    try:
        found = [tuple(int(value) for value in one.values) for one in classes]
    except ValueError:
        text = ",".join("+".join(one.values) for one in classes)
        raise OptionError(
            f"{OPTION} {text}: expected whole numbers for this label"
        ) from None
    numbers = [number for group in found for number in group]
    if beyond := [n for n in numbers if not MISSING < n < HIGHEST]:
        raise OptionError(f"{OPTION}: the value {beyond[0]} is beyond what labels hold")
    twice = [number for number, count in Counter(numbers).items() if count > 1]
    if twice:
        raise OptionError(f"{OPTION}: the value {twice[0]} is given twice")
    return found


def _lines_of(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"{OPTION} @{path}: {reason}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise OptionError(f"{OPTION} @{path}: the file lists no class")
    return lines


def _parse(text: str, separators: str, place: str) -> list[ClassValues]:
    """The classes of an option, or of a line of a file; ``place`` is for errors."""
    place = f"{OPTION} {place}"
    classes, values, name, before = [], [], None, ","
    for item, after in _split(text, separators, place):
        if not item:
            raise OptionError(f"{place}: a value or name is missing at {before!r}")
        if before == "=":
            if after not in {",", ""}:
                raise OptionError(
                    f"{place}: {after!r} follows the name {item!r}; quote it"
                )
            name = item
        else:
            values.append(item)
        if after in {",", ""}:
            classes.append(ClassValues(tuple(values), name))
            values, name = [], None
        before = after
    return classes


def _split(text: str, separators: str, place: str) -> list[tuple[str, str]]:
    """The items of a text, each with the separator after it; the last one has none."""
    items, item, quoted, i = [], "", False, 0
    while i < len(text):
        sign = text[i]
        if sign == '"' and not item.strip() and not quoted:
            item, i = _quoted(text, i + 1, place)
            quoted = True
            continue
        if sign in separators:
            items.append((item if quoted else item.strip(), sign))
            item, quoted = "", False
        elif not quoted:
            item += sign
        elif not sign.isspace():
            raise OptionError(f"{place}: {sign!r} follows a closing quote")
        i += 1
    return [*items, (item if quoted else item.strip(), "")]


def _quoted(text: str, start: int, place: str) -> tuple[str, int]:
    """The text within quotes that begins at ``start``, and where what follows them begins."""
    item, i = "", start
    while i < len(text):
        if text[i] != '"':
            item += text[i]
            i += 1
        elif text[i : i + 2] == '""':
            item += '"'
            i += 2
        else:
            return item, i + 1
    raise OptionError(f"{place}: a quote is not closed")
