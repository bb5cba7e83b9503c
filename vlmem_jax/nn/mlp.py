"""Feed-forward blocks."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.nn.linear import Linear, zeros
from vlmem_jax.nn.lora import LayerAdapters, adapted


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(
        self, width: int, hidden: int, *, bias: bool = False, down_init: Callable | None = None, rngs: nnx.Rngs
    ):
        self.gate = Linear({"embed": width}, {"mlp": hidden}, bias=bias, rngs=rngs)
        self.up = Linear({"embed": width}, {"mlp": hidden}, bias=bias, rngs=rngs)
        self.down = Linear({"mlp": hidden}, {"embed": width}, bias=bias, init=down_init, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"], lora: LayerAdapters | None = None) -> Float[Array, "... D"]:
        hidden = jax.nn.silu(adapted(self.gate, "gate", x, lora)) * adapted(self.up, "up", x, lora)
        return adapted(self.down, "down", hidden, lora)


class GeluMLP(nnx.Module):
    """fc2(gelu(fc1 x)) with biases. `tanh`: whether GELU is its approximation by tanh, not the exact one (erf);
    `bias_init` makes an initialiser from the fan-in."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        tanh: bool = False,
        bias_init: Callable = lambda fan_in: zeros,
        rngs: nnx.Rngs,
    ):
        self.tanh = tanh
        self.fc1 = Linear({"embed": inputs}, {"mlp": hidden}, bias=True, bias_init=bias_init(inputs), rngs=rngs)
        self.fc2 = Linear({"mlp": hidden}, {"embed": outputs}, bias=True, bias_init=bias_init(hidden), rngs=rngs)

    def __call__(self, x: Float[Array, "... D"], lora: LayerAdapters | None = None) -> Float[Array, "... E"]:
        return adapted(self.fc2, "fc2", jax.nn.gelu(adapted(self.fc1, "fc1", x, lora), approximate=self.tanh), lora)
