"""Builds memories of video files and folders of pictures.

Stopped at any time, the same command goes on, and makes no call of the model again that was answered. Keys of the
config (vlmem_jax/agent/config.py) are changed by --config.KEY=VALUE, such as --config.build.images=64; those of
`image`, of the model's own, too. A file of --config has them all.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlmem_jax.agent.calls import Work, run_flow
from vlmem_jax.agent.config import PRESETS, AgentConfig, resolve
from vlmem_jax.agent.embed import LexicalEmbedder
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.memory import engine_for, finder
from vlmem_jax.agent.model import EngineModel
from vlmem_jax.agent.shards import ALL, FOLDER, Claims, Shard, claimed, is_closed, left
from vlmem_jax.cli import answering
from vlmem_jax.cli.memory_ask import add_embedder, embedder
from vlmem_jax.cli.memory_jobs import Jobs, Video, progress_bar
from vlmem_jax.cli.memory_plan import run_plan
from vlmem_jax.config import override
from vlmem_jax.evals.digest import digest
from vlmem_jax.generate import LoadedModel, load_model
from vlmem_jax.stream import Reading, kind_of, open_source

EXAMPLE = """vlmem memory build --video my/*.mp4 --store runs/memories --checkpoint RUN
  vlmem memory build --video day.mp4 --store runs/memories --checkpoint RUN --preset paper --config.ingest.fps=2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem memory build`."""
    parser.add_argument("--video", nargs="+", required=True, metavar="FILE", help="video files and folders of pictures")
    parser.add_argument("--fps", type=float, default=1.0, help="pictures a second of a folder (%(default)s)")
    parser.add_argument("--subtitles", metavar="DIR", help="folder of subtitles, NAME.srt of NAME.mp4 (default: none)")
    parser.add_argument(
        "--together",
        type=int,
        default=4,
        metavar="N",
        help="videos that go side by side, each with a cache (%(default)s)",
    )
    parser.add_argument(
        "--shard",
        type=_part,
        default=ALL,
        metavar="I/N",
        help="of N processes with one store, the videos of this one",
    )
    parser.add_argument(
        "--steal", action="store_true", help="then those of other processes, too, that nobody is at, or has ended"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="cut the videos, and tell calls, tokens, TFLOP, disk and hours on a chip"
    )
    add_model(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, and how it builds."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="the model: a workdir, a converted folder, or a folder or repository of Hugging Face",
    )
    parser.add_argument("--adapter", metavar="NAME", help="its adapter to build with, or none (default: the first)")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a config to start from (default: default)")
    add_embedder(parser)
    answering.add_mesh(parser)


class Settings(NamedTuple):
    """What the line asks for."""

    config: AgentConfig
    image: dict[str, Any]
    """Keys of the model's config of images."""


def settings(args: argparse.Namespace) -> Settings:
    """The config of the flags. Raises ConfigError for keys that there are not."""
    start = args.experiment if args.experiment is not None else override(ConfigDict(), args.overrides)
    given = start.to_dict()
    image = given.pop("image", {})
    return Settings(resolve(given | ({"preset": args.preset} if args.preset else {}), "config"), image)


def load(args: argparse.Namespace, image: dict[str, Any]) -> LoadedModel:
    """The model, with a word on the terminal. Raises ValueError for what cannot be loaded."""
    print(f"loading {args.checkpoint}", file=sys.stderr)
    model = load_model(args.checkpoint, answering.mesh(args), adapter=args.adapter)
    return model.showing(image, "config.image") if image else model


def about(args: argparse.Namespace, model: LoadedModel, image: dict[str, Any]) -> dict[str, Any]:
    """What a memory notes of the model that builds it, and of what that is shown."""
    named = {"checkpoint": args.checkpoint, "model": digest(model.params), "adapter": args.adapter}
    return named | {"image": image, "fps": args.fps}


def run(args: argparse.Namespace) -> int:
    """0 when all videos are there, 1 when some could not be remembered, 130 when stopped."""
    if args.together < 1:
        raise ValueError(f"--together must be at least 1, got {args.together}")
    config, image = settings(args)
    if args.subtitles and not Path(args.subtitles).is_dir():
        raise ValueError(f"--subtitles is a folder of SRT files, got {args.subtitles}")
    library, texts = Library(args.store), embedder(args) or LexicalEmbedder()
    for name in args.video:  # what cannot be opened is found before the model is loaded
        if kind_of(name) not in ("file", "folder"):
            raise ValueError(f"a memory is built of files and folders; {name} is live")
        open_source(name, Reading(args.fps))
    videos = {video.id: video for video in (Video.of(name, library, args.subtitles) for name in args.video)}
    if args.dry_run:
        return run_plan(args, list(videos.values()), config, image)
    model = load(args, image)
    engine = engine_for(model, config, args.together, any(video.track.cues for video in videos.values()))
    with progress_bar() as bar:
        made_by, frames = about(args, model, image), []
        jobs = Jobs(library, config, texts, made_by, model.processor, args.fps, bar, frames)
        done = [video for video in videos if is_closed(library, video)]
        for video in done:
            library.open(video, jobs.made(videos[video])).close()  # raises for another config
            jobs.say(f"{video}: is there already")
        answers = EngineModel(engine, model.processor, finder(frames), config.show)
        try:
            failed = [video for video, failure in _built(args, jobs, videos, answers) if failure]
        except KeyboardInterrupt:
            bar.stop()
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
    others = [video for video in left(list(videos), lambda video: is_closed(library, video), args.shard)
              if video not in failed]  # fmt: skip
    if others:
        print(f"{len(others)} videos are built by other processes, or were: {', '.join(others[:3])}; --steal takes "
              "over what was left", file=sys.stderr)  # fmt: skip
    return 1 if failed or others else 0


def _built(
    args: argparse.Namespace, jobs: Jobs, videos: Mapping[str, Video], answers: EngineModel
) -> Iterator[tuple[str, str]]:
    """Videos as they end, each with what went wrong; the next begins where one has ended."""
    library = jobs.library
    with Claims(library.root / FOLDER) as claims:

        def coming() -> Iterator[tuple[str, Work[str]]]:
            for video in claimed(list(videos), claims, lambda one: is_closed(library, one), args.shard, args.steal):
                yield video, jobs.work(videos[video])

        for video, failure in run_flow(coming(), answers, args.together):
            claims.release(video)
            yield video, failure


def _part(text: str) -> Shard:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"a shard is I/N, I from 0 to N - 1, such as 0/8; got {text!r}")
    return Shard(int(found[1]), int(found[2]))
