"""Answers a question from a memory, and says when the video shows it."""

import argparse
import json
import sys

from vlmem_jax.agent.embed import Embedder, EncoderEmbedder, EncoderReranker
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.memory import Helpers, Memory
from vlmem_jax.cli.memory_page import write_page
from vlmem_jax.cli.memory_show import answer_lines, seconds
from vlmem_jax.config import ConfigError
from vlmem_jax.hub.text_encoder import load_embedder, load_reranker

EXAMPLE = """vlmem memory ask "Where are the keys?" --store runs/memories --video kitchen --trace
  vlmem memory ask "Who came first?" --store runs/memories --option Ann --option Bob --at 00:12:30"""

ASKED = "retrieve.", "schema.", "image."
"""Keys of the config that are not of building."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem memory ask`."""
    parser.add_argument("question")
    parser.add_argument("--video", metavar="VIDEO", help="the beginning of its name (default: the only one)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="TEXT", help="the answer is one of these; may be repeated"
    )
    parser.add_argument(
        "--at", type=seconds, metavar="TIME", help="ask the memory as it was then, HH:MM:SS or seconds (default: whole)"
    )
    parser.add_argument(
        "--checkpoint", default="", metavar="DIR", help="who answers (default: the model that built the memory)"
    )
    parser.add_argument("--trace", action="store_true", help="show what each stage found")
    parser.add_argument("--json", action="store_true", help="answer, times and trace as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page of the memory and of how the answer was found")
    add_embedder(parser)
    parser.add_argument(
        "--reranker", metavar="DIR", help=f"{ENCODER} with one logit, such as bge-reranker (default: by --embedder)"
    )


def add_embedder(parser: argparse.ArgumentParser) -> None:
    """What compares texts."""
    parser.add_argument("--embedder", metavar="DIR", help=f"{ENCODER}, such as bge-large (default: words alone)")


ENCODER = "folder or repository of an encoder of text in the Hugging Face layout"


def embedder(args: argparse.Namespace) -> Embedder | None:
    """What the flag asks for; None: words alone. Raises ValueError for what cannot be loaded."""
    return EncoderEmbedder(load_embedder(args.embedder)) if args.embedder else None


def run(args: argparse.Namespace) -> int:
    """0 when answered, also where the memory does not tell."""
    if args.experiment is not None:
        raise ConfigError("a memory has its own config, of which --config.KEY=VALUE changes keys; drop --config")
    library = Library(args.store)
    video = library.named(args.video)
    if wrong := [key for key in args.overrides if not key.startswith(ASKED)]:
        raise ConfigError(f"a question can change keys of {', '.join(ASKED)}; config.{wrong[0]} is of building")
    reranker = EncoderReranker(load_reranker(args.reranker)) if args.reranker else None
    helpers = Helpers.of(embedder(args), reranker)
    memory = Memory.open(library.folder(video), args.checkpoint, helpers, args.overrides)
    with memory.store:
        source = args.checkpoint or memory.store.made.get("checkpoint", "")
        print(f"asking {video} with {source}", file=sys.stderr)
        answer = memory.ask(args.question, args.option, args.at)
        if args.html:
            write_page(memory.store, video, args.html, (args.question, answer))
    if args.json:
        print(json.dumps({"video": video, **answer.record()}, ensure_ascii=False))
    else:
        print("\n".join(answer_lines(answer, args.trace)))
    return 0
