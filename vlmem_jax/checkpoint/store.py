"""The checkpoints of one training stage: written in the background, committed at once, kept by age and by loss.

`FOLDER/STEP/params` (a nested dict of parameters), `train` (what only training needs), `meta` (JSON) and `metrics`
(the evaluation loss), and `arrays`, where the task of the stage keeps some. On a disk, a folder still being written has
another name, so a step that is there is whole; in a bucket (gs://), where nothing can be renamed, a step is whole once
it has a file `commit_success.txt`.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vlmem_jax.checkpoint.folder import base_of, committed_steps
from vlmem_jax.paths import AnyPath, as_path, is_remote
from vlmem_jax.trees import flatten, unflatten

Tree = Mapping[str, Any]
RESTORE_CONCURRENT_GB = 96.0
REPLICA_BYTES = 2**20
"""Where each replica writes a part of an array, it is at least so large; cutting it out takes a program of its own."""
# set on orbax's own handler, of which nothing else is to change; it has no public way to do so
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = REPLICA_BYTES


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a stage is saved and what stays on disk."""

    every: int = 500
    """Steps between checkpoints; the last step of a stage is always saved."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints with the lowest evaluation loss to keep as well."""
    content: Literal["all", "trained"] = "all"
    """Which parameters a checkpoint holds: all, or those that its stage and the ones before it train. For the others,
    it names the checkpoint the run starts from (`init`), or a copy of the start that is kept once in WORKDIR/base."""
    restore_concurrent_gb: float = RESTORE_CONCURRENT_GB
    """What a host reads at the same time when a checkpoint is restored, GB: lower it where host memory runs out."""

    def __post_init__(self):
        if self.every < 1 or self.keep_last < 1 or self.keep_best < 0:
            raise ValueError(f"every and keep_last must be at least 1 and keep_best at least 0; got {self}")
        if self.restore_concurrent_gb <= 0:
            raise ValueError(f"restore_concurrent_gb must be positive, got {self.restore_concurrent_gb}")


class CheckpointError(OSError):
    """A checkpoint could not be written; the message says which one is still good."""


class DamagedError(ValueError):
    """A checkpoint cannot be read, though it was complete once, and reading it again will not help."""

    def __init__(self, folder: str | os.PathLike, reason: str):
        super().__init__(f"{folder} is damaged: {reason}")
        self.folder = str(folder)
        """The part that is damaged."""


_PASSING = (
    *("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "ABORTED"),
    *("Permission denied", "timed out", "Too many open files", "Cannot allocate memory"),
)
"""In what is said of a checkpoint that cannot be read now and may be whole."""


def _unreadable(folder: AnyPath, error: Exception) -> ValueError:
    """The error to raise for one of reading a checkpoint: of damage, or of what may pass."""
    passing = PermissionError, TimeoutError, ConnectionError, MemoryError
    if isinstance(error, passing) or any(words in str(error) for words in _PASSING):
        return ValueError(f"{folder} cannot be read: {_first_line(error)}; the same command tries again")
    return DamagedError(folder, _first_line(error))


class Store:
    """Checkpoints of one stage in `folder`.

    `save` returns as soon as the device may overwrite its arrays; a failed write shows at the next `check`, `save` or
    `wait` as CheckpointError, and leaves every earlier checkpoint as it was.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep_last: int = 2,
        keep_best: int = 1,
        restore_concurrent_gb: float = RESTORE_CONCURRENT_GB,
    ):
        self.folder = as_path(folder)
        self._restore_concurrent_gb = restore_concurrent_gb
        best = policies.BestN(get_metric_fn=_loss_of, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best]),
            best_fn=_loss_of,  # without it the loss is not written, whatever the policy says
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self._writing: int | None = None
        quieten_orbax()
        with self._failures():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The newest committed step."""
        steps = self.steps()
        return steps[-1] if steps else None

    def steps(self) -> list[int]:
        """All committed steps, oldest first."""
        return committed_steps(self.folder)

    def best(self) -> tuple[int, float] | None:
        """The committed step with the lowest evaluation loss, and that loss."""
        losses = {step: loss for step in self.steps() if (loss := _eval_loss(self.folder / str(step))) is not None}
        return min(losses.items(), key=lambda item: item[1]) if losses else None

    def save(
        self,
        step: int,
        params: Tree,
        train: Tree,
        meta: Tree,
        eval_loss: float | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Starts to write `step`, after the write before it has ended. `arrays` are of the host, none of them empty,
        and the same on all hosts. Raises CheckpointError."""
        self.wait()
        if step == self.latest():
            return
        with self._failures(step):
            self._check_room(sum(x.nbytes for x in jax.tree.leaves((params, train, arrays))))
            more = {"arrays": ocp.args.PyTreeSave(dict(arrays))} if arrays else {}
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=_layerwise(params), train=_layerwise(train), meta=ocp.args.JsonSave(meta), **more
                ),
                metrics=None if eval_loss is None else {"loss": eval_loss},
                force=True,
            )
            self._writing = step

    def check(self) -> None:
        """Raises CheckpointError if the last write has failed; does not wait for one still running."""
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last write is committed. Raises CheckpointError if it failed."""
        if self._writing is not None:
            with self._failures(self._writing):
                self._manager.wait_until_finished()
            self._writing = None

    def restore(self, step: int, params: Tree, train: Tree) -> tuple[Any, Any, dict]:
        """`(params, train, meta)` of `step`, in the shapes, dtypes and shardings of the two target trees."""
        folder = self.folder / str(step)
        try:
            meta = json.loads((folder / "meta" / "metadata").read_bytes())
        except (OSError, ValueError) as error:
            raise _unreadable(folder, error) from error
        gb = self._restore_concurrent_gb
        return load_params(folder, params, gb), _restore(folder / "train", train, gb), meta

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of the host that were saved with `step`; none: empty. Raises DamagedError."""
        folder = self.folder / str(step) / "arrays"
        if not folder.is_dir():
            return {}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                names = checkpointer.metadata(folder).item_metadata.tree
                as_saved = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
                return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_saved))
            except Exception as error:  # of many kinds, by what is broken
                raise _unreadable(folder, error) from error

    def set_aside(self, step: int) -> str:
        """Takes a damaged step out of the checkpoints without removing it; gives where it is."""
        folder = self.folder / str(step)
        if is_remote(folder):  # a folder of a bucket cannot be renamed, but without this file it counts as unfinished
            (folder / "commit_success.txt").unlink(missing_ok=True)
            aside = folder
        else:
            aside = next(name for n in range(1000) if not (name := self.folder / f"{step}.damaged{n or ''}").exists())
            os.rename(folder, aside)
        self._manager.reload()
        return str(aside)

    def close(self) -> None:
        """Waits for the last write, and ends the background threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it raises the failure that `wait` has already reported
                self._manager.close()

    def _check_room(self, needed: int) -> None:
        free = needed if is_remote(self.folder) else shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(f"it needs {needed / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left")

    @contextlib.contextmanager
    def _failures(self, step: int | None = None):
        try:
            yield
        except Exception as error:
            self._writing = None
            if step is None:
                raise CheckpointError(f"cannot keep checkpoints in {self.folder}: {_first_line(error)}") from error
            last = self.latest()
            good = "no earlier checkpoint exists" if last is None else f"the checkpoint of step {last} is whole"
            advice = (
                "Look at its permissions and quota"
                if is_remote(self.folder)
                else "Make room on the disk or lower checkpoint.keep_last"
            )
            again = "at the beginning" if last is None else "from there"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {_first_line(error)}; {good}. "
                f"{advice}, then give the same command: it goes on {again}"
            ) from error


def save_params(step_folder: str | os.PathLike, params: Tree) -> None:
    """Writes parameters alone as a new `step_folder`, whole or not at all."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(as_path(step_folder), args=ocp.args.Composite(params=_layerwise(params)))


def load_params(
    step_folder: str | os.PathLike, target: Tree, restore_concurrent_gb: float = RESTORE_CONCURRENT_GB
) -> Any:
    """Parameters of `step_folder` (from `folder.find`) in the shapes, dtypes and shardings of `target`.

    Raises ValueError that lists every parameter that is missing, unknown, or of another shape.
    """
    return _load(as_path(step_folder), target, restore_concurrent_gb)


def _load(step_folder: AnyPath, target: Tree, concurrent_gb: float, partial: bool = False) -> Any:
    """What a step does not hold is read from its base. `partial`: it may hold more than is wanted."""
    base = base_of(step_folder)
    if base is None:
        return _restore(step_folder / "params", target, concurrent_gb, partial)
    stored = parameter_paths(step_folder)
    wanted = flatten(target)
    own = {path: leaf for path, leaf in wanted.items() if path in stored}
    rest = {path: leaf for path, leaf in wanted.items() if path not in stored}
    found = _restore(step_folder / "params", unflatten(own), concurrent_gb, partial)
    if not rest:
        return found
    more = _load(base, unflatten(rest), concurrent_gb, partial=True)
    return unflatten({**flatten(found), **flatten(more)})


def stored_paths(step_folder: AnyPath) -> set[str]:
    """Paths of the parameters of a step, with those of its base."""
    base = base_of(step_folder)
    return parameter_paths(step_folder) | (stored_paths(base) if base else set())


def parameter_paths(step_folder: AnyPath) -> set[str]:
    """Paths of the parameters that a step itself holds."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        stored = checkpointer.metadata(step_folder / "params").item_metadata
    return set(flatten(stored.tree)) if stored else set()


def _layerwise(tree: Tree) -> ocp.args.PyTreeSave:
    """Stacked arrays as a chunk a layer: they are compressed in parallel, and can be read a layer at a time."""
    by_layer, whole = ocp.SaveArgs(shard_axes=(0,)), ocp.SaveArgs()
    return ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda x: by_layer if x.ndim >= 3 else whole, tree))


def _restore(folder: AnyPath, target: Tree, concurrent_gb: float, partial: bool = False) -> Any:
    if not folder.is_dir():
        raise ValueError(f"{folder.parent} is no checkpoint: it has no folder {folder.name!r}")
    quieten_orbax()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=concurrent_gb)) as checkpointer:
        try:
            stored = checkpointer.metadata(folder).item_metadata
        except Exception as error:  # of many kinds, by what is broken
            raise _unreadable(folder, error) from error
        if stored is None:
            raise DamagedError(folder, "its _METADATA cannot be read")
        _check_fit(folder, flatten(stored.tree), flatten(target), partial)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        try:
            wanted = ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=partial)
            return checkpointer.restore(folder, args=wanted)
        except Exception as error:  # of many kinds, by what is broken
            if "more bytes than we reserved" in str(error):
                raise ValueError(
                    f"{folder} holds arrays of which a device needs more at once than "
                    f"checkpoint.restore_concurrent_gb={concurrent_gb:g} allows ({_first_line(error)}); raise it"
                ) from error
            raise _unreadable(folder, error) from error


def _check_fit(folder: AnyPath, stored: Tree, wanted: Tree, partial: bool) -> None:
    lines = [f"  {name}: not in the checkpoint" for name in wanted if name not in stored]
    lines += [f"  {name}: not in the model" for name in stored if name not in wanted and not partial]
    lines += [
        f"  {name}: {tuple(stored[name].shape)} in the checkpoint, {tuple(leaf.shape)} in the model"
        for name, leaf in wanted.items()
        if name in stored and tuple(stored[name].shape) != tuple(leaf.shape)
    ]
    if lines:
        raise ValueError(
            f"the checkpoint {folder} does not fit the model of the config; {len(lines)} arrays differ:\n"
            + "\n".join(sorted(lines))
        )


def _eval_loss(step_folder: AnyPath) -> float | None:
    file = step_folder / "metrics" / "metrics"
    return json.loads(file.read_bytes())["loss"] if file.is_file() else None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _loss_of(metrics: Tree) -> float:
    return metrics["loss"]


def quieten_orbax() -> None:
    """Keeps orbax from printing each failure a dozen times from its threads, besides raising it once."""
    logging.getLogger("absl").addFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname
