"""What a scene says of its pixels, whose sensor saw what day; patches carry it as tags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rasterio

# the tags of stacked scenes and of patches; several sensors or days are joined by commas
SENSOR, ACQUIRED = "sensor", "acquired"
# then what GDAL gives of products that it reads: Sentinel-2, radars, its domain IMAGERY.
# TIFFTAG_DATETIME is not among them: most programs store when they wrote the file
SENSOR_TAGS = (
    SENSOR,
    "DATATAKE_1_SPACECRAFT_NAME",
    "SATELLITE_IDENTIFIER",
    "SATELLITEID",
)
DATE_TAGS = (
    ACQUIRED,
    "PRODUCT_START_TIME",
    "ACQUISITION_START_TIME",
    "ACQUISITIONDATETIME",
)
NO_DATE = "1970-01-01"  # what IMAGERY has for a time that GDAL could not read


@dataclass(frozen=True)
class Facts:
    """Where pixels come from, as far as anybody says."""

    sensor: str | None = None  # as "Sentinel-2A,Sentinel-2B"
    acquired: tuple[str, ...] = ()  # as "2021-06-19", the earliest first

    @property
    def sensors(self) -> list[str]:
        """Their names, one by one."""
        return self.sensor.split(",") if self.sensor else []

    def tags(self) -> dict[str, str]:
        """The tags that say it."""
        known = {SENSOR: self.sensor, ACQUIRED: ",".join(self.acquired)}
        return {key: text for key, text in known.items() if text}


def scene_facts(scene: rasterio.DatasetReader) -> Facts:
    """What a scene says, or the files of its product beside it."""
    return facts_of_tags(scene.tags(ns="IMAGERY") | scene.tags())


def facts_of_tags(tags: Mapping[str, str]) -> Facts:
    """What tags say; a day that is not written as in 2021-06-19, with or without a time, is unknown."""
    sensors, days = (_first(tags, names) for names in (SENSOR_TAGS, DATE_TAGS))
    return _facts(sensors, filter(None, map(_day, days)))


def joint_facts(parts: Iterable[Facts]) -> Facts:
    """What several scenes or patches say together."""
    parts = set(parts)
    sensors = (name for part in parts for name in part.sensors)
    return _facts(sensors, (day for part in parts for day in part.acquired))


def _facts(sensors: Iterable[str], days: Iterable[str]) -> Facts:
    names = sorted({name.strip() for name in sensors} - {""})
    return Facts(",".join(names) or None, tuple(sorted(set(days))))


def _first(tags: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """The items of the first tag that is there."""
    found = next(filter(None, map(tags.get, names)), "")
    return found.split(",")


def _day(text: str) -> str | None:
    try:
        day = date.fromisoformat(text.strip()[:10]).isoformat()
    except ValueError:
        return None
    return day if day != NO_DATE else None
