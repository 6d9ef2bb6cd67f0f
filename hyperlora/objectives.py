"""Objectives of meta-learning: what the adapted model is trained towards.

Axes: b rows, k labels per row, v vocabulary, t teacher's top entries, l layers, n chunks, r rank.

Losses are (sum, weight) pairs, divided once after all microbatches and devices are added up, so
that accumulation and packing change nothing. Label weights come with the batch: 1 for each label
averages over tokens; 1 / (labels of the query x queries of the context) averages per context, as
Doc-to-LoRA does, and makes the total weight the number of contexts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hyperlora.lora import Lora


def cross_entropy(logits: jax.Array, query: dict[str, jax.Array]) -> jax.Array:
    """Negative log-likelihood of each label, `[b, k]` f32.

    Args:
      logits: `[b, k, v]` at the label positions.
      query: holds `labels [b, k]`.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, query['labels'][..., None], -1)[..., 0]


def top_k_distillation(logits: jax.Array, query: dict[str, jax.Array]) -> jax.Array:
    """`-sum_t p_teacher log q_student` over the teacher's top entries as stored, `[b, k]` f32.

    Not renormalised over the top entries (Doc-to-LoRA, section 3.3).

    Args:
      logits: `[b, k, v]` at the label positions.
      query: holds `teacher_ids [b, k, t]` and `teacher_log_probs [b, k, t]`.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    student = jnp.take_along_axis(log_probs, query['teacher_ids'], -1)
    return -jnp.sum(jnp.exp(query['teacher_log_probs']) * student, -1)


OBJECTIVES = {'cross_entropy': cross_entropy, 'top_k_distillation': top_k_distillation}


def l1_of_generated(
    chunks: Lora,
    shared: Lora | None,
    chunk_mask: jax.Array,
    num_contexts: jax.Array | float,
    max_chunks: int,
) -> jax.Array:
    """Mean absolute entry of A plus that of B, summed over contexts, averaged over modules.

    As in the original, the mean of a context runs over `max_chunks + 1` ranks blocks (the last is
    the shared LoRA), absent chunks counting as zeros.

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
        per_chunk = jnp.abs(x.astype(jnp.float32)).sum((0, 2, 3))
        total = (per_chunk * chunk_mask).sum()
        if common is not None:
            total += num_contexts * jnp.abs(common.astype(jnp.float32)).sum()
        layers, _, rank, width = x.shape
        blocks = max_chunks + (common is not None)
        return total / (layers * blocks * rank * width)

    common = {} if shared is None else shared.pairs
    terms = []
    for name, pair in chunks.pairs.items():
        own: Any = common.get(name)
        terms += [factor(pair.a, own and own.a), factor(pair.b, own and own.b)]
    return sum(terms) / len(chunks.pairs)
