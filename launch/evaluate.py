"""Evaluates a trained hypernetwork.

    python -m launch.evaluate --config=configs/eval_niah.py --checkpoint=NAME_OR_DIR --workdir=DIR

Writes metrics.json and plots to the workdir, the plots also for TensorBoard. The same command
continues an evaluation that was interrupted.
"""

import importlib

from absl import flags
from ml_collections import config_flags

from hyperlora.errors import UserError
from hyperlora.evaluation import plots
from launch import cli

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Evaluation.', lock_config=True)
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'Shipped weights or a folder; default: the shipped weights for it.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of results.')
flags.mark_flags_as_required(['config', 'workdir'])

# By config.name: the module of `evaluate(config, checkpoint, workdir)`, and the shipped weights.
_EVALUATIONS = {
    'eval_composition': ('d2l.composition', 'smollm2-docs'),
    'eval_images': ('d2l.image_qa', 'smollm2-images'),
    'eval_niah': ('d2l.niah_evaluation', 'smollm2-niah'),
    'eval_qa': ('d2l.qa', 'smollm2-docs'),
    'eval_t2l': ('t2l.evaluation', 'smollm2-t2l'),
}


def main(_):
    config = _CONFIG.value
    name = config.get('name')
    if name not in _EVALUATIONS:
        raise UserError(f'{name!r} is not an evaluation; known: {", ".join(_EVALUATIONS)}')
    workdir = cli.writable_directory(_WORKDIR.value)
    module, shipped = _EVALUATIONS[name]
    checkpoint = _CHECKPOINT.value or shipped
    importlib.import_module(module).evaluate(config, checkpoint, workdir)
    plots.to_tensorboard(workdir)


if __name__ == '__main__':
    cli.run(main)
