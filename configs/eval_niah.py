"""Needle in a haystack by document length and needle depth.

python -m launch.evaluate --config=configs/eval_niah.py --checkpoint=NAME_OR_DIR --workdir=DIR
... --config.lengths=256,1024 --config.haystack=varied
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'name': 'eval_niah',
            # Document lengths in tokens; on the command line a list like 256,1024.
            'lengths': (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 40960, 131072),
            'examples': 100,  # per length
            'seed': 1_000_003,  # not that of a training
            # 'grass', 'varied', 'python_manual' or the path of a text or SQuAD-format JSON file.
            'haystack': 'grass',
            # Examples per length that the base model also answers with the document in its prompt;
            # few, because long prompts are slow. 0 leaves that out.
            'baseline_examples': 10,
            'max_new_tokens': 16,  # the base model answers in a sentence
            # A key of `quantization.KINDS`; by default the one that the checkpoint names.
            'base_quantization': config_dict.placeholder(str),
        }
    )
