"""The decoder families that can serve as a base model, and how their files describe them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hyperlora.errors import UserError


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: rotary attention with grouped heads, gated MLP, RMS norms.

    `max_length` is the window in tokens. With `tie_embeddings` the logits come from the
    embedding table, without it from a matrix of their own.
    """

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_length: int
    tie_embeddings: bool


_FAMILIES = ('llama',)  # `model_type` in a config.json, `general.architecture` in a GGUF

# field: (its key in config.json, its key in a GGUF after the architecture's name)
_KEYS = {
    'vocab_size': ('vocab_size', 'vocab_size'),
    'num_layers': ('num_hidden_layers', 'block_count'),
    'width': ('hidden_size', 'embedding_length'),
    'mlp_width': ('intermediate_size', 'feed_forward_length'),
    'num_heads': ('num_attention_heads', 'attention.head_count'),
    'norm_eps': ('rms_norm_eps', 'attention.layer_norm_rms_epsilon'),
    'max_length': ('max_position_embeddings', 'context_length'),
}
_DEFAULT_THETA = 10000.0


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a Hugging Face config.json.

    Raises UserError if a key is missing or the model needs something that is not supported.
    """
    _check_family('model_type', config.get('model_type'))
    rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
    rope_type = rope.get('rope_type') or rope.get('type') or 'default'
    if rope_type != 'default':
        raise UserError(f'rope type {rope_type!r} is not supported')
    for key, only in (('hidden_act', 'silu'), ('attention_bias', False), ('mlp_bias', False)):
        if config.get(key, only) != only:
            raise UserError(f'{key} = {config[key]!r} is not supported (only {only!r})')
    fields = _pick(config, {field: hf for field, (hf, _) in _KEYS.items()})
    return DecoderConfig(
        **fields,
        num_kv_heads=config.get('num_key_value_heads') or fields['num_heads'],
        head_dim=config.get('head_dim') or fields['width'] // fields['num_heads'],
        rope_theta=float(rope.get('rope_theta') or config.get('rope_theta') or _DEFAULT_THETA),
        tie_embeddings=config.get('tie_word_embeddings', False),
    )


def from_gguf(fields: Mapping[str, Any], *, tie_embeddings: bool) -> DecoderConfig:
    """Reads the metadata of a GGUF file.

    A GGUF's metadata does not tell whether the embeddings are tied (only the presence of the
    tensor `output.weight` does), so the caller says.

    Raises UserError if a key is missing or the model needs something that is not supported.
    """
    family = fields.get('general.architecture')
    _check_family('architecture', family)
    scaling = [key for key in fields if key.startswith(f'{family}.rope.scal')]
    if scaling:
        raise UserError(f'rope scaling is not supported: {", ".join(scaling)}')
    picked = _pick(fields, {field: f'{family}.{key}' for field, (_, key) in _KEYS.items()})
    # GGUF holds float32: the shortest decimal gives back the 1e-05 of the original config.json.
    picked['norm_eps'] = float(f'{picked["norm_eps"]:.7g}')
    head_dim = fields.get(f'{family}.attention.key_length', picked['width'] // picked['num_heads'])
    rope_dim = fields.get(f'{family}.rope.dimension_count', head_dim)
    if rope_dim != head_dim:
        raise UserError(f'partial rope ({rope_dim} of {head_dim} dimensions) is not supported')
    return DecoderConfig(
        **picked,
        num_kv_heads=fields.get(f'{family}.attention.head_count_kv', picked['num_heads']),
        head_dim=head_dim,
        rope_theta=float(fields.get(f'{family}.rope.freq_base', _DEFAULT_THETA)),
        tie_embeddings=tie_embeddings,
    )


def _check_family(what: str, name: Any) -> None:
    if name not in _FAMILIES:
        raise UserError(f'{what} {name!r} is not supported (only {", ".join(_FAMILIES)})')


def _pick(source: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    missing = [key for key in keys.values() if key not in source]
    if missing:
        raise UserError(f"the model's description lacks {', '.join(missing)}")
    return {field: source[key] for field, key in keys.items()}
