"""Evaluation on documents, documents together, and gradient descent on one of them."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_base, tiny_training
from ml_collections import ConfigDict

from configs import eval_composition, eval_qa
from d2l import composition, documents, qa
from d2l.documents import Document, Question
from d2l.fitting import Fitter, text_rows
from d2l.internalize import Internalizer
from d2l.memory import Memory
from hyperlora import hypernetwork, lora, trained
from hyperlora.errors import UserError
from hyperlora.evaluation import record
from hyperlora.generation import answer
from hyperlora.models.decoder import Decoder
from hyperlora.trained import Trained

TEXT = 'Ann has a red car. Bob has {} cats. The end of it.'


@pytest.fixture(scope='module')
def model():
    """A random hypernetwork of the tiny base that reads chunks of 20 tokens."""
    base, config = tiny_base(), tiny_training()
    config.chunk_length = 20
    built = hypernetwork.build(config.hypernetwork, base)
    params = nn.unbox(jax.jit(built.init)(jax.random.key(0), base.params))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), params)
    return Trained(config, base, built, params)


@pytest.fixture(scope='module')
def reader():
    """A random reader of the tiny base."""
    base = tiny_base()
    config = ConfigDict(
        {
            'hypernetwork': {
                'name': 'lora_table',
                'modules': ('down_proj',),
                'shape': {'rank': 2, 'scaling': 2.0, 'entries': 1},
            }
        }
    )
    built = hypernetwork.build(config.hypernetwork, base)
    params = nn.unbox(built.init(jax.random.key(1), base.params))
    params = jax.tree.map(lambda x: x + 0.1, params)
    return Trained(config, base, built, params)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / 'data.jsonl'
    entries = [
        {
            'id': f'd{n}',
            'context': TEXT.format(n),
            'questions': ['Cats?', 'Who has a car?', 'Unanswered?'],
            'answers': [[str(n), 'some'], ['Ann'], []],
        }
        for n in range(3)
    ]
    path.write_text('\n'.join(map(json.dumps, entries)))
    return path


# ------------------------------------------------------------------------------------- fitting


def test_text_rows():
    """Every token but the first is a label once, and stands where it is predicted."""
    tokens = list(range(10, 21))
    rows = text_rows(tokens, 4)
    assert rows['tokens'].shape == (3, 4)
    found = []
    for row in range(3):
        for k in range(4):
            if rows['label_weights'][row, k]:
                label = rows['labels'][row, k]
                assert rows['tokens'][row, rows['label_positions'][row, k]] == label - 1
                found.append(label)
    assert found == tokens[1:]


def test_a_fit_learns_and_starts_where_it_should(tiny):
    dims = {name: (i, o) for name, i, o in lora.module_dims(tiny.config, ('down_proj', 'q_proj'))}
    start = lora.init(jax.random.key(0), dims, tiny.config.num_layers, 4, 2.0)
    text = tiny.tokenizer.encode('the cat sat')
    fitter = Fitter(tiny, ConfigDict({'name': 'cross_entropy'}), 1e-2)
    unchanged, early, late = fitter(start, text_rows(text, 16), (0, 5, 60))
    jax.tree.map(np.testing.assert_array_equal, unchanged, start)

    def loss(adapter):
        decoder = Decoder(tiny.config)
        tokens = jnp.asarray([text])
        hidden = decoder.apply({'params': tiny.params}, tokens, lora=adapter).hidden
        logits = decoder.apply({'params': tiny.params}, hidden, method='unembed')[0, :-1]
        return -float(jax.nn.log_softmax(logits)[np.arange(len(text) - 1), text[1:]].mean())

    assert loss(start) > loss(early) > loss(late)
    assert answer(tiny, [text[:4]], 7, late) == ['cat sat'] and loss(late) < 0.5 < loss(start)
    # As if no fit had been before.
    again = list(fitter(start, text_rows(text, 16), (5,)))[0]
    jax.tree.map(np.testing.assert_array_equal, again, early)


# -------------------------------------------------------------------------------------- memory


def same(a, b):
    def delta(adapter):
        return {
            name: float(adapter.scaling) * np.einsum('lgri,lgro->lgio', pair.a, pair.b)
            for name, pair in adapter.pairs.items()
        }

    a, b = delta(a), delta(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5 * np.abs(b[name]).max())


def test_documents_come_and_go(model):
    internalizer, texts = Internalizer(model), ['One thing. ' * 4, 'Another. ' * 5, 'Third. ' * 3]
    tokens = [model.base.tokenizer.encode(text) for text in texts]
    memory = Memory(internalizer)
    assert memory.lora() is None
    memory.add('a', tokens[0])
    same(memory.lora(), internalizer(tokens[0]))
    memory.add('b', tokens[1])
    both = memory.lora()
    # The shared LoRA counts once.
    chunks = [internalizer.chunks(t) for t in tokens]
    same(both, internalizer.with_shared(chunks[1], chunks[0]))
    memory.add('c', tokens[2], scale=0.5)
    with_c = memory.lora()
    same(with_c, internalizer.with_shared(chunks[0], chunks[1], lora.scale(chunks[2], 0.5)))
    memory.scale('c', 0)
    jax.tree.map(np.testing.assert_array_equal, memory.lora(), both)
    memory.scale('c', 0.5)
    jax.tree.map(np.testing.assert_array_equal, memory.lora(), with_c)
    memory.remove('c')
    jax.tree.map(np.testing.assert_array_equal, memory.lora(), both)
    memory.add('a', tokens[2])
    memory.remove('b')
    same(memory.lora(), internalizer(tokens[2]))
    memory.scale('a', 0)
    assert memory.lora() is None


def test_errors_of_memory_change_nothing(model):
    memory = Memory(Internalizer(model))
    memory.add('a', model.base.tokenizer.encode('One thing.'))
    before = memory.lora()
    for call in (lambda: memory.remove('b'), lambda: memory.scale('b', 2)):
        with pytest.raises(UserError, match="no document 'b'; there are: a"):
            call()
    with pytest.raises(UserError, match='empty'):
        memory.add('a', [])
    jax.tree.map(np.testing.assert_array_equal, memory.lora(), before)


# ---------------------------------------------------------------------------------- evaluation


def config_of(data, **changes):
    config = eval_qa.get_config()
    config.data = str(data)
    config.max_new_tokens = 6
    config.retrieved_tokens = config.truncated_tokens = 20
    config.generated_questions = 2
    config.steps = (1, 3)
    config.query_tokens, config.answer_tokens = 64, 6
    config.update(changes)
    return config


def run(monkeypatch, model, reader, config, workdir):
    def load(name, *_, **__):
        return reader if name == 'reader' else model

    monkeypatch.setattr(trained, 'load', load)
    workdir.mkdir(exist_ok=True)
    qa.evaluate(config, 'x', workdir)
    return json.loads((workdir / 'metrics.json').read_text())


def test_every_method_answers(monkeypatch, model, reader, data, tmp_path):
    config = config_of(data, methods=tuple(qa.METHODS), reader='reader', limit=2)
    metrics = run(monkeypatch, model, reader, config, tmp_path / 'out')
    trains = {'distilled', 'distilled_oracle', 'distilled_from_d2l', 'finetuned'}
    labels = {
        label
        for name in qa.METHODS
        for label in ([f'{name}/1', f'{name}/3'] if name in trains else [name])
    }
    assert set(metrics['scores']) == set(metrics['costs']) == labels
    assert list(metrics['documents']) == ['d0', 'd1']
    for own in metrics['documents'].values():
        assert own['questions'] == 2  # the unanswered one is left out
        for label, found in own['methods'].items():
            assert len(found['answers']) == 2
            assert (found['costs']['kept_bytes'] > 0) == ('no_context' not in label)
    costs = metrics['costs']
    assert costs['finetuned/3']['update_seconds'] > costs['finetuned/1']['update_seconds'] > 0
    for plot in ('qa_length.png', 'qa_seconds.png'):
        assert (tmp_path / 'out' / plot).stat().st_size > 1000


def test_a_document_of_one_token_teaches_nothing(monkeypatch, model, reader, tmp_path):
    assert len(model.base.tokenizer.encode('a')) == 1
    data = tmp_path / 'data.jsonl'
    data.write_text(json.dumps({'context': 'a', 'question': 'Cats?', 'answers': 'x'}))
    config = config_of(data, methods=('finetuned', 'no_context'), reader='reader')
    metrics = run(monkeypatch, model, reader, config, tmp_path / 'out')
    own = metrics['documents']['1']['methods']
    assert own['finetuned/1']['answers'] == own['no_context']['answers']


def test_answers_are_those_of_the_loras(monkeypatch, model, reader, data, tmp_path):
    methods = ('d2l', 'd2l_other', 'no_context', 'in_context')
    config = config_of(data, methods=methods, reader='reader', limit=2)
    metrics = run(monkeypatch, model, reader, config, tmp_path / 'out')
    tokenizer, found = model.base.tokenizer, metrics['documents']['d0']['methods']
    prompts = [tokenizer.prompt(text) for text in ('Cats?', 'Who has a car?')]
    own, other = (Internalizer(model)(tokenizer.encode(TEXT.format(n))) for n in range(2))
    assert found['d2l']['answers'] == answer(model.base, prompts, 6, own)
    assert found['d2l_other']['answers'] == answer(model.base, prompts, 6, other)
    read = lora.Lora(
        {'down_proj': lora.LoraPair(reader.params['a_down_proj'], reader.params['b_down_proj'])},
        jnp.float32(2.0),
    )
    assert found['no_context']['answers'] == answer(model.base, prompts, 6, read)
    with_text = [
        tokenizer.prompt(f'{TEXT.format(0)}\n\n{text}') for text in ('Cats?', 'Who has a car?')
    ]
    assert found['in_context']['answers'] == answer(model.base, with_text, 6, read)
    assert found['d2l']['costs']['kept_bytes'] == own.nbytes


def test_an_evaluation_goes_on(monkeypatch, model, data, tmp_path):
    config = config_of(data, methods=('d2l',), limit=1)
    config_all = config_of(data, methods=('d2l',), limit=0)
    whole = run(monkeypatch, model, None, config_all, tmp_path / 'whole')
    asked = []
    monkeypatch.setattr(qa, 'SCORES', {'f1': lambda text, accepted: asked.append(text) or 0.5})
    partial = {**whole, 'documents': {'d0': whole['documents']['d0']}}
    (tmp_path / 'part').mkdir()
    (tmp_path / 'part/metrics.json').write_text(json.dumps(partial))
    again = run(monkeypatch, model, None, config_all, tmp_path / 'part')
    assert len(asked) == 4 and list(again['documents']) == ['d0', 'd1', 'd2']
    with pytest.raises(UserError, match='other settings'):
        run(monkeypatch, model, None, config, tmp_path / 'part')


def test_summary():
    def document(tokens, f1, prompt_f1, seconds):
        def method(value, update, question):
            costs = {'update_seconds': update, 'question_seconds': question}
            return {'scores': {key: value for key in qa.SCORES}, 'costs': costs}

        return {
            'tokens': tokens,
            'methods': {
                'd2l': method(f1, seconds, 0.1),
                'in_context': method(prompt_f1, 0.0, 0.3),
            },
        }

    found = {
        'a': document(100, [1, 0], [1, 1], 2.0),
        'b': document(129, [0, 0, 1], [1, 0, 1], 3.0),
        'c': document(9000, [0], [0], 100.0),
    }
    summary = qa.summarize(found)
    assert summary['scores']['d2l']['f1'] == pytest.approx(2 / 6)
    assert summary['of_in_context']['d2l'] == pytest.approx(2 / 4)
    assert summary['by_length']['d2l'] == {
        '128': {'f1': 0.5, 'questions': 2},
        '256': {'f1': pytest.approx(1 / 3), 'questions': 3},
        'over 8192': {'f1': 0.0, 'questions': 1},
    }
    assert summary['costs']['d2l']['update_seconds'] == 3.0
    assert summary['break_even'] == {'d2l': pytest.approx(3.0 / 0.2)}


def test_retrieval_takes_the_chunk_that_fits(model):
    text = 'Ann has a red car. Bob has nine old cats. It rains on Mondays. '
    document = Document('a', text, (Question('x', ('y',)),))
    config = config_of('', retrieved_tokens=24)
    methods = qa.Methods(model, [document], config)
    ((_, state),) = methods.retrieval(document)
    for question, fact in (('How many cats has Bob?', 'nine'), ('Who has a car?', 'red')):
        prompt = model.base.tokenizer.decode(state.prompt(question))
        assert fact in prompt and len(prompt) < len(text) + len(question)
    state.prompt('???')  # no word to look for


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'methods': ('d2l,guess',)}, 'unknown methods guess; known: no_context'),
        ({'data': 'nothing.xyz'}, 'name the documents as READER,PATH'),
        ({'data': ''}, 'name the documents as READER,PATH'),
        ({'data': 'missing.jsonl'}, 'cannot read it'),
        ({'methods': ('d2l_other',), 'limit': 1}, 'needs a second document'),
        ({'steps': ()}, 'steps must be positive numbers that rise'),
        ({'steps': ('abc',)}, 'steps must be positive numbers that rise'),
        ({'methods': ()}, 'no methods are chosen; known: no_context'),
        ({'data': 'squad,'}, "name the documents as squad,PATH, not 'squad,'"),
        ({'data': 'facts'}, "name the documents as facts,COUNT,SPLIT,FACTS, not 'facts'"),
        ({'steps': (2, 1)}, 'steps must be positive numbers that rise'),
        ({'retrieved_tokens': 0}, 'retrieved_tokens must be a positive number'),
        ({'generated_questions': 0}, 'generated_questions must be a positive number'),
        ({'limit': -1}, 'must not be negative'),
    ],
)
def test_bad_settings(monkeypatch, model, data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, model, None, config_of(**{'data': data, **changes}), tmp_path / 'out')
    assert not (tmp_path / 'out/metrics.json').exists()


def test_documents_without_answers(monkeypatch, model, tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text(json.dumps({'text': 'One.', 'question': 'Why?'}))
    with pytest.raises(UserError, match='no document has a question with an answer'):
        qa.read(config_of(path))


def test_documents_together(monkeypatch, model, data, tmp_path):
    config = eval_composition.get_config()
    config.update({'data': str(data), 'counts': (1, 2), 'documents': 2, 'others': 1})
    config.max_new_tokens = 4
    monkeypatch.setattr(trained, 'load', lambda *_, **__: model)
    composition.evaluate(config, 'x', tmp_path)
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['questions'] == {
        '1': {'own': 4, 'other': 4},  # two groups of one
        '2': {'own': 4, 'other': 2},
    }
    for values in metrics['f1'].values():
        assert values.keys() == {'own', 'other', 'base', 'same'}
    del metrics['f1']['2'], metrics['questions']['2']  # as if interrupted
    record.write(tmp_path / 'metrics.json', metrics)
    read = []
    monkeypatch.setattr(composition, 'Memory', lambda i: read.append(i) or Memory(i))
    composition.evaluate(config, 'x', tmp_path)
    again = json.loads((tmp_path / 'metrics.json').read_text())
    assert len(read) == 1 and again['f1'].keys() == {'1', '2'}
    config.counts = ('abc',)
    with pytest.raises(UserError, match='counts, others and max_new_tokens must be positive'):
        composition.evaluate(config, 'x', tmp_path / 'other')
    config.counts = (1, 2)
    for wanted, message in (
        (3, 'cannot be divided into groups of 1, 2: change'),
        (4, 'has 3 documents with questions; 5 are needed'),
    ):
        config.documents = wanted
        with pytest.raises(UserError, match=message):
            composition.evaluate(config, 'x', tmp_path / 'other')


def test_sources():
    assert documents.source('squad,a,b.json') == {'reader': 'squad', 'path': 'a,b.json'}
    assert documents.source('x/a.json') == {'reader': 'squad', 'path': 'x/a.json'}
    squad = {'reader': 'tfds', 'name': 'squad'}
    assert documents.source('squad') == {**squad, 'split': 'train'}
    assert documents.source('squad', held_out=True) == {**squad, 'split': 'validation'}
    assert documents.source('tfds,squad,dev', held_out=True) == {**squad, 'split': 'dev'}
    facts = {'reader': 'facts', 'count': 9, 'seed': 0, 'facts': (1, 8)}
    assert documents.source('facts,9') == {**facts, 'split': 'train'}
    assert documents.source('facts,9,phrasings') == {**facts, 'split': 'phrasings'}
    assert documents.source('facts,9,train,8')['facts'] == (8, 8)
    assert documents.source('facts,9', held_out=True)['split'] == 'phrasings'
    for text, form in (
        ('facts,many', 'facts,COUNT,SPLIT,FACTS'),
        ('facts,9,train,8,5', 'facts,COUNT,SPLIT,FACTS'),
        ('words,9,phrasings', 'words,COUNT'),
        ('tfds,squad,train,1', 'tfds,NAME,SPLIT'),
    ):
        with pytest.raises(UserError, match=f'as {form}, not .{text}'):
            documents.source(text)
