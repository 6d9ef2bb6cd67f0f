"""Meta-trains a hypernetwork.

    python -m launch.train --config=configs/NAME.py:VARIANT --workdir=DIR [--config.KEY=VALUE ...]

The same command continues a run that was interrupted; one that was sent SIGTERM saves and exits
with 75. The workdir, a folder or a gs:// URL, receives checkpoints/, metrics.jsonl and TensorBoard
events. With --distributed this is one of several processes, one per host, and the workdir one that
they share; see launch/distributed.py.
"""

import sys

from absl import flags
from ml_collections import config_flags

from launch import cli, distributed

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Experiment.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder or gs:// URL of checkpoints and metrics.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(_):
    with distributed.together():
        workdir = cli.writable_folder(_WORKDIR.value)
        from hyperlora import meta_learning

        config = _CONFIG.value
        state = meta_learning.train(config, workdir)
    if state.step < config.optimizer.steps:
        sys.exit(cli.STOPPED)


if __name__ == '__main__':
    cli.run(main)
