"""Rollouts: several answers to each prompt, drawn by the generation loop, and what training needs to know of them."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from vlmem_jax.generate import Generator, SamplingConfig
from vlmem_jax.generate.loop import FINISHED
from vlmem_jax.sharding import batch_shards
from vlmem_jax.types import IGNORED, Sample


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What followed a prompt, on the host: T tokens, the one that ended it included."""

    prompt: Sample
    tokens_T: Int32[np.ndarray, "T"]
    logp_T: Float32[np.ndarray, "T"]
    """Log-probability of each token when it was drawn, see `generate.sampling.choose`."""
    loss_T: Bool[np.ndarray, "T"]
    """Which tokens the policy drew; the others were put there and teach nothing."""
    stopped: bool
    """Whether a stop id ended it; if not, it was cut off."""

    @property
    def output_T(self) -> Int32[np.ndarray, "T"]:
        """The tokens without the stop id."""
        return self.tokens_T[:-1] if self.stopped else self.tokens_T

    def sample(self) -> Sample:
        """Prompt and tokens as a training sample whose targets are the drawn tokens."""
        prompt, count = self.prompt, len(self.tokens_T)
        positions_T = prompt.positions_T.max() + 1 + np.arange(count, dtype=np.int32)
        if prompt.positions_T.ndim == 2:
            positions_T = np.repeat(positions_T[:, None], prompt.positions_T.shape[1], axis=1)
        targets_T = np.where(self.loss_T, self.tokens_T, np.int32(IGNORED))
        return dataclasses.replace(
            prompt,
            tokens_T=np.concatenate([prompt.tokens_T, self.tokens_T]),
            labels_T=np.concatenate([np.full_like(prompt.tokens_T, IGNORED), targets_T]),
            positions_T=np.concatenate([prompt.positions_T, positions_T]),
            slots_T=np.concatenate([prompt.slots_T, np.full(count, -1, np.int32)]),
        )


def rollouts(
    generator: Generator,
    prompts: Sequence[Sample],
    sampling: SamplingConfig,
    keys_PG: Array,
    rows: int,
) -> Iterator[tuple[int, list[Trajectory]]]:
    """(which of `prompts`, its G trajectories), prompts of like size together, about `rows` trajectories at a time.

    Each prompt is read once for its G trajectories. Trajectory g of prompt p is drawn with the random key `keys_PG[p,
    g]`, whatever else is in the batch.
    """
    G = keys_PG.shape[1]
    shards = batch_shards(generator.mesh) if generator.mesh else 1
    at_once = min(-(-max(rows // G, 1) // shards) * shards, len(prompts))
    order = sorted(range(len(prompts)), key=lambda n: (len(prompts[n].pixels_ISSc), len(prompts[n].tokens_T)))
    for first in range(0, len(order), at_once):
        chosen = order[first : first + at_once]
        session = generator.start([prompts[n] for n in chosen], sampling.max_new_tokens, at_once, copies=G)
        slots = session.logits_BV.shape[0]
        keys_B = keys_PG[np.array(chosen)].reshape(-1)
        padding_B = jnp.broadcast_to(keys_B[:1], slots - len(keys_B))
        drawn = list(session.draw(sampling, jnp.concatenate([keys_B, padding_B])))
        tokens_BT, logp_BT = (np.stack(part, axis=1) for part in zip(*drawn, strict=True))
        for place, n in enumerate(chosen):
            group = slice(place * G, (place + 1) * G)
            yield (
                n,
                [
                    _trajectory(prompts[n], *row, generator.stop_ids)
                    for row in zip(tokens_BT[group], logp_BT[group], strict=True)
                ],
            )


def _trajectory(prompt: Sample, tokens_T: np.ndarray, logp_T: np.ndarray, stop_ids: Sequence[int]) -> Trajectory:
    count = int((tokens_T != FINISHED).sum())
    tokens_T = tokens_T[:count].astype(np.int32)
    stopped = bool(np.isin(tokens_T[-1], stop_ids))
    return Trajectory(prompt, tokens_T, logp_T[:count].astype(np.float32), np.ones(count, bool), stopped)


def rollout_keys(seed: int, stage: int, phase: int, prompts: int, group: int) -> Array:
    """Random keys [prompts, group] of a phase: equal numbers, equal draws."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stage), phase)
    return jax.vmap(lambda key: jax.random.split(key, group))(jax.random.split(key, prompts))
