"""Kernels of accelerators, run by interpretation or compiled only, against the XLA path."""

import dataclasses
import functools
import os
import subprocess
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from test_aot import needs_libtpu  # noqa: F401

from hyperlora import aot, costs, lora, sharding, tpus
from hyperlora.models import kernels
from hyperlora.models.attention import causal_attention
from hyperlora.models.decoder import Decoder

RNG = np.random.default_rng(0)
Q, K, V, WEIGHT = (
    RNG.normal(size=(4, 300, heads, 16)).astype(np.float32) for heads in (4, 2, 2, 4)
)
SEGMENTS = np.sort(RNG.integers(0, 4, (4, 300)))
CASES = {
    'causal': {},
    'scaled, bounded': {'scale': 0.7, 'softcap': 1.5},
    'packed': {'segments': SEGMENTS},
    'local': {'window': 70, 'local': True},
    'all': {'segments': SEGMENTS, 'window': 150, 'local': True, 'scale': 0.7, 'softcap': 1.5},
    'not local': {'window': 70, 'local': False},
}


def interpreted():
    """Lets attention think that this is a TPU, with blocks so small that a row has several."""
    splash = functools.partial(kernels.splash, interpret=True)
    return mock.patch.multiple(kernels, _platform=lambda: 'tpu', splash=splash, _BLOCK=128)


def result_and_gradient(q, k, v, local=False, **settings):
    @jax.jit
    def run(q, k, v, local):
        def loss(q, k, v):
            y = causal_attention(q, k, v, local=local, **settings)
            return (WEIGHT.reshape(y.shape) * jnp.sin(y)).sum(), y

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (_, y), gradient = run(q, k, v, local)
    return y, *gradient


def assert_same(found, wanted, atol=2e-5):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.parametrize('case', CASES)
def test_splash_attention_is_attention(case):
    """Grouped queries, 300 tokens, which are padded; whether a layer is local is traced."""
    wanted = result_and_gradient(Q, K, V, **CASES[case])
    with interpreted():
        text = str(jax.make_jaxpr(lambda *x: causal_attention(*x, **CASES[case]))(Q, K, V))
        assert 'pallas_call' in text
        assert_same(result_and_gradient(Q, K, V, **CASES[case]), wanted)


@functools.cache
def decoder_and_lora():
    """Local and global layers, so that which one it is is traced in the scan."""
    config = dataclasses.replace(
        TINY, attention_window=50, local_layers=(True, False, True), attention_softcap=5.0
    )
    decoder = Decoder(config, remat='full')
    init = functools.partial(decoder.init, method='init_all')
    params = nn.unbox(jax.jit(init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    params['params']['embedder']['embedding'] *= 10
    dims = {'q_proj': (config.width, config.num_heads * config.head_dim)}
    adapter = lora.init(jax.random.key(1), dims, config.num_layers, rank=4)
    return decoder, params, jax.tree.map(lambda x: x + 0.1, adapter.pairs)


def adapted(tokens, segments):
    """Hidden states, and the gradient of a loss with respect to a LoRA."""
    decoder, params, pairs = decoder_and_lora()

    @jax.jit
    def run(params, pairs, tokens, segments):
        def loss(pairs):
            adapter = lora.Lora(pairs, jnp.float32(1))
            y = decoder.apply(params, tokens, segments=segments, lora=adapter).hidden
            return (y * jnp.cos(jnp.arange(y.shape[-1]))).sum(), y

        return jax.grad(loss, has_aux=True)(pairs)

    return run(params, pairs, tokens, segments)


TOKENS = RNG.integers(0, TINY.vocab_size, (4, 300))


def test_a_decoder_of_two_kinds_of_layers():
    wanted = adapted(TOKENS, SEGMENTS)
    with interpreted():
        assert_same(adapted(TOKENS, SEGMENTS), wanted, 1e-3)


def test_several_devices_compute_what_one_does():
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=4'
    process = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, 'XLA_FLAGS': flags},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    assert process.stdout.splitlines()[-1] == 'all meshes agree'


def compare_meshes():
    assert jax.device_count() == 4
    case = CASES['all']
    wanted = result_and_gradient(Q, K, V, **case), adapted(TOKENS, SEGMENTS)
    for shape in ((1, 2, 2, 1), (2, 1, 1, 2)):
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
        heads = jax.NamedSharding(mesh, jax.P(sharding.BATCH, None, 'tensor'))
        rows = sharding.batch_sharding(mesh)
        q, k, v = jax.device_put((Q, K, V), heads)
        segments = jax.device_put(SEGMENTS, rows)
        with jax.set_mesh(mesh), sharding.rules(), interpreted():
            ours = result_and_gradient(q, k, v, **{**case, 'segments': segments})
            for x in ours[1:]:
                assert x.sharding.is_equivalent_to(heads, 4)
            assert_same(ours, wanted[0])
    with jax.set_mesh(mesh), sharding.rules(), interpreted():
        assert_same(adapted(jax.device_put(TOKENS, rows), segments), wanted[1], 1e-3)
    print('all meshes agree')


def uses_a_kernel(*args, **settings):
    return 'pallas_call' in str(jax.make_jaxpr(lambda: causal_attention(*args, **settings))())


def test_what_no_kernel_can_do_is_left_to_xla():
    groups = np.ones((4, 300), np.int32)
    assert not uses_a_kernel(Q, K, V)
    with interpreted():
        assert uses_a_kernel(Q, K, V)
        assert not uses_a_kernel(Q, K, V, groups=groups)
        for shape, kernel in ((1, 1, 4, 1), True), ((1, 2, 4, 1), False), ((1, 1, 1, 4), False):
            mesh = jax.sharding.AbstractMesh(shape, sharding.AXES)  # of 4 rows, 2 kv heads
            with jax.sharding.use_abstract_mesh(mesh):
                assert uses_a_kernel(Q, K, V) == kernel


@pytest.mark.parametrize('case', CASES)
def test_what_cudnn_is_asked_for(case, monkeypatch):
    """The same of XLA's implementation of the same function: there is no GPU here."""
    settings = CASES[case]
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (Q, K, V)]
    wanted = causal_attention(*arrays, **settings)
    asked = []

    def attend(*args, implementation, **kwargs):
        asked.append(implementation)
        return function(*args, **kwargs)

    function = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, 'dot_product_attention', attend)
    monkeypatch.setattr(kernels, '_platform', lambda: 'gpu')
    found = causal_attention(*arrays, **settings)
    able = not {'softcap', 'segments'} & settings.keys()
    assert asked == ['cudnn'] * able
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), atol=0.03)
    causal_attention(Q, K, V)
    assert len(asked) == able  # not in f32


def test_kernels_compile_for_tpus(needs_libtpu):  # noqa: F811
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2}, tpus.topology('v5e:2x2').devices)
    place = jax.NamedSharding(mesh, jax.P('fsdp', None, 'tensor'))
    rows = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
    local = jax.ShapeDtypeStruct((), bool, sharding=jax.NamedSharding(mesh, jax.P()))
    q, k = (
        jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16, sharding=place) for heads in (4, 2)
    )

    def gradient(q, k, v, segments, local):
        def loss(*x):
            y = causal_attention(*x, segments, window=100, local=local, softcap=50.0)
            return y.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    args = q, k, k, rows, local
    with jax.set_mesh(mesh):
        lowered = jax.jit(gradient).lower(*args)
        # Kernels count like the products that they stand for.
        flops = aot._flops(gradient, dict(zip('qkvsl', args, strict=True)))
    assert flops == costs.matmul_flops(gradient, *args) > 0
    assert {x.dtype for x in lowered.out_info} == {jnp.dtype('bfloat16')}
    text = lowered.compile().as_text()
    # Forwards and backwards in local layers and in others.
    assert text.count('custom_call_target="tpu_custom_call"') == 4
    assert 'all-gather' not in text


if __name__ == '__main__':
    compare_meshes()
