"""The Doc-to-LoRA hypernetwork against arrays computed by the original implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import read_golden

from d2l.context_encoders import early_exit, per_layer_activations
from d2l.hypernetwork import DocToLora, DocToLoraConfig
from d2l.upstream import params_from_upstream
from hyperlora import lora as lora_lib
from hyperlora.models.decoder import Decoder

CASES = [
    'd2l_a_per_layer_gemma2',
    'd2l_b_early_exit_llama_2mod',
    'd2l_x_embed_only_selfattn_shared',
]


def hypernetwork(meta, arrays):
    h = meta['hypernet_config']
    agg = h['aggregator_config']
    i, o = h['feature_sizes']
    dims = tuple((m, i[m], o[m]) for m in meta['target_modules_order'])
    config = DocToLoraConfig(
        num_layers=agg['num_layers'],
        dims=dims,
        rank=meta['lora_r'],
        scaling=meta['scaling_used'],
        layer_to_layer=agg['layer_to_layer_ctx_encoder'],
        feature_width=arrays['ctx_features'].shape[-1],
        latent_size=h['latent_size'],
        num_latents=agg['n_latent_queries'],
        num_blocks=agg['num_blocks'],
        num_self_attention=agg['num_self_attn_per_block'],
        shared_blocks=agg['shared_weights'],
        num_pre_head_layers=h['num_pre_head_layers'],
        per_layer_processing=h['per_layer_processing'],
        use_bias=h['use_bias'],
    )
    state = {k.removeprefix('hypernet/'): v for k, v in arrays.items() if k.startswith('hypernet/')}
    return DocToLora(config), params_from_upstream(state, config)


def chunk_weights(meta_arrays):
    """Rows are contexts; every context's chunks are adjacent."""
    counts = meta_arrays['n_ctx_chunks']
    owner = np.repeat(np.arange(len(counts)), counts)
    return jnp.asarray(owner[None] == np.arange(len(counts))[:, None], jnp.float32)


@pytest.mark.parametrize('iterative', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_generated_and_combined_loras(case, iterative):
    meta, arrays = read_golden(case)
    module, params = hypernetwork(meta, arrays)
    features = arrays['ctx_features']
    if features.ndim == 3:
        features = features[:, None]
    chunks, shared = jax.jit(module.apply, static_argnames='iterative')(
        {'params': params}, features, arrays['ctx_attn_mask'].astype(bool), iterative=iterative
    )
    rank, counts = meta['lora_r'], arrays['n_ctx_chunks']
    lora, rank_weights = lora_lib.compose(chunks, shared, 1, chunk_weights(arrays))
    for name, pair in chunks.pairs.items():
        np.testing.assert_allclose(pair.a.swapaxes(0, 1), arrays[f'gen/{name}/A'], atol=2e-5)
        np.testing.assert_allclose(pair.b.swapaxes(0, 1), arrays[f'gen/{name}/B'], atol=2e-5)
        for factor in 'ab':
            ours = getattr(lora.pairs[name], factor)
            for context, count in enumerate(counts):
                kept = np.asarray(ours[:, 0])[:, np.asarray(rank_weights[context]) > 0]
                wanted = arrays[f'combined/{name}/{factor.upper()}'][context]
                used = (count + (shared is not None)) * rank
                np.testing.assert_allclose(kept, wanted[:, :used], atol=2e-5)
                assert not wanted[:, used:].any()


def test_end_to_end_on_llama(golden_llama):
    meta, arrays = read_golden('d2l_b_early_exit_llama_2mod')
    config, base = golden_llama
    module, params = hypernetwork(meta, arrays)
    assert module.config.dims == lora_lib.module_dims(config, meta['target_modules_order'])
    mask = arrays['ctx_attn_mask'].astype(bool)
    features = early_exit(config, base, arrays['ctx_ids'].astype(np.int32), num_layers=2)
    np.testing.assert_allclose(
        np.asarray(features[:, 0])[mask], arrays['ctx_features'][mask], atol=2e-5
    )
    lora, rank_weights = lora_lib.compose(
        *module.apply({'params': params}, features, mask), 1, chunk_weights(arrays)
    )
    decoder = Decoder(config)
    valid = arrays['attention_mask'].astype(bool)
    tokens = arrays['input_ids'].astype(np.int32)

    def logits(**kwargs):
        hidden = decoder.apply({'params': base}, tokens, **kwargs).hidden
        return np.asarray(decoder.apply({'params': base}, hidden, method='unembed'))[valid]

    np.testing.assert_allclose(logits(), arrays['base_logits'][valid], atol=1e-4)
    rows = np.repeat(np.arange(2), arrays['n_queries'])
    np.testing.assert_allclose(
        logits(lora=lora, rank_weights=rank_weights[rows]), arrays['logits'][valid], atol=2e-4
    )


def test_per_layer_activations_are_block_inputs(golden_llama):
    config, base = golden_llama
    tokens = np.arange(12, dtype=np.int32)[None]
    features = np.asarray(per_layer_activations(config, base, tokens, num_layers=config.num_layers))
    assert features.shape == (1, config.num_layers, 12, config.width)
    np.testing.assert_array_equal(features[0, 0], base['embedder']['embedding'][:12])
    np.testing.assert_allclose(
        features[:, -1:],
        early_exit(config, base, tokens, num_layers=config.num_layers - 1),
        atol=1e-6,
    )
