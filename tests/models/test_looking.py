"""The door SEE: a clip in a scan is its frames one after the other, and nothing of it is in a model without."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from tests import drawn
from vlmem_jax.families import resolve
from vlmem_jax.flight.program import HloProgram
from vlmem_jax.memory import Frame
from vlmem_jax.memory.vlm2 import VLM2, VLM2Config
from vlmem_jax.memory.vlm2.banks import Bank, DualMemory
from vlmem_jax.models import VLM, looking, vlm
from vlmem_jax.models.flops import memory_flops
from vlmem_jax.nn.attention import attend
from vlmem_jax.processing import FrameConfig, ImageConfig
from vlmem_jax.runtime.sharding import MeshConfig, even_spec, lay_out, make_mesh, param_shardings
from vlmem_jax.types import Batch, Geometry

CLOSE = dict(atol=2e-5, rtol=1e-4)
FRAMES = 7


@pytest.fixture(scope="module", params=["tiny_llava_video", "tiny"])
def model(request):
    keys = {"preset": request.param, "memory": "vlm2", "decoder": {"layers": 2}, "vision": {"layers": 1}}
    made = VLM(resolve(keys))
    return made, drawn.params(made, 1)


def views(model, segments):
    """Random frames, with geometry, of rows whose tiles belong to `segments`."""
    rng, tile, memory = np.random.default_rng(0), model.tile, model.config.memory
    B, I = np.shape(segments)
    N, widths = model.config.vision.grid**2, (memory.geometry_width, memory.view_width, 3)
    empty = Batch.empty((B,), 8, I, tile).views
    made = dataclasses.replace(
        empty,
        pixels_BISSc=rng.integers(0, 256, empty.pixels_BISSc.shape, np.uint8),
        segments_BM=np.repeat(np.array(segments, np.int32), tile.tokens, axis=1),
        geometry=Geometry(*(rng.normal(size=(B, I, N, width)).astype(np.float32) for width in widths)),
    )
    return jax.tree.map(jnp.asarray, made)


def part(seen, rows, tiles):
    """Some tiles of some rows of views."""
    P = seen.segments_BM.shape[1] // seen.pixels_BISSc.shape[1]
    wide = {name: getattr(seen, name).reshape(len(seen.pixels_BISSc), -1, P)[rows, tiles].reshape(len(rows), -1)
            for name in ("segments_BM", "positions_BM")}  # fmt: skip
    cut = dict(pixels_BISSc=seen.pixels_BISSc[rows, tiles])
    return dataclasses.replace(seen, **wide, **cut, geometry=jax.tree.map(lambda x: x[rows, tiles], seen.geometry))


def rows_and(tiles):
    return np.zeros((1, 1), int), np.array([tiles])


@pytest.fixture(scope="module")
def see(model):
    return jax.jit(model[0].see)


def test_a_clip_is_its_frames_one_after_the_other(model, see):
    """Training scans the function that a stream calls; the frames of few are all kept."""
    made, params = model
    count = made.config.memory.episodic
    seen = views(made, [[1] * count])
    state, look = made.watch(params, 1), jax.jit(made.look)
    for n in range(count):
        state = look(params, state, part(seen, *rows_and([n])))
    kept = made.recollect(params, state)
    np.testing.assert_allclose(kept.tokens_BMD, see(params, seen).tokens_BMD, **CLOSE)
    assert (np.asarray(kept.segments_BM) == 1).all()


@pytest.mark.parametrize("preset", ["tiny_llava_video", "tiny"])
def test_frames_may_be_kept_as_visual_tokens(preset):
    """Behind the projector, pooled, without newlines; it starts as the model without, and a clip is its stream."""
    memory = {"kind": "vlm2", "stage": "post_pool"}
    made = VLM(resolve({"preset": preset, "memory": memory, "decoder": {"layers": 2}, "vision": {"layers": 1}}))
    plain, fresh = VLM(dataclasses.replace(made.config, memory=None)), made.fresh(jax.random.key(0))
    seen, see = views(made, [[1] * 3]), jax.jit(made.see)
    without = {name: leaf for name, leaf in fresh.items() if name != "memory"}
    np.testing.assert_allclose(see(fresh, seen).tokens_BMD, plain.see(without, seen).tokens_BMD, **CLOSE)
    params = drawn.params(made, 1)
    state, look = made.watch(params, 1), jax.jit(made.look)
    assert state.frames_BLND.shape[2:] == (made.config.vision.side**2, made.config.decoder.width)
    for n in range(3):
        state = look(params, state, part(seen, *rows_and([n])))
    tokens_BMD = see(params, seen).tokens_BMD
    np.testing.assert_allclose(made.recollect(params, state).tokens_BMD, tokens_BMD, **CLOSE)
    assert np.abs(tokens_BMD - see(fresh, seen).tokens_BMD).max() > 0.1


def test_what_a_long_clip_leaves_behind_is_what_its_stream_does(model):
    """Frames that are kept at the end of a sample come first in it, in the order in which they were seen."""
    made, params = model
    seen = views(made, [[1, 1, 2, 2, 2, 2, 2]])
    first = jax.jit(made.see)(params, dataclasses.replace(seen, kept_first=True))
    tokens = np.asarray(first.tokens_BMD).reshape(FRAMES, made.tokens_per_tile, -1)
    look = jax.jit(made.look)
    for tiles in ([0, 1], [2, 3, 4, 5, 6]):
        state = made.watch(params, 1)
        for n in tiles:
            state = look(params, state, part(seen, *rows_and([n])))
        kept = made.recollect(params, state)
        count = min(len(tiles), made.config.memory.episodic)
        wanted = np.asarray(kept.tokens_BMD)[0, : count * made.tokens_per_tile]
        np.testing.assert_allclose(tokens[tiles[0] : tiles[0] + count].reshape(len(wanted), -1), wanted, **CLOSE)
    every = np.asarray(jax.jit(made.see)(params, seen).tokens_BMD).reshape(tokens.shape)
    np.testing.assert_allclose(sorted(tokens[2:, 0, 0]), sorted(every[2:, 0, 0]), **CLOSE)  # the others change places
    assert np.abs(tokens - every).max() > 1e-3


def test_a_sample_of_a_row_is_that_sample_alone_and_padding_is_left_alone(model, see):
    made, params = model
    P = made.tokens_per_tile
    together = see(params, seen := views(made, [[1, 1, 1, 0, 2, 2, 0]])).tokens_BMD.reshape(1, FRAMES, P, -1)
    for tiles in ([0, 1, 2], [4, 5]):
        alone = see(params, part(seen, *rows_and(tiles))).tokens_BMD.reshape(1, len(tiles), P, -1)
        np.testing.assert_allclose(together[:, tiles], alone, **CLOSE)


def test_a_row_is_that_row_alone_and_a_fresh_stream_a_new_one(model):
    made, params = model
    seen = views(made, [[1] * 4, [1] * 4])
    look = jax.jit(made.look)
    both, one = made.watch(params, 2), made.watch(params, 1)
    for n in range(4):
        both = look(params, both, part(seen, np.arange(2)[:, None], np.full((2, 1), n)), jnp.array([n == 2, False]))
        if n >= 2:
            one = look(params, one, part(seen, *rows_and([n])))
    kept, alone = made.recollect(params, both), made.recollect(params, one)
    there = np.asarray(alone.segments_BM[0]) > 0
    np.testing.assert_array_equal(np.asarray(kept.segments_BM[0]) > 0, there)
    np.testing.assert_allclose(kept.tokens_BMD[0][there], alone.tokens_BMD[0][there], **CLOSE)


def test_a_frame_that_is_not_finite_is_not_taken(model):
    made, params = model
    seen = views(made, [[1] * 2])
    first = made.look(params, made.watch(params, 1), part(seen, *rows_and([0])))
    second = part(seen, *rows_and([1]))
    pixels = second.pixels_BISSc.astype(jnp.float32)
    for broken in (
        dataclasses.replace(second, pixels_BISSc=pixels.at[0, 0, 3, 3, 0].set(jnp.nan)),
        dataclasses.replace(second, geometry=jax.tree.map(lambda x: x.at[0, 0, 2].set(jnp.inf), second.geometry)),
    ):
        _, taken_B, state = made.take(params, first, broken)
        assert not taken_B.any()
        jax.tree.map(np.testing.assert_array_equal, state, first)
    assert made.take(params, first, second)[1].all()
    assert made.kept(params, first).tolist() == [[0] + [-1] * (made.config.memory.episodic - 1)]


def test_frames_go_through_the_adapter_of_the_tower_one_by_one_as_in_a_clip():
    adapter = {"name": "mine", "rank": 2, "targets": ("v",), "vision": ("q", "fc1")}
    keys = {"preset": "tiny_llava_video", "memory": "vlm2", "decoder": {"layers": 1}, "vision": {"layers": 1}}
    made = VLM(resolve(keys | {"adapters": [adapter]}))
    params = jax.tree.map(jnp.asarray, drawn.random_params(made, 3))
    seen = views(made, [[1]])
    state = made.look(params, made.watch(params, 1), seen)
    P, kept = made.tokens_per_tile, made.recollect(params, state).tokens_BMD
    np.testing.assert_allclose(kept[:, :P], made.see(params, seen).tokens_BMD, **CLOSE)
    without = dataclasses.replace(made, adapter=-1).see(params, seen).tokens_BMD
    assert np.abs(kept[:, :P] - without).max() > 1e-3


def test_stretches_that_are_made_again_have_the_gradient_of_a_scan_that_stores_all(model):
    made, params = model
    memory = made._merge(params).memory
    draw = np.random.default_rng(1).normal
    frames = jnp.asarray(draw(size=(1, FRAMES, memory.patches, memory.width)), jnp.float32)
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2]])
    geometry, yes = views(made, [[1] * FRAMES]).geometry, jnp.ones(1, bool)

    def plainly(frames):
        state, found = memory.begin(1, jnp.float32), []
        for n in range(FRAMES):
            one = Frame(frames[:, n], jax.tree.map(lambda x, n=n: x[:, n], geometry))
            seen, state = memory.take(state, one, yes, jnp.array([n == 5]))
            found.append(seen)
        return jnp.stack(found, axis=1)

    def in_stretches(frames):
        return looking.in_turn(memory, frames, segments, geometry)

    found, wanted = (
        jax.jit(jax.value_and_grad(lambda x, f=f: (f(x) ** 2).sum()))(frames) for f in (in_stretches, plainly)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-3, rtol=1e-3)


def test_it_starts_as_the_model_without(model):
    made, _ = model
    fresh = made.fresh(jax.random.key(0))
    plain = VLM(dataclasses.replace(made.config, memory=None))
    seen = views(made, [[1] * 3])
    without = {name: leaf for name, leaf in fresh.items() if name != "memory"}
    np.testing.assert_allclose(made.see(fresh, seen).tokens_BMD, plain.see(without, seen).tokens_BMD, **CLOSE)


def test_nothing_of_it_is_in_a_model_without(model, monkeypatch):
    made, params = model
    plain = VLM(dataclasses.replace(made.config, memory=None))
    without, seen = {name: leaf for name, leaf in params.items() if name != "memory"}, views(made, [[1] * 3])
    monkeypatch.setattr(vlm, "in_turn", lambda *_: pytest.fail("the door was asked"))
    jaxpr = str(jax.make_jaxpr(plain.see)(without, seen))
    assert jaxpr.count("scan") == 1  # the layers of the tower
    with pytest.raises(ValueError, match="needs a memory that keeps them; model.memory is none"):
        plain.watch(without, 1)


def test_only_as_many_frames_as_the_memory_keeps_can_stand_in_the_sequence(model):
    made, _ = model
    if made.config.vision.kind == "siglip":
        assert made.tile_of(FrameConfig(context="kept:3")).keeps == 3
        with pytest.raises(ValueError, match="image.context must be kept:3, or memory.episodic another, .* got kept:4"):
            made.tile_of(FrameConfig(context="kept:4"))
        with pytest.raises(ValueError, match="must be all or stride:n for model.memory none, got kept:3"):
            VLM(dataclasses.replace(made.config, memory=None)).tile_of(FrameConfig(context="kept:3"))
    assert made.tile_of(ImageConfig()).keeps == 0


def test_geometry_that_is_missing_and_towers_that_do_not_fit_are_named(model):
    made, params = model
    with pytest.raises(ValueError, match="memory.geometry_width is 12, but frames come without geometry"):
        made.see(params, dataclasses.replace(views(made, [[1] * 2]), geometry=None))
    with pytest.raises(ValueError, match="keeps frames that the tower sees each on its own"):
        VLM(resolve({"preset": "tiny_qwen2_5_vl", "memory": "vlm2"})).abstract()
    with pytest.raises(ValueError, match="keeps frames that the tower sees each on its own"):
        VLM(resolve({"preset": "tiny_qwen3_vl", "memory": "vlm2"})).abstract()
    with pytest.raises(ValueError, match="heads must divide the width of the tower 32, got 5"):
        VLM(resolve({"preset": "tiny_llava_video", "memory": {"kind": "vlm2", "heads": 5}})).abstract()


def test_a_frame_is_written_where_its_bank_lies():
    """Banks of several streams and parts are donated and never copied: not as they are read, nor before a write."""
    memory = {"kind": "vlm2", "geometry_width": 0, "working": 4, "episodic": 20}
    made = VLM(resolve({"preset": "tiny_llava_video", "memory": memory, "vision": {"layers": 1}}))
    state = jax.eval_shape(lambda params: made.watch(params, 2), made.abstract())
    frames = Batch.empty((2,), 8, 1, made.tile).views
    program = jax.jit(made.look, donate_argnums=1).lower(made.abstract(), state, frames).compile()
    banks = [bank for bank in jax.tree.leaves(state) if bank.ndim == 4]
    assert {bank.shape[1] for bank in banks[:4]} == {1, 2} and len(banks) == 5
    shapes = {f"[{','.join(map(str, bank.shape))}]" for bank in banks}
    lines = program.as_text().splitlines()
    assert not [line for line in lines if " copy(" in line and any(shape in line for shape in shapes)]
    assert program.memory_analysis().alias_size_in_bytes >= sum(bank.size * bank.dtype.itemsize for bank in banks)


def test_banks_stay_on_the_devices_of_their_rows():
    memory = {"kind": "vlm2", "geometry_width": 0, "working": 4, "episodic": 20}
    made = VLM(resolve({"preset": "tiny_llava_video", "memory": memory, "vision": {"layers": 1}}))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def placed(x, *axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, even_spec(x.shape, *axes)))

    with jax.set_mesh(mesh):
        params = made.held(param_shardings(mesh, made.abstract(), made.axes()))
        state = lay_out(jax.eval_shape(lambda params: made.watch(params, 8), params), placed)
        frames = jax.tree.map(lambda x: placed(x, "batch"), Batch.empty((8,), 8, 1, made.tile).views)
        look = jax.jit(lambda *given: lay_out(made.look(*given)), donate_argnums=1)
        program = HloProgram(look.lower(params, state, frames).compile().as_text())
    bank = min(x.size for x in jax.tree.leaves(state) if x.ndim == 4) // 4  # of a device
    moved = [math.prod(found.shape) for found in program.collectives(dict(mesh.shape))]
    assert moved and max(moved) < bank, "parameters and frames are exchanged, banks are not"


def test_a_clip_gathers_the_memory_once_whatever_the_number_of_its_frames():
    """In training; and the numbers are those of one device."""
    made = VLM(resolve({"preset": "tiny_llava_video", "memory": "vlm2", "vision": {"layers": 1}}))
    mesh, params = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), drawn.params(made, 1)

    def loss(memory, params, shown):
        return (made.see(params | {"memory": memory}, shown).tokens_BMD ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    split = jax.device_put(params, param_shardings(mesh, made.abstract(), made.axes()))

    def sharded(frames):
        """The compiled step on all devices, and how often it gathers what."""
        shown = views(made, [[1] * frames] * 4)
        with jax.set_mesh(mesh):
            program = step.lower(split["memory"], split, shown).compile()
        found = HloProgram(program.as_text()).collectives(dict(mesh.shape))
        return program, sorted((c.shape, c.times) for c in found if c.kind == "all-gather" and "fsdp" in c.axes)

    program, gathers = sharded(4)
    assert len(gathers) > 4 and gathers == sharded(9)[1]
    shown = views(made, [[1] * 4] * 4)
    one, many = step(params["memory"], params, shown), jax.device_get(program(split["memory"], split, shown))
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(one[1]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * scale), one, many)


def test_a_frame_that_is_no_number_is_not_kept(model):
    made, params = model
    memory = made._merge(params).memory
    frames = jnp.asarray(np.random.default_rng(3).normal(size=(3, 1, memory.patches, memory.width)), jnp.float32)
    yes, take = jnp.ones(1, bool), jax.jit(memory.banks.take)
    banks = memory.begin(1, jnp.float32)
    for x in (frames[0], frames[1].at[0, 2, 3].set(jnp.nan), frames[2]):
        _, banks = take(banks, x, yes, ~yes)
    alone = memory.begin(1, jnp.float32)
    for x in (frames[0], frames[2]):
        _, alone = take(alone, x, yes, ~yes)
    jax.tree.map(np.testing.assert_array_equal, banks, alone)


# --- what is kept -----------------------------------------------------------------------------------------------------


def kept_by(write, similarity, means, size):
    """Frame numbers that episodes of `size` keep of frames with these means, by lists: delete and append."""
    bank = []

    def cos(i, j):
        return means[i] @ means[j] / (np.linalg.norm(means[i]) * np.linalg.norm(means[j]) + 1e-12)

    for n in range(len(means)):
        if len(bank) == size:
            if write == "paper":
                gone = max(bank, key=lambda i: (cos(n, i), -bank.index(i)))
            else:
                pairs = [(cos(i, j), i) for a, i in enumerate(bank) for j in bank[a + 1 :]] + [
                    (cos(i, n), i) for i in bank
                ]
                gone = max(pairs)[1]
            bank.remove(gone)
        bank.append(n)
    return bank


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), write=st.sampled_from(["paper", "pair"]), size=st.integers(1, 4))
def test_episodes_keep_what_lists_would(seed, write, size):
    config = VLM2Config(working=1, episodic=size, heads=2, geometry_width=0, write=write)
    module = DualMemory(config, 8, rngs=nnx.Rngs(0))
    frames = jnp.asarray(np.random.default_rng(seed).normal(size=(9, 1, 3, 8)), jnp.float32)
    banks, yes = module.begin(1, 3, jnp.float32), jnp.ones(1, bool)
    for x in frames:
        _, banks = module.take(banks, x, yes, ~yes)  # starts as the frames themselves
    means = np.asarray(frames[:, 0].mean(1), np.float64)
    assert sorted(banks.episodes.time_BL[0].tolist()) == sorted(kept_by(write, "pooled", means, size))
    assert (np.asarray(module.readout(banks)[1][0]) == sorted(banks.episodes.time_BL[0].tolist())).all()


def test_training_may_draw_how_many_episodes_there_is_room_for():
    """Each row is that of a memory of the size that was drawn for it, by either rule."""
    for write in ("paper", "pair"):
        keys = dict(working=1, heads=2, geometry_width=0, write=write)
        drawn_from = VLM2Config(episodic=5, train_episodic=(2, 4), **keys)
        frames = jnp.asarray(np.random.default_rng(5).normal(size=(9, 6, 3, 8)), jnp.float32)
        module, yes = DualMemory(drawn_from, 8, rngs=nnx.Rngs(0)), jnp.ones(6, bool)
        banks = module.begin(6, 3, jnp.float32, jax.random.key(0))
        for x in frames:
            _, banks = module.take(banks, x, yes, ~yes)
        room_B = banks.room_B.tolist()
        assert set(room_B) == {2, 4} and module.begin(6, 3, jnp.float32).room_B.tolist() == [5] * 6
        for row, size in enumerate(room_B):
            kept = sorted(set(banks.episodes.time_BL[row].tolist()) - {-1})
            assert kept == sorted(kept_by(write, "pooled", np.asarray(frames[:, row].mean(1), np.float64), size))
    with pytest.raises(ValueError, match="train_episodic must be from 1 to episodic 5"):
        VLM2Config(episodic=5, train_episodic=(6,))


@pytest.mark.parametrize("off", ["working", "episodic"])
def test_of_a_bank_that_is_off_nothing_is_read(off):
    config = VLM2Config(**{"working": 2, "episodic": 2, "heads": 2, "geometry_width": 0} | {off: 0})
    memory, draw = DualMemory(config, 8, rngs=nnx.Rngs(0)), np.random.default_rng(0).normal
    for recall in (memory.mem_w, memory.mem_e):
        recall.o.kernel[...] = jnp.asarray(draw(size=recall.o.kernel.shape), jnp.float32)
    banks, yes, no = memory.begin(1, 4, jnp.float32), jnp.ones(1, bool), jnp.zeros(1, bool)
    for _ in range(3):
        frame = jnp.asarray(draw(size=(1, 4, 8)), jnp.float32)
        before = banks
        seen, banks = memory.take(before, frame, yes, no)
        pairs = (memory.mem_w, before.working), (memory.mem_e, before.episodes)
        reads = [recall(frame, bank, before.count_B) for recall, bank in pairs]
        np.testing.assert_array_equal(reads[off == "episodic"], frame)
        np.testing.assert_allclose(seen, memory.mix(*reads), rtol=1e-6)
    assert np.abs(seen - frame).max() > 0.1  # the other one is read


def test_the_order_of_slots_changes_nothing(model):
    made, params = model
    memory = made._merge(params).memory
    draw = np.random.default_rng(2).normal
    frames = jnp.asarray(draw(size=(6, 1, memory.patches, memory.width)), jnp.float32)
    banks, yes = memory.begin(1, jnp.float32), jnp.ones(1, bool)
    for x in frames[:-1]:
        _, banks = memory.banks.take(banks, x, yes, ~yes)
    order = jnp.array([2, 0, 1])

    def reordered(x_BXMD):
        frames = x_BXMD[:, 0, : 3 * memory.patches].reshape(1, 3, memory.patches, -1)[:, order]
        return x_BXMD.at[:, 0, : 3 * memory.patches].set(frames.reshape(1, -1, memory.width))

    keys, values = map(reordered, (banks.episodes.k_BXMD, banks.episodes.v_BXMD))
    turned = dataclasses.replace(
        banks, episodes=Bank(keys, values, banks.episodes.time_BL[:, order]),
        frames_BLMD=banks.frames_BLMD[:, order], means_BLD=banks.means_BLD[:, order],
    )  # fmt: skip
    found, wanted = (memory.banks.take(state, frames[-1], yes, ~yes)[0] for state in (turned, banks))
    np.testing.assert_allclose(found, wanted, **CLOSE)


def test_keys_tell_how_long_ago_their_frame_was_taken():
    config = VLM2Config(working=2, episodic=20, heads=2, geometry_width=0, age_embed=True)
    module, plain = (
        DualMemory(dataclasses.replace(config, age_embed=ages), 8, rngs=nnx.Rngs(0)) for ages in (True, False)
    )
    draw, yes, count = np.random.default_rng(4).normal, jnp.ones(1, bool), 19
    frames = jnp.asarray(draw(size=(count + 1, 1, 3, 8)), jnp.float32)
    banks = module.begin(1, 3, jnp.float32)
    for x in frames[:-1]:  # starts as without, and as the frames themselves
        _, banks = module.take(banks, x, yes, ~yes)
    read = module.mem_e
    read.o.kernel[...] = jnp.eye(8).reshape(read.o.kernel.shape)
    read.o.bias[...] = plain.mem_e.o.bias[...]
    plain.mem_e.q, plain.mem_e.k, plain.mem_e.v, plain.mem_e.o = read.q, read.k, read.v, read.o
    now = banks.count_B
    np.testing.assert_array_equal(read(frames[-1], banks.episodes, now), plain.mem_e(frames[-1], banks.episodes, now))
    read.age[...] = jnp.asarray(draw(size=read.age.shape), jnp.float32)
    power = [int(math.log2(count - n)) for n in range(count)]
    keys = read.k(frames[:-1, 0]) + read.age[...][jnp.array(power)].reshape(count, 1, 2, 4)
    values = read.v(frames[:-1, 0])
    wanted = attend(read.q(frames[-1]), *(x.reshape(1, count * 3, 2, 4) for x in (keys, values)), None)
    found = read(frames[-1], banks.episodes, now) - frames[-1]
    np.testing.assert_allclose(found, wanted.reshape(1, 3, 8), atol=1e-5)


def test_operations_of_a_frame_are_those_of_the_formula(golden):
    decoder = resolve({"preset": "tiny_llava_video"}).decoder
    for case in json.loads((golden / "vlm2" / "cost_examples.json").read_text()):
        vision = SimpleNamespace(grid=math.isqrt(case["N"]), width=case["c"])
        sizes = {"working": case["n_w"], "episodic": case["n_e"]} if case["n_e"] else {}
        config = VLM2Config(geometry_width=0, gamma_width=case["gate_hidden"], **sizes)
        last = 1000 if case["n_e"] else 1  # the first frame finds nothing
        whole, before = (sum(VLM2.frame_flops(config, decoder, vision, frames)) for frames in (last, last - 1))
        assert whole - before == case["flops_kv_cached"]


def test_a_clip_counts_in_the_operations_of_a_model():
    model = resolve({"preset": "llava_video_7b", "memory": {"kind": "vlm2", "geometry_width": 0}})
    counts = np.array([1, 32, 100])
    each = np.add(*memory_flops(model, 0, counts))
    assert each.tolist() == [sum(memory_flops(model, 0, int(count))) for count in counts]
    assert each[0] == 16 * 729 * 1152**2 + 6 * 729 * 1152**2
