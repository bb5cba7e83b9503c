"""The golden CoMemo model: its config from config.json, its weights from HF names."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from vlmem_jax.families import resolve
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.models import VLM, ModelConfig
from vlmem_jax.positions import sequence_positions
from vlmem_jax.types import Batch

IMPLEMENTATIONS = ["xla", "tpu_interpret", "gpu_interpret"]
"""Of the read from memory; kernels run here in interpret mode."""


def model_config(folder: Path, **decoder) -> ModelConfig:
    """ModelConfig of `full_model.npz` and `packed_training.npz`; `decoder` overrides its keys."""
    c = json.loads((folder / "config.json").read_text())
    v, d, m = c["vision_config"], c["llm_config"], c["mixin_config"]
    return resolve(
        dict(
            vision=dict(
                width=v["hidden_size"], layers=v["num_hidden_layers"], heads=v["num_attention_heads"],
                mlp_width=v["intermediate_size"], image_size=v["image_size"], patch_size=v["patch_size"],
                norm=v["norm_type"], norm_eps=v["layer_norm_eps"], qk_norm=v["qk_normalization"],
                select_layer=c["select_layer"],
            ),
            projector=dict(shuffle=c["ps_version"], norm_eps=c["projector_layer_norm_eps"]),
            decoder=dict(
                vocab=d["vocab_size"], width=d["hidden_size"], layers=d["num_hidden_layers"],
                heads=d["num_attention_heads"], kv_heads=d["num_key_value_heads"], head_dim=d["head_dim"],
                mlp_width=d["intermediate_size"], norm_eps=d["rms_norm_eps"], rope_theta=d["rope_theta"],
                ntk_factor=d["rope_scaling"]["factor"], max_positions=d["max_position_embeddings"],
            ) | decoder,
            memory=dict(
                kind="comemo", every=m["mixin_every_n_layers"], heads=m["num_heads"], head_dim=m["head_dim"],
                mlp_width=m["intermediate_size"], rope_theta=m["rope_theta"], norm_eps=m["rms_norm_eps"],
            ),
            compute_dtype="float32",
        )
    )  # fmt: skip


def load(folder: Path, name: str) -> SimpleNamespace:
    """The golden arrays of one file, its VLM and its parameters."""
    arrays = dict(np.load(folder / f"{name}.npz"))
    config = model_config(folder)
    weights = {key.removeprefix("w/"): value for key, value in arrays.items() if key.startswith("w/")}
    params = jax.tree.map(jnp.asarray, from_arrays(config, weights))
    return SimpleNamespace(arrays=arrays, vlm=VLM(config), params=params)


def prompt_batch(arrays: dict, mode: str) -> Batch:
    """The one prompt of `full_model.npz` as a batch of a row, positions by `mode`: dhr or plain."""
    tokens_T = arrays["input_ids"][0]
    side, context = int(arrays["side"]), int(arrays["special_ids"][2])
    positions_T, visual_positions_M = sequence_positions(
        tokens_T, [tuple(map(int, grid)) for grid in arrays["grids"]], side, context, rope_dhr=mode == "dhr"
    )
    pixels = arrays["pixel_values"].transpose(0, 2, 3, 1)
    return text_batch(tokens_T, positions_T, context, pixels, visual_positions_M)


def text_batch(tokens_T, positions_T, context=-1, pixels=None, visual_positions_M=()) -> Batch:
    """A row of one segment, every tile spliced at its placeholders."""
    tokens_T = np.asarray(tokens_T)
    placeholder_T = tokens_T == context
    row = dict(
        tokens_BT=tokens_T,
        targets_BT=np.zeros_like(tokens_T),
        weights_BT=np.zeros(tokens_T.shape, np.float32),
        positions_BT=np.asarray(positions_T),
        segments_BT=np.ones_like(tokens_T),
        visual_index_BT=np.where(placeholder_T, np.cumsum(placeholder_T) - 1, -1),
        pixels_BISSc=np.zeros((0, 1, 1, 3), np.float32) if pixels is None else pixels,
        positions_BM=np.asarray(visual_positions_M),
        segments_BM=np.ones(len(visual_positions_M)),
    )
    return Batch.of(**{
        key: jnp.asarray(value[None], jnp.float32 if key in ("weights_BT", "pixels_BISSc") else jnp.int32)
        for key, value in row.items()
    })  # fmt: skip
