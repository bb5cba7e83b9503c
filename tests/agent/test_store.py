"""The memory of a video on disk: what is written is read, by whoever may."""

import json
import multiprocessing
import os
import sqlite3

import numpy as np
import pytest

from tests.agent.stores import MADE, axis, embed, fill, jpeg, written
from vlmem_jax.agent import store as stores
from vlmem_jax.agent import writing
from vlmem_jax.agent.checking import repair, verify
from vlmem_jax.agent.nodes import Cue, Episode, Frame, Segment
from vlmem_jax.agent.segments import Span
from vlmem_jax.agent.store import open_store, video_id
from vlmem_jax.agent.writing import write_store


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "film")


def test_what_is_written_is_read(tmp_path):
    with write_store(tmp_path / "film", MADE) as store:
        schema = fill(store)
    with open_store(tmp_path / "film", MADE) as store:
        pyramid = store.pyramid()
        assert [one.caption for one in pyramid.segments] == [f"segment {n}" for n in range(4)]
        assert [one.segments for one in pyramid.episodes] == [(0, 1), (2, 3)]
        assert pyramid.extracted[1] == {"entities": [{"entity name": "boat"}]}
        for mine, kept in zip(schema.concepts, store.concepts(), strict=True):
            assert (kept.kind, kept.name, kept.episodes) == (mine.kind, mine.name, mine.episodes)
            np.testing.assert_array_equal(kept.vectors_GD, mine.vectors_GD)
        assert store.cues(Span(3.0, 12.5)) == [Cue(0, 2.0, 4.0, "said 0"), Cue(1, 12.0, 14.0, "said 1")]
        assert store.made == MADE and store.state == "closed" and verify(store) == []
        assert store.counts() == {"segment": 4, "episode": 2, "extracted": 2, "concept": 2, "cue": 4}
        assert [(hit.number, hit.score) for hit in store.search("concept", axis(1)[0], 1)] == [(0, 1.0)]
        shown = pyramid.segments[1].frames[0]
        assert store.frames.image(shown.name).getpixel((0, 0))[0] == pytest.approx(40, abs=3)
    assert {path.name for path in (tmp_path / "film").iterdir()} == {"memory.sqlite", "writer.lock", "frames"}


def test_a_memory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no memory in this folder"):
        open_store(tmp_path)
    assert not list(tmp_path.iterdir())


# --- search -----------------------------------------------------------------------------------------------------------


def test_search(folder):
    with open_store(folder) as store:
        query_D = 0.9 * axis(2)[0] + 0.1 * axis(0)[0]
        assert [hit.number for hit in store.search("segment", query_D)] == [2, 0, 1, 3]
        assert [hit.number for hit in store.search("segment", query_D, 1)] == [2]
        assert [hit.number for hit in store.search("segment", query_D, within=Span(0.0, 20.0))] == [0, 1]
        assert [hit.number for hit in store.search("segment", query_D, among=[3, 1])] == [1, 3]
        assert store.search("cue", query_D) == []
        with pytest.raises(ValueError, match="vectors of 8 numbers, and the query has .4,.; search with the embedder"):
            store.search("segment", np.ones(4))


def test_a_node_with_several_vectors_is_found_by_its_best(tmp_path):
    with write_store(tmp_path, MADE) as store:
        with store.transaction() as batch:
            batch.put(Segment(0, 0.0, 1.0), np.concatenate([axis(0), axis(1), axis(2)]))
            batch.put(Segment(1, 1.0, 2.0), axis(1) * 0.5)
        assert store.search("segment", axis(1)[0], 2) == [(0, 1.0), (1, 0.5)]


def test_a_reader_finds_what_is_written_meanwhile(folder):
    with open_store(folder) as reader:
        assert len(reader.search("segment", axis(0)[0])) == 4
        with write_store(folder, MADE) as store:
            with store.transaction() as batch:
                batch.put(Segment(4, 40.0, 50.0), axis(0))
                assert len(reader.search("segment", axis(0)[0])) == 4, "what is not committed is not there"
            assert [hit.number for hit in reader.search("segment", axis(0)[0], 2)] == [0, 4]
            assert [hit.number for hit in store.search("segment", axis(0)[0], 2)] == [0, 4]


def test_vectors_of_one_width_and_of_length_one(tmp_path):
    with write_store(tmp_path, MADE) as store:
        with store.transaction() as batch:
            batch.put(Segment(0, 0.0, 1.0), axis(0))
        for wrong, told in [(axis(0, 4), "holds vectors of 8 numbers, got 4"), (2 * axis(0), "length 2"),
                            (np.full((1, 8), np.nan), "length nan"), (np.full((1, 8), 1e9), "length inf")]:  # fmt: skip
            with pytest.raises(ValueError, match=told), store.transaction() as batch:
                batch.put(Segment(1, 0.0, 1.0), wrong)
        assert store.counts()["segment"] == 1


# --- who may write ----------------------------------------------------------------------------------------------------


def test_one_writes(folder):
    with write_store(folder, MADE):
        told = f"is being written by process {os.getpid()} on .+; wait for it"
        with pytest.raises(ValueError, match=told), write_store(folder, MADE):
            raise AssertionError("two write")
        with open_store(folder) as store:
            assert store.state == "closed"
    with write_store(folder, MADE):
        pass


def held(folder, says):
    with write_store(folder, MADE):
        says.send(os.getpid())
        says.recv()


def test_another_process_is_named_and_its_death_lets_go(folder):
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=held, args=(folder, there))
    other.start()
    pid = here.recv()
    with pytest.raises(ValueError, match=f"written by process {pid} on"), write_store(folder, MADE):
        raise AssertionError("two write")
    other.kill()
    other.join()
    with write_store(folder, MADE) as store:
        assert len(store.pyramid().segments) == 4


def test_a_reader_changes_nothing(folder):
    before = (folder / "memory.sqlite").read_bytes()
    with open_store(folder) as store, pytest.raises(OSError, match="cannot be written"):
        store.rows("DELETE FROM node")
    assert (folder / "memory.sqlite").read_bytes() == before


@pytest.mark.parametrize("opened", [open_store, lambda *args: write_store(*args).__enter__()])
def test_what_it_was_made_with_is_the_same(folder, opened):
    with pytest.raises(ValueError, match="was made with model 'scripted', not 'other'; embedder 'letters', not 'bge'"):
        opened(folder, MADE | {"embedder": "bge", "model": "other"})


# --- a transaction ----------------------------------------------------------------------------------------------------


def test_all_or_nothing(tmp_path):
    with write_store(tmp_path, MADE) as store:
        with pytest.raises(ZeroDivisionError), store.transaction() as batch:
            batch.put(Segment(0, 0.0, 1.0), axis(0))
            raise ZeroDivisionError
        assert store.counts()["segment"] == 0 and store.search("segment", axis(0)[0]) == []
        told = "written before a node shows it; there is no 0{32}"
        with pytest.raises(ValueError, match=told), store.transaction() as batch:
            batch.put(Segment(0, 0.0, 1.0, "", (Frame("0" * 32, 0.0),)))


def test_what_is_put_again_takes_the_place_of_what_was(tmp_path):
    with write_store(tmp_path, MADE) as store:
        for caption, vectors in [("old", np.concatenate([axis(0), axis(1)])), ("new", axis(2))]:
            with store.transaction() as batch:
                batch.put(Segment(0, 0.0, 1.0, caption), vectors)
        assert [one.caption for one in store.pyramid().segments] == ["new"]
        assert store.search("segment", axis(2)[0]) == [(0, 1.0)] and len(store.vectors("segment").x_ND) == 1


def test_a_full_disk(tmp_path):
    with write_store(tmp_path, MADE) as store:
        fill(store)
        before = list(store._db.iterdump())
        [[pages]] = store.rows("PRAGMA page_count")
        store.rows(f"PRAGMA max_page_count = {pages + 2}")
        told = "the disk is full; nothing of the last step was kept"
        with pytest.raises(OSError, match=told) as error, store.transaction() as batch:
            for n in range(4, 100):
                batch.put(Segment(n, 0.0, 1.0, "x" * 1000), axis(0))
        assert error.value.filename == str(tmp_path / "memory.sqlite")
        assert list(store._db.iterdump()) == before
        store.rows("PRAGMA max_page_count = 100000")
        with store.transaction() as batch:
            batch.put(Segment(4, 40.0, 50.0))
    with open_store(tmp_path) as store:
        assert len(store.pyramid().segments) == 5 and verify(store) == []


def test_a_disk_that_is_full_of_frames(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with write_store(tmp_path, MADE) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                store.frames.write(jpeg(3))
        assert list(store.frames.files()) == []


# --- damage and age ---------------------------------------------------------------------------------------------------


def test_faults_are_told_and_mended_where_nothing_refers_to_them(folder):
    with write_store(folder, MADE) as store:
        first, second = (one.frames[0].name for one in store.pyramid().segments[:2])
        store.frames.path(first).unlink()
        store.frames.path(second).write_bytes(b"other")
        stray = store.frames.path(store.frames.write(jpeg(255)))
        (unfinished := stray.with_name(f".{'0' * 32}.1.tmp")).write_bytes(b"")
        with store.transaction() as batch:
            batch.put(Episode(2, 40.0, 50.0, (3, 9)))
            store.rows("INSERT INTO vector VALUES ('segment', 77, 0, x'00')")
        faults = verify(store)
        assert {fault.told for fault in faults} == {
            f"frame {first} of segment 0 is not there",
            f"frame {second} of extracted 0 is damaged",
            f"{stray} belongs to nothing",
            f"{unfinished} belongs to nothing",
            "episode 2 refers to segment 9, which is not there",
            "a vector is of segment 77, which is not there",
        } and sum(fault.harmless for fault in faults) == 3
        assert repair(store) == [fault for fault in faults if not fault.harmless]
        assert not stray.exists() and not unfinished.exists()


def test_damage(folder):
    with write_store(folder, MADE) as store:
        store.rows("UPDATE node SET content = '{}' WHERE layer = 'episode' AND number = 1")
        frames = list(store.frames.files())
        assert len(repair(store)) == 1 and list(store.frames.files()) == frames, "who knows what it refers to"
    with open_store(folder) as store:
        with pytest.raises(ValueError, match="memory.sqlite is damaged at episode 1: a node of kind episode has"):
            store.pyramid()
        assert any("damaged at episode 1" in fault.told for fault in verify(store))
    file = folder / "memory.sqlite"
    whole = file.read_bytes()
    page = whole[:8192] + b"\xff" * 4096 + whole[12288:]
    for content, told in [(page, "damaged"), (b"no SQLite file" * 99, "damaged: file is not a database"),
                          (b"", "holds no memory"), (whole[:5000], "damaged")]:  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(ValueError, match=told), open_store(folder) as store:
            faults = verify(store)
            raise ValueError(" ".join(fault.told for fault in faults))


def test_other_files_and_later_versions(folder):
    file = folder / "memory.sqlite"
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for opened in open_store, lambda folder: write_store(folder, MADE).__enter__():
        with pytest.raises(ValueError, match="is of version 99, and this program knows up to 1; use a later one"):
            opened(folder)
    file.unlink()
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE other (x)")
    db.close()
    before = file.read_bytes()
    for opened in open_store, lambda folder: write_store(folder, MADE).__enter__():
        with pytest.raises(ValueError, match="holds no memory of a video"):
            opened(folder)
    assert file.read_bytes() == before


def test_an_earlier_version_is_brought_up_to_date_by_whoever_writes(folder, monkeypatch):
    def to_version_2(db):
        db.execute("UPDATE node SET content = replace(content, 'segment 1', 'segment I')")

    for module in stores, writing:
        monkeypatch.setattr(module, "VERSION", 2)
    with pytest.raises(ValueError, match="is of version 1, and this program reads version 2; whoever writes it"):
        open_store(folder)
    monkeypatch.setattr(writing, "MIGRATIONS", {1: lambda db: db.execute("no SQL")})
    before = (folder / "memory.sqlite").read_bytes()
    with pytest.raises(OSError), write_store(folder, MADE):
        raise AssertionError("it cannot be opened")
    assert (folder / "memory.sqlite").read_bytes() == before
    monkeypatch.setattr(writing, "MIGRATIONS", {1: to_version_2})
    with write_store(folder, MADE) as store:
        assert store.pyramid().segments[1].caption == "segment I" and verify(store) == []
    with open_store(folder) as store:
        assert len(store.pyramid().segments) == 4


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("film.mp4", "film.mp4"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("a b\n<script>", "a_b_script_"),
        (".hidden", "hidden"),
        ("日本", "_"),
        ("", "video"),
        ("x" * 300, "x" * 80),
    ],
)
def test_ids_of_videos(name, wanted):
    assert video_id(name, "0123456789abcdef" * 2) == f"{wanted}-0123456789abcdef"


@pytest.mark.parametrize(
    "wrong", ["", "..", "a/b-0123456789abcdef", "../x-0123456789abcdef", "x" * 81 + "-" + "0" * 16]
)
def test_what_is_no_id(wrong):
    with pytest.raises(ValueError, match="the id of a video is up to 80 letters"):
        stores.check_id(wrong)


def test_notes_of_what_it_was_made_with_are_as_json_has_them(tmp_path):
    made = MADE | {"config": {"sizes": (1, 2)}}
    for _ in range(2):
        with write_store(tmp_path, made) as store:
            assert store.made == json.loads(json.dumps(made))
    assert embed(["apple"]).shape == (1, 8)
