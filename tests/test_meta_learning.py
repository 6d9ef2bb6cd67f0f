"""The training loop: accumulation, exact resume, kills, refusals, meshes of several devices.

Run as a program, this file is the training that tests start as a process of its own:

    python tests/test_meta_learning.py train --config=FILE --workdir=DIR
    python tests/test_meta_learning.py meshes
"""

import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, tiny_base, tiny_training
from ml_collections import ConfigDict

from configs import eval_niah
from hyperlora import costs, data, lora, meta_learning, objectives, sharding, trained
from hyperlora.data.packing import pack
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.models import base as base_models
from hyperlora.models import weights
from hyperlora.models.decoder import Decoder
from t2l.hypernetwork import TextToLora, TextToLoraConfig

ROOT = pathlib.Path(__file__).parents[1]


def batch_of(config, base, groups, accumulate, step=4):
    """One training batch of the second stage: documents of several chunks and a pool."""
    batch = data.build(config.data, base, base, config.seed, groups, accumulate)[step]
    rng = np.random.default_rng(0)
    weights = batch['query']['label_weights']
    # Uneven, so that a mean of means would be wrong.
    batch['query']['label_weights'] = weights * rng.integers(1, 5, weights.shape)
    return batch


def both(params):
    """The base model that is its own context encoder."""
    return {'base': params, 'encoder': params}


# Keeps the parameters and remembers the gradient as its state.
REMEMBER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params: (jax.tree.map(jnp.zeros_like, params), gradient),
)


def learner_and_state(config, base, groups):
    """A learner that remembers its gradient, and a state in which every parameter acts."""
    learner = dataclasses.replace(
        meta_learning.make_learner(config, base, groups), optimizer=REMEMBER
    )
    return learner, acting_state(learner, base)


def acting_state(learner, base):
    state = nn.unbox(jax.jit(learner.init)(jax.random.key(0), base.params))
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = [
        x + 0.05 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)
    ]
    return state.replace(params=jax.tree.unflatten(tree, params))


def gradient_step(learner, state, base, batch):
    """The gradient and the metrics of one step."""
    after, metrics = jax.jit(learner.step)(state, both(base.params), batch)
    return value_of(after.opt_state), {key: float(value) for key, value in metrics.items()}


def value_of(state):
    return jax.tree.map(np.asarray, state)


def assert_close(ours, wanted, tolerance):
    """Within a fraction of the largest entry of each leaf, or rounding of a gradient that is 0."""
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert np.abs(y).max() > 0
        bound = max(tolerance * np.abs(y).max(), 1e-10)  # as of the bias of attention's keys
        np.testing.assert_allclose(x, y, atol=bound, rtol=0)


def assert_identical(ours, wanted):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


# ----------------------------------------------------------------------------------- one step


def test_accumulated_microbatches_are_one_batch(tiny):
    config = tiny_training()
    config.objective.l1 = 0.3
    parts = batch_of(config, tiny, groups=1, accumulate=2)
    whole = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), parts)
    learner, state = learner_and_state(config, tiny, 1)
    ours, our_metrics = gradient_step(learner, state, tiny, parts)
    wanted, metrics = gradient_step(dataclasses.replace(learner, groups=2), state, tiny, whole)
    assert metrics['grad_norm'] > 1e-2 and metrics['l1'] > 0
    assert our_metrics == pytest.approx(metrics, rel=1e-5)
    assert_close(ours, wanted, 3e-5)
    # Both microbatches count: neither alone gives this gradient.
    first = jax.tree.map(lambda x: x[:1], parts)
    assert gradient_step(learner, state, tiny, first)[1]['loss'] != pytest.approx(
        metrics['loss'], rel=1e-3
    )


def test_rematerialisation_changes_nothing(tiny):
    config = tiny_training()
    batch = batch_of(config, tiny, groups=1, accumulate=1)
    learner, state = learner_and_state(config, tiny, 1)
    wanted, metrics = gradient_step(learner, state, tiny, batch)
    plain = jax.make_jaxpr(learner.step)(state, both(tiny.params), batch)
    config.remat = config.hypernetwork.shape.remat = 'full'
    learner, same = learner_and_state(config, tiny, 1)
    assert_identical(value_of(same), value_of(state))
    ours, our_metrics = gradient_step(learner, state, tiny, batch)
    assert our_metrics == pytest.approx(metrics, rel=1e-5)
    assert_close(ours, wanted, 1e-5)
    again = jax.make_jaxpr(learner.step)(state, both(tiny.params), batch)
    assert 'remat' not in str(plain) and 'remat' in str(again)


def test_only_the_hypernetwork_trains(tiny):
    config = tiny_training()
    learner = meta_learning.make_learner(config, tiny, 1)
    state = learner_and_state(config, tiny, 1)[1]
    state = state.replace(opt_state=learner.optimizer.init(state.params))
    own = nn.unbox(jax.eval_shape(learner.hypernetwork.init, jax.random.key(0), tiny.params))
    assert jax.tree.structure(state.params) == jax.tree.structure(own)
    # Two moments of each parameter, and counters.
    size = sum(x.size for x in jax.tree.leaves(own))
    assert 2 * size <= sum(x.size for x in jax.tree.leaves(state.opt_state)) <= 2 * size + 4
    # All of them move, at the second step (the first one's learning rate is 0).
    step = jax.jit(learner.step)
    batch = batch_of(config, tiny, 1, 1)
    after = state
    for _ in range(2):
        after, _ = step(after, both(tiny.params), batch)
    assert int(after.step) == 2
    for path, old in jax.tree_util.tree_leaves_with_path(state.params):
        new = after.params
        for key in path:
            new = new[key.key]
        assert np.abs(new - old).max() > 0, path


def test_a_fresh_hypernetwork_leaves_the_base_as_it_is(tiny):
    """Scalers of B at 0, as published: the loss is that of the base model without an adapter."""
    config = tiny_training()
    config.hypernetwork.shape.scaler_b = 0.0
    learner = meta_learning.make_learner(config, tiny, 1)
    params = nn.unbox(jax.jit(learner.hypernetwork.init)(jax.random.key(0), tiny.params))
    batch = jax.tree.map(lambda x: x[0], batch_of(config, tiny, 1, 1))
    _, sums = jax.jit(learner.loss)(params, both(tiny.params), batch)
    query = batch['query']
    hidden = Decoder(tiny.config).apply({'params': tiny.params}, query['tokens']).hidden
    logits = Decoder(tiny.config).apply({'params': tiny.params}, hidden, method='unembed')
    at = np.take_along_axis(np.asarray(logits, np.float64), query['label_positions'][..., None], 1)
    chosen = np.take_along_axis(at, query['labels'][..., None], -1)[..., 0]
    wanted = (query['label_weights'] * (np.log(np.exp(at).sum(-1)) - chosen)).sum()
    assert float(sums['loss'][0]) == pytest.approx(wanted, rel=1e-5)


def test_decay_spares_norms_queries_scalers_and_the_shared_lora(tiny):
    learner = meta_learning.make_learner(tiny_training(), tiny, 1)
    params = nn.unbox(jax.eval_shape(learner.hypernetwork.init, jax.random.key(0), tiny.params))
    marks = jax.tree_util.tree_leaves_with_path(meta_learning.decayed(params))
    names = {jax.tree_util.keystr(path, simple=True, separator='/'): mark for path, mark in marks}
    assert names['head'] and names['perceiver/cross_0/q_proj/kernel']
    spared = {name.split('/')[-1] for name, mark in names.items() if not mark}
    assert spared == {
        'scale',
        'bias',
        'latents',
        'output_queries',
        'scaler_a_down_proj',
        'scaler_b_down_proj',
        'bias_a_down_proj',
        'bias_b_down_proj',
    }


def test_the_optimizer_decays_and_clips():
    config = tiny_training().optimizer
    config.update(warmup_steps=0, learning_rate=0.5, weight_decay=0.1, clip_norm=1.0, b1=0.75)
    optimizer = meta_learning.make_optimizer(config)
    params = {'kernel': jnp.ones(2), 'scale': jnp.ones(2)}
    state = optimizer.init(params)
    update, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(update['kernel'], -0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(update['scale'], 0)
    _, state = optimizer.update(jax.tree.map(lambda x: 50 * x, params), state, params)
    moments = optax.tree.get(state, 'mu')
    assert float(optax.tree.norm(moments)) == pytest.approx(1 - 0.75, rel=1e-5)


def test_learning_rate_warms_up_and_decays():
    optimizer = tiny_training().optimizer
    optimizer.update(
        {'steps': 100, 'warmup_steps': 10, 'learning_rate': 1e-3, 'end_learning_rate': 1e-5}
    )
    rate = meta_learning.learning_rate(optimizer)
    assert [float(rate(step)) for step in (0, 5, 10, 55, 100)] == pytest.approx(
        [0, 5e-4, 1e-3, (1e-3 + 1e-5) / 2, 1e-5], rel=1e-4
    )


# ----------------------------------------------------------------------------------- the loop


def load_tiny(name, dtype, mesh, quantization):
    """`load_base`, of the tiny base."""
    base = tiny_base()
    places = base_models.shardings(base.config, mesh)
    return dataclasses.replace(base, params=jax.device_put(base.params, places))


@pytest.fixture(autouse=True)
def on_the_tiny_base(monkeypatch):
    """Trains on the tiny base."""
    monkeypatch.setattr(meta_learning, 'load_base', load_tiny)


def metrics_of(workdir):
    """The lines of a training, without what depends on its speed."""
    lines = [
        json.loads(line)
        for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
    ]
    return [{k: v for k, v in line.items() if not k.endswith('per_second')} for line in lines]


def checkpoints_of(workdir):
    return sorted(
        int(path.name)
        for path in (pathlib.Path(workdir) / 'checkpoints').iterdir()
        if path.name.isdigit()
    )


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """An uninterrupted training: workdir, final state, what it printed."""
    workdir = tmp_path_factory.mktemp('straight')
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_learning, 'load_base', load_tiny)
        patch.setattr(meta_learning, 'print', lambda text, **_: printed.append(text), raising=False)
        state = value_of(meta_learning.train(tiny_training(), str(workdir)))
    return workdir, state, printed


def test_training_reports_and_saves(straight):
    workdir, state, printed = straight
    lines = metrics_of(workdir)
    assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line['loss'] > 0 and line['grad_norm'] > 0 for line in lines)
    assert lines[0]['learning_rate'] == 0 < lines[1]['learning_rate']
    assert int(state.step) == 6
    assert checkpoints_of(workdir) == [4, 6]  # the last two


def test_a_report_is_the_mean_since_the_last(straight, tmp_path):
    config = tiny_training()
    config.log_every = 3
    meta_learning.train(config, str(tmp_path))
    each, lines = metrics_of(straight[0]), metrics_of(tmp_path)
    ends = [line['step'] for line in lines]  # a report also comes with every checkpoint
    assert ends == [2, 3, 4, 6]
    for start, line in zip([0, *ends], lines, strict=False):
        wanted = np.mean([one['loss'] for one in each[start : line['step']]])
        assert line['loss'] == pytest.approx(wanted, rel=1e-6)


def test_a_shape_is_compiled_once(straight):
    config = tiny_training()
    batches = data.build(config.data, tiny_base(), tiny_base(), config.seed, 1, 1)
    shapes = {str(jax.tree.map(np.shape, batches[i])) for i in range(6)}
    assert len(shapes) in (2, 3)
    assert straight[2][-1].endswith(f'shapes compiled {len(shapes)}')


def stop_at(monkeypatch, step):
    """Sends SIGTERM to this process at the end of a step."""
    update = meta_learning.Progress.update

    def patched(self, now):
        update(self, now)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(meta_learning.Progress, 'update', patched)


def test_a_run_in_two_parts_is_the_same_run(straight, tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        state = meta_learning.train(tiny_training(), str(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert int(state.step) == 3 and checkpoints_of(tmp_path) == [2, 3]
    config = tiny_training()
    config.base = '/the/same/elsewhere'
    resumed = meta_learning.train(config, str(tmp_path))
    assert 'resumed at step 3' in capsys.readouterr().out
    assert_identical(value_of(resumed), straight[1])
    assert metrics_of(tmp_path) == metrics_of(straight[0])


def test_a_run_from_weights(straight, tmp_path, monkeypatch):
    """It starts with the weights, but at step 0, with a fresh optimiser; a rate of 0 keeps them."""
    folder, path = straight[0], pathlib.Path  # which takes the place of a bucket
    buckets = types.SimpleNamespace(
        Path=lambda url: path(str(url).replace('gs://bucket', str(folder.parent)))
    )
    monkeypatch.setattr(trained, 'epath', buckets)
    config = tiny_training()
    config.init_from = f'gs://bucket/{folder.name}'
    config.optimizer.learning_rate = config.optimizer.end_learning_rate = 0.0
    state = meta_learning.train(config, str(tmp_path / 'run'))
    assert int(state.step) == 6
    assert_identical(value_of(state).params, straight[1].params)

    config.hypernetwork.shape.rank *= 2
    with pytest.raises(UserError, match='tensors do not fit the config'):
        meta_learning.train(config, str(tmp_path / 'other'))
    monkeypatch.setattr(
        meta_learning, 'load_base', lambda *_: dataclasses.replace(tiny_base(), fingerprint='x')
    )
    with pytest.raises(UserError, match='trained with the base model'):
        meta_learning.train(config, str(tmp_path / 'other'))
    assert not list((tmp_path / 'other').glob('checkpoints/[0-9]*'))


def test_a_finished_run_ends_at_once(straight, tmp_path, capsys):
    shutil.copytree(straight[0], tmp_path / 'run')
    state = meta_learning.train(tiny_training(), str(tmp_path / 'run'))
    assert_identical(value_of(state), straight[1])
    assert 'loss' not in capsys.readouterr().out


def test_another_seed_is_another_run(straight, tmp_path, monkeypatch):
    config = tiny_training()
    config.seed = 1
    stop_at(monkeypatch, 1)
    meta_learning.train(config, str(tmp_path))
    assert metrics_of(tmp_path)[0]['loss'] != metrics_of(straight[0])[0]['loss']


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda c: c.optimizer.update(learning_rate=0.5), 'optimizer.learning_rate'),
        (lambda c: c.hypernetwork.shape.update(rank=4), 'hypernetwork.shape.rank'),
        (lambda c: c.update(seed=3), 'seed: 0 -> 3'),
    ],
)
def test_changed_settings_are_refused(straight, tmp_path, change, message):
    shutil.copytree(straight[0], tmp_path / 'run')
    config = tiny_training()
    change(config)
    with pytest.raises(UserError, match=message):
        meta_learning.train(config, str(tmp_path / 'run'))


def test_another_base_is_refused(straight, tmp_path, monkeypatch):
    shutil.copytree(straight[0], tmp_path / 'run')
    other = dataclasses.replace(tiny_base(), fingerprint='another')
    monkeypatch.setattr(meta_learning, 'load_base', lambda *_: other)
    with pytest.raises(UserError, match='base model'):
        meta_learning.train(tiny_training(), str(tmp_path / 'run'))


@pytest.mark.parametrize(
    'part, name, message',
    [
        ('objective', 'guess', 'unknown objective'),
        ('hypernetwork', 'guess', 'unknown hypernetwork'),
        ('data', 'guess', 'unknown data'),
    ],
)
def test_unknown_parts_are_refused(tmp_path, part, name, message):
    config = tiny_training()
    config[part].name = name
    with pytest.raises(UserError, match=message):
        meta_learning.train(config, str(tmp_path))


@pytest.mark.parametrize(
    'change, message',
    [
        ({'log_every': 0}, 'config.log_every must be at least 1, not 0'),
        ({'checkpoint_every': -1}, 'config.checkpoint_every'),
        ({'groups': 0}, 'config.groups must be at least 1, not 0'),
        ({'accumulate': 0}, 'config.accumulate'),
        ({'remat': 'ful'}, "unknown config.remat 'ful'; known: none, "),
        (
            {'hypernetwork': {'shape': {'remat': 'ful'}}},
            "unknown config.hypernetwork.shape.remat 'ful'; known: none, ",
        ),
        ({'hypernetwork': {'dtype': 'float33'}}, "unknown dtype 'float33' of the hypernetwork"),
        ({'seed': -1}, 'config.seed must be at least 0, not -1'),
        ({'chunk_length': 0}, 'config.chunk_length must be at least 1, not 0'),
        (
            {'optimizer': {'learning_rate': -1e-3}},
            'config.optimizer.learning_rate must be at least 0, not -0.001',
        ),
        (
            {'optimizer': {'clip_norm': float('nan')}},
            'clip_norm must be at least 0 and below inf, not nan',
        ),
        ({'hypernetwork': {'shape': {'rank': 0}}}, 'hypernetwork.shape.rank must be positive'),
        ({'hypernetwork': {'modules': ('q_proj', 'q_proj')}}, 'each once, not .*q_proj'),
        ({'hypernetwork': {'modules': ()}}, 'name one target module or more'),
        ({'optimizer': {'b2': 1.0}}, 'b2 must be at least 0 and below 1, not 1.0'),
        ({'optimizer': {'steps': 7}}, 'the data have 6 steps, the training 7: set config.optimi'),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, change, message):
    config = tiny_training()
    config.update(change)
    with pytest.raises(UserError, match=message):
        meta_learning.train(config, str(tmp_path))


def test_a_config_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="'eval_niah' is no experiment to train.* no base"):
        meta_learning.train(eval_niah.get_config(), str(tmp_path))


@pytest.mark.parametrize('log_every', [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, log_every):
    config = tiny_training()
    config.optimizer.learning_rate = 1e30  # takes effect at the end of step 2
    config.log_every = log_every
    with pytest.raises(UserError, match='not finite at step') as error:
        meta_learning.train(config, str(tmp_path))
    assert ('step 3' if log_every == 1 else 'step 4') in str(error.value)
    assert 'last checkpoint is of step 2' in str(error.value)
    assert checkpoints_of(tmp_path) == [2]


# ------------------------------------------------------------------------ processes of their own


def start(*args, devices=1):
    environment = {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        # Most of the time goes into compiling. Devices that share few threads would wait for each
        # other for ever in collectives that run at the same time.
        'XLA_FLAGS': (
            f'--xla_force_host_platform_device_count={devices} '
            '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
            '--xla_cpu_enable_concurrency_optimized_scheduler=false'
        ),
    }
    if devices == 1:
        environment.pop('XLA_FLAGS')
    return subprocess.Popen(
        [sys.executable, __file__, *map(str, args)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def slow_training(tmp_path):
    """A training in a process of its own that has just saved step 2; a step takes a second."""
    config = tmp_path / 'config.py'
    config.write_text('from conftest import tiny_training as get_config\n')
    workdir = tmp_path / 'run'
    process = start('train', f'--config={config}', f'--workdir={workdir}')
    while process.poll() is None and not (workdir / 'checkpoints' / '2').exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    yield process, workdir
    process.kill()
    process.wait()


def test_kill_9_at_any_moment_loses_nothing(straight, slow_training, capsys):
    process, workdir = slow_training
    delay = random.uniform(0, 2)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resumed = meta_learning.train(tiny_training(), str(workdir))
    assert 'resumed at step' in capsys.readouterr().out
    assert_identical(value_of(resumed), straight[1])
    assert metrics_of(workdir) == metrics_of(straight[0]), f'killed {delay} s after step 2'


def test_sigterm_saves_the_current_step_and_exits_with_75(straight, slow_training, capsys):
    process, workdir = slow_training
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == 75, output
    last = metrics_of(workdir)[-1]['step']
    assert 2 <= last < 6 and checkpoints_of(workdir)[-1] == last
    assert f'stop requested: saved step {last}' in output
    resumed = meta_learning.train(tiny_training(), str(workdir))
    assert f'resumed at step {last}' in capsys.readouterr().out
    assert_identical(value_of(resumed), straight[1])
    assert metrics_of(workdir) == metrics_of(straight[0])


def test_several_devices_compute_what_one_does(tmp_path):
    process = start('meshes', tmp_path, devices=8)
    output = process.communicate()[0]
    assert process.returncode == 0, output[-5000:]
    assert output.splitlines()[-1] == 'all meshes agree'


# What the processes run.


def train_slowly():
    from launch import cli, train

    meta_learning.load_base = load_tiny
    update = meta_learning.Progress.update

    def slow(*args):
        update(*args)
        time.sleep(1)

    meta_learning.Progress.update = slow
    cli.run(train.main)


def task_learner(base, groups):
    """Text-to-LoRA on packed rows of random tokens: a learner and a batch."""
    width, tokens, labels = 24, 32, 12
    shape = {'rank': 4, 'scaling': 2.0, 'latent_size': 16, 'head_width': 32}
    dims = lora.module_dims(TINY, ('down_proj', 'q_proj'))
    module = TextToLora(TextToLoraConfig(TINY.num_layers, dims, embedding_width=width, **shape))
    hypernetwork = Hypernetwork(
        module,
        base,
        lambda _, context: (context['embedding'], None),
        {'embedding': np.zeros((1, width), np.float32)},
    )
    settings = {'name': 'cross_entropy', 'label_smoothing': 0.1, 'l2': 0.1}
    objective = objectives.build(ConfigDict(settings))
    rng = np.random.default_rng(0)

    def pair():
        return [rng.integers(4, TINY.vocab_size, n).tolist() for n in rng.integers(2, 8, 2)]

    rows = [pack([pair() for _ in range(9)], tokens, labels) for _ in range(groups)]
    query = jax.tree.map(lambda *x: np.concatenate(x)[None], *rows)
    embeddings = rng.standard_normal((1, groups, width), np.float32)
    batch = {'context': {'embedding': embeddings}, 'query': query}
    return meta_learning.Learner(hypernetwork, Decoder(TINY), objective, groups, None), batch


def memory_learner(config, base):
    """Documents written into an associative memory: a learner and a batch."""
    shape = {'written': 2, 'scaling': 1.0, 'latent_size': 16, 'num_blocks': 1, 'num_heads': 2}
    shape.update(bottleneck=8, shared_rank=8)
    config = config.copy_and_resolve_references()
    config.hypernetwork = ConfigDict({'name': 'associative_memory', 'shape': shape})
    learner = meta_learning.make_learner(config, base, 8)
    return learner, batch_of(config, base, groups=8, accumulate=1)


# Updates by the clipped gradient, which it remembers.
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.0), optax.scale(-0.1))
MESHES = (
    {'data': 8},
    {'fsdp': 8},
    {'fsdp': 4, 'tensor': 2},
    {'slice': 2, 'data': 2, 'tensor': 2},
)


def compare_meshes(workdir):
    """One step on eight groups, on one device and on meshes of eight; then whole trainings."""
    assert jax.device_count() == 8
    base, config = tiny_base(), tiny_training()
    config.objective.l1 = 0.3
    config.optimizer.update(steps=3)
    folder = pathlib.Path(workdir, 'base')
    folder.mkdir()
    weights.save_hf(folder, base.params, base.config, {})
    document_learner = meta_learning.make_learner(config, base, 8)
    cases = {
        'documents': (document_learner, batch_of(config, base, groups=8, accumulate=1)),
        'tasks': task_learner(base, 8),
        'memories': memory_learner(config, base),
    }
    for case, (learner, batch) in cases.items():
        learner = dataclasses.replace(learner, optimizer=CLIPPED)
        state = acting_state(learner, base)
        assert len(jax.tree.leaves(state.params)[0].devices()) == 1
        step = jax.jit(learner.step)
        unconstrained = step.lower(state, both(base.params), batch).as_text()
        assert 'sharding_constraint' not in unconstrained
        wanted, metrics = step(state, both(base.params), batch)
        assert metrics['grad_norm'] > 0.1
        for shape in MESHES:
            compare_mesh(shape, learner, state, batch, folder, (wanted, metrics))
            print(case, shape, 'agrees', flush=True)

    # The loop: eight groups at once on eight devices are eight microbatches, four by four as well.
    meta_learning.load_base = load_tiny
    config.data.stages = [{**dict(config.data.stages[1]), 'steps': 3}]
    lines = []
    for shape, accumulate in (
        ({'slice': 1, 'data': 4, 'fsdp': 2, 'tensor': 1}, 1),
        ({'slice': 2, 'data': 1, 'fsdp': 2, 'tensor': 2}, 2),
    ):
        config.update(accumulate=accumulate, mesh=shape)
        folder = pathlib.Path(workdir, str(accumulate))
        folder.mkdir()
        trained = meta_learning.train(config, str(folder))
        assert int(trained.step) == 3
        lines.append(metrics_of(folder))
    for one, two in zip(*lines, strict=True):
        assert one == pytest.approx(two, rel=1e-3)

    # It goes on with this mesh from what was saved with another.
    other = pathlib.Path(workdir, '1')
    shutil.rmtree(other / 'checkpoints' / '3')
    meta_learning.train(config, str(other))
    for one, two in zip(metrics_of(other), lines[0], strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    print('all meshes agree')


def compare_mesh(shape, learner, state, batch, folder, wanted):
    """The step on one mesh, with a base model of which each device reads its part of the files."""
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        base = tiny_base()
        places = base_models.shardings(base.config, mesh)
        frozen = weights.from_safetensors(folder, base.config, 'float32', places)
        assert weights.fingerprint(frozen) == base.fingerprint
        jax.tree.map(np.testing.assert_array_equal, frozen, base.params)
        abstract = jax.eval_shape(learner.init, jax.random.key(0), frozen)
        placed = jax.device_put(state, sharding.shardings(abstract, mesh))
        spread = jax.device_put(batch, sharding.batch_sharding(mesh, axis=1))
        kernels = [
            x
            for tree in (frozen, placed.params)
            for x in jax.tree.leaves(tree)
            if x.addressable_shards[0].data.size < x.size
        ]
        assert len(kernels) > 10 or not {'fsdp', 'tensor'} & shape.keys()
        lowered = jax.jit(learner.step).lower(placed, both(frozen), spread)
        lines = lowered.as_text().splitlines()
        constraints = [line for line in lines if 'sharding_constraint' in line]
        assert any('"slice", "data", "fsdp"' in line for line in constraints), constraints
        step = lowered.compile()
        if shape == {'fsdp': 4, 'tensor': 2}:
            check_vocabulary(step.as_text())
        after, metrics = step(placed, both(frozen), spread)
    ours = {key: float(value) for key, value in metrics.items()}
    assert ours == pytest.approx({k: float(v) for k, v in wanted[1].items()}, rel=1e-5), shape
    assert_close(value_of(after.params), value_of(wanted[0].params), 1e-5)
    assert_close(value_of(after.opt_state), value_of(wanted[0].opt_state), 1e-5)


def check_vocabulary(hlo):
    """Logits stay where they are; of the embeddings each device is sent its half, once."""
    kinds = '|'.join(costs.COLLECTIVES)
    sent = [
        re.search(rf'= \(?(\w+\[.*?\])\S* ({kinds})', line)
        for line in hlo.splitlines()
        if re.search(r'op_name="[^"]*unembed', line)
    ]
    shapes = [found[1] for found in sent if found]
    half = f'f32[{TINY.vocab_size // 2},{TINY.width}]'
    assert shapes.count(half) == 1 and all(x.endswith(f',{TINY.width}]') for x in shapes), shapes


if __name__ == '__main__':
    command = sys.argv.pop(1)
    train_slowly() if command == 'train' else compare_meshes(sys.argv[1])
