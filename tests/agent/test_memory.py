"""A memory in a folder, asked from Python."""

import pytest

from tests.agent import stores
from tests.agent.scripted import Scripted, frames_of
from vlmem_jax.agent.building import Pyramid
from vlmem_jax.agent.config import AgentConfig
from vlmem_jax.agent.embed import CosineReranker, LexicalEmbedder, LexicalReranker, TableEmbedder
from vlmem_jax.agent.memory import Helpers, Memory, before, config_of, finder
from vlmem_jax.agent.nodes import Episode, Frame, Segment
from vlmem_jax.agent.segments import Span
from vlmem_jax.agent.store import open_store
from vlmem_jax.agent.writing import write_store
from vlmem_jax.config import ConfigError


class Letters(LexicalEmbedder):
    """As `stores.embed`."""

    def __call__(self, texts):
        return stores.embed(texts)


@pytest.fixture
def store(tmp_path):
    with open_store(stores.written(tmp_path, 8, {"config.retrieve.gamma": 0.3})) as opened:
        yield opened


def asked(store, question, **ask):
    """(answer, what the model was asked); it is never sure, and finds nothing enough."""
    model = Scripted(
        answer=lambda call: {"A": 0.5, "B": 0.5},
        relevant=lambda call: {"yes": call.frames[0].time / 100, "no": 0.1},
        sufficient=lambda call: {"yes": 0.1, "no": 0.9},
    )
    memory = Memory(store, config_of(store), Helpers(Letters(), LexicalReranker()), lambda: model)
    return memory.ask(question, ["red", "blue"], **ask), model.asked


def test_concepts_as_they_were_kept_find_the_episodes(store):
    """Four episodes of an apple, a boat, a cat and a dog."""
    answer, calls = asked(store, "boat?")
    assert not answer.in_memory and answer.trace[0].taken == (1,) and "boat" in calls["answer"][0].text


def test_nothing_later_is_told_or_shown(store):
    """Asked after 5 of 8 segments, in the midst of the third episode."""
    answer, calls = asked(store, "dog?", until=50.0)
    told = "".join(call.text for some in calls.values() for call in some)
    frames = [frame for some in calls.values() for call in some for frame in call.frames]
    assert max(frame.time for frame in frames) < 50 and "dog" not in told.replace("dog?", "")
    assert "segment 4" in told and "segment 5" not in told and "episode 2" not in told
    assert max(span.end for visit in answer.trace for span in visit.spans) <= 50


def test_a_memory_without_vectors_makes_its_concepts_anew(tmp_path):
    with write_store(tmp_path, {}) as store:
        stores.fill(store, 4)
        store.rows("DELETE FROM node WHERE layer = 'concept'")
    with open_store(tmp_path) as store:
        answer, _ = asked(store, "boat?")
    assert answer.trace[0].taken == (1,)


def test_an_episode_that_goes_on_is_told_by_what_has_ended():
    segments = [Segment(n, 10.0 * n, 10.0 * n + 10, f"s{n}") for n in range(4)]
    frames = frames_of(Span(0.0, 40.0), 0.2)
    episodes = [Episode(0, 0.0, 30.0, (0, 2), "all of it", frames[:6]), Episode(1, 30.0, 40.0, (3,), "later")]
    pyramid = Pyramid(segments, episodes, {0: {"scenes": []}, 1: {}})
    cut = before(pyramid, 29.0)
    assert [one.number for one in cut.segments] == [0, 1] and cut.extracted == {0: {}}
    assert cut.episodes == [Episode(0, 0.0, 10.0, (0,), "s0", frames[:2])]
    assert before(pyramid, 40.0) == pyramid and before(pyramid, 1.0) == ([], [], {})


def test_its_config_is_that_of_its_making_but_for_changes(store):
    assert config_of(store).retrieve.gamma == 0.3 and config_of(store).schema == AgentConfig().schema
    assert config_of(store, {"retrieve.gamma": 0.5}).retrieve.gamma == 0.5
    with pytest.raises(ConfigError, match="did you mean"):
        config_of(store, {"retrieve.gama": 0.5})


def test_another_embedder_is_refused(tmp_path):
    made = {"embedder": LexicalEmbedder.mark._asdict()}
    with open_store(stores.written(tmp_path, made=made)) as store:
        other = Helpers.of(TableEmbedder({"a": stores.axis(0)[0]}))
        with pytest.raises(ValueError, match="holds vectors of the embedder lexical"):
            Memory(store, AgentConfig(), other, lambda: None)


def test_what_compares_texts_by_default():
    table = TableEmbedder({"a": stores.axis(0)[0]})
    assert [type(one) for one in Helpers.of()] == [LexicalEmbedder, LexicalReranker]
    assert [type(one) for one in Helpers.of(table)] == [TableEmbedder, CosineReranker]
    assert Helpers.of(None, LexicalReranker()).reranker.name == "lexical"


def test_without_a_model_that_built_it_one_must_be_given(store):
    with pytest.raises(ValueError, match="does not say which model built it; give a checkpoint"):
        Memory.open(store.folder).ask("What?")


def test_frames_are_found_in_whichever_store_has_them(tmp_path):
    opened = [open_store(stores.written(tmp_path / name, count)) for name, count in (("a", 1), ("b", 4))]
    image_of = finder([store.frames for store in opened])
    [last] = opened[1].nodes("segment", Segment)[3:]
    assert image_of(last.frames[0]).getpixel((0, 0))[0] == pytest.approx(120, abs=3)
    with pytest.raises((ValueError, OSError)):
        image_of(Frame("0" * 32, 0.0))
