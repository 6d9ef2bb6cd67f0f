"""Distillation data of documents: questions, the model's own answers, its log-probabilities.

    python -m launch.generate_data --config=configs/documents.py:READER,PATH --output=DIR

READER,PATH: `squad,FILE`, `jsonl,FILE`, `parquet,PATTERN`, `text,FOLDER`, `tfds,NAME`
(`d2l.documents.READERS`) or `facts,COUNT`: made-up documents, whose answers are given; set
config.source.seed, facts (such as "(8, 8)") and split (train, phrasings, attributes).
"""

from typing import Any

from ml_collections import ConfigDict

from hyperlora.errors import UserError


def get_config(argument: str = '') -> ConfigDict:
    """The config for a source of documents.

    Raises:
      UserError: no source, or made-up documents without their number.
    """
    reader, _, path = argument.partition(',')
    if not path:
        raise UserError('name the documents: configs/documents.py:READER,PATH')
    config = ConfigDict(
        {
            'base': 'smollm2',
            'base_dtype': 'float32',
            'base_quantization': 'none',
            'encoder': '',  # the model that will read the documents; the base itself if empty
            'mesh': {'slice': 1, 'data': 1, 'fsdp': -1, 'tensor': 1},
            'source': _source(reader, path),
            'limit': 0,  # documents, the first ones; 0 for all
            'shards': 8,  # files; each is written whole, by one process
            'tokens_per_pass': 4096,
            'settings': {
                'questions': 'given',  # or generated, or both
                'questions_per_document': 8,
                'answers': 'generated',  # or given
                'max_answer_tokens': 64,
                'entries': 16,
            },
        }
    )
    if reader == 'facts':
        config.settings.update({'answers': 'given', 'max_answer_tokens': 24, 'entries': 0})
    return config


def _source(reader: str, path: str) -> dict[str, Any]:
    if reader != 'facts':
        return {'reader': reader, 'name' if reader == 'tfds' else 'path': path}
    if not path.isdecimal():
        raise UserError(f'how many made-up documents? configs/documents.py:facts,COUNT, not {path}')
    return {'reader': reader, 'count': int(path), 'seed': 0, 'facts': (1, 8), 'split': 'train'}
