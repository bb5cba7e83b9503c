"""Supervised training: predict the next token of packed conversations about images."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from vlmem_jax.config import ConfigError
from vlmem_jax.data import EvalData, HostBatch, Plan, TrainData, store
from vlmem_jax.hub import repos
from vlmem_jax.models import VLM
from vlmem_jax.models.flops import train_flops
from vlmem_jax.paths import as_path
from vlmem_jax.processing import Processor, Tokenizer, make_processor
from vlmem_jax.runtime.compiler import options
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.loop import StepInput
from vlmem_jax.train.loss import cross_entropy, log_probs
from vlmem_jax.train.stages import Split
from vlmem_jax.trees import flatten
from vlmem_jax.types import Batch


@dataclasses.dataclass
class NextTokenLoss:
    """The `next_token` task without its data: weighted cross-entropy of the answers' tokens (CoMemo sec. 4)."""

    model: VLM
    chunk: int
    """Tokens of a row whose logits exist at the same time."""

    def loss(
        self, params: dict, rows: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `next_token_loss`."""
        return next_token_loss(self.model, params, rows, self.chunk, key), {}


class NextToken(NextTokenLoss):
    """The `next_token` task. Its data continue where those of earlier stages with the same data ended."""

    def __init__(
        self,
        experiment: Experiment,
        stage: StageConfig,
        model: VLM,
        mesh: Mesh,
        workdir: str | os.PathLike | None = None,
    ):
        """Pack plans are kept in `data.plan_folder`, else in `workdir`, if there is one."""
        super().__init__(model, experiment.loss_chunk)
        self._mesh = mesh
        self._config = config = experiment.data_of(stage)
        processor = experiment_processor(experiment, model)
        earlier = experiment.stages[: experiment.stages.index(stage)]
        first = sum(other.steps for other in earlier if experiment.data_of(other) == config)
        plan = Plan.train(config, processor, experiment.seed)
        held_out = Plan.eval(config, processor) if config.eval else None
        folder = config.plan_folder or (workdir and as_path(workdir) / "plans")
        wanted = ((plan, (first + stage.steps) * config.rows), (held_out, None))
        kept = [store(part, folder, rows) for part, rows in wanted if folder and part is not None]
        parts = experiment.parts(stage, mesh)
        self._data = TrainData(plan, stage.steps, accumulation=parts, mesh=mesh, first_step=first)
        self.report = "; ".join([plan.report(), *kept])
        self._trained = Split.of(stage, list(flatten(model.abstract()))).trainable
        self._eval = None if held_out is None else EvalData(held_out, mesh=mesh)
        self._batches: Iterator[HostBatch] | None = None
        self._next = -1

    @staticmethod
    def check(experiment: Experiment, stage: StageConfig) -> None:
        """Raises ConfigError for keys of another task."""
        if keys := ", ".join(stage.task_keys):
            raise ConfigError(f"config.stages.{stage.name}.task: next_token has no keys, got {keys}")

    def work(self, step: int, params: dict) -> StepInput:
        """The packed rows of `step`."""
        if step != self._next:
            self.close()
            self._batches = self._data.on_devices(self._mesh, step)
        host = next(self._batches)
        self._next = step + 1
        c, model = self._config, self.model.config
        counts = {"tokens": host.tokens, "images": host.images, "tiles": host.tiles, "slots": c.rows * c.pack_tokens}
        counts["flops"] = train_flops(model, host.sizes, self._trained)
        counts["shape_flops"] = train_flops(model, [(c.pack_tokens, c.pack_tiles)] * c.rows, self._trained)
        return StepInput(host.batch, host.denominator, host.sample_ids, counts)

    def evaluate(self, params: dict) -> dict[str, float]:
        """Mean loss on `data.eval`, weighted as in training."""
        if self._eval is None:
            return {}
        losses, weight = [], 0.0
        with contextlib.closing(self._eval.on_devices(self._mesh)) as batches:
            for host in batches:
                losses.append(eval_program(self._mesh)(self.model, params, host.batch, self.chunk))
                weight += host.denominator
        return {"loss": float(np.sum(jax.device_get(losses)) / weight)}

    def state(self) -> dict:
        """Empty: the data depend on the step alone."""
        return {}

    def restore(self, state: dict) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Ends the threads that decode ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches, self._next = None, -1


def next_token_loss(model: VLM, params: dict, rows: Batch, chunk: int, key: Array | None = None) -> Float[Array, ""]:
    """Sum of the weighted cross-entropies of packed rows, `chunk` tokens of each row at a time.

    With a key, paths of the vision tower are dropped.
    """
    hidden_BTD, kernel_DV = model.hidden(params, rows, key), model.head_kernel(params)
    if model.speech is None:
        return cross_entropy(hidden_BTD, kernel_DV, rows.text.targets_BT, rows.text.weights_BT, chunk)
    # the memory's own tokens have scores that the kernel does not give
    rescore = functools.partial(model.rescore, params)
    logp_BT = log_probs(hidden_BTD, kernel_DV, rows.text.targets_BT, chunk, rescore=rescore)
    return -(rows.text.weights_BT * logp_BT).sum()


@functools.cache
def eval_program(mesh: Mesh) -> Callable[[VLM, dict, Batch, int], Array]:
    """The compiled `next_token_loss` of a batch that is in one part; one for all stages."""

    def eval_loss(model: VLM, params: dict, batch: Batch, chunk: int) -> Float[Array, ""]:
        return next_token_loss(model, params, jax.tree.map(lambda x: x[0], batch), chunk)

    return jax.jit(eval_loss, static_argnums=(0, 3), out_shardings=PartitionSpec(), compiler_options=options(mesh))


def experiment_processor(experiment: Experiment, model: VLM) -> Processor:
    """The processor of an experiment. Raises ValueError where tokenizer or images do not fit the model."""
    tokenizer = Tokenizer.load(repos.folder(experiment.tokenizer), model.special_tokens)
    geometry, read = model.config.vision.geometry, (experiment.system, experiment.template, model.reads_beyond)
    processor = make_processor(tokenizer, experiment.image, geometry, *read, experiment.tile)
    highest, vocab = max(*processor.control_ids, *processor.stop_ids), model.config.decoder.vocab
    if highest >= vocab:
        raise ValueError(
            f"model.decoder.vocab must be above every token id, but the tokenizer in {experiment.tokenizer} has the id "
            f"{highest} and the model a vocabulary of {vocab}; set model.decoder.vocab={highest + 1} or more"
        )
    return processor
