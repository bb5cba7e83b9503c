"""How fast videos become segments, and what a model has no part in. Times, of this machine.

    python -m benchmarks.ingest                   # a minute
    python -m benchmarks.ingest --only parts --json rows.json
    python -m benchmarks.ingest --toy             # does everything run? The figures mean nothing

Needs PyAV, the extra `video`. Nothing else should be running.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/ingest.py`

from benchmarks.measure import RUNS, Row, command
from vlmem_jax.agent.building import BuildConfig
from vlmem_jax.agent.calls import Call, Reply, run
from vlmem_jax.agent.frames import FrameFiles
from vlmem_jax.agent.segments import IngestConfig
from vlmem_jax.agent.stream import StreamBuilder
from vlmem_jax.agent.watching import jpeg, keeper, watch
from vlmem_jax.processing.scenes import SceneCuts
from vlmem_jax.stream import Reading, open_source

WIDE = (1280, 720)


class Silent:
    """A model that says nothing at once, and merges everything."""

    def answer(self, calls: list[Call]) -> list[Reply]:
        """A reply to each."""
        return [Reply(tokens=[(label, -1.0 - n) for n, label in enumerate(call.labels)] or None) for call in calls]


def write_video(path: Path, seconds: int, size: tuple[int, int], fps: int = 25) -> Path:
    """H.264 of a few scenes that move, with noise."""
    import av

    rng, (width, height) = np.random.default_rng(0), size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for n in range(seconds * fps):
            if n % (3 * fps) == 0:
                coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8))
                scene_HWc = np.asarray(coarse.resize((width + 16, height + 16), Image.Resampling.BICUBIC), np.int16)
            moved_HWc = scene_HWc[n % 16 : n % 16 + height, 3 * n % 16 : 3 * n % 16 + width]
            noisy_HWc = (moved_HWc + rng.integers(-6, 7, (height, width, 1))).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noisy_HWc, format="rgb24")))
        container.mux(stream.encode())
    return path


def whole(seconds=20, size=WIDE, runs=RUNS) -> list[Row]:
    """A video file decoded, cut into segments, and its frames kept; by the time of all cores together."""
    config, factors = IngestConfig(), []
    with tempfile.TemporaryDirectory() as name:
        video = write_video(Path(name) / "a.mp4", seconds, size)
        for n in range(runs):
            files = FrameFiles(Path(name) / str(n))
            builder = StreamBuilder(keeper(files.write, config), config, BuildConfig())
            reading = Reading()
            start = time.process_time()
            end = run(watch(open_source(str(video), reading), builder, reading.notes), Silent())
            factors.append(end / (time.process_time() - start))
    how = f"{seconds} s of H.264, {size[0]}x{size[1]}, 25 frames a second, 5 of them kept"
    return [Row("seconds of video taken in by one core in a second, without a model", factors, 4, False, "x", how)]


def parts(frames=50, size=WIDE, runs=RUNS) -> list[Row]:
    """What a frame costs, step by step, in CPU time."""
    config = IngestConfig()
    with tempfile.TemporaryDirectory() as name:
        video = write_video(Path(name) / "a.mp4", 1 + frames // 25, size)

        def decoded(is_shown: bool) -> list[np.ndarray]:
            source = iter(open_source(str(video), Reading()))
            shown = [next(source) for _ in range(frames)]
            return [np.asarray(one.picture()) for one in shown] if is_shown else []

        pictures = decoded(True)
        steps: dict[str, Callable[[], object]] = {
            "decoding": lambda: decoded(False),
            "decoding, and its colours": lambda: decoded(True),
            "its score as a cut": lambda: list(map(SceneCuts().push, pictures)),
            "keeping it, if it is kept": lambda: [jpeg(one, config) for one in pictures],
        }
        how = f"{size[0]}x{size[1]}"
        return [Row(f"a frame: {what}", _milliseconds(step, frames, runs), None, True, "ms", how)
                for what, step in steps.items()]  # fmt: skip


def _milliseconds(step: Callable[[], object], frames: int, runs: int) -> list[float]:
    found = []
    for _ in range(runs):
        start = time.process_time()
        step()
        found.append(1e3 * (time.process_time() - start) / frames)
    return found


ITEMS = {"whole": whole, "parts": parts}
TOY = {
    "whole": dict(seconds=1, size=(64, 48), runs=2),
    "parts": dict(frames=3, size=(64, 48), runs=2),
}
"""Sizes at which each item runs in seconds."""


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    command(__doc__, ITEMS, TOY, arguments)


if __name__ == "__main__":
    main()
