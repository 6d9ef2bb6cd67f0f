"""Questions about documents: Doc-to-LoRA beside its alternatives and controls.

python -m launch.evaluate --config=configs/eval_qa.py --checkpoint=NAME_OR_DIR --workdir=DIR \\
    --config.data=squad,FILE
... --config.data=jsonl,FILE --config.methods=d2l,in_context --config.limit=50
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'name': 'eval_qa',
            # READER,PATH as for configs/documents.py, a .json (SQuAD's layout) or .jsonl file, or
            # the name of a TFDS data set; see `documents.source` for splits.
            'data': '',
            'methods': (
                'no_context',
                'in_context',
                'retrieval',
                'd2l',
                'd2l_other',
            ),
            'limit': 0,  # documents, the first ones; 0 for all
            'questions': 0,  # of each document; 0 for all
            'max_new_tokens': 24,
            # Weights of configs/reader.py: the LoRA that reads documents in the prompt, answers
            # without any, and teaches the methods that distil.
            'reader': '',
            'truncated_tokens': 64,  # of `truncated`
            'retrieved_tokens': 64,  # a chunk of `retrieval`
            # Of the methods that train: questions that the model asks itself, numbers of steps at
            # which answers are scored, and their LoRA.
            'generated_questions': 5,
            'steps': (100,),
            'rank': 8,
            'scaling': 2.0,
            'learning_rate': 1e-3,
            'query_tokens': 128,
            'answer_tokens': 64,  # of the answers that they train on; longer ones are left out
            # A key of `quantization.KINDS`; by default the one that the checkpoint names.
            'base_quantization': config_dict.placeholder(str),
        }
    )
