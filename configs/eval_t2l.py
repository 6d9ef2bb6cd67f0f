"""Text tasks: Text-to-LoRA beside its baselines and controls.

python -m launch.evaluate --config=configs/eval_t2l.py --checkpoint=NAME_OR_DIR --workdir=DIR
... --config.tasks=FOLDER --config.generated=0 --config.methods=t2l,zero_shot --config.limit=50
... --config.per_task=WORKDIR --config.methods=t2l,per_task,average --config.only=seen
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'name': 'eval_t2l',
            # A folder of tasks, a JSON file each; none need be known to the checkpoint.
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
        }
    )
