"""Steps of episodes as packed rows: what one update of GRPO computes on."""

import dataclasses
import math
from collections.abc import Collection, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float32

from vlmem_jax.data import DataConfig
from vlmem_jax.data.plan import fill_rows
from vlmem_jax.data.rows import pack_row
from vlmem_jax.generate import Invocation, InvocationConfig
from vlmem_jax.models import VLM
from vlmem_jax.models.flops import formation_flops, train_flops
from vlmem_jax.rl.episodes import Step
from vlmem_jax.runtime.shapes import bucket
from vlmem_jax.types import Batch, FormationInputs, TileShape

SHORTEST_ROW = 64
"""Tokens; rows are 64, 80, 96, 112, 128, 160, ... long."""

FEWEST_STATES = 64
"""That there is room for, of what a memory was formed from."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch whose targets are drawn tokens, and what is known of each; zeros where `batch.text.weights_BT` is 0."""

    batch: Batch
    old_logp_BT: Float32[Array, "... B T"]
    """Log-probability of the target when it was drawn."""
    ref_logp_BT: Float32[Array, "... B T"]
    """The same by the reference."""
    advantage_BT: Float32[Array, "... B T"]
    beta_B: Float32[Array, "... B"]
    """Weight of the KL penalty."""


def pack_steps(
    steps: Sequence[Step],
    advantages: Sequence[float],
    data: DataConfig,
    vlm: VLM,
    at_once: int,
    beta: float = 0.0,
    split: int = 1,
    invocation: InvocationConfig = InvocationConfig(),
    tile: TileShape | None = None,
) -> Rows:
    """Numpy arrays with leading axes [parts, `at_once`], the longest steps first.

    Rows are as long as the longest step, rounded up to one of few lengths and a multiple of `split`, and the others
    fill what is left; the number of parts is rounded up, too, with empty rows. So the shapes are few, whatever was
    drawn. `ref_logp_BT` is left zero. `data.loss_weight` weights the targets of each step, and its own weight does.
    What memories were formed from goes along, but for `invocation` under which there are none. `tile`: that of the
    processor of the prompts, by default the model's. Raises ValueError for a step that no row has room for.
    """
    tile, speech = tile or vlm.tile, vlm.speech if vlm.speech and any(invocation.heeded(vlm.speech)) else None
    samples = [step.sample() for step in steps]
    tokens, tiles = [len(s.tokens_T) for s in samples], [len(s.pixels_ISSc) for s in samples]
    for sample, count, shown in zip(samples, tokens, tiles, strict=True):
        if count > data.pack_tokens or shown > data.pack_tiles:
            raise ValueError(
                f"a row must hold a step and what it stands behind, but has {data.pack_tokens} tokens and "
                f"{data.pack_tiles} tiles for {count} and {shown} (sample {sample.name}); raise data.pack_tokens or "
                "data.pack_tiles, or play fewer steps"
            )
    T, I = row_sizes(max(tokens, default=1), max(tiles, default=0), data, split)
    order = sorted(range(len(samples)), key=lambda n: (-tokens[n], n))
    sized = [((n, 0), tokens[n], tiles[n]) for n in order]
    rows = [[n for n, _ in keys] for keys in fill_rows(sized, T, max(I, 1), open_packs=len(samples) + 1)]
    count = bucket(max(-(-len(rows) // at_once), 1), steps=4) * at_once
    rows += [[]] * (count - len(rows))

    def extras(row: list[int]) -> dict[str, np.ndarray]:
        arrays = {name: np.zeros(T, np.float32) for name in ("old_logp_BT", "ref_logp_BT", "advantage_BT")}
        end = 0
        for n in row:
            drawn, start, end = steps[n], end + len(steps[n].prompt.tokens_T), end + tokens[n]
            known = start - 1 + drawn.index_T[drawn.loss_T]  # position t holds what is known of token t + 1
            arrays["old_logp_BT"][known] = drawn.logp_T[drawn.loss_T]
            arrays["advantage_BT"][known] = advantages[n]
        return arrays | {"beta_B": np.float32(beta)}

    spoken = [[memory for n in row for memory in steps[n].invocations] for row in rows]
    states = max((len(memory.states_LD) for row in spoken for memory in row), default=1)
    J, L = memory_sizes(max(map(len, spoken)), states)
    packed = []
    for row, memories in zip(rows, spoken, strict=True):
        batch = pack_row([samples[n] for n in row], data, tile, T, I)
        for segment, n in enumerate(row, 1):
            batch.text.weights_BT[batch.text.segments_BT == segment] *= steps[n].weight
        if speech:
            end, first = 0, 0
            for n in row:
                start, end = end + len(steps[n].prompt.tokens_T), end + tokens[n]
                for j, memory in enumerate(steps[n].invocations, first):
                    after = start + steps[n].index_T[memory.place]
                    latent_N = I * tile.tokens + j * speech.latents + np.arange(memory.latents)
                    batch.text.visual_index_BT[after - memory.latents : after] = latent_N
                first += len(steps[n].invocations)
            batch = batch.replace(formation=_formation(memories, J, L, vlm))
        packed.append(Rows(batch, **extras(row)))
    return jax.tree.map(
        lambda *leaves: np.stack(leaves).reshape(count // at_once, at_once, *np.shape(leaves[0])), *packed
    )


def flops_of(steps: Sequence[Step], batch: Batch, vlm: VLM, trained: Collection[str]) -> dict[str, int]:
    """`flops` of steps and `shape_flops` of the `batch` that they were packed into, for `StepInput.counts`."""
    config = vlm.config
    sizes = [step.size for step in steps]
    states = [len(memory.states_LD) for step in steps for memory in step.invocations]
    (*leading, T), I = batch.text.tokens_BT.shape, batch.views.pixels_BISSc.shape[-4]
    rows = math.prod(leading)
    useful = train_flops(config, sizes, trained) + sum(formation_flops(config, L, trained) for L in states)
    shapes = train_flops(config, [(T, I)] * rows, trained)
    if batch.text.formation is not None:
        J, L = batch.text.formation.states_BJLD.shape[-3:-1]
        shapes += rows * J * formation_flops(config, L, trained)
    return {"flops": useful, "shape_flops": shapes}


def row_sizes(tokens: int, tiles: int, data: DataConfig, split: int = 1) -> tuple[int, int]:
    """Token and tile slots of rows whose longest step has `tokens`, and none more than `tiles`."""
    T = _multiple(min(bucket(tokens, SHORTEST_ROW, steps=4), data.pack_tokens), split)
    # as many tiles as their share of a whole row, and enough for any one step
    I = max(data.pack_tiles * T // data.pack_tokens, bucket(tiles), 1) if tiles else 0
    return T, _multiple(min(I, data.pack_tiles), split)


def memory_sizes(memories: int, states: int) -> tuple[int, int]:
    """J and L of rows with at most so many memories, formed from at most so many states."""
    return bucket(max(memories, 1)), bucket(states, FEWEST_STATES, steps=4)


def _formation(memories: Sequence[Invocation], J: int, L: int, vlm: VLM) -> FormationInputs:
    """Of one row."""
    states_JLD = np.zeros((J, L, vlm.config.decoder.width), vlm.dtype)
    lengths_J, kinds_J = np.zeros(J, np.int32), np.full(J, -1, np.int32)
    for j, memory in enumerate(memories):
        lengths_J[j], kinds_J[j] = len(memory.states_LD), memory.kind
        states_JLD[j, : lengths_J[j]] = memory.states_LD
    return FormationInputs(states_JLD, lengths_J, kinds_J)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
