"""Steps of episodes as packed rows: what one update of GRPO computes on."""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float32

from vlmem_jax.data import DataConfig
from vlmem_jax.generate import Invocation
from vlmem_jax.models import VLM
from vlmem_jax.models.flops import formation_flops, train_flops
from vlmem_jax.rl.config import RLConfig
from vlmem_jax.rl.episodes import Step
from vlmem_jax.rl.groups import Group, pack_groups
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
    ref_labels_BTK: Float32[Array, "... B T K"] | None = None
    """Log-probability of each label by the reference, where KL is computed of all."""


class RowShape(NamedTuple):
    """What a row of a stage has room for, whatever was drawn: all parts of all updates have the same shapes."""

    tokens: int
    """T."""
    tiles: int
    """I."""
    memories: int = 0
    """J: memories that are formed in the row; 0 where none can be."""
    states: int = 0
    """L: states that one of them is formed from."""

    @classmethod
    def of(
        cls, data: DataConfig, vlm: VLM, answer: int, memories: int = 0, tile: TileShape | None = None
    ) -> "RowShape":
        """For answers in which up to `answer` tokens are chosen, and so many `memories` a row; `tile` is that of the
        processor, by default the model's."""
        if not memories:
            return cls(data.pack_tokens, data.pack_tiles)
        around = 2  # tokens before and after an image, which may be heard with it
        visual = min(data.pack_tiles * (tile or vlm.tile).tokens + around, vlm.speech.max_visual)
        return cls(data.pack_tokens, data.pack_tiles, memories, visual + min(answer, vlm.speech.max_states))


def row_shape(config: RLConfig, data: DataConfig, model: VLM, tile: TileShape | None = None) -> RowShape:
    """What the rows of a stage's updates have room for."""
    memories = config.invocation.budget(model.speech) if model.speech else 0
    if memories and config.row_memories:
        memories = config.row_memories
    return RowShape.of(data, model, config.max_new_tokens, memories, tile)


def pack_steps(
    steps: Sequence[Step],
    advantages: Sequence[float],
    data: DataConfig,
    vlm: VLM,
    shape: RowShape,
    at_once: int,
    beta: float = 0.0,
    tile: TileShape | None = None,
) -> list[Rows]:
    """Numpy arrays of `at_once` rows each: as many parts of the same shape as the steps fill, empty rows in the last;
    one for no step.

    Steps behind the same prompt share it, see `pack_groups`, in as many rows as they need. `ref_logp_BT` is left zero.
    `data.loss_weight` weights the targets of each step, and its own weight does. What memories were formed from goes
    along. `tile`: that of the processor of the prompts, by default the model's. Raises ValueError for a step that no
    row has room for.
    """
    tile = tile or vlm.tile
    for step in steps:
        _check_fits(step, shape)
    rows = _fill([piece for group in _grouped(steps) for piece in _cut(steps, group, shape)], steps, shape)
    count = max(-(-len(rows) // at_once), 1) * at_once
    packed = [_row(row, steps, advantages, data, vlm, shape, beta, tile) for row in rows + [[]] * (count - len(rows))]
    parts = [packed[first : first + at_once] for first in range(0, count, at_once)]
    return [jax.tree.map(lambda *leaves: np.stack(leaves), *part) for part in parts]


def _row(
    pieces: Sequence[Sequence[int]],
    steps: Sequence[Step],
    advantages: Sequence[float],
    data: DataConfig,
    vlm: VLM,
    shape: RowShape,
    beta: float,
    tile: TileShape,
) -> Rows:
    """Of pieces of groups, each the numbers of its steps."""
    groups = [Group(steps[piece[0]].prompt, [steps[n].sample() for n in piece]) for piece in pieces]
    batch, places = pack_groups(groups, data, tile, shape.tokens, shape.tiles)
    arrays = {name: np.zeros(shape.tokens, np.float32) for name in ("old_logp_BT", "ref_logp_BT", "advantage_BT")}
    memories: list[Invocation] = []
    for n, slots in zip(itertools.chain(*pieces), places, strict=True):
        step = steps[n]
        known = slots.start + step.index_T[step.loss_T]
        arrays["old_logp_BT"][known] = step.logp_T[step.loss_T]
        arrays["advantage_BT"][known] = advantages[n]
        batch.text.weights_BT[slots] *= step.weight
        for memory in step.invocations:
            after = slots.start + 1 + step.index_T[memory.place]
            first = shape.tiles * tile.tokens + len(memories) * vlm.speech.latents
            batch.text.visual_index_BT[after - memory.latents : after] = first + np.arange(memory.latents)
            memories.append(memory)
    if shape.memories:
        batch = batch.replace(formation=_formation(memories, shape, vlm))
    return Rows(batch, **arrays, beta_B=np.float32(beta))


def _check_fits(step: Step, shape: RowShape) -> None:
    """Raises ValueError where no row has room for a step."""
    tokens, tiles = step.size
    heard = max((len(memory.states_LD) for memory in step.invocations), default=0)
    where = f" (sample {step.prompt.name})"
    if tokens > shape.tokens or tiles > shape.tiles:
        raise ValueError(
            f"a row must hold a step and what it stands behind, but has {shape.tokens} tokens and {shape.tiles} tiles "
            f"for {tokens} and {tiles}{where}; raise data.pack_tokens or data.pack_tiles, or play fewer steps"
        )
    if len(step.invocations) > shape.memories or heard > shape.states:
        raise ValueError(
            f"a row must hold the memories of a step, but has room for {shape.memories} of {shape.states} states and "
            f"this one has {len(step.invocations)} of up to {heard}{where}; raise task.row_memories or data.pack_tiles"
        )


def _grouped(steps: Sequence[Step]) -> list[list[int]]:
    """The numbers of steps behind the same prompt, the longest first."""
    groups: dict[tuple, list[int]] = {}
    for n, step in enumerate(steps):
        # by what tells prompts of a run apart, also when they are read again: not by which object it is
        shown = step.prompt.name or id(step.prompt.pixels_ISSc)
        groups.setdefault((shown, step.prompt.tokens_T.tobytes()), []).append(n)
    return [sorted(group, key=lambda n: -steps[n].size[0]) for group in groups.values()]


def _size(piece: Sequence[int], steps: Sequence[Step]) -> tuple[int, int, int]:
    """Tokens, tiles and memories of steps that share their prompt."""
    prefix = len(steps[piece[0]].prompt.tokens_T) - 1
    tokens = prefix + sum(steps[n].size[0] - 1 - prefix for n in piece)
    return tokens, steps[piece[0]].size[1], sum(len(steps[n].invocations) for n in piece)


def _cut(steps: Sequence[Step], group: Sequence[int], shape: RowShape) -> list[list[int]]:
    """A group in pieces that rows have room for."""
    pieces: list[list[int]] = [[]]
    for n in group:
        tokens, _, memories = _size([*pieces[-1], n], steps)
        if tokens > shape.tokens or memories > shape.memories:
            pieces.append([])
        pieces[-1].append(n)
    return pieces


def _fill(pieces: Sequence[list[int]], steps: Sequence[Step], shape: RowShape) -> list[list[list[int]]]:
    """Pieces in rows: each, the longest first, in the first row that has room for it."""
    rows: list[tuple[list[list[int]], np.ndarray]] = []
    room = np.array([shape.tokens, shape.tiles, shape.memories])
    sized = sorted(((np.array(_size(piece, steps)), piece) for piece in pieces), key=lambda one: -one[0][0])
    for size, piece in sized:
        fitting = next((n for n, (_, used) in enumerate(rows) if (used + size <= room).all()), None)
        if fitting is None:
            rows.append(([], np.zeros(3, int)))
            fitting = -1
        rows[fitting][0].append(piece)
        rows[fitting][1][:] += size
    return [row for row, _ in rows]


def counts_of(steps: Sequence[Step], rows: int, shape: RowShape, vlm: VLM, trained: Collection[str]) -> dict[str, int]:
    """For `StepInput.counts`, of steps that were packed into so many rows. Prompts that are shared are counted once."""
    config, groups = vlm.config, _grouped(steps)
    sizes = [_size(group, steps) for group in groups]
    prompts = [(len(steps[group[0]].prompt.tokens_T) - 1, steps[group[0]].size[1]) for group in groups]
    again = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group[1:]]
    states = [len(memory.states_LD) for step in steps for memory in step.invocations]
    useful = train_flops(config, [step.size for step in steps], trained) - train_flops(config, again, trained)
    room = train_flops(config, [(shape.tokens, shape.tiles)] * rows, trained)
    if shape.memories:
        room += rows * shape.memories * formation_flops(config, shape.states, trained)
    return {
        "tokens": sum(tokens for tokens, *_ in sizes),
        "tiles": sum(tiles for _, tiles, _ in sizes),
        "slots": rows * shape.tokens,
        "flops": useful + sum(formation_flops(config, L, trained) for L in states),
        "shape_flops": room,
    }


def row_sizes(tokens: int, tiles: int, data: DataConfig, split: int = 1) -> tuple[int, int]:
    """Token and tile slots of rows whose longest step has `tokens`, and none more than `tiles`."""
    T = _multiple(min(bucket(tokens, SHORTEST_ROW, steps=4), data.pack_tokens), split)
    # as many tiles as their share of a whole row, and enough for any one step
    I = max(data.pack_tiles * T // data.pack_tokens, bucket(tiles), 1) if tiles else 0
    return T, _multiple(min(I, data.pack_tiles), split)


def memory_sizes(memories: int, states: int) -> tuple[int, int]:
    """J and L of rows with at most so many memories, formed from at most so many states."""
    return bucket(max(memories, 1)), bucket(states, FEWEST_STATES, steps=4)


def _formation(memories: Sequence[Invocation], shape: RowShape, vlm: VLM) -> FormationInputs:
    """Of one row."""
    J = shape.memories
    states_JLD = np.zeros((J, shape.states, vlm.config.decoder.width), vlm.dtype)
    lengths_J, kinds_J = np.zeros(J, np.int32), np.full(J, -1, np.int32)
    for j, memory in enumerate(memories):
        lengths_J[j], kinds_J[j] = len(memory.states_LD), memory.kind
        states_JLD[j, : lengths_J[j]] = memory.states_LD
    return FormationInputs(states_JLD, lengths_J, kinds_J)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
