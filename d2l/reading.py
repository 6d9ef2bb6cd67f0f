"""Training data of a reader: a LoRA that answers briefly, with the document in the prompt.

It is the teacher of small models, which left alone answer in whole sentences and often wrongly.

Axes: t query tokens, k labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from d2l.records import MANY_MISSES, Joined, Record, load
from hyperlora.data.packing import pack
from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel


class Readings:
    """Random-access source of groups; every array follows from (seed, index).

    A group is a packed row: questions, each with its document before it, as many as fit. Questions
    are drawn anew for each group, all documents with the same odds: there is no epoch.
    """

    def __init__(self, records: Joined, config: ConfigDict, seed: int, groups_per_step: int):
        """
        Args:
          config: `row_tokens` t and `row_labels` k; longer questions are passed over; `steps`.

        Raises:
          UserError: no document is short enough.
        """
        self.records, self.config = records, config
        self.seed, self.length = seed, config.steps * groups_per_step
        self.short = np.flatnonzero(records.lengths < config.row_tokens)
        if not len(self.short):
            raise UserError(
                f'the records hold no document of fewer than {config.row_tokens} tokens: '
                'raise data.row_tokens'
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, dict[str, np.ndarray]]:
        """One group: `context` {task `[1]`}, the only one there is, and `query`, see `pack`."""
        rng = np.random.default_rng((self.seed, 1, index))
        query = pack(self._pairs(rng), self.config.row_tokens, self.config.row_labels)
        return {'context': {'task': np.zeros(1, np.int32)}, 'query': query}

    def _pairs(self, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(prompt with the document, answer) pairs that fit into an empty row.

        Raises:
          UserError: many in a row do not.
        """
        c = self.config
        misses = 0
        while misses < MANY_MISSES:
            document: Record = self.records[rng.choice(self.short)]
            number = rng.integers(len(document.queries))
            prompt, answer = document.teacher_prompts[number], document.queries[number].answer
            if len(prompt) + len(answer) <= c.row_tokens and len(answer) <= c.row_labels:
                yield prompt, answer
                misses = 0
            else:
                misses += 1
        raise UserError(
            f'no question with its document fits into {c.row_tokens} tokens, with an answer of at '
            f'most {c.row_labels}: raise data.row_tokens or data.row_labels'
        )


def example(config: ConfigDict, base: BaseModel, encoder: BaseModel) -> dict[str, dict[str, Any]]:
    """A group, all alike in shape; see `data.abstract`."""
    query = pack((), config.row_tokens, config.row_labels)
    return {'context': {'task': np.zeros(1, np.int32)}, 'query': query}


def build(
    config: ConfigDict, base: BaseModel, encoder: BaseModel, seed: int, groups_per_step: int
) -> Readings:
    """The groups of a training; see `hyperlora.data`.

    Raises:
      UserError: see `records.load`.
    """
    return Readings(load(config.records, base), config, seed, groups_per_step)
