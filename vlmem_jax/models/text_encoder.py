"""Bidirectional encoders of text, BERT (arXiv 1810.04805) and XLM-R (arXiv 1911.02116): they embed and re-rank.

They are used as they come, nothing here trains them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.nn.attention import AttentionConfig, segment_attention
from vlmem_jax.nn.linear import Linear, param
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm
from vlmem_jax.nn.stack import stack
from vlmem_jax.processing.sequences import Tokens
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.shapes import least, powers

Pooling = Literal["cls", "mean"]
"""What stands for a text: its first token, or the mean of all."""

SHORTEST = 32
"""Tokens of the smallest of the lengths that there are programs for."""
BATCH_TOKENS, CPU_BATCH_TOKENS = 1024, 256
"""Tokens of a batch: with more, a question asked alone is mostly padding, which a CPU takes long for."""


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes."""

    vocab: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    positions: int
    """Rows of the table of positions."""
    first_position: int = 0
    """Row of the first token: XLM-R's stands behind that of its padding."""
    types: int = 2
    """Kinds of tokens: BERT's second text of a pair is of its own."""
    norm_eps: float = 1e-12
    labels: int = 0
    """Logits of the classification head; 0: there is none."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and products; softmax, norms and what comes out are fp32 always."""

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}, got {self.width}")

    @property
    def longest(self) -> int:
        """Tokens that there are positions for."""
        return self.positions - self.first_position


class SelfAttention(nnx.Module):
    """Attention among all tokens of a sequence; all maps have biases."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        embed, split = {"embed": config.width}, {"heads": config.heads, "head_dim": config.width // config.heads}
        self.q, self.k, self.v = (Linear(embed, split, bias=True, rngs=rngs) for _ in range(3))
        self.o = Linear(split, embed, bias=True, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], segments_BT: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        q_BTHC, k_BTHC, v_BTHC = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        return self.o(segment_attention(AttentionConfig(), q_BTHC, k_BTHC, v_BTHC, segments_BT))


class TextEncoderLayer(nnx.Module):
    """Post-norm: norm1(x + attention x), then norm2(x + MLP x)."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.attn = SelfAttention(config, rngs=rngs)
        self.mlp = GeluMLP(config.width, config.mlp_width, config.width, rngs=rngs)
        self.norm1, self.norm2 = (LayerNorm(config.width, config.norm_eps, rngs=rngs) for _ in range(2))

    def __call__(self, x_BTD: Float[Array, "B T D"], segments_BT: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = self.norm1(x_BTD + self.attn(x_BTD, segments_BT))
        return self.norm2(x_BTD + self.mlp(x_BTD))


class ClassificationHead(nnx.Module):
    """out(tanh(dense x)) of the first token: BERT's pooler and classifier, XLM-R's classifier."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.dense = Linear({"embed": config.width}, {"mlp": config.width}, bias=True, rngs=rngs)
        self.out = Linear({"embed": config.width}, {"vocab": config.labels}, bias=True, rngs=rngs)

    def __call__(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B Y"]:
        return self.out(jnp.tanh(self.dense(x_BD)))


class TextEncoder(nnx.Module):
    """Token ids to what the last layer says of each token. The first `length` tokens of a row are there."""

    def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        init, width = nnx.initializers.normal(0.02), config.width
        self.words = param(init, (config.vocab, width), ("vocab", "embed"), rngs)
        self.positions = param(init, (config.positions, width), ("positions", "norm"), rngs)
        self.types = param(init, (config.types, width), ("positions", "norm"), rngs)
        self.norm = LayerNorm(width, config.norm_eps, rngs=rngs)
        self.layers = stack(lambda rngs: TextEncoderLayer(config, rngs=rngs), config.layers, rngs)
        self.head = ClassificationHead(config, rngs=rngs) if config.labels else None

    def __call__(
        self, ids_BT: Int32[Array, "B T"], types_BT: Int32[Array, "B T"], length_B: Int32[Array, "B"]
    ) -> Float[Array, "B T D"]:
        """What comes out for padding means nothing."""
        T = ids_BT.shape[1]
        place_TD = self.positions[...][self.config.first_position :][:T]
        # rows are cast, not tables: they are summed in fp32, and nothing here needs the gradient of a table
        parts = self.words[...][ids_BT], self.types[...][types_BT], place_TD
        x_BTD = self.norm(sum(part.astype(jnp.float32) for part in parts)).astype(self.config.compute_dtype)
        segments_BT = (jnp.arange(T) < length_B[:, None]).astype(jnp.int32)
        graph, layers = nnx.split(self.layers)

        def body(x_BTD, state):
            return nnx.merge(graph, state)(x_BTD, segments_BT), None

        return jax.lax.scan(body, x_BTD, layers)[0]

    def embed(
        self,
        ids_BT: Int32[Array, "B T"],
        types_BT: Int32[Array, "B T"],
        length_B: Int32[Array, "B"],
        pooling: Pooling,
    ) -> Float[Array, "B D"]:
        """A vector of length 1 for each row."""
        x_BTD = self(ids_BT, types_BT, length_B).astype(jnp.float32)
        if pooling == "cls":
            x_BD = x_BTD[:, 0]
        else:
            is_there_BT1 = (jnp.arange(x_BTD.shape[1]) < length_B[:, None])[..., None]
            x_BD = jnp.where(is_there_BT1, x_BTD, 0.0).sum(axis=1) / jnp.maximum(length_B, 1)[:, None]
        return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=1, keepdims=True), 1e-12)

    def classify(
        self, ids_BT: Int32[Array, "B T"], types_BT: Int32[Array, "B T"], length_B: Int32[Array, "B"]
    ) -> Float[Array, "B Y"]:
        """The logits of each row."""
        return self.head(self(ids_BT, types_BT, length_B)[:, 0].astype(jnp.float32))


class TextPrograms:
    """A text encoder that takes sequences of any lengths, by batches of few shapes: one program a length."""

    def __init__(
        self,
        config: TextEncoderConfig,
        params: Mapping[str, Any],
        output: Pooling | Literal["logits"],
        longest: int,
        batch_tokens: int | None = None,
    ):
        """`params` lie on one device. `longest`: tokens of a sequence, at most; `batch_tokens`: those of a batch.

        Raises ValueError where the encoder has no positions for so many, and for logits without a head.
        """
        if not 0 < longest <= config.longest:
            raise ValueError(f"the encoder has positions for 1 to {config.longest} tokens of a text, got {longest}")
        if output == "logits" and not config.labels:
            raise ValueError("logits need a classification head, but the encoder has none; use pooling cls or mean")
        self.config, self.params, self.output, self.longest = config, params, output, longest
        self.width = config.labels if output == "logits" else config.width
        """Numbers that come out for a sequence."""
        if batch_tokens is None:
            batch_tokens = CPU_BATCH_TOKENS if jax.default_backend() == "cpu" else BATCH_TOKENS
        self.shapes = {T: (max(batch_tokens // T, 1), T) for T in powers(min(SHORTEST, longest), longest)}
        """Of batches, by the tokens of their sequences."""

    @cached_property
    def _program(self) -> Callable[..., Float[Array, "B Y"]]:
        graph = nnx.graphdef(nnx.eval_shape(lambda: TextEncoder(self.config, rngs=nnx.Rngs(0))))

        def run(params, *batch: Array) -> Array:
            encoder = nnx.merge(graph, params)
            return encoder.classify(*batch) if self.output == "logits" else encoder.embed(*batch, self.output)

        return jax.jit(run, compiler_options=options(None))

    def warm(self) -> None:
        """Compiles all that will ever run."""
        for length in self.shapes:
            self([Tokens([0] * length, [0] * length)])

    def __call__(self, sequences: Sequence[Tokens]) -> Float[np.ndarray, "N Y"]:
        """Vectors of length 1, or logits. Raises ValueError for a sequence that is too long or empty."""
        by_length: dict[int, list[int]] = {T: [] for T in self.shapes}
        for n, (ids, _) in enumerate(sequences):
            if not 0 < len(ids) <= self.longest:
                raise ValueError(f"sequences must have 1 to {self.longest} tokens, got one of {len(ids)}")
            by_length[least(tuple(by_length), len(ids))].append(n)
        running = []
        for T, numbers in by_length.items():
            rows, _ = self.shapes[T]
            for start in range(0, len(numbers), rows):
                some = numbers[start : start + rows]
                batch = jax.device_put(self._batch(T, [sequences[n] for n in some]), jax.local_devices()[0])
                running.append((some, self._program(self.params, *batch)))
        y_NY = np.zeros((len(sequences), self.width), np.float32)
        for some, y_BY in running:  # all are under way before the first is waited for
            y_NY[some] = np.asarray(y_BY)[: len(some)]
        return y_NY

    def _batch(self, T: int, sequences: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape = self.shapes[T]
        ids_BT, types_BT, length_B = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        for n, (ids, types) in enumerate(sequences):
            ids_BT[n, : len(ids)], types_BT[n, : len(ids)], length_B[n] = ids, types, len(ids)
        return ids_BT, types_BT, length_B
