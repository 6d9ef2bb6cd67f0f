"""Context encoders: what the hypernetwork sees of a chunk, computed by a frozen model.

Axes: n chunks, e entries (1, or one per layer of the base model), s tokens, f feature width.

Source: Doc-to-LoRA (arXiv 2602.15902), section 3.1. Nothing here is differentiated.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hyperlora.models import decoder
from hyperlora.models.decoder import SoftTokens
from hyperlora.models.families import DecoderConfig
from hyperlora.models.vision import MultimodalConfig

Config = DecoderConfig | MultimodalConfig


def text_config(config: Config) -> DecoderConfig:
    """The decoder of a model that may read images."""
    return config.text if isinstance(config, MultimodalConfig) else config


def early_exit(
    config: Config,
    params: Any,
    tokens: jax.Array,
    soft: SoftTokens | None = None,
    *,
    num_layers: int,
) -> jax.Array:
    """Final norm of the hidden states after the first `num_layers` layers, `[n, 1, s, f]`.

    Args:
      tokens: `[n, s]` int32, padded to the right.
      soft: stand in for some of the tokens, such as those of images.
    """
    return _first_layers(config, params, tokens, soft, num_layers)[0][:, None]


def embed_only(
    config: Config,
    params: Any,
    tokens: jax.Array,
    soft: SoftTokens | None = None,
    *,
    num_layers: int = 0,
) -> jax.Array:
    """What the first block reads, `[n, 1, s, f]`; `num_layers` plays no part."""
    return _first_layers(config, params, tokens, soft, 1)[1].swapaxes(0, 1)


def per_layer_activations(
    config: Config,
    params: Any,
    tokens: jax.Array,
    soft: SoftTokens | None = None,
    *,
    num_layers: int,
) -> jax.Array:
    """The input of each of the first `num_layers` blocks, embeddings first, `[n, e, s, f]`.

    The last is taken after the final norm; the last block is never run.
    """
    hidden, inputs = _first_layers(config, params, tokens, soft, num_layers - 1)
    return jnp.concatenate([inputs, hidden[None]]).swapaxes(0, 1)


def _first_layers(config, params, tokens, soft, count):
    return decoder.first_layers(text_config(config), params, tokens, count, soft=soft)


CONTEXT_ENCODERS = {
    'early_exit': early_exit,
    'embed_only': embed_only,
    'per_layer_activations': per_layer_activations,
}
