"""Images on disk to uint8 tiles: safe opening, dynamic tiling, resizing."""

import dataclasses
import functools
import io
import os
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from vlmem_jax import positions
from vlmem_jax.processing.context import read_context
from vlmem_jax.processing.media import Encoded, check_file, described
from vlmem_jax.processing.shown import SHOWN, SIDEWAYS, NoRangeError, ShownConfig, shown, to_rgb, turn_of
from vlmem_jax.types import TileShape

PILLOW_PIXEL_LIMIT = 178_956_970
"""Pillow itself refuses to open anything larger."""
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM"),
    *("JPEG2000", "AVIF", "ICO", "PCX", "SGI", "QOI", "TGA"),
)
"""That are read, by Pillow's names: pictures that hold all their pixels, and start no other program."""


@dataclasses.dataclass(frozen=True)
class ImageConfig(ShownConfig):
    """How an image becomes tiles."""

    min_tiles: int = 1
    """Fewest tiles an image is cut into, the thumbnail not counted."""
    max_tiles: int = 12
    """Most tiles an image is cut into, the thumbnail not counted; the images of a training sample share it."""
    thumbnail: bool = True
    """Whether a tiled image is followed by the whole image as one more tile."""
    rope_dhr: bool = True
    """Whether the tokens of all tiles share the positions of the thumbnail (RoPE-DHR)."""
    dhr_map: str = "code"
    """Which RoPE-DHR map: `code` (released weights), `raster` (geometric, for training from scratch) or `fine` (the
    same, and a memory that attends to visual tokens knows the place of each inside its cell)."""
    context: str = "all"
    """Which visual tokens stand in the sequence, whatever a memory reads: all; thumbnail: of a tiled image, that alone;
    pooled:k: means of k x k neighbours; stride:n: every n-th frame of a video."""
    max_pixels: int = 89_478_485
    """Largest image that is opened, pixels: a guard against decompression bombs."""

    moved: ClassVar[dict[str, str]] = {
        "size": "a tile has the size of model.vision.image_size",
        "kind": "the tower of the model tells it",
    }

    def __post_init__(self):
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"1 <= min_tiles <= max_tiles must hold, got {self.min_tiles} and {self.max_tiles}")
        if self.dhr_map not in positions.DHR_MAPS:
            raise ValueError(f"dhr_map must be one of {positions.DHR_MAPS}, got {self.dhr_map!r}")
        if read_context(self.context).kind == "thumbnail" and not self.thumbnail:
            raise ValueError("thumbnail must be true where it is all that stands in the sequence (context=thumbnail)")
        if read_context(self.context).kept:
            raise ValueError("context kept:n is for models that see frames, not tiles; set all, thumbnail or pooled:k")
        if not 1 <= self.max_pixels <= PILLOW_PIXEL_LIMIT:
            raise ValueError(f"max_pixels must be 1 ... {PILLOW_PIXEL_LIMIT}, Pillow's limit; got {self.max_pixels}")

    def shows(self, tile: TileShape, whole: bool) -> TileShape:
        """What a tower's tiles are to a model whose sequence holds this context; `whole` as in `Processor`."""
        fine = whole and self.dhr_map == "fine"
        pooled = read_context(self.context).pooled > 1
        return tile._replace(pooled=pooled, places=positions.PLACES if fine else 1)


class Head(NamedTuple):
    """What the header of an image says."""

    width: int
    """Pixels, as stored."""
    height: int
    sideways: bool = False
    """Whether it is shown with width and height exchanged."""

    def size(self, config: ShownConfig = SHOWN) -> tuple[int, int]:
        """(width, height) of the image as it is shown."""
        return (self.height, self.width) if self.sideways and config.upright else (self.width, self.height)


def read_head(path: str | os.PathLike | Encoded, max_pixels: int = ImageConfig.max_pixels) -> Head:
    """The header of an image file, nothing decoded. Raises ValueError naming the file."""
    with _open(path, max_pixels) as image:
        return Head(*image.size, turn_of(image) in SIDEWAYS)


def read_format(path: str | os.PathLike | Encoded, max_pixels: int = ImageConfig.max_pixels) -> str:
    """Pillow's name of the format of an image file. Raises ValueError naming the file."""
    with _open(path, max_pixels) as image:
        return image.format


def image_size(
    path: str | os.PathLike | Encoded, max_pixels: int = ImageConfig.max_pixels, config: ShownConfig = SHOWN
) -> tuple[int, int]:
    """(width, height) of what `open_image` gives, from the header alone. Raises ValueError naming the file."""
    return read_head(path, max_pixels).size(config)


def open_image(
    path: str | os.PathLike | Encoded, max_pixels: int = ImageConfig.max_pixels, config: ShownConfig = SHOWN
) -> Image.Image:
    """The first frame of an image file as 8-bit RGB, as viewers show it. Raises ValueError naming the file."""
    with _open(path, max_pixels) as image:
        try:
            return shown(image, config, path)
        except NoRangeError as error:
            raise ValueError(f"image {path}: {error}") from error
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
            raise ValueError(f"image {path} is truncated or damaged: {error}") from error


def check_pixels(path: str | os.PathLike | Encoded, size: tuple[int, int], max_pixels: int) -> None:
    """Raises ValueError, naming the file, for an image of more than `max_pixels`."""
    width, height = size
    if width * height > max_pixels:
        raise ValueError(
            f"image {path} has {width}x{height} = {width * height} pixels but image.max_pixels is {max_pixels}; "
            "raise image.max_pixels or shrink the image"
        )


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(path: str | os.PathLike | Encoded, max_pixels: int) -> Image.Image:
    check_file(path, "image")
    try:
        image = Image.open(io.BytesIO(path.data) if isinstance(path, Encoded) else path, formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image {path} must have at most image.max_pixels={max_pixels} pixels: {error}") from error
    except UnidentifiedImageError as error:
        what = described(path) or "is not of a known image format"
        damaged = ", but damaged" if what.removeprefix("is ") in FORMATS else ""
        raise ValueError(f"image {path} {what}{damaged}; formats that are read are {', '.join(_formats())}") from error
    except Exception as error:  # damaged headers: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"image {path} cannot be opened: {error}") from error
    try:
        check_pixels(path, image.size, max_pixels)
    except ValueError:
        image.close()
        raise
    return image


def jpeg_round_trip(image: Image.Image, quality: int) -> Image.Image:
    """The image after JPEG compression of `quality` 1 ... 100: an augmentation."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer, formats=["JPEG"]).convert("RGB")


@functools.lru_cache(maxsize=64)
def _candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    grids = [
        (cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // cols + 1)
        if min_tiles <= cols * rows
    ]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], *grid)))


@functools.lru_cache(maxsize=65536)
def best_grid(width: int, height: int, size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of tiles whose shape is nearest to the image's (CoMemo sec. 3.2, as in InternVL).

    Of grids of the same shape the larger wins where the image has more than half its pixels.
    """
    best, least = (1, 1), float("inf")
    for cols, rows in _candidate_grids(min_tiles, max_tiles):
        distance = abs(width / height - cols / rows)
        if distance < least or (distance == least and width * height > 0.5 * size * size * cols * rows):
            best, least = (cols, rows), distance
    return best


def tile_grid(width: int, height: int, size: int, config: ImageConfig, max_tiles: int | None = None) -> tuple[int, int]:
    """(columns, rows) of tiles of `size` pixels for an image of `width` x `height`; `max_tiles` replaces the config's
    where given."""
    return best_grid(width, height, size, config.min_tiles, config.max_tiles if max_tiles is None else max_tiles)


def tile_image(
    image: Image.Image, grid: tuple[int, int], size: int, thumbnail: bool = True
) -> UInt8[np.ndarray, "I S S 3"]:
    """Tiles of `size` pixels in row-major order, then the thumbnail where there are several tiles."""
    cols, rows = grid
    tiles_ISSc = np.empty((positions.tile_count(cols, rows, thumbnail), size, size, 3), np.uint8)
    write_tiles(image, grid, tiles_ISSc)
    return tiles_ISSc


def write_tiles(image: Image.Image, grid: tuple[int, int], tiles_ISSc: UInt8[np.ndarray, "I S S 3"]) -> None:
    """`tile_image` into existing memory: the array's length says whether a thumbnail follows the tiles."""
    cols, rows = grid
    count, size = cols * rows, tiles_ISSc.shape[1]
    whole = np.asarray(resized(image, size * cols, size * rows)).reshape(rows, size, cols, size, 3)
    tiles_ISSc[:count].reshape(rows, cols, size, size, 3)[...] = whole.swapaxes(1, 2)
    if len(tiles_ISSc) > count:
        tiles_ISSc[count] = resized(image, size, size)


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image as RGB of this size, bicubic."""
    if image.mode != "RGB":
        image = to_rgb(image)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
