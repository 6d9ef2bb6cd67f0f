"""The quantized base model against the one it was made from."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from conftest import GOLDEN, TINY, read_golden, tiny_base, tiny_training
from flax.traverse_util import flatten_dict, unflatten_dict

from d2l import haystacks
from d2l.internalize import Answerer, Internalizer, Question
from d2l.niah import NEEDLE, QUESTION, Writer, random_numbers
from hyperlora import lora, meta_learning, sharding, trained
from hyperlora.errors import UserError
from hyperlora.models import base as base_models
from hyperlora.models import families, quantization, weights
from hyperlora.models.decoder import Decoder, first_layers
from hyperlora.models.quantization import quantize

SMALL = dataclasses.replace(TINY, width=64, mlp_width=96, head_dim=16)


def quantized(params, kind):
    flat = flatten_dict(params, sep='/')
    return unflatten_dict({k: quantize(k, x, kind) for k, x in flat.items()}, sep='/')


def dequantized(params):
    def is_quantized(x):
        return isinstance(x, qwix.QArray)

    return jax.tree.map(
        lambda x: qwix.dequantize(x) if is_quantized(x) else x, params, is_leaf=is_quantized
    )


@functools.cache
def random_params(config):
    init = functools.partial(Decoder(config).init, method='init_all')
    params = nn.unbox(jax.jit(init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))['params']
    params['embedder']['embedding'] *= 10
    return params


def logits(config, params, tokens):
    decoder = Decoder(config)

    @jax.jit
    def run(params):
        hidden = decoder.apply({'params': params}, tokens).hidden
        return decoder.apply({'params': params}, hidden, method='unembed')

    return np.asarray(run(params))


def tokens_of(config, *shape):
    return np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)


# --------------------------------------------------------------------------------- one array


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    'path, kind, levels, block',
    [
        ('layers/mlp/up_proj/kernel', 'int8', 255, (1, 64, 1)),
        ('layers/mlp/up_proj/kernel', 'int4', 15, (1, 32, 1)),
        ('embedder/embedding', 'int4', 255, (1, 48)),
    ],
)
def test_the_error_is_half_a_step_of_the_channel(path, kind, levels, block, dtype):
    """Channels of very different size: each has its own step, its range over the levels."""
    shape = (2, 64, 48) if path.endswith('kernel') else (20, 48)
    rng = np.random.default_rng(0)
    sizes = [n if b == 1 else n // b for n, b in zip(shape, block, strict=True)]
    spread = np.kron(10.0 ** rng.uniform(-4, 4, sizes), np.ones(block))
    array = jnp.asarray(rng.standard_normal(shape) * spread, dtype)
    back = qwix.dequantize(quantize(path, array, kind))
    assert back.dtype == array.dtype
    exact = np.asarray(array, np.float64)
    tiles = np.abs(exact).reshape([n for s, b in zip(sizes, block, strict=True) for n in (s, b)])
    largest = tiles.max(axis=tuple(range(1, tiles.ndim, 2)))
    half_step = np.kron(largest / levels, np.ones(block))
    # In bfloat16 the scale and the product are rounded too.
    slack = np.abs(exact) * (2**-7 if dtype == 'bfloat16' else 1e-6)
    error = np.abs(np.asarray(back, np.float64) - exact)
    assert (error <= half_step * (1 + 1e-4) + slack).all()
    assert (error > half_step / 2).any()


def test_norms_biases_and_eyes_are_kept():
    for path in (
        'layers/attention_norm/scale',
        'layers/attention/q_proj/bias',
        'vision_tower/position_embedding',
    ):
        array = jnp.ones((2, 8))
        assert quantize(path, array, 'int8') is array


def test_int4_needs_whole_blocks():
    with pytest.raises(UserError, match='multiples of 32, not 48.*down_proj'):
        quantize('layers/mlp/down_proj/kernel', jnp.ones((2, 48, 32)), 'int4')


# ------------------------------------------------------------------------------- whole models


def family(name):
    """Config and parameters of a small random model."""
    if name == 'small':
        return SMALL, random_params(SMALL)
    _, arrays = read_golden(f'hf_{name}')
    config = families.from_hf(json.loads((GOLDEN / f'hf_{name}/config.json').read_text()))
    state = {k.removeprefix('state/'): v for k, v in arrays.items() if k.startswith('state/')}
    return config, weights.from_hf_state(state, config, np.float32)


@pytest.mark.parametrize(
    'name, kind, bound',
    [
        ('gemma2', 'int8', 0.1),
        ('qwen3', 'int8', 0.1),
        ('mistral', 'int8', 0.1),  # its unembedding is a parameter of its own
        ('small', 'int4', 0.6),
    ],
)
def test_logits(name, kind, bound):
    config, params = family(name)
    tokens = tokens_of(config, 2, 40)
    wanted = logits(config, params, tokens)
    small = quantized(params, kind)
    ours = logits(config, small, tokens)
    error = np.abs(ours - wanted).max() / np.abs(wanted).max()
    print(name, kind, error)
    assert 1e-4 < error < bound
    # Both ways to run the layers compute with the dequantized weights, and nothing else.
    exact = logits(config, dequantized(small), tokens)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    hidden = jax.jit(lambda p: Decoder(config).apply({'params': p}, tokens).hidden)(small)
    first = jax.jit(lambda p: first_layers(config, p, tokens, config.num_layers)[0])(small)
    np.testing.assert_allclose(first, hidden, rtol=0, atol=1e-5 * np.abs(hidden).max())


def lora_gradient(config, params, remat='none'):
    """d loss / d LoRA, jitted, and its argument."""
    tokens = tokens_of(config, 2, 24)
    dims = {name: (i, o) for name, i, o in lora.module_dims(config, lora.MODULES)}
    start = lora.init(jax.random.key(1), dims, config.num_layers, 4)
    noise = np.random.default_rng(1)
    start = jax.tree.map(
        lambda x: x + 0.1 * noise.standard_normal(x.shape, np.float32), start.pairs
    )
    decoder = Decoder(config, remat=remat)

    def loss(pairs):
        hidden = decoder.apply(
            {'params': params}, tokens[:, :-1], lora=lora.Lora(pairs, jnp.float32(1))
        ).hidden
        out = decoder.apply({'params': params}, hidden, method='unembed')
        return -jnp.take_along_axis(jax.nn.log_softmax(out), tokens[:, 1:, None], -1).mean()

    return jax.jit(jax.grad(loss)), start


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize('kind, bound', [('int8', 0.05), ('int4', 0.5)])
def test_the_gradient_of_a_lora(kind, bound):
    params = random_params(SMALL)
    small = quantized(params, kind)
    gradients = []
    for base in (params, small, dequantized(small)):
        gradient, start = lora_gradient(SMALL, base)
        gradients.append(flat(gradient(start)))
    wanted, ours, exact = gradients
    error = np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)
    print(kind, error)
    assert 1e-4 < error < bound
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_kernels_in_bfloat16():
    """Products round their operands to it; everything else, and the gradient, is in f32."""
    params = random_params(SMALL)
    small = quantized(params, 'bfloat16')
    narrow = {k for k, x in flatten_dict(small, sep='/').items() if x.dtype == jnp.bfloat16}
    assert len(narrow) == 7 and all(path.endswith('kernel') for path in narrow)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), small)
    tokens = tokens_of(SMALL, 2, 40)

    def gradient_of(params):
        gradient, start = lora_gradient(SMALL, params)
        return flat(gradient(start))

    for compute in (lambda params: logits(SMALL, params, tokens), gradient_of):
        wanted, ours, exact = (compute(base) for base in (params, small, rounded))
        assert ours.dtype == np.float32
        for other in (wanted, exact):  # inputs are rounded too, so neither is met exactly
            error = np.linalg.norm(ours - other) / np.linalg.norm(other)
            assert 1e-4 < error < 0.02, error


def test_products_in_bfloat16_sum_in_f32():
    rng = np.random.default_rng(0)
    x, w, slope = (rng.standard_normal(s, np.float32) for s in ((8, 300), (300, 5), (8, 5)))
    w = jnp.asarray(w, jnp.bfloat16)
    ours, back = jax.vjp(lambda x: quantization.product(jnp.matmul, x, w), x)

    def exact(a, b):
        return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) @ np.asarray(b, np.float64)

    for found, wanted in ((ours, exact(x, w)), (back(slope)[0], exact(slope, w.T))):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_backward_pass_keeps_no_dequantized_weights():
    config = dataclasses.replace(SMALL, num_layers=24)
    params = random_params(config)
    temporary = []
    for base in (params, quantized(params, 'int8')):
        gradient, start = lora_gradient(config, base)
        memory = gradient.lower(start).compile().memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
    kernels = sum(x.nbytes for x in jax.tree.leaves(params['layers']))
    assert temporary[1] - temporary[0] < kernels / 3


# ---------------------------------------------------------------------------------- loading


def test_one_parameter_at_a_time_is_not_quantized_yet(tmp_path):
    weights.save_hf(tmp_path, random_params(SMALL), SMALL, families.to_hf(SMALL))
    seen = []

    def keep(path, array):
        assert not any(ref() is not None for ref in seen), 'an earlier parameter is still there'
        kept = quantize(path, array, 'int8')
        if kept is not array:
            seen.append(weakref.ref(array))
        return kept

    weights.from_safetensors(tmp_path, SMALL, jnp.float32, keep=keep)
    assert len(seen) == 8  # seven kinds of kernels, and the embeddings


def test_the_fingerprint_is_that_of_the_unquantized_model(smollm2):
    small = base_models.load_base('smollm2', quantization='int8')
    assert small.fingerprint == smollm2.fingerprint
    bytes_of = [sum(x.nbytes for x in jax.tree.leaves(m.params)) for m in (small, smollm2)]
    assert bytes_of[0] < 0.26 * bytes_of[1]


def test_an_unknown_quantization_is_refused():
    with pytest.raises(UserError, match="unknown .* 'int3'; known: none, bfloat16, int8, int4"):
        base_models.load_base('smollm2', quantization='int3')


@pytest.mark.parametrize('kind', ['bfloat16', 'int8'])
def test_merging_and_saving_are_refused(kind):
    small = quantized(random_params(SMALL), kind)
    dims = {'q_proj': (SMALL.width, SMALL.num_heads * SMALL.head_dim)}
    with pytest.raises(UserError, match='without quantization'):
        lora.merge(small, lora.init(jax.random.key(0), dims, SMALL.num_layers, 2))
    with pytest.raises(UserError, match='without quantization'):
        next(weights.to_hf(small, SMALL))


def test_several_devices_compute_what_one_does(tmp_path):
    weights.save_hf(tmp_path, random_params(SMALL), SMALL, families.to_hf(SMALL))
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=4'
    process = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, 'XLA_FLAGS': flags},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    assert process.stdout.splitlines()[-1] == 'all meshes agree'


def compare_meshes(folder):
    assert jax.device_count() == 4
    tokens = tokens_of(SMALL, 4, 20)
    for kind in ('bfloat16', 'int8', 'int4'):
        load = functools.partial(
            weights.from_safetensors,
            folder,
            SMALL,
            jnp.float32,
            keep=functools.partial(quantize, kind=kind),
        )
        one = load()
        wanted = logits(SMALL, one, tokens)
        for shape in ((1, 1, 4, 1), (1, 1, 2, 2), (1, 1, 1, 4)):
            mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
            places = base_models.shardings(SMALL, mesh)
            params = load(shardings=places)
            jax.tree.map(np.testing.assert_array_equal, params, one)
            for path, place in flatten_dict(places, sep='/').items():
                found = flatten_dict(params, sep='/')[path]
                if not isinstance(found, qwix.QArray):
                    continue
                assert found.qvalue.sharding.is_equivalent_to(place, found.ndim), path
                # Scales are divided as the values are, but along what they are shared by.
                part = found.scale.addressable_shards[0].data.shape
                whole = place.shard_shape(found.shape)
                for axis in range(found.ndim):
                    if found.scale.shape[axis] == found.shape[axis]:
                        assert part[axis] == whole[axis], (path, part, whole)
            if kind == 'int4' and shape == (1, 1, 2, 2):  # two blocks, two devices each way
                scale = params['layers']['attention']['q_proj']['kernel'].scale
                assert scale.addressable_shards[0].data.shape == (3, 1, 32)
            with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
                ours = logits(SMALL, params, tokens)
            # Sums in another order may be rounded the other way before the next product.
            tolerance = 1e-2 if kind == 'bfloat16' else 1e-5
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    print('all meshes agree')


# ----------------------------------------------------------------------------------- use


def test_training_on_a_quantized_base(tmp_path, monkeypatch):
    asked = []

    def load_base(name, dtype, mesh=None, quantization='none'):
        asked.append(quantization)
        base = tiny_base()
        if quantization == 'none':
            return base
        return dataclasses.replace(base, params=quantized(base.params, quantization))

    monkeypatch.setattr(meta_learning, 'load_base', load_base)
    monkeypatch.setattr(trained, 'load_base', load_base)
    config = tiny_training()
    config.base_quantization = 'int8'
    config.optimizer.steps = 2
    meta_learning.train(config, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert all(line['loss'] > 0 and line['grad_norm'] > 0 for line in lines)
    # The checkpoint takes the same base again, unless told otherwise.
    assert isinstance(trained.load(str(tmp_path)).base.params['embedder']['embedding'], qwix.QArray)
    trained.load(str(tmp_path), quantization='none')
    assert asked == ['int8', 'int8', 'none']


@pytest.mark.slow
def test_the_shipped_weights_find_the_needle_with_a_quantized_base():
    model = trained.load('smollm2-niah', quantization='int8')
    tokenizer = model.base.tokenizer
    rng = np.random.default_rng(5)
    numbers = random_numbers(rng, 4)
    writer, question = Writer(tokenizer), tokenizer.prompt(QUESTION)
    questions = [
        Question(writer.write(rng, haystacks.grass, 300, NEEDLE.format(n)).tokens, question)
        for n in numbers
    ]
    answers = Answerer(Internalizer(model))(questions, 16)
    assert [answer.strip() for answer in answers] == numbers


if __name__ == '__main__':
    compare_meshes(sys.argv[1])
