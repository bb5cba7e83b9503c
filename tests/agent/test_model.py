"""A tiny model builds a memory of pictures and answers from it, through the engine."""

import numpy as np
import pytest
from PIL import Image

from tests import drawn, patches_world
from tests.agent.scripted import embed, rerank
from vlmem_jax.agent.building import BuildConfig, build
from vlmem_jax.agent.calls import Call, run, run_all
from vlmem_jax.agent.manager import ManageConfig
from vlmem_jax.agent.model import EngineModel
from vlmem_jax.agent.nodes import Frame, Segment
from vlmem_jax.agent.retrieve import Memory, RetrieveConfig, answer
from vlmem_jax.agent.schema import SchemaConfig
from vlmem_jax.agent.segments import Span
from vlmem_jax.config import build as configured
from vlmem_jax.evals.measure import compilations
from vlmem_jax.families import resolve
from vlmem_jax.generate import Engine, Generator, never_sampled
from vlmem_jax.models import VLM
from vlmem_jax.processing import PatchConfig, Tokenizer, make_processor
from vlmem_jax.runtime.shapes import PoolShape

SHAPE = PoolShape(slots=2, capacity=1536, chunk=1536, tiles=32, smallest=1536, features=64)
BUILD = BuildConfig(ManageConfig(images=4, reserved=2), fps=0.5, schema_fps=0.5, images=4)
RETRIEVE = RetrieveConfig(images=4, looked=2)
WHOLE = Span(0.0, 16.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    vlm = VLM(resolve({"preset": "tiny_qwen2_5_vl", "decoder": {"layers": 2}, "vision": {"layers": 2}}))
    tokenizer = Tokenizer.load(patches_world.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    image = configured(PatchConfig, dict(min_pixels=64, max_pixels=256))
    processor = make_processor(tokenizer, image, vlm.config.vision.geometry, "", "qwen2-vl")
    banned_ids = *never_sampled(processor, vlm), *processor.stop_ids
    engine = Engine(Generator(vlm, drawn.params(vlm), stop_ids=[], banned_ids=banned_ids), SHAPE)
    return EngineModel(engine, processor, picture)


def picture(frame):
    """A picture that is that of the second in which the frame is."""
    pixels = np.random.default_rng(int(frame.time)).integers(0, 256, (16, 16, 3), np.uint8)
    return Image.fromarray(pixels)


def frames_of(span, fps):
    return tuple(Frame(f"{time:g}", float(time)) for time in np.arange(span.start, span.end, 1 / fps))


def short(work):
    """The same, whose texts are a few tokens long, which is enough for a model that knows nothing."""
    replies = None
    while True:
        try:
            calls = work.send(replies)
        except StopIteration as end:
            return end.value
        replies = yield [call._replace(max_tokens=min(call.max_tokens, 4)) for call in calls]


def segments(first, last):
    return [Segment(n, 2.0 * n, 2.0 * (n + 1), frames=frames_of(Span(2.0 * n, 2.0 * (n + 1)), 1.0))
            for n in range(first, last)]  # fmt: skip


@pytest.fixture(scope="module")
def pyramid(model):
    return run(short(build(segments(0, 4), BUILD)), model)


def test_a_memory_is_built_and_asked(model, pyramid):
    assert [len(one.caption) > 0 for one in pyramid.segments] == [True] * 4 and pyramid.episodes
    assert {n for one in pyramid.episodes for n in one.segments} <= set(range(4))
    memory = Memory.of(pyramid, frames_of, WHOLE, embed, SchemaConfig())
    found = run(answer(memory, "which room?", ["red", "blue"], embed, rerank, RETRIEVE), model)
    assert found.label in "AB" and sum(found.belief.probabilities.values()) == pytest.approx(1)
    assert found.belief.mass == pytest.approx(1), "labels are scored among themselves"


def test_each_frame_is_seen_once(model, pyramid):
    features = model._engine.features
    before = features.seen, model.calls
    assert run(short(build(segments(0, 4), BUILD)), model) == pyramid
    assert features.seen == before[0] and model.calls > before[1] and features.found > 0


def test_nothing_compiles_for_another_video(model, pyramid):
    with compilations() as compiled:
        run_all([short(build(segments(*span), BUILD)) for span in [(4, 6), (5, 8)]], model)
    assert compiled == []


def test_labels_are_scored_together_as_alone(model):
    calls = [Call("relevant", (Frame(f"{n}", float(n)), "here?" * (n + 1)), ("yes", "no")) for n in range(3)]
    together = model.answer([*calls, Call("decide", ("now?",), ("ADD_NEW", "MERGE", "DISCARD"))])
    alone = [model.answer([call])[0] for call in calls]
    for one, other in zip(together, alone, strict=False):
        assert [label for label, _ in one.tokens] == ["yes", "no"]
        np.testing.assert_allclose([p for _, p in one.tokens], [p for _, p in other.tokens], atol=1e-5)
    assert np.exp([p for _, p in together[3].tokens]).sum() == pytest.approx(1, abs=1e-6)


def test_labels_that_begin_alike_are_refused(model):
    with pytest.raises(ValueError, match="labels must differ in their first token, but .* no, never"):
        model.answer([Call("relevant", ("?",), ("no", "never"))])
