"""Decoder parameters from Hugging Face states and GGUF files, and their fingerprint."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hyperlora.errors import UserError
from hyperlora.models import families
from hyperlora.models.families import DecoderConfig


class _Row(NamedTuple):
    path: str
    hf: str
    gguf: str
    axes: str  # v vocabulary, d width, l layers, f MLP width, q and k all (key) heads' dimensions

    @property
    def transposed(self) -> bool:
        """Our kernels are [in, out], those of both file formats [out, in]."""
        return self.path.endswith('kernel')

    @property
    def stacked(self) -> bool:
        return self.axes.startswith('l')


_UNEMBEDDER = _Row('unembedder/embedding', 'lm_head.weight', 'output.weight', 'vd')
_TABLE = (
    _Row('embedder/embedding', 'model.embed_tokens.weight', 'token_embd.weight', 'vd'),
    *(
        _Row(f'layers/{path}', f'model.layers.{{}}.{hf}.weight', f'blk.{{}}.{ggml}.weight', axes)
        for path, hf, ggml, axes in (
            ('attention_norm/scale', 'input_layernorm', 'attn_norm', 'ld'),
            ('attention/q_proj/kernel', 'self_attn.q_proj', 'attn_q', 'ldq'),
            ('attention/k_proj/kernel', 'self_attn.k_proj', 'attn_k', 'ldk'),
            ('attention/v_proj/kernel', 'self_attn.v_proj', 'attn_v', 'ldk'),
            ('attention/o_proj/kernel', 'self_attn.o_proj', 'attn_output', 'lqd'),
            ('mlp_norm/scale', 'post_attention_layernorm', 'ffn_norm', 'ld'),
            ('mlp/gate_proj/kernel', 'mlp.gate_proj', 'ffn_gate', 'ldf'),
            ('mlp/up_proj/kernel', 'mlp.up_proj', 'ffn_up', 'ldf'),
            ('mlp/down_proj/kernel', 'mlp.down_proj', 'ffn_down', 'lfd'),
        )
    ),
    _Row('final_norm/scale', 'model.norm.weight', 'output_norm.weight', 'd'),
)


def from_hf_state(state: Mapping[str, np.ndarray], config: DecoderConfig, dtype: Any) -> dict:
    """Parameters from a Hugging Face state: a nested dict of numpy arrays of `dtype`.

    Kernels are [in, out]; per-layer parameters are stacked: [l, in, out], [l, d].

    Raises UserError with the names of all missing, extra and misshapen tensors.
    """
    shapes = {
        name: tensor.shape
        for name, tensor in state.items()
        if not name.endswith('rotary_emb.inv_freq')
        and not (config.tie_embeddings and name == _UNEMBEDDER.hf)
    }
    return _assemble('hf', shapes, state.__getitem__, config, dtype)


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """The metadata of a GGUF file and its tensors by name, still quantized and on disk.

    Raises UserError if the file is missing, corrupt or truncated.
    """
    try:
        reader = _Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        # The reader checks little itself: damage shows as whichever of these comes first.
        raise UserError(f'cannot read {path} as a GGUF file: {error}') from error
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def from_gguf(
    fields: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor], dtype: Any
) -> tuple[DecoderConfig, dict]:
    """Config and parameters from what `read_gguf` returns.

    Raises UserError if this is not a supported decoder, for a kind of quantization that cannot
    be undone, or with the names of all missing, extra and misshapen tensors.
    """
    config = families.from_gguf(fields, tie_embeddings=_UNEMBEDDER.gguf not in tensors)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UserError(f'tensor {name}: quantization {kind} is not supported') from error
        if name.endswith('attn_q.weight'):
            return _unpermute(weight, config.num_heads)
        if name.endswith('attn_k.weight'):
            return _unpermute(weight, config.num_kv_heads)
        return weight

    shapes = {name: tuple(tensor.shape[::-1].tolist()) for name, tensor in tensors.items()}
    return config, _assemble('gguf', shapes, read, config, dtype)


def fingerprint(config: DecoderConfig, params: Mapping) -> str:
    """A short hex digest that tells base models apart.

    It is the same for numpy and jax arrays and for float32 parameters and their cast to
    bfloat16. It looks at a sample of each parameter, so that it is quick: another model shows,
    one changed value may not.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    arrays = flatten_dict(params, sep='/')
    # Only the samples leave the device, and one compilation serves them all.
    on_device = all(isinstance(array, jax.Array) for array in arrays.values())
    samples = (jax.jit(_sample) if on_device else _sample)(arrays)
    for path in sorted(arrays):
        digest.update(f'{path} {tuple(arrays[path].shape)}'.encode())
        digest.update(np.asarray(samples[path]).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def _sample(arrays: dict) -> dict:
    samples = {}
    for path, array in arrays.items():
        flat = np.linspace(0, array.size - 1, num=64)  # that many touch each layer of a stack
        samples[path] = array[np.unravel_index(flat.astype(np.int64), array.shape)]
    return samples


class _Reader(gguf.GGUFReader):
    # Slices of a plain array are made thrice as fast as those of a memmap, and a vocabulary
    # takes hundreds of thousands. The array is a view: the tensors stay on disk.
    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    # GGUF pairs the rows that rotate together as neighbours; we pair the halves of a head, as HF.
    rows, width = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return paired.swapaxes(1, 2).reshape(rows, width)


def _assemble(
    source: str,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    config: DecoderConfig,
    dtype: Any,
) -> dict:
    rows = _TABLE if config.tie_embeddings else (*_TABLE, _UNEMBEDDER)
    sizes = {
        'v': config.vocab_size,
        'd': config.width,
        'l': config.num_layers,
        'f': config.mlp_width,
        'q': config.num_heads * config.head_dim,
        'k': config.num_kv_heads * config.head_dim,
    }
    names, expected = {}, {}
    for row in rows:
        template = getattr(row, source)
        count = config.num_layers if row.stacked else 1
        names[row] = [template.format(layer) for layer in range(count)]
        shape = tuple(sizes[axis] for axis in row.axes.removeprefix('l'))
        expected |= dict.fromkeys(names[row], shape[::-1] if row.transposed else shape)
    _compare(expected, shapes)

    params = {}
    for row in rows:
        array = np.empty([sizes[axis] for axis in row.axes], dtype)
        for layer, name in enumerate(names[row]):
            weight = read(name)
            array[layer if row.stacked else ...] = weight.T if row.transposed else weight
        params[row.path] = array
    return unflatten_dict(params, sep='/')


def _compare(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    problems = {
        'missing': [name for name in expected if name not in found],
        'extra': [name for name in found if name not in expected],
        'misshapen': [
            f'{name} {found[name]} instead of {shape}'
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ],
    }
    lists = [f'{kind}: {", ".join(names)}' for kind, names in problems.items() if names]
    if lists:
        raise UserError(f'the tensors do not fit the model; {"; ".join(lists)}')
