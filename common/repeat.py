"""A run again: its settings from a file, its settings as a command line."""

from __future__ import annotations

import json
import shlex
from dataclasses import MISSING, asdict, fields
from pathlib import Path

from common.errors import OptionError

# what a command line says of one run alone
OF_ONE_RUN = ("settings", "resume", "overwrite", "debug", "check")


def read_settings(path: str, config_class) -> dict:
    """The options that a JSON file holds, by name.

    Args:
        path: The metrics of a training, the metadata of an extraction or the statistics of a map,
            which hold theirs under "settings", or just options.
        config_class: The settings dataclass that they are for.

    Returns:
        Those that a run may repeat: neither ``--resume`` nor ``--overwrite``.

    Raises:
        OptionError: No such file, no JSON, or an option that ``config_class`` does not have.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError(f"--settings {path}: {error.strerror}") from None
    except ValueError:
        raise OptionError(f"--settings {path}: this is no JSON") from None
    if isinstance(stored, dict) and "settings" in stored:
        stored = stored["settings"]
    if not isinstance(stored, dict):
        raise OptionError(f"--settings {path}: it holds no options by name")
    known = {item.name for item in fields(config_class)}
    if strange := sorted(stored.keys() - known - set(OF_ONE_RUN)):
        raise OptionError(
            f"--settings {path}: it holds {', '.join(strange)}, which is no option here; is it a "
            "file of another script or version?"
        )
    return {name: stored[name] for name in stored if name not in OF_ONE_RUN}


def option_words(options: dict, config_class) -> list[str]:
    """Options by name as words of a command line; those that have their default are left out.

    Raises:
        OptionError: A value that no command line can give.
    """
    words = []
    for item in fields(config_class):
        value = options.get(item.name, item.default)
        if value is MISSING or value == item.default or value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(one, (str, int, float)) for one in values) or not values:
            raise OptionError(f"--{item.name} of --settings: {value} is no value of it")
        if value is True:
            words.append(f"--{item.name}")
        elif value is False:
            words.append(f"--no-{item.name}")
        elif values is value:
            words += [f"--{item.name}", *map(str, values)]
        else:
            words.append(f"--{item.name}={value}")
    return words


def stored_settings(config) -> dict:
    """All options of a run by name, but for those of one run alone."""
    options = asdict(config)
    return {name: options[name] for name in options if name not in OF_ONE_RUN}


def command_line(script: str, config) -> str:
    """The command that makes a run again, as a shell takes it."""
    words = option_words(stored_settings(config), type(config))
    return f"python {script} {shlex.join(words)}"
