"""Compiles an experiment's steps for TPUs that are not there: do they fit, how fast can they be?

    python -m launch.aot --config=configs/NAME.py:VARIANT [--topology=2*v5e:8x8] [--step=train]

Prints JSON; see `hyperlora.aot`. Needs libtpu (`pip install "hyperlora[tpu]"`), but no TPU and no
weights. Exits with 1 if a step does not fit.
"""

import json
import sys

from absl import flags
from ml_collections import config_flags

from launch import cli

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Experiment.', lock_config=True)
_TOPOLOGY = flags.DEFINE_string(
    'topology', None, "Such as v5e:8x8, or 2*v5e:8x8 for two slices; by default the config's."
)
_STEP = flags.DEFINE_enum(
    'step', 'all', ['all', 'train', 'internalize', 'generate'], 'What to compile.'
)
flags.mark_flag_as_required('config')


def main(_):
    import jax

    jax.config.update('jax_platforms', 'cpu')  # TPUs that are there are left alone
    jax.config.update('jax_enable_compilation_cache', False)  # cannot read such programs
    from hyperlora import aot

    steps = aot.STEPS if _STEP.value == 'all' else (_STEP.value,)
    report = aot.report(_CONFIG.value, _TOPOLOGY.value, steps)
    print(json.dumps(report, indent=2), flush=True)
    if not all(step['fits'] for step in report['steps'].values()):
        sys.exit(1)


if __name__ == '__main__':
    cli.run(main)
