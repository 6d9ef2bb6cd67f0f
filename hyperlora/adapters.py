"""Adapters on disk in PEFT's layout, so that other software reads and writes them too.

adapter_config.json and adapter_model.safetensors; A is `[r, i]`, B `[o, r]`, keys carry no adapter
name. The scaling is folded into B and lora_alpha = r, so that nobody's idea of it matters. The
metadata of the safetensors file says which base the adapter is for and where it comes from.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from hyperlora import lora as lora_lib
from hyperlora.errors import UserError
from hyperlora.lora import MODULES, Lora, LoraPair
from hyperlora.models.families import DecoderConfig

_CONFIG, _WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_BLOCKS = {'attention': 'self_attn', 'mlp': 'mlp'}
# PEFT writes the name of the adapter before `.weight` in memory, never on disk; others do.
_KEY = re.compile(
    r'base_model\.model\..*\blayers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<module>\w+)'
    r'\.lora_(?P<factor>[AB])(?:\.\w+)?\.weight'
)
# Settings of PEFT under which an adapter is `alpha / r B A`; any other that is set is an error.
_SUPPORTED = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config
    megatron_core peft_type peft_version qalora_group_size r revision runtime_config target_modules
    task_type use_rslora
    """.split()
)
# Those that are so for some values. The other ways to begin change the base model's weights.
_SUPPORTED_VALUES = {
    'bias': ('none',),
    'init_lora_weights': (True, 'gaussian', 'eva', 'orthogonal'),
}


def save(
    lora: Lora, directory: str | Path, base_name: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a LoRA of one row. Nothing is left behind if writing fails.

    Args:
      directory: is made if need be.
      base_name: for `base_model_name_or_path`.
      metadata: goes into the safetensors file, e.g. `base_fingerprint`.

    Raises:
      ValueError: the LoRA has more than one row.
      UserError: the folder cannot be written to, or the disk is full.
    """
    if lora.rows != 1:
        raise ValueError(f'only a LoRA of one row can be saved, not of {lora.rows}')
    directory = Path(directory).expanduser()
    tensors = {}
    for name, pair in lora.pairs.items():
        a, b = np.asarray(pair.a[:, 0]), np.asarray(pair.b[:, 0] * lora.scaling)
        for layer in range(a.shape[0]):
            key = f'base_model.model.model.layers.{layer}.{_BLOCKS[MODULES[name][0]]}.{name}.lora_'
            tensors[f'{key}A.weight'] = np.ascontiguousarray(a[layer])
            tensors[f'{key}B.weight'] = np.ascontiguousarray(b[layer].T.astype(a.dtype))
    config = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base_name,
        'r': lora.rank,
        'lora_alpha': lora.rank,
        'use_rslora': False,
        'target_modules': sorted(lora.pairs),
        'bias': 'none',
        'lora_dropout': 0.0,
        'fan_in_fan_out': False,
        'inference_mode': True,
    }
    files = {
        _WEIGHTS: safetensors.numpy.save(tensors, {'format': 'pt', **(metadata or {})}),
        _CONFIG: (json.dumps(config, indent=2) + '\n').encode(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix='.partial-') as partial:
            for name, content in files.items():
                Path(partial, name).write_bytes(content)
            for name in files:
                Path(partial, name).replace(directory / name)
    except OSError as e:
        raise UserError(f'cannot write an adapter to {directory} ({e.strerror})') from e


def read_config(directory: str | Path) -> dict[str, Any]:
    """The contents of adapter_config.json.

    Raises:
      UserError: it is missing or damaged.
    """
    path = Path(directory).expanduser() / _CONFIG
    try:
        config = json.loads(path.read_text(encoding='utf-8-sig'))
        if config['peft_type'] != 'LORA':
            raise UserError(f'{path}: an adapter of type {config["peft_type"]!r}, not LORA')
        return config
    except FileNotFoundError as e:
        raise UserError(
            f'{directory} is not an adapter: {_CONFIG} is missing; make one with launch.adapt'
        ) from e
    except NotADirectoryError as e:
        raise UserError(f'{directory} is a file; give the folder of the adapter') from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'{path} is damaged ({e!r}); make the adapter again') from e


def base_name(directory: str | Path) -> str:
    """The base model that an adapter names.

    Raises:
      UserError: it names none, or see `read_config`.
    """
    name = read_config(directory).get('base_model_name_or_path')
    if not name or not isinstance(name, str):
        raise UserError(
            f'{Path(directory) / _CONFIG}: base_model_name_or_path is {name!r}, not the name of a '
            'base model; give that as --base'
        )
    return name


def read_metadata(directory: str | Path) -> dict[str, str]:
    """What `save` noted in the safetensors file of an adapter that can be loaded."""
    path = Path(directory).expanduser() / _WEIGHTS
    with safetensors.safe_open(path, framework='numpy') as file:
        return {key: text for key, text in (file.metadata() or {}).items() if key != 'format'}


def load(
    directory: str | Path, base: DecoderConfig | None = None, fingerprint: str | None = None
) -> Lora:
    """Reads an adapter that `save` or PEFT wrote.

    Args:
      directory: the adapter's folder.
      base: the model it is meant for; its tensors must fit. None for any.
      fingerprint: of that model. An adapter that names another one is refused; one that names
        none, as those of PEFT, is not.

    Returns:
      A Lora of one row, f32, scaling 1.

    Raises:
      UserError: a file is missing or damaged, the adapter is more than a LoRA of known modules, or
        it is for another base model.
    """
    directory = Path(directory).expanduser()
    config = read_config(directory)
    used = [
        f'{key} = {value!r}'
        for key, value in sorted(config.items())
        if value and key not in _SUPPORTED and value not in _SUPPORTED_VALUES.get(key, ())
    ]
    if used:
        raise UserError(f'{directory}: adapters with {", ".join(used)} are not supported')
    path = directory / _WEIGHTS
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            saved = (file.metadata() or {}).get('base_fingerprint')
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        root = config['r'] ** 0.5 if config.get('use_rslora') else config['r']
        scaling = config['lora_alpha'] / root
        if not abs(scaling) < 1e9:  # nor not a number
            raise ValueError(f'lora_alpha = {config["lora_alpha"]}')
    except FileNotFoundError as e:
        raise UserError(
            f'{directory} is not an adapter: {_WEIGHTS} is missing; make one with launch.adapt'
        ) from e
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f'{path} is truncated or damaged ({e}); make the adapter again') from e
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f'{directory / _CONFIG} is damaged ({e!r}); make the adapter again') from e
    if saved is not None and fingerprint is not None and saved != fingerprint:
        raise UserError(
            f'the adapter in {directory} was made for base model {saved}, '
            f'not {fingerprint}; load it with the base model it was made for'
        )
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or match['module'] not in MODULES:
            raise UserError(f'{path}: tensor {key} is not that of a known module of a decoder')
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise UserError(f'{path}: tensor {key} holds values that are not finite')
        found.setdefault((match['module'], match['factor']), {})[int(match['layer'])] = tensor
    if not found:
        raise UserError(f'{path} holds no tensors; make the adapter again')
    layers = base.num_layers if base else 1 + max(max(by_layer) for by_layer in found.values())
    names = sorted({module for module, _ in found})
    dims = dict((n, (i, o)) for n, i, o in lora_lib.module_dims(base, names)) if base else {}
    # A pattern, or a list in which a name with a dot may be that of one layer's module.
    targets = config.get('target_modules')
    some = isinstance(targets, str) or '.' in str(targets)
    some |= any(config.get(key) is not None for key in ('exclude_modules', 'layers_to_transform'))
    pairs = {
        name: _pair(directory, name, found, layers, some, scaling, dims.get(name)) for name in names
    }
    for name, pair in pairs.items():
        if pair.a.shape[2] != config['r']:
            raise UserError(
                f'{directory}: {name} is of rank {pair.a.shape[2]}, but {_CONFIG} says '
                f'r = {config["r"]}; make the adapter again'
            )
    return Lora(pairs, jnp.float32(1))


def _pair(directory, name, found, layers, some, scaling, dims) -> LoraPair:
    """The factors of a module; zero in layers without, if only `some` need be adapted."""
    a, b = (found.get((name, factor), {}) for factor in 'AB')
    wanted = set(range(layers)) & (a.keys() | b.keys() if some else set(range(layers)))
    if a.keys() != wanted or b.keys() != wanted:
        odd = sorted((wanted ^ a.keys()) | (wanted ^ b.keys()))
        raise UserError(
            f'{directory}: {name} must have A and B in each of {layers} layers; see layers '
            f'{", ".join(map(str, odd))}'
        )
    try:
        zeros = [np.zeros_like(next(iter(factor.values()))) for factor in (a, b)]
        first = np.stack([a.get(i, zeros[0]) for i in range(layers)]).astype(np.float32)
        second = np.stack([b.get(i, zeros[1]).T for i in range(layers)]).astype(np.float32)
    except ValueError as e:
        raise UserError(f'{directory}: the ranks of {name} differ between layers') from e
    shapes = first.shape[1:], second.shape[1:]
    rank = first.shape[1]
    expected = ((rank, dims[0]), (rank, dims[1])) if dims else (shapes[0], (rank, shapes[1][-1]))
    if shapes != expected:
        raise UserError(
            f'{directory}: A and B of {name} are {shapes}, not {expected} as this base model needs'
        )
    return LoraPair(jnp.asarray(first)[:, None], jnp.asarray(second * scaling)[:, None])
