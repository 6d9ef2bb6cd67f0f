"""Documents of any length -> chunks that the context encoder can read.

Source: Doc-to-LoRA (arXiv 2602.15902), section 3.4: chunks are encoded independently and their
LoRAs concatenated along the rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hyperlora.models.tokenizers import Tokenizer


def sentence_ends(tokens: Sequence[int], tokenizer: Tokenizer) -> np.ndarray:
    """Positions at which a chunk may begin, ascending: after a sentence end or a line break."""
    ends, starts = tokenizer.boundaries
    tokens = np.asarray(tokens)
    return np.flatnonzero(ends[tokens[:-1]] & starts[tokens[1:]]) + 1


def split(tokens: Sequence[int], tokenizer: Tokenizer, max_tokens: int) -> list[list[int]]:
    """Cuts a document into chunks of at most `max_tokens`, at sentence ends where there are any.

    A sentence cut in two would be seen whole by no chunk. Where the second half of a window holds
    no sentence end, the cut falls at the window's end.
    """
    tokens = list(tokens)
    allowed = sentence_ends(tokens, tokenizer)
    chunks, start = [], 0
    while len(tokens) - start > max_tokens:
        last = start + max_tokens
        i = np.searchsorted(allowed, last, side='right') - 1
        cut = int(allowed[i]) if i >= 0 and allowed[i] > start + max_tokens // 2 else last
        chunks.append(tokens[start:cut])
        start = cut
    return [*chunks, tokens[start:]]


def pad(chunks: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks -> tokens `[n, s]` int32 and mask `[n, s]` bool, s = length."""
    tokens = np.zeros((len(chunks), length), np.int32)
    mask = np.zeros((len(chunks), length), bool)
    for i, chunk in enumerate(chunks):
        tokens[i, : len(chunk)] = chunk
        mask[i, : len(chunk)] = True
    return tokens, mask
