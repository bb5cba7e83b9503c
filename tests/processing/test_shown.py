"""Pictures as viewers show them: turned, on white, at their own depth."""

import io
import logging
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from vlmem_jax.processing.images import image_size, open_image, read_head
from vlmem_jax.processing.media import Encoded
from vlmem_jax.processing.patches import PatchConfig
from vlmem_jax.processing.shown import ShownConfig, turn_of_matrix
from vlmem_jax.processing.video import Clip, choose_frames, probe, read_frames, sampled_frames

STORED = ShownConfig(upright=False, on_white=False, own_depth=False, square=False)
CORNERS = np.zeros((20, 30), np.uint8)
CORNERS[:10, :15], CORNERS[:10, 15:], CORNERS[10:, :15] = 250, 170, 90
"""Four patches of grey: bright at the top left, dark at the bottom right."""


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")).astype(int)


def as_orientation(number: int) -> Image.Image:
    """What a camera held as EXIF's `number` says stores of CORNERS: the inverse of what viewers do."""
    array = CORNERS
    if number in (5, 6, 7, 8):
        array = array.T
    flipped = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (0,), 7: (0, 1), 8: (1,)}.get(number, ())
    return Image.fromarray(np.flip(array, flipped).copy())


def encoded(image: Image.Image, kind: str, **options) -> Encoded:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Encoded(f"x.{kind.lower()}", buffer.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("number", range(1, 9))
def test_rotation_tags_are_followed_in_size_and_pixels(kind, number):
    exif = Image.Exif()
    exif[0x0112] = number
    file = encoded(as_orientation(number).convert("RGB"), kind, exif=exif)
    assert image_size(file) == (30, 20)
    np.testing.assert_allclose(grey(open_image(file)), CORNERS, atol=12 if kind in ("JPEG", "WEBP") else 0)
    if kind != "TIFF":  # Pillow turns those itself
        stored = as_orientation(number).size
        assert image_size(file, config=STORED) == stored == open_image(file, config=STORED).size


def test_a_tag_that_is_damaged_or_unknown_turns_nothing():
    for content in (b"Exif\0\0MM\0*\0\0", b"Exif\0\0", b"\xff" * 40):
        file = encoded(Image.fromarray(CORNERS), "JPEG", exif=content)
        assert image_size(file) == open_image(file).size == (30, 20)
    exif = Image.Exif()
    exif[0x0112] = 9
    assert image_size(encoded(Image.fromarray(CORNERS), "PNG", exif=exif)) == (30, 20)


def transparent(mode: str) -> Image.Image:
    """Black writing on nothing, whose hidden colour is black, too."""
    alpha = np.zeros((16, 16), np.uint8)
    alpha[4:8] = 255
    black = np.zeros_like(alpha)
    if mode == "RGBA":
        return Image.fromarray(np.stack([black, black, black, alpha], -1))
    if mode == "LA":
        return Image.fromarray(np.stack([black, alpha], -1))
    picture = Image.fromarray(np.where(alpha, 1, 0).astype(np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, 0, 0, 0])
    picture.info["transparency"] = 0
    return picture


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF")],
)
def test_what_is_transparent_is_white(mode, kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {"transparency": 0} if mode == "P" else {}
    file = encoded(transparent(mode), kind, **options)
    pixels = grey(open_image(file))
    assert set(pixels[4:8].ravel()) == {0}
    assert set(np.delete(pixels, range(4, 8), 0).ravel()) == {255}
    assert grey(open_image(file, config=STORED)).max() == 0


def test_half_transparent_is_between():
    pixels = np.full((4, 4, 4), (200, 0, 0, 128), np.uint8)
    colour = np.asarray(open_image(encoded(Image.fromarray(pixels), "PNG")))[0, 0]
    np.testing.assert_allclose(colour, (227, 127, 127), atol=1)


def test_a_transparent_colour_of_rgb():
    file = encoded(Image.new("RGB", (4, 4), (0, 0, 0)), "PNG", transparency=(0, 0, 0))
    assert grey(open_image(file)).min() == 255


def png16(values: np.ndarray, sbit: int | None = None) -> Encoded:
    """A grey PNG of 16 bits, with an sBIT if one is given."""
    content = encoded(Image.fromarray(values.astype(np.uint16)), "PNG").data
    if sbit is not None:
        body = b"sBIT" + bytes([sbit])
        chunk = struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body))
        content = content[:33] + chunk + content[33:]  # behind IHDR
    return Encoded("deep.png", content)


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("most", "sbit", "expected"),
    [
        (65535, None, 255),
        (65535, 16, 255),
        (40000, None, 156),  # needs 16 bits
        (4095, None, 255),
        (4095, 12, 255),
        (1023, None, 255),
        (1023, 10, 255),
        (1000, 12, 62),  # the file knows better than the largest value
        (1000, 16, 3),
        (200, None, 50),  # not fewer than 10 bits: 200 of 1023
        (4095 * 16, 12, 255),  # as the standard has it: in the high bits
    ],
)
def test_samples_are_scaled_to_their_own_depth(most, sbit, expected):
    values = (RAMP * most).astype(int)
    if most > 4095 * 15 and sbit == 12:
        values = values // 16 * 16
    assert abs(grey(open_image(png16(values, sbit))).max() - expected) <= 1
    assert grey(open_image(png16(values, sbit), config=STORED)).max() == int(values.max()) >> 8


@pytest.mark.parametrize(("bits", "expected"), [(12, 250), (16, 244)])
def test_tiffs_say_their_bits(tmp_path, bits, expected):
    values = (RAMP * (4000 if bits == 12 else 62500)).astype(np.uint16)
    data = values.astype("<u2").tobytes()
    if bits == 12:  # two samples in three bytes
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = (pairs[:, 0] << 12) | pairs[:, 1]
        data = b"".join(int(pair).to_bytes(3, "big") for pair in packed)
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(data))]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    file = Encoded("deep.tif", b"II*\0" + struct.pack("<I", 8 + len(data)) + data + ifd + struct.pack("<I", 0))
    assert abs(grey(open_image(file)).max() - expected) <= 1


def test_a_guess_of_the_depth_is_said_once(caplog):
    file = png16(RAMP * 4095)._replace(name="once.png")
    with caplog.at_level(logging.WARNING):
        open_image(file)
        open_image(file)
        open_image(png16(RAMP * 4095, 12)._replace(name="told.png"))
    [said] = caplog.records
    assert "once.png keeps samples in 16 bits and uses 12" in said.getMessage()


# --- videos -----------------------------------------------------------------------------------------------------------


def film(path, times=range(8), turn=None, aspect=None):
    """A video whose frame n, shown at `times[n]` of a 25th second, is CORNERS, 16 n brighter at most."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "4", "crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 30 * 2, 20 * 2, "yuv420p"
        if turn:
            stream.set_display_rotation(*turn)
        if aspect:
            stream.sample_aspect_ratio = aspect
        for n, time in enumerate(times):
            pixels = np.minimum(CORNERS.repeat(2, 0).repeat(2, 1) * 0.5 + 16 * n, 255).astype(np.uint8)
            frame = av.VideoFrame.from_image(Image.fromarray(pixels).convert("RGB"))
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["a.mp4", "b.mov"])
@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ((90,), np.rot90(CORNERS, 1)),
        ((-90,), np.rot90(CORNERS, 3)),
        ((180,), np.rot90(CORNERS, 2)),
        ((0, True), CORNERS[:, ::-1]),
        ((0, False, True), CORNERS[::-1]),
    ],
)
def test_the_rotation_of_a_track_is_followed(tmp_path, name, turn, expected):
    path = film(tmp_path / name, turn=turn)
    clip = probe(path)
    [frame] = read_frames(path, [0])
    np.testing.assert_allclose(grey(frame)[::2, ::2], expected * 0.5, atol=8)
    assert frame.size == clip.taken([0])[1:3]
    _, _, sampled = next(sampled_frames(path, 5.0))
    np.testing.assert_array_equal(sampled, frame)
    [stored] = read_frames(path, [0], config=STORED)
    assert stored.size == (60, 40) == clip.taken([0], STORED)[1:3]


@pytest.mark.parametrize("name", ["a.mp4", "b.mkv"])
@pytest.mark.parametrize("turn", [None, (90,)])
def test_pixels_that_are_not_square_are_shown_in_their_shape(tmp_path, name, turn):
    path = film(tmp_path / name, aspect=Fraction(3, 2), turn=turn)
    clip = probe(path)
    expected = (90, 40) if turn is None else (40, 90)
    assert clip.taken([0])[1:3] == expected
    [frame] = read_frames(path, [0])
    assert frame.size == expected and next(sampled_frames(path, 5.0))[2].size == expected
    [stored] = read_frames(path, [0], config=STORED)
    assert stored.size == (60, 40) == clip.taken([0], STORED)[1:3]
    with pytest.raises(ValueError, match="has frames of 90x40 pixels but image.max_pixels is 3000"):
        read_frames(path, [0], 3000)


@pytest.mark.parametrize("told", [Fraction(1, 1), Fraction(1000, 1), Fraction(1, 1000)])
def test_a_shape_of_pixels_that_cannot_be_is_not_followed(tmp_path, told):
    path = film(tmp_path / "a.mp4", aspect=told)
    assert read_frames(path, [0])[0].size == (60, 40)


def test_matrices_that_are_no_quarter_turn():
    assert turn_of_matrix([65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30]) is None
    assert turn_of_matrix([46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30]) is None


STILL = [0, 1, 2, 3, 4, 54, 55, 56]
"""Two seconds of the fifth frame among others of a 25th second."""


@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c.mov"])
def test_frames_are_chosen_by_their_real_times(tmp_path, name):
    clip = probe(film(tmp_path / name, STILL))
    assert clip.frames == 8
    assert clip.fps == pytest.approx(8 / (57 / 25), rel=0.01)
    chosen = clip.at(choose_frames(clip.frames, 8, 8))
    assert chosen[0] == 0
    assert chosen.count(4) >= 6, "most of the time this frame is seen"
    assert len(read_frames(tmp_path / name, chosen)) == 8


@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c.mov"])
def test_evenly_spaced_frames_have_no_times(tmp_path, name):
    clip = probe(film(tmp_path / name, range(30)))
    assert clip == Clip(30, 25.0, 60, 40)
    assert clip.at([3, 7]) == [3, 7]


def test_keys_of_both_families():
    assert PatchConfig(upright=False).upright is False
    assert read_head(encoded(Image.fromarray(CORNERS), "PNG")) == (30, 20, False)
