"""Scores of an answer against the accepted ones: the best over those, from 0 to 1.

SQuAD's exact match and F1 (Rajpurkar et al., 2016), ROUGE-L (by rouge-score; the metric that the
Doc-to-LoRA paper names) and the order-free F1 over words that its published evaluation computes.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = re.compile(f'[{re.escape(string.punctuation)}]')
# Typographic marks, which are no ASCII punctuation, and invisible ones.
_TYPOGRAPHY = str.maketrans(
    dict(zip('\u201c\u201d\u2018\u2019\u2013\u2014\u2026\u00a0', '""\'\'--. ', strict=True))
    | dict.fromkeys('\u00ad\u200b\u200c\u200d\ufeff')
)


def normalize(text: str, mark: str = '') -> str:
    """Lower case, without articles and surplus white space; punctuation becomes `mark`."""
    return ' '.join(_ARTICLES.sub(' ', _PUNCTUATION.sub(mark, text.lower())).split())


def exact(answer: str, accepted: Sequence[str]) -> float:
    """SQuAD's exact match."""
    return float(any(normalize(answer) == normalize(text) for text in accepted))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """SQuAD's F1 over words."""
    return max(_overlap(normalize(answer), normalize(text)) for text in accepted)


def order_free_f1(answer: str, accepted: Sequence[str]) -> float:
    """F1 over words, all punctuation being gaps between words."""

    def words(text):
        return normalize(text.translate(_TYPOGRAPHY), ' ')

    return max(_overlap(words(answer), words(text)) for text in accepted)


def rouge_l(answer: str, accepted: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words."""
    return max(_rouge().score(text, answer)['rougeL'].fmeasure for text in accepted)


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    'exact': exact,
    'f1': f1,
    'rouge_l': rouge_l,
    'order_free_f1': order_free_f1,
}


def _overlap(answer: str, accepted: str) -> float:
    """Harmonic mean of precision and recall of words; 1 if both are empty."""
    a, b = (collections.Counter(text.split()) for text in (answer, accepted))
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


@functools.cache
def _rouge():
    from rouge_score import rouge_scorer  # slow to import

    return rouge_scorer.RougeScorer(['rougeL'])
