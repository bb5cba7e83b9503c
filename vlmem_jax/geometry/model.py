"""One front for all models of geometry: views in, a scene out."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from vlmem_jax.geometry import pi3, vggt
from vlmem_jax.geometry.checkpoint import opened
from vlmem_jax.geometry.pi3 import Tokens
from vlmem_jax.geometry.scene import Scene
from vlmem_jax.hub.fit import parameters
from vlmem_jax.hub.safetensors_io import digest
from vlmem_jax.records import Rule
from vlmem_jax.runtime.compiler import options


class Net(NamedTuple):
    """What the front knows of a kind of model."""

    config: Callable[..., Any]
    """`config(shapes of tensors, dtype, tokens)`."""
    module: Callable[..., nnx.Module]
    """`module(config, rngs=)`, which has a method `scene(images, confidence)`."""
    name_table: Callable[[Any], list[Rule]]
    heads: tuple[str, ...]
    """Beginnings of the paths of parameters that are held in fp32."""
    unread: re.Pattern[str]
    """Names of tensors that nothing computes with."""


NETS = {
    "pi3": Net(pi3.Pi3Config.of_shapes, pi3.Pi3, pi3.name_table, pi3.HEADS, pi3.UNREAD),
    "vggt": Net(vggt.VGGTConfig.of_shapes, vggt.VGGT, vggt.name_table, vggt.HEADS, vggt.UNREAD),
}
"""By kind."""


@dataclasses.dataclass(frozen=True)
class GeometryModel:
    """A frozen model of geometry and its parameters, on one device of this host."""

    kind: str
    config: Any
    params: dict[str, Any] = dataclasses.field(repr=False)
    digest: str
    """Tells its checkpoint from others."""

    @property
    def patch_size(self) -> int:
        """Pixels along a side of a patch, of which sides of images are multiples."""
        return self.config.patch_size

    @property
    def token_width(self) -> int:
        """G of a `Scene`."""
        return self.config.token_width

    @property
    def view_width(self) -> int:
        """V of a `Scene`."""
        return self.config.view_width

    def scene(
        self,
        images_NHWc: UInt8[Array | np.ndarray, "N H W 3"] | Float[Array | np.ndarray, "N H W 3"],
        confidence: bool = False,
    ) -> Scene:
        """What it makes of N views of one place, bytes or numbers from 0 to 1; compiled once for each shape.

        Without `confidence`, which costs a decoder more, it is 1 everywhere. Raises ValueError for images whose sides
        are no multiples of a patch, or whose numbers are out of range.
        """
        _, H, W, _ = images_NHWc.shape
        p = self.patch_size
        if H % p or W % p:
            near = (max(side // p, 1) * p for side in (W, H))
            raise ValueError(
                f"sides of images for {self.kind} must be multiples of {p} pixels, got {W}x{H}; crop or resize them to "
                f"{'x'.join(map(str, near))}"
            )
        if images_NHWc.dtype != np.uint8 and not 0 <= float(images_NHWc.min()) <= float(images_NHWc.max()) <= 1:
            low, high = float(images_NHWc.min()), float(images_NHWc.max())
            raise ValueError(f"numbers of images must be from 0 to 1, or bytes as uint8; got {low:g} to {high:g}")
        return self._program(self.params, jax.device_put(images_NHWc, jax.local_devices()[0]), confidence)

    @functools.cached_property
    def _program(self) -> Callable[..., Scene]:
        graph = nnx.graphdef(nnx.eval_shape(lambda: NETS[self.kind].module(self.config, rngs=nnx.Rngs(0))))

        def run(params: dict[str, Any], images_NHWc: Array, confidence: bool) -> Scene:
            return nnx.merge(graph, params).scene(images_NHWc, confidence)

        return jax.jit(run, static_argnums=2, compiler_options=options(None))


def load_geometry(source: str | os.PathLike, dtype: str = "bfloat16", tokens: Tokens = "decoder") -> GeometryModel:
    """The model of a public checkpoint of pi3 or VGGT: a folder, a .safetensors file, or a repository of the hub.

    dtype: of matrix products, but for those of the heads, which are fp32; kernels are held as they are used. tokens:
    what a scene of pi3 says of each patch. Raises ValueError for another network, and listing tensors that do not fit.
    """
    kind, tensors = opened(source)
    net = NETS[kind]
    config = net.config({name: x.shape for name, x in tensors.items()}, dtype, tokens)

    def dtype_of(path: str) -> str:
        return dtype if path.endswith("/kernel") and not path.startswith(net.heads) else "float32"

    params = parameters(net.name_table(config), tensors, dtype_of, str(source), net.unread.match)
    return GeometryModel(kind, config, params, digest(tensors))
