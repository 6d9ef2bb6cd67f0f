"""Doc-to-LoRA from a config: context encoder and hypernetwork module."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from ml_collections import ConfigDict

from d2l.context_encoders import CONTEXT_ENCODERS
from d2l.hypernetwork import DocToLora, DocToLoraConfig
from hyperlora import lora
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.models.families import DecoderConfig


def build(config: ConfigDict, base: DecoderConfig) -> Hypernetwork:
    """Builds the hypernetwork for a base model that is its own context encoder.

    Raises:
      UserError: unknown context encoder.
    """
    if config.encoder.name not in CONTEXT_ENCODERS:
        raise UserError(
            f'unknown context encoder {config.encoder.name!r}; known: {", ".join(CONTEXT_ENCODERS)}'
        )
    options = {'num_layers': config.encoder.num_layers} if config.encoder.num_layers else {}
    encoder = functools.partial(CONTEXT_ENCODERS[config.encoder.name], base, **options)
    module = DocToLora(
        DocToLoraConfig(
            num_layers=base.num_layers,
            dims=lora.module_dims(base, config.modules),
            layer_to_layer=config.encoder.name == 'per_layer_activations',
            feature_width=base.width,
            **config.shape,
        )
    )

    def encode(frozen, context):
        return encoder(frozen, context['tokens']), context['mask']

    example = {'tokens': jnp.zeros((1, 8), jnp.int32), 'mask': jnp.ones((1, 8), bool)}
    return Hypernetwork(module, encode, example)
