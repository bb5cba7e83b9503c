"""Short ways to call the model where a test asks for scores, not states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.types import IGNORED, Sample, Text


@functools.cache
def _prefill(vlm):
    return jax.jit(vlm.prefill, static_argnums=2)


def read(vlm, params, samples, room=64):
    """Scores after prompts, each in a row, and the state, with room for so many tokens more."""
    batch = pad_prompts(samples, len(samples), vlm.tile)
    return _prefill(vlm)(params, batch, batch.text.tokens_BT.shape[1] + room)


def written(sample: Sample, ids) -> Sample:
    """The sample with these tokens behind it."""
    count, positions_T = len(ids), sample.positions_T
    after = (positions_T.max() + 1 + np.arange(count)).reshape(-1, *(1,) * (positions_T.ndim - 1))
    return dataclasses.replace(
        sample,
        tokens_T=np.append(sample.tokens_T, np.array(ids, np.int32)),
        labels_T=np.append(sample.labels_T, np.full(count, IGNORED, np.int32)),
        positions_T=np.append(positions_T, np.broadcast_to(after, (count, *positions_T.shape[1:])), 0).astype(np.int32),
        visual_index_T=np.append(sample.visual_index_T, np.full(count, -1, np.int32)),
    )


def extended(vlm, params, state, tokens_BT, counts_B, latents_BND=None, latent_counts_B=None):
    """Scores after the first `counts_B` tokens of each row, the first `latent_counts_B` of which are latent."""
    text = Text.first(tokens_BT, counts_B)
    if latents_BND is not None:
        index_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        text = dataclasses.replace(text, visual_index_BT=jnp.where(index_T < latent_counts_B[:, None], index_T, -1))
    hidden_BD, state = vlm.extend(params, state, text, latents_BND=latents_BND)
    return vlm.score(params, hidden_BD), state


def embeddings(vlm, params, batch):
    """The rows that go into the decoder where a batch is read."""
    modules, visual = vlm._merge(params), vlm.see(params, batch.views)
    latents = None if batch.text.formation is None else vlm._formed(modules, batch.text, visual, None)
    return vlm._spliced(modules, batch.text, visual, latents)
