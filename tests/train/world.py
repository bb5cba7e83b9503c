"""A small world to train on: a tokenizer of one id a character, pictures, JSONL files, and an experiment over them."""

import json

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


def make(folder):
    """Writes tokenizer, pictures, train.jsonl (18 samples of no, one or two images) and eval.jsonl into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(["<unk>", *map(chr, range(32, 127)), "\n"])}
    tokenizer = FastTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    lines = []
    for n in range(24):
        size = [(16, 16), (32, 16), (16, 48)][n % 3]
        pixels = np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        images = [f"{n}.png", f"{n - 1}.png"][: n % 3] if n else []
        question = "<image>\n" * len(images) + "Say a word."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "ab" * (1 + n % 4)}]
        lines.append(json.dumps({"conversations": turns, "image": images}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines[:18]))
    (folder / "eval.jsonl").write_text("".join(lines[18:]))
    return folder


def config(folder, **changes):
    """Three stages of 4, 3 and 5 steps, as in the paper but short. `changes` replace keys."""
    values = dict(
        model=dict(
            vision=dict(width=16, layers=2, heads=2, mlp_width=32, image_size=16, patch_size=4, drop_path=0.3),
            decoder=dict(vocab=112, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=32),
            memory=dict(kind="comemo", every=2, heads=2, head_dim=8, mlp_width=32),
            compute_dtype="float32",
        ),
        image=dict(max_tiles=3, dhr_map="raster"),
        tokenizer=str(folder / "tokenizer"),
        system="",
        data=dict(
            train=[dict(path=str(folder / "train.jsonl"))],
            eval=[dict(path=str(folder / "eval.jsonl"))],
            rows=8, pack_tokens=96, pack_tiles=6, threads=1,
        ),
        stages=[
            dict(name="pretrain", steps=4, learning_rate=1e-2, trainable=["projector/", "memory/"]),
            dict(name="gates_frozen", steps=3, learning_rate=1e-2, trainable=["projector/", "memory/"],
                 frozen=["memory/blocks/.*_gate"]),
            dict(name="finetune", steps=5, learning_rate=1e-2, schedule="cosine"),
        ],
        mesh=dict(data=-1, fsdp=1),
        checkpoint=dict(every=2, keep_last=10, keep_best=0),
        eval_every=2,
        log_every=1,
        loss_chunk=64,
    )  # fmt: skip
    return ConfigDict({**values, **changes})


def losses(workdir):
    """(stage, step) -> training loss."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(record["stage"], record["step"]): record["loss"] for record in records if "loss" in record}


def records(workdir):
    """The records of a run, as they stand in metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("per_s", "seconds", "goodput", "mfu", "utilisation")
    return [{key: x for key, x in line.items() if not any(word in key for word in timed)} for line in lines]


def config_file(folder, **changes):
    """A file that `--config` reads, with `config(folder, **changes)` in it."""
    return save_config(folder, config(folder, **changes))


def save_config(folder, config):
    """A file that `--config` reads."""
    file = folder / "config.py"
    text = config.to_json()
    lines = ["import json", "", "from ml_collections import ConfigDict", "", "", "def get_config(profile=None):"]
    file.write_text("\n".join(lines) + f"\n    return ConfigDict(json.loads({text!r}))\n")
    return file
