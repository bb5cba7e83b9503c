"""Rollouts: several answers to each prompt, drawn by the engine, and what training needs to know of them."""

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from vlmem_jax.generate import Generator, InvocationConfig, SamplingConfig, never_sampled
from vlmem_jax.generate.pools import Pool
from vlmem_jax.generate.requests import Handle, Request
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import check_heads, serving_mesh
from vlmem_jax.models.vlm import Params
from vlmem_jax.processing import Processor
from vlmem_jax.rl.episodes import Step
from vlmem_jax.runtime.sharding import MeshConfig, batch_shards, make_mesh, param_shardings
from vlmem_jax.trees import flatten, unflatten
from vlmem_jax.types import Sample

MayStop = Callable[[], None]
"""Called where work may be broken off, by an exception; on all hosts alike, see `train.loop.Task`."""


def never() -> None:
    """Of work that is not broken off."""


def rollouts(
    generator: Generator,
    prompts: Sequence[Sample],
    sampling: SamplingConfig,
    keys_PG: Array,
    rows: int,
    invocation: InvocationConfig = InvocationConfig(),
    forced: Sequence[Sequence[Sequence[int]]] = (),
    record: bool = False,
    may_stop: MayStop = never,
) -> Iterator[tuple[int, list[Step]]]:
    """(which of `prompts`, its G answers) as they are done, about `rows` answers at a time.

    Each prompt is read once for its G answers. Answer g to prompt p is drawn with the random key `keys_PG[p,
    g]`, whatever else is drawn beside it, and begins with the tokens `forced[p][g]`. `record`: with what memories were
    formed from. `may_stop` is called before each token.
    """
    G, key_PG2 = keys_PG.shape[1], np.asarray(jax.random.key_data(keys_PG))
    shards = batch_shards(generator.mesh) if generator.mesh else 1
    asked = [
        [
            Request(prompt, sampling, invocation, key_PG2[p, g], forced[p][g] if forced else (), record=record)
            for g in range(G)
        ]
        for p, prompt in enumerate(prompts)
    ]
    pool = Pool(generator, -(-min(rows, len(prompts) * G) // shards) * shards)
    live = dict(enumerate(pool.fork_all(asked)))
    while live:
        may_stop()
        pool.engine.step()
        for p in [p for p, handles in live.items() if all(handle.reason for handle in handles)]:
            yield p, [_step(prompts[p], handle) for handle in live.pop(p)]


def _step(prompt: Sample, handle: Handle) -> Step:
    """Raises RuntimeError for an answer that failed."""
    handle.result()
    logp_T = np.array(handle.logp, np.float32)
    tokens_T, stopped = np.array(handle.tokens, np.int32), handle.reason == "stop"
    return Step(prompt, tokens_T, logp_T, ~np.isnan(logp_T), stopped, tuple(handle.invocations))


def rollout_mesh(config: MeshConfig | None, vlm: VLM, mesh: Mesh) -> Mesh:
    """Where a trainer on `mesh` samples; `mesh` itself where that splits no more than rows and heads.

    Raises ValueError for a mesh that does not fit the devices or the model.
    """
    devices = list(mesh.devices.flat)
    if config is None and mesh.shape["fsdp"] * mesh.shape["context"] == 1:
        return mesh
    own = make_mesh(config or serving_mesh(vlm, devices), devices)
    check_heads(vlm.config, own)
    return own


def placed(vlm: VLM, mesh: Mesh, drawn_on: Mesh) -> str:
    """Where a trainer on `mesh` samples and what that takes, for its report."""
    split = " ".join(f"{axis}={size}" for axis, size in drawn_on.shape.items() if size > 1) or "one device"
    if drawn_on == mesh:
        return f"rollouts on the mesh of training ({split}), with the parameters where they lie"
    held = jax.tree.leaves(vlm.held(param_shardings(drawn_on, vlm.abstract(), vlm.axes())))
    size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in held)
    return f"rollouts on a mesh of {split}; once a phase, a device gets the {size:,} bytes of parameters it has there"


def trainer_generator(
    vlm: VLM,
    params: Params,
    processor: Processor,
    mesh: Mesh,
    drawn_on: Mesh | None = None,
    delimiter_ids: Sequence[int] = (),
) -> Generator:
    """Samples with the arrays of a trainer on `mesh`; those of another dtype, or all if `drawn_on` is another mesh, are
    laid out anew, once."""
    places = param_shardings(drawn_on or mesh, vlm.abstract(), vlm.axes())
    held, flat = flatten(vlm.held(places)), flatten(params)
    flat = {path: x.astype(held[path].dtype) for path, x in flat.items()}
    if drawn_on not in (None, mesh):
        places = flatten(places)
        flat = jax.device_put(flat, {path: places[path] for path in flat})
    return Generator(
        vlm,
        unflatten(flat),
        stop_ids=processor.stop_ids,
        banned_ids=never_sampled(processor, vlm),
        delimiter_ids=delimiter_ids,
        tile=processor.tile,
        mesh=drawn_on or mesh,
    )


def rollout_keys(seed: int, stage: int, phase: int, prompts: int, group: int) -> Array:
    """Random keys [prompts, group] of a phase: equal numbers, equal draws."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stage), phase)
    return jax.vmap(lambda key: jax.random.split(key, group))(jax.random.split(key, prompts))
