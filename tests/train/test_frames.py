"""A model that sees frames, through the same commands, with each memory: trained on images and a video, and asked."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from tests.patches_world import save_tokenizer, save_video
from vlmem_jax.cli.main import main
from vlmem_jax.data.samples import Samples
from vlmem_jax.geometry.store import store_clips
from vlmem_jax.hub.tokenizer_files import TokenizerFiles
from vlmem_jax.models import VLM
from vlmem_jax.processing.chat import FRAME
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import experiment_processor
from vlmem_jax.types import Geometry

pytest.importorskip("av")
pytestmark = pytest.mark.usefixtures("one_device")  # models/test_gradients.py has meshes
VLM2 = {"kind": "vlm2", "heads": 4, "view_width": 6, "episodic": 3}


def keys(folder, memory):
    """An experiment of a few steps on the lines of the folder."""
    source = {"path": str(folder / "train.jsonl"), "geometry": str(folder / "geometry.array_record")}
    return {
        "model": {"preset": "tiny_llava_video", "memory": memory, "decoder": {"layers": 2}},
        "tokenizer": str(folder / "tokenizer"),
        "image": {"frames": 4},
        "data": {"train": [source], "rows": 8, "pack_tokens": 384, "pack_tiles": 12, "threads": 1},
        "mesh": {"data": -1, "fsdp": 1},
        "stages": [{"name": "all", "steps": 3, "learning_rate": 1e-2}],
        "log_every": 1,
    }


def store_geometry(folder):
    """Random numbers in place of what a model of geometry makes of the same frames."""
    settings = experiment(keys(folder, VLM2 | {"geometry_width": 12}))
    processor = experiment_processor(settings, VLM(settings.model))
    N, *widths = processor.tile.geometry

    def see(pixels_ISSc):
        rng, count = np.random.default_rng(int(pixels_ISSc.sum())), len(pixels_ISSc)
        return Geometry(*(rng.standard_normal((count, N, size), np.float32) for size in (*widths, 3)))

    sources = [dataclasses.replace(source, geometry="") for source in settings.data.train]
    samples = Samples(sources, settings.data, processor)
    assert store_clips(samples, see, {"model": "random"}, folder / "geometry.array_record").written == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_tokenizer(folder / "qwen", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    TokenizerFiles.of(folder / "qwen", (FRAME,)).copy(folder / "tokenizer", {})
    save_video(folder / "a.mp4", frames=12, fps=4)
    lines = []
    for n in range(8):
        pixels = np.random.default_rng(n).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        shown = [{}, {"image": f"{n}.png"}, {"video": "a.mp4"}][n % 3]
        turns = [{"from": "human", "value": "Say a word."}, {"from": "gpt", "value": "ab"}]
        lines.append(json.dumps({"conversations": turns, **shown}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    store_geometry(folder)
    return folder


def trained(folder, memory, run):
    """Trains through the command; gives the losses."""
    file = run.with_suffix(".py")
    of_keys = f"def get_config():\n    return ConfigDict({keys(folder, memory)!r})\n"
    file.write_text(f"from ml_collections import ConfigDict\n{of_keys}")
    assert main(["train", "--config", str(file), "--workdir", str(run)]) == 0
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [loss for loss in losses if loss is not None]


@pytest.mark.parametrize("memory", ["comemo", "vismem", VLM2 | {"geometry_width": 0}], ids=str)
def test_trained_and_asked(folder, memory, capsys):
    run = folder / f"run_{memory if isinstance(memory, str) else memory['kind']}"
    losses = trained(folder, memory, run)
    assert len(losses) == 3 and losses[-1] < losses[0]
    for flags in (["--video", str(folder / "a.mp4")], ["--image", str(folder / "1.png")]):
        capsys.readouterr()
        line = ["generate", "--checkpoint", str(run), "--prompt", "Say a word.", "--max-new-tokens", "3", *flags]
        assert main(line) == 0
        captured = capsys.readouterr()
        assert ("a.mp4: frames 0, 3, 7, 11" in captured.err) == ("--video" in flags)


def test_a_memory_that_reads_geometry(folder, capsys):
    run = folder / "run_space"
    losses = trained(folder, VLM2 | {"geometry_width": 12}, run)
    assert len(losses) == 3 and losses[-1] < losses[0]
    asked = [
        {"prompt": "Say a word.", "answer": "ab", **shown} for shown in ({"video": "a.mp4"}, {"image": "1.png"}, {})
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    line = ["evaluate", "--checkpoint", str(run), "--data", str(folder / "asked.jsonl"), "--max-new-tokens", "2"]
    assert main([*line, "--output", str(folder / "scores"), "--geometry", str(folder / "geometry.array_record")]) == 0
    summary = json.loads((folder / "scores" / "summary.json").read_text())
    assert (summary["scored"], summary["mode"], summary["frames"]) == (3, "offline", [4, 4])
    store = ["--geometry", str(folder / "geometry.array_record"), "--context", "kept:3"]
    assert main([*line, "--output", str(folder / "stream"), *store]) == 0
    assert json.loads((folder / "stream" / "summary.json").read_text())["mode"] == "stream"
    capsys.readouterr()
    assert main([*line, "--output", str(folder / "none")]) != 0
    assert "the memory reads geometry of what it sees, but none is known here" in capsys.readouterr().err
