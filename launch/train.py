"""Meta-trains a hypernetwork.

    python -m launch.train --config=configs/NAME.py:VARIANT --workdir=DIR [--config.KEY=VALUE ...]

The same command continues a run that was interrupted. The workdir receives checkpoints/,
metrics.jsonl and TensorBoard events.
"""

from absl import flags
from ml_collections import config_flags

from launch import cli

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Experiment.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of checkpoints and metrics.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(_):
    workdir = cli.writable_directory(_WORKDIR.value).resolve()
    from hyperlora import meta_learning

    meta_learning.train(_CONFIG.value, str(workdir))


if __name__ == '__main__':
    cli.run(main)
