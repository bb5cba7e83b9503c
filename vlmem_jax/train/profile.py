"""A profiler trace of a few chosen steps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """The steps of each stage that a profiler trace shows."""

    first_step: int = 0
    """Counted from 1, as in the records; 0: no trace."""
    steps: int = 3
    """Steps in the trace, one after the other."""

    def __post_init__(self):
        if self.first_step < 0 or self.steps < 1:
            raise ValueError(f"first_step must be at least 0 and steps at least 1; got {self}")


class Profile:
    """Writes the trace of one stage to `folder`, on the first host, for TensorBoard's profile plugin.

    `say` gets a line when it is there, and when the steps never came.
    """

    def __init__(self, config: ProfileConfig, folder: Path, say: Callable[[str], None]):
        wanted = config.first_step > 0 and jax.process_index() == 0
        self._steps = range(config.first_step, config.first_step + config.steps) if wanted else range(0)
        self._folder, self._say = folder, say
        self._running = self._seen = False

    def due(self, step: int) -> bool:
        """Whether the trace begins or ends before `step`, counted from 1; all earlier steps must then be done."""
        return (step in self._steps) != self._running

    def switch(self) -> None:
        """Begins the trace, or ends it."""
        if not self._running:
            jax.profiler.start_trace(self._folder)
        else:
            jax.profiler.stop_trace()
            self._say(f"a trace from step {self._steps[0]} on is in profile/{self._folder.name} of the workdir")
        self._running, self._seen = not self._running, True

    def close(self) -> None:
        """Ends a trace that is being taken."""
        if self._running:
            self.switch()
        elif self._steps and not self._seen:
            self._say(f"no trace was taken: steps {self._steps[0]} to {self._steps[-1]} were not among those done now")
