"""What a run reports: metrics.jsonl, TensorBoard, a progress bar (plain lines where there is no terminal), its samples.

MFU is useful FLOPs a second over the peak of all devices: `models.flops.train_flops` of the samples, that is forward
and backward pass without recomputation, for frozen parts without weight gradients, and neither padding nor pairs of
different samples. `utilisation` is the same of the shapes: of rows that are one sample each. Rates count the seconds of
steps and of waiting for data, such as rollouts, whose own FLOPs do not count; not those of compiling, evaluation and
saving.
"""

import contextlib
import functools
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from kernels_pallas.device import peak
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.goodput import Goodput


@functools.cache
def peak_flops() -> float | None:
    """FLOPs a second that all devices together could do; None for an unknown kind. A CPU is measured once, in fp32."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_peak()
    known = peak(device.device_kind)
    return known and known.flops * jax.device_count()


def _measured_peak(size: int = 1024, tries: int = 5) -> float:
    x = np.ones((size, size), np.float32)
    fastest = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        x @ x
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


class Recorder:
    """Takes the numbers of each step of one stage, and writes those of every `log_every`-th, with the clock's.

    `done`: steps of this stage that are behind us; records of later ones, left by a run that was killed, are dropped.
    On hosts other than the first nothing is written.
    """

    def __init__(self, workdir: Path, experiment: Experiment, stage: StageConfig, done: int, clock: Goodput):
        self._stage, self._steps, self._log_every = stage.name, stage.steps, experiment.log_every
        # curves of the stages join in TensorBoard
        self._before = sum(other.steps for other in experiment.stages[: experiment.stages.index(stage)])
        self._peak = peak_flops()
        self._window: list[dict[str, int]] = []
        self._clock, self._trained = clock, 0.0
        self._seen_first = False
        self._skipped = 0
        self._writes = jax.process_index() == 0
        if self._writes:
            file = workdir / "metrics.jsonl"
            _forget(file, stage.name, done)
            self._file = file.open("a")
            self._board = Board(workdir / "tensorboard", self._before + done + 1)
            self._terminal = Terminal(stage.name, stage.steps, done)

    def step(self, step: int, values: dict[str, float], counts: dict[str, int]) -> None:
        """Numbers of the step that makes `step` steps done. `counts`: see `loop.StepInput`.

        Of `skipped`, whether the step had nothing to learn and changed nothing, a record has the number since the last.
        """
        self._skipped += values.get("skipped", False)
        seconds = self._clock.seconds()
        trained = seconds["step"] + seconds["input_wait"]
        if self._seen_first:
            self._window.append(counts)
        else:  # the first step waits for the data to start: rates begin with its end
            self._seen_first, self._trained = True, trained
        if step % self._log_every and step != self._steps:
            return
        record = {**values, "skipped": self._skipped, **self._rates(trained - self._trained)}
        if counts.get("slots"):
            record["fill"] = counts["tokens"] / counts["slots"]
        record["goodput"] = seconds["step"] / sum(seconds.values())
        self._window, self._trained, self._skipped = [], trained, 0
        self.write(step, record | {f"seconds/{kind}": round(spent, 3) for kind, spent in seconds.items()})

    def _rates(self, seconds: float) -> dict[str, float]:
        if not self._window or seconds <= 0:
            return {}
        totals = {key: sum(counts[key] for counts in self._window) for key in self._window[0] if key != "slots"}
        shares = {name: totals.pop(key) / seconds for key, name in _SHARES.items() if key in totals}
        rates = {f"{key}_per_s": total / seconds for key, total in totals.items()}
        rates["steps_per_s"] = len(self._window) / seconds
        if self._peak:
            rates |= {name: share / self._peak for name, share in shares.items()}
        return rates

    def write(self, step: int, record: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same numbers everywhere else."""
        if not self._writes:
            return
        try:
            self._file.write(json.dumps({"stage": self._stage, "step": step, **record}) + "\n")
            self._file.flush()
            self._board.write(self._before + step, record)
        except OSError as error:
            raise OSError(
                f"{self._file.name} could not be written: {error}; make room on the disk and start again: the run goes "
                "on from its last checkpoint"
            ) from error
        self._terminal.show(step, record)

    def say(self, text: str) -> None:
        """A line for people."""
        if self._writes:
            self._terminal.say(text)

    def close(self) -> None:
        """Ends the progress bar and the files."""
        if self._writes:
            self._terminal.close()
            with contextlib.suppress(OSError):  # a disk that is full has been reported
                self._board.close()
            with contextlib.suppress(OSError):
                self._file.close()


class SampleLog:
    """Which samples each step took: WORKDIR/samples/HOST.jsonl, a line a step with the samples of that host's rows.

    Lines are only ever added. A step that is done again, because the run was killed after it, has lines again.
    """

    def __init__(self, workdir: Path, stage: str):
        folder = workdir / "samples"
        folder.mkdir(exist_ok=True)
        self._file, self._stage = folder / f"{jax.process_index()}.jsonl", stage

    def write(self, step: int, sample_ids: Sequence[str]) -> None:
        """Samples of the step that makes `step` steps done."""
        with self._file.open("a") as file:
            file.write(json.dumps({"stage": self._stage, "step": step, "samples": sample_ids}) + "\n")


class Board:
    """Scalars for TensorBoard, from step `first` on: what earlier files say of these steps no longer counts.

    Written in place, since the thread and the queue of tensorboardX's own writer hang when the disk is full.
    """

    def __init__(self, folder: Path, first: int, flush_seconds: float = 10):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(str(folder / name))
        self._flush_seconds, self._flushed = flush_seconds, 0.0
        self._put(Event(step=first, file_version="brain.Event:2"))
        self._put(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, record: dict[str, float]) -> None:
        """A point on every curve; names without a group go to `train`."""
        tags = ((key if "/" in key else f"train/{key}", value) for key, value in record.items())
        self._put(Event(step=step, summary=Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in tags])))
        if time.monotonic() - self._flushed > self._flush_seconds:
            self._records.flush()
            self._flushed = time.monotonic()

    def _put(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._records.flush()
        self._records.close()


class Terminal:
    """Progress of one stage: a bar in a terminal, one line a record elsewhere."""

    def __init__(self, stage: str, steps: int, done: int, console: Console | None = None):
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._stage, self._steps = stage, steps
        self._bar = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, refresh_per_second=2)
            self._task = self._bar.add_task(stage, total=steps, completed=done, text="compiling")
            self._bar.start()

    def show(self, step: int, record: dict[str, Any]) -> None:
        """What of a record fits on a line."""
        text = "  ".join(f"{name} {form(record[key])}" for key, name, form in _SHOWN if key in record)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        if record.get("steps_per_s"):
            text += f"  ETA {_duration((self._steps - step) / record['steps_per_s'])}"
        self.say(f"{self._stage} {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _quantity(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


_SHARES = {"flops": "mfu", "shape_flops": "utilisation"}
"""What counts of FLOPs are recorded as: their rate, over the peak."""
_SHOWN = (
    ("eval/loss", "eval loss", "{:.4f}".format),
    ("loss", "loss", "{:.4f}".format),
    ("learning_rate", "lr", "{:.2e}".format),
    ("tokens_per_s", "tokens/s", _quantity),
    ("images_per_s", "images/s", _quantity),
    ("mfu", "MFU", "{:.1%}".format),
    ("utilisation", "of shapes", "{:.1%}".format),
)


def _forget(file: Path, stage: str, done: int) -> None:
    """Drops records of `stage` after step `done`, and a last line that was cut off."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["stage"] != stage or record["step"] <= done:
            kept.append(line + "\n")
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text("".join(kept))
    os.replace(unfinished, file)
