"""Options that may stand anywhere on the line: the experiment and its overrides, and the traceback switch."""

import argparse
import dataclasses

from vlmem_jax.config import ConfigError, load, override


@dataclasses.dataclass(frozen=True)
class Line:
    """A command line taken apart: what argparse gets, and the options that may stand anywhere."""

    arguments: list[str]
    config: str | None
    overrides: dict[str, str]


def add_config(parser: argparse.ArgumentParser, default: str | None = None, optional: bool = False) -> None:
    """Lets a command read an experiment: `args.experiment` is then its ConfigDict with all overrides applied.

    `default`: the `file[:profile]` to read where the line has no --config; without one, --config is required, or, if
    `optional`, `args.experiment` is None and the command applies `args.overrides` to what it starts from.
    """
    group = parser.add_argument_group("experiment")
    group.add_argument(
        "--config",
        metavar="FILE[:PROFILE]",
        default=default,
        required=default is None and not optional,
        help="Python file whose get_config() gives the experiment" + (f" (default: {default})" if default else ""),
    )
    group.add_argument(
        "--config.KEY",
        metavar="VALUE",
        dest=argparse.SUPPRESS,
        help="change one key, for example --config.seed=3 or --config.stages.pretrain.steps=100",
    )


def split(argv: list[str]) -> Line:
    """Takes `--config F`, `--config.key=value`, `--config.key value` and `--traceback` out of the line.

    Raises ConfigError for one without a value. What follows a bare `--` is left alone.
    """
    arguments: list[str] = []
    overrides: dict[str, str] = {}
    config, position = None, 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word == "--":
            arguments += argv[position - 1 :]
            break
        if word == "--traceback":
            continue
        name, equals, value = word.partition("=")
        if name != "--config" and not name.startswith("--config."):
            arguments.append(word)
            continue
        if not equals:
            if position == len(argv) or argv[position].startswith("--"):
                raise ConfigError(f"{name} needs a value, as {name}=value or {name} value")
            value = argv[position]
            position += 1
        if name == "--config":
            config = value
        else:
            overrides[name.removeprefix("--config.")] = value
    return Line(arguments, config, overrides)


def resolve(args: argparse.Namespace, line: Line) -> None:
    """Sets `args.experiment` and `args.overrides`. Raises ConfigError where the command reads no experiment."""
    if hasattr(args, "config"):
        args.overrides = line.overrides
        args.experiment = override(load(args.config), line.overrides) if args.config else None
    elif line.overrides:
        raise ConfigError(f"this command reads no experiment; drop --config.{next(iter(line.overrides))}")
