"""The golden Qwen3-VL: its config from config.json, its weights, and its prompts as batches."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from qwen_golden import batch, patches

from vlmem_jax.families.qwen3_vl import read_config
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing.patch_processor import place

__all__ = ["PROMPTS", "batch", "grids", "load", "rows"]
PROMPTS = ("image", "two_images", "video", "two_videos", "mixed", "text")


def load(folder: Path) -> SimpleNamespace:
    """The VLM, its parameters, its weights by their name, and config.json."""
    content = json.loads((folder / "config.json").read_text())
    weights = dict(np.load(folder / "weights.npz"))
    config = read_config(content | {"torch_dtype": "float32"}, {name: x.shape for name, x in weights.items()}).model
    params = jax.tree.map(jnp.asarray, from_arrays(config, weights))
    return SimpleNamespace(vlm=VLM(config), params=params, weights=weights, content=content, folder=folder)


def grids(arrays: dict, key: str, merge: int) -> list[PatchGrid]:
    """Each image, or each step of time of each video."""
    found = arrays.get(key, np.zeros((0, 3), int)).tolist()
    return [PatchGrid(1, h // merge, w // merge) for t, h, w in found for _ in range(t)]


def rows(arrays: dict, content: dict, geometry) -> list[SimpleNamespace]:
    """Each row of a prompt file without its padding: tokens, grids in order, where things stand, rows of patches."""
    ids = content["image_token_id"], content["video_token_id"]
    seen = {key: grids(arrays, f"{key}_grid_thw", geometry.merge) for key in ("image", "video")}
    pixels = zip(("pixel_values", "pixel_values_videos"), seen.values(), strict=True)
    queues = {
        placeholder: iter(zip(some, patches(arrays, key, some, geometry.merge), strict=True))
        for placeholder, (key, some) in zip(ids, pixels, strict=True)
    }
    found = []
    for tokens, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True):
        tokens_T, own, t = tokens[mask > 0].astype(np.int32), [], 0
        while t < len(tokens_T):
            if int(tokens_T[t]) in queues:
                own.append(next(queues[int(tokens_T[t])]))
                t += own[-1][0].tokens
            else:
                t += 1
        placed = place(tokens_T, [grid for grid, _ in own], ids, geometry)
        found.append(SimpleNamespace(tokens_T=tokens_T, grids=[grid for grid, _ in own], placed=placed, mask=mask > 0,
                                     pixels=[part for _, part in own], is_visual=np.isin(tokens_T, ids)))  # fmt: skip
    return found
