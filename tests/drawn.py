"""Parameters of tiny models, drawn on the host: for tests to which it does not matter how training starts."""

import jax
import jax.numpy as jnp
import numpy as np

from vlmem_jax.models import VLM
from vlmem_jax.trees import flatten, unflatten

TABLES = ("embed", "position_embedding", "special_in", "special_out", "q_init", "pos_emb", "m_init")


def params(vlm: VLM, seed: int = 0) -> dict:
    """Parameters like those of `vlm.fresh`, in about the same sizes; no program is compiled to draw them."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.split("/")[-1]
        if name in ("scale", "gain", "ls1", "ls2"):
            return np.ones(shape)
        if name in ("bias", "attn_gate", "mlp_gate", "b"):
            return np.zeros(shape)
        if name == "invoke_logit_bias":
            return np.full(shape, vlm.config.memory.invoke_bias)
        return rng.normal(0, 0.02 if name in TABLES else 0.08, shape)

    return unflatten({path: jnp.asarray(draw(path, x.shape), x.dtype) for path, x in flatten(vlm.abstract()).items()})


def random_params(vlm: VLM, seed: int = 0) -> dict:
    """Parameters of standard deviation 0.1, gates and biases too, as arrays of the host; scales of norms are 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        values = np.ones(x.shape) if path[-1].key == "scale" else rng.normal(0, 0.1, x.shape)
        return values.astype(x.dtype)

    return jax.tree.map_with_path(leaf, vlm.abstract())
