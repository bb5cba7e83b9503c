"""Public checkpoints of models of geometry: which model they hold, what tells them from others, its parameters."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmem_jax.hub import repos
from vlmem_jax.hub.fit import check_fit
from vlmem_jax.hub.leaves import FromTensors
from vlmem_jax.hub.safetensors_io import Tensors
from vlmem_jax.paths import is_remote
from vlmem_jax.records import Rule
from vlmem_jax.trees import unflatten

MARKS = {"pi3": "register_token", "vggt": "aggregator.camera_token"}
"""A tensor of each model that others lack."""
PI3X = re.compile(r"(.*\.)?mask_token$|(metric|ray|depth|pose)_\w+\b|(point|conf)_head\.(?!proj\.)")
"""Names of tensors that Pi3X has beside those of pi3, or in their place."""
SAMPLE = 16
"""Numbers of each tensor that its digest depends on."""


def opened(source: str | os.PathLike) -> tuple[str, Tensors]:
    """What model the checkpoint is of, a name of MARKS, and its tensors.

    `source`: a folder or a .safetensors file on a disk, or a repository of the hub. Raises ValueError where it holds no
    such model, and what `repos.folder` raises.
    """
    if is_remote(source):
        raise ValueError(f"the checkpoint of a model of geometry must lie on a disk; got {source}")
    path = Path(repos.folder(source))
    if not path.exists():
        raise ValueError(f"a model of geometry is a folder or a .safetensors file; there is no {path}")
    tensors = Tensors(path.parent, path.stem) if path.suffix == ".safetensors" else Tensors(path)
    kind = next((kind for kind, mark in MARKS.items() if mark in tensors), None)
    if kind is None:
        marks = ", ".join(f"{mark} ({kind})" for kind, mark in MARKS.items())
        raise ValueError(f"{source} holds no model of geometry that is known here: none of the tensors {marks}")
    if kind == "pi3" and (strange := next(filter(PI3X.match, tensors), None)):
        raise ValueError(
            f"{source} is Pi3X, a later network with convolutional heads, not pi3: it has {strange}; take a checkpoint "
            "of pi3, such as yyfz233/Pi3"
        )
    return kind, tensors


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Tells a checkpoint from others by names, shapes, dtypes and the first numbers of its tensors, however they are
    spread over files: few bytes are read."""
    content = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        x = tensors[name]
        content.update(repr((name, x.shape, x.dtype.name, x.reshape(-1)[:SAMPLE].tobytes())).encode())
    return content.hexdigest()


def parameters(
    rules: Sequence[Rule],
    tensors: Mapping[str, np.ndarray],
    dtype_of: Callable[[str], jax.typing.DTypeLike],
    what: str,
    unread: Callable[[str], Any],
) -> dict[str, Any]:
    """What `rules` make of tensors, on this host's first device, each in the dtype that its path has; one after the
    other, to need little memory. Raises ValueError as `check_fit`, and for numbers that are not finite."""
    check_fit(rules, tensors, what, unread)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = {rule.ours: FromTensors(rule, tensors) for rule in rules}
    return unflatten({path: leaf.array(place, jnp.dtype(dtype_of(path))) for path, leaf in leaves.items()})
