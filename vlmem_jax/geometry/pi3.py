"""pi3 (arXiv 2507.13347): points and cameras of views of one place, none of which is special; Pi3X is another network.

Axis letters beside those of `blocks`: P patches of a view, E what a decoder gives.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.geometry.blocks import AlternatingTrunk, Block, BlockConfig, grid_positions, places_of, through
from vlmem_jax.geometry.cameras import nearest_rotation, pose_of
from vlmem_jax.geometry.encoder import Encoder, EncoderConfig, normalised
from vlmem_jax.geometry.scene import Scene
from vlmem_jax.geometry.tensors import Shapes, block_tensors, encoder_tensors, linear_rows
from vlmem_jax.nn.linear import Linear, param
from vlmem_jax.nn.rope import Rotation
from vlmem_jax.nn.stack import stack
from vlmem_jax.records import Rule, section

Tokens = Literal["decoder", "point_decoder"]


@dataclasses.dataclass(frozen=True)
class Pi3Config:
    """Sizes, and which tokens a scene gets."""

    encoder: EncoderConfig
    trunk: BlockConfig
    pairs: int
    registers: int
    """Tokens that each view gets for the trunk; no relation to those of the encoder."""
    head: BlockConfig
    """Of the decoders of points, confidence and cameras."""
    head_layers: int
    point_width: int
    camera_width: int
    camera_layers: int
    tokens: Tokens = "decoder"
    """What a scene says of each patch: what comes out of the trunk, or of the decoder of points."""

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]], dtype: str, tokens: Tokens = "decoder") -> "Pi3Config":
        """Reads sizes off tensors; heads have the width of a norm of q everywhere. Raises ValueError naming a tensor
        that is missing."""
        shapes = Shapes(shapes)
        [head_dim] = shapes["decoder.0.attn.q_norm.weight"]
        return cls(
            encoder=shapes.encoder("encoder.", head_dim, dtype),
            trunk=shapes.block("decoder.0.", head_dim, qk_norm=True, rope=True, dtype=dtype),
            pairs=shapes.count("decoder.") // 2,
            registers=shapes["register_token"][2],
            head=shapes.block("point_decoder.blocks.0.", head_dim, layer_scale=False, rope=True, dtype=dtype),
            head_layers=shapes.count("point_decoder.blocks."),
            point_width=shapes["point_decoder.linear_out.weight"][0],
            camera_width=shapes["camera_decoder.linear_out.weight"][0],
            camera_layers=shapes.count("camera_head.res_conv."),
            tokens=tokens,
        )

    @property
    def patch_size(self) -> int:
        return self.encoder.patch_size

    @property
    def token_width(self) -> int:
        return 2 * self.trunk.width if self.tokens == "decoder" else self.point_width

    @property
    def view_width(self) -> int:
        return self.camera_width

    def flops(self, views: int, height: int, width: int, confidence: bool = True) -> int:
        """Forward FLOPs of the blocks for so many views of that size; what stands around them adds less than 1 %."""
        tokens = self.registers + (height // self.patch_size) * (width // self.patch_size)
        each = self.encoder.layers * self.encoder.block.flops(tokens, tokens)
        each += self.pairs * (self.trunk.flops(tokens, tokens) + self.trunk.flops(tokens, views * tokens))
        each += (2 + confidence) * self.head_layers * self.head.flops(tokens, tokens)
        return views * each


class HeadDecoder(nnx.Module):
    """Blocks within each view, between a map from the trunk's width and one to `outputs`."""

    def __init__(self, config: Pi3Config, outputs: int, *, rngs: nnx.Rngs):
        self.config, width = config.head, config.head.width
        self.projects = Linear({"embed": 2 * config.trunk.width}, {"mlp": width}, bias=True, rngs=rngs)
        self.layers = stack(lambda rngs: Block(config.head, rngs=rngs), config.head_layers, rngs)
        self.linear_out = Linear({"embed": width}, {"mlp": outputs}, bias=True, rngs=rngs)

    def __call__(self, hidden_NTD: Float[Array, "N T D"], places: Rotation) -> Float[Array, "N T E"]:
        x = self.projects(hidden_NTD.astype(self.config.dtype)).astype(jnp.float32)
        return self.linear_out(through(self.layers, x, places).astype(self.config.dtype)).astype(jnp.float32)


class Residual(nnx.Module):
    """x + relu(W3 relu(W2 relu(W1 x)))."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.fc1, self.fc2, self.fc3 = (Linear({"embed": width}, {"mlp": width}, bias=True, rngs=rngs) for _ in "123")

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x
        for linear in (self.fc1, self.fc2, self.fc3):
            y = jax.nn.relu(linear(y))
        return x + y


class CameraHead(nnx.Module):
    """The place and the direction of a camera, of what its decoder gives for the patches."""

    def __init__(self, width: int, layers: int, *, rngs: nnx.Rngs):
        self.residual = stack(lambda rngs: Residual(width, rngs=rngs), layers, rngs)
        self.fc1, self.fc2 = (Linear({"embed": width}, {"mlp": width}, bias=True, rngs=rngs) for _ in "12")
        self.place = Linear({"embed": width}, {"mlp": 3}, bias=True, rngs=rngs)
        self.turn = Linear({"embed": width}, {"mlp": 9}, bias=True, rngs=rngs)

    def __call__(self, x_NPE: Float[Array, "N P E"]) -> Float[Array, "N 4 4"]:
        """Camera to world."""
        graph, layers = nnx.split(self.residual)
        x_NPE, _ = jax.lax.scan(lambda x, state: (nnx.merge(graph, state)(x), None), x_NPE, layers)
        x_NE = x_NPE.mean(axis=1)
        for linear in (self.fc1, self.fc2):
            x_NE = jax.nn.relu(linear(x_NE))
        return pose_of(nearest_rotation(self.turn(x_NE)), self.place(x_NE))


class Pi3(nnx.Module):
    """Images of N views in any order, whose sides are multiples of a patch, to a scene."""

    def __init__(self, config: Pi3Config, *, rngs: nnx.Rngs):
        self.config, p, width = config, config.patch_size, config.point_width
        self.encoder = Encoder(config.encoder, rngs=rngs)
        normal = nnx.initializers.normal(1e-6)
        self.registers = param(normal, (config.registers, config.trunk.width), ("positions", "norm"), rngs)
        self.trunk = AlternatingTrunk(config.trunk, config.pairs, rngs=rngs)
        self.point_decoder, self.conf_decoder = (HeadDecoder(config, width, rngs=rngs) for _ in range(2))
        self.camera_decoder = HeadDecoder(config, config.camera_width, rngs=rngs)
        pixels = {"pixels": p, "pixels_x": p}
        self.point_head = Linear({"embed": width}, {"channels": 3, **pixels}, bias=True, rngs=rngs)
        self.conf_head = Linear({"embed": width}, {"channels": 1, **pixels}, bias=True, rngs=rngs)
        self.camera_head = CameraHead(config.camera_width, config.camera_layers, rngs=rngs)

    def places(self, images_NHWc: Float[Array, "N H W 3"], block: BlockConfig) -> Rotation:
        """Of the tokens of each view, for such blocks."""
        N, H, W, _ = images_NHWc.shape
        p = self.config.patch_size
        positions = jnp.asarray(grid_positions(H // p, W // p, self.config.registers))
        return places_of(jnp.broadcast_to(positions, (N, *positions.shape)), block.head_dim)

    def decoded(self, images_NHWc: Float[Array, "N H W 3"], keep: tuple[int, ...]) -> Float[Array, "K N T D"]:
        """What comes out of the pairs `keep` of the trunk, of normalised images."""
        x_NPD, places = self.encoder(images_NHWc), self.places(images_NHWc, self.config.trunk)
        registers = jnp.broadcast_to(self.registers[...], (len(x_NPD), *self.registers.shape))
        return self.trunk(jnp.concatenate([registers, x_NPD], axis=1), places, keep)

    def scene(self, images_NHWc: Array, confidence: bool) -> Scene:
        """The scene of images as `normalised` takes them; without `confidence` all of it is 1, and nothing computed."""
        images_NHWc = normalised(images_NHWc)
        places, special = self.places(images_NHWc, self.config.head), self.config.registers
        hidden_NTD = self.decoded(images_NHWc, (self.config.pairs - 1,))[0]
        point_NPE, camera_NPE = (
            decoder(hidden_NTD, places)[:, special:] for decoder in (self.point_decoder, self.camera_decoder)
        )
        shape = images_NHWc.shape[:3]
        confidence_NHW = jnp.ones(shape, jnp.float32)
        if confidence:
            conf_NPE = self.conf_decoder(hidden_NTD, places)[:, special:]
            confidence_NHW = jax.nn.sigmoid(self.logits(conf_NPE, shape))
        points_NHW3, poses_N44 = self.points(point_NPE, shape), self.poses(camera_NPE)
        tokens_NPG = hidden_NTD[:, special:] if self.config.tokens == "decoder" else point_NPE
        return Scene(points_NHW3, confidence_NHW, poses_N44, tokens_NPG, camera_NPE)

    def points(self, x_NPE: Float[Array, "N P E"], shape: tuple[int, int, int]) -> Float[Array, "N H W 3"]:
        """The point of each pixel as its camera sees it, of what the decoder of points gives for patches."""
        raw_NHW3 = self._pixels(self.point_head, x_NPE, shape)
        depth_NHW1 = jnp.exp(raw_NHW3[..., 2:])
        return jnp.concatenate([raw_NHW3[..., :2] * depth_NHW1, depth_NHW1], axis=-1)

    def logits(self, x_NPE: Float[Array, "N P E"], shape: tuple[int, int, int]) -> Float[Array, "N H W"]:
        """Of the confidence of each pixel, of what its decoder gives for patches."""
        return self._pixels(self.conf_head, x_NPE, shape)[..., 0]

    def poses(self, x_NPE: Float[Array, "N P E"]) -> Float[Array, "N 4 4"]:
        """Camera to world, of what the decoder of cameras gives for patches."""
        with jax.default_matmul_precision("float32"):
            return self.camera_head(x_NPE)

    def _pixels(
        self, head: Linear, x_NPE: Float[Array, "N P E"], shape: tuple[int, int, int]
    ) -> Float[Array, "N H W c"]:
        """What `head` gives for the pixels of each patch, put where they are."""
        N, H, W = shape
        p = self.config.patch_size
        with jax.default_matmul_precision("float32"):
            y = head(x_NPE).reshape(N, H // p, W // p, -1, p, p)
        return y.transpose(0, 1, 4, 2, 5, 3).reshape(N, H, W, -1)


# --- tensors ----------------------------------------------------------------------------------------------------------

HEADS = ("point_head/", "conf_head/", "camera_head/")
"""What is computed in fp32 from weights in fp32, in models of any dtype."""
UNREAD = re.compile(r"image_(mean|std)$")
"""Names of buffers, which are the same in all checkpoints."""


def name_table(config: Pi3Config) -> list[Rule]:
    """Every leaf of the parameters and the tensors it comes from."""
    sizes = {"D": config.trunk.width, "R": config.registers, "E": config.point_width, "V": config.camera_width}
    sizes |= {"p": config.patch_size, "q": config.patch_size, "W": config.head.width, "G": 2 * config.trunk.width}
    rows = [
        ("registers", "register_token", "1 1 R D -> R D"),
        ("point_head/kernel", "point_head.proj.weight", "(3 p q) E -> E 3 p q"),
        ("point_head/bias", "point_head.proj.bias", "(3 p q) -> 3 p q"),
        ("conf_head/kernel", "conf_head.proj.weight", "(c p q) E -> E c p q"),
        ("conf_head/bias", "conf_head.proj.bias", "(c p q) -> c p q"),
    ]
    heads = {"fc1": "more_mlps.0", "fc2": "more_mlps.2", "place": "fc_t", "turn": "fc_rot"}
    for ours, theirs in heads.items():
        outputs = {"place": "3", "turn": "9"}.get(ours, "U")
        rows += linear_rows(f"camera_head/{ours}", f"camera_head.{theirs}", "V", outputs)
    for name, outputs in (("point", "E"), ("conf", "E"), ("camera", "V")):
        rows += linear_rows(f"{name}_decoder/projects", f"{name}_decoder.projects", "G", "W")
        rows += linear_rows(f"{name}_decoder/linear_out", f"{name}_decoder.linear_out", "W", outputs)
    residual = [row for n in "123" for row in linear_rows(f"fc{n}", f"res_conv{n}", "V", "U")]
    sizes |= {"c": 1, "U": config.camera_width}
    rules = encoder_tensors(config.encoder, "encoder/", "encoder.")
    for n, name in enumerate(("within", "across")):
        rules += block_tensors(config.trunk, f"trunk/pairs/{name}/", "decoder.{}.", range(n, 2 * config.pairs, 2))
    for name in ("point", "conf", "camera"):
        layers = range(config.head_layers)
        rules += block_tensors(config.head, f"{name}_decoder/layers/", f"{name}_decoder.blocks.{{}}.", layers)
    theirs = "camera_head.res_conv.{}."
    rules += section("camera_head/residual/", theirs, sizes, residual, range(config.camera_layers))
    return rules + section("", "", sizes, rows)
