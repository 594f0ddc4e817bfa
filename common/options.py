"""A field of a frozen dataclass that is also a command-line option."""

from __future__ import annotations

import math
from dataclasses import MISSING, field, fields
from importlib.util import find_spec

from common.errors import require


def setting(default=MISSING, help: str = "", group: str = "options", **more):
    """A field of a settings dataclass that is also a command-line option.

    Args:
        default: Its default; without one the option is required.
        help: What it is, with its unit.
        group: The heading under which ``--help`` lists it.
        **more: ``choices``, ``nargs``, ``const``, ``action``, ``alias`` (a second flag), ``shown`` (words for
            a default that is found at run time); ``least`` and ``most``, or ``above``, the limits
            of a number, which ``check_limits`` enforces; ``or_auto=True`` where a whole number may
            be "auto" too; ``may_change=True`` where a resumed run
            may have another value than the one that it continues (see ``files.fingerprint``).
    """
    return field(default=default, metadata={"help": help, "group": group, **more})


def nodata_setting(group: str):
    """``--nodata`` of extraction and prediction."""
    return setting(
        None,
        "value of pixels without data, as if the scenes declared it",
        group,
        shown="what each scene declares",
    )


def class_colors_setting(group: str, shown: str, **more):
    """``--class_colors`` of extraction and training."""
    return setting(
        None,
        "colours in class order, separated by commas, in hex (ff0000) or by their names in CSS; or "
        "a legend file, .qml or .clr, by the values of the label",
        group,
        shown=shown,
        **more,
    )


def check_limits(config) -> None:
    """Raise OptionError where a number of a settings dataclass is outside of its limits.

    None is inside; infinity and NaN are not.
    """
    for item in fields(config):
        least, most, above = (item.metadata.get(k) for k in ("least", "most", "above"))
        value = getattr(config, item.name)
        if value is None or not isinstance(value, (int, float)):
            continue
        expected = "a finite number"
        if least is not None:
            expected = f"{least} or more" if most is None else f"{least} to {most}"
        elif above is not None:
            expected = f"more than {above}" + f", at most {most}" * (most is not None)
        inside = (least is None or value >= least) and (most is None or value <= most)
        inside = inside and (above is None or value > above)
        fine = inside and math.isfinite(value)
        require(fine, f"--{item.name}", value, expected)


def number_or_auto(text: str, least: int, most: int = 2**32 - 1) -> bool:
    """Whether an option that takes a whole number or ``auto`` has a valid value."""
    # Python does not parse numbers of thousands of digits
    number = text.isdecimal() and len(text) <= 10
    return text == "auto" or (number and least <= int(text) <= most)


def split_list(text: str | None) -> list[str]:
    """The items of a comma-separated option."""
    return [item.strip() for item in text.split(",")] if text else []


def is_legend(text: str) -> bool:
    """Whether ``--class_colors`` names a legend file, and lists no colours."""
    return text.lower().endswith((".qml", ".clr"))


def has_geopandas() -> bool:
    return find_spec("geopandas") is not None


def require_geopandas(config, *names: str) -> None:
    """Raise OptionError where one of some options is given that need geopandas, and it is missing."""
    if not has_geopandas():
        for name in names:
            value = getattr(config, name)
            expected = (
                "geopandas with it, which is not installed: pip install geopandas"
            )
            require(not value, f"--{name}", value, expected)


def require_colour_count(text: str | None, count: int) -> None:
    """Raise OptionError unless ``--class_colors`` lists as many colours as there are classes."""
    fine = not text or is_legend(text) or len(split_list(text)) == count
    require(fine, "--class_colors", text, f"{count} colours, one for each class")
