"""Evaluation of several documents in one model: do they disturb each other, or anything else?"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from d2l import qa
from d2l.documents import Document
from d2l.internalize import Internalizer
from d2l.memory import Memory
from d2l.scores import f1
from hyperlora import trained
from hyperlora.errors import UserError
from hyperlora.evaluation import plots, record
from hyperlora.generation import answer_in_batches
from hyperlora.lora import Lora


def evaluate(config: ConfigDict, checkpoint: str, workdir: pathlib.Path) -> None:
    """Asks about documents that are in one model together, and about documents that are not.

    metrics.json holds, by the number of documents in the model, means of F1: `own`, over questions
    about them; `other`, over questions about other documents; `base`, those of the base model on
    the `other` questions; and `same`, the share of the answers to `other` questions that are those
    of the base model. The questions are the same for every number: all `documents` are in the model
    in turn, in groups of so many.

    Args:
      config: of `configs/eval_composition.py`.
      checkpoint: see `trained.load`.
      workdir: where the results go; a rerun with the same settings goes on after the last number.

    Raises:
      UserError: bad documents, or too few; a checkpoint that does not read documents.
    """
    numbers = *config.counts, config.others, config.max_new_tokens
    if not config.counts or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise UserError('counts, others and max_new_tokens must be positive numbers')
    counts = sorted(set(config.counts))
    if config.limit < 0 or config.questions < 0:
        raise UserError('limit and questions must not be negative')
    if config.documents < 1 or any(config.documents % count for count in counts):
        raise UserError(
            f'{config.documents} documents cannot be divided into groups of '
            f'{", ".join(map(str, counts))}: change --config.documents or --config.counts'
        )
    model = trained.load(checkpoint, quantization=config.base_quantization)
    found = qa.read(config)
    needed = config.documents + config.others
    if len(found) < needed:
        raise UserError(
            f'{config.data} has {len(found)} documents with questions; {needed} are needed, '
            f'{config.documents} in the model and {config.others} others'
        )
    others, found = found[-config.others :], found[: config.documents]
    path = workdir / 'metrics.json'
    metrics = record.resume(
        path,
        config,
        {'f1': {}, 'questions': {}},
        free=('counts',),
        checkpoint=checkpoint,
        weights=record.digest(model.params),
    )
    internalizer = Internalizer(model)

    def ask(documents: Sequence[Document], lora: Lora | None) -> tuple[list[float], list[str]]:
        asked = [q for d in documents for q in d.questions[: config.questions or None]]
        prompts = [model.base.tokenizer.prompt(question.text) for question in asked]
        texts = answer_in_batches(model.base, prompts, config.max_new_tokens, lora)
        return [f1(text, q.answers) for text, q in zip(texts, asked, strict=True)], texts

    base, base_texts = ask(others, None)
    todo = [count for count in counts if str(count) not in metrics['f1']]
    begun = time.perf_counter()
    for done, count in enumerate(todo, start=1):
        own, other, same = [], [], []
        for start in range(0, len(found), count):
            group = found[start : start + count]
            memory = Memory(internalizer)
            for document in group:
                memory.add(
                    document.name, model.hypernetwork.encoder.tokenizer.encode(document.text)
                )
            lora = memory.lora()
            own += ask(group, lora)[0]
            values, texts = ask(others, lora)
            other += values
            same += [a == b for a, b in zip(texts, base_texts, strict=True)]
        means = {'own': own, 'other': other, 'base': base, 'same': same}
        metrics['f1'][str(count)] = {key: float(np.mean(v)) for key, v in means.items()}
        metrics['questions'][str(count)] = {'own': len(own), 'other': len(other)}
        record.write(path, metrics)
        left = (time.perf_counter() - begun) / done * (len(todo) - done)
        line = '  '.join(f'{key} {v:.3f}' for key, v in metrics['f1'][str(count)].items())
        print(f'{count} documents: {line}  ETA {left / 60:.0f} min', flush=True)
    lines = {
        key: {int(n): values[key] for n, values in metrics['f1'].items()}
        for key in ('own', 'other', 'base')
    }
    plots.curves(
        workdir / 'composition.png', lines, 'documents in the model', 'F1', 'Documents together'
    )
