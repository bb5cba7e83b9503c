"""What is to be learned survives a checkpoint bit for bit."""

import numpy as np
from ml_dtypes import bfloat16

from vlmem_jax.checkpoint import Store
from vlmem_jax.generate import Invocation
from vlmem_jax.rl.episodes import Lesson, Step
from vlmem_jax.rl.resume import as_arrays, from_arrays
from vlmem_jax.types import Sample

NONE_T = np.zeros(0, np.int32)
PROMPT = Sample(NONE_T, NONE_T, NONE_T, NONE_T, np.zeros((0, 2, 2, 3), np.uint8), NONE_T)


def step(number, count, memories=(), weight=1.0):
    """Every third token was put there."""
    rng = np.random.default_rng(number)
    put_T = np.arange(count) % 3 == 2
    logp_T = np.where(put_T, np.nan, -rng.random(count)).astype(np.float32)
    tokens_T = rng.integers(0, 100, count).astype(np.int32)
    return Step(PROMPT, tokens_T, logp_T, ~put_T, bool(number % 2), memories, weight)


def memory(kind, place, count):
    return Invocation(kind, place, 4, np.random.default_rng(place).normal(size=(count, 3)).astype(bfloat16))


LESSONS = [
    Lesson((0, 3), (step(0, 5, (memory(0, 1, 2), memory(1, 4, 7))),), 1 / 3),
    Lesson((1, 0), (step(1, 1, weight=0.5), step(2, 4, (memory(1, 2, 1),), weight=0.5)), -0.1),
]


def same(old, new):
    for name in ("tokens_T", "logp_T", "loss_T"):
        mine, other = getattr(old, name), getattr(new, name)
        assert np.array_equal(mine, other, equal_nan=name == "logp_T") and mine.dtype == other.dtype
    assert (old.stopped, old.weight) == (new.stopped, new.weight)
    for one, other in zip(old.invocations, new.invocations, strict=True):
        assert one[:3] == other[:3] and one.states_LD.dtype == other.states_LD.dtype
        np.testing.assert_array_equal(one.states_LD, other.states_LD)


def test_lessons_come_back_from_a_checkpoint(tmp_path):
    store, one = Store(tmp_path), {"x": np.ones(1)}
    store.save(1, one, one, {}, arrays=as_arrays(LESSONS))
    store.wait()
    asked = []

    def prompt(key, before):
        asked.append((key, len(before)))
        return PROMPT

    lessons = from_arrays(store.arrays(1), prompt)
    store.close()
    assert asked == [((0, 3), 0), ((1, 0), 0), ((1, 0), 1)], "each step stands behind its prompt and the steps before"
    for lesson, other in zip(LESSONS, lessons, strict=True):
        assert (lesson.key, lesson.advantage) == (other.key, other.advantage)
        for old, new in zip(lesson.steps, other.steps, strict=True):
            same(old, new)


def test_without_memories_and_without_lessons_there_are_no_empty_arrays():
    arrays = as_arrays([Lesson((0, 0), (step(1, 3),), 1.0)])
    assert "states_LD" not in arrays and all(array.size for array in arrays.values())
    same(from_arrays(arrays, lambda key, before: PROMPT)[0].steps[0], step(1, 3))
    assert as_arrays([]) == {} and from_arrays({}, lambda key, before: PROMPT) == []
