"""Losses and their gradients against those of the original implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import read_golden
from test_d2l_golden import hypernetwork

from d2l.context_encoders import early_exit
from d2l.upstream import params_from_upstream
from hyperlora import lora, objectives
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.lora import Lora, LoraPair
from hyperlora.meta_learning import Learner
from hyperlora.models.decoder import Decoder

CASE, LOSSES = 'd2l_b_early_exit_llama_2mod', 'd2l_c_losses_early_exit_llama_2mod'
TOKEN_LOSSES = {'ce': objectives.cross_entropy, 'kl': objectives.top_k_distillation}
UNLABELLED = -100


def rows(tokens, positions):
    """A packed row -> its sequences, each from one position 0 to the next."""
    return np.split(tokens, np.flatnonzero(positions == 0)[1:])


def pad(sequences, width=None):
    width = width or max(map(len, sequences))
    return np.stack([np.pad(s, [(0, width - len(s))] + [(0, 0)] * (s.ndim - 1)) for s in sequences])


def query_of(arrays, per_context=True):
    """Our query from the original's packed one; a row of label values is padded with weight 0."""
    positions = arrays['in/position_ids'][0]
    tokens = rows(arrays['in/input_ids'][0], positions)
    labels = rows(arrays['in/labels'][0], positions)
    at = [np.flatnonzero(row != UNLABELLED) for row in labels]
    counts = np.cumsum([len(p) for p in at])[:-1]
    per_query = np.repeat(
        arrays['n_queries'] if 'n_queries' in arrays else arrays['in/n_queries'],
        arrays['in/n_queries'],
    )
    weights = [
        np.full(len(p), 1 / (len(p) * n) if per_context else 1.0, np.float32)
        for p, n in zip(at, per_query, strict=True)
    ]
    return {
        'tokens': pad(tokens).astype(np.int32),
        'labels': pad([row[p] for row, p in zip(labels, at, strict=True)]).astype(np.int32),
        'label_positions': pad([p - 1 for p in at]).astype(np.int32),
        'label_weights': pad(weights),
        'teacher_ids': pad(np.split(arrays['in/logprobs_indices'][0], counts)).astype(np.int32),
        'teacher_log_probs': pad(np.split(arrays['in/logprobs_vals'][0], counts)),
    }


@pytest.fixture(scope='module')
def case():
    return read_golden(CASE), read_golden(LOSSES)[1]


@pytest.fixture(scope='module')
def problem(case, golden_llama):
    """Learner arguments, hypernetwork parameters, base parameters, batch."""
    (meta, arrays), losses = case
    config, base = golden_llama
    module, params = hypernetwork(meta, arrays)

    def encode(frozen, context):
        return early_exit(config, frozen, context['tokens'], num_layers=2), context['mask']

    chunks = rows(losses['in/ctx_ids'][0], losses['in/ctx_position_ids'][0])
    context = {
        'tokens': pad(chunks).astype(np.int32),
        'mask': pad([np.ones(len(chunk), bool) for chunk in chunks]),
    }
    chunk_owner = np.repeat(np.arange(2), losses['in/n_ctx_chunks'])
    query_owner = np.repeat(np.arange(2), losses['in/n_queries'])
    query = {**query_of(losses), 'chunk_weights': np.float32(query_owner[:, None] == chunk_owner)}
    built = Hypernetwork(module, None, encode, context)
    frozen = {'base': base, 'encoder': base}
    return (built, Decoder(config)), params, frozen, {'context': context, 'query': query}


def learner(parts, kind, l1):
    objective = objectives.LanguageModelling(TOKEN_LOSSES[kind], l1=l1, max_chunks=2)
    return Learner(*parts, objective, groups=1, optimizer=optax.sgd(1.0))


@pytest.fixture(scope='module')
def gradients(problem):
    """Kind of loss -> (total, sums, gradients), with the L1 coefficient 0.1."""
    parts, params, base, batch = problem
    return {
        kind: jax.jit(jax.value_and_grad(learner(parts, kind, 0.1).loss, has_aux=True))(
            params, base, batch
        )
        for kind in TOKEN_LOSSES
    }


@pytest.mark.parametrize('kind', TOKEN_LOSSES)
def test_losses(case, gradients, kind):
    (total, sums), _ = gradients[kind]
    golden = case[1]
    prefix = f'loss/{kind}/per_ctx/train/l1coef'
    loss, contexts = sums['loss']
    assert float(contexts) == pytest.approx(2)
    np.testing.assert_allclose(loss / contexts, golden[prefix + '0.0'], rtol=2e-6)
    np.testing.assert_allclose(
        sums['l1'][0] / contexts, golden[prefix + '0.1/logged_l1'], rtol=2e-5
    )
    np.testing.assert_allclose(total / contexts, golden[prefix + '0.1'], rtol=2e-6)
    # Of a larger accumulated batch, of five contexts, this is one part.
    np.testing.assert_allclose(
        total / 5, golden[f'loss/{kind}/per_ctx/train_acc/l1coef0.1'], rtol=2e-6
    )


@pytest.mark.parametrize('kind', TOKEN_LOSSES)
def test_without_l1_the_total_is_the_loss(problem, kind):
    parts, params, base, batch = problem
    total, sums = jax.jit(learner(parts, kind, 0.0).loss)(params, base, batch)
    assert float(total) == float(sums['loss'][0])


@pytest.mark.parametrize('kind', TOKEN_LOSSES)
def test_labels_in_blocks(problem, gradients, kind):
    """Memory is all that changes."""
    parts, params, base, batch = problem
    whole = learner(parts, kind, 0.1)
    labels = batch['query']['labels'].shape[1]
    in_blocks = [
        dataclasses.replace(
            whole, objective=dataclasses.replace(whole.objective, label_block=labels // count)
        )
        for count in (1, labels)
    ]
    for each in in_blocks:
        found = jax.jit(jax.value_and_grad(each.loss, has_aux=True))(params, base, batch)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            found,
            gradients[kind],
        )
    uneven = dataclasses.replace(whole.objective, label_block=labels + 1)
    with pytest.raises(UserError, match=f'does not divide {labels} labels'):
        dataclasses.replace(whole, objective=uneven).loss(params, base, batch)


@pytest.mark.parametrize('kind', TOKEN_LOSSES)
def test_gradients_of_every_parameter(case, problem, gradients, kind):
    (meta, arrays), golden = case
    prefix = f'grad_{kind}/'
    state = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    # The mapping only renames and transposes, so it carries gradients as well.
    wanted = params_from_upstream(state, problem[0][0].module.config)
    ours = jax.tree.map(lambda g: np.asarray(g) / 2, gradients[kind][1])  # two contexts
    flat = dict(jax.tree_util.tree_leaves_with_path(wanted))
    found = dict(jax.tree_util.tree_leaves_with_path(ours))
    assert flat.keys() == found.keys()
    assert sum(g.size for g in flat.values()) == sum(g.size for g in state.values())
    for path, gradient in flat.items():
        largest = np.abs(gradient).max()
        assert largest > 0, path
        np.testing.assert_allclose(
            found[path],
            gradient,
            atol=1e-4 * largest,
            rtol=1e-3,
            err_msg=jax.tree_util.keystr(path),
        )


@pytest.mark.parametrize('kind', TOKEN_LOSSES)
def test_weight_one_per_label_averages_over_labels(case, problem, kind):
    parts, params, base, batch = problem
    golden = case[1]
    batch = {
        **batch,
        'query': {**batch['query'], 'label_weights': query_of(golden, False)['label_weights']},
    }
    _, sums = jax.jit(learner(parts, kind, 0.0).loss)(params, base, batch)
    loss, weight = sums['loss']
    assert float(weight) == 23
    np.testing.assert_allclose(
        loss / 23, golden[f'loss/{kind}/per_token/train/l1coef0.0'], rtol=2e-6
    )


def test_bare_losses(case):
    golden = case[1]
    query, positions = query_of(golden), golden['in/position_ids'][0]
    logits = pad(rows(golden['crafted/logits'][0], positions))
    at_labels = np.take_along_axis(logits, query['label_positions'][..., None], 1)
    per_label = {kind: np.asarray(loss(at_labels, query)) for kind, loss in TOKEN_LOSSES.items()}
    real = query['label_weights'] > 0
    np.testing.assert_allclose(
        per_label['kl'][real], golden['crafted/kl_per_label_token'], rtol=2e-6
    )
    labelled = golden['in/labels'][0] != UNLABELLED
    wanted = golden['crafted/ce_per_token']
    # The original gives the loss of each label, wherever it puts it among the 56 tokens.
    assert (wanted != 0).sum() == labelled.sum()
    np.testing.assert_allclose(per_label['ce'][real], wanted[wanted != 0], rtol=2e-6)
    for kind, losses in per_label.items():
        weighted = (losses * query['label_weights']).sum(1)
        per_context = [part.sum() for part in np.split(weighted, [2])]
        np.testing.assert_allclose(per_context, golden[f'crafted/{kind}_per_ctx'], rtol=2e-6)


# ------------------------------------------------------------------------ properties by hand


def test_distillation_is_not_renormalised():
    logits = jnp.zeros((1, 1, 4))  # every student probability is 1/4
    query = {
        'teacher_ids': jnp.asarray([[[0, 3]]]),
        'teacher_log_probs': jnp.log(jnp.asarray([[[0.5, 0.25]]])),
    }
    loss = objectives.top_k_distillation(logits, query)
    np.testing.assert_allclose(loss, [[0.75 * np.log(4)]], rtol=1e-6)


def test_l1_by_hand():
    def pair(value, rows):
        return LoraPair(jnp.full((2, rows, 2, 3), value), jnp.full((2, rows, 2, 5), -2 * value))

    chunks = Lora({'q_proj': pair(1.0, 3)}, 1.0)
    shared = Lora({'q_proj': pair(10.0, 1)}, 1.0)
    mask = jnp.asarray([1, 1, 0])
    # Two contexts of one chunk each, of two possible and the shared one: A is (1 + 10 + 0) / 3
    # on average, B twice that.
    assert objectives.l1_of_generated(chunks, shared, mask, 2.0, 2) == pytest.approx(2 * 3 * 11 / 3)
    assert objectives.l1_of_generated(chunks, None, mask, 2.0, 2) == pytest.approx(2 * 3 / 2)
    # A shared LoRA of twice the rank, with as large entries, weighs as much.
    wide = lora.concatenate(shared, shared)
    assert objectives.l1_of_generated(chunks, wide, mask, 2.0, 2) == pytest.approx(2 * 3 * 11 / 3)
