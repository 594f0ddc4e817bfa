"""Numbers, durations and tables as text for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """As 0:45 or 2:03:10."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def distance_text(metres: float) -> str:
    """As 640 m, 3.2 km or 1,250 km."""
    if round(metres) < 1000:
        return f"{metres:.0f} m"
    return f"{metres / 1000:,.{1 if metres < 1e5 else 0}f} km"


def first_reason(skipped: dict) -> str:
    """The first of those that were skipped, by name, and why."""
    name, reason = next(iter(skipped.items()))
    return f"{name}: {reason}"


def listed(names: Iterable[str]) -> str:
    """Names with commas between them; one that holds a comma is in double quotes, as in options."""
    return ", ".join(f'"{name}"' if "," in name else name for name in names)


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - most
    return listed(names[:most]) + (f" and {more} more" if more > 0 else "")


def ranges_text(numbers: Iterable[int]) -> str:
    """Rising numbers as --bands takes them: 1-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def share_text(share: float, about: str = "about ", little: str = "less than ") -> str:
    """A share in percent, which never reads as none: "about 31.0%", "less than 0.1%"."""
    return f"{about}{share:.1%}" if share >= 0.0005 else f"{little}0.1%"


def split_dates(names: Sequence[str | None]) -> list[tuple[str | None, int]]:
    """Names of bands without the dates at their ends, as B04_20210619, and the order of the date.

    The order is 1, 2... by rising dates; 0 without a date.
    """
    found = [re.fullmatch(r"(.+)_(\d{8})", name or "") for name in names]
    dates = sorted({match[2] for match in found if match})
    return [
        (match[1], dates.index(match[2]) + 1) if match else (name, 0)
        for name, match in zip(names, found)
    ]


def number_dates(names: Sequence[str | None]) -> list[str | None]:
    """Names of bands with the dates at their ends replaced by their order, as B04_1.

    So the bands of two dates of one year are those of two dates of another.
    """
    return [f"{name}_{order}" if order else name for name, order in split_dates(names)]


def shorten(name: str, longest: int = 40) -> str:
    """A name that fits above a panel."""
    half = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"


def aligned_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of equal length as aligned text.

    Args:
        rows: The heads first, if any.
        left: So many columns are aligned left, those behind them right.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    lines = (
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
