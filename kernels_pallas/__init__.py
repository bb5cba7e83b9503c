"""Attention kernels for TPU and GPU; needs jax alone."""

from kernels_pallas.cached_attention.api import append_to_cache, cached_attention
from kernels_pallas.causal_attention.api import causal_attention
from kernels_pallas.dhr import TileGrid, raster_positions
from kernels_pallas.memory_attention.api import choose, memory_attention
from kernels_pallas.rope_dhr.api import rope_dhr
from kernels_pallas.rotary import Tables, rotary_tables, tables_of_angles

__all__ = [
    "Tables",
    "TileGrid",
    "append_to_cache",
    "cached_attention",
    "causal_attention",
    "choose",
    "memory_attention",
    "raster_positions",
    "rope_dhr",
    "rotary_tables",
    "tables_of_angles",
]
