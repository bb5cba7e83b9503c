"""Finds the model behind a path: a workdir of training, one of its stages or steps, or a converted checkpoint.

A checkpoint folder holds `model.json` (what inference needs of the config), `tokenizer/`, and parameters: in
`STAGE/STEP/params` if training wrote it, in `STEP/params` if `vlmem convert` did. Where only what was trained is kept,
`base.json` names the step folder that has the rest.
"""

import dataclasses
import hashlib
import json
import os

from vlmem_jax.paths import AnyPath, as_path, is_remote, write_whole

MODEL_FILE = "model.json"
CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
BASE_FILE = "base.json"
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


def set_base(workdir: AnyPath, step_folder: AnyPath) -> None:
    """Parameters that steps of `workdir` do not hold are those of `step_folder` from now on."""
    inside = step_folder.is_relative_to(workdir)
    where = step_folder.relative_to(workdir) if inside else step_folder
    content = {"step_folder": str(where), "fingerprint": _fingerprint(step_folder)}
    write_whole(workdir / BASE_FILE, (json.dumps(content, indent=2) + "\n").encode())


def base_of(step_folder: AnyPath) -> AnyPath | None:
    """The step folder with the parameters that `step_folder` does not hold; None if it has no base.

    Raises ValueError if that is gone, or not the one that it was.
    """
    root = next((folder for folder in step_folder.parents[:2] if (folder / BASE_FILE).is_file()), None)
    if root is None:
        return None
    content = json.loads((root / BASE_FILE).read_bytes())
    # a path with a root of its own replaces what it is joined to
    base = as_path(content["step_folder"]) if "://" in content["step_folder"] else root / content["step_folder"]
    if base == step_folder:
        return None
    if not (base / "params").is_dir() or _fingerprint(base) != content["fingerprint"]:
        state = "is another one now" if (base / "params").is_dir() else "is not there"
        raise ValueError(
            f"{step_folder} holds what was trained alone, and the checkpoint it was trained from, {base}, {state}; put "
            f"it back, or write its new place into {root / BASE_FILE}"
        )
    return base


def _fingerprint(step_folder: AnyPath) -> str:
    """Of the index that orbax keeps of all arrays and where they lie."""
    return hashlib.sha256((step_folder / "params" / "manifest.ocdbt").read_bytes()).hexdigest()[:16]
