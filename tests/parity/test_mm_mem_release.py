"""Memories that MM-Mem's release wrote, read into a store and written again."""

import io
import json

import pytest
from PIL import Image

from vlmem_jax.agent.nodes import Extracted
from vlmem_jax.agent.release import Graph, export_release, import_release
from vlmem_jax.agent.schema import Texts
from vlmem_jax.agent.writing import write_store

LAYERS = ("l1", "l2", "l3")


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "mm_mem/e2e.json").read_text())


def frame_folder(layer, record):
    key = "l1_index" if layer == "l1" else "l2_index"
    return f"{layer.upper()}_frames/{key[:2]}_{record[key]:04d}"


def as_released(case, folder):
    """The files of a case, each frame a picture of one colour."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    for layer in LAYERS:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{layer}_memory.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in case[layer]))
        for one in case[layer]:
            frames = folder / frame_folder(layer, one)
            frames.mkdir(parents=True)
            for name in one["frame_paths"]:
                (frames / name).write_bytes(picture.getvalue())
    graph = case["graph"]
    edges = [{"source": a, "target": b, "label": label} for a, b, label in graph["edges"]]
    node_link = {"nodes": graph["nodes"], "links": edges, "graph": {"entity_graph": graph["entity_graph"]}}
    (folder / "knowledge_graph.json").write_text(json.dumps(node_link))


def test_what_the_release_wrote(cases, tmp_path):
    for case in cases:
        here = tmp_path / str(case["id"])
        as_released(case, here / "released")
        with write_store(here / "store", {"video": case["video_id"]}) as store:
            video, graph = import_release(here / "released", store)
            assert video == case["video_id"]
            pyramid, said = store.pyramid(), store.nodes("extracted", Extracted)
            export_release(store, video, graph, here / "again")
        assert [one.number for one in pyramid.segments] == [one["l1_index"] for one in case["l1"]]
        assert [list(one.segments) for one in pyramid.episodes] == [one["constituent_l1_indices"] for one in case["l2"]]
        assert [[frame.time for frame in one.frames] for one in said] == [one["frame_timestamps"] for one in case["l3"]]
        for layer in LAYERS:
            lines = (here / "again" / f"{layer}_memory.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == case[layer]
            files = {str(path.relative_to(here / "again")) for path in (here / "again").glob(f"{layer.upper()}_*/*/*")}
            assert files == {f"{frame_folder(layer, one)}/{name}" for one in case[layer] for name in one["frame_paths"]}
        said = {node["id"]: Texts(*(tuple(node[kind]) for kind in Texts._fields)) for node in case["graph"]["nodes"]}
        edges = {(a, b): label for a, b, label in case["graph"]["edges"]}
        assert graph == Graph(said, edges, case["graph"]["entity_graph"])
        again = json.loads((here / "again/knowledge_graph.json").read_text())
        assert again["nodes"] == case["graph"]["nodes"]
        assert [[one["source"], one["target"], one["label"]] for one in again["edges"]] == case["graph"]["edges"]
