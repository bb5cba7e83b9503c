"""GRPO as a task of the training loop: phases of rollouts, and steps that learn from them (arXiv 2402.03300)."""

import dataclasses
import os
import time
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from vlmem_jax.config import ConfigError
from vlmem_jax.data import Prompt
from vlmem_jax.data.samples import Key
from vlmem_jax.generate import never_sampled
from vlmem_jax.generate.invocation import delimiters
from vlmem_jax.memory import memory_of
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import whole_heads
from vlmem_jax.paths import as_path
from vlmem_jax.rl.actor import Actor, Judge
from vlmem_jax.rl.config import LOSS_WEIGHTS, check_prompted, longest_answer, rl_config
from vlmem_jax.rl.episodes import Step
from vlmem_jax.rl.loss import k3
from vlmem_jax.rl.objective import GRPOLoss
from vlmem_jax.rl.phases import Phases
from vlmem_jax.rl.plays import play_of
from vlmem_jax.rl.reference import Reference
from vlmem_jax.rl.resume import as_arrays, from_arrays
from vlmem_jax.rl.rollout import MayStop, never, placed, rollout_keys, rollout_mesh, trainer_generator
from vlmem_jax.rl.rows import Rows, counts_of, pack_steps, row_shape
from vlmem_jax.rl.stream import Loaded, PromptStream, check_fits
from vlmem_jax.runtime.sharding import batch_sharding, put
from vlmem_jax.scoring.rewards import Rewards, imported
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.loop import StepInput
from vlmem_jax.train.next_token import experiment_processor
from vlmem_jax.train.run import origin
from vlmem_jax.train.stages import Split
from vlmem_jax.trees import flatten
from vlmem_jax.types import Sample


class GRPO(GRPOLoss):
    """The `grpo` task. What a checkpoint keeps of it: the prompts drawn, beta, and lessons in use."""

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
        config = rl_config(stage)
        self._processor = experiment_processor(experiment, model)
        by_memory = config.invocation.banned_ids(model.speech) if model.speech else ()
        banned_ids = never_sampled(self._processor, model) + by_memory
        self._play = play_of(experiment, stage)(experiment, stage, model)
        if config.kl_of == "labels" and not self._play.labels:
            raise ConfigError(
                f"config.stages.{stage.name}.task.kl_of=labels is for plays whose steps are drawn among labels; this "
                "one draws tokens"
            )
        super().__init__(model, config, experiment.loss_chunk, banned_ids, self._play.labels)
        self._delimiter_ids = delimiters(self._processor.tokenizer) if model.speech else ()
        self._stage, self._mesh = stage, mesh
        self._seeds = experiment.seed, zlib.crc32(stage.name.encode())
        data = experiment.data_of(stage)
        self._data = dataclasses.replace(data, loss_weight=LOSS_WEIGHTS[config.loss_mean])
        self._at_once = data.rows // experiment.parts(stage, mesh)
        self._shape = row_shape(config, data, model, self._processor.tile)
        self._rollout_mesh = rollout_mesh(config.rollout_mesh, model, mesh)
        rewards = Rewards(config.rewards)
        self._judge = Judge(config, rewards, self._processor.tokenizer)
        self._stream = PromptStream(
            self._processor,
            data,
            experiment.seed,
            ahead=config.prompts,
            wanted=lambda prompt: bool(prompt.answers) or not rewards.needs_answer,
            check=rewards.check,
            fits=self._fits,
        )
        self._split = Split.of(stage, list(flatten(model.abstract())))
        self._reference = Reference(
            self, self._split, mesh, lambda: origin(experiment, stage, model, as_path(workdir))[0]
        )
        self._phases = Phases(config)
        self._step, self._drawn, self._restored = -1, 0, False
        """The last step that was worked on, how many prompts had been drawn for it, and whether the run goes on."""
        self._may_stop: MayStop = never
        self._rows: dict[int, list[Rows]] = {}
        prompts = sum(self._stream.prompts.counts)
        phase = f"a phase samples {config.group_size} answers to each of {config.prompts} and learns from them in"
        heads = whole_heads(model, self._rollout_mesh, model.dtype.itemsize, cache=True)
        where = placed(model, mesh, self._rollout_mesh)
        self.report = "\n".join([f"{prompts} prompts; {phase} {config.steps} steps", where, *heads])

    @staticmethod
    def check(experiment: Experiment, stage: StageConfig) -> None:
        """Raises ConfigError, naming the key, where a stage cannot be trained by this task."""
        config, data = rl_config(stage), experiment.data_of(stage)
        where = f"config.stages.{stage.name}"
        check_prompted(experiment, stage)
        Rewards(config.rewards, f"{where}.task.rewards")
        if config.reference != "start":
            imported(config.reference, f"{where}.task.reference")
        if check := getattr(play_of(experiment, stage), "check", None):
            check(experiment, stage)
        speech = VLM(experiment.model).speech
        try:
            longest = longest_answer(config, speech)
        except ValueError as error:
            raise ConfigError(f"{where}.task.invocation: {error}") from error
        if 0 < config.row_memories < (most := config.invocation.budget(speech) if speech else 0):
            raise ConfigError(f"{where}.task.row_memories must be at least {most}, of an answer with the most memories")
        if longest >= data.pack_tokens:
            more = f", with memories {longest}," if speech else ""
            raise ConfigError(
                f"{where}.task.max_new_tokens {config.max_new_tokens}{more} must "
                f"be less than data.pack_tokens {data.pack_tokens}, so that a row holds a prompt and its answer"
            )
        try:
            memory_of(experiment.model.memory).check_drawn_as_trained(experiment.model.memory)
        except ValueError as error:
            raise ConfigError(f"{where}: so that tokens are drawn as they are trained, model.memory.{error}") from error

    # --- the loop's side ----------------------------------------------------------------------------------------------

    def work(self, step: int, params: dict) -> StepInput:
        """The rows of `step`; where a phase begins, after its rollouts by `params`.

        The step has weight if one of its episodes has an advantage, or is held to the reference. So one whose
        groups all tie has none where drop_zero_variance leaves them out, KL or not, and with them kept, where kl is 0.
        """
        phase, place = divmod(step, self.config.steps)
        part = place % self.config.minibatches
        with jax.transfer_guard("allow"):
            if self.config.kl:
                self._reference.begin(params, later=self._restored)
            if phase != self._phases.number:
                self._begin(phase, params)
            if part not in self._rows:
                self._rows[part] = self._make_rows(part, params, first_time=place < self.config.minibatches)
        self._step, self._drawn = step, self._stream.drawn
        rows, lessons = self._rows[part], self._phases.part(part)
        steps = [step for lesson in lessons for step in lesson.steps]
        counts = counts_of(steps, len(rows) * self._at_once, self._shape, self.model, self._split.trainable)
        teaches = self.config.kl > 0 or any(lesson.advantage for lesson in lessons)
        by_token = self.config.loss_mean == "token"
        denominator = sum(step.weight * (int(step.loss_T.sum()) if by_token else 1) for step in steps)
        names = list(dict.fromkeys(step.prompt.name for step in steps))
        return StepInput(rows, float(teaches * denominator), names, counts, self._phases.numbers)

    def evaluate(self, params: dict) -> dict[str, float]:
        """Mean score of greedy episodes of the prompts of `data.eval`, as `score`; `loss` is minus that."""
        scores: list[np.ndarray] = []
        actor = None
        with jax.transfer_guard("allow"):
            for loaded in self._stream.held_out(self.config.rollout_rows):
                actor = actor or self._actor(params)
                keys_P1 = self._keys(0, len(loaded), 1)
                scores.append(self._play.evaluate(actor, loaded, keys_P1, self._step))
        if not scores:
            return {}
        score = float(np.concatenate(scores).mean())
        return {"loss": -score, "score": score}

    def heed(self, may_stop: MayStop) -> None:
        """See `train.loop.Task`: rollouts can be broken off. Then their phase is played anew, with the same keys."""
        self._may_stop = may_stop

    def state(self) -> dict:
        """Where the prompts were when the last step was worked on, beta, and, in the midst of a phase, its lessons."""
        midst = bool((self._step + 1) % self.config.steps)
        state = {"drawn": self._drawn, "midst": midst, **self._phases.state()}
        if state["midst"]:
            state["arrays"] = as_arrays(self._phases.lessons)
        return state

    def restore(self, state: dict) -> None:
        """Goes on from a state that `state` gave."""
        self._restored = True
        self._drawn = state["drawn"]
        self._stream.go_to(self._drawn)
        loaded: dict[Key, Loaded] = {}

        def prompt(key: Key, before: Sequence[Step]) -> Sample:
            if key not in loaded:
                loaded[key] = self._stream.load(key)
            return self._play.prompt(loaded[key], before)

        lessons = from_arrays(state.get("arrays", {}), prompt) if state["midst"] else None
        self._phases.restore(state, lessons)

    def close(self) -> None:
        """Ends its threads."""
        self._stream.close()
        self._judge.close()

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def _begin(self, phase: int, params: dict) -> None:
        """Plays with the next prompts, and keeps what can be learned from that."""
        config, self._rows = self.config, {}
        self._phases.begin()
        loaded = self._stream.take_same(config.prompts)
        start = time.perf_counter()
        actor, keys_PG = self._actor(params, self._may_stop), self._keys(phase, config.prompts, config.group_size)
        played = self._play.play(actor, loaded, keys_PG, phase)
        seconds = time.perf_counter() - start
        self._phases.learn_from(phase, loaded, played, seconds, len(self._stream.skipped))

    def _keys(self, phase: int, prompts: int, group_size: int) -> Array:
        with jax.set_mesh(self._rollout_mesh):  # what is made on the way belongs to the mesh of the rollouts
            return rollout_keys(*self._seeds, phase, prompts, group_size)

    def _actor(self, params: dict, may_stop: MayStop = never) -> Actor:
        """Draws with the trainer's own arrays, as far as they lie on the mesh of the rollouts."""
        on = self._mesh, self._rollout_mesh
        generator = trainer_generator(self.model, params, self._processor, *on, self._delimiter_ids)
        return Actor(generator, self.config, self._judge, may_stop)

    def _fits(self, prompt: Prompt, sample: Sample) -> None:
        knob = f"stages.{self._stage.name}.task.max_new_tokens"
        check_fits(self._data, prompt, sample, longest_answer(self.config, self.model.speech), knob)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _make_rows(self, part: int, params: dict, first_time: bool) -> list[Rows]:
        """A minibatch on the devices, part by part, with what the reference says of it."""
        steps = [(step, lesson.advantage) for lesson in self._phases.part(part) for step in lesson.steps]
        packed = pack_steps(
            [step for step, _ in steps],
            [advantage for _, advantage in steps],
            self._data,
            self.model,
            self._shape,
            self._at_once,
            self._phases.beta,
            self._processor.tile,
        )
        parts = [put(part, batch_sharding(self._mesh)) for part in packed]
        if not self.config.kl:
            return parts
        known = self._reference.known(params, [part.batch for part in parts])
        parts = [dataclasses.replace(part, **fields) for part, fields in zip(parts, known, strict=True)]
        if self.config.adaptive_kl and first_time:
            kl = [
                jnp.sum(k3(part.old_logp_BT, part.ref_logp_BT), where=part.batch.text.weights_BT > 0) for part in parts
            ]
            self._phases.measured(sum(map(float, kl)), sum(int((p.batch.text.weights_BT > 0).sum()) for p in packed))
        return parts
