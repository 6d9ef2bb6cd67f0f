"""A hypernetwork for images that is trained on texts alone (arXiv 2602.15902).

    python -m launch.train --config=configs/d2l_images.py:words,WORDS --workdir=DIR1
    python -m launch.train --config=configs/d2l_images.py:names,NAMES,DIR1 --workdir=DIR2
    python -m launch.train --config=configs/d2l_images.py:smollm2,ASKED,DIR2 --workdir=DIR3
    python -m launch.train --config=configs/d2l_images.py:gemma,RECORDS --config.base=GEMMA2 \\
        --config.hypernetwork.encoder.model=GEMMA3 --workdir=DIR

WORDS, NAMES and ASKED are what launch.generate_data makes of configs/documents.py:words,COUNT and
:names,PACKAGE (NAMES with config.source.asked=False): texts about things. Once more `smollm2` from
DIR3, on ASKED with config.source.digits=800, makes the shipped weights. RECORDS are documents,
see configs/d2l_docs.py, for the encoder's tokenizer.

`words`, `names` and `smollm2` are three stages on two CPU cores: to carry over any word, names of
things, and names that are asked for. configs/captioner.py makes the model that shows images to the
result. `gemma` has the published settings: Gemma-3-4b reads, Gemma-2-2b answers.
"""

from ml_collections import ConfigDict

from configs import d2l_docs, d2l_niah, fields
from hyperlora.errors import UserError

# Of the stages: steps, contexts of a step, tokens of a context, of a query, of an answer; learning
# rate. Without a question a step costs half as much.
_STAGES = {
    'words': (400, 48, 8, 9, 4, 4e-4),
    'names': (300, 40, 10, 13, 8, 3e-4),
    'smollm2': (110, 28, 10, 22, 8, 3e-4),
}


def get_config(argument: str = '') -> ConfigDict:
    """The config of a variant, of a folder of records, and of where a stage starts.

    Raises:
      UserError: no such variant, no records, or a later stage without the one before.
    """
    variant, records, start = fields(argument)
    if variant not in (*_STAGES, 'gemma'):
        raise UserError(
            f'unknown variant {variant!r} of d2l_images; known: {", ".join([*_STAGES, "gemma"])}'
        )
    if not records:
        raise UserError('name the records: configs/d2l_images.py:VARIANT,RECORDS')
    if variant == 'gemma':
        config = d2l_docs.get_config(f'gemma2_2b,{records},{start}')
        config.hypernetwork.encoder.model = 'gemma3_4b'
    else:
        config = _stage(variant, records)
        if not start and variant != 'words':
            raise UserError(f'name the workdir of the stage before: {variant},RECORDS,DIR')
        config.init_from = start
    config.name = 'd2l_images'
    return config


def _stage(variant: str, records: str) -> ConfigDict:
    """The hypernetwork of needles on texts of a few words."""
    steps, contexts, context_tokens, query_tokens, answer_tokens, rate = _STAGES[variant]
    config = d2l_niah.get_config('smollm2')
    config.objective = ConfigDict({'name': 'top_k_distillation', 'l1': 0.0, 'max_chunks': 1})
    config.data = ConfigDict(
        {
            'name': 'documents',
            'records': records,
            'steps': config.optimizer.get_ref('steps'),
            'teacher': 'stored',
            'group_tokens': contexts * context_tokens,
            'context_tokens': (context_tokens,),
            'chunks': (1.0,),
            'together': 0.0,
            'queries': 1,
            'query_tokens': query_tokens,
            'answer_tokens': answer_tokens,
            'teacher_tokens': 0,
        }
    )
    config.optimizer.update({'steps': steps, 'learning_rate': rate, 'end_learning_rate': rate / 40})
    config.chunk_length = context_tokens
    config.min_gate = 0.0
    return config
