"""Models, adapters and merged models against transformers and PEFT; skipped without torch."""

import functools
import json

import jax
import numpy as np
import pytest
from torch_models import generate, random_config, random_model, run, transformers

from hyperlora import generation
from hyperlora.errors import UserError
from hyperlora.models import families, weights
from hyperlora.models.decoder import Decoder, first_layers

FAMILIES = ['gemma2', 'gemma3_text', 'llama', 'mistral', 'qwen2', 'qwen3']
SEEDS = range(6)
CASES = [
    pytest.param((family, seed), id=f'{family}-{seed}', marks=[pytest.mark.slow] * (seed > 0))
    for family in FAMILIES
    for seed in SEEDS
]
LENGTH = 40


def close(ours, theirs, tolerance=2e-5):
    """Within a fraction of the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@functools.partial(jax.jit, static_argnums=0)
def ours(config, params, tokens, segments):
    """What `torch_models.run` returns."""
    hidden, inputs = first_layers(config, params, tokens, config.num_layers, segments)
    logits = Decoder(config).apply({'params': params}, hidden, method='unembed')
    return logits, jax.numpy.concatenate([inputs, hidden[None]])


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
    """A model of transformers, the folder it was saved in, our config and parameters from there."""
    family, seed = request.param
    folder = tmp_path_factory.mktemp(family)
    model = random_model(random_config(family, seed), seed)
    model.save_pretrained(folder)
    config = families.from_hf(json.loads((folder / 'config.json').read_text()))
    return model, folder, config, weights.from_safetensors(folder, config, np.float32)


def test_hidden_states_and_logits(case):
    """Of a full row, of padding on either side and of packed segments, in one batch."""
    model, _, config, params = case
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (4, LENGTH))
    segments = np.ones((4, LENGTH), np.int32)
    segments[1, -13:] = segments[2, :13] = 0  # padding
    segments[3] = np.repeat([0, 1, 2], [9, 20, 11])
    logits, hidden = ours(config, params, tokens, segments)
    for row in range(4):
        for segment in np.unique(segments[row]):
            where = segments[row] == segment
            wanted_logits, wanted_hidden = run(model, tokens[row : row + 1, where])
            close(logits[row, where], wanted_logits[0])
            for layer in range(config.num_layers + 1):
                close(hidden[layer, row, where], wanted_hidden[layer, 0])
    padded = slice(1, 3)
    mask = segments[padded]
    wanted, _ = run(model, tokens[padded], mask)
    close(logits[padded][mask == 1], wanted[mask == 1])


def test_greedy_generation(case):
    model, _, config, params = case
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, config.vocab_size, length) for length in (17, 9)]
    padded = np.stack([np.pad(prompt, (0, 20 - len(prompt))) for prompt in prompts])
    lengths = np.array([17, 9], np.int32)
    answers = generation.greedy(Decoder(config), params, padded.astype(np.int32), lengths, -1, 12)
    for prompt, answer in zip(prompts, np.asarray(answers), strict=True):
        np.testing.assert_array_equal(answer, generate(model, prompt, 12))


def test_what_we_write_is_the_model(case, tmp_path):
    model, folder, config, params = case
    try:
        hf_config = families.to_hf(config)
    except UserError:  # Llama 3's stretching and that of local layers
        assert len(set(config.rope.divisors)) > 1 or config.local_rope.divisors
        hf_config = json.loads((folder / 'config.json').read_text())
    weights.save_hf(tmp_path, params, config, hf_config, shard_bytes=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation='eager', dtype='float32'
    )
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, LENGTH))
    np.testing.assert_allclose(run(again, tokens)[0], run(model, tokens)[0], rtol=0, atol=1e-6)


def test_the_cases_draw_every_setting():
    """Each setting that `from_hf` reads differs from its default in some case."""
    old = {'rope_local_base_freq', 'rope_scaling', 'rope_theta', 'sliding_window_pattern'}
    for family in FAMILIES:
        drawn = [random_config(family, seed).to_dict() for seed in SEEDS]
        unread = {'gemma2': {'hidden_act'}, 'gemma3_text': {'hidden_act'}, 'qwen2': {'head_dim'}}
        for key, default in families._DEFAULTS[family].items():
            if key not in old | unread.get(family, set()):
                assert any(c[key] != default for c in drawn), (family, key)
