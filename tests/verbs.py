"""Short ways to call the model where a test asks for scores, not states."""

import dataclasses

import jax.numpy as jnp

from vlmem_jax.types import Text


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
