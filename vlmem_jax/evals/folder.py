"""The folder of an evaluation: a line for each prompt, and what the lines depend on."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmem_jax.config import to_dict
from vlmem_jax.data import Prompts
from vlmem_jax.evals.config import EvalConfig
from vlmem_jax.evals.digest import digest
from vlmem_jax.evals.summary import Line
from vlmem_jax.generate import LoadedModel
from vlmem_jax.paths import write_whole

PARAMETERS = "parameters of the checkpoint"
"""Key of their digest."""


class Lines:
    """The newest line of each prompt, by name; in the file as soon as it is kept."""

    def __init__(self, file: Path):
        """Reads the file, if there is one; what was being written when a run was killed is cut off."""
        self.file = file
        self.by_name: dict[str, Line] = {}
        content = file.read_bytes() if file.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(file, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                fields = json.loads(line)
                self.by_name[fields["name"]] = fields
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{file}:{number} must be a JSON object with the `name` of a prompt: {error}; remove the line, or "
                    "give another --output"
                ) from error

    def keep(self, lines: Sequence[Line]) -> None:
        """Adds lines, or replaces those of the same prompts."""
        texts = [json.dumps(line, ensure_ascii=False) for line in lines]
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(text + "\n" for text in texts))
        self.by_name |= {line["name"]: json.loads(text) for line, text in zip(lines, texts, strict=True)}


def settings(model: LoadedModel, config: EvalConfig, prompts: Prompts) -> dict[str, Any]:
    """All that answers and scores depend on, by name."""
    image = model.processor.image
    defaults = type(image)()
    groups = {"sampling": to_dict(config.sampling), "invocation": to_dict(config.invocation)}
    return {
        **{f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()},
        "metric": config.reward,
        "rope_dhr": config.rope_dhr,
        **({"benchmark": config.benchmark} if config.benchmark else {}),
        **{f"image.{key}": value for key, value in to_dict(image).items() if value != getattr(defaults, key)},
        **{f"content of {lines.path}": lines.digest for lines in prompts.files},
        **{f"root of {source.path}": source.root for source in config.data if source.root},
        **{f"content of {store.path}": store.digest for store in prompts.stores if store},
        **({"geometry": made.digest} if (made := model.processor.geometry_of) else {}),
        PARAMETERS: digest(model.params),
    }


def check_settings(file: Path, settings: dict[str, Any], output: str | os.PathLike) -> None:
    """Writes them where there are none. Raises ValueError that names what differs from those that are there."""
    if not file.is_file():
        write_whole(file, (json.dumps(settings, indent=2) + "\n").encode())
        return
    before = json.loads(file.read_bytes())
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in names)
        raise ValueError(f"{output} holds answers that came about otherwise: {changes}; give another --output")
