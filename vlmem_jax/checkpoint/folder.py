"""Finds the model behind a path: a workdir of training, one of its stages or steps, or a converted checkpoint.

A checkpoint folder holds `model.json` (what inference needs of the config), `tokenizer/`, and parameters: in
`STAGE/STEP/params` if training wrote it, in `STEP/params` if `vlmem convert` did.
"""

import dataclasses
import json
import os

from vlmem_jax.paths import AnyPath, as_path, is_remote

MODEL_FILE = "model.json"
CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
COMMIT_FILE = "commit_success.txt"
"""What orbax writes last; on a disk, a folder gets its name last."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a checkpoint lie."""

    root: AnyPath
    """The folder with model.json."""
    step_folder: AnyPath
    """The folder whose `params` to load."""

    @property
    def model(self) -> dict:
        """The content of model.json: model, image, template, system."""
        return json.loads((self.root / MODEL_FILE).read_bytes())

    @property
    def tokenizer(self) -> AnyPath:
        """Folder of the tokenizer."""
        return self.root / TOKENIZER_FOLDER


def find(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint that `path` means: the newest committed step at or below it.

    In a workdir the newest step is that of the last stage that has one. Raises ValueError, saying what is missing.
    """
    path = as_path(path)
    if not path.is_dir():
        raise ValueError(f"a checkpoint is a folder; there is no folder {path}")
    root = next((folder for folder in (path, *path.parents[:2]) if (folder / MODEL_FILE).is_file()), None)
    if root is None:
        raise ValueError(
            f"{path} is no checkpoint: it must hold {MODEL_FILE}, or be a stage or step folder of a workdir that does. "
            "A folder in the Hugging Face layout becomes one by `vlmem convert`"
        )
    steps = committed_steps(path)
    if _is_step(path):
        step_folder = path
    elif steps:
        step_folder = path / str(steps[-1])
    else:
        stages = [stage for stage in stage_names(root) if committed_steps(root / stage)] if path == root else []
        if not stages:
            file = f" and a file STEP/{COMMIT_FILE}" * is_remote(path)
            raise ValueError(f"{path} has no committed checkpoint yet: it needs a folder STEP/params{file}")
        step_folder = root / stages[-1] / str(committed_steps(root / stages[-1])[-1])
    return Checkpoint(root, step_folder)


def committed_steps(folder: AnyPath) -> list[int]:
    """Steps whose checkpoint is whole, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(item.name) for item in folder.iterdir() if item.name.isdigit() and _is_step(item))


def _is_step(folder: AnyPath) -> bool:
    """On a disk, a step that is being written has another name."""
    return (folder / "params").is_dir() and (not is_remote(folder) or (folder / COMMIT_FILE).exists())


def stage_names(workdir: AnyPath) -> list[str]:
    """The stages of a workdir in the order in which they run; none for a converted checkpoint."""
    file = workdir / CONFIG_FILE
    return [stage["name"] for stage in json.loads(file.read_bytes())["stages"]] if file.is_file() else []
