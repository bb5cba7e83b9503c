"""CoMemo (arXiv 2506.06279): before every E-th decoder layer, a gated block lets each token of the sequence attend,
without causality, to all visual tokens of its sample.

The memory is the very tensor that is spliced into the sequence; it is never updated. Its keys and values depend on the
block alone, so decoding computes them once a prompt.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas import Tables, rotary_tables, tables_of_angles
from kernels_pallas.rotary import rotate
from vlmem_jax.decoder import DecoderConfig, Tap
from vlmem_jax.memory.base import Count, Memory, Start
from vlmem_jax.memory.comemo import released
from vlmem_jax.memory.comemo.config import CoMemoConfig
from vlmem_jax.nn.attention import AttentionConfig, memory_attention, same_segment
from vlmem_jax.nn.linear import Linear, param, zeros
from vlmem_jax.nn.mlp import GatedMLP
from vlmem_jax.nn.norm import RMSNorm
from vlmem_jax.nn.rope import angles, frequencies
from vlmem_jax.nn.stack import stack
from vlmem_jax.records import Rule
from vlmem_jax.runtime.sharding import constrain
from vlmem_jax.trees import Flat, State, axes
from vlmem_jax.types import VisualTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Precomputed(State):
    """Rotated keys and values of every block, ready to be attended to."""

    k_LBMHC: Float[Array, "L B M H C"] = axes("layers", "batch", "slots", "heads", "head_dim")
    v_LBMHC: Float[Array, "L B M H C"] = axes("layers", "batch", "slots", "heads", "head_dim")
    segments_BM: Int32[Array, "B M"] = axes("batch", "slots")
    places: int = dataclasses.field(default=1, metadata=dict(static=True))
    """As in `Views`."""


class MemoryAttention(nnx.Module):
    """Multi-head cross-attention; query and key heads are as many."""

    def __init__(self, config: CoMemoConfig, width: int, *, rngs: nnx.Rngs):
        heads = {"heads": config.heads, "head_dim": config.head_dim}
        self.q = Linear({"embed": width}, heads, rngs=rngs)
        self.k = Linear({"embed": width}, heads, rngs=rngs)
        self.v = Linear({"embed": width}, heads, rngs=rngs)
        self.o = Linear(heads, {"embed": width}, rngs=rngs)


class MemoryBlock(nnx.Module):
    """x + tanh(attn_gate) attention(norm x, norm memory), then x + tanh(mlp_gate) MLP(norm x)."""

    def __init__(self, config: CoMemoConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.attn_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
        self.attn = MemoryAttention(config, width, rngs=rngs)
        self.attn_gate = param(nnx.initializers.constant(config.gate), (1,), ("scalar",), rngs)
        self.mlp_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
        begun = config.start == "attention"
        self.mlp = GatedMLP(width, config.mlp_width, down_init=zeros if begun else None, rngs=rngs)
        self.mlp_gate = param(nnx.initializers.constant(config.gate if begun else 0.0), (1,), ("scalar",), rngs)

    def keys_values(self, tokens_BMD: Float[Array, "B M D"]) -> tuple[Float[Array, "B M H C"], Float[Array, "B M H C"]]:
        """Keys, not turned yet, and values of the memory, normalised by the norm that the text goes through."""
        normed = self.attn_norm(tokens_BMD)
        return self.attn.k(normed), self.attn.v(normed)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        read: Callable[[Float[Array, "B T H C"]], Float[Array, "B T H C"]],
        has_memory_BT: Bool[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """One block; `read` attends to the memory. Tokens without memory pass unchanged, attention and MLP alike."""

        def gated(gate: nnx.Param, residual_BTD: jax.Array) -> jax.Array:
            gated_BTD = jnp.tanh(gate[...].astype(jnp.float32)) * residual_BTD.astype(jnp.float32)
            return jnp.where(has_memory_BT[..., None], gated_BTD, 0).astype(x_BTD.dtype)

        x_BTD += gated(self.attn_gate, self.attn.o(read(self.attn.q(self.attn_norm(x_BTD)))))
        x_BTD = constrain(x_BTD, "batch", "tokens", None)
        return constrain(x_BTD + gated(self.mlp_gate, self.mlp(self.mlp_norm(x_BTD))), "batch", "tokens", None)


class CoMemo(Memory):
    """The stacked blocks and their door."""

    config_type = CoMemoConfig
    wraps_layers = True
    free_keys = "decode_position", "start", "gate"

    def __init__(
        self, config: CoMemoConfig, decoder: DecoderConfig, vision: Any, attention: AttentionConfig, *, rngs: nnx.Rngs
    ):
        if config.every > decoder.layers:
            raise ValueError(f"memory.every must be at most decoder.layers {decoder.layers}, got {config.every}")
        if decoder.rope_sections and config.head_dim != decoder.head_dim:
            raise ValueError(
                f"memory.head_dim must be decoder.head_dim {decoder.head_dim}, whose rope_sections the memory shares; "
                f"got {config.head_dim}"
            )
        if config.start == "attention" and (config.heads, config.head_dim) != (decoder.heads, decoder.head_dim):
            raise ValueError(
                f"memory.start=attention needs memory.heads and memory.head_dim of the decoder, {decoder.heads} and "
                f"{decoder.head_dim}; got {config.heads} and {config.head_dim}"
            )
        self.config, self.attention, self.axes = config, attention, decoder.rope_axes
        count = decoder.layers // config.every
        self.layers = tuple(range(config.every - 1, decoder.layers, config.every))
        self.blocks = stack(lambda rngs: MemoryBlock(config, decoder.width, rngs=rngs), count, rngs)

    def _tables(self, positions: Int32[Array, "B T"] | Int32[Array, "B T A"]) -> Tables:
        theta, head_dim = self.config.rope_theta, self.config.head_dim
        if positions.ndim == 3:  # M-RoPE
            return tables_of_angles(angles(positions, frequencies(head_dim, theta), self.axes))
        return rotary_tables(positions, theta, head_dim)

    def attend(
        self,
        seen: VisualTokens | State,
        positions_BT: Int32[Array, "B T"] | Int32[Array, "B T A"],
        segments_BT: Int32[Array, "B T"],
        index_BT: Int32[Array, "B T"] | None = None,
    ) -> Tap:
        if index_BT is not None and self.config.decode_position == "length":
            positions_BT = index_BT
        if seen.places > 1:
            positions_BT = positions_BT * seen.places
        graph, blocks = nnx.split(self.blocks)
        precomputed = isinstance(seen, Precomputed)
        q_tables, k_tables = self._tables(positions_BT), None if precomputed else self._tables(seen.positions_BM)
        has_memory_BT = same_segment(segments_BT, seen.segments_BM).any(axis=-1)

        def apply(of_block, x_BTD):
            state, kv = of_block
            block = nnx.merge(graph, state)
            k_BMHC, v_BMHC = kv if precomputed else block.keys_values(seen.tokens_BMD)

            def read(q_BTHC):
                return memory_attention(
                    self.attention, q_BTHC, k_BMHC, v_BMHC, q_tables, k_tables, segments_BT, seen.segments_BM
                )

            return block(x_BTD, read, has_memory_BT)

        kv = (seen.k_LBMHC, seen.v_LBMHC) if precomputed else None
        return Tap(self.layers, (blocks, kv), apply, every=self.config.every)

    def precompute(self, visual: VisualTokens) -> Precomputed:
        graph, blocks = nnx.split(self.blocks)
        tables = self._tables(visual.positions_BM)

        def body(_, state):
            k_BMHC, v_BMHC = nnx.merge(graph, state).keys_values(visual.tokens_BMD)
            return None, (rotate(k_BMHC, tables).astype(k_BMHC.dtype), v_BMHC)

        _, kv = jax.lax.scan(body, None, blocks)
        k_LBMHC, v_LBMHC = (constrain(x, None, "batch", None, "heads", None) for x in kv)
        return Precomputed(k_LBMHC, v_LBMHC, visual.segments_BM, visual.places)

    @classmethod
    def starts(cls, config: CoMemoConfig, decoder: DecoderConfig) -> dict[str, Start]:
        if config.start == "random":
            return {}
        layers, groups = tuple(range(config.every - 1, decoder.layers, config.every)), decoder.heads // decoder.kv_heads
        starts = {f"attn/{name}/kernel": Start(f"attn/{name}/kernel", layers) for name in "qo"}
        starts |= {f"attn/{name}/kernel": Start(f"attn/{name}/kernel", layers, groups) for name in "kv"}
        starts["attn_norm/scale"] = Start("attn_norm/scale", layers)
        return {f"blocks/{path}": start for path, start in starts.items()}

    @classmethod
    def pieces(cls, config: CoMemoConfig, decoder: DecoderConfig) -> tuple[DecoderConfig, int]:
        return dataclasses.replace(decoder, layers=config.every), decoder.layers // config.every

    @classmethod
    def check_drawn_as_trained(cls, config: CoMemoConfig) -> None:
        if config.decode_position != "continue":
            raise ValueError(f"decode_position must be continue, got {config.decode_position}")

    @classmethod
    def flops(cls, config: CoMemoConfig, decoder: DecoderConfig, tokens: Count, visual: Count) -> tuple[Count, Count]:
        """Tokens of a sample without visual tokens pass the blocks unchanged."""
        blocks, inner, tokens = decoder.layers // config.every, config.heads * config.head_dim, tokens * (visual > 0)
        weights = 2 * decoder.width * (2 * inner * (tokens + visual) + 3 * config.mlp_width * tokens)
        return blocks * weights, blocks * 4 * tokens * visual * inner

    @classmethod
    def tensors(cls, config: CoMemoConfig, decoder: DecoderConfig, leaves: Flat, layer: str) -> list[Rule]:
        return released.tensors(config, decoder, layer)

    @classmethod
    def read_config(cls, content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        return released.read(content, shapes)

    @classmethod
    def write_config(cls, config: CoMemoConfig, decoder: DecoderConfig) -> dict[str, Any]:
        return released.write(config, decoder)

    def metrics(self) -> dict[str, jax.Array]:
        """tanh of both gates of each block, by the decoder layer that it stands before."""
        every = self.config.every
        scalars = {}
        for kind, gates in (("attn", self.blocks.attn_gate[...]), ("mlp", self.blocks.mlp_gate[...])):
            for n in range(gates.shape[0]):
                scalars[f"gate/{kind}/{n * every + every - 1}"] = jnp.tanh(gates[n, 0])
        return scalars
