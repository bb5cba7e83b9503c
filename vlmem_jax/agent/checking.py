"""Whether the memory of a video is whole, and what can be mended."""

from typing import NamedTuple

from vlmem_jax.agent.nodes import Node
from vlmem_jax.agent.store import LAYERS, Layer, Store
from vlmem_jax.agent.writing import Writer


class Fault(NamedTuple):
    """Something that is wrong with a memory."""

    told: str
    harmless: bool = False
    """Whether nothing refers to it, so that `repair` removes it."""


def verify(store: Store) -> list[Fault]:
    """All that is wrong: with the file, with nodes that refer to what is not there, and with files of frames."""
    if (told := [row[0] for row in store.rows("PRAGMA integrity_check")]) != ["ok"]:
        return [Fault(f"{store.file} is damaged: {line}") for line in told]
    with store.moment():
        try:
            nodes = _nodes(store)
        except ValueError as error:  # what it refers to is not known, so that nothing is stray
            return [Fault(str(error))]
        stray = [f"a vector is of {layer} {number}, which is not there" for layer, number in _stray(store)]
        return _references(nodes) + [Fault(told, harmless=True) for told in stray] + _frames(store, nodes)


def repair(store: Writer) -> list[Fault]:
    """Removes what nothing refers to, and gives what is still wrong. Nothing is removed from a memory that cannot be
    read as a whole."""
    faults = verify(store)
    if not any(fault.harmless for fault in faults):
        return faults
    with store.transaction():
        for layer, number in _stray(store):
            store.rows("DELETE FROM vector WHERE layer = ? AND number = ?", layer, number)
    shown = _shown(_nodes(store))
    for name, path in store.frames.files():
        if name not in shown:
            path.unlink()
    return verify(store)


def _nodes(store: Store) -> dict[Layer, list[Node]]:
    return {layer: store.nodes(layer, kind) for layer, kind in LAYERS.items()}


def _references(nodes: dict[Layer, list[Node]]) -> list[Fault]:
    numbers = {layer: {node.number for node in nodes[layer]} for layer in nodes}
    kinds: list[tuple[Layer, Layer, str]] = [("episode", "segment", "segments"), ("concept", "episode", "episodes")]
    pairs = [
        (f"{layer} {node.number}", other, number)
        for layer, other, key in kinds
        for node in nodes[layer]
        for number in getattr(node, key)
    ]
    pairs += [(f"extracted {node.number}", "episode", node.number) for node in nodes["extracted"]]
    return [
        Fault(f"{who} refers to {other} {number}, which is not there")
        for who, other, number in pairs
        if number not in numbers[other]
    ]


def _stray(store: Store) -> list[tuple]:
    """Layer and number of vectors without a node."""
    return store.rows(
        "SELECT DISTINCT layer, number FROM vector WHERE (layer, number) NOT IN (SELECT layer, number FROM node)"
    )


def _shown(nodes: dict[Layer, list[Node]]) -> dict[str, str]:
    """Names of frames that nodes show, with one that does."""
    return {
        frame.name: f"{layer} {node.number}"
        for layer in nodes
        for node in nodes[layer]
        for frame in getattr(node, "frames", ())
    }


def _frames(store: Store, nodes: dict[Layer, list[Node]]) -> list[Fault]:
    shown, files, faults = _shown(nodes), list(store.frames.files()), []
    there = {name for name, _ in files}
    for name, who in sorted(shown.items()):
        if name not in there:
            faults.append(Fault(f"frame {name} of {who} is not there"))
        elif not store.frames.is_whole(name):
            faults.append(Fault(f"frame {name} of {who} is damaged"))
    return faults + [Fault(f"{path} belongs to nothing", harmless=True) for name, path in files if name not in shown]
