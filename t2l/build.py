"""Text-to-LoRA from a config: sentence embedder and hypernetwork module."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hyperlora import lora
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.models.base import BaseModel
from hyperlora.models.embedders import load_embedder
from hyperlora.models.families import DecoderConfig
from t2l.hypernetwork import TextToLora, TextToLoraConfig


def make_module(config: ConfigDict, base: DecoderConfig) -> TextToLora:
    """The hypernetwork for a base model.

    Raises:
      UserError: unknown target module.
    """
    return TextToLora(
        TextToLoraConfig(
            num_layers=base.num_layers,
            dims=lora.module_dims(base, config.modules),
            **config.shape,
        )
    )


def build(config: ConfigDict, base: BaseModel, mesh: jax.sharding.Mesh | None) -> Hypernetwork:
    """Builds the hypernetwork. Its contexts are embeddings: `{'embedding': [n, e]}`.

    Descriptions are embedded once, by the encoder, outside the training step.

    Raises:
      UserError: unknown embedder, or one of another width; unknown target module.
    """
    module = make_module(config, base.config)
    embedder = load_embedder(config.embedder, base)
    width = module.config.embedding_width
    if embedder.width != width:
        raise UserError(
            f'the embedder {embedder.name} gives vectors of width {embedder.width}; '
            f'this hypernetwork reads {width}: use the embedder that it was trained with'
        )

    def encode(_, context):
        return context['embedding'], None

    return Hypernetwork(module, embedder, encode, {'embedding': jnp.zeros((1, width))})
