"""The commands on a tiny, untrained hypernetwork for the real SmolLM2, in this process."""

import functools
import importlib
import json
import re
import runpy
import shutil
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors
from absl import app, flags
from test_reconstruction import write_table

from configs import d2l_niah
from configs import t2l as t2l_config
from d2l import distillation, haystacks, niah_evaluation, prompts, records
from d2l.internalize import Internalizer
from d2l.niah import NEEDLE, QUESTION, Writer, random_numbers
from hyperlora import (
    adapters,
    checkpointing,
    generation,
    hosts,
    hypernetwork,
    lora_table,
    meta_learning,
    session,
    trained,
)
from hyperlora.models import base as base_models
from hyperlora.models import weights
from hyperlora.session import Session
from t2l import evaluation as t2l_evaluation
from t2l.specialize import Specializer
from t2l.tasks import Task

QUANTIZATIONS = []  # that base models were asked for with; they come without
DOCUMENT = 'The keeper of the lighthouse is called Mara. ' * 30


@pytest.fixture(scope='module', autouse=True)
def base():
    """SmolLM2, loaded once for all commands."""
    load = functools.cache(base_models.load_base)

    def noted(name, dtype='float32', mesh=None, quantization='none', images=False):
        QUANTIZATIONS.append(quantization)
        return load(name)

    with pytest.MonkeyPatch.context() as patch:
        for module in (base_models, session, trained):
            patch.setattr(module, 'load_base', noted)
        yield load('smollm2')


@pytest.fixture(scope='module')
def untrained(base):
    """(config, parameters) of a hypernetwork whose LoRAs change the answers."""
    config = d2l_niah.get_config('tiny')
    config.chunk_length = 128
    built = hypernetwork.build(config.hypernetwork, base)
    params = jax.jit(lambda frozen: nn.unbox(built.init(jax.random.key(0), frozen)))(base.params)
    rng = np.random.default_rng(0)
    return config, jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params
    )


@pytest.fixture(scope='module')
def checkpoint(base, untrained, tmp_path_factory):
    config, params = untrained
    folder = tmp_path_factory.mktemp('checkpoint') / 'tiny'
    checkpointing.export(
        folder,
        params,
        {
            'config': config.to_dict(),
            'base_fingerprint': base.fingerprint,
            'encoder_fingerprint': base.fingerprint,
            'step': 0,
        },
    )
    return folder


@pytest.fixture
def document(tmp_path):
    path = tmp_path / 'document.txt'
    path.write_text(DOCUMENT, encoding='utf-8')
    return path


def execute(name, run_name='__main__'):
    """Runs launch/NAME.py and forgets its flags, which other commands define too."""
    app.define_help_flags()
    known = set(flags.FLAGS)
    if 'launch.distributed' in sys.modules:  # it defines flags when it is imported
        importlib.reload(sys.modules['launch.distributed'])
    try:
        return runpy.run_module(f'launch.{name}', run_name=run_name)
    finally:
        for flag in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, flag)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(name, **settings):
        settings = [
            f'--{key.replace("config_", "config.")}={value}' for key, value in settings.items()
        ]
        monkeypatch.setattr(sys, 'argv', [name, *settings])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            execute(name)
        return stop.value.code or 0, *capsys.readouterr()

    return run


def assert_mistake(result, *parts):
    code, out, err = result
    assert code == 2 and not out
    assert err.startswith('error: ') and len(err.splitlines()) == 1, err
    for part in parts:
        assert part in err


# ------------------------------------------------------------------------- adapt, ask, export


def test_adapt_and_ask(command, checkpoint, document, base, tmp_path):
    adapter = tmp_path / 'adapter'
    code, out, err = command('adapt', checkpoint=checkpoint, document=document, output=adapter)
    assert code == 0, err
    tokens = base.tokenizer.encode(DOCUMENT)
    expected = Internalizer(trained.load(str(checkpoint), base))(tokens)
    assert f'{len(tokens)} tokens' in out and f'{expected.nbytes} bytes' in out
    saved = adapters.load(adapter, base.config, base.fingerprint)
    folded = {
        name: pair.replace(b=pair.b * expected.scaling) for name, pair in expected.pairs.items()
    }
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), saved.pairs, folded
    )

    code, out, err = command('ask', adapter=adapter, question='Who?', max_new_tokens=6)
    assert code == 0, err
    assert QUANTIZATIONS[-2:] == ['none', 'none']
    for name, settings in {
        'adapt': {'checkpoint': checkpoint, 'document': document, 'output': tmp_path / 'other'},
        'ask': {'adapter': adapter, 'question': 'Who?', 'max_new_tokens': 1},
    }.items():
        assert command(name, base_quantization='int8', **settings)[0] == 0
        assert QUANTIZATIONS[-1] == 'int8'
    prompt = base.tokenizer.prompt('Who?')
    assert out == generation.answer(base, [prompt], 6, expected)[0] + '\n'
    assert out != generation.answer(base, [prompt], 6)[0] + '\n'

    command('adapt', checkpoint=checkpoint, document=document, output=adapter, iterative=True)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
        adapters.load(adapter).pairs,
        folded,
    )


def test_merged_model_equals_adapted(command, checkpoint, document, base, tmp_path):
    adapter, merged = tmp_path / 'adapter', tmp_path / 'merged'
    command('adapt', checkpoint=checkpoint, document=document, output=adapter, format='peft')
    tokens = tmp_path / 'tokens.npz'
    prompt = base.tokenizer.prompt('Who keeps the lighthouse?')
    padded = np.zeros((2, len(prompt) + 3), np.int32)
    padded[0, : len(prompt)], padded[1, 3:] = prompt, prompt
    np.savez(tokens, input_ids=padded, attention_mask=padded > 0)

    def full_disk(*_):
        raise OSError(28, 'No space left on device')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, 'save_hf', full_disk)
        code, out, err = command('merge', adapter=adapter, output=merged)
    assert code == 2 and 'No space left' in err and not list(merged.iterdir())
    code, out, err = command('merge', adapter=adapter, output=merged)
    assert code == 0, err
    for name, settings in {
        'adapted': {'model': 'smollm2', 'adapter': adapter},
        'merged': {'model': merged},
        'base': {'model': 'smollm2'},
    }.items():
        code, out, err = command(
            'logits', input=tokens, output=tmp_path / f'{name}.npz', **settings
        )
        assert code == 0, err
    adapted, merged, plain = (
        np.load(tmp_path / f'{name}.npz') for name in ('adapted', 'merged', 'base')
    )
    assert adapted['hidden_states'].shape == (31, 2, padded.shape[1], 576)
    real = padded > 0
    scale = np.abs(adapted['logits']).max()
    np.testing.assert_allclose(
        merged['logits'][real], adapted['logits'][real], rtol=0, atol=1e-4 * scale
    )
    assert np.abs(plain['logits'] - adapted['logits'])[real].max() > 1e-2 * scale
    # Padding, on whichever side, changes nothing.
    left, right = adapted['logits'][1, 3:], adapted['logits'][0, : len(prompt)]
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    'arrays, part',
    [
        ({'tokens': [[1]]}, 'holds no input_ids, only tokens'),
        ({'input_ids': [[0.5]]}, 'must be integers [b, s], not float64'),
        ({'input_ids': [[49152]]}, 'from 0 to 49151, found 49152'),
        ({'input_ids': [[2**32 + 5]]}, 'found 4294967301'),
        ({'input_ids': [[1, 2]], 'attention_mask': [[1]]}, 'attention_mask is (1, 1)'),
    ],
)
def test_bad_tokens(command, tmp_path, arrays, part):
    np.savez(tmp_path / 'in.npz', **arrays)
    settings = {'model': 'smollm2', 'output': tmp_path / 'out.npz'}
    assert_mistake(command('logits', input=tmp_path / 'in.npz', **settings), part)
    (tmp_path / 'in.npz').write_bytes(b'PK\x03\x04 cut')
    assert_mistake(command('logits', input=tmp_path / 'in.npz', **settings), 'not a readable .npz')
    np.save(tmp_path / 'in.npy', np.zeros((1, 2), int))
    assert_mistake(command('logits', input=tmp_path / 'in.npy', **settings), 'not a readable .npz')
    assert not (tmp_path / 'out.npz').exists()


@pytest.fixture(scope='module')
def task_checkpoint(base, tmp_path_factory):
    config = t2l_config.get_config('tiny')
    built = hypernetwork.build(config.hypernetwork, base)
    params = nn.unbox(jax.jit(built.init)(jax.random.key(0), None))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    folder = tmp_path_factory.mktemp('checkpoint') / 'tiny'
    record = {
        'config': config.to_dict(),
        'base_fingerprint': base.fingerprint,
        'encoder_fingerprint': built.encoder.fingerprint,
        'step': 0,
    }
    checkpointing.export(folder, params, record)
    return folder


def test_adapt_to_a_task(command, checkpoint, task_checkpoint, document, base, tmp_path):
    task, output = 'Write the word in capital letters.', tmp_path / 'adapter'
    code, out, err = command('adapt', checkpoint=task_checkpoint, task=task, output=output)
    assert code == 0 and 'rank 8' in out, err
    wrong = command('adapt', checkpoint=task_checkpoint, task=task, output=output, iterative=True)
    assert_mistake(wrong, '--iterative is for documents')
    wanted = Specializer(trained.load(str(task_checkpoint), base))(['Another task.', task])
    saved = adapters.load(output, base.config, base.fingerprint)
    np.testing.assert_allclose(
        saved.pairs['q_proj'].b[:, 0],
        wanted.pairs['q_proj'].b[:, 1] * wanted.scaling,
        rtol=1e-4,
        atol=1e-4,
    )
    with safetensors.safe_open(output / 'adapter_model.safetensors', 'numpy') as file:
        assert file.metadata()['task'] == task

    def refused(*parts, **settings):
        assert_mistake(command('adapt', output=tmp_path / 'none', **settings), *parts)

    refused('one of --document and --task', checkpoint=task_checkpoint)
    refused('description', checkpoint=task_checkpoint, task=' ')
    refused('doc_to_lora, which reads mask, tokens', checkpoint=checkpoint, task=task)
    refused('text_to_lora, which reads embedding', checkpoint=task_checkpoint, document=document)


def test_evaluate_tasks(command, task_checkpoint, base, tmp_path, monkeypatch):
    monkeypatch.setattr(t2l_evaluation, '_ROWS', 4)
    train = [{'input': word, 'output': word.upper()} for word in ('red', 'blue', 'green', 'grey')]
    test = [
        {
            'input': 'What is the capital of France?',
            'output': ['Paris', 'The capital of France is Paris.'],
        }
    ]
    task = {'name': 'shout', 'source': 'mine', 'license': 'CC0', 'train': train, 'test': test}
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks/shout.json').write_text(json.dumps({**task, 'descriptions': []}))
    settings = {
        'config': 'configs/eval_t2l.py',
        'checkpoint': task_checkpoint,
        'workdir': tmp_path / 'run',
        'config_tasks': tmp_path / 'tasks',
        'config_generated': False,
        'config_seeds': 1,
    }
    assert_mistake(command('evaluate', **settings), 'shout', '--config.descriptions')
    settings['config_descriptions'] = tmp_path / 'given.yaml'
    (tmp_path / 'given.yaml').write_text('')
    assert_mistake(command('evaluate', **settings), 'given.yaml: it must map names of tasks')
    (tmp_path / 'given.yaml').write_text('shout: []')
    assert_mistake(command('evaluate', **settings), "given.yaml: no descriptions of 'shout'")
    (tmp_path / 'given.yaml').write_text('shout: [Louder.]\nshuot: [Louder.]')
    assert_mistake(command('evaluate', **settings), 'given.yaml: shuot: no such tasks')
    (tmp_path / 'given.yaml').write_text('shout: [Say it in capitals.]')
    assert_mistake(command('evaluate', **settings), 'other_description', 'a second task')
    whisper = {**task, 'name': 'whisper', 'descriptions': ['Say it softly.', 'Whisper it.']}
    (tmp_path / 'tasks/whisper.json').write_text(json.dumps(whisper))
    code, out, err = command('evaluate', **settings)
    assert code == 0, err
    metrics = json.loads((tmp_path / 'run/metrics.json').read_text())
    scores = metrics['exact_match']
    assert set(scores) == {'shout', 'whisper'}
    plain = {'known_description', 'multitask', 'per_task', 'average'}
    assert set(scores['shout']) == set(t2l_evaluation.METHODS) - plain
    # Alone the base model answers rightly; what is added to prompt or weights confuses it.
    assert scores['shout']['zero_shot'] == 1 and scores['shout']['description_in_prompt'] == 0
    assert metrics['average']['unseen']['zero_shot'] == 1 and metrics['seen'] == []
    (tmp_path / 'given.yaml').write_text('shout: [Say it in large letters.]')
    assert_mistake(command('evaluate', **settings), 'other settings (texts: ', 'another workdir')
    long = [{'input': 'word ' * 3000 + str(i), 'output': 'x'} for i in range(4)]
    (tmp_path / 'tasks/whisper.json').write_text(json.dumps({**whisper, 'train': long}))
    settings['workdir'], settings['config_methods'] = tmp_path / 'long', 'zero_shot,three_shot'
    assert command('evaluate', **settings)[0] == 0
    scores = json.loads((tmp_path / 'long/metrics.json').read_text())['exact_match']
    assert set(scores['whisper']) == {'zero_shot'} and 'three_shot' in scores['shout']
    settings['config_methods'] = 't2l,zero_shot,guess'
    assert_mistake(command('evaluate', **settings), 'unknown methods guess;')

    settings['config_methods'] = 'zero_shot,known_description,multitask,per_task,average'
    settings['workdir'] = tmp_path / 'plain'
    assert_mistake(command('evaluate', **settings), '--config.multitask=CHECKPOINT')
    write_table(tmp_path / 'one', base, entries=1, tasks=('whisper', 'other'), scaling=0.0)
    write_table(tmp_path / 'table', base, entries=2, tasks=('whisper', 'other'), scaling=200.0)
    settings['config_multitask'] = tmp_path / 'one'
    settings['config_per_task'] = task_checkpoint
    assert_mistake(command('evaluate', **settings), 'text_to_lora; a lora_table is needed')
    settings['config_per_task'] = tmp_path / 'one'
    assert_mistake(command('evaluate', **settings), 'per_task has 1 LoRAs, but 2 tasks')
    settings['config_multitask'] = settings['config_per_task'] = tmp_path / 'table'
    assert_mistake(command('evaluate', **settings), 'has 2 LoRAs; one for all')
    settings['config_multitask'] = tmp_path / 'one'
    code, out, err = command('evaluate', **settings)
    assert code == 0, err
    metrics = json.loads((tmp_path / 'plain/metrics.json').read_text())
    # A LoRA that does nothing answers as the base model does; random ones confuse it.
    assert metrics['exact_match'] == {
        'shout': {'zero_shot': 1.0, 'multitask': 1.0, 'average': 0.0},
        'whisper': {'zero_shot': 1.0, 'multitask': 1.0, 'per_task': 0.0, 'average': 0.0},
    }
    assert 'per_task' not in metrics['average']['unseen']


def test_descriptions_of_tasks_that_were_trained_on(task_checkpoint, base, monkeypatch):
    model = trained.load(str(task_checkpoint), base)
    model.config.data.tasks = ('shout',)
    methods = t2l_evaluation.Methods(Specializer(model), [])
    monkeypatch.setattr(methods, '_described', lambda description, examples: [description])
    parts = {'source': '', 'license': '', 'train': (), 'test': ()}
    texts = {'descriptions': ('One.', 'Two.'), 'test_descriptions': ('Three.',)}
    shout, whisper = (Task(name=name, **parts, **texts) for name in ('shout', 'whisper'))
    assert {*(methods.t2l(shout, seed, ())[0] for seed in range(3))} == {'Three.'}
    assert {*(methods.t2l(whisper, seed, ())[0] for seed in range(3))} == {'One.', 'Two.', 'Three.'}
    known = [methods.known_description(shout, seed, ()) for seed in range(3)]
    assert known == [['One.'], ['Two.'], ['One.']]
    assert methods.known_description(whisper, 0, ()) is None


def test_export_of_a_training(command, untrained, base, tmp_path, monkeypatch):
    config, params = untrained
    saver = checkpointing.Checkpointer(tmp_path / 'run' / 'checkpoints', 2)
    meta = {
        'config': config.to_dict(),
        'base_fingerprint': base.fingerprint,
        'encoder_fingerprint': base.fingerprint,
    }
    for step in (2, 10):
        state = meta_learning.TrainState(step, jax.tree.map(lambda x, s=step: x * s, params), {})
        saver.save(step, state, meta)
    saver.close()
    code, out, err = command('export', workdir=tmp_path / 'run', output=tmp_path / 'shipped')
    assert (code, err) == (0, '') and 'step 10' in out
    assert json.loads((tmp_path / 'shipped/config.json').read_text())['step'] == 10
    for folder in ('run', 'shipped'):
        model = trained.load(str(tmp_path / folder), base)
        assert model.config.to_dict() == json.loads(json.dumps(config.to_dict()))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, 10 * y, rtol=1e-2), model.params, params
        )
    export = {'workdir': tmp_path / 'run', 'output': tmp_path / 'mean'}
    code, out, err = command('export', average_with=tmp_path / 'half', **export)
    assert_mistake((code, out, err), 'half')
    half = jax.tree.map(lambda x: 5 * np.asarray(x), params)
    checkpointing.export(tmp_path / 'half', half, meta, 'float32')
    code, out, err = command('export', average_with=tmp_path / 'half', **export)
    assert (code, err) == (0, '') and f'step 10 of {tmp_path}/run, averaged with' in out
    mean = trained.load(str(tmp_path / 'mean'), base).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 7.5 * y, rtol=1e-2), mean, params)
    # What launch.convert writes is of no step.
    path = tmp_path / 'shipped/config.json'
    bare = {key: value for key, value in json.loads(path.read_text()).items() if key != 'step'}
    path.write_text(json.dumps(bare))
    monkeypatch.setenv('HOME', str(tmp_path))
    code, out, err = command('export', workdir='~/shipped', output='~/again')
    assert (code, err) == (0, '') and 'step' not in out
    assert json.loads((tmp_path / 'again/config.json').read_text()) == bare
    refused = command('export', workdir=tmp_path / 'shipped', output='gs://bucket/x')
    assert_mistake(refused, 'gs://bucket/x: not a local directory')


@pytest.mark.parametrize('key', ['base', 'hypernetwork.embedder'])
def test_a_model_that_has_moved(command, task_checkpoint, key, tmp_path):
    shutil.copytree(task_checkpoint, tmp_path / 'moved')
    path = tmp_path / 'moved/config.json'
    record = json.loads(path.read_text())
    group, _, name = key.rpartition('.')
    settings = record['config'][group] if group else record['config']
    settings[name] = '/nowhere/model'
    path.write_text(json.dumps(record))
    result = command('adapt', checkpoint=path.parent, task='Say no.', output=tmp_path / 'lora')
    assert_mistake(result, '/nowhere/model, which is not there', f'as {key} of its config.json')


def test_quickstart_compares_three_ways(checkpoint, base, capsys):
    compare = execute('quickstart', 'quickstart')['compare']
    capsys.readouterr()
    text = f'{NEEDLE.format(4821)} {DOCUMENT}'
    compare(Session(str(checkpoint)), text, [QUESTION, 'And again?'], 16)
    first, *tables = capsys.readouterr().out.split('\n\n')
    tokens = len(base.tokenizer.encode(text))
    assert first.startswith(f'{tokens} tokens -> LoRA of ')
    for question, table in zip((QUESTION, 'And again?'), tables, strict=True):
        lines = table.splitlines()
        assert lines[0] == question
        assert [line[:7] for line in lines[1:]] == ['documen', 'interna', 'nowhere', 'in the ']
        assert f'{2 * 30 * 3 * 64 * 4 * tokens / 1e6:.1f}' in lines[4]
    assert '4821' in tables[0].splitlines()[4]


def test_quickstart_describes_a_task(task_checkpoint, base, capsys):
    """Each input beside the answer with the LoRA and the one with the description in the prompt."""
    specialise = execute('quickstart', 'quickstart')['specialise']
    capsys.readouterr()
    task, inputs = 'Shout the word.', ['red', 'What is the capital of France?']
    specialise(Session(tasks=str(task_checkpoint), base=base), task, inputs)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f'{task} -> LoRA of ') and len(lines) == 5
    lora = Specializer(trained.load(str(task_checkpoint), base))([task])

    def answers(before, lora=None):
        prompts = [base.tokenizer.prompt(before + text) for text in inputs]
        return generation.answer(base, prompts, 16, lora)

    for line, *parts in zip(
        lines[3:], inputs, answers('', lora), answers(f'{task}\n\n'), strict=True
    ):
        assert ''.join(line.split()) == ''.join(' '.join(parts).split())


@pytest.mark.slow
def test_a_reader_is_trained_and_teaches(command, checkpoint, base, tmp_path):
    """Given answers -> a reader -> its answers as records; and it reads in the evaluation."""
    given, reader, taught, data = (tmp_path / n for n in ('given', 'reader', 'taught', 'a.jsonl'))
    entry = {'text': 'Mara keeps the lighthouse.', 'question': 'Who?', 'answers': ['Mara']}
    data.write_text(json.dumps(entry))
    source = {'config': f'configs/documents.py:jsonl,{data}', 'config_shards': 1}
    limit = 32  # the answer ends before
    short = {'config_settings.max_answer_tokens': limit}
    made = {'config_settings.answers': 'given', 'config_settings.entries': 0}
    code, out, err = command('generate_data', output=given, **source, **made)
    assert code == 0 and '1 of 1 documents' in out, err
    steps = {f'config_{key}': 2 for key in ('optimizer.steps', 'groups')}
    steps['config_optimizer.warmup_steps'] = 2
    assert_mistake(
        command('train', config=f'configs/reader.py:{given}', workdir=reader, **steps),
        'warmup_steps',
    )
    steps['config_optimizer.warmup_steps'] = 1
    small = {'config_data.row_tokens': 64, 'config_data.row_labels': 8}
    code, out, err = command(
        'train', config=f'configs/reader.py:{given}', workdir=reader, **steps, **small
    )
    assert code == 0, err
    code, out, err = command(
        'generate_data', **source, **short, config_reader=reader, output=taught
    )
    assert code == 0, err
    lora = lora_table.entries(trained.load(str(reader), base), 0)
    assert [len(records.Records(str(folder))) for folder in (given, taught)] == [1, 1]
    prompt = prompts.in_context_prompt(base, base.tokenizer.encode(entry['text']), 'Who?', limit)
    (wanted,) = generation.answer(base, [prompt], limit, lora)
    query = records.Records(str(taught))[0].queries[0]
    assert base.tokenizer.decode(query.answer[:-1]) == wanted
    assert query.teacher_ids.shape == (len(query.answer), 16)
    settings = {'config': 'configs/eval_qa.py', 'checkpoint': checkpoint, 'config_data': data}
    code, out, err = command(
        *('evaluate',),
        **settings,
        **{'config_reader': reader, 'config_methods': 'in_context', 'config_max_new_tokens': limit},
        workdir=tmp_path / 'scores',
    )
    assert code == 0, err
    metrics = json.loads((tmp_path / 'scores/metrics.json').read_text())
    assert metrics['documents']['1']['methods']['in_context']['answers'] == [wanted]
    data.write_text(json.dumps({'text': 'Mara keeps the lighthouse.'}))
    assert_mistake(command('generate_data', output=tmp_path / 'none', **source), 'has a question')


@pytest.fixture
def make_data(command, tmp_path, monkeypatch):
    """Runs generate_data on seven documents, of which the teacher makes one record each."""

    def made(teacher, tokenizer, documents, settings):
        for document in documents:
            query = records.Query(np.arange(3), np.arange(2))
            yield records.Record(document.name, np.arange(5), (query,), (np.arange(6),))

    monkeypatch.setattr(distillation, 'records', made)
    data = tmp_path / 'a.jsonl'
    data.write_text('\n'.join(json.dumps({'text': 'a', 'question': 'b?'}) for _ in range(7)))
    source = {'config': f'configs/documents.py:jsonl,{data}', 'output': tmp_path / 'out'}
    return functools.partial(command, 'generate_data', **source)


def test_processes_make_every_shard_once(make_data, tmp_path, monkeypatch):
    """Also if one begins when another has ended; all must agree on what they make."""
    agreed, shared, written = [], [], []
    monkeypatch.setattr(hosts, 'check_agreement', agreed.append)
    monkeypatch.setattr(hosts, 'check_shared', shared.append)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, 'process_index', lambda i=process: i)
        code, out, err = make_data(config_shards=5)
        assert code == 0, err
        written.append(re.findall(r'documents-0*(\d)-of', out))
    assert written == [['0', '2', '4'], ['1', '3']]
    assert len(records.Records(str(tmp_path / 'out'))) == 7
    assert agreed[0] == agreed[1] and agreed[0]['output'] == str(tmp_path / 'out')
    assert agreed[0]['config']['shards'] == 5
    assert shared == [tmp_path / 'out'] * 2


def test_data_go_on_after_the_last_whole_file(make_data, tmp_path):
    code, _, err = make_data(config_shards=3)
    assert code == 0, err
    (tmp_path / 'out' / 'documents-00001-of-00003.json').unlink()
    code, out, err = make_data(config_shards=3)
    assert code == 0 and re.findall(r'documents-0*(\d)-of', out) == ['1'], err
    assert len(records.Records(str(tmp_path / 'out'))) == 7
    assert_mistake(make_data(config_shards=3, config_limit=5), 'made with other settings')
    assert_mistake(make_data(config_shards=2), 'holds other records')


def test_data_that_cannot_be_made(make_data, monkeypatch):
    for settings, part in (
        ({'config_shards': 0}, 'shards must be positive'),
        ({'config_limit': -5}, 'limit not negative'),
        ({'config_settings.entries': -1}, 'entries must be at least 0'),
    ):
        assert_mistake(make_data(**settings), part)
    monkeypatch.setattr(distillation, 'records', lambda *_: iter(()))
    code, _, err = make_data()
    assert code == 2 and err.startswith('error: ') and 'no document had a question' in err


# ----------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ('content', 'part'), [(None, 'No such file'), (b' \n', 'empty'), (b'caf\xe9', 'UTF-8')]
)
def test_bad_documents(command, checkpoint, tmp_path, content, part):
    path = tmp_path / 'bad.txt'
    if content is not None:
        path.write_bytes(content)
    assert_mistake(
        command('adapt', checkpoint=checkpoint, document=path, output=tmp_path / 'out'), part
    )


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """Copies of the checkpoint that cannot be loaded."""

    def damage(how):
        folder = tmp_path / 'damaged'
        if how == 'unknown':
            return 'no-such-weights'
        shutil.copytree(checkpoint, folder)
        if how == 'truncated':
            path = folder / 'params.safetensors'
            path.write_bytes(path.read_bytes()[:-100])
        else:
            path = folder / 'config.json'
            path.write_text(
                re.sub(r'"base_fingerprint": "\w+"', '"base_fingerprint": "beef"', path.read_text())
            )
        return folder

    return damage


@pytest.mark.parametrize(
    ('how', 'part'),
    [('unknown', 'no-such-weights'), ('truncated', 'params.safetensors'), ('foreign', 'beef')],
)
def test_bad_checkpoints(command, damaged, document, tmp_path, how, part):
    assert_mistake(
        command('adapt', checkpoint=damaged(how), document=document, output=tmp_path / 'out'), part
    )


def test_outputs_in_the_way(command, checkpoint, document):
    assert_mistake(
        command('adapt', checkpoint=checkpoint, document=document, output=document),
        'not a writable directory',
    )
    assert_mistake(
        command('evaluate', config='configs/eval_niah.py', checkpoint=checkpoint, workdir=document),
        'not a writable directory',
    )


def test_other_mistakes(command, document, tmp_path):
    for half in ({'document': document}, {'question': 'Who?'}):
        assert_mistake(command('quickstart', **half), '--document', '--question')
    for half in ({'task': 'Shout.'}, {'input': 'red'}):
        assert_mistake(command('quickstart', **half), '--task', '--input')
    assert_mistake(command('quickstart', image=document), f'{document}', 'not an image')
    assert_mistake(command('ask', adapter=tmp_path, question='Who?'), 'adapter_config.json')
    (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    assert_mistake(command('ask', adapter=tmp_path, question='Who?'), 'is None', '--base')
    assert_mistake(command('merge', adapter=tmp_path, output=tmp_path / 'out'), '--base')
    assert_mistake(
        command('export', workdir=tmp_path, output=tmp_path / 'out'), 'unknown checkpoint'
    )
    assert_mistake(
        command('evaluate', config='configs/d2l_niah.py:tiny', workdir=tmp_path),
        "'d2l_niah'",
        'eval_niah',
    )
    assert_mistake(
        command('evaluate', config='configs/eval_niah.py', workdir=tmp_path, config_lengths='64,0'),
        'lengths',
    )
    assert_mistake(
        command(
            'evaluate',
            config='configs/eval_niah.py',
            workdir=tmp_path,
            config_baseline_examples=101,
        ),
        'baseline_examples',
    )


# --------------------------------------------------------------------------------- evaluation


def test_evaluate_equals_a_direct_computation(command, checkpoint, base, tmp_path):
    code, out, err = command(
        'evaluate',
        config='configs/eval_niah.py',
        checkpoint=checkpoint,
        workdir=tmp_path,
        config_lengths='64,128',
        config_examples=2,
        config_baseline_examples=2,
        config_seed=7,
    )
    assert code == 0, err
    assert [line.split(':')[0] for line in out.splitlines()] == ['64 tokens', '128 tokens']
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    settings = metrics['settings']
    assert (settings['base'], settings['seed'], settings['examples']) == ('smollm2', 7, 2)
    internalizer = Internalizer(trained.load(str(checkpoint), base))
    question = base.tokenizer.prompt(QUESTION)
    for length in (64, 128):
        right, named = ({'d2l': [], 'no_document': [], 'in_context': []} for _ in range(2))
        for i in range(2):
            rng = np.random.default_rng((7, length, i))
            (number,) = random_numbers(rng, 1)
            tokens = (
                Writer(base.tokenizer)
                .write(rng, haystacks.grass, length, NEEDLE.format(number), float(i))
                .tokens
            )
            text = base.tokenizer.decode(tokens)
            assert text.endswith(number + '.') if i else text.startswith(NEEDLE.format(number))
            adapter = internalizer(tokens)
            full = base.tokenizer.prompt(f'{text}\n\n{QUESTION}')
            for method, prompt, used in (
                ('d2l', question, adapter),
                ('no_document', question, None),
                ('in_context', full, None),
            ):
                answer = generation.answer(base, [prompt], 16, used)[0]
                right[method].append(answer.strip() == number)
                named[method].append(niah_evaluation.right_number(answer, number))
        assert metrics['exact_match'][str(length)] == {m: np.mean(r) for m, r in right.items()}
        assert metrics['right_number'][str(length)] == {m: np.mean(r) for m, r in named.items()}
        assert metrics['counts'][str(length)] == dict.fromkeys(right, 2)
        assert metrics['seconds'][str(length)].keys() == right.keys()
        assert metrics['depth'][str(length)] == {
            '0.0-0.1': {'exact_match': right['d2l'][0], 'n': 1},
            '0.9-1.0': {'exact_match': right['d2l'][1], 'n': 1},
        }
    for name in ('niah_depth.png', 'niah_length.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


def test_the_right_number_may_stand_in_a_sentence():
    for answer in ('1234', ' The special magic number is 1234.'):
        assert niah_evaluation.right_number(answer, '1234')
    for answer in ('', '12345', '1234 or 1235', 'It is 123.'):
        assert not niah_evaluation.right_number(answer, '1234')


def test_an_interrupted_evaluation_continues(command, checkpoint, base, tmp_path, monkeypatch):
    calls = []

    class Reader:
        """Finds the needles of the first half of the documents."""

        def __init__(self, internalizer):
            pass

        def __call__(self, questions, max_new_tokens):
            calls.append(len(questions))
            if len(calls) == 2:
                raise KeyboardInterrupt
            numbers = [
                re.search(r'magic number is (\d+)', base.tokenizer.decode(q.document))[1]
                for q in questions
            ]
            return [f' {n} ' if i < 10 else n + '!' for i, n in enumerate(numbers)]

    monkeypatch.setattr(niah_evaluation, 'Answerer', Reader)

    def run(**extra):
        return command(
            'evaluate',
            config='configs/eval_niah.py',
            checkpoint=checkpoint,
            workdir=tmp_path,
            config_examples=20,
            config_baseline_examples=0,
            config_haystack='varied',
            **{'config_lengths': '(64,128)', **extra},
        )

    assert run()[0] == 130
    assert list(json.loads((tmp_path / 'metrics.json').read_text())['exact_match']) == ['64']
    code, out, err = run()
    assert code == 0 and calls == [20, 20, 20] and not out.startswith('64'), err
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['exact_match']['128'] == {'d2l': 0.5, 'no_document': 0.0}
    by_depth = metrics['depth']['128']
    assert [by_depth[k] for k in sorted(by_depth)] == (
        [{'exact_match': 1.0, 'n': 2}] * 5 + [{'exact_match': 0.0, 'n': 2}] * 5
    )
    assert (tmp_path / 'niah_length.png').exists()
    assert_mistake(run(config_seed=8), 'seed: 1000003 -> 8')


def test_long_documents_are_cut_to_the_window(base):
    document = base.tokenizer.encode(DOCUMENT * 40)
    prompt = prompts.in_context_prompt(base, document, QUESTION, 8)
    room = base.config.max_length - 8
    assert room - 4 <= len(prompt) <= room
    assert base.tokenizer.decode(prompt).count(QUESTION) == 1
