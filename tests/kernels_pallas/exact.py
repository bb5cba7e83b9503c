"""Memory attention and its gradients in float64, written out by hand; angles are fp32, their sines are not."""

import numpy as np

from kernels_pallas import rotary


def turn(x: np.ndarray, positions: np.ndarray | None, theta: float, inverse: bool = False) -> np.ndarray:
    """x [B, N, H, C] turned by positions [B, N]."""
    if positions is None:
        return x
    angles = (positions[..., None].astype(np.float32) * rotary.frequencies(x.shape[-1], theta)).astype(np.float64)
    cos, sin = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None] * (-1 if inverse else 1)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(q, k, v, do, dlse, *, q_pos, k_pos, theta, allowed):
    """o, lse, (dq, dk, dv) of the sum of o * do and lse * dlse; allowed [B, T, M]."""
    group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    turned_q, turned_k = turn(q, q_pos, theta), np.repeat(turn(k, k_pos, theta), group, axis=2)
    wide_v = np.repeat(v, group, axis=2)
    scores = np.where(allowed[:, None], np.einsum("bthc,bmhc->bhtm", turned_q, turned_k) * scale, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total > 0, total, 1)
    o = np.einsum("bhtm,bmhc->bthc", p, wide_v)
    with np.errstate(divide="ignore"):
        lse = (np.where(np.isfinite(top), top, 0) + np.log(total))[..., 0]
    dp = np.einsum("bthc,bmhc->bhtm", do, wide_v)
    delta = np.einsum("bthc,bthc->bht", o, do) - np.where(np.isfinite(lse), dlse, 0)
    ds = p * (dp - delta[..., None]) * scale
    dq = turn(np.einsum("bhtm,bmhc->bthc", ds, turned_k), q_pos, theta, inverse=True)

    def gather(x):
        return x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3)

    dk = turn(gather(np.einsum("bhtm,bthc->bmhc", ds, turned_q)), k_pos, theta, inverse=True)
    return o, lse, (dq, dk, gather(np.einsum("bhtm,bthc->bmhc", p, do)))
