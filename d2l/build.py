"""Doc-to-LoRA from a config: context encoder and hypernetwork module."""

from __future__ import annotations

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from d2l.context_encoders import CONTEXT_ENCODERS, Config, text_config
from d2l.hypernetwork import DocToLora, DocToLoraConfig
from hyperlora import lora
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.models.base import BaseModel, abstract_base, load_base
from hyperlora.models.decoder import prefix
from hyperlora.models.families import DecoderConfig
from hyperlora.models.vision import MultimodalConfig, soft_tokens


def make_module(config: ConfigDict, base: DecoderConfig, encoder: Config) -> DocToLora:
    """The hypernetwork for a base model, which reads activations of an encoder.

    Raises:
      UserError: unknown target module.
    """
    return DocToLora(
        DocToLoraConfig(
            num_layers=base.num_layers,
            dims=lora.module_dims(base, config.modules),
            layer_to_layer=config.encoder.name == 'per_layer_activations',
            feature_width=text_config(encoder).width,
            **config.shape,
        )
    )


def build(config: ConfigDict, base: BaseModel, mesh: jax.sharding.Mesh | None) -> Hypernetwork:
    """Builds the hypernetwork; `config.encoder.model` reads the documents, or the base itself.

    Contexts are `tokens [n, s]`, `mask [n, s]` and, if the encoder reads images, `pixels [n, i, h,
    w, 3]` (see `vision.soft_tokens`); or `soft [n, t, d]`, embeddings of the first t tokens, such
    as those of `d2l.captioner`.

    Raises:
      UserError: unknown context encoder, or one with too few layers; unknown target module.
    """
    name = config.encoder.name
    if name not in CONTEXT_ENCODERS:
        raise UserError(f'unknown context encoder {name!r}; known: {", ".join(CONTEXT_ENCODERS)}')
    encoder = base
    if config.encoder.model:
        c = config.encoder
        load = abstract_base if base.abstract else functools.partial(load_base, images=True)
        encoder = load(c.model, c.dtype, mesh, c.quantization)
    module = make_module(config, base.config, encoder.config)
    count = base.config.num_layers if module.config.layer_to_layer else config.encoder.num_layers
    depth = text_config(encoder.config).num_layers
    if count > depth:
        raise UserError(
            f'the context encoder {encoder.name} has {depth} layers; {name} needs {count}'
        )
    features = functools.partial(CONTEXT_ENCODERS[name], encoder.config, num_layers=count)

    def encode(params, context):
        tokens, soft = context['tokens'], None
        if 'pixels' in context:
            if not isinstance(encoder.config, MultimodalConfig):
                raise UserError('the context encoder reads no images; give a Gemma 3 that does')
            soft = soft_tokens(encoder.config, params, tokens, context['pixels'])
        elif 'soft' in context:
            soft = prefix(context['soft'], tokens.shape[1])
        return features(params, tokens, soft), context['mask']

    example = {'tokens': np.zeros((1, 8), np.int32), 'mask': np.ones((1, 8), bool)}
    return Hypernetwork(module, encoder, encode, example)
