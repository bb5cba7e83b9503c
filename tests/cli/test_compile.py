"""`vlmem compile`: a training step for TPUs that are not there."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("libtpu")
pytestmark = [pytest.mark.tpu_aot, pytest.mark.xdist_group("libtpu")]


ONE_ROW = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")


def compile_step(*words):
    """Runs the command in a process of its own, since libtpu stays locked as long as a process lives."""
    command = [sys.executable, "-m", "vlmem_jax", "compile", *words]
    deadline = time.time() + 1500
    while True:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if "another process is compiling" not in done.stderr or time.time() > deadline:
            return done
        time.sleep(3)


def test_the_numbers_are_printed_and_written(tmp_path):
    path = tmp_path / "numbers.json"
    done = compile_step("--config", "configs/tiny/comemo.py", "--topology", "v5e:2x2", "--json", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads(path.read_text())
    assert numbers["what"] == "train: finetune" and numbers["fits"]
    kinds = ("parameter", "state", "input", "activation", "temporary", "peak")
    assert min(numbers[f"{kind}_bytes"] for kind in kinds) > 0
    assert any("vlmem_jax/" in buffer["source"] for buffer in numbers["buffers"])
    assert 0 < numbers["hbm_share"] < 0.5
    assert 0 < numbers["predicted_step_seconds"] <= numbers["exposed_step_seconds"]
    assert 0 < numbers["predicted_mfu"] < 1
    assert numbers["collectives"] and numbers["activation_gathers"] == []
    assert "predicted, not measured" in done.stdout


def test_data_goes_over_slices_and_nothing_else_does(tmp_path):
    path = tmp_path / "numbers.json"
    words = ("--topology", "v5e:2x2", "--slices", "2", "--json", str(path))
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    done = compile_step("--config", "configs/tiny/comemo.py", *words, *mesh)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads(path.read_text())
    assert numbers["slices"] == 2 and numbers["activation_gathers"] == []
    over = {tuple(c["axes"]) for c in numbers["collectives"]}
    assert over == {("fsdp",), ("data",)}
    between = [c for c in numbers["collectives"] if c["axes"] == ["data"]]
    assert {c["kind"] for c in between} == {"all-reduce"} and {c["devices"] for c in between} == {2}


@pytest.mark.slow
def test_what_does_not_fit_is_listed_and_settings_are_tried(tmp_path):
    path = tmp_path / "numbers.json"
    words = ("--config", "configs/tiny/comemo.py", "--topology", "v5e:2x2", "--json", str(path))
    wide = ("--config.model.decoder.vocab=4500000", "--config.loss_chunk=64", "--config.model.remat=full")
    done = compile_step(*words, *wide)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    numbers = json.loads(path.read_text())
    assert not numbers["fits"] and numbers["hbm_share"] > 1
    assert "IT DOES NOT FIT" in done.stdout
    largest = numbers["buffers"][0]
    assert largest["bytes"] > 2**28 and any("vlmem_jax/" in buffer["source"] for buffer in numbers["buffers"])
    tried = [line for line in done.stdout.splitlines() if line.startswith("  --config.")]
    less = {line.split(":")[0].strip(): float(line.split(", ")[1].split()[0]) for line in tried if "less" in line}
    assert less["--config.optimizer.state_dtype=bfloat16"] > 0
    (spread,) = (line for line in tried if line.startswith("  --config.mesh.data=1 --config.mesh.fsdp=-1"))
    assert "; fits, a step takes" in spread


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_serving_compiles_too(tmp_path, what):
    path = tmp_path / "numbers.json"
    words = ("--what", what, "--topology", "v5e:2x2", "--tokens", "256", "--tiles", "4", "--rows", "8")
    done = compile_step("--config", "configs/tiny/comemo.py", *words, "--json", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads(path.read_text())
    assert numbers["what"] == what and numbers["fits"]
    assert (numbers["state_bytes"] > 0) == (what == "decode")
    assert 0 < numbers["predicted_mfu"] < 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--topology", "v5e:3x5"], "there is no slice v5e:3x5; the nearest are v5e:4x4"),
        (["--topology", "v4:2x2"], "a topology is one of v5e, v5p, v6e, a colon and sizes"),
        (["--topology", "v5e:2x2", "--stage", "warmup"], "there is no stage 'warmup'; the experiment has pretrain"),
        (["--topology", "v5e:2x2", "--config.mesh.tensor=3"], "the mesh must use all 4 devices"),
        (["--topology", "v5e:2x2", "--slices", "2", *ONE_ROW], "mesh.data must be a multiple of the 2 slices"),
        (["--topology", "v5e:2x2", "--packs", "0"], "--packs must be at least 1"),
        (
            ["--topology", "v5e:2x2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.data=1"],
            "mesh.tensor x mesh.context = 2 must divide model.decoder.heads 3",
        ),
    ],
)
def test_what_does_not_fit_is_one_plain_line(words, message):
    done = compile_step("--config", "configs/tiny/comemo.py", *words)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_learning_from_rewards_compiles_with_its_memories(tmp_path):
    path = tmp_path / "numbers.json"
    words = ("--what", "rl", "--topology", "v5e:2x2", "--tokens", "100", "--tiles", "64", "--memories", "2")
    done = compile_step("--config", "configs/tiny/vismem.py", *words, "--stage", "formation", "--json", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads(path.read_text())
    assert numbers["what"] == "rl: formation" and numbers["fits"] and numbers["activation_gathers"] == []
    assert 0 < numbers["predicted_mfu"] < 1 and numbers["flops"] > 0


@pytest.mark.parametrize(
    "config, words, message",
    [
        ("vismem", ["--what", "train"], "the task of stage invocation is grpo: compile it with --what rl"),
        ("vismem", ["--what", "rl", "--stage", "warmup"], "the task of stage warmup is memory_sft: name a stage of"),
        ("comemo", ["--what", "rl"], "the task of stage finetune is next_token: compile it with --what train"),
        ("vismem", ["--what", "rl", "--tokens", "360"], "data.pack_tokens must hold a prompt and its answer"),
    ],
)
def test_a_stage_is_compiled_as_what_it_is(config, words, message):
    done = compile_step("--config", f"configs/tiny/{config}.py", "--topology", "v5e:2x2", *words)
    assert done.returncode == 2 and message in done.stderr, done.stderr[-1000:]
