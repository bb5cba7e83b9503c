"""Pack plans that outlive a run: made and written by host 0, read again where data and config are the same."""

import dataclasses
import hashlib
import json
import os
import time
import zlib
from typing import Any

import jax

from vlmem_jax.data.plan import Plan
from vlmem_jax.paths import AnyPath, as_path, write_whole
from vlmem_jax.runtime import hosts

VERSION = 2
"""Of the file and of the way to pack: a change of either makes older files of no use."""
_KEYS = (
    "pack_tokens", "pack_tiles", "max_sample_tokens", "open_packs", "on_bad_sample", "mask_text_only", "min_frames",
    "max_frames",
)  # fmt: skip
"""Of `data`, those that a plan depends on."""


def store(plan: Plan, folder: str | os.PathLike, rows: int | None = None) -> str:
    """Brings a new `plan` to `rows` rows (None: all) from its file in `folder`, which is written if it falls short.

    Of several hosts the first alone reads and writes the folder, and each measures a part of the samples. Gives a line
    that says what was done and why. Raises ValueError for what `Plan.extend` refuses and, on all hosts, if they do not
    see the same data and config; OSError if the file cannot be written.
    """
    config, content = _config(plan), _content(plan)
    hosts.require_same("hosts must have the same data files and tokenizer", content)
    hosts.require_same("hosts must run the same config", config)
    file = as_path(folder) / f"{_digest(config)[:16]}.plan"
    plan.samples.plan_file = str(file)
    reason = _load(plan, file, content)
    before, start = len(plan), time.perf_counter()
    if reason is None and plan.covers(rows):
        again = f", and leaves out what was skipped then; remove it to look at {len(plan.skipped)} samples again"
        return f"the pack plan is that of {file}" + again * bool(plan.skipped)
    plan.extend(rows, together=True)
    seconds = time.perf_counter() - start
    error = ""
    if jax.process_index() == 0:
        try:
            write_whole(file, _frame(content, plan.dump()))
        except OSError as problem:  # the others must not go on alone
            error = f"the pack plan cannot be kept in {file}: {problem.strerror or problem}"
    if error := hosts.broadcast(error.encode()).decode():
        raise OSError(error)
    return f"the pack plan was made in {seconds:.1f} s and kept in {file}: {reason or f'it had {before} rows'}"


def _load(plan: Plan, file: AnyPath, content: dict[str, str]) -> str | None:
    """Restores the plan, on all hosts, from the file that host 0 finds, or says why not."""
    reason, stored = _read(file, content) if jax.process_index() == 0 else (None, b"")
    reason, stored = _unframe(hosts.broadcast(_frame(reason, stored)))
    if reason is None:
        plan.restore(stored)
    return reason


def _read(file: AnyPath, content: dict[str, str]) -> tuple[str | None, bytes]:
    """Why the file is of no use, or what it holds."""
    try:
        old, stored = _unframe(file.read_bytes())
        changed = [name for name in content if old.get(name) != content[name]]
    except FileNotFoundError:
        return "there was none for these data and this config", b""
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"what was kept cannot be read, {error}", b""
    if changed:
        names = ", ".join(changed)
        return f"{names} changed, so a run that goes on from before may see samples twice or not at all", b""
    return None, stored


def _config(plan: Plan) -> dict[str, Any]:
    """What the config says of the plan."""
    samples, processor = plan.samples, plan.samples.processor
    return {
        "version": VERSION,
        "data": {key: getattr(plan.config, key) for key in _KEYS},
        "sources": [dataclasses.asdict(source) for source in samples.sources],
        "image": dataclasses.asdict(processor.image),
        "text": [processor.system, processor.template.system, processor.template.start],
        "tile": list(processor.tile),
        "whole": processor.whole,
        "seed": samples.seed,
    }


def _content(plan: Plan) -> dict[str, str]:
    """Digests of the files that the plan is made from. Images are not among them: `Samples.load` checks each."""
    stores = filter(None, plan.samples.stores)
    return {file.path: file.digest for file in (*plan.samples.files, *stores)} | {
        "the tokenizer": plan.samples.processor.tokenizer.digest()
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _frame(head: Any, content: bytes) -> bytes:
    """A line of JSON, then `content`."""
    return json.dumps([head, zlib.crc32(content)]).encode() + b"\n" + content


def _unframe(framed: bytes) -> tuple[Any, bytes]:
    line, _, content = framed.partition(b"\n")
    head, checksum = json.loads(line)
    if zlib.crc32(content) != checksum:
        raise ValueError("the file is damaged")
    return head, content
