"""What the engine buys: rows that are never empty, steps that read what is there, and little work for the host."""

import dataclasses
import itertools
import json
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from benchmarks.measure import RUNS, Row, in_turns
from benchmarks.models import deep, make, wide
from vlmem_jax.data import SourceConfig
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.evals import EvalConfig, evaluate, run
from vlmem_jax.evals.answers import Answering
from vlmem_jax.evals.folder import Lines
from vlmem_jax.evals.measure import compilations
from vlmem_jax.generate import Engine, Generator, Handle, InvocationConfig, LoadedModel, Request, SamplingConfig
from vlmem_jax.models import VLM
from vlmem_jax.processing import Tokenizer, make_processor
from vlmem_jax.processing.images import ImageConfig
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.types import IGNORED, Sample


def prompt(vlm: VLM, length: int, tiles: int, seed: int) -> Sample:
    """Random tokens, and before them so many random tiles."""
    rng, memory = np.random.default_rng(seed), tiles * vlm.tokens_per_tile
    side, index = vlm.config.vision.image_size, np.arange(memory + length, dtype=np.int32)
    return Sample(
        tokens_T=rng.integers(5, 100, memory + length).astype(np.int32),
        labels_T=np.full(memory + length, IGNORED, np.int32),
        positions_T=index,
        visual_index_T=np.where(index < memory, index, -1).astype(np.int32),
        pixels_ISSc=rng.integers(0, 256, (tiles, side, side, 3)).astype(np.uint8),
        visual_positions_M=np.arange(memory, dtype=np.int32),
        name=f"prompt {seed}",
    )


def some_of_all(vlm: VLM, count: int, longest: int, new: int) -> list[Request]:
    """Prompts of up to `longest` tokens and 3 tiles, greedy and drawn."""
    rng = np.random.default_rng(0)
    return [
        Request(prompt(vlm, int(rng.integers(8, longest)), n % 4, n), SamplingConfig(new, temperature=n % 2, seed=n))
        for n in range(count)
    ]


def one_by_one(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Each when the one before it is done."""
    return [engine.submit(request).result() for request in requests]


def together(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """All at once."""
    handles = [engine.submit(request) for request in requests]
    return [handle.result() for handle in handles]


def engine(requests=32, answers=1024, slots=64, median=12, mixed=2000, layers=4, width=256, runs=3) -> list[Row]:
    """Answers side by side against one after the other, and against batches that wait for their longest answer."""
    vlm, params = make(wide(layers, width))
    generator = Generator(vlm, params, stop_ids=[])
    some = some_of_all(vlm, requests, 96, 32)
    few, single = (Engine(generator, PoolShape.of(n, 192, 3)) for n in (8, 1))
    equal = together(few, some) == one_by_one(single, some)
    seconds = in_turns(lambda: one_by_one(single, some), lambda: together(few, some), runs=runs)
    ratio, words = list(seconds[:, 0] / seconds[:, 1]), "answers are equal" if equal else "answers DIFFER"
    rows = [
        Row(
            f"{requests} requests of mixed lengths: one after the other / 8 side by side", ratio, 3.5, False, "x", words
        )
    ]
    rows += _waiting(vlm, generator, answers, slots, median, runs)
    vlm, params = make(deep(4))
    pool = Engine(Generator(vlm, params, stop_ids=[]), PoolShape.of(8, 192, 3))
    pool.warm_up()
    with compilations() as compiled:
        together(pool, some_of_all(vlm, mixed, 96, 4))
    what, how = f"compilations in {mixed} mixed requests, after warm-up", f"{len(pool.programs())} programs"
    return [*rows, Row(what, [float(len(compiled))], 0, True, "", how)]


def answers_alone(requests=500, slots=8, new=24, layers=4) -> list[Row]:
    """Whether an answer depends on who is asked beside it: some are streamed or cancelled, and many call for memories,
    by themselves or by chance."""
    memory = dict(kind="vismem", token_ids=(124, 125, 126, 127), start_id=3, max_invocations=2, invoke_bias=1.0)
    sizes = dict(query_len=4, short_len=4, long_len=6, max_prompt_hidden=64, max_visual_hidden=16)
    vlm, params = make(deep(layers) | {"memory": memory | sizes})
    generator = Generator(vlm, params, stop_ids=[0, 1, 2], delimiter_ids=range(0, vlm.config.decoder.vocab, 2))
    pool = Engine(generator, PoolShape.of(slots, 160, 3))
    rules = InvocationConfig(), InvocationConfig("delimiter_random", 0.3, 0.1), InvocationConfig("never")
    asked = [
        dataclasses.replace(one, invocation=rules[n % 3]) for n, one in enumerate(some_of_all(vlm, requests, 96, new))
    ]
    alone = []
    for request in asked:
        alone.append(pool.submit(request))
        pool.run()
    rng, handles, came = np.random.default_rng(3), {}, [[] for _ in asked]
    for n in rng.permutation(requests).tolist():
        handles[n] = pool.submit(dataclasses.replace(asked[n], on_token=came[n].append))
        if n % 7 == 3:
            next(iter(handles[n]), None)
            handles[n].cancel()
        elif n % 7 == 5:
            assert list(handles[n]) == handles[n].result()
        for _ in range(int(rng.integers(3))):
            pool.step()
    pool.run()

    def differs(n: int) -> bool:
        whole, got = alone[n].answer, handles[n].answer
        return got != (whole[: len(got)] if handles[n].reason == "cancelled" else whole) or came[n] != got

    cancelled = sum(handle.reason == "cancelled" for handle in handles.values())
    called = sum(len(handle.invocations) for handle in alone)
    what = f"answers that differ from those alone, of {requests} mixed requests"
    how = f"{called} memories; {cancelled} cancelled, {len(range(5, requests, 7))} streamed"
    return [Row(what, [float(sum(map(differs, range(requests))))], 0, True, "", how)]


def _waiting(vlm: VLM, generator: Generator, answers: int, slots: int, median: int, runs: int) -> list[Row]:
    """Answers of log-normal lengths, sigma 0.8, through slots that are filled again, and in batches."""
    drawn = np.exp(np.random.default_rng(1).normal(np.log(median), 0.8, answers))
    lengths = np.clip(drawn.round().astype(int), 1, 8 * median)
    asked = [Request(prompt(vlm, 8, 0, n), SamplingConfig(int(new))) for n, new in enumerate(lengths)]
    pool = Engine(generator, PoolShape.of(slots, 8 + 8 * median))
    steps, dispatch = itertools.count(), pool._dispatch
    shares: list[float] = []

    def filled() -> None:
        nonlocal steps
        steps = itertools.count()
        together(pool, asked)
        shares.append(lengths.sum() / (next(steps) * slots))

    def counted() -> bool:
        next(steps)
        return dispatch()

    def batches() -> None:
        for first in range(0, answers, slots):
            together(pool, asked[first : first + slots])

    pool._dispatch = counted
    together(pool, asked[:slots])
    seconds = in_turns(batches, filled, runs=runs)
    about = f"{answers} answers of log-normal lengths"
    waste = lengths.sum() / sum(slots * lengths[n : n + slots].max() for n in range(0, answers, slots))
    return [
        Row(
            f"{about}: useful steps of {slots} rows",
            [100 * share for share in shares],
            80,
            False,
            "%",
            f"{waste:.0%} in batches",
        ),
        Row(
            f"{about}: batches of {slots} / {slots} slots",
            list(seconds[:, 0] / seconds[:, 1]),
            1.8,
            False,
            "x",
            f"median {median} tokens",
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Stopping(LoadedModel):
    """A random model that ends its answers after some tokens."""

    def generator(self) -> Generator:
        generator = super().generator()
        generator.stop_ids = *generator.stop_ids, 20, 30, 40
        return generator


class Batches(Answering):
    """One batch after another, each of which waits for its longest answer."""

    def submit(self, samples, keys_N, how, invocation) -> list[Handle]:
        handles = []
        for first in range(0, len(samples), self.rows):
            some = slice(first, first + self.rows)
            handles += super().submit(samples[some], keys_N[some], how[some], invocation)
            self._pool.engine.run()
        return handles


def evaluation(prompts=200, rows=16, new=96, layers=4, width=256, runs=5) -> list[Row]:
    """`vlmem evaluate` against the same in batches that wait for their longest answer."""
    vlm, params = make(wide(layers, width))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        lines = []
        for n in range(prompts):
            for image in range(n % 3):
                size = *rng.integers(16, 64, 2), 3
                Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / f"{n}_{image}.png")
            asked = " ".join(rng.choice(["row", "column", "1", "2", "3"], rng.integers(2, 40)))
            lines.append({"prompt": asked, "images": [f"{n}_{image}.png" for image in range(n % 3)], "answer": "1"})
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        tokenizer = Tokenizer.load(folder / "tokenizer")
        processor = make_processor(
            tokenizer, ImageConfig(max_tiles=2), vlm.config.vision.geometry, "", "internlm2-chat"
        )
        model = Stopping(vlm, params, processor, make_mesh(MeshConfig()))
        config = EvalConfig(
            (SourceConfig(str(folder / "prompts.jsonl")),), sampling=SamplingConfig(new, 1.0), batch_size=rows
        )
        counts, said = itertools.count(), []

        def evaluated(answering: type[Answering]) -> None:
            output = folder / f"out{next(counts)}"
            with unittest.mock.patch.object(run, "Answering", answering):
                evaluate(model, config, output)
            said.append(Lines(output / run.SAMPLES).by_name)

        evaluated(Batches), evaluated(Answering)
        seconds = in_turns(lambda: evaluated(Batches), lambda: evaluated(Answering), runs=runs)
    outputs = [{name: line["output"] for name, line in one.items()} for one in said]
    words = "answers are equal" if all(one == outputs[0] for one in outputs) else "answers DIFFER"
    tokens = [line["tokens"] for line in said[0].values()]
    how = f"{rows} rows, {np.mean(tokens):.0f} tokens an answer, {max(tokens)} at most; {words}"
    what = f"vlmem evaluate, {prompts} mixed prompts: batch after batch / rows that are filled again"
    return [Row(what, list(seconds[:, 0] / seconds[:, 1]), 1.5, False, "x", how)]


def engine_host(layers=24, slots=8, calls=50, runs=RUNS) -> list[Row]:
    """What the host spends on a step of the engine, dispatch and tokens together."""
    vlm, params = make(deep(layers))
    pool = Engine(Generator(vlm, params, stop_ids=[]), PoolShape.of(slots, 8 + (calls + 2) * (runs + 1)))
    new = SamplingConfig(max_new_tokens=(calls + 2) * runs + 8)
    handles = [pool.submit(Request(prompt(vlm, 8, 0, n), new)) for n in range(slots)]
    while not all(handle.tokens for handle in handles):
        pool.step()

    def host() -> float:
        jax.block_until_ready((pool._rows, [arrays for _, arrays in pool._late]))
        begin = time.perf_counter()
        pool.step()
        return (time.perf_counter() - begin) * 1e3

    medians = [statistics.median(host() for _ in range(calls)) for _ in range(runs)]
    what = f"host time of a step of {slots} rows, {layers} layers of tiny width"
    return [Row(what, medians, 0.4, True, "ms", f"dispatch, and the tokens of the step before; {calls} calls")]


def cache_use(long=4096, short=512, filled=500, rows=8, layers=4, width=256, calls=20, runs=RUNS) -> list[Row]:
    """A step of rows that fill little of a large cache, against one of a cache that is just large enough."""
    vlm, params = make(wide(layers, width, memory=None))
    generator, seen = Generator(vlm, params, stop_ids=[]), filled - (calls + 2) * (runs + 1)
    pools = []
    for capacity in (long, short):
        pool = Engine(generator, PoolShape(rows, capacity, min(128, capacity)))
        shortest = max(seen, 4)
        asked = [Request(prompt(vlm, shortest, 0, n), SamplingConfig(capacity - shortest)) for n in range(rows)]
        handles: list[Handle] = [pool.submit(request) for request in asked]
        while not all(handle.tokens for handle in handles):
            pool.step()
        pools.append(pool)

    def steps(pool: Engine) -> jax.Array:
        for _ in range(calls):
            pool.step()
        return pool._rows.logits_BV

    seconds = in_turns(*(lambda pool=pool: steps(pool) for pool in pools), runs=runs)
    what = f"a step with {filled} tokens in use: a cache of {long} / of {short} positions a row"
    return [Row(what, list(seconds[:, 0] / seconds[:, 1]), 1.3, True, "x", f"{rows} rows")]
