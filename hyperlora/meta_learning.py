"""The meta-learning loop: trains any hypernetwork against a frozen language model.

Read this file first. One step:

    context --encode--> features --hypernetwork--> Lora --compose--> frozen LM(queries) --> loss

Everything that differs between systems is passed in by the config: the hypernetwork (with its
context encoder), the data and the objective. Only the hypernetwork's parameters train; the base
model is an argument of every step and is never differentiated with respect to.

Axes: a microbatches, g groups (packed rows), n chunks per group, b queries, t query tokens, p soft
tokens, k labels, d width; e entries of a teacher's distribution, T tokens that it reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import path_aware_map
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from hyperlora import data, hosts, hypernetwork, lora, objectives, sharding, trained
from hyperlora.checkpointing import Checkpointer, check_meta, check_models
from hyperlora.errors import UserError
from hyperlora.generation import top_log_probs
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.lora import Lora
from hyperlora.metrics import MetricWriter, Progress
from hyperlora.models.base import BaseModel, load_base
from hyperlora.models.decoder import REMAT_POLICIES, Decoder, prefix

Batch = dict[str, dict[str, jax.Array]]


@struct.dataclass
class TrainState:
    """What trains, and nothing else."""

    step: jax.Array
    params: Any
    opt_state: Any


# ------------------------------------------------------------------------------- optimiser


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up, then cosine decay from `learning_rate` to `end_learning_rate`.

    Raises:
      UserError: nothing is left after the warm-up.
    """
    if config.warmup_steps >= config.steps:
        raise UserError(
            f'optimizer.warmup_steps ({config.warmup_steps}) must be less than optimizer.steps '
            f'({config.steps})'
        )
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, config.end_learning_rate
    )


def decayed(params: Any) -> Any:
    """True for the leaves that weight decay applies to: linear maps, not norms, biases, learned
    queries, scalers or the shared LoRA (as in the original)."""
    return path_aware_map(lambda path, _: path[-1].endswith(('kernel', 'head')), params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with a bound on the norm of all gradients together; see `decayed`, `learning_rate`."""
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
      objective: what the LoRAs are trained towards; see `objectives`.
      groups: g, over which chunks and queries of a microbatch are divided evenly.
      optimizer: updates the hypernetwork's parameters.
      neftune: strength of the noise on the frozen model's embeddings (arXiv 2310.05914).
      seed: of dropout and noise.
    """

    hypernetwork: Hypernetwork
    decoder: Decoder
    objective: objectives.Objective
    groups: int
    optimizer: optax.GradientTransformation
    neftune: float = 0.0
    seed: int = 0

    def loss(
        self, params: Any, frozen: Any, batch: Batch, key: jax.Array | None = None
    ) -> tuple[jax.Array, objectives.Sums]:
        """Sum of losses over one microbatch, and the sums of what is reported.

        Args:
          params: hypernetwork parameters.
          frozen: parameters of the `base` model, and of the context `encoder` if it is another.
          batch: `context`, what the hypernetwork's encoder takes, of `[g * n, ...]`;
            `query`: tokens `[b, t]`, labels, label_positions (of the hidden state that predicts
            each) and label_weights `[b, k]`, chunk_weights `[b, n]`; positions and segments
            `[b, t]` if rows are packed; teacher_ids and teacher_log_probs `[b, k, e]` for
            distillation. Without those, `teacher`: tokens, positions and segments `[b, T]` of
            prompts with documents in them and answers, and label_positions `[b, k]`: the frozen
            model is asked now. For reconstruction `target` instead of a query, the LoRAs to make.
          key: for dropout and noise; None for neither.
        """
        if 'teacher' in batch:
            batch = {**batch, 'query': {**batch['query'], **self._teach(frozen, batch['teacher'])}}
        key, noise_key = (None, None) if key is None else jax.random.split(key)
        encoder = frozen.get('encoder', frozen['base'])
        chunks, shared, extra = self.hypernetwork.generate_with_losses(
            params, encoder, batch['context'], key
        )
        model = objectives.AdaptedModel(
            functools.partial(self._hidden, frozen['base'], noise_key),
            functools.partial(self._unembed, frozen['base']),
        )
        total, sums = self.objective(chunks, shared, batch, model)
        return total + extra * sums['loss'][1], sums

    def _teach(self, frozen: Any, teacher: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The opinion of the frozen model on the labels, where the documents are in its prompt."""
        ids, log_probs = top_log_probs(
            self.decoder, frozen['base'], **teacher, entries=objectives.TEACHER_ENTRIES
        )
        return {'teacher_ids': ids, 'teacher_log_probs': jax.lax.stop_gradient(log_probs)}

    def _hidden(
        self,
        base: Any,
        key: jax.Array | None,
        chunks: Lora | jax.Array,
        shared: Lora | None,
        query: dict[str, jax.Array],
    ) -> jax.Array:
        """The adapted model's hidden states at the labels, `[b, k, d]`. Instead of LoRAs there may
        be soft tokens `[b, p, d]`, which stand first in each row."""
        adapter = rank_weights = noise = soft = None
        if isinstance(chunks, Lora):
            weights = query['chunk_weights']
            adapter, rank_weights = lora.compose(chunks, shared, self.groups, weights)
        else:
            soft = prefix(chunks, query['tokens'].shape[1])
        if key is not None and self.neftune:
            shape = (*query['tokens'].shape, self.decoder.config.width)
            limit = self.neftune / math.sqrt(shape[1] * shape[2])
            noise = jax.random.uniform(key, shape, minval=-limit, maxval=limit)
        hidden = self.decoder.apply(
            {'params': base},
            query['tokens'],
            query.get('positions'),
            query.get('segments'),
            lora=adapter,
            rank_weights=rank_weights,
            soft=soft,
            noise=noise,
        ).hidden
        # Logits only where there is a label: vocabularies are large.
        return jnp.take_along_axis(hidden, query['label_positions'][..., None], 1)

    def _unembed(self, base: Any, hidden: jax.Array) -> jax.Array:
        return self.decoder.apply({'params': base}, hidden, method='unembed')

    def step(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict]:
        """One optimiser step over a microbatches: gradients of sums, divided once.

        Args:
          state: see `TrainState`.
          batch: every leaf `[a, ...]`.

        Returns:
          The new state and mean metrics (loss, exact, grad_norm and the penalties).
        """
        gradient = jax.value_and_grad(self.loss, has_aux=True)
        count = jax.tree.leaves(batch)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), state.step), count)

        def one(microbatch, key):
            (_, sums), grads = gradient(state.params, frozen, microbatch, key)
            return grads, sums

        def accumulate(total, xs):
            return jax.tree.map(jnp.add, total, one(*xs)), None

        first = jax.tree.map(lambda x: x[0], (batch, keys))
        if count == 1:
            grads, sums = one(*first)
        else:
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, *first))
            (grads, sums), _ = jax.lax.scan(accumulate, zeros, (batch, keys))
        grads = jax.tree.map(lambda g: g / sums['loss'][1], grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        metrics = {name: total / weight for name, (total, weight) in sums.items()}
        metrics['grad_norm'] = optax.tree.norm(grads)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    def init(self, key: jax.Array, encoder_params: Any) -> TrainState:
        """A fresh state; leaves are boxed with their logical axis names."""
        params = self.hypernetwork.init(key, encoder_params)
        return TrainState(jnp.int32(0), params, self.optimizer.init(params))


def make_learner(
    config: ConfigDict, base: BaseModel, groups: int, mesh: jax.sharding.Mesh | None = None
) -> Learner:
    """Builds the learner that a config names.

    Raises:
      UserError: unknown hypernetwork or objective.
    """
    return Learner(
        hypernetwork.build(config.hypernetwork, base, mesh),
        Decoder(base.config, remat=config.remat),
        objectives.build(config.objective),
        groups,
        make_optimizer(config.optimizer),
        config.neftune,
        config.seed,
    )


# -------------------------------------------------------------------- the step on its devices


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training on a mesh, as `train` runs it and `launch.aot` compiles it.

    Attributes:
      learner: what is computed.
      frozen: see `Learner.loss`, on the mesh.
      state: the abstract TrainState, each leaf with its place.
      batch_place: where batches live.
      init: encoder parameters -> a fresh TrainState.
      step: jitted `Learner.step`; the state is donated and keeps its places, so that a shape of
        batch is compiled once.
    """

    learner: Learner
    frozen: Any
    state: TrainState
    batch_place: NamedSharding
    init: Callable[[Any], TrainState]
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, dict]]


def make_plan(config: ConfigDict, base: BaseModel, mesh: jax.sharding.Mesh) -> Plan:
    """Plans the training of a config; the base model may be abstract.

    Raises:
      UserError: a bad config, or parameters that the mesh cannot divide or leaves undivided.
    """
    learner = make_learner(config, base, sharding.data_shards(mesh) * config.groups, mesh)
    encoder_params = learner.hypernetwork.encoder.params
    key = jax.random.key(config.seed)

    def init(encoder_params):
        return nn.unbox(learner.init(key, encoder_params))

    places = sharding.shardings(jax.eval_shape(learner.init, key, encoder_params), mesh)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(init, encoder_params),
        places,
    )
    sharding.check_divided([base.params, state])
    frozen = {'base': base.params}
    if encoder_params is not base.params:  # else it would be passed, and counted, twice
        frozen['encoder'] = encoder_params
    return Plan(
        learner,
        frozen,
        state,
        sharding.batch_sharding(mesh, axis=1),
        jax.jit(init, out_shardings=places),
        jax.jit(learner.step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh))),
    )


# ---------------------------------------------------------------------------------- the loop


# Settings, by what they must at least be and must stay below.
_BOUNDS = {
    (1, math.inf): 'groups accumulate log_every checkpoint_every keep_checkpoints chunk_length',
    (0, math.inf): 'seed neftune optimizer.learning_rate optimizer.end_learning_rate '
    'optimizer.warmup_steps optimizer.weight_decay optimizer.clip_norm',
    (0, 1): 'optimizer.b1 optimizer.b2',
}


def check_config(config: ConfigDict) -> None:
    """Checks what is needed before anything is loaded.

    Raises:
      UserError: the config is not that of a training, or a number or name in it makes no sense.
    """
    for part in ('base', 'hypernetwork', 'objective', 'data', 'optimizer'):
        if part not in config:
            raise UserError(
                f'{config.get("name")!r} is no experiment to train: its config has no {part}'
            )
    for (least, limit), keys in _BOUNDS.items():
        for key in keys.split():
            value = functools.reduce(lambda part, name: part.get(name), key.split('.'), config)
            if value is not None and not least <= value < limit:  # nor is NaN
                below = '' if value < least else f' and below {limit}'
                raise UserError(f'config.{key} must be at least {least}{below}, not {value}')
    learning_rate(config.optimizer)
    shape = config.hypernetwork.get('shape', {})
    for name, part in (('config', config), ('config.hypernetwork.shape', shape)):
        if (remat := part.get('remat', 'none')) not in REMAT_POLICIES:
            raise UserError(f'unknown {name}.remat {remat!r}; known: {", ".join(REMAT_POLICIES)}')


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Trains until the config's last step, resuming from the workdir if it holds a checkpoint.

    SIGTERM (a preemption) saves and returns; a second run continues exactly where it stopped.

    Raises:
      UserError: a bad config, a mesh that does not fit the devices, a checkpoint of another base or
        config, hosts that differ, a full disk, or a loss that is not finite.
      Outage: a bucket or another host fails.
    """
    check_config(config)
    # ---- hosts, mesh and base model
    hosts.check_agreement({'config': config.to_dict(), 'workdir': workdir})
    hosts.check_shared(workdir)
    mesh = sharding.make_mesh(config.mesh)
    rules = functools.partial(sharding.rules, config.get('rules'))
    with rules():
        base = load_base(config.base, config.base_dtype, mesh, config.base_quantization)
        plan = make_plan(config, base, mesh)
    learner, encoder = plan.learner, plan.learner.hypernetwork.encoder
    with jax.set_mesh(mesh), rules(), _StopOnSignal() as stop, contextlib.ExitStack() as at_end:
        # ---- data, checkpoint, metrics
        dataset = data.build(
            config.data,
            base,
            encoder,
            config.seed,
            learner.groups,
            config.accumulate,
            sharding.own_groups(mesh, learner.groups),
        )
        if len(dataset) < config.optimizer.steps:
            raise UserError(
                f'the data have {len(dataset)} steps, the training {config.optimizer.steps}: set '
                'config.optimizer.steps and the steps in config.data alike'
            )
        meta = {
            'base_fingerprint': base.fingerprint,
            'encoder_fingerprint': encoder.fingerprint,
            'rows_per_step': learner.groups * config.accumulate,
            'config': config.to_dict(),
        }
        hosts.check_agreement(meta)  # what they loaded
        checkpointer = Checkpointer(f'{workdir}/checkpoints', config.keep_checkpoints)
        start = checkpointer.latest_step()
        if start is None:
            state = plan.init(encoder.params)
            if config.init_from:
                folder, params, record = trained.read(config.init_from)
                check_models(record, meta)
                trained.check_fit(folder, plan.state.params, params)
            else:
                params = learner.hypernetwork.start(state.params)
            places = jax.tree.map(lambda x: x.sharding, plan.state.params)
            state = state.replace(params=sharding.put(params, places))
        else:
            check_meta(checkpointer.meta(start), meta)
            state = checkpointer.restore(start, plan.state)
            _report(f'resumed at step {start} from {workdir}')
        start = start or 0
        batches = iter(
            dataset[start:].to_iter_dataset(
                grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
            )
        )
        writer = MetricWriter(workdir, start) if hosts.is_first() else None
        if writer:
            at_end.callback(writer.close)
        size = sum(x.size for x in jax.tree.leaves(state.params))
        _report(
            f'{config.name}: {size / 1e6:.1f} M parameters train on {mesh.size} device(s) of '
            f'{jax.process_count()} process(es), mesh {dict(mesh.shape)}'
        )

        # ---- steps
        last_step = config.optimizer.steps
        progress = Progress(last_step, start)
        metrics, recent = None, []
        for step in range(start + 1, last_step + 1):
            batch = sharding.global_batch(next(batches), plan.batch_place)
            before, (state, metrics) = metrics, plan.step(state, plan.frozen, batch)
            jax.block_until_ready(before)  # steps are dispatched one ahead: rates are real
            progress.update(step)
            recent.append(metrics)
            stopping = stop.requested or checkpointer.reached_preemption(step)
            saving = stopping or step == last_step or step % config.checkpoint_every == 0
            if saving or step % config.log_every == 0:
                # A step holds few contexts: what is reported is the mean since the last report.
                values = {key: float(np.mean([one[key] for one in recent])) for key in metrics}
                recent.clear()
                if not all(map(math.isfinite, values.values())):
                    checkpointer.close()
                    raise UserError(
                        f'loss is not finite at step {step} ({values}); the last checkpoint is '
                        f'of step {checkpointer.latest_step()}. Lower optimizer.learning_rate or '
                        'clip_norm and start in a new workdir'
                    )
                values['learning_rate'] = float(learning_rate(config.optimizer)(step - 1))
                if writer:
                    writer.write(step, {**values, **progress.rates()})
                others = (
                    f'{name} {values[name]:.2g}  '
                    for name in ('exact', 'error', 'accuracy')
                    if name in values
                )
                _report(
                    f'{progress.line(values["loss"])}  {next(others, "")}'
                    f'shapes compiled {plan.step._cache_size()}'
                )
            if saving:
                if writer:
                    writer.flush()
                checkpointer.save(step, state, meta)
            if stopping:
                checkpointer.wait()
                _report(f'stop requested: saved step {step} in {workdir}')
                break
        checkpointer.close()
        return state


def _report(text: str) -> None:
    """Prints a line, on the first host."""
    if hosts.is_first():
        print(text, flush=True)


class _StopOnSignal:
    """Remembers a SIGTERM, so that the step in progress can finish and be saved. Several processes
    leave it to JAX, which tells it to all of them."""

    requested = False

    def __enter__(self):
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, *_):
        self.requested = True

    def __exit__(self, *_):
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
