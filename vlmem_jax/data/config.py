"""The config keys of training and evaluation data."""

import dataclasses
import os
from typing import Literal


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One JSONL file of conversations, or what `vlmem data pack` made of it."""

    path: str
    """A sample a line: `conversations`, and perhaps `image` (a path or a list of them) or `video`."""
    root: str = ""
    """Folder that the paths in a JSONL file start from and must stay in; empty: the folder of the file."""
    weight: float = 1.0
    """How often a sample of this file is drawn, relative to samples of the other files."""
    follow_links: bool = False
    """Links below root may lead out of it; only for data whose links are one's own."""
    geometry: str = ""
    """What `vlmem data geometry` made of these data, NAME.array_record, where the memory reads it."""

    @property
    def folder(self) -> str:
        """The folder that paths start from."""
        return self.root or os.path.dirname(self.path) or "."

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight} for {self.path}; leave the file out instead")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a step is made of: samples packed into rows of a fixed number of tokens and image tiles."""

    train: tuple[SourceConfig, ...] = ()
    """Files mixed for training, each in a new order every time it has been gone through."""
    eval: tuple[SourceConfig, ...] = ()
    """Files for evaluation, gone through once, in order; weights play no part."""
    rows: int = 1
    """Packed rows of an optimizer step, over all hosts and accumulation steps."""
    pack_tokens: int = 16384
    """Token slots of a row."""
    pack_tiles: int = 48
    """Image tile slots of a row; 0: all is text."""
    max_sample_tokens: int = 8192
    """Longest sample that is used, tokens."""
    open_packs: int = 20
    """Rows that are filled at the same time; more pack tighter and mix later samples with earlier ones."""
    loss_weight: Literal["token", "sample", "square"] = "square"
    """Weight of each of the x target tokens of a sample: 1, 1/x or 1/sqrt(x)."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What happens to a sample that cannot be used; skipped ones are counted and reported."""
    mask_text_only: bool = False
    """Whether a sample without images has no memory at all, rather than one blank tile."""
    min_frames: int = 4
    """Fewest frames taken from a video, if it has them; a model that sees patches goes by image.fps instead."""
    max_frames: int = 24
    """Most frames taken from a video; the number is drawn once for each sample."""
    jpeg_augment: bool = False
    """Whether training images go through JPEG compression of random quality 75 to 100."""
    plan_folder: str = ""
    """Folder that pack plans are kept in, also for other runs on the same data; empty: `plans` in that of the run."""
    threads: int = 0
    """Threads that read and decode on this host; 0: one a core, at most 16."""
    prefetch: int = 2
    """Steps that are decoded ahead, held in host memory; at least a row for every thread."""

    def __post_init__(self):
        for key in ("rows", "pack_tokens", "max_sample_tokens", "open_packs", "min_frames", "prefetch"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.pack_tiles < 0:
            raise ValueError(f"pack_tiles must be at least 0, got {self.pack_tiles}")
        if self.threads < 0:
            raise ValueError(f"threads must be a number of threads, or 0 for one a core; got {self.threads}")
        if self.max_frames < self.min_frames:
            raise ValueError(f"min_frames <= max_frames must hold, got {self.min_frames} and {self.max_frames}")

    @property
    def thread_count(self) -> int:
        """`threads`, with the 0 filled in."""
        return self.threads or min(os.cpu_count() or 1, 16)
