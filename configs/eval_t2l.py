"""Text tasks: Text-to-LoRA beside its baselines and controls.

python -m launch.evaluate --config=configs/eval_t2l.py --checkpoint=NAME_OR_DIR --workdir=DIR
... --config.tasks=FOLDER --config.generated=0 --config.methods=t2l,zero_shot --config.limit=50
... --config.per_task=WORKDIR --config.methods=t2l,per_task,average --config.only=seen
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'name': 'eval_t2l',
            # A folder of tasks, a JSON file each, none of which need be known to the checkpoint; or
            # READER,ARGUMENT of `t2l.collections`, such as natural_instructions,DIR or
            # benchmarks,boolq,piqa.
            'tasks': '',
            'generated': True,  # also the generated tasks
            'only': '',  # of those, the tasks that were `seen` in training, or the `unseen` ones
            'methods': (
                't2l',
                'zero_shot',
                'description_in_prompt',
                'three_shot',
                'other_description',
                'gibberish',
                'empty',
                'hyperdecoder',
            ),
            # Checkpoints of plain LoRAs (configs/t2l.py:multitask and :per_task), for the methods
            # `multitask`, `per_task` and `average`.
            'multitask': '',
            'per_task': '',
            'limit': 0,  # test examples per task; 0 for all
            'seeds': 3,  # of descriptions
            # YAML: task name -> list of descriptions, for tasks that have none.
            'descriptions': '',
            # A key of `quantization.KINDS`; by default the one that the checkpoint names.
            'base_quantization': config_dict.placeholder(str),
        }
    )
