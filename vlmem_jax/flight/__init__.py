"""What a run will need, found before anyone pays for the machines."""

from vlmem_jax.flight.chips import Topology
from vlmem_jax.flight.compile import Learning, Serving, tpu_devices
from vlmem_jax.flight.remedies import Remedy, remedies
from vlmem_jax.flight.report import Finish, Report, check_learning, check_serving, check_training

__all__ = [
    "Finish",
    "Learning",
    "Remedy",
    "Report",
    "Serving",
    "Topology",
    "check_learning",
    "check_serving",
    "check_training",
    "remedies",
    "tpu_devices",
]
