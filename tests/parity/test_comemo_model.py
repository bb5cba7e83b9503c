"""CoMemo's forward pass and greedy decoding against numbers of the published implementation."""

import dataclasses
import functools
from types import SimpleNamespace

import comemo_golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas import rotary_tables
from kernels_pallas.rotary import rotate
from tests.verbs import extended
from vlmem_jax.memory import CoMemoConfig
from vlmem_jax.memory.comemo.blocks import MemoryBlock
from vlmem_jax.models import VLM
from vlmem_jax.nn.attention import AttentionConfig, memory_attention, same_segment
from vlmem_jax.vision.projector import pixel_shuffle

LOGITS = dict(atol=2e-4, rtol=1e-4)
EXACTER = dict(atol=2e-5, rtol=1e-4)


POSITIONS = "length", "continue"
"""The ways to place generated tokens as memory queries."""


@pytest.fixture(scope="module")
def model(golden):
    return comemo_golden.load(golden / "comemo", "full_model")


@pytest.fixture(scope="module")
def programs(model):
    """Compiled functions of the model that reads its memory through an implementation; `prefill` by decode_position."""

    @functools.cache
    def build(implementation):
        config = dataclasses.replace(model.vlm.config, attention=AttentionConfig(implementation))
        vlm = VLM(config)

        def model_of(position):
            comemo = dataclasses.replace(config.memory, decode_position=position)
            return VLM(dataclasses.replace(config, memory=comemo))

        return SimpleNamespace(
            logits=jax.jit(vlm.logits),
            hidden=jax.jit(vlm.hidden),
            prefill=jax.jit(vlm.prefill, static_argnums=2),
            extend={position: jax.jit(functools.partial(extended, model_of(position))) for position in POSITIONS},
        )

    return build


def test_vision_tower_shuffle_and_projector(model):
    a, vlm = model.arrays, model.vlm
    pixels = jnp.asarray(a["pixel_values"].transpose(0, 2, 3, 1))
    modules = vlm._merge(model.params)
    hidden = jax.jit(modules.vision.hidden)(pixels)
    np.testing.assert_allclose(hidden, a["vit_last_hidden"], **EXACTER)
    for version in ("v1", "v2"):
        wanted = a[f"pixel_shuffle_{version}"]
        np.testing.assert_allclose(pixel_shuffle(hidden[:, 1:], version).reshape(wanted.shape), wanted, **EXACTER)
    views = comemo_golden.prompt_batch(a, "plain").views
    features = jax.jit(lambda *given: vlm.see(*given).tokens_BMD)(model.params, views)
    np.testing.assert_allclose(features.reshape(a["vit_embeds"].shape), a["vit_embeds"], **EXACTER)


@pytest.mark.parametrize("implementation", comemo_golden.IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["dhr", "plain"])
def test_prefill_logits(model, programs, mode, implementation):
    run = programs(implementation)
    batch = comemo_golden.prompt_batch(model.arrays, mode)
    np.testing.assert_array_equal(batch.text.positions_BT, model.arrays[f"{mode}/position_ids"])
    np.testing.assert_array_equal(batch.views.positions_BM, model.arrays[f"{mode}/media_position_ids"])
    logits = run.logits(model.params, batch)
    np.testing.assert_allclose(logits, model.arrays[f"{mode}/prefill_logits"], **LOGITS)
    hidden = run.hidden(model.params, batch)
    np.testing.assert_allclose(hidden[0], model.arrays[f"{mode}/hidden_states"][-1], **LOGITS)


@pytest.mark.parametrize("backend", ["tpu_interpret", "gpu_interpret"])
def test_prefill_logits_through_the_kernel_for_packed_rows(model, packed_kernel, backend):
    packed_kernel(backend)
    batch = comemo_golden.prompt_batch(model.arrays, "dhr")
    logits = jax.jit(lambda *given: model.vlm.logits(*given))(model.params, batch)
    np.testing.assert_allclose(logits, model.arrays["dhr/prefill_logits"], **LOGITS)


@pytest.mark.parametrize("mode", ["dhr", "plain"])
@pytest.mark.parametrize("decode_position, prefix", [("length", "gen"), ("continue", "consistent_gen")])
@pytest.mark.parametrize("implementation", comemo_golden.IMPLEMENTATIONS)
def test_greedy_decoding(model, programs, mode, decode_position, prefix, implementation):
    a, run = model.arrays, programs(implementation)
    wanted_tokens, wanted_logits = a[f"{mode}/{prefix}_tokens"], a[f"{mode}/{prefix}_step_logits"]
    batch = comemo_golden.prompt_batch(a, mode)
    capacity = batch.text.tokens_BT.shape[1] + len(wanted_tokens)
    logits, state = run.prefill(model.params, batch, capacity)
    if prefix == "gen":
        assert int(state.length_B[0]) == a[f"{mode}/gen_cross_attn_qpos"][1], "what the memory is asked from"
    for token, wanted in zip(wanted_tokens, wanted_logits, strict=True):
        np.testing.assert_allclose(logits[0], wanted, **LOGITS)
        assert int(logits[0].argmax()) == token
        logits, state = run.extend[decode_position](
            model.params, state, jnp.array([[token]], jnp.int32), jnp.array([1], jnp.int32)
        )


def test_text_only_skips_the_memory(model, programs):
    tokens = model.arrays["text_only_input_ids"][0]
    batch = comemo_golden.text_batch(tokens, np.arange(len(tokens)))
    logits = programs("xla").logits(model.params, batch)
    np.testing.assert_allclose(logits, model.arrays["text_only_logits"], **LOGITS)


def test_dynamic_ntk_changes_self_attention_only(model):
    a, config = model.arrays, model.vlm.config
    short = dataclasses.replace(config.decoder, max_positions=int(a["ntk_max_position_embeddings"]))
    vlm = VLM(dataclasses.replace(config, decoder=short))
    logits = jax.jit(vlm.logits)(model.params, comemo_golden.prompt_batch(a, "plain"))
    np.testing.assert_allclose(logits, a["ntk_plain_prefill_logits"], **LOGITS)


# --- one memory block -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer(golden):
    """A memory block with the golden weights, and the golden arrays."""
    a = dict(np.load(golden / "comemo" / "memory_layer.npz"))
    w = {key.removeprefix("w/"): jnp.asarray(value) for key, value in a.items() if key.startswith("w/")}
    heads, head_dim, width = int(a["num_heads"]), int(a["head_dim"]), a["x"].shape[-1]
    config = CoMemoConfig(every=1, heads=heads, head_dim=head_dim, mlp_width=w["ffn_2.w1.weight"].shape[0])
    block = MemoryBlock(config, width, rngs=nnx.Rngs(0))
    return block, config, block_params(w, heads, head_dim), a


def block_params(w, heads, head_dim):
    """Our parameters of a block from HF names; linear, so that it maps gradients as well."""

    def split(weight):
        return weight.T.reshape(-1, heads, head_dim)

    k, v = jnp.split(w["cross_attn.to_kv.weight"], 2)
    return {
        "attn_gate": w["attn_gate"],
        "mlp_gate": w["ff_gate"],
        "attn_norm": {"scale": w["cross_attention_norm.weight"]},
        "mlp_norm": {"scale": w["ffn_norm_2.weight"]},
        "attn": {
            "q": {"kernel": split(w["cross_attn.to_q.weight"])},
            "k": {"kernel": split(k)},
            "v": {"kernel": split(v)},
            "o": {"kernel": w["cross_attn.to_out.weight"].T.reshape(heads, head_dim, -1)},
        },
        "mlp": {ours: {"kernel": w[f"ffn_2.{name}.weight"].T}
                for ours, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
    }  # fmt: skip


def run_block(layer, params, x, media, segments, implementation="xla"):
    """Output of the block and of its attention before the gate; segments of x and of media."""
    block, config, _, a = layer
    block = nnx.merge(nnx.graphdef(block), params)
    tables = [rotary_tables(jnp.asarray(a[f"{kind}_position_ids"]), config.rope_theta, config.head_dim)
              for kind in ("text", "media")]  # fmt: skip
    k, v = block.keys_values(media)

    def read(q):
        return memory_attention(AttentionConfig(implementation), q, k, v, *tables, *segments)

    has_memory = same_segment(*segments).any(-1)
    return block(x, read, has_memory), block.attn.o(read(block.attn.q(block.attn_norm(x))))


def segments(offsets):
    """Segment ids 1, 2, ... of the slots between cumulative offsets."""
    return jnp.asarray(np.repeat(np.arange(1, len(offsets)), np.diff(offsets))[None], jnp.int32)


def sides(a):
    return segments(a["cu_seqlens_q"]), segments(a["cu_seqlens_k"])


@pytest.mark.parametrize("implementation", comemo_golden.IMPLEMENTATIONS)
def test_block_with_and_without_mask(layer, implementation):
    _, _, params, a = layer
    np.testing.assert_array_equal(same_segment(*sides(a)), a["mask"][:, 0])
    x, media = jnp.asarray(a["x"]), jnp.asarray(a["media"])
    whole = [jnp.ones_like(side) for side in sides(a)]
    run = jax.jit(functools.partial(run_block, layer, implementation=implementation))
    for seen, name in ((whole, "nomask"), (sides(a), "masked"), (sides(a), "varlen")):
        out, attended = run(params, x, media, seen)
        np.testing.assert_allclose(out, a[f"out_{name}"], **EXACTER)
        if name != "varlen":
            np.testing.assert_allclose(attended, a[f"cross_attn_out_{name}"], **EXACTER)


def test_block_rotation(layer):
    block, config, params, a = layer
    block = nnx.merge(nnx.graphdef(block), params)
    normed = block.attn_norm(jnp.asarray(a["x"]))
    np.testing.assert_allclose(normed, a["normed_x"], **EXACTER)
    k, _ = block.keys_values(jnp.asarray(a["media"]))
    for x, kind, name in ((block.attn.q(normed), "text", "q_rot"), (k, "media", "k_rot")):
        tables = rotary_tables(jnp.asarray(a[f"{kind}_position_ids"]), config.rope_theta, config.head_dim)
        np.testing.assert_allclose(rotate(x, tables).swapaxes(1, 2), a[name], **EXACTER)


@pytest.mark.parametrize("implementation", comemo_golden.IMPLEMENTATIONS)
def test_block_gradients(layer, implementation):
    _, config, params, a = layer

    def scalar(params, x, media):
        return (run_block(layer, params, x, media, sides(a), implementation)[0] * a["cotangent"]).sum()

    gradients = jax.jit(jax.grad(scalar, argnums=(0, 1, 2)))(params, jnp.asarray(a["x"]), jnp.asarray(a["media"]))
    names = [key.removeprefix("grad/") for key in a if key.startswith("grad/") and key not in ("grad/x", "grad/media")]
    wanted = block_params({n: jnp.asarray(a[f"grad/{n}"]) for n in names}, int(a["num_heads"]), config.head_dim)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-4), gradients[0], wanted)
    np.testing.assert_allclose(gradients[1], a["grad/x"], atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(gradients[2], a["grad/media"], atol=2e-4, rtol=1e-4)
