"""What a run will need, found before anyone pays for the machines."""

from vlmem_jax.flight.compile import compile_step, hbm_bytes, tpu_devices

__all__ = ["compile_step", "hbm_bytes", "tpu_devices"]
