"""`vlmem data geometry`: from the videos of an experiment and a public checkpoint to what its samples come with."""

import json

import jax
import numpy as np
import pytest

from tests.patches_world import save_tokenizer, save_video
from vlmem_jax.cli.main import main
from vlmem_jax.data.samples import Samples
from vlmem_jax.geometry import load_geometry, pictures
from vlmem_jax.geometry.coordinates import clip_geometry
from vlmem_jax.geometry.store import Seer, geometry_of
from vlmem_jax.hub.tokenizer_files import TokenizerFiles
from vlmem_jax.models import VLM
from vlmem_jax.processing import ImageConfig
from vlmem_jax.processing.chat import FRAME
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import experiment_processor

pytest.importorskip("av")
pytestmark = pytest.mark.usefixtures("one_device")  # models/test_gradients.py has meshes


@pytest.fixture
def keys(tmp_path, pi3_checkpoint):
    """An experiment whose memory reads as much as the model of geometry gives."""
    save_tokenizer(tmp_path / "qwen", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    TokenizerFiles.of(tmp_path / "qwen", (FRAME,)).copy(tmp_path / "tokenizer", {})
    save_video(tmp_path / "a.mp4", frames=6, fps=4, level=40)
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"conversations": turns, "video": "a.mp4"}) + "\n")
    model = load_geometry(pi3_checkpoint.folder, dtype="float32")
    memory = {"kind": "vlm2", "geometry_width": model.token_width, "view_width": model.view_width}
    source = {"path": str(tmp_path / "train.jsonl"), "geometry": str(tmp_path / "g.array_record")}
    return {
        "model": {"preset": "tiny_llava_video", "memory": memory},
        "tokenizer": str(tmp_path / "tokenizer"),
        "image": {"frames": 3},
        "data": {"train": [source], "rows": 8, "pack_tokens": 384, "pack_tiles": 4, "threads": 1},
        "mesh": {"data": -1, "fsdp": 1},
        "stages": [{"name": "all", "steps": 1, "learning_rate": 1e-2}],
    }


def command(keys, folder, checkpoint, *more):
    file = folder / "experiment.py"
    file.write_text(f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({keys!r})\n")
    out = keys["data"]["train"][0]["geometry"]
    line = [
        "data",
        "geometry",
        "--config",
        str(file),
        "--checkpoint",
        str(checkpoint),
        "--out",
        out,
        "--geometry-fit",
        "resize",
    ]
    return main([*line, *more])


def test_samples_come_with_what_the_model_makes_of_their_frames(keys, tmp_path, pi3_checkpoint, capsys):
    assert command(keys, tmp_path, pi3_checkpoint.folder) == 0
    assert "g.array_record: geometry of 1 clips written, 0 were there; 0 samples left out" in capsys.readouterr().out
    assert command(keys, tmp_path, pi3_checkpoint.folder) == 0
    assert "0 clips written, 1 were there" in capsys.readouterr().out
    settings = experiment(keys)
    samples = Samples(settings.data.train, settings.data, experiment_processor(settings, VLM(settings.model)))
    samples.measure([(0, 0)])
    sample = samples.load((0, 0))
    model, grid = load_geometry(pi3_checkpoint.folder), settings.model.vision.grid
    seen = pictures(sample.pixels_ISSc, grid * model.patch_size, "resize")
    wanted = clip_geometry(model.scene(seen), grid)
    for got, want in zip(jax.tree.leaves(sample.geometry), jax.tree.leaves(wanted), strict=True):
        want = np.asarray(want, np.float32)
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.02 * np.abs(want).max())


def test_a_memory_of_other_widths_and_one_that_reads_none_are_refused(keys, tmp_path, pi3_checkpoint, capsys):
    assert command(keys, tmp_path, pi3_checkpoint.folder, "--config.model.memory.geometry_width=12") == 2
    assert "set model.memory.geometry_width=" in capsys.readouterr().err
    assert command(keys, tmp_path, pi3_checkpoint.folder, "--config.model.memory.geometry_width=0") == 2
    assert "geometry is for a memory that reads it; model.memory is vlm2" in capsys.readouterr().err


def test_a_model_answers_with_what_is_stored_and_with_what_is_made_on_the_way(
    keys, tmp_path, pi3_checkpoint, capsys, monkeypatch
):
    assert command(keys, tmp_path, pi3_checkpoint.folder) == 0
    run, asked = tmp_path / "run", tmp_path / "asked.jsonl"
    assert main(["train", "--config", str(tmp_path / "experiment.py"), "--workdir", str(run)]) == 0
    questions = [{"prompt": prompt, "video": "a.mp4", "answer": "Yes."} for prompt in ("What?", "And what else?")]
    asked.write_text("".join(json.dumps(one) + "\n" for one in questions))
    see, seen = Seer.__call__, []
    monkeypatch.setattr(Seer, "__call__", lambda seer, pixels: seen.append(len(pixels)) or see(seer, pixels))
    line = ["--checkpoint", str(run), "--max-new-tokens", "4", "--geometry-fit", "resize"]
    answers = []
    for name, geometry in (("stored", keys["data"]["train"][0]["geometry"]), ("made", str(pi3_checkpoint.folder))):
        more = ["--data", str(asked), "--output", str(tmp_path / name), "--geometry", geometry]
        assert main(["evaluate", *line, *more]) == 0
        answers.append(json.loads((tmp_path / name / "samples.jsonl").read_text().splitlines()[0])["output"])
    assert len(seen) == 1, "of one video, whatever is asked about it"
    capsys.readouterr()
    shown = ["--prompt", "What?", "--video", str(tmp_path / "a.mp4"), "--geometry", str(pi3_checkpoint.folder)]
    assert main(["generate", *line, *shown]) == 0
    assert [capsys.readouterr().out.rstrip("\n")] * 2 == answers


def test_what_no_model_reads_is_refused(keys, tmp_path, pi3_checkpoint):
    processor = experiment_processor(settings := experiment(keys), VLM(settings.model))
    assert geometry_of(processor, str(pi3_checkpoint.folder), "resize").model.kind == "pi3"
    processor.image = ImageConfig()
    with pytest.raises(ValueError, match="for models that see frames whole, not cut into tiles"):
        geometry_of(processor, str(pi3_checkpoint.folder))
    processor.tile = processor.tile._replace(geometry=None)
    with pytest.raises(ValueError, match="for a memory that reads what it says; leave it out"):
        geometry_of(processor, str(pi3_checkpoint.folder))
