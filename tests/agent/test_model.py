"""Tiny models of two families build memories of pictures and answer from them, through the engine."""

import math
import string
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests import drawn, patches_world
from tests.agent.scripted import embed, rerank
from vlmem_jax.agent.building import BuildConfig, build
from vlmem_jax.agent.calls import Call, run, run_all
from vlmem_jax.agent.gates import strict
from vlmem_jax.agent.manager import ManageConfig
from vlmem_jax.agent.model import EngineModel, ShowConfig, spellings
from vlmem_jax.agent.nodes import Frame, Segment
from vlmem_jax.agent.retrieve import Memory, RetrieveConfig, answer
from vlmem_jax.agent.schema import SchemaConfig
from vlmem_jax.agent.segments import Span
from vlmem_jax.config import build as configured
from vlmem_jax.evals.measure import compilations
from vlmem_jax.families import resolve
from vlmem_jax.generate import Engine, Generator, never_sampled
from vlmem_jax.models import VLM
from vlmem_jax.processing import PatchConfig, StepConfig, Tokenizer, make_processor
from vlmem_jax.runtime.shapes import PoolShape

SHAPE = PoolShape(slots=2, capacity=1536, chunk=1536, tiles=64, smallest=1536, features=256)
BUILD = BuildConfig(ManageConfig(images=4, reserved=2), fps=0.5, schema_fps=0.5, images=4)
RETRIEVE = RetrieveConfig(images=4, looked=2)
SHOW = ShowConfig(tokens=4, answer_tokens=16)
WHOLE = Span(0.0, 16.0)
FAMILIES = {
    "tiny_qwen2_5_vl": (PatchConfig, "qwen2-vl", {}),
    "tiny_qwen3_vl": (StepConfig, "qwen-vl-steps", {"deep_layers": (0, 1)}),
}
"""How each is shown images, and what else makes it small."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    config, template, small = FAMILIES[request.param]
    vlm = VLM(resolve({"preset": request.param, "decoder": {"layers": 2}, "vision": {"layers": 2, **small}}))
    tokenizer = Tokenizer.load(patches_world.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    image = configured(config, dict(min_pixels=64, max_pixels=4096))
    processor = make_processor(tokenizer, image, vlm.config.vision.geometry, "", template)
    banned_ids = *never_sampled(processor, vlm), *processor.stop_ids
    engine = Engine(Generator(vlm, drawn.params(vlm), stop_ids=[], banned_ids=banned_ids), SHAPE)
    return EngineModel(engine, processor, picture, SHOW)


def picture(frame):
    """A picture that is that of the second in which the frame is; 16 visual tokens if nobody limits them."""
    pixels = np.random.default_rng(int(frame.time)).integers(0, 256, (32, 32, 3), np.uint8)
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
    assert 0 < found.belief.mass < 0.5, "a model that knows nothing says something else"


def test_each_frame_is_seen_once(model, pyramid):
    features = model._engine.features
    before = features.seen, model.calls
    assert run(short(build(segments(0, 4), BUILD)), model) == pyramid
    assert features.seen == before[0] and model.calls > before[1] and features.found > 0


def test_nothing_compiles_for_other_videos(model, pyramid):
    """Of other sizes, and so long that calls have to be shortened."""
    long = [Segment(0, 0.0, 40.0, frames=frames_of(Span(0.0, 40.0), 1.0))]
    videos = [segments(4, 6), segments(5, 8), long]
    with compilations() as compiled:
        run_all([short(build(one, replace(BUILD, images=0))) for one in videos], model)
        memory = Memory.of(pyramid, frames_of, WHOLE, embed, SchemaConfig())
        run(answer(memory, "which room?" * 9, ["red", "blue", "green"], embed, rerank, RETRIEVE), model)
    assert compiled == []


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_scored_together_as_alone(model):
    calls = [Call("relevant", (Frame(f"{n}", float(n)), "here?" * (n + 1)), ("yes", "no")) for n in range(3)]
    together = model.answer([*calls, Call("decide", ("now?",), ("ADD_NEW", "MERGE", "DISCARD"))])
    alone = [model.answer([call])[0] for call in calls]
    for one, other in zip(together, alone, strict=False):
        assert [label for label, _ in one.tokens] == ["yes", "no"], "their first letters are tokens of this tokenizer"
        np.testing.assert_allclose([p for _, p in one.tokens], [p for _, p in other.tokens], atol=1e-5)


def test_labels_have_the_probabilities_of_what_is_written(model):
    """All letters and signs together are all there is; and what is likeliest is what is written."""
    call = Call("answer", ("which letter?",), tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    [reply] = model.answer([call])
    tokens = dict(reply.tokens)
    assert tokens.keys() == set(string.ascii_letters), "small letters are told, too; who reads them decides"
    mass = strict(reply.tokens, call.labels).mass
    assert 0 < mass < sum(map(math.exp, tokens.values())) < 1
    sample = model._fitted(call)[1]
    vocab = model._engine.vlm.config.decoder.vocab
    allowed = sorted(set(range(vocab)) - set(model._engine.generator.banned_ids))
    logp_V = dict(zip(allowed, model._engine.score([sample], allowed)[0].tolist(), strict=True))
    ids = {text: model._processor.tokenizer.id(text) for text in tokens}
    np.testing.assert_allclose(list(tokens.values()), [logp_V[ids[text]] for text in tokens], atol=1e-5)
    [written] = model.answer([call._replace(labels=())])
    assert written.text == model._processor.tokenizer.decode([max(logp_V, key=logp_V.get)])


def test_a_label_is_any_token_that_says_it():
    words = ["A", " A", "(a", "B", "AB", " a.", "", "\ufffdA", "1", "_"]

    class Words:
        def decode(self, ids):
            return "".join(words[n] for n in ids)

    found = spellings(Words(), [n for n in range(len(words)) if n != 1])
    assert found == {"a": [(0, "A"), (2, "(a"), (5, " a.")], "b": [(3, "B")], "ab": [(4, "AB")], "1": [(8, "1")]}


def test_labels_that_begin_alike_are_refused(model):
    with pytest.raises(ValueError, match="labels must differ in their first token, but .* no, never"):
        model.answer([Call("relevant", ("?",), ("no", "never"))])


# --- room -------------------------------------------------------------------------------------------------------------


def test_frames_are_looked_at_closely_where_a_question_is_answered(model):
    frames = frames_of(Span(0.0, 2.0), 1.0)
    tiles = {kind: model.answer([Call(kind, (*frames, "?"), ("yes", "no"))])[0].cost.tiles
             for kind in ("caption", "decide", "answer", "sufficient")}  # fmt: skip
    assert tiles == {"caption": 8, "decide": 8, "answer": 32, "sufficient": 32}


def test_a_call_that_is_too_long_is_shortened(model):
    """Frames go first, evenly of each run of them, then the ends of notes; what is asked stays."""
    frames = frames_of(Span(0.0, 60.0), 1.0)
    asked = "\nWhat becomes of it? Answer by yes or no."
    notes = "".join(f"> {'a long note ' * 50}{n}\n" for n in range(4))
    parts = "Before:\n", *frames[:48], "Now:\n", *frames[48:], notes + asked
    call, sample = model._fitted(Call("decide", parts, ("yes", "no")))
    assert len(sample.tokens_T) <= SHAPE.capacity and len(sample.pixels_ISSc) <= SHAPE.tiles
    assert len(call.frames) == 2 and call.text.endswith(asked)
    kept = [line for line in call.text.splitlines() if line.startswith("> ")]
    assert len(kept) == 4 and max(map(len, kept)) - min(map(len, kept)) <= 1 and len(kept[0]) > 100
    call, _ = model._fitted(Call("decide", (*parts[:-1], asked), ("yes", "no")))
    first, last = ([frame for frame in call.frames if (frame.time < 48) is early] for early in (True, False))
    assert len(first) > 2 * len(last) >= 4 and first[0] == frames[0] and last[-1] == frames[-1]
    [reply] = model.answer([Call("decide", parts, ("yes", "no"))])
    assert reply.tokens and reply.cost.frames == 2


def test_what_is_asked_is_never_cut(model):
    with pytest.raises(ValueError, match="room for"):
        model.answer([Call("relevant", ("why? " * SHAPE.capacity,), ("yes", "no"))])


def test_what_calls_took_is_told(model):
    fresh = tuple(Frame(f"{time}", 1000.0 + time) for time in range(4))
    calls = [
        Call("caption", (*fresh[:3], "what?"), max_tokens=5),
        Call("decide", (*fresh[2:], "and now?"), ("yes", "no")),
    ]
    first, second = ([reply.cost for reply in model.answer(calls)] for _ in range(2))
    assert [cost[:4] for cost in first] == [cost[:4] for cost in second]
    assert [cost.frames for cost in first] == [3, 2] and [cost.tiles for cost in first] == [12, 8]
    assert [cost.new_tokens for cost in first] == [5, 0] and first[0].prompt_tokens > 12 + len("what?")
    assert sum(cost.seen for cost in first) == pytest.approx(16), "four frames of four tiles, one of them shown twice"
    assert sum(cost.seen for cost in second) == 0 and min(cost.seconds for cost in first + second) > 0


@pytest.mark.parametrize("name", ["tokens", "answer_tokens"])
def test_limits_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        ShowConfig(**{name: -1})
