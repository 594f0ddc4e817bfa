"""What the bands of the training patches are."""

from __future__ import annotations

from common.provenance import joint_facts
from common.sensors import sensor_of
from training.samples import SampleIndex
from training.settings import TrainingConfig


def sensor_of_data(config: TrainingConfig, index: SampleIndex) -> str | None:
    """The key in ``common.sensors.SENSORS`` of what measured the patches; None if nobody says.

    ``--sensor`` says it, else the patches do.
    """
    return config.sensor or sensor_of(
        joint_facts(header.facts for header in index.headers).sensor
    )
