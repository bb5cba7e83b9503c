"""What the compiler is told, chip by chip, about collectives and what may run beside them.

The one place for such flags: steps of training and the programs of generation carry them, and the flight check compiles
those very programs. They go with each program, so nothing has to be set in the environment before JAX starts. Serving
needs no others: there, too, weights are spread over devices, and prefill runs the kernels of training.
"""

import jax
from jax.sharding import Mesh

from kernels_pallas.device import CHIPS

_TPU = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
    # a product in as many pieces as there are parts of its weight: each is too thin, and their sum goes through memory
    "xla_tpu_enable_windowed_einsum_for_all_gather": False,
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
}
"""Weights are gathered whole, those of the next layer while this one computes."""

_VMEM = {"xla_tpu_scoped_vmem_limit_kib": 32768}
"""What a kernel may take of a core's fast memory, where the default is too little for causal attention's blocks."""

OPTIONS: dict[str, dict[str, bool | int]] = {
    "v5e": _TPU | _VMEM,
    "v5p": _TPU | _VMEM,
    "v6e": _TPU | _VMEM,
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "cpu": {},
}


def options(mesh: Mesh | None) -> dict[str, bool | int]:
    """For `compiler_options` of a program on that mesh; None: on the default device."""
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    platform = "gpu" if device.platform == "cuda" else device.platform
    return OPTIONS.get(CHIPS.get(device.device_kind, platform), {})


def once() -> dict[str, int]:
    """For `compiler_options` of a program that runs once, such as one that makes random parameters.

    On a CPU it is compiled without optimization, which takes far longer than such a program runs.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
