"""What checkpoints of models of geometry call the parts that these have in common, and the sizes that shapes tell."""

from vlmem_jax.geometry.blocks import BlockConfig
from vlmem_jax.geometry.encoder import EncoderConfig
from vlmem_jax.records import Rule, section


def block_sizes(config: BlockConfig) -> dict[str, int]:
    """Axes of the tensors of a block."""
    return {"D": config.width, "F": config.mlp_width, "H": config.heads, "C": config.head_dim}


def block_tensors(config: BlockConfig, ours: str, theirs: str, layers: range) -> list[Rule]:
    """Rules of stacked blocks; `theirs` holds {} for the number of one."""
    linear = [("attn/proj", "D (H C) -> H C D"), ("mlp/fc1", "F D -> D F"), ("mlp/fc2", "D F -> F D")]
    rows = [("attn/qkv/kernel", "attn.qkv.weight", "(3 H C) D -> D 3 H C"),
            ("attn/qkv/bias", "attn.qkv.bias", "(3 H C) -> 3 H C")]  # fmt: skip
    for name, pattern in linear:
        out = pattern.split()[0]
        rows += [(f"{name}/kernel", f"{name.replace('/', '.')}.weight", pattern)]
        rows += [(f"{name}/bias", f"{name.replace('/', '.')}.bias", f"{out} -> {out}")]
    rows += norm_rows("norm1") + norm_rows("norm2")
    if config.qk_norm:
        rows += norm_rows("attn/q_norm", "C") + norm_rows("attn/k_norm", "C")
    if config.layer_scale:
        rows += [(name, f"{name}.gamma", "D -> D") for name in ("ls1", "ls2")]
    return section(ours, theirs, block_sizes(config), rows, layers)


def norm_rows(ours: str, axis: str = "D", theirs: str | None = None) -> list[tuple[str, str, str]]:
    """Rows of `records.section` for a norm; `theirs`: its name there, if not ours with dots."""
    theirs = ours.replace("/", ".") if theirs is None else theirs
    return [(f"{ours}/scale", f"{theirs}.weight", f"{axis} -> {axis}"),
            (f"{ours}/bias", f"{theirs}.bias", f"{axis} -> {axis}")]  # fmt: skip


def linear_rows(ours: str, theirs: str, inputs: str, outputs: str) -> list[tuple[str, str, str]]:
    """Rows of `records.section` for a linear map from one axis to another."""
    return [(f"{ours}/kernel", f"{theirs}.weight", f"{outputs} {inputs} -> {inputs} {outputs}"),
            (f"{ours}/bias", f"{theirs}.bias", f"{outputs} -> {outputs}")]  # fmt: skip


def encoder_tensors(config: EncoderConfig, ours: str, theirs: str) -> list[Rule]:
    """Rules of the encoder."""
    p = config.patch_size
    sizes = block_sizes(config.block) | {"p": p, "q": p, "P": 1 + config.grid**2, "R": config.registers}
    rows = [
        ("class_token", "cls_token", "1 1 D -> D"),
        ("positions", "pos_embed", "1 P D -> P D"),
        ("registers", "register_tokens", "1 R D -> R D"),
        ("patch/kernel", "patch_embed.proj.weight", "D 3 p q -> p q 3 D"),
        ("patch/bias", "patch_embed.proj.bias", "D -> D"),
        *norm_rows("norm"),
    ]
    blocks = block_tensors(config.block, f"{ours}layers/", f"{theirs}blocks.{{}}.", range(config.layers))
    return [*section(ours, theirs, sizes, rows), *blocks]


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of a checkpoint's tensors by name, from which sizes are read. Raises ValueError for one that it lacks."""

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise ValueError(f"the checkpoint lacks the tensor {name}, from which sizes of the model are read")

    def count(self, theirs: str) -> int:
        """How many numbered parts begin with `theirs`."""
        rest = (name.removeprefix(theirs).partition(".")[0] for name in self if name.startswith(theirs))
        return 1 + max((int(number) for number in rest if number.isdigit()), default=-1)

    def block(self, theirs: str, head_dim: int, **more) -> BlockConfig:
        """The block whose tensors begin with `theirs`."""
        mlp_width, width = self[f"{theirs}mlp.fc1.weight"]
        return BlockConfig(width, width // head_dim, mlp_width, **more)

    def encoder(self, theirs: str, head_dim: int, dtype: str) -> EncoderConfig:
        """The encoder whose tensors begin with `theirs`."""
        _, positions, _ = self[f"{theirs}pos_embed"]
        return EncoderConfig(
            block=self.block(f"{theirs}blocks.0.", head_dim, dtype=dtype),
            layers=self.count(f"{theirs}blocks."),
            grid=round((positions - 1) ** 0.5),
            registers=self[f"{theirs}register_tokens"][1],
            patch_size=self[f"{theirs}patch_embed.proj.weight"][-1],
        )
