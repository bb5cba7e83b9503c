"""VisMem on the smallest Qwen2.5-VL: warm-up and both stages, on the dataset of `vlmem demo --memory vismem`."""

from ml_collections import ConfigDict

DATASET = "runs/demo_vismem/dataset"
ROLLOUTS = dict(prompts=4, group_size=8, max_new_tokens=24)
FORMATION = ("memory/query_builder", "memory/short", "memory/long")


def _data(name: str) -> dict:
    return dict(train=[dict(path=f"{DATASET}/{name}.jsonl")], rows=8, pack_tokens=256, pack_tiles=72)


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            # the ids that the dataset's tokenizer gives to the memory's tokens and to a pause
            model=dict(preset="tiny_qwen2_5_vl", memory=dict(kind="vismem", token_ids=(69, 70, 71, 72), start_id=68)),
            tokenizer=f"{DATASET}/tokenizer",
            system="",
            image=dict(min_pixels=256, max_pixels=4096),
            data=_data("prompts"),
            optimizer=dict(name="adamw", weight_decay=0.0),
            stages=[
                dict(
                    name="warmup",
                    task="memory_sft",
                    steps=20,
                    learning_rate=1e-3,
                    trainable=FORMATION,
                    data=_data("worked"),
                ),
                dict(
                    name="formation",
                    steps=20,
                    learning_rate=1e-3,
                    trainable=FORMATION,
                    task=dict(
                        kind="grpo", invocation=dict(mode="delimiter_random", anywhere=0.02), kl=0.015, **ROLLOUTS
                    ),
                ),
                dict(
                    name="invocation",
                    steps=20,
                    learning_rate=1e-3,
                    trainable=("memory/special_", "memory/invoke_logit_bias"),
                    task=dict(kind="grpo", invocation_penalty=0.3, kl=0.03, **ROLLOUTS),
                ),
            ],
            mesh=dict(data=-1, fsdp=1),
            checkpoint=dict(every=20, keep_best=0, content="trained"),
        )
    )
