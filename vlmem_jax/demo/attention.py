"""What the last token of a prompt attends to, through the model's public functions alone.

A single query token is appended to a prompt that has been read. Its attention output is sum_m a_m v_m, so the gradient
of any scalar by the value v_m is a_m times a vector that is the same for every m: normalised, the lengths of these
gradients are the attention weights themselves.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vlmem_jax.generate import LoadedModel
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.runtime.shapes import bucket
from vlmem_jax.runtime.sharding import batch_shards
from vlmem_jax.types import Sample, Text


class Attention(NamedTuple):
    """Attention weights of one query token over the M visual tokens of its prompt."""

    memory_LHM: Float[np.ndarray, "L H M"] | None
    """By memory block and head; the weights of a head add up to 1. None without memory."""
    context_LHM: Float[np.ndarray, "L2 H2 M"]
    """Weights by decoder layer and head, as shares of those of all tokens before the query; 0 for what does not stand
    in the sequence."""


def last_token(model: LoadedModel, sample: Sample) -> Attention:
    """Attention of the last token of a prompt, whose answer it begins."""
    length = len(sample.tokens_T) - 1
    before = {key: getattr(sample, key)[:length] for key in ("tokens_T", "labels_T", "positions_T", "visual_index_T")}
    generator, rows = model.generator(), batch_shards(model.mesh)
    batch = pad_prompts([dataclasses.replace(sample, **before)], rows, generator.tile)
    token_BT = jnp.full((rows, 1), sample.tokens_T[length])

    @jax.jit
    def weights(params, batch):
        _, state = model.vlm.prefill(params, batch, bucket(length + 1, 64))

        def score(context_v, memory_v):
            changed = dataclasses.replace(state, cache=dataclasses.replace(state.cache, v_LBKSC=context_v))
            if memory_v is not None:
                changed = dataclasses.replace(changed, memory=dataclasses.replace(state.memory, v_LBMHC=memory_v))
            hidden_BD, _ = model.vlm.extend(params, changed, Text(token_BT, jnp.ones((rows, 1), jnp.int32)))
            return model.vlm.score(params, hidden_BD)[0].max()

        memory_v = None if state.memory is None else state.memory.v_LBMHC
        context, memory = jax.grad(score, argnums=(0, 1))(state.cache.v_LBKSC, memory_v)
        return _shares(context.swapaxes(2, 3)), None if memory is None else _shares(memory)

    with generator.context():
        context_LHS, memory_LHM = jax.device_get(weights(model.params, generator.put(batch, rows=True)))
    index_S, slots = before["visual_index_T"], len(sample.visual_positions_M)
    stands_S = np.flatnonzero(index_S >= 0)
    context_LHM = np.zeros((*context_LHS.shape[:2], slots), context_LHS.dtype)
    context_LHM[..., index_S[stands_S]] = context_LHS[..., stands_S]
    return Attention(None if memory_LHM is None else memory_LHM[..., :slots], context_LHM)


def _shares(gradient_LBSHC: jax.Array) -> jax.Array:
    """[L, H, S]: lengths of the gradients of the first row, as shares of their sum."""
    length_LHS = jnp.linalg.norm(gradient_LBSHC[:, 0].astype(jnp.float32), axis=-1).swapaxes(-1, -2)
    return length_LHS / jnp.maximum(length_LHS.sum(-1, keepdims=True), 1e-30)
