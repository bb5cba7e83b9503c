"""What a run will need, found before anyone pays for the machines."""

from vlmem_jax.flight.chips import Topology
from vlmem_jax.flight.compile import compile_step, tpu_devices
from vlmem_jax.flight.report import Report, check

__all__ = ["Report", "Topology", "check", "compile_step", "tpu_devices"]
