"""Every memory on every family: each parameter has its place in a checkpoint, which goes out and comes back."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_gradients import batch
from vlmem_jax import families
from vlmem_jax.checkpoint import save_params
from vlmem_jax.config import to_dict
from vlmem_jax.families import PRESETS, resolve
from vlmem_jax.hub.convert import export_folder, import_folder, released
from vlmem_jax.hub.orbax_io import read_leaves
from vlmem_jax.hub.safetensors_io import Tensors
from vlmem_jax.memory import MEMORIES
from vlmem_jax.models import VLM
from vlmem_jax.train.next_token import next_token_loss
from vlmem_jax.trees import flatten

FAMILIES = {
    "internvl_chat": "tiny",
    "qwen2_5_vl": "tiny_qwen2_5_vl",
    "qwen3_vl": "tiny_qwen3_vl",
    "llava_qwen": "tiny_llava_video",
}
EVERYWHERE = dict(name="first", rank=3, targets=("v", "q", "o", "gate"), vision=("q", "k", "proj", "fc2"))
OURS = dict(name="second", rank=4, dropout=0.1, targets=("q", "k", "v", "o", "gate", "up", "down"))
OTHERS = {
    "internvl_chat": [
        dict(memory=None, vision=dict(norm="rms_norm", qk_norm=True, position_grid=6)),
        dict(memory=dict(kind="comemo", every=3, heads=2, head_dim=20), decoder=dict(layers=4)),
        dict(memory="comemo", adapters=[EVERYWHERE, dict(name="few", rank=2, alpha=3.0, targets=("down",))]),
    ],
    "qwen2_5_vl": [
        dict(memory="comemo", decoder=dict(tied=False)),
        dict(memory="vismem", adapters=[dict(name="seen", targets=(), vision=("k", "up")), OURS]),
        dict(memory=dict(kind="vismem", former="lora_vision", vision_layer=1)),
        dict(memory=dict(kind="vismem", former="tiny_transformer", memory_output="rescaled")),
    ],
    "qwen3_vl": [
        dict(memory="comemo", decoder=dict(tied=False), vision=dict(deep_layers=())),
        dict(memory=dict(kind="vismem", former="lora_vision", vision_layer=1), adapters=[EVERYWHERE]),
    ],
    "llava_qwen": [
        dict(memory=None, vision=dict(newline="none", pool="average")),
        dict(memory="comemo", vision=dict(newline="frame"), adapters=[EVERYWHERE]),
    ],
}
"""Settings that change which parameters there are."""
EVERYTHING = [(family, {"memory": memory}) for family in FAMILIES for memory in ("none", *MEMORIES)]
for family in ("qwen2_5_vl", "qwen3_vl"):
    EVERYTHING.remove((family, {"memory": "vlm2"}))  # their towers do not see frames apart
EVERYTHING += [(family, settings) for family, others in OTHERS.items() for settings in others]


def tiny(family, settings):
    """A model of two layers, with settings of its memory whichever it is."""
    memory = settings["memory"]
    keys = {"kind": memory} if isinstance(memory, str) else memory
    if keys and keys["kind"] == "vismem":
        keys = PRESETS["tiny_qwen2_5_vl"]["memories"]["vismem"] | {"token_ids": (124, 125, 126, 127)} | keys
    decoder = {"layers": 2} | settings.get("decoder", {})
    return resolve({"preset": FAMILIES[family], **settings, "decoder": decoder, "memory": keys})


def stepped(vlm, params):
    """After a step down the gradient of the loss on a batch, in which a memory that speaks does; all of it moves."""
    small, tokens = jax.tree.map(lambda x: 0.1 * x, params), jax.tree.map(jnp.asarray, batch(vlm))

    @jax.jit
    def step(params):
        gradient = jax.grad(lambda params: next_token_loss(vlm, params, tokens, tokens.text.tokens_BT.shape[1]))(params)
        return jax.tree.map(lambda x, g: x - 0.1 * jnp.sign(g), params, gradient)

    after = step(small)
    still = [path for path, x in flatten(after).items() if np.array_equal(x, flatten(small)[path])]
    assert not still
    return after


@pytest.fixture(scope="module", params=EVERYTHING, ids=str)
def there(request, tmp_path_factory):
    """A model, and its parameters as a run keeps them, as they go out, and as they come back."""
    (family, settings), folder = request.param, tmp_path_factory.mktemp("model")
    model, rng = tiny(family, settings), np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16), VLM(model).abstract())
    if isinstance(settings["memory"], str) and len(settings) == 1:
        params = stepped(VLM(model), params)
    save_params(folder / "run" / "finetune" / "7", params)
    image = {} if family == "internvl_chat" else {"max_pixels": 100352}
    about = {"model": to_dict(model), "image": image, "system": None}
    (folder / "run" / "model.json").write_text(json.dumps(about))
    (folder / "run" / "config.json").write_text('{"stages": [{"name": "finetune"}]}')
    export_folder(folder / "run", folder / "hf")
    import_folder(folder / "hf", folder / "back")
    return SimpleNamespace(family=family, model=model, params=params, folder=folder)


def test_every_parameter_has_its_shape_and_every_element_a_place(there):
    """Writing all leaves into empty tensors fills them: nothing is left out, nothing is written twice."""
    rules = families.of_model(there.model).name_table(there.model, None, None)
    shapes = {path: x.shape for path, x in flatten(there.params).items() if not path.startswith("adapters/")}
    assert {rule.ours: rule.our_shape for rule in rules} == shapes
    counts = {name: np.zeros(rule.shape, np.int8) for rule in rules for name in rule.names}
    for rule in rules:
        for name in rule.names:
            rule.view(counts[name])[...] += 1
    assert all((count == 1).all() for count in counts.values())


def test_a_memory_stands_beside_the_tensors_of_the_family(there):
    """They have their names whatever the memory, but where CoMemo is published: InternVL's decoder layers there."""
    plain = families.of_model(there.model).name_table(dataclasses.replace(there.model, memory=None), None, None)
    wanted = {name for rule in plain for name in rule.names}
    if (there.family, there.model.memory_kind) == ("internvl_chat", "comemo"):
        wanted = {re.sub(r"(language_model\.model\.layers\.\d+\.)", r"\1decoder_layer.", name) for name in wanted}
    own = {"none": "nothing", "comemo": ".gated_cross_attn_layer.", "vismem": "vismem.", "vlm2": "vlm2."}
    own = own[there.model.memory_kind]
    found = set(Tensors(there.folder / "hf"))
    assert {name for name in found if own not in name} == wanted
    assert (found == wanted) == (there.model.memory is None)


def test_there_and_back_is_bit_equal(there):
    back = {path: leaf.read(()) for path, leaf in read_leaves(there.folder / "back" / "0" / "params").items()}
    before = flatten(there.params)
    assert back.keys() == before.keys()
    for path, leaf in before.items():
        assert back[path].dtype == jnp.bfloat16 and back[path].tobytes() == np.asarray(leaf).tobytes(), path


def test_memory_and_adapters_come_back_with_their_settings(there):
    imported = json.loads((there.folder / "back" / "model.json").read_text())["model"]
    whole = dataclasses.replace(there.model, compute_dtype="bfloat16")
    assert resolve(imported) == whole
    assert released(there.folder / "hf").model == whole
