"""Answers one question about images and videos."""

import argparse
import sys
from typing import Any

from vlmem_jax.cli import answering
from vlmem_jax.generate import Pool, Request
from vlmem_jax.processing.images import open_image

EXAMPLE = """vlmem generate --checkpoint RUN --image a.jpg --image b.jpg --prompt "What differs?"
  vlmem generate --checkpoint RUN --text "image 1: " --image a.jpg --prompt "What is in image 1?"
  vlmem generate --checkpoint runs/qwen --video a.mp4 --prompt "What happens?"
  vlmem generate --checkpoint RUN --prompt "Say hello." --temperature 0.7 --top-p 0.9 --seed 1
  vlmem generate --checkpoint RUN --image a.jpg --prompt "What differs?" --show-memory --disable long"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    answering.add_arguments(parser)
    parser.add_argument("--prompt", required=True, help="the question, after all that is shown")
    for kind, metavar, what in (
        ("image", "FILE", "an image; may be repeated"),
        ("video", "FILE", "a video; may be repeated"),
        ("text", "TEXT", "stands before the next image or video, such as its name; may be repeated"),
    ):
        parser.add_argument(
            f"--{kind}", dest="shown", action="append", default=[], type=lambda value, kind=kind: (kind, value),
            metavar=metavar, help=what,
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    sampling, invocation = answering.sampling(args), answering.invocation(args)
    for kind, value in args.shown:
        if kind == "image":
            open_image(value)  # a wrong name is found before the model is loaded
    model = answering.load(args)
    parts: list[Any] = []
    for kind, value in args.shown:
        if kind == "text":
            parts.append(value)
        elif kind == "image":
            parts += model.processor.message((), [open_image(value, config=model.processor.image)])
        else:
            video, chosen = model.processor.open_video(value)
            frames = ", ".join(map(str, chosen))
            print(f"{value}: frames {frames}, {model.processor.told(video)}", file=sys.stderr)
            parts += model.processor.message((), videos=[video])
    sample = model.processor.prompt([*parts, args.prompt], rope_dhr=answering.rope_dhr(args), name="--prompt")
    decoder, last = model.vlm.config.decoder, int(sample.positions_T.max()) + sampling.max_new_tokens
    if last >= decoder.max_positions and not decoder.ntk_factor:
        print(
            f"warning: the prompt and {sampling.max_new_tokens} tokens behind it take {last + 1} positions, and the "
            f"model was made for {decoder.max_positions} (model.decoder.max_positions): answers may be of no use",
            file=sys.stderr,
        )
    answer = answering.transcript(args, model)
    [handle] = Pool(model.generator(), 1).submit([Request(sample, sampling, invocation)])
    for token in handle:
        sys.stdout.write(answer.push(token))
        sys.stdout.flush()
    print(answer.flush())
    return 0
