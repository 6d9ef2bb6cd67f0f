"""Checkpoints of the original Doc-to-LoRA implementation as ours (SakanaAI/doc-to-lora)."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from d2l import build
from d2l.context_encoders import text_config
from d2l.hypernetwork import DocToLoraConfig
from hyperlora import lora
from hyperlora.errors import UserError
from hyperlora.models.base import load_params
from hyperlora.models.families import DecoderConfig
from hyperlora.upstream import Converted, StateDict

# What the original puts around every chunk: its chat template with an empty question.
_AFFIXES = {
    'google/gemma-2-2b-it': ((2, 106, 1645, 110), (107, 108, 106, 2516, 108)),
    'mistralai/Mistral-7B-Instruct-v0.2': (
        (1, 733, 16289, 28793, 28705, 13, 13),
        (733, 28748, 16289, 28793),
    ),
    'Qwen/Qwen3-4B-Instruct-2507': (
        (151644, 8948, 198, 151645, 198, 151644, 872, 198),
        (151645, 198, 151644, 77091, 198),
    ),
}
_NOT_SUPPORTED = {
    'use_light_weight_lora': False,
    'use_per_rank_bias': False,
    'use_token_mixing': False,
    'per_rank_gen': True,
    'extra_modules': None,
}


def config_from_upstream(
    checkpoint: Mapping[str, Any], base: DecoderConfig, encoder: DecoderConfig | None
) -> dict[str, Any]:
    """The config of a checkpoint of the original: its `hypernetwork` and how to cut documents.

    Args:
      checkpoint: what `torch_files.load` gives of its pytorch_model.bin.
      base: shape of the base model.
      encoder: shape of the model that reads the documents, if it is another.

    Raises:
      UserError: a setting that we have no counterpart of, or another base model or encoder.
      KeyError: a setting is missing.
    """
    h, reader = checkpoint['hypernet_config'], checkpoint['ctx_encoder_args']
    perceiver, peft = h['aggregator_config'], h['lora_config']
    unsupported = [
        f'{name}={h[name]}' for name, value in _NOT_SUPPORTED.items() if h[name] != value
    ]
    if perceiver['aggregator_type'] != 'perceiver':
        unsupported.append(f'aggregator_type={perceiver["aggregator_type"]}')
    if unsupported:
        raise UserError(f'cannot convert a hypernetwork with {", ".join(unsupported)}')
    modules = sorted(peft['target_modules'])
    trained = tuple((m, h['feature_sizes'][0][m], h['feature_sizes'][1][m]) for m in modules)
    layers = [int(i) for i in h['layer_indices']]
    if trained != lora.module_dims(base, modules) or layers != list(range(base.num_layers)):
        raise UserError(
            f'the checkpoint is for a base model with layers {layers} and modules {trained} '
            f'({checkpoint["base_model_name_or_path"]}), not for the one given'
        )
    base_name = checkpoint['base_model_name_or_path']
    encoder_name = reader['ctx_encoder_model_name_or_path'] or base_name
    if (encoder is None) != _same(encoder_name, base_name):
        raise UserError(
            f'the checkpoint reads documents with {encoder_name}: give it as --encoder'
            if encoder is None
            else 'the checkpoint reads documents with its base model: leave --encoder out'
        )
    encoder = encoder or base
    kind = reader['ctx_encoder_type']
    last = reader['ctx_encoder_last_layer'] or encoder.num_layers
    if kind == 'per_layer_activations' and last != base.num_layers:
        raise UserError(
            f'the checkpoint reads {last} layers of its encoder for {base.num_layers} of the base'
        )
    if perceiver['feature_size'] != encoder.width:
        raise UserError(
            f'the checkpoint reads documents with {encoder_name}, of width '
            f'{perceiver["feature_size"]}; the encoder given is {encoder.width} wide'
        )
    prefix, suffix = next(
        (affix for name, affix in _AFFIXES.items() if _same(name, encoder_name)), ((), ())
    )
    return {
        'hypernetwork': {
            'name': 'doc_to_lora',
            'encoder': {
                'name': kind,
                'num_layers': reader['layer_idx'] if kind == 'early_exit' else 0,
            },
            'modules': tuple(modules),
            'shape': {
                'rank': peft['r'],
                'scaling': float(peft['lora_alpha']),  # used as it is, whatever use_rslora says
                'latent_size': h['latent_size'],
                'num_latents': perceiver['n_latent_queries'],
                'num_blocks': perceiver['num_blocks'],
                'num_self_attention': perceiver['num_self_attn_per_block'],
                'shared_blocks': perceiver['shared_weights'],
                'num_pre_head_layers': h['num_pre_head_layers'],
                'per_layer_processing': h['per_layer_processing'],
                'use_bias': h['use_bias'],
            },
        },
        # The lengths of the original's tests: needles, and documents.
        'chunk_length': 1024 if kind == 'early_exit' else 8192,
        'chunk_prefix': prefix,
        'chunk_suffix': suffix,
        'min_gate': 0.0,
    }


def _same(name: str, other: str) -> bool:
    """Whether two names or paths are of the same model, wherever its folder was."""
    return name.rstrip('/').split('/')[-1] == other.rstrip('/').split('/')[-1]


def params_from_upstream(state: Mapping[str, np.ndarray], config: DocToLoraConfig) -> Any:
    """Maps a state dict of the original hypernetwork to `DocToLora` parameters.

    Args:
      state: name -> array, names as in the original state dict.
      config: shape of the hypernetwork that the state belongs to.

    Raises:
      KeyError: a tensor is missing.
    """

    def kernel(name):
        return {'kernel': np.asarray(state[name + '.weight']).T}

    def scale(name):
        return {'scale': np.asarray(state[name + '.weight'])}

    def swiglu(prefix):
        return {p: kernel(f'{prefix}.{p}') for p in ('gate_proj', 'up_proj', 'down_proj')}

    def attention_layer(prefix, has_context=True):
        norms = [
            'input_latents_layernorm',
            'post_attention_layernorm',
            'pre_ff_layernorm',
            'post_ff_layernorm',
        ] + ['input_context_layernorm'] * has_context
        return {
            **{n: scale(f'{prefix}.{n}') for n in norms},
            **{
                p: kernel(f'{prefix}.self_attn.{p}')
                for p in ('q_proj', 'k_proj', 'v_proj', 'o_proj')
            },
            'mlp': swiglu(f'{prefix}.mlp'),
        }

    root = 'aggregator.perceiver'
    perceiver = {
        'modality_projection': swiglu(f'{root}.modality_projection'),
        'latents': np.asarray(state[f'{root}.encoder.latents_q']),
        'output_queries': np.asarray(state[f'{root}.decoder.latents_q']),
        'encoder_norm': scale(f'{root}.encoder.layernorm'),
        'decoder_norm': scale(f'{root}.decoder.layernorm'),
        'decoder': attention_layer(f'{root}.decoder.layers.0'),
    }
    # The original lists cross- and self-attention layers in one sequence and repeats shared ones.
    stride = 1 + config.num_self_attention
    for block in range(config.num_blocks):
        ours = min(block, 1) if config.shared_blocks else block
        perceiver[f'cross_{ours}'] = attention_layer(f'{root}.encoder.layers.{block * stride}')
        for i in range(config.num_self_attention):
            ours = i if config.shared_blocks else block * config.num_self_attention + i
            theirs = block * stride + 1 + i
            perceiver[f'self_{ours}'] = attention_layer(f'{root}.encoder.layers.{theirs}', False)

    def norm(name):
        return {
            'scale': np.asarray(state[name + '.weight']),
            'bias': np.asarray(state[name + '.bias']),
        }

    def linear(name):
        weight, bias = np.asarray(state[name + '.weight']), np.asarray(state[name + '.bias'])
        if config.per_layer_processing:
            return {'kernel': weight, 'bias': bias.reshape(config.num_layers, -1)}
        return {'kernel': weight.T, 'bias': bias}

    params = {'perceiver': perceiver}
    container, slots = ('layers', '0134') if config.per_layer_processing else ('mlp', '0256')
    for i in range(config.num_pre_head_layers):
        parts = [f'layers.{i}.{container}.{slot}' for slot in slots]
        params[f'pre_head_{i}'] = {
            'norm_in': norm(parts[0]),
            'up': linear(parts[1]),
            'down': linear(parts[2]),
            'norm_out': norm(parts[3]),
        }
    head = np.asarray(state['head.weight'])
    params['head'] = head if head.ndim == 4 else head[:, None]
    for name, _, _ in config.dims:
        for ours, theirs in (('scaler_a', 'scaler_A'), ('scaler_b', 'scaler_B')):
            params[f'{ours}_{name}'] = np.asarray(state[f'{theirs}.{name}'])[0, ..., 0]
        for ours, theirs in (('bias_a', 'bias_A'), ('bias_b', 'bias_B')):
            bias = np.asarray(state[f'{theirs}.{name}'])  # there even if it is not used
            if config.use_bias:
                params[f'{ours}_{name}'] = bias
    return params


def convert(
    path: pathlib.Path,
    checkpoint: Mapping[str, Any],
    state: StateDict,
    base: DecoderConfig,
    base_fingerprint: str,
    encoder: str,
    dtype: str,
) -> Converted:
    """Converts a pytorch_model.bin; see `hyperlora.upstream.convert`.

    Args:
      checkpoint: all that the file at `path` holds.
      state: its tensors.
      base, base_fingerprint: shape of the base model, and what tells its weights.
    """
    reader, _, fingerprint = (
        load_params(encoder, images=True) if encoder else (None, None, base_fingerprint)
    )
    config = config_from_upstream(checkpoint, base, reader and text_config(reader))
    config['hypernetwork']['encoder'] |= {
        'model': encoder,
        'dtype': dtype,
        'quantization': 'none',
    }
    module = build.make_module(ConfigDict(config['hypernetwork']), base, reader or base)
    entries = base.num_layers if module.config.layer_to_layer else 1
    return Converted(
        config,
        module,
        params_from_upstream(state, module.config),
        (jnp.zeros((1, entries, 8, module.config.feature_width)), jnp.ones((1, 8), bool)),
        fingerprint,
    )
