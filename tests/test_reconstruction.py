"""Reconstruction: a table of trained LoRAs as targets of the one meta-learning loop."""

import json
import os
import signal

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import tiny_base
from ml_collections import ConfigDict

from configs import t2l
from hyperlora import checkpointing, hypernetwork, meta_learning, trained
from hyperlora.errors import UserError
from hyperlora.lora_table import factors
from t2l.reconstruction import Targets, statistics

TASKS = ('first_word', 'last_word', 'uppercase')


@pytest.fixture(autouse=True)
def base(monkeypatch):
    for module in (meta_learning, trained):
        monkeypatch.setattr(module, 'load_base', lambda *_, **__: tiny_base())
    return tiny_base()


def write_table(folder, base, entries=3, scaling=2.0, tasks=TASKS, codes=0):
    """A table of random LoRAs for q_proj, as `launch.export` would write it."""
    config = t2l.get_config('multitask')
    config.hypernetwork.modules = ('q_proj',)
    config.hypernetwork.shape.update(
        {'rank': 2, 'scaling': scaling, 'entries': entries, 'codes': codes}
    )
    config.data.sources = ({'reader': 'generated', 'names': TASKS, 'train': 4, 'test': 2},)
    config.data.tasks = tasks
    built = hypernetwork.build(config.hypernetwork, base)
    params = nn.unbox(jax.jit(built.init)(jax.random.key(0), base.params))
    rng = np.random.default_rng(1)
    params = {
        # Representable as bf16, in which exports are kept.
        name: np.asarray(rng.integers(-8, 8, x.shape) / 64, np.float32)
        for name, x in params.items()
    }
    record = {
        'config': config.to_dict(),
        'base_fingerprint': base.fingerprint,
        'encoder_fingerprint': base.fingerprint,
        'step': 0,
    }
    checkpointing.export(folder, params, record)
    return params


def settings(table, variant='reconstruction', **shape):
    config = t2l.get_config(f'{variant},{table}')
    config.hypernetwork.modules = ('q_proj',)
    config.hypernetwork.shape.update(
        {'rank': 2, 'scaling': 2.0, 'latent_size': 32, 'head_width': 32, **shape}
    )
    config.groups = 3
    config.log_every, config.checkpoint_every = 1, 15
    config.optimizer.update({'steps': 30, 'warmup_steps': 2, 'learning_rate': 1e-2})
    return config


def test_targets_are_the_entries():
    rng = np.random.default_rng(0)
    loras = {'a_down_proj': rng.random((3, 5, 2, 7)), 'b_down_proj': rng.random((3, 5, 2, 4))}
    embeddings = [np.full((2, 6), task) + [[0], [0.5]] for task in range(5)]
    source = Targets(loras, embeddings, z_score=True, noise=0.0, seed=3, length=20)
    assert len(source) == 20
    seen = []
    for index in range(20):
        item = source[index]
        task = int(item['context']['task'][0])
        assert int(item['context']['embedding'][0, 0]) == task
        for key in 'ab':
            entries = loras[f'{key}_down_proj']
            pair = item['target']['down_proj']
            np.testing.assert_array_equal(pair[key][0], entries[:, task])
            np.testing.assert_allclose(
                pair[f'{key}_deviation'][0], entries.std(1, ddof=1), rtol=1e-12
            )
        seen.append((task, float(item['context']['embedding'][0, 0] % 1)))
    for epoch in range(4):  # each task once
        assert {task for task, _ in seen[5 * epoch : 5 * epoch + 5]} == set(range(5))
    assert len({tuple(t for t, _ in seen[5 * e : 5 * e + 5]) for e in range(4)}) > 1
    assert {variant for _, variant in seen} == {0, 0.5}


def test_statistics_of_one_entry():
    found = statistics({'a_q_proj': np.ones((2, 1, 3, 4))})
    np.testing.assert_array_equal(found['mean']['a_q_proj'], np.ones((2, 3, 4)))
    np.testing.assert_array_equal(found['deviation']['a_q_proj'], np.zeros((2, 3, 4)))


def test_training_towards_loras(base, tmp_path, monkeypatch):
    """The loop starts from the targets' statistics, comes nearer to them, resumes exactly."""
    params = write_table(tmp_path / 'table', base)
    config = settings(tmp_path / 'table')
    found = statistics(params)
    state = meta_learning.train(config.copy_and_resolve_references(), str(tmp_path / 'run'))
    for kind in ('mean', 'deviation'):
        for name, wanted in found[kind].items():
            np.testing.assert_allclose(state.params[f'{kind}_{name}'], wanted, rtol=1e-6)
    log = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    # A z-score of 0 for all, the mean LoRA, has an error of about 0.8 deviations.
    assert log[-1]['loss'] < 0.85 * log[0]['loss'] and log[-1]['error'] < log[0]['error']

    half = tmp_path / 'half'
    update = meta_learning.Progress.update

    def preempt(self, step):
        update(self, step)
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(meta_learning.Progress, 'update', preempt)
        meta_learning.train(config.copy_and_resolve_references(), str(half))
    resumed = meta_learning.train(config.copy_and_resolve_references(), str(half))
    assert int(resumed.step) == 30
    jax.tree.map(np.testing.assert_array_equal, resumed.params, state.params)

    model = trained.load(str(tmp_path / 'run'), base)
    assert tuple(model.config.data.tasks) == TASKS


def test_a_multitask_lora_as_offset(base, tmp_path):
    params = write_table(tmp_path / 'table', base)
    config = settings(tmp_path / 'table', z_score=False, offset=True, head_init='zero')
    built = hypernetwork.build(config.hypernetwork, base)
    fresh = nn.unbox(jax.jit(built.init)(jax.random.key(0), built.encoder.params))
    context = {'embedding': np.ones((1, 384), np.float32)}
    made, _ = built.generate(built.start(fresh), None, context)
    mean = jax.tree.map(lambda x: x.mean(1), params)
    np.testing.assert_allclose(made.pairs['q_proj'].a[:, 0], mean['a_q_proj'], rtol=1e-5)
    np.testing.assert_allclose(made.pairs['q_proj'].b[:, 0], mean['b_q_proj'], rtol=1e-5)


def test_heads_of_a_table_with_codes(base, tmp_path):
    """They are taken over: a hypernetwork that gives a task's code makes the task's LoRA."""
    params = write_table(tmp_path / 'table', base, codes=5)
    config = settings(tmp_path / 'table', 'from_codes', head_width=5)
    built = hypernetwork.build(config.hypernetwork, base)
    fresh = nn.unbox(jax.jit(built.init)(jax.random.key(0), built.encoder.params))
    started = built.start(fresh)
    last = started['mlp3_down']
    entries = factors(params)
    assert np.ptp(entries['b_q_proj'], axis=1).max() > 0.04
    for task in range(3):
        code = {'kernel': np.zeros_like(last['kernel']), 'bias': params['codes'][task]}
        context = {'embedding': np.ones((1, 384), np.float32)}
        made, _ = built.generate({**started, 'mlp3_down': code}, None, context)
        pair = made.pairs['q_proj']
        np.testing.assert_allclose(pair.a[:, 0], entries['a_q_proj'][:, task], atol=1e-6)
        np.testing.assert_allclose(pair.b[:, 0], entries['b_q_proj'][:, task], atol=1e-6)
    config.hypernetwork.shape.head_width = 6
    with pytest.raises(UserError, match='the codes have width 5, the heads read 6'):
        hypernetwork.build(config.hypernetwork, base).start(fresh)
    write_table(tmp_path / 'plain', base)
    config = settings(tmp_path / 'plain', 'from_codes', head_width=5)
    with pytest.raises(UserError, match='plain holds plain LoRAs, not codes'):
        hypernetwork.build(config.hypernetwork, base).start(fresh)


def test_training_towards_codes(base, tmp_path):
    write_table(tmp_path / 'table', base, codes=5)
    config = settings(tmp_path / 'table', 'from_codes', head_width=5)
    meta_learning.train(config, str(tmp_path / 'run'))
    log = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert log[-1]['loss'] < 0.6 * log[0]['loss']
    assert log[-1]['loss'] == log[-1]['error']  # no z-scores


def test_loras_that_do_not_fit(base, tmp_path):
    def refused(message, **changes):
        config = settings(tmp_path / 'table', **changes)
        with pytest.raises(UserError, match=message):
            meta_learning.train(config, str(tmp_path / 'run'))

    write_table(tmp_path / 'table', base)
    refused('rank 2, those of the config 4', rank=4)
    refused('scaling 2.0, those of the config 3', scaling=3.0)
    write_table(tmp_path / 'one', base, entries=1)
    config = settings(tmp_path / 'one')
    with pytest.raises(UserError, match='holds 1 LoRAs of 3 tasks'):
        meta_learning.train(config, str(tmp_path / 'run'))
    write_table(tmp_path / 'other', base, tasks=('first_word',))
    with pytest.raises(UserError, match='was trained on are not there any more'):
        meta_learning.train(settings(tmp_path / 'other'), str(tmp_path / 'run'))
    with pytest.raises(UserError, match='name the LoRAs to reconstruct'):
        t2l.get_config('reconstruction')
    with pytest.raises(UserError, match='objective reconstruction: .*factors'):
        meta_learning.objectives.build(ConfigDict({'name': 'reconstruction', 'factors': 1}))
