"""Checkpoints: exact resume, kills, damage, foreign and changed runs; exports."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from hyperlora import checkpointing
from hyperlora.errors import Outage, UserError

META = {
    'base_fingerprint': 'aaa',
    'encoder_fingerprint': 'aaa',
    'rows_per_step': 4,
    'config': {'rank': 8, 'model': {'shape': (1, 2)}, 'log_every': 1},
}


def _state():
    params = {'w': jax.random.normal(jax.random.key(0), (64, 64)), 'b': jnp.arange(8.0)}
    opt_state = optax.adam(1e-3).init(params)
    return {'params': params, 'opt_state': opt_state, 'step': jnp.int32(7)}


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints of steps 2 and 4."""
    checkpointer = checkpointing.Checkpointer(tmp_path / 'run', keep=2)
    for step in (2, 4):
        checkpointer.save(step, _state(), META)
    checkpointer.close()
    return tmp_path / 'run'


def _open(directory):
    return checkpointing.Checkpointer(directory, keep=2)


def test_resume_gives_back_the_state(saved):
    checkpointer = _open(saved)
    assert checkpointer.latest_step() == 4
    checkpointing.check_meta(checkpointer.meta(4), META)
    state = checkpointer.restore(4, _abstract(_state()))
    jax.tree.map(np.testing.assert_array_equal, state, _state())
    assert jax.tree.structure(state) == jax.tree.structure(_state())
    checkpointer.close()


def test_restore_uses_the_shardings_asked_for(saved):
    mesh = jax.make_mesh((len(jax.devices()),), ('x',))
    sharding = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _state()
    )
    checkpointer = _open(saved)
    state = checkpointer.restore(4, abstract)
    assert state['params']['w'].sharding == sharding
    checkpointer.close()


def test_the_latest_are_kept(tmp_path):
    checkpointer = _open(tmp_path / 'run')
    assert checkpointer.latest_step() is None
    for step in (2, 4, 6, 7):
        checkpointer.save(step, _state(), META)
    checkpointer.wait()
    assert not checkpointer.reached_preemption(7)
    checkpointer.close()
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {'6', '7'}


_KILLED = """
import os, signal, sys
import jax.numpy as jnp
from hyperlora import checkpointing

class Deadly(dict):
    def items(self): os.kill(os.getpid(), signal.SIGKILL)

checkpointer = checkpointing.Checkpointer(sys.argv[1], keep=2)
checkpointer.save(1, {'w': jnp.ones(4)}, {})
checkpointer.wait()
checkpointer.save(2, {'w': jnp.ones(4)}, Deadly(a=1))
checkpointer.wait()
"""


def test_a_save_cut_short_by_kill_9_is_ignored(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    directory = tmp_path / 'run'
    killed = subprocess.run(
        [sys.executable, '-c', _KILLED, str(directory)],
        env={**os.environ, 'PYTHONPATH': root, 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(directory.iterdir())) == 2  # The kill did come in the middle of the save.
    checkpointer, state = _open(directory), {'w': jnp.ones(4)}
    assert checkpointer.latest_step() == 1
    checkpointer.restore(1, _abstract(state))
    checkpointer.save(2, state, META)
    checkpointer.close()
    assert {path.name for path in directory.iterdir()} == {'1', '2'}


def _truncate_arrays(step):
    path = max((p for p in step.rglob('d/*') if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])


def _remove_arrays(step):
    shutil.rmtree(step / 'state')


@pytest.mark.parametrize('damage', [_truncate_arrays, _remove_arrays])
def test_damage_is_named_and_the_step_before_remains(saved, damage):
    directory = saved
    damage(directory / '4')
    checkpointer = _open(directory)
    with pytest.raises(UserError, match=f'step 4 of {directory}.*delete {directory}/4'):
        checkpointer.restore(4, _abstract(_state()))
    checkpointer.close()
    shutil.rmtree(directory / '4')
    checkpointer = _open(directory)
    assert checkpointer.latest_step() == 2
    checkpointer.restore(2, _abstract(_state()))
    checkpointer.close()


@contextlib.contextmanager
def _full_disk():
    """No file may grow past 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _save_on_a_full_disk(directory):
    checkpointer = _open(directory)
    with _full_disk():
        checkpointer.save(6, _state(), META)
        checkpointer.wait()


def test_a_full_disk_is_named_and_the_checkpoint_before_remains(saved):
    # In a process of its own, as in a run: what is still being written ends with it.
    one = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
    with one, pytest.raises(UserError) as error:
        one.submit(_save_on_a_full_disk, saved).result()
    message = str(error.value)
    assert re.search(f'host 0 .* cannot write a checkpoint to {saved} .*step 4 is intact', message)
    checkpointer = _open(saved)
    assert checkpointer.latest_step() == 4
    jax.tree.map(
        np.testing.assert_array_equal, checkpointer.restore(4, _abstract(_state())), _state()
    )
    checkpointer.save(6, _state(), META)
    checkpointer.close()
    assert {path.name for path in saved.iterdir()} == {'4', '6'}


def test_a_bucket_that_fails_may_work_again(saved, monkeypatch):
    """Exit code 2 would tell launchers that no restart helps."""
    checkpointer = _open(saved)
    checkpointer.close()

    def fail(*_, **__):
        raise OSError('503 from the bucket')

    monkeypatch.setattr(checkpointer._manager, 'save', fail)
    monkeypatch.setattr(checkpointer._manager, 'restore', fail)
    with pytest.raises(UserError, match='step 4 is intact. Make room there'):
        checkpointer.save(6, {}, META)
    monkeypatch.setattr(checkpointer, '_directory', epath.Path('gs://bucket/run'))
    with pytest.raises(Outage, match='cannot write .*gs://bucket/run .503 from .* start again'):
        checkpointer.save(6, {}, META)
    with pytest.raises(Outage, match='cannot restore step 4 of gs://bucket/run'):
        checkpointer.restore(4, {})


def test_a_step_keeps_its_rows_however_they_are_spread():
    spread = {'groups': 2, 'accumulate': 1, 'mesh': {'data': 1, 'fsdp': -1}}
    other = {'groups': 1, 'accumulate': 4, 'mesh': {'data': 1, 'fsdp': 1}}
    saved = {**META, 'config': {**META['config'], **spread}}
    current = {**META, 'config': {**META['config'], **other}}
    checkpointing.check_meta(saved, current)
    with pytest.raises(UserError, match='4 packed rows, one of this run 8.*accumulate'):
        checkpointing.check_meta(saved, {**current, 'rows_per_step': 8})


def test_damaged_and_foreign_records(saved):
    directory = saved
    (directory / '4' / 'meta' / 'metadata').write_text('{')
    checkpointer = _open(directory)
    with pytest.raises(UserError, match='step 4'):
        checkpointer.meta(4)
    checkpointer.close()
    with pytest.raises(UserError, match='not written by this program'):
        checkpointing.check_meta({'epoch': 1}, META)


def test_a_foreign_directory_is_refused(tmp_path):
    foreign = tmp_path / 'run' / '12'
    foreign.mkdir(parents=True)
    (foreign / 'model.bin').write_bytes(b'hello')
    checkpointer = _open(tmp_path / 'run')
    assert checkpointer.latest_step() == 12
    with pytest.raises(UserError, match='step 12'):
        checkpointer.meta(12)
    checkpointer.close()
    assert (foreign / 'model.bin').exists()


@pytest.mark.parametrize(
    'change, reason', [('extra', '.*extra'), ('shape', r'.*\(32, 64\)')], ids=['extra', 'shape']
)
def test_another_model_is_refused(saved, change, reason):
    state = _state()
    if change == 'extra':
        state['extra'] = jnp.ones(3)
    else:
        state['params']['w'] = jnp.ones((32, 64))
    checkpointer = _open(saved)
    with pytest.raises(UserError, match=f'another model.*reason: {reason}'):
        checkpointer.restore(4, _abstract(state))
    checkpointer.close()


def test_check_meta():
    saved = {**META, 'config': {'rank': 8, 'model': {'shape': [1, 2]}}}
    checkpointing.check_meta(saved, META)
    for key, name in (('base_fingerprint', 'base model'), ('encoder_fingerprint', 'encoder')):
        with pytest.raises(UserError, match=f'{name} aaa.*bbb'):
            checkpointing.check_meta(saved, {**META, key: 'bbb'})
    changed = {**META, 'config': {'rank': 4, 'model': {'shape': (1, 3)}}}
    with pytest.raises(UserError, match=r'shape: \[1, 2\] -> \[1, 3\], rank: 8 -> 4.*workdir'):
        checkpointing.check_meta(saved, changed)
    many = {**META, 'config': {str(i): i for i in range(9)}}
    with pytest.raises(UserError, match='0: absent -> 0, .* and 6 more'):
        checkpointing.check_meta(saved, many)


def test_export_round_trip(tmp_path, monkeypatch):
    params = {'a': {'w': jnp.linspace(0, 1, 12).reshape(3, 4), 't': np.arange(6.0).reshape(2, 3).T}}
    params['scale'] = jnp.float32(2.5)
    config = {'rank': 8, 'model': {'name': 'x'}}
    for _ in range(2):  # The second replaces the first.
        checkpointing.export(tmp_path / 'out', params, config)
    loaded, loaded_config = checkpointing.load_export(tmp_path / 'out')
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for value, original in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, jnp.asarray(original, jnp.bfloat16))
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    # A folder takes the place of a bucket.
    bucket = types.SimpleNamespace(Path=lambda url: tmp_path / url.removeprefix('gs://bucket/'))
    monkeypatch.setattr(checkpointing, 'epath', bucket)
    assert checkpointing.load_export('gs://bucket/out')[1] == config


def test_export_keeps_files_that_are_not_its_own(tmp_path):
    (tmp_path / 'thesis.txt').touch()
    with pytest.raises(UserError, match='other files'):
        checkpointing.export(tmp_path, {'w': jnp.ones(2)}, {})
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='file: cannot write the export .Not a directory'):
        checkpointing.export(tmp_path / 'file', {'w': jnp.ones(2)}, {})


@pytest.mark.parametrize('name', ['params.safetensors', 'config.json'])
def test_load_export_names_the_bad_file(tmp_path, name):
    out = tmp_path / 'out'
    checkpointing.export(out, {'w': jnp.ones((8, 8))}, {'rank': 8})
    path = out / name
    path.write_bytes(path.read_bytes()[:9])
    with pytest.raises(UserError, match=f'{name}: damaged'):
        checkpointing.load_export(out)
    path.unlink()
    with pytest.raises(UserError, match=f'{name}: cannot read'):
        checkpointing.load_export(out)
