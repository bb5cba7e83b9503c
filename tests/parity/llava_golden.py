"""The golden LLaVA-Video base: its config, its weights, and prompts as rows."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from vlmem_jax.config import build
from vlmem_jax.families import llava_video
from vlmem_jax.hub.fit import assemble
from vlmem_jax.models import VLM, ModelConfig
from vlmem_jax.types import Batch


def load(folder: Path) -> SimpleNamespace:
    """The VLM, its parameters, what was recorded of it, and config.json."""
    content = json.loads((folder / "config.json").read_text())
    tower, text = content["siglip"], content["qwen2"]
    vision = dict(kind="siglip", width=tower["hidden"], layers=tower["blocks_kept"], heads=tower["heads"],
                  mlp_width=tower["intermediate"], image_size=tower["image_size"], patch_size=tower["patch"],
                  norm_eps=tower["ln_eps"])  # fmt: skip
    decoder = dict(vocab=text["vocab"], width=text["hidden"], layers=text["layers"], heads=text["heads"],
                   kv_heads=text["kv_heads"], head_dim=text["head_dim"], mlp_width=text["intermediate"],
                   rope_theta=text["rope_theta"], norm_eps=text["rms_eps"], qkv_bias=text["qkv_bias"],
                   tied=text["tie"])  # fmt: skip
    config = build(ModelConfig, {"vision": vision, "decoder": decoder, "compute_dtype": "float32"}, "config.model")
    weights = dict(np.load(folder / "weights.npz"))
    read = {name: x for name, x in weights.items() if not llava_video.unread(config).match(name)}
    params = jax.tree.map(jnp.asarray, assemble(llava_video.name_table(config), read))
    return SimpleNamespace(vlm=VLM(config), params=params, io=dict(np.load(folder / "io.npz")), content=content)


def spliced(world: SimpleNamespace, ids: np.ndarray, count: int, tiles: int = 0) -> Batch:
    """A batch of one row in which the sentinel among `ids` stands for `count` visual tokens."""
    [at] = np.flatnonzero(ids == world.content["image_token_index"])
    tokens = np.concatenate([ids[:at], np.zeros(count, ids.dtype), ids[at + 1 :]])
    index = np.where(
        (np.arange(len(tokens)) >= at) & (np.arange(len(tokens)) < at + count), np.arange(len(tokens)) - at, -1
    )
    batch = Batch.empty((1,), len(tokens), tiles, world.vlm.tile)
    batch = batch.replace(
        tokens_BT=tokens[None].astype(np.int32), segments_BT=np.ones((1, len(tokens)), np.int32),
        positions_BT=np.arange(len(tokens), dtype=np.int32)[None], visual_index_BT=index[None].astype(np.int32),
        segments_BM=np.ones((1, count), np.int32), positions_BM=(at + np.arange(count, dtype=np.int32))[None],
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, batch)
