"""A short text that tells parameters from others, computed where they lie."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from vlmem_jax.train.optimizer import scramble


def digest(params: Any) -> str:
    """Of the path, shape, dtype and every bit of each array of a tree; 32 hexadecimal digits.

    Arrays are read once, by the devices that hold them, and lie as they like: nothing is gathered, and a sum of whole
    numbers does not depend on its order.
    """
    content = hashlib.blake2b(digest_size=16)
    leaves = jax.tree.leaves_with_path(params)
    for (path, leaf), sums in zip(leaves, jax.device_get(_sums([leaf for _, leaf in leaves])), strict=True):
        content.update(repr((jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), sums.tolist())).encode())
    return content.hexdigest()


@jax.jit
def _sums(leaves: list[Array]) -> list[UInt32[Array, "2"]]:
    return [_sums_of(leaf) for leaf in leaves]


def _sums_of(x: Array) -> UInt32[Array, "2"]:
    """Two sums of hashes of value and position.

    The hash is one to one in the value, so a single value that differs changes the first sum; other differences leave
    both as they are with odds of one in 2^64. Positions are hashed axis by axis, since their number may exceed 2^32.
    """
    mixed = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    for axis, size in enumerate(x.shape):
        along = scramble(jnp.arange(size, dtype=jnp.uint32) ^ np.uint32(0x9E3779B9 * (axis + 1) % 2**32))
        mixed ^= jnp.expand_dims(along, [other for other in range(x.ndim) if other != axis])
    first = scramble(mixed)
    both, none = (first, scramble(first ^ np.uint32(0x9E3779B9))), (np.uint32(0), np.uint32(0))
    # in one reduction: two would each read the array, and one alone takes a CPU twelve times as long
    return jnp.stack(jax.lax.reduce(both, none, lambda x, y: (x[0] + y[0], x[1] + y[1]), range(x.ndim)))
