"""Attention: the one implementation that every module calls.

Axes: b rows, s queries, t keys, k key/value heads, q query heads per key/value head, h head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_QUERY_BLOCK = 256  # longer sequences are attended block by block: memory linear in s


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array | None = None
) -> jax.Array:
    """Grouped-query attention with the softmax in f32.

    Args:
      q: `[b, s, k * q, h]`; k and v: `[b, t, k, h]`.
      visible: bool, broadcastable to `[b, s, t]`: which keys each query sees. None for all.

    Returns:
      `[b, s, k * q * h]`.
    """
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    q = (q * width**-0.5).reshape(batch, queries, kv_heads, heads // kv_heads, width)
    if visible is not None:
        visible = visible[:, None, None]
    # Heads first, so that all products are plain batched ones: twice as fast on a CPU.
    y = _attend(q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2), visible)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads * width)


@jax.custom_vjp
def _attend(q, k, v, visible):
    """`[b, k, q, s, h]`, twice `[b, k, t, h]`, `[b or 1, 1, 1, s or 1, t]` -> `[b, k, q, s, h]`."""
    return _forward(q, k, v, visible)[0]


def _exp_scores(q, k, visible):
    """The softmax before its division, f32, and its sums."""
    scores = jnp.einsum('bkqsh,bkth->bkqst', q, k, preferred_element_type=jnp.float32)
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _forward(q, k, v, visible):
    # Divided by the sum after the product: there are fewer outputs than scores.
    weights, total = _exp_scores(q, k, visible)
    y = jnp.einsum(
        'bkqst,bkth->bkqsh', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    y = (y / total).astype(v.dtype)
    return y, (q, k, v, visible, y)


def _backward(kept, dy):
    """Keeps no scores but computes them again (FlashAttention, arXiv 2205.14135, appendix B.2)."""
    q, k, v, visible, y = kept
    weights, total = _exp_scores(q, k, visible)
    weights = weights / total
    dv = jnp.einsum('bkqst,bkqsh->bkth', weights.astype(v.dtype), dy)
    dweights = jnp.einsum('bkqsh,bkth->bkqst', dy, v, preferred_element_type=jnp.float32)
    mean = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
    dscores = (weights * (dweights - mean)).astype(q.dtype)
    dq = jnp.einsum('bkqst,bkth->bkqsh', dscores, k)
    return dq, jnp.einsum('bkqst,bkqsh->bkth', dscores, q), dv, None


_attend.defvjp(_forward, _backward)


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None
) -> jax.Array:
    """Self-attention in which each token sees itself and those before it.

    Args:
      q, k, v: as for `attention`, with s = t.
      segments: `[b, s]`; tokens of other segments are not seen. None for one segment.
    """
    tokens = q.shape[1]
    blocks = []
    for start in range(0, tokens, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, tokens)
        visible = (jnp.arange(end) <= jnp.arange(start, end)[:, None])[None]
        if segments is not None:
            visible &= segments[:, start:end, None] == segments[:, None, :end]
        blocks.append(attention(q[:, start:end], k[:, :end], v[:, :end], visible))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 1)
