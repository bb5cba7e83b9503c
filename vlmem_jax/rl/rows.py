"""Trajectories as packed rows: what one step of GRPO computes on."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float32

from vlmem_jax.data import DataConfig
from vlmem_jax.data.plan import pack
from vlmem_jax.data.rows import pack_row
from vlmem_jax.generate.prompts import bucket
from vlmem_jax.rl.rollout import Trajectory
from vlmem_jax.types import Batch, TileShape

SHORTEST_ROW = 64
"""Tokens; rows are 64, 80, 96, 112, 128, 160, ... long."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch whose targets are drawn tokens, and what is known of each; zeros where `batch.weights_BT` is 0."""

    batch: Batch
    old_logp_BT: Float32[Array, "... B T"]
    """Log-probability of the target when it was drawn."""
    ref_logp_BT: Float32[Array, "... B T"]
    """The same by the reference."""
    advantage_BT: Float32[Array, "... B T"]
    beta_B: Float32[Array, "... B"]
    """Weight of the KL penalty."""


def pack_trajectories(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float],
    data: DataConfig,
    tile: TileShape,
    at_once: int,
    beta: float = 0.0,
    split: int = 1,
) -> Rows:
    """Numpy arrays with leading axes [parts, `at_once`], the longest trajectories first.

    Rows are as long as the longest trajectory, rounded up to one of few lengths and a multiple of `split`, and the
    others fill what is left; the number of parts is rounded up, too, with empty rows. So the shapes are few, whatever
    was drawn. `ref_logp_BT` is left zero. `data.loss_weight` weights the targets of each trajectory.
    """
    samples = [trajectory.sample() for trajectory in trajectories]
    tokens, tiles = [len(s.tokens_T) for s in samples], [len(s.pixels_ISSc) for s in samples]
    T = _multiple(min(bucket(max(tokens, default=1), SHORTEST_ROW, steps=4), data.pack_tokens), split)
    # as many tiles as their share of a whole row, and enough for any one trajectory
    I = max(data.pack_tiles * T // data.pack_tokens, bucket(max(tiles)), 1) if any(tiles) else 0
    I = _multiple(min(I, data.pack_tiles), split)
    order = sorted(range(len(samples)), key=lambda n: (-tokens[n], n))
    sized = [((n, 0), tokens[n], tiles[n]) for n in order]
    rows = [[n for n, _ in keys] for keys in pack(sized, T, max(I, 1), open_packs=len(samples) + 1)]
    count = bucket(max(-(-len(rows) // at_once), 1), steps=4) * at_once
    rows += [[]] * (count - len(rows))

    def extras(row: list[int]) -> dict[str, np.ndarray]:
        arrays = {name: np.zeros(T, np.float32) for name in ("old_logp_BT", "ref_logp_BT", "advantage_BT")}
        end = 0
        for n in row:
            end += tokens[n]
            drawn = trajectories[n]
            span = slice(end - 1 - len(drawn.tokens_T), end - 1)  # position t holds what is known of token t + 1
            arrays["old_logp_BT"][span] = np.where(drawn.loss_T, drawn.logp_T, 0)
            arrays["advantage_BT"][span] = np.where(drawn.loss_T, advantages[n], 0)
        return arrays | {"beta_B": np.float32(beta)}

    packed = [Rows(pack_row([samples[n] for n in row], data, tile, T, I), **extras(row)) for row in rows]
    return jax.tree.map(
        lambda *leaves: np.stack(leaves).reshape(count // at_once, at_once, *np.shape(leaves[0])), *packed
    )


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
