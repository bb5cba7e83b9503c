"""A stream from its source to answers: equal to offline mode, asked at any time, and never ended by one frame."""

import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest

from tests.patches_world import save_video
from tests.stream import world
from vlmem_jax.evals.measure import compilations
from vlmem_jax.generate import Pool, Request
from vlmem_jax.stream import Asker, Log, Question, Watcher, inbox
from vlmem_jax.stream.questions import END

NEVER = threading.Event()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return world.model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def asker(model):
    return Asker(Watcher(model), world.GREEDY)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_line", [True, False])
def test_a_stream_of_few_frames_is_offline_mode(model, monkeypatch, tmp_path, time_line):
    """Whatever was answered before: the input of the decoder, its scores and its answer are the same."""
    processor = model.processor
    monkeypatch.setattr(processor, "image", dataclasses.replace(processor.image, time_line=time_line))
    file = save_video(tmp_path / "a.mp4", frames=world.SLOTS, fps=10)
    asker = Asker(Watcher(model), world.GREEDY)
    stream, shown, said = world.stream(asker, file, [Question("What?", 0.05), Question("And now?", END)])
    stream.run(NEVER)
    assert said == [] and [(seconds, problem) for seconds, _, _, problem in shown] == [(0.1, None), (0.4, None)]
    video, chosen = processor.open_video(file)
    assert chosen == list(range(world.SLOTS))
    offline = processor.prompt("And now?", videos=[video])
    snapshot = asker.watcher.snapshot()
    online = asker.prompt("And now?", snapshot, 0.4)
    for name in ("tokens_T", "positions_T", "visual_index_T"):
        np.testing.assert_array_equal(getattr(online, name), getattr(offline, name))
    pool = Pool(asker.watcher.generator, 1)
    requests = Request(offline, world.GREEDY), Request(online, world.GREEDY, visual=snapshot.visual)
    wanted, found = pool.submit(requests)
    assert found.result() == wanted.result()
    np.testing.assert_allclose(found.logp, wanted.logp, atol=2e-4)
    assert shown[1][2] == processor.tokenizer.decode(wanted.answer) != ""


def test_a_question_is_asked_about_the_frames_up_to_its_time(asker):
    questions = [Question("c", 0.55), Question("a", 0.0), Question("b", 0.3), Question("d", 7.0)]
    stream, shown, said = world.stream(asker, "", questions, source=world.Frames(world.photos(8)))
    seen = []
    answer = asker.answer
    asker.answer = lambda text, snapshot, length: (
        seen.append((text, snapshot.frames, length)) or answer(text, snapshot, length)
    )
    stream.run(NEVER)
    assert seen == [("a", 1, 0.1), ("b", 4, 0.4), ("c", 6, 0.6), ("d", 8, 0.8)]
    assert [problem for *_, problem in shown] == [None] * 4
    assert said == ["the stream ended at 0.80 s; asked then, not at 7 s: 'd'"]


def test_nothing_compiles_after_the_first_question_whatever_the_number_of_frames(asker):
    asker.warm()
    questions = [Question("What?", n / 10) for n in range(3 * world.SLOTS)]
    stream, shown, _ = world.stream(asker, "", questions, source=world.Frames(world.photos(3 * world.SLOTS)))
    with compilations() as programs:
        stream.run(NEVER)
        late = asker.watcher.snapshot()._replace(times=(90_000.0, 90_123.4, 95_000.5, 99_000.0))
        assert "".join(asker.answer("What?", late, 99_000.1))
    assert len(shown) == len(questions) and programs == []


def test_looking_goes_on_while_an_answer_is_written(asker):
    """The answer ends only when the last frame has been looked at, and is about the frames of its time."""
    stream, shown, _ = world.stream(asker, "", [Question("What?", 0.2)], source=world.Frames(world.photos(12)))
    answer, snapshots = asker.answer, []

    def slowly(text, snapshot, length):
        snapshots.append(snapshot)
        for piece in answer(text, snapshot, length):
            end = time.monotonic() + 60
            while stream.looked < 12 and time.monotonic() < end:
                time.sleep(0.01)
            assert stream.looked == 12
            yield piece

    asker.answer = slowly
    stream.run(NEVER)
    assert snapshots[0].times == (0.0, 0.1, 0.2) and asker.watcher.frames_B[0] == 12
    assert shown[0][2] == "".join(answer("What?", snapshots[0], 0.3))


def test_a_question_without_a_new_frame_takes_the_tokens_of_the_one_before(asker):
    questions = [Question("a", 0.15), Question("b", 0.15), Question("c", 0.25)]
    stream, _, _ = world.stream(asker, "", questions, source=world.Frames(world.photos(4)))
    tokens = []
    answer = asker.answer
    asker.answer = lambda text, snapshot, length: tokens.append(snapshot.visual) or answer(text, snapshot, length)
    stream.run(NEVER)
    assert tokens[0] is tokens[1] and tokens[1] is not tokens[2]


def test_before_the_first_frame_there_is_nothing_to_answer_from(asker):
    source = world.Frames(world.photos(2))
    stream, shown, _ = world.stream(asker, "", [Question("Later?", END)], source=source, typing=True)

    def first(n):
        """The question is answered before the first frame is there."""
        if n == 0:
            stream.inbox.ask(Question("What?"))
            end = time.monotonic() + 60
            while stream.answered == 0 and time.monotonic() < end:
                time.sleep(0.01)
            stream.inbox.hang_up()

    source.before = first
    stream.run(NEVER)
    assert shown[0][:3] == (0.0, "What?", "") and "nothing seen yet" in shown[0][3]
    assert shown[1][1] == "Later?" and shown[1][3] is None


def test_a_question_that_is_too_long_is_its_own_error(model, monkeypatch):
    config = model.vlm.config
    short = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, max_positions=300))
    asker = Asker(Watcher(model), world.GREEDY)
    monkeypatch.setattr(asker.watcher, "vlm", dataclasses.replace(model.vlm, config=short))
    questions = [Question("w" * 400, 0.05), Question("What?", 0.15)]
    stream, shown, _ = world.stream(asker, "", questions, source=world.Frames(world.photos(2)))
    stream.run(NEVER)
    assert "must fit into the cache behind 1 frames" in shown[0][3] and "max_positions" in shown[0][3]
    assert shown[1][3] is None


def test_a_live_stream_says_which_questions_it_does_not_ask(asker, monkeypatch):
    """1000 at once: as many as wait are answered, the rest is told by number; a file would wait."""
    questions = [Question(f"{n}?", 0.0) for n in range(1000)]
    stream, shown, said = world.stream(asker, "", questions, source=world.Frames(world.photos(2), live=True))
    stream.run(NEVER)
    unasked = stream.notes.counts["unasked"]
    assert unasked + len(shown) == 1000 and inbox.ASKED <= len(shown) < 100
    assert said[0].startswith("8 questions wait already; not asked: ") and len(said) < 10
    assert said[-1].endswith("(100 such by now)")


# --- frames -----------------------------------------------------------------------------------------------------------


def test_frames_that_fail_are_counted_and_left_out(asker):
    pictures = world.photos(3)
    stream, shown, said = world.stream(
        asker, "", [Question("What?", END)], source=world.Frames([None, pictures[0], None, *pictures[1:]])
    )
    stream.run(NEVER)
    assert stream.looked == 3 and stream.notes.counts == {"failed": 2} and shown[0][3] is None
    assert said[0] == "0.00 s: it is damaged; the frame is left out"
    assert asker.watcher.snapshot().times == (0.1, 0.3, 0.4)


def test_a_stream_of_failures_alone_is_an_error(asker):
    stream, _, _ = world.stream(asker, "", source=world.Frames([None] * 30))
    with pytest.raises(ValueError, match="--video frames has no frame that could be looked at"):
        stream.run(NEVER)
    assert stream.notes.counts["failed"] == 30


def test_a_size_that_changes_is_said_and_looked_at(asker):
    stream, _, said = world.stream(asker, "", source=world.Frames([*world.photos(2), *world.photos(2, size=(10, 30))]))
    stream.run(NEVER)
    assert stream.looked == 4 and said == ["0.20 s: frames were 24x16 pixels large, and are 10x30"]


def test_video_that_hardly_changes_is_said_to_be_sampled_too_densely(asker):
    [one] = world.photos(1)
    stream, _, said = world.stream(asker, "", source=world.Frames([one] * 102))
    stream.run(NEVER)
    assert len(said) == 1 and said[0].startswith("video is sampled too densely for the bank: ")
    other, _, said = world.stream(
        Asker(Watcher(asker.watcher.model), world.GREEDY), "", source=world.Frames(world.photos(102))
    )
    other.rates.add(0.0)
    other.run(NEVER)
    assert said == []


def test_looking_too_slowly_at_a_live_stream_drops_the_oldest_and_at_a_file_nothing(asker, monkeypatch):
    look = asker.watcher.look

    def slowly(*args, **kwargs):
        time.sleep(0.05)
        return look(*args, **kwargs)

    monkeypatch.setattr(asker.watcher, "look", slowly)
    stream, _, said = world.stream(asker, "", source=world.Frames(world.photos(20), live=True))
    stream.run(NEVER)
    dropped = stream.notes.counts["dropped"]
    assert dropped + stream.looked == 20 and dropped > 5 and said[0].startswith("looking is too slow: the frame of")
    assert stream.place.time == 1.9  # the newest is always there
    stream, _, said = world.stream(asker, "", source=world.Frames(world.photos(20)))
    stream.run(NEVER)
    assert stream.looked == 20 and said == []


def test_frames_of_a_live_stream_that_have_waited_too_long_are_left_out(asker, monkeypatch):
    """The first is looked at until three others have waited; the last comes when these are gone."""

    def until(holds):
        end = time.monotonic() + 60
        while not holds() and time.monotonic() < end:
            time.sleep(0.01)

    look, count = asker.watcher.look, itertools.count()

    def slowly(*args, **kwargs):
        if next(count) == 0:
            until(lambda: stream.inbox.waiting[0] == 3)
            time.sleep(0.7)
        return look(*args, **kwargs)

    monkeypatch.setattr(asker.watcher, "look", slowly)
    source = world.Frames(
        world.photos(5), live=True, before=lambda n: until(lambda: n < 4 or stream.notes.counts["late"] == 3)
    )
    stream, _, said = world.stream(asker, "", source=source, max_latency=0.5)
    stream.run(NEVER)
    assert stream.notes.counts["late"] == 3 and "the frame waited for" in said[0]
    assert stream.looked == 2 and stream.place.time == 0.4


def test_every_step_answer_and_event_has_a_line_in_the_log(asker, tmp_path):
    log = Log(tmp_path / "steps.jsonl", print)
    said, source = world.Said(log), world.Frames([*world.photos(2), None])
    stream, shown, _ = world.stream(asker, "", [Question("What?", END)], said, source=source, log=log)
    stream.run(NEVER)
    log.close()
    lines = world.lines(tmp_path / "steps.jsonl")
    steps, [answer], [event] = ([line for line in lines if key in line] for key in ("frame", "answer", "event"))
    assert [(step["frame"], step["time"]) for step in steps] == [(0, 0.0), (1, 0.1)]
    assert steps[0]["similarity"] is None and -1 <= steps[1]["similarity"] <= 1 and steps[1]["ms"] > 0
    assert answer["answer"] == shown[0][2] and answer["frames"] == 2 and event["event"] == "failed"


# --- threads ----------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_stopped_breaks_off_its_answer_and_says_what_it_did_not_ask(asker):
    stopping = threading.Event()
    questions = [Question("a", 0.05), Question("b", 0.05)]
    source = world.Frames(world.photos(3), before=lambda n: n < 2 or stopping.wait(60))
    stream, shown, said = world.stream(asker, "", questions, source=source)

    def endless(*_):
        while True:
            stopping.set()
            yield "x"

    asker.answer = endless
    stream.run(stopping)
    [(_, question, answer, problem)] = shown
    assert question == "a" and set(answer) == {"x"} and problem.startswith("broken off")
    assert said == ["the stream was stopped; not asked: 'b'"]


@pytest.mark.parametrize("part", ["answer", "look", "source"])
def test_a_fault_in_a_thread_ends_the_stream_and_is_raised(asker, monkeypatch, part):
    def fault(*_, **__):
        raise RuntimeError("a fault")

    source = world.Frames(world.photos(3), before=fault if part == "source" else lambda n: None)
    stream, _, _ = world.stream(asker, "", [Question("What?", 0.0)], source=source)
    monkeypatch.setattr(
        *{"answer": (asker, "answer"), "look": (asker.watcher, "look")}.get(part, (asker, "warm")), fault
    )
    with pytest.raises(RuntimeError, match="a fault"):
        stream.run(NEVER)
