"""What checkpoints of models of geometry call the parts that these have in common, and the sizes that shapes tell."""

from vlmem_jax.geometry.blocks import BlockConfig
from vlmem_jax.geometry.encoder import EncoderConfig
from vlmem_jax.records import Rule, section


def block_sizes(config: BlockConfig) -> dict[str, int]:
    """Axes of the tensors of a block: of a head, C, or z r, halves of the pairs of each of the axes a."""
    sizes = {"D": config.width, "F": config.mlp_width, "H": config.heads, "C": config.head_dim}
    return sizes | {"a": 2, "z": 2, "r": config.head_dim // 4}


def block_tensors(config: BlockConfig, ours: str, theirs: str, layers: range) -> list[Rule]:
    """Rules of stacked blocks; `theirs` holds {} for the number of one."""
    head, own = ("a z r", "(z a r)") if config.rope else ("C", "C")
    rows = [
        ("attn/qkv/kernel", "attn.qkv.weight", f"(3 H {head}) D -> D 3 H {own}"),
        ("attn/qkv/bias", "attn.qkv.bias", f"(3 H {head}) -> 3 H {own}"),
        ("attn/proj/kernel", "attn.proj.weight", f"D (H {head}) -> H {own} D"),
        ("attn/proj/bias", "attn.proj.bias", "D -> D"),
        *linear_rows("mlp/fc1", "mlp.fc1", "D", "F"),
        *linear_rows("mlp/fc2", "mlp.fc2", "F", "D"),
        *norm_rows("norm1"),
        *norm_rows("norm2"),
    ]
    if config.qk_norm:
        rows += [
            (f"attn/{n}_norm/{leaf}", f"attn.{n}_norm.{tensor}", f"({head}) -> {own}")
            for n in "qk"
            for leaf, tensor in (("scale", "weight"), ("bias", "bias"))
        ]
    if config.layer_scale:
        rows += [(name, f"{name}.gamma", "D -> D") for name in ("ls1", "ls2")]
    return section(ours, theirs, block_sizes(config), rows, layers)


def norm_rows(name: str) -> list[tuple[str, str, str]]:
    """Rows of `records.section` for a norm over D."""
    return [(f"{name}/scale", f"{name}.weight", "D -> D"), (f"{name}/bias", f"{name}.bias", "D -> D")]


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
