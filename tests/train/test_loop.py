import functools
import hashlib
import json
import os
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

from tests.train import standin
from vlmem_jax.checkpoint import DamagedError, Store, load_params
from vlmem_jax.runtime import sharding
from vlmem_jax.train import loop
from vlmem_jax.train.config import OptimizerConfig
from vlmem_jax.train.goodput import Goodput
from vlmem_jax.train.loop import Interrupted, NonFiniteError, any_host, fit, interruption, stopping_place
from vlmem_jax.train.profile import ProfileConfig
from vlmem_jax.trees import flatten


def mesh_of(data, fsdp, tensor):
    config = sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return sharding.make_mesh(config, jax.devices()[: data * fsdp * tensor])


def train(folder, experiment=None, task=None, mesh=None, until=None):
    """Fits the stand-in; `until`: the step in which a Ctrl-C comes. Gives the steps done and the task."""
    experiment = experiment or standin.experiment()
    stage = experiment.stages[0]
    mesh = mesh or mesh_of(1, 1, 1)
    task = task or standin.Task(experiment, stage, None, mesh)
    if until is not None:
        work = task.work

        def interrupting(step, params):
            if step == until:
                signal.raise_signal(signal.SIGINT)
            return work(step, params)

        task.work = interrupting
    store = Store(folder / stage.name, experiment.checkpoint.keep_last, experiment.checkpoint.keep_best)

    def start(target):
        return jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), task.model.start(), target)

    clock = Goodput()
    try:
        done, stopped = fit(task, experiment, stage, mesh, store, folder, start, clock)
    finally:
        store.close()
        clock.close()
    assert stopped == (until is not None)
    return done, task


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Folder, task and steps of a run that learns, and the names of the programs that were compiled for it."""
    folder, compiled = tmp_path_factory.mktemp("long"), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **kwargs: compiled.append(kwargs.get("fun_name")) if "backend_compile" in event else None
    )
    done, task = train(folder, standin.experiment(steps=60, learning_rate=3e-2, log_samples=True))
    return folder, task, done, tuple(compiled)


def test_the_loss_goes_down_and_everything_is_recorded(long):
    folder, task, done, _ = long
    values = losses(folder)
    assert done == 60 and list(values) == list(range(1, 61))
    assert values[60] < values[1] / 3
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert last.keys() >= {"loss", "absolute", "grad_norm", "learning_rate", "gate/first", "tokens_per_s"}
    assert last["utilisation"] == pytest.approx(1.25 * last["mfu"]) and last["mfu"] > 0
    assert last["fill"] == 0.75
    assert 0 < last["goodput"] < 1 and last["seconds/compile"] > 0 and last["seconds/evaluation"] > 0
    assert task.evaluations == 15 and task.closed
    assert list((folder / "tensorboard").iterdir())


def test_each_step_names_its_samples(long):
    lines = [json.loads(line) for line in (long[0] / "samples" / "0.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("only", step) for step in range(1, 61)]
    assert lines[1]["samples"] == [f"numbers.jsonl:{row}" for row in range(8, 16)]


def test_the_program_is_compiled_once_a_stage(long):
    assert long[3].count("jit(step)") == 1


def test_checkpoints_come_at_their_steps_and_at_the_end(tmp_path):
    train(tmp_path, standin.experiment(steps=10))
    assert set(Store(tmp_path / "only").steps()) >= {8, 10}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses by step of a run that nothing interrupts, on a mesh; each is run once."""

    @functools.cache
    def run(*shape):
        folder = tmp_path_factory.mktemp("whole")
        train(folder, mesh=mesh_of(*shape))
        return losses(folder)

    return run


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_run_stopped_again_and_again_equals_one_in_a_piece_bit_for_bit(tmp_path, whole, shape):
    mesh, first = mesh_of(*shape), 0
    for stop in (0, 3, 4, 6):  # the first step, one before a checkpoint, one at it, one after
        done, task = train(tmp_path / "parts", mesh=mesh, until=stop)
        assert done == stop + 1, "the step in which the signal comes is finished"
        assert task.seen == list(range(first, stop + 1))
        assert Store(tmp_path / "parts" / "only").latest() == done
        first = done
    done, task = train(tmp_path / "parts", mesh=mesh)
    assert done == 12 and task.restored == {"worked": 7 - 5}, "the task gets back what it had given"
    assert losses(tmp_path / "parts") == whole(*shape)


class Slow(standin.Task):
    """Its work can be broken off."""

    def heed(self, may_stop):
        self.may_stop = may_stop

    def work(self, step, params):
        self.may_stop()
        return super().work(step, params)


@pytest.mark.parametrize("stop, saved", [(0, None), (4, 4), (6, 6)])
def test_work_that_can_be_broken_off_is_done_again_by_the_run_that_goes_on(tmp_path, whole, stop, saved):
    experiment, mesh = standin.experiment(), mesh_of(1, 1, 1)
    broken_off = Slow(experiment, experiment.stages[0], None, mesh)
    done, task = train(tmp_path, task=broken_off, until=stop)
    assert done == stop and task.seen == list(range(stop)) and Store(tmp_path / "only").latest() == saved
    done, task = train(tmp_path)
    assert task.seen[0] == stop and losses(tmp_path) == whole(1, 1, 1)


def test_hosts_stop_at_the_same_call_whichever_has_been_told():
    mesh, interrupted = mesh_of(2, 1, 1), threading.Event()
    may_stop = stopping_place(interrupted, any_host(mesh), mesh)
    may_stop()
    may_stop()
    interrupted.set()
    may_stop()  # all hosts are asked now, and hear it at the next call
    with pytest.raises(Interrupted):
        may_stop()


def test_records_after_the_last_checkpoint_are_dropped_when_a_killed_run_goes_on(tmp_path):
    train(tmp_path, until=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # what a run killed in step 9 leaves behind
        file.write('{"stage": "only", "step": 7, "loss": -1.0}\n{"stage": "only", "st')
    train(tmp_path)
    assert list(losses(tmp_path)) == list(range(1, 13)) and -1.0 not in losses(tmp_path).values()


def test_a_finished_stage_is_left_alone(tmp_path):
    train(tmp_path, standin.experiment(steps=2))
    done, task = train(tmp_path, standin.experiment(steps=2))
    assert done == 2 and task.seen == []


@pytest.mark.parametrize("poison, saved", [(1, None), (11, 8)])
def test_a_step_that_is_not_finite_stops_and_saves_nothing(tmp_path, poison, saved):
    experiment = standin.experiment()
    task = standin.Task(experiment, experiment.stages[0], None, mesh_of(1, 1, 1), poison=poison)
    with pytest.raises(NonFiniteError) as error:
        train(tmp_path, experiment, task)
    assert f"step {poison + 1} of stage only gave loss nan" in str(error.value)
    assert f"numbers.jsonl:{poison * standin.ROWS + 3}" in str(error.value)
    assert Store(tmp_path / "only").latest() == saved
    assert task.closed


@pytest.mark.parametrize(
    "optimizer, parts, shape",
    [(OptimizerConfig(), 1, (1, 1, 1)), (OptimizerConfig("muon", state_dtype="bfloat16"), 4, (2, 1, 2))],
)
def test_a_step_without_weight_changes_nothing_bit_for_bit(optimizer, parts, shape):
    experiment, mesh = standin.experiment(optimizer=optimizer, accumulation=parts, warmup_fraction=1.0), mesh_of(*shape)
    task = standin.Task(experiment, experiment.stages[0], None, mesh)
    program = loop.Program(task, experiment, experiment.stages[0], mesh)
    state, frozen = program.begin(
        lambda held: jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), task.model.start(), held)
    )
    seen = []
    with jax.set_mesh(mesh):
        for step, weight in enumerate((8.0, 0.0, 0.0, 8.0)):
            state, metrics = program.step(state, frozen, task.work(step, None).batch, weight)
            seen.append(jax.device_get((state.params, state.optimizer, metrics)))
            assert int(state.step) == step + 1 and metrics["finite"] and metrics["skipped"] == (weight == 0)
    changes = [
        any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (one[:2], other[:2])), strict=True))
        for one, other in zip(seen, seen[1:], strict=False)
    ]
    assert changes == [False, False, True]
    rates = [float(metrics["learning_rate"]) for *_, metrics in seen]
    assert rates[1] == rates[2] == rates[3] != rates[0], "that of the next update"


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)])
def test_parts_one_by_one_give_what_they_give_at_once_however_many_they_are(shape):
    experiment, mesh = standin.experiment(accumulation=4), mesh_of(*shape)
    task = standin.Task(experiment, experiment.stages[0], None, mesh)
    program = loop.Program(task, experiment, experiment.stages[0], mesh)
    (state, frozen), (other, _) = (
        program.begin(lambda held: jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), task.model.start(), held))
        for _ in range(2)
    )
    run = None
    with jax.set_mesh(mesh):
        for step, parts in enumerate((4, 1, 3)):
            batch = jax.tree.map(lambda x, n=parts: x[:n], task.work(step, None).batch)
            each = [
                jax.device_put(jax.tree.map(lambda x, n=n: x[n], batch), sharding.batch_sharding(mesh))
                for n in range(parts)
            ]
            weight = jax.device_put(np.float32(parts * 2), program.replicated)
            state, metrics = program.step(state, frozen, batch, weight)
            run = run or program.part_by_part(other, frozen, each, weight)
            other, found = run(other, frozen, each, weight)
            assert found.keys() == metrics.keys() and int(other.step) == step + 1
            for one, two in zip(*map(jax.tree.leaves, ((state, metrics), (other, found))), strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)


def test_steps_without_weight_are_recorded_and_do_not_disturb_going_on(tmp_path):
    experiment = standin.experiment(steps=8, log_every=2)

    def task():
        return standin.Task(experiment, experiment.stages[0], None, mesh_of(1, 1, 1), weightless=(2, 3, 4))

    train(tmp_path / "whole", experiment, task())
    train(tmp_path / "parts", experiment, task(), until=3)
    train(tmp_path / "parts", experiment, task())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "loss" in line] == [0, 2, 1, 0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def assert_close(found, wanted):
    assert list(found) == list(wanted)
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_every_mesh_gives_the_losses_of_one_device(whole, shape):
    assert_close(whole(*shape), whole(1, 1, 1))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folder of a run on eight devices that was stopped in its sixth step."""
    folder = tmp_path_factory.mktemp("stopped")
    train(folder, mesh=mesh_of(2, 2, 2), until=5)
    return folder


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_run_on_eight_devices_goes_on_with_fewer(tmp_path, stopped, whole, devices):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    train(tmp_path, mesh=mesh_of(1, devices, 1))
    assert_close(losses(tmp_path), whole(1, 1, 1))


def test_accumulation_changes_memory_not_numbers(tmp_path):
    values = []
    for parts in (1, 4):
        experiment = standin.experiment(accumulation=parts)
        task = standin.Task(experiment, experiment.stages[0], None, mesh_of(1, 1, 1), noise=0)
        train(tmp_path / str(parts), experiment, task)
        values.append(list(losses(tmp_path / str(parts)).values()))
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_frozen_stays_bit_for_bit_and_has_no_optimizer_state(tmp_path, optimizer):
    config = OptimizerConfig(name=optimizer, weight_decay=0.1)
    train(tmp_path, standin.experiment(trainable=("first/", "second/scale"), frozen=(".*bias",), optimizer=config))
    model = standin.Model()
    before = flatten(model.start())
    after = flatten(load_params(tmp_path / "only" / "12", model.abstract()))
    changed = {path for path in before if np.any(before[path] != after[path])}
    assert changed == {"first/kernel", "second/scale"}
    stored = (tmp_path / "only" / "12" / "train" / "_METADATA").read_text()
    assert "scale" in stored and "bias" not in stored and "second', 'kernel" not in stored


def test_the_second_ctrl_c_ends_the_program():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), interruption() as asked:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # to the process and to its group: one and the same
            assert asked.is_set()
            time.sleep(loop.REPEATED + 0.1)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_signal_is_told_at_once_while_the_compiler_runs(monkeypatch):
    told = []
    monkeypatch.setattr(loop, "print", lambda text, **_: told.append((text, time.monotonic())), raising=False)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interruption() as asked:
            sender = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
            sender.start()
            while not told or time.monotonic() < told[0][1] + 0.2:
                hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # like a compiler: no signal ends it
            end = time.monotonic()
        assert asked.is_set() and told[0][0] == loop.STOPPING and told[0][1] < end - 0.1
    finally:
        signal.signal(signal.SIGINT, former)


class Failing(standin.Task):
    """Raises at a step of training, or in an evaluation."""

    at, where = 6, "work"

    def work(self, step, params):
        if step == self.at and self.where == "work":
            raise ValueError("image a.jpg is damaged (sample train.jsonl:34)")
        return super().work(step, params)

    def evaluate(self, params):
        if self.where == "evaluate":
            raise KeyError("eval")
        return super().evaluate(params)


@pytest.mark.parametrize(
    "where, step, kind, words",
    [
        ("work", 6, ValueError, r"a.jpg is damaged \(sample train.jsonl:34\). Step 6 of stage only is saved; the same"),
        ("evaluate", 4, ValueError, "KeyError: 'eval'. Step 4 of stage only is saved"),
    ],
)
def test_what_data_raise_loses_no_step(tmp_path, whole, where, step, kind, words):
    settings, mesh = standin.experiment(), mesh_of(1, 1, 1)
    task = Failing(settings, settings.stages[0], None, mesh)
    task.where = where
    with pytest.raises(kind, match=words):
        train(tmp_path, settings, task)
    assert Store(tmp_path / "only").latest() == step
    train(tmp_path, settings)
    assert losses(tmp_path) == whole(1, 1, 1)


@pytest.mark.parametrize("lost", ["params/manifest.ocdbt", "train/_METADATA", "meta/metadata", "params/d"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(tmp_path, capsys, whole, lost):
    train(tmp_path, until=9)
    steps = Store(tmp_path / "only").steps()
    path = tmp_path / "only" / str(steps[-1]) / lost
    shutil.rmtree(path) if path.is_dir() else path.write_bytes(b"")
    done, _ = train(tmp_path)
    assert done == 12 and losses(tmp_path) == whole(1, 1, 1)
    assert "is damaged" in (said := capsys.readouterr().out) and f"going on from step {steps[-2]}" in said
    assert (tmp_path / "only" / f"{steps[-1]}.damaged").is_dir()


def test_where_no_checkpoint_is_whole_nothing_is_moved_and_the_run_ends(tmp_path):
    train(tmp_path, until=5)
    steps = Store(tmp_path / "only").steps()
    for step in steps:
        (tmp_path / "only" / str(step) / "params" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(DamagedError, match=f"only/{steps[-1]}/params is damaged"):
        train(tmp_path)
    assert Store(tmp_path / "only").steps() == steps


def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(tmp_path, monkeypatch):
    train(tmp_path, until=9)
    steps = Store(tmp_path / "only").steps()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="cannot be read: PermissionError"):
        patch.setattr("orbax.checkpoint.Checkpointer.restore", refuse)
        train(tmp_path)
    assert Store(tmp_path / "only").steps() == steps


def test_waiting_for_data_is_told_from_training(tmp_path):
    experiment = standin.experiment(steps=8)
    task = standin.Task(experiment, experiment.stages[0], None, mesh_of(1, 1, 1))
    work = task.work

    def slow(step, params):
        time.sleep(0.2)
        return work(step, params)

    task.work = slow
    train(tmp_path, experiment, task)
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-2]
    assert 1.2 < last["seconds/input_wait"] <= 2.0, "1.6 s are slept, and the numbers themselves take a moment"
    assert last["seconds/step"] < 0.6


def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path, capsys):
    train(tmp_path, standin.experiment(steps=7, profile=ProfileConfig(first_step=3, steps=2)))
    (trace,) = (tmp_path / "profile" / "only" / "plugins" / "profile").glob("*/*.xplane.pb")
    events = (
        event
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    )
    assert {dict(event.stats)["step_num"] for event in events} == {3, 4}
    assert "a trace from step 3 on is in profile/only of the workdir" in capsys.readouterr().out


def test_a_profile_of_steps_that_are_over_says_so(tmp_path, capsys):
    train(tmp_path, standin.experiment(steps=2, profile=ProfileConfig(first_step=3)))
    assert "no trace was taken: steps 3 to 5 were not among those done now" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()
