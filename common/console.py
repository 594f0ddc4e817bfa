"""The command line: parsers from options, messages on stderr, problems, exit status."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

from common.errors import OptionError, SegmentationError, error_message
from common.interruption import exit_status, interruptible
from common.machine import is_main_process
from common.repeat import option_words, read_settings

# what they log is in our own errors too
QUIET_LIBRARIES = (
    "rasterio", "pyogrio", "tifffile", "matplotlib", "huggingface_hub", "httpx",
)  # fmt: skip
# for those who write programs
HARMLESS_WARNINGS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

Files = Sequence[str | os.PathLike]  # that a problem may name


def add_settings(parser, config_class) -> None:
    """Give an argument parser one option per field of a configuration dataclass."""
    hints = get_type_hints(config_class)
    groups: dict[str, object] = {}
    for item in fields(config_class):
        about = item.metadata
        kinds = ("choices", "nargs", "const", "action")
        more = {k: about[k] for k in kinds if k in about}
        flags = [f"--{item.name}", *([about["alias"]] if "alias" in about else [])]
        text, group = about["help"], about["group"]
        more["required"] = item.default is MISSING
        if not more["required"]:
            more["default"] = item.default
            if item.default is not False:
                text += f" (default: {about.get('shown', '%(default)s')})"
        kind = hints[item.name]
        while inner := [t for t in get_args(kind) if t is not type(None)]:
            kind = inner[0]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if kind is bool:
            more["action"] = "store_true"
        else:
            number = whole_number_or_auto if about.get("or_auto") else whole_number
            more["type"] = number if kind is int else kind
        if not more["required"]:
            off = {"action": "store_const", "const": item.default}
            off |= {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            groups[group].add_argument(f"--no-{item.name}", dest=item.name, **off)
        groups[group].add_argument(*flags, dest=item.name, help=text, **more)
    parser.set_defaults(config_class=config_class)


def whole_number(text: str, or_auto: str = "") -> int:
    """The value of an integer option; none needs more than 32 bits."""
    try:
        value = int(text)
    except ValueError:
        message = f"invalid int value: {text!r:.40}{or_auto}"
        raise argparse.ArgumentTypeError(message) from None
    if abs(value) >= 2**32:
        raise argparse.ArgumentTypeError("expected a smaller number")
    return value


def whole_number_or_auto(text: str) -> int | str:
    """The value of an integer option that may be found at run time."""
    return text if text == "auto" else whole_number(text, "; expected one, or auto")


def settings_from(config_class, arguments):
    """The configuration that parsed arguments describe."""
    return config_class(
        **{f.name: getattr(arguments, f.name) for f in fields(config_class)}
    )


class Problems(list):
    """The problems that a preflight has found, a line each: all of them, not only the first.

    What is wrong with many files alike is one line, with some of the files.
    """

    def __init__(self):
        self._alike: dict[str, list[str]] = {}  # text without the file -> files

    def attempt(self, action: Callable, *arguments, files: Files = ()):
        """The result of an action; None, and the problem noted, where it fails."""
        try:
            return action(*arguments)
        except (SegmentationError, OSError) as error:
            self.note(str(error), files)
            return None

    def note(self, problem: str, files: Files = ()) -> None:
        """Add a problem; one that differs from a former one in its file alone joins that."""
        if problem in self:
            return
        named = next((str(file) for file in files if str(file) in problem), None)
        if named is not None:
            alike = self._alike.setdefault(problem.replace(named, "\0"), [])
            if named not in alike:
                alike.append(named)
            if alike[0] != named:
                return
        self.append(problem)

    def lines(self) -> list[str]:
        """The problems as text."""
        more = {
            text.replace("\0", files[0]): files[1:]
            for text, files in self._alike.items()
        }
        return [problem + _likewise(more.get(problem, [])) for problem in self]

    def report(self) -> int:
        """Print them on stderr, in the main process; how many there are."""
        if is_main_process():
            for line in self.lines():
                print(f"error: {line}", file=sys.stderr)
        return len(self)


def _likewise(files: Sequence[str]) -> str:
    """What follows a problem that other files have too: how many, and two of them."""
    if not files:
        return ""
    rest = f" and {len(files) - 2} others" if len(files) > 2 else ""
    return f" (likewise {', '.join(files[:2])}{rest})"


def show_messages() -> None:
    """Send the toolkit's messages to stderr, and what the libraries warn of as lines of that kind."""
    log = logging.getLogger("semanticseg4eo")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    for library in QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.CRITICAL)
    said: set[str] = set()

    def say(text: str) -> None:
        """One plain line, once: no path of a library, no line of its source."""
        line = " ".join(text.split())
        if line not in said:
            said.add(line)
            log.warning("warning: %s", line)

    def show_warning(message, category, *_, **__) -> None:
        ours_too = category.__name__ == "NotGeoreferencedWarning"
        if not ours_too and not issubclass(category, HARMLESS_WARNINGS):
            say(str(message))

    others = logging.Handler(logging.WARNING)
    others.emit = lambda record: say(record.getMessage())
    logging.getLogger().handlers = [others]
    warnings.showwarning = show_warning


class SettingsParser(argparse.ArgumentParser):
    """A parser that reads options from the file of ``--settings`` too; the command line wins."""

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        config_class = self.get_default("config_class")
        if config_class is not None:
            finder = argparse.ArgumentParser(
                prog=self.prog, add_help=False, allow_abbrev=False
            )
            finder.add_argument("--settings")
            found, rest = finder.parse_known_args(words)
            if found.settings is not None:
                try:
                    options = read_settings(found.settings, config_class)
                    given = {word.partition("=")[0] for word in rest}
                    options = {
                        n: v for n, v in options.items() if f"--{n}" not in given
                    }
                    stored = option_words(options, config_class)
                    words = [*stored, f"--settings={found.settings}", *rest]
                except OptionError as error:
                    self.error(str(error))
        return super().parse_known_args(words, namespace)


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """A parser without options, described by the first line of a script's docstring."""
    return SettingsParser(
        prog=script, description=description.split("\n")[0], allow_abbrev=False
    )


def add_common(group) -> None:
    """Give a parser, or a group of it, --settings and --debug, which ``run_command`` reads."""
    group.add_argument(
        "--settings",
        metavar="FILE",
        help="options from a JSON file: the metrics, metadata or statistics of a run, or options "
        "by name; those given beside it win, and --no-NAME gives one its default",
    )
    group.add_argument(
        "--debug", action="store_true", help="show the traceback of any error"
    )


def run_command(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    config_class,
    run: Callable,
    scarce: str,
    interrupted: Callable[[], str | None],
) -> int:
    """Run a command line from its parsed arguments to the exit status.

    Args:
        parser: Reports options that cannot be right.
        arguments: As ``parser`` gave them.
        config_class: The settings dataclass of the options.
        run: Takes the settings; its result is the exit status.
        scarce: The options that take memory, for the message when it runs out.
        interrupted: Gives the line that follows an interruption, or None.

    Returns:
        0 done, 1 could not be done, 2 wrong command line, 130 or 143 interrupted.
    """
    show_messages()
    # threads that wait for each other spin 15 times as long otherwise, and beside other work take
    # what it needs; to be set before torch is loaded (tests/benchmarks/training.py --busy)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        config = settings_from(config_class, arguments)
        with interruptible(loud=is_main_process()):
            return int(run(config))
    except OptionError as error:
        if arguments.debug:
            raise
        beside = "; options of --settings count too, and --no-NAME leaves one out"
        parser.error(f"{error}{beside * bool(arguments.settings)}")
    except (SegmentationError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        print(f"error: {error_message(error, scarce)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if line := interrupted():
            print(line, file=sys.stderr)
        return exit_status()
