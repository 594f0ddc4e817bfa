"""Numbers, durations and tables as text for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """As 0:45 or 2:03:10."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def first_reason(skipped: dict[str, str]) -> str:
    name, reason = next(iter(skipped.items()))
    return f"{name}: {reason}"


def shorten(name: str, longest: int = 40) -> str:
    """A name that fits above a panel."""
    half = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"
