"""The page docs/memory.md runs: its memory trains, answers, and goes out and back."""

import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import drawn
from tests.train import world
from vlmem_jax import memory
from vlmem_jax.cli.main import main
from vlmem_jax.families import resolve
from vlmem_jax.hub.orbax_io import read_leaves
from vlmem_jax.hub.safetensors_io import Tensors
from vlmem_jax.models import VLM
from vlmem_jax.trees import from_host, get_row, put_row, to_host
from vlmem_jax.types import Batch, Text

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "memory.md").read_text()
FILES = dict(re.findall(r"`(\S+\.py)`[^`]*?:\n\n```python\n(.*?)```", PAGE, re.S))
MODULE = "vlmem_jax.memory.gist"


@pytest.fixture(scope="module")
def gist():
    """The memory of the page, in its place in the package for as long as this file is tested."""
    module = types.ModuleType(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, MODULE, module)
        exec(compile(FILES["vlmem_jax/memory/gist.py"], "docs/memory.md", "exec"), module.__dict__)
        patch.setitem(memory.MEMORIES, module.Gist.config_type.kind, module.Gist)
        yield module


def test_the_line_is_that_of_the_package_and_one_name_more():
    [line] = [line for line in Path(memory.__file__).read_text().splitlines() if line.startswith("MEMORIES")]
    assert FILES["vlmem_jax/memory/__init__.py"].strip() == line.replace("VLM2)", "VLM2, Gist)")


@pytest.fixture(scope="module")
def folder(gist, tmp_path_factory):
    """The folder in which the page's commands have run, on the pictures of tests, with few steps."""
    folder = tmp_path_factory.mktemp("guide")
    data = world.make(folder / "runs" / "demo" / "dataset")
    shown = data / "images" / "heldout" / "1x1_00000.png"
    shown.parent.mkdir(parents=True)
    shutil.copy(data / "0.png", shown)
    (folder / "configs" / "tiny").mkdir(parents=True)
    (folder / "configs" / "tiny" / "gist.py").write_text(FILES["configs/tiny/gist.py"])
    (folder / "configs" / "tiny" / "comemo.py").write_text((ROOT / "configs" / "tiny" / "comemo.py").read_text())
    small = [
        *(f"--config.data.{key}={value}" for key, value in dict(eval=[], pack_tiles=16).items()),
        f"--config.data.train.0.path={data / 'train.jsonl'}", "--config.stages.finetune.steps=2",
        "--config.model.decoder.layers=2",
    ]  # fmt: skip
    [commands] = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands.splitlines():
            words = shlex.split(command)[1:]
            more = {"train": small, "generate": ["--max-new-tokens", "3"]}.get(words[0], [])
            assert main([*words, *more]) == 0, command
    return folder


def test_the_commands_of_the_page_run_and_the_memory_comes_back(folder):
    assert {"gist.0.map.weight", "gist.0.gate"} <= set(Tensors(folder / "export" / "gist"))
    [step] = (folder / "runs" / "gist" / "finetune").glob("2/params")
    before, after = (read_leaves(path) for path in (step, folder / "runs" / "gist_again" / "0" / "params"))
    assert before.keys() == after.keys() and "memory/readers/gate" in before
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf.read(()), after[path].read(()))


@pytest.fixture(scope="module", params=["tiny", "tiny_qwen2_5_vl"])
def model(gist, request):
    layers = {"decoder": {"layers": 2}, "vision": {"layers": 2}}
    vlm = VLM(resolve({"preset": request.param, "memory": {"kind": "gist", "every": 1}, **layers}))
    return vlm, drawn.random_params(vlm)


def prompts(vlm, rows=2, tokens=12, tiles=2) -> Batch:
    """Rows of visual tokens and then text."""
    rng, M = np.random.default_rng(1), tiles * vlm.tokens_per_tile
    b = Batch.empty((rows,), tokens + M, tiles, vlm.tile)
    b.text.tokens_BT[:] = rng.integers(3, 100, b.text.tokens_BT.shape)
    b.text.segments_BT[:], b.views.segments_BM[:] = 1, 1
    b.text.visual_index_BT[:, :M] = np.arange(M)
    b.text.positions_BT[:] = np.arange(tokens + M).reshape(-1, *(1,) * (b.text.positions_BT.ndim - 2))
    b.views.pixels_BISSc[:] = rng.integers(0, 256, b.views.pixels_BISSc.shape)
    if b.views.layout_BI4 is not None:
        b.views.layout_BI4[..., :2] = 1
    return jax.tree.map(jnp.asarray, b)


def test_token_by_token_is_as_read_at_once_and_its_state_is_handled_by_its_axes(gist, model):
    (vlm, params), steps = model, 2
    batch = prompts(vlm)
    whole = jax.jit(vlm.logits)(params, batch)
    short = Batch(jax.tree.map(lambda x: x[:, :-steps], batch.text), batch.views)
    found, state = jax.jit(vlm.prefill, static_argnums=2)(params, short, batch.text.tokens_BT.shape[1])
    assert isinstance(state.memory, gist.Kept)
    moved = put_row(state.memory, get_row(state.memory, 1), 0)
    np.testing.assert_array_equal(moved.mean_BD, np.stack([state.memory.mean_BD[1]] * 2))
    saved = from_host(state.memory, to_host(state.memory))
    np.testing.assert_array_equal(saved.mean_BD, state.memory.mean_BD)

    @jax.jit
    def step(state, tokens_B):
        hidden, state = vlm.extend(params, state, Text.first(tokens_B[:, None], jnp.ones(2, jnp.int32)))
        return vlm.score(params, hidden), state

    for n in range(steps, -1, -1):
        np.testing.assert_allclose(found, whole[:, -n - 1], atol=2e-5 * np.abs(whole).max())
        if n:
            found, state = step(state, batch.text.tokens_BT[:, -n])


def test_a_fresh_memory_changes_nothing_and_an_open_one_does(model):
    vlm, params = model
    batch, read = prompts(vlm), jax.jit(vlm.logits)
    shut = params | {"memory": {"readers": params["memory"]["readers"] | {"gate": jnp.zeros((2, 1))}}}
    plain = VLM(resolve({"preset": "tiny" if vlm.tile.axes == 1 else "tiny_qwen2_5_vl", "memory": None,
                         "decoder": {"layers": 2}, "vision": {"layers": 2}}))  # fmt: skip
    without = jax.jit(plain.logits)({name: part for name, part in params.items() if name != "memory"}, batch)
    np.testing.assert_array_equal(read(shut, batch), without)
    assert np.abs(read(params, batch) - without).max() > 0.01


def test_an_unknown_memory_is_named_with_those_there_are(gist):
    with pytest.raises(ValueError, match="memory.kind must be one of comemo, vismem, vlm2, gist; got 'gits'"):
        resolve({"preset": "tiny", "memory": "gits"})
