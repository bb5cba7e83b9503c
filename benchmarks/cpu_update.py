"""Ratios on a CPU of the updates of reinforcement learning."""

import functools

import jax
import numpy as np

from benchmarks.measure import RUNS, Row, in_turns, packed_batch, unrolled
from benchmarks.models import make, wide
from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row
from vlmem_jax.models import VLM
from vlmem_jax.nn import seen_blocks
from vlmem_jax.rl import GRPOLoss, RLConfig
from vlmem_jax.rl.episodes import Step
from vlmem_jax.rl.rows import Rows, RowShape, pack_steps
from vlmem_jax.types import IGNORED, Sample


def grpo_update(prompt=256, answer=64, counted=8, group=16, layers=2, width=256, runs=RUNS) -> list[Row]:
    """The update of GRPO by a group in one row, against a row for each answer. Three quarters of the prompt are of
    images. FLOPs are of programs that are not run, of a prompt and answers `counted` times as long."""
    vlm, params = make(wide(layers, width, memory=None))

    def learning(times: int):
        loss = GRPOLoss(vlm, RLConfig(), answer * times, ())
        return jax.jit(jax.grad(lambda params, rows: loss.loss(params, rows, None)[0]))

    def batches(times: int) -> tuple[Rows, Rows]:
        return _rows(vlm, prompt * times, answer * times, group)

    with unrolled():  # a loop's body is counted once
        flops = [_flops(vlm, learning(counted), params, rows) for rows in batches(counted)]
    update = learning(1)
    calls = [functools.partial(update, params, jax.device_put(rows)) for rows in batches(1)]
    jax.block_until_ready([call() for call in calls])
    seconds = in_turns(*calls, runs=runs)
    what = f"update of GRPO by {group} answers to a prompt in one row / in a row each"
    sizes = [f"prompt of {prompt * times} tokens, answers of {answer * times}" for times in (counted, 1)]
    return [
        Row(f"{what}: FLOPs", [flops[0] / flops[1]], 0.4, True, "x", sizes[0]),
        Row(f"{what}: time", list(seconds[:, 0] / seconds[:, 1]), 0.4, True, "x", sizes[1]),
    ]


def _rows(vlm: VLM, prompt: int, answer: int, group: int) -> tuple[Rows, Rows]:
    """A group in one row, and in rows of its answers."""
    tiles = 3 * prompt // 4 // vlm.tokens_per_tile
    shown = jax.tree.map(np.array, packed_batch(vlm, 1, prompt, tiles))
    sample = Sample(
        tokens_T=shown.text.tokens_BT[0],
        labels_T=np.full(prompt, IGNORED, np.int32),
        positions_T=shown.text.positions_BT[0],
        visual_index_T=shown.text.visual_index_BT[0],
        pixels_ISSc=shown.views.pixels_BISSc[0],
        visual_positions_M=shown.views.positions_BM[0],
    )
    logp_T, drawn_T = np.full(answer, -5, np.float32), np.ones(answer, bool)
    steps = [Step(sample, np.full(answer, n, np.int32), logp_T, drawn_T, False) for n in range(group)]
    data = DataConfig(pack_tokens=prompt + group * answer, pack_tiles=tiles, loss_weight="sample")
    (together,) = pack_steps(steps, [1.0] * group, data, vlm, RowShape.of(data, vlm, answer), at_once=1)
    alone = [pack_row([step.sample()], data, vlm.tile, prompt + answer) for step in steps]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *alone)
    known = [np.full(batch.text.tokens_BT.shape, value, np.float32) for value in (-5, 0, 1)]
    return together, Rows(batch, *known, np.zeros(group, np.float32))


def _flops(vlm: VLM, update, params: dict, rows: Rows) -> float:
    """XLA's count, which has one pair of blocks of a layer's attention, and the products of those beside it that meet:
    two in the forward pass and five in the backward pass."""
    text, c = rows.batch.text, vlm.config.decoder
    found = update.lower(params, rows).cost_analysis()["flops"]
    if text.prefix_BT is None or text.tokens_BT.shape[1] <= 2 * seen_blocks.BLOCK:
        return found
    met = int(seen_blocks.meeting(text.segments_BT, text.prefix_BT).count)
    return found + c.layers * (met - 1) * 7 * 2 * seen_blocks.BLOCK**2 * c.heads * c.head_dim
