"""VGGT (arXiv 2503.11651): points and cameras of views of one place, in the frame of the first.

Axis letters beside those of `blocks`: P patches of a view, G = 2 * D what a pair of blocks gives.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.geometry.blocks import AlternatingTrunk, Block, BlockConfig, grid_positions, places_of, through
from vlmem_jax.geometry.cameras import pose_of, rotation_of
from vlmem_jax.geometry.dpt import DPT, DPTConfig, dpt_tensors
from vlmem_jax.geometry.encoder import Encoder, EncoderConfig, normalised
from vlmem_jax.geometry.scene import Scene
from vlmem_jax.geometry.tensors import Shapes, block_tensors, encoder_tensors, linear_rows, norm_rows
from vlmem_jax.nn.linear import Linear, param
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm
from vlmem_jax.nn.stack import stack
from vlmem_jax.records import Rule, section

NORM_EPS, PLAIN_NORM_EPS = 1e-5, 1e-6
POSE = 9
"""Numbers of a pose: place, quaternion with its real part last, two fields of view; of the world as the camera sees
it."""
ROUNDS = 4
"""In which a pose is refined."""
CAMERA_HEADS = 16
"""Of the camera head's attention, which no shape tells."""
DEPTHS = (5, 12, 18, 24)
"""After how many of 24 pairs the tokens are what dense heads read."""


@dataclasses.dataclass(frozen=True)
class VGGTConfig:
    """Sizes."""

    encoder: EncoderConfig
    trunk: BlockConfig
    pairs: int
    registers: int
    """Tokens that each view gets for the trunk beside that of its camera."""
    dense: tuple[int, int, int, int]
    """Pairs whose tokens the heads of points and depth read; the last of them is the last."""
    camera: BlockConfig
    camera_layers: int
    pose_width: int
    """Of the hidden layer behind the camera's blocks."""
    points: DPTConfig
    depth: DPTConfig

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]], dtype: str, tokens: str = "decoder") -> "VGGTConfig":
        """Reads sizes off tensors, as `Pi3Config.of_shapes`. Raises ValueError where `tokens` are of another model."""
        if tokens != "decoder":
            raise ValueError(f'VGGT has no {tokens}: tokens must be "decoder", what comes out of its trunk')
        shapes, inside = Shapes(shapes), "aggregator."
        [head_dim] = shapes[f"{inside}frame_blocks.0.attn.q_norm.weight"]
        pairs, encoder = (
            shapes.count(f"{inside}frame_blocks."),
            shapes.encoder(f"{inside}patch_embed.", head_dim, dtype),
        )
        mlp_width, width = shapes["camera_head.trunk.0.mlp.fc1.weight"]
        return cls(
            encoder=encoder,
            trunk=shapes.block(
                f"{inside}frame_blocks.0.", head_dim, norm_eps=NORM_EPS, qk_norm=True, rope=True, dtype=dtype
            ),
            pairs=pairs,
            registers=shapes[f"{inside}register_token"][2],
            dense=tuple(max(round(pairs * depth / DEPTHS[-1]), 1) - 1 for depth in DEPTHS),
            camera=BlockConfig(width, CAMERA_HEADS, mlp_width, norm_eps=NORM_EPS, dtype="float32"),
            camera_layers=shapes.count("camera_head.trunk."),
            pose_width=shapes["camera_head.pose_branch.fc1.weight"][0],
            points=_dense(shapes, "point_head.", encoder.patch_size),
            depth=_dense(shapes, "depth_head.", encoder.patch_size),
        )

    def __post_init__(self):
        if self.dense[-1] != self.pairs - 1:
            raise ValueError(f"the last of the pairs dense must be the last of {self.pairs}, got {self.dense}")

    @property
    def patch_size(self) -> int:
        return self.encoder.patch_size

    @property
    def token_width(self) -> int:
        return 2 * self.trunk.width

    @property
    def view_width(self) -> int:
        return 2 * self.trunk.width


def _dense(shapes: Shapes, theirs: str, patch_size: int) -> DPTConfig:
    levels = [shapes[f"{theirs}projects.{n}.weight"] for n in range(4)]
    hidden, half = shapes[f"{theirs}scratch.output_conv2.0.weight"][:2]
    return DPTConfig(
        width=levels[0][1],
        channels=tuple(level[0] for level in levels),
        features=shapes[f"{theirs}scratch.layer1_rn.weight"][0],
        half=half,
        hidden=hidden,
        outputs=shapes[f"{theirs}scratch.output_conv2.2.weight"][0],
        patch_size=patch_size,
    )


class CameraHead(nnx.Module):
    """A pose for each view, of the tokens of all cameras, refined round by round."""

    def __init__(self, config: VGGTConfig, *, rngs: nnx.Rngs):
        width = config.camera.width
        self.token_norm, self.trunk_norm = (LayerNorm(width, NORM_EPS, rngs=rngs) for _ in range(2))
        self.empty = param(nnx.initializers.zeros, (POSE,), ("norm",), rngs)
        self.embed = Linear({"embed": POSE}, {"mlp": width}, bias=True, rngs=rngs)
        self.modulate = Linear({"embed": width}, {"qkv": 3, "mlp": width}, bias=True, rngs=rngs)
        self.layers = stack(lambda rngs: Block(config.camera, rngs=rngs), config.camera_layers, rngs)
        self.pose = GeluMLP(width, config.pose_width, POSE, rngs=rngs)

    def __call__(self, tokens_NG: Float[Array, "N G"]) -> Float[Array, "R N 9"]:
        """The poses of every round."""
        x_NG = self.token_norm(tokens_NG)
        plain_NG = jax.nn.standardize(x_NG, axis=-1, epsilon=PLAIN_NORM_EPS)

        def refine(carry, _):
            shown_N9, pose_N9 = carry
            shift, scale, gate = jnp.moveaxis(self.modulate(jax.nn.silu(self.embed(shown_N9))), 1, 0)
            y_1NG = through(self.layers, (x_NG + gate * (plain_NG * (1 + scale) + shift))[None])
            pose_N9 += self.pose(self.trunk_norm(y_1NG[0]))
            return (pose_N9, pose_N9), pose_N9

        start_N9 = jnp.broadcast_to(self.empty[...], (len(x_NG), POSE))
        raw_RN9 = jax.lax.scan(refine, (start_N9, jnp.zeros_like(start_N9)), None, ROUNDS)[1]
        return jnp.concatenate([raw_RN9[..., :7], jax.nn.relu(raw_RN9[..., 7:])], axis=-1)


class Dense(NamedTuple):
    """What a dense head says of each pixel."""

    values_NHWc: Float[Array, "N H W c"]
    logits_NHW: Float[Array, "N H W"]
    """Of how sure it is."""


class VGGT(nnx.Module):
    """Images of N views, of which the first is the reference, to a scene; their sides are multiples of a patch."""

    def __init__(self, config: VGGTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config.encoder, rngs=rngs)
        width, normal, axes = config.trunk.width, nnx.initializers.normal(1e-6), ("positions", "positions", "norm")
        self.camera_token = param(normal, (2, 1, width), axes, rngs)
        self.registers = param(normal, (2, config.registers, width), axes, rngs)
        self.trunk = AlternatingTrunk(config.trunk, config.pairs, rngs=rngs)
        self.camera_head = CameraHead(config, rngs=rngs)
        self.point_head, self.depth_head = (DPT(c, rngs=rngs) for c in (config.points, config.depth))

    def decoded(self, images_NHWc: Float[Array, "N H W 3"], keep: tuple[int, ...]) -> Float[Array, "K N T G"]:
        """What comes out of the pairs `keep` of the trunk, of normalised images."""
        N, H, W, _ = images_NHWc.shape
        p = self.config.patch_size
        x_NPD = self.encoder(images_NHWc)
        special = jnp.concatenate([self.camera_token[...], self.registers[...]], axis=1)
        special = special[jnp.minimum(jnp.arange(N), 1)]  # the first view's, then that of all others
        positions = jnp.asarray(grid_positions(H // p, W // p, special.shape[1]))
        places = places_of(jnp.broadcast_to(positions, (N, *positions.shape)), self.config.trunk.head_dim)
        return self.trunk(jnp.concatenate([special, x_NPD], axis=1), places, keep)

    def poses(self, last_NTG: Float[Array, "N T G"]) -> Float[Array, "R N 9"]:
        """The poses of every round, of the tokens of the last pair."""
        with jax.default_matmul_precision("float32"):
            return self.camera_head(last_NTG[:, 0])

    def points(self, kept_4NTG: Float[Array, "4 N T G"], height: int, width: int) -> Dense:
        """The point of each pixel in the first view's frame."""
        raw_NHW4 = self._dense(self.point_head, kept_4NTG, height, width)
        points_NHW3 = raw_NHW4[..., :3]
        return Dense(jnp.sign(points_NHW3) * jnp.expm1(jnp.abs(points_NHW3)), raw_NHW4[..., 3])

    def depth(self, kept_4NTG: Float[Array, "4 N T G"], height: int, width: int) -> Dense:
        """How deep the point of each pixel lies."""
        raw_NHW2 = self._dense(self.depth_head, kept_4NTG, height, width)
        return Dense(jnp.exp(raw_NHW2[..., :1]), raw_NHW2[..., 1])

    def _dense(self, head: DPT, kept_4NTG: Float[Array, "4 N T G"], height: int, width: int) -> Float[Array, "N H W c"]:
        patches_N4PG = kept_4NTG[:, :, 1 + self.config.registers :].swapaxes(0, 1)
        with jax.default_matmul_precision("float32"):  # view by view: maps of all would take gigabytes
            return jax.lax.map(lambda tokens_4PG: head(tokens_4PG, height, width), patches_N4PG)

    def scene(self, images_NHWc: Array, confidence: bool) -> Scene:
        """The scene of images as `normalised` takes them; without `confidence` all of it is 1.

        Points are turned from the first view's frame into that of each camera, so that its pose turns them back.
        """
        N, H, W, _ = images_NHWc.shape
        kept_4NTG = self.decoded(normalised(images_NHWc), self.config.dense)
        last_NTG = kept_4NTG[-1]
        dense, pose_N9 = self.points(kept_4NTG, H, W), self.poses(last_NTG)[-1]
        turn_N33, move_N3 = rotation_of(pose_N9[:, 3:7]), pose_N9[:, :3]
        with jax.default_matmul_precision("float32"):
            own_NHW3 = jnp.einsum("nij,nhwj->nhwi", turn_N33, dense.values_NHWc) + move_N3[:, None, None]
            back_N33 = turn_N33.swapaxes(1, 2)
            poses_N44 = pose_of(back_N33, -jnp.einsum("nij,nj->ni", back_N33, move_N3))
        sure_NHW = jax.nn.sigmoid(dense.logits_NHW) if confidence else jnp.ones((N, H, W), jnp.float32)
        tokens_NPG = last_NTG[:, 1 + self.config.registers :]
        views_NPG = jnp.broadcast_to(last_NTG[:, :1], tokens_NPG.shape)
        return Scene(own_NHW3, sure_NHW, poses_N44, tokens_NPG, views_NPG)


# --- tensors ----------------------------------------------------------------------------------------------------------

HEADS = ("camera_head/", "point_head/", "depth_head/")
"""What is computed in fp32 from weights in fp32, in models of any dtype."""
UNREAD = re.compile(r"track_head\.|aggregator\.patch_embed\.mask_token$")
"""Names of tensors that nothing computes with."""


def name_table(config: VGGTConfig) -> list[Rule]:
    """Every leaf of the parameters and the tensors it comes from."""
    sizes = {"D": config.trunk.width, "R": config.registers, "V": 2, "K": 1}
    tokens = [
        ("camera_token", "camera_token", "1 V K D -> V K D"),
        ("registers", "register_token", "1 V R D -> V R D"),
    ]
    head_sizes = {"D": config.camera.width, "E": config.camera.width, "F": config.pose_width, "N": POSE}
    head = [
        ("empty", "empty_pose_tokens", "1 1 N -> N"),
        ("modulate/kernel", "poseLN_modulation.1.weight", "(3 E) D -> D 3 E"),
        ("modulate/bias", "poseLN_modulation.1.bias", "(3 E) -> 3 E"),
        *linear_rows("embed", "embed_pose", "N", "D"),
        *linear_rows("pose/fc1", "pose_branch.fc1", "D", "F"),
        *linear_rows("pose/fc2", "pose_branch.fc2", "F", "N"),
        *norm_rows("token_norm"),
        *norm_rows("trunk_norm"),
    ]
    rules = encoder_tensors(config.encoder, "encoder/", "aggregator.patch_embed.")
    for ours, theirs in (("within", "frame"), ("across", "global")):
        names = f"aggregator.{theirs}_blocks.{{}}."
        rules += block_tensors(config.trunk, f"trunk/pairs/{ours}/", names, range(config.pairs))
    rules += block_tensors(config.camera, "camera_head/layers/", "camera_head.trunk.{}.", range(config.camera_layers))
    rules += section("", "aggregator.", sizes, tokens) + section("camera_head/", "camera_head.", head_sizes, head)
    for name, dense in (("point_head", config.points), ("depth_head", config.depth)):
        rules += dpt_tensors(dense, f"{name}/", f"{name}.")
    return rules
