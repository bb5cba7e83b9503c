"""How many floating-point operations a model needs, counted from its sizes.

A sample is given by its tokens and tiles; both may be arrays, of many samples.
"""

from collections.abc import Collection, Iterable

import numpy as np
from jaxtyping import Int64

from vlmem_jax.models.config import ModelConfig
from vlmem_jax.nn.encoder import EncoderConfig
from vlmem_jax.vision import QwenViTConfig

Count = int | Int64[np.ndarray, "samples"]


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
    reaches_text = body or any(trains.values())

    def step(weights: Count, attention: Count, weights_trained: bool, input_gradient: bool) -> Count:
        return weights * (1 + weights_trained + input_gradient) + attention * (1 + 2 * input_gradient)

    each = step(*decoder_flops(config, tokens), body, reaches_text)
    each += step(2 * tokens * config.decoder.width * config.decoder.vocab, 0, head, reaches_text)
    each += tiles * step(*vision_flops(config), trains["vision"], trains["vision"])
    each += tiles * step(projector_flops(config), 0, trains["projector"], trains["projector"] or trains["vision"])
    each += step(*memory_flops(config, tokens, tiles), trains["memory"], reaches_text)
    return sum(each.tolist())


def prefill_flops(config: ModelConfig, rows: int, tokens: int, tiles: int) -> int:
    """FLOPs of reading `rows` prompts, padding included; scores of the last token alone are computed."""
    unread = 2 * (tokens - 1) * config.decoder.width * config.decoder.vocab
    return rows * (train_flops(config, [(tokens, tiles)], ()) - unread)


def decode_flops(config: ModelConfig, rows: int, tokens: int, tiles: int) -> int:
    """FLOPs of one more token for each of `rows` rows that hold `tokens` tokens and `tiles` tiles."""
    c = config.decoder
    per_row = decoder_flops(config, 1)[0] + 4 * c.layers * tokens * c.heads * c.head_dim + 2 * c.width * c.vocab
    whole, without = (sum(memory_flops(config, n, tiles)) for n in (1, 0))
    return rows * (per_row + whole - without)  # keys and values of the memory are computed once a prompt


def vision_flops(config: ModelConfig) -> tuple[int, int]:
    """Forward FLOPs of the tower for one tile: in its weights, and in attention.

    Layers that attend within frames count as those within windows, since it depends on the images how large frames are.
    """
    c = config.vision
    if isinstance(c, QwenViTConfig):
        patches, near = c.merge**2, (c.geometry.window * c.merge) ** 2
        weights = patches * c.width * (c.tile.channels + c.layers * (4 * c.width + 3 * c.mlp_width))
        return 2 * weights, c.layers * 4 * patches * near * c.width
    patches, queries = c.grid**2, c.grid**2 + 1
    weights = 2 * patches * 3 * c.patch_size**2 * c.width
    weights += c.layers_used * 2 * queries * c.width * (4 * c.width + 2 * c.mlp_width)
    return weights, c.layers_used * 4 * queries**2 * c.width


def projector_flops(config: ModelConfig) -> int:
    """Forward FLOPs of the projector for one tile."""
    c, width = config.vision, config.decoder.width
    if isinstance(c, QwenViTConfig):
        inner = c.merge**2 * c.width
        return 2 * (inner * inner + inner * width)
    return 2 * c.tile.tokens * (4 * c.width * width + width * width)


def decoder_flops(config: ModelConfig, tokens: Count) -> tuple[Count, Count]:
    """Forward FLOPs of the decoder's layers for a sample: in their weights, and in attention. The head is apart."""
    c = config.decoder
    weights = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.mlp_width
    return c.layers * 2 * tokens * weights, c.layers * 2 * tokens**2 * c.heads * c.head_dim


def memory_flops(config: ModelConfig, tokens: Count, tiles: Count) -> tuple[Count, Count]:
    """Forward FLOPs of the memory blocks for a sample: in their weights, and in attention.

    Tokens without tiles pass them unchanged. A memory that speaks works between tokens: see `formation_flops`.
    """
    if config.memory != "comemo":
        return 0, 0
    c, width = config.comemo, config.decoder.width
    blocks, slots, inner = (
        config.decoder.layers // c.every,
        tiles * config.vision.tile.tokens,
        c.heads * c.head_dim,
    )
    tokens = tokens * (tiles > 0)
    weights = 2 * width * (2 * inner * (tokens + slots) + 3 * c.mlp_width * tokens)
    return blocks * weights, blocks * 4 * tokens * slots * inner


def formation_flops(config: ModelConfig, states: int, trained: Collection[str]) -> int:
    """FLOPs of forming one memory from `states` states, the longer kind, and of the gradient where it is `trained`.

    Adapters, which are little, are left out, as is the share of lora_vision in the vision tower; small formers are
    counted once a kind, since all of them run.
    """
    c, width = config.vismem, config.decoder.width
    queried = states + c.query_len
    T = queried + max(c.lengths)
    encoders = [encoder_flops(c.query_builder, width, queried)]
    if c.former == "tiny_transformer":
        encoders += [encoder_flops(c.tiny, width, T)] * len(c.lengths)
        decoder = 0, 0
    else:
        decoder = decoder_flops(config, T)
    gradient = any(path.startswith(("memory/query_builder", "memory/short", "memory/long")) for path in trained)
    through = decoder[0] * (1 + gradient) + decoder[1] * (1 + 2 * gradient)
    return through + sum(map(sum, encoders)) * (1 + 2 * gradient)


def encoder_flops(config: EncoderConfig, width: int, tokens: int) -> tuple[int, int]:
    """Forward FLOPs of an encoder for one row: in its weights, and in attention."""
    weights = config.layers * 2 * tokens * width * width * (4 + 2 * config.ff_mult)
    return weights, config.layers * 4 * tokens**2 * width
