"""The folder of a run: what it holds beside checkpoints, and whether an experiment may go on in it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from vlmem_jax.checkpoint.folder import CONFIG_FILE, MODEL_FILE, TOKENIZER_FOLDER, committed_steps
from vlmem_jax.config import ConfigError, to_dict
from vlmem_jax.train.config import Experiment

CHANGEABLE = ("mesh.", "checkpoint.", "log_every", "eval_every", "data.threads", "data.prefetch", "data.plan_folder")
"""Keys that say how a run is carried out, not what it computes: they may differ when it goes on."""


def prepare(workdir: Path, experiment: Experiment) -> None:
    """Writes config.json, model.json and the tokenizer into `workdir`.

    Raises ConfigError if it holds something else: another experiment (the keys that differ are listed), or a converted
    checkpoint.
    """
    config = to_dict(experiment)
    if (workdir / CONFIG_FILE).is_file():
        _check_same(workdir, json.loads((workdir / CONFIG_FILE).read_text()), config)
    elif (workdir / MODEL_FILE).is_file():
        raise ConfigError(
            f"{workdir} holds a checkpoint; start from it with --config.init={workdir}, in another --workdir"
        )
    if not Path(experiment.tokenizer).is_dir():
        raise ConfigError(
            f"config.tokenizer must be a folder with a tokenizer; there is no folder {experiment.tokenizer!r}"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / TOKENIZER_FOLDER).is_dir():
        unfinished = workdir / f"{TOKENIZER_FOLDER}.tmp"
        shutil.copytree(experiment.tokenizer, unfinished, dirs_exist_ok=True, ignore=_not_tokenizer)
        os.replace(unfinished, workdir / TOKENIZER_FOLDER)
    _write(workdir / MODEL_FILE, {key: config[key] for key in ("model", "image", "template", "system")})
    _write(workdir / CONFIG_FILE, config)


def _not_tokenizer(folder: str, names: list[str]) -> list[str]:
    """What not to copy: the tokenizer may lie beside weights."""
    return [name for name in names if not name.endswith((".json", ".model", ".txt")) or name.endswith(".index.json")]


def _write(file: Path, content: dict) -> None:
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(unfinished, file)


def _check_same(workdir: Path, old: dict, new: dict) -> None:
    """A stage without a checkpoint may still change; everything else must be as it was."""
    started = [stage["name"] for stage in old["stages"] if committed_steps(workdir / stage["name"])]
    if not started:
        return
    until = 1 + max(n for n, stage in enumerate(old["stages"]) if stage["name"] in started)
    old, new = ({**config, "stages": {s["name"]: s for s in config["stages"][:until]}} for config in (old, new))
    olds, news = _flat(old), _flat(new)
    differing = [
        key
        for key in sorted(olds.keys() | news.keys())
        if olds.get(key) != news.get(key) and not key.startswith(CHANGEABLE)
    ]
    if differing:
        lines = "\n".join(f"  {key}: {olds.get(key)!r} there, {news.get(key)!r} now" for key in differing)
        raise ConfigError(
            f"{workdir} was trained with another config, and these keys differ:\n{lines}\n"
            "Use another --workdir, or give the keys their values back"
        )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {
        key: leaf for name, item in items for key, leaf in _flat(item, f"{path}.{name}" if path else str(name)).items()
    }
