"""Several processes as one training: equal results, preemption, restarts, refusals.

Run as a program, this file is one of the processes that tests start:

    python tests/test_hosts.py --config=tests/test_hosts.py --workdir=DIR --distributed ...
"""

import functools
import json
import os
import pathlib
import re
import resource
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_reconstruction
from conftest import CharTokenizer, tiny_base, tiny_training

from hyperlora import data, generation, hosts, meta_learning, sharding
from hyperlora.errors import UserError
from hyperlora.models import base as base_models
from hyperlora.models import families, weights
from hyperlora.models.base import BaseModel
from hyperlora.models.embedders import Embedder

ROOT = pathlib.Path(__file__).parents[1]
ROWS = 4  # of a step, however many processes there are


def get_config(table=''):
    """Six steps of one shape, for each process compiles anew.

    Args:
      table: an export of a table of LoRAs, for reconstruction instead of needles.
    """
    if table:
        config = test_reconstruction.settings(table)
        config.optimizer.steps = 6
        config.groups = ROWS
        return config
    config = tiny_training()
    stage = {**config.data.stages[1], 'steps': 6, 'chunks': (1.0,)}
    config.update(base='tiny', groups=ROWS)
    config.data.stages = [stage]
    return config


@pytest.fixture(scope='module')
def base_folder(tmp_path_factory):
    """The tiny base as a Hugging Face folder, of which each process reads its parts."""
    folder = tmp_path_factory.mktemp('base')
    base = tiny_base()
    weights.save_hf(folder, base.params, base.config, families.to_hf(base.config))
    return folder


@pytest.fixture(scope='module')
def alone(tmp_path_factory, base_folder):
    """The metrics of a training in one process, which all others are compared with."""
    return train_alone(tmp_path_factory.mktemp('alone'), base_folder, get_config())


def train_alone(workdir, base_folder, config):
    config.base = str(base_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_learning, 'load_base', load_tiny)
        meta_learning.train(config, str(workdir))
    return metrics_of(workdir)


def load_tiny(name, dtype, mesh, quantization):
    """`load_base`, with the tokenizer of the tests."""
    config, params, fingerprint = base_models.load_params(name, dtype, mesh, quantization)
    return BaseModel('tiny', config, params, CharTokenizer(), fingerprint)


def metrics_of(workdir):
    """The lines of a training, without what depends on its speed."""
    text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith('per_second')} for line in lines]


def assert_same_curve(lines, wanted):
    assert [line['step'] for line in lines] == [line['step'] for line in wanted]
    for ours, theirs in zip(lines, wanted, strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], abs=1e-5), ours['step']
        assert ours['grad_norm'] == pytest.approx(theirs['grad_norm'], rel=1e-4), ours['step']


def start(count, base_folder, workdir, flags=(), only=None, wrapper=(), p1=(), table=''):
    """Starts processes of one device each.

    Args:
      only: which of them to start; None for all.
      wrapper: a command that runs them.
      p1: flags of process 1 alone.
      table: see `get_config`.
    """
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    environment = {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        # Most of the time goes into compiling.
        'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
    }

    def one(i):
        return subprocess.Popen(
            [
                *(*wrapper, sys.executable, __file__, f'--config={__file__}:{table}'),
                *(f'--config.base={base_folder}', f'--config.groups={ROWS // count}'),
                *(f'--workdir={workdir}', '--distributed', f'--coordinator_address={address}'),
                *(f'--num_processes={count}', f'--process_id={i}', *flags, *(p1 if i == 1 else ())),
            ],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return [one(i) for i in (range(count) if only is None else only)]


def finish(processes, timeout=300):
    """(exit code, output) of each."""
    try:
        deadline = time.monotonic() + timeout
        outputs = [p.communicate(timeout=deadline - time.monotonic())[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def succeed(processes, code=0):
    codes, outputs = zip(*finish(processes), strict=True)
    assert set(codes) == {code}, '\n'.join(outputs)
    return outputs


def test_two_processes_answer_while_they_build_data(base_folder, tmp_path, monkeypatch):
    """As for `data.gibberish` of tasks: each is to see all answers and embeddings."""
    monkeypatch.setenv('ASKS', '1')
    told = [
        re.findall('^answers .*', output, re.M)
        for output in succeed(start(2, base_folder, tmp_path / 'run'))
    ]
    assert told == [[f'answers {answers(tiny_base())}']] * 2


def answers(base):
    """What a base model says to some prompts, and how it embeds them."""
    prompts = [base.tokenizer.prompt(text) for text in ('Who?', 'Why is it so?', 'When?')]
    embed = functools.partial(Embedder, 'base', base.config, base.params, 'last', 64)
    vectors = embed(base.tokenizer.encode, base.fingerprint).embed(prompts)
    return generation.answer_tokens(base, prompts, 6), (vectors.round(2) + 0.0).tolist()


def test_two_processes_are_one(alone, base_folder, tmp_path):
    first, second = succeed(start(2, base_folder, tmp_path / 'run'))
    assert_same_curve(metrics_of(tmp_path / 'run'), alone)
    assert 'step 6/6' in first and '2 process(es)' in first
    assert 'loss' not in second and 'train on' not in second


@pytest.mark.slow
def test_one_of_four_is_told_to_stop_and_two_go_on(alone, base_folder, tmp_path, monkeypatch):
    monkeypatch.setenv('SECONDS_PER_STEP', '4')
    workdir = tmp_path / 'run'
    processes = start(4, base_folder, workdir)
    while not ((workdir / 'metrics.jsonl').exists() and metrics_of(workdir)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[2].terminate()
    outputs = succeed(processes, code=75)
    last = metrics_of(workdir)[-1]['step']
    assert 1 < last < 6
    assert f'stop requested: saved step {last}' in outputs[0]
    saves = [re.findall(r'^saves step (\d+)$', output, re.M) for output in outputs]
    assert saves == [saves[0]] * 4 and int(saves[0][-1]) == last
    assert (workdir / 'checkpoints' / str(last)).is_dir()

    monkeypatch.setenv('SECONDS_PER_STEP', '0')
    outputs = succeed(start(2, base_folder, workdir))
    assert f'resumed at step {last}' in outputs[0]
    assert_same_curve(metrics_of(workdir), alone)  # steps of four processes, then of two


@pytest.mark.slow
def test_reconstruction_in_two_processes(base_folder, tmp_path):
    """Parameters that start from data, and an encoder that each process loads for itself."""
    table = tmp_path / 'table'
    test_reconstruction.write_table(table, tiny_base())
    (tmp_path / 'alone').mkdir()
    wanted = train_alone(tmp_path / 'alone', base_folder, get_config(str(table)))
    succeed(start(2, base_folder, tmp_path / 'run', table=table))
    assert_same_curve(metrics_of(tmp_path / 'run'), wanted)


@pytest.mark.slow
def test_a_disk_that_fills_up_on_one_host(alone, base_folder, tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    monkeypatch.setenv('FILLS_UP', '1')
    (code, output), (other_code, other) = finish(start(2, base_folder, workdir))
    assert (code, other_code) == (2, 2), output + other
    for text in (output, other):
        assert re.search(
            r'error: host 1 \(\S+\) cannot write a checkpoint .* of step 2 is intact', text
        ), text
    monkeypatch.delenv('FILLS_UP')
    assert 'resumed at step 2' in succeed(start(2, base_folder, workdir))[0]
    assert_same_curve(metrics_of(workdir), alone)


@pytest.mark.parametrize('groups, accumulate, shards', [(4, 1, 1), (4, 1, 4), (2, 2, 2), (1, 4, 1)])
def test_hosts_build_disjoint_rows_of_the_same_step(groups, accumulate, shards):
    config, base = get_config(), tiny_base()

    def build(*args):
        return data.build(config.data, base, base, 0, *args)

    whole = build(ROWS, 1)
    own = np.split(np.arange(groups), shards)
    parts = [build(groups, accumulate, rows.tolist()) for rows in own]
    assert all(len(part) == len(whole) == 6 for part in parts)
    for step in (1, 4):
        local = [part[step] for part in parts]
        joined = jax.tree.map(lambda *x: np.concatenate(x, 1), *local)
        flat = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), joined)
        jax.tree.map(np.testing.assert_array_equal, flat, whole[step])


def test_one_process_holds_all_groups():
    mesh = sharding.make_mesh(get_config().mesh)
    groups = 3 * sharding.data_shards(mesh)
    assert sharding.own_groups(mesh, groups) == list(range(groups))


# ------------------------------------------------------------------------------------ refusals


def test_a_host_that_never_arrives(base_folder, tmp_path):
    flags = ['--initialization_timeout=6']
    first = start(2, base_folder, tmp_path, flags, only=[0])
    second = start(2, base_folder, tmp_path, flags, only=[1])
    (code, output), (other_code, other) = finish(first + second)
    assert (code, other_code) == (1, 1)  # not a mistake: launchers start again
    assert re.search(r'error: process 0 on \S+ waited 6 s for all 2 processes to join', output)
    assert re.search(r'error: process 1 .* waited 6 s for process 0 at localhost:\d+, .*', other)
    assert 'Traceback' not in output + other and not list(tmp_path.iterdir())


def test_hosts_that_disagree(base_folder, tmp_path):
    results = finish(start(2, base_folder, tmp_path, p1=['--config.seed=3']))
    for code, output in results:
        assert code == 2, output
        assert re.search(
            r'error: host 1 \(\S+\) differs from host 0 \(\S+\) in config.seed \(3 instead of 0\)',
            output,
        )
    assert not (tmp_path / 'checkpoints').exists()


@pytest.mark.slow
def test_a_directory_that_is_not_shared(base_folder, tmp_path):
    hide = ['unshare', '--mount', '--map-root-user', 'sh', '-c']
    mount = f'mount -t tmpfs none {tmp_path} && exec "$@"'
    if subprocess.run([*hide, mount, 'sh', 'true'], capture_output=True).returncode:
        pytest.skip('needs mount namespaces')
    first = start(2, base_folder, tmp_path, only=[0])
    address = next(flag for flag in first[0].args if flag.startswith('--coordinator'))
    second = start(2, base_folder, tmp_path, [address], only=[1], wrapper=[*hide, mount, 'sh'])
    for code, output in finish(first + second):
        assert code == 2, output
        assert re.search(
            rf'error: {tmp_path} is not shared: host 1 \(\S+\) cannot see there what host 0', output
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_failure_of_one_host_ends_all(base_folder, tmp_path, monkeypatch):
    monkeypatch.setenv('FAILS', '1')
    (code, output), (other_code, other) = finish(start(2, base_folder, tmp_path))
    assert (code, other_code) == (2, 2), output + other
    assert 'error: no model on this disk' in other
    assert re.search(r'error: host 1 \(\S+\): no model on this disk', output)


def test_a_package_that_is_missing(base_folder, tmp_path, monkeypatch):
    """A user's mistake, which no restart mends."""
    monkeypatch.setenv('LACKS', '1')
    ((code, output),) = finish(start(1, base_folder, tmp_path))
    assert code == 2 and 'Traceback' not in output, output
    assert 'error: the package of_an_extra is not installed' in output


def test_hosts_that_finish_early_wait(monkeypatch):
    """Those that make data end hours apart; JAX would kill all after 5 minutes."""

    def initialize(*_, **settings):
        assert settings['shutdown_timeout_seconds'] > 7 * 24 * 3600
        raise ValueError('no cluster')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    with pytest.raises(UserError, match='no cluster'):
        hosts.initialize(None, None, None, 60)


def test_hosts_compare_all_their_source(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, '__file__', str(tmp_path / 'hyperlora' / 'hosts.py'))
    found = set()
    for name in ('hyperlora/hosts.py', 'd2l/facts.yaml', 't2l/descriptions/task.yaml'):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('a: 1')
        found.add(hosts._code())
    assert len(found) == 3


def test_processes_are_not_told_apart_without_the_flag(base_folder, tmp_path):
    ((code, output),) = finish(start(2, base_folder, tmp_path, ['--nodistributed'], only=[1]))
    assert code == 2 and 'needs --distributed' in output


def main():
    """One process of a training."""
    from launch import cli, train

    update, save = meta_learning.Progress.update, meta_learning.Checkpointer.save

    def slow_update(*args):
        update(*args)
        time.sleep(float(os.environ.get('SECONDS_PER_STEP', 0)))

    def talkative_save(self, step, *args, **kwargs):
        print(f'saves step {step}', flush=True)
        if step == 4 and os.environ.get('FILLS_UP') == str(jax.process_index()):
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return save(self, step, *args, **kwargs)

    def load(*args):
        if os.environ.get('FAILS') == str(jax.process_index()):
            raise UserError('no model on this disk')
        if os.environ.get('LACKS'):
            import of_an_extra  # noqa: F401
        return load_tiny(*args)

    build = data.build

    def ask_and_build(config, base, *args):
        if os.environ.get('ASKS'):
            print('answers', answers(base), flush=True)
        return build(config, base, *args)

    data.build = ask_and_build
    meta_learning.load_base = load
    meta_learning.Progress.update = slow_update
    meta_learning.Checkpointer.save = talkative_save
    hosts.VISIBLE_AFTER = 2
    cli.run(train.main)


if __name__ == '__main__':
    main()
