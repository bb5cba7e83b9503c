"""A task so small that the loop is all that is tested: fit y = x W + b in two layers, on numbers made from the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlmem_jax import families
from vlmem_jax.checkpoint import CheckpointConfig
from vlmem_jax.data import DataConfig
from vlmem_jax.processing import ImageConfig
from vlmem_jax.runtime import sharding
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.loop import StepInput

ROWS, D, H, C = 8, 8, 4, 2
CHECKPOINT = CheckpointConfig(every=4, keep_last=2, keep_best=1)


class Model:
    dtype = jnp.dtype(jnp.float32)

    def abstract(self):
        def shape(*sizes):
            return jax.ShapeDtypeStruct(sizes, jnp.float32)

        return {
            "first": {"kernel": shape(D, H, C), "bias": shape(H, C)},
            "second": {"kernel": shape(H, C, D), "scale": shape(D)},
        }

    def axes(self):
        return {
            "first": {"kernel": ("embed", "heads", "head_dim"), "bias": ("heads", "head_dim")},
            "second": {"kernel": ("heads", "head_dim", "embed"), "scale": ("norm",)},
        }

    def start(self):
        """Random numbers on the host, always the same."""
        rng = np.random.default_rng(1)
        return jax.tree.map(lambda x: rng.normal(0, 1 / 3, x.shape).astype(x.dtype), self.abstract())

    def rates(self):
        return {}

    def metrics(self, params):
        return {"gate/first": params["first"]["bias"][0, 0]}


class Task:
    """`poison`: the step whose targets hold a NaN; `weightless`: steps with nothing to learn.

    `noise` in the loss depends on the key, as drop path does.
    """

    def __init__(self, experiment, stage, model, mesh, poison=None, noise=0.01, weightless=()):
        self.model, self.stage, self.mesh, self.poison, self.noise = Model(), stage, mesh, poison, noise
        self.weightless = weightless
        self.score = jax.jit(lambda params, rows: self.loss(params, rows, None)[0])
        self.seen, self.evaluations, self.closed = [], 0, False

    def work(self, step, params):
        rng = np.random.default_rng(step)
        x = rng.normal(size=(self.stage.accumulation, ROWS // self.stage.accumulation, D)).astype(np.float32)
        y = np.roll(x, 1, axis=-1) * 2
        if step == self.poison:
            y[0, 3, 0] = np.nan
        self.seen.append(step)
        if step in self.weightless:
            x, y = np.zeros_like(x), np.zeros_like(y)
        batch = jax.device_put({"x": x, "y": y}, sharding.batch_sharding(self.mesh, leading=1))
        ids = [f"numbers.jsonl:{step * ROWS + row}" for row in range(ROWS)]
        counts = {"tokens": 30, "images": 3, "tiles": 5, "slots": 40, "flops": 1_000_000, "shape_flops": 1_250_000}
        return StepInput(batch, 0.0 if step in self.weightless else float(ROWS), ids, counts)

    def loss(self, params, rows, key):
        hidden = jnp.einsum("bd,dhc->bhc", rows["x"], params["first"]["kernel"]) + params["first"]["bias"]
        if key is not None:
            hidden *= 1 + self.noise * jax.random.normal(key, hidden.shape[1:])
        out = jnp.einsum("bhc,hcd->bd", jnp.tanh(hidden), params["second"]["kernel"]) * params["second"]["scale"]
        error = jnp.square(out - rows["y"]).sum()
        return error, {"absolute": jnp.abs(out - rows["y"]).sum()}

    def evaluate(self, params):
        self.evaluations += 1
        batch = jax.tree.map(lambda x: x[0], self.work(10_000, params).batch)
        self.seen.pop()
        return {"loss": float(self.score(params, batch)) / ROWS}

    def state(self):
        return {"worked": len(self.seen)}

    def restore(self, state):
        self.restored = state

    def close(self):
        self.closed = True


def experiment(tokenizer=".", **changes):
    """One stage of 12 steps; `changes` are fields of Experiment, or of its stage if it has them."""
    stage = StageConfig("only", 12, 1e-2)
    fields = {field.name for field in dataclasses.fields(StageConfig)} - {"optimizer", "data"}
    stage = dataclasses.replace(stage, **{key: changes.pop(key) for key in list(changes) if key in fields})
    defaults = {"eval_every": 4, "log_every": 1, "data": DataConfig(rows=ROWS)}
    values = {"model": families.resolve({"preset": "tiny"}), "tokenizer": tokenizer, "stages": (stage,), **defaults}
    values["image"] = ImageConfig()
    return Experiment(**{**values, "checkpoint": CHECKPOINT, **changes})
