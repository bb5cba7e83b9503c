"""GRPO as a task of the training loop: phases of rollouts, and steps that learn from them (arXiv 2402.03300)."""

import base64
import dataclasses
import functools
import json
import math
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from vlmem_jax.config import ConfigError
from vlmem_jax.data import Prompt
from vlmem_jax.data.samples import Key
from vlmem_jax.generate import Generator, Invocation, InvocationConfig, never_sampled
from vlmem_jax.generate.invocation import delimiters
from vlmem_jax.hub.convert import released
from vlmem_jax.memory import Speech, memory_of
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import whole_heads
from vlmem_jax.nn.linear import held_dtype
from vlmem_jax.paths import as_path
from vlmem_jax.rl.advantages import group_advantages, varied
from vlmem_jax.rl.config import LOSS_WEIGHTS, RLConfig, check_prompted, rl_config
from vlmem_jax.rl.loss import grpo_loss, k3
from vlmem_jax.rl.penalties import invocation_reward, negative_penalty, type_penalty
from vlmem_jax.rl.rollout import Trajectory, rollout_keys, rollout_mesh, rollouts, trainer_generator
from vlmem_jax.rl.rows import Rows, flops_of, pack_trajectories
from vlmem_jax.rl.stream import Loaded, PromptStream, check_fits
from vlmem_jax.runtime import hosts
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.sharding import batch_sharding, param_shardings, put, shards
from vlmem_jax.scoring.rewards import RewardError, Rewards, imported
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.loop import StepInput
from vlmem_jax.train.loss import log_probs
from vlmem_jax.train.next_token import experiment_processor
from vlmem_jax.train.run import checkpoint_of, origin
from vlmem_jax.train.stages import Split, changed, storage
from vlmem_jax.trees import Flat, flatten, unflatten
from vlmem_jax.types import Batch, Sample


@dataclasses.dataclass
class GRPOLoss:
    """The `grpo` task without its data."""

    model: VLM
    config: RLConfig
    chunk: int
    """Tokens of a row whose logits exist at the same time."""
    banned_ids: tuple[int, ...]
    """Never drawn, so no part of the softmax."""

    def log_probs(self, params: dict, batch: Batch) -> Float[Array, "B T"]:
        """Log-probability of each target, as the sampler computes it."""
        hidden_BTD = self.model.hidden(params, batch)
        kernel_DV = self.model.head_kernel(params)
        rescore = functools.partial(self.model.rescore, params) if self.model.speech else None
        return log_probs(hidden_BTD, kernel_DV, batch.text.targets_BT, self.chunk, self.banned_ids, rescore)

    def loss(self, params: dict, rows: Rows, key: Array | None) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `grpo_loss`. Nothing is dropped at random, since nothing was when the tokens were drawn."""
        c = self.config
        loss, sums = grpo_loss(
            self.log_probs(params, rows.batch),
            rows.old_logp_BT,
            rows.ref_logp_BT,
            rows.advantage_BT,
            rows.batch.text.weights_BT,
            jnp.broadcast_to(rows.beta_B[:, None], rows.advantage_BT.shape),
            c.clip,
            c.clip_high,
        )
        if not c.kl:
            del sums["kl"]
        return loss, sums


@dataclasses.dataclass(frozen=True)
class WeightedTrajectory:
    """A trajectory and what is to be learned from it."""

    key: Key
    """Of its prompt."""
    trajectory: Trajectory
    advantage: float


class GRPO(GRPOLoss):
    """The `grpo` task. What a checkpoint keeps of it: the prompts drawn, beta, and trajectories in use."""

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
        super().__init__(model, config, experiment.loss_chunk, never_sampled(self._processor, model) + by_memory)
        self._delimiter_ids = delimiters(self._processor.tokenizer) if model.speech else ()
        self._experiment, self._stage, self._mesh, self._workdir = experiment, stage, mesh, as_path(workdir)
        data = experiment.data_of(stage)
        self._data = dataclasses.replace(data, loss_weight=LOSS_WEIGHTS[config.loss_mean])
        self._at_once = data.rows // experiment.parts(stage, mesh)
        self._rollout_mesh = rollout_mesh(config.rollout_mesh, model, mesh)
        self._speaks = model.speech is not None and any(config.invocation.heeded(model.speech))
        self._rewards = Rewards(config.rewards)
        self._pool = ThreadPoolExecutor(config.reward_threads, thread_name_prefix="rewards")
        self._stream = PromptStream(
            self._processor,
            data,
            experiment.seed,
            ahead=config.prompts,
            wanted=lambda prompt: bool(prompt.answers) or not self._rewards.needs_answer,
            check=self._rewards.check,
            fits=self._fits,
        )
        self._split = Split.of(stage, list(flatten(model.abstract())))
        self._reference: Flat | None = None
        self._restored = False
        self._step, self._phase = -1, -1
        self._beta, self._kl, self._kl_tokens = config.kl, 0.0, 0
        self._weighted: list[WeightedTrajectory] = []
        self._rows: dict[int, Rows] = {}
        self._numbers: dict[str, float] = {}
        self._of_reference = jax.jit(
            lambda params, batch: jax.lax.map(lambda part: self.log_probs(params, part), batch),
            compiler_options=options(mesh),
        )
        prompts = sum(self._stream.prompts.counts)
        phase = f"a phase samples {config.group_size} answers to each of {config.prompts} and learns from them in"
        heads = whole_heads(model, self._rollout_mesh, model.dtype.itemsize, cache=True)
        self.report = "\n".join([f"{prompts} prompts; {phase} {config.steps} steps", *heads])

    @staticmethod
    def check(experiment: Experiment, stage: StageConfig) -> None:
        """Raises ConfigError, naming the key, where a stage cannot be trained by this task."""
        config, data = rl_config(stage), experiment.data_of(stage)
        where = f"config.stages.{stage.name}"
        check_prompted(experiment, stage)
        Rewards(config.rewards, f"{where}.task.rewards")
        if config.reference != "start":
            imported(config.reference, f"{where}.task.reference")
        speech = VLM(experiment.model).speech
        of_memory = config.invocation != InvocationConfig(), config.invocation_penalty is not None, config.paired_base
        if speech is None and any(of_memory):
            raise ConfigError(
                f"{where}.task.invocation, invocation_penalty and paired_base are for a memory that speaks; "
                f"model.memory is {experiment.model.memory_kind}"
            )
        try:
            longest = longest_answer(config, speech)
        except ValueError as error:
            raise ConfigError(f"{where}.task.invocation: {error}") from error
        if longest >= data.pack_tokens:
            more = f", with memories {longest}," if speech else ""
            raise ConfigError(
                f"{where}.task.max_new_tokens {config.max_new_tokens}{more} must "
                f"be less than data.pack_tokens {data.pack_tokens}, so that a row holds a prompt and its answer"
            )
        if config.invocation_penalty is not None and not _has_formed(experiment, stage):
            raise ConfigError(
                f"{where}.task.invocation_penalty teaches when to call for memories, but none have been formed yet: "
                "train a stage that forms them before, or set init to a checkpoint of one"
            )
        try:
            memory_of(experiment.model.memory).check_drawn_as_trained(experiment.model.memory)
        except ValueError as error:
            raise ConfigError(f"{where}: so that tokens are drawn as they are trained, model.memory.{error}") from error

    # --- the loop's side ----------------------------------------------------------------------------------------------

    def work(self, step: int, params: dict) -> StepInput:
        """The rows of `step`; where a phase begins, after its rollouts by `params`.

        The step has weight if one of its trajectories has an advantage, or is held to the reference. So one whose
        groups all tie has none where drop_zero_variance leaves them out, KL or not, and with them kept, where kl is 0.
        """
        phase, place = divmod(step, self.config.steps)
        part = place % self.config.minibatches
        with jax.transfer_guard("allow"):
            if self.config.kl and self._reference is None:
                self._reference = self._at_start(params)
            if phase != self._phase:
                self._begin(phase, params)
            if part not in self._rows:
                self._rows[part] = self._make_rows(part, params, first_time=place < self.config.minibatches)
        self._step = step
        rows, weighted = self._rows[part], self._part(part)
        trajectories = [item.trajectory for item in weighted]
        sizes = [len(t.prompt.tokens_T) + int(t.index_T[-1]) + 1 for t in trajectories]
        drawn = sum(int(t.loss_T.sum()) for t in trajectories)
        counts = {
            "tokens": sum(sizes),
            "tiles": sum(len(t.prompt.pixels_ISSc) for t in trajectories),
            "slots": int(np.prod(rows.advantage_BT.shape)),
            **flops_of(trajectories, rows.batch, self.model, self._split.trainable),
        }
        teaches = self.config.kl > 0 or any(item.advantage for item in weighted)
        denominator = len(weighted) if self.config.loss_mean == "sequence" else drawn
        names = list(dict.fromkeys(t.prompt.name for t in trajectories))
        return StepInput(rows, float(teaches * denominator), names, counts, self._numbers)

    def evaluate(self, params: dict) -> dict[str, float]:
        """Mean score of greedy answers to the prompts of `data.eval`, as `score`; `loss` is minus that."""
        invocation = self._invocation(self._step)
        scores: list[np.ndarray] = []
        with jax.transfer_guard("allow"):
            generator = self._generator(params)
            for loaded in self._stream.held_out(self.config.rollout_rows):
                keys_PG = self._keys(0, len(loaded), 1)
                scores.append(self._answered(generator, loaded, keys_PG, invocation, greedy=True)[1].of_all)
        if not scores:
            return {}
        score = float(np.concatenate(scores).mean())
        return {"loss": -score, "score": score}

    def state(self) -> dict:
        """Where the prompts are, beta, and, in the midst of a phase, its trajectories."""
        state = {
            "drawn": self._stream.drawn,
            "phase": self._phase,
            "beta": self._beta,
            "kl": [self._kl, self._kl_tokens],
            "numbers": self._numbers,
        }
        if (self._step + 1) % self.config.steps:
            state["weighted"] = [_as_json(item) for item in self._weighted]
        return state

    def restore(self, state: dict) -> None:
        """Goes on from a state that `state` gave."""
        self._restored = True
        self._stream.go_to(state["drawn"])
        self._beta, (self._kl, self._kl_tokens), self._numbers = state["beta"], state["kl"], state["numbers"]
        if "weighted" in state:
            keys = dict.fromkeys(tuple(fields["key"]) for fields in state["weighted"])
            prompts = {key: self._stream.prompts.sample(key) for key in keys}
            self._weighted = [
                _from_json(fields, prompts[tuple(fields["key"])], self.model.dtype) for fields in state["weighted"]
            ]
            self._phase = state["phase"]

    def close(self) -> None:
        """Ends its threads."""
        self._stream.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def _begin(self, phase: int, params: dict) -> None:
        """Samples answers to the next prompts, and keeps what can be learned from them."""
        config = self.config
        self._rows, self._weighted, self._phase = {}, [], phase
        if config.adaptive_kl and self._kl_tokens:
            measured = self._kl / self._kl_tokens
            self._beta *= 1.5 if measured > 1.5 * config.kl_target else 1.0
            self._beta /= 1.5 if measured < config.kl_target / 1.5 else 1.0
        self._kl, self._kl_tokens = 0.0, 0
        loaded = self._stream.take_same(config.prompts)
        start = time.perf_counter()
        generator, keys_PG = self._generator(params), self._keys(phase, config.prompts, config.group_size)
        invocation = self._invocation(phase * config.steps)
        groups, scores = self._answered(generator, loaded, keys_PG, invocation, record=True)
        numbers: dict[str, float] = {}
        if self._speaks:
            rewards_PG, numbers = self._with_memory(generator, loaded, keys_PG, invocation, groups, scores)
        scores_PG = scores.of_all.reshape(-1, config.group_size)
        if not self._speaks:
            rewards_PG = scores_PG
        seconds = time.perf_counter() - start
        varied_P = varied(rewards_PG)
        advantages_PG = group_advantages(rewards_PG, config.advantage_std, config.advantage_eps)
        self._weighted = [
            WeightedTrajectory(one.key, trajectory, float(advantage))
            for one, group, advantages, differs in zip(loaded, groups, advantages_PG, varied_P, strict=True)
            if differs or not config.drop_zero_variance
            for trajectory, advantage in zip(group, advantages, strict=True)
        ]
        everything = [trajectory for group in groups for trajectory in group]
        tokens = sum(len(trajectory.tokens_T) for trajectory in everything)
        self._numbers = {
            "score/mean": float(scores_PG.mean()),
            "score/std": float(scores_PG.std(axis=1).mean()),
            "score/errors": float(scores.failed),
            "rollout/zero_variance_groups": float((~varied_P).sum()),
            "rollout/tokens": tokens / len(everything),
            "rollout/cut_off": float(np.mean([not trajectory.stopped for trajectory in everything])),
            "rollout/tokens_per_s": tokens / seconds,
            "rollout/seconds": seconds,
            "prompts/skipped": float(len(self._stream.skipped)),
        } | numbers
        if config.adaptive_kl:
            self._numbers["beta"] = self._beta

    def _with_memory(
        self,
        generator: Generator,
        loaded: list[Loaded],
        keys_PG: Array,
        invocation: InvocationConfig,
        groups: list[list[Trajectory]],
        scores: "Scores",
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Rewards [P, G], see `invocation_penalty`, and numbers of the memories."""
        config, P, G = self.config, len(loaded), self.config.group_size
        spoken_PG = [[trajectory.invocations for trajectory in group] for group in groups]
        invoked_PG = np.array([[bool(spoken) for spoken in row] for row in spoken_PG])
        kinds = [memory.kind for row in spoken_PG for spoken in row for memory in spoken]
        numbers = {
            "memory/per_answer": len(kinds) / (P * G),
            "memory/answers": float(invoked_PG.mean()),
            "memory/long": float(np.mean(kinds)) if kinds else 0.0,
        }
        base_PG, base, turned_over = np.zeros((P, 1)), None, None
        if config.base:
            with generator.context():
                base_keys_PG = keys_PG if config.paired_base else keys_PG[:, :1]
            base = self._answered(generator, loaded, base_keys_PG, InvocationConfig("never"))[1]
        chosen_Pg = self._drawn_again(P)
        if np.take_along_axis(invoked_PG, chosen_Pg, axis=1).any():
            # up to its first call an answer stays as it was; one without any stays so to its end
            begun = [[_until_first_call(groups[n][g]) for g in row] for n, row in enumerate(chosen_Pg)]
            turned = dataclasses.replace(invocation, reverse_types=not invocation.reverse_types)
            with generator.context():
                turned_keys_Pg = keys_PG[np.arange(P)[:, None], chosen_Pg]
            turned_over = self._answered(generator, loaded, turned_keys_Pg, turned, begun)[1]
        scores_PG = scores.of_all.reshape(P, G)
        if base:
            base_PG = base.of_all.reshape(P, -1)
            numbers |= {"score/base": float(base_PG.mean()), "score/gain": float(scores_PG.mean() - base_PG.mean())}
        if config.invocation_penalty is None:
            return scores_PG - base_PG, numbers
        reversed_PG = scores_PG.copy()
        if turned_over:
            np.put_along_axis(reversed_PG, chosen_Pg, turned_over.of_all.reshape(P, -1), axis=1)
        numbers |= {
            "penalty/type": float(type_penalty(scores_PG, reversed_PG, invoked_PG).mean()),
            "penalty/negative": float(negative_penalty(scores_PG, invoked_PG).mean()),
        }
        return invocation_reward(scores_PG, base_PG, reversed_PG, invoked_PG, config.invocation_penalty), numbers

    def _drawn_again(self, prompts: int) -> np.ndarray:
        """Which trajectories of each group are drawn again with kinds reversed, if they have a memory; by chance."""
        config, G = self.config, self.config.group_size
        count = 0 if config.invocation_penalty is None else math.ceil(config.rev_fraction * G - 1e-9)
        rng = np.random.default_rng([self._experiment.seed, zlib.crc32(self._stage.name.encode()), self._phase])
        order_PG = rng.permuted(np.tile(np.arange(G), (prompts, 1)), axis=1)
        return np.sort(order_PG[:, :count], axis=1)

    def _invocation(self, step: int) -> InvocationConfig:
        """Who calls for memories at a step."""
        early = step < self.config.anywhere_from * self._stage.steps
        return dataclasses.replace(self.config.invocation, anywhere=0.0) if early else self.config.invocation

    def _keys(self, phase: int, prompts: int, group_size: int) -> Array:
        with jax.set_mesh(self._rollout_mesh):  # what is made on the way belongs to the mesh of the rollouts
            return rollout_keys(
                self._experiment.seed, zlib.crc32(self._stage.name.encode()), phase, prompts, group_size
            )

    def _answered(
        self,
        generator: Generator,
        loaded: list[Loaded],
        keys_PG: Array,
        invocation: InvocationConfig,
        forced: Sequence[Sequence[Sequence[int]]] = (),
        greedy: bool = False,
        record: bool = False,
    ) -> tuple[list[list[Trajectory]], "Scores"]:
        """Trajectories of each prompt, and their scores: those of one batch are computed beside the next."""
        config, samples, G = self.config, [one.sample for one in loaded], keys_PG.shape[1]
        groups: dict[int, list[Trajectory]] = {}
        futures: dict[int, Future] = {}
        drawn = (config.sampling(greedy), keys_PG, config.rollout_rows, invocation, forced, record)
        with generator.context():
            for n, group in rollouts(generator, samples, *drawn):
                groups[n] = group
                for number, trajectory in enumerate(group, n * G):
                    if number % jax.process_count() == jax.process_index():
                        futures[number] = self._pool.submit(self._score, trajectory, loaded[n].prompt)
        return [groups[n] for n in range(len(loaded))], Scores(futures)

    def _score(self, trajectory: Trajectory, prompt: Prompt) -> tuple[float, bool]:
        """The score of what was written, and whether a reward failed."""
        try:
            return self._rewards.score(self._processor.tokenizer.decode(trajectory.output_T), prompt), False
        except RewardError:
            if self.config.on_reward_error == "raise":
                raise
            return 0.0, True

    def _generator(self, params: dict) -> Generator:
        """Samples with the trainer's own arrays, as far as they lie on the mesh of the rollouts."""
        on = self._mesh, self._rollout_mesh
        return trainer_generator(self.model, params, self._processor, *on, self._delimiter_ids)

    def _fits(self, prompt: Prompt, sample: Sample) -> None:
        knob = f"stages.{self._stage.name}.task.max_new_tokens"
        check_fits(self._data, prompt, sample, longest_answer(self.config, self.model.speech), knob)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _part(self, part: int) -> list[WeightedTrajectory]:
        """The trajectories of a minibatch."""
        chosen = np.array_split(np.arange(len(self._weighted)), self.config.minibatches)[part]
        return [self._weighted[n] for n in chosen]

    def _make_rows(self, part: int, params: dict, first_time: bool) -> Rows:
        """A minibatch on the devices, with what the reference says of it."""
        weighted = self._part(part)
        rows = pack_trajectories(
            [item.trajectory for item in weighted],
            [item.advantage for item in weighted],
            self._data,
            self.model,
            self._at_once,
            self._beta,
            shards("tokens", self._mesh),
            self.config.invocation,
            self._processor.tile,
        )
        count = int((rows.batch.text.weights_BT > 0).sum())
        rows = put(rows, batch_sharding(self._mesh, leading=1))
        if not self.config.kl:
            return rows
        ref_BT = self._of_reference(self._reference_params(params), rows.batch)
        if self.config.adaptive_kl and first_time:
            self._kl += float(jnp.sum(k3(rows.old_logp_BT, ref_BT), where=rows.batch.text.weights_BT > 0))
            self._kl_tokens += count
        return dataclasses.replace(rows, ref_logp_BT=jax.device_put(ref_BT, rows.old_logp_BT.sharding))

    def _at_start(self, params: dict) -> Flat:
        """The trained parameters as they were at the start of the stage, in the dtype they are used in."""
        if self.config.reference != "start":
            return {}
        axes = flatten(self.model.axes())
        if self._restored:
            start, _ = origin(self._experiment, self._stage, self.model, self._workdir)
            abstract = flatten(self.model.abstract())
            places = flatten(param_shardings(self._mesh, self.model.abstract(), self.model.axes()))
            params = start(unflatten(storage(self._split, abstract, axes, places, self.model.dtype)))
        trained, _ = self._split.part(flatten(params))

        def copied(trained: Flat) -> Flat:
            dtypes = {path: held_dtype(path, axes[path], self.model.dtype) for path in trained}
            return {path: jnp.array(x, dtypes[path], copy=True) for path, x in trained.items()}

        return jax.jit(copied, out_shardings={path: x.sharding for path, x in trained.items()})(trained)

    def _reference_params(self, params: dict) -> dict:
        if self.config.reference == "start":
            return unflatten({**flatten(params), **self._reference})
        return imported(self.config.reference, "reference")(params)


def _has_formed(experiment: Experiment, stage: StageConfig) -> bool:
    """Whether a stage before trains the memory, or the run starts from a checkpoint with one."""
    before = experiment.stages[: experiment.stages.index(stage)]
    paths = list(flatten(VLM(experiment.model).abstract()))
    if before and any(path.startswith("memory/") for path in changed(experiment, before[-1], paths)):
        return True
    if experiment.init is None:
        return False
    return checkpoint_of(experiment.init) is not None or released(experiment.init).model.memory is not None


def longest_answer(config: RLConfig, speech: Speech | None) -> int:
    """Most tokens that may follow a prompt, latent ones included. Raises ValueError for more memories than may be."""
    return config.max_new_tokens + (config.invocation.budget(speech) * (speech.latents + 1) if speech else 0)


class Scores:
    """Scores of outputs, computed by threads while more is drawn, each on one host."""

    def __init__(self, futures: dict[int, Future]):
        """`futures`: number of the output -> its score and whether a reward failed, of those of this host."""
        self._futures = futures

    @functools.cached_property
    def _all(self) -> list[tuple[float, bool]]:
        own: dict[str, Any] = {"error": ""}
        cause = None
        try:
            own["scores"] = {number: future.result() for number, future in self._futures.items()}
        except RewardError as error:
            own["error"], cause = str(error), error
        each = [json.loads(content) for content in hosts.gather(json.dumps(own).encode())]
        if errors := [host["error"] for host in each if host["error"]]:
            raise RewardError(errors[0]) from cause
        found = {int(number): tuple(score) for host in each for number, score in host["scores"].items()}
        return [found[number] for number in range(len(found))]

    @property
    def of_all(self) -> np.ndarray:
        """Of all outputs, in order. Raises RewardError on every host where a reward failed on one."""
        return np.array([score for score, _ in self._all])

    @property
    def failed(self) -> int:
        """Outputs for which a reward failed."""
        return sum(failed for _, failed in self._all)


def _until_first_call(trajectory: Trajectory) -> list[int]:
    end = trajectory.invocations[0].place if trajectory.invocations else None
    return trajectory.tokens_T[:end].tolist()


def _as_json(item: WeightedTrajectory) -> dict[str, Any]:
    """Exact: a float32 is a float64, and JSON gives that back as it was."""
    t = item.trajectory
    return {
        "key": list(item.key),
        "tokens": t.tokens_T.tolist(),
        "logp": [None if math.isnan(x) else x for x in t.logp_T.tolist()],
        "loss": t.loss_T.tolist(),
        "stopped": t.stopped,
        "advantage": item.advantage,
        "invocations": [
            {
                "place": memory.place,
                "kind": memory.kind,
                "latents": memory.latents,
                "shape": list(memory.states_LD.shape),
                "states": base64.b64encode(memory.states_LD.tobytes()).decode(),
            }
            for memory in t.invocations
        ],
    }


def _from_json(fields: dict[str, Any], prompt: Sample, dtype: Any) -> WeightedTrajectory:
    """`dtype`: that of the model, in which the states of memories are."""
    logp_T = np.array([math.nan if x is None else x for x in fields["logp"]], np.float32)
    invocations = tuple(
        Invocation(
            memory["kind"],
            memory["place"],
            memory["latents"],
            np.frombuffer(base64.b64decode(memory["states"]), dtype).reshape(memory["shape"]),
        )
        for memory in fields["invocations"]
    )
    tokens_T, loss_T = np.array(fields["tokens"], np.int32), np.array(fields["loss"], bool)
    trajectory = Trajectory(prompt, tokens_T, logp_T, loss_T, fields["stopped"], invocations)
    return WeightedTrajectory(tuple(fields["key"]), trajectory, fields["advantage"])
