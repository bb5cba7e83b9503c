"""A whole experiment: its stages one after the other, each from the last checkpoint of the one before."""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import kernels_pallas
import vlmem_jax
from vlmem_jax.checkpoint import Store, find, load_params, save_params, stored_paths
from vlmem_jax.checkpoint.folder import BASE_FILE, CONFIG_FILE, committed_steps, set_base
from vlmem_jax.config import ConfigError, to_dict
from vlmem_jax.hub import repos
from vlmem_jax.hub.convert import is_released, load_onto
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import whole_heads
from vlmem_jax.paths import AnyPath, as_path, is_remote
from vlmem_jax.runtime import hosts
from vlmem_jax.runtime.sharding import make_mesh
from vlmem_jax.train import workdir as folder
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.goodput import Goodput
from vlmem_jax.train.lock import locked
from vlmem_jax.train.loop import Task, fit
from vlmem_jax.train.next_token import NextToken
from vlmem_jax.train.stages import Split
from vlmem_jax.trees import flatten, unflatten

MakeTask = Callable[[Experiment, StageConfig, VLM, Mesh, AnyPath], Task]

TASKS: dict[str, MakeTask] = {"next_token": NextToken}
"""What makes a task, by its kind. A `check(experiment, stage)` that it has is called before the first stage."""

SHARED_FOLDER_SECONDS = 20
"""What a file of one host may need until the others see it."""


def run(
    experiment: Experiment,
    workdir: str | os.PathLike,
    only: str | None = None,
    tasks: Mapping[str, MakeTask] = TASKS,
    say: Callable[[str], None] = print,
) -> bool:
    """Trains the stages that are not done yet, or the one named `only`, in `workdir`, on a disk or gs://.

    True when they are done, False if interrupted: calling it again goes on. Raises ValueError for what does not fit
    together, NonFiniteError and CheckpointError from the loop.
    """
    workdir = as_path(workdir)
    say = say if jax.process_index() == 0 else _silent
    _check_hosts(experiment, workdir, only)
    stages = {stage.name: stage for stage in experiment.stages}
    if only is not None and only not in stages:
        raise ConfigError(f"there is no stage {only!r}; the experiment has {', '.join(stages)}")
    for stage in experiment.stages:
        if stage.task_kind not in tasks:
            raise ConfigError(
                f"stages.{stage.name}.task.kind must be one of {', '.join(tasks)}; got {stage.task_kind!r}"
            )
        if check := getattr(tasks[stage.task_kind], "check", None):
            check(experiment, stage)
    mesh, model = make_mesh(experiment.mesh), VLM(experiment.model)
    experiment.check_mesh(mesh)
    for line in whole_heads(model, mesh, jnp.dtype(jnp.float32).itemsize, cache=False):
        say(line)
    with contextlib.ExitStack() as holding:
        hosts.on_first(lambda: holding.enter_context(locked(workdir, say)))
        hosts.on_first(lambda: folder.prepare(workdir, experiment, say))
        _check_shared(experiment, workdir)
        for stage in [stages[only]] if only else experiment.stages:
            model = experiment.model_of(stage)
            if _last(workdir, stage) == stage.steps:
                say(f"stage {stage.name} is done")
            elif not _run_stage(experiment, stage, model, mesh, workdir, tasks[stage.task_kind], say):
                return False
    return True


def _run_stage(
    experiment: Experiment,
    stage: StageConfig,
    model: VLM,
    mesh: Mesh,
    workdir: AnyPath,
    make_task: MakeTask,
    say: Callable[[str], None],
) -> bool:
    clock = Goodput()
    start, source = origin(experiment, stage, model, workdir)
    shapes = flatten(model.abstract())
    trained = sum(shapes[path].size for path in Split.of(stage, list(shapes)).trainable)
    done = _last(workdir, stage)
    say(
        f"stage {stage.name}: {stage.steps} steps from {f'its checkpoint of step {done}' if done else source}, trains "
        f"{trained:,} of {sum(x.size for x in shapes.values()):,} parameters"
    )
    task = make_task(experiment, stage, model, mesh, workdir)
    if report := getattr(task, "report", ""):
        say(report)
    keep = experiment.checkpoint
    store = Store(workdir / stage.name, keep.keep_last, keep.keep_best, keep.restore_concurrent_gb)
    try:
        start = _with_base(experiment, stage, model, workdir, start)
        done, stopped = fit(task, experiment, stage, mesh, store, workdir, start, clock, say)
    finally:
        store.close()
        clock.close()
    say(clock.summary())
    if done < stage.steps:
        saved = f"at step {done} of stage {stage.name}, which is saved"
        where = saved if done else f"before step 1 of stage {stage.name} is done"
        say(f"stopped {where}; the same command goes on from there")
        return False
    best = store.best()
    say(f"stage {stage.name} is done" + (f"; lowest evaluation loss {best[1]:.4f} at step {best[0]}" if best else ""))
    return not stopped


def _with_base(
    experiment: Experiment, stage: StageConfig, model: VLM, workdir: AnyPath, start: Callable[[dict], dict]
) -> Callable[[dict], dict]:
    """`start`, by which the run also gets the checkpoint that its own refer to, if they are to.

    Raises ConfigError if it has none and cannot get one any more.
    """
    if experiment.checkpoint.content == "all" or (workdir / BASE_FILE).is_file():
        return start
    if _last(workdir, experiment.stages[0]):
        raise ConfigError(
            f"config.checkpoint.content=trained must be set when a run starts, and {workdir} holds one that kept all; "
            "give the key its value back, or use another --workdir"
        )
    source = None if experiment.init is None else checkpoint_of(experiment.init)
    if source is not None and not new_adapters(model, source):
        hosts.on_first(lambda: set_base(workdir, source))
        return start

    def start_and_keep(target: dict) -> dict:
        params, base = start(target), workdir / "base" / "0"
        hosts.on_first(lambda: base.rmtree(missing_ok=True) if is_remote(base) else shutil.rmtree(base, True))
        save_params(base, params)
        hosts.on_first(lambda: set_base(workdir, base))
        return params

    return start_and_keep


def checkpoint_of(init: str) -> AnyPath | None:
    """The step folder that `init` means; None for a folder in the Hugging Face layout."""
    source = repos.folder(init)
    return None if is_released(source) else find(source).step_folder


def _silent(text: str) -> None:
    """In place of `print`, on hosts other than the first."""


def _check_hosts(experiment: Experiment, workdir: AnyPath, only: str | None) -> None:
    """Raises ValueError if hosts were started with different code or configs."""
    if jax.process_count() == 1:
        return
    facts = {"jax": jax.__version__, "vlmem_jax": vlmem_jax.__version__, "--stage": only, "--workdir": str(workdir)}
    for package in (vlmem_jax, kernels_pallas):
        root = Path(package.__file__).parent
        for file in root.rglob("*.py"):
            name = file.relative_to(root.parent).as_posix()
            facts[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    facts |= {f"config.{key}": value for key, value in folder.flat(to_dict(experiment)).items()}
    hosts.require_same("hosts must run the same code and config", facts)


def _check_shared(experiment: Experiment, workdir: AnyPath) -> None:
    """Raises ValueError if hosts do not see one workdir, in which the first has just written."""
    if jax.process_count() == 1:
        return
    end = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (workdir / CONFIG_FILE).is_file() and time.monotonic() < end:
        time.sleep(0.1)
    seen = {CONFIG_FILE: (workdir / CONFIG_FILE).is_file()}
    seen |= {f"checkpoints of stage {stage.name}": committed_steps(workdir / stage.name) for stage in experiment.stages}
    hosts.require_same(f"--workdir must be a folder that all hosts share, such as NFS or gs://, got {workdir}", seen)


def _last(workdir: AnyPath, stage: StageConfig) -> int:
    steps = committed_steps(workdir / stage.name)
    return steps[-1] if steps else 0


def origin(
    experiment: Experiment, stage: StageConfig, model: VLM, workdir: AnyPath
) -> tuple[Callable[[dict], dict], str]:
    """What gives the parameters of step 0, and its name."""
    number, limit = experiment.stages.index(stage), experiment.checkpoint.restore_concurrent_gb
    if number:
        before = experiment.stages[number - 1]
        if _last(workdir, before) != before.steps:
            raise ConfigError(
                f"stage {stage.name} starts from the end of stage {before.name}, of which {_last(workdir, before)} of "
                f"{before.steps} steps are done in {workdir}; run it first, or without --stage"
            )
        step = workdir / before.name / str(before.steps)
        return (lambda target: load_params(step, target, limit)), f"the end of stage {before.name}"
    if experiment.init is None:
        return (lambda target: model.fresh(jax.random.key(experiment.seed), target)), f"seed {experiment.seed}"
    step = checkpoint_of(experiment.init)
    if step is None:
        source = experiment.init
        return (lambda target: load_onto(source, model, target, experiment.seed)), str(source)
    new = new_adapters(model, step)
    if not new:
        return (lambda target: load_params(step, target, limit)), str(step)

    def with_new(target: dict) -> dict:
        leaves = flatten(target)
        made = model.fresh(jax.random.key(experiment.seed), unflatten({path: leaves.pop(path) for path in new}))
        return unflatten({**flatten(load_params(step, unflatten(leaves), limit)), **flatten(made)})

    return with_new, f"{step}, and new adapters"


def new_adapters(model: VLM, step: AnyPath) -> list[str]:
    """Paths of the model's adapters that a checkpoint lacks."""
    paths = [path for path in flatten(model.abstract()) if path.startswith("adapters/")]
    stored = stored_paths(step) if paths else ()
    return [path for path in paths if path not in stored]
