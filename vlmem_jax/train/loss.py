"""Next-token cross-entropy whose logits are never all there at once."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int32

from vlmem_jax.runtime.sharding import constrain, shards


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    kernel_DV: Float[Array, "D V"],
    targets_BT: Int32[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum over tokens of weight x cross-entropy of the target, in fp32 (CoMemo sec. 4: divided by the caller).

    `chunk` tokens of each row have logits at the same time. The loss is a scalar, so its gradients are computed along
    with it, chunk by chunk, and only scaled in the backward pass: no logits are stored or computed twice. The head's
    gradient is not computed where the head is frozen.
    """
    return _cross_entropy(hidden_BTD, kernel_DV, targets_BT, weights_BT, min(chunk, targets_BT.shape[1]))


def log_probs(
    hidden_BTD: Float[Array, "B T D"],
    kernel_DV: Float[Array, "D V"],
    targets_BT: Int32[Array, "B T"],
    chunk: int,
    banned: Collection[int] = (),
    rescore: Callable[[Array, Array], Array] | None = None,
    first_B: Int32[Array, "B"] | None = None,
) -> Float[Array, "B T"]:
    """Log-probability of each target under the softmax of all tokens that are not `banned`, in fp32.

    That of a banned target means nothing. `rescore(hidden, logits)` may put other logits in place of some. `chunk`
    tokens of each row have logits at the same time, and have them made again in the backward pass. Where no more than
    the first `first_B` of each row are wanted, chunks behind them have none: 0.
    """
    B, T, _ = hidden_BTD.shape
    cut = _Cut.of(B, T, min(chunk, T))
    kernel = constrain(kernel_DV, None, "vocab")  # gathered over fsdp once, not in each chunk
    banned_V = np.isin(np.arange(kernel_DV.shape[1]), list(banned))

    @jax.checkpoint
    def part(kernel, hidden_SND, targets_SN):
        logits_SNV = jnp.einsum(
            "SND,DV->SNV", hidden_SND, kernel.astype(hidden_SND.dtype), preferred_element_type=jnp.float32
        )
        if rescore:
            logits_SNV = rescore(hidden_SND, logits_SNV)
        logits_SNV = constrain(jnp.where(banned_V, -jnp.inf, logits_SNV), "parts", None, "vocab")
        is_target_SNV = jax.lax.broadcasted_iota(jnp.int32, logits_SNV.shape, 2) == targets_SN[..., None]
        return jnp.where(is_target_SNV, logits_SNV, 0.0).sum(-1) - jax.nn.logsumexp(logits_SNV, axis=-1)

    if first_B is None:
        xs = cut.split(hidden_BTD), cut.split(targets_BT)
        return cut.joined(jax.lax.scan(lambda _, x: (None, part(kernel, *x)), None, xs)[1])
    is_wanted_BT = jnp.arange(T) < first_B[:, None]
    xs = cut.split(hidden_BTD), cut.split(targets_BT), cut.split(is_wanted_BT).any((1, 2))

    def part_or_none(_, x):
        hidden_SND, targets_SN, is_wanted = x
        none = lambda *_: jnp.zeros(targets_SN.shape, jnp.float32)  # noqa: E731
        return None, jax.lax.cond(is_wanted, part, none, kernel, hidden_SND, targets_SN)

    return cut.joined(jax.lax.scan(part_or_none, None, xs)[1])


def log_probs_where(
    hidden_BTD: Float[Array, "B T D"],
    kernel_DV: Float[Array, "D V"],
    targets_BT: Int32[Array, "B T"],
    wanted_BT: Bool[Array, "B T"],
    chunk: int,
    banned: Collection[int] = (),
    rescore: Callable[[Array, Array], Array] | None = None,
) -> Float[Array, "B T"]:
    """`log_probs` of the targets that are wanted, 0 of others, which have no logits but to fill a chunk."""
    place_BT = jnp.argsort(jnp.logical_not(wanted_BT), axis=1, stable=True)  # wanted ones first, in their order
    chosen_BTD = jnp.take_along_axis(hidden_BTD, place_BT[..., None], axis=1)
    chosen_BT = jnp.take_along_axis(targets_BT, place_BT, axis=1)
    logp_BT = log_probs(chosen_BTD, kernel_DV, chosen_BT, chunk, banned, rescore, wanted_BT.sum(1, dtype=jnp.int32))
    return jnp.where(wanted_BT, jnp.take_along_axis(logp_BT, jnp.argsort(place_BT, axis=1), axis=1), 0.0)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How [B, T] tokens are cut into chunks that are worked on one after the other, each spread over all devices."""

    B: int
    T: int
    rows: int
    """Pieces that the rows are split into over devices."""
    pieces: int
    """Pieces that the tokens of a row are split into over devices."""
    chunk: int
    """Tokens of a piece of a row in a chunk."""

    @classmethod
    def of(cls, B: int, T: int, chunk: int) -> "_Cut":
        """`chunk`: tokens of a row that are worked on at the same time."""
        rows, pieces = (math.gcd(size, shards(axis)) for size, axis in ((B, "batch"), (T, "tokens")))
        return cls(B, T, rows, pieces, -(-chunk // pieces))

    @property
    def chunks(self) -> int:
        return -(-self.T // self.pieces // self.chunk)

    def split(self, x_BT: Array) -> Array:
        """[B, T, ...] as [chunks, S, N, ...]: S pieces on as many devices, N tokens each."""
        short = self.chunks * self.chunk - self.T // self.pieces
        x = x_BT.reshape(self.rows, self.B // self.rows, self.pieces, self.T // self.pieces, *x_BT.shape[2:])
        x = jnp.pad(x, ((0, 0),) * 3 + ((0, short),) + ((0, 0),) * (x.ndim - 4))
        x = x.reshape(*x.shape[:3], self.chunks, self.chunk, *x_BT.shape[2:])
        x = jnp.moveaxis(x, (3, 2), (0, 2))  # chunks, rows, pieces, rows of a piece, chunk
        return x.reshape(self.chunks, self.rows * self.pieces, self.B // self.rows * self.chunk, *x_BT.shape[2:])

    def joined(self, x_nSN: Array) -> Array:
        """What `split` was made of."""
        rest, of_piece = x_nSN.shape[3:], self.B // self.rows
        x = x_nSN.reshape(self.chunks, self.rows, self.pieces, of_piece, self.chunk, *rest)
        x = jnp.moveaxis(x, (0, 2), (3, 2)).reshape(self.rows, of_piece, self.pieces, self.chunks * self.chunk, *rest)
        return x[:, :, :, : self.T // self.pieces].reshape(self.B, self.T, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk):
    return _run(hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk, False, False)[0]


def _forward(hidden, kernel, targets, weights, chunk):
    args = (hidden.value, kernel.value, targets.value, weights.value)
    loss, *gradients = _run(*args, chunk, hidden.perturbed, kernel.perturbed)
    # the kernel's gradient, large and in fp32, is reduced over devices before the layers' backward pass begins
    return loss, jax.lax.optimization_barrier(tuple(gradients))


def _backward(chunk, saved, g):
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    d_hidden_BTD, d_kernel_DV = (None if d is None else (d * g).astype(d.dtype) for d in saved)
    return d_hidden_BTD, d_kernel_DV, None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk, hidden_too, kernel_too):
    """(loss, its gradient by the hidden states or None, its gradient by the kernel or None)."""
    B, T, D = hidden_BTD.shape
    V = kernel_DV.shape[1]
    dtype = hidden_BTD.dtype
    kernel = constrain(kernel_DV.astype(dtype), None, "vocab")  # gathered over fsdp once, not in each chunk
    # S: the pieces that rows and tokens are split into over devices. Each adds up its own share of the kernel's
    # gradient; one reduction ends the loop
    cut = _Cut.of(B, T, chunk)
    S, chunks = cut.rows * cut.pieces, cut.chunks

    def body(carry, xs):
        loss_S, d_kernel_SDV = carry
        hidden_SND, targets_SN, weights_SN = xs
        logits_SNV = jnp.einsum("SND,DV->SNV", hidden_SND, kernel, preferred_element_type=jnp.float32)
        logits_SNV = constrain(logits_SNV, "parts", None, "vocab")
        log_sum_SN1 = jax.nn.logsumexp(logits_SNV, axis=-1, keepdims=True)
        # a comparison instead of a gather: it stays where its part of the vocabulary is
        is_target_SNV = jax.lax.broadcasted_iota(jnp.int32, logits_SNV.shape, 2) == targets_SN[..., None]
        target_SN = jnp.where(is_target_SNV, logits_SNV, 0.0).sum(-1)
        loss_S += jnp.sum(weights_SN * (log_sum_SN1[..., 0] - target_SN), axis=-1)
        if not (hidden_too or kernel_too):
            return (loss_S, None), None
        d_logits_SNV = (jnp.exp(logits_SNV - log_sum_SN1) - is_target_SNV) * weights_SN[..., None]
        d_logits_SNV = constrain(d_logits_SNV.astype(dtype), "parts", None, "vocab")
        d_hidden_SND = jnp.einsum("SNV,DV->SND", d_logits_SNV, kernel) if hidden_too else None
        if kernel_too:
            d_kernel_SDV += jnp.einsum("SND,SNV->SDV", hidden_SND, d_logits_SNV, preferred_element_type=jnp.float32)
            d_kernel_SDV = constrain(d_kernel_SDV, "parts", None, "vocab")
        return (loss_S, d_kernel_SDV), d_hidden_SND

    xs = jax.tree.map(cut.split, (hidden_BTD, targets_BT, weights_BT))
    start = (jnp.zeros(S, jnp.float32), jnp.zeros((S, D, V), jnp.float32) if kernel_too else None)
    if chunks == 1:
        carry, d_hidden = body(start, jax.tree.map(lambda x: x[0], xs))
        d_hidden = None if d_hidden is None else d_hidden[None]
    else:
        carry, d_hidden = jax.lax.scan(body, start, xs)
    loss_S, d_kernel_SDV = carry
    d_hidden = None if d_hidden is None else cut.joined(d_hidden)
    d_kernel = None
    if d_kernel_SDV is not None:
        d_kernel = constrain(d_kernel_SDV.sum(0), "embed", "vocab").astype(kernel_DV.dtype)
    return loss_S.sum(), d_hidden, d_kernel
