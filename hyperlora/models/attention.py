"""Attention: the one implementation that every module calls.

Its products are left to XLA, but for causal self-attention where there is a kernel for it.

Axes: b rows, s queries, t keys, k key/value heads, q query heads per key/value head, h head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hyperlora.models import kernels

_QUERY_BLOCK = 256  # longer sequences are attended block by block: memory linear in s


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Grouped-query attention with the softmax in f32.

    Args:
      q: `[b, s, k * q, h]`; k and v: `[b, t, k, h]`.
      visible: bool, broadcastable to `[b, s, t]`: which keys each query sees. None for all.
      scale: multiplies the scores; None for `h ** -0.5`.
      softcap: bounds the scores as `softcap * tanh(scores / softcap)`; None for no bound.

    Returns:
      `[b, s, k * q * h]`.
    """
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    scale = width**-0.5 if scale is None else scale
    q = (q * scale).reshape(batch, queries, kv_heads, heads // kv_heads, width)
    if visible is not None:
        visible = visible[:, None, None]
    # Heads first, so that all products are plain batched ones: twice as fast on a CPU.
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    y = _attend(softcap, q, k, v, visible)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads * width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(softcap, q, k, v, visible):
    """`[b, k, q, s, h]`, twice `[b, k, t, h]`, `[b or 1, 1, 1, s or 1, t]` -> `[b, k, q, s, h]`."""
    return _forward(softcap, q, k, v, visible)[0]


def _exp_scores(softcap, q, k, visible):
    """The softmax before its division, f32; its sums; the slope of the bound."""
    scores = jnp.einsum('bkqsh,bkth->bkqst', q, k, preferred_element_type=jnp.float32)
    slope = 1.0
    if softcap is not None:
        bounded = jnp.tanh(scores / softcap)
        scores, slope = softcap * bounded, 1 - bounded**2
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True), slope


def _forward(softcap, q, k, v, visible):
    # Divided by the sum after the product: there are fewer outputs than scores.
    weights, total, _ = _exp_scores(softcap, q, k, visible)
    y = jnp.einsum(
        'bkqst,bkth->bkqsh', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    y = (y / total).astype(v.dtype)
    return y, (q, k, v, visible, y)


def _backward(softcap, kept, dy):
    """Keeps no scores but computes them again (FlashAttention, arXiv 2205.14135, appendix B.2)."""
    q, k, v, visible, y = kept
    weights, total, slope = _exp_scores(softcap, q, k, visible)
    weights = weights / total
    dv = jnp.einsum('bkqst,bkqsh->bkth', weights.astype(v.dtype), dy)
    dweights = jnp.einsum('bkqsh,bkth->bkqst', dy, v, preferred_element_type=jnp.float32)
    mean = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
    dscores = (weights * (dweights - mean) * slope).astype(q.dtype)
    dq = jnp.einsum('bkqst,bkth->bkqsh', dscores, k)
    return dq, jnp.einsum('bkqst,bkqsh->bkth', dscores, q), dv, None


_attend.defvjp(_forward, _backward)


def sees(
    queries: jax.Array,
    keys: jax.Array,
    window: int | None,
    local: jax.Array | bool,
    together: jax.Array | None = None,
) -> jax.Array:
    """Whether each query sees each key: none later, in a local layer none out of the window.

    Args:
      queries: `[..., s]` index of each query; keys: `[t]`, that of each key.
      window: tokens that a local layer sees, the query's own included.
      local: whether the layer is local; may be traced. Not used without a window.
      together: `[..., s, t]` bool: which queries see which keys even if these are later.

    Returns:
      `[..., s, t]` bool.
    """
    back = queries[..., None] - keys
    visible = back >= 0
    if together is not None:
        visible |= together
    if window is not None:
        visible &= (back < window) | jnp.logical_not(local)
    return visible


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    groups: jax.Array | None = None,
    window: int | None = None,
    local: jax.Array | bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Self-attention in which each token sees itself and those before it.

    Args:
      q, k, v: as for `attention`, with s = t.
      segments: `[b, s]`; tokens of other segments are not seen. None for one segment.
      groups: `[b, s]`; tokens of one group other than 0 see each other in both directions. The
        window of a local layer limits only how far back they see. None for no groups.
      window, local: see `sees`.
      scale, softcap: as for `attention`.
    """
    tokens = q.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if window is not None and (window >= tokens or local is False):
        window = None
    kernel = None if groups is not None else kernels.find(q, k, segments, softcap)
    if kernel is not None:

        def run(window, *arrays):
            return kernel(*arrays, window, scale, softcap)

        if window is None or local is True:
            return run(window, q, k, v, segments)
        near, far = functools.partial(run, window), functools.partial(run, None)
        return jax.lax.cond(local, near, far, q, k, v, segments)

    def attend(start, end):
        last, together = end, None
        if groups is not None:
            last = tokens
            own, others = groups[:, start:end, None], groups[:, None]
            together = (own == others) & (own != 0)
        queries = jnp.arange(start, end)[None]
        visible = sees(queries, jnp.arange(last), window, local, together)
        if segments is not None:
            visible &= segments[:, start:end, None] == segments[:, None, :last]
        return attention(q[:, start:end], k[:, :last], v[:, :last], visible, scale, softcap)

    return _in_blocks(tokens, attend)


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs) -> jax.Array:
    """Self-attention in which each token sees all; arguments and result as for `attention`."""
    return _in_blocks(q.shape[1], lambda start, end: attention(q[:, start:end], k, v, **kwargs))


def _in_blocks(tokens: int, attend: Callable[[int, int], jax.Array]) -> jax.Array:
    """The results of `attend`, `[b, end - start, ...]`, for blocks of queries from start to end."""
    starts = range(0, tokens, _QUERY_BLOCK)
    blocks = [attend(start, min(start + _QUERY_BLOCK, tokens)) for start in starts]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 1)
