"""Several documents in one model: questions about each of them, and about others.

python -m launch.evaluate --config=configs/eval_composition.py --checkpoint=NAME_OR_DIR \\
    --workdir=DIR --config.data=squad,FILE
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'name': 'eval_composition',
            'data': '',  # as for configs/eval_qa.py
            'counts': (1, 2, 4, 8, 16),  # of documents in the model together
            'documents': 32,  # the first ones, all of which are in the model in turn
            'others': 8,  # documents that are only asked about, the last ones
            'questions': 4,  # of each document; 0 for all
            'limit': 0,  # documents, the first ones; 0 for all
            'max_new_tokens': 24,
            # A key of `quantization.KINDS`; by default the one that the checkpoint names.
            'base_quantization': config_dict.placeholder(str),
        }
    )
