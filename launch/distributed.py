"""Flags of the commands that can run as several processes, one per host.

On Cloud TPU and under Slurm `--distributed` alone does; elsewhere each process is told the address
of process 0, how many there are and which it is, by flags or by the environment.
"""

import contextlib
import os
import sys
import traceback

from absl import flags

from hyperlora.errors import UserError
from launch import cli

_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Run as one of several processes.')
_ADDRESS = flags.DEFINE_string(
    'coordinator_address',
    os.environ.get('JAX_COORDINATOR_ADDRESS'),
    'HOST:PORT of process 0; default $JAX_COORDINATOR_ADDRESS or detected.',
)
_COUNT = flags.DEFINE_integer(
    'num_processes',
    os.environ.get('JAX_NUM_PROCESSES'),
    'How many processes there are; default $JAX_NUM_PROCESSES or detected.',
)
_ID = flags.DEFINE_integer(
    'process_id',
    os.environ.get('JAX_PROCESS_ID'),
    'Which process this is, from 0; default $JAX_PROCESS_ID or detected.',
)
_TIMEOUT = flags.DEFINE_integer(
    'initialization_timeout', 300, 'Seconds to wait for the other processes.', lower_bound=1
)


@contextlib.contextmanager
def together():
    """The body runs as one of several processes if `--distributed` says so.

    If it fails in one of them, all end with the exit code of that one and its message.

    Raises:
      UserError: the processes cannot be joined, or they are told apart without `--distributed`.
    """
    if not _DISTRIBUTED.value:
        for flag in (_ADDRESS, _COUNT, _ID):
            if flag.present:
                raise UserError(f'--{flag.name} needs --distributed')
        yield
        return
    from hyperlora import hosts

    hosts.initialize(_ADDRESS.value, _COUNT.value, _ID.value, _TIMEOUT.value)
    try:
        yield
    except cli.EXPLAINED as error:
        message = cli.explained(error)
        print(f'error: {message}', file=sys.stderr)
        hosts.fail(message, cli.exit_code(error))
    except Exception as error:
        traceback.print_exc()
        hosts.fail(repr(error), 1)
