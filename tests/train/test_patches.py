"""A model that sees patches, through the same commands: packed, trained on images and a video, stopped, asked."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests.patches_world import save_tokenizer, save_video
from vlmem_jax.cli.main import main
from vlmem_jax.data import EvalData, Plan, SourceConfig, TrainData
from vlmem_jax.data.jsonl import JsonLines
from vlmem_jax.data.records import pack
from vlmem_jax.models import VLM
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import experiment_processor

pytest.importorskip("av")
pytestmark = pytest.mark.usefixtures("one_device")  # models/test_gradients.py has meshes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of several sizes, two videos, 12 samples of text, images or a video, and an experiment over them."""
    folder = tmp_path_factory.mktemp("world")
    save_tokenizer(folder / "tokenizer")
    save_video(folder / "long.mp4", frames=12, fps=4)
    save_video(folder / "short.mp4", frames=5, fps=25)
    lines = []
    for n in range(12):
        size = [(16, 16), (40, 24), (20, 60)][n % 3]
        pixels = np.random.default_rng(n).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        video = ("long.mp4", "short.mp4")[n // 4 % 2]
        shown = [{}, {"image": f"{n}.png"}, {"image": [f"{n}.png", "0.png"]}, {"video": video}]
        turns = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "ab" * (1 + n % 4)}]
        lines.append(json.dumps({"conversations": turns, **shown[n % 4]}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def config(folder, preset="tiny_qwen2_5_vl", **data):
    source = [dict(path=str(folder / "train.jsonl"))]
    return ConfigDict(
        dict(
            model=dict(preset=preset, memory="comemo", decoder=dict(layers=2), vision=dict(layers=3)),
            tokenizer=str(folder / "tokenizer"),
            image=dict(min_pixels=64, max_pixels=1024, min_frame_pixels=64, max_frame_pixels=256),
            data=dict(train=source, eval=source, rows=8, pack_tokens=256, pack_tiles=96, threads=1) | data,
            stages=[dict(name="all", steps=4, learning_rate=1e-2)],
            mesh=dict(data=-1, fsdp=1),
            checkpoint=dict(every=2, keep_last=2, keep_best=0),
            eval_every=2,
            log_every=1,
            loss_chunk=128,
        )
    )


@pytest.fixture(scope="module", params=["tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def trained(folder, request):
    """Workdir of a run."""
    text = config(folder, request.param).to_json()
    (folder / "config.py").write_text(
        f"import json\nfrom ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict(json.loads({text!r}))\n"
    )
    line = ["train", "--config", str(folder / "config.py"), "--workdir", str(folder / request.param)]
    assert main(line) == 0
    return folder / request.param


def test_the_loss_falls(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [record["eval/loss"] for record in records if "eval/loss" in record]
    assert losses == sorted(losses, reverse=True) and len(losses) == 2
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)


@pytest.mark.parametrize("flags", [[], ["--image", "1.png"], ["--image", "4.png"], ["--video", "long.mp4"]])
def test_questions_about_images_and_videos(folder, trained, capsys, flags):
    flags = [str(folder / flag) if "." in flag else flag for flag in flags]
    line = ["generate", "--checkpoint", str(trained), "--prompt", "Say a word.", "--max-new-tokens", "4"]
    line += ["--temperature", "5"]  # few steps teach little but to stop
    assert main([*line, *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    if "--video" in flags:
        assert "long.mp4: frames 0, 2, 4, 7, 9, 11, 0.500 s apart" in captured.err
        assert ("visual tokens (image.budget=frame" in captured.err) == trained.name.endswith("qwen3_vl")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--video", "1.png"], "1.png"),
        (["--rope-dhr", "off"], "rope_dhr is for images cut into tiles"),
    ],
)
def test_bad_questions_are_one_plain_line(folder, trained, capsys, flags, message):
    flags = [str(folder / flag) if flag.endswith("png") else flag for flag in flags]
    assert main(["generate", "--checkpoint", str(trained), "--prompt", "a", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


# --- data -------------------------------------------------------------------------------------------------------------


def rows_of(settings):
    built = experiment(settings)
    processor = experiment_processor(built, VLM(built.model))
    return EvalData(Plan.eval(built.data, processor)), processor


def test_rows_hold_patches_and_tokens_on_their_own_axes(folder):
    data, processor = rows_of(config(folder))
    host = data[0]
    batch = host.batch
    assert batch.views.pixels_BISSc.shape == (1, 8, 96, 2, 2, 96) and batch.text.positions_BT.shape == (1, 8, 256, 3)
    shown = np.isin(batch.text.tokens_BT, (processor.context_id, processor.video_id))
    np.testing.assert_array_equal(shown, batch.text.visual_index_BT >= 0)
    for row in np.ndindex(1, 8):
        used, segments = batch.views.segments_BM[row], batch.text.segments_BT[row]
        slots = batch.text.visual_index_BT[row][shown[row]]
        np.testing.assert_array_equal(used[slots], segments[shown[row]])
        windows, frames = batch.views.layout_BI4[row][:, 0], batch.views.layout_BI4[row][:, 1]
        assert ((windows > 0) == (used > 0)).all() and ((frames > 0) == (used > 0)).all()
        for ids in (windows, frames):  # no window or frame belongs to two samples
            assert all(len(set(used[ids == one])) == 1 for one in set(ids))


def test_packed_files_give_the_same_rows(folder, tmp_path):
    source = SourceConfig(str(folder / "train.jsonl"))
    pack(JsonLines(source.path), source, tmp_path / "a.array_record")
    settings = config(folder)
    ours, _ = rows_of(settings)
    settings.data.eval = [dict(path=str(tmp_path / "a.array_record"))]
    theirs, _ = rows_of(settings)
    assert len(ours) == len(theirs)
    for step in range(len(ours)):
        jax.tree.map(np.testing.assert_array_equal, ours[step].batch, theirs[step].batch)


def test_an_unreadable_sample_leaves_a_gap(folder, tmp_path):
    good = (folder / "1.png").read_bytes()
    lines = []
    for n, data in enumerate((good, good[: len(good) // 2])):
        (tmp_path / f"{n}.png").write_bytes(data)
        turns = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "ab"}]
        lines.append(json.dumps({"conversations": turns, "image": f"{n}.png"}) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    settings = config(folder, train=[dict(path=str(tmp_path / "train.jsonl"))], rows=1, on_bad_sample="skip")
    built = experiment(settings)
    data = TrainData(Plan.train(built.data, experiment_processor(built, VLM(built.model)), 0), 1)
    batch = data[0].batch
    assert data.unreadable.keys() == {f"{tmp_path / 'train.jsonl'}:2"}
    tokens, segments, tiles = (x[0, 0] for x in (batch.text.tokens_BT, batch.text.segments_BT, batch.views.segments_BM))
    [gap] = [one for one in (1, 2) if not tokens[segments == one].any()]
    assert (
        batch.views.pixels_BISSc[0, 0][tiles == gap].min() == 255 and (tiles == gap).sum() == (tiles == 3 - gap).sum()
    )
    assert len(set(batch.views.layout_BI4[0, 0][tiles == gap, 0])) == (tiles == gap).sum()


@pytest.mark.parametrize(
    "line, changes, message",
    [
        (
            {"image": "1.png"},
            {"pack_tiles": 4},
            "a row has 4 tiles but this sample has 15; raise data.pack_tiles or lower image.max_pixels",
        ),
        (
            {"video": "long.mp4"},
            {"pack_tiles": 4},
            "this sample has 6; raise data.pack_tiles or lower image.total_pixels or image.max_frames",
        ),
        ({"video": "one.mp4"}, {}, "a video must have at least 2 frames"),
        ({"video": "none.mp4"}, {}, "none.mp4 does not exist"),
        ({"video": "train.jsonl"}, {}, "train.jsonl cannot be read"),
    ],
)
def test_bad_samples_name_file_and_line(folder, tmp_path, line, changes, message):
    save_video(folder / "one.mp4", frames=1)
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "bad.jsonl").write_text(json.dumps({"conversations": turns, **line}) + "\n")
    source = [dict(path=str(tmp_path / "bad.jsonl"), root=str(folder))]
    with pytest.raises(ValueError) as error:
        rows_of(config(folder, eval=source, **changes))
    assert message in str(error.value) and "bad.jsonl:1" in str(error.value)
