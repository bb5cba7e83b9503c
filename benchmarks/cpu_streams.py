"""Ratios on a CPU of streams: what the next frame of a video that goes on costs."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.measure import RUNS, Row, in_turns, packed_batch
from benchmarks.models import make
from vlmem_jax.evals.measure import compilations
from vlmem_jax.models import VLM
from vlmem_jax.trees import State
from vlmem_jax.types import Views


def watching(patches: int, width: int, layers: int) -> tuple[VLM, dict]:
    """A model that keeps frames of so many patches, with banks of as many as the paper's."""
    sizes = dict(layers=layers, width=width, heads=4, mlp_width=4 * width)
    vision = dict(**sizes, image_size=8 * math.isqrt(patches), patch_size=8)
    memory = dict(kind="vlm2", geometry_width=0, working=8, episodic=32, heads=4)
    return make({"preset": "tiny_llava_video", "decoder": {"layers": 1}, "vision": vision, "memory": memory})


def frames_of(vlm: VLM, rows: int) -> Views:
    """A frame of each of so many streams."""
    return jax.device_put(packed_batch(vlm, rows, 2 * vlm.tokens_per_tile, 1).views)


class Streams:
    """Streams of which one frame after the other is taken, by the program `look`."""

    def __init__(self, look: Callable, params: dict, state: State, views: Views):
        self.look, self.params, self.state, self.views = look, params, state, views

    def take(self, count: int) -> State:
        """Takes so many frames more; gives what is kept then."""
        for _ in range(count):
            self.state = self.look(self.params, self.state, self.views)
        return self.state


def streaming(patches=16, width=64, near=100, far=100_000, calls=50, runs=RUNS) -> list[Row]:
    """The next frame of a stream that has gone on for long, against that of a young one."""
    vlm, params = watching(patches, width, layers=1)
    look, views = jax.jit(vlm.look, donate_argnums=1), frames_of(vlm, 1)

    @functools.partial(jax.jit, donate_argnums=1, static_argnums=3)
    def after(params: dict, state: State, views: Views, count: int) -> State:
        """After so many frames, no two of them alike."""

        def step(n: jax.Array, state: State) -> State:
            noise = jax.random.normal(jax.random.key(n), views.pixels_BISSc.shape)
            return vlm.look(params, state, dataclasses.replace(views, pixels_BISSc=noise))

        return jax.lax.fori_loop(0, count, step, state)

    def live() -> int:
        return sum(x.nbytes for x in jax.live_arrays())

    banks = {leaf.shape for leaf in jax.tree.leaves(vlm.watch(params, 1)) if leaf.ndim == 4}
    shapes = [f"[{','.join(map(str, bank))}]" for bank in banks]
    program = look.lower(params, vlm.watch(params, 1), views).compile().as_text()
    copies = sum(" copy(" in line and any(shape in line for shape in shapes) for line in program.splitlines())
    held, streams = [live()], []
    for age in (near, far):
        streams.append(Streams(look, params, after(params, vlm.watch(params, 1), views, age), views))
        jax.block_until_ready(streams[-1].take(2))
        held.append(live())
    young, old = held[1] - held[0], held[2] - held[1]
    turns = [functools.partial(stream.take, calls) for stream in streams]
    with compilations() as seen:
        seconds = in_turns(*turns, runs=runs)
    each, stream = 1e3 * np.median(seconds[:, 1]) / calls, "the next frame of a stream"
    how = f"{patches} patches of width {width}, {each:.3g} ms a frame; {calls} frames a turn"
    return [
        Row(f"{stream}: at frame {far} / at frame {near}", list(seconds[:, 1] / seconds[:, 0]), 1.05, True, "x", how),
        Row(f"{stream}: live bytes at frame {far} that differ from those at {near}", [float(abs(old - young))], 0,
            True, "", f"{old} bytes"),
        Row(f"{stream}: compilations after warm-up", [float(len(seen))], 0, True, "", how),
        Row(f"{stream}: copies of a bank in the compiled step", [float(copies)], 0, True, "", "compiled HLO"),
    ]  # fmt: skip


def several_streams(patches=9, width=512, layers=4, count=4, calls=5, runs=RUNS) -> list[Row]:
    """The next frame of several streams in one call, which reads the weights once."""
    vlm, params = watching(patches, width, layers)
    look = jax.jit(vlm.look, donate_argnums=1)
    together, alone = (Streams(look, params, vlm.watch(params, n), frames_of(vlm, n)) for n in (count, 1))
    calls = [functools.partial(together.take, calls), functools.partial(alone.take, calls * count)]
    for call in calls:
        call()
    seconds = in_turns(*calls, runs=runs)
    what = f"the next frame of {count} streams: in one call / in {count} calls"
    how = f"{patches} patches, {layers} layers of width {width}"
    return [Row(what, list(seconds[:, 0] / seconds[:, 1]), 0.6, True, "x", how)]
