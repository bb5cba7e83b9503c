"""From a repository of the hub over training to a repository of the hub, as a user goes."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.patches_world import save_tokenizer
from vlmem_jax import families
from vlmem_jax.checkpoint import save_params
from vlmem_jax.cli.main import main
from vlmem_jax.config import to_dict
from vlmem_jax.hub.convert import export_folder
from vlmem_jax.models import VLM

EXPERIMENT = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({
        "model": {"preset": "tiny_qwen2_5_vl", "memory": None},
        "tokenizer": "tiny/qwen",
        "init": "tiny/qwen",
        "image": {"min_pixels": 256, "max_pixels": 1024},
        "data": {"train": [{"path": "train.jsonl"}], "rows": 8, "pack_tokens": 96, "pack_tiles": 32, "threads": 1},
        "mesh": {"data": -1, "fsdp": 1},
        "stages": [{"name": "finetune", "steps": 2, "learning_rate": 1e-2, "accumulation": 1}],
    })
"""


@pytest.fixture
def released(hub, tmp_path):
    """A small Qwen2.5-VL on the hub, tiny/qwen."""
    model = families.resolve({"preset": "tiny_qwen2_5_vl", "memory": None})
    folder = tmp_path / "made"
    save_params(folder / "0", VLM(model).fresh(jax.random.key(0)))
    (folder / "model.json").write_text(json.dumps({"model": to_dict(model), "image": {}, "system": None}))
    save_tokenizer(folder / "tokenizer")
    export_folder(folder, tmp_path / "hf")
    (tmp_path / "hf" / "modeling.py").write_text("raise SystemExit")
    hub.add("tiny/qwen", tmp_path / "hf")


def test_from_a_repository_over_parquet_to_a_repository(hub, released, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng, rows = np.random.default_rng(0), []
    for n in range(6):
        Image.fromarray(rng.integers(0, 255, (24, 16, 3), np.uint8)).save(tmp_path / "image.png")
        parts = [{"type": "image", "text": None}, {"type": "text", "text": "which?"}]
        answer = [{"type": "text", "text": f"number {n}"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [{"bytes": (tmp_path / "image.png").read_bytes(), "path": None}]})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    assert main(["data", "convert", "in.parquet", "--out", "train.jsonl"]) == 0
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    assert main(["train", "--config", "experiment.py", "--workdir", "run"]) == 0
    assert main(["convert", "run", "me/trained", "--push", "--private"]) == 0
    assert hub.private == {"me/trained": True}
    assert f"{hub.url}/me/trained: " in capsys.readouterr().out
    assert main(["convert", "me/trained", "pulled"]) == 0
    answers = {}
    for where in ("run", "me/trained", "pulled", "tiny/qwen"):
        line = ["--image", "image.png", "--prompt", "which?", "--max-new-tokens", "8"]
        capsys.readouterr()
        assert main(["generate", "--checkpoint", where, *line]) == 0
        answers[where] = capsys.readouterr().out
    assert answers["run"] == answers["me/trained"] == answers["pulled"] != answers["tiny/qwen"]
    card = hub.repos["me/trained"]["README.md"].decode()
    assert "base_model: tiny/qwen" in card and "| finetune | next_token | 2 | 0.01 | 8 |" in card
    assert str(tmp_path) not in card and "data: train.jsonl" in card


def test_what_cannot_be_pushed_is_refused_before_any_work(hub, released, tmp_path, capsys):
    for line, words in {
        "tiny/qwen me/mine --push": "--push writes one of our checkpoints to the hub",
        "made mine --push": "is named USER/NAME",
        "made other --private": "--private is of the repository that --push makes",
    }.items():
        assert main(["convert", *line.split()]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "other").exists() and set(hub.repos) == {"tiny/qwen"}
