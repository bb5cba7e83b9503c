"""What is answered from keys and values in 8 bits is close to what is answered from them as they are."""

import jax
import numpy as np
import pytest
import qwen_golden

from vlmem_jax.types import Text

NEW = 32


@pytest.fixture(scope="module")
def model(golden):
    return qwen_golden.load(golden / "qwen2_5_vl")


@pytest.fixture(scope="module")
def read(model):
    """`read(batch, int8)`: scores behind prompts, and the state."""

    def run(batch, int8):
        lengths_B, capacity = (batch.text.segments_BT > 0).sum(-1, dtype=np.int32), batch.text.tokens_BT.shape[1] + NEW
        begun, visual = model.vlm.begin(lengths_B, capacity, int8), model.vlm.see(model.params, batch.views)
        hidden_BD, state = model.vlm.extend(model.params, begun, batch.text, visual)
        return model.vlm.score(model.params, hidden_BD), state

    return jax.jit(run, static_argnums=1)


@pytest.fixture(scope="module")
def step(model):
    """`step(state, tokens_B)`: scores behind one more token, and the state."""

    def run(state, tokens_B):
        hidden_BD, state = model.vlm.extend(model.params, state, Text(tokens_B[:, None], tokens_B[:, None] * 0 + 1))
        return model.vlm.score(model.params, hidden_BD), state

    return jax.jit(run)


def prompts(model, name):
    arrays = dict(np.load(model.folder / f"{name}.npz"))
    return qwen_golden.batch(model.vlm, qwen_golden.rows(arrays, model.content, model.vlm.config.vision.geometry))


@pytest.mark.parametrize("name", qwen_golden.PROMPTS)
def test_scores_are_within_two_percent_of_their_range(model, read, step, name):
    batch = prompts(model, name)
    (wanted_BV, exact), (found_BV, small) = (read(batch, int8) for int8 in (False, True))
    assert small.cache.k_LBKSC.dtype == np.int8
    for _ in range(NEW - 1):
        ids_B = wanted_BV.argmax(-1)
        (wanted_BV, exact), (found_BV, small) = (step(state, ids_B) for state in (exact, small))
        assert np.abs(found_BV - wanted_BV).max() < 0.02 * (wanted_BV.max() - wanted_BV.min())
