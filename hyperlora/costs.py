"""What a program costs: operations counted in its jaxpr, bytes in its compiled HLO.

XLA's own analysis counts the body of a loop once, whatever its length; here loops count in full.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matmul_flops(function: Callable[..., Any], *args: Any, trips: int = 1) -> float:
    """Floating-point operations of all matrix products of a function, loops counted in full.

    Args:
      function, args: what is called; the arguments may be abstract.
      trips: how often the body of a loop of unknown length runs.
    """

    def inner(value):
        if isinstance(value, ClosedJaxpr):
            return [value.jaxpr]
        if isinstance(value, Jaxpr):
            return [value]
        return [j for v in value for j in inner(v)] if isinstance(value, tuple | list) else []

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name == 'dot_general':
                (contracted, _), _ = equation.params['dimension_numbers']
                left = equation.invars[0].aval.shape
                outputs = math.prod(equation.outvars[0].aval.shape)
                total += 2 * outputs * math.prod(left[i] for i in contracted)
            times = equation.params['length'] if name == 'scan' else 1
            times = trips if name == 'while' else times
            total += times * sum(count(j) for v in equation.params.values() for j in inner(v))
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


# ------------------------------------------------------------------------------ compiled HLO

COLLECTIVES = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')
_BITS = {'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 'bf16': 16, 'f16': 16, 's16': 16}
_BITS |= {'u16': 16, 's64': 64, 'u64': 64, 'f64': 64}
# What moves nothing, or is counted where it is used or runs.
_FREE = frozenset(
    """
    after-all bitcast call conditional constant get-tuple-element iota opt-barrier parameter
    partition-id replica-id tuple while
    """.split()
)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    inside: str  # its parentheses: operands, or the value of a constant
    rest: str  # its attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r'%([\w.\-]+)', self.inside)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device moves in a run of a program.

    Attributes:
      hbm_bytes: that instructions read from and write to memory.
      collectives: kind -> (how many run, bytes that each device sends), within a slice.
      dcn_collectives: the same, between slices.
    """

    hbm_bytes: float
    collectives: dict[str, tuple[int, float]]
    dcn_collectives: dict[str, tuple[int, float]]

    @property
    def sent_bytes(self) -> float:
        return sum(sent for _, sent in self.collectives.values())

    @property
    def dcn_bytes(self) -> float:
        return sum(sent for _, sent in self.dcn_collectives.values())


def traffic(hlo: str, trips: int = 1, slices: int = 1) -> Traffic:
    """Reads the text of a program that XLA compiled for several TPUs.

    Memory: every instruction outside of a fusion, a kernel among them, reads its operands and
    writes its result, unless these are in the chip's vector memory; of an operand that is only
    sliced, the slice counts. Of a conditional, the branch that moves most.
    Collectives: by rings, so that of n devices each sends (n - 1) / n of what an all-gather,
    all-to-all or reduce-scatter makes or takes, and twice that in an all-reduce. Between slices
    they are sends to the hosts, which do the rest.

    Args:
      trips: how often a loop of unknown length runs.
      slices: of TPUs, which all take part in what crosses between them.
    """
    computations, entry = _parse(hlo)
    found: dict[tuple, tuple[str, int, float]] = {}  # key: (kind, count, bytes)
    crossing: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))

    def collect(name, times, where):
        """Collectives of a computation; the halves of an asynchronous one share a channel.

        Args:
          where: the computation that runs it, in which it counts once.
        """
        for at in computations[name].values():
            kind = at.opcode.removesuffix('-start')
            if kind in COLLECTIVES:
                scattered = name.startswith('all-reduce-scatter')
                kind = 'reduce-scatter' if scattered else kind
                channel = re.search(r'channel_id=(\d+)', at.rest)
                key = where, channel[1] if channel else at.name
                found[key] = kind, times, times * _sent(at, kind, computations[name])
            elif at.opcode in ('fusion', 'async-start'):
                for called in _called(at):
                    collect(called, times, where)

    def run(name, times):
        """Bytes of memory that a computation moves."""
        collect(name, times, name)
        total = 0.0
        for at in computations[name].values():
            if at.opcode == 'send' and (kind := _crossing(at)):
                count, sent = crossing[kind]
                part = _share(kind, slices) * next(_arrays(at.shape))[0]
                crossing[kind] = count + times, sent + times * part
            if at.opcode == 'while':
                condition, body = _called(at)
                length = _length(at, computations[name], computations[condition])
                total += run(body, times * (trips if length is None else length))
            elif at.opcode in ('call', 'conditional'):
                total += max(run(called, times) for called in _called(at))
            elif not (
                at.opcode in _FREE or at.opcode.endswith('-done') or 'AllocateBuffer' in at.rest
            ):
                total += times * _moved(at, computations[name], computations)
        return total

    hbm = run(entry, 1)
    collectives: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for kind, count, sent in found.values():
        collectives[kind] = collectives[kind][0] + count, collectives[kind][1] + sent
    return Traffic(hbm, dict(sorted(collectives.items())), dict(sorted(crossing.items())))


def _parse(hlo: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations, entry, current = {}, '', {}
    for line in hlo.splitlines():
        head = re.match(r'(ENTRY )?%([\w.\-]+) \(.*\{$', line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
            continue
        body = re.match(r'\s+(?:ROOT )?%([\w.\-]+) = (.*)', line)
        if body:
            shape, rest = _split(body[2])
            opcode, rest = rest.strip().split('(', 1)
            current[body[1]] = _Instruction(body[1], shape, opcode, *_split('(' + rest))
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """A leading parenthesis, or what stands before the first space, and the rest."""
    if not text.startswith('('):
        first, _, rest = text.partition(' ')
        return first, rest
    depth = 0
    for i, c in enumerate(text):
        depth += (c == '(') - (c == ')')
        if not depth:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f'unbalanced: {text[:80]}')


def _called(at: _Instruction) -> list[str]:
    pattern = r'(?:body|condition|calls|to_apply|true_computation|false_computation)=%([\w.\-]+)'
    branches = re.search(r'branch_computations=\{([^}]*)\}', at.rest)
    named = re.findall(r'%([\w.\-]+)', branches[1]) if branches else []
    return re.findall(pattern, at.rest) + named


def _length(
    at: _Instruction, among: dict[str, _Instruction], condition: dict[str, _Instruction]
) -> int | None:
    """How often a loop runs that counts from a constant while less than a constant.

    A loop counts from 1 if XLA has moved a first turn before it.
    """
    root = list(condition.values())[-1]
    if root.opcode != 'compare' or 'direction=LT' not in root.rest:
        return None
    counter, bound = (condition[name] for name in root.operands)
    index = re.search(r'index=(\d+)', counter.rest)
    state = among[at.operands[0]]
    if bound.opcode != 'constant' or not index or state.opcode != 'tuple':
        return None
    start = among[state.operands[int(index[1])]]
    while start.opcode == 'copy':
        start = among[start.operands[0]]
    if start.opcode != 'constant':
        return None
    return int(bound.inside[1:-1]) - int(start.inside[1:-1])


def _arrays(shape: str) -> Iterator[tuple[float, bool]]:
    """Bytes of each array of a shape, and whether it is in the main memory."""
    for kind, sizes, layout in re.findall(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?', shape):
        count = math.prod(int(n) for n in sizes.split(',') if n)
        space = re.search(r'S\((\d+)\)', layout)
        yield count * _BITS.get(kind, 32) / 8, space is None or space[1] == '0'


def _size(shape: str, memory: bool = True) -> float:
    return sum(size for size, in_memory in _arrays(shape) if in_memory or not memory)


def _sent(at: _Instruction, kind: str, among: dict[str, _Instruction]) -> float:
    sizes = [size for size, _ in _arrays(at.shape)]
    whole = max(sizes) if at.opcode.endswith('-start') else sum(sizes)
    if kind == 'collective-permute':
        return whole
    if at.opcode.startswith('reduce-scatter'):
        whole = sum(_size(among[name].shape, memory=False) for name in at.operands)
    return _share(kind, _group_size(at.rest)) * whole


def _share(kind: str, n: int) -> float:
    """Of the whole array of a collective, what each of n devices sends."""
    return (2 if kind == 'all-reduce' else 1) * (n - 1) / n


def _crossing(at: _Instruction) -> str | None:
    """The kind of collective between slices that a send to the host is a part of."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', at.rest)
    return found and found[1].lower().replace('_', '-')


def _group_size(attributes: str) -> int:
    """How many devices take part, from any of XLA's three ways to say which."""
    mesh = re.search(r'replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}', attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # perhaps a part of an axis
        return math.prod(int(part or sizes[name]) for name, part in axes)
    grid = re.search(r'replica_groups=\[\d+,(\d+)\]', attributes)
    listed = re.search(r'replica_groups=\{\{([\d,]+)\}', attributes)
    if not grid and not listed:
        raise ValueError(f'cannot read the replica groups of {attributes[:200]}')
    return int(grid[1]) if grid else len(listed[1].split(','))


def _moved(
    at: _Instruction,
    among: dict[str, _Instruction],
    computations: dict[str, dict[str, _Instruction]],
) -> float:
    """Bytes of memory that an instruction reads and writes."""
    read = [_size(among[name].shape) for name in at.operands]
    if at.opcode in ('dynamic-slice', 'gather', 'slice'):
        return 2 * _size(at.shape)
    if at.opcode in ('dynamic-update-slice', 'scatter'):
        return 2 * read[1 if at.opcode == 'dynamic-update-slice' else 2]
    if at.opcode in ('recv', 'send'):  # to and from the host
        return next(_arrays(at.shape))[0]
    if at.opcode == 'copy-start':  # its result holds its operand
        size, in_memory = next(_arrays(at.shape))
        return read[0] + size * in_memory
    if at.opcode == 'slice-start':  # so does this one's, and reads a slice of it
        size, in_memory = list(_arrays(at.shape))[1]
        return size * (read[0] > 0) + size * in_memory
    written = _size(at.shape)
    if at.opcode != 'fusion':
        return sum(read) + written
    (name,) = _called(at)
    for other in computations[name].values():
        if other.opcode == 'dynamic-update-slice':  # in place
            update = computations[name][other.operands[1]]
            written -= max(_size(other.shape) - _size(update.shape), 0)
    return max(written, 0) + sum(
        min(whole, _read(computations, name, index)) for index, whole in enumerate(read)
    )


def _read(computations: dict[str, dict[str, _Instruction]], name: str, index: int) -> float:
    """Bytes that a fusion reads of one of its operands."""
    inside = computations[name]
    (parameter,) = (
        p for p in inside.values() if p.opcode == 'parameter' and p.inside == f'({index})'
    )

    def follow(source):
        users = [user for user in inside.values() if source.name in user.operands]
        if not users:  # the result: what is around reads it
            return _size(source.shape, memory=False)
        total = 0.0
        for user in users:
            first = user.operands[0] == source.name
            if user.opcode == 'bitcast':
                total += follow(user)
            elif user.opcode == 'fusion':
                places = [i for i, operand in enumerate(user.operands) if operand == source.name]
                total += sum(_read(computations, _called(user)[0], i) for i in places)
            elif user.opcode in ('dynamic-slice', 'gather', 'slice') and first:
                total += _size(user.shape, memory=False)
            elif not (user.opcode == 'dynamic-update-slice' and first):
                total += _size(source.shape, memory=False)
        return total

    return follow(parameter)
