"""The golden VisMem: sizes, weights and traces from its files, on the golden Qwen2.5-VL."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import qwen_golden

from vlmem_jax.generate import Engine, Generator, InvocationConfig, Request, SamplingConfig
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.memory import VisMemConfig
from vlmem_jax.models import VLM
from vlmem_jax.nn.encoder import EncoderConfig
from vlmem_jax.nn.lora import LoRAConfig
from vlmem_jax.runtime.shapes import PoolShape, bucket, tile_bucket
from vlmem_jax.types import IGNORED, Batch, DecodeState, Sample

TRACES = {
    "trace_tiny_llm_hidden": ("tiny_transformer", "llm_hidden_first_span"),
    "trace_lora_llm_hidden": ("lora_llm", "llm_hidden_first_span"),
    "trace_lora_vision_encoder": ("lora_llm", "vision_encoder"),
    "trace_tiny_reversed": ("tiny_transformer", "llm_hidden_first_span"),
    "trace_batch2": ("tiny_transformer", "vision_encoder"),
}
"""Former and visual states of each, by the README of the files."""

TEXT = 64
"""Rows have room for multiples of so many tokens."""


def load(golden: Path, former: str = "tiny_transformer", visual_states: str = "vision_encoder", adapter: str = "qv"):
    """The VLM, its parameters and the files, with one of the formers; `adapter` of lora_llm, by its file's name."""
    folder = golden / "vismem"
    content = json.loads((folder / "config.json").read_text())
    base = qwen_golden.load((golden / content["base"]).parent)
    params = dict(base.params)
    if (folder / "base_weights.npz").exists():
        weights = dict(np.load(folder / "base_weights.npz"))
        params = jax.tree.map(jnp.asarray, from_arrays(base.vlm.config, weights))
    files = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
    builder = part(files["query_builder"], "w.")
    tiny, lora = files["tiny_memory_former"], files[f"lora_former_{adapter}"]
    K, longest = len(builder["q_init"]), builder["pos_emb"].shape[1]
    ids = tuple(content["memory_token_ids"].values())
    targets = {name.split(".")[3].removesuffix("_proj"): None for name in lora if name.endswith("lora_A")}
    config = VisMemConfig(
        query_len=K,
        short_len=len(tiny["short.m_init"]),
        long_len=len(tiny["long.m_init"]),
        former=former,
        query_builder=sizes(builder, files["query_builder"]["num_heads"]),
        tiny=sizes(part(tiny, "short."), tiny["num_heads"]),
        lora=LoRAConfig(int(lora["r"]), float(lora["alpha"]), 0.0, tuple(targets)),
        visual_states=visual_states,
        max_visual_hidden=longest // 2,
        max_prompt_hidden=longest - longest // 2 - K,
        max_positions=longest,
        token_ids=ids,
        span_ids=(base.content["vision_start_token_id"], base.content["vision_end_token_id"]),
        start_id=0,
    )
    embed, kernel = params["decoder"]["embed"], base.vlm.head_kernel(params)
    memory = {
        "query_builder": {
            "q_init": builder["q_init"],
            "pos_emb": builder["pos_emb"][0],
            "encoder": encoder(builder, config.query_builder),
        },
        "special_in": embed[jnp.array(ids)],
        "special_out": kernel[:, jnp.array(ids)].T,
        "invoke_logit_bias": np.zeros(1, np.float32),
    }
    for kind in ("short", "long"):
        if former == "lora_llm":
            memory[kind] = {"m_init": lora[f"m_init_{kind}"][0], "lora": adapters(part(lora, f"{kind}."))}
        else:
            own = part(tiny, f"{kind}.")
            memory[kind] = {"m_init": own["m_init"], "encoder": encoder(own, config.tiny)}
    vlm = VLM(dataclasses.replace(base.vlm.config, memory=config))
    params = jax.tree.map(jnp.asarray, params | {"memory": memory})
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == jax.tree.map(lambda x: x.shape, vlm.abstract())
    return SimpleNamespace(vlm=vlm, base=base, params=params, files=files, content=base.content, ids=ids)


def part(arrays: dict, start: str) -> dict:
    """Those whose names begin so, without that beginning."""
    return {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}


def sizes(arrays: dict, heads: np.ndarray) -> EncoderConfig:
    """Those of an encoder by the shapes of its parameters, and its heads, which they do not tell."""
    hidden, width = arrays["encoder.layers.0.linear1.weight"].shape
    return EncoderConfig(sum(name.endswith("norm1.weight") for name in arrays), int(heads), hidden // width)


def encoder(arrays: dict, config: EncoderConfig) -> dict:
    """An Encoder's parameters from PyTorch's."""
    layers = [layer(part(arrays, f"encoder.layers.{n}."), config.heads) for n in range(config.layers)]
    norm = {"scale": arrays["ln.weight"], "bias": arrays["ln.bias"]}
    return {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers), "norm": norm}


def layer(arrays: dict, heads: int) -> dict:
    """One layer's; works for gradients too, where they are all there."""
    width = len(arrays["norm1.weight"])
    attn = {"o": {"kernel": arrays["self_attn.out_proj.weight"].T.reshape(heads, -1, width)}}
    attn["o"]["bias"] = arrays["self_attn.out_proj.bias"]
    packed = arrays["self_attn.in_proj_weight"], arrays["self_attn.in_proj_bias"]
    for n, name in enumerate("qkv"):
        attn[name] = dict(zip(("kernel", "bias"), projection(*packed, n, heads), strict=True))
    norms = {n: {"scale": arrays[f"{n}.weight"], "bias": arrays[f"{n}.bias"]} for n in ("norm1", "norm2")}
    mlp = {f"fc{n}": {"kernel": arrays[f"linear{n}.weight"].T, "bias": arrays[f"linear{n}.bias"]} for n in (1, 2)}
    return {"attn": attn, "mlp": mlp, **norms}


def projection(weight: np.ndarray, bias: np.ndarray, n: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of entry n of packed q, k and v."""
    width = weight.shape[1]
    own = slice(n * width, (n + 1) * width)
    return weight[own].T.reshape(width, heads, -1), bias[own].reshape(heads, -1)


def adapters(arrays: dict) -> dict:
    """The parameters of one kind's stacked adapters; works for gradients too."""
    found: dict = {}
    for name in sorted(arrays, key=lambda name: int(name.split(".")[1]) if name.startswith("layers.") else -1):
        if name.startswith("layers."):
            target, which = name.split(".")[2:]
            found.setdefault(target.removesuffix("_proj"), {}).setdefault(which[-1].lower(), []).append(arrays[name].T)
    return {target: {which: np.stack(each) for which, each in both.items()} for target, both in found.items()}


def rows(model, arrays: dict) -> list[SimpleNamespace]:
    """The prompts of a file, see `qwen_golden.rows`."""
    return qwen_golden.rows(arrays, model.content, model.vlm.config.vision.geometry)


@functools.cache
def programs(vlm: VLM) -> tuple[Callable, Callable]:
    """What prompts show, and reading them."""
    return jax.jit(vlm.see), jax.jit(vlm.prefill, static_argnums=2)


def padded(model, found: list[SimpleNamespace]) -> Batch:
    """Their rows; sizes are in buckets, so that prompts share compiled programs."""
    longest = max(len(row.tokens_T) for row in found)
    tiles = max(len(row.placed.slot_C) for row in found)
    return qwen_golden.batch(model.vlm, found, bucket(longest, TEXT), tile_bucket(tiles, model.vlm.tile))


def read(model, prompt: SimpleNamespace, new_tokens: int) -> tuple[jax.Array, DecodeState]:
    """Scores after a prompt, and the state, with room for so many tokens and all memories between them."""
    batch = padded(model, [prompt])
    capacity = batch.text.tokens_BT.shape[1] + bucket(new_tokens + model.vlm.speech.room, TEXT)
    return programs(model.vlm)[1](model.params, batch, capacity)


def engine(model, found: list[SimpleNamespace], new_tokens: int, forced: int) -> Engine:
    """One that has room for each of the prompts, and for all of them side by side."""
    batch = padded(model, found)
    tokens, tiles = batch.text.tokens_BT.shape[1], batch.views.pixels_BISSc.shape[1]
    shape = PoolShape.of(len(found), tokens + new_tokens + model.vlm.speech.room, tiles, forced)
    return Engine(Generator(model.vlm, model.params, stop_ids=()), shape.in_a_piece)


def requests(model, found: list[SimpleNamespace], traces: list["Trace"]) -> list[Request]:
    """Their prompts, whose patches are numbers that no picture has, to be answered as the traces were."""
    asked = []
    seen = programs(model.vlm)[0](model.params, padded(model, found).views)
    for n, (row, trace) in enumerate(zip(found, traces, strict=True)):
        T, axes, side = len(row.tokens_T), model.vlm.tile.axes, model.vlm.tile.side
        visual_index_T = np.full(T, -1, np.int32)
        visual_index_T[row.is_visual] = row.placed.slot_C
        text = Sample(
            tokens_T=row.tokens_T,
            labels_T=np.full(T, IGNORED, np.int32),
            positions_T=row.placed.positions_T,
            visual_index_T=visual_index_T,
            pixels_ISSc=np.zeros((0, side, side, model.vlm.tile.channels), np.uint8),
            visual_positions_M=np.zeros((0, axes), np.int32),
            layout_I4=np.zeros((0, 4), np.int32),
        )
        visual = jax.tree.map(lambda x, n=n: x[n : n + 1], seen)
        sampling = SamplingConfig(max_new_tokens=trace.sampled)
        asked.append(Request(text, sampling, trace.calls, forced=trace.forced, visual=visual, record=True))
    return asked


@dataclasses.dataclass
class Trace:
    """What was recorded of one row."""

    arrays: dict
    calls: InvocationConfig

    def __post_init__(self):
        a = self.arrays
        self.emitted = a["emitted_ids"].tolist()
        self.kinds, self.positions, self.logits = (a[f"call_{name}"] for name in ("kinds", "positions", "logits"))
        self.invocations = [part(a, f"inv{n}_") for n in range(sum(name.endswith("_H") for name in a))]

    @property
    def sampled(self) -> int:
        """Tokens that were chosen or forced."""
        return int((self.kinds == 1).sum())

    @property
    def forced(self) -> list[int]:
        """The first tokens, -1 where they were chosen."""
        schedule = dict(zip(self.arrays["schedule_steps"].tolist(), self.arrays["schedule_ids"].tolist(), strict=True))
        return [schedule.get(step, -1) for step in range(max(schedule) + 1)]


def traces(name: str, arrays: dict) -> list[Trace]:
    """Those of a file; of several rows they have a prefix each."""
    calls = InvocationConfig("delimiter_random", 0.0, reverse_types=name.endswith("reversed"))
    count = len(arrays["input_ids"])
    return [Trace(part(arrays, f"row{n}_") if count > 1 else arrays, calls) for n in range(count)]
