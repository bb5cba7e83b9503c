"""Sizes of the published models, and of small ones. A config names one and changes what it must."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlmem_jax.config import ConfigError, build
from vlmem_jax.models.config import ModelConfig

_INTERN_VIT_300M = dict(width=1024, layers=24, heads=16, mlp_width=4096, image_size=448, patch_size=14, drop_path=0.1)
_INTERNLM2 = dict(vocab=92553, head_dim=128, rope_theta=1e6, ntk_factor=2.0, max_positions=32768)

_QWEN_VIT = dict(kind="qwen_vit", width=1280, layers=32, heads=16, mlp_width=3420, full_layers=(7, 15, 23, 31))
_QWEN2_5 = dict(
    vocab=152064, head_dim=128, rope_theta=1e6, rope_sections=(16, 24, 24), norm_eps=1e-6, max_positions=128000,
    qkv_bias=True,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # CoMemo, arXiv 2506.06279. The widths of its memory blocks are not published: those here are assumed.
    "comemo_2b": dict(
        vision=_INTERN_VIT_300M,
        decoder=dict(_INTERNLM2, width=2048, layers=24, heads=16, kv_heads=8, mlp_width=8192),
        comemo=dict(every=4, heads=16, head_dim=128, mlp_width=8192),
    ),
    "comemo_9b": dict(
        vision=_INTERN_VIT_300M,
        decoder=dict(_INTERNLM2, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336),
        comemo=dict(every=4, heads=16, head_dim=128, mlp_width=16384),
    ),
    # Qwen2.5-VL, arXiv 2502.13923
    "qwen2_5_vl_3b": dict(
        vision=_QWEN_VIT,
        decoder=dict(_QWEN2_5, vocab=151936, width=2048, layers=36, heads=16, kv_heads=2, mlp_width=11008, tied=True),
        memory="none",
    ),
    "qwen2_5_vl_7b": dict(
        vision=_QWEN_VIT,
        decoder=dict(_QWEN2_5, width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944),
        memory="none",
    ),
    "qwen2_5_vl_72b": dict(
        vision=dict(_QWEN_VIT, mlp_width=3456),
        decoder=dict(_QWEN2_5, width=8192, layers=80, heads=64, kv_heads=8, mlp_width=29568),
        memory="none",
    ),
    # reads mosaics of handwritten digits: 16 visual tokens a tile of 32 px
    "digits": dict(
        vision=dict(width=64, layers=2, heads=2, mlp_width=192, image_size=32, patch_size=4),
        decoder=dict(
            vocab=128, width=96, layers=4, heads=3, kv_heads=3, head_dim=32, mlp_width=240, rope_theta=1e4,
        ),
        comemo=dict(every=2, heads=3, head_dim=32, mlp_width=192, rope_theta=1e4),
        compute_dtype="float32",
    ),
    # the same pictures, a visual token a digit; vismem.token_ids and start_id are those of the demo's tokenizer
    "digits_qwen2_5_vl": dict(
        vision=dict(
            kind="qwen_vit", width=64, layers=2, heads=2, mlp_width=192, patch_size=4, window=8, full_layers=(1,),
        ),
        decoder=dict(
            vocab=128, width=96, layers=4, heads=3, kv_heads=3, head_dim=32, mlp_width=240, rope_theta=1e4,
            rope_sections=(4, 6, 6), qkv_bias=True, norm_eps=1e-6,
        ),
        memory="none",
        vismem=dict(
            query_len=4, short_len=2, long_len=4, query_builder=dict(layers=1, heads=4, ff_mult=2),
            tiny=dict(layers=1, heads=4, ff_mult=2), lora=dict(rank=8, alpha=16.0, dropout=0.0),
            max_visual_hidden=64, max_prompt_hidden=64, max_positions=160,
            max_invocations=4, token_ids=(124, 125, 126, 127),
        ),
        compute_dtype="float32",
    ),
    # as small as it can be with every part in place
    "tiny": dict(
        vision=dict(width=32, layers=2, heads=4, mlp_width=64, image_size=28, patch_size=7),
        decoder=dict(vocab=128, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp_width=96),
        comemo=dict(every=2, heads=4, head_dim=16, mlp_width=80),
        compute_dtype="float32",
    ),
    "tiny_qwen2_5_vl": dict(
        vision=dict(
            kind="qwen_vit", width=32, layers=3, heads=2, mlp_width=48, patch_size=4, window=16, full_layers=(1,),
        ),
        decoder=dict(
            vocab=160, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp_width=96, rope_sections=(2, 3, 3),
            qkv_bias=True, tied=True, norm_eps=1e-6,
        ),
        memory="none",
        comemo=dict(every=2, heads=4, head_dim=16, mlp_width=80),
        vismem=dict(
            query_len=4, short_len=3, long_len=5, query_builder=dict(layers=1, heads=4, ff_mult=2),
            tiny=dict(layers=2, heads=2, ff_mult=3), lora=dict(rank=4, alpha=8.0),
            max_visual_hidden=64, max_prompt_hidden=64, max_positions=160,
            max_invocations=3, token_ids=(156, 157, 158, 159), span_ids=(154, 155), start_id=8,
        ),
        compute_dtype="float32",
    ),
}  # fmt: skip


def resolve(config: ConfigDict | Mapping[str, Any], where: str = "config.model") -> ModelConfig:
    """ModelConfig from `config.preset` (optional) overlaid with the other keys of `config`.

    Raises ConfigError (a ValueError) that names the key: unknown preset or key, wrong type, value out of range.
    """
    given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    name = given.pop("preset", None)
    if name is not None and name not in PRESETS:
        raise ConfigError(f"{where}.preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return build(ModelConfig, _overlay(PRESETS.get(name, {}), given), where)


def _overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged
