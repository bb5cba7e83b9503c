"""The pictures that models of geometry see, of those that a vision tower sees."""

from typing import Literal

import numpy as np
from jaxtyping import UInt8

from vlmem_jax.nn.resize import half_pixel, linear_weights

Fit = Literal["crop", "resize"]


def pictures(
    frames_NSSc: UInt8[np.ndarray, "N S S 3"], side: int = 378, fit: Fit = "crop"
) -> UInt8[np.ndarray, "N H H 3"]:
    """Frames of `side` x `side` pixels: the first rows and columns, or all of them resized, without anti-aliasing.

    The first 378 of 384 pixels are what SigLIP's patches of 14 cover: patches of both models then show the same, which
    resized pictures, as VLM-3R (arXiv 2505.20279) takes them, do not quite. Raises ValueError for frames that are too
    small to be cropped.
    """
    have = frames_NSSc.shape[1]
    if fit == "crop":
        if have < side:
            raise ValueError(
                f"frames to crop must have at least {side} pixels a side, got {have}; let them be resized "
                "(--geometry-fit resize)"
            )
        return frames_NSSc[:, :side, :side]
    weights = linear_weights(half_pixel(have, side), have)
    resized = np.stack([np.einsum("hs,wt,stc->hwc", weights, weights, x, optimize=True) for x in frames_NSSc])
    return np.rint(resized).astype(np.uint8)
