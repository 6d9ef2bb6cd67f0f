"""The algebra of `Lora` against dense matrices, and its files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperlora import lora as lora_lib
from hyperlora.lora import Lora, LoraPair
from hyperlora.models.decoder import Decoder

DIMS = {'down_proj': (12, 6), 'q_proj': (6, 8)}


def random_lora(seed, rows=1, rank=2, dims=DIMS, layers=3, scaling=0.7):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return Lora(
        {
            name: LoraPair(draw(layers, rows, rank, i), draw(layers, rows, rank, o))
            for name, (i, o) in dims.items()
        },
        jnp.float32(scaling),
    )


def dense(lora, row=0, rank_weights=None):
    """Module -> delta `[l, i, o]` of one row, in float64."""
    weights = np.ones(lora.rank) if rank_weights is None else np.asarray(rank_weights, np.float64)
    return {
        name: float(lora.scaling)
        * np.einsum(
            'lri,r,lro->lio',
            np.asarray(pair.a[:, row], np.float64),
            weights,
            np.asarray(pair.b[:, row], np.float64),
        )
        for name, pair in lora.pairs.items()
    }


def assert_same_delta(ours, wanted, **tolerance):
    assert ours.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(ours[name], wanted[name], **({'atol': 1e-5} | tolerance))


def layer(lora, name, index=0):
    return jax.tree.map(lambda x: x[index], lora.pairs[name])


def decoder_lora(tiny, seed, **kwargs):
    """A LoRA of every module of the tiny base, small enough for the model to stay in f32 range."""
    dims = {name: (i, o) for name, i, o in lora_lib.module_dims(tiny.config, lora_lib.MODULES)}
    return random_lora(seed, dims=dims, layers=tiny.config.num_layers, scaling=0.05, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def run(decoder, params, tokens, lora, rank_weights):
    return decoder.apply({'params': params}, tokens, lora=lora, rank_weights=rank_weights).hidden


def hidden(tiny, tokens, params=None, lora=None, rank_weights=None):
    params = tiny.params if params is None else params
    return np.asarray(run(Decoder(tiny.config), params, tokens, lora, rank_weights))


TOKENS = np.random.default_rng(0).integers(4, 128, (4, 10)).astype(np.int32)


# ---------------------------------------------------------------------------- application


def test_a_fresh_lora_is_the_base_bit_for_bit(tiny):
    dims = {name: (i, o) for name, i, o in lora_lib.module_dims(tiny.config, lora_lib.MODULES)}
    fresh = lora_lib.init(jax.random.key(0), dims, tiny.config.num_layers, 4, scaling=3.0, rows=2)
    assert all(pair.a.any() and not pair.b.any() for pair in fresh.pairs.values())
    base = hidden(tiny, TOKENS)
    np.testing.assert_array_equal(hidden(tiny, TOKENS, lora=fresh), base)
    x = jax.random.normal(jax.random.key(1), (4, 5, 12))
    kernel = jax.random.normal(jax.random.key(2), (12, 6))
    pair = LoraPair(jnp.ones((1, 2, 12)), jnp.zeros((1, 2, 6)))
    np.testing.assert_array_equal(lora_lib.project(x, kernel, pair, jnp.float32(9)), x @ kernel)


def test_project_adds_the_delta_of_each_row():
    lora = random_lora(0, rows=2, rank=3)
    rng = np.random.default_rng(1)
    x, kernel = rng.standard_normal((4, 5, 12)), rng.standard_normal((12, 6))
    weights = rng.standard_normal((4, 3))
    out = lora_lib.project(
        jnp.float32(x),
        jnp.float32(kernel),
        layer(lora, 'down_proj'),
        lora.scaling,
        jnp.float32(weights),
    )
    for i in range(4):  # two consecutive rows share one LoRA row
        delta = dense(lora, i // 2, weights[i])['down_proj'][0]
        np.testing.assert_allclose(out[i], x[i] @ (kernel + delta), atol=2e-5)


def test_rank_weights_per_token():
    lora = random_lora(0, rows=1, rank=3)
    rng = np.random.default_rng(1)
    x = jnp.float32(rng.standard_normal((2, 4, 12)))
    kernel = jnp.float32(rng.standard_normal((12, 6)))
    weights = jnp.float32(rng.standard_normal((2, 4, 3)))
    pair = layer(lora, 'down_proj')
    packed = lora_lib.project(x, kernel, pair, lora.scaling, weights)
    for token in range(4):
        alone = lora_lib.project(
            x[:, token : token + 1], kernel, pair, lora.scaling, weights[:, token]
        )
        np.testing.assert_allclose(packed[:, token : token + 1], alone, atol=1e-5)


def test_merged_is_applied(tiny):
    lora = decoder_lora(tiny, 3)
    applied = hidden(tiny, TOKENS, lora=lora)
    assert np.abs(applied - hidden(tiny, TOKENS)).max() > 0.1
    merged = lora_lib.merge(tiny.params, lora)
    np.testing.assert_allclose(hidden(tiny, TOKENS, merged), applied, atol=2e-5)
    with pytest.raises(ValueError, match='one row'):
        lora_lib.merge(tiny.params, decoder_lora(tiny, 3, rows=2))


def test_merging_keeps_biases(tiny):
    attention = tiny.params['layers']['attention']
    biased = {**attention['q_proj'], 'bias': jnp.ones((3, 32))}
    layers = {**tiny.params['layers'], 'attention': {**attention, 'q_proj': biased}}
    merged = lora_lib.merge({**tiny.params, 'layers': layers}, decoder_lora(tiny, 3))
    np.testing.assert_array_equal(merged['layers']['attention']['q_proj']['bias'], biased['bias'])


def test_merging_leaves_the_given_parameters_alone(tiny):
    before = jax.tree.map(np.array, tiny.params)
    lora_lib.merge(tiny.params, decoder_lora(tiny, 3))
    jax.tree.map(np.testing.assert_array_equal, tiny.params, before)


# ---------------------------------------------------------------------------- composition


def test_a_chunk_counted_k_times_is_k_copies():
    chunks, shared = random_lora(0, rows=2), random_lora(1)
    counted, weights = lora_lib.compose(chunks, shared, 1, jnp.asarray([[3.0, 1.0]]))
    one, other = (jax.tree.map(lambda x, k=k: x[:, k : k + 1], chunks.pairs) for k in (0, 1))
    copies = lora_lib.concatenate(
        *(Lora(pairs, chunks.scaling) for pairs in (one, one, one, other)), shared
    )
    assert copies.rank == 10 and counted.rank == 6
    assert_same_delta(dense(counted, rank_weights=weights[0]), dense(copies))


def test_rows_see_their_own_chunks_only(tiny):
    chunks, shared = decoder_lora(tiny, 0, rows=3), decoder_lora(tiny, 1)
    owners = jnp.asarray([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]], jnp.float32)
    lora, weights = lora_lib.compose(chunks, shared, 1, owners)
    out = hidden(tiny, TOKENS, lora=lora, rank_weights=weights)
    # Another chunk for the second context changes its row and no other.
    changed = chunks.replace(pairs=jax.tree.map(lambda x: x.at[:, 2].multiply(-2), chunks.pairs))
    lora, weights = lora_lib.compose(changed, shared, 1, owners)
    other = hidden(tiny, TOKENS, lora=lora, rank_weights=weights)
    np.testing.assert_array_equal(other[[0, 2, 3]], out[[0, 2, 3]])
    assert np.abs(other[1] - out[1]).max() > 0.1
    # A row without a chunk has the shared LoRA.
    np.testing.assert_allclose(out[2], hidden(tiny, TOKENS[2:3], lora=shared)[0], atol=2e-5)


@pytest.mark.parametrize('with_shared', [False, True])
def test_groups_are_the_same_as_each_row_alone(tiny, with_shared):
    chunks = decoder_lora(tiny, 0, rows=4)  # two groups of two chunks, two rows each
    shared = decoder_lora(tiny, 1) if with_shared else None
    owners = jnp.asarray([[1, 0], [0, 2], [1, 1], [0, 1]], jnp.float32)
    lora, weights = lora_lib.compose(chunks, shared, 2, owners)
    assert lora.rows == 2 and lora.rank == 4 + 2 * with_shared
    grouped = hidden(tiny, TOKENS, lora=lora, rank_weights=weights)
    for row in range(4):
        mine = jax.tree.map(lambda x, g=row // 2: x[:, 2 * g : 2 * g + 2], chunks.pairs)
        alone, weight = lora_lib.compose(
            Lora(mine, chunks.scaling), shared, 1, owners[row : row + 1]
        )
        wanted = hidden(tiny, TOKENS[row : row + 1], merged_alone(tiny, alone, weight))
        np.testing.assert_allclose(grouped[row : row + 1], wanted, atol=3e-5)


def test_contexts_packed_in_one_row_are_the_same_as_a_row_each(tiny):
    chunks, shared = decoder_lora(tiny, 0, rows=3), decoder_lora(tiny, 1)
    lengths = (4, 7, 2)
    owner = np.repeat(np.arange(3), lengths)
    starts = np.cumsum(lengths) - lengths
    tokens = np.random.default_rng(1).integers(4, 128, (1, len(owner))).astype(np.int32)
    positions = np.arange(len(owner)) - starts[owner]
    lora, weights = lora_lib.compose(chunks, shared, 1, jnp.eye(3))
    packed = jax.jit(functools.partial(Decoder(tiny.config).apply, {'params': tiny.params}))(
        tokens,
        positions[None].astype(np.int32),
        owner[None].astype(np.int32) + 1,
        lora=lora,
        rank_weights=weights[owner][None],
    ).hidden[0]
    for i in range(3):
        mine = Lora(jax.tree.map(lambda x, i=i: x[:, i : i + 1], chunks.pairs), chunks.scaling)
        alone = lora_lib.concatenate(mine, shared)
        wanted = hidden(tiny, tokens[:, owner == i], lora=alone)[0]
        assert np.abs(wanted - hidden(tiny, tokens[:, owner == i])[0]).max() > 0.1
        np.testing.assert_allclose(
            packed[owner == i], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max()
        )


def merged_alone(tiny, lora, rank_weights):
    return lora_lib.merge(tiny.params, lora_lib.fold(lora, rank_weights))


def test_concatenate_adds_deltas_of_any_scaling():
    one, two = random_lora(0, rank=2, scaling=0.5), random_lora(1, rank=3, scaling=-4.0)
    joined = lora_lib.concatenate(one, two)
    assert joined.rank == 5
    wanted = {name: delta + dense(two)[name] for name, delta in dense(one).items()}
    assert_same_delta(dense(joined), wanted, atol=5e-5)


def test_concatenate_keeps_the_dtype():
    one, two = (
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_lora(seed, scaling=scaling).pairs)
        for seed, scaling in ((0, 0.5), (1, 2.0))
    )
    joined = lora_lib.concatenate(lora_lib.Lora(one, 0.5), lora_lib.Lora(two, jnp.float32(2)))
    assert {x.dtype.name for x in jax.tree.leaves(joined.pairs)} == {'bfloat16'}


def test_concatenate_shares_a_single_row():
    many, shared = random_lora(0, rows=3), random_lora(1)
    joined = lora_lib.concatenate(many, shared)
    for row in range(3):
        wanted = {name: delta + dense(shared)[name] for name, delta in dense(many, row).items()}
        assert_same_delta(dense(joined, row), wanted)


def test_scale_and_fold():
    lora = random_lora(0, rows=2, rank=3)
    assert_same_delta(
        dense(lora_lib.scale(lora, -2.5), 1),
        {name: -2.5 * delta for name, delta in dense(lora, 1).items()},
    )
    weights = np.float32([[1, 0, 2.5], [0, -1, 1]])
    folded = lora_lib.fold(lora, jnp.asarray(weights))
    for row in range(2):
        assert_same_delta(dense(folded, row), dense(lora, row, weights[row]))


# ---------------------------------------------------------------------------- lower ranks


def test_norms_are_those_of_the_deltas():
    lora = random_lora(0, rows=2, scaling=-0.7)
    found = lora_lib.norms(lora)
    for row in range(2):
        for name, delta in dense(lora, row).items():
            expected = np.sqrt((delta**2).sum((1, 2)))
            np.testing.assert_allclose(found[name][:, row], expected, rtol=1e-5)


def test_silent_rows_are_those_without_b():
    lora = random_lora(0, rows=3)
    lora.pairs['q_proj'] = lora.pairs['q_proj'].replace(b=lora.pairs['q_proj'].b.at[:, 1:].set(0))
    assert not lora_lib.silent_rows(lora).any()  # down_proj still says something
    lora.pairs['down_proj'] = lora.pairs['down_proj'].replace(
        b=lora.pairs['down_proj'].b.at[:, 1].set(0)
    )
    assert lora_lib.silent_rows(lora).tolist() == [False, True, False]


@pytest.mark.parametrize('rank', [9, 40])
def test_compact_is_exact(rank):
    lora = random_lora(0, rows=2, rank=rank)
    small = lora_lib.compact(lora)
    assert small.rank == 6  # min(i, o) is 6 for both modules
    for row in range(2):
        assert_same_delta(dense(small, row), dense(lora, row), atol=1e-4)


def test_compact_leaves_low_ranks_alone():
    lora = random_lora(0, rank=6)
    assert lora_lib.compact(lora) is lora


def test_compact_of_modules_of_different_widths():
    lora = random_lora(0, rank=9, dims={'down_proj': (12, 4), 'q_proj': (7, 8)})
    small = lora_lib.compact(lora)
    assert small.rank == 7
    assert_same_delta(dense(small), dense(lora), atol=1e-4)


# ------------------------------------------------------------------------------ reconciliation


def loras_together(ridge, ranks=(1, 2, 3), **kwargs):
    parts = [random_lora(seed, rank=rank, **kwargs) for seed, rank in enumerate(ranks)]
    whole = lora_lib.concatenate(*parts)
    return parts, whole, lora_lib.reconcile(parts, ridge)


def test_reconciled_loras_say_what_each_says_alone():
    parts, whole, together = loras_together(1e-6, dims={'q_proj': (12, 8)})
    for part in parts:
        keys = np.asarray(part.pairs['q_proj'].a[:, 0], np.float64)
        said, alone, summed = (
            np.einsum('lri,lio->lro', keys, dense(lora)['q_proj'])
            for lora in (together, part, whole)
        )
        np.testing.assert_allclose(said, alone, atol=1e-3)
        assert np.abs(summed - alone).max() > 1


@pytest.mark.parametrize('ranks', [(1, 2, 3), (5, 6, 4)])
def test_reconciliation_is_ridge_regression(ranks):
    """Also of more ranks than inputs."""
    dims, ridge = {'q_proj': (9, 4)}, 0.3
    parts, _, together = loras_together(ridge, ranks, dims=dims)
    keys, values = [], []
    for part in parts:
        a, b = (np.asarray(x, np.float64)[:, 0] for x in jax.tree.leaves(part.pairs['q_proj']))
        size = np.sqrt(np.square(a).sum(2).mean(1))[:, None, None]
        a, b = a / size, b * size
        keys.append(a)
        values.append(a @ a.swapaxes(1, 2) @ b + ridge * b)
    a, x = (np.concatenate(each, 1) for each in (keys, values))
    alike = a @ a.swapaxes(1, 2) + ridge * np.eye(sum(ranks))
    wanted = 0.7 * a.swapaxes(1, 2) @ np.linalg.solve(alike, x)
    np.testing.assert_allclose(dense(together)['q_proj'], wanted, atol=1e-3)


def test_with_a_large_ridge_loras_add_up():
    _, whole, together = loras_together(1e6)
    assert_same_delta(dense(together), dense(whole), atol=1e-3)
    _, whole, together = loras_together(1)
    assert np.abs(dense(together)['q_proj'] - dense(whole)['q_proj']).max() > 0.1


def test_reconciliation_does_not_depend_on_order_padding_or_scale():
    parts, _, together = loras_together(0.3)
    turned = [lora_lib.pad_rank(part, part.rank + 2) for part in reversed(parts)]
    turned[0] = turned[0].replace(
        pairs={k: LoraPair(10 * p.a, p.b / 10) for k, p in turned[0].pairs.items()}
    )
    again = lora_lib.reconcile(turned, 0.3)
    assert_same_delta(dense(again), dense(together), atol=1e-4)


def test_rows_are_loras_of_their_own():
    parts = [random_lora(seed, rank=2, rows=rows) for seed, rows in enumerate((2, 3))]
    rows = [
        part.replace(pairs=jax.tree.map(lambda x, i=i: x[:, i : i + 1], part.pairs))
        for part in parts
        for i in range(part.rows)
    ]
    together = lora_lib.reconcile(parts, 0.3)
    assert together.rows == 1
    assert_same_delta(dense(together), dense(lora_lib.reconcile(rows, 0.3)), atol=1e-4)


def test_many_loras_are_reconciled_as_they_come():
    """By sums of fixed size, with the result that all keys at once have."""
    dims = {'q_proj': (40, 6), 'v_proj': (40, 4)}
    parts = [random_lora(seed, rank=3, rows=2, dims=dims) for seed in range(6)]
    few = lora_lib.reconcile(parts, 0.3)
    assert few.rank == 36
    silent = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 2 + [(0, 8), (0, 0)]), parts[0].pairs)
    many = lora_lib.reconcile(iter([parts[0].replace(pairs=silent), *parts[1:]]), 0.3)
    assert many.rank == 6
    assert_same_delta(dense(many), dense(few), atol=1e-4)


def test_scalings_count_in_reconciliation():
    parts = [random_lora(seed, rank=2) for seed in range(2)]
    double = [parts[0], parts[1].replace(scaling=2 * parts[1].scaling)]
    folded = [
        parts[0],
        parts[1].replace(
            pairs={name: pair.replace(b=2 * pair.b) for name, pair in parts[1].pairs.items()}
        ),
    ]
    a, b = (lora_lib.reconcile(each, 0.3) for each in (double, folded))
    assert_same_delta(dense(a), dense(b), atol=1e-4)


def test_one_lora_and_silent_layers_are_left_as_they_are():
    parts = [random_lora(seed, rank=4) for seed in range(2)]
    assert_same_delta(dense(lora_lib.reconcile(parts[:1], 0.3)), dense(parts[0]), atol=0)
    silent = [
        part.replace(pairs=jax.tree.map(lambda x: x.at[0].set(0), part.pairs)) for part in parts
    ]
    for pair in lora_lib.reconcile(silent, 0.3).pairs.values():
        assert np.isfinite(pair.b).all() and not pair.b[0].any() and pair.b[1].any()


# -------------------------------------------------------------------------------- truncation


def test_truncate_is_exact_at_full_rank():
    for rank, kept in ((4, 4), (4, 100), (40, 6)):
        lora = random_lora(0, rows=2, rank=rank)
        short = lora_lib.truncate(lora, kept)
        assert short.rank <= min(kept, rank)
        for row in range(2):
            assert_same_delta(dense(short, row), dense(lora, row), atol=1e-4)


@pytest.mark.parametrize('rank', [1, 3])
def test_truncate_is_the_best_approximation(rank):
    lora = random_lora(0, rows=2, rank=5)
    short = lora_lib.truncate(lora, rank)
    assert short.rank == rank
    for row in range(2):
        for name, delta in dense(lora, row).items():
            u, s, vt = np.linalg.svd(delta, full_matrices=False)
            best = (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]
            ours = dense(short, row)[name]
            np.testing.assert_allclose(ours, best, atol=1e-4)
            # Eckart-Young: what is lost are the singular values that are cut off, and it is much.
            lost = np.linalg.norm(ours - delta, axis=(1, 2))
            np.testing.assert_allclose(lost, np.linalg.norm(s[:, rank:], axis=1), rtol=1e-4)
            assert (lost > 0.1).all()


def test_truncate_needs_a_positive_rank():
    with pytest.raises(ValueError, match='positive'):
        lora_lib.truncate(random_lora(0), 0)
