"""Training data as VLM-3R (arXiv 2505.20279) and LLaVA-Video list them: JSON files in YAML, and how much of each.

datasets:
  - json_path: vsibench_train/merged_qa_scannet_train.json
    sampling_strategy: random:10%
"""

import math
import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml

from vlmem_jax.data.convert import Origin
from vlmem_jax.data.forms import check_object, short
from vlmem_jax.data.values import values
from vlmem_jax.processing import chat, media

_STRATEGY = re.compile(r"(first|end|random):([0-9]+)(%?)")
_RULE = "all, or first:n, end:n or random:n with a count or up to 100% of at least 1"


class VLM3R(Origin):
    """The records of all files that a YAML file lists. A record becomes a line whose `source` is its question type."""

    def __init__(self, root: str = "", follow_links: bool = False, seed: int = 0):
        """`root`: the folder that paths of JSON files start from and must stay in, by default that of the YAML file;
        `follow_links`: links below it may lead out of it; `seed`: of what `random` takes."""
        self.root, self.follow_links, self.seed = root, follow_links, seed
        self.taken: list[str] = []
        """What was taken of each file, ready to print."""

    def values(self, source: str | os.PathLike) -> Iterator[tuple[str, Any]]:
        """Raises ValueError, naming file and key, for a list of files that cannot be followed."""
        root = self.root or os.path.dirname(source) or "."
        for number, (path, strategy) in enumerate(_datasets(source)):
            try:
                file = media.resolve(root, path, self.follow_links)
                media.check_file(file, "data file")
            except ValueError as error:
                raise ValueError(f"{source}: datasets.{number}.json_path: {error}") from error
            found = list(values(file))
            chosen = _chosen(strategy, len(found), np.random.default_rng([self.seed, number]))
            self.taken.append(f"{path}: {len(chosen)} of {len(found)} records ({strategy})")
            yield from (found[place] for place in chosen)

    def line(self, value: Any) -> dict[str, Any]:
        """Raises ValueError for a record that is no question about one video, answered."""
        check_object(value)
        video, turns = value.get("video"), value.get("conversations")
        if not isinstance(video, str) or not video or _leads_out(video):
            raise ValueError(f"`video` must be a path below the folder of all videos, got {short(video)}")
        chat.read_conversation(turns, videos=[video])
        about = {"id": value.get("id"), "source": value.get("question_type"), "dataset": value.get("data_source")}
        return about | {"video": video, "conversations": list(map(_marked, turns))}


def _datasets(source: str | os.PathLike) -> list[tuple[str, str]]:
    """Path and sampling strategy of each file."""
    with open(source, encoding="utf-8") as file:
        try:
            listed = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f":{mark.line + 1}" if mark else ""
            raise ValueError(
                f"{source}{where}: a list of data must be YAML; {getattr(error, 'problem', error)}"
            ) from error
    datasets = listed.get("datasets") if isinstance(listed, dict) else None
    if not isinstance(datasets, list) or not datasets:
        raise ValueError(
            f"{source}: `datasets` must be a list of {{json_path, sampling_strategy}}, got {short(datasets)}"
        )
    found = []
    for number, dataset in enumerate(datasets):
        where = f"{source}: datasets.{number}"
        if not isinstance(dataset, dict) or not isinstance(dataset.get("json_path"), str):
            raise ValueError(f"{where} must have a text `json_path`, got {short(dataset)}")
        if unknown := dataset.keys() - {"json_path", "sampling_strategy"}:
            raise ValueError(
                f"{where} may have json_path and sampling_strategy alone, got {short(min(unknown, key=str))}"
            )
        strategy = dataset.get("sampling_strategy", "all")
        parts = _STRATEGY.fullmatch(strategy) if isinstance(strategy, str) else None
        if strategy != "all" and not (parts and 1 <= int(parts[2]) <= (100 if parts[3] else math.inf)):
            raise ValueError(f"{where}.sampling_strategy must be {_RULE}; got {short(strategy)}")
        found.append((dataset["json_path"], strategy))
    return found


def _chosen(strategy: str, count: int, rng: np.random.Generator) -> list[int]:
    """Which of `count` records a strategy takes, in their order."""
    parts = _STRATEGY.fullmatch(strategy)
    if parts is None:
        return list(range(count))
    share = int(parts[2])
    wanted = min(-(-share * count // 100) if parts[3] else share, count)
    if parts[1] == "random":
        return sorted(rng.permutation(count)[:wanted].tolist())
    return list(range(count)[:wanted] if parts[1] == "first" else range(count - wanted, count))


def _marked(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose question marks the video as one."""
    if turn["from"] != "human" or not isinstance(turn["value"], str):
        return turn
    return turn | {"value": turn["value"].replace(chat.IMAGE_MARKER, chat.VIDEO_MARKER)}


def _leads_out(path: str) -> bool:
    return posixpath.isabs(path) or posixpath.normpath(path).startswith("..") or "://" in path
