"""The meta-learning loop: trains any hypernetwork against a frozen language model.

Read this file first. One step:

    context --encode--> features --hypernetwork--> Lora --compose--> frozen LM(queries) --> loss

Everything that differs between systems is passed in by the config: the hypernetwork (with its
context encoder), the data and the objective. Only the hypernetwork's parameters train; the base
model is an argument of every step and is never differentiated with respect to.

Axes: a microbatches, g groups (packed rows), n chunks per group, b queries, t query tokens,
k labels, d width.
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from hyperlora import data, hypernetwork, lora, sharding
from hyperlora.checkpointing import Checkpointer, check_meta
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.metrics import MetricWriter, Progress
from hyperlora.models.base import BaseModel, load_base
from hyperlora.models.decoder import Decoder
from hyperlora.objectives import OBJECTIVES, l1_of_generated

Batch = dict[str, dict[str, jax.Array]]


@struct.dataclass
class TrainState:
    """What trains, and nothing else."""

    step: jax.Array
    params: Any
    opt_state: Any


# ------------------------------------------------------------------------------- optimiser


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up, then cosine decay from `learning_rate` to `end_learning_rate`."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, config.end_learning_rate
    )


def decayed(params: Any) -> Any:
    """True for the leaves that weight decay applies to: linear maps, not norms, biases, learned
    queries, scalers or the shared LoRA (as in the original)."""

    def is_linear(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        return re.search(r'(kernel|head)$', name) is not None

    return jax.tree_util.tree_map_with_path(is_linear, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


# ---------------------------------------------------------------------------------- one step


@dataclasses.dataclass(frozen=True)
class Learner:
    """The pure functions of meta-learning, independent of data and devices.

    Attributes:
      hypernetwork: context -> Lora.
      decoder: the frozen model.
      objective: (logits at labels, query) -> loss per label; see `objectives`.
      l1: coefficient of the L1 penalty on generated A and B.
      max_chunks: chunks of the longest context (the penalty's mean runs over them).
      groups: g, over which chunks and queries of a microbatch are divided evenly.
      optimizer: updates the hypernetwork's parameters.
    """

    hypernetwork: Hypernetwork
    decoder: Decoder
    objective: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]
    l1: float
    max_chunks: int
    groups: int
    optimizer: optax.GradientTransformation

    def loss(self, params: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, dict]:
        """Sum of losses over one microbatch, and the sums of what is reported.

        Args:
          params: hypernetwork parameters.
          frozen: base model parameters.
          batch: `context`, what the hypernetwork's encoder takes, of `[g * n, ...]`;
            `query`: tokens `[b, t]`, labels, label_positions (of the hidden state that predicts
            each) and label_weights `[b, k]`, chunk_weights `[b, n]`.

        Returns:
          (loss sum, {'weight', 'loss', 'l1', 'exact', 'queries'} sums).
        """
        query = batch['query']
        chunks, shared = self.hypernetwork.generate(params, frozen, batch['context'])
        adapter, rank_weights = lora.compose(chunks, shared, self.groups, query['chunk_weights'])
        hidden = self.decoder.apply(
            {'params': frozen}, query['tokens'], lora=adapter, rank_weights=rank_weights
        ).hidden
        # Logits only where there is a label: vocabularies are large.
        hidden = jnp.take_along_axis(hidden, query['label_positions'][..., None], 1)
        logits = self.decoder.apply({'params': frozen}, hidden, method='unembed')
        weights = query['label_weights']
        total = (weights * self.objective(logits, query)).sum()
        penalty = l1_of_generated(
            chunks, shared, batch['context']['mask'].any(-1), weights.sum(), self.max_chunks
        )
        right = (logits.argmax(-1) == query['labels']) | (weights == 0)
        sums = {
            'weight': weights.sum(),
            'loss': total,
            'l1': penalty,
            'exact': right.all(-1).sum().astype(jnp.float32),
            'queries': jnp.float32(right.shape[0]),
        }
        return total + self.l1 * penalty, sums

    def step(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict]:
        """One optimiser step over a microbatches: gradients of sums, divided once.

        Args:
          state: see `TrainState`.
          batch: every leaf `[a, ...]`.

        Returns:
          The new state and mean metrics (loss per context, l1, exact, grad_norm).
        """
        gradient = jax.value_and_grad(self.loss, has_aux=True)

        def accumulate(total, microbatch):
            (_, sums), grads = gradient(state.params, frozen, microbatch)
            return jax.tree.map(jnp.add, total, (grads, sums)), None

        if jax.tree.leaves(batch)[0].shape[0] == 1:
            (_, sums), grads = gradient(state.params, frozen, jax.tree.map(lambda x: x[0], batch))
        else:
            first = jax.tree.map(lambda x: x[0], batch)
            zeros = jax.tree.map(
                jnp.zeros_like, jax.eval_shape(lambda: gradient(state.params, frozen, first))
            )
            (grads, sums), _ = jax.lax.scan(accumulate, (zeros[1], zeros[0][1]), batch)
        grads = jax.tree.map(lambda g: g / sums['weight'], grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            'loss': sums['loss'] / sums['weight'],
            'l1': sums['l1'] / sums['weight'],
            'exact': sums['exact'] / sums['queries'],
            'grad_norm': optax.tree.norm(grads),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    def init(self, key: jax.Array, frozen: Any) -> TrainState:
        """A fresh state; leaves are boxed with their logical axis names."""
        params = self.hypernetwork.init(key, frozen)
        return TrainState(jnp.int32(0), params, self.optimizer.init(params))


def make_learner(config: ConfigDict, base: BaseModel, groups: int) -> Learner:
    """Builds the learner that a config names.

    Raises:
      UserError: unknown hypernetwork or objective.
    """
    if config.objective.name not in OBJECTIVES:
        raise UserError(
            f'unknown objective {config.objective.name!r}; known: {", ".join(OBJECTIVES)}'
        )
    return Learner(
        hypernetwork.build(config.hypernetwork, base.config),
        Decoder(base.config, remat=config.remat),
        OBJECTIVES[config.objective.name],
        config.objective.l1,
        config.objective.max_chunks,
        groups,
        make_optimizer(config.optimizer),
    )


# ---------------------------------------------------------------------------------- the loop


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Trains until the config's last step, resuming from the workdir if it holds a checkpoint.

    SIGTERM (a preemption) saves and returns; a second run continues exactly where it stopped.

    Raises:
      UserError: a bad config, a checkpoint of another base or config, or a loss that is not finite.
    """
    # ---- mesh and base model
    mesh = sharding.make_mesh(config.mesh)
    groups = sharding.data_shards(mesh)
    base = load_base(config.base, jnp.dtype(config.base_dtype), mesh)
    frozen = base.params
    learner = make_learner(config, base, groups)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        # ---- state: abstract first, then shardings, then created where it lives
        key = jax.random.key(config.seed)

        def init(frozen):
            return nn.unbox(learner.init(key, frozen))

        places = sharding.shardings(jax.eval_shape(learner.init, key, frozen), mesh)
        abstract = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(init, frozen),
            places,
        )

        # ---- data, checkpoint, metrics
        batch_place = NamedSharding(mesh, PartitionSpec(None, ('data', 'fsdp')))
        batches = iter(
            data.build(
                config.data, base.tokenizer, config.seed, groups, config.accumulate
            ).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        )
        meta = {'base_fingerprint': base.fingerprint, 'config': config.to_dict()}
        checkpointer = Checkpointer(
            f'{workdir}/checkpoints', config.checkpoint_every, config.keep_checkpoints
        )
        start = checkpointer.latest_step()
        if start is None:
            state = jax.jit(init, out_shardings=places)(frozen)
        else:
            check_meta(checkpointer.meta(start), meta)
            state = checkpointer.restore(start, abstract, batches)
            print(f'resumed at step {start} from {workdir}', flush=True)
        start = start or 0
        writer = MetricWriter(workdir, start)
        count = sum(x.size for x in jax.tree.leaves(state.params))
        print(
            f'{config.name}: {count / 1e6:.1f} M parameters train on {mesh.size} device(s), '
            f'mesh {dict(mesh.shape)}',
            flush=True,
        )

        # ---- steps
        # The state keeps its places from step to step: a shape of batch is compiled once.
        step_fn = jax.jit(
            learner.step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh))
        )
        last_step = config.optimizer.steps
        progress = Progress(last_step, start)
        stop = _StopOnSignal()
        metrics = None
        for step in range(start + 1, last_step + 1):
            batch = jax.device_put(next(batches), batch_place)
            examples = batch['query']['tokens'].shape[0] * batch['query']['tokens'].shape[1]
            before, (state, metrics) = metrics, step_fn(state, frozen, batch)
            jax.block_until_ready(before)  # steps are dispatched one ahead: rates are real
            progress.update(step, examples)
            stopping = stop.requested or checkpointer.reached_preemption(step)
            saving = stopping or step == last_step or step % config.checkpoint_every == 0
            if saving or step % config.log_every == 0:
                values = {key: float(value) for key, value in metrics.items()}
                if not all(map(math.isfinite, values.values())):
                    checkpointer.close()
                    raise UserError(
                        f'loss is not finite at step {step} ({values}); the last checkpoint is '
                        f'of step {checkpointer.latest_step()}. Lower optimizer.learning_rate or '
                        'clip_norm and start in a new workdir'
                    )
                values['learning_rate'] = float(learning_rate(config.optimizer)(step - 1))
                writer.write(step, {**values, **progress.rates()})
                print(
                    f'{progress.line(values["loss"])}  exact {values["exact"]:.2f}  '
                    f'shapes compiled {step_fn._cache_size()}',
                    flush=True,
                )
            if saving:
                checkpointer.save(step, state, batches, meta, force=True)
            if stopping:
                print(f'stop requested: saved step {step} in {workdir}', flush=True)
                break
        checkpointer.close()
        writer.close()
        return state


class _StopOnSignal:
    """Remembers a SIGTERM, so that the step in progress can finish and be saved."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *_):
        self.requested = True
