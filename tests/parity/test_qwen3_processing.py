"""Images, videos and prompts of Qwen3-VL against numbers of the published processors."""

import dataclasses
import itertools
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import qwen3_golden
from PIL import Image

from vlmem_jax.processing import StepConfig, Tokenizer, Video, chat, make_processor, tools
from vlmem_jax.processing.patches import image_grid, smart_resize, write_blocks
from vlmem_jax.processing.steps import choose_frames, video_grid, volume_resize
from vlmem_jax.processing.video import Clip, VideoSize
from vlmem_jax.types import StepGeometry
from vlmem_jax.vision import normalise


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "qwen3_vl"


@pytest.fixture(scope="module")
def vision(folder):
    return qwen3_golden.load(folder).vlm.config.vision


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
    for case in json.loads((folder / "sampling.json").read_text())["utility_package"]:
        options = dict(case["options"])
        pixels = case["num_frames"] // 2 * case["resized_height"] * case["resized_width"]
        geometry = geometry_of({"factor": math.isqrt(pixels // case["tokens"])})
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


def test_pixels_and_patches_of_images(folder, vision):
    data = np.load(folder / "image_processor.npz")
    patch, limits = int(data["patch_size"]), {name: int(data[name]) for name in ("min_pixels", "max_pixels")}
    geometry = dataclasses.replace(vision, patch_size=patch).geometry
    for n in range(sum(name.startswith("pixel_values") for name in data.files)):
        image, resized = (Image.fromarray(data[f"{name}_{n}"]) for name in ("image", "resized"))
        grid = image_grid(*image.size, StepConfig(**limits), geometry)
        assert [1, grid.rows * 2, grid.cols * 2] == data[f"image_grid_thw_{n}"].ravel().tolist()
        np.testing.assert_allclose(cut([image], grid, vision, patch), data[f"pixel_values_{n}"], atol=1e-6)
        np.testing.assert_array_equal(cut([image], grid, vision, patch), cut([resized], grid, vision, patch))


def test_pixels_and_patches_of_videos(folder, vision):
    data = np.load(folder / "video_processor.npz")
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
        calls = [call["function"] for call in message.get("tool_calls", ())]
        found.append((message["role"], [tools.called(calls, "".join(parts))] if calls else parts))
    return found


def with_tools(said):
    """The same with the answers of tools, which follow each other, in one turn of the user."""
    turns = [(role, [parts for _, parts in some]) for role, some in itertools.groupby(said, lambda one: one[0])]
    return [
        pair
        for role, some in turns
        for pair in ([("user", tools.answered(some))] if role == "tool" else [(role, parts) for parts in some])
    ]


def test_chat_templates(folder, vision, tmp_path):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}')
    tokenizer = Tokenizer.load(tmp_path)
    told = 0
    small = dict(min_pixels=1, min_frame_pixels=1, min_video_pixels=1)
    for case in json.loads((folder / "chat_templates.json").read_text()):
        said = with_tools(messages(case, vision.geometry))
        system = "".join(said.pop(0)[1]) if said[0][0] == "system" else None
        system = tools.told(case["tools"], system) if case["tools"] else system
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
