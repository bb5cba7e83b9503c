"""Rotary frequencies of a decoder, which those of long samples may stretch (dynamic NTK scaling)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from vlmem_jax.decoder.decoder import DecoderConfig
from vlmem_jax.nn.rope import Rotation, dynamic_theta, frequencies, rotation


def tables_of(
    config: DecoderConfig, positions_BT: Int32[Array, "B T"] | Int32[Array, "B T A"], segments_BT: Int32[Array, "B T"]
) -> Rotation:
    """The tables that packed rows are turned by."""
    return rotation(positions_BT, of_rows(config, segments_BT), config.rope_axes)


def of_rows(config: DecoderConfig, segments_BT: Int32[Array, "B T"]) -> Float[Array, "B #T R"]:
    """Of each token of packed rows: those of its sample's length, whatever else is there."""
    B, T = segments_BT.shape
    if not _stretches(config, T):
        return of_lengths(config, jnp.zeros((B, 1), jnp.int32), T)
    sizes_BT = jax.vmap(lambda segments_T: jnp.bincount(segments_T, length=T + 1)[segments_T])(segments_BT)
    return of_lengths(config, jnp.where(segments_BT > 0, sizes_BT, 0), T)


def of_lengths(config: DecoderConfig, lengths_BT: Int32[Array, "B T"], longest: int) -> Float[Array, "B T R"]:
    """Of samples of these lengths, none more than `longest`."""
    c = config
    if not _stretches(c, longest):
        return jnp.broadcast_to(frequencies(c.head_dim, c.rope_theta), (*lengths_BT.shape, c.head_dim // 2))
    theta_BT = dynamic_theta(lengths_BT, c.rope_theta, c.ntk_factor, c.max_positions, c.head_dim)
    return frequencies(c.head_dim, theta_BT)


def _stretches(config: DecoderConfig, length: int) -> bool:
    """Whether frequencies change with the length of samples of up to `length` tokens."""
    return config.ntk_factor > 0 and length > config.max_positions
