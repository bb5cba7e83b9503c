"""Memories of many videos: listed, removed, and searched together, by each index."""

import numpy as np
import pytest

from tests.agent.stores import MADE, axis, written
from vlmem_jax.agent.embed import LexicalEmbedder
from vlmem_jax.agent.index import ExactIndex, Indexed
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.nodes import Segment
from vlmem_jax.agent.store import video_id
from vlmem_jax.agent.vectors import Vectors, as_stored
from vlmem_jax.agent.writing import write_store


def lance(folder):
    pytest.importorskip("lancedb")
    from vlmem_jax.agent.lance import LanceIndex

    return LanceIndex(str(folder))


@pytest.fixture(params=["exact", "lance"])
def index(request, tmp_path):
    return ExactIndex() if request.param == "exact" else lance(tmp_path / "index")


A, B, C = (video_id(name, name * 16) for name in "abc")


@pytest.fixture
def library(tmp_path):
    library = Library(tmp_path / "library")
    written(library.folder(B), segments=2)
    written(library.folder(A), segments=4)
    return library


def test_a_list(library):
    assert library.videos() == [A, B] and library.find("b" * 64) == B and library.find("c" * 64) is None
    with write_store(library.folder(C), MADE):
        pass
    (library.folder(B) / "memory.sqlite").write_bytes(b"x" * 5000)
    first, second, third = library.entries()
    assert (first.state, first.counts["segment"], first.made) == ("closed", 4, MADE)
    assert second.state is None and "is damaged: file is not a database" in second.fault
    assert (third.state, third.fault) == ("building", "")


def test_videos_that_are_not_there(library):
    with pytest.raises(FileNotFoundError, match=f"no memory of this video, but of {A}"):
        library.open(A.replace("a-", "A-"))
    with pytest.raises(FileNotFoundError, match="no memory of this video: 'zzzzz-"):
        library.remove(video_id("zzzzz", "0" * 16).replace("0", "7"))
    for call in library.open, library.remove, library.folder:
        with pytest.raises(ValueError, match="the id of a video is"):
            call(f"../library/{A}")


def test_what_is_removed(library):
    library.refresh()
    with write_store(library.folder(A), MADE):
        with pytest.raises(ValueError, match="is being written by process"):
            library.remove(A)
        assert library.open(A).state == "closed"
    library.remove(A)
    assert library.videos() == [B] and not library.folder(A).exists()
    assert {hit.video for hit in library.search("segment", axis(0)[0])} == {B}


def test_search_over_all(library, index):
    library = Library(library.root, index)
    query_D = 0.8 * axis(1)[0] + 0.6 * axis(3)[0]
    assert library.search("segment", query_D) == []
    assert library.refresh() == ([A, B], [])
    hits = library.search("segment", query_D, 3)
    assert [(hit.video, hit.number) for hit in hits] == [(A, 1), (B, 1), (A, 3)]
    np.testing.assert_allclose([hit.score for hit in hits], [0.8, 0.8, 0.6], atol=1e-3)
    assert [hit.video for hit in library.search("segment", query_D, 2, [B])] == [B, B]
    assert library.search("segment", query_D, 2, []) == []
    assert [(hit.video, hit.number) for hit in library.search("concept", axis(1)[0], 2)] == [(A, 0), (B, 0)]
    with pytest.raises(ValueError, match="have vectors; got cue"):
        library.search("cue", query_D)
    with pytest.raises(ValueError, match="vectors of 8 numbers, and the query has .4,"):
        library.search("segment", np.ones(4))


def test_an_index_follows_the_memories(library, index):
    library = Library(library.root, index)
    library.refresh()
    assert library.refresh() == ([], [])
    with write_store(library.folder(B), MADE) as store, store.transaction() as batch:
        batch.put(Segment(5, 20.0, 30.0), axis(7))
    assert library.refresh() == ([B], [])
    assert library.search("segment", axis(7)[0], 1)[0][:2] == (B, 5)
    with write_store(library.folder(B), MADE) as store, store.transaction() as batch:
        batch.mark("open")
    library.remove(A)
    assert library.refresh() == ([], [B]) and index.marks() == {}
    assert library.search("segment", axis(7)[0]) == []


def random(rng, count, first=0):
    x_ND = rng.normal(size=(count, 16))
    numbers_N = np.sort(rng.integers(first, first + count, count))
    return Vectors(as_stored(x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)), numbers_N, *np.zeros((2, count)))


def test_indexes_agree_and_nodes_count_once(index):
    """Nodes have one to many vectors, and the best counts."""
    rng = np.random.default_rng(0)
    memories = [Indexed(video, "1", {"concept": random(rng, 40)}) for video in (A, B, C)]
    index.put(memories[:2])
    index.put(memories[2:])
    for most in 1, 7, 200:
        query_D = rng.normal(size=16).astype(np.float32)
        scores = {}
        for one in memories:
            vectors = one.layers["concept"]
            for number, score in zip(vectors.numbers_N.tolist(), vectors.x_ND @ query_D, strict=True):
                scores[one.video, number] = max(score, scores.get((one.video, number), -9))
        wanted = sorted(scores, key=lambda node: -scores[node])[:most]
        hits = index.search("concept", query_D, most)
        assert [hit[:2] for hit in hits] == wanted
        np.testing.assert_allclose([hit.score for hit in hits], [scores[node] for node in wanted], atol=1e-5)


def test_an_index_on_disk_is_there_the_next_time(tmp_path):
    index, rng = lance(tmp_path), np.random.default_rng(0)
    index.put([Indexed(A, "1", {"segment": random(rng, 9)})])
    index.build()
    again = lance(tmp_path)
    assert again.marks() == {A: "1"} and len(again.search("segment", rng.normal(size=16), 3)) == 3
    with pytest.raises(ValueError, match="the id of a video is"):
        again.remove(["x' OR 'a' = 'a"])


def test_an_approximate_index_finds_what_is_nearest(tmp_path, monkeypatch):
    index, rng = lance(tmp_path), np.random.default_rng(0)
    monkeypatch.setattr("vlmem_jax.agent.lance.FEWEST", 1000)
    vectors = random(rng, 1000)
    index.put([Indexed(A, "1", {"segment": vectors})])
    index.build()
    for row in 0, 500, 999:
        best = index.search("segment", vectors.x_ND[row], 1)[0]
        assert best.number == vectors.numbers_N[row] and best.score == pytest.approx(1, abs=1e-3)


def test_memories_of_another_embedder_are_refused_by_name(tmp_path):
    mark = LexicalEmbedder.mark
    written(tmp_path / A, made={"embedder": mark._asdict()})
    assert Library(tmp_path, mark=mark).refresh()[0] == [A]
    with pytest.raises(ValueError, match=f"{A} holds vectors of the embedder lexical"):
        Library(tmp_path, mark=mark._replace(digest="0" * 32)).refresh()


def test_a_video_is_named_by_the_beginning_of_its_name(tmp_path):
    library = Library(tmp_path)
    with pytest.raises(FileNotFoundError, match="there are no memories here"):
        library.named()
    for name in ("my film.mp4", "my talk.mp4"):
        written(tmp_path / video_id(name, "0" * 16))
    film = video_id("my film.mp4", "0" * 16)
    assert library.named("my film.mp4") == library.named("my fi") == library.named(film) == film
    with pytest.raises(ValueError, match="my may be any of 2 videos, my_film.*give more of its name"):
        library.named("my")
    with pytest.raises(FileNotFoundError, match="no memory of this video, but of my_film"):
        library.named("my_film.mkv-0000000000000000")
    with pytest.raises(FileNotFoundError):
        library.named("../..")
