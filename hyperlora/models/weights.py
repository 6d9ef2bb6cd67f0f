"""Model parameters from and to Hugging Face states and GGUF files, and their fingerprint.

One table names every tensor in each format, and serves reading and writing alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from hyperlora.errors import UserError, some
from hyperlora.models import families, quantization
from hyperlora.models.families import DecoderConfig
from hyperlora.models.vision import CHANNELS, MultimodalConfig

Index = tuple[slice, ...]
# (name, which part of the tensor) -> that part, in the layout of the file.
Read = Callable[[str, Index], np.ndarray]
# (path, parameter) -> what stands for it among the parameters.
Keep = Callable[[str, jax.Array], Any]


class Row(NamedTuple):
    """One parameter and its names; those of layers hold `{}` for the number of the layer."""

    path: str
    hf: str
    gguf: str
    axes: str  # see `_sizes`

    @property
    def transposed(self) -> bool:
        """Our kernels are [..., in, out], those of both file formats have all axes reversed."""
        return self.path.endswith('kernel')

    @property
    def stacked(self) -> bool:
        return self.axes[0] in 'lL'

    def names(self, source: str, sizes: Mapping[str, int]) -> list[str]:
        """Names in a format ('hf' or 'gguf'), one for each layer."""
        template = getattr(self, source)
        return [template.format(i) for i in range(sizes[self.axes[0]] if self.stacked else 1)]


_ROPE_DIVISORS = 'rope_freqs.weight'
_UNEMBEDDER = Row('unembedder/embedding', 'lm_head.weight', 'output.weight', 'vd')


# Checkpoints of models that read images prefix what others call model. and lm_head., and so does
# the state of transformers in another way; published ones nest their vision tower.
_PREFIXES = (
    (re.compile(r'^language_model\.(model|lm_head)\.'), r'\1.'),
    (re.compile(r'^model\.language_model\.'), 'model.'),
    (re.compile(r'^model\.(vision_tower|multi_modal_projector)\.'), r'\1.'),
    (re.compile(r'^vision_tower\.vision_model\.'), 'vision_tower.'),
)
_VISION = ('vision_tower.', 'multi_modal_projector.')


def _plain(name: str) -> str:
    """The name by which the table knows a tensor of a Hugging Face state."""
    for pattern, plain in _PREFIXES:
        name = pattern.sub(plain, name)
    return name


def _vision_table() -> list[Row]:
    layers = [
        ('attention_norm', 'layer_norm1', 'LD'),
        ('attention/q_proj', 'self_attn.q_proj', 'LDD'),
        ('attention/k_proj', 'self_attn.k_proj', 'LDD'),
        ('attention/v_proj', 'self_attn.v_proj', 'LDD'),
        ('attention/out_proj', 'self_attn.out_proj', 'LDD'),
        ('mlp_norm', 'layer_norm2', 'LD'),
        ('mlp/fc1', 'mlp.fc1', 'LDF'),
        ('mlp/fc2', 'mlp.fc2', 'LFD'),
    ]
    modules = [
        ('patch_embedding', 'embeddings.patch_embedding', 'xycD'),
        *((f'layers/{path}', f'encoder.layers.{{}}.{hf}', axes) for path, hf, axes in layers),
        ('final_norm', 'post_layernorm', 'D'),
    ]
    rows = []
    for path, hf, axes in modules:
        weight = 'scale' if path.endswith('norm') else 'kernel'
        bias = 'L' * (axes[0] == 'L') + axes[-1]
        rows += [
            (f'vision_tower/{path}/{weight}', f'vision_tower.{hf}.weight', axes),
            (f'vision_tower/{path}/bias', f'vision_tower.{hf}.bias', bias),
        ]
    position, projector = 'vision_tower/position_embedding', 'multi_modal_projector'
    rows += [
        (position, 'vision_tower.embeddings.position_embedding.weight', 'pD'),
        ('projector/soft_emb_norm/scale', f'{projector}.mm_soft_emb_norm.weight', 'D'),
        ('projector/projection', f'{projector}.mm_input_projection_weight', 'Dd'),
    ]
    return [Row(path, hf, '', axes) for path, hf, axes in rows]  # GGUF: another file


def _sizes(config: DecoderConfig | MultimodalConfig) -> dict[str, int]:
    """The size of each axis in the table."""
    if isinstance(config, MultimodalConfig):
        c = config.vision
        return _sizes(config.text) | {
            'L': c.num_layers,
            'D': c.width,
            'F': c.mlp_width,
            'p': c.side**2,  # patches, of x columns and y rows of pixels
            'x': c.patch_size,
            'y': c.patch_size,
            'c': CHANNELS,
        }
    return {
        'v': config.vocab_size,
        'd': config.width,
        'l': config.num_layers,
        'f': config.mlp_width,
        'h': config.head_dim,
        'q': config.num_heads * config.head_dim,
        'k': config.num_kv_heads * config.head_dim,
    }


def table(config: DecoderConfig | MultimodalConfig) -> list[Row]:
    """The parameters of a decoder, and of its vision tower and projector."""
    if isinstance(config, MultimodalConfig):
        return table(config.text) + _vision_table()
    c = config
    mlp_norm = 'pre_feedforward_layernorm' if c.post_norms else 'post_attention_layernorm'
    layers = [
        ('attention_norm/scale', 'input_layernorm', 'attn_norm', 'ld'),
        ('attention/q_proj/kernel', 'self_attn.q_proj', 'attn_q', 'ldq'),
        ('attention/k_proj/kernel', 'self_attn.k_proj', 'attn_k', 'ldk'),
        ('attention/v_proj/kernel', 'self_attn.v_proj', 'attn_v', 'ldk'),
        ('attention/o_proj/kernel', 'self_attn.o_proj', 'attn_output', 'lqd'),
        ('mlp_norm/scale', mlp_norm, 'ffn_norm', 'ld'),
        ('mlp/gate_proj/kernel', 'mlp.gate_proj', 'ffn_gate', 'ldf'),
        ('mlp/up_proj/kernel', 'mlp.up_proj', 'ffn_up', 'ldf'),
        ('mlp/down_proj/kernel', 'mlp.down_proj', 'ffn_down', 'lfd'),
    ]
    biased = {'attention': c.qkv_bias, 'o_proj': c.output_bias, 'mlp': c.mlp_bias}
    for path, hf, ggml, axes in layers[:]:
        group, module, kind = (*path.split('/'), '')[:3]
        if kind == 'kernel' and biased['o_proj' if module == 'o_proj' else group]:
            layers.append((f'{group}/{module}/bias', hf, ggml, f'l{axes[-1]}'))
    if c.qk_norm:
        layers += [
            (f'attention/{x}_norm/scale', f'self_attn.{x}_norm', f'attn_{x}_norm', 'lh')
            for x in 'qk'
        ]
    if c.post_norms:
        layers += [
            ('attention_post_norm/scale', 'post_attention_layernorm', 'post_attention_norm', 'ld'),
            ('mlp_post_norm/scale', 'post_feedforward_layernorm', 'post_ffw_norm', 'ld'),
        ]
    suffix = {True: 'bias', False: 'weight'}
    return [
        Row('embedder/embedding', 'model.embed_tokens.weight', 'token_embd.weight', 'vd'),
        *(
            Row(
                f'layers/{path}',
                f'model.layers.{{}}.{hf}.{suffix[path.endswith("bias")]}',
                f'blk.{{}}.{ggml}.{suffix[path.endswith("bias")]}',
                axes,
            )
            for path, hf, ggml, axes in layers
        ),
        Row('final_norm/scale', 'model.norm.weight', 'output_norm.weight', 'd'),
        *([] if c.tie_embeddings else [_UNEMBEDDER]),
    ]


def from_hf_state(
    state: Mapping[str, np.ndarray],
    config: DecoderConfig | MultimodalConfig,
    dtype: Any,
    shardings: Any = None,
) -> dict:
    """Parameters from a Hugging Face state: a nested dict of arrays of `dtype`.

    Kernels are [in, out]; per-layer parameters are stacked: [l, in, out], [l, d]. Of the state of a
    model that reads images, a DecoderConfig takes the decoder alone.

    Args:
      shardings: nested dict like the result, where each array is to live; None for jax's default
        device.

    Raises:
      UserError: tensors are missing, extra, misshapen or not finite; the first are named.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return _assemble('hf', shapes, lambda n, at: state[n][at], config, dtype, shardings)


@contextlib.contextmanager
def open_safetensors(directory: str | Path) -> Iterator[tuple[dict[str, tuple], Read]]:
    """The tensors of a model folder: model.safetensors, or the shards that its index names.

    Yields:
      (name -> shape, a reader of parts of tensors, which maps the files and copies only those).

    Raises:
      UserError: a file is missing, truncated or damaged.
    """
    directory = Path(directory)
    index = directory / 'model.safetensors.index.json'
    try:
        shards = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    except FileNotFoundError:
        shards = ['model.safetensors']
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f'{index} is damaged ({e!r}); download the model again') from e
    files, where, shapes = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name in shards:
            path = directory / pathlib.PurePath(name).name
            try:
                files[name] = stack.enter_context(safetensors.safe_open(path, framework='numpy'))
                for key in files[name].keys():  # noqa: SIM118
                    where[key], shapes[key] = name, tuple(files[name].get_slice(key).get_shape())
            except FileNotFoundError as e:
                raise UserError(f'{path} is missing; download the model again') from e
            except (OSError, safetensors.SafetensorError) as e:
                raise UserError(
                    f'{path} is truncated or damaged ({e}); download the model again'
                ) from e

        def read(name, at):
            try:
                return files[where[name]].get_slice(name)[at]
            except (OSError, safetensors.SafetensorError) as e:
                raise UserError(f'{directory / where[name]}: cannot read {name} ({e})') from e

        yield shapes, read


def from_safetensors(
    directory: str | Path,
    config: DecoderConfig | MultimodalConfig,
    dtype: Any,
    shardings: Any = None,
    keep: Keep | None = None,
) -> dict:
    """Parameters from a folder of safetensors, straight onto the devices.

    The host holds one shard of one (stacked) parameter at a time.

    Args:
      keep: called with each parameter once it is loaded; what it returns takes its place before
        the next is loaded.

    Other args, result and errors are those of `from_hf_state` and `open_safetensors`.
    """
    with open_safetensors(directory) as (shapes, read):
        try:
            return _assemble('hf', shapes, read, config, dtype, shardings, keep)
        except UserError as e:
            raise UserError(f'{directory}: {e}') from e


def to_hf(params: Mapping, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a Hugging Face state, one after the other: the inverse of `from_hf_state`.

    Raises:
      UserError: the parameters are quantized.
    """
    quantization.check_unquantized(params)
    arrays = flatten_dict(params, sep='/')
    for row in table(config):
        for layer, name in enumerate(row.names('hf', _sizes(config))):
            array = np.asarray(arrays[row.path][layer] if row.stacked else arrays[row.path])
            yield name, array.T if row.transposed else array


def save_hf(
    directory: str | Path,
    params: Mapping,
    config: DecoderConfig,
    hf_config: Mapping[str, Any],
    shard_bytes: int = 2 * 10**9,
) -> None:
    """Writes a Hugging Face model folder: safetensors, their index and, last, config.json.

    Args:
      directory: an existing folder.
      hf_config: contents of config.json.
      shard_bytes: files are begun anew past this size.

    Raises:
      OSError: the folder cannot be written to, or the disk is full; what was written is left.
    """
    directory = Path(directory)
    shards: list[list[str]] = []  # names of the tensors in each
    total = 0

    def part(index):
        return directory / f'part-{index}'

    def write(tensors):
        # Not save_file, whose files only their owner can read.
        part(len(shards)).write_bytes(safetensors.numpy.save(tensors, {'format': 'pt'}))
        shards.append(list(tensors))

    tensors, size = {}, 0
    for name, array in to_hf(params, config):
        if tensors and size + array.nbytes > shard_bytes:
            write(tensors)
            tensors, size = {}, 0
        tensors[name] = np.ascontiguousarray(array)
        size += array.nbytes
        total += array.nbytes
    write(tensors)
    count = len(shards)
    names = ['model.safetensors']
    if count > 1:
        names = [f'model-{i + 1:05}-of-{count:05}.safetensors' for i in range(count)]
    for i, name in enumerate(names):
        part(i).replace(directory / name)
    texts = {'config.json': dict(hf_config)}
    if count > 1:
        weight_map = {key: names[i] for i, keys in enumerate(shards) for key in keys}
        index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        texts = {'model.safetensors.index.json': index, **texts}
    for name, content in texts.items():
        (directory / name).write_text(json.dumps(content, indent=2) + '\n')


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """The metadata of a GGUF file and its tensors by name, still quantized and on disk.

    Raises:
      UserError: the file is missing, corrupt or truncated.
    """
    try:
        reader = _Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        # The reader checks little itself: damage shows as whichever of these comes first.
        raise UserError(f'cannot read {path} as a GGUF file: {error}') from error
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def gguf_config(
    fields: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor]
) -> DecoderConfig:
    """The config of what `read_gguf` returns.

    Raises:
      UserError: not a supported decoder.
    """
    # Llama 3's stretching of rope is a tensor here.
    divisors = tensors.get(_ROPE_DIVISORS)
    return families.from_gguf(
        fields,
        tie_embeddings=_UNEMBEDDER.gguf not in tensors,
        rope_divisors=() if divisors is None else tuple(_dequantize(divisors).tolist()),
    )


def from_gguf(
    fields: Mapping[str, Any],
    tensors: Mapping[str, gguf.ReaderTensor],
    config: DecoderConfig,
    dtype: Any,
    shardings: Any = None,
    keep: Keep | None = None,
) -> dict:
    """Parameters of what `read_gguf` returns; see `from_safetensors`.

    Raises:
      UserError: a kind of quantization that cannot be undone, or tensors are missing, extra,
        misshapen or not finite; the first are named.
    """
    family = fields['general.architecture']

    def read(name: str, at: Index) -> np.ndarray:
        weight = _dequantize(tensors[name])
        if family == 'llama' and name.endswith('attn_q.weight'):
            weight = _unpermute(weight, config.num_heads)
        if family == 'llama' and name.endswith('attn_k.weight'):
            weight = _unpermute(weight, config.num_kv_heads)
        if name.endswith('norm.weight'):  # llama.cpp has added Gemma's offset
            weight = weight - np.float32(config.norm_offset)
        return weight[at]

    shapes = {
        name: tuple(tensor.shape[::-1].tolist())
        for name, tensor in tensors.items()
        if name != _ROPE_DIVISORS
    }
    return _assemble('gguf', shapes, read, config, dtype, shardings, keep)


def _dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise UserError(f'tensor {tensor.name}: quantization {kind} is not supported') from error


def fingerprint(params: Mapping) -> str:
    """A short hex digest that tells base models apart.

    It is the same for numpy and jax arrays and for float32 parameters and their cast to
    bfloat16. It looks at a sample of each parameter, so that it is quick: another model shows,
    one changed value may not.
    """
    return digest(records(flatten_dict(params, sep='/')))


def records(arrays: Mapping[str, Any]) -> dict[str, bytes]:
    """What the fingerprint sees of each of these parameters, named by their paths."""
    sample = _sample
    if all(isinstance(array, jax.Array) for array in arrays.values()):
        # Only the samples leave the devices, all of them to each process; compiled once for all.
        place = next(iter(arrays.values())).sharding
        if isinstance(place, NamedSharding):
            place = NamedSharding(place.mesh, PartitionSpec())
        sample = jax.jit(_sample, out_shardings=place)
    samples = sample(arrays)
    return {
        path: f'{path} {tuple(array.shape)}'.encode()
        + np.asarray(samples[path]).astype(ml_dtypes.bfloat16).tobytes()
        for path, array in arrays.items()
    }


def digest(records: Mapping[str, bytes]) -> str:
    """The fingerprint of the parameters that these are the records of."""
    joined = b''.join(records[path] for path in sorted(records))
    return hashlib.blake2b(joined, digest_size=8).hexdigest()


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
    read: Read,
    config: DecoderConfig | MultimodalConfig,
    dtype: Any,
    shardings: Any,
    keep: Keep | None = None,
) -> dict:
    sizes = _sizes(config)
    found = {_plain(name): name for name in shapes}
    tied = (config.text if isinstance(config, MultimodalConfig) else config).tie_embeddings
    rows = table(config)
    expected = {}
    for row in rows:
        shape = tuple(sizes[axis] for axis in row.axes[row.stacked :])
        expected |= dict.fromkeys(
            row.names(source, sizes), shape[::-1] if row.transposed else shape
        )
    compare(
        expected,
        {
            plain: shapes[name]
            for plain, name in found.items()
            if not plain.endswith('rotary_emb.inv_freq')
            and not (tied and plain == _UNEMBEDDER.hf)
            and not (isinstance(config, DecoderConfig) and plain.startswith(_VISION))
        },
    )
    places = {} if shardings is None else flatten_dict(shardings, sep='/')
    default = SingleDeviceSharding(jax.devices()[0])

    def part(row: Row, name: str, at: Index) -> np.ndarray:
        weight = read(found[name], at[::-1] if row.transposed else at)
        if not finite(weight):
            raise UserError(f'tensor {found[name]} holds values that are not finite')
        return weight.T if row.transposed else weight

    def shard(row: Row, at: Index) -> np.ndarray:
        names = row.names(source, sizes)
        if not row.stacked:
            return np.ascontiguousarray(part(row, names[0], at).astype(dtype))
        names = names[at[0]]
        first = part(row, names[0], at[1:])
        stacked = np.empty((len(names), *first.shape), dtype)
        stacked[0] = first
        for i, name in enumerate(names[1:], 1):
            stacked[i] = part(row, name, at[1:])
        return stacked

    params = {}
    for row in rows:
        shape = tuple(sizes[axis] for axis in row.axes)
        params[row.path] = jax.make_array_from_callback(
            shape, places.get(row.path, default), lambda at, row=row: shard(row, at)
        )
        if keep is not None:
            params[row.path] = keep(row.path, params[row.path])
    return unflatten_dict(params, sep='/')


def finite(array: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinities."""
    if array.dtype == ml_dtypes.bfloat16:  # its own isfinite is slow
        return not np.any((array.view(np.uint16) & 0x7F80) == 0x7F80)
    return bool(np.isfinite(array).all()) if array.dtype.kind == 'f' else True


def compare(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> None:
    """Checks the shapes of tensors by name.

    Raises:
      UserError: tensors are missing, extra or misshapen; the first of each are named.
    """
    problems = {
        'missing': [name for name in expected if name not in found],
        'extra': [name for name in found if name not in expected],
        'misshapen': [
            f'{name} {found[name]} instead of {shape}'
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ],
    }
    lists = [f'{kind}: {some(names)}' for kind, names in problems.items() if names]
    if lists:
        raise UserError(f'the tensors do not fit the model; {"; ".join(lists)}')
