"""Short examples in one row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def pack(
    pairs: Iterable[tuple[list[int], list[int]]], tokens: int, labels: int
) -> dict[str, np.ndarray]:
    """The first (prompt, answer) pairs, as many as fit, as one row of t tokens and k labels.

    Returns:
      tokens, positions and segments `[1, t]`; labels, label_positions and label_weights `[1, k]`,
      where each pair weighs 1; chunk_weights `[1, 1]`.
    """
    row = {
        **{key: np.zeros((1, tokens), np.int32) for key in ('tokens', 'positions', 'segments')},
        **{key: np.zeros((1, labels), np.int32) for key in ('labels', 'label_positions')},
        'label_weights': np.zeros((1, labels), np.float32),
        'chunk_weights': np.ones((1, 1), np.float32),
    }
    start = first = 0
    for segment, (prompt, answer) in enumerate(pairs, start=1):
        text = [*prompt, *answer[:-1]]
        end, last = start + len(text), first + len(answer)
        if end > tokens or last > labels:
            break
        row['tokens'][0, start:end] = text
        row['positions'][0, start:end] = np.arange(len(text))
        row['segments'][0, start:end] = segment
        row['labels'][0, first:last] = answer
        row['label_positions'][0, first:last] = start + len(prompt) - 1 + np.arange(len(answer))
        row['label_weights'][0, first:last] = 1 / len(answer)
        start, first = end, last
    return row


def unpacked(
    pairs: Iterable[tuple[list[int], list[int]]], tokens: int, labels: int
) -> dict[str, np.ndarray]:
    """Each (prompt, answer) pair, which must fit, in a row of its own, b in all.

    Returns:
      tokens `[b, t]`; labels, label_positions and label_weights `[b, k]`.
    """
    rows = [pack([pair], tokens, labels) for pair in pairs]
    keys = ('tokens', 'labels', 'label_positions', 'label_weights')
    return {key: np.concatenate([row[key] for row in rows]) for key in keys}
