"""What hosts tell each other before a run: bytes, over the devices. Of a single host nothing is sent."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

BLOCK = 1 << 16
"""Messages are padded to a multiple of it, bytes: each length is a program to compile."""
NAMED = 5
"""Differences that an error lists."""


def broadcast(content: bytes) -> bytes:
    """Host 0's bytes, on every host."""
    if jax.process_count() == 1:
        return content
    with jax.transfer_guard("allow"):  # jax takes it for an implicit transfer
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
        padded = _padded(b"" if jax.process_index() else content, length)
        return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:length].tobytes()


def gather(content: bytes) -> list[bytes]:
    """The bytes of every host, on every host."""
    if jax.process_count() == 1:
        return [content]
    with jax.transfer_guard("allow"):
        lengths = multihost_utils.process_allgather(np.int32(len(content)))
        everything = multihost_utils.process_allgather(_padded(content, int(lengths.max())))
        return [part[:length].tobytes() for part, length in zip(everything, lengths.tolist(), strict=True)]


def meet(where: str) -> None:
    """Waits until every host has come here."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(where)


def require_same(rule: str, facts: Mapping[str, Any]) -> None:
    """Raises ValueError on every host if `facts`, ready for JSON, are not the same on all.

    It starts with `rule`, such as "hosts must run the same config", and names the hosts and facts that differ. Only a
    hash is sent where all is well.
    """
    content = json.dumps(facts, sort_keys=True).encode()
    if len(set(gather(hashlib.sha256(content).digest()))) == 1:
        return
    first, *others = [json.loads(part) for part in gather(content)]
    lines = [
        f"  {name}: {_show(its, name)} on host {host}, {_show(first, name)} on host 0"
        for host, its in enumerate(others, 1)
        for name in sorted(first.keys() | its.keys())
        if its.get(name) != first.get(name)
    ]
    more = [f"  and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
    raise ValueError("\n".join([f"{rule}, but these differ:", *lines[:NAMED], *more]))


def on_first(action: Callable[[], None]) -> None:
    """Calls `action` on host 0 while the others wait. All raise its ValueError or OSError, the others as ValueError."""
    problem = None
    if jax.process_index() == 0:
        try:
            action()
        except (ValueError, OSError) as error:
            problem = error
    text = broadcast(str(problem or "").encode()).decode()
    if problem is not None:
        raise problem
    if text:
        raise ValueError(f"host 0: {text}")


def _show(facts: Mapping[str, Any], name: str) -> str:
    text = json.dumps(facts[name]) if name in facts else "nothing"
    return text if len(text) <= 80 else text[:77] + "..."


def _padded(content: bytes, length: int) -> np.ndarray:
    buffer = np.zeros(-(-max(length, 1) // BLOCK) * BLOCK, np.uint8)
    buffer[: len(content)] = np.frombuffer(content, np.uint8)
    return buffer
