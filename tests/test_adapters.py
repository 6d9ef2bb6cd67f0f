"""Adapters on disk: our own and PEFT's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from safetensors.numpy import load_file, save_file
from test_lora import DIMS, dense, random_lora

from hyperlora import adapters
from hyperlora import lora as lora_lib
from hyperlora.errors import UserError

MARK = {'base_fingerprint': 'abc'}
NAMES = {'down_proj': 'mlp.down_proj', 'q_proj': 'self_attn.q_proj'}


def test_files_give_back_the_lora(tmp_path):
    lora = random_lora(0, rank=3, scaling=45.25)
    adapters.save(lora, tmp_path, 'some/base', MARK)
    for fingerprint in ('abc', None):
        loaded = adapters.load(tmp_path, fingerprint=fingerprint)
        assert loaded.rank == 3 and float(loaded.scaling) == 1
        for name, delta in dense(lora).items():
            np.testing.assert_allclose(dense(loaded)[name], delta, rtol=1e-5, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {
        'adapter_config.json',
        'adapter_model.safetensors',
    }
    with pytest.raises(ValueError, match='one row'):
        adapters.save(random_lora(0, rows=2), tmp_path, 'some/base')


def test_files_are_those_of_peft(tmp_path):
    lora = random_lora(0, rank=3, scaling=2.5)
    adapters.save(lora, tmp_path, 'some/base', MARK)
    tensors = load_file(tmp_path / 'adapter_model.safetensors')
    config = adapters.read_config(tmp_path)
    assert set(tensors) == {
        f'base_model.model.model.layers.{k}.{name}.lora_{factor}.weight'
        for k in range(3)
        for name in NAMES.values()
        for factor in 'AB'
    }
    assert config['peft_type'] == 'LORA' and config['base_model_name_or_path'] == 'some/base'
    assert config['target_modules'] == ['down_proj', 'q_proj']
    assert config['r'] == config['lora_alpha'] == 3
    assert not config['use_rslora'] and not config['fan_in_fan_out']
    for module, (i, o) in DIMS.items():
        for k in range(3):
            prefix = f'base_model.model.model.layers.{k}.{NAMES[module]}.lora_'
            a, b = tensors[prefix + 'A.weight'], tensors[prefix + 'B.weight']
            assert a.shape == (3, i) and b.shape == (o, 3)
            # PEFT: y = x W^T + lora_alpha / r * x A^T B^T, and lora_alpha / r is 1.
            np.testing.assert_allclose((b @ a).T, dense(lora)[module][k], atol=1e-5)


def test_files_are_those_that_vllm_takes(tmp_path):
    """Its rules, as read in its loader (vllm/lora: peft_helper, lora_model); not run here."""
    dims = {name: (i, o) for name, i, o in lora_lib.module_dims(TINY, lora_lib.MODULES)}
    adapters.save(random_lora(0, rank=3, dims=dims), tmp_path, 'some/base', MARK)
    config = adapters.read_config(tmp_path)
    assert {'r', 'lora_alpha', 'target_modules'} <= config.keys()
    assert config['bias'] == 'none'
    assert not any(map(config.get, ('modules_to_save', 'use_dora', 'trainable_token_indices')))
    scaling = config['lora_alpha'] / (config['r'] ** 0.5 if config['use_rslora'] else config['r'])
    assert scaling == 1
    linear = {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
    ranks = {'lora_A': 0, 'lora_B': 1}
    for key, tensor in load_file(tmp_path / 'adapter_model.safetensors').items():
        *module, factor, last = key.removeprefix('base_model.model.').split('.')
        assert last == 'weight' and tensor.shape[ranks[factor]] == config['r'] <= 512
        assert module[:2] == ['model', 'layers'] and module[-1] in linear


def rewrite(folder, config=None, tensors=None, metadata=None):
    """Changes an adapter as other software could have written it."""
    if config:
        path = folder / 'adapter_config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        path = folder / 'adapter_model.safetensors'
        save_file(tensors(load_file(path)), path, metadata)


@pytest.mark.parametrize('rslora, factor', [(False, 4.0), (True, 8.0)])
def test_scaling_of_peft(tmp_path, rslora, factor):
    lora = random_lora(0, rank=4, scaling=1.0)
    adapters.save(lora, tmp_path, 'some/base')
    rewrite(tmp_path, {'lora_alpha': 16, 'use_rslora': rslora})
    loaded = adapters.load(tmp_path)
    for name, delta in dense(lora).items():
        np.testing.assert_allclose(dense(loaded)[name], factor * delta, rtol=1e-4, atol=1e-4)


def test_keys_with_the_name_of_an_adapter(tmp_path):
    lora = random_lora(0)
    adapters.save(lora, tmp_path, 'some/base')
    rewrite(
        tmp_path,
        tensors=lambda found: {
            key.replace('.weight', '.default.weight'): value for key, value in found.items()
        },
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        adapters.load(tmp_path, fingerprint='any').pairs,
        {name: pair.replace(b=pair.b * lora.scaling) for name, pair in lora.pairs.items()},
    )


def truncated(folder):
    path = folder / 'adapter_model.safetensors'
    path.write_bytes(path.read_bytes()[:-40])


def of_another_rank(folder):
    rewrite(folder, {'r': 4})


def without_weights(folder):
    (folder / 'adapter_model.safetensors').unlink()


def without_config(folder):
    (folder / 'adapter_config.json').unlink()


def cut_config(folder):
    (folder / 'adapter_config.json').write_text('{"r": 3')


def rank_zero(folder):
    rewrite(folder, {'r': 0})


def of_another_kind(folder):
    rewrite(folder, {'peft_type': 'IA3'})


def with_dora(folder):
    rewrite(folder, {'use_dora': True, 'modules_to_save': ['lm_head']})


def with_pissa(folder):
    rewrite(folder, {'init_lora_weights': 'pissa'})


def with_no_scaling(folder):
    rewrite(folder, {'lora_alpha': float('nan')})


def with_more(folder):
    more = {'base_model.model.lm_head.lora_A.weight': np.ones((2, 3), np.float32)}
    rewrite(folder, tensors=lambda found: found | more)


def with_a_layer_less(folder):
    rewrite(
        folder,
        tensors=lambda found: {key: v for key, v in found.items() if '.1.mlp' not in key},
    )


def with_half_a_layer(folder):
    rewrite(folder, {'layers_to_transform': [0, 1]})
    rewrite(
        folder,
        tensors=lambda found: {
            key: v for key, v in found.items() if '.1.mlp.down_proj.lora_A' not in key
        },
    )


def with_a_nan(folder):
    def spoil(found):
        key = 'base_model.model.model.layers.2.mlp.down_proj.lora_B.weight'
        found[key] = found[key].copy()
        found[key][0, 0] = np.nan
        return found

    rewrite(folder, tensors=spoil)


@pytest.mark.parametrize(
    'damage, message',
    [
        (truncated, 'truncated or damaged'),
        (without_weights, 'adapter_model.safetensors is missing'),
        (without_config, 'adapter_config.json is missing'),
        (cut_config, 'damaged'),
        (rank_zero, 'damaged'),
        (with_no_scaling, 'damaged .*lora_alpha = nan'),
        (of_another_rank, r'down_proj is of rank 2, but adapter_config.json says r = 4'),
        (of_another_kind, "type 'IA3'"),
        (with_dora, r"modules_to_save = \['lm_head'\], use_dora = True are not supported"),
        (with_pissa, "init_lora_weights = 'pissa' are not supported"),
        (with_more, 'lm_head.lora_A.weight is not'),
        (with_a_layer_less, 'down_proj must have A and B in each of 3 layers; see layers 1'),
        (with_half_a_layer, 'down_proj must have A and B .* see layers 1'),
        (with_a_nan, r'layers\.2\.mlp\.down_proj\.lora_B\.weight holds values that are not finite'),
    ],
)
def test_what_cannot_be_used_is_explained(tmp_path, damage, message):
    adapters.save(random_lora(0), tmp_path, 'some/base', MARK)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        adapters.load(tmp_path, fingerprint='abc')


def test_full_paths_name_modules_of_some_layers(tmp_path):
    lora = random_lora(0, scaling=1.0)
    adapters.save(lora, tmp_path, 'some/base')
    rewrite(tmp_path, {'target_modules': ['model.layers.0.mlp.down_proj', 'q_proj']})
    rewrite(
        tmp_path,
        tensors=lambda found: {
            key: value for key, value in found.items() if 'q_proj' in key or 'layers.0.' in key
        },
    )
    loaded, wanted = dense(adapters.load(tmp_path)), dense(lora)
    np.testing.assert_allclose(loaded['q_proj'], wanted['q_proj'], rtol=1e-5)
    np.testing.assert_allclose(loaded['down_proj'][0], wanted['down_proj'][0], rtol=1e-5)
    assert not loaded['down_proj'][1:].any()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(adapters.Path, 'write_bytes', full)
    with pytest.raises(UserError, match=r'cannot write an adapter to .*No space left'):
        adapters.save(random_lora(0), tmp_path, 'some/base')
    assert not list(tmp_path.iterdir())


def test_the_base_that_an_adapter_names(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    adapters.save(random_lora(0), '~/a', 'some/base', MARK)
    assert adapters.base_name('~/a') == 'some/base'
    assert adapters.read_metadata('~/a') == MARK and adapters.load('~/a').rank == 2
    for name in (None, '', 7):
        rewrite(tmp_path / 'a', {'base_model_name_or_path': name})
        with pytest.raises(UserError, match=r'adapter_config.json: base_model_name.* --base'):
            adapters.base_name('~/a')


def test_an_adapter_of_another_base_is_refused(tmp_path):
    adapters.save(random_lora(0), tmp_path, 'some/base', MARK)
    with pytest.raises(UserError, match='base model abc, not xyz'):
        adapters.load(tmp_path, fingerprint='xyz')
    with pytest.raises(UserError, match=r'A and B of down_proj are .* not .*48.*32'):
        adapters.load(tmp_path, base=TINY)


def test_low_precision_is_read(tmp_path):
    dims = {name: (i, o) for name, i, o in lora_lib.module_dims(TINY, ['v_proj'])}
    low = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), random_lora(1, rank=2, dims=dims, scaling=1.0).pairs
    )
    adapters.save(lora_lib.Lora(low, jnp.float32(1)), tmp_path, 'some/base')
    loaded = adapters.load(tmp_path, base=TINY)
    assert loaded.pairs['v_proj'].a.dtype == jnp.float32
    np.testing.assert_array_equal(loaded.pairs['v_proj'].a, np.asarray(low['v_proj'].a, np.float32))
