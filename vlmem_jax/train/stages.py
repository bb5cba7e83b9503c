"""What a stage trains and what it leaves alone, and from where it starts."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from vlmem_jax.nn.linear import held_dtype
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.trees import Flat


@dataclasses.dataclass(frozen=True)
class Split:
    """The parameters of a model in two parts: trained in fp32, and frozen."""

    trainable: frozenset[str]
    frozen: frozenset[str]

    @classmethod
    def of(cls, stage: StageConfig, paths: list[str]) -> "Split":
        """Sorts `paths` by the stage's expressions. Raises ValueError if nothing is left to train."""

        def matches(patterns: tuple[str, ...], path: str) -> bool:
            return any(re.match(pattern, path) for pattern in patterns)

        trainable = {path for path in paths if matches(stage.trainable, path) and not matches(stage.frozen, path)}
        if not trainable:
            raise ValueError(
                f"stages.{stage.name} trains nothing: trainable {list(stage.trainable)} without frozen "
                f"{list(stage.frozen)} matches none of the {len(paths)} parameters, such as {paths[0]}"
            )
        return cls(frozenset(trainable), frozenset(paths) - trainable)

    def part(self, params: Flat) -> tuple[Flat, Flat]:
        """(trainable, frozen) of any flat tree of the model."""
        return (
            {path: leaf for path, leaf in params.items() if path in self.trainable},
            {path: leaf for path, leaf in params.items() if path in self.frozen},
        )


def changed(experiment: Experiment, stage: StageConfig, paths: list[str]) -> frozenset[str]:
    """Which of `paths` differ, after `stage`, from where the experiment started."""
    until = experiment.stages[: experiment.stages.index(stage) + 1]
    return frozenset().union(*(Split.of(one, paths).trainable for one in until))


def storage(split: Split, abstract: Flat, axes: Flat, shardings: Flat, compute_dtype: Any) -> Flat:
    """Shape, dtype and sharding in which a stage holds each parameter.

    Trained ones are fp32, for frozen ones see `held_dtype`.
    """

    def held(path: str) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if path in split.trainable else held_dtype(path, axes[path], compute_dtype)
        return jax.ShapeDtypeStruct(abstract[path].shape, dtype, sharding=shardings[path])

    return {path: held(path) for path in abstract}
