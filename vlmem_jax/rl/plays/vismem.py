"""What VisMem is trained by (arXiv 2511.11007): answers, against those without memory, or of the other kind."""

import dataclasses
import math
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from vlmem_jax.config import ConfigError
from vlmem_jax.generate import InvocationConfig
from vlmem_jax.hub.convert import released
from vlmem_jax.models import VLM
from vlmem_jax.rl.actor import Actor
from vlmem_jax.rl.config import rl_config
from vlmem_jax.rl.episodes import Played, Step
from vlmem_jax.rl.plays.penalties import invocation_reward, negative_penalty, type_penalty
from vlmem_jax.rl.plays.text import Answers, episodes
from vlmem_jax.rl.stream import Loaded
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.run import checkpoint_of
from vlmem_jax.train.stages import changed
from vlmem_jax.trees import flatten


class WithMemories(Answers):
    """Answers with memories; the reward is what they gain over answers without, less the penalties of memories."""

    def __init__(self, experiment: Experiment, stage: StageConfig, model: VLM):
        super().__init__(experiment, stage, model)
        self._seeds = experiment.seed, zlib.crc32(stage.name.encode())

    @staticmethod
    def check(experiment: Experiment, stage: StageConfig) -> None:
        """Raises ConfigError where calls for memories are to be taught that no stage has formed."""
        Answers.check(experiment, stage)
        if rl_config(stage).invocation_penalty is not None and not _has_formed(experiment, stage):
            raise ConfigError(
                f"config.stages.{stage.name}.task.invocation_penalty teaches when to call for memories, but none have "
                "been formed yet: train a stage that forms them before, or set init to a checkpoint of one"
            )

    def play(self, actor: Actor, prompts: Sequence[Loaded], keys_PG: Array, phase: int) -> Played:
        """See `Play.play`, and `invocation_reward`."""
        if not any(self.config.invocation.heeded(self.model.speech)):
            return super().play(actor, prompts, keys_PG, phase)
        config, (P, G) = self.config, keys_PG.shape
        invocation = self.invocation(phase * config.steps)
        groups, scores = actor.answer(prompts, keys_PG, invocation, record=True)
        spoken_PG = [[step.invocations for step in group] for group in groups]
        invoked_PG = np.array([[bool(spoken) for spoken in row] for row in spoken_PG])
        kinds = [memory.kind for row in spoken_PG for spoken in row for memory in spoken]
        numbers = {
            "memory/per_answer": len(kinds) / (P * G),
            "memory/answers": float(invoked_PG.mean()),
            "memory/long": float(np.mean(kinds)) if kinds else 0.0,
        }
        base_PG, base, turned_over = np.zeros((P, 1)), None, None
        if config.base:
            with actor.generator.context():
                base_keys_PG = keys_PG if config.paired_base else keys_PG[:, :1]
            base = actor.answer(prompts, base_keys_PG, InvocationConfig("never"))[1]
        chosen_Pg = self.drawn_again(phase, P)
        if np.take_along_axis(invoked_PG, chosen_Pg, axis=1).any():
            # up to its first call an answer stays as it was; one without any stays so to its end
            begun = [[_until_first_call(groups[n][g]) for g in row] for n, row in enumerate(chosen_Pg)]
            turned = dataclasses.replace(invocation, reverse_types=not invocation.reverse_types)
            with actor.generator.context():
                turned_keys_Pg = keys_PG[np.arange(P)[:, None], chosen_Pg]
            turned_over = actor.answer(prompts, turned_keys_Pg, turned, begun)[1]
        scores_PG = scores.of_all.reshape(P, G)
        if base:
            base_PG = base.of_all.reshape(P, -1)
            numbers |= {"score/base": float(base_PG.mean()), "score/gain": float(scores_PG.mean() - base_PG.mean())}
        if config.invocation_penalty is None:
            return Played(episodes(groups, scores_PG - base_PG, scores_PG), scores.failed, numbers)
        reversed_PG = scores_PG.copy()
        if turned_over:
            np.put_along_axis(reversed_PG, chosen_Pg, turned_over.of_all.reshape(P, -1), axis=1)
        numbers |= {
            "penalty/type": float(type_penalty(scores_PG, reversed_PG, invoked_PG).mean()),
            "penalty/negative": float(negative_penalty(scores_PG, invoked_PG).mean()),
        }
        rewards_PG = invocation_reward(scores_PG, base_PG, reversed_PG, invoked_PG, config.invocation_penalty)
        return Played(episodes(groups, rewards_PG, scores_PG), scores.failed, numbers)

    def drawn_again(self, phase: int, prompts: int) -> Int[np.ndarray, "P g"]:
        """Which answers of each group are drawn again with kinds reversed, if they have a memory; by chance."""
        config, G = self.config, self.config.group_size
        count = 0 if config.invocation_penalty is None else math.ceil(config.rev_fraction * G - 1e-9)
        rng = np.random.default_rng([*self._seeds, phase])
        order_PG = rng.permuted(np.tile(np.arange(G), (prompts, 1)), axis=1)
        return np.sort(order_PG[:, :count], axis=1)


def _until_first_call(step: Step) -> list[int]:
    end = step.invocations[0].place if step.invocations else None
    return step.tokens_T[:end].tolist()


def _has_formed(experiment: Experiment, stage: StageConfig) -> bool:
    """Whether a stage before trains the memory, or the run starts from a checkpoint with one."""
    before = experiment.stages[: experiment.stages.index(stage)]
    paths = list(flatten(VLM(experiment.model).abstract()))
    if before and any(path.startswith("memory/") for path in changed(experiment, before[-1], paths)):
        return True
    if experiment.init is None:
        return False
    return checkpoint_of(experiment.init) is not None or released(experiment.init).model.memory is not None
