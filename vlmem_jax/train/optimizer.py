"""Optimizers and learning-rate schedules, on flat dicts of parameters: path -> array."""

import math

import jax
import jax.numpy as jnp
import optax
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
    config: OptimizerConfig, schedule: optax.Schedule, axes: dict[str, tuple[str, ...]]
) -> optax.GradientTransformation:
    """Updates from clipped gradients; `axes` gives the meaning of each parameter's last axes."""
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


def global_norm(tree: dict[str, jax.Array]) -> jax.Array:
    """Root of the sum of all squares, in fp32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def clip(grads: dict[str, jax.Array], norm: jax.Array, limit: float) -> dict[str, jax.Array]:
    """`grads`, whose global norm is `norm`, scaled down to a norm of `limit` where it is larger."""
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * scale, grads)
