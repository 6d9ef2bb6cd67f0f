"""Several processes, one per host, as one program: they start, agree and fail together.

With one process all of this does nothing. Processes talk through the key-value store of JAX's
coordination service, which is there before any device is.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
from etils import epath

# The client of the coordination service has no public name; Orbax finds it here too.
from jax._src import distributed

from hyperlora.errors import Outage, UserError

# Seconds until a file that one host wrote must be seen by the others (NFS caches directories).
VISIBLE_AFTER = 60.0

_LONGEST_WAIT = 30 * 24 * 3600  # seconds between the first process's end and the last one's
_FAILURE = 'hyperlora/failure'
_TOKEN = '.shared'

_names = [socket.gethostname()]
_timeout = 300
_exchanges = itertools.count()
_watch_ends = threading.Event()
_ending = threading.Lock()


def initialize(
    address: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Joins the other processes. Must come before anything that asks JAX for its devices.

    Args:
      address: host:port of process 0; like the next two None where JAX finds it out (Cloud TPU,
        Slurm, Open MPI).
      num_processes, process_id: how many there are, and which of them this one is.
      timeout: seconds to wait for the others. Past them the process ends with 1: JAX's own
        time-out aborts it without a chance to say why.

    Raises:
      UserError: there is no cluster to join, or the numbers make no sense.
    """
    global _names, _timeout
    _timeout = timeout
    alarm = threading.Timer(timeout, _give_up, (timeout,))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=timeout + 60,
            # At exit the first one waits for all others, which may have hours of work left. Dead
            # ones are noticed earlier: their heartbeats stop.
            shutdown_timeout_seconds=_LONGEST_WAIT,
        )
    except (ValueError, RuntimeError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'cannot start as one of several processes ({reason}): where no cluster is detected, '
            'give --coordinator_address=HOST:PORT, --num_processes and --process_id'
        ) from error
    finally:
        alarm.cancel()
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()
    # At exit JAX waits for the others; a thread that is in a call of it would crash there.
    atexit.register(lambda: (_watch_ends.set(), watch.join()))
    _names = exchange(_names[0])


def is_first() -> bool:
    """Whether this is the process that prints and writes metrics."""
    return jax.process_index() == 0


def name(process: int | None = None) -> str:
    """What messages call a process; None for this one."""
    process = jax.process_index() if process is None else process
    return f'host {process} ({_names[process]})'


def exchange(value: str) -> list[str]:
    """The values of all processes, in their order. All must call it, and equally often.

    Raises:
      Outage: one did not within the time-out of `initialize`.
    """
    client = distributed.global_state.client
    if client is None:
        return [value]
    key = f'hyperlora/exchange/{next(_exchanges)}'
    client.key_value_set(f'{key}/{distributed.global_state.process_id}', value)
    count = distributed.global_state.num_processes
    try:
        client.wait_at_barrier(key, _timeout * 1000)
    except jax.errors.JaxRuntimeError as error:
        came = {int(key.rsplit('/', 1)[1]) for key, _ in client.key_value_dir_get(key)}
        missing = ', '.join(f'host {i}' for i in range(count) if i not in came)
        raise Outage(
            f'waited {_timeout} s for {missing or "the other hosts"}: see the logs there'
        ) from error
    values = {int(key.rsplit('/', 1)[1]): value for key, value in client.key_value_dir_get(key)}
    return [values[i] for i in range(count)]


def check_agreement(record: Mapping[str, Any]) -> None:
    """Checks that all processes were started alike.

    Args:
      record: what they must agree on, JSON-serialisable and possibly nested, such as the config.
        The program's source and the version of JAX are compared as well.

    Raises:
      UserError: one differs from the first; the message names it and what differs.
    """
    if jax.process_count() == 1:
        return
    mine = flax.traverse_util.flatten_dict(json.loads(json.dumps(record)), sep='.')
    mine |= {'the source code': _code(), 'the version of jax': importlib.metadata.version('jax')}
    # Only the first one's record travels whole: there may be hundreds of hosts.
    wanted = json.loads(exchange(json.dumps(mine) if is_first() else '')[0])
    absent = 'absent'
    differences = [
        f'{key} ({mine.get(key, absent)} instead of {wanted.get(key, absent)})'
        for key in sorted(mine.keys() | wanted.keys())
        if mine.get(key, absent) != wanted.get(key, absent)
    ]
    for process, found in enumerate(exchange(', '.join(differences[:5]))):
        if found:
            raise UserError(
                f'{name(process)} differs from {name(0)} in {found}: start all hosts from the '
                'same commit with the same flags'
            )


def check_shared(directory: epath.PathLike) -> None:
    """Checks that all processes see one and the same directory.

    Raises:
      UserError: one does not see what the first wrote there, or the first cannot write (Outage if
        it is a bucket).
    """
    if jax.process_count() == 1:
        return
    path = epath.Path(directory) / _TOKEN
    token = secrets.token_hex(8) if is_first() else ''
    if token:
        try:
            path.write_text(token)
        except OSError as error:
            kind = Outage if '://' in str(directory) else UserError
            raise kind(f'{name()} cannot write to {directory} ({error})') from error
    token = exchange(token)[0]
    deadline = time.monotonic() + VISIBLE_AFTER
    while not (seen := _holds(path, token)) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [i for i, answer in enumerate(exchange(str(seen))) if answer != 'True']
    if is_first():
        path.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f'{directory} is not shared: {", ".join(map(name, blind))} cannot see there what '
            f'{name(0)} wrote. Use a folder on a disk that all hosts mount (of a training, a gs:// '
            'URL will do too)'
        )


def fail(message: str, code: int) -> None:
    """Ends this process with an exit code, and all others with it: they would wait for it forever.

    The others print the message and end with the same code; see `_watch`.
    """
    client = distributed.global_state.client
    if client is None:  # it never joined
        os._exit(code)
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # `_watch` is about to end the process
    if name() not in message:
        message = f'{name()}: {message}'
    try:
        client.key_value_set(_FAILURE, json.dumps([code, message]))
    except jax.errors.JaxRuntimeError:
        pass  # another was first
    _end(code)


def _watch() -> None:
    """Waits in a thread for another process to fail: the main thread may hang in a collective."""
    while not _watch_ends.wait(1.0):
        try:
            code, message = json.loads(distributed.global_state.client.key_value_try_get(_FAILURE))
            break
        except jax.errors.JaxRuntimeError:
            pass  # none has failed
    else:
        return
    if _ending.acquire(blocking=False):
        print('error:', message, file=sys.stderr)
        _end(code)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        distributed.global_state.client.wait_at_barrier('hyperlora/end', 10_000)
        if distributed.global_state.process_id == 0:
            time.sleep(1)  # it is the server: the others must be told that all are here
    except jax.errors.JaxRuntimeError:
        pass  # one is dead already
    os._exit(code)  # the regular end would wait for the others


def _give_up(timeout: int) -> None:
    state = distributed.global_state
    who = f'process {state.process_id} on {_names[0]}'
    if state.coordinator_address is None:
        reason = 'to learn from the cluster where process 0 is'
    elif state.process_id and not _answers(state.coordinator_address):
        reason = f'for process 0 at {state.coordinator_address}, where nothing answers'
    else:
        reason = (
            f'for all {state.num_processes or "the"} processes to join at '
            f'{state.coordinator_address}; at least one never came'
        )
    print(
        f'error: {who} waited {timeout} s {reason}. See that every process runs and was given the '
        'same address and number of processes, and that the network lets the port through',
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # as after an Outage: hosts may only be late


def _answers(address: str) -> bool:
    host, port = address.rsplit(':', 1)
    try:
        socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _holds(path: epath.Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def _code() -> str:
    """A digest of the program's source, and of the words and templates it makes data of."""
    root = pathlib.Path(__file__).parents[1]
    found = hashlib.blake2b(digest_size=8)
    for package in ('hyperlora', 'd2l', 't2l', 'launch'):
        for path in sorted((root / package).rglob('*')):
            if path.suffix in ('.py', '.yaml'):
                found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()
