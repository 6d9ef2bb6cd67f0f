"""Checkpoints of the original implementations, read as ours, without running their pickles."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from hyperlora import torch_files
from hyperlora.errors import UserError, some
from hyperlora.models.base import load_params
from hyperlora.trained import differences

# File of the original: what converts it.
_CONVERTERS = {
    'pytorch_model.bin': 'd2l.upstream:convert',
    'hypermod.pt': 't2l.upstream:convert',
}


class StateDict(dict[str, np.ndarray]):
    """Tensors by name; remembers which have not been read."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        # torch.compile puts a prefix before every name.
        super().__init__({k.removeprefix('_orig_mod.'): v for k, v in tensors.items()})
        self.unread = set(self)

    def __getitem__(self, name: str) -> np.ndarray:
        self.unread.discard(name)
        return super().__getitem__(name)


@dataclasses.dataclass
class Converted:
    """A checkpoint in our terms: its part of the config, the module, f32 parameters, an example of
    what the module reads, and the fingerprint of its encoder."""

    config: dict[str, Any]
    module: Any
    params: dict
    example: tuple
    encoder_fingerprint: str


def convert(
    source: str, base: str, encoder: str = '', embedder: str = '', dtype: str = 'bfloat16'
) -> tuple[dict, dict]:
    """Reads a checkpoint of the original Doc-to-LoRA or Text-to-LoRA.

    Args:
      source: its file or folder.
      base: name or folder of its base model.
      encoder: the same of the model that reads its documents, '' if that is the base model.
      embedder: the same of the model that embeds its descriptions.
      dtype: in which the frozen models will be run.

    Returns:
      (f32 parameters, record), as `checkpointing.export` takes them.

    Raises:
      UserError: the file holds anything but tensors and known settings, or they do not fit each
        other or the models given.
    """
    path = pathlib.Path(source)
    if path.is_dir():
        path = next((path / name for name in _CONVERTERS if (path / name).is_file()), path)
    loaded = torch_files.load(path)
    base_config, _, base_fingerprint = load_params(base)
    try:
        state = StateDict({k: v for k, v in loaded.items() if hasattr(v, 'shape')})
        name = 'pytorch_model.bin' if 'hypernet_config' in loaded else 'hypermod.pt'
        module, function = _CONVERTERS[name].split(':')
        reader = encoder if name == 'pytorch_model.bin' else embedder
        done = getattr(importlib.import_module(module), function)(
            path, loaded, state, base_config, base_fingerprint, reader, dtype
        )
        wanted = jax.eval_shape(done.module.init, jax.random.key(0), *done.example)['params']
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(
            f'{path}: not a checkpoint of Doc-to-LoRA or Text-to-LoRA '
            f'({type(error).__name__}: {error})'
        ) from error
    wrong = differences(nn.unbox(wanted), done.params)
    wrong += [f'{name} is unknown' for name in sorted(state.unread)]
    if wrong:
        raise UserError(f'{path}: the tensors do not fit the settings: {some(wrong)}')
    return done.params, {
        'config': {'base': base, 'base_dtype': dtype, 'base_quantization': 'none', **done.config},
        'base_fingerprint': base_fingerprint,
        'encoder_fingerprint': done.encoder_fingerprint,
    }
