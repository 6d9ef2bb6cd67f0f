"""Checkpoints of a training run, and the export of trained weights."""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import textwrap

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from etils import epath
from orbax.checkpoint import checkpoint_managers, multihost

from hyperlora import hosts
from hyperlora.errors import Outage, UserError

# Settings that may differ when a run resumes: they do not change what it computes. Places of models
# may, as fingerprints tell models apart. What spreads a step over devices and microbatches may, as
# long as `rows_per_step` of the record stays.
HARMLESS_SETTINGS = ('checkpoint_every', 'keep_checkpoints', 'log_every', 'remat', 'topology')
PLACES = ('base', 'hypernetwork.embedder', 'hypernetwork.encoder.model')
_SPREAD = ('mesh', 'rules', 'groups', 'accumulate')

_PARAMS = 'params.safetensors'
_CONFIG = 'config.json'
_DTYPES = {'BF16': jnp.bfloat16, 'F16': np.float16, 'F32': np.float32}


class Checkpointer:
    """Asynchronous checkpoints of the train state and a JSON record.

    All processes of a run save together, each its part of the arrays, into one directory. Where the
    data stand follows from the step. A save that a crash or a full disk cut short is ignored and
    cleared away.

    Where a method raises UserError as the disk does not do what it should, it raises Outage if the
    directory is a URL.

    Args:
      directory: absolute path or gs:// URL of the checkpoints (gs:// needs the `gcs` extra).
      keep: how many of the latest checkpoints to keep.
    """

    def __init__(self, directory, keep: int):
        self._directory = epath.Path(directory)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep),
                cleanup_tmp_directories=True,
                single_host_load_and_broadcast=True,  # they agree about the latest step
                async_options=ocp.AsyncOptions(barrier_sync_fn=_meet),
            ),
        )

    def save(self, step: int, state, meta: dict) -> None:
        """Starts saving. The state may be used at once: arrays are copied before this returns.

        Args:
          step: number of steps done.
          state: pytree of arrays.
          meta: JSON record, see `check_meta`.

        Raises:
          UserError: this or the save before cannot be written.
        """
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                force=True,  # whatever Orbax's policy says
            )

    def latest_step(self) -> int | None:
        """The latest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether the processes agreed to stop at `step`, one of them having been sent SIGTERM.

        They must ask at every step. One process alone never agrees.
        """
        return self._manager.reached_preemption(step)

    def meta(self, step: int) -> dict:
        """The JSON record saved with `step`; UserError if the checkpoint is damaged or foreign."""
        with _explained(self._directory, step):
            args = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)['meta']

    def restore(self, step: int, abstract_state):
        """Restores the state of `step`.

        Args:
          step: a saved step. Call `check_meta(self.meta(step), ...)` first.
          abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings, which may differ from
            the saved ones: arrays are resharded.

        Returns:
          The state, a pytree like `abstract_state`.

        Raises:
          UserError: the checkpoint is damaged, foreign, or its tree or shapes differ.
        """
        with _explained(self._directory, step):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            return self._manager.restore(step, args=args)['state']

    def wait(self):
        """Blocks until the save in progress is complete; UserError if it cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self):
        """As `wait`, and releases the threads."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        # A full disk surfaces as an OSError or as what tensorstore makes of it, often in a later
        # call, as the writing is asynchronous.
        except Exception as error:
            what = f'{hosts.name()} cannot write a checkpoint to {self._directory}'
            if _remote(self._directory):
                raise Outage(
                    f'{what} ({_reason(error)}); those before are intact: start again to continue'
                ) from error
            steps = _steps(self._directory)
            last = f'the checkpoint of step {max(steps)}' if steps else 'no checkpoint before it'
            raise UserError(
                f'{what} ({_reason(error)}); {last} is intact. Make room there, then start again '
                'to continue from it'
            ) from error


def load_params(directory) -> tuple[dict, dict]:
    """The trained parameters and the record of the latest checkpoint, read-only.

    A training that is writing there at the same time is not disturbed.

    Args:
      directory: path or gs:// URL of the checkpoints of a training.

    Returns:
      params: nested dict of numpy arrays, without optimiser state.
      meta: the JSON record, see `check_meta`, and the 'step'.

    Raises:
      UserError: there is no complete checkpoint yet, or it is damaged or foreign.
    """
    directory = epath.Path(directory)
    steps = _steps(directory)
    if not steps:
        raise UserError(f'{directory} holds no complete checkpoint yet; train longer')
    folder = directory / str(max(steps))
    with _explained(directory, max(steps)):
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(folder / 'state').tree
        wanted = {'params': jax.tree.map(lambda _: 0, tree['params'])}
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        restored = handler.restore(
            folder / 'state',
            args=ocp.args.PyTreeRestore(item=wanted, restore_args=numpy, partial_restore=True),
        )
        meta = json.loads((folder / 'meta' / 'metadata').read_text())
    return restored['params'], {**meta, 'step': max(steps)}


def _meet(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes, but not if this one has failed to write.

    Orbax meets even then before it shows the error, but the others are still waiting for the write.
    """
    if sys.exception() is None:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _steps(directory: epath.Path) -> list[int]:
    """The complete checkpoints."""
    found = directory.iterdir() if directory.is_dir() else ()
    return [
        int(path.name)
        for path in found
        # On gs:// one in the making has its name from the start, but lacks the mark of success.
        if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
    ]


@contextlib.contextmanager
def _explained(directory, step):
    try:
        yield
    # Damage surfaces as whatever Orbax, tensorstore, JSON or grain stumbles on.
    except Exception as error:
        raise (Outage if _remote(directory) else UserError)(
            f'cannot restore step {step} of {directory}: if it is damaged, delete '
            f'{directory / str(step)} to fall back to the checkpoint before; if it was '
            'written by another model, resume with that or use another workdir '
            f'(reason: {_reason(error)})'
        ) from error


def _remote(directory: epath.Path) -> bool:
    return '://' in str(directory)


def _reason(error: Exception) -> str:
    return ' '.join(str(error).split())[:300] or type(error).__name__


def check_meta(saved: dict, current: dict):
    """Checks that a checkpoint belongs to this run.

    Args:
      saved: record from `Checkpointer.meta`.
      current: record of this run, with the fingerprints of base model and encoder (str) and
        'config' (nested dict). Settings named in HARMLESS_SETTINGS may differ; so may the places
        of models, the number of devices and what spreads a step over them, if 'rows_per_step'
        (int) stays.

    Raises:
      UserError: another base model or encoder, or changed settings.
    """
    check_models(saved, current)
    rows = current['rows_per_step']
    if saved.get('rows_per_step', rows) != rows:
        raise UserError(
            f'a step of the checkpoint has {saved["rows_per_step"]} packed rows, one of this run '
            f'{rows} (data shards of the mesh x groups x accumulate): choose --config.groups or '
            '--config.accumulate so that they agree'
        )
    old, new = _settings(saved['config']), _settings(current['config'])

    def value(settings: dict, key: str) -> str:
        return textwrap.shorten(str(settings.get(key, 'absent')), 80, placeholder=' ...')

    changes = [
        f'{key}: {value(old, key)} -> {value(new, key)}'
        for key in sorted(old.keys() | new.keys())
        if old.get(key, 'absent') != new.get(key, 'absent')
    ]
    if changes:
        shown = ', '.join(changes[:5]) + (f' and {len(changes) - 5} more' if changes[5:] else '')
        raise UserError(
            f'settings differ from those of the checkpoint ({shown}): '
            'use another workdir or the old settings'
        )


def check_models(saved: dict, current: dict):
    """Checks that a checkpoint is for the base model and the encoder of this run; see `check_meta`.

    Raises:
      UserError: it is not.
    """
    missing = {'config', 'base_fingerprint', 'encoder_fingerprint'} - saved.keys()
    if missing:
        raise UserError(
            f'the checkpoint has no {" and ".join(sorted(missing))}: it was not written by this '
            'program; use another workdir'
        )
    for key, name in (('base_fingerprint', 'base model'), ('encoder_fingerprint', 'encoder')):
        if saved[key] != current[key]:
            raise UserError(
                f'the checkpoint was trained with the {name} {saved[key]}, this run uses '
                f'{current[key]}: use another workdir or the old {name}'
            )


def export(directory, params, config: dict, dtype: str = 'bfloat16'):
    """Writes trained weights for shipping: safetensors and a JSON config.

    Both appear at once, by renaming a directory; an earlier export there is replaced.

    Args:
      directory: local path to write to.
      params: nested dict of arrays that this process can read in full.
      config: what is needed to rebuild the model, JSON-serialisable.
      dtype: of the weights in the file.

    Raises:
      UserError: `directory` holds something else, or cannot be written.
    """
    directory = pathlib.Path(directory)
    flat = flax.traverse_util.flatten_dict(params, sep='/')
    # order='C', as safetensors writes the raw buffer and would ignore strides.
    tensors = {
        name: np.asarray(jax.device_get(value)).astype(jnp.dtype(dtype), order='C')
        for name, value in flat.items()
    }
    try:
        if directory.exists() and {p.name for p in directory.iterdir()} - {_PARAMS, _CONFIG}:
            raise UserError(f'{directory}: holds other files than an export, choose another place')
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f'.{directory.name}.') as tmp:
            new = pathlib.Path(tmp, 'new')
            new.mkdir()
            # Not save_file, whose files only their owner can read.
            (new / _PARAMS).write_bytes(safetensors.numpy.save(tensors))
            (new / _CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
            if directory.exists():
                shutil.move(directory, pathlib.Path(tmp, 'old'))
            os.rename(new, directory)
    except OSError as error:
        raise UserError(f'{directory}: cannot write the export ({error.strerror})') from error


def load_export(directory) -> tuple[dict, dict]:
    """Reads what `export` wrote.

    Args:
      directory: path or gs:// URL.

    Returns:
      params: nested dict of float32 numpy arrays.
      config: the dict given to `export`.

    Raises:
      UserError: a file is missing or damaged; the message names it.
    """
    path = epath.Path(directory) / _CONFIG
    try:
        config = json.loads(path.read_text(encoding='utf-8-sig'))
        path = path.with_name(_PARAMS)
        # Not load_file, which reads no URLs, nor numpy.load, which knows no bfloat16.
        flat = {
            name: np.frombuffer(x['data'], _DTYPES[x['dtype']]).reshape(x['shape'])
            for name, x in safetensors.deserialize(path.read_bytes())
        }
    except OSError as error:
        raise UserError(f'{path}: cannot read ({error.strerror or error})') from error
    # JSON errors are ValueErrors.
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f'{path}: damaged ({error})') from error
    flat = {name: value.astype(np.float32) for name, value in flat.items()}
    return flax.traverse_util.unflatten_dict(flat, sep='/'), config


def _settings(config):
    """The settings that matter, flat, as JSON gives them back (tuples become lists)."""
    flat = flax.traverse_util.flatten_dict(json.loads(json.dumps(config)), sep='.')
    return {
        key: value
        for key, value in flat.items()
        if key.split('.')[-1] not in HARMLESS_SETTINGS
        and key.split('.')[0] not in _SPREAD
        and key not in PLACES
    }
