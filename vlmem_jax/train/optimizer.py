"""Optimizers and learning-rate schedules, on flat dicts of parameters: path -> array."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, BFloat16, Float32, Int32, UInt32
from optax.contrib import MuonDimensionNumbers, muon

from vlmem_jax.train.config import OptimizerConfig, StageConfig


def make_schedule(stage: StageConfig) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: a linear rise, then constant or half a cosine."""
    warmup = max(1, math.ceil(stage.warmup_fraction * stage.steps))
    after = max(1, stage.steps - warmup)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        progress = jnp.clip((step - warmup) / after, 0.0, 1.0)
        if stage.schedule == "cosine":
            shape = stage.final_fraction + (1 - stage.final_fraction) * (1 + jnp.cos(jnp.pi * progress)) / 2
        else:
            shape = 1.0
        return stage.learning_rate * jnp.minimum(1.0, (step + 1) / warmup) * shape

    return schedule


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    axes: dict[str, tuple[str, ...]],
    rates: dict[str, np.ndarray] | None = None,
) -> optax.GradientTransformation:
    """Updates from clipped gradients; `axes` gives the meaning of each parameter's last axes.

    `rates`: by what the learning rate of some parameters is multiplied, row by row. Their updates are, since gradients
    that are only scaled leave Adam's updates as they were.
    """
    optimizer = _in_float32(config, schedule, axes)
    optimizer = in_bfloat16(optimizer) if config.state_dtype == "bfloat16" else optimizer
    return optax.chain(optimizer, _multiplied(rates)) if rates else optimizer


def _multiplied(rates: dict[str, np.ndarray]) -> optax.GradientTransformation:
    def multiply(updates: dict[str, jax.Array], _: Any) -> dict[str, jax.Array]:
        return updates | {path: updates[path] * rate.astype(updates[path].dtype) for path, rate in rates.items()}

    return optax.stateless(multiply)


def _in_float32(
    config: OptimizerConfig, schedule: optax.Schedule, axes: dict[str, tuple[str, ...]]
) -> optax.GradientTransformation:
    if config.name == "adamw":
        return optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    return muon(
        schedule,
        beta=config.muon_momentum,
        eps=config.eps,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=lambda params: {path: matrix_axes(path, axes[path]) for path in params},
        consistent_rms=config.muon_rms,
    )


class HalvedState(NamedTuple):
    """State of `in_bfloat16`."""

    count: Int32[Array, ""]
    """Updates so far."""
    inner: Any
    """That of the optimizer, its fp32 arrays in bf16."""


def in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` computing in fp32, with its moments kept in bf16 by stochastic rounding between steps.

    To nearest, they would be wrong: with b2 = 0.999 a step changes the second moment by a thousandth, while bf16 values
    lie 1/256 to 1/128 apart, so it hardly ever falls (twice its value under steady noise, measured). Hence others keep
    it in fp32, or lower b2 to 0.95 (DeepSeek-V3, arXiv 2412.19437). Rounded up or down by chance, with the odds of the
    distances, a moment is right on average. At b2 = 0.999 that adds a spread of 4 % under steady noise and 9 % after
    gradients have become ten times smaller; the squares of noisy gradients themselves bring 3 to 4 %.
    """

    def init(params: Any) -> HalvedState:
        halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _is_moment(x) else x, optimizer.init(params))
        return HalvedState(jnp.int32(0), halved)

    def update(grads: Any, state: HalvedState, params: Any = None) -> tuple[Any, HalvedState]:
        full = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state.inner)
        updates, new = optimizer.update(grads, full, params)
        leaves, structure = jax.tree.flatten(new)
        halved = [
            round_by_chance(x, state.count * len(leaves) + n) if _is_moment(x) else x for n, x in enumerate(leaves)
        ]
        return updates, HalvedState(state.count + 1, structure.unflatten(halved))

    return optax.GradientTransformation(init, update)


def _is_moment(x: jax.Array) -> bool:
    return x.dtype == jnp.float32


def round_by_chance(x: Float32[Array, "..."], seed: Int32[Array, ""]) -> BFloat16[Array, "..."]:
    """To bf16, up or down with the odds of the distances; other seeds, other outcomes.

    The chance is a hash of seed and position. Bits from jax.random would be good, too, but stand in memory in full
    size; a hash becomes part of the loop that updates the moment.
    """
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    chance = scramble(position ^ scramble(seed.astype(jnp.uint32))) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + chance
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def scramble(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A permutation of 32 bits without order in it (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def matrix_axes(path: str, axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """Which axes of a parameter make its matrix, counted from the last; None where Muon does not apply.

    Muon orthogonalises the maps inside layers, each layer and each of q, k, v for itself. Token and patch embeddings,
    the head, norms, gates and biases go to AdamW.
    """
    if not path.endswith("/kernel") or path in ("decoder/head/kernel", "vision/patch/kernel"):
        return None
    inputs = 2 if axes[0] in ("heads", "kv_heads") else 1
    outputs = [n for n in range(inputs, len(axes)) if axes[n] != "qkv"]
    from_the_end = lambda n: n - len(axes)  # noqa: E731 (leading axes stack layers)
    return MuonDimensionNumbers(
        reduction_axis=tuple(map(from_the_end, range(inputs))), output_axis=tuple(map(from_the_end, outputs))
    )


def updates_done(state: Any) -> Int32[Array, ""]:
    """Updates that an optimizer has made, which is where its schedule stands; every part of its state counts them."""
    return optax.tree_utils.tree_get_all_with_path(state, "count")[0][1]


def global_norm(tree: dict[str, jax.Array]) -> jax.Array:
    """Root of the sum of all squares, in fp32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def clip(grads: dict[str, jax.Array], norm: jax.Array, limit: float) -> dict[str, jax.Array]:
    """`grads`, whose global norm is `norm`, scaled down to a norm of `limit` where it is larger."""
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, grads)
