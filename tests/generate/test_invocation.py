import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.patches_world import save_tokenizer
from vlmem_jax.generate.invocation import Calls, InvocationConfig, Rule, delimiters, is_delimiter
from vlmem_jax.memory import Speech
from vlmem_jax.processing import Tokenizer

SPEECH = Speech(("a", "b"), (10, 12), (11, 13), (3, 5), max_invocations=4, max_states=64, max_visual=64, start_id=0)
DELIMITERS_V = jnp.asarray(is_delimiter([1, 2], 20))


def rule(config=InvocationConfig(), forced=(), rows=2, places=0):
    return Rule.make(config, SPEECH, 8, forced, rows, places)


def test_delimiters_end_phrases(tmp_path):
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path / "tokenizer"))
    assert {tokenizer.decode([token]) for token in delimiters(tokenizer)} == {*".,;:!?", "\n"}


def test_who_may_call_and_how_often():
    learned, never = InvocationConfig(), InvocationConfig("never")
    assert learned.banned_ids(SPEECH) == (11, 13) and learned.budget(SPEECH) == 4
    assert set(never.banned_ids(SPEECH)) == {10, 11, 12, 13} and never.budget(SPEECH) == 0
    chance = InvocationConfig("delimiter_random", max_invocations=2, disabled=("a",))
    assert set(chance.banned_ids(SPEECH)) == {10, 11, 12, 13} and chance.budget(SPEECH) == 2
    assert chance.heeded(SPEECH) == (False, True) and rule(chance).share_BK.tolist() == [[0, 1]] * 2
    assert InvocationConfig(disabled=("a", "b")).budget(SPEECH) == 0
    with pytest.raises(ValueError, match="disabled must name kinds of the memory, a, b; got 'c'"):
        InvocationConfig(disabled=("a", "c")).budget(SPEECH)


def test_probabilities_are_those_of_the_mode():
    wanted = {"learned": (0, 0, 0), "always": (0, 1, 0), "delimiter_random": (0.02, 0.25, 0.02), "first": (1, 0, 0)}
    for mode, chances in wanted.items():
        made = rule(InvocationConfig(mode, anywhere=0.02))
        found = made.after_prompt_B, made.after_delimiter_B, made.anywhere_B
        np.testing.assert_allclose(np.stack(found), np.repeat(np.array(chances)[:, None], 2, axis=1), rtol=1e-6)


def test_first_calls_right_after_the_prompt_and_never_again():
    made, keys_B = rule(InvocationConfig("first", disabled=("a",))), jax.random.split(jax.random.key(0), 2)
    calls = Calls.none(2, budget=1)
    first_B = calls.force(made, DELIMITERS_V, SPEECH, keys_B, jnp.zeros(2, jnp.int32))
    assert first_B.tolist() == [12, 12], "of the kind that is heeded"
    calls = calls.take(made, SPEECH, first_B, jnp.ones(2, jnp.int32))
    assert calls.force(made, DELIMITERS_V, SPEECH, keys_B, jnp.ones(2, jnp.int32)).tolist() == [-1, -1]


def test_forced_tokens_stand_in_places_of_their_own():
    assert rule().forced_BS.shape == (2, 0)
    forced_BS = rule(forced=[[3, -1, 4]], places=40).forced_BS
    assert forced_BS.shape == rule(forced=[[], [5] * 40], places=40).forced_BS.shape == (2, 40)
    assert forced_BS[0, :4].tolist() == [3, -1, 4, -1] and (forced_BS[1] == -1).all()
    with pytest.raises(ValueError, match="forced has tokens for 3 rows, but there are 2"):
        rule(forced=[[1], [2], [3]])
    with pytest.raises(ValueError, match="forced has 3 tokens for a row, but there are places for 2; raise forced"):
        Rule.make(InvocationConfig(), None, 8, [[1, 2, 3]], 1, places=2)
