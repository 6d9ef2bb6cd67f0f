"""Objectives of meta-learning: what the generated LoRAs are trained towards.

Axes: b rows, k labels per row, d width, v vocabulary, e teacher's top entries, l layers, n chunks,
r rank, i and o a module's widths.

Losses are sums with weights, divided once after all microbatches and devices are added up, so that
accumulation and packing change nothing. Label weights come with the batch: 1 for each label
averages over tokens; 1 / labels of the row averages per row; 1 / (labels of the query x queries of
the context) averages per context, as Doc-to-LoRA does, and makes the total weight the number of
contexts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hyperlora.errors import UserError
from hyperlora.lora import Lora, LoraPair

TEACHER_ENTRIES = 16  # of a teacher's distribution, which distillation keeps

# Name of a metric -> (sum, weight).
Sums = dict[str, tuple[jax.Array, jax.Array]]


class AdaptedModel(NamedTuple):
    """The frozen model, to be adapted.

    Attributes:
      hidden: (chunks, shared, query) -> its hidden states at the labels, `[b, k, d]`.
      unembed: hidden states -> logits, `[..., d]` -> `[..., v]`.
    """

    hidden: Callable[[Lora, Lora | None, dict[str, jax.Array]], jax.Array]
    unembed: Callable[[jax.Array], jax.Array]


def cross_entropy(
    logits: jax.Array, query: dict[str, jax.Array], smoothing: float = 0.0
) -> jax.Array:
    """Negative log-likelihood of each label, `[b, k]` f32.

    Args:
      logits: `[b, k, v]` at the label positions.
      query: holds `labels [b, k]`.
      smoothing: share of the target that is spread over the whole vocabulary.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(log_probs, query['labels'][..., None], -1)[..., 0]
    return (1 - smoothing) * loss - smoothing * log_probs.mean(-1) if smoothing else loss


def top_k_distillation(logits: jax.Array, query: dict[str, jax.Array]) -> jax.Array:
    """`-sum_e p_teacher log q_student` over the teacher's top entries as stored, `[b, k]` f32.

    Not renormalised over the top entries (Doc-to-LoRA, section 3.3).

    Args:
      logits: `[b, k, v]` at the label positions.
      query: holds `teacher_ids [b, k, e]` and `teacher_log_probs [b, k, e]`.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    student = jnp.take_along_axis(log_probs, query['teacher_ids'], -1)
    return -jnp.sum(jnp.exp(query['teacher_log_probs']) * student, -1)


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """The adapted model should give the labels.

    Attributes:
      token_loss: (logits at the labels, query) -> `[b, k]`.
      l1: coefficient of the L1 penalty on generated A and B, per context (Doc-to-LoRA).
      max_chunks: chunks of the longest context (that penalty's mean runs over them).
      l2: coefficient of the penalty on the mean squares of A and B (Text-to-LoRA).
      label_block: how many labels of every row have logits at a time, the rest being computed again
        for the gradient: vocabularies are large. It divides k; 0 for all at once.
    """

    token_loss: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]
    l1: float = 0.0
    max_chunks: int = 1
    l2: float = 0.0
    label_block: int = 0

    def __call__(
        self,
        chunks: Lora,
        shared: Lora | None,
        batch: dict[str, dict[str, jax.Array]],
        model: AdaptedModel,
    ) -> tuple[jax.Array, Sums]:
        """Sum of losses over a microbatch, and what is reported.

        Args:
          chunks: one row per context chunk.
          shared: the LoRA that all contexts share.
          batch: `context` and `query`, see `meta_learning.Learner.loss`.
          model: what the LoRAs adapt.

        Raises:
          UserError: `label_block` does not divide k.
        """
        query = batch['query']
        losses, right = self._of_labels(model, model.hidden(chunks, shared, query), query)
        weights = query['label_weights']
        total, weight = (weights * losses).sum(), weights.sum()
        asked = (weights > 0).any(-1)
        exact = asked & (right | (weights == 0)).all(-1)
        sums = {
            'loss': (total, weight),
            'accuracy': ((weights * right).sum(), weight),  # of labels
            # Rows of which all labels are right, of those that have any.
            'exact': (exact.sum().astype(jnp.float32), asked.sum().astype(jnp.float32)),
        }
        if self.l1:
            mask = batch['context']['mask'].any(-1)
            l1 = l1_of_generated(chunks, shared, mask, weight, self.max_chunks)
            sums['l1'] = l1, weight
            total += self.l1 * l1
        if self.l2:
            l2 = weight * l2_of_generated(chunks)
            sums['l2'] = l2, weight
            total += self.l2 * l2
        return total, sums

    def _of_labels(
        self, model: AdaptedModel, hidden: jax.Array, query: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of each label, and whether it is the likeliest token, `[b, k]`."""

        def of_block(block):
            hidden, labels = block
            logits = model.unembed(hidden)
            return self.token_loss(logits, labels), logits.argmax(-1) == labels['labels']

        keys = ('labels', 'teacher_ids', 'teacher_log_probs')
        whole = hidden, {key: query[key] for key in keys if key in query}
        if not self.label_block:
            return of_block(whole)
        rows, count, _ = hidden.shape
        if count % self.label_block:
            raise UserError(
                f'objective.label_block ({self.label_block}) does not divide {count} labels'
            )

        def split(x):
            return x.reshape(rows, -1, self.label_block, *x.shape[2:]).swapaxes(0, 1)

        found = jax.lax.map(jax.checkpoint(of_block), jax.tree.map(split, whole))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, count), found)


def l1_of_generated(
    chunks: Lora,
    shared: Lora | None,
    chunk_mask: jax.Array,
    num_contexts: jax.Array | float,
    max_chunks: int,
) -> jax.Array:
    """Mean absolute entry of A plus that of B, summed over contexts, averaged over modules.

    As in the original, the mean of a context runs over `max_chunks + 1` blocks of ranks (the last
    is the shared LoRA), absent chunks counting as zeros; each counts alike, whatever its rank.

    Args:
      chunks: one row per chunk.
      shared: the shared LoRA (counted once per context), or None.
      chunk_mask: `[n]`, 1 for real chunks, 0 for padding.
      num_contexts: contexts in the batch.
      max_chunks: chunks of the longest context.

    Returns:
      Scalar f32, a sum over contexts.
    """

    def factor(x, common):
        per_chunk = jnp.abs(x.astype(jnp.float32)).mean((0, 2, 3))
        total = (per_chunk * chunk_mask).sum()
        if common is not None:
            total += num_contexts * jnp.abs(common.astype(jnp.float32)).mean()
        return total / (max_chunks + (common is not None))

    common = {} if shared is None else shared.pairs
    terms = []
    for name, pair in chunks.pairs.items():
        own: Any = common.get(name)
        terms += [factor(pair.a, own and own.a), factor(pair.b, own and own.b)]
    return sum(terms) / len(chunks.pairs)


def l2_of_generated(loras: Lora) -> jax.Array:
    """Mean square of A plus that of B, added over modules; scalar f32 (Text-to-LoRA's code)."""
    means = [jnp.square(x.astype(jnp.float32)).mean() for x in jax.tree.leaves(loras.pairs)]
    return sum(means)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The generated LoRAs should be given ones: the mean absolute difference (Text-to-LoRA,
    section 3.2).

    Attributes:
      delta: compare delta W = B A, times 10,000, rather than A and B.
    """

    delta: bool = False

    def __call__(
        self,
        chunks: Lora,
        shared: None,
        batch: dict[str, dict[str, Any]],
        model: Any = None,
    ) -> tuple[jax.Array, Sums]:
        """Sum of losses over a microbatch, and what is reported.

        Args:
          chunks: n generated LoRAs, one each.
          shared: there is none.
          batch: `target`: module -> a `[n, l, r, i]` and b `[n, l, r, o]`; where the hypernetwork
            makes z-scores, also a_deviation and b_deviation of the same shapes, which the
            differences are divided by.
          model: not used; what other objectives take.
        """
        compare = _delta_error if self.delta else _factor_error
        target = batch['target']
        loss, error = (
            sum(terms) / len(target)
            for terms in zip(*(compare(chunks.pairs[k], target[k]) for k in target), strict=True)
        )
        count = jnp.float32(chunks.rows)
        return count * loss, {'loss': (count * loss, count), 'error': (count * error, count)}


_DELTA_SCALE = 10_000


def _factor_error(pair: LoraPair, target: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Mean absolute difference of A and of B, halved and added: scaled, and as it is."""
    loss = error = 0.0
    for key, generated in (('a', pair.a), ('b', pair.b)):
        difference = jnp.abs(generated.swapaxes(0, 1) - target[key])
        error += difference.mean() / 2
        if f'{key}_deviation' in target:
            difference /= target[f'{key}_deviation'] + 1e-10
        loss += difference.mean() / 2
    return loss, error


def _delta_error(pair: LoraPair, target: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Mean absolute difference of B A: times 10,000, and as it is."""

    @jax.checkpoint  # a layer at a time: delta W is large
    def layer(factors):
        a, b, target_a, target_b = factors
        delta = jnp.einsum('nro,nri->noi', b, a) - jnp.einsum('nro,nri->noi', target_b, target_a)
        return jnp.abs(delta).mean()

    targets = (target[key].swapaxes(0, 1) for key in 'ab')
    error = jax.lax.map(layer, (pair.a, pair.b, *targets)).mean()
    return _DELTA_SCALE * error, error


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Soft tokens, unembedded, should give the words of the labels in their order. This takes no
    pass of the frozen model.

    Attributes:
      places: t, the last soft tokens of a row, which the first t labels belong to. If there are
        fewer labels, the last one is repeated.
    """

    places: int

    def __call__(
        self,
        chunks: jax.Array,
        shared: None,
        batch: dict[str, dict[str, jax.Array]],
        model: AdaptedModel,
    ) -> tuple[jax.Array, Sums]:
        """Sum of losses over a microbatch, and what is reported.

        Args:
          chunks: soft tokens `[b, p + t, d]`.
          shared: there is none.
          batch: `query`: labels and label_weights `[b, k]`.
          model: what unembeds them.
        """
        query = batch['query']
        last = (query['label_weights'] > 0).sum(1, keepdims=True) - 1
        places = jnp.minimum(jnp.arange(self.places), last)
        labels = jnp.take_along_axis(query['labels'], places, 1)
        logits = model.unembed(chunks[:, -self.places :])
        right = (logits.argmax(-1) == labels).astype(jnp.float32)
        weight = jnp.float32(labels.size)
        total = cross_entropy(logits, {'labels': labels}).sum()
        return total, {'loss': (total, weight), 'accuracy': (right.sum(), weight)}


def _cross_entropy(label_smoothing: float = 0.0, **settings: Any) -> LanguageModelling:
    token_loss = functools.partial(cross_entropy, smoothing=label_smoothing)
    return LanguageModelling(token_loss, **settings)


OBJECTIVES = {
    'cross_entropy': _cross_entropy,
    'top_k_distillation': functools.partial(LanguageModelling, top_k_distillation),
    'reconstruction': Reconstruction,
    'alignment': Alignment,
}


Objective = LanguageModelling | Reconstruction | Alignment


def build(config: ConfigDict) -> Objective:
    """The objective `config.name`; what else the config says are its settings.

    Raises:
      UserError: no objective of that name, or no such setting.
    """
    settings = config.to_dict()
    name = settings.pop('name')
    if name not in OBJECTIVES:
        raise UserError(f'unknown objective {name!r}; known: {", ".join(OBJECTIVES)}')
    try:
        return OBJECTIVES[name](**settings)
    except TypeError as error:
        raise UserError(f'objective {name}: {error}') from error
