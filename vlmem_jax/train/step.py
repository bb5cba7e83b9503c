"""One optimizer step as one compiled program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from vlmem_jax.train.optimizer import clip, global_norm, updates_done
from vlmem_jax.trees import Flat, unflatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes. It is donated: the arrays of the old state are gone once the step has been started."""

    step: Int32[Array, ""]
    """Steps of the stage done so far, those without weight, which change nothing else, among them."""
    params: Flat
    """Trained parameters, fp32."""
    optimizer: Any


Loss = Callable[[dict, Any, Array], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
"""`loss(params, rows, key) -> (sum, others)`: a sum over the batch, and more such sums by name.

All are divided by the step's denominator, where that is not 0. `params` is the nested dict of the whole model; `key`
is for dropping.
"""

Step = Callable[[TrainState, Flat, Any, Array], tuple[TrainState, dict[str, Array]]]
"""`step(state, frozen, batch, denominator) -> (state, metrics)`."""


def init_state(params: Flat, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    clip_norm: float,
    key: Callable[[], Array],
    gauges: Callable[[dict], dict[str, Array]],
) -> Step:
    """The step, not yet compiled.

    Every leaf of `batch` has a leading axis of parts, worked on one after the other; their gradients add up. `key()` is
    the stage's key, made inside the program; each step and part folds its number in. `gauges(params)` are scalars to
    report. Where the loss or the gradient is not finite, the state comes back as it was and `finite` is False.

    A step of denominator 0 has no weight: nothing to learn. It is `skipped`: parameters and the optimizer's state stay
    bit for bit, where momentum and weight decay would move them, and the schedule, which counts updates, stands still.
    """

    def step(state: TrainState, frozen: Flat, batch: Any, denominator: Array):
        step_key = jax.random.fold_in(key(), state.step)
        weighted = denominator > 0
        divisor = jnp.where(weighted, denominator, 1.0)

        def part(params: Flat, rows: Any, index: Array):
            total, others = loss(unflatten({**frozen, **params}), rows, jax.random.fold_in(step_key, index))
            return total / divisor, jax.tree.map(lambda x: x / divisor, others)

        value_and_grad = jax.value_and_grad(part, has_aux=True)

        parts = jax.tree.leaves(batch)[0].shape[0]
        xs = batch, jnp.arange(parts)
        first = jax.tree.map(lambda x: x[0], xs)
        if parts == 1:
            (value, others), grads = value_and_grad(state.params, *first)
        else:
            shapes = jax.eval_shape(value_and_grad, state.params, *first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            add = lambda sums, xs: (jax.tree.map(jnp.add, sums, value_and_grad(state.params, *xs)), None)  # noqa: E731
            ((value, others), grads), _ = jax.lax.scan(add, zeros, xs)

        norm = global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, optimizer_state = optimizer.update(clip(grads, norm, clip_norm), state.optimizer, state.params)
        changed = optax.apply_updates(state.params, updates), optimizer_state
        kept = state.params, state.optimizer
        kept = jax.tree.map(lambda new, old: jnp.where(finite & weighted, new, old), changed, kept)
        new = TrainState(jnp.where(finite, state.step + 1, state.step), *kept)
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": schedule(updates_done(state.optimizer)),
            "finite": finite,
            "skipped": ~weighted,
            **others,
            **gauges(unflatten({**frozen, **state.params})),
        }
        return new, metrics

    return step


def state_shardings(state: TrainState, params: Flat, otherwise: Any) -> TrainState:
    """Shardings of `state` (shapes are enough): optimizer moments lie as their parameters do, the rest `otherwise`."""

    def place(path: tuple, leaf: Any) -> Any:
        name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)
        return params[name] if name in params and leaf.ndim else otherwise

    return jax.tree.map_with_path(place, state)
