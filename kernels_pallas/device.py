"""The device that a program is traced for."""

import jax

CHIPS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
"""Names that JAX gives to TPUs -> the usual ones."""


def platform() -> str:
    """tpu, gpu or cpu: that of the ambient mesh (`jax.set_mesh`), else that of the default device."""
    name = _device().platform
    return "gpu" if name == "cuda" else name


def kind() -> str:
    """The device's own name, such as TPU v5."""
    return _device().device_kind


def _device():
    # a mesh may be of devices that are only compiled for
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
