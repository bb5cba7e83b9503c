"""Builds memories of videos, hours long, and answers from them (MM-Mem, arXiv 2603.01455). Each action has its own
--help.

A memory is a folder in that of --store: segments of some seconds, episodes of several, and what these are about. A
video is named there by its file and what it holds; as much of the name as tells it from others is enough.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vlmem_jax.agent.checking import repair, verify
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.nodes import Episode, Grounding, Segment
from vlmem_jax.agent.store import LAYERS, Store
from vlmem_jax.agent.writing import write_store
from vlmem_jax.cli import memory_ask, memory_build, memory_share, memory_watch
from vlmem_jax.cli.flags import add_config
from vlmem_jax.cli.memory_page import write_page
from vlmem_jax.cli.memory_show import aligned, clock, size, told
from vlmem_jax.config import ConfigError

EXAMPLE = """vlmem memory build --video my/*.mp4 --store runs/memories --checkpoint RUN
  vlmem memory ask "Where are the keys?" --store runs/memories --trace"""
WIDTH = 100
"""Characters of a caption in a list."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem memory`."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    memory_build.add_arguments(_action(actions, "build", memory_build.run, memory_build.__doc__, memory_build.EXAMPLE))
    memory_ask.add_arguments(_action(actions, "ask", memory_ask.run, memory_ask.__doc__, memory_ask.EXAMPLE))
    memory_watch.add_arguments(_action(actions, "watch", memory_watch.run, memory_watch.__doc__, memory_watch.EXAMPLE))
    _action(actions, "list", _list, "Lists all memories.", "vlmem memory list --store runs/memories")
    looking = _action(
        actions,
        "inspect",
        _inspect,
        "Shows what a memory holds, and what it has cost.",
        "vlmem memory inspect a.mp4 --store runs/memories --show episodes",
    )
    _add_video(looking)
    looking.add_argument(
        "--show",
        choices=("all", "made", "segments", "episodes", "concepts", "cost"),
        default="all",
        help="a part alone (default: %(default)s)",
    )
    looking.add_argument("--html", metavar="FILE", help="write all of it as a page that needs no other file")
    looking.add_argument("--json", action="store_true", help="as JSON, captions as they are")
    checking = _action(
        actions,
        "verify",
        _verify,
        "Checks that memories are whole: files, nodes, vectors, frames. Exits with 1 if one is not.",
        "vlmem memory verify --store runs/memories --repair",
    )
    _add_video(checking, nargs="*", more="; default: all")
    checking.add_argument("--repair", action="store_true", help="remove what nothing refers to")
    removing = _action(
        actions, "rm", _remove, "Removes memories and their frames.", "vlmem memory rm a.mp4 --store runs/memories"
    )
    _add_video(removing, nargs="+")
    memory_share.add_actions(actions, _action)
    add_config(parser, optional=True)


def run(args: argparse.Namespace) -> int:
    """0 when done; 1 where a video could not be remembered, or a memory is not whole."""
    taking = memory_build.run, memory_watch.run, memory_ask.run
    if args.action not in taking and (args.experiment is not None or args.overrides):
        raise ConfigError("only `vlmem memory build`, `watch` and `ask` take keys of a config; drop --config")
    return args.action(args)


def _action(
    actions: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=text.splitlines()[0],
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--store", required=True, metavar="PATH", help="the folder of memories")
    parser.set_defaults(action=run)
    return parser


def _add_video(parser: argparse.ArgumentParser, nargs: str | None = None, more: str = "") -> None:
    parser.add_argument("video", metavar="VIDEO", nargs=nargs, help=f"the beginning of its name in the store{more}")


def _list(args: argparse.Namespace) -> int:
    library, rows = Library(args.store), []
    for entry in library.entries():
        if entry.fault:
            rows.append([entry.video, "damaged", entry.fault])
            continue
        with library.open(entry.video) as store:
            length = store.rows("SELECT max(end) FROM node WHERE layer = 'segment'")[0][0] or 0.0
        counts = [f"{entry.counts[layer]} {layer}s" for layer in ("segment", "episode", "concept")]
        rows.append([entry.video, entry.state, clock(length), *counts, size(store.folder)])
    print("\n".join(aligned(rows)) if rows else f"there are no memories in {args.store}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    library = Library(args.store)
    video = library.named(args.video)
    if args.html:
        with library.open(video) as store:
            write_page(store, video, args.html)
        print(f"{args.html}: written")
        return 0
    with library.open(video) as store, store.moment():
        found = {name: part(store) for name, part in _PARTS.items() if args.show in ("all", name)}
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return 0
    for name, part in found.items():
        if args.show == "all":
            print(f"{name}:")
        print("\n".join(aligned(_rows(name, part))))
    return 0


def _made(store: Store) -> dict[str, Any]:
    return {**store.made, "state": store.state}


def _segments(store: Store) -> list[dict[str, Any]]:
    return [{**vars(one), "frames": len(one.frames)} for one in store.nodes("segment", Segment)]


def _episodes(store: Store) -> list[dict[str, Any]]:
    return [{**vars(one), "frames": len(one.frames)} for one in store.nodes("episode", Episode)]


def _concepts(store: Store) -> list[dict[str, Any]]:
    return [dict(vars(one)) for one in store.nodes("concept", Grounding)]


def _cost(store: Store) -> dict[str, Any]:
    spent, counts = store.spent(), store.counts()
    return {
        "calls": {kind: {**one._asdict(), **spent[kind]._asdict()} for kind, one in store.cost().items()},
        "nodes": {layer: counts[layer] for layer in LAYERS},
        "bytes": {
            "frames": sum(path.stat().st_size for _, path in store.frames.files()),
            "memory.sqlite": store.file.stat().st_size,
        },
    }


_PARTS: dict[str, Callable[[Store], Any]] = {
    "made": _made,
    "segments": _segments,
    "episodes": _episodes,
    "concepts": _concepts,
    "cost": _cost,
}


def _rows(name: str, part: Any) -> Iterable[Sequence[str]]:
    """A part as a table."""
    if name == "made":
        return [[key, str(value)] for key, value in part.items()]
    if name == "cost":
        calls = [_cost_row(kind, one) for kind, one in part["calls"].items()]
        nodes = [[f"{layer} nodes", f"{count:,}"] for layer, count in part["nodes"].items()]
        return calls + nodes + [[key, f"{count:,} bytes"] for key, count in part["bytes"].items()]
    if name == "concepts":
        return [
            [str(one["number"]), one["kind"], told(one["name"], 40), f"episodes {_numbers(one['episodes'])}",
             told("; ".join(one["glosses"]), WIDTH)]
            for one in part
        ]  # fmt: skip
    return [
        [str(one["number"]), f"{clock(one['start'])}-{clock(one['end'])}", f"{one['frames']} frames",
         *([f"segments {_numbers(one['segments'])}"] if "segments" in one else []), told(one["caption"], WIDTH)]
        for one in part
    ]  # fmt: skip


def _cost_row(kind: str, one: dict[str, Any]) -> list[str]:
    return [
        f"{kind} calls", f"{one['calls']:,}", f"{one['frames']:,} of {one['images']:,} images",
        f"{one['prompt_tokens']:,} tokens read, {one['new_tokens']:,} written", f"{one['seconds']:.1f} s",
        f"{one['seen']:,.0f} of {one['tiles']:,} tiles seen anew",
    ]  # fmt: skip


def _numbers(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _verify(args: argparse.Namespace) -> int:
    library, found = Library(args.store), 0
    videos = [library.named(video) for video in args.video] or library.videos()
    for video in videos:
        faults = _faults(library, video, args.repair)
        found += len(faults)
        for fault in faults:
            print(f"{video}: {fault}")
    print(f"{len(videos)} memories, {found} faults")
    return 1 if found else 0


def _faults(library: Library, video: str, mend: bool) -> list[str]:
    try:
        if mend:
            with write_store(library.folder(video), {}) as store:
                return [fault.told for fault in repair(store)]
        with library.open(video) as store:
            return [fault.told for fault in verify(store)]
    except (ValueError, OSError) as error:
        return [str(error)]


def _remove(args: argparse.Namespace) -> int:
    library = Library(args.store)
    for video in [library.named(video) for video in args.video]:
        library.remove(video)
        print(f"{video}: removed", file=sys.stderr)
    return 0
