"""Dense prediction transformers (DPT, arXiv 2103.13413): numbers for each pixel, of tokens at four depths of a trunk.

Axis letters: h, w patches along the sides of a view, a, b those of a map of features, D its channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.nn.linear import fan_in_uniform, param, zeros
from vlmem_jax.nn.norm import LayerNorm
from vlmem_jax.nn.resize import corners_aligned, linear_weights
from vlmem_jax.records import Rule, section

NORM_EPS = 1e-5
SPREAD = (4, 2, 1)
"""Pixels along a side that one of a map becomes, from the finest on; the fourth map is halved."""
CODE_BASE, CODE_SCALE = 100.0, 0.1


@dataclasses.dataclass(frozen=True)
class DPTConfig:
    """Sizes: of tokens, of the maps from the finest to the coarsest, of what they are fused in, and of what comes
    out."""

    width: int
    channels: tuple[int, int, int, int]
    features: int
    half: int
    """Channels at the size of the image, before the last two convolutions."""
    hidden: int
    outputs: int
    patch_size: int


class Conv(nnx.Module):
    """A convolution whose edges see zeros."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = True, *, rngs: nnx.Rngs):
        self.stride, self.edge = stride, size // 2
        axes = ("pixels", "pixels_x", "embed", "mlp")
        self.kernel = param(fan_in_uniform(size * size * inputs), (size, size, inputs, outputs), axes, rngs)
        self.bias = param(zeros, (outputs,), ("mlp",), rngs) if bias else None

    def __call__(self, x_abD: Float[Array, "a b D"]) -> Float[Array, "c d E"]:
        y = jax.lax.conv_general_dilated(
            x_abD[None], self.kernel[...], (self.stride,) * 2, [(self.edge,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]  # fmt: skip
        return y if self.bias is None else y + self.bias[...]


class Spread(nnx.Module):
    """A transposed convolution that makes `size` x `size` pixels of each."""

    def __init__(self, channels: int, size: int, *, rngs: nnx.Rngs):
        axes = ("pixels", "pixels_x", "embed", "mlp")
        self.kernel = param(fan_in_uniform(channels), (size, size, channels, channels), axes, rngs)
        self.bias = param(zeros, (channels,), ("mlp",), rngs)

    def __call__(self, x_abD: Float[Array, "a b D"]) -> Float[Array, "c d D"]:
        a, b, D = x_abD.shape
        size = self.kernel.shape[0]
        spread = jnp.einsum("abd,yxde->aybxe", x_abD, self.kernel[...])
        return spread.reshape(a * size, b * size, D) + self.bias[...]


class Residual(nnx.Module):
    """r + W2 relu(W1 r) of r = relu(x): the public code rectifies in place, what is added too."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.conv1, self.conv2 = (Conv(features, features, 3, rngs=rngs) for _ in range(2))

    def __call__(self, x_abD: Float[Array, "a b D"]) -> Float[Array, "a b D"]:
        x_abD = jax.nn.relu(x_abD)
        return x_abD + self.conv2(jax.nn.relu(self.conv1(x_abD)))


class Level(nnx.Module):
    """One of the four maps, the `number`-th from the finest, and how it is fused with a coarser one."""

    def __init__(self, config: DPTConfig, number: int, *, rngs: nnx.Rngs):
        channels, features, last = config.channels[number], config.features, number == len(SPREAD)
        self.project = Conv(config.width, channels, 1, rngs=rngs)
        self.halve = Conv(channels, channels, 3, stride=2, rngs=rngs) if last else None
        self.spread = Spread(channels, SPREAD[number], rngs=rngs) if not last and SPREAD[number] > 1 else None
        self.layer = Conv(channels, features, 3, bias=False, rngs=rngs)
        self.unit1 = None if last else Residual(features, rngs=rngs)
        self.unit2 = Residual(features, rngs=rngs)
        self.out = Conv(features, features, 1, rngs=rngs)

    def read(self, x_hwD: Float[Array, "h w D"], aspect: float) -> Float[Array, "a b F"]:
        """The map, of tokens."""
        x = coded(self.project(x_hwD), aspect)
        for resize in (self.halve, self.spread):
            x = x if resize is None else resize(x)
        return self.layer(x)

    def fuse(
        self, own_abF: Float[Array, "a b F"], coarser_abF: Float[Array, "a b F"] | None, size: tuple[int, int]
    ) -> Float[Array, "c d F"]:
        """Both maps in one of another size."""
        x = own_abF if self.unit1 is None else coarser_abF + self.unit1(own_abF)
        return self.out(resized(self.unit2(x), size))


class DPT(nnx.Module):
    """Tokens of one view at four depths, finest map first, to `outputs` numbers for each pixel."""

    def __init__(self, config: DPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.norm = LayerNorm(config.width, NORM_EPS, rngs=rngs)
        self.level1, self.level2, self.level3, self.level4 = (Level(config, n, rngs=rngs) for n in range(4))
        self.conv1 = Conv(config.features, config.half, 3, rngs=rngs)
        self.conv2 = Conv(config.half, config.hidden, 3, rngs=rngs)
        self.conv3 = Conv(config.hidden, config.outputs, 1, rngs=rngs)

    def __call__(self, tokens_4PD: Float[Array, "4 P D"], height: int, width: int) -> Float[Array, "H W E"]:
        """Of a view of so many pixels."""
        p, aspect = self.config.patch_size, width / height
        levels = (self.level1, self.level2, self.level3, self.level4)
        normed = self.norm(tokens_4PD).reshape(len(levels), height // p, width // p, -1)
        maps = [level.read(x_hwD, aspect) for level, x_hwD in zip(levels, normed, strict=True)]
        rows, columns, _ = maps[0].shape
        sizes = [(2 * rows, 2 * columns), *(x.shape[:2] for x in maps[:-1])]
        x = None
        for level, own, size in reversed(list(zip(levels, maps, sizes, strict=True))):
            x = level.fuse(own, x, size)
        x = coded(resized(self.conv1(x), (height, width)), aspect)
        return self.conv3(jax.nn.relu(self.conv2(x)))


def resized(x_abD: Float[Array, "a b D"], size: tuple[int, int]) -> Float[Array, "c d D"]:
    """Linear interpolation to a map of `size` with the same corners."""
    rows, columns = (
        jnp.asarray(linear_weights(corners_aligned(have, want), have), x_abD.dtype)
        for have, want in zip(x_abD.shape, size, strict=False)
    )
    return jnp.einsum("db,cbe->cde", columns, jnp.einsum("ca,abe->cbe", rows, x_abD))


def coded(x_abD: Float[Array, "a b D"], aspect: float) -> Float[Array, "a b D"]:
    """x with sines and cosines of the place in a view whose width over height is `aspect`: half of the channels tell
    the column, half the row."""
    a, b, D = x_abD.shape
    across, down = (
        jnp.asarray(CODE_SCALE * _code(D // 2, count, span), x_abD.dtype)
        for count, span in ((b, aspect / np.hypot(1, aspect)), (a, 1 / np.hypot(1, aspect)))
    )
    halves = (jnp.broadcast_to(across, (a, b, D // 2)), jnp.broadcast_to(down[:, None], (a, b, D // 2)))
    return x_abD + jnp.concatenate(halves, axis=-1)


def _code(channels: int, count: int, span: float) -> Float[np.ndarray, "n c"]:
    end = span * (count - 1) / count
    frequencies = CODE_BASE ** (-np.arange(channels // 2) / (channels // 2))
    turned = np.linspace(-end, end, count)[:, None] * frequencies
    return np.concatenate([np.sin(turned), np.cos(turned)], axis=-1)


# --- tensors ----------------------------------------------------------------------------------------------------------


def dpt_tensors(config: DPTConfig, ours: str, theirs: str) -> list[Rule]:
    """Rules of a head."""
    sizes = {"D": config.width, "F": config.features, "G": config.features, "M": config.half, "E": config.hidden}
    sizes |= {"U": config.outputs} | {f"C{n}": size for n, size in enumerate(config.channels)}
    sizes |= {f"B{n}": size for n, size in enumerate(config.channels)}
    sizes |= {f"{axis}{size}": size for axis in "yx" for size in (1, 2, 3, 4)}

    def conv(name: str, tensor: str, inputs: str, outputs: str, size: int, transposed: bool = False) -> list[tuple]:
        theirs = f"{inputs} {outputs}" if transposed else f"{outputs} {inputs}"
        return [
            (f"{name}/kernel", f"{tensor}.weight", f"{theirs} y{size} x{size} -> y{size} x{size} {inputs} {outputs}"),
            (f"{name}/bias", f"{tensor}.bias", f"{outputs} -> {outputs}"),
        ]

    rows = [("norm/scale", "norm.weight", "D -> D"), ("norm/bias", "norm.bias", "D -> D")]
    for n, spread in enumerate((*SPREAD, 0)):
        level, inside = f"level{n + 1}", f"scratch.refinenet{n + 1}"
        rows += conv(f"{level}/project", f"projects.{n}", "D", f"C{n}", 1)
        if spread == 0:
            rows += conv(f"{level}/halve", f"resize_layers.{n}", f"C{n}", f"B{n}", 3)
        elif spread > 1:
            rows += conv(f"{level}/spread", f"resize_layers.{n}", f"C{n}", f"B{n}", spread, transposed=True)
        rows += conv(f"{level}/layer", f"scratch.layer{n + 1}_rn", f"C{n}", "F", 3)[:1]  # no bias
        for unit in (1, 2) if spread else (2,):
            for m in (1, 2):
                rows += conv(f"{level}/unit{unit}/conv{m}", f"{inside}.resConfUnit{unit}.conv{m}", "F", "G", 3)
        rows += conv(f"{level}/out", f"{inside}.out_conv", "F", "G", 1)
    rows += conv("conv1", "scratch.output_conv1", "F", "M", 3)
    rows += conv("conv2", "scratch.output_conv2.0", "M", "E", 3)
    rows += conv("conv3", "scratch.output_conv2.2", "E", "U", 1)
    return section(ours, theirs, sizes, rows)
