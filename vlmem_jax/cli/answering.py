"""What `vlmem generate` and `vlmem chat` have in common: the model's folder and how tokens are chosen."""

import argparse
import sys

from vlmem_jax.generate import LoadedModel, SamplingConfig, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = SamplingConfig()
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir of `vlmem train` or a folder made by `vlmem convert`, on a disk or gs://",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=defaults.max_new_tokens, help="longest answer, tokens (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help="0: the most probable token (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="sample among the k best tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=defaults.top_p, help="sample within this probability (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of sampling (%(default)s)")
    parser.add_argument(
        "--rope-dhr",
        choices=("on", "off"),
        help="positions of tiled images: compressed or not (default: as trained; off helps reading text in images)",
    )


def sampling(args: argparse.Namespace) -> SamplingConfig:
    """The sampling flags. Raises ValueError for values out of range."""
    return SamplingConfig(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)


def rope_dhr(args: argparse.Namespace) -> bool | None:
    """None: as the checkpoint says."""
    return None if args.rope_dhr is None else args.rope_dhr == "on"


def load(args: argparse.Namespace) -> LoadedModel:
    """The model, with a word on the terminal while it loads."""
    print(f"loading {args.checkpoint}", file=sys.stderr)
    return load_model(args.checkpoint)
