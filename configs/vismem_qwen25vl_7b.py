"""VisMem on Qwen2.5-VL-7B (arXiv 2511.11007): memories are formed in one stage, called for in the next."""

from ml_collections import ConfigDict

PROFILES = {
    # lengths as in the main text and tables 10 and 11, adapters as in table 4
    "default": {},
    "paper_supplement": dict(short_len=4, long_len=8),
    # what the released code does: it never reads the lora section of its own config
    "released": dict(
        lora=dict(dropout=0.05, targets=("q", "k", "v", "o")),
        visual_states="llm_hidden_first_span",
        max_visual_hidden=1016,
        max_positions=2048,
    ),
}
FORMATION = ("memory/query_builder", "memory/short", "memory/long")
INVOCATION = ("memory/special_", "memory/invoke_logit_bias")


ROLLOUTS = dict(prompts=8, group_size=16, max_new_tokens=512)
"""Of both stages: each step learns from one phase."""

WARMUP = dict(
    name="warmup",
    task=dict(kind="memory_sft", prompts=1),
    steps=1000,
    learning_rate=2e-4,
    warmup_fraction=0.0,
    trainable=FORMATION,
)
"""The released code's first stage, supervised; it does not train adapters and long memories, this does."""


def get_config(profile: str | None = None) -> ConfigDict:
    """Profiles: default, paper_supplement, released."""
    profile = profile or "default"
    if profile not in PROFILES:
        raise ValueError(f"configs/vismem_qwen25vl_7b.py has the profiles {', '.join(PROFILES)}; got {profile!r}")
    warmup = [WARMUP] if profile == "released" else []
    return ConfigDict(
        dict(
            model=dict(preset="qwen2_5_vl_7b", memory=dict(kind="vismem", **PROFILES[profile]), remat="full"),
            # a Qwen2.5-VL-7B-Instruct in the Hugging Face layout: start of training and tokenizer
            init="checkpoints/Qwen2.5-VL-7B-Instruct",
            tokenizer="checkpoints/Qwen2.5-VL-7B-Instruct",
            # prompts with answers; rows beside each other, each of a prompt and some of what was drawn behind it
            data=dict(
                train=[dict(path="data/train.jsonl", root="data/images")], rows=8, pack_tokens=4096, pack_tiles=2048
            ),
            optimizer=dict(name="adamw", weight_decay=0.01),
            stages=[
                *warmup,
                dict(
                    name="formation",
                    steps=1000,
                    learning_rate=5e-5,
                    schedule="cosine",
                    warmup_fraction=0.2,
                    trainable=FORMATION,
                    task=dict(
                        kind="grpo",
                        kl=0.015,
                        kl_target=0.03,
                        invocation=dict(mode="delimiter_random", probability=0.25, anywhere=0.02),
                        **ROLLOUTS,
                    ),
                ),
                dict(
                    name="invocation",
                    steps=1000,
                    learning_rate=1e-5,
                    schedule="cosine",
                    warmup_fraction=0.1,
                    trainable=INVOCATION,
                    task=dict(kind="grpo", kl=0.03, kl_target=0.05, invocation_penalty=0.3, **ROLLOUTS),
                    optimizer=dict(name="adamw", weight_decay=0.0),
                ),
            ],
            mesh=dict(data=1, fsdp=-1, tensor=1),
            checkpoint=dict(every=500, keep_last=2, keep_best=0, content="trained"),
        )
    )
