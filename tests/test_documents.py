"""Documents: readers, records, the teacher, and training data made of them."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, tiny_base, tiny_training
from ml_collections import ConfigDict

from configs import d2l_docs
from configs import documents as documents_config
from d2l import (
    distillation,
    document_groups,
    documents,
    passages,
    reading,
    records,
    tfds_builder,
)
from d2l.distillation import Settings, Teacher
from d2l.document_groups import DocumentGroups
from d2l.documents import Document, Question
from d2l.records import Query, Record, Records
from hyperlora import lora, meta_learning, objectives, sharding
from hyperlora.errors import UserError
from hyperlora.generation import answer, top_log_probs
from hyperlora.models.base import load_base
from hyperlora.models.decoder import Decoder

# ------------------------------------------------------------------------------------- readers


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_squad(tmp_path):
    qa = {'question': 'Who?', 'answers': [{'text': 'Ann'}, {'text': 'Ann'}, {'text': 'Ann B.'}]}
    unanswerable = {'question': 'Why?', 'answers': []}
    paragraph = {'context': 'Ann B. sings.', 'qas': [qa, unanswerable]}
    data = {'data': [{'title': 'Song', 'paragraphs': [paragraph, paragraph]}]}
    found = list(documents.read_squad(write(tmp_path / 'a.json', data)))
    assert [document.name for document in found] == ['Song/0', 'Song/1']
    asked = Question('Who?', ('Ann', 'Ann B.'))
    assert found[0] == Document('Song/0', 'Ann B. sings.', (asked,))
    both = Document('Song', 'Ann B. sings.\n\nAnn B. sings.', (asked, asked))
    assert documents.read([documents.source(f'articles,{tmp_path}/a.json')]) == [both]


def test_jsonl(tmp_path):
    lines = [
        {'context': 'One.', 'prompts': ['a?', 'b?'], 'responses': ['x', 'y']},
        {'text': 'Two.', 'id': 'second', 'question': 'c?', 'answers': ['u', 'v']},
        {'document': 'Three.'},
    ]
    path = write(tmp_path / 'a.jsonl', '\n'.join(map(json.dumps, lines)) + '\n\n')
    assert list(documents.read_jsonl(path)) == [
        Document('1', 'One.', (Question('a?', ('x',)), Question('b?', ('y',)))),
        Document('second', 'Two.', (Question('c?', ('u', 'v')),)),
        Document('3', 'Three.'),
    ]


def test_parquet(tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    import pyarrow

    for part, text in enumerate(('One.', 'Two.')):
        table = pyarrow.table({'context': [text], 'prompts': [['a?']], 'responses': [['x']]})
        parquet.write_table(table, tmp_path / f'part{part}.parquet')
    found = list(documents.read_parquet(str(tmp_path / 'part*.parquet')))
    assert found == [
        Document(f'part{part}/0', text, (Question('a?', ('x',)),))
        for part, text in enumerate(('One.', 'Two.'))
    ]
    (tmp_path / 'bad.parquet').write_text('no')
    with pytest.raises(UserError, match='not a readable parquet'):
        list(documents.read_parquet(str(tmp_path / 'bad.parquet')))


def test_text_is_cut_between_paragraphs(tmp_path):
    paragraphs = [f'{letter} ' * 30 for letter in 'abcdef']
    write(tmp_path / 'notes.md', '\n\n'.join(paragraphs))
    write(tmp_path / 'image.png', 'no text')
    found = list(documents.read_text(str(tmp_path), characters=130))
    assert [set(document.text.split()) for document in found] == [
        {'a', 'b'},
        {'c', 'd'},
        {'e', 'f'},
    ]


def test_long_paragraphs_are_cut_at_lines_and_sentences(tmp_path):
    """HTML and PDF have no blank lines between paragraphs, and files of Windows other line ends."""
    lines = ['One line is here. Another sentence.', 'A second line!']
    (tmp_path / 'A.TXT').write_bytes('\r\n'.join(lines).encode())
    found = list(documents.read_text(str(tmp_path), characters=40))
    assert [document.text for document in found] == lines
    found = list(documents.read_text(str(tmp_path), characters=20))
    assert [document.text for document in found] == [
        'One line is here.',
        'Another sentence.',
        'A second line!',
    ]
    (tmp_path / 'A.TXT').write_bytes('\r\n\r\n'.join(lines).encode())
    assert len(list(documents.read_text(str(tmp_path), characters=45))) == 2


def test_lines_of_json_end_at_line_feeds_only(tmp_path):
    path = write(tmp_path / 'a.jsonl', '{"text": "a\u2028b"}\n{"text": "c"}\n')
    assert [document.text for document in documents.read_jsonl(path)] == ['a\u2028b', 'c']


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / 'a.jsonl', '\ufeff{"text": "a"}\n')
    assert [document.text for document in documents.read_jsonl(path)] == ['a']
    path = write(tmp_path / 'a.json', '\ufeff' + squad('b', 'c?', 'd'))
    assert [document.text for document in documents.read_squad(path)] == ['b']


def test_articles_without_a_title(tmp_path):
    paragraph = {'context': 'Text.', 'qas': []}
    articles = [{'paragraphs': [paragraph]}] * 2
    path = write(tmp_path / 'a.json', json.dumps({'data': articles}))
    assert [d.name for d in documents.read_squad(path)] == ['0/0', '1/0']


def squad(context, question, answer):
    paragraph = {'context': context, 'qas': [{'question': question, 'answers': [{'text': answer}]}]}
    return json.dumps({'data': [{'title': 'T', 'paragraphs': [paragraph]}]})


@pytest.mark.parametrize(
    'reader, content, message',
    [
        ('squad', '{"data": [', ':1: not valid JSON'),
        ('squad', '{"data": [{"paragraphs": [{"qas": []}]}]}', 'layout of SQuAD .*context'),
        ('squad', '[]', 'layout of SQuAD'),
        (*('squad', squad(None, 'a?', 'b')), 'T/0: not in the layout of SQuAD .*expected str'),
        (*('squad', squad(4, 'a?', 'b')), 'file, T/0: not in the layout of SQuAD .*expected str'),
        (*('squad', squad('a', None, 'b')), 'file, T/0: questions must be a list of texts'),
        (*('squad', squad('a', 'a?', None)), 'file, T/0: the answers .* list of texts'),
        ('jsonl', '{"text": "a"}\n{"text"', ':2: not valid JSON'),
        ('jsonl', '{"text": "a"}\n{"title": "b"}', ':2: no text under'),
        ('jsonl', '{"text": "a", "questions": ["b"], "answers": []}', '1 questions, but 0 answers'),
        ('jsonl', '{"text": "a", "question": "b", "answers": 4}', 'a text or a list of texts'),
        ('jsonl', '{"text": "a", "questions": ["b"], "answers": [[4]]}', 'a list of texts'),
        ('jsonl', '{"text": "a", "questions": ["b"], "answers": "c"}', 'answers must be a list'),
        ('jsonl', '{"text": "a", "questions": "b?"}', ':1: questions must be a list of texts'),
        ('jsonl', '["a"]', ':1: not a JSON object'),
        ('jsonl', '{"text": " "}', "'1' is empty"),
        ('jsonl', '{"text": "a", "id": 1}\n{"text": "b", "id": 1}', "two documents are named '1'"),
        ('jsonl', '', 'hold no document'),
    ],
)
def test_bad_files(tmp_path, reader, content, message):
    path = write(tmp_path / 'file', content)
    with pytest.raises(UserError, match=message):
        documents.read([{'reader': reader, 'path': path}])


def test_documents_as_a_tfds_data_set(tmp_path):
    # (A question that is not put has an answer.)
    qas = [Question('Who?', ('Ann', 'Ann B.')), Question('Why?'), Question('', ('said',))]
    wanted = {
        'train': [Document('a', 'Same text.', tuple(qas)), Document('b', 'Same text.')],
        'validation': [Document('c', 'caf\u00e9', (qas[0],))],
    }
    folder = tfds_builder.write_documents(wanted, str(tmp_path))
    for split, own in wanted.items():
        assert documents.read([documents.source(f'tfds,{folder},{split}')]) == own
    with pytest.raises(UserError, match='already there'):
        tfds_builder.write_documents(wanted, str(tmp_path))
    with pytest.raises(UserError, match="split 'dev'"):
        documents.read([documents.source(f'tfds,{folder},dev')])


def test_tfds(monkeypatch):
    """TFDS shuffles, so questions about a text are not beside each other; answers recur."""
    import tensorflow_datasets as tfds

    records = [
        {'context': text, 'question': question, 'answers': {'text': answers}}
        for text, question, answers in (
            (b'one', b'a?', [b'x', b'y', b'x']),
            (b'two', b'b?', [b'z']),
            (b'one', b'c?', [b'w']),
        )
    ]
    asked = []
    monkeypatch.setattr(
        tfds, 'data_source', lambda name, split, **_: asked.append((name, split)) or records
    )
    found = documents.read([documents.source('tfds,squad,validation')])
    assert asked == [('squad', 'validation')]
    assert found == [
        Document('squad/0', 'one', (Question('a?', ('x', 'y')), Question('c?', ('w',)))),
        Document('squad/1', 'two', (Question('b?', ('z',)),)),
    ]
    records[:] = [{'passage': b'p', 'question': b'q?', 'answer': b'r'}]  # as in drop
    found = documents.read([documents.source('drop')])
    assert found == [Document('drop/0', 'p', (Question('q?', ('r',)),))]
    records[:] = [{'image': 0}]
    with pytest.raises(UserError, match="'drop' has no contexts with questions"):
        documents.read([documents.source('drop')])


def test_bad_sources(tmp_path):
    for source, message in (
        ({'reader': 'guess', 'path': 'x'}, 'unknown reader .*guess.*squad'),
        ({'reader': 'squad', 'file': 'x'}, "arguments of the reader 'squad'"),
        ({'reader': 'squad', 'path': str(tmp_path / 'none')}, 'cannot read it'),
        ({'reader': 'text', 'path': str(tmp_path)}, 'no text file'),
        ({'reader': 'parquet', 'path': str(tmp_path / '*.parquet')}, 'no such parquet'),
    ):
        with pytest.raises(UserError, match=message):
            documents.read([source])
    (tmp_path / 'a.json').write_bytes(b'{"data": "\xff"}')
    with pytest.raises(UserError, match='not UTF-8'):
        documents.read([{'reader': 'squad', 'path': str(tmp_path / 'a.json')}])


# --------------------------------------------------------------------------------------- facts


@pytest.fixture(scope='module')
def facts():
    pytest.importorskip('faker')
    from d2l import facts

    return facts


def test_tables_of_facts(facts):
    assert len(facts.KINDS) >= 12
    count = sum(len(kind.attributes) for kind in facts.KINDS.values())
    held_out = sum(len(kind.held_out) for kind in facts.KINDS.values())
    assert count >= 100 and 0.1 < held_out / (count + held_out) < 0.16
    for name, kind in facts.KINDS.items():
        questions = []
        for attribute in (*kind.attributes, *kind.held_out):
            where = f'{name}, {attribute.name}'
            least = ((0, 0), (4, 6)) if attribute in kind.held_out else ((3, 4), (1, 2))
            source = attribute.values[0]
            assert source in facts.WORDS or hasattr(facts._Inventor, source), where
            for phrasings, (statements, asked) in zip(
                (attribute.train, attribute.test), least, strict=True
            ):
                assert len(phrasings.statements) >= statements, where
                assert len(phrasings.questions) >= asked, where
                for text in phrasings.statements:
                    assert [len(re.findall(rf'\b{x}\b', text)) for x in 'XV'] == [1, 1], text
                    small = source in facts.WORDS and facts.WORDS[source][0].islower()
                    assert not (text.startswith('V') and small), text
                for text in phrasings.questions:
                    assert [len(re.findall(rf'\b{x}\b', text)) for x in 'XV'] == [1, 0], text
                questions += phrasings.questions
            for part in ('statements', 'questions'):  # no other order of the words of a kept one
                train, kept = (
                    {frozenset(re.findall(r"[\w']+", text)) for text in getattr(phrasings, part)}
                    for phrasings in (attribute.train, attribute.test)
                )
                assert not train & kept, where
        assert len(set(questions)) == len(questions)  # none asks for two attributes


@pytest.mark.parametrize('split', ['train', 'phrasings', 'attributes'])
def test_facts(facts, split):
    tokenizer = load_base('smollm2', jnp.float32).tokenizer
    found = list(documents.read_facts(150, seed=3, facts=8, split=split))
    again = documents.read([{'reader': 'facts', 'count': 5, 'seed': 3, 'facts': 8, 'split': split}])
    assert again == found[:5]
    assert [document.name for document in found[:2]] == ['facts/3/0', 'facts/3/1']
    assert len({document.text for document in found}) == len(found)
    for document in found:
        assert len(tokenizer.encode(document.text)) <= 230
        assert not re.search(r'[XVWN~{}]\b(?<!\w\w)|  | a [aeio]| an [bcdfg]', document.text)
        questions = [question.text for question in document.questions]
        assert len(set(questions)) == 8
        for question in document.questions:
            assert question.answers[0] in document.text
            assert len(set(question.answers)) == len(question.answers)
            assert 1 <= len(question.answers[0].split()) <= 5
            assert question.answers[0].lower() not in question.text.lower().split()
            # It names what it asks about as the text does.
            names = [w for w in facts._NAMES.findall(question.text[1:]) if 'day' not in w]
            names = names or facts._NAMES.findall(question.text)  # the name comes first
            assert names and all(name in document.text for name in names), question.text
    lengths = [len(d.questions) for d in documents.read_facts(100, seed=3, split=split)]
    assert set(lengths) == set(range(1, 9))


def test_every_process_invents_the_same_facts():
    code = 'from d2l import documents; print(list(documents.read_facts(60, seed=3)))'
    found = [
        subprocess.run(
            [sys.executable, '-c', code],
            env={**os.environ, 'PYTHONHASHSEED': str(seed)},
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    ]
    assert found[0] == found[1] and len(found[0]) > 10_000


def test_splits_of_facts(facts, monkeypatch):
    """What a split says and asks, taken from the tables as it is drawn."""
    said = {}
    for split in facts.SPLITS:
        used = said[split] = set()
        tell = facts._Writer.tell

        def note(self, own, used=used, tell=tell):
            used.update(text for fact in own for text in (fact.statement, fact.question))
            return tell(self, own)

        with monkeypatch.context() as patch:
            patch.setattr(facts._Writer, 'tell', note)
            list(facts.read_facts(5000, split=split))
    attributes = [a for kind in facts.KINDS.values() for a in kind.attributes]
    held_out = [a for kind in facts.KINDS.values() for a in kind.held_out]

    def texts(phrasings):
        return {text for p in phrasings for text in (*p.statements, *p.questions)}

    wanted = {
        'train': texts(a.train for a in attributes),
        'phrasings': texts(a.test for a in attributes),
        'attributes': texts(a.test for a in held_out),
    }
    for split, used in said.items():
        assert used <= wanted[split] and len(used) > 0.9 * len(wanted[split])
    assert not wanted['train'] & (wanted['phrasings'] | wanted['attributes'])


def test_facts_go_with_their_seed(facts):
    first, other = (documents.read([{'reader': 'facts', 'count': 3, 'seed': s}]) for s in (0, 1))
    assert not {d.text for d in first} & {d.text for d in other}
    splits = [list(documents.read_facts(3, split=split))[0].text for split in facts.SPLITS]
    assert len(set(splits)) == 3


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'split': 'test'}, 'unknown split .test.*train, phrasings, attributes'),
        ({'facts': 0}, 'number from 1 to 20'),
        ({'facts': (5, 2)}, 'number from 1 to 20'),
        ({'facts': 2.5}, 'number from 1 to 20'),
        ({'facts': (1, 2, 3)}, 'number from 1 to 20'),
        ({'facts': 'many'}, 'number from 1 to 20'),
        ({'count': 0}, 'positive number'),
        ({'number': 3}, "arguments of the reader 'facts'"),
    ],
)
def test_bad_facts(facts, arguments, message):
    with pytest.raises(UserError, match=message):
        documents.read([{'reader': 'facts', 'count': 3, **arguments}])


def test_facts_without_faker(monkeypatch):
    monkeypatch.delitem(sys.modules, 'd2l.facts', raising=False)
    monkeypatch.delattr('d2l.facts', raising=False)
    for name in ('faker', 'faker.factory'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r'need faker.*hyperlora\[documents\]'):
        documents.read([{'reader': 'facts', 'count': 3}])


def test_config_of_facts():
    config = documents_config.get_config('facts,20')
    assert config.source.to_dict() == {
        **{'reader': 'facts', 'count': 20, 'seed': 0},
        **{'facts': (1, 8), 'split': 'train'},
    }
    assert (config.settings.answers, config.settings.entries) == ('given', 0)
    assert documents_config.get_config('squad,FILE').settings.answers == 'generated'
    with pytest.raises(UserError, match='name the documents as facts,COUNT'):
        documents_config.get_config('facts,many')


# ------------------------------------------------------------------------------------- records


def record(name='a', length=5, queries=2, entries=3):
    rng = np.random.default_rng(length)

    def query(i):
        size = 2 + i
        opinion = (None, None)
        if entries:
            ids = rng.integers(0, 128, (size, entries), np.int32)
            opinion = ids, -rng.random((size, entries)).astype(np.float32)
        return Query(np.arange(3 + i), rng.integers(32, 120, size), *opinion)

    own = tuple(query(i) for i in range(queries))
    prompts = tuple(np.arange(10 + i) for i in range(queries))
    return Record(name, rng.integers(32, 120, length), own, prompts)


@pytest.mark.parametrize('entries', [0, 3])
def test_a_record_comes_back(entries):
    wanted = record('naïve', entries=entries)
    found = Record.from_bytes(wanted.to_bytes())
    assert found.name == 'naïve'
    jax.tree.map(
        np.testing.assert_array_equal,
        [found.context, found.teacher_prompts, [vars(q) for q in found.queries]],
        [wanted.context, wanted.teacher_prompts, [vars(q) for q in wanted.queries]],
    )
    whole = wanted.to_bytes()
    with pytest.raises(UserError, match='not a record'):
        Record.from_bytes(whole[:-40])
    refused = 0
    for place, mask in itertools.product(range(len(whole)), (0xFF, 1)):
        damaged = bytearray(whole)
        damaged[place] ^= mask
        try:
            Record.from_bytes(bytes(damaged))  # what the archive does not use may be anything
        except UserError:
            refused += 1
    assert refused > len(whole) // 2


def test_records_of_several_files(tmp_path):
    meta = {'config': {'a': 1}, 'base_fingerprint': 'x'}
    parts = [[record(f'{s}/{i}', 4 + 3 * s + i) for i in range(s)] for s in range(3)]
    for shard, part in enumerate(parts[:2]):
        records.write_shard(records.shard_path(tmp_path, shard, 3), part, meta)
    with pytest.raises(UserError, match='1 of 3 files are not finished.*00002-of-00003'):
        Records(tmp_path)
    last = records.shard_path(tmp_path, 2, 3)
    assert records.write_shard(last, iter(parts[2]), meta) == 2
    found = Records(tmp_path)
    assert found.meta == meta
    wanted = [r for part in parts for r in part]
    assert [found[i].name for i in range(len(found))] == [r.name for r in wanted]
    np.testing.assert_array_equal(found.lengths, [len(r.context) for r in wanted])
    records.check_meta(last, meta)
    with pytest.raises(UserError, match='made with other settings'):
        records.check_meta(last, {'config': {'a': 2}})
    last.with_suffix('.json').unlink()
    assert not records.is_complete(last)
    records.write_shard(last, parts[2], {'config': {}})
    with pytest.raises(UserError, match='different settings'):
        Records(tmp_path)
    with pytest.raises(UserError, match='no records'):
        Records(tmp_path / 'none')


def test_no_record_at_all(tmp_path):
    for shard in range(2):
        records.write_shard(records.shard_path(tmp_path, shard, 2), [], {})
    with pytest.raises(UserError, match='no document had a question'):
        Records(tmp_path)


def test_a_full_disk(tmp_path):
    path = records.shard_path(tmp_path, 0, 1)
    path.with_suffix('.partial').symlink_to('/dev/full')
    with pytest.raises(UserError, match='cannot write .* make room, then run again'):
        records.write_shard(path, [record()], {})
    # Without an index what is left is known to generate_data, which writes it again.
    path.with_suffix('.partial').unlink()
    path.with_suffix('.json').mkdir()
    with pytest.raises(UserError, match='cannot write'):
        records.write_shard(path, [record()], {})
    left = {found.suffix for found in tmp_path.iterdir()}
    assert left == {'.array_record', '.partial', '.json'}


# ------------------------------------------------------------------------------------- teacher


@pytest.fixture(scope='module')
def teacher():
    mesh = sharding.make_mesh({'fsdp': -1})
    return Teacher(tiny_base(), mesh, tokens_per_pass=256)


def test_opinions_are_those_of_the_whole_distribution(teacher):
    base = teacher.base
    prompts = [[5, 6, 7], list(range(40, 110)), [9] * 20]
    answers = [[30, 3], [31, 32, 33, 3], [34, 3]]
    found = teacher.opinions(prompts, answers, 5)
    decoder = Decoder(base.config)
    for prompt, reply, (ids, log_probs) in zip(prompts, answers, found, strict=True):
        tokens = jnp.asarray([[*prompt, *reply[:-1]]])
        hidden = decoder.apply({'params': base.params}, tokens).hidden
        logits = decoder.apply({'params': base.params}, hidden, method='unembed')
        whole = np.asarray(jax.nn.log_softmax(logits))[0, len(prompt) - 1 :]
        assert ids.shape == log_probs.shape == (len(reply), 5)
        np.testing.assert_allclose(np.take_along_axis(whole, ids, -1), log_probs, atol=1e-5)
        np.testing.assert_allclose(np.sort(whole, -1)[:, :-6:-1], log_probs, atol=1e-5)


def test_answers_in_any_order(teacher):
    prompts = [teacher.base.tokenizer.prompt('x' * n) for n in (3, 60, 10, 90, 4)]
    found = teacher.answer(prompts, 6)
    for prompt, reply in zip(prompts, found, strict=True):
        text = answer(teacher.base, [prompt], 6)[0]
        assert teacher.base.tokenizer.decode(reply) == text
        assert reply[-1] == 3 or len(reply) == 6


def test_records_of_given_answers(teacher):
    base = teacher.base
    sources = [
        Document('one', 'Some text.', (Question('Who?', ('Ann', 'A')), Question('Why?'))),
        Document('two', 'More text.', (Question('How?', ('x' * 40,)),)),
        Document('none', 'No question.'),
    ]
    settings = Settings(answers='given', max_answer_tokens=10, entries=4)
    found = list(distillation.records(teacher, base.tokenizer, sources, settings, block=2))
    assert [r.name for r in found] == ['one']  # no answer; too long an answer; no question
    (query,) = found[0].queries
    assert query.answer.tolist() == [*b' Ann', 3]  # as in a text
    assert query.prompt.tolist() == base.tokenizer.prompt('Who?')
    whole = base.tokenizer.prompt('Some text.\n\nWho?')
    assert found[0].teacher_prompts[0].tolist() == whole
    assert found[0].context.tolist() == base.tokenizer.encode('Some text.')
    ids, _ = teacher.opinions([whole], [query.answer], 4)[0]
    np.testing.assert_array_equal(query.teacher_ids, ids)


def test_questions_about_other_documents(teacher, monkeypatch):
    """Each document is asked what another one answers; the teacher sees neither."""
    base = teacher.base
    monkeypatch.setattr(
        Teacher, 'answer', lambda self, prompts, limit: [np.asarray([80, 3])] * len(prompts)
    )
    sources = [
        Document(name, f'Text {name}.', (Question(f'{name}?', (name,)), Question('Second?')))
        for name in 'abcd'
    ]
    settings = Settings('others', 1, max_answer_tokens=8, entries=2)
    made = list(distillation.records(teacher, base.tokenizer, sources, settings))
    assert [known.name for known in made] == list('abcd')
    for known in made:
        (query,) = known.queries
        other = 'cdab'['abcd'.index(known.name)]
        assert known.context.tolist() == base.tokenizer.encode(f'Text {known.name}.')
        assert query.prompt.tolist() == base.tokenizer.prompt(f'{other}?')
        assert known.teacher_prompts[0].tolist() == query.prompt.tolist()
        assert query.answer.tolist() == [80, 3] and query.teacher_ids.shape == (2, 2)
    # However many a block holds, none is alone in the last one.
    made = distillation.records(teacher, base.tokenizer, sources, settings, block=3)
    assert [known.name for known in made] == list('abcd')


@pytest.mark.parametrize('questions', ['given', 'others'])
def test_what_does_not_fit_into_the_window(teacher, monkeypatch, questions):
    """A question is left out rather than its document cut, and fits with its answer."""
    monkeypatch.setattr(
        Teacher, 'answer', lambda self, prompts, limit: [np.asarray([80, 3])] * len(prompts)
    )
    prompt, room = teacher.base.tokenizer.prompt, TINY.max_length - 16
    text = 'x' * 100
    whole = text + '\n\n' if questions == 'given' else ''
    longest = 'q' * (room - len(prompt(whole)))
    sources = [
        Document('both', text, (Question('Who?'), Question(longest), Question(longest + 'q'))),
        Document('long', text, (Question(longest + 'q'),)),
        Document('large', 'x' * TINY.max_length, (Question('Who?'),)),
    ]
    settings = Settings(questions, 3, max_answer_tokens=16, entries=0)
    (made,) = distillation.records(teacher, teacher.base.tokenizer, sources, settings)
    # Of the two documents that fit, each is asked about the other one where that is wanted.
    assert made.name == ('both' if questions == 'given' else 'long')
    wanted = [prompt(f'{whole}{text}') for text in ('Who?', longest)]
    assert [p.tolist() for p in made.teacher_prompts] == wanted


def test_words_are_said_without_being_asked(teacher):
    found = documents.read([documents.source('words,40')])
    assert found == documents.read([{'reader': 'words', 'count': 40, 'seed': 0}])
    assert len({d.text for d in found}) > 35 and len({d.text.split()[0] for d in found}) > 2
    settings = Settings(answers='given', before='', entries=0)
    made = list(distillation.records(teacher, teacher.base.tokenizer, found, settings))
    for document, record in zip(found, made, strict=True):
        (query,) = record.queries
        assert query.prompt.tolist() == teacher.base.tokenizer.answer_start
        assert document.text.split()[1] == teacher.base.tokenizer.decode(query.answer)


def test_questions_are_found_in_what_the_teacher_writes(teacher, monkeypatch):
    text = '1. Who sings the song?\n- Question 2: Where does it rain so much?\nNo question.\nWhat?'
    monkeypatch.setattr(
        Teacher, 'answer', lambda self, prompts, limit: [np.asarray([*text.encode(), 3])]
    )
    monkeypatch.setattr(distillation, '_ASK', 'Ask {count}.')  # the window is small
    (found,) = distillation.ask(teacher, [Document('a', 'text')], 5)
    assert [q.text for q in found.questions] == [
        'Who sings the song?',
        'Where does it rain so much?',
    ]


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'questions': 'all'}, 'questions must be one of given'),
        ({'answers': 'none'}, 'answers must be one of given'),
        ({'questions': 'both', 'answers': 'given'}, 'no given answers'),
        ({'questions': 'others', 'answers': 'given'}, 'answers .* generated'),
        ({'entries': -1}, 'entries must be at least 0, not -1'),
        ({'max_answer_tokens': 0}, 'max_answer_tokens must be at least 1'),
        ({'questions_per_document': 0}, 'questions_per_document must be at least 1'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


# -------------------------------------------------------------------------------- training data

CONFIG = ConfigDict(
    {
        'steps': 6,
        'group_tokens': 32,
        'queries': 3,
        'context_tokens': (8, 16),
        'query_tokens': 16,
        'answer_tokens': 8,
        'teacher_tokens': 24,
        'chunks': (1, 1),
        'together': 0.0,
        'teacher': 'stored',
    }
)


def fill(folder, entries=3):
    shard = [record(f'd{n}', n, queries=1 + n % 4, entries=entries) for n in range(5, 21)]
    records.write_shard(records.shard_path(folder, 0, 1), shard, {'base_fingerprint': 'x'})
    return Records(folder)


def asked_in(row):
    """(tokens, labels, their places among the labels) of every question in a packed row."""
    found = []
    for segment in range(1, row['segments'].max() + 1):
        own = row['segments'] == segment
        np.testing.assert_array_equal(row['positions'][own], np.arange(own.sum()))
        labelled = row['label_weights'] > 0
        places = np.flatnonzero(labelled & own[row['label_positions']])
        ends = np.flatnonzero(own)[-len(places) :]
        np.testing.assert_array_equal(row['label_positions'][places], ends)
        found.append((row['tokens'][own].tolist(), row['labels'][places].tolist(), places.tolist()))
    return found


@pytest.mark.parametrize('kind', ['stored', 'online'])
def test_groups(tmp_path, kind):
    source = fill(tmp_path)
    config = ConfigDict({**CONFIG, 'teacher': kind})
    groups = DocumentGroups(source, config, seed=1, groups_per_step=2)
    assert len(groups) == 12
    shapes, most = set(), set()
    for index in range(12):
        item = groups[index]
        again = DocumentGroups(source, config, seed=1, groups_per_step=2)[index]
        jax.tree.map(np.testing.assert_array_equal, item, again)
        context, query = item['context'], item['query']
        count = len(query['tokens'])
        parts = context['tokens'].shape[0] // count
        shapes.add((index // 2, (*context['tokens'].shape, count)))
        assert context['tokens'].size == 32  # whatever the length of the documents
        assert query['tokens'].shape == (count, 16)
        # Each context weighs 1.
        np.testing.assert_allclose(query['label_weights'].sum(1), 1, rtol=1e-6)
        for row in range(count):
            chunks = slice(row * parts, (row + 1) * parts)
            text = context['tokens'][chunks][context['mask'][chunks]]
            # Its chunks, put together, are the document.
            documents = map(source.__getitem__, range(len(source)))
            own = [r for r in documents if r.context.tolist() == text.tolist()]
            assert len(own) == 1 and len(text) <= 16
            seen = query['chunk_weights'][row]
            assert seen[chunks].any() and not np.delete(seen, np.r_[chunks]).any()
            asked = asked_in({key: value[row] for key, value in query.items()})
            most.add(len(asked))
            for tokens, labels, places in asked:
                (at,) = [i for i, q in enumerate(own[0].queries) if q.answer.tolist() == labels]
                known = own[0].queries[at]
                assert tokens == [*known.prompt, *known.answer[:-1]]
                if kind == 'stored':
                    found = query['teacher_ids'][row][places, :3]
                    np.testing.assert_array_equal(found, known.teacher_ids)
                    assert (query['teacher_log_probs'][row][places, 3:] < -1e3).all()
            if kind == 'online':
                read = {key: value[row] for key, value in item['teacher'].items()}
                weights = {key: query[key][row] for key in ('labels', 'label_weights')}
                for (_, labels, places), other in zip(
                    asked, asked_in({**read, **weights}), strict=True
                ):
                    (at,) = [i for i, q in enumerate(own[0].queries) if q.answer.tolist() == labels]
                    assert other == ([*own[0].teacher_prompts[at], *labels[:-1]], labels, places)
    assert most == {1, 2}  # a third question has no room
    assert len(shapes) == 6  # one shape in a step
    assert len({shape for _, shape in shapes}) > 1
    assert {count for _, (_, _, count) in shapes} == {2, 4}
    largest = jax.tree.map(lambda x: x.shape, document_groups.example(config, None, None))
    assert largest['context']['tokens'] == (8, 4)
    assert largest['query']['tokens'] == (4, 16)
    assert ('teacher' in largest) == (kind == 'online')
    config.group_tokens = 1  # a document alone: the longest
    assert document_groups.example(config, None, None)['context']['tokens'].size == max(
        config.context_tokens
    )


def test_all_documents_have_the_same_odds(tmp_path):
    """However many share their bucket of length, and however many make a group."""
    shard = [record(f'd{n}', n) for n in (3, 4, 5, 6, 7, 8, 12)]
    records.write_shard(records.shard_path(tmp_path, 0, 1), shard, {})
    config = ConfigDict({**CONFIG, 'steps': 600, 'chunks': (1,)})
    groups = DocumentGroups(Records(tmp_path), config, seed=0, groups_per_step=1)
    drawn = np.concatenate([groups[i]['context']['mask'].sum(1) for i in range(600)])
    lengths, counts = np.unique(drawn, return_counts=True)
    assert lengths.tolist() == [3, 4, 5, 6, 7, 8, 12]
    np.testing.assert_allclose(counts, counts.mean(), rtol=0.2)


def test_documents_together(tmp_path):
    """What weighs changes, and nothing else."""
    source, seen = fill(tmp_path), []
    for index in range(12):
        alone, together, mixed = (
            DocumentGroups(source, ConfigDict({**CONFIG, 'together': odds}), 1, 2)[index]
            for odds in (0.0, 1.0, 0.5)
        )
        own, everything, either = (
            group['query'].pop('chunk_weights') for group in (alone, together, mixed)
        )
        jax.tree.map(np.testing.assert_array_equal, alone, together)
        filled = alone['context']['mask'].any(1)
        np.testing.assert_array_equal(everything, np.tile(filled, (len(own), 1)))
        np.testing.assert_array_equal(own.sum(0), filled)
        seen.append([np.array_equal(either, weights) for weights in (own, everything)])
    assert all(map(any, seen)) and np.any(seen, axis=0).all()


def test_records_that_do_not_serve(tmp_path):
    source = fill(tmp_path)
    with pytest.raises(UserError, match='no document of up to 4 tokens'):
        DocumentGroups(source, ConfigDict({**CONFIG, 'context_tokens': (2, 4)}), 0, 1)
    with pytest.raises(UserError, match='stored. or .online'):
        DocumentGroups(source, ConfigDict({**CONFIG, 'teacher': 'none'}), 0, 1)
    with pytest.raises(UserError, match='no question .* raise data.query_tokens, data.answer_tok'):
        DocumentGroups(source, ConfigDict({**CONFIG, 'answer_tokens': 1}), 0, 1)[0]


def write_records(folder, made, base, settings):
    folder.mkdir()
    meta = {
        'base_fingerprint': base.fingerprint,
        'encoder_fingerprint': base.fingerprint,
        'config': {'settings': dataclasses.asdict(settings)},
    }
    assert records.write_shard(records.shard_path(folder, 0, 1), made, meta) > 0
    return folder


def test_records_of_several_folders(tmp_path, tiny):
    given = Settings(answers='given', entries=0)
    folders = [
        write_records(tmp_path / name, [record(f'{name}{n}', n) for n in lengths], tiny, given)
        for name, lengths in (('a', (5, 6)), ('b', (7, 8, 9)))
    ]
    joined = records.load('+'.join(map(str, folders)), tiny)
    assert joined.lengths.tolist() == [5, 6, 7, 8, 9]
    assert [joined[i].name for i in range(len(joined))] == ['a5', 'a6', 'b7', 'b8', 'b9']
    with pytest.raises(IndexError):
        joined[5]
    with pytest.raises(UserError, match='holds answers of the model'):
        records.load(str(folders[0]), dataclasses.replace(tiny, fingerprint='other'))


def test_generated_answers_need_an_opinion(tmp_path, tiny):
    settings = Settings(entries=0)
    folder = write_records(tmp_path / 'a', [record(entries=0)], tiny, settings)
    config = ConfigDict({**CONFIG, 'records': str(folder)})
    with pytest.raises(UserError, match='holds no log-probabilities'):
        document_groups.build(config, tiny, tiny, 0, 1)
    config.teacher = 'online'
    document_groups.build(config, tiny, tiny, 0, 1)
    with pytest.raises(UserError, match='holds contexts for the encoder .*, not for other'):
        document_groups.build(config, tiny, dataclasses.replace(tiny, fingerprint='other'), 0, 1)


def test_an_answer_without_an_opinion_is_certain():
    """Distillation is then cross-entropy."""
    known = record(queries=3, entries=0)
    row = document_groups.row_of(CONFIG, known, [0, 2])['query']
    assert row['label_weights'].sum() == pytest.approx(1)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 128)), jnp.float32)
    there = row['label_weights'] > 0
    np.testing.assert_allclose(
        objectives.top_k_distillation(logits, row)[there],
        objectives.cross_entropy(logits, row)[there],
        rtol=1e-6,
    )


def test_readings(tmp_path, tiny):
    """Rows of questions after their documents, which follow from (seed, index)."""
    given = Settings(answers='given', entries=0)
    made = [record(f'{n}', n, queries=1 + n % 3) for n in range(5, 40)]
    folder = write_records(tmp_path / 'a', made, tiny, given)
    config = ConfigDict({'records': str(folder), 'row_tokens': 32, 'row_labels': 8, 'steps': 4})
    groups = reading.build(config, tiny, tiny, 3, 2)
    assert len(groups) == 8
    known = {
        ((*prompt.tolist(), *query.answer[:-1].tolist()), tuple(query.answer.tolist()))
        for r in made
        for prompt, query in zip(r.teacher_prompts, r.queries, strict=True)
    }
    for index in range(8):
        query = groups[index]['query']
        jax.tree.map(np.testing.assert_array_equal, query, groups[index]['query'])
        segments = query['segments'][0]
        assert segments.max() >= 1
        labels = query['labels'][0][query['label_weights'][0] > 0]
        of = segments[query['label_positions'][0][: len(labels)]]
        for segment in range(1, segments.max() + 1):
            text = tuple(query['tokens'][0][segments == segment].tolist())
            assert (text, tuple(labels[of == segment].tolist())) in known
    with pytest.raises(UserError, match='no document of fewer than 3 tokens'):
        reading.build(ConfigDict({**config, 'row_tokens': 3}), tiny, tiny, 3, 2)
    with pytest.raises(UserError, match='no question with its document fits into 32 tokens'):
        reading.build(ConfigDict({**config, 'row_labels': 0}), tiny, tiny, 3, 2)[0]


def test_questions_of_passages():
    text = (
        'The old bridge over the river Wye was built in 1814 by Thomas Telford. It fell down. '
        'Nobody remembered afterwards how the carpenters had managed to lift the heavy stones.'
    )
    found = passages.ask(Document('a', text), 8)
    assert found == passages.ask(Document('a', text), 8)
    assert len(found) == 2  # the short sentence is left out
    for question in found:
        answer = question.answers[0]
        assert answer in text
        whole = ' '.join(text.split())
        sentence = question.text.split(': ', 1)[-1].split('? ', 1)[-1]
        assert sentence.replace('____', answer).replace('...', answer) in whole


def test_restated_sentences(teacher):
    text = 'The old bridge was built of stone. It fell. Nobody was to blame for it.'
    parts = passages.restate(Document('a', text))
    assert parts == passages.restate(Document('a', text))
    assert [part.name for part in parts] == ['a#0', 'a#1']  # the short sentence is left out
    assert all(part.questions[0].answers == (part.text,) for part in parts)
    settings = Settings('restate', answers='given', max_answer_tokens=64, entries=0)
    made = distillation.records(teacher, teacher.base.tokenizer, [Document('a', text)], settings)
    for part, known in zip(parts, made, strict=True):
        assert known.name == part.name
        assert known.queries[0].answer.tolist() == [*b' ', *known.context, 3]


def test_a_teacher_reads_with_its_lora(tiny):
    mesh = sharding.make_mesh({'fsdp': -1})
    dims = {name: (i, o) for name, i, o in lora.module_dims(tiny.config, ('down_proj',))}
    own = lora.init(jax.random.key(0), dims, tiny.config.num_layers, 2, 5.0)
    own = jax.tree.map(lambda x: x + 0.5, own)
    prompts = [tiny.tokenizer.prompt(text) for text in ('Who?', 'And why so?')]
    found = [Teacher(tiny, mesh, 64, adapter).answer(prompts, 8) for adapter in (None, own)]
    assert [f.tolist() for f in found[0]] != [f.tolist() for f in found[1]]
    texts = [tiny.tokenizer.decode([t for t in f if t != 3]) for f in found[1]]
    assert texts == answer(tiny, prompts, 8, own)
    plain, adapted = (
        Teacher(tiny, mesh, 64, adapter).opinions(prompts, [[5, 6], [7, 3]], 4)
        for adapter in (None, own)
    )
    assert not np.allclose(plain[0][1], adapted[0][1])


def test_a_reader_only_answers(tiny, monkeypatch):
    """Questions, and answers without a document, are the untuned model's."""
    heard = []

    def reply(self, prompts, limit):
        heard.append(self.lora is not None)
        return [np.asarray([*b'Who sings so well?', 3])] * len(prompts)

    monkeypatch.setattr(Teacher, 'answer', reply)
    monkeypatch.setattr(distillation, '_ASK', 'Ask {count}.')  # the window is small
    dims = {name: (i, o) for name, i, o in lora.module_dims(tiny.config, ('down_proj',))}
    own = lora.init(jax.random.key(0), dims, tiny.config.num_layers, 2)
    reader = Teacher(tiny, sharding.make_mesh({'fsdp': -1}), 64, own)
    sources = [Document(name, 'Text.', (Question('Who?'),)) for name in 'ab']
    for questions, wanted in (('given', [True]), ('generated', [False, True]), ('others', [False])):
        heard.clear()
        settings = Settings(questions, 1, max_answer_tokens=32, entries=0)
        assert len(list(distillation.records(reader, tiny.tokenizer, sources, settings))) == 2
        assert heard == wanted


def test_online_and_stored_teacher_agree(teacher, tmp_path):
    """Loss and gradient are the same, whether the teacher was asked before or is asked now."""
    base = teacher.base
    sources = [
        Document(f'{n}', 'abc def ' * n, (Question('Who?', ('Ann',)), Question('Why?', ('So',))))
        for n in (2, 3, 4)
    ]
    settings = Settings(answers='given', entries=objectives.TEACHER_ENTRIES)
    made = distillation.records(teacher, base.tokenizer, sources, settings)
    records.write_shard(records.shard_path(tmp_path, 0, 1), made, {'base_fingerprint': 'x'})
    config = tiny_training()
    config.objective = ConfigDict({'name': 'top_k_distillation'})
    learner = meta_learning.make_learner(config, base, 1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32),
        nn.unbox(learner.hypernetwork.init(jax.random.key(0), base.params)),
    )
    frozen = {'base': base.params, 'encoder': base.params}
    gradient = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))
    found = []
    for kind in ('stored', 'online'):
        data = ConfigDict({**CONFIG, 'teacher': kind, 'query_tokens': 16, 'teacher_tokens': 64})
        batch = DocumentGroups(Records(tmp_path), data, 0, 1)[0]
        assert ('teacher' in batch) == (kind == 'online')
        (total, sums), grads = gradient(params, frozen, batch)
        assert float(sums['loss'][1]) == pytest.approx(2)  # contexts
        found.append((total, grads))
    assert float(found[0][0]) > 0.1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *found)


def test_entries_of_the_top(teacher):
    ids, log_probs = top_log_probs(
        Decoder(teacher.base.config),
        teacher.base.params,
        jnp.ones((2, 4), int),
        jnp.ones((2, 1), int),
        7,
    )
    assert ids.shape == log_probs.shape == (2, 1, 7)
    assert (np.diff(log_probs, axis=-1) <= 0).all()


def test_two_stages(tmp_path):
    """Records of the real model, a training on them, and one in chunks from those weights."""
    base = load_base('smollm2', jnp.float32)
    mesh = sharding.make_mesh({'fsdp': -1})
    sources = [
        Document(f'{n}', 'Ann sings. ' * n, (Question('Who sings?', ('Ann',)),)) for n in (4, 9)
    ]
    settings = Settings(answers='given', entries=objectives.TEACHER_ENTRIES)
    made = distillation.records(Teacher(base, mesh, 512), base.tokenizer, sources, settings)
    folder = write_records(tmp_path / 'records', made, base, settings)
    before = None
    for variant in (f'tiny,{folder}', f'tiny_chunks,{folder},{tmp_path / "tiny"}'):
        config = d2l_docs.get_config(variant)
        config.data.context_tokens = (128,)  # few shapes
        workdir = tmp_path / variant.split(',')[0]
        state = meta_learning.train(config, str(workdir))
        values = json.loads((workdir / 'metrics.jsonl').read_text().splitlines()[-1])
        assert values['step'] == config.optimizer.steps and 0 < values['loss'] < 20
        assert config.init_from == (str(tmp_path / 'tiny') if before else '')
        before = state
    assert config.objective.max_chunks == len(config.data.chunks) == 8


@pytest.mark.parametrize(
    'argument, message',
    [
        ('large,R', 'unknown variant'),
        ('tiny', 'name the records'),
        ('tiny_chunks,R', "first stage's workdir"),
    ],
)
def test_bad_configs(argument, message):
    with pytest.raises(UserError, match=message):
        d2l_docs.get_config(argument)
