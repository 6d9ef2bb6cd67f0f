"""Parameters of the original Doc-to-LoRA implementation as ours (SakanaAI/doc-to-lora)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from d2l.hypernetwork import DocToLoraConfig


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
    for i in range(min(config.num_blocks, 2) if config.shared_blocks else config.num_blocks):
        perceiver[f'cross_{i}'] = attention_layer(f'{root}.encoder.layers.{i * stride}')
    blocks = 1 if config.shared_blocks else config.num_blocks
    for i in range(blocks * config.num_self_attention):
        index = i // config.num_self_attention * stride + 1 + i % config.num_self_attention
        perceiver[f'self_{i}'] = attention_layer(f'{root}.encoder.layers.{index}', False)

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
        if config.use_bias:
            for ours, theirs in (('bias_a', 'bias_A'), ('bias_b', 'bias_B')):
                params[f'{ours}_{name}'] = np.asarray(state[f'{theirs}.{name}'])
    return params
