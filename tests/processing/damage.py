"""Opens damaged images and videos: each must open, or raise ValueError, within SECONDS.

The suite opens 300 of them; more by

    python -m tests.processing.damage --count 50000
"""

import argparse
import faulthandler
import io
import sys

import av
import numpy as np
from PIL import Image, features

from vlmem_jax.processing import images, video
from vlmem_jax.processing.media import Encoded

SECONDS = 30
IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "ICO", "TGA", "PCX", "SGI", "QOI", "AVIF")
VIDEOS = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "webm": "libvpx", "ts": "libx264", "flv": "libx264"}


def pictures() -> list[Encoded]:
    """A whole image of each format that this Pillow writes, with an alpha channel, a palette or 16 bits among them."""
    rng, made = np.random.default_rng(0), []
    noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in IMAGES:
        if kind == "AVIF" and not features.check("avif"):
            continue
        for mode, more in (("RGB", {}), ("RGBA", {}), ("P", {}), ("I;16", {}), ("RGB", {"exif": exif})):
            buffer = io.BytesIO()
            deep = Image.fromarray(rng.integers(0, 4096, (24, 32)).astype(np.uint16))
            try:
                (deep if mode == "I;16" else noise.convert(mode)).save(buffer, kind, **more)
            except (OSError, ValueError, KeyError, TypeError):  # a format without such a mode
                continue
            made.append(Encoded(f"{kind} {mode}", buffer.getvalue()))
    return made


def films() -> list[Encoded]:
    """A whole video of each container, one of them turned, another with uneven frames."""
    made = []
    for suffix, codec in VIDEOS.items():
        buffer = io.BytesIO()
        with av.open(buffer, "w", format={"mkv": "matroska", "ts": "mpegts"}.get(suffix, suffix)) as container:
            stream = container.add_stream(codec, rate=25, options={"g": "4"})
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
            for n in range(10):
                frame = av.VideoFrame.from_image(Image.new("RGB", (32, 24), (20 * n,) * 3))
                frame.pts = n if suffix != "mkv" else n * n
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        made.append(Encoded(suffix, buffer.getvalue()))
    return made


def damaged(whole: Encoded, rng: np.random.Generator) -> Encoded:
    """The file with bytes changed, cut out, doubled, or its end missing."""
    data = bytearray(whole.data)
    for _ in range(int(rng.integers(1, 6))):
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
        match int(rng.integers(5)):
            case 0:
                data[at : at + length] = rng.bytes(len(data[at : at + length]))
            case 1:
                data[at] = (0, 255, 127, 128)[int(rng.integers(4))]
            case 2 if len(data) > 60:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4 if len(data) > 60:
                del data[at + 20 :]
    return Encoded(whole.name, bytes(data))


def look(file: Encoded, is_video: bool) -> None:
    """What planning and loading do with a file."""
    if is_video:
        clip = video.probe(file)
        chosen = clip.at(video.choose_frames(clip.frames, 4, 4))
        video.read_frames(file, chosen, max_pixels=10**6)
    else:
        images.read_head(file, 10**6)
        images.open_image(file, 10**6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    whole = [(file, False) for file in pictures()] + [(file, True) for file in films()]
    for file, is_video in whole:
        look(file, is_video)
    opened = 0
    av.logging.set_level(None)
    for number in range(args.count):
        rng = np.random.default_rng([args.seed, number])
        file, is_video = whole[int(rng.integers(len(whole)))]
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            look(damaged(file, rng), is_video)
            opened += 1
        except ValueError:
            pass
        except BaseException:
            print(f"file {number} of seed {args.seed}, once {file.name}:", file=sys.stderr)
            raise
        if number % 1000 == 999:
            print(f"{number + 1} files, {opened} of them opened", flush=True)
    print(f"{args.count} files, {opened} of them opened")
    return 0


if __name__ == "__main__":
    sys.exit(main())
