"""Colours of classes: a palette in which they can be told apart, and which class gets which.

A colour is (red, green, blue), 0 to 255 each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice

from common.architectures import is_background

Colour = tuple[int, int, int]

# Two of the first 12 differ by at least 30 (CIEDE2000), and by 16 as seen with deuteranopia; of
# the first 19 by 20 and 11; docs/measurements.md has the table. The later ones are each the
# farthest from those before it.
_PALETTE = (
    "002db4 006900 ff3c1e ffe100 69e187 968769 96f0ff 007887 ffe1e1 9696ff 4b2d2d f00096 "
    "002d2d a52dff 780f69 a55a00 3c2d00 d296c3 a54b4b 96b4a5 f0a53c 0f69b4 f0f0c3 5a5a5a "
    "2d8769 5aa5c3 00ffe1 e18787 2d1e4b 69963c 877896 4b5a3c"
)
PALETTE: list[Colour] = [tuple(bytes.fromhex(text)) for text in _PALETTE.split()]
BLUE, GREEN, RED, YELLOW, LIGHT_GREEN, BROWN, LIGHT_CYAN, TEAL = PALETTE[:8]
OCHRE = PALETTE[15]
GREY: Colour = (225, 225, 225)  # of what is not the one class of a binary map

# of maps of errors, by preference: greys, and colours that are told apart without red and green
_RIGHT = ((150, 150, 150), (60, 60, 60), (185, 185, 185))
_ERRORS = ((230, 0, 230), (255, 150, 0), (0, 150, 255), (60, 220, 0), (0, 0, 0))

# what land cover is usually drawn in, by words in the singular
_USUAL = {
    BLUE: "water waterbody river lake sea ocean pond reservoir stream canal",
    GREEN: "forest tree wood woodland treecover broadleaf coniferous deciduous evergreen",
    RED: "built builtup urban building city town settlement impervious developed residential "
    "house artificial",
    YELLOW: "crop cropland agriculture agricultural cultivated farmland arable field",
    LIGHT_GREEN: "grass grassland pasture meadow herbaceous",
    BROWN: "bare bareland barren soil sand rock desert",
    OCHRE: "shrub shrubland scrub bush bushland heath",
    LIGHT_CYAN: "snow ice glacier",
    TEAL: "wetland flooded swamp marsh bog peatland mangrove",
}
_HUES = {word: hue for hue, words in _USUAL.items() for word in words.split()}
_PLURALS = (("s", ""), ("es", ""), ("ies", "y"))
_NEGATIONS = {"no", "non", "not", "without", "except"}
_GONE = {"former", "loss"}


def class_colours(names: Sequence[str]) -> list[Colour]:
    """A colour for each class, all different and none of them white.

    Land cover gets its usual hue, all others the palette in its order. Of two classes of which one
    is the rest ("background", "no water"), that one is grey.
    """
    hues = [_usual_hue(name) for name in names]
    rest = [is_background(name) for name in names]
    if len(names) == 2 and rest[0] != rest[1]:
        strong = hues[rest.index(False)] or RED
        return [GREY if is_rest else strong for is_rest in rest]
    return _distribute(hues, _further_colours())


def complete_colours(
    known: Sequence[Colour | None] | None, names: Sequence[str]
) -> list[Colour]:
    """A colour for each class: those that are known, and of the palette what is unlike them.

    Those of two equal ones say nothing of the classes: then all are of the palette.
    """
    own, asked = class_colours(names), list(known or [])[: len(names)]
    given = [colour for colour in asked if colour]
    if not given or has_equal(given):
        return own
    asked += [None] * (len(names) - len(asked))
    unlike = {c for c in [*PALETTE, GREY] if all(_look_apart(c, g) for g in given)}
    wishes = [a or (o if o in unlike else None) for a, o in zip(asked, own)]
    first = (colour for colour in PALETTE if colour in unlike)
    return _distribute(wishes, chain(first, _further_colours()))


def has_equal(colours: Sequence[Colour | None]) -> bool:
    """Whether two classes have one colour."""
    given = [colour for colour in colours if colour]
    return len(set(given)) < len(given)


def error_colours(classes: Sequence[Colour]) -> tuple[Colour, Colour, Colour]:
    """Colours of what is right, missed and a false alarm: none that a class has, nor white.

    Each is the first of the usual ones that is clearly unlike all others; beside many classes, the
    one that is farthest from them.
    """
    taken = [*classes, (255, 255, 255)]
    for usual in (_RIGHT, _ERRORS, _ERRORS):
        more = islice(_further_colours(), len(taken))
        free = [c for c in usual if c not in taken] or [
            c for c in more if c not in taken
        ]
        unlike = (c for c in free if all(_look_apart(c, t) for t in taken))
        farthest = max(free, key=lambda c: min(_distance(c, t) for t in taken))
        taken.append(next(unlike, farthest))
    return tuple(taken[-3:])


def _distance(first: Colour, second: Colour) -> float:
    """How unlike two colours are, by T. Riemersma's cheap "redmean"; 765 of black and white."""
    red = (first[0] + second[0]) / 2
    weights = 2 + red / 256, 4, 2 + (255 - red) / 256
    return sum(w * (a - b) ** 2 for w, a, b in zip(weights, first, second)) ** 0.5


def _look_apart(first: Colour, second: Colour) -> bool:
    """Whether two colours are clearly different."""
    return _distance(first, second) >= 180


def table_colours(
    table: dict[int, Colour], codes: Sequence[int] | None
) -> list[Colour | None]:
    """The colours of classes by the colour table of a label raster, in class order.

    Args:
        table: Colours by the values of the label.
        codes: The values that are classes; None where nobody knows how many there are.

    Returns:
        Nothing where the table says nothing: all black, or a grey ramp.
    """
    if codes is None:
        # formats without gaps fill them with black
        last = max((value for value in table if any(table[value])), default=-1)
        codes = range(last + 1)
    known = [table.get(code) for code in codes]
    coloured = any(len(set(colour)) > 1 for colour in known if colour)
    return known if coloured else []


def hex_of_colour(colour: Colour) -> str:
    """A colour as ``#rrggbb``."""
    return "#" + bytes(colour).hex()


def colour_of_hex(text: str) -> Colour | None:
    """The colour of ``rrggbb`` or ``rgb``, with or without ``#``; None for any other text."""
    digits = text.removeprefix("#")
    if not re.fullmatch("[0-9a-fA-F]{3}|[0-9a-fA-F]{6}", digits):
        return None
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    return tuple(bytes.fromhex(digits))


def _distribute(wishes: list[Colour | None], others: Iterator[Colour]) -> list[Colour]:
    """Wishes in their order, each colour once; the others where there is none or it is taken."""
    given, taken = [], set()
    for wish in wishes:
        given.append(None if wish in taken else wish)
        taken.add(wish)
    for place, colour in enumerate(given):
        if colour is None:
            given[place] = next(other for other in others if other not in taken)
            taken.add(given[place])
    return given


def _further_colours() -> Iterator[Colour]:
    """The palette, then as many other colours as a map can have classes."""
    yield from PALETTE
    known = set(PALETTE)
    # a walk over a lattice of 41 levels a channel that meets each of its points once
    for number in count():
        place = number * 42595 % 41**3
        colour = tuple(6 * (place // 41**power % 41) for power in (2, 1, 0))
        if colour not in known:
            yield colour


def _words(name: str) -> list[str]:
    """The words of a class name in lower case, also of ``BareSoil`` and ``bare_soil``."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W\d_]+", apart.lower())


def _usual_hue(name: str) -> Colour | None:
    """The usual hue of a land cover, by the last word that names one, as in "urban trees"."""
    words = _words(name)
    if (_NEGATIONS | _GONE).intersection(words):
        return None
    singular = (_singular(word) for word in reversed(words))
    return next((_HUES[word] for word in singular if word in _HUES), None)


def _singular(word: str) -> str:
    """A word as it is in the table: "waterbodies" is "waterbody"."""
    forms = [word, *(re.sub(f"{end}$", y, word) for end, y in _PLURALS)]
    return next((form for form in forms if form in _HUES), word)
