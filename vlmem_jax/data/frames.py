"""Videos to ArrayRecord files of their frames, a file each: for `vlmem data frames`.

Of n frames, record i is a line of JSON (video, number of the frame, its time in seconds), then the frame as JPEG. The
last record tells of the file.
"""

import contextlib
import io
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from vlmem_jax.data.records import open_shard, shard_name, shards, split
from vlmem_jax.processing import images, video
from vlmem_jax.processing.media import Encoded

FORMAT = "vlmem frames 1"


def extract(
    videos: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    fps: float = 1.0,
    quality: int = 95,
    threads: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[int, int]:
    """Writes frames of each video to a file of `out`, `fps` of a second, `threads` videos at a time (0: one a core).

    Files that are complete are kept, so a call that was stopped goes on. Gives the numbers of frames written now and
    before. Raises ValueError, when all others are done, naming the videos that cannot be read; and at once if `out`
    holds frames of other videos or made otherwise.
    """
    if not fps > 0:
        raise ValueError(f"--fps must be a positive number of frames a second, got {fps}")
    if not 1 <= quality <= 100:
        raise ValueError(f"--quality is that of JPEG, 1 to 100, got {quality}")
    names = [str(path) for path in videos]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--video must name each video once, but {min(twice)} is there again")
    folder, stem = split(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / shard_name(stem, number, len(names)) for number in range(len(names))]
    todo, before = [], 0
    for name, file in zip(names, files, strict=True):
        facts = {"format": FORMAT, "video": name, "fps": fps, "quality": quality}
        if file.exists():
            _, found = open_shard(file, FORMAT)
            before += found.pop("frames")
            if found != facts:
                raise ValueError(f"{file} holds frames of {found}, not of {facts}; remove it or choose another --out")
        else:
            todo.append((name, file, facts))
    errors, written, stop = [], 0, threading.Event()
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as executor, contextlib.ExitStack() as ending:
        ending.callback(stop.set)  # on Ctrl-C the executor waits for videos that are being decoded
        for done, result in enumerate(executor.map(lambda job: _write(*job, stop), todo), 1):
            progress(len(names) - len(todo) + done)
            if isinstance(result, ValueError):
                errors.append(str(result))
            else:
                written += result
    if errors:
        raise ValueError(f"{len(errors)} of {len(names)} videos cannot be read: {'; '.join(errors)}")
    return written, before


class Frames:
    """The frames of all videos of an ArrayRecord file that `extract` wrote."""

    def __init__(self, path: str | os.PathLike):
        """Opens all files. Raises ValueError if one is missing or damaged."""
        self._frames: list[tuple[ArrayRecordReader, int]] = []
        for file in shards(path):
            reader, facts = open_shard(file, FORMAT)
            self._frames += [(reader, i) for i in range(facts["frames"])]

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> tuple[dict, Image.Image]:
        """`video`, `frame` and `seconds` of a frame, and its picture."""
        reader, place = self._frames[index]
        line, _, content = reader.read([place])[0].partition(b"\n")
        return json.loads(line), images.open_image(Encoded(f"frame {index}", content))


def _write(name: str, file: Path, facts: dict, stop: threading.Event) -> int | ValueError:
    """Number of frames written, or why not. The file appears when it is complete."""
    unfinished = file.with_suffix(".tmp")
    try:
        writer, count = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed"), 0
        try:
            for frame, seconds, picture in video.sampled_frames(name, facts["fps"]):
                if stop.is_set():
                    raise ValueError(f"video {name} was not finished")
                jpeg = io.BytesIO()
                picture.save(jpeg, "JPEG", quality=facts["quality"])
                head = {"video": name, "frame": frame, "seconds": round(seconds, 6)}
                writer.write(json.dumps(head).encode() + b"\n" + jpeg.getvalue())
                count += 1
            writer.write(json.dumps(facts | {"frames": count}).encode())
        finally:
            writer.close()
        if not count:
            raise ValueError(f"video {name} holds no frame")
        os.replace(unfinished, file)
    except ValueError as error:
        return error
    except RuntimeError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return count
