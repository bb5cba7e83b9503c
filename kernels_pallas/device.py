"""The device that a program is traced for."""

import jax


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
