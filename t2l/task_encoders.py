"""Task encoders: the embedding of a description -> the task's part of the hypernetwork's input.

Axes: n descriptions, e embedding width, d width of the code, k entries of a codebook.

Source: Text-to-LoRA (arXiv 2506.06105), section 3 and its public code. Dropout and sampling are on
when a `dropout` key is given. Entries of the `losses` collection are added to the objective.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora.layers import dense

_ENTRIES = 32
_CLASSES = 64
_COMMITMENT = 0.01


class Linear(nn.Module):
    """A linear map under a LayerNorm, `[n, e]` -> `[n, d]`."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = dense(self.width, (None, 'latent'), 'linear', use_bias=True)(x)
        return nn.LayerNorm(epsilon=1e-5, name='norm')(x)


class Discrete(nn.Module):
    """One of 64 classes as a one-hot vector, `[n, e]` -> `[n, 64]`; `width` plays no part.

    Sampled in training with a straight-through gradient, the likeliest otherwise.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        logits = _mlp(self, x, _CLASSES, 4 * _CLASSES)
        if self.has_rng('dropout'):
            sample = jax.random.categorical(self.make_rng('dropout'), logits)
            probs = nn.softmax(logits)
            return jax.nn.one_hot(sample, _CLASSES) + probs - jax.lax.stop_gradient(probs)
        return jax.nn.one_hot(logits.argmax(-1), _CLASSES)


class Softmax(nn.Module):
    """A mixture of 32 learned codes, `[n, e]` -> `[n, d]`."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        probs = nn.softmax(_mlp(self, x, _ENTRIES, 4 * self.width))
        codebook = self.param('codebook', nn.initializers.normal(1.0), (_ENTRIES, self.width))
        return nn.LayerNorm(epsilon=1e-5, name='norm')(probs @ codebook)


class VectorQuantized(nn.Module):
    """The nearest of 32 codes, `[n, e]` -> `[n, d]`, with a straight-through gradient.

    The codes follow the embeddings by the gradient of their squared distance (van den Oord et al.,
    2017), where the original keeps moving averages.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _mlp(self, x, self.width, 4 * self.width)
        codebook = self.param('codebook', nn.initializers.normal(1.0), (_ENTRIES, self.width))
        distances = jnp.square(x[:, None] - codebook).sum(-1)
        code = codebook[distances.argmin(-1)]
        still = jax.lax.stop_gradient
        commitment = _COMMITMENT * jnp.square(still(code) - x).mean()
        self.sow('losses', 'vector_quantized', commitment + jnp.square(code - still(x)).mean())
        return nn.LayerNorm(epsilon=1e-5, name='norm')(x + still(code - x))


def _mlp(module: nn.Module, x: jax.Array, outputs: int, hidden: int) -> jax.Array:
    x = nn.silu(dense(hidden, (None, 'mlp'), 'up', use_bias=True)(x))
    x = nn.Dropout(0.05, deterministic=not module.has_rng('dropout'))(x)
    return dense(outputs, ('mlp', 'latent'), 'down', use_bias=True)(x)


TASK_ENCODERS = {
    'linear': Linear,
    'discrete': Discrete,
    'softmax': Softmax,
    'vq': VectorQuantized,
}
