"""Weights from gradients against weights as they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kernels_pallas.rotary import rotate
from tests.drawn import random_params
from vlmem_jax.demo import attention
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.families import resolve
from vlmem_jax.generate import LoadedModel
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.memory.comemo import blocks
from vlmem_jax.models import VLM
from vlmem_jax.nn.attention import same_segment
from vlmem_jax.processing import ImageConfig, TileProcessor, Tokenizer
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings
from vlmem_jax.types import TileGeometry


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    vlm = VLM(resolve({"preset": "digits"}))
    params = random_params(vlm)
    blocks = params["memory"]["blocks"]
    blocks["attn_gate"][:], blocks["mlp_gate"][:] = 0.4, -0.3
    params = jax.device_put(params, param_shardings(make_mesh(MeshConfig()), vlm.abstract(), vlm.axes()))
    processor = TileProcessor(Tokenizer.load(folder), ImageConfig(dhr_map="raster"), TileGeometry(24, 3), "")
    return LoadedModel(vlm, params, processor, make_mesh(MeshConfig()))


def test_weights_of_the_memory_are_those_of_its_softmax(model, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 48, 3), np.uint8)
    sample = model.processor.prompt("In image 1, which digit is at row 1, column 5?", [Image.fromarray(pixels)])
    seen = attention.last_token(model, sample)

    recorded = []

    def read(config, q_BTHC, k_BMHC, v_BMHC, q_tables, k_tables, segments_BT, segments_BM):
        q_BTHC, k_BMHC = rotate(q_BTHC, q_tables), rotate(k_BMHC, k_tables)
        scores = jnp.einsum("BTHC,BMHC->BHTM", q_BTHC, k_BMHC) / np.sqrt(q_BTHC.shape[-1])
        allowed_BTM = same_segment(segments_BT, segments_BM)
        weights = jax.nn.softmax(jnp.where(allowed_BTM[:, None], scores, -jnp.inf), axis=-1)
        jax.debug.callback(lambda last: recorded.append(np.asarray(last)), weights[0, :, len(sample.tokens_T) - 1])
        return jnp.einsum("BHTM,BMHC->BTHC", weights, v_BMHC)

    monkeypatch.setattr(blocks, "memory_attention", read)
    batch = pad_prompts([sample], 1, model.vlm.tile)
    jax.block_until_ready(jax.jit(model.vlm.hidden)(jax.device_get(model.params), jax.tree.map(jnp.asarray, batch)))
    jax.effects_barrier()
    M = len(sample.visual_positions_M)
    np.testing.assert_allclose(seen.memory_LHM, np.stack(recorded)[..., :M], atol=1e-5)
    np.testing.assert_allclose(seen.memory_LHM.sum(-1), 1, atol=1e-5)
    assert seen.context_LHM.shape == (4, 3, M)
    assert (seen.context_LHM >= 0).all() and (seen.context_LHM.sum(-1) < 1).all()
