"""Run as a program: converts a folder and prints, in MB, how far its own memory rose at most; mapped files apart."""

import dataclasses
import sys
import threading

import jax

from vlmem_jax.hub import convert
from vlmem_jax.memory import CoMemoConfig


def anonymous_mb() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


class Peak:
    """The highest memory seen while in the block."""

    def __enter__(self):
        self.mb, self._end = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._end.wait(0.004):
            self.mb = max(self.mb, anonymous_mb())

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


BLOCKS = dict(every=4, heads=8, head_dim=128, mlp_width=4096)
"""Memory blocks that a checkpoint gets when it is imported."""


def main(direction: str, source: str, target: str) -> None:
    jax.devices()
    with Peak() as peak:
        if direction == "export":
            convert.export_folder(source, target)
        else:
            found = convert.released(source).model
            blocks = CoMemoConfig(**BLOCKS)
            convert.import_folder(source, target, model=dataclasses.replace(found, memory=blocks))
    print(peak.mb)


if __name__ == "__main__":
    main(*sys.argv[1:])
