"""Checkpoints: exact resume, kills, damage, foreign and changed runs; exports."""

import os
import shutil
import signal
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hyperlora import checkpointing
from hyperlora.errors import UserError

META = {
    'base_fingerprint': 'aaa',
    'encoder_fingerprint': 'aaa',
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


def _iterator():
    return iter(grain.MapDataset.range(100).seed(3).shuffle().to_iter_dataset())


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints of steps 2 and 4, and the value that follows step 4."""
    checkpointer = checkpointing.Checkpointer(tmp_path / 'run', every=2, keep=2)
    iterator = _iterator()
    for step in range(1, 5):
        next(iterator)
        checkpointer.save(step, _state(), iterator, META)
    checkpointer.close()
    return tmp_path / 'run', next(iterator)


def _open(directory):
    return checkpointing.Checkpointer(directory, every=2, keep=2)


def test_resume_gives_back_state_and_data_order(saved):
    directory, following = saved
    checkpointer, iterator = _open(directory), _iterator()
    assert checkpointer.latest_step() == 4
    checkpointing.check_meta(checkpointer.meta(4), META)
    state = checkpointer.restore(4, _abstract(_state()), iterator)
    jax.tree.map(np.testing.assert_array_equal, state, _state())
    assert jax.tree.structure(state) == jax.tree.structure(_state())
    assert next(iterator) == following
    checkpointer.close()


def test_restore_uses_the_shardings_asked_for(saved):
    mesh = jax.make_mesh((len(jax.devices()),), ('x',))
    sharding = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _state()
    )
    checkpointer = _open(saved[0])
    state = checkpointer.restore(4, abstract, _iterator())
    assert state['params']['w'].sharding == sharding
    checkpointer.close()


def test_interval_force_and_keep(tmp_path):
    checkpointer, iterator = _open(tmp_path / 'run'), _iterator()
    assert checkpointer.latest_step() is None
    due = [checkpointer.save(step, _state(), iterator, META) for step in range(1, 7)]
    assert due == [False, True] * 3
    assert checkpointer.save(7, _state(), iterator, META, force=True)
    checkpointer.wait()
    assert not checkpointer.save(7, _state(), iterator, META, force=True)
    assert not checkpointer.reached_preemption(7)
    checkpointer.close()
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {'6', '7'}


_KILLED = """
import os, signal, sys
import grain, jax.numpy as jnp
from hyperlora import checkpointing

class Deadly(grain.DatasetIterator):
    def __next__(self): raise StopIteration
    def set_state(self, state): pass
    def get_state(self): os.kill(os.getpid(), signal.SIGKILL)

iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
checkpointer = checkpointing.Checkpointer(sys.argv[1], every=1, keep=2)
checkpointer.save(1, {'w': jnp.ones(4)}, iterator, {})
checkpointer.wait()
checkpointer.save(2, {'w': jnp.ones(4)}, Deadly(), {})
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
    iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
    checkpointer.restore(1, _abstract(state), iterator)
    assert checkpointer.save(2, state, iterator, META)
    checkpointer.close()
    assert {path.name for path in directory.iterdir()} == {'1', '2'}


def _truncate_arrays(step):
    path = max((p for p in step.rglob('d/*') if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])


def _truncate_iterator(step):
    (step / 'data' / 'process_0-of-1.json').write_text('{')


def _remove_arrays(step):
    shutil.rmtree(step / 'state')


@pytest.mark.parametrize('damage', [_truncate_arrays, _truncate_iterator, _remove_arrays])
def test_damage_is_named_and_the_step_before_remains(saved, damage):
    directory, _ = saved
    damage(directory / '4')
    checkpointer = _open(directory)
    with pytest.raises(UserError, match=f'step 4 of {directory}.*delete {directory}/4'):
        checkpointer.restore(4, _abstract(_state()), _iterator())
    checkpointer.close()
    shutil.rmtree(directory / '4')
    checkpointer = _open(directory)
    assert checkpointer.latest_step() == 2
    checkpointer.restore(2, _abstract(_state()), _iterator())
    checkpointer.close()


def test_damaged_and_foreign_records(saved):
    directory, _ = saved
    (directory / '4' / 'meta' / 'metadata').write_text('{')
    checkpointer = _open(directory)
    with pytest.raises(UserError, match='step 4'):
        checkpointer.meta(4)
    checkpointer.close()
    with pytest.raises(UserError, match='not written by this program'):
        checkpointing.check_meta({'epoch': 1}, META)


def test_a_foreign_directory_is_refused_or_ignored(tmp_path):
    foreign = tmp_path / 'run' / '12'
    foreign.mkdir(parents=True)
    (foreign / 'model.bin').write_bytes(b'hello')
    checkpointer = _open(tmp_path / 'run')
    step = checkpointer.latest_step()
    if step is not None:
        with pytest.raises(UserError, match='step 12'):
            checkpointer.meta(step)
    checkpointer.close()
    assert (foreign / 'model.bin').exists()


@pytest.mark.parametrize('change', ['extra', 'shape'])
def test_another_model_is_refused(saved, change):
    state = _state()
    if change == 'extra':
        state['extra'] = jnp.ones(3)
    else:
        state['params']['w'] = jnp.ones((32, 64))
    checkpointer = _open(saved[0])
    with pytest.raises(UserError, match='another model'):
        checkpointer.restore(4, _abstract(state), _iterator())
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


def test_export_round_trip(tmp_path):
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


def test_export_keeps_files_that_are_not_its_own(tmp_path):
    (tmp_path / 'thesis.txt').touch()
    with pytest.raises(UserError, match='other files'):
        checkpointing.export(tmp_path, {'w': jnp.ones(2)}, {})
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='file'):
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
