"""Pictures as every viewer shows them: upright, transparent pixels on white, samples scaled to their own depth."""

import dataclasses
import functools
import io
import logging
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

log = logging.getLogger(__name__)
LEAST_BITS = 10
"""Of samples kept in 16 bits whose depth the file does not tell: fewer would have been kept in 8."""
Turn = Image.Transpose | None
"""What brings a picture upright; None: nothing."""
_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the number of EXIF, CIPA DC-008 sec. 4.6.4."""
_OF_MATRIX = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}
"""By the signs of a, b, c, d of a track's matrix, which shows (x, y) at (ax + cy, bx + dy): ISO/IEC 14496-12, 8.3.2."""
SIDEWAYS = frozenset(
    {
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    }
)
"""Turns that swap width and height."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownConfig:
    """What a file says of how it is to be shown, and whether it is followed. All off: samples as they are stored."""

    upright: bool = True
    """Whether rotation tags are followed, of images (EXIF) and of the track of a video."""
    on_white: bool = True
    """Whether transparent pixels show white; if not, the colour that is stored beneath."""
    own_depth: bool = True
    """Whether samples of fewer bits than the 16 they are kept in are scaled to their own range: that of the file's
    sBIT or BitsPerSample, or the next power of two above the largest, of at least 10 bits."""
    square: bool = True
    """Whether frames of a video whose pixels are not square are made as wide as they are shown."""


SHOWN = ShownConfig()


class NoRangeError(ValueError):
    """Pixels are whole, but what is black and what is white is not known."""


def turn_of(image: Image.Image) -> Turn:
    """What an image's rotation tag asks for, known from its header; nothing of a TIFF, which Pillow turns itself."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return None  # Pillow would decode a PNG, to look for a tag behind the pixels
    try:
        return _OF_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged tags, in which Pillow raises nearly anything: viewers show the picture as it is
        return None


def turn_of_matrix(matrix: Sequence[int]) -> Turn:
    """What the nine numbers of a track's matrix ask for; a turn by no quarter is not made."""
    a, b, _, c, d = (int(np.sign(number)) for number in matrix[:5])
    return _OF_MATRIX.get((a, b, c, d))


def turned(size: tuple[int, int], turn: Turn) -> tuple[int, int]:
    """(width, height) after a turn."""
    return size[::-1] if turn in SIDEWAYS else size


def shown(image: Image.Image, config: ShownConfig = SHOWN, name: Any = "") -> Image.Image:
    """8-bit RGB of an image that Pillow has opened. Raises NoRangeError for floating-point pixels.

    `name`: what is said to have been scaled, where that is a guess.
    """
    turn = turn_of(image) if config.upright else None
    image = to_rgb(image, config, name)
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, config: ShownConfig = SHOWN, name: Any = "") -> Image.Image:
    """As `shown`, but not turned."""
    if image.mode == "F":
        raise NoRangeError("floating-point pixels have no fixed range; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255 and leaves most of such an image white
        image = _eight_bits(image, config, name)
    if config.on_white and image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGB", pixels.size, "white")
        white.paste(pixels, mask=pixels.getchannel("A"))
        return white
    if image.mode == "RGB":
        image.load()
        return image
    return image.convert("RGB")


def _eight_bits(image: Image.Image, config: ShownConfig, name: Any) -> Image.Image:
    """A grey image of at most 16 bits as one of 8."""
    told = _told_bits(image)
    values = np.asarray(image)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise NoRangeError(f"integer pixels must lie in 0 ... 65535, got {values.min()} ... {values.max()}")
    bits = _bits(values, told, name) if config.own_depth and values.size else 16
    return Image.fromarray((values.astype(np.uint32) >> (bits - 8)).astype(np.uint8))


def _bits(values: np.ndarray, told: int | None, name: Any) -> int:
    """Bits of the range that samples kept in 16 bits use."""
    needed = max(int(values.max()).bit_length(), LEAST_BITS)
    if told == 16 or needed == 16:
        return 16
    if told is not None:
        # sBIT counts high bits (PNG sec. 11.3.2.4), and writers of raw samples use the low ones
        high = (values & ((1 << (16 - told)) - 1) == 0).all()
        return 16 if high or needed > told else max(told, 8)
    _say_once(str(name), needed)
    return needed


def _told_bits(image: Image.Image) -> int | None:
    """What the file says of the bits of a sample, if it does; 16 where Pillow has scaled them already."""
    if image.format == "TIFF":
        told = image.tag_v2.get(258, (16,))  # BitsPerSample
        bits = int(told[0] if isinstance(told, tuple) else told)
        return bits if bits < 16 else None
    return _png_bits(image.fp) if image.format == "PNG" else 16


def _png_bits(file: BinaryIO) -> int | None:
    """The sBIT of a PNG file, which Pillow does not read."""
    place = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            length = int.from_bytes(head[:4])
            if head[4:] == b"sBIT":
                return file.read(1)[0]
            file.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        file.seek(place)


@functools.lru_cache(maxsize=4096)
def _say_once(name: str, bits: int) -> None:
    log.warning(
        "%s keeps samples in 16 bits and uses %d: it is shown as of %d bits (image.own_depth=false: of 16)",
        name or "an image",
        bits,
        bits,
    )
