"""What the commands that answer have in common: the model's folder, how tokens are chosen, who calls for memories."""

import argparse
import sys
import typing

from vlmem_jax.data.records import SUFFIX
from vlmem_jax.generate import InvocationConfig, LoadedModel, SamplingConfig, Transcript, load_model
from vlmem_jax.geometry.pictures import Fit
from vlmem_jax.geometry.store import geometry_of
from vlmem_jax.models.placement import asked_mesh, whole_heads
from vlmem_jax.runtime.sharding import MESH_AXES, MeshConfig

MODES = typing.get_args(typing.get_type_hints(InvocationConfig)["mode"])


def add_arguments(parser: argparse.ArgumentParser, streams: bool = True) -> None:
    """`streams`: whether answers are printed as they come."""
    defaults = SamplingConfig()
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a workdir of `vlmem train` or a folder made by `vlmem convert`, on a disk or gs://; or a folder or "
        "repository of Hugging Face (USER/NAME, or USER/NAME@REVISION)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"longest answer, tokens ({defaults.max_new_tokens})"
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
    parser.add_argument(
        "--context",
        metavar="WHAT",
        help="which visual tokens stand in the sequence: all, thumbnail, pooled:k, stride:n, or kept:n (default: as "
        "trained)",
    )
    parser.add_argument(
        "--adapter", metavar="NAME", help="the model's adapter to answer through, or none (default: the first it has)"
    )
    add_geometry(parser)
    add_mesh(parser)
    group = parser.add_argument_group("latent memory", "for models whose memory speaks while they answer")
    group.add_argument(
        "--invocation",
        choices=MODES,
        help="who calls for a memory: the model (learned, the default), nobody, or a rule after phrases",
    )
    group.add_argument(
        "--invocation-probability",
        type=float,
        metavar="P",
        help=f"of a call after a phrase, with delimiter_random ({InvocationConfig().probability})",
    )
    group.add_argument("--max-invocations", type=int, metavar="N", help="in one answer (default: the model's own)")
    group.add_argument(
        "--disable",
        action="append",
        default=[],
        metavar="KIND",
        help="calls for memories of this kind, such as long, have no effect; may be given several times",
    )
    group.add_argument("--reverse-types", action="store_true", help="a call for one kind is answered by the other")
    if streams:
        group.add_argument("--show-memory", action="store_true", help="show where a memory was inserted, and how long")


def add_geometry(parser: argparse.ArgumentParser) -> None:
    """From where the memory knows the space that frames show."""
    parser.add_argument(
        "--geometry",
        default="",
        metavar="MODEL",
        help="for a memory that reads geometry: folder or repository of a public model, pi3 or VGGT, that makes it of "
        "what is shown; of `vlmem evaluate`, also NAME.array_record, made by `vlmem data geometry`",
    )
    parser.add_argument(
        "--geometry-fit",
        choices=typing.get_args(Fit),
        default=typing.get_args(Fit)[0],
        help="how frames become what that model takes: the part that the tower's patches cover, or all (%(default)s)",
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """How devices share the work of answering."""
    group = parser.add_argument_group(
        "devices",
        "By default heads go over as many devices as share them evenly, and rows over the rest. Of sizes given, data "
        "takes what is left.",
    )
    shared = {
        "data": "rows; each part holds all weights",
        "fsdp": "rows and weights, which are gathered for every token: for models too large otherwise",
        "context": "tokens and tiles of prompts",
        "tensor": "heads, MLPs and the vocabulary",
    }
    for axis in MESH_AXES:
        group.add_argument(
            f"--mesh.{axis}", type=int, metavar="N", dest=f"mesh_{axis}", help=f"devices that share {shared[axis]}"
        )


def mesh(args: argparse.Namespace) -> MeshConfig | None:
    """The flags of devices; None: as the model has it by default. Raises ValueError for sizes out of range."""
    sizes = {axis: getattr(args, f"mesh_{axis}") for axis in MESH_AXES}
    return asked_mesh({axis: size for axis, size in sizes.items() if size is not None}, "--mesh")


def sampling(args: argparse.Namespace, longest: int = SamplingConfig().max_new_tokens) -> SamplingConfig:
    """The sampling flags; `longest`: answer, tokens, by default. Raises ValueError for values out of range."""
    asked = args.max_new_tokens
    return SamplingConfig(longest if asked is None else asked, args.temperature, args.top_k, args.top_p, args.seed)


def invocation(args: argparse.Namespace) -> InvocationConfig:
    """The flags of latent memory. Raises ValueError for values out of range."""
    if args.invocation_probability is not None and args.invocation != "delimiter_random":
        raise ValueError(
            "--invocation-probability is for --invocation delimiter_random, got it with "
            f"{args.invocation or InvocationConfig().mode}"
        )
    given = {
        "mode": args.invocation,
        "probability": args.invocation_probability,
        "max_invocations": args.max_invocations,
        "disabled": tuple(args.disable),
        "reverse_types": args.reverse_types,
    }
    return InvocationConfig(**{key: value for key, value in given.items() if value is not None})


def rope_dhr(args: argparse.Namespace) -> bool | None:
    """None: as the checkpoint says."""
    return None if args.rope_dhr is None else args.rope_dhr == "on"


def load(args: argparse.Namespace) -> LoadedModel:
    """The model, with a word on the terminal while it loads.

    Raises ValueError for what cannot be loaded, and for flags of latent memory that the model cannot follow.
    """
    wanted = invocation(args)
    print(f"loading {args.checkpoint}", file=sys.stderr)
    model = load_model(args.checkpoint, mesh(args), adapter=args.adapter, context=args.context)
    if args.geometry and not args.geometry.endswith(SUFFIX):
        print(f"loading {args.geometry}", file=sys.stderr)
        model.processor.geometry_of = geometry_of(model.processor, args.geometry, args.geometry_fit)
    for line in whole_heads(model.vlm, model.mesh, model.vlm.dtype.itemsize, cache=True):
        print(line, file=sys.stderr)
    if speech := model.vlm.speech:
        wanted.budget(speech)
    elif wanted != InvocationConfig() or args.invocation or getattr(args, "show_memory", False):
        raise ValueError(
            "the flags of latent memory (--invocation, --disable, --show-memory ...) are for models whose memory "
            f"speaks while they answer, but model.memory of {args.checkpoint} is {model.vlm.config.memory_kind}; "
            "leave them out"
        )
    return model


def transcript(args: argparse.Namespace, model: LoadedModel) -> Transcript:
    """What takes the tokens of an answer that is printed as it comes."""
    return Transcript(model.processor.tokenizer, model.vlm.speech, args.show_memory)
