"""The kernels compile for TPUs that are not there, forward and backward, and keep no scores in HBM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("libtpu")
CHIPS = ("v5e", "v5p", "v6e")

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from benchmarks.tpu_static import compile_for
from kernels_pallas import append_to_cache, cached_attention, causal_attention
from kernels_pallas import memory_attention, rope_dhr, rotary_tables

QUERIES, SLOTS = 8192, 2048  # of the case whose scores would be large
shape = jax.ShapeDtypeStruct


def attend(t, m, heads=(2, 1), width=128, kind=jnp.bfloat16, backward=True, **how):
    tables, segments, decode, plain = (how.get(key, False) for key in ("tables", "segments", "decode", "plain"))
    arrays = dict(q=shape((1, t, heads[0], width), kind), k=shape((1, m, heads[1], width), kind))
    arrays["v"] = arrays["k"]
    ints = {} if plain else {"q_pos": t} if decode else {"q_pos": t, "k_pos": m}
    if segments:
        ints |= {"q_segments": t, "k_segments": m}
    arrays |= {name: shape((1, n), jnp.int32) for name, n in ints.items()}

    def run(arrays):
        if tables:
            arrays = arrays | {n: rotary_tables(arrays[n], 1e6, width) for n in ("q_pos", "k_pos") if n in arrays}
        return memory_attention(**arrays, k_rotated=decode, implementation="tpu", chip=chip)

    if not backward:
        return run, (arrays,)
    qkv = {n: arrays.pop(n) for n in "qkv"}
    return jax.grad(lambda qkv, rest: run({**qkv, **rest}).astype(jnp.float32).sum()), (qkv, arrays)


def turn(x, positions):
    y, back = jax.vjp(lambda x: rope_dhr(x, positions, implementation="tpu"), x)
    return y, back(y)


def packed(length, heads, width=128, kind=jnp.bfloat16):
    q, k = (shape((1, length, n, width), kind) for n in heads)
    ids = shape((1, length), jnp.int32)

    def run(q, k, v, positions, segments, prefix):
        how = dict(positions=positions, segments=segments, prefix=prefix, implementation="tpu", chip=chip)
        y, back = jax.vjp(lambda *qkv: causal_attention(*qkv, **how), q, k, v)
        return y, back(y)

    return run, (q, k, k, ids, ids, ids)


def cached(tokens, heads, kind=jnp.bfloat16):
    q, k = (shape((2, tokens, n, 128), kind) for n in heads)
    ids, kept = shape((2,), jnp.int32), shape((3, 2, heads[1], 2048, 128), kind)

    def run(q, k, v, k_cache, v_cache, start, count):
        how = dict(layer=start[0] % 3, start=start, count=count, implementation="tpu", chip=chip)
        kept = append_to_cache((k_cache, v_cache), (k, v), **how)
        return cached_attention(q, *kept, positions=start[:, None] + jnp.arange(tokens), **how), kept

    return run, (q, k, k, kept, kept, ids, ids)


said = {chip: {} for chip in sys.argv[1:]}
for chip in said:
    cases = {
        "long, segments": attend(QUERIES, SLOTS, segments=True),
        "few slots, head dim 64, segments": attend(512, 256, (4, 2), width=64, segments=True),
        "decode": attend(1, 1024, (4, 2), tables=True, decode=True, backward=False),
        "packed row with a prefix": packed(2048, (4, 2) if chip == "v5e" else (2, 1)),
        "chunk of a prompt on a cache": cached(512, (4, 2)),
        "token on a cache": cached(1, (4, 2)),
        "rope_dhr": (turn, (shape((1, 512, 4, 128), jnp.bfloat16), shape((1, 512), jnp.int32))),
    }
    if chip == "v5e":  # what no block size of a chip changes
        cases |= {
            "tables": attend(100, 640, (2, 2), tables=True),
            "odd sizes, fp32, head dim 80, segments": attend(100, 520, width=80, kind=jnp.float32, segments=True),
            "narrow heads side by side": attend(100, 520, (4, 4), width=64, plain=True),
            "packed row of odd length, fp32, head dim 80": packed(1000, (3, 1), 80, jnp.float32),
            "odd chunk of seven heads a group on a cache, fp32": cached(200, (7, 1), jnp.float32),
            "token of many heads on a cache": cached(1, (64, 64)),
            "decode of many heads": attend(16, 1024, (4, 2), tables=True, decode=True, backward=False),
        }
    for name, (run, arguments) in cases.items():
        try:
            said[chip][name] = compile_for(chip, run, arguments).memory_analysis().temp_size_in_bytes
        except Exception as error:
            said[chip][name] = repr(error)[:1500]
print(json.dumps({"said": said, "scores": QUERIES * SLOTS}))
"""


@pytest.fixture(scope="module")
def answer():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    command = [sys.executable, "-c", PROGRAM, *CHIPS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_compile_and_keep_no_scores_in_hbm(answer, chip):
    failed = {name: said for name, said in answer["said"][chip].items() if isinstance(said, str)}
    assert not failed, failed
    assert answer["said"][chip]["long, segments"] < answer["scores"]  # less than even a mask [T, M]
