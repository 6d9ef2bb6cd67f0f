"""Text-to-LoRA: the losses of the original, the hypernetwork's start, and its training data."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import CharTokenizer, read_golden, tiny_base
from ml_collections import ConfigDict
from test_convert import find, mistral

import t2l.build
from configs.t2l import get_config as t2l_config
from hyperlora import hypernetwork, meta_learning, objectives, torch_files, trained
from hyperlora.data.packing import pack
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.lora_table import factors
from hyperlora.meta_learning import Learner
from hyperlora.models.base import load_params
from hyperlora.models.decoder import Decoder
from hyperlora.upstream import convert
from t2l import data as t2l_data
from t2l.data import TaskGroups, draw_embedding
from t2l.hypernetwork import TextToLora, TextToLoraConfig
from t2l.tasks import Example, Task
from t2l.upstream import params_from_upstream

IGNORED = -100
SIZES = {'L': {}, 'M': {'shared_head': True}, 'S': {'shared_head': True, 'per_rank': True}}


def make(**settings):
    shape = {
        'num_layers': 3,
        'dims': (('down_proj', 48, 32), ('q_proj', 32, 32)),
        'rank': 4,
        'scaling': 2.0,
        'embedding_width': 24,
        'latent_size': 16,
        'head_width': 20,
    }
    return TextToLora(TextToLoraConfig(**{**shape, **settings}))


# -------------------------------------------------------------------------- against the original


@pytest.fixture(scope='module')
def original():
    """(arrays of the reference, learner's parts, parameters, frozen parameters, batch)."""
    case = 't2l_d_sft_linear'
    _, arrays = read_golden(case)
    params, record = convert(find(f'{case}_ckpt', 'hypermod.pt'), mistral(), dtype='float32')
    config, base, _ = load_params(mistral())
    module = t2l.build.make_module(ConfigDict(record['config']['hypernetwork']), config)
    labels = arrays['in/labels'][:, 1:]
    labelled = labels != IGNORED
    positions = np.tile(np.arange(labels.shape[1], dtype=np.int32), (len(labels), 1))
    query = {
        'tokens': arrays['in/input_ids'].astype(np.int32),
        'labels': np.where(labelled, labels, 0).astype(np.int32),
        'label_positions': positions,
        'label_weights': (labelled / labelled.sum(1, keepdims=True)).astype(np.float32),
        'chunk_weights': np.eye(2, dtype=np.float32),
    }
    batch = {'context': {'embedding': arrays['in/task_embs']}, 'query': query}
    hyper = Hypernetwork(module, None, lambda _, context: (context['embedding'], None), {})
    frozen = {'base': base, 'encoder': None}
    return arrays, (hyper, Decoder(config)), params, frozen, batch


def learner(parts, smoothing, l2=0.0):
    objective = objectives.build(
        ConfigDict({'name': 'cross_entropy', 'label_smoothing': smoothing, 'l2': l2})
    )
    return Learner(*parts, objective, groups=1, optimizer=optax.sgd(1.0))


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('weighting', ['equal_sample', 'equal_token'])
def test_losses(original, smoothing, weighting):
    arrays, parts, params, frozen, batch = original
    if weighting == 'equal_token':
        weights = (batch['query']['label_weights'] > 0).astype(np.float32)
        batch = {**batch, 'query': {**batch['query'], 'label_weights': weights}}
    total, sums = jax.jit(learner(parts, smoothing, 1e-3).loss)(params, frozen, batch)
    wanted = {
        name: arrays[f'loss/{weighting}/ls{smoothing}/{name}']
        for name in ('sft_loss', 'generated_w_l2_loss', 'per_token_acc')
    }
    loss, weight = sums['loss']
    np.testing.assert_allclose(loss / weight, wanted['sft_loss'], rtol=1e-5)
    l2 = 1e-3 * sums['l2'][0] / sums['l2'][1]
    np.testing.assert_allclose(l2, wanted['generated_w_l2_loss'][0], rtol=1e-5)
    np.testing.assert_allclose(total / weight, loss / weight + l2, rtol=1e-6)
    if weighting == 'equal_token':
        right, count = sums['accuracy']
        np.testing.assert_allclose(right / count, wanted['per_token_acc'], rtol=1e-6)


def test_gradients_of_every_parameter(original):
    arrays, parts, params, frozen, batch = original
    gradient = jax.jit(jax.grad(learner(parts, 0.1, 1e-3).loss, has_aux=True))
    ours, sums = gradient(params, frozen, batch)
    state = torch_files.load(f'{find("t2l_d_sft_linear_ckpt", "hypermod.pt")}/hypermod.pt')
    # The mapping only renames and transposes, so it carries gradients as well.
    grads = {k: arrays.get(f'grad/{k}', np.zeros_like(v)) for k, v in state.items()}
    wanted = params_from_upstream(grads, parts[0].module.config)
    assert sum(f'grad/{k}' in arrays for k in state) > 30
    for (path, theirs), mine in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(ours), strict=True
    ):
        largest = np.abs(theirs).max()
        assert largest > 0, path
        np.testing.assert_allclose(
            np.asarray(mine) / sums['loss'][1],
            theirs,
            atol=1e-4 * largest,
            err_msg=jax.tree_util.keystr(path),
        )


@pytest.mark.parametrize(
    ('case', 'delta'),
    [
        ('t2l_e1_recon_factorized_zscore', False),
        ('t2l_e2_recon_deltaw', True),
        ('t2l_e3_recon_factorized_raw', False),
    ],
)
def test_reconstruction(case, delta):
    """Loss, error in raw scale and gradients of `recon_trainer.compute_loss`."""
    _, arrays = read_golden(case)
    params, record = convert(find(f'{case}_ckpt', 'hypermod.pt'), mistral(), dtype='float32')
    config, *_ = load_params(mistral())
    module = t2l.build.make_module(ConfigDict(record['config']['hypernetwork']), config)
    tasks, names = ('t0', 't1'), [name for name, *_ in module.config.dims]
    repeats = [len(arrays[f'in/{task}/task_embs']) for task in tasks]
    target = {
        name: {
            key: np.repeat(
                [
                    arrays[f'in/{task}/lora_{key.upper()}/{name}'].swapaxes(1, 1 + (key == 'b'))
                    for task in tasks
                ],
                repeats,
                0,
            )
            for key in 'ab'
        }
        for name in names
    }
    if module.config.z_score:
        for name, pair in target.items():
            for key in 'ab':
                deviation = np.asarray(params[f'deviation_{key}_{name}'])
                pair[f'{key}_deviation'] = np.broadcast_to(deviation, pair[key].shape)
    embeddings = np.concatenate([arrays[f'in/{task}/task_embs'] for task in tasks])
    batch = {'context': {'embedding': embeddings}, 'target': target}
    hyper = Hypernetwork(module, None, lambda _, context: (context['embedding'], None), {})
    objective = objectives.build(ConfigDict({'name': 'reconstruction', 'delta': delta}))
    loss = Learner(hyper, None, objective, groups=1, optimizer=optax.sgd(1.0)).loss
    frozen = {'base': None, 'encoder': None}
    ours, sums = jax.jit(jax.grad(loss, has_aux=True))(params, frozen, batch)
    count = sums['loss'][1]
    assert count == sum(repeats)
    np.testing.assert_allclose(sums['loss'][0] / count, arrays['loss'], rtol=1e-5)
    np.testing.assert_allclose(sums['error'][0] / count, arrays['unnorm_err'], rtol=1e-5)
    if not any(key.startswith('grad/') for key in arrays):
        return
    state = torch_files.load(f'{find(f"{case}_ckpt", "hypermod.pt")}/hypermod.pt')
    grads = {k: arrays.get(f'grad/{k}', np.zeros_like(v)) for k, v in state.items()}
    wanted = params_from_upstream(grads, module.config)
    for (path, theirs), mine in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(ours), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            np.asarray(mine) / count, theirs, atol=1e-4 * np.abs(theirs).max() + 1e-9, err_msg=name
        )


# ------------------------------------------------------------------------------ the hypernetwork


def apply(module, params, embeddings, **kwargs):
    return module.apply({'params': params}, embeddings, **kwargs)[0]


@pytest.mark.parametrize('size', SIZES)
def test_starts_as_one_lora_for_all_tasks(size):
    module = make(**SIZES[size])
    embeddings = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), embeddings))['params']
    lora = apply(module, params, embeddings)
    for _, i, o in module.config.dims:
        assert i >= o
    for pair in lora.pairs.values():
        assert pair.a.shape[:3] == (3, 5, 4) and np.abs(pair.a).max() > 0
        for x in (pair.a, pair.b):
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1, :1], x.shape))
        # L starts as the base model; M and S have one bias for A and B.
        assert bool(np.any(pair.b)) == (size != 'L')


@pytest.mark.parametrize('encoder', ['linear', 'discrete', 'softmax', 'vq'])
def test_every_task_has_its_lora(encoder):
    """Rows depend on their own embedding alone; dropout only with a key."""
    module = make(encoder=encoder, head_init='random')
    embeddings = 30 * np.random.default_rng(0).standard_normal((6, 24)).astype(np.float32)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), embeddings))['params']
    whole = apply(module, params, embeddings)
    alone = apply(module, params, embeddings[2:3])
    for name, pair in whole.pairs.items():
        np.testing.assert_allclose(pair.a[:, 2:3], alone.pairs[name].a, atol=1e-6)
        assert np.ptp(pair.a, axis=1).max() > 1e-4
    key = {'dropout': jax.random.key(1)}
    noisy = apply(module, params, embeddings, rngs=key)
    again = apply(module, params, embeddings, rngs=key)
    jax.tree.map(np.testing.assert_array_equal, noisy.pairs, again.pairs)
    assert np.abs(noisy.pairs['q_proj'].a - whole.pairs['q_proj'].a).max() > 1e-4


@pytest.mark.parametrize('size', SIZES)
def test_heads_of_each_layer(size):
    """Alike, they are the shared head; changed, they change their own layer."""
    embeddings = np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32)
    shared, own = (
        make(head_init='random', per_layer_heads=x, **SIZES[size]) for x in (False, True)
    )
    params = nn.unbox(jax.jit(shared.init)(jax.random.key(0), embeddings))['params']
    # What heads read passes a silu only where they are shared; far above 0 that changes nothing.
    params['mlp3_down']['bias'] += 40.0
    copies = {
        name: jax.tree.map(lambda x: np.stack([x] * 3), p) if name.startswith('head_') else p
        for name, p in params.items()
    }
    expected = jax.eval_shape(own.init, jax.random.key(0), embeddings)['params']
    assert jax.tree.map(np.shape, copies) == jax.tree.map(np.shape, nn.unbox(expected))
    made = apply(own, copies, embeddings).pairs
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3),
        made,
        apply(shared, params, embeddings).pairs,
    )
    copies['head_q_proj']['kernel'][1] += 1
    changed = apply(own, copies, embeddings).pairs
    np.testing.assert_array_equal(changed['down_proj'].a, made['down_proj'].a)
    moved = np.abs(changed['q_proj'].a - made['q_proj'].a).max((1, 2, 3))
    assert moved[1] > 1e-2 and not moved[[0, 2]].any()


def test_codes_follow_the_embeddings():
    module = make(encoder='vq', head_init='random')
    embeddings = np.random.default_rng(0).standard_normal((6, 24)).astype(np.float32)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), embeddings))['params']
    hyper = Hypernetwork(module, None, lambda _, c: (c['embedding'], None), {})

    def extra(params):
        return hyper.generate_with_losses(params, None, {'embedding': embeddings}, None)[2]

    before, grads = jax.value_and_grad(extra)(params)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert 0 < extra(stepped) < before
    assert np.abs(grads['task_encoder']['codebook']).max() > 0


def test_z_scores_and_offsets():
    embeddings = np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32)
    plain = make(head_init='random', z_score=True)
    params = nn.unbox(jax.jit(plain.init)(jax.random.key(0), embeddings))['params']
    lora = apply(plain, params, embeddings).pairs['q_proj']
    rng = np.random.default_rng(1)
    mean, deviation = (rng.random((3, 4, 32)).astype(np.float32) for _ in range(2))
    scaled = apply(
        plain, {**params, 'mean_a_q_proj': mean, 'deviation_a_q_proj': deviation}, embeddings
    ).pairs['q_proj']
    np.testing.assert_allclose(
        scaled.a, lora.a * deviation[:, None] + mean[:, None], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(scaled.b, lora.b)
    for learns in (False, True):
        module = make(offset=True, learn_offset=learns, head_init='zero')
        params = nn.unbox(jax.jit(module.init)(jax.random.key(0), embeddings))['params']
        params['offset_a_q_proj'] = mean
        np.testing.assert_array_equal(
            apply(module, params, embeddings).pairs['q_proj'].a,
            np.broadcast_to(mean[:, None], (3, 2, 4, 32)),
        )

        def loss(p, module=module):
            return apply(module, p, embeddings).pairs['q_proj'].a.sum()

        assert bool(np.any(jax.grad(loss)(params)['offset_a_q_proj'])) == learns


def test_unknown_task_encoder():
    with pytest.raises(UserError, match='unknown task encoder .guess.*linear'):
        jax.eval_shape(make(encoder='guess').init, jax.random.key(0), jnp.zeros((1, 24)))


# -------------------------------------------------------------------------------- training data


def task(name, inputs):
    examples = tuple(Example(text, (text.upper(),)) for text in inputs)
    return Task(name, '', '', (f'{name}, loud', f'shout {name}'), (), examples[1:], examples[:1])


TASKS = tuple(task(f'task {i}', [f'{chr(97 + i)}{"x" * n}' for n in range(1, 9)]) for i in range(5))
EVEN = (1,) * len(TASKS)
SETTINGS = ConfigDict(
    {
        'before': ' ',
        'row_tokens': 48,
        'row_labels': 24,
        'steps': 4,
        'description_noise': 0.0,
        'gibberish': 0.0,
    }
)


def groups(per_step=3, weights=EVEN, nonsense=None, **changes):
    embeddings = [np.arange(2, dtype=np.float32)[:, None] + 10 * i for i in range(len(TASKS))]
    config = SETTINGS.copy_and_resolve_references()
    config.update(changes)
    tokenizer = tiny_base().tokenizer
    return TaskGroups(TASKS, weights, embeddings, tokenizer, config, 0, per_step, nonsense)


def test_groups_are_packed_rows_of_one_task():
    source, tokenizer = groups(), tiny_base().tokenizer
    assert len(source) == 12
    seen = set()
    for index in range(len(source)):
        item, same = source[index], groups()[index]
        jax.tree.map(np.testing.assert_array_equal, item, same)
        number, variant = divmod(float(item['context']['embedding'][0, 0]), 10)
        assert variant in (0, 1)
        query = {key: value[0] for key, value in item['query'].items()}
        count = query['segments'].max()
        assert count > 1 and query['label_weights'].sum() == pytest.approx(count)
        texts = []
        for segment in range(1, count + 1):
            here = query['segments'] == segment
            np.testing.assert_array_equal(query['positions'][here], np.arange(here.sum()))
            own = here[query['label_positions']] & (query['label_weights'] > 0)
            labels = query['labels'][own]
            assert labels[-1] == tokenizer.eos_id
            answer = tokenizer.decode(labels[:-1])
            assert answer[0] == ' ' and answer[1:].isupper()
            prompt = tokenizer.prompt(answer[1:].lower())
            np.testing.assert_array_equal(
                query['tokens'][here], [*prompt, *tokenizer.encode(answer)]
            )
            # Each label stands where the token before it is read.
            first = query['label_positions'][own][0]
            assert query['tokens'][first] == prompt[-1]
            texts.append(answer[1:].lower())
        assert len(set(texts)) == count
        known = {e.input for e in TASKS[int(number)].train}
        assert set(texts) <= known  # never the test example
        seen.add((index // 3, number))
    assert len(seen) == len(source)  # the tasks of a step are different


def test_tasks_are_drawn_by_weight():
    source = groups(per_step=1, weights=(3, 1, 1, 1, 1e-9), steps=400)
    drawn = [int(source[i]['context']['task'][0]) for i in range(len(source))]
    counts = np.bincount(drawn, minlength=5) / len(drawn)
    np.testing.assert_allclose(counts, [1 / 2, 1 / 6, 1 / 6, 1 / 6, 0], atol=0.08)


def test_a_share_of_groups_describes_no_task():
    prompt, answer = [3, 4], [5, 6, 7]
    nonsense = np.full((2, 1), -1, np.float32), [(prompt, answer)]
    source = groups(nonsense=nonsense, gibberish=0.2, steps=200)
    described = [source[i]['context']['embedding'][0, 0] >= 0 for i in range(len(source))]
    assert np.mean(described) == pytest.approx(0.8, abs=0.05)
    query = source[described.index(False)]['query']
    labels = query['labels'][query['label_weights'] > 0]
    assert labels.tolist() == answer
    tokens = query['tokens'][query['segments'] > 0]
    assert tokens.tolist() == [*prompt, *answer[:-1]]


def test_gibberish_is_for_what_reads_descriptions():
    with pytest.raises(UserError, match='gibberish needs a hypernetwork that reads descriptions'):
        t2l_data.build(ConfigDict({'gibberish': 0.1}), tiny_base(), tiny_base(), 0, 1)


def test_odd_widths_cannot_be_rotated():
    odd = make(**SIZES['S'], encoder='discrete')
    with pytest.raises(UserError, match='the latent width is 69.*learned_positions'):
        jax.eval_shape(odd.init, jax.random.key(0), jnp.zeros((1, 24)))


def test_training(tmp_path, monkeypatch):
    """Tasks of a folder are trained on, each with its descriptions; the checkpoint names them."""
    words = 'red', 'blue', 'green'
    answers = {'backwards': [w[::-1] for w in words], 'large': [w.upper() for w in words]}
    texts = {
        'backwards': ['Write it backwards.', 'Reverse it.', 'Turn the word around.'],
        'large': ['Use capital letters.', 'Write it large.'],
    }
    for name, outputs in answers.items():
        pairs = [{'input': w, 'output': o} for w, o in zip(words, outputs, strict=True)]
        task = {'descriptions': texts[name], 'train': pairs[1:], 'test': pairs[:1]}
        task |= {'name': name, 'source': '', 'license': ''}
        (tmp_path / f'{name}.json').write_text(json.dumps(task))
    config = t2l_config(f'tiny,{tmp_path}')
    config.base, config.optimizer.steps = 'tiny', 2
    config.data.description_noise = 0.0
    config.data.sources = config.data.sources[:1]
    monkeypatch.setattr(meta_learning, 'load_base', lambda *_: tiny_base())
    meta_learning.train(config, str(tmp_path / 'run'))
    config = (found := trained.load(str(tmp_path / 'run'), tiny_base())).config
    assert list(config.data.tasks) == ['backwards', 'large']

    config.data.steps = 20
    encoder = found.hypernetwork.encoder
    source = t2l_data.build(config.data, tiny_base(), encoder, 0, 2)
    for group in map(source.__getitem__, range(len(source))):
        name = config.data.tasks[group['context']['task'][0]]
        embedding = group['context']['embedding'][0]
        assert any(np.allclose(row, embedding, atol=1e-5) for row in encoder(texts[name]))
        said = group['query']['labels'][group['query']['label_weights'] > 0]
        said = ''.join(map(chr, said)).split(chr(CharTokenizer.eos_id))
        assert {text.strip() for text in said if text} <= set(answers[name][1:])


def test_what_the_base_model_says_by_itself(smollm2):
    inputs = 'Hello!', 'carry', 'Say yes.'
    tasks = [dataclasses.replace(TASKS[0], train=(Example(text, ('',)),)) for text in inputs]
    config = SETTINGS.copy_and_resolve_references()
    pairs = t2l_data.unaided(smollm2, [*tasks, tasks[0]], config)
    assert [prompt for prompt, _ in pairs] == list(map(smollm2.tokenizer.prompt, inputs))
    ends = []
    for prompt, answer in pairs:
        tokens = np.asarray([[*prompt, *answer[:-1]]])
        apply = functools.partial(Decoder(smollm2.config).apply, {'params': smollm2.params})
        hidden = apply(tokens).hidden[0, len(prompt) - 1 :]
        assert answer == apply(hidden, method='unembed').argmax(-1).tolist()
        ends.append(answer[-1] == smollm2.tokenizer.eos_id)
        assert ends[-1] or len(answer) == 12
    assert any(ends) and not all(ends)
    config.row_tokens = 20
    with pytest.raises(UserError, match='no input leaves room for 12 tokens.*gibberish=0'):
        t2l_data.unaided(smollm2, tasks, config)


def test_described_by_a_region():
    rng = np.random.default_rng(0)
    embeddings = 3 * rng.standard_normal((5, 400)).astype(np.float32)
    plain = [draw_embedding(rng, embeddings, 0.0) for _ in range(40)]
    assert {tuple(x) for x in plain} == {tuple(x) for x in embeddings}
    for noise in (1e-6, 0.5):
        drawn = draw_embedding(rng, embeddings, noise)
        assert drawn.dtype == np.float32
        weights, *_ = np.linalg.lstsq(embeddings.T, drawn)
        # Near a point between two of them, away from it by noise in all directions.
        away = drawn - embeddings.T @ weights
        mixed = np.sqrt(np.mean((drawn - away) ** 2))
        np.testing.assert_allclose(np.sqrt(np.mean(away**2)) / mixed, noise, rtol=0.2, atol=1e-6)
        top = np.sort(weights)
        np.testing.assert_allclose(top[-2:].sum(), 1, atol=0.3 * noise + 1e-4)


def test_packed_rows_give_the_loss_of_separate_ones():
    base, tokenizer = tiny_base(), tiny_base().tokenizer
    module = make(
        dims=(('down_proj', 48, 32), ('q_proj', 32, 32)), num_layers=3, head_init='random'
    )
    embedding = np.ones((1, 24), np.float32)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), embedding))['params']
    hyper = Hypernetwork(module, None, lambda _, c: (c['embedding'], None), {})
    frozen = {'base': base.params, 'encoder': None}
    pairs = [
        (tokenizer.prompt(text), [*tokenizer.encode(text.upper()), tokenizer.eos_id])
        for text in ('ab', 'cde', 'f')
    ]

    def loss(query):
        batch = {'context': {'embedding': embedding}, 'query': query}
        total, sums = jax.jit(learner((hyper, Decoder(base.config)), 0.0).loss)(
            params, frozen, batch
        )
        return float(total), float(sums['loss'][1])

    packed = loss(pack(pairs, 40, 12))
    separate = [loss(pack([pair], 40, 12)) for pair in pairs]
    np.testing.assert_allclose(packed, np.sum(separate, 0), rtol=1e-5)
    assert packed[1] == 3


def test_bad_settings_of_the_data():
    with pytest.raises(UserError, match="task 'task 0' has no training example of at most 3"):
        groups(row_tokens=3)
    with pytest.raises(UserError, match='5 tasks to train on; a step has 6'):
        groups(per_step=6)


def test_noise_and_dropout_follow_the_key(original):
    _, parts, params, frozen, batch = original
    plain = learner(parts, 0.0)

    def loss(learner, seed=None):
        key = None if seed is None else jax.random.key(seed)
        return float(jax.jit(learner.loss)(params, frozen, batch, key)[0])

    dropped = [loss(plain, seed) for seed in (0, 0, 1)]
    assert dropped[0] == dropped[1] != dropped[2] != loss(plain)
    noisy = dataclasses.replace(plain, neftune=50.0)
    assert loss(noisy, 0) == loss(noisy, 0) != dropped[0]
    assert loss(noisy) == loss(plain)


def test_noise_is_as_large_as_neftune_says(original):
    _, parts, params, frozen, batch = original
    noises = []

    class Spy(Decoder):
        def __call__(self, *args, noise=None, **kwargs):
            noises.append(noise)
            return super().__call__(*args, noise=noise, **kwargs)

    plain = learner(parts, 0.0)
    noisy = dataclasses.replace(plain, neftune=5.0, decoder=Spy(plain.decoder.config))
    noisy.loss(params, frozen, batch, jax.random.key(0))
    noisy.loss(params, frozen, batch)
    (noise, none) = noises
    assert none is None
    _, tokens, width = noise.shape
    assert 0.98 < float(jnp.abs(noise).max()) * (tokens * width) ** 0.5 / 5 <= 1


# ------------------------------------------------------------------------------ plain LoRAs


def test_a_table_of_loras():
    base = tiny_base()
    config = ConfigDict(
        {
            'name': 'lora_table',
            'modules': ('q_proj', 'down_proj'),
            'shape': {'rank': 2, 'scaling': 2.0, 'entries': 3},
        }
    )
    built = hypernetwork.build(config, base)
    params = nn.unbox(jax.jit(built.init)(jax.random.key(0), base.params))
    numbers = np.asarray([1, 0, 1, 7], np.int32)

    def generate(params):
        return built.generate(params, base.params, {'task': numbers})[0]

    lora = generate(params)
    for name, i, _ in built.module.dims:
        pair = lora.pairs[name]
        assert not np.any(pair.b)  # starts as the base model
        assert 0.9 / i**0.5 < np.abs(pair.a).max() < 1 / i**0.5
        np.testing.assert_array_equal(pair.a, params[f'a_{name}'][:, [1, 0, 1, 2]])
    gradient = jax.grad(lambda p: generate(p).pairs['q_proj'].a[:, 0].sum())(params)
    touched = np.asarray(gradient['a_q_proj']).any((0, 2, 3))
    np.testing.assert_array_equal(touched, [False, True, False])


def test_a_table_of_codes():
    """Entries are sums, weighted by their codes, of LoRAs that all share, on top of one."""
    base = tiny_base()
    shape = {'rank': 2, 'scaling': 2.0, 'entries': 3, 'codes': 4}
    config = ConfigDict({'name': 'lora_table', 'modules': ('q_proj', 'down_proj'), 'shape': shape})
    built = hypernetwork.build(config, base)
    params = nn.unbox(jax.jit(built.init)(jax.random.key(0), base.params))
    context = {'task': np.asarray([2, 0], np.int32)}
    fresh, _ = built.generate(params, base.params, context)
    for pair in fresh.pairs.values():
        assert not np.any(pair.b) and np.any(pair.a)
        np.testing.assert_array_equal(pair.a[:, 0], pair.a[:, 1])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)
    made, _ = built.generate(params, base.params, context)
    entries = factors(params)
    assert entries.keys() == {'a_q_proj', 'b_q_proj', 'a_down_proj', 'b_down_proj'}
    for row, task in enumerate((2, 0)):
        wanted = params['b_down_proj'][:, 0] + sum(
            params['codes'][task, d] * params['head_b_down_proj'][:, d] for d in range(4)
        )
        np.testing.assert_allclose(made.pairs['down_proj'].b[:, row], wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(entries['b_down_proj'][:, task], wanted, rtol=1e-4, atol=1e-5)
