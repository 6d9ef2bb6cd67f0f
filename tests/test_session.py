"""The way in from Python: the same as the parts it is made of."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CharTokenizer, tiny_base
from test_qa import model, same  # noqa: F401

from d2l.internalize import Internalizer
from hyperlora import generation, lora, trained
from hyperlora.errors import UserError
from hyperlora.generation import answer, stream
from hyperlora.models import families
from hyperlora.session import Adapter, Session

TEXT = 'One thing. Another one, longer than that. Why? '


@pytest.fixture
def session(model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trained, 'load', lambda *_: model)
    return Session('some')


def random_lora(base, modules, rank=2, seed=0):
    dims = {name: (i, o) for name, i, o in lora.module_dims(base.config, modules)}
    fresh = lora.init(jax.random.key(seed), dims, base.config.num_layers, rank, 2.0)
    return jax.tree.map(lambda x: x + 0.1, fresh)


def test_a_document(session, tmp_path):
    base = session.base
    adapter = session.internalize(TEXT)
    same(adapter.lora, Internalizer(session.internalizer.trained)(base.tokenizer.encode(TEXT)))
    assert adapter.metadata['hypernetwork'] == 'some'
    assert len(adapter.metadata['document_sha256']) == 64
    questions = ['Who?', 'And why is that so?']
    prompts = [base.tokenizer.prompt(text) for text in questions]
    wanted = answer(base, prompts, 8, adapter.lora)
    assert session.ask_all(questions, adapter, 8) == wanted != session.ask_all(questions, None, 8)
    assert [session.ask(text, adapter.lora, 8) for text in questions] == wanted
    assert session.ask_all([], adapter) == []
    assert [''.join(session.stream(text, adapter, 8)) for text in questions] == wanted
    session.save(adapter, tmp_path / 'a' / 'b')
    found = session.load(tmp_path / 'a' / 'b')
    same(found.lora, adapter.lora)
    assert found.metadata == adapter.metadata
    other = Session(base=dataclasses.replace(base, fingerprint='other'))
    with pytest.raises(UserError, match='was made for base model'):
        other.load(tmp_path / 'a' / 'b')


def test_a_document_in_the_prompt(session):
    base = session.base
    prompt = base.tokenizer.prompt(f'{TEXT}\n\nWho?')
    assert session.ask('Who?', None, 8, TEXT) == answer(base, [prompt], 8)[0]


def test_many_questions_are_asked_in_batches(session, monkeypatch):
    adapter, rows = session.internalize(TEXT), []
    whole = generation._answer

    def counted(base, prompts, *rest):
        rows.append(len(prompts))
        return whole(base, prompts, *rest)

    monkeypatch.setattr(generation, '_answer', counted)
    prompts = [session.prompt(f'{n}?', 4) for n in range(7)]
    answers = generation.answer_tokens(session.base, prompts, 4, adapter.lora, tokens=64)
    assert rows == [2, 2, 2, 1]
    assert answers == whole(session.base, prompts, 4, adapter.lora)


def test_adapters_of_different_modules_add_up(session):
    base = session.base
    one = random_lora(base, ('down_proj',), 2)
    two = random_lora(base, ('down_proj', 'q_proj'), 3, seed=1)
    both = session.compose(Adapter(one, {'hypernetwork': 'x'}), two, scales=(1.0, 0.5))
    assert both.metadata['hypernetwork'] == 'x'
    tokens = jnp.asarray([[5, 6, 7]])
    from hyperlora.models.decoder import Decoder

    def hidden(params, adapter=None):
        return Decoder(base.config).apply({'params': params}, tokens, lora=adapter).hidden

    merged = lora.merge(lora.merge(base.params, one), lora.scale(two, 0.5))
    np.testing.assert_allclose(hidden(base.params, both.lora), hidden(merged), atol=1e-4)
    with pytest.raises(ValueError, match='zip'):
        session.compose(one, two, scales=(1.0,))
    without = session.compose(one, two, scales=(0, 1))
    np.testing.assert_allclose(
        hidden(base.params, without.lora), hidden(lora.merge(base.params, two)), atol=1e-4
    )


def test_a_merged_model_stops_where_answers_end(tiny, tmp_path, monkeypatch):
    """And is complete once it has a config.json."""
    replace, order = Path.replace, []

    def write(_, folder):
        Path(folder, 'tokenizer.json').write_text('{}')

    def replaced(path, target):
        if Path(target).parent == tmp_path:
            order.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(CharTokenizer, 'save', write, raising=False)
    monkeypatch.setattr(Path, 'replace', replaced)
    Session(base=tiny).save_merged(random_lora(tiny, ('q_proj',)), tmp_path)
    config = json.loads((tmp_path / 'generation_config.json').read_text())
    assert config == {'eos_token_id': CharTokenizer.eos_id}
    assert len(order) == 4 and order[-1] == 'config.json'
    assert {path.name for path in tmp_path.iterdir()} == {*order}


def test_a_stream_ends_where_the_answer_ends(tiny):
    """At the end of the turn, or at the limit."""
    prompt = tiny.tokenizer.prompt('Why?')
    whole = answer(tiny, [prompt], 12)[0]
    assert ''.join(stream(tiny, prompt, 12)) == whole
    last = whole[5]  # now the end of the turn
    tokenizer = CharTokenizer()
    tokenizer.eos_id = ord(last)
    ending = dataclasses.replace(tiny, tokenizer=tokenizer)
    assert ''.join(stream(ending, prompt, 12)) == whole[: whole.index(last)]
    assert answer(ending, [prompt], 12) == [whole[: whole.index(last)]]
    with pytest.raises(UserError, match='do not fit into the window'):
        list(stream(tiny, [5] * 250, 12))


def test_answers_lose_the_space_before_them(tiny, monkeypatch):
    """Hypernetworks learn answers with one; users see none, nor pieces of nothing."""
    prompt = tiny.tokenizer.prompt('Why?')
    plain = answer(tiny, [prompt], 12)[0]
    decode = CharTokenizer.decode
    monkeypatch.setattr(CharTokenizer, 'decode', lambda self, ids: f' \n{decode(self, ids)}')
    assert answer(tiny, [prompt], 12) == [plain]
    pieces = list(stream(tiny, prompt, 12))
    assert all(pieces) and ''.join(pieces) == plain


def test_an_empty_document(session):
    with pytest.raises(UserError, match='empty'):
        session.internalize('')


@pytest.fixture
def merge(tmp_path):
    """Writes a tiny model, the config.json of whose base names a dtype, to tmp_path/merged."""
    tiny = tiny_base()
    for name in ('base', 'merged'):
        (tmp_path / name).mkdir()
    config = families.to_hf(tiny.config) | {'dtype': 'bfloat16'}
    (tmp_path / 'base/config.json').write_text(json.dumps(config))
    tokenizer = types.SimpleNamespace(save=lambda folder: None, eos_id=3)
    base = dataclasses.replace(tiny, name=str(tmp_path / 'base'), tokenizer=tokenizer)
    adapter = random_lora(base, ['q_proj'])
    return lambda: Session.save_merged(
        types.SimpleNamespace(base=base), adapter, tmp_path / 'merged', 'float16'
    )


def test_a_merged_model_names_the_dtype_that_it_was_written_in(merge, tmp_path):
    """transformers reads `dtype` first, which is that of the base model's files."""
    merge()
    written = json.loads((tmp_path / 'merged/config.json').read_text())
    assert written['torch_dtype'] == 'float16' and 'dtype' not in written


def test_a_full_disk_leaves_nothing_behind(merge, tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', fail)
    with pytest.raises(UserError, match='cannot write a model to .*merged .*No space left'):
        merge()
    assert not list((tmp_path / 'merged').iterdir())
