"""Answers one question about images and videos."""

import argparse
import sys

from vlmem_jax.cli import answering
from vlmem_jax.processing.images import open_image

EXAMPLE = """vlmem generate --checkpoint runs/comemo --image a.jpg --image b.jpg --prompt "What differs?"
  vlmem generate --checkpoint runs/qwen --video a.mp4 --prompt "What happens?"
  vlmem generate --checkpoint runs/comemo --prompt "Say hello." --temperature 0.7 --top-p 0.9 --seed 1
  vlmem generate --checkpoint runs/vismem --image a.jpg --prompt "What differs?" --show-memory --disable-long"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    answering.add_arguments(parser)
    parser.add_argument("--prompt", required=True, help="the question; <image> in it marks where the images belong")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="a video, marked by <video>")


def run(args: argparse.Namespace) -> int:
    sampling, invocation = answering.sampling(args), answering.invocation(args)
    images = [open_image(path) for path in args.image]
    model = answering.load(args)
    videos = []
    for path in args.video:
        video, chosen = model.processor.open_video(path)
        print(f"{path}: frames {', '.join(map(str, chosen))}, {video.seconds:.3f} s apart", file=sys.stderr)
        videos.append(video)
    sample = model.processor.prompt(
        args.prompt, images, videos=videos, rope_dhr=answering.rope_dhr(args), name="--prompt"
    )
    answer = answering.transcript(args, model)
    session = model.generator().start([sample], sampling.max_new_tokens)
    for tokens_B in session.stream(sampling, invocation):
        sys.stdout.write(answer.push(int(tokens_B[0])))
        sys.stdout.flush()
    print(answer.flush())
    return 0
