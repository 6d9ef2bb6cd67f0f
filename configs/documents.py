"""Distillation data of documents: questions, the model's own answers, its log-probabilities.

    python -m launch.generate_data --config=configs/documents.py:READER,PATH --output=DIR

READER,PATH: `squad,FILE`, `jsonl,FILE`, `parquet,PATTERN`, `text,FOLDER` or `tfds,NAME`
(`d2l.documents.READERS`).
"""

from ml_collections import ConfigDict

from hyperlora.errors import UserError


def get_config(argument: str = '') -> ConfigDict:
    """The config for a source of documents.

    Raises:
      UserError: no source.
    """
    reader, _, path = argument.partition(',')
    if not path:
        raise UserError('name the documents: configs/documents.py:READER,PATH')
    return ConfigDict(
        {
            'base': 'smollm2',
            'base_dtype': 'float32',
            'base_quantization': 'none',
            'encoder': '',  # the model that will read the documents; the base itself if empty
            # Weights of configs/reader.py, the LoRA that the teacher reads with; none if empty.
            'reader': '',
            'mesh': {'slice': 1, 'data': 1, 'fsdp': -1, 'tensor': 1},
            'source': {'reader': reader, 'name' if reader == 'tfds' else 'path': path},
            'limit': 0,  # documents, the first ones; 0 for all
            'shards': 8,  # files; each is written whole, by one process
            'tokens_per_pass': 4096,
            'settings': {
                'questions': 'given',  # or generated, both, passages
                'questions_per_document': 8,
                'answers': 'generated',  # or given
                'max_answer_tokens': 64,
                'entries': 16,
            },
        }
    )
