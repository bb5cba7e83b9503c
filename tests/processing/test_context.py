"""The context budget: what of a picture or video stands in the sequence, in every family."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.patches_world import save_tokenizer
from vlmem_jax import positions
from vlmem_jax.hub.tokenizer_files import TokenizerFiles
from vlmem_jax.positions import PLACES, PatchGrid
from vlmem_jax.processing import FrameConfig, ImageConfig, PatchConfig, Tokenizer, Video, make_processor
from vlmem_jax.processing.chat import FRAME
from vlmem_jax.processing.context import Context, read_context
from vlmem_jax.types import IGNORED, FrameGeometry, PatchGeometry, TileGeometry

TILES, PATCHES = TileGeometry(12, 3), PatchGeometry(size=4, frames=2, merge=2, window=2, tokens_per_second=2.0)
TILE_CONTEXTS = "all", "thumbnail", "pooled:2", "pooled:3", "stride:2", "stride:3"
PATCH_CONTEXTS = "all", "pooled:2", "pooled:3", "stride:2", "stride:3"
FRAMES = FrameGeometry(12, 6)
FRAME_CONTEXTS = "all", "stride:2", "stride:3", "kept:3"
CONTEXTS = {TILES: TILE_CONTEXTS, PATCHES: PATCH_CONTEXTS, FRAMES: FRAME_CONTEXTS}
CONVERSATION = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Yes."}]


@pytest.fixture(scope="module")
def tokenizers(char_tokenizer, tmp_path_factory):
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    TokenizerFiles.of(folder, (FRAME,)).copy(folder / "frames", {"<|video_frame|>": Tokenizer.load(folder).vocab_size})
    return {TILES: char_tokenizer, PATCHES: Tokenizer.load(folder), FRAMES: Tokenizer.load(folder / "frames")}


@pytest.fixture(scope="module")
def make(tokenizers):
    """A processor of either family."""

    def make(geometry, context, whole=True, **image):
        if geometry is PATCHES:
            config = PatchConfig(64, 1024, min_frame_pixels=64, max_frame_pixels=512, context=context, **image)
            return make_processor(tokenizers[geometry], config, geometry, None, "qwen2-vl", whole)
        if geometry is FRAMES:
            config = FrameConfig(context=context, **image)
            return make_processor(tokenizers[geometry], config, geometry, None, "llava-video", whole)
        return make_processor(tokenizers[geometry], ImageConfig(context=context, **image), geometry, None, whole=whole)

    return make


def picture(size, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise)


def clip(frames, size):
    return Video([picture(size, n) for n in range(frames)], seconds=0.4)


def in_sequence(processor, sample):
    return np.isin(sample.tokens_T, (processor.context_id, processor.video_id))


@st.composite
def cases(draw):
    geometry = draw(st.sampled_from(list(CONTEXTS)))
    context = draw(st.sampled_from(CONTEXTS[geometry]))
    sizes = draw(st.lists(st.tuples(st.integers(6, 60), st.integers(6, 60)), min_size=1, max_size=3))
    frames = draw(st.integers(0, 7))
    image = {"dhr_map": draw(st.sampled_from(positions.DHR_MAPS))} if geometry is TILES else {}
    return geometry, context, draw(st.booleans()), sizes, frames, image


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_placeholders_are_features_and_the_plan_knows_both_from_headers(make, case):
    geometry, context, whole, sizes, frames, image = case
    processor = make(geometry, context, whole, **image)
    if frames:
        video = clip(frames, sizes[0])
        sample = processor.encode(CONVERSATION, videos=[video])
        plan = processor.plan(CONVERSATION, video_sizes=[video.size])
    else:
        sample = processor.encode(CONVERSATION, [picture(size) for size in sizes])
        plan = processor.plan(CONVERSATION, sizes)
    assert plan == (len(sample.tokens_T), len(sample.pixels_ISSc), (sample.labels_T != IGNORED).sum())
    M, there_T = plan.tiles * processor.tile.tokens, in_sequence(processor, sample)
    assert len(sample.visual_positions_M) == M and (sample.visual_index_T[~there_T] == -1).all()
    index_C, positions_C = sample.visual_index_T[there_T], sample.positions_T[there_T]
    assert len(set(index_C.tolist())) == len(index_C), "no two placeholders stand for the same"
    of_visual_M = sample.visual_positions_M // processor.tile.places
    if sample.pool_M is not None:  # a mean has the position of all that it is made of
        assert sorted(set(sample.pool_M.tolist())) == sorted(index_C.tolist()) == list(range(len(index_C)))
        np.testing.assert_array_equal(of_visual_M, positions_C[np.argsort(index_C)][sample.pool_M])
    else:
        np.testing.assert_array_equal(of_visual_M[index_C], positions_C)
        near = set(map(tuple, positions_C.reshape(len(index_C), -1).tolist()))
        assert set(map(tuple, of_visual_M.reshape(M, -1).tolist())) <= near, "what is not shown borrows a position"


@pytest.mark.parametrize("kind", positions.DHR_MAPS)
def test_of_a_tiled_image_the_thumbnail_stands_in_the_sequence(make, kind):
    wide, whole = picture((48, 24)), make(TILES, "thumbnail", dhr_map=kind, max_tiles=8)
    sample, every = (processor.prompt("What?", [wide]) for processor in (whole, make(TILES, "all", max_tiles=8)))
    np.testing.assert_array_equal(sample.pixels_ISSc, every.pixels_ISSc)
    assert len(sample.pixels_ISSc) == 9 and in_sequence(whole, sample).sum() == 9
    assert sample.visual_index_T.max() == 9 * 9 - 1 and sample.visual_index_T[in_sequence(whole, sample)][0] == 8 * 9
    # without a reader of the tiles, they are not seen at all: as an image of one tile
    alone = make(TILES, "thumbnail", whole=False, dhr_map=kind, max_tiles=8).prompt("What?", [wide])
    one = make(TILES, "all", whole=False, dhr_map=kind, max_tiles=1).prompt("What?", [wide])
    for name in ("tokens_T", "positions_T", "visual_index_T", "pixels_ISSc", "visual_positions_M"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(one, name))
    np.testing.assert_array_equal(alone.positions_T, sample.positions_T)
    start = int(sample.positions_T[in_sequence(whole, sample)][0])
    cells = positions.dhr_map(4, 2, 3, start, kind)
    np.testing.assert_array_equal(sample.visual_positions_M // whole.tile.places, cells)


def test_fine_places_tell_the_tokens_of_a_cell_apart(make):
    processor = make(TILES, "thumbnail", dhr_map="fine")
    assert processor.tile.places == PLACES
    sample = processor.prompt("What?", [picture((24, 24))])
    tiles_M, thumbnail_M = np.split(sample.visual_positions_M, [4 * 9])
    assert len(set(tiles_M.tolist())) == len(tiles_M), "each token of a 2x2 grid has an id of its own"
    assert not (thumbnail_M % PLACES).any()
    # the four tokens of the first cell lie at the top left of the first tile, one quarter of a position apart
    tile_RC = tiles_M[:9].reshape(3, 3) - tiles_M.min()
    assert tile_RC[:2, :2].tolist() == [[0, PLACES // 4], [PLACES // 2, 3 * PLACES // 4]]
    assert make(TILES, "thumbnail", whole=False, dhr_map="fine").tile.places == 1, "nobody reads them"


def test_means_are_of_neighbours_and_smaller_at_the_edges(make):
    sample = make(TILES, "pooled:2").prompt("What?", [picture((24, 12))])
    first, second, thumbnail = sample.pool_M.reshape(3, 3, 3)
    assert first.tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3]]
    np.testing.assert_array_equal(second, first + 4)
    np.testing.assert_array_equal(thumbnail, first + 8)
    grid = PatchGrid(2, 3, 5, 0.4)
    owner_M, first_C = grid.owners(1, 3)
    assert grid.thinned(1, 3) == (2, 1, 2, 0.4)
    assert owner_M.reshape(2, 3, 5).tolist() == [[[0, 0, 0, 1, 1]] * 3, [[2, 2, 2, 3, 3]] * 3] and len(first_C) == 4


def test_a_mean_has_the_places_of_a_smaller_picture(make):
    processor = make(PATCHES, "pooled:2")
    sample = processor.prompt("What?", [picture((40, 24))])  # 3 x 5 tokens
    block = sample.positions_T[in_sequence(processor, sample)]
    assert (block - block[0]).tolist() == [[0, r, c] for r in range(2) for c in range(3)]


@pytest.mark.parametrize("geometry", [TILES, PATCHES], ids=["tiles", "patches"])
@pytest.mark.parametrize("frames", [1, 4, 7])
def test_every_nth_frame_stands_in_the_sequence(make, geometry, frames):
    video = clip(2 * frames if geometry is PATCHES else frames, (24, 16))
    step = 2 if geometry is PATCHES else 1
    kept = [frame for n in range(0, frames, 3) for frame in video.frames[step * n : step * n + step]]
    every, alone = make(geometry, "all"), make(geometry, "stride:3", whole=False)
    fewer = every.prompt("What?", videos=[Video(kept, seconds=3 * video.seconds)])
    unread = alone.prompt("What?", videos=[video])
    for name in ("tokens_T", "positions_T", "visual_index_T", "pixels_ISSc", "visual_positions_M"):
        np.testing.assert_array_equal(getattr(unread, name), getattr(fewer, name), err_msg=name)
    read = make(geometry, "stride:3").prompt("What?", videos=[video])
    np.testing.assert_array_equal(read.tokens_T, unread.tokens_T)
    np.testing.assert_array_equal(read.positions_T, unread.positions_T)
    np.testing.assert_array_equal(read.pixels_ISSc, every.prompt("What?", videos=[video]).pixels_ISSc)
    # what stands in the sequence are the frames that are left
    C, P = len(unread.pixels_ISSc) * alone.tile.tokens, alone.tile.tokens
    index_C = read.visual_index_T[in_sequence(alone, read)]
    assert len(index_C) == C
    if geometry is TILES:
        np.testing.assert_array_equal(index_C // P, np.repeat(np.arange(0, frames, 3), P))
    else:
        shown = read.pixels_ISSc[index_C], unread.pixels_ISSc[unread.visual_index_T[in_sequence(alone, unread)]]
        np.testing.assert_array_equal(*shown)


@pytest.mark.parametrize(
    "text", ["", "some", "pooled", "pooled:1", "pooled:x", "stride:0", "kept:0", "thumbnail:2", "all "]
)
def test_what_names_no_context_is_an_error(text):
    with pytest.raises(ValueError, match=r"context must be all, thumbnail, pooled:k, stride:n or kept:n"):
        ImageConfig(context=text)


def test_a_context_must_be_possible():
    assert read_context("pooled:12") == Context("pooled", 12)
    with pytest.raises(ValueError, match="thumbnail must be true"):
        ImageConfig(context="thumbnail", thumbnail=False)
    with pytest.raises(ValueError, match="not cut into tiles"):
        PatchConfig(context="thumbnail")


def test_a_blank_tile_has_means_too(make):
    sample = make(TILES, "pooled:2").encode(CONVERSATION)
    assert sample.pool_M.tolist() == list(range(9)) and sample.visual_index_T.max() == -1


def test_frames_that_a_memory_keeps_are_for_models_that_see_frames():
    with pytest.raises(ValueError, match="context kept:n is for models that see frames, not tiles"):
        ImageConfig(context="kept:4")
