"""Which backend of a kernel serves a call."""

import importlib
import importlib.util
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas import device

Implementation = Literal["tpu", "gpu", "xla", "tpu_interpret", "gpu_interpret"]
_MODULES = {"tpu": "tpu", "gpu": "gpu", "tpu_interpret": "tpu", "gpu_interpret": "gpu"}


def choose(
    package: str, problem: Any, inputs: Any, implementation: Implementation | None = None
) -> tuple[str | None, str]:
    """(name, why) of the backend that serves: the one asked for, or the platform's kernel, else plain JAX.

    A backend is a module of the kernel's package. The name is None when the one asked for cannot serve.
    """
    if implementation == "xla":
        return "xla", "asked for"
    if implementation is not None:
        reason = _unsupported(package, implementation, problem, inputs)
        return (implementation, "asked for") if reason is None else (None, reason)
    platform = device.platform()
    if platform not in ("tpu", "gpu"):
        return "xla", f"no kernel for platform {platform}"
    reason = _unsupported(package, platform, problem, inputs)
    return (platform, f"platform is {platform}") if reason is None else ("xla", f"{platform} kernel: {reason}")


def _unsupported(package: str, name: str, problem: Any, inputs: Any) -> str | None:
    if name not in _MODULES:
        return f"implementation must be one of {sorted([*_MODULES, 'xla'])} or None"
    if importlib.util.find_spec(f"{package}.{_MODULES[name]}") is None:
        return f"there is no {name} kernel"
    return module(package, name).unsupported(problem, inputs)


def module(package: str, name: str) -> Any:
    """The backend of that name."""
    return importlib.import_module(f"{package}.{_MODULES[name]}")


def chip() -> str:
    """The TPU whose blocks to use: that of the ambient mesh or the default device, or else v5e."""
    return device.CHIPS.get(device.kind(), "v5e")


def no_gradient(x: jax.Array) -> Any:
    """The cotangent of what a kernel does not learn."""
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros(x.shape, jax.dtypes.float0)
