"""VisMem in a checkpoint: nobody has published one, so tensors and `vismem_config` of config.json are named as here."""

from vlmem_jax.records import Rule
from vlmem_jax.trees import Flat

KEY = "vismem_config"
"""Of config.json; what stands there are our own keys."""


def tensors(leaves: Flat) -> list[Rule]:
    """The memory's part of a name table: a tensor a leaf, layers stacked."""
    found = []
    for path, leaf in leaves.items():
        axes = "abcde"[: len(leaf.shape)]
        pattern, sizes = " ".join(axes), dict(zip(axes, leaf.shape, strict=True))
        found.append(Rule(f"memory/{path}", (f"vismem.{path.replace('/', '.')}",), f"{pattern} -> {pattern}", sizes))
    return found
