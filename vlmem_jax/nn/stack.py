"""Layers of one shape as one module with a leading layer axis, so that programs do not grow with depth."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Module = TypeVar("Module", bound=nnx.Module)

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("causal_attention"),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("memory_attention", "causal_attention"),
    ),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What a layer keeps for the backward pass: everything, its inputs only, these and the result of the kernel for causal
attention, the results of weight matmuls and of all attention kernels, or its inputs only in the host's memory."""


def stack(make: Callable[[nnx.Rngs], Module], layers: int, rngs: nnx.Rngs) -> Module:
    """`layers` independently initialised copies of `make(rngs)`; every parameter gets a leading axis."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(layers))


def remat(body: Callable, policy: str) -> Callable:
    """`body`, whose first argument is a layer's input, recomputed in the backward pass under one of REMAT_POLICIES."""
    if policy == "none":
        return body

    def named(x, *rest):
        return body(checkpoint_name(x, "layer_input"), *rest)

    # layers run inside lax.scan, where common-subexpression elimination cannot undo the recomputation
    return jax.checkpoint(named if policy == "offload" else body, policy=REMAT_POLICIES[policy], prevent_cse=False)
