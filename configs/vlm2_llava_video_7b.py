"""VLM^2 on LLaVA-Video-7B-Qwen2 (arXiv 2511.20644): geometry and two memories of frames, by VLM-3R's recipe.

vlmem data convert --from vlm3r data/vlm3r.yaml --out data/train.jsonl
vlmem data geometry --config configs/vlm2_llava_video_7b.py --checkpoint yyfz233/Pi3 --out data/geometry.array_record
"""

from ml_collections import ConfigDict

SPACE = dict(name="space", rank=128, alpha=256.0, dropout=0.05, targets=("q", "k", "v", "o", "gate", "up", "down"))
"""The adapter on the decoder."""


def get_config(profile: str | None = None) -> ConfigDict:
    """Profiles: none; `vlm3r`, without the stage that aligns the new modules first, which is ours; `stream`, which goes
    on with clips of 128 frames of which the episodes alone are shown, from the end of another run in `init`."""
    if profile not in (None, "vlm3r", "stream"):
        raise ValueError(f"configs/vlm2_llava_video_7b.py has the profiles vlm3r and stream, got {profile!r}")
    streams = profile == "stream"
    align = dict(
        name="align",
        steps=240,
        learning_rate=1e-4,
        trainable=("projector/mlp/", "memory/"),
        adapter="none",
        accumulation=0,
    )
    finetune = dict(
        name="long" if streams else "finetune",
        steps=800 if streams else 8000,  # five times 200,000 questions
        learning_rate=2e-5,
        schedule="cosine",
        trainable=("projector/mlp/", "memory/", "adapters/space/"),
        accumulation=0,  # a row at a time on each chip
    )
    return ConfigDict(
        dict(
            model=dict(
                preset="llava_video_7b",
                memory="vlm2",
                adapters=[SPACE],
                remat="attention",
            ),
            # LLaVA-Video-7B-Qwen2, made one folder with its tower by `vlmem convert --vision`; or the run to go on with
            init="runs/vlm2" if streams else "checkpoints/LLaVA-Video-7B-Qwen2",
            tokenizer="checkpoints/LLaVA-Video-7B-Qwen2",
            image=dict(frames=128, context="kept:32") if streams else dict(frames=32),
            data=dict(
                train=[
                    dict(
                        path="data/train.jsonl",
                        root="data/videos",
                        geometry=f"data/geometry{'_128' * streams}.array_record",
                    )
                ],
                rows=128 if streams else 64,
                pack_tokens=7168 if streams else 14336,  # one clip a row, or two
                pack_tiles=128 if streams else 64,
                max_sample_tokens=7168,
                loss_weight="token",
            ),
            optimizer=dict(name="adamw", weight_decay=0.0),
            stages=[finetune] if profile else [align, finetune],
            mesh=dict(data=1, fsdp=-1, tensor=1),
            checkpoint=dict(every=200, keep_last=2, keep_best=0, content="trained"),
        )
    )
