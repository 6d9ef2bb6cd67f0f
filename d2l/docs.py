"""Training data of documents: contexts, questions about them, and the teacher's opinion.

Axes: c contexts of a group, n chunks, s chunk tokens, b queries, t query tokens, k labels, e the
teacher's top entries.

Source: Doc-to-LoRA (arXiv 2602.15902), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from d2l import chunking
from d2l.records import Joined, Record, load
from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel
from hyperlora.objectives import TEACHER_ENTRIES


class DocumentGroups:
    """Random-access source of groups; every array follows from (seed, index).

    A group is a packed row: documents of about `group_tokens` together, each with `queries`
    questions. All groups of a step hold documents of one bucket of length, split into the same
    number of chunks, so that shapes are few. Documents are drawn anew for each group, all with the
    same odds: there is no epoch.
    """

    def __init__(self, records: Joined, config: ConfigDict, seed: int, groups_per_step: int):
        """
        Args:
          config: `context_tokens`, the upper ends of the buckets of length: longer documents are
            left out; `group_tokens`; `queries` of a context; `query_tokens`, `answer_tokens`,
            `teacher_tokens`: longer questions are left out; `chunks`, the odds of splitting a
            document into 1, 2, ... chunks; `teacher`: `stored`, or `online` if it is asked in the
            training step.

        Raises:
          UserError: no documents that are short enough.
        """
        self.records, self.config = records, config
        self.seed, self.groups_per_step = seed, groups_per_step
        if config.teacher not in ('stored', 'online'):
            raise UserError(f"teacher must be 'stored' or 'online', not {config.teacher!r}")
        buckets = np.searchsorted(config.context_tokens, records.lengths)
        self.buckets = [np.flatnonzero(buckets == i) for i in range(len(config.context_tokens))]
        if not any(map(len, self.buckets)):
            raise UserError(
                f'the records hold no document of up to {config.context_tokens[-1]} tokens: '
                'raise data.context_tokens or cut the documents'
            )

    def __len__(self) -> int:
        return self.config.steps * self.groups_per_step

    def __getitem__(self, index: int) -> dict[str, dict[str, np.ndarray]]:
        """One group: `context` {tokens, mask `[n, s]`}, `query` (see `Learner.loss`) with the
        teacher's ids and log-probabilities `[b, k, e]`, or `teacher` {tokens `[b, T]`,
        label_positions `[b, k]`}."""
        c = self.config
        step = index // self.groups_per_step
        shape_rng = np.random.default_rng((self.seed, 0, step))
        rng = np.random.default_rng((self.seed, 1, index))
        counts = [_contexts(c, end) for end in c.context_tokens]
        odds = np.asarray([len(b) / n for b, n in zip(self.buckets, counts, strict=True)])
        bucket = int(shape_rng.choice(len(odds), p=odds / odds.sum()))
        contexts = counts[bucket]
        odds = np.asarray(c.chunks)
        parts = 1 + int(shape_rng.choice(len(odds), p=odds / odds.sum()))
        documents = [self.records[i] for i in rng.choice(self.buckets[bucket], contexts)]
        longest = c.context_tokens[bucket]
        length = -(-longest // parts)
        chunks = [
            part for document in documents for part in _split(rng, document.context, parts, length)
        ]
        tokens, mask = chunking.pad(chunks, length)
        own = np.repeat(np.eye(contexts, dtype=np.float32), parts, axis=1) * mask.any(1)
        rows = [self._queries(rng, document) for document in documents]
        query = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        query['chunk_weights'] = np.repeat(own, c.queries, axis=0)
        return _item({'tokens': tokens, 'mask': mask}, query)

    def _queries(self, rng: np.random.Generator, document: Record) -> dict[str, np.ndarray]:
        """The rows of some of a document's questions."""
        fit = rng.permutation(
            [i for i in range(len(document.queries)) if fits(self.config, document, i)]
        )
        return rows_of(self.config, document, fit[: self.config.queries], self.config.queries)


def fits(config: ConfigDict, document: Record, number: int) -> bool:
    """Whether a question is short enough; see `DocumentGroups`."""
    query = document.queries[number]
    return (
        len(query.prompt) + len(query.answer) - 1 <= config.query_tokens
        and len(query.answer) <= config.answer_tokens
        and (
            config.teacher == 'stored'
            or len(document.teacher_prompts[number]) + len(query.answer) - 1
            <= config.teacher_tokens
        )
    )


def rows_of(
    config: ConfigDict, document: Record, numbers: Sequence[int], count: int
) -> dict[str, np.ndarray]:
    """Questions of a document as `count` rows; what they weigh adds up to 1.

    An answer of which no teacher has an opinion is certain.
    """
    rows = _rows(config, count)
    for row, number in enumerate(numbers):
        query = document.queries[number]
        length, start = len(query.answer), len(query.prompt)
        text = np.concatenate([query.prompt, query.answer[:-1]])
        rows['tokens'][row, : len(text)] = text
        rows['labels'][row, :length] = query.answer
        rows['label_positions'][row, :length] = start - 1 + np.arange(length)
        rows['label_weights'][row, :length] = 1 / (length * len(numbers))
        if config.teacher == 'online':
            prompt = document.teacher_prompts[number]
            text = np.concatenate([prompt, query.answer[:-1]])
            rows['teacher_tokens'][row, : len(text)] = text
            rows['teacher_label_positions'][row, :length] = len(prompt) - 1 + np.arange(length)
        elif query.teacher_ids is None:
            rows['teacher_ids'][row, :length, 0] = query.answer
            rows['teacher_log_probs'][row, :length, 0] = 0
        else:
            entries = min(query.teacher_ids.shape[1], TEACHER_ENTRIES)  # the likeliest come first
            rows['teacher_ids'][row, :length, :entries] = query.teacher_ids[:, :entries]
            rows['teacher_log_probs'][row, :length, :entries] = query.teacher_log_probs[:, :entries]
    return rows


def _split(
    rng: np.random.Generator, tokens: np.ndarray, parts: int, length: int
) -> list[np.ndarray]:
    """Tokens in `parts` pieces of at most `length`, cut at random (some may be empty)."""
    pieces = []
    for left in range(parts - 1, -1, -1):
        least = max(len(tokens) - left * length, 0)
        most = min(length, len(tokens))
        cut = int(rng.integers(least, most + 1)) if left else len(tokens)
        pieces.append(tokens[:cut])
        tokens = tokens[cut:]
    return pieces


def _contexts(config: ConfigDict, tokens: int) -> int:
    """Documents of so many tokens in a group."""
    return max(config.group_tokens // tokens, 1)


def example(config: ConfigDict, base: BaseModel, encoder: BaseModel) -> dict[str, dict[str, Any]]:
    """A group of the shortest documents, with the most questions, in the most chunks; see
    `data.abstract`."""
    parts, longest = len(config.chunks), config.context_tokens[0]
    contexts = _contexts(config, longest)
    shape = (contexts * parts, -(-longest // parts))
    rows = _rows(config, contexts * config.queries)
    weights = np.zeros((contexts * config.queries, contexts * parts), np.float32)
    context = {'tokens': np.zeros(shape, np.int32), 'mask': np.ones(shape, bool)}
    return _item(context, {**rows, 'chunk_weights': weights})


def build(
    config: ConfigDict, base: BaseModel, encoder: BaseModel, seed: int, groups_per_step: int
) -> DocumentGroups:
    """The groups of a training; see `hyperlora.data`.

    Raises:
      UserError: answers of a teacher whose opinion is lacking; see `records.load` and
        `DocumentGroups`.
    """
    joined = load(config.records, base)
    for records in joined.folders:
        settings = records.meta['config']['settings']
        if config.teacher == 'stored' and settings['answers'] == 'generated':
            if not settings['entries']:
                raise UserError(
                    f'{records.folder} holds no log-probabilities: make it with settings.entries, '
                    "or train with data.teacher='online'"
                )
    return DocumentGroups(joined, config, seed, groups_per_step)


def _rows(config: ConfigDict, count: int) -> dict[str, np.ndarray]:
    """Rows without a question, which weigh nothing."""
    c = config
    rows = {
        'tokens': np.zeros((count, c.query_tokens), np.int32),
        'labels': np.zeros((count, c.answer_tokens), np.int32),
        'label_positions': np.zeros((count, c.answer_tokens), np.int32),
        'label_weights': np.zeros((count, c.answer_tokens), np.float32),
    }
    if c.teacher == 'stored':
        shape = (count, c.answer_tokens, TEACHER_ENTRIES)
        rows['teacher_ids'] = np.zeros(shape, np.int32)
        rows['teacher_log_probs'] = np.full(shape, -1e4, np.float32)
    else:
        rows['teacher_tokens'] = np.zeros((count, c.teacher_tokens), np.int32)
        rows['teacher_label_positions'] = np.zeros((count, c.answer_tokens), np.int32)
    return rows


def _item(context: dict[str, np.ndarray], query: dict[str, np.ndarray]) -> dict[str, Any]:
    """A group; what an online teacher reads apart."""
    keys = ('teacher_tokens', 'teacher_label_positions')
    teacher = {key.removeprefix('teacher_'): query.pop(key) for key in keys if key in query}
    item = {'context': context, 'query': query}
    return {**item, 'teacher': teacher} if teacher else item
