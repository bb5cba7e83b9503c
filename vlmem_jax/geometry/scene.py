"""What a model of geometry makes of views of one place."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Scene(NamedTuple):
    """Of N views H x W pixels in size, which are cut into P patches. The world's frame and scale are those of the
    model: only what is said of the same call fits together."""

    points_NHW3: Float[Array, "N H W 3"]
    """The point that each pixel shows, fp32, as its own camera sees it: x right, y down, z forward."""
    confidence_NHW: Float[Array, "N H W"]
    """How sure that point is, fp32, from 0 to 1."""
    poses_N44: Float[Array, "N 4 4"]
    """Camera to world, fp32."""
    tokens_NPG: Float[Array, "N P G"]
    """What the model makes of each patch."""
    views_NPV: Float[Array, "N P V"]
    """What it knows of the camera there."""
