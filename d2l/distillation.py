"""Self-distillation data: questions about documents, and the model's own answers to them.

The teacher is the frozen model with the document in its prompt: it answers greedily, and its most
likely tokens at each place of the answer are kept.

Axes: b rows, s tokens, k labels, e the teacher's top entries.

Source: Doc-to-LoRA (arXiv 2602.15902), section 3.3 and appendix.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from d2l import passages
from d2l.documents import Document, Question
from d2l.prompts import in_context_prompt
from d2l.records import Query, Record
from hyperlora import sharding
from hyperlora.generation import bucket, greedy, top_log_probs
from hyperlora.lora import Lora
from hyperlora.models.base import BaseModel
from hyperlora.models.decoder import Decoder

_ASK = (
    'Write {count} questions that are answered by the text above. Ask about its names, numbers and '
    'facts. Each question must be understood without the text. One question per line.'
)
# A line up to its question mark, without a number or the word Question before it.
_QUESTION = re.compile(r'^\W*(?:Question\W+)?(?:\d+\W+)?(\w[^?？؟\n]{8,200}[?？؟])', re.MULTILINE)


class Teacher:
    """The frozen model, reading prompts of many lengths in batches of few shapes on a mesh."""

    def __init__(
        self,
        base: BaseModel,
        mesh: jax.sharding.Mesh,
        tokens_per_pass: int,
        lora: Lora | None = None,
    ):
        """
        Args:
          base: its parameters lie on the mesh.
          tokens_per_pass: bounds the rows of a batch, and so the memory.
          lora: of one row, that the model reads with.
        """
        self.base, self.mesh, self.tokens_per_pass = base, mesh, tokens_per_pass
        self.lora = None if lora is None else jax.device_put(lora, sharding.replicated(mesh))
        self._decoder = Decoder(base.config)
        self._rows = sharding.batch_sharding(mesh)

    def untuned(self) -> Teacher:
        """The model without a LoRA: a reader asks nothing, and knows no text but the prompt's."""
        return Teacher(self.base, self.mesh, self.tokens_per_pass)

    def _in_batches(
        self, sequences: Sequence[Sequence[int]], run: Callable[[np.ndarray, np.ndarray], Any]
    ) -> list[Any]:
        """`run(tokens [b, s], indices [b])` over batches of similar lengths; results in order."""
        results: list[Any] = [None] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        while order:
            length = bucket(len(sequences[order[-1]]), 64)
            rows = max(self.tokens_per_pass // length, 1)
            # A multiple of the shards, always the same for a length.
            shards = sharding.data_shards(self.mesh)
            rows = -(-rows // shards) * shards
            now, order = order[-rows:], order[:-rows]
            padded = [*now, *[now[0]] * (rows - len(now))]
            tokens = np.zeros((rows, length), np.int32)
            for row, index in zip(tokens, padded, strict=True):
                row[: len(sequences[index])] = sequences[index]
            out = run(tokens, np.asarray(padded))
            for row, index in enumerate(now):
                results[index] = jax.tree.map(lambda x, r=row: np.asarray(x[r]), out)
        return results

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[np.ndarray]:
        """Greedy answers with the end of the turn; without it where the limit cut them."""
        eos = self.base.tokenizer.eos_id

        def run(tokens, indices):
            lengths = np.asarray([len(prompts[i]) for i in indices], np.int32)
            with jax.set_mesh(self.mesh):
                out = greedy(
                    self._decoder,
                    self.base.params,
                    *jax.device_put((tokens, lengths), self._rows),
                    eos,
                    max_new_tokens,
                    self.lora,
                )
            return np.asarray(out)

        return [
            row[: np.argmax(row == eos) + 1] if eos in row else row
            for row in self._in_batches(prompts, run)
        ]

    def opinions(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        entries: int,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The likeliest tokens at the places of each answer: ids, log-probabilities `[k, e]`."""
        longest = bucket(max(map(len, answers)), 16)

        def run(tokens, indices):
            places = np.zeros((len(indices), longest), np.int32)
            for row, index in zip(places, indices, strict=True):
                count = len(answers[index])
                row[:count] = len(prompts[index]) - 1 + np.arange(count)
            with jax.set_mesh(self.mesh):
                out = top_log_probs(
                    self._decoder,
                    self.base.params,
                    *jax.device_put((tokens, places), self._rows),
                    entries,
                    self.lora,
                )
            return jax.tree.map(np.asarray, out)

        whole = [[*p, *a[:-1]] for p, a in zip(prompts, answers, strict=True)]
        return [
            (ids[: len(a)], log_probs[: len(a)])
            for (ids, log_probs), a in zip(self._in_batches(whole, run), answers, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How records are made.

    Attributes:
      questions: `given`, those of the documents; `generated`, asked by the model; `both`;
        `passages`, which fill gaps and complete sentences (`d2l.passages`); `restate`, each
        sentence as a document that is to be repeated; or `others`, those of another document, which
        the untuned model answers without any: a document is not to change what it says nothing
        about.
      questions_per_document: how many to generate, or to take over; of given ones all are kept.
      answers: `given`, the first accepted one, or `generated` by the teacher.
      before: text before given answers. After a space their tokens are those of a text, which a
        model can copy.
      max_answer_tokens: answers that have not ended by then are left out.
      entries: t, of the teacher's opinion; 0 for none (the teacher is then asked in training).
    """

    questions: str = 'given'
    questions_per_document: int = 8
    answers: str = 'generated'
    before: str = ' '
    max_answer_tokens: int = 64
    entries: int = 16

    def __post_init__(self):
        for name, known in (
            ('questions', ('given', 'generated', 'both', 'passages', 'restate', 'others')),
            ('answers', ('given', 'generated')),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}')
        if self.questions in ('generated', 'both') and self.answers == 'given':
            raise ValueError('generated questions have no given answers')
        if self.questions == 'others' and self.answers == 'given':
            raise ValueError("answers to others' questions must be generated")
        least = {'questions_per_document': 1, 'max_answer_tokens': 1, 'entries': 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f'{name} must be at least {bound}, not {getattr(self, name)}')


def ask(teacher: Teacher, documents: Sequence[Document], count: int) -> list[Document]:
    """The documents with questions that the untuned model asks about them, as many as it finds."""
    limit = 32 * count
    base, request = teacher.base, _ASK.format(count=count)
    prompts = [
        in_context_prompt(base, base.tokenizer.encode(document.text), request, limit)
        for document in documents
    ]
    found = []
    answers = teacher.untuned().answer(prompts, limit)
    for document, answer in zip(documents, answers, strict=True):
        texts = _QUESTION.findall(base.tokenizer.decode(answer))
        questions = tuple(Question(text.strip()) for text in dict.fromkeys(texts))
        found.append(dataclasses.replace(document, questions=questions[:count]))
    return found


def records(
    teacher: Teacher,
    context_tokenizer: Any,
    documents: Sequence[Document],
    settings: Settings,
    block: int = 64,
) -> Iterator[Record]:
    """Records of documents, in order; one without a usable question is left out. A question is
    usable if the teacher's window has room for it, its document and the answer.

    Args:
      context_tokenizer: of the model that will read the contexts.
      block: documents at a time, at most.
    """
    # Of even sizes: with questions of other documents, none may be alone in its block.
    cuts = np.linspace(0, len(documents), -(-len(documents) // block) + 1).astype(int)
    for start, end in itertools.pairwise(cuts):
        yield from _block(teacher, context_tokenizer, documents[start:end], settings)


def _block(teacher, context_tokenizer, documents, settings):
    base, limit = teacher.base, settings.max_answer_tokens
    documents = _asked(teacher, documents, settings)
    alone = settings.questions == 'others'
    pairs, prompts = [], []
    for number, document in enumerate(documents):
        for question in document.questions:
            # As `in_context_prompt` has it, but never cut: the record's context is the whole text.
            text = question.text if alone else f'{document.text}\n\n{question.text}'
            prompt = base.tokenizer.prompt(text)
            fits = len(prompt) <= base.config.max_length - limit
            if fits and (settings.answers == 'generated' or question.answers):
                pairs.append((number, question))
                prompts.append(prompt)
    if not pairs:
        return
    if alone:
        teacher = teacher.untuned()
    if settings.answers == 'generated':
        answers = teacher.answer(prompts, limit)
    else:
        texts = [settings.before + question.answers[0].lstrip() for _, question in pairs]
        answers = [
            np.asarray([*base.tokenizer.encode(text), base.tokenizer.eos_id], np.int32)
            for text in texts
        ]
    ended = [
        i for i, a in enumerate(answers) if 1 < len(a) <= limit and a[-1] == base.tokenizer.eos_id
    ]
    opinions: list[Any] = [(None, None)] * len(ended)
    if settings.entries and ended:
        opinions = teacher.opinions(
            [prompts[i] for i in ended], [answers[i] for i in ended], settings.entries
        )
    queries: dict[int, list[tuple[Query, np.ndarray]]] = {}
    for i, opinion in zip(ended, opinions, strict=True):
        number, question = pairs[i]
        text = question.text
        prompt = base.tokenizer.prompt(text) if text else base.tokenizer.answer_start
        query = Query(np.asarray(prompt, np.int32), answers[i], *opinion)
        queries.setdefault(number, []).append((query, np.asarray(prompts[i], np.int32)))
    for number, own in queries.items():
        document = documents[number]
        context = np.asarray(context_tokenizer.encode(document.text), np.int32)
        yield Record(document.name, context, *map(tuple, zip(*own, strict=True)))


def _asked(teacher, documents, settings):
    """The documents that fit into the teacher's window, with the questions of the settings."""
    if settings.questions == 'restate':
        documents = [sentence for d in documents for sentence in passages.restate(d)]
    room = teacher.base.config.max_length - settings.max_answer_tokens
    encode = teacher.base.tokenizer.encode
    documents = [d for d in documents if len(encode(d.text)) <= room]
    count = settings.questions_per_document
    if settings.questions in ('given', 'restate'):
        return documents
    if settings.questions == 'passages':
        questions = [passages.ask(d, count) for d in documents]
    elif settings.questions == 'others':
        if len(documents) < 2:
            return []
        half = len(documents) // 2  # far away: neighbours are often about the same
        questions = [other.questions[:count] for other in documents[half:] + documents[:half]]
    else:
        questions = [asked.questions for asked in ask(teacher, documents, count)]
        if settings.questions == 'both':
            questions = [d.questions + new for d, new in zip(documents, questions, strict=True)]
    return [
        dataclasses.replace(d, questions=own) for d, own in zip(documents, questions, strict=True)
    ]
