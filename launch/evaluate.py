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
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'smollm2-niah', 'Shipped weights or a folder.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of results.')
flags.mark_flags_as_required(['config', 'workdir'])

# By config.name: a function (config, checkpoint, workdir).
_EVALUATIONS = {
    'eval_composition': 'd2l.composition:evaluate',
    'eval_images': 'd2l.image_qa:evaluate',
    'eval_niah': 'd2l.evaluation:evaluate',
    'eval_qa': 'd2l.qa:evaluate',
    'eval_t2l': 't2l.evaluation:evaluate',
}


def main(_):
    config = _CONFIG.value
    name = config.get('name')
    if name not in _EVALUATIONS:
        raise UserError(f'{name!r} is not an evaluation; known: {", ".join(_EVALUATIONS)}')
    workdir = cli.writable_directory(_WORKDIR.value)
    module, function = _EVALUATIONS[name].split(':')
    getattr(importlib.import_module(module), function)(config, _CHECKPOINT.value, workdir)
    plots.to_tensorboard(workdir)


if __name__ == '__main__':
    cli.run(main)
