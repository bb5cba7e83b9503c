"""What is kept of streams: several side by side, with geometry, and of which models."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from tests.stream import world
from vlmem_jax.geometry.live import Known
from vlmem_jax.stream import Asker, Question, Watcher
from vlmem_jax.stream import run as running
from vlmem_jax.stream.questions import END
from vlmem_jax.types import Geometry

NEVER = threading.Event()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return world.model(tmp_path_factory.mktemp("model"))


def test_a_row_of_several_streams_is_that_stream_alone(model):
    frames = [[model.processor.frame(picture) for picture in world.photos(6, seed)] for seed in range(2)]
    both, alone = Watcher(model, rows=2), [Watcher(model), Watcher(model)]
    for n in range(6):
        tiles = [frames[0][n], None if n == 2 else frames[1][n]]  # the second has nothing to show at one time
        both.look(tiles, [float(n)] * 2, [False, n == 4])  # and begins anew at another
    for n in range(6):
        alone[0].look([frames[0][n]], [float(n)])
        if n >= 4:
            alone[1].look([frames[1][n]], [float(n)])
    for row, watcher in enumerate(alone):
        found, wanted = both.snapshot(row), watcher.snapshot()
        assert (found.times, found.frames) == (wanted.times, wanted.frames)
        real = np.asarray(wanted.visual.segments_BM) > 0
        np.testing.assert_array_equal(found.visual.segments_BM, real)
        np.testing.assert_allclose(found.visual.tokens_BMD[real], wanted.visual.tokens_BMD[real], atol=2e-5)


class InPairs:
    """Geometry that is there for two frames at a time."""

    def __init__(self, vlm):
        memory, N = vlm.config.memory, vlm.config.vision.grid**2
        self.shapes = [(N, memory.geometry_width), (N, memory.view_width), (N, 3)]
        self.rng, self.waiting, self.count = np.random.default_rng(0), [], 0

    def push(self, tile):
        assert tile.shape == (44, 44, 3)
        self.waiting.append(self.count)
        self.count += 1
        return self.rest() if len(self.waiting) == 2 else []

    def rest(self):
        ready = [
            Known(n, Geometry(*(self.rng.normal(size=shape).astype(np.float32) for shape in self.shapes)), None)
            for n in self.waiting
        ]
        self.waiting = []
        return ready


@pytest.fixture(scope="module")
def spatial(tmp_path_factory):
    """A model whose memory reads geometry."""
    memory = world.KEYS["memory"] | {"geometry_width": 12, "view_width": 6}
    return world.model(tmp_path_factory.mktemp("spatial"), memory=memory)


def test_frames_wait_until_their_geometry_is_there(spatial):
    asker = Asker(Watcher(spatial), world.GREEDY)
    with pytest.raises(ValueError, match="model.memory.geometry_width=0"):
        world.stream(asker, "", source=world.Frames(world.photos(5)))
    geometry = InPairs(spatial.vlm)
    questions = [Question("early", 0.2), Question("What?", END)]
    stream, _, _ = world.stream(asker, "", questions, source=world.Frames(world.photos(5)), geometry=geometry)
    frames = []
    asker.answer = lambda text, snapshot, length: frames.append(snapshot.frames) or []
    stream.run(NEVER)
    assert frames == [2, 5] and stream.looked == geometry.count == 5
    other, again = Watcher(spatial), InPairs(spatial.vlm)
    tiles = [spatial.processor.frame(picture) for picture in world.photos(5)]
    for n, tile in enumerate(tiles):
        for number, one, _ in again.push(tile) + (again.rest() if n == 4 else []):
            other.look([tiles[number]], [number / 10], geometry=[one])
    jax.tree.map(np.testing.assert_array_equal, asker.watcher._watched, other._watched)


def test_a_frame_with_numbers_that_are_not_finite_is_not_kept(spatial):
    geometry = InPairs(spatial.vlm)
    rest = geometry.rest

    def broken():
        return [
            known._replace(geometry=dataclasses.replace(known.geometry, coords_BN3=known.geometry.coords_BN3 * np.nan))
            if known.number == 1
            else known
            for known in rest()
        ]

    geometry.rest = broken
    asker = Asker(Watcher(spatial), world.GREEDY)
    stream, _, said = world.stream(asker, "", source=world.Frames(world.photos(3)), geometry=geometry)
    stream.run(NEVER)
    assert said == ["0.10 s: the frame has features that are not finite; it is not kept"]
    snapshot = asker.watcher.snapshot()
    assert snapshot.times == (0.0, 0.2) and np.isfinite(snapshot.visual.tokens_BMD).all()


def test_geometry_that_no_memory_reads_is_refused(model):
    with pytest.raises(ValueError, match="reads no geometry"):
        running.check_geometry(model.vlm, True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"memory": None}, "needs a memory that keeps them; model.memory is none"),
        ({"memory": world.KEYS["memory"] | {"episodic": 0}}, "keeps no frame to answer from"),
    ],
)
def test_models_that_remember_nothing_of_a_stream_are_refused(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        Watcher(world.model(tmp_path, **keys))


def test_a_context_that_leaves_tokens_out_is_refused(model, monkeypatch):
    image = dataclasses.replace(model.processor.image, context="stride:2")
    monkeypatch.setattr(model.processor, "image", image)
    with pytest.raises(ValueError, match="image.context is 'stride:2'; give --context all"):
        Asker(Watcher(model), world.GREEDY)
