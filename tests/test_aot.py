"""Compiling ahead of time for TPUs: memory, operations, collectives, refusals."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, tiny_training
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from test_commands import assert_mistake, execute

from configs import d2l_docs, d2l_images, d2l_niah, t2l
from d2l import niah
from hyperlora import aot, costs, data, meta_learning, sharding, tpus
from hyperlora.errors import UserError
from hyperlora.models import families, published
from hyperlora.models.base import abstract_base, load_base

PUBLISHED = [
    *((d2l_docs, f'{name},RECORDS') for name in ('gemma2_2b', 'mistral_7b', 'qwen3_4b')),
    (d2l_images, 'gemma,RECORDS'),
    *((d2l_niah, variant) for variant in ('gemma2_2b', 'mistral_7b', 'qwen3_4b')),
    *((t2l, variant) for variant in ('gemma2_2b', 'mistral_7b', 'llama3_8b')),
]


@pytest.fixture
def needs_libtpu():
    """Also turns off the compilation cache, which cannot read programs for other devices."""
    pytest.importorskip('libtpu')
    caching = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # else it goes on as before
    yield
    jax.config.update('jax_enable_compilation_cache', caching)
    compilation_cache.reset_cache()


@pytest.fixture
def tiny_model(monkeypatch):
    """Makes the tiny base model a published one, so that it needs no files."""
    config = {**families.to_hf(TINY), 'vocab_size': 512}
    monkeypatch.setitem(published.MODELS, 'tiny', published.Published('none', config))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command on the tiny training."""

    def run(*arguments, config='configs/d2l_niah.py:tiny'):
        monkeypatch.setattr(
            sys, 'argv', ['aot', f'--config={config}', '--config.base=tiny', *arguments]
        )
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            execute('aot')
        return stop.value.code or 0, *capsys.readouterr()

    return run


def mesh_of(config):
    sizes = tuple(config.mesh[axis] for axis in sharding.AXES)
    return AbstractMesh(sizes, sharding.AXES)


# ------------------------------------------------------------------------------------- costs


def test_matrix_products_in_loops_count_in_full():
    x, w = jnp.zeros((4, 8)), jnp.zeros((5, 8, 8))

    def function(x, w):
        x = jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w[0], x)

    assert costs.matmul_flops(function, x, w, trips=3) == (5 + 3) * 2 * 4 * 8 * 8


def chain(mesh, rows, width):
    """Ten products with matrices divided along fsdp: abstract arguments and their gradient."""

    def shape(*sizes, spec):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)

    def loss(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    weights = shape(10, width, width, spec=(None, 'fsdp'))
    gradient = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    return gradient.lower(weights, shape(rows, width, spec=(sharding.BATCH,))).compile().as_text()


def test_collectives_of_a_compiled_loop(needs_libtpu):
    devices = tpus.topology('v5e:2x2').devices
    mesh = sharding.make_mesh({'fsdp': 4}, devices)
    found = costs.traffic(chain(mesh, 4096, 1024)).collectives
    sent = 1024 * 1024 * 2 * 3 / 4
    assert found['all-gather'] == (20, 20 * sent)  # forwards and backwards
    assert found['reduce-scatter'] == (10, 10 * sent)


def test_collectives_between_slices(needs_libtpu):
    devices = tpus.topology('2*v5e:2x2').devices
    mesh = sharding.make_mesh({'slice': 2, 'fsdp': -1}, devices[::-1])
    assert [device.slice_index for device in mesh.devices.flat] == [0] * 4 + [1] * 4
    program = chain(mesh, 4096, 1024)
    found = costs.traffic(program, slices=2)
    assert found.collectives['reduce-scatter'] == (10, 10 * 1024 * 1024 * 2 * 3 / 4)
    assert found.collectives['all-gather'][0] == 20
    # Of the ten gradients each chip has a quarter; two that add theirs send each once.
    assert list(found.dcn_collectives) == ['all-reduce']
    assert found.dcn_bytes == 10 * 1024 * 1024 * 2 / 4
    assert costs.traffic(program, slices=4).dcn_bytes == found.dcn_bytes * 3 / 2
    with pytest.raises(UserError, match='in 2 slices; set config.mesh.slice to 2'):
        sharding.make_mesh({'fsdp': -1}, devices)


def test_memory_traffic_of_a_compiled_loop(needs_libtpu):
    devices = tpus.topology('v5e:1x1').devices
    mesh = sharding.make_mesh({}, devices)
    found = costs.traffic(chain(mesh, 16384, 8192))
    assert not found.collectives
    matrix, activations = 8192 * 8192 * 2, 16384 * 8192 * 2
    # Three products a layer, forwards and for both factors' gradients: each reads two arrays and
    # writes one. The input, tanh and its slope are kept for the way back: written and read.
    least = 10 * (3 * matrix + (3 * 2 + 3 * 2) * activations)
    assert least < found.hbm_bytes < 2 * least


# ---------------------------------------------------------------------------------- sharding


def leaf(mesh, *sizes, spec=()):
    place = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=place)


def test_what_is_replicated_by_accident_is_refused():
    mesh = AbstractMesh((2, 2, 4, 2), sharding.AXES)
    divided = leaf(mesh, 2**13, 2**13, spec=('fsdp', 'tensor'))
    half = leaf(mesh, 2**10, 2**13, spec=('fsdp',))
    whole = leaf(mesh, 2**10, 2**13)
    found = sharding.replicated_bytes({'divided': divided, 'half': half, 'whole': whole})
    assert found == {'divided': 0, 'half': 2**25 / 2, 'whole': 2**25 * 7 / 8}
    sharding.check_divided({'divided': divided, 'norm': leaf(mesh, 2**13)})
    sharding.check_divided({'norm': leaf(mesh, 2**13)})  # small: no matter
    with pytest.raises(UserError, match=r'10% of 288 MiB .* most of all whole;'):
        sharding.check_divided({'divided': divided, 'whole': whole})


@pytest.mark.parametrize('module, variant', PUBLISHED)
def test_published_configs_divide_over_the_tpus_they_name(module, variant):
    config = module.get_config(variant)
    mesh = mesh_of(config)
    target = config.topology.split(':')[1]
    assert mesh.size == math.prod(map(int, target.split('x')))
    base = abstract_base(config.base, config.base_dtype, mesh)
    plan = meta_learning.make_plan(config, base, mesh)  # checks that all is divided
    held = [base.params, plan.state]
    fraction = sum(sharding.replicated_bytes(held).values()) / sum(
        map(sharding.nbytes, jax.tree.leaves(held))
    )
    assert fraction < 0.02
    with pytest.raises(UserError, match='replicated although the mesh could'):
        with sharding.rules({'embed': None, 'mlp': None, 'heads': None}):
            meta_learning.make_plan(
                config, abstract_base(config.base, config.base_dtype, mesh), mesh
            )


def test_rules_of_a_config():
    mesh = AbstractMesh((1, 1, 2, 2), sharding.AXES)

    def place(base):
        return base.params['layers']['mlp']['up_proj']['kernel'].sharding.spec

    assert place(abstract_base('gemma2_2b', 'bfloat16', mesh)) == jax.P(None, 'fsdp', 'tensor')
    with sharding.rules({'embed': ('fsdp', 'tensor'), 'mlp': None}):
        spec = place(abstract_base('gemma2_2b', 'bfloat16', mesh))
        assert spec == jax.P(None, ('fsdp', 'tensor'), None)
    for wrong in ({'embd': 'fsdp'}, {'embed': 'model'}):
        with pytest.raises(UserError, match=f'config.rules.{next(iter(wrong))}'):
            sharding.rules(wrong)


def test_an_axis_that_cannot_be_divided_is_named():
    mesh = AbstractMesh((1, 1, 5, 1), sharding.AXES)
    with pytest.raises(
        UserError, match=r'embedding \(256000, 2304\) cannot be divided by fsdp = 5'
    ):
        abstract_base('gemma2_2b', 'bfloat16', mesh)


# ----------------------------------------------------------------------- models without weights


@pytest.mark.parametrize(
    'name, billions',
    [('gemma2_2b', 2.614), ('mistral_7b', 7.242), ('qwen3_4b', 4.022), ('llama3_8b', 8.030)],
)
def test_published_models_have_their_size(name, billions):
    base = abstract_base(name, 'bfloat16', AbstractMesh((1, 1, 1, 1), sharding.AXES))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(base.params))
    assert base.abstract and count / 1e9 == pytest.approx(billions, abs=1e-3)
    with pytest.raises(UserError, match=f'download {published.MODELS[name].repository}'):
        load_base(name)


def test_abstract_parameters_are_those_of_the_loaded_model(smollm2):
    mesh = AbstractMesh((1, 1, 1, 1), sharding.AXES)
    base = abstract_base('smollm2', 'float32', mesh)
    assert base.config == smollm2.config and not smollm2.abstract

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert shapes(base.params) == shapes(smollm2.params)


def test_quantized_abstract_parameters():
    mesh = AbstractMesh((1, 1, 2, 1), sharding.AXES)
    base = abstract_base('gemma2_2b', 'bfloat16', mesh, 'int4')
    kernel = base.params['layers']['mlp']['up_proj']['kernel']
    assert kernel.qvalue.dtype == jnp.int4 and kernel.qvalue.shape == (26, 2304, 9216)
    assert kernel.scale.shape == (26, 72, 9216) and kernel.scale.dtype == jnp.bfloat16
    assert kernel.qvalue.sharding.spec == jax.P(None, 'fsdp', 'tensor')


def test_abstract_batches_are_the_largest_ones(tiny):
    config = tiny_training()
    found = data.abstract(config.data, tiny, tiny, groups=2, accumulate=3)
    real = data.build(config.data, tiny, tiny, 0, 2, 3)
    sizes = []
    for i in range(len(real)):
        batch = real[i]
        assert jax.tree.structure(batch) == jax.tree.structure(found)
        sizes.append(sum(x.size for x in jax.tree.leaves(batch)))
        if jax.tree.map(lambda x: x.shape, batch) == jax.tree.map(lambda x: x.shape, found):
            assert jax.tree.map(lambda x: x.dtype, batch) == jax.tree.map(
                lambda x: np.dtype(x.dtype), found
            )
    assert max(sizes) == sum(x.size for x in jax.tree.leaves(found))


def test_the_stand_in_counts_about_as_a_tokenizer_does(smollm2):
    ours = published.WordTokenizer()
    for text in (niah.QUESTION, niah.NEEDLE.format(1234)):
        assert len(ours.encode(text)) == pytest.approx(len(smollm2.tokenizer.encode(text)), abs=2)


# -------------------------------------------------------------------------------- the command


def check(step, chips):
    """What holds of every report."""
    parts = step['bytes_per_device']
    assert parts['total'] == (
        parts['arguments']
        + parts['outputs']
        - parts['aliased']
        + parts['temporaries']
        + parts['program']
    )
    kinds = ('parameters', 'optimizer', 'frozen', 'loras', 'batch', 'padding')
    assert parts['arguments'] == sum(parts.get(kind, 0) for kind in kinds)
    assert 0 <= parts['padding'] < 2 * parts['arguments'] / 3
    assert step['fits'] and parts['total'] < parts['hbm']
    assert step['tokens']['total'] == sum(
        n for kind, n in step['tokens'].items() if kind != 'total'
    )
    seconds = step['seconds']
    times = [seconds[kind] for kind in ('compute', 'memory', 'interconnect', 'network')]
    assert seconds['step'] == max(times) == seconds[step['bound']]
    assert seconds['step_without_overlap'] == pytest.approx(sum(times))
    assert 0 < step['mfu_without_overlap'] < step['mfu'] <= 1
    peak = chips * tpus.CHIPS['v5e'].flops
    assert seconds['compute'] == pytest.approx(step['flops'] / peak)
    assert set(step['collectives']) <= set(costs.COLLECTIVES)
    assert step['collectives']['all-gather']['bytes'] > 0
    assert step['hbm_bytes'] > 0 and step['compile_seconds'] > 0


def test_a_training_step_compiles_for_tpus(needs_libtpu, tiny_model):
    config = d2l_niah.get_config('tiny')
    config.base, config.remat = 'tiny', 'full'
    found = aot.report(config, 'v5e:2x2', ['train'])
    step = found['steps']['train']
    check(step, 4)
    assert found['chips'] == 4 and found['mesh'] == {'slice': 1, 'data': 1, 'fsdp': 4, 'tensor': 1}
    parts = step['bytes_per_device']
    # AdamW keeps two moments of each parameter.
    assert parts['optimizer'] == pytest.approx(2 * parts['parameters'], rel=1e-3)
    assert found['parameters'] * 4 / 4 <= parts['parameters'] < found['parameters'] * 4
    assert parts['aliased'] > 0.9 * (parts['parameters'] + parts['optimizer'])  # donated
    assert step['useful_flops'] < step['flops']  # rematerialisation
    assert step['tokens']['context'] == 4 * 5 * 64  # two documents in two parts, and the pool
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_only_gradients_cross_from_slice_to_slice(needs_libtpu, tiny_model):
    config = d2l_niah.get_config('tiny')
    config.base, config.mesh.slice = 'tiny', 2
    config.hypernetwork.shape.latent_size = 256  # what travels is padded to 1024 numbers
    found = aot.report(config, '2*v5e:2x2', ['train'])
    step = found['steps']['train']
    check(step, 8)
    gradients = 4 * found['parameters'] / 4  # bytes of f32 in a quarter of a slice
    sent = sum(kind['bytes'] for kind in step['dcn_collectives'].values())
    assert 0.9 * gradients < sent < 1.2 * gradients
    assert step['seconds']['network'] == pytest.approx(sent / found['dcn_bandwidth'])


def test_one_that_does_not_fit_exits_with_1(needs_libtpu, tiny_model, command, monkeypatch):
    small = tpus.Chip(**{**vars(tpus.CHIPS['v5e']), 'hbm': 2**10})
    monkeypatch.setitem(tpus.CHIPS, 'v5e', small)
    code, out, _ = command('--step=internalize')  # for the topology of the config
    [step] = json.loads(out)['steps'].values()
    assert code == 1 and not step['fits'] and 'memory' in step['reason']


def test_mistakes(needs_libtpu, tiny_model, command):
    for name in ('v9:2x2', 'v5e', 'v5e:3x3', 'v5e:2x2x2', 'v5p:0x1x1', '0*v5e:2x2'):
        assert_mistake(command(f'--topology={name}'), name, 'known', 'v5p', 'v5e:8x8')
    assert_mistake(command('--topology=2*v4:2x2x1'), 'slices of v4', 'not published')
    assert_mistake(command('--config.mesh.fsdp=3'), '3 places for 4 devices', 'config.mesh')
    assert_mistake(command('--config.base=gemma9'), 'unknown base model')
    assert_mistake(command('--config.base_dtype=flaot32'), 'unknown dtype', 'flaot32', 'bfloat16')
    assert_mistake(command('--config.groups=0'), 'config.groups must be at least 1')


def test_an_experiment_without_a_topology(tiny_model):
    config = d2l_niah.get_config('tiny')
    del config.topology
    with pytest.raises(UserError, match='names no topology: give --topology'):
        aot.report(config, None)


@pytest.mark.slow
@pytest.mark.parametrize('module, variant', PUBLISHED)
def test_published_configs_fit(needs_libtpu, module, variant):
    config = module.get_config(variant)
    for step in aot.report(config, config.topology)['steps'].values():
        assert step['fits'], step['reason']
