"""Gradients in bf16 equal those in fp32, parameter by parameter: no sum over tokens is rounded on the way."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmem_jax.families import resolve
from vlmem_jax.models import VLM
from vlmem_jax.runtime.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings
from vlmem_jax.train.next_token import next_token_loss
from vlmem_jax.trees import flatten
from vlmem_jax.types import Batch, FormationInputs, Geometry

ROWS, TOKENS, TILES, TIMES = 8, 256, 8, 2
COMMON = 7
"""The token that nearly all of them are."""
SMALL = 1e-3
"""Gradients below this share of their layer's largest are compared by their absolute error."""

MODELS = {
    "comemo": {
        "preset": "tiny", "decoder": {"layers": 2, "qkv_bias": True},
        "adapters": [{"name": "one", "targets": ["q", "o", "down"], "vision": ["v", "fc1"]}],
    },
    "vismem": {
        "preset": "tiny_qwen2_5_vl", "decoder": {"layers": 2}, "vision": {"layers": 2},
        "memory": {"kind": "vismem", "memory_output": "rescaled", "lora": {"dropout": 0.0}},
    },
    "deep": {
        "preset": "tiny_qwen3_vl", "memory": None, "decoder": {"layers": 2}, "vision": {"layers": 3},
        "adapters": [{"name": "one", "targets": ["k"], "vision": ["q", "fc2"]}],
    },
    "vlm2": {"preset": "tiny_llava_video", "memory": "vlm2", "decoder": {"layers": 2}, "vision": {"layers": 2}},
}  # fmt: skip


POOLED = 4
"""Visual tokens that one stands for in the text, where patches are seen."""


def random_params(vlm: VLM) -> dict:
    """Nothing at a start where it has no effect: gates, biases, scales and the second halves of adapters are random."""
    rng = np.random.default_rng(2)

    def open_up(leaf):
        return jnp.asarray(np.asarray(leaf) + rng.normal(0, 0.1, leaf.shape), leaf.dtype)

    return jax.tree.map(open_up, vlm.fresh(jax.random.key(1)))


def batch(vlm: VLM) -> Batch:
    """Rows of one sample each: visual tokens, latent ones where a memory speaks, then text, most of it one token."""
    rng = np.random.default_rng(5)  # the gradients of gains nearly cancel in others
    patches = vlm.tile.layout
    tile = vlm.tile._replace(pooled=True) if patches else vlm.tile
    b, M = Batch.empty((ROWS,), TOKENS, TILES, tile), TILES * tile.tokens
    T = np.arange(TOKENS, dtype=np.int32)
    tokens = np.where(rng.random((ROWS, TOKENS)) < 0.9, COMMON, rng.integers(5, 100, (ROWS, TOKENS))).astype(np.int32)
    slots = np.broadcast_to(np.where(T < M, T, -1), (ROWS, TOKENS)).astype(np.int32)
    heard = None
    if speech := vlm.speech:
        N, D = TIMES * speech.latents, vlm.config.decoder.width
        slots = np.where((T >= M) & (T < M + N), T, slots).astype(np.int32)
        tokens[:, M + N : M + N + 2] = speech.invoke_ids
        states = rng.normal(size=(ROWS, TIMES, 32, D)).astype(np.float32)
        kinds = np.tile(np.arange(TIMES, dtype=np.int32), (ROWS, 1))
        heard = FormationInputs(states, np.full((ROWS, TIMES), 30, np.int32), kinds)
    positions = np.broadcast_to(T if b.text.positions_BT.ndim == 2 else T[:, None], b.text.positions_BT.shape)
    if b.views.layout_BI4 is not None:
        I = np.arange(TILES, dtype=np.int32)
        b.views.pool_BM[:] = np.arange(M) // POOLED
        slots = np.where(slots < M, slots // POOLED, slots)
        b.views.layout_BI4[:] = np.stack([1 + I // 4 * 4, np.ones_like(I), I // 4, I % 4], axis=-1)
    memory = vlm.config.memory
    if getattr(memory, "geometry_width", 0):
        N, widths = vlm.config.vision.grid**2, (memory.geometry_width, memory.view_width, 3)
        b = b.replace(geometry=Geometry(*(rng.normal(size=(ROWS, TILES, N, w)).astype(np.float32) for w in widths)))
    b = b.replace(
        tokens_BT=tokens, targets_BT=np.roll(tokens, -1, 1), weights_BT=b.text.weights_BT + 1, positions_BT=positions,
        segments_BT=b.text.segments_BT + 1, visual_index_BT=slots, segments_BM=b.views.segments_BM + 1, formation=heard,
        pixels_BISSc=rng.integers(0, 256, b.views.pixels_BISSc.shape, np.uint8),
        positions_BM=positions[:, :M],
    )  # fmt: skip
    return jax.tree.map(jnp.asarray, b)


def gradients(vlm: VLM, params: dict, rows: Batch) -> dict[str, np.ndarray]:
    """Of the mean loss, on the ambient mesh if there is one; a layer's own, and q, k, v of a fused map apart."""
    loss = lambda params: next_token_loss(vlm, params, rows, 128) / rows.text.weights_BT.size  # noqa: E731
    found, axes, each = flatten(jax.jit(jax.grad(loss))(params)), flatten(vlm.axes()), {}
    for path, leaf in found.items():
        leaf = np.asarray(leaf)
        layers = leaf if leaf.ndim > len(axes[path]) else leaf[None]
        for n, layer in enumerate(layers):
            at = axes[path].index("qkv") if "qkv" in axes[path] else None
            parts = [layer] if at is None else np.moveaxis(layer, at, 0)
            each |= {f"{path}[{n}]" + ("qkv"[m] if at is not None else ""): part for m, part in enumerate(parts)}
    return each


def differences(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """What differs, in words; and the names of the tensors that were compared by absolute error."""
    said, small, largest = [], [], {}
    rms = {name: np.sqrt(np.mean(np.square(leaf, dtype=np.float64))) for name, leaf in exact.items()}

    def layer(name: str) -> tuple[str, str]:
        path, _, number = name.partition("[")
        return "/".join(path.split("/")[:2]), number.partition("]")[0]

    for name, size in rms.items():
        largest[layer(name)] = max(size, largest.get(layer(name), 0.0))
    for name, leaf in exact.items():
        limit, other = largest[layer(name)], found[name]
        if rms[name] < SMALL * limit:
            small.append(name)
            error = np.sqrt(np.mean(np.square(other - leaf)))
            if error > 0.02 * limit:
                said.append(f"{name}: error {error:.2g}, the layer's largest gradient is {limit:.2g}")
            continue
        norms = [np.linalg.norm(x) for x in (other, leaf)]
        cosine, ratio = np.vdot(other, leaf) / np.prod(norms), norms[0] / norms[1]
        if cosine < 0.99 or not 0.9 < ratio < 1.1:
            said.append(f"{name}: cosine {cosine:.4f}, ratio of norms {ratio:.3f}")
    return said, small


KERNELS = dict(zip(MODELS, itertools.cycle(["tpu_interpret", "gpu_interpret"]), strict=False))
"""The kernel of packed rows that a model is trained through here."""


@pytest.fixture(scope="module", params=MODELS)
def world(request):
    vlm = VLM(resolve(MODELS[request.param] | {"compute_dtype": "bfloat16"}))
    params, rows = random_params(vlm), batch(vlm)
    exact = VLM(dataclasses.replace(vlm.config, compute_dtype="float32"))
    return vlm, params, rows, gradients(exact, params, rows), KERNELS[request.param]


def test_gradients_in_bf16_are_those_in_fp32(world):
    vlm, params, rows, exact, _ = world
    said, small = differences(gradients(vlm, params, rows), exact)
    print("compared by absolute error:", *small, sep="\n")
    assert not said, "\n".join(said)


@pytest.mark.slow
def test_gradients_in_bf16_through_the_kernel_for_packed_rows_are_those_in_fp32(world, packed_kernel):
    vlm, params, rows, exact, kernel = world
    packed_kernel(kernel)
    said, _ = differences(gradients(vlm, params, rows), exact)
    assert not said, "\n".join(said)


def test_gradients_in_bf16_on_eight_devices_are_those_in_fp32(world):
    vlm, params, rows, exact, _ = world
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(jax.device_get(params), param_shardings(mesh, vlm.abstract(), vlm.axes()))
        found = gradients(vlm, placed, jax.device_put(jax.device_get(rows), batch_sharding(mesh)))
    said, _ = differences(found, exact)
    assert not said, "\n".join(said)
