"""Greedy generation with a KV cache and a LoRA per row.

Axes: b rows, s prompt tokens, g LoRA rows, r rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hyperlora.errors import UserError
from hyperlora.lora import Lora
from hyperlora.models.base import BaseModel
from hyperlora.models.decoder import Decoder


@functools.partial(jax.jit, static_argnames=('decoder', 'max_new_tokens'))
def greedy(
    decoder: Decoder,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    eos_id: int,
    max_new_tokens: int,
    lora: Lora | None = None,
    rank_weights: jax.Array | None = None,
) -> jax.Array:
    """The most likely continuation of each prompt, token by token.

    Args:
      prompts: `[b, s]` int32, padded to the right.
      lengths: `[b]` int32, tokens of each prompt.
      eos_id: ends a row.
      lora: LoRA whose rows divide b, or None.
      rank_weights: `[b, r]` or None; see `lora.project`.

    Returns:
      `[b, max_new_tokens]` int32, `eos_id` from the end of each answer on.
    """
    room = prompts.shape[1] + max_new_tokens
    token, cache = _begin(decoder, params, prompts, lengths, room, lora, rank_weights)
    answers = jnp.full((len(prompts), max_new_tokens), eos_id, jnp.int32).at[:, 0].set(token)

    def running(carry):
        i, token, *_ = carry
        return (i < max_new_tokens) & (token != eos_id).any()

    def advance(carry):
        i, token, answers, cache = carry
        ended = token == eos_id
        token, cache = _advance(decoder, params, token, lengths + i - 1, cache, lora, rank_weights)
        token = jnp.where(ended, eos_id, token)
        return i + 1, token, answers.at[:, i].set(token), cache

    answers = jax.lax.while_loop(running, advance, (1, token, answers, cache))[2]
    return nn.with_logical_constraint(answers, (None, None))  # each process reads all of them


@functools.partial(jax.jit, static_argnames=('decoder', 'room'))
def _begin(decoder, params, prompts, lengths, room, lora=None, rank_weights=None):
    """First token of each answer `[b]`, and the KV cache for `room` tokens."""
    out = decoder.apply(
        {'params': params}, prompts, lora=lora, rank_weights=rank_weights, cache_length=room
    )
    last = jnp.take_along_axis(out.hidden, lengths[:, None, None] - 1, 1)[:, 0]
    return _likeliest(decoder, params, last), out.cache


@functools.partial(jax.jit, static_argnames='decoder', donate_argnames='cache')
def _advance(decoder, params, tokens, places, cache, lora=None, rank_weights=None):
    """The tokens after `tokens [b]`, which stand at `places [b]`, and the cache with those."""
    out = decoder.apply(
        {'params': params},
        tokens[:, None],
        positions=places[:, None],
        cache=cache,
        lora=lora,
        rank_weights=rank_weights,
    )
    return _likeliest(decoder, params, out.hidden[:, 0]), out.cache


def _likeliest(decoder, params, hidden):
    logits = decoder.apply({'params': params}, hidden, method='unembed')
    return logits.argmax(-1).astype(jnp.int32)


def bucket(length: int, step: int = 32) -> int:
    """Rounds a length up to a power of two times `step`, past 512 to a multiple of 512, so that
    few shapes are compiled."""
    if length > 512:
        return -(-length // 512) * 512
    size = step
    while size < length:
        size *= 2
    return size


def answer(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    lora: Lora | None = None,
    rank_weights: np.ndarray | None = None,
) -> list[str]:
    """Greedy answers as text, without white space before it.

    Args:
      prompts: token ids of each row, as from `Tokenizer.prompt`.
      lora, rank_weights: see `greedy`.

    Raises:
      UserError: a prompt and its answer do not fit into the base model's window.
    """
    return _texts(base, _answer(base, prompts, max_new_tokens, lora, rank_weights))


def _answer(base, prompts, max_new_tokens, lora=None, rank_weights=None) -> list[list[int]]:
    """As `answer`, the ids, with the end of the turn where an answer comes to it."""
    longest = max(map(len, prompts))
    _check_window(base, longest, max_new_tokens)
    tokens = np.zeros((len(prompts), bucket(longest, 16)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    eos_id = base.tokenizer.eos_id
    out = greedy(
        Decoder(base.config),
        base.params,
        tokens,
        np.asarray([len(p) for p in prompts], np.int32),
        eos_id,
        max_new_tokens,
        lora,
        None if rank_weights is None else jnp.asarray(rank_weights),
    )
    return [
        (row[: np.argmax(row == eos_id) + 1] if eos_id in row else row).tolist()
        for row in np.asarray(out)
    ]


def _texts(base: BaseModel, answers: Sequence[list[int]]) -> list[str]:
    end = base.tokenizer.eos_id
    return [base.tokenizer.decode([i for i in ids if i != end]).lstrip() for ids in answers]


def _check_window(base: BaseModel, tokens: int, max_new_tokens: int) -> None:
    if tokens + max_new_tokens > base.config.max_length:
        raise UserError(
            f'a prompt of {tokens} tokens and {max_new_tokens} new ones do not fit into the '
            f'window of {base.config.max_length} tokens of {base.name}; shorten the prompt, or '
            'internalise the document instead (launch.adapt)'
        )


def stream(
    base: BaseModel, prompt: Sequence[int], max_new_tokens: int, lora: Lora | None = None
) -> Iterator[str]:
    """The greedy answer to one prompt, in pieces as they come; together what `answer` returns.

    Raises:
      UserError: see `answer`.
    """
    _check_window(base, len(prompt), max_new_tokens)
    length = bucket(len(prompt), 16)
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(prompt)] = prompt
    decoder, eos_id = Decoder(base.config), base.tokenizer.eos_id
    # Of a few sizes, so that shapes are few.
    room = length + bucket(max_new_tokens)
    token, cache = _begin(decoder, base.params, tokens, np.int32([len(prompt)]), room, lora)
    found: list[int] = []
    told = ''
    for count in range(max_new_tokens):
        if int(token[0]) == eos_id:
            break
        found.append(int(token[0]))
        text = base.tokenizer.decode(found).lstrip()
        if text != told and not text.endswith('\ufffd'):  # else a character is not whole yet
            yield text[len(told) :]
            told = text
        if count + 1 < max_new_tokens:
            places = np.int32([len(prompt) + count])
            token, cache = _advance(decoder, base.params, token, places, cache, lora)
    if text := base.tokenizer.decode(found).lstrip()[len(told) :]:
        yield text


def answer_in_batches(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    lora: Lora | None = None,
) -> list[str]:
    """Answers in order, as by `answer`, of any number of prompts, for a LoRA of one row."""
    return _texts(base, answer_tokens(base, prompts, max_new_tokens, lora))


def answer_tokens(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    lora: Lora | None = None,
    tokens: int = 16_384,
) -> list[list[int]]:
    """As `answer_in_batches`, the ids, with the end of the turn where an answer comes to it.

    Args:
      tokens: of the prompts of a batch, which bound its memory. Batches are padded to powers of
        two, so that few shapes are compiled.
    """
    if not prompts:
        return []
    most = max(tokens // bucket(max(map(len, prompts))), 1)
    answers: list[list[int]] = []
    for start in range(0, len(prompts), most):
        batch = list(prompts[start : start + most])
        size = 1 << (len(batch) - 1).bit_length()
        padded = batch + batch[-1:] * (size - len(batch))
        answers += _answer(base, padded, max_new_tokens, lora)[: len(batch)]
    return answers


@functools.partial(jax.jit, static_argnames=('decoder', 'entries'))
def top_log_probs(
    decoder: Decoder,
    params: Any,
    tokens: jax.Array,
    label_positions: jax.Array,
    entries: int,
    lora: Lora | None = None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The most likely tokens at some places, as a teacher's opinion.

    Args:
      tokens: `[b, s]` int32, padded to the right.
      label_positions: `[b, k]`, of the hidden state that predicts each label.
      entries: e, how many tokens.
      lora: LoRA whose rows divide b, or None.
      positions, segments: `[b, s]` int32 of packed rows, or None.

    Returns:
      ids `[b, k, e]` int32 and their log-probabilities under the whole distribution, f32.
    """
    hidden = decoder.apply({'params': params}, tokens, positions, segments, lora).hidden
    hidden = jnp.take_along_axis(hidden, label_positions[..., None], 1)

    # A label of all rows at a time: the logits of a vocabulary are large, and rows are divided over
    # devices.
    def place(hidden):
        logits = decoder.apply({'params': params}, hidden, method='unembed')
        return jax.lax.top_k(jax.nn.log_softmax(logits), entries)

    log_probs, ids = jax.lax.map(place, hidden.swapaxes(0, 1))
    return ids.swapaxes(0, 1), log_probs.swapaxes(0, 1)
