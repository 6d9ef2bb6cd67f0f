"""Gemma 3 with images: against transformers' numbers, its files, its image processor."""

import functools
import io
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from conftest import GOLDEN, read_golden, tiny_base, tiny_training
from PIL import Image

from d2l.context_encoders import early_exit, embed_only, per_layer_activations
from hyperlora import hypernetwork, sharding
from hyperlora.errors import UserError
from hyperlora.models import attention, base, families, vision, weights
from hyperlora.models.decoder import Decoder, first_layers
from hyperlora.models.images import ImageProcessor

LAYOUTS = ['hf_gemma3_mm', 'hf_gemma3_mm_legacy']


def config_json(folder, name='config'):
    return json.loads((GOLDEN / folder / f'{name}.json').read_text())


CONFIG_JSON = config_json('hf_gemma3_mm')
CONFIG = vision.from_hf(CONFIG_JSON)


def close(ours, theirs):
    """Within 2e-5 of the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.fixture(scope='module')
def params():
    return weights.from_safetensors(GOLDEN / 'hf_gemma3_mm', CONFIG, np.float32)


@pytest.fixture(scope='module')
def inputs():
    """Tokens, which of them are real, images: one in the first row, none in the second."""
    _, arrays = read_golden('hf_gemma3_mm')
    pixels = np.zeros((2, 1, 28, 28, 3), np.float32)
    pixels[:1, 0] = channels_last(arrays['pixel_values'])
    return arrays['input_ids'].astype(np.int32), arrays['attention_mask'].astype(bool), pixels


def channels_last(pixels):
    return pixels.transpose(0, 2, 3, 1)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, pixels=None):
    """Input of every layer and the final states, and the logits."""
    text = config.text
    soft = None if pixels is None else vision.soft_tokens(config, params, tokens, pixels)
    hidden, inputs = first_layers(text, params, tokens, text.num_layers, soft=soft)
    logits = Decoder(text).apply({'params': params}, hidden, method='unembed')
    return [*inputs, hidden], logits


@functools.partial(jax.jit, static_argnums=0, static_argnames='cache_length')
def forward(config, params, tokens, pixels=None, **kwargs):
    if pixels is not None:
        kwargs['soft'] = vision.soft_tokens(config, params, tokens, pixels)
    return Decoder(config.text).apply({'params': params}, tokens, **kwargs)


# -------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize('layout', LAYOUTS)
def test_all_hidden_states_and_logits(layout, params, inputs):
    _, arrays = read_golden('hf_gemma3_mm')
    config = vision.from_hf(config_json(layout))
    assert config == CONFIG
    loaded = weights.from_safetensors(GOLDEN / layout, config, np.float32)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tokens, real, pixels = inputs
    states, logits = run(CONFIG, loaded, tokens, pixels)
    for i, hidden in enumerate(states):
        close(np.asarray(hidden)[real], arrays[f'hidden_states/{i}'][real])
    close(np.asarray(logits)[real], arrays['logits'][real])


def test_tower_and_projector(params, inputs):
    _, arrays = read_golden('hf_gemma3_mm')
    pixels = inputs[2][0]
    tower = vision.VisionTower(CONFIG.vision).apply({'params': params['vision_tower']}, pixels)
    close(tower, arrays['vision_last_hidden_state'])
    close(vision.ImageEncoder(CONFIG).apply({'params': params}, pixels), arrays['image_features'])


def test_context_features_of_an_image():
    """What the original Doc-to-LoRA feeds to its hypernetwork, for a base of four layers."""
    _, arrays = read_golden('d2l_i_image_ctx_gemma3')
    config = vision.from_hf(config_json('d2l_ctx_gemma3_mm'))
    params = weights.from_safetensors(GOLDEN / 'd2l_ctx_gemma3_mm', config, np.float32)
    tokens = arrays['ctx_ids'].astype(np.int32)
    pixels = channels_last(arrays['pixel_values'])[None]
    soft = vision.soft_tokens(config, params, tokens, pixels)
    features = per_layer_activations(config, params, tokens, soft, num_layers=4)
    close(features, arrays['ctx_features'])
    last = early_exit(config, params, tokens, soft, num_layers=3)
    close(last[:, 0], arrays['ctx_features'][:, -1])
    first = embed_only(config, params, tokens, soft)
    close(first[:, 0], arrays['ctx_features'][:, 0])
    unseen = per_layer_activations(config, params, tokens, num_layers=4)
    assert np.abs(unseen - arrays['ctx_features']).max() > 1


@pytest.mark.parametrize('layout', LAYOUTS)
def test_decoder_alone_reads_text(layout):
    _, arrays = read_golden('hf_gemma3_mm')
    config = families.from_hf(config_json(layout))
    params = weights.from_safetensors(GOLDEN / layout, config, np.float32)
    assert params.keys() == {'embedder', 'layers', 'final_norm'}
    decoder, real = Decoder(config), arrays['attention_mask'].astype(bool)
    tokens = arrays['text_only_input_ids'].astype(np.int32)
    hidden = decoder.apply({'params': params}, tokens).hidden
    logits = decoder.apply({'params': params}, hidden, method='unembed')
    close(np.asarray(logits)[real], arrays['text_only_logits'][real])


def test_decoding_after_an_image(params, inputs):
    """A prompt with an image, then token by token with a cache, is one pass over all."""
    tokens, _, pixels = (x[:1] for x in inputs)
    whole = forward(CONFIG, params, tokens, pixels).hidden
    out = forward(CONFIG, params, tokens[:, :30], pixels, cache_length=40)
    for i in range(30, 40):
        step = {'positions': np.array([[i]]), 'cache': out.cache}
        out = forward(CONFIG, params, tokens[:, i : i + 1], **step)
        np.testing.assert_allclose(out.hidden[:, 0], whole[:, i], atol=1e-4)


def test_low_precision_stays_low(params, inputs):
    tokens, real, pixels = inputs
    states, _ = run(CONFIG, params, tokens, pixels)
    low, _ = run(CONFIG, jax.tree.map(lambda x: x.astype('bfloat16'), params), tokens, pixels)
    for ours, exact in zip(low, states, strict=True):
        assert ours.dtype == 'bfloat16'
        error = np.linalg.norm(np.asarray(ours.astype('float32') - exact)[real])
        assert error < 0.1 * np.linalg.norm(np.asarray(exact)[real])


# ------------------------------------------------------------------------------- image tokens


def test_rows_take_their_own_images_in_order(params):
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 2, 28, 28, 3)).astype(np.float32)
    features = vision.ImageEncoder(CONFIG).apply({'params': params}, pixels.reshape(4, 28, 28, 3))
    image = [CONFIG.image_token] * 4
    tokens = np.array([[5, *image, 6, *image, 7, 8], [*image, 5, 6, 7, 8, 9, 10, 11, 12]])
    soft = vision.soft_tokens(CONFIG, params, tokens, pixels)
    np.testing.assert_array_equal(
        soft.groups, [[0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0], [1] * 4 + [0] * 8]
    )
    np.testing.assert_allclose(soft.embeddings[0, 1:5], features[0], atol=1e-5)
    np.testing.assert_allclose(soft.embeddings[0, 6:10], features[1], atol=1e-5)
    np.testing.assert_allclose(soft.embeddings[1, :4], features[2], atol=1e-5)
    states, _ = run(CONFIG, params, tokens, pixels)
    pixels[1, 1] = 1e6  # padding: nothing of it is read
    np.testing.assert_allclose(run(CONFIG, params, tokens, pixels)[0][-1], states[-1], atol=1e-4)


@pytest.mark.parametrize('count', [3, 5, 12])
def test_rows_that_do_not_fit_their_images_are_not_numbers(params, count):
    pixels = np.zeros((2, 2, 28, 28, 3), np.float32)
    tokens = np.full((2, 16), 5)
    tokens[0, :count] = CONFIG.image_token
    tokens[1, :8] = CONFIG.image_token
    embeddings = vision.soft_tokens(CONFIG, params, tokens, pixels).embeddings
    assert np.isnan(embeddings[0, :count]).all() and not np.isnan(embeddings[1, :8]).any()


def test_no_gradient_through_the_images(params, inputs):
    tokens, _, pixels = inputs

    def loss(p):
        soft = vision.soft_tokens(CONFIG, p, tokens, pixels)
        return per_layer_activations(CONFIG, p, tokens, soft, num_layers=2).sum()

    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(jax.grad(loss)(params)))


def test_images_for_a_model_of_text():
    base = tiny_base()
    built = hypernetwork.build(tiny_training().hypernetwork, base)
    context = {**built.example, 'pixels': np.zeros((1, 1, 8, 8, 3))}
    with pytest.raises(UserError, match='reads no images'):
        built.encode(base.params, context)


def test_tokens_around_images():
    def encode(text):
        return [text]

    image = [121, 120, 120, 120, 120, 122]
    assert vision.tokens_with_images(CONFIG, encode, ['Hello']) == ['Hello']
    assert vision.tokens_with_images(CONFIG, encode, ['a', 'b\n', '']) == [
        *('a\n\n', *image, '\n\nb\n\n\n', *image, '\n\n')
    ]


# ------------------------------------------------------------------------------------ loading


def tokenizer():
    """Characters, and pairs and triples of newlines."""
    special = ['<pad>', '<eos>', '<bos>', '<unk>']
    letters = ['\n', '\n\n', '\n\n\n', *map(chr, range(32, 127))]
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    merges = [('\n', '\n'), ('\n\n', '\n')]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token='<unk>'))
    backend.add_special_tokens(special)
    return backend


@pytest.fixture
def folder(tmp_path):
    """A complete model folder in two shards, in the layout of published models."""
    state = safetensors.numpy.load_file(GOLDEN / 'hf_gemma3_mm_legacy/model.safetensors')
    names = sorted(state)
    files = {'model-00001-of-00002.safetensors': names[::2]}
    files['model-00002-of-00002.safetensors'] = names[1::2]
    for file, kept in files.items():
        safetensors.numpy.save_file({name: state[name] for name in kept}, tmp_path / file)
    where = {name: file for file, kept in files.items() for name in kept}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
    shutil.copy(GOLDEN / 'hf_gemma3_mm_legacy/config.json', tmp_path)
    tokenizer().save(str(tmp_path / 'tokenizer.json'))
    settings = {'chat_template': '{{ messages[0].content }}<eos>'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    return tmp_path


def test_load_a_model_that_reads_images(folder, params):
    load = functools.partial(base.load_base, images=True)
    model = load(str(folder))
    assert model.config == CONFIG
    assert model.images == ImageProcessor(28)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    mesh = sharding.make_mesh({'fsdp': -1})
    placed = load(str(folder), 'bfloat16', mesh)
    kernel = placed.params['vision_tower']['layers']['mlp']['fc1']['kernel']
    assert kernel.sharding.spec == jax.P(None, 'fsdp', 'tensor')
    assert kernel.dtype == 'bfloat16'
    assert placed.fingerprint == model.fingerprint
    (folder / 'preprocessor_config.json').write_text('{"image_mean": [0, 0.1, 0.2]}')
    assert load(str(folder)).images.mean == (0, 0.1, 0.2)
    with pytest.raises(UserError, match='unknown base model'):
        load(str(folder / 'none'))


def test_load_its_decoder_as_base(folder, params):
    model = base.load_base(str(folder))
    assert model.config == CONFIG.text
    decoder = {name: params[name] for name in ('embedder', 'layers', 'final_norm')}
    jax.tree.map(np.testing.assert_array_equal, model.params, decoder)
    # What a merged model is written with: a decoder's config, and a decoder's names.
    assert families.from_hf(base.hf_config(model)) == CONFIG.text
    assert base.hf_config(model)['architectures'] == ['Gemma3ForCausalLM']
    (folder / 'merged').mkdir()
    weights.save_hf(folder / 'merged', model.params, model.config, base.hf_config(model))
    again = weights.from_safetensors(folder / 'merged', model.config, np.float32)
    jax.tree.map(np.testing.assert_array_equal, again, decoder)


def test_wrong_tensors_are_named():
    state = safetensors.numpy.load_file(GOLDEN / 'hf_gemma3_mm/model.safetensors')
    state['vision_tower.head.probe'] = np.ones(3)
    del state['multi_modal_projector.mm_soft_emb_norm.weight']
    name = 'vision_tower.embeddings.patch_embedding.weight'
    state[name] = state[name][:, :1]
    with pytest.raises(UserError) as caught:
        weights.from_hf_state(state, CONFIG, np.float32)
    assert str(caught.value).split('; ')[1:] == [
        'missing: multi_modal_projector.mm_soft_emb_norm.weight',
        'extra: vision_tower.head.probe',
        f'misshapen: {name} (32, 1, 7, 7) instead of (32, 3, 7, 7)',
    ]


def test_old_and_new_configs():
    assert vision.from_hf(config_json('hf_gemma3_mm', 'config_legacy')) == CONFIG
    published = {  # google/gemma-3-4b-it, which leaves most to the defaults
        'model_type': 'gemma3',
        'mm_tokens_per_image': 256,
        'text_config': {
            'hidden_size': 2560,
            'intermediate_size': 10240,
            'model_type': 'gemma3_text',
            'num_hidden_layers': 34,
            'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
            'sliding_window': 1024,
        },
        'vision_config': {
            'hidden_size': 1152,
            'image_size': 896,
            'intermediate_size': 4304,
            'model_type': 'siglip_vision_model',
            'num_attention_heads': 16,
            'num_hidden_layers': 27,
            'patch_size': 14,
            'vision_use_head': False,
        },
    }
    config = vision.from_hf(published)
    assert config.text.attention_window == 1024 and config.text.tie_embeddings
    assert (config.image_start, config.image_end, config.image_token) == (255999, 256000, 262144)
    pixels = jax.ShapeDtypeStruct((2, 896, 896, 3), np.float32)
    encoder = vision.ImageEncoder(config)
    shapes = jax.eval_shape(encoder.init_with_output, jax.random.key(0), pixels)
    assert shapes[0].shape == (2, 256, 2560)


@pytest.mark.parametrize(
    ('part', 'change', 'message'),
    [
        ('', {'model_type': 'llava'}, 'llava'),
        ('', {'mm_tokens_per_image': 5}, '4 x 4 patches.*mm_tokens_per_image = 5'),
        ('', {'mm_tokens_per_image': 9}, 'mm_tokens_per_image = 9'),
        ('', {'audio_config': {}}, 'unknown.*audio_config'),
        ('', {'vision_config': None}, 'vision_config.*not an object'),
        ('', {'vision_config': {'model_type': 'clip_vision_model'}}, 'clip_vision_model'),
        ('vision_config', {'hidden_act': 'quick_gelu'}, 'siglip.*quick_gelu'),
        ('vision_config', {'vision_use_head': True}, 'vision_use_head'),
        ('vision_config', {'num_channels': 1}, 'num_channels = 1'),
        ('vision_config', {'image_size': [28, 14]}, 'image_size'),
        ('vision_config', {'num_attention_heads': 5}, 'num_attention_heads 5'),
        ('vision_config', {'registers': 4}, 'siglip.*unknown.*registers'),
        ('text_config', {'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
    ],
)
def test_unsupported_configs_are_named(part, change, message):
    config = CONFIG_JSON | (change if not part else {part: CONFIG_JSON[part] | change})
    with pytest.raises(UserError, match=message):
        vision.from_hf(config)


def test_a_config_without_a_tower_is_named():
    config = {key: value for key, value in CONFIG_JSON.items() if key != 'vision_config'}
    for read in (vision.from_hf, families.from_hf):
        with pytest.raises(UserError, match='lacks vision_config'):
            read(config)


# ------------------------------------------------------------------------------------- images

RNG = np.random.default_rng(1)
PICTURE = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), np.uint8))


def file(image, kind='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pixels_of_an_image(tmp_path):
    (tmp_path / 'a.png').write_bytes(file(PICTURE))
    process = ImageProcessor(28)
    pixels = process(tmp_path / 'a.png')
    assert pixels.shape == (28, 28, 3) and pixels.dtype == np.float32
    small = np.asarray(PICTURE.resize((28, 28), Image.Resampling.BILINEAR), np.float64)
    np.testing.assert_allclose(pixels, small / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(process(str(tmp_path / 'a.png')), pixels)
    np.testing.assert_array_equal(process(file(PICTURE)), pixels)
    settings = {'image_mean': [0, 0.5, 1], 'image_std': [1, 0.5, 2], 'resample': 0}
    nearest = ImageProcessor.from_hf(settings, 28)(file(PICTURE))
    small = np.asarray(PICTURE.resize((28, 28), Image.Resampling.NEAREST), np.float64) / 255
    np.testing.assert_allclose(nearest, (small - [0, 0.5, 1]) / [1, 0.5, 2], atol=1e-6)


def test_all_kinds_of_images_are_read():
    process = ImageProcessor(28)
    pixels = process(file(PICTURE))
    grey = process(file(PICTURE.convert('L')))
    assert (grey == grey[..., :1]).all() and grey.std() > 0.1
    alpha = PICTURE.copy()
    alpha.putalpha(0)
    np.testing.assert_array_equal(process(file(alpha)), pixels)
    frames = [PICTURE.convert('P'), Image.new('P', PICTURE.size)]
    first = process(file(frames[0], 'GIF'))
    animated = process(file(frames[0], 'GIF', save_all=True, append_images=frames[1:]))
    np.testing.assert_array_equal(animated, first)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    turned = process(file(PICTURE, exif=exif))
    np.testing.assert_array_equal(turned, process(file(PICTURE.rotate(-90, expand=True))))
    for mode in ('1', 'LA', 'CMYK'):
        kind = 'TIFF' if mode == 'CMYK' else 'PNG'
        assert process(file(PICTURE.convert(mode), kind)).std() > 0.1
    assert process(file(Image.new('RGB', (1, 500), 'white'))).min() == 1


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'not an image'),
        (b'plain text', 'not an image'),
        (file(PICTURE)[:2000], 'cannot read'),
        (file(PICTURE, 'JPEG')[:1000], 'cannot read'),
        (file(PICTURE)[:40], 'cannot read|not an image'),
        (file(Image.fromarray(np.full((9, 9), 40000, np.uint16))), '8 bits.*I;16'),
        (file(Image.new('F', (9, 9)), 'TIFF'), '8 bits.*F'),
    ],
)
def test_bad_images_are_named(tmp_path, content, message):
    path = tmp_path / 'bad.img'
    path.write_bytes(content)
    with pytest.raises(UserError, match=f'(?s)bad.img.*({message})|({message}).*bad.img'):
        ImageProcessor(28)(path)
    with pytest.raises(UserError, match='this file'):
        ImageProcessor(28)(content)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('limit', [2399, 1199])  # of 2,400 pixels; past the double Pillow raises
def test_images_of_too_many_pixels(monkeypatch, limit):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    with pytest.raises(UserError, match=f'more than {limit:,} pixels'):
        ImageProcessor(28)(file(PICTURE))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 2400)
    ImageProcessor(28)(file(PICTURE))


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / 'none.png'):
        with pytest.raises(UserError, match=str(path)):
            ImageProcessor(28)(path)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'size': {'height': 28, 'width': 56}}, 'size'),
        ({'do_pan_and_scan': True}, 'do_pan_and_scan'),
        ({'do_normalize': False}, 'do_normalize'),
        ({'do_center_crop': True}, 'unknown.*do_center_crop'),
    ],
)
def test_unsupported_settings_of_images_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        ImageProcessor.from_hf(settings, 28)
    ImageProcessor.from_hf({'do_center_crop': None, 'size': {'height': 28, 'width': 28}}, 28)


# ------------------------------------------------------------------- against transformers, live

IMAGES = [[1, 0, 2], [2, 2, 1], [0, 0, 0], [0, 2, 2]]  # in each row


def random_model(seed):
    """A random transformers model, its config and weights such that everything matters."""
    torch, transformers = live()
    rng = np.random.default_rng(seed)
    pool, side, patch = (int(rng.integers(1, 3)), int(rng.integers(2, 5)), int(rng.integers(3, 6)))
    text = {
        'vocab_size': 128,
        'hidden_size': 32,
        'intermediate_size': 48,
        'num_hidden_layers': 3,
        'num_attention_heads': 4,
        'num_key_value_heads': int(rng.choice([1, 2, 4])),
        'head_dim': 8,
        'query_pre_attn_scalar': 10,
        'sliding_window': int(rng.integers(2, 20)),
        'layer_types': [str(kind) for kind in rng.permutation(['full', 'sliding', 'sliding'])],
    }
    text['layer_types'] = [f'{kind}_attention' for kind in text['layer_types']]
    tower = {
        'hidden_size': 24,
        'intermediate_size': 40,
        'num_hidden_layers': 2,
        'num_attention_heads': int(rng.choice([2, 3, 4])),
        'image_size': side * pool * patch + int(rng.integers(0, patch)),
        'patch_size': patch,
        'hidden_act': str(rng.choice(['gelu', 'gelu_pytorch_tanh'])),
        'layer_norm_eps': 1e-3,
        'vision_use_head': False,
    }
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**tower),
        mm_tokens_per_image=side**2,
        image_token_index=int(rng.choice([120, 131])),  # the latter is not in the vocabulary
        boi_token_index=121,
        eoi_token_index=122,
        tie_word_embeddings=bool(seed % 2),
        attn_implementation='eager',
    )
    torch.manual_seed(seed)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(0, deviation)
    return model


def live():
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    if not hasattr(transformers, 'Gemma3ForConditionalGeneration'):
        pytest.skip('transformers without Gemma 3')
    return torch, transformers


@pytest.mark.parametrize('seed', range(4))
def test_random_models_against_transformers(tmp_path, monkeypatch, seed):
    torch, _ = live()
    monkeypatch.setattr(attention, '_QUERY_BLOCK', 16)
    model = random_model(seed)
    model.save_pretrained(tmp_path, max_shard_size='20KB')
    assert (tmp_path / 'model.safetensors.index.json').exists()
    config = vision.from_hf(json.loads((tmp_path / 'config.json').read_text()))
    params = weights.from_safetensors(tmp_path, config, np.float32)
    # Transformers' names in memory are a third layout.
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    jax.tree.map(
        np.testing.assert_array_equal, weights.from_hf_state(state, config, np.float32), params
    )

    rng = np.random.default_rng(seed)
    size, block = config.vision.image_size, [config.image_token] * config.tokens_per_image
    rows = []
    for count in IMAGES[seed]:
        row = rng.integers(1, 100, rng.integers(0, 4)).tolist()
        for _ in range(count):
            row += [121, *block, 122, *rng.integers(1, 100, rng.integers(0, 9)).tolist()]
        rows.append(row + [7])
    length = max(map(len, rows)) + 3
    tokens = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    real = np.arange(length) < np.array([[len(row)] for row in rows])
    pixels = rng.normal(size=(3, 2, size, size, 3)).astype(np.float32)
    flat = [pixels[i, j] for i, count in enumerate(IMAGES[seed]) for j in range(count)]
    images = {}
    if flat:
        images['pixel_values'] = torch.tensor(np.stack(flat).transpose(0, 3, 1, 2))
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(real.astype(int)),
            token_type_ids=torch.tensor((tokens == config.image_token).astype(int)),
            output_hidden_states=True,
            **images,
        )
    states, logits = run(config, params, tokens, pixels if flat else None)
    for ours, theirs in zip(states, out.hidden_states, strict=True):
        close(np.asarray(ours)[real], theirs.numpy()[real])
    close(np.asarray(logits)[real], out.logits.numpy()[real])
    last = forward(config, params, tokens, pixels if flat else None).hidden
    close(np.asarray(last)[real], out.hidden_states[-1].numpy()[real])


def test_image_processor_against_transformers(tmp_path):
    _, transformers = live()
    processors = pytest.importorskip('transformers.models.gemma3.image_processing_pil_gemma3')
    images = processors.Gemma3ImageProcessorPil(
        size={'height': 28, 'width': 28}, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    special = {
        'image_token': '<image_soft_token>',
        'boi_token': '<start_of_image>',
        'eoi_token': '<end_of_image>',
    }
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), extra_special_tokens=special
    )
    processor = transformers.Gemma3Processor(images, fast, image_seq_length=4)
    text = 'a\n<start_of_image>\nb <start_of_image><start_of_image>'
    pictures = [PICTURE, PICTURE.rotate(90, expand=True), PICTURE.convert('L')]
    theirs = processor(text=text, images=[[p.convert('RGB') for p in pictures]])
    config = vision.MultimodalConfig(
        CONFIG.text, CONFIG.vision, 4, *(fast.convert_tokens_to_ids(t) for t in special.values())
    )
    backend = tokenizer()
    ours = vision.tokens_with_images(
        config,
        lambda text: backend.encode(text, add_special_tokens=False).ids,
        text.split('<start_of_image>'),
    )
    assert ours == theirs['input_ids'][0]
    images.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / 'preprocessor_config.json').read_text())
    process = ImageProcessor.from_hf(settings, 28)
    for picture, pixels in zip(pictures, theirs['pixel_values'], strict=True):
        np.testing.assert_allclose(
            process(file(picture)), np.asarray(pixels).transpose(1, 2, 0), atol=1e-6
        )
