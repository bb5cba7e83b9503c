"""Linear maps, possibly over several axes (heads), and their initialisation."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def param(init, shape: tuple[int, ...], axes: tuple[str, ...], rngs: nnx.Rngs) -> nnx.Param:
    """fp32 parameter whose axes mean `axes` (names of `sharding.LOGICAL_AXES`)."""
    if len(axes) != len(shape):
        raise ValueError(f"a parameter of shape {shape} needs as many axis names, got {axes}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def zeros(key, shape, dtype):
    del key
    return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
    del key
    return jnp.ones(shape, dtype)


def fan_in_uniform(fan_in: int | float):
    """Uniform in +-1/sqrt(fan_in), the default of PyTorch's Linear, which the published systems start from."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nnx.Module):
    """Contracts the last axes of x, `inputs`, into `outputs`. The kernel is cast to the dtype of x."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool = False,
        init: Callable | None = None,
        bias_init: Callable = zeros,
        rngs: nnx.Rngs,
    ):
        """`inputs` and `outputs` map the meaning of each axis to its size, as in `{"embed": 64}, {"heads": 4, ...}`.

        `init` of the kernel, by default `fan_in_uniform`.
        """
        in_shape, out_shape = tuple(inputs.values()), tuple(outputs.values())
        self.contracted = len(in_shape)
        self.kernel = param(
            init or fan_in_uniform(math.prod(in_shape)), in_shape + out_shape, (*inputs, *outputs), rngs
        )
        self.bias = param(bias_init, out_shape, tuple(outputs), rngs) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        n, kernel = self.contracted, self.kernel[...].astype(x.dtype)
        # as a product of two matrices: the TPU compiler makes a convolution of a contraction over several axes
        matrix = kernel.reshape(math.prod(kernel.shape[:n]), -1)
        y = x.reshape(*x.shape[: x.ndim - n], -1) @ matrix
        y = y.reshape(*y.shape[:-1], *kernel.shape[n:])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def part(self, x: Float[Array, "... D"], n: int) -> Float[Array, "... E"]:
        """Entry n of the first output axis, such as q of {"qkv": 3, "heads": H, "head_dim": C}: heads side by side.

        Of a single product for all entries the result could not stay split over the heads.
        """
        kernel, bias = (leaf[...].astype(x.dtype) for leaf in (self.kernel[:, n], self.bias[n]))
        return x @ kernel.reshape(len(kernel), -1) + bias.reshape(-1)
