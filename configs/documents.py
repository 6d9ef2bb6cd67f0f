"""Distillation data of documents: questions, the model's own answers, its log-probabilities.

    python -m launch.generate_data --config=configs/documents.py:READER,PATH --output=DIR

READER,PATH: `squad,FILE` (each paragraph is a document), `articles,FILE` (of the same layout, each
article), `jsonl,FILE`, `parquet,PATTERN`, `text,FOLDER`, `tfds,NAME,SPLIT` (see
`d2l.documents.READERS`); or, with answers given, `facts,COUNT` (made-up documents; with
`facts,COUNT,SPLIT` those of a split: train, phrasings, attributes; set source.seed, and
source.facts as "(8, 8)"), `words,COUNT` (one word each) or `names,PACKAGE` (of pictures, see
configs/d2l_images.py).
"""

from ml_collections import ConfigDict

from d2l import documents


def get_config(argument: str = '') -> ConfigDict:
    """The config for a source of documents.

    Raises:
      UserError: no source.
    """
    source = documents.source(argument)
    config = ConfigDict(
        {
            'base': 'smollm2',
            'base_dtype': 'float32',
            'base_quantization': 'none',
            'encoder': '',  # the model that will read the documents; the base itself if empty
            # Weights of configs/reader.py, the LoRA that the teacher reads with; none if empty.
            'reader': '',
            'mesh': {'slice': 1, 'data': 1, 'fsdp': -1, 'tensor': 1},
            'source': source,
            'limit': 0,  # documents, the first ones; 0 for all
            'shards': 8,  # files; each is written whole, by one process
            'tokens_per_pass': 4096,
            'settings': {
                'questions': 'given',  # or generated, both, passages, restate, others
                'questions_per_document': 8,
                'answers': 'generated',  # or given
                'before': ' ',  # given ones
                'max_answer_tokens': 64,
                'entries': 16,
            },
        }
    )
    if source['reader'] in ('facts', 'names', 'words'):
        config.settings.update({'answers': 'given', 'max_answer_tokens': 24, 'entries': 0})
    if source['reader'] in ('names', 'words'):
        config.settings.before = ''  # no text to copy from: as the model itself begins answers
    return config
