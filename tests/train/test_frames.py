"""A model that sees frames, through the same commands, with each memory: trained on images and a video, and asked."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.patches_world import save_tokenizer, save_video
from vlmem_jax.cli.main import main
from vlmem_jax.hub.tokenizer_files import TokenizerFiles
from vlmem_jax.processing.chat import FRAME

pytest.importorskip("av")
EXPERIMENT = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({{
        "model": {{"preset": "tiny_llava_video", "memory": {memory!r}, "decoder": {{"layers": 2}}}},
        "tokenizer": {tokenizer!r},
        "image": {{"frames": 4}},
        "data": {{"train": [{{"path": {data!r}}}], "rows": 8, "pack_tokens": 384, "pack_tiles": 12, "threads": 1}},
        "mesh": {{"data": -1, "fsdp": 1}},
        "stages": [{{"name": "all", "steps": 3, "learning_rate": 1e-2}}],
        "log_every": 1,
    }})
"""


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
    return folder


@pytest.mark.parametrize("memory", ["comemo", "vismem", {"kind": "vlm2", "geometry_width": 0}], ids=str)
def test_trained_and_asked(folder, memory, capsys):
    name = memory if isinstance(memory, str) else memory["kind"]
    file, run = folder / f"{name}.py", folder / f"run_{name}"
    names = dict(tokenizer=str(folder / "tokenizer"), data=str(folder / "train.jsonl"))
    file.write_text(EXPERIMENT.format(memory=memory, **names))
    assert main(["train", "--config", str(file), "--workdir", str(run)]) == 0
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 3 and losses[-1] < losses[0]
    for flags in (["--video", str(folder / "a.mp4")], ["--image", str(folder / "1.png")]):
        capsys.readouterr()
        line = ["generate", "--checkpoint", str(run), "--prompt", "Say a word.", "--max-new-tokens", "3", *flags]
        assert main(line) == 0
        captured = capsys.readouterr()
        assert ("a.mp4: frames 0, 3, 7, 11" in captured.err) == ("--video" in flags)
