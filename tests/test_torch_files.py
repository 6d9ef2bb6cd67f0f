"""Files of torch.save: the reference checkpoints, what may be in a file, damage and attacks."""

import copyreg
import os
import pathlib
import pickle
import random
import struct
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, read_golden

from hyperlora import torch_files
from hyperlora.errors import UserError

# All reference checkpoints; those of a few MB are not part of the repository.
REFERENCE = pathlib.Path(
    os.environ.get('HYPERLORA_GOLDEN', pathlib.Path(__file__).parents[2] / 'shared/golden')
)
D2L = [
    'd2l_a_per_layer_gemma2',
    'd2l_b_early_exit_llama_2mod',
    'd2l_h_cross_encoder_gemma3_for_gemma2',
    'd2l_x_embed_only_selfattn_shared',
]
T2L = [
    't2l_d2_sft_linear_swapped_module_order',
    't2l_d_sft_linear',
    't2l_e1_recon_factorized_zscore',
    't2l_e2_recon_deltaw',
    't2l_e3_recon_factorized_raw',
    't2l_f_L_autoreg',
    't2l_f_M_shared_AB_head',
    't2l_f_S_learnable_pos',
    't2l_f_S_shared_AB_head_autoreg',
    't2l_x_encoder_discrete',
    't2l_x_encoder_softmax',
    't2l_x_encoder_vq',
]


# --- Files made by hand --------------------------------------------------------------------------


class Code(bytes):
    """Instructions of a pickle that leave one value on its stack."""


def code(value):
    """The instructions that make a value; `Code` may stand anywhere in it."""
    if isinstance(value, Code):
        return value
    if isinstance(value, dict):
        return Code(b'}(' + b''.join(code(k) + code(v) for k, v in value.items()) + b'u')
    if isinstance(value, list):
        return Code(b'](' + b''.join(map(code, value)) + b'e')
    if isinstance(value, tuple):
        return Code(b'(' + b''.join(map(code, value)) + b't')
    return Code(pickle.dumps(value, 2)[2:-1])  # without PROTO and STOP


def name(dotted):
    """A class or function, pushed by its name."""
    module, _, attribute = dotted.rpartition('.')
    return Code(f'c{module}\n{attribute}\n'.encode())


def call(dotted, *arguments):
    return Code(name(dotted) + code(arguments) + b'R')


def build(made, state):
    return Code(code(made) + code(state) + b'b')


def config(dotted, **attributes):
    return build(Code(name(dotted) + b')\x81'), attributes)


def storage(key, size, kind='Float'):
    return Code(code(('storage', name(f'torch.{kind}Storage'), key, 'cpu', size)) + b'Q')


def tensor(key, total, shape, strides, offset=0, kind='Float'):
    """A view of the storage `key` of `total` elements."""
    hooks = call('collections.OrderedDict')
    parts = (storage(key, total, kind), offset, shape, strides, False, hooks)
    return call('torch._utils._rebuild_tensor_v2', *parts)


def program(value):
    return b'\x80\x02' + code(value) + b'.'


def save(path, data_pkl, storages=(), byteorder=b'little', method=zipfile.ZIP_STORED):
    """Writes a file as torch.save does; `storages` are the bytes of storages '0', '1', ..."""
    with zipfile.ZipFile(path, 'w', method) as archive:
        archive.writestr('archive/data.pkl', data_pkl)
        archive.writestr('archive/byteorder', byteorder)
        for key, content in enumerate(storages):
            archive.writestr(f'archive/data/{key}', content)
        archive.writestr('archive/version', b'3\n')
    return path


def load_value(tmp_path, value, *arrays):
    path = save(tmp_path / 'file.pt', program(value), [array.tobytes() for array in arrays])
    return torch_files.load(path)


def refused(path, *words):
    """Checks that a file is refused in one line that names it, `words` and a remedy."""
    with pytest.raises(UserError) as info:
        torch_files.load(path)
    assert str(info.value).startswith(f'{path}: ')
    reason = str(info.value).removeprefix(f'{path}: ')
    assert reason.isprintable()
    for word in words:
        assert word in reason


def value_refused(tmp_path, value, *words):
    return refused(save(tmp_path / 'file.pt', program(value), [bytes(24)]), *words)


NUMBERS = np.arange(6, dtype=np.float32)


# --- The reference -------------------------------------------------------------------------------


def assert_arrays(loaded, wanted):
    assert list(loaded) == list(wanted)
    for key, array in wanted.items():
        assert type(loaded[key]) is np.ndarray and loaded[key].dtype == array.dtype
        np.testing.assert_array_equal(loaded[key], array)


def split(value):
    arrays = {key: item for key, item in value.items() if isinstance(item, np.ndarray)}
    return arrays, {key: item for key, item in value.items() if key not in arrays}


def reference(case, filename, prefix):
    """The file of a case, and the arrays that it should hold."""
    folder = next(
        (
            f
            for f in (GOLDEN, REFERENCE)
            if (f / f'{case}_ckpt' / filename).exists() and (f / f'{case}.npz').exists()
        ),
        None,
    )
    if folder is None:
        pytest.skip(f'no reference checkpoint of {case} (set HYPERLORA_GOLDEN)')
    with np.load(folder / f'{case}.npz') as file:
        arrays = {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}
    return folder / f'{case}_ckpt' / filename, arrays


@pytest.mark.parametrize('case', T2L)
def test_reference_of_text_to_lora(case):
    path, wanted = reference(case, 'hypermod.pt', 'hypermod/')
    assert_arrays(torch_files.load(path), wanted)


@pytest.mark.parametrize('case', D2L)
def test_reference_of_doc_to_lora(case):
    path, wanted = reference(case, 'pytorch_model.bin', 'hypernet/')
    arrays, rest = split(torch_files.load(path))
    assert_arrays(arrays, wanted)
    assert list(rest) == ['base_model_name_or_path', 'hypernet_config', 'ctx_encoder_args']


def test_configs_of_doc_to_lora(tmp_path):
    # The original's data.pkl; the storages are made anew, in its order.
    case = 'd2l_b_early_exit_llama_2mod'
    meta, arrays = read_golden(case)
    wanted = {
        k.removeprefix('hypernet/'): v for k, v in arrays.items() if k.startswith('hypernet/')
    }
    layers = np.arange(4)
    storages = [array.tobytes() for array in (*wanted.values(), layers)]
    data_pkl = (GOLDEN / f'{case}_ckpt/data.pkl').read_bytes()
    arrays, rest = split(torch_files.load(save(tmp_path / 'file.bin', data_pkl, storages)))
    assert_arrays(arrays, wanted)

    hypernet = rest['hypernet_config']
    np.testing.assert_array_equal(hypernet.pop('layer_indices'), layers)
    lora = hypernet.pop('lora_config')
    described = meta['hypernet_config']
    assert rest['ctx_encoder_args'] == meta['ctx_encoder_args']
    assert hypernet['aggregator_config'] == described['aggregator_config']
    assert list(hypernet['feature_sizes']) == described['feature_sizes']
    assert hypernet['latent_size'] == described['latent_size']
    assert (lora['r'], lora['lora_alpha']) == (meta['lora_r'], meta['lora_alpha'])
    assert lora['target_modules'] == {'q_proj', 'down_proj'}
    assert (lora['peft_type'], lora['task_type']) == ('LORA', 'CAUSAL_LM')
    assert lora['runtime_config'] == {'ephemeral_gpu_offload': False}
    assert {type(item) for item in (rest, hypernet, lora)} == {dict}


# --- What a file may hold ------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kind, dtype',
    [
        ('BFloat16', ml_dtypes.bfloat16),
        ('Half', np.float16),
        ('Float', np.float32),
        ('Double', np.float64),
        ('Char', np.int8),
        ('Short', np.int16),
        ('Int', np.int32),
        ('Long', np.int64),
        ('Byte', np.uint8),
        ('Bool', np.bool_),
    ],
)
def test_dtypes(tmp_path, kind, dtype):
    wanted = np.array([[0, 1, 2], [3, 5, 7]]).astype(dtype)
    array = load_value(tmp_path, tensor('0', 6, (2, 3), (3, 1), kind=kind), wanted)
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize(
    'shape, strides, offset, wanted',
    [
        ((3, 2), (1, 3), 0, NUMBERS.reshape(2, 3).T),
        ((2, 2), (3, 1), 1, NUMBERS.reshape(2, 3)[:, 1:]),
        ((), (), 5, NUMBERS[5]),
        ((0, 3), (3, 1), 6, np.empty((0, 3), np.float32)),
        ((1, 2), (10**9, 1), 4, NUMBERS[None, 4:]),
    ],
)
def test_views(tmp_path, shape, strides, offset, wanted):
    array = load_value(tmp_path, tensor('0', 6, shape, strides, offset), NUMBERS)
    assert array.shape == shape
    np.testing.assert_array_equal(array, wanted)


def test_tensors_share_their_storage_on_disk(tmp_path):
    large = np.ones((1 << 20, 2), np.float32)
    whole = tensor('0', large.size, large.shape, (2, 1))
    column = tensor('0', large.size, large.shape[:1], (2,), offset=1)
    path = save(
        tmp_path / 'file.pt', program({'whole': whole, 'column': column}), [large.tobytes()]
    )
    tracemalloc.start()
    value = torch_files.load(path)
    assert tracemalloc.get_traced_memory()[1] < large.nbytes / 8
    tracemalloc.stop()
    assert np.shares_memory(value['whole'], value['column'])
    assert not value['whole'].flags.writeable
    assert value['whole'].sum() == large.size


def test_plain_data(tmp_path):
    plain = {
        'scalars': [None, True, False, 3, -(2**40), 0.5, 'a\nü'],
        'nested': ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[], {}]),
        'repeated': ['word'] * 3,
        7: {'many': list(range(3000))},
    }
    path = save(tmp_path / 'file.pt', pickle.dumps(plain, 2))
    assert torch_files.load(path) == plain
    (tmp_path / 'old.pt').write_bytes(path.read_bytes().replace(b'byteorder', b'otherfile'))
    assert torch_files.load(tmp_path / 'old.pt') == plain


def test_classes_become_plain_data(tmp_path):
    value = {
        'ordered': build(call('collections.OrderedDict'), {'_metadata': {'': {'version': 1}}}),
        'set': call('__builtin__.set', ['a', 'b', 3]),
        'size': call('torch.Size', (2, 3)),
        'enum': call('peft.utils.peft_types.TaskType', 'CAUSAL_LM'),
        'parameter': call(
            'torch._utils._rebuild_parameter',
            tensor('0', 6, (6,), (1,)),
            True,
            call('collections.OrderedDict'),
        ),
        'config': config(
            'peft.tuners.lora.config.LoraConfig',
            r=8,
            inner=config('peft.tuners.lora.config.LoraRuntimeConfig', a=(1,)),
        ),
    }
    loaded = load_value(tmp_path, value, NUMBERS)
    np.testing.assert_array_equal(loaded.pop('parameter'), NUMBERS)
    assert loaded == {
        'ordered': {},
        'set': {'a', 'b', 3},
        'size': (2, 3),
        'enum': 'CAUSAL_LM',
        'config': {'r': 8, 'inner': {'a': (1,)}},
    }


# --- Attacks -------------------------------------------------------------------------------------


def shell(target):
    return f'touch {target}'


def python(target):
    return f'open({str(target)!r}, "w").close()'


def subclass(target):
    # A dict that runs its keys.
    namespace = {'__setitem__': name('builtins.eval')}
    cls = call('builtins.type', 'Dict', (name('collections.OrderedDict'),), namespace)
    return Code(cls + b')R' + code(python(target)) + code({}) + b's')


def method(target):
    return Code(call('builtins.getattr', call('pathlib.Path', str(target)), 'touch') + b')R')


def state(target):
    partial = build(
        call('functools.partial', name('builtins.print')),
        (name('os.system'), (shell(target),), {}, None),
    )
    return Code(partial + b')R')


ATTACKS = {  # what must be named: the value that creates the file `target` if it is executed
    'os.system': lambda target: call('os.system', shell(target)),
    'posix.system': lambda target: {'weight': [call('posix.system', shell(target))]},
    'builtins.eval': lambda target: call('builtins.eval', python(target)),
    '__builtin__.exec': lambda target: call('__builtin__.exec', python(target), {}),
    'subprocess.call': lambda target: call('subprocess.call', ['touch', str(target)]),
    'subprocess.Popen': lambda target: call('subprocess.Popen', ['touch', str(target)]),
    '_io.FileIO': lambda target: call('_io.FileIO', str(target), 'w'),
    'builtins.getattr': method,
    'builtins.type': subclass,
    'functools.partial': state,
    'INST': lambda target: Code(b'(' + code(shell(target)) + b'ios\nsystem\n'),
    'OBJ': lambda target: Code(b'(c__builtin__\neval\n' + code(python(target)) + b'o'),
    'STACK_GLOBAL': lambda target: Code(
        code('os') + code('system') + b'\x93' + code((shell(target),)) + b'R'
    ),
    'PROTO': lambda target: Code(  # protocol 4 looks dotted names up
        b'\x80\x04' + code('shutil') + code('os.system') + b'\x93' + code((shell(target),)) + b'R'
    ),
    'EXT1': lambda target: Code(b'\x82\xf0' + code((shell(target),)) + b'R'),
}


@pytest.fixture
def extension():
    copyreg.add_extension('os', 'system', 0xF0)
    yield
    copyreg.remove_extension('os', 'system', 0xF0)


@pytest.mark.parametrize('culprit', ATTACKS)
def test_nothing_is_executed(tmp_path, culprit, extension):
    target = tmp_path / 'executed'
    data_pkl = program(ATTACKS[culprit](target))
    path = save(tmp_path / 'file.pt', data_pkl)
    refused(path, {'OBJ': '__builtin__.eval'}.get(culprit, culprit), 'save it again with tensors')
    # A process that an attack started would need a moment.
    if culprit == 'subprocess.Popen':
        time.sleep(0.2)
    assert not target.exists()
    # The attack is a real one.
    result = pickle.loads(data_pkl)
    if culprit == 'subprocess.Popen':
        result.wait()
    assert target.exists()


@pytest.mark.parametrize(
    'dotted',
    [
        'collections.OrderedDict.__init__.__globals__',
        'collections.OrderedDict.fromkeys',
        'collections.defaultdict',
        'torch._utils._rebuild_tensor_v2.__globals__',
        'torch.load',
        'hyperlora.torch_files._dict',
        'peft.tuners.lora.config.LoraConfig.from_pretrained',
        '\x1b[31m.red',
    ],
)
def test_other_names_are_refused(tmp_path, dotted):
    for value in (name(dotted), call(dotted), config(dotted, r=1)):
        value_refused(tmp_path, {'weight': value}, repr(dotted), "near 'weight'")


@pytest.mark.parametrize(
    'target',
    [
        name('collections.OrderedDict'),
        name('torch._utils._rebuild_tensor_v2'),
        name('ctx_to_lora.configs.CtxEncoderArguments'),
        name('torch.FloatStorage'),
        call('__builtin__.set', []),
        call('peft.utils.peft_types.PeftType', 'LORA'),
        storage('0', 6),
        tensor('0', 6, (6,), (1,)),
    ],
)
@pytest.mark.parametrize('state', [{'__class__': 1, 'data': 2}, (None, {'__call__': 1}), [], None])
def test_only_configs_have_attributes(tmp_path, target, state):
    before = {key: dict(vars(function)) for key, function in torch_files._CALLS.items()}
    value_refused(tmp_path, build(target, state), ' in place of dict')
    assert before == {key: vars(function) for key, function in torch_files._CALLS.items()}


@pytest.mark.parametrize('state', [(None, {'r': 1}), [('r', 1)], 'r', None, {None: 1}, {(1,): 1}])
def test_attributes_of_a_config_are_a_dict(tmp_path, state):
    value_refused(
        tmp_path, build(Code(name('peft.tuners.lora.config.LoraConfig') + b')\x81'), state)
    )


def test_attributes_stay_data(tmp_path):
    attributes = {'__class__': 'x', '__reduce__': [1], 'update': 2, '__setstate__': 3}
    for value in (
        config('ctx_to_lora.modeling.hypernet.HypernetConfig', **attributes),
        build(call('collections.OrderedDict'), attributes),
    ):
        loaded = load_value(tmp_path, value)
        assert type(loaded) is dict and loaded == attributes


@pytest.mark.parametrize(
    'value, words',
    [
        (call('collections.OrderedDict', [('a', 1)]), 'arguments'),
        (call('torch.FloatStorage', 3), 'FloatStorage'),
        (tensor('0', 6, (6,), (1,), kind='ComplexFloat'), 'torch.ComplexFloatStorage'),
        (call('torch.Size', 'ab'), 'str in place of tuple'),
        (call('torch.Size', tensor('0', 6, (6,), (1,))), 'ndarray in place of tuple'),
        (call('__builtin__.set', 'ab'), 'str in place of list'),
        (call('__builtin__.set', [()]), 'a tuple is a key'),
        (call('peft.utils.peft_types.PeftType', name('torch.Size')), '_Global in place of str'),
        (Code(code('os.system') + code(()) + b'R'), 'str in place of _Global'),
        (Code(name('torch.Size') + code([()]) + b'R'), 'list in place of tuple'),
        ({'a': name('torch.Size')}, "'torch.Size' itself"),
        ({'a': (1, [storage('0', 6)])}, 'a storage outside of a tensor'),
        (call('torch._utils._rebuild_parameter', storage('0', 6), True, {}), 'a storage outside'),
    ],
)
def test_misused_classes(tmp_path, value, words):
    value_refused(tmp_path, value, words)


def nested(depth):
    return Code(b'N' + b'\x85' * depth)


@pytest.mark.parametrize(
    'value, words',
    [
        (Code(b']q\x00h\x00a'), 'nested too deeply'),  # a list in itself
        (Code(b'}q\x09' + code('a') + b'h\x09s'), 'nested too deeply'),
        (nested(1000), 'nested too deeply'),
        # Each list holds the one before twice.
        (Code(b'(]q\x00' + b'](h\x00h\x00eq\x00' * 50 + b't'), 'holds too many values'),
        # To hash this key would overflow the stack.
        (Code(b'}' + nested(200_000) + b'Ns'), 'a tuple is a key'),
        (Code(b'}' + tensor('0', 6, (6,), (1,)) + b'Ns'), 'a ndarray is a key'),
        (Code(b'\x8a\x01\x05c'), 'damaged'),
    ],
)
def test_hostile_structures(tmp_path, value, words):
    value_refused(tmp_path, value, words)


def test_huge_memo_index_takes_no_memory(tmp_path):
    # pickle.Unpickler makes a table of this many entries: 64 GB.
    path = save(tmp_path / 'file.pt', program(Code(b'Nr\xff\xff\xff\xff0Nj\xff\xff\xff\xff')))
    refused(path, 'POP')
    tracemalloc.start()
    assert load_value(tmp_path, [Code(b'Nr\xff\xff\xff\xff')]) == [None]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# --- Tensors that do not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    'view, words',
    [
        (tensor('0', 6, (7,), (1,)), 'reaches element 7 of a storage of 6'),
        (tensor('0', 6, (2, 3), (4, 1)), 'reaches element 7 of a storage of 6'),
        (tensor('0', 6, (6,), (1,), offset=1), 'reaches element 7 of a storage of 6'),
        (tensor('0', 6, (), (), offset=6), 'reaches element 7 of a storage of 6'),
        (tensor('0', 6, (0,), (1,), offset=7), 'reaches element 7 of a storage of 6'),
        (tensor('0', 6, (2,), (2**62,)), 'reaches element'),
        (tensor('0', 6, (2**62, 4), (1, 2**62)), 'reaches element'),
        (tensor('0', 6, (6,), (1,), offset=-1), 'negative'),
        (tensor('0', 6, (-1,), (1,)), 'negative'),
        (tensor('0', 6, (2,), (-1,), offset=5), 'negative'),
        (tensor('0', 6, (2, 3), (1,)), '2 axes and 1 strides'),
        (tensor('0', 6, (1,) * 65, (1,) * 65), '65 axes'),
        (tensor('0', 6, (10**9, 10**9), (0, 0)), 'repeats the 6 elements'),
        (tensor('0', 6, (0, 2**80), (1, 1)), 'damaged'),
        (tensor('0', 6, (True,), (1,)), 'bool in place of int'),
        (tensor('0', 6, (1.0,), (1,)), 'float in place of int'),
        (tensor('0', 6, [6], (1,)), 'list in place of tuple'),
        (tensor('0', 6, (6,), (1,), offset='0'), 'str in place of int'),
        (tensor('0', 7, (6,), (1,)), "record 'data/0' has 24 bytes instead of 28"),
        (tensor('0', 5, (5,), (1,)), "record 'data/0' has 24 bytes instead of 20"),
        (tensor('0', 6, (6,), (1,), kind='Double'), "record 'data/0' has 24 bytes instead of 48"),
        (tensor('1', 6, (6,), (1,)), "record 'data/1' is missing"),
        (tensor('../version', 6, (6,), (1,)), "record 'data/../version' is missing"),
        (tensor(0, 6, (6,), (1,)), 'int in place of str'),
        (Code(code(('module', name('torch.FloatStorage'), '0', 'cpu', 6)) + b'Q'), 'missing'),
        (Code(code(('storage', name('torch.Size'), '0', 'cpu', 6)) + b'Q'), 'torch Size'),
        (Code(code('0') + b'Q'), 'str in place of tuple'),
        (call('torch._utils._rebuild_tensor_v2', NUMBERS[0].item(), 0, (), ()), '_Storage'),
    ],
)
def test_tensors_outside_their_storage(tmp_path, view, words):
    value_refused(tmp_path, {'layer.weight': view}, "near 'layer.weight'", words)


# --- Archives ------------------------------------------------------------------------------------

SMALL = program({'a': tensor('0', 6, (6,), (1,)), 'b': tensor('1', 6, (3,), (2,))})
STORAGES = [NUMBERS.tobytes(), (-NUMBERS).tobytes()]


def patched(path, record, offset, layout, *values):
    """Overwrites fields of a record's entry in the directory of an archive."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(f'archive/{record}'.encode()) - 46
    assert content[entry : entry + 4] == b'PK\1\2'
    struct.pack_into(layout, content, entry + offset, *values)
    path.write_bytes(content)
    return path


def test_bombs_and_encrypted_records(tmp_path):
    path = tmp_path / 'file.pt'
    zeros = program(tensor('0', 1 << 20, (1 << 20,), (1,)))
    save(path, zeros, [bytes(4 << 20)], method=zipfile.ZIP_DEFLATED)
    refused(path, 'compressed', 'use the file as it was saved')
    refused(patched(save(path, SMALL, STORAGES), 'data/1', 8, '<H', 1), "data/1'", 'encrypted')


@pytest.mark.parametrize(
    'record, offset, layout, values, words',
    [
        ('data/1', 42, '<L', [0], 'overlaps'),
        ('data/1', 42, '<L', [7], 'overlaps'),
        ('data/1', 42, '<L', [10**6], 'damaged'),
        ('data/1', 20, '<2L', [10**6, 10**6], 'is not where it should be'),
        ('data/0', 20, '<2L', [100, 100], 'differs from its checksum'),
        ('data/1', 24, '<L', [10**6], 'is not where it should be'),
        ('data/1', 16, '<L', [0], 'differs from its checksum'),
        ('data/1', 46, '<14s', [b'archive/data/0'], 'two records are named'),
        ('data.pkl', 46, '<16s', [b'archive/data.pki'], 'no record data.pkl'),
        ('data.pkl', 6, '<H', [99], 'damaged'),
    ],
)
def test_records_out_of_place(tmp_path, record, offset, layout, values, words):
    path = save(tmp_path / 'file.pt', SMALL, STORAGES)
    refused(patched(path, record, offset, layout, *values), words)


def test_files_over_4_gb(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', 10)  # so that the fields of large files are used
    path = save(tmp_path / 'file.pt', SMALL, STORAGES)
    assert b'PK\6\6' in path.read_bytes()
    assert_arrays(torch_files.load(path), {'a': NUMBERS, 'b': -NUMBERS[::2]})


def test_too_large(tmp_path, monkeypatch):
    path = tmp_path / 'file.pt'
    refused(save(path, program('a' * torch_files._MAX_PICKLE)), 'data.pkl is too large')
    size = torch_files._MAX_DIRECTORY + 1
    end = struct.pack('<4s4H2LH', b'PK\5\6', 0, 0, 65535, 65535, size, 4, 0)
    path.write_bytes(b'PK\3\4' + bytes(size) + end)
    refused(path, 'too many records')
    monkeypatch.setattr(torch_files, '_MAX_VALUES', 4)
    assert torch_files.load(save(path, program([None] * 3))) == [None] * 3
    refused(save(path, program([None] * 4)), 'holds too many values')


def test_other_files(tmp_path):
    path = tmp_path / 'file.pt'
    refused(path, 'No such file')
    refused(tmp_path, 'directory')
    path.write_bytes(b'')
    refused(path, 'damaged or incomplete')
    path.write_text('version https://git-lfs.github.com/spec/v1\n')
    refused(path, 'not in the ZIP format')
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    refused(path, 'PyTorch before 1.6', 'save it again')
    refused(save(path, SMALL, STORAGES, byteorder=b'big'), 'big-endian')
    with zipfile.ZipFile(path, 'w'):
        pass
    refused(path, 'ZIP format')
    for data_pkl in (
        b'',
        b'\x80\x02',
        b'\x80\x02.',
        b'\x80\x02NN.',
        b'\x80\x02N\x87.',
        b'\x80\x02e.',
        b'\xff',
    ):
        refused(save(path, data_pkl), 'damaged or incomplete')


def test_truncated_files(tmp_path):
    whole, _ = reference('t2l_f_S_shared_AB_head_autoreg', 'hypermod.pt', 'hypermod/')
    content = whole.read_bytes()
    path = tmp_path / 'cut.pt'
    cuts = random.Random(0).sample(range(len(content)), 50)
    for cut in (*cuts, len(content) - 1, 3):
        path.write_bytes(content[:cut])
        refused(path)


def test_flipped_bits_of_a_file_are_noticed(tmp_path):
    path = save(tmp_path / 'file.pt', SMALL, STORAGES)
    wanted, content = torch_files.load(path), path.read_bytes()
    generator = random.Random(0)
    noticed = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            # Some fields do not matter, the time of a record for one.
            assert_arrays(torch_files.load(path), wanted)
        except UserError:
            noticed += 1
    assert noticed > len(content) / 2


@pytest.mark.filterwarnings('ignore:invalid escape sequence')
def test_changed_pickles_never_fail_otherwise(tmp_path):
    original = program(
        {
            'a': tensor('0', 6, (2, 3), (3, 1)),
            'config': config('peft.tuners.lora.config.LoraConfig', r=8, modules=['q', 'v']),
            'set': call('__builtin__.set', ['a', 'b']),
            'numbers': (1, 2.5, None, True, -(2**40)),
        }
    )
    generator = random.Random(0)
    refusals = 0
    for _ in range(1000):
        changed = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        try:
            torch_files.load(save(tmp_path / 'changed.pt', bytes(changed), STORAGES))
        except UserError:
            refusals += 1
    assert 500 < refusals < 1000
