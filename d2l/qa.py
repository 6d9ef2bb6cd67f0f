"""Evaluation on documents: Doc-to-LoRA beside every other way to the same knowledge.

Source: Doc-to-LoRA (arXiv 2602.15902), section 5.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from d2l import chunking, distillation, document_groups, documents
from d2l.documents import Document
from d2l.fitting import Fitter, text_rows
from d2l.internalize import Internalizer
from d2l.prompts import in_context_prompt
from d2l.scores import SCORES
from hyperlora import lora as lora_lib
from hyperlora import lora_table, sharding, trained
from hyperlora.errors import UserError
from hyperlora.evaluation import plots, record
from hyperlora.evaluation.meter import Meter
from hyperlora.evaluation.methods import methods_of, public
from hyperlora.generation import answer_in_batches
from hyperlora.lora import Lora
from hyperlora.trained import Trained

_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)  # upper ends, in tokens of the base model


@dataclasses.dataclass(frozen=True)
class State:
    """What a method made of a document.

    Attributes:
      lora: that the model answers with.
      prompt: question -> tokens.
      nbytes: what is kept of the document, to answer further questions.
    """

    lora: Lora | None
    prompt: Callable[[str], list[int]]
    nbytes: int = 0


class Methods:
    """Ways to know a document; each is a generator of (label, State), most of one alone."""

    def __init__(
        self,
        model: Trained,
        documents: Sequence[Document],
        config: ConfigDict,
        reader: Trained | None = None,
    ):
        """
        Args:
          documents: all that are evaluated on.
          config: of `configs/eval_qa.py`.
          reader: a `LoraTable` of one entry, that reads documents in the prompt.
        """
        self.model, self.base, self.config = model, model.base, config
        self.internalizer = Internalizer(model)
        self.documents = {document.name: i for i, document in enumerate(documents)}
        self._all = documents
        self.reader = None if reader is None else lora_table.single(reader)
        mesh = sharding.make_mesh({'fsdp': 1}, jax.local_devices()[:1])
        self._teacher = distillation.Teacher(self.base, mesh, 4096, self.reader)
        self._distil = Fitter(
            self.base, ConfigDict({'name': 'top_k_distillation'}), config.learning_rate
        )
        self._tune = Fitter(self.base, ConfigDict({'name': 'cross_entropy'}), config.learning_rate)

    # ---- in the prompt, or nowhere

    def no_context(self, document: Document) -> Iterator[tuple[str, State]]:
        """Nothing of the document."""
        yield 'no_context', State(self.reader, self._bare)

    def in_context(self, document: Document) -> Iterator[tuple[str, State]]:
        """The document in the prompt, as much of it as the window holds."""
        yield 'in_context', self._prompted(self.base.tokenizer.encode(document.text))

    def truncated(self, document: Document) -> Iterator[tuple[str, State]]:
        """The first tokens of the document in the prompt."""
        tokens = self.base.tokenizer.encode(document.text)
        yield 'truncated', self._prompted(tokens[: self.config.truncated_tokens])

    def retrieval(self, document: Document) -> Iterator[tuple[str, State]]:
        """The chunk that fits the question best, by BM25, in the prompt."""
        import bm25s  # of the extra `evaluation`

        tokenizer = self.base.tokenizer
        chunks = chunking.split(
            tokenizer.encode(document.text), tokenizer, self.config.retrieved_tokens
        )
        texts = [tokenizer.decode(chunk) for chunk in chunks]
        index = bm25s.BM25()
        words = bm25s.tokenize(texts, stopwords='en', show_progress=False)
        if words.vocab:
            index.index(words, show_progress=False)

        def prompt(question: str) -> list[int]:
            query = bm25s.tokenize(question, stopwords='en', show_progress=False)
            best = 0
            if words.vocab and query.vocab:
                best = int(index.retrieve(query, k=1, show_progress=False).documents[0, 0])
            return self._with(chunks[best], question)

        yield 'retrieval', State(self.reader, prompt, len(document.text.encode()))

    # ---- by the hypernetwork

    def d2l(self, document: Document) -> Iterator[tuple[str, State]]:
        """The document's LoRA by the hypernetwork."""
        yield 'd2l', self._adapted(self._internalized(document))

    def d2l_other(self, document: Document) -> Iterator[tuple[str, State]]:
        """Control: the LoRA of another document, half the data set away."""
        others = len(self._all)
        if others < 2:
            raise UserError('the method d2l_other needs a second document')
        other = self._all[(self.documents[document.name] + others // 2) % others]
        yield 'd2l_other', self._adapted(self._internalized(other))

    def d2l_in_context(self, document: Document) -> Iterator[tuple[str, State]]:
        """The document's LoRA and the document in the prompt."""
        state = self._prompted(self.base.tokenizer.encode(document.text))
        own = self._internalized(document)
        yield 'd2l_in_context', State(own, state.prompt, state.nbytes + own.nbytes)

    # ---- by gradient descent

    def distilled(self, document: Document) -> Iterator[tuple[str, State]]:
        """Context distillation: questions that the model asks itself, and its own answers."""
        yield from self._distilled('distilled', document, self._fresh())

    def distilled_oracle(self, document: Document) -> Iterator[tuple[str, State]]:
        """Context distillation on the very questions of the evaluation."""
        yield from self._distilled('distilled_oracle', document, self._fresh(), oracle=True)

    def distilled_from_d2l(self, document: Document) -> Iterator[tuple[str, State]]:
        """Context distillation that starts at the document's LoRA by the hypernetwork."""
        start = self._internalized(document)
        yield from self._distilled('distilled_from_d2l', document, start)

    def finetuned(self, document: Document) -> Iterator[tuple[str, State]]:
        """A LoRA trained on the text of the document, as much of it as the window holds."""
        tokens = self.base.tokenizer.encode(document.text)[: self.base.config.max_length]
        rows = text_rows(tokens, self.config.query_tokens)
        yield from self._fitted('finetuned', self._tune, self._fresh(), rows)

    # ---- parts

    def _bare(self, question: str) -> list[int]:
        return self.base.tokenizer.prompt(question)

    def _with(self, tokens: Sequence[int], question: str) -> list[int]:
        return in_context_prompt(self.base, tokens, question, self.config.max_new_tokens)

    def _prompted(self, tokens: Sequence[int]) -> State:
        """The document in the prompt: what is kept of it is its KV cache."""
        cache = self.base.cache_nbytes(min(len(tokens), self.base.config.max_length))
        return State(self.reader, lambda question: self._with(tokens, question), cache)

    def _adapted(self, own: Lora) -> State:
        return State(own, self._bare, own.nbytes)

    def _internalized(self, document: Document) -> Lora:
        tokens = self.model.hypernetwork.encoder.tokenizer.encode(document.text)
        return jax.block_until_ready(self.internalizer(tokens))

    def _fresh(self) -> Lora:
        """A LoRA to train: that of the reader, if there is one, and ranks that do nothing yet."""
        settings = self.model.config.hypernetwork
        modules = (
            settings.get('modules', ['down_proj']) if self.reader is None else self.reader.pairs
        )
        dims = {name: (i, o) for name, i, o in lora_lib.module_dims(self.base.config, modules)}
        fresh = lora_lib.init(
            jax.random.key(0),
            dims,
            self.base.config.num_layers,
            self.config.rank,
            self.config.scaling,
        )
        return fresh if self.reader is None else lora_lib.concatenate(fresh, self.reader)

    def _distilled(
        self, label: str, document: Document, start: Lora, oracle: bool = False
    ) -> Iterator[tuple[str, State]]:
        c = self.config
        settings = distillation.Settings(
            questions='given' if oracle else 'generated',
            questions_per_document=c.generated_questions,
            max_answer_tokens=c.answer_tokens,
        )
        found = list(distillation.records(self._teacher, self.base.tokenizer, [document], settings))
        shape = ConfigDict(
            {
                'queries': 1,
                'query_tokens': c.query_tokens,
                'answer_tokens': c.answer_tokens,
                'teacher': 'stored',
            }
        )
        rows = []
        for known in found:
            numbers = [
                [i] for i in range(len(known.queries)) if document_groups.fit(shape, known, [i])
            ]
            numbers += [[]] * (-len(numbers) % 4)  # few shapes
            rows = [document_groups.row_of(shape, known, row) for row in numbers]
        known = document_groups.join(rows)['query'] if rows else None
        yield from self._fitted(label, self._distil, start, known)

    def _fitted(
        self, label: str, fitter: Fitter, start: Lora, rows: dict[str, np.ndarray] | None
    ) -> Iterator[tuple[str, State]]:
        """After each number of steps on the rows; where they hold no label, as it started."""
        steps = self.config.steps
        teaches = rows is not None and rows['label_weights'].any()
        loras = fitter(start, rows, steps) if teaches else [start] * len(steps)
        for count, own in zip(steps, loras, strict=True):
            yield f'{label}/{count}', self._adapted(own)


METHODS: dict[str, Callable[[Methods, Document], Iterator[tuple[str, State]]]] = public(Methods)


def evaluate(config: ConfigDict, checkpoint: str, workdir: pathlib.Path) -> None:
    """Scores answers about documents; writes metrics.json and plots.

    metrics.json holds, by method: `scores`, means over questions (`d2l.scores.SCORES`);
    `of_in_context`, F1 as a share of that of the document in the prompt; `by_length`, F1 by tokens
    of the document; `costs`, medians over documents (so without compilation): update_seconds,
    update_bytes, kept_bytes, question_seconds and question_bytes; `break_even`, the number of
    questions after which a method took less time than the prompt; and `documents`, all answers. A
    method with steps of gradient descent counts once for each number of them, as METHOD/STEPS;
    where the teacher asks nothing, ends no answer, or cannot hold the document in its window, it is
    scored as it started.

    Args:
      config: of `configs/eval_qa.py`.
      checkpoint: see `trained.load`.
      workdir: where the results go; a rerun with the same settings goes on after the last document.

    Raises:
      UserError: bad settings or documents, unknown methods, a checkpoint that does not read
        documents.
    """
    names = methods_of(config.methods, METHODS)
    steps = config.steps
    positive = steps and all(isinstance(n, int) and n > 0 for n in steps)
    if not positive or list(steps) != sorted(set(steps)):
        raise UserError(f'steps must be positive numbers that rise, not {config.steps}')
    for key in (
        'truncated_tokens',
        'retrieved_tokens',
        'generated_questions',
        'rank',
        'query_tokens',
        'answer_tokens',
        'max_new_tokens',
    ):
        if config[key] < 1:
            raise UserError(f'{key} must be a positive number, not {config[key]}')
    if config.limit < 0 or config.questions < 0:
        raise UserError('limit and questions must not be negative')
    for package in ('bm25s', 'rouge_score'):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"this evaluation needs {package}: pip install 'hyperlora[evaluation]'")
    model = trained.load(checkpoint, quantization=config.base_quantization)
    reader = None
    if config.reader:
        reader = trained.load(config.reader, model.base)
    found = read(config)
    path = workdir / 'metrics.json'
    metrics = record.resume(
        path,
        config,
        {'documents': {}},
        checkpoint=checkpoint,
        weights=record.digest(model.params),
        reader=reader and record.digest(reader.params),
        methods=names,
    )
    methods = Methods(model, found, config, reader)
    todo = [document for document in found if document.name not in metrics['documents']]
    begun = time.perf_counter()
    for done, document in enumerate(todo, start=1):
        questions = document.questions[: config.questions or None]
        results = {}
        for name in names:
            results |= _measure(methods, name, document, questions, config.max_new_tokens)
        metrics['documents'][document.name] = {
            'tokens': len(model.base.tokenizer.encode(document.text)),
            'questions': len(questions),
            'methods': results,
        }
        metrics |= summarize(metrics['documents'])
        record.write(path, metrics)
        left = (time.perf_counter() - begun) / done * (len(todo) - done)
        line = '  '.join(f'{name} {s["f1"]:.3f}' for name, s in metrics['scores'].items())
        print(
            f'{len(metrics["documents"])} documents, F1: {line}  ETA {left / 60:.0f} min',
            flush=True,
        )
    _draw(workdir, metrics)


def read(config: ConfigDict) -> list[Document]:
    """The documents of `config.data` that have questions with answers.

    Raises:
      UserError: none has, or `documents.read` finds something wrong.
    """
    found = documents.read([documents.source(config.data, held_out=True)])
    asked = []
    for document in found:
        answered = tuple(question for question in document.questions if question.answers)
        if answered:
            asked.append(dataclasses.replace(document, questions=answered))
    if not asked:
        raise UserError(f'{config.data}: no document has a question with an answer')
    return asked[: config.limit or None]


def _measure(methods, name, document, questions, max_new_tokens) -> dict[str, dict]:
    """Label -> answers, their scores and what they cost, of a method on a document."""
    results, seconds, held = {}, 0.0, 0
    states = METHODS[name](methods, document)
    while True:
        with Meter() as update:
            label, state = next(states, (None, None))
        if state is None:
            return results
        seconds, held = seconds + update.seconds, max(held, update.bytes)
        with Meter() as asking:
            prompts = [state.prompt(question.text) for question in questions]
            texts = answer_in_batches(methods.base, prompts, max_new_tokens, state.lora)
        results[label] = {
            'answers': texts,
            'scores': {
                key: [score(text, q.answers) for text, q in zip(texts, questions, strict=True)]
                for key, score in SCORES.items()
            },
            'costs': {
                'update_seconds': seconds,
                'update_bytes': held,
                'kept_bytes': state.nbytes,
                'question_seconds': asking.seconds / len(questions),
                'question_bytes': asking.bytes // len(questions),
            },
        }


def summarize(found: dict[str, dict]) -> dict[str, dict]:
    """The metrics of documents; see `evaluate`."""
    labels = list(dict.fromkeys(label for own in found.values() for label in own['methods']))
    scores, costs, by_length = {}, {}, {}
    for label in labels:
        own = [d['methods'][label] for d in found.values()]
        scores[label] = {
            key: float(np.mean(np.concatenate([m['scores'][key] for m in own]))) for key in SCORES
        }
        costs[label] = {
            key: float(np.median([m['costs'][key] for m in own])) for key in own[0]['costs']
        }
        by_length[label] = {}
        for end in (*_LENGTHS, None):
            least = max((n for n in _LENGTHS if end is None or n < end), default=0)
            values = [
                value
                for d in found.values()
                if least < d['tokens'] and (end is None or d['tokens'] <= end)
                for value in d['methods'][label]['scores']['f1']
            ]
            if values:
                by_length[label][str(end or f'over {least}')] = {
                    'f1': float(np.mean(values)),
                    'questions': len(values),
                }
    summary = {'scores': scores, 'costs': costs, 'by_length': by_length}
    if 'in_context' in scores:
        whole = scores['in_context']['f1']
        asked = costs['in_context']['question_seconds']
        summary['of_in_context'] = {
            k: s['f1'] / whole if whole else None for k, s in scores.items()
        }
        summary['break_even'] = {
            label: cost['update_seconds'] / (asked - cost['question_seconds'])
            for label, cost in costs.items()
            if cost['update_seconds'] and cost['question_seconds'] < asked
        }
    return summary


def _draw(workdir: pathlib.Path, metrics: dict) -> None:
    """qa_length.png: F1 by length; qa_seconds.png: F1 by seconds of updating."""
    ends = [str(end) for end in _LENGTHS]
    lines = {
        label: {int(end): v['f1'] for end, v in by.items() if end in ends}
        for label, by in metrics['by_length'].items()
    }
    plots.curves(
        workdir / 'qa_length.png',
        lines,
        'document length (tokens, up to)',
        'F1',
        f'Questions about {pathlib.Path(metrics["settings"]["data"]).name}',
    )
    seconds: dict[str, dict[float, float]] = {}
    for label, cost in metrics['costs'].items():
        at = max(cost['update_seconds'], 1e-3)
        seconds.setdefault(label.split('/')[0], {})[at] = metrics['scores'][label]['f1']
    plots.curves(
        workdir / 'qa_seconds.png',
        seconds,
        'seconds to take the document in (at least 0.001)',
        'F1',
        'Quality against the cost of an update',
    )
