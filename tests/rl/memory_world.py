"""VisMem's two stages on a tiny Qwen2.5-VL, and prompts to reinforce them on."""

import json

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tests.patches_world import save_tokenizer

FORMATION = ("memory/query_builder", "memory/short", "memory/long")
INVOCATION = ("memory/special_", "memory/invoke_logit_bias")


def config(folder):
    """Writes prompts with one image or none into `folder`; a config of both stages on them.

    The images are so small that caches are as long with one as without.
    """
    rng = np.random.default_rng(0)
    lines = []
    for n in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3)).astype(np.uint8)).save(folder / f"{n}.png")
        lines.append(json.dumps({"prompt": f"Say b {n}.", "images": [f"{n}.png"][:n], "answer": "b"}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines))
    rollouts = dict(
        rewards=[dict(name="tests.rl.own:letters_b")], prompts=2, group_size=4, max_new_tokens=8, rollout_rows=8
    )
    stages = [
        dict(
            name="formation", steps=2, learning_rate=1e-2, trainable=FORMATION,
            task=dict(rollouts, kind="grpo", kl=0.015,
                      invocation=dict(mode="delimiter_random", probability=0.9, anywhere=0.3),
                      anywhere_from=0.0, drop_zero_variance=False),
        ),
        dict(
            name="invocation", steps=2, learning_rate=1e-2, trainable=INVOCATION,
            task=dict(rollouts, kind="grpo", kl=0.03, invocation_penalty=0.3, drop_zero_variance=False, minibatches=2),
        ),
    ]  # fmt: skip
    return ConfigDict(
        dict(
            model=dict(preset="tiny_qwen2_5_vl", memory="vismem", decoder=dict(layers=2)),
            tokenizer=str(save_tokenizer(folder / "tokenizer")),
            system="",
            image=dict(min_pixels=256, max_pixels=1024),
            data=dict(
                train=[dict(path=str(folder / "prompts.jsonl"))], rows=4, pack_tokens=192, pack_tiles=64, threads=1
            ),
            stages=stages,
            mesh=dict(data=1, fsdp=1),
            checkpoint=dict(every=1, keep_last=2, keep_best=0, content="trained"),
            log_every=1,
        )
    )
