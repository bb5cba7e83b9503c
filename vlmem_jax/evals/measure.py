"""What answering costs, and by which version of this program it was done."""

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax

import vlmem_jax


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """A list that grows with each program that is compiled: its seconds."""
    found: list[float] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def peak_memory() -> float:
    """Most bytes in use so far on the fullest device; in the process where devices do not say, as on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(float(of["peak_bytes_in_use"]) for of in stats)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def version() -> str:
    """The version, and where it runs from a checkout of its repository, the commit: `0.1.0 (90b9700, changed)`."""
    root = Path(vlmem_jax.__file__).parent.parent
    commit = ""
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=, changed"]
        with contextlib.suppress(OSError):
            commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return f"{vlmem_jax.__version__} ({commit})" if commit else vlmem_jax.__version__
