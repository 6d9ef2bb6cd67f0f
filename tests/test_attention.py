"""Attention and its hand-written gradient, against plain formulas differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora.models import attention as attention_lib
from hyperlora.models.attention import attention, causal_attention, full_attention

RNG = np.random.default_rng(0)
Q, K, V = (
    RNG.normal(size=(2, length, heads, 8)).astype(np.float32)
    for length, heads in ((6, 6), (9, 3), (9, 3))
)
MASK = RNG.random((2, 6, 9)) < 0.7
MASK[:, :, 0] = True


def reference(q, k, v, visible, scale, softcap):
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    scores = jnp.einsum('bshd,bthd->bhst', q, k) * (8**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if visible is not None:
        scores = jnp.where(visible[:, None], scores, -1e30)
    y = jnp.einsum('bhst,bthd->bshd', jax.nn.softmax(scores), v)
    return y.reshape(*y.shape[:2], -1)


@pytest.mark.parametrize('scale, softcap', [(None, None), (0.7, 1.5)])
@pytest.mark.parametrize('visible', [None, MASK, MASK[:1], MASK[:, :1]])
def test_attention_and_its_gradient(visible, scale, softcap):
    weight = RNG.normal(size=(2, 6, 48)).astype(np.float32)

    def loss(function):
        def run(q, k, v):
            y = function(q, k, v, visible, scale, softcap)
            return (weight * jnp.sin(y)).sum(), y

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(Q, K, V)

    (_, ours), gradient = loss(attention)
    (_, theirs), expected = loss(reference)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for a, b in zip(gradient, expected, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_causal_token_sees_no_later_one_and_no_other_segment():
    k, v = K[:, :6], V[:, :6]
    y = causal_attention(Q, k, v)
    for position in range(6):
        changed = v.copy()
        changed[:, position + 1 :] += 1
        np.testing.assert_array_equal(
            causal_attention(Q, k, changed)[:, : position + 1], y[:, : position + 1]
        )
    packed = causal_attention(Q, k, v, np.asarray([[0, 0, 0, 1, 1, 1]] * 2))
    np.testing.assert_allclose(packed[:, :3], y[:, :3], atol=1e-6)
    alone = causal_attention(Q[:, 3:], k[:, 3:], v[:, 3:])
    np.testing.assert_allclose(packed[:, 3:], alone, atol=1e-6)
    assert np.abs(packed[:, 3:] - y[:, 3:]).max() > 0.1


@pytest.mark.parametrize('block', [256, 4])
def test_a_group_sees_itself_in_both_directions(monkeypatch, block):
    """A window of local layers hides what is too far back even in the same group."""
    monkeypatch.setattr(attention_lib, '_QUERY_BLOCK', block)
    q = RNG.normal(size=(2, 9, 6, 8)).astype(np.float32)
    groups = np.array([[0, 1, 1, 1, 1, 1, 1, 0, 0], [2, 2, 0, 1, 1, 0, 3, 3, 3]])
    segments = np.array([[0] * 9, [0] * 5 + [1] * 4])
    back = np.arange(9)[:, None] - np.arange(9)
    together = (groups[:, :, None] == groups[:, None]) & (groups[:, :, None] != 0)
    one_segment = segments[:, :, None] == segments[:, None]
    causal = causal_attention(q, K, V)
    for local in (False, True):
        visible = ((back >= 0) | together) & ((back < 3) | (not local))
        y = causal_attention(q, K, V, None, groups, 3, local)
        np.testing.assert_allclose(y, attention(q, K, V, visible), atol=1e-6)
        packed = causal_attention(q, K, V, segments, groups, 3, local, softcap=1.5)
        wanted = attention(q, K, V, visible & one_segment, softcap=1.5)
        np.testing.assert_allclose(packed, wanted, atol=1e-6)
        # The first token of a group differs from that of a causal row, the text before does not.
        assert np.abs(y - causal)[0, 1].max() > 0.01
        np.testing.assert_allclose(y[0, 0], causal[0, 0], atol=1e-6)
    np.testing.assert_allclose(causal_attention(q, K, V, None, 0 * groups), causal, atol=1e-6)
    np.testing.assert_allclose(full_attention(q, K, V), attention(q, K, V), atol=1e-6)


def test_low_precision_stays_low():
    low = [jnp.asarray(x, jnp.bfloat16) for x in (Q, K, V)]
    y, gradient = jax.value_and_grad(lambda *x: attention(*x).astype(jnp.float32).sum())(*low)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(attention(*low).astype(jnp.float32), attention(Q, K, V), atol=0.05)
