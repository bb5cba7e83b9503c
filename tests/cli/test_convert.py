"""`vlmem convert` as a user runs it, on the smallest model."""

import json

import jax
import pytest
import safetensors.numpy

from vlmem_jax import families
from vlmem_jax.checkpoint import save_params
from vlmem_jax.cli.convert import _bytes
from vlmem_jax.cli.main import main
from vlmem_jax.config import to_dict
from vlmem_jax.models import VLM


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A workdir as training leaves it, without memory blocks."""
    model = families.resolve({"preset": "tiny", "memory": None})
    folder = tmp_path_factory.mktemp("run")
    save_params(folder / "finetune" / "5", VLM(model).fresh(jax.random.key(0)))
    about = {"model": to_dict(model), "image": {}, "system": None}
    (folder / "model.json").write_text(json.dumps(about))
    (folder / "config.json").write_text('{"stages": [{"name": "finetune"}]}')
    return folder


def test_out_in_and_out_again(run_folder, tmp_path, capsys):
    for source, target in ((run_folder, "hf"), (tmp_path / "hf", "ours"), (tmp_path / "ours" / "0", "again")):
        assert main(["convert", str(source), str(tmp_path / target)]) == 0
    assert "again: 175,040 parameters" in capsys.readouterr().out.replace(str(tmp_path) + "/", "")
    first, again = (safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert all(again[name].tobytes() == value.tobytes() for name, value in first.items())


def test_export_options(run_folder, tmp_path):
    options = ["--dtype", "bfloat16", "--max-shard-size", "100KB"]
    assert main(["convert", str(run_folder), str(tmp_path / "hf"), *options]) == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 175_040
    assert all((tmp_path / "hf" / name).stat().st_size < 120_000 for name in set(index["weight_map"].values()))


def test_keys_on_the_line_add_memory_blocks(run_folder, tmp_path, capsys):
    main(["convert", str(run_folder), str(tmp_path / "hf")])
    keys = {"memory": "comemo", "memory.every": 2, "memory.heads": 2, "memory.head_dim": 16, "memory.mlp_width": 40}
    line = [f"--config.model.{key}={value}" for key, value in keys.items()]
    assert main(["convert", *line, str(tmp_path / "hf"), str(tmp_path / "ours"), "--seed=3"]) == 0
    assert "newly initialised: memory/blocks/attn" in capsys.readouterr().out
    model = json.loads((tmp_path / "ours" / "model.json").read_text())["model"]
    assert (model["memory"]["kind"], model["memory"]["mlp_width"]) == ("comemo", 40)


def test_an_experiment_says_what_to_make(run_folder, tmp_path):
    main(["convert", str(run_folder), str(tmp_path / "hf")])
    text = """
    from ml_collections import ConfigDict
    def get_config():
        return ConfigDict({"model": {"preset": "tiny", "memory": "comemo"}, "image": {"max_tiles": 5}})
    """
    (tmp_path / "experiment.py").write_text("\n".join(line[4:] for line in text.splitlines()))
    config = f"--config={tmp_path / 'experiment.py'}"
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "ours"), config]) == 0
    about = json.loads((tmp_path / "ours" / "model.json").read_text())
    assert about["model"] == to_dict(families.resolve({"preset": "tiny"})) and about["image"]["max_tiles"] == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{empty}", "{new}"], "has no config.json"),
        (["{empty}/nowhere", "{new}"], "there is no folder"),
        (["{run}", "{empty}", "--config.model.memory=none"], "this SOURCE is one of ours"),
        (["{run}", "{run}"], "exists already"),
    ],
)
def test_an_error_is_one_plain_line(run_folder, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    places = {"run": run_folder, "empty": tmp_path / "empty", "new": tmp_path / "new"}
    assert main(["convert", *(word.format(**places) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("text", "size"), [("500MB", 5 * 10**8), ("5gb", 5 * 10**9), ("1.5 K", 1500), ("7", 7)])
def test_sizes(text, size):
    assert _bytes(text) == size


@pytest.mark.parametrize("text", ["", "0GB", "-1", "5 apples"])
def test_sizes_that_are_none(tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", f"--max-shard-size={text}"])
    assert "a size is a number and B, KB, MB or GB" in capsys.readouterr().err
