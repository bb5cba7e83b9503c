"""VLM^2 on the smallest LLaVA-Video, without geometry, on the dataset of `vlmem demo` (in runs/demo/dataset): each
picture is a frame of its own."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(preset="tiny_llava_video", memory=dict(kind="vlm2", geometry_width=0)),
            tokenizer="runs/demo/dataset/tokenizer",
            system="",
            image=dict(time_line=False),
            data=dict(
                train=[dict(path="runs/demo/dataset/mixture.jsonl")],
                eval=[dict(path="runs/demo/dataset/heldout.jsonl")],
                rows=8,
                pack_tokens=384,
                pack_tiles=16,
                loss_weight="token",
            ),
            optimizer=dict(name="adamw", weight_decay=0.0),
            stages=[
                dict(name="align", steps=20, learning_rate=1e-3, trainable=("projector/", "memory/")),
                dict(name="finetune", steps=60, learning_rate=1e-3, schedule="cosine"),
            ],
            mesh=dict(data=-1, fsdp=1),
            checkpoint=dict(every=20),
            eval_every=20,
        )
    )
