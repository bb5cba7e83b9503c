"""CoMemo small enough for a CPU, on the pictures of `vlmem demo` (in runs/demo/dataset): the stages in miniature."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    memory = ("projector/", "memory/")
    return ConfigDict(
        dict(
            model=dict(preset="digits", memory="comemo"),
            tokenizer="runs/demo/dataset/tokenizer",
            system="",
            image=dict(dhr_map="raster"),
            data=dict(
                train=[dict(path="runs/demo/dataset/mixture.jsonl")],
                eval=[dict(path="runs/demo/dataset/heldout.jsonl")],
                rows=8,
                pack_tokens=384,
                pack_tiles=8,
                loss_weight="token",
            ),
            optimizer=dict(name="muon", b2=0.98, weight_decay=0.0),
            stages=[
                dict(name="pretrain", steps=20, learning_rate=3e-3, trainable=memory),
                dict(
                    name="pretrain_phase2",
                    steps=20,
                    learning_rate=3e-3,
                    trainable=memory,
                    frozen=("memory/blocks/(attn|mlp)_gate",),
                ),
                dict(name="finetune", steps=60, learning_rate=3e-3, schedule="cosine"),
            ],
            mesh=dict(data=-1, fsdp=1),
            checkpoint=dict(every=20),
            eval_every=20,
        )
    )
