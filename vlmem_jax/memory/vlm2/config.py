"""What VLM^2 is made of."""

import dataclasses
from typing import Literal

from vlmem_jax.memory.base import MemoryConfig


@dataclasses.dataclass(frozen=True)
class VLM2Config(MemoryConfig):
    """Defaults: those of the paper (arXiv 2511.20644, table 7) for LLaVA-Video; sizes that it leaves open are ours."""

    stage: Literal["pre_projector", "post_pool"] = "pre_projector"
    """Whether frames are kept as the tower's features, or as visual tokens: fewer, and as wide as the decoder."""
    working: int = 8
    """Newest frames that are kept as they were seen, L_w; 0: none."""
    episodic: int = 32
    """Frames that are kept for good, L_e; 0: none."""
    train_episodic: tuple[int, ...] = ()
    """Numbers of them that training draws from, one a row, so that short clips replace frames, too, where all frames
    stand in the sequence (image.context=all). None: always `episodic`."""
    write: Literal["paper", "pair"] = "paper"
    """What a new frame replaces in full episodes: the one most like it, or, ours, of all frames and the new one, the
    older of the two most alike."""
    similarity: Literal["pooled", "flat"] = "pooled"
    """Cosine of the means of two frames' tokens, or of all their numbers."""
    residual: bool = True
    """Whether what is read from a bank is added to the frame; if not, it takes its place (eq. 5)."""
    gamma: Literal["channel", "token"] = "channel"
    """Whether each number of a token is a mixture of the two banks of its own, or each token is (eq. 6)."""
    age_embed: bool = False
    """Whether keys tell how long ago their frame was taken, by a learned vector for each power of two. They are then
    made anew at each frame, all of both banks."""
    bptt: bool = True
    """Whether gradients go through what is kept to the frames that it was made of."""
    heads: int = 9
    """Of every attention; heads of 128 numbers fill a TPU's matrix unit."""
    geometry_width: int = 2048
    """Of geometry tokens; 0: there is no geometry, and frames are kept as the tower sees them."""
    view_width: int = 512
    """Of view tokens."""
    injection: Literal["learned", "off"] = "learned"
    """How much of its place is added to each token: as a gate says, or all."""
    fusion_residual: bool = True
    """Whether what is read from geometry is added to a frame; if not, it takes its place (eq. 4)."""
    norm_eps: float = 1e-5
    place_width: int = 0
    """Hidden width of the MLP of coordinates; 0: that of the tower."""
    gate_width: int = 0
    """Of the injection's gate; 0: that of the tower."""
    align_width: int = 0
    """Of the MLP that aligns geometry and view; 0: geometry_width."""
    gamma_width: int = 0
    """Of the gate between the banks; 0: that of the tower."""

    kind: Literal["vlm2"] = "vlm2"

    def __post_init__(self):
        if min(self.working, self.episodic) < 0 or self.working + self.episodic == 0:
            raise ValueError(
                f"working and episodic must be at least 0, and one of them more; got {self.working} and {self.episodic}"
            )
        if not all(1 <= size <= self.episodic for size in self.train_episodic):
            raise ValueError(f"train_episodic must be from 1 to episodic {self.episodic}, got {self.train_episodic}")
        if self.heads < 1 or self.geometry_width < 0 or (self.geometry_width and self.view_width < 1):
            raise ValueError(
                "heads and view_width must be at least 1 and geometry_width at least 0, got "
                f"{self.heads}, {self.view_width} and {self.geometry_width}"
            )
