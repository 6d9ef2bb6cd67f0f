"""The decoder families that can serve as a base model, and how their files describe them.

A family is data: a config, a table of tensor names (`weights`), and here what its files leave
unsaid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperlora.errors import UserError


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
      theta: base of the frequencies `theta ** (-2 i / head_dim)`.
      divisors: `[head_dim / 2]`, by which each frequency is divided to stretch the window; empty
        for none.
    """

    theta: float
    divisors: tuple[float, ...] = ()

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position, `[head_dim / 2]` f32."""
        half = head_dim // 2
        frequencies = 1.0 / np.float32(self.theta) ** (np.arange(half, dtype=np.float32) / half)
        return frequencies / np.asarray(self.divisors or 1.0, np.float32)


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: rotary attention with grouped heads, gated MLP, RMS norms.

    Attributes:
      max_length: the window of the model, in tokens.
      tie_embeddings: the logits come from the embedding table, not from a matrix of their own.
      rope: of the global layers, and of the local ones too unless `local_rope` is given.
      attention_window: a local layer sees so many tokens back, itself included.
      local_layers: which layers are local, one flag each; empty for none.
      query_scale: multiplies the scores of attention; None for `head_dim ** -0.5`.
      attention_softcap, logit_softcap: bound `c` of scores and logits, `c tanh(x / c)`.
      activation: of the MLP's gate, a key of `decoder.ACTIVATIONS`.
      qkv_bias, output_bias, mlp_bias: which projections have a bias.
      qk_norm: each head's queries and keys are normed before rope.
      post_norms: attention and MLP are normed after, too.
      norm_offset: added to the scale of every norm (1 for Gemma).
      embedding_scale: multiplies the embeddings of tokens.
    """

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_length: int
    tie_embeddings: bool
    rope: Rope
    local_rope: Rope | None = None
    attention_window: int | None = None
    local_layers: tuple[bool, ...] = ()
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: str = 'silu'
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0


# By `model_type`: what transformers assumes where a config.json says nothing. A key that is
# neither here nor in _IRRELEVANT is an error, so that nothing is silently ignored.
_COMMON = {
    'head_dim': None,
    'hidden_act': 'silu',
    'num_key_value_heads': None,
    'rope_parameters': None,
    'rope_scaling': None,
    'rope_theta': 10000.0,
    'tie_word_embeddings': False,
}
_REQUIRED = (
    'vocab_size',
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
)
_GEMMA = {
    'attention_bias': False,
    'final_logit_softcapping': None,
    'head_dim': 256,
    'hidden_act': None,
    'hidden_activation': 'gelu_pytorch_tanh',
    'layer_types': None,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'query_pre_attn_scalar': 256,
    'rms_norm_eps': 1e-6,
    'rope_parameters': None,
    'rope_scaling': None,
    'sliding_window': 4096,
    'tie_word_embeddings': True,
}
_QWEN = {
    **_COMMON,
    'layer_types': None,
    'max_position_embeddings': 32768,
    'max_window_layers': 28,
    'rms_norm_eps': 1e-6,
    'sliding_window': 4096,
    'use_sliding_window': False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    'llama': {
        **_COMMON,
        'attention_bias': False,
        'max_position_embeddings': 2048,
        'mlp_bias': False,
        'rms_norm_eps': 1e-6,
    },
    'mistral': {
        **_COMMON,
        'max_position_embeddings': 4096 * 32,
        'num_key_value_heads': 8,
        'rms_norm_eps': 1e-6,
        'sliding_window': 4096,
    },
    'qwen2': _QWEN,
    'qwen3': {**_QWEN, 'attention_bias': False, 'head_dim': 128},
    'gemma2': {
        **_GEMMA,
        'attn_logit_softcapping': 50.0,
        'final_logit_softcapping': 30.0,
        'max_position_embeddings': 8192,
        'rope_theta': 10000.0,
    },
    'gemma3_text': {
        **_GEMMA,
        'max_position_embeddings': 131072,
        'rope_local_base_freq': 10000.0,
        'rope_theta': 1000000.0,
        'sliding_window_pattern': 6,
        'vocab_size': 262208,
    },
}
FAMILIES = tuple(_DEFAULTS)
_MULTIMODAL = {
    'boi_token_index': 255999,
    'eoi_token_index': 256000,
    'image_token_index': 262144,
    'mm_tokens_per_image': 256,
    'tie_word_embeddings': True,
}

# Keys of a config.json that say nothing about the function computed, or nothing any more once
# those above are known.
_IRRELEVANT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path _sliding_window_pattern
    architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder
    is_llama_config label2id length_penalty max_length min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache
    """.split()
)
# Keys that must be false or absent, unless they are in the family's defaults.
_UNSUPPORTED = (
    'add_cross_attention',
    'attn_logit_softcapping',  # transformers itself leaves it out of Gemma 3
    'is_encoder_decoder',
    'mlp_bias',
    'rope_interleaved',
    'use_bidirectional_attention',
)
_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}


def complete(
    config: Mapping[str, Any],
    defaults: Mapping[str, Mapping[str, Any]],
    unsupported: Collection[str] = _UNSUPPORTED,
    irrelevant: Collection[str] = (),
    required: Collection[str] = _REQUIRED,
) -> dict[str, Any]:
    """The contents of a config.json and what its family assumes where it says nothing.

    Args:
      defaults: by family, the settings that are understood and their defaults.
      unsupported: settings that must be false or absent, unless the family understands them.
      irrelevant: settings that say nothing about the function computed, besides the usual ones.
      required: settings without a default.

    Raises:
      UserError: the family or a key is not known, one is missing or not supported.
    """
    family = config.get('model_type')
    if family not in defaults:
        raise UserError(f'model_type {family!r} is not supported (only {", ".join(defaults)})')
    own = defaults[family]
    known = {*_IRRELEVANT, *irrelevant, *unsupported, *required, *own}
    unknown = sorted(config.keys() - known)
    if unknown:
        raise UserError(f'{family}: unknown settings in config.json: {", ".join(unknown)}')
    missing = [key for key in required if key not in {**own, **config}]
    if missing:
        raise UserError(f"{family}: the model's config.json lacks {', '.join(missing)}")
    for key in unsupported:
        if key not in own and config.get(key):
            raise UserError(f'{family}: {key} = {config[key]!r} is not supported')
    return {**own, **config}


def activation(c: Mapping[str, Any], key: str) -> str:
    """A key of `decoder.ACTIVATIONS`: what the setting `key` says.

    Raises:
      UserError: another activation.
    """
    if c[key] not in _ACTIVATIONS:
        raise UserError(
            f'{c["model_type"]}: activation {c[key]!r} is not supported (only '
            f'{", ".join(_ACTIVATIONS)})'
        )
    return _ACTIVATIONS[c[key]]


def multimodal_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The outermost settings of a Gemma 3 that reads images; errors are those of `complete`."""
    parts = ('text_config', 'vision_config')
    c = complete(config, {'gemma3': _MULTIMODAL}, required=parts)
    for part in parts:
        if not isinstance(c[part], Mapping):
            raise UserError(f'gemma3: {part} in config.json is not an object')
    return c


def decoder_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of a model's decoder: its own, or of one that reads images too, a part.

    Raises:
      UserError: a key is missing or not known.
    """
    if config.get('model_type') != 'gemma3':
        return config
    whole = multimodal_settings(config)
    return {
        **whole['text_config'],
        'tie_word_embeddings': whole['tie_word_embeddings'],  # its own is not used
        'model_type': 'gemma3_text',
        'architectures': [_ARCHITECTURES['gemma3_text']],
    }


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads the contents of a Hugging Face config.json, in the old or the new layout.

    Of a model that reads images too, the decoder is described.

    Raises:
      UserError: a key is missing or not known, or the model needs something that is not
        supported: another family, kind of rope, activation or kind of attention.
    """
    c = complete(decoder_part(config), _DEFAULTS)
    family = c['model_type']
    gemma = family.startswith('gemma')
    heads, width = c['num_attention_heads'], c['hidden_size']
    head_dim = c['head_dim'] or width // heads
    local = _local_layers(family, c)
    rope, local_rope = _ropes(family, c, head_dim)
    return DecoderConfig(
        vocab_size=c['vocab_size'],
        num_layers=c['num_hidden_layers'],
        width=width,
        mlp_width=c['intermediate_size'],
        num_heads=heads,
        num_kv_heads=c['num_key_value_heads'] or heads,
        head_dim=head_dim,
        norm_eps=c['rms_norm_eps'],
        max_length=c['max_position_embeddings'],
        tie_embeddings=c['tie_word_embeddings'],
        rope=rope,
        local_rope=local_rope if any(local) else None,
        attention_window=c['sliding_window'] if any(local) else None,
        local_layers=local,
        activation=activation(c, 'hidden_activation' if gemma else 'hidden_act'),
        qkv_bias=family == 'qwen2' or c.get('attention_bias', False),
        output_bias=c.get('attention_bias', False),
        mlp_bias=c.get('mlp_bias', False),
        attention_softcap=c.get('attn_logit_softcapping'),
        logit_softcap=c.get('final_logit_softcapping'),
        query_scale=c['query_pre_attn_scalar'] ** -0.5 if gemma else None,
        **_unsaid(family, width),
    )


def _unsaid(family: str, width: int) -> dict[str, Any]:
    """The settings that follow from the family alone."""
    gemma = family.startswith('gemma')
    return {
        'qk_norm': family in ('qwen3', 'gemma3', 'gemma3_text'),
        'post_norms': gemma,
        'norm_offset': 1.0 if gemma else 0.0,
        'embedding_scale': width**0.5 if gemma else 1.0,
    }


def _local_layers(family: str, c: Mapping[str, Any]) -> tuple[bool, ...]:
    layers = range(c['num_hidden_layers'])
    if c.get('layer_types'):
        known = {'full_attention': False, 'sliding_attention': True}
        unknown = sorted(set(c['layer_types']) - known.keys())
        if unknown:
            raise UserError(f'{family}: attention of kind {", ".join(unknown)} is not supported')
        if len(c['layer_types']) != len(layers):
            raise UserError(f'{family}: {len(c["layer_types"])} layer_types, {len(layers)} layers')
        local = tuple(known[kind] for kind in c['layer_types'])
    elif family == 'gemma2':
        local = tuple(layer % 2 == 0 for layer in layers)
    elif family == 'gemma3_text':
        local = tuple((layer + 1) % c['sliding_window_pattern'] != 0 for layer in layers)
    elif family == 'mistral':
        local = tuple(c['sliding_window'] is not None for _ in layers)
    elif c.get('use_sliding_window'):
        local = tuple(layer >= c['max_window_layers'] for layer in layers)
    else:
        local = ()
    if any(local) and not c.get('sliding_window'):
        raise UserError(f'{family}: local layers, but no sliding_window')
    return local if any(local) else ()


def _ropes(family: str, c: Mapping[str, Any], head_dim: int) -> tuple[Rope, Rope | None]:
    """Rope of the global and of the local layers (None if the same)."""
    settings = c.get('rope_parameters') or {}
    if 'full_attention' in settings:  # one rope for each kind of layer
        local = settings.get('sliding_attention')
        return (
            read_rope(family, settings['full_attention'], head_dim),
            local and read_rope(family, local, head_dim),
        )
    old = settings or c.get('rope_scaling') or {}
    rope = read_rope(family, {'rope_theta': c['rope_theta'], **old}, head_dim)
    return rope, Rope(c['rope_local_base_freq']) if 'rope_local_base_freq' in c else None


def read_rope(family: str, settings: Mapping[str, Any], head_dim: int) -> Rope:
    """Reads the settings of one kind of rope: `rope_theta`, `rope_type` and what that needs.

    Raises:
      UserError: the type or a setting is not supported, or one is missing.
    """
    settings = dict(settings)
    kind = settings.pop('rope_type', None) or settings.pop('type', None) or 'default'
    settings.pop('type', None)
    theta = float(settings.pop('rope_theta'))
    half = head_dim // 2
    try:
        if kind == 'default':
            divisors = ()
        elif kind == 'linear':
            divisors = (float(settings.pop('factor')),) * half
        elif kind == 'llama3':
            divisors = _llama3_divisors(
                Rope(theta).frequencies(head_dim),
                settings.pop('factor'),
                settings.pop('low_freq_factor'),
                settings.pop('high_freq_factor'),
                settings.pop('original_max_position_embeddings'),
            )
        else:
            raise UserError(f'{family}: rope type {kind!r} is not supported')
    except KeyError as e:
        raise UserError(f'{family}: rope of type {kind!r} lacks {e.args[0]}') from e
    if settings:
        raise UserError(f'{family}: unknown settings of rope: {", ".join(sorted(settings))}')
    return Rope(theta, divisors)


def _llama3_divisors(
    frequencies: np.ndarray, factor: float, low: float, high: float, length: int
) -> tuple[float, ...]:
    """Llama 3.1's: waves longer than the trained window are stretched, short ones are not."""
    waves = length * frequencies / (2 * math.pi)  # how often each turns within the window
    smooth = np.clip((waves - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - smooth) / factor + smooth)).tolist())


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Contents of a config.json that `from_hf` and transformers read as this config.

    Raises:
      UserError: there is none, as for divisors of rope that came without their origin.
    """
    c = config
    if c.post_norms:
        family = 'gemma3_text' if c.qk_norm else 'gemma2'
    elif c.qk_norm:
        family = 'qwen3'
    elif c.qkv_bias and not c.output_bias:
        family = 'qwen2'
    else:
        family = 'mistral' if c.local_layers else 'llama'
    defaults = _DEFAULTS[family]
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[c.activation]
    rope = {'rope_type': 'linear', 'factor': c.rope.divisors[0]} if c.rope.divisors else None
    found = {
        'model_type': family,
        'architectures': [_ARCHITECTURES[family]],
        'vocab_size': c.vocab_size,
        'hidden_size': c.width,
        'intermediate_size': c.mlp_width,
        'num_hidden_layers': c.num_layers,
        'num_attention_heads': c.num_heads,
        'num_key_value_heads': c.num_kv_heads,
        'head_dim': c.head_dim,
        'rms_norm_eps': c.norm_eps,
        'max_position_embeddings': c.max_length,
        'tie_word_embeddings': c.tie_embeddings,
        'rope_theta': c.rope.theta,
        'rope_scaling': rope,
        'hidden_activation' if 'hidden_activation' in defaults else 'hidden_act': activation,
    }
    optional = {
        'attention_bias': c.output_bias,
        'mlp_bias': c.mlp_bias,
        # Gemma 3 of transformers wants a window even if no layer is local.
        'sliding_window': c.attention_window or defaults.get('sliding_window'),
        'use_sliding_window': any(c.local_layers),
        'layer_types': [
            'sliding_attention' if local else 'full_attention'
            for local in c.local_layers or (False,) * c.num_layers
        ],
        'attn_logit_softcapping': c.attention_softcap,
        'final_logit_softcapping': c.logit_softcap,
        'query_pre_attn_scalar': c.query_scale and round(c.query_scale**-2),
        'rope_local_base_freq': c.local_rope and c.local_rope.theta,
    }
    found |= {key: value for key, value in optional.items() if key in defaults}
    if from_hf(found) != config:
        raise UserError(
            f"no config.json of family {family} says the same as this model's description; give "
            'the base model as a Hugging Face folder'
        )
    return found


_ARCHITECTURES = {
    'llama': 'LlamaForCausalLM',
    'mistral': 'MistralForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
    'gemma2': 'Gemma2ForCausalLM',
    'gemma3_text': 'Gemma3ForCausalLM',
}
_GGUF_KEYS = {  # field: its key after the architecture's name
    'vocab_size': 'vocab_size',
    'num_layers': 'block_count',
    'width': 'embedding_length',
    'mlp_width': 'feed_forward_length',
    'num_heads': 'attention.head_count',
    'norm_eps': 'attention.layer_norm_rms_epsilon',
    'max_length': 'context_length',
}
GGUF_FAMILIES = ('llama', 'qwen2', 'qwen3', 'gemma2', 'gemma3')


def from_gguf(
    fields: Mapping[str, Any], *, tie_embeddings: bool, rope_divisors: tuple[float, ...] = ()
) -> DecoderConfig:
    """Reads the metadata of a GGUF file.

    Args:
      fields: the metadata.
      tie_embeddings: the metadata does not tell; only the absence of `output.weight` does.
      rope_divisors: the values of the tensor `rope_freqs.weight`, if there is one.

    Raises:
      UserError: a key is missing or the model needs something that is not supported.
    """
    family = fields.get('general.architecture')
    if family not in GGUF_FAMILIES:
        raise UserError(
            f'architecture {family!r} is not supported (only {", ".join(GGUF_FAMILIES)})'
        )

    def get(key, default=None):
        return fields.get(f'{family}.{key}', default)

    names = dict(_GGUF_KEYS)
    if get('vocab_size') is None and 'tokenizer.ggml.tokens' in fields:
        names.pop('vocab_size')
    missing = [f'{family}.{key}' for key in names.values() if get(key) is None]
    if missing:
        raise UserError(f"the model's description lacks {', '.join(missing)}")
    picked = {field: get(key) for field, key in names.items()}
    picked.setdefault('vocab_size', len(fields.get('tokenizer.ggml.tokens', ())))
    # GGUF holds float32: the shortest decimal gives back the 1e-05 of the original config.json.
    picked['norm_eps'] = float(f'{picked["norm_eps"]:.7g}')
    head_dim = get('attention.key_length', picked['width'] // picked['num_heads'])
    rope_dim = get('rope.dimension_count', head_dim)
    if rope_dim != head_dim:
        raise UserError(f'partial rope ({rope_dim} of {head_dim} dimensions) is not supported')
    kind = get('rope.scaling.type', 'none')
    if kind == 'linear':
        rope_divisors = (float(get('rope.scaling.factor', 1.0)),) * (head_dim // 2)
    elif kind != 'none':
        raise UserError(f'rope scaling of type {kind!r} is not supported')
    gemma = family.startswith('gemma')
    local = _gguf_local_layers(family, picked['num_layers'], get)
    local_rope = Rope(float(get('rope.freq_base_swa', 10000.0))) if family == 'gemma3' else None
    # As llama.cpp: the widest Gemmas scale by the width of a head of the model.
    widest = picked['num_layers'] == {'gemma2': 46, 'gemma3': 62}.get(family)
    scaled = picked['width'] // picked['num_heads'] if widest else head_dim
    caps = (50.0, 30.0) if family == 'gemma2' else (None, None)  # llama.cpp's defaults
    return DecoderConfig(
        **picked,
        num_kv_heads=get('attention.head_count_kv', picked['num_heads']),
        head_dim=head_dim,
        tie_embeddings=tie_embeddings,
        rope=Rope(float(get('rope.freq_base', 10000.0)), rope_divisors),
        local_rope=local_rope if any(local) else None,
        attention_window=get('attention.sliding_window', 4096) if any(local) else None,
        local_layers=local,
        activation='gelu_tanh' if gemma else 'silu',
        qkv_bias=family == 'qwen2',
        attention_softcap=get('attn_logit_softcapping', caps[0]) or None,
        logit_softcap=get('final_logit_softcapping', caps[1]) or None,
        query_scale=scaled**-0.5 if gemma else None,
        **_unsaid(family, picked['width']),
    )


def _gguf_local_layers(family: str, num_layers: int, get: Callable[..., Any]) -> tuple[bool, ...]:
    """As llama.cpp: the last layer of each period is global, unless flags say otherwise."""
    window = get('attention.sliding_window')
    if family == 'gemma2' or (family == 'gemma3' and window):
        pattern = get('attention.sliding_window_pattern', 2 if family == 'gemma2' else 6)
        if isinstance(pattern, list):
            local = tuple(map(bool, pattern))
        else:
            local = tuple(not pattern or (i + 1) % pattern != 0 for i in range(num_layers))
        if len(local) != num_layers:
            raise UserError(f'{family}: {len(local)} flags of local layers, {num_layers} layers')
        return local if any(local) else ()
    if window:
        raise UserError(f'{family}.attention.sliding_window = {window} is not supported')
    return ()
