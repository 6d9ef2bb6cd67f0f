"""Questions about any text that need no teacher: fill a gap, complete or repeat a sentence.

They stretch little data: a document without questions can be trained on as well (after SHINE and
Generative Adapter, which pretrain on reconstruction and completion).
"""

from __future__ import annotations

import re
import zlib

import numpy as np

from d2l.documents import Document, Question

_SENTENCE = re.compile(r'[^.!?\n]+(?:[.!?](?!\s|$)[^.!?\n]*)*[.!?]')
# What a gap hides, the first kind that a sentence has: a name or a number, else a long word.
_HIDDEN = (
    re.compile(r'(?<=[\w,;] )(?:[A-Z][\w\'-]*(?: (?=[A-Z]))?)+|\b\d[\d.,]*\d\b|\b\d+\b'),
    re.compile(r'\b[a-z]{6,}\b'),
)
_GAP = (
    'Fill in the blank: {}',
    'What belongs in the gap? {}',
    'Which words are missing here? {}',
)
_END = ('Complete the sentence: {}', 'How does this go on? {}', 'Continue: {}')
_REPEAT = ('Repeat the text.', 'What does the text say?', 'Recite the text word for word.')
_TAIL_WORDS = 8  # of a sentence's end that is asked for


def ask(document: Document, count: int) -> tuple[Question, ...]:
    """At most `count` questions, gaps and ends of sentences by turns; they follow from the
    document's name and text."""
    rng = _rng(document)
    sentences = _sentences(document)
    found = []
    for number, index in enumerate(rng.permutation(len(sentences))[:count]):
        make = _gap if number % 2 == 0 else _end
        question = make(rng, sentences[index])
        if question is not None:
            found.append(question)
    return tuple(found)


def restate(document: Document) -> list[Document]:
    """Each sentence as a document of its own, named NAME#NUMBER, which is to be repeated: every
    token of a context is a label, so that little text teaches much."""
    rng = _rng(document)
    return [
        Document(
            f'{document.name}#{number}',
            sentence,
            (Question(_REPEAT[rng.integers(len(_REPEAT))], (sentence,)),),
        )
        for number, sentence in enumerate(_sentences(document))
    ]


def _rng(document: Document) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(document.name.encode()))


def _sentences(document: Document) -> list[str]:
    sentences = [' '.join(s.split()) for s in _SENTENCE.findall(document.text)]
    return [s for s in sentences if 6 <= len(s.split()) <= 40]


def _gap(rng: np.random.Generator, sentence: str) -> Question | None:
    for kind in _HIDDEN:
        spans = [match.span() for match in kind.finditer(sentence) if match.start()]
        if spans:
            start, end = spans[rng.integers(len(spans))]
            text = f'{sentence[:start]}____{sentence[end:]}'
            return Question(_GAP[rng.integers(len(_GAP))].format(text), (sentence[start:end],))
    return None


def _end(rng: np.random.Generator, sentence: str) -> Question:
    words = sentence.split()
    kept = len(words) - int(rng.integers(2, min(_TAIL_WORDS, len(words) - 3) + 1))
    head, tail = ' '.join(words[:kept]), ' '.join(words[kept:])
    return Question(_END[rng.integers(len(_END))].format(f'{head} ...'), (tail,))
