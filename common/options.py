"""A field of a frozen dataclass that is also a command-line option."""

from __future__ import annotations

from dataclasses import MISSING, field


def setting(default=MISSING, help: str = "", group: str = "options", **more):
    """A field of a configuration dataclass that is also a command-line option.

    Args:
        default: Its default; without one the option is required.
        help: What it is, with its unit.
        group: The heading under which ``--help`` lists it.
        **more: ``choices``, ``nargs``, ``alias`` (a second flag), ``shown`` (words for a
            default that is found at run time).
    """
    return field(default=default, metadata={"help": help, "group": group, **more})


def number_or_auto(text: str, least: int, most: int = 2**32 - 1) -> bool:
    """Whether an option that takes a whole number or ``auto`` has a fitting value."""
    # ten digits are enough, and Python reads no number of thousands of them
    number = text.isdecimal() and len(text) <= 10
    return text == "auto" or (number and least <= int(text) <= most)


def split_list(text: str | None) -> list[str]:
    """The items of a comma-separated option."""
    return [item.strip() for item in text.split(",")] if text else []
