"""From a video file to an answer by `vlmem memory`, with a tiny model."""

import io
import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.agent import world
from tests.agent.world import short  # noqa: F401
from tests.stream.world import pictures
from vlmem_jax.agent.calls import Reply
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.memory import Memory
from vlmem_jax.agent.model import EngineModel
from vlmem_jax.agent.shards import FOLDER, Claims, Shard
from vlmem_jax.agent.store import open_store
from vlmem_jax.cli.main import main

README = Path(__file__).parents[2] / "README.md"

pytestmark = pytest.mark.usefixtures("one_device", "short")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return world.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return world.video(tmp_path_factory.mktemp("videos") / "a day.mp4")


def build(store, checkpoint, *videos):
    flags = ["--store", str(store), "--checkpoint", str(checkpoint), "--video", *map(str, videos)]
    return main(["memory", "build", *flags, *world.FLAGS])


def act(action, store, *flags):
    return main(["memory", action, "--store", str(store), *map(str, flags)])


@pytest.fixture(scope="module")
def store(tmp_path_factory, checkpoint, video):
    """A folder with the memory of one video."""
    folder = tmp_path_factory.mktemp("memories")
    assert build(folder, checkpoint, video) == 0
    return folder


def test_from_a_video_to_an_answer(store, video, checkpoint, capsys):
    assert act("list", store) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.split()[:3] == [Library(store).named("a day"), "closed", "00:00:08"] and "4 segments" in line
    assert act("ask", store, "What is it?", "--option", "red", "--option", "blue", "--trace") == 0
    shown = capsys.readouterr()
    first, where, *trace = shown.out.splitlines()
    assert first.removeprefix("the memory does not tell; the likeliest answer: ") in ("A. red", "B. blue")
    assert where.startswith(("  shown at ", "  shown nowhere ")) and "stage L" in where
    assert trace[0].split()[0] == "L3" and "0 00:00:00-00:00:0" in trace[0]
    assert f"with {checkpoint}" in shown.err


@pytest.mark.slow
def test_the_readme(tmp_path, checkpoint, video, monkeypatch, capsys):
    """Its commands, one after the other as they stand there, in a folder with what they name; few frames are shown."""
    section = README.read_text().split("## Remember hours of video")[1].split("\n## ")[0]
    commands = [shlex.split(line)[1:] for line in section.splitlines() if line.startswith("vlmem memory ")]
    assert [words[1] for words in commands[:2]] == ["build", "ask"] and len(commands) >= 7
    for folder in ("my", "checkpoints"):
        (tmp_path / folder).mkdir()
    shutil.copy(video, tmp_path / "my" / "day.mp4")
    world.video(tmp_path / "my" / "talk.mp4", seconds=4, seed=1)
    (tmp_path / "checkpoints" / "qwen").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    for words in commands:
        words, given = (words[:-2], '{"question": "Who speaks?"}') if "<" in words else (words, "")
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        assert main(words + world.FLAGS * (words[1] in ("build", "watch"))) == 0, words
    assert "] Who speaks?" in capsys.readouterr().out
    answer = Memory.open(Library("runs/memories").root / Library("runs/memories").named("day")).ask("Where?", until=6.0)
    assert answer.trace and (tmp_path / "answer.html").exists() and (tmp_path / "day.html").exists()


def test_an_answer_as_json_is_that_of_python(store, capsys):
    assert act("ask", store, "What is it?", "--option", "red", "--option", "blue", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    video = Library(store).named()
    found = Memory.open(store / video).ask("What is it?", ["red", "blue"])
    assert told == {"video": video, **json.loads(json.dumps(found.record()))}


def test_what_comes_later_than_a_question_is_not_used(store, capsys):
    assert act("ask", store, "What is it?", "--option", "red", "--option", "blue", "--at", "00:00:04", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    spans = [span for visit in told["retrieval_trace"] for span in visit["seconds"]]
    assert spans and max(end for _, end in spans) <= 4.0


def test_what_is_built_is_not_built_again(store, video, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(EngineModel, "answer", lambda self, calls: pytest.fail("it was asked"))
    assert build(store, checkpoint, video) == 0
    assert f"{Library(store).named()}: is there already" in " ".join(capsys.readouterr().err.split())


def test_a_build_that_was_stopped_goes_on(tmp_path, store, video, checkpoint, capsys, monkeypatch):
    """Ctrl-C at the third call: what was answered is not asked again, and the memory is that of one go."""
    answer, asked = EngineModel.answer, []

    def stopped(self, calls):
        asked.extend(call.key for call in calls)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(self, calls)

    monkeypatch.setattr(EngineModel, "answer", stopped)
    assert build(tmp_path, checkpoint, video) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert build(tmp_path, checkpoint, video) == 0
    assert ", 2 were there;" in capsys.readouterr().out
    assert len(asked) == len(set(asked)) + 1, "the third call alone was made twice"
    name = Library(store).named()
    with open_store(tmp_path / name) as one, open_store(store / name) as other:
        assert one.pyramid() == other.pyramid() and one.cost() == other.cost()
        assert {**one.made, "checkpoint": ""} == {**other.made, "checkpoint": ""}


def test_videos_are_built_side_by_side_and_a_bad_one_stops_no_other(tmp_path, video, checkpoint, capsys, monkeypatch):
    rounds = []
    monkeypatch.setattr(EngineModel, "answer", lambda self, calls: rounds.append(len(calls)) or replies(calls))
    folder, bad = pictures(tmp_path / "pictures", 4), pictures(tmp_path / "bad", 2)
    for file in bad.iterdir():
        file.write_bytes(b"no picture")
    assert build(tmp_path / "m", checkpoint, video, bad, folder) == 1
    assert max(rounds) == 2, "calls of two videos are answered together"
    assert "bad holds no frame that can be decoded" in " ".join(capsys.readouterr().err.split())
    assert {entry.video.partition("-")[0]: entry.state for entry in Library(tmp_path / "m").entries()} == {
        "a_day.mp4": "closed", "bad": "building", "pictures": "closed"}  # fmt: skip


def replies(calls):
    return [Reply(tokens=[(label, -1.0) for label in call.labels]) if call.labels else Reply("{}") for call in calls]


def test_a_folder_of_videos_is_divided_among_processes(tmp_path, checkpoint, capsys, monkeypatch):
    """Each of two shards builds its own; what a process is at is told, and taken over when that has ended."""
    monkeypatch.setattr(EngineModel, "answer", lambda self, calls: replies(calls))
    videos = [pictures(tmp_path / f"{n}", 2, seed=n) for n in range(4)]
    store, shards = tmp_path / "m", (Shard(0, 2), Shard(1, 2))
    assert build(store, checkpoint, *videos, "--shard", "0/2") == 0
    own = Library(store).videos()
    assert all(shards[0].has(video) for video in own)
    assert build(store, checkpoint, *videos, "--shard", "1/2") == 0
    everything = Library(store).videos()
    assert len(everything) == 4 and all(shards[1].has(video) for video in everything if video not in own)
    Library(store).remove(everything[0])
    with Claims(store / FOLDER) as other:
        assert other.take(everything[0])
        assert build(store, checkpoint, *videos) == 1
        assert f"1 videos are built by other processes, or were: {everything[0]}" in capsys.readouterr().err
    assert build(store, checkpoint, *videos, "--steal") == 0 and Library(store).videos() == everything
    with pytest.raises(SystemExit):
        build(store, checkpoint, *videos, "--shard", "2/2")
    assert "a shard is I/N, I from 0 to N - 1" in capsys.readouterr().err


def test_a_dry_run_says_what_it_takes(tmp_path, checkpoint, video, store, capsys, monkeypatch):
    """Two videos; no parameter is read and nothing written. Frames and calls are those of a build whose model decides
    so."""
    monkeypatch.setattr("vlmem_jax.checkpoint.store.load_params", lambda *_: pytest.fail("parameters were read"))
    assert build(tmp_path / "m", checkpoint, video, pictures(tmp_path / "pictures", 4), "--dry-run") == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert not (tmp_path / "m").exists()
    of_video = dict(lines[1:8])
    assert of_video["length"] == "00:00:08" and of_video["segments"].startswith("4, ")
    assert of_video["calls"] == "11: caption 4, decide 3, narrate 2, extract 2"
    assert of_video["images"].endswith(", 4 seen once"), "each picture is shown for two seconds"
    with open_store(store / Library(store).named()) as built:
        kept = sum(path.stat().st_size for _, path in built.frames.files())
    assert of_video["disk"].endswith(f"of it frames {kept / 1e6:,.1f}")
    chips = {chip: float(hours) for chip, hours in lines[-5:]}
    assert set(chips) == {"v5e", "v5p", "v6e", "H100", "H200"} and 0 < chips["H200"] < chips["v5e"]


def test_subtitles_by_the_name_of_the_video(tmp_path, video, checkpoint, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(EngineModel, "answer", lambda self, calls: asked.extend(calls) or replies(calls))
    (tmp_path / "a day.srt").write_text("1\n00:00:02,500 --> 00:00:03,000\nmind <b>the</b> gap\n")
    assert build(tmp_path / "m", checkpoint, video, "--subtitles", tmp_path) == 0
    assert ["mind the gap" in call.text for call in asked if call.kind == "caption"] == [False, True, False, False]
    assert build(tmp_path / "n", checkpoint, video, "--subtitles", video) == 2
    assert "--subtitles is a folder of SRT files" in capsys.readouterr().err


def test_inspect(store, capsys):
    assert act("inspect", store, "a day") == 0
    text = capsys.readouterr().out
    for part in ("made:", "segments:", "episodes:", "concepts:", "cost:", "caption calls", "config.ingest.longest"):
        assert part in text
    assert act("inspect", store, "a day", "--show", "cost", "--json") == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    caption = cost["calls"]["caption"]
    assert (caption["calls"], caption["images"], caption["frames"]) == (4, 8, 8) and caption["new_tokens"] <= 4 * 8
    assert sum(one["seen"] for one in cost["calls"].values()) < sum(one["tiles"] for one in cost["calls"].values())
    assert all(one["prompt_tokens"] > 0 and one["seconds"] > 0 for one in cost["calls"].values())
    assert cost["bytes"]["frames"] > 0


def test_pages(store, tmp_path, capsys):
    """Of a memory, and of how it answered."""
    assert act("inspect", store, "a day", "--html", tmp_path / "a.html") == 0
    assert act("ask", store, "What is it?", "--option", "red", "--option", "blue", "--html", tmp_path / "b.html") == 0
    pages = [(tmp_path / name).read_text() for name in ("a.html", "b.html")]
    assert ["What is it?" in page for page in pages] == [False, True]
    assert all(page.count("data:image/jpeg") >= 4 for page in pages), "a picture of each segment"


def test_verify_and_repair(store, capsys):
    folder = store / Library(store).named()
    assert act("verify", store) == 0 and capsys.readouterr().out == "1 memories, 0 faults\n"
    (folder / "frames" / "ab").mkdir(exist_ok=True)
    stray = folder / "frames" / "ab" / f"{'ab' * 16}.jpg"
    stray.write_bytes(b"x")
    assert act("verify", store) == 1 and "belongs to nothing" in capsys.readouterr().out
    assert act("verify", store, "--repair") == 0 and not stray.exists()


def test_remove(tmp_path, checkpoint, video, capsys, monkeypatch):
    monkeypatch.setattr(EngineModel, "answer", lambda self, calls: replies(calls))
    assert build(tmp_path, checkpoint, video) == 0
    assert act("rm", tmp_path, "b") == 2 and "there is no memory of this video" in capsys.readouterr().err
    assert act("rm", tmp_path, "a day") == 0 and Library(tmp_path).videos() == []
    assert act("list", tmp_path) == 0 and "there are no memories" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--video", "/nowhere.mp4"], "there is no file, folder or device of this name"),
        (["--config.build.imagse=3"], "did you mean"),
        (["--config.image.max_pixles=3"], "did you mean"),
        (["--together", "0"], "--together must be at least 1"),
        (["--config.ingest.fps=2"], "config.ingest.fps 1.0, not 2.0"),
        (["--embedder", "/nowhere"], "there is no"),
    ],
)
def test_what_is_refused(store, checkpoint, video, capsys, flags, told):
    words = ["build", store, "--checkpoint", checkpoint, "--video", video, *world.FLAGS, *flags]
    assert act(*words) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--video", "b"], "there is no memory of this video"),
        (["--config.build.images=3"], "a question can change keys of"),
        (["--option", "x"] * 27, "a question can have 26 options"),
        (["--checkpoint", "/nowhere"], "/nowhere"),
    ],
)
def test_questions_that_are_refused(store, capsys, flags, told):
    assert act("ask", store, "What?", *flags) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


# --- many memories, and those of others -------------------------------------------------------------------------------


@pytest.fixture
def told(tmp_path, video, checkpoint, monkeypatch):
    """A folder of two memories, in which there are red doors, and a boat in the second segment of the first."""

    def said(call):
        if call.labels:
            return Reply(tokens=[(label, float(label == "ADD_NEW")) for label in call.labels])
        boat = call.kind == "caption" and call.frames[0].time == 2.0
        found = {"entities": [{"entity name": "door", "description": "red"}]}
        return Reply(json.dumps(found) if call.kind == "extract" else "a boat" if boat else "a red door")

    monkeypatch.setattr(EngineModel, "answer", lambda self, calls: [said(call) for call in calls])
    assert build(tmp_path, checkpoint, video, pictures(tmp_path / "pictures", 2)) == 0
    return tmp_path


def test_search(told, capsys):
    capsys.readouterr()
    assert act("search", told, "Is there a boat?", "--top", "2") == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.split(maxsplit=1)[1].startswith(
        f"{Library(told).named('a day')}  segment 1  00:00:02-00:00:04  a boat"
    )
    assert act("search", told, "door", "--layer", "concept", "--video", "pictures") == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.split()[1] == Library(told).named("pictures") and "episodes 0  door; door, red" in line
    assert act("search", told, "zebra") == 0 and capsys.readouterr().out == "nothing was found\n"


def test_an_index_holds_what_is_there(told, capsys):
    pytest.importorskip("lancedb")
    capsys.readouterr()
    assert act("index", told) == 0 and "2 memories taken, 0 forgotten, 2 held" in capsys.readouterr().out
    assert act("search", told, "boat", "--index", told / "index", "--layer", "segment", "--top", "1") == 0
    assert "segment 1" in capsys.readouterr().out
    assert act("index", told) == 0 and "0 memories taken" in capsys.readouterr().out


def test_a_memory_goes_out_and_comes_back(told, tmp_path, capsys):
    assert act("export", told, "a day", "--out", tmp_path / "out") == 0
    assert act("import", told / "other", tmp_path / "out") == 0
    assert act("import", told / "other", tmp_path / "out") == 0
    assert "is there already" in capsys.readouterr().out
    here, there = Library(told), Library(told / "other")
    with here.open(here.named("a day")) as one, there.open(there.named()) as other:
        assert other.pyramid()[:2] == one.pyramid()[:2] and other.state == "closed"
        assert [vars(c)["name"] for c in other.concepts()] == ["door"]
        for layer in ("segment", "episode", "concept"):
            assert (other.vectors(layer).x_ND == one.vectors(layer).x_ND).all()
    assert act("export", told, "a day", "--out", tmp_path / "out") == 2
    assert act("ask", told / "other", "What?") == 2
    assert "does not say which model built it; give a checkpoint" in capsys.readouterr().err


def test_what_cannot_be_imported_leaves_nothing(told, tmp_path, capsys):
    assert act("export", told, "a day", "--out", tmp_path / "out") == 0
    with open(tmp_path / "out" / "l2_memory.jsonl", "a") as file:
        file.write("{wrong\n")
    assert act("import", told / "other", tmp_path / "out") == 2
    assert "l2_memory.jsonl:5 is no JSON" in capsys.readouterr().err
    assert Library(told / "other").videos() == []
    assert act("import", told / "other", tmp_path / "nowhere") == 2 and "there is no folder" in capsys.readouterr().err
