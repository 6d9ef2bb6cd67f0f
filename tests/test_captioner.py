"""The captioner: pictures become soft tokens that the frozen model reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_base
from ml_collections import ConfigDict
from PIL import Image
from test_pictures import package  # noqa: F401

from configs import captioner as configs
from d2l import captioner, captions, pictures
from hyperlora import aot, meta_learning, objectives, sharding
from hyperlora.errors import UserError
from hyperlora.models.decoder import Decoder, prefix


@pytest.fixture
def config(package, tmp_path):  # noqa: F811
    config = configs.get_config(f'tiny,{package.parent}')
    config.data.update({'query_tokens': 110, 'answer_tokens': 20})
    return config


def groups(config, seed=0):
    base = tiny_base()
    return captions.build(config.data, base, base, seed, 1)


def test_words_as_soft_tokens_are_read_as_words():
    base = tiny_base()
    tokens = jnp.asarray([[5, 9, 2, 7, 7, 1], [3, 3, 4, 8, 1, 6]])
    decoder = Decoder(base.config)
    plain = decoder.apply({'params': base.params}, tokens).hidden
    words = base.params['embedder']['embedding'][tokens[:, :4]]
    other = tokens.at[:, :4].set(0)
    soft = decoder.apply({'params': base.params}, other, soft=prefix(words, 6)).hidden
    np.testing.assert_array_equal(plain, soft)


def test_soft_tokens_are_mixtures_of_words(config):
    base = tiny_base()
    built = captioner.build(config.hypernetwork, base, None)
    params = built.init(jax.random.key(0), base.params)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    soft, shared = built.generate(params, base.params, {'pixels': pixels})
    words = base.params['embedder']['embedding']
    before = [*base.tokenizer.encode(captioner.SHOTS), *base.tokenizer.encode(pictures.PREFIX)]
    assert shared is None and soft.shape == (2, len(before) + 4, base.config.width)
    np.testing.assert_array_equal(soft[0, : len(before)], words[np.asarray(before)])
    mixed = np.asarray(soft[:, len(before) :], np.float64)
    # Of 128 words in 32 dimensions: the weights are not unique, but none of them is negative.
    assert (mixed <= words.max(0) + 1e-5).all() and (mixed >= words.min(0) - 1e-5).all()
    assert np.abs(mixed[0] - mixed[1]).max() > 1e-4
    config.hypernetwork.mix = False
    raw, _ = captioner.build(config.hypernetwork, base, None).generate(
        params, base.params, {'pixels': pixels}
    )
    # The same scores, unmixed (the tiny vocabulary is mixed whole).
    weights = jax.nn.softmax(raw[:, len(before) :] @ words.T)
    np.testing.assert_allclose(weights @ words, mixed, atol=1e-5)
    config.hypernetwork.tokens_per_image = 3
    with pytest.raises(UserError, match='cannot be pooled'):
        captioner.build(config.hypernetwork, base, None)
    untied = dataclasses.replace(base.config, tie_embeddings=False)
    with pytest.raises(UserError, match='embeddings are not tied'):
        captioner.build(config.hypernetwork, dataclasses.replace(base, config=untied), None)


def test_groups_name_their_pictures(config):
    base = tiny_base()
    source = groups(config)
    group = source[4]
    again = groups(config)[4]
    jax.tree.map(np.testing.assert_array_equal, group, again)
    query = group['query']
    names = set()
    for row in range(config.data.pictures):
        asked = query['label_weights'][row] > 0
        names.add(base.tokenizer.decode(query['labels'][row][asked]))
        assert query['label_weights'][row].sum() == pytest.approx(1)
        # Each label is the token after the place that predicts it.
        after = query['tokens'][row][query['label_positions'][row][asked][:-1] + 1]
        np.testing.assert_array_equal(after, query['labels'][row][asked][:-1])
    assert names == {' red dot\n', ' blue green dot\n'}
    pixels = group['context']['pixels']
    assert pixels.shape == (4, 16, 16, 3) and -1.01 <= pixels.min() < pixels.max() <= 1.01
    assert np.ptp(pixels, 0).max() > 0.1  # no two are moved alike
    config.data.answer_tokens = 10
    assert {p.name for p, _ in groups(config).pairs} == {'red dot'}
    config.data.held_out = ('mine',)
    with pytest.raises(UserError, match='none of 0 pictures'):
        groups(config)


def test_what_a_mirror_would_change_is_not_mirrored(config):
    ink = Image.new('RGB', (16, 16), 'white')
    ink.paste('black', (2, 2, 5, 14))  # at the left

    def left_share(mirrors):
        picture = pictures.Picture('a', '', '', ink, mirrors)
        source = captions.Captions([picture], tiny_base().tokenizer, config.data, 0, 1)
        dark = [1 - source[i]['context']['pixels'].mean(-1) for i in range(5)]
        return np.mean([rows[..., :8].sum((1, 2)) > rows[..., 8:].sum((1, 2)) for rows in dark])

    assert left_share(False) == 1 and 0 < left_share(True) < 1


def test_the_loop_teaches_it(config):
    """Two pictures are told apart after some steps; the base model is left as it is."""
    base = tiny_base()
    config.data.pictures = 8
    source = groups(config)
    built = captioner.build(config.hypernetwork, base, None)
    learner = meta_learning.Learner(
        built,
        Decoder(base.config),
        objectives.build(ConfigDict({'name': 'cross_entropy'})),
        1,
        optax.adam(3e-3),
    )
    state = meta_learning.nn.unbox(learner.init(jax.random.key(0), base.params))
    step = jax.jit(learner.step)
    for index in range(150):
        state, _ = step(
            state, {'base': base.params}, jax.tree.map(lambda x: x[None], source[index])
        )
    # What it learned is what the pictures show.
    loss = jax.jit(lambda batch: learner.loss(state.params, {'base': base.params}, batch)[0])
    for index in range(1000, 1003):
        held = source[index]
        names = held['query']['labels'][:, 1]  # the first is a space
        others = [np.flatnonzero(names != name)[0] for name in names]
        other = {'pixels': held['context']['pixels'][others]}
        assert loss({**held, 'context': other}) > loss(held) + 0.5


def test_no_answers_are_compiled_for_it(config):
    base = tiny_base()
    plan = meta_learning.make_plan(config, base, sharding.make_mesh({}, jax.devices()[:1]))
    with pytest.raises(UserError, match='captioner makes no LoRA to answer with'):
        aot._generate(config, base, plan, None)


def test_alignment_leads_to_the_words_in_their_order():
    words = np.random.default_rng(0).normal(size=(50, 8))
    words = jnp.asarray(4 * words / np.linalg.norm(words, axis=1, keepdims=True), jnp.float32)
    model = objectives.AdaptedModel(None, lambda x: x @ words.T)
    query = {
        'labels': jnp.asarray([[7, 3, 0, 0], [5, 9, 11, 2]]),
        'label_weights': jnp.asarray([[0.5, 0.5, 0, 0], [0.25] * 4]),
    }
    objective = objectives.build(ConfigDict({'name': 'alignment', 'places': 3}))
    before = jnp.full((2, 2, 8), 100.0)

    def at(tokens):
        soft = jnp.concatenate([before, words[jnp.asarray(tokens)]], 1)
        total, sums = objective(soft, None, {'query': query}, model)
        return float(total), {name: float(x / weight) for name, (x, weight) in sums.items()}

    best, sums = at([[7, 3, 3], [5, 9, 11]])  # the last label stands for what is missing
    labels = np.asarray([7, 3, 3, 5, 9, 11])
    expected = -jax.nn.log_softmax(words[labels] @ words.T)[np.arange(6), labels]
    np.testing.assert_allclose(best, expected.sum(), rtol=1e-4)
    assert sums['accuracy'] == 1 and sums['loss'] == pytest.approx(best / 6)
    for worse in ([[3, 7, 3], [5, 9, 11]], [[7, 3, 0], [5, 9, 11]], [[7, 3, 3], [9, 5, 11]]):
        total, sums = at(worse)
        assert total > best + 1 and sums['accuracy'] < 1


def test_what_the_config_refuses(package, tmp_path):  # noqa: F811
    for argument in ('align', f'align,{package}'):
        with pytest.raises(UserError, match='folder of the unpacked packages'):
            configs.get_config(argument)
    with pytest.raises(UserError, match='unknown variant'):
        configs.get_config(str(tmp_path))
    with pytest.raises(UserError, match='name the workdir of the stage before'):
        configs.get_config(f'smollm2,{package.parent}')
    (package.parent / 'fluent/assets').mkdir(parents=True)
    aligned = configs.get_config(f'align,{package.parent}')
    assert [s['reader'] for s in aligned.data.sources] == ['emoji', 'code_points', 'digits']
    assert aligned.data.sources[1]['style'] == 'fluent'
    assert aligned.data.sources[1]['names'] == aligned.data.sources[0]['path'] == str(package)
    assert aligned.objective.places == aligned.hypernetwork.tokens_per_image
