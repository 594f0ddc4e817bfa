"""The bands of a file of encoder weights, and which of them the bands of the data are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from common.errors import DatasetError, require
from common.options import split_list
from common.pictures import rgb_bands
from common.sensors import SENSORS, common_names, match_bands, possible_sensors
from common.text import listed, split_dates
from training.bands import sensor_of_data
from training.published import published_weights
from training.samples import SampleIndex
from training.settings import TrainingConfig

log = logging.getLogger("semanticseg4eo")

COLOURS = ("red", "green", "blue")


class FileBands(NamedTuple):
    """What is known of a file's bands, in the order of its kernels."""

    names: Sequence[str]
    matches: Sequence[int | None]  # per band of the data the file's

    def __str__(self) -> str:
        used = [self.names[match] for match in self.matches if match is not None]
        rest = len(self.matches) - len(used)
        more = f", the mean of all for {rest} of the data's bands" if rest else ""
        return f"kernels of {listed(dict.fromkeys(used))}{more}"


def file_bands(config: TrainingConfig, index: SampleIndex) -> FileBands | None:
    """The bands of the file of ``--encoder_weights``, and which of them each band of the data is.

    None where nobody says their names, and for a file of red, green and blue, which
    ``rgb_channels`` is for, unless the data are of several dates and all have them.

    Raises:
        DatasetError: The data have none of them, no names, or names that need a ``--sensor``.
    """
    named = split_list(config.weights_bands)
    known = published_weights(config.weights)
    names = named or (known.bands if known else ())
    dated = split_dates(index.descriptions)
    dates = {order for _, order in dated}
    colours = len(names) == 3 and (len(dates - {0}) < 2 or config.rgb_bands)
    if not named and (not names or colours):
        return None
    if not any(index.descriptions):
        return _by_position(config, names, len(index.descriptions))
    possible = [known.sensor] if known else possible_sensors(names)
    sensor = possible[0] if len(possible) == 1 else None
    matches: list[int | None] = [None] * len(index.descriptions)
    for date in dates:  # each gets the kernels of its bands
        places = [place for place, (_, order) in enumerate(dated) if order == date]
        here = [dated[place][0] for place in places]
        found = match_bands(
            here, names, sensor_of_data(config, index), sensor, spelling=sensor is None
        )
        for place, match in zip(places, found):
            matches[place] = match
    if not any(match is not None for match in matches):
        raise DatasetError(
            f"{config.weights} has the bands {listed(names)}, and the patches in "
            f"{config.dataset_root} have none of them ({listed(filter(None, index.descriptions))})"
        )
    return FileBands(names, matches)


def _by_position(config: TrainingConfig, names: Sequence[str], count: int) -> FileBands:
    if len(names) != count:
        raise DatasetError(
            f"The bands of the patches in {config.dataset_root} have no names, and there are "
            f"{count}, not the {len(names)} of {config.weights}; describe the bands of the scenes "
            "before the extraction"
        )
    log.warning(
        "the bands of the patches have no names: taken as %s, as in %s",
        listed(names),
        config.weights,
    )
    return FileBands(names, range(count))


def rgb_channels(config: TrainingConfig, index: SampleIndex) -> list[int] | None:
    """Channels (from 0) of red, green, blue: ``--rgb_bands``, else by band descriptions.

    Raises:
        OptionError: ``--rgb_bands`` is not right.
        DatasetError: Published weights of the three, and descriptions that do not say for sure.
    """
    bands = len(index.descriptions)
    if config.rgb_bands:
        parts = config.rgb_bands.split(",")
        fine = len(parts) == 3 and all(p.strip().isdecimal() for p in parts)
        fine = fine and all(1 <= int(p) <= bands for p in parts)
        require(
            fine, "--rgb_bands", config.rgb_bands, f"three band numbers, 1 to {bands}"
        )
        return [int(part) - 1 for part in parts]
    if bands < 3 or not any(index.descriptions):
        return None
    plain = [name for name, _ in split_dates(index.descriptions)]
    words = common_names(plain, sensor_of_data(config, index))
    if all(colour in words for colour in COLOURS):
        return [words.index(colour) for colour in COLOURS]
    known = published_weights(config.weights)
    if known and len(known.bands) == 3:
        raise DatasetError(
            f"{config.weights} is for red, green and blue, and the names of the bands in "
            f"{config.dataset_root} do not say which these are "
            f"({listed(filter(None, index.descriptions))}); name the sensor of the patches with "
            f"--sensor ({', '.join(SENSORS)}), or the three bands with --rgb_bands"
        )
    return [band - 1 for band in rgb_bands(index.descriptions)]
