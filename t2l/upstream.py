"""Checkpoints of the original Text-to-LoRA implementation as ours (SakanaAI/text-to-lora)."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from ml_collections import ConfigDict

from hyperlora import lora
from hyperlora.errors import UserError
from hyperlora.models.base import read_json
from hyperlora.models.embedders import load_embedder
from hyperlora.models.families import DecoderConfig
from hyperlora.upstream import Converted, StateDict
from t2l import build
from t2l.hypernetwork import TextToLoraConfig


def config_from_upstream(
    args: Mapping[str, Any],
    peft: Mapping[str, Any],
    state: Mapping[str, np.ndarray],
    base: DecoderConfig,
    embedder: str,
) -> dict[str, Any]:
    """The config of a checkpoint of the original: its `hypernetwork`, and that no task is known.

    Args:
      args: contents of args.yaml.
      peft: contents of adapter_config.json.
      state: contents of hypermod.pt.
      base: shape of the base model.
      embedder: what embeds the descriptions, or '' for the base model where it did.

    Raises:
      UserError: a setting that we have no counterpart of, or another base model.
      KeyError: a setting or tensor is missing.
    """
    if args['use_one_hot_task_emb'] or args['use_inp_as_desc'] or not args['use_hypernet']:
        raise UserError('cannot convert a hypernetwork that does not read task descriptions')
    if args['emb_model'] and not embedder:
        raise UserError(
            f'the checkpoint reads descriptions embedded by {args["emb_model"]}: '
            'give its folder as --embedder'
        )
    modules = sorted(module_order(state))
    recon = args['training_task'] == 'recon'
    # Absent from older files.
    factorized, delta_scaling = args.get('factorized', False), args.get('delta_w_scaling', 10000)
    z_score = recon and bool(args['pred_z_score'])
    if z_score and not factorized:
        raise UserError('cannot convert pred_z_score without factorized')
    rank, alpha = peft['r'], peft['lora_alpha']
    offset = any(np.any(x) for name, x in state.items() if name.startswith('AB_offset.'))
    dims = tuple(
        (m, state[f'AB_offset.A.{m}'].shape[-1], state[f'AB_offset.B.{m}'].shape[-2])
        for m in modules
    )
    layers = state[f'AB_offset.A.{modules[0]}'].shape[0]
    if dims != lora.module_dims(base, modules) or layers != base.num_layers:
        raise UserError(
            f'the checkpoint is for a base model with {layers} layers and modules {dims} '
            f'({args["model_dir"]}), not for the one given'
        )
    return {
        'hypernetwork': {
            'name': 'text_to_lora',
            'embedder': embedder or 'base',
            'modules': tuple(modules),
            'shape': {
                'rank': rank,
                'scaling': alpha / rank**0.5 if peft['use_rslora'] else alpha / rank,
                'embedding_width': state['task_encoder.mlp.0.weight'].shape[1],
                'latent_size': args['hypernet_latent_size'],
                'head_width': args['head_in_size'],
                'encoder': _encoder(state),
                'shared_head': args['shared_AB_head'],
                'per_rank': args['autoreg_gen'],
                'learned_positions': args['learnable_pos_emb'],
                'head_init': _head_init(recon, f'heads.{modules[0]}.bias' in state),
                'offset': offset,
                'learn_offset': offset and args['learnable_AB_offset'],
                'z_score': z_score,
                'output_scale': delta_scaling**-0.5 if recon and not factorized else 1.0,
            },
        },
        'data': {'tasks': ()},  # those that it was trained on go by other names there
    }


def _head_init(recon: bool, bias: bool) -> str:
    return 'random' if recon else 'lora' if bias else 'zero'


def _encoder(state: Mapping[str, np.ndarray]) -> str:
    """Which task encoder the tensors are of: the original ignored its setting `encoder_type`."""
    if 'task_encoder.cluster_size' in state:
        return 'vq'
    if 'task_encoder.embed' in state:
        return 'softmax'
    return 'linear' if 'task_encoder.mlp.1.weight' in state else 'discrete'


def module_order(state: Mapping[str, np.ndarray]) -> list[str]:
    """Modules in the order that the original numbered them while it trained.

    It iterated over a Python set, whose order changes from process to process; the insertion order
    of the heads is the only record of it.
    """
    heads = [name.split('.')[1] for name in state if name.startswith('heads.')]
    return list(dict.fromkeys(heads))


def params_from_upstream(state: Mapping[str, np.ndarray], config: TextToLoraConfig) -> Any:
    """Maps a state dict of the original hypernetwork to `TextToLora` parameters.

    Args:
      state: name -> array, names and order as in the original state dict.
      config: shape of the hypernetwork that the state belongs to.

    Raises:
      KeyError: a tensor is missing.
    """
    order = module_order(state)
    sorting = [order.index(name) for name, _, _ in config.dims]

    def linear(name, bias=True):
        out = {'kernel': np.asarray(state[f'{name}.weight']).T}
        return {**out, 'bias': np.asarray(state[f'{name}.bias'])} if bias else out

    def norm(name):
        return {
            'scale': np.asarray(state[f'{name}.weight']),
            'bias': np.asarray(state[f'{name}.bias']),
        }

    def residual(name):
        return {
            'norm': norm(f'{name}.mlp.0'),
            'up': linear(f'{name}.mlp.1'),
            'down': linear(f'{name}.mlp.4'),
        }

    if config.encoder == 'linear':
        encoder = {'linear': linear('task_encoder.mlp.0'), 'norm': norm('task_encoder.mlp.1')}
    else:
        encoder = {'up': linear('task_encoder.mlp.0'), 'down': linear('task_encoder.mlp.3')}
    if config.encoder in ('softmax', 'vq'):
        codebook = np.asarray(state['task_encoder.embed'])
        encoder['codebook'] = codebook if config.encoder == 'softmax' else codebook.T
        encoder['norm'] = norm('task_encoder.ln')
    if config.encoder == 'vq':  # moving averages, for its training alone
        state['task_encoder.cluster_size'], state['task_encoder.embed_avg']

    params = {
        'task_encoder': encoder,
        'mixer_up': linear('mixer.1'),
        'mixer_down': linear('mixer.4'),
        'mlp1': residual('mlp1'),
        'mlp2': residual('mlp2'),
        'norm': norm('mlp3.0'),
        'mlp3_up': linear('mlp3.1'),
        'mlp3_down': linear('mlp3.4'),
    }
    if config.encoder != 'discrete':
        params['layer_depth'] = np.asarray(state['layer_depth_encoder.0.weight'])
        params['layer_depth_norm'] = norm('layer_depth_encoder.1')
        params['module_type'] = np.asarray(state['layer_type_encoder.0.weight'])[sorting]
        params['module_type_norm'] = norm('layer_type_encoder.1')
    elif sorting != sorted(sorting):
        # The module's one-hot entries are the last inputs of the mixer.
        kernel, modules = params['mixer_up']['kernel'], len(sorting)
        params['mixer_up']['kernel'] = np.concatenate(
            [kernel[:-modules], kernel[-modules:][sorting]]
        )
    if config.shared_head:
        params['factors'] = np.stack(
            [[np.asarray(state[f'out_emb.{m}.{f}']) for f in 'AB'] for m, _, _ in config.dims]
        )
        params['factors_norm'] = norm('out_emb_norm')
    if config.per_rank and config.learned_positions:
        params['positions'] = np.asarray(state['pos_emb.0.weight'])
        params['positions_norm'] = norm('pos_emb.1')

    kinds = (
        ('offset', 'AB_offset', config.offset),
        ('mean', 'mean_recon_target', config.z_score),
        ('deviation', 'std_recon_target', config.z_score),
    )
    for name, _, _ in config.dims:
        params[f'head_{name}'] = linear(f'heads.{name}', f'heads.{name}.bias' in state)
        for ours, theirs, used in kinds:  # the original always carries all of them
            a, b = (np.asarray(state[f'{theirs}.{factor}.{name}']) for factor in 'AB')
            if used:
                params[f'{ours}_a_{name}'], params[f'{ours}_b_{name}'] = a, b.swapaxes(-1, -2)
    return params


def convert(
    path: pathlib.Path,
    checkpoint: Mapping[str, Any],
    state: StateDict,
    base: DecoderConfig,
    base_fingerprint: str,
    embedder: str,
    dtype: str,
) -> Converted:
    """Converts a hypermod.pt and the settings beside it, or, as training leaves them, above it.

    See `hyperlora.upstream.convert`.

    Args:
      checkpoint: all that the file at `path` holds.
      state: its tensors.
      base, base_fingerprint: shape of the base model, and what tells its weights.
    """
    places = (path.parent, path.resolve().parent.parent.parent)  # of checkpoints/it_N/hypermod.pt
    folder = next((p for p in places if (p / 'args.yaml').is_file()), None)
    if folder is None:
        raise UserError(f'{path}: there is no args.yaml beside it')
    try:
        args = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{folder / "args.yaml"}: cannot read ({error})') from error
    peft = read_json(folder / 'adapter_config.json')
    config = config_from_upstream(args, peft, state, base, embedder)
    module = build.make_module(ConfigDict(config['hypernetwork']), base)
    return Converted(
        config,
        module,
        params_from_upstream(state, module.config),
        (jnp.zeros((1, module.config.embedding_width)),),
        load_embedder(embedder).fingerprint if embedder else f'{base_fingerprint}-last',
    )
