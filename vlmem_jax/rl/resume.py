"""The lessons of a phase in a checkpoint, as arrays: what was drawn. What it stands behind is made again."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlmem_jax.data.samples import Key
from vlmem_jax.generate import Invocation
from vlmem_jax.rl.episodes import Lesson, Step
from vlmem_jax.types import Sample


def as_arrays(lessons: Sequence[Lesson]) -> dict[str, np.ndarray]:
    """E episodes of N steps, which hold M memories, one after the other. There are no arrays without elements."""
    steps = [step for lesson in lessons for step in lesson.steps]
    memories = [memory for step in steps for memory in step.invocations]
    found = {
        "key_E2": np.array([lesson.key for lesson in lessons]),
        "advantage_E": np.array([lesson.advantage for lesson in lessons]),
        "steps_E": np.array([len(lesson.steps) for lesson in lessons]),
        "length_N": np.array([len(step.tokens_T) for step in steps]),
        "stopped_N": np.array([step.stopped for step in steps]),
        "weight_N": np.array([step.weight for step in steps]),
        "memories_N": np.array([len(step.invocations) for step in steps]),
    }
    if steps:
        found |= {name: np.concatenate([getattr(step, name) for step in steps]) for name in DRAWN}
    if memories:
        found |= {f"{name}_M": np.array([getattr(memory, name) for memory in memories]) for name in SPOKEN}
        found["heard_M"] = np.array([len(memory.states_LD) for memory in memories])
        found["states_LD"] = np.concatenate([memory.states_LD for memory in memories])
    return {name: array for name, array in found.items() if array.size}


DRAWN = "tokens_T", "logp_T", "loss_T"
"""Arrays of a step."""

SPOKEN = "kind", "place", "latents"
"""Numbers of a memory."""


def from_arrays(arrays: Mapping[str, np.ndarray], prompt: Callable[[Key, Sequence[Step]], Sample]) -> list[Lesson]:
    """The lessons that `as_arrays` was given; `prompt(key, before)` gives what a step stands behind."""
    if not arrays:
        return []
    numbers = zip(*(arrays[f"{name}_M"].tolist() for name in SPOKEN), strict=True) if "heard_M" in arrays else ()
    heard = _cut(arrays["states_LD"], arrays["heard_M"]) if "heard_M" in arrays else ()
    memories = iter([Invocation(*spoken, states_LD) for spoken, states_LD in zip(numbers, heard, strict=True)])
    drawn = zip(*(_cut(arrays[name], arrays["length_N"]) for name in DRAWN), strict=True)
    more = zip(*(arrays[f"{name}_N"].tolist() for name in ("stopped", "memories", "weight")), strict=True)
    lessons = []
    of_episodes = (arrays[f"{name}"].tolist() for name in ("key_E2", "advantage_E", "steps_E"))
    for key, advantage, count in zip(*of_episodes, strict=True):
        steps: list[Step] = []
        for _ in range(count):
            arrays_T, (stopped, spoken, weight) = next(drawn), next(more)
            invocations = tuple(itertools.islice(memories, spoken))
            steps.append(Step(prompt(tuple(key), steps), *arrays_T, stopped, invocations, weight))
        lessons.append(Lesson(tuple(key), tuple(steps), advantage))
    return lessons


def _cut(whole: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Parts of such lengths along the first axis."""
    return np.split(whole, np.cumsum(lengths)[:-1])
