"""Context encoders: what the hypernetwork sees of a chunk, computed by a frozen model.

Axes: n chunks, e entries (1, or one per layer of the base model), s tokens, f feature width.

Source: Doc-to-LoRA (arXiv 2602.15902), section 3.1. Nothing here is differentiated.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hyperlora.models.decoder import embed, first_layers
from hyperlora.models.families import DecoderConfig


def early_exit(
    config: DecoderConfig, params: Any, tokens: jax.Array, *, num_layers: int
) -> jax.Array:
    """Final norm of the hidden states after the first `num_layers` layers, `[n, 1, s, f]`.

    Args:
      tokens: `[n, s]` int32, padded to the right.
    """
    return first_layers(config, params, tokens, num_layers)[0][:, None]


def embed_only(
    config: DecoderConfig, params: Any, tokens: jax.Array, *, num_layers: int = 0
) -> jax.Array:
    """Token embeddings, `[n, 1, s, f]`; `num_layers` plays no part."""
    table = jax.lax.stop_gradient(params['embedder']['embedding'])
    return embed(config, table, tokens)[:, None]


def per_layer_activations(
    config: DecoderConfig, params: Any, tokens: jax.Array, *, num_layers: int
) -> jax.Array:
    """The input of each of the first `num_layers` blocks, embeddings first, `[n, e, s, f]`.

    The last is taken after the final norm; the last block is never run.
    """
    hidden, inputs = first_layers(config, params, tokens, num_layers - 1)
    return jnp.concatenate([inputs, hidden[None]]).swapaxes(0, 1)


CONTEXT_ENCODERS = {
    'early_exit': early_exit,
    'embed_only': embed_only,
    'per_layer_activations': per_layer_activations,
}
