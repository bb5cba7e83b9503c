"""Adapters in PEFT's layout. tests/fixtures/peft was written by PEFT itself, around the golden Qwen2.5-VL."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import drawn
from tests.parity import qwen_golden
from vlmem_jax.checkpoint import save_params
from vlmem_jax.config import to_dict
from vlmem_jax.families import resolve
from vlmem_jax.hub import peft
from vlmem_jax.hub.convert import export_folder, import_folder, load_folder
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.hub.safetensors_io import Tensors
from vlmem_jax.models import VLM, AdapterConfig
from vlmem_jax.trees import flatten, unflatten

TESTS = Path(__file__).parents[1]
FIXTURE = TESTS / "fixtures" / "peft"
GOLDEN = TESTS / "golden" / "qwen2_5_vl"  # the set that the fixture was made with


def test_scores_through_an_adapter_are_those_of_peft():
    base = qwen_golden.load(GOLDEN)
    adapter, leaves = peft.read_adapter(FIXTURE, base.vlm.config, "theirs")
    assert (adapter.targets, adapter.vision) == (("q", "v", "o", "down"), ("q", "k", "v", "proj"))
    vlm = VLM(dataclasses.replace(base.vlm.config, adapters=(adapter,)))
    params = base.params | {"adapters": {"theirs": unflatten({path: jnp.asarray(x) for path, x in leaves.items()})}}
    arrays = dict(np.load(GOLDEN / "image.npz"))
    batch = qwen_golden.batch(vlm, qwen_golden.rows(arrays, base.content, vlm.config.vision.geometry))
    wanted = np.load(FIXTURE / "logits.npz")["logits"][0]
    found = jax.jit(vlm.logits)(params, batch)[0, : len(wanted)]
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert np.abs(wanted - arrays["logits"][0]).max() > 1


@pytest.fixture(scope="module", params=["tiny", "tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def run(request, tmp_path_factory):
    """A checkpoint with two adapters."""
    folder = tmp_path_factory.mktemp("run")
    adapters = [dict(name="one", rank=3, targets=("q", "v", "up"), vision=("q", "v")), dict(name="two", targets=("o",))]
    model = resolve({"preset": request.param, "memory": None, "decoder": {"layers": 2}, "adapters": adapters})
    save_params(folder / "0", drawn.random_params(VLM(model)))
    (folder / "model.json").write_text(json.dumps({"model": to_dict(model), "image": {}, "system": None}))
    export_folder(folder, folder / "hf")
    return folder


def model_of(folder):
    return resolve(json.loads((folder / "model.json").read_text())["model"])


def test_a_linear_map_that_is_three_of_ours_has_blocks_of_a_larger_rank(run):
    content = json.loads((run / "hf" / "adapters" / "one" / "adapter_config.json").read_text())
    tensors = Tensors(run / "hf" / "adapters" / "one", "adapter_model")
    fused = {name.split(".")[-3]: x.shape for name, x in tensors.items() if x.shape[0] != 3 and "lora_A" in name}
    names = {"qkv"} | ({"wqkv"} if "wqkv" in "".join(tensors) else set())
    assert {name: shape[0] for name, shape in fused.items()} == dict.fromkeys(names, 6)
    assert set(content["rank_pattern"].values()) == {6} and set(content["alpha_pattern"].values()) == {64.0}
    assert content["r"] == 3 and "layers" in content["target_modules"]


def test_what_another_library_writes_of_three_in_one_is_an_adapter_of_each(run, tmp_path):
    """Without our words, A is shared; written again it is the same file, bit by bit."""
    model, folder = model_of(run), tmp_path / "plain"
    shutil.copytree(run / "hf" / "adapters" / "one", folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    del content[peft.KEY]
    for key, value in (("r", 6), ("lora_alpha", 64.0)):  # as if all had the larger rank
        content[key] = value
    content["rank_pattern"] = {r".*(up_proj|w3|q_proj|v_proj)": 3}
    content["alpha_pattern"] = {r".*(up_proj|w3|q_proj|v_proj)": 32.0}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    adapter, leaves = peft.read_adapter(folder, model, "plain")
    assert (adapter.rank, adapter.vision[:3]) == (6, ("q", "k", "v")) and not leaves["vision/k/b"].any()
    np.testing.assert_array_equal(leaves["vision/q/a"], leaves["vision/v/a"])
    peft.write_adapter(tmp_path / "again", dataclasses.replace(model, adapters=(adapter,)), adapter, leaves)
    again = Tensors(tmp_path / "again", "adapter_model")
    for name, x in Tensors(folder, "adapter_model").items():
        rows = (slice(len(x)), slice(x.shape[1]))  # ours have one rank, zeros behind the smaller
        np.testing.assert_array_equal(again[name][rows], x)
        assert not np.delete(np.delete(again[name], np.s_[: len(x)], 0), np.s_[: x.shape[1]], 1).any()


def test_a_merged_export_is_the_model_through_the_adapter(run, tmp_path):
    vlm = VLM(model_of(run))
    export_folder(run, tmp_path / "hf", merge="one")
    assert not (tmp_path / "hf" / "adapters").exists()
    plain = dataclasses.replace(vlm.config, adapters=())
    found = flatten(from_arrays(plain, dict(Tensors(tmp_path / "hf"))))
    base = flatten(from_arrays(plain, dict(Tensors(run / "hf"))))
    moved = {path for path in base if not np.array_equal(found[path], base[path])}
    own = {"vision/layers/attn/qkv/kernel"} | {f"decoder/layers/{x}/kernel" for x in ("attn/q", "attn/v", "mlp/up")}
    assert moved == own
    with pytest.raises(ValueError, match="the model has the adapters one, two, and no three to merge"):
        export_folder(run, tmp_path / "no", merge="three")


def test_an_adapter_joins_a_checkpoint_and_others_start_fresh(run, tmp_path):
    """A flag of the conversion adds one; a config takes those of SOURCE/adapters, or has new ones."""
    model = model_of(run)
    shutil.copytree(run / "hf" / "adapters" / "two", tmp_path / "third")
    import_folder(run / "hf", tmp_path / "ours", adapters=[tmp_path / "third"])
    names = [adapter.name for adapter in model_of(tmp_path / "ours").adapters]
    assert names == ["one", "two", "third"]
    new = AdapterConfig("new", rank=2, targets=("k",))
    vlm = VLM(dataclasses.replace(model, adapters=(new, model.adapters[1])))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_folder(run / "hf", vlm, jax.tree.map(lambda _: here, vlm.abstract()))
    assert jax.tree.structure(params) == jax.tree.structure(vlm.abstract())
    assert (
        params["adapters"]["new"]["decoder"]["k"]["a"].any()
        and not params["adapters"]["new"]["decoder"]["k"]["b"].any()
    )
    other = VLM(dataclasses.replace(model, adapters=(dataclasses.replace(model.adapters[1], rank=5),)))
    with pytest.raises(ValueError, match="model.adapters .* must be those in"):
        load_folder(run / "hf", other, jax.tree.map(lambda _: here, other.abstract()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save must be None"),
        ({"use_dora": True}, "use_dora must be False"),
        ({"r": 8}, "the rank of .* is 3, but adapter_config.json says 8"),
        ({"lora_alpha": 7}, "alpha / rank must be the same for all of its maps"),
    ],
)
def test_what_is_not_supported_is_named(run, tmp_path, change, message):
    folder = tmp_path / "one"
    shutil.copytree(run / "hf" / "adapters" / "one", folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=f"{folder} is no adapter for this model: .*{message}"):
        peft.read_adapter(folder, model_of(run), "one")


def test_an_adapter_of_another_model_is_refused(run):
    with pytest.raises(ValueError, match="pairs too many, or not one in each layer, such as|must map"):
        peft.read_adapter(FIXTURE, model_of(run), "theirs")
    with pytest.raises(ValueError, match="an adapter is a folder with adapter_config.json, as PEFT writes it"):
        peft.read_adapter(run, model_of(run), "run")


@pytest.mark.parametrize("text, message", [("{", "is no JSON"), ("[]", "must hold a JSON object, got a list")])
def test_a_damaged_file_is_named(run, tmp_path, text, message):
    folder = tmp_path / "hf"
    shutil.copytree(run / "hf", folder)
    (folder / "adapters" / "one" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"one/adapter_config.json {message}"):
        import_folder(folder, tmp_path / "ours")
