"""The golden Qwen2.5-VL: its config from config.json, its weights from either layout, and its prompts as batches."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from vlmem_jax.families.qwen2_5_vl import read_config
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing.patch_processor import place
from vlmem_jax.types import Batch

PROMPTS = ("image", "two_images", "video", "video_frac", "mixed", "text")


def load(folder: Path) -> SimpleNamespace:
    """The VLM, its parameters, its weights by their name, and config.json."""
    content = json.loads((folder / "config.json").read_text())
    weights = dict(np.load(folder / "weights.npz"))
    shapes = {name: value.shape for name, value in weights.items()}
    config = read_config(content | {"torch_dtype": "float32"}, shapes).model
    params = jax.tree.map(jnp.asarray, from_arrays(config, weights))
    return SimpleNamespace(vlm=VLM(config), params=params, weights=weights, content=content, folder=folder)


def rows(arrays: dict, content: dict, geometry) -> list[SimpleNamespace]:
    """Each row of a prompt file without its padding: tokens, grids in order, where things stand, rows of patches."""
    ids = content["image_token_id"], content["video_token_id"]
    merge = geometry.merge
    none = np.zeros((0, 3), int)
    images = [PatchGrid(t, h // merge, w // merge) for t, h, w in arrays.get("image_grid_thw", none).tolist()]
    seconds = arrays.get("second_per_grid_ts", [])
    videos = [
        PatchGrid(t, h // merge, w // merge, float(s))
        for (t, h, w), s in zip(arrays.get("video_grid_thw", none).tolist(), seconds, strict=True)
    ]
    seen = (images, "pixel_values"), (videos, "pixel_values_videos")
    queues = {
        placeholder: iter(zip(grids, patches(arrays, key, grids, merge), strict=True))
        for placeholder, (grids, key) in zip(ids, seen, strict=True)
    }
    found = []
    for tokens, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True):
        tokens_T, seen, t = tokens[mask > 0].astype(np.int32), [], 0
        while t < len(tokens_T):
            if int(tokens_T[t]) in queues:
                seen.append(next(queues[int(tokens_T[t])]))
                t += seen[-1][0].tokens
            else:
                t += 1
        grids = [grid for grid, _ in seen]
        placed = place(tokens_T, grids, ids, geometry)
        found.append(SimpleNamespace(tokens_T=tokens_T, grids=grids, placed=placed, pixels=[part for _, part in seen],
                                     is_visual=np.isin(tokens_T, ids), mask=mask > 0))  # fmt: skip
    return found


def patches(arrays, key, grids, merge):
    """The rows of patches of each image or video, as blocks."""
    if not grids:
        return []
    blocks = arrays[key].reshape(-1, merge, merge, arrays[key].shape[-1])
    return np.split(blocks, np.cumsum([grid.tokens for grid in grids])[:-1])


def batch(vlm: VLM, found: list[SimpleNamespace], T: int = 0, I: int = 0) -> Batch:
    """Rows of a file as a batch, padded on the right to at least T tokens and I tiles."""
    T = max(T, *(len(row.tokens_T) for row in found))
    I = max(I, *(int(row.is_visual.sum()) for row in found))
    packed = Batch.empty((len(found),), T, I, vlm.tile)
    pixels = np.zeros(packed.views.pixels_BISSc.shape, np.float32)
    for n, row in enumerate(found):
        t, m, placed = len(row.tokens_T), int(row.is_visual.sum()), row.placed
        packed.text.tokens_BT[n, :t] = row.tokens_T
        packed.text.positions_BT[n, :t] = placed.positions_T
        packed.text.segments_BT[n, :t] = 1
        packed.text.visual_index_BT[n, :t][row.is_visual] = placed.slot_C
        packed.views.positions_BM[n, :m] = placed.visual_positions_M
        packed.views.segments_BM[n, :m] = 1
        packed.views.layout_BI4[n, :m] = placed.layout_I4
        if m:
            pixels[n, :m][placed.slot_C] = np.concatenate(row.pixels)
    return jax.tree.map(jnp.asarray, packed.replace(pixels_BISSc=pixels))
