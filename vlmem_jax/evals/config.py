"""What an evaluation asks, and what counts as right."""

import dataclasses
from typing import Literal

from vlmem_jax.data import SourceConfig
from vlmem_jax.data.benchmarks import BENCHMARKS
from vlmem_jax.generate import InvocationConfig, SamplingConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """One evaluation. `sampling`, `invocation` and `rope_dhr` as for a single answer."""

    data: tuple[SourceConfig, ...]
    """JSONL files of prompts, see `data.prompts`; weights play no part."""
    benchmark: str = ""
    """Whose format the files are in as released, if in one of `data.benchmarks`."""
    metric: str = ""
    """What an answer is worth: a reward, see `scoring.RewardConfig.name`; empty: that of the benchmark, or answer."""
    sampling: SamplingConfig = SamplingConfig()
    """Each prompt has its own draws, whatever else is in its batch."""
    invocation: InvocationConfig = InvocationConfig()
    without_memory: bool = False
    """Whether everything is answered a second time with invocation `never`."""
    rope_dhr: bool | None = None
    batch_size: int = 16
    """Prompts that are answered together; a multiple of the devices that rows are split over leaves none idle."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What happens to a prompt that cannot be asked or judged; skipped ones are counted and reported."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.benchmark not in ("", *BENCHMARKS):
            raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {self.benchmark!r}")
        paths = [source.path for source in self.data]
        if twice := {path for path in paths if paths.count(path) > 1}:
            raise ValueError(f"a file must be given once, got {min(twice)} several times")

    @property
    def reward(self) -> str:
        """`metric`, with the empty one filled in."""
        return self.metric or (BENCHMARKS[self.benchmark].metric if self.benchmark else "answer")
