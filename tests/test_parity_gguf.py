"""GGUF files against transformers; skipped without torch.

The files are written here as convert_hf_to_gguf.py of llama.cpp does: names from the gguf library,
rows of Llama's q and k interleaved, Gemma's norms stored with their 1.
"""

import gguf
import numpy as np
import pytest
from test_parity import LENGTH, close, ours
from torch_models import ROPES, random_config, random_model, run, torch, transformers

from hyperlora.models import weights

K = gguf.GGMLQuantizationType


def random_blocks(kind, shape, rng):
    """Weights of a kind that the gguf library reads but does not write, roughly normal."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, width = shape
    raw = rng.integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    # Where the block's scale and minimum are (f16), and values that centre the weights.
    places = {
        K.Q2_K: {80: 6e-3, 82: 9e-3},
        K.Q3_K: {108: 6e-4},
        K.Q4_K: {0: 2e-4, 2: 1.5e-3},
        K.Q5_K: {0: 1e-4, 2: 1.5e-3},
        K.Q6_K: {208: 3e-5},
    }
    for at, value in places[kind].items():
        raw[..., at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return raw.reshape(rows, -1)


def permuted(rows, heads):
    """From halves of a head against each other to neighbours, as llama.cpp rotates them."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(path, model, kinds, fields=()):
    """Writes a model, its matrices in turn of the given kinds; loads what was written into it."""
    c, rng = model.config, np.random.default_rng(0)
    arch = {'gemma3_text': 'gemma3'}.get(c.model_type, c.model_type)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    head_dim = getattr(c, 'head_dim', None) or c.hidden_size // c.num_attention_heads
    if arch != 'qwen2':
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch == 'llama':
        writer.add_rope_dimension_count(head_dim)
    rope = c.rope_parameters.get('full_attention', c.rope_parameters)
    if arch != 'gemma2':
        writer.add_rope_freq_base(rope['rope_theta'])
    if rope['rope_type'] == 'linear':
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope['factor'])
    if rope['rope_type'] == 'llama3':
        turn = 1 / rope['rope_theta'] ** (torch.arange(0, head_dim, 2) / head_dim)
        stretched = model.model.rotary_emb.inv_freq
        writer.add_tensor('rope_freqs.weight', (turn / stretched).numpy())
    if arch.startswith('gemma'):
        writer.add_sliding_window(c.sliding_window)
    if arch == 'gemma2':
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping or 0.0)
    if arch.startswith('gemma') and c.final_logit_softcapping:
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    elif arch == 'gemma2':
        writer.add_final_logit_softcapping(0.0)
    for key, value in fields:
        getattr(writer, f'add_{key}')(value)
    written = {}
    for name, tensor in model.state_dict().items():
        if name == 'lm_head.weight' and c.tie_word_embeddings:
            continue
        kind = K.F32 if tensor.ndim == 1 else kinds[len(written) % len(kinds)]
        if kind in (K.Q2_K, K.Q3_K, K.Q4_K, K.Q5_K, K.Q6_K):
            stored = random_blocks(kind, tensor.shape, rng)
        else:
            stored = gguf.quants.quantize(tensor.numpy(), kind)
        written[name] = torch.tensor(gguf.quants.dequantize(stored, kind))
        if arch == 'llama' and 'q_proj' in name:
            stored = permuted(stored, c.num_attention_heads)
        if arch == 'llama' and 'k_proj' in name:
            stored = permuted(stored, c.num_key_value_heads)
        if arch.startswith('gemma') and name.endswith('norm.weight'):
            stored = stored + 1
        writer.add_tensor(names.get_name(name, ('.weight', '.bias')), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    missing, unexpected = model.load_state_dict(written, strict=False)
    assert not unexpected and set(missing) <= {'lm_head.weight'}


def read(path):
    """Config and parameters of a file."""
    fields, tensors = weights.read_gguf(path)
    config = weights.gguf_config(fields, tensors)
    return config, weights.from_gguf(fields, tensors, config, np.float32)


def compare(model, path):
    """Our reading of a file against a model of transformers; logits and all hidden states."""
    config, params = read(path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))
    found = ours(config, params, tokens, np.ones_like(tokens, np.int32))
    for mine, theirs in zip(found, run(model, tokens), strict=True):
        close(mine, theirs)
    return config


SHAPE = {
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 16,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 5e3, 'factor': 4.0}
DEFAULT = {'rope_type': 'default', 'rope_theta': 10000.0}
SILENT = {'attention_bias': False, 'hidden_act': 'silu'}  # no GGUF file says otherwise
GEMMA = {
    'attention_bias': False,
    'hidden_activation': 'gelu_pytorch_tanh',
    'layer_types': None,
    'tie_word_embeddings': True,
}
GEMMA3_ROPE = {'full_attention': LINEAR, 'sliding_attention': DEFAULT}
FAMILIES = {
    'llama': SILENT | {'mlp_bias': False},
    'qwen2': SILENT | {'use_sliding_window': False, 'layer_types': None, 'rope_parameters': LINEAR},
    'qwen3': SILENT | {'use_sliding_window': False, 'layer_types': None, 'rope_parameters': LINEAR},
    'gemma2': GEMMA | {'rope_parameters': DEFAULT},
    'gemma3_text': GEMMA | {'rope_parameters': GEMMA3_ROPE, 'num_hidden_layers': 7},
}


def small_config(family, seed, **changes):
    """Of what a GGUF file can say."""
    shape = dict(SHAPE)
    if family == 'qwen2':
        shape.pop('head_dim')
    if family.startswith('gemma'):
        shape['query_pre_attn_scalar'] = changes.get('head_dim', 16)
    if family == 'gemma3_text':
        shape['sliding_window_pattern'] = 6
    return random_config(family, seed, **shape | FAMILIES[family] | changes)


@pytest.mark.parametrize('seed', [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))])
@pytest.mark.parametrize('family', FAMILIES)
def test_families(tmp_path, family, seed):
    model = random_model(small_config(family, seed), seed)
    write(tmp_path / 'x.gguf', model, [K.F16, K.Q8_0, K.F32])
    config = compare(model, tmp_path / 'x.gguf')
    assert any(config.local_layers) == family.startswith('gemma')


@pytest.mark.parametrize('kind', ['llama3', 'linear', 'default'])
def test_stretched_rope(tmp_path, kind):
    rope = {'rope_type': kind, 'rope_theta': 100.0, **ROPES[kind]}
    model = random_model(small_config('llama', 0, rope_parameters=rope), 0)
    write(tmp_path / 'x.gguf', model, [K.F32])
    assert bool(compare(model, tmp_path / 'x.gguf').rope.divisors) == (kind != 'default')


def test_local_layers_that_the_file_names(tmp_path):
    """By their period or one by one, and with a rope of their own."""
    kinds = ['sliding_attention', 'full_attention', 'full_attention']
    model = random_model(small_config('gemma2', 0, num_hidden_layers=3, layer_types=kinds), 0)
    flags = [('sliding_window_pattern', [True, False, False])]
    write(tmp_path / 'x.gguf', model, [K.F32], flags)
    assert compare(model, tmp_path / 'x.gguf').local_layers == (True, False, False)
    rope = {'full_attention': LINEAR, 'sliding_attention': {**DEFAULT, 'rope_theta': 50.0}}
    changes = {'sliding_window_pattern': 2, 'num_hidden_layers': 3, 'rope_parameters': rope}
    model = random_model(small_config('gemma3_text', 0, **changes), 0)
    period = [('sliding_window_pattern', 2), ('rope_freq_base_swa', 50.0)]
    write(tmp_path / 'x.gguf', model, [K.F32], period)
    assert compare(model, tmp_path / 'x.gguf').local_layers == (True, False, True)


@pytest.mark.parametrize(
    'kind', 'F16 BF16 F32 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K'.split()
)
def test_kinds_of_quantization(tmp_path, kind):
    shape = {'hidden_size': 256, 'intermediate_size': 256, 'head_dim': 64, 'num_hidden_layers': 1}
    model = random_model(small_config('llama', 0, **shape), 0)
    write(tmp_path / 'x.gguf', model, [K[kind]])
    compare(model, tmp_path / 'x.gguf')


@pytest.mark.parametrize('family', FAMILIES)
def test_as_transformers_reads_the_file(tmp_path, family):
    """Its reader knows nothing of stretched rope, bounds of logits or Qwen 3's width of heads."""
    changes = {'rope_parameters': {**DEFAULT, 'rope_theta': 5e5}}
    if family == 'qwen3':
        changes['head_dim'] = 128
    if family.startswith('gemma'):
        changes = {'head_dim': 256}
    if family == 'gemma2':
        changes |= {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
    if family == 'gemma3_text':
        changes |= {
            'final_logit_softcapping': None,
            'rope_parameters': {**GEMMA3_ROPE, 'full_attention': {**DEFAULT, 'rope_theta': 5e5}},
        }
    model = random_model(small_config(family, 0, **changes), 0)
    write(tmp_path / 'x.gguf', model, [K.F16, K.Q8_0])
    read_back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file='x.gguf', dtype='float32', attn_implementation='eager'
    )
    compare(read_back.eval(), tmp_path / 'x.gguf')
