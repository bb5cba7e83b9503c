"""Where the wall time of a stage goes, told without ever making the host wait for the devices."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

KINDS = ("step", "compile", "input_wait", "checkpoint", "evaluation", "other")
"""Training, compiling the step, waiting for data while the devices have nothing to do, waiting for checkpoints to be
read or copied for writing, evaluation, and the rest: pack plans, parameters of step 0, profiles."""


class Goodput:
    """A clock that gives each moment to one of KINDS; it starts with `other`. Its share of `step` is the goodput."""

    def __init__(self):
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "other", time.perf_counter()
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="goodput")
        self._finished: Future[float] | None = None

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Time in here goes to `kind`."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    @contextlib.contextmanager
    def input_wait(self) -> Iterator[None]:
        """Time in here is waiting for data, as far as no step keeps the devices busy meanwhile."""
        start = time.perf_counter()
        with self.spent("input_wait"):
            yield
        end = self._since
        busy = self._busy_until(end)
        hidden = min(max(busy - start, 0.0), end - start)
        self._seconds["input_wait"] -= hidden
        self._seconds["step"] += hidden

    def started(self, outputs: Any) -> None:
        """A step has been sent to the devices; `outputs` are what tells when it is done."""
        self._finished = self._watcher.submit(_when_ready, outputs)

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind up to now."""
        self._switch(self._kind)
        return dict(self._seconds)

    def summary(self) -> str:
        """One line: the goodput, and the share of each kind."""
        seconds = self.seconds()
        total = sum(seconds.values())
        shares = ", ".join(f"{kind.replace('_', ' ')} {seconds[kind] / total:.1%}" for kind in KINDS)
        return f"goodput {seconds['step'] / total:.1%} of {total:.0f} s: {shares}"

    def close(self) -> None:
        """Ends the thread that watches the devices."""
        self._watcher.shutdown(wait=False)

    def _switch(self, kind: str) -> str:
        now = time.perf_counter()
        self._seconds[self._kind] += now - self._since
        former, self._kind, self._since = self._kind, kind, now
        return former

    def _busy_until(self, now: float) -> float:
        """When the last step that was started ended, or `now` if it has not."""
        if self._finished is None:
            return 0.0
        return self._finished.result() if self._finished.done() else now


def _when_ready(outputs: Any) -> float:
    jax.block_until_ready(outputs)
    return time.perf_counter()
