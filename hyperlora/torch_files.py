"""Files that `torch.save` wrote, read without torch and without running the pickle inside.

Such a file is a ZIP archive of uncompressed records: `data.pkl`, a pickle of protocol 2, and the
bytes of each storage, which tensors are views of. A pickle is a program that may call anything.
Here `_Interpreter` carries out the few instructions that tensors and settings need, and can call
nothing but the functions in `_CALLS`; everything else is refused.
"""

import dataclasses
import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hyperlora.errors import UserError

# Far more than real files need; a hostile one costs at most a minute and a GB of memory.
_MAX_DIRECTORY = 16 << 20  # bytes, some 100,000 records
_MAX_PICKLE = 8 << 20  # bytes, some 30,000 tensors
_MAX_VALUES = 1_000_000
_MAX_DEPTH = 64

_ONLY_DATA = 'save it again with tensors and plain settings only'
_LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19'  # how files from before PyTorch 1.6 begin

_DTYPES = {
    f'torch {name}Storage': np.dtype(dtype)
    for name, dtype in (
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
    )
}


def load(path: str | Path) -> Any:
    """Reads a file that `torch.save` wrote.

    Tensors become numpy arrays: read-only views of the file, which stays mapped and must not
    change while they are in use. An OrderedDict and the config objects of Doc-to-LoRA and PEFT
    become dicts (of their attributes; the `_metadata` of a state dict is left out), enums become
    their values, a torch.Size a tuple.

    Args:
      path: file in the ZIP format of `torch.save`, little-endian.

    Returns:
      A tree of dicts, lists, tuples, sets, arrays, strings, numbers, booleans and None.

    Raises:
      UserError: the file cannot be read, is damaged, of another format, or holds anything else;
        nothing of it is executed.
    """
    try:
        records = _records(path)
        if 'data.pkl' not in records:
            raise _Unreadable('has no record data.pkl; choose a file that torch.save wrote')
        if len(records['data.pkl']) > _MAX_PICKLE:
            raise _Unreadable(f'its record data.pkl is too large; {_ONLY_DATA}')
        if records.get('byteorder', b'little') != b'little':
            raise _Unreadable('is big-endian; save it again on a little-endian machine')
        value = _Interpreter(records).run(bytes(records['data.pkl']))
        _check_plain(value)
    except OSError as error:
        raise UserError(f'{path}: cannot read ({error.strerror or error})') from error
    except _Unreadable as error:
        raise UserError(f'{path}: {error}') from error
    except _DAMAGE as error:
        raise UserError(f'{path}: {_damaged(error)}') from error
    return value


class _Unreadable(Exception):
    """Why a file is refused, and the remedy."""


# What damage surfaces as, whichever check or library function stumbles on it first.
_DAMAGE = (
    zipfile.BadZipFile,
    struct.error,
    IndexError,
    KeyError,
    NotImplementedError,
    OverflowError,
    TypeError,
    ValueError,
)


def _damaged(error: Exception) -> str:
    reason = ' '.join(str(error).split())[:300] or type(error).__name__
    return f'damaged or incomplete ({reason}); download or copy it again'


# --- The archive ---------------------------------------------------------------------------------


class _Limited(io.FileIO):
    # zipfile reads the directory in one piece, as long as the file says it is, and makes ten times
    # as much of it in memory.
    def read(self, size: int = -1) -> bytes:
        if size > _MAX_DIRECTORY:
            raise _Unreadable(f'has too many records; {_ONLY_DATA}')
        return super().read(size)


def _records(path: str | Path) -> dict[str, memoryview]:
    """The contents of the records, still on disk, by their names within the archive's folder."""
    with _Limited(path) as file:
        data = np.memmap(file, np.uint8, 'r').data
        if data[: len(_LEGACY)] == _LEGACY:
            raise _Unreadable(
                'is in the format of PyTorch before 1.6; load it and save it again with a newer one'
            )
        if data[:4] != b'PK\3\4':
            raise _Unreadable('is not in the ZIP format of torch.save; choose another file')
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    folder = members[0].filename.partition('/')[0] + '/'
    records, end = {}, 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.filename
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise _Unreadable(
                f'record {name[:80]!r} is compressed or encrypted, which torch.save never does; '
                'use the file as it was saved'
            )
        if member.header_offset < end:
            raise ValueError(f'record {name[:80]!r} overlaps another')
        signature, *lengths = struct.unpack_from('<4s22x2H', data, member.header_offset)
        start = member.header_offset + 30 + sum(lengths)
        end = start + member.file_size
        if signature != b'PK\3\4' or end > len(data) or member.compress_size != member.file_size:
            raise ValueError(f'record {name[:80]!r} is not where it should be')
        if zlib.crc32(data[start:end]) != member.CRC:
            raise ValueError(f'record {name[:80]!r} differs from its checksum')
        if name.removeprefix(folder) in records:
            raise ValueError(f'two records are named {name[:80]!r}')
        records[name.removeprefix(folder)] = data[start:end]
    return records


# --- The pickle ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    data: memoryview
    dtype: np.dtype

    @property
    def size(self) -> int:
        return len(self.data) // self.dtype.itemsize


class _Interpreter:
    """Builds the value of a pickle out of plain data.

    Unlike `pickle.Unpickler` it looks up no names, sets no attributes of anything, and keeps no
    table as long as a file demands.

    Args:
      records: from `_records`.
    """

    def __init__(self, records: Mapping[str, memoryview]):
        self._records = records
        self._stack, self._marks, self._memo = [], [], {}

    def run(self, program: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(program):
                self._step(opcode.name, argument)
            (value,) = self._stack
        except (_Unreadable, *_DAMAGE) as error:
            reason = str(error) if isinstance(error, _Unreadable) else _damaged(error)
            near = [item for item in self._stack if isinstance(item, str)][-1:]
            raise _Unreadable(f'near {near[0][:80]!r}: {reason}' if near else reason) from error
        return value

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case 'BININT' | 'BININT1' | 'BININT2' | 'LONG1' | 'BINFLOAT' | 'BINUNICODE':
                stack.append(argument)
            case 'NONE':
                stack.append(None)
            case 'NEWTRUE' | 'NEWFALSE':
                stack.append(opcode == 'NEWTRUE')
            case 'EMPTY_DICT':
                stack.append({})
            case 'EMPTY_LIST':
                stack.append([])
            case 'EMPTY_TUPLE':
                stack.append(())
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                stack.append(tuple(self._pop(int(opcode[-1]))))
            case 'TUPLE':
                stack.append(tuple(self._pop_mark()))
            case 'MARK':
                self._marks.append(len(stack))
            case 'BINPUT' | 'LONG_BINPUT':
                self._memo[argument] = stack[-1]
            case 'BINGET' | 'LONG_BINGET':
                stack.append(self._memo[argument])
            case 'APPEND' | 'APPENDS':
                items = self._pop_mark() if opcode == 'APPENDS' else self._pop(1)
                _expect(list, stack[-1]).extend(items)
            case 'SETITEM' | 'SETITEMS':
                items = self._pop_mark() if opcode == 'SETITEMS' else self._pop(2)
                pairs = zip(map(_key, items[::2]), items[1::2], strict=True)
                _expect(dict, stack[-1]).update(pairs)
            case 'BUILD':
                (attributes,) = self._pop(1)
                # torch hangs the versions of the modules on a state dict.
                kept = {k: v for k, v in _expect(dict, attributes).items() if k != '_metadata'}
                _expect(dict, stack[-1]).update(kept)
            case 'GLOBAL':
                if argument not in _CALLS and argument not in _DTYPES:
                    raise _Unreadable(
                        f'holds {argument.replace(" ", ".")[:80]!r}, which is none of the known '
                        f'classes and may be harmful; {_ONLY_DATA}'
                    )
                stack.append(_Global(argument))
            case 'REDUCE' | 'NEWOBJ':
                function, arguments = self._pop(2)
                stack.append(_CALLS[_expect(_Global, function).name](*_expect(tuple, arguments)))
            case 'BINPERSID':
                stack.append(self._storage(*_expect(tuple, *self._pop(1))))
            case 'PROTO' if argument == 2:
                pass
            case 'STOP':
                pass
            case _:
                raise _Unreadable(
                    f'has the pickle instruction {opcode} {str(argument)[:80]!r}, which tensors '
                    f'and settings do not need; {_ONLY_DATA}, in the default pickle_protocol'
                )

    def _pop(self, count: int) -> list:
        start = len(self._stack) - count
        if start < 0:
            raise ValueError('an instruction lacks its operands')
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _pop_mark(self) -> list:
        return self._pop(len(self._stack) - self._marks.pop())

    def _storage(self, kind: str, cls: _Global, key: str, device: str, size: int) -> _Storage:
        dtype = _DTYPES[_expect(_Global, cls).name]
        name = f'data/{_expect(str, key)}'
        if kind != 'storage' or name not in self._records:
            raise ValueError(f'record {name[:80]!r} is missing')
        found, wanted = len(self._records[name]), _expect(int, size) * dtype.itemsize
        if found != wanted:
            raise ValueError(f'record {name[:80]!r} has {found} bytes instead of {wanted}')
        return _Storage(self._records[name], dtype)


def _expect(kind: type, value: Any) -> Any:
    # Not isinstance, for which True would do as a size.
    if type(value) is not kind:
        raise ValueError(f'{type(value).__name__} in place of {kind.__name__}')
    return value


def _key(value: Any) -> str | int:
    # No tuples: to hash a deep one overflows the stack of the interpreter.
    if not isinstance(value, str | int):
        raise _Unreadable(
            f'a {type(value).__name__} is a key of a dict or a member of a set; '
            'save it again with strings and integers there'
        )
    return value


# The functions below stand for classes and functions of torch, PEFT and Doc-to-LoRA. They take
# whatever a file gives them.


def _dict() -> dict:
    return {}


def _set(items: list) -> set:
    return set(map(_key, _expect(list, items)))


def _size(sizes: tuple) -> tuple:
    return _expect(tuple, sizes)


def _enum(value: str) -> str:
    return _expect(str, value)


def _parameter(tensor: np.ndarray, requires_grad: bool, hooks: dict) -> np.ndarray:
    return tensor


def _tensor(storage: _Storage, offset: int, size: tuple, strides: tuple, *_: Any) -> np.ndarray:
    """The view of a storage; offset and strides count elements. The rest concerns gradients."""
    total, dtype = _expect(_Storage, storage).size, storage.dtype
    # No more axes than numpy has: the product of a million sizes would take hours.
    if not len(_expect(tuple, size)) == len(_expect(tuple, strides)) <= 64:
        raise ValueError(f'a tensor has {len(size)} axes and {len(strides)} strides')
    if min(_expect(int, n) for n in (offset, *size, *strides)) < 0:
        raise ValueError('a tensor has a negative offset, size or stride')
    count = math.prod(size)
    used = 1 + sum((n - 1) * step for n, step in zip(size, strides, strict=True)) if count else 0
    if offset + used > total:
        raise ValueError(f'a tensor reaches element {offset + used} of a storage of {total}')
    if count > total:
        raise _Unreadable(
            f'a tensor repeats the {total} elements of its storage to {count}; '
            'save it again made contiguous'
        )
    offset, *steps = (n * dtype.itemsize for n in (offset, *strides))
    return np.ndarray(size, dtype, storage.data, offset, steps)


_CALLS = {
    'collections OrderedDict': _dict,
    '__builtin__ set': _set,
    'torch Size': _size,
    'torch._utils _rebuild_tensor_v2': _tensor,
    'torch._utils _rebuild_parameter': _parameter,
    'ctx_to_lora.configs CtxEncoderArguments': _dict,
    'ctx_to_lora.modeling.aggregator AggregatorConfig': _dict,
    'ctx_to_lora.modeling.hypernet HypernetConfig': _dict,
    'peft.tuners.lora.config LoraConfig': _dict,
    'peft.tuners.lora.config LoraRuntimeConfig': _dict,
    'peft.utils.peft_types PeftType': _enum,
    'peft.utils.peft_types TaskType': _enum,
}


def _check_plain(value: Any) -> None:
    """Checks that a value is a finite tree of plain data, small enough to be walked through.

    A pickle can put a list into itself, or one list many times into the next and so on.
    """
    level, count = [value], 1
    for _ in range(_MAX_DEPTH):
        below = []
        for item in level:
            if isinstance(item, dict | list | tuple | set):
                below.extend(item.values() if isinstance(item, dict) else item)
                if count + len(below) > _MAX_VALUES:
                    raise _Unreadable(f'holds too many values; {_ONLY_DATA}')
            elif isinstance(item, _Global):
                raise _Unreadable(f'holds {item.name.replace(" ", ".")!r} itself; {_ONLY_DATA}')
            elif isinstance(item, _Storage):
                raise _Unreadable(f'holds a storage outside of a tensor; {_ONLY_DATA}')
        level, count = below, count + len(below)
    if level:
        raise _Unreadable(f'its values are nested too deeply; {_ONLY_DATA}')
