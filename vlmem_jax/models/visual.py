"""What the model sees, as it stands in the text, and in its first layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from vlmem_jax.decoder import Tap
from vlmem_jax.types import Patches, Views, VisualTokens


def visual_tokens(
    tokens_BMD: Float[Array, "B M D"],
    views: Views,
    deep_NBMD: Float[Array, "N B M D"] | None = None,
    kept: Patches | None = None,
) -> VisualTokens:
    """Visual tokens of all tiles of each row, with their places; the means that are to stand in the text are taken."""
    means_BMD = None
    if views.pool_BM is not None:
        means_BMD = means(tokens_BMD, views.pool_BM)
        deep_NBMD = None if deep_NBMD is None else jax.vmap(means, (0, None))(deep_NBMD, views.pool_BM)
    return VisualTokens(
        tokens_BMD, views.positions_BM, views.segments_BM, deep_NBMD, kept, means_BMD, places=views.places
    )


@jax.vmap  # a scatter whose indices name rows would gather the tokens of all devices
def means(tokens_MD: Float[Array, "M D"], pool_M: Int32[Array, "M"]) -> Float[Array, "M D"]:
    """Means of the tokens of equal `pool`, each at that place; tokens below 0 are left out."""
    place_M = jnp.where(pool_M < 0, len(pool_M), pool_M)
    sums_MD = jnp.zeros(tokens_MD.shape, jnp.float32).at[place_M].add(tokens_MD.astype(jnp.float32), mode="drop")
    counts_M = jnp.zeros(len(pool_M), jnp.float32).at[place_M].add(1.0, mode="drop")
    return (sums_MD / jnp.maximum(counts_M, 1)[:, None]).astype(tokens_MD.dtype)


def deep_tap(visual: VisualTokens, visual_index_BT: Int32[Array, "B T"]) -> Tap:
    """What the first layers add to visual tokens after them (DeepStack, arXiv 2406.04334)."""
    index_BT1, M = jnp.maximum(visual_index_BT, 0)[..., None], visual.tokens_BMD.shape[1]
    is_visual_BT1 = ((visual_index_BT >= 0) & (visual_index_BT < M))[..., None]

    def add(deep_BMD: Array, x_BTD: Array) -> Array:
        added_BTD = jnp.take_along_axis(deep_BMD, jnp.minimum(index_BT1, M - 1), axis=1)
        return x_BTD + jnp.where(is_visual_BT1, added_BTD, 0).astype(x_BTD.dtype)

    return Tap(tuple(range(len(visual.deep_NBMD))), visual.deep_NBMD, add, after=True)
