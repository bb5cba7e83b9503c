"""The device that a program is traced for, and what such devices can do."""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a chip can do in a second at most, all cores together, as published."""

    flops: float
    """Dense bf16 multiply-adds, times two."""
    hbm: float
    """Bytes read from its memory."""


PEAKS = {
    "v5e": Peak(197e12, 810e9),
    "v5p": Peak(459e12, 2765e9),
    "v6e": Peak(918e12, 1640e9),
    "H100": Peak(989e12, 3.35e12),
    "H200": Peak(989e12, 4.8e12),
}
"""The one table of them: usual name of a TPU, or a word in the name that JAX gives to a GPU -> peak."""


def peak(kind: str) -> Peak | None:
    """The peak of a device with that name, as JAX gives it; None where it is not known."""
    name = CHIPS.get(kind) or next((name for name in PEAKS if name in kind), None)
    return PEAKS.get(name)


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
