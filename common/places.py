"""Where the patches of a dataset lie, as a checkpoint lists it, and their footprint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rasterio.crs import CRS

from common.ground import on_earth, unit_vectors

if TYPE_CHECKING:
    import rasterio
    from shapely import Geometry

SIDE_PARTS = 4  # of the side of a patch, whose ends are taken to another CRS


class Place(NamedTuple):
    """The ground of a patch."""

    crs: str | None  # as EPSG:32632, or as WKT
    bounds: tuple[float, float, float, float]  # left, bottom, right, top


def place_of(patch: rasterio.DatasetReader) -> Place | None:
    """Where a patch lies; None where its coordinates are pixels of a picture, whose rows run down."""
    crs, transform = patch.crs, patch.transform
    if not crs and transform.is_rectilinear and transform.a > 0 and transform.e > 0:
        return None
    corners = [(0, 0), (patch.width, 0), (patch.width, patch.height), (0, patch.height)]
    x, y = zip(*(transform * corner for corner in corners))
    bounds = min(x), min(y), max(x), max(y)
    return Place(_crs_text(crs.to_wkt()) if crs else None, bounds)


@lru_cache(256)
def _crs_text(wkt: str) -> str:
    """A CRS by its EPSG code where that is exactly it, else as it is."""
    crs = CRS.from_wkt(wkt)
    code = crs.to_epsg(confidence_threshold=100)
    return f"EPSG:{code}" if code and CRS.from_epsg(code) == crs else wkt


def list_places(patches: Iterable[tuple[str, Place | None]]) -> list[dict] | None:
    """The places of patches, each with its split, in plain values; None where none is known.

    Returns:
        A dictionary for each CRS and split: "crs", "split", "bounds" (a list of four numbers per
        patch).
    """
    found: dict[tuple, list] = {}
    for split, place in patches:
        if place is not None:
            found.setdefault((place.crs, split), []).append(list(place.bounds))
    return [
        {"crs": crs, "split": split, "bounds": bounds}
        for (crs, split), bounds in found.items()
    ] or None


def training_places(metadata: dict) -> list[dict]:
    """The places of the patches that a model was trained on; of k-fold, those of all folds."""
    folds = (metadata.get("training_params") or {}).get("val_strategy") == "kfold"
    splits = ("train", "validation") if folds else ("train",)
    places = metadata.get("places") or []
    return [place for place in places if place["split"] in splits]


def footprint_of(
    places: Sequence[dict] | None, splits: Sequence[str]
) -> Geometry | None:
    """The ground of the patches of some splits in WGS 84, longitude and latitude in degrees.

    It is cut along the antimeridian, as GeoJSON wants it.

    Args:
        places: Those of a checkpoint.
        splits: Which of its splits.

    Returns:
        A polygon, or several; None where one of the places is unknown, or none is listed.
    """
    import shapely

    parts = [
        _in_degrees(place["crs"], np.array(place["bounds"]))
        for place in places or ()
        if place["split"] in splits
    ]
    unknown = not parts or any(part is None for part in parts)
    return None if unknown else shapely.union_all(parts)


def outlines_in(places: Sequence[dict] | None, crs: CRS) -> tuple[list[Geometry], bool]:
    """The ground of all patches in another CRS; those that have no place in it are left out.

    Args:
        places: Those of a checkpoint.
        crs: Wanted.

    Returns:
        A polygon per patch whose place is known; whether that is so of all.
    """
    import shapely

    found = [_outlines_of_one(place, crs) for place in places or ()]
    known = [outlines for outlines in found if outlines is not None]
    there = [
        outline
        for outlines in known
        for outline in outlines[np.isfinite(shapely.bounds(outlines)).all(axis=1)]
    ]
    return there, bool(places) and len(known) == len(found)


def _outlines_of_one(place: dict, crs: CRS) -> np.ndarray | None:
    """The patches of one CRS in another; None where their place in it is unknown."""
    import geopandas
    import shapely
    from pyproj.exceptions import ProjError

    known = CRS.from_user_input(place["crs"]) if place["crs"] else None
    if known is None or not (known == crs or on_earth(known) and on_earth(crs)):
        return None
    bounds = np.array(place["bounds"])
    outlines = shapely.box(*bounds.T)
    if known == crs:
        return outlines
    side = float(np.median(bounds[:, 2:] - bounds[:, :2]))
    outlines = shapely.segmentize(outlines, side / SIDE_PARTS)
    series = geopandas.GeoSeries(outlines, crs=known.to_wkt())
    try:
        return series.to_crs(crs.to_wkt()).to_numpy()
    except ProjError:
        return None


def centre_distances(
    places: Sequence[dict], others: Sequence[dict]
) -> np.ndarray | None:
    """Metres on the ellipsoid from the centre of each place to the nearest centre of the others.

    Args:
        places: As ``list_places`` gives them, of any CRS. What lies off the Earth is left out.
        others: Likewise.

    Returns:
        (N,); None where a CRS is unknown or local, or nothing is left.
    """
    from pyproj import Geod
    from scipy.spatial import KDTree

    here, there = map(_centres_in_degrees, (places, others))
    if here is None or there is None:
        return None
    _, nearest = KDTree(unit_vectors(there)).query(unit_vectors(here))
    return Geod(ellps="WGS84").inv(*here.T, *there[nearest].T)[2]


def _centres_in_degrees(places: Sequence[dict]) -> np.ndarray | None:
    """Longitude and latitude of the centres of places, (N, 2); see ``centre_distances``."""
    from pyproj import Transformer
    from pyproj.exceptions import ProjError

    found = []
    for place in places:
        known = CRS.from_user_input(place["crs"]) if place["crs"] else None
        if known is None or not on_earth(known):
            return None
        left, bottom, right, top = np.array(place["bounds"]).T
        centres = (left + right) / 2, (bottom + top) / 2
        try:
            to_degrees = Transformer.from_crs(
                known.to_wkt(), "EPSG:4326", always_xy=True
            )
        except ProjError:
            return None
        found.append(np.stack(to_degrees.transform(*centres), axis=1))
    degrees = np.concatenate(found or [np.zeros((0, 2))])
    degrees = degrees[np.isfinite(degrees).all(axis=1)]
    return degrees if len(degrees) else None


def _in_degrees(crs: str | None, bounds: np.ndarray) -> Geometry | None:
    """The ground of patches of one CRS, (N, 4), in WGS 84; None where that is unknown."""
    import shapely
    from pyproj import Transformer
    from pyproj.exceptions import ProjError
    from rasterio.warp import transform_geom
    from shapely.geometry import mapping, shape

    known = CRS.from_user_input(crs) if crs else None
    if known is None or not on_earth(known) or not np.isfinite(bounds).all():
        return None
    side = float(np.median(bounds[:, 2:] - bounds[:, :2]))
    # neighbours have their corners in common up to rounding
    ground = shapely.union_all(shapely.box(*bounds.T), grid_size=1e-6 * side)
    ground = shapely.segmentize(ground, side / SIDE_PARTS)
    try:
        # GDAL, which cuts at the antimeridian, has no public error for a point off the Earth
        to_degrees = Transformer.from_crs(known.to_wkt(), "EPSG:4326", always_xy=True)
        there = to_degrees.transform(*shapely.get_coordinates(ground).T)
    except ProjError:
        return None
    if not np.isfinite(there).all():
        return None
    degrees = shape(transform_geom(known, CRS.from_epsg(4326), mapping(ground)))
    return _on_globe(shapely.make_valid(degrees))


def _on_globe(degrees: Geometry) -> Geometry | None:
    """Ground whose longitudes may count on beyond 180 degrees; None where none of it is there."""
    import shapely
    from shapely.affinity import translate

    globe = shapely.box(-180, -90, 180, 90)
    if globe.covers(degrees):
        return degrees
    turns = [translate(degrees, turn) for turn in (-360, 0, 360)]
    ground = shapely.union_all(shapely.intersection(turns, globe))
    return ground if ground.area else None
