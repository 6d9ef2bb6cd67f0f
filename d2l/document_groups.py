"""Training data of documents: contexts, questions about them, and the teacher's opinion.

Axes: n chunks of a group, s chunk tokens, b rows (one per context), t query tokens, T tokens that
the teacher reads, k labels of a row, e the teacher's top entries.

Source: Doc-to-LoRA (arXiv 2602.15902), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from d2l import chunking
from d2l.records import MANY_MISSES, Joined, Record, load
from hyperlora.data.packing import pack
from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel
from hyperlora.objectives import TEACHER_ENTRIES

Rows = dict[str, dict[str, np.ndarray]]


class DocumentGroups:
    """Random-access source of groups; every array follows from (seed, index).

    A group is a packed row: documents of about `group_tokens` together, each with a row of up to
    `queries` questions. All groups of a step hold documents of one bucket of length, split into the
    same number of chunks, so that shapes are few. Documents are drawn anew for each group, all with
    the same odds: there is no epoch.
    """

    def __init__(self, records: Joined, config: ConfigDict, seed: int, groups_per_step: int):
        """
        Args:
          config: `context_tokens`, the upper ends of the buckets of length: longer documents are
            left out; `group_tokens`; `queries`, the most of a context, whose row has room for
            `query_tokens` and `answer_tokens` (and the teacher's for `teacher_tokens`): questions
            that do not fit are left out, and documents that have no other; `chunks`, the odds of
            splitting a document into 1, 2, ... chunks; `together`, the odds that a group's
            documents are all in the model when it is asked about one of them; `teacher`: `stored`,
            or `online` if it is asked in the training step.

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

    def __getitem__(self, index: int) -> Rows:
        """One group: `context` {tokens, mask `[n, s]`}, `query` (see `Learner.loss`) with the
        teacher's ids and log-probabilities `[b, k, e]`, or `teacher` {tokens, positions, segments
        `[b, T]`, label_positions `[b, k]`}. Rows of one question (`queries` 1) have neither
        positions nor segments."""
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
        drawn = [self._draw(rng, self.buckets[bucket]) for _ in range(contexts)]
        documents, rows = zip(*drawn, strict=True)
        longest = c.context_tokens[bucket]
        length = -(-longest // parts)
        chunks = [
            part for document in documents for part in _split(rng, document.context, parts, length)
        ]
        tokens, mask = chunking.pad(chunks, length)
        read = np.eye(contexts) if rng.random() >= c.together else np.ones((contexts, contexts))
        weights = np.repeat(read.astype(np.float32), parts, axis=1) * mask.any(1)
        return _group(tokens, mask, weights, join(rows))

    def _draw(self, rng: np.random.Generator, bucket: np.ndarray) -> tuple[Record, Rows]:
        """A document of a bucket, and the row of some of its questions.

        Raises:
          UserError: many in a row have no question that fits.
        """
        for _ in range(MANY_MISSES):
            document = self.records[rng.choice(bucket)]
            chosen: list[int] = []
            for number in rng.permutation(len(document.queries)):
                more = [*chosen, number]
                if len(more) <= self.config.queries and fit(self.config, document, more):
                    chosen = more
            if chosen:
                return document, row_of(self.config, document, chosen)
        raise UserError(
            'no question of the documents fits into its row: raise data.query_tokens, '
            'data.answer_tokens or, with a teacher online, data.teacher_tokens'
        )


def fit(config: ConfigDict, document: Record, numbers: Sequence[int]) -> bool:
    """Whether these questions of a document have room in one row; see `DocumentGroups`."""
    queries = [document.queries[number] for number in numbers]
    answers = sum(len(query.answer) for query in queries)

    def tokens(prompts):
        return sum(map(len, prompts)) + answers - len(queries)

    return (
        answers <= config.answer_tokens
        and tokens(query.prompt for query in queries) <= config.query_tokens
        and (
            config.teacher == 'stored'
            or tokens(document.teacher_prompts[number] for number in numbers)
            <= config.teacher_tokens
        )
    )


def row_of(config: ConfigDict, document: Record, numbers: Sequence[int]) -> Rows:
    """Questions of a document, which have room, as one row (see `hyperlora.data.packing.pack`);
    what they weigh adds up to 1.

    An answer of which no teacher has an opinion is certain.

    Returns:
      `query`, with the teacher's ids and log-probabilities, or `query` and what the `teacher` is
      to read; see `DocumentGroups`.
    """
    queries = [document.queries[number] for number in numbers]

    def packed(prompts, tokens):
        pairs = zip(prompts, (query.answer for query in queries), strict=True)
        row = pack(pairs, tokens, config.answer_tokens)
        # Attention has faster kernels where rows hold one text.
        left_out = ('positions', 'segments') if config.queries == 1 else ()
        return {key: value for key, value in row.items() if key not in left_out}

    row = packed((query.prompt for query in queries), config.query_tokens)
    del row['chunk_weights']
    row['label_weights'] /= max(len(queries), 1)
    if config.teacher == 'online':
        prompts = (document.teacher_prompts[number] for number in numbers)
        teacher = packed(prompts, config.teacher_tokens)
        of_answers = ('labels', 'label_weights', 'chunk_weights')
        return {'query': row, 'teacher': {k: v for k, v in teacher.items() if k not in of_answers}}
    shape = (1, config.answer_tokens, TEACHER_ENTRIES)
    ids, log_probs = np.zeros(shape, np.int32), np.full(shape, -1e4, np.float32)
    start = 0
    for query in queries:
        end = start + len(query.answer)
        if query.teacher_ids is None:
            ids[0, start:end, 0], log_probs[0, start:end, 0] = query.answer, 0
        else:
            entries = min(query.teacher_ids.shape[1], TEACHER_ENTRIES)  # the likeliest come first
            ids[0, start:end, :entries] = query.teacher_ids[:, :entries]
            log_probs[0, start:end, :entries] = query.teacher_log_probs[:, :entries]
        start = end
    return {'query': {**row, 'teacher_ids': ids, 'teacher_log_probs': log_probs}}


def join(rows: Sequence[Rows]) -> Rows:
    """Rows below each other."""
    return {
        part: {key: np.concatenate([row[part][key] for row in rows]) for key in arrays}
        for part, arrays in rows[0].items()
    }


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


def example(config: ConfigDict, base: BaseModel, encoder: BaseModel) -> Rows:
    """A group of the most tokens, in the most chunks; see `data.abstract`."""
    parts = len(config.chunks)
    longest = max(config.context_tokens, key=lambda length: _contexts(config, length) * length)
    contexts = _contexts(config, longest)
    shape = (contexts * parts, -(-longest // parts))
    rows = join([row_of(config, Record('', np.zeros(0, np.int32), (), ()), [])] * contexts)
    weights = np.zeros((contexts, contexts * parts), np.float32)
    return _group(np.zeros(shape, np.int32), np.ones(shape, bool), weights, rows)


def build(
    config: ConfigDict, base: BaseModel, encoder: BaseModel, seed: int, groups_per_step: int
) -> DocumentGroups:
    """The groups of a training; see `hyperlora.data`.

    Raises:
      UserError: contexts for another encoder, or answers of a teacher whose opinion is lacking; see
        `records.load` and `DocumentGroups`.
    """
    joined = load(config.records, base)
    for records in joined.folders:
        settings = records.meta['config']['settings']
        made_for = records.meta.get('encoder_fingerprint')
        if made_for != encoder.fingerprint:
            raise UserError(
                f'{records.folder} holds contexts for the encoder {made_for}, not for '
                f'{encoder.fingerprint} ({encoder.name}): make them with launch.generate_data, '
                '--config.encoder as in the training'
            )
        if config.teacher == 'stored' and settings['answers'] == 'generated':
            if not settings['entries']:
                raise UserError(
                    f'{records.folder} holds no log-probabilities: make it with settings.entries, '
                    "or train with data.teacher='online'"
                )
    return DocumentGroups(joined, config, seed, groups_per_step)


def _group(tokens: np.ndarray, mask: np.ndarray, chunk_weights: np.ndarray, rows: Rows) -> Rows:
    query = {**rows['query'], 'chunk_weights': chunk_weights}
    return {'context': {'tokens': tokens, 'mask': mask}, **rows, 'query': query}
