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
from vlmem_jax.evals.answers import Answer, Answering, random_keys
from vlmem_jax.evals.captions import captions
from vlmem_jax.evals.config import EvalConfig
from vlmem_jax.evals.folder import PARAMETERS, Lines, check_settings, settings
from vlmem_jax.evals.measure import compilations, peak_memory, version
from vlmem_jax.evals.summary import Line, summarise
from vlmem_jax.generate import InvocationConfig, LoadedModel
from vlmem_jax.generate.requests import Handle
from vlmem_jax.paths import Mirror, write_whole
from vlmem_jax.processing.video import VideoSize
from vlmem_jax.scoring.rewards import ERROR_HINT, RewardConfig, RewardError, Rewards
from vlmem_jax.types import Sample

SETTINGS, SAMPLES, WITHOUT, SUMMARY = "settings.json", "samples.jsonl", "without_memory.jsonl", "summary.json"
WINDOW = 8
"""Times as many prompts as are answered side by side are read ahead, so that no row waits for them."""

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
        self.rows = min(config.batch_size, sum(prompts.counts))
        self.answering = Answering(model.generator(), model.processor.tokenizer, self.rows)

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
        live: dict[Handle, _Asked] = {}

        def answered(most: int) -> None:
            """Keeps lines until at most so many prompts are left on their way."""
            nonlocal to_do
            while len(live) > most:
                for line in self._answered(live, pool):
                    lines.keep([line])
                    to_do -= 1
                    report(name, total - to_do, total)

        try:
            for window in _ahead(pool, self._load, windows):
                asked = []
                for key, future in window:
                    try:
                        asked.append(future.result())
                    except ValueError as error:
                        lines.keep([self._skipped(self.prompts.name(key), str(error))])
                        to_do -= 1
                if asked:
                    live |= zip(self._submit(asked, invocation), asked, strict=True)
                answered(self.rows)
                mirror.send()
            answered(0)
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

    def _submit(self, asked: Sequence[_Asked], invocation: InvocationConfig) -> list[Handle]:
        keys_N = random_keys(self.config.sampling.seed, [one.key for one in asked])
        how = [self.config.sampling] * len(asked)
        return self.answering.submit([one.sample for one in asked], keys_N, how, invocation)

    def _answered(self, live: dict[Handle, _Asked], pool: ThreadPoolExecutor) -> list[Line]:
        """The lines of those that are answered next, which leave `live`."""
        start, done = time.perf_counter(), []
        with compilations() as compiled:
            while not done:
                self.answering.step()
                done = [handle for handle in live if handle.reason]
        cost = {
            "seconds": (time.perf_counter() - start) / len(done),
            "batch_size": self.rows,
            "compiled": bool(compiled),
            "peak_memory_gb": peak_memory() / 1e9,
        }
        return list(pool.map(lambda handle: self._line(live.pop(handle), handle, cost), done))

    def _score(self, asked: _Asked, answer: Answer) -> float | str | None:
        """None where there is nothing to compare with; a text says why it cannot be told."""
        if not asked.prompt.answers and self.rewards.needs_answer:
            return None
        try:
            return self.rewards.score(answer.transcript.text, asked.prompt)
        except RewardError as error:
            return str(error).removesuffix(f"; {ERROR_HINT}")

    def _line(self, asked: _Asked, handle: Handle, cost: dict[str, Any]) -> Line:
        """What is kept of an answer."""
        prompt = asked.prompt
        try:
            answer = self.answering.answer(handle)
        except ValueError as error:
            return self._skipped(prompt.name, str(error))
        transcript, score = answer.transcript, self._score(asked, answer)
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
