"""Single answers: an episode is one answer to one prompt, and its reward the score of the answer."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from vlmem_jax.config import ConfigError
from vlmem_jax.generate import InvocationConfig
from vlmem_jax.models import VLM
from vlmem_jax.rl.actor import Actor
from vlmem_jax.rl.config import rl_config
from vlmem_jax.rl.episodes import Episode, Played, Step
from vlmem_jax.rl.stream import Loaded
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.types import Sample


class Answers:
    """The play of models without a memory that is trained by reward."""

    labels: tuple[int, ...] = ()

    def __init__(self, experiment: Experiment, stage: StageConfig, model: VLM):
        self.config, self.model, self._steps = rl_config(stage), model, stage.steps

    @staticmethod
    def check(experiment: Experiment, stage: StageConfig) -> None:
        """Raises ConfigError for keys of a memory that speaks where there is none."""
        config, model = rl_config(stage), experiment.model
        of_memory = config.invocation != InvocationConfig(), config.invocation_penalty is not None, config.paired_base
        if VLM(model).speech is None and any(of_memory):
            raise ConfigError(
                f"config.stages.{stage.name}.task.invocation, invocation_penalty and paired_base are for a memory that "
                f"speaks; model.memory is {model.memory_kind}"
            )

    def play(self, actor: Actor, prompts: Sequence[Loaded], keys_PG: Array, phase: int) -> Played:
        """See `Play.play`."""
        groups, scores = actor.answer(prompts, keys_PG, self.invocation(phase * self.config.steps), record=True)
        scores_PG = scores.of_all.reshape(keys_PG.shape)
        return Played(episodes(groups, scores_PG, scores_PG), scores.failed)

    def evaluate(self, actor: Actor, prompts: Sequence[Loaded], keys_P1: Array, step: int) -> Float[np.ndarray, "P"]:
        """See `Play.evaluate`."""
        return actor.answer(prompts, keys_P1, self.invocation(step), greedy=True)[1].of_all

    def prompt(self, loaded: Loaded, before: Sequence[Step]) -> Sample:
        """The prompt itself."""
        return loaded.sample

    def invocation(self, step: int) -> InvocationConfig:
        """Who calls for memories at a step of the stage."""
        early = step < self.config.anywhere_from * self._steps
        return dataclasses.replace(self.config.invocation, anywhere=0.0) if early else self.config.invocation


def episodes(
    groups: Sequence[Sequence[Step]], rewards_PG: Float[np.ndarray, "P G"], scores_PG: Float[np.ndarray, "P G"]
) -> list[list[Episode]]:
    """Groups of episodes of one answer each."""
    return [
        [Episode((step,), float(reward), {"score": float(score)}) for step, reward, score in zip(*row, strict=True)]
        for row in zip(groups, rewards_PG, scores_PG, strict=True)
    ]
