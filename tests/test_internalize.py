"""Documents to LoRAs: the chunks' LoRAs add up, whatever way they are computed."""

import copy
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CharTokenizer, tiny_base, tiny_training
from ml_collections import ConfigDict

from configs import eval_niah
from d2l import build, inspection, internalize, niah_evaluation
from d2l.internalize import Answerer, Internalizer, Question
from hyperlora import hypernetwork, trained
from hyperlora.errors import UserError
from hyperlora.generation import answer
from hyperlora.models.decoder import first_layers
from hyperlora.trained import Trained

SENTENCES = ('One thing. ', 'Another one, longer than that. ', 'Why? ', 'The number is 7. ')


@pytest.fixture(scope='module')
def model():
    """A random hypernetwork of the tiny base that reads chunks of 40 tokens; gates half open."""
    base, config = tiny_base(), tiny_training()
    config.chunk_length = 40
    built = hypernetwork.build(config.hypernetwork, base)
    params = nn.unbox(jax.jit(built.init)(jax.random.key(0), base.params))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), params)
    return Trained(config, base, built, params)


@pytest.mark.parametrize('length', [0, 'long', None])
def test_a_config_that_does_not_say_how_documents_are_cut(model, length):
    config = ConfigDict({**model.config.to_dict(), 'chunk_length': length})
    with pytest.raises(UserError, match=f'chunk_length in the config of .* is {length!r}'):
        Internalizer(dataclasses.replace(model, config=config))


def document(seed, sentences=12):
    rng = np.random.default_rng(seed)
    return tiny_base().tokenizer.encode(''.join(rng.choice(SENTENCES, sentences)))


def delta(lora):
    """Module -> `[l, i, o]` in float64, of a LoRA of one row."""
    return {
        name: float(lora.scaling)
        * np.einsum(
            'lri,lro->lio',
            np.asarray(pair.a[:, 0], np.float64),
            np.asarray(pair.b[:, 0], np.float64),
        )
        for name, pair in lora.pairs.items()
    }


def assert_same(ours, wanted):
    for name in wanted:
        largest = np.abs(wanted[name]).max()
        assert largest > 0
        np.testing.assert_allclose(ours[name], wanted[name], atol=1e-5 * largest)


def generated(model, tokens):
    """What the hypernetwork makes of one chunk."""
    context = {'tokens': np.asarray([tokens], np.int32), 'mask': np.ones((1, len(tokens)), bool)}
    return jax.jit(model.hypernetwork.generate)(model.params, model.base.params, context)


def direct(model, tokens, prefix=(), suffix=()):
    """The sum of all chunks' LoRAs, one after the other and unpadded, and the shared one."""
    total = None
    for chunk in Internalizer(model).split(tokens):
        own, shared = generated(model, (*prefix, *chunk, *suffix))
        total = delta(own) if total is None else {k: v + total[k] for k, v in delta(own).items()}
    return {name: value + delta(shared)[name] for name, value in total.items()}


def test_chunks_add_up(model):
    tokens = document(0)
    chunks = Internalizer(model).split(tokens)
    assert len(chunks) > 3
    assert_same(delta(Internalizer(model)(tokens)), direct(model, tokens))


def test_affixes_go_around_every_chunk(model):
    tokens = document(0)
    config = model.config.copy_and_resolve_references()
    config.chunk_prefix, config.chunk_suffix = (5, 6), (7,)
    affixed = dataclasses.replace(model, config=config)
    assert_same(delta(Internalizer(affixed)(tokens)), direct(model, tokens, (5, 6), (7,)))


def test_another_model_may_read_the_documents(monkeypatch):
    """Its features, its tokenizer; the base model only carries the LoRA."""
    base, config = tiny_base(), tiny_training()
    config.chunk_length = 40
    config.hypernetwork.encoder.model = 'reader'

    class Shouting(CharTokenizer):
        def encode(self, text):
            return super().encode(text.upper())

    reader = dataclasses.replace(tiny_base(1), tokenizer=Shouting(), fingerprint='reader')
    monkeypatch.setattr(build, 'load_base', lambda *_, **__: reader)
    built = hypernetwork.build(config.hypernetwork, base)
    assert built.encoder is reader
    params = nn.unbox(jax.jit(built.init)(jax.random.key(0), reader.params))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), params)
    tokens = built.encoder.tokenizer.encode('one thing.')
    context = {'tokens': np.asarray([tokens], np.int32), 'mask': np.ones((1, len(tokens)), bool)}
    hidden = first_layers(reader.config, reader.params, context['tokens'], 1)[0]
    own, shared = built.module.apply({'params': params}, hidden[:, None], context['mask'])
    wanted = {k: v + delta(shared)[k] for k, v in delta(own).items()}
    assert_same(delta(Internalizer(Trained(config, base, built, params))(tokens)), wanted)


def test_needles_are_hidden_in_the_tokens_of_the_reader(model, tmp_path, monkeypatch):
    class Shifted(CharTokenizer):
        def encode(self, text):
            return [token ^ 1 for token in super().encode(text)]

        def decode(self, ids):
            return super().decode([token ^ 1 for token in ids])

    encoder = dataclasses.replace(model.base, tokenizer=Shifted())
    other = dataclasses.replace(
        model, hypernetwork=dataclasses.replace(model.hypernetwork, encoder=encoder)
    )
    read, asked = [], []

    class Reader:
        def __init__(self, internalizer):
            pass

        def __call__(self, questions, max_new_tokens):
            read.extend(Shifted().decode(q.document) for q in questions)
            return [''] * len(questions)

    def answers(base, prompts, *_):
        asked.extend(map(base.tokenizer.decode, prompts))
        return [''] * len(prompts)

    monkeypatch.setattr(trained, 'load', lambda *_, **__: other)
    monkeypatch.setattr(niah_evaluation, 'Answerer', Reader)
    monkeypatch.setattr(niah_evaluation, 'answer', answers)
    monkeypatch.setattr(niah_evaluation, 'answer_in_batches', answers)
    monkeypatch.setattr(niah_evaluation, 'QUESTION', 'N?')
    config = eval_niah.get_config()
    config.update({'lengths': (64,), 'examples': 2, 'baseline_examples': 2})
    niah_evaluation.evaluate(config, 'x', tmp_path)
    assert len(read) == 2 and all('magic number is' in text for text in read)
    assert asked[1:] == [f'{text}\n\nN?' for text in read]


def test_layer_by_layer_gives_the_same(model):
    tokens = document(0)
    assert_same(delta(Internalizer(model, iterative=True)(tokens)), direct(model, tokens))


def test_a_chunk_that_recurs_is_counted_and_not_repeated(model):
    tokens = tiny_base().tokenizer.encode(' '.join(['Sixteen letters.'] * 12))
    chunks = Internalizer(model).split(tokens)
    assert len(chunks) == 6 and len(set(chunks)) == 2  # the first one has no space before it
    lora = Internalizer(model)(tokens)
    assert lora.rank == 8 * (len(set(chunks)) + 1)
    assert_same(delta(lora), direct(model, tokens))


def test_long_documents_are_folded_without_loss(model, monkeypatch):
    monkeypatch.setattr(internalize, '_MAX_RANK', 16)
    monkeypatch.setattr(internalize, '_TOKENS_PER_PASS', 64)
    tokens = document(1, sentences=16)
    lora = Internalizer(model)(tokens)
    assert lora.rank == 32  # the width of the tiny base
    assert_same(delta(lora), direct(model, tokens))
    monkeypatch.undo()  # so is what is read at once
    assert Internalizer(model).chunks(tokens).rank == 32


def with_gate(model, value):
    kernel = np.zeros_like(model.params['gate']['kernel'])
    gate = {'kernel': kernel, 'bias': np.full(1, value, np.float32)}
    return dataclasses.replace(model, params={**model.params, 'gate': gate})


def test_a_shut_gate_is_silent(model):
    shut, tokens = with_gate(model, -50.0), document(0)
    lora = Internalizer(shut)(tokens)
    assert lora.rank == 8  # only the shared LoRA is left
    own, shared = generated(shut, tokens)
    assert all(not np.asarray(pair.b).any() for pair in own.pairs.values())
    assert_same(delta(lora), delta(shared))
    # Wide open is a factor of exactly 1.
    own = [generated(with_gate(model, value), tokens)[0] for value in (50.0, 90.0)]
    jax.tree.map(np.testing.assert_array_equal, *own)


def test_gates_below_the_threshold_are_shut(model):
    tokens = document(0, sentences=3)
    chunks = len(set(Internalizer(model).split(tokens)))
    assert model.config.min_gate == 0.25
    for value, ranks in ((-1.0, 0), (-0.8, chunks)):  # gates of 0.22 and 0.27
        lora = Internalizer(with_gate(model, value))(tokens)
        assert lora.rank == 8 * (ranks + 1)


def test_many_answers_are_each_ones_answer(model):
    """Packed along one rank, with chunks in common, as each question alone."""
    internalizer, prompt = Internalizer(model), tiny_base().tokenizer.prompt('Who?')
    documents = [document(seed, sentences=2 + seed % 5) for seed in range(10)]
    alone = [answer(model.base, [prompt], 6, internalizer(tokens))[0] for tokens in documents]
    assert len(set(alone)) > 3  # the documents matter
    questions = [Question(tokens, prompt) for tokens in documents]
    assert Answerer(internalizer, max_rows=4)(questions, 6) == alone
    assert Answerer(internalizer, max_rank=5 * 8)(questions, 6) == alone
    assert Answerer(Internalizer(with_gate(model, -50.0)))(questions[:3], 6) == answer(
        model.base, [prompt] * 3, 6, Internalizer(with_gate(model, -50.0))(documents[0])
    )


def test_an_empty_document_is_refused(model):
    with pytest.raises(UserError, match='empty'):
        Internalizer(model)([])


@pytest.mark.parametrize('entries', ['early_exit', 'per_layer_activations'])
def test_attention_maps_weigh_the_values(model, entries):
    """They are the weights that the module itself used: times its values they are its output."""
    config = copy.deepcopy(model.config)
    config.hypernetwork.encoder.name = entries
    built = hypernetwork.build(config.hypernetwork, model.base)
    params = nn.unbox(jax.jit(built.init)(jax.random.key(0), model.base.params))
    trained = Trained(config, model.base, built, params)
    tokens = document(0)[:10]
    maps = inspection.attention_maps(trained, tokens)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    _, state = built.module.apply(
        {'params': params},
        *built.encode(
            model.base.params, {'tokens': np.asarray([tokens]), 'mask': np.ones((1, 10), bool)}
        ),
        mutable=['intermediates'],
        capture_intermediates=True,
    )
    shape = built.module.config.perceiver
    assert maps.shape[:2] == (shape.num_blocks, model.base.config.num_layers ** (entries[0] == 'p'))
    blocks = state['intermediates']['perceiver']
    for i in range(shape.num_blocks):
        block = blocks[f'cross_{i}']
        v = block['v_proj']['__call__'][0]
        v = v.reshape(*v.shape[:2], -1, shape.head_dim)
        v = jnp.repeat(v, shape.num_heads // shape.num_kv_heads, 2)
        y = jnp.einsum('ehzs,eshd->ezhd', maps[i], v).reshape(*v.shape[:1], maps.shape[3], -1)
        y = y @ params['perceiver'][f'cross_{i}']['o_proj']['kernel']
        np.testing.assert_allclose(y, block['o_proj']['__call__'][0], atol=1e-5)
    with pytest.raises(UserError, match='empty'):
        inspection.attention_maps(trained, [])
