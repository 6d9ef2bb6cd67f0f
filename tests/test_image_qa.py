"""Images through text-only weights: what is read, what is chosen, and what is never seen."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_base, tiny_training
from ml_collections import ConfigDict
from PIL import Image
from test_pictures import package  # noqa: F401

from configs import captioner as captioner_config
from configs import d2l_images, documents
from d2l import distillation, image_qa, pictures
from d2l import documents as documents_lib
from d2l.image_internalizer import ImageInternalizer
from d2l.image_qa import Chooser
from hyperlora import hypernetwork, sharding, trained
from hyperlora.errors import UserError
from hyperlora.models import images
from hyperlora.models.decoder import Decoder
from hyperlora.session import Session
from hyperlora.trained import Trained


def random_model(config):
    base = tiny_base()
    built = hypernetwork.build(config.hypernetwork, base)
    params = nn.unbox(jax.jit(built.init)(jax.random.key(0), base.params))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), params)
    return Trained(config, base, built, params)


@pytest.fixture
def model():
    return random_model(tiny_training())


@pytest.fixture
def captioner(package):  # noqa: F811
    config = captioner_config.get_config(f'tiny,{package.parent}')
    return random_model(config)


def test_soft_tokens_that_are_words_are_read_as_words(model, captioner):
    internalizer = ImageInternalizer(model, captioner)
    text = internalizer.texts(['Image: a dot'])
    words = model.base.params['embedder']['embedding'][text['tokens']]
    soft = {**text, 'tokens': np.zeros_like(text['tokens']), 'soft': words}
    jax.tree.map(np.testing.assert_array_equal, internalizer(text), internalizer(soft))


def test_images_become_different_loras(model, captioner):
    internalizer = ImageInternalizer(model, captioner)
    rng = np.random.default_rng(0)
    some = [Image.fromarray(rng.integers(0, 255, (9, 7, 3), np.uint8)) for _ in range(2)]
    both = internalizer(internalizer.contexts(some))
    alone = internalizer(internalizer.contexts(some[:1]))
    pair, single = both.pairs['down_proj'], alone.pairs['down_proj']
    np.testing.assert_allclose(pair.b[:, :1], single.b, atol=1e-6)
    assert np.abs(pair.b[:, 0] - pair.b[:, 1]).max() > 1e-4
    with pytest.raises(UserError, match='tiny reads no images; name a captioner'):
        ImageInternalizer(model)
    with pytest.raises(UserError, match='captioner'):
        ImageInternalizer(model, model)
    # A captioner that was only aligned gives mixtures as well.
    captioner.config.hypernetwork.mix = False
    aligned = ImageInternalizer(model, captioner)
    np.testing.assert_array_equal(aligned.soft_tokens(some), internalizer.soft_tokens(some))


def test_the_likeliest_name_is_chosen(model, captioner):
    internalizer = ImageInternalizer(model, captioner)
    base, options = model.base, [['cat', 'a dog', 'emu'], ['ox', 'cat', 'bee']]
    lora = internalizer(internalizer.texts(['Image: ox', 'Image: what']))
    decoder = Decoder(base.config)

    def likelihood(name, row):
        prompt = base.tokenizer.prompt(pictures.QUESTION)
        answer = [*base.tokenizer.encode(name), base.tokenizer.eos_id]
        own = lora.replace(pairs=jax.tree.map(lambda x: x[:, row : row + 1], lora.pairs))
        tokens = jnp.asarray([[*prompt, *answer[:-1]]])
        hidden = decoder.apply({'params': base.params}, tokens, lora=own).hidden
        logits = decoder.apply({'params': base.params}, hidden, method='unembed')[0]
        log_probs = jax.nn.log_softmax(logits[len(prompt) - 1 :])
        return np.mean([log_probs[i, token] for i, token in enumerate(answer)])

    wanted = [
        int(np.argmax([likelihood(name, row) for name in names]))
        for row, names in enumerate(options)
    ]
    assert Chooser(base, sum(options, []))(options, lora) == wanted


def test_options_hold_the_right_name():
    found = [
        pictures.Picture(name, group, 'mine', None)
        for name, group in (('cat', 'animal'), ('dog', 'animal'), ('pear', 'fruit'))
    ]
    options = image_qa.choose_options(np.random.default_rng(0), found, ['animal', 'fruit'])
    assert options[:2] == [['cat', 'pear'], ['dog', 'pear']]
    assert options[2][1] == 'pear' and options[2][0] in ('cat', 'dog')


def test_evaluation(model, captioner, package, tmp_path, monkeypatch):  # noqa: F811
    entries = json.loads((package / 'emoji.json').read_text())
    entries[0]['subcategory'] = 'red'
    (package / 'emoji.json').write_text(json.dumps(entries))
    models = {'reader': model, 'shower': captioner}
    monkeypatch.setattr(trained, 'load', lambda name, *_: models[name])
    config = ConfigDict(
        {
            'captioner': 'shower',
            'sources': ({'reader': 'emoji', 'path': str(package)},),
            'style': 'mine',
            'groups': (),
            'limit': 0,
            'seed': 0,
            'batch': 3,
        }
    )
    image_qa.evaluate(config, 'reader', tmp_path)
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    methods = {'d2l', 'd2l_other', 'd2l_caption', 'd2l_shuffled', 'captioner', 'no_image'}
    assert metrics['accuracy'].keys() == methods
    groups = metrics['settings']['groups']
    for name, chosen in metrics['chosen'].items():
        assert len(chosen) == 2 and metrics['accuracy'][name] == np.mean(
            [groups[c] == g for c, g in zip(chosen, ('dots', 'red'), strict=True)]
        )
    assert {p.name for p in tmp_path.glob('*.png')} == {'image_confusion.png', 'image_sheet.png'}
    config.groups = ('birds',)
    with pytest.raises(UserError, match="no picture of the group 'birds'"):
        image_qa.evaluate(config, 'reader', tmp_path)
    for key, value in (('limit', -1), ('batch', 0)):
        with pytest.raises(UserError, match='limit and seed must not be negative, and batch'):
            image_qa.evaluate(ConfigDict({**config, key: value}), 'reader', tmp_path)


def test_no_image_is_seen_in_training(package, tmp_path, monkeypatch):  # noqa: F811
    """From the packages to the batches: no file of an image is opened, and nothing but tokens goes
    in."""

    def opened(*_):
        raise AssertionError('an image was opened')

    monkeypatch.setattr(Image, 'open', opened)
    base = tiny_base()
    source = documents.get_config(f'names,{package}')
    assert source.settings.answers == 'given'
    found = documents_lib.read([source.source])
    names = {'red dot', 'blue green dot', 'no picture', *pictures.DIGITS}
    assert {d.name.split('/')[0] for d in found} == names
    settings = distillation.Settings(**source.settings)
    teacher = distillation.Teacher(base, sharding.make_mesh(source.mesh), 1024)
    records = list(distillation.records(teacher, base.tokenizer, found, settings))
    assert len(records) == len(found)
    for record in records:
        text = base.tokenizer.decode(record.context)
        assert text.startswith(f'{pictures.PREFIX} ') and record.context.dtype == np.int32
        name = record.name.split('/')[0]
        assert set(text.split()[1:]) == set(name.split())  # none is missing
        said = base.tokenizer.decode(record.queries[0].answer)
        alike = {'red dot', 'blue green dot', 'no picture'} if name not in pictures.DIGITS else ()
        assert said == name or (said in alike and record.name.endswith('/4'))
    config = d2l_images.get_config('smollm2,RECORDS,START')
    assert config.hypernetwork.encoder.model == '' and config.data.name == 'documents'
    for argument, start in (('smollm2,RECORDS,START', 'START'), ('gemma,RECORDS,START', 'START')):
        assert d2l_images.get_config(argument).init_from == start


def test_the_way_in_from_python(model, captioner, package, tmp_path, monkeypatch):  # noqa: F811
    models = {'reader': model, 'shower': captioner}
    monkeypatch.setattr(trained, 'load', lambda name, *_: models[name])
    session = Session(images='reader', captioner='shower')
    path = package / 'img/mine/64/a.png'
    adapter = session.internalize_image(path)
    internalizer = ImageInternalizer(model, captioner)
    direct = internalizer(internalizer.contexts([images.read(path, on_white=True)]))
    jax.tree.map(np.testing.assert_array_equal, adapter.lora.pairs, direct.pairs)
    again = session.internalize_image(path.read_bytes())
    assert again.metadata == adapter.metadata
    assert adapter.metadata['hypernetwork'] == 'reader' and adapter.metadata['image_sha256']
    assert isinstance(session.ask(pictures.QUESTION, adapter, 4), str)
    for content, message in ((b'MZ', 'not an image'), (path.read_bytes()[:40], 'image')):
        with pytest.raises(UserError, match=message):
            session.internalize_image(content)
