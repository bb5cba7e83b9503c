"""Qwen2.5-VL-7B fine-tuned by a low-rank adapter on every linear map of its decoder; its own weights stay."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    targets = ("q", "k", "v", "o", "gate", "up", "down")
    return ConfigDict(
        dict(
            model=dict(
                preset="qwen2_5_vl_7b",
                adapters=[dict(name="mine", rank=16, alpha=32.0, dropout=0.05, targets=targets)],
                remat="full",
            ),
            # a Qwen2.5-VL-7B-Instruct in the Hugging Face layout: start of training and tokenizer
            init="checkpoints/Qwen2.5-VL-7B-Instruct",
            tokenizer="checkpoints/Qwen2.5-VL-7B-Instruct",
            data=dict(
                train=[dict(path="data/train.jsonl", root="data/images")],
                rows=64,
                pack_tokens=8192,
                pack_tiles=4096,
            ),
            optimizer=dict(name="adamw", weight_decay=0.0),
            stages=[
                dict(
                    name="lora",
                    steps=1000,
                    learning_rate=2e-4,
                    schedule="cosine",
                    trainable=("adapters/mine/",),
                    accumulation=0,
                ),
            ],
            mesh=dict(data=1, fsdp=-1, tensor=1),
            checkpoint=dict(every=200, keep_last=2, keep_best=0, content="trained"),
        )
    )
