"""Talks with a model in several turns.

Type a question and press Enter. `/image FILE` adds an image to the next question, `/reset` starts again, `/quit` or
Ctrl-D ends. Ctrl-C breaks off an answer.
"""

import argparse
import sys

from PIL import Image

from vlmem_jax.cli import answering
from vlmem_jax.generate import Chat
from vlmem_jax.processing import Processor
from vlmem_jax.processing.images import open_image

EXAMPLE = """vlmem chat --checkpoint RUN
  vlmem chat --checkpoint RUN --show-memory --max-invocations 2
  printf '/image a.jpg\\nWhat is this?\\nAnd what colour?\\n' | vlmem chat --checkpoint RUN"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    answering.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    sampling, invocation = answering.sampling(args), answering.invocation(args)
    model = answering.load(args)
    generator = model.generator()

    def new_chat() -> Chat:
        return Chat(
            generator, model.processor, sampling, answering.rope_dhr(args), invocation, show_memory=args.show_memory
        )

    chat, images = new_chat(), []
    if sys.stdin.isatty():
        print("/image FILE adds an image to the next question; /reset starts again; /quit ends", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return 0
        if command == "/reset":
            chat, images = new_chat(), []
        elif command == "/image":
            images += _image(argument.strip(), model.processor)
        elif line:
            _answer(chat, line, images)
            images = []


def _image(path: str, processor: Processor) -> list[Image.Image]:
    """The image, or none and a message: a typing error must not end the conversation."""
    try:
        return [open_image(path, config=processor.image)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return []


def _answer(chat: Chat, question: str, images: list[Image.Image]) -> None:
    try:
        for piece in chat.ask(question, images):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
    except KeyboardInterrupt:
        print(" [broken off]")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
