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


def held_dtype(path: str, axes: tuple[str, ...], compute_dtype) -> jnp.dtype:
    """Dtype of a parameter that nothing trains: matrices and tables are held as they are used, while what is applied
    in fp32 (scales, biases, gates), which takes next to no memory, is fp32."""
    return jnp.dtype(jnp.float32 if len(axes) < 2 or path.endswith("bias") else compute_dtype)


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


def spread(x: Float[Array, "..."], shape: tuple[int, ...], dtype) -> Float[Array, "..."]:
    """A parameter broadcast to `shape` and only then cast, so that its gradient is summed in the parameter's dtype."""
    return jnp.broadcast_to(x, shape).astype(dtype)


def biased(y: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """y + bias in fp32, cast back: so the gradient of the bias, a sum over tokens, is summed in fp32, too."""
    return (y.astype(jnp.float32) + bias).astype(y.dtype)


class Linear(nnx.Module):
    """Contracts the last axes of x, `inputs`, into `outputs`. The kernel is cast to the dtype of x, a bias is not."""

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
        return y if self.bias is None else biased(y, self.bias[...])

    def part(self, x: Float[Array, "... D"], n: int) -> Float[Array, "... E"]:
        """Entry n of the first output axis, such as q of {"qkv": 3, "heads": H, "head_dim": C}: heads side by side.

        Of a single product for all entries the result could not stay split over the heads.
        """
        kernel = self.kernel[:, n].astype(x.dtype)
        return biased(x @ kernel.reshape(len(kernel), -1), self.bias[n].reshape(-1))
