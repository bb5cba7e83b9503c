"""Memories in the layout of MM-Mem's release, out and in; and what others may have put there."""

import json

import pytest

from tests.agent.stores import MADE, fill, jpeg, written
from vlmem_jax.agent import release
from vlmem_jax.agent.nodes import Cue
from vlmem_jax.agent.release import Graph, export_release, import_release
from vlmem_jax.agent.store import open_store
from vlmem_jax.agent.writing import write_store


@pytest.fixture
def exported(tmp_path):
    with open_store(written(tmp_path / "film")) as store:
        graph = Graph.of_concepts(store.concepts(), store.pyramid().extracted)
        export_release(store, "film", graph, tmp_path / "release")
    return tmp_path / "release"


def taken(folder, where):
    with write_store(where, MADE) as store:
        return import_release(folder, store)


def test_what_goes_out_comes_in(exported, tmp_path):
    video, graph = taken(exported, tmp_path / "copy")
    assert video == "film" and graph.index == {"apple": [0], "boat": [1]} and graph.edges == {}
    assert graph.texts[1].entities == ("boat",)
    with open_store(tmp_path / "film") as one, open_store(tmp_path / "copy") as other:
        assert other.pyramid().segments == one.pyramid().segments
        assert other.pyramid().episodes == one.pyramid().episodes
        assert other.pyramid().extracted == {
            n: {"entities": [{"entity name": name}], "actions": [], "scenes": []}
            for n, name in enumerate(["apple", "boat"])
        }
        assert other.state == "closed" and [file[0] for file in other.frames.files()] == sorted(
            {frame.name for node in one.pyramid().segments for frame in node.frames}
        )


def test_the_layout(exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        "L1_frames", "L2_frames", "L3_frames", "knowledge_graph.json", "l1_memory.jsonl", "l2_memory.jsonl",
        "l3_memory.jsonl"]  # fmt: skip
    assert (exported / "L1_frames/l1_0002/frame_25.000.jpg").read_bytes() == jpeg(100)
    assert {path.name for path in (exported / "L3_frames").iterdir()} == {"l2_0000", "l2_0001"}
    graph = json.loads((exported / "knowledge_graph.json").read_text())
    assert graph["nodes"][0] == {"id": 0, "entities": ["apple"], "actions": [], "scenes": []}


def test_a_folder_that_is_there_stays_as_it_is(exported, tmp_path):
    with open_store(tmp_path / "film") as store:
        with pytest.raises(ValueError, match="release must be a new folder, but it is there"):
            export_release(store, "film", Graph({}, {}, {}), exported)
        next(path for _, path in store.frames.files()).unlink()
        with pytest.raises(FileNotFoundError):
            export_release(store, "film", Graph({}, {}, {}), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film", "release"]


def test_concepts_that_episodes_share_are_edges_both_ways(tmp_path):
    with write_store(tmp_path, MADE) as store:
        schema = fill(store)
    schema.concepts[0].episodes[:] = [0, 1]
    assert Graph.of_concepts(schema.concepts, {}).edges == {(0, 1): "apple", (1, 0): "apple"}


def changed(folder, file, change):
    path = folder / file
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def put(line, key, value):
    return lambda lines: lines[line].update({key: value})


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("l1_memory.jsonl", put(1, "colour", 3), r"l1_memory.jsonl:2 has, and must not, colour"),
        ("l1_memory.jsonl", lambda lines: lines[0].pop("caption"), r"l1_memory.jsonl:1 lacks caption"),
        ("l1_memory.jsonl", put(0, "caption", ["x"]), r":1: a node of kind segment holds a wrong caption"),
        ("l1_memory.jsonl", put(0, "start_sec", float("nan")), "wrong start: it must be a number, got nan"),
        ("l1_memory.jsonl", put(1, "video_id", "other"), ":2 is of another video than the first, 'film'"),
        ("l1_memory.jsonl", put(1, "l1_index", 10**20), ":2 must have a number from 0 on, got 1"),
        ("l1_memory.jsonl", put(0, "frame_timestamps", [0.0]), ":1 must list as many frame_timestamps as frame_paths"),
        (
            "l1_memory.jsonl",
            put(0, "frame_paths", ["../l1_0001/frame_10.000.jpg"] * 2),
            "must name frames without folders",
        ),
        ("l1_memory.jsonl", put(0, "frame_paths", [".."] * 2), "must name frames without folders|is not there"),
        ("l1_memory.jsonl", put(0, "frame_paths", ["/etc/passwd"] * 2), "must name frames without folders"),
        ("l1_memory.jsonl", put(0, "frame_paths", ["x.jpg"] * 2), ":1: .*L1_frames/l1_0000/x.jpg is not there"),
        ("l1_memory.jsonl", lambda lines: lines.append(lines[0]), ":5 is the second of number 0"),
        ("l1_memory.jsonl", lambda lines: lines.pop(), r"names segments \[3\], which are not in l1_memory.jsonl"),
        ("l1_memory.jsonl", lambda lines: lines.append([1]), ":5 must be a JSON object, got a list"),
        ("l3_memory.jsonl", put(0, "l2_index", 9), ":1 is of the episode 9, which is not in l2_memory.jsonl"),
        ("l3_memory.jsonl", put(0, "l2_index", [0]), ":1 is of the episode .0., which is not"),
        ("knowledge_graph.json", lambda lines: lines[0].pop("nodes"), "node-link JSON: there is no 'nodes'"),
        ("knowledge_graph.json", put(0, "edges", [{"source": "0"}]), "node-link JSON: episodes are numbers, got '0'"),
        ("knowledge_graph.json", put(0, "graph", []), "must be a graph in node-link JSON"),
    ],
)
def test_what_is_not_as_the_release_writes_it(exported, tmp_path, file, change, told):
    changed(exported, file, change)
    with pytest.raises(ValueError, match=told):
        taken(exported, tmp_path / "copy")
    with open_store(tmp_path / "copy") as store:
        assert sum(store.counts().values()) == 0 and store.state == "building"


def test_files_that_are_too_large_or_no_pictures(exported, tmp_path, monkeypatch):
    frame = exported / "L1_frames/l1_0000/frame_0.000.jpg"
    whole = frame.read_bytes()
    for content, told in [
        (b"text", "is no JPEG file"),
        (whole[:200], "frame_0.000.jpg cannot be opened"),
        (b"", "is no JPEG file"),
    ]:
        frame.write_bytes(content)
        with pytest.raises(ValueError, match=rf"l1_memory.jsonl:1: .*{told}"):
            taken(exported, tmp_path / "copy")
    frame.unlink()
    (tmp_path / "outside.jpg").write_bytes(whole)
    frame.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(ValueError, match="l1_memory.jsonl:1: data may only name files below its root"):
        taken(exported, tmp_path / "copy")
    frame.unlink()
    frame.write_bytes(whole)
    monkeypatch.setattr(release, "MOST_FRAME_BYTES", 20)
    with pytest.raises(ValueError, match="must hold 20 bytes at most"):
        taken(exported, tmp_path / "copy")
    monkeypatch.setattr(release, "MOST_BYTES", 30)
    with pytest.raises(ValueError, match="l1_memory.jsonl must hold 30 bytes at most"):
        taken(exported, tmp_path / "copy")
    (exported / "l1_memory.jsonl").write_text("[" * 25)
    with pytest.raises(ValueError, match="l1_memory.jsonl:1 is no JSON"):
        taken(exported, tmp_path / "copy")


def test_what_a_memory_has_beyond_the_layout_stays_at_home(tmp_path):
    with write_store(tmp_path / "film", MADE) as store:
        fill(store)
        with store.transaction() as batch:
            batch.put(Cue(9, 0.0, 1.0, "said"))
        export_release(store, "film", Graph({}, {}, {}), tmp_path / "out")
    assert not any("said" in path.read_text() for path in (tmp_path / "out").glob("*.jsonl"))
