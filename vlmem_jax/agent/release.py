"""Memories as the public code of MM-Mem keeps them: a JSONL file a layer and folders of frames; the graph, which it
pickles, as the node-link JSON of NetworkX.

What is read comes from others: files are of limited size, frames lie below the folder, and keys are as they must be.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlmem_jax.agent.building import Pyramid
from vlmem_jax.agent.nodes import Episode, Extracted, Segment, from_fields
from vlmem_jax.agent.schema import Concept, ReleaseSchema, Texts
from vlmem_jax.agent.store import Store
from vlmem_jax.agent.writing import Batch, Writer
from vlmem_jax.paths import write_whole
from vlmem_jax.processing.images import open_image
from vlmem_jax.processing.media import Encoded, resolve

MOST_BYTES = 256 * 2**20
"""Of a file of JSON."""
MOST_FRAME_BYTES = 32 * 2**20
GRAPH = "knowledge_graph.json"
KINDS = ("entities", "actions", "scenes")


class Graph(NamedTuple):
    """What episodes have in common, as the release has it."""

    texts: dict[int, Texts]
    """What is said of each episode."""
    edges: dict[tuple[int, int], str]
    """Pairs of episodes, both ways, with the last thing that they share."""
    index: dict[str, list[int]]
    """Episodes by what they are about."""

    @classmethod
    def of_schema(cls, schema: ReleaseSchema) -> "Graph":
        """That of the release itself."""
        return cls(schema.texts, schema.edges, schema.index)

    @classmethod
    def of_concepts(cls, concepts: Iterable[Concept], extracted: Mapping[int, Mapping[str, Any]]) -> "Graph":
        """Of concepts, of which those of one name become one."""
        index: dict[str, list[int]] = {}
        edges: dict[tuple[int, int], str] = {}
        for one in concepts:
            index[one.name] = sorted({*index.get(one.name, ()), *one.episodes})
            edges |= {(a, b): one.name for a in one.episodes for b in one.episodes if a != b}
        return cls({number: Texts.of(said) for number, said in extracted.items()}, edges, index)


# --- out --------------------------------------------------------------------------------------------------------------


def export_release(store: Store, video: str, graph: Graph, out: str | Path) -> None:
    """Writes a memory to a new folder, which appears when it is complete. Segments without frames are left out, as in
    the release. Raises ValueError if the folder is there, and OSError, such as for a frame that is not."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} must be a new folder, but it is there; remove it, or choose another")
    unfinished = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        with store.moment():
            _write(store, video, graph, unfinished)
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write(store: Store, video: str, graph: Graph, out: Path) -> None:
    def node(layer: int, one: Segment | Episode, more: Mapping[str, Any]) -> dict[str, Any]:
        fields = {f"l{layer}_index": one.number, "video_id": video, "start_sec": one.start, "end_sec": one.end}
        return fields | {"caption": one.caption} | more | shown(layer, one)

    def shown(layer: int, one: Segment | Episode | Extracted) -> dict[str, Any]:
        names = [f"frame_{frame.time:.3f}.jpg" for frame in one.frames]
        for name, frame in zip(names, one.frames, strict=True):
            write_whole(out / _folder(layer, one.number) / name, store.frames.read(frame.name))
        return {"frame_paths": names, "frame_timestamps": [frame.time for frame in one.frames]}

    layers = {
        1: [node(1, one, {}) for one in store.nodes("segment", Segment) if one.frames],
        2: [node(2, one, {"constituent_l1_indices": list(one.segments)}) for one in store.nodes("episode", Episode)],
        3: [
            {"l2_index": one.number} | {kind: _list(one.said.get(kind)) for kind in KINDS} | shown(3, one)
            for one in store.nodes("extracted", Extracted)
        ],
    }
    for layer, records in layers.items():
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        write_whole(out / f"l{layer}_memory.jsonl", lines.encode())
    write_whole(out / GRAPH, json.dumps(_node_link(graph)).encode())


def _node_link(graph: Graph) -> dict[str, Any]:
    return {
        "directed": True,
        "multigraph": False,
        "graph": {"entity_graph": graph.index},
        "nodes": [{"id": number, **texts._asdict()} for number, texts in graph.texts.items()],
        "edges": [{"source": a, "target": b, "label": label} for (a, b), label in graph.edges.items()],
    }


# --- in ---------------------------------------------------------------------------------------------------------------


def import_release(
    folder: str | Path, store: Writer, more: Callable[[Batch, Pyramid], None] | None = None
) -> tuple[str, Graph]:
    """Puts the memory of a folder into a store, all of it or nothing, and marks it closed. Gives what the video is
    called there, and the graph.

    more: puts what the release does not keep, such as vectors, in the same go. Raises ValueError, naming file and line,
    for what is not as the release writes it.
    """
    folder = Path(folder)
    with store.transaction() as batch:
        reader = _Reader(folder, store)
        segments = reader.nodes(1, Segment, {})
        episodes = reader.nodes(2, Episode, {"segments": "constituent_l1_indices"})
        there = {one.number for one in segments}
        if lost := sorted({n for one in episodes for n in one.segments} - there):
            raise ValueError(f"{folder}/l2_memory.jsonl names segments {lost[:5]}, which are not in l1_memory.jsonl")
        extracted = reader.extracted({one.number: one for one in episodes})
        for node in [*segments, *episodes, *extracted]:
            batch.put(node)
        if more:
            said = {one.number: {} for one in episodes} | {one.number: one.said for one in extracted}
            more(batch, Pyramid(segments, episodes, said))
        graph = _read_graph(folder / GRAPH)
        batch.mark("closed")
    return reader.video, graph


class _Reader:
    def __init__(self, folder: Path, store: Writer):
        self.folder, self.store, self.video = folder, store, ""

    def nodes(self, layer: int, kind: type[Any], more: Mapping[str, str]) -> list[Any]:
        """The records of a layer as nodes."""
        ours = {"number": f"l{layer}_index", "start": "start_sec", "end": "end_sec", "caption": "caption", **more}
        found: dict[int, Any] = {}
        for where, record in _lines(self.folder / f"l{layer}_memory.jsonl"):
            _check_keys(where, record, {*ours.values(), "video_id", "frame_paths", "frame_timestamps"})
            self.video = self.video or str(record["video_id"])
            if record["video_id"] != self.video:
                raise ValueError(f"{where} is of another video than the first, {self.video!r:.60}")
            fields = {key: record[theirs] for key, theirs in ours.items()}
            one = _node(where, kind, fields | {"frames": self._frames(where, layer, record)})
            _take(where, found, one)
        return list(found.values())

    def extracted(self, episodes: Mapping[int, Episode]) -> list[Extracted]:
        """What is said of each episode."""
        found: dict[int, Extracted] = {}
        for where, record in _lines(self.folder / "l3_memory.jsonl"):
            _check_keys(where, record, {"l2_index", *KINDS, "frame_paths", "frame_timestamps"})
            number = record["l2_index"]
            if not isinstance(number, int) or number not in episodes:
                raise ValueError(f"{where} is of the episode {number!r:.60}, which is not in l2_memory.jsonl")
            fields = {"number": number, "start": episodes[number].start, "end": episodes[number].end}
            said = {kind: record[kind] for kind in KINDS}
            frames = self._frames(where, 3, record, "l2_index")
            _take(where, found, _node(where, Extracted, fields | {"said": said, "frames": frames}))
        return list(found.values())

    def _frames(self, where: str, layer: int, record: Mapping[str, Any], key: str = "") -> list[list[Any]]:
        """The frames of a record, which are in the store from now on."""
        names, times, number = record["frame_paths"], record["frame_timestamps"], record[key or f"l{layer}_index"]
        if not isinstance(names, list) or not isinstance(times, list) or len(names) != len(times):
            raise ValueError(f"{where} must list as many frame_timestamps as frame_paths")
        if not isinstance(number, int) or not 0 <= number < 2**31:
            raise ValueError(f"{where} must have a number from 0 on, got {number!r:.60}")
        kept = [self._kept(where, _folder(layer, number), name) for name in names]
        return list(map(list, zip(kept, times, strict=True)))

    def _kept(self, where: str, folder: str, name: Any) -> str:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{where} must name frames without folders, got {name!r:.60}")
        try:
            data = _content(resolve(self.folder, f"{folder}/{name}"), MOST_FRAME_BYTES)
            if not data.startswith(b"\xff\xd8"):
                raise ValueError(f"frame {name:.60} is no JPEG file")
            open_image(Encoded(name, data))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return self.store.frames.write(data)


def _read_graph(path: Path) -> Graph:
    """Raises ValueError, naming the file, for anything but what `export_release` writes, or NetworkX of that."""
    try:
        found = json.loads(_content(path, MOST_BYTES))
        texts = {
            _number(node["id"]): Texts(*(tuple(map(_text, _some(node[kind]))) for kind in KINDS))
            for node in _some(found["nodes"])
        }
        links = _some(found["edges"] if "edges" in found else found["links"])
        edges = {(_number(one["source"]), _number(one["target"])): _text(one["label"]) for one in links}
        index = {key: [*map(_number, _some(some))] for key, some in found["graph"]["entity_graph"].items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        told = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} must be a graph in node-link JSON: {told}") from error
    return Graph(texts, edges, index)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record, with its file and line."""
    for number, line in enumerate(_content(path, MOST_BYTES).splitlines(), 1):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} must be a JSON object, got a {type(record).__name__}")
        yield where, record


def _content(path: Path, most: int) -> bytes:
    """A file of at most so many bytes."""
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} must hold {most:,} bytes at most")
    return data


def _check_keys(where: str, record: Mapping[str, Any], keys: set[str]) -> None:
    for wrong, told in ((keys - record.keys(), "lacks"), (record.keys() - keys, "has, and must not,")):
        if wrong:
            raise ValueError(f"{where} {told} {', '.join(sorted(wrong)):.200}")


def _node(where: str, kind: type[Any], fields: dict[str, Any]) -> Any:
    try:
        return from_fields(kind, fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _take(where: str, found: dict[int, Any], one: Any) -> None:
    if one.number in found:
        raise ValueError(f"{where} is the second of number {one.number}")
    found[one.number] = one


def _folder(layer: int, number: int) -> str:
    """Frames of the third layer are filed under the episode."""
    return f"L{layer}_frames/l{min(layer, 2)}_{number:04d}"


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _some(value: Any) -> list:
    if not isinstance(value, list):
        raise TypeError(f"a list must stand where {value!r:.60} does")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"episodes are numbers, got {value!r:.60}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text must stand where {value!r:.60} does")
    return value
