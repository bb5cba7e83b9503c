"""Feed-forward blocks."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.nn.linear import Linear


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.gate = Linear({"embed": width}, {"mlp": hidden}, bias=bias, rngs=rngs)
        self.up = Linear({"embed": width}, {"mlp": hidden}, bias=bias, rngs=rngs)
        self.down = Linear({"mlp": hidden}, {"embed": width}, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class GeluMLP(nnx.Module):
    """fc2(gelu(fc1 x)) with biases and the exact (erf) GELU."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear({"embed": inputs}, {"mlp": hidden}, bias=True, rngs=rngs)
        self.fc2 = Linear({"mlp": hidden}, {"embed": outputs}, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
