"""How many floating-point operations a model needs, counted from its sizes.

A sample is given by its tokens and tiles; both may be arrays, of many samples.
"""

from collections.abc import Collection, Iterable

import numpy as np

from vlmem_jax.memory import memory_of
from vlmem_jax.memory.base import Count
from vlmem_jax.models.config import ModelConfig

PARTS = "decoder", "vision"
"""That may have adapters."""


def train_flops(config: ModelConfig, samples: Iterable[tuple[int, int]], trained: Collection[str]) -> int:
    """FLOPs of one training step on samples of (tokens, tiles): a pack costs what its samples cost alone, and padding
    nothing. With whole rows as samples, it is what their shapes have room for.

    Counts what the step needs, not what it recomputes: 2 per multiply-add of matrix products alone; causal attention at
    half of the pairs of a sample, attention of its tokens to its memory, and within a tile, at all of them. The
    backward pass costs a part as much again for the gradient of its input, where something before it (or in it) is
    trained, and as much again for that of its weights, where they are. `trained` are parameter paths.
    """
    tokens, tiles = np.array(list(samples), np.int64).reshape(-1, 2).T
    trains = {part: any(path.startswith(part) for path in trained) for part in ("vision", "projector", "memory")}
    scores = "decoder/embed" if config.decoder.tied else "decoder/head/kernel"
    head = scores in trained
    body = any(path.startswith("decoder") and path != scores for path in trained)
    # adapters are little work themselves, but gradients must reach them
    adapts = {part: any(f"/{part}/" in path for path in trained if path.startswith("adapters/")) for part in PARTS}
    reaches_text = body or any(trains.values()) or any(adapts.values())
    reaches_tiles = trains["vision"] or adapts["vision"]

    def step(weights: Count, attention: Count, weights_trained: bool, input_gradient: bool) -> Count:
        return weights * (1 + weights_trained + input_gradient) + attention * (1 + 2 * input_gradient)

    projector = config.vision.projector_flops(config.decoder.width)
    each = step(*config.decoder.flops(tokens), body, reaches_text)
    each += step(2 * tokens * config.decoder.width * config.decoder.vocab, 0, head, reaches_text)
    each += tiles * step(*config.vision.flops, trains["vision"], reaches_tiles)
    each += tiles * step(projector, 0, trains["projector"], trains["projector"] or reaches_tiles)
    each += step(*memory_flops(config, tokens, tiles), trains["memory"], reaches_text)
    return sum(each.tolist())


def prefill_flops(config: ModelConfig, rows: int, tokens: int, tiles: int) -> int:
    """FLOPs of reading `rows` prompts, padding included; scores of the last token alone are computed."""
    return decide_flops(config, rows, tokens, tiles)


def decide_flops(
    config: ModelConfig, rows: int, tokens: int, tiles: int, samples: int = 1, is_seen: bool = False
) -> int:
    """FLOPs of reading `rows` packs of so many `samples`, all alike, of whose last tokens alone scores are computed;
    `is_seen`: what they show was seen before."""
    alike = [(tokens // samples, tiles // samples)] * samples
    unread = 2 * (tokens // samples - 1) * samples * config.decoder.width * config.decoder.vocab
    if is_seen:
        unread += tiles * (sum(config.vision.flops) + config.vision.projector_flops(config.decoder.width))
    return rows * (train_flops(config, alike, ()) - unread)


def decode_flops(config: ModelConfig, rows: int, tokens: int, tiles: int) -> int:
    """FLOPs of one more token for each of `rows` rows that hold `tokens` tokens and `tiles` tiles."""
    c = config.decoder
    per_row = c.flops(1)[0] + 4 * c.layers * tokens * c.heads * c.head_dim + 2 * c.width * c.vocab
    whole, without = (sum(memory_flops(config, n, tiles)) for n in (1, 0))
    return rows * (per_row + whole - without)  # keys and values of the memory are computed once a prompt


def look_flops(config: ModelConfig, rows: int) -> int:
    """FLOPs of the next frame of each of `rows` streams that have gone on for long."""
    long = 10**6
    after, before = (sum(memory_flops(config, 0, frames)) for frames in (long, long - 1))
    return rows * (sum(config.vision.flops) + after - before)


def ask_flops(config: ModelConfig, rows: int, tokens: int, frames: int) -> int:
    """FLOPs of reading `rows` prompts of so many tokens about frames that are kept; padding as in `prefill_flops`."""
    projected = frames * config.vision.projector_flops(config.decoder.width)
    scores = 2 * config.decoder.width * config.decoder.vocab
    return rows * (sum(config.decoder.flops(tokens)) + projected + scores)


def memory_flops(config: ModelConfig, tokens: Count, tiles: Count) -> tuple[Count, Count]:
    """Forward FLOPs of the memory for a sample: in weights, and in attention. A memory that speaks works between
    tokens: see `formation_flops`."""
    memory, visual = memory_of(config.memory), tiles * config.vision.tile.tokens
    beside = memory.flops(config.memory, config.decoder, tokens, visual)
    before = memory.frame_flops(config.memory, config.decoder, config.vision, tiles)
    return beside[0] + before[0], beside[1] + before[1]


def formation_flops(config: ModelConfig, states: int, trained: Collection[str]) -> int:
    """FLOPs of forming one memory from `states` states, and of the gradient where it is `trained`."""
    inside = [path.removeprefix("memory/") for path in trained if path.startswith("memory/")]
    return memory_of(config.memory).formation_flops(config.memory, config.decoder, states, inside)
