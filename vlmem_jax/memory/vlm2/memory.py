"""VLM^2 at the door SEE: frames get their place in space, read both banks, and are written to them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from vlmem_jax.config import to_dict
from vlmem_jax.decoder import DecoderConfig
from vlmem_jax.memory.base import Count, Frame, Memory
from vlmem_jax.memory.vlm2.banks import Banks, DualMemory
from vlmem_jax.memory.vlm2.config import VLM2Config
from vlmem_jax.memory.vlm2.represent import Representation
from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.nn.resize import area_weights
from vlmem_jax.records import Rule, own_tensors
from vlmem_jax.trees import Flat
from vlmem_jax.types import Geometry, GeometryShape

KEY = "vlm2_config"
"""Of config.json; what stands there are our own keys. Nobody has published a checkpoint."""


class VLM2(Memory):
    """The representation of frames and their banks. It starts as the model without it."""

    config_type = VLM2Config

    def __init__(
        self, config: VLM2Config, decoder: DecoderConfig, vision: Any, attention: AttentionConfig, *, rngs: nnx.Rngs
    ):
        if vision.tile.layout:
            raise ValueError(
                "memory vlm2 keeps frames that the tower sees each on its own, as square tiles are; "
                f"{vision.kind} sees images and videos in their own shape"
            )
        self.config, self.grid = config, vision.grid
        self.side, self.width = sizes(config, decoder, vision)
        self.patches = self.side**2
        self.represent = Representation(config, self.width, rngs=rngs) if config.geometry_width else None
        self.banks = DualMemory(config, self.width, attention, rngs=rngs)

    def begin(self, rows: int, dtype: jax.typing.DTypeLike, key: Array | None = None) -> Banks:
        return self.banks.begin(rows, self.patches, dtype, key)

    def take(
        self, state: Banks, frame: Frame, valid_B: Bool[Array, "B"], fresh_B: Bool[Array, "B"]
    ) -> tuple[Float[Array, "B N D"], Banks]:
        x_BND = frame.x_BND
        if self.represent is not None:
            if frame.geometry is None:
                raise ValueError(
                    f"memory.geometry_width is {self.config.geometry_width}, but frames come without geometry; set "
                    "memory.geometry_width=0"
                )
            x_BND = self.represent(x_BND, pooled(frame.geometry, self.grid, self.side))
        return self.banks.take(state, x_BND, valid_B, fresh_B)

    def readout(self, state: Banks) -> tuple[Float[Array, "B L N D"], Int32[Array, "B L"]]:
        return self.banks.readout(state)

    @classmethod
    def geometry_read(cls, config: VLM2Config, vision: Any) -> GeometryShape | None:
        widths = config.geometry_width, config.view_width
        return GeometryShape(vision.grid**2, *widths) if config.geometry_width else None

    @classmethod
    def frames_kept(cls, config: VLM2Config) -> int:
        return config.episodic

    @classmethod
    def behind_projector(cls, config: VLM2Config) -> bool:
        return config.stage == "post_pool"

    @classmethod
    def frame_flops(cls, config: VLM2Config, decoder: DecoderConfig, vision: Any, frames: Count) -> tuple[Count, Count]:
        side, c = sizes(config, decoder, vision)
        N = side**2
        hidden, outputs = config.gamma_width or c, c if config.gamma == "channel" else 1
        weights, attention = 16 * N * c * c + 2 * N * hidden * (2 * c + outputs), 0
        if g := config.geometry_width:
            place, align, v = config.place_width or c, config.align_width or g, config.view_width
            weights += 2 * N * place * (3 + c) + 2 * (N + 1) * v * g + 2 * N * align * 3 * g
            weights += 2 * N * (config.gate_width or c) * (2 * c + 1) if config.injection == "learned" else 0
            weights += 4 * N * c * c + 4 * (N + 1) * g * c
            attention += 4 * N * (N + 1) * c
        kept = sum(_read(frames, size) for size in (config.working, config.episodic))
        return frames * weights, frames * attention + 4 * N * N * c * kept

    @classmethod
    def tensors(cls, config: VLM2Config, decoder: DecoderConfig, leaves: Flat, layer: str) -> list[Rule]:
        return own_tensors("vlm2", leaves)

    @classmethod
    def read_config(cls, content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        return content.get(KEY)

    @classmethod
    def write_config(cls, config: VLM2Config, decoder: DecoderConfig) -> dict[str, Any]:
        return {KEY: to_dict(config)}


def sizes(config: VLM2Config, decoder: DecoderConfig, vision: Any) -> tuple[int, int]:
    """Tokens along a side of a frame that is kept, and their width."""
    return (vision.side, decoder.width) if config.stage == "post_pool" else (vision.grid, vision.width)


def pooled(geometry: Geometry, grid: int, side: int) -> Geometry:
    """Geometry of grid x grid patches as that of side x side equal parts of the frame, by their means."""
    if grid == side:
        return geometry
    weights = jnp.asarray(area_weights(grid, side), jnp.float32)

    def means(x_BNX: Array) -> Array:
        x_BHWX = x_BNX.reshape(len(x_BNX), grid, grid, -1).astype(jnp.float32)
        pooled = jnp.einsum("hH,wW,BHWX->BhwX", weights, weights, x_BHWX)
        return pooled.reshape(len(x_BNX), side**2, -1).astype(x_BNX.dtype)

    return jax.tree.map(means, geometry)


def _read(frames: Count, size: int) -> Count:
    """Frames of a bank of this size that those of a sample find there, all in all."""
    full = (frames > size) * (frames - size)
    rising = frames - full
    return rising * (rising - 1) // 2 + full * size
