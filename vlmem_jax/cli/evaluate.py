"""Answer the prompts of JSONL files, score the answers, and print a table. An evaluation that was stopped goes on.

A line of a file holds `prompt`, and perhaps `image`, `images`, `videos`, `answer`, `answers`, `answer_type`, `choices`
and `source`, by which the table is split; with --format it is read as a benchmark was released. OUTPUT/samples.jsonl
gets a line for each prompt, OUTPUT/summary.json the numbers of the table and more.
"""

import argparse
import dataclasses
import sys

from vlmem_jax.cli import answering
from vlmem_jax.cli.data import add_links, progress_bar
from vlmem_jax.data import SourceConfig
from vlmem_jax.data.benchmarks import BENCHMARKS, NEW_TOKENS
from vlmem_jax.data.records import SUFFIX
from vlmem_jax.evals import EvalConfig, evaluate, table
from vlmem_jax.generate import LoadedModel
from vlmem_jax.geometry.newest import Newest

EXAMPLE = """vlmem evaluate --checkpoint RUN --data my/mmstar.jsonl --data my/blink.jsonl --output runs/scores
  vlmem evaluate --checkpoint RUN --data my/mmvet.jsonl --output RUN/eval --without-memory
  vlmem evaluate --checkpoint RUN --data my/mmvet.jsonl --output RUN/short --disable long
  vlmem evaluate --checkpoint RUN --format vsibench --data vsi/test.jsonl --root vsi/videos --output RUN/vsi"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem evaluate`."""
    answering.add_arguments(parser, streams=False)
    defaults = {field.name: field.default for field in dataclasses.fields(EvalConfig)}
    parser.add_argument(
        "--data", action="append", required=True, metavar="FILE", help="JSONL file of prompts; may be repeated"
    )
    parser.add_argument(
        "--format",
        choices=BENCHMARKS,
        help="the files are those of this benchmark (JSON, JSONL or parquet): its questions are asked in its words, "
        f"answered in at most {NEW_TOKENS} tokens and scored as it does, and no line tells the times of a video",
    )
    parser.add_argument("--root", default="", metavar="DIR", help="folder of images and videos (default: that of FILE)")
    add_links(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of what it writes, on a disk or gs://")
    parser.add_argument(
        "--metric",
        default=defaults["metric"],
        help="what an answer is worth: answer (as the prompt's answer_type says), exact, substr, text, choice, number, "
        "vsi, em, regex, or MODULE:FUNCTION of your own (default: answer, or that of --format)",
    )
    group = parser.add_argument_group("videos", "for models that see them as frames")
    group.add_argument("--frames", type=int, metavar="N", help="taken of a video (default: as trained)")
    group.add_argument(
        "--time-line",
        choices=("on", "off"),
        help="a line behind a video says how long it is and where its frames stand (default: as trained; off with "
        "--format)",
    )
    parser.add_argument(
        "--without-memory", action="store_true", help="answer everything again with --invocation never, to compare"
    )
    parser.add_argument(
        "--batch-size", type=int, default=defaults["batch_size"], help="prompts answered together (%(default)s)"
    )
    parser.add_argument(
        "--on-bad-sample",
        choices=("raise", "skip"),
        default=defaults["on_bad_sample"],
        help="what to do about a prompt that cannot be asked or judged (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    stored = args.geometry if args.geometry.endswith(SUFFIX) else ""
    config = EvalConfig(
        data=tuple(
            SourceConfig(path, args.root, follow_links=args.follow_links, geometry=stored) for path in args.data
        ),
        benchmark=args.format or "",
        metric=args.metric,
        sampling=answering.sampling(args, NEW_TOKENS) if args.format else answering.sampling(args),
        invocation=answering.invocation(args),
        without_memory=args.without_memory,
        rope_dhr=answering.rope_dhr(args),
        batch_size=args.batch_size,
        on_bad_sample=args.on_bad_sample,
    )
    model = _shown(answering.load(args), args)
    if (made_by := model.processor.geometry_of) is not None:
        model.processor.geometry_of = Newest(made_by)
    with progress_bar() as bar:
        tasks = {}

        def report(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file, total=total)
                print(f"{args.output}/{file}: {done} of {total} prompts are there", file=sys.stderr)
            bar.update(tasks[file], completed=done)

        summary = evaluate(model, config, args.output, report)
    print(table(summary))
    skipped = f"; {summary['skipped']} skipped, see `error` in samples.jsonl" * bool(summary["skipped"])
    print(f"{args.output}/summary.json: {summary['scored']} of {summary['samples']} answers scored{skipped}")
    return 0


def _shown(model: LoadedModel, args: argparse.Namespace) -> LoadedModel:
    """The model, with what the flags say of videos. Raises ConfigError where it does not see frames."""
    image = {} if args.frames is None else {"frames": args.frames}
    if args.time_line or (args.format and hasattr(model.processor.image, "time_line")):
        image["time_line"] = args.time_line == "on"
    return model.showing(image)
