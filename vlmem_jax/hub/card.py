"""The model card of a checkpoint that is pushed: what the folder of the run says of it, and how to use it."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import vlmem_jax
from vlmem_jax import families
from vlmem_jax.checkpoint.folder import CONFIG_FILE, Checkpoint
from vlmem_jax.hub.repos import REPO

METRICS_FILE = "metrics.jsonl"


def model_card(checkpoint: Checkpoint, repo: str, parameters: int) -> str:
    """README.md of the repository `repo`. Of data it has the names of files, not where they lie."""
    from huggingface_hub import ModelCardData

    model = families.resolve(checkpoint.model["model"])
    memory = model.memory_kind
    run, started = checkpoint.root / CONFIG_FILE, None
    config = json.loads(run.read_bytes()) if run.is_file() else None
    if config is not None and (init := config.get("init") or "") and REPO.fullmatch(init) and init.count("/") == 1:
        started = init.partition("@")[0]
    about = ModelCardData(
        base_model=started,
        library_name="vlmem_jax",
        pipeline_tag="image-text-to-text",
        tags=["vlmem_jax", "jax", *([] if memory == "none" else [f"memory:{memory}"])],
    )
    wide = model.decoder
    lines = [
        f"---\n{about.to_yaml()}\n---",
        f"# {repo.partition('/')[2]}",
        f"A vision-language model {'without memory' if memory == 'none' else f'with the memory `{memory}`'}, of "
        f"{parameters / 1e6:,.1f} million parameters: {families.of_model(model).tower} as its tower, and a decoder of "
        f"{wide.layers} layers, {wide.width} wide. Made by vlmem_jax {vlmem_jax.__version__}.",
        "## Use",
        f'```bash\nvlmem generate --checkpoint {repo} --image PICTURE --prompt "What is shown?"\n```',
    ]
    if config is not None:
        lines += ["## Training", *_training(checkpoint, config, started)]
    return "\n\n".join(lines) + "\n"


def _training(checkpoint: Checkpoint, config: Mapping[str, Any], started: str | None) -> list[str]:
    stages, sets = [], {}
    last = _last_metrics(checkpoint)
    for stage in config["stages"]:
        metrics, data = last.get(stage["name"], {}), stage.get("data") or config["data"]
        sets |= {PurePosixPath(source["path"]).name: None for source in data["train"]}
        cells = [
            stage["name"], stage["task"]["kind"], metrics.get("step", 0), f"{stage['learning_rate']:g}", data["rows"],
            *(f"{metrics[key]:.4g}" if key in metrics else "" for key in ("loss", "eval/loss")),
        ]  # fmt: skip
        stages.append("| " + " | ".join(map(str, cells)) + " |")
    head = ("stage", "task", "steps", "learning rate", "rows a step", "last loss", "last evaluation loss")
    origin = f"From {started}" if started else ("From another checkpoint" if config.get("init") else "From scratch")
    return [
        f"{origin}, by {config['optimizer']['name']}, seed {config['seed']}; data: {', '.join(sets)}.",
        "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *stages]),
    ]


def _last_metrics(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The newest value of each metric, by stage."""
    file, found = checkpoint.root / METRICS_FILE, {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        record = json.loads(line)
        found.setdefault(record["stage"], {}).update(record)
    return found
