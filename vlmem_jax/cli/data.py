"""Look at data before a run, convert them, and pack them for pods. Each action has its own --help."""

import argparse
import dataclasses
import re
import typing
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from vlmem_jax.cli.flags import add_config
from vlmem_jax.config import ConfigError
from vlmem_jax.data import DataConfig, SourceConfig
from vlmem_jax.data.convert import Origin, convert
from vlmem_jax.data.frames import extract
from vlmem_jax.data.geometry import Values
from vlmem_jax.data.jsonl import JsonLines
from vlmem_jax.data.long_benchmarks import MLVU, HDEpic, VideoMME, VStream
from vlmem_jax.data.records import SHARD_BYTES, pack
from vlmem_jax.data.samples import Samples
from vlmem_jax.data.survey import glance, survey
from vlmem_jax.data.vlm3r import VLM3R
from vlmem_jax.geometry.coordinates import Scale
from vlmem_jax.geometry.model import load_geometry
from vlmem_jax.geometry.pi3 import Tokens
from vlmem_jax.geometry.pictures import Fit
from vlmem_jax.geometry.store import CLIPS_A_FILE, Seer, store_clips
from vlmem_jax.models import VLM
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import experiment_processor

EXAMPLE = "vlmem data pack --data my/train.jsonl --root my/images --out my/train.array_record"
BENCHMARKS: dict[str, type[Origin]] = {"videomme": VideoMME, "mlvu": MLVU, "hdepic": HDEpic}
"""Whose files say all that there is to say."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem data`."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    packing = _action(
        actions, "pack", _pack, "Write a JSONL file and its images to few large ArrayRecord files.", EXAMPLE
    )
    packing.add_argument("--data", required=True, metavar="FILE", help="the JSONL file")
    packing.add_argument("--root", default="", metavar="DIR", help="folder of its images (default: that of the file)")
    packing.add_argument("--out", required=True, metavar="NAME.array_record", help="written as NAME-00000-of-... files")
    add_links(packing)
    packing.add_argument(
        "--shard-size", type=_bytes, default=SHARD_BYTES, metavar="SIZE", help="of a file, such as 500MB (default: 1GB)"
    )
    packing.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be read, and name them")

    looking = _action(
        actions,
        "inspect",
        _inspect,
        "Measure all samples: tokens, tiles, how they fill rows, and what is bad. Without --config, images alone.",
        "vlmem data inspect --config configs/comemo_2b.py --data my/train.jsonl --root my/images",
    )
    looking.add_argument("--data", metavar="FILE", help="a file in place of data.train and data.eval of the experiment")
    looking.add_argument("--root", default="", metavar="DIR", help="folder of its images (default: that of the file)")
    add_links(looking)
    looking.add_argument("--decode", action="store_true", help="decode every image, too: headers alone do not tell all")
    looking.add_argument("--stage", help="stage whose data to look at (default: those of the experiment)")
    looking.add_argument("--bad", type=int, default=20, metavar="N", help="bad lines to name (default: %(default)s)")
    turning = _action(
        actions,
        "convert",
        _convert,
        "Make JSONL of a JSON array, of parquet, of alpaca's keys, of the files that VLM-3R lists, of questions about "
        "long videos as benchmarks release them, and files of the images that lines hold.",
        "vlmem data convert their/train.parquet --out my/train.jsonl\n"
        "  vlmem data convert --from vlm3r VLM-3R/vsibench_data.yaml --root VLM-3R --out my/train.jsonl\n"
        "  vlmem data convert --from mlvu MLVU/json/1_plotQA.json --out my/plots.jsonl",
    )
    turning.add_argument("data", metavar="FILE", help="JSON, JSONL or parquet; of vlm3r YAML")
    turning.add_argument(
        "--from",
        dest="origin",
        choices=("vlm3r", *BENCHMARKS, "vstream"),
        help="vlm3r: the file is a YAML list of JSON files, `datasets: [{json_path, sampling_strategy}]`; others: "
        "questions of Video-MME, MLVU, HD-EPIC and VStream-QA about long videos, as they are released",
    )
    turning.add_argument(
        "--root",
        metavar="DIR",
        help="vlm3r: folder of the JSON files (default: that of the file); vstream: folder of the folders of frames",
    )
    add_links(turning)
    turning.add_argument("--seed", type=int, metavar="N", help="vlm3r: of what random:n takes (0)")
    turning.add_argument("--out", required=True, metavar="NAME.jsonl", help="the file to write")
    turning.add_argument("--images", metavar="DIR", help="folder of images, in that of --out (default: NAME_images)")
    turning.add_argument("--skip-bad", action="store_true", help="leave out values that cannot be used, and name them")
    cutting = _action(
        actions,
        "frames",
        _frames,
        "Decode videos to ArrayRecord files of frames, a file each. Stopped, the same command goes on.",
        "vlmem data frames --video my/videos/*.mp4 --out my/frames.array_record --fps 2",
    )
    cutting.add_argument("--video", nargs="+", required=True, metavar="FILE", help="the videos")
    cutting.add_argument("--out", required=True, metavar="NAME.array_record", help="written as NAME-00000-of-... files")
    cutting.add_argument("--fps", type=float, default=1.0, help="frames a second to keep (default: %(default)s)")
    cutting.add_argument("--quality", type=int, default=95, help="of JPEG, 1 to 100 (default: %(default)s)")
    cutting.add_argument("--threads", type=int, default=0, help="videos at the same time (default: one a core)")
    _add_geometry(actions)
    add_config(parser, optional=True)


def _add_geometry(actions: argparse._SubParsersAction) -> None:
    knowing = _action(
        actions,
        "geometry",
        _geometry,
        "Compute what a model of geometry makes of the videos of an experiment, once, a clip a record: what a memory "
        "reads then is data. Stopped, the same command goes on; several machines each do a --part.",
        "vlmem data geometry --config configs/vlm2_llava_video_7b.py --checkpoint yyfz233/Pi3 "
        "--out data/geometry.array_record",
    )
    knowing.add_argument(
        "--checkpoint", required=True, metavar="MODEL", help="folder or repository of a public model: pi3 or VGGT"
    )
    knowing.add_argument("--out", required=True, metavar="NAME.array_record", help="written as NAME-00000-of-... files")
    knowing.add_argument("--data", metavar="FILE", help="a file in place of data.train and data.eval of the experiment")
    knowing.add_argument("--root", default="", metavar="DIR", help="folder of its videos (default: that of the file)")
    add_links(knowing)
    choices = {
        "--geometry-fit": (
            Fit,
            "how frames become what the model takes: the part that the tower's patches cover, or all",
        ),
        "--scale": (Scale, "coordinates are divided by the mean distance in the clip, in its first frame, or not"),
        "--tokens": (Tokens, "pi3: what its decoder says of a patch, or its decoder of points"),
        "--values": (Values, "bf16, or int8, half as large, rounded to 255 steps a token"),
    }
    for flag, (allowed, what) in choices.items():
        values = typing.get_args(allowed)
        knowing.add_argument(flag, choices=values, default=values[0], help=f"{what} (default: %(default)s)")
    knowing.add_argument("--by-confidence", action="store_true", help="weigh the points of a patch by their confidence")
    knowing.add_argument(
        "--clips-a-file", type=int, default=CLIPS_A_FILE, metavar="N", help="clips of a file (default: %(default)s)"
    )
    knowing.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="of N machines, the work of machine I, from 0"
    )
    knowing.add_argument("--skip-bad", action="store_true", help="leave out samples that cannot be read, and name them")


def run(args: argparse.Namespace) -> int:
    """0 when done; 1 if `inspect` found a bad line."""
    if args.action not in (_inspect, _geometry) and (args.experiment is not None or args.overrides):
        raise ConfigError("only `vlmem data inspect` and `vlmem data geometry` read an experiment; drop --config")
    return args.action(args)


def _action(
    actions: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(action=run)
    return parser


def add_links(parser: argparse.ArgumentParser) -> None:
    """Adds --follow-links."""
    parser.add_argument("--follow-links", action="store_true", help="links below that folder may lead out of it")


def _pack(args: argparse.Namespace) -> int:
    lines = JsonLines(args.data)
    with progress_bar() as bar:
        task = bar.add_task("packing", total=len(lines))
        packed = pack(
            lines,
            SourceConfig(args.data, args.root, follow_links=args.follow_links),
            args.out,
            args.shard_size,
            args.skip_bad,
            lambda index: bar.update(task, completed=index + 1),
        )
    for reason in packed.skipped:
        print(f"left out: {reason}")
    files = f"{len(packed.files)} file{'s' * (len(packed.files) > 1)}"
    print(
        f"{args.out}: {packed.samples} samples, {packed.nbytes / 1e9:.3f} GB in {files}; {len(packed.skipped)} left out"
    )
    return 0


def _convert(args: argparse.Namespace) -> int:
    origin = _origin(args)
    with progress_bar() as bar:
        task = bar.add_task("converting", total=None)
        made = convert(
            args.data, args.out, args.images, args.skip_bad, lambda done: bar.update(task, completed=done), origin
        )
    for file in origin.taken if isinstance(origin, VLM3R) else ():
        print(file)
    for reason in made.skipped:
        print(f"left out: {reason}")
    print(f"{args.out}: {made.lines} lines, {made.images} images written; {len(made.skipped)} left out")
    return 0


def _origin(args: argparse.Namespace) -> Origin | None:
    if args.origin not in ("vlm3r", "vstream") and (args.root or args.follow_links):
        raise ConfigError("--root and --follow-links are for --from vlm3r and vstream; leave them out")
    if args.origin != "vlm3r" and args.seed is not None:
        raise ConfigError("--seed is for --from vlm3r; leave it out")
    if args.origin == "vlm3r":
        return VLM3R(args.root or "", args.follow_links, args.seed or 0)
    if args.origin == "vstream":
        if not args.root:
            raise ConfigError("--from vstream needs --root, the folder of the folders of frames: lines name them")
        return VStream(args.root, args.follow_links)
    return BENCHMARKS[args.origin]() if args.origin else None


def _inspect(args: argparse.Namespace) -> int:
    if args.experiment is None:
        if not args.data:
            raise ConfigError("`vlmem data inspect` needs --config, or --data for what can be told without a tokenizer")
        found = glance(
            SourceConfig(args.data, args.root, follow_links=args.follow_links), DataConfig().thread_count, args.decode
        )
        print(f"{args.data}\n{found.text()}")
        _name_bad(found.bad, args.bad)
        return 1 if found.bad else 0
    settings = experiment(args.experiment)
    stages = {stage.name: stage for stage in settings.stages}
    if args.stage and args.stage not in stages:
        raise ConfigError(f"there is no stage {args.stage!r}; the experiment has {', '.join(stages)}")
    config = settings.data_of(stages[args.stage]) if args.stage else settings.data
    processor = experiment_processor(settings, VLM(settings.model))
    parts = {"data.train": (config.train, settings.seed), "data.eval": (config.eval, None)}
    if args.data:
        parts = {"--data": ((SourceConfig(args.data, args.root, follow_links=args.follow_links),), settings.seed)}
    bad = 0
    for name, (sources, seed) in parts.items():
        if not sources:
            continue
        found = survey(sources, config, processor, seed, args.decode)
        print(f"{name}: {', '.join(source.path for source in sources)}\n{found.text()}")
        _name_bad(found.bad, args.bad)
        bad += len(found.bad)
    return 1 if bad else 0


def _name_bad(bad: dict[str, str], most: int) -> None:
    for sample, reason in list(bad.items())[:most]:
        print(f"bad: {sample}: {reason}")
    if len(bad) > most:
        print(f"... and {len(bad) - most} more; --bad={len(bad)} names all")


def _frames(args: argparse.Namespace) -> int:
    with progress_bar() as bar:
        task = bar.add_task("decoding videos", total=len(args.video))
        written, before = extract(
            args.video,
            args.out,
            args.fps,
            args.quality,
            args.threads,
            lambda done: bar.update(task, completed=done),
        )
    print(f"{args.out}: {written} frames written, {before} were there; {len(args.video)} videos")
    return 0


def _geometry(args: argparse.Namespace) -> int:
    if args.experiment is None:
        raise ConfigError(
            "`vlmem data geometry` needs --config: it tells which frames are taken, and how they are seen"
        )
    settings = experiment(args.experiment)
    processor, data = experiment_processor(settings, VLM(settings.model)), settings.data
    if (reads := processor.tile.geometry) is None:
        raise ConfigError(f"geometry is for a memory that reads it; model.memory is {settings.model.memory_kind}")
    given = (
        (SourceConfig(args.data, args.root, follow_links=args.follow_links),) if args.data else data.train + data.eval
    )
    samples = Samples([dataclasses.replace(source, geometry="") for source in given], data, processor)
    model = load_geometry(args.checkpoint, tokens=args.tokens)
    see = Seer(model, reads, args.geometry_fit, args.scale, args.by_confidence)
    made = see.made | {"tokens": args.tokens}
    options = {"clips_a_file": args.clips_a_file, "values": args.values, "part": args.part, "skip": args.skip_bad}
    with progress_bar() as bar:
        task = bar.add_task("clips", total=None)
        stored = store_clips(
            samples, see, made, args.out, **options,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    for reason in stored.skipped:
        print(f"left out: {reason}")
    print(
        f"{args.out}: geometry of {stored.written} clips written, {stored.before} were there; {len(stored.skipped)} "
        "samples left out"
    )
    return 0


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"a part is I/N, I from 0 to N - 1, such as 0/8; got {text!r}")
    return int(found[1]), int(found[2])


def progress_bar() -> Progress:
    """With time left; nothing where there is no terminal."""
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _bytes(text: str) -> int:
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip(), re.IGNORECASE)
    if size is None or not float(size[1]):
        raise argparse.ArgumentTypeError(f"a size is a number and B, KB, MB or GB, such as 500MB; got {text!r}")
    return int(float(size[1]) * _UNITS[size[2].upper()])
