"""Documents written into a linear associative memory."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, tiny_base
from ml_collections import ConfigDict

from configs import d2l_docs
from d2l import associative
from d2l.internalize import Answerer, Internalizer, Question
from d2l.memory import Memory
from hyperlora import hypernetwork
from hyperlora import lora as lora_lib
from hyperlora.errors import UserError
from hyperlora.generation import answer
from hyperlora.models.decoder import Block, first_layers, inputs_of, places
from hyperlora.trained import Trained

SHAPE = {
    'written': 2,
    'scaling': 1.0,
    'latent_size': 16,
    'num_blocks': 1,
    'num_heads': 2,
    'bottleneck': 8,
    'shared_rank': 3,
}


def build(base=None):
    config = ConfigDict({'name': 'associative_memory', 'shape': SHAPE})
    built = hypernetwork.build(config, base or tiny_base())
    return built, nn.unbox(jax.jit(built.init)(jax.random.key(0), tiny_base().params))


@pytest.fixture(scope='module')
def model():
    """A random one, whose maps are not at their start."""
    built, params = build()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    config = d2l_docs.get_config('smollm2,RECORDS')
    config.chunk_length = 64
    return Trained(config, tiny_base(), built, params)


def generate(model, tokens, room=0):
    context = {
        'tokens': np.asarray([[*tokens, *[0] * room]], np.int32),
        'mask': np.asarray([[True] * len(tokens) + [False] * room]),
    }
    return model.hypernetwork.generate(model.params, tiny_base().params, context)


def test_it_computes_in_bfloat16(model):
    low = dataclasses.replace(model.hypernetwork, dtype=jnp.bfloat16)
    wanted, ours = (
        generate(dataclasses.replace(model, hypernetwork=built), [5, 6, 7, 8])
        for built in (model.hypernetwork, low)
    )
    for exact, rounded in zip(jax.tree.leaves(wanted), jax.tree.leaves(ours), strict=True):
        if exact.ndim:  # not a scaling
            assert rounded.dtype == jnp.bfloat16
            error = np.linalg.norm(exact - rounded.astype(np.float32))
            assert error < 0.1 * np.linalg.norm(exact)


def delta(lora):
    pair = lora.pairs['down_proj']
    return float(lora.scaling) * np.einsum('lgri,lgro->lgio', pair.a, pair.b)


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('num_heads', 3, 'num_heads must be positive and even, not 3'),
        ('num_heads', 0, 'num_heads must be positive and even, not 0'),
        ('num_heads', 6, 'not 6, and divide latent_size .16.'),
        ('written', 0, 'written must be from 1 to 3, the layers of tiny, not 0'),
        ('written', 4, 'written must be from 1 to 3'),
    ],
)
def test_bad_shapes(name, value, message):
    config = ConfigDict({'name': 'associative_memory', 'shape': {**SHAPE, name: value}})
    with pytest.raises(UserError, match=message):
        hypernetwork.build(config, tiny_base())


def test_inputs_of_a_projection():
    """What it read, times its kernel, is what it gave."""
    base, tokens = tiny_base(), np.arange(20, 32, dtype=np.int32)[None]
    hidden, read = inputs_of(TINY, base.params, tokens, 'down_proj')
    np.testing.assert_array_equal(hidden, first_layers(TINY, base.params, tokens, 3)[1])
    assert read.shape == (3, 1, 12, TINY.mlp_width)
    where = places(TINY, np.arange(12)[None])
    for layer in range(2):
        params = jax.tree.map(lambda x, i=layer: x[i], base.params['layers'])
        kernel = params['mlp']['down_proj']['kernel']
        without = {**params, 'mlp': {**params['mlp'], 'down_proj': {'kernel': 0 * kernel}}}
        block, rest = Block(TINY, None), (None, None, None, where, None, None)
        stream, _ = block.apply({'params': without}, hidden[layer], *rest)
        given = hidden[layer + 1] - stream
        np.testing.assert_allclose(read[layer] @ kernel, given, atol=1e-5)


def test_a_rank_for_each_token(model):
    tokens = tiny_base().tokenizer.encode('a text of some words')
    lora, _ = generate(model, tokens)
    pair = lora.pairs['down_proj']
    assert pair.a.shape == (3, 1, len(tokens), TINY.mlp_width)
    assert pair.b.shape == (3, 1, len(tokens), TINY.width)
    written = np.any(np.asarray(pair.b) != 0, -1)
    np.testing.assert_array_equal(written[0], False)  # not one of the last two layers
    np.testing.assert_array_equal(written[1:], True)
    # Padding writes nothing, and changes nothing.
    np.testing.assert_allclose(
        delta(generate(model, tokens, room=9)[0]), delta(lora), rtol=1e-5, atol=1e-5
    )


def test_starts_as_gradient_descent():
    """Keys are activations before each token about the mean of those at them, the first token's
    none; values are what says the tokens; the delta is the linear map that 256 steps of a sixteenth
    of the longest find."""
    built, params = build()
    params = built.start(params)
    tokens = np.asarray([[40, 41, 90, 41, 7]], np.int32)
    context = {'tokens': tokens, 'mask': np.ones((1, 5), bool)}
    params['gate']['kernel'] = np.zeros_like(params['gate']['kernel'])
    lora, shared = built.generate(params, tiny_base().params, context)
    assert not np.any(delta(shared))

    def rms(x):
        return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True))

    begun = np.asarray([[tiny_base().tokenizer.prompt('?')[0], *tokens[0]]], np.int32)
    read = rms(np.asarray(inputs_of(TINY, tiny_base().params, begun, 'down_proj')[1][1:]))
    values = rms(whitened(params)[tokens[0]]) / 2
    for layer in range(2):
        k = read[layer, 0, :5] - read[layer, 0, 1:].mean(0)
        k[0] = 0
        rate = 1 / 16 / np.abs(k @ k.T).sum(1).max()
        weights = np.zeros((TINY.mlp_width, TINY.width))
        for _ in range(256):
            weights += rate * k.T @ (values - k @ weights)
        np.testing.assert_allclose(delta(lora)[1 + layer, 0], weights, rtol=2e-3, atol=1e-5)


def whitened(params):
    table = np.asarray(tiny_base().params['embedder']['embedding'])
    return table @ np.asarray(params['whiten']['kernel']) + np.asarray(params['whiten']['bias'])


def test_values_are_whitened_unembeddings():
    """What makes the logits, at mean 0 and covariance 1, by a symmetric map: so each value is said
    as its own token, also where one token's embedding is long and all have much in common."""
    rng = np.random.default_rng(0)
    params = dict(tiny_base().params)
    table = rng.standard_normal(params['embedder']['embedding'].shape, np.float32)
    table = table @ np.diag(np.geomspace(0.1, 3, TINY.width).astype(np.float32)) + 2
    scale = rng.uniform(0.5, 2, TINY.width).astype(np.float32)
    params |= {'embedder': {'embedding': table}, 'final_norm': {'scale': scale}}
    base = dataclasses.replace(tiny_base(), params=params)
    built, fresh = build(base)
    whiten = jax.tree.map(np.asarray, built.start(fresh)['whiten'])
    values = table @ whiten['kernel'] + whiten['bias']
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(values, rowvar=False), np.eye(TINY.width), atol=0.02)
    turned = whiten['kernel'] / scale[:, None]
    np.testing.assert_allclose(turned, turned.T, atol=1e-4)
    own = np.arange(len(table))
    assert ((values @ (table * scale).T).argmax(1) == own).mean() > 0.95
    assert (((table * scale) @ (table * scale).T).argmax(1) == own).mean() < 0.5


def test_every_parameter_learns(model):
    def loss(params):
        changed = Trained(model.config, model.base, model.hypernetwork, params)
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(generate(changed, [50, 60, 70, 80])))

    for path, x in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(model.params)):
        name = jax.tree_util.keystr(path)
        # A softmax does not see what is added to all keys.
        unseen = "['attention']['key']['bias']" in name
        assert unseen or bool(np.any(np.abs(x) > 1e-7)), name


def test_keys_gather_what_is_around(model):
    """A token's key is changed by what comes after it, though nothing that is computed before it
    is; without shares of the attention only the mean of the keys moves, alike for all tokens."""
    params = {**model.params, 'key_up': jax.tree.map(jnp.zeros_like, model.params['key_up'])}

    def moved(params):
        changed = dataclasses.replace(model, params=params)
        texts = ([50, 60, 70, 80], [50, 60, 90, 40])
        first, second = (generate(changed, t)[0].pairs['down_proj'].a[1:, 0] for t in texts)
        return np.asarray(first - second)[:, 1:3]  # keys of tokens with the same tokens before

    assert not np.allclose(*moved(params).swapaxes(0, 1), rtol=1e-2)
    alone = {**params, 'shares': jax.tree.map(jnp.zeros_like, params['shares'])}
    np.testing.assert_allclose(*moved(alone).swapaxes(0, 1), rtol=1e-3, atol=1e-6)
    assert np.abs(moved(alone)).max() > 1e-5


def test_chunks_and_documents_are_reconciled(model):
    internalizer, tokenizer = Internalizer(model), tiny_base().tokenizer
    tokens = tokenizer.encode('One thing is short. ' * 7 + 'So is the end.')
    chunks = internalizer.split(tokens)
    assert len({len(chunk) for chunk in chunks}) > 1
    made = [generate(model, chunk) for chunk in chunks]
    parts = [lora for lora, _ in made]

    def together(parts):
        return lora_lib.reconcile(parts, associative._RIDGE)

    def close(ours, wanted):
        np.testing.assert_allclose(delta(ours), wanted, rtol=1e-3, atol=1e-3)

    own, shared = together(parts), delta(made[0][1])
    summed = sum(map(delta, parts))
    assert np.abs(delta(own) - summed).max() > 0.05
    close(internalizer(tokens), delta(own) + shared)
    # And so are documents with each other.
    other = tokenizer.encode('Another text, without any end')
    memory = Memory(internalizer)
    for name, document in (('a', tokens), ('b', other)):
        memory.add(name, document)
    both = together([internalizer.chunks(tokens), generate(model, other)[0]])
    close(memory.lora(), delta(both) + shared)
    memory.remove('b')
    close(memory.lora(), delta(own) + shared)
    # Answers to many questions are those with each document's own LoRA.
    prompt = tokenizer.prompt('what?')
    found = Answerer(internalizer)([Question(tokens, prompt), Question(other, prompt)], 6)
    for document, text in zip((tokens, other), found, strict=True):
        assert answer(tiny_base(), [prompt], 6, lora_lib.round_rank(internalizer(document))) == [
            text
        ]
