"""Which band of a sensor is which colour, and which bands of two scenes are the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from common.errors import DatasetError
from common.text import listed, split_dates

_TM = {
    "B1": "blue", "B2": "green", "B3": "red", "B4": "nir", "B5": "swir1", "B6": "thermal",
    "B7": "swir2",
}  # fmt: skip
# each sensor's names of its bands, without leading zeros and Landsat's "SR_" and "ST_", and the
# common ones (ESA, Sentinel-2 User Handbook; USGS, Landsat Collection 2 product guides)
SENSORS = {
    "sentinel2": {
        "B1": "coastal", "B2": "blue", "B3": "green", "B4": "red", "B5": "rededge1",
        "B6": "rededge2", "B7": "rededge3", "B8": "nir", "B8A": "nir_narrow",
        "B9": "water_vapour", "B10": "cirrus", "B11": "swir1", "B12": "swir2",
    },
    "landsat-tm": _TM,
    "landsat-etm": _TM
    | {"B6_VCID_1": "thermal", "B6_VCID_2": "thermal_high_gain", "B8": "pan"},
    "landsat-oli": {
        "B1": "coastal", "B2": "blue", "B3": "green", "B4": "red", "B5": "nir", "B6": "swir1",
        "B7": "swir2", "B8": "pan", "B9": "cirrus", "B10": "thermal", "B11": "thermal2",
    },
    "sentinel1": {"VV": "vv", "VH": "vh", "HH": "hh", "HV": "hv"},
}  # fmt: skip
# names that mean one thing whatever the sensor: the common ones, and those of STAC
WORDS = {word: word for bands in SENSORS.values() for word in bands.values()} | {
    "rededge071": "rededge1", "rededge075": "rededge2", "rededge078": "rededge3",
    "nir09": "water_vapour", "water_vapor": "water_vapour", "swir16": "swir1", "swir22": "swir2",
    "lwir11": "thermal", "lwir12": "thermal2",
}  # fmt: skip
# each of them by the spelling without spaces and signs: "SWIR 1" and "Red Edge 1"
_WORDS_BY_LETTERS = {word.replace("_", ""): word for word in WORDS}
# names of STAC that depend on the sensor: nir08 is Sentinel-2's B8A, but Landsat's only near infrared
_STAC_WORDS = {
    sensor: {"nir08": "nir", "lwir": "thermal"} for sensor in SENSORS if "landsat" in sensor
} | {"sentinel2": {"nir08": "nir_narrow"}}  # fmt: skip
_PLATFORMS = {
    r"(sentinel|s)[ _-]?1[a-d]?([ _-]sar)?": "sentinel1",
    r"(sentinel|s)[ _-]?2[a-d]?([ _-]msi)?": "sentinel2",
    r"landsat[ _-]?[45](?!.*mss).*": "landsat-tm",
    r"landsat[ _-]?7.*": "landsat-etm",
    r"landsat[ _-]?[89].*": "landsat-oli",
}


def sensor_of(text: str | None) -> str | None:
    """The key in ``SENSORS`` of what a scene says of its sensor, as "Sentinel-2A,Sentinel-2B".

    None where it says nothing, names different ones, or one that is not known.
    """
    found = {_one_sensor(part.strip().lower()) for part in (text or "").split(",")}
    return found.pop() if len(found) == 1 else None


def _one_sensor(text: str) -> str | None:
    if text in SENSORS:
        return text
    matching = (
        key for pattern, key in _PLATFORMS.items() if re.fullmatch(pattern, text)
    )
    return next(matching, None)


# a number, and what it is: B4_red, "Band 4 (Red)", "B8A - nir narrow"
_NUMBER_AND_WORD = re.compile(
    r"(?:s[rt]_)?b(?:and)?[ _]?\d+a?[ _:(-]+([a-z][a-z0-9 _-]*)\)?"
)


def plain_name(name: str) -> str:
    """A band's name in one spelling: B02, b2, SR_B2 and "Band 2" are B2; "SWIR 1" is swir1.

    Where a word of ``WORDS`` follows a number, it is the word, which means one thing: B4_red is red.
    """
    both = _NUMBER_AND_WORD.fullmatch(name.strip().lower())
    if both and (word := _plain_word(both[1])) in WORDS:
        return word
    number = re.fullmatch(
        r"(?:s[rt]_)?b(?:and)?[ _]?0*(\d+)(a|_vcid_[12])?", name.strip(), re.IGNORECASE
    )
    if number:
        return f"B{number[1]}{(number[2] or '').upper()}"
    polarization = name.strip().upper()
    if polarization in SENSORS["sentinel1"]:
        return polarization
    return _plain_word(name)


def _plain_word(text: str) -> str:
    word = re.sub(r"[\s-]+", "_", text.strip().lower())
    return _WORDS_BY_LETTERS.get(word.replace("_", ""), word)


# what else a name as it is written says: ESA pads numbers, and so does harmonized Landsat 8, which
# has no panchromatic band; USGS prefixes those of Level 2, where B6 is thermal before Landsat 8
_SPELLINGS = {
    r"b0\d": {"sentinel2", "landsat-oli"},
    r"b08": {"sentinel2"},
    r"s[rt]_b\d+": {"landsat-tm", "landsat-etm", "landsat-oli"},
    r"sr_b6": {"landsat-oli"},
    r"st_b6": {"landsat-tm", "landsat-etm"},
}


def possible_sensors(names: Sequence[str]) -> list[str]:
    """The optical sensors that have all those of some bands which any sensor has, by their names."""
    optical = {sensor for sensor in SENSORS if sensor != "sentinel1"}
    asked = {plain_name(name) for name in names}
    asked &= {band for sensor in optical for band in SENSORS[sensor]}
    optical = {sensor for sensor in optical if asked <= SENSORS[sensor].keys()}
    for pattern, sensors in _SPELLINGS.items():
        if any(re.fullmatch(pattern, name.strip().lower()) for name in names):
            optical &= sensors
    return sorted(optical)


def common_names(
    names: Sequence[str | None], sensor: str | None = None
) -> list[str | None]:
    """What the bands of a scene are, in the words of ``WORDS``.

    Args:
        names: Band descriptions without dates.
        sensor: A key in ``SENSORS``; None where it is not known.

    Returns:
        A word for each; None for a name that no table holds; "?" for one that means different
        things on the sensors which it can be of.
    """
    known = [name for name in names if name]
    tables = [
        SENSORS[s] | _STAC_WORDS.get(s, {})
        for s in ([sensor] if sensor else possible_sensors(known))
    ]
    tables.append(SENSORS["sentinel1"])
    return [_meaning(plain_name(name), tables) if name else None for name in names]


def _meaning(name: str, tables: Sequence[dict[str, str]]) -> str | None:
    if name in WORDS:
        return WORDS[name]
    meanings = {table[name] for table in tables if name in table}
    if len(meanings) == 1:
        return meanings.pop()
    anywhere = any(name in bands for bands in SENSORS.values())
    return "?" if meanings or (anywhere and len(tables) == 1) else None


def match_bands(
    new: Sequence[str | None],
    old: Sequence[str | None],
    new_sensor: str | None = None,
    old_sensor: str | None = None,
    spelling: bool = True,
) -> list[int | None]:
    """Which of the old bands each new one is.

    Names that are spelled alike are the same band, unless both sensors are known and differ, also by
    a name beside them that only one sensor has; else those of one meaning are. The bands of several dates match in the order of the dates.

    Args:
        new: Descriptions of the bands of the data.
        old: Descriptions of the bands of a model or of weights.
        new_sensor: A key in ``SENSORS``, or None.
        old_sensor: Likewise.
        spelling: Whether an equal spelling is enough where a sensor is not known.

    Returns:
        Per new band the index of the old one; None where it has none.

    Raises:
        DatasetError: Names that occur twice, or new ones whose meaning depends on a sensor that is
            not known. Old ones of that kind, which no option can explain, match by spelling alone.
    """
    spelled, meant = zip(
        *(_keys(*side) for side in ((new, new_sensor), (old, old_sensor)))
    )
    known = new_sensor and old_sensor
    possible = [
        {sensor} if sensor else set(possible_sensors(_undated(side)))
        for side, sensor in ((new, new_sensor), (old, old_sensor))
    ]
    differ = all(possible) and possible[0].isdisjoint(possible[1])
    alike = not differ and bool(known or spelling)
    found: list[int | None] = [None] * len(new)
    if alike:
        _pair(found, *spelled)
    else:  # what no sensor names, as elevation
        own = [
            [k if m is None else None for k, m in zip(*side)]
            for side in zip(spelled, meant)
        ]
        _pair(found, *own)
    unclear = [
        name
        for name, match, word in zip(new, found, meant[0])
        if match is None and word == "?"
    ]
    unclear = unclear if len(set(found) - {None}) < len(old) else []
    if unclear:
        raise DatasetError(
            f"The bands {listed(dict.fromkeys(unclear))} are not the same on every sensor; name the "
            f"sensor of the patches with --sensor ({', '.join(SENSORS)})"
        )
    _pair(found, *meant)
    return found


def _undated(names: Sequence[str | None]) -> list[str]:
    return [name for name, _ in split_dates(names) if name]


def _keys(names: Sequence[str | None], sensor: str | None) -> tuple[list, list]:
    """The spelling and the meaning of each band, with the order of its date."""
    parts = split_dates(names)
    spelled = [(plain_name(name), order) if name else None for name, order in parts]
    words = common_names([name for name, _ in parts], sensor)
    meant = [
        word if word in (None, "?") else (word, order)
        for word, (_, order) in zip(words, parts)
    ]
    return spelled, meant


def _pair(found: list[int | None], new: Sequence, old: Sequence) -> None:
    """Fill in the old band of each new one of an equal key that neither side has used."""
    places = {key: i for i, key in enumerate(old) if i not in found}
    open_ = {i: key for i, key in enumerate(new) if found[i] is None and key in places}
    keys = [k for k in open_.values() if k not in (None, "?")]
    counts = Counter(keys), Counter(k for i, k in enumerate(old) if i not in found)
    for key in keys:
        if counts[0][key] > 1 or counts[1][key] > 1:
            raise DatasetError(
                f"Two bands are both {key[0]}, so bands cannot be matched by name; give them "
                "different descriptions"
            )
    for i, key in open_.items():
        if key not in (None, "?"):
            found[i] = places[key]
