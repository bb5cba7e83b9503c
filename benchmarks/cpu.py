"""What the design buys, measured on a CPU as ratios of runs that take turns.

    python -m benchmarks.cpu                    # about ten minutes
    python -m benchmarks.cpu --only pipeline --json rows.json
    python -m benchmarks.cpu --toy              # does everything run? The figures mean nothing

Ratios hold on a noisy machine where times do not; still, nothing else should be running.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/cpu.py`

from benchmarks.cpu_data import image_sizes, pipeline, recompilations
from benchmarks.cpu_engine import answers_alone, cache_use, engine, engine_host, evaluation
from benchmarks.cpu_models import (
    cached_generation,
    decode_step,
    forming,
    kept_frames,
    memory_overhead,
    scanned_layers,
    shared_prefill,
)
from benchmarks.cpu_rl import grpo_step, rollouts
from benchmarks.cpu_streams import beside_answers, first_token, long_stream, several_streams, streaming
from benchmarks.cpu_update import grpo_update
from benchmarks.measure import command

ITEMS = {
    "decode_step": decode_step,
    "cached_generation": cached_generation,
    "scanned_layers": scanned_layers,
    "memory_overhead": memory_overhead,
    "kept_frames": kept_frames,
    "streaming": streaming,
    "several_streams": several_streams,
    "first_token": first_token,
    "long_stream": long_stream,
    "beside_answers": beside_answers,
    "pipeline": pipeline,
    "recompilations": recompilations,
    "image_sizes": image_sizes,
    "shared_prefill": shared_prefill,
    "rollouts": rollouts,
    "grpo_step": grpo_step,
    "grpo_update": grpo_update,
    "forming": forming,
    "engine": engine,
    "answers_alone": answers_alone,
    "evaluate": evaluation,
    "engine_host": engine_host,
    "cache_use": cache_use,
}


TOY = {
    "decode_step": dict(layers=4, slots=128, calls=2, runs=2),
    "cached_generation": dict(prompts=(64,), layers=4, width=128, new=16, runs=2),
    "scanned_layers": dict(layers=4, tokens=64, builds=1, runs=2),
    "memory_overhead": dict(layers=4, width=128, tokens=64, runs=2),
    "kept_frames": dict(layers=1, width=128, tower=32, tokens=64, frames=4, runs=2),
    "streaming": dict(patches=4, width=32, near=2, far=40, calls=2, runs=2),
    "several_streams": dict(patches=4, width=32, layers=1, count=2, calls=2, runs=2),
    "first_token": dict(patches=4, width=32, near=40, far=80, new=2, runs=2),
    "long_stream": dict(patches=4, width=32, warm=20, count=40),
    "beside_answers": dict(patches=4, width=32, layers=1, deep=1, new=16, alone=20, runs=1),
    "pipeline": dict(count=2, steps=2, runs=2),
    "recompilations": dict(count=2, longest=64, training=2, generations=2, lengths=2),
    "image_sizes": dict(shortest=32, longest=64, count=2),
    "shared_prefill": dict(group=2, tokens=64, new=2, layers=2, width=128, runs=2),
    "rollouts": dict(group=2, count=3, slots=4, tokens=16, new=6, layers=1, width=128, runs=2),
    "grpo_step": dict(prompts=2, group=2, question=4, new=4, layers=1, width=128, steps=4),
    "grpo_update": dict(prompt=32, answer=8, counted=2, group=4, layers=1, width=128, runs=2),
    "forming": dict(rows=2, states=16, tokens=32, layers=2, width=128, runs=2),
    "engine": dict(requests=4, answers=6, slots=2, median=4, mixed=6, width=128, runs=2),
    "answers_alone": dict(requests=14, slots=3, new=6, layers=2),
    "evaluate": dict(prompts=7, rows=2, new=8, layers=4, width=128, runs=1),
    "engine_host": dict(layers=4, slots=2, calls=2, runs=2),
    "cache_use": dict(long=256, short=64, filled=60, rows=2, layers=2, width=128, calls=2, runs=2),
}
"""Sizes at which each item runs in seconds."""


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    command(__doc__, ITEMS, TOY, arguments)


if __name__ == "__main__":
    main()
