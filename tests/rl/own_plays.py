"""Plays of one's own, named in the configs of tests as `tests.rl.own_plays:...`."""

import dataclasses

import jax
import numpy as np

from vlmem_jax.generate import Invocation
from vlmem_jax.rl.config import rl_config
from vlmem_jax.rl.episodes import Episode, Played, Step

DECISIONS, TURNS = 3, 2


class Base:
    labels = ()

    def __init__(self, experiment, stage, model):
        self.config = rl_config(stage)

    def play(self, actor, prompts, keys_PG, phase):
        P, G = keys_PG.shape
        with actor.generator.context():
            keys_ES = jax.vmap(lambda key: jax.random.split(key, self.count))(keys_PG.reshape(-1))
        owners = [one for one in prompts for _ in range(G)]
        episodes = [[] for _ in owners]
        for turn in range(self.count):
            behind = [self.prompt(one, steps) for one, steps in zip(owners, episodes, strict=True)]
            for steps, step in zip(episodes, self.next(actor, behind, keys_ES[:, turn]), strict=True):
                steps.append(step)
        rewards = [self.reward(steps) for steps in episodes]
        made = [Episode(tuple(steps), r, {"score": r}) for steps, r in zip(episodes, rewards, strict=True)]
        return Played([made[p * G : (p + 1) * G] for p in range(P)])

    def evaluate(self, actor, prompts, keys_P1, step):
        return np.array([group[0].reward for group in self.play(actor, prompts, keys_P1, 0).groups])


class Decisions(Base):
    """An episode is three decisions among three letters, one after the other; worth the share of the last letter."""

    count, labels = DECISIONS, (70, 71, 72)

    def next(self, actor, behind, keys_E):
        return actor.decide(behind, keys_E, self.labels, weight=1 / self.count)

    def prompt(self, loaded, before):
        return before[-1].followed_by([40]) if before else loaded.sample

    def reward(self, steps):
        return float(np.mean([step.tokens_T[0] == self.labels[-1] for step in steps]))


class TwoTurns(Base):
    """An episode is an answer, a line of ours and another answer; worth how often both say what the other says."""

    count = TURNS

    def next(self, actor, behind, keys_E):
        groups = actor.draw(behind, keys_E[:, None])
        return [dataclasses.replace(group[0], weight=1 / self.count) for group in groups]

    def prompt(self, loaded, before):
        return before[-1].followed_by([41, 42]) if before else loaded.sample

    def reward(self, steps):
        return float(len(np.intersect1d(*(step.output_T for step in steps))))


class MadeUp:
    """Answers of any length, with memories of any number and from any number of states where the model has such; nobody
    draws them."""

    labels = ()

    def __init__(self, experiment, stage, model):
        self.longest, self.model = rl_config(stage).max_new_tokens, model

    def play(self, actor, prompts, keys_PG, phase):
        rng = np.random.default_rng(phase)
        made = [[self.step(one.sample, rng) for _ in range(keys_PG.shape[1])] for one in prompts]
        return Played(
            [[Episode((step,), float(r), {"score": float(r)}) for r, step in enumerate(steps)] for steps in made]
        )

    def prompt(self, loaded, before):
        return loaded.sample

    def step(self, prompt, rng):
        tokens_T = rng.integers(5, 60, rng.integers(1, self.longest)).astype(np.int32)
        known = np.full(len(tokens_T), -5, np.float32), np.ones(len(tokens_T), bool)
        memories, speech = [], self.model.speech
        for place in range(2, len(tokens_T), 3) if speech else ():
            if len(memories) < speech.max_invocations and rng.random() < 0.5:
                kind, heard = int(rng.integers(2)), int(rng.integers(1, 20))
                tokens_T[place - 1 : place + 1] = speech.invoke_ids[kind], speech.end_ids[kind]
                states_LD = rng.normal(size=(heard, self.model.config.decoder.width)).astype(self.model.dtype)
                memories.append(Invocation(kind, place, speech.lengths[kind], states_LD))
        return Step(prompt, tokens_T, *known, stopped=True, invocations=tuple(memories))
