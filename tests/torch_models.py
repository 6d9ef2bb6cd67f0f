"""Small random models of every family in transformers, for comparison; needs torch."""

import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

ROPES = {
    'default': {},
    'linear': {'factor': 4.0},
    'llama3': {
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 32,
    },
}


def random_config(family, seed, **changes):
    """A config of few small layers, every setting of the family drawn at random."""
    rng = np.random.default_rng([seed, *family.encode()])

    def draw(*values):
        return values[rng.integers(len(values))]

    def rope(*kinds):
        kind = draw(*(kinds or ROPES))
        return {'rope_type': kind, 'rope_theta': draw(100.0, 5e3, 1e6), **ROPES[kind]}

    layers, kv_heads = draw(3, 4), draw(1, 2)
    settings = {
        'vocab_size': draw(96, 112),
        'hidden_size': draw(32, 48),
        'intermediate_size': draw(40, 64),
        'num_hidden_layers': layers,
        'num_attention_heads': kv_heads * draw(1, 2, 4),
        'num_key_value_heads': kv_heads,
        'head_dim': draw(8, 16),
        'rms_norm_eps': draw(1e-6, 1e-5, 1e-3),
        'max_position_embeddings': draw(64, 128),
        'tie_word_embeddings': draw(True, False),
        'rope_parameters': rope(),
    }
    kinds = [draw('full_attention', 'sliding_attention') for _ in range(layers)]
    window = draw(3, 6, 11)
    if family.startswith('gemma'):
        settings |= {
            'hidden_activation': draw('gelu_pytorch_tanh', 'gelu', 'silu'),
            'query_pre_attn_scalar': draw(4, 24, 100),
            'attention_bias': draw(False, True),
            'sliding_window': window,
            'final_logit_softcapping': draw(None, 5.0, 20.0),
        }
        if draw(True, False):
            settings['layer_types'] = kinds
    else:
        settings['hidden_act'] = draw('silu', 'gelu', 'gelu_pytorch_tanh')
    if family == 'gemma2':
        settings['attn_logit_softcapping'] = draw(None, 2.0, 20.0)
    if family == 'gemma3_text':
        settings['sliding_window_pattern'] = draw(2, 3)
        settings['rope_parameters'] = {
            'full_attention': rope(),
            'sliding_attention': rope('default', 'linear'),
        }
    if family == 'llama':
        settings |= {'attention_bias': draw(False, True), 'mlp_bias': draw(False, True)}
    if family == 'mistral':
        settings['sliding_window'] = draw(None, window)
    if family == 'qwen3':
        settings['attention_bias'] = draw(False, True)
    if family.startswith('qwen'):
        settings |= {
            'use_sliding_window': draw(True, False),
            'sliding_window': window,
            'max_window_layers': draw(1, 2),
        }
        if settings['use_sliding_window'] and draw(True, False):
            settings['layer_types'] = kinds
    if family == 'qwen2':
        settings['hidden_size'] = settings['num_attention_heads'] * settings.pop('head_dim')
    if family in ('llama', 'mistral') and draw(True, False):
        settings.pop('head_dim')
    return transformers.AutoConfig.for_model(family, **settings | changes)


def random_model(config, seed):
    """The model in f32, every parameter drawn anew so that it matters to the output."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager')
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith('norm.weight'):
                parameter.copy_(parameter + 0.3 * noise)
            elif 'embed_tokens' in name or name.endswith('bias'):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def run(model, tokens, mask=None):
    """(logits `[b, s, v]`, the hidden states `[l + 1, b, s, d]`) of tokens `[b, s]`."""
    with torch.no_grad():
        out = model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=None if mask is None else torch.tensor(mask, dtype=torch.long),
            output_hidden_states=True,
            use_cache=False,
        )
    return out.logits.numpy(), np.stack([hidden.numpy() for hidden in out.hidden_states])


def generate(model, prompt, count):
    """The greedy continuation `[count]` of one prompt `[s]`, with transformers' cache."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor(prompt, dtype=torch.long)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].numpy()
