"""Context encoders: what the hypernetwork sees of a chunk, computed by the frozen model itself.

Axes: n chunks, e entries (1, or l layers), s tokens, f feature width.

Source: Doc-to-LoRA (arXiv 2602.15902), section 3.1. Nothing here is differentiated.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hyperlora.models.decoder import first_layers
from hyperlora.models.families import DecoderConfig


def early_exit(
    config: DecoderConfig, params: Any, tokens: jax.Array, *, num_layers: int
) -> jax.Array:
    """Final norm of the hidden states after the first `num_layers` layers, `[n, 1, s, f]`.

    Args:
      tokens: `[n, s]` int32, padded to the right.
    """
    return first_layers(config, params, tokens, num_layers)[0][:, None]


def per_layer_activations(config: DecoderConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """The input of every block, embeddings first, `[n, l, s, f]`; the last after the final norm.

    The last block is never run.
    """
    hidden, inputs = first_layers(config, params, tokens, config.num_layers - 1)
    return jnp.concatenate([inputs, hidden[None]]).swapaxes(0, 1)


CONTEXT_ENCODERS = {'early_exit': early_exit, 'per_layer_activations': per_layer_activations}
