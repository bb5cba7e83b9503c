"""Supervised warm-up of a memory that speaks: answers written after a memory that a forced call has formed.

What VisMem's released code does in its first stage (arXiv 2511.11007), with the call and the end token of generation.
"""

import dataclasses
import os
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from vlmem_jax.config import ConfigError
from vlmem_jax.data import Prompt
from vlmem_jax.generate import InvocationConfig, SamplingConfig
from vlmem_jax.models import VLM
from vlmem_jax.rl.config import LOSS_WEIGHTS, MemorySFTConfig, check_prompted, sft_config
from vlmem_jax.rl.episodes import Step
from vlmem_jax.rl.rollout import rollout_keys, rollouts, trainer_generator
from vlmem_jax.rl.rows import RowShape, counts_of, pack_steps
from vlmem_jax.rl.stream import Loaded, PromptStream, check_fits
from vlmem_jax.runtime.sharding import batch_sharding, put
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.loop import StepInput
from vlmem_jax.train.next_token import NextTokenLoss, eval_program, experiment_processor
from vlmem_jax.train.stages import Split
from vlmem_jax.trees import flatten
from vlmem_jax.types import Batch, Sample

ONE_CALL = InvocationConfig(max_invocations=1)


class MemorySFT(NextTokenLoss):
    """The `memory_sft` task: [prompt, call, memory, end, answer], of which the answer is learned.

    The memory is of a kind by chance, and formed from what a call right after the prompt hears. What a checkpoint
    keeps of it: the prompts drawn.
    """

    def __init__(
        self,
        experiment: Experiment,
        stage: StageConfig,
        model: VLM,
        mesh: Mesh,
        workdir: str | os.PathLike = ".",
    ):
        """Raises ValueError for what `check` refuses, and for prompts that cannot be read."""
        self.check(experiment, stage)
        super().__init__(model, experiment.loss_chunk)
        self.config, data, self._mesh = sft_config(stage), experiment.data_of(stage), mesh
        self._data = dataclasses.replace(data, loss_weight=LOSS_WEIGHTS[self.config.loss_mean])
        self._seeds = experiment.seed, zlib.crc32(stage.name.encode())
        self._trained = Split.of(stage, list(flatten(model.abstract()))).trainable
        self._kinds = self._used(self.config, model)
        """Numbers of the kinds of memory that are formed."""
        self._at_once = self._data.rows // experiment.parts(stage, mesh)
        self._processor = experiment_processor(experiment, model)
        heard = 2  # the call, and what it is answered behind
        self._shape = RowShape.of(self._data, model, heard, self.config.row_memories, self._processor.tile)
        self._stream = PromptStream(
            self._processor,
            self._data,
            experiment.seed,
            ahead=self.config.prompts,
            wanted=lambda prompt: bool(prompt.answers),
            check=self._target,
            fits=self._fits,
        )
        prompts = sum(self._stream.prompts.counts)
        self.report = f"{prompts} prompts; a step learns the answers to {self.config.prompts}, after a memory each"

    @staticmethod
    def check(experiment: Experiment, stage: StageConfig) -> None:
        """Raises ConfigError, naming the key, where a stage cannot be trained by this task."""
        config, model = sft_config(stage), VLM(experiment.model)
        check_prompted(experiment, stage)
        if model.speech is None:
            raise ConfigError(
                f"config.stages.{stage.name}.task memory_sft is for a memory that speaks; model.memory is "
                f"{experiment.model.memory_kind}"
            )
        try:
            used = MemorySFT._used(config, model)
        except ValueError as error:
            raise ConfigError(f"config.stages.{stage.name}.task.{error}") from error
        if not used:
            raise ConfigError(f"config.stages.{stage.name}.task.disabled leaves no kind of memory to form")

    @staticmethod
    def _used(config: MemorySFTConfig, model: VLM) -> list[int]:
        heeded = InvocationConfig(disabled=config.disabled).heeded(model.speech)
        return [kind for kind, is_heeded in enumerate(heeded) if is_heeded]

    # --- the loop's side ----------------------------------------------------------------------------------------------

    def work(self, step: int, params: dict) -> StepInput:
        """The rows of `step`."""
        with jax.transfer_guard("allow"):
            loaded = self._stream.take_same(self.config.prompts)
            kinds = np.random.default_rng([*self._seeds, step]).choice(self._kinds, size=len(loaded))
            steps = self._answers(params, loaded, kinds)
            parts = self._rows(steps)
            placed = [put(part, batch_sharding(self._mesh)) for part in parts]
        counts = counts_of(steps, len(parts) * self._at_once, self._shape, self.model, self._trained)
        numbers = {"memory/long": float(kinds.mean()), "prompts/skipped": float(len(self._stream.skipped))}
        weight = sum(float(part.text.weights_BT.sum()) for part in parts)
        return StepInput(placed, weight, [one.prompt.name for one in loaded], counts, numbers)

    def evaluate(self, params: dict) -> dict[str, float]:
        """Mean loss on `data.eval`, weighted as in training; memories are short and long in turn."""
        losses, weight = [], 0.0
        with jax.transfer_guard("allow"):
            for loaded in self._stream.held_out(self.config.rollout_rows):
                for part in self._rows(self._answers(params, loaded, np.resize(self._kinds, len(loaded)))):
                    weight += float(part.text.weights_BT.sum())
                    placed = put(jax.tree.map(lambda x: x[None], part), batch_sharding(self._mesh, leading=1))
                    losses.append(eval_program(self._mesh)(self.model, params, placed, self.chunk))
        return {"loss": float(np.sum(jax.device_get(losses)) / weight)} if losses else {}

    def state(self) -> dict:
        """Where the prompts are."""
        return {"drawn": self._stream.drawn}

    def restore(self, state: dict) -> None:
        """Goes on from a state that `state` gave."""
        self._stream.go_to(state["drawn"])

    def close(self) -> None:
        """Ends its threads."""
        self._stream.close()

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _answers(self, params: dict, loaded: Sequence[Loaded], kinds: np.ndarray) -> list[Step]:
        """The answers to prompts, after a memory each of the kind given."""
        generator = trainer_generator(self.model, params, self._processor, self._mesh)
        calls = [[[self.model.speech.invoke_ids[kind]]] for kind in kinds]
        samples, rows = [one.sample for one in loaded], self.config.rollout_rows
        with generator.context():
            keys_P1 = rollout_keys(*self._seeds, 0, len(loaded), 1)  # of tokens that nobody draws
            called = dict(rollouts(generator, samples, SamplingConfig(1), keys_P1, rows, ONE_CALL, calls, record=True))
        return [_answered(called[n][0], self._target(one.prompt)) for n, one in enumerate(loaded)]

    def _rows(self, steps: Sequence[Step]) -> list[Batch]:
        """Numpy arrays [rows, ...] of each part."""
        ones, tile = [1.0] * len(steps), self._processor.tile
        parts = pack_steps(steps, ones, self._data, self.model, self._shape, self._at_once, tile=tile)
        return [part.batch for part in parts]

    def _target(self, prompt: Prompt) -> list[int]:
        """Ids of the first accepted answer. Raises ValueError if it holds tokens that are no text."""
        try:
            ids = self._processor.answer(prompt.answers[0])
        except ValueError as error:
            raise ValueError(f"{error} (sample {prompt.name})") from error
        for token in self.model.special_tokens:
            if token in prompt.answers[0]:
                raise ValueError(
                    f"an answer must not hold tokens of the memory, but has {token} (sample {prompt.name})"
                )
        return ids

    def _fits(self, prompt: Prompt, sample: Sample) -> None:
        behind = 2 + self.model.speech.latents + len(self._target(prompt))
        check_fits(self._data, prompt, sample, behind)


def _answered(called: Step, ids: Sequence[int]) -> Step:
    """A step of a call and its memory, with tokens behind it that alone are targets."""
    tokens_T = np.concatenate([called.tokens_T, np.array(ids, np.int32)])
    return dataclasses.replace(
        called,
        tokens_T=tokens_T,
        logp_T=np.full(len(tokens_T), np.nan, np.float32),
        loss_T=np.arange(len(tokens_T)) >= len(called.tokens_T),
        stopped=True,
    )
