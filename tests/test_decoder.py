"""The decoder and greedy generation: real answers, caches, padding, packing, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from hyperlora import generation, lora
from hyperlora.errors import UserError
from hyperlora.models import attention as attention_lib
from hyperlora.models.decoder import REMAT_POLICIES, Decoder, first_layers

TOKENS = np.random.default_rng(0).integers(4, 128, (3, 24)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(decoder, params, tokens, **kwargs):
    return decoder.apply({'params': params}, tokens, **kwargs).hidden


@functools.partial(jax.jit, static_argnums=0)
def next_token(decoder, params, tokens, last, adapter):
    hidden = decoder.apply({'params': params}, tokens, lora=adapter).hidden[:, last]
    return decoder.apply({'params': params}, hidden, method='unembed').argmax(-1)


def step_by_step(base, prompt, count, adapter=None):
    """The continuation of one prompt, each token from a full pass over all tokens before it."""
    tokens = list(prompt)
    width = len(prompt) + count
    for _ in range(count):
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        token = int(
            next_token(Decoder(base.config), base.params, padded, len(tokens) - 1, adapter)[0]
        )
        tokens.append(token)
        if token == base.tokenizer.eos_id:
            break
    return tokens[len(prompt) :]


def random_lora(config, rows, rank=3, scaling=0.1, seed=0):
    dims = {name: (i, o) for name, i, o in lora.module_dims(config, lora.MODULES)}
    adapter = lora.init(jax.random.key(seed), dims, config.num_layers, rank, scaling, rows)
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(dims)))
    return adapter.replace(
        pairs={
            name: pair.replace(b=jax.random.normal(next(keys), pair.b.shape))
            for name, pair in adapter.pairs.items()
        }
    )


def padded(prompts):
    tokens = np.full((len(prompts), max(map(len, prompts))), 7, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.asarray([len(p) for p in prompts], np.int32)


# ------------------------------------------------------------------------------- generation


def test_smollm2_answers(smollm2):
    prompt = smollm2.tokenizer.prompt('What is the capital of France?', default_system=True)
    assert 'Paris' in generation.answer(smollm2, [prompt], 16)[0]


def test_smollm2_in_a_batch_answers_as_step_by_step(smollm2):
    encode = smollm2.tokenizer.encode
    prompts = [encode('The first three letters are A, B and'), encode('One, two, three,')]
    tokens, lengths = padded(prompts)
    out = generation.greedy(
        Decoder(smollm2.config), smollm2.params, tokens, lengths, smollm2.tokenizer.eos_id, 6
    )
    for prompt, row in zip(prompts, np.asarray(out), strict=True):
        wanted = step_by_step(smollm2, prompt, 6)
        assert row[: len(wanted)].tolist() == wanted


@pytest.mark.parametrize('rows', [0, 1, 4])
def test_cached_generation_is_step_by_step(tiny, rows):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 128, n).tolist() for n in (5, 12, 1, 9)]
    tokens, lengths = padded(prompts)
    adapter = random_lora(tiny.config, rows) if rows else None
    out = np.asarray(
        generation.greedy(
            Decoder(tiny.config), tiny.params, tokens, lengths, tiny.tokenizer.eos_id, 10, adapter
        )
    )
    assert len({tuple(row) for row in out.tolist()}) == 4
    for i, (prompt, row) in enumerate(zip(prompts, out.tolist(), strict=True)):
        own = adapter and adapter.replace(
            pairs=jax.tree.map(
                lambda x, i=i: x[:, i * rows // 4 : i * rows // 4 + 1], adapter.pairs
            )
        )
        wanted = step_by_step(tiny, prompt, 10, own)
        assert row == wanted + [tiny.tokenizer.eos_id] * (10 - len(wanted))


def test_rank_weights_reach_generated_tokens(tiny):
    chunks = random_lora(tiny.config, 2)
    adapter, weights = lora.compose(chunks, None, 1, jnp.eye(2))
    prompt = TOKENS[0, :6].tolist()
    tokens, lengths = padded([prompt, prompt])
    out = np.asarray(
        generation.greedy(
            Decoder(tiny.config), tiny.params, tokens, lengths, -1, 10, adapter, weights
        )
    )
    for i in range(2):
        own = chunks.replace(pairs=jax.tree.map(lambda x, i=i: x[:, i : i + 1], chunks.pairs))
        assert out[i].tolist() == step_by_step(tiny, prompt, 10, own)
    assert out[0].tolist() != out[1].tolist()


def test_generation_stops_at_the_end_of_an_answer(tiny):
    """With the third token as the end, the row ends there, and an unfinished row goes on."""
    tokens, lengths = padded([TOKENS[0, :6].tolist(), TOKENS[1, :9].tolist()])

    def generate(eos_id):
        return np.asarray(
            generation.greedy(Decoder(tiny.config), tiny.params, tokens, lengths, eos_id, 12)
        ).tolist()

    free = generate(-1)
    eos_id = free[0][2]
    for row, unbounded in zip(generate(eos_id), free, strict=True):
        end = unbounded.index(eos_id) if eos_id in unbounded else 12
        assert row == unbounded[:end] + [eos_id] * (12 - end)


def test_no_prompts_have_no_answers(tiny):
    assert generation.answer_in_batches(tiny, [], 4) == []


def test_a_prompt_that_does_not_fit_is_refused(tiny):
    with pytest.raises(UserError, match='window of 256'):
        generation.answer(tiny, [[5] * 250], 10)


# ------------------------------------------------------------------------ padding and packing


def test_padding_changes_nothing(tiny):
    decoder = Decoder(tiny.config)
    short = np.array(TOKENS)
    short[:, 15:] = 0
    np.testing.assert_allclose(
        run(decoder, tiny.params, short)[:, :15],
        run(decoder, tiny.params, TOKENS[:, :15]),
        atol=1e-5,
    )
    np.testing.assert_array_equal(
        run(decoder, tiny.params, short)[:, :15], run(decoder, tiny.params, TOKENS)[:, :15]
    )


def test_packed_rows_are_separate_rows(tiny):
    decoder, lengths = Decoder(tiny.config), (7, 12, 5)
    parts = [TOKENS[i, :n] for i, n in enumerate(lengths)]
    packed = np.concatenate(parts)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat(np.arange(3), lengths)[None]
    together = run(decoder, tiny.params, packed, positions=positions, segments=segments)[0]
    alone = [run(decoder, tiny.params, part[None])[0] for part in parts]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    mixed = run(decoder, tiny.params, packed, positions=positions)[0]
    assert np.abs(mixed - together)[7:].max() > 0.1  # without segments they do see each other


def test_order_of_tokens_matters(tiny):
    """Rotary positions are relative: a shift of all changes nothing, a swap or a stretch does."""
    decoder, positions = Decoder(tiny.config), np.tile(np.arange(24), (3, 1))
    base = run(decoder, tiny.params, TOKENS)
    np.testing.assert_allclose(
        run(decoder, tiny.params, TOKENS, positions=positions + 40), base, atol=5e-5
    )
    assert np.abs(run(decoder, tiny.params, TOKENS, positions=positions * 3) - base).max() > 0.01
    swapped = TOKENS.copy()
    swapped[:, [2, 3]] = TOKENS[:, [3, 2]]
    assert np.abs(run(decoder, tiny.params, swapped) - base)[:, -1].max() > 0.01


@pytest.mark.parametrize('packed', [False, True])
def test_blocked_attention_is_unblocked_attention(tiny, monkeypatch, packed):
    kwargs = {'segments': np.repeat([[0, 1, 2]], 8, 1).repeat(3, 0)} if packed else {}
    decoder = Decoder(tiny.config)
    whole = decoder.apply({'params': tiny.params}, TOKENS, **kwargs).hidden
    keys = []
    attend = attention_lib.attention
    monkeypatch.setattr(attention_lib, '_QUERY_BLOCK', 10)

    def counted(q, k, *args, **kwargs):
        keys.append(k.shape[1])
        return attend(q, k, *args, **kwargs)

    monkeypatch.setattr(attention_lib, 'attention', counted)
    blocked = decoder.apply({'params': tiny.params}, TOKENS, **kwargs).hidden
    assert set(keys) == {10, 20, 24}  # no block looks past its own end
    np.testing.assert_allclose(blocked, whole, atol=1e-5)


# --------------------------------------------------------------------------- variants of a pass


def test_remat_changes_no_gradient(tiny):
    adapter = random_lora(tiny.config, 1)

    def gradient(remat):
        def loss(pairs):
            hidden = (
                Decoder(tiny.config, remat=remat)
                .apply({'params': tiny.params}, TOKENS, lora=adapter.replace(pairs=pairs))
                .hidden
            )
            return (hidden[..., 0] ** 2).sum()

        return jax.jit(jax.grad(loss))(adapter.pairs)

    kept = gradient('none')
    assert all(np.abs(x).max() > 1e-2 for x in jax.tree.leaves(kept))
    for remat in set(REMAT_POLICIES) - {'none'}:
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max()),
            gradient(remat),
            kept,
        )


def test_bfloat16_stays_bfloat16_and_close(tiny):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    adapter = random_lora(tiny.config, 1)
    decoder = Decoder(tiny.config)
    out = decoder.apply({'params': low}, TOKENS, lora=adapter)
    assert out.hidden.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.bfloat16 for x in first_layers(TINY, low, TOKENS, 2))
    logits = decoder.apply({'params': low}, out.hidden, method='unembed')
    assert logits.dtype == jnp.float32
    full = np.asarray(run(decoder, tiny.params, TOKENS, lora=adapter))
    error = np.linalg.norm(np.asarray(out.hidden, np.float32) - full) / np.linalg.norm(full)
    assert 1e-4 < error < 0.05
    cached = generation.greedy(decoder, low, TOKENS, np.full(3, 24, np.int32), -1, 4, adapter)
    assert cached.shape == (3, 4)


def test_first_layers_are_those_of_the_decoder(tiny):
    hidden, inputs = first_layers(TINY, tiny.params, TOKENS, 3)
    np.testing.assert_allclose(hidden, run(Decoder(TINY), tiny.params, TOKENS), atol=1e-5)
    assert inputs.shape == (3, 3, 24, 32)
    np.testing.assert_array_equal(inputs[0], tiny.params['embedder']['embedding'][TOKENS])
    scale = tiny.params['final_norm']['scale']
    x = inputs[2]
    normed = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + TINY.norm_eps) * scale
    np.testing.assert_allclose(first_layers(TINY, tiny.params, TOKENS, 2)[0], normed, atol=1e-5)


def test_first_layers_pass_no_gradient(tiny):
    gradient = jax.grad(lambda p: first_layers(TINY, p, TOKENS, 2)[0].sum())(tiny.params)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))
