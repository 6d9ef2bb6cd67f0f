"""Exit codes and one-line messages of the commands, and the file checks."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
from etils import epath

from hyperlora.errors import Outage, UserError
from launch import cli

_COMMAND = """
import sys
from absl import flags
from ml_collections import config_flags
from hyperlora.errors import Outage, UserError
from launch import cli

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_DO = flags.DEFINE_string('do', 'print', 'what to do')
flags.mark_flags_as_required(['config'])

def main(argv):
    if _DO.value == 'mistake':
        raise UserError('two\\nlines')
    if _DO.value == 'outage':
        raise Outage('no bucket')
    if _DO.value == 'extra':
        import package_of_an_extra
    if _DO.value == 'bug':
        raise ZeroDivisionError('a bug')
    if _DO.value == 'interrupt':
        raise KeyboardInterrupt
    print(_CONFIG.value.model.depth, __import__('jax').config.jax_compilation_cache_dir)

if __name__ == '__main__':
    cli.run(main)
"""

_CONFIG = """
import ml_collections
from hyperlora.errors import UserError

def get_config(variant=''):
    if variant == 'unknown':
        raise UserError("no variant 'unknown'")
    if variant == 'value':
        raise ValueError('bad variant')
    if variant.startswith('paths'):
        raise UserError(variant)
    return ml_collections.ConfigDict({'model': {'depth': 2, 'rate': 0.5}})
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / 'command.py').write_text(_COMMAND)
    (tmp_path / 'config.py').write_text(_CONFIG)
    (tmp_path / 'broken.py').write_text('def get_config(:\n')
    (tmp_path / 'other.py').write_text('SETTINGS = 1\n')
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, 'PYTHONPATH': root, 'HOME': str(tmp_path), 'JAX_PLATFORMS': 'cpu'}
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)

    def run(*args, **extra):
        return subprocess.run(
            [sys.executable, 'command.py', *args],
            cwd=tmp_path,
            env={**environment, **extra},
            capture_output=True,
            text=True,
        )

    return run


def test_success_applies_overrides_and_sets_the_cache(command, tmp_path):
    done = command('--config=config.py', '--config.model.depth=7')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['7', str(tmp_path / '.cache/hyperlora/jax')]


def test_the_home_folder_in_flags(command, tmp_path, monkeypatch):
    done = command('--config=~/config.py:paths,~/a+~/b,~c,d~/e')
    assert f'paths,{tmp_path}/a+{tmp_path}/b,~c,d~/e' in done.stderr
    monkeypatch.setenv('HOME', '/home/ann')
    assert cli._expanded('--workdir=~/x') == '--workdir=/home/ann/x'
    assert cli._expanded('--config.data=squad,~/x') == '--config.data=squad,/home/ann/x'
    for kept in ('--question=what is in a,~/x?', '--workdir=gs://a/~/x', '--workdir=~', '--share'):
        assert cli._expanded(kept) == kept


def test_the_cache_directory_of_the_user_wins_and_a_bad_home_is_harmless(command, tmp_path):
    done = command('--config=config.py', JAX_COMPILATION_CACHE_DIR='/tmp/mine')
    assert done.stdout.split() == ['2', '/tmp/mine']
    (tmp_path / 'file').touch()
    done = command('--config=config.py', HOME=str(tmp_path / 'file'))
    assert (done.returncode, done.stdout.split()) == (0, ['2', 'None'])


@pytest.mark.parametrize(
    ('args', 'parts'),
    [
        (['--config=config.py', '--do=mistake'], ['two lines']),
        (['--config=config.py', '--config.model.nope=1'], ['--config.model.nope', 'no such']),
        (['--config=config.py', '--config.model.depth.x=1'], ['--config.model.depth.x', 'no such']),
        (['--config=config.py', '--config.model.depth=deep'], ['--config.model.depth', 'deep']),
        (['--config=absent.py'], ['absent.py', 'No such file']),
        (['--config=absent.py', '--config.model.depth=1'], ['absent.py', 'No such file']),
        (['--config=broken.py'], ['broken.py', 'line 1']),
        (['--config=other.py'], ['the config file has no function get_config']),
        (['--config=config.py', '--do='], ['--do is empty (is a variable']),
        (['--config=config.py:unknown'], ["no variant 'unknown'"]),
        (['--config=config.py:value'], ['config.py:value', 'bad variant']),
        (['--config=config.py', '--dp=1'], ["'dp'"]),
        (['--config=config.py', 'extra'], ["'extra'"]),
        ([], ['--config']),
    ],
)
def test_mistakes_are_one_line_and_exit_2(command, args, parts):
    done = command(*args)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('error: ')
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_a_missing_package_is_named(command):
    done = command('--config=config.py', '--do=extra')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert 'package_of_an_extra is not installed' in done.stderr


def test_an_outage_is_one_line_and_exit_1(command):
    done = command('--config=config.py', '--do=outage')
    assert (done.returncode, done.stderr) == (1, 'error: no bucket\n')


def test_ctrl_c_is_quiet(command):
    done = command('--config=config.py', '--do=interrupt')
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, '')


def test_bugs_keep_their_traceback(command):
    done = command('--config=config.py', '--do=bug')
    assert done.returncode == 1
    assert 'ZeroDivisionError: a bug' in done.stderr and 'Traceback' in done.stderr


def test_writable_directory(tmp_path):
    made = cli.writable_directory(tmp_path / 'a' / 'b')
    assert made == tmp_path / 'a' / 'b' and made.is_dir() and not list(made.iterdir())
    (tmp_path / 'file').touch()
    for bad in (tmp_path / 'file', tmp_path / 'file' / 'below', '/proc/nowhere', 'gs://bucket/run'):
        with pytest.raises(UserError, match=str(bad)):
            cli.writable_directory(bad)


def test_writable_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.writable_folder('a/b') == str(tmp_path / 'a/b') and (tmp_path / 'a/b').is_dir()
    with pytest.raises(UserError, match='https://bucket/run: neither'):
        cli.writable_folder('https://bucket/run')

    bucket, path = tmp_path / 'bucket', pathlib.Path
    with monkeypatch.context() as patch:  # a folder takes the place of the bucket
        patch.setattr(epath, 'Path', lambda url: path(str(url).replace('gs://bucket', str(bucket))))
        assert cli.writable_folder('gs://bucket/run') == str(bucket / 'run')
    assert (bucket / 'run').is_dir() and not list((bucket / 'run').iterdir())

    for error, kind in (
        (OSError('503'), Outage),
        (FileNotFoundError('404'), UserError),
        (OSError('Forbidden: 403'), UserError),
    ):

        def failing(url, error=error):
            raise error

        monkeypatch.setattr(epath, 'Path', failing)
        with pytest.raises(kind, match=f'gs://bucket/run: cannot write there .{error}.'):
            cli.writable_folder('gs://bucket/run')

    def without_gcsfs(url):
        raise ImportError

    monkeypatch.setattr(epath, 'Path', without_gcsfs)
    with pytest.raises(UserError, match=r'gs://bucket/run: .*hyperlora\[gcs\]'):
        cli.writable_folder('gs://bucket/run')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_writable_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match='Permission denied'):
        cli.writable_directory(tmp_path)
