"""VisMem on the smallest Qwen2.5-VL and the dataset of `vlmem demo` (in runs/demo/dataset): warm-up and two stages."""

from ml_collections import ConfigDict

ROLLOUTS = dict(prompts=4, group_size=8, max_new_tokens=24)
FORMATION = ("memory/query_builder", "memory/short", "memory/long")


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(preset="tiny_qwen2_5_vl", memory="vismem"),
            tokenizer="runs/demo/dataset/tokenizer",
            template="qwen2-vl",
            system="",
            image=dict(kind="patches", min_pixels=256, max_pixels=4096),
            data=dict(train=[dict(path="runs/demo/dataset/mixture.jsonl")], rows=8, pack_tokens=384, pack_tiles=320),
            optimizer=dict(name="adamw", weight_decay=0.0),
            stages=[
                dict(name="warmup", task="memory_sft", steps=20, learning_rate=1e-3, trainable=FORMATION),
                dict(
                    name="formation",
                    task="grpo",
                    steps=20,
                    learning_rate=1e-3,
                    trainable=FORMATION,
                    rl=dict(invocation=dict(mode="delimiter_random", anywhere=0.02), kl=0.015, **ROLLOUTS),
                ),
                dict(
                    name="invocation",
                    task="grpo",
                    steps=20,
                    learning_rate=1e-3,
                    trainable=("memory/special_", "memory/invoke_logit_bias"),
                    rl=dict(invocation_penalty=0.3, kl=0.03, **ROLLOUTS),
                ),
            ],
            mesh=dict(data=-1, fsdp=1),
            checkpoint=dict(every=20, keep_best=0, content="trained"),
        )
    )
