"""The folder of a run: what it holds beside checkpoints, and whether an experiment may go on in it."""

import json
import os
import re
from collections.abc import Callable
from typing import Any

from vlmem_jax.checkpoint.folder import CONFIG_FILE, MODEL_FILE, TOKENIZER_FOLDER, committed_steps
from vlmem_jax.config import ConfigError, to_dict
from vlmem_jax.hub import repos
from vlmem_jax.paths import AnyPath, as_path, write_whole
from vlmem_jax.train.config import Experiment, experiment

CHANGEABLE = (
    "mesh.", "checkpoint.", "log_every", "log_samples", "eval_every", "profile.", "data.threads", "data.prefetch",
    "data.plan_folder", "data.on_bad_sample",
)  # fmt: skip
"""Keys that say how a run is carried out, not what it computes: they may differ when it goes on."""


def prepare(workdir: str | os.PathLike, wanted: Experiment, say: Callable[[str], None] = print) -> None:
    """Writes config.json, model.json and the tokenizer into `workdir`.

    Raises ConfigError if it holds something else: another experiment (the keys that differ are listed), or a converted
    checkpoint.
    """
    workdir, config = as_path(workdir), to_dict(wanted)
    if (workdir / CONFIG_FILE).is_file():
        _check_same(workdir, _completed(json.loads((workdir / CONFIG_FILE).read_bytes())), config, say)
    elif (workdir / MODEL_FILE).is_file():
        raise ConfigError(
            f"{workdir} holds a checkpoint; start from it with --config.init={workdir}, in another --workdir"
        )
    tokenizer = repos.folder(wanted.tokenizer)
    if not tokenizer.is_dir():
        raise ConfigError(
            f"config.tokenizer must be a folder with a tokenizer; there is no folder {wanted.tokenizer!r}"
        )
    for file in tokenizer.iterdir():
        kept = workdir / TOKENIZER_FOLDER / file.name
        if _of_tokenizer(file.name) and not kept.exists():
            write_whole(kept, file.read_bytes())
    _write(workdir / MODEL_FILE, {key: config[key] for key in ("model", "image", "system")})
    _write(workdir / CONFIG_FILE, config)


def _of_tokenizer(name: str) -> bool:
    """Whether to copy a file: the tokenizer may lie beside weights."""
    return name.endswith((".json", ".model", ".txt", ".jinja")) and not name.endswith(".index.json")


def _write(file: AnyPath, content: dict) -> None:
    write_whole(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _completed(config: dict) -> dict:
    """A config that an earlier version may have written, with keys that are new since then, at their defaults."""
    try:
        return to_dict(experiment(config))
    except ConfigError:  # it has keys that are gone: they are among those that differ
        return config


def _check_same(workdir: AnyPath, old: dict, new: dict, say: Callable[[str], None]) -> None:
    """A stage without a checkpoint may still change, and the last that has one get other steps than it was to do;
    everything else must be as it was."""
    done = {stage["name"]: committed_steps(workdir / stage["name"]) for stage in old["stages"]}
    started = [name for name, steps in done.items() if steps]
    if not started:
        return
    last, steps = f"stages.{started[-1]}.steps", done[started[-1]][-1]
    until = 1 + max(n for n, stage in enumerate(old["stages"]) if stage["name"] in started)
    old, new = ({**config, "stages": {s["name"]: s for s in config["stages"][:until]}} for config in (old, new))
    olds, news = flat(old), flat(new)
    differing = [
        key
        for key in sorted(olds.keys() | news.keys())
        if olds.get(key) != news.get(key) and not re.sub(r"^stages\.[^.]+\.(?=data\.)", "", key).startswith(CHANGEABLE)
    ]
    if last in differing and isinstance(news.get(last), int) and news[last] >= steps:
        differing.remove(last)
        was, now = olds[last], news[last]
        say(f"{last} was {was} and is {now}; from step {steps} on, learning rates are those of {now}")
    if differing:
        lines = "\n".join(f"  {key}: {olds.get(key)!r} there, {news.get(key)!r} now" for key in differing)
        raise ConfigError(
            f"{workdir} was trained with another config, and these keys differ:\n{lines}\n"
            "Use another --workdir, which --config.init may start from this one, or give the keys their values back"
        )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {
        key: leaf for name, item in items for key, leaf in flat(item, f"{path}.{name}" if path else str(name)).items()
    }
