"""The model that is trained, as a play asks it; and who scores what it answers."""

import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from vlmem_jax.data import Prompt
from vlmem_jax.generate import Generator, InvocationConfig
from vlmem_jax.generate.pools import Pool
from vlmem_jax.processing import Tokenizer
from vlmem_jax.rl.config import RLConfig
from vlmem_jax.rl.episodes import Step
from vlmem_jax.rl.rollout import MayStop, never, rollouts
from vlmem_jax.rl.stream import Loaded
from vlmem_jax.runtime import hosts
from vlmem_jax.scoring.rewards import RewardError, Rewards
from vlmem_jax.types import Sample

ASKED = 1.0
"""Seconds until those who wait for rewards ask whether the run is to stop."""


class Judge:
    """The rewards of a run, on threads."""

    def __init__(self, config: RLConfig, rewards: Rewards, tokenizer: Tokenizer):
        self._config, self._rewards, self._tokenizer = config, rewards, tokenizer
        self._pool = ThreadPoolExecutor(config.reward_threads, thread_name_prefix="rewards")

    def submit(self, step: Step, prompt: Prompt) -> Future:
        """Goes to score an answer: of its score, and whether a reward failed."""
        return self._pool.submit(self._score, step, prompt)

    def _score(self, step: Step, prompt: Prompt) -> tuple[float, bool]:
        try:
            return self._rewards.score(self._tokenizer.decode(step.output_T), prompt), False
        except RewardError:
            if self._config.on_reward_error == "raise":
                raise
            return 0.0, True

    def close(self) -> None:
        """Ends its threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Scores:
    """Scores of outputs, computed by threads while more is drawn, each on one host."""

    def __init__(self, futures: dict[int, Future], may_stop: MayStop = never):
        """`futures`: number of the output -> its score and whether a reward failed, of those of this host; `may_stop`
        is called while they are waited for."""
        self._futures, self._may_stop = futures, may_stop

    @functools.cached_property
    def _all(self) -> list[tuple[float, bool]]:
        waiting = True
        while waiting:
            self._may_stop()
            done, left = wait(self._futures.values(), ASKED, FIRST_EXCEPTION)
            cause = next((error for future in done if (error := future.exception())), None)
            told = _gather({"error": _words(cause), "waiting": bool(left)})
            if errors := [host["error"] for host in told if host["error"]]:
                raise RewardError(errors[0]) from cause
            waiting = any(host["waiting"] for host in told)
        each = _gather({number: future.result() for number, future in self._futures.items()})
        found = {int(number): tuple(score) for scores in each for number, score in scores.items()}
        return [found[number] for number in range(len(found))]

    @property
    def of_all(self) -> np.ndarray:
        """Of all outputs, in order. Raises RewardError on every host where a reward failed on one."""
        return np.array([score for score, _ in self._all])

    @property
    def failed(self) -> int:
        """Outputs for which a reward failed."""
        return sum(failed for _, failed in self._all)


def _words(error: BaseException | None) -> str:
    if error is None or isinstance(error, RewardError):
        return str(error or "")
    return f"a reward raised {type(error).__name__}: {error}"


def _gather(told: Any) -> list[Any]:
    """What each host tells, ready for JSON."""
    return [json.loads(content) for content in hosts.gather(json.dumps(told).encode())]


class Actor:
    """The policy as it is at the start of a phase: what a play plays with."""

    def __init__(self, generator: Generator, config: RLConfig, judge: Judge, may_stop: MayStop = never):
        self.generator, self.config, self.judge, self._may_stop = generator, config, judge, may_stop

    def draw(
        self,
        prompts: Sequence[Sample],
        keys_PG: Array,
        invocation: InvocationConfig = InvocationConfig(),
        forced: Sequence[Sequence[Sequence[int]]] = (),
        greedy: bool = False,
        record: bool = False,
        done: Callable[[int, list[Step]], None] = lambda n, group: None,
    ) -> list[list[Step]]:
        """G answers to each prompt, see `rollouts`; `done` is called with the number of a prompt and its answers as
        they come."""
        sampling, rows, groups = self.config.sampling(greedy), self.config.rollout_rows, {}
        with self.generator.context():
            drawn = rollouts(
                self.generator, prompts, sampling, keys_PG, rows, invocation, forced, record, self._may_stop
            )
            for n, group in drawn:
                groups[n] = group
                done(n, group)
        return [groups[n] for n in range(len(prompts))]

    def answer(
        self,
        prompts: Sequence[Loaded],
        keys_PG: Array,
        invocation: InvocationConfig = InvocationConfig(),
        forced: Sequence[Sequence[Sequence[int]]] = (),
        greedy: bool = False,
        record: bool = False,
    ) -> tuple[list[list[Step]], Scores]:
        """The same, and the scores of all answers: those of one group are computed beside the next."""
        G, futures = keys_PG.shape[1], {}

        def score(n: int, group: list[Step]) -> None:
            for number, step in enumerate(group, n * G):
                if number % jax.process_count() == jax.process_index():
                    futures[number] = self.judge.submit(step, prompts[n].prompt)

        samples = [one.sample for one in prompts]
        groups = self.draw(samples, keys_PG, invocation, forced, greedy, record, score)
        return groups, Scores(futures, self._may_stop)

    def decide(self, prompts: Sequence[Sample], keys_N: Array, labels: Sequence[int], weight: float) -> list[Step]:
        """One of the labels behind each prompt, drawn by their probabilities among each other, as a step of this
        weight."""
        self._may_stop()
        with self.generator.context():
            logp_NK = Pool(self.generator, 1).score(prompts, labels)
            chosen_N = np.asarray(jax.vmap(jax.random.categorical)(keys_N, logp_NK))
        drawn = [(np.array([labels[k]], np.int32), logp_NK[n, [k]]) for n, k in enumerate(chosen_N)]
        return [
            Step(prompt, *arrays_T, np.ones(1, bool), stopped=False, weight=weight)
            for prompt, arrays_T in zip(prompts, drawn, strict=True)
        ]
