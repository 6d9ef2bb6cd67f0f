"""Text-to-LoRA from a config: sentence embedder and hypernetwork module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hyperlora import lora
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.models.base import BaseModel
from hyperlora.models.embedders import load_embedder
from hyperlora.models.families import DecoderConfig
from t2l.hypernetwork import TextToLora, TextToLoraConfig
from t2l.reconstruction import load_loras, statistics


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

    Descriptions are embedded once, by the encoder, outside the training step. `config.loras`, a
    checkpoint of a `LoraTable`, gives what a fresh hypernetwork starts with: the statistics for
    z-scores and the multi-task LoRA (the mean of the entries); or, if each layer has one head for A
    and B, the heads of a table of codes, so that only the codes are left to learn.

    Raises:
      UserError: unknown embedder, or one of another width; unknown target module; a table
        without codes where heads are taken over, or with codes of another width.
    """
    module = make_module(config, base.config)
    embedder = load_embedder(config.embedder, base)
    width = module.config.embedding_width
    if embedder.width != width:
        raise UserError(
            f'the embedder {embedder.name} gives vectors of width {embedder.width}; '
            f'this hypernetwork reads {width}: use the embedder that it was trained with, or train '
            f'anew with config.hypernetwork.shape.embedding_width={embedder.width}'
        )

    def encode(_, context):
        return context['embedding'], None

    def start(params: Any) -> Any:
        if not config.get('loras'):
            return params
        table = load_loras(config.loras, base, config).params
        c = module.config
        if c.per_layer_heads and not (c.z_score or c.shared_head or c.per_rank):
            if 'codes' not in table:
                raise UserError(
                    f'{config.loras} holds plain LoRAs, not codes, whose heads a hypernetwork with '
                    'heads for each layer takes over: train them by configs/t2l.py:codes, or learn '
                    'from plain ones by configs/t2l.py:reconstruction'
                )
            return {**params, **_heads(table, c)}
        found = statistics(table)
        known = {'mean': 'mean', 'deviation': 'deviation', 'offset': 'mean'}
        filled = {
            f'{kind}_{name}': x for kind, of in known.items() for name, x in found[of].items()
        }
        return {name: filled.get(name, x) for name, x in params.items()}

    example = {'embedding': np.zeros((1, width), np.float32)}
    return Hypernetwork(module, embedder, encode, example, start)


def _heads(table: dict[str, jax.Array], config: TextToLoraConfig) -> dict[str, Any]:
    """The heads of every layer that make of a code what the table makes of it."""
    width = table['codes'].shape[1]
    if width != config.head_width:
        raise UserError(f'the codes have width {width}, the heads read {config.head_width}')

    def joined(factors):
        return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in factors], -1)

    return {
        f'head_{name}': {
            'kernel': joined([table[f'head_{factor}_{name}'] for factor in 'ab']),
            'bias': joined([table[f'{factor}_{name}'] for factor in 'ab'])[:, 0],
        }
        for name, _, _ in config.dims
    }
