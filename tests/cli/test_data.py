"""`vlmem data`: what it prints and writes."""

import json

import pytest

from tests.train import world
from vlmem_jax.cli.main import main
from vlmem_jax.data.records import PackedLines


@pytest.fixture
def folder(tmp_path):
    return world.make(tmp_path)


def data(*words):
    """Exit code of `vlmem data WORDS`."""
    return main(["data", *map(str, words)])


@pytest.mark.parametrize("action", ["pack", "inspect", "frames", "geometry"])
def test_every_action_shows_an_example(action, capsys):
    with pytest.raises(SystemExit) as done:
        data(action, "--help")
    assert done.value.code == 0 and f"example:\n  vlmem data {action}" in capsys.readouterr().out


def test_pack_tells_what_it_wrote(folder, capsys):
    out = folder / "train.array_record"
    assert data("pack", "--data", folder / "train.jsonl", "--out", out, "--shard-size", "4KB") == 0
    assert "train.array_record: 18 samples, 0.000 GB in " in capsys.readouterr().out
    assert len(PackedLines(str(out))) == 18


def test_pack_stops_at_a_bad_line_or_leaves_it_out(folder, capsys):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Yes."}]
    with open(folder / "train.jsonl", "a") as file:
        file.write(json.dumps({"conversations": turns, "image": "gone.png"}) + "\n")
    words = ["pack", "--data", folder / "train.jsonl", "--out", folder / "train.array_record"]
    assert data(*words) == 2
    error = capsys.readouterr().err
    assert "gone.png does not exist" in error and "train.jsonl:19" in error and error.count("\n") == 1
    assert data(*words, "--skip-bad") == 0
    shown = capsys.readouterr().out
    assert "left out: " in shown and "train.jsonl:19" in shown and "18 samples" in shown and "1 left out" in shown


def test_a_size_without_a_unit_we_know_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        data("pack", "--data", "a", "--out", "b.array_record", "--shard-size", "many")
    assert "a size is a number and B, KB, MB or GB" in capsys.readouterr().err


def test_inspect_counts_packs_and_names_bad_lines(folder, capsys):
    config = world.config_file(folder)
    assert data("inspect", "--config", config) == 0
    shown = capsys.readouterr().out
    assert "data.train: " in shown and "18 samples can be used, 0 cannot; 18 images" in shown
    assert "data.eval: " in shown and "6 samples can be used" in shown
    assert "packed into" in shown and "rows of 96 tokens and 6 tiles: tokens fill" in shown
    bad = ["{oops", "[]", json.dumps({"conversations": [{"from": "human", "value": "?"}]})]
    (folder / "bad.jsonl").write_text((folder / "eval.jsonl").read_text() + "\n".join(bad))
    assert data("inspect", "--config", config, "--data", folder / "bad.jsonl", "--bad", 2) == 1
    shown = capsys.readouterr().out
    assert "data.train" not in shown and "6 samples can be used, 3 cannot" in shown
    named = [line for line in shown.splitlines() if line.startswith("bad: ")]
    assert len(named) == 2 and all("bad.jsonl:" in line for line in named)
    assert "and 1 more; --bad=3 names all" in shown


def test_inspect_reads_packed_data_alike(folder, capsys):
    config, out = world.config_file(folder), folder / "train.array_record"
    assert data("pack", "--data", folder / "train.jsonl", "--out", out) == 0
    shown = []
    for file in (folder / "train.jsonl", out):
        capsys.readouterr()
        assert data("inspect", "--config", config, "--data", file) == 0
        shown.append(capsys.readouterr().out.partition("\n")[2])
    assert shown[0] == shown[1]


def test_inspect_tells_of_a_file_alone_what_it_can(folder, capsys):
    (folder / "bad.jsonl").write_text((folder / "train.jsonl").read_text() + "{oops")
    assert data("inspect", "--data", folder / "bad.jsonl") == 1
    shown = capsys.readouterr().out
    assert "18 samples can be read, 1 cannot; 18 images, 0 frames" in shown and "bad.jsonl:19: " in shown
    assert "pixels of an image, at least 512, median" in shown
    out = folder / "train.array_record"
    assert data("pack", "--data", folder / "train.jsonl", "--out", out) == data("inspect", "--data", out) == 0
    assert "18 samples can be read, 0 cannot; 18 images" in capsys.readouterr().out


def test_inspect_says_what_it_needs(folder, capsys):
    assert data("inspect") == 2
    assert "needs --config, or --data" in capsys.readouterr().err
    assert data("inspect", "--config", world.config_file(folder), "--stage", "warmup") == 2
    assert "there is no stage 'warmup'; the experiment has pretrain" in capsys.readouterr().err
    assert data("pack", "--data", "a", "--out", "b.array_record", "--config.seed=1") == 2
    assert "only `vlmem data inspect` and `vlmem data geometry` read an experiment" in capsys.readouterr().err


def test_frames_go_on_and_name_what_cannot_be_read(folder, capsys):
    av = pytest.importorskip("av")
    with av.open(str(folder / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame(16, 16, "rgb24")))
        container.mux(stream.encode())
    words = ["frames", "--video", folder / "a.mp4", folder / "b.mp4", "--out", folder / "f.array_record"]
    assert data(*words, "--fps", 2) == 2
    error = capsys.readouterr().err
    assert "1 of 2 videos cannot be read: " in error and "b.mp4 does not exist" in error and error.count("\n") == 1
    (folder / "b.mp4").write_bytes((folder / "a.mp4").read_bytes())
    assert data(*words, "--fps", 2) == 0
    assert "4 frames written, 4 were there; 2 videos" in capsys.readouterr().out
