"""Phases of rollouts: what each gives to learn from, part by part, and the weight of the KL penalty."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vlmem_jax.rl.advantages import group_advantages, varied
from vlmem_jax.rl.config import RLConfig
from vlmem_jax.rl.episodes import Lesson, Played
from vlmem_jax.rl.stream import Loaded


class Phases:
    """Where a stage is in its phases. All of it outlives a restart."""

    def __init__(self, config: RLConfig):
        self._config = config
        self.number = -1
        """Of the phase whose lessons these are."""
        self.lessons: list[Lesson] = []
        self.numbers: dict[str, float] = {}
        """What is recorded of the phase."""
        self.beta = config.kl
        """Weight of the KL penalty."""
        self._kl, self._kl_tokens = 0.0, 0

    def begin(self) -> None:
        """Leaves the lessons of the phase before, whose KL decides on beta, see `RLConfig.adaptive_kl`. What is broken
        off after that can be begun again."""
        config = self._config
        self.lessons, self.number = [], -1
        if config.adaptive_kl and self._kl_tokens:
            measured = self._kl / self._kl_tokens
            self.beta *= 1.5 if measured > 1.5 * config.kl_target else 1.0
            self.beta /= 1.5 if measured < config.kl_target / 1.5 else 1.0
        self._kl, self._kl_tokens = 0.0, 0

    def learn_from(self, number: int, prompts: Sequence[Loaded], played: Played, seconds: float, skipped: int) -> None:
        """Keeps what can be learned, and what is recorded, of a phase's episodes that took so long; `skipped` prompts
        could not be used so far. Raises ValueError where groups are to tie by a part that rewards have not."""
        config, groups = self._config, played.groups
        rewards_PG = np.array([[episode.reward for episode in group] for group in groups])
        varied_P = varied(_part(played, config.ties_by) if config.ties_by else rewards_PG)
        spread = config.advantage_std, config.advantage_eps, config.advantage_ddof, config.advantage_min_std
        advantages_PG = np.where(varied_P[:, None], group_advantages(rewards_PG, *spread), 0.0)
        self.lessons = [
            Lesson(one.key, episode.steps, float(advantage))
            for one, group, advantages, differs in zip(prompts, groups, advantages_PG, varied_P, strict=True)
            if differs or not config.drop_zero_variance
            for episode, advantage in zip(group, advantages, strict=True)
        ]
        self.number = number
        steps = [step for group in groups for episode in group for step in episode.steps]
        tokens = sum(len(step.tokens_T) for step in steps)
        self.numbers = {
            **_of_parts(played),
            "score/errors": float(played.failed),
            "rollout/zero_variance_groups": float((~varied_P).sum()),
            "rollout/tokens": tokens / len(steps),
            "rollout/cut_off": float(np.mean([not step.stopped for step in steps])),
            "rollout/tokens_per_s": tokens / seconds,
            "rollout/seconds": seconds,
            "prompts/skipped": float(skipped),
            **played.numbers,
            **({"beta": self.beta} if config.adaptive_kl else {}),
        }

    def part(self, number: int) -> list[Lesson]:
        """The lessons of a minibatch."""
        chosen = np.array_split(np.arange(len(self.lessons)), self._config.minibatches)[number]
        return [self.lessons[n] for n in chosen]

    def measured(self, kl: float, tokens: int) -> None:
        """Counts the KL, a sum over tokens, of a part that was not learned from before."""
        self._kl += kl
        self._kl_tokens += tokens

    def state(self) -> dict:
        """For JSON, without the lessons."""
        return {
            "phase": self.number,
            "beta": self.beta,
            "kl": [self._kl, self._kl_tokens],
            "numbers": self.numbers,
        }

    def restore(self, state: dict, lessons: list[Lesson] | None) -> None:
        """Goes on from a state that `state` gave: with the lessons that were left, None: with the next phase."""
        self.beta, (self._kl, self._kl_tokens), self.numbers = state["beta"], state["kl"], state["numbers"]
        if lessons is not None:
            self.lessons, self.number = lessons, state["phase"]


def _part(played: Played, name: str) -> Float[np.ndarray, "P G"]:
    """A part of all rewards. Raises ValueError if there is none of this name."""
    known = played.groups[0][0].parts
    if name not in known:
        raise ValueError(f"task.ties_by must name a part of the reward, one of {', '.join(known)}; got {name!r}")
    return np.array([[episode.parts[name] for episode in group] for group in played.groups])


def _of_parts(played: Played) -> dict[str, float]:
    """Mean, and mean deviation within groups, of each part of the reward."""
    numbers = {}
    for name in played.groups[0][0].parts:
        parts_PG = _part(played, name)
        numbers |= {f"{name}/mean": float(parts_PG.mean()), f"{name}/std": float(parts_PG.std(axis=1).mean())}
    return numbers
