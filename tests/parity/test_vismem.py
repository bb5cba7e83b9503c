"""VisMem against numbers of the published modules, and of a generation loop with the published semantics."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vismem_golden
from flax import nnx
from vismem_golden import TRACES, part

from tests.verbs import extended
from vlmem_jax.runtime.shapes import bucket
from vlmem_jax.types import Batch, FormationInputs

LOGITS = dict(atol=2e-4, rtol=1e-4)
STATES = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def model(golden):
    """The golden model with one of the formers; made once."""
    return functools.cache(functools.partial(vismem_golden.load, golden))


@pytest.fixture(scope="module")
def memory(model):
    """Its memory as a module."""
    return lambda *of: model(*of).vlm._merge(model(*of).params).memory


@pytest.fixture(scope="module")
def queries(memory):
    """The query builder, which is the same whatever the former."""
    return jax.jit(lambda *x: memory().query_builder(*x))


def heard(states_BLD, kind: int) -> FormationInputs:
    states = jnp.asarray(states_BLD)[:, None]
    return FormationInputs(states, jnp.full((len(states), 1), states.shape[2]), jnp.full((len(states), 1), kind))


# --- modules ----------------------------------------------------------------------------------------------------------


def test_each_layer_of_the_query_builder(model, memory):
    file, builder = model().files["query_builder"], memory().query_builder
    x = jnp.asarray(file["H"])
    L, K = x.shape[1], len(file["w.q_init"])
    queries = builder.q_init[...] + builder.pos_emb[L : L + K]
    x = jnp.concatenate([x + builder.pos_emb[:L], jnp.broadcast_to(queries, (len(x), *queries.shape))], axis=1)
    seen = np.isfinite(file["attn_mask"])
    padded = seen & ~np.pad(file["key_padding_mask"], ((0, 0), (0, K)))[:, None]
    graph, layers = nnx.split(builder.encoder.layers)
    layer = jax.jit(lambda n, *x: nnx.merge(graph, jax.tree.map(lambda leaf: leaf[n], layers))(*x))
    cases = ("layer", np.broadcast_to(seen, padded.shape), "Q"), ("layer_masked", padded, "Q_masked")
    for name, allowed, output in cases:
        y = x
        for n in range(model().vlm.config.memory.query_builder.layers):
            y = layer(n, y, jnp.asarray(allowed))
            np.testing.assert_allclose(y, file[f"{name}_{n}"], **STATES)
        np.testing.assert_allclose(builder.encoder.norm(y)[:, L:], file[output], **STATES)


def test_queries(model, queries):
    file = model().files["query_builder"]
    states, lengths = jnp.asarray(file["H"]), (file["key_padding_mask"] == 0).sum(-1)
    everything = jnp.full(len(states), states.shape[1])
    np.testing.assert_allclose(queries(states, everything), file["Q"], **STATES)
    # learned positions go by true length, whatever the padding: there the file is what must not be
    padded = queries(states, jnp.asarray(lengths))
    [short] = np.flatnonzero(lengths < states.shape[1])
    alone = queries(states[short : short + 1, : lengths[short]], jnp.asarray(lengths[short : short + 1]))
    np.testing.assert_allclose(padded[short : short + 1], alone, **STATES)
    assert np.abs(padded[short] - file["Q_masked"][short]).max() > 0.1


@pytest.mark.parametrize(
    "name, of",
    [
        ("tiny_memory_former", ("tiny_transformer",)),
        ("lora_former_qv", ("lora_llm",)),
        ("lora_former_qkvo", ("lora_llm", "vision_encoder", "qkvo")),
    ],
)
def test_formers(model, queries, name, of):
    found, file = model(*of), model(*of).files[name]
    modules, lengths = found.vlm._merge(found.params), jnp.full(len(file["X"]), file["X"].shape[1])
    np.testing.assert_allclose(queries(jnp.asarray(file["X"]), lengths), file["Q"], **STATES)
    form = jax.jit(lambda heard: modules.memory.form(heard, found.vlm._decode(modules)))
    for kind, wanted in enumerate((file["M_short"], file["M_long"])):
        np.testing.assert_allclose(form(heard(file["X"], kind))[:, 0, : wanted.shape[1]], wanted, **STATES)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced(model):
    """A file's model, prompts, and traces."""

    def load(name):
        found = model(*TRACES[name])
        arrays = found.files[name]
        return found, vismem_golden.rows(found, arrays), vismem_golden.traces(name, arrays)

    return load


@functools.cache
def compiled(vlm):
    """The compiled parts of decoding: to extend rows, to form memories, and to build queries."""
    builder = jax.jit(lambda params, *x: vlm._merge(params).memory.query_builder(*x))
    return jax.jit(functools.partial(extended, vlm)), jax.jit(vlm.form, static_argnums=4), builder


@functools.cache
def scored(vlm):
    """Scores and hidden states of a batch."""
    return jax.jit(lambda *x: (vlm.logits(*x), vlm.hidden(*x)))


@pytest.mark.parametrize("name", TRACES)
def test_the_engine_gives_the_recorded_tokens(traced, name):
    """All prompts of a file side by side, and each alone; with the log-probabilities that the recorded scores have."""
    found, prompts, traces = traced(name)
    longest, forced = max(trace.sampled for trace in traces), max(len(trace.forced) for trace in traces)
    engine = vismem_golden.engine(found, prompts, longest, forced)
    asked = vismem_golden.requests(found, prompts, traces)
    groups = [list(range(len(traces)))] + [[n] for n in range(len(traces))] * (len(traces) > 1)
    for group in groups:
        handles = [engine.submit(asked[n]) for n in group]
        for n, handle in zip(group, handles, strict=True):
            trace = traces[n]
            assert handle.result() == trace.emitted
            scores = jax.nn.log_softmax(jnp.asarray(trace.logits).at[:, jnp.array(found.ids)].set(-jnp.inf))
            calls = np.flatnonzero(np.isin(trace.kinds, (1, 3)))
            for call, token, logp in zip(calls, handle.tokens, handle.logp, strict=True):
                drawn = trace.kinds[call] == 1 and token not in found.ids
                np.testing.assert_allclose(logp, scores[call - 1, token] if drawn else np.nan, atol=2e-4)
            for each, wanted in zip(handle.invocations, trace.invocations, strict=True):
                assert each.kind == wanted["kind"]
                assert len(each.states_LD) == wanted["num_visual"] + wanted["num_text"]
                np.testing.assert_allclose(each.states_LD, wanted["H"][0], **STATES)


@pytest.mark.parametrize("name", TRACES)
def test_scores_positions_and_memories_step_by_step(traced, name):
    found, prompts, traces = traced(name)
    speech, longest = found.vlm.speech, max(trace.sampled for trace in traces)
    extend, form, builder = compiled(found.vlm)
    for prompt, trace in zip(prompts, traces, strict=True):
        logits, state = vismem_golden.read(found, prompt, longest)
        np.testing.assert_allclose(logits[0], trace.logits[0], **LOGITS)
        ids, memories, n = iter(trace.emitted), iter(trace.invocations), 1
        while n < len(trace.kinds):
            assert trace.kinds[n] == 1 and state.position_B[0] == trace.positions[n]
            token = next(ids)
            logits, state = extend(found.params, state, jnp.full((1, 1), token), jnp.ones(1, jnp.int32))
            np.testing.assert_allclose(logits[0], trace.logits[n], **LOGITS)
            n += 1
            if token not in speech.invoke_ids:
                continue
            wanted = next(memories)
            kind = speech.invoke_ids.index(token)
            kind = 1 - kind if trace.calls.reverse_types else kind
            assert kind == wanted["kind"]
            size = bucket(int(wanted["num_text"]), vismem_golden.TEXT)
            latents, heard = form(found.params, state, jnp.zeros(1, jnp.int32), jnp.full(1, kind), size)
            length = heard.lengths_BJ[0]
            queries = builder(found.params, heard.states_BJLD[0], length)
            np.testing.assert_allclose(heard.states_BJLD[0, :, : int(length[0])], wanted["H"], **STATES)
            np.testing.assert_allclose(queries, wanted["Q"], **STATES)
            slots = speech.lengths[kind]
            np.testing.assert_allclose(latents[:, :slots], wanted["M"], **STATES)
            np.testing.assert_array_equal(trace.kinds[n : n + slots + 1], [2] * slots + [3])
            first = int(state.position_B[0])
            np.testing.assert_array_equal(trace.positions[n : n + slots + 1], first + np.arange(slots + 1))
            tokens = np.zeros((1, speech.latents + 1), np.int32)
            tokens[0, slots] = end = next(ids)
            assert end == speech.end_ids[kind]
            logits, state = extend(
                found.params, state, jnp.asarray(tokens), jnp.full(1, slots + 1), latents, jnp.full(1, slots)
            )
            n += slots + 1
            np.testing.assert_allclose(logits, wanted["logits_after_end"], **LOGITS)
            np.testing.assert_allclose(logits[0], trace.logits[n - 1], **LOGITS)
        assert list(ids) == list(memories) == []


def written(vlm, prompt: Batch, length: int, pieces: list, states: list[tuple[np.ndarray, int]]) -> Batch:
    """The prompt in the first row of a batch with tokens, or numbers of latent ones, behind it; from what these were
    formed."""
    speech, M = vlm.speech, prompt.views.segments_BM.shape[1]
    ids, slots, time = [], [], itertools.count()
    for piece in pieces:
        if isinstance(piece, tuple):  # (count,) of latent tokens
            first = M + next(time) * speech.latents
            slots += range(first, first + piece[0])
            ids += [0] * piece[0]
        else:
            ids.append(piece)
            slots.append(-1)
    T = length + len(ids)
    arrays = {name: np.array(x) for part in vars(prompt).values() for name, x in vars(part).items() if x is not None}
    for name in ("tokens_BT", "visual_index_BT", "segments_BT", "positions_BT", "targets_BT", "weights_BT"):
        wide = np.zeros((1, T, *arrays[name].shape[2:]), arrays[name].dtype)
        wide[:, :length] = arrays[name][:, :length]
        arrays[name] = wide
    arrays["tokens_BT"][0, length:], arrays["visual_index_BT"][0, length:] = ids, slots
    arrays["segments_BT"][0, length:] = 1
    after = arrays["positions_BT"][0, :length].max() + 1
    arrays["positions_BT"][0, length:] = (after + np.arange(len(ids)))[:, None]
    longest = max(len(x) for x, _ in states)
    heard = FormationInputs(
        jnp.stack([jnp.pad(x, ((0, longest - len(x)), (0, 0))) for x, _ in states])[None],
        jnp.array([[len(x) for x, _ in states]]),
        jnp.array([[kind for _, kind in states]]),
    )
    return Batch.of(**jax.tree.map(jnp.asarray, arrays), formation=heard)


@pytest.mark.parametrize("name", TRACES)
def test_a_training_forward_gives_the_scores_of_the_trace(traced, name):
    """Of every token, latent ones too, from what was heard."""
    found, prompts, traces = traced(name)
    both = scored(found.vlm)
    for prompt, trace in zip(prompts, traces, strict=True):
        ids, memories, pieces, places = iter(trace.emitted), iter(trace.invocations), [], []
        kinds = itertools.groupby(trace.kinds[1:].tolist())
        for kind, calls in kinds:
            count = len(list(calls))
            if kind == 2:
                places.append(len(pieces) + sum(piece[0] - 1 for piece in pieces if isinstance(piece, tuple)))
                pieces.append((count,))
            else:
                pieces += itertools.islice(ids, count)
        states = [(each["H"][0], int(each["kind"])) for each in trace.invocations]
        length = len(prompt.tokens_T)
        one = vismem_golden.qwen_golden.batch(found.vlm, [prompt])
        logits, hidden = both(found.params, written(found.vlm, one, length, pieces, states))
        np.testing.assert_allclose(logits[0, length - 1 :], trace.logits, **LOGITS)
        for place, wanted in zip(places, memories, strict=True):
            slots = wanted["memory_hidden"].shape[1]
            at = length + place
            np.testing.assert_allclose(hidden[:, at : at + slots], wanted["memory_hidden"], **LOGITS)


# --- training ---------------------------------------------------------------------------------------------------------


def test_supervised_step_of_stage_one(model):
    """[prompt, call, memory, end, target] with a short memory of the vision tower's states: loss and gradients."""
    found = model("lora_llm", "vision_encoder")
    file, vlm, (invoke, end) = found.files["stage1_supervised"], found.vlm, found.ids[:2]
    [prompt] = vismem_golden.rows(found, file)
    (_, state), length = vismem_golden.read(found, prompt, 1), len(prompt.tokens_T)
    extend, form, _ = compiled(vlm)
    _, state = extend(found.params, state, jnp.full((1, 1), invoke), jnp.ones(1, jnp.int32))
    latents, heard = form(found.params, state, jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), vismem_golden.TEXT)
    count = int(heard.lengths_BJ[0, 0])
    np.testing.assert_allclose(heard.states_BJLD[:, 0, :count], file["X"], **STATES)
    slots = file["M"].shape[1]
    np.testing.assert_allclose(latents[:, :slots], file["M"], **STATES)

    targets = file["target_ids"][0].tolist()
    one = vismem_golden.qwen_golden.batch(vlm, [prompt])
    states = [(heard.states_BJLD[0, 0, :count], 0)]
    with_memory = written(vlm, one, length, [invoke, (slots,), end, *targets], states)

    def loss(memory, batch):
        logits = vlm.logits(found.params | {"memory": memory}, batch)[0, -len(targets) - 1 : -1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(targets)).mean(), logits

    memory = found.params["memory"]
    (value, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(memory, with_memory)
    np.testing.assert_allclose(value, file["loss_mem"], rtol=1e-5)
    np.testing.assert_allclose(logits, file["target_logits"], **LOGITS)
    without = written(vlm, one, length, targets, states)
    np.testing.assert_allclose(jax.jit(loss)(memory, without)[0], file["loss_base"], rtol=1e-5)

    wanted = part(file, "grad.")
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-3)
    builder = gradient["query_builder"]
    close(builder["q_init"], wanted["qb.q_init"])
    close(builder["encoder"]["norm"]["scale"], wanted["qb.ln.weight"])
    close(gradient["short"]["m_init"], wanted["m_init_short"][0])
    packed = wanted["qb.encoder.layers.0.self_attn.in_proj_weight"]
    attn, heads = builder["encoder"]["layers"]["attn"], vlm.config.memory.query_builder.heads
    for n, name in enumerate("qkv"):
        kernel, _ = vismem_golden.projection(packed, np.zeros(len(packed)), n, heads)
        close(attn[name]["kernel"][0], kernel)
    for target, both in vismem_golden.adapters(part(wanted, "short.")).items():
        for which, value in both.items():
            close(gradient["short"]["lora"][target][which], value)
            assert np.abs(value).max() > 1e-5
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["long"]))
