"""Low-rank adapters of a model: their modules, which of them a batch goes through, and weights with one merged in."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.models.config import AdapterConfig, ModelConfig
from vlmem_jax.nn.lora import Adapters, LoRA, LoRAConfig
from vlmem_jax.nn.stack import stack


def make_adapters(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Dict | None:
    """The adapters of a model by name, and by the part of the model that they are in; None of a model without."""
    layers = {"decoder": config.decoder.layers, "vision": config.vision.layers}

    def make(part: str, lora: LoRAConfig) -> LoRA:
        maps = config.linear_maps[part]
        return stack(lambda rngs: LoRA(lora, maps, rngs=rngs), layers[part], rngs)

    made = {one.name: nnx.Dict({part: make(part, lora) for part, lora in one.parts.items()}) for one in config.adapters}
    return nnx.Dict(made) if made else None


def chosen_adapters(
    config: ModelConfig,
    modules: Mapping[str, Mapping[str, LoRA]],
    part: str,
    choice: int | Int32[Array, "B"],
    key: jax.Array | None,
) -> Adapters | None:
    """What `part` of the model applies: one adapter to all rows, or to each row its own; below 0: none.

    None where nothing of it is in this part: the program is then that of a model without.
    """
    configs = config.adapters
    if isinstance(choice, int):
        configs = configs[choice : choice + 1] if choice >= 0 else ()
    numbers = [n for n, one in enumerate(configs) if part in one.parts]
    if not numbers:
        return None
    index_B = None
    if not isinstance(choice, int):  # among those of this part
        places = np.full(len(configs) + 1, -1, np.int32)
        places[numbers] = range(len(numbers))
        index_B = jnp.array(places)[jnp.maximum(choice, -1)]
    loras, adapters = zip(*((configs[n].parts[part], modules[configs[n].name][part]) for n in numbers), strict=True)
    return Adapters.of(loras, adapters, index_B, key)


def merged(
    config: ModelConfig,
    adapter: AdapterConfig,
    leaves: Mapping[str, np.ndarray],
    path: str,
    kernel: Float[np.ndarray, "L ..."],
) -> Float[np.ndarray, "L ..."]:
    """The kernel `path` of stacked layers as it is with W + scale B A in place of W, in fp32; others as they are.

    `leaves`: A and B by path in the adapter, such as decoder/q/a, of the same layers.
    """
    part, _, inside = path.partition("/layers/")
    if part not in adapter.parts:
        return kernel
    lora = adapter.parts[part]
    for target in lora.targets:
        linear = config.linear_maps[part][target]
        if f"{linear.path}/kernel" == inside:
            a_LDR, b_LRF = (np.asarray(leaves[f"{part}/{target}/{name}"], np.float32) for name in "ab")
            kernel = np.array(kernel, np.float32)
            where = kernel if linear.part is None else kernel[:, :, linear.part]
            where += (lora.scale * (a_LDR @ b_LRF)).reshape(where.shape)
    return kernel
