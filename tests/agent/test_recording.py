"""A memory that is written while a video is watched."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.agent import world
from tests.agent.scripted import Scripted
from vlmem_jax.agent.calls import run
from vlmem_jax.agent.config import resolve
from vlmem_jax.agent.embed import LexicalEmbedder
from vlmem_jax.agent.memory import Helpers, Memory
from vlmem_jax.agent.nodes import Cue, Extracted, Grounding
from vlmem_jax.agent.recording import Recorder, content_digest, flat, made_of, remember
from vlmem_jax.agent.store import open_store
from vlmem_jax.agent.subtitles import SILENT, Track
from vlmem_jax.agent.writing import write_store
from vlmem_jax.config import override
from vlmem_jax.stream import Notes, Reading, open_source

CONFIG = resolve(override(ConfigDict(), world.SMALL), "config")
EMBED = LexicalEmbedder()


def model():
    """Each segment is an episode of its own, in which there is a boat."""
    return Scripted(
        caption=lambda call: f"frames {len(call.frames)} from {call.frames[0].time:g} s",
        decide=lambda call: {"ADD_NEW": 1.0},
        narrate=lambda call: f"a story from {call.frames[0].time:g} s",
        extract=lambda call: json.dumps({"entities": [{"entity name": "boat"}]}),
    )


def built(folder, video, answering, config=CONFIG, track=SILENT):
    with write_store(folder, made_of("a", content_digest(video), {"model": "scripted"}, EMBED, config, track)) as store:
        recorder = Recorder(store, config, EMBED, track)
        return run(remember(open_source(str(video), Reading()), recorder, store, Notes()), answering)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return world.video(tmp_path_factory.mktemp("video") / "a.mp4")


def test_a_store_holds_what_was_built(tmp_path, video):
    pyramid = built(tmp_path, video, model())
    with open_store(tmp_path) as store:
        assert store.pyramid() == pyramid and store.state == "closed" and len(pyramid.episodes) == 4
        [boat] = store.nodes("concept", Grounding)
        assert (boat.name, boat.episodes) == ("boat", (0, 1, 2, 3))
        for layer in ("segment", "episode"):
            [hit] = store.search(layer, EMBED(["from 4 s"])[0], 1)
            assert hit.number == 2
        told = store.nodes("extracted", Extracted)
        assert [[frame.time for frame in one.frames] for one in told] == [[0.0], [2.0], [4.0], [6.0]], "0.5 a second"
        assert all(store.frames.is_whole(frame.name) for one in pyramid.segments for frame in one.frames)


def test_nodes_are_there_as_soon_as_they_are_closed(tmp_path, video):
    seen = []

    class Looking:
        def answer(self, calls):
            with open_store(tmp_path) as store:
                seen.append((store.counts()["segment"], store.counts()["episode"], store.state))
            return model().answer(calls)

    built(tmp_path, video, Looking())
    assert seen[0] == (0, 0, "building") and {segments for segments, _, _ in seen} == {0, 1, 2, 3, 4}
    assert {episodes for _, episodes, _ in seen} >= {0, 1, 2} and {state for _, _, state in seen} == {"building"}


def test_an_episode_of_the_release_has_frames_of_what_was_discarded(tmp_path, video):
    actions = iter(["DISCARD", "MERGE", "MERGE"])
    scripted = model()
    scripted.replies["decide"] = lambda call: {next(actions): 1.0}
    config = resolve(override(ConfigDict(), world.SMALL | {"build.whole": True, "build.images": 8}), "config")
    [episode] = built(tmp_path, video, scripted, config).episodes
    assert episode.segments == (0, 2, 3) and [frame.time for frame in episode.frames] == [0.0, 2.0, 4.0, 6.0]


def test_what_is_said_is_kept_compared_and_told(tmp_path, video):
    """In the second of four segments."""
    track, scripted = Track([Cue(0, 2.5, 3.5, "mind the gap")]), model()
    built(tmp_path, video, scripted, track=track)
    assert ["mind the gap" in call.text for call in scripted.asked["caption"]] == [False, True, False, False]
    with open_store(tmp_path) as store:
        assert store.nodes("cue", Cue) == list(track.cues)
        for layer in ("segment", "episode"):
            assert store.search(layer, EMBED(["mind the gap"])[0], 1)[0].number == 1
        near = {"yes": 0.5, "no": 0.5}
        scripted = Scripted(answer=lambda call: "no", sufficient=lambda call: {"no": 1.0}, relevant=lambda call: near)
        ask = Memory(store, CONFIG, Helpers.of(), lambda: scripted).ask
        told = [ask("Which gap?", until=until) and scripted.asked["answer"][-1].text for until in (None, 2.0)]
        assert "Said: mind the gap" in told[0] and "mind the gap" not in told[1]
    with pytest.raises(ValueError, match="was made with subtitles '.*', not ''"):
        built(tmp_path, video, model())


def test_a_memory_that_grows_holds_nothing_that_is_said_later(tmp_path, video):
    """What is said is there with the segment in which it begins, and nothing that begins beyond the last."""
    track, seen = Track([Cue(n, n + 0.5, n + 3.0, f"word {n}") for n in range(12)]), []

    class Looking:
        def answer(self, calls):
            with open_store(tmp_path) as store, store.moment():
                seen.append((store.counts()["segment"], store.counts()["cue"]))
            return model().answer(calls)

    built(tmp_path, video, Looking(), track=track)
    assert set(seen) == {(n, 2 * n) for n in range(5)}
    with open_store(tmp_path) as store:
        assert store.nodes("cue", Cue) == list(track.cues[:8])


def test_another_config_is_refused_by_the_name_of_its_key(tmp_path, video):
    built(tmp_path, video, model())
    other = resolve(override(ConfigDict(), world.SMALL | {"build.fps": 1.0}), "config")
    with pytest.raises(ValueError, match="was made with config.build.fps 0.5, not 1.0; use the same"):
        built(tmp_path, video, model(), other)


def test_keys_by_their_names():
    assert flat({"a": 1, "b": {"c": {"d": 2}, "e": 3}}) == {"a": 1, "b.c.d": 2, "b.e": 3}


def test_a_file_is_known_by_its_content_and_a_folder_by_that_of_its_files(tmp_path):
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, 3 * 2**20, np.uint8).tobytes()
    for name, content in (("a", large), ("b", large), ("end", large[:-1] + b"x"), ("short", large[:-1]), ("no", b"")):
        (tmp_path / name).write_bytes(content)
    digests = {name: content_digest(tmp_path / name) for name in ("a", "b", "end", "short", "no")}
    assert digests["a"] == digests["b"] and len(set(digests.values())) == 4
    before = content_digest(tmp_path)
    (tmp_path / "no").rename(tmp_path / "none")
    assert content_digest(tmp_path) != before
