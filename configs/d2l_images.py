"""A hypernetwork for images that is trained on texts alone (arXiv 2602.15902).

    python -m launch.generate_data --config=configs/documents.py:names,EMOJI/VENDOR --output=NAMES \
        --config.settings.answers=given --config.settings.entries=0
    python -m launch.train --config=configs/d2l_images.py:smollm2,NAMES --workdir=DIR
    python -m launch.train --config=configs/d2l_images.py:gemma,RECORDS --config.base=GEMMA2 \
        --config.hypernetwork.encoder.model=GEMMA3 --workdir=DIR

NAMES holds texts about things, RECORDS documents (see configs/d2l_docs.py), made for the tokenizer
of the encoder. Variants: `smollm2` (two CPU cores; configs/captioner.py makes the model that shows
it images afterwards), `gemma` (the published settings: Gemma-3-4b reads, Gemma-2-2b answers).
"""

from ml_collections import ConfigDict

from configs import d2l_docs, d2l_niah
from hyperlora.errors import UserError


def get_config(argument: str = '') -> ConfigDict:
    """The config of a variant and of a folder of records.

    Raises:
      UserError: no such variant, or no records.
    """
    variant, _, records = argument.partition(',')
    if variant not in ('smollm2', 'gemma'):
        raise UserError(f'unknown variant {variant!r} of d2l_images; known: smollm2, gemma')
    if not records:
        raise UserError('name the records: configs/d2l_images.py:VARIANT,RECORDS')
    if variant == 'gemma':
        config = d2l_docs.get_config(f'gemma2_2b,{records}')
        config.hypernetwork.encoder.model = 'gemma3_4b'
    else:
        config = _smollm2(records)
    config.name = 'd2l_images'
    return config


def _smollm2(records: str) -> ConfigDict:
    """Short texts, many to a step: what counts is to tell thousands of things apart."""
    config = d2l_niah.get_config('smollm2')
    config.hypernetwork.shape.gate = False
    config.objective = ConfigDict({'name': 'top_k_distillation'})
    config.data = ConfigDict(
        {
            'name': 'documents',
            'records': records,
            'steps': 1000,
            'teacher': 'stored',
            'group_tokens': 12 * 32,
            'context_tokens': (12,),
            'chunks': (1.0,),
            'queries': 1,
            'query_tokens': 24,
            'answer_tokens': 8,
            'teacher_tokens': 64,
        }
    )
    config.optimizer.steps = config.data.steps
    config.optimizer.update({'learning_rate': 4e-4, 'end_learning_rate': 4e-6})
    config.chunk_length = 12
    config.min_gate = 0.0
    return config
