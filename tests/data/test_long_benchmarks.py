"""Questions of benchmarks about long videos become lines of prompts."""

import json

import pytest
from PIL import Image

from vlmem_jax.cli.main import main
from vlmem_jax.data.prompts import VideoSource, as_prompt

OPTIONS = ["A. A man.", "B. B flat.", "C. (C)", "D. none"]
MME = {
    "video_id": "001", "videoID": "fFjv93ACGo8", "question_id": "001-1", "question": "What is it?", "options": OPTIONS,
    "answer": "B", "duration": "short", "domain": "Knowledge", "sub_category": "Music", "task_type": "OCR", "url": "x",
}  # fmt: skip
PLOT = {
    "video": "movie.mp4", "question": "Who?", "candidates": ["3", "13", "1"], "answer": "13", "question_type": "plotQA",
    "duration": 480.0,
}  # fmt: skip
SUMMARY = {"video": "a.mp4", "question": "Tell it.", "answer": "It is told.", "question_type": "summary"}
EPIC = {
    "fine_grained_1": {
        "inputs": {
            "video 2": {"id": "P02-20240101-1", "start_time": "00:01:02.500", "end_time": 80},
            "video 1": {"id": "P01-20240101-1"},
            "image 1": {"id": "P01-20240101-1", "time": "01:00:00"},
        },
        "question": "Which?", "choices": ["a", "b", "c", "d", "e"], "correct_idx": 4,
    },
    "fine_grained_2": {
        "inputs": {"video 1": {"id": "P01-20240101-1", "end_time": 7.5}}, "question": "And?", "choices": ["a", "b"],
        "correct_idx": 0,
    },
}  # fmt: skip


@pytest.fixture
def convert(tmp_path):
    """The prompts that the command makes of a file."""

    def run(origin, name, content, *flags):
        (tmp_path / name).write_text(json.dumps(content))
        out = tmp_path / "out.jsonl"
        assert main(["data", "convert", "--from", origin, str(tmp_path / name), "--out", str(out), *flags]) == 0
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        out.unlink()
        return [as_prompt(f"out.jsonl:{n}", line, str(n)) for n, line in enumerate(lines)]

    return run


def test_video_mme(convert):
    """Options have the letters that they are put to a model with, once."""
    [prompt] = convert("videomme", "test.json", [MME])
    assert prompt.text.splitlines() == [
        "What is it?", "A. A man.", "B. B flat.", "C. (C)", "D. none",
        "Answer with the option's letter from the given choices directly.",
    ]  # fmt: skip
    assert prompt.videos == (VideoSource("fFjv93ACGo8.mp4"),) and prompt.choices == ("A man.", "B flat.", "(C)", "none")
    assert (prompt.id, prompt.answers, prompt.answer_type, prompt.source) == ("001-1", ("B",), "choice", "short")
    assert prompt.meta["subtitles"] == "fFjv93ACGo8.srt" and prompt.meta["question"] == "What is it?"
    assert {key: prompt.meta[key] for key in ("domain", "sub_category", "task_type")} == {
        "domain": "Knowledge", "sub_category": "Music", "task_type": "OCR",
    }  # fmt: skip


def test_mlvu(convert):
    """The true option is found by all of its words: 13 is not 3, nor 1."""
    [plot, summary] = convert("mlvu", "1_plotQA.json", [PLOT, SUMMARY])
    assert plot.videos == (VideoSource("1_plotQA/movie.mp4"),) and plot.source == "plotQA"
    assert (plot.answers, plot.choices, plot.answer_type) == (("B",), ("3", "13", "1"), "choice")
    assert (summary.answers, summary.choices, summary.answer_type) == (("It is told.",), (), "judge")
    assert summary.text == "Tell it."
    [prompt] = convert("mlvu", "test.json", [PLOT])
    assert prompt.videos == (VideoSource("movie.mp4"),)


def test_hd_epic(convert):
    """Videos stand before what is asked, by their names and in order; parts of them, and frames of images."""
    several, one = convert("hdepic", "fine_grained.json", EPIC)
    assert several.parts[:-1] == (
        "video 1: ", VideoSource("P01/P01-20240101-1.mp4"), "\n",
        "video 2: ", VideoSource("P02/P02-20240101-1.mp4", start=62.5, end=80.0), "\n",
        "image 1: ", VideoSource("P01/P01-20240101-1.mp4", frames=1, start=3600.0, end=3600.0), "\n",
    )  # fmt: skip
    assert (several.id, several.source, several.answers) == ("fine_grained_1", "fine_grained", ("E",))
    assert one.videos == (VideoSource("P01/P01-20240101-1.mp4", end=7.5),) and one.answers == ("A",)
    assert one.parts[0].startswith("And?\nA. a\nB. b\n")


def test_vstream_shows_nothing_that_comes_after_the_question(convert, tmp_path):
    for video, names in (
        ("ego", [f"{n:06d}.jpg" for n in range(1, 301)]),
        ("film", [f"shot_{shot:04d}_img_{image}.jpg" for shot in range(3) for image in range(2)]),
    ):
        (tmp_path / "frames" / video).mkdir(parents=True)
        for name in names:
            (tmp_path / "frames" / video / name).touch()
    about = {"question": "What is here?", "answer": "A cup.", "answer_type": "Scene", "start_time": 3}
    asked = [
        about | {"id": "1", "video_id": "ego", "end_time": 9.7},
        about | {"id": "2", "video_id": "ego", "end_time": "0:04:10"},
        about | {"id": "3", "video_id": "film", "end_time": "shot_0001_img_0.jpg"},
    ]
    first, long, film = convert("vstream", "qa.json", asked, "--root", str(tmp_path / "frames"))
    assert first.images == tuple(f"ego/{n:06d}.jpg" for n in range(1, 11)) and first.answer_type == "judge"
    assert (first.meta["memory"], first.meta["until"], first.source) == ("ego", 9.0, "Scene")
    assert len(long.images) == 128 and long.images[-1] == "ego/000251.jpg" and long.meta["until"] == 250.0
    assert film.images == tuple(f"film/shot_{shot:04d}_img_{n}.jpg" for shot, n in ((0, 0), (0, 1), (1, 0)))
    assert film.meta["until"] == 2.0


@pytest.mark.parametrize(
    ("origin", "value", "message"),
    [
        ("videomme", MME | {"answer": "E"}, "must be the letter of one of the options, A, B, C, D; got 'E'"),
        ("videomme", MME | {"options": "A"}, "`options` must be a list of texts"),
        ("videomme", MME | {"videoID": None}, "`videoID` must be a text"),
        ("mlvu", PLOT | {"answer": "2"}, "`answer` must be one of `candidates`"),
        ("mlvu", [1], "a line must be a JSON object"),
        ("hdepic", {"q": EPIC["fine_grained_2"] | {"correct_idx": 2}}, "`correct_idx` must number one of the 2"),
        ("hdepic", {"q": EPIC["fine_grained_2"] | {"inputs": {"sound 1": {"id": "x"}}}}, "`inputs` must name videos"),
        (
            "hdepic",
            {"q": EPIC["fine_grained_2"] | {"inputs": {"video 1": {"id": "x", "end_time": "later"}}}},
            "`inputs.video 1.end_time` must be seconds or HH:MM:SS, got 'later'",
        ),
        (
            "hdepic",
            {"q": EPIC["fine_grained_2"] | {"inputs": {"image 1": {"id": "x"}}}},
            "`inputs.image 1` must have the `time` of its frame",
        ),
    ],
)
def test_what_cannot_be_asked_is_named(tmp_path, capsys, origin, value, message):
    (tmp_path / "a.json").write_text(json.dumps([value] if origin != "hdepic" else value))
    command = ["data", "convert", "--from", origin, str(tmp_path / "a.json"), "--out", str(tmp_path / "out.jsonl")]
    assert main(command) != 0
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("video", "end", "message"),
    [
        ("ego", "whenever", "`end_time` must be seconds or the name of a frame, got 'whenever'"),
        ("none", 3, "frames of none must be in a folder"),
        ("../ego", 3, "may only name files below its root"),
        ("film", 3, "`end_time` 3 comes before the first frame of film"),
    ],
)
def test_what_would_be_seen_too_late_or_lies_elsewhere_is_refused(tmp_path, capsys, video, end, message):
    for name in ("ego/000001", "film/shot_0000_img_0"):
        (tmp_path / "frames" / name).parent.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "frames" / f"{name}.jpg")
    value = {"id": "1", "video_id": video, "question": "?", "answer": "a", "end_time": end}
    (tmp_path / "a.json").write_text(json.dumps([value]))
    command = ["data", "convert", "--from", "vstream", str(tmp_path / "a.json"), "--out", str(tmp_path / "out.jsonl")]
    assert main([*command, "--root", str(tmp_path / "frames")]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert main(command) != 0 and "--from vstream needs --root" in capsys.readouterr().err
    assert main(["data", "convert", "--from", "mlvu", str(tmp_path / "a.json"), "--out", "x", "--seed", "1"]) != 0
    assert "--seed is for --from vlm3r" in capsys.readouterr().err
