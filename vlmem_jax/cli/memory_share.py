"""Memories of many videos together, and those that go to others or come from them."""

import argparse
from collections.abc import Callable
from pathlib import Path

from vlmem_jax.agent.config import PRESETS, resolve
from vlmem_jax.agent.embed import LexicalEmbedder
from vlmem_jax.agent.index import Found
from vlmem_jax.agent.lance import LanceIndex
from vlmem_jax.agent.library import SEARCHED, Library
from vlmem_jax.agent.nodes import Grounding
from vlmem_jax.agent.recording import content_digest, made_of, put_nodes
from vlmem_jax.agent.release import Graph, export_release, import_release
from vlmem_jax.agent.schema import ReleaseSchema, Schema, Texts
from vlmem_jax.agent.store import LAYERS, Store, video_id
from vlmem_jax.agent.writing import write_store
from vlmem_jax.cli.memory_ask import add_embedder, embedder
from vlmem_jax.cli.memory_show import aligned, clock, told

WIDTH = 80
"""Characters of what was found in a line."""


def add_actions(actions: argparse._SubParsersAction, action: Callable[..., argparse.ArgumentParser]) -> None:
    """Those of `vlmem memory` that search and share."""
    searching = action(
        actions,
        "search",
        _search,
        "Finds what bears on some words in all memories that are complete; no model is asked.",
        'vlmem memory search "red door" --store runs/memories --layer segment',
    )
    searching.add_argument("words")
    searching.add_argument("--video", action="append", metavar="VIDEO", help="search it alone; may be repeated")
    searching.add_argument("--layer", choices=SEARCHED, action="append", help="default: all; may be repeated")
    searching.add_argument("--top", type=int, default=10, metavar="N", help="what is found, at most (%(default)s)")
    searching.add_argument("--index", metavar="WHERE", help="search what `vlmem memory index` made")
    add_embedder(searching)
    indexing = action(
        actions,
        "index",
        _index,
        "Makes, or brings up to date, an index by LanceDB, for more vectors than are compared one by one (some "
        "200,000). The same command again takes what is new.",
        "vlmem memory index --store runs/memories --index gs://my-bucket/memories",
    )
    indexing.add_argument(
        "--index", metavar="WHERE", help="a folder, s3:// or gs:// (default: `index` in the folder of memories)"
    )
    add_embedder(indexing)
    leaving = action(
        actions,
        "export",
        _export,
        "Writes a memory as the public code of MM-Mem does: JSONL files, folders of frames, and a graph in JSON.",
        "vlmem memory export a.mp4 --store runs/memories --out their/a",
    )
    leaving.add_argument("video", metavar="VIDEO", help="the beginning of its name in the store")
    leaving.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    add_embedder(leaving)
    coming = action(
        actions,
        "import",
        _import,
        "Reads a memory that the public code of MM-Mem wrote, or `vlmem memory export`; its graph in node-link JSON.",
        "vlmem memory import their/a --store runs/memories",
    )
    coming.add_argument("folder", metavar="DIR")
    coming.add_argument("--preset", choices=tuple(PRESETS), default="default", help="how it is asked (%(default)s)")
    add_embedder(coming)


def _search(args: argparse.Namespace) -> int:
    embed = embedder(args) or LexicalEmbedder()
    library = Library(args.store, LanceIndex(args.index) if args.index else None, embed.mark)
    videos = [library.named(video) for video in args.video] if args.video else None
    if not args.index:
        library.refresh()
    query_D, layers = embed([args.words])[0], dict.fromkeys(args.layer or SEARCHED)
    found = [(hit, layer) for layer in layers for hit in library.search(layer, query_D, args.top, videos)]
    found.sort(key=lambda one: (-one[0].score, one[0].video, one[0].number))
    rows = [_row(library, layer, hit) for hit, layer in found[: args.top] if hit.score > 0]
    print("\n".join(aligned(rows)) if rows else "nothing was found")
    return 0


def _row(library: Library, layer: str, hit: Found) -> list[str]:
    with library.open(hit.video) as store:
        node = store.node(layer, LAYERS[layer], hit.number)
    if isinstance(node, Grounding):
        when, text = f"episodes {','.join(map(str, node.episodes))}", "; ".join((node.name, *node.glosses))
    else:
        when, text = f"{clock(node.start)}-{clock(node.end)}", node.caption
    return [f"{hit.score:.3f}", hit.video, f"{layer} {hit.number}", when, told(text, WIDTH)]


def _index(args: argparse.Namespace) -> int:
    embed = embedder(args) or LexicalEmbedder()
    where = args.index or str(Path(args.store) / "index")
    index = LanceIndex(where)
    taken, gone = Library(args.store, index, embed.mark).refresh()
    index.build()
    print(f"{where}: {len(taken)} memories taken, {len(gone)} forgotten, {len(index.marks())} held")
    return 0


def _export(args: argparse.Namespace) -> int:
    library = Library(args.store)
    with library.open(library.named(args.video)) as store:
        graph = _graph(store, embedder(args) or LexicalEmbedder())
        export_release(store, str(store.made.get("video", args.video)), graph, args.out)
    print(f"{args.out}: written")
    return 0


def _graph(store: Store, embed: LexicalEmbedder) -> Graph:
    """What its episodes have in common: by concepts, or, where it has none, as the release finds it."""
    extracted, concepts = store.pyramid().extracted, store.concepts()
    if concepts:
        return Graph.of_concepts(concepts, extracted)
    schema = ReleaseSchema()
    for number, said in extracted.items():
        schema.add(number, Texts.of(said), embed)
    return Graph.of_schema(schema)


def _import(args: argparse.Namespace) -> int:
    if not Path(args.folder).is_dir():
        raise ValueError(f"a memory of others is a folder; there is no folder {args.folder}")
    library, embed, config = Library(args.store), embedder(args) or LexicalEmbedder(), resolve(args.preset)
    mark = content_digest(args.folder)
    video = video_id(Path(args.folder).resolve().name, mark)
    made = made_of(video, mark, {"imported": str(args.folder)}, embed, config)
    is_new = video not in library.videos()
    try:
        with write_store(library.folder(video), made) as store:
            if store.state == "closed":
                print(f"{video}: is there already")
                return 0
            schema = Schema(config.schema) if config.index == "concepts" else None
            name, _ = import_release(args.folder, store, lambda batch, new: put_nodes(batch, new, schema, embed))
    except (ValueError, OSError):
        if is_new and video in library.videos():
            library.remove(video)
        raise
    print(f"{video}: {told(name, WIDTH)} was read")
    return 0
