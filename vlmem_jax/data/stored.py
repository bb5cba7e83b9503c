"""Pack plans that outlive a run: made and written by host 0, read again where data and config are the same."""

import dataclasses
import hashlib
import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmem_jax.data.plan import Plan

VERSION = 1
"""Of the file and of the way to pack: a change of either makes older files of no use."""
_KEYS = (
    "pack_tokens", "pack_tiles", "max_sample_tokens", "open_packs", "on_bad_sample", "mask_text_only", "min_frames",
    "max_frames",
)  # fmt: skip
"""Of `data`, those that a plan depends on."""


def store(plan: Plan, folder: str | os.PathLike, rows: int | None = None) -> str:
    """Brings a new `plan` to `rows` rows (None: all) from its file in `folder`, which is written if it falls short.

    Of several hosts, the first alone touches the folder and measures samples; the others get the plan from it. Gives
    a line that says what was done and why. Raises ValueError for what `Plan.extend` refuses, and on all hosts if they
    do not see the same data and config.
    """
    config, content = _config(plan), _content(plan)
    file = Path(folder) / f"{_digest(config)[:16]}.npz"
    plan.samples.plan_file = str(file)
    if jax.process_count() == 1:
        return _load_or_make(plan, file, content, rows)
    with jax.transfer_guard("allow"):  # jax takes what hosts tell each other for implicit transfers
        return _load_or_receive(plan, file, config, content, rows)


def _load_or_receive(plan: Plan, file: Path, config: dict[str, Any], content: dict[str, str], rows: int | None) -> str:
    _check_hosts(config, content)
    if jax.process_index():
        (error, line), stored = _unframe(_broadcast(b""))
    else:
        try:
            line = _load_or_make(plan, file, content, rows)
        except (ValueError, OSError) as reason:  # the others must not wait for a plan that will not come
            _broadcast(_frame([str(reason), ""], b""))
            raise
        _broadcast(_frame(["", line], plan.dump()))
        return line
    if error:
        raise ValueError(error)
    plan.restore(stored)
    return line


def _load_or_make(plan: Plan, file: Path, content: dict[str, str], rows: int | None) -> str:
    reason = _load(plan, file, content)
    if reason is None and plan.covers(rows):
        return f"the pack plan is that of {file}"
    before, start = len(plan), time.perf_counter()
    plan.extend(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_bytes(_frame(content, plan.dump()))
    os.replace(unfinished, file)
    done = f"made in {time.perf_counter() - start:.1f} s and kept in {file}"
    return f"the pack plan was {done}" + (f": {reason}" if reason else f": it had {before} rows")


def _load(plan: Plan, file: Path, content: dict[str, str]) -> str | None:
    """Restores the plan from its file, or says why not."""
    try:
        old, stored = _unframe(file.read_bytes())
        changed = [name for name in content if old.get(name) != content[name]]
        if changed:
            return (
                f"{', '.join(changed)} changed since it was last made, so a run that goes on from before may see "
                "samples twice or not at all"
            )
        plan.restore(stored)
    except FileNotFoundError:
        return "there was none for these data and this config"
    except ValueError as error:
        return f"what was kept cannot be read, {error}"
    return None


def _config(plan: Plan) -> dict[str, Any]:
    """What the config says of the plan."""
    samples, processor = plan.samples, plan.samples.processor
    return {
        "version": VERSION,
        "data": {key: getattr(plan.config, key) for key in _KEYS},
        "sources": [dataclasses.asdict(source) for source in samples.sources],
        "image": dataclasses.asdict(processor.image),
        "text": [processor.system, processor.template.system, processor.template.start],
        "tokens_per_side": processor.tokens_per_side,
        "seed": samples.seed,
    }


def _content(plan: Plan) -> dict[str, str]:
    """Digests of the files that the plan is made from. Images are not among them: `Samples.load` checks each."""
    return {file.path: file.digest for file in plan.samples.files} | {
        "the tokenizer": plan.samples.processor.tokenizer.digest()
    }


def _check_hosts(config: dict[str, Any], content: dict[str, str]) -> None:
    """Raises ValueError on every host, naming the hosts, if they do not agree."""
    parts = {"config": json.dumps(config, sort_keys=True), "files": json.dumps(sorted(content))}
    _compare(parts, "hosts must run the same config, but")
    _compare(content, "hosts must see the same data files, but")


def _compare(parts: dict[str, str], rule: str) -> None:
    mine = np.array([zlib.crc32(text.encode()) for text in parts.values()], np.uint32)
    every = multihost_utils.process_allgather(mine)
    hosts, places = np.nonzero(every != every[0])
    if len(hosts):
        names = list(parts)
        what = "; ".join(
            f"{names[p]} of host {h}" for h, p in zip(hosts[:8].tolist(), places[:8].tolist(), strict=True)
        )
        raise ValueError(f"{rule} not as on host 0: {what} (this is host {jax.process_index()})")


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


def _broadcast(content: bytes) -> bytes:
    """Host 0's bytes, on every host."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    buffer = np.zeros(length, np.uint8) if jax.process_index() else np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()
