"""Streams from the command line: questions, states, signals, and what is refused."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.patches_world import save_video
from tests.stream import world
from vlmem_jax.cli.main import main
from vlmem_jax.stream import state as states
from vlmem_jax.stream.watching import Watcher

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return world.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return save_video(tmp_path_factory.mktemp("video") / "a.mp4", frames=world.SLOTS, fps=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.pictures(tmp_path_factory.mktemp("pictures"), 8)


def stream(checkpoint, name, *flags):
    words = ["stream", "--checkpoint", str(checkpoint), "--video", str(name), "--fps", "10", "--max-new-tokens", "5"]
    return main([*words, *map(str, flags)])


def test_a_question_at_the_end_is_answered_as_by_generate(checkpoint, video, capsys):
    assert main(["generate", "--checkpoint", str(checkpoint), "--video", str(video), "--prompt", "What?",
                 "--max-new-tokens", "5"]) == 0  # fmt: skip
    answer = capsys.readouterr().out
    assert stream(checkpoint, video, "--ask", "Early?", "--at", 0.15, "--ask", "What?") == 0
    shown = capsys.readouterr()
    first, early, last, text = shown.out.splitlines()
    assert (first, last) == ("[0.20 s] Early?", "[0.40 s] What?") and text + "\n" == answer and early
    assert shown.err.splitlines()[-1] == f"{video}: looked at 4 frames, answered 2 questions"


def test_questions_come_from_a_file_and_from_the_standard_input(checkpoint, folder, tmp_path, capsys, monkeypatch):
    lines = ['{"at": 0.25, "question": "a"}', '{"question": "b"}']
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert stream(checkpoint, folder, "--questions", tmp_path / "q.jsonl") == 0
    of_file = capsys.readouterr().out
    assert [line for line in of_file.splitlines() if line.startswith("[")] == ["[0.30 s] a", "[0.80 s] b"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "{wrong", ""])))
    assert stream(checkpoint, folder) == 0
    shown = capsys.readouterr()
    assert shown.out == of_file and 'error: a line of the standard input must be {"at": 120' in shown.err


def test_a_stream_that_was_stopped_goes_on_where_it_was(checkpoint, folder, tmp_path, capsys, monkeypatch):
    """SIGTERM after three frames, and the same command again: the state is that of a run that was never stopped."""
    whole, parts, log = tmp_path / "whole.state", tmp_path / "parts.state", tmp_path / "steps.jsonl"
    question = "--ask", "What?"
    assert stream(checkpoint, folder, *question, "--save", whole) == 0
    wanted = capsys.readouterr().out
    look = Watcher.look

    def interrupted(self, *args, **kwargs):
        seen = look(self, *args, **kwargs)
        if self.frames_B[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.frames_B[0] >= 3:
            time.sleep(0.5)  # the main thread hears of it
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(Watcher, "look", interrupted)
        assert stream(checkpoint, folder, *question, "--save", parts, "--log", log) == 0
    shown = capsys.readouterr()
    assert "stopping when this frame is looked at" in shown.err
    _, about = states.read_state(parts)
    seen = about["streams"][0]["frames"]
    assert 3 <= seen < 8 and shown.out == ""
    assert stream(checkpoint, folder, *question, "--load", parts, "--save", parts, "--log", log) == 0
    assert capsys.readouterr().out == wanted
    one, other = states.read_state(whole), states.read_state(parts)
    assert one[1] == other[1] and all(one[0][name].tobytes() == other[0][name].tobytes() for name in one[0])
    steps = [line["frame"] for line in world.lines(log) if "frame" in line]
    assert steps == list(range(8))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["parts.state", "steps.jsonl", "whole.state"]


def test_a_full_disk_is_said_and_looking_goes_on(checkpoint, folder, tmp_path, capsys, monkeypatch):
    file, write, fails = tmp_path / "a.state", states.write_whole, [True]

    def full(path, content):
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(states, "write_whole", full)
    look = Watcher.look

    def slowly(self, *args, **kwargs):
        time.sleep(0.1)
        if self.frames_B[0] == 6:
            fails.clear()
        return look(self, *args, **kwargs)

    monkeypatch.setattr(Watcher, "look", slowly)
    assert stream(checkpoint, folder, "--ask", "What?", "--save", file, "--save-every", 0.05) == 0
    assert f"{file} could not be saved: No space left on device; looking goes on" in capsys.readouterr().err
    assert states.read_state(file)[1]["streams"][0]["frames"] == 8
    content = file.read_bytes()
    monkeypatch.setattr(Watcher, "look", look)
    fails.append(True)  # until the end, which is an error; what was saved before is still there
    assert stream(checkpoint, folder, "--ask", "What?", "--save", file) == 2
    assert f"No space left on device: {file}" in capsys.readouterr().err.splitlines()[-1]
    assert file.read_bytes() == content


def test_a_state_is_saved_now_and_then(checkpoint, folder, tmp_path, monkeypatch):
    look, seen = Watcher.look, []

    def slowly(self, *args, **kwargs):
        if (tmp_path / "a.state").exists():
            seen.append(states.read_state(tmp_path / "a.state")[1]["streams"][0]["frames"])
        time.sleep(0.15)
        return look(self, *args, **kwargs)

    monkeypatch.setattr(Watcher, "look", slowly)
    assert stream(checkpoint, folder, "--ask", "What?", "--save", tmp_path / "a.state", "--save-every", 0.01) == 0
    assert seen and seen == sorted(seen) and 0 < seen[-1] < 8


def test_two_streams_do_not_write_one_state(checkpoint, folder, tmp_path, capsys, monkeypatch):
    look, other = Watcher.look, []

    def meanwhile(self, *args, **kwargs):
        if not other:
            words = ["stream", "--checkpoint", str(checkpoint), "--video", str(folder), "--save", str(tmp_path / "a")]
            other.append(subprocess.run([sys.executable, "-m", "vlmem_jax", *words], capture_output=True, text=True))
        return look(self, *args, **kwargs)

    monkeypatch.setattr(Watcher, "look", meanwhile)
    assert stream(checkpoint, folder, "--ask", "What?", "--save", tmp_path / "a") == 0
    assert other[0].returncode == 2
    assert f"process {os.getpid()} on" in other[0].stderr and "Use another --save" in other[0].stderr


def test_a_state_of_another_checkpoint_is_refused_by_the_names_of_both(checkpoint, folder, tmp_path, capsys):
    assert stream(checkpoint, folder, "--ask", "What?", "--save", tmp_path / "a.state") == 0
    other = world.checkpoint(tmp_path / "other", seed=2)
    pair = world.checkpoint(tmp_path / "pair", memory=world.KEYS["memory"] | {"write": "pair"})
    for name, words in ((other, "its parameters had the digest"), (pair, "model.memory.write was 'paper'")):
        capsys.readouterr()
        assert stream(name, folder, "--load", tmp_path / "a.state") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"made by {checkpoint}, which is not --checkpoint {name}" in error and words in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ask", "a", "--at", "x"], "invalid float value"),
        (["--at", "3"], "--at stands behind the --ask that it is for"),
        (["--ask", "a", "--at", "1", "--at", "2"], "--at stands behind the --ask that it is for"),
        (["--ask", "a", "--at", "-1"], "0 seconds or later, got -1.0"),
        (["--ask", "a", "--save-every", "5"], "--save-every must be above 0, and needs --save FILE; got 5"),
        (["--ask", "a", "--fps", "0"], "--fps must be above 0, got 0"),
        (["--ask", "a", "--max-latency", "-1"], "--max-latency must be above 0, got -1"),
        (["--ask", "a", "--load", "none.state"], "state none.state does not exist"),
        (["--ask", "a", "--video", "none.mp4"], "--video none.mp4: there is no file, folder or device of this name"),
        (["--ask", "a", "--video", "/dev/video9"], "--video /dev/video9: there is no camera of this name"),
        (["--ask", "a", "--context", "stride:2"], "give --context all"),
        (["--ask", "a", "--invocation", "always"], "leave them out"),
        (["--ask", "a", "--rope-dhr", "on"], "rope_dhr is for images cut into tiles"),
        (["--questions", "none.jsonl"], "No such file or directory: none.jsonl"),
    ],
)
def test_bad_input_is_one_plain_line(checkpoint, folder, capsys, flags, message):
    try:
        code = stream(checkpoint, folder, *flags)
    except SystemExit as error:  # of argparse
        code = error.code
    shown = capsys.readouterr().err
    assert code == (0 if "rope_dhr" in message else 2) and message in shown and "Traceback" not in shown


def test_models_that_cannot_watch_are_refused(tmp_path, folder, capsys):
    for memory, message in (
        (None, "a stream of frames needs a memory that keeps them; model.memory is none"),
        (world.KEYS["memory"] | {"geometry_width": 12, "view_width": 6}, "train with model.memory.geometry_width=0"),
    ):
        kind = world.checkpoint(tmp_path / str(memory is None), memory=memory)
        assert stream(kind, folder, "--ask", "What?") == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_live_stream_has_no_end_to_ask_at(checkpoint, tmp_path, capsys, video):
    os.mkfifo(tmp_path / "pipe")
    writing = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(video.read_bytes()), daemon=True)
    writing.start()
    assert stream(checkpoint, tmp_path / "pipe", "--ask", "What?") == 2
    assert "has no end, so that a question needs a time: --at SECONDS" in capsys.readouterr().err


@pytest.mark.slow
def test_a_live_stream_ends_by_ctrl_c_while_lines_may_still_come(checkpoint, tmp_path, video):
    """A pipe that stays open, as a camera does, and a standard input that does; a question on the way."""
    os.mkfifo(tmp_path / "pipe")
    words = ["--checkpoint", checkpoint, "--video", tmp_path / "pipe", "--fps", "10", "--save", tmp_path / "a.state"]
    command = [sys.executable, "-m", "vlmem_jax", "stream", *map(str, words), "--max-new-tokens", "5"]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    with subprocess.Popen(command, text=True, **pipes) as running, open(tmp_path / "pipe", "wb") as sending:
        sending.write(save_video(tmp_path / "a.ts", frames=30, fps=10).read_bytes())
        sending.flush()
        print('{"at": 1.0, "question": "What?"}', file=running.stdin, flush=True)
        shown = [running.stdout.readline() for _ in range(2)]
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0
        errors = running.stderr.read()
    assert shown[0].endswith(" s] What?\n") and len(shown[1]) > 1
    assert "stopping when this frame is looked at" in errors and "Traceback" not in errors
    assert states.read_state(tmp_path / "a.state")[1]["streams"][0]["frames"] >= 1


def test_its_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["stream", "--help"])
    assert 'vlmem stream --checkpoint RUN --video a.mp4 --ask "' in capsys.readouterr().out
