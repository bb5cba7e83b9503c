"""Frames of a video file. Needs PyAV, the extra `video`."""

import bisect
import contextlib
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlmem_jax.processing.images import ImageConfig
from vlmem_jax.processing.media import Encoded, check_file, described
from vlmem_jax.processing.shown import SHOWN, SIDEWAYS, ShownConfig, Turn, turn_of_matrix

FORMATS = {
    "MP4, MOV, 3GP": "mov",
    "MKV, WEBM": "matroska",
    "AVI": "avi",
    "MPEG": "mpeg,mpegvideo,m4v,mpegts",
    "FLV": "flv",
    "WMV": "asf",
    "OGG": "ogg",
    "GIF": "gif",
    "APNG": "apng",
    "MXF": "mxf",
    "NUT": "nut",
    "IVF": "ivf",
    "RM": "rm",
    "DV": "dv",
    "Y4M": "yuv4mpegpipe",
    "H.264, H.265, H.266, AV1, MJPEG streams": "h264,hevc,vvc,obu,av1,mjpeg",
}
"""Containers that are read, and FFmpeg's names of their demuxers: none of them opens other files."""
_OPTIONS = {"format_whitelist": ",".join(FORMATS.values()), "protocol_whitelist": "file"}
DEFAULT_FPS = 25
"""Of a file that does not say."""
CHECKED = 8
"""Frames that are decoded to find out whether a video is whole."""
WIDEST = 4.0
"""By which pixels may be wider than high, or higher than wide; other headers are wrong."""
EVEN = 1e-3
"""Part by which rates, and times between frames, may differ where frames are evenly spaced."""


class Clip(NamedTuple):
    """What is known of a video file before its frames are decoded."""

    frames: int
    fps: float
    """Frames a second, the mean where they are not evenly spaced."""
    width: int
    """Pixels, as stored."""
    height: int
    sideways: bool = False
    """Whether it is shown with width and height exchanged."""
    starts: Sequence[float] | None = None
    """Of each frame, where they are not evenly spaced: the part of the video that has gone by when it appears."""
    aspect: float = 1.0
    """The width of a pixel by its height."""

    def at(self, indices: Sequence[int]) -> list[int]:
        """The frames that are seen where frame `indices` would be if all were evenly spaced."""
        if self.starts is None:
            return list(indices)
        return [max(bisect.bisect_right(self.starts, index / self.frames + 1e-9) - 1, 0) for index in indices]

    def window(self, start: float = 0.0, end: float | None = None) -> tuple[int, "Clip"]:
        """(its first frame, what is known of it) of what is seen from one time to another, in seconds, the frames on
        the screen at both of them too; None: to the end. Raises ValueError for a time outside of the video."""
        times, length = self.times(range(self.frames)), self.frames / self.fps
        stop = length if end is None else end
        if not 0 <= start <= stop or start >= length:
            raise ValueError(f"a part of a video must lie in its {length:.2f} s, got {start} s to {stop} s")
        first, last = (max(bisect.bisect_right(times, at + 1e-6) - 1, 0) for at in (start, stop))
        shown = times[first : last + 1]
        if self.starts is None:
            return first, self._replace(frames=len(shown))
        lasts = (times[last + 1] if last + 1 < self.frames else length) - shown[0]
        starts = [(at - shown[0]) / lasts for at in shown]
        return first, self._replace(frames=len(shown), fps=len(shown) / lasts, starts=starts)

    def seconds(self, chosen: Sequence[int]) -> float:
        """From one of the frames `chosen`, which are spread over the whole video, to the next."""
        return self.frames / self.fps / len(chosen)

    def taken(self, chosen: Sequence[int], config: ShownConfig = SHOWN) -> "VideoSize":
        """Sizes of the frames `chosen`, as they are shown."""
        size = _size(self.width, self.height, self.aspect, config)
        size = size[::-1] if self.sideways and config.upright else size
        return VideoSize(len(chosen), *size, self.seconds(chosen), self.times(chosen), self.frames / self.fps)

    def times(self, chosen: Sequence[int]) -> tuple[float, ...]:
        """Seconds from the beginning to each of the frames `chosen`."""
        return tuple(
            index / self.fps if self.starts is None else self.starts[index] * self.frames / self.fps for index in chosen
        )

    def video(self, frames: Sequence[Image.Image], chosen: Sequence[int]) -> "Video":
        """The frames `chosen`, which were read."""
        return Video(frames, self.seconds(chosen), self.times(chosen), self.frames / self.fps)


class VideoSize(NamedTuple):
    """Sizes of the frames taken of a video."""

    frames: int
    width: int
    """Pixels."""
    height: int
    seconds: float = 1.0
    """From one of them to the next."""
    times: tuple[float, ...] = ()
    """Seconds from the beginning of the video to each of them, where they are known."""
    length: float = 0.0
    """Seconds of the whole video, where they are known."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames taken of a video, evenly spaced; times as in `VideoSize`."""

    frames: Sequence[Image.Image]
    seconds: float = 1.0
    times: tuple[float, ...] = ()
    length: float = 0.0

    @property
    def size(self) -> VideoSize:
        return VideoSize(len(self.frames), *self.frames[0].size, self.seconds, self.times, self.length)


def choose_frames(available: int, minimum: int, maximum: int, rng: np.random.Generator | None = None) -> list[int]:
    """Which of `available` frames to take, in order: one of each of equal intervals (CoMemo, training data).

    With `rng` a random number of intervals, `minimum` to `maximum`, and a random frame of each; without, `maximum`
    intervals and the middle of each. A shorter video gives all its frames.
    """
    count = min(maximum if rng is None else int(rng.integers(minimum, maximum + 1)), available)
    edges = np.linspace(0, available, count + 1).astype(np.int64)
    first, last = edges[:-1], edges[1:] - 1
    return ((first + last) // 2 if rng is None else rng.integers(first, last + 1)).tolist()


def probe(path: str | os.PathLike | Encoded) -> Clip:
    """What the header says, and the first frame, which alone is decoded, of how it is turned.

    The packets are read where the header does not count the frames, or gives two rates. Raises ValueError naming the
    file if it is missing, damaged or empty.
    """
    with opened(path) as (container, stream):
        fps, count, starts = float(stream.average_rate or DEFAULT_FPS), stream.frames, None
        width, height, aspect = stream.width, stream.height, _aspect(stream)
        first = next(container.decode(stream), None)
        turn = None if first is None else _turn(first)
    with opened(path) as (container, stream):  # a raw stream cannot rewind
        if not count or _rates_differ(stream):
            times = [(packet.pts, packet.duration or 0) for packet in container.demux(stream) if packet.size]
            count, rate = len(times), _real_times(times, stream)
            fps, starts = rate or (fps, None)
    if not count or first is None:
        raise ValueError(f"video {path} holds no frame")
    return Clip(count, fps, width, height, turn in SIDEWAYS, starts, aspect)


def check_decodes(path: str | os.PathLike | Encoded, clip: Clip, max_pixels: int = ImageConfig.max_pixels) -> None:
    """Decodes CHECKED frames of a video, evenly spaced. Raises ValueError naming the file if one cannot be."""
    read_frames(path, np.linspace(0, clip.frames - 1, min(CHECKED, clip.frames)).astype(int).tolist(), max_pixels)


def _rates_differ(stream) -> bool:
    """Whether the mean of a stream's frames a second is not what its time stamps suggest."""
    mean, suggested = stream.average_rate, stream.base_rate
    return bool(mean and suggested) and abs(mean / suggested - 1) > EVEN


def _real_times(times: Sequence[tuple[int | None, int]], stream) -> tuple[float, list[float]] | None:
    """(frames a second, `Clip.starts`) of frames of these times and durations, None where they are evenly spaced."""
    if len(times) < 2 or any(time is None for time, _ in times) or not stream.time_base:
        return None
    times = sorted(times)  # of reordered frames, packets come in another order
    starts = np.array([time for time, _ in times], float)
    gaps = np.diff(starts)
    unit = 1 / float(stream.time_base)
    if gaps.min() <= 0 or gaps.max() - gaps.min() <= max(2.0, 2 * EVEN * gaps.mean()):  # rounded to ticks
        return None
    last = times[-1][1] or float(np.median(gaps))
    whole = starts[-1] - starts[0] + last
    return len(times) * unit / whole, ((starts - starts[0]) / whole).tolist()


def _turn(frame) -> Turn:
    """What brings a decoded frame upright."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return None if matrix is None else turn_of_matrix(np.frombuffer(bytes(matrix), np.int32).tolist())


def _aspect(stream) -> float:
    """`Clip.aspect`; a header that says nothing of use means square pixels."""
    told = float(stream.sample_aspect_ratio or 1)
    return told if 1 / WIDEST <= told <= WIDEST else 1.0


def _size(width: int, height: int, aspect: float, config: ShownConfig) -> tuple[int, int]:
    """(width, height) of a frame before it is turned."""
    return (max(round(width * aspect), 1) if config.square else width), height


def picture_of(frame, stream, config: ShownConfig = SHOWN) -> Image.Image:
    """A decoded frame as RGB, upright, of square pixels."""
    turn = _turn(frame) if config.upright else None
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))  # `to_image` copies line by line
    size = _size(*image.size, _aspect(stream), config)
    image = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
    return image if turn is None else image.transpose(turn)


def read_frames(
    path: str | os.PathLike | Encoded,
    indices: Sequence[int],
    max_pixels: int = ImageConfig.max_pixels,
    config: ShownConfig = SHOWN,
) -> list[Image.Image]:
    """The frames at `indices` as RGB images, upright; decodes only from the nearest key frame before each.

    Raises ValueError naming the file if it is missing, damaged, shorter than its header says, or too large.
    """
    with opened(path, max_pixels) as (container, stream):
        stream.thread_type = "AUTO"
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
        if max(indices) >= len(packets):
            raise ValueError(f"video {path} ends at frame {len(packets)}, but frame {max(indices)} is asked for")
        wanted, timed = sorted(set(indices)), all(time is not None for time, _ in packets)
        if timed:
            times, keys = sorted(time for time, _ in packets), sorted(time for time, is_key in packets if is_key)
            images = _seek_frames(container, stream, {i: times[i] for i in wanted}, keys, config)
    if not timed or len(images) < len(wanted):  # a raw stream can neither seek nor rewind, others do not always
        with opened(path) as (container, stream):
            frames = enumerate(itertools.islice(container.decode(stream), wanted[-1] + 1))
            images = {i: picture_of(frame, stream, config) for i, frame in frames if i in wanted}
    if missing := set(indices) - images.keys():
        raise ValueError(f"video {path} is damaged: frame {min(missing)} cannot be decoded")
    return [images[i] for i in indices]


def sampled_frames(
    path: str | os.PathLike, fps: float, max_pixels: int = ImageConfig.max_pixels
) -> Iterator[tuple[int, float, Image.Image]]:
    """(number of the frame, seconds since the first, picture) of the first frame at or after each 1 / `fps` seconds.

    A video of fewer frames a second gives each once. Raises ValueError naming the file if it is missing, damaged or too
    large.
    """
    with opened(path, max_pixels) as (container, stream):
        stream.thread_type = "AUTO"
        rate, first, wanted = float(stream.average_rate or DEFAULT_FPS), None, 0
        for number, frame in enumerate(container.decode(stream)):
            time = number / rate if frame.time is None else frame.time
            first = time if first is None else first
            if (time - first) * fps >= wanted - 1e-6:
                yield number, time - first, picture_of(frame, stream, SHOWN)
                wanted = int((time - first) * fps + 1e-6) + 1


def _seek_frames(
    container, stream, times: dict[int, int], keys: list[int], config: ShownConfig
) -> dict[int, Image.Image]:
    """Images by index for presentation `times` in ascending order; none where seeking went past one."""
    images, frames, position = {}, iter(()), None
    for index, time in times.items():
        key = keys[max(bisect.bisect_right(keys, time) - 1, 0)] if keys else 0
        if position is None or key > position:  # otherwise decoding on is as short
            container.seek(key, stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            position = frame.pts
            if position is not None and position >= time:
                if position == time:
                    images[index] = picture_of(frame, stream, config)
                break
    return images


@contextlib.contextmanager
def opened(path: str | os.PathLike | Encoded, max_pixels: int | None = None) -> Iterator:
    """Container and video stream of a file whose frames have at most `max_pixels`, if that is given."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"reading video {path} needs PyAV; install vlmem_jax[video]") from error
    check_file(path, "video")  # nor may it be a pattern of names or an address
    try:
        file = io.BytesIO(path.data) if isinstance(path, Encoded) else f"file:{path}"
        with av.open(file, options=_OPTIONS) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(f"video {path} has a stream of no known codec")
            width, height = _size(stream.width, stream.height, _aspect(stream), SHOWN)
            if max_pixels is not None and width * height > max_pixels:
                raise ValueError(
                    f"video {path} has frames of {width}x{height} pixels but image.max_pixels is "
                    f"{max_pixels}; raise image.max_pixels or shrink the video"
                )
            yield container, stream
    except (av.error.ArgumentError, av.error.InvalidDataError) as error:  # not one of FORMATS, or damaged
        raise ValueError(
            f"video {path} cannot be read: it {described(path) or 'is not of a known format'} ({error.strerror}); "
            f"formats that are read are {', '.join(FORMATS)}"
        ) from error
    except av.error.FFmpegError as error:
        raise ValueError(f"video {path} cannot be read: {error}") from error
