"""Qwen3-VL against numbers of the published implementation."""

import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen3_golden
from flax import nnx
from PIL import Image
from qwen3_golden import PROMPTS

from tests.verbs import embeddings, extended
from vlmem_jax.families import qwen3_vl
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.hub.safetensors_io import Tensors
from vlmem_jax.models import VLM
from vlmem_jax.models.vlm import deep_tap
from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing import StepConfig, Tokenizer, Video, chat, make_processor
from vlmem_jax.processing.patches import image_grid, smart_resize, write_blocks
from vlmem_jax.processing.steps import choose_frames, video_grid, volume_resize
from vlmem_jax.processing.video import Clip, VideoSize
from vlmem_jax.trees import flatten
from vlmem_jax.types import StepGeometry
from vlmem_jax.vision import normalise
from vlmem_jax.vision.patch_tower import Segments

LOGITS = dict(atol=2e-4, rtol=1e-4)
FILES = (*PROMPTS, "batch_leftpad", "video_wrapped")
SEEN = ("image", "two_images", "video", "two_videos")
"""Prompts whose files say what the tower does."""
TOWER = dict(atol=1e-4, rtol=1e-5)
MERGED = dict(atol=5e-5, rtol=1e-5)
"""Tells the two kinds of GELU apart."""


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "qwen3_vl"


@pytest.fixture(scope="module")
def model(folder):
    return qwen3_golden.load(folder)


@pytest.fixture(scope="module")
def prompt(model):
    """The arrays of a prompt file, and its rows."""

    def load(name):
        arrays = dict(np.load(model.folder / f"{name}.npz"))
        if name == "video_wrapped":  # of the same video
            arrays["pixel_values_videos"] = np.load(model.folder / "video.npz")["pixel_values_videos"]
        return arrays, qwen3_golden.rows(arrays, model.content, model.vlm.config.vision.geometry)

    return load


# --- images and videos ------------------------------------------------------------------------------------------------


def geometry_of(case):
    depth = case.get("temporal_factor", 2)
    return StepGeometry(case.get("factor", 32) // 2, depth, 2, window=0, tokens_per_second=0.0)


def test_smart_resize(folder):
    data = json.loads((folder / "smart_resize.json").read_text())
    names = ("height", "width", "factor", "min_pixels", "max_pixels")
    for case in data["cases"]:
        found = smart_resize(*(case[name] for name in names))
        assert found == (case["resized_height"], case["resized_width"]), case
    for case in data["must_raise"]:
        with pytest.raises(ValueError, match="times as long as wide"):
            smart_resize(case["height"], case["width"], *(data["cases"][0][name] for name in names[2:]))


@pytest.mark.parametrize(("cases", "budget"), [("video_cases", "video"), ("video_cases_capped", "capped")])
def test_frames_of_a_video_share_a_budget(folder, cases, budget):
    for case in json.loads((folder / "smart_resize.json").read_text())[cases]:
        geometry, size = geometry_of(case), VideoSize(case["num_frames"], case["width"], case["height"])
        limits = {f"{end}_video_pixels": case[f"{end}_pixels"] for end in ("min", "max")}
        grid = video_grid(size, StepConfig(budget=budget, **limits), geometry)
        found = grid.rows * geometry.factor, grid.cols * geometry.factor
        assert (*found, grid.tokens) == (case["resized_height"], case["resized_width"], case["tokens"]), case


def test_frames_that_are_taken_and_when_they_are(folder):
    data, geometry = json.loads((folder / "sampling.json").read_text()), geometry_of({})
    assert data["library"] and data["utility_package"]
    for case in data["library"]:
        clip, limits = Clip(case["total_num_frames"], case["video_fps"], 64, 64), ("min_frames", "max_frames")
        config = StepConfig(budget="video", fps=float(case["fps"] or 2), **{name: case[name] for name in limits})
        chosen = choose_frames(clip, config, geometry, case["num_frames"])
        head, shown = (64, [*chosen[:64], *chosen[-4:]]) if "indices_are" in case else (None, chosen)
        assert shown == case["indices"] and sum(chosen) == case.get("indices_sum", sum(chosen)), case
        times = clip.times([*chosen, *chosen[-1:] * (len(chosen) % 2)])[:head]
        means = [(first + last) / 2 for first, last in zip(times[::2], times[1::2], strict=True)]
        assert means == case["timestamps"], "to the last digit, which decides how some are written"
        assert [f"<{seconds:.1f} seconds>" for seconds in means] == case["texts"]


OPTIONS = {"fps": "fps", "max_frames": "max_frames", "min_frames": "min_frames", "total_pixels": "total_pixels",
           "min_pixels": "min_frame_pixels", "max_pixels": "max_frame_pixels"}  # fmt: skip
"""Of the authors' package -> of ours."""


def test_frames_and_sizes_of_the_authors_scripts(folder):
    geometry = geometry_of({})
    for case in json.loads((folder / "sampling.json").read_text())["utility_package"]:
        options = dict(case["options"])
        count, ends = options.pop("nframes", None), (options.pop("video_start", None), options.pop("video_end", None))
        config = StepConfig(**{OPTIONS[name]: value for name, value in options.items()})
        clip = Clip(case["total_num_frames"], case["video_fps"], case["width"], case["height"])
        within = None if ends == (None, None) else (ends[0] or 0.0, ends[1] or clip.frames / clip.fps)
        chosen = choose_frames(clip, config, geometry, count, within)
        assert (len(chosen), chosen[-1], sum(chosen)) == (case["num_frames"], case["last_index"], case["index_sum"])
        assert chosen[: len(case["indices_head"])] == case["indices_head"]
        grid = video_grid(clip.taken(chosen), config, geometry)
        found = grid.rows * geometry.factor, grid.cols * geometry.factor, grid.tokens
        assert found == (case["resized_height"], case["resized_width"], case["tokens"]), case


def cut(frames, grid, vision, patch):
    """Normalised rows of patches, as the published processors make them."""
    c = dataclasses.replace(vision, patch_size=patch)
    tiles = np.empty((grid.tokens, c.tile.side, c.tile.side, c.tile.channels), np.uint8)
    write_blocks(frames, grid, np.arange(grid.rows * grid.cols), c.geometry, tiles)
    rows = normalise(jnp.asarray(tiles), c.channels(c.pixel_mean), c.channels(c.pixel_std), jnp.float32)
    return np.asarray(rows).reshape(-1, c.tile.channels)


LEVEL = 1.001 / 127.5
"""Of a colour, normalised: two ways of resizing differ by at most so much."""


def test_pixels_and_patches_of_images(folder, model):
    data, vision = np.load(folder / "image_processor.npz"), model.vlm.config.vision
    patch, limits = int(data["patch_size"]), {name: int(data[name]) for name in ("min_pixels", "max_pixels")}
    geometry = dataclasses.replace(vision, patch_size=patch).geometry
    for n in range(sum(name.startswith("pixel_values") for name in data.files)):
        image, resized = (Image.fromarray(data[f"{name}_{n}"]) for name in ("image", "resized"))
        grid = image_grid(*image.size, StepConfig(**limits), geometry)
        assert [1, grid.rows * 2, grid.cols * 2] == data[f"image_grid_thw_{n}"].ravel().tolist()
        np.testing.assert_allclose(cut([image], grid, vision, patch), data[f"pixel_values_{n}"], atol=1e-6)
        np.testing.assert_array_equal(cut([image], grid, vision, patch), cut([resized], grid, vision, patch))


def test_pixels_and_patches_of_videos(folder, model):
    data, vision = np.load(folder / "video_processor.npz"), model.vlm.config.vision
    patch, limits = (
        int(data["patch_size"]),
        {f"{end}_video_pixels": int(data[f"{end}_pixels"]) for end in ("min", "max")},
    )
    geometry = dataclasses.replace(vision, patch_size=patch).geometry
    for n in range(sum(name.startswith("pixel_values") for name in data.files)):
        frames, resized = ([*map(Image.fromarray, data[f"{name}_{n}"])] for name in ("frames", "resized"))
        size = VideoSize(len(frames), *frames[0].size)
        grid = video_grid(size, StepConfig(budget="video", **limits), geometry)
        assert [grid.frames, grid.rows * 2, grid.cols * 2] == data[f"video_grid_thw_{n}"].ravel().tolist()
        wanted = data[f"pixel_values_videos_{n}"]
        np.testing.assert_allclose(cut(resized, grid, vision, patch), wanted, atol=1e-6)
        np.testing.assert_allclose(cut(frames, grid, vision, patch), wanted, atol=LEVEL)
    with pytest.raises(ValueError, match="at least the 2 frames of a patch, got 1"):
        volume_resize(1, 64, 64, geometry, 1, 10**6)


# --- chat -------------------------------------------------------------------------------------------------------------


def blank(grid, patch):
    return Image.new("RGB", (grid[2] * patch, grid[1] * patch))


def messages(case, geometry):
    """(role, parts) of a case, with pictures of its sizes; `add_vision_id` is a text before each."""
    images, counts = iter(case["image_grid_thw"]), {"image": 0, "video": 0}
    videos = iter(zip(case["video_grid_thw"], case["videos"], strict=True))
    found = []
    for message in case["messages"]:
        content, parts = message["content"], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part["type"]
            if kind == "text":
                parts.append(part["text"])
                continue
            counts[kind] += 1
            if case["add_vision_id"]:
                parts.append(f"{'Picture' if kind == 'image' else 'Video'} {counts[kind]}: ")
            if kind == "image":
                parts.append(blank(next(images), geometry.size))
            else:
                grid, about = next(videos)
                times = tuple(index / about["fps"] for index in about["frames_indices"])
                parts.append(Video([blank(grid, geometry.size)] * len(times), times=times))
        found.append((message["role"], parts))
    return found


def test_chat_templates(folder, model, tmp_path):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}')
    tokenizer = Tokenizer.load(tmp_path)
    vision, told = model.vlm.config.vision, 0
    small = dict(min_pixels=1, min_frame_pixels=1, min_video_pixels=1)
    for case in json.loads((folder / "chat_templates.json").read_text()):
        if case["tools"]:
            continue  # conversations with tools are no part of what is read here
        said = messages(case, vision.geometry)
        system = "".join(said.pop(0)[1]) if said[0][0] == "system" else None
        dialogue = chat.Dialogue(tuple(tuple(parts) for _, parts in said), system)
        assert "".join(chat.render(dialogue, chat.TEMPLATES["qwen-vl-steps"])) == case["template"], case["name"]
        for wrapper, expanded in (("none", "expanded"), ("outer", "expanded_newer_library")):
            image = StepConfig(**small, budget="video", video_wrapper=wrapper)
            processor = make_processor(tokenizer, image, vision.geometry, template="qwen-vl-steps")
            wanted = tokenizer.encode(case.get(expanded, case["expanded"]))
            if case["add_generation_prompt"]:
                turns = [tuple(parts) for _, parts in said]
                history = list(zip(turns[:-1:2], ("".join(answer) for answer in turns[1::2]), strict=True))
                found = processor.prompt(turns[-1], history=history, system=system).tokens_T
            else:
                names = {"user": "human", "assistant": "gpt"}
                turns = [{"from": names[role], "value": "".join(parts)} for role, parts in said]
                found = processor.encode(turns).tokens_T
            assert found.tolist() == wanted, case["name"]
            told += expanded in case
            if wrapper == "none":
                assert wanted == case["input_ids"]
    assert told > 5


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_positions(prompt, name):
    arrays, rows = prompt(name)
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(row.placed.positions_T, arrays["position_ids"][:, n, row.mask].T)
        assert row.placed.positions_T.max() + 1 == arrays["next_position"][n]
        assert arrays["rope_deltas"][n, 0] == arrays["next_position"][n] - len(row.tokens_T)
        np.testing.assert_array_equal(row.placed.visual_positions_M, row.placed.positions_T[row.is_visual])
        np.testing.assert_array_equal(row.placed.slot_C, np.arange(row.is_visual.sum()), "the order of the input")


def test_axes_take_turns_over_the_pairs_of_a_head(prompt, model):
    known = [name for name in PROMPTS if "rope_cos" in prompt(name)[0]]
    assert known
    for name in known:
        arrays, [row] = prompt(name)
        tables = model.vlm._tables(jnp.asarray(row.placed.positions_T[None]), model.vlm._frequencies_of(
            jnp.zeros((1, 1), jnp.int32), 1))  # fmt: skip
        for table, wanted in zip(tables, ("rope_cos", "rope_sin"), strict=True):
            np.testing.assert_allclose(np.concatenate([table[0]] * 2, axis=-1), arrays[wanted][0], atol=1e-5)


@pytest.mark.parametrize("name", SEEN)
def test_patches_of_a_frame_see_each_other(prompt, model, name):
    arrays, [row] = prompt(name)
    vision, layout = model.vlm.config.vision, row.placed.layout_I4
    np.testing.assert_array_equal(layout[:, 0], layout[:, 1], "a frame is one window")
    starts = (np.unique(layout[:, 1]) - 1) * vision.merge**2
    np.testing.assert_array_equal([*starts, len(layout) * vision.merge**2], arrays["vision_cu_seqlens"])
    tower = model.vlm._merge(model.params).vision
    np.testing.assert_array_equal(tower.places(jnp.asarray(layout[None, :, 2:]))[0], arrays["vision_pos_hw"])
    for table, wanted in zip(tower.rotation(jnp.asarray(layout[None, :, 2:])), ("cos", "sin"), strict=True):
        both = np.concatenate([table[0], table[0]], axis=-1)
        np.testing.assert_allclose(both, arrays[f"vision_rope_{wanted}"], atol=1e-6)
    found = tower.positions(jnp.asarray(layout[None]))[0]
    np.testing.assert_allclose(found, arrays["vision_pos_embed"], atol=1e-5)


def test_the_table_of_positions_is_stretched_to_each_frame(folder, model):
    tower, merge = model.vlm._merge(model.params).vision, model.vlm.config.vision.merge
    data = np.load(folder / "pos_embed.npz")
    assert data.files
    for name in data.files:
        rows, cols = (int(side) // merge for side in name.removeprefix("pos_").split("x"))
        placed = qwen3_golden.place(
            np.zeros(rows * cols, int), [PatchGrid(1, rows, cols)], (0, 1), tower.config.geometry
        )
        np.testing.assert_allclose(tower.positions(jnp.asarray(placed.layout_I4[None]))[0], data[name], atol=1e-5)


def test_norms_of_small_numbers(folder, model):
    """Which a wrong epsilon changes by about 1."""
    modules, data = model.vlm._merge(model.params), np.load(folder / "norms.npz")

    def first(stacked, *names):
        graph, state = nnx.split(stacked)
        found = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
        return functools.reduce(getattr, names, found)

    norms = {
        "vision_norm1": first(modules.vision.layers, "norm1"),
        "merger_norm": modules.projector.norm,
        "deepstack_norm": first(modules.projector.levels, "norm"),
        "q_norm": first(modules.decoder.layers, "attn", "q_norm"),
        "final_norm": modules.decoder.norm,
    }
    assert {f"{name}_{end}" for name in norms for end in ("in", "out")} == set(data.files)
    for name, norm in norms.items():
        np.testing.assert_allclose(norm(jnp.asarray(data[f"{name}_in"])), data[f"{name}_out"], atol=1e-5, rtol=1e-5)


# --- vision tower -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(prompt, model):
    """Those prompts as rows of one batch, padded."""
    rows = [row for name in SEEN for row in prompt(name)[1]]
    return qwen3_golden.batch(model.vlm, rows)


@pytest.fixture(scope="module")
def layer_outputs(model, seen):
    """What goes into the first layer, and outputs of each layer, one after the other."""
    vision = model.vlm._merge(model.params).vision
    c, (graph, layers) = vision.config, nnx.split(vision.layers)
    layout_BI4 = seen.views.layout_BI4
    segments = Segments(*(jnp.repeat(layout_BI4[..., n], c.merge**2, axis=1) for n in range(2)))
    tables = vision.rotation(layout_BI4[..., 2:])
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, tables, segments, None))
    outputs = [vision.enter(seen.views.pixels_BISSc, layout_BI4)]
    for n in range(c.layers):
        outputs.append(run(jax.tree.map(lambda leaf, n=n: leaf[n], layers), outputs[-1]))
    return outputs


@pytest.mark.parametrize("name", SEEN)
def test_each_layer_of_the_vision_tower(prompt, layer_outputs, name):
    arrays, [row] = prompt(name)
    n, count = SEEN.index(name), len(arrays["vision_patch_embed"])
    np.testing.assert_allclose(layer_outputs[0][n, :count], arrays["vision_block_input"], **TOWER)
    for layer, found in enumerate(layer_outputs[1:]):
        np.testing.assert_allclose(found[n, :count], arrays[f"vision_block_{layer}"], **TOWER)


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret", "gpu_interpret"])
def test_visual_tokens_and_what_deeper_layers_add_to_them(prompt, model, seen, implementation):
    vlm = VLM(dataclasses.replace(model.vlm.config, attention=AttentionConfig(implementation)))
    visual = jax.jit(vlm.see)(model.params, seen.views)
    assert len(visual.deep_NBMD) == len(vlm.config.vision.deep_layers)
    for n, name in enumerate(SEEN):
        arrays, [row] = prompt(name)
        count = int(row.is_visual.sum())
        np.testing.assert_allclose(visual.tokens_BMD[n, :count], arrays["vision_merged"], **MERGED)
        for level, deep_BMD in enumerate(visual.deep_NBMD):
            np.testing.assert_allclose(deep_BMD[n, :count], arrays[f"vision_deepstack_{level}"], **MERGED)


# --- the whole model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(prompt, model):
    """All prompts as rows of one batch, padded on the right (in one file they were on the left)."""
    return qwen3_golden.batch(model.vlm, [row for name in FILES for row in prompt(name)[1]])


@pytest.fixture(scope="module")
def of_file(prompt):
    """(row of `everything`, row of the file, golden arrays, what is known of it) of the prompts of a file."""

    def rows(name):
        first = sum(len(prompt(other)[1]) for other in FILES[: FILES.index(name)])
        arrays, found = prompt(name)
        return [(first + n, n, arrays, row) for n, row in enumerate(found)]

    return rows


@pytest.fixture(scope="module")
def outputs(model, everything):
    return jax.jit(lambda *x: (model.vlm.logits(*x), model.vlm.hidden(*x)))(model.params, everything)


@pytest.mark.parametrize("name", FILES)
def test_logits_and_hidden_states(of_file, model, outputs, name):
    logits, hidden = outputs
    last = f"hidden_{model.vlm.config.decoder.layers}"
    for b, n, arrays, row in of_file(name):
        t = len(row.tokens_T)
        np.testing.assert_allclose(logits[b, :t], arrays["logits"][n, row.mask], **LOGITS)
        if last in arrays:
            np.testing.assert_allclose(hidden[b, :t], arrays[last][n, row.mask], **LOGITS)


def test_loss_of_the_next_token(of_file, outputs):
    """In fp32 it is that of the published logits, at every token of every prompt."""
    for name in FILES:
        for b, n, arrays, row in of_file(name):
            wanted = arrays["logits"][n, row.mask].astype(np.float64)
            found, next_T = np.asarray(outputs[0][b, : len(row.tokens_T)], np.float64), row.tokens_T[1:, None]
            losses = [
                -np.take_along_axis(x[:-1] - np.log(np.exp(x[:-1]).sum(-1, keepdims=True)), next_T, -1).mean()
                for x in (found, wanted)
            ]
            np.testing.assert_allclose(*losses, rtol=1e-5)


def test_embeddings_and_each_layer(of_file, model, everything):
    """Before and after what is added to visual tokens there."""
    vlm, c = model.vlm, model.vlm.config.decoder
    named, levels = [row for name in PROMPTS for row in of_file(name)], len(vlm.config.vision.deep_layers)
    found = jax.jit(functools.partial(embeddings, vlm))(model.params, everything)
    for b, n, arrays, row in named:
        np.testing.assert_allclose(found[b, : len(row.tokens_T)], arrays["inputs_embeds"][n], **LOGITS)
    visual = jax.jit(vlm.see)(model.params, everything.views)
    for layers in range(1, c.layers):
        short = VLM(dataclasses.replace(vlm.config, decoder=dataclasses.replace(c, layers=layers)))
        decoder = dict(model.params["decoder"])
        decoder["layers"] = jax.tree.map(lambda leaf, n=layers: leaf[:n], decoder["layers"])
        decoder["norm"] = {"scale": jnp.ones_like(decoder["norm"]["scale"])}
        compared = {f"hidden_{layers}": layers, f"layer_{layers - 1}_before_deepstack": layers - 1}
        for key, added in list(compared.items())[: 1 + (layers <= levels)]:
            deep = None if not added else visual.deep_NBMD[:added]
            part = dataclasses.replace(visual, deep_NBMD=deep)
            found = jax.jit(short.read)(dict(model.params, decoder=decoder), everything.text, part)
            for b, n, arrays, row in named:
                wanted = arrays[key][n]
                # what our last norm makes of it
                wanted = wanted / np.sqrt((wanted**2).mean(-1, keepdims=True) + c.norm_eps)
                np.testing.assert_allclose(found[b, : len(row.tokens_T)], wanted, **LOGITS)


def decode(model, known, logits, state, steps):
    """Follows the published choices from a state, and compares the scores before each."""
    step, ids = jax.jit(functools.partial(extended, model.vlm)), np.zeros((len(logits), steps), np.int32)
    for b, n, arrays, _ in known:
        ids[b] = arrays["greedy_ids"][n]
        assert state.position_B[b] == arrays["next_position"][n]
    for t in range(steps):
        for b, n, arrays, _ in known:
            np.testing.assert_allclose(logits[b], arrays["greedy_step_logits"][n, t], **LOGITS)
            assert logits[b].argmax() == ids[b, t]
        logits, state = step(model.params, state, jnp.asarray(ids[:, t : t + 1]), jnp.ones(len(ids), jnp.int32))


def test_greedy_decoding_with_the_cache(of_file, model, everything):
    known = [row for name in FILES for row in of_file(name)]
    steps = {row[2]["greedy_ids"].shape[1] for row in known}.pop()
    capacity = everything.text.tokens_BT.shape[1] + steps
    decode(model, known, *jax.jit(model.vlm.prefill, static_argnums=2)(model.params, everything, capacity), steps)


def test_greedy_decoding_after_a_prompt_in_chunks(of_file, model, everything):
    """That cut images, and steps of videos, in two: what deeper layers add follows the tokens."""
    vlm, chunk = model.vlm, 11
    known = [row for name in FILES for row in of_file(name)]
    steps, T = known[0][2]["greedy_ids"].shape[1], everything.text.tokens_BT.shape[1]
    cuts = [row.is_visual[at - 1 : at + 1].all() for *_, row in known for at in range(chunk, len(row.tokens_T), chunk)]
    assert any(cuts)
    text = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2)), everything.text)
    visual = jax.jit(vlm.see)(model.params, everything.views)
    state = vlm.begin((text.segments_BT > 0).sum(-1, dtype=jnp.int32), text.tokens_BT.shape[1] + steps)
    logits, first, later = jnp.zeros((len(text.tokens_BT), vlm.config.decoder.vocab)), *(jax.jit(vlm.extend),) * 2
    for at in range(0, T, chunk):
        part = jax.tree.map(lambda x, at=at: x[:, at : at + chunk], text)
        hidden_BD, state = (later if at else first)(model.params, state, part, visual)
        here_B = (part.segments_BT > 0).any(-1)
        logits = jnp.where(here_B[:, None], vlm.score(model.params, hidden_BD), logits)
    decode(model, known, logits, state, steps)


def test_greedy_decoding_without_the_cache(of_file, model, everything):
    """Every token's choice in one forward pass over prompt and answer."""
    vlm, [(_, n, arrays, row)] = model.vlm, of_file("mixed")
    ids = arrays["greedy_ids"][n]
    longer = SimpleNamespace(**vars(row))
    longer.tokens_T = np.append(row.tokens_T, ids.astype(np.int32))
    longer.is_visual = np.append(row.is_visual, np.zeros(len(ids), bool))
    after = arrays["next_position"][n] + np.arange(len(ids), dtype=np.int32)
    longer.placed = row.placed._replace(positions_T=np.append(row.placed.positions_T, after[:, None].repeat(3, 1), 0))
    logits = jax.jit(vlm.logits)(model.params, qwen3_golden.batch(vlm, [longer]))
    np.testing.assert_array_equal(logits[0, len(row.tokens_T) - 1 : -1].argmax(-1), ids)


def test_a_tap_needs_its_layer(model, everything):
    visual = jax.eval_shape(model.vlm.see, model.params, everything.views)
    few = dataclasses.replace(model.vlm.config.decoder, layers=len(visual.deep_NBMD) - 1)
    short = VLM(dataclasses.replace(model.vlm.config, decoder=few))
    with pytest.raises(
        ValueError, match=f"a tap stands at layer {few.layers}, .* model.decoder.layers is {few.layers}"
    ):
        jax.eval_shape(short.read, short.abstract(), everything.text, visual)
    assert deep_tap(visual, everything.text.visual_index_BT).layers == tuple(range(len(visual.deep_NBMD)))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", qwen3_vl.LAYOUTS)
def test_each_layout_of_a_checkpoint_is_the_same_parameters(model, folder, tmp_path, prefixes):
    names = json.loads((folder / "weight_keys.json").read_text())
    table = qwen3_vl.name_table(model.vlm.config)
    hub = {name: list(rule.shape) for rule in table for name in rule.names}
    copies = {name for rule in table for name in rule.copies}  # a tied head may be listed
    assert hub == {name: shape for name, shape in names.values() if name not in copies}
    (tmp_path / "model.safetensors").symlink_to(folder.resolve() / "checkpoint_hub_layout.safetensors")
    tensors, (tower, text) = dict(Tensors(tmp_path)), qwen3_vl.PUBLISHED
    moved = {
        name.replace(tower, prefixes[0], 1) if name.startswith(tower) else name.replace(text, prefixes[1], 1): x
        for name, x in tensors.items()
    }
    assert qwen3_vl.layout(moved) == prefixes
    for path, leaf in flatten(from_arrays(model.vlm.config, moved)).items():
        np.testing.assert_array_equal(leaf, flatten(model.params)[path], strict=True, err_msg=path)
