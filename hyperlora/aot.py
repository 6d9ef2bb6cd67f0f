"""Ahead-of-time compilation: whether a config fits slices of TPUs and how fast it can be there.

The steps are the real ones, compiled by libtpu for a topology from abstract values, on any machine.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from hyperlora import costs, data, meta_learning, sharding
from hyperlora.errors import UserError
from hyperlora.generation import greedy
from hyperlora.lora import Lora
from hyperlora.meta_learning import Learner, Plan, TrainState
from hyperlora.models.base import BaseModel, abstract_base
from hyperlora.models.decoder import Decoder
from hyperlora.tpus import Topology, topology

STEPS = ('train', 'internalize', 'generate')
# Of generation, per data shard.
_ROWS = 16
_PROMPT_TOKENS = 64
_NEW_TOKENS = 32
_CONTEXT_TOKENS = 4096  # that a data shard internalises at once


def report(config: ConfigDict, name: str | None, steps: Sequence[str] = STEPS) -> dict[str, Any]:
    """Compiles steps of an experiment for a topology.

    Args:
      config: as for `meta_learning.train`.
      name: of the topology, see `tpus.topology`; None for that which the config names.
      steps: of `STEPS`.

    Returns:
      What the compiled programs need, ready for JSON; by step, see `_measure`.

    Raises:
      UserError: an unknown topology, a mesh that does not fit it, or a bad config.
    """
    meta_learning.check_config(config)
    name = name or config.get('topology')
    if not name:
        raise UserError(f'{config.name} names no topology: give --topology=v5e:2x2 or another')
    target = topology(name)
    mesh = sharding.make_mesh(config.mesh, target.devices)
    rules = functools.partial(sharding.rules, config.get('rules'))
    with rules():
        base = abstract_base(config.base, config.base_dtype, mesh, config.base_quantization)
        plan = meta_learning.make_plan(config, base, mesh)
        # What is computed anew in the backward pass is no progress: it does not count in the MFU.
        other = config.copy_and_resolve_references()
        other.remat = 'none'
        if 'remat' in other.hypernetwork.get('shape', {}):
            other.hypernetwork.shape.remat = 'none'
        lean = meta_learning.make_learner(other, base, plan.learner.groups, mesh)
    held = [base.params, plan.state]
    found = {
        'config': config.name,
        'base': base.name,
        'topology': name,
        'ici_bandwidth': target.ici_bandwidth,
        'dcn_bandwidth': target.chip.dcn_bandwidth,
        'chips': mesh.size,
        'mesh': dict(mesh.shape),
        'parameters': sum(x.size for x in jax.tree.leaves(plan.state.params)),
        'replicated_fraction': sum(sharding.replicated_bytes(held).values())
        / sum(map(sharding.nbytes, jax.tree.leaves(held))),
        'steps': {},
    }
    compilers = {
        'train': functools.partial(_train, lean),
        'internalize': _internalize,
        'generate': _generate,
    }
    with jax.set_mesh(mesh), rules():
        for step in steps:
            found['steps'][step] = compilers[step](config, base, plan, target)
    return found


def _train(
    lean: Learner, config: ConfigDict, base: BaseModel, plan: Plan, target: Topology
) -> dict[str, Any]:
    learner = plan.learner
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=plan.batch_place),
        data.abstract(
            config.data, base, learner.hypernetwork.encoder, learner.groups, config.accumulate
        ),
    )
    tokens = {part: batch[part]['tokens'].size for part in batch if 'tokens' in batch[part]}
    args = {'state': plan.state, 'frozen': plan.frozen, 'batch': batch}
    return _measure(plan.step, args, target, tokens, _flops(lean.step, args))


def _internalize(
    config: ConfigDict, base: BaseModel, plan: Plan, target: Topology
) -> dict[str, Any]:
    """The LoRAs of chunks of documents, or of tasks."""
    hypernetwork, mesh = plan.learner.hypernetwork, plan.batch_place.mesh
    rows, shape, tokens = sharding.data_shards(mesh), (), {}
    if 'tokens' in hypernetwork.example:
        length = len(config.chunk_prefix) + config.chunk_length + len(config.chunk_suffix)
        rows, shape = rows * max(_CONTEXT_TOKENS // length, 1), (length,)
        tokens = {'context': rows * length}
    context = {
        key: _spread(mesh, (rows, *(shape or x.shape[1:])), x.dtype)
        for key, x in hypernetwork.example.items()
    }
    encoder_params = plan.frozen.get('encoder', base.params)
    return _measure(
        jax.jit(hypernetwork.generate),
        {'parameters': plan.state.params, 'frozen': encoder_params, 'batch': context},
        target,
        tokens,
    )


def _generate(config: ConfigDict, base: BaseModel, plan: Plan, target: Topology) -> dict[str, Any]:
    """Greedy answers to prompts, each with a LoRA of its own."""
    hypernetwork, mesh = plan.learner.hypernetwork, plan.batch_place.mesh
    chunks, shared = jax.eval_shape(
        hypernetwork.generate,
        plan.state.params,
        plan.frozen.get('encoder', base.params),
        hypernetwork.example,
    )
    if not isinstance(chunks, Lora):
        raise UserError(f'{config.name} makes no LoRA to answer with: give --step=train')
    rank = chunks.rank + (0 if shared is None else shared.rank)
    rows = sharding.data_shards(mesh) * _ROWS
    pairs = jax.tree.map(
        lambda x: _spread(mesh, (x.shape[0], rows, rank, x.shape[3]), x.dtype, axis=1), chunks.pairs
    )
    prompts = _spread(mesh, (rows, _PROMPT_TOKENS), jnp.int32)
    lengths = _spread(mesh, (rows,), jnp.int32)
    decoder = Decoder(base.config)

    def answer(params, pairs, prompts_and_lengths):
        lora = Lora(pairs, config.hypernetwork.shape.scaling)
        eos_id = base.tokenizer.eos_id
        return greedy(decoder, params, *prompts_and_lengths, eos_id, _NEW_TOKENS, lora)

    return _measure(
        jax.jit(answer),
        {'frozen': base.params, 'loras': pairs, 'batch': (prompts, lengths)},
        target,
        {'query': rows * (_PROMPT_TOKENS + _NEW_TOKENS)},
        trips=_NEW_TOKENS - 1,
    )


def _spread(
    mesh: jax.sharding.Mesh, shape: tuple[int, ...], dtype: DTypeLike, axis: int = 0
) -> jax.ShapeDtypeStruct:
    """An abstract array, divided like a batch along an axis."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh, axis))


def _measure(
    function: Any,
    args: dict[str, Any],
    target: Topology,
    tokens: dict[str, int],
    useful_flops: float | None = None,
    trips: int = 1,
) -> dict[str, Any]:
    """Compiles a jitted function and reports what it needs.

    Args:
      args: abstract, by kind, in their order; a TrainState is parameters and optimizer.
      tokens: that it reads and writes, by kind.
      useful_flops: without what is computed twice; None for all.
      trips: how often a loop of unknown length runs.

    Returns:
      `fits` and `reason`; `bytes_per_device`; `flops`, of all matrix products on all chips (see
      `_flops`), and `useful_flops`; `tokens`; `collectives`, kind -> count and bytes that each
      device sends within its slice, and `dcn_collectives`, to other slices; `hbm_bytes`, that each
      moves; `seconds` of computing, of moving data in memory, between chips and between slices at
      the published speeds, of the step if all these overlap (the longest) and if none do (the sum);
      `bound`, which is the longest; `mfu` of both cases, upper and lower bounds of what to expect;
      `compile_seconds`.
    """
    flops = _flops(function, args, trips)
    chip, chips = target.chip, len(target.devices)
    found = {
        'flops': flops,
        'useful_flops': useful_flops or flops,
        'tokens': {**tokens, 'total': sum(tokens.values())},
    }
    start = time.perf_counter()
    try:
        compiled = function.lower(*args.values()).compile()
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        return {'fits': False, 'reason': str(e).splitlines()[0], **found}
    seconds = time.perf_counter() - start
    held = _held(args, compiled.input_shardings[0])
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    moved = costs.traffic(compiled.as_text(), trips, target.slices)
    times = {
        'compute': flops / chips / chip.flops,
        'memory': moved.hbm_bytes / chip.hbm_bandwidth,
        'interconnect': moved.sent_bytes / target.ici_bandwidth if chips > 1 else 0.0,
        'network': moved.dcn_bytes / chip.dcn_bandwidth if target.slices > 1 else 0.0,
    }
    longest, whole = max(times.values()), sum(times.values())
    peak = chips * chip.flops
    return {
        'fits': total <= chip.hbm,
        'reason': None if total <= chip.hbm else 'more than the memory of the chip',
        'bytes_per_device': {
            **held,
            'padding': memory.argument_size_in_bytes - sum(held.values()),
            'arguments': memory.argument_size_in_bytes,
            'outputs': memory.output_size_in_bytes,
            'aliased': memory.alias_size_in_bytes,  # outputs in the place of arguments
            'temporaries': memory.temp_size_in_bytes,
            'program': memory.generated_code_size_in_bytes,
            'total': total,
            'hbm': chip.hbm,
        },
        **found,
        **{
            key: {
                kind: {'count': count, 'bytes': sent}
                for kind, (count, sent) in getattr(moved, key).items()
            }
            for key in ('collectives', 'dcn_collectives')
        },
        'hbm_bytes': moved.hbm_bytes,
        'seconds': {**times, 'step': longest, 'step_without_overlap': whole},
        'bound': max(times, key=times.get),
        'mfu': found['useful_flops'] / longest / peak,
        'mfu_without_overlap': found['useful_flops'] / whole / peak,
        'compile_seconds': seconds,
    }


def _flops(function: Any, args: dict[str, Any], trips: int = 1) -> float:
    """Of all matrix products, loops in full, and attention's as if there were no kernels for it.

    Programs with and without kernels so count alike. (Kernels compute more on the diagonal, where
    their blocks are larger, and less in local layers.)
    """
    nowhere = jax.sharding.get_abstract_mesh().update(abstract_device=None)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tuple(args.values()))
    with jax.sharding.use_abstract_mesh(nowhere):
        return costs.matmul_flops(function, *shapes, trips=trips)


def _held(args: dict[str, Any], places: tuple) -> dict[str, int]:
    """Bytes per device of the arguments that a program reads (which have places), by kind."""

    def size(x, place):
        if place is None:
            return 0
        shard = jax.ShapeDtypeStruct(place.shard_shape(x.shape), x.dtype)
        return sharding.nbytes(shard)

    found = {}
    for (kind, values), place in zip(args.items(), places, strict=True):
        sizes = jax.tree.map(size, values, place)
        if isinstance(sizes, TrainState):
            found['parameters'] = sum(jax.tree.leaves(sizes.params))
            found['optimizer'] = sum(jax.tree.leaves((sizes.step, sizes.opt_state)))
        else:
            found[kind] = sum(jax.tree.leaves(sizes))
    return found
