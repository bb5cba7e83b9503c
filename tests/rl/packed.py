"""What was drawn, packed as an update of GRPO has it, its parts on an axis of their own."""

import jax
import numpy as np

from vlmem_jax.rl import RLConfig
from vlmem_jax.rl.rows import pack_steps, row_shape


def packed(steps, advantages, data, vlm, at_once=1, config=None, **more):
    shape = row_shape(config or RLConfig(), data, vlm)
    parts = pack_steps(steps, advantages, data, vlm, shape, at_once, **more)
    return stacked(parts)


def stacked(parts):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(parts))
