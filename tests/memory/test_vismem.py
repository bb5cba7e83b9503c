"""What holds for VisMem whatever its sizes: rows apart, tokens in their place, bounds, a base that stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.memory.vismem_world import GREEDY, NEW, ROWS, RULE, SAMPLED, calls
from tests.verbs import embeddings, extended, read, written
from vlmem_jax.checkpoint import load_params, save_params
from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row
from vlmem_jax.families import resolve
from vlmem_jax.generate import Generator, InvocationConfig
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.memory.vismem.latent import ROWS_NOISE, kept
from vlmem_jax.models import VLM
from vlmem_jax.nn.encoder import EncoderConfig
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings
from vlmem_jax.train.config import StageConfig
from vlmem_jax.train.next_token import next_token_loss
from vlmem_jax.train.stages import Split
from vlmem_jax.trees import flatten
from vlmem_jax.types import Batch, FormationInputs

# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RULE, InvocationConfig("delimiter_random", 0.4, 0.1)], ids=["forced", "chance"])
def test_a_row_beside_others_equals_that_row_alone(answers, prompts, speech, forced, config):
    given = forced if config is RULE else [[]] * len(prompts)
    keys = list(range(len(prompts)))
    together = answers(prompts, SAMPLED, config, given, keys)
    for row, prompt in enumerate(prompts):
        [alone] = answers([prompt], SAMPLED, config, given[row : row + 1], keys[row : row + 1])
        assert alone.tokens == together[row].tokens
        np.testing.assert_allclose(alone.logp, together[row].logp, atol=1e-5)
    ids = {token for row in together for token in row.tokens}
    assert ids >= set(speech.end_ids)


def test_every_call_is_followed_by_the_end_of_its_kind(answers, prompts, forced, speech):
    found = answers(prompts, GREEDY, RULE, forced, record=True)
    for row, handle in enumerate(found):
        ids, given = handle.tokens, {place: token for place, token in enumerate(forced[row]) if token >= 0}
        assert len(ids) == NEW + len(given)
        for n, token in enumerate(ids):
            if token in speech.invoke_ids:
                assert ids[n + 1] == speech.end_ids[speech.invoke_ids.index(token)]
            # neither what was forced nor an end was drawn
            assert np.isnan(handle.logp[n]) == (token in (*speech.invoke_ids, *speech.end_ids))
    assert [[each.kind for each in handle.invocations] for handle in found] == [[0], [1, 0], [], [1, 0]]
    for prompt, handle in zip(prompts, found, strict=True):
        ids, memories, decode = handle.tokens, handle.invocations, handle.row.decode
        assert [ids[each.place] for each in memories] == [speech.end_ids[each.kind] for each in memories]
        # the cache holds prompts, tokens and latent tokens, and no more
        grown = len(ids) + sum(each.latents for each in memories)
        assert decode.length_B == handle.length == len(prompt.tokens_T) + grown
        assert decode.position_B == prompt.positions_T.max() + 1 + grown


def test_kinds_can_be_reversed_and_switched_off(answers, prompts, forced, speech):
    def ends(**changes):
        found = answers(prompts, GREEDY, dataclasses.replace(RULE, **changes), forced)
        ended = [[t for t in handle.tokens if t in speech.end_ids] for handle in found]
        return ended, [[each.kind for each in handle.invocations] for handle in found]

    short, long = speech.end_ids
    assert ends() == ([[short], [long, short], [], [long, short]], [[0], [1, 0], [], [1, 0]])
    assert ends(reverse_types=True)[0] == [[long], [short, long], [], [short, long]]
    assert ends(disabled=("short",)) == ([[], [long], [], [long]], [[], [1], [], [1]])
    assert ends(disabled=("long",))[0] == [[short], [short], [], [short]]
    assert ends(disabled=("short", "long"))[1] == [[], [], [], []]


def test_memories_change_what_follows(answers, prompts, speech):
    """Of both kinds; else the tests above would show nothing."""
    one = [prompts[0]] * 3
    found = answers(one, GREEDY, RULE, [[], calls(speech, (0, 0)), calls(speech, (0, 1))])
    plain, short, long = (handle.tokens for handle in found)
    assert plain[1:] != short[2:][: len(plain) - 1] != long[2:][: len(plain) - 1] != plain[1:]


# --- who calls --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eager(vlm, params):
    """A model that would choose tokens of the memory all the time: those that end one, then those that call."""
    calling, ending = jax.random.normal(jax.random.key(3), (2, vlm.config.decoder.width))
    # whatever the hidden state, one of two opposite rows scores high
    rows = jnp.stack([calling, 1000 * ending, -calling, -1000 * ending])
    memory = params["memory"] | {"special_out": rows, "invoke_logit_bias": jnp.full(1, 50.0)}
    return Generator(vlm, params | {"memory": memory}, stop_ids=[])


@pytest.mark.parametrize("limit", [None, 2, 0])
def test_ends_are_never_chosen_and_calls_have_a_limit(answers, eager, prompts, speech, limit):
    most = speech.max_invocations if limit is None else limit
    assert set(read(eager.vlm, eager.params, prompts)[0].argmax(-1).tolist()) <= set(speech.end_ids)
    for sampling in (GREEDY, SAMPLED):
        config = InvocationConfig(max_invocations=limit)
        for handle in answers(prompts, sampling, config, generator=eager):
            ids, decode = handle.tokens, handle.row.decode
            ends = [n for n, token in enumerate(ids) if token in speech.end_ids]
            assert len(ends) == most == sum(token in speech.invoke_ids for token in ids)
            assert len(ids) == NEW + most and all(ids[n - 1] in speech.invoke_ids for n in ends)
            assert np.isnan(handle.logp).sum() == most  # the calls themselves were drawn
            assert decode.length_B.max() <= decode.cache.k_LBKSC.shape[3]


def test_more_calls_than_there_is_room_for_name_the_key(answers, prompts, speech):
    with pytest.raises(ValueError, match="max_invocations must be at most that of the model, 3, got 4"):
        answers(prompts, GREEDY, InvocationConfig(max_invocations=speech.max_invocations + 1))
    with pytest.raises(ValueError, match="probability must be a probability"):
        InvocationConfig(probability=1.5)


def test_always_calls_after_every_delimiter_and_nowhere_else(answers, generator, prompts, speech):
    seen = 0
    for handle in answers(prompts, SAMPLED, InvocationConfig("always")):
        ids, x = handle.tokens, handle.logp
        left, special = speech.max_invocations, (*speech.invoke_ids, *speech.end_ids)
        for n in range(1, len(ids)):
            due = ids[n - 1] in generator.delimiter_ids and ids[n - 1] not in special and left > 0
            assert (ids[n] in speech.invoke_ids) == due
            assert np.isnan(x[n]) == (ids[n] in special)
            left -= due
            seen += due
    assert seen > ROWS


def test_chance_calls_as_often_as_it_should(answers, prompts, speech):
    """Of both kinds, unless one is off."""
    kinds = []
    for seed in range(12):
        config = InvocationConfig("delimiter_random", 0.5, 0.5, max_invocations=1, disabled=("long",) * (seed % 2))
        how = dataclasses.replace(SAMPLED, seed=100 * seed, max_new_tokens=1)
        first = [handle.tokens[0] for handle in answers(prompts, how, config)]
        kinds += [(seed % 2, t) for t in first if t in speech.invoke_ids]
    assert 14 <= len(kinds) <= 34  # of 48 first tokens, half
    both = [token for off, token in kinds if not off]
    assert set(both) == set(speech.invoke_ids) and {t for off, t in kinds if off} == {speech.invoke_ids[0]}


# --- what stays as it is ----------------------------------------------------------------------------------------------


def test_without_a_call_the_model_is_the_plain_one(answers, vlm, params, plain, prompts, speech):
    """Bit by bit, whatever its adapters: but for the scores of the memory's own tokens."""
    batch = jax.tree.map(jnp.asarray, pad_prompts(prompts, ROWS, vlm.tile))
    ordinary = np.setdiff1d(np.arange(vlm.config.decoder.vocab), (*speech.invoke_ids, *speech.end_ids))
    scores, plain_scores = jax.jit(vlm.logits)(params, batch), jax.jit(plain[0].logits)(plain[1], batch)
    np.testing.assert_array_equal(scores[..., ordinary], plain_scores[..., ordinary])
    assert not np.array_equal(scores, plain_scores)
    banned = (*speech.invoke_ids, *speech.end_ids)
    base = answers(prompts, GREEDY, generator=Generator(*plain, stop_ids=[], banned_ids=banned))
    for config in (InvocationConfig("never"), RULE):
        for handle, wanted in zip(answers(prompts, GREEDY, config), base, strict=True):
            assert handle.tokens == wanted.tokens
    assert jax.eval_shape(lambda params: plain[0].prefill(params, batch, 64)[1], plain[1]).memory is None


def test_stages_train_the_memory_in_two_disjoint_parts(vlm):
    paths = list(flatten(vlm.abstract()))

    def trained(*patterns):
        stage = StageConfig("stage", 1, 1e-3, trainable=tuple(f"memory/{p}" for p in patterns))
        return Split.of(stage, paths).trainable

    formation, calling = trained("query_builder", "short", "long"), trained("special_", "invoke_logit_bias")
    assert formation | calling == {path for path in paths if path.startswith("memory/")} and not formation & calling
    assert {path.split("/")[1] for path in calling} == {"special_in", "special_out", "invoke_logit_bias"}
    assert {f"memory/{kind}/lora/{t}/{x}" for kind in ("short", "long") for t in "qv" for x in "ab"} <= formation


def test_a_checkpoint_of_the_trained_part_gives_the_same_scores(vlm, params, prompts, tmp_path):
    batch = jax.tree.map(jnp.asarray, pad_prompts(prompts, ROWS, vlm.tile))
    save_params(tmp_path / "1", {"memory": params["memory"]})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params["memory"])
    back = params | load_params(tmp_path / "1", {"memory": shapes})
    logits = jax.jit(vlm.logits)
    np.testing.assert_array_equal(logits(back, batch), logits(params, batch))
    other = dataclasses.replace(vlm.config.memory, lora=dataclasses.replace(vlm.config.memory.lora, rank=8))
    wider = VLM(dataclasses.replace(vlm.config, memory=other)).abstract()["memory"]
    wider = jax.tree.map(
        lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding), wider, params["memory"]
    )
    with pytest.raises(
        ValueError, match=r"memory/long/lora/q/a: \(4, 64, 4\) in the checkpoint, \(4, 64, 8\) in the model"
    ):
        load_params(tmp_path / "1", {"memory": wider})


@pytest.mark.parametrize("former", ["lora_llm", "tiny_transformer", "lora_vision"])
def test_whatever_the_former_bfloat16_goes_in_and_comes_out(vlm, prompts, former):
    """In decoding and in training; parameters and their gradients are fp32."""
    config = dataclasses.replace(vlm.config.memory, former=former, vision_layer=1, memory_output="rescaled")
    model = VLM(dataclasses.replace(vlm.config, memory=config, compute_dtype="bfloat16"))
    N, counts = model.speech.latents, jnp.full(ROWS, model.speech.latents)

    def everything(params, batch):
        _, state = model.prefill(params, batch, 96)
        latents, heard = model.form(params, state, jnp.arange(ROWS), jnp.arange(ROWS) % 2, 64)
        logits, after = extended(model, params, state, jnp.zeros((ROWS, N), jnp.int32), counts, latents, counts)
        batch = batch.replace(formation=heard)
        return state, after, latents, logits, jax.grad(lambda params: model.logits(params, batch).sum())(params)

    batch = jax.tree.map(jnp.asarray, pad_prompts(prompts, ROWS, model.tile))
    state, after, latents, logits, gradient = jax.eval_shape(everything, model.abstract(), batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert latents.dtype == state.cache.k_LBKSC.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


# --- what it hears ----------------------------------------------------------------------------------------------------


def test_it_hears_the_newest_states_of_a_long_text(answers, vlm, params, prompts):
    """Once more than there is room for have been said, beside those of both images, of which there are too many."""
    small = dataclasses.replace(vlm.config.memory, max_prompt_hidden=5, max_visual_hidden=8)
    short = VLM(dataclasses.replace(vlm.config, memory=small))
    generator, prompt = Generator(short, params, stop_ids=[]), prompts[0]
    forced = [calls(short.speech, (8, 1))]
    [handle] = answers([prompt], GREEDY, RULE, forced, generator=generator, record=True)
    [formed] = handle.invocations
    longer = written(prompt, handle.tokens[: handle.tokens.index(short.speech.invoke_ids[1]) + 1])
    batch = jax.tree.map(jnp.asarray, pad_prompts([longer], 1, short.tile))
    hidden = jax.jit(short.hidden)(params, batch)[0]
    seen = jax.jit(lambda *given: short.see(*given).tokens_BMD)(params, batch.views)[0]
    slots = prompt.visual_index_T[prompt.visual_index_T >= 0]
    assert len(slots) == 16 and len(formed.states_LD) == 8 + 5
    np.testing.assert_allclose(formed.states_LD[:8], seen[slots].reshape(8, 2, -1).mean(axis=1), atol=1e-5)
    end = len(longer.tokens_T)
    np.testing.assert_allclose(formed.states_LD[8:], hidden[end - 5 : end], atol=1e-4)


def test_of_too_many_visual_states_neighbours_are_averaged():
    x = np.arange(24, dtype=np.float32).reshape(2, 12, 1)
    chosen = np.zeros((2, 12), bool)
    chosen[0, [1, 2, 4, 5, 6, 9, 11]] = chosen[1, [0, 3]] = True
    keep = jax.jit(kept, static_argnums=2)
    means, lengths = keep(x, chosen, 3)
    assert lengths.tolist() == [3, 2]  # groups of 3, 3 and 1; of 1 and 1
    np.testing.assert_allclose(means[0, :, 0], [7 / 3, 20 / 3, 11])
    np.testing.assert_allclose(means[1, :2, 0], [12, 15])
    everything, lengths = keep(x, chosen, 12)
    assert lengths.tolist() == [7, 2] and everything[0, :7, 0].tolist() == [1, 2, 4, 5, 6, 9, 11]
    assert keep(x, chosen, 0)[1].tolist() == [0, 0]


def test_a_call_that_is_padding_leaves_no_trace(vlm, params, prompts):
    """Rows of a training batch differ in how often a memory spoke: what a row reads, and gradients, do not."""
    batch, length = pad_prompts(prompts[2:3], 1, vlm.tile), len(prompts[2].tokens_T)
    M = batch.views.segments_BM.shape[1]
    batch.text.visual_index_BT[0, length - 3 : length] = M + np.arange(3)
    states = jax.random.normal(jax.random.key(0), (1, 2, 9, vlm.config.decoder.width))

    @jax.jit
    def loss(memory, batch):
        placed_TD = embeddings(vlm, params | {"memory": memory}, batch)[0, :length]
        return (placed_TD * jax.random.normal(jax.random.key(1), placed_TD.shape)).mean()

    def value_and_gradient(count, kinds, lengths):
        heard = FormationInputs(states[:, :count], jnp.array([lengths]), jnp.array([kinds]))
        moved = jax.tree.map(jnp.asarray, batch.replace(formation=heard))
        return jax.jit(jax.value_and_grad(loss))(params["memory"], moved)

    alone, padded = value_and_gradient(1, [0], [9]), value_and_gradient(2, [0, -1], [9, 0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), alone, padded)
    assert np.abs(alone[1]["short"]["lora"]["q"]["a"]).max() > 1e-6 and not alone[1]["long"]["m_init"].any()


@pytest.mark.slow
def test_eight_devices_give_the_answers_of_one(answers, vlm, params, prompts, forced):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = jax.device_put(jax.device_get(params), param_shardings(mesh, vlm.abstract(), vlm.axes()))
    many = Generator(vlm, sharded, stop_ids=[], mesh=mesh)
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **kwargs: programs.append(kwargs.get("fun_name")) if "backend_compile" in event else None
    )
    found = answers(prompts, GREEDY, RULE, forced, generator=many)
    answers(prompts[::-1], GREEDY, RULE, forced, generator=many)
    assert [programs.count(f"jit({name})") for name in ("step", "insert")] == [1, 1]
    for handle, one in zip(found, answers(prompts, GREEDY, RULE, forced), strict=True):
        assert handle.tokens == one.tokens
        np.testing.assert_allclose(handle.logp, one.logp, atol=1e-5)


def test_the_loss_of_next_tokens_scores_the_tokens_of_the_memory(vlm, params, prompts):
    calls = vlm.config.memory.token_ids
    samples = [
        dataclasses.replace(p, labels_T=np.where(np.arange(len(p.labels_T)) % 3, p.tokens_T, calls[n]))
        for n, p in enumerate(prompts)
    ]
    data = DataConfig(pack_tokens=128, pack_tiles=64)
    rows = [pack_row(pair, data, vlm.tile) for pair in (samples[:2], samples[2:])]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    loss = jax.jit(lambda params: next_token_loss(vlm, params, batch, 32))(params)
    logp_BTV = jax.nn.log_softmax(jax.jit(vlm.logits)(params, batch))
    wanted = jnp.take_along_axis(logp_BTV, batch.text.targets_BT[..., None], axis=2)[..., 0]
    assert np.isin(batch.text.targets_BT, calls).sum() > 8
    np.testing.assert_allclose(loss, -(wanted * batch.text.weights_BT).sum(), rtol=1e-5)


def test_it_learns_on_another_family():
    """On InternVL too, whose tokens have one position and whose images are tiles: a step lowers the loss."""
    own = dataclasses.replace(
        resolve({"preset": "tiny_qwen2_5_vl", "memory": "vismem"}).memory, token_ids=(124, 125, 126, 127)
    )
    model = VLM(dataclasses.replace(resolve({"preset": "tiny", "decoder": {"layers": 2}}), memory=own))
    rng, T, width = np.random.default_rng(0), 24, model.config.decoder.width
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), model.abstract())
    empty = Batch.empty((2,), T, 1, model.tile)
    M, images = empty.views.segments_BM.shape[1], np.arange(1, 1 + empty.views.segments_BM.shape[1])
    slots = empty.text.visual_index_BT.copy()
    slots[:, images] = np.arange(M)
    slots[:, 14:17] = M + np.arange(3)  # a memory after the image and some text
    tokens = rng.integers(5, 120, (2, T)).astype(np.int32)
    tokens[:, 18:22] = own.token_ids
    heard = FormationInputs(
        rng.normal(size=(2, 1, 9, width)).astype(np.float32), np.full((2, 1), 9), np.array([[0], [1]])
    )
    batch = empty.replace(
        tokens_BT=tokens,
        targets_BT=np.roll(tokens, -1, axis=1),
        weights_BT=np.full((2, T), 0.5 / T, np.float32),
        positions_BT=np.broadcast_to(np.arange(T, dtype=np.int32), (2, T)),
        segments_BT=np.ones_like(tokens),
        visual_index_BT=slots,
        pixels_BISSc=rng.integers(0, 256, empty.views.pixels_BISSc.shape).astype(np.uint8),
        segments_BM=np.ones_like(empty.views.segments_BM),
        formation=heard,
    )
    batch = jax.tree.map(jnp.asarray, batch)
    step = jax.jit(jax.value_and_grad(lambda memory: next_token_loss(model, params | {"memory": memory}, batch, T)))
    loss, gradient = step(params["memory"])
    memory, gradient = jax.device_get((params["memory"], gradient))
    assert step(jax.tree.map(lambda x, g: x - np.float32(0.01) * g, memory, gradient))[0] < loss
    for path, leaf in flatten(gradient).items():
        assert np.abs(leaf).max() > 0, path


# --- how it starts ----------------------------------------------------------------------------------------------------


def test_its_tokens_start_from_one_that_there_is(vlm):
    decoder = dataclasses.replace(vlm.config.decoder, tied=False)
    rescaled = dataclasses.replace(vlm.config.memory, memory_output="rescaled")
    model = VLM(dataclasses.replace(vlm.config, decoder=decoder, memory=rescaled))

    @jax.jit
    def fresh(key):
        params = model.init(key)
        memory = {name: params["memory"][name] for name in ("special_in", "special_out", "invoke_logit_bias")}
        memory["gain"] = params["memory"]["short"]["gain"]
        return memory, params["decoder"]["embed"], model.head_kernel(params)

    (memory, embed, head), start = jax.device_get(fresh(jax.random.key(0))), rescaled.start_id
    rows = {"special_in": embed[start], "special_out": head[:, start]}
    for name, row in rows.items():
        apart = memory[name] - row
        assert 0.5 * ROWS_NOISE < apart.std() < 2 * ROWS_NOISE and len(np.unique(apart)) > 0.9 * apart.size
    assert memory["invoke_logit_bias"].tolist() == [vlm.config.memory.invoke_bias]
    sizes = np.sqrt((embed**2).mean(-1))
    np.testing.assert_allclose(memory["gain"], sizes.mean(), rtol=1e-5)


def test_rescaled_memories_have_the_size_of_the_gain(vlm, params, prompts):
    config = dataclasses.replace(vlm.config.memory, memory_output="rescaled")
    model = VLM(dataclasses.replace(vlm.config, memory=config))
    memory = params["memory"] | {
        k: params["memory"][k] | {"gain": jnp.full(1, g)} for k, g in [("short", 0.5), ("long", 2.0)]
    }
    params = params | {"memory": memory}
    batch = jax.tree.map(jnp.asarray, pad_prompts(prompts, ROWS, model.tile))
    _, state = jax.jit(model.prefill, static_argnums=2)(params, batch, 96)
    latents, _ = jax.jit(model.form, static_argnums=4)(params, state, jnp.arange(2), jnp.array([0, 1]), 64)
    sizes = jnp.sqrt((latents**2).mean(-1))
    np.testing.assert_allclose(sizes[0, : config.short_len], 0.5, rtol=1e-3)
    np.testing.assert_allclose(sizes[1], 2.0, rtol=1e-3)


def test_small_formers_have_sizes_of_their_own(vlm):
    builder, tiny = EncoderConfig(layers=1, heads=4, ff_mult=2), EncoderConfig(layers=3, heads=2, ff_mult=5)
    config = dataclasses.replace(vlm.config.memory, former="tiny_transformer", query_builder=builder, tiny=tiny)
    memory = VLM(dataclasses.replace(vlm.config, memory=config)).abstract()["memory"]
    width = vlm.config.decoder.width
    for part, sizes in (("query_builder", builder), ("short", tiny), ("long", tiny)):
        layers = memory[part]["encoder"]["layers"]
        assert layers["attn"]["q"]["kernel"].shape == (sizes.layers, width, sizes.heads, width // sizes.heads)
        assert layers["mlp"]["fc1"]["kernel"].shape == (sizes.layers, width, sizes.ff_mult * width)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(token_ids=(1, 2, 3, 3)), "four different ids"),
        (dict(token_ids=(1, 2, 3, 4000)), "below decoder.vocab 160"),
        (dict(max_visual_hidden=4000), "max_positions must be at least .* = 4068"),
        (dict(short_len=0), "at least 1"),
        (dict(former="lora_vision"), "vision_layer below vision.layers, got qwen_vit and 24 of 3"),
    ],
)
def test_bad_settings_name_their_key(vlm, changes, message):
    with pytest.raises(ValueError, match=message):
        config = dataclasses.replace(vlm.config.memory, **changes)
        VLM(dataclasses.replace(vlm.config, memory=config)).abstract()
