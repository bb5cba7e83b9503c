"""One optimizer step: as one compiled program, or part by part."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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

Totals = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]
"""Losses and the other sums, divided by the denominator."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What the parts of a step add up to. It is donated to the program that adds another."""

    parts: Int32[Array, ""]
    """How many were added."""
    totals: Totals
    gradients: Flat


class Step(NamedTuple):
    """What a step does, not yet compiled: all of it in one program, which is one dispatch and of a single part keeps no
    sums; or in three, `nothing`, `accumulate` for each part and `apply`, of which none knows the number of parts."""

    whole: Callable[[TrainState, Flat, Any, Array], tuple[TrainState, dict[str, Array]]]
    """`whole(state, frozen, batch, denominator) -> (state, metrics)`; `batch` has a leading axis of parts."""
    nothing: Callable[[TrainState, Flat, Any], Sums]
    """`nothing(state, frozen, part) -> sums` of no part; shapes are enough."""
    accumulate: Callable[[Sums, TrainState, Flat, Any, Array], Sums]
    """`accumulate(sums, state, frozen, part, denominator) -> sums`"""
    apply: Callable[[TrainState, Flat, Sums, Array], tuple[TrainState, dict[str, Array]]]
    """`apply(state, frozen, sums, denominator) -> (state, metrics)`"""


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

    Parts are worked on one after the other; their gradients add up. `key()` is the stage's key, made inside the
    program; each step and part folds its number in. `gauges(params)` are scalars to report. Where the loss or the
    gradient is not finite, the state comes back as it was and `finite` is False.

    A step of denominator 0 has no weight: nothing to learn. It is `skipped`: parameters and the optimizer's state stay
    bit for bit, where momentum and weight decay would move them, and the schedule, which counts updates, stands still.
    """

    def learn(state: TrainState, frozen: Flat, part: Any, denominator: Array, number: Array) -> tuple[Totals, Flat]:
        """What a part gives."""
        part_key = jax.random.fold_in(jax.random.fold_in(key(), state.step), number)
        divisor = jnp.where(denominator > 0, denominator, 1.0)

        def of(params: Flat) -> Totals:
            total, others = loss(unflatten({**frozen, **params}), part, part_key)
            return total / divisor, jax.tree.map(lambda x: x / divisor, others)

        return jax.value_and_grad(of, has_aux=True)(state.params)

    def nothing(state: TrainState, frozen: Flat, part: Any) -> Sums:
        shapes = jax.eval_shape(learn, state, frozen, part, jnp.float32(0), jnp.int32(0))
        return Sums(jnp.int32(0), *jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

    def accumulate(sums: Sums, state: TrainState, frozen: Flat, part: Any, denominator: Array) -> Sums:
        found = learn(state, frozen, part, denominator, sums.parts)
        return Sums(sums.parts + 1, *jax.tree.map(jnp.add, (sums.totals, sums.gradients), found))

    def apply(state: TrainState, frozen: Flat, sums: Sums, denominator: Array) -> tuple[TrainState, dict[str, Array]]:
        (value, others), weighted = sums.totals, denominator > 0
        norm = global_norm(sums.gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, optimizer_state = optimizer.update(
            clip(sums.gradients, norm, clip_norm), state.optimizer, state.params
        )
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

    def step(state: TrainState, frozen: Flat, batch: Any, denominator: Array) -> tuple[TrainState, dict[str, Array]]:
        parts, first = len(jax.tree.leaves(batch)[0]), jax.tree.map(lambda x: x[0], batch)
        if parts == 1:  # nothing to add to
            sums = Sums(jnp.int32(1), *learn(state, frozen, first, denominator, jnp.int32(0)))
        else:
            each = lambda sums, part: (accumulate(sums, state, frozen, part, denominator), None)  # noqa: E731
            sums, _ = jax.lax.scan(each, nothing(state, frozen, first), batch)
        return apply(state, frozen, sums, denominator)

    return Step(step, nothing, accumulate, apply)


def state_shardings(state: TrainState, params: Flat, otherwise: Any) -> TrainState:
    """Shardings of `state` (shapes are enough): optimizer moments lie as their parameters do, the rest `otherwise`."""

    def place(path: tuple, leaf: Any) -> Any:
        name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)
        return params[name] if name in params and leaf.ndim else otherwise

    return jax.tree.map_with_path(place, state)
