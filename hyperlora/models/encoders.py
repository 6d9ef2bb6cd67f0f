"""Text encoders, which see a text in both directions: BERT, ModernBERT and GTE ("new").

One linen module serves them all, driven by an `EncoderConfig`; its parameters come from Hugging
Face folders. Axes: b rows, s tokens (t as keys), d width, f MLP width, n heads, h head width.

The families are those of arXiv 1810.04805 (BERT: learned positions, norms after each sum), arXiv
2412.13663 (ModernBERT: rope, gated MLP, norms before each part, most layers local) and arXiv
2407.19669 (GTE: rope, gated MLP, norms after each sum).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperlora.errors import UserError
from hyperlora.models import families, weights
from hyperlora.models.attention import attention
from hyperlora.models.decoder import ACTIVATIONS, Angles, rotate
from hyperlora.models.families import Rope


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder.

    Attributes:
      max_length: the most tokens that it reads.
      num_token_types: size of a table of which the first entry is added to every embedding; 0 for
        no table.
      rope: of the global layers; None for learned positions instead.
      local_rope: of the local layers.
      local_layers: which layers are local, one flag each.
      attention_window: how many tokens a local layer sees on either side.
      pre_norm: norms stand before attention and MLP, not after the sums.
      gated_mlp: the MLP is gated.
      activation: of the MLP or its gate, a key of `decoder.ACTIVATIONS`.
      attention_bias, mlp_in_bias, mlp_out_bias, norm_bias: what has a bias.
    """

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    norm_eps: float
    max_length: int
    activation: str
    num_token_types: int = 0
    rope: Rope | None = None
    local_rope: Rope | None = None
    local_layers: tuple[bool, ...] = ()
    attention_window: int | None = None
    pre_norm: bool = False
    gated_mlp: bool = False
    attention_bias: bool = True
    mlp_in_bias: bool = True
    mlp_out_bias: bool = True
    norm_bias: bool = True


class Attention(nn.Module):
    """Self-attention in both directions."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, angles: Angles | None) -> jax.Array:
        c = self.config
        shape = (*x.shape[:2], c.num_heads, c.width // c.num_heads)

        def project(name, x):
            return nn.Dense(c.width, use_bias=c.attention_bias, name=name)(x)

        q, k, v = (project(f'{name}_proj', x).reshape(shape) for name in 'qkv')
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        return project('o_proj', attention(q, k, v, visible))


class Mlp(nn.Module):
    """Two layers, or three with a gate."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        activation = ACTIVATIONS[c.activation]
        y = nn.Dense(c.mlp_width, use_bias=c.mlp_in_bias, name='up_proj')(x)
        if c.gated_mlp:
            gate = nn.Dense(c.mlp_width, use_bias=c.mlp_in_bias, name='gate_proj')(x)
            y = activation(gate) * y
        else:
            y = activation(y)
        return nn.Dense(c.width, use_bias=c.mlp_out_bias, name='down_proj')(y)


class Layer(nn.Module):
    """Attention and MLP.

    Attributes:
      normed: its input has been normed already.
    """

    config: EncoderConfig
    normed: bool

    @nn.compact
    def __call__(self, x: jax.Array, visible: jax.Array, angles: Angles | None) -> jax.Array:
        attend, mlp = Attention(self.config, name='attention'), Mlp(self.config, name='mlp')
        if self.config.pre_norm:
            h = x if self.normed else _norm(self.config, 'attention_norm')(x)
            x = x + attend(h, visible, angles)
            return x + mlp(_norm(self.config, 'mlp_norm')(x))
        x = _norm(self.config, 'attention_norm')(x + attend(x, visible, angles))
        return _norm(self.config, 'mlp_norm')(x + mlp(x))


class Encoder(nn.Module):
    """A text encoder."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Runs all layers.

        Args:
          tokens: `[b, s]` int32, padded to the right.
          lengths: `[b]` int32, at least 1: how many tokens of each row are real.

        Returns:
          The last hidden states, `[b, s, d]`; those of padding mean nothing.
        """
        c = self.config
        positions = jnp.arange(tokens.shape[1])
        x = nn.Embed(c.vocab_size, c.width, name='embedder')(tokens)
        if c.num_token_types:
            first = jnp.zeros(1, jnp.int32)
            x += nn.Embed(c.num_token_types, c.width, name='token_type_embedder')(first)
        if c.rope is None:
            x += nn.Embed(c.max_length, c.width, name='position_embedder')(positions)
        x = _norm(c, 'embedding_norm')(x)
        real = (positions < lengths[:, None])[:, None]  # b 1 t
        angles = {
            False: self._angles(c.rope, positions),
            True: self._angles(c.local_rope, positions),
        }
        for i in range(c.num_layers):
            local = any(c.local_layers) and c.local_layers[i]
            visible = real
            if local:
                visible &= jnp.abs(positions[:, None] - positions) <= c.attention_window
            x = Layer(c, normed=i == 0, name=f'layer_{i}')(x, visible, angles[local])
        return _norm(c, 'final_norm')(x) if c.pre_norm else x

    def _angles(self, rope: Rope | None, positions: jax.Array) -> Angles | None:
        if rope is None:
            return None
        frequencies = rope.frequencies(self.config.width // self.config.num_heads)
        turned = positions[:, None, None].astype(jnp.float32) * frequencies
        return jnp.sin(turned), jnp.cos(turned)


def _norm(config: EncoderConfig, name: str) -> nn.Module:
    return nn.LayerNorm(
        config.norm_eps, use_bias=config.norm_bias, use_fast_variance=False, name=name
    )


# ------------------------------------------------------------------------------------- config

# By `model_type`: what the original code assumes where a config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    'bert': {
        'hidden_act': 'gelu',
        'layer_norm_eps': 1e-12,
        'max_position_embeddings': 512,
        'position_embedding_type': 'absolute',
        'type_vocab_size': 2,
    },
    'modernbert': {
        'attention_bias': False,
        'global_attn_every_n_layers': 3,
        'global_rope_theta': 160000.0,
        'hidden_activation': 'gelu',
        'layer_norm_eps': None,  # not read by the original code, though in published files,
        'layer_types': None,
        'local_attention': 128,
        'local_rope_theta': 10000.0,
        'max_position_embeddings': 8192,
        'mlp_bias': False,
        'norm_bias': False,
        'norm_eps': 1e-5,
        'position_embedding_type': None,  # and likewise
        'rope_parameters': None,
    },
    'new': {
        'hidden_act': 'gelu',
        'layer_norm_eps': 1e-12,
        'layer_norm_type': 'layer_norm',
        'max_position_embeddings': 2048,
        'pack_qkv': True,
        'position_embedding_type': 'rope',
        'rope_scaling': None,
        'rope_theta': 10000.0,
        'type_vocab_size': 1,
    },
}
# Settings of which one value alone is supported.
_FIXED = {
    'bert': {'position_embedding_type': 'absolute'},
    'modernbert': {},
    'new': {'layer_norm_type': 'layer_norm', 'pack_qkv': True, 'position_embedding_type': 'rope'},
}
_UNSUPPORTED = ('add_cross_attention', 'is_decoder', 'is_encoder_decoder', 'logn_attention_scale')
# Training, heads, and ways to compute the same.
_IRRELEVANT = frozenset(
    """
    attention_probs_dropout_prob auto_map classifier_activation classifier_bias classifier_dropout
    classifier_pooling cls_token_id decoder_bias deterministic_flash_attn directionality
    embedding_dropout gradient_checkpointing hidden_dropout_prob initializer_cutoff_factor
    logn_attention_clip1 mlp_dropout pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type reference_compile
    repad_logits_with_grad sparse_pred_ignore_index sparse_prediction tie_word_embeddings
    unpad_inputs use_memory_efficient_attention
    """.split()
)
FAMILIES = tuple(_DEFAULTS)


def from_hf(config: Mapping[str, Any]) -> EncoderConfig:
    """Reads the contents of a Hugging Face config.json, in the old or the new layout.

    Raises:
      UserError: a key is missing or not known, or the model needs something that is not supported.
    """
    c = families.complete(config, _DEFAULTS, _UNSUPPORTED, _IRRELEVANT)
    family = c['model_type']
    for key, value in _FIXED[family].items():
        if c[key] != value:
            raise UserError(f'{family}: {key} = {c[key]!r} is not supported (only {value!r})')
    read = {'bert': _bert, 'modernbert': _modernbert, 'new': _gte}[family]
    if c['hidden_size'] % c['num_attention_heads']:
        raise UserError(f'{family}: num_attention_heads does not divide hidden_size')
    return EncoderConfig(
        vocab_size=c['vocab_size'],
        num_layers=c['num_hidden_layers'],
        width=c['hidden_size'],
        mlp_width=c['intermediate_size'],
        num_heads=c['num_attention_heads'],
        max_length=c['max_position_embeddings'],
        **read(c),
    )


def _bert(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        'norm_eps': c['layer_norm_eps'],
        'activation': families.activation(c, 'hidden_act'),
        'num_token_types': c['type_vocab_size'],
    }


def _modernbert(c: Mapping[str, Any]) -> dict[str, Any]:
    every = c['global_attn_every_n_layers']
    kinds = c['layer_types'] or [
        'sliding_attention' if i % every else 'full_attention'
        for i in range(c['num_hidden_layers'])
    ]
    unknown = sorted(set(kinds) - {'sliding_attention', 'full_attention'})
    if unknown:
        raise UserError(f'modernbert: attention of kind {", ".join(unknown)} is not supported')
    if len(kinds) != c['num_hidden_layers']:
        raise UserError(f'modernbert: {len(kinds)} layer_types, {c["num_hidden_layers"]} layers')

    def rope(kind, theta):
        settings = (c['rope_parameters'] or {}).get(kind) or {}
        head_dim = c['hidden_size'] // c['num_attention_heads']
        return families.read_rope('modernbert', {'rope_theta': theta, **settings}, head_dim)

    return {
        'norm_eps': c['norm_eps'],
        'activation': families.activation(c, 'hidden_activation'),
        'rope': rope('full_attention', c['global_rope_theta']),
        'local_rope': rope('sliding_attention', c['local_rope_theta']),
        'local_layers': tuple(kind == 'sliding_attention' for kind in kinds),
        'attention_window': c['local_attention'] // 2,
        'pre_norm': True,
        'gated_mlp': True,
        'attention_bias': c['attention_bias'],
        'mlp_in_bias': c['mlp_bias'],
        'mlp_out_bias': c['mlp_bias'],
        'norm_bias': c['norm_bias'],
    }


def _gte(c: Mapping[str, Any]) -> dict[str, Any]:
    theta, scaling = float(c['rope_theta']), dict(c['rope_scaling'] or {})
    half = c['hidden_size'] // c['num_attention_heads'] // 2
    rope = Rope(theta)
    if scaling:
        kind, factor = scaling.pop('type', None), scaling.pop('factor', None)
        if kind != 'ntk' or factor is None or any(v is not None for v in scaling.values()):
            raise UserError(f'new: rope_scaling {c["rope_scaling"]!r} is not supported')
        # Whatever the length of the text.
        rope = Rope(theta * factor, (factor ** (1 / half),) * half)
    return {
        'norm_eps': c['layer_norm_eps'],
        'activation': families.activation(c, 'hidden_act'),
        'num_token_types': c['type_vocab_size'],
        'rope': rope,
        'gated_mlp': True,
        'mlp_in_bias': False,
    }


# ------------------------------------------------------------------------------------ weights

# Our module: that of the files, `{}` for the number of the layer; or one of n equal parts of it.
_MODULES: dict[str, dict[str, str | tuple[str, int, int]]] = {
    'bert': {
        'embedder': 'embeddings.word_embeddings',
        'token_type_embedder': 'embeddings.token_type_embeddings',
        'position_embedder': 'embeddings.position_embeddings',
        'embedding_norm': 'embeddings.LayerNorm',
        'layer/attention/q_proj': 'encoder.layer.{}.attention.self.query',
        'layer/attention/k_proj': 'encoder.layer.{}.attention.self.key',
        'layer/attention/v_proj': 'encoder.layer.{}.attention.self.value',
        'layer/attention/o_proj': 'encoder.layer.{}.attention.output.dense',
        'layer/attention_norm': 'encoder.layer.{}.attention.output.LayerNorm',
        'layer/mlp/up_proj': 'encoder.layer.{}.intermediate.dense',
        'layer/mlp/down_proj': 'encoder.layer.{}.output.dense',
        'layer/mlp_norm': 'encoder.layer.{}.output.LayerNorm',
    },
    'modernbert': {
        'embedder': 'embeddings.tok_embeddings',
        'embedding_norm': 'embeddings.norm',
        'layer/attention_norm': 'layers.{}.attn_norm',
        'layer/attention/q_proj': ('layers.{}.attn.Wqkv', 0, 3),
        'layer/attention/k_proj': ('layers.{}.attn.Wqkv', 1, 3),
        'layer/attention/v_proj': ('layers.{}.attn.Wqkv', 2, 3),
        'layer/attention/o_proj': 'layers.{}.attn.Wo',
        'layer/mlp_norm': 'layers.{}.mlp_norm',
        'layer/mlp/gate_proj': ('layers.{}.mlp.Wi', 0, 2),
        'layer/mlp/up_proj': ('layers.{}.mlp.Wi', 1, 2),
        'layer/mlp/down_proj': 'layers.{}.mlp.Wo',
        'final_norm': 'final_norm',
    },
    'new': {
        'embedder': 'embeddings.word_embeddings',
        'token_type_embedder': 'embeddings.token_type_embeddings',
        'embedding_norm': 'embeddings.LayerNorm',
        'layer/attention/q_proj': ('encoder.layer.{}.attention.qkv_proj', 0, 3),
        'layer/attention/k_proj': ('encoder.layer.{}.attention.qkv_proj', 1, 3),
        'layer/attention/v_proj': ('encoder.layer.{}.attention.qkv_proj', 2, 3),
        'layer/attention/o_proj': 'encoder.layer.{}.attention.o_proj',
        'layer/attention_norm': 'encoder.layer.{}.attn_ln',
        'layer/mlp/up_proj': ('encoder.layer.{}.mlp.up_gate_proj', 0, 2),
        'layer/mlp/gate_proj': ('encoder.layer.{}.mlp.up_gate_proj', 1, 2),
        'layer/mlp/down_proj': 'encoder.layer.{}.mlp.down_proj',
        'layer/mlp_norm': 'encoder.layer.{}.mlp_ln',
    },
}
_LEAVES = {'embedding': 'weight', 'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}
# Heads for other tasks, and what old files hold besides parameters.
_EXTRA = re.compile(r'(pooler|cls|head|decoder|lm_head|classifier)\..*|.*\.(position_ids|inv_freq)')
_PREFIXES = ('bert.', 'model.', 'new.')  # of files that hold a head as well


def from_safetensors(directory: str | Path, family: str, config: EncoderConfig) -> dict:
    """Parameters from a folder of safetensors: a nested dict of numpy arrays, f32.

    Kernels are [in, out]. Heads are left out.

    Raises:
      UserError: a file is missing or damaged; tensors are missing, extra, misshapen or not finite
        (all are named).
    """
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    shapes = jax.eval_shape(Encoder(config).init, jax.random.key(0), *example)['params']
    sources, expected = {}, {}
    for path, leaf in flatten_dict(shapes, sep='/').items():
        name, part, parts = _source(family, path)
        shape = leaf.shape[::-1] if path.endswith('kernel') else leaf.shape
        sources[path] = name, part, shape
        expected[name] = (shape[0] * parts, *shape[1:])
    with weights.open_safetensors(directory) as (found, read):
        real = {}  # name without the prefix: name
        for name in found:
            bare = name.removeprefix(next((p for p in _PREFIXES if name.startswith(p)), ''))
            if not _EXTRA.fullmatch(bare):
                real[bare] = name
        try:
            weights.compare(expected, {bare: found[name] for bare, name in real.items()})
        except UserError as e:
            raise UserError(f'{directory}: {e}') from e
        params, broken = {}, []
        for path, (name, part, shape) in sources.items():
            at = slice(part * shape[0], (part + 1) * shape[0]), *(slice(n) for n in shape[1:])
            array = read(real[name], at).astype(np.float32)
            if not weights.finite(array):
                broken.append(real[name])
            params[path] = np.ascontiguousarray(array.T) if path.endswith('kernel') else array
    if broken:
        names = ', '.join(dict.fromkeys(broken))
        raise UserError(f'{directory}: tensors hold values that are not finite: {names}')
    return unflatten_dict(params, sep='/')


def _source(family: str, path: str) -> tuple[str, int, int]:
    """The tensor that holds a parameter; which of how many parts of it that is."""
    module, leaf = path.rsplit('/', 1)
    layer = re.match(r'layer_(\d+)', module)
    source = _MODULES[family]['layer' + module[layer.end() :] if layer else module]
    name, part, parts = source if isinstance(source, tuple) else (source, 0, 1)
    return f'{name.format(layer and layer[1])}.{_LEAVES[leaf]}', part, parts
