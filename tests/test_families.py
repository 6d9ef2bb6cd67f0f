"""Every family against Hugging Face transformers' numbers, and the reading of their configs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import GOLDEN, TINY, read_golden, tiny_base

from hyperlora import generation
from hyperlora.errors import UserError
from hyperlora.models import families, weights
from hyperlora.models.decoder import Decoder, first_layers
from hyperlora.models.families import Rope

FAMILIES = ['gemma2', 'gemma3_text', 'llama', 'mistral', 'qwen3']


def config_json(family, name='config'):
    return json.loads((GOLDEN / f'hf_{family}' / f'{name}.json').read_text())


def close(ours, theirs):
    """Within 2e-5 of the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.fixture(scope='module', params=FAMILIES)
def case(request):
    """Arrays of a family, its config and our parameters."""
    _, arrays = read_golden(f'hf_{request.param}')
    config = families.from_hf(config_json(request.param))
    state = {k.removeprefix('state/'): v for k, v in arrays.items() if k.startswith('state/')}
    return arrays, config, weights.from_hf_state(state, config, np.float32)


def test_all_hidden_states_and_logits(case):
    arrays, config, params = case
    tokens = arrays['input_ids'].astype(np.int32)
    real = arrays['attention_mask'].astype(bool)
    out, inputs = jax.jit(lambda p: first_layers(config, p, tokens, config.num_layers))(params)
    for i, hidden in enumerate((*inputs, out)):
        close(np.asarray(hidden)[real], arrays[f'hidden_states/{i}'][real])
    decoder = Decoder(config)
    hidden = decoder.apply({'params': params}, tokens).hidden
    logits = np.asarray(decoder.apply({'params': params}, hidden, method='unembed'))
    close(logits[real], arrays['logits'][real])


def test_padding_to_the_left(case):
    """As another segment: rotary positions are relative, so the rest is unmoved."""
    arrays, config, params = case
    length = int(arrays['attention_mask'][1].sum())
    tokens = np.zeros((1, length + 9), np.int32)
    tokens[0, 9:] = arrays['input_ids'][1, :length]
    segments = (np.arange(length + 9) >= 9).astype(np.int32)[None]
    hidden = Decoder(config).apply({'params': params}, tokens, segments=segments).hidden
    close(hidden[0, 9:], arrays[f'hidden_states/{config.num_layers}'][1, :length])


def test_generation_with_a_cache(case):
    """Past the window of local layers, and equal to what transformers generated."""
    arrays, config, params = case
    prompt, answer = np.split(arrays['generated_ids'].astype(np.int32), [30], axis=1)
    padded = np.pad(prompt, ((0, 0), (0, 3)))
    ours = generation.greedy(Decoder(config), params, padded, np.array([30]), -1, answer.shape[1])
    np.testing.assert_array_equal(ours, answer)


def test_what_is_read_is_written(case):
    arrays, config, params = case
    written = dict(weights.to_hf(params, config))
    state = {k.removeprefix('state/'): v for k, v in arrays.items() if k.startswith('state/')}
    if config.tie_embeddings:
        state.pop('lm_head.weight', None)
    assert written.keys() == state.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(array, state[name])


@pytest.mark.parametrize('family', FAMILIES)
def test_both_layouts_of_a_config_are_one(family):
    assert families.from_hf(config_json(family)) == families.from_hf(
        config_json(family, 'config_legacy')
    )


@pytest.mark.parametrize('family', FAMILIES)
def test_every_setting_counts_or_is_known_not_to(family):
    config = config_json(family)
    with pytest.raises(UserError, match='flux_capacitor'):
        families.from_hf(config | {'flux_capacitor': 1})
    for key, value in {
        'model_type': 'mamba',
        'hidden_activation' if 'gemma' in family else 'hidden_act': 'relu9',
        'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4},
        'is_encoder_decoder': True,
    }.items():
        wanted = value['rope_type'] if isinstance(value, dict) else str(value)
        with pytest.raises(UserError, match=wanted):
            families.from_hf(config | {key: value})
    if 'layer_types' in config:
        kinds = ['chunked_attention'] * config['num_hidden_layers']
        with pytest.raises(UserError, match='chunked_attention'):
            families.from_hf(config | {'layer_types': kinds})


def test_released_configs_that_say_little():
    """The text part of google/gemma-3-4b-it leaves most to the defaults."""
    sparse = {
        'hidden_size': 2560,
        'intermediate_size': 10240,
        'model_type': 'gemma3_text',
        'num_hidden_layers': 34,
        'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
        'sliding_window': 1024,
    }
    config = families.from_hf(sparse)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.rope == Rope(1e6, (8.0,) * 128) and config.local_rope == Rope(1e4)
    assert [i for i, local in enumerate(config.local_layers) if not local] == [5, 11, 17, 23, 29]
    assert config.attention_window == 1024 and config.query_scale == 1 / 16


def test_what_transformers_would_not_compute_is_refused():
    """It does not bound the scores of Gemma 3 and makes no layer of Mistral local by itself."""
    with pytest.raises(UserError, match='attn_logit_softcapping = 50.0 is not supported'):
        families.from_hf(config_json('gemma3_text') | {'attn_logit_softcapping': 50.0})
    config = config_json('mistral')
    kinds = ['full_attention'] * config['num_hidden_layers']
    with pytest.raises(UserError, match='layer_types'):
        families.from_hf(config | {'layer_types': kinds})


def test_qwen2_has_biases_on_q_k_and_v():
    base = {
        'model_type': 'qwen2',
        'vocab_size': 96,
        'hidden_size': 32,
        'intermediate_size': 64,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
    }
    rows = [row.hf for row in weights.table(families.from_hf(base))]
    assert [name for name in rows if name.endswith('bias')] == [
        f'model.layers.{{}}.self_attn.{x}_proj.bias' for x in 'qkv'
    ]
    local = families.from_hf(base | {'use_sliding_window': True, 'max_window_layers': 1})
    assert local.local_layers == (False, True) and local.attention_window == 4096


def test_model_folder(tmp_path):
    """Sharded, in low precision, and back."""
    base = tiny_base()
    low = jax.tree.map(lambda x: x.astype('bfloat16'), base.params)
    weights.save_hf(tmp_path, low, TINY, {'model_type': 'llama'}, shard_bytes=10_000)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[-1] == 'model.safetensors.index.json' and len(names) > 4
    again = weights.from_safetensors(tmp_path, TINY, 'bfloat16')
    jax.tree.map(np.testing.assert_array_equal, low, again)
    shard = tmp_path / names[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(UserError, match=f'{shard.name} is truncated'):
        weights.from_safetensors(tmp_path, TINY, 'bfloat16')
    shard.unlink()
    with pytest.raises(UserError, match=f'{shard.name} is missing'):
        weights.from_safetensors(tmp_path, TINY, 'bfloat16')


def test_values_that_are_not_finite_are_named(tmp_path):
    params = jax.tree.map(np.array, tiny_base().params)
    params['layers']['mlp']['up_proj']['kernel'][1, 2, 3] = np.nan
    for dtype in ('float32', 'bfloat16'):
        bad = jax.tree.map(lambda x, dtype=dtype: jax.numpy.asarray(x, dtype), params)
        weights.save_hf(tmp_path, bad, TINY, {})
        with pytest.raises(UserError, match=r'model\.layers\.1\.mlp\.up_proj.*not finite'):
            weights.from_safetensors(tmp_path, TINY, dtype)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_config_can_be_written(family):
    config = families.from_hf(config_json(family))
    if family == 'llama':  # Llama 3's stretching cannot be told from its divisors
        with pytest.raises(UserError, match='no config.json'):
            families.to_hf(config)
        config = dataclasses.replace(config, rope=Rope(5e5, (4.0,) * (config.head_dim // 2)))
    written = json.loads(json.dumps(families.to_hf(config)))
    assert written['model_type'] == family and families.from_hf(written) == config
    if 'gemma' in family:  # as transformers insists
        assert isinstance(written['query_pre_attn_scalar'], int) and written['sliding_window']
