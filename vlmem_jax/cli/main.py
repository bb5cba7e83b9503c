"""Entry of `vlmem <command>`: finds the command, parses its line, and turns errors into one plain line."""

import argparse
import importlib
import sys
import traceback
import types

from absl import flags as absl_flags

import vlmem_jax
from vlmem_jax.cli.flags import Line, resolve, split

COMMANDS = {
    "train": "train a model through the stages of an experiment",
    "generate": "answer one prompt about images",
    "chat": "talk about images over several turns",
    "stream": "look at a video as it comes, and answer questions about it at any time",
    "memory": "build memories of hours of video, and ask them",
    "evaluate": "score answers to the prompts of JSONL files",
    "convert": "read and write Hugging Face checkpoints",
    "data": "look at data before a run, and pack them for pods",
    "compile": "check a training step for a TPU slice that need not be there",
    "demo": "train a small model on mosaics of handwritten digits, and report what it learned",
}
"""Name and help line; the module of a command is vlmem_jax.cli.<name>, imported when the command is run."""

EXTRAS = {"av": "video", "gcsfs": "gcs", "lancedb": "lancedb", "sklearn": "demo"}
"""Optional package -> the extra of ours that installs it."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code. Raises SystemExit, as argparse does, for --help and usage errors."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(split(argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        message = _message(error)
        if message is None:
            raise
        if "--traceback" in argv:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        return 2


def _run(line: Line) -> int:
    name, module = _command(line)
    parser = argparse.ArgumentParser(
        prog=f"vlmem {name}",
        description=module.__doc__,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--traceback", action="store_true", help="on an error, show where it came from")
    module.add_arguments(parser)
    experiment = [] if line.config is None else [f"--config={line.config}"]
    args = parser.parse_args(experiment + line.arguments[1:])
    resolve(args, line)
    # grain's worker processes read absl flags and fail where nobody has parsed them
    absl_flags.FLAGS(["vlmem"])
    return module.run(args)


def _command(line: Line) -> tuple[str, types.ModuleType]:
    rows = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="vlmem",
        usage="vlmem <command> [options]",
        description=vlmem_jax.__doc__,
        epilog=f"commands:\n{rows}\n\n`vlmem <command> --help` shows its options and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vlmem {vlmem_jax.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="<command>", help=argparse.SUPPRESS)
    command = parser.parse_args(line.arguments[:1]).command
    return command, importlib.import_module(f"vlmem_jax.cli.{command}")


def _message(error: Exception) -> str | None:
    """The line for the user, or None where the error is a fault of the program."""
    if isinstance(error, ModuleNotFoundError):
        if error.name is None:  # raised by our own code, with its own words
            return str(error)
        package = error.name.partition(".")[0]
        if package not in EXTRAS:
            return None
        return f"this needs the package {package}; install it with: pip install 'vlmem_jax[{EXTRAS[package]}]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__
