"""A picture of where the patches of a dataset lie, a panel for each place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common import SPLITS
from common.ground import pairs_within, to_metric_crs
from common.pictures import panel_figure, save_figure
from common.text import shorten, some_of

if TYPE_CHECKING:
    from geopandas import GeoSeries
    from shapely import Geometry

SPLIT_COLOURS = dict(zip(SPLITS, [(157, 184, 210), (240, 160, 48), (200, 40, 60)]))
MOST_PANELS = 12
EMPTY = 2  # what is apart: this many times the side of the largest place
SQUARES = 48  # of a side of the ground, whose patches are taken as one to find places


class PatchLocation(NamedTuple):
    """Where a patch lies."""

    split: str
    name: str
    footprint: Geometry
    crs: object


def draw_splits(places: Sequence[PatchLocation], target: Path) -> None:
    """Draw the patches of a dataset where they lie, coloured by split.

    Places that are far apart have a panel each, in kilometres or metres from its south-western
    corner, and a panel for each split where patches of several lie on the same ground, as on other
    dates. Of very many the largest are drawn, and a line names the others.
    """
    from matplotlib.collections import PolyCollection

    ground = to_metric_crs([p.footprint for p in places], [p.crs for p in places])
    splits = np.array([place.split for place in places])
    found = _by_split(find_places(ground.bounds.to_numpy()), ground, splits)
    found.sort(key=lambda members: (-len(members), members[0]))
    others = found[MOST_PANELS:]
    shown = sorted(found[:MOST_PANELS], key=lambda members: members[0])
    corners = [np.array(shape.exterior.coords) for shape in ground]
    sides = [np.ptp(np.concatenate([corners[i] for i in p]), axis=0) for p in shown]
    aspect = float(np.median([width / height for width, height in sides]))
    figure = panel_figure(
        [_title(places, place) for place in shown],
        float(np.clip(aspect, 1 / 30, 30)),
        [(f"{s} ({(splits == s).sum():,})", SPLIT_COLOURS[s]) for s in SPLITS],
        _line_of_others(places, others),
        margins=(0.6, 0.4, 0.1),
    )
    for axes, members, (width, height) in zip(figure.axes, shown, sides):
        origin = np.min([corners[i].min(axis=0) for i in members], axis=0)
        unit, name = (1000, "km") if max(width, height) >= 3000 else (1, "m")
        for split in SPLITS:
            inside = [
                (corners[i] - origin) / unit for i in members if splits[i] == split
            ]
            colour = np.divide(SPLIT_COLOURS[split], 255)
            style = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.4}
            axes.add_collection(PolyCollection(inside, **style))
        axes.set(xlim=(0, width / unit), ylim=(0, height / unit), aspect="equal")
        axes.locator_params(nbins=5)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(name, fontsize=8, labelpad=1)
    save_figure(figure, target)


def find_places(bounds: np.ndarray) -> list[np.ndarray]:
    """Patches in groups that are much farther from each other than they are large.

    Args:
        bounds: (N, 4) west, south, east and north of each patch.

    Returns:
        The indices of each group; one group where patches lie everywhere, or alone.
    """
    found, waiting = [], [np.arange(len(bounds))]
    while waiting:
        members = waiting.pop()
        parts = _apart(bounds[members])
        groups = [members[parts == part] for part in np.unique(parts)]
        if len(groups) == 1:
            found += groups
        else:
            waiting += groups
    return found


def _by_split(
    found: Sequence[np.ndarray], ground: GeoSeries, splits: np.ndarray
) -> list[np.ndarray]:
    """Places, each divided by split where patches of several lie on the same ground."""
    parts = [SPLITS.index(split) for split in splits]
    shared = np.unique(np.asarray(pairs_within(ground, parts, 0)))
    panels = []
    for members in found:
        if np.isin(members, shared).any():
            by_split = (members[splits[members] == split] for split in SPLITS)
            panels += [part for part in by_split if len(part)]
        else:
            panels.append(members)
    return panels


def _apart(bounds: np.ndarray) -> np.ndarray:
    """A number per patch: that of its group, of the fewest that lie far enough apart."""
    from scipy.cluster.hierarchy import fcluster, linkage

    centres = (bounds[:, :2] + bounds[:, 2:]) / 2
    step = max(np.ptp(centres, axis=0).max() / SQUARES, 1e-9)
    squares = np.floor((centres - centres.min(axis=0)) / step)
    owners = np.unique(squares, axis=0, return_inverse=True)[1].ravel()
    count = owners.max() + 1
    if count == 1:
        return owners
    # west, south, -east, -north of each square, then of each group that grows from them
    boxes = np.full((2 * count - 1, 4), np.inf)
    np.minimum.at(boxes, owners, bounds * [1, 1, -1, -1])
    merges = linkage((boxes[:count, :2] - boxes[:count, 2:]) / 2, "single")
    largest, cut = _sides(boxes[:count]).max(), 1
    for number, (left, right, gap, _) in enumerate(merges):
        groups = count - number
        if gap > EMPTY * largest and groups <= len(bounds) / 2:
            cut = groups
        merged = np.minimum(boxes[int(left)], boxes[int(right)])
        boxes[count + number] = merged
        largest = max(largest, _sides(merged).max())
    return fcluster(merges, cut, "maxclust")[owners]


def _sides(boxes: np.ndarray) -> np.ndarray:
    return -(boxes[..., :2] + boxes[..., 2:])


def _title(places: Sequence[PatchLocation], members: np.ndarray) -> str:
    """What the names of patches have in common, and how many there are."""
    names = [places[i].name for i in members]
    common = os.path.commonprefix(names)
    if any(name[len(common) :][:1].isdigit() for name in names):
        common = common.rstrip("0123456789")  # the first digits of a number
    common = shorten(common.rstrip("_-") or names[0])
    of = {places[i].split for i in members}
    split = f"{of.pop()} " if len(of) == 1 else ""
    return f"{common}: {len(names):,} {split}patch{'es' if len(names) > 1 else ''}"


def _line_of_others(places: Sequence[PatchLocation], others: Sequence) -> str:
    if not others:
        return ""
    names = [shorten(places[group[0]].name) for group in others]
    patches = sum(map(len, others))
    return f"not drawn: {patches:,} patches in {len(others)} more places, of {some_of(names)}"
