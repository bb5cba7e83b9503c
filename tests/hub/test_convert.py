import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vlmem_jax import families
from vlmem_jax.checkpoint import find, load_params, save_params
from vlmem_jax.checkpoint.folder import set_base
from vlmem_jax.config import to_dict
from vlmem_jax.families import internvl
from vlmem_jax.families.internvl import write_config
from vlmem_jax.hub.convert import export_folder, import_folder, load_folder, released
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.hub.orbax_io import read_leaves
from vlmem_jax.hub.safetensors_io import Tensors, Writer
from vlmem_jax.models import VLM
from vlmem_jax.processing.images import ImageConfig
from vlmem_jax.runtime import sharding
from vlmem_jax.trees import flatten, unflatten

from .conftest import write_hf

ROOT = Path(__file__).parents[2]
CPU = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def parameters(folder) -> dict[str, np.ndarray]:
    """What the checkpoint layer restores from a checkpoint folder, in the stored dtype."""
    checkpoint = find(folder)
    abstract = VLM(families.resolve(checkpoint.model["model"])).abstract()
    dtype = dtype_of(checkpoint.step_folder)
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=CPU), abstract)
    return {path: np.asarray(leaf) for path, leaf in flatten(load_params(checkpoint.step_folder, target)).items()}


def dtype_of(step_folder) -> np.dtype:
    (dtype,) = {leaf.dtype for leaf in read_leaves(step_folder / "params").values()}
    return dtype


def make_mesh(**sizes):
    config = sharding.MeshConfig(**sizes)
    return sharding.make_mesh(config, jax.devices()[: config.data * config.fsdp * config.tensor])


def assert_same_tensors(ours: Path, theirs: Path):
    a, b = Tensors(ours), Tensors(theirs)
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def with_memory(folder, **comemo):
    """The model of a folder without memory blocks, with some."""
    blocks = dict(kind="comemo", every=2, heads=2, head_dim=16) | comemo
    return families.resolve(to_dict(released(folder).model) | {"memory": blocks})


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [100_000, 10**9])
def test_theirs_to_ours_to_theirs_is_bit_equal(hf_folder, tmp_path, shard_bytes):
    import_folder(hf_folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back", shard_bytes=shard_bytes)
    assert_same_tensors(tmp_path / "back", hf_folder)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (hf_folder, tmp_path / "back"))
    for key, value in before.items():
        assert after[key] == (value if not isinstance(value, dict) else after[key] | value), key
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"pad_token": "</s>"}'


def test_a_checkpoint_of_what_was_trained_is_exported_with_its_base(hf_folder, tmp_path):
    import_folder(hf_folder, tmp_path / "ours")
    run, whole = tmp_path / "run", parameters(tmp_path / "ours")
    trained = {path: 2 * leaf for path, leaf in whole.items() if path.startswith("memory/")}
    save_params(run / "tune" / "3", unflatten(trained))
    set_base(run, tmp_path / "ours" / "0")
    (run / "model.json").write_bytes((tmp_path / "ours" / "model.json").read_bytes())
    (run / "config.json").write_text('{"stages": [{"name": "tune"}]}')
    export_folder(run, tmp_path / "out")
    import_folder(tmp_path / "out", tmp_path / "back")
    back = parameters(tmp_path / "back")
    for path, leaf in whole.items():
        np.testing.assert_array_equal(back[path], trained.get(path, leaf), err_msg=path)


def test_dtype_is_kept_or_cast(hf_folder, tmp_path, weights):
    import_folder(hf_folder, tmp_path / "ours")
    assert dtype_of(tmp_path / "ours" / "0") == ml_dtypes.bfloat16
    export_folder(tmp_path / "ours", tmp_path / "f32", dtype="float32")
    tensors = Tensors(tmp_path / "f32")
    for name, value in weights.items():
        np.testing.assert_array_equal(tensors[name], value.astype(ml_dtypes.bfloat16).astype(np.float32), strict=True)
    assert json.loads((tmp_path / "f32" / "config.json").read_text())["torch_dtype"] == "float32"


def test_what_is_imported_is_what_the_table_says(hf_folder, tmp_path, weights):
    import_folder(hf_folder, tmp_path / "ours")
    expected = from_arrays(released(hf_folder).model, weights)
    for path, leaf in parameters(tmp_path / "ours").items():
        np.testing.assert_array_equal(leaf, flatten(expected)[path].astype(ml_dtypes.bfloat16), strict=True)


# --- straight into arrays ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [{"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_load_folder_gives_sharded_arrays(hf_folder, weights, mesh):
    vlm = VLM(released(hf_folder).model)
    shardings = sharding.param_shardings(make_mesh(**mesh), vlm.abstract(), vlm.axes())
    params = load_folder(hf_folder, vlm, shardings)
    expected = from_arrays(vlm.config, weights)
    for path, leaf in flatten(params).items():
        assert leaf.sharding == flatten(shardings)[path]
        np.testing.assert_array_equal(leaf, flatten(expected)[path].astype(ml_dtypes.bfloat16), strict=True)


def test_load_folder_casts(hf_folder, weights):
    vlm = VLM(released(hf_folder).model)
    params = load_folder(hf_folder, vlm, jax.tree.map(lambda _: CPU, vlm.abstract()), dtype=jnp.float32)
    norm = weights["language_model.model.norm.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params["decoder"]["norm"]["scale"], norm, strict=True)


# --- starting from a checkpoint without memory ------------------------------------------------------------------------


def test_a_plain_checkpoint_round_trips_without_memory(plain_folder, tmp_path):
    summary = import_folder(plain_folder, tmp_path / "ours")
    assert not summary.fresh and not summary.new_rows
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", plain_folder)


def test_a_plain_checkpoint_gets_fresh_memory_blocks(plain_folder, tmp_path):
    model = with_memory(plain_folder)
    summary = import_folder(plain_folder, tmp_path / "ours", model=model, seed=1)
    found = parameters(tmp_path / "ours")
    assert set(summary.fresh) == {path for path in found if path.startswith("memory/")}
    expected = flatten(from_arrays(released(plain_folder).model, dict(Tensors(plain_folder))))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, strict=True)
    assert not found["memory/blocks/attn_gate"].any() and not found["memory/blocks/mlp_gate"].any()
    assert (found["memory/blocks/attn_norm/scale"] == 1).all()
    # each block drawn apart, as wide as the model's own init draws them
    q, drawn = (x["memory/blocks/attn/q/kernel"] for x in (found, flatten(VLM(model).fresh(jax.random.key(5)))))
    assert q.shape == drawn.shape and not np.array_equal(q[0], q[1])
    assert q.std() == pytest.approx(float(drawn.std()), rel=0.1)
    # the same straight into sharded arrays
    vlm = VLM(model)
    shardings = sharding.param_shardings(make_mesh(fsdp=4, tensor=2), vlm.abstract(), vlm.axes())
    for path, leaf in flatten(load_folder(plain_folder, vlm, shardings, seed=1)).items():
        assert leaf.sharding == flatten(shardings)[path]
        np.testing.assert_array_equal(leaf, found[path], strict=True)


def test_new_blocks_may_start_from_the_attention_that_they_stand_before(plain_folder, tmp_path):
    model = with_memory(plain_folder)
    decoder = model.decoder
    own = {"start": "attention", "gate": 0.5, "heads": decoder.heads, "head_dim": decoder.head_dim}
    model = dataclasses.replace(model, memory=dataclasses.replace(model.memory, **own))
    summary = import_folder(plain_folder, tmp_path / "ours", model=model, seed=1)
    assert "memory/blocks/attn/q/kernel" in summary.fresh
    at_random = flatten(VLM(model).fresh(jax.random.key(5)))
    for made in (parameters(tmp_path / "ours"), at_random):
        groups, before = decoder.heads // decoder.kv_heads, slice(model.memory.every - 1, None, model.memory.every)
        assert groups > 1
        for name in ("q", "k", "v", "o"):
            layers = np.asarray(made[f"decoder/layers/attn/{name}/kernel"])[before]
            wanted = np.repeat(layers, groups, axis=2) if name in "kv" else layers
            np.testing.assert_array_equal(made[f"memory/blocks/attn/{name}/kernel"], wanted, strict=True)
        np.testing.assert_array_equal(
            made["memory/blocks/attn_norm/scale"], np.asarray(made["decoder/layers/attn_norm/scale"])[before]
        )
        assert (made["memory/blocks/attn_gate"] == 0.5).all() and (made["memory/blocks/mlp_gate"] == 0.5).all()
        assert not made["memory/blocks/mlp/down/kernel"].any() and made["memory/blocks/mlp/up/kernel"].any()
    vlm = VLM(model)
    shardings = sharding.param_shardings(make_mesh(fsdp=4, tensor=2), vlm.abstract(), vlm.axes())
    found = parameters(tmp_path / "ours")
    for path, leaf in flatten(load_folder(plain_folder, vlm, shardings, seed=1)).items():
        np.testing.assert_array_equal(leaf, found[path], strict=True)
    with pytest.raises(ValueError, match=r"memory.start=attention needs memory.heads and memory.head_dim of the decod"):
        VLM(dataclasses.replace(model, memory=dataclasses.replace(model.memory, heads=1))).abstract()


def test_new_vocabulary_rows(plain_folder, tmp_path, weights):
    old = released(plain_folder).model
    model = families.resolve(to_dict(old) | {"decoder": to_dict(old.decoder) | {"vocab": old.decoder.vocab + 40}})
    assert import_folder(plain_folder, tmp_path / "ours", model=model).new_rows == 40
    found = parameters(tmp_path / "ours")
    embed, head = found["decoder/embed"], found["decoder/head/kernel"]
    before = weights["language_model.model.tok_embeddings.weight"]
    np.testing.assert_array_equal(embed[:-40], before)
    assert abs(embed[-40:].mean()) < 0.002 and embed[-40:].std() == pytest.approx(0.02, rel=0.1)
    scores = weights["language_model.output.weight"]
    np.testing.assert_array_equal(head[:, :-40], scores.T)
    np.testing.assert_allclose(head[:, -40:], np.repeat(scores.mean(0)[:, None], 40, 1), atol=1e-6)
    vlm = VLM(model)
    shardings = sharding.param_shardings(make_mesh(fsdp=4, tensor=2), vlm.abstract(), vlm.axes())
    params = load_folder(plain_folder, vlm, shardings)
    np.testing.assert_array_equal(params["decoder"]["embed"], found["decoder/embed"])
    np.testing.assert_array_equal(params["decoder"]["head"]["kernel"], found["decoder/head/kernel"])
    other = load_folder(plain_folder, vlm, shardings, seed=3)["decoder"]["embed"]
    assert (np.asarray(other) == embed).all(1).tolist() == [True] * len(before) + [False] * 40


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_folder_without_config(hf_folder, tmp_path):
    (hf_folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"hf has no config\.json"):
        import_folder(hf_folder, tmp_path / "ours")
    with pytest.raises(ValueError, match="there is no folder"):
        import_folder(tmp_path / "nowhere", tmp_path / "ours")


def test_wrong_shapes_and_names_are_listed_and_nothing_is_written(hf_folder, tmp_path, weights, released_config):
    weights = dict(weights)
    weights["mlp1.1.wait"] = weights.pop("mlp1.1.weight")
    weights["language_model.model.norm.weight"] = np.zeros(63, np.float32)
    write_hf(tmp_path / "broken", weights, released_config)
    with pytest.raises(ValueError) as error:
        import_folder(tmp_path / "broken", tmp_path / "ours")
    text = str(error.value)
    assert "missing: mlp1.1.weight; nearest: mlp1.1.wait" in text
    assert "unknown: mlp1.1.wait; nearest: mlp1.1.weight" in text
    assert "wrong shape: language_model.model.norm.weight is [63], must be [64]" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "hf"]


def test_a_checkpoint_with_memory_does_not_fit_a_model_without(hf_folder, tmp_path):
    model = families.resolve(to_dict(released(hf_folder).model) | {"memory": None})
    with pytest.raises(ValueError, match=r"unknown: .*gated_cross_attn_layer.*\(layers 1, 3\)"):
        import_folder(hf_folder, tmp_path / "ours", model=model)


def test_settings_that_shapes_do_not_tell_must_agree(hf_folder, tmp_path):
    found = to_dict(released(hf_folder).model)
    found["decoder"] |= {"rope_theta": 1e4, "vocab": 160}
    found["vision"] |= {"drop_path": 0.3}
    with pytest.raises(ValueError) as error:
        import_folder(hf_folder, tmp_path / "ours", model=families.resolve(found))
    assert "model.decoder.rope_theta is 10000.0, there it is 1000000.0" in str(error.value)
    assert "drop_path" not in str(error.value)


def test_a_checkpoint_that_does_not_fit_its_own_config_is_not_exported(hf_folder, tmp_path):
    import_folder(hf_folder, tmp_path / "ours")
    about = json.loads((tmp_path / "ours" / "model.json").read_text())
    about["model"]["decoder"]["mlp_width"] = 97
    about["model"]["vision"]["qk_norm"] = True
    (tmp_path / "ours" / "model.json").write_text(json.dumps(about))
    with pytest.raises(ValueError) as error:
        export_folder(tmp_path / "ours", tmp_path / "back")
    assert "wrong shape: decoder/layers/mlp/up/kernel is [4, 64, 96], must be [4, 64, 97]" in str(error.value)
    assert "missing: vision/layers/attn/q_norm/scale" in str(error.value)
    assert not (tmp_path / "back").exists()


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_alone(hf_folder, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        import_folder(hf_folder, tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("direction", ["in", "out"])
def test_an_interrupted_conversion_leaves_nothing(hf_folder, tmp_path, direction):
    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    import_folder(hf_folder, tmp_path / "ours")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        if direction == "in":
            import_folder(hf_folder, tmp_path / "new", progress=interrupt)
        else:
            export_folder(tmp_path / "ours", tmp_path / "new", progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_without_room_is_told_before_work_starts(hf_folder, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="needs .* MB, but its disk has only"):
        import_folder(hf_folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_disk_that_fails_while_writing(hf_folder, tmp_path, direction):
    """Files may not grow past 10 kB here, which the system reports as it does a full disk."""
    import_folder(hf_folder, tmp_path / "ours")
    source = hf_folder if direction == "in" else tmp_path / "ours"
    limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (10_000, 10_000))"
    call = f"from vlmem_jax.cli.main import main; raise SystemExit(main(['convert', {str(source)!r}, 'new/folder']))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # files of more than 10 kB, which Python would cut off without a word
    done = subprocess.run(
        [sys.executable, "-c", f"{limit}; {call}"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert not list((tmp_path / "new").iterdir())


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_follows_the_largest_leaf(tmp_path):
    """At most 1.3 x the largest stacked leaf + 500 MB, mapped files apart, to and fro, fresh blocks and all."""
    sizes = dict(vocab=32003, width=1024, layers=24, heads=8, kv_heads=4, head_dim=128, mlp_width=4096)
    write_random(tmp_path / "plain", families.resolve(dict(preset="tiny", memory=None, decoder=sizes)))
    bound = 1.3 * 24 * 1024 * 4096 * 2 / 2**20 + 500
    assert peak_mb("import", tmp_path / "plain", tmp_path / "ours") <= bound
    assert peak_mb("export", tmp_path / "ours", tmp_path / "back") <= bound
    before, after = Tensors(tmp_path / "plain"), Tensors(tmp_path / "back")
    total = sum(tensor.nbytes for tensor in after.values())
    assert total / 2**20 > 1.3 * bound, "a checkpoint that would fit as a whole proves nothing"
    named = {name.replace(".decoder_layer.", "."): name for name in after}
    for name, tensor in before.items():
        assert after[named[name]].tobytes() == tensor.tobytes(), name


def write_random(folder: Path, model) -> None:
    folder.mkdir()
    bf16 = np.dtype(ml_dtypes.bfloat16)
    rules = internvl.name_table(model)
    writer = Writer(folder, {name: (rule.shape, bf16) for rule in rules for name in rule.names}, 400_000_000)
    rng = np.random.default_rng(0)
    for tensor in writer.values():
        bits = np.frombuffer(rng.bytes(tensor.nbytes), np.uint16) & 0xBFFF  # none of them NaN or infinity
        tensor.view(np.uint16)[...] = bits.reshape(tensor.shape)
    writer.flush()
    content = write_config(model, ImageConfig(), "bfloat16")
    (folder / "config.json").write_text(json.dumps(content))


def peak_mb(*arguments) -> float:
    """Highest anonymous memory of a process of its own that converts."""
    command = [sys.executable, str(Path(__file__).parent / "memory.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])
