"""The lessons of a phase in a checkpoint: what was drawn; prompts are read again."""

import base64
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlmem_jax.data.samples import Key
from vlmem_jax.generate import Invocation
from vlmem_jax.rl.episodes import Lesson, Step
from vlmem_jax.types import Sample


def as_json(lesson: Lesson) -> dict[str, Any]:
    """Exact: a float32 is a float64, and JSON gives that back as it was."""
    steps = [_step_as_json(step) for step in lesson.steps]
    return {"key": list(lesson.key), "advantage": lesson.advantage, "steps": steps}


def from_json(fields: dict[str, Any], prompt: Callable[[Key, Sequence[Step]], Sample], dtype: np.dtype) -> Lesson:
    """`prompt(key, before)` gives what each step stands behind; `dtype`: that of the states of memories."""
    key, steps = tuple(fields["key"]), []
    for step in fields["steps"]:
        steps.append(_step_from_json(step, prompt(key, steps), dtype))
    return Lesson(key, tuple(steps), fields["advantage"])


def _step_as_json(step: Step) -> dict[str, Any]:
    return {
        "tokens": step.tokens_T.tolist(),
        "logp": [None if math.isnan(x) else x for x in step.logp_T.tolist()],
        "loss": step.loss_T.tolist(),
        "stopped": step.stopped,
        "weight": step.weight,
        "invocations": [
            {
                "place": memory.place,
                "kind": memory.kind,
                "latents": memory.latents,
                "shape": list(memory.states_LD.shape),
                "states": base64.b64encode(memory.states_LD.tobytes()).decode(),
            }
            for memory in step.invocations
        ],
    }


def _step_from_json(fields: dict[str, Any], prompt: Sample, dtype: np.dtype) -> Step:
    logp_T = np.array([math.nan if x is None else x for x in fields["logp"]], np.float32)
    invocations = tuple(
        Invocation(
            memory["kind"],
            memory["place"],
            memory["latents"],
            np.frombuffer(base64.b64decode(memory["states"]), dtype).reshape(memory["shape"]),
        )
        for memory in fields["invocations"]
    )
    tokens_T, loss_T = np.array(fields["tokens"], np.int32), np.array(fields["loss"], bool)
    return Step(prompt, tokens_T, logp_T, loss_T, fields["stopped"], invocations, fields["weight"])
