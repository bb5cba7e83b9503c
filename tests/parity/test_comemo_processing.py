"""Positions, tilings, prompts and training samples of CoMemo against the reference numbers."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from vlmem_jax.positions import dhr_map, sequence_positions
from vlmem_jax.processing import ImageConfig, TileProcessor, Tokenizer, chat
from vlmem_jax.processing.images import tile_grid, tile_image
from vlmem_jax.types import IGNORED, TileGeometry
from vlmem_jax.vision import VisionConfig, normalise

MEAN, STD = VisionConfig.pixel_mean, VisionConfig.pixel_std


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "comemo"


def test_dhr_maps(folder):
    maps = np.load(folder / "rope_dhr_maps.npz")
    for name in maps.files:
        side, cols, rows = map(int, re.fullmatch(r"s(\d+)_x(\d+)_y(\d+)", name).groups())
        np.testing.assert_array_equal(dhr_map(cols, rows, side), maps[name], err_msg=name)


@pytest.mark.parametrize(
    ("prefix", "options"), [("", {}), ("plain_", {"rope_dhr": False}), ("raster_", {"kind": "raster"})]
)
def test_positions_of_whole_sequences(folder, prefix, options):
    data = np.load(folder / "rope_dhr_layouts.npz")
    for name in data["names"]:
        grids = [tuple(map(int, grid)) for grid in data[f"{name}/grids"]]
        context_id = int(data[f"{name}/special_ids"][2])
        positions, memory = sequence_positions(
            data[f"{name}/input_ids"], grids, int(data[f"{name}/side"]), context_id, **options
        )
        np.testing.assert_array_equal(positions, data[f"{name}/{prefix}position_ids"], err_msg=name)
        np.testing.assert_array_equal(memory, data[f"{name}/{prefix}media_position_ids"], err_msg=name)


def test_tiling(folder):
    for row in json.loads((folder / "tiling.json").read_text()):
        config = ImageConfig(
            min_tiles=row["min_num"],
            max_tiles=max(row["max_num"], row["min_num"]),
            thumbnail=row["use_thumbnail"],
        )
        cols, rows = tile_grid(row["width"], row["height"], row["image_size"], config, max_tiles=row["max_num"])
        assert (cols, rows) == (row["cols"], row["rows"]), row
        blank = Image.new("RGB", (row["width"], row["height"]))
        # the number of tiles does not depend on their size
        assert len(tile_image(blank, (cols, rows), 2, config.thumbnail)) == row["num_tiles"], row


def test_pixels(folder):
    data = np.load(folder / "preprocess_small.npz")
    for name in sorted({key.split("/")[0] for key in data.files}):
        image = Image.fromarray(data[f"{name}/image"])
        size, config = int(data[f"{name}/image_size"]), ImageConfig(max_tiles=int(data[f"{name}/max_num"]))
        grid = tile_grid(*image.size, size, config)
        assert grid == tuple(data[f"{name}/grid"]), name
        tiles = tile_image(image, grid, size)
        # other versions of Pillow may round another way
        np.testing.assert_allclose(tiles.astype(int), data[f"{name}/tiles_u8"], atol=1, err_msg=name)
        normalised = np.asarray(normalise(tiles, MEAN, STD, np.float32))
        atol = 1.01 / 255 / min(STD)
        np.testing.assert_allclose(normalised.transpose(0, 3, 1, 2), data[f"{name}/pixel_values"], atol=atol)


def test_prompts(folder):
    data = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    for case in data["cases"]:
        # the released code reads markers in questions, too, and shows an image before a first question without any
        images, turns = [(1, 1)] * len(case["num_patches"]), [*sum(case["history"] or [], []), case["question"]]
        template = chat.template(data["template"])
        is_marked = any(chat.IMAGE_MARKER in turn for turn in turns[::2])
        messages = chat.marked(turns, images if is_marked else [])
        if not is_marked:
            messages = (*messages[:-1], chat.message(case["question"], images, after=template.before_text))
        prompt = "".join(chat.render(chat.Dialogue(messages), template))
        for tiles in case["num_patches"]:
            prompt = prompt.replace("<IMG_CONTEXT>", "<context>" * (tiles * case["tokens_per_tile"]), 1)
        assert prompt.replace("<context>", "<IMG_CONTEXT>") == case["prompt"], case


# Training samples: the fixture holds ids but no texts. Every id gets a character of its own, and the characters of the
# template are read off the template's ids, so that a conversation can be written whose ids must be the fixture's.


def character(index):
    return chr(0xE000 + int(index))  # private use


def write_tokenizer(folder, vocab, special):
    """Every character is a token; several characters may share an id."""
    added = [
        {"id": index, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token, index in special.items()
    ]
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<s>"}
    content = {"version": "1.0", "added_tokens": added, "pre_tokenizer": split, "model": model}
    content |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def packed(folder):
    return np.load(folder / "packed_training.npz")


@pytest.fixture(scope="module")
def sizes(folder):
    return json.loads((folder / "config.json").read_text())


def split_turns(ids, start, end):
    """The ids of each turn, without the control tokens round it."""
    starts, ends = np.flatnonzero(ids == start), np.flatnonzero(ids == end)
    return [ids[first + 1 : last] for first, last in zip(starts, ends, strict=True)]


@pytest.fixture(scope="module")
def processor(packed, sizes, tmp_path_factory):
    img, img_end, context, start, end = map(int, packed["special_ids"])
    special = {"<img>": img, "</img>": img_end, "<IMG_CONTEXT>": context, "<|im_start|>": start, "<|im_end|>": end}
    special |= {"<s>": sizes["bos_token_id"], "</s>": sizes["pad_token_id"]}
    vocab = {character(index): index for index in range(sizes["llm_config"]["vocab_size"])} | special
    system, *turns = split_turns(packed["sample0/input_ids"], start, end)
    for role, ids in (("system", system), ("user", turns[0]), ("assistant", turns[1])):
        vocab |= {letter: int(index) for letter, index in zip(f"{role}\n", ids, strict=False)}
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, vocab, special)
    text = "".join(map(character, system[len("system\n") :]))
    geometry = TileGeometry(sizes["vision_config"]["image_size"], int(packed["side"]))
    return TileProcessor(Tokenizer.load(folder), ImageConfig(), geometry, system=text)


def conversation(processor, ids, packed):
    """The messages whose tokens are `ids`."""
    img, img_end, _, start, end = map(int, packed["special_ids"])
    messages = []
    for index, turn in enumerate(split_turns(ids, start, end)[1:]):
        role = "assistant\n" if index % 2 else "user\n"
        assert processor.tokenizer.encode(role) == turn[: len(role)].tolist()
        text, inside = "", False
        for token in turn[len(role) :]:
            text += "<image>" if token == img else "" if inside or token == img_end else character(token)
            inside = token == img or (inside and token != img_end)
        messages.append({"from": "gpt" if index % 2 else "human", "value": text})
    return messages


def test_training_samples(processor, packed):
    names = sorted({key.split("/")[0] for key in packed.files if re.match(r"sample\d+/", key)})
    assert names
    for name in names:
        expected = {key.split("/")[1]: packed[key] for key in packed.files if key.startswith(f"{name}/")}
        images = [Image.new("RGB", tuple(map(int, size))) for size in expected["image_sizes"]]
        messages = conversation(processor, expected["input_ids"], packed)
        sample = processor.encode(messages, images, name=name)
        np.testing.assert_array_equal(sample.tokens_T, expected["input_ids"], err_msg=name)
        np.testing.assert_array_equal(sample.labels_T, expected["labels"], err_msg=name)
        np.testing.assert_array_equal(sample.positions_T, expected["position_ids"], err_msg=name)
        np.testing.assert_array_equal(sample.visual_positions_M, expected["cross_attention_media_position_ids"])
        tiles = len(sample.pixels_ISSc)
        assert [tiles] == expected["seq_imgs"].tolist(), name
        spliced = np.zeros(tiles, int)
        spliced[np.unique(sample.visual_index_T[sample.visual_index_T >= 0]) // processor.tokens_per_side**2] = 1
        np.testing.assert_array_equal(spliced, expected["image_flags"], err_msg=name)
        plan = processor.plan(messages, [image.size for image in images])
        assert plan == (len(expected["input_ids"]), tiles, (expected["labels"] != IGNORED).sum()), name
        if expected["kind"] == "text":
            blank = packed["batch/pixel_values"][np.flatnonzero(packed["batch/image_flags"] == 0)[0]]
            normalised = np.asarray(normalise(sample.pixels_ISSc[0], MEAN, STD, np.float32))
            np.testing.assert_allclose(normalised.transpose(2, 0, 1), blank, atol=1e-5)
