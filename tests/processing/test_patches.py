"""Images and frames to blocks of patches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing.patches import (
    PatchConfig,
    choose_frames,
    image_grid,
    smart_resize,
    video_grid,
    write_blocks,
)
from vlmem_jax.processing.video import Clip, VideoSize
from vlmem_jax.types import PatchGeometry

PUBLISHED = PatchGeometry(size=14, frames=2, merge=2, window=4, tokens_per_second=2.0)
TINY = PatchGeometry(size=2, frames=2, merge=2, window=2, tokens_per_second=2.0)
sides = st.integers(1, 3000)


@settings(deadline=None)
@given(sides, sides, st.sampled_from([4, 28, 32]))
def test_a_resized_image_has_whole_blocks_and_keeps_the_bounds(height, width, factor):
    if max(height, width) > 8 * min(height, width):
        return
    low, high = 4 * factor**2, 400 * factor**2
    rows, cols = smart_resize(height, width, factor, low, high)
    assert rows % factor == cols % factor == 0
    assert low <= rows * cols <= high
    if low <= height * width <= high:
        assert max(abs(rows - height), abs(cols - width)) <= factor


def test_halves_go_to_the_even_neighbour():
    assert smart_resize(42, 70, 28, 1, 10**6) == (56, 56)


def test_long_images_are_refused():
    with pytest.raises(ValueError, match="at most 200 times as long as wide, got 201x1 pixels"):
        smart_resize(1, 201, 28, 1, 10**6)


def test_the_bounds_are_config_keys():
    config = PatchConfig(min_pixels=100, max_pixels=64 * 16)
    assert image_grid(400, 100, config, TINY) == (1, 4, 16, 0.0)
    assert image_grid(3, 3, config, TINY) == (1, 3, 3, 0.0)
    for changes, message in (
        ({"min_pixels": 0}, "1 <= min_pixels <= max_pixels must hold, got 0 and"),
        ({"min_frames": 9, "max_frames": 8}, "1 <= min_frames <= max_frames must hold, got 9 and 8"),
        ({"fps": 0.0}, "fps must be a positive number of frames a second, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            PatchConfig(**changes)


def test_a_block_holds_its_patches_and_a_patch_its_values_in_order():
    """Blocks row by row, patches of a block row by row, values of a patch by colour, frame, row, column."""
    grid, rng = PatchGrid(2, 2, 3), np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 8, 12, 3), np.uint8)
    order = rng.permutation(6)
    blocks = np.empty((12, 2, 2, 3 * 2 * 2 * 2), np.uint8)
    write_blocks([Image.fromarray(frame) for frame in frames], grid, order, TINY, blocks)
    for step, place, y, x in np.ndindex(2, 6, 2, 2):
        row, col = divmod(int(order[place]), 3)
        patch = blocks[step * 6 + place, y, x].reshape(3, 2, 2, 2)
        pixel = 4 * row + 2 * y, 4 * col + 2 * x
        for colour, frame in np.ndindex(3, 2):
            shown = frames[min(2 * step + frame, 2)]  # the last frame is repeated
            wanted = shown[pixel[0] : pixel[0] + 2, pixel[1] : pixel[1] + 2, colour]
            np.testing.assert_array_equal(patch[colour, frame], wanted)


def test_an_image_fills_the_frames_of_its_patches_with_copies():
    blocks = np.empty((1, 2, 2, 24), np.uint8)
    write_blocks([Image.new("RGB", (50, 30), (10, 20, 30))], PatchGrid(1, 1, 1), np.array([0]), TINY, blocks)
    np.testing.assert_array_equal(blocks.reshape(4, 3, 8), np.broadcast_to([[10], [20], [30]], (4, 3, 8)))


# --- videos -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frames, fps, changes, count",
    [
        (100, 25.0, {}, 8),  # 4 seconds
        (110, 25.0, {}, 8),  # 8.8, an even number
        (25, 25.0, {}, 4),  # min_frames
        (3, 25.0, {}, 2),  # as many as there are
        (10**5, 25.0, {}, 768),  # max_frames
        (100, 25.0, {"fps": 10.0}, 40),
        (100, 25.0, {"min_frames": 11}, 12),
        (100, 25.0, {"fps": 10.0, "max_frames": 7}, 6),
    ],
)
def test_frames_are_evenly_spaced_over_the_whole_video(frames, fps, changes, count):
    chosen = choose_frames(Clip(frames, fps, 64, 48), PatchConfig(**changes), PUBLISHED)
    assert len(chosen) == count and chosen[0] == 0 and chosen[-1] == frames - 1
    assert chosen == [round(i * (frames - 1) / (count - 1)) for i in range(count)]


def test_a_video_of_one_frame_is_too_short():
    with pytest.raises(ValueError, match="must have at least 2 frames.*image.max_frames 768.*; got 1"):
        choose_frames(Clip(1, 25.0, 64, 48), PatchConfig(), PUBLISHED)


def test_time_of_a_step():
    """2 frames a second are a second a step; taken sparser, a step is longer."""
    clip = Clip(100, 25.0, 64, 48)
    for wanted, seconds in (({}, 1.0), ({"min_frames": 20}, 0.4), ({"max_frames": 4}, 2.0)):
        chosen = choose_frames(clip, PatchConfig(**wanted), PUBLISHED)
        assert video_grid(clip.taken(chosen), PatchConfig(), PUBLISHED).seconds == pytest.approx(seconds)


def test_frames_share_the_pixels_of_a_video():
    """768 x 784 pixels a frame, less where many frames would go over the total, no bound below 1.05 x 128 x 784."""
    few, some, many = (
        video_grid(VideoSize(count, 1920, 1080), PatchConfig(total_pixels=2000 * 784), PUBLISHED)
        for count in (4, 8, 768)
    )
    assert few.rows * few.cols == 720 and few.frames == 2
    assert some.rows * some.cols == 464 and many.rows * many.cols == 120
    assert video_grid(VideoSize(5, 1920, 1080), PatchConfig(), PUBLISHED).frames == 3
