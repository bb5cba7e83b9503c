"""Evaluation on JSONL files of prompts: batched, a line for each prompt, and able to go on where it was stopped."""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from vlmem_jax.config import ConfigError
from vlmem_jax.data import DataConfig, Prompt, Prompts
from vlmem_jax.data.benchmarks import BENCHMARKS
from vlmem_jax.data.samples import Key
from vlmem_jax.evals.answers import Answer, answer, random_keys
from vlmem_jax.evals.captions import captions
from vlmem_jax.evals.config import EvalConfig
from vlmem_jax.evals.folder import PARAMETERS, Lines, check_settings, settings
from vlmem_jax.evals.measure import compilations, peak_memory, version
from vlmem_jax.evals.summary import Line, summarise
from vlmem_jax.generate import InvocationConfig, LoadedModel
from vlmem_jax.generate.prompts import like_sized
from vlmem_jax.paths import Mirror, write_whole
from vlmem_jax.processing.video import VideoSize
from vlmem_jax.scoring.rewards import ERROR_HINT, RewardConfig, RewardError, Rewards
from vlmem_jax.types import Sample

SETTINGS, SAMPLES, WITHOUT, SUMMARY = "settings.json", "samples.jsonl", "without_memory.jsonl", "summary.json"
WINDOW = 8
"""Batches whose prompts are read together, so that those of like length can share one."""

Report = Callable[[str, int, int], None]
"""`report(file, done, total)`: how many prompts of a pass have a line."""


def evaluate(
    model: LoadedModel,
    config: EvalConfig,
    output: str | os.PathLike,
    report: Report = lambda file, done, total: None,
) -> dict[str, Any]:
    """Answers all prompts and gives the summary, see `summary.summarise`, with `without_memory` if that was asked for.

    `output`, on a disk or gs://, gets samples.jsonl, without_memory.jsonl and summary.json. Where it has lines of the
    same settings, model and data, only prompts without one are answered. Raises ValueError for others, and for prompts
    that cannot be used.
    """
    passes = {SAMPLES: config.invocation}
    if config.without_memory:
        if model.vlm.speech is None:
            raise ConfigError(
                "--without-memory needs a model whose memory speaks while it answers, but model.memory is "
                f"{model.vlm.config.memory_kind}"
            )
        passes[WITHOUT] = InvocationConfig("never")
    prompts = Prompts(config.data, model.processor, config.benchmark)
    evaluation = _Evaluation(model, config, prompts)
    with Mirror(output, (SETTINGS, SAMPLES, WITHOUT)) as mirror:
        mirror.local.mkdir(parents=True, exist_ok=True)
        depends_on = settings(model, config, prompts)
        check_settings(mirror.local / SETTINGS, depends_on, output)
        found = {name: evaluation.run(name, invocation, mirror, report) for name, invocation in passes.items()}
        kinds = model.vlm.speech.kinds if model.vlm.speech else ()
        mode = "stream" if model.processor.tile.keeps else "offline"
        about = {"version": version(), "parameters": depends_on[PARAMETERS]}
        summary = about | summarise(found[SAMPLES], kinds, config.benchmark, mode)
        if config.benchmark and BENCHMARKS[config.benchmark].captions:
            compared, summary["left_out"] = captions([line for line in found[SAMPLES] if "output" in line])
            summary["benchmark"] |= compared
        if config.without_memory:
            summary["without_memory"] = summarise(found[WITHOUT], kinds, config.benchmark, mode)
        write_whole(mirror.local / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


class _Asked(NamedTuple):
    """A prompt that can be asked."""

    key: Key
    prompt: Prompt
    sample: Sample
    videos: list[VideoSize]


class _Evaluation:
    def __init__(self, model: LoadedModel, config: EvalConfig, prompts: Prompts):
        self.model, self.config, self.prompts = model, config, prompts
        self.rewards = Rewards((RewardConfig(config.reward),), "metric")
        self.generator = model.generator()
        self.rows = min(config.batch_size, sum(prompts.counts))

    def run(self, name: str, invocation: InvocationConfig, mirror: Mirror, report: Report) -> list[Line]:
        """Answers the prompts that have no line in the file `name`, and gives the lines of all."""
        lines, done = Lines(mirror.local / name), set()
        for line in lines.by_name.values():
            if "output" in line or self.config.on_bad_sample == "skip":
                done.add(line["name"])
        keys = [(file, line) for file, count in enumerate(self.prompts.counts) for line in range(count)]
        left = [key for key in keys if self.prompts.name(key) not in done]
        total, to_do = len(keys), len(left)
        report(name, total - to_do, total)
        at_once = WINDOW * self.rows
        windows = (left[first : first + at_once] for first in range(0, len(left), at_once))
        pool = ThreadPoolExecutor(DataConfig().thread_count, thread_name_prefix="prompts")
        try:
            for window in _ahead(pool, self._load, windows):
                asked = []
                for key, future in window:
                    try:
                        asked.append(future.result())
                    except ValueError as error:
                        lines.keep([self._skipped(self.prompts.name(key), str(error))])
                        to_do -= 1
                for chosen in like_sized([one.sample for one in asked], self.rows):
                    lines.keep(self._answered([asked[n] for n in chosen], invocation, pool))
                    to_do -= len(chosen)
                    report(name, total - to_do, total)
                mirror.send()
        finally:
            pool.shutdown(cancel_futures=True)
        return [lines.by_name[self.prompts.name(key)] for key in keys]

    def _load(self, key: Key) -> _Asked:
        """Raises ValueError for a prompt that cannot be asked, or whose answer cannot be judged."""
        prompt = self.prompts[key]
        if prompt.answers:
            self.rewards.check(prompt)
        return _Asked(key, prompt, *self.prompts.shown(key, self.config.rope_dhr))

    def _answered(self, batch: Sequence[_Asked], invocation: InvocationConfig, pool: ThreadPoolExecutor) -> list[Line]:
        """The lines of a batch."""
        config, tokenizer = self.config, self.model.processor.tokenizer
        samples, places = [one.sample for one in batch], [one.key for one in batch]
        with compilations() as compiled:
            start = time.perf_counter()
            keys_B = random_keys(config.sampling.seed, places)
            answers = answer(self.generator, tokenizer, samples, keys_B, config.sampling, invocation, self.rows)
            seconds = time.perf_counter() - start
        cost = {
            "seconds": seconds / len(batch),
            "batch_size": len(batch),
            "compiled": bool(compiled),
            "peak_memory_gb": peak_memory() / 1e9,
        }
        return [self._line(*of, cost) for of in zip(batch, answers, pool.map(self._score, batch, answers), strict=True)]

    def _score(self, asked: _Asked, answer: Answer) -> float | str | None:
        """None where there is nothing to compare with; a text says why it cannot be told."""
        if not asked.prompt.answers and self.rewards.needs_answer:
            return None
        try:
            return self.rewards.score(answer.transcript.text, asked.prompt)
        except RewardError as error:
            return str(error).removesuffix(f"; {ERROR_HINT}")

    def _line(self, asked: _Asked, answer: Answer, score: float | str | None, cost: dict[str, Any]) -> Line:
        """What is kept of an answer."""
        prompt, transcript = asked.prompt, answer.transcript
        if isinstance(score, str):
            return self._skipped(prompt.name, score)
        line = {
            "name": prompt.name,
            "id": prompt.id,
            "source": prompt.source or Path(self.prompts.files[asked.key[0]].path).stem,
            "output": transcript.text,
            "score": score,
            "answers": prompt.answers,
            "tokens": transcript.chosen,
            "stopped": answer.stopped,
        }
        if asked.videos:
            line["frames"] = sum(video.frames for video in asked.videos)
            line["length"] = sum(video.length for video in asked.videos)
        return line | ({"memories": transcript.called} if self.model.vlm.speech else {}) | cost

    def _skipped(self, name: str, error: str) -> Line:
        """The line of a prompt that is left out. Raises ValueError where that is not wanted."""
        if self.config.on_bad_sample == "raise":
            raise ValueError(f"{error}; --on-bad-sample skip leaves such prompts out and counts them")
        return {"name": name, "error": error}


def _ahead(
    pool: ThreadPoolExecutor, load: Callable[[Key], _Asked], windows: Iterator[list[Key]]
) -> Iterator[list[tuple[Key, Future[_Asked]]]]:
    """Each window as it is being loaded, with the next one behind it."""
    started = ([(key, pool.submit(load, key)) for key in window] for window in windows)
    for window, _ in itertools.pairwise(itertools.chain(started, [[]])):
        yield window
