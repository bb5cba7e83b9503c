"""CoMemo-2B: InternViT-300M, InternLM2-1.8B and memory blocks, trained in three stages (arXiv 2506.06279)."""

from ml_collections import ConfigDict


def get_config(profile: str | None = None) -> ConfigDict:
    """Profiles: none (as published), `released` (RoPE-DHR map of the released weights instead of the geometric one)."""
    if profile not in (None, "released"):
        raise ValueError(f"configs/comemo_2b.py has the profile released, got {profile!r}")
    memory, one_pack = ("projector", "memory"), dict(accumulation=0)  # at a time on each chip, whatever the slice
    return ConfigDict(
        dict(
            model=dict(preset="comemo_2b", memory="comemo", remat="attention"),
            # a chat model of the InternVL family in the Hugging Face layout: start of training and tokenizer
            init="checkpoints/InternVL2-2B",
            tokenizer="checkpoints/InternVL2-2B",
            image=dict(max_tiles=12, dhr_map="code" if profile == "released" else "raster"),
            data=dict(
                # JSONL in the InternVL/LLaVA form; add as many files as you have, each with a weight
                train=[dict(path="data/train.jsonl", root="data/images", weight=1.0)],
                rows=128,
                pack_tokens=16384,
                pack_tiles=48,
                max_sample_tokens=8192,
                loss_weight="square",
            ),
            optimizer=dict(name="adamw", b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0),
            stages=[
                dict(
                    name="pretrain", steps=2000, learning_rate=1e-4, schedule="constant", trainable=memory, **one_pack
                ),
                dict(
                    name="pretrain_phase2",
                    steps=2000,
                    learning_rate=1e-4,
                    schedule="constant",
                    trainable=memory,
                    frozen=("memory/blocks/(attn|mlp)_gate",),
                    **one_pack,
                ),
                dict(name="finetune", steps=9000, learning_rate=4e-5, schedule="cosine", **one_pack),
            ],
            mesh=dict(data=1, fsdp=-1, tensor=1),
            checkpoint=dict(every=500, keep_last=2, keep_best=0),
            seed=42,
        )
    )
