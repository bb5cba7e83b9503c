"""The smallest Qwen3-VL on the dataset of `vlmem demo` (in runs/demo/dataset)."""

from ml_collections import ConfigDict


def get_config(profile: str | None = None) -> ConfigDict:
    """Profiles: none (the plain model), `comemo` (with CoMemo's memory), `lora` (then fine-tuned by an adapter)."""
    if profile not in (None, "comemo", "lora"):
        raise ValueError(f"configs/tiny/qwen3_vl.py has the profiles comemo and lora, got {profile!r}")
    model = dict(preset="tiny_qwen3_vl", memory="comemo" if profile == "comemo" else None)
    stages = [dict(name="finetune", steps=60, learning_rate=3e-3, schedule="cosine")]
    if profile == "comemo":
        stages.insert(0, dict(name="pretrain", steps=20, learning_rate=3e-3, trainable=("projector/", "memory/")))
    if profile == "lora":
        model["adapters"] = [dict(name="lora", rank=8, alpha=16.0, targets=("q", "k", "v", "o", "gate", "up", "down"))]
        stages[0]["adapter"] = "none"
        stages.append(dict(name="lora", steps=20, learning_rate=3e-3, trainable=("adapters/lora/",)))
    return ConfigDict(
        dict(
            model=model,
            tokenizer="runs/demo/dataset/tokenizer",
            # a token for each 8 x 8 pixels
            image=dict(min_pixels=256, max_pixels=4096),
            data=dict(
                train=[dict(path="runs/demo/dataset/mixture.jsonl")],
                eval=[dict(path="runs/demo/dataset/heldout.jsonl")],
                rows=8,
                pack_tokens=384,
                pack_tiles=320,
                loss_weight="token",
            ),
            optimizer=dict(name="muon", b2=0.98, weight_decay=0.0),
            stages=stages,
            mesh=dict(data=-1, fsdp=1),
            checkpoint=dict(every=20),
            eval_every=20,
        )
    )
