"""Text tasks: Text-to-LoRA beside its baselines and controls.

python -m launch.evaluate --config=configs/eval_t2l.py --checkpoint=NAME_OR_DIR --workdir=DIR
... --config.tasks=FOLDER --config.generated=0 --config.methods=t2l,zero_shot --config.limit=50
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            'name': 'eval_t2l',
            # A folder of tasks, a JSON file each; none need be known to the checkpoint.
            'tasks': '',
            'generated': True,  # also the generated tasks
            'only_held_out': False,  # of those, the ones that the checkpoint's training left out
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
            'limit': 0,  # test examples per task; 0 for all
            'seeds': 3,  # of descriptions
            # YAML: task name -> list of descriptions, for tasks that have none.
            'descriptions': '',
            'max_new_tokens': 24,
        }
    )
