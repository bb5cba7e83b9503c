"""Converts a checkpoint: a Hugging Face folder of InternVL2, CoMemo or Qwen2.5-VL (config.json, safetensors, tokenizer
files), or a repository of the hub, to ours, or any of ours (a workdir, a stage, a step, a converted folder) to one of
Hugging Face. SOURCE decides. With --push, TARGET is a repository of the hub.

Memory follows the size of a layer, not of the model. TARGET is a new folder; it appears whole or not at all. A
checkpoint of ours may lie in a bucket (gs://BUCKET/...).
A plain checkpoint gets a fresh memory with --config.model.memory=NAME.
"""

import argparse
import dataclasses
import re
import sys
import tempfile
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from vlmem_jax import families
from vlmem_jax.checkpoint import find
from vlmem_jax.checkpoint.folder import CONFIG_FILE, MODEL_FILE
from vlmem_jax.cli.flags import add_config
from vlmem_jax.config import build, override, to_dict
from vlmem_jax.hub import repos
from vlmem_jax.hub.card import model_card
from vlmem_jax.hub.convert import SHARD_BYTES, Summary, export_folder, import_folder, released
from vlmem_jax.paths import AnyPath

EXAMPLE = """vlmem convert Qwen/Qwen2.5-VL-3B-Instruct checkpoints/mine
  vlmem convert RUN CoMemo-2B-mine --dtype bfloat16
  vlmem convert RUN USER/CoMemo-2B-mine --push"""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = "the checkpoint to read: a folder, or USER/NAME[@REVISION] of the hub"
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("target", metavar="TARGET", help="the new folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of fresh memory blocks and vocabulary rows (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of tensors written to a Hugging Face folder (default: as stored)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_bytes,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="largest safetensors file to write, such as 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a low-rank adapter in PEFT's layout that the model gets, by the name of its folder; may be given several "
        "times. Those in SOURCE/adapters it has anyway",
    )
    parser.add_argument(
        "--vision",
        metavar="FOLDER",
        help="the vision tower, where the checkpoint lacks it (LLaVA-Video: google/siglip-so400m-patch14-384)",
    )
    parser.add_argument(
        "--merge",
        metavar="NAME",
        help="write a Hugging Face folder whose weights have this adapter in them (default: adapters lie apart, in "
        "TARGET/adapters, in PEFT's layout)",
    )
    parser.add_argument(
        "--push",
        action="store_true",
        help="TARGET is USER/NAME: write that repository of the hub, with a model card made from the run, and no "
        "folder; needs the token of `hf auth login`",
    )
    parser.add_argument("--private", action="store_true", help="a repository that --push makes is seen by you alone")
    add_config(parser, optional=True)


def run(args: argparse.Namespace) -> int:
    source = repos.folder(args.source)
    if args.private and not args.push:
        raise ValueError("--private is of the repository that --push makes")
    if args.push and not _is_ours(source):
        raise ValueError(f"--push writes one of our checkpoints to the hub; {source} is none")
    if args.push:
        repos.check_name(args.target)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("converting", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if _is_ours(source):
            if args.experiment is not None or args.overrides:
                raise ValueError("--config says what to make of a Hugging Face folder; this SOURCE is one of ours")
            if args.vision:
                raise ValueError("--vision is read beside a Hugging Face folder; this SOURCE is one of ours")
            if args.adapter:
                raise ValueError("--adapter is read beside a Hugging Face folder; this SOURCE is one of ours")
            how = dict(dtype=args.dtype, shard_bytes=args.max_shard_size, merge=args.merge)
            if args.push:
                summary = _push(source, args, **how, progress=progress)
            else:
                summary = export_folder(source, args.target, **how, progress=progress)
        else:
            if args.dtype:
                raise ValueError("--dtype is for writing a Hugging Face folder; reading one keeps its dtypes")
            if args.merge:
                raise ValueError("--merge is for writing a Hugging Face folder; reading one keeps its adapters apart")
            model, image = _wanted(args, source)
            how = dict(model=model, image=image, adapters=args.adapter, vision=args.vision, seed=args.seed)
            summary = import_folder(source, args.target, **how, progress=progress)
    print(_describe(summary))
    return 0


def _push(source: AnyPath, args: argparse.Namespace, **how) -> Summary:
    """Writes a folder that is gone afterwards, and sends it to the hub."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        summary = export_folder(source, folder, **how)
        (folder / "README.md").write_text(model_card(find(source), args.target, summary.parameters))
        address = repos.push(folder, args.target, args.private)
    return dataclasses.replace(summary, folder=address)


def _wanted(args: argparse.Namespace, source: AnyPath):
    """The model and image config that the line asks for; None for what config.json says."""
    experiment = args.experiment
    if experiment is None and args.overrides:
        found = released(source, args.vision)
        start = ConfigDict({"model": to_dict(found.model), "image": to_dict(found.image)})
        experiment = override(start, args.overrides)
    if experiment is None:
        return None, None
    wanted = experiment.to_dict()
    for key in ("model", "image"):
        if key not in wanted:
            raise ValueError(f"config.{key} must be given; {args.config} has none")
    model = families.resolve(wanted["model"])
    return model, build(families.of_model(model).image, wanted["image"], "config.image")


def _is_ours(source: AnyPath) -> bool:
    if not source.is_dir() or ((source / CONFIG_FILE).is_file() and not (source / MODEL_FILE).is_file()):
        return False
    return any((folder / MODEL_FILE).is_file() for folder in (source, *source.parents[:2]))


def _describe(summary: Summary) -> str:
    lines = [f"{summary.folder}: {summary.parameters:,} parameters, {summary.nbytes / 1e9:.2f} GB"]
    if summary.fresh:
        lines.append(f"not in the source, newly initialised: {', '.join(summary.fresh)}")
    if summary.new_tokens:
        lines.append(f"added to the tokenizer: {' '.join(summary.new_tokens)}")
    if summary.unused:
        names = ", ".join(summary.unused)
        lines.append(f"not read: {names}")
        if "adapter_config.json" in summary.unused:
            lines.append("the adapter beside the model was not used; name its folder with --adapter to have it, too")
    if summary.new_rows:
        lines.append(f"rows added to the vocabulary: {summary.new_rows}")
    return "\n".join([*lines, *summary.notes])


def _bytes(text: str) -> int:
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip(), re.IGNORECASE)
    if size is None or not float(size[1]):
        raise argparse.ArgumentTypeError(f"a size is a number and B, KB, MB or GB, such as 500MB; got {text!r}")
    return int(float(size[1]) * _UNITS[size[2].upper()])
