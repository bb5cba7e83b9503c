"""Opening, tiling and resizing images, good and bad."""

import pathlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmem_jax
from vlmem_jax.processing.images import (
    ImageConfig,
    image_size,
    jpeg_round_trip,
    open_image,
    tile_grid,
    tile_image,
)
from vlmem_jax.processing.media import Encoded

SIZES = st.integers(1, 4000)


def noise(width, height, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def png_header(width, height):
    """A PNG of that size by its header, with next to no data."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# tiling


@given(width=SIZES, height=SIZES, least=st.integers(1, 4), more=st.integers(0, 12))
def test_grid_has_the_shape_nearest_to_the_images(width, height, least, more):
    config = ImageConfig(min_tiles=least, max_tiles=least + more)
    cols, rows = tile_grid(width, height, 448, config)
    assert least <= cols * rows <= least + more
    distances = [
        abs(width / height - c / r)
        for c in range(1, least + more + 1)
        for r in range(1, least + more + 1)
        if least <= c * r <= least + more
    ]
    assert abs(width / height - cols / rows) == min(distances)


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (448, 448, (1, 1)),
        (640, 640, (2, 2)),
        (1400, 1400, (3, 3)),
        (30000, 1, (12, 1)),
        (1, 30000, (1, 12)),
        (1, 1, (1, 1)),
    ],
)
def test_of_grids_of_one_shape_the_number_of_pixels_decides(width, height, grid):
    assert tile_grid(width, height, 448, ImageConfig()) == grid


def test_a_limit_below_every_grid_gives_one_tile():
    assert tile_grid(640, 480, 448, ImageConfig(), max_tiles=0) == (1, 1)
    assert tile_grid(640, 480, 448, ImageConfig(min_tiles=3), max_tiles=2) == (1, 1)


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.sampled_from([4, 9, 28]))
def test_tiles_put_together_are_the_resized_image(width, height, size):
    image, (cols, rows) = noise(width, height), tile_grid(width, height, size, ImageConfig())
    tiles = tile_image(image, (cols, rows), size)
    assert tiles.shape == (cols * rows + (cols * rows > 1), size, size, 3) and tiles.dtype == np.uint8
    whole = np.concatenate([np.concatenate(tiles[r * cols : (r + 1) * cols], axis=1) for r in range(rows)])
    np.testing.assert_array_equal(whole, np.asarray(image.resize((cols * size, rows * size), Image.Resampling.BICUBIC)))
    np.testing.assert_array_equal(tiles[-1], np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))


def test_no_thumbnail():
    assert tile_image(noise(20, 10), (2, 1), 8, thumbnail=False).shape == (2, 8, 8, 3)


# opening


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    noise(40, 30, mode).save(tmp_path / "a.tiff")
    image = open_image(tmp_path / "a.tiff")
    assert image.mode == "RGB" and image.size == (40, 30) == image_size(tmp_path / "a.tiff")


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(np.asarray(open_image(tmp_path / "a.jpg"))[8, 8], (200, 30, 60), atol=6)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / f"a.{suffix}"))[..., 0], ramp >> 8)


@pytest.mark.parametrize("size", [(1, 1), (30000, 1), (1, 30000)])
def test_extreme_shapes_are_images_like_others(tmp_path, size):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    tiles = tile_image(image, tile_grid(*image.size, 16, ImageConfig()), 16)
    assert tiles.reshape(-1, 3).tolist() == [[10, 20, 30]] * (len(tiles) * 256)


def test_missing_file(tmp_path):
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=r"none\.jpg does not exist"):
            read(tmp_path / "none.jpg")


def test_empty_file(tmp_path):
    (tmp_path / "a.jpg").touch()
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=r"a\.jpg is empty \(0 bytes\)"):
            read(tmp_path / "a.jpg")


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"a\.jpg is a web page \(HTML\)"):
        open_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff", "ppm", "jp2", "ico", "tga", "pcx"])
def test_formats_that_are_read(tmp_path, suffix):
    """Whatever the file is called."""
    noise(32, 32).save(tmp_path / f"a.{suffix}")
    (tmp_path / f"a.{suffix}").rename(tmp_path / "a.eps")
    assert open_image(tmp_path / "a.eps").size == image_size(tmp_path / "a.eps") == (32, 32)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICNS"])
def test_other_formats_are_refused_unopened(tmp_path, kind, monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", started)
    monkeypatch.setattr("subprocess.Popen", started)
    noise(32, 32).save(tmp_path / "a.png", format=kind)
    for file in (tmp_path / "a.png", Encoded("a.png", (tmp_path / "a.png").read_bytes())):
        for read in (open_image, image_size):
            with pytest.raises(ValueError, match=rf"a\.png is {kind}; formats that are read are JPEG, PNG, .*TGA"):
                read(file)


def test_a_damaged_header_is_said_to_be_one(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(ValueError, match=r"a\.png is PNG, but damaged"):
        open_image(tmp_path / "a.png")


def test_there_is_one_place_that_opens_images_one_for_videos_and_one_for_streams():
    root = pathlib.Path(vlmem_jax.__file__).parent
    writes = {"demo/room_dataset.py"}
    for call, places in (
        ("Image.open(", {"processing/images.py"}),
        ("av.open(", {"processing/video.py", "stream/live.py"}),
    ):
        files = {str(path.relative_to(root)) for path in root.rglob("*.py") if call in path.read_text()}
        assert files - writes == places


def test_a_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot be opened"):
        open_image(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("kept", [0.03, 0.5, 0.9])
def test_truncated_file(tmp_path, suffix, kept):
    path = tmp_path / f"a.{suffix}"
    noise(64, 64).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=rf"a\.{suffix}"):
        open_image(path)


def test_float_pixels(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a\.tiff.*floating-point"):
        open_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("size", [(9000, 10000), (15000, 15000), (60000, 60000)])
@pytest.mark.filterwarnings("ignore:Image size")
def test_decompression_bomb_is_refused_by_its_header(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=r"bomb\.png .*image\.max_pixels"):
            read(tmp_path / "bomb.png")


def test_the_limit_is_a_knob(tmp_path):
    noise(50, 50).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="50x50 = 2500 pixels but image.max_pixels is 2499"):
        image_size(tmp_path / "a.png", max_pixels=2499)
    assert image_size(tmp_path / "a.png", max_pixels=2500) == (50, 50)


def test_jpeg_round_trip_loses_a_little():
    image = Image.linear_gradient("L").convert("RGB")
    again = jpeg_round_trip(image, 80)
    difference = np.abs(np.asarray(image, int) - np.asarray(again, int))
    assert again.size == image.size and 0 < difference.max() < 40


# paths and settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_tiles": 7, "max_tiles": 6}, "min_tiles <= max_tiles"),
        ({"dhr_map": "spiral"}, "dhr_map must be one of"),
        ({"max_pixels": 10**9}, "max_pixels"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        ImageConfig(**values)
