"""A reader: a LoRA that answers briefly, with the document in the prompt.

    python -m launch.generate_data --config=configs/documents.py:squad,FILE --output=RECORDS \\
        --config.settings.answers=given --config.settings.entries=0
    python -m launch.train --config=configs/reader.py:RECORDS --workdir=DIR

Small models left alone are poor teachers: `launch.generate_data --config.reader=DIR` lets this one
answer instead, and `configs/eval_qa.py` takes it for the methods that read.
"""

from ml_collections import ConfigDict

from configs import d2l_niah
from hyperlora.errors import UserError


def get_config(records: str = '') -> ConfigDict:
    """The config for a folder of records.

    Raises:
      UserError: no records.
    """
    if not records:
        raise UserError('name the records: configs/reader.py:RECORDS')
    config = d2l_niah.get_config('smollm2')
    config.name = 'reader'
    config.hypernetwork = ConfigDict(
        {
            'name': 'lora_table',
            'modules': ('down_proj',),
            'shape': {'rank': 16, 'scaling': 2.0, 'entries': 1},
        }
    )
    config.objective = ConfigDict({'name': 'cross_entropy'})
    config.data = ConfigDict(
        {
            'name': 'readings',
            'records': records,
            'steps': config.optimizer.get_ref('steps'),
            'row_tokens': 384,
            'row_labels': 48,
        }
    )
    config.groups = 4
    config.optimizer.update(
        {
            'learning_rate': 5e-4,
            'end_learning_rate': 5e-6,
            'warmup_steps': 10,
            'steps': 200,
        }
    )
    config.checkpoint_every = 25
    return config
