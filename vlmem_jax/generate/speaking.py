"""The memories that rows of an engine call for: formed for several of them together, while others go on.

Calls whose memories are formed from texts of like length wait for each other a few steps; with whom one is formed
changes nothing for it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vlmem_jax.generate.generator import Generator
from vlmem_jax.generate.invocation import Invocation
from vlmem_jax.generate.requests import Handle
from vlmem_jax.generate.rows import Programs, Row
from vlmem_jax.memory import Speech
from vlmem_jax.runtime.shapes import PoolShape, least, powers
from vlmem_jax.types import FormationInputs

GROUPS = 1, 2, 4, 8
"""Rows whose memories are formed together."""

PATIENCE = 4
"""Steps that a call waits for others."""

TEXT_STATES = 64
"""Smallest number of states of the text that a memory is formed from."""


@dataclasses.dataclass
class Call:
    """A row that waits for its memory."""

    handle: Handle
    kind: int
    size: int
    """States of the text that it is formed from, at most."""
    since: int
    """The step of the call."""


class Speaking:
    """Calls, and how they are answered."""

    def __init__(self, generator: Generator, shape: PoolShape, programs: Programs):
        vlm = generator.vlm
        self.speech: Speech = vlm.speech
        self.sizes = powers(min(TEXT_STATES, self.speech.max_states), self.speech.max_states)
        self._generator, self._slots, self._programs = generator, shape.slots, programs
        empty = np.zeros((shape.slots, self.speech.latents, vlm.config.decoder.width), vlm.dtype)
        with generator.context():
            self.latents_BND = generator.put(empty)
        self._calls: list[Call] = []
        self._formed: list[tuple[list[tuple[Handle, int]], FormationInputs]] = []
        """Calls whose states are to be recorded: handles and the numbers of their memories, and what was heard."""
        self._steps = 0

    def hear(self, handle: Handle, token: int) -> None:
        """A token of a row; it may be a call that is heeded."""
        config = handle.request.invocation
        if token not in self.speech.invoke_ids or not handle.calls_left:
            return
        kind, kinds = self.speech.invoke_ids.index(token), len(self.speech.kinds)
        if not config.heeded(self.speech)[kind]:
            return
        handle.calls_left -= 1
        handle.waits = True
        size = least(self.sizes, min(handle.observed + 1, self.speech.max_states))
        self._calls.append(Call(handle, (kind + config.reverse_types) % kinds, size, self._steps))

    def group(self, owners: Sequence[Handle | None], alone: bool) -> list[Call]:
        """Those whose turn it is: as many as go together, those who have waited, or, `alone`, where no row goes on
        meanwhile, whoever is there."""
        self._steps += 1
        self._calls = [call for call in self._calls if not call.handle.reason]
        here = [call for call in self._calls if call.handle in owners]
        for first in here:
            alike = [call for call in here if call.size == first.size][: GROUPS[-1]]
            if alone or len(alike) == GROUPS[-1] or self._steps - first.since > PATIENCE:
                return alike
        return []

    def speak(
        self, rows: Row, group: Sequence[Call], owners: Sequence[Handle | None], used: Callable[[int], np.int32]
    ) -> tuple[Row, list[tuple[Handle, int]]]:
        """The rows with memories behind them, and the token that ends each."""
        self._calls = [call for call in self._calls if call not in group]
        kinds_B = np.full(self._slots, -1, np.int32)
        rows_R = np.full(least(GROUPS, len(group)), self._slots, np.int32)
        kinds_R = np.full_like(rows_R, -1)
        for n, call in enumerate(group):
            rows_R[n], kinds_R[n] = owners.index(call.handle), call.kind
            kinds_B[rows_R[n]] = call.kind
        inputs = self.form(rows, rows_R, kinds_R, group[0].size)
        rows = self.insert(rows, kinds_B, used(self.speech.latents + 2))
        said, recorded = [], []
        for call in group:
            handle, latents = call.handle, self.speech.lengths[call.kind]
            recorded.append((handle, len(handle.invocations)))
            handle.invocations.append(Invocation(call.kind, len(handle.tokens), latents))
            handle.waits, handle.observed = False, 0
            handle.length += latents + 1
            said.append((handle, self.speech.end_ids[call.kind]))
        self.keep()
        if any(handle.request.record for handle, _ in recorded):
            self._formed.append((recorded, inputs))
        return rows, said

    def form(self, rows: Row, rows_R: np.ndarray, kinds_R: np.ndarray, size: int) -> FormationInputs:
        """Latent tokens of some rows; gives what they were formed from."""
        generator = self._generator
        with generator.context():
            self.latents_BND, inputs = self._programs.form(
                generator.params, rows.decode, self.latents_BND, rows_R, kinds_R, size
            )
        return inputs

    def insert(self, rows: Row, kinds_B: np.ndarray, used: np.int32) -> Row:
        """Latent tokens of these kinds behind the rows; -1: none."""
        with self._generator.context():
            return self._programs.insert(self._generator.params, rows, self.latents_BND, kinds_B, used)

    def keep(self) -> None:
        """Takes what memories were formed from off the devices, where it is to be recorded."""
        for recorded, inputs in self._formed:
            states_BJLD, lengths_BJ = jax.device_get((inputs.states_BJLD, inputs.lengths_BJ))
            for n, (handle, number) in enumerate(recorded):
                if handle.request.record:
                    states_LD = states_BJLD[n, 0, : lengths_BJ[n, 0]]
                    handle.invocations[number] = handle.invocations[number]._replace(states_LD=states_LD)
        self._formed.clear()
