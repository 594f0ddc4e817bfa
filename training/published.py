"""Published files of encoder weights for Earth observation: their bands, scaling, source, licence.

The facts are those of TorchGeo (``torchgeo/models/resnet.py`` and ``vit.py``: addresses, bands,
divisors; ``docs/api/weights``: licences), of the scripts that prepared the data for the training
(``experiments/ssl4eo/landsat/compress_*.sh`` of TorchGeo, ``ssl4eo_dataset.py`` of SSL4EO-S12, the
README of SoftCon, ``Normalization.md`` of Satlas), and of the file lists on Hugging Face (sizes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.sensors import SENSORS

_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class PublishedWeights:
    """A file that others have published."""

    encoder: str  # as timm names it
    sensor: str
    bands: tuple[str, ...]  # in the order of the first layer's kernels
    low: tuple[float, ...]  # the value of each band that was 0 in the training
    high: tuple[float, ...]  # and the one that was 1
    scaling: str  # the same in words
    training: str  # on what data, by what method
    address: str
    megabytes: int
    licence: str
    sha256: str | None = None  # how it begins, where the name does not say it


def published_weights(text: str | Path | None) -> PublishedWeights | None:
    """What is known of the file that ``--encoder_weights`` names, by its name."""
    return PUBLISHED.get(Path(text).name) if text else None


# Satlas' Swin transformers, in TorchVision's layout, which no decoder here takes
SATLAS_SWIN = re.compile(
    r"(sentinel[12]|landsat|aerial)_swin[bt]_\w+(-[0-9a-f]{8})?\.pth"
)


def _bands(sensor: str, names: str = "") -> dict:
    known = tuple(SENSORS[sensor])
    return {"sensor": sensor, "bands": tuple(names.split()) or known}


def _divided(count: int, by: float = 10000) -> dict:
    words = f"divided by {by:,.0f}"
    return {"low": (0.0,) * count, "high": (float(by),) * count, "scaling": words}


def _two_deviations(mean: Sequence[float], deviation: Sequence[float]) -> dict:
    pairs = list(zip(mean, deviation))
    return {
        "low": tuple(m - 2 * d for m, d in pairs),
        "high": tuple(m + 2 * d for m, d in pairs),
        "scaling": "mean of SSL4EO-S12 ± 2 standard deviations",
    }


_S2 = _bands("sentinel2")
_S2_RGB = _bands("sentinel2", "B4 B3 B2")
_S1 = _bands("sentinel1", "VV VH")
# of SSL4EO-S12; those of Sentinel-1 in decibels
_S1_STATISTICS = _two_deviations((-12.548, -20.192), (5.257, 5.912))
_S2_STATISTICS = _two_deviations(
    (
        1612.9, 1397.6, 1322.3, 1373.1, 1561.0, 2108.4, 2390.7, 2318.7, 2581.0, 837.7, 22.0,
        2195.2, 1537.4,
    ),
    (
        791.0, 854.3, 878.7, 1144.9, 1127.5, 1164.2, 1276.0, 1249.5, 1345.9, 577.5, 47.5,
        1340.0, 1142.9,
    ),
)  # fmt: skip
_SATLAS = _bands("sentinel2", "B4 B3 B2 B5 B6 B7 B8 B11 B12") | {
    "low": (0.0,) * 9,
    "high": (255.0,) * 3 + (8160.0,) * 6,
    "scaling": "B4, B3, B2 of the true-colour image (bytes) divided by 255, others by 8,160",
}
_SATLAS_RGB = _S2_RGB | {
    "low": (0.0,) * 3,
    "high": (255.0,) * 3,
    "scaling": "true-colour image (bytes) divided by 255",
}
_CC_BY = {"licence": "CC-BY-4.0"}
_APACHE = {"licence": "Apache-2.0"}


def _ssl4eo_s12(
    encoder: str, bands: str, method: str, commit: str, digest: str
) -> dict:
    """A file of TorchGeo's that has a repository of its own."""
    stem = f"{encoder}_{bands}_{method}"
    facts = {
        "sentinel2_all": _S2 | _divided(13),
        "sentinel2_rgb": _S2_RGB | _divided(3),
        "sentinel1_all": _S1 | _S1_STATISTICS,
    }
    size = {"resnet18": 45, "resnet50": 94, "vit_small_patch16_224": 91}[encoder]
    weights = PublishedWeights(
        encoder=encoder,
        training=f"SSL4EO-S12, {_METHODS[method]}",
        address=f"{_HUB}torchgeo/{stem}/resolve/{commit}/{stem}-{digest}.pth",
        megabytes=size,
        **facts[bands],
        **_CC_BY,
    )
    return {f"{stem}-{digest}.pth": weights}


_METHODS = {"moco": "MoCo", "dino": "DINO", "simclr": "SimCLR"}


def _file(address: str, **facts) -> dict:
    """A row of the table; the name is the end of the address."""
    return {Path(address).name: PublishedWeights(address=_HUB + address, **facts)}


def _landsat_scaling(bands: Sequence[str], sensor: str) -> dict:
    """Top of the atmosphere: reflectances of 0 to 0.4, and -25 to 45 degrees in kelvin."""
    thermal = ["thermal" in SENSORS[sensor][band] for band in bands]
    return {
        "low": tuple(248.15 if hot else 0.0 for hot in thermal),
        "high": tuple(318.15 if hot else 0.4 for hot in thermal),
        "scaling": "reflectance 0 to 0.4, temperature 248.15 to 318.15 K",
    }


# the numbers of Collection 2, Level 2, of which reflectance is 0.0000275 times less 0.2
def _surface(count: int) -> dict:
    return {
        "low": (0.2 / 0.0000275,) * count,
        "high": (0.5 / 0.0000275,) * count,
        "scaling": "reflectance 0 to 0.3, which are 7,273 to 18,182 in Level 2 of Collection 2",
    }


_TM = _bands("landsat-tm")
_ETM = _bands("landsat-etm", "B1 B2 B3 B4 B5 B6_VCID_1 B6_VCID_2 B7 B8")
_ETM_SR = _bands("landsat-etm", "SR_B1 SR_B2 SR_B3 SR_B4 SR_B5 SR_B7")
_OLI = _bands("landsat-oli")
_OLI_SR = _bands("landsat-oli", "SR_B1 SR_B2 SR_B3 SR_B4 SR_B5 SR_B6 SR_B7")
# what SSL4EO-L was cut from, and how the SHA-256 of each file begins: MoCo and SimCLR of each of
# the encoders below
_LANDSAT = {
    "tm_toa": (
        _TM | _landsat_scaling(_TM["bands"], "landsat-tm"),
        "1c691b4f d2d38ace ba1ce753 a1c93432 a1c967d8 7c2d9799",
    ),
    "etm_toa": (
        _ETM | _landsat_scaling(_ETM["bands"], "landsat-etm"),
        "bb88689c 4d813f79 e9a84d5a 70b5575f 26d19bcf 34fb12cb",
    ),
    "etm_sr": (
        _ETM_SR | _surface(6),
        "4f078acd 8e8543b4 1266cde3 e5d185d7 eaa4674e a14c466a",
    ),
    "oli_tirs_toa": (
        _OLI | _landsat_scaling(_OLI["bands"], "landsat-oli"),
        "a3002f51 b0635cc6 de7f5e0f 030cebfe c7c2cceb ad43e9a4",
    ),
    "oli_sr": (
        _OLI_SR | _surface(7),
        "660e82ed 7bced5be ff580dad 94f78913 c9b8898d 4e8f6102",
    ),
}
_LANDSAT_ENCODERS = {
    "resnet18": ("resnet18", 45),
    "resnet50": ("resnet50", 94),
    "vits16": ("vit_small_patch16_224", 89),
}


def _ssl4eo_l() -> dict:
    commit = "1c88bb51b6e17a21dde5230738fa38b74bd74f76"
    rows = {}
    for product, (facts, digests) in _LANDSAT.items():
        left = iter(digests.split())
        for short, (encoder, size) in _LANDSAT_ENCODERS.items():
            for method in ("moco", "simclr"):
                name = f"{short}_landsat_{product}_{method}-{next(left)}.pth"
                rows |= _file(
                    f"torchgeo/ssl4eo_landsat/resolve/{commit}/{name}",
                    encoder=encoder,
                    training=f"SSL4EO-L, {_METHODS[method]}",
                    megabytes=size,
                    licence="CC0-1.0",
                    **facts,
                )
    return rows


def _satlas() -> dict:
    commit, rows = "081d6607431bf36bdb59c223777cbb267131b8f2", {}
    digests = {
        "resnet50": ("da5413d2", "e79bb7fe", "1f454cc6", "45fc6972"),
        "resnet152": ("fd35b4bb", "67563ac5", "4500c6cb", "f4d24c3c"),
    }
    kinds = ("mi_ms", "mi_rgb", "si_ms", "si_rgb")
    for encoder, size in (("resnet50", 103), ("resnet152", 242)):
        for kind, digest in zip(kinds, digests[encoder]):
            images = "several images" if kind.startswith("mi") else "one image"
            rows |= _file(
                f"torchgeo/satlas/resolve/{commit}/sentinel2_{encoder}_{kind}-{digest}.pth",
                encoder=encoder,
                training=f"SatlasPretrain, labels, of {images}",
                megabytes=size,
                licence="ODC-BY (TorchGeo), Apache-2.0 (model card)",
                **(_SATLAS if kind.endswith("ms") else _SATLAS_RGB),
            )
    return rows


PUBLISHED: dict[str, PublishedWeights] = (
    _ssl4eo_s12("resnet18", "sentinel2_all", "moco", "5b8cddc9a14f3844350b7f40b85bcd32aed75918", "59bfdff9")
    | _ssl4eo_s12("resnet18", "sentinel2_rgb", "moco", "e1c032e7785fd0625224cdb6699aa138bb304eec", "e3a335e3")
    | _ssl4eo_s12("resnet50", "sentinel2_all", "moco", "da4f3c9dbe09272eb902f3b37f46635fa4726879", "df8b932e")
    | _ssl4eo_s12("resnet50", "sentinel2_all", "dino", "d7f14bf5530d70ac69d763e58e77e44dbecfec7c", "d6c330e9")
    | _ssl4eo_s12("resnet50", "sentinel2_rgb", "moco", "efd9723b59a88e9dc1420dc1e96afb25b0630a3c", "2b57ba8b")
    | _ssl4eo_s12("resnet50", "sentinel1_all", "moco", "e79862c667853c10a709bdd77ea8ffbad0e0f1cf", "906e4356")
    | _ssl4eo_s12("vit_small_patch16_224", "sentinel2_all", "moco", "1cb683f6c14739634cdfaaceb076529adf898c74", "67c9032d")
    | _ssl4eo_s12("vit_small_patch16_224", "sentinel2_all", "dino", "5b41dd418a79de47ac9f5be3e035405a83818a62", "36bcc127")
    | _file(
        "torchgeo/decur/resolve/eba7ae5945d482a4319be046d34b552db5dd9950/rn50_ssl4eo-s12_ms_decur_ep100-fc6b09ff.pth",
        encoder="resnet50", training="SSL4EO-S12, DeCUR", megabytes=94, **_S2, **_divided(13), **_APACHE,
    )
    | _file(
        "torchgeo/decur/resolve/9328eeb90c686a88b30f8526ed757b4bc0f12027/rn50_ssl4eo-s12_sar_decur_ep100-f0e69ba2.pth",
        encoder="resnet50", training="SSL4EO-S12, DeCUR", megabytes=94, **_S1, **_S1_STATISTICS, **_APACHE,
    )
    | _file(
        "wangyi111/softcon/resolve/62ff465b2e7467dbfc70758ec1e9d08ab87fc46b/B13_rn50_softcon.pth",
        encoder="resnet50", training="SSL4EO-S12-ML, SoftCon", megabytes=94, sha256="5f648398",
        **_S2, **_S2_STATISTICS, **_CC_BY,
    )
    | _file(
        "wangyi111/softcon/resolve/62ff465b2e7467dbfc70758ec1e9d08ab87fc46b/B2_rn50_softcon.pth",
        encoder="resnet50", training="SSL4EO-S12-ML, SoftCon", megabytes=94, sha256="b61c1061",
        **_S1, **_S1_STATISTICS, **_CC_BY,
    )
    | _file(
        "torchgeo/seco-eco/resolve/3ede08c40f70534eb1132057ee338b99e54319f0/resnet50_sentinel2_all_seco_eco-a273eb78.pth",
        encoder="resnet50", training="SSL4Eco, SeCo-Eco", megabytes=94, licence="MIT",
        **_bands("sentinel2", "B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12"), **_divided(12),
    )
    | _ssl4eo_l()
    | _satlas()
)  # fmt: skip
