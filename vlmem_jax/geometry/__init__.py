"""Models of geometry, frozen: points, cameras and tokens of the frames of a video."""

from vlmem_jax.geometry.model import GeometryModel, load_geometry
from vlmem_jax.geometry.pictures import pictures
from vlmem_jax.geometry.scene import Scene

__all__ = ["GeometryModel", "Scene", "load_geometry", "pictures"]
