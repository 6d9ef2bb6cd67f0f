"""Published models by the names that configs call them: their shapes, without their weights.

The shapes are what compiling ahead of time needs; to train, the weights have to be downloaded and
the config's `base` set to their folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A model on Hugging Face.

    Attributes:
      repository: where its weights are.
      config: what its config.json says about its shape.
    """

    repository: str
    config: Mapping[str, Any]


MODELS = {
    'gemma2_2b': Published(
        'google/gemma-2-2b-it',
        {
            'model_type': 'gemma2',
            'vocab_size': 256000,
            'hidden_size': 2304,
            'intermediate_size': 9216,
            'num_hidden_layers': 26,
            'num_attention_heads': 8,
            'num_key_value_heads': 4,
            'head_dim': 256,
        },
    ),
    'gemma3_4b': Published(  # its text decoder
        'google/gemma-3-4b-it',
        {
            'model_type': 'gemma3_text',
            'vocab_size': 262208,
            'hidden_size': 2560,
            'intermediate_size': 10240,
            'num_hidden_layers': 34,
            'num_attention_heads': 8,
            'num_key_value_heads': 4,
            'head_dim': 256,
            'query_pre_attn_scalar': 256,
            'max_position_embeddings': 131072,
            'sliding_window': 1024,
            'rope_theta': 1e6,
            'rope_local_base_freq': 1e4,
            'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
        },
    ),
    'mistral_7b': Published(
        'mistralai/Mistral-7B-Instruct-v0.2',
        {
            'model_type': 'mistral',
            'vocab_size': 32000,
            'hidden_size': 4096,
            'intermediate_size': 14336,
            'num_hidden_layers': 32,
            'num_attention_heads': 32,
            'num_key_value_heads': 8,
            'max_position_embeddings': 32768,
            'rms_norm_eps': 1e-5,
            'rope_theta': 1e6,
            'sliding_window': None,
        },
    ),
    'qwen3_4b': Published(
        'Qwen/Qwen3-4B-Instruct-2507',
        {
            'model_type': 'qwen3',
            'vocab_size': 151936,
            'hidden_size': 2560,
            'intermediate_size': 9728,
            'num_hidden_layers': 36,
            'num_attention_heads': 32,
            'num_key_value_heads': 8,
            'max_position_embeddings': 262144,
            'rope_theta': 5e6,
            'tie_word_embeddings': True,
        },
    ),
    'llama3_8b': Published(
        'meta-llama/Llama-3.1-8B-Instruct',
        {
            'model_type': 'llama',
            'vocab_size': 128256,
            'hidden_size': 4096,
            'intermediate_size': 14336,
            'num_hidden_layers': 32,
            'num_attention_heads': 32,
            'num_key_value_heads': 8,
            'max_position_embeddings': 131072,
            'rms_norm_eps': 1e-5,
            'rope_theta': 5e5,
            'rope_scaling': {
                'rope_type': 'llama3',
                'factor': 8.0,
                'low_freq_factor': 1.0,
                'high_freq_factor': 4.0,
                'original_max_position_embeddings': 8192,
            },
        },
    ),
    'Alibaba-NLP/gte-large-en-v1.5': Published(
        'Alibaba-NLP/gte-large-en-v1.5',
        {
            'model_type': 'new',
            'vocab_size': 30528,
            'hidden_size': 1024,
            'intermediate_size': 4096,
            'num_hidden_layers': 24,
            'num_attention_heads': 16,
            'max_position_embeddings': 8192,
            'rope_theta': 160000,
            'rope_scaling': {'type': 'ntk', 'factor': 2.0},
            'type_vocab_size': 2,
        },
    ),
}


class WordTokenizer:
    """Stands in for the tokenizer of a model whose files are not here: only counts mean anything.

    Words, digits and punctuation are a token each, which is about what large vocabularies do, and
    a chat template is eight.
    """

    eos_id = 1

    def encode(self, text: str, **_) -> list[int]:
        """As many tokens as the text has words, digits and punctuation marks."""
        return [2] * len(re.findall(r'\d|[^\W\d]+|[^\w\s]', text))

    def prompt(self, question: str) -> list[int]:
        """The question as a turn of the user."""
        return [3] * 8 + self.encode(question)
