"""The training loop: batches in, steps done, numbers out, checkpoints kept. It works on any Task."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from vlmem_jax.checkpoint import DamagedError, Store
from vlmem_jax.paths import AnyPath, Mirror
from vlmem_jax.runtime import hosts
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.sharding import batch_sharding, param_shardings
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.goodput import Goodput
from vlmem_jax.train.metrics import Recorder, SampleLog
from vlmem_jax.train.optimizer import make_optimizer, make_schedule
from vlmem_jax.train.profile import Profile
from vlmem_jax.train.stages import Split, changed, storage
from vlmem_jax.train.step import Sums, TrainState, init_state, make_step, state_shardings
from vlmem_jax.trees import Flat, flatten, unflatten


@runtime_checkable
class Model(Protocol):
    """Parameters that can be trained; `models.VLM` is one."""

    dtype: Any

    def abstract(self) -> dict: ...
    def axes(self) -> dict: ...
    def rates(self) -> dict[str, np.ndarray]: ...
    def metrics(self, params: dict) -> dict[str, Float[Array, ""]]: ...


@dataclasses.dataclass(frozen=True)
class StepInput:
    """What one step works on."""

    batch: Any
    """Global arrays, each with leading axes [accumulation, rows], which one program works on; or a list of parts of the
    same shapes, each with leading axis [rows], of which there may be another number at each step. Each set of shapes is
    compiled once."""
    denominator: float
    """What the sum of losses is divided by: the weights of the whole step, the same on all hosts. A step of 0 has
    nothing to learn, and changes nothing."""
    sample_ids: list[str]
    """Where the samples come from, for error messages."""
    counts: dict[str, int]
    """Tokens, images, tiles (of all hosts, padding not counted) and token slots of the step; `flops` of its samples,
    and `shape_flops`, which its rows would take if each were one sample, see `models.flops`."""
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    """More to record of the step."""


@runtime_checkable
class Objective(Protocol):
    """What a step computes."""

    model: Model

    def loss(self, params: dict, rows: Any, key: Array) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `step.Loss`; `rows` is one part of a batch."""


@runtime_checkable
class Task(Objective, Protocol):
    """What is learned. A task depends on the step and the parameters alone, plus what `state` gives.

    One whose work takes long has `heed(may_stop)`, too. It calls `may_stop()`, on all hosts alike, wherever `work` can
    be broken off: that raises Interrupted when the run is to stop. `state` is then that before the step.
    """

    def work(self, step: int, params: dict) -> StepInput:
        """What to do at `step`, counted from 0. Called in order, from any first step."""

    def evaluate(self, params: dict) -> dict[str, float]:
        """Numbers on held-out data; `loss` decides which checkpoint is best. Empty where there is no such data."""

    def state(self) -> dict:
        """What a checkpoint needs to hold of the task, ready for JSON, and numpy arrays by name as `arrays`: none of
        them empty, the same on all hosts."""

    def restore(self, state: dict) -> None:
        """Goes on from a state that `state` gave."""

    def close(self) -> None:
        """Ends its threads."""


REPEATED = 1.0
"""Seconds in which a signal is taken for the one before: launchers may send it to a process and to its group."""


class Interrupted(Exception):
    """The run is to stop, and the work of a step was broken off."""


class NonFiniteError(ValueError):
    """The loss or its gradient was not a finite number; the update was refused."""


def fit(
    task: Task,
    experiment: Experiment,
    stage: StageConfig,
    mesh: Mesh,
    store: Store,
    workdir: AnyPath,
    start: Callable[[dict], dict],
    clock: Goodput,
    say: Callable[[str], None] = print,
) -> tuple[int, bool]:
    """Trains one stage from its newest checkpoint that is whole, if it has one, to its last step; gives the steps done.

    `start(target)` gives the parameters of step 0 in the shapes, dtypes and shardings of `target`; `clock` learns where
    the time goes. On SIGTERM and Ctrl-C, at any one of the hosts, all of them finish and save the same step, or break
    off what the next one works on, and the second result is True. Raises NonFiniteError and CheckpointError; the last
    checkpoint is then as it was. What data and evaluation raise goes on when the steps before are saved (on one host:
    of several, the others are not there).
    """
    with jax.set_mesh(mesh), interruption() as interrupted, contextlib.ExitStack() as closing:
        program = Program(task, experiment, stage, mesh)
        closing.callback(task.close)
        with clock.spent("checkpoint"):
            step, restored = newest(program, store, say)
        files = closing.enter_context(Mirror(workdir, ["metrics.jsonl", f"samples/{jax.process_index()}.jsonl"]))
        records = Recorder(files.local, experiment, stage, step, clock)
        closing.callback(records.close)
        profile = Profile(experiment.profile, files.local / "profile" / stage.name, records.say)
        closing.callback(profile.close)
        samples = SampleLog(files.local, stage.name) if experiment.log_samples else None
        if restored is not None:
            state, frozen, saved = restored
            task.restore(saved)
        else:
            state, frozen = program.begin(start)
        closing.enter_context(clock.spent("step"))
        alone = jax.process_count() == 1
        ask_all = None if alone else any_host(mesh)
        if heed := getattr(task, "heed", None):
            heed(stopping_place(interrupted, ask_all, mesh))
        programs: dict[tuple, Callable] = {}
        stopping = False
        in_flight: tuple[int, StepInput, dict] | None = None

        def settle() -> None:
            """Reads the numbers of the step in flight; that waits for it."""
            nonlocal in_flight, stopping
            if in_flight is not None:
                done, work, metrics = in_flight
                in_flight = None
                values = {key: value.item() for key, value in jax.device_get(metrics).items()}
                if not values.pop("finite"):
                    raise NonFiniteError(_non_finite(stage, done, values, work, store.latest()))
                stopping |= values.pop("stop", False)
                if samples is not None:
                    samples.write(done, work.sample_ids)
                records.step(done, values | work.numbers, work.counts)

        def save(loss: float | None = None) -> None:
            settle()
            with clock.spent("checkpoint"):
                files.send()  # first: a run that goes on from this checkpoint has the records before it
                program.save(store, step, state, frozen, task.state(), loss)

        @contextlib.contextmanager
        def saving() -> Iterator[None]:
            """Saves the steps done before an error of the block goes on."""
            try:
                yield
            except Interrupted:
                raise
            except Exception as error:
                if alone and step > (store.latest() or 0):
                    save()
                    store.wait()
                    raise _saved(error, step, stage) from error
                raise

        while step < stage.steps and not stopping:
            if profile.due(step + 1):
                settle()
                with clock.spent("other"):
                    profile.switch()
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                try:
                    with saving(), clock.input_wait():
                        work = task.work(step, unflatten({**frozen, **state.params}))
                except Interrupted:
                    stopping = True
                    if step:
                        save()
                    break
                denominator = _everywhere(np.float32(work.denominator), program.replicated)
                in_parts = isinstance(work.batch, list)
                shapes = tuple(x.shape for x in jax.tree.leaves(work.batch[0] if in_parts else work.batch))
                if shapes not in programs:
                    with clock.spent("compile"):
                        compiled = program.part_by_part if in_parts else program.at_once
                        programs[shapes] = compiled(state, frozen, work.batch, denominator)
                        hosts.meet("compiled")  # collectives on CPU do not wait long for a host that compiles slower
                state, metrics = programs[shapes](state, frozen, work.batch, denominator)
                if ask_all is not None:
                    metrics["stop"] = ask_all(interrupted.is_set())
                clock.started(metrics)
                settle()
                step += 1
                in_flight = step, work, metrics
            store.check()
            scores = {}
            if step % experiment.eval_every == 0 or step == stage.steps:
                settle()
                with saving(), clock.spent("evaluation"):
                    scores = task.evaluate(unflatten({**frozen, **state.params}))
                if scores:
                    records.write(step, {f"eval/{name}": value for name, value in scores.items()})
            stopping |= alone and interrupted.is_set()
            if step % experiment.checkpoint.every == 0 or step == stage.steps or stopping:
                save(scores.get("loss"))
        with clock.spent("checkpoint"):
            store.wait()
        return step, stopping


def newest(
    program: "Program", store: Store, say: Callable[[str], None]
) -> tuple[int, tuple[TrainState, Flat, dict] | None]:
    """The newest step whose checkpoint is whole and what it holds; 0 and None where there is no checkpoint.

    Damaged ones after it are told by `say` and set aside. Raises DamagedError where none is whole, where the damage is
    in the checkpoint that all refer to, and on several hosts, which may not all see it.
    """
    damaged: dict[int, DamagedError] = {}
    for step in reversed(store.steps()):
        try:
            found = program.restore(store, step)
        except DamagedError as error:
            if jax.process_count() > 1 or not error.folder.startswith(str(store.folder / str(step))):
                raise
            damaged[step] = error
            continue
        for number, error in damaged.items():
            say(f"{error}. It was moved to {store.set_aside(number)}; going on from step {step}")
        return step, found
    if damaged:
        raise next(iter(damaged.values()))
    return 0, None


def _saved(error: Exception, step: int, stage: StageConfig) -> Exception:
    """The error, which also tells that nothing is lost."""
    words = f"{error}. Step {step} of stage {stage.name} is saved; the same command goes on from there"
    if not isinstance(error, ValueError):
        return ValueError(f"{type(error).__name__}: {words}")
    try:
        return type(error)(words)
    except TypeError:  # one that is made of more than words
        return ValueError(words)


RunStep = Callable[[TrainState, Flat, Any, Array], tuple[TrainState, dict[str, Array]]]
"""`run(state, frozen, batch, denominator) -> (state, metrics)`, compiled; the old state is donated."""


class Program:
    """A stage made ready to run on a mesh: where each array lies, and the step.

    `step` is all of it for batches with an axis of parts. `nothing`, `accumulate` and `apply` do it for parts that are
    given one by one, so that their number is no part of any shape: see `train.step.Step`.
    """

    def __init__(self, task: Objective, experiment: Experiment, stage: StageConfig, mesh: Mesh):
        optimizer_config = experiment.optimizer_of(stage)
        abstract, axes = flatten(task.model.abstract()), flatten(task.model.axes())
        shardings = flatten(param_shardings(mesh, task.model.abstract(), task.model.axes()))
        self.split = Split.of(stage, list(abstract))
        keep_all = experiment.checkpoint.content == "all"
        self._kept = abstract.keys() if keep_all else changed(experiment, stage, list(abstract))
        self.held = storage(self.split, abstract, axes, shardings, task.model.dtype)
        schedule = make_schedule(stage)
        rates = {path: rate for path, rate in task.model.rates().items() if path in self.split.trainable}
        self.optimizer = make_optimizer(optimizer_config, schedule, axes, rates)
        trainable, _ = self.split.part(self.held)
        shapes = jax.eval_shape(lambda params: init_state(params, self.optimizer), trainable)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        places = state_shardings(shapes, shardings, self.replicated)
        self.state = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )
        stage_number = zlib.crc32(stage.name.encode())
        step = make_step(
            task.loss,
            self.optimizer,
            schedule,
            optimizer_config.clip_norm,
            lambda: jax.random.fold_in(jax.random.key(experiment.seed), stage_number),
            task.model.metrics,
        )
        frozen, rows, compiled = self.split.part(shardings)[1], batch_sharding(mesh), options(mesh)
        sums = Sums(self.replicated, self.replicated, self.split.part(shardings)[0])
        self.step = jax.jit(
            step.whole,
            donate_argnums=0,
            in_shardings=(places, frozen, batch_sharding(mesh, leading=1), self.replicated),
            out_shardings=(places, self.replicated),
            compiler_options=compiled,
        )
        self.nothing = jax.jit(
            step.nothing, in_shardings=(places, frozen, rows), out_shardings=sums, compiler_options=compiled
        )
        self.accumulate = jax.jit(
            step.accumulate,
            donate_argnums=0,
            in_shardings=(sums, places, frozen, rows, self.replicated),
            out_shardings=sums,
            compiler_options=compiled,
        )
        self.apply = jax.jit(
            step.apply,
            donate_argnums=0,
            in_shardings=(places, frozen, sums, self.replicated),
            out_shardings=(places, self.replicated),
            compiler_options=compiled,
        )

    def at_once(self, state: TrainState, frozen: Flat, batch: Any, denominator: Array) -> RunStep:
        """The step for batches of these shapes, which have an axis of parts."""
        return self.step.lower(state, frozen, batch, denominator).compile()

    def part_by_part(self, state: TrainState, frozen: Flat, batch: list, denominator: Array) -> RunStep:
        """The step for lists of any number of parts of these shapes."""
        nothing = self.nothing.lower(state, frozen, batch[0]).compile()
        sums = nothing.out_info
        accumulate = self.accumulate.lower(sums, state, frozen, batch[0], denominator).compile()
        apply = self.apply.lower(state, frozen, sums, denominator).compile()

        def run(
            state: TrainState, frozen: Flat, batch: list, denominator: Array
        ) -> tuple[TrainState, dict[str, Array]]:
            sums = nothing(state, frozen, batch[0])
            for part in batch:
                sums = accumulate(sums, state, frozen, part, denominator)
            return apply(state, frozen, sums, denominator)

        return run

    def begin(self, start: Callable[[dict], dict]) -> tuple[TrainState, Flat]:
        """State and frozen parameters before the first step."""
        trainable, frozen = self.split.part(flatten(start(unflatten(self.held))))
        places = jax.tree.map(lambda x: x.sharding, self.state)
        begin = jax.jit(lambda params: init_state(params, self.optimizer), out_shardings=places, donate_argnums=0)
        return begin(trainable), frozen

    def restore(self, store: Store, step: int) -> tuple[TrainState, Flat, dict]:
        """State, frozen parameters and the task's state of a checkpoint of this stage."""
        params, train, meta = store.restore(step, unflatten(self.held), _by_name(self.state.optimizer))
        trainable, frozen = self.split.part(flatten(params))
        saved = flatten(train)
        optimizer = jax.tree.map_with_path(lambda path, _: saved[_name(path)], self.state.optimizer)
        state = TrainState(_everywhere(np.int32(step), self.state.step.sharding), trainable, optimizer)
        arrays = store.arrays(step)
        return state, frozen, meta["task"] | ({"arrays": arrays} if arrays else {})

    def save(
        self, store: Store, step: int, state: TrainState, frozen: Flat, task: dict, eval_loss: float | None
    ) -> None:
        """Starts to write a checkpoint."""
        params = unflatten({path: x for path, x in {**frozen, **state.params}.items() if path in self._kept})
        told = {name: value for name, value in task.items() if name != "arrays"}
        meta = {"step": step, "task": told}
        store.save(step, params, _by_name(state.optimizer), meta, eval_loss, task.get("arrays"))


def _name(path: tuple) -> str:
    return "optimizer/" + jax.tree_util.keystr(path, simple=True, separator="/")


def _by_name(optimizer: Any) -> dict:
    """The optimizer's arrays as a nested dict, whatever it keeps them in."""
    return unflatten({_name(path): leaf for path, leaf in jax.tree.leaves_with_path(optimizer)})


STOPPING = "stopping when this step is done and saved; once more: at once, without saving"
ENDING = "ending; a checkpoint that is being written is finished first; once more: it is given up"


@contextlib.contextmanager
def interruption(stopping: str = STOPPING, ending: str = ENDING) -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets, which is told at once, also while a program compiles.

    Another signal, more than REPEATED later, ends the program without saving; a checkpoint that is being written is
    finished, unless a third one comes.
    """
    event, asked = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    numbers = signal.SIGINT, signal.SIGTERM
    former = {number: signal.getsignal(number) for number in numbers}

    def restore(*_):
        for number, handler in former.items():
            signal.signal(number, handler)

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if not event.is_set():
            event.set()
            asked = time.monotonic()
        elif time.monotonic() - asked > REPEATED:
            restore()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for number in former:
        signal.signal(number, ask)
    with _told_at_once(numbers, stopping, ending):
        try:
            yield event
        finally:
            restore()


@contextlib.contextmanager
def _told_at_once(numbers: Sequence[int], stopping: str, ending: str) -> Iterator[None]:
    """Says what a first and a second of these signals do when they come: Python's own handlers wait for the compiler,
    the bytes that signals write to a pipe do not."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    former = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def tell() -> None:
        first = None
        while content := os.read(read, 1):
            if content[0] not in numbers:
                continue
            if first is None:
                first = time.monotonic()
                print(stopping, file=sys.stderr, flush=True)
            elif time.monotonic() - first > REPEATED:
                print(ending, file=sys.stderr, flush=True)

    telling = threading.Thread(target=tell, name="signals", daemon=True)
    telling.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        os.close(write)
        telling.join()
        os.close(read)


def any_host(mesh: Mesh) -> Callable[[bool], Array]:
    """Asks all hosts whether any of them says yes, as work for the devices: nobody waits before the answer is read."""
    everyone = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def say(yes: bool) -> Array:
        words = [jax.device_put(np.array([yes]), device) for device in everyone.addressable_devices]
        return jax.make_array_from_single_device_arrays((mesh.size,), everyone, words)

    words = say(False), say(True)
    answer = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda yes: answer(words[yes])


def stopping_place(
    interrupted: threading.Event, ask_all: Callable[[bool], Array] | None, mesh: Mesh
) -> Callable[[], None]:
    """What raises Interrupted once a run was interrupted, see `Task`. On several hosts, `ask_all` of `any_host` says so
    to all at the same call: the one after it was asked, so that nobody waits for the devices."""
    asked: Array | None = None

    def may_stop() -> None:
        nonlocal asked
        if ask_all is None:
            stop = interrupted.is_set()
        else:
            before = asked
            with jax.set_mesh(mesh):
                asked = ask_all(interrupted.is_set())
            stop = before is not None and bool(jax.device_get(before))
        if stop:
            raise Interrupted

    return may_stop


def _everywhere(value: np.generic, replicated: NamedSharding) -> Array:
    """A number on all devices, without the comparison between hosts that device_put makes."""
    copies = [jax.device_put(value, device) for device in replicated.addressable_devices]
    return jax.make_array_from_single_device_arrays((), replicated, copies)


def _non_finite(stage: StageConfig, step: int, values: dict[str, float], work: StepInput, last: int | None) -> str:
    ids = ", ".join(work.sample_ids)
    good = "no checkpoint has been written yet" if last is None else f"the last checkpoint, step {last}, is good"
    return (
        f"step {step} of stage {stage.name} gave loss {values['loss']} and gradient norm {values['grad_norm']}; the "
        f"update was refused, nothing was saved and {good}. Look at its samples ({ids}), or lower "
        f"stages.{stage.name}.learning_rate"
    )
