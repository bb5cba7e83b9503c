"""What towers that see images and videos of any size share: patches packed on one axis, in blocks (Qwen).

Patches come in blocks of merge x merge that become one visual token each. Segment ids say what belongs together, so
that one program serves all sizes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from vlmem_jax.nn.attention import AttentionConfig, attend, segment_attention
from vlmem_jax.nn.linear import Linear
from vlmem_jax.nn.lora import Adapters, LayerAdapters, adapted, adapted_part
from vlmem_jax.nn.rope import Rotation, frequencies, rotate, rotation
from vlmem_jax.nn.stack import remat
from vlmem_jax.runtime.sharding import constrain


class Segments(NamedTuple):
    """Which patches see each other: equal ids; 0 is padding."""

    windows_BN: Int32[Array, "B N"]
    frames_BN: Int32[Array, "B N"]


class Levels(NamedTuple):
    """Features of patches after the last layer of a tower, and after those that deeper layers of the decoder read."""

    last_BND: Float[Array, "B N D"]
    deep_VBND: Float[Array, "V B N D"]
    """V: levels, those of `deep_layers` of the tower."""


class PatchAttention(nnx.Module):
    """Attention with rotary positions among the patches of a frame.

    Rows beside the patches see those that they may, in every layer.
    """

    def __init__(self, config: Any, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.attention = attention
        split = {"heads": config.heads, "head_dim": config.width // config.heads}
        self.qkv = Linear({"embed": config.width}, {"qkv": 3, **split}, bias=True, rngs=rngs)
        self.proj = Linear(split, {"embed": config.width}, bias=True, rngs=rngs)

    def among(self, qkv: tuple[Array, ...], segments: Segments, full: Bool[Array, ""] | None) -> Array:
        """What patches read of each other; `full` as in `PatchTower.varying`."""
        return segment_attention(self.attention, *qkv, segments.frames_BN)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        tables: Rotation,
        segments: Segments,
        full: Bool[Array, ""] | None,
        allowed_BES: Bool[Array, "B E S"] | None = None,
        lora: LayerAdapters | None = None,
    ) -> Float[Array, "B S D"]:
        """`allowed_BES`: what the E rows see that stand behind the N patches, which do not see them; S = N + E."""
        heads = *x_BSD.shape[:2], *self.qkv.bias.shape[1:]
        parts = (adapted_part(self.qkv, n, name, x_BSD, lora) for n, name in enumerate("qkv"))
        q_BSHC, k_BSHC, v_BSHC = (part.reshape(heads) for part in parts)
        q_BSHC, k_BSHC = rotate(q_BSHC, tables), rotate(k_BSHC, tables)
        N = segments.windows_BN.shape[1]
        qkv = tuple(x if allowed_BES is None else x[:, :N] for x in (q_BSHC, k_BSHC, v_BSHC))
        out_BSHC = self.among(qkv, segments, full)
        if allowed_BES is not None:
            out_BEHC = attend(q_BSHC[:, N:], k_BSHC, v_BSHC, allowed_BES)
            out_BSHC = jnp.concatenate([out_BSHC, out_BEHC], axis=1)
        return adapted(self.proj, "proj", out_BSHC, lora)


class PatchLayer(nnx.Module):
    """Pre-norm attention and MLP: `norm1`, `attn`, `norm2`, `mlp` of a subclass."""

    norm1: nnx.Module
    norm2: nnx.Module
    attn: PatchAttention
    mlp: nnx.Module

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        tables: Rotation,
        segments: Segments,
        full: Bool[Array, ""] | None,
        allowed_BES: Bool[Array, "B E S"] | None = None,
        lora: LayerAdapters | None = None,
    ) -> Float[Array, "B S D"]:
        attended_BSD = self.attn(self.norm1(x_BSD), tables, segments, full, allowed_BES, lora)
        x_BSD = constrain(x_BSD + attended_BSD, "batch", "tokens", None)
        return constrain(x_BSD + self.mlp(self.norm2(x_BSD), lora), "batch", "tokens", None)


class PatchTower(nnx.Module):
    """Blocks of patches to patch features; no norm after the last layer. A subclass has `patch` and `layers`."""

    config: Any
    patch: Linear
    layers: PatchLayer

    @property
    def deep_layers(self) -> tuple[int, ...]:
        """Layers, rising, whose outputs go on beside those of the last one, see `Levels`."""
        return ()

    def __call__(
        self,
        pixels_BISSc: Float[Array, "B I S S c"],
        layout_BI4: Int32[Array, "B I 4"],
        *,
        lora: Adapters | None = None,
        remat_policy: str = "none",
    ) -> Float[Array, "B N D"] | Levels:
        """Features of the N = I * S * S patches, block after block; `layout_BI4` is that of `types.Views`."""
        numbers, x_BND = range(self.config.layers), self.enter(pixels_BISSc, layout_BI4)
        return self._levels(*self._through(x_BND, layout_BI4, numbers, remat_policy, lora=lora))

    def keeping(
        self,
        pixels_BISSc: Float[Array, "B I S S c"],
        layout_BI4: Int32[Array, "B I 4"],
        first: int,
        remat_policy: str,
        lora: Adapters | None = None,
    ) -> tuple[Float[Array, "B N D"] | Levels, Float[Array, "B N D"]]:
        """The features, and what they were before layer `first`, for `beside`."""
        x_BND = self.enter(pixels_BISSc, layout_BI4)
        kept_BND, deep = self._through(x_BND, layout_BI4, range(first), remat_policy, lora=lora)
        numbers = range(first, self.config.layers)
        last_BND, deeper = self._through(kept_BND, layout_BI4, numbers, remat_policy, lora=lora)
        return self._levels(last_BND, [*deep, *deeper]), kept_BND

    def beside(
        self,
        kept_BND: Float[Array, "B N D"],
        layout_BI4: Int32[Array, "B I 4"],
        rows_BED: Float[Array, "B E D"],
        allowed_BES: Bool[Array, "B E S"],
        lora: Adapters | None,
        first: int,
        remat_policy: str,
    ) -> Float[Array, "B E D"]:
        """What rows behind the patches become in the layers from `first` on, of which alone are the adapters.

        In every layer they see those of the S = N + E patches and rows that they may, and patches do not see them; they
        are not turned, as if at row and column 0.
        """
        x_BSD = jnp.concatenate([kept_BND, rows_BED.astype(kept_BND.dtype)], axis=1)
        layers = range(first, self.config.layers)
        last_BSD, _ = self._through(x_BSD, layout_BI4, layers, remat_policy, allowed_BES, lora)
        return last_BSD[:, kept_BND.shape[1] :]

    def enter(self, pixels_BISSc: Float[Array, "B I S S c"], layout_BI4: Int32[Array, "B I 4"]) -> Array:
        """What goes into the first layer, [B, N, D]."""
        c, (B, I, S) = self.config, pixels_BISSc.shape[:3]
        x_BND = self.patch(pixels_BISSc.reshape(B, I * S * S, 3, c.patch_frames, c.patch_size, c.patch_size))
        return constrain(x_BND, "batch", "tokens", None)

    def varying(self, numbers: range) -> Any:
        """What the layers of these numbers have of their own beside weights, stacked: whether they attend within whole
        frames. None: all do."""
        return None

    def _levels(self, last_BND: Array, deep: list[Array]) -> Float[Array, "B N D"] | Levels:
        return Levels(last_BND, jnp.stack(deep)) if deep else last_BND

    def _through(
        self,
        x_BSD: Float[Array, "B S D"],
        layout_BI4: Int32[Array, "B I 4"],
        numbers: range,
        remat_policy: str,
        allowed_BES: Bool[Array, "B E S"] | None = None,
        lora: Adapters | None = None,
    ) -> tuple[Float[Array, "B S D"], list[Array]]:
        """What comes out of the layers of these numbers, and of those among them that are `deep_layers`."""
        c = self.config
        segments = Segments(*(jnp.repeat(layout_BI4[..., n], c.merge**2, axis=1) for n in range(2)))
        tables = self.rotation(layout_BI4[..., 2:])
        if allowed_BES is not None:
            behind = (0, 0), (0, allowed_BES.shape[1]), (0, 0)
            tables = tuple(jnp.pad(x, behind, constant_values=still) for x, still in zip(tables, (1, 0), strict=True))
        graph, layers = nnx.split(self.layers)
        adapters, start = None, numbers.start if allowed_BES is None else 0
        if lora:
            adapters = lora.weights, jnp.arange(c.layers)
            adapters = jax.tree.map(lambda leaf: leaf[start : start + len(numbers)], adapters)
        if len(numbers) < c.layers:
            layers = jax.tree.map(lambda leaf: leaf[numbers.start : numbers.stop], layers)

        def body(x_BSD, layer):
            state, full, adapters = layer
            own = lora.layer(*adapters) if lora else None
            return nnx.merge(graph, state)(x_BSD, tables, segments, full, allowed_BES, own), None

        xs, deep, at = (layers, self.varying(numbers), adapters), [], 0
        for level in self.deep_layers if allowed_BES is None else ():
            if level not in numbers:
                continue
            end = level + 1 - numbers.start
            part = jax.tree.map(lambda leaf, at=at, end=end: leaf[at:end], xs)
            x_BSD, at = jax.lax.scan(remat(body, remat_policy), x_BSD, part)[0], end
            deep.append(x_BSD)
        if at < len(numbers):
            xs = jax.tree.map(lambda leaf: leaf[at:], xs) if at else xs
            x_BSD = jax.lax.scan(remat(body, remat_policy), x_BSD, xs)[0]
        return x_BSD, deep

    def places(self, tiles_BI2: Int32[Array, "B I 2"]) -> Int32[Array, "B N 2"]:
        """Row and column of each patch, of blocks at these rows and columns."""
        merge = self.config.merge
        within_PA = np.indices((merge, merge), dtype=np.int32).reshape(2, -1).T
        return (tiles_BI2[:, :, None] * merge + within_PA).reshape(tiles_BI2.shape[0], -1, 2)

    def rotation(self, tiles_BI2: Int32[Array, "B I 2"]) -> Rotation:
        """Half of the pairs turn by the patch's row in its image, half by its column, at equal frequencies."""
        c, places_BN2 = self.config, self.places(tiles_BI2)
        quarter = c.width // c.heads // 4
        frequencies_R = jnp.tile(frequencies(2 * quarter, c.rope_theta), 2)
        return rotation(places_BN2, frequencies_R, (0,) * quarter + (1,) * quarter)
