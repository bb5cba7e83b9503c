"""What hosts tell each other before a run: bytes, over the devices. Of a single host nothing is sent."""

import jax
import numpy as np
from jax.experimental import multihost_utils

BLOCK = 1 << 16
"""Messages are padded to a multiple of it, bytes: each length is a program to compile."""


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


def _padded(content: bytes, length: int) -> np.ndarray:
    buffer = np.zeros(-(-max(length, 1) // BLOCK) * BLOCK, np.uint8)
    buffer[: len(content)] = np.frombuffer(content, np.uint8)
    return buffer
